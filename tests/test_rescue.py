"""Which runs are rescued, how often, and which are left alone: on a real server, with runs of no process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest
from prefect import flow, task
from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.states import Cancelled, Cancelling, Completed, Crashed, Pending, Running

from flows.recover import Rescue
from flows.recover import recover as recover_flow
from tasks import rescue
from tasks.environment import PREFIX_VARIABLE
from tasks.rescue import HEARTBEAT, RESCHEDULED, last_sign
from tests.jobs_fixtures import PREFECTS_SOCKETS, collected

__all__ = ["collected"]

pytestmark = PREFECTS_SOCKETS


@flow
def a_flow_of_ours(notify: list[dict[str, Any]] | None = None) -> None:
    """Stands for any."""


@pytest.fixture
async def client() -> AsyncIterator[PrefectClient]:
    async with get_client() as client:
        yield client


async def recover(flow_run_id: UUID, silent_for: float = 1.0, **said: Any) -> Rescue:
    """As it is deployed, but for its patience."""
    return await recover_flow(flow_run_id, silent_for=silent_for, **said)


class Dead:
    """Runs of a deployment that no worker sees, in the states that a test puts them in."""

    def __init__(self, client: PrefectClient, deployment_id: UUID) -> None:
        self.client = client
        self.deployment_id = deployment_id

    async def run(self, *states: State[Any]) -> FlowRun:
        run = await self.client.create_flow_run_from_deployment(self.deployment_id)
        return await self.put(run, *states)

    async def put(self, run: FlowRun, *states: State[Any]) -> FlowRun:
        for state in states:
            await self.client.set_flow_run_state(run.id, state, force=True)
        return await self.client.read_flow_run(run.id)

    async def names(self, run: FlowRun) -> list[str | None]:
        states = await self.client.read_flow_run_states(run.id)
        return [state.name for state in sorted(states, key=lambda state: state.timestamp)]


@pytest.fixture
async def dead(client: PrefectClient) -> Dead:
    flow_id = await client.create_flow(a_flow_of_ours)
    return Dead(client, await client.create_deployment(flow_id, name=f"in-no-pool-{uuid4().hex[:6]}"))


async def test_a_crashed_run_is_started_again_after_a_delay(dead: Dead) -> None:
    """Rescheduled, not before the worker's second report can have come, and told of what it does."""
    run = await dead.run(Running(), Crashed(message="SIGKILL"))
    done = await recover(run.id, delay=40)
    assert (done.did, done.rescues) == ("rescheduled", 1)
    after = await dead.client.read_flow_run(run.id)
    assert after.state is not None
    assert (after.state.name, after.state.type) == (RESCHEDULED, StateType.SCHEDULED)
    assert after.next_scheduled_start_time is not None
    assert after.next_scheduled_start_time - after.state.timestamp > timedelta(seconds=35)


async def test_at_most_so_often(dead: Dead) -> None:
    """A run that dies every time is rescued N times and then stays Crashed; the delay doubles."""
    run = await dead.run(Running(), Crashed())
    waits: list[float] = []
    for count in (1, 2):
        done = await recover(run.id, at_most=2, delay=30)
        assert (done.did, done.rescues) == ("rescheduled", count)
        now = await dead.client.read_flow_run(run.id)
        assert now.state is not None
        assert now.state.state_details.scheduled_time is not None
        waits.append((now.state.state_details.scheduled_time - now.state.timestamp).total_seconds())
        await dead.put(run, Pending(), Running(), Crashed())
    assert [round(wait / 30) for wait in waits] == [1, 2]
    done = await recover(run.id, at_most=2, delay=30)
    assert (done.did, done.rescues) == ("given up", 2)
    assert (await dead.names(run))[-1] == "Crashed"


async def test_none_at_most(dead: Dead) -> None:
    """`at_most: 0` only tells."""
    run = await dead.run(Running(), Crashed())
    assert (await recover(run.id, at_most=0)).did == "given up"
    assert (await dead.names(run))[-1] == "Crashed"


async def test_an_automation_that_fires_twice(dead: Dead) -> None:
    """Several at the same moment, and one more later: one rescue."""
    run = await dead.run(Running(), Crashed())
    done = await asyncio.gather(*(recover(run.id) for _ in range(4)))
    done.append(await recover(run.id))
    assert sorted(one.did for one in done) == ["left alone"] * 4 + ["rescheduled"]
    assert (await dead.names(run)).count(RESCHEDULED) == 1


@pytest.mark.parametrize(
    "states",
    [
        [Running(), Cancelling(), Cancelled()],
        [Running(), Cancelling()],
        [Running(), Completed()],
        [],
    ],
    ids=["cancelled", "being cancelled", "completed", "scheduled"],
)
async def test_who_is_left_alone(dead: Dead, states: list[State[Any]]) -> None:
    """What a person has cancelled, what has ended and what waits to begin is not touched."""
    run = await dead.run(*states)
    before = await dead.names(run)
    assert (await recover(run.id)).did == "left alone"
    assert await dead.names(run) == before


async def test_a_run_that_is_gone(dead: Dead) -> None:
    """A run that somebody has deleted needs nothing."""
    assert (await recover(uuid4())).did == "left alone"


async def test_a_silent_run_is_dead(dead: Dead) -> None:
    """Running without a heartbeat: Crashed, then rescheduled, in the order in which Prefect allows it."""
    run = await dead.run(Pending(), Running())
    assert (await recover(run.id, silent_for=2)).did == "rescheduled"
    assert (await dead.names(run))[-3:] == ["Running", "Crashed", RESCHEDULED]


async def test_a_run_that_is_pending(dead: Dead) -> None:
    """Its container may take longer to come up than a heartbeat may be missing; not for ever, though."""
    run = await dead.run(Pending())
    await asyncio.sleep(3)
    done = await recover(run.id, silent_for=1)  # called for an earlier death, by an event that came late
    assert (done.did, done.why) == ("left alone", "it is alive")
    assert (await dead.names(run))[-1] == "Pending"
    assert (await recover(run.id, silent_for=1, pending_for=2)).did == "rescheduled"
    assert (await dead.names(run))[-3:] == ["Pending", "Crashed", RESCHEDULED]


async def test_a_run_of_another_environment(dead: Dead, monkeypatch: pytest.MonkeyPatch) -> None:
    """Production does not start a developer's run again: the automations can't tell them apart, this can."""
    flow_id = await dead.client.create_flow(a_flow_of_ours)
    variables = {"env": {PREFIX_VARIABLE: "dev."}}
    name = f"dev.in-no-pool-{uuid4().hex[:6]}"
    developers = Dead(
        dead.client, await dead.client.create_deployment(flow_id, name=name, job_variables=variables)
    )
    run, productions = await developers.run(Running(), Crashed()), await dead.run(Running(), Crashed())
    done = await recover(run.id)
    assert (done.did, done.why) == ("left alone", "it is of another environment")
    monkeypatch.setenv(PREFIX_VARIABLE, "dev.")
    assert (await recover(productions.id)).did == "left alone"
    assert (await recover(run.id)).did == "rescheduled"


async def _beat(client: PrefectClient, run: FlowRun) -> None:
    event = {
        "id": str(uuid4()),
        "occurred": datetime.now(UTC).isoformat(),
        "event": HEARTBEAT,
        "resource": {"prefect.resource.id": f"prefect.flow-run.{run.id}"},
    }
    await client.request("POST", "/events", json=[event])


async def test_a_heartbeat_that_came_late(dead: Dead) -> None:
    """A server that was away: heartbeats come again while the run is watched, and it is left alone."""
    run = await dead.run(Pending(), Running())
    watching = asyncio.create_task(recover(run.id, silent_for=120))
    async with asyncio.timeout(90):
        while not watching.done():
            await _beat(dead.client, run)
            await asyncio.sleep(0.5)
    done: Rescue = await watching
    assert (done.did, done.why) == ("left alone", "it is alive")
    assert (await dead.names(run))[-1] == "Running"


async def test_a_process_that_outlives_its_crash(dead: Dead) -> None:
    """What was reported was the death of another process: heartbeats go on, and so does the run."""
    run = await dead.run(Pending(), Running(), Crashed())
    watching = asyncio.create_task(recover(run.id, silent_for=30))
    async with asyncio.timeout(90):
        while not watching.done():
            await _beat(dead.client, run)
            await asyncio.sleep(0.5)
    assert (await watching).did == "left alone"
    assert (await dead.names(run))[-1] == "Crashed"


async def test_a_process_that_outlives_its_crash_and_dies(dead: Dead) -> None:
    """Its heartbeats came after the report, and come no more: it is as dead as any."""
    run = await dead.run(Pending(), Running(), Crashed())
    assert run.state is not None
    await asyncio.sleep(2)
    async with asyncio.timeout(60):
        while await last_sign(dead.client, run) == run.state.timestamp:
            await _beat(dead.client, run)
            await asyncio.sleep(0.2)
    await asyncio.sleep(2)
    assert (await recover(run.id, silent_for=2)).did == "rescheduled"


@pytest.mark.no_server
@pytest.mark.parametrize("comes", [True, False], ids=["and comes again", "and is the last"])
async def test_a_heartbeat_after_a_crash_that_is_old(monkeypatch: pytest.MonkeyPatch, *, comes: bool) -> None:
    """The server may have been away: the next one is waited for before the run is called dead."""
    crashed = datetime.now(UTC) - timedelta(seconds=400)
    run = FlowRun(flow_id=uuid4(), state=Crashed(timestamp=crashed))
    heard = [crashed + timedelta(seconds=100)] * 3

    async def last_beat(*_: Any) -> datetime:
        if len(heard) > 1:
            return heard.pop()
        return datetime.now(UTC) if comes else heard[0]

    monkeypatch.setattr(rescue, "_last_beat", last_beat)
    monkeypatch.setattr(rescue, "_LOOK", 0.01)
    async with get_client() as client:
        assert await rescue.outlived(client, run, 120 if comes else 0.2) is comes


async def test_a_run_that_ends_while_it_is_watched(dead: Dead) -> None:
    """It is not said to have crashed."""
    run = await dead.run(Pending(), Running())
    watching = asyncio.create_task(recover(run.id, silent_for=20))
    await dead.put(run, Completed())
    assert (await watching).did == "left alone"
    assert (await dead.names(run))[-1] == "Completed"


async def test_a_deployment_that_is_paused_or_gone(dead: Dead) -> None:
    """Nobody wants its runs: the run stays Crashed, with the reason."""
    run = await dead.run(Running(), Crashed())
    await dead.client.pause_deployment(dead.deployment_id)
    done = await recover(run.id)
    assert (done.did, "is paused" in done.why) == ("given up", True)
    await dead.client.resume_deployment(dead.deployment_id)
    await dead.client.delete_deployment(dead.deployment_id)
    done = await recover(run.id)
    assert done.did == "given up"
    assert (await dead.names(run))[-1] == "Crashed"


async def test_a_retry_by_hand_is_a_new_beginning(dead: Dead) -> None:
    """Rescues are counted since a person has last asked for the run."""
    run = await dead.run(Running(), Crashed())
    assert (await recover(run.id, at_most=1)).did == "rescheduled"
    await dead.put(run, Running(), Crashed())
    assert (await recover(run.id, at_most=1)).did == "given up"
    await dead.put(run, State(type=StateType.SCHEDULED, name="AwaitingRetry"), Running(), Crashed())
    assert (await recover(run.id, at_most=1)).did == "rescheduled"


@task
def a_step() -> None:
    """Stands for any."""


async def test_what_the_dead_attempt_left_running_is_closed(dead: Dead) -> None:
    """Its task runs are Crashed; what had ended stays so, and nothing of the next attempt is touched."""
    run = await dead.run(Pending(), Running())
    states: dict[str, State[Any]] = {"running": Running(), "pending": Pending(), "done": Completed()}
    tasks = {
        key: await dead.client.create_task_run(a_step, run.id, dynamic_key=key, state=state)
        for key, state in states.items()
    }
    await dead.put(run, Crashed())
    later = await dead.client.create_task_run(a_step, run.id, dynamic_key="later", state=Running())
    assert (await recover(run.id)).closed == 2
    found = {key: (await dead.client.read_task_run(task.id)).state_type for key, task in tasks.items()}
    assert found == {
        "running": StateType.CRASHED,
        "pending": StateType.CRASHED,
        "done": StateType.COMPLETED,
    }
    assert (await dead.client.read_task_run(later.id)).state_type is StateType.RUNNING
