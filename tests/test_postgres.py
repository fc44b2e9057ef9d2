"""The stage's dbt project past DuckDB: the same models, tests and figures on PostgreSQL."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from prefect import flow

from tasks.dbt_core import DbtCore, DbtResult, DbtState, check_dbt, dbt_build
from tests.jobs_fixtures import PREFECTS_SOCKETS, collected
from tests.postgres_fixtures import Postgres, postgres
from tests.sandbox_fixtures import sources

__all__ = ["collected", "postgres", "sources"]

pytestmark = PREFECTS_SOCKETS

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


async def test_the_check_names_the_warehouse(loaded: Postgres) -> None:
    """The check before a run connects to PostgreSQL and says so."""
    plan = await check_dbt(DbtCore(project_dir=SANDBOX_DBT, target="postgres", env=loaded.env))
    assert (plan.adapter, plan.target) == ("postgres", "postgres")
