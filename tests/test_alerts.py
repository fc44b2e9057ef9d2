"""Alerts: what an incident is, how it is remembered, and that telling fails and delays no run."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any
from uuid import uuid4

import pytest
from prefect.client.orchestration import PrefectClient, get_client
from prefect.states import Cancelled, Crashed
from prefect_slack import SlackWebhook

from blocks import PagerDutyRouting
from flows import elt_chain, sync_connections
from flows.alerts import bulletin, tell_of_end
from flows.report import EltReport, Step, StepState
from sandbox import Sandbox, catalog
from tasks.dbt.model import DbtNode, DbtState
from tasks.incidents import FORGET, OF_RUNS, Bulletin, Change, Happened, Incident, compare, mark
from tasks.memory import VariableMemory
from tests.alerts_fixtures import NOON, alarm, channel, impatient, pagerduty, routing, webhook
from tests.flows_fixtures import Runs, box, runs, sources, starts, sync_parameters, task_runs

__all__ = ["box", "impatient", "runs", "sources"]


# -- what an incident is ------------------------------------------------------------------------------------


def _compare(open_: list[Incident], *failing: str, fine: tuple[str, ...] = (), **more: Any) -> list[Change]:
    told = Bulletin(
        pipeline="p",
        occasion=more.pop("occasion", "new"),
        at=more.pop("at", NOON),
        alarms=[alarm(name) for name in failing],
        fine=[f"airbyte/{name}" for name in fine],
    )
    return compare(open_, told, to=lambda owner: owner or "main", **more)


def _open(name: str, **changes: Any) -> Incident:
    (opened,) = _compare([], name, occasion="first")
    return opened.incident.model_copy(update={"told": {}, **changes})


def test_the_key_says_what_and_never_when() -> None:
    """Two runs, one key: of the pipeline, the tool and the resource."""
    (one,), (other,) = (
        _compare([], "a", occasion="1"),
        _compare([], "a", occasion="2", at=NOON + timedelta(1)),
    )
    assert one.incident.key == other.incident.key == "p/airbyte/a"


def test_what_did_not_run_says_nothing() -> None:
    """A run of one connection ends no incident of another; nor does a step that was held back."""
    assert _compare([_open("a"), _open("b")], fine=("c",)) == []
    (change,) = _compare([_open("a"), _open("b")], fine=("b",))
    assert (change.happened, change.incident.key) == (Happened.RECOVERED, "p/airbyte/b")


def test_what_is_wrong_is_not_well_at_the_same_time() -> None:
    """Two steps of one key, such as two gates of rows: while one of them fails the incident lasts."""
    (opened,) = _compare([], "a", fine=("a",))
    assert opened.happened is Happened.OPENED
    (again,) = _compare([_open("a")], "a", fine=("a",))
    assert (again.happened, again.incident.members) == (Happened.REPEATED, opened.incident.members)
    assert _compare([_open("a")], "a", fine=("a",), wanted=lambda _: False) == []
    both = Bulletin(pipeline="p", alarms=[alarm(reason="too few rows"), alarm(reason="too old")])
    (one,) = compare([], both, to=str)
    assert one.alarms[0].reason == "too few rows; too old"


def test_a_shared_name_shares_failures_and_not_deaths() -> None:
    """A load by hand ends what the nightly one opened, but says nothing of whether that one can begin."""
    night = Bulletin(pipeline="nightly", alarms=[alarm("a"), alarm(key="run")]).under("flights")
    hand = Bulletin(pipeline="by-hand", fine=["run", "airbyte/a"], occasion="2").under("flights")
    open_ = [change.incident for change in compare([], night, to=str)]
    assert [incident.key for incident in open_] == ["flights/airbyte/a", "flights/run/nightly"]
    (ended,) = compare(open_, hand, to=str)
    assert (ended.happened, ended.incident.key) == (Happened.RECOVERED, "flights/airbyte/a")


def test_the_same_occasion_is_told_once() -> None:
    """A crash is reported twice by Prefect's process worker; a retry of a run is another occasion."""
    incident = _open("a", occasion="run:1")
    assert _compare([incident], "a", occasion="run:1") == []
    (again,) = _compare([incident], "a", occasion="run:2")
    assert (again.happened, again.incident.runs) == (Happened.REPEATED, 2)


def test_what_another_run_is_telling_is_left_to_it() -> None:
    """An incident that is remembered and not told yet is told by whoever remembered it, if it lives."""
    incident = _open("a", told=None)
    assert _compare([incident], "a", at=NOON + timedelta(seconds=5)) == []
    (died,) = _compare([incident], "a", at=NOON + timedelta(minutes=2))
    assert died.happened is Happened.OPENED
    (failed,) = _compare([incident.model_copy(update={"undelivered": True})], "a")
    assert failed.happened is Happened.OPENED


def test_what_nothing_runs_any_more_is_closed_at_last() -> None:
    """A connection that was taken out of the pipeline can't recover: after two weeks it is forgotten."""
    assert _compare([_open("a")], at=NOON + FORGET) == []
    (change,) = _compare([_open("a")], at=NOON + FORGET + timedelta(1))
    assert change.happened is Happened.FORGOTTEN


def test_many_at_once_are_one_and_stay_one() -> None:
    """More than `several` new alarms of an owner are one incident; what has one of its own keeps it."""
    names = [f"c{number}" for number in range(5)]
    own, group = _compare([_open("c0")], *names, several=3)
    assert (own.happened, group.happened) == (Happened.REPEATED, Happened.OPENED)
    assert (group.incident.key, len(group.alarms)) == ("p/several", 4)
    told = group.incident.model_copy(update={"told": {}, "occasion": "first"})
    (few,) = _compare([told], "c1", fine=("c2", "c3"), several=3)
    assert few.incident.members == [mark("airbyte/c1"), mark("airbyte/c4")]
    (joined,) = _compare([told], *(f"d{number}" for number in range(5)), several=3)
    assert (joined.happened, joined.incident.key) == (Happened.REPEATED, "p/several")
    (shrunk,) = _compare([told], fine=("c1",))
    assert shrunk.happened is Happened.SHRUNK
    (ended,) = _compare([told], fine=tuple(names))
    assert ended.happened is Happened.RECOVERED


def test_a_report_becomes_alarms() -> None:
    """Each dbt node that failed is an alarm with its group's owner and its words; what waits is none."""

    def node(name: str, state: DbtState, **more: Any) -> DbtNode:
        return DbtNode(
            unique_id=f"model.shop.{name}",
            name=name,
            resource_type="model",
            state=state,
            message=name,
            **more,
        )

    def step(kind: Any, tool: str, name: str, state: StepState, **more: Any) -> Step:
        return Step(kind=kind, tool=tool, resource_id=name, name=name, state=state, **more)

    report = EltReport(
        ending="PartiallyRefreshed",
        steps=[
            step("sync", "airbyte", "a", StepState.SUCCEEDED),
            step("sync", "airbyte", "b", StepState.FAILED, message="No route", owner="ops"),
            step("sync", "airbyte", "c", StepState.PARTIAL, tolerated=True),
            step("transform", "dbt-core", "shop", StepState.FAILED, owner="build"),
            step(
                "activation",
                "hightouch",
                "1",
                StepState.HELD,
                message="b is late",
                because=["airbyte/b"],
            ),
            step("activation", "hightouch", "2", StepState.SUCCEEDED),
        ],
        nodes=[
            node("m", DbtState.ERROR, owner="desk"),
            node("n", DbtState.FAIL),
            node("o", DbtState.WARN),
            node("p", DbtState.SKIPPED),
        ],
    )
    told = bulletin(report, pipeline="p", occasion="1")
    assert [(a.key, a.owner, a.reason, a.level) for a in told.alarms] == [
        ("airbyte/b", "ops", "No route", "partial"),
        ("dbt/model.shop.m", "desk", "m", "partial"),
        ("dbt/model.shop.n", "build", "n", "partial"),
    ]
    assert [a.held for a in told.alarms] == [["1 (b is late)"], [], []]
    assert told.fine == [
        *OF_RUNS,
        "airbyte/a",
        "airbyte/a/fresh",
        "airbyte/c",
        "airbyte/c/fresh",
        "dbt-core/shop",
        "hightouch/2",
        "dbt/model.shop.o",
    ]


# -- how it is remembered -----------------------------------------------------------------------------------


@pytest.fixture
async def client() -> AsyncIterator[PrefectClient]:
    async with get_client() as found:
        yield found


def _memory(client: PrefectClient) -> VariableMemory:
    return VariableMemory(client, f"p-{time.monotonic_ns()}", "test")


async def test_of_many_runs_at_once_one_tells(client: PrefectClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many runs meet the same trouble, or its end, at the same moment: one of them has it to tell."""
    monkeypatch.setattr("tasks.memory._STALE", timedelta(hours=1))  # a busy SQLite may hold us up
    memory = _memory(client)
    opened = await asyncio.gather(*(memory.open(_open("a")) for _ in range(8)))
    assert sorted(opened) == [False] * 7 + [True]
    ended = await asyncio.gather(*(memory.claim_end(_open("a")) for _ in range(8)))
    assert sorted(ended) == [False] * 7 + [True]
    await memory.close(_open("a"))
    assert not await memory.claim_end(_open("a")), "it has been told"
    assert await memory.read() == []


async def test_two_runs_at_once_tell_slack_once(box: Sandbox) -> None:
    """The same for whole runs: one message when it begins, one when it ends, one alert."""
    for one in (webhook(box), channel(box), pagerduty(box)):
        await asyncio.gather(*(one.run("a") for _ in range(4)))
        await asyncio.gather(*(one.run(fine=["a"]) for _ in range(4)))
    over_webhook = [message for message in box.slack.messages if message.by_webhook]
    over_api = [message for message in box.slack.messages if not message.by_webhook]
    assert len(over_webhook) == 2
    assert len([message for message in over_api if not message.thread_ts]) == 1
    assert "is well again" in over_api[-1].text
    assert len(box.pagerduty.alerts) == 1
    assert box.pagerduty.open_of() == []


async def test_a_claim_of_the_dead_does_not_last(
    client: PrefectClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that dies while telling an end leaves it to one that comes a minute later."""
    memory = _memory(client)
    await memory.open(_open("a"))
    assert await memory.claim_end(_open("a"))
    assert not await memory.claim_end(_open("a"))
    monkeypatch.setattr("tasks.memory._STALE", timedelta(0))
    assert await memory.claim_end(_open("a"))
    await memory.release_end(_open("a"))
    monkeypatch.undo()
    assert await memory.claim_end(_open("a"))


async def test_long_words_fit_into_a_variable(client: PrefectClient) -> None:
    """A variable holds 5,000 characters; what is cut is the reason, and never what it is known by."""
    memory = _memory(client)
    long = _open("a", reason="漢" * 500, title="題" * 150, members=[f"{n:06}" for n in range(250)])
    assert await memory.open(long)
    (found,) = await memory.read()
    assert (found.key, len(found.members)) == ("p/airbyte/a", 250)
    assert found.reason
    assert long.reason.startswith(found.reason)


async def test_more_than_a_page_is_read(client: PrefectClient) -> None:
    """Prefect gives out 200 variables at a time."""
    memory = _memory(client)
    await asyncio.gather(*(memory.open(_open(f"c{number}")) for number in range(205)))
    assert len(await memory.read()) == 205


async def test_a_variable_that_is_broken_is_no_obstacle(client: PrefectClient) -> None:
    """What somebody has written over is forgotten, and told anew."""
    memory = _memory(client)
    await memory.open(_open("a"))
    name = memory._name(_open("a"))
    await client.request("PATCH", f"/variables/name/{name}", json={"value": "?"})
    assert await memory.read() == []
    assert await memory.open(_open("a"))


# -- telling fails and delays nothing -----------------------------------------------------------------------


FAULTS = {
    "404": {"kind": "status", "status": 404, "body": "no_service"},
    "an hour": {"kind": "status", "status": 429, "headers": {"Retry-After": "3600"}},
    "always 429": {"kind": "status", "status": 429},
    "timeout": {"kind": "delay", "delay": 30},
    "500": {"kind": "status", "status": 500},
    "dropped": {"kind": "drop"},
    "garbage": {"kind": "garbage"},
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("way", [webhook, channel, pagerduty])
@pytest.mark.usefixtures("impatient")
async def test_what_can_not_be_told_is_in_the_log(
    box: Sandbox, caplog: pytest.LogCaptureFixture, way: Any, fault: str
) -> None:
    """Whatever is wrong with it: no exception, no waiting without end, and a line that says so."""
    one = way(box)
    switched = box.faults.add(**FAULTS[fault])
    assert not await one.run("a")
    (line,) = (told for told in caplog.messages if "was not told of airbyte a (opened, to " in told)
    assert "The next run tries again" in line
    for secret in ("/services/", "sandboxDataAlerts", catalog.SLACK_TOKEN, "R0SANDBOX"):
        assert secret not in caplog.text
    box.faults.remove(switched)
    assert await one.run("a")


@pytest.mark.usefixtures("impatient")
async def test_an_end_that_can_not_be_told_stays_to_be_told(box: Sandbox) -> None:
    """A resolve that PagerDuty did not take is sent by the next run."""
    one = pagerduty(box)
    await one.run("a")
    switched = box.faults.add(kind="status", status=500, vendor="pagerduty")
    assert not await one.run(fine=["a"])
    box.faults.remove(switched)
    assert len(box.pagerduty.open_of()) == 1
    assert await one.run(fine=["a"])
    assert box.pagerduty.open_of() == []


@pytest.mark.usefixtures("impatient")
async def test_one_dead_channel_does_not_silence_the_others(box: Sandbox) -> None:
    """Places are told beside each other."""
    one = channel(box, owners={"x": "flight-ops", "y": "weather-desk"})
    box.slack.break_channel("flight-ops", "channel_is_archived")
    assert not await one.run(alarm("a", owner="x"), alarm("b", owner="y"), alarm("c"))
    assert {message.channel for message in box.slack.messages} == {"weather-desk", "data-alerts"}


@pytest.mark.usefixtures("impatient")
async def test_without_prefects_api_people_are_told_all_the_same(
    box: Sandbox, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Better twice than not at all: what can't be looked up counts as new, and PagerDuty folds it anyway."""

    async def away(self: VariableMemory) -> list[Incident]:
        raise ConnectionError("http://user:pass@prefect")

    monkeypatch.setattr(VariableMemory, "read", away)
    one = pagerduty(box)
    assert await one.run("a")
    assert await one.run("a")
    (alert,) = box.pagerduty.alerts
    assert len(alert.triggers) == 2
    assert "could not be read (ConnectionError)" in caplog.text
    assert "user:pass" not in caplog.text


async def test_a_block_that_is_gone_is_named(box: Sandbox, caplog: pytest.LogCaptureFixture) -> None:
    """A block that was deleted after the check is in the log, by name."""
    one = webhook(box, webhook="deleted-meanwhile")
    assert not await one.run("a")
    assert "no Slack Incoming Webhook block named 'deleted-meanwhile'" in caplog.text


@pytest.mark.parametrize("way", [pagerduty, webhook])
async def test_an_incident_goes_on_where_its_owner_is_told_now(
    box: Sandbox, way: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An owner's block is renamed and the old one deleted: what is open is neither lost nor left open."""
    old, new = (f"{name}-{uuid4().hex[:6]}" for name in ("old", "new"))
    kind: Any = PagerDutyRouting if way is pagerduty else SlackWebhook
    block = routing(box, "flight-ops") if way is pagerduty else SlackWebhook(url=box.slack_url("flight-ops"))
    await block.save(old)
    one = way(box, owners={"ops": old})
    assert await one.run(alarm("a", owner="ops"), alarm("b", owner="ops"))
    await block.save(new)
    await kind.adelete(old)
    one.notify = way(box, owners={"ops": new}).notify
    monkeypatch.setattr("blocks.reference._KEPT", 0.0)  # a minute has passed
    assert await one.run(alarm("a", owner="ops"), fine=["b"])
    assert await one.run(fine=["a"])
    if way is pagerduty:
        assert sorted(len(alert.triggers) for alert in box.pagerduty.alerts) == [1, 2]  # side by side
        assert box.pagerduty.open_of() == []
    else:
        assert len(box.slack.messages) == 3, "told, told on, and told that it is well again"


# -- flows --------------------------------------------------------------------------------------------------


def _all_ways(box: Sandbox, **changes: Any) -> list[dict[str, Any]]:
    ways: list[dict[str, Any]] = [
        {"tool": "slack", "webhook": "data-alerts", "on": "failure"},
        {
            "tool": "slack-channel",
            "credentials": "slack",
            "channel": "flight-ops",
            "api_url": box.slack_api_url,
            "on": "failure",
        },
        {"tool": "pagerduty", "routing": "data-platform"},
    ]
    return [{**way, **changes} for way in ways]


def _sync(box: Sandbox, runs: Runs, **changes: Any) -> Any:
    parameters = {"syncs": sync_parameters("airlines", "airports"), "notify": _all_ways(box), **changes}
    return runs.run(sync_connections, runs.create(sync_connections, parameters))


def test_two_runs_that_fail_are_one_incident_and_recovery_ends_it(box: Sandbox, runs: Runs) -> None:
    """Real runs: two that fail are one message, one thread and one alert; then each place hears the end."""
    box.airbyte.set("airports", outcome="fail")
    assert _sync(box, runs).name == "Failed"
    assert _sync(box, runs).name == "Failed"

    (alert,) = box.pagerduty.open_of()
    assert alert.dedup_key == f"sync-connections/airbyte/{sync_parameters('airports')[0]['connection_id']}"
    assert len(alert.triggers) == 2
    assert sorted(message.channel for message in box.slack.messages) == ["data-alerts", "flight-ops"]
    assert "2nd run, since" in box.slack.sent_to("flight-ops")[0].text

    box.airbyte.set("airports", outcome="succeed")
    assert _sync(box, runs).name == "Completed"

    assert box.pagerduty.open_of() == []
    assert "*airbyte airports* is well again" in box.slack.sent_to("data-alerts")[-1].text
    root, end = box.slack.sent_to("flight-ops")
    assert root.text.startswith("✓ ~airbyte airports~")
    assert end.thread_ts == root.ts
    asked = box.requests.count(vendor="pagerduty")
    assert _sync(box, runs).name == "Completed"
    assert box.requests.count(vendor="pagerduty") == asked
    assert len(box.slack.messages) == 4


def test_one_may_be_given_alone(box: Sandbox, runs: Runs) -> None:
    """A list is what the form shows; in Python one notify does."""
    box.airbyte.set("airports", outcome="fail")
    assert _sync(box, runs, notify=_all_ways(box)[2]).name == "Failed"
    assert len(box.pagerduty.open_of()) == 1


def test_a_run_that_is_refused_is_told(box: Sandbox, runs: Runs) -> None:
    """Bad input starts nothing, and somebody hears of it; the next run that begins ends that."""
    box.airbyte.set("airports", status="inactive")
    state = _sync(box, runs)
    assert state.is_failed()
    assert starts(box) == 0
    (alert,) = box.pagerduty.open_of()
    assert (alert.severity, alert.dedup_key) == ("critical", "sync-connections/run")
    assert "the run could not begin in sync-connections: " in alert.summary
    assert "inactive" in alert.summary
    assert "inactive" in box.slack.sent_to("data-alerts")[0].text
    assert len(alert.triggers) == 1, "the on_failure hook has nothing to add"

    box.airbyte.set("airports", status="active")
    assert _sync(box, runs).name == "Completed"
    assert box.pagerduty.open_of() == []


def test_a_notify_that_is_not_saved_is_refused_and_the_others_are_told(box: Sandbox, runs: Runs) -> None:
    """A missing block is bad input like any other; who can be told of it, is."""
    notify = [{"tool": "pagerduty", "routing": "nobody"}, *_all_ways(box)]
    state = _sync(box, runs, notify=notify)
    assert "no PagerDuty Routing block named 'nobody'" in (state.message or "")
    assert starts(box) == 0
    assert "named 'nobody'" in box.pagerduty.open_of()[0].summary


def test_alerts_that_can_not_be_delivered_change_nothing(box: Sandbox, runs: Runs) -> None:
    """A run whose alerts fail ends as without them; the task runs that could not tell say so."""
    box.airbyte.set("airports", outcome="fail")
    for vendor in ("slack", "pagerduty"):
        headers = {"Retry-After": "3600"}
        box.faults.add(kind="status", status=429, headers=headers, vendor=vendor)
    parameters = {
        "syncs": sync_parameters("airlines", "airports"),
        "notify": _all_ways(box),
        "allow_failure": "any",
    }
    run_id = runs.create(sync_connections, parameters)

    state = runs.run(sync_connections, run_id)

    assert state.name == "PartiallyRefreshed"
    told = [run for run in task_runs(run_id, until=7) if run.name.startswith("tell")]
    assert [run.state_name for run in told] == ["Undelivered"] * 3


async def _ended(flow: Any, state: Any, parameters: dict[str, Any]) -> Any:
    async with get_client() as client:
        flow_run = await client.create_flow_run(flow, parameters=parameters)
    await tell_of_end(flow, flow_run, state)
    return flow_run


async def test_a_run_that_died_is_told_by_a_hook(box: Sandbox, runs: Runs) -> None:
    """The hook works in any process, by the run's parameters, and once for each death."""
    parameters = {"syncs": sync_parameters(), "notify": _all_ways(box)}
    flow_run = await _ended(elt_chain, Crashed(message="The process was killed."), parameters)
    await tell_of_end(elt_chain, flow_run, Crashed(message="The process was killed."))
    (alert,) = box.pagerduty.open_of()
    assert alert.summary == "the run crashed in elt-chain: The process was killed."
    assert len(alert.triggers) == 1
    assert len(box.slack.messages) == 2
    await _ended(elt_chain, Cancelled(), parameters)
    assert "the run was cancelled in elt-chain" in box.pagerduty.open_of()[0].summary


async def test_the_hook_of_a_run_without_notify_says_nothing(
    box: Sandbox, caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody to tell is no trouble; what can't be read is said."""
    await _ended(elt_chain, Crashed(), {"syncs": sync_parameters()})
    assert "Nobody is told" not in caplog.text
    with caplog.at_level(logging.WARNING):
        await _ended(elt_chain, Crashed(), {"syncs": sync_parameters(), "notify": [{"tool": "fax"}]})
    assert "Nobody is told that the run crashed" in caplog.text
    assert box.requests.count() == 0
