"""dbt Cloud as the transform of a chain, real dbt behind it, and a cancellation from another process."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import Any

import duckdb
import pytest
from prefect import flow
from prefect.runtime import flow_run
from prefect.states import Cancelling

from flows.elt import elt_chain
from flows.report import EltReport, StepState
from sandbox import Sandbox, catalog
from tasks.cancellation import cancel_open_jobs
from tasks.dbt_cloud import DbtCloud, dbt_cloud_build
from tasks.dbt_cloud_runs import DbtCloudVendor
from tasks.jobs import Entry, JobHandle, JobPolicy, RunJournal
from tests.dbt_cloud_fixtures import JOB, PREFECTS_SOCKETS, collected, credentials_of
from tests.flows_fixtures import Runs, box, runs, sources, sync_parameters
from tests.jobs_fixtures import until
from tests.test_sandbox_project import load_sample

__all__ = ["box", "collected", "runs", "sources"]

pytestmark = PREFECTS_SOCKETS
REAL = 301


@pytest.fixture
def stage(box: Sandbox, runs: Runs, monkeypatch: pytest.MonkeyPatch) -> Runs:
    """Blocks saved, and the tables that the activations read."""
    monkeypatch.setattr(DbtCloudVendor, "grace", 0.5)
    credentials_of(box).save("dbt-cloud", overwrite=True)
    with duckdb.connect(str(box.warehouse.path)) as db:
        db.execute("create schema marts")
        for spec in catalog.SYNCS:
            db.execute(f"create table {spec.table} as select 1 as n")
    return runs


def chain(**changes: Any) -> dict[str, Any]:
    """As a deployment has it: two connections, a dbt Cloud job, two activations."""
    return {
        "syncs": sync_parameters("flights", "weather"),
        "transform": {
            "tool": "dbt-cloud",
            "credentials": "dbt-cloud",
            "job_id": JOB,
            "policy": {"poll": 0.1},
            "owner": "flight-ops",
        },
        "activations": [
            {"tool": "hightouch", "credentials": "hightouch", "sync_id": "101", "policy": {"poll": 0.1}},
            {"tool": "hightouch", "credentials": "hightouch", "sync_id": "102", "policy": {"poll": 0.1}},
        ],
        "allow_failure": "any",
        **changes,
    }


def of_report(report: EltReport) -> dict[str, tuple[str, str]]:
    return {step.resource_id: (step.state.value, step.message or "") for step in report.steps}


def test_failure_follows_lineage(box: Sandbox, stage: Runs) -> None:
    """The weather fails: the job runs without what is below it, and only its activation is held back."""
    first = box.dbt_cloud.trigger(JOB, "the night before")
    box.dbt_cloud.finish_run(first.run_id, 10)
    box.airbyte.set("weather", outcome="fail")

    run_id = stage.create(elt_chain, chain())
    state = stage.run(elt_chain, run_id)

    report = state.result()
    steps = of_report(report)
    assert steps["101"][0] == "SUCCEEDED"
    assert steps["102"][0] == "HELD"
    assert "weather did not land" in steps["102"][1]
    transform = next(step for step in report.steps if step.kind == "transform")
    assert (transform.state, transform.tool, transform.owner) == (
        StepState.PARTIAL,
        "dbt-cloud",
        "flight-ops",
    )
    assert set(report.held_nodes) == {"stg_weather", "mart_weather_delays"}
    _, ours = box.dbt_cloud.runs_of(JOB)
    assert ours.overrides == {"steps_override": ["dbt build --exclude source:weather_stations.weather+"]}
    assert str(run_id) in ours.cause


def test_without_a_manifest_all_is_held_on_doubt(box: Sandbox, stage: Runs) -> None:
    """A job that has left no manifest is not run while a connection is missing, and the reason is said."""
    box.airbyte.set("weather", outcome="fail")
    report = stage.run(elt_chain, stage.create(elt_chain, chain())).result()
    transform = next(step for step in report.steps if step.kind == "transform")
    assert transform.state is StepState.HELD
    assert "everything may be built on it" in str(transform.message)
    assert {step.state for step in report.steps if step.kind == "activation"} == {StepState.HELD}
    assert box.dbt_cloud.runs_of(JOB) == []


def test_the_first_run_needs_no_manifest(box: Sandbox, stage: Runs) -> None:
    """When everything has landed the first run of a job goes ahead."""
    report = stage.run(elt_chain, stage.create(elt_chain, chain())).result()
    assert {step.state for step in report.steps} == {StepState.SUCCEEDED}
    assert len(box.dbt_cloud.runs_of(JOB)) == 1


async def test_cancelled_from_another_process(box: Sandbox, stage: Runs) -> None:
    """The cancellation hook knows only the flow run: by its journal it cancels the run at dbt Cloud."""
    box.dbt_cloud.set(JOB, outcome="stuck")
    run = box.dbt_cloud.trigger(JOB)

    @flow
    async def left_behind() -> None:
        # What a process that died in the middle of a build leaves in the journal.
        handle = JobHandle(
            vendor="dbt-cloud", resource_id=str(JOB), job_id=str(run.run_id), started_at=datetime.now(UTC)
        )
        entry = Entry(
            key=f"dbt-cloud:run:{JOB}",
            vendor="dbt-cloud",
            resource_id=str(JOB),
            name="nightly",
            block="dbt-cloud-credentials/dbt-cloud",
            since=datetime.now(UTC),
            handle=handle,
        )
        await RunJournal(flow_run.id, None).record(entry, urgent=True)
        from prefect.context import FlowRunContext

        context = FlowRunContext.get()
        assert context is not None
        assert context.flow_run is not None
        await cancel_open_jobs(left_behind, context.flow_run, Cancelling())

    await left_behind()
    assert box.dbt_cloud.run(run.run_id).status == 30


def test_real_dbt(box: Sandbox, stage: Runs, tmp_path: Any) -> None:
    """A real job runs dbt on the stage's project and warehouse; what it built is there, node by node."""
    with duckdb.connect(str(box.warehouse.path)) as db:
        db.execute("drop schema marts cascade")
    load_sample(box.warehouse.path, tmp_path)
    box.dbt_cloud.set(
        REAL, steps=["dbt build --select +dim_airlines --indirect-selection cautious"], duration=0
    )
    dbt = DbtCloud(credentials="dbt-cloud", job_id=REAL, policy=JobPolicy(poll=0.2, timeout=90))

    @flow
    async def build() -> Any:
        return await dbt_cloud_build(dbt, [])

    result = asyncio.run(build())
    assert {"stg_airlines", "dim_airlines"} <= {node.name for node in result.nodes}
    assert result.failed == []
    with duckdb.connect(str(box.warehouse.path)) as db:
        assert db.sql("select count(*) from marts.dim_airlines").fetchone() == (16,)
    (run,) = box.dbt_cloud.runs_of(REAL)
    assert "Completed successfully" in run.steps[-1].logs


async def test_a_real_dbt_is_stopped(box: Sandbox, stage: Runs, tmp_path: Any) -> None:
    """Cancelled, the dbt behind a real run is interrupted, and the warehouse is free again."""
    await asyncio.to_thread(load_sample, box.warehouse.path, tmp_path)
    run = box.dbt_cloud.trigger(REAL)
    await until(lambda: any(step.folder and step.folder.exists() for step in run.steps))
    await asyncio.sleep(1)
    box.dbt_cloud.cancel(run)
    await until(lambda: run.work is not None and run.work.done_at is not None)
    await until(lambda: run.final)  # it goes on for a moment after it was cancelled
    assert run.status == 30
    duckdb.connect(str(box.warehouse.path)).close()
