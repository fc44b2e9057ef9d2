"""Census's task and block: its two kinds of status, its skipped runs, and its many ways to say the end."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import httpx
import pytest
from prefect import flow
from pydantic import SecretStr, TypeAdapter, ValidationError

from blocks import CensusCredentials
from blocks.census import SyncRun
from blocks.http import AuthError, NotFoundError, VendorError, VendorUnavailable
from sandbox import Sandbox
from sandbox.census import Sync
from tasks.census import (
    CensusSync,
    CensusVendor,
    _status,
    census_check,
    census_status,
    census_sync,
)
from tasks.jobs import (
    InputError,
    JobCancelled,
    JobFailed,
    JobHandle,
    JobState,
    JobStatus,
    JobTimeout,
    MemoryJournal,
)
from tests.census_fixtures import SYNC, box, credentials, entry_of, run, run_ids, sync, triggers, words
from tests.jobs_fixtures import PREFECTS_SOCKETS, collected, until

__all__ = ["box", "collected", "credentials"]

pytestmark = [
    *PREFECTS_SOCKETS,
    pytest.mark.no_server,  # but for those that run tasks
    # Prefect's, on every line that a task outside of a flow logs.
    pytest.mark.filterwarnings("ignore:.*without a flow run id:UserWarning"),
]
TASKS = pytest.mark.usefixtures("prefect_server")
APPENDS = 402


def reply(**fields: Any) -> JobStatus:
    """What is made of a run as Census replies it."""
    base = {"id": 94, "sync_id": 52, "status": "completed", "created_at": "2021-10-20T02:51:07.546Z"}
    return _status(TypeAdapter(SyncRun).validate_python({**base, **fields}))


# -- states


@TASKS
@pytest.mark.parametrize(
    ("outcome", "state", "error"),
    [
        ("succeed", JobState.SUCCEEDED, None),
        ("zero_rows", JobState.SUCCEEDED, None),
        ("partial", JobState.PARTIAL, None),
        ("fail", JobState.FAILED, JobFailed),
        ("cancel", JobState.CANCELLED, JobCancelled),
    ],
)
async def test_states(
    box: Sandbox,
    credentials: CensusCredentials,
    outcome: str,
    state: JobState,
    error: type[Exception] | None,
) -> None:
    """Each of Census's ends has its class, with rows, reason and link: nothing but a clean end is silent."""
    box.census.set(SYNC, outcome=outcome)
    if error is None:
        result = await census_sync(sync(credentials))
    else:
        with pytest.raises(error) as caught:
            await census_sync(sync(credentials))
        result = caught.value.result  # type: ignore[attr-defined]
        assert result.message
    assert result.state is state
    assert [result.job_id] == run_ids(box)
    assert result.name == "Fleet to Salesforce"
    assert result.duration is not None
    assert result.url == f"{box.url}/census/workspaces/3167/syncs/{SYNC}/sync-history"
    async with httpx.AsyncClient() as browser:
        page = await browser.get(result.url)
    assert run_ids(box)[0] in page.text
    if outcome == "succeed":
        assert (result.rows, result.rows_rejected, result.bytes) == (100, 0, None)
    if outcome == "fail":
        assert "The destination refused the request: 403 Forbidden" in str(result.message)


def test_the_end_is_not_told_by_completed_at() -> None:
    """A failed run has no completed_at, and has ended all the same; a time alone is no end."""
    failed = reply(
        status="failed",
        completed_at=None,
        updated_at="2021-10-20T02:52:29.236Z",
        error_code="JSON_ARRAY_ERROR",
        error_message="The array field does not appear to be valid JSON.",
        error_detail="Look at custom_field:Users",
    )
    assert (failed.state, failed.duration) == (JobState.FAILED, pytest.approx(81.69))
    assert failed.message == "The array field does not appear to be valid JSON. Look at custom_field:Users"
    assert not reply(status="working", completed_at="2021-10-20T02:52:29.236Z").state.terminal
    assert reply(status="failed", error_code="JSON_ARRAY_ERROR").message == "JSON_ARRAY_ERROR"


def test_every_word_of_the_contract_is_known() -> None:
    """All states are known words, the deprecated ones too; a new word is no end."""
    going_on = ["queued", "working", "preparing", "new", "retrying"]
    ends = ["completed", "failed", "skipped", "cancelled", "canceled"]
    assert all(reply(status=word).known for word in going_on + ends)
    assert [word for word in going_on + ends if reply(status=word).state.terminal] == ends
    for word in ("running", "loading", "completed_with_errors", "success"):
        assert (reply(status=word).known, reply(status=word).state.terminal) == (False, False)


@pytest.mark.parametrize("word", ["cancelled", "canceled", "failed", "working", "completed"])
async def test_cancelled_whatever_the_word(box: Sandbox, credentials: CensusCredentials, word: str) -> None:
    """`canceled: true` is the sign of a cancelled run; the status beside it is not documented."""
    box.census.set(SYNC, outcome="stuck", duration=0.1, cancel_word=word)
    waiting = asyncio.create_task(run(credentials))
    await until(lambda: words(box) == ["working"])
    box.census.cancel(int(run_ids(box)[0]))
    async with asyncio.timeout(60):
        with pytest.raises(JobCancelled, match="it was cancelled in Census"):
            await waiting


def test_null_counts() -> None:
    """Counts may be null or missing: no row is no crash, and no silent partial end either way."""
    nulls = reply(records_updated=None, records_failed=None, records_invalid=None, source_record_count=None)
    assert (nulls.state, nulls.rows, nulls.rows_rejected) == (JobState.SUCCEEDED, None, None)
    one = reply(records_updated=7, records_failed=None, records_invalid=2)
    assert (one.state, one.rows, one.rows_rejected) == (JobState.PARTIAL, 7, 2)


@pytest.mark.parametrize(
    ("policy", "passes", "level"),
    [
        ({}, True, logging.WARNING),
        ({"on_partial": "ok"}, True, logging.INFO),
        ({"on_partial": "fail"}, False, None),
        ({"max_rows_rejected": 15}, True, logging.WARNING),
        ({"max_rows_rejected": 14, "on_partial": "ok"}, False, None),
    ],
)
async def test_rejected_and_invalid_records(
    box: Sandbox,
    credentials: CensusCredentials,
    caplog: pytest.LogCaptureFixture,
    policy: dict[str, Any],
    passes: bool,
    level: int | None,
) -> None:
    """A completed run with failed or invalid records is partial: passed or failed as the policy says."""
    box.census.set(SYNC, outcome="partial", failed=0.1, invalid=0.05)
    with caplog.at_level(logging.INFO, "elt.jobs"):
        if passes:
            result = await run(credentials, **policy)
        else:
            with pytest.raises(JobFailed) as caught:
                await run(credentials, **policy)
            result = caught.value.result
    assert (result.state, result.rows, result.rows_rejected) == (JobState.PARTIAL, 85, 15)
    assert "10 records were rejected by the destination and 5 were invalid" in str(result.message)
    levels = [record.levelno for record in caplog.records if "were invalid" in record.message]
    assert levels == ([level] if level else [])


async def test_the_status_of_a_request_is_not_that_of_the_run(
    box: Sandbox, credentials: CensusCredentials
) -> None:
    """The envelope says "success" about each poll of a run that fails late: the run's own word counts."""
    box.census.set(SYNC, outcome="stuck")
    waiting = asyncio.create_task(run(credentials))
    await until(lambda: box.requests.count(vendor="census", path="/sync_runs/") > 3)
    box.census.finish_run(int(run_ids(box)[0]), "failed")
    with pytest.raises(JobFailed):
        await waiting


async def test_an_unknown_word(box: Sandbox, credentials: CensusCredentials, caplog: Any) -> None:
    """A word that is in no contract is said once and waited through; the deadline holds meanwhile."""
    box.census.set(SYNC, outcome="unknown_word", word="hibernating")
    waiting = asyncio.create_task(run(credentials))
    await until(lambda: "not in its contract: 'hibernating'" in caplog.text)
    looks = box.requests.count(vendor="census", path="/sync_runs/")
    await until(lambda: box.requests.count(vendor="census", path="/sync_runs/") > looks + 2)
    box.census.finish_run(int(run_ids(box)[0]), "completed")
    assert (await waiting).state is JobState.SUCCEEDED
    assert caplog.text.count("not in its contract: 'hibernating'") == 1
    with pytest.raises(JobTimeout, match="it was cancelled"):
        await run(credentials, timeout=0.8)


async def test_a_run_that_hangs(box: Sandbox, credentials: CensusCredentials) -> None:
    """A run that works for ever ends with the timeout, and is cancelled in Census."""
    box.census.set(SYNC, outcome="stuck")
    with pytest.raises(JobTimeout, match=r"did not end in 0.6 s; it was cancelled"):
        await run(credentials, timeout=0.6)
    assert words(box) == ["cancelled"]


async def test_a_reply_that_never_comes(box: Sandbox, credentials: CensusCredentials) -> None:
    """A poll without a reply ends by itself: no request waits for ever."""
    box.faults.add(kind="delay", delay=600, method="GET", path="/sync_runs/", times=1)
    async with credentials.api() as api:
        assert api._http.timeout.read == 60.0
        api._http.timeout = httpx.Timeout(0.3)
        assert (await run(credentials)).state is JobState.SUCCEEDED


async def test_steps_are_told(box: Sandbox, credentials: CensusCredentials, caplog: Any) -> None:
    """While a run works, the log says at what step it is."""
    box.census.set(SYNC, outcome="stuck")  # at that step
    with caplog.at_level(logging.INFO, "elt.jobs"):
        waiting = asyncio.create_task(run(credentials))
        await until(lambda: "fleet: working: Loading data into destination service" in caplog.text)
        box.census.finish_run(int(run_ids(box)[0]), "completed")
        await waiting


# -- starting


@TASKS
@pytest.mark.parametrize("full_sync", [False, True])
async def test_full_sync_goes_in_the_query(
    box: Sandbox, credentials: CensusCredentials, full_sync: bool
) -> None:
    """The full-sync flag is a query parameter: in the body it would be ignored, and only changes be sent."""
    await run(credentials)  # whatever is sent first is all
    result = await census_sync(sync(credentials, full_sync=full_sync))
    request = box.requests.find(vendor="census", method="POST")[-1]
    assert (request.query, request.body) == ("force_full_sync=true" if full_sync else "", None)
    assert box.census.runs_of(SYNC)[-1].full_sync is full_sync
    assert result.rows == (100 if full_sync else 0)


@TASKS
async def test_no_full_sync_of_what_appends(box: Sandbox, credentials: CensusCredentials) -> None:
    """An append sync can't be synced in full: refused before anything starts, by check and by run."""
    wanted = sync(credentials, APPENDS, full_sync=True)
    for refused in (census_check([wanted]), census_sync(wanted)):
        with pytest.raises(InputError, match=r"appends.*Nothing was started"):
            await refused
    assert triggers(box) == 0
    assert (await census_sync(sync(credentials, APPENDS))).rows == 100


async def test_a_lost_reply(box: Sandbox, credentials: CensusCredentials) -> None:
    """A trigger whose reply was lost is found among the runs, not sent again."""
    box.faults.add(kind="drop_after", method="POST", path="/trigger$", times=1)
    box.census.set(SYNC, visibility_delay=0.2)
    result = await run(credentials)
    assert [result.job_id] == run_ids(box)
    assert triggers(box) == 1


async def test_a_lost_trigger_and_a_run_by_hand(box: Sandbox, credentials: CensusCredentials) -> None:
    """Of the runs since our trigger, one that is no full sync is not the full sync that we asked for."""
    await run(credentials)
    box.faults.add(kind="drop", method="POST", path="/trigger$", times=1)
    waiting = asyncio.create_task(run(credentials, operation="full-sync"))
    await until(lambda: triggers(box) == 2)
    box.census.set(SYNC, duration=0.0)
    by_hand = str(box.census.trigger(SYNC).run_id)
    result = await waiting
    assert result.job_id != by_hand
    assert result.rows == 100


async def test_a_fresh_run_that_is_not_found(
    box: Sandbox, credentials: CensusCredentials, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A 404 with a number for its status is waited through while the run is fresh."""
    monkeypatch.setattr(CensusVendor, "grace", 30.0)
    box.census.set(SYNC, visibility_delay=1.5)
    result = await run(credentials)
    assert [result.job_id] == run_ids(box)
    assert any(request.status == 404 for request in box.requests.find(path="/sync_runs/"))


async def test_a_run_that_is_gone(box: Sandbox, credentials: CensusCredentials) -> None:
    """A run that Census does not know any more is an error with its number, not an endless wait."""
    box.faults.add(kind="status", status=404, body={"status": 404}, method="GET", path="/sync_runs/")
    with pytest.raises(NotFoundError, match=r"answered 404: Not Found"):
        await run(credentials)


async def test_a_retry_attaches(box: Sandbox, credentials: CensusCredentials) -> None:
    """A retry after an outage attaches to the run of the first attempt."""
    journal = MemoryJournal()
    box.census.set(SYNC, outcome="stuck")
    first = asyncio.create_task(run(credentials, journal, outage=0.2))
    await until(lambda: box.requests.count(vendor="census", path="/sync_runs/") > 0)
    box.pause()
    with pytest.raises(VendorUnavailable, match="was not touched"):
        await first
    box.resume()
    box.census.finish_run(int(run_ids(box)[0]), "completed")
    result = await run(credentials, journal)
    assert [result.job_id] == run_ids(box)
    assert triggers(box) == 1


async def test_a_refusal_with_status_200(box: Sandbox, credentials: CensusCredentials) -> None:
    """An error envelope is a refusal whatever the HTTP status: said at once, and nothing is looked for."""
    body = {"status": "error", "message": "Your plan has no API access"}
    box.faults.add(kind="status", status=200, body=body, method="POST")
    journal = MemoryJournal()
    async with asyncio.timeout(60):
        with pytest.raises(VendorError, match="Your plan has no API access"):
            await run(credentials, journal)
    assert triggers(box) == 1
    assert all(not entry.open for entry in journal.entries.values())


# -- cancelling


async def test_cancelled_with_us(
    box: Sandbox, credentials: CensusCredentials, caplog: pytest.LogCaptureFixture
) -> None:
    """Cancelled in mid-run, the run is cancelled in Census: the reply's "cancelled" is no error."""
    box.census.set(SYNC, duration=5)
    journal = MemoryJournal()
    waiting = asyncio.create_task(run(credentials, journal))
    await until(lambda: words(box) == ["working"] and bool(entry_of(journal).handle))
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert words(box) == ["cancelled"]
    assert "it was cancelled. http" in caplog.text
    result = entry_of(journal).result
    assert result
    assert result.state is JobState.CANCELLED


async def test_cancel_of_what_has_ended(box: Sandbox, credentials: CensusCredentials) -> None:
    """A run that has ended, even between our look and our cancel, is said to have ended as it did."""
    vendor = CensusVendor(credentials)
    first = await run(credentials)
    handle = JobHandle(
        vendor="census", resource_id=str(SYNC), job_id=str(first.job_id), started_at=datetime.now(UTC)
    )
    assert await vendor.cancel(handle) is JobState.SUCCEEDED
    assert box.requests.count(method="POST", path="/cancel$") == 0
    box.census.set(SYNC, duration=0.4, outcome="fail")
    late = handle.model_copy(update={"job_id": str(box.census.trigger(SYNC).run_id)})
    box.faults.add(kind="delay", delay=0.7, method="POST", path="/cancel$")
    assert await vendor.cancel(late) is JobState.FAILED


# -- many runs


async def test_watching_keeps_to_the_limit(box: Sandbox, credentials: CensusCredentials) -> None:
    """With more runs than the limit lets be read, each look is short, rotates, and tells every end."""
    box.census.set(SYNC, outcome="stuck", duration=0.1)
    known = box.census.sync(SYNC)
    handles = []
    for number in range(1000, 1025):
        spec = replace(known.spec, sync_id=number, label=f"sync {number}")
        box.census.syncs[number] = Sync(spec, known.behaviour.model_copy())
        run_id = str(box.census.trigger(number).run_id)
        handles.append(
            JobHandle(vendor="census", resource_id=str(number), job_id=run_id, started_at=datetime.now(UTC))
        )
    slow = credentials.model_copy(update={"requests_per_10_seconds": 100})
    vendor = CensusVendor(slow)
    vendor._sweep._seconds = 0.2
    box.census.finish_run(int(handles[-1].job_id), "failed")
    async with vendor.session():
        async with slow.api() as api:
            for _ in range(20):  # what the limit allows at once is spent
                await api._limiter.acquire()  # type: ignore[union-attr]
        seen: dict[str, Any] = {}
        looks = 0
        async with asyncio.timeout(60):
            while not (looks and seen[handles[-1].job_id].state.terminal):
                before = box.requests.count(vendor="census")
                seen = dict(await vendor.observe(handles))
                looks += 1
                assert len(seen) == 25
                assert box.requests.count(vendor="census") - before <= 15
    assert looks >= 3
    assert seen[handles[-1].job_id].state is JobState.FAILED
    assert {status.state for job_id, status in seen.items() if job_id != handles[-1].job_id} == {
        JobState.RUNNING
    }


async def test_too_many_requests(
    box: Sandbox, credentials: CensusCredentials, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A 429 without a time ends the look, and is borne with a pause of our own."""
    monkeypatch.setattr("blocks.errors.RATE_LIMIT_PAUSE", 0.3)
    box.faults.add(kind="status", status=429, method="GET", path="/sync_runs/", times=2)
    assert (await run(credentials)).state is JobState.SUCCEEDED


# -- input


@TASKS
@pytest.mark.parametrize(
    ("ids", "says"), [((7,), "knows no sync 7"), ((401, 402, 401), "401 is listed more than once")]
)
async def test_check_refuses(
    box: Sandbox, credentials: CensusCredentials, ids: tuple[int, ...], says: str
) -> None:
    """An unknown or repeated sync is refused before anything is started."""
    with pytest.raises(InputError, match=f"{says}.*[Nn]othing was started"):
        await census_check([sync(credentials, sync_id) for sync_id in ids])
    assert triggers(box) == 0


@TASKS
async def test_check_names_and_finds_problems(box: Sandbox, credentials: CensusCredentials) -> None:
    """A check names syncs by their labels, and says of a paused one why it can't run."""
    box.census.set(APPENDS, paused=True)
    first, second = await census_check([sync(credentials), sync(credentials, "402")])
    assert (first.request.name, first.request.owner, first.problem) == ("Fleet to Salesforce", None, None)
    assert second.request.label == "Daily operations to Sheets"
    assert "is paused. Resume it in Census" in str(second.problem)


@TASKS
async def test_check_of_many_reads_pages(box: Sandbox, credentials: CensusCredentials) -> None:
    """250 syncs are looked up in three requests, also when Census gives smaller pages than were asked for."""
    known = box.census.sync(SYNC)
    for number in range(1000, 1248):
        spec = replace(known.spec, sync_id=number, label=None if number == 1000 else f"sync {number}")
        box.census.syncs[number] = Sync(spec, known.behaviour.model_copy())
    found = await census_check([sync(credentials, number) for number in box.census.syncs])
    assert [one.request.label for one in found[2:4]] == ["1000", "sync 1001"]
    assert box.requests.count(vendor="census", method="GET") == 3
    assert [request.query for request in box.requests.find(path="/syncs$")][-1] == "page=3&per_page=100"


@TASKS
@pytest.mark.parametrize("paused_late", [False, True])
async def test_paused(box: Sandbox, credentials: CensusCredentials, paused_late: bool) -> None:
    """A paused sync is refused and not triggered; resumed, it runs."""
    async with credentials.api() as api:  # one client, which remembers what it has read
        if paused_late:
            await api.sync(str(SYNC))
        box.census.set(SYNC, paused=True)
        with pytest.raises((InputError, VendorError), match="paused"):
            await census_sync(sync(credentials))
        box.census.set(SYNC, paused=False)
        assert (await census_sync(sync(credentials))).state is JobState.SUCCEEDED
    assert len(run_ids(box)) == 1


@pytest.mark.parametrize("sync_id", ["crm", "", "1 2", True, None, -1])
def test_a_sync_id_that_is_none(sync_id: Any) -> None:
    """A sync is named by its number, as a number or as text."""
    with pytest.raises(ValidationError):
        CensusSync(credentials="x", sync_id=sync_id)
    assert CensusSync.model_validate({"credentials": "x", "sync_id": 401}).sync_id == "401"


def test_addresses() -> None:
    """Europe is a matter of the base URL, and links follow it; the key shows nowhere."""
    home = CensusCredentials(api_key=SecretStr("top-secret-key"))
    assert home.base_url == "https://app.getcensus.com/api/v1"
    assert home.history_url("5") == "https://app.getcensus.com/syncs/5/sync-history"
    europe = CensusCredentials(
        api_key=SecretStr("k" * 9), base_url="app-eu.getcensus.com/api/v1/", workspace_id="3167"
    )
    assert europe.history_url("5") == "https://app-eu.getcensus.com/workspaces/3167/syncs/5/sync-history"
    assert "top-secret-key" not in repr(home) + str(home.model_dump())


async def test_what_is_sent(box: Sandbox, credentials: CensusCredentials) -> None:
    """Requests take any reply, as Census's documentation asks."""
    async with credentials.api() as api:
        assert api._http.headers["accept"] == "*/*"


@TASKS
@pytest.mark.parametrize("key", ["wrong-key", "**********"])
def test_a_wrong_key_is_one_line(credentials: CensusCredentials, key: str, caplog: Any, capfd: Any) -> None:
    """A wrong or a masked key is said in one line, without a traceback and without the key."""
    wrong = credentials.model_copy(update={"api_key": SecretStr(key)})

    @flow
    async def activate() -> None:
        await census_sync(sync(wrong))

    with pytest.raises(AuthError, match="masked.*save the block" if "*" in key else "Unauthorized"):
        asyncio.run(activate())
    seen = caplog.text + "".join(capfd.readouterr())
    assert "Census" in seen
    assert "Traceback" not in seen
    assert "wrong-key" not in seen


@TASKS
async def test_status_of_any_run(box: Sandbox, credentials: CensusCredentials) -> None:
    """The state of a run that somebody else started can be had at any time; it is not judged."""
    box.census.set(SYNC, outcome="stuck")
    run_id = str(box.census.trigger(SYNC).run_id)
    now = await census_status(credentials, run_id)
    assert (now.state.terminal, now.job_id, now.name) == (False, run_id, "Fleet to Salesforce")
    box.census.finish_run(int(run_id), "failed")
    assert (await census_status(credentials, run_id)).state is JobState.FAILED
    with pytest.raises(NotFoundError):
        await census_status(credentials, "1")


@TASKS
async def test_one_odd_sync_hides_no_other(
    box: Sandbox, credentials: CensusCredentials, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sync that can't be read in the list is read by itself."""
    known, reply = box.census.sync(SYNC), Sync.reply
    for number in range(1000, 1005):
        box.census.syncs[number] = Sync(replace(known.spec, sync_id=number), known.behaviour.model_copy())
    odd = {1002}

    def told(sync: Sync) -> dict[str, Any]:
        if sync.spec.sync_id not in odd:
            return reply(sync)
        odd.clear()  # by itself it can be
        return reply(sync) | {"label": ["who knows"]}

    monkeypatch.setattr(Sync, "reply", told)
    found = await census_check([sync(credentials, number) for number in range(1000, 1005)])
    assert [one.problem for one in found] == [None] * 5
    asked = [request.path.rsplit("/", 1)[-1] for request in box.requests.find(vendor="census")]
    assert asked == ["syncs", "1002"]
