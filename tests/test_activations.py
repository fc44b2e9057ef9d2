"""Activations of every kind in one chain: what each is built on decides whether it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import duckdb
import pytest

from flows import elt_chain
from flows.gate import Gate
from sandbox import Sandbox
from tasks.census import CensusSync
from tasks.dbt.lineage import Lineage
from tasks.dbt.model import DbtNode, DbtPlan, DbtState
from tasks.hightouch import HightouchSequence, HightouchSync
from tasks.jobs import JobResult, JobState
from tests.flows_fixtures import Runs, box, runs, sources, sync_parameters, two_models
from tests.jobs_fixtures import PREFECTS_SOCKETS, collected

__all__ = ["box", "collected", "runs", "sources"]

pytestmark = [*PREFECTS_SOCKETS, pytest.mark.usefixtures("warm_dbt")]


def node(name: str, *parents: str, attached_node: str | None = None, **meta: Any) -> dict[str, Any]:
    depends_on = {"nodes": list(parents)}
    return {"name": name, "depends_on": depends_on, "config": {"meta": meta}, "attached_node": attached_node}


def plan() -> DbtPlan:
    """Two models; a Hightouch sync is behind an exposure of one, Census syncs of one, a sequence of both."""
    manifest = {
        "nodes": {"model.x.a": node("a"), "model.x.b": node("b")},
        "exposures": {
            "exposure.x.a": node("a", "model.x.a", hightouch_sequence_id=7),
            "exposure.x.only_a": node("only_a", "model.x.a", hightouch_sync_id=9),
            "exposure.x.b": node("b", "model.x.b", census_sync_id=[401, 402], hightouch_sequence_id="7"),
        },
    }
    return DbtPlan(
        project="x",
        adapter="duckdb",
        selected=["model.x.a", "model.x.b"],
        lineage=Lineage.from_manifest(manifest),
    )


@pytest.mark.no_server
def test_an_activation_behind_several_exposures() -> None:
    """A sequence waits for all that its syncs are built on; a Census sync only for its own."""
    gate = Gate(plan(), [], [])
    sequence = HightouchSequence(credentials="x", sequence_id="7")
    census = [CensusSync(credentials="x", sync_id=sync_id) for sync_id in (401, 402, 403)]
    assert [gate.why_not_activate(one) for one in (sequence, *census)] == [None] * 4
    gate.failed_nodes = ["model.x.b"]
    assert gate.why_not_activate(sequence) == "b did not build cleanly"
    assert [gate.why_not_activate(one) for one in census[:2]] == ["b did not build cleanly"] * 2
    assert "no dbt exposure says what this is built on (meta.census_sync_id)" in str(
        gate.why_not_activate(census[2])
    )
    gate.failed_nodes = ["model.x.a"]
    assert gate.why_not_activate(sequence) == "a did not build cleanly"
    assert gate.why_not_activate(census[0]) is None
    assert gate.causes_of(sequence) == gate.causes_of() != []
    assert gate.causes_of(census[0]) == []


@pytest.mark.no_server
@pytest.mark.parametrize(
    ("a", "b", "held"),
    [
        (DbtState.SUCCESS, DbtState.SUCCESS, True),
        (DbtState.SUCCESS, DbtState.SKIPPED, False),
        (DbtState.SUCCESS, DbtState.ERROR, False),
    ],
)
def test_a_test_that_was_left_out(a: DbtState, b: DbtState, held: bool) -> None:
    """With `fail_fast` dbt skips tests of what it has built: an activation does not go out on that.

    A test that is skipped because another node that it reads was not built says nothing.
    """
    known = plan()
    both = node("both", "model.x.a", "model.x.b", attached_node="model.x.a")
    lineage = Lineage.from_manifest({"nodes": {"test.x.both": both}}).nodes | known.lineage.nodes
    gate = Gate(known.model_copy(update={"lineage": Lineage(lineage)}), [], [])
    states = {"model.x.a": a, "model.x.b": b, "test.x.both": DbtState.SKIPPED}
    gate.built(
        [
            DbtNode(unique_id=id_, name=id_, resource_type=id_.split(".", maxsplit=1)[0], state=state)
            for id_, state in states.items()
        ]
    )
    on_a = HightouchSync(credentials="x", sync_id="9")
    assert gate.why_not_activate(on_a) == ("a did not build cleanly" if held else None)


@pytest.mark.no_server
def test_a_test_behind_an_ephemeral_model() -> None:
    """One that dbt skipped because of what failed above an ephemeral model says nothing of its other node."""
    known = plan()
    nodes = {
        "model.x.through": node("through", "model.x.b"),
        "test.x.both": node("both", "model.x.a", "model.x.through", attached_node="model.x.a"),
    }
    lineage = Lineage(Lineage.from_manifest({"nodes": nodes}).nodes | known.lineage.nodes)
    gate = Gate(known.model_copy(update={"lineage": lineage}), [], [])
    states = {
        "model.x.a": DbtState.SUCCESS,
        "model.x.b": DbtState.ERROR,
        "test.x.both": DbtState.SKIPPED,
    }
    gate.built(
        [
            DbtNode(unique_id=id_, name=id_, resource_type=id_.split(".", maxsplit=1)[0], state=state)
            for id_, state in states.items()
        ]
    )
    assert gate.why_not_activate(HightouchSync(credentials="x", sync_id="9")) is None


@pytest.mark.no_server
def test_a_connection_that_did_not_land() -> None:
    """Without lineage, all activations wait for a connection that did not land."""
    late = JobResult(vendor="airbyte", resource_id="1", name="orders", state=JobState.FAILED)
    gate = Gate(None, [], [])
    gate.late = [late]
    assert gate.why_not_activate(CensusSync(credentials="x", sync_id="401")) == "orders did not land"


def test_census_and_a_sequence_in_a_chain(box: Sandbox, runs: Runs, tmp_path: Path) -> None:
    """A connection that fails holds back the Census sync and the sequence built on it, and no other."""
    project = two_models(
        tmp_path,
        below_carriers="census_sync_id: 401, hightouch_sequence_id: 7",
        below_places="census_sync_id: 402, hightouch_sequence_id: 7",
    )
    with duckdb.connect(str(box.warehouse.path)) as db:
        db.execute("create schema marts")
        for table in ("mart_fleet_utilisation", "mart_daily_ops"):
            db.sql("select range as n from range(3)").create(f"marts.{table}")
    box.airbyte.set("airlines", outcome="fail", times=1)
    poll = {"policy": {"poll": 0.1}}
    run_id = runs.create(
        elt_chain,
        {
            "syncs": sync_parameters("airlines", "airports"),
            "transform": {
                "tool": "dbt-core",
                "project_dir": str(project.folder),
                "env": {"SHOP_WAREHOUSE": str(box.warehouse.path)},
            },
            "activations": [
                {"tool": "census", "credentials": "census", "sync_id": 401, **poll},
                {"tool": "census", "credentials": "census", "sync_id": 402, **poll},
                {"tool": "hightouch-sequence", "credentials": "hightouch", "sequence_id": 7, **poll},
            ],
            "allow_failure": "any",
        },
    )
    report = runs.run(elt_chain, run_id).result()
    told = {
        step.name: (step.tool, step.state.value, step.rows)
        for step in report.steps
        if step.kind == "activation"
    }
    assert told == {
        "Fleet to Salesforce": ("census", "HELD", None),
        "Daily operations to Sheets": ("census", "SUCCEEDED", 3),
        "sequence 7": ("hightouch-sequence", "HELD", None),
    }
    assert [len(box.census.runs_of(sync_id)) for sync_id in (401, 402)] == [0, 1]
    assert box.hightouch.sequences.runs_of("7") == []
