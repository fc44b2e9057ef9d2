"""Cancel means cancel: whenever it comes, the vendor's job is stopped, and only ours."""

from __future__ import annotations

import asyncio
import logging

import anyio
import pytest
from prefect import flow, task

from tasks.jobs import JobPolicy, JobResult, JobState, cancel_job, wait_for_job
from tests.jobs_fixtures import Desk, collected, desk, until

__all__ = ["collected", "desk"]


async def _cancel(run: asyncio.Task[JobResult]) -> None:
    run.cancel()
    with pytest.raises(asyncio.CancelledError):
        await run


async def test_while_waiting(desk: Desk, caplog: pytest.LogCaptureFixture) -> None:
    """Cancelled in mid-wait, the job is cancelled at the vendor and the journal knows it."""
    desk.behave(duration=300)
    run = desk.begin()
    await desk.until_started()
    with caplog.at_level(logging.WARNING, "elt.jobs"):
        await _cancel(run)
    assert (desk.words, desk.cancels) == (["cancelled"], 1)
    assert desk.entry.result
    assert desk.entry.result.state is JobState.CANCELLED
    assert f"cancelled: job {desk.jobs[0]}: it was cancelled" in caplog.text


async def test_not_confirmed(desk: Desk) -> None:
    """What may go on stays open in the journal, for the cancellation hook and for a retry of the run."""
    desk.behave(duration=300)
    run = desk.begin()
    await desk.until_started()
    refused = desk.fault(kind="status", status=403, method="DELETE")
    await _cancel(run)
    assert desk.entry.open
    assert desk.words != ["cancelled"]
    desk.sandbox.faults.remove(refused)
    retry = desk.begin()
    await until(lambda: desk.looks > 2)
    await _cancel(retry)
    assert (desk.words, desk.entry.open) == (["cancelled"], False)


async def test_while_starting(desk: Desk) -> None:
    """Cancelled while the start is under way, the job that comes of it is cancelled."""
    desk.behave(duration=300)
    desk.fault(kind="delay", delay=0.5, method="POST", path="/jobs")
    run = desk.begin()
    await until(lambda: desk.posts > 0)
    await _cancel(run)
    assert desk.words == ["cancelled"]
    assert not desk.entry.open


async def test_while_starting_and_the_reply_is_lost(desk: Desk) -> None:
    """Cancelled while the start is under way, and its reply is lost: the job is found and cancelled."""
    desk.behave(duration=300)
    desk.fault(kind="drop_after", delay=0.4, method="POST", path="/jobs")
    run = desk.begin()
    await until(lambda: desk.posts > 0)
    await _cancel(run)
    assert desk.words == ["cancelled"]


async def test_while_finding(desk: Desk) -> None:
    """Cancelled while a lost start is looked for, the job is found with a last look and cancelled."""
    desk.behave(duration=30, visibility_delay=30)
    desk.fault(kind="drop_after", method="POST", path="/jobs")
    run = desk.begin()
    await until(lambda: desk.asked("/jobs$"))
    desk.sandbox.airbyte.jobs_of(desk.connection_id)[0].hidden_until = 0
    await _cancel(run)
    assert desk.words == ["cancelled"]
    assert not desk.entry.open


async def test_while_nobody_knows(desk: Desk) -> None:
    """Cancelled when nothing can be learnt, the intent stays open for the hook and the next attempt."""
    desk.behave(duration=1.0)
    desk.fault(kind="drop_after", method="POST", path="/jobs")
    listing = desk.fault(kind="drop", method="GET", path="/jobs$")
    run = desk.begin()
    await until(lambda: desk.asked("/jobs$"))
    await _cancel(run)
    assert desk.entry.open
    assert desk.entry.handle is None
    desk.sandbox.faults.remove(listing)
    assert (await desk.run()).job_id == desk.jobs[0]
    assert len(desk.jobs) == 1


async def test_while_queued(desk: Desk) -> None:
    """Cancelled while waiting for somebody else's job, that job is not ours to cancel, and nothing starts."""
    desk.behave(duration=300)
    other = desk.start_by_hand()
    run = desk.begin()
    await until(lambda: desk.asked(f"/jobs/{other}$"))
    await _cancel(run)
    assert (desk.jobs, desk.cancels) == ([other], 0)
    assert not desk.entry.open, "else a hook would look for a job of ours, and might find another's"


async def test_while_the_vendor_is_away(desk: Desk) -> None:
    """A cancellation that meets a failing API is tried again."""
    desk.behave(duration=300)
    run = desk.begin()
    await desk.until_started()
    desk.fault(kind="status", status=503, method="DELETE", times=1)
    await _cancel(run)
    assert desk.words == ["cancelled"]


async def test_two_who_wait_for_one_job(desk: Desk) -> None:
    """Cancelling one who waits for a job of somebody else's disturbs neither the job nor another waiter."""
    desk.behave(duration=300)
    other = desk.start_by_hand()
    async with desk.vendor.session():
        handle, request, _ = await desk.vendor.look_up(other)
    looks = desk.looks
    waits = [
        asyncio.create_task(wait_for_job(desk.vendor, request, handle, JobPolicy(poll=0.1))) for _ in range(3)
    ]
    await until(lambda: desk.looks > looks)
    await _cancel(waits[0])
    desk.sandbox.airbyte.finish_job(int(other), "succeeded")
    results = await asyncio.gather(*waits[1:])
    assert [result.state for result in results] == [JobState.SUCCEEDED] * 2
    assert desk.cancels == 0


async def test_cancelling_what_has_ended(desk: Desk) -> None:
    """A job that has ended is not cancelled, nor is what its connection runs by now; and that is said."""
    first = desk.start_by_hand()
    await until(lambda: desk.words == ["succeeded"])
    desk.behave(duration=300)
    desk.start_by_hand()
    async with desk.vendor.session():
        handle, _, _ = await desk.vendor.look_up(first)
        assert (await cancel_job(desk.vendor, handle)).words == "it had ended already: succeeded"
    assert desk.words[0] == "succeeded"
    assert desk.words[1] != "cancelled"
    assert desk.cancels == 0


async def test_by_anyio(desk: Desk) -> None:
    """A cancel scope of anyio's cancels every await again; the job is cancelled all the same."""
    desk.behave(duration=300)

    async def cancel(scope: anyio.CancelScope) -> None:
        await desk.until_started()
        scope.cancel()

    with anyio.CancelScope() as scope:
        cancelling = asyncio.create_task(cancel(scope))
        await desk.run()
    await cancelling
    assert scope.cancelled_caught
    assert desk.words == ["cancelled"]
    assert not desk.entry.open


@pytest.mark.usefixtures("collected")
@pytest.mark.filterwarnings("ignore:Exception ignored in. <socket:pytest.PytestUnraisableExceptionWarning")
async def test_by_a_tasks_timeout(desk: Desk) -> None:
    """A Prefect task that runs into its own `timeout_seconds` leaves no job behind."""
    desk.behave(duration=300)

    @task(timeout_seconds=4)
    async def sync() -> JobResult:
        return await desk.run()

    @flow
    async def short_of_time() -> None:
        await sync()

    with pytest.raises(TimeoutError):
        await short_of_time()
    assert desk.words == ["cancelled"]


async def test_nothing_is_left_on_the_loop(desk: Desk) -> None:
    """A cancelled wait leaves no task behind that the closing of the loop would have to destroy."""
    desk.behave(duration=300)
    run = desk.begin(poll=20)
    await desk.until_started()
    await _cancel(run)
    await until(lambda: asyncio.all_tasks() == {asyncio.current_task()})
