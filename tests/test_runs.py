"""Flow runs that crash, are retried and call twice: the vendor counts the starts."""

from __future__ import annotations

import asyncio

import pytest
from prefect import flow

from tasks.airbyte import AirbyteSync, AirbyteVendor, airbyte_clear, airbyte_sync
from tasks.jobs import JobFailed, JobPolicy, JobResult, JobState, read_entries, run_job
from tests.crash_flows import killed, run_again
from tests.jobs_fixtures import PREFECTS_SOCKETS, Desk, collected, desk, until

__all__ = ["collected", "desk"]

pytestmark = PREFECTS_SOCKETS


@pytest.fixture
def sync(desk: Desk) -> AirbyteSync:
    return AirbyteSync(
        server=desk.vendor._server,
        connection_id=desk.connection_id,
        policy=JobPolicy(poll=0.05, timeout=60),
    )


# -- killed


async def test_killed_in_mid_sync(desk: Desk) -> None:
    """SIGKILL in mid-sync, the same run again: it attaches to its job; one start at the vendor."""
    desk.behave(duration=12)
    async with killed(desk) as run, asyncio.timeout(60):
        while not any(entry.handle for entry in await read_entries(run)):  # noqa: ASYNC110 - of a process
            await asyncio.sleep(0.1)
    assert desk.words[0] in ("pending", "running")
    desk.sandbox.airbyte.jobs_of(desk.connection_id)[0].timeline.finish("succeeded")
    result = await run_again(run)
    assert result.state is JobState.SUCCEEDED
    assert desk.jobs == [result.job_id]
    assert desk.posts == 1


async def test_killed_while_the_vendor_thinks(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGKILL while the start is under way: the job that came of it is found, and no other is started."""
    desk.behave(duration=1)
    desk.fault(kind="delay", delay=10.0, method="POST", path="/jobs$")
    async with killed(desk) as run:
        await until(lambda: desk.posts > 0)
    assert desk.jobs == []
    monkeypatch.setattr(AirbyteVendor, "grace", 30.0)
    result = await run_again(run)
    assert desk.jobs == [result.job_id]
    assert desk.posts == 1


async def test_killed_while_looking_for_a_lost_start(desk: Desk) -> None:
    """SIGKILL between the intent and the job's id: the next attempt finds the job."""
    desk.behave(duration=1)
    desk.fault(kind="drop_after", method="POST", path="/jobs$")
    listing = desk.fault(kind="drop", method="GET", path="/jobs$")
    async with killed(desk) as run:
        await until(lambda: desk.asked("/jobs$"))
    (entry,) = await read_entries(run)
    assert (entry.open, entry.handle) == (True, None)
    desk.sandbox.faults.remove(listing)
    result = await run_again(run)
    assert desk.jobs == [result.job_id]
    assert desk.posts == 1


# -- retried


async def test_a_flow_that_retries(desk: Desk, sync: AirbyteSync) -> None:
    """A flow with `retries` whose sync succeeded and whose next step failed does not sync again."""
    attempts: list[JobResult] = []

    @flow(retries=1)
    async def chain() -> None:
        attempts.append(await airbyte_sync(sync))
        if len(attempts) == 1:
            raise ValueError("the next step")

    await chain()
    assert attempts[0] == attempts[1]
    assert len(desk.jobs) == 1


async def test_a_flow_that_retries_two_syncs_of_one_connection(desk: Desk, sync: AirbyteSync) -> None:
    """Of two syncs of a connection in one run, the retry repeats the one that failed, and only that."""
    desk.behave(duration=0.1)
    seen: list[str | None] = []

    @flow(retries=1)
    async def twice() -> None:
        seen.append((await airbyte_sync(sync)).job_id)
        if len(desk.jobs) == 1:
            desk.behave(outcome="fail", times=1)
        seen.append((await airbyte_sync(sync)).job_id)

    await twice()
    assert desk.words == ["succeeded", "failed", "succeeded"]
    assert seen == [desk.jobs[0], desk.jobs[0], desk.jobs[2]]


async def test_a_task_that_retries(desk: Desk, sync: AirbyteSync) -> None:
    """A task with `retries` whose wait broke off attaches to its job."""
    desk.behave(duration=1.5)
    policy = sync.policy.model_copy(update={"outage": 0.0})

    @flow
    async def chain() -> JobResult:
        return await airbyte_sync.with_options(retries=2)(sync.model_copy(update={"policy": policy}))

    run = asyncio.create_task(chain())
    await until(lambda: desk.asked(r"/jobs/\d+"))
    desk.fault(kind="status", status=503, path=r"/jobs/\d+", times=1)
    result = await run
    assert desk.jobs == [result.job_id]


async def test_two_calls_are_two_jobs(desk: Desk, sync: AirbyteSync) -> None:
    """Whoever syncs a connection twice in one run gets two jobs, also when a reply is lost in between."""
    desk.behave(duration=0.1)

    @flow
    async def twice() -> list[JobResult]:
        first = await airbyte_sync(sync)
        # Not even sent, and the first job is seconds old: it must not pass for the second.
        desk.fault(kind="drop", method="POST", path="/jobs$", times=1)
        return [first, await airbyte_sync(sync)]

    results = await twice()
    assert [result.job_id for result in results] == desk.jobs
    assert len(desk.jobs) == 2


def test_two_calls_in_threads_are_two_jobs(desk: Desk, sync: AirbyteSync) -> None:
    """The same under Prefect's own task runner, where every task has an event loop of its own."""
    desk.behave(duration=0.1)

    @flow
    def twice() -> list[JobResult]:
        return [airbyte_sync.submit(sync).result(), airbyte_sync.submit(sync).result()]

    assert [result.job_id for result in twice()] == desk.jobs
    assert len(desk.jobs) == 2


async def test_calls_without_a_task_are_jobs_of_their_own(desk: Desk) -> None:
    """The engine may be called from a flow directly, more than once."""
    desk.behave(duration=0.1)

    @flow
    async def bare() -> None:
        for _ in range(2):
            await run_job(desk.vendor, desk.request, JobPolicy(poll=0.05))

    await bare()
    assert len(desk.jobs) == 2


async def test_a_clear_is_not_a_sync(desk: Desk, sync: AirbyteSync) -> None:
    """A clear and a sync of a connection in one run are told apart; `min_rows` is the sync's."""
    desk.behave(duration=0.1)
    strict = sync.model_copy(update={"policy": JobPolicy(poll=0.05, min_rows=1)})

    @flow
    async def anew() -> list[JobResult]:
        return [await airbyte_clear(strict), await airbyte_sync(strict)]

    results = await anew()
    assert [(result.rows, result.job_id) for result in results] == [(0, desk.jobs[0]), (1000, desk.jobs[1])]


@pytest.mark.filterwarnings("ignore:.*without a flow run id:UserWarning")  # Prefect's, on every line it logs
async def test_a_task_outside_of_a_flow(desk: Desk, sync: AirbyteSync) -> None:
    """A task that is called without a flow keeps its journal under its own run, and retries attach."""
    desk.behave(duration=0.1, outcome="fail", times=1)
    result = await airbyte_sync.with_options(retries=1)(sync)
    assert desk.words == ["failed", "succeeded"]
    assert result.job_id == desk.jobs[1]


async def test_a_failure_carries_its_result(desk: Desk, sync: AirbyteSync) -> None:
    """The state of a failed task has the exception with the result in it, for a fan-out to go on with."""
    desk.behave(outcome="fail")

    @flow
    async def told() -> JobResult:
        state = await airbyte_sync(sync, return_state=True)
        with pytest.raises(JobFailed) as caught:
            await state.aresult()
        return caught.value.result

    result = await told()
    assert (result.job_id, result.state) == (desk.jobs[0], JobState.FAILED)
    assert "The source refused the connection" in str(result.message)
