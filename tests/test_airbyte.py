"""Airbyte's tasks and block: what a user can get wrong, and what Airbyte does differently than one thinks."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
from typing import Any

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun
from prefect.context import FlowRunContext
from pydantic import BaseModel, SecretStr, TypeAdapter, ValidationError

from blocks import AirbyteServer
from blocks.airbyte_model import Connection
from blocks.http import AuthError, BadReply, NotFoundError
from blocks.reference import BlockNotFound
from sandbox import Sandbox, catalog
from tasks.airbyte import (
    AirbyteSync,
    AirbyteVendor,
    airbyte_cancel,
    airbyte_check,
    airbyte_clear,
    airbyte_refresh,
    airbyte_status,
    airbyte_sync,
    airbyte_wait,
)
from tasks.jobs import InputError, JobFailed, JobPolicy, JobState, JobTimeout
from tests.jobs_fixtures import PREFECTS_SOCKETS, Desk, collected, desk, until

__all__ = ["collected", "desk"]

pytestmark = [
    *PREFECTS_SOCKETS,
    # Prefect's, on every line that a task outside of a flow logs.
    pytest.mark.filterwarnings("ignore:.*without a flow run id:UserWarning"),
]
IDS = {spec.name: spec.connection_id for spec in catalog.CONNECTIONS}
QUICK = JobPolicy(poll=0.05, timeout=60)


def syncs(server: AirbyteServer | str, *connections: str, **fields: Any) -> list[AirbyteSync]:
    return [
        AirbyteSync(server=server, connection_id=IDS.get(name, name), policy=QUICK, **fields)
        for name in connections
    ]


# -- checking before anything is started


async def test_check_fills_in(airbyte: AirbyteServer) -> None:
    """A check gives names, owners and where each connection writes; what was given by hand stays."""
    by_hand = AirbyteSync(server=airbyte, connection_id=IDS["planes"], name="fleet", owner="me")
    checked = await airbyte_check([*syncs(airbyte, "flights", "weather", "airports", "airlines"), by_hand])
    assert [(c.request.name, c.request.owner) for c in checked] == [
        ("flights", "flight-ops"),
        ("weather", "weather-desk"),
        ("airports", "reference-data"),
        ("airlines", "reference-data"),
        ("fleet", "me"),
    ]
    assert [(c.namespace, c.streams) for c in checked][:2] == [
        ("raw_flights", ("flights",)),
        ("raw_weather", ("weather",)),
    ]
    assert all(c.problem is None for c in checked)


async def test_check_costs_a_request_per_hundred(sandbox: Sandbox, airbyte: AirbyteServer) -> None:
    """A fan-out of 250 connections is checked with three requests."""
    ids = sandbox.airbyte.add_connections(250)
    assert len(await airbyte_check(syncs(airbyte, *ids))) == 250
    assert sandbox.requests.count(method="GET") == 3


UNKNOWN = "7f1a6099-2013-4a00-8000-000000000099"


@pytest.mark.parametrize(
    ("connections", "says"),
    [
        ((UNKNOWN,), f"knows no connection {UNKNOWN}"),
        (("flights", "weather", "planes", UNKNOWN), f"knows no connection {UNKNOWN}"),
        (("flights", "weather", "flights"), f"{IDS['flights']} is listed more than once"),
    ],
)
async def test_check_refuses(
    sandbox: Sandbox, airbyte: AirbyteServer, connections: tuple[str, ...], says: str
) -> None:
    """A connection that is unknown or named twice is refused in one sentence before anything is started."""
    with pytest.raises(InputError, match=f"{says}.*Nothing was started") as caught:
        await airbyte_check(syncs(airbyte, *connections))
    assert "\n" not in str(caught.value)
    assert sandbox.airbyte.jobs == {}


async def test_the_cloud_counts_no_rejected_rows() -> None:
    """A limit that Airbyte Cloud can't keep is refused by the check and by the task, before any request."""
    cloud = AirbyteServer(client_id="c", client_secret=SecretStr("secret"))
    policy = JobPolicy(max_rows_rejected=0)
    sync = AirbyteSync(server=cloud, connection_id=IDS["flights"], policy=policy)
    for refused in (airbyte_check([sync]), airbyte_sync(sync), airbyte_refresh(sync)):
        with pytest.raises(InputError, match=r"does not tell how many rows were rejected.*Nothing was"):
            await refused


async def test_check_leaves_the_inactive_to_the_flow(sandbox: Sandbox, airbyte: AirbyteServer) -> None:
    """An inactive connection carries its problem, so that a flow may go on with the others."""
    sandbox.airbyte.set("weather", status="inactive")
    flights, weather = await airbyte_check(syncs(airbyte, "flights", "weather"))
    assert flights.problem is None
    assert "'weather'" in str(weather.problem)
    assert "is inactive. Enable it in Airbyte" in str(weather.problem)


def test_a_connection_id_that_is_none(airbyte: AirbyteServer) -> None:
    """What is no UUID is refused when the sync is described, with a hint where to find the right one."""
    with pytest.raises(ValidationError, match="'flights' is not an Airbyte connection id; that is the UUID"):
        AirbyteSync(server=airbyte, connection_id="flights")
    assert AirbyteSync(server=airbyte, connection_id=IDS["flights"].upper()).connection_id == IDS["flights"]


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"client_secret": SecretStr("wrong")}, AuthError, "client id or the client secret was refused"),
        ({"client_secret": SecretStr("*" * 10)}, AuthError, "save the block and pass its name"),
        (
            {"client_id": None, "client_secret": None, "token": SecretStr("*" * 10)},
            AuthError,
            "save the block and pass its name",
        ),
        ({"client_id": None, "client_secret": None, "token": SecretStr("old")}, AuthError, "credentials"),
        ({"client_id": None, "client_secret": None}, AuthError, "credentials"),
    ],
)
@pytest.mark.parametrize("connections", [("flights",), tuple(IDS)], ids=["one", "all"])
async def test_credentials_that_are_wrong(
    sandbox: Sandbox,
    airbyte: AirbyteServer,
    change: dict[str, Any],
    error: type[Exception],
    says: str,
    connections: tuple[str, ...],
) -> None:
    """Wrong, masked, expired or missing credentials: one sentence that says what to do, nothing started."""
    server = airbyte.model_copy(update=change)
    with pytest.raises(error, match=says):
        await airbyte_check(syncs(server, *connections))
    with pytest.raises(error, match=says):
        await airbyte_sync(syncs(server, "flights")[0])
    assert sandbox.airbyte.jobs == {}


@pytest.mark.parametrize(
    "fault", [{"status": 200}, {"status": 404}, {"status": 405}, {"status": 200, "path": "/connections"}]
)
async def test_a_base_url_that_answers_html(
    sandbox: Sandbox, airbyte: AirbyteServer, fault: dict[str, Any]
) -> None:
    """A base URL of something else than the API is said at once, not after minutes of trying."""
    sandbox.faults.add(kind="html", **fault)
    async with asyncio.timeout(60):
        with pytest.raises(BadReply, match=r"HTML page.*Check that the base URL"):
            await airbyte_sync(syncs(airbyte, "flights")[0])


async def test_a_block_that_is_not_saved() -> None:
    """The name of a block that is not there is answered with the names that are."""
    await AirbyteServer().save("the-right-one", overwrite=True)  # type: ignore[misc]  # async in async code
    with pytest.raises(BlockNotFound, match=r"no Airbyte Server block named 'wrong-one'.*the-right-one"):
        await airbyte_check(syncs("airbyte-server/wrong-one", "flights"))


KNOWN_ERRORS = [
    ("unknown connection", {}, UNKNOWN),
    ("wrong secret", {"client_secret": SecretStr("wrong")}, "flights"),
    ("no such block", "no-such-block", "flights"),
    ("failed job", {}, "failing"),
    ("inactive", {}, "inactive"),
]


@pytest.mark.parametrize(
    ("case", "server", "connection"), KNOWN_ERRORS, ids=[case[0] for case in KNOWN_ERRORS]
)
def test_known_errors_are_one_line(
    desk: Desk, airbyte: AirbyteServer, case: str, server: Any, connection: str, caplog: Any, capfd: Any
) -> None:
    """What a user got wrong, or a job that failed, is told without a traceback, by task and flow."""
    desk.behave(outcome="fail" if connection == "failing" else "succeed", duration=0.1)
    desk.behave(status="inactive" if connection == "inactive" else "active")
    if connection in ("failing", "inactive"):
        connection = desk.connection_id
    block = server if isinstance(server, str) else airbyte.model_copy(update=server)

    @flow
    async def nightly() -> None:
        await airbyte_sync(syncs(block, connection)[0])

    with caplog.at_level(logging.INFO), pytest.raises(Exception) as caught:  # noqa: PT011 - each its own
        asyncio.run(nightly())
    seen = caplog.text + "".join(capfd.readouterr())
    assert str(caught.value) in seen
    assert "Traceback" not in seen
    assert "never retrieved" not in seen


# -- running


async def test_really_loads(sandbox: Sandbox, airbyte: AirbyteServer) -> None:
    """A sync of a real connection lands its rows, and says so by name and owner."""
    result = await airbyte_sync(syncs(airbyte, "airlines")[0])
    assert (result.name, result.owner, result.rows) == ("airlines", "reference-data", 16)
    assert result.bytes
    assert result.duration is not None
    cleared = await airbyte_clear(syncs(airbyte, "airlines")[0])
    assert (cleared.name, cleared.state) == ("clear airlines", JobState.SUCCEEDED)


@pytest.mark.parametrize(("reset", "job_type"), [(False, "clear"), (True, "reset")])
async def test_clear_and_reset(desk: Desk, airbyte: AirbyteServer, reset: bool, job_type: str) -> None:
    """A clear waits for a running sync, whose place it would take, and starts no sync of its own."""
    desk.behave(duration=1)
    desk.start_by_hand()
    desk.behave(duration=0.1)
    await airbyte_clear(syncs(airbyte, desk.connection_id)[0], reset=reset)
    assert desk.words == ["succeeded", "succeeded"]
    assert [job.job_type for job in desk.sandbox.airbyte.jobs_of(desk.connection_id)] == ["sync", job_type]


async def test_a_lost_clear_is_found_among_syncs(desk: Desk, airbyte: AirbyteServer) -> None:
    """A clear whose reply was lost is not mistaken for a sync that ran at the same time."""
    desk.behave(duration=0.6)
    desk.start_by_hand()
    desk.fault(kind="drop_after", method="POST", path="/jobs$", times=1)
    result = await airbyte_clear(syncs(airbyte, desk.connection_id)[0])
    assert desk.jobs[1:] == [result.job_id]


async def test_wait_for_anothers_job(desk: Desk, airbyte: AirbyteServer) -> None:
    """A job that was started elsewhere is waited for, judged, and never cancelled."""
    desk.behave(duration=0.4)
    job = desk.start_by_hand()
    result = await airbyte_wait(airbyte, job, QUICK)
    assert (result.job_id, result.rows) == (job, 1000)
    desk.behave(outcome="fail")
    with pytest.raises(JobFailed):
        await airbyte_wait(airbyte, desk.start_by_hand(), QUICK)
    desk.behave(outcome="stuck")
    stuck = desk.start_by_hand()
    with pytest.raises(JobTimeout, match="it was left running"):
        await airbyte_wait(airbyte, stuck, JobPolicy(poll=0.1, timeout=0.5, on_timeout="cancel"))
    assert desk.words[-1] == "running"
    assert desk.cancels == 0


async def test_status(desk: Desk, airbyte: AirbyteServer) -> None:
    """The state of a job is told as it is, without waiting or judging, for numbers and text."""
    desk.behave(outcome="stuck")
    job = desk.start_by_hand()
    await until(lambda: desk.words == ["running"])
    assert (await airbyte_status(airbyte, job)).state is JobState.RUNNING
    desk.sandbox.airbyte.finish_job(int(job), "failed")
    result = await airbyte_status(airbyte, int(job))  # type: ignore[arg-type]  # as people do
    assert (result.state, result.job_id) == (JobState.FAILED, job)


async def test_no_such_job(airbyte: AirbyteServer) -> None:
    """A job that does not exist is said so by every task that takes one."""
    for action in (airbyte_wait, airbyte_status, airbyte_cancel):
        with pytest.raises(NotFoundError):
            await action(airbyte, "999999")  # type: ignore[operator]


async def test_cancel(desk: Desk, airbyte: AirbyteServer) -> None:
    """A running job is cancelled; one that has ended is left alone, with all that its connection runs now."""
    desk.behave(outcome="stuck")
    job = desk.start_by_hand()
    assert await airbyte_cancel(airbyte, job) == "it was cancelled"
    desk.start_by_hand()
    assert await airbyte_cancel(airbyte, job) == "it was cancelled"
    assert desk.cancels == 1
    assert desk.words[0] == "cancelled"
    assert desk.words[1] in ("pending", "running")


async def test_cancel_that_meets_the_end(desk: Desk, airbyte: AirbyteServer) -> None:
    """A job that ends between the look and the cancellation is not reported as an error."""
    desk.behave(duration=0.5)
    job = desk.start_by_hand()
    desk.fault(kind="delay", delay=0.7, method="DELETE")
    assert await airbyte_cancel(airbyte, job) == "it had ended already: succeeded"


# -- what Airbyte does differently


async def test_lists_are_asked_for_newest_first(sandbox: Sandbox, airbyte: AirbyteServer) -> None:
    """Every list says its order and its size: left out, Airbyte answers with the twenty oldest."""
    ids = sandbox.airbyte.add_connections(5, duration=0.3)
    await asyncio.gather(*(airbyte_sync(sync) for sync in syncs(airbyte, *ids)))
    lists = sandbox.requests.find(method="GET", path="/jobs$")
    assert lists
    assert all("orderBy=createdAt%7CDESC" in request.query for request in lists)
    assert all("limit=100" in request.query for request in lists)


async def test_a_lost_start_among_many_older_jobs(desk: Desk, airbyte: AirbyteServer) -> None:
    """The job of a lost start is found although its connection has a long history."""
    desk.behave(duration=0)
    for _ in range(30):
        desk.start_by_hand()
    desk.behave(duration=0.2)
    # Jobs are known by whole seconds and a start by a margin of three; real ones are not that close.
    for job in desk.sandbox.airbyte.jobs_of(desk.connection_id):
        job.timeline.started_wall -= 60
    desk.fault(kind="drop_after", method="POST", path="/jobs$", times=1)
    result = await airbyte_sync(syncs(airbyte, desk.connection_id)[0])
    assert desk.jobs[30:] == [result.job_id]


@pytest.mark.parametrize("auth", ["basic", "none"])
async def test_old_servers(sandbox: Sandbox, desk: Desk, auth: Any) -> None:
    """Servers with basic auth or none work as well."""
    sandbox.airbyte.settings.auth = auth
    ways: dict[str, dict[str, Any]] = {
        "basic": {"username": catalog.BASIC_USER, "password": catalog.BASIC_PASSWORD},
        "none": {},
    }
    server = AirbyteServer(base_url=sandbox.airbyte_url, **ways[auth])
    assert (await airbyte_sync(syncs(server, desk.connection_id)[0])).rows == 1000
    assert sandbox.airbyte.token_requests == 0


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        ({}, {"owner": None, "namespace": None, "streams": []}),
        ({"tags": [{"name": "nightly"}, {"name": "owner:ops"}]}, {"owner": "ops"}),
        ({"tags": None, "configurations": None}, {"owner": None, "streams": []}),
        ({"namespaceDefinition": "custom_format", "namespaceFormat": "raw"}, {"namespace": "raw"}),
        ({"namespaceDefinition": "destination", "namespaceFormat": "raw"}, {"namespace": None}),
    ],
)
def test_connections_of_any_shape(document: dict[str, Any], expected: dict[str, Any]) -> None:
    """A connection is read with whatever Airbyte leaves out of it."""
    base = {"connectionId": IDS["flights"], "name": "flights", "workspaceId": "w"}
    connection = TypeAdapter(Connection).validate_python({**base, **document})
    assert {key: getattr(connection, key) for key in expected} == expected


# -- the block


def test_block_registers() -> None:
    """`prefect block register -m blocks` works, and each block has what the UI shows of it."""
    command = [sys.executable, "-m", "prefect", "block", "register", "-m", "blocks"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)  # noqa: S603
    assert done.returncode == 0, done.stderr
    assert "Airbyte Server" in done.stdout
    assert "Hightouch Credentials" in done.stdout
    schema = AirbyteServer.model_json_schema()
    assert AirbyteServer._logo_url
    assert AirbyteServer.get_description()
    assert all(field.get("description") and field.get("title") for field in schema["properties"].values())


async def test_block_by_name_or_instance(desk: Desk, airbyte: AirbyteServer) -> None:
    """A block works as an instance, by its name, and by its type and name; it is saved with its secret."""
    await airbyte.save("by-name", overwrite=True)  # type: ignore[misc]  # async in async code
    loaded = await AirbyteServer.aload("by-name")
    assert loaded.client_secret == airbyte.client_secret
    for server in (airbyte, loaded, "by-name", "airbyte-server/by-name"):
        assert (await airbyte_check(syncs(server, desk.connection_id)))[0].request.name.startswith(
            "synthetic"
        )
    assert AirbyteVendor(loaded).block == "airbyte-server/by-name"
    assert AirbyteVendor(airbyte.model_copy()).account == AirbyteVendor(loaded).account


class _Nightly(BaseModel):
    syncs: list[AirbyteSync]


@pytest.mark.parametrize("saved", [True, False])
async def test_no_secret_in_stored_parameters(airbyte: AirbyteServer, saved: bool) -> None:
    """What Prefect stores of a flow run has no secret in it: the name of a saved block, or asterisks."""
    server = airbyte.model_copy()
    if saved:
        await server.save("stored", overwrite=True)  # type: ignore[misc]  # async in async code
    runs: list[FlowRun] = []

    @flow
    async def nightly(syncs: list[AirbyteSync], plan: _Nightly) -> None:
        context = FlowRunContext.get()
        assert context
        assert context.flow_run
        runs.append(context.flow_run)

    wanted = syncs(server, "flights")
    await nightly(wanted, _Nightly(syncs=wanted))
    async with get_client() as client:
        stored = (await client.read_flow_run(runs[0].id)).parameters
    assert catalog.CLIENT_SECRET not in str(stored)
    again = AirbyteSync.model_validate(stored["syncs"][0])
    if saved:
        assert again.server == "airbyte-server/stored"
        assert (await airbyte_check([again]))[0].request.name == "flights"
    else:
        with pytest.raises(AuthError, match="to retry or deploy this flow, save the block and pass its name"):
            await airbyte_check([again])


def test_a_sync_that_is_misspelt_does_not_quote_secrets() -> None:
    """A sync whose server is spelt out in a parameter is refused without its secret."""
    with pytest.raises(ValidationError) as caught:
        AirbyteSync.model_validate({"server": {"client_id": "a", "client_secret": "hunter2"}, "conection": 1})
    assert "hunter2" not in str(caught.value)
