"""The automations of this project on a real server: put there, changed, switched off, removed."""

from __future__ import annotations

import ast
import re
import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import yaml
from prefect import Flow
from prefect.client.orchestration import PrefectClient, get_client
from prefect.events.schemas.automations import Automation, AutomationCore, EventTrigger, Posture
from prefect.server.events.schemas.automations import EventTrigger as ServerTrigger
from prefect.server.events.schemas.events import RelatedResource, Resource
from prefect.utilities.importtools import import_object
from prefect_slack import SlackWebhook

from deployments.automations import FILE, AutomationsError, main, plan, read_entries, remove
from deployments.environments import environment
from flows.alert import alert
from flows.alerts import tell_of_end
from flows.recover import recover
from tests.deployed import REPOSITORY, specs
from tests.jobs_fixtures import PREFECTS_SOCKETS, collected

__all__ = ["collected"]

pytestmark = PREFECTS_SOCKETS

_CAMEL = re.compile(r"[A-Z][a-z]+([A-Z][a-z]+)*")


@pytest.fixture
async def client() -> AsyncIterator[PrefectClient]:
    """The API, with what the automations name; none of them is left behind."""
    async with get_client() as client:
        for flow, name in ((recover, "dead-runs"), (alert, "untold-runs")):
            await client.create_deployment(await client.create_flow(flow), name=name)
        await SlackWebhook(url="https://hooks.slack.com/services/T/B/x").save("data-alerts", overwrite=True)  # type: ignore[misc]
        yield client
        await remove(client, await _there(client))


async def _there(client: PrefectClient) -> list[Automation]:
    return (await plan(client, [])).remove


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """The file, for a test to change."""
    return Path(shutil.copy(FILE, tmp_path / "automations.yaml"))


async def make(file: Path, *arguments: str) -> int:
    return await main(["--file", str(file), *arguments])


def changed(file: Path, **changes: Any) -> str:
    """Change the first automation of the file; its name."""
    found = yaml.safe_load(file.read_text())
    first: dict[str, Any] = found["automations"][0]
    first.update(changes)
    file.write_text(yaml.safe_dump(found))
    return str(first["name"])


def replaced(file: Path, words: dict[str, str]) -> None:
    text = file.read_text()
    for old, new in words.items():
        text = text.replace(old, new)
    file.write_text(text)


async def test_twice(client: PrefectClient, file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The second time there is nothing to do, and nothing is done."""
    assert await make(file, "--check") == 1
    assert await make(file) == 0
    first = {automation.id: automation for automation in await _there(client)}
    assert len(first) == len(read_entries(file))
    capsys.readouterr()
    assert await make(file) == 0
    assert capsys.readouterr().out.endswith("\nNothing to do.\n")
    assert await make(file, "--check") == 0
    assert {automation.id: automation for automation in await _there(client)} == first


async def test_a_change_is_made_in_place(client: PrefectClient, file: Path) -> None:
    """What is different in the file is different on the server; it stays the same automation."""
    await make(file)
    (old,) = [a for a in await _there(client) if "heartbeats" in a.name]
    entry = next(entry for entry in read_entries(file) if entry.name == old.name)
    changed(file, trigger={**entry.trigger, "within": 500})
    await make(file)
    (new,) = [a for a in await _there(client) if a.name == old.name]
    assert new.id == old.id
    assert isinstance(new.trigger, EventTrigger)
    assert new.trigger.within.total_seconds() == 500


async def test_switched_off_by_an_operator(
    client: PrefectClient, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It stays off, also when what it does is changed, and that is said."""
    await make(file)
    name = read_entries(file)[0].name
    (automation,) = [a for a in await _there(client) if a.name == name]
    await client.pause_automation(automation.id)
    changed(file, description="Another one.")
    capsys.readouterr()
    await make(file)
    assert f"switched off by an operator, and left so: {name}" in capsys.readouterr().out
    (after,) = [a for a in await _there(client) if a.name == name]
    assert (after.enabled, after.description) == (False, "Another one.")


async def test_what_is_no_longer_in_the_file(
    client: PrefectClient, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is offered for deletion, and deleted when asked to; what is not ours is never touched."""
    await make(file)
    first = (await _there(client))[0].model_dump(exclude={"id"})
    theirs = await client.create_automation(
        AutomationCore.model_validate({**first, "name": "somebody's", "tags": []})
    )
    old = read_entries(file)[0].name
    changed(file, name="elt: a new one")
    capsys.readouterr()
    assert await make(file) == 0
    assert f"no longer in the file: {old}. ARGS=--prune deletes them." in capsys.readouterr().out
    assert {old, "elt: a new one"} <= {automation.name for automation in await _there(client)}
    await make(file, "--prune")
    assert old not in {automation.name for automation in await _there(client)}
    assert await client.read_automation(theirs)
    await client.delete_automation(theirs)


async def test_what_is_not_deployed(
    file: Path, client: PrefectClient, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every deployment and block that is missing is named, with what to do, and nothing is changed."""
    replaced(file, {"dead-runs": "gone", "data-alerts": "nowhere"})
    assert await make(file) == 1
    said = capsys.readouterr().err
    assert "There is no deployment recover/gone on this server: deploy it first" in said
    assert "There is no block slack-incoming-webhook/nowhere on this server: save it" in said
    assert len(said.splitlines()) == 2
    assert await _there(client) == []


async def test_another_way_of_telling(
    client: PrefectClient, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was not delivered is told by the first block that is saved; that one stands in is said."""
    await make(file)
    said = capsys.readouterr().out
    assert said.count("There is no block slack-incoming-webhook/fallback-alerts on this server, and ") == 1
    assert "slack-incoming-webhook/data-alerts stands in for it" in said
    fallback = await SlackWebhook(url="https://hooks.slack.com/services/T/B/y").save("fallback-alerts")  # type: ignore[misc]
    try:
        await make(file)
        said = capsys.readouterr().out
        assert "stands in" not in said
        assert "changed: elt: tell of alerts that were not delivered" in said
        ways = {
            automation.name: action.block_document_id
            for automation in await _there(client)
            for action in automation.actions
            if action.type == "send-notification"
        }
        another = {name for name, block in ways.items() if block == fallback}
        assert another == {
            "elt: tell of alerts that were not delivered",
            "elt: tell of alerts that failed",
            "elt: tell of automations that failed",
        }
    finally:
        await SlackWebhook.adelete("fallback-alerts")


async def test_another_environment(
    client: PrefectClient, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It has automations of its own, which start its own deployments; neither touches the other's."""
    assert await make(file, "--env", "dev") == 1
    assert "There is no deployment recover/dev.dead-runs" in capsys.readouterr().err
    ours = {}
    for flow, name in ((recover, "dev.dead-runs"), (alert, "dev.untold-runs")):
        ours[name] = await client.create_deployment(await client.create_flow(flow), name=name)
    dev = environment("dev")
    try:
        await make(file)
        assert await make(file, "--env", "dev") == 0
        there = (await plan(client, [], dev)).remove
        assert {automation.name for automation in there} == {
            f"dev.{entry.name}" for entry in read_entries(file) if "deployment" in entry.actions[0]
        }
        started = {
            action.deployment_id for one in there for action in one.actions if action.type == "run-deployment"
        }
        assert started == set(ours.values())
        for arguments in ((), ("--env", "dev")):
            assert await make(file, "--check", *arguments) == 0
        assert await make(file, "--env", "nowhere") == 1
    finally:
        await remove(client, (await plan(client, [], dev)).remove)


@pytest.mark.no_server
def test_a_file_that_is_wrong(file: Path) -> None:
    """A misspelt key is said, and two of one name."""
    changed(file, triger={})
    with pytest.raises(AutomationsError, match="triger"):
        read_entries(file)
    found = yaml.safe_load(FILE.read_text())
    found["automations"].append(found["automations"][0])
    file.write_text(yaml.safe_dump(found))
    with pytest.raises(AutomationsError, match="two automations are called"):
        read_entries(file)


@pytest.mark.no_server
def test_every_flow_that_is_deployed_is_watched() -> None:
    """A deployment of a flow that no automation looks after is one whose dead runs nobody sees."""
    watched = {
        name
        for entry in read_entries()
        for name in _names(entry.trigger.get("match_related", {}).get("prefect.resource.name", []))
        if any(action.get("deployment") == "recover/dead-runs" for action in entry.actions)
    }
    deployed = {_flow(spec["entrypoint"]).name for spec in specs().values()}
    # What `recover` itself leaves undone another deployment of it begins anew, on its schedule.
    assert deployed - {recover.name} == watched
    look, rescuer = specs()["missed-runs"], specs()["dead-runs"]
    assert look["parameters"]["rescuer"] == "dead-runs"
    assert look["schedules"]
    assert not rescuer.get("schedules")
    for seconds in ("silent_for", "pending_for"):
        assert look["parameters"][seconds] == rescuer["parameters"][seconds]


@pytest.mark.no_server
def test_whoever_names_whom_to_tell_tells_of_its_own_end() -> None:
    """`alert` passes over a run whose parameters name its people: its flow has the hooks that tell them."""
    deployed = [_flow(spec["entrypoint"]) for spec in specs().values()]
    flows = {flow.name: flow for flow in deployed}
    telling = {name for name, flow in flows.items() if "notify" in flow.parameters.properties}
    assert {name for name in telling if tell_of_end not in flows[name].on_failure_hooks} == {alert.name}
    # A rescue or an alert that crashed is begun anew, and nobody's trouble.
    silent = {name for name in telling if tell_of_end not in flows[name].on_crashed_hooks}
    assert silent == {alert.name, recover.name}


@pytest.mark.no_server
@pytest.mark.parametrize(("flow_name", "told"), [("recover", False), ("elt-chain", True)])
def test_of_whose_late_runs_is_told(flow_name: str, told: bool) -> None:
    """By the server's own rule. After a night without a worker many looks are late, and it matters little."""
    (entry,) = [entry for entry in read_entries() if "are late" in entry.name]
    late = Resource({"prefect.resource.id": f"prefect.flow-run.{uuid4()}", "prefect.state-type": "SCHEDULED"})
    related = [
        RelatedResource({"prefect.resource.id": f"prefect.{role}.{uuid4()}", **labels})
        for role, labels in (
            ("deployment", {"prefect.resource.role": "deployment", "prefect.resource.name": "d"}),
            ("flow", {"prefect.resource.role": "flow", "prefect.resource.name": flow_name}),
        )
    ]
    trigger = ServerTrigger.model_validate(entry.trigger)
    assert trigger.covers_resources(late, related) is told
    assert specs()["missed-runs"]["concurrency_limit"] == {"limit": 1, "collision_strategy": "CANCEL_NEW"}


def _names(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


@pytest.mark.no_server
def test_no_alert_of_an_alert() -> None:
    """An alert that can't be run at all would be told of by one more, without an end."""
    for entry in read_entries():
        if any(action.get("deployment") == "alert/untold-runs" for action in entry.actions):
            assert alert.name not in _names(entry.trigger["match_related"]["prefect.resource.name"])


@pytest.mark.no_server
def test_whatever_a_run_ends_by_is_an_end() -> None:
    """An incident begins and ends at whatever a state is called: events have the state's name in theirs."""
    (entry,) = [entry for entry in read_entries() if "well again" in entry.name]
    bad, well = (
        {event.removeprefix("prefect.flow-run.") for event in entry.trigger[key]}
        for key in ("after", "expect")
    )
    found: set[str] = set()
    for file in (REPOSITORY / "flows").glob("*.py"):
        if file.stem not in ("recover", "alert"):  # of which nobody is told so
            found |= _endings(ast.parse(file.read_text()))
    assert found - bad - well == set()
    assert (bad | well) - found == {"Crashed", "TimedOut"}  # Prefect's own
    assert not bad & well


def _endings(module: ast.Module) -> set[str]:
    """The names of final states in a module: given to one, or to what becomes the name of one."""
    found: list[ast.AST] = []
    for node in ast.walk(module):
        match node:
            case ast.Call(func=ast.Name(id="Completed" | "Failed" as kind)):
                names = [keyword.value for keyword in node.keywords if keyword.arg == "name"]
                found += names or [ast.Constant(kind)]
            case ast.Call(func=ast.Name(id=("_ended" | "_failed")) | ast.Attribute(attr="ended")):
                found += node.args
            case ast.Assign(targets=[ast.Name(id="name" | "ending" | "_AS_LOOKED")]):
                found.append(node.value)
    constants = [inner.value for node in found for inner in ast.walk(node) if isinstance(inner, ast.Constant)]
    return {value for value in constants if isinstance(value, str) and _CAMEL.fullmatch(value)}


def _flow(entrypoint: str) -> Flow[..., Any]:
    found = import_object(entrypoint)
    assert isinstance(found, Flow)
    return found


@pytest.mark.no_server
def test_a_heartbeat_may_be_missed() -> None:
    """The patience with a silent run is more than two of the heartbeats that its deployment sets."""
    (entry,) = [entry for entry in read_entries() if "heartbeats" in entry.name]
    beats = {
        float(spec["work_pool"]["job_variables"]["env"]["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"])
        for spec in specs().values()
    }
    assert entry.trigger["posture"] == Posture.Proactive.value
    assert entry.trigger["within"] > 2 * max(beats)
    assert specs()["dead-runs"]["parameters"]["silent_for"] > 2 * max(beats)


@pytest.mark.no_server
def test_who_is_told_that_a_run_does_not_end() -> None:
    """Only the automation that has waited for its end has `alert` tell so, and after as long."""
    said = {
        entry.name: action["parameters"].get("stuck_for")
        for entry in read_entries()
        for action in entry.actions
        if action.get("deployment") == "alert/untold-runs"
    }
    (waited,) = [entry for entry in read_entries() if "do not end" in entry.name]
    assert {name: seconds for name, seconds in said.items() if seconds} == {
        waited.name: waited.trigger["within"]
    }


@pytest.mark.no_server
def test_a_container_may_take_its_time() -> None:
    """The automation and the flow that it starts have the same patience with a run that is Pending."""
    (entry,) = [entry for entry in read_entries() if "never began" in entry.name]
    assert entry.trigger["within"] == specs()["dead-runs"]["parameters"]["pending_for"]
