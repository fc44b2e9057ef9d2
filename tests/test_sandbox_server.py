"""The sandbox as a server: faults at the socket, outages, the request log, the control API, the command."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb
import httpx
import pytest

from sandbox import Sandbox, catalog
from tests.jobs_fixtures import until as happened
from tests.sandbox_fixtures import (
    IDS,
    airbyte,
    box,
    control,
    hightouch,
    job_id,
    new_token,
    sources,
    start,
    until,
)

__all__ = ["airbyte", "box", "control", "hightouch", "sources"]


# -- life --


def test_stopping_waits_for_nothing(tmp_path: Path) -> None:
    """Neither for a stuck job, nor for a request that hangs, which is cut, nor for a client that idles."""
    box = Sandbox(tmp_path).start()
    box.airbyte.settings.auth = "none"
    box.airbyte.set("airlines", outcome="stuck")
    outcomes: list[str] = []

    def hang() -> None:
        try:
            httpx.get(f"{box.airbyte_url}/tags", timeout=300)
        except httpx.TransportError as exc:
            outcomes.append(type(exc).__name__)

    with httpx.Client(base_url=box.airbyte_url) as client:
        start(client, "airlines").raise_for_status()
        box.faults.add(kind="delay", delay=300, path="/tags$")
        hanging = threading.Thread(target=hang)
        hanging.start()
        until(lambda: {"n": box.requests.count(path="/tags$")}, lambda found: found["n"] == 1)
        box.stop()
        hanging.join(60)
        assert outcomes == ["RemoteProtocolError"]
        with pytest.raises(httpx.TransportError):
            client.get("/health")


def test_stop_in_mid_load_leaves_no_trace(sources: Path, tmp_path: Path) -> None:
    """Stopping while the flights are loading leaves no half-loaded table, then and later."""
    box = Sandbox(sources, warehouse=tmp_path / "warehouse.duckdb", job_seconds=0.1).start()
    box.airbyte.settings.auth = "none"
    with httpx.Client(base_url=box.airbyte_url) as client:
        job_id(client, "flights")
    time.sleep(0.3)
    box.stop()
    time.sleep(0.3)
    with duckdb.connect(str(tmp_path / "warehouse.duckdb")) as db:
        named = "SELECT table_schema || '.' || table_name FROM information_schema.tables"
        db.begin()  # what the loader does away with meanwhile is there to the end
        tables = db.execute(named).fetchall()
        # None, unless the machine was so busy that the whole load was done before the stop.
        loaded = [db.execute(f"SELECT count(*) FROM {table}").fetchone() for (table,) in tables]  # noqa: S608
    assert loaded in ([], [(336_776,)])


def test_jobs_of_a_restarted_sandbox_have_new_ids(tmp_path: Path) -> None:
    """A server that remembers job 1001's events would take the next one's for repeats."""
    seen = []
    for _ in range(2):
        with Sandbox(tmp_path, job_seconds=0.05) as box:
            seen.append(
                (box.airbyte.next_job, box.hightouch.next_run, box.census.next_run, box.dbt_cloud.next_run)
            )
    assert seen[0] == (1001, 6134, 324_399_613, 70_471_001)
    assert all(after > before for before, after in zip(*seen, strict=True))


def test_taken_port_is_said_at_once(box: Sandbox, tmp_path: Path) -> None:
    """Starting on a port that is taken raises in the caller."""
    with pytest.raises(OSError, match="in use"):
        Sandbox(tmp_path, port=box.port).start()


async def test_many_clients_are_served(box: Sandbox) -> None:
    """500 keep-alive connections at once each get all their replies."""
    box.airbyte.settings.auth = "none"

    async def client() -> list[bytes]:
        reader, writer = await asyncio.open_connection("127.0.0.1", box.port)
        replies = []
        for _ in range(3):
            writer.write(b"GET /api/public/v1/jobs HTTP/1.1\r\nhost: sandbox\r\n\r\n")
            head = await reader.readuntil(b"\r\n\r\n")
            length = re.search(rb"content-length: (\d+)", head)
            assert length is not None
            replies.append(head[:15] + await reader.readexactly(int(length[1])))
        writer.close()
        await writer.wait_closed()
        return replies

    found = await asyncio.gather(*(client() for _ in range(500)))
    assert {reply for replies in found for reply in replies} == {
        b'HTTP/1.1 200 OK{"data":[],"previous":"","next":""}'
    }
    assert box.requests.count(vendor="airbyte") == 1500


# -- faults --


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        ("drop", httpx.RemoteProtocolError),
        ("reset", httpx.ReadError),
        ("drop_after", httpx.RemoteProtocolError),
        ("cut", httpx.RemoteProtocolError),
    ],
)
def test_connection_is_really_cut(
    box: Sandbox, airbyte: httpx.Client, kind: str, error: type[Exception]
) -> None:
    """The client sees a broken connection, not an error status, and the next request is served."""
    box.faults.add(kind=kind, times=1)
    with pytest.raises(error):
        airbyte.get("/connections")
    assert airbyte.get("/connections").status_code == 200


@pytest.mark.parametrize(
    ("kind", "jobs"), [("drop", 0), ("reset", 0), ("status", 0), ("html", 0), ("drop_after", 1), ("cut", 1)]
)
def test_only_faults_after_the_vendor_let_the_request_through(
    box: Sandbox, airbyte: httpx.Client, kind: str, jobs: int
) -> None:
    """With drop_after and cut the job has started although the reply was lost; with the others it has not."""
    box.faults.add(kind=kind, vendor="airbyte", method="POST", path="/jobs$")
    try:
        assert start(airbyte, "airlines").status_code == 503
    except httpx.TransportError:
        assert kind in ("drop", "reset", "drop_after", "cut")
    assert len(box.airbyte.jobs_of("airlines")) == jobs


def test_replies_can_be_replaced(box: Sandbox, airbyte: httpx.Client) -> None:
    """status, html, empty and garbage answer in the vendor's place."""

    def reply(**fault: Any) -> httpx.Response:
        box.faults.add(times=1, **fault)
        return airbyte.get("/jobs")

    limited = reply(kind="status", status=429, headers={"Retry-After": "3"}, body={"message": "slow down"})
    assert (limited.status_code, limited.headers["retry-after"]) == (429, "3")
    assert limited.json() == {"message": "slow down"}
    plain = reply(kind="status", status=500, body="Internal Server Error")
    assert (plain.status_code, plain.text) == (500, "Internal Server Error")
    page = reply(kind="html", status=502)
    assert page.status_code == 502
    assert page.headers["content-type"].startswith("text/html")
    assert "<html>" in page.text
    assert reply(kind="empty").content == b""
    with pytest.raises(UnicodeDecodeError):
        reply(kind="garbage").json()


def test_replies_can_be_damaged(box: Sandbox, airbyte: httpx.Client) -> None:
    """truncated_json and null_fields spoil the vendor's own reply."""
    whole = airbyte.get(f"/connections/{IDS['weather']}")
    box.faults.add(kind="truncated_json", times=1)
    half = airbyte.get(f"/connections/{IDS['weather']}")
    assert (half.status_code, half.content) == (200, whole.content[: len(whole.content) // 2])
    box.faults.add(kind="null_fields", fields=["status", "tagId"], times=1)
    nulled = airbyte.get(f"/connections/{IDS['weather']}").json()
    assert nulled["status"] is None
    assert [tag["tagId"] for tag in nulled["tags"]] == [None, None]
    assert nulled["name"] == "weather"


def test_reply_can_be_late(box: Sandbox, airbyte: httpx.Client) -> None:
    """A delay holds a request back for so long."""
    box.faults.add(kind="delay", delay=0.3, path="/tags$")
    began = time.monotonic()
    assert airbyte.get("/tags").status_code == 200
    assert time.monotonic() - began >= 0.3


async def test_late_reply_holds_up_no_other(box: Sandbox, airbyte: httpx.Client) -> None:
    """While one request is held back, others are answered."""
    fault = box.faults.add(kind="delay", delay=300, path="/tags$")
    async with httpx.AsyncClient(base_url=airbyte.base_url, headers=airbyte.headers) as client:
        late = asyncio.create_task(client.get("/tags"))
        await happened(lambda: box.faults.hits(fault) == 1)
        assert (await client.get("/connections")).status_code == 200
        assert not late.done()
        late.cancel()


def test_fault_can_skip_count_and_expire(box: Sandbox, airbyte: httpx.Client) -> None:
    """`after` lets requests through first, `times` limits the hits, `seconds` the life of a rule."""

    def codes(count: int) -> list[int]:
        return [airbyte.get("/jobs").status_code for _ in range(count)]

    counted = box.faults.add(kind="status", after=1, times=2)
    assert codes(5) == [200, 503, 503, 200, 200]
    assert box.faults.hits(counted) == 2
    lasting = box.faults.add(kind="status", status=500, seconds=300)
    assert codes(2) == [500, 500]
    box.faults.remove(lasting)
    box.faults.add(kind="status", status=500, seconds=0.05)
    time.sleep(0.1)
    assert codes(1) == [200]


def test_fault_hits_only_what_fits(box: Sandbox, airbyte: httpx.Client, hightouch: httpx.Client) -> None:
    """A rule for one vendor, method and path leaves everything else alone."""
    box.faults.add(kind="status", vendor="airbyte", method="get", path="/jobs$")
    assert airbyte.get("/jobs").status_code == 503
    assert airbyte.get("/connections").status_code == 200
    assert start(airbyte, "airlines").status_code == 200
    assert hightouch.get("/syncs").status_code == 200
    box.faults.clear()
    assert airbyte.get("/jobs").status_code == 200


def test_outage_refuses_connections_and_ends(box: Sandbox, airbyte: httpx.Client) -> None:
    """During an outage a connect is refused, on open connections too; jobs go on; then all is as before."""
    job = job_id(airbyte, "airlines")
    began = time.monotonic()
    box.outage(2)
    with pytest.raises(httpx.ConnectError):
        airbyte.get(f"/jobs/{job}")

    def read() -> dict[str, Any]:
        try:
            reply: dict[str, Any] = airbyte.get(f"/jobs/{job}").json()
        except httpx.ConnectError:
            return {"status": "refused"}
        return reply

    assert until(read, lambda found: found["status"] == "succeeded")["jobId"] == job
    assert time.monotonic() - began >= 2
    box.pause()
    with pytest.raises(httpx.ConnectError):
        airbyte.get(f"/jobs/{job}")
    box.resume()
    assert airbyte.get(f"/jobs/{job}").status_code == 200


# -- request log --


def test_requests_are_logged_without_secrets(box: Sandbox, airbyte: httpx.Client) -> None:
    """The log has method, path, query, status and body of vendor requests, and no secret of any."""
    start(airbyte, "airlines")
    airbyte.get("/jobs", params={"limit": 5})
    httpx.post(box.slack_url(), json={"text": "hello"})
    (started,) = box.requests.find(vendor="airbyte", method="POST", path=r"/jobs$")
    assert started.body == {"connectionId": IDS["airlines"], "jobType": "sync"}
    assert (started.status, started.fault) == (200, None)
    assert box.requests.find(method="GET")[0].query == "limit=5"
    everything = repr(box.requests.find())
    assert catalog.CLIENT_ID in everything
    assert catalog.CLIENT_SECRET not in everything
    assert catalog.WEBHOOKS["data-alerts"][1] not in everything
    assert airbyte.headers["authorization"].removeprefix("Bearer ") not in everything


def test_cut_requests_are_logged_with_their_fault(box: Sandbox, airbyte: httpx.Client) -> None:
    """A request whose connection was cut has no status, but the name of the fault."""
    box.faults.add(kind="drop_after", times=1)
    with pytest.raises(httpx.RemoteProtocolError):
        start(airbyte, "airlines")
    entry = box.requests.find(path=r"/jobs$")[-1]
    assert (entry.status, entry.fault) == (None, "drop_after")


def test_failure_of_the_sandbox_itself_is_a_500(
    box: Sandbox, airbyte: httpx.Client, caplog: pytest.LogCaptureFixture
) -> None:
    """A fault of our own code is answered with 500 and logged, never hidden."""
    box.airbyte.connections[IDS["airlines"]].tags = None  # type: ignore[assignment]
    with caplog.at_level(logging.ERROR, "sandbox"):
        assert airbyte.get("/connections", params={"tagIds": IDS["airlines"]}).status_code == 500
        # The reply goes out first, its reason is logged right after.
        until(lambda: {"log": caplog.text}, lambda found: bool(found["log"]))
    assert "The sandbox failed on GET /api/public/v1/connections" in caplog.text


# -- control API --


def test_behaviour_is_set_over_http(control: httpx.Client, airbyte: httpx.Client) -> None:
    """A connection, a sync and the servers' settings can be changed and read back."""
    changed = control.patch("/connections/weather", json={"outcome": "stuck", "duration": 0}).json()
    assert (changed["name"], changed["outcome"], changed["duration"]) == ("weather", "stuck", 0)
    job = job_id(airbyte, "weather")
    assert airbyte.get(f"/jobs/{job}").json()["status"] == "running"
    assert control.patch(f"/jobs/{job}", json={"status": "failed"}).json()["status"] == "failed"
    assert control.patch("/connections/weather", json={"status": "inactive"}).json()["outcome"] == "stuck"
    assert start(airbyte, "weather").status_code == 409
    assert control.patch("/syncs/101", json={"outcome": "warn"}).json()["outcome"] == "warn"
    assert control.patch("/syncs/weather-delays-to-braze", json={"disabled": True}).json()["disabled"] is True
    settings = control.patch("/settings", json={"airbyte": {"token_seconds": 3}}).json()
    assert settings["airbyte"]["token_seconds"] == 3
    assert control.get("/settings").json() == settings
    control.delete("/tokens")
    assert airbyte.get("/jobs").status_code == 401


def test_faults_are_set_over_http(control: httpx.Client, airbyte: httpx.Client) -> None:
    """Faults can be added, listed with their hits, and removed."""
    fault = control.post("/faults", json={"kind": "status", "status": 500, "vendor": "airbyte"}).json()["id"]
    assert airbyte.get("/jobs").status_code == 500
    (listed,) = control.get("/faults").json()["data"]
    assert (listed["id"], listed["hits"], listed["spent"]) == (fault, 1, False)
    assert control.delete(f"/faults/{fault}").status_code == 200
    assert control.delete(f"/faults/{fault}").status_code == 404
    assert airbyte.get("/jobs").status_code == 200


def test_what_happened_is_read_over_http(
    box: Sandbox, control: httpx.Client, airbyte: httpx.Client, hightouch: httpx.Client
) -> None:
    """State, requests, jobs, runs and messages can be read back, and the logs be cleared."""
    job_id(airbyte, "airlines")
    hightouch.post("/syncs/101/trigger")
    httpx.post(box.slack_url("flight-ops"), json={"text": "hello"})
    state = control.get("/state").json()
    assert (state["starts"]["airlines"], state["starts"]["flights"], state["messages"]) == (1, 0, 1)
    assert [job["connection"] for job in control.get("/jobs").json()["data"]] == ["airlines"]
    assert len(control.get("/runs").json()["carrier-scorecard-to-crm"]) == 1
    assert [m["text"] for m in control.get("/slack/messages?channel=flight-ops").json()["data"]] == ["hello"]
    assert control.get("/slack/messages?channel=weather-desk").json()["data"] == []
    assert control.get("/requests", params={"vendor": "airbyte", "path": "/jobs$"}).json()["total"] == 1
    control.delete("/requests")
    control.delete("/slack/messages")
    assert control.get("/requests").json() == {"total": 0, "data": []}
    assert box.slack.messages == []


def test_connections_are_added_in_bulk(control: httpx.Client, airbyte: httpx.Client) -> None:
    """Connections that load nothing can be added, and their jobs succeed with a fixed number of rows."""
    new = control.post("/connections", json={"count": 3, "duration": 0, "rows": 42}).json()["connectionIds"]
    assert len(set(new)) == 3
    job = job_id(airbyte, new[0])
    assert airbyte.get(f"/jobs/{job}").json()["rowsSynced"] == 42
    assert len(control.get("/connections").json()["data"]) == 8
    more = control.post("/connections", json={"count": 2}).json()["connectionIds"]
    assert not set(more) & set(new)


def test_outage_is_announced_before_it_begins(control: httpx.Client) -> None:
    """The reply to an outage request still arrives; then connections are refused, then served again."""

    def served() -> dict[str, Any]:
        try:
            return {"status": control.get("/state").status_code}
        except httpx.ConnectError:
            return {"status": None}

    assert control.post("/outage", json={"seconds": 2}).json() == {"seconds": 2}
    until(served, lambda found: found["status"] is None)
    until(served, lambda found: found["status"] == 200)


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "field"),
    [
        ("PATCH", "/connections/weather", {"outcome": "dance"}, 422, "outcome"),
        ("PATCH", "/connections/weather", {"colour": "blue"}, 422, "colour"),
        ("PATCH", "/connections/wether", {"outcome": "fail"}, 404, "path"),
        ("PATCH", "/syncs/999", {"outcome": "fail"}, 404, "path"),
        ("PATCH", "/syncs/101", {"rejected": 2}, 422, "rejected"),
        ("PATCH", "/settings", {"airbyte": {"token_seconds": 0}}, 422, "token_seconds"),
        ("PATCH", "/settings", {"stitch": {}}, 422, "stitch"),
        ("PATCH", "/slack/channels/nowhere", {"error": None}, 404, "path"),
        ("PATCH", "/jobs/1", {"status": "failed"}, 404, "path"),
        ("POST", "/faults", {"kind": "explode"}, 422, "kind"),
        ("POST", "/faults", {"kind": "delay"}, 422, ""),
        ("POST", "/faults", {"kind": "drop", "path": "("}, 422, "path"),
        ("POST", "/connections", {"count": 0}, 422, "count"),
        ("POST", "/outage", {"seconds": -1}, 422, "seconds"),
        ("GET", "/requests?limit=few", None, 422, "query"),
        ("GET", "/requests?path=(", None, 422, "query"),
    ],
)
def test_bad_control_requests_are_explained(
    control: httpx.Client, method: str, path: str, body: Any, status: int, field: str
) -> None:
    """A control request that makes no sense says which field is wrong, and changes nothing."""
    before = control.get("/connections").json(), control.get("/settings").json()
    reply = control.request(method, path, json=body)
    assert (reply.status_code, reply.json()["errors"][0]["field"]) == (status, field)
    assert (control.get("/connections").json(), control.get("/settings").json()) == before


# -- pages --


def test_links_to_jobs_lead_somewhere(box: Sandbox, airbyte: httpx.Client, hightouch: httpx.Client) -> None:
    """The address of a job or a run in the vendor's app shows it, and the start page shows the guide."""
    job = job_id(airbyte, "airlines")
    run = hightouch.post("/syncs/101/trigger").json()["id"]
    with httpx.Client(base_url=box.url) as client:
        shown = client.get(
            f"/workspaces/{catalog.WORKSPACE_ID}/connections/{IDS['airlines']}/timeline?jobId={job}"
        )
        assert f"<tr class=this><td>{job}</td>" in shown.text
        seen = len(box.requests)
        assert run in client.get(f"/hightouch/sandbox/syncs/101/runs/{run}").text
        assert len(box.requests) == seen, "a person's look at a page is no request to the vendor"
        assert client.get(f"/workspaces/x/connections/{IDS['airlines'][:-1]}9").status_code == 404
        assert IDS["weather"] in client.get("/").text
        assert "<html>" in client.get("/", headers={"accept": "text/html"}).text


# -- the command --


@pytest.fixture
def served(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "sandbox", "serve", "--port", "0", "--state", str(tmp_path)]
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(  # noqa: S603 - our own Python
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=Path(__file__).parent.parent,
    ) as process:
        yield process
        process.kill()


def printed(process: subprocess.Popen[str]) -> str:
    """What the command prints until it serves."""
    assert process.stdout is not None
    lines: list[str] = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("Ctrl-C"):
            break
    return "".join(lines)


def test_command_serves_until_interrupted(served: subprocess.Popen[str]) -> None:
    """`python -m sandbox serve` prints what is there, serves it, and ends with 0 on Ctrl-C."""
    text = printed(served)
    for name, connection_id in IDS.items():
        assert re.search(rf"{name} +{connection_id}", text)
    assert catalog.CLIENT_SECRET in text
    assert catalog.HIGHTOUCH_API_KEY in text
    base = re.search(r"base URL +(\S+/api/public/v1)", text)
    assert base is not None
    assert httpx.get(f"{base[1]}/health").status_code == 200
    served.send_signal(signal.SIGINT)
    rest, errors = served.communicate(timeout=60)
    assert (served.returncode, rest.strip(), errors) == (0, "The sandbox has stopped.", "")


def test_command_ends_well_in_mid_load(served: subprocess.Popen[str]) -> None:
    """Ctrl-C while DuckDB is loading ends the process with 0 too; it used to abort it."""
    base = re.search(r"base URL +(\S+/api/public/v1)", printed(served))
    assert base is not None
    with httpx.Client(base_url=base[1]) as client:
        client.headers["authorization"] = f"Bearer {new_token(client)}"
        job_id(client, "flights")
    time.sleep(0.9)
    served.send_signal(signal.SIGINT)
    _, errors = served.communicate(timeout=60)
    assert (served.returncode, errors) == (0, "")


def test_examples_of_the_guide_work_as_printed(box: Sandbox) -> None:
    """Every curl line of the guide is accepted by the control API as it stands."""
    from sandbox.guide import guide

    text = guide(box).replace("\\\n", " ")
    examples = re.findall(r"curl (?:-X (\w+) )?'?(http\S+?)'?(?:\s+-d '([^']+)')?\s*$", text, re.MULTILINE)
    assert len(examples) == text.count("curl ") >= 12
    with httpx.Client() as client:
        # The outage last: after it nobody listens.
        for method, url, body in sorted(examples, key=lambda example: "outage" in example[1]):
            reply = client.request(method or ("POST" if body else "GET"), url, content=body or None)
            assert reply.status_code == 200, (url, reply.text)


def test_taken_port_is_one_sentence(box: Sandbox, tmp_path: Path) -> None:
    """A port that is taken ends the command with one line and exit code 1."""
    command = [sys.executable, "-m", "sandbox", "serve", "--port", str(box.port), "--state", str(tmp_path)]
    done = subprocess.run(  # noqa: S603 - our own Python
        command, capture_output=True, text=True, check=False, cwd=Path(__file__).parent.parent
    )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert f"cannot listen on port {box.port}" in done.stderr
