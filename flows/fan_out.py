"""What flows have in common: checking before anything starts, fanning out, and ending honestly."""

from __future__ import annotations

from collections.abc import Coroutine, Iterable, Sequence
from datetime import UTC, datetime
from typing import Any, ParamSpec, TypeVar, cast

from prefect import Task
from prefect.artifacts import create_markdown_artifact
from prefect.client.schemas.objects import State
from prefect.futures import PrefectFuture
from prefect.runtime import flow_run
from prefect.states import Completed, Failed

from blocks.http import VendorError
from blocks.reference import BlockError
from flows.report import EltReport, Report, Step, SyncReport
from flows.rules import AllowFailure, bears
from tasks.dbt_core import DbtError
from tasks.jobs import (
    Checked,
    InputError,
    JobError,
    JobResult,
    JobState,
    Parameters,
    Request,
    without_traceback,
)
from tasks.jobs.attempt import end_if_superseded
from tasks.limits import check_limits
from tasks.tools import TOOLS

KNOWN_ERRORS = (InputError, VendorError, BlockError, DbtError)
"""What a check can find: said in one sentence, without a traceback."""

R = TypeVar("R", bound=Report)
T = TypeVar("T")
P = ParamSpec("P")


def submit(task: Task[P, Coroutine[Any, Any, T]], *args: P.args, **kwargs: P.kwargs) -> PrefectFuture[T]:
    """`task.submit`, of which Prefect's types say that its result has yet to be awaited. It has not."""
    return cast("PrefectFuture[T]", task.submit(*args, **kwargs))


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


class Checking:
    """Looks up jobs of any tools at the same time, before anything is started.

    Args:
        requests: The jobs, in the order of the parameters.
    """

    def __init__(self, requests: Sequence[Parameters]) -> None:
        self._of_tool: dict[str, list[int]] = {}
        for position, request in enumerate(requests):
            self._of_tool.setdefault(TOOLS[request.tool].name, []).append(position)
        self._futures = {
            tool: submit(TOOLS[tool].check, [requests[position] for position in positions])
            for tool, positions in self._of_tool.items()
        }
        limits = {limit for request in requests if (limit := request.policy.concurrency_limit)}
        self._limits = submit(check_limits, sorted(limits)) if limits else None

    def result(self, rule: AllowFailure) -> list[Checked[Any]]:
        """What was found, in the order of the parameters.

        Raises:
            InputError: A job does not exist, or can't be started and the rule bears no failure, or there is
                no such concurrency limit. Nothing was started.
        """
        if self._limits:
            self._limits.result()
        found: list[tuple[int, Checked[Any]]] = []
        for tool, positions in self._of_tool.items():
            checked = self._futures[tool].result()
            if len(checked) != len(positions):  # a request that stands for many
                positions = positions[:1] * len(checked)
            found += zip(positions, checked, strict=True)
        in_order = [checked for _, checked in sorted(found, key=lambda pair: pair[0])]
        if rule == "none" and (problems := [c.problem for c in in_order if c.problem]):
            raise InputError(" ".join(problems))
        return in_order


def refuse_none(requests: Sequence[Parameters], what: str) -> None:
    """An empty list is a mistake, not a run with nothing to do.

    Args:
        requests: What was asked for.
        what: One of them in a word, such as `sync`.

    Raises:
        InputError: It is empty.
    """
    if not requests:
        raise InputError(f"There is no {what} to run: the list of {what}s is empty.")


def ids_and_names(requests: Iterable[Request]) -> list[tuple[str, str]]:
    """What a rule may name."""
    return [(request.resource_id, request.label) for request in requests]


def run_each(checked: Sequence[Checked[Any]]) -> list[JobResult]:
    """Run all jobs at the same time, each by its tool; one that fails stops none of the others.

    Returns:
        One result per job, good or bad, in the same order.
    """
    by_tool: dict[str, list[Any]] = {}
    for found in checked:
        if not found.problem:
            by_tool.setdefault(found.request.tool, []).append(found.request)
    futures = {tool: iter(TOOLS[tool].run.map(requests)) for tool, requests in by_tool.items()}
    started = [None if found.problem else next(futures[found.request.tool]) for found in checked]
    return [
        outcome(cast("PrefectFuture[JobResult]", future), found.request) if future else _refused_job(found)
        for future, found in zip(started, checked, strict=True)
    ]


def _refused_job(found: Checked[Any]) -> JobResult:
    request = found.request
    return JobResult(
        vendor=request.tool,
        resource_id=request.resource_id,
        name=request.label,
        owner=request.owner,
        state=JobState.FAILED,
        message=found.problem,
    )


def outcome(future: PrefectFuture[JobResult], request: Request) -> JobResult:
    """The result of a job's task, also where the task failed.

    Args:
        future: The task.
        request: What it was asked to do.
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

    Raises:
        Superseded: Another attempt is at work, and the end is for it to tell. A worker's process ends.
    """
    end_if_superseded()
    good = all(step.good for step in report.steps)
    tolerated = bears(rule, report.steps)
    ending = "Completed" if good else "PartiallyRefreshed" if tolerated else "Failed"
    # Whatever else went wrong, and whatever the rule bears: what a person has not approved was not done.
    if any(step.kind == "approval" and not step.good for step in report.steps):
        ending = "Rejected"
    return report.model_copy(
        update={
            "flow_run_id": flow_run.id or "",
            "flow_run_name": flow_run.name or "",
            "flow_run_url": flow_run.ui_url,
            "started_at": began,
            "duration": (datetime.now(UTC) - began).total_seconds(),
            "ending": ending,
            "message": report.sentence(),
        }
    )


def publish(report: SyncReport | EltReport, key: str) -> None:
    """Show the report in the UI, as an artifact of the run."""
    create_markdown_artifact(report.markdown(), key=key, description=report.message)


def final_state(report: SyncReport | EltReport) -> Any:
    """The honest final state; calling the flow from a script returns the report or raises `RunFailed`."""
    if report.ending in ("Failed", "Rejected"):
        return Failed(name=report.ending, message=report.message, data=RunFailed(report))
    return Completed(name=report.ending, message=report.message, data=report)


def steps_of(jobs: Iterable[JobResult]) -> list[Step]:
    """The sync steps of a report."""
    return [Step.of_job("sync", job) for job in jobs]
