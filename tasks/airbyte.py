"""Airbyte tasks: sync, clear, wait for a job started elsewhere, cancel.

Vendor documentation: https://reference.airbyte.com/reference/getting-started
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable
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

from blocks.airbyte import AirbyteServer
from blocks.airbyte_model import Connection, Operation
from blocks.http import NotFoundError
from blocks.reference import load_block, stored_block
from tasks.airbyte_jobs import AirbyteRequest, AirbyteVendor, refuse_unless_active
from tasks.jobs import (
    Checked,
    InputError,
    JobPolicy,
    JobResult,
    Tool,
    cancel_job,
    run_job,
    tag_run,
    wait_for_job,
    watcher_for,
    without_traceback,
)

__all__ = [
    "TOOL",
    "AirbyteSync",
    "AirbyteVendor",
    "airbyte_cancel",
    "airbyte_check",
    "airbyte_clear",
    "airbyte_status",
    "airbyte_sync",
    "airbyte_wait",
]

_FEW = 3  # up to so many connections are read one by one: a list would cost as much

ServerRef = Annotated[
    AirbyteServer | str,
    # In a form and in a deployment it is the name; instances are for scripts.
    WithJsonSchema({"type": "string", "description": "Name of a saved Airbyte Server block."}),
]


class AirbyteSync(BaseModel):
    """A sync of one connection, as a flow takes it."""

    # pydantic's errors quote what they were given, and a server may be given with its secret.
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

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
        return stored_block(server, AirbyteServer, handler)

    @property
    def resource_id(self) -> str:
        """The connection."""
        return self.connection_id

    @property
    def label(self) -> str:
        """What a person calls it."""
        return self.name or self.connection_id[:8]


# -- checking -----------------------------------------------------------------------------------------------


@task(
    name="airbyte-check", task_run_name="check Airbyte connections", tags=["airbyte"], cache_policy=NO_CACHE
)
async def airbyte_check(syncs: list[AirbyteSync]) -> list[Checked[AirbyteSync]]:
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
    if twice := sorted(connection for (_, connection), count in Counter(pairs).items() if count > 1):
        raise InputError(f"Connection {', '.join(twice)} is listed more than once. Nothing was started.")
    known: dict[tuple[Hashable, str], Connection] = {}
    for account, server in servers.items():
        wanted = [connection for of, connection in pairs if of == account]
        # What is read here, and the token, serve the syncs that follow on this loop.
        await watcher_for(AirbyteVendor(server))
        async with server.connect() as api:
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


def _checked(sync: AirbyteSync, connection: Connection) -> Checked[AirbyteSync]:
    problem = None
    try:
        refuse_unless_active(connection)
    except InputError as error:
        problem = str(error)
    return Checked(
        _named(sync, connection),
        namespace=connection.namespace,
        prefix=connection.prefix or "",
        streams=tuple(stream.name for stream in connection.streams),
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


async def _vendor(server: AirbyteServer | str) -> AirbyteVendor:
    without_traceback()
    return AirbyteVendor(await load_block(AirbyteServer, server))


async def _run(sync: AirbyteSync, operation: Operation) -> JobResult:
    tag_run("airbyte")
    vendor = await _vendor(sync.server)
    async with vendor.session():
        try:
            sync = _named(sync, await vendor.connection(sync.connection_id))
        except NotFoundError as error:
            raise InputError(
                f"Airbyte knows no connection {sync.connection_id}, or these credentials may not see it. "
                "Nothing was started."
            ) from error
        name, policy = sync.name, sync.policy
        if operation != "sync":
            name = f"{operation} {name}"
            policy = policy.model_copy(update={"min_rows": None})  # it moves no rows
        request = AirbyteRequest(sync.connection_id, operation, name, sync.owner)
        return await run_job(vendor, request, policy)


@task(name="airbyte-sync", task_run_name=_run_name("sync"), cache_policy=NO_CACHE)
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


@task(name="airbyte-clear", task_run_name=_run_name("clear"), cache_policy=NO_CACHE)
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
    vendor = await _vendor(server)
    async with vendor.session():
        handle, request, _ = await vendor.look_up(job_id)
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
    vendor = await _vendor(server)
    async with vendor.session():
        handle, request, status = await vendor.look_up(job_id)
    return JobResult(
        vendor=vendor.name,
        resource_id=handle.resource_id,
        name=request.name,
        owner=request.owner,
        job_id=handle.job_id,
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
    vendor = await _vendor(server)
    async with vendor.session():
        handle, _, _ = await vendor.look_up(job_id)
        return await cancel_job(vendor, handle)


TOOL = Tool("airbyte", "Airbyte", airbyte_check, airbyte_sync, _vendor, meta="airbyte_connection_id")
