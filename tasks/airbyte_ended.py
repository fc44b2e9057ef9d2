"""The event of an Airbyte job that has ended: the same whoever tells of it, the receiver or a look."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from prefect.client.orchestration import PrefectClient

from tasks.airbyte_jobs import AirbyteRequest
from tasks.events import EltEvent, Related
from tasks.jobs import JobHandle, JobState, JobStatus
from tasks.jobs.started import JobKey, started_by_us

_OUTCOMES = {
    JobState.SUCCEEDED: "succeeded",
    JobState.PARTIAL: "partial",  # by Airbyte's word succeeded, but not all of its streams have landed
    JobState.FAILED: "failed",
    JobState.CANCELLED: "cancelled",
}


async def ended_event(
    source: str,
    found: tuple[JobHandle, AirbyteRequest, JobStatus],
    client: PrefectClient,
    *,
    occurred: datetime | None = None,
    ours: Mapping[JobKey, UUID | None] | None = None,
) -> EltEvent | None:
    """What is told of a job that has ended; None of one that has not.

    Args:
        source: Name of the *Airbyte Webhook* block, which tells the jobs of one Airbyte from another's.
        found: From `AirbyteVendor.look_up`.
        client: Of the Prefect server, whose journals say whether the job is one of ours.
        occurred: When it ended, where that is known.
        ours: What the journals say, from `started_since`, where it was read for many jobs together.
    """
    handle, request, status = found
    if (outcome := _OUTCOMES.get(status.state)) is None:
        return None
    if ours is None:
        flow_run = await started_by_us(
            client, handle.vendor, handle.resource_id, handle.job_id, began=handle.started_at
        )
    else:
        flow_run = ours.get((handle.vendor, handle.resource_id, handle.job_id))
    payload: dict[str, Any] = {
        "job_id": handle.job_id,
        "operation": request.operation,
        "connection_id": handle.resource_id,
        "connection_name": request.name,
        "owner": request.owner,
        "rows": status.rows,
        "bytes": status.bytes,
        "message": status.message,
        "url": handle.url,
        "started_by_flow_run": str(flow_run) if flow_run else None,
    }
    return EltEvent(
        name=f"elt.airbyte.job.{outcome}",
        key=f"airbyte:{source}:{handle.job_id}",
        # Airbyte's own word: whether all of it has landed one reading tells and another may not.
        known_as="elt.airbyte.job.succeeded" if status.state is JobState.PARTIAL else None,
        occurred=occurred or datetime.now(UTC),
        resource_id=f"elt.airbyte.connection.{handle.resource_id}",
        resource_name=request.name,
        labels={
            "elt.airbyte.operation": request.operation,
            "elt.started-by": "elt-flows" if flow_run else "airbyte",
        },
        payload=payload,
        related=(Related(id=f"prefect.flow-run.{flow_run}", role="started-by"),) if flow_run else (),
    )
