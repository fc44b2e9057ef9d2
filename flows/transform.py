"""The standing jobs of a dbt project: the full build, the smoke test, a full refresh, the sources' freshness.

For a warehouse whose loads have their own schedule; what shall be built right after its load is a transform
of `elt_chain`. They need a block only for whom to tell. Retries happen inside the run, and do only what
failed and was skipped.
"""

# No `from __future__ import annotations` here: see flows/elt.py.
from typing import Annotated
from uuid import UUID

from prefect import flow
from prefect.logging import get_run_logger
from prefect.states import Completed
from pydantic import Field

from flows.alerts import tell_of_end
from flows.fan_out import KNOWN_ERRORS, submit
from flows.intervals import IntervalOfRun, given, interval_of_run
from flows.parameters import NotifyList
from flows.standing import StandingJob
from tasks.dbt.choice import below_of, incremental_models, with_all_below, words
from tasks.dbt.freshness import Freshness
from tasks.dbt_core import DbtCore, DbtInputError, DbtResult, DbtState, dbt_previous
from tasks.jobs import EventLoopTaskRunner

Retries = Annotated[int, Field(ge=0, description="How often what failed is tried again within the run.")]
Delay = Annotated[float, Field(ge=0, description="Seconds to wait before each of these retries.")]
Names = Annotated[list[str], Field(min_length=1)]


@flow(name="dbt-build", task_runner=EventLoopTaskRunner(), on_crashed=[tell_of_end], on_failure=[tell_of_end])
def build_project(
    dbt: DbtCore,
    from_models: list[str] = [],  # noqa: B006 - never changed; a form shows it as an empty list
    retry_of: UUID | None = None,
    data_interval: IntervalOfRun = "none",
    retries: Retries = 2,
    retry_delay: Delay = 60.0,
    notify: NotifyList = [],  # noqa: B006 - as above
) -> DbtResult:
    """Build a dbt project: all of it, some models and everything below them, or what an earlier run left.

    Safe to retry: what is done is not done again, also after a kill and on another machine.

    Args:
        dbt: The project, and what to build of it; everything if it selects nothing.
        from_models: Build these and everything below them instead: names of models, seeds and snapshots, or
            of sources as `source.table`.
        retry_of: Id of a flow run whose last dbt build failed: do what it left undone, as `dbt retry` does,
            with the selection, variables and data interval that it had.
        data_interval: Which part of the data the run is about: `schedule`, or a start and an end.
        retries: How often what failed is tried again within the run. Takes the place of `dbt.retries`.
        retry_delay: Seconds to wait before each of these retries. Takes the place of `dbt.retry_delay`.
        notify: Who is told of what fails and of its recovery.

    Returns:
        Every node with its state.

    Raises:
        DbtBuildFailed: Nodes failed; `.result` has all of them.
        DbtError, BlockNotFound: dbt could not run, or what was asked for is not there.
    """
    job = StandingJob(dbt, notify, retries, retry_delay)
    exclude: list[str] = []
    try:
        job.ready()
        dbt = given(dbt, interval_of_run(data_interval))
        if retry_of is not None:
            if from_models:
                raise DbtInputError(
                    "from_models and retry_of are two things: what is wanted, a part or a rest?"
                )
            before = submit(dbt_previous, dbt, retry_of).result()
            if before.complete and not before.left:
                message = f"flow run {retry_of} left nothing undone: every node succeeded"
                nothing = DbtResult(state=DbtState.SKIPPED, message=message)
                # Prefect takes a State for the result in it.
                return Completed(name="NothingToRetry", message=message, data=nothing)  # type: ignore[return-value]
            dbt, exclude = before.apply(dbt), before.left_out
        elif from_models:
            if dbt.select or dbt.selector:
                raise DbtInputError(
                    "from_models says what is built: leave `select` and `selector` of dbt empty."
                )
            lineage = job.plan(dbt).lineage
            dbt = dbt.model_copy(update={"select": with_all_below(lineage, from_models)})
    except KNOWN_ERRORS as error:
        return job.refuse(error)  # type: ignore[no-any-return]
    job.build(dbt, exclude, retry_of)
    return job.ended()  # type: ignore[no-any-return]


@flow(name="dbt-smoke", task_runner=EventLoopTaskRunner(), on_crashed=[tell_of_end], on_failure=[tell_of_end])
def smoke_test(
    dbt: DbtCore,
    selector: str | None = "smoke",
    retries: Retries = 2,
    retry_delay: Delay = 60.0,
    notify: NotifyList = [],  # noqa: B006 - as above
) -> list[DbtResult]:
    """Load the seeds, then build what a selector names: a quick proof that all is in order.

    The run's state says which of the two failed: `SeedFailed` or `SmokeFailed`.

    Args:
        dbt: The project.
        selector: Name of the selector in selectors.yml. None: what `dbt` itself selects, for a project that
            has no selectors.
        retries: How often what failed is tried again within the run. Takes the place of `dbt.retries`.
        retry_delay: Seconds to wait before each of these retries. Takes the place of `dbt.retry_delay`.
        notify: Who is told of what fails and of its recovery.

    Returns:
        The seeds' result (if the project has any) and the selector's.

    Raises:
        DbtBuildFailed: Nodes failed; `.result` has all of them.
        DbtError, BlockNotFound: dbt could not run, or there is no such selector.
    """
    job = StandingJob(dbt, notify, retries, retry_delay)
    own = dbt.model_dump(include={"select", "exclude", "selector"})
    chosen = job.like(selector=selector) if selector else job.like(**own)
    try:
        if not (chosen.select or chosen.selector):
            raise DbtInputError("Nothing says what a smoke test is: name a selector, or `select` in `dbt`.")
        lineage = job.plan(chosen).lineage
    except KNOWN_ERRORS as error:
        return job.refuse(error)  # type: ignore[no-any-return]
    if not any(node.resource_type == "seed" for node in lineage.nodes.values()):
        get_run_logger().info("The project has no seeds.")
    elif job.build(job.like(command="seed")) is None:
        return job.ended("SeedFailed", "the seeds failed")  # type: ignore[no-any-return]
    job.build(chosen)
    what = f"the selector {selector} failed" if selector else "what is selected failed"
    return job.ended("SmokeFailed", what, all_results=True)  # type: ignore[no-any-return]


@flow(
    name="dbt-full-refresh",
    task_runner=EventLoopTaskRunner(),
    on_crashed=[tell_of_end],
    on_failure=[tell_of_end],
)
def full_refresh(
    dbt: DbtCore,
    models: Names,
    below: bool = False,
    retries: Retries = 2,
    retry_delay: Delay = 60.0,
    notify: NotifyList = [],  # noqa: B006 - as above
) -> list[DbtResult]:
    """Rebuild incremental models from nothing, with their tests.

    Args:
        dbt: The project.
        models: Which, by name. One that is not there, is not incremental, or is protected from this by its
            own config, is refused before anything is started.
        below: Also build what is downstream of them, that not from nothing.
        retries: How often what failed is tried again within the run. Takes the place of `dbt.retries`.
        retry_delay: Seconds to wait before each of these retries. Takes the place of `dbt.retry_delay`.
        notify: Who is told of what fails and of its recovery.

    Returns:
        What was rebuilt, and with `below` what was built on it.

    Raises:
        DbtBuildFailed: Nodes failed; `.result` has all of them.
        DbtError, BlockNotFound: dbt could not run, or a model can't be rebuilt.
    """
    logger = get_run_logger()
    job = StandingJob(dbt, notify, retries, retry_delay)
    try:
        lineage = job.plan(job.like(full_refresh=True)).lineage
        chosen = incremental_models(lineage, models)
    except KNOWN_ERRORS as error:
        return job.refuse(error)  # type: ignore[no-any-return]
    names, ids = words(lineage, chosen), {node.unique_id for node in chosen}
    further, tests = below_of(lineage, ids) if below else ([], [])
    logger.info("Rebuilding from nothing: %s", ", ".join(names))
    # A test that reads what is below, too, is right only when that is built: before, it would see what the
    # old rows made there, and if it failed, nothing below would ever be built.
    built = job.build(job.like(select=names, exclude=tests, full_refresh=True))
    for node in built.nodes if built else ():
        if node.unique_id in ids:
            rows = f", {node.rows:,} rows" if node.rows is not None else ""
            logger.info("Rebuilt from nothing: %s in %.1f s%s", node.label, node.duration, rows)
    if built and further:
        # Not `log+` without `log`: to leave out a model leaves out every test that reads it.
        job.build(job.like(select=[*further, *tests]))
    return job.ended(all_results=True)  # type: ignore[no-any-return]


@flow(
    name="dbt-freshness",
    task_runner=EventLoopTaskRunner(),
    on_crashed=[tell_of_end],
    on_failure=[tell_of_end],
)
def source_freshness(
    dbt: DbtCore,
    retries: Retries = 1,
    retry_delay: Delay = 30.0,
    notify: NotifyList = [],  # noqa: B006 - as above
) -> Freshness:
    """Look how old the data of the sources is, by the thresholds in the dbt project.

    The run is Completed if all are fresh, `Stale` (a Completed state) if one is past its warning threshold,
    and Failed if one is past its error threshold or can't be looked at. A project of which no source has a
    threshold ends as `NothingToLookAt`, which is Completed, too; a selection without one is refused.

    Args:
        dbt: The project, and which of its sources; all that have a threshold if it selects nothing.
        retries: How often it is looked again when a source fails. Takes the place of `dbt.retries`.
        retry_delay: Seconds to wait before each of these retries. Takes the place of `dbt.retry_delay`.
        notify: Who is told of what fails and of its recovery.

    Returns:
        Every source with its age.

    Raises:
        SourcesStale: A source fails; `.result` has all of them.
        DbtError, BlockNotFound: dbt could not run, or no source that is selected has a threshold.
    """
    job = StandingJob(dbt, notify, retries, retry_delay)
    try:
        job.ready()
    except KNOWN_ERRORS as error:
        return job.refuse(error)  # type: ignore[no-any-return]
    return job.looked(job.look())  # type: ignore[no-any-return]
