"""Fresh connections: an event for each that was loaded, and which are not as fresh as they should be.

`elt.connection.fresh` is emitted when a sync of ours has landed. Its resource, `elt.<tool>.connection.<id>`,
is also that of what the tools' webhooks tell (docs/events), so one look finds either. It goes out by
Prefect's own events worker, which sends all that waits over one connection: a sync does not wait for it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from datetime import UTC, datetime
from uuid import UUID, uuid5

from prefect.client.orchestration import PrefectClient
from prefect.events import emit_event

from tasks.jobs import JobResult, JobState
from tasks.last_event import last_event

FRESH = "elt.connection.fresh"

_LANDED = (FRESH, "elt.fivetran.sync.succeeded")
"""Events that say that a connection was loaded, whoever has started it."""

# And Airbyte's, which tells of jobs of every kind by the same name.
_AIRBYTES = ("elt.airbyte.job.succeeded",)
_LOADING = {"elt.airbyte.operation": ["sync", "refresh"]}
_EMPTYING = {"elt.airbyte.operation": ["clear", "reset"]}

_OURS = UUID("5a4f1c52-6a0e-5d0b-8d52-0d6c6f2f7d11")
_AT_ONCE = 10


def resource_of(tool: str, connection_id: str) -> str:
    """What a connection is called in events."""
    return f"elt.{tool}.connection.{connection_id}"


def tell_fresh(result: JobResult) -> JobResult:
    """Emit that a connection is fresh, if that is how its sync ended.

    A retry that finds in the journal that it has ended emits the same event once more, with the same id.

    Returns:
        The result, as it was.
    """
    partial = result.state is JobState.PARTIAL and result.tolerated
    if result.state is JobState.SUCCEEDED or partial:
        emit_event(
            FRESH,
            resource={
                "prefect.resource.id": resource_of(result.vendor, result.resource_id),
                "prefect.resource.name": result.name,
            },
            payload={
                "tool": result.vendor,
                "connection_id": result.resource_id,
                "job_id": result.job_id,
                "state": result.state.value,
                "rows": result.rows,
                "finished_at": datetime.now(UTC).isoformat(),
                "owner": result.owner,
                "url": result.url,
            },
            id=uuid5(_OURS, f"{result.vendor}\n{result.resource_id}\n{result.job_id}"),
        )
    return result


async def last_landed(
    client: PrefectClient, resources: Iterable[str], since: datetime
) -> dict[str, datetime | None]:
    """When each connection was last loaded.

    Args:
        client: Prefect's client.
        resources: As `resource_of` calls them.
        since: How far to look back. The server keeps events for a week by default.

    Returns:
        For each the time of the last event that says so; None where there is none, or where what was loaded
        has been deleted at Airbyte since then.
    """
    slots = asyncio.Semaphore(_AT_ONCE)

    async def last(resource: str) -> datetime | None:
        async with slots:
            told = await last_event(client, _LANDED, resource, since)
            loaded = await last_event(client, _AIRBYTES, resource, since, _LOADING)
            emptied = await last_event(client, _AIRBYTES, resource, since, _EMPTYING)
        landed = max(filter(None, (told, loaded)), default=None)
        return None if landed and emptied and emptied > landed else landed

    names = list(dict.fromkeys(resources))
    return dict(zip(names, await asyncio.gather(*(last(name) for name in names)), strict=True))
