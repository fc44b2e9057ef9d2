"""Airbyte tasks: sync, clear, wait for a job started elsewhere, cancel.

Vendor documentation: https://reference.airbyte.com/reference/getting-started
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Hashable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Annotated, Any, Literal
from uuid import UUID

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.runtime import task_run
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    WithJsonSchema,
    field_serializer,
    field_validator,
)

from blocks.airbyte import AirbyteApi, AirbyteServer, Connection, Job
from blocks.http import ConflictError, NotFoundError, VendorError
from blocks.reference import block_name, load_block
from tasks.jobs import (
    AlreadyRunning,
    InputError,
    JobHandle,
    JobPolicy,
    JobRequest,
    JobResult,
    JobState,
    JobStatus,
    cancel_job,
    run_job,
    wait_for_job,
    without_traceback,
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
_FEW = 3  # up to so many jobs are read one by one: a list would cost as much
_WINDOW = timedelta(seconds=5)

ServerRef = Annotated[
    AirbyteServer | str,
    # In a form and in a deployment it is the name; instances are for scripts.
    WithJsonSchema({"type": "string", "description": "Name of a saved Airbyte Server block."}),
]


class AirbyteSync(BaseModel):
    """A sync of one connection, as a flow takes it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tool: Literal["airbyte"] = "airbyte"
    server: ServerRef = Field(title="Server")
    connection_id: str = Field(title="Connection ID", description="The UUID in the connection's address.")
    name: str = Field(default="", title="Name", description="For people; Airbyte's own name by default.")
    owner: str | None = Field(
        default=None,
        title="Owner",
        description="Who is told of a failure; by default the tag `owner:<name>`.",
    )
    policy: JobPolicy = Field(default_factory=JobPolicy, title="Policy")

    @field_validator("connection_id")
    @classmethod
    def _is_uuid(cls, value: str) -> str:
        try:
            return str(UUID(value))
        except ValueError:
            raise ValueError(
                f"{value!r} is not an Airbyte connection id; that is the UUID in the connection's address"
            ) from None

    @field_serializer("server", mode="wrap")
    def _by_name(self, server: AirbyteServer | str, handler: SerializerFunctionWrapHandler) -> Any:
        # What is stored with a flow run must work in a retry of it, and hold no secret.
        if isinstance(server, AirbyteServer) and (name := block_name(server, AirbyteServer)):
            return name
        return handler(server)

    @property
    def resource_id(self) -> str:
        """The connection."""
        return self.connection_id

    @property
    def label(self) -> str:
        """What a person calls it."""
        return self.name or self.connection_id[:8]


@dataclass(frozen=True)
class _Request:
    """A job of a connection, as the engine takes it."""

    resource_id: str
    operation: Literal["sync", "clear", "reset"]
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

    async def start(self, request: _Request, marker: str) -> JobHandle:
        """`POST /jobs`. Airbyte has no place for a marker."""
        async with self._server.api() as api:
            connection = await api.connection(request.resource_id)
            _refuse_unless_active(connection)
            try:
                job = await api.create_job(request.resource_id, request.operation)
            except ConflictError as error:
                raise await self._conflict(api, connection, error) from error
            return self._handle(job, connection, marker)

    async def _conflict(
        self, api: AirbyteApi, connection: Connection, error: ConflictError
    ) -> AlreadyRunning | ConflictError | InputError:
        title = error.body.get("title") if isinstance(error.body, Mapping) else None
        if title == "try-again-later" or "already running" in error.message:
            active = next(
                (j for j in await api.jobs(connection_id=connection.id, limit=20) if not j.ended), None
            )
            return AlreadyRunning(self._handle(active, connection, "") if active else None)
        # Airbyte hides the reason of any other refusal; the connection tells it, if it has changed under us.
        api.forget(connection.id)
        _refuse_unless_active(await api.connection(connection.id))
        return error

    async def find(
        self, request: JobRequest, marker: str, since: datetime, known: Sequence[str]
    ) -> JobHandle | None:
        """The connection's first job of this kind that was created since then."""
        async with self._server.api() as api:
            jobs = await api.jobs(connection_id=request.resource_id, limit=20)
            since = api.theirs(since)
            ours = [
                job
                for job in jobs
                if job.created_at >= since and job.type == request.operation and job.id not in known
            ]
            if not ours:
                return None
            connection = await api.connection(request.resource_id)
            return self._handle(min(ours, key=lambda job: job.created_at), connection, marker)

    async def observe(self, handles: Sequence[JobHandle]) -> Mapping[str, JobStatus | Exception]:
        """Lists of the newest jobs, a hundred a request; one by one only what they do not show."""
        wanted = {handle.job_id for handle in handles}
        seen: dict[str, JobStatus | Exception] = {}
        async with self._server.api() as api:
            if len(wanted) > _FEW:
                since = min(handle.started_at for handle in handles) - _WINDOW
                async for jobs in api.newest_jobs(since, pages=len(wanted) // 100 + 2):
                    seen.update((job.id, _status(job)) for job in jobs if job.id in wanted)
                    if len(seen) == len(wanted):
                        break
            slots = asyncio.Semaphore(10)
            missing = sorted(wanted - seen.keys())
            seen.update(await asyncio.gather(*(_observe_one(api, job_id, slots) for job_id in missing)))
        return seen

    async def cancel(self, handle: JobHandle) -> bool:
        """`DELETE /jobs/{id}`, after a look: it stops whatever the connection is running by then."""
        async with self._server.api() as api:
            if (await api.job(handle.job_id)).ended:
                return True
            try:
                await api.cancel_job(handle.job_id)
            except ConflictError:
                return (await api.job(handle.job_id)).ended
        return True

    async def handle(self, job_id: str) -> tuple[JobHandle, _Request]:
        """A job that somebody else started."""
        async with self._server.api() as api:
            job = await api.job(job_id)
            connection = await api.connection(job.connection_id)
        return self._handle(job, connection, ""), _Request(
            connection.id, "sync", connection.name, connection.owner
        )

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
        duration=job.duration.total_seconds() if job.duration else None,
        message=message,
    )


def _refuse_unless_active(connection: Connection) -> None:
    if connection.status != "active":
        reason = f" ({connection.status_reason})" if connection.status_reason else ""
        raise InputError(
            f"Airbyte connection {connection.name!r} ({connection.id}) is {connection.status}{reason}. "
            "Enable it in Airbyte, or take it out of the list; nothing was started for it."
        )


# -- checking -----------------------------------------------------------------------------------------------


class Checked(BaseModel):
    """A sync whose connection was looked up: it has its name and owner, and where it writes is known."""

    model_config = ConfigDict(frozen=True)

    sync: AirbyteSync
    namespace: str | None = None
    prefix: str = ""
    streams: list[str] = []
    problem: str | None = Field(default=None, description="Why it can't be started, where that is known.")


@task(
    name="airbyte-check", task_run_name="check Airbyte connections", tags=["airbyte"], cache_policy=NO_CACHE
)
async def airbyte_check(syncs: list[AirbyteSync]) -> list[Checked]:
    """Look up the connections of a fan-out before anything is started, a hundred per request.

    Args:
        syncs: The syncs, of one or more servers.

    Returns:
        The same syncs with names and owners filled in. An inactive connection carries its `problem`.

    Raises:
        InputError: A connection does not exist or is named twice. Nothing was started.
        BlockNotFound: A server is the name of a block that is not saved.
        VendorError: The server can't be reached or refuses the credentials.
    """
    without_traceback()
    servers: dict[Hashable, AirbyteServer] = {}
    accounts: list[Hashable] = []
    for sync in syncs:
        server = await load_block(AirbyteServer, sync.server)
        servers[server.account] = server
        accounts.append(server.account)
    pairs = list(zip(accounts, (sync.connection_id for sync in syncs), strict=True))
    if twice := sorted(
        {connection for account, connection in pairs if pairs.count((account, connection)) > 1}
    ):
        raise InputError(f"Connection {', '.join(twice)} is listed more than once. Nothing was started.")
    known: dict[tuple[Hashable, str], Connection] = {}
    for account, server in servers.items():
        wanted = [connection for of, connection in pairs if of == account]
        async with server.api() as api:
            if len(wanted) > _FEW:
                known.update(((account, c.id), c) for c in await api.connections())
            for connection_id in wanted:
                if (account, connection_id) not in known:
                    try:
                        known[account, connection_id] = await api.connection(connection_id)
                    except NotFoundError:
                        continue
    if unknown := [connection for account, connection in pairs if (account, connection) not in known]:
        raise InputError(
            f"Airbyte knows no connection {', '.join(unknown)}, or these credentials may not see it. "
            "Nothing was started."
        )
    return [_checked(sync, known[pair]) for sync, pair in zip(syncs, pairs, strict=True)]


def _checked(sync: AirbyteSync, connection: Connection) -> Checked:
    problem = None
    try:
        _refuse_unless_active(connection)
    except InputError as error:
        problem = str(error)
    return Checked(
        sync=_named(sync, connection),
        namespace=connection.namespace,
        prefix=connection.prefix or "",
        streams=[stream.name for stream in connection.streams],
        problem=problem,
    )


def _named(sync: AirbyteSync, connection: Connection) -> AirbyteSync:
    return sync.model_copy(
        update={"name": sync.name or connection.name, "owner": sync.owner or connection.owner}
    )


# -- running ------------------------------------------------------------------------------------------------


def _run_name(verb: str) -> Any:
    def name() -> str:
        parameters = task_run.get_parameters()
        sync = parameters.get("sync")
        return f"{verb} {sync.label if isinstance(sync, AirbyteSync) else parameters.get('job_id')}"

    return name


async def _run(sync: AirbyteSync, operation: Literal["sync", "clear", "reset"]) -> JobResult:
    server = await load_block(AirbyteServer, sync.server)
    async with server.api() as api:
        try:
            sync = _named(sync, await api.connection(sync.connection_id))
        except NotFoundError as error:
            raise InputError(
                f"Airbyte knows no connection {sync.connection_id}, or these credentials may not see it. "
                "Nothing was started."
            ) from error
        name = sync.name if operation == "sync" else f"{operation} {sync.name}"
        request = _Request(sync.connection_id, operation, name, sync.owner)
        return await run_job(AirbyteVendor(server), request, sync.policy)


@task(name="airbyte-sync", task_run_name=_run_name("sync"), tags=["airbyte"], cache_policy=NO_CACHE)
async def airbyte_sync(sync: AirbyteSync) -> JobResult:
    """Sync one connection and wait for its end.

    Safe to retry: a retry attaches to the job that an earlier attempt started, and one that succeeded is not
    started again. Follows `POST /jobs` and `GET /jobs` of Airbyte's public API.

    Args:
        sync: The connection, its server and its policy (times in seconds).

    Returns:
        Rows and bytes committed, the duration in seconds and the job's link.

    Raises:
        InputError: The connection does not exist or is not active. Nothing was started.
        JobFailed, JobCancelled, JobTimeout: The job did not end well; `.result` says how.
        VendorError: The API refused, or was out of reach for longer than `policy.outage`.
    """
    return await _run(sync, "sync")


@task(name="airbyte-clear", task_run_name=_run_name("clear"), tags=["airbyte"], cache_policy=NO_CACHE)
async def airbyte_clear(sync: AirbyteSync, *, reset: bool = False) -> JobResult:
    """Delete what a connection has loaded, and its state, so that its next sync loads everything anew.

    It is not followed by a sync: run one yourself. A sync that is running is cancelled by Airbyte first.

    Args:
        sync: The connection, its server and its policy.
        reset: Send the older job type `reset`, which needs a lesser role than `clear`.

    Returns:
        As `airbyte_sync`.

    Raises:
        InputError, JobFailed, JobCancelled, JobTimeout, VendorError: As `airbyte_sync`.
    """
    return await _run(sync, "reset" if reset else "clear")


@task(
    name="airbyte-wait",
    task_run_name=_run_name("wait for Airbyte job"),
    tags=["airbyte"],
    cache_policy=NO_CACHE,
)
async def airbyte_wait(server: ServerRef, job_id: str, policy: JobPolicy | None = None) -> JobResult:
    """Wait for a job that was started elsewhere, for example by Airbyte's own scheduler.

    Args:
        server: The block or its name.
        job_id: Airbyte's id of the job.
        policy: Times in seconds. `on_timeout` does not apply: what we did not start we do not cancel.

    Returns:
        As `airbyte_sync`.

    Raises:
        NotFoundError: There is no such job.
        JobFailed, JobCancelled, JobTimeout, VendorError: As `airbyte_sync`.
    """
    vendor = AirbyteVendor(await load_block(AirbyteServer, server))
    async with vendor.session():
        handle, request = await vendor.handle(job_id)
        return await wait_for_job(vendor, request, handle, policy or JobPolicy())


@task(
    name="airbyte-status",
    task_run_name=_run_name("status of Airbyte job"),
    tags=["airbyte"],
    cache_policy=NO_CACHE,
)
async def airbyte_status(server: ServerRef, job_id: str) -> JobResult:
    """The present state of a job, whoever started it. Does not wait and does not judge.

    Returns:
        Its state may be QUEUED, RUNNING or RETRYING.

    Raises:
        NotFoundError: There is no such job.
        VendorError: The API refused or can't be reached.
    """
    block = await load_block(AirbyteServer, server)
    vendor = AirbyteVendor(block)
    async with block.api() as api:
        handle, request = await vendor.handle(job_id)
        status = _status(await api.job(job_id))
    return JobResult(
        vendor=vendor.name,
        resource_id=handle.resource_id,
        name=request.name,
        owner=request.owner,
        job_id=job_id,
        url=handle.url,
        **status.model_dump(exclude={"word", "known"}),
    )


@task(
    name="airbyte-cancel",
    task_run_name=_run_name("cancel Airbyte job"),
    tags=["airbyte"],
    cache_policy=NO_CACHE,
)
async def airbyte_cancel(server: ServerRef, job_id: str) -> str:
    """Cancel a job, unless it has ended.

    Airbyte stops whatever job the connection is running when the request arrives, so the job is read first.

    Returns:
        What came of it, in words.

    Raises:
        NotFoundError: There is no such job.
    """
    vendor = AirbyteVendor(await load_block(AirbyteServer, server))
    async with vendor.session():
        handle, _ = await vendor.handle(job_id)
        return await cancel_job(vendor, handle)
