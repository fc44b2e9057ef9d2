"""Fivetran's syncs through the engine: whose end an end is, and what is never asked for twice."""

from __future__ import annotations

import asyncio
import logging
import time
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from pydantic import TypeAdapter

from blocks import FivetranCredentials
from blocks.fivetran import Connection
from blocks.http import BadReply, VendorError, VendorUnavailable
from sandbox import Sandbox
from tasks.fivetran_jobs import Before, FivetranRequest, FivetranVendor, status_of
from tasks.jobs import (
    InputError,
    Intent,
    JobFailed,
    JobState,
    JobStatus,
    JobTimeout,
    cancel_job,
)
from tests.fivetran_fixtures import LONG_AGO, Desk, credentials, desk
from tests.jobs_fixtures import PREFECTS_SOCKETS, collected, until

__all__ = ["collected", "credentials", "desk"]

pytestmark = PREFECTS_SOCKETS


def connection(**changes: Any) -> Connection:
    """A connection as the API writes it, at rest and well."""
    status = {"setup_state": "connected", "sync_state": "scheduled", **changes.pop("status", {})}
    base = {"id": "mystified_presidency", "schema": "orders_pg", "paused": False, "status": status}
    return TypeAdapter(Connection).validate_python(base | changes)


def seen(found: Connection, **before: Any) -> JobStatus:
    """What is made of it, for a sync that was asked for an hour ago."""
    asked = datetime.now(UTC) - timedelta(hours=1)
    kept = Before(**{"at": asked, "asked": asked, "state": "scheduled", **before})
    return status_of(found, kept, datetime.now(UTC), 20.0)


# -- whose end an end is (astronomer/airflow-provider-fivetran-async #216, #223)


async def test_a_sync_that_ends_before_the_first_look(desk: Desk) -> None:
    """A sync that is over before it is first looked at is seen to be over (airflow-provider-fivetran #37)."""
    desk.behave(duration=0.0, succeeded_at=LONG_AGO)
    result = await desk.run(poll=0.5)
    assert (result.state, desk.words) == (JobState.SUCCEEDED, ["succeeded"])


@pytest.mark.parametrize("history", [{}, {"succeeded_at": LONG_AGO}, {"failed_at": LONG_AGO}])
@pytest.mark.parametrize("outcome", ["succeed", "fail"])
async def test_the_baseline(desk: Desk, history: dict[str, Any], outcome: str) -> None:
    """Only an end that is newer than the one before is ours; never synced before is older than anything."""
    desk.behave(outcome=outcome, queued_seconds=0.2, **history)
    if outcome == "succeed":
        result = await desk.run()
        assert result.state is JobState.SUCCEEDED
    else:
        with pytest.raises(JobFailed, match="Reconnect: The source refused our credentials") as caught:
            await desk.run()
        result = caught.value.result
    assert len(desk.words) == 1
    assert result.duration is not None
    assert 0 <= result.duration < 10
    assert (result.rows, result.bytes) == (None, None)


async def test_a_stale_failure_is_not_ours(desk: Desk) -> None:
    """A `failed_at` from before does not fail a sync that succeeds (kestra plugin-fivetran #90)."""
    desk.behave(failed_at=LONG_AGO, succeeded_at=LONG_AGO - timedelta(days=1), queued_seconds=0.2)
    assert (await desk.run()).state is JobState.SUCCEEDED


async def test_scheduled_is_never_done(desk: Desk) -> None:
    """For a while after the trigger a connection says `scheduled`, as it does at rest: that is no end."""
    desk.behave(queued_seconds=0.6, succeeded_at=datetime.now(UTC))
    began = time.monotonic()
    await desk.run()
    assert time.monotonic() - began > 0.6
    assert desk.words == ["succeeded"]


def test_moments_are_compared_as_moments() -> None:
    """Ends are compared with their zones, whatever digits and offset they are written with (as text, or by
    `timedelta.seconds` as the Astronomer hook did, they would compare wrong)."""
    whole = datetime(2026, 3, 2, 6, 2, 53, tzinfo=UTC)
    for text in ("2026-03-02T06:02:53Z", "2026-03-02T06:02:53.000Z", "2026-03-02T07:02:53.000000+01:00"):
        assert connection(succeeded_at=text).ended_at == whole
        assert seen(connection(succeeded_at=text), ended=whole).state is JobState.QUEUED
    # As texts, "…:53.9Z" < "…:53Z" and 07:02 +01:00 > 06:30 Z.
    assert seen(connection(succeeded_at="2026-03-02T06:02:53.9Z"), ended=whole).state is JobState.SUCCEEDED
    eastern = whole.astimezone(timezone(timedelta(hours=-5)))
    older = connection(succeeded_at="2026-03-02T07:02:52+01:00", failed_at=None)
    assert seen(older, ended=eastern).state is JobState.QUEUED
    # Without a zone it is UTC.
    assert connection(failed_at="2026-03-02T06:02:53").ended_at == whole


@pytest.mark.parametrize(
    ("succeeded", "failed", "state"),
    [
        ("2026-03-02T06:00:00Z", None, JobState.SUCCEEDED),
        (None, "2026-03-02T06:00:00Z", JobState.FAILED),
        ("2026-03-02T06:00:01Z", "2026-03-02T06:00:00Z", JobState.SUCCEEDED),
        ("2026-03-02T06:00:00Z", "2026-03-02T06:00:01Z", JobState.FAILED),
        (None, None, JobState.QUEUED),
    ],
)
def test_which_of_two_ends(succeeded: str | None, failed: str | None, state: JobState) -> None:
    """The newer of the two ends says how it went; null is never."""
    assert seen(connection(succeeded_at=succeeded, failed_at=failed)).state is state


def test_words_of_the_contract() -> None:
    """Each word has its state; one that is in no contract is not an end."""
    states = {
        word: seen(connection(status={"sync_state": word}))
        for word in ("scheduled", "syncing", "rescheduled", "paused", "resting")
    }
    assert {word: status.state for word, status in states.items()} == {
        "scheduled": JobState.QUEUED,
        "syncing": JobState.RUNNING,
        "rescheduled": JobState.QUEUED,
        "paused": JobState.FAILED,
        "resting": JobState.RUNNING,
    }
    assert [word for word, status in states.items() if not status.known] == ["resting"]


async def test_an_unknown_word_is_waited_through(desk: Desk) -> None:
    """A state that is in no contract is waited through."""
    desk.behave(outcome="unknown_word", word="resting", word_seconds=0.2)
    assert (await desk.run()).state is JobState.SUCCEEDED


async def test_a_failure_without_a_reason(desk: Desk) -> None:
    """A failure for which Fivetran names no task says so."""
    task = asyncio.create_task(desk.run())
    await until(lambda: bool(desk.syncs))
    desk.fivetran.finish_sync(desk.connection_id, "failed")
    desk.fivetran.connection(desk.connection_id).tasks = []
    with pytest.raises(JobFailed, match="Fivetran's API names no reason"):
        await task


async def test_warnings_are_told(desk: Desk) -> None:
    """What Fivetran warns of is in the result of a sync that succeeded."""
    desk.behave(warnings=["Two tables have no primary key"])
    result = await desk.run()
    assert (result.state, result.message) == (JobState.SUCCEEDED, "Two tables have no primary key")


async def test_ids_of_our_making(desk: Desk) -> None:
    """Each sync has an id of its own that a person can read, the connection and the time of the trigger."""
    first, again = await desk.run(), Desk(desk.sandbox, desk.credentials)
    again.connection_id = desk.connection_id
    second = await again.run()
    ids = [str(result.job_id) for result in (first, second)]
    assert ids[0] < ids[1]
    name, at = ids[1].split("@")
    assert name == desk.connection_id
    assert abs(datetime.fromisoformat(at) - datetime.now(UTC)) < timedelta(seconds=60)
    assert str(first.url).endswith(f"/dashboard/connectors/{desk.connection_id}/status")


# -- a sync is running already


async def test_queue(desk: Desk, caplog: pytest.LogCaptureFixture) -> None:
    """A sync that runs already is waited for, then ours is triggered: a trigger during it does nothing."""
    desk.behave(outcome="stuck", times=1)
    desk.fivetran.run_schedule(desk.connection_id)
    with caplog.at_level(logging.INFO, "elt.jobs"):
        waiting = desk.begin()
        await until(lambda: "is running already: waiting for it" in caplog.text)
        desk.fivetran.finish_sync(desk.connection_id, "succeeded")
        result = await waiting
    first, ours = desk.syncs
    assert (first.word, ours.word, desk.posts) == ("succeeded", "succeeded", ["sync"])
    assert result.duration is not None
    assert datetime.fromisoformat(str(result.job_id).split("@")[1]).timestamp() > first.timeline.started_wall


async def test_adopt(desk: Desk) -> None:
    """A sync that runs already can be taken as ours: its end is the result, nothing is triggered."""
    desk.behave(outcome="stuck")
    desk.fivetran.run_schedule(desk.connection_id)
    waiting = desk.begin(on_active="adopt")
    await until(lambda: bool(desk.journal.entries) and desk.entry.handle is not None)
    desk.fivetran.finish_sync(desk.connection_id, "succeeded")
    result = await waiting
    assert (result.state, result.duration, desk.words) == (JobState.SUCCEEDED, None, ["succeeded"])
    assert desk.posts == []


@pytest.mark.parametrize("on_active", ["skip", "fail"])
async def test_skip_and_fail(desk: Desk, on_active: str) -> None:
    """Or the run is skipped, or it fails; nothing is triggered either way."""
    desk.behave(outcome="stuck")
    desk.fivetran.run_schedule(desk.connection_id)
    if on_active == "skip":
        assert (await desk.run(on_active="skip")).state is JobState.SKIPPED
    else:
        with pytest.raises(JobFailed, match="running already, and the policy says fail"):
            await desk.run(on_active="fail")
    assert desk.posts == []


async def test_a_crash_while_waiting_for_another(desk: Desk) -> None:
    """After a crash in the queue, the end of the sync that was waited for is not taken for ours."""
    desk.behave(duration=0.3)
    desk.fivetran.run_schedule(desk.connection_id)
    vendor = FivetranVendor(desk.credentials)
    request = FivetranRequest(desk.connection_id, "sync", "orders", None, timeout=60)
    async with vendor.session():
        intent = Intent(since=datetime.now(UTC), baseline=await vendor.baseline(request))
        await until(lambda: desk.words == ["succeeded"])
        assert await vendor.find(request, intent) is None


# -- rescheduled (airflow-provider-fivetran #71; PrefectHQ/prefect #7523; dagster #15625, #15643)


async def test_rescheduled_on_a_schedule(desk: Desk, caplog: pytest.LogCaptureFixture) -> None:
    """With a schedule Fivetran runs a sync that it put off again itself: that is waited for, and told."""
    desk.behave(outcome="reschedule", rescheduled_seconds=0.3)
    with caplog.at_level(logging.INFO, "elt.jobs"):
        assert (await desk.run()).state is JobState.SUCCEEDED
    assert desk.posts == ["sync"]
    assert "the source takes no more requests for now; Fivetran runs it again then" in caplog.text


async def test_rescheduled_without_a_schedule(desk: Desk) -> None:
    """With a manual schedule nobody would run it again: we do, at that time and not before, and once."""
    desk.behave(outcome="reschedule", times=1, rescheduled_seconds=0.5, schedule_type="manual")
    began = time.time()
    assert (await desk.run()).state is JobState.SUCCEEDED
    assert (desk.words, desk.posts) == (["stopped", "succeeded"], ["sync", "sync"])
    assert desk.syncs[1].timeline.started_wall - began > 0.6
    assert desk.fivetran.connection(desk.connection_id).schedule_type == "manual"


async def test_rescheduled_again_and_again(desk: Desk) -> None:
    """Each time that it is put off it is triggered again at the new time."""
    desk.behave(outcome="reschedule", rescheduled_seconds=0.2, duration=0.05, schedule_type="manual")
    running = desk.begin()
    await until(lambda: len(desk.posts) >= 3)
    desk.behave(outcome="succeed")
    assert (await running).state is JobState.SUCCEEDED
    assert set(desk.words[:-1]) == {"stopped"}
    assert len(desk.posts) == len(desk.words)


async def test_rescheduled_beyond_the_deadline(desk: Desk) -> None:
    """What is put off until after the deadline is not triggered again: the wait ends at the deadline."""
    desk.behave(outcome="reschedule", rescheduled_seconds=60, schedule_type="manual")
    with pytest.raises(JobTimeout, match="did not end in 1 s"):
        await desk.run(timeout=1)
    assert desk.posts == ["sync"]


@pytest.mark.parametrize("schedule", ["auto", "manual"])
async def test_rescheduled_may_fail(desk: Desk, schedule: str) -> None:
    """Where the policy says fail, a sync that is put off is a failure that names the time."""
    desk.behave(outcome="reschedule", rescheduled_seconds=60, schedule_type=schedule)
    with pytest.raises(JobFailed, match=r"takes no more requests.*put the sync off until 20\d\d-\d\d-\d\d"):
        await desk.run(rescheduled="fail")


async def test_rescheduled_may_be_left_to_others(desk: Desk, caplog: pytest.LogCaptureFixture) -> None:
    """Where the policy says wait, nothing is triggered; that somebody has to is said; the deadline holds."""
    desk.behave(outcome="reschedule", rescheduled_seconds=0.1, schedule_type="manual")
    with caplog.at_level(logging.INFO, "elt.jobs"), pytest.raises(JobTimeout):
        await desk.run(rescheduled="wait", timeout=0.8)
    assert desk.posts == ["sync"]
    assert "it waits for somebody to trigger it again" in caplog.text


async def test_a_trigger_again_that_is_lost(desk: Desk) -> None:
    """A trigger for a sync that was put off is sent again when Fivetran was out of order."""
    desk.behave(outcome="reschedule", times=1, rescheduled_seconds=0.1, schedule_type="manual")
    desk.fault(kind="status", status=503, method="POST", after=1, times=1)
    assert (await desk.run()).state is JobState.SUCCEEDED
    assert desk.posts == ["sync"] * 3


# -- paused, broken (dagster #28982), and whatever else the connection is not to be changed for


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"paused": True}, "it is paused"),
        ({"setup_state": "broken"}, "its setup is broken"),
        ({"setup_state": "incomplete"}, "its setup is incomplete"),
    ],
)
async def test_refused_before_anything_starts(desk: Desk, change: dict[str, Any], reason: str) -> None:
    """A paused, broken or unfinished connection is refused with the reason; in Fivetran nothing happens."""
    desk.behave(**change)
    with pytest.raises(InputError, match=f"raw_synthetic_0004.*can't be synced: {reason}"):
        await desk.run()
    assert (desk.posts, desk.changes, desk.entry.open) == ([], 0, False)


@pytest.mark.parametrize(
    ("outcome", "reason"),
    [
        ("pause", "was paused in Fivetran before our sync had ended"),
        ("break", r"setup is broken \(Reconnect: The source refused our credentials\)"),
    ],
)
async def test_trouble_while_it_runs(desk: Desk, outcome: str, reason: str) -> None:
    """A connection that is paused or breaks while it is watched ends the wait at once, with the reason."""
    desk.behave(outcome=outcome)
    with pytest.raises(JobFailed, match=reason):
        await desk.run()


def test_a_sync_goes_on_although_its_connection_was_paused() -> None:
    """Pausing is not said to stop a sync that runs: as long as it says `syncing`, it is waited for."""
    assert seen(connection(paused=True, status={"sync_state": "syncing"})).state is JobState.RUNNING


async def test_nothing_is_changed_on_the_way(desk: Desk) -> None:
    """No sync of any kind changes a connection: schedule and pause stay what they were (dagster and Airflow
    set the schedule to manual and unpause)."""
    desk.behave(schedule_type="auto")
    before = desk.fivetran.connection(desk.connection_id).reply()
    await desk.run()
    desk.journal.entries.clear()
    await desk.run(how="force")
    await desk.run(how="resync")
    after = desk.fivetran.connection(desk.connection_id).reply()
    same = ("paused", "schedule_type", "sync_frequency")
    assert [before[field] for field in same] == [after[field] for field in same]
    assert (desk.changes, desk.posts) == (0, ["sync", "force", "resync"])


# -- what may be sent twice, and what never


async def test_a_lost_reply(desk: Desk) -> None:
    """A trigger whose reply was lost is found by what the connection says, and not sent again."""
    desk.fault(kind="drop_after", method="POST", times=1)
    desk.behave(duration=0.3)
    result = await desk.run()
    assert (result.state, desk.posts, desk.words) == (JobState.SUCCEEDED, ["sync"], ["succeeded"])


@pytest.mark.parametrize("kind", ["drop", "drop_after"])
async def test_a_lost_trigger(desk: Desk, kind: str) -> None:
    """A trigger of which nothing is to be seen is sent again: if it did arrive, that does nothing."""
    desk.fault(kind=kind, method="POST", times=1)
    desk.behave(queued_seconds=0.9 if kind == "drop" else 4)  # longer than is looked for
    result = await desk.run()
    assert (result.state, desk.posts, desk.words) == (JobState.SUCCEEDED, ["sync", "sync"], ["succeeded"])


@pytest.mark.parametrize("how", ["force", "resync"])
@pytest.mark.parametrize("fault", [{"kind": "drop"}, {"kind": "status", "status": 502}])
async def test_what_is_never_sent_twice(desk: Desk, how: str, fault: dict[str, Any]) -> None:
    """A forced sync or a re-sync that may have been accepted is not asked for again, by a retry neither."""
    desk.fault(method="POST", times=1, **fault)
    for _ in range(2):
        with pytest.raises(VendorError, match=r"can't be told.*not asked for twice.*/dashboard/connectors/"):
            await desk.run(how=how)
    assert desk.posts == [how]
    assert desk.entry.open


@pytest.mark.parametrize("how", ["force", "resync"])
async def test_what_is_never_sent_twice_is_found(desk: Desk, how: str) -> None:
    """A forced sync or a re-sync whose reply was lost is found when the connection begins to sync."""
    desk.fault(kind="drop_after", method="POST", times=1)
    desk.behave(queued_seconds=0.2, duration=0.3)
    assert (await desk.run(how=how)).state is JobState.SUCCEEDED
    assert (desk.posts, desk.words) == ([how], ["succeeded"])


async def test_a_retry_of_a_forced_sync(desk: Desk) -> None:
    """A retry does not stop the sync that its first attempt has forced (prefect-fivetran would)."""
    desk.behave(outcome="stuck")
    with pytest.raises(JobTimeout, match="can't cancel; it goes on"):
        await desk.run(how="force", timeout=1.5)
    desk.fivetran.finish_sync(desk.connection_id, "succeeded")
    result = await desk.run(how="force")
    assert (result.state, desk.posts, desk.words) == (JobState.SUCCEEDED, ["force"], ["succeeded"])


async def test_a_retry_of_a_resync(desk: Desk) -> None:
    """A retry goes on with a re-sync that is unfinished, and has nothing loaded anew again."""
    desk.behave(outcome="fail", times=1)
    with pytest.raises(JobFailed):
        await desk.run(how="resync")
    assert (await desk.run(how="resync")).state is JobState.SUCCEEDED
    assert desk.posts == ["resync", "sync"]


@pytest.mark.parametrize("counts", [False, True])
async def test_force(desk: Desk, counts: bool) -> None:
    """A forced sync stops the one that runs; that one's failure, if it counts as one, is not ours."""
    desk.fivetran.settings.stopped_is_failed = counts
    desk.behave(duration=300)
    desk.fivetran.run_schedule(desk.connection_id)
    await until(lambda: desk.words == ["syncing"])
    desk.behave(duration=0.3, queued_seconds=0.2)
    result = await desk.run(how="force")
    assert (result.state, desk.words) == (JobState.SUCCEEDED, ["stopped", "succeeded"])
    assert result.duration is not None


async def test_a_forced_sync_that_fails(desk: Desk) -> None:
    """A forced sync's own failure is told from that of the one it stopped, a moment later."""
    desk.fivetran.settings.stopped_is_failed = True
    desk.behave(duration=300)
    desk.fivetran.run_schedule(desk.connection_id)
    desk.behave(duration=0.3, outcome="fail")
    with pytest.raises(JobFailed, match="Reconnect"):
        await desk.run(how="force")
    assert desk.words == ["stopped", "failed"]


async def test_a_resync_waits_for_what_runs(desk: Desk) -> None:
    """A re-sync comes after a sync that runs, and can't be had by taking that one for it."""
    desk.behave(duration=0.3)
    desk.fivetran.run_schedule(desk.connection_id)
    await desk.run(how="resync", scope={"public": ["rows"]}, on_active="adopt")
    assert [sync.historical for sync in desk.syncs] == [False, True]
    (asked,) = desk.sandbox.requests.find(vendor="fivetran", method="POST")
    assert asked.body == {"scope": {"public": ["rows"]}}


async def test_a_resync_that_is_in_conflict(desk: Desk) -> None:
    """A 409, which means that a sync began meanwhile, is waited out and asked for again: it had no effect."""
    desk.fault(
        kind="status", status=409, method="POST", times=1, body={"code": "Conflict", "message": "busy"}
    )
    assert (await desk.run(how="resync")).state is JobState.SUCCEEDED
    assert (desk.posts, desk.words) == (["resync", "resync"], ["succeeded"])


async def test_a_crash_between_start_and_journal(desk: Desk) -> None:
    """After a crash right behind the trigger, the same sync is found under the same id, at any time."""
    desk.behave(duration=0.5)
    vendor = FivetranVendor(desk.credentials)
    request = FivetranRequest(desk.connection_id, "sync", "orders", None, timeout=60)
    async with vendor.session():
        intent = Intent(since=datetime.now(UTC), baseline=await vendor.baseline(request))
        assert await vendor.find(request, intent) is None
        handle = await vendor.start(request, intent)
        found = await vendor.find(request, intent)
        assert found
        assert (found.job_id, found.baseline) == (handle.job_id, handle.baseline)
        await until(lambda: desk.words == ["succeeded"])  # and when it has ended by then
        assert (await vendor.find(request, intent)) == found


# -- a bad minute


@pytest.mark.parametrize(
    "fault",
    [
        {"kind": "status", "status": 503},
        {"kind": "html", "status": 502},
        {"kind": "reset"},
        {"kind": "truncated_json"},
        {"kind": "null_fields", "fields": ["status"]},
        {"kind": "status", "status": 429, "headers": {"Retry-After": "0"}},
    ],
)
async def test_a_bad_minute(desk: Desk, fault: dict[str, Any]) -> None:
    """Failing polls are borne, 429 among them; they fail no sync (kestra plugin-fivetran #92)."""
    desk.behave(duration=0.3)
    task = desk.begin()
    await desk.until_watched()
    desk.fault(method="GET", times=3, **fault)
    assert (await task).state is JobState.SUCCEEDED
    assert desk.posts == ["sync"]


async def test_a_retry_attaches(desk: Desk) -> None:
    """After an outage that outlasts the budget, a retry goes on waiting for the same sync."""
    desk.behave(outcome="stuck")
    first = desk.begin(outage=0.2)
    await desk.until_watched()
    job = desk.entry.handle
    desk.sandbox.pause()
    with pytest.raises(VendorUnavailable, match="was not touched"):
        await first
    desk.sandbox.resume()
    desk.fivetran.finish_sync(desk.connection_id, "succeeded")
    result = await desk.run()
    assert job
    assert (result.job_id, desk.posts) == (job.job_id, ["sync"])


async def test_an_hour_of_retry_after_is_said(desk: Desk, caplog: pytest.LogCaptureFixture) -> None:
    """A wait of an hour that Fivetran asks for is said at once, with what we make of it."""
    desk.behave(outcome="stuck")
    task = desk.begin()
    await desk.until_watched()
    desk.fivetran.settings.requests_per_hour = 1  # it has had more already
    await until(lambda: "It asks to wait 3600 s; we wait 120 s at a time" in caplog.text)
    assert "is not touched; looking again" in caplog.text
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_too_many_requests_at_the_start(desk: Desk) -> None:
    """A trigger that is refused with 429 had no effect, and is sent again after the wait."""
    desk.fault(kind="status", status=429, headers={"Retry-After": "0"}, method="POST", times=2)
    assert (await desk.run(how="force")).state is JobState.SUCCEEDED
    assert (desk.posts, desk.words) == (["force"] * 3, ["succeeded"])


@pytest.mark.parametrize(
    ("status", "code"), [(400, "InvalidInput"), (401, "AuthFailed"), (403, "Forbidden"), (404, "NotFound")]
)
async def test_a_refusal_is_an_error(desk: Desk, status: int, code: str) -> None:
    """A 4xx is an error with Fivetran's words, never a dictionary that is read as a state (Astronomer's hook
    returned it); nothing is looked for, nothing sent again."""
    body = {"code": code, "message": "This is not for you"}
    desk.fault(kind="status", status=status, body=body, method="POST")
    async with asyncio.timeout(60):
        with pytest.raises(VendorError, match=f"answered {status}: This is not for you"):
            await desk.run()
    assert (desk.posts, desk.entry.open) == (["sync"], False)


async def test_an_error_code_with_status_200(desk: Desk) -> None:
    """The code in the envelope has the last word: without `Success` a 200 is an error too."""
    desk.fault(kind="status", status=200, body={"code": "Oops", "message": "Not today"}, method="POST")
    with pytest.raises(VendorError, match="Oops: Not today"):
        await desk.run()


# -- no way to cancel


async def test_a_timeout_says_that_it_goes_on(desk: Desk) -> None:
    """At the timeout the error says that Fivetran can't cancel, and where to look; nothing is paused."""
    desk.behave(outcome="stuck")
    with pytest.raises(JobTimeout, match=r"fivetran can't cancel; it goes on.*/dashboard/connectors/"):
        await desk.run(timeout=0.4)
    assert (desk.words, desk.changes) == (["syncing"], 0)


async def test_cancelling(desk: Desk, caplog: pytest.LogCaptureFixture) -> None:
    """Cancelled in mid-sync, the log says with a link that it goes on; one that has ended is said to have."""
    desk.behave(outcome="stuck")
    task = desk.begin()
    await desk.until_watched()
    await until(lambda: desk.entry.handle is not None)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert "fivetran can't cancel; it goes on. http" in caplog.text
    assert desk.entry.open
    assert desk.words == ["syncing"]
    desk.fivetran.finish_sync(desk.connection_id, "succeeded")
    assert desk.entry.handle
    vendor = FivetranVendor(desk.credentials)
    assert (await cancel_job(vendor, desk.entry.handle)).words == "it had ended already: succeeded"


# -- many connections, few requests


async def _look(vendor: FivetranVendor, box: Sandbox, ids: list[str]) -> tuple[dict[str, Any], list[str]]:
    """The state of these connections, and the requests that it took."""
    now = datetime.now(UTC)
    handles = [vendor.handle(id_, Before(at=now, asked=now, state="scheduled")) for id_ in ids]
    box.requests.clear()
    statuses = await vendor.observe(handles)
    seen = {handle.resource_id: statuses[handle.job_id] for handle in handles}
    return seen, [f"{r.path.rsplit('/', 1)[-1]}?{r.query}" for r in box.requests.find(vendor="fivetran")]


async def test_one_odd_connection_hides_no_other(
    sandbox: Sandbox, credentials: FivetranCredentials, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A connection that can't be read is an error of its own, and the others of its page are seen."""
    ids = sandbox.fivetran.add_connections(8, duration=60)
    for id_ in ids:
        sandbox.fivetran.trigger(id_)
    reply = type(sandbox.fivetran.connection(ids[0])).reply

    def odd(connection: Any) -> dict[str, Any]:
        told = reply(connection)
        return told | {"paused": "who knows"} if connection.connection_id == ids[3] else told

    monkeypatch.setattr(type(sandbox.fivetran.connection(ids[0])), "reply", odd)
    vendor = FivetranVendor(credentials)
    async with vendor.session():
        states, asked = await _look(vendor, sandbox, ids)
    assert asked == ["connections?limit=1000", f"{ids[3]}?"]
    assert isinstance(states.pop(ids[3]), BadReply)
    assert {status.state for status in states.values()} == {JobState.RUNNING}


async def test_one_request_for_a_thousand(sandbox: Sandbox, credentials: FivetranCredentials) -> None:
    """A look at 900 connections is one request; a few are read one by one; past 1,000 a cursor leads on."""
    ids = sandbox.fivetran.add_connections(1200, duration=60)
    for id_ in ids:
        sandbox.fivetran.trigger(id_)
    vendor = FivetranVendor(credentials)
    async with vendor.session():
        states, asked = await _look(vendor, sandbox, ids[:900])
        assert asked == ["connections?limit=1000"]
        assert {status.state for status in states.values()} == {JobState.RUNNING}
        _, asked = await _look(vendor, sandbox, ids[:3])
        assert sorted(asked) == [f"{id_}?" for id_ in ids[:3]]
        states, asked = await _look(vendor, sandbox, ids)
        assert [query.split("&")[0] for query in asked] == ["connections?limit=1000"] * 2
        assert "cursor=" in asked[1]
        assert len(states) == 1200
        # Two pages cost as much as two connections, and four more than that.
        assert len((await _look(vendor, sandbox, ids[-4:]))[1]) == 2


async def test_a_connection_that_is_gone(sandbox: Sandbox, credentials: FivetranCredentials) -> None:
    """One that is in no page any more carries its own error; the others do not suffer."""
    ids = sandbox.fivetran.add_connections(5)
    vendor = FivetranVendor(credentials)
    async with vendor.session():
        states, asked = await _look(vendor, sandbox, [*ids, "no_such"])
    assert asked == ["connections?limit=1000", "no_such?"]
    assert "Cannot find connector with id 'no_such'" in str(states.pop("no_such"))
    assert {status.state for status in states.values()} == {JobState.QUEUED}


async def test_many_at_once(desk: Desk) -> None:
    """Twenty syncs at the same time are watched together, each to its own end."""
    desks = [desk, *(Desk(desk.sandbox, desk.credentials) for _ in range(19))]
    for each in desks:
        each.behave(outcome="stuck")
    waiting = [each.begin(poll=0.1) for each in desks]
    log = desk.sandbox.requests
    lists = {"vendor": "fivetran", "method": "GET", "path": "/connections$"}
    await until(lambda: all(each.journal.entries and each.entry.handle for each in desks))
    known = log.count(**lists)
    await until(lambda: log.count(**lists) > known + 1)  # the last of them are watched, too
    assert len(log.find(vendor="fivetran", method="POST")) == 20
    log.clear()
    await until(lambda: log.count(**lists) > 3)
    assert {entry.path.rsplit("/", 1)[-1] for entry in log.find(vendor="fivetran")} == {"connections"}
    for number, each in enumerate(desks):
        each.fivetran.finish_sync(each.connection_id, "failed" if number % 4 == 0 else "succeeded")
    outcomes = await asyncio.gather(*waiting, return_exceptions=True)
    assert [isinstance(outcome, JobFailed) for outcome in outcomes] == [n % 4 == 0 for n in range(20)]
