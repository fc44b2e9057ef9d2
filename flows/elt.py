"""The whole chain as one run: syncs, then the dbt build, then activations, then the people.

For the daily load, and for a load that an event asks for. Its blocks: an Airbyte Server, a Hightouch
Credentials, and a Slack Incoming Webhook per channel.
"""

# No `from __future__ import annotations` here: `serve()` sends the flow to its process as a pickle, in which
# the types of its parameters are found only if they are more than text.
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Annotated, Any

from prefect import flow
from prefect.logging import get_run_logger
from pydantic import Field

from flows.fan_out import (
    KNOWN_ERRORS,
    check_syncs,
    checked_syncs,
    conclude,
    final_state,
    map_each,
    publish,
    refuse,
    run_syncs,
    steps_of,
    submit,
)
from flows.gate import Gate
from flows.picture import picture
from flows.report import EltReport, Step, StepState, messages
from flows.rules import AllowFailure, check_rule
from tasks.airbyte import AirbyteSync
from tasks.cancellation import cancel_open_jobs
from tasks.dbt_core import DbtBuildFailed, DbtCore, DbtNode, DbtPlan, DbtResult, dbt_build, dbt_plan
from tasks.hightouch import HightouchSync, hightouch_check, hightouch_sync
from tasks.jobs import EventLoopTaskRunner, limit_concurrency
from tasks.slack import SlackNotify, slack_check, slack_message


@flow(name="elt-chain", task_runner=EventLoopTaskRunner(), on_cancellation=[cancel_open_jobs])
def elt_chain(
    syncs: list[AirbyteSync],
    transform: DbtCore | None = None,
    activations: list[HightouchSync] = [],  # noqa: B006 - never changed; a form shows it as an empty list
    notify: SlackNotify | None = None,
    allow_failure: AllowFailure = "none",
    max_concurrency: Annotated[int, Field(ge=1)] = 100,
) -> EltReport:
    """Sync, transform, activate and tell, with failure following lineage.

    Everything is looked up before anything is started. When a connection fails, the others finish, dbt
    builds all that is not downstream of it, and activations on what was not built are held back with the
    reason. Safe to retry: nothing that succeeded is done again.

    Args:
        syncs: The connections, each with its server, owner and policy.
        transform: The dbt project, and what to build of it.
        activations: The Hightouch syncs that run after it.
        notify: Who is told on Slack.
        allow_failure: How much failure the run may bear: `none`, `any`, `{"at_most": n}` or
            `{"required": [ids or names]}`. Only the final state depends on it.
        max_concurrency: How many tasks may run at the same time.

    Returns:
        Every step with its outcome. The run is Completed if everything was done, and PartiallyRefreshed (a
        Completed state) if the rule bears what was not.

    Raises:
        RunFailed: Something failed that the rule does not bear; `.report` has every outcome.
        InputError, BlockNotFound, DbtError, VendorError: What was asked for can't be run, and nothing was
            started.
    """
    limit_concurrency(max_concurrency)
    began = datetime.now(UTC)
    try:
        # All at the same time; whichever finds something, nothing has been started yet.
        looking_up = check_syncs(syncs)
        planning = submit(dbt_plan, transform) if transform else None
        checking = submit(hightouch_check, activations) if activations else None
        webhooks = submit(slack_check, notify) if notify else None
        checked = checked_syncs(looking_up, allow_failure)
        plan = planning.result() if planning else None
        activations = checking.result() if checking else []
        if webhooks:
            webhooks.result()
        in_run = [(found.sync.connection_id, found.sync.name) for found in checked]
        check_rule(allow_failure, in_run + [(sync.sync_id, sync.name) for sync in activations])
    except KNOWN_ERRORS as error:
        return refuse(error)  # type: ignore[return-value]  # Prefect takes a State for the result in it

    jobs = run_syncs(checked)
    gate = Gate(plan, checked, jobs)
    steps = steps_of(jobs)
    nodes: list[DbtNode] = []
    if transform and plan:
        step, nodes = _transform(transform, plan, gate)
        steps.append(step)
    steps += _activate(activations, gate)

    boxes, edges = picture(gate, steps, activations, nodes)
    report = EltReport(steps=steps, nodes=nodes, held_nodes=gate.held_nodes(), boxes=boxes, edges=edges)
    report = conclude(report, allow_failure, began=began)
    publish(report, "elt-report")
    if notify:
        _tell(notify, report)
    return final_state(report)  # type: ignore[no-any-return]


def _transform(dbt: DbtCore, plan: DbtPlan, gate: Gate) -> tuple[Step, list[DbtNode]]:
    """Build what has fresh inputs."""
    held = gate.why_not_transform()
    if held:
        gate.transform_trouble = held
        return _transform_step(dbt, plan, StepState.HELD, held), []
    exclude = gate.exclude
    if exclude:
        get_run_logger().warning("dbt builds without %s", ", ".join(exclude))
    build = dbt_build.with_options(**dbt.task_options)
    found: Any = submit(build, dbt, exclude).result(raise_on_failure=False)
    if isinstance(found, DbtBuildFailed):
        found = found.result
    if not isinstance(found, DbtResult):
        gate.transform_trouble = "dbt did not run"
        return _transform_step(dbt, plan, StepState.FAILED, str(found)), []
    gate.built(found.nodes)
    state = StepState.FAILED if found.failed else StepState.PARTIAL if exclude else StepState.SUCCEEDED
    message = found.message
    if exclude:
        late = ", ".join(job.name for job in gate.late)
        message += f"; {len(gate.held_nodes())} more were not built, because {late} did not land"
    return _transform_step(dbt, plan, state, message, duration=found.duration), found.nodes


def _transform_step(
    dbt: DbtCore, plan: DbtPlan, state: StepState, message: str, *, duration: float | None = None
) -> Step:
    return Step(
        kind="transform",
        tool="dbt",
        resource_id=plan.project,
        name=f"{dbt.what} ({plan.project})",
        state=state,
        owner=dbt.owner,
        duration=duration,
        message=message,
        # What it was asked to build without the late data, it built: the failure is the connection's.
        tolerated=state is StepState.PARTIAL,
    )


def _activate(activations: Sequence[HightouchSync], gate: Gate) -> list[Step]:
    """Run the activations whose inputs are fresh; hold the others back, with the reason."""
    held = {sync.sync_id: why for sync in activations if (why := gate.why_not_activate(sync))}
    done = iter(map_each(hightouch_sync, [sync for sync in activations if sync.sync_id not in held]))
    steps: list[Step] = []
    for sync in activations:
        if why := held.get(sync.sync_id):
            get_run_logger().warning("held back: %s, because %s", sync.label, why)
            steps.append(
                Step(
                    kind="activation",
                    tool=sync.tool,
                    resource_id=sync.sync_id,
                    name=sync.label,
                    owner=sync.owner,
                    state=StepState.HELD,
                    message=why,
                )
            )
        else:
            steps.append(Step.of_job("activation", next(done)))
    return steps


def _tell(notify: SlackNotify, report: EltReport) -> None:
    """Tell the owners. What can't be delivered is in the log and changes nothing."""
    for message in messages(report, always=notify.on == "always"):
        webhook = notify.owners.get(message.owner or "", notify.webhook)
        submit(slack_message, webhook, message.text, to=message.owner or "everybody").wait()
