"""Airbyte's jobs for the engine: how they are started, found, observed and cancelled."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal, cast

from blocks.airbyte import AirbyteServer
from blocks.airbyte_client import AirbyteClient
from blocks.airbyte_model import AirbyteApi, Connection, Job, Operation, RefreshMode, Stream
from blocks.http import ConflictError, VendorError, VendorUnavailable
from blocks.logs import run_logger
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
    StreamResult,
)

_STATES = {
    "pending": JobState.QUEUED,
    "queued": JobState.QUEUED,  # waiting for capacity; may last hours
    "running": JobState.RUNNING,
    "incomplete": JobState.RETRYING,  # an attempt failed and another is coming: not an end
    "succeeded": JobState.SUCCEEDED,
    "failed": JobState.FAILED,
    "cancelled": JobState.CANCELLED,
}
_EXPLAINED = ("succeeded", "failed", "incomplete")
_FEW = 3  # up to so many jobs are read one by one: a list would cost as much
_WINDOW = timedelta(seconds=5)
_AT_ONCE = 10
_CANCEL_LOOKS = 10  # a second apart, after a cancellation that was taken


@dataclass(frozen=True)
class AirbyteRequest(PlainRequest):
    """A job of a connection, as the engine takes it."""

    mode: RefreshMode = "Merge"  # of a refresh
    streams: tuple[Stream, ...] = ()  # of a refresh, clear or reset; none: all


class AirbyteVendor(AccountVendor[AirbyteClient]):
    """Airbyte's jobs for the engine."""

    name = "airbyte"
    on_partial: Literal["fail", "warn", "ok"] = "fail"
    grace = 5.0

    def __init__(self, server: AirbyteServer) -> None:
        super().__init__(server.client, server.account, block_name(server, AirbyteServer))
        self._server = server
        self._explained: dict[str, Job] = {}  # by job id, as it was when its attempts were last asked for

    async def start(self, request: AirbyteRequest, intent: Intent) -> JobHandle:
        """Start a sync, clear, reset or refresh. Airbyte has no place for a marker.

        Raises:
            AlreadyRunning: Airbyte refuses because a job is running; or one is, which a clear would end.
        """
        async with self._connect() as client:
            api = await client.api()
            connection = await api.connection(request.resource_id)
            if connection.status != "active":  # as far as we remember
                api.forget(connection.id)
                connection = await api.connection(connection.id)
            refuse_unless_active(connection)
            if request.operation in ("clear", "reset"):
                await self._refuse_over_another(api, connection)
            try:
                job = await _create(client, api, request)
            except ConflictError as error:
                raise await self._conflict(api, connection, request, error) from error
            return self._handle(job, connection, intent.marker)

    async def _refuse_over_another(self, api: AirbyteApi, connection: Connection) -> None:
        """Airbyte refuses no clear: it cancels what the connection is running, whosever that is."""
        jobs = await api.newest_jobs(connection.id)
        newest = max(
            jobs, key=lambda job: job.created_at, default=None
        )  # one at a time: the others have ended
        if newest is not None and not newest.ended:
            # Nor is a clear the same as ours, for a job does not say which streams it is of.
            raise AlreadyRunning(self._handle(newest, connection, ""), same=False)

    async def _conflict(
        self, api: AirbyteApi, connection: Connection, request: AirbyteRequest, error: ConflictError
    ) -> AlreadyRunning | ConflictError | InputError:
        if _runs_already(error):
            active = next((job for job in await api.newest_jobs(connection.id) if not job.ended), None)
            if active is None:
                return AlreadyRunning(None)
            return AlreadyRunning(self._handle(active, connection, ""), same=active.does(request.operation))
        # Airbyte hides the reason of any other refusal; the connection tells it, if it has changed under us.
        api.forget(connection.id)
        refuse_unless_active(await api.connection(connection.id))
        return error

    async def find(self, request: JobRequest, intent: Intent) -> JobHandle | None:
        """The connection's first job of this kind that was created since then."""
        async with self._server.connect() as api:
            operation = cast("Operation", request.operation)
            since = api.theirs(intent.since)
            jobs = await api.newest_jobs(request.resource_id, operation, since=since, retry=False)
            ours = [job for job in jobs if job.does(operation) and job.id not in intent.known]
            if not ours:
                return None
            connection = await api.connection(request.resource_id)
            return self._handle(min(ours, key=lambda job: job.created_at), connection, intent.marker)

    async def observe(self, handles: Sequence[JobHandle]) -> Mapping[str, JobStatus | Exception]:
        """Lists of the newest jobs, a hundred a request; one by one only what they do not show."""
        wanted = {handle.job_id for handle in handles}
        seen: dict[str, Job] = {}
        async with self._connect() as client:
            api = await client.api()
            if len(wanted) > _FEW:
                since = min(handle.started_at for handle in handles) - _WINDOW
                connections = {handle.resource_id for handle in handles}
                # Newer jobs may fill the first pages; some more cost a tenth of asking one by one.
                async for jobs in api.jobs_since(since, connections, pages=len(wanted) // 10 + 2):
                    seen.update((job.id, job) for job in jobs if job.id in wanted)
                    if len(seen) == len(wanted):
                        break
            if api.kind == "public":
                await self._explain_together(client, seen.values())
            slots = asyncio.Semaphore(_AT_ONCE)

            async def look(job_id: str) -> tuple[str, JobStatus | Exception]:
                async with slots:
                    try:
                        job = seen.get(job_id) or await api.job(job_id, retry=False)
                    except VendorError as error:
                        return job_id, error
                    return job_id, _status(await self._explain(client, api, job))

            return dict(await asyncio.gather(*map(look, sorted(wanted))))

    async def _explain_together(self, client: AirbyteClient, jobs: Iterable[Job]) -> None:
        """What a list of the Config API can tell of many jobs at once; `_explain` finds it here."""
        new = [job for job in jobs if job.status in _EXPLAINED and not self._explained_as(job)]
        if len(new) > _FEW:
            self._explained |= await client.explain_many(new)

    def _explained_as(self, job: Job) -> Job | None:
        told = self._explained.get(job.id)
        return told if told and told.status == job.status else None

    async def _explain(self, client: AirbyteClient, api: AirbyteApi, job: Job) -> Job:
        """The job with what is worth a request of its own: why it failed, and what became of its streams.

        Of a job that succeeded, too: one of which only a part landed is called so as well.
        """
        if api.kind == "config":
            return await client.explain(job) if job.ended and not job.told else job
        told = self._explained_as(job)
        self._explained.pop(job.id, None)
        if job.status not in _EXPLAINED:
            return job
        told = told or await client.explain(job)
        if not job.ended:
            self._explained[job.id] = told
        return job.with_details(told)

    async def cancel(self, handle: JobHandle) -> JobState | None:
        """`DELETE /jobs/{id}`, after a look: it stops whatever the connection is running by then."""
        async with self._server.connect() as api:
            job = await api.job(handle.job_id)
            if not job.ended:
                try:
                    job = await api.cancel_job(handle.job_id)
                except ConflictError:  # it ended between the look and the request
                    job = await api.job(handle.job_id)
                    if not job.ended:
                        raise
                else:
                    # From now on only looks: another request could hit what the connection runs next.
                    for _ in range(_CANCEL_LOOKS):
                        if job.ended:
                            break
                        await asyncio.sleep(1.0)
                        job = await api.job(handle.job_id)
                    _see_what_was_hit(job)
            return _STATES[job.status]

    async def connection(self, connection_id: str) -> Connection:
        """One connection.

        Raises:
            NotFoundError: There is none with this id.
        """
        async with self._server.connect() as api:
            return await api.connection(connection_id)

    async def look_up(self, job_id: str) -> tuple[JobHandle, AirbyteRequest, JobStatus]:
        """A job that somebody else started.

        Raises:
            NotFoundError: There is none with this id.
        """
        return (await self.look_closely(job_id))[0]

    async def look_closely(self, job_id: str) -> tuple[tuple[JobHandle, AirbyteRequest, JobStatus], bool]:
        """The same, and whether that is all: else it may be told later that only a part has landed.

        Raises:
            NotFoundError: There is none with this id.
        """
        async with self._connect() as client:
            api = await client.api()
            job = await api.job(job_id)
            connection = await api.connection(job.connection_id)
            job = await self._explain(client, api, job)
            whole = job.status != "succeeded" or job.attempts is not None or not client.may_explain
        request = AirbyteRequest(connection.id, job.type, connection.name, connection.owner)
        return (self._handle(job, connection, ""), request, _status(job)), whole

    def _handle(self, job: Job, connection: Connection, marker: str) -> JobHandle:
        return JobHandle(
            vendor=self.name,
            resource_id=connection.id,
            job_id=job.id,
            marker=marker,
            started_at=job.created_at,
            url=f"{self._server.app_url}/workspaces/{connection.workspace_id}/connections/{connection.id}"
            f"/timeline?openLogs=true&jobId={job.id}",
        )


async def _create(client: AirbyteClient, api: AirbyteApi, request: AirbyteRequest) -> Job:
    operation = cast("Operation", request.operation)
    if operation != "refresh" and not request.streams:
        return await api.create_job(request.resource_id, operation)
    # Also where the public API is used otherwise: it has neither a refresh nor streams.
    config = client.config
    if config is None:
        what = "a refresh" if operation == "refresh" else f"a {operation} of single streams"
        whole = "" if operation == "refresh" else " whole"
        raise InputError(
            f"Airbyte Cloud has no API for {what}; nothing was started. Clear the connection{whole} and sync "
            "it instead (`before: clear`), or do it in Airbyte's own interface."
        )
    if operation == "clear" or operation == "reset":
        return await config.clear_streams(request.resource_id, operation, request.streams)
    return await config.refresh(request.resource_id, request.mode, request.streams)


def _see_what_was_hit(job: Job) -> None:
    """Look at the job after its cancellation, which Airbyte gives to whatever its connection is running.

    Raises:
        VendorUnavailable: It goes on for now.
    """
    if not job.ended:
        raise VendorUnavailable("Airbyte", f"job {job.id} is {job.status} after its cancellation")
    if job.status != "cancelled":
        run_logger("elt.jobs").warning(
            "Airbyte job %s had %s before its cancellation arrived. Airbyte cancels what the connection is "
            "running by then: look whether that was another job.",
            job.id,
            job.status,
        )


def _runs_already(error: ConflictError) -> bool:
    """What a 409 is about: by the word that each API has for it, for a text may say anything."""
    body = error.body if isinstance(error.body, Mapping) else {}
    if isinstance(title := body.get("title"), str):  # the public API's problem document
        return title == "try-again-later"
    if isinstance(name := body.get("exceptionClassName"), str):  # the Config API's
        return name.endswith("ValueConflictKnownException")
    return "already running" in error.message


def _status(job: Job) -> JobStatus:
    state = _STATES.get(job.status)
    last = job.attempts[-1] if job.attempts else None
    if state is JobState.SUCCEEDED and last and (last.failures or last.partial):
        state = JobState.PARTIAL  # it is called succeeded, and some of its streams did not land
    return JobStatus(
        state=state or JobState.RUNNING,
        known=state is not None,
        word=job.status,
        rows=job.rows_synced,
        bytes=job.bytes_synced,
        rows_rejected=job.rows_rejected,
        attempts=len(job.attempts) if job.attempts else None,
        duration=None if job.duration is None else job.duration.total_seconds(),
        message=_message(job, state),
        streams=_streams(job) if job.ended else [],
    )


def _message(job: Job, state: JobState | None) -> str | None:
    why = str(job.failures[0]) if job.failures else None
    more = f", and {len(job.failures) - 1} more" if len(job.failures) > 1 else ""
    match state:
        case JobState.CANCELLED:
            return "it was cancelled in Airbyte"
        case JobState.FAILED if why:
            return f"{why}{more}"
        case JobState.FAILED if job.attempts is None:
            return "Airbyte says failed; its public API gives no reason, the job's page does"
        case JobState.FAILED:
            return "Airbyte says failed and gives no reason; the job's log is on its page"
        case JobState.PARTIAL:
            return f"only a part landed: {why or 'Airbyte names no reason'}{more}"
        case JobState.RUNNING | JobState.RETRYING | JobState.QUEUED if why:
            failed = sum(1 for attempt in job.attempts or [] if attempt.status == "failed")
            return f"attempt {failed} failed: {why}{more}"
    return None


def _streams(job: Job) -> list[StreamResult]:
    last = job.attempts[-1].failures if job.attempts else []
    failed = {failure.stream: str(failure) for failure in last if failure.stream}
    found: list[StreamResult] = []
    for stats in job.streams:
        why = failed.get(Stream(name=stats.name, namespace=stats.namespace))
        landed = JobState.SUCCEEDED if job.status == "succeeded" else None
        found.append(
            StreamResult(
                **stats.model_dump(),
                state=JobState.FAILED if why else landed,
                message=why,
            )
        )
    return found


def refuse_unless_active(connection: Connection) -> None:
    """Raise `InputError` for a connection that Airbyte would not sync, with Airbyte's reason."""
    if connection.status != "active":
        reason = f" ({connection.status_reason})" if connection.status_reason else ""
        raise InputError(
            f"Airbyte connection {connection.name!r} ({connection.id}) is {connection.status}{reason}. "
            "Enable it in Airbyte, or take it out of the list; nothing was started for it."
        )
