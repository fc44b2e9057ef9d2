"""Flow runs whose process died: telling them from the living, and putting them on the schedule again.

A flow run emits `prefect.flow-run.heartbeat` as soon as it is Running and then every
`PREFECT_FLOWS_HEARTBEAT_FREQUENCY` seconds (180 by default, 30 at least). Its last sign of life is the later
of its last heartbeat and its last change of state. How often a run has been rescued is not counted anywhere
but in its own history of states, in which every rescue is a state of the name `Rescheduled`: what is counted
and what counts can't fall apart, whoever reads it, on whatever machine.

Documentation: https://docs.prefect.io/v3/advanced/detect-zombie-flows
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid5

from prefect.client.orchestration import PrefectClient
from prefect.client.schemas import OrchestrationResult
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterId,
    TaskRunFilter,
    TaskRunFilterState,
    TaskRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, State, StateType, TaskRun
from prefect.client.schemas.responses import SetStateStatus
from prefect.exceptions import ObjectNotFound
from prefect.states import Crashed, Scheduled, to_state_create

from tasks.last_event import last_event

HEARTBEAT = "prefect.flow-run.heartbeat"

RESCHEDULED = "Rescheduled"
"""Name of the state in which a rescued run waits to be started again."""

LEFT_ALONE = "LeftAlone"
"""Name of the final state of a rescue that found nothing to do at that moment."""

SCRIPT_HEARTBEAT = 180.0
"""Seconds between the heartbeats of a run in a script: Prefect's default."""

PENDING_FOR = 900.0
"""Seconds after which a run that is Pending is dead: a container may take minutes to come up."""

_LOOK = 5.0  # seconds between two looks at a run that may be alive
_LAG = timedelta(seconds=1)  # between the death of a process and its report, by two clocks
_PAGE = 200
_AT_ONCE = 10
_OPEN = [StateType.PENDING, StateType.RUNNING]


def patience(run: FlowRun, silent_for: float) -> float:
    """Seconds of silence after which a run is dead: one in a script has heartbeats more rarely."""
    return silent_for if run.deployment_id else max(silent_for, 2.5 * SCRIPT_HEARTBEAT)


async def last_sign(client: PrefectClient, run: FlowRun) -> datetime:
    """When a flow run was last known to be alive: its last heartbeat, or its last change of state.

    Args:
        client: Prefect's client.
        run: The flow run, as it was read last.
    """
    since = run.state.timestamp if run.state else run.created or datetime.now(UTC)
    return await _last_beat(client, run, since) or since


async def outlived(client: PrefectClient, run: FlowRun, patience: float) -> bool:
    """Whether a run goes on that is said to have crashed: its heartbeats come after the report, and still do.

    A worker reports the death of what it has started, which may be another process than the flow's own. A
    server that was away has missed heartbeats that were sent: they may come again.

    Args:
        client: Prefect's client.
        run: The run, Crashed.
        patience: Seconds after the report for which heartbeats are waited for, after the last of them for
            which it counts, and after that for which another is waited for; more than one heartbeat.
    """
    assert run.state is not None  # noqa: S101 - it is Crashed
    crashed = run.state.timestamp
    left = patience - (datetime.now(UTC) - crashed).total_seconds()
    if left > 0:
        await asyncio.sleep(left)
    beat = last = await _last_beat(client, run, crashed + _LAG)
    if beat is None or (datetime.now(UTC) - beat).total_seconds() < patience:
        return beat is not None
    watched = datetime.now(UTC) + timedelta(seconds=patience)
    while last == beat and (left := (watched - datetime.now(UTC)).total_seconds()) > 0:
        await asyncio.sleep(min(left, _LOOK))
        last = await _last_beat(client, run, crashed + _LAG)
    return last != beat


async def _last_beat(client: PrefectClient, run: FlowRun, since: datetime) -> datetime | None:
    return await last_event(client, [HEARTBEAT], f"prefect.flow-run.{run.id}", since)


async def dead(
    client: PrefectClient, run: FlowRun, silent_for: float, pending_for: float = PENDING_FOR
) -> FlowRun | None:
    """The run, if its process is dead.

    It is watched for half of `silent_for` at least, because a server that was away has missed heartbeats that
    were sent. One that has only just begun to be Pending is not waited for: when its time is up, somebody
    asks again.

    Args:
        client: Prefect's client.
        run: A flow run that says of itself that it is Pending or Running.
        silent_for: Seconds without a sign of life after which nobody is alive; more than two heartbeats.
        pending_for: Seconds after which a run that is Pending will never begin. It has no heartbeats, and its
            infrastructure may take minutes to come up.

    Returns:
        The run as it is now, Pending or Running, without a process. None if it is alive or in another state.
    """
    began = datetime.now(UTC)
    watched = began + timedelta(seconds=silent_for / 2)
    while run.state and run.state.type in _OPEN:
        sign = await last_sign(client, run)
        if sign > began:
            return None
        silence = timedelta(seconds=pending_for if run.state.is_pending() else silent_for)
        left = (max(sign + silence, watched) - datetime.now(UTC)).total_seconds()
        if left <= 0:
            return run
        if run.state.is_pending() and left > silent_for:
            return None
        await asyncio.sleep(min(left, _LOOK))
        run = await client.read_flow_run(run.id)
    return None


async def declare_dead(client: PrefectClient, run: FlowRun, why: str) -> bool:
    """Mark a run as Crashed that can't say so itself.

    Returns:
        Whether it is; False if it has ended meanwhile.
    """
    done = await _set_state(client, run, Crashed(message=why))
    return done.status is SetStateStatus.ACCEPT


async def close_task_runs(client: PrefectClient, run: FlowRun, why: str) -> int:
    """Mark as Crashed what a dead attempt has left Pending or Running, so that the UI tells the truth.

    Args:
        client: Prefect's client.
        run: The run, Crashed. What has begun since is of another attempt, and left alone.
        why: What the task runs' states say.

    Returns:
        How many task runs that were.
    """
    assert run.state is not None  # noqa: S101 - it is Crashed
    left = TaskRunFilter(state=TaskRunFilterState(type=TaskRunFilterStateType(any_=_OPEN)))
    of_run = FlowRunFilter(id=FlowRunFilterId(any_=[run.id]))
    found: list[TaskRun] = []
    while True:
        page = await client.read_task_runs(
            flow_run_filter=of_run, task_run_filter=left, limit=_PAGE, offset=len(found)
        )
        found += page
        if len(page) < _PAGE:
            break
    crashed = run.state.timestamp
    ids = [task.id for task in found if task.state is None or task.state.timestamp <= crashed]
    slots = asyncio.Semaphore(_AT_ONCE)

    async def close(task_run_id: UUID) -> None:
        async with slots:
            await client.set_task_run_state(task_run_id, Crashed(message=why), force=True)

    await asyncio.gather(*(close(task_run_id) for task_run_id in ids))
    return len(ids)


async def rescues(client: PrefectClient, run: FlowRun) -> int:
    """How often a run has been rescued since it was last to be retried for another reason."""
    states: Sequence[State[Any]] = await client.read_flow_run_states(run.id)
    count = 0
    for state in sorted(states, key=lambda state: state.timestamp):
        if state.name == RESCHEDULED:
            count += 1
        elif state.name == "AwaitingRetry":  # by a person, or by the flow's own `retries`
            count = 0
    return count


async def why_not(client: PrefectClient, run: FlowRun) -> str | None:
    """Why a run can't be put on the schedule again, in words; None if it can."""
    if run.deployment_id is None:
        return "it is of no deployment, so nobody but whoever started it can start it again"
    try:
        deployment = await client.read_deployment(run.deployment_id)
    except ObjectNotFound:
        return "its deployment is gone"
    return f"its deployment {deployment.name} is paused" if deployment.paused else None


async def reschedule(client: PrefectClient, run: FlowRun, delay: float, message: str) -> bool:
    """Put a crashed run on the schedule again.

    That the run is still in the state in which it was read is seen to by Prefect as far as it can be: two
    attempts to reschedule the same crash have the same transition id, and the second is refused.

    Args:
        client: Prefect's client.
        run: The run, Crashed.
        delay: Seconds from now. Long enough for the worker's own report of the crash, which comes within 4 s
            and would undo this one.
        message: What the state says.

    Returns:
        Whether it was; False if somebody else has done it.
    """
    assert run.state is not None  # noqa: S101 - it is Crashed
    state: State[Any] = Scheduled(
        name=RESCHEDULED,
        message=message,
        scheduled_time=datetime.now(UTC) + timedelta(seconds=delay),
        state_details={"transition_id": uuid5(run.id, f"rescue of {run.state.id}")},
    )
    # What is stuck between here and there for so long that the run may be running again must not arrive.
    async with asyncio.timeout(delay / 2):
        done = await _set_state(client, run, state)
    return done.status is SetStateStatus.ACCEPT


async def _set_state(client: PrefectClient, run: FlowRun, state: State[Any]) -> OrchestrationResult[Any]:
    """`PrefectClient.set_flow_run_state`, which gives every state a transition id of its own."""
    wanted = to_state_create(state)
    wanted.state_details.flow_run_id = run.id
    response = await client.request(
        "POST",
        "/flow_runs/{id}/set_state",
        path_params={"id": run.id},
        json={"state": wanted.model_dump(mode="json", serialize_as_any=True), "force": False},
    )
    return OrchestrationResult.model_validate(response.json())
