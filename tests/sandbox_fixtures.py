"""A running sandbox with quick jobs, and clients that speak to it over real HTTP."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from sandbox import Sandbox, catalog

IDS = {spec.name: spec.connection_id for spec in catalog.CONNECTIONS}


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One state folder for the session, so that the flights are unzipped once."""
    return tmp_path_factory.mktemp("sandbox")


@pytest.fixture
def box(sources: Path, tmp_path: Path) -> Iterator[Sandbox]:
    with Sandbox(sources, warehouse=tmp_path / "warehouse.duckdb", job_seconds=0.3) as sandbox:
        yield sandbox


@pytest.fixture
def airbyte(box: Sandbox) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=box.airbyte_url) as client:
        client.headers["authorization"] = f"Bearer {new_token(client)}"
        yield client


@pytest.fixture
def hightouch(box: Sandbox) -> Iterator[httpx.Client]:
    headers = {"authorization": f"Bearer {catalog.HIGHTOUCH_API_KEY}"}
    with httpx.Client(base_url=box.hightouch_url, headers=headers) as client:
        yield client


@pytest.fixture
def fivetran(box: Sandbox) -> Iterator[httpx.Client]:
    """A client at `/v1`, with the key and what Fivetran asks to be sent."""
    key = (catalog.FIVETRAN_API_KEY, catalog.FIVETRAN_API_SECRET)
    headers = {"accept": "application/json;version=2"}
    with httpx.Client(base_url=f"{box.fivetran_url}/v1", auth=key, headers=headers) as client:
        yield client


@pytest.fixture
def control(box: Sandbox) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"{box.url}/_sandbox") as client:
        yield client


def new_token(client: httpx.Client) -> str:
    body = {"client_id": catalog.CLIENT_ID, "client_secret": catalog.CLIENT_SECRET}
    token: str = client.post("/applications/token", json=body).raise_for_status().json()["access_token"]
    return token


def start(client: httpx.Client, name: str, job_type: str = "sync") -> httpx.Response:
    return client.post("/jobs", json={"connectionId": IDS.get(name, name), "jobType": job_type})


def job_id(client: httpx.Client, name: str, job_type: str = "sync") -> int:
    started: int = start(client, name, job_type).raise_for_status().json()["jobId"]
    return started


def ended(client: httpx.Client, job: int, within: float = 60.0) -> dict[str, Any]:
    """The job once it is final."""
    return until(
        lambda: client.get(f"/jobs/{job}").json(),
        lambda reply: reply["status"] in ("succeeded", "failed", "cancelled"),
        within,
    )


def until(
    read: Callable[[], dict[str, Any]], enough: Callable[[dict[str, Any]], bool], within: float = 60.0
) -> dict[str, Any]:
    """What `read` returns as soon as it is enough."""
    deadline = time.monotonic() + within
    while not enough(found := read()):
        assert time.monotonic() < deadline, f"still {found} after {within} s"
        time.sleep(0.1)  # the sandbox counts requests, as the vendors do
    return found
