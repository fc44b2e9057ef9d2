"""The sandbox's Airbyte over its Config API: the public one's jobs, with what only this one tells."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from uuid import UUID

import httpx
import pytest

from sandbox import Sandbox, catalog
from tests.sandbox_fixtures import IDS, box, sources, until

__all__ = ["box", "sources"]
TYPES = ["sync", "reset_connection", "clear", "refresh"]


@pytest.fixture
def config(box: Sandbox) -> Iterator[httpx.Client]:
    secret = {"client_id": catalog.CLIENT_ID, "client_secret": catalog.CLIENT_SECRET}
    with httpx.Client(base_url=box.airbyte_config_url) as client:
        reply = client.post("/applications/token", json=secret)
        assert list(reply.json()) == ["access_token"]  # and not how long it lives
        client.headers["authorization"] = f"Bearer {reply.json()['access_token']}"
        yield client


def post(client: httpx.Client, path: str, **body: Any) -> Any:
    reply = client.post(path, json=body)
    assert reply.status_code == 200, reply.text
    return reply.json()


def ended(client: httpx.Client, job: int) -> Any:
    return until(
        lambda: post(client, "/jobs/get_without_logs", id=job),
        lambda info: info["job"]["status"] in ("succeeded", "failed", "cancelled"),
    )


def run(client: httpx.Client, name: str, operation: str = "sync") -> Any:
    started = post(client, f"/connections/{operation}", connectionId=IDS.get(name, name))
    return ended(client, started["job"]["id"])


def test_sync_is_seen_by_both_apis(box: Sandbox, config: httpx.Client) -> None:
    """A job that one API started is the other's as well, under the same number."""
    info = run(config, "airlines")
    headers = {"authorization": config.headers["authorization"]}
    public = httpx.get(f"{box.airbyte_url}/jobs/{info['job']['id']}", headers=headers).json()
    stats = info["job"]["aggregatedStats"]
    assert (info["job"]["status"], stats["recordsCommitted"]) == ("succeeded", 16)
    assert (public["status"], public["rowsSynced"], public["bytesSynced"]) == (
        "succeeded",
        stats["recordsCommitted"],
        stats["bytesCommitted"],
    )
    assert info["job"]["createdAt"] <= info["job"]["updatedAt"] < 1e10  # seconds, not milliseconds
    assert info["job"]["streamAggregatedStats"][0]["streamName"] == "airlines"


@pytest.mark.parametrize(
    ("operation", "kind"), [("clear", "clear"), ("reset", "reset_connection"), ("sync", "sync")]
)
def test_kinds_of_jobs(config: httpx.Client, operation: str, kind: str) -> None:
    """Each way to start a job has its own word."""
    assert run(config, "airlines", operation)["job"]["configType"] == kind


def test_refresh_loads(box: Sandbox, config: httpx.Client) -> None:
    """A refresh is a job without attempts in its first reply, and loads the table."""
    body = {"connectionId": IDS["airlines"], "refreshMode": "Truncate"}
    started = post(config, "/connections/refresh", **body, streams=[{"streamName": "airlines"}])
    assert list(started) == ["job"]
    assert ended(config, started["job"]["id"])["job"]["aggregatedStats"]["recordsCommitted"] == 16
    for wrong in ({"refreshMode": "Sometimes"}, {"streams": [{"streamName": "nobody"}]}):
        assert config.post("/connections/refresh", json=body | wrong).status_code in (400, 422)


def test_attempts_and_their_failures(box: Sandbox, config: httpx.Client) -> None:
    """Attempts come one after the other; each that failed says why, and whether it helps to try again."""
    box.airbyte.set("airlines", outcome="fail", attempts=3, duration=0.5)
    box.airbyte.set("airlines", reason="No route", failure="config_error")
    started = post(config, "/connections/sync", connectionId=IDS["airlines"])
    assert started["attempts"] == []
    attempts = [attempt["attempt"] for attempt in ended(config, started["job"]["id"])["attempts"]]
    assert [(attempt["id"], attempt["status"]) for attempt in attempts] == [
        (0, "failed"),
        (1, "failed"),
        (2, "failed"),
    ]
    (failure,) = attempts[-1]["failureSummary"]["failures"]
    assert (failure["externalMessage"], failure["retryable"]) == ("No route", False)
    assert failure["timestamp"] > 1e12  # milliseconds


def test_incomplete_is_between_attempts(box: Sandbox, config: httpx.Client) -> None:
    """While a job is incomplete its attempt has failed; then another begins, and that one succeeds."""
    box.airbyte.set("airlines", outcome="incomplete_then_succeed", duration=8)
    job = post(config, "/connections/sync", connectionId=IDS["airlines"])["job"]["id"]
    waiting = until(
        lambda: post(config, "/jobs/get_without_logs", id=job), lambda i: i["job"]["status"] == "incomplete"
    )
    assert [attempt["attempt"]["status"] for attempt in waiting["attempts"]] == ["failed"]
    assert [a["attempt"]["status"] for a in ended(config, job)["attempts"]] == ["failed", "succeeded"]


def test_partial_success(box: Sandbox, config: httpx.Client) -> None:
    """A stream that failed under a job that succeeded is named in its last attempt."""
    box.airbyte.connection("airlines").streams.append({"name": "fleets"})
    box.airbyte.set("airlines", outcome="partial")
    info = run(config, "airlines")
    summary = info["attempts"][-1]["attempt"]["failureSummary"]
    assert (info["job"]["status"], summary["partialSuccess"]) == ("succeeded", True)
    assert summary["failures"][0]["streamDescriptor"] == {"name": "fleets"}
    rows = {s["streamName"]: s["recordsCommitted"] for s in info["job"]["streamAggregatedStats"]}
    assert rows == {"airlines": 16, "fleets": 0}


def test_shapes_of_one_job(config: httpx.Client) -> None:
    """The light form is the job alone, the full one has its logs, which can be huge."""
    job = run(config, "airlines")["job"]["id"]
    assert list(post(config, "/jobs/get_light", id=job)) == ["job"]
    assert len(post(config, "/jobs/get", id=job)["attempts"][0]["logs"]["logLines"]) >= 1000


def test_lists(box: Sandbox, config: httpx.Client) -> None:
    """Jobs are listed newest first, by connection or workspaces, by several statuses, attempts unwrapped."""
    first, second = run(config, "airlines")["job"]["id"], run(config, "planes")["job"]["id"]
    box.airbyte.set("weather", outcome="stuck")
    third = post(config, "/connections/sync", connectionId=IDS["weather"])["job"]["id"]

    def listed(path: str, **body: Any) -> list[int]:
        return [item["job"]["id"] for item in post(config, path, configTypes=TYPES, **body)["jobs"]]

    of_workspace = {"workspaceIds": [catalog.WORKSPACE_ID]}
    assert listed("/jobs/list", configId=IDS["planes"]) == [second]
    assert listed("/jobs/list_for_workspaces", **of_workspace) == [third, second, first]
    assert listed("/jobs/list_for_workspaces", **of_workspace, orderByMethod="ASC") == [first, second, third]
    assert listed("/jobs/list_for_workspaces", workspaceIds=[str(UUID(int=1))]) == []
    done = {"statuses": ["succeeded", "failed"]}
    assert listed("/jobs/list_for_workspaces", **of_workspace, **done) == [second, first]
    page = {"pagination": {"pageSize": 1, "rowOffset": 1}}
    assert listed("/jobs/list_for_workspaces", **of_workspace, **page) == [second]
    assert listed("/jobs/list_for_workspaces", **of_workspace, createdAtStart="2999-01-01T00:00:00Z") == []
    reply = post(config, "/jobs/list", configTypes=["sync"], configId=IDS["planes"])
    assert (reply["totalJobCount"], reply["jobs"][0]["attempts"][0]["status"]) == (1, "succeeded")


def test_running_already(box: Sandbox, config: httpx.Client) -> None:
    """A second start is a 409 with a message and the name of an exception, and no problem document."""
    box.airbyte.set("airlines", outcome="stuck")
    post(config, "/connections/sync", connectionId=IDS["airlines"])
    for path in ("/connections/sync", "/connections/refresh"):
        reply = config.post(path, json={"connectionId": IDS["airlines"], "refreshMode": "Merge"})
        assert reply.status_code == 409
        assert reply.json()["message"] == f"A sync is already running for: {IDS['airlines']}"
        assert reply.json()["exceptionClassName"].endswith("ValueConflictKnownException")


def test_cancel_hits_what_runs_now(box: Sandbox, config: httpx.Client) -> None:
    """Cancelling an old job's id stops the connection's current job; without one it is a conflict."""
    old = run(config, "airlines")["job"]["id"]
    assert config.post("/jobs/cancel", json={"id": old}).status_code == 409
    box.airbyte.set("airlines", outcome="stuck")
    current = post(config, "/connections/sync", connectionId=IDS["airlines"])["job"]["id"]
    assert post(config, "/jobs/cancel", id=old)["job"]["id"] == old
    assert post(config, "/jobs/get_light", id=current)["job"]["status"] == "cancelled"


def test_statuses_of_connections(box: Sandbox, config: httpx.Client) -> None:
    """What each of several connections does is one question."""
    run(config, "airlines")
    box.airbyte.set("planes", outcome="stuck")
    box.airbyte.set("weather", status="inactive")
    box.airbyte.set("airports", outcome="fail", reason="No route")
    post(config, "/connections/sync", connectionId=IDS["planes"])
    run(config, "airports")
    names = ("airlines", "planes", "weather", "airports", "flights")
    until(lambda: {"now": box.airbyte.jobs_of("planes")[0].status}, lambda found: found["now"] == "running")
    found = post(config, "/connections/status", connectionIds=[IDS[name] for name in names])
    words = [status["connectionSyncStatus"] for status in found]
    assert words == ["synced", "running", "paused", "incomplete", "pending"]
    assert found[1]["activeJob"]["status"] == "running"
    assert found[3]["failureReason"]["externalMessage"] == "No route"


def test_connections(config: httpx.Client) -> None:
    """Connections come with their catalog; unknown ones are 404, nonsense is 422."""
    listed = post(config, "/connections/list", workspaceId=catalog.WORKSPACE_ID)["connections"]
    assert {connection["name"] for connection in listed} == set(IDS)
    one = post(config, "/connections/get", connectionId=IDS["flights"])
    assert one in listed
    assert one["namespaceDefinition"] == "customformat"
    assert one["syncCatalog"]["streams"][0]["stream"]["name"] == "flights"
    assert post(config, "/connections/list", workspaceId=str(UUID(int=2)))["connections"] == []
    assert [w["workspaceId"] for w in post(config, "/workspaces/list")["workspaces"]] == [
        catalog.WORKSPACE_ID
    ]
    nobody = config.post("/connections/get", json={"connectionId": str(UUID(int=3))})
    assert (nobody.status_code, nobody.json()["id"]) == (404, str(UUID(int=3)))
    for body in ({}, {"connectionId": "flights"}):
        assert config.post("/connections/get", json=body).status_code == 422


def test_who_may_come_in(box: Sandbox, config: httpx.Client) -> None:
    """Without a token it is 401; the health is told to anybody."""
    with httpx.Client(base_url=box.airbyte_config_url) as nobody:
        reply = nobody.post("/jobs/get_light", json={"id": 1})
        assert (reply.status_code, set(reply.json())) == (401, {"message", "errorId"})
        assert nobody.get("/health").json() == {"available": True}
    box.airbyte.settings.auth = "basic"
    user = (catalog.BASIC_USER, catalog.BASIC_PASSWORD)
    reply = httpx.post(f"{box.airbyte_config_url}/workspaces/list", json={}, auth=user)
    assert reply.status_code == 200


@pytest.mark.parametrize(
    ("apis", "public", "config_status"),
    [("both", "text/plain", 200), ("public", "text/plain", 404), ("config", "text/html", 200)],
)
def test_a_server_with_one_api_only(box: Sandbox, apis: Any, public: str, config_status: int) -> None:
    """In the place of a public API that is not there, there is the web interface."""
    box.airbyte.settings.apis = apis
    assert httpx.get(f"{box.airbyte_url}/health").headers["content-type"].startswith(public)
    assert httpx.get(f"{box.airbyte_config_url}/health").status_code == config_status


def test_a_server_of_2023(box: Sandbox, config: httpx.Client) -> None:
    """It knows less: whole paths are missing, newer words are errors, and an unknown connection hangs."""
    box.airbyte.settings.age = "2023"
    one = {"connectionId": IDS["airlines"], "refreshMode": "Merge"}
    for path in (
        "/connections/clear",
        "/connections/refresh",
        "/jobs/list_for_workspaces",
        "/connections/status",
    ):
        assert config.post(path, json=one).status_code == 404
    assert config.post("/applications/token", json={}).status_code == 404
    assert config.post("/jobs/list", json={"configTypes": TYPES}).status_code == 422
    assert "workspaceId" not in post(config, "/connections/get", connectionId=IDS["airlines"])
    hung = config.post("/connections/sync", json={"connectionId": str(UUID(int=4))})
    assert (hung.status_code, "html" in hung.headers["content-type"]) == (504, True)
    box.airbyte.set("airlines", queued_seconds=5)
    job = post(config, "/connections/sync", connectionId=IDS["airlines"])["job"]
    assert (job["status"], "aggregatedStats" in job) == ("pending", False)
    until(lambda: {"now": box.airbyte.jobs[job["id"]].status}, lambda found: found["now"] == "queued")
    assert post(config, "/jobs/get_light", id=job["id"])["job"]["status"] == "pending"
