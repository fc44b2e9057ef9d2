"""Census's part of the comparison with the vendors' own OpenAPI files: its calls, and the file's slips."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import duckdb
import pytest
from pydantic import SecretStr

from blocks import CensusCredentials
from sandbox import catalog
from tasks.census import CensusVendor
from tasks.jobs import JobError, JobPolicy, JobTimeout, MemoryJournal, PlainRequest, run_job
from tests.spec_drives import Drive
from tests.spec_fixtures import Contract, Slip, read

PREFIX = "/census/api/v1"
_QUICK = JobPolicy(poll=0.03, timeout=60, outage=60)
_SCHEMAS = ("components", "schemas")
_RUN = (*_SCHEMAS, "SyncRun", "properties")


def _says(path: str, method: str, status: int) -> Slip:
    schema = {
        "type": "object",
        "required": ["status", "message"],
        "properties": {"status": {"enum": ["error"]}, "message": {"type": "string"}},
    }
    return Slip(
        f"no error but one 404 is described; {status} of {method} {path}",
        ("paths", path, method, "responses", str(status)),
        {"description": "", "content": {"application/json": {"schema": schema}}},
    )


def _not_found(path: str, method: str) -> Slip:
    return Slip(
        f"the 404 of {method} {path} is not described, as those of its neighbours are",
        ("paths", path, method, "responses", "404"),
        {"$ref": "#/components/responses/NotFound"},
    )


SLIPS = [
    Slip(
        "a reference beside a boolean, which is for its neighbour", (*_RUN, "full_sync"), {"type": "boolean"}
    ),
    Slip(
        "the neighbour, in the docs' example",
        (*_RUN, "sync_trigger_reason"),
        {"$ref": "#/components/schemas/SyncTriggerReason"},
    ),
    Slip(
        "an object of one of two forms, closed to both when it is held against strictly",
        (*_SCHEMAS, "MappingAttributes", "properties", "from", "additionalProperties"),
        True,
    ),
    Slip(
        "a cancelled run's status is in no list",
        (*_RUN, "status", "enum"),
        ["working", "completed", "failed", "skipped", "queued", "cancelled"],
    ),
    Slip(
        "an update answers the sync, not an invitation",
        ("paths", "/syncs/{sync_id}", "patch", "responses", "200", "content", "application/json", "schema"),
        {
            "type": "object",
            "required": ["status", "data"],
            "properties": {"status": {"enum": ["updated"]}, "data": {"$ref": "#/components/schemas/Sync"}},
        },
    ),
    _not_found("/syncs/{sync_id}/trigger", "post"),
    _not_found("/syncs/{sync_id}/sync_runs", "get"),
    _says("/syncs", "get", 401),
    _says("/syncs", "get", 429),
    _says("/syncs/{sync_id}", "patch", 422),
    _says("/syncs/{sync_id}/trigger", "post", 400),
    _says("/sync_runs/{sync_run_id}/cancel", "post", 400),
]


def census_contract(files: Path) -> Contract:
    """Census's own file, its schemas put together from their parts, to be held against strictly."""
    document = read(files / "census.yaml")
    return Contract(_put_together(document, document), PREFIX, "https://app.getcensus.com/api/v1", SLIPS)


def _put_together(value: Any, document: dict[str, Any]) -> Any:
    if isinstance(value, list):
        return [_put_together(each, document) for each in value]
    if not isinstance(value, dict):
        return value
    if "allOf" not in value:
        return {key: _put_together(each, document) for key, each in value.items()}
    whole: dict[str, Any] = {"type": "object", "properties": {}, "required": []}
    for part in value["allOf"]:
        if "$ref" in part:
            part = document["components"]["schemas"][part["$ref"].rpartition("/")[2]]
        schema = _put_together(part, document)
        whole["required"] += schema.get("required", [])
        for name, described in schema.get("properties", {}).items():
            before = {} if "$ref" in described else whole["properties"].get(name, {})
            whole["properties"][name] = before | described
    return whole


async def drive_census(drive: Drive) -> None:
    """Census."""
    sandbox = drive.sandbox
    with duckdb.connect(str(sandbox.warehouse.path)) as warehouse:
        warehouse.execute("CREATE SCHEMA IF NOT EXISTS marts")
        warehouse.sql("SELECT range AS n FROM range(10)").create(catalog.CENSUS_SYNCS[0].table)
    credentials = CensusCredentials(
        api_key=SecretStr(catalog.CENSUS_API_KEY),
        base_url=sandbox.census_url,
        requests_per_10_seconds=10_000,
    )
    vendor = CensusVendor(credentials)

    async def run(outcome: str, operation: str = "sync", **policy: float) -> None:
        sandbox.census.set(401, outcome=outcome, duration=0.1)
        request = PlainRequest("401", operation, "fleet", None)
        settings = _QUICK.model_copy(update=policy)
        await run_job(vendor, request, settings, journal=MemoryJournal())

    async with credentials.api() as api:
        await run("succeed")
        await run("partial", "full-sync")
        for outcome in ("fail", "cancel"):
            with pytest.raises(JobError):
                await run(outcome)
        with pytest.raises(JobTimeout):
            await run("stuck", timeout=0.5)
        sandbox.census.set(401, outcome="succeed", duration=0.6)
        sandbox.census.trigger(401)
        await run("succeed")  # skipped first
        await api.learn({"401", "402", "403", "404"})
        await api.runs("401")
        (first, *_) = sandbox.census.runs_of(401)

    drive.base = sandbox.census_url
    await drive.ask("GET", "/syncs", 401, headers={"Authorization": "Bearer wrong"})
    drive.headers = {"Authorization": f"Bearer {catalog.CENSUS_API_KEY}"}
    await drive.ask("GET", "/syncs?page=2&per_page=1&order=asc")
    await drive.ask("GET", "/syncs/7", 404)
    await drive.ask("GET", "/sync_runs/7", 404)
    await drive.ask("GET", "/syncs/7/sync_runs", 404)
    await drive.ask("POST", "/syncs/7/trigger", 404)
    await drive.ask("POST", "/sync_runs/7/cancel", 404)
    await drive.ask("POST", f"/sync_runs/{first.run_id}/cancel", 400)
    await drive.ask("PATCH", "/syncs/402", 422, json={"paused": "perhaps"})
    attributes = sandbox.census.sync(402).reply()
    await drive.ask("PATCH", "/syncs/402", json={**attributes, "paused": True})
    await drive.ask("POST", "/syncs/402/trigger", 400)
    sandbox.census.settings.requests_per_10_seconds = 1
    await drive.ask("GET", "/syncs")
    await drive.ask("GET", "/syncs", 429)
