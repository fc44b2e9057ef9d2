"""Runs that can't tell themselves: `alert` and `recover` tell of them, whole and once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime
from typing import Any
from uuid import UUID, uuid4

import pytest
from prefect import flow
from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.actions import ArtifactCreate
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.states import Cancelled, Completed, Crashed, Failed, Pending, Running

from deployments.automations import read_entries
from flows.alert import alert
from flows.recover import recover
from sandbox import Sandbox
from tasks.alerts import UNDELIVERED
from tasks.environment import PREFIX_VARIABLE
from tasks.jobs import Entry, JobHandle
from tasks.jobs.journal import ARTIFACT_KEY, _page_text
from tests.alerts_fixtures import routing
from tests.deployed import saved_blocks
from tests.jobs_fixtures import PREFECTS_SOCKETS, collected

__all__ = ["collected"]

pytestmark = PREFECTS_SOCKETS


@flow
def somebodys_flow(notify: list[dict[str, Any]] | None = None) -> None:
    """Stands for any."""


@pytest.fixture
def box(sandbox: Sandbox) -> Iterator[Sandbox]:
    with saved_blocks(sandbox):
        yield sandbox


@pytest.fixture
async def client() -> AsyncIterator[PrefectClient]:
    async with get_client() as client:
        yield client


class Deployment:
    """Runs of a deployment of a team, in the states that a test puts them in."""

    def __init__(self, client: PrefectClient, box: Sandbox) -> None:
        self.client = client
        self.name = f"of-a-team-{uuid4().hex[:6]}"
        self.id: UUID | None = None
        self.notify: list[Any] = [
            {"tool": "slack", "webhook": "data-alerts", "owners": {"desk": "weather-desk"}, "on": "failure"},
            {"tool": "pagerduty", "routing": "on-call"},
        ]
        self.routing = routing(box)

    async def run(self, *states: State[Any], **parameters: Any) -> FlowRun:
        if self.id is None:
            await self.routing.save("on-call", overwrite=True)  # type: ignore[misc]
            flow_id = await self.client.create_flow(somebodys_flow)
            self.id = await self.client.create_deployment(flow_id, name=self.name, tags=["owner:desk", "elt"])
        run = await self.client.create_flow_run_from_deployment(self.id, parameters=parameters)
        return await self.put(run, *states)

    async def put(self, run: FlowRun, *states: State[Any]) -> FlowRun:
        for state in states:
            await self.client.set_flow_run_state(run.id, state, force=True)
        return await self.client.read_flow_run(run.id)

    async def tell(self, run: FlowRun, **said: Any) -> str:
        return await alert(run.id, notify=self.notify, **said)


@pytest.fixture
def team(client: PrefectClient, box: Sandbox) -> Deployment:
    return Deployment(client, box)


async def test_a_run_that_failed_is_told_with_all_that_one_has_to_know(
    team: Deployment, box: Sandbox
) -> None:
    """Deployment, tags, owner, run id, reason: to the owner's channel and the service on call."""
    run = await team.run(Running(), Failed(message="No partition for today"))
    assert await team.tell(run) == "told"
    (message,) = box.slack.sent_to("weather-desk")
    for said in (
        f"*somebodys-flow/{team.name}*",
        "No partition for today",
        "(owner: desk)",
        f"deployment somebodys-flow/{team.name}",
        "tags elt, owner:desk",
        f"run {run.id}",
    ):
        assert said in message.text
    (page,) = box.pagerduty.open_of()
    details = page.triggers[-1]["payload"]["custom_details"]
    assert details["run id"] == str(run.id)
    assert details["deployment"] == f"somebodys-flow/{team.name}"
    assert details["owner"] == "desk"
    assert sorted(details["tags"]) == ["elt", "owner:desk"]


async def test_told_once_and_ended_by_the_next_good_run(team: Deployment, box: Sandbox) -> None:
    """The automation fires twice: one message. A run that goes well ends it, and one more says nothing."""
    failed = await team.run(Running(), Failed(message="Gone"))
    assert [await team.tell(failed), await team.tell(failed)] == ["told", "told"]
    assert len(box.slack.messages) == 1
    assert len(box.pagerduty.open_of()) == 1
    good = await team.run(Running(), Completed())
    assert [await team.tell(good), await team.tell(good)] == ["told", "told"]
    assert "*the run* is well again" in box.slack.messages[-1].text
    assert len(box.slack.messages) == 2
    assert box.pagerduty.open_of() == []


async def test_who_tells_himself_is_passed_over(team: Deployment, box: Sandbox) -> None:
    """A run whose parameters name whom to tell has told; one that somebody cancelled is nobody's trouble."""
    own = await team.run(Running(), Failed(), notify=team.notify)
    cancelled = await team.run(Running(), Cancelled())
    assert [await team.tell(own), await team.tell(cancelled)] == ["nothing to tell"] * 2
    assert await alert(uuid4(), notify=team.notify) == "nothing to tell"
    assert box.slack.messages == []


async def test_whose_people_can_not_be_read(team: Deployment, box: Sandbox) -> None:
    """The run was refused because of them and could tell nobody: the people of the alert hear of it."""
    run = await team.run(Running(), Failed(message="Validation failed"), notify=[{"tool": "fax"}])
    assert await team.tell(run) == "told"
    (message,) = box.slack.sent_to("weather-desk")
    assert "*the run* failed: Validation failed" in message.text


async def test_what_is_not_delivered_is_no_success(team: Deployment, client: PrefectClient) -> None:
    """The run that was to tell has failed, and what was not told is an event for the server to tell of."""
    run = await team.run(Running(), Failed(message="Gone"))
    nowhere = f"gone-{uuid4().hex[:8]}"
    state: State[Any] = await alert(run.id, notify=[{"tool": "slack", "webhook": nowhere}], return_state=True)
    assert (state.type, state.name) == (StateType.FAILED, "Undelivered")
    wanted = {"event": {"name": [UNDELIVERED]}, "resource": {"id": [f"elt.alerts.slack/{nowhere}"]}}
    events: list[Any] = []
    async with asyncio.timeout(60):
        while not events:
            await asyncio.sleep(0.2)
            response = await client.request("POST", "/events/filter", json={"filter": wanted})
            events = response.json()["events"]
    (event,) = events
    assert event["payload"]["alarms"] == ["the run failed"]
    assert event["payload"]["run_id"] == str(run.id)


async def test_nobody_is_named(
    team: Deployment, client: PrefectClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An automation tells of it, by the name of the state that it ends in. A rehearsal tells nobody."""
    (tells,) = (one for one in read_entries() if one.name == "elt: tell of alerts that failed")
    run = await team.run(Running(), Failed(message="Gone"))
    nobody: State[Any] = await alert(run.id, return_state=True)
    assert (nobody.type, nobody.message) == (StateType.FAILED, "Nobody is named who is to be told.")
    assert f"prefect.flow-run.{nobody.name}" in tells.trigger["expect"]
    here = await client.create_deployment(
        await client.create_flow(somebodys_flow),
        name=f"dev.{team.name}",
        job_variables={"env": {PREFIX_VARIABLE: "dev."}},
    )
    team.id, team.name = here, f"dev.{team.name}"
    rehearsed = await team.run(Running(), Failed(message="Gone"))
    monkeypatch.setenv(PREFIX_VARIABLE, "dev.")
    assert await alert(rehearsed.id) == "nothing to tell"


async def test_another_environments_runs_are_its_own_business(
    team: Deployment, box: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What fails in a rehearsal is not told to production's people, nor the other way round."""
    run = await team.run(Running(), Failed())
    monkeypatch.setenv(PREFIX_VARIABLE, "dev.")
    assert await team.tell(run) == "nothing to tell"
    assert box.slack.messages == []


async def test_a_run_that_does_not_end(team: Deployment, box: Sandbox) -> None:
    """It is told to its own people, and over when it ends well."""
    run = await team.run(Running(), notify=team.notify)
    assert await team.tell(run, stuck_for=43200) == "nothing to tell"  # it has only just begun again
    assert box.slack.messages == []
    assert await team.tell(run, stuck_for=0) == "told"
    assert "*the run* does not end: It has been Running since" in box.slack.messages[0].text


async def test_a_run_that_is_at_it_again(team: Deployment, box: Sandbox) -> None:
    """It failed and was retried or rescued before the alert came: that it runs is nobody's trouble."""
    run = await team.run(Running(), Failed(), Running())
    assert await team.tell(run) == "nothing to tell"
    await team.put(run, Crashed(), Pending())
    assert await team.tell(run) == "nothing to tell"
    assert box.slack.messages == []


async def test_a_crash_is_told_with_its_jobs_and_the_rescue_ends_it(team: Deployment, box: Sandbox) -> None:
    """What goes on at the vendor is named, with its link; the rescued run itself ends the incident."""
    run = await team.run(Running(), Crashed(message="SIGKILL."))
    handle = JobHandle(
        vendor="airbyte",
        resource_id="c",
        job_id="77",
        marker="m",
        started_at=datetime.now(UTC),
        url="https://airbyte.test/jobs/77",
    )
    entry = Entry(
        key="airbyte:sync:c",
        vendor="airbyte",
        resource_id="c",
        name="orders",
        since=datetime.now(UTC),
        handle=handle,
    )
    page = _page_text([entry])
    await team.client.create_artifact(
        ArtifactCreate(key=ARTIFACT_KEY, type="markdown", data=page, flow_run_id=run.id)
    )
    assert (await recover(run.id, silent_for=1, notify=team.notify)).did == "rescheduled"
    (message,) = box.slack.sent_to("weather-desk")
    assert "*the run* crashed: SIGKILL. It is started again in 15 s, rescue 1 of 3." in message.text
    assert "Its jobs at the vendors go on: airbyte orders." in message.text
    assert "<https://airbyte.test/jobs/77|job 77>" in message.text
    # The worker's report, and the automation for those who tell nobody, come to the same incident.
    crashed = await team.put(run, Crashed())
    await team.tell(crashed)
    assert len(box.slack.messages) == 1
    assert await team.tell(await team.put(run, Running(), Completed())) == "told"
    assert "*the run* is well again" in box.slack.messages[-1].text
    assert box.pagerduty.open_of() == []


async def test_given_up_is_told_as_well(team: Deployment, box: Sandbox) -> None:
    """After the last rescue: a second incident, which says that nobody but a person can help now."""
    run = await team.run(Running(), Crashed(message="Out of memory."))
    await recover(run.id, at_most=1, silent_for=1, notify=team.notify)
    await team.put(run, Running(), Crashed(message="Out of memory."))
    assert (await recover(run.id, at_most=1, silent_for=1, notify=team.notify)).did == "given up"
    assert "*the run* was given up: Out of memory. It has been rescued 1 time" in box.slack.messages[-1].text
    assert len(box.pagerduty.open_of()) == 2
    assert await team.tell(await team.run(Running(), Completed())) == "told"
    assert box.pagerduty.open_of() == []
