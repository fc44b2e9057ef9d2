"""The whole chain as one run: syncs, then the dbt build, then activations, then the people.

For the daily load, and for a load that an event asks for. Its blocks: one per account of each tool, and for
whom to tell Slack Incoming Webhooks, Slack Credentials or PagerDuty Routings.
"""

# No `from __future__ import annotations` here: `serve()` sends the flow to its process as a pickle, in which
# the types of its parameters are found only if they are more than text.
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Annotated, Any

from prefect import flow
from prefect.logging import get_run_logger
from pydantic import Field

from flows.alerts import Telling, tell_of_end
from flows.approval import Approval, Asking
from flows.fan_out import (
    KNOWN_ERRORS,
    Checking,
    conclude,
    final_state,
    ids_and_names,
    publish,
    refuse,
    refuse_none,
    run_each,
    steps_of,
    submit,
)
from flows.gate import Gate
from flows.gates import check_gate_names, look_at_gates
from flows.intervals import IntervalOfRun, given, interval_of_run
from flows.own_steps import run_after, run_before
from flows.parameters import Activation, GateCheck, NotifyList, OwnStep, Sync, Transform
from flows.picture import coloured, picture
from flows.progress import Progress
from flows.report import EltReport, Step, StepState
from flows.rules import AllowFailure, check_rule
from tasks.cancellation import cancel_open_jobs
from tasks.dbt.model import DbtBuildFailed, DbtNode, DbtPlan, DbtResult
from tasks.gates import check_gates
from tasks.jobs import Checked, EventLoopTaskRunner, limit_concurrency
from tasks.steps import check_steps
from tasks.tools import TRANSFORMS


@flow(
    name="elt-chain",
    task_runner=EventLoopTaskRunner(),
    on_cancellation=[cancel_open_jobs],
    on_crashed=[tell_of_end],
    on_failure=[tell_of_end],
)
def elt_chain(
    syncs: Sequence[Sync],
    transform: Transform | None = None,
    activations: Sequence[Activation] = (),
    notify: NotifyList = [],  # noqa: B006
    allow_failure: AllowFailure = "none",
    gates: Sequence[GateCheck] = (),
    before: Sequence[OwnStep] = (),
    after: Sequence[OwnStep] = (),
    data_interval: IntervalOfRun = "none",
    max_concurrency: Annotated[int, Field(ge=1)] = 100,
    approval: Approval | None = None,
) -> EltReport:
    """Sync, transform, activate and tell, with failure following lineage.

    Everything is looked up before anything is started. When a connection fails, the others finish, dbt
    builds all that is not downstream of it, and activations on what was not built are held back with the
    reason. Safe to retry: nothing that succeeded is done again.

    Args:
        syncs: The connections, each with its tool, account, owner and policy.
        transform: The dbt project, and what to build of it.
        activations: What runs after it, each with its tool, account, owner and policy.
        notify: Who is told of what fails and of its recovery, on Slack and PagerDuty.
        allow_failure: How much failure the run may bear: `none`, `any`, `{"at_most": n}` or
            `{"required": [ids or names]}`. Only the final state depends on it.
        gates: What must hold of the data before it is built on, looked at when the syncs have ended. A gate
            that stays shut holds back what is built on its connections, and counts as a failure.
        before: Steps of your own before the syncs, one after the other. One that fails holds back the chain.
        after: Steps of your own after the activations, one after the other: if all was done, or always.
        data_interval: Which part of the data the run is about, for the transform and the steps of your own:
            `schedule`, or a start and an end.
        max_concurrency: How many tasks may run at the same time.
        approval: Whether a person has to approve the load, the activations or both. On a worker the run is
            suspended meanwhile.

    Returns:
        Every step with its outcome. The run is Completed if everything was done, PartiallyRefreshed (a
        Completed state) if the rule bears what was not, and Rejected (a Failed state) if a person has not
        approved, or nobody in time.

    Raises:
        RunFailed: Something failed that the rule does not bear, or was rejected; `.report` has every outcome.
        InputError, BlockNotFound, DbtError, VendorError: What was asked for can't be run, and nothing was
            started.
    """
    limit_concurrency(max_concurrency)
    began = datetime.now(UTC)
    telling, asking = Telling(notify), Asking(approval, notify)
    progress = asking.progress()
    try:
        # All at the same time; whichever finds something, nothing has been started yet. A run that goes on
        # after its approval has its syncs and its build behind it.
        refuse_none(syncs, "sync")
        interval = interval_of_run(data_interval)
        transform = given(transform, interval) if transform else None
        checking, checking_activations = Checking(() if progress else syncs), Checking(activations)
        planning = submit(TRANSFORMS[transform.tool].plan, transform) if transform and not progress else None
        own_steps = submit(check_steps, [*before, *after], interval) if before or after else None
        looking_at_gates = submit(check_gates, list(gates)) if gates and not progress else None
        checked = checking.result(allow_failure)
        plan = planning.result() if planning else None
        checked_activations = checking_activations.result(allow_failure)
        telling.checked()
        if own_steps:
            own_steps.result()
        if looking_at_gates:
            looking_at_gates.result()
        if not progress:
            asking.check(activations)
            jobs_asked_for = [found.request for found in (*checked, *checked_activations)]
            check_gate_names(gates, checked, transform, plan)
            check_rule(allow_failure, ids_and_names([*before, *jobs_asked_for, *after]))
    except KNOWN_ERRORS as error:
        telling.refused(error)
        return refuse(error)  # type: ignore[return-value]  # Prefect takes a State for the result in it

    if progress is None:
        loading = asking.before_load(checked, transform, checked_activations)
        steps, trouble = run_before(
            before, interval, loading.message if loading and not loading.good else None
        )
        if trouble:
            progress = _hold_all(began, checked, transform, plan, checked_activations, trouble)
        else:
            progress = _load_and_build(began, checked, gates, transform, plan, checked_activations)
        progress = progress.after([*([loading] if loading else []), *steps])
    approved = asking.before_activations(progress)
    steps = [*progress.report.steps, *([approved] if approved else [])]
    steps += _activate(checked_activations, progress, approved)
    boxes = coloured(progress.report.boxes, progress.ends, steps)
    steps += run_after(after, steps, interval)
    report = progress.report.model_copy(update={"steps": steps, "boxes": boxes})
    report = conclude(report, allow_failure, began=progress.began)
    publish(report, "elt-report")
    telling.ended(report)
    return final_state(report)  # type: ignore[no-any-return]


def _load_and_build(
    began: datetime,
    syncs: Sequence[Checked[Any]],
    gates: Sequence[GateCheck],
    transform: Transform | None,
    plan: DbtPlan | None,
    activations: Sequence[Checked[Any]],
) -> Progress:
    """Syncs and transform, each as far as what is before it went well, and which activations are ready."""
    jobs = run_each(syncs)
    gate = Gate(plan, syncs, jobs)
    looked = look_at_gates(gates, gate, transform)
    gate.stay_shut(looked.findings)
    steps = [*steps_of(jobs), *looked.steps]
    nodes: list[DbtNode] = []
    if transform and plan:
        step, nodes = _transform(transform, plan, gate)
        steps.append(step)
    waiting, ready = _decide(activations, gate)
    boxes, edges, ends = picture(gate, [*steps, *waiting], [found.request for found in activations], nodes)
    report = EltReport(
        steps=steps,
        nodes=nodes,
        held_nodes=gate.held_nodes(),
        passed=looked.passed,
        boxes=boxes,
        edges=edges,
    )
    return Progress(began=began, report=report, activations=waiting, ready=ready, ends=ends)


def _hold_all(
    began: datetime,
    syncs: Sequence[Checked[Any]],
    transform: Transform | None,
    plan: DbtPlan | None,
    activations: Sequence[Checked[Any]],
    why: str,
) -> Progress:
    """A chain that is not begun."""
    steps = [Step.held("sync", found.request, why) for found in syncs]
    if transform and plan:
        steps.append(_transform_step(transform, plan, StepState.HELD, why))
    held = [Step.held("activation", found.request, why) for found in activations]
    return Progress(began=began, report=EltReport(steps=steps), activations=held)


def _transform(dbt: Transform, plan: DbtPlan, gate: Gate) -> tuple[Step, list[DbtNode]]:
    """Build what has fresh inputs."""
    held = gate.why_not_transform()
    if held:
        gate.transform_trouble = held
        step = _transform_step(dbt, plan, StepState.HELD, held)
        return step.model_copy(update={"because": gate.causes_of()}), []
    exclude = gate.exclude
    if exclude:
        get_run_logger().warning("dbt builds without %s", ", ".join(exclude))
    build = TRANSFORMS[dbt.tool].build.with_options(**dbt.task_options)
    found: Any = submit(build, dbt, exclude).result(raise_on_failure=False)
    if isinstance(found, DbtBuildFailed):
        found = found.result
    if not isinstance(found, DbtResult):
        step = _transform_step(dbt, plan, StepState.FAILED, str(found))
        gate.transform_trouble, gate.transform_key = "dbt did not run", step.key
        return step, []
    gate.built(found.nodes)
    state = StepState.FAILED if found.failed else StepState.PARTIAL if exclude else StepState.SUCCEEDED
    message = found.message
    if exclude:
        late = ", ".join(job.name for job in gate.late)
        message += f"; {len(gate.held_nodes())} more were not built, because of {late}"
    return _transform_step(dbt, plan, state, message, duration=found.duration), found.nodes


def _transform_step(
    dbt: Transform, plan: DbtPlan, state: StepState, message: str, *, duration: float | None = None
) -> Step:
    return Step(
        kind="transform",
        tool=dbt.tool,
        resource_id=plan.project,
        name=f"{dbt.what} ({plan.project})",
        state=state,
        owner=dbt.owner,
        duration=duration,
        message=message,
        # What it was asked to build without the late data, it built: the failure is the connection's.
        tolerated=state is StepState.PARTIAL,
    )


def _decide(activations: Sequence[Checked[Any]], gate: Gate) -> tuple[list[Step], list[str]]:
    """All activations as steps that are held back, with the reason if there is one, and which are ready."""
    steps: list[Step] = []
    ready: list[str] = []
    for found in activations:
        why = gate.why_not_activate(found.request)
        if why:
            get_run_logger().warning("held back: %s, because %s", found.request.label, why)
            steps.append(Step.held("activation", found.request, why, gate.causes_of(found.request)))
        else:
            steps.append(Step.held("activation", found.request, ""))
            ready.append(steps[-1].key)
    return steps, ready


def _activate(activations: Sequence[Checked[Any]], progress: Progress, approved: Step | None) -> list[Step]:
    """Run the activations that are ready, if nobody has anything against it."""
    if approved and not approved.good:
        why = str(approved.message)
        get_run_logger().warning("held back: %s, because %s", ", ".join(progress.ready), why)
        return progress.held(why, [approved.key])
    held = [Step.held("activation", found.request, "") for found in activations]
    ready = [found for found, step in zip(activations, held, strict=True) if step.key in progress.ready]
    done = iter(run_each(ready))
    known = {step.key: step for step in progress.activations}
    return [
        Step.of_job("activation", next(done)) if step.key in progress.ready else known.get(step.key, step)
        for step in held
    ]
