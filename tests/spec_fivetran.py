"""Fivetran's part of the comparison with the vendors' own OpenAPI files: its calls, and the file's slips."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from blocks import FivetranCredentials
from sandbox import catalog
from tasks.fivetran_jobs import FivetranRequest, FivetranVendor
from tasks.jobs import JobError, JobPolicy, MemoryJournal, run_job
from tests.spec_drives import Drive
from tests.spec_fixtures import Contract, Slip, read

PREFIX = "/fivetran/v1"
_QUICK = JobPolicy(poll=0.03, timeout=60, outage=60)
_ERROR = {
    "description": "",
    "content": {
        "application/json": {
            "schema": {
                "type": "object",
                "required": ["code", "message"],
                "properties": {"code": {"type": "string"}, "message": {"type": "string"}},
            }
        }
    },
}
_SCHEMAS = ("components", "schemas")
_NAMES = {"type": "object", "additionalProperties": {"type": "array", "items": {"type": "string"}}}

SLIPS = [
    *(
        Slip(
            "null if never, says its own description",
            (*_SCHEMAS, schema, "properties", name, "nullable"),
            True,
        )
        for schema in ("ConnectorResponseV1", "ConnectorResponse")
        for name in ("succeeded_at", "failed_at")
    ),
    Slip(
        "minutes as a number, from a list of texts",
        (*_SCHEMAS, "ConnectorResponseV1", "properties", "sync_frequency", "enum"),
    ),
    Slip(
        "a map by schema names, written as an object with one property called `schema`",
        (*_SCHEMAS, "ResyncConnectorRequest", "properties", "scope"),
        _NAMES,
    ),
    Slip(
        "the same in the schemas of a connection",
        (*_SCHEMAS, "StandardConfigResponse", "properties", "schemas"),
        {"type": "object", "additionalProperties": {"$ref": "#/components/schemas/SchemaConfigResponse"}},
    ),
    Slip(
        "and in their tables",
        (*_SCHEMAS, "SchemaConfigResponse", "properties", "tables"),
        {"type": "object", "additionalProperties": {"$ref": "#/components/schemas/TableConfigResponse"}},
    ),
    Slip(
        "freeform, says its own description",
        (*_SCHEMAS, "ConnectorStateResponse", "properties", "state", "additionalProperties"),
        True,
    ),
    Slip(
        "a limit past 1,000 is refused; with which status is not said",
        ("paths", "/v1/connections", "get", "responses", "400"),
        _ERROR,
    ),
    Slip(
        "20,000 requests an hour are allowed, say the docs on rate limiting",
        ("paths", "/v1/groups", "get", "responses", "429"),
        _ERROR,
    ),
]


def fivetran_contract(files: Path) -> Contract:
    return Contract(read(files / "fivetran.json"), PREFIX, "https://api.fivetran.com/v1", SLIPS)


async def drive_fivetran(drive: Drive) -> None:
    """Fivetran."""
    fivetran = drive.sandbox.fivetran
    credentials = FivetranCredentials(
        api_key=catalog.FIVETRAN_API_KEY,
        api_secret=SecretStr(catalog.FIVETRAN_API_SECRET),
        base_url=drive.sandbox.fivetran_url,
    )
    vendor = FivetranVendor(credentials)
    weather, fleet, sheet = (spec.connection_id for spec in catalog.FIVETRAN_CONNECTIONS)

    async def run(connection_id: str, **fields: Any) -> None:
        request = FivetranRequest(connection_id, "sync", connection_id, None, timeout=60, **fields)
        await run_job(vendor, request, _QUICK, journal=MemoryJournal())

    async with vendor.session():
        await run(weather)
        await run(weather, how="force")
        await run(fleet, how="resync")
        await run(fleet, how="resync", scope={"public": ["planes"]})
        fivetran.set(weather, outcome="fail", warnings=["Slow"])
        with pytest.raises(JobError):
            await run(weather)
        fivetran.set(sheet, outcome="reschedule", times=1, rescheduled_seconds=0.2)
        await run(sheet)
        # More than three at once are watched by the list.
        await asyncio.gather(*(run(each) for each in fivetran.add_connections(5, duration=0.2)))

    drive.base = f"{drive.sandbox.fivetran_url}/v1"
    await drive.ask("GET", "/connections", 401)
    key = (catalog.FIVETRAN_API_KEY, catalog.FIVETRAN_API_SECRET)
    drive.headers = {"Accept": "application/json;version=2"}

    async def ask(method: str, path: str, status: int = 200, **request: Any) -> Any:
        return await drive.ask(method, path, status, auth=key, **request)

    first = await ask("GET", "/connections?limit=2&schema=fivetran_weather")
    assert "next_cursor" not in first["data"]
    cursor = (await ask("GET", f"/connections?limit=2&group_id={catalog.FIVETRAN_GROUP_ID}"))["data"]
    await ask("GET", f"/connections?limit=2&cursor={cursor['next_cursor']}")
    await ask("GET", "/connections", 406, headers={"Accept": "text/html"})
    await ask("GET", "/connections?limit=0", 400)
    await ask("GET", "/connections/no_such", 404)
    await ask("POST", "/connections/no_such/sync", 404, json={"force": False})
    await ask("POST", f"/connections/{weather}/sync", 415, content=b"{}")
    await ask("POST", "/connections/no_such/resync", 404, json={})
    await ask("POST", f"/connections/{sheet}/resync", 400, json={"scope": {"google_sheets": ["airports"]}})
    await ask("PATCH", f"/connections/{sheet}", json={"paused": True, "schedule_type": "manual"})
    await ask("PATCH", "/connections/no_such", 404, json={"paused": True})
    await ask("GET", f"/connections/{fleet}/schemas")
    await ask("GET", f"/connections/{fleet}/state")
    await ask("GET", f"/connections/{fleet}/state", 406, headers={"Accept": "text/html"})
    await ask("POST", f"/connections/{fleet}/schemas/tables/resync", json={"public": ["planes"]})
    fivetran.settings.resync_patience = 0
    fivetran.set(weather, outcome="stuck")
    fivetran.trigger(weather)
    await ask("POST", f"/connections/{weather}/resync", 409, json={})
    await ask("GET", "/groups")
    await ask("GET", f"/groups/{catalog.FIVETRAN_GROUP_ID}")
    await ask("GET", f"/groups/{catalog.FIVETRAN_GROUP_ID}/connections?limit=3")
    fivetran.settings.requests_per_hour = 1
    await ask("GET", "/groups", 429)
