"""Gates before the transform: rows against the usual, questions to the warehouse, and what they hold back."""

from __future__ import annotations

import asyncio
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
from prefect import flow, task
from prefect.artifacts import acreate_markdown_artifact
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import ArtifactCreate
from prefect.flow_engine import run_flow
from prefect.futures import PrefectFuture
from prefect_sqlalchemy import SqlAlchemyConnector
from pydantic import TypeAdapter, ValidationError

from flows import RunFailed, StepState, elt_chain
from flows.gates import check_gate_names
from sandbox import Sandbox, catalog
from tasks.gates import Finding, FreshnessGate, GateCheck, RowsGate, SqlGate, check_gates, look_at_gate
from tasks.jobs import Entry, EventLoopTaskRunner, InputError, JobResult, JobState
from tasks.jobs.history import rows_of_earlier_runs
from tasks.jobs.journal import current_journal
from tasks.sql import with_database
from tests.flows_fixtures import Runs, box, runs, sources, starts
from tests.jobs_fixtures import PREFECTS_SOCKETS, collected
from tests.test_flows import _chain

__all__ = ["box", "collected", "runs", "sources"]

pytestmark = [
    pytest.mark.usefixtures("warm_dbt"),
    *PREFECTS_SOCKETS,
    # Prefect's, on every line that a task outside of a flow logs.
    pytest.mark.filterwarnings("ignore:.*without a flow run id:UserWarning"),
]


def job(rows: int | None, name: str = "orders", state: JobState = JobState.SUCCEEDED) -> JobResult:
    return JobResult(
        vendor="airbyte", resource_id=f"id-{name}", name=name, owner="sales", state=state, rows=rows
    )


async def messages(gate: Any, *jobs: JobResult) -> list[str]:
    found: list[Finding] = await look_at_gate(gate, list(jobs))
    return [f"{finding.name}: {finding.message}" for finding in found]


async def test_rows_at_least() -> None:
    """Too few rows keep the gate shut, also where the vendor tells none; failed syncs are not asked."""
    gate = RowsGate(at_least=10)
    found = await messages(gate, job(10), job(9, "a"), job(None, "b"), job(0, "c", JobState.FAILED))
    assert found == [
        "a: 9 rows landed; at least 10 were expected",
        "b: airbyte does not say how many rows; at least 10 were expected",
    ]


async def test_a_gate_about_some() -> None:
    """A gate looks only at the connections that it is about, by id or by name."""
    gate = RowsGate(at_least=1, connections=["a", "id-b"])
    found = await messages(gate, job(0), job(0, "a"), job(0, "b"))
    assert [text.split(":")[0] for text in found] == ["a", "b"]


@pytest.fixture
def database(tmp_path: Path) -> SqlAlchemyConnector:
    return SqlAlchemyConnector(connection_info=f"duckdb:///{tmp_path}/w.duckdb")


@pytest.mark.parametrize(
    ("query", "bounds", "says"),
    [
        ("SELECT 5", {"at_least": 5}, None),
        ("SELECT 4", {"at_least": 5}, "at least 5 was expected, 4 was found"),
        ("SELECT 1200", {"at_least": 5, "at_most": 1000}, "at least 5 and at most 1,000 was expected, 1,200"),
        ("SELECT NULL", {"at_most": 5}, "at most 5 was expected, nothing was found"),
        ("SELECT 'many'", {"at_most": 5}, "at most 5 was expected, 'many' was found"),
        ("SELECT 'nan'::double", {"at_most": 5}, "at most 5 was expected, no number was found: nan"),
        ("SELECT 'nan'::double", {"at_least": 5}, "at least 5 was expected, no number was found: nan"),
        ("SELECT 'inf'::double", {"at_least": 5}, "at least 5 was expected, no number was found: inf"),
        ("SELECT 1 WHERE false", {}, None),
        ("SELECT 7, 'x'", {}, "no row was expected, one was found: 7, x"),
        (
            "SELECT n FROM nowhere",
            {},
            "the question could not be asked: Catalog Error: Table with name nowhere",
        ),
    ],
)
async def test_questions(
    database: SqlAlchemyConnector, query: str, bounds: dict[str, float], says: str | None
) -> None:
    """An answer out of bounds, or none at all, keeps the gate shut, with what was expected and found."""
    found = await messages(SqlGate(database=database, query=query, **bounds), job(1))
    if says is None:
        assert found == []
    else:
        (message,) = found
        assert says in message


async def _journal(rows: int, name: str, state: str = "SUCCEEDED", operation: str = "sync") -> None:
    entry = {
        "key": f"airbyte:{operation}:id-{name}",
        "vendor": "airbyte",
        "resource_id": f"id-{name}",
        "name": name,
        "since": "2026-01-01T00:00:00Z",
        "result": {
            "vendor": "airbyte",
            "resource_id": f"id-{name}",
            "name": name,
            "state": state,
            "rows": rows,
        },
    }
    text = TypeAdapter(list[Any]).dump_json([entry]).decode()
    await acreate_markdown_artifact(f"<!-- journal {text} -->", key="elt-jobs")


@pytest.mark.filterwarnings("ignore:Artifact creation outside:FutureWarning")
async def test_what_is_usual() -> None:
    """Only good syncs count for what is usual, the newest first."""
    name = f"usual-{uuid4()}"
    for rows in (100, 110, 90):
        await _journal(rows, name)
    await _journal(7, name, state="FAILED")
    await _journal(5, name, operation="clear")
    await _journal(0, name)  # else a source that stays empty would be usual before long
    resource = ("airbyte", f"id-{name}")
    assert (await rows_of_earlier_runs([resource], runs=2, but=None)).rows == {resource: [90, 110]}
    gate = RowsGate(share_of_usual=0.5, runs=5)
    assert await messages(gate, job(50, name), job(0, "never-seen-before")) == []
    (message,) = await messages(gate, job(49, name))
    assert message.endswith("49 rows landed; at least 50% of the usual 100 were expected (the last 3 syncs)")


def _landed(rows: int, name: str, *gates: RowsGate, deployment: UUID | None = None) -> list[list[str]]:
    """A run in which a sync lands so many rows, and what each gate has to say of it."""

    @flow(name="landing", task_runner=EventLoopTaskRunner())
    def landing() -> list[list[str]]:
        result = job(rows, name)
        _record.submit(result).result()
        looks: list[PrefectFuture[Any]] = [look_at_gate.submit(gate, [result]) for gate in gates]
        return [[finding.message for finding in look.result()] for look in looks]

    if deployment is None:
        return landing()
    with get_client(sync_client=True) as client:
        run = client.create_flow_run_from_deployment(deployment)
    return run_flow(landing, flow_run=run, return_type="result")  # type: ignore[return-value]


@task
async def _record(result: JobResult) -> None:
    key = f"{result.vendor}:sync:{result.resource_id}"
    fields = {name: getattr(result, name) for name in ("vendor", "resource_id", "name")}
    await current_journal().record(Entry(key=key, since=datetime.now(UTC), result=result, **fields))


def test_too_few_rows_do_not_become_usual() -> None:
    """However often too little lands the gate stays shut, until somebody accepts it as the new measure.

    Another gate of the same run, which found enough, takes nothing back.
    """
    name = f"shrunk-{uuid4()}"
    gate, other = RowsGate(share_of_usual=0.5, runs=3), RowsGate(at_least=1, name="at all")
    assert _landed(1000, name, gate) == [[]]
    with get_client(sync_client=True) as client:  # a journal that nobody can read is in nobody's way
        broken = ArtifactCreate(key="elt-jobs", type="markdown", data='<!-- journal [{"key": 1}] -->')
        client._client.post("/artifacts/", json=broken.model_dump(mode="json", exclude_unset=True))
    for _ in range(4):
        (found, nothing) = _landed(10, name, gate, other)
        assert (len(found), nothing) == (1, [])
        assert "10 rows landed; at least 50% of the usual 1,000 were expected" in found[0]
    accepted = gate.model_copy(update={"usual_since": datetime.now(UTC)})
    assert _landed(10, name, accepted) == [[]]
    assert "of the usual 10 were expected" in _landed(2, name, accepted)[0][0]


def test_what_is_usual_is_found_however_many_others_run(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A run finds the syncs of its own deployment; where it can't find any it says so."""
    monkeypatch.setattr("tasks.jobs.history._PAGE", 2)
    monkeypatch.setattr("tasks.jobs.history._MOST_PAGES", 2)
    name, gate = f"daily-{uuid4()}", RowsGate(share_of_usual=0.5)
    with get_client(sync_client=True) as client:
        landing = client.create_flow_from_name("landing")
        daily, other = (client.create_deployment(landing, f"{kind}-{name}") for kind in ("daily", "other"))
    _landed(1000, name, deployment=daily)
    for _ in range(4):
        _landed(50, "of-another-pipeline", deployment=other)
    assert "of the usual 1,000" in _landed(10, name, gate, deployment=daily)[0][0]
    assert "no earlier sync of it is in the newest journals" not in caplog.text
    for _ in range(4):
        _landed(50, "of-another-pipeline", deployment=other)
    assert _landed(10, name, gate, deployment=other) == [[]]
    assert "no earlier sync of it is in the newest journals" in caplog.text


def test_a_sync_that_succeeded_with_nothing(box: Sandbox, runs: Runs, tmp_path: Path) -> None:
    """A sync that has a history and succeeds with no rows holds back what is built on it, and only that."""
    parameters = _chain(box, tmp_path / "dbt", gates=[{"tool": "rows", "share_of_usual": 0.5}])
    first = runs.run(elt_chain, runs.create(elt_chain, parameters)).result()
    assert [(s.kind, s.state) for s in first.steps if s.kind == "gate"] == [("gate", StepState.SUCCEEDED)]

    box.airbyte.set("airports", outcome="zero_rows")
    run_id = runs.create(elt_chain, {**parameters, "allow_failure": "none"})
    with pytest.raises(RunFailed) as caught:
        runs.run(elt_chain, run_id).result()
    report: Any = caught.value.report
    (gate,) = report.of("gate")
    assert (gate.state, gate.name, gate.owner) == (
        StepState.FAILED,
        "rows of airports",
        "reference-data",
    )
    assert "0 rows landed; at least 50% of the usual 1,458 were expected" in gate.message
    assert {node.name for node in report.nodes if node.resource_type == "model"} == {"carriers"}
    assert report.held_nodes == {"places": "airports did not pass the gate"}
    carriers, places = report.of("activation")
    assert (carriers.state, places.state) == (StepState.SUCCEEDED, StepState.HELD)
    assert places.message == "airports did not pass the gate, and places is built on it"
    assert places.because == [gate.key]
    (told,) = box.slack.sent_to("reference-data")
    assert f"○ held back: weather-delays-to-braze ({places.message})" in told.text.splitlines()

    box.airbyte.set("airports", outcome="succeed")
    again = runs.run(elt_chain, runs.create(elt_chain, {**parameters, "allow_failure": "none"})).result()
    assert again.complete
    # What an incident about the gate was called is well again.
    assert gate.key in again.passed
    assert gate.key not in report.passed
    assert "rows of airports* is well again" in box.slack.sent_to("reference-data")[-1].text


@pytest.mark.timeout(240)  # seven starts of dbt
def test_a_source_that_is_too_old(box: Sandbox, runs: Runs, tmp_path: Path) -> None:
    """A source past its error threshold holds back what is built on it, though its sync went well.

    It is an alert at PagerDuty under a key without the run in it, which the next good run resolves.
    """
    parameters = _chain(
        box,
        tmp_path / "dbt",
        gates=[{"tool": "freshness"}],
        allow_failure="none",
        notify=[{"tool": "pagerduty", "routing": "data-platform"}],
    )
    schema = tmp_path / "dbt" / "models" / "schema.yml"
    text = schema.read_text()
    freshness = (
        "loaded_at_query: \"select timestamp '{at}'\", freshness: {{error_after: {{count: 1, period: day}}}}"
    )
    old, new = (freshness.format(at=at) for at in ("2013-12-31 00:00:00", "2999-01-01 00:00:00"))
    airports = "tables: [{name: airports"
    schema.write_text(text.replace(airports, f"{airports}, config: {{{old}}}"))

    with pytest.raises(RunFailed) as caught:
        runs.run(elt_chain, runs.create(elt_chain, parameters)).result()
    report: Any = caught.value.report
    (gate,) = report.of("gate")
    assert gate.state is StepState.FAILED
    assert gate.name == "freshness of airports.airports"
    assert "fails after 24 h" in gate.message
    assert {node.name for node in report.nodes if node.resource_type == "model"} == {"carriers"}
    assert report.held_nodes == {"places": "airports.airports did not pass the gate"}
    assert [step.state for step in report.of("activation")] == [StepState.SUCCEEDED, StepState.HELD]
    (alert,) = box.pagerduty.open_of()
    assert alert.dedup_key == f"elt-chain/{gate.key}"
    assert "fails after 24 h" in alert.summary

    schema.write_text(text.replace(airports, f"{airports}, config: {{{new}}}"))
    again = runs.run(elt_chain, runs.create(elt_chain, parameters)).result()
    assert again.complete
    assert gate.key in again.passed
    assert box.pagerduty.open_of() == []
    assert [event["event_action"] for event in alert.events] == ["trigger", "resolve"]


def test_a_gate_about_nothing(box: Sandbox, runs: Runs, tmp_path: Path) -> None:
    """A gate about a connection that is not in the run, or with an unsaved database, starts nothing.

    An activation is no connection.
    """
    activation = str(catalog.SYNCS[0].sync_id)
    gate = {"tool": "rows", "at_least": 1, "connections": [activation]}
    state = runs.run(elt_chain, runs.create(elt_chain, _chain(box, tmp_path / "dbt", gates=[gate])))
    assert f"The gate rows is about {activation}, which is not in this run" in (state.message or "")
    with pytest.raises(InputError, match=r"is about people, which is not in this run. In it are: \."):
        check_gate_names([RowsGate(at_least=1, connections=["people"])], [], None)
    with pytest.raises(InputError, match="needs a transform by dbt-core"):
        check_gate_names([FreshnessGate()], [], None)
    gate = {"tool": "sql", "database": "nowhere", "query": "SELECT 1"}
    state = runs.run(elt_chain, runs.create(elt_chain, _chain(box, tmp_path / "dbt", gates=[gate])))
    assert state.name == "Failed"
    assert "'nowhere'" in (state.message or "")
    assert starts(box) == 0


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"tool": "rows"}, "needs at_least, share_of_usual, or both"),
        ({"tool": "rows", "share_of_usual": 1.5}, "less than or equal to 1"),
        ({"tool": "rows", "at_least": 1, "usual_since": "2026-03-01"}, "share_of_usual, which is not given"),
        ({"tool": "sql", "database": "w", "query": ""}, "at least 1 character"),
        ({"tool": "sql", "database": "w", "query": "x", "atleast": 1}, "Extra inputs"),
        ({"tool": "sql", "database": "w", "query": "x", "at_most": float("nan")}, "finite number"),
    ],
)
def test_gates_that_make_no_sense(fields: dict[str, Any], says: str) -> None:
    """A gate that could never shut is refused when it is written down."""
    with pytest.raises(ValidationError, match=says):
        TypeAdapter(GateCheck).validate_python(fields)


@pytest.mark.parametrize("day", ["2026-03-01", date(2026, 3, 1)], ids=["JSON", "YAML"])
def test_the_day_of_a_new_measure(day: Any) -> None:
    """It is a day in UTC, as a form sends it and as YAML reads it."""
    gate = RowsGate(share_of_usual=0.5, usual_since=day)
    assert gate.usual_since == datetime(2026, 3, 1, tzinfo=UTC)


async def test_two_gates_of_one_database(database: SqlAlchemyConnector) -> None:
    """Each has connections of its own: one that ends, or is stopped, does nothing to the other's."""
    one, other = await asyncio.gather(*(with_database(database, lambda engine: engine) for _ in range(2)))
    assert one is not other
    assert database._engine is None


async def test_gates_are_checked(database: SqlAlchemyConnector) -> None:
    """A gate with a database at hand passes the check."""
    await check_gates([SqlGate(database=database, query="SELECT 1"), RowsGate(at_least=1)])
