"""What earlier runs moved: the rows of the last good syncs, out of the journals in the Prefect API."""

from __future__ import annotations

from collections.abc import Collection
from uuid import UUID

from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey
from prefect.client.schemas.sorting import ArtifactSort

from tasks.jobs.journal import ARTIFACT_KEY, entries_of
from tasks.jobs.model import JobState

_PAGE = 20  # journals per request: one may hold a hundred jobs
_MOST_PAGES = 10

Resource = tuple[str, str]
"""A vendor's name, and the id of a connection of it."""


async def rows_of_earlier_runs(
    wanted: Collection[Resource], *, runs: int, but: UUID | None
) -> dict[Resource, list[int]]:
    """The rows of each connection's last syncs that moved some, newest first, whichever flow ran them.

    Args:
        wanted: The connections.
        runs: How many syncs of each at most.
        but: The flow run that is going on: its own syncs are no history.

    Returns:
        Only connections with a history are in it. The newest two hundred journals are looked through.
    """
    found: dict[Resource, list[int]] = {}
    missing = set(wanted)
    async with get_client() as client:
        for page in range(_MOST_PAGES):
            journals = await client.read_artifacts(
                artifact_filter=ArtifactFilter(key=ArtifactFilterKey(any_=[ARTIFACT_KEY])),
                sort=ArtifactSort.CREATED_DESC,
                limit=_PAGE,
                offset=page * _PAGE,
            )
            for journal in journals:
                if but is not None and journal.flow_run_id == but:
                    continue
                for entry in entries_of(journal):
                    result, resource = entry.result, (entry.vendor, entry.resource_id)
                    if resource not in missing or result is None or ":sync:" not in entry.key:
                        continue
                    # A sync of nothing is what is looked for; it must not become what is usual.
                    if result.state is JobState.SUCCEEDED and result.rows:
                        rows = found.setdefault(resource, [])
                        rows.append(result.rows)
                        if len(rows) >= runs:
                            missing.discard(resource)
            if not missing or len(journals) < _PAGE:
                break
    return found
