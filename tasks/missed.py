"""Runs that a rescue is due for and that nobody is rescuing: its own run died, or its event was lost.

An automation tells of a death once. Should the run that it starts die as well, or the server be restarted
between the two, nothing is told again; so somebody looks, every now and then, for what was missed. The runs
of which flows are looked at, and for which kind of death, is what the automations on the server say that
start the rescuing deployment: what is switched off there is not done here.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from uuid import UUID

from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.filters import (
    FlowFilter,
    FlowFilterName,
    FlowRunFilter,
    FlowRunFilterDeploymentId,
    FlowRunFilterEndTime,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.client.schemas.sorting import FlowRunSort
from prefect.events.actions import RunDeployment
from prefect.events.schemas.automations import EventTrigger
from prefect.events.schemas.events import ResourceSpecification

from tasks.environment import is_elsewhere
from tasks.rescue import HEARTBEAT, LEFT_ALONE, PENDING_FOR, declare_dead, last_sign, patience

LOOK_BACK = timedelta(hours=24)
"""What died longer ago is nobody's surprise any more: it is not started again."""

TRIES = 5
"""How many rescues of one death may fail before they are no longer begun."""

RESCUE_TAKES = timedelta(minutes=30)
"""A rescue that says for longer that it goes on is dead. It watches for minutes at most."""

_LATE = 2.0  # times its patience: what is younger than that the automations are about to see to
_PAGE = 200
_AT_ONCE = 10
_ALIVE = [StateType.PENDING, StateType.RUNNING]
# What the automations go by: the events of a crash, of a run that is silent, and of one that never began.
_CRASHED = {"prefect.flow-run.Crashed"}
_BEATS = {HEARTBEAT}
_TO_BEGIN = {"prefect.flow-run.Pending", "prefect.flow-run.Submitting"}


@dataclass
class Watched:
    """The flows whose runs the automations that are on have a deployment look at, by the kind of death.

    Attributes:
        crashed: Those whose runs are rescued when they are said to have crashed.
        running: Those whose runs are when they say that they are Running, and are silent.
        pending: Those whose runs are when they never begin.
        pending_for: Seconds for which the automations wait for a run to begin.
    """

    crashed: set[str] = field(default_factory=set)
    running: set[str] = field(default_factory=set)
    pending: set[str] = field(default_factory=set)
    pending_for: float = 0.0


@dataclass
class Missed:
    """The dead runs that no rescue is on its way to.

    Attributes:
        dead: Those whose rescue is to be begun.
        exhausted: Those whose rescue has failed so often that it is no longer begun.
    """

    dead: list[FlowRun] = field(default_factory=list)
    exhausted: list[FlowRun] = field(default_factory=list)


async def missed(
    client: PrefectClient, deployment_id: UUID, silent_for: float, pending_for: float = PENDING_FOR
) -> Missed:
    """The runs of the watched flows that are dead and that no run of the rescuing deployment sees to.

    Args:
        client: Prefect's client.
        deployment_id: The deployment that rescues.
        silent_for: Seconds without a sign of life after which a run is dead.
        pending_for: Seconds after which one that is Pending is. The automations may be more patient.
    """
    rescuer = await client.read_deployment(deployment_id)
    flows = await watched(client, deployment_id)
    pending_for = max(pending_for, flows.pending_for)
    since = datetime.now(UTC) - LOOK_BACK
    # What died before anybody was there to rescue it is not started by the first that comes.
    since = max(since, rescuer.created or since)
    found = [
        *await _runs(client, flows.crashed, StateType.CRASHED, since=since),
        *await _runs(client, flows.running, StateType.RUNNING),
        *await _runs(client, flows.pending, StateType.PENDING),
    ]
    slots = asyncio.Semaphore(_AT_ONCE)

    async def due(run: FlowRun) -> bool:
        async with slots:
            return await _due(client, run, silent_for, pending_for, since)

    dues = await asyncio.gather(*(due(run) for run in found))
    dead = [run for run, is_due in zip(found, dues, strict=True) if is_due]
    dead = [run for run in dead if not await is_elsewhere(client, run)]
    if not dead:
        return Missed()
    rescuing = await rescues_of(client, deployment_id)
    left = [(run, _failures(run, rescuing)) for run in dead if not _seen_to(run, rescuing)]
    return Missed(
        dead=[run for run, failures in left if failures < TRIES],
        exhausted=[run for run, failures in left if failures >= TRIES],
    )


async def watched(client: PrefectClient, deployment_id: UUID) -> Watched:
    """Whose runs the automations of this server that are on have a deployment look at, and why."""
    found = Watched()
    for automation in await client.read_resource_related_automations(f"prefect.deployment.{deployment_id}"):
        trigger = automation.trigger
        starts = any(
            isinstance(action, RunDeployment) and action.deployment_id == deployment_id
            for action in automation.actions
        )
        if not (automation.enabled and starts and isinstance(trigger, EventTrigger)):
            continue
        names = _flows_of(trigger)
        if trigger.expect & _CRASHED:
            found.crashed |= names
        if trigger.after & _BEATS:
            found.running |= names
        if trigger.after & _TO_BEGIN:
            found.pending |= names
            found.pending_for = max(found.pending_for, trigger.within.total_seconds())
    return found


def _flows_of(trigger: EventTrigger) -> set[str]:
    """The names of the flows that a trigger is about."""
    names: set[str] = set()
    related = trigger.match_related
    for resource in related if isinstance(related, list) else [related]:
        said = dict(ResourceSpecification.model_validate(resource).items())
        if said.get("prefect.resource.role") == ["flow"]:
            names.update(said.get("prefect.resource.name", []))
    return names


async def begin(client: PrefectClient, deployment_id: UUID, run: FlowRun) -> None:
    """Start the rescue of a run that was missed. Of two that do so at once, one does."""
    assert run.state is not None  # noqa: S101 - it is dead
    minute = datetime.now(UTC).replace(second=0, microsecond=0)
    await client.create_flow_run_from_deployment(
        deployment_id,
        parameters={"flow_run_id": str(run.id)},
        idempotency_key=f"missed {run.id} {run.state.id} {minute:%H:%M}",
    )


async def close_dead(client: PrefectClient, deployment_id: UUID, but: UUID | None = None) -> list[UUID]:
    """Mark as Crashed what runs of a deployment of `recover` have died themselves.

    Args:
        client: Prefect's client.
        deployment_id: The deployment, one that rescues or one that looks for what was missed.
        but: A run that is alive: the one that asks.

    Returns:
        Which those were.
    """
    closed: list[UUID] = []
    for rescue in await rescues_of(client, deployment_id):
        alive = rescue.state is not None and rescue.state.type in _ALIVE
        if not alive or rescue.id == but or _going_on(rescue):
            continue
        if datetime.now(UTC) - await last_sign(client, rescue) > RESCUE_TAKES:
            await declare_dead(client, rescue, "It died; what it was to do is begun anew.")
            closed.append(rescue.id)
    return closed


async def _due(
    client: PrefectClient, run: FlowRun, silent_for: float, pending_for: float, since: datetime
) -> bool:
    """Whether the automations should have begun to rescue it by now, and it has died since a time."""
    if run.state is None or (run.deployment_id is None and run.parent_task_run_id):
        return False  # that is rescued with the run that it is part of
    silent_for = patience(run, silent_for)
    late = timedelta(seconds=_LATE * silent_for)
    now = datetime.now(UTC)
    if run.state.is_crashed():
        return await last_sign(client, run) < now - late  # a process may outlive the report of its death
    if run.state.is_pending():
        return since < run.state.timestamp < now - timedelta(seconds=pending_for) - late
    if now - run.state.timestamp <= late:
        return False
    # It may have begun long before that: a load of days is as dead as any when it falls silent.
    return since < await last_sign(client, run) < now - late


def _seen_to(run: FlowRun, rescues: list[FlowRun]) -> bool:
    """Whether a rescue of this death goes on, has been done, or was called off by somebody."""
    assert run.state is not None  # noqa: S101 - it is dead
    states = [one.state for one in _since(run, rescues) if one.state]
    if any(_going_on(one) for one in rescues if _of(one, run)):
        return True
    # One that found it alive has not seen to what came after.
    done = run.state.is_crashed() and any(
        state.is_completed() and state.name != LEFT_ALONE for state in states
    )
    return done or any(state.is_cancelled() for state in states)


def _failures(run: FlowRun, rescues: list[FlowRun]) -> int:
    """How many rescues of this death have failed or died."""
    states = [one.state for one in _since(run, rescues) if one.state]
    return sum(state.is_failed() or state.is_crashed() for state in states)


def _since(run: FlowRun, rescues: list[FlowRun]) -> list[FlowRun]:
    """The rescues of a run that came to their state after it came to its own."""
    assert run.state is not None  # noqa: S101 - it is dead
    died = run.state.timestamp
    return [one for one in rescues if _of(one, run) and one.state and one.state.timestamp > died]


def _of(rescue: FlowRun, run: FlowRun) -> bool:
    return rescue.state is not None and rescue.parameters.get("flow_run_id") == str(run.id)


def _going_on(rescue: FlowRun) -> bool:
    """Whether a rescue waits to be started or runs, and not since ever: then it is dead itself."""
    assert rescue.state is not None  # noqa: S101 - it was read with one
    if rescue.state.is_scheduled():
        return True
    alive = rescue.state.type in _ALIVE
    return alive and datetime.now(UTC) - rescue.state.timestamp < RESCUE_TAKES


async def _runs(
    client: PrefectClient, flows: set[str], kind: StateType, since: datetime | None = None
) -> list[FlowRun]:
    """All runs of these flows in states of this type, and that ended after a time."""
    if not flows:
        return []
    return await _read(
        client,
        FlowRunFilter(
            state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[kind])),
            end_time=FlowRunFilterEndTime(after_=since) if since else None,
        ),
        FlowFilter(name=FlowFilterName(any_=sorted(flows))),
    )


async def rescues_of(client: PrefectClient, deployment_id: UUID) -> list[FlowRun]:
    """The runs of a deployment that are to come, go on, or have ended lately."""
    mine = FlowRunFilterDeploymentId(any_=[deployment_id])
    to_come = FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.SCHEDULED, *_ALIVE]))
    ended = FlowRunFilterEndTime(after_=datetime.now(UTC) - LOOK_BACK)
    return [
        *await _read(client, FlowRunFilter(deployment_id=mine, state=to_come)),
        *await _read(client, FlowRunFilter(deployment_id=mine, end_time=ended)),
    ]


async def _read(client: PrefectClient, wanted: FlowRunFilter, of: FlowFilter | None = None) -> list[FlowRun]:
    found: list[FlowRun] = []
    while True:
        page = await client.read_flow_runs(
            flow_filter=of,
            flow_run_filter=wanted,
            sort=FlowRunSort.ID_DESC,
            limit=_PAGE,
            offset=len(found),
        )
        found += page
        if len(page) < _PAGE:
            return found
