"""Declarations: what is refused at once, and small APIs of every shape that a declaration can have."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from pydantic import SecretStr, ValidationError

from blocks import HttpJob
from blocks.http import VendorError, VendorUnavailable
from blocks.http_job import arguments_of, resource_id
from blocks.http_job_auth import BasicAuth, BearerToken, HeaderToken
from blocks.http_job_client import moment_of
from blocks.http_job_fill import fill_document, fill_path, names_in
from tasks.http_job import HttpJobRun
from tasks.http_job_vendor import HttpJobVendor
from tasks.jobs import (
    JobFailed,
    JobHandle,
    JobPolicy,
    JobResult,
    JobState,
    JobTimeout,
    MemoryJournal,
    PlainRequest,
    run_job,
)
from tests.jobs_fixtures import PREFECTS_SOCKETS, collected, until

__all__ = ["collected"]

pytestmark = PREFECTS_SOCKETS

DECLARED: dict[str, Any] = {
    "service": "Reports",
    "base_url": "https://reports.example.com/api",
    "parameters": {"report": {"type": "integer"}},
    "start": {"path": "/reports/{report}/runs", "job_id": {"path": "run.id"}},
    "poll": {"path": "/runs/{job_id}", "read": {"state": "run.status"}},
    "states": {"running": ["active"], "succeeded": ["done"], "failed": ["error"]},
}


LISTING = {"path": "/runs", "items": "runs", "id": "id"}


def declared(**changes: Any) -> HttpJob:
    """The declaration with changes by dotted field, `__` for the dot; None takes a field out."""
    document = json.loads(json.dumps(DECLARED))
    for field, value in changes.items():
        *above, last = field.split("__")
        where = document
        for name in above:
            where = where.setdefault(name, {})
        where[last] = value
    return HttpJob.model_validate(document)


# -- what is refused


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"start__path": "/reports/{raport}/runs"}, "start: {raport} is not one of marker, report"),
        ({"start__path": "/reports/{report/runs"}, "start: .* a brace that belongs to no placeholder"),
        ({"start__path": "reports/{report}"}, "start.path"),
        ({"start__body": {"a": [{"b": "{nobody}"}]}}, "start: {nobody} is not one of"),
        ({"start__body": {}, "start__form": {"a": "b"}}, "start.*a body or a form, not both"),
        ({"start__job_id": {}}, "start.job_id.*exactly one of path, header and ours"),
        ({"start__job_id": {"path": "id", "ours": True}}, "exactly one of path, header and ours"),
        ({"start__job_id": {"path": "id", "pattern": "x"}}, "a pattern is for a header"),
        ({"start__job_id": {"header": "Location", "pattern": "[^/+$"}}, "not a regular expression"),
        ({"start__job_id": {"ours": True}}, "start.job_id.ours: the start does not send {job_id}"),
        ({"start__job_id__path": "run..id"}, "start.job_id.path.*not a JMESPath expression"),
        ({"start__already_running": [{}]}, "start.already_running.0.*a status, a text, or both"),
        ({"start__method": "GET"}, "start.method"),
        ({"start__mehtod": "PUT"}, "start.mehtod"),
        ({"parameters__other": {}}, "parameters.other: nothing uses it"),
        ({"parameters__job_id": {}}, "parameters.job_id: the name job_id is taken"),
        ({"parameters__a-b": {}}, "parameters.a-b: a name consists of letters"),
        ({"parameters__report__default": "x"}, "parameters.report.default: Input should be a valid integer"),
        ({"parameters__report__type": "guid"}, "parameters.report.type"),
        ({"poll": None}, "poll: there must be a poll, a listing, or both"),
        ({"poll__body": {"run": "{job_id}"}}, "poll.*a body is sent with method POST only"),
        ({"poll__method": "PUT"}, "poll.method"),
        ({"poll__path": "/runs/latest"}, "poll: without {job_id} it can't tell which job it reads"),
        ({"poll__read__state": "'active'"}, "poll.read.state.*says the same of every reply"),
        ({"poll__read__state": "status == `active`"}, "poll.read.state.*a text is written 'so'"),
        ({"poll__read": {}}, "poll.read.state"),
        ({"cancel": {"path": "/stop"}}, "cancel: without {job_id}"),
        ({"url": "https://x/{run}"}, "url: {run} is not one of job_id, report"),
        ({"states__succeeded": ["done", "Active"]}, "states.*'Active' is both running and succeeded"),
        ({"states__succeeded": []}, "states.*succeeded is empty"),
        ({"states__failed": []}, "states.*failed is empty: .* waited for until the timeout"),
        ({"states__done": ["x"]}, "states.done"),
        ({"find": {}, "listing": LISTING}, "find: give created_at, marker or both"),
        ({"find": {"created_at": "at"}}, "find.listing: there is no listing to look in"),
        (
            {"find": {"marker": "note"}, "listing": LISTING},
            "find.marker: the start does not send {marker}",
        ),
        (
            {"poll": None, "listing": LISTING},
            "listing.read: there is no poll",
        ),
        ({"listing": {"path": "/runs", "items": "runs"}}, "listing.id"),
        ({"lookups": [{"path": "/r", "values": {"report": "id"}}]}, "the name report is there already"),
        ({"lookups": [{"path": "/r/{name}", "values": {"name": "n"}}]}, "lookups.0: {name} is not one"),
        ({"auth": {"kind": "bearer", "token": "two words"}}, "auth.bearer.token.*a blank"),
        ({"auth": {"kind": "magic"}}, "auth"),
        (
            {"auth": {"kind": "sign-in", "path": "/in", "body": {"t": "{pat}"}, "secrets": {}, "token": "t"}},
            "auth.*{pat} is not one of the secrets",
        ),
        ({"base_url": "https://user:pass@reports"}, "base_url.*holds credentials"),
        ({"grace": -1}, "grace"),
    ],
)  # fmt: skip
def test_refused_declarations(changes: dict[str, Any], said: str) -> None:
    """A declaration that can't work is refused when it is made, by a sentence that names the field."""
    with pytest.raises(ValidationError) as caught:
        declared(**changes)
    flat = str(caught.value).replace("\n", " ")
    assert re.search(said, flat), flat
    assert "pass@" not in flat


def test_all_problems_at_once() -> None:
    """All that is wrong with a declaration as a whole is said at once."""
    with pytest.raises(ValidationError) as caught:
        declared(poll__path="/runs/latest", parameters__other={}, url="{nobody}")
    assert all(said in str(caught.value) for said in ("poll: ", "url: ", "parameters.other: "))


def test_placeholders() -> None:
    """A value is one segment of a path whatever is in it, and keeps its type in a body."""
    assert fill_path("/a/{x}/b", {"x": "c/d?e=f#g %"}) == "/a/c%2Fd%3Fe%3Df%23g%20%25/b"
    assert fill_document({"n": "{n}", "t": "no {n}", "b": ["{{{b}}}"]}, {"n": 5, "b": True}) == {
        "n": 5,
        "t": "no 5",
        "b": ["{true}"],
    }
    assert names_in({"a": ["{x}{y}"], "b": "{{z}}", "c": 5}) == {"x", "y"}


def test_resource_ids() -> None:
    """A run's id holds the job's name and its arguments in alphabetical order, and gives them back."""
    found = resource_id("reports", {"b": "x&y=ü z", "a": 5, "c": True})
    assert found == "reports?a=5&b=x%26y%3D%C3%BC+z&c=true"
    assert arguments_of(found) == {"a": "5", "b": "x&y=ü z", "c": "true"}
    assert declared(parameters={"report": {"type": "integer"}}).arguments(
        arguments_of("reports?report=5")
    ) == {"report": 5}
    run = HttpJobRun(job="reports", arguments={"report": 5})
    assert (run.resource_id, run.label) == ("reports?report=5", "reports?report=5")


@pytest.mark.parametrize(
    ("written", "year"),
    [
        ("2026-11-21T05:06:07Z", 2026),
        ("2020-12-07T02:06:57.1838734Z", 2020),
        ("2021-12-10T08:40:31.57", 2021),
        (1_735_689_600, 2025),
        ("1735689600000", 2025),
        ("yesterday", None),
        (None, None),
        ({}, None),
    ],
)
def test_times(written: Any, year: int | None) -> None:
    """Times are read as APIs write them; what is none is None."""
    found = moment_of(written)
    assert (found.year if found else None) == year
    assert found is None or found.tzinfo is not None


# -- small APIs


class Api:
    """A job API of a few lines; a test says what is special about it."""

    def __init__(self) -> None:
        self.runs: dict[str, dict[str, Any]] = {}
        self.requests: list[tuple[str, str, Any, dict[str, str]]] = []
        self.answer: Callable[[str, str, Any], tuple[int, Any] | None] = lambda *_: None
        self.lose_starts = 0
        self.end: dict[str, Any] = {"status": "done", "rows": 7}
        api = self

        class Handler(BaseHTTPRequestHandler):
            def do_any(self) -> None:
                size = int(self.headers.get("Content-Length") or 0)
                raw = self.rfile.read(size).decode()
                kind = self.headers.get("Content-Type", "")
                body = (
                    {k: v[0] for k, v in parse_qs(raw).items()}
                    if "form" in kind
                    else json.loads(raw or "null")
                )
                path = urlsplit(self.path).path
                api.requests.append((self.command, self.path, body, dict(self.headers)))
                status, document = api.answer(self.command, path, body) or api.usual(self.command, path, body)
                if self.command in ("POST", "PUT") and api.lose_starts:
                    api.lose_starts -= 1
                    self.close_connection = True
                    return
                text = json.dumps(document).encode() if document is not None else b""
                self.send_response(status)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            do_GET = do_POST = do_PUT = do_DELETE = do_any  # noqa: N815 - the names that http.server calls

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}/api"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def usual(self, method: str, path: str, body: Any) -> tuple[int, Any]:
        name = path.rsplit("/", 1)[-1]
        if method == "POST" or (method == "PUT" and name not in self.runs):
            run_id = str(len(self.runs) + 1) if method == "POST" else name
            self.runs[run_id] = {"id": run_id, "status": "active", **(body if isinstance(body, dict) else {})}
            return 200, {"run": self.runs[run_id]}
        if path.endswith("/runs"):
            return 200, {"runs": list(self.runs.values())}
        if name not in self.runs:
            return 404, {"error": "no such run"}
        if method == "DELETE":
            del self.runs[name]
            return 204, None
        self.runs[name] |= self.end
        return 200, {"run": self.runs[name]}

    @property
    def starts(self) -> int:
        return sum(method in ("POST", "PUT") for method, *_ in self.requests)


@pytest.fixture
def api() -> Iterator[Api]:
    served = Api()
    yield served
    served.server.shutdown()
    served.server.server_close()


async def run(job: HttpJob, journal: MemoryJournal | None = None, **policy: Any) -> JobResult:
    settings = JobPolicy(**{"poll": 0.05, "timeout": 10.0, **policy})
    request = PlainRequest("reports?report=5", "run", "the report", None)
    return await run_job(HttpJobVendor(job), request, settings, journal=journal or MemoryJournal())


@pytest.mark.parametrize(
    ("auth", "header", "value"),
    [
        (BearerToken(token=SecretStr("a-token")), "Authorization", "Bearer a-token"),
        (HeaderToken(header="X-API-Key", value=SecretStr("a-key")), "X-API-Key", "a-key"),
        (BasicAuth(username="me", password=SecretStr("pass")), "Authorization", "Basic bWU6cGFzcw=="),
    ],
)
async def test_signing_in(api: Api, auth: Any, header: str, value: str) -> None:
    """Every request carries the credentials in the way that is declared, and the declared headers."""
    job = declared(base_url=api.url, headers={"X-Team": "data"}).model_copy(update={"auth": auth})
    assert (await run(job)).state is JobState.SUCCEEDED
    seen = [{k.lower(): v for k, v in headers.items()} for *_, headers in api.requests]
    assert {headers.get(header.lower()) for headers in seen} == {value}
    assert {headers["x-team"] for headers in seen} == {"data"}


async def test_what_is_read(api: Api) -> None:
    """Numbers, times and messages are read where the declaration says, text or not."""
    api.end = {
        "status": "Done",
        "rows": "1200",
        "bytes": 3.0,
        "bad": None,
        "tries": 2,
        "from": "2026-01-01T00:00:00Z",
        "to": 1767225605,
        "note": {"why": "late"},
        "page": "https://r/5",
    }
    read = {
        "state": "run.status",
        "rows": "run.rows",
        "bytes": "run.bytes",
        "rows_rejected": "run.bad",
        "attempts": "run.tries",
        "started_at": 'run."from"',
        "ended_at": "run.to",
        "message": "run.note",
    }
    job = declared(base_url=api.url, poll__read=read, url="https://app/{report}/{job_id}")
    result = await run(job)
    assert (result.rows, result.bytes, result.rows_rejected, result.attempts) == (1200, 3, None, 2)
    assert (result.duration, result.message) == (5.0, '{"why": "late"}')
    assert (result.url, result.job_id) == ("https://app/5/1", "1")


async def test_ends_of_all_kinds(api: Api) -> None:
    """Partial ends are what the declaration and the policy say; a failure without a reason says the word."""
    partial = {"succeeded": ["done"], "failed": ["error"], "partial": ["mostly"], "running": ["active"]}
    api.end = {"status": "mostly"}
    job = declared(base_url=api.url, states=partial)
    with pytest.raises(JobFailed):
        await run(job)
    assert (await run(job.model_copy(update={"on_partial": "warn"}))).state is JobState.PARTIAL
    api.end = {"status": "ERROR"}
    with pytest.raises(JobFailed, match="Reports says ERROR"):
        await run(job)
    api.end = {"status": None}
    with pytest.raises(JobTimeout):
        await run(job, timeout=0.3)


async def test_a_form(api: Api) -> None:
    """A start may be a form."""
    job = declared(base_url=api.url, start__path="/runs", start__form={"report": "no {report}"})
    await run(job)
    assert api.requests[0][2] == {"report": "no 5"}


async def test_an_id_of_ours(api: Api) -> None:
    """An API that lets us choose the id is asked for it after a lost reply: one start, one job."""
    job = declared(
        base_url=api.url,
        start__method="PUT",
        start__path="/reports/{report}/runs/{job_id}",
        start__job_id={"ours": True},
        grace=0.3,
    )
    api.lose_starts = 1
    result = await run(job)
    assert [result.job_id] == list(api.runs)
    assert api.starts == 1


async def test_an_id_of_ours_that_never_came(api: Api) -> None:
    """A start of ours that was lost on the way is sent again, under the same id."""
    job = declared(
        base_url=api.url,
        start__method="PUT",
        start__path="/reports/{report}/runs/{job_id}",
        start__job_id={"ours": True},
        grace=0.2,
    )
    dropped: list[str] = []

    def swallow(method: str, path: str, _: Any) -> tuple[int, Any] | None:
        if method == "PUT" and not dropped:
            dropped.append(path)
            return 502, {"error": "bad gateway"}
        return None

    api.answer = swallow
    await run(job)
    assert [path for method, path, *_ in api.requests if method == "PUT"] == dropped * 2


async def test_a_mark(api: Api) -> None:
    """Found by the mark that was sent with the start, and not for its time."""
    job = declared(
        base_url=api.url,
        start__body={"note": "{marker}", "report": "{report}"},
        listing={"path": "/runs", "items": "runs", "id": "id"},
        find={"marker": "note"},
        grace=0.3,
    )
    api.runs["theirs"] = {"id": "theirs", "status": "active", "note": "by hand"}
    api.lose_starts = 1
    result = await run(job)
    assert result.job_id == "2"
    assert api.requests[0][2]["report"] == 5
    assert api.starts == 1


async def test_watching_by_a_list_alone(api: Api) -> None:
    """Without a poll the list tells how a job ends; a list that is left out when empty is one."""
    job = declared(
        base_url=api.url,
        poll=None,
        listing={"path": "/runs", "items": "runs", "id": "id", "read": {"state": "status"}},
        grace=0.3,
    )
    looks = 0

    def later(method: str, path: str, _: Any) -> tuple[int, Any] | None:
        nonlocal looks
        if method == "GET" and path.endswith("/runs"):
            looks += 1
            if looks == 1:
                return 200, {}
            if looks == 4:
                api.runs["1"]["status"] = "done"
        return None

    api.answer = later
    assert (await run(job)).state is JobState.SUCCEEDED
    assert looks == 4
    api.answer = lambda *_: (200, {"runs": "none"})
    handle = JobHandle(
        vendor="http-job", resource_id="reports?report=5", job_id="1", started_at=datetime.now(UTC)
    )
    seen = await HttpJobVendor(job).observe([handle])
    assert "no list at runs" in str(seen["1"])


async def test_a_refusal_with_status_200(api: Api) -> None:
    """An API that says with 200 that a job runs already is understood."""
    job = declared(base_url=api.url, start__already_running=[{"status": 200, "text": "already in progress"}])
    busy = 2

    def refuse(method: str, *_: Any) -> tuple[int, Any] | None:
        nonlocal busy
        if method == "POST" and busy:
            busy -= 1
            return 200, {"error": "Already in progress."}
        return None

    api.answer = refuse
    assert (await run(job)).state is JobState.SUCCEEDED
    assert (api.starts, len(api.runs)) == (3, 1)


async def test_cancelling_takes_the_job_away(api: Api) -> None:
    """Where a cancelled job is gone from the API, that it is gone is its cancellation."""
    job = declared(base_url=api.url, cancel={"method": "DELETE", "path": "/runs/{job_id}"})
    api.end, journal = {}, MemoryJournal()
    running = asyncio.create_task(run(job, journal))
    await until(lambda: any(method == "GET" for method, *_ in api.requests))
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert api.runs == {}
    (entry,) = journal.entries.values()
    assert entry.result
    assert "it was cancelled" in str(entry.result.message)


async def test_arguments_cannot_change_the_address(api: Api) -> None:
    """An argument that would make a path another one is refused, and nothing is sent."""
    job = declared(base_url=api.url, parameters={"report": {}})
    request = PlainRequest("reports?report=..", "run", "the report", None)
    with pytest.raises(VendorError, match="another path"):
        await run_job(HttpJobVendor(job), request, JobPolicy(), journal=MemoryJournal())
    assert api.requests == []


async def test_nobody_there(api: Api) -> None:
    """An API that can't be reached is named as the declaration calls it."""
    job = declared(base_url="http://127.0.0.1:9/api")
    with pytest.raises(VendorUnavailable, match=r"Reports .*the connection was refused"):
        await run(job, outage=0)


async def test_asked_by_post(api: Api) -> None:
    """An API that is read by POST is asked with the declared bodies; asking is no start."""
    asked: list[tuple[str, Any]] = []

    def answer(_: str, path: str, body: Any) -> tuple[int, Any] | None:
        name = path.rsplit("/", 1)[-1]
        if name == "5":
            api.lose_starts = 1
            return None
        asked.append((name, body))
        if len(asked) in (1, 4):
            return 503, {"error": "a bad moment"}
        if name == "describe":
            return 200, {"title": "Sales"}
        if name == "list":
            return 200, {"runs": [{**run, "at": datetime.now(UTC).isoformat()} for run in api.runs.values()]}
        api.runs[body["run"]]["status"] = "done"
        return 200, {"run": api.runs[body["run"]]}

    api.answer = answer
    ask = {"method": "POST"}
    job = declared(
        base_url=api.url,
        start={"path": "/reports/{report}", "job_id": {"path": "run.id"}},
        lookups=[{**ask, "path": "/describe", "body": {"report": "{report}"}, "values": {"name": "title"}}],
        poll={**ask, "path": "/get", "body": {"run": "{job_id}"}, "read": {"state": "run.status"}},
        listing={**ask, "path": "/list", "body": {"of": "{report}"}, "items": "runs", "id": "id"},
        find={"created_at": "at"},
    )
    assert (await run(job)).state is JobState.SUCCEEDED
    describe, get = ("describe", {"report": 5}), ("get", {"run": "1"})
    assert asked == [describe, describe, ("list", {"of": 5}), get, get]
    assert len(api.runs) == 1
