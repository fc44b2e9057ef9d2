"""Hightouch's runs of sync sequences for the engine.

Hightouch lists no runs of a sequence, and a sequence never runs beside itself: asked to start while a run is
in progress it gives, depending on the workspace, the id of a run that it queues behind that one, or the id of
the run in progress. That one began before we asked; it is told from ours by when its syncs started. So a run
whose id was lost can be had neither by looking nor by asking again, and it is not asked for twice.

Vendor documentation: https://hightouch.com/docs/developer-tools/api-guide
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Literal

from blocks.hightouch import HightouchApi, HightouchCredentials, SequenceMember, SequenceRun, SyncRun
from blocks.http import NotFoundError, VendorError
from blocks.reference import block_name
from tasks.hightouch_jobs import STATES, run_status
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
    StreamResult,
    Sweep,
)

_SEQUENCE_STATES = {
    "pending": JobState.QUEUED,
    "running": JobState.RUNNING,
    "done": JobState.SUCCEEDED,  # unless its syncs say otherwise
    "failed": JobState.FAILED,
    "cancelled": JobState.CANCELLED,
}
# The Date header, by which Hightouch's clock is known, counts whole seconds.
_CLOCK_MARGIN = timedelta(seconds=3)


class HightouchSequenceVendor(AccountVendor[HightouchApi]):
    """Hightouch's runs of sequences for the engine."""

    name = "hightouch-sequence"
    on_partial: Literal["fail", "warn", "ok"] = "warn"
    # As that of a sync's run; how long a fresh run is not shown is not documented.
    grace = 15.0

    def __init__(self, credentials: HightouchCredentials) -> None:
        # The same workspace as that of single syncs, and watched beside them by a watcher of its own.
        account = ("sequences", credentials.account)
        super().__init__(credentials.api, account, block_name(credentials, HightouchCredentials))
        self._credentials = credentials
        self._sweep = Sweep(self._look)
        self._ours: set[str] = set()  # runs that are known to have begun after we asked for them

    async def start(self, request: JobRequest, intent: Intent) -> JobHandle:
        """`POST /sync-sequences/{id}/trigger`. Asked again while a run goes on, it gives that one's id."""
        async with self._connect() as api:
            asked = datetime.now(UTC)
            try:
                run_id = await api.trigger_sequence(request.resource_id)
            except NotFoundError as error:
                raise InputError(
                    f"Hightouch knows no sequence {request.resource_id}, or this API key may not see it. "
                    "Nothing was started."
                ) from error
            # By Hightouch's clock, which its reply has told.
            return self._handle(request.resource_id, run_id, api.theirs(asked), intent.marker)

    async def find(self, request: JobRequest, intent: Intent) -> None:
        """Nothing can be found: Hightouch lists no runs of a sequence, nor which syncs it has.

        Raises:
            VendorError: Always. Asked again, Hightouch would give that run's id only if it still goes on, and
                where the workspace queues none; else all syncs would be sent twice.
        """
        raise VendorError(
            "Hightouch",
            f"the reply to the start of sequence {request.resource_id} was lost or could not be read, or the "
            "run was cut short before it came. A run may be going on; Hightouch lists no runs of a sequence",
            guidance="It is not asked for twice. Look in Hightouch for a run of it that was begun at about "
            f"{intent.since:%Y-%m-%d %H:%M:%S} UTC, and start a new run if it is still needed. "
            f"{self._url(request.resource_id)}",
        )

    async def observe(self, handles: Sequence[JobHandle]) -> Mapping[str, JobStatus | Exception]:
        """A request per run; its syncs are read when it has ended, for what became of their rows."""
        async with self._connect():
            return await self._sweep.look(handles)

    async def cancel(self, handle: JobHandle) -> JobState | None:
        """There is no way in Hightouch's API to cancel a run; at most it has ended."""
        async with self._connect() as api:
            try:
                status = await _status(api, await api.sequence_run(handle.job_id))
            except VendorError:
                return None
        return status.state if status.state.terminal else None

    async def look_up(self, sequence_id: str, run_id: str) -> tuple[JobHandle, PlainRequest, JobStatus]:
        """A run, whoever started it. Its sequence has to be given: Hightouch does not say which it is of.

        Raises:
            NotFoundError: There is no such run.
        """
        async with self._connect() as api:
            run = await api.sequence_run(run_id, retry=True)
            status = await _status(api, run)
            since = await _began(api, run)
        request = PlainRequest(sequence_id, "sync", f"sequence {sequence_id}", None)
        return self._handle(sequence_id, run.id, since or datetime.now(UTC), ""), request, status

    async def _look(self, handle: JobHandle) -> JobStatus:
        async with self._connect() as api:
            run = await api.sequence_run(handle.job_id)
            if handle.job_id not in self._ours and run.members:
                began = await _began(api, run)
                if began is not None and began < handle.started_at - _CLOCK_MARGIN:
                    active = handle.model_copy(update={"started_at": began, "marker": ""})
                    raise AlreadyRunning(active)
                if began is not None:
                    self._ours.add(handle.job_id)
            status = await _status(api, run)
        if status.state.terminal:
            self._ours.discard(handle.job_id)
        return status

    def _handle(self, sequence_id: str, run_id: str, started_at: datetime, marker: str) -> JobHandle:
        return JobHandle(
            vendor=self.name,
            resource_id=sequence_id,
            job_id=run_id,
            marker=marker,
            started_at=started_at,
            url=self._url(sequence_id),
        )

    def _url(self, sequence_id: str) -> str:
        return f"{self._credentials.app_url}/sequences/{sequence_id}"


async def _began(api: HightouchApi, run: SequenceRun) -> datetime | None:
    """When the first of its syncs started; None where none has, as far as Hightouch shows."""
    if not run.members:
        return None
    first = min(run.members, key=lambda member: int(member.run_id))
    found = await api.run(first.sync_id, first.run_id)
    return found.started_at if found else None


async def _status(api: HightouchApi, run: SequenceRun) -> JobStatus:
    state = _SEQUENCE_STATES.get(run.status)
    if state is None or not state.terminal:
        ended = sum(1 for member in run.members if _member_state(member).terminal)
        return JobStatus(
            state=state or JobState.RUNNING,
            known=state is not None,
            word=f"{run.status}: {ended} syncs have ended" if ended else run.status,
            streams=[
                StreamResult(name=member.sync_id, state=_member_state(member)) for member in run.members
            ],
        )
    read = await asyncio.gather(*(_member(api, member) for member in run.members))
    runs = [found for _, found in read if found]
    streams = [stream for stream, _ in read]
    rejected = [_rejected(stream, found) for stream, found in read]
    if state is JobState.SUCCEEDED:
        state = _worst(streams)
    starts = [found.started_at for found in runs if found.started_at]
    ends = [member.finished_at for member in run.members if member.finished_at]
    sent = [found.successful.total for found in runs if found.successful]
    return JobStatus(
        state=state,
        word=run.status,
        rows=sum(sent) if sent else None,
        # One sync that does not tell hides what the others do: their sum would be too small.
        rows_rejected=sum(filter(None, rejected)) if rejected and None not in rejected else None,
        duration=(max(ends) - min(starts)).total_seconds() if starts and ends else None,
        message=_message(run, state, streams),
        streams=streams,
    )


def _rejected(stream: StreamResult, found: SyncRun | None) -> int | None:
    if found is not None:
        return run_status(found).rows_rejected
    return 0 if stream.state is JobState.SUCCEEDED else None


def _member_state(member: SequenceMember) -> JobState:
    # A word that we don't know is no end, and least of all a good one.
    return STATES.get(member.status, JobState.RUNNING)


async def _member(api: HightouchApi, member: SequenceMember) -> tuple[StreamResult, SyncRun | None]:
    """What became of one sync: by its own run where that can be had, by the sequence's word else."""
    name, found = member.sync_id, None
    try:
        name = (await api.sync(member.sync_id)).slug or name
        found = await api.run(member.sync_id, member.run_id)
    except NotFoundError:
        pass  # the sync has been deleted meanwhile; that it has ended, the sequence says
    status = run_status(found) if found else None
    return (
        StreamResult(
            name=name,
            state=_member_state(member),
            rows=status.rows if status else None,
            message=status.message if status else None,
        ),
        found,
    )


def _worst(streams: Sequence[StreamResult]) -> JobState:
    """What a sequence that is done has come to: `done` alone says only that it is over."""
    states = {stream.state for stream in streams}
    if states & {JobState.FAILED, JobState.CANCELLED}:
        return JobState.FAILED
    return JobState.SUCCEEDED if states <= {JobState.SUCCEEDED} else JobState.PARTIAL


def _message(run: SequenceRun, state: JobState, streams: Sequence[StreamResult]) -> str | None:
    troubles = [
        f"{stream.name} {member.status}" + (f" ({stream.message})" if stream.message else "")
        for stream, member in zip(streams, run.members, strict=True)
        if stream.state is not JobState.SUCCEEDED
    ]
    if troubles:
        return "; ".join(troubles)[:500]
    if state is JobState.CANCELLED:
        return "it was cancelled in Hightouch"
    return None if state is JobState.SUCCEEDED else f"Hightouch says {run.status}"
