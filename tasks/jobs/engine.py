"""Runs one remote job to its end, whatever the vendor, and keeps the promises that make it safe to retry.

Never twice: the intent is in the journal before the start request and the job's id right after it. A start
whose reply was lost is looked up before it is sent again; a restarted task attaches to its job.
"""

from __future__ import annotations

import asyncio
import time
from datetime import UTC, datetime, timedelta
from typing import Any, Generic, TypeVar
from uuid import uuid4

import anyio

from blocks.http import TRANSIENT, RateLimited, VendorError, VendorUnavailable
from blocks.logs import Log, run_logger
from tasks.jobs.journal import Entry, Journal, current_journal, entry_key
from tasks.jobs.model import (
    AlreadyRunning,
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
from tasks.jobs.outcome import accept, cancel_job, final_status, judge, result_of
from tasks.jobs.quiet import without_traceback
from tasks.jobs.runner import current_interrupt
from tasks.jobs.slots import NoSlot, Slot
from tasks.jobs.watcher import JobWatcher, watcher_for

# The Date header, by which the vendor's clock is known, counts whole seconds; so may its job's times.
_CLOCK_MARGIN = timedelta(seconds=3)
_LAST_LOOK = 5.0  # seconds
_START_PATIENCE = 8.0  # seconds for the reply to a start when we are cancelled; a worker kills us after 30

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
            To one that goes on, because it was left or could not be cancelled, a retry attaches.
        VendorError: The API refused, or was out of reach for longer than `policy.outage`. A job that was
            started is left as it is; a retry attaches to it.
    """
    async with vendor.session():
        watcher = await watcher_for(vendor)
        return await _Run(vendor, request, policy, journal or current_journal(), watcher, _logger()).run()


async def wait_for_job(
    vendor: JobVendor[Any], request: JobRequest, handle: JobHandle, policy: JobPolicy
) -> JobResult:
    """Wait for a job that somebody else started. It is never cancelled from here.

    Raises:
        JobFailed, JobCancelled, JobTimeout, VendorError: As `run_job`.
    """
    log = _logger()
    async with vendor.session():
        try:
            async with asyncio.timeout(policy.timeout):
                watcher = await watcher_for(vendor)
                age = _age(vendor, handle)
                status = await watcher.wait(handle, policy, age=age, at_once=True, log=log)
        except TimeoutError:
            ended = await final_status(vendor, handle)
            if ended is None:
                message = f"it did not end in {policy.timeout:g} s; it was left running"
                result = result_of(vendor, request, JobState.FAILED, handle, message=message)
                raise JobTimeout(result) from None
            status = ended
        except AlreadyRunning as skipped:
            message = f"the vendor skipped it: {skipped}"
            raise JobFailed(result_of(vendor, request, JobState.SKIPPED, handle, message=message)) from None
    return accept(judge(vendor, request, policy, handle, status), policy, log)


def _logger() -> Log:
    without_traceback()
    return run_logger("elt.jobs")


def _age(vendor: JobVendor[Any], handle: JobHandle) -> float:
    return max(0.0, (vendor.theirs(datetime.now(UTC)) - handle.started_at).total_seconds())


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
        self.slot = Slot(policy.concurrency_limit, log)
        self.deadline = self.patience = time.monotonic() + policy.timeout
        self.attached = False
        # What a cancellation has to clear up after:
        self.intent = False  # an entry of ours is open in the journal
        self.starting: asyncio.Task[JobHandle] | None = None  # a start request is under way
        self.maybe_started = False  # a start request of unknown effect was sent
        self.asked: datetime | None = None  # when we set out to send the first such request
        self.entry = Entry(
            key=journal.key(entry_key(vendor.name, request.operation, request.resource_id, vendor.block)),
            vendor=vendor.name,
            resource_id=request.resource_id,
            name=request.name,
            block=vendor.block,
            since=datetime.now(UTC),
        )

    async def run(self) -> JobResult:
        try:
            earlier = await self.journal.entry(self.entry.key)
            if earlier and earlier.result and earlier.result.good:
                self.log.info("%s, by an earlier attempt of this run", earlier.result.sentence())
                return earlier.result
            attached = await self._attach(earlier) if earlier and earlier.open else None
            begun = attached or await self._start(earlier)
            return begun if isinstance(begun, JobResult) else await self._see_through(begun)
        except asyncio.CancelledError:
            # anyio, which is behind a task's `timeout_seconds`, cancels every await again until we are gone.
            with anyio.CancelScope(shield=True):
                await self._interrupted()
            raise
        finally:
            with anyio.CancelScope(shield=True):
                # A job that goes on without us keeps its slot for the attempt that attaches to it.
                goes_on = self.entry.open and (self.entry.handle is not None or self.maybe_started)
                await (self.slot.leave() if goes_on else self.slot.release())

    # -- attaching and starting ---------------------------------------------------------------------------

    async def _attach(self, earlier: Entry) -> JobHandle | None:
        """The job that an earlier attempt started and did not see the end of."""
        self.entry = earlier
        self.intent = True
        handle = earlier.handle
        if handle is None:
            self.maybe_started = True
            handle = await self._find()
            self.maybe_started = False
            if handle is None:
                self.asked = earlier.since  # not every vendor can show what that has made
                return None
            await self._started(handle)
        self.attached = True
        await self.slot.go_on(earlier.lease)
        # However late it is: one look at least, for it may well have ended in the meantime.
        left = self.policy.timeout - _age(self.vendor, handle)
        self.deadline = time.monotonic() + max(_LAST_LOOK, left)
        self.log.info("%s: attached to job %s of an earlier attempt", self.request.name, handle.job_id)
        return handle

    async def _start(self, earlier: Entry | None) -> JobHandle | JobResult:
        await self._take_slot(earlier)
        known = await self.journal.job_ids(self.vendor.name, self.request.resource_id)
        self.entry = self.entry.model_copy(
            update={
                "marker": f"elt:{self.entry.key}:{len(known) + 1}:{uuid4().hex[:8]}",
                "since": datetime.now(UTC) - _CLOCK_MARGIN,
                "known": known,
                "baseline": None,
                "repeat": earlier is not None and (earlier.repeat or earlier.handle is not None),
                "handle": None,
                "result": None,
                "lease": self.slot.lease,
            }
        )
        self.intent = True
        await self.journal.record(self.entry, urgent=True)
        try:
            begun = await self._start_or_find()
        except Exception as error:
            if self.entry.open and not self.maybe_started:
                # Surely nothing was started: say so in the journal, that nobody goes looking for it.
                await self._close(self._result(JobState.FAILED, message=str(error)))
            raise
        if isinstance(begun, JobHandle):
            self.deadline = time.monotonic() + self.policy.timeout
            await self._started(begun)
        return begun

    async def _take_slot(self, earlier: Entry | None) -> None:
        if self.policy.concurrency_limit is None or self.slot.lease is not None:
            return
        try:
            await self.slot.take(self.policy.timeout, earlier.lease if earlier and earlier.open else None)
        except NoSlot as error:
            raise JobTimeout(self._result(JobState.FAILED, message=f"{error}; it was not started")) from None
        self.deadline = self.patience = time.monotonic() + self.policy.timeout  # only now is it its turn

    async def _start_or_find(self) -> JobHandle | JobResult:
        """Start the job; look for it first wherever a start may have had an effect already."""
        give_up = time.monotonic() + self.policy.outage
        trouble: VendorError | None = None
        pause = 1.0
        while True:
            if self.maybe_started:
                if (found := await self._find()) is not None:
                    self.log.info("found it: job %s", found.job_id)
                    return found
                if trouble and time.monotonic() >= give_up:
                    raise trouble
            try:
                return await self._send_start()
            except AlreadyRunning as refused:
                outcome = await self._already_running(refused)
                if outcome is not None:
                    return outcome
                give_up, trouble = time.monotonic() + self.policy.outage, None
                continue
            except TRANSIENT as error:
                trouble = error
            if trouble.sent:
                self.log.warning("%s The job may have started all the same; looking for it.", trouble)
                continue
            if time.monotonic() >= give_up:
                raise trouble
            self.log.warning("%s Trying again.", trouble)
            wait = trouble.pause if isinstance(trouble, RateLimited) else pause
            await asyncio.sleep(min(wait, max(0.0, give_up - time.monotonic())))
            pause = min(pause * 2, 15.0)

    async def _send_start(self) -> JobHandle:
        """The start request. Shielded: one that is cut off in the middle leaves a job of unknown id."""
        baseline = await self.vendor.baseline(self.request)
        if baseline != self.entry.baseline:
            self.entry = self.entry.model_copy(update={"baseline": baseline})
            await self.journal.record(self.entry, urgent=True)
        self.starting = asyncio.create_task(self.vendor.start(self.request, self.entry))
        try:
            return await asyncio.shield(self.starting)
        except VendorError as error:
            if error.sent:
                self.maybe_started, self.asked = True, self.asked or self.entry.since
            raise

    async def _already_running(self, refused: AlreadyRunning) -> JobHandle | JobResult | None:
        """What to do about an active run: a handle or a result to go on with, or None to start again."""
        active = refused.active
        name = f"job {active.job_id}" if active else "a job"
        if active and refused.same:
            if self.asked and active.started_at >= self.vendor.theirs(self.asked):
                self.log.info("%s is the one whose start was not answered", name)
                return active
            if self.policy.on_active == "adopt":
                self.log.info("%s is running already: taken as ours", name)
                return active
        if self.policy.on_active in ("skip", "fail"):
            message = f"{name} is running already, and the policy says {self.policy.on_active}"
            skip = self.policy.on_active == "skip"
            result = self._result(JobState.SKIPPED if skip else JobState.FAILED, active, message=message)
            await self._close(result)
            if skip:
                return result
            raise JobFailed(result)
        self.log.info("%s is running already: waiting for it before starting ours", name)
        left = max(0.0, self.deadline - time.monotonic())
        try:
            async with asyncio.timeout(left):
                if active is None:
                    await asyncio.sleep(self.policy.interval(self.policy.timeout - left))
                else:
                    await self.watcher.wait(active, self.policy, log=self.log)
        except TimeoutError:
            waited = f"{name} was running already and did not end in {self.policy.timeout:g} s"
            result = self._result(JobState.FAILED, active, message=f"{waited}; ours was not started")
            await self._close(result)
            raise JobTimeout(result) from None
        return None

    async def _start_around(self, skipped: AlreadyRunning) -> JobHandle | JobResult:
        """The vendor took our start and then skipped it for an active run: as good as a refusal."""
        self.deadline = self.patience  # however often that happens
        outcome = await self._already_running(skipped)
        if outcome is None:
            self.maybe_started, self.asked, self.attached = False, None, False
            return await self._start(self.entry)
        if isinstance(outcome, JobHandle):
            self.attached = True  # it may have ended meanwhile
            await self._started(outcome)
        return outcome

    async def _find(self) -> JobHandle | None:
        """Look for the job of an intent, until the vendor must show it or the outage budget is spent."""
        give_up = time.monotonic() + self.policy.outage
        shown_by: float | None = None
        while True:
            try:
                found = await self._look()
            except TRANSIENT as error:
                left = give_up - time.monotonic()
                if left <= 0:
                    raise VendorUnavailable(
                        error.vendor,
                        f"{error.message}, and a start request of ours may have been accepted",
                        method=error.method,
                        path=error.path,
                        status=error.status,
                        guidance="A retry looks for that job before it starts another.",
                    ) from error
                await asyncio.sleep(min(left, error.pause if isinstance(error, RateLimited) else 2.0))
                continue
            if found is not None:
                return found
            # Only answers count: the time in which the vendor was silent shows nothing.
            now = time.monotonic()
            shown_by = shown_by or now + self.vendor.grace
            if now >= shown_by:
                return None
            await asyncio.sleep(min(1.0, self.vendor.grace / 3))

    async def _look(self) -> JobHandle | None:
        return await self.vendor.find(self.request, self.entry)

    async def _started(self, handle: JobHandle) -> None:
        self.entry = self.entry.model_copy(update={"handle": handle})
        name, vendor = self.request.name, self.vendor.name
        self.log.info("%s: %s job %s %s", name, vendor, handle.job_id, handle.url or "")
        await self._record()

    # -- waiting ------------------------------------------------------------------------------------------

    async def _see_through(self, handle: JobHandle) -> JobResult:
        while True:
            try:
                return await self._watch(handle)
            except AlreadyRunning as skipped:
                begun = await self._start_around(skipped)
            if isinstance(begun, JobResult):
                return begun
            handle = begun

    async def _watch(self, handle: JobHandle) -> JobResult:
        try:
            async with asyncio.timeout(self.deadline - time.monotonic()):
                status = await self.watcher.wait(
                    handle,
                    self.policy,
                    age=_age(self.vendor, handle),
                    at_once=self.attached,
                    on_change=self._tell,
                    log=self.log,
                )
        except TimeoutError:
            ended = await final_status(self.vendor, handle)
            if ended is None:
                raise JobTimeout(await self._timed_out(handle)) from None
            status = ended
        result = judge(self.vendor, self.request, self.policy, handle, status)
        await self._close(result)
        return accept(result, self.policy, self.log)

    def _tell(self, status: JobStatus) -> None:
        if not status.state.terminal:
            attempt = f", attempt {status.attempts}" if (status.attempts or 0) > 1 else ""
            why = f" ({status.message})" if status.message else ""
            self.log.info("%s: %s%s%s", self.request.name, status.word, attempt, why)

    async def _timed_out(self, handle: JobHandle) -> JobResult:
        message = f"it did not end in {self.policy.timeout:g} s"
        if self.policy.on_timeout == "detach":
            # The entry stays open: a retry attaches to the job.
            return self._result(JobState.FAILED, handle, message=f"{message}; it was left running")
        cancelled = await cancel_job(self.vendor, handle)
        result = self._result(JobState.FAILED, handle, message=f"{message}; {cancelled.words}")
        if cancelled.over:  # else, too, a retry attaches: a second job beside it is what nobody wants
            await self._close(result)
        return result

    # -- cancelling ---------------------------------------------------------------------------------------

    async def _interrupted(self) -> None:
        """Our task is being cancelled: cancel the vendor's job, unless only our machine goes away."""
        if not self.intent or not self.entry.open:
            return
        handle = self.entry.handle or await self._last_look()
        if handle is None:
            if not self.maybe_started:
                message = "the run was cancelled before a job was started"
                await self._close(self._result(JobState.CANCELLED, message=message))
            return  # else the entry stays open: the next attempt, or the cancellation hook, looks again
        self.entry = self.entry.model_copy(update={"handle": handle})
        if current_interrupt() == "terminated":
            self.log.warning(
                "stopped from outside; job %s goes on and the next attempt attaches to it. %s",
                handle.job_id,
                handle.url or "",
            )
            await self._record()
            return
        cancelled = await cancel_job(self.vendor, handle)
        self.log.warning("cancelled: job %s: %s. %s", handle.job_id, cancelled.words, handle.url or "")
        if cancelled.over:
            message = f"the run was cancelled; {cancelled.words}"
            await self._close(self._result(JobState.CANCELLED, handle, message=message))
        else:
            await self._record()  # open: the cancellation hook tries again, a retry of the run attaches

    async def _last_look(self) -> JobHandle | None:
        """The job of a start whose effect we don't know yet, where that can be had quickly."""
        try:
            if self.starting is not None:
                async with asyncio.timeout(_START_PATIENCE):
                    return await self.starting
        except AlreadyRunning:
            pass
        except TimeoutError:
            self.maybe_started = True
        except VendorError as error:
            self.maybe_started |= error.sent
        except Exception as error:  # noqa: BLE001 - our cancellation must not become another error
            self.log.warning("nothing was started: %s", error)
        try:
            if self.maybe_started:
                async with asyncio.timeout(_LAST_LOOK):
                    return await self._look()
        except (TimeoutError, VendorError) as error:
            self.log.warning("a job may have been started; it can't be looked for now: %s", error)
        return None

    # -- results ------------------------------------------------------------------------------------------

    def _result(
        self, state: JobState, handle: JobHandle | None = None, *, message: str | None = None
    ) -> JobResult:
        return result_of(self.vendor, self.request, state, handle, message=message)

    async def _close(self, result: JobResult) -> None:
        self.entry = self.entry.model_copy(update={"result": result})
        await self._record()

    async def _record(self) -> None:
        """Write what has happened. The intent is written by now, so a failure loses time, not truth."""
        if self.slot.lease is not None:
            self.entry = self.entry.model_copy(update={"lease": self.slot.lease})
        try:
            await self.journal.record(self.entry)
        except Exception as error:  # noqa: BLE001 - the job is real whether or not we can write it down
            self.log.warning("could not write to the journal of this run: %r", error)
