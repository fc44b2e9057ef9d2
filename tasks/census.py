"""Census tasks: run a sync and wait for its end.

Vendor documentation: https://developers.getcensus.com/api-reference
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.runtime import task_run
from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    WithJsonSchema,
    field_serializer,
    field_validator,
)

from blocks.census import CensusApi, CensusCredentials, Sync, SyncRun
from blocks.http import NotFoundError, VendorError
from blocks.reference import NAMED, block_name, load_block, stored_block
from tasks.jobs import (
    AccountVendor,
    AlreadyRunning,
    Checked,
    InputError,
    Intent,
    JobHandle,
    JobPolicy,
    JobRequest,
    JobResult,
    JobState,
    JobStatus,
    PlainRequest,
    Sweep,
    Tool,
    ToolParameters,
    refuse_twice,
    result_of,
    run_job,
    tag_run,
    without_traceback,
)

_STATES = {
    "new": JobState.QUEUED,  # an older name, as the next two
    "preparing": JobState.QUEUED,
    "retrying": JobState.RETRYING,
    "queued": JobState.QUEUED,
    "working": JobState.RUNNING,
    "completed": JobState.SUCCEEDED,
    "failed": JobState.FAILED,
    "skipped": JobState.SKIPPED,
    "cancelled": JobState.CANCELLED,
    "canceled": JobState.CANCELLED,
}
_FULL = "full-sync"

CredentialsRef = Annotated[
    CensusCredentials | str,
    NAMED,
    # In a form and in a deployment it is the name; instances are for scripts.
    WithJsonSchema({"type": "string", "description": "Name of a saved Census Credentials block."}),
]


class CensusSync(ToolParameters):
    """A run of one sync, as a flow takes it."""

    tool: Literal["census"] = "census"
    credentials: CredentialsRef = Field(title="Credentials")
    sync_id: str = Field(
        title="Sync ID", pattern=r"^\d+$", description="The number in the sync's address in Census."
    )
    name: str = Field(default="", title="Name", description="For people; the sync's label by default.")
    owner: str | None = Field(
        default=None, title="Owner", description="Who is told of a failure. Census keeps none."
    )
    full_sync: bool = Field(default=False, title="Full sync", description="Send all records anew.")
    policy: JobPolicy = Field(default_factory=JobPolicy, title="Policy")

    @field_validator("sync_id", mode="before")
    @classmethod
    def _text(cls, value: Any) -> Any:
        return str(value) if isinstance(value, int) else value

    @field_serializer("credentials", mode="wrap")
    def _by_name(self, credentials: CensusCredentials | str, handler: SerializerFunctionWrapHandler) -> Any:
        # What is stored with a flow run must work in a retry of it, and hold no secret.
        return stored_block(credentials, CensusCredentials, handler)

    @property
    def resource_id(self) -> str:
        """The sync."""
        return self.sync_id

    @property
    def label(self) -> str:
        """What a person calls it."""
        return self.name or self.sync_id


class CensusVendor(AccountVendor[CensusApi]):
    """Census's runs for the engine."""

    name = "census"
    on_partial: Literal["fail", "warn", "ok"] = "warn"
    grace = 10.0

    def __init__(self, credentials: CensusCredentials) -> None:
        super().__init__(credentials.api, credentials.account, block_name(credentials, CensusCredentials))
        self._credentials = credentials
        self._sweep = Sweep(self._look)

    async def start(self, request: JobRequest, intent: Intent) -> JobHandle:
        """`POST /syncs/{id}/trigger`. Always gives a run; while another is going, one that is skipped."""
        async with self._connect() as api:
            sync = await api.sync(request.resource_id)
            if sync.paused:  # as far as we remember
                sync = await api.sync(request.resource_id, fresh=True)
            if problem := _problem(sync):
                raise InputError(problem)
            run_id = await api.trigger(request.resource_id, full_sync=request.operation == _FULL)
            return self._handle(sync.id, run_id, api.theirs(datetime.now(UTC)), intent.marker)

    async def find(self, request: JobRequest, intent: Intent) -> JobHandle | None:
        """The sync's first run that was created since then; one of Census's own schedule only if no other."""
        async with self._connect() as api:
            since = api.theirs(intent.since)
            ours = [
                run
                for run in await api.runs(request.resource_id)
                if run.created_at >= since
                and run.id not in intent.known
                and (request.operation != _FULL or run.full_sync is not False)
            ]
        if not ours:
            return None
        run = min(ours, key=lambda run: (run.scheduled_execution_time is not None, run.created_at))
        return self._handle(run.sync_id, run.id, run.created_at, intent.marker)

    async def observe(self, handles: Sequence[JobHandle]) -> Mapping[str, JobStatus | Exception]:
        """A request per run, within the workspace's rate limit: there is no list of runs of many syncs."""
        async with self._connect():
            return await self._sweep.look(handles)

    async def _look(self, handle: JobHandle) -> JobStatus | None:
        async with self._connect() as api:
            run = await api.run(handle.job_id)
            status = _status(run)
            if status.state is not JobState.SKIPPED:
                return status
            skipped = await self._skipped_for(api, run)
            age = api.theirs(datetime.now(UTC)) - run.created_at
            if skipped.active is None and age.total_seconds() < self.grace:
                return None  # what it was skipped for is young too, and will be shown
            raise skipped

    async def _skipped_for(self, api: CensusApi, run: SyncRun) -> AlreadyRunning:
        """Names the run that was going when this one was to begin."""
        for other in await api.runs(run.sync_id):
            if other.id == run.id or other.created_at > run.created_at or other.status == "skipped":
                continue
            ended = (other.completed_at or other.updated_at) if _status(other).state.terminal else None
            if ended is not None and ended < run.created_at:
                break
            active = self._handle(other.sync_id, other.id, other.created_at, "")
            return AlreadyRunning(active, same=bool(other.full_sync) or not run.full_sync)
        return AlreadyRunning(None)

    async def cancel(self, handle: JobHandle) -> JobState | None:
        """`POST /sync_runs/{id}/cancel`, unless the run has ended."""
        async with self._connect() as api:
            state = _status(await api.run(handle.job_id)).state
            if state.terminal:
                return state
            try:
                await api.cancel(handle.job_id)
            except VendorError:
                # It may have ended just before; else the refusal stands.
                state = _status(await api.run(handle.job_id)).state
                if not state.terminal:
                    raise
                return state
            return JobState.CANCELLED

    async def look_up(self, run_id: str) -> tuple[JobHandle, JobRequest, JobStatus]:
        """A run, whoever started it.

        Raises:
            NotFoundError: There is none with this id.
        """
        async with self._connect() as api:
            run = await api.run(run_id, retry=True)
            sync = await api.sync(run.sync_id)
        request = PlainRequest(sync.id, _FULL if run.full_sync else "sync", sync.label or sync.id, None)
        return self._handle(sync.id, run.id, run.created_at, ""), request, _status(run)

    def _handle(self, sync_id: str, run_id: str, started_at: datetime, marker: str) -> JobHandle:
        return JobHandle(
            vendor=self.name,
            resource_id=sync_id,
            job_id=run_id,
            marker=marker,
            started_at=started_at,
            url=self._credentials.history_url(sync_id),
        )


def _status(run: SyncRun) -> JobStatus:
    state = _STATES.get(run.status)
    if state is JobState.SUCCEEDED and run.rejected:
        state = JobState.PARTIAL
    word = run.status
    if run.canceled:
        # The documented sign; which word stands beside it is not.
        state, word = JobState.CANCELLED, "canceled"
    ended = (run.completed_at or run.updated_at) if state and state.terminal else None
    if run.current_step and not ended:
        word = f"{word}: {run.current_step}"
    return JobStatus(
        state=state or JobState.RUNNING,
        known=state is not None,
        word=word,
        rows=run.records_updated,
        rows_rejected=run.rejected,
        duration=(ended - run.created_at).total_seconds() if ended else None,
        message=_message(run, state),
    )


def _message(run: SyncRun, state: JobState | None) -> str | None:
    if state is JobState.PARTIAL:
        failed, invalid = run.records_failed or 0, run.records_invalid or 0
        return f"{failed:,} records were rejected by the destination and {invalid:,} were invalid"
    if state is JobState.CANCELLED:
        return "it was cancelled in Census"
    if state is JobState.SKIPPED:
        return "Census skipped it, because an earlier run was still going"
    if state is JobState.FAILED:
        parts = dict.fromkeys(part for part in (run.error_message, run.error_detail) if part)
        return (" ".join(parts) or run.error_code or "Census says failed")[:500]
    return None


def _problem(sync: Sync) -> str | None:
    """Why a sync can't be run now."""
    if not sync.paused:
        return None
    return (
        f"Census sync {sync.label or sync.id} ({sync.id}) is paused. Resume it in Census, or take it out of "
        "the list; nothing was started for it."
    )


def _refuse_full_append(sync: CensusSync, found: Sync) -> None:
    if sync.full_sync and (found.operation or "").lower() == "append":
        raise InputError(
            f"Census sync {found.label or found.id} ({found.id}) appends, and an append sync can't be run as "
            "a full sync. Leave `full_sync` out. Nothing was started."
        )


def _named(sync: CensusSync, found: Sync) -> CensusSync:
    return sync.model_copy(update={"name": sync.name or found.label or found.id})


async def _lookup(api: CensusApi, sync: CensusSync) -> Sync:
    try:
        found = await api.sync(sync.sync_id)
    except NotFoundError as error:
        raise InputError(
            f"Census knows no sync {sync.sync_id}, or this API key may not see it. Nothing was started."
        ) from error
    _refuse_full_append(sync, found)
    return found


@task(name="census-check", task_run_name="check Census syncs", tags=["census"], cache_policy=NO_CACHE)
async def census_check(syncs: list[CensusSync]) -> list[Checked[CensusSync]]:
    """Look up the syncs of a chain before anything is started.

    Args:
        syncs: The syncs.

    Returns:
        The same syncs, named by their labels. A paused sync carries its `problem`.

    Raises:
        InputError: A sync does not exist, is named twice, or is to be synced in full and only appends.
            Nothing was started.
        BlockNotFound: The credentials are the name of a block that is not saved.
        VendorError: Census can't be reached or refuses the key.
    """
    without_traceback()
    blocks = [await load_block(CensusCredentials, sync.credentials) for sync in syncs]
    pairs = [(credentials.account, sync.sync_id) for sync, credentials in zip(syncs, blocks, strict=True)]
    refuse_twice("Census sync", pairs)
    accounts: dict[Hashable, set[str]] = defaultdict(set)
    for account, sync_id in pairs:
        accounts[account].add(sync_id)
    checked: list[Checked[CensusSync]] = []
    async with AsyncExitStack() as clients:
        for sync, credentials in zip(syncs, blocks, strict=True):
            api = await clients.enter_async_context(credentials.api())
            await api.learn(accounts.pop(credentials.account, set()))
            found = await _lookup(api, sync)
            checked.append(Checked(_named(sync, found), problem=_problem(found)))
    return checked


def _run_name() -> str:
    sync = task_run.get_parameters().get("sync")
    return f"activate {sync.label if isinstance(sync, CensusSync) else ''}"


@task(name="census-sync", task_run_name=_run_name, cache_policy=NO_CACHE)
async def census_sync(sync: CensusSync) -> JobResult:
    """Run one Census sync and wait for its end.

    Safe to retry: a retry attaches to the run that an earlier attempt started, and one that succeeded is not
    started again. A run that ends with rejected or invalid records is PARTIAL; by default it passes, with a
    warning in the log. Census skips a run while an earlier one is going: `policy.on_active` then says whether
    to wait for that one and start anew (queue), to take it as ours (adopt), or to skip or fail. Follows
    `POST /syncs/{id}/trigger` and `GET /sync_runs/{id}` of Census's API.

    Args:
        sync: The sync, its credentials and its policy (times in seconds).

    Returns:
        Records sent and rejected, the duration in seconds and the link to the sync's history. Census counts
        no bytes.

    Raises:
        InputError: The sync does not exist, is paused, or only appends and was to be synced in full. Nothing
            was started.
        JobFailed, JobCancelled, JobTimeout: The run did not end well; `.result` says how.
        VendorError: The API refused, or was out of reach for longer than `policy.outage`.
    """
    tag_run("census")
    without_traceback()
    credentials = await load_block(CensusCredentials, sync.credentials)
    async with credentials.api() as api:
        sync = _named(sync, await _lookup(api, sync))
        request = PlainRequest(sync.sync_id, _FULL if sync.full_sync else "sync", sync.name, sync.owner)
        return await run_job(CensusVendor(credentials), request, sync.policy)


@task(
    name="census-status",
    task_run_name="status of Census run {run_id}",
    tags=["census"],
    cache_policy=NO_CACHE,
)
async def census_status(credentials: CredentialsRef, run_id: str) -> JobResult:
    """The present state of a run, whoever started it. Does not wait and does not judge.

    Args:
        credentials: The workspace's credentials, or the name of their block.
        run_id: The sync run, as in `sync_run_id` of Census's webhooks.

    Returns:
        Its state may be QUEUED, RUNNING or RETRYING.

    Raises:
        NotFoundError: There is no such run.
        VendorError: The API refused or can't be reached.
    """
    without_traceback()
    vendor = await _vendor(credentials)
    async with vendor.session():
        handle, request, status = await vendor.look_up(run_id)
    return result_of(vendor, request, status.state, handle, message=status.message, status=status)


async def _vendor(credentials: CensusCredentials | str) -> CensusVendor:
    return CensusVendor(await load_block(CensusCredentials, credentials))


TOOL = Tool("census", "Census", census_check, census_sync, _vendor, meta="census_sync_id")
