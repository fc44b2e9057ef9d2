"""What each vendor's client and sandbox are driven through, so that it can be held against the vendor's file.

First our client's calls, by way of the engine where that makes them; then, by hand, what our client does not
call and every refusal that the sandbox knows.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

import duckdb
import httpx
import pytest

from blocks import AirbyteServer, HightouchCredentials, PagerDutyRouting
from blocks.pagerduty import Alert, Link
from sandbox import Sandbox, catalog
from tasks.airbyte_jobs import AirbyteRequest, AirbyteVendor
from tasks.hightouch_jobs import HightouchRequest, HightouchVendor
from tasks.hightouch_sequences import HightouchSequenceVendor
from tasks.jobs import (
    InputError,
    JobError,
    JobHandle,
    JobPolicy,
    JobTimeout,
    MemoryJournal,
    PlainRequest,
    run_job,
)
from tests.jobs_fixtures import until
from tests.spec_fixtures import BY_HAND, Contract, read
from tests.spec_slips import AIRBYTE_CONFIG, AIRBYTE_PUBLIC, HIGHTOUCH, PAGERDUTY, airbyte_public

AIRBYTE_PREFIX = "/api/public/v1"
HIGHTOUCH_PREFIX = "/hightouch/api/v1"
LONG_AGO = datetime(2020, 1, 1, tzinfo=UTC)
QUICK = JobPolicy(poll=0.03, timeout=60, outage=60)


@dataclass
class Drive:
    """A sandbox with what a test does to it by hand."""

    sandbox: Sandbox
    base: str = ""
    headers: dict[str, str] = field(default_factory=dict)

    async def ask(self, method: str, path: str, status: int = 200, **request: Any) -> Any:
        """A request that none of our clients makes, and the status that it must get."""
        headers = {"User-Agent": BY_HAND, **self.headers, **request.pop("headers", {})}
        async with httpx.AsyncClient() as client:
            reply = await client.request(method, f"{self.base}{path}", headers=headers, **request)
        assert reply.status_code == status, f"{method} {path}: {reply.status_code} {reply.text}"
        return reply.json() if "json" in reply.headers["content-type"] else reply.text


async def _airbyte_by_the_engine(drive: Drive, kind: Literal["public", "config"]) -> list[str]:
    """All that our client asks of one of Airbyte's APIs; the connections that it was asked of."""
    sandbox = drive.sandbox
    server = AirbyteServer(
        base_url=sandbox.url,
        api=kind,
        client_id=catalog.CLIENT_ID,
        client_secret=catalog.CLIENT_SECRET,
        workspace_ids=[catalog.WORKSPACE_ID, str(uuid4())],
    )
    vendor = AirbyteVendor(server)
    ids = sandbox.airbyte.add_connections(6, duration=0.1)
    requests = [AirbyteRequest(each, "sync", each) for each in ids]
    async with server.connect() as api:
        await api.connections()
        # More than three at once are watched by lists; one fails, one retries inside Airbyte, one is cleared.
        sandbox.airbyte.set(ids[1], outcome="fail")
        sandbox.airbyte.set(ids[2], outcome="incomplete_then_succeed", queued_seconds=0.1)
        requests[3] = AirbyteRequest(ids[3], "clear", ids[3])
        ends = await asyncio.gather(
            *(run_job(vendor, request, QUICK, journal=MemoryJournal()) for request in requests),
            return_exceptions=True,
        )
        assert [type(end).__name__ for end in ends].count("JobResult") == 5, ends
        # One loads real rows, one is cancelled by us, one is running already.
        real = AirbyteRequest(catalog.CONNECTIONS[-1].connection_id, "sync", "airlines")
        await run_job(vendor, real, QUICK, journal=MemoryJournal())
        sandbox.airbyte.set(ids[0], outcome="stuck")
        with pytest.raises(JobTimeout):
            await run_job(
                vendor, requests[0], QUICK.model_copy(update={"timeout": 0.2}), journal=MemoryJournal()
            )
        sandbox.airbyte.start(ids[0], "sync")
        skip = QUICK.model_copy(update={"on_active": "skip"})
        await run_job(vendor, requests[0], skip, journal=MemoryJournal())
        if kind == "config":
            await run_job(vendor, AirbyteRequest(ids[4], "reset", "r"), QUICK, journal=MemoryJournal())
            await run_job(vendor, AirbyteRequest(ids[5], "refresh", "r"), QUICK, journal=MemoryJournal())
            sandbox.airbyte.set(ids[4], status="inactive")
            with pytest.raises(InputError):
                await run_job(vendor, requests[4], QUICK, journal=MemoryJournal())
            sandbox.airbyte.set(ids[4], status="active")
    return ids


async def drive_airbyte(drive: Drive) -> None:
    """Airbyte's public API."""
    sandbox, ids = drive.sandbox, await _airbyte_by_the_engine(drive, "public")
    drive.base = sandbox.airbyte_url
    await drive.ask("GET", "/health")
    await drive.ask("GET", "/jobs", 401)
    secret = {"client_id": catalog.CLIENT_ID, "client_secret": "wrong"}
    await drive.ask("POST", "/applications/token", 401, json=secret)
    secret["client_secret"] = catalog.CLIENT_SECRET
    await drive.ask("POST", "/applications/token", 400, json=secret | {"grant_type": "password"})
    token = await drive.ask("POST", "/applications/token", data=secret | {"grant_type": "client_credentials"})
    drive.headers = {"Authorization": f"Bearer {token['access_token']}"}
    await drive.ask("GET", "/workspaces")
    await drive.ask("GET", f"/workspaces/{catalog.WORKSPACE_ID}")
    await drive.ask("GET", f"/workspaces/{uuid4()}", 404)
    await drive.ask("GET", "/tags")
    await drive.ask("GET", "/connections?limit=3&offset=3&includeDeleted=true")
    await drive.ask("GET", f"/connections/{uuid4()}", 404)
    await drive.ask("PATCH", f"/connections/{ids[5]}", json={"status": "inactive"})
    await drive.ask("PATCH", f"/connections/{ids[5]}", 422, json={"status": "asleep"})
    await drive.ask("POST", "/jobs", 409, json={"connectionId": ids[5], "jobType": "sync"})
    await drive.ask("POST", "/jobs", 409, json={"connectionId": ids[0], "jobType": "sync"})
    await drive.ask("POST", "/jobs", 404, json={"connectionId": str(uuid4()), "jobType": "sync"})
    await drive.ask("POST", "/jobs", 422, json={"connectionId": ids[4], "jobType": "refresh"})
    await drive.ask("GET", "/jobs?limit=5&offset=5&orderBy=updatedAt%7CASC&jobType=clear&status=succeeded")
    await drive.ask("GET", "/jobs?orderBy=newest", 400)
    await drive.ask("GET", "/jobs/7", 404)
    await drive.ask("DELETE", "/jobs/7", 409)
    sandbox.airbyte.settings.requests_per_minute = 1
    await drive.ask("GET", "/jobs")
    await drive.ask("GET", "/jobs", 429)


async def drive_airbyte_config(drive: Drive) -> None:
    """Airbyte's Config API."""
    sandbox, ids = drive.sandbox, await _airbyte_by_the_engine(drive, "config")
    drive.base = sandbox.airbyte_config_url

    async def post(path: str, status: int = 200, **body: Any) -> Any:
        return await drive.ask("POST", path, status, json=body)

    await drive.ask("GET", "/health")
    await post("/jobs/get", 401, id=1001)
    secrets = {"client_id": catalog.CLIENT_ID, "client_secret": catalog.CLIENT_SECRET}
    token = await post("/applications/token", **secrets)
    drive.headers = {"Authorization": f"Bearer {token['access_token']}"}
    jobs = sandbox.airbyte.jobs_of(ids[1])
    await post("/jobs/get", id=jobs[0].job_id)
    await post("/jobs/get_light", id=jobs[0].job_id)
    await post("/jobs/get", 404, id=7)
    await post("/jobs/get", 422, id="seven")
    await post("/jobs/cancel", 409, id=jobs[0].job_id)
    listed = {"configTypes": ["sync", "clear"], "pagination": {"pageSize": 2, "rowOffset": 1}}
    await post("/jobs/list", configId=ids[1], statuses=["failed"], **listed)
    await post("/jobs/list", 422, configId=ids[1])
    await post("/connections/list", workspaceId=catalog.WORKSPACE_ID)
    await post("/connections/get", 404, connectionId=str(uuid4()))
    await post("/connections/status", connectionIds=ids)
    await post("/connections/sync", 404, connectionId=str(uuid4()))
    await post("/connections/sync", 409, connectionId=ids[0])
    await post("/connections/sync", 422)
    streams = [{"streamName": sandbox.airbyte.connection(ids[5]).streams[0]["name"]}]
    for path in ("/connections/clear/stream", "/connections/reset/stream"):
        await post(path, connectionId=ids[5], streams=streams)
    await post(
        "/connections/refresh",
        400,
        connectionId=ids[5],
        refreshMode="Merge",
        streams=[{"streamName": "nobody"}],
    )
    await post("/tags/list", workspaceId=catalog.WORKSPACE_ID)
    await post("/workspaces/list")


async def drive_hightouch(drive: Drive) -> None:
    """Hightouch."""
    sandbox = drive.sandbox
    with duckdb.connect(str(sandbox.warehouse.path)) as warehouse:
        warehouse.execute("CREATE SCHEMA IF NOT EXISTS marts")
        warehouse.sql("SELECT range AS n FROM range(10)").create(catalog.SYNCS[0].table)
    credentials = HightouchCredentials(api_key=catalog.HIGHTOUCH_API_KEY, base_url=sandbox.hightouch_url)
    vendor = HightouchVendor(credentials)
    async with credentials.api() as api:

        async def run(outcome: str) -> None:
            sandbox.hightouch.set("101", outcome=outcome)
            operation = "full-resync" if outcome == "warn" else "sync"
            request = HightouchRequest("101", operation, "crm", alone=outcome == "fail")
            await run_job(vendor, request, QUICK, journal=MemoryJournal())

        await run("succeed")
        await run("warn")
        for outcome in ("fail", "interrupt", "cancel"):
            with pytest.raises(JobError):
                await run(outcome)
        sandbox.hightouch.set("101", duration=0.3)
        sandbox.hightouch.trigger("101")  # ours is queued behind it
        await run("succeed")
        await api.syncs()
        # A run of a table that is not there ends with the query.
        await api.trigger("102")
        await api.runs("102", LONG_AGO)
        handles = [
            JobHandle(
                vendor="hightouch",
                resource_id="101",
                job_id=str(run.run_id),
                started_at="2026-01-01T00:00:00Z",
            )
            for run in sandbox.hightouch.runs_of("101")
        ]
        await vendor.observe(handles)
        await until(lambda: sandbox.hightouch.runs_of("102")[-1].status == "failed")
        await api.runs("102", LONG_AGO)

    sandbox.hightouch.set("101", outcome="succeed")
    sandbox.hightouch.set("102", outcome="fail")
    sequences = HightouchSequenceVendor(credentials)
    with pytest.raises(JobError):
        await run_job(sequences, PlainRequest("7", "sync", "all", None), QUICK, journal=MemoryJournal())
    with pytest.raises(InputError):
        await run_job(sequences, PlainRequest("8", "sync", "none", None), QUICK, journal=MemoryJournal())

    drive.base = sandbox.hightouch_url
    await drive.ask("GET", "/syncs", 401, headers={"Authorization": "Bearer wrong"})
    drive.headers = {"Authorization": f"Bearer {catalog.HIGHTOUCH_API_KEY}"}
    await drive.ask("POST", "/syncs/trigger", json={"syncSlug": "weather-delays-to-braze"})
    await drive.ask("POST", "/syncs/trigger", json={"fullResync": True})
    await drive.ask("POST", "/syncs/trigger", 404, json={"syncSlug": "nobody"})
    await drive.ask("POST", "/syncs/7/trigger", 404)
    await drive.ask("POST", "/syncs/101/trigger", 422, json={"fullResync": "yes"})
    await drive.ask("PATCH", "/syncs/102", json={"disabled": True, "schedule": None})
    await drive.ask("PATCH", "/syncs/102", 422, json={"disabled": "yes"})
    await drive.ask("POST", "/syncs/102/trigger", 400)
    await drive.ask("GET", "/syncs/7", 404)
    await drive.ask("GET", "/sync-sequences/runs/7", 404)
    await drive.ask("GET", "/syncs/7/runs", 404)
    await drive.ask("GET", "/syncs?limit=1&offset=1&orderBy=slug&slug=weather-delays-to-braze")
    await drive.ask("GET", "/syncs?orderBy=newest", 422)
    await drive.ask("GET", "/syncs/101/runs?limit=2&orderBy=createdAt&within=60")
    sandbox.hightouch.settings.requests_per_10_seconds = 1
    await drive.ask("GET", "/syncs", 429)


async def drive_pagerduty(drive: Drive) -> None:
    """PagerDuty's Events API."""
    sandbox = drive.sandbox
    key = catalog.PAGERDUTY_KEYS["data-platform"]
    alert = Alert(
        summary="orders_pg -> warehouse failed",
        source="airbyte",
        component="orders_pg",
        group="ingest",
        kind="sync failed",
        details={"jobId": 18473},
        links=(Link(href="https://example.com/jobs/1", text="job"), Link(href="https://example.com/runs/1")),
        client_url="https://example.com/runs/1",
    )
    async with PagerDutyRouting(routing_key=key, base_url=sandbox.pagerduty_url).api() as api:
        await api.trigger("airbyte/orders_pg", alert)
        await api.trigger("airbyte/orders_pg", Alert(summary="again", source="airbyte"))
        await api.acknowledge("airbyte/orders_pg")
        await api.resolve("airbyte/orders_pg")
        await api.resolve("airbyte/orders_pg")  # dropped
    drive.base = sandbox.pagerduty_url
    event = {"routing_key": key, "event_action": "trigger"}
    await drive.ask("POST", "/enqueue", 400, content=b"{")
    await drive.ask("POST", "/enqueue", 400, json=event)
    await drive.ask("POST", "/enqueue", 400, json=event | {"routing_key": "nobody"})
    payload = {"summary": "s", "source": "s", "severity": "info", "custom_details": {"a": "x" * 600_000}}
    await drive.ask("POST", "/enqueue", 400, json=event | {"payload": payload})
    del payload["custom_details"]
    await drive.ask("POST", "/enqueue", 202, json=event | {"payload": payload})
    sandbox.pagerduty.settings.events_per_minute = 1
    await drive.ask("POST", "/enqueue", 429, json=event | {"payload": payload})


# -- what they are held against


def airbyte_contract(files: Path) -> Contract:
    document = airbyte_public(read(files / "airbyte-public-api.yaml"), read(files / "airbyte-problems.yaml"))
    return Contract(document, AIRBYTE_PREFIX, "https://api.airbyte.com/v1", AIRBYTE_PUBLIC)


def airbyte_config_contract(files: Path) -> Contract:
    document = read(files / "airbyte-config-api.yaml")
    return Contract(document, "/api/v1", "https://cloud.airbyte.com/api/v1", AIRBYTE_CONFIG)


def hightouch_contract(files: Path) -> Contract:
    return Contract(
        read(files / "hightouch.yaml"), HIGHTOUCH_PREFIX, "https://api.hightouch.com/api/v1", HIGHTOUCH
    )


def pagerduty_contract(files: Path) -> Contract:
    document = read(files / "pagerduty-events-v2.json")
    return Contract(document, "/pagerduty/v2", "https://events.pagerduty.com/v2", PAGERDUTY)
