"""Hightouch's runs of syncs for the engine: how they are started, found, watched, and what they tell.

Vendor documentation: https://hightouch.com/docs/developer-tools/api-guide
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Literal

from blocks.hightouch import HightouchApi, HightouchCredentials, Sync, SyncRun
from blocks.http import NotFoundError, VendorError
from blocks.reference import block_name
from tasks.jobs import (
    AccountVendor,
    AlreadyRunning,
    InputError,
    Intent,
    JobHandle,
    JobRequest,
    JobState,
    JobStatus,
    PlainRequest,
    Sweep,
)

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
FULL = "full-resync"
_FEW = 3  # up to so many runs are read one by one: a list of syncs would cost as much
_NEAR = timedelta(seconds=5)  # between a trigger and the beginning of its run, clocks that differ included
_SURE_FOR = 5.0  # seconds between two readings of a run that the list tells of


@dataclass(frozen=True)
class HightouchRequest(PlainRequest):
    """A run of a sync, as the engine takes it.

    Attributes:
        alone: Whether a run that goes on already is looked for. Without, Hightouch queues ours behind it.
    """

    alone: bool = False


class HightouchVendor(AccountVendor[HightouchApi]):
    """Hightouch's runs for the engine."""

    name = "hightouch"
    on_partial: Literal["fail", "warn", "ok"] = "warn"
    # A fresh run is in no list for a short time; how long is not documented.
    grace = 15.0

    def __init__(self, credentials: HightouchCredentials) -> None:
        super().__init__(credentials.api, credentials.account, block_name(credentials, HightouchCredentials))
        self._credentials = credentials
        # As many ends as Hightouch's limit lets be read in that time are told at once.
        self._sweep = Sweep(self._look, seconds=10.0)
        # By run, those longest believed first: when its sync's latest run began that is taken for it.
        self._began: dict[str, datetime] = {}
        self._sure_until = 0.0

    async def start(self, request: HightouchRequest, intent: Intent) -> JobHandle:
        """`POST /syncs/{id}/trigger`. While a run is in progress, ours is queued behind it by Hightouch.

        Raises:
            AlreadyRunning: One is, and the request is to run `alone`. Hightouch itself never refuses.
        """
        async with self._connect() as api:
            sync = await api.sync(request.resource_id)
            if sync.disabled:  # as far as we remember
                sync = await api.sync(request.resource_id, fresh=True)
            if problem := sync_problem(sync):
                raise InputError(problem)
            if request.alone and (active := await self._active(api, sync)):
                # A run does not say whether it is a full one.
                raise AlreadyRunning(active, same=request.operation != FULL)
            run_id = await api.trigger(request.resource_id, full_resync=request.operation == FULL)
            return self._handle(sync, run_id, api.theirs(datetime.now(UTC)), intent.marker)

    async def _active(self, api: HightouchApi, sync: Sync) -> JobHandle | None:
        """The latest run that has not ended."""
        for run in await api.newest_runs(sync.id):
            state = STATES.get(run.status)
            # A word that we don't know is no end, but with a time of an end it is.
            if not state.terminal if state else run.finished_at is None:
                return self._handle(sync, run.id, run.created_at, "")
        return None

    async def find(self, request: JobRequest, intent: Intent) -> JobHandle | None:
        """The sync's first run that was created since then."""
        async with self._connect() as api:
            runs = await api.runs(request.resource_id, api.theirs(intent.since), retry=False)
            ours = [run for run in runs if run.id not in intent.known]
            if not ours:
                return None
            run = min(ours, key=lambda run: run.created_at)
            return self._handle(await api.sync(request.resource_id), run.id, run.created_at, intent.marker)

    async def observe(self, handles: Sequence[JobHandle]) -> Mapping[str, JobStatus | Exception]:
        """A hundred syncs a request tell which runs go on; only those that may have ended are read."""
        async with self._connect() as api:
            lists = len(handles) > max(_FEW, api.pages)
            syncs = {s.id: s for s in await api.syncs(retry=False)} if lists else {}
            seen: dict[str, JobStatus | Exception] = {}
            look: list[JobHandle] = []
            for handle in handles:
                status = self._as_listed(handle, syncs.get(handle.resource_id))
                if status is None:
                    look.append(handle)
                else:
                    seen[handle.job_id] = status
            look += self._to_make_sure(handles, seen)
            read = await self._sweep.look(look)
        for handle in look:
            self._remember(handle, syncs.get(handle.resource_id), read.get(handle.job_id))
        return {**seen, **read}

    def _as_listed(self, handle: JobHandle, sync: Sync | None) -> JobStatus | None:
        """What a run is if the list of syncs can tell; None if the run has to be read.

        The list shows the latest run of a sync, without its id: ours may wait behind that one, or be over
        before it. What tells them apart is when it began.
        """
        if sync is None or not _moves(sync):
            return None
        began = sync.last_run_at
        if began is None or began < handle.started_at - _NEAR:
            return JobStatus(state=JobState.QUEUED, word="queued")  # behind one from before our trigger
        if handle.job_id not in self._began and began <= handle.started_at + _NEAR:
            self._began[handle.job_id] = began
        if self._began.get(handle.job_id) != began:
            return None
        return JobStatus(state=STATES[sync.status or ""], word=sync.status or "")

    def _to_make_sure(self, handles: Sequence[JobHandle], seen: Mapping[str, object]) -> list[JobHandle]:
        """Now and then one of the runs that the list tells of: two short ones may be taken for one."""
        now = time.monotonic()
        if not seen or now < self._sure_until:
            return []
        self._sure_until = now + _SURE_FOR
        by_id = {handle.job_id: handle for handle in handles if handle.job_id in seen}
        # In the order in which they were believed or read last.
        oldest = next((job_id for job_id in self._began if job_id in by_id), None)
        return [by_id[oldest]] if oldest else []

    def _remember(self, handle: JobHandle, sync: Sync | None, status: JobStatus | Exception | None) -> None:
        self._began.pop(handle.job_id, None)
        going_on = isinstance(status, JobStatus) and not status.state.terminal
        if going_on and sync and sync.last_run_at and _moves(sync):
            self._began[handle.job_id] = sync.last_run_at

    async def _look(self, handle: JobHandle) -> JobStatus | None:
        async with self._connect() as api:
            run = await api.run(handle.resource_id, handle.job_id)
        # None: not visible yet. The watcher bears that for a while.
        return run_status(run) if run else None

    async def cancel(self, handle: JobHandle) -> JobState | None:
        """There is no way in Hightouch's API to cancel a run; at most it has ended."""
        async with self._connect() as api:
            try:
                run = await api.run(handle.resource_id, handle.job_id)
            except VendorError:
                return None
        state = STATES.get(run.status) if run else None
        return state if state and state.terminal else None

    async def look_up(self, sync_id: str, run_id: str) -> tuple[JobHandle, PlainRequest, JobStatus]:
        """A run, whoever started it.

        Raises:
            NotFoundError: There is no such sync, or it has no such run.
        """
        async with self._connect() as api:
            sync = await api.sync(sync_id)
            run = await api.run(sync_id, run_id, retry=True)
        if run is None:
            raise NotFoundError("Hightouch", f"sync {sync_id} has no run {run_id}", sent=False)
        request = PlainRequest(sync.id, "sync", sync.slug or sync.id, sync.owner)
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


def _moves(sync: Sync) -> bool:
    """Whether a run is under way; `disabled` and the like say nothing about that."""
    state = STATES.get(sync.status or "")
    return state is not None and not state.terminal


def run_status(run: SyncRun) -> JobStatus:
    """What a run of a sync tells."""
    state = STATES.get(run.status)
    took = run.finished_at - run.started_at if run.started_at and run.finished_at else None
    return JobStatus(
        state=state or JobState.RUNNING,
        known=state is not None,
        word=run.status,
        rows=run.successful.total if run.successful else None,
        rows_rejected=run.failed.total if run.failed else _uncounted(state),
        duration=took.total_seconds() if took is not None else None,
        message=_message(run, state),
    )


def _uncounted(state: JobState | None) -> int | None:
    """Rejected rows where Hightouch gives no count: a run that has any does not end with `success`."""
    return 0 if state is JobState.SUCCEEDED else None


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
