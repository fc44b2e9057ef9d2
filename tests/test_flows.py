"""The flows as their users run them: from a script, with JSON parameters, and again after a failure."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from uuid import UUID

import duckdb
import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterFlowRunId,
    ArtifactFilterKey,
    FlowRunFilter,
    FlowRunFilterId,
)

from blocks import AirbyteServer
from flows import EltReport, RunFailed, StepState, SyncReport, elt_chain, sync_connections
from sandbox import Sandbox, catalog
from tasks.airbyte import AirbyteSync
from tasks.jobs import JobPolicy, JobState
from tests.flows_fixtures import (
    IDS,
    Runs,
    box,
    runs,
    sources,
    starts,
    sync_parameters,
    task_runs,
    two_models,
)

__all__ = ["box", "runs", "sources"]

pytestmark = pytest.mark.usefixtures("warm_dbt")

SANDBOX_DBT = Path(__file__).parent.parent / "sandbox" / "dbt"
UNKNOWN = "00000000-0000-4000-8000-000000000000"


def _server(box: Sandbox, **changes: Any) -> AirbyteServer:
    settings = {"client_id": catalog.CLIENT_ID, "client_secret": catalog.CLIENT_SECRET, **changes}
    return AirbyteServer(base_url=box.airbyte_url, **settings)


def _artifact(run_id: Any, key: str) -> str:
    with get_client(sync_client=True) as client:
        found = client.read_artifacts(
            artifact_filter=ArtifactFilter(
                key=ArtifactFilterKey(any_=[key]), flow_run_id=ArtifactFilterFlowRunId(any_=[run_id])
            )
        )
    return str(found[-1].data)


def _chain(box: Sandbox, folder: Path, **changes: Any) -> dict[str, Any]:
    """A small chain as JSON: two connections, two models, two activations, Slack."""
    project = two_models(folder)
    with duckdb.connect(str(box.warehouse.path)) as db:
        db.execute("create schema if not exists marts")
        db.execute("create or replace table marts.mart_carrier_scorecard as select 1 as carrier")
        db.execute("create or replace table marts.mart_weather_delays as select 1 as origin")
    parameters = {
        "syncs": sync_parameters("airlines", "airports"),
        "transform": {
            "tool": "dbt-core",
            "project_dir": str(project.folder),
            "env": {"SHOP_WAREHOUSE": str(box.warehouse.path)},
        },
        "activations": [
            {
                "tool": "hightouch",
                "credentials": "hightouch",
                "sync_id": str(spec.sync_id),
                "policy": {"poll": 0.1},
            }
            for spec in catalog.SYNCS
        ],
        "notify": {
            "tool": "slack",
            "webhook": "data-alerts",
            "owners": {name: name for name in catalog.OWNERS},
        },
        "allow_failure": "any",
    }
    return {**parameters, **changes}


# -- sync_connections ---------------------------------------------------------------------------------------


def test_a_script_calls_the_flow_as_a_function(box: Sandbox) -> None:
    """README's script: a block instance goes in, outcomes come out."""
    box.airbyte.set("airlines", duration=1.1)
    sync = AirbyteSync(
        server=_server(box),
        connection_id=IDS["airlines"],
        owner="data-eng",
        policy=JobPolicy(poll=0.1, timeout=60, min_rows=1),
    )

    report = sync_connections(syncs=[sync], max_concurrency=100, allow_failure="any")

    outcome = report.outcomes[0]
    assert (outcome.state, outcome.rows, outcome.owner, outcome.name) == (
        JobState.SUCCEEDED,
        16,
        "data-eng",
        "airlines",
    )
    assert outcome.bytes
    assert outcome.duration
    assert outcome.job_id in (outcome.url or "")


def test_no_secret_reaches_the_api(box: Sandbox) -> None:
    """Parameters of a run with a block instance are stored without its secret, and its artifacts too."""
    report = sync_connections(
        syncs=[AirbyteSync(server=_server(box), connection_id=IDS["airlines"], policy=JobPolicy(poll=0.1))]
    )

    with get_client(sync_client=True) as client:
        stored = client.read_flow_run(report.flow_run_id).model_dump_json()  # type: ignore[arg-type]
    everything = (
        stored + _artifact(report.flow_run_id, "elt-jobs") + _artifact(report.flow_run_id, "sync-report")
    )
    assert catalog.CLIENT_SECRET not in everything
    assert "sandbox-client" in stored


@pytest.mark.parametrize(
    ("rule", "failing", "ending"),
    [
        ("none", [], "Completed"),
        ("none", ["airlines"], "Failed"),
        ("any", ["airlines"], "PartiallyRefreshed"),
        ("any", ["airlines", "airports", "planes"], "Failed"),
        ({"at_most": 1}, ["airlines"], "PartiallyRefreshed"),
        ({"at_most": 1}, ["airlines", "airports"], "Failed"),
        ({"required": ["planes"]}, ["airlines"], "PartiallyRefreshed"),
        ({"required": [IDS["airlines"]]}, ["airlines"], "Failed"),
    ],
)
def test_the_rule_decides_the_final_state_and_nothing_else(
    box: Sandbox, runs: Runs, rule: Any, failing: list[str], ending: str
) -> None:
    """Every connection is synced whatever the rule; only what the run is called depends on it."""
    for name in failing:
        box.airbyte.set(name, outcome="fail")
    parameters = {"syncs": sync_parameters("airlines", "airports", "planes"), "allow_failure": rule}

    state = runs.run(sync_connections, runs.create(sync_connections, parameters))

    assert state.name == ending
    assert state.is_failed() is (ending == "Failed")
    found = state.result(raise_on_failure=False)
    report = found.report if isinstance(found, RunFailed) else found
    assert isinstance(report, SyncReport)
    assert {job.name for job in report.outcomes if not job.good} == set(failing)
    assert starts(box) == 3


def test_a_failed_run_raises_with_its_report(box: Sandbox) -> None:
    """In a script a failure that the rule does not bear is an exception that has every outcome."""
    box.airbyte.set("airports", outcome="fail")
    server = _server(box)
    syncs = [
        AirbyteSync(server=server, connection_id=IDS[name], policy=JobPolicy(poll=0.1))
        for name in ("airlines", "airports")
    ]

    with pytest.raises(RunFailed, match="1 of 2 steps done; failed: airports") as failure:
        sync_connections(syncs=syncs)

    assert [job.state for job in failure.value.report.outcomes] == [JobState.SUCCEEDED, JobState.FAILED]  # type: ignore[union-attr]


def test_an_inactive_connection_is_a_failure_that_a_rule_can_bear(box: Sandbox, runs: Runs) -> None:
    """Airbyte switches failing connections off: that must not stop the others where failure is allowed."""
    box.airbyte.set("airports", status="inactive")
    parameters = {"syncs": sync_parameters("airlines", "airports"), "allow_failure": "any"}

    state = runs.run(sync_connections, runs.create(sync_connections, parameters))

    assert state.name == "PartiallyRefreshed"
    report = state.result()
    assert "inactive" in report.outcomes[1].message
    assert starts(box) == 1


# -- bad input ----------------------------------------------------------------------------------------------


def _bad_inputs() -> dict[str, tuple[dict[str, Any], str]]:
    one = sync_parameters("airlines")
    return {
        "unknown connection": ({"syncs": [{**one[0], "connection_id": UNKNOWN}]}, UNKNOWN),
        "connection twice": ({"syncs": one * 2}, "more than once"),
        "inactive connection": ({"syncs": sync_parameters("weather")}, "is inactive"),
        "no syncs": ({"syncs": []}, "list of syncs is empty"),
        "unsaved block": (
            {"syncs": [{**one[0], "server": "nowhere"}]},
            "no Airbyte Server block named 'nowhere'",
        ),
        "wrong secret": ({"syncs": [{**one[0], "server": "wrong-secret"}]}, "client secret was refused"),
        "HTML": ({"syncs": [{**one[0], "server": "web-page"}]}, "HTML page"),
        "rule names nobody": ({"syncs": one, "allow_failure": {"required": ["nobody"]}}, "nobody"),
        "no dbt project": (
            {"syncs": one, "transform": {"tool": "dbt-core", "project_dir": "/nowhere"}},
            "/nowhere does not exist",
        ),
        "no profile": (
            {
                "syncs": one,
                "transform": {"tool": "dbt-core", "project_dir": str(SANDBOX_DBT), "profiles_dir": "/etc"},
            },
            "No profiles.yml",
        ),
        "empty selection": (
            {
                "syncs": one,
                "transform": {
                    "tool": "dbt-core",
                    "project_dir": str(SANDBOX_DBT),
                    "select": ["nothing_like_it"],
                },
            },
            "matches nothing",
        ),
        "unknown activation": (
            {
                "syncs": one,
                "activations": [{"tool": "hightouch", "credentials": "hightouch", "sync_id": "999"}],
            },
            "no sync 999",
        ),
        "unsaved webhook": (
            {"syncs": one, "notify": {"tool": "slack", "webhook": "nobody-listens"}},
            "'nobody-listens'",
        ),
    }


@pytest.mark.parametrize("case", _bad_inputs())
def test_bad_input_is_one_sentence_and_nothing_is_started(
    box: Sandbox, runs: Runs, case: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sentence is in the state, no traceback is in the log, and no vendor was asked to start anything."""
    monkeypatch.setenv("ELT_WAREHOUSE", str(box.warehouse.path))
    parameters, sentence = _bad_inputs()[case]
    box.airbyte.set("weather", status="inactive")
    _server(box, client_secret="a-wrong-one").save("wrong-secret", overwrite=True)
    _server(box).save("web-page", overwrite=True)
    if case == "HTML":
        box.faults.add(kind="html", status=200, vendor="airbyte")

    state = runs.run(elt_chain, runs.create(elt_chain, parameters))

    assert state.is_failed()
    assert sentence in (state.message or "")
    assert "Traceback" not in capfd.readouterr().err
    assert starts(box) == 0
    assert box.requests.count(vendor="hightouch", method="POST") == 0


def test_a_locked_warehouse_is_named_before_anything_starts(box: Sandbox, runs: Runs, tmp_path: Path) -> None:
    """DuckDB takes one writing process: who holds the file is said before the syncs run into it."""
    parameters = _chain(box, tmp_path / "dbt")
    parameters["syncs"] = sync_parameters("airlines")
    path = str(box.warehouse.path)
    hold = f"import duckdb, time; db = duckdb.connect({path!r}); print('held', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE) as holder:  # noqa: S603
        try:
            assert holder.stdout
            holder.stdout.readline()
            state = runs.run(elt_chain, runs.create(elt_chain, parameters))
        finally:
            holder.kill()

    assert state.is_failed()
    assert f"locked by process {holder.pid}" in (state.message or "")
    assert starts(box) == 0


# -- elt_chain ----------------------------------------------------------------------------------------------


def test_the_chain_lands_builds_activates_and_tells(box: Sandbox, runs: Runs, tmp_path: Path) -> None:
    """All steps in one run, each visible in the API, with a report and one summary on Slack."""
    run_id = runs.create(elt_chain, _chain(box, tmp_path / "dbt"))

    state = runs.run(elt_chain, run_id)

    assert state.name == "Completed", state.message
    report = state.result()
    assert isinstance(report, EltReport)
    assert [(step.kind, step.state) for step in report.steps] == [
        ("sync", StepState.SUCCEEDED),
        ("sync", StepState.SUCCEEDED),
        ("transform", StepState.SUCCEEDED),
        ("activation", StepState.SUCCEEDED),
        ("activation", StepState.SUCCEEDED),
    ]
    names = {run.name for run in task_runs(run_id, until=14)}
    assert {
        "sync airlines",
        "sync airports",
        "dbt build",
        "model carriers",
        "model places",
        "activate carrier-scorecard-to-crm",
        "tell Slack",
    } <= names
    assert "| ✓ | airlines | SUCCEEDED | 16 |" in _artifact(run_id, "elt-report")
    assert "flowchart LR" in _artifact(run_id, "elt-report")
    assert f"[{report.steps[0].job_id}]({report.steps[0].url})" in _artifact(run_id, "elt-jobs")
    assert [message.channel for message in box.slack.messages] == ["data-alerts"]


def test_failure_follows_lineage(box: Sandbox, runs: Runs, tmp_path: Path) -> None:
    """One connection fails: only what hangs below it is held back, and only its owner is told."""
    box.airbyte.set("airports", outcome="fail")
    run_id = runs.create(elt_chain, _chain(box, tmp_path / "dbt"))

    state = runs.run(elt_chain, run_id)

    assert state.name == "PartiallyRefreshed", state.message
    report = state.result()
    assert report.held_nodes == {"places": "airports did not land"}
    assert {node.name for node in report.nodes if node.resource_type == "model"} == {"carriers"}
    carriers, places = report.of("activation")
    assert carriers.state is StepState.SUCCEEDED
    assert places.state is StepState.HELD
    assert places.message == "airports did not land, and places is built on it"
    assert [message.channel for message in box.slack.messages] == ["reference-data"]
    (text,) = (message.text for message in box.slack.messages)
    assert "✗ *airbyte airports* sync failed" in text
    held = "○ held back: weather-delays-to-braze (airports did not land, and places is built on it)"
    assert held in text.splitlines()


def test_a_failed_model_holds_back_what_is_built_on_it(box: Sandbox, runs: Runs, tmp_path: Path) -> None:
    """A node that the database refuses fails the transform, and only its own activation waits."""
    parameters = _chain(box, tmp_path / "dbt", allow_failure="none")
    (tmp_path / "dbt" / "models" / "places.sql").write_text(
        "select no_such_column from {{ source('airports', 'airports') }}"
    )

    state = runs.run(elt_chain, runs.create(elt_chain, parameters))

    assert state.name == "Failed"
    report = state.result(raise_on_failure=False).report
    assert report.of("transform")[0].state is StepState.FAILED
    assert "no_such_column" in report.of("transform")[0].message
    (text,) = (message.text for message in box.slack.messages)
    assert "✗ *dbt model places* build failed: " in text, "the node and its words, and not the build as such"
    assert "no_such_column" in text
    assert "○ held back: weather-delays-to-braze (places did not build cleanly)" in text.splitlines()
    assert [step.state for step in report.of("activation")] == [StepState.SUCCEEDED, StepState.HELD]


def test_a_connection_that_no_source_names_holds_everything(box: Sandbox, runs: Runs, tmp_path: Path) -> None:
    """When nobody can tell what is built on a failed connection, nothing is built on it."""
    box.airbyte.set("planes", outcome="fail")
    parameters = _chain(box, tmp_path / "dbt", syncs=sync_parameters("airlines", "planes"))

    report = runs.run(elt_chain, runs.create(elt_chain, parameters)).result()

    assert report.of("transform")[0].state is StepState.HELD
    assert "no dbt source names it" in report.of("transform")[0].message
    assert {step.state for step in report.of("activation")} == {StepState.HELD}


def test_a_retry_repeats_nothing_that_succeeded(box: Sandbox, runs: Runs, tmp_path: Path) -> None:
    """An activation fails; in the retry no sync starts, dbt does not run, and only that activation runs."""
    box.hightouch.set(102, outcome="fail", times=1)
    run_id = runs.create(elt_chain, _chain(box, tmp_path / "dbt", allow_failure="none"))
    assert runs.run(elt_chain, run_id).name == "Failed"
    built = (box.warehouse.path).stat().st_mtime_ns

    state = runs.run(elt_chain, run_id)

    assert state.name == "Completed", state.message
    assert starts(box) == 2
    assert box.warehouse.path.stat().st_mtime_ns == built
    assert box.requests.count(vendor="hightouch", method="POST", path="/syncs/101/trigger$") == 1
    assert box.requests.count(vendor="hightouch", method="POST", path="/syncs/102/trigger$") == 2


def test_slack_can_not_fail_a_run(box: Sandbox, runs: Runs, tmp_path: Path) -> None:
    """A dead webhook is told in the log; the run is what it is without it."""
    box.slack.break_channel("data-alerts", "no_service")

    state = runs.run(elt_chain, runs.create(elt_chain, _chain(box, tmp_path / "dbt", activations=[])))

    assert state.name == "Completed", state.message


_SCRIPT = """
import sys, uuid
from prefect.client.orchestration import get_client
from prefect.flow_engine import run_flow
from flows import elt_chain
with get_client(sync_client=True) as client:
    run = client.read_flow_run(uuid.UUID(sys.argv[1]))
run_flow(elt_chain, flow_run=run, parameters=run.parameters)
"""


@pytest.mark.timeout(600)
@pytest.mark.parametrize("moment", ["sync", "dbt"])
def test_a_killed_run_attaches_to_what_it_started(
    box: Sandbox, runs: Runs, tmp_path: Path, moment: str
) -> None:
    """SIGKILL in mid-sync or mid-dbt, and the run retried: one start per connection."""
    parameters = _chain(box, tmp_path / "dbt")
    slow = "select count(*) as n from range(60000000) a, range(40) b where a.range % 7 = b.range"
    if moment == "dbt":
        (tmp_path / "dbt" / "models" / "places.sql").write_text(slow)
    else:
        box.airbyte.set("airports", duration=6)
    run_id = runs.create(elt_chain, parameters)
    with subprocess.Popen([sys.executable, "-c", _SCRIPT, str(run_id)], env=dict(os.environ)) as process:  # noqa: S603

        def reached() -> bool:
            assert process.poll() is None, "it ended by itself"
            return starts(box) == 2 and _reached(moment, box, run_id)

        _wait_for(reached)
        process.send_signal(signal.SIGKILL)
    if moment == "dbt":
        project = two_models(tmp_path / "dbt")
        _wait_for(lambda: _unlocked(box))
        assert project.folder.exists()

    state = runs.run(elt_chain, run_id)

    assert state.name == "Completed", state.message
    assert starts(box) == 2


def _reached(moment: str, box: Sandbox, run_id: UUID) -> bool:
    if moment == "sync":
        return box.airbyte.jobs_of("airports")[-1].status == "running"
    of_run = FlowRunFilter(id=FlowRunFilterId(any_=[run_id]))
    with get_client(sync_client=True) as client:
        return any(run.name == "model places" for run in client.read_task_runs(flow_run_filter=of_run))


def _unlocked(box: Sandbox) -> bool:
    try:
        duckdb.connect(str(box.warehouse.path)).close()
    except duckdb.IOException:
        return False
    return True


def _wait_for(what: Any, seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "it did not come to that in time"
        time.sleep(0.1)


# -- the demo's own project ---------------------------------------------------------------------------------


def test_the_demo_project_holds_back_exactly_what_is_downstream_of_weather(box: Sandbox, runs: Runs) -> None:
    """`make demo FAIL=weather` on the real data: the nodes that are not built are weather's downstream."""
    box.airbyte.set("weather", outcome="fail")
    run_id = runs.create(
        elt_chain,
        {
            "syncs": sync_parameters(),
            "transform": {
                "tool": "dbt-core",
                "project_dir": str(SANDBOX_DBT),
                "env": {"ELT_WAREHOUSE": str(box.warehouse.path)},
            },
            "activations": [
                {
                    "tool": "hightouch",
                    "credentials": "hightouch",
                    "sync_id": str(spec.sync_id),
                    "policy": {"poll": 0.1},
                }
                for spec in catalog.SYNCS
            ],
            "notify": {
                "tool": "slack",
                "webhook": "data-alerts",
                "owners": {name: name for name in catalog.OWNERS},
            },
            "allow_failure": "any",
        },
    )

    state = runs.run(elt_chain, run_id)

    assert state.name == "PartiallyRefreshed", state.message
    report = state.result()
    manifest = json.loads((SANDBOX_DBT / "target" / "manifest.json").read_text())
    below: set[str] = set()
    stack = [name for name in manifest["sources"] if name.endswith(".weather")]
    while stack:
        for child in manifest["child_map"][stack.pop()]:
            if child not in below:
                below.add(child)
                stack.append(child)
    built = {node.unique_id for node in report.nodes}
    assert below
    assert not built & below
    everything = {
        name
        for name, node in manifest["nodes"].items()
        if node["resource_type"] in ("model", "seed", "snapshot")
    }
    assert everything - below <= built
    held = {step.name for step in report.held}
    assert held == {"weather-delays-to-braze"}
    with duckdb.connect(str(box.warehouse.path)) as db:
        assert db.execute("select count(*) from marts.fct_flights").fetchone() == (336_776,)
    assert [message.channel for message in box.slack.messages] == ["weather-desk"]
