"""The sandbox's Census, over HTTP: triggers, runs over real tables, and the API's oddities."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import duckdb
import httpx
import pytest

from sandbox import Sandbox, catalog
from sandbox.census import Sync
from tests.sandbox_fixtures import box, control, sources, until

__all__ = ["box", "control", "sources"]

pytestmark = pytest.mark.no_server
FINAL = ("completed", "failed", "skipped", "cancelled")


@pytest.fixture
def census(box: Sandbox) -> Iterator[httpx.Client]:
    headers = {"authorization": f"Bearer {catalog.CENSUS_API_KEY}"}
    with httpx.Client(base_url=box.census_url, headers=headers) as client:
        yield client


@pytest.fixture
def fleet(box: Sandbox) -> None:
    """The table that sync 401 reads, with 20 rows."""
    with duckdb.connect(str(box.warehouse.path)) as db:
        db.execute("CREATE SCHEMA marts")
        db.execute("CREATE TABLE marts.mart_fleet_utilisation AS SELECT range AS tail FROM range(20)")


def trigger(client: httpx.Client, sync: int = 401, query: str = "") -> int:
    reply = client.post(f"/syncs/{sync}/trigger{query}").raise_for_status().json()
    assert reply["status"] == "success"
    run_id: int = reply["data"]["sync_run_id"]
    return run_id


def run(client: httpx.Client, run_id: int) -> dict[str, Any]:
    reply = client.get(f"/sync_runs/{run_id}").raise_for_status().json()
    assert reply["status"] == "success"
    data: dict[str, Any] = reply["data"]
    return data


def ended(client: httpx.Client, run_id: int) -> dict[str, Any]:
    return until(lambda: run(client, run_id), lambda found: found["status"] in FINAL)


def counts(reply: dict[str, Any]) -> tuple[int, int, int, int]:
    return tuple(reply[f"records_{what}"] for what in ("processed", "updated", "failed", "invalid"))  # type: ignore[return-value]


def test_run_reads_the_real_table(fleet: None, census: httpx.Client) -> None:
    """A run sends as many records as its table has rows; its id is a number."""
    reply = ended(census, trigger(census))
    assert (reply["status"], reply["source_record_count"], counts(reply)) == ("completed", 20, (20, 20, 0, 0))
    assert reply["created_at"] < reply["completed_at"] == reply["updated_at"]
    assert reply["canceled"] is False


def test_a_run_sends_what_has_changed(box: Sandbox, fleet: None, census: httpx.Client) -> None:
    """The first run and a full sync send all, others what has changed since; rejected records come again."""
    assert ended(census, trigger(census))["full_sync"] is True
    with duckdb.connect(str(box.warehouse.path)) as db:
        db.execute("UPDATE marts.mart_fleet_utilisation SET tail = 100 WHERE tail = 7")
    box.census.set(401, outcome="partial", failed=1, invalid=0, times=1)
    some = ended(census, trigger(census))
    assert (some["full_sync"], some["source_record_count"], counts(some)) == (False, 20, (1, 0, 1, 0))
    assert counts(ended(census, trigger(census))) == (1, 1, 0, 0)
    assert counts(ended(census, trigger(census))) == (0, 0, 0, 0)
    full = ended(census, trigger(census, query="?force_full_sync=true"))
    assert (full["full_sync"], counts(full)) == (True, (20, 20, 0, 0))


def test_the_flag_in_the_body_is_ignored(fleet: None, census: httpx.Client) -> None:
    """A full sync is asked for in the query; what is in the body changes nothing."""
    ended(census, trigger(census))
    reply = census.post("/syncs/401/trigger", json={"force_full_sync": True}).json()
    assert ended(census, reply["data"]["sync_run_id"])["full_sync"] is False


def test_run_walks_through_its_states(box: Sandbox, fleet: None, census: httpx.Client) -> None:
    """queued, working step by step, completed; counts are null until the data is unloaded."""
    box.census.set(401, duration=10, queued_seconds=1)
    run_id = trigger(census)
    first = run(census, run_id)
    assert (first["status"], first["completed_at"]) == ("queued", None)
    assert first["records_processed"] is None
    assert "current_step" not in first
    seen: list[tuple[str, str | None]] = []

    def read() -> dict[str, Any]:
        found = run(census, run_id)
        if (state := (found["status"], found.get("current_step"))) not in seen:
            seen.append(state)
        return found

    until(read, lambda found: found["status"] in FINAL)
    assert seen == [
        ("queued", None),
        ("working", "Checking source and destination configuration"),
        ("working", "Unloading data from warehouse"),
        ("working", "Loading data into destination service"),
        ("working", "Committing data to destination service"),
        ("completed", None),
    ]


def test_a_failed_run_has_no_completed_at(box: Sandbox, fleet: None, census: httpx.Client) -> None:
    """A run that fails late has records processed, a reason, and null for the time of its completion."""
    box.census.set(401, outcome="fail")
    reply = ended(census, trigger(census))
    assert (reply["status"], reply["completed_at"], counts(reply)) == ("failed", None, (20, 0, 0, 0))
    assert reply["error_code"] == "DESTINATION_ERROR"
    assert reply["updated_at"] > reply["created_at"]


def test_missing_table_fails_the_run(census: httpx.Client) -> None:
    """A run over a table that was never built fails, and says which table it missed."""
    reply = ended(census, trigger(census))
    assert (reply["status"], reply["records_processed"]) == ("failed", None)
    assert 'Table "marts.mart_fleet_utilisation" does not exist' in reply["error_detail"]


def test_a_run_beside_another_is_skipped(box: Sandbox, fleet: None, census: httpx.Client) -> None:
    """A trigger during a run gives a run that is queued and then skipped; the sync's status shows neither."""
    box.census.set(401, outcome="stuck", duration=0.1)
    first = trigger(census)
    box.census.set(401, outcome="succeed", queued_seconds=60)
    assert run(census, trigger(census))["status"] == "queued"
    assert census.get("/syncs/401").json()["data"]["status"] == "ready"
    box.census.set(401, queued_seconds=0)
    second = trigger(census)
    assert first != second
    skipped = ended(census, second)
    assert (skipped["status"], skipped["completed_at"], skipped["canceled"]) == ("skipped", None, False)
    until(lambda: run(census, first), lambda found: found["status"] == "working")
    box.census.finish_run(first, "completed")
    assert census.get("/syncs/401").json()["data"]["status"] == "up to date"
    assert ended(census, trigger(census))["status"] == "completed"


@pytest.mark.parametrize("word", ["cancelled", "working"])
def test_cancel(box: Sandbox, fleet: None, census: httpx.Client, word: str) -> None:
    """A cancelled run is `canceled`, under whatever status; the reply's status is "cancelled"."""
    box.census.set(401, outcome="stuck", duration=0.1, cancel_word=word)
    run_id = trigger(census)
    until(lambda: run(census, run_id), lambda found: found["status"] == "working")
    assert census.post(f"/sync_runs/{run_id}/cancel").json() == {"status": "cancelled", "data": {}}
    reply = run(census, run_id)
    assert (reply["status"], reply["canceled"], reply["completed_at"]) == (word, True, None)
    again = census.post(f"/sync_runs/{run_id}/cancel")
    assert (again.status_code, again.json()["status"]) == (400, "error")


def test_fresh_run_can_be_missing(box: Sandbox, fleet: None, census: httpx.Client) -> None:
    """With a visibility delay a run is 404 and in no list; the status of a 404 is a number."""
    box.census.set(401, visibility_delay=2)
    run_id = trigger(census)
    reply = census.get(f"/sync_runs/{run_id}")
    assert (reply.status_code, reply.json()) == (404, {"status": 404})
    assert census.get("/syncs/401/sync_runs").json()["data"] == []
    shown = until(
        lambda: census.get(f"/sync_runs/{run_id}").json(), lambda found: found["status"] == "success"
    )
    assert shown["data"]["id"] == run_id


def test_pages(box: Sandbox, census: httpx.Client) -> None:
    """25 to a page unless told, never more than 100 and no word about it; page 0 is page 1."""
    spec = box.census.sync(401).spec
    for number in range(1000, 1128):
        box.census.syncs[number] = Sync(replace(spec, sync_id=number), box.census.sync(401).behaviour)

    def page(**params: Any) -> tuple[list[int], dict[str, Any]]:
        reply = census.get("/syncs", params=params).json()
        return [sync["id"] for sync in reply["data"]], reply["pagination"]

    ids, pagination = page()
    assert (len(ids), ids[0]) == (25, 1127)
    assert pagination == {
        "total_records": 130,
        "per_page": 25,
        "prev_page": None,
        "page": 1,
        "next_page": 2,
        "last_page": 6,
    }
    ids, pagination = page(per_page=1000, page=0)
    assert (len(ids), pagination["per_page"], pagination["page"]) == (100, 100, 1)
    ids, pagination = page(per_page=100, page=2, order="asc")
    assert (len(ids), ids[-1], pagination["next_page"]) == (30, 1127, None)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/syncs/999", 404),
        ("GET", "/syncs/abc", 404),
        ("POST", "/syncs/999/trigger", 404),
        ("GET", "/sync_runs/1", 404),
        ("POST", "/sync_runs/1/cancel", 404),
    ],
)
def test_what_is_not_there(census: httpx.Client, method: str, path: str, status: int) -> None:
    """What does not exist is a 404 whose body says so as a number."""
    reply = census.request(method, path)
    assert (reply.status_code, reply.json()) == (status, {"status": 404})


def test_paused(box: Sandbox, census: httpx.Client) -> None:
    """A sync can be paused; the reply's status is "updated", and a trigger is refused."""
    reply = census.patch("/syncs/401", json={"paused": True}).json()
    assert (reply["status"], reply["data"]["paused"]) == ("updated", True)
    refused = census.post("/syncs/401/trigger")
    assert (refused.status_code, refused.json()) == (
        400,
        {"status": "error", "message": "This sync is paused"},
    )
    assert box.census.runs_of(401) == []
    assert census.patch("/syncs/401", json={"paused": "perhaps"}).status_code == 422


def test_key_is_needed(box: Sandbox) -> None:
    """Without the API key, or with another, everything is 401."""
    for headers in ({}, {"authorization": "Bearer wrong"}):
        assert httpx.get(f"{box.census_url}/syncs", headers=headers).status_code == 401


def test_rate_limit(box: Sandbox, census: httpx.Client) -> None:
    """A limit can be set, with and without a time to wait."""
    box.census.settings.requests_per_10_seconds = 2
    codes = [census.get("/syncs").status_code for _ in range(3)]
    assert codes == [200, 200, 429]
    assert "retry-after" not in census.get("/syncs").headers
    box.census.settings.retry_after = 3
    assert census.get("/syncs").headers["retry-after"] == "3"


def test_control(box: Sandbox, fleet: None, census: httpx.Client, control: httpx.Client) -> None:
    """Over the control API a sync is told how to behave, and its runs are read."""
    changed = control.patch("/census/syncs/Fleet to Salesforce", json={"outcome": "partial", "times": 1})
    assert changed.json()["outcome"] == "partial"
    assert ended(census, trigger(census))["records_failed"] == 2
    (fleet_sync, _) = control.get("/census/syncs").json()["data"]
    assert [one["status"] for one in fleet_sync["runs"]] == ["completed"]
    assert fleet_sync["outcome"] == "succeed"
    assert control.patch("/census/syncs/999", json={}).status_code == 404
