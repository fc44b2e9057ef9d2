"""dbt Cloud tasks: look a job up, run it without what is late, take a failed run up where it broke.

The same two tasks as dbt Core's, so that a chain takes either: a plan from the job's latest manifest, a build
with every node's result. Blocks: prefect-dbt's dbt Cloud Credentials.

Vendor documentation: https://docs.getdbt.com/dbt-cloud/api-v2
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from prefect import task
from prefect.cache_policies import INPUTS, NO_CACHE, RUN_ID
from prefect.logging import get_run_logger
from prefect.runtime import flow_run, task_run

from blocks.dbtcloud import CredentialsRef, DbtCloudApi, api_of, load_credentials
from blocks.dbtcloud_model import Job, Overrides, Run
from blocks.http import NotFoundError
from tasks.dbt.lineage import Lineage
from tasks.dbt.model import DbtBuildFailed, DbtError, DbtPlan, DbtResult, DbtState
from tasks.dbt_cloud_model import DbtCloud
from tasks.dbt_cloud_results import MANIFEST, outcome_of, show, why_it_broke
from tasks.dbt_cloud_runs import DbtCloudVendor, RunRequest, status_of
from tasks.dbt_cloud_steps import Project, add_vars, command_of, has_selection, leave_out
from tasks.jobs import (
    InputError,
    JobFailed,
    JobResult,
    JobState,
    run_job,
    without_traceback,
)
from tasks.jobs.journal import current_journal, entry_key

__all__ = [
    "DbtCloud",
    "Overrides",
    "dbt_cloud_build",
    "dbt_cloud_plan",
    "dbt_cloud_retry",
    "dbt_cloud_status",
    "dbt_cloud_vendor",
]

_NOT_RETRIED = {
    "RETRY_UNSUPPORTED_CMD": "the command that failed can't be retried",
    "RETRY_UNSUPPORTED_VERSION": "its version of dbt can't retry",
    "RETRY_NOT_LATEST_RUN": "it is not the job's latest run",
    "RETRY_NOT_FAILED_RUN": "it did not fail",
    "RETRY_NO_RUN_RESULTS": "it left no run results",
}


def _run_name(verb: str) -> Any:
    def name() -> str:
        dbt = task_run.get_parameters().get("dbt")
        return f"{verb}{dbt.what if isinstance(dbt, DbtCloud) else 'dbt Cloud job'}"

    return name


@task(name="check dbt Cloud job", task_run_name=_run_name("check "), tags=["dbt"], cache_policy=NO_CACHE)
async def dbt_cloud_plan(dbt: DbtCloud) -> DbtPlan:
    """Looks a job up before anything is started: what it would run, and the lineage of its project.

    Both are from the manifest that the job's latest run left. Words of the steps' selections that can't be
    judged here (state, selectors, configurations) count as everything.

    Args:
        dbt: The job.

    Returns:
        The nodes and the lineage. Empty for a job that has no manifest yet: nothing is known then about what
        is built on what, and a chain in which a connection fails holds all back.

    Raises:
        InputError: There is no such job, it is deleted, or it runs no command of dbt's.
        DbtError: A step can't be read.
        BlockNotFound: The credentials are the name of a block that is not saved.
        VendorError: dbt Cloud can't be reached or refuses the key.
    """
    without_traceback()
    credentials = await load_credentials(dbt.credentials)
    async with api_of(credentials) as api:
        job = await _lookup(api, dbt)
        steps = _steps(dbt, job)
        add_vars(steps, dbt.vars, dbt.data_interval)  # that it can't be is said before anything is started
        target = dbt.overrides.target_name_override or (job.settings.target_name if job.settings else None)
        project = await _project(api, dbt)
    if project is None:
        get_run_logger().warning(
            "%s has left no manifest yet, so it is not known what it builds on which source. If a connection "
            "does not land, everything is held back.",
            dbt.what,
        )
        name = job.name or dbt.label
        return DbtPlan(project=name, adapter="", target=target, selected=[], lineage=Lineage({}))
    return DbtPlan(
        project=project.name or job.name,
        adapter=project.adapter,
        target=target,
        selected=project.selected(steps),
        lineage=project.lineage,
    )


@task(
    name="dbt Cloud build",
    task_run_name=_run_name(""),
    tags=["dbt"],
    persist_result=True,
    # Not the task's source: a fix to this file between a run and its retry must not build everything again.
    cache_policy=INPUTS + RUN_ID,
)
async def dbt_cloud_build(dbt: DbtCloud, exclude: Sequence[str] = ()) -> DbtResult:
    """Runs a dbt Cloud job, waits for its end and tells about every node.

    Safe to retry: a retry attaches to the run that an earlier attempt started, and one that succeeded is not
    started again. In dbt Cloud's list of runs the cause names this flow run. When the task is cancelled, or
    `dbt.policy.timeout` is over, the run is cancelled. Follows `POST /jobs/{id}/run/` of the Administrative
    API v2.

    Args:
        dbt: The job, its credentials and its policy (times in seconds).
        exclude: What to leave out, in dbt's selection syntax, such as `source:raw_weather.weather+`: added as
            `--exclude` to each of the job's commands that runs nodes.

    Returns:
        Every node with state, message, rows and seconds, and the run's link.

    Raises:
        DbtBuildFailed: Some nodes failed; `.result` has all of them.
        DbtError: The run failed without a failed node (with the last of what dbt printed), or a command can't
            leave out what it must; then nothing was started.
        JobCancelled, JobTimeout, JobFailed: Somebody cancelled it, it did not end in time, or another run was
            active and the policy says fail.
        InputError: There is no such job. Nothing was started.
        VendorError: The API refused, or was out of reach for longer than `policy.outage`.
    """
    without_traceback()
    credentials = await load_credentials(dbt.credentials)
    async with api_of(credentials) as api:
        job = await _lookup(api, dbt)
        overrides = dbt.overrides
        if exclude or dbt.changes_steps:
            steps = await _without_late(api, dbt, job, sorted(set(exclude))) if exclude else _steps(dbt, job)
            steps = add_vars(steps, dbt.vars, dbt.data_interval)
            overrides = overrides.model_copy(update={"steps_override": steps})
        vendor = DbtCloudVendor(credentials)
        request = RunRequest(
            resource_id=dbt.job_id,
            name=dbt.name or job.name or dbt.job_id,
            owner=dbt.owner,
            cause=_cause(dbt),
            overrides=overrides,
            retries=await _taken_up(api, vendor, dbt, overrides) if dbt.retry_from_failure else None,
            alone=dbt.policy.on_active != "queue",
        )
        return await _build(api, vendor, request, dbt)


@task(
    name="dbt Cloud retry",
    task_run_name=_run_name("retry "),
    tags=["dbt"],
    persist_result=True,
    cache_policy=INPUTS + RUN_ID,
)
async def dbt_cloud_retry(dbt: DbtCloud, run_id: str) -> DbtResult:
    """Takes a failed run of a job up where it broke, and waits for the end of that.

    dbt Cloud takes no overrides for this, also not those of the failed run; its cause can't be set either.
    Follows `POST /runs/{id}/retry/`.

    Args:
        dbt: The job, its credentials and its policy; its overrides do not count.
        run_id: The run that failed.

    Returns:
        Every node of both runs, in its later state.

    Raises:
        InputError: The run is none of this job, or dbt Cloud can't retry it, for the reason that is said.
        Exception: Otherwise as `dbt_cloud_build`.
    """
    without_traceback()
    credentials = await load_credentials(dbt.credentials)
    async with api_of(credentials) as api:
        job = await _lookup(api, dbt)
        vendor = DbtCloudVendor(credentials)
        if not await _begun(vendor, run_id, dbt.job_id):
            run = await _run_of(api, dbt, run_id)
            if why := _why_no_retry(run):
                raise InputError(f"dbt Cloud run {run_id} can't be retried: {why}. Nothing was started.")
            _say_ignored(dbt, run)
        request = RunRequest(
            resource_id=dbt.job_id,
            name=dbt.name or job.name or dbt.job_id,
            owner=dbt.owner,
            retries=int(run_id),
            alone=dbt.policy.on_active != "queue",
        )
        return await _build(api, vendor, request, dbt)


@task(name="dbt Cloud status", task_run_name="dbt Cloud run {run_id}", tags=["dbt"], cache_policy=NO_CACHE)
async def dbt_cloud_status(credentials: CredentialsRef, run_id: str) -> JobResult:
    """The present state of a run, whoever started it. Does not wait and does not judge.

    Returns:
        Its state may be QUEUED or RUNNING.

    Raises:
        NotFoundError: There is no such run, or it is not visible yet.
        VendorError: The API refused or can't be reached.
    """
    vendor = DbtCloudVendor(await load_credentials(credentials))
    async with api_of(await load_credentials(credentials)) as api:
        run = await api.run(run_id, related=["job"])
        handle = vendor.handle(api, run, str(run.job_definition_id or ""))
    return JobResult(
        vendor=vendor.name,
        resource_id=handle.resource_id,
        name=(run.job.name if run.job else "") or handle.resource_id,
        job_id=handle.job_id,
        url=handle.url,
        **status_of(run).model_dump(exclude={"word", "known"}),
    )


async def dbt_cloud_vendor(block: str) -> DbtCloudVendor:
    """The vendor of a saved block, for a hook in another process."""
    return DbtCloudVendor(await load_credentials(block))


async def _build(api: DbtCloudApi, vendor: DbtCloudVendor, request: RunRequest, dbt: DbtCloud) -> DbtResult:
    """Run it, and tell what became of each node, also when it failed."""
    logger = get_run_logger()
    failed: JobFailed | None = None
    try:
        ended = await run_job(vendor, request, dbt.policy)
    except JobFailed as error:
        failed, ended = error, error.result
    if ended.job_id is None:
        raise failed or DbtError(ended.sentence())
    outcome = await outcome_of(api, ended.job_id)
    if failed and not status_of(outcome.run).state.terminal:
        raise failed  # it is not ours: another run was active, and the policy says fail
    await show(outcome.nodes)
    result = DbtResult.from_nodes(
        outcome.nodes, command=dbt.what, duration=ended.duration or 0.0, invocation_id=outcome.invocation_id
    ).model_copy(update={"url": ended.url})
    if result.failed:
        raise DbtBuildFailed(result)
    if failed:
        why = await why_it_broke(api, outcome.run)
        raise DbtError(f"{dbt.what}: {why}. {ended.url or ''}".strip())
    if not outcome.nodes:
        message = "it succeeded, and left no run results"
        result = result.model_copy(update={"state": DbtState.SUCCESS, "message": message})
    took = timedelta(seconds=round(result.duration))
    logger.info("%s: %s in %s. %s", dbt.what, result.message, took, result.url or "")
    return result


async def _lookup(api: DbtCloudApi, dbt: DbtCloud) -> Job:
    try:
        job = await api.job(dbt.job_id)
    except NotFoundError as error:
        raise InputError(
            f"dbt Cloud knows no job {dbt.job_id}, or this key may not see it. Nothing was started."
        ) from error
    if job.deleted:
        raise InputError(f"dbt Cloud job {job.name!r} ({dbt.job_id}) is deleted. Nothing was started.")
    return job


def _steps(dbt: DbtCloud, job: Job) -> list[str]:
    """The commands that a run of the job executes."""
    steps = dbt.overrides.steps_override or job.execute_steps or []
    if not any(command_of(step) for step in steps):
        raise InputError(f"{dbt.what} has no dbt command to run: {steps or 'no step at all'}.")
    return steps


async def _project(api: DbtCloudApi, dbt: DbtCloud) -> Project | None:
    content = await api.job_artifact(dbt.job_id, MANIFEST)
    if content is None:
        return None
    try:
        return await asyncio.to_thread(Project.read, content)
    except ValueError as error:
        raise DbtError(f"The manifest of {dbt.what} can't be read: {error}.") from error


async def _without_late(api: DbtCloudApi, dbt: DbtCloud, job: Job, exclude: Sequence[str]) -> list[str]:
    steps = leave_out(_steps(dbt, job), exclude)
    project = await _project(api, dbt)
    if project is not None and project.default_selector and not all(map(has_selection, steps)):
        # dbt drops a default selector as soon as there is an --exclude, and would build more than the job.
        raise DbtError(
            f"{dbt.what} can't leave out late data ({' '.join(exclude)}): its project has a default "
            "selector, which dbt ignores beside --exclude. Give its steps a --select."
        )
    return steps


def _cause(dbt: DbtCloud) -> str:
    ours = f"Prefect flow run {flow_run.name} ({flow_run.id})" if flow_run.id else "Prefect"
    return f"{dbt.cause}, {ours}" if dbt.cause else ours


async def _begun(vendor: DbtCloudVendor, run_id: str | int, job_id: str) -> bool:
    """Whether this flow run has begun to retry a run already: the engine then attaches to that."""
    entry = await current_journal().entry(entry_key(vendor.name, f"retry-{run_id}", job_id, vendor.block))
    return entry is not None and (entry.open or bool(entry.result and entry.result.good))


async def _taken_up(
    api: DbtCloudApi, vendor: DbtCloudVendor, dbt: DbtCloud, overrides: Overrides
) -> int | None:
    """The run of an earlier attempt of this flow run that is to be taken up where it broke, if any.

    Only of this flow run: a scheduled run that begins anew runs the whole job.
    """
    ids = sorted(int(job_id) for job_id in await current_journal().job_ids(vendor.name, dbt.job_id))
    for run_id in reversed(ids):
        if await _begun(vendor, run_id, dbt.job_id):
            return run_id
    if not ids:
        return None
    run = await _run_of(api, dbt, str(ids[-1]))
    if status_of(run).state is not JobState.FAILED:
        return None
    why = _why_no_retry(run)
    if overrides.given or (run.trigger and run.trigger.overridden):
        why = why or "dbt Cloud ignores in a retry what is left out of it or overridden"
    if why:
        get_run_logger().warning("%s: the whole job runs again, because %s", dbt.what, why)
        return None
    return run.id


async def _run_of(api: DbtCloudApi, dbt: DbtCloud, run_id: str) -> Run:
    try:
        run = await api.run(run_id, related=["trigger"])
    except NotFoundError as error:
        raise InputError(f"dbt Cloud knows no run {run_id}. Nothing was started.") from error
    if str(run.job_definition_id) != dbt.job_id:
        raise InputError(
            f"dbt Cloud run {run_id} is of job {run.job_definition_id} and not of {dbt.job_id}. "
            "Nothing was started."
        )
    return run


def _why_no_retry(run: Run) -> str | None:
    reason = run.retry_not_supported_reason
    if run.can_retry and not reason:
        return None
    return _NOT_RETRIED.get(reason or "", reason or "dbt Cloud does not say why")


def _say_ignored(dbt: DbtCloud, run: Run) -> None:
    given = {**dbt.overrides.given, **(run.trigger.overridden if run.trigger else {})}
    if given:
        get_run_logger().warning("%s: a retry ignores overrides (%s)", dbt.what, ", ".join(sorted(given)))
