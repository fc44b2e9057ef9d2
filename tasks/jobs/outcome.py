"""What came of a job: its result under the policy, and its cancellation in words."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from typing import Any

from blocks.http import TRANSIENT, VendorError
from blocks.logs import Log
from tasks.jobs.model import (
    JobCancelled,
    JobFailed,
    JobHandle,
    JobPolicy,
    JobRequest,
    JobResult,
    JobState,
    JobStatus,
    JobVendor,
)

_LAST_LOOK = 5.0  # seconds
_CANCEL_PATIENCE = 15.0  # seconds for cancelling at the vendor; a worker kills us after 30


def judge(
    vendor: JobVendor[Any], request: JobRequest, policy: JobPolicy, handle: JobHandle, status: JobStatus
) -> JobResult:
    """What a terminal status means under the policy."""
    state, message = status.state, status.message
    if state is JobState.SUCCEEDED and policy.min_rows and (status.rows or 0) < policy.min_rows:
        state = JobState.PARTIAL
        moved = (
            "does not say how many rows it moved" if status.rows is None else f"moved {status.rows:,} rows"
        )
        message = f"it {moved}; at least {policy.min_rows:,} were expected"
    bearable = (policy.on_partial or vendor.on_partial) != "fail"
    rejected, most = status.rows_rejected, policy.max_rows_rejected
    # Not to be told is not to have none: what nobody counts is over any limit.
    if most is not None and state in (JobState.SUCCEEDED, JobState.PARTIAL) and not _within(rejected, most):
        state, bearable = JobState.PARTIAL, False
        said = (
            "it does not say how many rows were rejected"
            if rejected is None
            else f"{rejected:,} rows were rejected"
        )
        message = f"{said}; at most {most:,} are borne" + (f" ({message})" if message else "")
    result = result_of(vendor, request, state, handle, message=message, status=status)
    tolerated = state is JobState.PARTIAL and bearable
    return result.model_copy(update={"tolerated": tolerated})


def _within(count: int | None, most: int) -> bool:
    return count is not None and count <= most


def accept(result: JobResult, policy: JobPolicy, log: Log) -> JobResult:
    """The result of a job that ended well enough; an exception that carries it otherwise."""
    if result.state is JobState.CANCELLED:
        raise JobCancelled(result)
    if not result.good:
        raise JobFailed(result)
    warn = result.state is JobState.PARTIAL and policy.on_partial != "ok"
    log.log(logging.WARNING if warn else logging.INFO, "%s", result.sentence())
    return result


def result_of(
    vendor: JobVendor[Any],
    request: JobRequest,
    state: JobState,
    handle: JobHandle | None = None,
    *,
    message: str | None = None,
    status: JobStatus | None = None,
) -> JobResult:
    """A result with what is known of the job."""
    return JobResult(
        vendor=vendor.name,
        resource_id=request.resource_id,
        name=request.name,
        owner=request.owner,
        job_id=handle.job_id if handle else None,
        url=handle.url if handle else None,
        state=state,
        message=message,
        rows=status.rows if status else None,
        bytes=status.bytes if status else None,
        rows_rejected=status.rows_rejected if status else None,
        duration=status.duration if status else None,
        attempts=status.attempts if status else None,
        streams=status.streams if status else [],
    )


async def final_status(vendor: JobVendor[Any], handle: JobHandle) -> JobStatus | None:
    """How a job has ended by the time that we stop waiting for it; None if it has not, as far as we know.

    Between two looks at an old job lie up to `poll_cap` seconds, in which it may well have ended.
    """
    try:
        async with asyncio.timeout(_LAST_LOOK):
            status = (await vendor.observe([handle])).get(handle.job_id)
    except (TimeoutError, VendorError):
        return None
    return status if isinstance(status, JobStatus) and status.state.terminal else None


@dataclass(frozen=True)
class Cancellation:
    """What came of cancelling a job.

    Attributes:
        words: For a person.
        over: Whether the job has surely ended; one that may go on is attached to by a retry.
    """

    words: str
    over: bool


async def cancel_job(vendor: JobVendor[Any], handle: JobHandle) -> Cancellation:
    """Cancel a job at the vendor. Never raises, never takes long."""
    trouble: VendorError | None = None
    try:
        async with asyncio.timeout(_CANCEL_PATIENCE):
            while True:
                try:
                    state = await vendor.cancel(handle)
                except TRANSIENT as error:
                    trouble = error
                    await asyncio.sleep(1.0)
                    continue
                break
    except TimeoutError:
        why = f" ({trouble})" if trouble else ""
        asked = f"cancelling it was asked for and not confirmed within {_CANCEL_PATIENCE:.0f} s{why}"
        return Cancellation(asked, over=False)
    except Exception as error:  # noqa: BLE001 - what the caller is about to say matters more than this
        return Cancellation(f"it could not be cancelled and may go on ({error})", over=False)
    if state is None:
        return Cancellation(f"{vendor.name} can't cancel; it goes on", over=False)
    if state is JobState.CANCELLED:
        return Cancellation("it was cancelled", over=True)
    return Cancellation(f"it had ended already: {state.lower()}", over=True)
