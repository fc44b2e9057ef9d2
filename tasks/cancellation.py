"""What happens to the vendors' jobs when a flow run is cancelled and its process can't see to it itself."""

from __future__ import annotations

import asyncio
from typing import Any

from prefect import Flow
from prefect.client.schemas.objects import FlowRun, State
from prefect.logging.loggers import flow_run_logger

from tasks.jobs import Cancellation, Entry, JobResult, JobState, PlainRequest, RunJournal, cancel_job
from tasks.tools import VENDORS

_AT_ONCE = 20


async def cancel_open_jobs(flow: Flow[Any, Any], flow_run: FlowRun, state: State[Any]) -> None:
    """An `on_cancellation` hook: cancel at the vendors what this run has started and not seen the end of.

    The flow's own process does that first, when it is still there. This runs in the worker's process after
    it, knows only the flow run's id, and acts by the journal, where what may go on stays open: somebody who
    retries the run attaches to it. It is not for `on_crashed`: after a crash the jobs go on, and the next
    attempt attaches to them.
    """
    log = flow_run_logger(flow_run, flow)
    journal = RunJournal(flow_run.id, None)
    slots = asyncio.Semaphore(_AT_ONCE)

    async def cancel(entry: Entry) -> None:
        async with slots:
            cancelled = await _cancel(entry)
        log.warning("%s %s: %s", entry.vendor, entry.name, cancelled.words)
        if not cancelled.over:
            return
        job = entry.handle
        result = JobResult(
            vendor=entry.vendor,
            resource_id=entry.resource_id,
            name=entry.name,
            job_id=job.job_id if job else None,
            url=job.url if job else None,
            state=JobState.CANCELLED,
            message=f"the run was cancelled; {cancelled.words}",
        )
        await journal.record(entry.model_copy(update={"result": result}))

    await asyncio.gather(*(cancel(entry) for entry in await journal.entries() if entry.open))


async def _cancel(entry: Entry) -> Cancellation:
    if entry.block is None or entry.vendor not in VENDORS:
        words = "its credentials are in no saved block, so nobody but its own process could cancel it"
        return Cancellation(words, over=False)
    try:
        vendor = await VENDORS[entry.vendor](entry.block)
        async with vendor.session():
            handle = entry.handle or await vendor.find(_request(entry), entry)
            if handle is None:
                return Cancellation("no job was started", over=True)
            return await cancel_job(vendor, handle)
    except Exception as error:  # noqa: BLE001 - whatever it is, the other jobs are to be cancelled all the same
        return Cancellation(f"it could not be cancelled and may go on ({error})", over=False)


def _request(entry: Entry) -> PlainRequest:
    """As much of a request as the journal keeps."""
    return PlainRequest(entry.resource_id, entry.key.split(":")[1], entry.name)
