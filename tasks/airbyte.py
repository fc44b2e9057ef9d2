"""Airbyte tasks: sync, clear, refresh, wait for a job started elsewhere, cancel.

All of them work over the public API and over the Config API of self-managed servers.

Vendor documentation: https://reference.airbyte.com/reference/getting-started
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.runtime import task_run

from blocks.airbyte import AirbyteServer
from blocks.airbyte_model import RefreshMode, Stream
from blocks.http import NotFoundError
from blocks.reference import load_block
from tasks.airbyte_check import airbyte_check, named, refuse_uncounted, streams_of
from tasks.airbyte_jobs import AirbyteRequest, AirbyteVendor
from tasks.airbyte_model import AirbyteConnections, AirbyteSync, ServerRef
from tasks.fresh import tell_fresh
from tasks.jobs import (
    InputError,
    JobPolicy,
    JobResult,
    JobState,
    Tool,
    cancel_job,
    run_job,
    tag_run,
    wait_for_job,
    without_traceback,
)

__all__ = [
    "TOOL",
    "AirbyteConnections",
    "AirbyteSync",
    "AirbyteVendor",
    "airbyte_cancel",
    "airbyte_check",
    "airbyte_clear",
    "airbyte_refresh",
    "airbyte_status",
    "airbyte_sync",
    "airbyte_wait",
]


_EMPTYING = ("clear", "reset")


def _run_name(verb: str) -> Any:
    def name() -> str:
        parameters = task_run.get_parameters()
        sync = parameters.get("sync")
        return f"{verb} {sync.label if isinstance(sync, AirbyteSync) else parameters.get('job_id')}"

    return name


async def _vendor(server: AirbyteServer | str) -> AirbyteVendor:
    without_traceback()
    return AirbyteVendor(await load_block(AirbyteServer, server))


async def _run(
    sync: AirbyteSync, operation: str, *, mode: RefreshMode = "Merge", streams: Sequence[str] = ()
) -> JobResult:
    tag_run("airbyte")
    server = await load_block(AirbyteServer, sync.server)
    if operation not in _EMPTYING:
        refuse_uncounted(server, sync)
    vendor = await _vendor(server)
    async with vendor.session():
        try:
            connection = await vendor.connection(sync.connection_id)
        except NotFoundError as error:
            raise InputError(
                f"Airbyte knows no connection {sync.connection_id}, or these credentials may not see it. "
                "Nothing was started."
            ) from error
        sync = named(sync, connection)
        if operation == "sync" and sync.before:
            # A job of its own in the journal: whatever happens in between, a retry does not do it again.
            cleared = await _job(vendor, sync, sync.before, streams=streams_of(connection, sync.streams))
            if cleared.state is JobState.SKIPPED:
                return cleared
        result = await _job(vendor, sync, operation, mode=mode, streams=streams_of(connection, streams))
    return result if operation in _EMPTYING else tell_fresh(result)


async def _job(
    vendor: AirbyteVendor,
    sync: AirbyteSync,
    operation: str,
    *,
    mode: RefreshMode = "Merge",
    streams: tuple[Stream, ...] = (),
) -> JobResult:
    name, policy = sync.name, sync.policy
    if operation != "sync":
        name = f"{operation} {name}"
    if operation in _EMPTYING:
        policy = policy.model_copy(update={"min_rows": None, "max_rows_rejected": None})  # it moves no rows
    request = AirbyteRequest(sync.connection_id, operation, name, sync.owner, mode, streams)
    return await run_job(vendor, request, policy)


@task(name="airbyte-sync", task_run_name=_run_name("sync"), cache_policy=NO_CACHE)
async def airbyte_sync(sync: AirbyteSync) -> JobResult:
    """Sync one connection and wait for its end.

    Safe to retry: a retry attaches to the job that an earlier attempt started, and one that succeeded is not
    started again. With `before`, what was loaded (of `streams`, if any are named) is deleted first, by a job
    of its own that must succeed; it has its own `policy.timeout`. A sync that is running is not
    cancelled for it: `policy.on_active` holds for the clear, too. Each of the two is done once, however often
    the run is retried.

    Follows `POST /jobs` and `GET /jobs` of the public API, or `POST /v1/connections/sync` and
    `/v1/jobs/get_without_logs` of the Config API.

    Args:
        sync: The connection, its server and its policy (times in seconds).

    Returns:
        Rows and bytes committed, the duration in seconds and the job's link. Attempts, rejected rows, what
        became of each stream and why it failed are asked of a self-managed server's Config API, whichever
        API the block names. Airbyte Cloud has none: a job of which only a part landed is a success there.

    Raises:
        InputError: The connection does not exist or is not active, or `policy.max_rows_rejected` is set for
            Airbyte Cloud, which does not count them. Nothing was started.
        JobFailed, JobCancelled, JobTimeout: The job did not end well; `.result` says how.
        VendorError: The API refused, or was out of reach for longer than `policy.outage`.
    """
    return await _run(sync, "sync")


@task(name="airbyte-clear", task_run_name=_run_name("clear"), cache_policy=NO_CACHE)
async def airbyte_clear(sync: AirbyteSync, *, reset: bool = False) -> JobResult:
    """Delete what a connection has loaded, and its state, so that its next sync loads everything anew.

    It is not followed by a sync: run one yourself. Airbyte would cancel a sync that is running, so that
    one is looked for and dealt with as `policy.on_active` says; what would adopt it waits for it instead.

    Args:
        sync: The connection, its server and its policy.
        reset: Send the older job type `reset`, which needs a lesser role than `clear`.

    Returns:
        As `airbyte_sync`.

    Raises:
        InputError, JobFailed, JobCancelled, JobTimeout, VendorError: As `airbyte_sync`.
    """
    return await _run(sync, "reset" if reset else "clear")


@task(name="airbyte-refresh", task_run_name=_run_name("refresh"), cache_policy=NO_CACHE)
async def airbyte_refresh(
    sync: AirbyteSync, *, mode: RefreshMode = "Merge", streams: Sequence[str] = ()
) -> JobResult:
    """Load a connection's streams anew from the source, without its data being away in between.

    Only self-managed servers can do it by API: the job is started through their Config API, also where the
    block uses the public one. Follows `POST /v1/connections/refresh`.

    Args:
        sync: The connection, its server and its policy; `before` is not applied.
        mode: `Merge` keeps what was loaded beside what is loaded now; `Truncate` replaces it in the end.
        streams: Names of streams; empty for all of them.

    Returns:
        As `airbyte_sync`.

    Raises:
        InputError: The connection or a stream does not exist, it is not active, or it is in Airbyte Cloud.
            Nothing was started.
        NotFoundError: The server is too old, or has no Config API.
        JobFailed, JobCancelled, JobTimeout, VendorError: As `airbyte_sync`.
    """
    return await _run(sync, "refresh", mode=mode, streams=streams)


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
        return (await cancel_job(vendor, handle)).words


TOOL = Tool(
    "airbyte",
    "Airbyte",
    airbyte_check,
    airbyte_sync,
    _vendor,
    meta="airbyte_connection_id",
    selections=("airbyte-connections",),
)
