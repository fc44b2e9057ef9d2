"""When Prefect's server has last heard of something."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta

from prefect.client.orchestration import PrefectClient
from prefect.events.filters import EventFilter, EventNameFilter, EventOccurredFilter, EventResourceFilter
from prefect.events.schemas.events import ResourceSpecification


async def last_event(
    client: PrefectClient,
    names: Sequence[str],
    resource: str,
    since: datetime,
    labels: Mapping[str, list[str]] | None = None,
) -> datetime | None:
    """When an event of one of these names last occurred to a resource; None if none did.

    Args:
        client: Prefect's client.
        names: Of the events.
        resource: Its `prefect.resource.id`.
        since: How far to look back. The server keeps events for a week by default.
        labels: What the resource's labels have to be, where that matters: one of these values each.
    """
    wanted = EventFilter(
        occurred=EventOccurredFilter(since=since, until=datetime.now(UTC) + timedelta(minutes=1)),
        event=EventNameFilter(name=list(names)),
        resource=EventResourceFilter(
            id=[resource], labels=ResourceSpecification.model_validate(labels) if labels else None
        ),
    )
    response = await client.request(
        "POST", "/events/filter", json={"filter": wanted.model_dump(mode="json"), "limit": 1}
    )
    found = response.json()["events"]
    return datetime.fromisoformat(found[0]["occurred"]) if found else None
