"""Flows against a sandbox: blocks that are saved, and flow runs that can be run again under the same id."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from prefect import Flow
from prefect.blocks.core import Block
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import BlockDocumentUpdate
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.client.schemas.objects import State, TaskRun
from prefect.exceptions import ObjectNotFound
from prefect.flow_engine import run_flow
from prefect.states import AwaitingRetry
from prefect_slack import SlackCredentials, SlackWebhook

from blocks import AirbyteServer, CensusCredentials, HightouchCredentials, PagerDutyRouting
from sandbox import Sandbox, catalog
from tests.dbt_project import Project
from tests.sandbox_fixtures import IDS, box, sources

__all__ = [
    "IDS",
    "Runs",
    "box",
    "forget_incidents",
    "runs",
    "save_blocks",
    "sources",
    "starts",
    "sync_parameters",
    "task_runs",
    "two_models",
]


def save_blocks(box: Sandbox) -> None:
    """The blocks that the parameters name, pointing at this sandbox."""
    airbyte = AirbyteServer(
        base_url=box.airbyte_url, client_id=catalog.CLIENT_ID, client_secret=catalog.CLIENT_SECRET
    )
    _save(airbyte, "airbyte")
    _save(HightouchCredentials(api_key=catalog.HIGHTOUCH_API_KEY, base_url=box.hightouch_url), "hightouch")
    _save(CensusCredentials(api_key=catalog.CENSUS_API_KEY, base_url=box.census_url), "census")
    for channel in catalog.WEBHOOKS:
        _save(SlackWebhook(url=box.slack_url(channel)), channel)
    _save(SlackCredentials(token=catalog.SLACK_TOKEN), "slack")
    for service, key in catalog.PAGERDUTY_KEYS.items():
        _save(PagerDutyRouting(routing_key=key, base_url=box.pagerduty_url), service)


_documents: dict[tuple[type[Block], str], UUID] = {}


def _save(block: Block, name: str) -> None:
    """Save a block. `Block.save` sends type and schema along each time: that is for the first time only."""
    kind = type(block)
    if (kind, name) in _documents:
        document = block._to_block_document(name=name, include_secrets=True)
        update = BlockDocumentUpdate(block_schema_id=document.block_schema_id, data=document.data)
        with get_client(sync_client=True) as client, contextlib.suppress(ObjectNotFound):
            client.update_block_document(_documents[kind, name], update)
            return
    _documents[kind, name] = block.save(name, overwrite=True)


def sync_parameters(*names: str, **policy: Any) -> list[dict[str, Any]]:
    """Syncs as a deployment has them: JSON, with the server by name."""
    policy = {"poll": 0.1, **policy}
    return [
        {"tool": "airbyte", "server": "airbyte", "connection_id": IDS[name], "policy": policy}
        for name in names or IDS
    ]


def two_models(
    folder: Path,
    *,
    below_carriers: str = "hightouch_sync_id: 101",
    below_places: str = "hightouch_sync_id: 102",
) -> Project:
    """A dbt project with a model on each of two connections, and an exposure for each activation.

    Args:
        folder: Where it is written.
        below_carriers: The activations that are built on the airlines.
        below_places: Those on the airports.
    """
    project = Project(folder)
    project.write(
        "models/schema.yml",
        f"""
        sources:
          - name: airlines
            schema: raw_airlines
            config: {{meta: {{airbyte_connection_id: {IDS["airlines"]}}}}}
            tables: [{{name: airlines}}]
          - name: airports
            schema: raw_airports
            tables: [{{name: airports}}]
        exposures:
          - name: carriers
            type: application
            owner: {{name: flight-ops}}
            config: {{meta: {{{below_carriers}}}}}
            depends_on: [ref('carriers')]
          - name: places
            type: application
            owner: {{name: weather-desk}}
            config: {{meta: {{{below_places}}}}}
            depends_on: [ref('places')]
        """,
    )
    project.model("carriers", "select * from {{ source('airlines', 'airlines') }}")
    project.model("places", "select * from {{ source('airports', 'airports') }}")
    return project


def starts(box: Sandbox) -> int:
    """How many jobs Airbyte was asked to start."""
    return box.requests.count(vendor="airbyte", method="POST", path="/jobs$")


class Runs:
    """Flow runs as a server knows them: created first, then run, and run again after a failure."""

    def create(self, flow: Flow[..., Any], parameters: dict[str, Any]) -> UUID:
        with get_client(sync_client=True) as client:
            return client.create_flow_run(flow, parameters=parameters).id

    def run(self, flow: Flow[..., Any], run_id: UUID) -> State[Any]:
        """Run it, or run it again, with the parameters that the server has stored."""
        with get_client(sync_client=True) as client:
            if client.read_flow_run(run_id).run_count:
                client.set_flow_run_state(run_id, AwaitingRetry(), force=True)
            flow_run = client.read_flow_run(run_id)
        state = run_flow(flow, flow_run=flow_run, parameters=flow_run.parameters, return_type="state")
        assert isinstance(state, State)
        return state


def forget_incidents() -> None:
    """Close what other tests have left open: the server is one for all."""
    with get_client(sync_client=True) as client:
        while found := [v for v in client.read_variables(limit=200) if v.name.startswith("elt-incident-")]:
            for variable in found:
                client.delete_variable_by_name(variable.name)


@pytest.fixture
def runs(box: Sandbox) -> Runs:
    forget_incidents()
    save_blocks(box)
    return Runs()


def task_runs(run_id: UUID, *, until: int) -> list[TaskRun]:
    """The run's task runs, once the server has recorded so many with an end."""
    of_run = FlowRunFilter(id=FlowRunFilterId(any_=[run_id]))
    deadline = time.monotonic() + 60
    with get_client(sync_client=True) as client:
        while True:
            found = client.read_task_runs(flow_run_filter=of_run, limit=200)
            ended = [run for run in found if run.state and run.state.is_final()]
            if len(ended) >= until or time.monotonic() > deadline:
                return ended
            time.sleep(0.2)
