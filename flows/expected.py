"""Look whether connections are as fresh as they are expected to be by now, and tell their owners if not.

For "orders not fresh by 07:00": a deployment scheduled at 07:00. A proactive trigger of Prefect's would not
do alone: it knows spans and not times of day, and begins with a load. Its blocks are those of its `notify`.
"""

# No `from __future__ import annotations` here: see flows/elt.py.
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Annotated, Literal

from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed
from pydantic import BaseModel, ConfigDict, Field

from flows.alerts import Telling, fresh_key, tell_of_end
from flows.fan_out import submit
from flows.parameters import NotifyList
from tasks.fresh import last_landed, resource_of
from tasks.incidents import Alarm
from tasks.jobs import EventLoopTaskRunner


class ExpectedConnection(BaseModel):
    """A connection that should have been loaded by now."""

    model_config = ConfigDict(extra="forbid")

    tool: Literal["airbyte", "fivetran"] = Field(default="airbyte", title="Tool")
    connection_id: str = Field(title="Connection id")
    name: str = Field(default="", title="Name", description="What people call it; its id by default.")
    owner: str | None = Field(default=None, title="Owner", description="Who is told.")

    @property
    def label(self) -> str:
        """What people call it."""
        return self.name or self.connection_id

    @property
    def resource(self) -> str:
        """What it is called in events."""
        return resource_of(self.tool, self.connection_id)


class Freshness(BaseModel):
    """When a connection was last loaded.

    Attributes:
        name: What people call it.
        landed: The end of its last good sync in the time looked at; None if there was none.
    """

    name: str
    landed: datetime | None

    @property
    def sentence(self) -> str:
        """That, in words."""
        return (
            f"{self.name}: loaded {self.landed:%Y-%m-%d %H:%M} UTC"
            if self.landed
            else f"{self.name}: not loaded"
        )


@task(name="look-fresh", task_run_name="look when they were loaded", cache_policy=NO_CACHE)
async def look_fresh(connections: Sequence[ExpectedConnection], since: datetime) -> list[Freshness]:
    """Look when connections were last loaded, by the events that say so.

    Args:
        connections: Which.
        since: How far to look back.
    """
    async with get_client() as client:
        landed = await last_landed(client, [one.resource for one in connections], since)
    return [Freshness(name=one.label, landed=landed[one.resource]) for one in connections]


@flow(
    name="expect-fresh",
    task_runner=EventLoopTaskRunner(),
    on_crashed=[tell_of_end],
    on_failure=[tell_of_end],
)
def expect_fresh(
    connections: Annotated[list[ExpectedConnection], Field(min_length=1)],
    hours: Annotated[float, Field(gt=0, le=168)] = 24.0,
    notify: NotifyList = [],  # noqa: B006 - never changed; a form shows it as an empty list
) -> list[Freshness]:
    """Fail, and tell the owners, if a connection was not loaded in the last hours.

    It goes by events: those of syncs of ours, and what Airbyte's and Fivetran's webhooks have told of syncs
    that others have started. What was loaded and then cleared at Airbyte counts for nothing. What was told is
    ended by the next look that finds the connection fresh, and by the next good run of a deployment that
    names the same `pipeline`.

    Args:
        connections: What should have been loaded.
        hours: How long ago at most. The server keeps events for a week by default.
        notify: Who is told.

    Returns:
        Each with the time of its last load. The run is Failed as `NotFresh` if one has none.
    """
    telling = Telling(notify)
    telling.checked()
    found = submit(look_fresh, connections, datetime.now(UTC) - timedelta(hours=hours)).result()
    alarms, fine = [], []
    for one, fresh in zip(connections, found, strict=True):
        key = fresh_key(f"{one.tool}/{one.connection_id}")
        if fresh.landed:
            fine.append(key)
            continue
        alarms.append(
            Alarm(
                key=key,
                title=f"{one.tool} {one.label}",
                what="is not fresh",
                reason=f"It was not loaded in the last {hours:g} h",
                tool=one.tool,
                owner=one.owner,
            )
        )
    telling.said(alarms, fine, [fresh.sentence for fresh in found])
    return _state(found, hours)  # type: ignore[return-value]  # Prefect takes a State for the result in it


def _state(found: list[Freshness], hours: float) -> State[list[Freshness]]:
    late = [fresh.name for fresh in found if not fresh.landed]
    if not late:
        return Completed(message=f"All {len(found)} were loaded in the last {hours:g} h.", data=found)
    message = f"{len(late)} of {len(found)} were not loaded in the last {hours:g} h: {', '.join(late)}"
    return Failed(name="NotFresh", message=message)
