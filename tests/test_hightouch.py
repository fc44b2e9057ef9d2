"""Hightouch's task and block: its states, its ids, its silences, and a cancellation that does not exist."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import duckdb
import httpx
import pytest
from prefect import flow
from pydantic import SecretStr, TypeAdapter, ValidationError

from blocks import HightouchCredentials
from blocks.hightouch import SyncRun
from blocks.http import AuthError, BadReply, NotFoundError, VendorError, VendorUnavailable
from sandbox import Sandbox, catalog
from tasks.hightouch import HightouchSync, hightouch_check, hightouch_status, hightouch_sync
from tasks.hightouch_jobs import HightouchRequest, HightouchVendor, run_status
from tasks.jobs import (
    InputError,
    JobCancelled,
    JobFailed,
    JobHandle,
    JobPolicy,
    JobResult,
    JobState,
    JobStatus,
    JobTimeout,
    MemoryJournal,
    run_job,
)
from tests.jobs_fixtures import PREFECTS_SOCKETS, collected, until

__all__ = ["collected"]

pytestmark = [
    *PREFECTS_SOCKETS,
    pytest.mark.no_server,  # but for those that run tasks
    # Prefect's, on every line that a task outside of a flow logs.
    pytest.mark.filterwarnings("ignore:.*without a flow run id:UserWarning"),
]
TASKS = pytest.mark.usefixtures("prefect_server")
SYNC = 101
TABLE = "marts.mart_carrier_scorecard"


@pytest.fixture
def box(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> Iterator[Sandbox]:
    """A sandbox whose warehouse has ten rows for each sync."""
    monkeypatch.setattr(HightouchVendor, "grace", 0.4)
    with duckdb.connect(str(sandbox.warehouse.path)) as warehouse:
        warehouse.execute("CREATE SCHEMA marts")
        for spec in catalog.SYNCS:
            warehouse.sql("SELECT range AS n FROM range(10)").create(spec.table)
    return sandbox


@pytest.fixture
def credentials(box: Sandbox) -> HightouchCredentials:
    return HightouchCredentials(api_key=SecretStr(catalog.HIGHTOUCH_API_KEY), base_url=box.hightouch_url)


def sync(credentials: HightouchCredentials | str, sync_id: Any = SYNC, **policy: Any) -> HightouchSync:
    settings = JobPolicy(**{"poll": 0.05, "timeout": 90.0, **policy})
    return HightouchSync(credentials=credentials, sync_id=sync_id, policy=settings)


async def run(credentials: HightouchCredentials, journal: MemoryJournal, **policy: Any) -> JobResult:
    """One attempt; attempts with one journal are retries of each other."""
    settings = JobPolicy(**{"poll": 0.05, "timeout": 90.0, **policy})
    request = HightouchRequest(str(SYNC), "sync", "crm", alone=settings.on_active != "queue")
    return await run_job(HightouchVendor(credentials), request, settings, journal=journal)


def triggers(box: Sandbox) -> int:
    return box.requests.count(vendor="hightouch", method="POST")


def end(box: Sandbox, sync_id: int = SYNC) -> None:
    """Let the sync's latest run succeed now."""
    timeline = box.hightouch.runs_of(sync_id)[-1].timeline
    assert timeline
    timeline.finish("success")


def run_ids(box: Sandbox) -> list[str]:
    return [str(run.run_id) for run in box.hightouch.runs_of(SYNC)]


# -- states


@TASKS
@pytest.mark.parametrize(
    ("outcome", "state", "error"),
    [
        ("succeed", JobState.SUCCEEDED, None),
        ("zero_rows", JobState.SUCCEEDED, None),
        ("warn", JobState.PARTIAL, None),
        ("fail", JobState.FAILED, JobFailed),
        ("interrupt", JobState.FAILED, JobFailed),
        ("cancel", JobState.CANCELLED, JobCancelled),
    ],
)
async def test_states(
    box: Sandbox,
    credentials: HightouchCredentials,
    outcome: str,
    state: JobState,
    error: type[Exception] | None,
) -> None:
    """Each of Hightouch's ends has its class: a warning is partial, interrupted is a failure."""
    box.hightouch.set(SYNC, outcome=outcome)
    if error is None:
        result = await hightouch_sync(sync(credentials))
    else:
        with pytest.raises(error) as caught:
            await hightouch_sync(sync(credentials))
        result = caught.value.result  # type: ignore[attr-defined]
        assert result.message
    assert result.state is state
    assert [result.job_id] == run_ids(box)
    assert result.url
    assert result.url.endswith(f"/{catalog.HIGHTOUCH_WORKSPACE_ID}/syncs/{SYNC}/runs/{result.job_id}")
    assert (result.name, result.owner) == ("carrier-scorecard-to-crm", "flight-ops")
    if outcome == "succeed":
        assert (result.rows, result.rows_rejected, result.bytes) == (10, 0, None)
        assert result.duration is not None


async def test_every_word_of_the_contract_is_known() -> None:
    """All states of the contract are known words; any other is not an end."""

    def status(word: str) -> JobStatus:
        return run_status(
            TypeAdapter(SyncRun).validate_python({"id": 1, "status": word, "createdAt": "2022-02-08"})
        )

    going_on = ["queued", "pending", "querying", "processing", "reporting"]
    ends = ["success", "warning", "failed", "cancelled", "interrupted"]
    assert all(status(word).known for word in going_on + ends)
    assert [word for word in going_on + ends if status(word).state.terminal] == ends
    strange = status("completed_with_errors")
    assert (strange.known, strange.state.terminal) == (False, False)


@pytest.mark.parametrize(
    ("on_partial", "passes", "level"),
    [
        (None, True, logging.WARNING),
        ("warn", True, logging.WARNING),
        ("ok", True, logging.INFO),
        ("fail", False, None),
    ],
)
async def test_what_a_warning_is(
    box: Sandbox,
    credentials: HightouchCredentials,
    caplog: pytest.LogCaptureFixture,
    on_partial: Any,
    passes: bool,
    level: int | None,
) -> None:
    """Rejected rows are a warning by default, and what the policy says else; they are counted either way."""
    box.hightouch.set(SYNC, outcome="warn")
    with caplog.at_level(logging.INFO, "elt.jobs"):
        if passes:
            result = await run(credentials, MemoryJournal(), on_partial=on_partial)
        else:
            with pytest.raises(JobFailed) as caught:
                await run(credentials, MemoryJournal(), on_partial=on_partial)
            result = caught.value.result
    assert (result.rows, result.rows_rejected, result.good) == (9, 1, passes)
    assert "1 rows were rejected" in str(result.message)
    levels = [record.levelno for record in caplog.records if "rejected" in record.message]
    assert levels == ([level] if level else [])


@TASKS
async def test_an_unknown_word(box: Sandbox, credentials: HightouchCredentials) -> None:
    """A word that is in no contract is waited through."""
    box.hightouch.set(SYNC, outcome="unknown_word", word="completed_with_errors", word_seconds=0.3)
    assert (await hightouch_sync(sync(credentials))).state is JobState.SUCCEEDED


@TASKS
async def test_a_run_that_is_not_visible_yet(box: Sandbox, credentials: HightouchCredentials) -> None:
    """An empty list of runs right after the trigger is waited through, not an error."""
    box.hightouch.set(SYNC, visibility_delay=0.3)
    result = await hightouch_sync(sync(credentials))
    assert [result.job_id] == run_ids(box)


@TASKS
async def test_a_run_that_never_shows(box: Sandbox, credentials: HightouchCredentials) -> None:
    """A run that stays invisible beyond grace and budget is an error that names it."""
    box.hightouch.set(SYNC, visibility_delay=60)
    with pytest.raises(VendorUnavailable, match=r"not in its replies.*was not touched") as caught:
        await hightouch_sync(sync(credentials, outage=0.5))
    assert run_ids(box)[0] in str(caught.value)


def test_ids_are_text_whatever_they_come_as() -> None:
    """Ids are numbers in some replies and text in others; nulls and missing counts are borne."""
    base = {"status": "success", "createdAt": "2022-02-08T16:11:04.712Z"}
    for run_id in (6134, "6134"):
        found = SyncRun.model_validate(
            {"id": run_id, **base, "startedAt": None, "successfulRows": {"addedCount": None}, "error": None}
        )
        assert found.id == "6134"
        assert found.successful
        assert found.successful.total == 0


# -- starting


async def test_a_lost_reply(box: Sandbox, credentials: HightouchCredentials) -> None:
    """A trigger whose reply was lost is found among the runs, not sent again."""
    box.faults.add(kind="drop_after", method="POST", path="/trigger$", times=1)
    box.hightouch.set(SYNC, visibility_delay=0.2)
    result = await run(credentials, MemoryJournal())
    assert [result.job_id] == run_ids(box)
    assert triggers(box) == 1


async def test_a_retry_attaches(box: Sandbox, credentials: HightouchCredentials) -> None:
    """A retry after an outage attaches to the run of the first attempt."""
    journal = MemoryJournal()
    box.hightouch.set(SYNC, outcome="stuck")
    first = asyncio.create_task(run(credentials, journal, outage=0.2))
    await until(lambda: any(entry.handle for entry in journal.entries.values()))
    box.pause()
    with pytest.raises(VendorUnavailable, match="was not touched"):
        await first
    box.resume()
    end(box)
    result = await run(credentials, journal)
    assert [result.job_id] == run_ids(box)
    assert triggers(box) == 1


async def test_a_refusal_with_status_200(box: Sandbox, credentials: HightouchCredentials) -> None:
    """A validation error that comes with 200 is a refusal: said at once, and nothing is looked for."""
    body = {"message": "Validation failed", "details": {"syncId": {"message": "not yours"}}}
    box.faults.add(kind="status", status=200, body=body, method="POST")
    journal = MemoryJournal()
    async with asyncio.timeout(60):
        with pytest.raises(VendorError, match=r"Validation failed.*not yours") as caught:
            await run(credentials, journal)
    assert not isinstance(caught.value, BadReply)
    assert triggers(box) == 1
    assert all(not entry.open for entry in journal.entries.values())


@TASKS
async def test_ours_comes_after_the_one_that_runs(box: Sandbox, credentials: HightouchCredentials) -> None:
    """While a run is in progress Hightouch queues one more: that one is ours, and its end is waited for."""
    box.hightouch.set(SYNC, duration=0.6)
    box.hightouch.trigger(SYNC)
    result = await hightouch_sync(sync(credentials))
    first, second = box.hightouch.runs_of(SYNC)
    assert result.job_id == str(second.run_id)
    assert first.status == "success"


@TASKS
@pytest.mark.parametrize("disabled_late", [False, True])
async def test_disabled(box: Sandbox, credentials: HightouchCredentials, disabled_late: bool) -> None:
    """A disabled sync is refused before it is triggered; enabled again, it runs."""
    async with credentials.api() as api:  # one client, which remembers what it has read
        if disabled_late:
            await api.sync(str(SYNC))
        box.hightouch.set(SYNC, disabled=True)
        with pytest.raises((InputError, VendorError), match="disabled"):
            await hightouch_sync(sync(credentials))
        box.hightouch.set(SYNC, disabled=False)
        assert (await hightouch_sync(sync(credentials))).state is JobState.SUCCEEDED
    assert len(run_ids(box)) == 1


# -- no way to cancel


@TASKS
async def test_a_timeout_says_that_it_goes_on(box: Sandbox, credentials: HightouchCredentials) -> None:
    """At the timeout the error says that Hightouch can't cancel, and names the run and its page."""
    box.hightouch.set(SYNC, outcome="stuck")
    with pytest.raises(JobTimeout, match=r"hightouch can't cancel; it goes on.*/runs/") as caught:
        await hightouch_sync(sync(credentials, timeout=0.6))
    assert f"job {run_ids(box)[0]}" in str(caught.value)


async def test_a_cancellation_says_that_it_goes_on(
    box: Sandbox, credentials: HightouchCredentials, caplog: pytest.LogCaptureFixture
) -> None:
    """Cancelled in mid-run, the log says with a link that the run goes on; a retry attaches to it."""
    box.hightouch.set(SYNC, duration=2)
    journal = MemoryJournal()
    waiting = asyncio.create_task(run(credentials, journal))
    await until(lambda: box.requests.count(vendor="hightouch", path="/runs") > 0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert "hightouch can't cancel; it goes on. http" in caplog.text
    result = await run(credentials, journal)
    assert [result.job_id] == run_ids(box)


# -- many runs


class _Many:
    """A workspace of 250 syncs, as its list shows them, on top of the sandbox's HTTP; without a limit."""

    def __init__(self, box: Sandbox, credentials: HightouchCredentials) -> None:
        box.hightouch.settings.requests_per_10_seconds = None
        credentials = credentials.model_copy(update={"requests_per_10_seconds": 100_000})
        for number in range(1000, 1250):
            spec = catalog.SyncSpec(number, f"sync-{number}", TABLE, "n", "crm", "flight-ops")
            known = box.hightouch.syncs[SYNC]
            box.hightouch.syncs[number] = type(known)(spec, known.behaviour.model_copy())
        self.box = box
        self.vendor = HightouchVendor(credentials)
        self.handles = [self.start(number) for number in range(1000, 1250)]

    def start(self, number: int) -> JobHandle:
        run = self.box.hightouch.trigger(number)
        return JobHandle(
            vendor="hightouch",
            resource_id=str(number),
            job_id=str(run.run_id),
            started_at=datetime.now(UTC),
        )

    async def look(self) -> tuple[dict[str, Any], int]:
        """What is seen of all runs, and how many requests that took."""
        before = self.box.requests.count(vendor="hightouch")
        seen = dict(await self.vendor.observe(self.handles))
        return seen, self.box.requests.count(vendor="hightouch") - before


async def test_many_runs_few_requests(
    box: Sandbox, credentials: HightouchCredentials, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A look at 250 runs takes three requests, now and then one to make sure, and one per run that ended."""
    monkeypatch.setattr("tasks.hightouch_jobs._SURE_FOR", 60.0)
    box.hightouch.set(SYNC, outcome="stuck", duration=0.1)
    many = _Many(box, credentials)
    async with many.vendor.session():
        await until(
            lambda: all(run.status == "processing" for s in box.hightouch.syncs.values() for run in s.runs)
        )
        _, requests = await many.look()
        assert requests == 4
        _, requests = await many.look()
        assert requests == 3
        box.hightouch.finish_run(int(many.handles[7].job_id), "interrupted")
        seen, requests = await many.look()
        assert requests == 4
    states = {state.state for job_id, state in seen.items() if job_id != many.handles[7].job_id}
    assert states == {JobState.RUNNING}
    assert seen[many.handles[7].job_id].state is JobState.FAILED


async def test_a_few_runs_of_a_large_workspace(
    box: Sandbox, credentials: HightouchCredentials, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once it is known how many pages the list has, runs that are no more than those are read one by one."""
    monkeypatch.setattr("blocks.hightouch._PAGE", 50)
    box.hightouch.set(SYNC, outcome="stuck", duration=0.1)
    many = _Many(box, credentials)
    listed = len(box.hightouch.syncs) // 50 + 1
    async with many.vendor.session():
        many.handles = many.handles[:4]
        await many.look()
        assert box.requests.count(vendor="hightouch", path="/syncs$") == listed > 4
        box.requests.clear()
        seen, requests = await many.look()
        assert (len(seen), requests) == (4, 4)
        assert box.requests.count(vendor="hightouch", path="/runs$") == 4


async def test_one_odd_sync_hides_no_other(
    box: Sandbox, credentials: HightouchCredentials, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sync that can't be read in the list is read by its run; pages go on behind it."""
    box.hightouch.set(SYNC, outcome="stuck", duration=0.1)
    many = _Many(box, credentials)
    reply = type(box.hightouch.syncs[SYNC]).reply

    def odd(sync: Any) -> dict[str, Any]:
        told = reply(sync)
        return told | {"lastRunAt": "who knows"} if sync.spec.sync_id == 1007 else told

    monkeypatch.setattr(type(box.hightouch.syncs[SYNC]), "reply", odd)
    async with many.vendor.session():
        await until(
            lambda: all(run.status == "processing" for s in box.hightouch.syncs.values() for run in s.runs)
        )
        seen, _ = await many.look()
        _, requests = await many.look()
    assert len(seen) == 250
    assert {status.state for status in seen.values()} == {JobState.RUNNING}
    assert requests <= 3 + 2  # its own, and now and then one to make sure


async def test_an_end_behind_the_next_run(box: Sandbox, credentials: HightouchCredentials) -> None:
    """Our run's end is seen although the sync is busy with the next run already."""
    box.hightouch.set(SYNC, outcome="stuck", duration=0.1)
    many = _Many(box, credentials)
    ours = many.handles[0]
    async with many.vendor.session():
        await many.look()
        many.start(1000)  # queued behind ours
        box.hightouch.finish_run(int(ours.job_id), "interrupted")
        await until(lambda: box.hightouch.runs_of(1000)[1].status == "processing")
        seen, _ = await many.look()
    assert box.hightouch.syncs[1000].reply()["status"] == "processing"
    assert seen[ours.job_id].state is JobState.FAILED


async def test_an_end_that_looks_like_the_beginning(
    box: Sandbox, credentials: HightouchCredentials, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that was over before the first look is not taken for the next one for ever."""
    monkeypatch.setattr("tasks.hightouch_jobs._SURE_FOR", 0.0)
    box.hightouch.set(SYNC, outcome="stuck", duration=0.1)
    many = _Many(box, credentials)
    ours = many.handles[0]
    many.start(1000)
    box.hightouch.finish_run(int(ours.job_id), "interrupted")
    await until(lambda: box.hightouch.runs_of(1000)[1].status == "processing")
    many.handles = many.handles[:5]
    async with many.vendor.session():
        looks = [(await many.look())[0][ours.job_id].state for _ in range(5)]
    assert JobState.FAILED in looks


# -- input


@TASKS
@pytest.mark.parametrize(
    ("ids", "says"),
    [((7,), "knows no sync 7"), ((101, 102, 101), "101 is listed more than once")],
)
async def test_check_refuses(
    box: Sandbox, credentials: HightouchCredentials, ids: tuple[int, ...], says: str
) -> None:
    """An unknown or repeated sync is refused before anything is started."""
    with pytest.raises(InputError, match=f"{says}.*[Nn]othing was started"):
        await hightouch_check([sync(credentials, sync_id) for sync_id in ids])
    assert triggers(box) == 0


@TASKS
async def test_check_tells_of_a_disabled_sync(box: Sandbox, credentials: HightouchCredentials) -> None:
    """A disabled sync carries its problem, so that the rule of the run decides what becomes of it."""
    box.hightouch.set(102, disabled=True)
    fine, disabled = await hightouch_check([sync(credentials, 101), sync(credentials, 102)])
    assert fine.problem is None
    assert "weather-delays-to-braze (102) is disabled" in (disabled.problem or "")


@TASKS
async def test_check_fills_in(credentials: HightouchCredentials) -> None:
    """A check gives names and owners by slug and tag."""
    checked = await hightouch_check([sync(credentials, 101), sync(credentials, "102")])
    assert [(found.request.name, found.request.owner) for found in checked] == [
        ("carrier-scorecard-to-crm", "flight-ops"),
        ("weather-delays-to-braze", "weather-desk"),
    ]


@pytest.mark.parametrize("sync_id", ["crm", "", "1 2", True, None, -1])
def test_a_sync_id_that_is_none(sync_id: Any) -> None:
    """A sync is named by its number, as a number or as text."""
    with pytest.raises(ValidationError):
        HightouchSync(credentials="x", sync_id=sync_id)
    assert HightouchSync.model_validate({"credentials": "x", "sync_id": 101}).sync_id == "101"


@TASKS
@pytest.mark.parametrize("key", ["wrong-key", "**********"])
def test_a_wrong_key_is_one_line(
    credentials: HightouchCredentials, key: str, caplog: Any, capfd: Any
) -> None:
    """A wrong or a masked key is said in one line, without a traceback and without the key."""
    wrong = credentials.model_copy(update={"api_key": SecretStr(key)})

    @flow
    async def activate() -> None:
        await hightouch_sync(sync(wrong))

    with pytest.raises(AuthError, match="masked.*save the block" if "*" in key else "Unauthorized"):
        asyncio.run(activate())
    seen = caplog.text + "".join(capfd.readouterr())
    assert "Hightouch" in seen
    assert "Traceback" not in seen
    assert "wrong-key" not in seen


# -- what the contract sheet warns of


@pytest.mark.parametrize("form", ["2022", "2026"])
@pytest.mark.parametrize("oldest_first", [False, True])
async def test_a_lost_run_among_hundreds(
    box: Sandbox, credentials: HightouchCredentials, oldest_first: bool, form: Any
) -> None:
    """Whichever way the API's list runs, and in either form of it, a lost start is found among 250 runs."""
    box.hightouch.settings.form = form
    box.hightouch.settings.oldest_first = oldest_first
    box.hightouch.settings.requests_per_10_seconds = None
    box.hightouch.set(SYNC, duration=0.0)
    first = box.hightouch.trigger(SYNC)
    await until(lambda: first.at()[2])
    first.created_wall -= 100
    runs = box.hightouch.sync(SYNC).runs
    for number in range(250):
        long_ago = first.created_wall - 1000 + number
        runs.insert(number, replace(first, run_id=5000 + number, created_wall=long_ago))
    box.faults.add(kind="drop_after", method="POST", path="/trigger$", times=1)
    result = await run(credentials, MemoryJournal())
    assert result.job_id == run_ids(box)[-1]
    assert triggers(box) == 1


async def test_runs_are_asked_for_without_times(box: Sandbox, credentials: HightouchCredentials) -> None:
    """Filters on time hide runs that have not started, so a lost run that is queued is found without them."""
    box.hightouch.set(SYNC, queued_seconds=1.5)
    box.faults.add(kind="drop_after", method="POST", path="/trigger$", times=1)
    result = await run(credentials, MemoryJournal())
    assert [result.job_id] == run_ids(box)
    asked = " ".join(request.query for request in box.requests.find(path="/runs$"))
    assert "after" not in asked
    assert "within" not in asked


async def test_a_reply_that_never_comes(box: Sandbox, credentials: HightouchCredentials) -> None:
    """A poll without a reply ends by itself: no request waits for ever."""
    box.faults.add(kind="delay", delay=600, method="GET", path="/runs$", times=1)
    async with asyncio.timeout(60), credentials.api() as api:
        assert api._http.timeout.read == 60.0
        api._http.timeout = httpx.Timeout(0.3)
        assert (await run(credentials, MemoryJournal())).state is JobState.SUCCEEDED


async def test_too_many_requests(
    box: Sandbox, credentials: HightouchCredentials, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A 429 comes without a time to wait: it is borne with a pause of our own."""
    monkeypatch.setattr("blocks.errors.RATE_LIMIT_PAUSE", 0.3)
    fault = box.faults.add(kind="status", status=429, method="GET", path="/runs$", times=2)
    assert (await run(credentials, MemoryJournal())).state is JobState.SUCCEEDED
    assert box.faults.hits(fault) == 2


async def test_an_error_that_is_only_text(box: Sandbox, credentials: HightouchCredentials) -> None:
    """A 500 whose body is the JSON text "Internal Server Error" is borne as any failure of Hightouch's."""
    box.faults.add(
        kind="status",
        status=500,
        body='"Internal Server Error"',
        headers={"content-type": "application/json"},
        path="/runs$",
        times=2,
    )
    assert (await run(credentials, MemoryJournal())).state is JobState.SUCCEEDED


@pytest.mark.parametrize(
    ("fields", "state", "rejected", "message"),
    [
        (
            {"failedRows": {"addedCount": 2, "changedCount": 1, "removedCount": 0}},
            "PARTIAL",
            3,
            "3 rows were",
        ),
        ({"failedRows": None, "error": None}, "PARTIAL", None, "some rows were rejected"),
        (
            {"failedRows": {"addedCount": 1}, "error": "No such field"},
            "PARTIAL",
            1,
            "rejected: No such field",
        ),
        ({"error": {"message": "No such field"}}, "PARTIAL", None, "rejected: No such field"),
        ({"completionRatio": 0.54, "status": "success"}, "SUCCEEDED", 0, None),
        ({"status": "success", "failedRows": {"addedCount": 2}}, "SUCCEEDED", 2, None),
        ({"completionRatio": 1, "status": "reporting", "finishedAt": "2022-02-08"}, "RUNNING", None, None),
    ],
)
def test_what_a_run_tells(
    fields: dict[str, Any], state: str, rejected: int | None, message: str | None
) -> None:
    """A warning is read whatever is absent beside it; neither the ratio nor a time is a sign of the end."""
    base = {"id": 42, "status": "warning", "createdAt": "2022-02-08T16:11:04.712Z", "startedAt": None}
    status = run_status(SyncRun.model_validate(base | fields))
    assert (status.state, status.rows_rejected) == (state, rejected)
    assert (message in str(status.message)) if message else status.message is None


@pytest.mark.parametrize(
    ("most", "rejected", "passes"), [(2, 0.2, True), (1, 0.2, False), (0, 0.1, False), (None, 0.9, True)]
)
@pytest.mark.parametrize("on_partial", ["warn", "ok"])
async def test_a_threshold_of_rejected_rows(
    box: Sandbox,
    credentials: HightouchCredentials,
    on_partial: Any,
    most: int | None,
    rejected: float,
    passes: bool,
) -> None:
    """A warning passes up to so many rejected rows, and is a failure beyond, whatever `on_partial` says."""
    box.hightouch.set(SYNC, outcome="warn", rejected=rejected)
    policy = {"on_partial": on_partial, "max_rows_rejected": most}
    if passes:
        assert (await run(credentials, MemoryJournal(), **policy)).rows_rejected == int(rejected * 10)
    else:
        with pytest.raises(JobFailed, match=f"were rejected; at most {most} are borne"):
            await run(credentials, MemoryJournal(), **policy)


async def test_rejected_rows_that_are_not_counted(box: Sandbox, credentials: HightouchCredentials) -> None:
    """Under a threshold, a warning that does not say how many rows it means does not pass."""
    box.hightouch.set(SYNC, outcome="warn")
    box.faults.add(kind="null_fields", fields=["failedRows"], path="/runs$")
    with pytest.raises(JobFailed, match="does not say how many rows were rejected; at most 5 are borne"):
        await run(credentials, MemoryJournal(), max_rows_rejected=5)
    box.hightouch.set(SYNC, outcome="succeed")
    clean = await run(credentials, MemoryJournal(), max_rows_rejected=0)
    assert (clean.state, clean.rows_rejected) == (JobState.SUCCEEDED, 0)  # else it would be a warning


@TASKS
@pytest.mark.parametrize("full_resync", [False, True])
async def test_full_resync(box: Sandbox, credentials: HightouchCredentials, full_resync: bool) -> None:
    """A full resync sends all rows again; a plain run only what has changed since the last."""
    await run(credentials, MemoryJournal())
    with duckdb.connect(str(box.warehouse.path)) as warehouse:
        warehouse.table(TABLE).insert([100])
    result = await hightouch_sync(sync(credentials).model_copy(update={"full_resync": full_resync}))
    assert result.rows == (11 if full_resync else 1)
    assert box.requests.find(method="POST")[-1].body == {"fullResync": full_resync}


async def test_a_sync_and_its_full_resync_in_one_run(box: Sandbox, credentials: HightouchCredentials) -> None:
    """In the journal a full resync is a job of its own, which a sync of the same does not stand for."""
    journal = MemoryJournal()
    first = await run(credentials, journal)
    request = HightouchRequest(str(SYNC), "full-resync", "crm")
    again = await run_job(HightouchVendor(credentials), request, JobPolicy(poll=0.05), journal=journal)
    assert (first.rows, again.rows) == (10, 10)
    assert sorted(journal.entries) == ["hightouch:full-resync:101", "hightouch:sync:101"]


@TASKS
@pytest.mark.parametrize("on_active", ["skip", "fail"])
async def test_a_run_in_progress(box: Sandbox, credentials: HightouchCredentials, on_active: str) -> None:
    """Hightouch would queue ours behind a run that goes on; a policy that wants none of that is kept."""
    box.hightouch.set(SYNC, outcome="stuck")
    first = box.hightouch.trigger(SYNC)
    asked = sync(credentials, on_active=on_active)
    if on_active == "skip":
        result = await hightouch_sync(asked)
        assert (result.state, result.job_id, result.good) == (JobState.SKIPPED, str(first.run_id), False)
    else:
        with pytest.raises(JobFailed, match=f"job {first.run_id} is running already.*policy says fail"):
            await hightouch_sync(asked)
    assert triggers(box) == 0


@pytest.mark.parametrize("ascending", [False, True])
async def test_adopting_a_run(
    box: Sandbox, credentials: HightouchCredentials, ascending: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run that goes on is found whichever way the API's list is ordered, and taken as ours."""
    box.hightouch.settings.oldest_first = ascending
    box.hightouch.settings.requests_per_10_seconds = None
    monkeypatch.setattr("blocks.hightouch._PAGE", 2)
    box.hightouch.set(SYNC, duration=0.0)
    for _ in range(5):
        box.hightouch.trigger(SYNC)
        await until(lambda: box.hightouch.runs_of(SYNC)[-1].at()[2])
    box.hightouch.set(SYNC, outcome="stuck")
    last = box.hightouch.trigger(SYNC)
    journal = MemoryJournal()
    waiting = asyncio.create_task(run(credentials, journal, on_active="adopt"))
    await until(lambda: any(entry.handle for entry in journal.entries.values()))
    end(box)
    result = await waiting
    assert (result.state, result.job_id, triggers(box)) == (JobState.SUCCEEDED, str(last.run_id), 0)


async def test_a_full_resync_adopts_nothing(box: Sandbox, credentials: HightouchCredentials) -> None:
    """A run does not say whether it is a full one, so a full resync waits for it and is then asked for."""
    box.hightouch.set(SYNC, duration=0.5)
    first = box.hightouch.trigger(SYNC)
    request = HightouchRequest(str(SYNC), "full-resync", "crm", alone=True)
    policy = JobPolicy(poll=0.05, on_active="adopt")
    result = await run_job(HightouchVendor(credentials), request, policy, journal=MemoryJournal())
    assert (result.job_id != str(first.run_id), triggers(box)) == (True, 1)


async def test_an_unknown_word_with_an_end(box: Sandbox, credentials: HightouchCredentials) -> None:
    """What ended under a word that we don't know does not stand in the way for ever; what goes on does."""
    box.hightouch.set(SYNC, duration=0.0, outcome="unknown_word", word="completed_with_errors")
    box.hightouch.trigger(SYNC)
    with pytest.raises(JobFailed, match="is running already"):
        await run(credentials, MemoryJournal(), on_active="fail")
    [only] = box.hightouch.runs_of(SYNC)
    assert only.timeline
    only.timeline.finish("completed_with_errors")
    box.hightouch.set(SYNC, outcome="succeed")
    assert (await run(credentials, MemoryJournal(), on_active="fail")).state is JobState.SUCCEEDED


@TASKS
async def test_check_of_many_reads_pages(box: Sandbox, credentials: HightouchCredentials) -> None:
    """250 syncs are looked up in three requests."""
    known = box.hightouch.syncs[SYNC]
    for number in range(1000, 1248):
        spec = replace(known.spec, sync_id=number, slug=f"sync-{number}")
        box.hightouch.syncs[number] = type(known)(spec, known.behaviour.model_copy())
    found = await hightouch_check([sync(credentials, number) for number in box.hightouch.syncs])
    assert found[2].request.label == "sync-1000"
    assert box.requests.count(vendor="hightouch", method="GET") == 3


@TASKS
async def test_status_of_any_run(box: Sandbox, credentials: HightouchCredentials) -> None:
    """The state of a run that somebody else started can be had at any time; it is not judged."""
    box.hightouch.set(SYNC, outcome="stuck")
    run_id = str(box.hightouch.trigger(SYNC).run_id)
    now = await hightouch_status(credentials, str(SYNC), run_id)
    assert (now.state.terminal, now.job_id, now.owner) == (False, run_id, "flight-ops")
    box.hightouch.finish_run(int(run_id), "failed")
    assert (await hightouch_status(credentials, str(SYNC), run_id)).state is JobState.FAILED
    with pytest.raises(NotFoundError, match="sync 101 has no run 1"):
        await hightouch_status(credentials, str(SYNC), "1")


@TASKS
async def test_html_is_not_hightouch(box: Sandbox, credentials: HightouchCredentials) -> None:
    """A base URL of something else than the API is said at once."""
    box.faults.add(kind="html", status=200)
    async with asyncio.timeout(60):
        with pytest.raises(BadReply, match="Check that the base URL"):
            await hightouch_sync(sync(credentials))
