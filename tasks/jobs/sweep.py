"""Looks at many jobs one by one, for a vendor that has no list of them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence

from blocks.http import RateLimited, VendorError
from tasks.jobs.model import AlreadyRunning, JobHandle, JobState, JobStatus

_AT_ONCE = 10
_UNREAD = JobStatus(state=JobState.QUEUED, word="not looked at yet")


class Sweep:
    """Reads jobs one by one, those first that were read longest ago, for a few seconds at a time.

    With more jobs than the account's rate limit lets through in that time, the others stay what they were
    last seen as. So an end is told within seconds of being read, and not when the whole round is done.

    Args:
        read: Reads one job; None while it is not visible yet.
        seconds: How long a look takes at most, the requests that are under way then left aside.
        clock: Monotonic seconds; replaced in tests.
    """

    def __init__(
        self,
        read: Callable[[JobHandle], Awaitable[JobStatus | None]],
        *,
        seconds: float = 3.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._read = read
        self._seconds = seconds
        self._clock = clock
        self._seen: dict[str, tuple[float, JobStatus]] = {}

    async def look(self, handles: Sequence[JobHandle]) -> dict[str, JobStatus | Exception]:
        """What is known of the jobs now; an error stands for the job whose reading it ended."""
        until = self._clock() + self._seconds
        oldest_first = sorted(handles, key=lambda handle: self._seen.get(handle.job_id, (0.0, None))[0])
        line = iter(oldest_first)  # shared: each reader takes the next
        found: dict[str, JobStatus | Exception] = {}
        read: set[str] = set()

        async def reader() -> None:
            nonlocal until
            for handle in line:
                read.add(handle.job_id)
                try:
                    status = await self._read(handle)
                except (VendorError, AlreadyRunning) as error:
                    found[handle.job_id] = error
                    if isinstance(error, RateLimited):
                        until = 0.0  # every further request would be refused, and counted
                else:
                    if status is not None:
                        found[handle.job_id] = status
                        self._seen[handle.job_id] = (self._clock(), status)
                if self._clock() >= until:
                    return

        await asyncio.gather(*(reader() for _ in range(min(_AT_ONCE, len(handles)))))
        for handle in oldest_first:
            status = found.get(handle.job_id)
            if handle.job_id not in read:
                found[handle.job_id] = self._seen.get(handle.job_id, (0.0, _UNREAD))[1]
            elif not isinstance(status, JobStatus) or status.state.terminal:
                self._seen.pop(handle.job_id, None)
        return found
