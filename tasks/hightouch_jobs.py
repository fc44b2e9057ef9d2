"""Hightouch's runs of syncs for the engine: how they are started, found, watched, and what they tell.

Vendor documentation: https://hightouch.com/docs/developer-tools/api-guide
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Hashable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Literal

from blocks.hightouch import HightouchApi, HightouchCredentials, Sync, SyncRun
from blocks.http import NotFoundError, VendorError
from blocks.reference import block_name
from tasks.jobs import InputError, Intent, JobHandle, JobRequest, JobState, JobStatus

STATES = {
    "queued": JobState.QUEUED,
    "pending": JobState.QUEUED,
    "querying": JobState.RUNNING,
    "processing": JobState.RUNNING,
    "reporting": JobState.RUNNING,
    "success": JobState.SUCCEEDED,
    "warning": JobState.PARTIAL,  # it ended, and some rows were rejected
    "failed": JobState.FAILED,
    "interrupted": JobState.FAILED,
    "cancelled": JobState.CANCELLED,
}
_FEW = 3  # up to so many runs are read one by one: a list of syncs would cost as much


@dataclass(frozen=True)
class HightouchRequest:
    """A run of a sync, as the engine takes it."""

    resource_id: str
    operation: str
    name: str
    owner: str | None
    full_resync: bool


class HightouchVendor:
    """Hightouch's runs for the engine."""

    name = "hightouch"
    on_partial: Literal["fail", "warn", "ok"] = "warn"
    # A fresh run is in no list for a short time; how long is not documented.
    grace = 15.0

    def __init__(self, credentials: HightouchCredentials) -> None:
        self._credentials = credentials
        self._api: HightouchApi | None = None
        self.account: Hashable = credentials.account
        self.block = block_name(credentials, HightouchCredentials)
        # By run: what the list of syncs said when the run was last read, and what the run was then.
        self._read: dict[str, tuple[Sync, JobStatus]] = {}

    @asynccontextmanager
    async def session(self) -> AsyncIterator[None]:
        """Keep the workspace's client open."""
        async with self._credentials.api() as self._api:
            yield

    def theirs(self, moment: datetime) -> datetime:
        """A moment of our clock on Hightouch's."""
        return self._api.theirs(moment) if self._api else moment

    async def baseline(self, request: HightouchRequest) -> None:
        """Nothing: a run has an id."""

    async def start(self, request: HightouchRequest, intent: Intent) -> JobHandle:
        """`POST /syncs/{id}/trigger`. While a run is in progress, ours is queued behind it by Hightouch."""
        async with self._credentials.api() as api:
            sync = await api.sync(request.resource_id)
            if sync.disabled:  # as far as we remember
                sync = await api.sync(request.resource_id, fresh=True)
            if problem := sync_problem(sync):
                raise InputError(problem)
            run_id = await api.trigger(request.resource_id, full_resync=request.full_resync)
            return self._handle(sync, run_id, api.theirs(datetime.now(UTC)), intent.marker)

    async def find(self, request: JobRequest, intent: Intent) -> JobHandle | None:
        """The sync's first run that was created since then."""
        async with self._credentials.api() as api:
            runs = await api.runs(request.resource_id, api.theirs(intent.since), retry=False)
            ours = [run for run in runs if run.id not in intent.known]
            if not ours:
                return None
            run = min(ours, key=lambda run: run.created_at)
            return self._handle(await api.sync(request.resource_id), run.id, run.created_at, intent.marker)

    async def observe(self, handles: Sequence[JobHandle]) -> Mapping[str, JobStatus | Exception]:
        """A hundred syncs a request tell where something has changed; only those runs are read."""
        seen: dict[str, JobStatus | Exception] = {}
        async with self._credentials.api() as api:
            syncs = {s.id: s for s in await api.syncs(retry=False)} if len(handles) > _FEW else {}
            for handle in handles:
                sync = syncs.get(handle.resource_id)
                listed, status = self._read.get(handle.job_id, (None, None))
                # The list does not say which run a status is of: ours may wait behind another or be over
                # before the next. So it only saves the reading of a run while nothing moves.
                if status and sync and _moves(sync) and _same(sync, listed):
                    seen[handle.job_id] = status
            slots = asyncio.Semaphore(10)
            look = [handle for handle in handles if handle.job_id not in seen]
            found = await asyncio.gather(*(_observe_one(api, handle, slots) for handle in look))
            seen.update({job_id: status for job_id, status in found if status is not None})
            for handle in look:
                self._remember(handle, syncs.get(handle.resource_id), seen.get(handle.job_id))
        return seen

    def _remember(self, handle: JobHandle, sync: Sync | None, status: JobStatus | Exception | None) -> None:
        if sync and isinstance(status, JobStatus) and not status.state.terminal:
            self._read[handle.job_id] = (sync, status)
        else:
            self._read.pop(handle.job_id, None)

    async def cancel(self, handle: JobHandle) -> JobState | None:
        """There is no way in Hightouch's API to cancel a run; at most it has ended."""
        async with self._credentials.api() as api:
            try:
                run = await api.run(handle.resource_id, handle.job_id)
            except VendorError:
                return None
        state = STATES.get(run.status) if run else None
        return state if state and state.terminal else None

    async def look_up(self, sync_id: str, run_id: str) -> tuple[JobHandle, HightouchRequest, JobStatus]:
        """A run, whoever started it.

        Raises:
            NotFoundError: There is no such sync, or it has no such run.
        """
        async with self._credentials.api() as api:
            sync = await api.sync(sync_id)
            run = await api.run(sync_id, run_id, retry=True)
        if run is None:
            raise NotFoundError("Hightouch", f"sync {sync_id} has no run {run_id}", sent=False)
        request = HightouchRequest(sync.id, "sync", sync.slug or sync.id, sync.owner, full_resync=False)
        return self._handle(sync, run.id, run.created_at, ""), request, run_status(run)

    def _handle(self, sync: Sync, run_id: str, started_at: datetime, marker: str) -> JobHandle:
        workspace = f"/{sync.workspace_id}" if sync.workspace_id else ""
        return JobHandle(
            vendor=self.name,
            resource_id=sync.id,
            job_id=run_id,
            marker=marker,
            started_at=started_at,
            url=f"{self._credentials.app_url}{workspace}/syncs/{sync.id}/runs/{run_id}",
        )


async def _observe_one(
    api: HightouchApi, handle: JobHandle, slots: asyncio.Semaphore
) -> tuple[str, JobStatus | Exception | None]:
    async with slots:
        try:
            run = await api.run(handle.resource_id, handle.job_id)
        except VendorError as error:
            return handle.job_id, error
    # None: not visible yet. The watcher bears that for a while.
    return handle.job_id, run_status(run) if run else None


def _moves(sync: Sync) -> bool:
    """Whether a run is under way; `disabled` and the like say nothing about that."""
    state = STATES.get(sync.status or "")
    return state is not None and not state.terminal


def _same(sync: Sync, other: Sync | None) -> bool:
    return other is not None and (sync.status, sync.last_run_at) == (other.status, other.last_run_at)


def run_status(run: SyncRun) -> JobStatus:
    """What a run of a sync tells."""
    state = STATES.get(run.status)
    took = run.finished_at - run.started_at if run.started_at and run.finished_at else None
    return JobStatus(
        state=state or JobState.RUNNING,
        known=state is not None,
        word=run.status,
        rows=run.successful.total if run.successful else None,
        rows_rejected=run.failed.total if run.failed else None,
        duration=took.total_seconds() if took is not None else None,
        message=_message(run, state),
    )


def _message(run: SyncRun, state: JobState | None) -> str | None:
    error = run.error.get("message") if isinstance(run.error, dict) else run.error
    if state is JobState.PARTIAL:
        rejected = f"{run.failed.total if run.failed else 'some'} rows were rejected"
        return f"{rejected}: {error}"[:500] if error else rejected
    if error:
        return str(error)[:500]
    if state is JobState.CANCELLED:
        return "it was cancelled in Hightouch"
    return f"Hightouch says {run.status}" if state is JobState.FAILED else None


def sync_problem(sync: Sync) -> str | None:
    """Why a sync can't be run now."""
    if not sync.disabled:
        return None
    return (
        f"Hightouch sync {sync.slug or sync.id} ({sync.id}) is disabled. Enable it in Hightouch, or take "
        "it out of the list; nothing was started for it."
    )
