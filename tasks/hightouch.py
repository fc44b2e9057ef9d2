"""Hightouch tasks: run a sync and wait for its end.

Vendor documentation: https://hightouch.com/docs/developer-tools/api-guide
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Hashable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

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

from blocks.hightouch import HightouchApi, HightouchCredentials, Sync, SyncRun
from blocks.http import NotFoundError, VendorError
from blocks.reference import block_name, load_block, stored_block
from tasks.jobs import (
    Checked,
    InputError,
    Intent,
    JobHandle,
    JobPolicy,
    JobRequest,
    JobResult,
    JobState,
    JobStatus,
    Tool,
    run_job,
    tag_run,
    tool_required,
    without_traceback,
)

_STATES = {
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

CredentialsRef = Annotated[
    HightouchCredentials | str,
    # In a form and in a deployment it is the name; instances are for scripts.
    WithJsonSchema({"type": "string", "description": "Name of a saved Hightouch Credentials block."}),
]


class HightouchSync(BaseModel):
    """A run of one sync, as a flow takes it."""

    # pydantic's errors quote what they were given, and credentials may be given with their key.
    model_config = ConfigDict(
        frozen=True, extra="forbid", hide_input_in_errors=True, json_schema_extra=tool_required
    )

    tool: Literal["hightouch"] = "hightouch"
    credentials: CredentialsRef = Field(title="Credentials")
    sync_id: str = Field(
        title="Sync ID", pattern=r"^\d+$", description="The number in the sync's address in Hightouch."
    )
    name: str = Field(default="", title="Name", description="For people; the sync's slug by default.")
    owner: str | None = Field(
        default=None, title="Owner", description="Who is told of a failure; by default the tag `owner`."
    )
    full_resync: bool = Field(default=False, title="Full resync", description="Send all rows anew.")
    policy: JobPolicy = Field(default_factory=JobPolicy, title="Policy")

    @field_validator("sync_id", mode="before")
    @classmethod
    def _text(cls, value: Any) -> Any:
        return str(value) if isinstance(value, int) else value

    @field_serializer("credentials", mode="wrap")
    def _by_name(
        self, credentials: HightouchCredentials | str, handler: SerializerFunctionWrapHandler
    ) -> Any:
        # What is stored with a flow run must work in a retry of it, and hold no secret.
        return stored_block(credentials, HightouchCredentials, handler)

    @property
    def resource_id(self) -> str:
        """The sync."""
        return self.sync_id

    @property
    def label(self) -> str:
        """What a person calls it."""
        return self.name or self.sync_id


@dataclass(frozen=True)
class _Request:
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

    async def baseline(self, request: _Request) -> None:
        """Nothing: a run has an id."""

    async def start(self, request: _Request, intent: Intent) -> JobHandle:
        """`POST /syncs/{id}/trigger`. While a run is in progress, ours is queued behind it by Hightouch."""
        async with self._credentials.api() as api:
            sync = await api.sync(request.resource_id)
            if sync.disabled:  # as far as we remember
                sync = await api.sync(request.resource_id, fresh=True)
            if problem := _problem(sync):
                raise InputError(problem)
            run_id = await api.trigger(request.resource_id, full_resync=request.full_resync)
            return self._handle(sync, run_id, api.theirs(datetime.now(UTC)), intent.marker)

    async def find(self, request: JobRequest, intent: Intent) -> JobHandle | None:
        """The sync's first run that was created since then."""
        async with self._credentials.api() as api:
            runs = await api.runs(request.resource_id, retry=False)
            since = api.theirs(intent.since)
            ours = [run for run in runs if run.created_at >= since and run.id not in intent.known]
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
        state = _STATES.get(run.status) if run else None
        return state if state and state.terminal else None

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
    return handle.job_id, _status(run) if run else None


def _moves(sync: Sync) -> bool:
    """Whether a run is under way; `disabled` and the like say nothing about that."""
    state = _STATES.get(sync.status or "")
    return state is not None and not state.terminal


def _same(sync: Sync, other: Sync | None) -> bool:
    return other is not None and (sync.status, sync.last_run_at) == (other.status, other.last_run_at)


def _status(run: SyncRun) -> JobStatus:
    state = _STATES.get(run.status)
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
    if error:
        return str(error)[:500]
    if state is JobState.PARTIAL:
        return f"{run.failed.total if run.failed else 'some'} rows were rejected"
    if state is JobState.CANCELLED:
        return "it was cancelled in Hightouch"
    return f"Hightouch says {run.status}" if state is JobState.FAILED else None


def _problem(sync: Sync) -> str | None:
    """Why a sync can't be run now."""
    if not sync.disabled:
        return None
    return (
        f"Hightouch sync {sync.slug or sync.id} ({sync.id}) is disabled. Enable it in Hightouch, or take "
        "it out of the list; nothing was started for it."
    )


def _named(sync: HightouchSync, found: Sync) -> HightouchSync:
    return sync.model_copy(
        update={"name": sync.name or found.slug or found.id, "owner": sync.owner or found.owner}
    )


async def _lookup(api: HightouchApi, sync_id: str) -> Sync:
    try:
        return await api.sync(sync_id)
    except NotFoundError as error:
        raise InputError(
            f"Hightouch knows no sync {sync_id}, or this API key may not see it. Nothing was started."
        ) from error


@task(
    name="hightouch-check", task_run_name="check Hightouch syncs", tags=["hightouch"], cache_policy=NO_CACHE
)
async def hightouch_check(syncs: list[HightouchSync]) -> list[Checked[HightouchSync]]:
    """Look up the syncs of a chain before anything is started.

    Args:
        syncs: The syncs.

    Returns:
        The same syncs with names and owners filled in. A disabled sync carries its `problem`.

    Raises:
        InputError: A sync does not exist or is named twice. Nothing was started.
        BlockNotFound: The credentials are the name of a block that is not saved.
        VendorError: Hightouch can't be reached or refuses the key.
    """
    without_traceback()
    checked: list[Checked[HightouchSync]] = []
    seen: set[tuple[Hashable, str]] = set()
    for sync in syncs:
        credentials = await load_block(HightouchCredentials, sync.credentials)
        if (credentials.account, sync.sync_id) in seen:
            raise InputError(f"Hightouch sync {sync.sync_id} is listed more than once. Nothing was started.")
        seen.add((credentials.account, sync.sync_id))
        async with credentials.api() as api:
            found = await _lookup(api, sync.sync_id)
        checked.append(Checked(_named(sync, found), problem=_problem(found)))
    return checked


def _run_name() -> str:
    sync = task_run.get_parameters().get("sync")
    return f"activate {sync.label if isinstance(sync, HightouchSync) else ''}"


@task(name="hightouch-sync", task_run_name=_run_name, cache_policy=NO_CACHE)
async def hightouch_sync(sync: HightouchSync) -> JobResult:
    """Run one Hightouch sync and wait for its end.

    Safe to retry: a retry attaches to the run that an earlier attempt started, and one that succeeded is not
    started again. A run that ends with the status `warning` is PARTIAL; by default it passes, with a warning
    in the log. Follows `POST /syncs/{id}/trigger` and `GET /syncs/{id}/runs` of Hightouch's API.

    Args:
        sync: The sync, its credentials and its policy (times in seconds).

    Returns:
        Rows sent and rejected, the duration in seconds and the run's link. Hightouch counts no bytes.

    Raises:
        InputError: The sync does not exist or is disabled. Nothing was started.
        JobFailed, JobCancelled, JobTimeout: The run did not end well; `.result` says how. At a timeout it is
            left running: Hightouch has no way to cancel it.
        VendorError: The API refused, or was out of reach for longer than `policy.outage`.
    """
    tag_run("hightouch")
    without_traceback()
    credentials = await load_block(HightouchCredentials, sync.credentials)
    async with credentials.api() as api:
        sync = _named(sync, await _lookup(api, sync.sync_id))
        request = _Request(sync.sync_id, "sync", sync.name, sync.owner, sync.full_resync)
        return await run_job(HightouchVendor(credentials), request, sync.policy)


async def _vendor(block: str) -> HightouchVendor:
    return HightouchVendor(await load_block(HightouchCredentials, block))


TOOL = Tool("hightouch", "Hightouch", hightouch_check, hightouch_sync, _vendor, meta="hightouch_sync_id")
