"""Fivetran tasks: sync a connection, wait for a sync that Fivetran started itself, look at one.

Vendor documentation: https://fivetran.com/docs/rest-api
"""

from __future__ import annotations

import asyncio
from collections.abc import Hashable
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.runtime import task_run
from pydantic import (
    AwareDatetime,
    Field,
    SerializerFunctionWrapHandler,
    WithJsonSchema,
    field_serializer,
    field_validator,
    model_validator,
)

from blocks.fivetran import Connection, FivetranApi, FivetranCredentials
from blocks.http import NotFoundError
from blocks.reference import NAMED, load_block, stored_block
from tasks.fivetran_jobs import (
    Before,
    FivetranRequest,
    FivetranVendor,
    How,
    Rescheduled,
    problem_of,
    status_of,
)
from tasks.fresh import tell_fresh
from tasks.jobs import (
    Checked,
    InputError,
    JobPolicy,
    JobResult,
    JobState,
    JobStatus,
    Tool,
    ToolParameters,
    refuse_twice,
    run_job,
    tag_run,
    wait_for_job,
    watcher_for,
    without_traceback,
)

__all__ = [
    "TOOL",
    "FivetranSync",
    "FivetranVendor",
    "fivetran_check",
    "fivetran_status",
    "fivetran_sync",
    "fivetran_wait",
]

_FEW = 3  # up to so many connections are read one by one: a list would cost as much

CredentialsRef = Annotated[
    FivetranCredentials | str,
    NAMED,
    # In a form and in a deployment it is the name; instances are for scripts.
    WithJsonSchema({"type": "string", "description": "Name of a saved Fivetran Credentials block."}),
]
ConnectionId = Annotated[
    str,
    Field(
        title="Connection ID",
        pattern=r"^[A-Za-z0-9_-]+$",
        description="Two words such as `mystified_presidency`, from the connection's Setup tab or address.",
    ),
]


class FivetranSync(ToolParameters):
    """A sync of one connection, as a flow takes it."""

    tool: Literal["fivetran"] = "fivetran"
    credentials: CredentialsRef = Field(title="Credentials")
    connection_id: ConnectionId
    name: str = Field(default="", title="Name", description="For people; the connection's schema by default.")
    owner: str | None = Field(
        default=None, title="Owner", description="Who is told of a failure. Fivetran knows no owners."
    )
    force: bool = Field(
        default=False,
        title="Force",
        description="Stop a sync that is running and start anew; `on_active` says what else may be done.",
    )
    resync: Literal["none", "all"] | dict[str, list[str]] = Field(
        default="none",
        title="Re-sync",
        description="Load history anew: of everything (all), or of tables by their schema in the source. "
        "It can take days and is billed.",
    )
    confirm_resync: str = Field(
        default="", title="Confirm the re-sync", description="The connection ID once more, for a re-sync."
    )
    rescheduled: Rescheduled = Field(
        default="retrigger",
        title="Rescheduled",
        description="When the source takes no more requests and Fivetran puts the sync off: trigger it again "
        "at that time if its schedule is manual (else Fivetran does that), only wait, or fail.",
    )
    policy: JobPolicy = Field(default_factory=JobPolicy, title="Policy")

    @field_validator("resync")
    @classmethod
    def _names_tables(cls, value: Any) -> Any:
        if isinstance(value, dict) and not (value and all(value.values())):
            raise ValueError("a re-sync of some tables names at least one in each schema")
        return value

    @model_validator(mode="after")
    def _guarded(self) -> FivetranSync:
        if self.resync != "none":
            if self.force:
                raise ValueError(
                    "force and resync can't be had together: a re-sync waits for what is running"
                )
            if self.confirm_resync != self.connection_id:
                raise ValueError(
                    "a re-sync loads history anew, which takes long and is billed: repeat the connection ID "
                    "in confirm_resync to have it"
                )
        if self.force and self.policy.on_active != "queue":
            raise ValueError("force stops what is running, so that on_active has nothing left to decide")
        if self.policy.min_rows is not None or self.policy.max_rows_rejected is not None:
            raise ValueError(
                "Fivetran's API counts no rows, so that min_rows and max_rows_rejected can't be checked; "
                "test the number of rows in dbt"
            )
        return self

    @field_serializer("credentials", mode="wrap")
    def _by_name(self, credentials: FivetranCredentials | str, handler: SerializerFunctionWrapHandler) -> Any:
        # What is stored with a flow run must work in a retry of it, and hold no secret.
        return stored_block(credentials, FivetranCredentials, handler)

    @property
    def resource_id(self) -> str:
        """The connection."""
        return self.connection_id

    @property
    def label(self) -> str:
        """What a person calls it."""
        return self.name or self.connection_id

    @property
    def how(self) -> How:
        """What Fivetran is asked for."""
        return "force" if self.force else "sync" if self.resync == "none" else "resync"


# -- checking -----------------------------------------------------------------------------------------------


@task(
    name="fivetran-check",
    task_run_name="check Fivetran connections",
    tags=["fivetran"],
    cache_policy=NO_CACHE,
)
async def fivetran_check(syncs: list[FivetranSync]) -> list[Checked[FivetranSync]]:
    """Look up the connections of a fan-out before anything is started, a thousand per request.

    Args:
        syncs: The syncs, of one or more accounts.

    Returns:
        The same syncs with names filled in, and where they write to. A connection that is paused, or whose
        setup is broken or incomplete, carries its `problem`. Which tables a connection fills Fivetran says
        only of those whose schema is written `schema.table`; a database's writes to schemas that begin with
        its name. A dbt source that has the connection's id in its `meta` needs neither.

    Raises:
        InputError: A connection does not exist or is named twice. Nothing was started.
        BlockNotFound: The credentials are the name of a block that is not saved.
        VendorError: Fivetran can't be reached or refuses the key.
    """
    without_traceback()
    accounts: dict[Hashable, FivetranCredentials] = {}
    pairs: list[tuple[Hashable, str]] = []
    for sync in syncs:
        credentials = await load_block(FivetranCredentials, sync.credentials)
        accounts[credentials.account] = credentials
        pairs.append((credentials.account, sync.connection_id))
    refuse_twice("Fivetran connection", pairs)
    known: dict[tuple[Hashable, str], Connection] = {}
    for account, credentials in accounts.items():
        wanted = [connection for of, connection in pairs if of == account]
        # The client serves the syncs that follow on this loop.
        await watcher_for(FivetranVendor(credentials))
        async with credentials.api() as api:
            known.update(((account, id_), found) for id_, found in (await _read(api, wanted)).items())
    if unknown := [connection for account, connection in pairs if (account, connection) not in known]:
        raise InputError(_unknown(*unknown))
    return [_checked(sync, known[pair]) for sync, pair in zip(syncs, pairs, strict=True)]


async def _read(api: FivetranApi, wanted: list[str]) -> dict[str, Connection]:
    """The connections that exist."""
    listed = await api.connections(wanted) if len(wanted) > _FEW else {}
    # What is in no list, too: it answers with the reason.
    rest = [id_ for id_ in wanted if id_ not in listed]
    found = await asyncio.gather(*(api.connection(id_, fresh=True) for id_ in rest), return_exceptions=True)
    for outcome in found:
        if isinstance(outcome, BaseException) and not isinstance(outcome, NotFoundError):
            raise outcome
    return listed | {outcome.id: outcome for outcome in found if isinstance(outcome, Connection)}


def _unknown(*connections: str) -> str:
    return (
        f"Fivetran knows no connection {', '.join(connections)}, or this key may not see it. "
        "Nothing was started."
    )


def _checked(sync: FivetranSync, connection: Connection) -> Checked[FivetranSync]:
    return Checked(
        _named(sync, connection),
        namespace=connection.namespace,
        streams=tuple(connection.tables),
        problem=problem_of(connection),
        counts_rows=False,
    )


def _named(sync: FivetranSync, connection: Connection) -> FivetranSync:
    return sync.model_copy(update={"name": sync.name or connection.schema_name})


# -- running ------------------------------------------------------------------------------------------------


def _run_name(verb: str) -> Any:
    def name() -> str:
        parameters = task_run.get_parameters()
        sync = parameters.get("sync")
        return f"{verb} {sync.label if isinstance(sync, FivetranSync) else parameters.get('connection_id')}"

    return name


async def _vendor(credentials: FivetranCredentials | str) -> FivetranVendor:
    without_traceback()
    return FivetranVendor(await load_block(FivetranCredentials, credentials))


async def _look_up(credentials: FivetranCredentials, connection_id: str, *, fresh: bool) -> Connection:
    async with credentials.api() as api:
        try:
            return await api.connection(connection_id, fresh=fresh)
        except NotFoundError as error:
            raise InputError(_unknown(connection_id)) from error


@task(name="fivetran-sync", task_run_name=_run_name("sync"), cache_policy=NO_CACHE)
async def fivetran_sync(sync: FivetranSync) -> JobResult:
    """Sync one connection and wait for its end.

    Safe to retry: a retry waits for the sync that an earlier attempt triggered, and one that succeeded is not
    triggered again. What Fivetran must not be asked for twice, a forced sync or a re-sync, a retry does not
    ask for again where it may have been begun. Nothing about the connection is changed: a paused one is
    refused, and its schedule stays. Follows `POST /v1/connections/{id}/sync` and `GET /v1/connections`.

    Args:
        sync: The connection, its account and its policy (times in seconds).

    Returns:
        The duration in seconds from the trigger to the end, and the connection's link. Fivetran's API has no
        job ids and counts neither rows nor bytes: the id is made of the connection and the trigger's time.

    Raises:
        InputError: The connection does not exist, is paused, or is not set up. Nothing was started.
        JobFailed, JobTimeout: The sync did not end well; `.result` says how, with what Fivetran asks to be
            done. At a timeout it is left running: Fivetran has no way to cancel a sync.
        VendorError: The API refused, or was out of reach for longer than `policy.outage`.
    """
    tag_run("fivetran")
    without_traceback()
    credentials = await load_block(FivetranCredentials, sync.credentials)
    async with credentials.api():
        sync = _named(sync, await _look_up(credentials, sync.connection_id, fresh=False))
        request = FivetranRequest(
            resource_id=sync.connection_id,
            operation="resync" if sync.how == "resync" else "sync",
            name=sync.name,
            owner=sync.owner,
            how=sync.how,
            scope=sync.resync if isinstance(sync.resync, dict) else None,
            rescheduled=sync.rescheduled,
            timeout=sync.policy.timeout,
        )
        return tell_fresh(await run_job(FivetranVendor(credentials), request, sync.policy))


@task(
    name="fivetran-wait",
    task_run_name=_run_name("wait for Fivetran connection"),
    tags=["fivetran"],
    cache_policy=NO_CACHE,
)
async def fivetran_wait(
    credentials: CredentialsRef,
    connection_id: ConnectionId,
    since: AwareDatetime | None = None,
    policy: JobPolicy | None = None,
) -> JobResult:
    """Wait for a sync that somebody else has triggered, for example Fivetran's own schedule.

    Without `since` that is the sync which is running now; when none is, how the last one ended is known
    already, and nothing is waited for.

    Args:
        credentials: The block or its name.
        connection_id: The connection.
        since: Wait until a sync has ended after this moment, whether or not it has begun. One that ended
            between it and now counts.
        policy: Times in seconds. `on_timeout` does not apply.

    Returns:
        As `fivetran_sync`, without a duration.

    Raises:
        InputError: There is no such connection, or it has never been synced and nothing is running.
        JobFailed, JobTimeout, VendorError: As `fivetran_sync`.
    """
    vendor = await _vendor(credentials)
    block = await load_block(FivetranCredentials, credentials)
    async with vendor.session():
        connection = await _look_up(block, connection_id, fresh=True)
        ended = since
        if since is None and connection.syncing:
            ended = connection.ended_at
        elif since is None and connection.ended_at is None:
            raise InputError(
                f"Fivetran connection {connection.schema_name} ({connection.id}) has never been synced and "
                "is not syncing now: there is nothing to wait for."
            )
        # With the state of a sync that was running already: its beginning is not known.
        now = datetime.now(UTC)
        before = Before(at=now, asked=vendor.theirs(now), ended=ended, state="syncing")
        request = FivetranRequest(connection_id, "sync", connection.schema_name, None)
        return await wait_for_job(
            vendor, request, vendor.handle(connection_id, before), policy or JobPolicy()
        )


@task(
    name="fivetran-status",
    task_run_name=_run_name("status of Fivetran connection"),
    tags=["fivetran"],
    cache_policy=NO_CACHE,
)
async def fivetran_status(credentials: CredentialsRef, connection_id: ConnectionId) -> JobResult:
    """What a connection is doing, or how its last sync ended. Does not wait and does not judge.

    Args:
        credentials: The block or its name.
        connection_id: The connection.

    Returns:
        RUNNING while a sync is, QUEUED for one that was put off or where there never was one; else how the
        last one ended, and in the message why none will follow (paused, broken).

    Raises:
        InputError: There is no such connection.
        VendorError: The API refused or can't be reached.
    """
    vendor = await _vendor(credentials)
    block = await load_block(FivetranCredentials, credentials)
    async with vendor.session():
        connection = await _look_up(block, connection_id, fresh=True)
        status = _status_now(connection, vendor.theirs(datetime.now(UTC)))
    return JobResult(
        vendor=vendor.name,
        resource_id=connection.id,
        name=connection.schema_name,
        url=block.link(connection.id),
        state=status.state,
        message=status.message,
    )


def _status_now(connection: Connection, now: datetime) -> JobStatus:
    idle = connection.status.sync_state in ("scheduled", "paused")
    if not idle:
        before = Before(at=now, asked=now, ended=connection.ended_at, state="syncing")
        return status_of(connection, before, now, 0.0)
    if connection.ended_at is None:
        said = connection.problem or "it has never been synced"
        return JobStatus(state=JobState.QUEUED, word="scheduled", message=said)
    status = status_of(connection, Before(at=now, asked=now, state="syncing"), now, 0.0)
    said = "; ".join(part for part in (status.message, connection.problem) if part)
    return status.model_copy(update={"message": said or None})


TOOL = Tool("fivetran", "Fivetran", fivetran_check, fivetran_sync, _vendor, meta="fivetran_connection_id")
