"""Whom a run tells what: its report as alarms, and what is told of a run that could not begin or died."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from typing import Any

from prefect import Flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun, State
from prefect.futures import PrefectFuture
from prefect.logging.loggers import flow_run_logger
from prefect.runtime import deployment, flow_run
from prefect.utilities.urls import url_for
from pydantic import TypeAdapter, ValidationError

from flows.fan_out import submit
from flows.parameters import Notify, NotifyList
from flows.report import EltReport, Report, Step, node_key
from tasks.alerts import announce, notify_check, tell
from tasks.dbt.model import DbtNode, DbtState
from tasks.incidents import RUN, Alarm, Bulletin, Level

_NOTIFY: TypeAdapter[list[Notify]] = TypeAdapter(NotifyList)
_BAD = (DbtState.FAIL, DbtState.ERROR)
_WELL = (DbtState.SUCCESS, DbtState.WARN)

# Occasions of which this process has told: `on_failure` hooks run in it, and have nothing to add.
_told: set[str] = set()


class Telling:
    """Tells a flow run's story to all who are to be told; never raises but for a block that is missing.

    Args:
        notify: Who.
    """

    def __init__(self, notify: Sequence[Notify]) -> None:
        self._notify = list(notify)
        self._checking = submit(notify_check, self._notify) if notify else None

    def checked(self) -> None:
        """See that all the blocks are there.

        Raises:
            BlockNotFound: One is not. Nothing was started.
        """
        if self._checking:
            self._checking.result()

    def ended(self, report: Report) -> None:
        """Tell how the run went."""
        self._tell(bulletin(report, pipeline=_pipeline(), occasion=_occasion()))

    def refused(self, error: Exception) -> None:
        """Tell that the run could not begin, and why."""
        self._tell(
            Bulletin(
                pipeline=_pipeline(),
                run=flow_run.name or "",
                run_url=flow_run.ui_url,
                occasion=_occasion(),
                alarms=[died("could not begin", str(error))],
            )
        )

    def _tell(self, told: Bulletin) -> None:
        futures: list[PrefectFuture[Any]] = [submit(tell, one, told) for one in self._notify]
        for future in futures:
            future.wait()
        _told.add(told.occasion)


async def tell_of_end(flow: Flow[Any, Any], flow_run: FlowRun, state: State[Any]) -> None:
    """An `on_crashed`, `on_failure` or `on_cancellation` hook: tell of a run that could not tell itself.

    It works in any process: who is told stands in the run's parameters. A run that has told how it went
    itself is passed over.
    """
    occasion = f"{flow_run.id}:{flow_run.run_count}"
    if occasion in _told:
        return
    log = flow_run_logger(flow_run, flow)
    try:
        notify = _NOTIFY.validate_python(flow_run.parameters.get("notify"))
    except ValidationError:
        log.warning("Nobody is told that the run %s: its parameter `notify` can't be read", _how(state))
        return
    if not notify:
        return
    told = Bulletin(
        pipeline=await _pipeline_of(flow, flow_run),
        run=flow_run.name or "",
        run_url=_url(flow_run),
        occasion=occasion,
        alarms=[died(_how(state), state.message or "")],
    )
    await asyncio.gather(*(announce(one, told, log) for one in notify))


def died(what: str, reason: str) -> Alarm:
    """That a run could not do its work at all."""
    return Alarm(key=RUN, title="the run", what=what, level="refused", reason=reason, tool="prefect")


def bulletin(report: Report, *, pipeline: str, occasion: str) -> Bulletin:
    """What a run has to say to whoever is told.

    What failed is an alarm; of a dbt step each node that failed is. What is held back is said with its
    cause. What was skipped, held back or not asked for is neither wrong nor well.

    Args:
        report: How it went.
        pipeline: What it is a run of.
        occasion: Which attempt of which run.
    """
    level: Level = "failed" if report.ending == "Failed" else "partial"
    nodes = report.nodes if isinstance(report, EltReport) else []
    alarms: list[Alarm] = []
    fine = [RUN]
    for step in report.steps:
        of_nodes = [node for node in nodes if node.state in _BAD] if step.kind == "transform" else []
        if step.failed and not of_nodes:
            alarms.append(_alarm(step, level))
        alarms += [_node_alarm(node, step, level) for node in of_nodes]
        if step.good or of_nodes:  # dbt did run, whatever it found
            fine.append(step.key)
    fine += [node_key(node.unique_id) for node in nodes if node.state in _WELL]
    if isinstance(report, EltReport):
        fine += report.passed
    return Bulletin(
        pipeline=pipeline,
        run=report.flow_run_name,
        run_url=report.flow_run_url,
        occasion=occasion,
        alarms=list(_with_held(alarms, report)),
        fine=fine,
        summary=[f"{report.ending}: {report.message}", *(step.line for step in report.steps)],
    )


def _alarm(step: Step, level: Level) -> Alarm:
    what = {"transform": "build", "before": "step", "after": "step"}.get(step.kind, step.kind)
    return Alarm(
        key=step.key,
        title=f"{step.tool} {step.name}" if step.kind in ("sync", "activation") else step.name,
        what=f"{what} {step.state.value.lower()}",
        level=level,
        reason=step.message or "",
        tool=step.tool,
        owner=step.owner,
        url=step.url,
        link=f"job {step.job_id}" if step.job_id else "job",
    )


def _node_alarm(node: DbtNode, step: Step, level: Level) -> Alarm:
    return Alarm(
        key=node_key(node.unique_id),
        title=f"dbt {node.label}",
        what="test failed" if node.state is DbtState.FAIL else "build failed",
        level=level,
        reason=node.message or "",
        tool=step.tool,
        owner=node.owner or step.owner,
        url=step.url,
        link=f"job {step.job_id}" if step.job_id else "job",
    )


def _with_held(alarms: Sequence[Alarm], report: Report) -> Iterator[Alarm]:
    """The alarms, each with what waits because of it."""
    for alarm in alarms:
        waiting = [step for step in report.held if not step.because or alarm.key in step.because]
        held = [f"{step.name} ({step.message})" if step.message else step.name for step in waiting]
        yield alarm.model_copy(update={"held": held})


def _how(state: State[Any]) -> str:
    if state.is_cancelled() or state.is_cancelling():
        return "was cancelled"
    return "crashed" if state.is_crashed() else "failed"


def _occasion() -> str:
    return f"{flow_run.id}:{flow_run.run_count}"


def _pipeline() -> str:
    flow = flow_run.flow_name or "flow"
    try:
        name = deployment.name
    except Exception:  # noqa: BLE001 - it asks Prefect's API, and an alert must not fail the run
        name = None
    return f"{flow}/{name}" if name else flow


async def _pipeline_of(flow: Flow[Any, Any], run: FlowRun) -> str:
    if run.deployment_id is None:
        return flow.name
    async with get_client() as client:
        return f"{flow.name}/{(await client.read_deployment(run.deployment_id)).name}"


def _url(run: FlowRun) -> str | None:
    return url_for(run)
