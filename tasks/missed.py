"""Runs that a rescue is due for and that nobody is rescuing: its own run died, or its event was lost.

An automation tells of a death once. Should the run that it starts die as well, or the server be restarted
between the two, nothing is told again; so somebody looks, every now and then, for what was missed. Which
flows are looked for, and whether at all, is what the automations on the server say that start the same
deployment: what is switched off there is not done here.
"""

from __future__ import annotations

import asyncio
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
from tasks.rescue import PENDING_FOR, declare_dead, last_sign, patience

LOOK_BACK = timedelta(hours=24)
"""A run that crashed longer ago is nobody's surprise any more: it is not started again."""

TRIES = 5
"""How many rescues of one death may fail before they are no longer begun."""

RESCUE_TAKES = timedelta(minutes=30)
"""A rescue that says for longer that it goes on is dead. It watches for minutes at most."""

_LATE = 2.0  # times its patience: what is younger than that the automations are about to see to
_PAGE = 200
_AT_ONCE = 10
_ALIVE = [StateType.PENDING, StateType.RUNNING]


async def missed(
    client: PrefectClient, deployment_id: UUID, silent_for: float, pending_for: float = PENDING_FOR
) -> list[FlowRun]:
    """The runs of the watched flows that are dead and that no run of the rescuing deployment sees to.

    Args:
        client: Prefect's client.
        deployment_id: The deployment that rescues.
        silent_for: Seconds without a sign of life after which a run is dead.
        pending_for: Seconds after which one that is Pending is.
    """
    rescuer = await client.read_deployment(deployment_id)
    flows = await watched(client, deployment_id)
    if not flows:
        return []
    since = datetime.now(UTC) - LOOK_BACK
    # What died before anybody was there to rescue it is not started by the first that comes.
    since = max(since, rescuer.created or since)
    found = [
        *await _runs(client, flows, [StateType.CRASHED], since=since),
        *await _runs(client, flows, _ALIVE),
    ]
    slots = asyncio.Semaphore(_AT_ONCE)

    async def due(run: FlowRun) -> bool:
        async with slots:
            return await _due(client, run, silent_for, pending_for)

    dues = await asyncio.gather(*(due(run) for run in found))
    dead = [run for run, is_due in zip(found, dues, strict=True) if is_due]
    dead = [run for run in dead if not await is_elsewhere(client, run)]
    if not dead:
        return []
    rescuing = await rescues_of(client, deployment_id)
    return [run for run in dead if not _seen_to(run, rescuing)]


async def watched(client: PrefectClient, deployment_id: UUID) -> list[str]:
    """The names of the flows whose runs the automations of this server have a deployment look at."""
    names: set[str] = set()
    for automation in await client.read_resource_related_automations(f"prefect.deployment.{deployment_id}"):
        trigger = automation.trigger
        starts = any(
            isinstance(action, RunDeployment) and action.deployment_id == deployment_id
            for action in automation.actions
        )
        if automation.enabled and starts and isinstance(trigger, EventTrigger):
            related = trigger.match_related
            for resource in related if isinstance(related, list) else [related]:
                said = dict(ResourceSpecification.model_validate(resource).items())
                if said.get("prefect.resource.role") == ["flow"]:
                    names.update(said.get("prefect.resource.name", []))
    return sorted(names)


async def begin(client: PrefectClient, deployment_id: UUID, run: FlowRun) -> None:
    """Start the rescue of a run that was missed. Of two that do so at once, one does."""
    assert run.state is not None  # noqa: S101 - it is dead
    minute = datetime.now(UTC).replace(second=0, microsecond=0)
    await client.create_flow_run_from_deployment(
        deployment_id,
        parameters={"flow_run_id": str(run.id)},
        idempotency_key=f"missed {run.id} {run.state.id} {minute:%H:%M}",
    )


async def close_dead_rescues(client: PrefectClient, deployment_id: UUID) -> list[UUID]:
    """Mark as Crashed what runs of the rescuing deployment have died themselves.

    Returns:
        Which those were.
    """
    closed: list[UUID] = []
    for rescue in await rescues_of(client, deployment_id):
        if rescue.state is None or rescue.state.type not in _ALIVE or _going_on(rescue):
            continue
        if datetime.now(UTC) - await last_sign(client, rescue) > RESCUE_TAKES:
            await declare_dead(client, rescue, "It died while it rescued another; that is begun anew.")
            closed.append(rescue.id)
    return closed


async def _due(client: PrefectClient, run: FlowRun, silent_for: float, pending_for: float) -> bool:
    """Whether the automations should have begun to rescue it by now."""
    if run.state is None or (run.deployment_id is None and run.parent_task_run_id):
        return False  # that is rescued with the run that it is part of
    silent_for = patience(run, silent_for)
    late = timedelta(seconds=_LATE * silent_for)
    now = datetime.now(UTC)
    if run.state.is_crashed():
        return now - run.state.timestamp > late
    if run.state.is_pending():
        return now - run.state.timestamp > timedelta(seconds=pending_for) + late
    if now - run.state.timestamp <= late:
        return False
    return now - await last_sign(client, run) > late


def _seen_to(run: FlowRun, rescues: list[FlowRun]) -> bool:
    """Whether a rescue of this death is going on, has been done, or has been tried often enough."""
    assert run.state is not None  # noqa: S101 - it is dead
    of_run = [one for one in rescues if one.parameters.get("flow_run_id") == str(run.id) and one.state]
    if any(_going_on(one) for one in of_run):
        return True
    since = [one for one in of_run if one.state and one.state.timestamp > run.state.timestamp]
    done = any(one.state.is_completed() or one.state.is_cancelled() for one in since if one.state)
    return (run.state.is_crashed() and done) or len(since) >= TRIES


def _going_on(rescue: FlowRun) -> bool:
    """Whether a rescue waits to be started or runs, and not since ever: then it is dead itself."""
    assert rescue.state is not None  # noqa: S101 - it was read with one
    if rescue.state.is_scheduled():
        return True
    alive = rescue.state.type in _ALIVE
    return alive and datetime.now(UTC) - rescue.state.timestamp < RESCUE_TAKES


async def _runs(
    client: PrefectClient, flows: list[str], types: list[StateType], since: datetime | None = None
) -> list[FlowRun]:
    """All runs of these flows in states of these types, and that ended after a time."""
    return await _read(
        client,
        FlowRunFilter(
            state=FlowRunFilterState(type=FlowRunFilterStateType(any_=types)),
            end_time=FlowRunFilterEndTime(after_=since) if since else None,
        ),
        FlowFilter(name=FlowFilterName(any_=flows)),
    )


async def rescues_of(client: PrefectClient, deployment_id: UUID) -> list[FlowRun]:
    """The runs of the rescuing deployment that are to come, go on, or have ended lately."""
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
