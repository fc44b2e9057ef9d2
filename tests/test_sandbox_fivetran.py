"""The sandbox's Fivetran, over HTTP: syncs without ids that really load, and the API's oddities."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from typing import Any

import duckdb
import httpx
import pytest

from sandbox import Sandbox, catalog
from sandbox.fivetran import instant
from tests.sandbox_fixtures import box, control, fivetran, sources, until

__all__ = ["box", "control", "fivetran", "sources"]

WEATHER, FLEET, SHEET = (spec.connection_id for spec in catalog.FIVETRAN_CONNECTIONS)


def read(client: httpx.Client, connection: str = WEATHER) -> dict[str, Any]:
    found: dict[str, Any] = client.get(f"/connections/{connection}").raise_for_status().json()["data"]
    return found


def sync(client: httpx.Client, connection: str = WEATHER, **body: Any) -> httpx.Response:
    return client.post(f"/connections/{connection}/sync", json=body)


def state(client: httpx.Client, connection: str = WEATHER) -> str:
    word: str = read(client, connection)["status"]["sync_state"]
    return word


def ended(client: httpx.Client, connection: str = WEATHER) -> dict[str, Any]:
    """The connection once a sync of it has ended, well or not."""
    return until(
        lambda: read(client, connection), lambda found: bool(found["succeeded_at"] or found["failed_at"])
    )


def test_a_sync_really_loads(box: Sandbox, fivetran: httpx.Client) -> None:
    """A sync loads its table with Fivetran's own columns; no id comes back, only a new `succeeded_at`."""
    before = read(fivetran)
    assert (before["succeeded_at"], before["failed_at"]) == (None, None)
    reply = sync(fivetran).raise_for_status().json()
    assert reply == {
        "code": "Success",
        "message": f"Sync has been successfully triggered for connection with id '{WEATHER}'",
    }
    assert state(fivetran) == "syncing"
    after = ended(fivetran)
    assert (after["status"]["sync_state"], after["failed_at"]) == ("scheduled", None)
    with duckdb.connect(str(box.warehouse.path), read_only=True) as db:
        found = db.sql(
            "SELECT count(*), count(_fivetran_synced), bool_or(_fivetran_deleted) "
            "FROM fivetran_weather.weather"
        ).fetchone()
    assert found == (26_115, 26_115, False)


def test_states_are_late(box: Sandbox, fivetran: httpx.Client) -> None:
    """After the trigger the connection says `scheduled` for a while, as it does when all is over."""
    box.fivetran.set(WEATHER, queued_seconds=1, duration=1)
    sync(fivetran)
    assert state(fivetran) == "scheduled"
    until(lambda: read(fivetran), lambda found: found["status"]["sync_state"] == "syncing")
    box.fivetran.set(FLEET, visibility_delay=300, duration=600)
    sync(fivetran, FLEET)
    assert box.fivetran.syncs_of(FLEET)[0].word == "syncing"
    assert state(fivetran, FLEET) == "scheduled"


def test_a_trigger_during_a_sync_is_a_silent_no_op(box: Sandbox, fivetran: httpx.Client) -> None:
    """force:false during a sync starts nothing, and the reply does not tell."""
    box.fivetran.set(WEATHER, duration=5)
    replies = [sync(fivetran), sync(fivetran, force=False)]
    assert replies[0].json() == replies[1].json()
    assert len(box.fivetran.syncs_of(WEATHER)) == 1


@pytest.mark.parametrize("counts", [False, True])
def test_force_stops_the_sync_that_runs(box: Sandbox, fivetran: httpx.Client, counts: bool) -> None:
    """force:true stops the running sync and starts another; the stopped one may count as a failure."""
    box.fivetran.settings.stopped_is_failed = counts
    box.fivetran.set(WEATHER, duration=4)
    sync(fivetran)
    sync(fivetran, force=True)
    first, second = box.fivetran.syncs_of(WEATHER)
    assert (first.word, second.word, second.forced) == ("stopped", "syncing", True)
    assert (read(fivetran)["failed_at"] is not None) == counts
    found = until(lambda: read(fivetran), lambda found: bool(found["succeeded_at"]))
    assert found["status"]["sync_state"] == "scheduled"


def test_a_failure(box: Sandbox, fivetran: httpx.Client) -> None:
    """A failed sync has a time and a task that says what to do; the next success clears the task."""
    box.fivetran.set(WEATHER, outcome="fail", times=1)
    sync(fivetran)
    failed = ended(fivetran)
    assert failed["succeeded_at"] is None
    assert failed["status"]["tasks"][0]["message"] == "Reconnect"
    sync(fivetran)
    healed = until(lambda: read(fivetran), lambda found: bool(found["succeeded_at"]))
    assert healed["status"]["tasks"] == []
    assert datetime.fromisoformat(healed["succeeded_at"]) > datetime.fromisoformat(healed["failed_at"])


@pytest.mark.parametrize("schedule", ["auto", "manual"])
def test_rescheduled(box: Sandbox, fivetran: httpx.Client, schedule: str) -> None:
    """Without quota a sync is rescheduled: on a schedule Fivetran runs it again, else somebody must."""
    box.fivetran.set(WEATHER, outcome="reschedule", times=1, rescheduled_seconds=2, duration=0.1)
    box.fivetran.set(WEATHER, schedule_type=schedule)
    sync(fivetran)
    found = until(lambda: read(fivetran), lambda found: found["status"]["sync_state"] == "rescheduled")
    again = datetime.fromisoformat(found["status"]["rescheduled_for"])
    assert again > datetime.now(UTC)
    sync(fivetran)  # before its time it changes nothing
    assert state(fivetran) == "rescheduled"
    while datetime.now(UTC) < again + timedelta(seconds=0.3):
        time.sleep(0.05)
    if schedule == "manual":
        assert state(fivetran) == "rescheduled"
        sync(fivetran)
    found = ended(fivetran)
    assert datetime.fromisoformat(found["succeeded_at"]) > again
    assert "rescheduled_for" not in found["status"]


@pytest.mark.parametrize("change", [{"paused": True}, {"setup_state": "broken"}])
def test_a_connection_that_can_not_sync(box: Sandbox, fivetran: httpx.Client, change: dict[str, Any]) -> None:
    """On a paused or broken connection a trigger is accepted, and nothing ever comes of it."""
    box.fivetran.set(WEATHER, **change)
    assert sync(fivetran).status_code == 200
    assert box.fivetran.syncs_of(WEATHER) == []
    assert state(fivetran) == ("paused" if "paused" in change else "scheduled")


@pytest.mark.parametrize(
    ("outcome", "word", "field", "value"),
    [
        ("pause", "paused", "paused", True),
        ("break", "scheduled", "paused", False),
        ("cancel", "scheduled", "paused", False),
    ],
)
def test_syncs_that_end_without_an_end(
    box: Sandbox, fivetran: httpx.Client, outcome: str, word: str, field: str, value: bool
) -> None:
    """A sync can be cut short by a pause, a broken setup or a cancellation: no time of an end is written."""
    box.fivetran.set(WEATHER, outcome=outcome, duration=0.1)
    sync(fivetran)
    until(lambda: read(fivetran), lambda found: found["status"]["sync_state"] != "syncing")
    found = read(fivetran)
    assert (found["succeeded_at"], found["failed_at"]) == (None, None)
    assert (found["status"]["sync_state"], found[field]) == (word, value)
    assert (found["status"]["setup_state"] == "broken") == (outcome == "break")


def test_a_resync(box: Sandbox, fivetran: httpx.Client) -> None:
    """A re-sync is a historical sync, as the connection says until it has succeeded."""
    box.fivetran.set(FLEET, duration=4)
    assert fivetran.post(f"/connections/{FLEET}/resync", json={}).status_code == 200
    assert read(fivetran, FLEET)["status"]["is_historical_sync"] is True
    assert ended(fivetran, FLEET)["status"]["is_historical_sync"] is False
    scope = {"scope": {"public": ["planes"]}}
    assert fivetran.post(f"/connections/{FLEET}/resync", json=scope).status_code == 200
    until(lambda: read(fivetran, FLEET), lambda found: found["status"]["sync_state"] == "scheduled")
    tables = fivetran.post(f"/connections/{FLEET}/schemas/tables/resync", json={"public": ["planes"]})
    assert tables.json()["message"] == "Re-sync has been triggered successfully"
    assert [s.historical for s in box.fivetran.syncs_of(FLEET)] == [True] * 3


@pytest.mark.parametrize(
    ("connection", "body"),
    [
        (FLEET, {"scope": {}}),
        (FLEET, {"scope": {"public": []}}),
        (FLEET, {"scope": {"public": ["boats"]}}),
        (FLEET, {"scope": {"public": "planes"}}),
        (SHEET, {"scope": {"google_sheets": ["airports"]}}),
    ],
)
def test_a_resync_that_makes_no_sense(
    box: Sandbox, fivetran: httpx.Client, connection: str, body: dict[str, Any]
) -> None:
    """An empty scope, an unknown table or a connector that can't do it: 400, and nothing starts."""
    reply = fivetran.post(f"/connections/{connection}/resync", json=body)
    assert (reply.status_code, reply.json()["code"]) == (400, "InvalidInput")
    assert box.fivetran.syncs_of(connection) == []


def test_a_resync_waits_for_a_sync_or_gives_up(box: Sandbox, fivetran: httpx.Client) -> None:
    """With a sync in progress a re-sync waits for its end; one that lasts is a conflict (409)."""
    box.fivetran.settings.resync_patience = 10
    sync(fivetran, FLEET)
    assert fivetran.post(f"/connections/{FLEET}/resync", json={}).status_code == 200
    box.fivetran.settings.resync_patience = 0.1
    box.fivetran.set(WEATHER, outcome="stuck")
    sync(fivetran)
    assert fivetran.post(f"/connections/{WEATHER}/resync", json={}).status_code == 409
    assert len(box.fivetran.syncs_of(WEATHER)) == 1


def test_a_resync_of_a_paused_connection_is_remembered(box: Sandbox, fivetran: httpx.Client) -> None:
    """It begins when the connection is enabled again."""
    fivetran.patch(f"/connections/{FLEET}", json={"paused": True})
    assert fivetran.post(f"/connections/{FLEET}/resync", json={}).status_code == 200
    assert box.fivetran.syncs_of(FLEET) == []
    reply = fivetran.patch(f"/connections/{FLEET}", json={"paused": False, "schedule_type": "manual"}).json()
    assert reply["data"]["schedule_type"] == "manual"
    assert [s.historical for s in box.fivetran.syncs_of(FLEET)] == [True]


def test_pages(box: Sandbox, fivetran: httpx.Client) -> None:
    """A hundred connections a page unless told, at most a thousand; the cursor ends with the last page."""
    box.fivetran.add_connections(1100)

    def page(path: str = "/connections", **params: Any) -> tuple[int, str | None]:
        data = fivetran.get(path, params=params).raise_for_status().json()["data"]
        return len(data["items"]), data.get("next_cursor")

    assert page()[0] == 100
    many, cursor = page(limit=1000)
    assert (many, page(limit=1000, cursor=cursor)) == (1000, (103, None))
    assert page(schema="fivetran_fleet") == (1, None)
    assert page(f"/groups/{catalog.FIVETRAN_GROUP_ID}/connections", limit=2)[0] == 2
    for params in ({"limit": 0}, {"limit": 1001}, {"limit": "all"}, {"cursor": "nonsense"}):
        assert fivetran.get("/connections", params=params).status_code == 400


@pytest.mark.parametrize(
    ("method", "path", "headers", "status", "code"),
    [
        ("GET", "/connections/no_such", {}, 404, "NotFound_Connector"),
        ("POST", "/connections/no_such/sync", {}, 404, "NotFound_Connector"),
        ("GET", "/groups/no_such", {}, 404, "NotFound_Group"),
        ("GET", f"/connections/{WEATHER}/state", {}, 400, "InvalidInput"),
        ("GET", "/connections", {"accept": "text/html"}, 406, "NotAcceptable"),
        ("GET", "/connections", {"accept": "application/json;version=7"}, 406, "NotAcceptable"),
        ("POST", f"/connections/{WEATHER}/sync", {"content-type": "text/plain"}, 415, "UnsupportedMediaType"),
        ("POST", f"/connections/{WEATHER}/sync", {"content-type": ""}, 415, "UnsupportedMediaType"),
    ],
)
def test_errors(
    fivetran: httpx.Client, method: str, path: str, headers: dict[str, str], status: int, code: str
) -> None:
    """Each error has its status and the envelope with its code."""
    json = {"content-type": "application/json"} if method == "POST" else {}
    body = b"{}" if method == "POST" else None
    reply = fivetran.request(method, path, headers=json | headers, content=body)
    assert (reply.status_code, reply.json()["code"]) == (status, code)
    assert reply.json()["message"]


def test_the_key_is_needed(box: Sandbox) -> None:
    """Without the key and its secret, or with others, everything is 401."""
    for auth in (None, (catalog.FIVETRAN_API_KEY, "wrong")):
        reply = httpx.get(f"{box.fivetran_url}/v1/connections", auth=auth)
        assert (reply.status_code, reply.json()["code"]) == (401, "AuthFailed")


def test_other_documents(fivetran: httpx.Client) -> None:
    """Groups, the schemas of a connection and (after a success) its state can be read; DELETE can't be."""
    assert fivetran.get("/groups").json()["data"]["items"][0]["id"] == catalog.FIVETRAN_GROUP_ID
    schemas = fivetran.get(f"/connections/{FLEET}/schemas").json()["data"]["schemas"]
    assert schemas["public"]["name_in_destination"] == "fivetran_fleet_public"
    sync(fivetran, SHEET)
    ended(fivetran, SHEET)
    assert fivetran.get(f"/connections/{SHEET}/state").json()["data"]["state"]["cursor"]
    assert fivetran.delete(f"/connections/{SHEET}").status_code == 405


def test_the_rate_limit(box: Sandbox, fivetran: httpx.Client) -> None:
    """What is left is in the headers; beyond it 429 with an hour-long Retry-After."""
    box.fivetran.settings.requests_per_hour = 3
    left = [fivetran.get("/groups").headers["x-rate-limit-remaining"] for _ in range(3)]
    assert left == ["3", "2", "1"]
    refused = fivetran.get("/groups")
    assert (refused.status_code, refused.json()["code"]) == (429, "TooManyRequests")
    assert (refused.headers["retry-after"], refused.headers["x-rate-limit"]) == ("3600", "3")


def test_instants_have_as_many_digits_as_they_need() -> None:
    """Times are written as Java does: none, three or six digits of a second."""
    whole = datetime(2026, 3, 2, 6, 2, 53, tzinfo=UTC)
    texts = [instant((whole + timedelta(microseconds=n)).timestamp()) for n in (0, 870_000, 870_504)]
    assert texts == ["2026-03-02T06:02:53Z", "2026-03-02T06:02:53.870Z", "2026-03-02T06:02:53.870504Z"]


def test_control(box: Sandbox, control: httpx.Client, fivetran: httpx.Client) -> None:
    """Connections and settings are read and changed over HTTP; the page of a connection shows its syncs."""
    changed = control.patch(
        "/fivetran/connections/fivetran_weather",
        json={"outcome": "fail", "failed_at": "2026-03-01T18:13:25.043659Z", "warnings": ["Late"]},
    ).json()
    assert (changed["outcome"], changed["failed_at"]) == ("fail", "2026-03-01T18:13:25.043659Z")
    assert read(fivetran)["status"]["warnings"] == [{"code": "warning", "message": "Late"}]
    assert control.patch("/fivetran/connections/nobody", json={}).status_code == 404
    assert control.patch("/fivetran/connections/gusty_anemometer", json={"colour": 1}).status_code == 422
    settings = control.patch("/settings", json={"fivetran": {"retry_after": 7}}).json()
    assert settings["fivetran"]["retry_after"] == 7
    box.fivetran.run_schedule(WEATHER)
    (only,) = control.get("/fivetran/connections").json()["data"][0]["syncs"]
    assert only["started_by"] == "schedule"
    box.fivetran.finish_sync(WEATHER, "failed")
    page = httpx.get(f"{box.fivetran_url}/dashboard/connectors/{WEATHER}/status")
    assert (page.status_code, only["id"] in page.text) == (200, True)
