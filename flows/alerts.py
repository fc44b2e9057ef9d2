"""Whom a run tells what: its report as alarms, and what is told of a run that could not begin or died."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from typing import Any

from prefect import Flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun, State
from prefect.context import FlowRunContext
from prefect.exceptions import ObjectNotFound
from prefect.futures import PrefectFuture
from prefect.logging.loggers import flow_run_logger, get_run_logger
from prefect.runtime import deployment, flow_run
from prefect.utilities.urls import url_for
from pydantic import TypeAdapter, ValidationError

from blocks.fields import tagged_owner
from blocks.logs import Log
from flows.fan_out import submit
from flows.parameters import Notify, NotifyList
from flows.report import EltReport, Report, Step, StepState, node_key
from tasks.alerts import announce, notify_check, tell
from tasks.approval import Question
from tasks.dbt.model import DbtNode, DbtState
from tasks.incidents import OF_RUNS, RUN, Alarm, Bulletin, Level
from tasks.jobs import read_entries

_NOTIFY: TypeAdapter[list[Notify]] = TypeAdapter(NotifyList)
_BAD = (DbtState.FAIL, DbtState.ERROR)
_WELL = (DbtState.SUCCESS, DbtState.WARN)
_CANCELLED = "was cancelled"
_JOBS = 5  # that are named in an alert
_ASKED = 20  # questions of one run about one thing, each after an answer, whose incidents are told apart

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
        self._tell(bulletin(report, **_here()))

    def refused(self, error: Exception) -> None:
        """Tell that the run could not begin, and why."""
        self._say([died("could not begin", str(error), owner=tagged_owner(flow_run.tags))])

    def said(self, alarms: list[Alarm], fine: list[str], summary: list[str]) -> None:
        """Tell of what the run has found, where it is no chain of steps.

        Args:
            alarms: What is wrong.
            fine: The keys of what is well.
            summary: The same, a line for each, for those who are told of every run.
        """
        self._say(alarms, [*OF_RUNS, *fine], summary)

    def _say(self, alarms: list[Alarm], fine: Sequence[str] = (), summary: Sequence[str] = ()) -> None:
        self._tell(
            Bulletin(
                run=flow_run.name or "",
                run_url=flow_run.ui_url,
                alarms=alarms,
                fine=list(fine),
                summary=list(summary),
                **_here(),
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
    occasion = occasion_of(flow_run)
    if occasion in _told:
        return
    log = flow_run_logger(flow_run, flow)
    await tell_of_run(flow_run, how(state), state.message or "", log, flow_name=flow.name)


def people_of(run: FlowRun) -> list[Notify] | None:
    """Whom a run's own parameters name, to be told of it; None if they can't be read."""
    try:
        return _NOTIFY.validate_python(run.parameters.get("notify"))
    except ValidationError:
        return None


async def tell_of_run(
    run: FlowRun,
    what: str,
    reason: str,
    log: Log,
    *,
    key: str = RUN,
    level: Level = "refused",
    flow_name: str | None = None,
    otherwise: Sequence[Notify] = (),
) -> bool:
    """Tell of a run from outside of it, as it would itself: to the same people, as the same incident.

    Its next run that goes well ends the incident, and so does the run itself if it is rescued.

    Args:
        run: The flow run, of any flow.
        what: What happened to it: `crashed`.
        reason: Why. What its jobs at the vendors are doing is added.
        log: Where it is said what could not be told.
        key: What is wrong, where it is not that the run is dead.
        level: How bad it is.
        flow_name: The flow's name, where it is known.
        otherwise: Who is told if the run's parameters name nobody.

    Returns:
        Whether all was told that was to be, and there was somebody to tell.
    """
    own = people_of(run)
    if own is None:
        nobody = "Its own people are not told" if otherwise else "Nobody is told"
        log.warning("%s that the run %s: its parameter `notify` can't be read", nobody, what)
    notify = own or list(otherwise)
    if not notify:
        return False
    alarm = died(what, reason, key=key, level=level, owner=tagged_owner(run.tags))
    if what != _CANCELLED:  # which cancels them
        alarm = await _with_jobs(alarm, run, log)
    told = (await _about(run, flow_name)).model_copy(update={"alarms": [alarm]})
    return all(await asyncio.gather(*(announce(one, told, log) for one in notify)))


async def tell_run_is_well(run: FlowRun, log: Log, notify: Sequence[Notify]) -> bool:
    """Tell that a deployment's runs are well again, where a run that failed was told of.

    Returns:
        Whether all was told that was to be.
    """
    told = (await _about(run)).model_copy(update={"fine": list(OF_RUNS)})
    return all(await asyncio.gather(*(announce(one, told, log) for one in notify)))


async def _about(run: FlowRun, flow_name: str | None = None) -> Bulletin:
    """A bulletin that says of which run it is, and nothing yet."""
    name = await _deployment_of(run, flow_name)
    return Bulletin(
        pipeline=name,
        run=run.name or "",
        run_url=_url(run),
        run_id=str(run.id),
        deployment=name,
        tags=sorted(run.tags),
        occasion=occasion_of(run),
    )


async def _with_jobs(alarm: Alarm, run: FlowRun, log: Log) -> Alarm:
    """The alarm, with what the run has started at the vendors and not seen the end of."""
    try:
        open_ = [entry for entry in await read_entries(run.id) if entry.open and entry.handle]
    except Exception as error:  # noqa: BLE001 - the alert is worth more than what it says about jobs
        log.warning("The run's journal could not be read: %s", type(error).__name__)
        return alarm
    if not open_:
        return alarm
    handles = [entry.handle for entry in open_ if entry.handle]
    jobs = ", ".join(f"{entry.vendor} {entry.name}" for entry in open_[:_JOBS])
    more = f" and {len(open_) - _JOBS} more" if len(open_) > _JOBS else ""
    return alarm.model_copy(
        update={
            "reason": f"{alarm.reason} Its jobs at the vendors go on: {jobs}{more}.",
            "url": handles[0].url,
            "link": f"job {handles[0].job_id}",
        }
    )


def occasion_of(run: FlowRun) -> str:
    """Which attempt of which run."""
    return f"{run.id}:{run.run_count}"


async def tell_waiting(notify: Sequence[Notify], question: Question) -> None:
    """Tell that the running flow waits for an approval; never raises.

    Args:
        notify: Who is told.
        question: What is asked.
    """
    context = FlowRunContext.get()
    if context is None or context.flow is None or context.flow_run is None or not notify:
        return
    run = context.flow_run
    changed = ", which has changed since it was given," if question.again else ""
    alarm = Alarm(
        key=_wait_key(question.what, question.number),
        title=f"approval of {question.what}{changed}",
        what="is waited for",
        level="waiting",
        reason=f"without an answer until {question.until} it is rejected;",
        tool="prefect",
        url=_url(run),
        link="answer here",
    )
    told = (await _about(run, context.flow.name)).model_copy(update={"alarms": [alarm]})
    log = get_run_logger(context)
    await asyncio.gather(*(announce(one, told, log) for one in notify))


def fresh_key(key: str) -> str:
    """That a connection is not fresh is not that its last sync failed: an older one may be new enough."""
    return f"{key}/fresh"


def _wait_key(what: str, number: int) -> str:
    # Each question is an incident of its own: a repeat of one that is open would not be told at once.
    return f"prefect/{what}/wait" + (f"/{min(number, _ASKED)}" if number > 1 else "")


def died(
    what: str, reason: str, *, key: str = RUN, level: Level = "refused", owner: str | None = None
) -> Alarm:
    """That a run could not do its work at all."""
    return Alarm(key=key, title="the run", what=what, level=level, reason=reason, tool="prefect", owner=owner)


def bulletin(
    report: Report,
    *,
    pipeline: str,
    occasion: str,
    run_id: str = "",
    deployment: str = "",
    tags: Sequence[str] = (),
) -> Bulletin:
    """What a run has to say to whoever is told.

    What failed is an alarm; of a dbt step each node that failed is. What is held back is said with its
    cause. What was skipped, held back or not asked for is neither wrong nor well.

    Args:
        report: How it went.
        pipeline: What it is a run of.
        occasion: Which attempt of which run.
        run_id: The run's id.
        deployment: The deployment that it is a run of.
        tags: The run's tags. Failures of nobody's belong to whom the tag `owner:<name>` names.
    """
    level: Level = "failed" if report.ending in ("Failed", "Rejected") else "partial"
    nodes = report.nodes if isinstance(report, EltReport) else []
    alarms: list[Alarm] = []
    fine = list(OF_RUNS)
    for step in report.steps:
        of_nodes = [node for node in nodes if node.state in _BAD] if step.kind == "transform" else []
        if step.failed and not of_nodes:
            alarms.append(_alarm(step, level))
        alarms += [_node_alarm(node, step, level) for node in of_nodes]
        if step.good or of_nodes:  # dbt did run, whatever it found
            fine.append(step.key)
        if step.kind == "sync" and step.good:
            fine.append(fresh_key(step.key))
        if step.kind == "approval":  # it is no longer waited for, whatever the answer
            fine += [_wait_key(step.resource_id, number + 1) for number in range(_ASKED)]
    fine += [node_key(node.unique_id) for node in nodes if node.state in _WELL]
    if isinstance(report, EltReport):
        fine += report.passed
    return Bulletin(
        pipeline=pipeline,
        run=report.flow_run_name,
        run_url=report.flow_run_url,
        run_id=run_id,
        deployment=deployment,
        tags=list(tags),
        occasion=occasion,
        alarms=[
            alarm if alarm.owner else alarm.model_copy(update={"owner": tagged_owner(tags)})
            for alarm in _with_held(alarms, report)
        ],
        fine=fine,
        summary=[f"{report.ending}: {report.message}", *(step.line for step in report.steps)],
    )


def _alarm(step: Step, level: Level) -> Alarm:
    what = {"transform": "build", "before": "step", "after": "step"}.get(step.kind, step.kind)
    answered = step.kind == "approval" and step.state is StepState.CANCELLED
    return Alarm(
        key=step.key,
        title=f"{step.tool} {step.name}" if step.kind in ("sync", "activation") else step.name,
        what="was not given" if step.kind == "approval" else f"{what} {step.state.value.lower()}",
        level="partial" if answered else level,  # somebody knows of it: who has rejected it
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


def how(state: State[Any]) -> str:
    """How a run has ended, in a word."""
    if state.is_cancelled() or state.is_cancelling():
        return _CANCELLED
    return "crashed" if state.is_crashed() else "failed"


def _occasion() -> str:
    return f"{flow_run.id}:{flow_run.run_count}"


def _here() -> dict[str, Any]:
    """What a bulletin says of the run that is running here."""
    name = _pipeline()
    return {
        "pipeline": name,
        "run_id": str(flow_run.id or ""),
        "deployment": name,
        "tags": sorted(flow_run.tags or []),
        "occasion": _occasion(),
    }


def _pipeline() -> str:
    flow = flow_run.flow_name or "flow"
    try:
        name = deployment.name
    except Exception:  # noqa: BLE001 - it asks Prefect's API, and an alert must not fail the run
        name = None
    return f"{flow}/{name}" if name else flow


async def _deployment_of(run: FlowRun, flow_name: str | None) -> str:
    async with get_client() as client:
        flow_name = flow_name or (await client.read_flow(run.flow_id)).name
        if run.deployment_id is None:
            return flow_name
        try:
            return f"{flow_name}/{(await client.read_deployment(run.deployment_id)).name}"
        except ObjectNotFound:
            return flow_name


def _url(run: FlowRun) -> str | None:
    return url_for(run)
