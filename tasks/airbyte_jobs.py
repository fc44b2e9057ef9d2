"""Airbyte's jobs for the engine: how they are started, found, observed and cancelled."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Hashable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal

from blocks.airbyte import AirbyteApi, AirbyteServer, Connection, Job
from blocks.http import ConflictError, VendorError
from blocks.reference import block_name
from tasks.jobs import AlreadyRunning, InputError, Intent, JobHandle, JobRequest, JobState, JobStatus

Operation = Literal["sync", "clear", "reset"]

_STATES = {
    "pending": JobState.QUEUED,
    "queued": JobState.QUEUED,  # waiting for capacity; may last hours
    "running": JobState.RUNNING,
    "incomplete": JobState.RETRYING,  # an attempt failed and another is coming: not an end
    "succeeded": JobState.SUCCEEDED,
    "failed": JobState.FAILED,
    "cancelled": JobState.CANCELLED,
}
_FEW = 3  # up to so many jobs are read one by one: a list would cost as much
_WINDOW = timedelta(seconds=5)


@dataclass(frozen=True)
class AirbyteRequest:
    """A job of a connection, as the engine takes it."""

    resource_id: str
    operation: str
    name: str
    owner: str | None = None


class AirbyteVendor:
    """Airbyte's jobs for the engine."""

    name = "airbyte"
    on_partial: Literal["fail", "warn", "ok"] = "fail"
    grace = 5.0

    def __init__(self, server: AirbyteServer) -> None:
        self._server = server
        self._api: AirbyteApi | None = None
        self.account: Hashable = server.account
        self.block = block_name(server, AirbyteServer)

    @asynccontextmanager
    async def session(self) -> AsyncIterator[None]:
        """Keep the account's client open."""
        async with self._server.api() as self._api:
            yield

    def theirs(self, moment: datetime) -> datetime:
        """A moment of our clock on Airbyte's."""
        return self._api.theirs(moment) if self._api else moment

    async def baseline(self, request: AirbyteRequest) -> None:
        """Nothing: a job has an id."""

    async def start(self, request: AirbyteRequest, intent: Intent) -> JobHandle:
        """`POST /jobs`. Airbyte has no place for a marker."""
        async with self._server.api() as api:
            connection = await api.connection(request.resource_id)
            if connection.status != "active":  # as far as we remember
                api.forget(connection.id)
                connection = await api.connection(connection.id)
            refuse_unless_active(connection)
            try:
                job = await api.create_job(request.resource_id, request.operation)
            except ConflictError as error:
                raise await self._conflict(api, connection, request, error) from error
            return self._handle(job, connection, intent.marker)

    async def _conflict(
        self, api: AirbyteApi, connection: Connection, request: AirbyteRequest, error: ConflictError
    ) -> AlreadyRunning | ConflictError | InputError:
        title = error.body.get("title") if isinstance(error.body, Mapping) else None
        if title == "try-again-later" or "already running" in error.message:
            active = next((job for job in await api.newest_jobs(connection.id) if not job.ended), None)
            if active is None:
                return AlreadyRunning(None)
            return AlreadyRunning(self._handle(active, connection, ""), same=active.type == request.operation)
        # Airbyte hides the reason of any other refusal; the connection tells it, if it has changed under us.
        api.forget(connection.id)
        refuse_unless_active(await api.connection(connection.id))
        return error

    async def find(self, request: JobRequest, intent: Intent) -> JobHandle | None:
        """The connection's first job of this kind that was created since then."""
        async with self._server.api() as api:
            jobs = await api.newest_jobs(request.resource_id, retry=False)
            since = api.theirs(intent.since)
            ours = [
                job
                for job in jobs
                if job.created_at >= since and job.type == request.operation and job.id not in intent.known
            ]
            if not ours:
                return None
            connection = await api.connection(request.resource_id)
            return self._handle(min(ours, key=lambda job: job.created_at), connection, intent.marker)

    async def observe(self, handles: Sequence[JobHandle]) -> Mapping[str, JobStatus | Exception]:
        """Lists of the newest jobs, a hundred a request; one by one only what they do not show."""
        wanted = {handle.job_id for handle in handles}
        seen: dict[str, JobStatus | Exception] = {}
        async with self._server.api() as api:
            if len(wanted) > _FEW:
                since = min(handle.started_at for handle in handles) - _WINDOW
                # Newer jobs may fill the first pages; some more cost a tenth of asking one by one.
                async for jobs in api.jobs_since(since, pages=len(wanted) // 10 + 2):
                    seen.update((job.id, _status(job)) for job in jobs if job.id in wanted)
                    if len(seen) == len(wanted):
                        break
            slots = asyncio.Semaphore(10)
            missing = sorted(wanted - seen.keys())
            seen.update(await asyncio.gather(*(_observe_one(api, job_id, slots) for job_id in missing)))
        return seen

    async def cancel(self, handle: JobHandle) -> JobState | None:
        """`DELETE /jobs/{id}`, after a look: it stops whatever the connection is running by then."""
        async with self._server.api() as api:
            job = await api.job(handle.job_id)
            if not job.ended:
                try:
                    await api.cancel_job(handle.job_id)
                except ConflictError:  # it ended between the look and the request
                    job = await api.job(handle.job_id)
                    if not job.ended:
                        raise
                else:
                    return JobState.CANCELLED
            return _STATES[job.status]

    async def connection(self, connection_id: str) -> Connection:
        """One connection.

        Raises:
            NotFoundError: There is none with this id.
        """
        async with self._server.api() as api:
            return await api.connection(connection_id)

    async def look_up(self, job_id: str) -> tuple[JobHandle, AirbyteRequest, JobStatus]:
        """A job that somebody else started.

        Raises:
            NotFoundError: There is none with this id.
        """
        async with self._server.api() as api:
            job = await api.job(job_id)
            connection = await api.connection(job.connection_id)
        request = AirbyteRequest(connection.id, job.type, connection.name, connection.owner)
        return self._handle(job, connection, ""), request, _status(job)

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


async def _observe_one(
    api: AirbyteApi, job_id: str, slots: asyncio.Semaphore
) -> tuple[str, JobStatus | Exception]:
    async with slots:
        try:
            return job_id, _status(await api.job(job_id, retry=False))
        except VendorError as error:
            return job_id, error


def _status(job: Job) -> JobStatus:
    state = _STATES.get(job.status)
    message = None
    if state is JobState.FAILED:
        message = "Airbyte says failed; its public API gives no reason, the job's page does"
    elif state is JobState.CANCELLED:
        message = "it was cancelled in Airbyte"
    return JobStatus(
        state=state or JobState.RUNNING,
        known=state is not None,
        word=job.status,
        rows=job.rows_synced,
        bytes=job.bytes_synced,
        duration=None if job.duration is None else job.duration.total_seconds(),
        message=message,
    )


def refuse_unless_active(connection: Connection) -> None:
    """Raise `InputError` for a connection that Airbyte would not sync, with Airbyte's reason."""
    if connection.status != "active":
        reason = f" ({connection.status_reason})" if connection.status_reason else ""
        raise InputError(
            f"Airbyte connection {connection.name!r} ({connection.id}) is {connection.status}{reason}. "
            "Enable it in Airbyte, or take it out of the list; nothing was started for it."
        )
