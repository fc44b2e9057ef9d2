"""Census takes every start and skips the run while another is going: what then becomes of ours."""

from __future__ import annotations

import asyncio

import pytest

from blocks import CensusCredentials
from sandbox import Sandbox
from tasks.census import CensusVendor
from tasks.jobs import JobFailed, JobPolicy, JobState, JobTimeout, MemoryJournal, wait_for_job
from tests.census_fixtures import SYNC, box, credentials, entry_of, run, run_ids, triggers, words
from tests.jobs_fixtures import PREFECTS_SOCKETS, collected, until

__all__ = ["box", "collected", "credentials"]

pytestmark = [*PREFECTS_SOCKETS, pytest.mark.no_server]


@pytest.fixture
def earlier(box: Sandbox) -> str:
    """A run that is going on until `free` ends it."""
    return keep_busy(box)


def keep_busy(box: Sandbox) -> str:
    box.census.set(SYNC, outcome="stuck", duration=0.1)
    run_id = str(box.census.trigger(SYNC).run_id)
    box.census.set(SYNC, outcome="succeed")
    return run_id


async def free(box: Sandbox, earlier: str, skipped: int = 1) -> None:
    """End the earlier run as soon as ours has been skipped for it."""
    await until(lambda: words(box).count("skipped") == skipped)
    await asyncio.sleep(0.2)
    box.census.finish_run(int(earlier), "completed")


async def test_skipped_and_queue(box: Sandbox, credentials: CensusCredentials, earlier: str) -> None:
    """A run that Census skips is started again when the one that was going has ended."""
    journal = MemoryJournal()
    result, _ = await asyncio.gather(run(credentials, journal), free(box, earlier))
    assert result.state is JobState.SUCCEEDED
    assert words(box) == ["completed", "skipped", "completed"]
    assert result.job_id == run_ids(box)[2]
    (entry,) = journal.entries.values()
    assert entry.known == [run_ids(box)[1]]


async def test_skipped_and_adopt(box: Sandbox, credentials: CensusCredentials, earlier: str) -> None:
    """With `adopt` the run that was going is taken as ours, and a retry attaches to that one."""
    journal = MemoryJournal()
    result, _ = await asyncio.gather(run(credentials, journal, on_active="adopt"), free(box, earlier))
    assert (result.job_id, result.state) == (earlier, JobState.SUCCEEDED)
    assert words(box) == ["completed", "skipped"]
    (entry,) = journal.entries.values()
    assert entry.handle
    assert entry.handle.job_id == earlier


async def test_skipped_and_adopt_is_not_for_a_full_sync(box: Sandbox, credentials: CensusCredentials) -> None:
    """A run that sends changes only can't stand for the full sync that was asked for: that one is queued."""
    await run(credentials)
    changes = keep_busy(box)
    asked = run(credentials, operation="full-sync", on_active="adopt")
    result, _ = await asyncio.gather(asked, free(box, changes))
    assert result.job_id not in (changes, None)
    assert (result.rows, box.census.runs_of(SYNC)[-1].full_sync) == (100, True)


@pytest.mark.parametrize("on_active", ["skip", "fail"])
async def test_skipped_and_left(
    box: Sandbox, credentials: CensusCredentials, earlier: str, on_active: str
) -> None:
    """With `skip` the result is SKIPPED and names the run that was going; with `fail` it is a failure."""
    message = f"job {earlier} is running already, and the policy says {on_active}"
    if on_active == "skip":
        result = await run(credentials, on_active=on_active)
        assert (result.state, result.good, result.message) == (JobState.SKIPPED, False, message)
    else:
        with pytest.raises(JobFailed, match=message):
            await run(credentials, on_active=on_active)
    assert triggers(box) == 1


async def test_what_had_ended_before_is_not_adopted(
    box: Sandbox, credentials: CensusCredentials, earlier: str
) -> None:
    """A run that ended before ours was asked for has old data: it is not taken for the one that was going."""
    box.census.set(SYNC, queued_seconds=0.5)
    waiting = asyncio.create_task(run(credentials, on_active="adopt"))
    await until(lambda: len(run_ids(box)) == 2)
    box.census.set(SYNC, queued_seconds=0.0)
    (old, _) = box.census.runs_of(SYNC)
    box.census.finish_run(old.run_id, "completed")
    old.created -= 100
    old.timeline.started_wall -= 100
    result = await waiting
    assert words(box) == ["completed", "skipped", "completed"]
    assert result.job_id == run_ids(box)[2]


async def test_skipped_again_and_again(box: Sandbox, credentials: CensusCredentials) -> None:
    """Behind runs that never leave room, waiting ends with the timeout; theirs is not touched."""
    box.census.set(SYNC, outcome="stuck", duration=0.1)
    box.census.trigger(SYNC)
    with pytest.raises(JobTimeout, match=r"was running already and did not end in 3 s; ours was not started"):
        await run(credentials, timeout=3)
    assert words(box) == ["working", "skipped"]


async def test_a_lost_start_that_runs(
    box: Sandbox, credentials: CensusCredentials, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lost start that stays invisible is sent again and skipped: the one that runs is known as ours."""
    monkeypatch.setattr(CensusVendor, "grace", 2.0)
    box.census.set(SYNC, visibility_delay=600, outcome="stuck")
    box.faults.add(kind="drop_after", method="POST", path="/trigger$", times=1)
    journal = MemoryJournal()
    waiting = asyncio.create_task(run(credentials, journal))
    await until(lambda: len(run_ids(box)) == 1)
    box.census.set(SYNC, visibility_delay=0.0)
    await until(lambda: len(run_ids(box)) == 2)
    first, _ = box.census.runs_of(SYNC)
    first.hidden_until = 0.0
    await until(lambda: getattr(entry_of(journal).handle, "job_id", None) == str(first.run_id))
    box.census.finish_run(first.run_id, "completed")
    result = await waiting
    assert words(box) == ["completed", "skipped"]
    assert result.job_id == run_ids(box)[0]


async def test_a_crash_behind_another_run(box: Sandbox, credentials: CensusCredentials, earlier: str) -> None:
    """A retry of an attempt that died while it waited behind another run starts ours, once."""
    journal = MemoryJournal()
    first = asyncio.create_task(run(credentials, journal))
    await until(lambda: words(box) == ["working", "skipped"] and bool(entry_of(journal).handle))
    before = entry_of(journal)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    await journal.record(before)  # a crash writes nothing
    result, _ = await asyncio.gather(run(credentials, journal), free(box, earlier))
    assert words(box) == ["completed", "skipped", "completed"]
    assert result.job_id == run_ids(box)[2]


async def test_a_skipped_run_of_somebody(box: Sandbox, credentials: CensusCredentials, earlier: str) -> None:
    """To wait for somebody's run that Census skipped is to learn that, and what it was skipped for."""
    skipped = box.census.trigger(SYNC)
    vendor = CensusVendor(credentials)
    await until(lambda: skipped.status == "skipped")
    handle, request, status = await vendor.look_up(str(skipped.run_id))
    assert status.state is JobState.SKIPPED
    box.census.finish_run(int(earlier), "completed")
    with pytest.raises(JobFailed, match=f"skipped it: a run is active already: job {earlier}") as caught:
        await wait_for_job(vendor, request, handle, JobPolicy())
    assert caught.value.result.state is JobState.SKIPPED
