"""The stage's dbt project past DuckDB: the same models, tests and figures on PostgreSQL."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from prefect import flow

from flows import backfill
from tasks.dbt_core import DbtCore, DbtResult, DbtState, check_dbt, dbt_build
from tasks.intervals import DataInterval
from tests.jobs_fixtures import PREFECTS_SOCKETS, collected
from tests.postgres_fixtures import Postgres, postgres
from tests.sandbox_fixtures import sources

__all__ = ["collected", "postgres", "sources"]

pytestmark = [*PREFECTS_SOCKETS, pytest.mark.timeout(600)]

SANDBOX_DBT = Path(__file__).parent.parent / "sandbox" / "dbt"


@flow
async def build(dbt: DbtCore) -> DbtResult:
    return await dbt_build(dbt)


@pytest.fixture(scope="module")
def loaded(postgres: Postgres, sources: Path) -> Postgres:
    postgres.load(sources)
    return postgres


def test_the_project_builds(loaded: Postgres, tmp_path: Path) -> None:
    """Every model, seed, snapshot and test of the stage passes on PostgreSQL, and an increment too."""
    dbt = DbtCore(project_dir=SANDBOX_DBT, target="postgres", env=loaded.env)
    result: Any = asyncio.run(build(dbt))  # type: ignore[arg-type]  # Prefect's types of an async flow
    assert not result.failed
    assert len(result.nodes) > 90
    counted = [node for node in result.nodes if node.rows is not None]
    assert {node.resource_type for node in counted} == {"model", "seed", "snapshot"}
    assert not any(node.name.startswith(("stg_", "int_")) for node in counted)  # views
    flights = next(node for node in result.nodes if node.name == "fct_flights")
    assert (flights.state, flights.rows) == (DbtState.SUCCESS, 336_776)
    assert loaded.execute("SELECT count(*), count(DISTINCT flight_id) FROM marts.fct_flights") == [
        (336_776, 336_776)
    ]
    assert loaded.execute("SELECT count(*) FROM marts.mart_carrier_scorecard") == [(16,)]

    again = dbt.model_copy(update={"select": ["fct_flights"]})
    result = asyncio.run(build(again))  # type: ignore[arg-type]
    assert not result.failed
    assert loaded.execute("SELECT count(*) FROM marts.fct_flights") == [(336_776,)]


def fingerprint(postgres: Postgres) -> tuple[Any, ...]:
    """Every value of the increments' table."""
    (found,) = postgres.execute(
        "SELECT count(*), md5(string_agg(f::text, ',' ORDER BY flight_id)) FROM marts.fct_flights AS f"
    )
    return found


def test_an_interval_twice_and_a_backfill_give_the_table_of_a_whole_build(loaded: Postgres) -> None:
    """Whatever state the table is in, and if it is not there at all."""
    whole = fingerprint(loaded)
    assert whole[0] == 336_776
    dbt = DbtCore(project_dir=SANDBOX_DBT, target="postgres", env=loaded.env, select=["fct_flights"])
    february = "flight_date BETWEEN '2013-02-01' AND '2013-02-28'"
    loaded.execute(f"UPDATE marts.fct_flights SET outcome = 'stale' WHERE {february}")  # noqa: S608
    loaded.execute("DELETE FROM marts.fct_flights WHERE flight_date = '2013-02-14'")
    assert fingerprint(loaded) != whole
    # From six to six, as of a daily schedule in New York.
    ends = {"start": "2013-02-01T06:00:00-05:00", "end": "2013-03-01T06:00:00-05:00"}
    for _ in range(2):
        increment = dbt.model_copy(update={"data_interval": DataInterval.model_validate(ends)})
        result: Any = asyncio.run(build(increment))  # type: ignore[arg-type]
        assert not result.failed
        assert fingerprint(loaded) == whole

    loaded.execute("DROP TABLE marts.fct_flights CASCADE")
    # Cut at six in the morning, so that two that are built at the same time have a day in common.
    report = backfill(dbt=dbt, start="2013-01-01", end="2014-01-01", cron="0 6 1 5,9 *", at_once=4)
    assert [record.state for record in report.intervals] == ["done"] * 3
    assert fingerprint(loaded) == whole


async def test_the_check_names_the_warehouse(loaded: Postgres) -> None:
    """The check before a run connects to PostgreSQL and says so."""
    plan = await check_dbt(DbtCore(project_dir=SANDBOX_DBT, target="postgres", env=loaded.env))
    assert (plan.adapter, plan.target) == ("postgres", "postgres")
