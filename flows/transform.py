"""The standing jobs of a dbt project: the full build, the smoke test, a full refresh, the sources' freshness.

For a warehouse whose loads have their own schedule; what shall be built right after its load is a transform
of `elt_chain`. They need no block. Retries happen inside the run, and do only what failed and was skipped.
"""

# No `from __future__ import annotations` here: see flows/elt.py.
from collections.abc import Sequence
from typing import Annotated, Any, Literal
from uuid import UUID

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.logging import get_run_logger
from prefect.states import Completed, Failed
from pydantic import Field

from flows.fan_out import KNOWN_ERRORS, refuse, submit
from flows.node_report import publish_build, publish_freshness
from tasks.dbt.choice import incremental_models, with_all_below, words
from tasks.dbt.freshness import Freshness
from tasks.dbt_core import (
    DbtBuildFailed,
    DbtCore,
    DbtInputError,
    DbtResult,
    DbtState,
    SourcesStale,
    dbt_build,
    dbt_freshness,
    dbt_plan,
    dbt_previous,
)
from tasks.jobs import EventLoopTaskRunner, without_traceback

Retries = Annotated[int, Field(ge=0, description="How often what failed is tried again within the run.")]
Delay = Annotated[float, Field(ge=0, description="Seconds to wait before each of these retries.")]


@flow(name="dbt-build", task_runner=EventLoopTaskRunner())
def build_project(
    dbt: DbtCore,
    from_models: list[str] = [],  # noqa: B006 - never changed; a form shows it as an empty list
    retry_of: UUID | None = None,
    retries: Retries = 2,
    retry_delay: Delay = 60.0,
) -> DbtResult:
    """Build a dbt project: all of it, some models and everything below them, or what an earlier run left.

    Safe to retry: what is done is not done again, also after a kill and on another machine.

    Args:
        dbt: The project, and what to build of it; everything if it selects nothing.
        from_models: Build these and everything below them instead: names of models, seeds and snapshots, or
            of sources as `source.table`.
        retry_of: Id of a flow run whose last dbt build failed: do what it left undone, as `dbt retry` does,
            with the selection and variables that it had.
        retries: How often what failed is tried again within the run. Takes the place of `dbt.retries`.
        retry_delay: Seconds to wait before each of these retries. Takes the place of `dbt.retry_delay`.

    Returns:
        Every node with its state.

    Raises:
        DbtBuildFailed: Nodes failed; `.result` has all of them.
        DbtError: dbt could not run, or what was asked for is not in the project.
    """
    exclude: list[str] = []
    try:
        if retry_of is not None:
            if from_models:
                raise DbtInputError(
                    "from_models and retry_of are two things: what is wanted, a part or a rest?"
                )
            before = submit(dbt_previous, dbt, retry_of).result()
            if before.complete and not before.left:
                return _nothing_left(retry_of)  # type: ignore[return-value]  # Prefect takes a State for it
            dbt, exclude = before.apply(dbt), before.left_out
        elif from_models:
            if dbt.select or dbt.selector:
                raise DbtInputError(
                    "from_models says what is built: leave `select` and `selector` of dbt empty."
                )
            lineage = submit(dbt_plan, dbt).result().lineage
            dbt = dbt.model_copy(update={"select": with_all_below(lineage, from_models)})
    except KNOWN_ERRORS as error:
        return refuse(error)  # type: ignore[return-value]
    return _end([_build(dbt, retries, retry_delay, exclude, retry_of)])  # type: ignore[return-value]


@flow(name="dbt-smoke", task_runner=EventLoopTaskRunner())
def smoke_test(
    dbt: DbtCore, selector: str = "smoke", retries: Retries = 2, retry_delay: Delay = 60.0
) -> list[DbtResult]:
    """Load the seeds, then build what a selector names: a quick proof that all is in order.

    The run's state says which of the two failed: `SeedFailed` or `SmokeFailed`.

    Args:
        dbt: The project.
        selector: Name of the selector in selectors.yml.
        retries: How often what failed is tried again within the run. Takes the place of `dbt.retries`.
        retry_delay: Seconds to wait before each of these retries. Takes the place of `dbt.retry_delay`.

    Returns:
        The seeds' result (if the project has any) and the selector's.

    Raises:
        DbtBuildFailed: Nodes failed; `.result` has all of them.
        DbtError: dbt could not run, or there is no such selector.
    """
    chosen = _like(dbt, command="build", selector=selector)
    try:
        lineage = submit(dbt_plan, chosen).result().lineage
    except KNOWN_ERRORS as error:
        return refuse(error)  # type: ignore[return-value]
    done: list[DbtResult | Exception] = []
    if any(node.resource_type == "seed" for node in lineage.nodes.values()):
        done.append(_build(_like(dbt, command="seed"), retries, retry_delay))
        if isinstance(done[-1], Exception):
            return _end(done, "SeedFailed", "the seeds failed")  # type: ignore[return-value]
    else:
        get_run_logger().info("The project has no seeds.")
    done.append(_build(chosen, retries, retry_delay))
    return _end(done, "SmokeFailed", f"the selector {selector} failed", data=done)  # type: ignore[return-value]


@flow(name="dbt-full-refresh", task_runner=EventLoopTaskRunner())
def full_refresh(
    dbt: DbtCore,
    models: Annotated[
        list[str],
        Field(min_length=1, description="Incremental models, by name, that are rebuilt from nothing."),
    ],
    below: bool = False,
    retries: Retries = 2,
    retry_delay: Delay = 60.0,
) -> list[DbtResult]:
    """Rebuild incremental models from nothing, with their tests.

    Args:
        dbt: The project.
        models: Which, by name. One that is not there, is not incremental, or is protected from this by its
            own config, is refused before anything is started.
        below: Also build what is downstream of them, that not from nothing.
        retries: How often what failed is tried again within the run. Takes the place of `dbt.retries`.
        retry_delay: Seconds to wait before each of these retries. Takes the place of `dbt.retry_delay`.

    Returns:
        What was rebuilt, and with `below` what was built on it.

    Raises:
        DbtBuildFailed: Nodes failed; `.result` has all of them.
        DbtError: dbt could not run, or a model can't be rebuilt.
    """
    logger = get_run_logger()
    try:
        lineage = submit(dbt_plan, _like(dbt, command="build")).result().lineage
        chosen = incremental_models(lineage, models)
    except KNOWN_ERRORS as error:
        return refuse(error)  # type: ignore[return-value]
    names = words(lineage, chosen)
    logger.info("Rebuilding from nothing: %s", ", ".join(names))
    done = [_build(_like(dbt, command="build", select=names, full_refresh=True), retries, retry_delay)]
    rebuilt = {node.unique_id for node in chosen}
    for node in done[0].nodes if isinstance(done[0], DbtResult) else ():
        if node.unique_id in rebuilt:
            rows = f", {node.rows:,} rows" if node.rows is not None else ""
            logger.info("Rebuilt from nothing: %s in %.1f s%s", node.label, node.duration, rows)
    if below and isinstance(done[0], DbtResult) and lineage.downstream(rebuilt):
        down = _like(dbt, command="build", select=[f"{name}+" for name in names], exclude=names)
        done.append(_build(down, retries, retry_delay))
    return _end(done, data=done)  # type: ignore[return-value]


@flow(name="dbt-freshness", task_runner=EventLoopTaskRunner())
def source_freshness(dbt: DbtCore, retries: Retries = 1, retry_delay: Delay = 30.0) -> Freshness:
    """Look how old the data of the sources is, by the thresholds in the dbt project.

    The run is Completed if all are fresh, `Stale` (a Completed state) if one is past its warning threshold,
    and Failed if one is past its error threshold or can't be looked at.

    Args:
        dbt: The project, and which of its sources; all that have a threshold if it selects nothing.
        retries: How often it is looked again when a source fails. Takes the place of `dbt.retries`.
        retry_delay: Seconds to wait before each of these retries. Takes the place of `dbt.retry_delay`.

    Returns:
        Every source with its age.

    Raises:
        SourcesStale: A source fails; `.result` has all of them.
        DbtError: dbt could not run, or no source has a threshold.
    """
    look = dbt_freshness.with_options(retries=retries, retry_delay_seconds=retry_delay)
    found: Any = submit(look, dbt).result(raise_on_failure=False)
    result = found.result if isinstance(found, SourcesStale) else found
    if not isinstance(result, Freshness):
        return refuse(found)  # type: ignore[return-value]
    if isinstance(found, SourcesStale):
        without_traceback(SourcesStale)
        publish_freshness("Failed", result)
        return Failed(message=result.message, data=found.with_traceback(None))  # type: ignore[return-value]
    ending = "Stale" if result.state is DbtState.WARN else "Completed"
    publish_freshness(ending, result)
    return Completed(name=ending, message=result.message, data=result)  # type: ignore[return-value]


def _like(dbt: DbtCore, **said: Any) -> DbtCore:
    """The same project with another command and selection."""
    nothing: dict[str, Any] = {"select": [], "exclude": [], "selector": None, "full_refresh": False}
    return DbtCore.model_validate({**dbt.model_dump(), **nothing, **said})


def _build(
    dbt: DbtCore,
    retries: int,
    delay: float,
    exclude: Sequence[str] = (),
    retry_of: UUID | None = None,
) -> DbtResult | Exception:
    """A result, or what the step failed with once its retries are used up."""
    step = dbt_build.with_options(retries=retries, retry_delay_seconds=delay)
    found: Any = submit(step, dbt, exclude, retry_of).result(raise_on_failure=False)
    return found if isinstance(found, DbtResult | Exception) else RuntimeError(str(found))


def _end(
    done: Sequence[DbtResult | Exception],
    name: Literal["Failed", "SeedFailed", "SmokeFailed"] = "Failed",
    what: str = "",
    data: Any = None,
) -> State[Any]:
    """Publish the report, and end as the last of the builds has ended."""
    last = done[-1]
    results = [found.result if isinstance(found, DbtBuildFailed) else found for found in done]
    ending = name if isinstance(last, Exception) else "Completed"
    publish_build(ending, [found for found in results if isinstance(found, DbtResult)])
    if isinstance(last, Exception):
        without_traceback(*KNOWN_ERRORS)
        message = f"{what}: {last}" if what else str(last)
        return Failed(name=name, message=message, data=last.with_traceback(None))
    return Completed(message=last.message, data=data or last)


def _nothing_left(retry_of: UUID) -> State[DbtResult]:
    message = f"flow run {retry_of} left nothing undone: every node succeeded"
    return Completed(
        name="NothingToRetry", message=message, data=DbtResult(state=DbtState.SKIPPED, message=message)
    )
