"""One loop that watches all jobs of an account, with as few requests as the vendor's API allows."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Hashable
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from blocks.http import TRANSIENT, BadReply, NotFoundError, RateLimited, VendorError, VendorUnavailable
from blocks.logs import Log
from tasks.jobs.model import JobHandle, JobPolicy, JobStatus, JobVendor
from tasks.jobs.runner import at_loop_exit

_log = logging.getLogger("elt.jobs")


@dataclass(eq=False)
class _Watch:
    handle: JobHandle
    policy: JobPolicy
    on_change: Callable[[JobStatus], None]
    log: Log
    born: float
    done: asyncio.Future[JobStatus]
    due: float = 0.0
    last: JobStatus | None = None
    failing_since: float | None = None
    unseen_since: float | None = None
    outage_said: bool = False


class JobWatcher:
    """Watches the jobs of one account on one event loop.

    Looks are aligned to a common beat, so that jobs of different age that are due at about the same time
    share a request. A bad minute of the API is borne for each job's outage budget; the jobs are not touched.

    Args:
        vendor: How the account's jobs are observed.
        clock: Monotonic seconds; replaced in tests.
    """

    def __init__(self, vendor: JobVendor[Any], clock: Callable[[], float] = time.monotonic) -> None:
        self._vendor = vendor
        self._clock = clock
        self._watches: set[_Watch] = set()
        self._wake = asyncio.Event()
        self._loop: asyncio.Task[None] | None = None
        self._origin = clock()
        self._not_before = 0.0

    async def wait(
        self,
        handle: JobHandle,
        policy: JobPolicy,
        *,
        age: float = 0.0,
        at_once: bool = False,
        on_change: Callable[[JobStatus], None] = lambda _: None,
        log: Log = _log,
    ) -> JobStatus:
        """Wait until a job has ended.

        Args:
            handle: The job.
            policy: How often to look and how long to bear an outage.
            age: The job's age in seconds at this moment.
            at_once: Look now and not only when a job of this age would be due.
            on_change: Called with each status whose word or attempts differ from the one before.
            log: Where outages and unknown states are told.

        Returns:
            The terminal status.

        Raises:
            VendorError: The API was out of reach for longer than the budget, refuses our credentials or does
                not know the job. The job itself was not touched.
        """
        now = self._clock()
        if not self._watches:
            self._origin = now  # else a lone job would be looked at up to half a beat late
        done: asyncio.Future[JobStatus] = asyncio.get_running_loop().create_future()
        watch = _Watch(handle, policy, on_change, log, now - age, done)
        if at_once:
            watch.due = now
        else:
            self._schedule(watch)
        self._watches.add(watch)
        self._wake.set()
        if self._loop is None or self._loop.done():
            self._loop = asyncio.create_task(self._run())
        try:
            return await done
        finally:
            self._watches.discard(watch)
            if not self._watches and self._loop is not None:
                # Else it would sleep until the next look, and the event loop may be closed before.
                self._loop.cancel()
                self._loop = None

    async def _run(self) -> None:
        while self._watches:
            self._wake.clear()
            wait = max(min(watch.due for watch in self._watches), self._not_before) - self._clock()
            if wait > 0:
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._wake.wait(), wait)
                    continue  # a new job: look again at what is due first
            now = self._clock()
            due = [watch for watch in self._watches if watch.due <= now + 0.05]
            if due:
                await self._look([*due, *self._along(due, now)])

    def _along(self, due: list[_Watch], now: float) -> list[_Watch]:
        """Those that would be due at the next beat: seen now, they cost no look of their own.

        So jobs that fell into different beats while a look was slow come together again.
        """
        beat = min(watch.policy.poll for watch in due)
        return [
            watch
            for watch in self._watches.difference(due)
            # A vendor may not show a job in the first moment.
            if watch.due <= now + 1.5 * beat and now - watch.born >= beat / 2
        ]

    async def _look(self, due: list[_Watch]) -> None:
        for by_id in _rounds(due):
            await self._look_at(by_id)

    async def _look_at(self, by_id: dict[str, list[_Watch]]) -> None:
        due = [watch for watches in by_id.values() for watch in watches]
        try:
            seen = await self._vendor.observe([watches[0].handle for watches in by_id.values()])
        except TRANSIENT as error:
            self._bear(due, error)
            return
        except Exception as error:  # noqa: BLE001 - whatever it is, those who wait must hear of it
            for watch in due:
                self._end(watch, error)
            return
        for watch in due:
            try:
                self._take(watch, seen.get(watch.handle.job_id))
            except Exception as error:  # noqa: BLE001 - one broken callback must not stop the loop for all
                self._end(watch, error)

    def _take(self, watch: _Watch, status: JobStatus | Exception | None) -> None:
        now = self._clock()
        if isinstance(status, NotFoundError) and now - watch.born < self._vendor.grace:
            status = None
        if status is None:
            # Not in the reply: a fresh job may be invisible for a while, an old one has been lost.
            watch.unseen_since = watch.unseen_since or now
            if now - watch.unseen_since > max(self._vendor.grace, watch.policy.outage):
                lost = VendorUnavailable(self._vendor.name, "the job is not in its replies")
                self._end(watch, _out_of_patience(lost, watch, now - watch.unseen_since))
            else:
                self._schedule(watch)
            return
        if isinstance(status, TRANSIENT):
            self._bear([watch], status)
            return
        if isinstance(status, Exception):
            self._end(watch, status)
            return
        watch.failing_since = watch.unseen_since = None
        if watch.outage_said:
            watch.outage_said = False
            watch.log.info("%s answers again", self._vendor.name)
        if watch.last is None or (watch.last.word, watch.last.attempts) != (status.word, status.attempts):
            if not status.known:
                watch.log.warning(
                    "%s job %s is in a state that is not in its contract: %r. Taken as not ended.",
                    self._vendor.name,
                    watch.handle.job_id,
                    status.word,
                )
            watch.last = status
            watch.on_change(status)
        if status.state.terminal:
            self._end(watch, status)
        else:
            self._schedule(watch)

    def _bear(self, due: list[_Watch], error: VendorError) -> None:
        now = self._clock()
        if isinstance(error, RateLimited):
            self._not_before = now + error.pause
        for watch in due:
            watch.failing_since = watch.failing_since or now
            if now - watch.failing_since >= watch.policy.outage:
                self._end(watch, _out_of_patience(error, watch, now - watch.failing_since))
                continue
            if not watch.outage_said:
                watch.outage_said = True
                watch.log.warning("%s Job %s is not touched; looking again.", error, watch.handle.job_id)
            self._schedule(watch)

    def _schedule(self, watch: _Watch) -> None:
        """The beat nearest to when the job is due, so that looks at many jobs fall together."""
        now, beat = self._clock(), watch.policy.poll
        due = now + watch.policy.interval(now - watch.born) - beat / 2
        watch.due = self._origin + math.ceil((due - self._origin) / beat) * beat

    def _end(self, watch: _Watch, outcome: JobStatus | Exception) -> None:
        self._watches.discard(watch)
        if watch.done.done():
            return
        if isinstance(outcome, Exception):
            watch.done.set_exception(outcome)
            watch.done.exception()  # its waiter may be gone
        else:
            watch.done.set_result(outcome)


def _rounds(due: list[_Watch]) -> list[dict[str, list[_Watch]]]:
    """Those who wait, by job id, in as few rounds as go without two jobs of the same id in one.

    As a rule ids are an account's, so that is one round. Those of a declared API may be a resource's: run 12
    of one build is not run 12 of another.
    """
    rounds: list[dict[str, list[_Watch]]] = []
    for watch in due:
        job_id, resource_id = watch.handle.job_id, watch.handle.resource_id
        for by_id in rounds:
            if job_id not in by_id or by_id[job_id][0].handle.resource_id == resource_id:
                break
        else:
            rounds.append(by_id := {})
        by_id.setdefault(job_id, []).append(watch)
    return rounds


def _out_of_patience(error: VendorError, watch: _Watch, seconds: float) -> VendorError:
    kind = type(error) if isinstance(error, BadReply | RateLimited) else VendorUnavailable
    link = f" {watch.handle.url}" if watch.handle.url else ""
    return kind(
        error.vendor,
        f"{error.message.rstrip('.')}, for {seconds:.0f} s now",
        method=error.method,
        path=error.path,
        status=error.status,
        guidance=f"Job {watch.handle.job_id} was not touched and may still be running; "
        f"a retry attaches to it.{link}",
    )


_watchers: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[Hashable, JobWatcher]] = WeakKeyDictionary()


async def watcher_for(vendor: JobVendor[Any]) -> JobWatcher:
    """The one watcher of the vendor's account on this event loop.

    Under `EventLoopTaskRunner` the account's client then stays open until the loop ends, so that syncs that
    run one after the other share connections and token.
    """
    watchers = _watchers.setdefault(asyncio.get_running_loop(), {})
    if vendor.account not in watchers:
        watchers[vendor.account] = JobWatcher(vendor)
        held = AsyncExitStack()
        if at_loop_exit(held.aclose):
            await held.enter_async_context(vendor.session())
    return watchers[vendor.account]
