"""The Prefect server goes away in the middle of a run and comes back on the same database."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import psutil  # type: ignore[import-untyped]
import pytest
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate, WorkPoolCreate
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterFlowRunId,
    FlowRunFilter,
    FlowRunFilterId,
)

from deployments.server import LocalServer
from sandbox import Sandbox
from tasks.jobs.journal import read_entries
from tests.deployed import REPOSITORY, Runs, background, saved_blocks, until
from tests.server_fixtures import own_server, server_folder, using

__all__ = ["own_server", "server_folder"]

pytestmark = pytest.mark.no_server

AWAY = 10.0  # seconds, to which the server's own start comes
PATIENT = 200.0


@pytest.fixture
def client(own_server: LocalServer) -> Iterator[SyncPrefectClient]:
    with using(own_server), get_client(sync_client=True) as client:
        yield client


def sync_of(connection: str) -> dict[str, str]:
    return {"tool": "airbyte", "server": "airbyte", "connection_id": connection}


def is_running(box: Sandbox, connection: str) -> bool:
    return [job.status for job in box.airbyte.jobs_of(connection)] == ["running"]


def is_told(client: SyncPrefectClient, run: UUID, last: str = "") -> dict[str, Any]:
    """The report of a run, once the last task run of it and all others are known to have ended."""
    of_run = FlowRunFilter(id=FlowRunFilterId(any_=[run]))

    def ended() -> dict[str, str] | None:
        found = client.read_task_runs(flow_run_filter=of_run)
        names = {each.name: each.state.name if each.state else "" for each in found}
        whole = any(last in name for name in names)
        return names if whole and all(each.state and each.state.is_final() for each in found) else None

    states = until("every task run is told to have ended", ended)
    entries = asyncio.run(read_entries(run, None))
    artifacts = client.read_artifacts(
        artifact_filter=ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[run]))
    )
    return {
        "tasks": states,
        "jobs": [entry.result.state.value if entry.result else "open" for entry in entries],
        "artifacts": sorted(str(artifact.key) for artifact in artifacts),
    }


@pytest.mark.timeout(600)
def test_a_sync_ends_and_the_next_is_asked_for(
    own_server: LocalServer, client: SyncPrefectClient, tmp_path: Path
) -> None:
    """A server that is killed while a worker's run syncs is waited for: one job per sync, and all is told."""
    runs = Runs(client, own_server.api_url)
    with Sandbox(tmp_path, job_seconds=0.3) as box, saved_blocks(box):
        [first] = box.airbyte.add_connections(1, prefix="ends in the dark", duration=AWAY / 2)
        [second] = box.airbyte.add_connections(1, prefix="begins after", duration=1.0)
        client.create_work_pool(WorkPoolCreate(name="away", type="process"))
        client.create_deployment(
            client.create_flow_from_name("sync-connections"),
            "away",
            entrypoint="flows.syncs.sync_connections",
            work_pool_name="away",
            pull_steps=[{"prefect.deployments.steps.set_working_directory": {"directory": str(REPOSITORY)}}],
        )
        command = ["-m", "prefect", "worker", "start", "--pool", "away", "--type", "process"]
        with background(command, tmp_path / "worker.log", PREFECT_WORKER_QUERY_SECONDS="2"):
            run = runs.start(
                "sync-connections/away", syncs=[sync_of(first), sync_of(second)], max_concurrency=1
            )
            until("the first job runs", lambda: is_running(box, first), PATIENT)
            flow = runs.process(run)

            own_server.stop_prefect(at_once=True)
            time.sleep(AWAY)
            assert [job.status for job in box.airbyte.jobs_of(first)] == ["succeeded"]
            assert box.airbyte.jobs_of(second) == []  # nobody could write down that it shall be
            assert flow.is_running()
            own_server.start_prefect()

            ended = runs.ended(run, PATIENT)
            assert (ended.state_name, ended.run_count) == ("Completed", 1)
            again = runs.start("sync-connections/away", syncs=[sync_of(second)])
            assert runs.ended(again, PATIENT).state_name == "Completed"  # the worker works on
        jobs = [[job.status for job in box.airbyte.jobs_of(each)] for each in (first, second)]
    assert jobs == [["succeeded"], ["succeeded", "succeeded"]]
    told = is_told(client, run)
    assert told["jobs"] == ["SUCCEEDED", "SUCCEEDED"]
    assert told["artifacts"] == ["elt-jobs", "sync-report"]
    assert set(told["tasks"].values()) == {"Completed"}
    assert [name for name in told["tasks"] if name.startswith("sync ")] != []


@pytest.mark.timeout(600)
def test_a_run_ends(own_server: LocalServer, client: SyncPrefectClient, tmp_path: Path) -> None:
    """A server that is stopped before a script's run ends is waited for with the report and the end."""
    with Sandbox(tmp_path, job_seconds=0.3) as box, saved_blocks(box):
        [connection] = box.airbyte.add_connections(1, prefix="sync", duration=1.0)
        begun = tmp_path / "begun"
        step = {"tool": "shell", "name": "in the dark", "commands": [f"touch {begun}", f"sleep {AWAY / 2}"]}
        chain = {"syncs": [sync_of(connection)], "after": [step]}
        process = subprocess.Popen(  # noqa: S603
            [sys.executable, "-m", "tests.away_flows", json.dumps(chain)],
            cwd=REPOSITORY,
            env=os.environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            until("the last step has begun", begun.exists, PATIENT)
            own_server.stop_prefect()
            time.sleep(AWAY)
            assert process.poll() is None
            own_server.start_prefect()
            said, _ = process.communicate(timeout=PATIENT)
        finally:
            if process.poll() is None:
                psutil.Process(process.pid).kill()
                process.wait()
        assert process.returncode == 0, said
        assert [job.status for job in box.airbyte.jobs_of(connection)] == ["succeeded"]
    [run] = [run for run in client.read_flow_runs() if run.deployment_id is None]
    assert run.state_name == "Completed", said
    told = is_told(client, run.id, "in the dark")
    assert told["jobs"] == ["SUCCEEDED"]
    assert told["artifacts"] == ["elt-jobs", "elt-report"]
    assert set(told["tasks"].values()) == {"Completed"}


@pytest.mark.parametrize("at_once", [False, True], ids=["stopped", "killed"])
def test_a_slot_is_kept(own_server: LocalServer, client: SyncPrefectClient, at_once: bool) -> None:
    """A slot of a limit that was taken before a restart is known after it: renewed, and given back."""
    name = f"airbyte-{at_once}"
    client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=name, limit=1))
    taken = client._client.post(
        "/v2/concurrency_limits/increment-with-lease",
        json={"names": [name], "slots": 1, "mode": "concurrency", "lease_duration": 300},
    )
    lease = taken.raise_for_status().json()["lease_id"]
    own_server.stop_prefect(at_once=at_once)
    own_server.start_prefect()
    assert client.read_global_concurrency_limit_by_name(name).active_slots == 1
    renewed = client._client.post(
        f"/v2/concurrency_limits/leases/{lease}/renew", json={"lease_duration": 300}
    )
    renewed.raise_for_status()
    client.release_concurrency_slots_with_lease(UUID(lease))
    assert client.read_global_concurrency_limit_by_name(name).active_slots == 0
