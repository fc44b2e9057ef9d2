"""The stage of the bench: a real Prefect server and the sandbox, each a process of its own on loopback."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil  # type: ignore[import-untyped]

from deployments.server import SERVER_SETTINGS, free_port
from sandbox import catalog

ROOT = Path(__file__).resolve().parent.parent


class BenchError(Exception):
    """Something did not run, so there is nothing to measure."""


class Stage:
    """Where the measured processes run.

    Args:
        folder: For everything that is written; its own PREFECT_HOME among it.
        api_url: A standing Prefect server to measure against, instead of one that is started on SQLite.
        patient: Off: measurements begin while the server is still busy with the one before.
    """

    def __init__(self, folder: Path, api_url: str | None = None, *, patient: bool = True) -> None:
        self.folder = folder
        self._patient = patient
        self.api_url = api_url or ""
        self._server: subprocess.Popen[bytes] | None = None
        self._own_server = api_url is None

    def __enter__(self) -> Stage:
        if self._own_server:
            port = free_port()
            self.api_url = f"http://127.0.0.1:{port}/api"
            command = ["-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
            self._server = self.spawn(command, "prefect-server")
        return self

    def __exit__(self, *_: object) -> None:
        if self._server is not None:
            stop(self._server)

    def ready(self) -> None:
        """Wait until the Prefect server answers."""
        self._await_answer(f"{self.api_url}/health", self._server, "prefect-server", 90)

    @property
    def environment(self) -> dict[str, str]:
        """The environment of every measured process: nothing of the user's own Prefect profile."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
        return inherited | {
            "PREFECT_HOME": str(self.folder / "prefect"),
            "PREFECT_API_URL": self.api_url,
            "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "false",
            "DO_NOT_TRACK": "1",
        }

    def spawn(self, arguments: list[str], name: str, **more: str) -> subprocess.Popen[bytes]:
        """Start Python with these arguments; what it prints goes into `<name>.log`."""
        extra = SERVER_SETTINGS if name == "prefect-server" else {}
        with (self.folder / f"{name}.log").open("wb") as log:
            return subprocess.Popen(  # noqa: S603 - our own modules
                [sys.executable, *arguments],
                cwd=ROOT,
                env=self.environment | extra | more,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def log_of(self, name: str) -> str:
        """The end of what a process printed."""
        return (self.folder / f"{name}.log").read_text(errors="replace")[-3000:]

    def settle(self, patience: float = 45.0) -> None:
        """Wait until the Prefect server has worked off what an earlier measurement left it."""
        if not self._patient:
            return
        if self._server is None:
            time.sleep(5)  # somebody else's server: how busy it is can't be seen
            return
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline:
            before = self.server_cpu()
            time.sleep(1)
            if self.server_cpu() - before < 0.15:
                return

    def server_cpu(self) -> float:
        """CPU seconds that the Prefect server has used; 0 for a server that is not ours."""
        if self._server is None:
            return 0.0
        server = psutil.Process(self._server.pid)
        used = [process.cpu_times() for process in (server, *server.children(recursive=True))]
        return float(sum(times.user + times.system for times in used))

    @contextmanager
    def sandbox(self, name: str, warehouse: Path | None = None) -> Iterator[SandboxControl]:
        """A fresh sandbox, whose requests and jobs are those of one measurement only."""
        port = free_port()
        arguments = ["-m", "sandbox", "serve", "--port", str(port), "--job-seconds", "0.2"]
        arguments += ["--state", str(self.folder / "sandbox")]
        arguments += ["--warehouse", str(warehouse)] if warehouse else []
        process = self.spawn(arguments, name)
        try:
            url = f"http://127.0.0.1:{port}"
            self._await_answer(f"{url}/_sandbox/state", process, name, 20)
            with httpx.Client(base_url=url, timeout=60) as client:
                yield SandboxControl(url, client)
        finally:
            stop(process)

    def _await_answer(
        self, url: str, process: subprocess.Popen[bytes] | None, name: str, patience: float
    ) -> None:
        deadline = time.monotonic() + patience
        while True:
            try:
                if httpx.get(url, timeout=2).is_success:
                    return
            except httpx.TransportError:
                pass
            gone = process is not None and process.poll() is not None
            if gone or time.monotonic() > deadline:
                tail = self.log_of(name) if process is not None else ""
                raise BenchError(f"{name} did not come up at {url}.\n{tail}")
            time.sleep(0.1)


class SandboxControl:
    """The sandbox of one measurement, by its control API."""

    def __init__(self, url: str, client: httpx.Client) -> None:
        self.airbyte_url = f"{url}/api/public/v1"
        self._client = client

    def add_connections(self, count: int, seconds: float) -> list[str]:
        """Add connections whose jobs take this long and load nothing; their ids."""
        body = {"count": count, "duration": seconds}
        reply = self._client.post("/_sandbox/connections", json=body).raise_for_status()
        ids: list[str] = reply.json()["connectionIds"]
        return ids

    def requests(self) -> dict[str, int]:
        """How many requests Airbyte had, by kind."""
        query: dict[str, str | int] = {"vendor": "airbyte", "limit": 1_000_000}
        found = self._client.get("/_sandbox/requests", params=query).raise_for_status().json()
        counted = Counter(_kind(entry["method"], entry["path"]) for entry in found["data"])
        return {kind: counted[kind] for kind in ("token", "start", "list", "get", "other")}

    def load_everything(self) -> int:
        """Land all flights, weather, planes, airports and airlines in the warehouse; the number of rows."""
        secrets = {"client_id": catalog.CLIENT_ID, "client_secret": catalog.CLIENT_SECRET}
        reply = self._client.post(f"{self.airbyte_url}/applications/token", json=secrets).raise_for_status()
        headers = {"authorization": f"Bearer {reply.json()['access_token']}"}
        return sum(self._load(spec.connection_id, headers) for spec in catalog.CONNECTIONS)

    def _load(self, connection_id: str, headers: dict[str, str]) -> int:
        body = {"connectionId": connection_id, "jobType": "sync"}
        jobs = f"{self.airbyte_url}/jobs"
        job: dict[str, Any] = self._client.post(jobs, json=body, headers=headers).raise_for_status().json()
        deadline = time.monotonic() + 60
        while job["status"] in ("pending", "running") and time.monotonic() < deadline:
            time.sleep(0.1)
            job = self._client.get(f"{jobs}/{job['jobId']}", headers=headers).raise_for_status().json()
        if job["status"] != "succeeded":
            raise BenchError(f"The sandbox could not load its own data: {job}")
        return int(job["rowsSynced"])


def _kind(method: str, path: str) -> str:
    _, _, rest = path.partition("/api/public/v1/")
    if rest == "applications/token":
        return "token"
    if rest == "jobs":
        return "start" if method == "POST" else "list"
    return "get" if method == "GET" and rest.startswith("jobs/") else "other"


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a process that we started, and what it started."""
    if process.poll() is not None:
        return
    children = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    try:
        process.wait(15)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(5)
    for child in children:
        if child.is_running():
            child.kill()
