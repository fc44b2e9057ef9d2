"""The standing dbt jobs as their users run them: what they do, how they end, what they refuse."""

from __future__ import annotations

import logging
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import duckdb
import pytest
from prefect import Flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId, ArtifactFilterKey
from prefect.client.schemas.objects import State

from blocks.reference import BlockNotFound
from flows import build_project, full_refresh, smoke_test, source_freshness
from sandbox import Sandbox
from tasks.dbt.choice import incremental_models, with_all_below, words
from tasks.dbt.freshness import Freshness, span
from tasks.dbt.lineage import Lineage
from tasks.dbt_core import DbtInputError, DbtResult, DbtState, SourcesStale
from tests.dbt_project import Project, dbt_starts
from tests.deployed import specs
from tests.flows_fixtures import box, forget_incidents, save_blocks, sources, task_runs
from tests.jobs_fixtures import PREFECTS_SOCKETS, collected

__all__ = ["box", "collected", "dbt_starts", "sources"]

pytestmark = [
    *PREFECTS_SOCKETS,
    pytest.mark.usefixtures("warm_dbt"),
]

GOOD_SEED, BAD_SEED = "id,name\n1,red\n2,green\n", "id,name\none,red\n"


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Project:
    project = Project(tmp_path_factory.mktemp("shop"))
    project.write("seeds/colours.csv", GOOD_SEED)
    project.model(
        "log",
        "{{ config(materialized='incremental') }} select id, now() as at_time from {{ ref('colours') }}",
    )
    project.model("from_log", "{{ config(materialized='table') }} select count(*) as n from {{ ref('log') }}")
    project.model("colour_names", "select name from {{ ref('colours') }}")
    project.model("elsewhere", "select 1 as id")
    project.write(
        "selectors.yml",
        "selectors: [{name: smoke, definition: {method: fqn, value: colour_names}}]",
    )
    hours = {"warn_after": {"count": 24, "period": "hour"}, "error_after": {"count": 2, "period": "day"}}
    table = {"loaded_at_field": "loaded_at", "config": {"freshness": hours, "meta": {"owner": "shopkeeper"}}}
    project.write(
        "models/schema.yml",
        str(
            {
                "seeds": [{"name": "colours", "config": {"column_types": {"id": "integer"}}}],
                "sources": [
                    {
                        "name": "raw",
                        "schema": "raw",
                        "tables": [
                            *({"name": name, **table} for name in ("young", "late", "old", "missing")),
                            {"name": "unwatched"},
                        ],
                    }
                ],
            }
        ),
    )
    with duckdb.connect(str(project.warehouse)) as db:
        db.execute("create schema raw")
        for name, hours_old in (("young", 1), ("late", 30), ("old", 60)):
            loaded = datetime.now(UTC) - timedelta(hours=hours_old)
            db.execute(
                f"create table raw.{name} as select ?::timestamp as loaded_at", [loaded.replace(tzinfo=None)]
            )
    return project


def run(flow: Flow[..., Any], **parameters: Any) -> tuple[State[Any], UUID]:
    """The final state, and the id of the run."""
    state: State[Any] = flow(retry_delay=0, return_state=True, **{"retries": 0, **parameters})
    assert state.state_details.flow_run_id is not None
    return state, state.state_details.flow_run_id


def artifact(run_id: UUID, key: str) -> str:
    of_run = ArtifactFilter(
        key=ArtifactFilterKey(any_=[key]), flow_run_id=ArtifactFilterFlowRunId(any_=[run_id])
    )
    with get_client(sync_client=True) as client:
        (found,) = client.read_artifacts(artifact_filter=of_run)
    return str(found.data)


def told(state: State[Any]) -> Any:
    return state.result(raise_on_failure=False)


def names(result: DbtResult) -> set[str]:
    return {node.name for node in result.nodes}


def column(project: Project, query: str) -> list[Any]:
    with duckdb.connect(str(project.warehouse), read_only=True) as db:
        return [row[0] for row in db.execute(query).fetchall()]


class TestSmoke:
    def test_it_loads_the_seeds_and_builds_the_selector(self, shop: Project) -> None:
        """Both results come back, and nothing else of the project is built."""
        state, run_id = run(smoke_test, dbt=shop.core())
        assert state.name == "Completed", state.message
        seeds, smoke = told(state)
        assert (seeds.command, names(seeds)) == ("dbt seed", {"colours"})
        assert (smoke.command, names(smoke)) == ("dbt build selector smoke", {"colour_names"})
        report = artifact(run_id, "dbt-report")
        assert "## dbt seed" in report
        assert "| ✓ | model colour_names | success |" in report

    def test_a_seed_and_a_selector_that_fail_read_differently(self, shop: Project) -> None:
        """In the state's name and message; after a failed seed the selector is not run."""
        shop.write("seeds/colours.csv", BAD_SEED)
        try:
            state, run_id = run(smoke_test, dbt=shop.core())
        finally:
            shop.write("seeds/colours.csv", GOOD_SEED)
        assert (state.name, state.type.value) == ("SeedFailed", "FAILED")
        assert (state.message or "").startswith("the seeds failed: 1 of 1 node failed: seed colours: ")
        assert "## dbt seed" in (report := artifact(run_id, "dbt-report"))
        assert "selector" not in report

        good = (shop.folder / "models/colour_names.sql").read_text()
        shop.model("colour_names", "select no_such_column from {{ ref('colours') }}")
        try:
            state, run_id = run(smoke_test, dbt=shop.core())
        finally:
            shop.model("colour_names", good)
        assert (state.name, state.type.value) == ("SmokeFailed", "FAILED")
        assert (state.message or "").startswith(
            "the selector smoke failed: 1 of 1 node failed: model colour_names: Binder Error: "
        )
        assert "`target/compiled/shop/models/colour_names.sql`" in artifact(run_id, "dbt-report")

    def test_a_selector_that_is_not_there_is_refused_before_the_seeds(self, shop: Project) -> None:
        """With dbt's sentence, which names those that are."""
        state, _ = run(smoke_test, dbt=shop.core(), selector="quick", retries=3)
        assert state.name == "Failed"
        assert "quick" in (state.message or "")
        assert "smoke" in (state.message or "")
        assert isinstance(told(state), DbtInputError)

    def test_without_a_selector_it_builds_what_dbt_selects(self, shop: Project) -> None:
        """For a project that has no selectors; with neither, it is not said what the test is."""
        state, _ = run(smoke_test, dbt=shop.core(select=["colour_names"]), selector=None)
        assert state.name == "Completed", state.message
        seeds, smoke = told(state)
        assert (names(seeds), names(smoke)) == ({"colours"}, {"colour_names"})
        state, _ = run(smoke_test, dbt=shop.core(), selector=None)
        assert state.message == "Nothing says what a smoke test is: name a selector, or `select` in `dbt`."


class TestFullRefresh:
    def test_it_rebuilds_the_chosen_model_and_says_so(
        self, shop: Project, caplog: pytest.LogCaptureFixture
    ) -> None:
        """From nothing, also what is below it if asked, and nothing else; the log shows it."""
        state, _ = run(build_project, dbt=shop.core(select=["+from_log"]))
        assert state.name == "Completed", state.message
        with duckdb.connect(str(shop.warehouse)) as db:
            db.execute("insert into log select id + 100, at_time from log")
        with caplog.at_level(logging.INFO):
            state, run_id = run(full_refresh, dbt=shop.core(select=["elsewhere"]), models=["log"], below=True)
        assert state.name == "Completed", state.message
        assert column(shop, "select id from log order by id") == [1, 2]
        assert column(shop, "select n from from_log") == [2]
        rebuilt, below = told(state)
        assert (names(rebuilt), names(below)) == ({"log"}, {"from_log"})
        assert "Rebuilding from nothing: log" in caplog.text
        assert "Rebuilt from nothing: model log in " in caplog.text
        assert "## dbt build log" in artifact(run_id, "dbt-report")

    def test_tests_across_are_run_when_what_is_below_is_built(self, tmp_path: Path) -> None:
        """A test that reads both would fail on the old rows below, which then would never be built anew.

        A model that has nothing below it but its tests has nothing more to build.
        """
        project = Project(tmp_path)
        project.model("log", "{{ config(materialized='incremental') }} select unnest([1, 2]) as id")
        project.model("from_log", "{{ config(materialized='table') }} select id from {{ ref('log') }}")
        project.model("leaf", "{{ config(materialized='incremental') }} select 1 as id")
        in_log = "{name: in_log, arguments: {to: ref('log'), field: id}}"
        project.write(
            "models/schema.yml",
            f"""
            models:
              - {{name: log, columns: [{{name: id, data_tests: [unique]}}]}}
              - {{name: leaf, columns: [{{name: id, data_tests: [unique]}}]}}
              - name: from_log
                columns: [{{name: id, data_tests: [not_null, {{relationships: {in_log}}}]}}]
            """,
        )
        assert run(build_project, dbt=project.core())[0].name == "Completed"
        with duckdb.connect(str(project.warehouse)) as db:
            db.execute("insert into log values (3); insert into from_log values (3)")

        state, _ = run(full_refresh, dbt=project.core(), models=["log"], below=True)
        assert state.name == "Completed", state.message
        rebuilt, below = told(state)
        assert names(rebuilt) == {"log", "unique_log_id"}
        assert names(below) == {"from_log", "not_null_from_log_id", "in_log"}
        assert column(project, "select id from from_log order by id") == [1, 2]

        state, _ = run(full_refresh, dbt=project.core(), models=["leaf"], below=True)
        assert state.name == "Completed", state.message
        assert [names(result) for result in told(state)] == [{"leaf", "unique_leaf_id"}]

    def test_a_model_that_is_not_incremental_is_refused(self, shop: Project) -> None:
        """Naming what is, and nothing is started."""
        before = column(shop, "select max(at_time) from log")
        state, _ = run(full_refresh, dbt=shop.core(), models=["log", "from_log"])
        assert state.name == "Failed"
        assert (state.message or "").startswith(
            "'from_log' is not incremental but a table, which every build"
        )
        assert (state.message or "").endswith("incremental models of the project: log.")
        assert column(shop, "select max(at_time) from log") == before


class TestFromModels:
    def test_it_builds_the_model_and_everything_below_it(self, shop: Project) -> None:
        """And nothing else of the project."""
        state, _ = run(build_project, dbt=shop.core(), from_models=["log"])
        assert state.name == "Completed", state.message
        assert names(told(state)) == {"log", "from_log"}

    def test_not_together_with_a_selection(self, shop: Project, dbt_starts: list[Any]) -> None:
        """Two answers to one question are refused, before dbt starts."""
        state, _ = run(build_project, dbt=shop.core(selector="smoke"), from_models=["log"])
        assert "leave `select` and `selector` of dbt empty" in (state.message or "")
        assert dbt_starts == []


@pytest.mark.parametrize("flow", [build_project, smoke_test, full_refresh, source_freshness])
def test_whoever_can_not_be_told_is_found_out_before_dbt_starts(
    flow: Flow[..., Any], shop: Project, dbt_starts: list[Any]
) -> None:
    """A notification block that is not there is an error of its own, of every job."""
    more = {"models": ["log"]} if flow is full_refresh else {}
    state, _ = run(flow, dbt=shop.core(), notify={"tool": "slack", "webhook": "nobody"}, **more)
    assert isinstance(told(state), BlockNotFound)
    assert "nobody" in (state.message or "")
    assert dbt_starts == []


@pytest.mark.no_server
class TestChoice:
    @pytest.fixture
    def lineage(self) -> Lineage:
        def node(kind: str, name: str, *fqn: str, **config: Any) -> dict[str, Any]:
            return {"name": name, "resource_type": kind, "fqn": ["shop", *fqn, name], "config": config}

        versioned = node("model", "dim", materialized="incremental")
        nodes = {
            "model.shop.fct_orders": node("model", "fct_orders", "marts", materialized="incremental"),
            "model.shop.fct_kept": node("model", "fct_kept", materialized="incremental", full_refresh=False),
            "model.shop.stg_orders": node("model", "stg_orders", materialized="view"),
            "model.shop.marts": node("model", "marts", materialized="table"),
            "model.shop.dim.v2": {**versioned, "fqn": ["shop", "dim", "v2"]},
            "model.shop.dim.v1": {**versioned, "fqn": ["shop", "dim", "v1"]},
            "seed.shop.colours": node("seed", "colours"),
            "test.shop.unique": node("test", "unique"),
        }
        orders = {
            "name": "orders",
            "resource_type": "source",
            "source_name": "raw",
            "fqn": ["shop", "raw", "orders"],
        }
        return Lineage.from_manifest({"nodes": nodes, "sources": {"source.shop.raw.orders": orders}})

    @pytest.mark.parametrize(
        ("named", "selected"),
        [
            ("fct_orders", "fct_orders+"),
            ("model.shop.fct_orders", "fct_orders+"),
            ("colours", "colours+"),
            ("raw.orders", "source:raw.orders+"),
            ("source:raw.orders", "source:raw.orders+"),
            ("dim.v2", "fqn:shop.dim.v2+"),
            ("marts", "fqn:shop.marts+"),  # the bare word would select the folder marts as well
        ],
    )
    def test_a_name_becomes_what_dbt_selects_it_by(self, lineage: Lineage, named: str, selected: str) -> None:
        """Whatever way people name it, and no more than it."""
        assert with_all_below(lineage, [named]) == [selected]

    @pytest.mark.parametrize(
        ("named", "sentence"),
        [
            ("fct_order", r"no 'fct_order' in the dbt project\. Do you mean fct_orders"),
            ("zzz", r"no 'zzz' in the dbt project\. There are: colours, dim\.v1, dim\.v2, fct_kept"),
            ("unique", "no 'unique'"),
            ("dim", r"'dim' can be dim\.v1 or dim\.v2: say which"),
        ],
    )
    def test_what_is_not_there_is_refused(self, lineage: Lineage, named: str, sentence: str) -> None:
        """Naming what is meant, or what there is."""
        with pytest.raises(DbtInputError, match=sentence):
            with_all_below(lineage, [named])

    def test_incremental_models_are_chosen_exactly(self, lineage: Lineage) -> None:
        """Also one version of several."""
        assert words(lineage, incremental_models(lineage, ["fct_orders", "dim.v1"])) == [
            "fct_orders",
            "fqn:shop.dim.v1",
        ]

    @pytest.mark.parametrize(
        ("named", "sentence"),
        [
            ("stg_orders", "not incremental but a view.*: dim.v1, dim.v2, fct_kept, fct_orders"),
            ("colours", r"no 'colours' .*There are: dim.v1, dim.v2, fct_kept, fct_orders\."),
            ("fct_kept", "has `full_refresh: false` in its config, with which dbt does not rebuild it"),
        ],
    )
    def test_what_can_not_be_rebuilt_is_refused(self, lineage: Lineage, named: str, sentence: str) -> None:
        """dbt would pass over a protected model in silence, and append to it."""
        with pytest.raises(DbtInputError, match=sentence):
            incremental_models(lineage, [named])


class TestFreshness:
    def test_a_source_past_its_error_threshold_fails_the_run(self, shop: Project, box: Sandbox) -> None:
        """Each with its age and limit, also a table that is missing, which sources.json leaves out."""
        save_blocks(box)
        forget_incidents()
        notify = {"tool": "slack", "webhook": "data-alerts", "owners": {"shopkeeper": "flight-ops"}}
        state, run_id = run(source_freshness, dbt=shop.core(), retries=1, notify=notify)
        assert (state.name, state.type.value) == ("Failed", "FAILED")
        error = told(state)
        assert isinstance(error, SourcesStale)
        found = {source.name: source for source in error.result.sources}
        assert {name: source.state.value for name, source in found.items()} == {
            "raw.young": "success",
            "raw.late": "warn",
            "raw.old": "fail",
            "raw.missing": "error",
        }
        assert found["raw.old"].age == pytest.approx(60 * 3600, abs=1800)
        assert (found["raw.old"].warn_after, found["raw.old"].error_after) == (86400, 172800)
        assert found["raw.old"].owner == "shopkeeper"
        message = state.message or ""
        missing = 'raw.missing: Catalog Error: Table with name missing does not exist! Did you mean "young"?'
        assert message.startswith(f"1 of 4 sources are fresh; {missing}; ")
        assert "raw.old: last row 2.5 d old, fails after 2 d" in message
        assert re.search(r"raw\.late: last row 30(\.\d)? h old, warns after 24 h$", message)

        runs = task_runs(run_id, until=9)
        assert [r.run_count for r in runs if r.name == "dbt source freshness"] == [2]
        states = {r.name: r.state.name for r in runs if r.state}
        assert states["source raw.young"] == "Completed"
        assert states["source raw.late"] == "Warned"
        assert states["source raw.old"] == states["source raw.missing"] == "Failed"
        report = artifact(run_id, "freshness-report")
        assert "| ✗ | raw.old | fail | 2.5 d | 24 h | 2 d | shopkeeper |" in report
        (message,) = [found for found in box.slack.messages if found.channel == "flight-ops"]
        assert "raw.old" in str(message)
        assert "last row 2.5 d old, fails after 2 d" in str(message)

    def test_past_the_warning_threshold_the_run_is_stale(self, shop: Project) -> None:
        """A Completed state with a name of its own."""
        state, _ = run(source_freshness, dbt=shop.core(select=["source:raw.late", "source:raw.young"]))
        assert (state.name, state.type.value) == ("Stale", "COMPLETED")
        result = told(state)
        assert isinstance(result, Freshness)
        assert [source.name for source in result.late] == ["raw.late"]

    def test_fresh_sources_complete_the_run(self, shop: Project) -> None:
        """And it says how many."""
        state, _ = run(source_freshness, dbt=shop.core(select=["source:raw.young"]))
        assert (state.name, state.message) == ("Completed", "1 of 1 sources are fresh")

    def test_sources_without_a_threshold_are_an_error(self, shop: Project) -> None:
        """A check of nothing must not pass for freshness; it is not tried again."""
        state, _ = run(source_freshness, dbt=shop.core(select=["source:raw.unwatched"]), retries=3)
        assert state.name == "Failed"
        assert "--select source:raw.unwatched" in (state.message or "")
        assert "has a freshness threshold" in (state.message or "")

    @pytest.mark.no_server
    @pytest.mark.parametrize(
        ("seconds", "words"), [(30, "30 s"), (90, "1.5 min"), (7200, "2 h"), (172800, "2 d"), (None, "")]
    )
    def test_ages_are_told_in_units_that_people_use(self, seconds: float | None, words: str) -> None:
        """Seconds for little, days for much."""
        assert span(seconds) == words


@pytest.mark.no_server
@pytest.mark.parametrize(
    ("name", "cron", "retries"),
    [
        ("daily", "0 6 * * *", (2, 60)),
        ("hourly", "30 * * * *", (2, 60)),
        ("on-demand", None, (2, 60)),
        ("every-six-hours", "15 */6 * * *", (1, 30)),
    ],
)
def test_the_jobs_are_deployed(name: str, cron: str | None, retries: tuple[int, int]) -> None:
    """With their schedules in a time zone of their own, and their retries written out."""
    spec = specs()[name]
    schedules = [(found["cron"], found["timezone"]) for found in spec.get("schedules", [])]
    assert schedules == ([(cron, "Etc/UTC")] if cron else [])
    assert (spec["parameters"]["retries"], spec["parameters"]["retry_delay"]) == retries
    assert Path(spec["parameters"]["dbt"]["project_dir"], "dbt_project.yml").is_file()
    assert spec["concurrency_limit"]["limit"] == 1


def test_state_of_the_worst_source_is_that_of_all() -> None:
    """What could not be looked at is worse than what is too old."""
    assert Freshness.of([], 0.0).state is DbtState.SUCCESS
