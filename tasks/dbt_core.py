"""dbt Core as Prefect tasks: a build with every node live in the UI, and a check before anything is started.

dbt runs as a child process that reports what happens node by node; see `tasks/dbt/child.py` for why that and
not `prefect-dbt`'s runner, which stays available as `engine="prefect-dbt"`. From `prefect-dbt` come the
profiles with Prefect blocks and variables in them.

    plan = await check_dbt(dbt)  # a clear sentence if project, profile or selection is wrong
    result = await dbt_build(dbt, exclude=plan.lineage.exclude_selectors(late_sources))
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect import task
from prefect.cache_policies import INPUTS, NO_CACHE, RUN_ID
from prefect.client.schemas.objects import State
from prefect.logging import get_run_logger
from prefect.runtime import task_run

from tasks.dbt.build import Build
from tasks.dbt.checks import check_end, locked, look_at, nothing_selected, nothing_to_look_at
from tasks.dbt.freshness import Freshness, FreshnessCheck, SourceAge, SourcesStale
from tasks.dbt.invocation import command_line, read_lineage, runs_kind
from tasks.dbt.lineage import Lineage, LineageNode
from tasks.dbt.memory import BuildRecord, build_id, earlier_attempt, new_record, read_records
from tasks.dbt.model import (
    COMMAND_TYPES,
    DbtBuildFailed,
    DbtCore,
    DbtError,
    DbtInputError,
    DbtNode,
    DbtPlan,
    DbtResult,
    DbtState,
    DbtTimeout,
    one_line,
)
from tasks.dbt.packages import install_packages
from tasks.dbt.process import DbtProcess, surroundings
from tasks.environment import prefix_here

__all__ = [
    "DbtBuildFailed",
    "DbtCore",
    "DbtError",
    "DbtInputError",
    "DbtNode",
    "DbtPlan",
    "DbtResult",
    "DbtState",
    "DbtTimeout",
    "Freshness",
    "Lineage",
    "LineageNode",
    "SourceAge",
    "SourcesStale",
    "check_dbt",
    "dbt_build",
    "dbt_freshness",
    "dbt_plan",
    "dbt_previous",
]


async def _may_help(_task: Any, _run: Any, state: State[Any]) -> bool:
    """Whether a retry may help: not where project, profile or selection is wrong."""
    return not isinstance(state.data, DbtInputError)


def _run_name() -> str:
    dbt = task_run.parameters.get("dbt")
    return dbt.what if isinstance(dbt, DbtCore) else "dbt"


@task(
    name="dbt build",
    task_run_name=_run_name,
    tags=["dbt"],
    persist_result=True,
    # Not the task's source: a fix to this file between a run and its retry must not build everything again.
    cache_policy=INPUTS + RUN_ID,
    retry_condition_fn=_may_help,
)
async def dbt_build(
    dbt: DbtCore,
    exclude: Sequence[str] = (),
    retry_of: UUID | None = None,
    parsed: Path | None = None,
) -> DbtResult:
    """Runs dbt and shows every node as a task run of its own, with dbt's and the database's own words.

    A retry of the same flow run with the same arguments does not run dbt again once it has succeeded. If it
    failed, was cancelled or killed, the retry does what is left: what failed, what was skipped, what was not
    known to be done. What is done is kept in the Prefect API (see `tasks/dbt/memory.py`), so it may go on
    with another checkout on another machine. To retry the step inside the flow run:
    `dbt_build.with_options(**dbt.task_options)`.

    When the task is cancelled, or `dbt.timeout` is over, dbt is interrupted (which makes it cancel its
    queries), then terminated, then killed, within 6 seconds. When this process dies, dbt notices and stops
    too.

    Args:
        dbt: The project and what to run of it.
        exclude: What else to leave out, in dbt's selection syntax, such as `source:raw_weather.weather+`.
            Unlike dbt's own --exclude it holds beside a selector too.
        retry_of: A flow run whose last dbt build, the same as this, is to be taken up where it failed.
        parsed: A `partial_parse.msgpack` of this project to be taken as it is, if it is there. dbt itself
            parses everything anew as soon as a variable has another value.

    Returns:
        Every node with state, message, rows and seconds. State `skipped` if `exclude` left nothing to do.

    Raises:
        DbtBuildFailed: dbt ran and some nodes failed; `.result` has all of them.
        DbtTimeout: It took longer than `dbt.timeout`.
        DbtError: dbt could not run at all, or the selection matches nothing.
    """
    logger = get_run_logger()
    project = await asyncio.to_thread(look_at, dbt)
    await install_packages(dbt)
    if said := dbt.options_in_environment:
        message = "dbt takes options from the environment: %s. They change what is built, or how."
        logger.warning(message, ", ".join(said))
    excluded = sorted(set(exclude))
    if dbt.engine == "prefect-dbt":
        from tasks.dbt.in_process import run_in_process

        result = await run_in_process(dbt, excluded)
    else:
        record = new_record(dbt, project, excluded, build_id(dbt, project, excluded, retry_of))
        earlier = await earlier_attempt(record)
        if earlier is None and retry_of is not None:
            earlier = await _last_build(retry_of)
        result = await Build(dbt, excluded, record, earlier, parsed).run()
    if not result.nodes and not excluded:
        raise DbtInputError(nothing_selected(dbt))
    if result.failed:
        raise DbtBuildFailed(result)
    logger.info("%s: %s in %.1f s", result.command, result.message, result.duration)
    return result


@task(
    name="look for the dbt build", task_run_name="look for the dbt build", tags=["dbt"], cache_policy=NO_CACHE
)
async def dbt_previous(dbt: DbtCore, flow_run_id: UUID) -> BuildRecord:
    """Looks up the last dbt build of a flow run, to be taken up where it failed.

    Args:
        dbt: The project, as it is to be run now.
        flow_run_id: The flow run.

    Returns:
        What was asked for then, and how every node ended: `.apply(dbt)` and `.left_out` are what `dbt_build`
        shall get, with the same flow run.

    Raises:
        DbtInputError: It has no dbt build, or one of another project, or can't be taken up with this engine.
    """
    if dbt.engine != "subprocess":
        raise DbtInputError("Only with engine='subprocess' can a build be taken up where it failed.")
    project = await asyncio.to_thread(look_at, dbt)
    found = await _last_build(flow_run_id)
    if found.project != project:
        raise DbtInputError(
            f"Flow run {flow_run_id} built the dbt project {found.project!r},"
            f" and {dbt.project} is {project!r}."
        )
    return found


async def _last_build(flow_run_id: UUID) -> BuildRecord:
    found = await read_records(flow_run_id)
    if not found:
        raise DbtInputError(
            f"Flow run {flow_run_id} has no dbt build that could be retried: there is no such run, or it did"
            " not come to build a node, or it has been deleted."
        )
    # It may have been another schema, or another warehouse: what was done there is not done here.
    there, here = found[0].environment, prefix_here()
    if there not in (None, here):
        raise DbtInputError(
            f"Flow run {flow_run_id} built in another environment (its prefix is {there!r}, here it is"
            f" {here!r}): retry it by a deployment of that environment."
        )
    return found[0]


@task(
    name="dbt source freshness",
    task_run_name="dbt source freshness",
    tags=["dbt"],
    cache_policy=NO_CACHE,
    retry_condition_fn=_may_help,
)
async def dbt_freshness(dbt: DbtCore, may_have_none: bool = False) -> Freshness:
    """Looks how old the data of the sources is; each source is a task run.

    The thresholds are those of the dbt project (`warn_after`, `error_after`); what has none is not looked at.
    Of `dbt` the selection counts; its command, retries and full_refresh do not.

    Args:
        dbt: The project, and which of its sources.
        may_have_none: Whether it is fine that nothing of the whole project has a threshold, as it is for
            dbt itself. What is selected has to have one.

    Returns:
        Every source with its age. State `warn` if one of them is past its warning threshold, `skipped` if
        there was nothing to look at.

    Raises:
        SourcesStale: One is past its error threshold, or can't be looked at; `.result` has all of them.
        DbtTimeout: It took longer than `dbt.timeout`.
        DbtError: dbt could not run at all, or no source has a threshold and that is not fine.
    """
    await asyncio.to_thread(look_at, dbt)
    await install_packages(dbt)
    check = FreshnessCheck(dbt.without_full_refresh, [])
    result = await check.run()
    if not result.sources:
        said = nothing_to_look_at(dbt, check.lineage)
        if dbt.selection() or not may_have_none:
            raise DbtInputError(said)
        get_run_logger().warning("%s", said)
        return result.model_copy(update={"state": DbtState.SKIPPED, "message": said})
    if result.failed:
        raise SourcesStale(result)
    return result


@task(name="check dbt project", task_run_name="check dbt project", tags=["dbt"], cache_policy=NO_CACHE)
async def dbt_plan(dbt: DbtCore, lock_wait: float = 3.0) -> DbtPlan:
    """`check_dbt` as a task."""
    return await check_dbt(dbt, lock_wait=lock_wait)


async def check_dbt(dbt: DbtCore, *, lock_wait: float = 3.0) -> DbtPlan:
    """Looks whether dbt could run, before anything else is started, and what it would run.

    Args:
        dbt: The project and what to run of it.
        lock_wait: Seconds to wait for another process to let go of a DuckDB file.

    Returns:
        The nodes that the command would run, and the project's lineage.

    Raises:
        DbtError: With one sentence about what is wrong: project, profile, target, selection, a compilation
            error, a DuckDB file that another process holds.
    """
    project = await asyncio.to_thread(look_at, dbt)
    await install_packages(dbt)
    found: dict[str, Any] = {}
    manifest: str | None = None
    async with surroundings(dbt) as (profiles_dir, env):
        args = command_line(dbt, ["ls"], profiles_dir) + dbt.selection()
        request = {"mode": "plan", "args": args, "lock_wait": lock_wait}
        end: dict[str, Any] | None = None
        async with DbtProcess.running(request, env=env, cwd=dbt.project) as process:
            async for record in process.records():
                match record["t"]:
                    case "plan":
                        found = record
                    case "manifest":
                        manifest = record["path"]
                    case "end":
                        end = record
        check_end(end, process, "ls")
    if found["locked"]:
        raise DbtError(locked(found["locked"]) or one_line(found["locked"]))
    kinds = COMMAND_TYPES.get(dbt.command)
    selected = [str(node["unique_id"]) for node in found["nodes"] if runs_kind(kinds, node["resource_type"])]
    if not selected:
        raise DbtInputError(nothing_selected(dbt))
    if manifest is None:
        raise DbtError(f"dbt wrote no manifest.json for {dbt.project}, so its lineage is not known.")
    lineage = await asyncio.to_thread(read_lineage, manifest)
    return DbtPlan(
        project=project,
        adapter=found["adapter"],
        target=found["target"],
        place=found["place"],
        selected=selected,
        lineage=lineage,
    )
