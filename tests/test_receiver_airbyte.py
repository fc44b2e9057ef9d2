"""Airbyte's notifications: hints, which Airbyte's own API must bear out before anything is started."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any
from uuid import uuid4

import httpx
import pytest
from prefect.client.orchestration import SyncPrefectClient
from pydantic import SecretStr, ValidationError

from blocks import AirbyteServer
from blocks.receiver import AirbyteWebhook
from deployments.receiver import airbyte as receiver_airbyte
from deployments.receiver.airbyte import AirbyteSource
from flows import sync_connections
from sandbox import Sandbox
from tasks.airbyte import AirbyteSync
from tasks.jobs import JobPolicy
from tests.events_fixtures import Target, api, stored, target
from tests.receiver_fixtures import Sent, as_json, post, running

__all__ = ["api", "target"]

URL_SECRET = SecretStr("an-unguessable-part-of-the-address")


@pytest.fixture
def source(airbyte: AirbyteServer) -> AirbyteSource:
    return AirbyteSource(AirbyteWebhook(url_secret=URL_SECRET, server=airbyte), uuid4().hex[:8])


@pytest.fixture
async def client(source: AirbyteSource, prefect_server: str) -> AsyncIterator[httpx.AsyncClient]:
    async with running([source]) as client:
        yield client


def started(sandbox: Sandbox, connection: str, **behaviour: Any) -> int:
    """A job that Airbyte's own scheduler starts."""
    sandbox.airbyte.set(connection, duration=0.1, **behaviour)
    return sandbox.airbyte.start(connection, "sync").job_id


def told(source: AirbyteSource, job: int, connection: str, secret: str = "", **data: Any) -> Sent:
    finished = {"finishedAt": "2026-03-02T04:12:49Z", "success": True, **data}
    body = {"text": "…", "blocks": [], "data": {"jobId": job, "connection": {"id": connection}, **finished}}
    return Sent(f"{source.path}/{secret or URL_SECRET.get_secret_value()}", as_json(body))


async def event_of(api: SyncPrefectClient, reply: httpx.Response) -> dict[str, Any]:
    assert reply.status_code == 200, reply.text
    (event,) = reply.json()["events"]
    (there,) = stored(api, event["id"])
    return there


@pytest.mark.parametrize(("outcome", "name"), [("succeed", "succeeded"), ("fail", "failed")])
async def test_what_the_api_says_is_the_event(
    api: SyncPrefectClient,
    sandbox: Sandbox,
    source: AirbyteSource,
    client: httpx.AsyncClient,
    outcome: str,
    name: str,
) -> None:
    """State, rows and reason are read from the API, not from the notification, which anybody may write."""
    (connection,) = sandbox.airbyte.add_connections(1, rows=77)
    job = started(sandbox, connection, outcome=outcome, reason="The source has gone away")
    wrong = {"success": outcome == "fail", "recordsCommitted": 1_000_000}
    event = await event_of(api, await post(client, told(source, job, connection, **wrong)))
    assert event["event"] == f"elt.airbyte.job.{name}"
    assert event["resource"]["prefect.resource.id"] == f"elt.airbyte.connection.{connection}"
    assert event["resource"]["elt.started-by"] == "airbyte"
    payload = event["payload"]
    assert (payload["job_id"], payload["connection_id"]) == (str(job), connection)
    assert payload["rows"] == (77 if name == "succeeded" else 0)
    assert payload["started_by_flow_run"] is None
    if name == "failed":
        assert "The source has gone away" in payload["message"]


def test_a_job_of_ours_is_told_as_such(
    api: SyncPrefectClient, sandbox: Sandbox, airbyte: AirbyteServer, source: AirbyteSource
) -> None:
    """A job that a flow run of ours has started says so, and leads to the run: it needs no other dbt run."""
    (connection,) = sandbox.airbyte.add_connections(1, duration=0.1)
    sync = AirbyteSync(server=airbyte, connection_id=connection, policy=JobPolicy(poll=0.1))
    state = sync_connections(syncs=[sync], return_state=True)
    run_id = str(state.state_details.flow_run_id)
    (job,) = sandbox.airbyte.jobs_of(connection)
    theirs = started(sandbox, connection)

    async def hooks() -> list[dict[str, Any]]:
        async with running([source]) as client:
            sent = [told(source, one, connection) for one in (job.job_id, theirs)]
            return [await event_of(api, await post(client, one)) for one in sent]

    ours, other = asyncio.run(hooks())
    assert ours["resource"]["elt.started-by"] == "elt-flows"
    assert ours["payload"]["started_by_flow_run"] == run_id
    assert f"prefect.flow-run.{run_id}" in [one["prefect.resource.id"] for one in ours["related"]]
    assert other["resource"]["elt.started-by"] == "airbyte"
    assert other["payload"]["started_by_flow_run"] is None


@pytest.mark.parametrize(
    ("changes", "status", "said"),
    [
        ({"secret": "another-unguessable-part"}, 404, "no such source"),
        ({"job": 999_999}, 400, "no job 999999"),
        ({"connection": "00000000-0000-4000-8000-000000000000"}, 400, "not of this connection"),
        ({"connection": "x"}, 400, "connection"),
        ({"job": "x"}, 400, "jobId"),
        ({"finishedAt": "soon"}, 400, "finishedAt"),
    ],
    ids=str,
)
async def test_what_the_api_does_not_bear_out(
    sandbox: Sandbox,
    source: AirbyteSource,
    client: httpx.AsyncClient,
    changes: dict[str, Any],
    status: int,
    said: str,
) -> None:
    """A job that Airbyte does not know, or not so, is no event; without the secret there is no address."""
    (connection,) = sandbox.airbyte.add_connections(1)
    job = started(sandbox, connection)
    reply = await post(client, told(source, **{"job": job, "connection": connection, **changes}))
    assert (reply.status_code, said in reply.json()["error"]) == (status, True)


@pytest.mark.parametrize(
    "body",
    [
        {"text": "Hello World! This is a test from Airbyte."},
        {
            "text": "queued",
            "data": {
                "jobId": 1,
                "connection": {"id": "00000000-0000-4000-8000-000000000000"},
                "finishedAt": None,
            },
        },
    ],
    ids=["no job", "queued"],
)
async def test_notices_that_are_no_end(
    source: AirbyteSource, client: httpx.AsyncClient, body: dict[str, Any]
) -> None:
    """Airbyte's test button and the notice of a queued job are acknowledged."""
    reply = await client.post(f"{source.path}/{URL_SECRET.get_secret_value()}", json=body)
    assert (reply.status_code, "ignored" in reply.json()) == (200, True)


async def test_an_early_notification(
    sandbox: Sandbox,
    airbyte: AirbyteServer,
    source: AirbyteSource,
    target: Target,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A notification of a job that still runs by the API is not taken, and not lost: its end is."""
    monkeypatch.setattr(receiver_airbyte, "_EARLY", ())
    monkeypatch.setattr(receiver_airbyte, "_LATER", (0.2,) * 300)
    (connection,) = sandbox.airbyte.add_connections(1)
    sandbox.airbyte.set(connection, outcome="stuck")
    job = sandbox.airbyte.start(connection, "sync").job_id
    once = target.trigger(
        expect=["elt.airbyte.job.failed"], parameters={"word": "{{ event.payload.job_id }}"}
    )
    async with running([source], [once]) as client:
        assert (await post(client, told(source, job, connection))).status_code == 503
        assert not target.runs()
        sandbox.airbyte.finish_job(job, "failed")
        deadline = time.monotonic() + 90
        while not target.runs():
            assert time.monotonic() < deadline
            await asyncio.sleep(0.1)
    assert target.runs()[0].parameters == {"word": str(job)}


@pytest.mark.parametrize("ends", [True, False], ids=["has ended by then", "still runs"])
async def test_stopped_before_it_is_tried_again(
    sandbox: Sandbox,
    source: AirbyteSource,
    target: Target,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    ends: bool,
) -> None:
    """Airbyte tells of it once: a receiver that is stopped tries once more, and says what it drops."""
    monkeypatch.setattr(receiver_airbyte, "_EARLY", ())
    monkeypatch.setattr(receiver_airbyte, "_LATER", (3600.0,) * 3)
    (connection,) = sandbox.airbyte.add_connections(1)
    sandbox.airbyte.set(connection, outcome="stuck")
    job = sandbox.airbyte.start(connection, "sync").job_id
    async with running([source], [target.trigger(expect=["elt.airbyte.job.failed"])]) as client:
        assert (await post(client, told(source, job, connection))).status_code == 503
        if ends:
            sandbox.airbyte.finish_job(job, "failed")
    assert len(target.runs()) == ends
    assert (f"{source.shown_path}: job {job}: dropped" in caplog.text) is not ends


async def test_airbytes_api_is_away(
    sandbox: Sandbox, source: AirbyteSource, client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While Airbyte's API can't be read nothing is believed, and nothing is acknowledged."""
    monkeypatch.setattr(receiver_airbyte, "_PATIENCE", 1.0)
    (connection,) = sandbox.airbyte.add_connections(1)
    job = started(sandbox, connection)
    sandbox.pause()
    try:
        reply = await post(client, told(source, job, connection))
    finally:
        sandbox.resume()
    assert (reply.status_code, reply.headers["Retry-After"]) == (503, "10")


@pytest.mark.no_server
@pytest.mark.parametrize("secret", ["", "short", "with a blank in the middle", "with/a/slash/in/the/middle"])
def test_secrets_that_could_be_guessed(secret: str) -> None:
    """A part of an address that could be guessed, or would not stay one part, is refused."""
    with pytest.raises(ValidationError) as caught:
        AirbyteWebhook(url_secret=SecretStr(secret), server=AirbyteServer())
    assert not secret or secret not in str(caught.value)
