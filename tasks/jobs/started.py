"""Whether a vendor's job is one of ours: looked up in the journals of the flow runs of that time.

For whoever hears of a job that has ended and must know whether a flow run of ours is waiting for it, or
whether the vendor's own scheduler, or a person, had started it.
"""

from __future__ import annotations

from contextlib import suppress
from datetime import datetime, timedelta
from uuid import UUID

from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey
from prefect.client.schemas.objects import Artifact
from prefect.client.schemas.sorting import ArtifactSort

from tasks.jobs.journal import ARTIFACT_KEY, Entry, entries_of

_PAGE = 50
_CLOCKS = timedelta(minutes=5)  # by which the vendor's clock and the Prefect server's may differ


async def started_by_us(
    client: PrefectClient,
    vendor: str,
    resource_id: str,
    *,
    began: datetime,
    job_id: str | None = None,
    ended: datetime | None = None,
) -> UUID | None:
    """The flow run that started this job, or took it over; None if none of ours did.

    Args:
        client: Of the Prefect server.
        vendor: As in the journal: `airbyte`, `fivetran` and so on.
        resource_id: The connection, sync or job definition.
        began: When the job began, or a time before that: older journals are not read.
        job_id: The vendor's id of the job; None for Fivetran, whose API has none.
        ended: Without an id, when the job ended: it is ours if a job of ours was open at that time.
    """
    journals = ArtifactFilter(key=ArtifactFilterKey(any_=[ARTIFACT_KEY]))
    read = 0
    while True:
        page = await client.read_artifacts(
            artifact_filter=journals, sort=ArtifactSort.UPDATED_DESC, limit=_PAGE, offset=read
        )
        for artifact in page:
            if artifact.updated and artifact.updated < began - _CLOCKS:
                return None  # it was written for the last time before the job began
            for entry in _entries(artifact):
                if (entry.vendor, entry.resource_id) == (vendor, resource_id) and _is(entry, job_id, ended):
                    return artifact.flow_run_id
        read += len(page)
        if len(page) < _PAGE:
            return None


def _is(entry: Entry, job_id: str | None, ended: datetime | None) -> bool:
    if entry.handle is None:
        return False
    if job_id is not None:
        return entry.handle.job_id == job_id
    if ended is None or entry.handle.started_at > ended + _CLOCKS:
        return False
    return entry.open or entry.updated >= ended - _CLOCKS


def _entries(artifact: Artifact) -> list[Entry]:
    with suppress(ValueError):  # a journal of another version hides no other
        return entries_of(artifact)
    return []
