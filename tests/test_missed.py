"""Dead runs that nobody sees to: the rescue died as well, failed, or was never begun. On a real server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest
from prefect import flow
from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.events.actions import RunDeployment
from prefect.events.schemas.automations import AutomationCore, EventTrigger
from prefect.flow_engine import run_flow
from prefect.states import Cancelled, Completed, Crashed, Failed, Pending, Running

from flows.recover import Sweep, recover
from tasks import missed
from tasks.environment import PREFIX_VARIABLE
from tests.jobs_fixtures import PREFECTS_SOCKETS, collected

__all__ = ["collected"]

pytestmark = PREFECTS_SOCKETS

_SILENT = 0.5  # seconds; what has been dead for twice as long was missed


class Watched:
    """A flow that an automation watches, its dead runs, and what was done about them."""

    def __init__(self, client: PrefectClient, deployment_id: UUID, rescuer: UUID, automation: UUID) -> None:
        self.client = client
        self.deployment_id = deployment_id
        self.rescuer = rescuer
        self.automation = automation

    async def run(self, *states: State[Any]) -> FlowRun:
        run = await self.client.create_flow_run_from_deployment(self.deployment_id)
        return await self.put(run, *states)

    async def rescue(self, of: FlowRun, *states: State[Any]) -> FlowRun:
        run = await self.client.create_flow_run_from_deployment(
            self.rescuer, parameters={"flow_run_id": str(of.id)}
        )
        return await self.put(run, *states)

    async def put(self, run: FlowRun, *states: State[Any]) -> FlowRun:
        for state in states:
            await self.client.set_flow_run_state(run.id, state, force=True)
        return await self.client.read_flow_run(run.id)

    async def missed(self, silent_for: float = _SILENT, pending_for: float = 0.5) -> set[UUID]:
        found = await missed.missed(self.client, self.rescuer, silent_for, pending_for)
        return {run.id for run in found}

    async def sweep(self) -> Sweep:
        """As its schedule does it."""
        run = await self.client.create_flow_run_from_deployment(
            self.rescuer, parameters={"silent_for": _SILENT}
        )
        await self.put(run, Pending())
        done = await run_flow(recover, flow_run=run, parameters=run.parameters)
        assert isinstance(done, Sweep)
        return done


@pytest.fixture
async def watched() -> AsyncIterator[Watched]:
    name = uuid4().hex[:8]

    @flow(name=f"ours-{name}")
    def ours() -> None:
        """Stands for any."""

    async with get_client() as client:
        deployment_id = await client.create_deployment(await client.create_flow(ours), name="in-no-pool")
        rescuer = await client.create_deployment(await client.create_flow(recover), name=f"rescuer-{name}")
        automation = await client.create_automation(
            AutomationCore(
                name=f"rescue-{name}",
                trigger=EventTrigger(
                    posture="Reactive",
                    threshold=1,
                    within=timedelta(0),
                    expect={"prefect.flow-run.never"},
                    match_related={"prefect.resource.role": "flow", "prefect.resource.name": [ours.name]},
                ),
                actions=[RunDeployment(source="selected", deployment_id=rescuer)],
            )
        )
        yield Watched(client, deployment_id, rescuer, automation)
        await client.delete_automation(automation)
        await client.delete_deployment(rescuer)


async def test_the_rescue_died_as_well(watched: Watched) -> None:
    """Crashed or failed rescues are no rescues; one that is to come, goes on or was done is one."""
    unseen = await watched.run(Running(), Crashed())
    crashed = await watched.run(Running(), Crashed())
    failed = await watched.run(Running(), Crashed())
    to_come = await watched.run(Running(), Crashed())
    going_on = await watched.run(Running(), Crashed())
    done = await watched.run(Running(), Crashed())
    called_off = await watched.run(Running(), Crashed())
    again = await watched.run(Running(), Crashed())
    await watched.rescue(crashed, Running(), Crashed())
    await watched.rescue(failed, Running(), Failed())
    await watched.rescue(to_come)
    await watched.rescue(going_on, Running())
    await watched.rescue(done, Running(), Completed())
    await watched.rescue(called_off, Cancelled())
    await watched.rescue(again, Running(), Completed())
    await watched.put(again, Running(), Crashed())  # it died once more after that
    assert await watched.missed(silent_for=300) == set()  # the automations are about to see to them
    await asyncio.sleep(2 * _SILENT + 0.5)
    assert await watched.missed() == {unseen.id, crashed.id, failed.id, again.id}


async def test_whose_death_nobody_has_told(watched: Watched) -> None:
    """Running in silence, or Pending for too long; what has a heartbeat, ended or waits is left alone."""
    silent = await watched.run(Pending(), Running())
    pending = await watched.run(Pending())
    await watched.run()
    await watched.run(Running(), Completed())
    await asyncio.sleep(2 * _SILENT + 1)
    assert await watched.missed() == {silent.id, pending.id}
    assert await watched.missed(pending_for=900) == {silent.id}


async def test_it_is_begun_anew_once(watched: Watched) -> None:
    """The look starts the rescue as a run of its own deployment, and the next one sees that it is to come."""
    run = await watched.run(Running(), Crashed())
    await asyncio.sleep(2 * _SILENT + 0.5)
    assert (await watched.sweep()).missed == [run.id]
    assert (await watched.sweep()).missed == []
    rescues = await missed.rescues_of(watched.client, watched.rescuer)
    begun = [one for one in rescues if one.parameters.get("flow_run_id")]
    assert [(one.parameters["flow_run_id"], one.state_type) for one in begun] == [
        (str(run.id), StateType.SCHEDULED)
    ]


async def test_another_environments_dead_are_its_own(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The flows have the same names in every environment of a server."""
    await watched.run(Running(), Crashed())
    await asyncio.sleep(2 * _SILENT + 0.5)
    monkeypatch.setenv(PREFIX_VARIABLE, "dev.")
    assert await watched.missed() == set()


async def test_not_without_an_end(watched: Watched) -> None:
    """Rescues of one death that fail are begun so and so often."""
    run = await watched.run(Running(), Crashed())
    await asyncio.sleep(2 * _SILENT + 0.5)
    for _ in range(missed.TRIES):
        assert await watched.missed() == {run.id}
        await watched.rescue(run, Running(), Failed())
    assert await watched.missed() == set()


async def test_a_rescue_that_died_in_silence(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is said to have Crashed, not left Running for ever in the UI, and the run is rescued anew."""
    run = await watched.run(Running(), Crashed())
    dead = await watched.rescue(run, Running())
    await asyncio.sleep(2 * _SILENT + 0.5)
    assert (await watched.sweep()) == Sweep(missed=[], closed=[])
    monkeypatch.setattr(missed, "RESCUE_TAKES", timedelta(seconds=1))
    assert (await watched.sweep()) == Sweep(missed=[run.id], closed=[dead.id])
    assert (await watched.client.read_flow_run(dead.id)).state_type is StateType.CRASHED


async def test_what_an_operator_has_switched_off(watched: Watched) -> None:
    """Without an automation that is on, no flow is watched, and nothing is begun."""
    await watched.run(Running(), Crashed())
    await asyncio.sleep(2 * _SILENT + 0.5)
    await watched.client.pause_automation(watched.automation)
    assert await watched.missed() == set()
    assert await missed.watched(watched.client, watched.rescuer) == []


async def test_without_a_deployment_there_is_nothing_to_begin() -> None:
    """Called in a script without a run to rescue, it says what it is for."""
    with pytest.raises(ValueError, match="recover/dead-runs"):
        await recover()
