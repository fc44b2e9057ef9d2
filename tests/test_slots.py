"""Concurrency limits of an account: so many jobs at a time, over all flow runs, processes and crashes."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from uuid import UUID, uuid4

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitUpdate

from flows import RunFailed, sync_connections
from tasks.airbyte import AirbyteSync, airbyte_sync
from tasks.jobs import InputError, JobFailed, JobPolicy, JobResult, JobState, JobTimeout, read_entries, slots
from tests.crash_flows import killed, one_sync, run_again
from tests.jobs_fixtures import PREFECTS_SOCKETS, Desk, collected, desk, until

__all__ = ["collected", "desk"]

pytestmark = PREFECTS_SOCKETS


class Limit:
    """A limit on the server, for one test."""

    def __init__(self, name: str) -> None:
        self.name = name

    async def taken(self) -> int:
        async with get_client() as client:
            return (await client.read_global_concurrency_limit_by_name(self.name)).active_slots

    async def set(self, limit: int) -> None:
        async with get_client() as client:
            await client.upsert_global_concurrency_limit_by_name(name=self.name, limit=limit)


@pytest.fixture
async def limit(prefect_server: str) -> AsyncIterator[Limit]:
    made = Limit(f"airbyte-{uuid4().hex[:8]}")
    await made.set(1)
    yield made
    async with get_client() as client:
        await client.delete_global_concurrency_limit_by_name(made.name)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Asks for a slot, and renews it, more often than the server would have it."""
    monkeypatch.setattr(slots, "_LONGEST_WAIT", 0.2)
    monkeypatch.setattr(slots, "_RENEW", 0.2)
    return


def most_at_once(desk: Desk, *connections: str) -> int:
    """How many of these connections' jobs have run at the same time at the vendor."""
    moments: list[tuple[float, int]] = []
    for connection in connections:
        for job in desk.sandbox.airbyte.jobs_of(connection):
            _, ended, _ = job.timeline.at()
            moments += [(job.timeline.started, 1), (ended, -1)]
    running, most = 0, 0
    for _, change in sorted(moments):
        running += change
        most = max(most, running)
    return most


async def test_two_processes(desk: Desk, limit: Limit) -> None:
    """Two flow runs in two processes on a limit of one: both end well, and never two jobs run at once."""
    connections = [desk.connection_id, *desk.sandbox.airbyte.add_connections(1, prefix="other", duration=2)]
    desk.behave(duration=2)
    await desk.vendor._server.save("crash", overwrite=True)  # type: ignore[misc]  # async in an async context
    runs: list[UUID] = []
    async with get_client() as client:
        for connection in connections:
            parameters = {"server": "crash", "connection_id": connection, "limit": limit.name}
            runs.append((await client.create_flow_run(one_sync, parameters=parameters)).id)
    script = Path(__file__).with_name("crash_flows.py")
    started = [
        await asyncio.create_subprocess_exec(
            sys.executable,
            str(script),
            str(run),
            cwd=script.parent.parent,
            env={**os.environ, "PYTHONPATH": "."},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for run in runs
    ]
    try:
        async with asyncio.timeout(240):
            assert [await process.wait() for process in started] == [0, 0]
    finally:
        for process in started:
            if process.returncode is None:
                process.kill()
    for connection in connections:
        assert [job.status for job in desk.sandbox.airbyte.jobs_of(connection)] == ["succeeded"]
    assert most_at_once(desk, *connections) == 1
    assert await limit.taken() == 0


@pytest.mark.usefixtures("quick")
async def test_as_many_as_the_limit_allows(desk: Desk, limit: Limit) -> None:
    """Of ten jobs in one run three run at a time, and every slot is given back."""
    await limit.set(3)
    connections = desk.sandbox.airbyte.add_connections(10, prefix="many", duration=0.3)
    policy = JobPolicy(poll=0.05, timeout=60, concurrency_limit=limit.name)
    syncs = [
        AirbyteSync(server=desk.vendor._server, connection_id=connection, policy=policy)
        for connection in connections
    ]

    @flow
    async def many() -> list[JobResult]:
        return await asyncio.gather(*(airbyte_sync(sync) for sync in syncs))

    results = await many()  # type: ignore[misc]  # Prefect's types of an async flow
    assert {result.state for result in results} == {JobState.SUCCEEDED}
    assert 1 < most_at_once(desk, *connections) <= 3
    assert await limit.taken() == 0


async def test_a_crash_keeps_the_slot_for_its_next_attempt(desk: Desk, limit: Limit) -> None:
    """SIGKILL in mid-sync: the slot stays taken, the next attempt goes on with it and gives it back."""
    desk.behave(duration=60)
    async with killed(desk, limit=limit.name) as run, asyncio.timeout(60):
        while desk.posts < 1 or not any(e.handle for e in await read_entries(run)):  # noqa: ASYNC110 - of a process
            await asyncio.sleep(0.1)
    assert await limit.taken() == 1
    other = desk.sandbox.airbyte.add_connections(1, prefix="other", duration=0.1)[0]

    @flow
    async def waits() -> JobResult:
        policy = JobPolicy(poll=0.1, timeout=60, concurrency_limit=limit.name)
        return await airbyte_sync(AirbyteSync(server=desk.vendor._server, connection_id=other, policy=policy))

    waiting = asyncio.create_task(waits())  # type: ignore[arg-type]  # Prefect's types of an async flow
    again = asyncio.create_task(run_again(run))
    (job,) = desk.sandbox.airbyte.jobs_of(desk.connection_id)
    seen = len(desk.sandbox.requests.find(method="GET", path=rf"/jobs/{job.job_id}$"))
    await until(
        lambda: len(desk.sandbox.requests.find(method="GET", path=rf"/jobs/{job.job_id}$")) > seen + 2
    )
    assert desk.sandbox.airbyte.jobs_of(other) == []  # it is watched again, and its slot is its own
    assert await limit.taken() == 1
    job.timeline.finish("succeeded")
    assert (await again).job_id == str(job.job_id)
    result = await waiting
    assert result.state is JobState.SUCCEEDED
    assert most_at_once(desk, desk.connection_id, other) == 1
    assert await limit.taken() == 0


async def test_a_slot_whose_lease_has_ended(desk: Desk, limit: Limit) -> None:
    """What the server has taken back the next attempt does not wait for: it watches, and takes another."""
    desk.behave(duration=60)
    async with killed(desk, limit=limit.name) as run, asyncio.timeout(60):
        while desk.posts < 1 or not any(e.handle for e in await read_entries(run)):  # noqa: ASYNC110 - of a process
            await asyncio.sleep(0.1)
    (entry,) = await read_entries(run)
    assert entry.lease is not None
    async with get_client() as client:
        await client.release_concurrency_slots_with_lease(entry.lease)
    assert await limit.taken() == 0
    again = asyncio.create_task(run_again(run))
    async with asyncio.timeout(60):
        while await limit.taken() == 0:  # noqa: ASYNC110 - of a server
            await asyncio.sleep(0.1)
    desk.sandbox.airbyte.jobs_of(desk.connection_id)[0].timeline.finish("succeeded")
    assert (await again).state is JobState.SUCCEEDED
    assert len(desk.jobs) == 1
    assert await limit.taken() == 0


@pytest.mark.usefixtures("quick")
async def test_ends_of_all_kinds_give_it_back(desk: Desk, limit: Limit) -> None:
    """A failed, a refused and a cancelled job leave no slot taken."""
    desk.behave(outcome="fail")
    with pytest.raises(JobFailed):
        await desk.run(concurrency_limit=limit.name)
    assert await limit.taken() == 0
    desk.behave(outcome="succeed", duration=60)
    desk.start_by_hand()
    with pytest.raises(JobFailed, match="the policy says fail"):
        await desk.run(concurrency_limit=limit.name, on_active="fail")
    assert await limit.taken() == 0


@pytest.mark.usefixtures("quick")
async def test_none_becomes_free(desk: Desk, limit: Limit) -> None:
    """After the policy's timeout it is said what was waited for, and nothing was started."""
    async with get_client() as client:
        reply = await client.increment_concurrency_slots_with_lease([limit.name], 1, "concurrency", 60.0)
        with pytest.raises(JobTimeout, match=rf"no slot of the concurrency limit {limit.name} became free"):
            await desk.run(concurrency_limit=limit.name, timeout=1.0)
        assert (desk.posts, desk.journal.entries) == (0, {})
        await client.release_concurrency_slots_with_lease(UUID(reply.json()["lease_id"]))
    assert (await desk.run(concurrency_limit=limit.name)).state is JobState.SUCCEEDED


async def test_a_cancelled_wait_leaves_nothing(desk: Desk, limit: Limit) -> None:
    """Cancelled while it waits for a slot: none is taken afterwards, and nothing was started."""
    async with get_client() as client:
        reply = await client.increment_concurrency_slots_with_lease([limit.name], 1, "concurrency", 60.0)
        waiting = desk.begin(concurrency_limit=limit.name)
        await asyncio.sleep(0.5)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        await client.release_concurrency_slots_with_lease(UUID(reply.json()["lease_id"]))
    assert (desk.posts, await limit.taken()) == (0, 0)


async def test_no_such_limit(desk: Desk, limit: Limit) -> None:
    """A limit that nobody has made, or of 0, is an error before anything is started, with what to do."""
    with pytest.raises(InputError, match=r"no concurrency limit 'nowhere'.*make deploy"):
        await desk.run(concurrency_limit="nowhere")
    await limit.set(0)
    with pytest.raises(InputError, match=r"is 0: no job can run"):
        await desk.run(concurrency_limit=limit.name)
    assert desk.posts == 0


def test_a_flow_looks_before_it_starts(desk: Desk) -> None:
    """With one sync that names a limit which is not there, none of the syncs is started."""
    other = desk.sandbox.airbyte.add_connections(1, prefix="other", duration=0.1)[0]
    server = desk.vendor._server
    syncs = [
        AirbyteSync(server=server, connection_id=other),
        AirbyteSync(
            server=server, connection_id=desk.connection_id, policy=JobPolicy(concurrency_limit="nowhere")
        ),
    ]
    with pytest.raises((InputError, RunFailed), match="no concurrency limit 'nowhere'"):
        sync_connections(syncs)
    assert desk.posts == 0


async def test_a_limit_that_is_switched_off(desk: Desk, limit: Limit) -> None:
    """One that an operator has switched off bounds nothing."""
    async with get_client() as client:
        off = GlobalConcurrencyLimitUpdate(active=False)
        await client.update_global_concurrency_limit(limit.name, off)
    assert (await desk.run(concurrency_limit=limit.name)).state is JobState.SUCCEEDED
    assert await limit.taken() == 0
