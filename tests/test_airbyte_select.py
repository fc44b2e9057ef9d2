"""Connections by tag, workspace and name: what a selection takes, what it leaves out, and what it refuses."""

from __future__ import annotations

import logging
from typing import Any
from uuid import uuid4

import pytest
from pydantic import TypeAdapter, ValidationError

from blocks import AirbyteServer
from flows import RunFailed, sync_connections
from flows.parameters import Sync
from sandbox import Sandbox, catalog
from tasks.airbyte import AirbyteConnections, AirbyteSync, airbyte_check
from tasks.jobs import InputError, JobPolicy, JobState
from tests.flows_fixtures import Runs, box, runs, sources
from tests.jobs_fixtures import PREFECTS_SOCKETS, collected

__all__ = ["box", "collected", "runs", "sources"]

pytestmark = [
    *PREFECTS_SOCKETS,
    # Prefect's, on every line that a task outside of a flow logs.
    pytest.mark.filterwarnings("ignore:.*without a flow run id:UserWarning"),
]
IDS = {spec.name: spec.connection_id for spec in catalog.CONNECTIONS}
QUICK = JobPolicy(poll=0.05, timeout=60)


@pytest.fixture(params=["public", "config"])
def server(request: pytest.FixtureRequest, sandbox: Sandbox, airbyte: AirbyteServer) -> AirbyteServer:
    """The block, over each of the two APIs."""
    if request.param == "public":
        return airbyte
    return airbyte.model_copy(update={"base_url": sandbox.airbyte_config_url})


async def names(*requests: AirbyteSync | AirbyteConnections) -> list[str]:
    return [found.request.name for found in await airbyte_check(list(requests))]


@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        ({"tags": ["nightly"]}, ["airlines", "airports", "flights", "planes", "weather"]),
        ({"tags": ["hourly"]}, ["synthetic-0007"]),
        ({"tags": ["hourly", "owner:reference-data"]}, ["airlines", "airports", "planes", "synthetic-0007"]),
        ({"pattern": "air*"}, ["airlines", "airports"]),
        ({"tags": ["owner:reference-data"], "pattern": "*p*"}, ["airports", "planes"]),
        ({"pattern": "*", "tags": ["hourly"]}, ["synthetic-0007"]),
        (
            {"workspace_ids": [catalog.WORKSPACE_ID], "pattern": "synthetic-*"},
            ["synthetic-0006", "synthetic-0007"],
        ),
    ],
)
async def test_selects(
    sandbox: Sandbox, server: AirbyteServer, selection: dict[str, Any], expected: list[str]
) -> None:
    """Tags (any of them), name and workspace (all of them) say which connections are meant."""
    ids = sandbox.airbyte.add_connections(2)
    sandbox.airbyte.set(ids[1], tags=["hourly"])
    assert await names(AirbyteConnections(server=server, **selection)) == expected


async def test_each_is_a_sync_of_its_own(server: AirbyteServer) -> None:
    """Each connection comes with its name, its owner's tag, where it writes, and the selection's policy."""
    selection = AirbyteConnections(server=server, tags=["nightly"], owner="everybody", policy=QUICK)
    checked = {found.request.name: found for found in await airbyte_check([selection])}
    assert {name: found.request.owner for name, found in checked.items()} == {
        spec.name: spec.owner for spec in catalog.CONNECTIONS
    }
    flights = checked["flights"]
    assert (flights.namespace, flights.streams) == ("raw_flights", ("flights",))
    assert (flights.request.policy, flights.request.connection_id) == (QUICK, IDS["flights"])


async def test_owner_of_those_without(sandbox: Sandbox, airbyte: AirbyteServer) -> None:
    """A connection without an owner's tag is the selection's owner's."""
    sandbox.airbyte.set("flights", tags=["nightly"])
    selection = AirbyteConnections(server=airbyte, tags=["nightly"], owner="everybody", before="clear")
    owners = {found.request.name: found.request for found in await airbyte_check([selection])}
    assert owners["flights"].owner == "everybody"
    assert owners["weather"].owner == "weather-desk"
    assert all(request.before == "clear" for request in owners.values())


async def test_listed_and_tagged_runs_once(airbyte: AirbyteServer) -> None:
    """A connection that is listed and selected, or selected twice, comes once, with what is listed for it."""
    listed = AirbyteSync(server=airbyte, connection_id=IDS["planes"], name="fleet", owner="me")
    nightly = AirbyteConnections(server=airbyte, tags=["nightly"], owner="first")
    again = AirbyteConnections(server=airbyte, pattern="*", owner="second")
    checked = await airbyte_check([nightly, listed, again])
    assert [found.request.name for found in checked] == [
        "airlines",
        "airports",
        "flights",
        "weather",
        "fleet",
    ]
    assert checked[-1].request == listed


async def test_a_paused_one_is_left_out(
    sandbox: Sandbox, airbyte: AirbyteServer, caplog: pytest.LogCaptureFixture
) -> None:
    """What somebody has paused is left out and said so; it is a problem only for those who list it."""
    sandbox.airbyte.set("weather", status="inactive")
    selection = AirbyteConnections(server=airbyte, tags=["nightly"])
    with caplog.at_level(logging.INFO):
        assert await names(selection) == ["airlines", "airports", "flights", "planes"]
    assert "connections tagged nightly: left out, because paused in Airbyte: weather" in caplog.text
    assert "connections tagged nightly: 4: airlines, airports, flights, planes" in caplog.text
    listed = AirbyteSync(server=airbyte, connection_id=IDS["weather"])
    problems = {found.request.name: found.problem for found in await airbyte_check([selection, listed])}
    assert "is inactive" in str(problems.pop("weather"))
    assert set(problems.values()) == {None}


@pytest.mark.parametrize(
    "change",
    [{"status": "inactive", "status_reason": "30 failures in a row"}, {"status": "locked"}],
)
async def test_what_airbyte_took_out_of_service_is_a_problem(
    sandbox: Sandbox, airbyte: AirbyteServer, change: dict[str, Any]
) -> None:
    """Airbyte disables what keeps failing: a selection does not pass over that in silence."""
    sandbox.airbyte.set("weather", **change)
    checked = await airbyte_check([AirbyteConnections(server=airbyte, tags=["nightly"])])
    problems = {found.request.name: found.problem for found in checked}
    assert str(change.get("status_reason", "locked")) in str(problems["weather"])
    assert len(problems) == 5


@pytest.mark.parametrize(
    ("selection", "says"),
    [
        ({"tags": ["nigthly"]}, r"tagged nigthly: there is none, of 5 connections .* Tags in use: nightly\."),
        ({"pattern": "sales-*"}, r"named sales-\*: there is none, of 5 connections"),
        ({"workspace_ids": [str(uuid4())]}, r"in workspace .*: there is none"),
        ({"tags": ["paused"]}, r"tagged paused: all 1 of them are paused"),
    ],
)
async def test_nothing_is_a_mistake(
    sandbox: Sandbox, airbyte: AirbyteServer, selection: dict[str, Any], says: str
) -> None:
    """A selection that nothing fits is a mistake and no run with nothing to do."""
    if selection.get("tags") == ["paused"]:
        sandbox.airbyte.set("weather", tags=["paused"], status="inactive")
    with pytest.raises(InputError, match=f"{says}.*Nothing was started"):
        await airbyte_check([AirbyteConnections(server=airbyte, **selection)])


async def test_a_tag_that_nobody_has(airbyte: AirbyteServer, caplog: pytest.LogCaptureFixture) -> None:
    """One of several tags that no connection has is said, and the others are run."""
    with caplog.at_level(logging.WARNING):
        assert len(await names(AirbyteConnections(server=airbyte, tags=["nightly", "hourly"]))) == 5
    assert "no connection has the tag 'hourly'" in caplog.text


def test_everything_has_to_be_said(airbyte: AirbyteServer) -> None:
    """A selection of nothing in particular is refused; all connections take a pattern of `*`."""
    with pytest.raises(ValidationError, match=r"Say which connections: by tags, pattern or workspace_ids"):
        AirbyteConnections(server=airbyte)
    with pytest.raises(ValidationError, match="'mine' is not an Airbyte workspace id"):
        AirbyteConnections(server=airbyte, workspace_ids=["mine"])


def test_a_form_and_a_deployment_can_say_it() -> None:
    """The parameter of a flow takes both kinds, told apart by `tool`; nothing of a server is written out."""
    adapter: TypeAdapter[Sync] = TypeAdapter(Sync)
    one = {"tool": "airbyte", "server": "a", "connection_id": IDS["planes"]}
    many = {"tool": "airbyte-connections", "server": "a", "tags": ["nightly"]}
    assert isinstance(adapter.validate_python(one), AirbyteSync)
    assert isinstance(adapter.validate_python(many), AirbyteConnections)
    assert adapter.dump_python(adapter.validate_python(many))["server"] == "a"
    assert adapter.json_schema()["discriminator"]["propertyName"] == "tool"


def test_a_flow_by_tag(box: Sandbox, runs: Runs) -> None:
    """A flow takes a selection in its parameters: every connection is a sync with its owner in the report."""
    box.airbyte.set("weather", outcome="fail")
    selection = {
        "tool": "airbyte-connections",
        "server": "airbyte",
        "tags": ["nightly"],
        "policy": {"poll": 0.1},
    }
    run = runs.create(sync_connections, {"syncs": [selection]})
    state = runs.run(sync_connections, run)
    with pytest.raises(RunFailed) as caught:
        state.result()
    outcomes = {job.name: job for job in caught.value.report.outcomes}
    assert {name: job.owner for name, job in outcomes.items()} == {
        spec.name: spec.owner for spec in catalog.CONNECTIONS
    }
    assert outcomes.pop("weather").state is JobState.FAILED
    assert {job.state for job in outcomes.values()} == {JobState.SUCCEEDED}
    again = runs.run(sync_connections, run)
    assert again.is_failed()
    assert len(box.airbyte.jobs) == 6
