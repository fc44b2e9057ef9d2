"""Events in: one event gives one run of each trigger, whatever comes again, and nothing is lost silently."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from prefect import get_client
from prefect.client.orchestration import PrefectClient, SyncPrefectClient
from prefect.settings import PREFECT_API_URL, temporary_settings
from pydantic import ValidationError

from sandbox.stage import free_port
from tasks.environment import Here
from tasks.events import (
    EltEvent,
    HandOverError,
    OnceTrigger,
    Related,
    TriggerFailed,
    TriggersWrong,
    hand_over,
    read_triggers,
)
from tests.events_fixtures import Target, an_event, api, failures_of, stored, target

__all__ = ["api", "target"]

REPOSITORY = Path(__file__).parent.parent
_DIGITS = {"__prefect_kind": "jinja", "template": "{{ event.payload.digits }}"}
WHOLE = {
    "__prefect_kind": "json",
    "value": {"__prefect_kind": "jinja", "template": "{{ event.payload | tojson }}"},
}


# --- the event ---


@pytest.mark.no_server
def test_an_identity_that_outlives_replays() -> None:
    """The id comes from name and key alone, and is the same in every process and version."""
    one = an_event("s3:bucket/key@etag")
    again = an_event("s3:bucket/key@etag", occurred=datetime(2020, 1, 1, tzinfo=UTC), payload={"other": 1})
    assert one.id == again.id
    assert str(an_event("x", name="elt.test.a").id) == "d4a57805-1804-5df0-b91d-35e778cc16bc"
    assert an_event("x", name="elt.test.b").id != an_event("x", name="elt.test.a").id
    assert an_event("x", name="elt.test.b", known_as="elt.test.a").id == an_event("x", name="elt.test.a").id


@pytest.mark.no_server
@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"name": "prefect.flow-run.completed"}, "Prefect's own"),
        ({"name": "Nothing"}, "pattern"),
        ({"key": ""}, "at least 1"),
        ({"key": "a\0b"}, "NUL"),
        ({"occurred": datetime(2026, 1, 1)}, "timezone"),
        ({"payload": {"deep": {"er": "a\0"}}}, "NUL"),
        ({"payload": {"a\0": 1}}, "NUL"),
        ({"payload": {"half": "\ud800"}}, "surrogate"),
        ({"payload": {"none": float("nan")}}, "NaN"),
        ({"payload": {"many": [2**64]}}, "64 bits"),
        ({"payload": {"many": -(2**63) - 1}}, "64 bits"),
        ({"payload": {"none": [float("inf")]}}, "NaN"),
    ],
    ids=str,
)
def test_what_is_no_event(fields: dict[str, Any], said: str) -> None:
    """What the server would choke on later is refused at once, and so is a stranger's `prefect.` event."""
    whole = {"name": "elt.test.x", "key": "k", "occurred": datetime.now(UTC), "resource_id": "r"}
    with pytest.raises(ValidationError) as caught:
        EltEvent(**{**whole, **fields})
    assert said in str(caught.value)


@pytest.mark.no_server
def test_a_payload_too_deep() -> None:
    """A payload of a thousand levels is refused, not followed."""
    deep: dict[str, Any] = {}
    for _ in range(200):
        deep = {"in": deep}
    with pytest.raises(ValidationError, match="nested deeper"):
        an_event(payload=deep)


@pytest.mark.no_server
def test_numbers_that_the_server_takes() -> None:
    """Hashes and ids of 64 bits are numbers like any other, with or without a sign."""
    numbers: dict[str, Any] = {"least": -(2**63), "most": 2**64 - 1, "yes": True}
    assert an_event(payload=numbers).payload == numbers


# --- triggers ---


def trigger(**fields: Any) -> OnceTrigger:
    return OnceTrigger(**{"deployment": "flow/name", "name": "t", "expect": ["elt.test.*"], **fields})


@pytest.mark.no_server
@pytest.mark.parametrize(
    ("fields", "covered"),
    [
        ({}, True),
        ({"expect": "elt.test.happened"}, True),
        ({"expect": ["elt.test.happen"]}, False),
        ({"expect": ["elt.other.*", "elt.test.happened"]}, True),
        ({"match": {"prefect.resource.id": "elt.test.*"}}, True),
        ({"match": {"prefect.resource.id": "elt.other.*"}}, False),
        ({"match": {"prefect.resource.id": "!elt.test.thing"}}, False),
        ({"match": {"prefect.resource.name": ["no", "Thing"]}}, True),
        ({"match_related": {"prefect.resource.role": "workspace", "prefect.resource.id": "w-*"}}, True),
        ({"match_related": {"prefect.resource.role": "workspace", "prefect.resource.id": "v-*"}}, False),
        ({"match": {"elt.test.path": "orders/*"}}, True),
        ({"match": {"elt.test.path": "customers/*"}}, False),
        ({"enabled": False}, False),
    ],
    ids=str,
)
def test_which_events_a_trigger_covers(fields: dict[str, Any], covered: bool) -> None:
    """Names and resources match as in Prefect's own triggers, wildcards, lists and negations with them."""
    labels = {"elt.test.path": "orders/2026/part-1", "prefect.resource.id": "not this"}
    event = an_event(resource_name="Thing", labels=labels, related=(Related(id="w-1", role="workspace"),))
    assert trigger(**fields).covers(event) is covered


@pytest.mark.no_server
def test_parameters_from_the_payload() -> None:
    """Templates render as in Prefect's own triggers: types are kept, JSON is parsed, text is text."""
    event = an_event(
        payload={"number": 5, "word": "it's <b>", "list": [1, {"a": None}]}, resource_name="Thing"
    )
    rendered = trigger(
        parameters={
            "number": "{{ event.payload.number }}",
            "text": "{{ event.payload.word }}: {{ event.payload.number }}",
            "word": "{{ event.payload.word }}",
            "nested": {"list": "{{ event.payload.list }}", "plain": True},
            "missing": "{{ event.payload.nothing | default('none') }}",
            "all": WHOLE,
            "resource": "{{ event.resource.id }} {{ event.resource.name }}",
            "id": "{{ event.id | string }}",
        }
    ).rendered(event)
    assert rendered["number"] == 5
    assert rendered["word"] == "it's <b>"
    assert rendered["nested"] == {"list": [1, {"a": None}], "plain": True}
    assert rendered["missing"] == "none"
    assert rendered["all"] == event.payload
    assert rendered["resource"] == "elt.test.thing Thing"
    assert rendered["id"] == str(event.id)


@pytest.mark.no_server
@pytest.mark.parametrize(
    ("parameters", "payload"),
    [
        ({"number": "{{ event.payload.nothing }}"}, {}),
        ({"x": {"__prefect_kind": "json", "value": {"__prefect_kind": "jinja", "template": "{"}}}, {}),
        ({"x": {"__prefect_kind": "json", "value": _DIGITS}}, {"digits": "1" * 30}),
        ({"anything": WHOLE}, {"x": {"__prefect_kind": "workspace_variable", "variable_name": "secret"}}),
        ({"anything": WHOLE}, {"x": [{"$ref": {"block_document_slug": "secret/password"}}]}),
    ],
    ids=["undefined", "no JSON", "too big", "a variable by the sender", "a block by the sender"],
)
def test_templates_that_fail(parameters: dict[str, Any], payload: dict[str, Any]) -> None:
    """A template that doesn't render fails, and a sender can name no variable and no block."""
    with pytest.raises(TriggerFailed):
        trigger(parameters=parameters).rendered(an_event(payload=payload))


FILE = {
    "name": "elt-flows",
    "deployments": [
        {"name": "plain", "entrypoint": "flows.elt.elt_chain"},
        {
            "name": "flights",
            "entrypoint": "flows.elt.elt_chain",
            "once_triggers": [
                {
                    "name": "one",
                    "type": "event",
                    "expect": ["elt.a.b"],
                    "parameters": {"x": "{{ event.id }}"},
                },
                {"name": "two", "expect": ["elt.a.c"], "schedule_after": 60, "match": {"a": "b"}},
            ],
        },
        {
            "name": "daily",
            "entrypoint": "flows/transform.py:build_project",
            "once_triggers": [{"name": "three", "expect": ["elt.a.b"]}],
        },
    ],
}


@pytest.mark.no_server
def test_triggers_are_read_from_the_deployments(tmp_path: Path) -> None:
    """The flow's name comes from the entrypoint, a branch's prefix stands before both names."""
    file = tmp_path / "prefect.yaml"
    file.write_text(yaml.safe_dump(FILE))
    one, two, three = read_triggers(file, here=Here(prefix="my-branch."))
    assert (one.deployment, one.name) == ("elt-chain/my-branch.flights", "my-branch.one")
    assert (two.schedule_after, two.match) == (timedelta(seconds=60), {"a": "b"})
    assert three.deployment == "dbt-build/my-branch.daily"


@pytest.mark.no_server
@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"expect": ["elt.a"]}, "number 1: name"),
        ({"name": "x"}, "once_triggers, x: expect"),
        ({"name": "x", "expect": []}, "expect"),
        ({"name": "x", "expect": ["a"], "within": 60}, "within belongs under `triggers`"),
        ({"name": "x", "type": "compound", "expect": ["a"]}, "type belongs under `triggers`"),
        ({"name": "x", "expect": ["a"], "paramters": {}}, "paramters"),
        ({"name": "x", "expect": ["a"], "parameters": {"y": "{{ event.payload. }}"}}, "parameters"),
        (
            {"name": "x", "expect": ["a"], "parameters": {"y": "{{ evnt.payload }}"}},
            "knows `event`, but not evnt",
        ),
        (
            {
                "name": "x",
                "expect": ["a"],
                "parameters": {"y": {"__prefect_kind": "workspace_variable", "variable_name": "v"}},
            },
            "variable v can't be read here",
        ),
        ({"name": "one", "expect": ["a"]}, "two once triggers 'one'"),
        ("x", "number 1"),
    ],
    ids=str,
)
def test_triggers_that_cant_be_used(tmp_path: Path, entry: Any, said: str) -> None:
    """A wrong entry is refused when it is read, with file, deployment, entry and reason."""
    wrong = {"name": "last", "entrypoint": "flows.elt.elt_chain", "once_triggers": [entry]}
    file = tmp_path / "prefect.yaml"
    file.write_text(yaml.safe_dump({"deployments": [*FILE["deployments"], wrong]}))
    with pytest.raises(TriggersWrong) as caught:
        read_triggers(file)
    assert said in str(caught.value)
    assert str(file) in str(caught.value)


@pytest.mark.no_server
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("deployments: [", "no YAML"),
        ("name: x", "no list of deployments"),
        ("deployments: [{entrypoint: a.b}]", "no list of deployments"),
        ("deployments: [{name: a, entrypoint: nowhere.at.all, once_triggers: [{name: x}]}]", "is no flow"),
        (
            "deployments: [{name: a, entrypoint: flows.elt.elt_chain, once_triggers: {name: x}}]",
            "must be a list",
        ),
        (None, "can't be read"),
    ],
)
def test_files_that_cant_be_read(tmp_path: Path, text: str | None, said: str) -> None:
    """A file that is none, or has no deployments, is said to be so."""
    file = tmp_path / "prefect.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(TriggersWrong, match=said):
        read_triggers(file)


# --- handing over ---


async def test_an_event_starts_its_run(api: SyncPrefectClient, target: Target) -> None:
    """The run has the parameters, and leads back to the event; the event leads to the run."""
    event = an_event(payload={"word": "yes", "number": 3}, resource_name="Thing")
    other = an_event(name="elt.other.happened")
    once = target.trigger(
        parameters={"word": "{{ event.payload.word }}", "number": "{{ event.payload.number }}"}
    )

    told, nothing = await hand_over([event, other], [once])

    (run,) = target.runs()
    assert told.event_id == event.id
    assert [(one.flow_run_id, one.name) for one in told.runs] == [(run.id, run.name)]
    assert (nothing.event_id, nothing.runs, nothing.failed) == (other.id, (), ())
    assert run.parameters == {"word": "yes", "number": 3}
    assert set(run.tags) == {"of-the-deployment", "event:elt.test.happened"}
    assert run.labels["elt.event.id"] == str(event.id)
    assert run.state is not None
    assert str(event.id) in (run.state.message or "")
    ours = next(one for one in stored(api, event.id, other.id) if one["id"] == str(event.id))
    assert ours["event"] == event.name
    assert ours["resource"] == {"prefect.resource.id": "elt.test.thing", "prefect.resource.name": "Thing"}
    assert ours["payload"] == event.payload
    assert [one["prefect.resource.id"] for one in ours["related"]] == [f"prefect.flow-run.{run.id}"]


async def test_replays_start_nothing_more(api: SyncPrefectClient, target: Target) -> None:
    """The same event again, in the same batch, later, or ten times at once: the same run, one event."""
    event = an_event()
    first, twin = await hand_over([event, event], [target.trigger()])
    again = await asyncio.gather(*[hand_over([event], [target.trigger()]) for _ in range(10)])
    assert first == twin
    assert all(told == [first] for told in again)
    assert [run.id for run in target.runs()] == [first.runs[0].flow_run_id]
    assert len(stored(api, event.id)) == 1


async def test_each_trigger_starts_its_own(api: SyncPrefectClient, target: Target) -> None:
    """Two triggers of one flow, also with one name in two environments, start a run each."""
    production = Target(api, flow=target.flow, name="production")
    triggers = [target.trigger(), target.trigger(name="second"), production.trigger()]
    (told,) = await hand_over([an_event()], triggers)
    assert len({run.flow_run_id for run in told.runs}) == 3
    assert (len(target.runs()), len(production.runs())) == (2, 1)


async def test_a_trigger_that_fails_is_told(api: SyncPrefectClient, target: Target) -> None:
    """What can't start becomes an event with the reason; the other triggers start, and the event is taken."""
    said = {
        "refused": "field 'word'. Failure reason: 5 is not",
        "not rendered": "Undefined",
        "not deployed": "no deployment nowhere/at-all",
    }
    wrong = [
        target.trigger(name="refused", parameters={"word": "{{ event.payload.number }}"}),
        target.trigger(name="not rendered", parameters={"word": "{{ event.payload.nothing }}"}),
        OnceTrigger(deployment="nowhere/at-all", name="not deployed", expect=["elt.test.*"]),
    ]
    event = an_event(payload={"number": 5})
    told, *_ = await hand_over([event, event], [*wrong, target.trigger()])
    assert told.failed == tuple(said)
    assert len(told.runs) == len(target.runs()) == 1
    failures = {one["payload"]["trigger"]: one["payload"] for one in failures_of(api, event, len(said))}
    assert failures.keys() == said.keys()
    for name, failure in failures.items():
        assert said[name] in failure["reason"]
        assert failure["event"]["key"] == event.key


async def test_no_server(target: Target) -> None:
    """Without a server, or without knowing of one, nothing is said to be taken; later it is."""
    event, once = an_event(), target.trigger()
    with (
        temporary_settings({PREFECT_API_URL: f"http://127.0.0.1:{free_port()}/api"}),
        pytest.raises(HandOverError, match="can't be reached"),
    ):
        await hand_over([event], [once])
    with temporary_settings({PREFECT_API_URL: None}), pytest.raises(HandOverError, match="PREFECT_API_URL"):
        await hand_over([event], [once])
    assert not target.runs()
    (told,) = await hand_over([event], [once])
    assert len(told.runs) == len(target.runs()) == 1


class Failing(httpx.AsyncBaseTransport):
    """The server as it is, counting what it took; it fails when it has taken so much."""

    def __init__(self, inner: httpx.AsyncBaseTransport, at_most: int) -> None:
        self.inner, self.at_most = inner, at_most
        self.taken: Counter[str] = Counter()

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        what = request.url.path.removeprefix("/api").split("/")[1]
        if what != "csrf-token" and self.taken.total() >= self.at_most:
            return httpx.Response(500, json={"exception_message": "Internal Server Error"}, request=request)
        response = await self.inner.handle_async_request(request)
        # Not what Prefect's client does of itself: ask for a token, try again where SQLite was locked.
        self.taken[what] += what != "csrf-token" and response.is_success
        return response


@contextlib.contextmanager
def failing(client: PrefectClient, at_most: int) -> Iterator[Failing]:
    """The client's server fails when it has taken so many requests."""
    inner = client._client._transport
    client._client._transport = Failing(inner, at_most)
    try:
        yield client._client._transport
    finally:
        client._client._transport = inner


async def test_a_server_that_fails_half_way(api: SyncPrefectClient, target: Target) -> None:
    """Wherever the server fails, the caller is told; its second try leaves one run for each event."""
    once, told = target.trigger(), []
    async with get_client() as client:
        for at_most in range(5):  # a look-up, three runs, one request with the events
            events = [an_event() for _ in range(3)]
            with failing(client, at_most), pytest.raises(HandOverError, match="answered 500"):
                await hand_over(events, [once], client)
            told += await hand_over(events, [once], client)
    assert sorted(run.id for run in target.runs()) == sorted(one.runs[0].flow_run_id for one in told)
    assert len(stored(api, *[one.event_id for one in told])) == 15


async def test_a_big_batch_needs_few_requests(target: Target) -> None:
    """Of 101 events each costs the request that makes its run, and nothing else but a handful for all."""
    events = [an_event() for _ in range(101)]
    async with get_client() as client:
        with failing(client, 1_000) as server:
            told = await hand_over(events, [target.trigger()], client)
    assert len({run.flow_run_id for one in told for run in one.runs}) == len(target.runs()) == 101
    # One look-up of the deployment beside the runs, and the events a hundred at a time.
    assert server.taken == {"csrf-token": 0, "deployments": 102, "events": 2}


@pytest.mark.no_server
def test_the_triggers_of_this_repository() -> None:
    """The shipped once triggers can be read, each for a deployment that there is, and cover what they say."""
    found = {one.name: one for one in read_triggers(REPOSITORY / "deployments" / "prefect.yaml")}
    build = found["build on a sync of Airbyte's own scheduler"]
    example = json.loads((REPOSITORY / "deployments/examples/elt.airbyte.job.succeeded.json").read_text())
    labels = dict(example["resource"])
    event = an_event(
        name=example["event"],
        resource_id=labels.pop("prefect.resource.id"),
        resource_name=labels.pop("prefect.resource.name"),
        labels=labels,
        payload=example["payload"],
    )
    assert [one.name for one in found.values() if one.covers(event)] == [build.name]
    selected = "config.meta.airbyte_connection_id:7f1a6002-2013-4a00-8000-000000000002+"
    assert build.rendered(event)["dbt"]["select"] == [selected]
    ours = event.model_copy(update={"labels": {**labels, "elt.started-by": "elt-flows"}})
    assert not any(one.covers(ours) for one in found.values())
