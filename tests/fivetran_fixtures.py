"""A desk from which one connection of the sandbox's Fivetran is run through the engine."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import Any

import pytest
from pydantic import SecretStr

from blocks import FivetranCredentials
from sandbox import Sandbox, catalog
from sandbox.fivetran import Sync
from tasks.fivetran_jobs import FivetranRequest, FivetranVendor
from tasks.jobs import Entry, JobPolicy, JobResult, MemoryJournal, run_job
from tests.jobs_fixtures import until

LONG_AGO = datetime(2026, 3, 2, 6, 2, 53, 870504, tzinfo=UTC)


@pytest.fixture
def credentials(sandbox: Sandbox) -> FivetranCredentials:
    return FivetranCredentials(
        api_key=catalog.FIVETRAN_API_KEY,
        api_secret=SecretStr(catalog.FIVETRAN_API_SECRET),
        base_url=sandbox.fivetran_url,
    )


class Desk:
    """Runs one synthetic connection, and knows what became of it at Fivetran."""

    def __init__(self, sandbox: Sandbox, credentials: FivetranCredentials) -> None:
        self.sandbox = sandbox
        self.fivetran = sandbox.fivetran
        self.credentials = credentials
        (self.connection_id,) = sandbox.fivetran.add_connections(1, duration=0.15)
        self.journal = MemoryJournal()

    def behave(self, **changes: Any) -> None:
        self.fivetran.set(self.connection_id, **changes)

    def fault(self, **fields: Any) -> int:
        return self.sandbox.faults.add(vendor="fivetran", **fields)

    async def run(self, *, rescheduled: Any = "retrigger", **options: Any) -> JobResult:
        """One attempt. Attempts of one desk are retries of each other: they share a journal."""
        how, scope = options.pop("how", "sync"), options.pop("scope", None)
        policy = JobPolicy(**{"poll": 0.03, "timeout": 90.0, **options})
        request = FivetranRequest(
            self.connection_id,
            "resync" if how == "resync" else "sync",
            "orders",
            "sales",
            how=how,
            scope=scope,
            rescheduled=rescheduled,
            timeout=policy.timeout,
        )
        return await run_job(FivetranVendor(self.credentials), request, policy, journal=self.journal)

    def begin(self, **options: Any) -> asyncio.Task[JobResult]:
        return asyncio.create_task(self.run(**options))

    async def until_watched(self) -> None:
        """Wait until the connection is read after the trigger."""
        log = self.sandbox.requests
        await until(lambda: bool(self.posts) and log.find(vendor="fivetran")[-1].method == "GET")

    @property
    def entry(self) -> Entry:
        (entry,) = self.journal.entries.values()
        return entry

    @property
    def syncs(self) -> list[Sync]:
        """The connection's syncs, oldest first, of which Fivetran's API tells nothing."""
        return self.fivetran.syncs_of(self.connection_id)

    @property
    def words(self) -> list[str]:
        """What became of them."""
        return [sync.word for sync in self.syncs]

    @property
    def posts(self) -> list[str]:
        """What was asked for, in order: `sync`, `force` or `resync`."""
        asked = self.sandbox.requests.find(vendor="fivetran", method="POST")
        return ["force" if each.body.get("force") else each.path.rsplit("/", 1)[-1] for each in asked]

    @property
    def changes(self) -> int:
        """How often a connection was changed."""
        return self.sandbox.requests.count(vendor="fivetran", method="PATCH")


@pytest.fixture
def desk(sandbox: Sandbox, credentials: FivetranCredentials, monkeypatch: pytest.MonkeyPatch) -> Desk:
    """With a grace of 0.4 s, so that a look for a lost sync does not take twenty."""
    monkeypatch.setattr(FivetranVendor, "grace", 0.4)
    return Desk(sandbox, credentials)
