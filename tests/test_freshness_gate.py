"""The gate of freshness: which sources it is about, and that what nobody could look at is not let through."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
from prefect import flow
from prefect.logging import disable_run_logger
from prefect_sqlalchemy import SqlAlchemyConnector

import tasks.gates
from flows import StepState
from flows.gate import Gate
from flows.gates import Looked, check_gate_names, look_at_gates
from tasks.dbt.freshness import Freshness, SourceAge, SourcesStale
from tasks.dbt.lineage import Lineage, LineageNode
from tasks.dbt.model import DbtPlan, DbtState
from tasks.dbt.process import DbtProcess
from tasks.dbt_core import DbtCore
from tasks.fivetran import FivetranSync
from tasks.gates import FreshnessGate, GateCheck, RowsGate, SqlGate
from tasks.jobs import Checked, EventLoopTaskRunner, InputError, JobResult, JobState
from tests.dbt_project import Project
from tests.jobs_fixtures import PREFECTS_SOCKETS, collected

__all__ = ["collected"]

pytestmark = [pytest.mark.usefixtures("warm_dbt"), *PREFECTS_SOCKETS]


def source(name: str, *, watched: bool = True, by: str | None = None) -> LineageNode:
    meta = {"fivetran_connection_id": f"id-{by}"} if by else {}
    return LineageNode(
        f"source.p.raw.{name}", name, "source", source_name="raw", watched=watched, meta=meta, owner="desk"
    )


def chain(*sources: LineageNode, **landed: bool) -> Gate:
    """A chain with a model that is built on these sources, and connections that did or did not land."""
    model = LineageNode("model.p.m", "m", "model", tuple(node.unique_id for node in sources))
    aside = LineageNode("model.p.aside", "aside", "model", ("source.p.raw.aside",))
    nodes = [*sources, model, source("aside"), aside]
    plan = DbtPlan(
        project="p",
        adapter="duckdb",
        selected=["model.p.m"],
        lineage=Lineage({node.unique_id: node for node in nodes}),
    )
    checked = [
        Checked(FivetranSync(credentials="fivetran", connection_id=f"id-{name}", name=name))
        for name in landed
    ]
    jobs = [
        JobResult(
            vendor="fivetran",
            resource_id=f"id-{name}",
            name=name,
            state=JobState.SUCCEEDED if good else JobState.FAILED,
        )
        for name, good in landed.items()
    ]
    return Gate(plan, checked, jobs)


def ages(*names: str, state: DbtState = DbtState.FAIL) -> SourcesStale:
    found = [SourceAge(unique_id=f"source.p.raw.{name}", name=f"raw.{name}", state=state) for name in names]
    return SourcesStale(Freshness.of(found, 0.0))


def taken_in(gate: FreshnessGate, answer: Any, about: Gate) -> Looked:
    looked = Looked()
    with disable_run_logger():
        looked.add_sources(gate, answer, about)
    return looked


def told(looked: Looked) -> dict[str, str]:
    return {finding.name: finding.message for finding in looked.findings}


def looked_at(gates: list[GateCheck], about: Gate, transform: DbtCore) -> Looked:
    @flow(task_runner=EventLoopTaskRunner())
    def looking() -> Looked:
        return look_at_gates(gates, about, transform)

    return looking()


def test_what_did_not_land_is_not_told_twice() -> None:
    """A source whose sync failed is old for a reason that is known; another that is old is told.

    One that nothing selected is built on is not looked at.
    """
    about = chain(source("a", by="a"), source("b"), a=False)
    assert told(taken_in(FreshnessGate(), ages("a", "b", "aside"), about)).keys() == {"raw.b"}


@pytest.mark.parametrize("gone", [False, True], ids=["landed", "all failed"])
def test_a_gate_that_could_not_be_looked_at_lets_nothing_through(tmp_path: Path, gone: bool) -> None:
    """When dbt breaks, every source with a threshold is of unknown age, also those that others fill.

    Where there is no such source, because nothing has landed, the gate has failed nevertheless.
    """
    broken = DbtCore(project_dir=tmp_path / "nowhere")
    others = [] if gone else [source("others"), source("free", watched=False)]
    about = chain(source("a", by="a"), *others, a=not gone)
    looked = looked_at([FreshnessGate()], about, broken)
    why = "the gate could not be looked at: "
    if gone:
        (step,) = looked.steps
        assert (step.state, step.name, looked.findings) == (StepState.FAILED, "freshness", [])
        assert str(step.message).startswith(why)
    else:
        assert told(looked).keys() == {"raw.a", "raw.others"}
        assert all(message.startswith(why) for message in told(looked).values())
        assert {finding.owner for finding in looked.findings} == {"desk"}
        about.stay_shut(looked.findings)
        assert about.late_sources == {"source.p.raw.a", "source.p.raw.others"}
    assert looked.passed == []


def test_a_source_that_dbt_left_out_is_not_fresh() -> None:
    """With `fail_fast` dbt stops at the first source that is too old: of the others nothing is known."""
    looked = taken_in(FreshnessGate(), ages("a"), chain(source("a"), source("b")))
    assert told(looked) == {"raw.a": "it could not be looked at", "raw.b": "dbt did not look at it"}


def test_a_gate_that_looked_at_nothing_says_so() -> None:
    """Where no source that is selected has a threshold the step warns; it is no ✓."""
    fresh = ages("aside", state=DbtState.SUCCESS).result
    (step,) = taken_in(FreshnessGate(), fresh, chain(source("a", watched=False))).steps
    assert (step.state, step.good) == (StepState.PARTIAL, True)
    assert step.message == (
        "none of the sources that it is about has a freshness threshold: nothing was looked at"
    )
    (step,) = taken_in(FreshnessGate(), fresh, chain(source("a", by="a"), a=False)).steps
    assert step.state is StepState.PARTIAL
    assert "none of the sources that it is about has landed" in step.line
    (step,) = looked_at([RowsGate(at_least=1)], chain(a=False), DbtCore(project_dir=Path())).steps
    assert step.message == "none of the connections that it is about has landed: nothing was looked at"


def test_gates_of_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two gates of freshness ask dbt once, and not while a query has the file of the warehouse open."""
    project = Project(tmp_path)
    project.set(name="p")
    fresh = "loaded_at_query: \"select timestamp '2999-01-01'\", "
    fresh += "freshness: {error_after: {count: 1, period: day}}"
    tables = ", ".join(f"{{name: {name}, config: {{{fresh}}}}}" for name in "ab")
    project.write("models/schema.yml", f"sources: [{{name: raw, tables: [{tables}]}}]")
    done: list[str] = []
    dbt_began, ask, running = threading.Event(), tasks.gates._ask, DbtProcess.running

    def asking(engine: Any, query: str) -> Any:
        with engine.connect():  # the file is open until dbt begins, or long enough for it to have done so
            dbt_began.wait(3)
        done.append("query")
        return ask(engine, query)

    def starting(request: dict[str, Any], **more: Any) -> Any:
        done.append(request["mode"])
        dbt_began.set()
        return running(request, **more)

    monkeypatch.setattr("tasks.gates._ask", asking)
    monkeypatch.setattr(DbtProcess, "running", starting)
    database = SqlAlchemyConnector(connection_info=f"duckdb:///{project.warehouse}")
    looked = looked_at(
        [
            FreshnessGate(name="of a", connections=["a"]),
            SqlGate(database=database, query="select 1", at_least=1),
            FreshnessGate(name="of b", connections=["b"]),
        ],
        chain(source("a", by="a"), source("b", by="b"), a=True, b=True),
        project.core(),
    )
    assert done == ["query", "freshness"]
    assert [(step.name, step.state) for step in looked.steps] == [
        ("of a", StepState.SUCCEEDED),
        ("select 1", StepState.SUCCEEDED),
        ("of b", StepState.SUCCEEDED),
    ]


def test_rows_that_nobody_tells() -> None:
    """Without a number and a history nothing is compared: the gate says so, and calls nothing well again."""
    gate = RowsGate(share_of_usual=0.5)
    looked = looked_at([gate], chain(a=True), DbtCore(project_dir=Path()))
    (step,) = looked.steps
    assert (step.state, step.good) == (StepState.PARTIAL, True)
    assert step.message == "nothing to compare for a: it is not told how many rows landed"
    assert (looked.findings, looked.passed) == ([], [])
    about = chain(a=True, b=True)
    about.outcomes = [about.outcomes[0], about.outcomes[1].model_copy(update={"rows": 5})]
    looked = looked_at([gate], about, DbtCore(project_dir=Path()))
    assert [step.state for step in looked.steps] == [StepState.PARTIAL]
    assert looked.passed == ["rows/id-b/rows"]


def test_at_least_so_many_rows_of_a_tool_that_counts_none() -> None:
    """A gate that would stay shut whatever has landed is refused before anything is started."""
    syncs = [
        Checked(FivetranSync(credentials="fivetran", connection_id="silent", name="crm"), counts_rows=False),
        Checked(FivetranSync(credentials="fivetran", connection_id="told")),
    ]
    with pytest.raises(InputError, match=r"at least 1,000 rows of crm, and Fivetran does not tell how many"):
        check_gate_names([RowsGate(at_least=1000)], syncs, None)
    check_gate_names([RowsGate(at_least=1, connections=["told"]), RowsGate(share_of_usual=1)], syncs, None)


def test_a_gate_about_some_connections_looks_at_their_sources() -> None:
    """By id or name, and at all where it names none."""
    about = chain(source("a", by="a"), source("b", by="b"), source("c"), a=True, b=True)
    answer = ages("a", "b", "c")
    assert told(taken_in(FreshnessGate(connections=["b"]), answer, about)).keys() == {"raw.b"}
    assert told(taken_in(FreshnessGate(connections=["id-a"]), answer, about)).keys() == {"raw.a"}
    assert told(taken_in(FreshnessGate(), answer, about)).keys() == {"raw.a", "raw.b", "raw.c"}


def test_a_project_without_thresholds_is_refused() -> None:
    """A gate that could never shut starts nothing."""
    plan = DbtPlan(project="p", adapter="duckdb", selected=[], lineage=Lineage({}))
    with pytest.raises(InputError, match="needs sources with a freshness threshold, and the dbt project p"):
        check_gate_names([FreshnessGate()], [], DbtCore(project_dir=Path()), plan)


@pytest.mark.parametrize(
    ("raw", "watched"),
    [
        ({"freshness": {"warn_after": {"count": 1, "period": "day"}, "error_after": {}}}, True),
        ({"freshness": {"error_after": {"count": 0, "period": "day"}}}, True),
        ({"freshness": {"warn_after": {"count": None, "period": None}, "error_after": None}}, False),
        ({"freshness": None, "config": {"freshness": {"error_after": {"count": 1, "period": "day"}}}}, False),
        ({}, False),
    ],
)
def test_thresholds_are_read_from_the_manifest(raw: dict[str, Any], watched: bool) -> None:
    """By dbt's own rule: a count and a period, in what it has made of the config."""
    lineage = Lineage.from_manifest({"sources": {"source.p.raw.a": {"name": "a", **raw}}})
    assert lineage.nodes["source.p.raw.a"].watched is watched
