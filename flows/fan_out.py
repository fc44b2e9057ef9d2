"""What flows have in common: checking before anything starts, fanning out, and ending honestly."""

from __future__ import annotations

from collections.abc import Coroutine, Sequence
from datetime import UTC, datetime
from typing import Any, ParamSpec, TypeVar, cast

from prefect import Task
from prefect.artifacts import create_markdown_artifact
from prefect.client.schemas.objects import State
from prefect.futures import PrefectFuture
from prefect.runtime import flow_run
from prefect.states import Completed, Failed

from blocks.http import VendorError
from blocks.reference import BlockNotFound
from flows.report import EltReport, Report, Step, SyncReport
from flows.rules import AllowFailure, bears
from tasks.airbyte import AirbyteSync, Checked, airbyte_check, airbyte_sync
from tasks.dbt_core import DbtError
from tasks.jobs import InputError, JobError, JobResult, JobState, without_traceback

KNOWN_ERRORS = (InputError, VendorError, BlockNotFound, DbtError)
"""What a check can find: said in one sentence, without a traceback."""

R = TypeVar("R", bound=Report)
T = TypeVar("T")
P = ParamSpec("P")


def submit(task: Task[P, Coroutine[Any, Any, T]], *args: P.args, **kwargs: P.kwargs) -> PrefectFuture[T]:
    """`task.submit`, of which Prefect's types say that its result has yet to be awaited. It has not."""
    return cast("PrefectFuture[T]", task.submit(*args, **kwargs))


def map_each(task: Task[[T], Coroutine[Any, Any, JobResult]], requests: Sequence[T]) -> list[JobResult]:
    """Run a job's task for each request at the same time, and take each outcome, good or bad."""
    futures = task.map(requests) if requests else []
    return [outcome(cast("PrefectFuture[JobResult]", f), r) for f, r in zip(futures, requests, strict=True)]


class RunFailed(Exception):
    """A run did not do everything that was asked for, and its rule does not bear that.

    Attributes:
        report: What was done and what was not.
    """

    def __init__(self, report: SyncReport | EltReport) -> None:
        super().__init__(report)
        self.report = report

    def __str__(self) -> str:
        return self.report.message

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(self), (self.report,))


def checked_syncs(future: PrefectFuture[list[Checked]], rule: AllowFailure) -> list[Checked]:
    """The connections of a run, once they are looked up.

    Raises:
        InputError: One of them can't be started, and the rule bears no failure. Nothing was started.
    """
    checked = future.result()
    problems = [found.problem for found in checked if found.problem]
    if problems and rule == "none":
        raise InputError(" ".join(problems))
    return checked


def check_syncs(syncs: Sequence[AirbyteSync]) -> PrefectFuture[list[Checked]]:
    """Begin to look the connections up."""
    if not syncs:
        raise InputError("There is no sync to run: the list of syncs is empty.")
    return submit(airbyte_check, list(syncs))


def run_syncs(checked: Sequence[Checked]) -> list[JobResult]:
    """Sync all connections at the same time; one that fails stops none of the others.

    Returns:
        One result per connection, in the same order.
    """
    done = iter(map_each(airbyte_sync, [found.sync for found in checked if not found.problem]))
    return [_refused_job(found) if found.problem else next(done) for found in checked]


def _refused_job(found: Checked) -> JobResult:
    sync = found.sync
    return JobResult(
        vendor=sync.tool,
        resource_id=sync.resource_id,
        name=sync.label,
        owner=sync.owner,
        state=JobState.FAILED,
        message=found.problem,
    )


def outcome(future: PrefectFuture[JobResult], request: Any) -> JobResult:
    """The result of a job's task, also where the task failed.

    Args:
        future: The task.
        request: What it was asked to do: tool, resource_id, label and owner are used.
    """
    found: Any = future.result(raise_on_failure=False)
    if isinstance(found, JobResult):
        return found
    if isinstance(found, JobError):
        return found.result
    return JobResult(
        vendor=request.tool,
        resource_id=request.resource_id,
        name=request.label,
        owner=request.owner,
        state=JobState.FAILED,
        message=str(found) or type(found).__name__,
    )


def refuse(error: Exception) -> State[Any]:
    """The final state of a run that was not begun because of what a check found."""
    without_traceback(*KNOWN_ERRORS)
    return Failed(message=str(error), data=error.with_traceback(None))


def conclude(report: R, rule: AllowFailure, *, began: datetime) -> R:
    """Fill in the ending of a report.

    Args:
        report: With its steps.
        rule: How much failure the run may bear.
        began: When the run began.
    """
    good = all(step.good for step in report.steps)
    tolerated = bears(rule, report.steps)
    return report.model_copy(
        update={
            "flow_run_id": flow_run.id or "",
            "flow_run_name": flow_run.name or "",
            "flow_run_url": flow_run.ui_url,
            "started_at": began,
            "duration": (datetime.now(UTC) - began).total_seconds(),
            "ending": "Completed" if good else "PartiallyRefreshed" if tolerated else "Failed",
            "message": report.sentence(),
        }
    )


def publish(report: SyncReport | EltReport, key: str) -> None:
    """Show the report in the UI, as an artifact of the run."""
    create_markdown_artifact(report.markdown(), key=key, description=report.message)


def final_state(report: SyncReport | EltReport) -> Any:
    """The honest final state; calling the flow from a script returns the report or raises `RunFailed`."""
    if report.ending == "Failed":
        return Failed(message=report.message, data=RunFailed(report))
    return Completed(name=report.ending, message=report.message, data=report)


def steps_of(jobs: Sequence[JobResult]) -> list[Step]:
    """The sync steps of a report."""
    return [Step.of_job("sync", job) for job in jobs]
