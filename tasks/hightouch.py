"""Hightouch tasks: run a sync or a sequence of syncs and wait for its end.

Vendor documentation: https://hightouch.com/docs/developer-tools/api-guide
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from contextlib import AsyncExitStack
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

from blocks.hightouch import HightouchApi, HightouchCredentials, Sync
from blocks.http import NotFoundError
from blocks.reference import NAMED, load_block, stored_block
from tasks.hightouch_jobs import FULL, HightouchRequest, HightouchVendor, sync_problem
from tasks.hightouch_sequences import HightouchSequenceVendor
from tasks.jobs import (
    Checked,
    InputError,
    JobPolicy,
    JobResult,
    PlainRequest,
    Tool,
    ToolParameters,
    refuse_twice,
    result_of,
    run_job,
    tag_run,
    without_traceback,
)

CredentialsRef = Annotated[
    HightouchCredentials | str,
    NAMED,
    # In a form and in a deployment it is the name; instances are for scripts.
    WithJsonSchema({"type": "string", "description": "Name of a saved Hightouch Credentials block."}),
]


class HightouchSync(ToolParameters):
    """A run of one sync, as a flow takes it."""

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


class HightouchSequence(ToolParameters):
    """A run of one sync sequence, as a flow takes it."""

    tool: Literal["hightouch-sequence"] = "hightouch-sequence"
    credentials: CredentialsRef = Field(title="Credentials")
    sequence_id: str = Field(
        title="Sequence ID", pattern=r"^[\w-]+$", description="The id in the sequence's address in Hightouch."
    )
    name: str = Field(
        default="", title="Name", description="For people. Hightouch's API does not tell a sequence's own."
    )
    owner: str | None = Field(default=None, title="Owner", description="Who is told of a failure.")
    policy: JobPolicy = Field(default_factory=JobPolicy, title="Policy")

    @field_validator("sequence_id", mode="before")
    @classmethod
    def _text(cls, value: Any) -> Any:
        return str(value) if isinstance(value, int) and not isinstance(value, bool) else value

    @field_serializer("credentials", mode="wrap")
    def _by_name(
        self, credentials: HightouchCredentials | str, handler: SerializerFunctionWrapHandler
    ) -> Any:
        return stored_block(credentials, HightouchCredentials, handler)

    @property
    def resource_id(self) -> str:
        """The sequence."""
        return self.sequence_id

    @property
    def label(self) -> str:
        """What a person calls it."""
        return self.name or f"sequence {self.sequence_id}"


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
    blocks = await _blocks(syncs, "sync")
    checked: list[Checked[HightouchSync]] = []
    ids: dict[Hashable, set[str]] = defaultdict(set)
    for sync, credentials in zip(syncs, blocks, strict=True):
        ids[credentials.account].add(sync.sync_id)
    async with AsyncExitStack() as clients:
        for sync, credentials in zip(syncs, blocks, strict=True):
            api = await clients.enter_async_context(credentials.api())
            await api.learn(ids.pop(credentials.account, set()))
            found = await _lookup(api, sync.sync_id)
            checked.append(Checked(_named(sync, found), problem=sync_problem(found)))
    return checked


@task(
    name="hightouch-sequence-check",
    task_run_name="check Hightouch sequences",
    tags=["hightouch"],
    cache_policy=NO_CACHE,
)
async def hightouch_sequence_check(sequences: list[HightouchSequence]) -> list[Checked[HightouchSequence]]:
    """Check the sequences of a chain before anything is started, as far as Hightouch's API allows.

    It can't look a sequence up: whether there is one with this id shows when it is started.

    Args:
        sequences: The sequences.

    Returns:
        The same sequences, with names.

    Raises:
        InputError: A sequence is named twice. Nothing was started.
        BlockNotFound: The credentials are the name of a block that is not saved.
        VendorError: Hightouch can't be reached or refuses the key.
    """
    without_traceback()
    blocks = await _blocks(sequences, "sequence")
    for credentials in {block.account: block for block in blocks}.values():
        async with credentials.api() as api:
            await api.greet()
    return [Checked(sequence.model_copy(update={"name": sequence.label})) for sequence in sequences]


async def _blocks(
    requests: Sequence[HightouchSync | HightouchSequence], what: str
) -> list[HightouchCredentials]:
    """The credentials of each; refuses what is asked for twice."""
    blocks = [await load_block(HightouchCredentials, request.credentials) for request in requests]
    accounts = [credentials.account for credentials in blocks]
    ids = [request.resource_id for request in requests]
    refuse_twice(f"Hightouch {what}", zip(accounts, ids, strict=True))
    return blocks


def _run_name(parameter: str) -> Callable[[], str]:
    def name() -> str:
        request = task_run.get_parameters().get(parameter)
        return f"activate {request.label if isinstance(request, HightouchSync | HightouchSequence) else ''}"

    return name


@task(name="hightouch-sync", task_run_name=_run_name("sync"), cache_policy=NO_CACHE)
async def hightouch_sync(sync: HightouchSync) -> JobResult:
    """Run one Hightouch sync and wait for its end.

    Safe to retry: a retry attaches to the run that an earlier attempt started, and one that succeeded is not
    started again. A run that ends with the status `warning` is PARTIAL; by default it passes, with a warning
    in the log, if no more rows were rejected than `policy.max_rows_rejected`. While another run goes on,
    Hightouch queues ours behind it; where `policy.on_active` says otherwise, that run is looked for before
    ours is asked for. Follows `POST /syncs/{id}/trigger` and `GET /syncs/{id}/runs` of Hightouch's API.

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
        operation = FULL if sync.full_resync else "sync"
        alone = sync.policy.on_active != "queue"
        request = HightouchRequest(sync.sync_id, operation, sync.name, sync.owner, alone=alone)
        return await run_job(HightouchVendor(credentials), request, sync.policy)


@task(name="hightouch-sequence", task_run_name=_run_name("sequence"), cache_policy=NO_CACHE)
async def hightouch_sequence(sequence: HightouchSequence) -> JobResult:
    """Run one Hightouch sync sequence and wait for its end.

    Safe to retry: a retry attaches to the run that an earlier attempt started. If the reply to the start was
    lost, that run can't be found: it is an error which says so, and no retry starts a second run. A sequence
    that is done is judged by its syncs: one with the status `warning` makes it PARTIAL, one that failed makes
    it FAILED. A run that was in progress when it was triggered is dealt with as `policy.on_active` says;
    where the workspace queues runs of sequences, ours comes after it whatever the policy says, for Hightouch
    tells of no run but by its id. Follows `POST /sync-sequences/{id}/trigger` and
    `GET /sync-sequences/runs/{id}` of Hightouch's API.

    Args:
        sequence: The sequence, its credentials and its policy (times in seconds).

    Returns:
        Rows sent and rejected over all syncs, and what became of each sync in `streams`.

    Raises:
        InputError: The sequence does not exist. Nothing was started.
        JobFailed, JobCancelled, JobTimeout: The run did not end well; `.result` says how. At a timeout it is
            left running: Hightouch has no way to cancel it.
        VendorError: The API refused, or was out of reach for longer than `policy.outage`, or the reply to the
            start was lost.
    """
    tag_run("hightouch")
    without_traceback()
    credentials = await load_block(HightouchCredentials, sequence.credentials)
    request = PlainRequest(sequence.sequence_id, "sync", sequence.label, sequence.owner)
    return await run_job(HightouchSequenceVendor(credentials), request, sequence.policy)


@task(
    name="hightouch-status",
    task_run_name="status of Hightouch run {run_id}",
    tags=["hightouch"],
    cache_policy=NO_CACHE,
)
async def hightouch_status(credentials: CredentialsRef, sync_id: str, run_id: str) -> JobResult:
    """The present state of a sync's run, whoever started it. Does not wait and does not judge.

    Args:
        credentials: The workspace's credentials, or the name of their block.
        sync_id: The sync; Hightouch finds no run without it.
        run_id: The run.

    Returns:
        Its state may be QUEUED or RUNNING.

    Raises:
        NotFoundError: There is no such sync or run.
        VendorError: The API refused or can't be reached.
    """
    without_traceback()
    vendor = await _vendor(credentials)
    async with vendor.session():
        handle, request, status = await vendor.look_up(sync_id, run_id)
    return result_of(vendor, request, status.state, handle, message=status.message, status=status)


@task(
    name="hightouch-sequence-status",
    task_run_name="status of Hightouch sequence run {run_id}",
    tags=["hightouch"],
    cache_policy=NO_CACHE,
)
async def hightouch_sequence_status(credentials: CredentialsRef, sequence_id: str, run_id: str) -> JobResult:
    """The present state of a sequence's run, whoever started it. Does not wait and does not judge.

    Args:
        credentials: The workspace's credentials, or the name of their block.
        sequence_id: The sequence, for the result and its link; Hightouch does not say which a run is of.
        run_id: The run.

    Returns:
        Its state may be QUEUED or RUNNING; each sync's is in `streams`.

    Raises:
        NotFoundError: There is no such run.
        VendorError: The API refused or can't be reached.
    """
    without_traceback()
    vendor = await _sequence_vendor(credentials)
    async with vendor.session():
        handle, request, status = await vendor.look_up(sequence_id, run_id)
    return result_of(vendor, request, status.state, handle, message=status.message, status=status)


async def _vendor(credentials: HightouchCredentials | str) -> HightouchVendor:
    return HightouchVendor(await load_block(HightouchCredentials, credentials))


async def _sequence_vendor(credentials: HightouchCredentials | str) -> HightouchSequenceVendor:
    return HightouchSequenceVendor(await load_block(HightouchCredentials, credentials))


TOOL = Tool("hightouch", "Hightouch", hightouch_check, hightouch_sync, _vendor, meta="hightouch_sync_id")
SEQUENCE_TOOL = Tool(
    "hightouch-sequence",
    "Hightouch sequence",
    hightouch_sequence_check,
    hightouch_sequence,
    _sequence_vendor,
    meta="hightouch_sequence_id",
)
