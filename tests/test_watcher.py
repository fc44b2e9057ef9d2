"""Many jobs, few requests: one loop looks at all jobs of an account."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from datetime import UTC, datetime
from typing import Any

import pytest

from blocks.http import NotFoundError, VendorError, VendorUnavailable
from sandbox import Sandbox
from tasks.airbyte_jobs import AirbyteVendor
from tasks.jobs import JobHandle, JobPolicy, JobState, JobStatus, JobWatcher, watcher_for
from tests.jobs_fixtures import Desk, desk, until

__all__ = ["desk"]

DONE = JobStatus(state=JobState.SUCCEEDED, word="done")
BUSY = JobStatus(state=JobState.RUNNING, word="busy")


class Ledger:
    """A vendor whose jobs are what this test says, and which counts how often it is asked."""

    name = "ledger"
    account = "ledger"
    block = None
    on_partial = "fail"
    grace = 0.2

    def __init__(self) -> None:
        self.jobs: dict[str, JobStatus | Exception] = {}
        self.looks: list[list[str]] = []
        self.trouble: Exception | None = None

    def session(self) -> AbstractAsyncContextManager[None]:
        return nullcontext()

    async def observe(self, handles: Sequence[JobHandle]) -> Mapping[str, JobStatus | Exception]:
        self.looks.append(sorted(handle.job_id for handle in handles))
        if self.trouble is not None:
            raise self.trouble
        return {handle.job_id: self.jobs[handle.job_id] for handle in handles if handle.job_id in self.jobs}


def job(job_id: str, resource_id: str = "r") -> JobHandle:
    return JobHandle(
        vendor="ledger",
        resource_id=resource_id,
        job_id=job_id,
        started_at=datetime.now(UTC),
        url=f"http://l/{job_id}",
    )


@pytest.fixture
def ledger() -> Ledger:
    return Ledger()


@pytest.fixture
async def watcher(ledger: Ledger) -> JobWatcher:
    return JobWatcher(ledger)  # type: ignore[arg-type]  # as much of a vendor as a watcher asks for


QUICK = JobPolicy(poll=0.05, outage=0.3)
PATIENT = JobPolicy(poll=0.05, outage=60)


async def test_one_look_for_all(ledger: Ledger, watcher: JobWatcher) -> None:
    """Jobs that began at different moments come to share their looks."""
    ledger.jobs = {str(number): BUSY for number in range(50)}
    policy = JobPolicy(poll=0.2)
    waits = []
    for number in range(50):
        waits.append(asyncio.create_task(watcher.wait(job(str(number)), policy)))
        await asyncio.sleep(0.005)
    await until(lambda: [len(look) for look in ledger.looks[-3:]] == [50] * 3)
    ledger.jobs = dict.fromkeys(ledger.jobs, DONE)
    await asyncio.gather(*waits)
    assert len(ledger.looks[-1]) == 50


async def test_an_id_that_two_resources_have(ledger: Ledger, watcher: JobWatcher) -> None:
    """Run 12 of one build is not run 12 of another, where ids are a resource's and not an account's."""
    ends = {"good": DONE, "bad": JobStatus(state=JobState.FAILED, word="broken")}

    async def observe(handles: Sequence[JobHandle]) -> Mapping[str, JobStatus | Exception]:
        ledger.looks.append([handle.resource_id for handle in handles])
        return {handle.job_id: ends[handle.resource_id] for handle in handles}

    ledger.observe = observe  # type: ignore[method-assign]
    jobs = [job("12", "good"), job("12", "bad"), job("13", "good"), job("12", "good")]
    seen = await asyncio.gather(*(watcher.wait(each, PATIENT, at_once=True) for each in jobs))
    assert [status.state.value for status in seen] == ["SUCCEEDED", "FAILED", "SUCCEEDED", "SUCCEEDED"]
    assert sorted(map(sorted, ledger.looks)) == [["bad"], ["good", "good"]]


async def test_a_waiter_who_leaves(ledger: Ledger, watcher: JobWatcher) -> None:
    """Of three who wait for one job, one is cancelled; the others get its end, at one request a look."""
    ledger.jobs["1"] = BUSY
    waits = [asyncio.create_task(watcher.wait(job("1"), QUICK)) for _ in range(3)]
    await until(lambda: len(ledger.looks) >= 2)
    waits[0].cancel()
    ledger.jobs["1"] = DONE
    assert await asyncio.gather(*waits[1:]) == [DONE, DONE]
    assert all(look == ["1"] for look in ledger.looks)


async def test_the_loop_sleeps_when_nobody_waits(ledger: Ledger, watcher: JobWatcher) -> None:
    """When the last who waits has left, nothing is asked any more; the next one wakes it up."""
    ledger.jobs = {"1": BUSY, "2": DONE}
    first = asyncio.create_task(watcher.wait(job("1"), QUICK))
    await until(lambda: len(ledger.looks) >= 2)
    first.cancel()
    await asyncio.sleep(0)
    looks = len(ledger.looks)
    second = await watcher.wait(job("2"), QUICK)
    assert second == DONE
    assert ledger.looks[looks:] == [["2"]]
    await until(lambda: asyncio.all_tasks() == {asyncio.current_task()})


async def test_a_late_comer_does_not_wait_for_the_others(ledger: Ledger, watcher: JobWatcher) -> None:
    """A new job is looked at when it is due, although the loop sleeps until another's turn."""
    ledger.jobs = {"slow": BUSY, "quick": DONE}
    slow = asyncio.create_task(watcher.wait(job("slow"), JobPolicy(poll=600)))
    await asyncio.sleep(0.01)
    async with asyncio.timeout(60):
        assert await watcher.wait(job("quick"), QUICK, at_once=True) == DONE
    assert ledger.looks == [["quick"]]
    slow.cancel()


async def test_one_bad_job_among_good_ones(ledger: Ledger, watcher: JobWatcher) -> None:
    """A job whose state can't be read, or that does not exist, is nobody else's trouble."""
    ledger.jobs = {
        "gone": NotFoundError("ledger", "no such job"),
        "ill": VendorUnavailable("ledger", "internal error"),
        "good": DONE,
    }
    outcomes = await asyncio.gather(
        *(watcher.wait(job(job_id), QUICK, age=1) for job_id in ledger.jobs), return_exceptions=True
    )
    assert [type(outcome) for outcome in outcomes] == [NotFoundError, VendorUnavailable, JobStatus]
    assert "Job ill was not touched" in str(outcomes[1])


async def test_a_fresh_job_may_be_unknown(ledger: Ledger, watcher: JobWatcher) -> None:
    """A job that the vendor does not show, or does not know, yet, is waited for."""
    ledger.grace = 60
    ledger.jobs = {"1": NotFoundError("ledger", "no such job")}
    waits = [asyncio.create_task(watcher.wait(job(job_id), PATIENT)) for job_id in ("1", "2")]
    await until(lambda: ledger.looks.count(["1", "2"]) >= 2)
    ledger.jobs = {"1": DONE, "2": DONE}
    assert await asyncio.gather(*waits) == [DONE, DONE]


async def test_a_job_that_is_lost(ledger: Ledger, watcher: JobWatcher) -> None:
    """A job that is shown no more for longer than the budget is an error that names it and its page."""
    with pytest.raises(VendorUnavailable, match=r"not in its replies.*Job 7 .*http://l/7"):
        await watcher.wait(job("7"), QUICK)


async def test_a_broken_callback(ledger: Ledger, watcher: JobWatcher) -> None:
    """Whoever's callback breaks hears of it; the others go on to be watched."""
    ledger.jobs = {"1": BUSY, "2": BUSY}

    def broken(_: JobStatus) -> None:
        raise ZeroDivisionError

    first = asyncio.create_task(watcher.wait(job("1"), QUICK, on_change=broken))
    second = asyncio.create_task(watcher.wait(job("2"), QUICK))
    with pytest.raises(ZeroDivisionError):
        await first
    ledger.jobs["2"] = DONE
    assert await second == DONE


async def test_a_vendor_that_breaks(ledger: Ledger, watcher: JobWatcher) -> None:
    """Whatever looking raises reaches all who wait, and the next wait starts afresh."""
    ledger.trouble = VendorError("ledger", "no licence")
    ledger.jobs["1"] = DONE
    outcomes = await asyncio.gather(
        *(watcher.wait(job("1"), QUICK) for _ in range(3)), return_exceptions=True
    )
    assert [str(outcome) for outcome in outcomes] == ["ledger: no licence."] * 3
    ledger.trouble = None
    assert await watcher.wait(job("1"), QUICK) == DONE


async def test_changes_are_told_by_word(ledger: Ledger, watcher: JobWatcher) -> None:
    """A status is told when its word changes, not whenever a row was counted."""
    told: list[str] = []
    ledger.jobs["1"] = BUSY
    wait = asyncio.create_task(watcher.wait(job("1"), QUICK, on_change=lambda s: told.append(s.word)))
    for rows in range(5):
        looks = len(ledger.looks)
        ledger.jobs["1"] = BUSY.model_copy(update={"rows": rows})
        await until(lambda: len(ledger.looks) > looks)  # noqa: B023 - awaited within the turn
    ledger.jobs["1"] = DONE
    await wait
    assert told == ["busy", "done"]


async def test_a_new_attempt_is_a_change(ledger: Ledger, watcher: JobWatcher) -> None:
    """A vendor that tries again under the same word is heard of."""
    seen: list[int | None] = []
    waiting = asyncio.create_task(
        watcher.wait(job("1"), QUICK, on_change=lambda status: seen.append(status.attempts))
    )
    for attempts in (1, 2):
        ledger.jobs["1"] = BUSY.model_copy(update={"attempts": attempts})
        await until(lambda: seen[-1:] == [attempts])  # noqa: B023 - awaited within the turn
    ledger.jobs["1"] = DONE
    await waiting
    assert seen == [1, 2, None]


async def test_a_thousand_jobs_cost_ten_requests(sandbox: Sandbox, desk: Desk) -> None:
    """A look at a thousand running jobs of an account takes about ten requests."""
    ids = sandbox.airbyte.add_connections(1000, duration=30)
    jobs = [str(sandbox.airbyte.start(connection_id, "sync").job_id) for connection_id in ids]
    now = datetime.now(UTC)
    handles = [
        JobHandle(vendor="airbyte", resource_id=c, job_id=j, started_at=now)
        for c, j in zip(ids, jobs, strict=True)
    ]
    async with desk.vendor.session():
        watcher = await watcher_for(desk.vendor)
        policy = JobPolicy(poll=60)
        waits = [asyncio.create_task(watcher.wait(handle, policy, at_once=True)) for handle in handles]
        await asyncio.sleep(0.1)
        await until(lambda: all(watch.last is not None for watch in watcher._watches))
        asked = sandbox.requests.count(method="GET")
        for wait in waits:
            wait.cancel()
        await asyncio.gather(*waits, return_exceptions=True)
    assert 10 <= asked <= 12


async def test_one_broken_job_in_a_list(sandbox: Sandbox, desk: Desk) -> None:
    """A list with jobs that are not what the API promises does not hide the others."""
    ids = sandbox.airbyte.add_connections(5, duration=30)
    handles = []
    async with desk.vendor.session():
        for connection_id in ids:
            handle, _, _ = await desk.vendor.look_up(str(sandbox.airbyte.start(connection_id, "sync").job_id))
            handles.append(handle)
        sandbox.faults.add(kind="null_fields", fields=["startTime"], path="/jobs$")
        seen = await desk.vendor.observe(handles)
    assert all(isinstance(status, JobStatus) for status in seen.values())
    assert len(seen) == 5


async def test_one_watcher_per_account(desk: Desk) -> None:
    """Blocks of one account share a watcher, whatever name they are loaded by."""
    first, second = (AirbyteVendor(desk.vendor._server.model_copy()) for _ in range(2))
    watchers: list[Any] = [await watcher_for(vendor) for vendor in (first, second, desk.vendor)]
    assert watchers[0] is watchers[1] is watchers[2]
