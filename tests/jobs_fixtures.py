"""A desk from which one connection of the sandbox is run through the engine."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from blocks import AirbyteServer
from sandbox import Sandbox
from tasks.airbyte_jobs import AirbyteRequest, AirbyteVendor
from tasks.jobs import Entry, JobPolicy, JobResult, MemoryJournal, run_job

# Prefect leaves sockets to the garbage collector, which may find them in anybody's test.
PREFECTS_SOCKETS = [
    pytest.mark.usefixtures("collected"),
    pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:unclosed transport:ResourceWarning"),
    pytest.mark.filterwarnings(
        "ignore:Exception ignored in. <socket:pytest.PytestUnraisableExceptionWarning"
    ),
]


@pytest.fixture(scope="module")
def collected() -> Iterator[None]:
    """Have what these tests leave behind found in the last of them."""
    yield
    gc.collect()


async def until(happened: Callable[[], bool], within: float = 60) -> None:
    """Wait for what happens in the sandbox's thread."""
    async with asyncio.timeout(within):
        while not happened():  # noqa: ASYNC110 - another thread could not set an asyncio.Event
            await asyncio.sleep(0.01)


class Desk:
    """Runs one synthetic connection, and knows what became of it at the vendor."""

    def __init__(self, sandbox: Sandbox, server: AirbyteServer) -> None:
        self.sandbox = sandbox
        self.vendor = AirbyteVendor(server)
        self.connection_id = sandbox.airbyte.add_connections(1, duration=0.1)[0]
        self.request = AirbyteRequest(self.connection_id, "sync", "orders", "sales")
        self.journal = MemoryJournal()

    def behave(self, **changes: Any) -> None:
        self.sandbox.airbyte.set(self.connection_id, **changes)

    def fault(self, **fields: Any) -> int:
        return self.sandbox.faults.add(vendor="airbyte", **fields)

    async def run(self, *, operation: str = "sync", **policy: Any) -> JobResult:
        """One attempt. Attempts of one desk are retries of each other: they share a journal."""
        request = AirbyteRequest(self.connection_id, operation, "orders", "sales")
        settings = JobPolicy(**{"poll": 0.03, "timeout": 60.0, **policy})
        return await run_job(self.vendor, request, settings, journal=self.journal)

    def begin(self, **policy: Any) -> asyncio.Task[JobResult]:
        return asyncio.create_task(self.run(**policy))

    async def until_started(self, jobs: int = 1) -> None:
        """Wait until the engine has seen the start of its job."""
        await until(lambda: len(self.jobs) >= jobs and bool(self.journal.entries) and bool(self.entry.handle))

    def start_by_hand(self, operation: Any = "sync") -> str:
        """What somebody else starts."""
        return str(self.sandbox.airbyte.start(self.connection_id, operation).job_id)

    def end_first(self) -> None:
        """Let the oldest job succeed now."""
        self.sandbox.airbyte.jobs_of(self.connection_id)[0].timeline.finish("succeeded")

    @property
    def entry(self) -> Entry:
        (entry,) = self.journal.entries.values()
        return entry

    @property
    def jobs(self) -> list[str]:
        """The connection's jobs at the vendor, oldest first."""
        return [str(job.job_id) for job in self.sandbox.airbyte.jobs_of(self.connection_id)]

    @property
    def words(self) -> list[str]:
        """What the vendor says of them."""
        return [job.status for job in self.sandbox.airbyte.jobs_of(self.connection_id)]

    @property
    def looks(self) -> int:
        """How many GETs have arrived."""
        return self.sandbox.requests.count(method="GET")

    def asked(self, path: str) -> bool:
        """Whether a GET of this path has arrived."""
        return self.sandbox.requests.count(method="GET", path=path) > 0

    @property
    def cancels(self) -> int:
        return self.sandbox.requests.count(method="DELETE")

    @property
    def posts(self) -> int:
        return self.sandbox.requests.count(method="POST", path="/jobs$")


@pytest.fixture
def desk(sandbox: Sandbox, airbyte: AirbyteServer, monkeypatch: pytest.MonkeyPatch) -> Desk:
    """With a grace of 0.3 s, so that a look for a lost job does not take five."""
    monkeypatch.setattr(AirbyteVendor, "grace", 0.3)
    return Desk(sandbox, airbyte)
