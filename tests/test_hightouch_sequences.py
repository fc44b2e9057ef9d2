"""Hightouch's sequences: what `done` hides, whose run a trigger gives, and what became of each sync."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import duckdb
import httpx
import pytest
from pydantic import SecretStr, ValidationError

from blocks import HightouchCredentials
from blocks.hightouch import SequenceRun
from blocks.http import AuthError, NotFoundError, VendorError, VendorUnavailable
from sandbox import Sandbox, catalog
from sandbox.hightouch_sequences import SequenceRun as Run
from tasks.hightouch import (
    HightouchSequence,
    hightouch_sequence,
    hightouch_sequence_check,
    hightouch_sequence_status,
)
from tasks.hightouch_sequences import HightouchSequenceVendor, _member_state, _worst
from tasks.jobs import (
    Entry,
    InputError,
    JobCancelled,
    JobFailed,
    JobHandle,
    JobPolicy,
    JobResult,
    JobState,
    JobTimeout,
    MemoryJournal,
    PlainRequest,
    StreamResult,
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
SEQUENCE = "7"
CRM, BRAZE = 101, 102


@pytest.fixture
def box(sandbox: Sandbox) -> Iterator[Sandbox]:
    """A sandbox whose warehouse has ten rows for each sync, and quick syncs."""
    with duckdb.connect(str(sandbox.warehouse.path)) as warehouse:
        warehouse.execute("CREATE SCHEMA marts")
        for spec in catalog.SYNCS:
            warehouse.sql("SELECT range AS n FROM range(10)").create(spec.table)
            sandbox.hightouch.set(spec.sync_id, duration=0.1)
    sandbox.hightouch.settings.requests_per_10_seconds = None
    return sandbox


@pytest.fixture
def credentials(box: Sandbox) -> HightouchCredentials:
    return HightouchCredentials(
        api_key=SecretStr(catalog.HIGHTOUCH_API_KEY),
        base_url=box.hightouch_url,
        app_url=f"{box.url}/hightouch",
        requests_per_10_seconds=10_000,
    )


async def run(
    credentials: HightouchCredentials, journal: MemoryJournal | None = None, **policy: Any
) -> JobResult:
    """One attempt; attempts with one journal are retries of each other."""
    request = PlainRequest(SEQUENCE, "sync", "all", None)
    settings = JobPolicy(**{"poll": 0.05, "timeout": 90.0, **policy})
    vendor = HightouchSequenceVendor(credentials)
    return await run_job(vendor, request, settings, journal=journal or MemoryJournal())


def runs(box: Sandbox) -> list[Run]:
    return box.hightouch.sequences.runs_of(SEQUENCE)


def end(box: Sandbox, sync_id: int) -> None:
    """Let the sync's latest run succeed now."""
    timeline = box.hightouch.runs_of(sync_id)[-1].timeline
    assert timeline
    timeline.finish("success")


def triggers(box: Sandbox) -> int:
    return box.requests.count(vendor="hightouch", method="POST", path="/sync-sequences/")


def entry_of(journal: MemoryJournal) -> Entry:
    (entry,) = journal.entries.values()
    return entry


# -- states


@TASKS
async def test_a_sequence(box: Sandbox, credentials: HightouchCredentials) -> None:
    """A sequence is run to its end; its result has the rows of all syncs, each sync's own, and a link."""
    (checked,) = await hightouch_sequence_check(
        [HightouchSequence(credentials=credentials, sequence_id=SEQUENCE, policy=JobPolicy(poll=0.05))]
    )
    assert (checked.request.name, checked.problem) == ("sequence 7", None)
    result = await hightouch_sequence(checked.request)
    (only,) = runs(box)
    assert (result.state, result.job_id, result.rows, result.rows_rejected) == (
        JobState.SUCCEEDED,
        only.run_id,
        20,
        0,
    )
    assert [(stream.name, stream.state, stream.rows) for stream in result.streams] == [
        ("carrier-scorecard-to-crm", JobState.SUCCEEDED, 10),
        ("weather-delays-to-braze", JobState.SUCCEEDED, 10),
    ]
    assert result.duration
    assert result.vendor == "hightouch-sequence"
    async with httpx.AsyncClient() as browser:
        assert only.run_id in (await browser.get(str(result.url))).text


@pytest.mark.parametrize(
    ("crm", "policy", "passes"),
    [
        ("warn", {}, True),
        ("warn", {"on_partial": "fail"}, False),
        ("warn", {"max_rows_rejected": 1}, True),
        ("warn", {"max_rows_rejected": 0}, False),
    ],
)
async def test_done_is_not_success(
    box: Sandbox, credentials: HightouchCredentials, crm: str, policy: dict[str, Any], passes: bool
) -> None:
    """`done` may hold syncs with rejected rows: it is partial then, and the policy decides."""
    box.hightouch.set(CRM, outcome=crm)
    if passes:
        result = await run(credentials, **policy)
    else:
        with pytest.raises(JobFailed) as caught:
            await run(credentials, **policy)
        result = caught.value.result
    assert runs(box)[0].word == "done"
    assert (result.state, result.rows, result.rows_rejected) == (JobState.PARTIAL, 19, 1)
    assert "carrier-scorecard-to-crm warning (1 rows were rejected)" in str(result.message)


@pytest.mark.parametrize(("outcome", "passes"), [("succeed", True), ("warn", False)])
async def test_rejected_rows_that_are_not_counted(
    box: Sandbox, credentials: HightouchCredentials, outcome: str, passes: bool
) -> None:
    """A sync that went well has rejected none; one with a warning and no count passes no limit."""
    box.hightouch.set(CRM, outcome=outcome)
    box.faults.add(kind="null_fields", fields=["failedRows"], path="/101/runs$")
    if passes:
        assert (await run(credentials, max_rows_rejected=0)).rows_rejected == 0
    else:
        with pytest.raises(JobFailed, match="does not say how many rows were rejected; at most 9"):
            await run(credentials, max_rows_rejected=9)


@pytest.mark.parametrize(
    ("stops", "word", "streams"),
    [
        (True, "failed", [JobState.FAILED]),
        (False, "done", [JobState.FAILED, JobState.SUCCEEDED]),
    ],
)
@pytest.mark.parametrize("outcome", ["fail", "interrupt"])
async def test_a_sync_that_fails(
    box: Sandbox,
    credentials: HightouchCredentials,
    outcome: str,
    stops: bool,
    word: str,
    streams: list[JobState],
) -> None:
    """A failed sync fails the sequence, also where Hightouch goes on with the others and says `done`."""
    box.hightouch.settings.stop_sequences = stops
    box.hightouch.set(CRM, outcome=outcome)
    with pytest.raises(JobFailed, match=r"carrier-scorecard-to-crm (failed|interrupted) \(The ") as caught:
        await run(credentials)
    assert runs(box)[0].word == word
    assert [stream.state for stream in caught.value.result.streams] == streams


def test_a_word_that_is_in_no_contract() -> None:
    """A sync's unknown word inside `done` is no success."""
    reply = {
        "id": "x",
        "status": "done",
        "syncRuns": [{"syncId": 1, "syncRunId": 2, "status": "completed_with_errors", "finishedAt": None}],
    }
    (member,) = SequenceRun.model_validate(reply).members
    assert (member.sync_id, member.run_id) == ("1", "2")
    assert _worst([StreamResult(name="x", state=_member_state(member))]) is JobState.PARTIAL
    assert SequenceRun.model_validate({"id": "x", "status": "pending", "syncRuns": None}).members == []


async def test_cancelled_in_hightouch(box: Sandbox, credentials: HightouchCredentials) -> None:
    """A sequence that somebody cancels is neither a success nor a failure of ours."""
    box.hightouch.set(CRM, outcome="stuck")
    waiting = asyncio.create_task(run(credentials))
    await until(lambda: bool(runs(box)) and bool(runs(box)[0].members))
    box.hightouch.sequences.finish_run(runs(box)[0].run_id)
    with pytest.raises(JobCancelled, match="cancelled"):
        await waiting


async def test_an_unknown_word(box: Sandbox, credentials: HightouchCredentials, caplog: Any) -> None:
    """A word that is in no contract is said and waited through."""
    box.hightouch.sequences.set(SEQUENCE, outcome="unknown_word", word="resting", word_seconds=5)
    assert (await run(credentials)).state is JobState.SUCCEEDED
    assert "not in its contract: 'resting" in caplog.text


async def test_progress_is_told(box: Sandbox, credentials: HightouchCredentials, caplog: Any) -> None:
    """While a sequence runs, the log says how many of its syncs have ended."""
    box.hightouch.set(BRAZE, outcome="stuck")
    with caplog.at_level(logging.INFO, "elt.jobs"):
        waiting = asyncio.create_task(run(credentials))
        await until(lambda: "all: running: 1 syncs have ended" in caplog.text)
        await until(lambda: bool(box.hightouch.runs_of(BRAZE)))
        end(box, BRAZE)
        await waiting


async def test_a_fresh_run_that_is_not_found(box: Sandbox, credentials: HightouchCredentials) -> None:
    """A run that is not shown yet is waited for; one that is gone is an error."""
    box.hightouch.sequences.set(SEQUENCE, visibility_delay=0.3)
    assert (await run(credentials)).state is JobState.SUCCEEDED
    vendor = HightouchSequenceVendor(credentials)
    gone = JobHandle(
        vendor=vendor.name,
        resource_id=SEQUENCE,
        job_id="gone",
        started_at=datetime(2020, 1, 1, tzinfo=UTC),
    )
    async with vendor.session():
        assert isinstance((await vendor.observe([gone]))["gone"], NotFoundError)


# -- one run at a time


@pytest.mark.parametrize("queues", [True, False])
async def test_ours_comes_after_the_one_that_runs(
    box: Sandbox, credentials: HightouchCredentials, queues: bool
) -> None:
    """A run in progress is not taken for ours, whether the workspace queues ours or gives that one's id."""
    box.hightouch.settings.queue_sequences = queues
    first = await going_for_a_while(box)
    waiting = asyncio.create_task(run(credentials))
    await until(lambda: triggers(box) == 1)
    await asyncio.sleep(0.3)
    box.hightouch.set(CRM, outcome="succeed")
    box.hightouch.finish_run(first.members[0].run_id, "cancelled")
    result = await waiting
    assert [one.word for one in runs(box)] == ["failed", "done"]
    assert result.job_id == runs(box)[1].run_id
    assert triggers(box) == (1 if queues else 2)


async def going_for_a_while(box: Sandbox) -> Run:
    """A sequence's run by somebody else, whose first sync has begun a minute ago and goes on."""
    box.hightouch.set(CRM, outcome="stuck")
    first = box.hightouch.sequences.trigger(SEQUENCE)
    await until(lambda: bool(first.members) and first.members[0].status == "processing")
    timeline = first.members[0].timeline
    assert timeline
    timeline.started_wall -= 60
    return first


@pytest.mark.parametrize("on_active", ["adopt", "skip", "fail"])
async def test_what_to_do_about_a_run_in_progress(
    box: Sandbox, credentials: HightouchCredentials, on_active: str
) -> None:
    """A trigger that gives the run in progress is dealt with as the policy says."""
    box.hightouch.settings.queue_sequences = False
    first = await going_for_a_while(box)
    waiting = asyncio.create_task(run(credentials, on_active=on_active))
    if on_active == "skip":
        result = await waiting
        assert (result.state, result.good) == (JobState.SKIPPED, False)
    elif on_active == "fail":
        with pytest.raises(JobFailed, match=f"{first.run_id} is running already"):
            await waiting
    else:
        await until(lambda: box.requests.count(path="/sync-sequences/runs/") > 2)
        box.hightouch.finish_run(first.members[0].run_id, "failed")
        with pytest.raises(JobFailed) as caught:
            await waiting
        assert caught.value.result.job_id == first.run_id
    assert len(runs(box)) == 1


@pytest.mark.parametrize("queues", [True, False])
async def test_a_lost_reply(box: Sandbox, credentials: HightouchCredentials, queues: bool) -> None:
    """After a lost reply nothing is sent again, by no attempt: it could be a second run of all syncs."""
    box.hightouch.settings.queue_sequences = queues
    box.hightouch.set(CRM, duration=1.0)
    box.faults.add(kind="drop_after", method="POST", path="/trigger$", times=1)
    journal = MemoryJournal()
    for _ in range(2):
        with pytest.raises(VendorError, match=r"may be going on.*not asked for twice.*/sequences/7"):
            await run(credentials, journal)
        assert (triggers(box), len(runs(box))) == (1, 1)
    assert entry_of(journal).open


@pytest.mark.parametrize("ended", [True, False])
async def test_a_crash_between_start_and_reply(
    box: Sandbox, credentials: HightouchCredentials, ended: bool
) -> None:
    """A retry of an attempt that died without an answer starts nothing, be that run over or not."""
    journal = MemoryJournal()
    intent = Entry(
        key=journal.key("hightouch-sequence:sync:7"),
        vendor="hightouch-sequence",
        resource_id=SEQUENCE,
        name="all",
        since=datetime.now(UTC) - timedelta(minutes=2),
    )
    await journal.record(intent)
    first = await going_for_a_while(box)
    if ended:
        box.hightouch.sequences.finish_run(first.run_id)
    with pytest.raises(VendorError, match=f"begun at about {intent.since:%Y-%m-%d %H:%M:%S} UTC"):
        await run(credentials, journal)
    assert (triggers(box), len(runs(box))) == (0, 1)


async def test_a_start_that_was_not_sent(box: Sandbox, credentials: HightouchCredentials) -> None:
    """A start that surely did not reach Hightouch is sent again."""
    box.faults.add(kind="status", status=429, headers={"Retry-After": "0.1"}, path="/trigger$", times=1)
    box.pause()
    going = asyncio.create_task(run(credentials))
    await asyncio.sleep(0.3)
    box.resume()
    assert (await going).state is JobState.SUCCEEDED
    assert (triggers(box), len(runs(box))) == (2, 1)


async def test_a_retry_attaches(box: Sandbox, credentials: HightouchCredentials) -> None:
    """A retry after an outage attaches to the run of the first attempt."""
    journal = MemoryJournal()
    box.hightouch.set(CRM, outcome="stuck")
    first = asyncio.create_task(run(credentials, journal, outage=0.2))
    await until(lambda: box.requests.count(vendor="hightouch", path="/sync-sequences/runs/") > 0)
    box.pause()
    with pytest.raises(VendorUnavailable, match="was not touched"):
        await first
    box.resume()
    end(box, CRM)
    result = await run(credentials, journal)
    assert [result.job_id] == [one.run_id for one in runs(box)]
    assert triggers(box) == 1


async def test_it_can_not_be_cancelled(box: Sandbox, credentials: HightouchCredentials) -> None:
    """At the timeout the error says that the run goes on, with a link."""
    box.hightouch.set(CRM, outcome="stuck")
    with pytest.raises(JobTimeout, match=r"hightouch-sequence can't cancel; it goes on.*/sequences/7"):
        await run(credentials, timeout=0.6)


# -- input


async def test_a_sequence_that_is_not_there(box: Sandbox, credentials: HightouchCredentials) -> None:
    """An unknown sequence shows when it is started, as an error that says so."""
    request = PlainRequest("8", "sync", "none", None)
    with pytest.raises(InputError, match=r"knows no sequence 8.*Nothing was started"):
        await run_job(HightouchSequenceVendor(credentials), request, JobPolicy(), journal=MemoryJournal())


@TASKS
async def test_check_refuses(box: Sandbox, credentials: HightouchCredentials) -> None:
    """A sequence that is named twice and a key that is refused are told before anything is started."""
    twice = [HightouchSequence(credentials=credentials, sequence_id=SEQUENCE)] * 2
    with pytest.raises(InputError, match=r"sequence 7 is listed more than once. Nothing was started"):
        await hightouch_sequence_check(twice)
    wrong = credentials.model_copy(update={"api_key": SecretStr("wrong-key")})
    with pytest.raises(AuthError):
        await hightouch_sequence_check([HightouchSequence(credentials=wrong, sequence_id=SEQUENCE)])
    assert triggers(box) == 0


@pytest.mark.parametrize("sequence_id", ["", "a/b", "1 2", True, None])
def test_a_sequence_id_that_is_none(sequence_id: Any) -> None:
    """A sequence is named by its id, as a number or as text."""
    with pytest.raises(ValidationError):
        HightouchSequence(credentials="x", sequence_id=sequence_id)
    assert HightouchSequence.model_validate({"credentials": "x", "sequence_id": 7}).sequence_id == "7"


@TASKS
async def test_status_of_any_run(box: Sandbox, credentials: HightouchCredentials) -> None:
    """The state of a run that somebody else started can be had at any time; it is not judged."""
    box.hightouch.set(BRAZE, outcome="stuck")
    started = box.hightouch.sequences.trigger(SEQUENCE)
    await until(lambda: len(started.members) == 2 and started.members[1].status == "processing")
    now = await hightouch_sequence_status(credentials, SEQUENCE, started.run_id)
    assert (now.state, now.job_id) == (JobState.RUNNING, started.run_id)
    assert [stream.state for stream in now.streams] == [JobState.SUCCEEDED, JobState.RUNNING]
    with pytest.raises(NotFoundError):
        await hightouch_sequence_status(credentials, SEQUENCE, "none")
