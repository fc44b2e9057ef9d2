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
    client: PrefectClient, vendor: str, resource_id: str, job_id: str, *, began: datetime
) -> UUID | None:
    """The flow run that started this job, or took it over; None if none of ours did.

    Args:
        client: Of the Prefect server.
        vendor: As in the journal: `airbyte`, `fivetran` and so on.
        resource_id: The connection, sync or job definition.
        job_id: The vendor's id of the job.
        began: When the job began, or a time before that: older journals are not read.
    """
    journals = ArtifactFilter(key=ArtifactFilterKey(any_=[ARTIFACT_KEY]))
    wanted, read = (vendor, resource_id, job_id), 0
    while True:
        page = await client.read_artifacts(
            artifact_filter=journals, sort=ArtifactSort.UPDATED_DESC, limit=_PAGE, offset=read
        )
        for artifact in page:
            if artifact.updated and artifact.updated < began - _CLOCKS:
                return None  # it was written for the last time before the job began
            for entry in _entries(artifact):
                handle = entry.handle
                if handle and (handle.vendor, handle.resource_id, handle.job_id) == wanted:
                    return artifact.flow_run_id
        read += len(page)
        if len(page) < _PAGE:
            return None


def _entries(artifact: Artifact) -> list[Entry]:
    with suppress(ValueError):  # a journal of another version hides no other
        return entries_of(artifact)
    return []
