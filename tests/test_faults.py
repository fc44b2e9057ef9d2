"""The table of faults by vendors: what the user gets, how many jobs were started, how many were cancelled.

Every cell runs one job of one vendor through the engine, against the sandbox, over a socket. The tables below
say what is the same for all vendors; `EXCEPTIONS` says where a vendor's contract differs, and why.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import duckdb
import pytest

from blocks.http import (
    ApiClient,
    AuthError,
    BadReply,
    ConflictError,
    NotFoundError,
    VendorError,
    VendorUnavailable,
)
from sandbox import Sandbox, catalog
from sandbox.faults import Vendor
from tasks.jobs import InputError, JobCancelled, JobError, JobFailed, JobResult, JobState, JobTimeout
from tests.faults_fixtures import Subject, scaled
from tests.faults_subjects import JOB, SUBJECTS
from tests.jobs_fixtures import PREFECTS_SOCKETS, collected, until

__all__ = ["collected", "scaled"]

pytestmark = [*PREFECTS_SOCKETS, pytest.mark.usefixtures("scaled"), pytest.mark.no_server]

SUCCEEDED, SKIPPED = JobState.SUCCEEDED, JobState.SKIPPED
AN_HOUR = {"Retry-After": "3600"}


@dataclass(frozen=True)
class Cell:
    """What happens, and what comes of it.

    Attributes:
        fault: What goes wrong with the requests concerned; None where it is not a matter of requests.
        gives: The state of the result, or the error.
        says: Part of the error's or the result's message.
        starts: Jobs at the vendor in the end.
        cancels: Requests to cancel.
        log: Part of what must be in the log.
        policy: What the policy says other than usual.
        behave: How the job behaves.
        reply_within: Seconds for which our client waits for a reply, if not as long as usual.
    """

    fault: dict[str, Any] | None
    gives: JobState | type[Exception] = SUCCEEDED
    says: str = ""
    starts: int = 1
    cancels: int = 0
    log: str = ""
    policy: dict[str, Any] = field(default_factory=dict)
    behave: dict[str, Any] = field(default_factory=dict)
    reply_within: float | None = None


def status(code: int, times: int | None = 1, **more: Any) -> dict[str, Any]:
    return {"kind": "status", "status": code, "times": times, **more}


def html(code: int) -> dict[str, Any]:
    return {"kind": "html", "status": code, "times": 1}


SHORT = {"outage": 0.2}
REFUSED: dict[str, Any] = {"gives": AuthError, "starts": 0}

# A start request goes wrong.
AT_THE_START: dict[str, Cell] = {
    "no reply, not taken": Cell({"kind": "drop", "times": 1}),
    "no reply, taken": Cell({"kind": "drop_after", "times": 1}),
    "half a reply": Cell({"kind": "cut", "times": 1}),
    "a reply that is late": Cell({"kind": "delay", "delay": 0.3, "times": 1}, reply_within=0.15),
    "reset for ever": Cell({"kind": "reset"}, VendorUnavailable, "", starts=0, policy=SHORT),
    "401 for ever": Cell(status(401, None), says="Check the credentials", **REFUSED),
    "403": Cell(status(403), says="lack the role", **REFUSED),
    "404": Cell(status(404, body={"message": "no such thing"}), NotFoundError, "no such thing", starts=0),
    "409 of a kind unknown": Cell(status(409, body={"message": "odd"}), ConflictError, "odd", starts=0),
    "429 with a time": Cell(status(429, headers={"Retry-After": "0.1"}), log="answered 429"),
    "429 without": Cell(status(429), log="answered 429"),
    "429 of an hour": Cell(status(429, headers=AN_HOUR), log="asks to wait 3600 s"),
    "500": Cell(html(500)),
    "502": Cell(html(502)),
    "503": Cell(html(503)),
    "526": Cell(html(526)),
    "an HTML page": Cell(html(200)),
    "an empty body": Cell({"kind": "empty", "times": 1}),
    "no text at all": Cell({"kind": "garbage", "times": 1}),
    "half a document": Cell({"kind": "truncated_json", "times": 1}),
    "null fields": Cell({"kind": "null_fields", "times": 1}),
}

# The job is started, and a look at it goes wrong.
WHILE_IT_RUNS: dict[str, Cell] = {
    "no reply": Cell({"kind": "drop", "times": 2}),
    "half a reply": Cell({"kind": "cut", "times": 2}),
    "a reply that is late": Cell({"kind": "delay", "delay": 0.3, "times": 1}, reply_within=0.15),
    "reset for ever": Cell({"kind": "reset"}, VendorUnavailable, "was not touched", policy=SHORT),
    "401 for ever": Cell(status(401, None), AuthError, "Check the credentials"),
    "403": Cell(status(403), AuthError, "lack the role"),
    "404 at first": Cell(status(404, body={"message": "no such job"})),
    "404 for ever": Cell(status(404, None, body={"message": "no such job"}), NotFoundError, "no such job"),
    "429 with a time": Cell(status(429, headers={"Retry-After": "0.1"})),
    "429 without": Cell(status(429)),
    "429 of an hour": Cell(status(429, headers=AN_HOUR), log="asks to wait 3600 s"),
    "500": Cell(html(500)),
    "502": Cell(html(502)),
    "503": Cell(html(503)),
    "526": Cell(html(526)),
    "503 for ever": Cell(status(503, None), VendorUnavailable, "was not touched", policy=SHORT),
    "an HTML page": Cell(html(200)),
    "an empty body": Cell({"kind": "empty", "times": 2}),
    "no text at all": Cell({"kind": "garbage", "times": 2}),
    "half a document": Cell({"kind": "truncated_json", "times": 2}),
    "half a document for ever": Cell({"kind": "truncated_json"}, BadReply, "was not touched", policy=SHORT),
    "null fields": Cell({"kind": "null_fields", "times": 2}),
    # -- no matter of requests
    "it fails": Cell(None, JobFailed, behave={"outcome": "fail"}),
    "somebody cancels it": Cell(None, JobCancelled, "was cancelled in", behave={"outcome": "cancel"}),
    "an unknown state for a while": Cell(None, log="not in its contract", behave={"outcome": "unknown_word"}),
    "an unknown state for ever": Cell(
        None,
        JobTimeout,
        "it was cancelled",
        cancels=1,
        log="not in its contract",
        policy={"timeout": 0.5},
        behave={"outcome": "unknown_word"},
    ),
    "it never ends": Cell(
        None, JobTimeout, "it was cancelled", cancels=1, policy={"timeout": 0.4}, behave={"outcome": "stuck"}
    ),
    "it never ends, and is left": Cell(
        None,
        JobTimeout,
        "it was left running",
        policy={"timeout": 0.4, "on_timeout": "detach"},
        behave={"outcome": "stuck"},
    ),
}

# A job of the same resource is running already.    `starts` counts that one too.
RUNNING_ALREADY: dict[str, Cell] = {
    "queue": Cell(None, starts=2, log="waiting for it before starting ours"),
    "adopt": Cell(None, starts=1, log="taken as ours"),
    "skip": Cell(None, SKIPPED, "the policy says skip", starts=1),
    "fail": Cell(None, JobFailed, "the policy says fail", starts=1),
}

# Where a vendor's contract says otherwise: (vendor, row) → what is different.
_NO_CANCEL = {"says": "can't cancel; it goes on", "cancels": 0}
_BEHIND = {"gives": SUCCEEDED, "says": "", "starts": 2, "log": ""}
_STRANGE = {
    "outcome": "unknown_word",
    "word": "dreaming",
}  # `paused`, as of the others, is a word of Fivetran's
EXCEPTIONS: dict[tuple[str, str], dict[str, Any]] = {
    # Neither Hightouch's nor Fivetran's API can cancel.
    ("hightouch", "an unknown state for ever"): _NO_CANCEL,
    ("hightouch", "it never ends"): _NO_CANCEL,
    ("fivetran", "an unknown state for a while"): {"behave": _STRANGE},
    ("fivetran", "an unknown state for ever"): {**_NO_CANCEL, "behave": _STRANGE},
    ("fivetran", "it never ends"): _NO_CANCEL,
    # A sync that somebody stops in Fivetran leaves no trace: neither a success nor a failure is newer.
    ("fivetran", "somebody cancels it"): {**_NO_CANCEL, "gives": JobTimeout, "policy": {"timeout": 0.5}},
    # Power BI's declaration takes every 409 as "one is running already": it waits, and starts.
    ("power-bi", "409 of a kind unknown"): {"gives": SUCCEEDED, "says": "", "starts": 1},
    # What nobody has declared is not said: in neither is there a reason beside the state.
    **{(name, "somebody cancels it"): {"says": "cancelled"} for name in ("power-bi", "tableau")},
    # Tableau has no word for a state: what has no end is in progress, whatever else it may be.
    **{
        ("tableau", row): {"log": "InProgress"}
        for row in ("an unknown state for a while", "an unknown state for ever")
    },
    # Census never refuses either: what is asked for while a run goes on is a run, and that one is skipped.
    ("census", "queue"): {"starts": 3},
    **{("census", row): {"starts": 2} for row in ("adopt", "skip", "fail")},
    **{("hightouch-sequence", row): _NO_CANCEL for row in ("an unknown state for ever", "it never ends")},
    # Hightouch never refuses: it queues one run behind the one that is in progress, and that is ours.
    **{("hightouch-sequence", row): _BEHIND for row in RUNNING_ALREADY},
    # Nor does it refuse a run of a sync; with other policies than this the run in progress is looked for.
    ("hightouch", "queue"): _BEHIND,
}

# Runs of a sequence are in no list: one that may have been taken is not asked for again, was it taken or not.
_LOST = {"gives": VendorError, "says": "A run may be going on"}
_NOT_TAKEN = (
    *("no reply, not taken", "reset for ever", "500", "502", "503", "526"),
    *("an HTML page", "an empty body", "no text at all"),
)
_TAKEN = (
    *("no reply, taken", "half a reply", "a reply that is late"),
    *("half a document", "null fields"),
)
AT_THE_START_EXCEPTIONS: dict[tuple[str, str], dict[str, Any]] = {
    **EXCEPTIONS,
    **{("hightouch-sequence", row): {**_LOST, "starts": 0} for row in _NOT_TAKEN},
    **{("hightouch-sequence", row): _LOST for row in _TAKEN},
    # It can't be looked up before it is started.
    ("hightouch-sequence", "404"): {"gives": InputError, "says": "knows no sequence"},
}


def cells(table: dict[str, Cell], exceptions: dict[tuple[str, str], dict[str, Any]] = EXCEPTIONS) -> Any:
    """Every row of a table for every vendor, as it is for that vendor."""
    rows = [
        pytest.param(name, replace(cell, **exceptions.get((name, row), {})), id=f"{row}-{name}")
        for name in SUBJECTS
        for row, cell in table.items()
    ]
    return pytest.mark.parametrize(("vendor", "cell"), rows)


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandbox]:
    """One sandbox for all cells; every cell has a resource of its own."""
    state: Path = tmp_path_factory.mktemp("faults")
    with Sandbox(state, job_seconds=0.1) as sandbox:
        with duckdb.connect(str(sandbox.warehouse.path)) as warehouse:
            warehouse.execute("CREATE SCHEMA marts")
            warehouse.sql("SELECT range AS n FROM range(10)").create(catalog.SYNCS[0].table)
        yield sandbox


@pytest.fixture
def clean(stage: Sandbox, caplog: pytest.LogCaptureFixture) -> Iterator[Sandbox]:
    """The stage with nothing left over from the cell before."""
    stage.faults.clear()
    stage.requests.clear()
    caplog.set_level(logging.INFO, "elt.jobs")
    yield stage
    stage.faults.clear()


def hurry(monkeypatch: pytest.MonkeyPatch, cell: Cell) -> None:
    if cell.reply_within is not None:
        monkeypatch.setitem(ApiClient.__init__.__kwdefaults__, "read_timeout", cell.reply_within)


async def over(run: asyncio.Task[JobResult]) -> None:
    """Wait for the end, within the outage budget: no wait is longer than the contract's."""
    await asyncio.wait([run], timeout=60)
    assert run.done(), "it is still waiting"


async def check(subject: Subject, run: asyncio.Task[JobResult], cell: Cell, log: str) -> None:
    """What the user gets, how many starts, how many cancels, and what was said."""
    if isinstance(cell.gives, JobState):
        result = await run
        assert result.state is cell.gives
        assert cell.says in str(result.message)
    else:
        with pytest.raises(cell.gives) as caught:
            await run
        assert cell.says in str(caught.value)
        assert isinstance(caught.value, JobError) or str(caught.value).startswith(subject.title)
    await until(lambda: subject.jobs >= cell.starts)  # one that is late may not have arrived
    assert (subject.jobs, subject.cancels) == (cell.starts, cell.cancels)
    assert cell.log in log
    assert subject.hit, "the fault hit no request: this cell shows nothing"


@cells(AT_THE_START, AT_THE_START_EXCEPTIONS)
async def test_at_the_start(
    clean: Sandbox,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    vendor: str,
    cell: Cell,
) -> None:
    """A start that goes wrong is one job or none, never two, and what is refused is said at once."""
    hurry(monkeypatch, cell)
    subject = SUBJECTS[vendor](clean)
    assert cell.fault
    subject.break_start(**cell.fault)
    run = subject.begin(**cell.policy)
    await over(run)
    await check(subject, run, cell, caplog.text)


@cells(WHILE_IT_RUNS)
async def test_while_it_runs(
    clean: Sandbox,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    vendor: str,
    cell: Cell,
) -> None:
    """A look that goes wrong does not touch the job; only a job that does not end is cancelled, and once."""
    hurry(monkeypatch, cell)
    subject = SUBJECTS[vendor](clean)
    if cell.behave:
        subject.behave(**cell.behave)
    if cell.fault:
        fault = cell.fault
        subject.journal.once_started = lambda: subject.break_look(**fault)
    run = subject.begin(**cell.policy)
    if cell.gives is SUCCEEDED and cell.behave:  # until it has been seen in its odd state
        await until(lambda: run.done() or cell.log in caplog.text)
        subject.end_first()
    await over(run)
    await check(subject, run, cell, caplog.text)


@cells(RUNNING_ALREADY)
async def test_running_already(
    clean: Sandbox, caplog: pytest.LogCaptureFixture, vendor: str, cell: Cell, request: Any
) -> None:
    """A job that is running already is waited for, adopted, or reason to do nothing, as the policy says."""
    subject = SUBJECTS[vendor](clean)
    subject.behave(duration=300)
    subject.start_by_hand()
    subject.behave(duration=JOB)
    row = request.node.callspec.id.removesuffix(f"-{vendor}")
    run = subject.begin(on_active=row)
    if cell.gives is SUCCEEDED:
        # Until it is seen that ours is waiting, or that the other is taken as ours.
        await until(lambda: run.done() or (cell.log in caplog.text if cell.log else subject.started))
        subject.end_first()
    await over(run)
    await check(subject, run, cell, caplog.text)


@pytest.mark.parametrize("vendor", SUBJECTS)
async def test_refused_connections(clean: Sandbox, caplog: pytest.LogCaptureFixture, vendor: str) -> None:
    """A vendor that is down, at the start and in mid-run, is waited for; the job is one."""
    subject = SUBJECTS[vendor](clean)
    clean.outage(0.15)
    subject.journal.once_started = clean.pause
    run = subject.begin()
    await until(lambda: "is not touched" in caplog.text)
    clean.resume()
    assert (await run).state is SUCCEEDED
    assert (subject.jobs, subject.cancels) == (1, 0)
    assert "answers again" in caplog.text


@pytest.mark.parametrize("vendor", SUBJECTS)
async def test_refused_for_longer_than_is_borne(clean: Sandbox, vendor: str) -> None:
    """Beyond the budget the error says that the job was not touched, and a retry attaches to it."""
    subject = SUBJECTS[vendor](clean)
    subject.journal.once_started = clean.pause
    run = subject.begin(outage=0.2)
    try:
        with pytest.raises(VendorUnavailable, match="was not touched"):
            await run
    finally:
        clean.resume()
    assert (await subject.run()).state is SUCCEEDED
    assert (subject.jobs, subject.cancels) == (1, 0)


@pytest.mark.parametrize("vendor", SUBJECTS)
@pytest.mark.parametrize("moment", ["at the start", "while it runs"])
async def test_401_once(clean: Sandbox, vendor: str, moment: str) -> None:
    """A token that has expired is fetched anew and nobody notices; a refused key is an error at once."""
    subject = SUBJECTS[vendor](clean)

    def refuse() -> None:
        subject.expire_sign_in()
        subject.break_look(**status(401))

    if moment == "at the start":
        subject.break_start(**status(401))
    else:
        subject.journal.once_started = refuse
    run = subject.begin()
    await over(run)
    gives = SUCCEEDED if subject.has_token else AuthError
    starts = 1 if subject.has_token or moment == "while it runs" else 0
    await check(subject, run, Cell(None, gives, starts=starts), "")


def test_no_vendor_is_left_out() -> None:
    """Every vendor of the sandbox is in the table; those that are only told have one of their own."""
    subjects = {subject.sandbox_name for subject in SUBJECTS.values()}
    assert subjects == set(get_args(Vendor)) - {"slack", "pagerduty"}, "see tests/test_faults_alerts.py, too"


# -- kinds of 409 that only one vendor has


@pytest.mark.parametrize("vendor", ["airbyte", "airbyte-config"])
async def test_409_of_a_connection_that_was_switched_off(clean: Sandbox, vendor: str) -> None:
    """Airbyte hides why it refuses; the connection's own status tells it."""
    subject = SUBJECTS[vendor](clean)
    async with subject.vendor.session():
        await subject.vendor.connection(subject.request.resource_id)  # type: ignore[attr-defined]
        subject.behave(status="inactive")
        with pytest.raises(InputError, match=r"is inactive\. Enable it"):
            await subject.run()
    assert (subject.jobs, subject.cancels) == (0, 0)


@pytest.mark.parametrize("vendor", ["airbyte", "airbyte-config"])
async def test_409_of_a_job_that_has_just_ended(clean: Sandbox, vendor: str) -> None:
    """A job that ends between our last look and our cancellation is a job that ended, not an error."""
    subject = SUBJECTS[vendor](clean)
    subject.behave(outcome="stuck")
    run = subject.begin(timeout=0.3)
    await subject.until_started()
    [job] = clean.airbyte.jobs_of(subject.request.resource_id)
    method, path = subject.cancel or ("", "")
    clean.faults.add(vendor="airbyte", method=method, path=path, kind="delay", delay=0.3)
    await until(lambda: subject.cancels > 0)
    clean.airbyte.finish_job(job.job_id, "failed")
    with pytest.raises(JobTimeout, match="it had ended already: failed"):
        await run
    assert (subject.jobs, subject.cancels) == (1, 1)
