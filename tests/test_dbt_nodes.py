"""Every kind of dbt node, also the odd ones, comes out right: in the result, in Prefect, in the logs."""

from __future__ import annotations

import asyncio
import re
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import LogFilter, LogFilterTaskRunId
from prefect.client.schemas.objects import TaskRun

from tasks.dbt_core import DbtNode, DbtState
from tests.dbt_project import Project
from tests.jobs_fixtures import PREFECTS_SOCKETS, collected
from tests.test_dbt_core import Run, build, ended, task_runs

__all__ = ["collected"]

pytestmark = [
    *PREFECTS_SOCKETS,
    pytest.mark.usefixtures("warm_dbt"),
]

YEAR = datetime.now(UTC).year
COMPILED = re.compile(r"^compiled: (\S+)$", re.MULTILINE)


def odd(folder: Path) -> Project:
    """What `everything` of tests/dbt_project.py does not have: what shows up in ways of its own."""
    project = Project(folder)
    project.set(**{"on-run-start": ["select 1"], "on-run-end": ["select * from no_such_table"]})
    project.write(
        "seeds/events.csv", f"id,happened\n1,{YEAR - 2}-05-01\n2,{YEAR - 1}-05-01\n3,{YEAR}-01-01\n"
    )
    project.model(
        "occurred",
        "{{ config(materialized='table', event_time='happened') }}"
        " select id, happened::timestamp as happened from {{ ref('events') }}",
    )
    batches = f"batch_size='year', event_time='happened', begin='{YEAR - 2}-01-01'"
    project.model(
        "by_year",
        f"{{{{ config(materialized='incremental', incremental_strategy='microbatch', {batches}) }}}}"  # noqa: S608
        " select *, case when id = 2 then error('year two is bad') end as ok from {{ ref('occurred') }}",
    )
    project.model("below_by_year", "select * from {{ ref('by_year') }}")
    project.model("through", "{{ config(materialized='ephemeral') }} select * from {{ ref('by_year') }}")
    project.model("after_through", "select * from {{ ref('through') }}")
    project.model("counted", "select count(*) as n from {{ ref('occurred') }}")
    project.model("off", "{{ config(enabled=false) }} select 1 as id")
    project.write("tests/off_too.sql", "{{ config(enabled=false) }} select * from {{ ref('occurred') }}")
    project.model("leaf", "select 1 as id")
    project.write("tests/misspelt.sql", "select no_such_column from {{ ref('leaf') }}")
    project.write(
        "snapshots/kept.sql",
        """
        {% snapshot kept %}
        {{ config(target_schema='main', unique_key='no_such_key', strategy='check', check_cols='all') }}
        select id, no_such_column from {{ ref('events') }}
        {% endsnapshot %}
        """,
    )
    project.write(
        "models/schema.yml",
        """
        models:
          - name: occurred
            columns:
              - name: id
                data_tests: [{accepted_values: {values: [1, 2], config: {severity: warn}}}, unique]
        unit_tests:
          - name: counts_rows
            model: counted
            given:
              - input: ref('occurred')
                rows: [{id: 1}, {id: 2}]
            expect:
              rows: [{n: 3}]
        """,
    )
    return project


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    return odd(tmp_path_factory.mktemp("odd"))


@pytest.fixture(scope="module")
def run(prefect_server: str, project: Project) -> Run:
    return build(project.core())


@pytest.fixture(scope="module")
def nodes(run: Run) -> dict[str, DbtNode]:
    return {node.name: node for node in run.result.nodes}


@pytest.fixture(scope="module")
def shown(run: Run) -> dict[str, TaskRun]:
    return {found.name: found for found in asyncio.run(task_runs(run.id, ended(15)))}


def said(task_run: TaskRun) -> str:
    assert task_run.state is not None
    return task_run.state.message or ""


def log_of(task_run: TaskRun, enough: str) -> list[str]:
    """The lines under a task run, once one of them has these words: they are sent every two seconds."""
    wanted = LogFilter(task_run_id=LogFilterTaskRunId(any_=[task_run.id]))
    deadline = time.monotonic() + 60
    with get_client(sync_client=True) as client:
        while True:
            lines = [line.message for line in client.read_logs(log_filter=wanted)]
            if any(enough in line for line in lines) or time.monotonic() > deadline:
                return lines
            time.sleep(0.2)


STATES = {
    "hook shop.on-run-start.0": "success",
    "seed events": "success",
    "model occurred": "success",
    "test unique_occurred_id": "success",
    "test accepted_values_occurred_id__1__2": "warn",
    "model leaf": "success",
    "test misspelt": "error",
    "snapshot kept": "error",
    "unit test counts_rows": "fail",
    "model counted": "skipped",
    "model by_year": "error",
    "model below_by_year": "skipped",
    "model after_through": "skipped",
    "hook shop.on-run-end.0": "error",
}


def test_every_kind_of_node_comes_back_in_its_true_state(run: Run) -> None:
    """Batches are one node, disabled and ephemeral ones are none, hooks and unit tests are nodes."""
    assert {node.label: node.state.value for node in run.result.nodes} == STATES
    assert run.result.counts == {"success": 5, "warn": 1, "error": 4, "fail": 1, "skipped": 3}


def test_prefect_shows_the_same_nodes_in_the_same_states(shown: dict[str, TaskRun]) -> None:
    """One task run per node and none for what is not run, with Prefect's names for the states."""
    names = {"success": "Completed", "warn": "Warned", "skipped": "Skipped", "fail": "Failed"}
    expected = {label: names.get(state, "Failed") for label, state in STATES.items()}
    assert {name: run.state.name for name, run in shown.items() if run.state} == {
        **expected,
        "dbt build": "Failed",
    }


def test_a_microbatch_model_says_how_many_batches_failed_and_why(
    nodes: dict[str, DbtNode], shown: dict[str, TaskRun]
) -> None:
    """dbt's own message is only `PARTIAL SUCCESS`; the error of the batch is told with it."""
    message = nodes["by_year"].message or ""
    assert message.startswith("PARTIAL SUCCESS (2/3): ")
    assert "year two is bad" in message
    assert said(shown["model by_year"]).startswith(message)
    assert nodes["below_by_year"].message == "model by_year failed"


def test_a_unit_test_that_fails_shows_the_difference(nodes: dict[str, DbtNode]) -> None:
    """What was expected and what came, and its model is not built."""
    message = nodes["counts_rows"].message or ""
    assert "actual differs from expected" in message
    assert "+++,2" in message
    assert "---,3" in message
    assert nodes["counted"].message == "unit test counts_rows failed"


def test_behind_an_ephemeral_model_the_true_failure_is_named(nodes: dict[str, DbtNode]) -> None:
    """dbt speaks of a compilation error in the ephemeral model, where there is none."""
    assert nodes["after_through"].message == "model by_year failed"


def test_a_failed_node_names_the_file_with_the_sql_that_was_sent(
    project: Project, nodes: dict[str, DbtNode], shown: dict[str, TaskRun]
) -> None:
    """In the result and in the state's message, and the file is there; a snapshot has none."""
    for label in ("test misspelt", "hook shop.on-run-end.0", "model by_year"):
        (path,) = COMPILED.findall(said(shown[label]))
        assert path == nodes[label.split()[-1]].compiled_path
        assert (project.folder / path).exists()
    assert "no_such_column" in (project.folder / str(nodes["misspelt"].compiled_path)).read_text()
    assert nodes["kept"].compiled_path is None
    assert "Runtime Error in snapshot kept (snapshots/kept.sql)" in (nodes["kept"].message or "")


def test_the_log_of_a_node_lies_under_the_node(shown: dict[str, TaskRun]) -> None:
    """dbt's line about it, and for a failure the database's error with the compiled file."""
    lines = log_of(shown["test misspelt"], "Finished in state")
    assert any("ERROR misspelt" in line for line in lines)
    (error,) = [line for line in lines if line.startswith("Runtime Error in test misspelt")]
    assert 'Referenced column "no_such_column" not found' in error
    assert COMPILED.search(error)
    assert any("OK created" in line for line in log_of(shown["model occurred"], "Finished in state"))


def test_dbts_own_deprecations_are_warnings_of_the_build(run: Run, shown: dict[str, TaskRun]) -> None:
    """Each as one line in the result and in the build's log, and none makes the build fail."""
    (warning,) = run.result.warnings
    assert warning.startswith("MissingArgumentsPropertyInGenericTestDeprecation: Found top-level arguments")
    assert "\n" not in warning
    assert warning in log_of(shown["dbt build"], "DeprecationsSummary")


def test_a_hook_that_fails_at_the_start_is_what_the_build_fails_for(tmp_path: Path) -> None:
    """The nodes that dbt does not run then are skipped, and say for which hook."""
    project = Project(tmp_path)
    project.set(
        **{
            "on-run-start": ["select * from no_such_table"],
            "flags": {"send_anonymous_usage_stats": False, "skip_nodes_if_on_run_start_fails": True},
        }
    )
    project.model("a", "select 1 as id")
    run = build(project.core())
    assert [(node.label, node.state) for node in run.result.nodes] == [
        ("hook shop.on-run-start.0", DbtState.ERROR),
        ("model a", DbtState.SKIPPED),
    ]
    assert run.error is not None
    assert "hook shop.on-run-start.0: Catalog Error: Table with name no_such_table" in str(run.error)
    assert run.result.skipped[0].message == "hook shop.on-run-start.0 failed"


def test_on_duckdb_too_a_node_says_how_many_rows_it_wrote(tmp_path: Path) -> None:
    """Of an increment those of the increment, also when that is none; nothing of views and tests."""
    project = Project(tmp_path)
    project.write("seeds/colours.csv", "id\n1\n2\n3\n")
    project.model("seen", "select count(*) as \"Count\" from {{ ref('colours') }}")
    project.model("whole", "{{ config(materialized='table') }} select * from {{ ref('colours') }}")
    project.model(
        "grown",
        "{{ config(materialized='incremental', unique_key='id', post_hook='select 7 as \"Count\"') }}"
        " select * from {{ ref('whole') }} where id < {{ var('below') }}"
        " {% if is_incremental() %} and id > 1 {% endif %}",
    )
    project.write("models/schema.yml", "models: [{name: whole, columns: [{name: id, data_tests: [unique]}]}]")
    for below, written in ((3, 2), (4, 2), (1, 0)):
        nodes = build(project.core(vars={"below": below})).result.nodes
        rows = {node.label: node.rows for node in nodes if node.rows is not None}
        assert rows == {"seed colours": 3, "model whole": 3, "model grown": written}
