"""Runs one remote job to its end, whatever the vendor, and keeps the promises that make it safe to retry.

Never twice: the intent is in the journal before the start request and the job's id right after it. A start
whose reply was lost is looked up before it is sent again; a restarted task attaches to its job.
"""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Any, Generic, TypeVar

from prefect.exceptions import MissingContextError
from prefect.logging import get_run_logger

from blocks.http import TRANSIENT, RateLimited, VendorError, VendorUnavailable
from tasks.jobs.journal import Entry, Journal, current_journal
from tasks.jobs.model import (
    AlreadyRunning,
    JobCancelled,
    JobFailed,
    JobHandle,
    JobPolicy,
    JobRequest,
    JobResult,
    JobState,
    JobStatus,
    JobTimeout,
    JobVendor,
)
from tasks.jobs.quiet import without_traceback
from tasks.jobs.runner import current_interrupt
from tasks.jobs.watcher import JobWatcher, Log, watcher_for

# The Date header, by which the vendor's clock is known, counts whole seconds; so may its job's times.
_CLOCK_MARGIN = timedelta(seconds=3)
_LAST_LOOK = 5.0  # seconds
_CANCEL_PATIENCE = 15.0  # seconds for cancelling at the vendor; a worker kills us after 30

R = TypeVar("R", bound=JobRequest)


async def run_job(
    vendor: JobVendor[R], request: R, policy: JobPolicy, *, journal: Journal | None = None
) -> JobResult:
    """Start a vendor's job, or attach to the one that an earlier attempt started, and wait for its end.

    Args:
        vendor: How this vendor's jobs are started, found, observed and cancelled.
        request: What to run.
        policy: Times in seconds, and what the less clear ends mean.
        journal: Where intents and job ids are kept; that of the current flow run by default.

    Returns:
        The result of a job that succeeded, was skipped under `on_active: skip`, or ended partially where the
        policy lets that pass.

    Raises:
        JobFailed: The vendor says failed, or the end was partial under `on_partial: fail`.
        JobCancelled: Somebody cancelled the job at the vendor.
        JobTimeout: It did not end in `policy.timeout` seconds; it was cancelled or left as the policy says.
        VendorError: The API refused, or was out of reach for longer than `policy.outage`. A job that was
            started is left as it is; a retry attaches to it.
    """
    async with vendor.session():
        watcher = await watcher_for(vendor)
        return await _Run(vendor, request, policy, journal or current_journal(), watcher, _logger()).run()


def _logger() -> Log:
    without_traceback()
    try:
        return get_run_logger()
    except MissingContextError:
        return logging.getLogger("elt.jobs")


class _Run(Generic[R]):
    """One call of `run_job`."""

    def __init__(
        self,
        vendor: JobVendor[R],
        request: R,
        policy: JobPolicy,
        journal: Journal,
        watcher: JobWatcher,
        log: Log,
    ) -> None:
        self.vendor = vendor
        self.request = request
        self.policy = policy
        self.journal = journal
        self.log = log
        self.watcher = watcher
        self.key = journal.key(f"{vendor.name}:{request.operation}:{request.resource_id}")
        self.deadline = time.monotonic() + policy.timeout
        self.maybe_started = False
        self.attached = False
        self.entry = Entry(
            key=self.key,
            vendor=vendor.name,
            resource_id=request.resource_id,
            name=request.name,
            block=vendor.block,
            since=datetime.now(UTC),
        )

    async def run(self) -> JobResult:
        earlier = await self.journal.entry(self.key)
        if earlier and earlier.result and earlier.result.good:
            self.log.info("%s, by an earlier attempt of this run", earlier.result.sentence())
            return earlier.result
        attached = await self._attach(earlier) if earlier and earlier.open else None
        begun = attached or await self._start(earlier)
        return begun if isinstance(begun, JobResult) else await self._watch(begun)

    # -- attaching and starting ---------------------------------------------------------------------------

    async def _attach(self, earlier: Entry) -> JobHandle | None:
        """The job that an earlier attempt started and did not see the end of."""
        self.entry = earlier
        if earlier.handle is None:
            handle = await self._find()
            if handle is None:
                return None
            await self._started(handle)
        else:
            handle = earlier.handle
        self.attached = True
        # However late it is: one look at least, for it may well have ended in the meantime.
        self.deadline = time.monotonic() + max(_LAST_LOOK, self.policy.timeout - self._age(handle))
        self.log.info("attached to %s job %s of an earlier attempt", self.vendor.name, handle.job_id)
        return handle

    async def _start(self, earlier: Entry | None) -> JobHandle | JobResult:
        known = list(earlier.known) if earlier else []
        if earlier and earlier.handle:
            known.append(earlier.handle.job_id)
        self.entry = self.entry.model_copy(
            update={
                "marker": f"elt:{self.key}:{len(known) + 1}",
                "since": datetime.now(UTC) - _CLOCK_MARGIN,
                "known": known,
                "handle": None,
                "result": None,
            }
        )
        await self.journal.record(self.entry, urgent=True)
        try:
            handle = await self._start_or_find()
        except VendorError as error:
            if not self.maybe_started:
                # Surely nothing was started: say so in the journal, that nobody goes looking for it.
                await self._close(self._result(JobState.FAILED, message=str(error)))
            raise
        if isinstance(handle, JobHandle):
            await self._started(handle)
        return handle

    async def _start_or_find(self) -> JobHandle | JobResult:
        """Start the job; look for it first wherever a start may have had an effect already."""
        give_up = time.monotonic() + self.policy.outage
        pause = 1.0
        while True:
            try:
                return await self._send_start()
            except AlreadyRunning as refused:
                outcome = await self._already_running(refused.active)
                if outcome is not None:
                    return outcome
                give_up = time.monotonic() + self.policy.outage
                continue
            except VendorError as error:
                self.maybe_started |= error.sent
                if not isinstance(error, TRANSIENT):
                    raise
                trouble: VendorError = error
            if trouble.sent:
                self.log.warning("%s The job may have started all the same; looking for it.", trouble)
                found = await self._find()
                if found is not None:
                    self.log.info("found it: job %s", found.job_id)
                    return found
            if time.monotonic() >= give_up:
                raise trouble
            if not trouble.sent:
                self.log.warning("%s Trying again.", trouble)
            pause = trouble.pause if isinstance(trouble, RateLimited) else min(pause * 2, 15.0)
            await asyncio.sleep(min(pause, max(0.0, give_up - time.monotonic())))

    async def _send_start(self) -> JobHandle:
        """The start request. Shielded: one that is cut off in the middle leaves a job of unknown id."""
        starting = asyncio.create_task(self.vendor.start(self.request, self.entry.marker))
        try:
            return await asyncio.shield(starting)
        except asyncio.CancelledError:
            with suppress(TimeoutError, VendorError, AlreadyRunning):
                async with asyncio.timeout(_CANCEL_PATIENCE):
                    handle = await starting
                self.entry = self.entry.model_copy(update={"handle": handle})
                await self._interrupted(handle)
            raise

    async def _already_running(self, active: JobHandle | None) -> JobHandle | JobResult | None:
        """What to do about an active run: a handle or a result to go on with, or None to start again."""
        name = f"job {active.job_id}" if active else "a job"
        if active and self.maybe_started and active.started_at >= self.vendor.theirs(self.entry.since):
            self.log.info("%s is the one whose start was not answered", name)
            return active
        if self.policy.on_active == "adopt" and active:
            self.log.info("%s is running already: taken as ours", name)
            return active
        if self.policy.on_active == "skip":
            result = self._result(
                JobState.SKIPPED, active, message=f"{name} is running already, and the policy says skip"
            )
            await self._close(result)
            return result
        if self.policy.on_active == "fail":
            result = self._result(
                JobState.FAILED, active, message=f"{name} is running already, and the policy says fail"
            )
            await self._close(result)
            raise JobFailed(result)
        self.log.info("%s is running already: waiting for it before starting ours", name)
        left = self.deadline - time.monotonic()
        try:
            async with asyncio.timeout(max(0.0, left)):
                if active is None:
                    await asyncio.sleep(self.policy.interval(self.policy.timeout - left))
                else:
                    await self.watcher.wait(active, self.policy, log=self.log)
        except TimeoutError:
            result = self._result(
                JobState.FAILED,
                active,
                message=f"{name} was running already and did not end in {self.policy.timeout:g} s; "
                "ours was not started",
            )
            await self._close(result)
            raise JobTimeout(result) from None
        return None

    async def _find(self) -> JobHandle | None:
        """Look for the job of an intent, until the vendor must show it or the outage budget is spent."""
        began = time.monotonic()
        shown_by: float | None = None
        while True:
            try:
                found = await self.vendor.find(
                    self.request, self.entry.marker, self.entry.since, self.entry.known
                )
            except asyncio.CancelledError:
                await self._interrupted_find()
                raise
            except TRANSIENT as error:
                if time.monotonic() - began >= self.policy.outage:
                    raise VendorUnavailable(
                        error.vendor,
                        f"{error.message}, and a start request of ours may have been accepted",
                        method=error.method,
                        path=error.path,
                        status=error.status,
                        guidance="A retry looks for that job before it starts another.",
                    ) from error
                await asyncio.sleep(error.pause if isinstance(error, RateLimited) else 2.0)
                continue
            if found is not None:
                return found
            # Only answers count: the time in which the vendor was silent shows nothing.
            now = time.monotonic()
            shown_by = shown_by or now + self.vendor.grace
            if now >= shown_by:
                return None
            await asyncio.sleep(min(1.0, self.vendor.grace / 3))

    async def _interrupted_find(self) -> None:
        """Cancelled while nobody knows whether our start had an effect: one last look."""
        with suppress(TimeoutError, VendorError):
            async with asyncio.timeout(_LAST_LOOK):
                handle = await self.vendor.find(
                    self.request, self.entry.marker, self.entry.since, self.entry.known
                )
            if handle is not None:
                self.entry = self.entry.model_copy(update={"handle": handle})
                await self._interrupted(handle)

    async def _started(self, handle: JobHandle) -> None:
        self.entry = self.entry.model_copy(update={"handle": handle})
        self.log.info("%s job %s %s", self.vendor.name, handle.job_id, handle.url or "")
        await self._record()

    # -- waiting ------------------------------------------------------------------------------------------

    async def _watch(self, handle: JobHandle) -> JobResult:
        try:
            async with asyncio.timeout(self.deadline - time.monotonic()):
                status = await self.watcher.wait(
                    handle,
                    self.policy,
                    age=self._age(handle),
                    at_once=self.attached,
                    on_change=self._tell,
                    log=self.log,
                )
        except TimeoutError:
            raise JobTimeout(await self._timed_out(handle)) from None
        except asyncio.CancelledError:
            await self._interrupted(handle)
            raise
        return await self._finish(handle, status)

    def _age(self, handle: JobHandle) -> float:
        return max(0.0, (self.vendor.theirs(datetime.now(UTC)) - handle.started_at).total_seconds())

    def _tell(self, status: JobStatus) -> None:
        if not status.state.terminal:
            self.log.info("%s", status.word)

    async def _finish(self, handle: JobHandle, status: JobStatus) -> JobResult:
        result = _judge(self.vendor, self.request, self.policy, handle, status)
        await self._close(result)
        return _accept(result, self.log)

    async def _timed_out(self, handle: JobHandle) -> JobResult:
        message = f"it did not end in {self.policy.timeout:g} s"
        if self.policy.on_timeout == "detach":
            # The entry stays open: a retry attaches to the job.
            return self._result(JobState.FAILED, handle, message=f"{message}; it was left running")
        done = await self._cancel(handle)
        result = self._result(JobState.FAILED, handle, message=f"{message}; {done}")
        await self._close(result)
        return result

    # -- cancelling ---------------------------------------------------------------------------------------

    async def _interrupted(self, handle: JobHandle) -> None:
        """Our task is being cancelled: cancel the vendor's job, unless only our machine goes away."""
        if current_interrupt() == "terminated":
            self.log.warning(
                "stopped from outside; job %s goes on and the next attempt attaches to it. %s",
                handle.job_id,
                handle.url or "",
            )
            await self._record()
            return
        done = await self._cancel(handle)
        self.log.warning("cancelled: job %s: %s. %s", handle.job_id, done, handle.url or "")
        await self._close(self._result(JobState.CANCELLED, handle, message=f"the run was cancelled; {done}"))

    async def _cancel(self, handle: JobHandle) -> str:
        return await cancel_job(self.vendor, handle)

    # -- results ------------------------------------------------------------------------------------------

    def _result(
        self, state: JobState, handle: JobHandle | None = None, *, message: str | None = None
    ) -> JobResult:
        return _result(self.vendor, self.request, state, handle, message=message)

    async def _close(self, result: JobResult) -> None:
        self.entry = self.entry.model_copy(update={"result": result})
        await self._record()

    async def _record(self) -> None:
        """Write what has happened. The intent is written by now, so a failure loses time, not truth."""
        try:
            await self.journal.record(self.entry)
        except Exception as error:  # noqa: BLE001 - the job is real whether or not we can write it down
            self.log.warning("could not write to the journal of this run: %r", error)


def _judge(
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
    result = _result(vendor, request, state, handle, message=message, status=status)
    tolerated = state is JobState.PARTIAL and (policy.on_partial or vendor.on_partial) != "fail"
    return result.model_copy(update={"tolerated": tolerated})


def _accept(result: JobResult, log: Log) -> JobResult:
    """The result of a job that ended well enough; an exception that carries it otherwise."""
    if result.state is JobState.CANCELLED:
        raise JobCancelled(result)
    if not result.good:
        raise JobFailed(result)
    log.log(logging.WARNING if result.state is JobState.PARTIAL else logging.INFO, "%s", result.sentence())
    return result


def _result(
    vendor: JobVendor[Any],
    request: JobRequest,
    state: JobState,
    handle: JobHandle | None,
    *,
    message: str | None = None,
    status: JobStatus | None = None,
) -> JobResult:
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
    )


async def wait_for_job(
    vendor: JobVendor[Any], request: JobRequest, handle: JobHandle, policy: JobPolicy
) -> JobResult:
    """Wait for a job that somebody else started. It is never cancelled from here.

    Raises:
        JobFailed, JobCancelled, JobTimeout, VendorError: As `run_job`.
    """
    log = _logger()
    async with vendor.session():
        age = max(0.0, (vendor.theirs(datetime.now(UTC)) - handle.started_at).total_seconds())
        try:
            async with asyncio.timeout(policy.timeout):
                watcher = await watcher_for(vendor)
                status = await watcher.wait(handle, policy, age=age, at_once=True, log=log)
        except TimeoutError:
            message = f"it did not end in {policy.timeout:g} s; it was left running"
            raise JobTimeout(_result(vendor, request, JobState.FAILED, handle, message=message)) from None
    return _accept(_judge(vendor, request, policy, handle, status), log)


async def cancel_job(vendor: JobVendor[Any], handle: JobHandle) -> str:
    """Cancel a job at the vendor and say in words what came of it. Never raises, never takes long."""
    try:
        async with asyncio.timeout(_CANCEL_PATIENCE):
            return (
                "it was cancelled"
                if await vendor.cancel(handle)
                else f"{vendor.name} can't cancel; it goes on"
            )
    except TimeoutError:
        return f"cancelling it was asked for and not confirmed within {_CANCEL_PATIENCE:.0f} s"
    except VendorError as error:
        return f"it could not be cancelled and may go on ({error})"
