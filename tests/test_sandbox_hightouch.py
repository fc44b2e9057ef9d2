"""The sandbox's Hightouch, over HTTP: triggers, runs over real tables, and the API's oddities."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from typing import Any

import duckdb
import httpx
import pytest

from sandbox import Sandbox, catalog
from tests.sandbox_fixtures import box, control, hightouch, sources, until

__all__ = ["box", "control", "hightouch", "sources"]

pytestmark = pytest.mark.no_server
FINAL = ("success", "warning", "failed", "cancelled", "interrupted")


@pytest.fixture
def scorecard(box: Sandbox) -> None:
    """The table that sync 101 reads, with 16 rows."""
    with duckdb.connect(str(box.warehouse.path)) as db:
        db.execute("CREATE SCHEMA marts")
        db.execute("CREATE TABLE marts.mart_carrier_scorecard AS SELECT range AS carrier FROM range(16)")


def trigger(client: httpx.Client, sync: int | str = 101) -> str:
    run_id: str = client.post(f"/syncs/{sync}/trigger").raise_for_status().json()["id"]
    return run_id


def run(client: httpx.Client, run_id: str, sync: int = 101) -> dict[str, Any]:
    reply = client.get(f"/syncs/{sync}/runs", params={"runId": run_id}).raise_for_status().json()
    return reply["data"][0] if reply["data"] else {"status": "not shown"}


def ended(client: httpx.Client, run_id: str, sync: int = 101) -> dict[str, Any]:
    return until(lambda: run(client, run_id, sync), lambda found: found["status"] in FINAL)


def rows(reply: dict[str, Any], kind: str) -> int:
    return sum(reply[kind].values())


def test_run_reads_the_real_table(scorecard: None, hightouch: httpx.Client) -> None:
    """A run succeeds with as many rows as its model's table has; its id is text first, a number later."""
    run_id = trigger(hightouch)
    assert isinstance(run_id, str)
    reply = ended(hightouch, run_id)
    assert reply["id"] == int(run_id)
    assert (reply["status"], reply["querySize"], reply["error"]) == ("success", 16, None)
    assert (rows(reply, "plannedRows"), rows(reply, "successfulRows"), rows(reply, "failedRows")) == (
        16,
        16,
        0,
    )
    assert reply["createdAt"] <= reply["startedAt"] < reply["finishedAt"]


def test_run_walks_through_its_states(box: Sandbox, scorecard: None, hightouch: httpx.Client) -> None:
    """queued, querying, processing, reporting, success; times are null and rows absent while it is early."""
    box.hightouch.set(101, duration=4, queued_seconds=1)
    run_id = trigger(hightouch)
    first = run(hightouch, run_id)
    assert (first["status"], first["startedAt"], first["finishedAt"]) == ("queued", None, None)
    assert "successfulRows" not in first
    seen: list[str] = []

    def read() -> dict[str, Any]:
        found = run(hightouch, run_id)
        if found["status"] not in seen:
            seen.append(found["status"])
        return found

    until(read, lambda found: found["status"] in FINAL)
    assert seen == ["queued", "querying", "processing", "reporting", "success"]


def test_a_run_sends_what_has_changed(box: Sandbox, scorecard: None, hightouch: httpx.Client) -> None:
    """A run sends new, changed and removed rows; rejected rows come again; a full resync sends all."""
    ended(hightouch, trigger(hightouch))
    with duckdb.connect(str(box.warehouse.path)) as db:
        db.execute("DELETE FROM marts.mart_carrier_scorecard WHERE carrier IN (1, 2)")
        db.execute("UPDATE marts.mart_carrier_scorecard SET carrier = 100 WHERE carrier = 3")
    box.hightouch.set(101, outcome="warn", rejected=1, times=1)
    reply = ended(hightouch, trigger(hightouch))
    assert (reply["querySize"], reply["plannedRows"]["addedCount"], reply["plannedRows"]["removedCount"]) == (
        14,
        1,
        3,
    )
    assert (rows(reply, "successfulRows"), rows(reply, "failedRows")) == (3, 1)
    assert rows(ended(hightouch, trigger(hightouch)), "successfulRows") == 1
    assert rows(ended(hightouch, trigger(hightouch)), "plannedRows") == 0
    whole = hightouch.post("/syncs/101/trigger", json={"fullResync": True}).json()["id"]
    assert rows(ended(hightouch, whole), "successfulRows") == 14


@pytest.fixture
def both(box: Sandbox) -> None:
    """The tables of both syncs of the sequence, and quick runs."""
    with duckdb.connect(str(box.warehouse.path)) as db:
        db.execute("CREATE SCHEMA marts")
        for spec in catalog.SYNCS:
            db.sql("SELECT range AS n FROM range(4)").create(spec.table)
            box.hightouch.set(spec.sync_id, duration=0.1)


def sequence(client: httpx.Client) -> str:
    run_id: str = client.post("/sync-sequences/7/trigger").raise_for_status().json()["id"]
    return run_id


def sequence_ended(client: httpx.Client, run_id: str) -> dict[str, Any]:
    return until(
        lambda: client.get(f"/sync-sequences/runs/{run_id}").json(),
        lambda found: found["status"] in ("done", "failed", "cancelled"),
    )


def test_a_sequence_runs_its_syncs_one_by_one(box: Sandbox, both: None, hightouch: httpx.Client) -> None:
    """A sequence really runs its syncs, and `done` says nothing of how they ended."""
    box.hightouch.set(101, outcome="warn")
    reply = sequence_ended(hightouch, sequence(hightouch))
    assert reply["status"] == "done"
    assert [(run["syncId"], run["status"]) for run in reply["syncRuns"]] == [
        (101, "warning"),
        (102, "success"),
    ]
    (first,), (second,) = box.hightouch.runs_of(101), box.hightouch.runs_of(102)
    assert [run["syncRunId"] for run in reply["syncRuns"]] == [first.run_id, second.run_id]
    assert first.finished_wall is not None
    assert second.started_wall is not None
    assert first.finished_wall <= second.started_wall


@pytest.mark.parametrize(("stops", "word", "syncs"), [(True, "failed", 1), (False, "done", 2)])
def test_a_sequence_with_a_failed_sync(
    box: Sandbox, both: None, hightouch: httpx.Client, stops: bool, word: str, syncs: int
) -> None:
    """A failed sync ends the sequence or not, as it is set up; not ended, it is `done` all the same."""
    box.hightouch.settings.stop_sequences = stops
    box.hightouch.set(101, outcome="fail")
    reply = sequence_ended(hightouch, sequence(hightouch))
    assert (reply["status"], len(reply["syncRuns"])) == (word, syncs)


@pytest.mark.parametrize("queues", [True, False])
def test_a_sequence_never_runs_beside_itself(
    box: Sandbox, both: None, hightouch: httpx.Client, queues: bool
) -> None:
    """Triggers during a run give one queued run, or the run itself, as the workspace is set up."""
    box.hightouch.settings.queue_sequences = queues
    box.hightouch.set(101, outcome="stuck")
    first, second, third = (sequence(hightouch) for _ in range(3))
    assert (first != second == third) if queues else (first == second == third)
    if queues:
        assert hightouch.get(f"/sync-sequences/runs/{second}").json()["status"] == "pending"
    until(lambda: {"n": len(box.hightouch.runs_of(101))}, lambda found: found["n"] == 1)
    box.hightouch.set(101, outcome="succeed")
    box.hightouch.finish_run(box.hightouch.runs_of(101)[0].run_id, "cancelled")
    assert sequence_ended(hightouch, first)["status"] == "failed"
    if queues:
        assert sequence_ended(hightouch, second)["status"] == "done"


def test_sequences_in_the_control_api(
    box: Sandbox, both: None, hightouch: httpx.Client, control: httpx.Client
) -> None:
    """Over the control API a sequence is told how to behave, and its runs are read."""
    changed = control.patch("/sequences/crm-then-braze", json={"outcome": "cancel", "times": 1}).json()
    assert (changed["id"], changed["syncs"], changed["outcome"]) == ("7", [101, 102], "cancel")
    run_id = sequence(hightouch)
    assert sequence_ended(hightouch, run_id)["status"] == "cancelled"
    (found,) = control.get("/sequences").json()["data"]
    assert [run["id"] for run in found["runs"]] == [run_id]
    assert control.patch("/sequences/nobody", json={}).status_code == 404


def test_missing_table_fails_the_run(hightouch: httpx.Client) -> None:
    """A run over a table that was never built fails, and says which table it missed."""
    reply = ended(hightouch, trigger(hightouch))
    assert reply["status"] == "failed"
    assert 'Table "marts.mart_carrier_scorecard" does not exist' in reply["error"]


@pytest.mark.parametrize(
    ("outcome", "status", "done", "rejected"),
    [
        ("warn", "warning", 12, 4),
        ("fail", "failed", 0, 0),
        ("interrupt", "interrupted", 0, 0),
        ("cancel", "cancelled", 0, 0),
        ("zero_rows", "success", 0, 0),
    ],
)
def test_outcomes(
    box: Sandbox,
    scorecard: None,
    hightouch: httpx.Client,
    outcome: str,
    status: str,
    done: int,
    rejected: int,
) -> None:
    """A sync can be told how its runs end, and how many rows are refused."""
    box.hightouch.set("carrier-scorecard-to-crm", outcome=outcome, rejected=0.25)
    reply = ended(hightouch, trigger(hightouch))
    assert reply["status"] == status
    assert (rows(reply, "successfulRows"), rows(reply, "failedRows")) == (done, rejected)
    assert (reply["error"] is not None) == (outcome in ("fail", "interrupt"))


@pytest.mark.parametrize(("outcome", "word"), [("stuck", "processing"), ("unknown_word", "paused")])
def test_run_can_stay_for_ever(
    box: Sandbox, scorecard: None, hightouch: httpx.Client, outcome: str, word: str
) -> None:
    """A stuck run never ends by itself, and a test can end it."""
    box.hightouch.set(101, outcome=outcome, duration=0.1)
    run_id = trigger(hightouch)
    time.sleep(0.4)
    assert run(hightouch, run_id)["status"] == word
    box.hightouch.finish_run(int(run_id), "interrupted")
    assert run(hightouch, run_id)["status"] == "interrupted"


def test_trigger_while_running_queues_one_follow_up(
    box: Sandbox, scorecard: None, hightouch: httpx.Client
) -> None:
    """Triggers during a run give one follow-up run, which starts when the first has ended."""
    box.hightouch.set(101, duration=2)
    first, second, third = (trigger(hightouch) for _ in range(3))
    assert first != second == third
    assert run(hightouch, second)["status"] == "queued"
    one, two = ended(hightouch, first), ended(hightouch, second)
    assert (one["status"], two["status"]) == ("success", "success")
    assert two["createdAt"] < one["finishedAt"] <= two["startedAt"]
    assert len(box.hightouch.runs_of(101)) == 2


def test_fresh_run_can_be_missing(box: Sandbox, scorecard: None, hightouch: httpx.Client) -> None:
    """With a visibility delay, a run's list is empty right after its trigger."""
    box.hightouch.set(101, visibility_delay=300)
    reply = hightouch.get("/syncs/101/runs", params={"runId": trigger(hightouch)}).json()
    assert reply == {"hasMore": False, "data": []}
    box.hightouch.set(102, visibility_delay=0.1)
    shown = trigger(hightouch, 102)
    until(lambda: run(hightouch, shown, 102), lambda found: found["status"] != "not shown")


def test_time_filters_hide_runs_that_have_not_started(
    box: Sandbox, scorecard: None, hightouch: httpx.Client
) -> None:
    """`after` and `within` look at the start of a run, so a queued run is not found."""
    box.hightouch.set(101, queued_seconds=30)
    run_id = int(trigger(hightouch))
    hour_ago = (datetime.now(UTC) - timedelta(hours=1)).isoformat()

    def found(**params: Any) -> list[int]:
        return [reply["id"] for reply in hightouch.get("/syncs/101/runs", params=params).json()["data"]]

    assert found() == [run_id]
    assert found(after=hour_ago) == []
    assert found(within=60) == []


def test_runs_come_in_pages(box: Sandbox, scorecard: None, hightouch: httpx.Client) -> None:
    """`limit` and `offset` step through the runs, and `hasMore` says when to go on."""
    box.hightouch.set(101, duration=0.0)
    ids = []
    for _ in range(3):
        ids.append(int(trigger(hightouch)))
        ended(hightouch, str(ids[-1]))
    page = hightouch.get("/syncs/101/runs", params={"limit": 2}).json()
    rest = hightouch.get("/syncs/101/runs", params={"limit": 2, "offset": 2}).json()
    assert (page["hasMore"], rest["hasMore"]) == (True, False)
    assert sorted(reply["id"] for reply in page["data"] + rest["data"]) == ids


def test_trigger_by_slug_or_text_id(scorecard: None, hightouch: httpx.Client) -> None:
    """/syncs/trigger takes a slug, or an id as text."""
    first = hightouch.post("/syncs/trigger", json={"syncSlug": "carrier-scorecard-to-crm"}).json()["id"]
    assert ended(hightouch, first)["status"] == "success"
    second = hightouch.post("/syncs/trigger", json={"syncId": "101", "fullResync": True}).json()["id"]
    assert ended(hightouch, second)["status"] == "success"


@pytest.mark.parametrize("body", [{"syncId": 101}, {"syncId": "abc"}, {}, {"syncSlug": "x", "extra": 1}])
def test_trigger_may_answer_200_with_an_error(
    box: Sandbox, hightouch: httpx.Client, body: dict[str, Any]
) -> None:
    """A body that does not validate is answered with 200, an error, and no id; nothing starts."""
    reply = hightouch.post("/syncs/trigger", json=body)
    assert reply.status_code == 200
    assert reply.json()["message"] == "Validation failed"
    assert "id" not in reply.json()
    assert box.hightouch.runs_of(101) == []


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("GET", "/syncs/999", None, 404),
        ("GET", "/syncs/abc", None, 422),
        ("GET", "/syncs/101/runs?limit=many", None, 422),
        ("GET", "/syncs/101/runs?orderBy=colour", None, 422),
        ("GET", "/syncs/101/runs?after=yesterday", None, 422),
        ("POST", "/syncs/999/trigger", {}, 404),
        ("POST", "/syncs/101/trigger", {"surprise": 1}, 422),
        ("PATCH", "/syncs/101", {"disabled": "perhaps"}, 422),
    ],
)
def test_bad_requests(hightouch: httpx.Client, method: str, path: str, body: Any, status: int) -> None:
    """What makes no sense gets its status and a JSON body that says why."""
    reply = hightouch.request(method, path, json=body)
    assert reply.status_code == status
    assert {"message", "error"} & set(reply.json())


def test_key_is_needed(box: Sandbox) -> None:
    """Without the API key, or with another, everything is 401."""
    for headers in ({}, {"authorization": "Bearer wrong"}):
        assert httpx.get(f"{box.hightouch_url}/syncs", headers=headers).status_code == 401


def test_disabled_sync_does_not_run(box: Sandbox, hightouch: httpx.Client) -> None:
    """A sync that was disabled says so and refuses a trigger."""
    assert hightouch.patch("/syncs/101", json={"disabled": True}).json()["disabled"] is True
    assert hightouch.get("/syncs/101").json()["status"] == "disabled"
    assert hightouch.post("/syncs/101/trigger").status_code == 400
    assert box.hightouch.runs_of(101) == []


def test_syncs_are_listed_with_the_state_of_their_latest_run(
    scorecard: None, hightouch: httpx.Client
) -> None:
    """GET /syncs covers all syncs in one request: tags, status and time of the latest run."""
    listed = hightouch.get("/syncs").json()
    assert [(sync["id"], sync["status"], sync["lastRunAt"]) for sync in listed["data"]] == [
        (101, "pending", None),
        (102, "pending", None),
    ]
    assert listed["data"][0]["tags"] == {"owner": "flight-ops"}
    ended(hightouch, trigger(hightouch))
    sync = hightouch.get("/syncs", params={"slug": "carrier-scorecard-to-crm"}).json()["data"]
    assert [found["status"] for found in sync] == ["success"]
    assert sync[0]["lastRunAt"] is not None
    page = hightouch.get("/syncs", params={"limit": 1}).json()
    assert (page["hasMore"], len(page["data"])) == (True, 1)


def test_rate_limit_has_no_retry_after(box: Sandbox, hightouch: httpx.Client) -> None:
    """200 requests in 10 seconds pass, the next is 429 without Retry-After; the limit can be switched off."""
    codes = [hightouch.get("/syncs").status_code for _ in range(200)]
    assert set(codes) == {200}
    refused = hightouch.get("/syncs")
    assert refused.status_code == 429
    assert "retry-after" not in refused.headers
    box.hightouch.settings.requests_per_10_seconds = None
    assert hightouch.get("/syncs").status_code == 200
