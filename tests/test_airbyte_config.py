"""Airbyte's two APIs behind one block: found out when nobody says which, and the same jobs over both."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import pytest
from pydantic import ValidationError

from blocks import AirbyteServer
from blocks.airbyte_config import ConfigApi
from blocks.airbyte_model import Job
from blocks.airbyte_public import PublicApi
from blocks.http import AuthError, BadReply, ConflictError, NotFoundError, VendorError, VendorUnavailable
from sandbox import Sandbox, catalog
from tasks.airbyte import AirbyteVendor
from tasks.jobs import (
    InputError,
    JobCancelled,
    JobFailed,
    JobState,
    JobTimeout,
    cancel_job,
    wait_for_job,
)
from tests.airbyte_fixtures import APIS, QUICK, both, config, server
from tests.jobs_fixtures import Desk, until

__all__ = ["both", "config"]


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
    async with asyncio.timeout(60):
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


async def test_a_lost_start_behind_an_unreadable_job(both: Desk) -> None:
    """While one of the jobs listed can't be read it may be the one looked for, and nothing is started."""
    unreadable = {"data": [{"jobId": 7}], "jobs": [{"job": {"id": 7}}]}
    both.fault(kind="drop_after", method="POST", path="/(jobs|connections/sync)$", times=1)
    listing = {"path": "/jobs(/list)?$", "method": "POST" if both.vendor._server.kind == "config" else "GET"}
    fault = both.fault(kind="status", status=200, body=unreadable, **listing)
    with pytest.raises(VendorError, match="one of its jobs is not what the API promises"):
        await both.run(outage=0.5)
    both.sandbox.faults.remove(fault)
    result = await both.run()
    assert both.jobs == [result.job_id]


def _listed(number: int, minute: int, status: str | None) -> dict[str, Any]:
    moment = f"2026-01-01T00:{minute:02}:00Z"
    return {"jobId": number, "status": status, "jobType": "sync", "connectionId": "c", "startTime": moment}


@pytest.mark.parametrize(
    ("since", "read"),
    [
        (5, None),  # the unreadable one, the newest, may be ours
        (None, ["8", "6"]),  # who does not look for a lost start is told of the others
    ],
)
async def test_an_unreadable_job_among_others(
    sandbox: Sandbox, since: int | None, read: list[str] | None
) -> None:
    """Only for who looks for a lost start is a job that can't be read more than one that is left out."""
    items = [_listed(9, 9, None), _listed(8, 8, "running"), _listed(6, 6, "succeeded")]
    moment = None if since is None else datetime(2026, 1, 1, 0, since, tzinfo=UTC)
    async with server(sandbox, "public").connect() as api:
        if read is None:
            with pytest.raises(BadReply, match="one of its jobs"):
                api._newest(items, Job.model_validate, moment)
        else:
            assert [job.id for job in api._newest(items, Job.model_validate, moment)] == read


async def test_an_unreadable_job_of_long_ago(sandbox: Sandbox) -> None:
    """One that is older than the start that is looked for can't be it, and keeps nobody waiting."""
    items = [_listed(9, 9, "running"), _listed(6, 6, "succeeded"), _listed(5, 5, None)]
    async with server(sandbox, "public").connect() as api:
        found = api._newest(items, Job.model_validate, datetime(2026, 1, 1, 0, 8, tzinfo=UTC))
    assert [job.id for job in found] == ["9"]


async def test_a_conflict_with_an_unreadable_job(both: Desk) -> None:
    """That a job runs is known from the refusal; one of the list that can't be read does not change it."""
    unreadable = {"data": [{"jobId": 7}], "jobs": [{"job": {"id": 7}}]}
    listing = {"path": "/jobs(/list)?$", "method": "POST" if both.vendor._server.kind == "config" else "GET"}
    both.fault(
        kind="status",
        status=409,
        path="/(jobs|connections/sync)$",
        method="POST",
        times=2,
        body=STUCK[both.vendor._server.kind or ""],
    )
    both.fault(kind="status", status=200, body=unreadable, times=2, **listing)
    result = await both.run(outage=0.0)
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
    both.behave(outcome="stuck", times=1)
    theirs = both.start_by_hand()
    waiting = both.begin(on_active=policy)
    await until(lambda: bool(both.sandbox.requests.count(path="/(jobs|connections/sync)$", method="POST")))
    if policy == "adopt":
        await both.until_started()
    both.end_first()
    result = await waiting
    assert both.jobs == ([theirs, result.job_id] if policy == "queue" else [theirs])
    assert both.words[-1] == "succeeded"


_KNOWN = "io.airbyte.commons.server.errors.ValueConflictKnownException"
STUCK = {
    "public": {
        "status": 409,
        "title": "try-again-later",
        "data": {"message": "A sync is already running for: x"},
    },
    "config": {"message": "A sync is already running for: x", "exceptionClassName": _KNOWN},
}


async def test_already_running_without_a_job(both: Desk) -> None:
    """A server that says "already running" for ever, with no job to be seen: the timeout ends it."""
    both.fault(
        kind="status",
        status=409,
        method="POST",
        path="/(jobs|connections/sync)$",
        body=STUCK[both.vendor._server.kind or ""],
    )
    with pytest.raises(JobTimeout, match="a job was running already and did not end"):
        await both.run(timeout=0.5)
    assert both.jobs == []


RUNNING = "A sync is already running for: x"
CONFLICTS = [
    ("public", {"title": "try-again-later", "data": {"message": "Eine Synchronisierung läuft"}}, True),
    ("public", {"title": "state-conflict", "data": {"message": RUNNING}}, False),
    ("config", {"message": "Eine Synchronisierung läuft", "exceptionClassName": _KNOWN}, True),
    ("config", {"message": RUNNING, "exceptionClassName": "java.lang.IllegalStateException"}, False),
    ("public", {"message": RUNNING}, True),
    ("config", {"message": RUNNING}, True),
    ("config", {"message": "odd"}, False),
]


@pytest.mark.parametrize(("api", "body", "running"), CONFLICTS)
async def test_what_a_conflict_is(sandbox: Sandbox, api: str, body: Any, running: bool) -> None:
    """A 409 is told by the word that is meant for it; its text is read only where there is none."""
    desk = Desk(sandbox, server(sandbox, api))
    start = "/(jobs|connections/sync)$"
    desk.fault(kind="status", status=409, method="POST", path=start, body=body, times=1)
    if running:
        with pytest.raises(JobFailed, match="a job is running already, and the policy says fail"):
            await desk.run(on_active="fail")
    else:
        with pytest.raises(ConflictError):
            await desk.run(on_active="fail")
    assert desk.jobs == []


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
    assert (await cancel_job(both.vendor, handle)).words == "it was cancelled"
    assert both.words[-1] == "cancelled"


async def test_cancel_that_meets_the_end(both: Desk) -> None:
    """A job that ends between the look and the cancellation is no error."""
    both.behave(duration=0.4)
    handle = (await both.vendor.look_up(both.start_by_hand()))[0]
    both.fault(kind="delay", delay=0.6, path="/jobs/cancel$")
    both.fault(kind="delay", delay=0.6, method="DELETE")
    assert (await cancel_job(both.vendor, handle)).words == "it had ended already: succeeded"


async def test_cancel_that_hits_another(
    both: Desk, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Ours ends and another begins before the cancellation arrives: what became of ours is told, and that."""
    both.behave(outcome="stuck")
    handle = (await both.vendor.look_up(both.start_by_hand()))[0]
    api = PublicApi if both.vendor._server.kind == "public" else ConfigApi
    cancel = api.cancel_job

    async def late(self: Any, job_id: str) -> Job:
        both.sandbox.airbyte.jobs[int(job_id)].timeline.finish("succeeded")
        both.start_by_hand()
        return await cancel(self, job_id)

    monkeypatch.setattr(api, "cancel_job", late)
    assert (await cancel_job(both.vendor, handle)).words == "it had ended already: succeeded"
    assert both.words == ["succeeded", "cancelled"]
    assert f"job {handle.job_id} had succeeded before its cancellation arrived" in caplog.text


async def test_a_cancellation_that_takes_its_time(both: Desk) -> None:
    """A reply that still says running is no end: it is looked at again until it has one."""
    both.behave(outcome="stuck")
    handle = (await both.vendor.look_up(both.start_by_hand()))[0]
    job = both.sandbox.airbyte.jobs[int(handle.job_id)]
    public = both.vendor._server.kind == "public"
    body = job.reply() if public else {"job": job.config_reply(old=False)}
    fault = {"kind": "status", "status": 200, "times": 1, "body": body}
    both.fault(**fault, path="/jobs/cancel$")
    both.fault(**fault, method="DELETE")
    assert (await cancel_job(both.vendor, handle)).words == "it was cancelled"
    assert both.words == ["cancelled"]


async def test_anybodys_job_is_waited_for(both: Desk) -> None:
    """A job that somebody else started is looked up, waited for and judged; an unknown one is said so."""
    both.behave(duration=60)
    handle, request, status = await both.vendor.look_up(both.start_by_hand())
    assert (request.operation, status.state.terminal) == ("sync", False)
    both.end_first()
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


@pytest.mark.parametrize("api", APIS)
async def test_several_workspaces(sandbox: Sandbox, api: str) -> None:
    """What is in the workspaces that the block names is listed and watched together, and nothing else."""
    first, second, other = (str(UUID(int=number)) for number in (1, 2, 3))
    ids = [
        connection_id
        for workspace in (first, second, other)
        for connection_id in sandbox.airbyte.add_connections(3, duration=600, workspace=workspace)
    ]
    block = server(sandbox, api).model_copy(update={"workspace_ids": [first, second]})
    vendor = AirbyteVendor(block)
    async with vendor.session():
        async with block.connect() as read:
            assert [connection.id for connection in await read.connections()] == ids[:6]
        listed = sandbox.requests.find(method="GET", path="/connections$")
        jobs = [sandbox.airbyte.start(connection_id, "sync").job_id for connection_id in ids]
        handles = [(await vendor.look_up(str(job)))[0] for job in jobs[:6]]
        sandbox.requests.clear()
        assert len(await vendor.observe(handles)) == 6
    assert len(sandbox.requests) == 1
    listed += sandbox.requests.find(method="GET", path="/jobs$")
    assert len(listed) == (2 if api == "public" else 0)
    # As the API's own description has a list: a key for each.
    assert all(f"workspaceIds={first}&workspaceIds={second}" in request.query for request in listed)


def _began(job: Any) -> str:
    return str(job.reply()["startTime"])


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
