"""The engine: one start per job whatever happens, and an honest account of its end."""

from __future__ import annotations

import asyncio
import logging
import pickle
from datetime import UTC, datetime
from typing import Any

import pytest
from pydantic import ValidationError

from blocks.http import AuthError, VendorUnavailable
from tasks.jobs import (
    InputError,
    Intent,
    JobCancelled,
    JobFailed,
    JobHandle,
    JobPolicy,
    JobResult,
    JobState,
    JobStatus,
    JobTimeout,
)
from tasks.jobs.outcome import judge
from tests.jobs_fixtures import Desk, desk, until

__all__ = ["desk"]

BEFORE_THE_VENDOR = [
    {"kind": "status", "status": 503, "times": 2},
    {"kind": "html", "status": 502, "times": 1},
    {"kind": "html", "status": 200, "times": 1},
    {"kind": "empty", "times": 1},
    {"kind": "garbage", "times": 1},
    {"kind": "drop", "times": 1},
    {"kind": "reset", "times": 1},
    {"kind": "status", "status": 429, "headers": {"Retry-After": "1"}, "times": 1},
]
AFTER_THE_VENDOR = ["drop_after", "cut", "truncated_json", "null_fields"]


def _fault_name(fault: dict[str, Any]) -> str:
    return f"{fault['kind']}-{fault.get('status', '')}"


# -- never twice


async def test_a_plain_run(desk: Desk) -> None:
    """A job that goes well is started once, and its result has what the vendor counted."""
    result = await desk.run()
    assert (result.state, result.rows, result.bytes, result.owner) == (
        JobState.SUCCEEDED,
        1000,
        120_000,
        "sales",
    )
    assert result.url
    assert desk.connection_id in result.url
    assert f"jobId={result.job_id}" in result.url
    assert desk.jobs == [result.job_id]
    assert desk.entry.result == result


@pytest.mark.parametrize("kind", AFTER_THE_VENDOR)
async def test_a_lost_reply_is_one_start(desk: Desk, kind: str) -> None:
    """A start that the vendor accepted and whose reply was lost is found, not sent again."""
    desk.fault(kind=kind, method="POST", path="/jobs", times=1)
    result = await desk.run()
    assert result.state is JobState.SUCCEEDED
    assert desk.jobs == [result.job_id]
    assert desk.posts == 1


async def test_a_lost_reply_of_a_job_that_hides(desk: Desk) -> None:
    """A started job that is in no list at first is waited for before another start is thought of."""
    desk.behave(visibility_delay=0.2)
    desk.fault(kind="drop_after", method="POST", path="/jobs", times=1)
    result = await desk.run()
    assert desk.jobs == [result.job_id]
    assert desk.posts == 1


async def test_a_lost_reply_of_a_job_that_hides_longer_than_promised(desk: Desk) -> None:
    """Even when the vendor hides our job and refuses the second start, that job is taken as ours."""
    desk.behave(visibility_delay=0.8, duration=1.6)
    desk.fault(kind="drop_after", method="POST", path="/jobs", times=1)
    result = await desk.run()
    assert desk.jobs == [result.job_id]


@pytest.mark.parametrize("fault", BEFORE_THE_VENDOR, ids=_fault_name)
async def test_a_start_that_never_arrived_is_repeated(desk: Desk, fault: dict[str, Any]) -> None:
    """A start of which nothing came is sent again until the vendor takes it, and then once."""
    desk.fault(method="POST", path="/jobs", **fault)
    result = await desk.run()
    assert result.state is JobState.SUCCEEDED
    assert desk.jobs == [result.job_id]
    assert desk.posts == fault["times"] + 1


async def test_a_vendor_that_is_down_at_the_start(desk: Desk) -> None:
    """A vendor that refuses connections when we want to start gets its start when it is back."""
    async with desk.vendor.session():
        await desk.vendor.connection(desk.connection_id)
        desk.sandbox.outage(0.7)
        result = await desk.run()
    assert desk.jobs == [result.job_id]


async def test_a_vendor_that_stays_down_at_the_start(desk: Desk) -> None:
    """A start that never got out within the outage budget leaves no open intent behind."""
    async with desk.vendor.session():
        await desk.vendor.connection(desk.connection_id)
        desk.sandbox.pause()
        with pytest.raises(VendorUnavailable):
            await desk.run(outage=0.1)
        assert not desk.entry.open
        desk.sandbox.resume()
        assert (await desk.run()).state is JobState.SUCCEEDED
    assert len(desk.jobs) == 1


async def test_a_lost_reply_and_then_nothing(desk: Desk) -> None:
    """A start whose effect can't be learnt within the budget fails; the retry finds the job."""
    desk.behave(duration=2.0)
    desk.fault(kind="drop_after", method="POST", path="/jobs", times=1)
    listing = desk.fault(kind="drop", method="GET", path="/jobs$")
    with pytest.raises(VendorUnavailable, match=r"may have been accepted.*A retry looks for that job"):
        await desk.run(outage=0.2)
    assert desk.entry.open
    desk.sandbox.faults.remove(listing)
    result = await desk.run()
    assert desk.jobs == [result.job_id]
    assert desk.posts == 1


async def test_a_good_end_is_not_repeated(desk: Desk) -> None:
    """A retry of a run whose job succeeded starts nothing and gives the same result."""
    first = await desk.run()
    assert await desk.run() == first
    assert len(desk.jobs) == 1


async def test_a_bad_end_is_repeated(desk: Desk) -> None:
    """A retry of a run whose job failed starts a new job, and does not take the failed one for it."""
    desk.behave(outcome="fail", times=1)
    with pytest.raises(JobFailed):
        await desk.run()
    desk.fault(kind="drop_after", method="POST", path="/jobs", times=1)
    result = await desk.run()
    assert [result.job_id] == desk.jobs[1:]
    assert desk.words == ["failed", "succeeded"]


async def test_bad_input_leaves_no_open_intent(desk: Desk) -> None:
    """A connection that can't be synced is no reason to look for a job later on."""
    desk.behave(status="inactive")
    with pytest.raises(InputError, match=r"is inactive\. Enable it.*nothing was started"):
        await desk.run()
    assert not desk.entry.open
    desk.behave(status="active")
    async with desk.vendor.session():  # still the same client, which had seen it inactive
        assert (await desk.run()).state is JobState.SUCCEEDED


async def test_a_connection_that_turns_inactive_under_us(desk: Desk) -> None:
    """Airbyte hides why it refuses a start; the connection's own status tells it."""
    async with desk.vendor.session():
        await desk.vendor.connection(desk.connection_id)
        desk.behave(status="inactive")
        with pytest.raises(InputError, match="is inactive"):
            await desk.run()
    assert desk.jobs == []


async def test_trouble_before_the_start_is_no_start(desk: Desk) -> None:
    """A failure of what is asked before the start leaves no doubt about the start."""
    desk.fault(kind="status", status=403, path="/connections/")
    with pytest.raises(AuthError):
        await desk.run()
    assert not desk.entry.open
    assert desk.posts == 0


# -- a bad minute


async def test_a_bad_minute_is_not_a_failed_sync(desk: Desk, caplog: pytest.LogCaptureFixture) -> None:
    """Refused, 503, cut, garbage, HTML and 429 in mid-wait: the sync succeeds, nothing is cancelled."""
    desk.behave(duration=2.0)
    with caplog.at_level(logging.INFO, "elt.jobs"):
        run = desk.begin(outage=30)
        await desk.until_started()
        desk.sandbox.outage(0.6)
        for fault in ({"status": 503}, {"kind": "garbage"}, {"kind": "html", "status": 200}, {"kind": "cut"}):
            desk.fault(method="GET", times=2, **{"kind": "status", **fault})
        desk.fault(kind="status", status=429, method="GET", headers={"Retry-After": "1"}, times=1)
        result = await run
    assert result.state is JobState.SUCCEEDED
    assert desk.jobs == [result.job_id]
    assert desk.cancels == 0
    told = [record.message for record in caplog.records]
    assert sum("is not touched; looking again" in message for message in told) == 1
    assert "airbyte answers again" in told


async def test_an_outage_beyond_the_budget(desk: Desk) -> None:
    """When the budget is spent the error says that the job was left alone, and a retry attaches to it."""
    desk.behave(duration=300)
    run = desk.begin(outage=0.4)
    await desk.until_started()
    desk.sandbox.pause()
    with pytest.raises(
        VendorUnavailable, match=r"was not touched and may still be running.*attaches"
    ) as caught:
        await run
    assert desk.jobs[0] in str(caught.value)
    assert "jobId=" in str(caught.value)
    desk.sandbox.resume()
    assert desk.words == ["running"]
    desk.sandbox.airbyte.finish_job(int(desk.jobs[0]), "succeeded")
    result = await desk.run()
    assert [result.job_id] == desk.jobs
    assert result.state is JobState.SUCCEEDED
    assert desk.cancels == 0


async def test_credentials_that_are_withdrawn(desk: Desk) -> None:
    """Credentials that stop to work in mid-wait end the wait at once, and leave the job alone."""
    desk.behave(duration=300)
    run = desk.begin()
    await desk.until_started()
    desk.fault(kind="status", status=403)
    with pytest.raises(AuthError):
        await run
    assert desk.words[0] in ("pending", "running")
    assert desk.entry.open


# -- how it ends


@pytest.mark.parametrize(
    ("behaviour", "state"),
    [
        ({"outcome": "succeed"}, JobState.SUCCEEDED),
        ({"outcome": "incomplete_then_succeed", "duration": 0.5}, JobState.SUCCEEDED),
        ({"outcome": "succeed", "queued_seconds": 0.4}, JobState.SUCCEEDED),
        ({"outcome": "unknown_word", "word": "paused", "word_seconds": 0.3}, JobState.SUCCEEDED),
        ({"outcome": "fail"}, JobState.FAILED),
        ({"outcome": "cancel"}, JobState.CANCELLED),
    ],
    ids=lambda value: value["outcome"] if isinstance(value, dict) else "",
)
async def test_ends(desk: Desk, behaviour: dict[str, Any], state: JobState) -> None:
    """Each of the vendor's courses has its end; failed and cancelled are never a success."""
    desk.behave(**behaviour)
    kind = {JobState.FAILED: JobFailed, JobState.CANCELLED: JobCancelled}.get(state)
    if kind is None:
        result = await desk.run()
    else:
        with pytest.raises(kind) as caught:
            await desk.run()
        result = caught.value.result
    assert (result.state, result.good) == (state, kind is None)
    assert desk.jobs == [result.job_id]


async def test_an_unknown_word_is_told_once(desk: Desk, caplog: pytest.LogCaptureFixture) -> None:
    """A state that is in no contract is said once and waited through until the deadline decides."""
    desk.behave(outcome="unknown_word", word="hibernating")
    with caplog.at_level(logging.WARNING, "elt.jobs"), pytest.raises(JobTimeout):
        await desk.run(timeout=1.0)
    assert [r.message for r in caplog.records if "hibernating" in r.message] == [
        f"airbyte job {desk.jobs[0]} is in a state that is not in its contract: 'hibernating'. "
        "Taken as not ended."
    ]


async def test_a_job_that_somebody_cancels(desk: Desk) -> None:
    """A job that is cancelled at the vendor while we wait is neither success nor failure."""
    desk.behave(duration=300)
    run = desk.begin()
    await desk.until_started()
    desk.sandbox.airbyte.finish_job(int(desk.jobs[0]), "cancelled")
    with pytest.raises(JobCancelled, match="it was cancelled in Airbyte"):
        await run


@pytest.mark.parametrize(
    ("on_timeout", "word", "says"),
    [("cancel", "cancelled", "it was cancelled"), ("detach", "running", "it was left running")],
)
async def test_stuck(desk: Desk, on_timeout: str, word: str, says: str) -> None:
    """A stuck job is cancelled or left at the timeout, and the error names the job and its page."""
    desk.behave(outcome="stuck")
    with pytest.raises(JobTimeout, match=f"did not end in 0.7 s; {says}") as caught:
        await desk.run(timeout=0.7, on_timeout=on_timeout)
    assert f"job {desk.jobs[0]}" in str(caught.value)
    assert f"jobId={desk.jobs[0]}" in str(caught.value)
    assert desk.words == [word]


async def test_an_end_between_two_looks(desk: Desk) -> None:
    """A job that ended after the last look and before the timeout has not timed out."""
    desk.behave(duration=0.4)
    assert (await desk.run(poll=30, timeout=1.0)).state is JobState.SUCCEEDED
    assert desk.cancels == 0


async def test_a_timeout_that_stops_nothing(desk: Desk) -> None:
    """A job that could not be cancelled at its timeout goes on, and a retry attaches to it."""
    desk.behave(duration=1.5)
    desk.fault(kind="status", status=403, method="DELETE")
    with pytest.raises(JobTimeout, match=r"could not be cancelled and may go on \(.*403"):
        await desk.run(timeout=0.5)
    result = await desk.run()
    assert desk.jobs == [result.job_id]


async def test_detached_is_attached_again(desk: Desk) -> None:
    """A retry after a timeout with `detach` takes up the job that was left, even long after its time."""
    desk.behave(duration=1.5)
    with pytest.raises(JobTimeout):
        await desk.run(timeout=0.5, on_timeout="detach")
    result = await desk.run(timeout=0.5, on_timeout="detach")
    assert desk.jobs == [result.job_id]


@pytest.mark.parametrize(
    ("rows", "policy", "state", "good"),
    [
        (0, {}, JobState.SUCCEEDED, True),
        (0, {"min_rows": 0}, JobState.SUCCEEDED, True),
        (0, {"min_rows": 1}, JobState.PARTIAL, False),
        (999, {"min_rows": 1000}, JobState.PARTIAL, False),
        (1000, {"min_rows": 1000}, JobState.SUCCEEDED, True),
        (5, {"min_rows": 6, "on_partial": "fail"}, JobState.PARTIAL, False),
        (5, {"min_rows": 6, "on_partial": "warn"}, JobState.PARTIAL, True),
        (5, {"min_rows": 6, "on_partial": "ok"}, JobState.PARTIAL, True),
    ],
)
async def test_min_rows(
    desk: Desk,
    caplog: pytest.LogCaptureFixture,
    rows: int,
    policy: dict[str, Any],
    state: JobState,
    good: bool,
) -> None:
    """Fewer rows than were expected is a partial end, which passes only where the policy says so."""
    desk.behave(rows=rows, duration=0.1)
    try:
        with caplog.at_level(logging.INFO, "elt.jobs"):
            result = await desk.run(**policy)
        level = next(r.levelno for r in caplog.records if "rows" in r.message)
        assert level == (logging.WARNING if policy.get("on_partial") == "warn" else logging.INFO)
    except JobFailed as error:
        result = error.result
    assert (result.state, result.good, result.rows) == (state, good, rows)
    if state is JobState.PARTIAL:
        assert f"moved {rows} rows; at least {policy['min_rows']:,} were expected" in str(result.message)


@pytest.mark.parametrize(
    ("state", "rejected", "on_partial", "good"),
    [
        (JobState.PARTIAL, 5, "ok", True),
        (JobState.PARTIAL, 6, "ok", False),
        (JobState.SUCCEEDED, 6, None, False),
        (JobState.SUCCEEDED, 5, None, True),
        (JobState.SUCCEEDED, None, "ok", False),
        (JobState.PARTIAL, None, "ok", False),
        (JobState.PARTIAL, 5, "fail", False),
        (JobState.FAILED, 0, "ok", False),
    ],
)
def test_rejected_rows(
    desk: Desk, state: JobState, rejected: int | None, on_partial: Any, good: bool
) -> None:
    """More rejected rows than `max_rows_rejected`, or nobody knows how many, are a failure in any case."""
    policy = JobPolicy(max_rows_rejected=5, on_partial=on_partial)
    handle = JobHandle(vendor="airbyte", resource_id="r", job_id="1", started_at=datetime.now(UTC))
    status = JobStatus(state=state, word="w", rows_rejected=rejected)
    result = judge(desk.vendor, desk.request, policy, handle, status)
    assert result.good is good
    if rejected == 6:
        assert result.message == "6 rows were rejected; at most 5 are borne"
    if rejected is None:
        assert result.state is JobState.PARTIAL
        assert result.message == "it does not say how many rows were rejected; at most 5 are borne"


async def test_a_baseline_is_kept_before_each_start(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a vendor must remember from before the start is in the journal when the request is sent."""
    seen: list[tuple[str | None, str | None]] = []
    read = iter(["1", "2"])

    async def baseline(self: Any, request: Any) -> str:
        return next(read)

    start = type(desk.vendor).start

    async def noting_start(self: Any, request: Any, intent: Intent) -> JobHandle:
        seen.append((intent.baseline, desk.entry.baseline))
        return await start(self, request, intent)

    monkeypatch.setattr(type(desk.vendor), "baseline", baseline)
    monkeypatch.setattr(type(desk.vendor), "start", noting_start)
    desk.behave(duration=0.3)
    desk.start_by_hand()
    await desk.run()  # the first start is refused: a job is running already
    assert seen == [("1", "1"), ("2", "2")]


async def test_rows_that_the_vendor_does_not_tell(desk: Desk) -> None:
    """A job whose rows are unknown does not pass for one that moved enough of them."""
    desk.behave(duration=0.1)
    desk.fault(kind="null_fields", fields=["rowsSynced"], method="GET", path="/jobs")
    with pytest.raises(JobFailed, match="does not say how many rows"):
        await desk.run(min_rows=1)


# -- somebody else's job


async def test_queue_behind_a_running_job(desk: Desk) -> None:
    """By default a running job is waited for and ours started after it: its data may be too old."""
    desk.behave(duration=8)
    other = desk.start_by_hand()
    result = await desk.run(timeout=14)
    assert desk.jobs == [other, result.job_id], "and the time behind the other one is not ours"


async def test_queue_that_takes_too_long(desk: Desk) -> None:
    """Waiting for a running job ends at the timeout; that job is left alone and ours is not started."""
    desk.behave(outcome="stuck")
    other = desk.start_by_hand()
    with pytest.raises(JobTimeout, match=f"job {other} was running already.*ours was not started"):
        await desk.run(timeout=0.7)
    assert (desk.jobs, desk.words) == ([other], ["running"])
    assert not desk.entry.open


async def test_running_already_with_no_job_to_be_seen(desk: Desk) -> None:
    """When the vendor says that a job runs and shows none, we ask again until the timeout."""
    body = {"title": "try-again-later", "data": {"message": "A sync is already running for: x"}}
    desk.fault(kind="status", status=409, method="POST", path="/jobs", body=body, times=3)
    result = await desk.run(poll=0.2)
    assert desk.jobs == [result.job_id]
    assert desk.posts == 4


async def test_adopt(desk: Desk) -> None:
    """Told to adopt, the running job is taken as ours: no start, its end is our end."""
    desk.behave(outcome="stuck")
    other = desk.start_by_hand()
    waiting = desk.begin(on_active="adopt")
    await desk.until_started()
    desk.end_first()
    result = await waiting
    assert desk.jobs == [other] == [result.job_id]


async def test_a_clear_is_never_adopted(desk: Desk) -> None:
    """A clear that is running is no sync: it is waited for, whatever the policy says."""
    desk.behave(outcome="stuck")
    other = desk.start_by_hand("clear")
    desk.behave(outcome="succeed")
    waiting = desk.begin(on_active="adopt")
    await until(lambda: desk.posts > 0)
    desk.end_first()
    result = await waiting
    assert desk.jobs == [other, result.job_id]
    assert result.rows == 1000


async def test_skip(desk: Desk) -> None:
    """Told to skip, nothing is started and the result says so; it is no success."""
    desk.behave(outcome="stuck")
    other = desk.start_by_hand()
    result = await desk.run(on_active="skip")
    assert (result.state, result.good) == (JobState.SKIPPED, False)
    assert f"job {other} is running already, and the policy says skip" in result.sentence()
    assert desk.jobs == [other]


async def test_fail(desk: Desk) -> None:
    """Told to fail, nothing is started and the error names the running job."""
    desk.behave(outcome="stuck")
    other = desk.start_by_hand()
    with pytest.raises(JobFailed, match=f"job {other} is running already, and the policy says fail"):
        await desk.run(on_active="fail")
    assert desk.jobs == [other]
    assert not desk.entry.open


# -- values


def test_policies_that_make_no_sense() -> None:
    """Times are finite and positive, and a cap below the poll is raised to it."""
    for bad in (
        {"poll": 0},
        {"timeout": -1},
        {"timeout": float("inf")},
        {"outage": float("nan")},
        {"pol": 1},
    ):
        with pytest.raises(ValidationError):
            JobPolicy.model_validate(bad)
    assert JobPolicy(poll=60).poll_cap == 60
    assert [JobPolicy().interval(age) for age in (0, 10, 100, 10_000)] == [1.0, 1.0, 5.0, 30.0]


def test_results_and_handles_survive_storage() -> None:
    """Handles, results and errors come back from JSON and pickles as they were."""
    handle = JobHandle(vendor="v", resource_id="r", job_id="1", started_at=datetime.now(UTC), url="http://x")
    assert JobHandle.model_validate_json(handle.model_dump_json()) == handle
    result = JobResult(
        vendor="v", resource_id="r", name="n", state=JobState.FAILED, message="why", job_id="1"
    )
    assert JobResult.model_validate_json(result.model_dump_json()) == result
    error = pickle.loads(pickle.dumps(JobTimeout(result)))  # noqa: S301 - our own bytes
    assert (type(error), error.result, str(error)) == (JobTimeout, result, "n (job 1) failed: why")


async def test_an_event_loop_is_left_clean(desk: Desk) -> None:
    """When a job has ended nothing of it is left on the event loop."""
    await desk.run()
    await until(lambda: asyncio.all_tasks() == {asyncio.current_task()})
