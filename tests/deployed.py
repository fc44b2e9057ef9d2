"""What the tests of the deployments act with: the CLI, flow runs to watch, a sandbox that counts."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from uuid import UUID

import httpx
import psutil  # type: ignore[import-untyped]
import yaml
from prefect.blocks.core import Block
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterDeploymentId
from prefect.client.schemas.objects import FlowRun, State
from prefect.client.schemas.responses import DeploymentResponse
from prefect_slack import SlackWebhook

from blocks import AirbyteServer, HightouchCredentials
from sandbox import Sandbox, catalog

REPOSITORY = Path(__file__).parent.parent
PREFECT_FILE = "deployments/prefect.yaml"
CHAIN, BY_HAND = "elt-chain/flights", "sync-connections/by-hand"
T = TypeVar("T")


def specs() -> dict[str, dict[str, Any]]:
    """The deployments as the file has them, by name."""
    file = yaml.safe_load((REPOSITORY / PREFECT_FILE).read_text())
    return {spec["name"]: spec for spec in file["deployments"]}


def prefect(*command: str, **env: str) -> str:
    """Run a `prefect` command from the root of the repository."""
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-m", "prefect", *command],
        cwd=REPOSITORY,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, f"prefect {' '.join(command)}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def deploy() -> str:
    return prefect("--no-prompt", "deploy", "--all", "--prefect-file", PREFECT_FILE)


def until(what: str, read: Callable[[], T | None], within: float = 300.0) -> T:
    """What `read` returns as soon as it is something."""
    deadline = time.monotonic() + within
    while not (found := read()):
        assert time.monotonic() < deadline, f"not within {within:g} s: {what}"
        time.sleep(0.1)
    return found


@dataclass
class Runs:
    """Flow runs of deployments, over the suite's real API."""

    client: SyncPrefectClient
    api_url: str

    def deployment(self, name: str) -> DeploymentResponse:
        return self.client.read_deployment_by_name(name)

    def start(self, name: str, **parameters: Any) -> UUID:
        run = self.client.create_flow_run_from_deployment(self.deployment(name).id, parameters=parameters)
        return run.id

    def read(self, run: UUID) -> FlowRun:
        return self.client.read_flow_run(run)

    def of(self, name: str) -> list[FlowRun]:
        of_deployment = FlowRunFilterDeploymentId(any_=[self.deployment(name).id])
        return self.client.read_flow_runs(
            flow_run_filter=FlowRunFilter(deployment_id=of_deployment), limit=200
        )

    def ended(self, run: UUID, within: float = 300.0) -> FlowRun:
        """The run once it is final."""

        def read() -> FlowRun | None:
            found = self.read(run)
            return found if found.state and found.state.is_final() else None

        return until(f"flow run {run} ends", read, within)

    def states(self, run: UUID) -> list[State[Any]]:
        return self.client.read_flow_run_states(run)

    def process(self, run: UUID) -> psutil.Process:
        """The process in which the flow runs."""
        # A runner writes the number alone, some with the host in front.
        pid = until(f"the process of {run} is known", lambda: self.read(run).infrastructure_pid)
        return psutil.Process(int(str(pid).rsplit(":", 1)[-1]))

    def automations(self, name: str) -> list[dict[str, Any]]:
        url = f"{self.api_url}/automations/related-to/prefect.deployment.{self.deployment(name).id}"
        found: list[dict[str, Any]] = httpx.get(url).raise_for_status().json()
        return found


@dataclass
class Stage:
    """A sandbox with connections of many kinds, and what has been asked of it."""

    box: Sandbox
    groups: dict[str, list[str]] = field(default_factory=dict)

    def add(self, name: str, count: int, **behaviour: Any) -> list[str]:
        ids = self.box.airbyte.add_connections(count, prefix=name)
        for connection in ids:
            self.box.airbyte.set(connection, **behaviour)
        self.groups[name] = ids
        return ids

    def syncs(self, name: str) -> list[dict[str, Any]]:
        return [
            {"tool": "airbyte", "server": "airbyte", "connection_id": connection}
            for connection in self.groups[name]
        ]

    def statuses(self, name: str) -> list[str]:
        """The status of each job that was started for these connections."""
        return [job.status for c in self.groups[name] for job in self.box.airbyte.jobs_of(c)]

    def cancels(self, name: str) -> list[int]:
        """How many cancel requests each of their jobs has had."""
        asked = Counter(
            int(entry.path.rsplit("/", 1)[-1])
            for entry in self.box.requests.find(vendor="airbyte", method="DELETE")
        )
        return [asked[job.job_id] for c in self.groups[name] for job in self.box.airbyte.jobs_of(c)]

    def looks(self, job_id: int, since: float) -> int:
        """How often somebody has asked for this job."""
        asked = self.box.requests.find(vendor="airbyte", method="GET", path=rf"/jobs/{job_id}$")
        return sum(entry.time > since for entry in asked)

    def started(self, name: str) -> None:
        """Wait until every connection has a running job."""
        count = len(self.groups[name])
        until(f"{count} {name} jobs run", lambda: self.statuses(name) == ["running"] * count)


@contextmanager
def saved_blocks(box: Sandbox) -> Iterator[None]:
    """The blocks that the deployments name, for as long as the sandbox is up."""
    airbyte = AirbyteServer(
        base_url=box.airbyte_url, client_id=catalog.CLIENT_ID, client_secret=catalog.CLIENT_SECRET
    )
    hightouch = HightouchCredentials(api_key=catalog.HIGHTOUCH_API_KEY, base_url=box.hightouch_url)
    slack = [(channel, SlackWebhook(url=box.slack_url(channel))) for channel in catalog.WEBHOOKS]
    saved: list[tuple[str, Block]] = [("airbyte", airbyte), ("hightouch", hightouch), *slack]
    for name, block in saved:
        block.save(name, overwrite=True)
    yield
    for name, block in saved:
        type(block).delete(name)


@contextmanager
def background(command: list[str], log: Path, **env: str) -> Iterator[None]:
    """A process that is up meanwhile; it ends with everything that it has started."""
    with log.open("wb") as output:
        process = subprocess.Popen(  # noqa: S603
            [sys.executable, *command],
            cwd=log.parent,  # on purpose not the repository: nothing may depend on where a worker is started
            env={**os.environ, **env},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            yield
        finally:
            family = psutil.Process(process.pid).children(recursive=True)
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            for child in family:
                with suppress(psutil.NoSuchProcess):
                    child.kill()
