"""The sandbox's Airbyte, over HTTP: what the public API's contract says, and real rows in the warehouse."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import duckdb
import httpx
import pytest

from sandbox import Sandbox, catalog
from sandbox.timeline import Work
from tests.sandbox_fixtures import IDS, airbyte, box, ended, job_id, new_token, sources, start, until

__all__ = ["airbyte", "box", "sources"]


def query(box: Sandbox, sql: str) -> list[tuple[Any, ...]]:
    with duckdb.connect(str(box.warehouse.path)) as db:
        return db.execute(sql).fetchall()


def work_of(box: Sandbox, job: int) -> Work:
    work = box.airbyte.jobs[job].timeline.work
    assert work is not None
    return work


def statuses(client: httpx.Client, job: int) -> list[str]:
    """Every status a job passes through, in order."""
    seen: list[str] = []

    def read() -> dict[str, Any]:
        reply: dict[str, Any] = client.get(f"/jobs/{job}").json()
        if not seen or seen[-1] != reply["status"]:
            seen.append(reply["status"])
        return reply

    until(read, lambda reply: reply["status"] in ("succeeded", "failed", "cancelled"))
    return seen


# -- auth --


@pytest.mark.parametrize("spelling", ["grant_type", "grant-type"])
@pytest.mark.parametrize("form", [False, True])
def test_token_is_given_for_json_and_forms_and_both_spellings(
    box: Sandbox, form: bool, spelling: str
) -> None:
    """Client credentials buy a bearer token, however they are written."""
    body = {
        "client_id": catalog.CLIENT_ID,
        "client_secret": catalog.CLIENT_SECRET,
        spelling: "client_credentials",
    }
    url = f"{box.airbyte_url}/applications/token"
    reply = httpx.post(url, data=body) if form else httpx.post(url, json=body)
    assert reply.status_code == 200
    assert (reply.json()["token_type"], reply.json()["expires_in"]) == ("Bearer", 900)


def test_wrong_secret_is_refused(box: Sandbox) -> None:
    """A wrong client secret gives 401 with nothing but an error id."""
    body = {"client_id": catalog.CLIENT_ID, "client_secret": "wrong"}
    reply = httpx.post(f"{box.airbyte_url}/applications/token", json=body)
    assert reply.status_code == 401
    assert list(reply.json()) == ["errorId"]
    UUID(reply.json()["errorId"])


def test_token_expires_and_requests_are_counted(box: Sandbox, airbyte: httpx.Client) -> None:
    """A token is worth nothing after its lifetime, or once revoked; token requests are counted."""
    assert airbyte.get("/jobs").status_code == 200
    box.airbyte.settings.token_seconds = 0.05
    airbyte.headers["authorization"] = f"Bearer {new_token(airbyte)}"
    time.sleep(0.1)
    reply = airbyte.get("/jobs")
    assert (reply.status_code, reply.json()["title"]) == (401, "invalid-api-key")
    box.airbyte.settings.token_seconds = 60
    airbyte.headers["authorization"] = f"Bearer {new_token(airbyte)}"
    assert airbyte.get("/jobs").status_code == 200
    box.airbyte.revoke_tokens()
    assert airbyte.get("/jobs").status_code == 401
    assert box.airbyte.token_requests == 3


def test_basic_auth_and_no_auth(box: Sandbox) -> None:
    """Older servers take a user and a password, or nothing."""
    box.airbyte.settings.auth = "basic"
    url = f"{box.airbyte_url}/jobs"
    assert httpx.get(url).status_code == 401
    assert httpx.get(url, auth=("airbyte", "wrong")).status_code == 401
    assert httpx.get(url, auth=("airbyte", "password")).status_code == 200
    box.airbyte.settings.auth = "none"
    assert httpx.get(url).status_code == 200


# -- jobs that load --


def test_sync_loads_every_real_flight(box: Sandbox, airbyte: httpx.Client) -> None:
    """A sync of flights lands all 336,776 rows with their types and Airbyte's own columns."""
    reply = ended(airbyte, job_id(airbyte, "flights"))
    assert (reply["status"], reply["rowsSynced"]) == ("succeeded", 336_776)
    assert reply["bytesSynced"] > 30_000_000
    described = dict(row[:2] for row in query(box, "DESCRIBE raw_flights.flights"))
    assert described["dep_time"] == "BIGINT"
    assert described["time_hour"] == described["_airbyte_extracted_at"] == "TIMESTAMP WITH TIME ZONE"
    assert list(described)[-4:] == [
        "_airbyte_raw_id",
        "_airbyte_extracted_at",
        "_airbyte_meta",
        "_airbyte_generation_id",
    ]
    counts = "SELECT count(*), count(dep_time), count(DISTINCT _airbyte_raw_id) FROM raw_flights.flights"
    assert query(box, counts) == [(336_776, 328_521, 336_776)]


@pytest.mark.parametrize(
    ("name", "rows"), [("weather", 26_115), ("planes", 3_322), ("airports", 1_458), ("airlines", 16)]
)
def test_every_connection_loads_its_table(box: Sandbox, airbyte: httpx.Client, name: str, rows: int) -> None:
    """Each connection of the stage lands its own table, and says how many rows it was."""
    assert ended(airbyte, job_id(airbyte, name))["rowsSynced"] == rows
    assert query(box, f"FROM raw_{name}.{name} SELECT count(*)") == [(rows,)]


def test_job_tells_its_life(box: Sandbox, airbyte: httpx.Client) -> None:
    """A job is pending without a duration, then running, then succeeded with times and counts."""
    box.airbyte.set("airlines", duration=4)
    before = datetime.now(UTC).replace(microsecond=0)
    first = start(airbyte, "airlines").json()
    assert (first["status"], first["jobType"], first["connectionId"]) == ("pending", "sync", IDS["airlines"])
    assert "duration" not in first
    assert "rowsSynced" not in first
    assert datetime.fromisoformat(first["startTime"]) >= before
    assert statuses(airbyte, first["jobId"])[-2:] == ["running", "succeeded"]
    last = airbyte.get(f"/jobs/{first['jobId']}").json()
    assert last["duration"].startswith("PT")
    assert datetime.fromisoformat(last["lastUpdatedAt"]) >= datetime.fromisoformat(last["startTime"])


@pytest.mark.parametrize("outcome", ["fail", "cancel", "zero_rows"])
def test_job_without_success_leaves_the_old_rows(box: Sandbox, airbyte: httpx.Client, outcome: str) -> None:
    """What landed before is still there after a job that failed, was cancelled, or found nothing."""
    old = job_id(airbyte, "airlines")
    ended(airbyte, old)
    box.airbyte.set("airlines", outcome=outcome)
    reply = ended(airbyte, job_id(airbyte, "airlines"))
    assert reply["status"] == {"fail": "failed", "cancel": "cancelled"}.get(outcome, "succeeded")
    assert reply["rowsSynced"] == 0
    assert query(box, "SELECT count(*), min(_airbyte_generation_id) FROM raw_airlines.airlines") == [
        (16, old)
    ]


def test_cancelled_sync_leaves_the_old_rows(box: Sandbox, airbyte: httpx.Client) -> None:
    """A sync that is cancelled after it read its source has changed nothing."""
    old = job_id(airbyte, "airlines")
    ended(airbyte, old)
    box.airbyte.set("airlines", outcome="stuck")
    stuck = job_id(airbyte, "airlines")
    time.sleep(0.5)
    assert airbyte.delete(f"/jobs/{stuck}").json()["status"] == "cancelled"
    until(
        lambda: {"done": work_of(box, stuck).done_at},
        lambda found: found["done"] is not None,
    )
    assert query(box, "SELECT min(_airbyte_generation_id) FROM raw_airlines.airlines") == [(old,)]
    tables = query(
        box, "SELECT table_name FROM information_schema.tables WHERE table_schema = 'raw_airlines'"
    )
    assert tables == [("airlines",)]


@pytest.mark.parametrize("kind", ["clear", "reset"])
def test_clear_empties_the_table(box: Sandbox, airbyte: httpx.Client, kind: str) -> None:
    """A clear or reset leaves an empty table."""
    ended(airbyte, job_id(airbyte, "airlines"))
    reply = ended(airbyte, job_id(airbyte, "airlines", kind))
    assert (reply["status"], reply["jobType"], reply["rowsSynced"]) == ("succeeded", kind, 0)
    assert query(box, "SELECT count(*) FROM raw_airlines.airlines") == [(0,)]


_HOLD = "import duckdb, sys; db = duckdb.connect(sys.argv[1]); print('held', flush=True); sys.stdin.read()"


def test_sync_waits_for_a_locked_warehouse_and_then_fails(box: Sandbox, airbyte: httpx.Client) -> None:
    """While another process has the DuckDB file a sync waits, up to its patience; then it fails."""
    command = [sys.executable, "-c", _HOLD, str(box.warehouse.path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:  # noqa: S603 - our own Python
        assert holder.stdout is not None
        assert holder.stdin is not None
        holder.stdout.readline()
        box.warehouse.patience = 0.3
        failed = job_id(airbyte, "airlines")
        assert ended(airbyte, failed)["status"] == "failed"
        assert "stayed locked" in (work_of(box, failed).error or "")
        box.warehouse.patience = 10
        waiting = job_id(airbyte, "airlines")
        time.sleep(0.6)
        assert airbyte.get(f"/jobs/{waiting}").json()["status"] == "running"
        holder.stdin.close()
    assert ended(airbyte, waiting)["status"] == "succeeded"


# -- refusals --


def test_running_sync_is_not_started_again(box: Sandbox, airbyte: httpx.Client) -> None:
    """A second start while a sync runs is 409 try-again-later and names the connection."""
    box.airbyte.set("airlines", duration=60)
    job_id(airbyte, "airlines")
    reply = start(airbyte, "airlines")
    assert reply.status_code == 409
    assert reply.json() == {
        "status": 409,
        "type": "https://reference.airbyte.com/reference/errors#try-again-later",
        "title": "try-again-later",
        "detail": "Please try again later.",
        "data": {"message": f"A sync is already running for: {IDS['airlines']}"},
    }


def test_inactive_connection_hides_its_reason(airbyte: httpx.Client) -> None:
    """Starting an inactive connection is 409 state-conflict, which does not say why."""
    changed = airbyte.patch(f"/connections/{IDS['airlines']}", json={"status": "inactive"})
    assert changed.json()["status"] == "inactive"
    reply = start(airbyte, "airlines")
    assert (reply.status_code, reply.json()["title"]) == (409, "state-conflict")
    assert reply.json()["data"] == {"message": "Could not fulfill request"}


@pytest.mark.parametrize(
    ("body", "status", "title"),
    [
        ({"connectionId": IDS["planes"], "jobType": "refresh"}, 422, "unprocessable-entity"),
        ({"connectionId": IDS["planes"], "jobType": "dance"}, 422, "unprocessable-entity"),
        ({"jobType": "sync"}, 422, "unprocessable-entity"),
        (["sync"], 422, "unprocessable-entity"),
        ({"connectionId": "planes", "jobType": "sync"}, 400, "bad-request"),
        ({"connectionId": str(UUID(int=7)), "jobType": "sync"}, 404, "resource-not-found"),
    ],
)
def test_bad_starts_are_refused(
    box: Sandbox, airbyte: httpx.Client, body: Any, status: int, title: str
) -> None:
    """A start that makes no sense gets its problem body, and no job exists."""
    reply = airbyte.post("/jobs", json=body)
    assert (reply.status_code, reply.json()["title"], reply.json()["status"]) == (status, title, status)
    assert not box.airbyte.jobs


def test_malformed_body_is_refused(airbyte: httpx.Client) -> None:
    """A body that is no JSON is 422."""
    assert airbyte.post("/jobs", content=b"{").status_code == 422


def test_clear_takes_the_place_of_a_running_sync(box: Sandbox, airbyte: httpx.Client) -> None:
    """A clear cancels the sync that runs, and is a job of its own."""
    box.airbyte.set("airlines", outcome="stuck")
    sync = job_id(airbyte, "airlines")
    clear = job_id(airbyte, "airlines", "clear")
    assert airbyte.get(f"/jobs/{sync}").json()["status"] == "cancelled"
    assert ended(airbyte, clear)["status"] == "succeeded"


# -- courses of jobs --


@pytest.mark.parametrize(
    ("behaviour", "course"),
    [
        ({}, ["running", "succeeded"]),
        ({"outcome": "fail"}, ["running", "failed"]),
        ({"outcome": "cancel"}, ["running", "cancelled"]),
        (
            {"outcome": "incomplete_then_succeed", "duration": 3},
            ["running", "incomplete", "running", "succeeded"],
        ),
        ({"queued_seconds": 1}, ["queued", "running", "succeeded"]),
        (
            {"outcome": "unknown_word", "word": "hibernating", "word_seconds": 1, "duration": 2},
            ["running", "hibernating", "running", "succeeded"],
        ),
    ],
)
def test_jobs_run_their_course(
    box: Sandbox, airbyte: httpx.Client, behaviour: dict[str, Any], course: list[str]
) -> None:
    """A job passes through the states that its connection was told to show."""
    box.airbyte.set("airlines", **{"duration": 0.6, **behaviour})
    seen = statuses(airbyte, job_id(airbyte, "airlines"))
    assert [word for word in seen if word != "pending"] == course


@pytest.mark.parametrize(("outcome", "word"), [("stuck", "running"), ("unknown_word", "paused")])
def test_jobs_can_stay_for_ever(box: Sandbox, airbyte: httpx.Client, outcome: str, word: str) -> None:
    """A stuck job never ends by itself, and a test can end it."""
    box.airbyte.set("airlines", duration=0.1, outcome=outcome)
    job = job_id(airbyte, "airlines")
    time.sleep(0.5)
    assert airbyte.get(f"/jobs/{job}").json()["status"] == word
    box.airbyte.finish_job(job, "failed")
    assert airbyte.get(f"/jobs/{job}").json()["status"] == "failed"


def test_outcome_can_be_limited_to_some_jobs(box: Sandbox, airbyte: httpx.Client) -> None:
    """An outcome with `times` wears off."""
    box.airbyte.set("airlines", duration=0.0, outcome="fail", times=2)
    ends = [ended(airbyte, job_id(airbyte, "airlines"))["status"] for _ in range(3)]
    assert ends == ["failed", "failed", "succeeded"]


# -- cancelling --


def test_cancel_hits_what_the_connection_runs_now(box: Sandbox, airbyte: httpx.Client) -> None:
    """DELETE of an old job's id cancels the connection's current job, and answers with the old one."""
    old = job_id(airbyte, "airlines")
    ended(airbyte, old)
    box.airbyte.set("airlines", outcome="stuck")
    current = job_id(airbyte, "airlines")
    reply = airbyte.delete(f"/jobs/{old}")
    assert (reply.status_code, reply.json()["jobId"], reply.json()["status"]) == (200, old, "succeeded")
    assert airbyte.get(f"/jobs/{current}").json()["status"] == "cancelled"


def test_cancel_needs_a_running_job(airbyte: httpx.Client) -> None:
    """Cancelling a finished job, or one that never was, is 409 state-conflict."""
    done = job_id(airbyte, "airlines")
    ended(airbyte, done)
    for job in (done, 999_999):
        reply = airbyte.delete(f"/jobs/{job}")
        assert (reply.status_code, reply.json()["title"]) == (409, "state-conflict")
        assert reply.json()["data"] == {"message": "Job is not currently running"}


def test_cancel_blocks_until_the_job_stopped(box: Sandbox, airbyte: httpx.Client) -> None:
    """The reply to a cancel comes only when the job has stopped."""
    box.airbyte.settings.cancel_seconds = 0.3
    box.airbyte.set("airlines", outcome="stuck")
    job = job_id(airbyte, "airlines")
    began = time.monotonic()
    assert airbyte.delete(f"/jobs/{job}").json()["status"] == "cancelled"
    assert time.monotonic() - began >= 0.3


# -- lists --


@pytest.fixture
def many(box: Sandbox, airbyte: httpx.Client) -> list[int]:
    """30 jobs of 30 connections, in order."""
    ids = box.airbyte.add_connections(30, duration=0.0, rows=7)
    return [job_id(airbyte, connection_id) for connection_id in ids]


def listed(client: httpx.Client, **params: Any) -> list[int]:
    reply = client.get("/jobs", params=params)
    assert reply.status_code == 200, reply.text
    return [job["jobId"] for job in reply.json()["data"]]


def test_list_is_oldest_first_and_twenty_long(airbyte: httpx.Client, many: list[int]) -> None:
    """Without being told otherwise the list has the 20 oldest jobs."""
    assert listed(airbyte) == many[:20]


def test_list_can_be_turned_and_stepped_through(airbyte: httpx.Client, many: list[int]) -> None:
    """`orderBy`, `limit` and `offset` together reach every job once."""
    newest = {"orderBy": "createdAt|DESC", "limit": 12}
    pages = [listed(airbyte, **newest, offset=offset) for offset in (0, 12, 24)]
    assert [len(page) for page in pages] == [12, 12, 6]
    assert [job for page in pages for job in page] == many[::-1]


def test_list_filters(box: Sandbox, airbyte: httpx.Client, many: list[int]) -> None:
    """Jobs can be picked by connection, type, status and workspace."""
    connection = box.airbyte.jobs[many[3]].connection_id
    other = str(UUID(int=9))
    assert listed(airbyte, connectionId=connection) == [many[3]]
    assert listed(airbyte, connectionId=connection, workspaceIds=other) == [many[3]]
    assert listed(airbyte, status="succeeded", limit=100) == many
    assert listed(airbyte, status="running") == []
    assert listed(airbyte, jobType="clear") == []
    assert listed(airbyte, workspaceIds=other) == []
    assert listed(airbyte, workspaceIds=f"{other},{catalog.WORKSPACE_ID}", limit=100) == many
    assert listed(airbyte, workspaceIds=[other, catalog.WORKSPACE_ID], limit=100) == many
    # A singular workspaceId is no parameter of this call.
    assert listed(airbyte, workspaceId=other, limit=100) == many


def test_list_of_an_old_server(box: Sandbox, airbyte: httpx.Client) -> None:
    """Before 2026-02 it names clears and refreshes only where it is asked for them; in 2023 it has none."""
    ids = {kind: box.airbyte.start(IDS["airlines"], kind).job_id for kind in ("reset", "clear")}
    assert listed(airbyte) == [ids["reset"], ids["clear"]]
    box.airbyte.settings.age = "2025"
    assert listed(airbyte) == [ids["reset"]]
    assert listed(airbyte, jobType="clear") == [ids["clear"]]
    box.airbyte.settings.age = "2023"
    assert airbyte.get("/jobs", params={"jobType": "clear"}).status_code == 400
    start = {"connectionId": IDS["airlines"], "jobType": "clear"}
    assert airbyte.post("/jobs", json=start).status_code == 422


def test_list_filters_by_time(box: Sandbox, airbyte: httpx.Client, many: list[int]) -> None:
    """Jobs can be picked by the time they were created or updated."""
    middle = box.airbyte.jobs[many[10]].created_wall
    moment = datetime.fromtimestamp(middle, UTC).isoformat()
    assert listed(airbyte, createdAtStart=moment, limit=100)[-1] == many[-1]
    assert many[0] not in listed(airbyte, createdAtStart=moment, limit=100)
    assert many[-1] not in listed(airbyte, createdAtEnd=moment, limit=100)
    assert listed(airbyte, updatedAtStart="2999-01-01T00:00:00Z") == []
    assert listed(airbyte, updatedAtEnd="2999-01-01T00:00:00Z", limit=100) == many


@pytest.mark.parametrize(
    "params",
    [
        {"orderBy": "createdAt"},
        {"orderBy": "name|ASC"},
        {"limit": 0},
        {"limit": 101},
        {"offset": -1},
        {"status": "done"},
        {"createdAtStart": "yesterday"},
        {"connectionId": "flights"},
    ],
)
def test_list_refuses_bad_parameters(airbyte: httpx.Client, params: dict[str, Any]) -> None:
    """A parameter that makes no sense is 400."""
    assert airbyte.get("/jobs", params=params).status_code == 400


def test_next_link_is_as_useless_as_the_real_one(airbyte: httpx.Client, many: list[int]) -> None:
    """`next` names another host, has lost the order, and is there until a page is empty."""
    reply = airbyte.get("/jobs", params={"orderBy": "createdAt|DESC", "limit": 100}).json()
    assert reply["next"].endswith("/jobs?limit=100&offset=100")
    assert str(airbyte.base_url) not in reply["next"]
    empty = airbyte.get("/jobs", params={"limit": 100, "offset": 100}).json()
    assert (empty["data"], empty["next"]) == ([], "")


def test_fresh_job_can_be_missing_from_the_list(box: Sandbox, airbyte: httpx.Client) -> None:
    """With a visibility delay, a job that was just started is not in the list at first."""
    box.airbyte.set("airlines", visibility_delay=300)
    job = job_id(airbyte, "airlines")
    assert listed(airbyte) == []
    assert airbyte.get(f"/jobs/{job}").status_code == 200
    box.airbyte.set("weather", visibility_delay=0.1)
    other = job_id(airbyte, "weather")
    until(lambda: {"listed": listed(airbyte)}, lambda found: found["listed"] == [other])


def test_unknown_job_is_not_found(airbyte: httpx.Client) -> None:
    """Reading a job that never was is 404."""
    reply = airbyte.get("/jobs/999999")
    assert (reply.status_code, reply.json()["title"]) == (404, "resource-not-found")


def test_waiting_jobs_cost_no_threads(box: Sandbox, airbyte: httpx.Client) -> None:
    """200 running jobs of synthetic connections need no thread of their own."""
    ids = box.airbyte.add_connections(200, duration=30.0)
    before = threading.active_count()
    for connection_id in ids:
        start(airbyte, connection_id)
    assert threading.active_count() <= before
    assert sum(1 for job in box.airbyte.jobs.values() if not job.timeline.at()[2]) == 200


# -- connections, workspaces, tags --


def test_connection_says_where_its_data_lands_and_whose_it_is(airbyte: httpx.Client) -> None:
    """A connection has its namespace, stream, owner's tag, and a creation time in epoch seconds."""
    connection = airbyte.get(f"/connections/{IDS['weather']}").json()
    assert (connection["name"], connection["status"]) == ("weather", "active")
    assert (connection["namespaceDefinition"], connection["namespaceFormat"]) == (
        "custom_format",
        "raw_weather",
    )
    assert connection["configurations"]["streams"][0]["name"] == "weather"
    assert {tag["name"] for tag in connection["tags"]} == {"owner:weather-desk", "nightly"}
    assert isinstance(connection["createdAt"], int)


def test_connections_are_listed_by_tag_and_page(airbyte: httpx.Client) -> None:
    """Connections come in pages and can be picked by tag; deleted ones stay away unless asked for."""
    tags = {tag["name"]: tag["tagId"] for tag in airbyte.get("/tags").json()["data"]}

    def names(**params: Any) -> list[str]:
        return [found["name"] for found in airbyte.get("/connections", params=params).json()["data"]]

    assert names() == ["flights", "weather", "planes", "airports", "airlines"]
    assert names(limit=2, offset=4) == ["airlines"]
    assert names(tagIds=tags["owner:reference-data"]) == ["planes", "airports", "airlines"]
    airbyte.patch(f"/connections/{IDS['planes']}", json={"status": "deprecated"})
    assert "planes" not in names()
    assert "planes" in names(includeDeleted=True)
    assert start(airbyte, "planes").status_code == 404


def test_connection_can_be_patched(airbyte: httpx.Client) -> None:
    """Name, schedule, tags and status of a connection can be changed; nonsense is 422."""
    schedule = {"scheduleType": "cron", "cronExpression": "0 0 6 * * ? UTC"}
    url = f"/connections/{IDS['weather']}"
    changed = airbyte.patch(url, json={"name": "rain", "schedule": schedule, "tags": []}).json()
    assert (changed["name"], changed["schedule"], changed["tags"]) == ("rain", schedule, [])
    assert airbyte.get(url).json() == changed
    assert airbyte.patch(url, json={"status": "asleep"}).status_code == 422
    assert airbyte.patch(f"/connections/{UUID(int=3)}", json={}).status_code == 404


def test_workspace_and_health(airbyte: httpx.Client) -> None:
    """The one workspace is listed and read; health needs no token."""
    assert [found["workspaceId"] for found in airbyte.get("/workspaces").json()["data"]] == [
        catalog.WORKSPACE_ID
    ]
    assert airbyte.get(f"/workspaces/{catalog.WORKSPACE_ID}").json()["name"] == catalog.WORKSPACE_NAME
    assert airbyte.get(f"/workspaces/{UUID(int=1)}").status_code == 404
    assert httpx.get(f"{airbyte.base_url}health").status_code == 200


def test_load_shedding_has_no_retry_after(box: Sandbox, airbyte: httpx.Client) -> None:
    """Beyond a limit that was set, requests are 429 without Retry-After."""
    box.airbyte.settings.requests_per_minute = 2
    replies = [airbyte.get("/jobs") for _ in range(3)]
    assert [reply.status_code for reply in replies] == [200, 200, 429]
    assert replies[2].json() == {"message": "You are being rate limited."}
    assert "retry-after" not in replies[2].headers
