"""Airbyte's two APIs behind one block: found out, the same jobs over both, and what only one tells."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any
from uuid import uuid4

import pytest
from pydantic import ValidationError

from blocks import AirbyteServer
from blocks.airbyte_model import Job
from blocks.http import AuthError, BadReply, NotFoundError, VendorUnavailable
from sandbox import Sandbox, catalog
from tasks.airbyte import AirbyteVendor
from tasks.airbyte_jobs import AirbyteRequest
from tasks.jobs import (
    InputError,
    JobCancelled,
    JobFailed,
    JobPolicy,
    JobState,
    MemoryJournal,
    cancel_job,
    run_job,
    wait_for_job,
)
from tests.jobs_fixtures import Desk

APIS = ("public", "config")
QUICK = JobPolicy(poll=0.03, timeout=20)


def server(sandbox: Sandbox, api: str | None = None, **fields: Any) -> AirbyteServer:
    """The block for one of the sandbox's APIs; for none, with an address that does not say which."""
    urls = {"public": sandbox.airbyte_url, "config": sandbox.airbyte_config_url, None: sandbox.url}
    secret = {"client_id": catalog.CLIENT_ID, "client_secret": catalog.CLIENT_SECRET}
    return AirbyteServer(base_url=urls[api], **(fields or secret))


@pytest.fixture(params=APIS)
def both(request: pytest.FixtureRequest, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> Desk:
    """A desk on each of the two APIs."""
    monkeypatch.setattr(AirbyteVendor, "grace", 0.3)
    return Desk(sandbox, server(sandbox, request.param))


@pytest.fixture
def config(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> Desk:
    """A desk on the Config API."""
    monkeypatch.setattr(AirbyteVendor, "grace", 0.3)
    return Desk(sandbox, server(sandbox, "config"))


def old(desk: Desk) -> Desk:
    """The same server, three years older: basic auth, the Config API alone, and less of it."""
    desk.sandbox.airbyte.settings = desk.sandbox.airbyte.settings.model_copy(
        update={"age": "2023", "apis": "config", "auth": "basic"}
    )
    desk.vendor = AirbyteVendor(server(desk.sandbox, None, username="airbyte", password="password"))
    return desk


def asked(sandbox: Sandbox, prefix: str) -> int:
    return sandbox.requests.count(path=f"^{prefix}")


# -- which API


@pytest.mark.parametrize(("apis", "kind"), [("both", "public"), ("public", "public"), ("config", "config")])
async def test_the_api_is_found_out(sandbox: Sandbox, apis: Any, kind: str) -> None:
    """Where the address does not say which API it is, the server is asked, once."""
    sandbox.airbyte.settings.apis = apis
    block = server(sandbox)
    assert block.kind is None
    async with block.client():  # as a run holds it
        for _ in range(3):
            async with block.connect() as api:
                assert api.kind == kind
                assert await api.connections()
    assert sandbox.requests.count(path="/health$") == (1 if kind == "public" else 2)
    assert sandbox.airbyte.token_requests == 1


async def test_what_the_address_says_is_not_asked(sandbox: Sandbox) -> None:
    """An address that says which API it is, or a block that does, costs no question."""
    said = AirbyteServer(
        base_url=sandbox.url, api="config", username=catalog.BASIC_USER, password=catalog.BASIC_PASSWORD
    )
    assert said.base_url == sandbox.airbyte_config_url
    sandbox.airbyte.settings.auth = "basic"
    for block, kind in ((server(sandbox, "public"), "public"), (said, "config")):
        assert block.kind == kind
        async with block.connect() as api:
            assert api.kind == kind
    overruled = AirbyteServer(base_url=sandbox.airbyte_config_url, api="public")
    assert overruled.base_url == sandbox.airbyte_url
    assert len(sandbox.requests) == 0


async def test_an_address_without_an_airbyte(sandbox: Sandbox) -> None:
    """Where neither API answers, that is said with both addresses; an outage is borne as one."""
    nowhere = AirbyteServer(base_url=f"{sandbox.url}/elsewhere")
    with pytest.raises(BadReply, match=r"neither its public API \(/api/public/v1\) nor its Config API"):
        async with nowhere.connect():
            pass
    sandbox.outage(0.6)
    async with asyncio.timeout(10):
        async with server(sandbox).connect() as api:
            assert api.kind == "public"


async def test_a_proxy_that_wants_a_password_first(sandbox: Sandbox) -> None:
    """A proxy's 401 on the question itself is told as what it is: wrong credentials, not a wrong address."""
    sandbox.faults.add(kind="status", status=401, path="/health$", body={"message": "no"})
    with pytest.raises(AuthError):
        async with server(sandbox).connect():
            pass


def test_the_cloud_has_no_config_api() -> None:
    """The Config API of the Cloud is refused when the block is made."""
    with pytest.raises(ValidationError, match="Airbyte Cloud has no Config API"):
        AirbyteServer(api="config")
    assert AirbyteServer().kind == "public"
    assert AirbyteServer(base_url="https://cloud.airbyte.com").in_cloud


# -- the same jobs over both


@pytest.mark.parametrize("operation", ["sync", "clear", "reset"])
async def test_jobs_run(both: Desk, operation: str) -> None:
    """A sync, clear or reset runs to its end, over either API, and is found under the same numbers."""
    result = await both.run(operation=operation)
    assert (result.state, result.rows) == (JobState.SUCCEEDED, 1000 if operation == "sync" else 0)
    assert result.job_id == both.jobs[0]
    assert result.duration is not None
    assert f"/workspaces/{catalog.WORKSPACE_ID}/connections/{both.connection_id}" in str(result.url)


async def test_a_lost_start_is_found(both: Desk) -> None:
    """No idempotency key: a start whose reply was lost is looked for and not sent again."""
    both.behave(duration=0.4)
    both.fault(kind="drop_after", method="POST", path="/(jobs|connections/sync)$", times=1)
    result = await both.run()
    assert both.jobs == [result.job_id]


async def test_a_refused_read_starts_nothing(config: Desk) -> None:
    """Every call of the Config API is a POST; one that only reads is never taken for a start."""
    config.fault(kind="drop", path="/connections/get$", times=50)
    async with config.vendor._server.connect() as api:
        api._retry_budget = 0.5
        with pytest.raises(VendorUnavailable) as caught:
            await api.connection(config.connection_id)
    assert caught.value.sent is False


@pytest.mark.parametrize("policy", ["queue", "adopt"])
async def test_already_running_is_attached_to(both: Desk, policy: str) -> None:
    """Either API's 409 "already running" is a reason to wait, or to take that job, and never an error."""
    both.behave(duration=0.5)
    theirs = both.start_by_hand()
    result = await both.run(on_active=policy)
    assert both.jobs == ([theirs, result.job_id] if policy == "queue" else [theirs])
    assert both.words[-1] == "succeeded"


@pytest.mark.parametrize(
    ("status", "says"), [("inactive", "is inactive"), ("deprecated", "deprecated|deleted")]
)
async def test_an_inactive_connection_says_why(both: Desk, status: str, says: str) -> None:
    """The 409 that hides its reason never gets that far: the connection's status is told, nothing is sent."""
    both.behave(status=status, status_reason="too many failures in a row")
    with pytest.raises((InputError, NotFoundError), match=says):
        await both.run()
    assert both.jobs == []
    assert both.sandbox.requests.count(method="POST", path="/(jobs|connections/sync)$") == 0


async def test_disabled_under_our_eyes(both: Desk) -> None:
    """A connection that Airbyte disables after we have read it: the hidden reason is read and told."""
    async with both.vendor.session():
        await both.vendor.connection(both.connection_id)
        both.behave(status="inactive", status_reason="too many failures in a row")
        with pytest.raises(InputError, match=r"is inactive \(too many failures in a row\)"):
            await both.run()
    assert both.jobs == []


async def test_cancel_looks_first(both: Desk) -> None:
    """Cancel hits whatever the connection runs now, so a job that has ended is never cancelled."""
    both.behave(duration=0)
    ended = both.start_by_hand()
    both.behave(outcome="stuck")
    running = both.start_by_hand()
    assert await both.vendor.cancel((await both.vendor.look_up(ended))[0]) is JobState.SUCCEEDED
    assert both.words[-1] in ("pending", "running")
    handle = (await both.vendor.look_up(running))[0]
    assert await cancel_job(both.vendor, handle) == "it was cancelled"
    assert both.words[-1] == "cancelled"


async def test_cancel_that_meets_the_end(both: Desk) -> None:
    """A job that ends between the look and the cancellation is no error."""
    both.behave(duration=0.4)
    handle = (await both.vendor.look_up(both.start_by_hand()))[0]
    both.fault(kind="delay", delay=0.6, path="/jobs/cancel$")
    both.fault(kind="delay", delay=0.6, method="DELETE")
    assert await cancel_job(both.vendor, handle) == "it had ended already: succeeded"


async def test_anybodys_job_is_waited_for(both: Desk) -> None:
    """A job that somebody else started is looked up, waited for and judged; an unknown one is said so."""
    both.behave(duration=0.3)
    handle, request, status = await both.vendor.look_up(both.start_by_hand())
    assert (request.operation, status.state.terminal) == ("sync", False)
    assert (await wait_for_job(both.vendor, request, handle, QUICK)).rows == 1000
    for nobody in ("999999", "abc"):
        with pytest.raises(Exception, match=r"404|400|no job id"):
            await both.vendor.look_up(nobody)


@pytest.mark.parametrize("word", ["incomplete", "queued", "hibernating"])
async def test_words_that_are_no_end(both: Desk, word: str) -> None:
    """`incomplete`, `queued` and words that nobody knows are waited through."""
    ways: dict[str, dict[str, Any]] = {
        "incomplete": {"outcome": "incomplete_then_succeed", "duration": 0.4},
        "queued": {"queued_seconds": 0.3},
        "hibernating": {"outcome": "unknown_word", "word": word, "word_seconds": 0.2},
    }
    both.behave(**ways[word])
    assert (await both.run()).state is JobState.SUCCEEDED


async def test_cancelled_is_no_success(both: Desk) -> None:
    """A job that was cancelled at Airbyte is neither a success nor a failure."""
    both.behave(outcome="cancel")
    with pytest.raises(JobCancelled, match="it was cancelled in Airbyte"):
        await both.run()


async def test_success_without_rows(both: Desk) -> None:
    """`succeeded` with zero rows is partial, and so a failure, where rows are expected."""
    both.behave(outcome="zero_rows")
    with pytest.raises(JobFailed, match="it moved 0 rows; at least 1 were expected"):
        await both.run(min_rows=1)


async def test_a_slow_trigger_is_waited_for(config: Desk) -> None:
    """A server that answers a start only when the job runs is waited for; five seconds are no limit."""
    config.behave(duration=0)
    config.fault(kind="delay", delay=5.5, path="/connections/sync$", times=1)
    assert [(await config.run()).job_id] == config.jobs


async def test_tokens_that_expire_while_we_wait(both: Desk) -> None:
    """A job outlives its token, also where only the JWT says when that ends."""
    both.sandbox.airbyte.settings.token_seconds = 1
    both.sandbox.airbyte.settings.announce_expiry = False
    both.behave(duration=2.5)
    assert (await both.run()).state is JobState.SUCCEEDED
    assert both.sandbox.airbyte.token_requests >= 2


@pytest.mark.parametrize("api", APIS)
async def test_a_thousand_jobs_cost_ten_requests_a_look(sandbox: Sandbox, api: str) -> None:
    """One look at 1,000 jobs is ten requests, over either API."""
    sandbox.airbyte.set("airlines", tags=[])
    ids = sandbox.airbyte.add_connections(1000, duration=60)
    for connection_id in ids:
        sandbox.airbyte.start(connection_id, "sync")
    vendor = AirbyteVendor(server(sandbox, api))
    async with vendor.session():
        async with vendor._server.connect() as read:
            await read.connections()
        handles = [
            vendor._handle(
                Job(id=str(job.job_id), status="", connection_id=job.connection_id, created_at=_began(job)),
                await vendor.connection(job.connection_id),
                "",
            )
            for job in sandbox.airbyte.jobs.values()
        ]
        before = len(sandbox.requests)
        for _ in range(3):
            assert len(await vendor.observe(handles)) == 1000
    assert len(sandbox.requests) - before == 30


def _began(job: Any) -> str:
    return str(job.reply()["startTime"])


# -- what only the Config API tells


async def test_attempts_are_told_as_they_happen(config: Desk, caplog: pytest.LogCaptureFixture) -> None:
    """Each new attempt is logged when it begins, with the reason for which the one before has failed."""
    config.behave(outcome="fail", attempts=3, duration=1.2, reason="Password expired", failure="config_error")
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


async def test_no_attempts_just_after_the_start(config: Desk) -> None:
    """A job without any attempt yet is a job; `attempts[-1]` of an empty list is nobody's business."""
    config.behave(duration=5)
    _, _, status = await config.vendor.look_up(config.start_by_hand())
    assert (status.state, status.attempts) == (JobState.QUEUED, None)


async def test_the_public_api_borrows_the_reason(sandbox: Sandbox) -> None:
    """A failure over the public API of a self-managed server is told with the Config API's reason."""
    desk = Desk(sandbox, server(sandbox, "public"))
    desk.behave(outcome="fail", attempts=2, reason="Disk full", origin="replication", duration=0.4)
    with pytest.raises(JobFailed, match=r"Disk full \(replication, transient_error\)") as caught:
        await desk.run()
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
async def test_a_reason_that_is_not_to_be_had(sandbox: Sandbox, trouble: dict[str, Any]) -> None:
    """Where the Config API fails, however it does, the job's failure is told all the same."""
    desk = Desk(sandbox, server(sandbox, "public"))
    desk.behave(outcome="fail")
    desk.fault(path="^/api/v1/", **trouble)
    with pytest.raises(JobFailed, match="its public API gives no reason, the job's page does"):
        await desk.run()


async def test_a_refused_reason_is_not_asked_for_again(sandbox: Sandbox) -> None:
    """A server whose Config API refuses us is asked once and not once per failed job."""
    sandbox.airbyte.settings.apis = "public"
    desk = Desk(sandbox, server(sandbox, "public"))
    desk.behave(outcome="fail")
    async with desk.vendor.session():
        for _ in range(3):
            with pytest.raises(JobFailed):
                await desk.run()
    assert asked(sandbox, "/api/v1/") == 1


async def test_a_reason_that_is_long_in_coming(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Config API that hangs does not hold the watching of the others up for longer than its patience."""
    monkeypatch.setattr("blocks.airbyte_client._EXPLAIN_WITHIN", 0.3)
    desk = Desk(sandbox, server(sandbox, "public"))
    desk.behave(outcome="fail")
    desk.fault(kind="delay", delay=30, path="^/api/v1/")
    began = time.monotonic()
    with pytest.raises(JobFailed, match="gives no reason"):
        await desk.run()
    assert time.monotonic() - began < 3


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


async def test_the_cloud_cannot_refresh() -> None:
    """In the Cloud a refresh is refused with what can be done instead."""
    vendor = AirbyteVendor(AirbyteServer())
    async with vendor._server.client() as client:
        assert client.config is None


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


# -- documents


@pytest.mark.parametrize(
    ("type_", "operation", "same"),
    [
        ("sync", "sync", True),
        ("clear", "reset", True),
        ("reset", "clear", True),
        ("refresh", "sync", False),
        ("sync", "clear", False),
    ],
)
def test_a_clear_may_be_listed_as_a_reset(type_: str, operation: str, same: bool) -> None:
    """Airbyte has one function behind clear and reset; a lost one is found under either name."""
    job = Job(id="1", status="running", type=type_, connection_id="c", created_at="2026-01-01T00:00:00Z")
    assert job.does(operation) is same
