"""Whether a vendor's job is one of ours: looked up in the journals of the flow runs of that time.

For whoever hears of a job that has ended and must know whether a flow run of ours is waiting for it, or
whether the vendor's own scheduler, or a person, had started it.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from datetime import datetime, timedelta
from uuid import UUID

from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey
from prefect.client.schemas.objects import Artifact
from prefect.client.schemas.sorting import ArtifactSort

from tasks.jobs.journal import ARTIFACT_KEY, Entry, entries_of

JobKey = tuple[str, str, str]
"""Vendor, resource and job id, as in a handle."""

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
    wanted = (vendor, resource_id, job_id)
    async with aclosing(_journalled(client, began)) as journalled:
        async for key, flow_run in journalled:
            if key == wanted:
                return flow_run
    return None


async def started_since(client: PrefectClient, began: datetime) -> dict[JobKey, UUID | None]:
    """The flow runs of all jobs that were ours since a time, for whoever asks after many.

    Args:
        client: Of the Prefect server.
        began: When the first of the jobs began.
    """
    found: dict[JobKey, UUID | None] = {}
    async with aclosing(_journalled(client, began)) as journalled:
        async for key, flow_run in journalled:
            found.setdefault(key, flow_run)
    return found


async def _journalled(client: PrefectClient, began: datetime) -> AsyncGenerator[tuple[JobKey, UUID | None]]:
    journals, read = ArtifactFilter(key=ArtifactFilterKey(any_=[ARTIFACT_KEY])), 0
    while True:
        page = await client.read_artifacts(
            artifact_filter=journals, sort=ArtifactSort.UPDATED_DESC, limit=_PAGE, offset=read
        )
        for artifact in page:
            if artifact.updated and artifact.updated < began - _CLOCKS:
                return  # it was written for the last time before the job began
            for entry in _entries(artifact):
                if handle := entry.handle:
                    yield (handle.vendor, handle.resource_id, handle.job_id), artifact.flow_run_id
        read += len(page)
        if len(page) < _PAGE:
            return


def _entries(artifact: Artifact) -> list[Entry]:
    with suppress(ValueError):  # a journal of another version hides no other
        return entries_of(artifact)
    return []
