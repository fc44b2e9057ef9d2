"""Backfills: interval by interval, several at a time, taken up where a kill has ended them."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any
from uuid import UUID
from zoneinfo import ZoneInfo

import duckdb
import psutil  # type: ignore[import-untyped]
import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId

from flows import BackfillFailed, BackfillReport, backfill
from flows.backfill import _moment
from flows.backfilling import for_interval
from tasks.backfill_memory import BELOW, Models, artifact_key
from tasks.dbt.parts import Parts, parsed_alike
from tasks.dbt_core import DbtCore, DbtInputError, check_dbt
from tasks.intervals import DataInterval
from tasks.jobs import InputError
from tests.dbt_project import Project
from tests.flows_fixtures import Runs
from tests.jobs_fixtures import PREFECTS_SOCKETS, collected
from tests.postgres_fixtures import Postgres, postgres

__all__ = ["collected", "postgres"]

# A dozen dbt processes, which take their time where others run beside them.
pytestmark = [*PREFECTS_SOCKETS, pytest.mark.timeout(600)]

GATE = 4711  # of an advisory lock: while a test holds it, the intervals from June on wait
YEAR: dict[str, Any] = {"start": "2025-01-01", "end": "2026-01-01", "every": "month"}
TWO: dict[str, Any] = {"start": "2025-01-01", "end": "2025-03-01", "every": "month"}
FIRST_FIVE = ["2025-01", "2025-02", "2025-03", "2025-04", "2025-05"]

SIX_TO_NINE = ["2025-06", "2025-07", "2025-08", "2025-09"]


def history(folder: Path, **settings: Any) -> Project:
    """A year of days: a view over them, an incremental model, and a mart on that."""
    project = Project(folder, **settings)
    project.set(vars={"data_interval_start": None, "data_interval_end": None})
    project.model("days", "{{ config(materialized='view') }} select * from {{ target.schema }}.raw_days")
    project.model(
        "fct",
        """
        {{ config(materialized='incremental', incremental_strategy='delete+insert', unique_key='day') }}
        select day, amount, '{{ invocation_id }}' as built_by from {{ ref('days') }}
        {% if var('data_interval_start') is not none %}
        where day >= cast('{{ var('data_interval_start')[:10] }}' as date)
          and day < cast('{{ var('data_interval_end')[:10] }}' as date)
        {% endif %}
        """,
    )
    project.model(
        "mart",
        "{{ config(materialized='table') }} select count(*) as days, sum(amount) as amount,"
        " '{{ invocation_id }}' as built_by from {{ ref('fct') }}",
    )
    project.write(
        "models/schema.yml",
        "models: [{name: fct, columns: [{name: day, data_tests: [unique, not_null]}]}]",
    )
    return project


@pytest.fixture
def shop(tmp_path: Path) -> Project:
    """On DuckDB."""
    project = history(tmp_path)
    with duckdb.connect(str(project.warehouse)) as db:
        db.execute(
            "create table raw_days as select cast(d as date) as day, day(d) as amount"
            " from range(timestamp '2025-01-01', timestamp '2026-01-01', interval 1 day) as r(d)"
        )
    return project


def query(project: Project, statement: str) -> list[tuple[Any, ...]]:
    with duckdb.connect(str(project.warehouse), read_only=True) as db:
        return db.execute(statement).fetchall()


def states(report: BackfillReport) -> dict[str, str]:
    return {
        record.interval.label: "earlier" if record.earlier else record.state.value
        for record in report.intervals
    }


def until(what: Callable[[], Any], seconds: float = 300) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < deadline, "it did not come to that in time"
        time.sleep(0.1)
    return found


# -- on PostgreSQL ------------------------------------------------------------------------------------------


@pytest.fixture
def served(postgres: Postgres, tmp_path: Path) -> tuple[Project, DbtCore]:
    """On PostgreSQL, where the intervals from June on wait for the gate."""
    project = history(tmp_path)
    project.write(
        "profiles.yml",
        """
        shop:
          target: dev
          outputs:
            dev:
              type: postgres
              host: "{{ env_var('ELT_PG_HOST') }}"
              port: 5432
              user: postgres
              password: ""
              dbname: postgres
              schema: shop
              threads: 1
        """,
    )
    model = (project.folder / "models/fct.sql").read_text()
    waits = f"pg_advisory_xact_lock_shared({GATE})"
    late = "(var('data_interval_start') or '') >= '2025-06'"
    gate = f"(select {{% if {late} %}} {waits} {{% else %}} 1 {{% endif %}})"
    days = "from {{ ref('days') }}"
    project.model("fct", model.replace(days, f"{days} cross join {gate} as gate"))
    postgres.execute("drop schema if exists shop cascade")
    postgres.execute("create schema shop")
    postgres.execute(
        "create table shop.raw_days as select d::date as day, extract(day from d)::int as amount"
        " from generate_series(timestamp '2025-01-01', timestamp '2025-12-31', interval '1 day') as r(d)"
    )
    return project, project.core(env=postgres.env)


@contextmanager
def shut(postgres: Postgres) -> Iterator[None]:
    """The gate, shut."""
    connection = postgres.connect()
    try:
        with connection.cursor() as cursor:
            cursor.execute(f"select pg_advisory_lock({GATE})")
        yield
    finally:
        connection.close()


def rows_of(run_id: UUID) -> list[dict[str, Any]]:
    """The table of a run in the UI."""
    of_run = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[run_id]))
    with get_client(sync_client=True) as client:
        found = client.read_artifacts(artifact_filter=of_run, limit=200)
    tables = [artifact for artifact in found if (artifact.key or "").startswith("backfill-shop-")]
    return json.loads(str(tables[0].data)) if tables else []


def labels(rows: list[dict[str, Any]], state: str) -> list[str]:
    return [row["interval"] for row in rows if row["state"] == state]


def test_killed_after_five_it_goes_on_with_the_sixth(
    postgres: Postgres, served: tuple[Project, DbtCore]
) -> None:
    """Twelve months, four at a time, SIGKILL after five: those are kept, and all is as in one build."""
    project, dbt = served
    runs = Runs()
    parameters = {"dbt": json.loads(dbt.model_dump_json()), **YEAR, "at_once": 4}
    run_id = runs.create(backfill, parameters)
    script = [sys.executable, str(Path(__file__).with_name("backfill_crash.py")), str(run_id)]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    with shut(postgres), subprocess.Popen(script, env=env, stdout=subprocess.DEVNULL) as process:  # noqa: S603

        def five_are_done_and_four_wait() -> bool:
            assert process.poll() is None, "it ended by itself"
            waiting = postgres.execute(
                "select count(*) from pg_locks where locktype = 'advisory' and not granted"
            )
            return waiting == [(4,)] and labels(rows_of(run_id), "done") == FIRST_FIVE

        try:
            until(five_are_done_and_four_wait)
            assert labels(rows_of(run_id), "running") == SIX_TO_NINE
        finally:
            family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
            for each in family:
                with suppress(psutil.Error):  # it has ended meanwhile
                    each.kill()
            psutil.wait_procs(family, 10)
    assert {"0", "1", "2", "3"} <= {path.name for path in (project.folder / "target/backfill").iterdir()}
    done = "select day, built_by from shop.fct where day < '2025-06-01' order by day"
    before = postgres.execute(done)
    assert len(before) == 151

    again = runs.create(backfill, parameters)
    state = runs.run(backfill, again)

    assert state.is_completed(), state.message
    report: BackfillReport = asyncio.run(state.aresult())
    months = [record.interval.label for record in report.intervals]
    assert len(months) == 12
    assert states(report) == {m: "earlier" if m in FIRST_FIVE else "done" for m in months}
    assert labels(rows_of(again), "done") == [*months, BELOW]
    assert postgres.execute(done) == before
    assert postgres.execute("select days, amount from shop.mart") == [(365, 5738)]
    backfilled = postgres.execute("select day, amount from shop.fct order by day")
    assert backfilled == postgres.execute("select day, amount from shop.raw_days order by day")


# -- on DuckDB ----------------------------------------------------------------------------------------------


def test_on_duckdb(shop: Project, caplog: pytest.LogCaptureFixture) -> None:
    """One at a time, which is said; what is done, however it was cut, is done again only if asked for."""
    mart = (shop.folder / "models/mart.sql").read_text()
    shop.model("mart", mart.replace("sum(amount)", "sum(no_such_column)"))
    state = backfill(dbt=shop.core(), **TWO, at_once=4, return_state=True)
    assert state.name == "PartiallyDone"
    assert str(state.message) == "2 intervals: 2 done; what is built on the intervals failed"
    with pytest.raises(BackfillFailed) as caught:
        asyncio.run(state.aresult())
    report = caught.value.report
    assert "One interval at a time, not 4: duckdb lets one process write at a time" in caplog.text
    assert states(report) == {"2025-01": "done", "2025-02": "done"}
    every = "select day, amount from fct order by day"
    by_month = "select distinct month(day), built_by from fct order by 1"
    rows, built = query(shop, every), query(shop, by_month)
    assert len({by for _, by in built}) == len(built) == 2

    shop.model("mart", mart)
    weeks = backfill(dbt=shop.core(), start="2025-01-06", end="2025-02-03", every="week", count=2)
    assert set(states(weeks).values()) == {"earlier"}
    assert query(shop, by_month) == built
    assert query(shop, "select days from mart") == [(59,)]

    again = backfill(dbt=shop.core(), start="2025-02-01", end="2025-03-01", again=True)
    assert states(again) == {"2025-02": "done"}
    assert query(shop, every) == rows
    january, february = query(shop, by_month)
    assert january == built[0]
    assert february != built[1]


def test_what_another_environment_has_done_is_not_done_here(
    shop: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same parameters with another schema in the worker's environment, as `make deploy` has it there."""
    profiles = shop.folder / "profiles.yml"
    schema = (
        "path: \"{{ env_var('SHOP_WAREHOUSE') }}\"\n      schema: \"{{ env_var('ELT_SCHEMA', 'main') }}\""
    )
    profiles.write_text(re.sub(r"path: .*", schema, profiles.read_text()))
    with duckdb.connect(str(shop.warehouse)) as db:
        db.execute("create schema branch; create table branch.raw_days as from main.raw_days")
    one = {"start": "2025-01-01", "end": "2025-02-01"}
    monkeypatch.setenv("ELT_SCHEMA", "branch")
    assert states(backfill(dbt=shop.core(), **one)) == {"2025-01": "done"}
    monkeypatch.delenv("ELT_SCHEMA")
    assert states(backfill(dbt=shop.core(target="dev"), **one)) == {"2025-01": "done"}
    assert query(shop, "select count(*) from main.fct") == query(shop, "select count(*) from branch.fct")
    # The same place, by another way to it.
    elsewhere = shop.write("elsewhere/profiles.yml", profiles.read_text()).parent
    assert states(backfill(dbt=shop.core(profiles_dir=elsewhere), **one)) == {"2025-01": "earlier"}


async def test_what_a_backfill_is_known_by(shop: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked for and where it goes, not by what way dbt gets there."""
    plan = await check_dbt(shop.core())
    nodes = [plan.lineage.nodes["model.shop.fct"]]
    key = artifact_key(shop.core(), plan, nodes)
    assert key.startswith("backfill-shop-")
    shop.warehouse.rename(shop.folder / "moved.duckdb")
    (shop.folder / "link").symlink_to(shop.folder)
    moved = await check_dbt(shop.core(env={"SHOP_WAREHOUSE": "moved.duckdb"}))
    linked = await check_dbt(shop.core(env={"SHOP_WAREHOUSE": str(shop.folder / "link/moved.duckdb")}))
    assert linked.place == moved.place != plan.place
    assert artifact_key(shop.core(profiles_dir="somewhere", project_dir="else"), plan, nodes) == key
    monkeypatch.setenv("ELT_PREFIX", "dev.")
    others = [
        artifact_key(shop.core(), plan, nodes),
        artifact_key(shop.core(vars={"a": 1}), plan, nodes),
        artifact_key(shop.core(), moved, nodes),
        artifact_key(shop.core(), plan, [replace(nodes[0], schema="marts")]),
    ]
    assert len({key, *others}) == 5


def test_a_new_model_is_not_done(shop: Project, caplog: pytest.LogCaptureFixture) -> None:
    """An interval is done for the models that it was built of; and what is built on them likewise."""
    one = {"start": "2025-01-01", "end": "2025-02-01"}
    two = {"start": "2025-01-01", "end": "2025-03-01"}
    assert states(backfill(dbt=shop.core(), **one)) == {"2025-01": "done"}
    shop.model("second", (shop.folder / "models/fct.sql").read_text())
    assert states(backfill(dbt=shop.core(), **two)) == {"2025-01": "done", "2025-02": "done"}
    assert "1 of the intervals have been done, but without second: they are built again" in caplog.text
    by_month = "select month(day), count(*) from second group by 1 order by 1"
    assert query(shop, by_month) == [(1, 31), (2, 28)]

    shop.model("counted", "{{ config(materialized='table') }} select count(*) as n from {{ ref('second') }}")
    assert set(states(backfill(dbt=shop.core(), **two)).values()) == {"earlier"}
    assert query(shop, "select n from counted") == [(59,)]


def test_a_table_that_does_not_tell_of_what_it_was_built_counts_for_nothing() -> None:
    """Rather built once too often than never."""
    assert Models.parse("Backfill of dbt build in shop\n\n1 interval: 1 done") == Models(
        frozenset(), frozenset()
    )
    models = Models(frozenset({"a", "b"}), frozenset({"c"}))
    assert Models.parse(f"Backfill\n\n{models.comment}\n") == models


def test_one_that_fails_stops_no_other(shop: Project) -> None:
    """The others are built, what is below waits, the state says so, and a retry builds what is left."""
    model = (shop.folder / "models/fct.sql").read_text()
    bad = "case when day = '2025-01-14' then error('no flowers') end as ok"
    shop.model("fct", model.replace("as built_by", f"as built_by, {bad}"))
    runs = Runs()
    run_id = runs.create(backfill, {"dbt": json.loads(shop.core().model_dump_json()), **TWO})
    state = runs.run(backfill, run_id)
    assert state.name == "PartiallyDone"
    assert state.message is not None
    assert state.message.startswith("2 intervals: 1 done, 1 failed; failed: 2025-01 (1 of 1 node failed")
    assert "no flowers" in state.message
    with pytest.raises(BackfillFailed) as caught:
        asyncio.run(state.aresult())
    assert states(caught.value.report) == {"2025-01": "failed", "2025-02": "done"}
    assert not query(shop, "select 1 from information_schema.tables where table_name = 'mart'")
    february = query(shop, "select distinct built_by from fct")

    shop.model("fct", model.replace("as built_by", "as built_by, null as ok"))
    state = runs.run(backfill, run_id)
    assert state.is_completed(), state.message
    assert states(asyncio.run(state.aresult())) == {"2025-01": "done", "2025-02": "earlier"}
    assert query(shop, "select distinct built_by from fct where month(day) = 2") == february
    assert query(shop, "select days from mart") == [(59,)]


def test_one_that_fails_stops_the_others_if_that_is_asked_for(shop: Project) -> None:
    """None is begun any more, and those count as left."""
    model = (shop.folder / "models/fct.sql").read_text()
    shop.model("fct", model.replace("as built_by", "as built_by, error('never') as ok"))
    state = backfill(dbt=shop.core(), **TWO, stop_on_failure=True, return_state=True)
    assert state.name == "Failed"
    assert str(state.message).startswith("2 intervals: 1 failed, 1 left; failed: 2025-01")


def test_one_that_is_stopped_stops_dbt(shop: Project) -> None:
    """As a cancellation does it: by SIGTERM. No dbt process is left, and the interval is not done."""
    endless = "select count(*) as n from range(1000000000) as a(x), range(1000000) as b(y) where x + y = -1"
    shop.model("fct", f"{{{{ config(materialized='incremental') }}}} {endless}")
    shop.write("models/schema.yml", "")
    run_id = Runs().create(backfill, {"dbt": json.loads(shop.core(select=["fct"]).model_dump_json()), **TWO})
    script = [sys.executable, str(Path(__file__).with_name("backfill_crash.py")), str(run_id)]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    with subprocess.Popen(script, env=env, stdout=subprocess.DEVNULL) as process:  # noqa: S603
        try:

            def dbt() -> list[psutil.Process]:
                assert process.poll() is None, "it ended by itself"
                found = []
                for each in psutil.Process(process.pid).children(recursive=True):
                    with suppress(psutil.Error):  # it has ended meanwhile
                        if any("child.py" in word for word in each.cmdline()):
                            found.append(each)
                return found

            running = until(lambda: labels(rows_of(run_id), "running") == ["2025-01"] and dbt())
            process.terminate()
            assert process.wait(120) is not None
        finally:
            process.kill()
    _, alive = psutil.wait_procs(running, 60)
    assert alive == []
    assert labels(rows_of(run_id), "done") == []


@pytest.mark.parametrize("reads", [True, False])
async def test_what_is_parsed_once(shop: Project, reads: bool) -> None:
    """A config that reads the interval makes what is parsed for one of no use for another; SQL does not."""
    if reads:
        model = (shop.folder / "models/fct.sql").read_text()
        predicate = "\"day >= '\" ~ (var('data_interval_start') or '') ~ \"'\""
        key = "unique_key='day'"
        shop.model("fct", model.replace(key, f"{key}, incremental_predicates=[{predicate}]"))
    for month in ("01", "02"):
        interval = DataInterval(start=f"2025-{month}-01", end="2025-03-01")
        await check_dbt(for_interval(shop.core(), interval, Path("target", month)))
    target = shop.folder / "target"
    assert parsed_alike(target / "01", target / "02") is not reads


@pytest.mark.no_server
@pytest.mark.parametrize(
    ("said", "moment"),
    [
        ("2026-01-01", "2026-01-01T00:00:00+01:00"),
        (date(2026, 1, 1), "2026-01-01T00:00:00+01:00"),
        ("2026-01-01T06:00:00", "2026-01-01T06:00:00+01:00"),
        ("2026-01-01T00:00:00", "2026-01-01T00:00:00+01:00"),
        ("2026-01-01T00:00:00-05:00", "2026-01-01T06:00:00+01:00"),
        ("2026-01-01T00:00:00Z", "2026-01-01T01:00:00+01:00"),
    ],
)
def test_the_offset_of_a_midnight(tmp_path: Path, said: str | date, moment: str) -> None:
    """Without an offset it is in the time zone of the range; an offset counts, at midnight too."""
    given = backfill.validate_parameters(
        {"start": said, "end": said, "dbt": {"project_dir": str(tmp_path)}, "timezone": "Europe/Berlin"}
    )
    for end in ("start", "end"):
        assert _moment(given[end], ZoneInfo("Europe/Berlin")).isoformat() == moment


@pytest.mark.parametrize(
    ("dbt", "more", "sentence"),
    [
        ({}, {"start": "2025-02-01", "end": "2025-02-01"}, "The range is empty"),
        ({}, {"timezone": "Berlin"}, "There is no time zone 'Berlin'"),
        ({}, {"cron": "monthly"}, "'monthly' is no cron expression"),
        ({"select": ["mart"]}, {}, "no incremental model is in it. The project has: fct"),
        ({"full_refresh": True}, {}, "would leave only the last of them"),
        ({"command": "run"}, {}, "A backfill builds, and does not run"),
        ({"engine": "prefect-dbt"}, {}, "Only with engine='subprocess'"),
        (
            {"data_interval": {"start": "2025-01-01", "end": "2025-02-01"}},
            {},
            "leave data_interval of dbt empty",
        ),
    ],
)
def test_what_can_not_be_done_is_refused(
    shop: Project, dbt: dict[str, Any], more: dict[str, Any], sentence: str
) -> None:
    """With what is wrong about it, before anything is built."""
    with pytest.raises((InputError, DbtInputError), match=re.escape(sentence)):
        backfill(dbt=shop.core(**dbt), **{**TWO, **more})
    assert not query(shop, "select 1 from information_schema.tables where table_name = 'fct'")


async def test_what_is_built_once_and_what_for_each(shop: Project) -> None:
    """Above, each, between, below; with a table between incremental models it is one at a time."""
    shop.model("view_between", "{{ config(materialized='view') }} select * from {{ ref('fct') }}")
    shop.model("second", "{{ config(materialized='incremental') }} select day from {{ ref('view_between') }}")
    parts = Parts.of(await check_dbt(shop.core()))
    names = {name: {parts.lineage.name_of(id_) for id_ in getattr(parts, name)} for name in ("above", "each")}
    assert names == {"above": {"days"}, "each": {"fct", "second"}}
    assert {parts.lineage.name_of(id_) for id_ in parts.between} == {"view_between"}
    assert {parts.lineage.name_of(id_) for id_ in parts.below} == {
        "mart",
        "unique_fct_day",
        "not_null_fct_day",
    }
    assert parts.at_once(4, "postgres") == (4, None)
    shop.model("view_between", "{{ config(materialized='table') }} select * from {{ ref('fct') }}")
    most, why = Parts.of(await check_dbt(shop.core())).at_once(4, "postgres")
    assert (most, why) == (1, "view_between, between incremental models, can't be built by two at a time")
