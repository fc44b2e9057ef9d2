"""What the automations do on a real server: what it tells itself, and which runs it starts."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from datetime import UTC, datetime, timedelta
from logging import getLogger
from typing import Any
from uuid import UUID, uuid4

import pytest
from prefect import flow
from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterDeploymentId
from prefect.client.schemas.objects import FlowRun, State
from prefect.events.actions import RunDeployment
from prefect.events.schemas.automations import AutomationCore, EventTrigger
from prefect.states import Completed, Crashed, Failed, Late, Pending, Running, Scheduled
from prefect_slack import SlackWebhook

from deployments.automations import apply, plan, read_entries, remove, resolve
from flows.alert import alert
from flows.expected import ExpectedConnection, expect_fresh
from flows.recover import recover
from sandbox import Sandbox
from tasks.alerts import announce
from tasks.events import EltEvent, hand_over
from tasks.fresh import FRESH
from tasks.incidents import Alarm, Bulletin
from tasks.rescue import HEARTBEAT
from tasks.slack import SlackNotify
from tests.deployed import saved_blocks, specs
from tests.events_fixtures import Target
from tests.jobs_fixtures import PREFECTS_SOCKETS, collected

__all__ = ["collected"]

pytestmark = [*PREFECTS_SOCKETS, pytest.mark.timeout(300)]

_WITHIN = 10  # seconds, the least that Prefect allows
_FALLBACK = "reference-data"  # the channel of the block `fallback-alerts`


@flow
def a_flow() -> None:
    """Stands for any."""


@pytest.fixture
def box(sandbox: Sandbox) -> Iterator[Sandbox]:
    with saved_blocks(sandbox):
        yield sandbox


@pytest.fixture
async def client(box: Sandbox) -> AsyncIterator[PrefectClient]:
    """The automations as they are shipped, but that nothing is waited for for minutes."""
    async with get_client() as client:
        for one, name in ((recover, "dead-runs"), (alert, "untold-runs")):
            await client.create_deployment(await client.create_flow(one), name=name)
        entries = [
            entry.model_copy(update={"trigger": {**entry.trigger, "within": _WITHIN}})
            if entry.trigger.get("posture") == "Proactive"
            else entry
            for entry in read_entries()
        ]
        await SlackWebhook(url=box.slack_url(_FALLBACK)).save("fallback-alerts", overwrite=True)  # type: ignore[misc]
        await apply(client, await plan(client, await resolve(client, entries)))
        async with asyncio.timeout(60):
            while not box.slack.messages:  # the server knows the last of them, and so all
                await _failing_trigger(f"probe-{uuid4().hex[:8]}")
                await asyncio.sleep(0.5)
        yield client
        await remove(client, (await plan(client, [])).remove)
        await SlackWebhook.adelete("fallback-alerts")


async def test_what_no_flow_could_tell(client: PrefectClient, box: Sandbox) -> None:
    """Late runs, pools that run nothing, what starts nothing: the channel hears of each. Of what was not
    delivered another one does.
    """
    name = uuid4().hex[:8]
    await _late(client, f"late-{name}")
    await _paused_pool(client, f"pool-{name}")
    await _left_pool(client, f"left-{name}")
    fire = await _failing_automation(client, f"automation-{name}")
    await _failing_trigger(f"trigger-{name}")
    await _failed_alert(client, f"alert-{name}")
    assert not await announce(SlackNotify(webhook=f"gone-{name}"), _bulletin(name), getLogger("tests"))
    expected = {
        f"The run late-{name} of a-flow/in-no-pool was due more than ten minutes ago": "data-alerts",
        f"The work pool pool-{name} has been paused for five minutes": "data-alerts",
        f"The work pool left-{name} has been not-ready for five minutes": "data-alerts",
        f"trigger-{name} starts nothing": "data-alerts",
        f"The automation automation-{name} was to do run-deployment and could not": _FALLBACK,
        f"alert-{name} was to tell of a run and failed: The API is away": _FALLBACK,
        f"slack/gone-{name} could not be told all that pipeline-{name} has to say": _FALLBACK,
        f"airbyte orders-{name} sync failed": _FALLBACK,
    }

    def unheard() -> set[str]:
        told = {
            channel: " ".join(message.text for message in box.slack.sent_to(channel))
            for channel in expected.values()
        }
        return {words for words, channel in expected.items() if words not in told[channel]}

    try:
        async with asyncio.timeout(120):
            while unheard():
                await fire()  # the server may not have known the automation yet
                await asyncio.sleep(2)
    except TimeoutError:
        assert unheard() == set(), [message.text for message in box.slack.messages]


class Team:
    """A deployment of a flow, and its runs, which no process is behind."""

    def __init__(self, client: PrefectClient, flow_name: str) -> None:
        self.client = client
        self.flow_name = flow_name
        self.flow_id: UUID | None = None
        self.deployment_id: UUID | None = None

    async def run(self, *states: State[Any]) -> UUID:
        if self.deployment_id is None:
            self.flow_id = await self.client.create_flow_from_name(self.flow_name)
            self.deployment_id = await self.client.create_deployment(
                self.flow_id, name=f"in-no-pool-{uuid4().hex[:8]}"
            )
        run = await self.client.create_flow_run_from_deployment(self.deployment_id)
        for state in states:
            await self.client.set_flow_run_state(run.id, state, force=True)
        return run.id

    async def silent(self) -> UUID:
        """One that has had a single heartbeat."""
        run = await self.run(Running())
        related = {"prefect.resource.id": f"prefect.flow.{self.flow_id}", "prefect.resource.role": "flow"}
        event: dict[str, Any] = {
            "id": str(uuid4()),
            "occurred": datetime.now(UTC).isoformat(),
            "event": HEARTBEAT,
            "resource": {"prefect.resource.id": f"prefect.flow-run.{run}"},
            "related": [{**related, "prefect.resource.name": self.flow_name}],
        }
        await self.client.request("POST", "/events", json=[event])
        return run

    async def dead(self) -> dict[str, UUID]:
        """One of each kind of trouble."""
        return {
            "failed": await self.run(Pending(), Running(), Failed()),
            "crashed": await self.run(Pending(), Running(), Crashed()),
            "never began": await self.run(Pending()),
            "does not end": await self.run(Pending(), Running()),
            "silent": await self.silent(),
        }


async def _started(client: PrefectClient) -> dict[tuple[str, str, Any], FlowRun]:
    """What the automations have started, about which run, and for which patience with it."""
    found: dict[tuple[str, str, Any], FlowRun] = {}
    for name in ("recover/dead-runs", "alert/untold-runs"):
        deployment = await client.read_deployment_by_name(name)
        of_it = FlowRunFilterDeploymentId(any_=[deployment.id])
        for run in await client.read_flow_runs(flow_run_filter=FlowRunFilter(deployment_id=of_it), limit=200):
            about = str(run.parameters["flow_run_id"])
            found[name.split("/")[0], about, run.parameters.get("stuck_for")] = run
    return found


async def test_which_runs_are_started(client: PrefectClient) -> None:
    """Every kind of death and failure starts what sees to it, about that run. Other flows' runs start
    nothing, and whatever one run does, no other is forgotten.
    """
    team, others = Team(client, "elt-chain"), Team(client, "somebody-elses")
    trouble, not_ours = await team.dead(), await others.dead()
    noisy = await team.run()
    alarming = await Team(client, "alert").run(Pending(), Running(), Crashed())
    expected = {
        ("alert", str(trouble["failed"]), None),
        ("alert", str(trouble["crashed"]), None),
        ("recover", str(trouble["crashed"]), None),
        ("recover", str(trouble["never began"]), None),
        ("recover", str(trouble["silent"]), None),
        ("recover", str(alarming), None),
        ("alert", str(trouble["does not end"]), 43200),
        ("alert", str(trouble["silent"]), 43200),
    }
    ours = {str(run) for run in (*trouble.values(), *not_ours.values(), noisy, alarming)}

    async def started(*more: UUID) -> set[tuple[str, str, Any]]:
        about = ours | {str(run) for run in more}
        return {key for key in await _started(client) if key[1] in about}

    async with asyncio.timeout(120):
        while not expected <= await started():
            await client.set_flow_run_state(noisy, Scheduled(name="AwaitingRetry"), force=True)
            await asyncio.sleep(1)
    assert await started() == expected
    rescue = (await _started(client))["recover", str(trouble["crashed"]), None]
    assert rescue.expected_start_time is not None
    assert rescue.created is not None
    # The worker reports a crash twice.
    assert rescue.expected_start_time - rescue.created > timedelta(seconds=10)

    # Of what failed before it is told that it is well again, and of nothing else.
    another = Team(client, "elt-chain")
    good = [await others.run(Running(), Completed()), await another.run(Running(), Completed())]
    well = await team.run(Running(), Completed(name="PartiallyRefreshed"))
    expected.add(("alert", str(well), None))
    async with asyncio.timeout(60):
        while not expected <= await started(well):
            await client.set_flow_run_state(noisy, Scheduled(name="AwaitingRetry"), force=True)
            await asyncio.sleep(1)
    assert await started(well, *good) == expected


async def test_a_load_that_does_not_come(client: PrefectClient) -> None:
    """As shipped, but for their patience: one look, at the one connection that no load comes of any more."""
    spec = specs()["flights-by-07"]
    deployment = await client.create_deployment(
        await client.create_flow(expect_fresh), name=f"by-07-{uuid4().hex[:8]}"
    )
    keys = ("posture", "match", "after", "expect")
    automations: list[UUID] = []
    for shipped in spec["triggers"]:
        trigger = EventTrigger(**{key: shipped[key] for key in keys}, within=timedelta(seconds=_WITHIN))
        action = RunDeployment(deployment_id=deployment, parameters=shipped["parameters"])
        made = AutomationCore(name=uuid4().hex, trigger=trigger, actions=[action])
        automations.append(await client.create_automation(made))
    automations.append(await _known(client))
    flights, weather = (
        ExpectedConnection.model_validate(one).resource for one in spec["parameters"]["connections"]
    )
    of_it = FlowRunFilter(deployment_id=FlowRunFilterDeploymentId(any_=[deployment]))
    coming = [flights, weather]
    looks: list[FlowRun] = []
    seen: datetime | None = None
    async with asyncio.timeout(120):
        # Some more than it waits for, in which it might fire again.
        while seen is None or datetime.now(UTC) - seen < timedelta(seconds=_WITHIN + 6):
            for resource in coming:
                await _post(client, FRESH, resource)
            coming = [weather]
            await asyncio.sleep(1)
            looks = await client.read_flow_runs(flow_run_filter=of_it)
            seen = seen or (datetime.now(UTC) if looks else None)
    for automation in automations:
        await client.delete_automation(automation)
    (look,) = looks
    assert look.parameters["connections"] == spec["parameters"]["connections"][:1]
    assert look.parameters["hours"] == spec["triggers"][0]["within"] / 3600


async def _known(client: PrefectClient) -> UUID:
    """An automation that the server knows, and so all that were made before it."""
    deployment = await client.create_deployment(
        await client.create_flow(a_flow), name=f"known-{uuid4().hex[:8]}"
    )
    trigger = EventTrigger(expect={f"elt.test.{deployment}"})
    action = RunDeployment(deployment_id=deployment)
    made = AutomationCore(name=uuid4().hex, trigger=trigger, actions=[action])
    automation = await client.create_automation(made)
    of_it = FlowRunFilter(deployment_id=FlowRunFilterDeploymentId(any_=[deployment]))
    async with asyncio.timeout(60):
        while not await client.read_flow_runs(flow_run_filter=of_it):
            await _post(client, f"elt.test.{deployment}", "elt.test.thing")
            await asyncio.sleep(0.5)
    return automation


async def _post(client: PrefectClient, event: str, resource: str) -> None:
    posted = {
        "id": str(uuid4()),
        "occurred": datetime.now(UTC).isoformat(),
        "event": event,
        "resource": {"prefect.resource.id": resource},
    }
    await client.request("POST", "/events", json=[posted])


async def _late(client: PrefectClient, name: str) -> None:
    deployment = await client.create_deployment(await client.create_flow(a_flow), name="in-no-pool")
    due = datetime.now(UTC) - timedelta(minutes=1)
    run = await client.create_flow_run_from_deployment(
        deployment, name=name, state=Scheduled(scheduled_time=due)
    )
    await client.set_flow_run_state(run.id, Late(scheduled_time=due))


async def _paused_pool(client: PrefectClient, name: str) -> None:
    await client.create_work_pool(WorkPoolCreate(name=name, type="process"))
    await client.update_work_pool(name, WorkPoolUpdate(is_paused=True))


async def _left_pool(client: PrefectClient, name: str) -> None:
    """One whose only worker has gone."""
    await client.create_work_pool(WorkPoolCreate(name=name, type="process"))
    await client.send_worker_heartbeat(name, "the-only-one", heartbeat_interval_seconds=1)


async def _failed_alert(client: PrefectClient, name: str) -> None:
    deployment = await client.read_deployment_by_name("alert/untold-runs")
    run = await client.create_flow_run_from_deployment(
        deployment.id, name=name, parameters={"flow_run_id": str(uuid4())}
    )
    await client.set_flow_run_state(run.id, Failed(message="The API is away"), force=True)


def _bulletin(name: str) -> Bulletin:
    alarm = Alarm(key=f"airbyte/{name}", title=f"airbyte orders-{name}", what="sync failed", tool="airbyte")
    return Bulletin(pipeline=f"pipeline-{name}", run="a run", alarms=[alarm])


async def _failing_automation(client: PrefectClient, name: str) -> Callable[[], Awaitable[None]]:
    """One that can't start what it is to start, and what has it try."""
    deployment = await client.create_deployment(await client.create_flow(a_flow), name="never-run")
    action = RunDeployment(deployment_id=deployment, parameters={"x": "{{ event.payload.no.such }}"})
    trigger = EventTrigger(expect={f"elt.test.{name}"})
    await client.create_automation(AutomationCore(name=name, trigger=trigger, actions=[action]))

    async def fire() -> None:
        await _post(client, f"elt.test.{name}", f"elt.test.{name}")

    return fire


async def _failing_trigger(name: str) -> None:
    with get_client(sync_client=True) as api:
        trigger = Target(api).trigger(name=name, parameters={"number": "not a number"})
    event = EltEvent(
        name="elt.test.happened", key=name, occurred=datetime.now(UTC), resource_id="elt.test.thing"
    )
    (handed,) = await hand_over([event], [trigger])
    assert handed.failed == (name,)
