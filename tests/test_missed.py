"""Dead runs that nobody sees to: the rescue died as well, failed, or was never begun. On a real server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
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
from tasks.rescue import HEARTBEAT
from tests.jobs_fixtures import PREFECTS_SOCKETS, collected

__all__ = ["collected"]

pytestmark = PREFECTS_SOCKETS

_SILENT = 0.5  # seconds; what has been dead for twice as long was missed
_TRIGGERS: dict[str, dict[str, set[str]]] = {
    "crashed": {"expect": {"prefect.flow-run.Crashed"}},
    "running": {"after": {"prefect.flow-run.heartbeat"}, "expect": {"prefect.flow-run.*"}},
    "pending": {"after": {"prefect.flow-run.Pending"}, "expect": {"prefect.flow-run.*"}},
}


class Watched:
    """A flow that an automation watches, its dead runs, and what was done about them."""

    def __init__(self, client: PrefectClient, flow_name: str, deployment_id: UUID, rescuer: UUID) -> None:
        self.client = client
        self.flow_name = flow_name
        self.deployment_id = deployment_id
        self.rescuer = rescuer
        self.automations: dict[str, UUID] = {}

    async def watch(self, kind: str, within: float = 0) -> None:
        """Have an automation see to one kind of death; in truth no event is of what it is about."""
        self.automations[kind] = await self.client.create_automation(
            AutomationCore(
                name=f"rescue-{kind}-{self.flow_name}",
                trigger=EventTrigger(
                    within=timedelta(seconds=within),
                    match={"prefect.resource.id": "prefect.flow-run.none"},
                    match_related={
                        "prefect.resource.role": "flow",
                        "prefect.resource.name": [self.flow_name],
                    },
                    **_TRIGGERS[kind],
                ),
                actions=[RunDeployment(source="selected", deployment_id=self.rescuer)],
            )
        )

    async def unwatch(self) -> None:
        for automation in self.automations.values():
            await self.client.delete_automation(automation)

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
        return {run.id for run in found.dead}

    async def sweep(self, **parameters: Any) -> Sweep:
        """As its schedule does it."""
        name = (await self.client.read_deployment(self.rescuer)).name
        sweeper = await self.client.create_deployment(
            await self.client.create_flow(recover), name=f"look-{name}"
        )
        run = await self.client.create_flow_run_from_deployment(
            sweeper, parameters={"silent_for": _SILENT, "rescuer": name, **parameters}
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
        watched = Watched(client, ours.name, deployment_id, rescuer)
        for kind in _TRIGGERS:
            await watched.watch(kind)
        yield watched
        await watched.unwatch()
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
    """Rescues of one death that fail are begun so and so often, and what is given up is not forgotten."""
    run = await watched.run(Running(), Crashed())
    await asyncio.sleep(2 * _SILENT + 0.5)
    for state in [Failed(), Crashed(), Failed(), Crashed(), Failed()]:
        assert await watched.missed() == {run.id}
        await watched.rescue(run, Running(), state)
    assert await watched.missed() == set()
    assert (await watched.sweep()) == Sweep(exhausted=[run.id])


async def test_only_what_went_wrong_is_a_failure(watched: Watched) -> None:
    """A run that was silent, and alive whenever somebody came to look, has not used its rescues up."""
    run = await watched.run(Pending(), Running())
    for _ in range(missed.TRIES):
        await watched.rescue(run, Running(), Completed(name="LeftAlone"))
    await asyncio.sleep(2 * _SILENT + 1)
    assert await watched.missed() == {run.id}


async def test_who_was_left_alone_may_die_after_that(watched: Watched) -> None:
    """A rescue found that its process had outlived the report of a crash; when it falls silent it is dead."""
    run = await watched.run(Running(), Crashed())
    await watched.rescue(run, Running(), Completed(name="LeftAlone"))
    beat = {
        "id": str(uuid4()),
        "occurred": (datetime.now(UTC) + timedelta(seconds=30)).isoformat(),
        "event": HEARTBEAT,
        "resource": {"prefect.resource.id": f"prefect.flow-run.{run.id}"},
    }
    await asyncio.sleep(2 * _SILENT + 0.5)
    assert await watched.missed() == {run.id}
    async with asyncio.timeout(60):
        while await watched.missed():
            await watched.client.request("POST", "/events", json=[beat])
            await asyncio.sleep(0.2)


async def test_who_hears_that_all_is_well(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    """A look that works ends what its own deployment was told of; the rescuer's incident ends when its runs
    are well, and not while a run stays dead.
    """
    told: list[UUID | None] = []

    async def well(run: FlowRun, *_: Any) -> bool:
        told.append(run.deployment_id)
        return True

    monkeypatch.setattr("flows.recover.tell_run_is_well", well)
    notify = {"notify": [{"tool": "slack", "webhook": "data-alerts"}]}
    monkeypatch.setattr(missed, "TRIES", 1)
    run = await watched.run(Running(), Crashed())
    await watched.rescue(run, Running(), Failed())
    await asyncio.sleep(2 * _SILENT + 0.5)
    assert (await watched.sweep(**notify)).exhausted == [run.id]
    assert len(told) == 1
    assert watched.rescuer not in told
    again = await watched.rescue(run, Running())
    await watched.sweep(**notify)
    assert watched.rescuer not in told  # how that one goes is not known yet
    await watched.put(again, Completed())
    await watched.sweep(**notify)
    assert told[-1] == watched.rescuer


async def test_what_died_long_ago(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it says of itself, it is not started again: nobody expects last month's full refresh."""
    await watched.run(Running(), Crashed())
    await watched.run(Pending(), Running())
    await watched.run(Pending())
    await asyncio.sleep(2 * _SILENT + 1.5)
    assert len(await watched.missed()) == 3
    monkeypatch.setattr(missed, "LOOK_BACK", timedelta(seconds=1))
    assert await watched.missed() == set()


async def test_a_rescue_that_died_in_silence(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is said to have Crashed, not left Running for ever in the UI, and the run is rescued anew."""
    run = await watched.run(Running(), Crashed())
    dead = await watched.rescue(run, Running())
    await asyncio.sleep(2 * _SILENT + 0.5)
    assert (await watched.sweep()) == Sweep()
    monkeypatch.setattr(missed, "RESCUE_TAKES", timedelta(seconds=1))
    assert (await watched.sweep()) == Sweep(missed=[run.id], closed=[dead.id])
    assert (await watched.client.read_flow_run(dead.id)).state_type is StateType.CRASHED


@pytest.mark.parametrize("kind", list(_TRIGGERS))
async def test_what_an_operator_has_switched_off(watched: Watched, kind: str) -> None:
    """The look does nothing about that kind of death, and goes on with the others."""
    dead = {
        "crashed": (await watched.run(Running(), Crashed())).id,
        "running": (await watched.run(Pending(), Running())).id,
        "pending": (await watched.run(Pending())).id,
    }
    await asyncio.sleep(2 * _SILENT + 1)
    assert await watched.missed() == set(dead.values())
    await watched.client.pause_automation(watched.automations[kind])
    assert await watched.missed() == set(dead.values()) - {dead[kind]}


async def test_an_automation_may_be_more_patient(watched: Watched) -> None:
    """Where containers take half an hour to come up, the look does not kill them after a quarter of one."""
    pending = await watched.run(Pending())
    await asyncio.sleep(2 * _SILENT + 1)
    assert await watched.missed() == {pending.id}
    await watched.watch("pending", within=1800)
    assert await watched.missed() == set()


async def test_a_look_that_died_itself(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next one closes it, and not itself."""
    await watched.sweep()
    name = (await watched.client.read_deployment(watched.rescuer)).name
    sweeper = await watched.client.read_deployment_by_name(f"recover/look-{name}")
    dead = await watched.client.create_flow_run_from_deployment(sweeper.id)
    await watched.put(dead, Running())
    await asyncio.sleep(1)
    monkeypatch.setattr(missed, "RESCUE_TAKES", timedelta(seconds=0))
    assert (await watched.sweep()).closed == [dead.id]


async def test_it_must_know_who_rescues(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a run to rescue it is for a deployment, of its own environment."""
    with pytest.raises(ValueError, match="neither a run to rescue"):
        await recover()
    monkeypatch.setenv(PREFIX_VARIABLE, "dev.")
    with pytest.raises(ValueError, match=r"no deployment recover/dev\.nobody on this server"):
        await recover(rescuer="nobody")
