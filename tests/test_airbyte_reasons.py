"""What only Airbyte's Config API tells or does, and the old servers that have no other."""

from __future__ import annotations

import asyncio
import logging
import re
from contextlib import nullcontext
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

import pytest

from blocks import AirbyteServer
from blocks.airbyte_model import Attempt, Job
from blocks.http import NotFoundError
from sandbox import Sandbox, catalog
from tasks.airbyte import AirbyteVendor
from tasks.airbyte_jobs import AirbyteRequest, _status
from tasks.jobs import InputError, JobFailed, JobState, MemoryJournal, run_job
from tests.airbyte_fixtures import APIS, QUICK, config, server
from tests.jobs_fixtures import Desk, until

__all__ = ["config"]


def old(desk: Desk) -> Desk:
    """The same server, three years older: basic auth, the Config API alone, and less of it."""
    desk.sandbox.airbyte.settings = desk.sandbox.airbyte.settings.model_copy(
        update={"age": "2023", "apis": "config", "auth": "basic"}
    )
    desk.vendor = AirbyteVendor(server(desk.sandbox, None, username="airbyte", password="password"))
    return desk


def asked(sandbox: Sandbox, prefix: str) -> int:
    return sandbox.requests.count(path=f"^{prefix}")


# -- what only the Config API tells


async def test_attempts_are_told_as_they_happen(config: Desk, caplog: pytest.LogCaptureFixture) -> None:
    """Each new attempt is logged when it begins, with the reason for which the one before has failed."""
    config.behave(outcome="fail", attempts=3, duration=6, reason="Password expired", failure="config_error")
    with caplog.at_level(logging.INFO, "elt.jobs"), pytest.raises(JobFailed) as caught:
        await config.run()
    lines = [record.message for record in caplog.records]
    for attempt in (2, 3):
        why = f"(attempt {attempt - 1} failed: Password expired (source, config_error))"
        assert f"orders: running, attempt {attempt} {why}" in lines
    assert caught.value.result.attempts == 3
    assert caught.value.result.message == "Password expired (source, config_error)"


async def test_streams_and_rejected_rows(config: Desk) -> None:
    """Rows and bytes by stream, and what the destination rejected."""
    connection = config.sandbox.airbyte.connection(config.connection_id)
    connection.streams = [{"name": "orders", "namespace": "shop"}, {"name": "items"}]
    config.behave(rows=1001, rejected=7)
    result = await config.run()
    assert [(s.name, s.namespace, s.rows, s.state) for s in result.streams] == [
        ("orders", "shop", 501, JobState.SUCCEEDED),
        ("items", None, 500, JobState.SUCCEEDED),
    ]
    assert all(stream.bytes for stream in result.streams)
    assert result.rows_rejected == 7
    assert result.attempts == 1


async def test_succeeded_in_part(config: Desk) -> None:
    """A job that is called succeeded although a stream failed is partial, and says which and why."""
    connection = config.sandbox.airbyte.connection(config.connection_id)
    connection.streams = [{"name": "orders"}, {"name": "items"}]
    config.behave(outcome="partial", reason="No such column: price")
    with pytest.raises(JobFailed, match="only a part landed: No such column: price") as caught:
        await config.run()
    assert caught.value.result.state is JobState.PARTIAL
    orders, items = caught.value.result.streams
    assert (orders.state, items.state) == (JobState.SUCCEEDED, JobState.FAILED)
    assert "No such column: price" in str(items.message)
    result = await Desk(config.sandbox, config.vendor._server).run(on_partial="ok")
    assert result.good


async def test_succeeded_in_part_over_the_public_api(sandbox: Sandbox) -> None:
    """The public API calls it succeeded and no more; the Config API of the same server tells the rest."""
    desk = Desk(sandbox, server(sandbox, "public"))
    sandbox.airbyte.connection(desk.connection_id).streams = [{"name": "orders"}, {"name": "items"}]
    desk.behave(outcome="partial", reason="No such column: price", duration=0.5)
    with pytest.raises(JobFailed, match="only a part landed: No such column: price") as caught:
        await desk.run()
    assert caught.value.result.state is JobState.PARTIAL
    assert [s.state for s in caught.value.result.streams] == [JobState.SUCCEEDED, JobState.FAILED]
    assert asked(sandbox, "/api/v1/jobs/") == 1


async def test_many_that_end_together_over_the_public_api(sandbox: Sandbox) -> None:
    """What it hides of them comes with a list of the Config API, not with a request for each."""
    desks = [Desk(sandbox, server(sandbox, "public")) for _ in range(12)]
    for desk in desks:
        desk.behave(outcome="partial" if desk is desks[0] else "succeed", duration=300, rejected=3)
    waiting = [desk.begin(poll=1.0, on_partial="warn") for desk in desks]
    for desk in desks:
        await desk.until_started()
    await until(lambda: all(desk.words == ["running"] for desk in desks))
    for desk in desks:
        desk.end_first()
    ends = await asyncio.gather(*waiting)
    assert [end.state for end in ends] == [JobState.PARTIAL] + [JobState.SUCCEEDED] * 11
    assert {end.rows_rejected for end in ends} == {3}
    assert asked(sandbox, "/api/v1/jobs/get") <= 3
    assert asked(sandbox, "/api/v1/jobs/list_for_workspaces") >= 1


@pytest.mark.parametrize("fault", [{"kind": "status", "status": 403}, {"kind": "delay", "delay": 30}])
async def test_a_list_that_does_not_come(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch, fault: dict[str, Any]
) -> None:
    """Costs no more than what it would have saved: each job is then asked for alone."""
    monkeypatch.setattr("blocks.airbyte_client._EXPLAIN_WITHIN", 2.0)
    desks = [Desk(sandbox, server(sandbox, "public")) for _ in range(6)]
    for desk in desks:
        desk.behave(outcome="partial", duration=1.0)
    desks[0].fault(**fault, path="/list_for_workspaces")
    ends = await asyncio.gather(*(desk.run(poll=1.0, on_partial="warn") for desk in desks))
    assert {end.state for end in ends} == {JobState.PARTIAL}


async def test_what_the_public_api_does_not_count(sandbox: Sandbox) -> None:
    """Attempts, streams and rejected rows of a job that went well are the Config API's, too."""
    limited = server(sandbox, "public").model_copy(update={"requests_per_second": 50.0})
    desk = Desk(sandbox, limited)
    desk.behave(rows=1001, rejected=7)
    result = await desk.run()
    assert (result.rows, result.rows_rejected, result.attempts) == (1001, 7, 1)
    assert [stream.state for stream in result.streams] == [JobState.SUCCEEDED]


def test_partial_without_a_reason() -> None:
    """An attempt that says it was a partial success is one, whether it names a failure or not."""
    job = Job(
        jobId="1",
        status="succeeded",
        connectionId="c",
        startTime=datetime(2026, 1, 1, tzinfo=UTC),
        attempts=[Attempt(status="succeeded", partial=True)],
    )
    status = _status(job)
    assert (status.state, status.message) == (
        JobState.PARTIAL,
        "only a part landed: Airbyte names no reason",
    )


async def test_no_attempts_just_after_the_start(config: Desk) -> None:
    """A job without any attempt yet is a job; `attempts[-1]` of an empty list is nobody's business."""
    config.behave(queued_seconds=60)
    _, _, status = await config.vendor.look_up(config.start_by_hand())
    assert (status.state, status.attempts) == (JobState.QUEUED, None)


async def test_the_public_api_borrows_the_reason(sandbox: Sandbox, caplog: pytest.LogCaptureFixture) -> None:
    """Over the public API of a self-managed server a failed attempt is told with the Config API's reason."""
    desk = Desk(sandbox, server(sandbox, "public"))
    desk.behave(outcome="fail", attempts=2, reason="Disk full", origin="replication", duration=6)
    why = "Disk full (replication, transient_error)"
    with caplog.at_level(logging.INFO, "elt.jobs"), pytest.raises(JobFailed, match=re.escape(why)) as caught:
        await desk.run()
    assert f"orders: incomplete (attempt 1 failed: {why})" in caplog.messages
    assert caught.value.result.attempts == 2


@pytest.mark.parametrize(
    "trouble",
    [
        {"kind": "status", "status": 401},
        {"kind": "status", "status": 403},
        {"kind": "status", "status": 404, "body": {"message": "no"}},
        {"kind": "status", "status": 503},
        {"kind": "html", "status": 200},
        {"kind": "null_fields"},
        {"kind": "drop"},
    ],
    ids=str,
)
async def test_a_reason_that_is_not_to_be_had(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch, trouble: dict[str, Any]
) -> None:
    """Where the Config API fails, however it does, the job's end is told all the same."""
    monkeypatch.setattr("blocks.airbyte_client._EXPLAIN_WITHIN", 1.0)
    desk = Desk(sandbox, server(sandbox, "public"))
    desk.behave(outcome="fail")
    desk.fault(path="^/api/v1/", **trouble)
    with pytest.raises(JobFailed, match="its public API gives no reason, the job's page does"):
        await desk.run()
    desk.behave(outcome="succeed")
    assert (await Desk(sandbox, server(sandbox, "public")).run()).state is JobState.SUCCEEDED


async def test_a_limit_of_rejected_rows(sandbox: Sandbox) -> None:
    """The limit is kept by what the Config API tells; where it tells nothing, that is not taken for none."""
    desk = Desk(sandbox, server(sandbox, "public"))
    desk.behave(rejected=7)
    with pytest.raises(JobFailed, match="7 rows were rejected; at most 6"):
        await desk.run(max_rows_rejected=6)
    assert (await desk.run(max_rows_rejected=7)).good
    sandbox.airbyte.settings.apis = "public"
    with pytest.raises(JobFailed, match="does not say how many rows were rejected; at most 7 are borne"):
        await Desk(sandbox, server(sandbox, "public")).run(max_rows_rejected=7)
    assert (await Desk(sandbox, desk.vendor._server).run(operation="clear")).good


async def test_details_that_come_late(sandbox: Sandbox) -> None:
    """A Config API that fails once is asked again: what a job that succeeded hides is not lost by that."""
    desk = Desk(sandbox, server(sandbox, "public"))
    desk.behave(outcome="partial", duration=0.3)
    desk.fault(kind="status", status=503, path="^/api/v1/", times=1)
    with pytest.raises(JobFailed, match="only a part landed"):
        await desk.run()


@pytest.mark.parametrize("outcome", ["fail", "succeed"])
async def test_a_refused_reason_is_not_asked_for_again(sandbox: Sandbox, outcome: str) -> None:
    """A server whose Config API refuses us is asked once and not once per job."""
    sandbox.airbyte.settings.apis = "public"
    desk = Desk(sandbox, server(sandbox, "public"))
    desk.behave(outcome=outcome)
    async with desk.vendor.session():
        for _ in range(3):
            desk.journal = MemoryJournal()
            with pytest.raises(JobFailed) if outcome == "fail" else nullcontext():
                await desk.run()
    assert len(desk.jobs) == 3
    assert asked(sandbox, "/api/v1/") == 1


async def test_a_reason_that_is_long_in_coming(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Config API that hangs does not hold the watching of the others up for longer than its patience."""
    monkeypatch.setattr("blocks.airbyte_client._EXPLAIN_WITHIN", 0.3)
    desk = Desk(sandbox, server(sandbox, "public"))
    desk.behave(outcome="fail")
    desk.fault(kind="delay", delay=30, path="^/api/v1/")
    with pytest.raises(JobFailed, match="gives no reason"):  # it would, to whom waits for it
        await desk.run()


# -- refresh


@pytest.mark.parametrize("api", [*APIS, None])
async def test_refresh(sandbox: Sandbox, api: str | None) -> None:
    """A refresh goes to the Config API, whichever the block uses otherwise, and is watched by either."""
    desk = Desk(sandbox, server(sandbox, api))
    request = AirbyteRequest(desk.connection_id, "refresh", "orders", mode="Truncate")
    result = await run_job(desk.vendor, request, QUICK, journal=MemoryJournal())
    assert result.rows == 1000
    assert [job.job_type for job in sandbox.airbyte.jobs_of(desk.connection_id)] == ["refresh"]
    (sent,) = sandbox.requests.find(path="/connections/refresh$")
    assert sent.body == {"connectionId": desk.connection_id, "refreshMode": "Truncate"}


async def test_the_cloud_cannot_refresh(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the Cloud a refresh is refused with what can be done instead, and nothing is asked for."""
    monkeypatch.setattr("blocks.airbyte._CLOUD", sandbox.airbyte_url.removesuffix("/v1"))
    secret = {"client_id": catalog.CLIENT_ID, "client_secret": catalog.CLIENT_SECRET}
    desk = Desk(sandbox, AirbyteServer(base_url="https://cloud.airbyte.com", **secret))
    assert desk.vendor._server.in_cloud
    with pytest.raises(
        InputError, match=r"^Airbyte Cloud has no API for a refresh; nothing was started\. Clear"
    ):
        await desk.run(operation="refresh")
    assert desk.jobs == []
    assert [request.path for request in sandbox.requests.find(method="POST")] == [
        "/api/public/v1/applications/token"
    ]


# -- servers of 2023


async def test_an_old_server(config: Desk) -> None:
    """A server of 2023 has basic auth, no workspace list and no `queued`: its jobs run all the same."""
    desk = old(config)
    desk.behave(queued_seconds=0.2)
    result = await desk.run()
    assert (result.state, result.rows, result.attempts) == (JobState.SUCCEEDED, 1000, 1)
    assert [stream.rows for stream in result.streams] == [1000]
    assert catalog.WORKSPACE_ID in str(result.url)  # which it does not say of a connection
    assert (await desk.run(operation="reset")).state is JobState.SUCCEEDED


async def test_what_an_old_server_lacks(config: Desk) -> None:
    """A clear or refresh that an old server does not know is refused with what to do instead."""
    desk = old(config)
    with pytest.raises(NotFoundError, match=r"too old to know clear\. Ask for a reset instead"):
        await desk.run(operation="clear")
    with pytest.raises(NotFoundError, match="too old to know refresh"):
        await desk.run(operation="refresh")
    assert desk.jobs == []


async def test_an_old_server_is_watched_one_by_one(config: Desk) -> None:
    """Where there is no list for workspaces, jobs are read one by one; the list is asked for once."""
    desk = old(config)
    ids = desk.sandbox.airbyte.add_connections(6, duration=0.8)
    requests = [AirbyteRequest(connection_id, "sync", connection_id) for connection_id in ids]
    async with desk.vendor.session():
        results = await asyncio.gather(
            *(run_job(desk.vendor, request, QUICK, journal=MemoryJournal()) for request in requests)
        )
    assert all(result.rows == 1000 for result in results)
    assert desk.sandbox.requests.count(path="/list_for_workspaces$") == 1


async def test_an_old_server_does_not_hang_on_an_unknown_connection(config: Desk) -> None:
    """An unknown connection is found out before the start, which an old server lets hang until a 504."""
    desk = old(config)
    request = AirbyteRequest(str(uuid4()), "sync", "nobody's")
    with pytest.raises(NotFoundError):
        await run_job(desk.vendor, request, QUICK, journal=MemoryJournal())
    assert desk.sandbox.requests.count(path="/connections/sync$") == 0


async def test_an_old_server_finds_a_lost_start(config: Desk) -> None:
    """An old server takes words that it does not know for an error: it is asked again with those it knows."""
    desk = old(config)
    desk.behave(duration=0.4)
    desk.fault(kind="drop_after", path="/connections/sync$", times=1)
    result = await desk.run()
    assert desk.jobs == [result.job_id]
