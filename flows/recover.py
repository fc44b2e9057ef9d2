"""Put a run whose process died on the schedule again, a bounded number of times.

Started by the automations in `deployments/automations.yaml`: when a run is reported as Crashed, and when its
heartbeats stop because the whole machine is gone and nobody is left to report it. The run attaches to the
jobs that it had started at the vendors. Another deployment of it looks, on a schedule, for what the
automations have missed, also because a rescue died itself. No blocks of its own; for runs whose parameters
name nobody to tell, those of its own `notify`.
"""

# No `from __future__ import annotations` here: see flows/elt.py.
from typing import Annotated, Literal
from uuid import UUID

from prefect import flow
from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterDeploymentId
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.client.schemas.sorting import FlowRunSort
from prefect.exceptions import ObjectNotFound
from prefect.logging import get_run_logger
from prefect.runtime import flow_run
from prefect.states import Completed
from pydantic import BaseModel, Field

from flows.alerts import tell_of_end, tell_of_run, tell_run_is_well
from flows.parameters import NotifyList
from tasks.environment import is_elsewhere, prefix_here
from tasks.incidents import GIVEN_UP, RUN
from tasks.missed import TRIES, begin, close_dead, missed
from tasks.rescue import (
    LEFT_ALONE,
    PENDING_FOR,
    close_task_runs,
    dead,
    declare_dead,
    last_sign,
    outlived,
    patience,
    reschedule,
    rescues,
    why_not,
)


class Rescue(BaseModel):
    """What became of a run.

    Attributes:
        flow_run_id: The run.
        did: What was done. `left alone` is a run that needs nothing; `given up` stays Crashed.
        why: The reason, in words.
        rescues: How often it has been rescued, this time included.
        closed: How many task runs of the dead attempt were still said to be running.
    """

    flow_run_id: UUID
    did: Literal["rescheduled", "given up", "left alone"]
    why: str
    rescues: int = 0
    closed: int = 0

    @property
    def state(self) -> State["Rescue"]:
        """The final state of the run that did it."""
        name = {"rescheduled": "Rescued", "given up": "GivenUp", "left alone": LEFT_ALONE}[self.did]
        return Completed(name=name, message=self.why, data=self)


class Sweep(BaseModel):
    """What was missed.

    Attributes:
        missed: The runs that were dead and that nobody saw to. A rescue of each was begun.
        exhausted: Those whose rescue has failed so often that it was not begun again.
        closed: The rescues and looks that had died themselves, and are Crashed now.
    """

    missed: list[UUID] = []
    exhausted: list[UUID] = []
    closed: list[UUID] = []

    @property
    def state(self) -> State["Sweep"]:
        """The final state of the run that looked."""
        message = f"{len(self.missed)} dead runs were missed, {len(self.closed)} rescues were dead themselves"
        if self.exhausted:
            message += f"; {len(self.exhausted)} runs are dead whose rescue fails and fails"
        return Completed(name="Looked", message=message, data=self)


def _run_name() -> str:
    flow_run_id = flow_run.parameters.get("flow_run_id")
    return f"recover {flow_run_id}" if flow_run_id else "look for what was missed"


# That it crashed is nobody's trouble: the next look begins it again.
@flow(name="recover", flow_run_name=_run_name, on_failure=[tell_of_end])
async def recover(
    flow_run_id: UUID | None = None,
    at_most: Annotated[int, Field(ge=0)] = 3,
    delay: Annotated[float, Field(ge=10)] = 15.0,
    silent_for: Annotated[float, Field(gt=0)] = 75.0,
    notify: NotifyList = [],  # noqa: B006 - never changed; a form shows it as an empty list
    pending_for: Annotated[float, Field(gt=0)] = PENDING_FOR,
    rescuer: str | None = None,
) -> Rescue | Sweep:
    """Rescue a run whose process died.

    One that is alive, cancelled, ended or rescued already is left alone, and so is one of another environment
    than this run's own.

    Args:
        flow_run_id: The run. Without one, `rescuer` says whose work is looked after.
        at_most: How often a run is rescued before it is given up. 0 only tells.
        delay: Seconds after which it is started again, the second time twice as many, and so on. At least 10:
            a worker reports a crash twice within some seconds, and the later report would undo the rescue.
        silent_for: Seconds without a heartbeat after which a run that says it is Running is dead. More than
            twice `PREFECT_FLOWS_HEARTBEAT_FREQUENCY` of whatever runs it. One that is said to have crashed is
            rescued when it has been silent for half of that.
        notify: Who is told of runs whose own parameters name nobody.
        pending_for: Seconds after which a run that is Pending is dead: as long as whatever runs it may take
            to come up.
        rescuer: Without a run: the name of the deployment of this flow that the automations start, without
            the environment's prefix. A rescue by it is begun of every run that it should have rescued by
            the automations on this server, and that no run of it has seen to.

    Returns:
        What was done, and why; without a run, what was missed.

    Raises:
        ValueError: There is neither a run nor a rescuer, or no such deployment.
    """
    async with get_client() as client:
        if flow_run_id is None:
            looked = await _sweep(client, rescuer, silent_for, pending_for, notify)
            return looked.state  # type: ignore[return-value]
        try:
            run = await client.read_flow_run(flow_run_id)
        except ObjectNotFound:
            return _left(flow_run_id, "it has been deleted").state  # type: ignore[return-value]
        if await is_elsewhere(client, run):
            return _left(flow_run_id, "it is of another environment").state  # type: ignore[return-value]
        crashed = await _crashed(client, run, patience(run, silent_for), pending_for)
        if crashed is None:
            run = await client.read_flow_run(flow_run_id)
            return _left(flow_run_id, _well(run)).state  # type: ignore[return-value]
        done = await _rescue(client, crashed, at_most, delay)
    if done.did != "left alone":
        await _tell(crashed, done, notify)
    return done.state  # type: ignore[return-value]  # Prefect takes a State for the result in it


async def _sweep(
    client: PrefectClient, rescuer: str | None, silent_for: float, pending_for: float, notify: NotifyList
) -> Sweep:
    """Begin what was missed, and say that the rescuing deployment is well if nothing was."""
    log, me = get_run_logger(), await client.read_flow_run(UUID(str(flow_run.id)))
    rescues = await _rescuer(client, rescuer)
    closed = await close_dead(client, rescues)
    if me.deployment_id and me.deployment_id != rescues:
        closed += await close_dead(client, me.deployment_id, but=me.id)
    found = await missed(client, rescues, silent_for, pending_for)
    for run in found.dead:
        log.warning("The run %s (%s) is dead, and nobody has seen to it", run.name, run.id)
        await begin(client, rescues, run)
    for run in found.exhausted:
        log.error("The run %s (%s) stays dead: %d rescues of it have failed", run.name, run.id, TRIES)
    if notify and me.deployment_id:
        await tell_run_is_well(me, log, notify)  # one that failed was told of
    newest = None if found.dead or found.exhausted else await _newest(client, rescues)
    if notify and newest and newest.state and newest.state.is_final():  # how another goes is not known yet
        await tell_run_is_well(newest, log, notify)
    return Sweep(
        missed=[run.id for run in found.dead],
        exhausted=[run.id for run in found.exhausted],
        closed=closed,
    )


async def _rescuer(client: PrefectClient, name: str | None) -> UUID:
    """The deployment that rescues, of this environment."""
    if name is None:
        raise ValueError(
            "There is neither a run to rescue (`flow_run_id`) nor a deployment that rescues (`rescuer`), "
            "such as dead-runs."
        )
    full = f"{recover.name}/{prefix_here()}{name}"
    try:
        return (await client.read_deployment_by_name(full)).id
    except ObjectNotFound:
        raise ValueError(
            f"`rescuer`: there is no deployment {full} on this server, so nobody rescues."
        ) from None


async def _newest(client: PrefectClient, deployment_id: UUID) -> FlowRun | None:
    """The newest run of a deployment: incidents are its deployment's, whichever of its runs speaks."""
    found = await client.read_flow_runs(
        flow_run_filter=FlowRunFilter(deployment_id=FlowRunFilterDeploymentId(any_=[deployment_id])),
        sort=FlowRunSort.EXPECTED_START_TIME_DESC,
        limit=1,
    )
    return found[0] if found else None


async def _crashed(
    client: PrefectClient, run: FlowRun, silent_for: float, pending_for: float
) -> FlowRun | None:
    """The run in its state Crashed, if it is that or ought to be."""
    if run.state and run.state.is_crashed():
        if await outlived(client, run, silent_for / 2):
            return None
        run = await client.read_flow_run(run.id)
        return run if run.state and run.state.is_crashed() else None
    silent = await dead(client, run, silent_for, pending_for)
    if silent is None:
        return None
    since = await last_sign(client, silent)
    why = f"No sign of life since {since:%Y-%m-%d %H:%M:%S} UTC: its process, or its machine, is gone."
    await declare_dead(client, silent, why)
    now = await client.read_flow_run(run.id)
    return now if now.state and now.state.is_crashed() else None


async def _rescue(client: PrefectClient, run: FlowRun, at_most: int, delay: float) -> Rescue:
    """Put a crashed run on the schedule again, if it may be."""
    so_far = await rescues(client, run)
    done = Rescue(flow_run_id=run.id, did="given up", why="", rescues=so_far)
    done.closed = await close_task_runs(client, run, "The process of the run died.")
    if run.deployment_id is None and run.parent_task_run_id:
        return _left(run.id, "it is part of another run, which does it again when it is rescued itself")
    reason = await why_not(client, run)
    if reason is None and so_far >= at_most:
        times = "1 time" if so_far == 1 else f"{so_far} times"
        reason = f"it has been rescued {times}, and more is not allowed"
        reason = reason if so_far else "rescues are not allowed (`at_most` is 0)"
    if reason:
        return done.model_copy(update={"why": reason})
    wait = delay * 2**so_far
    why = f"it is started again in {wait:g} s, rescue {so_far + 1} of {at_most}"
    if not await reschedule(client, run, wait, f"Its process died; {why}."):
        return _left(run.id, "somebody else has just rescued it")
    return done.model_copy(update={"did": "rescheduled", "rescues": so_far + 1, "why": why})


async def _tell(run: FlowRun, done: Rescue, notify: NotifyList) -> None:
    given_up = done.did == "given up" and done.rescues > 0
    said = run.state.message if run.state and run.state.message else "Its process died."
    await tell_of_run(
        run,
        "was given up" if given_up else "crashed",
        f"{said} {done.why[0].upper()}{done.why[1:]}.",
        get_run_logger(),
        key=GIVEN_UP if given_up else RUN,
        otherwise=notify,
    )


def _left(flow_run_id: UUID, why: str) -> Rescue:
    return Rescue(flow_run_id=flow_run_id, did="left alone", why=why)


def _well(run: FlowRun) -> str:
    """Why a run needs no rescue, in words."""
    if run.state is None:
        return "it has no state"
    if run.state.type in (StateType.PENDING, StateType.RUNNING, StateType.CRASHED):
        return "it is alive"
    return f"it is {run.state.name}"
