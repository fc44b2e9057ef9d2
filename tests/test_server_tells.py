"""What the server itself tells, because no flow might run to do it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import pytest
from prefect import flow
from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
from prefect.events.actions import RunDeployment
from prefect.events.schemas.automations import AutomationCore, EventTrigger
from prefect.states import Late, Scheduled

from deployments.automations import apply, plan, read_entries, remove, resolve
from flows.alert import alert
from flows.recover import recover
from sandbox import Sandbox
from tasks.events import EltEvent, hand_over
from tests.deployed import saved_blocks
from tests.events_fixtures import Target
from tests.jobs_fixtures import PREFECTS_SOCKETS, collected

__all__ = ["collected"]

pytestmark = [*PREFECTS_SOCKETS, pytest.mark.timeout(300)]

_WITHIN = 10  # seconds, the least that Prefect allows


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
        await apply(client, await plan(client, await resolve(client, entries)))
        yield client
        await remove(client, (await plan(client, [])).remove)


async def test_what_no_flow_could_tell(client: PrefectClient, box: Sandbox) -> None:
    """A late run, a paused pool, an automation and an event that start nothing: the channel hears of each."""
    name = uuid4().hex[:8]
    await _late(client, f"late-{name}")
    await _paused_pool(client, f"pool-{name}")
    fire = await _failing_automation(client, f"automation-{name}")
    await _failing_trigger(f"trigger-{name}")
    expected = {
        f"The run late-{name} of a-flow/in-no-pool was due more than ten minutes ago",
        f"The work pool pool-{name} has been paused for five minutes",
        f"The automation automation-{name} was to do run-deployment and could not",
        f"trigger-{name} starts nothing",
    }

    def unheard() -> set[str]:
        told = " ".join(message.text for message in box.slack.sent_to("data-alerts"))
        return {words for words in expected if words not in told}

    try:
        async with asyncio.timeout(120):
            while unheard():
                await fire()  # the server may not have known the automation yet
                await asyncio.sleep(2)
    except TimeoutError:
        assert unheard() == set(), [message.text for message in box.slack.messages]


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


async def _failing_automation(client: PrefectClient, name: str) -> Callable[[], Awaitable[None]]:
    """One that can't start what it is to start, and what has it try."""
    deployment = await client.create_deployment(await client.create_flow(a_flow), name="never-run")
    action = RunDeployment(deployment_id=deployment, parameters={"x": "{{ event.payload.no.such }}"})
    trigger = EventTrigger(expect={f"elt.test.{name}"})
    await client.create_automation(AutomationCore(name=name, trigger=trigger, actions=[action]))

    async def fire() -> None:
        event: dict[str, Any] = {
            "id": str(uuid4()),
            "occurred": datetime.now(UTC).isoformat(),
            "event": f"elt.test.{name}",
            "resource": {"prefect.resource.id": f"elt.test.{name}"},
        }
        await client.request("POST", "/events", json=[event])

    return fire


async def _failing_trigger(name: str) -> None:
    with get_client(sync_client=True) as api:
        trigger = Target(api).trigger(name=name, parameters={"number": "not a number"})
    event = EltEvent(
        name="elt.test.happened", key=name, occurred=datetime.now(UTC), resource_id="elt.test.thing"
    )
    (handed,) = await hand_over([event], [trigger])
    assert handed.failed == (name,)
