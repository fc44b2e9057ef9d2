"""A clear before the sync: strictly before it, and each of the two once, whatever happens in between."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from prefect import flow
from pydantic import ValidationError

from blocks import AirbyteServer
from blocks.http import NotFoundError
from sandbox import Sandbox
from tasks.airbyte import (
    AirbyteSync,
    airbyte_clear,
    airbyte_refresh,
    airbyte_status,
    airbyte_sync,
    airbyte_wait,
)
from tasks.airbyte_jobs import AirbyteVendor
from tasks.jobs import InputError, JobFailed, JobPolicy, JobState, read_entries
from tests.crash_flows import killed, run_again
from tests.jobs_fixtures import PREFECTS_SOCKETS, Desk, collected, desk, until

__all__ = ["collected", "desk"]

pytestmark = [
    *PREFECTS_SOCKETS,
    # Prefect's, on every line that a task outside of a flow logs.
    pytest.mark.filterwarnings("ignore:.*without a flow run id:UserWarning"),
]
QUICK = JobPolicy(poll=0.05, timeout=60)


def sync_of(desk: Desk, **fields: Any) -> AirbyteSync:
    settings = {"server": desk.vendor._server, "connection_id": desk.connection_id, "policy": QUICK}
    return AirbyteSync(**settings | fields)


def types(desk: Desk) -> list[str]:
    return [job.job_type for job in desk.sandbox.airbyte.jobs_of(desk.connection_id)]


# -- clear or reset, and then sync


@pytest.mark.parametrize("before", ["clear", "reset"])
@pytest.mark.parametrize("api", ["public", "config"])
async def test_cleared_and_then_synced(desk: Desk, sandbox: Sandbox, before: str, api: str) -> None:
    """The clear has ended before the sync starts, and the result is the sync's."""
    server = desk.vendor._server.model_copy(update={"base_url": getattr(sandbox, f"{_URLS[api]}")})
    desk.behave(duration=0.3)
    result = await airbyte_sync(sync_of(desk, server=server, before=before))
    first, second = sandbox.airbyte.jobs_of(desk.connection_id)
    assert types(desk) == [before, "sync"]
    assert second.timeline.started >= first.timeline.at()[1]
    assert (result.job_id, result.rows) == (str(second.job_id), 1000)


@pytest.mark.parametrize("before", ["clear", "reset"])
async def test_only_some_streams_are_cleared(desk: Desk, before: str) -> None:
    """Over the Config API, whichever is used otherwise; then all of the connection is synced."""
    desk.behave(duration=0.2)
    await airbyte_sync(sync_of(desk, before=before, streams=["synthetic-0006"]))
    assert types(desk) == [before, "sync"]
    (sent,) = desk.sandbox.requests.find(path=f"/connections/{before}/stream$")
    assert sent.body["streams"] == [{"streamName": "synthetic-0006"}]


async def test_streams_that_can_not_be_cleared(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not there, or in Airbyte Cloud, is refused before anything is started."""
    with pytest.raises(InputError, match=r"has no stream orders\. It has: synthetic-0006"):
        await airbyte_sync(sync_of(desk, before="clear", streams=["orders"]))
    with pytest.raises(ValidationError, match="set `before`"):
        sync_of(desk, streams=["synthetic-0006"])
    monkeypatch.setattr("blocks.airbyte_client.AirbyteClient.config", None)
    with pytest.raises(InputError, match="no API for a clear of single streams"):
        await airbyte_sync(sync_of(desk, before="clear", streams=["synthetic-0006"]))
    assert desk.jobs == []


_URLS = {"public": "airbyte_url", "config": "airbyte_config_url"}


async def test_min_rows_is_the_syncs(desk: Desk) -> None:
    """That a clear moves no rows is no reason to fail it."""
    policy = QUICK.model_copy(update={"min_rows": 1000})
    assert (await airbyte_sync(sync_of(desk, before="clear", policy=policy))).rows == 1000


# -- a sync that is running, which Airbyte would cancel for a clear


def on(desk: Desk, sandbox: Sandbox, api: str) -> AirbyteServer:
    return desk.vendor._server.model_copy(update={"base_url": getattr(sandbox, _URLS[api])})


@pytest.mark.parametrize("on_active", ["queue", "adopt"])
@pytest.mark.parametrize("before", ["clear", "reset"])
@pytest.mark.parametrize("api", ["public", "config"])
async def test_a_clear_waits_for_a_running_sync(
    desk: Desk, sandbox: Sandbox, api: str, before: str, on_active: str
) -> None:
    """The sync that runs is left to its end; then it is cleared, and synced."""
    desk.behave(duration=0.6)
    theirs = desk.start_by_hand()
    policy = QUICK.model_copy(update={"on_active": on_active})
    result = await airbyte_sync(sync_of(desk, server=on(desk, sandbox, api), before=before, policy=policy))
    assert types(desk) == ["sync", before, "sync"]
    assert desk.words == ["succeeded"] * 3
    assert (desk.jobs[0], desk.jobs[2]) == (theirs, result.job_id)


@pytest.mark.parametrize("on_active", ["skip", "fail"])
@pytest.mark.parametrize("api", ["public", "config"])
async def test_no_clear_over_a_running_sync(desk: Desk, sandbox: Sandbox, api: str, on_active: str) -> None:
    """Under skip and fail neither the clear nor the sync is started, and the one that runs goes on."""
    desk.behave(outcome="stuck")
    theirs = desk.start_by_hand()
    sync = sync_of(
        desk,
        server=on(desk, sandbox, api),
        before="clear",
        policy=QUICK.model_copy(update={"on_active": on_active}),
    )
    for run in (airbyte_sync(sync), airbyte_clear(sync)):
        if on_active == "skip":
            assert (await run).state is JobState.SKIPPED
        else:
            with pytest.raises(JobFailed, match=f"job {theirs} is running already, and the policy says fail"):
                await run
    assert desk.jobs == [theirs]
    assert desk.words != ["cancelled"]


async def test_no_clear_over_a_clear(desk: Desk) -> None:
    """A clear of somebody else's may be of other streams: it is waited for, not taken for ours."""
    desk.behave(duration=300)
    theirs = desk.start_by_hand("clear")
    desk.behave(duration=0.2)
    adopting = QUICK.model_copy(update={"on_active": "adopt"})
    waiting = asyncio.ensure_future(airbyte_clear(sync_of(desk, policy=adopting)))
    await until(lambda: bool(desk.sandbox.requests.count(path=f"/jobs/{theirs}$")))
    desk.end_first()
    result = await waiting
    assert desk.jobs == [theirs, result.job_id]
    assert desk.words == ["succeeded"] * 2


@pytest.mark.parametrize("theirs", ["clear", "refresh"])
async def test_no_clear_over_what_an_old_server_hides(desk: Desk, theirs: str) -> None:
    """A server before 2026-02 lists neither by itself; a clear that did not ask would cancel it."""
    desk.sandbox.airbyte.settings.age = "2025"
    desk.behave(outcome="stuck" if theirs == "refresh" else "succeed", duration=30)
    running = desk.start_by_hand(theirs)
    policy = QUICK.model_copy(update={"on_active": "fail"})
    with pytest.raises(JobFailed, match=f"job {running} is running already"):
        await airbyte_clear(sync_of(desk, policy=policy))
    with pytest.raises(JobFailed, match=f"job {running} is running already"):
        await airbyte_sync(sync_of(desk, policy=policy))
    assert desk.jobs == [running]
    assert desk.words != ["cancelled"]


@pytest.mark.parametrize("operation", ["clear", "reset", "refresh"])
async def test_a_lost_start_that_an_old_server_hides(desk: Desk, operation: str) -> None:
    """The job of a start whose reply was lost is found by its kind, and not started a second time."""
    desk.sandbox.airbyte.settings.age = "2025"
    desk.behave(duration=0.4)
    desk.fault(kind="drop_after", method="POST", path="/(jobs|connections/refresh)$", times=1)
    result = await desk.run(operation=operation)
    assert desk.jobs == [result.job_id]
    assert types(desk) == [operation]


async def test_a_reset_of_a_server_without_clears(desk: Desk) -> None:
    """A server that takes the newer kinds for nonsense has none of them running: it is reset all the same."""
    desk.sandbox.airbyte.settings.age = "2023"
    desk.fault(kind="drop_after", method="POST", path="/jobs$", times=1)
    result = await desk.run(operation="reset")
    assert desk.jobs == [result.job_id]


async def test_no_sync_after_a_clear_that_failed(desk: Desk) -> None:
    """A clear that does not succeed is told as such, and no sync is started on what is left."""
    desk.behave(duration=5)
    running = asyncio.ensure_future(airbyte_sync(sync_of(desk, before="clear")))
    await until(lambda: len(desk.jobs) == 1)
    desk.sandbox.airbyte.finish_job(int(desk.jobs[0]), "failed")
    with pytest.raises(JobFailed, match="clear synthetic"):
        await running
    assert types(desk) == ["clear"]


async def test_a_retry_after_a_failed_sync_does_not_clear_again(desk: Desk) -> None:
    """The sync failed and the run is tried again: it is started again, and the clear is not."""
    desk.behave(outcome="fail", times=1, duration=0.1)

    @flow(retries=1, retry_delay_seconds=0)
    async def nightly() -> Any:
        return await airbyte_sync(sync_of(desk, before="clear"))

    result = await nightly()
    assert result.state is JobState.SUCCEEDED
    assert types(desk) == ["clear", "sync", "sync"]


@pytest.mark.parametrize("moment", ["while it clears", "before the sync", "while the sync is asked for"])
async def test_killed_between(desk: Desk, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    """SIGKILL anywhere from the clear to the sync, and the run again: one clear, then one sync."""
    desk.behave(duration=10 if moment == "while it clears" else 0.5)
    if moment == "before the sync":  # the request never arrives, and no answer tells so
        desk.fault(kind="drop", method="POST", path="/jobs$", after=1)
        desk.fault(kind="drop", method="GET", path="/jobs$", after=3)  # the look before the clear
    if moment == "while the sync is asked for":  # it arrives, and its sender is gone before the answer
        desk.fault(kind="delay", delay=10.0, method="POST", path="/jobs$", after=1)
    wanted = 1 if moment == "while it clears" else 2
    async with killed(desk, before="clear") as run, asyncio.timeout(60):
        while desk.posts < wanted or not any(e.handle for e in await read_entries(run)):  # noqa: ASYNC110 - of a process
            await asyncio.sleep(0.1)
        assert types(desk) == ["clear"]
    desk.sandbox.faults.clear()
    if moment == "while it clears":
        desk.sandbox.airbyte.jobs_of(desk.connection_id)[0].timeline.finish("succeeded")
        desk.behave(duration=0.5)
    monkeypatch.setattr(AirbyteVendor, "grace", 30.0 if moment == "while the sync is asked for" else 3.0)
    result = await run_again(run)
    assert result.state is JobState.SUCCEEDED
    assert types(desk) == ["clear", "sync"]
    assert result.job_id == desk.jobs[1]


# -- refresh, and jobs of anybody


@pytest.mark.parametrize("mode", ["Merge", "Truncate"])
async def test_refresh(desk: Desk, mode: Any) -> None:
    """A refresh loads the streams that are named, or all of them, and waits for the end of it."""
    desk.behave(duration=0.2)
    result = await airbyte_refresh(sync_of(desk), mode=mode, streams=["synthetic-0006"])
    assert (result.state, result.rows, types(desk)) == (JobState.SUCCEEDED, 1000, ["refresh"])
    assert result.name == "refresh synthetic-0006"
    (sent,) = desk.sandbox.requests.find(path="/connections/refresh$")
    assert sent.body["refreshMode"] == mode
    assert sent.body["streams"] == [{"streamName": "synthetic-0006"}]


async def test_refresh_of_what_is_not_there(desk: Desk, sandbox: Sandbox) -> None:
    """An unknown stream, or a server without the API for it, is refused before anything is started."""
    with pytest.raises(
        InputError, match=r"has no stream orders\. It has: synthetic-0006\. Nothing was started"
    ):
        await airbyte_refresh(sync_of(desk), streams=["orders"])
    sandbox.airbyte.settings.apis = "public"
    with pytest.raises(NotFoundError, match="too old to know refresh"):
        await airbyte_refresh(sync_of(desk))
    assert desk.jobs == []


async def test_anybodys_job_over_the_config_api(desk: Desk, sandbox: Sandbox) -> None:
    """The tasks for jobs of anybody work over the Config API as over the public one."""
    server = AirbyteServer(
        base_url=sandbox.airbyte_config_url,
        client_id=desk.vendor._server.client_id,
        client_secret=desk.vendor._server.client_secret,
    )
    desk.behave(duration=60)
    job = desk.start_by_hand("refresh")
    assert not (await airbyte_status(server, job)).state.terminal
    await until(lambda: desk.words == ["running"])  # ended before, it would have no attempt
    desk.end_first()
    waited = await airbyte_wait(server, job, QUICK)
    assert (waited.rows, waited.name, waited.attempts) == (1000, "synthetic-0006", 1)
    assert [stream.name for stream in waited.streams] == ["synthetic-0006"]
    told = await airbyte_status(server, job)
    assert (told.state, told.streams) == (JobState.SUCCEEDED, waited.streams)
