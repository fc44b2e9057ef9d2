"""What the tests of events act on: a deployment that no worker runs, and what stands on the server."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterDeploymentId
from prefect.client.schemas.objects import FlowRun

from tasks.events import EltEvent, OnceTrigger

SCHEMA = {
    "type": "object",
    "properties": {
        "word": {"type": "string"},
        "number": {"type": "integer"},
        "anything": {"type": "object"},
    },
}


@dataclass
class Target:
    """A deployment of its own for one test, with a flow of its own."""

    client: SyncPrefectClient
    flow: str = field(default_factory=lambda: f"target-{uuid4().hex[:8]}")
    name: str = "target"

    def __post_init__(self) -> None:
        self.id: UUID = self.client.create_deployment(
            flow_id=self.client.create_flow_from_name(self.flow),
            name=self.name,
            parameter_openapi_schema=SCHEMA,
            enforce_parameter_schema=True,
            tags=["of-the-deployment"],
        )

    def trigger(self, **fields: Any) -> OnceTrigger:
        given = {"name": f"trigger of {self.flow}", "expect": ["elt.test.*"], **fields}
        return OnceTrigger(deployment=f"{self.flow}/{self.name}", **given)

    def runs(self) -> list[FlowRun]:
        mine = FlowRunFilter(deployment_id=FlowRunFilterDeploymentId(any_=[self.id]))
        found: list[FlowRun] = []
        while len(page := self.client.read_flow_runs(flow_run_filter=mine, limit=200, offset=len(found))):
            found += page
        return found


@pytest.fixture
def api(prefect_server: str) -> Iterator[SyncPrefectClient]:
    with get_client(sync_client=True) as client:
        yield client


@pytest.fixture
def target(api: SyncPrefectClient) -> Target:
    return Target(api)


def an_event(key: str = "", **fields: Any) -> EltEvent:
    """An event that no other test has."""
    given = {
        "name": "elt.test.happened",
        "key": key or uuid4().hex,
        "occurred": datetime.now(UTC),
        "resource_id": "elt.test.thing",
        **fields,
    }
    return EltEvent(**given)


def stored(api: SyncPrefectClient, *ids: UUID, within: float = 90.0) -> list[dict[str, Any]]:
    """The events with these ids, once the server has stored as many; it writes them a few seconds later."""
    deadline = time.monotonic() + within
    while len(found := _events(api, {"id": {"id": [str(id_) for id_ in ids]}})) < len(ids):
        assert time.monotonic() < deadline, f"{len(found)} of {len(ids)} events within {within:g} s"
        time.sleep(0.2)
    return found


def failures_of(
    api: SyncPrefectClient, event: EltEvent, count: int = 1, within: float = 90.0
) -> list[dict[str, Any]]:
    """The events that tell of triggers which failed for this one, once there are so many."""
    deadline = time.monotonic() + within
    while True:
        told = _events(api, {"event": {"name": ["elt.trigger.failed"]}})
        found = [one for one in told if one["payload"]["event"]["id"] == str(event.id)]
        if len(found) >= count:
            return found
        assert time.monotonic() < deadline, f"{len(found)} of {count} elt.trigger.failed within {within:g} s"
        time.sleep(0.2)


def _events(api: SyncPrefectClient, wanted: dict[str, Any]) -> list[dict[str, Any]]:
    year = timedelta(days=366)
    occurred = {
        "since": (datetime.now(UTC) - 9 * year).isoformat(),
        "until": (datetime.now(UTC) + year).isoformat(),
    }
    reply = api.request(
        "POST", "/events/filter", json={"filter": {"occurred": occurred, **wanted}, "limit": 50}
    )
    found: list[dict[str, Any]] = reply.raise_for_status().json()["events"]
    return found


def until(what: str, read: Callable[[], bool], within: float = 90.0) -> None:
    deadline = time.monotonic() + within
    while not read():
        assert time.monotonic() < deadline, f"not within {within:g} s: {what}"
        time.sleep(0.1)
