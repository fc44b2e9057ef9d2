"""One Census sync, run through the engine, and what Census has seen of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import duckdb
import pytest
from pydantic import SecretStr

from blocks import CensusCredentials
from sandbox import Sandbox, catalog
from tasks.census import CensusSync, CensusVendor
from tasks.jobs import Entry, JobPolicy, JobResult, MemoryJournal, PlainRequest, run_job

SYNC = 401


@pytest.fixture
def box(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> Iterator[Sandbox]:
    """A sandbox whose warehouse has a hundred rows for each sync."""
    monkeypatch.setattr(CensusVendor, "grace", 0.4)
    with duckdb.connect(str(sandbox.warehouse.path)) as warehouse:
        warehouse.execute("CREATE SCHEMA marts")
        for spec in catalog.CENSUS_SYNCS:
            warehouse.sql("SELECT range AS n FROM range(100)").create(spec.table)
    return sandbox


@pytest.fixture
def credentials(box: Sandbox) -> CensusCredentials:
    return CensusCredentials(
        api_key=SecretStr(catalog.CENSUS_API_KEY),
        base_url=box.census_url,
        app_url=f"{box.url}/census",
        workspace_id=str(catalog.CENSUS_WORKSPACE_ID),
        requests_per_10_seconds=10_000,
    )


def sync(credentials: CensusCredentials | str, sync_id: Any = SYNC, **settings: Any) -> CensusSync:
    full_sync = settings.pop("full_sync", False)
    policy = JobPolicy(**{"poll": 0.05, "timeout": 90.0, **settings})
    return CensusSync(credentials=credentials, sync_id=sync_id, full_sync=full_sync, policy=policy)


async def run(
    credentials: CensusCredentials,
    journal: MemoryJournal | None = None,
    *,
    operation: str = "sync",
    **policy: Any,
) -> JobResult:
    """One attempt; attempts with one journal are retries of each other."""
    request = PlainRequest(str(SYNC), operation, "fleet", None)
    settings = JobPolicy(**{"poll": 0.05, "timeout": 90.0, **policy})
    return await run_job(CensusVendor(credentials), request, settings, journal=journal or MemoryJournal())


def triggers(box: Sandbox) -> int:
    return box.requests.count(vendor="census", method="POST", path="/trigger$")


def run_ids(box: Sandbox) -> list[str]:
    return [str(run.run_id) for run in box.census.runs_of(SYNC)]


def words(box: Sandbox) -> list[str]:
    return [run.status for run in box.census.runs_of(SYNC)]


def entry_of(journal: MemoryJournal) -> Entry:
    (entry,) = journal.entries.values()
    return entry
