"""From an accepted event to running user code, and a burst of events, on PostgreSQL.

Native: an automation of Prefect's, for an event that was posted to the server. Ours: `hand_over`, which
creates the run itself. The clock starts when the server, or `hand_over`, has answered.
"""

from __future__ import annotations

import asyncio
import math
import os
import random
import statistics
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal
from uuid import uuid4

import httpx

from bench.stage import ROOT, BenchError, Stage, stop
from deployments.server import LocalServer, free_port

Way = Literal["native", "ours"]
WAYS: tuple[Way, ...] = ("native", "ours")
POOL, FLOW = "bench", "begun"
_PATIENCE = 300.0


@dataclass(frozen=True)
class Worker:
    """A way of running flow runs."""

    name: str
    command: tuple[str, ...]
    query_seconds: float
    limit: float | None = None


COLD = Worker("process worker", ("prefect", "worker", "start", "--type", "process", "--pool", POOL), 2.0)
WARM = Worker(
    "warm worker",
    ("deployments.warm", "--pool", POOL, "--query-seconds", "0.5", "--code", "bench.latency_flows"),
    0.5,
    1.5,
)


@dataclass(frozen=True)
class Latency:
    """Seconds from the accepted event to the first line of the flow, one by one."""

    worker: Worker
    way: Way
    seconds: list[float]
    load: float

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def p99(self) -> float:
        """With fewer than a hundred, the largest."""
        return sorted(self.seconds)[math.ceil(0.99 * len(self.seconds)) - 1]


@dataclass(frozen=True)
class Burst:
    """Many events at once, without a worker: `runs` has how many each event made."""

    way: Way
    events: int
    runs: Counter[str]
    accepted: float
    created: float

    @property
    def exact(self) -> bool:
        return len(self.runs) == self.events and set(self.runs.values()) == {1}


@dataclass
class Events:
    """A deployment that events start, both ways.

    Attributes:
        client: Of the Prefect server's API.
        places: Folder for what the runs leave.
        environment: What a worker needs to use that server.
    """

    client: httpx.Client
    places: Path
    environment: dict[str, str] = field(default_factory=dict)
    deployment_id: str = ""

    def prepare(self) -> None:
        """Register flow, deployment, pool and automation, and see that the automation is known."""
        flow = self._post("flows/", name=FLOW)["id"]
        self._post("work_pools/", name=POOL, type="process")
        deployment = self._post(
            "deployments/",
            flow_id=flow,
            name="bench",
            entrypoint="bench.latency_flows.begun",
            work_pool_name=POOL,
            work_queue_name="default",
            pull_steps=[{"prefect.deployments.steps.set_working_directory": {"directory": str(ROOT)}}],
        )
        self.deployment_id = deployment["id"]
        action = {
            "type": "run-deployment",
            "source": "selected",
            "deployment_id": self.deployment_id,
            "parameters": {"place": "{{ event.payload.place }}"},
        }
        trigger = {"type": "event", "posture": "Reactive", "expect": ["bench.native"], "threshold": 1}
        self._post("automations/", name="bench", trigger=trigger, actions=[action])
        deadline = time.monotonic() + _PATIENCE
        sent: list[str] = []
        runs: Counter[str] = Counter()
        # After the first run the automation is known: what was sent last has its run, too, and last of all.
        while not runs or sent[-1] not in runs:
            if time.monotonic() > deadline:
                raise BenchError("The server does not know the automation.")
            if not runs:
                sent.append(f"prepared-{len(sent)}")
                self.send_native(sent[-1:])
            time.sleep(1)
            runs = self.runs()

    def _post(self, path: str, **body: object) -> dict[str, str]:
        found: dict[str, str] = self.client.post(path, json=body).raise_for_status().json()
        return found

    def runs(self) -> Counter[str]:
        """How many runs there are, by the place that each was given."""
        found: Counter[str] = Counter()
        while True:
            asked = {
                "deployments": {"id": {"any_": [self.deployment_id]}},
                "limit": 200,
                "offset": found.total(),
                "sort": "ID_DESC",
            }
            page = self.client.post("flow_runs/filter", json=asked).raise_for_status().json()
            found.update(run["parameters"]["place"] for run in page)
            if len(page) < 200:
                return found

    def send_native(self, places: list[str]) -> None:
        """Post events that the automation answers."""
        events = [
            {
                "id": str(uuid4()),
                "occurred": datetime.now(UTC).isoformat(),
                "event": "bench.native",
                "resource": {"prefect.resource.id": f"bench.{place}"},
                "payload": {"place": place},
            }
            for place in places
        ]
        self.client.post("events", json=events).raise_for_status()

    def send_ours(self, places: list[str]) -> None:
        """Hand events over."""
        from tasks.events.hand_over import hand_over
        from tasks.events.model import EltEvent
        from tasks.events.triggers import OnceTrigger

        trigger = OnceTrigger(
            deployment=f"{FLOW}/bench",
            name="bench",
            expect=frozenset({"elt.bench.happened"}),
            parameters={"place": "{{ event.payload.place }}"},
        )
        events = [
            EltEvent(
                name="elt.bench.happened",
                key=place,
                occurred=datetime.now(UTC),
                resource_id="bench",
                payload={"place": place},
            )
            for place in places
        ]
        asyncio.run(hand_over(events, [trigger]))

    def sender(self, way: Way) -> Callable[[list[str]], None]:
        return {"native": self.send_native, "ours": self.send_ours}[way]

    def clear(self) -> None:
        """Delete what no worker shall run."""
        asked = {"deployments": {"id": {"any_": [self.deployment_id]}}, "limit": 200}
        while page := self.client.post("flow_runs/filter", json=asked).raise_for_status().json():
            for run in page:
                self.client.delete(f"flow_runs/{run['id']}").raise_for_status()


@contextmanager
def events(stage: Stage) -> Iterator[Events]:
    """The server for all of this module's measurements; this process uses it, too."""
    folder = stage.folder / "latency"
    folder.mkdir()
    for each in (stage.folder, folder):
        each.chmod(0o755)  # started by root, PostgreSQL runs as another user
    with (
        LocalServer(folder / "server", free_port()) as server,
        httpx.Client(base_url=f"{server.api_url}/", timeout=60) as client,
    ):
        os.environ.update(server.environment)  # for hand_over, in this process; prefect is imported there
        prepared = Events(client, folder / "places", server.environment)
        prepared.places.mkdir()
        prepared.prepare()
        yield prepared


def measure(stage: Stage, of: Events, worker: Worker, way: Way, count: int) -> Latency:
    """Send events one at a time, each a random while after the run of the one before has begun."""
    of.clear()
    load = os.getloadavg()[0]
    process = stage.spawn(
        ["-m", *worker.command],
        worker.name.replace(" ", "-"),
        **of.environment,
        PREFECT_WORKER_QUERY_SECONDS=str(worker.query_seconds),
    )
    try:
        _begun(of, way, "warm-up", process)  # and once more, for what is done only at first
        _begun(of, way, "warm-up", process)
        seconds = []
        for _ in range(count):
            time.sleep(random.uniform(0.5, 2.5))  # noqa: S311 - so as not to keep step with the worker's looks
            seconds.append(_begun(of, way, "event", process))
    finally:
        stop(process)
    return Latency(worker, way, seconds, load)


def _begun(of: Events, way: Way, kind: str, process: subprocess.Popen[bytes]) -> float:
    place = of.places / f"{kind}-{uuid4().hex}"
    of.sender(way)([str(place)])
    accepted = time.time()
    while not place.exists():
        if process.poll() is not None or time.time() - accepted > _PATIENCE:
            raise BenchError("An event started nothing.")
        time.sleep(0.005)
    return float(place.read_text()) - accepted


def burst(of: Events, way: Way, count: int, settle: float = 5.0) -> Burst:
    """Send many events at once, and count their runs until there are as many, and once more after a while."""
    of.clear()
    places = [f"burst-{number}" for number in range(count)]
    began = time.perf_counter()
    of.sender(way)(places)
    accepted = time.perf_counter() - began
    deadline = time.monotonic() + _PATIENCE
    while (runs := of.runs()).total() < count and time.monotonic() < deadline:
        time.sleep(0.05)
    created = time.perf_counter() - began
    time.sleep(settle)  # what is made twice would come now
    runs = of.runs()
    return Burst(way, count, runs, accepted, created)
