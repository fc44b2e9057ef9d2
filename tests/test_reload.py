"""Reload: one connection of a pipeline anew, in order and once each, and only what hangs below it."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import duckdb
import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import DeploymentUpdate
from prefect.client.schemas.objects import FlowRun
from prefect.client.schemas.responses import DeploymentResponse
from prefect.states import Cancelled, Pending

from deployments.environments import Environment
from flows import EltReport, StepState, elt_chain, reload
from flows.exclusive import alone
from flows.reloading import beside, deployment_of, pipeline_of
from sandbox import Sandbox
from tasks.airbyte_jobs import AirbyteVendor
from tasks.intervals import DataInterval
from tasks.jobs import InputError, read_entries
from tests.dbt_project import Project
from tests.flows_fixtures import IDS, Runs, box, runs, sources, sync_parameters
from tests.jobs_fixtures import PREFECTS_SOCKETS, collected
from tests.test_backfill import until

__all__ = ["box", "collected", "runs", "sources"]

# A chain of several dbt processes, which take their time where others run beside them.
pytestmark = [*PREFECTS_SOCKETS, pytest.mark.timeout(600)]

PIPELINE = "elt-chain/small"
_PLANES = """
{{ config(materialized='incremental') }}
select tailnum, '{{ invocation_id }}' as built_by from {{ source('aircraft', 'planes') }}
{% if is_incremental() %} where tailnum not in (select tailnum from {{ this }}) {% endif %}
"""
_COUNTED = """
{{ config(materialized='table') }}
select count(*) as n, '{{ invocation_id }}' as built_by from {{ ref('planes') }}
"""
_AIRLINES = """
{{ config(materialized='table') }}
select carrier, '{{ invocation_id }}' as built_by from {{ source('carriers', 'airlines') }}
"""


@pytest.fixture
def shop(box: Sandbox, tmp_path: Path) -> Project:
    """Two sources, an incremental model on the first, and an activation below each."""
    project = Project(tmp_path / "shop")
    project.warehouse = box.warehouse.path
    project.write(
        "models/sources.yml",
        f"""
        sources:
          - name: aircraft
            schema: raw_planes
            config: {{meta: {{airbyte_connection_id: {IDS["planes"]}}}}}
            tables: [{{name: planes}}]
          - name: carriers
            schema: raw_airlines
            tables: [{{name: airlines}}]
        exposures:
          - {{name: crm, type: application, owner: {{name: a}}, depends_on: [ref('counted')],
             config: {{meta: {{hightouch_sync_id: 101}}}}}}
          - {{name: braze, type: application, owner: {{name: a}}, depends_on: [ref('airlines')],
             config: {{meta: {{hightouch_sync_id: 102}}}}}}
        """,
    )
    project.model("planes", _PLANES)
    project.model("counted", _COUNTED)
    project.model("airlines", _AIRLINES)
    return project


@pytest.fixture
def deployed(box: Sandbox, runs: Runs, shop: Project) -> Iterator[dict[str, Any]]:
    """The pipeline's parameters, of a deployment that has not run."""
    hightouch = {"tool": "hightouch", "credentials": "hightouch", "policy": {"poll": 0.1}}
    parameters = {
        "syncs": sync_parameters("planes", "airlines"),
        "transform": shop.core().model_dump(mode="json"),
        "activations": [{**hightouch, "sync_id": "101"}, {**hightouch, "sync_id": "102"}],
    }
    with get_client(sync_client=True) as client:
        deployment = client.create_deployment(client.create_flow(elt_chain), "small", parameters=parameters)
        yield parameters
        client.delete_deployment(deployment)


@pytest.fixture
def pipeline(box: Sandbox, shop: Project, deployed: dict[str, Any]) -> Project:
    """Run once."""
    with duckdb.connect(str(box.warehouse.path)) as db:
        db.execute("create schema marts")
        for table in ("mart_carrier_scorecard", "mart_weather_delays"):
            db.execute(f"create table marts.{table} as select 1 as n")
    report = elt_chain(**elt_chain.validate_parameters(deployed))
    assert report.complete, report.message
    box.requests.clear()
    return shop


@contextmanager
def another(name: str, parameters: dict[str, Any], tags: list[str]) -> Iterator[None]:
    """A pipeline beside it, one run at a time."""
    with get_client(sync_client=True) as client:
        made = client.create_deployment(
            client.create_flow(elt_chain), name, parameters=parameters, tags=tags, concurrency_limit=1
        )
        yield
        client.delete_deployment(made)


def set_parameters(parameters: dict[str, Any]) -> None:
    """Of the deployment."""
    with get_client(sync_client=True) as client:
        client.update_deployment(deployment_of("small").id, DeploymentUpdate(parameters=parameters))


def one_at_a_time(limit: int = 1) -> DeploymentResponse:
    """The deployment, with a limit."""
    with get_client(sync_client=True) as client:
        client.update_deployment(deployment_of("small").id, DeploymentUpdate(concurrency_limit=limit))
    return deployment_of("small")


@contextmanager
def at_work(deployment: DeploymentResponse) -> Iterator[FlowRun]:
    """A run of it, as a worker has taken it on."""
    with get_client(sync_client=True) as client:
        run = client.create_flow_run_from_deployment(deployment.id)
        client.set_flow_run_state(run.id, Pending())
        assert client.read_flow_run(run.id).state_name == "Pending"
        try:
            yield run
        finally:
            ended(run)


def ended(run: FlowRun) -> None:
    with get_client(sync_client=True) as client:
        client.set_flow_run_state(run.id, Cancelled())


def built_by(project: Project) -> dict[str, set[str]]:
    with duckdb.connect(str(project.warehouse), read_only=True) as db:
        return {
            name: {str(by) for (by,) in db.execute(f"select distinct built_by from {name}").fetchall()}  # noqa: S608
            for name in ("planes", "counted", "airlines")
        }


def jobs(box: Sandbox, name: str) -> list[str]:
    """The connection's jobs after the first, which is of the pipeline's own run."""
    return [job.job_type for job in box.airbyte.jobs_of(IDS[name])][1:]


def steps(report: EltReport) -> dict[str, str]:
    return {f"{step.kind} {step.resource_id}": step.state.value for step in report.steps}


def test_a_full_refresh_and_only_what_hangs_below(box: Sandbox, pipeline: Project) -> None:
    """Cleared, then loaded, the incremental model below built from nothing, the activation below run."""
    before = built_by(pipeline)
    report = reload("planes", mode="full_refresh", streams=["planes"], pipeline="small")
    assert report.complete, report.message
    assert jobs(box, "planes") == ["clear", "sync"]
    assert jobs(box, "airlines") == []
    (cleared,) = box.requests.find(path="/connections/clear/stream$")
    assert cleared.body["streams"] == [{"streamName": "planes"}]
    after = built_by(pipeline)
    assert after["airlines"] == before["airlines"]
    assert len(after["planes"]) == 1
    assert after["planes"] == after["counted"] != before["planes"]
    activated = [step for step in report.steps if step.kind == "activation"]
    assert [(step.resource_id, step.state) for step in activated] == [("101", StepState.SUCCEEDED)]
    assert "dbt build source:aircraft.planes+" in next(s.name for s in report.steps if s.kind == "transform")


def test_with_an_interval_nothing_is_built_from_nothing(box: Sandbox, pipeline: Project) -> None:
    """The connection is loaded anew, and the incremental model keeps what is not of the interval."""
    before = built_by(pipeline)
    interval = DataInterval(start="2013-01-01", end="2013-02-01")
    report = reload("planes", mode="full_refresh", data_interval=interval, pipeline="small")
    assert report.complete, report.message
    assert jobs(box, "planes") == ["clear", "sync"]
    after = built_by(pipeline)
    assert after["planes"] == before["planes"]
    assert after["counted"] != before["counted"]


@pytest.mark.parametrize("name", ["small", "exposure-crm"])
def test_a_run_of_the_pipeline_is_waited_for(
    box: Sandbox, runs: Runs, deployed: dict[str, Any], caplog: pytest.LogCaptureFixture, name: str
) -> None:
    """One that is at work, also on another machine; nothing is started before it has ended. Before a table is
    cleared, so is one of another pipeline that is built from it.
    """
    with another("exposure-crm", deployed, ["elt"]), another("dev.small", deployed, ["env:dev"]):
        assert [each.name for each in beside(one_at_a_time())] == ["exposure-crm"]
        waited_for(box, name, caplog)


def waited_for(box: Sandbox, name: str, caplog: pytest.LogCaptureFixture) -> None:
    mode = "incremental" if name == "small" else "full_refresh"
    with at_work(deployment_of(name)) as nightly, ThreadPoolExecutor(1) as pool:
        reloading = pool.submit(reload, "planes", mode=mode, pipeline="small", return_state=True)
        until(lambda: f"Waits until {nightly.name} of {name} has ended" in caplog.text)
        time.sleep(3)
        assert not reloading.done()
        assert box.airbyte.jobs_of(IDS["planes"]) == []
        ended(nightly)
        state = reloading.result(300)
    assert box.airbyte.jobs_of(IDS["planes"]) != [], state.message


def test_a_run_of_the_pipeline_waits(deployed: dict[str, Any]) -> None:
    """While a connection of it is loaded anew; with a limit of several, none begins, either."""
    base = one_at_a_time(limit=2)
    with get_client(sync_client=True) as client:
        nightly = client.create_flow_run_from_deployment(base.id)

        @flow
        def reloads() -> None:
            with alone(base):
                client.set_flow_run_state(nightly.id, Pending())
                assert client.read_flow_run(nightly.id).state_name == "AwaitingConcurrencySlot"

        reloads()
        client.set_flow_run_state(nightly.id, Pending())
        assert client.read_flow_run(nightly.id).state_name == "Pending"
        ended(nightly)


def test_a_pipeline_without_a_limit(deployed: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    """Its runs are not kept apart from each other, nor from this one; that is said."""

    @flow
    def reloads() -> bool:
        with alone(deployment_of("small")):
            return True

    assert reloads()
    assert "small has no concurrency limit" in caplog.text


def test_incremental_keeps_what_is_there(box: Sandbox, pipeline: Project) -> None:
    """Nothing is cleared, and the incremental model keeps its rows; by the connection's id as by its name."""
    before = built_by(pipeline)
    report = reload(IDS["planes"], pipeline=PIPELINE)
    assert report.complete, report.message
    assert jobs(box, "planes") == ["sync"]
    after = built_by(pipeline)
    assert after["planes"] == before["planes"]
    assert after["counted"] != before["counted"]
    assert after["airlines"] == before["airlines"]


def test_what_goes_with_a_part(
    box: Sandbox, pipeline: Project, deployed: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """Gates about other connections too, an approval and a freshness gate of what is not below, and steps
    that need an interval: the reload of a pipeline with all of these is not refused.
    """
    meta = f"config: {{meta: {{airbyte_connection_id: {IDS['airports']}}}}}"
    source = f"{{name: fields, schema: raw_airports, {meta}, tables: [{{name: airports}}]}}"
    pipeline.write("models/fields.yml", f"sources: [{source}]")
    rows = {"tool": "rows", "at_least": 1}
    by_day = "delete from days where day >= '{{ data_interval_start }}'"
    more = {
        "syncs": sync_parameters("planes", "airlines", "airports"),
        "gates": [{**rows, "connections": ["planes", "airports"]}, {**rows, "connections": ["airlines"]}],
        "before": [{"tool": "sql", "name": "by day", "database": "warehouse", "statements": [by_day]}],
        "allow_failure": {"required": ["planes"]},
    }
    asked = {"approval": {"before": ["activations"]}, "gates": [*more["gates"], {"tool": "freshness"}]}
    set_parameters({**deployed, **more})
    report = reload("planes", pipeline="small")
    assert report.complete, report.message
    assert [step.name for step in report.steps if step.kind == "gate"] == ["rows"]
    assert "Not run, as they need a data interval and this run has none: by day" in caplog.text
    set_parameters({**deployed, **more, **asked})
    report = reload("airports", pipeline="small")  # nothing is built of it, and nothing activated
    assert report.complete, report.message
    assert [step.kind for step in report.steps] == ["sync", "gate"]


@pytest.mark.parametrize("prefix", ["dev.", "dev-", "my-branch."])
def test_environments_are_apart(prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reload of an environment takes the pipeline of that environment, however its prefix ends."""
    limits = {"kept-apart": 1, f"{prefix}kept-apart": 2}
    with get_client(sync_client=True) as client:
        flow_id = client.create_flow(elt_chain)
        made = [
            client.create_deployment(
                flow_id, name, parameters={"syncs": sync_parameters("planes"), "max_concurrency": limit}
            )
            for name, limit in limits.items()
        ]
        try:
            assert pipeline_of(deployment_of("kept-apart")).max_concurrency == 1
            for name, value in Environment(name="here", prefix=prefix).variables.items():
                monkeypatch.setenv(name, value)  # as `make deploy` has it in every run of the environment
            assert pipeline_of(deployment_of("kept-apart")).max_concurrency == 2
            assert pipeline_of(deployment_of(f"elt-chain/{prefix}kept-apart")).max_concurrency == 2
            client.delete_deployment(made.pop())
            with pytest.raises(InputError, match="There is no pipeline 'kept-apart'"):
                pipeline_of(deployment_of("kept-apart"))
        finally:
            for deployment_id in made:
                client.delete_deployment(deployment_id)


def test_killed_between_reset_and_reload(
    box: Sandbox, runs: Runs, pipeline: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGKILL when the clear has ended and the sync is not there, the run retried: one clear, one sync."""
    # The request for the sync never arrives, and no answer tells so; those before the clear do.
    box.faults.add(vendor="airbyte", kind="drop", method="POST", path="/jobs$", after=1)
    box.faults.add(vendor="airbyte", kind="drop", method="GET", path="/jobs$", after=3)
    run_id = runs.create(reload, {"connection": "planes", "mode": "full_refresh", "pipeline": PIPELINE})
    script = [sys.executable, str(Path(__file__).with_name("backfill_crash.py")), str(run_id), "reload"]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}

    def the_sync_is_asked_for() -> bool:
        assert process.poll() is None, "it ended by itself"
        return box.requests.count(vendor="airbyte", method="POST", path="/jobs$") >= 2

    with subprocess.Popen(script, env=env, stdout=subprocess.DEVNULL) as process:  # noqa: S603
        try:
            until(the_sync_is_asked_for)
        finally:
            process.kill()
    assert jobs(box, "planes") == ["clear"]
    assert [entry.open for entry in asyncio.run(read_entries(run_id))] == [False, True]
    box.faults.clear()
    monkeypatch.setattr(AirbyteVendor, "grace", 3.0)
    state = runs.run(reload, run_id)
    assert state.is_completed(), state.message
    assert jobs(box, "planes") == ["clear", "sync"]
    assert len(built_by(pipeline)["planes"]) == 1


def test_what_can_not_be_done_is_refused(box: Sandbox, deployed: dict[str, Any]) -> None:
    """With what there is, and nothing is started."""
    for asked, sentence in (
        (
            {"connection": "plans"},
            r"no connection 'plans'\. It has: .*airlines .*planes .*Nothing was started",
        ),
        ({"streams": ["plane"]}, r"has no stream plane\. It has: planes\. Nothing was started"),
        ({"mode": "incremental", "streams": ["planes"]}, r"streams are for the mode full_refresh"),
        ({"pipeline": "nightly"}, r"no pipeline 'nightly'\. Deployments of elt-chain: .*small"),
        ({"pipeline": "dbt-build/small"}, r"no pipeline 'dbt-build/small'"),
    ):
        parameters: dict[str, Any] = {"connection": "planes", "mode": "full_refresh", "pipeline": PIPELINE}
        with pytest.raises(InputError, match=sentence):
            reload(**{**parameters, **asked})
    assert box.airbyte.jobs_of(IDS["planes"]) == box.airbyte.jobs_of(IDS["airlines"]) == []
