"""The data interval of a run: of a schedule over clock changes, cut from a range, given to dbt and steps."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import duckdb
import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import ArtifactCreate, DeploymentScheduleCreate
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterDeploymentId
from prefect.client.schemas.objects import FlowRun, FlowRunPolicy
from prefect.client.schemas.schedules import CronSchedule as ClientCron
from prefect.flow_engine import run_flow
from prefect.server.schemas.schedules import CronSchedule, IntervalSchedule, RRuleSchedule
from prefect.states import Pending
from pydantic import ValidationError

from flows import build_project, full_refresh
from tasks.dbt.model import DbtCore
from tasks.dbt_cloud_steps import add_vars
from tasks.dbt_core import DbtError, DbtInputError, DbtResult
from tasks.intervals import DataInterval, Unit, covered, fill_in, previous_date, split, zone_of
from tasks.jobs import InputError
from tasks.schedules import _text
from tests.dbt_project import Project
from tests.flows_fixtures import Runs
from tests.jobs_fixtures import PREFECTS_SOCKETS, collected

__all__ = ["collected"]

pytestmark = [*PREFECTS_SOCKETS, pytest.mark.usefixtures("warm_dbt")]

NEW_YORK = ZoneInfo("America/New_York")
MARCH = DataInterval(start="2026-03-01", end="2026-04-01")


# -- of a schedule


@pytest.mark.no_server
@pytest.mark.parametrize(
    ("cron", "date", "before"),
    [
        ("0 6 * * *", "2026-01-15T06:00-05:00", "2026-01-14T06:00-05:00"),
        ("0 6 * * *", "2026-03-08T06:00-04:00", "2026-03-07T06:00-05:00"),  # 23 hours
        ("0 6 * * *", "2026-11-01T06:00-05:00", "2026-10-31T06:00-04:00"),  # 25 hours
        (
            "30 2 * * *",
            "2026-03-09T02:30-04:00",
            "2026-03-08T01:30-05:00",
        ),  # as Prefect runs it, there being no 02:30
        ("* 9-17 * * 1-5", "2026-11-16T09:00-05:00", "2026-11-13T17:59-05:00"),  # over a weekend
        ("0 0 29 2 *", "2028-02-29T00:00-05:00", "2024-02-29T00:00-05:00"),
    ],
)
async def test_the_date_before(cron: str, date: str, before: str) -> None:
    """The date of the schedule before another, by the clock of its time zone."""
    schedule = CronSchedule(cron=cron, timezone="America/New_York")
    assert await previous_date(schedule, datetime.fromisoformat(date)) == datetime.fromisoformat(before)


@pytest.mark.no_server
async def test_the_date_before_of_other_schedules() -> None:
    """Schedules by interval and by rule as well; the first date of a rule has none before it."""
    every = IntervalSchedule(interval=timedelta(hours=6), anchor_date=datetime(2026, 1, 1, 3, tzinfo=UTC))
    date = datetime(2026, 11, 16, 9, tzinfo=UTC)
    assert await previous_date(every, date) == date - timedelta(hours=6)
    rule = RRuleSchedule(rrule="DTSTART:20260101T000000\nRRULE:FREQ=DAILY;COUNT=5")
    assert await previous_date(rule, datetime(2026, 1, 2, tzinfo=UTC)) == datetime(2026, 1, 1, tzinfo=UTC)
    assert await previous_date(rule, datetime(2026, 1, 1, tzinfo=UTC)) is None


# -- cut from a range


def new_york(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=NEW_YORK)


@pytest.mark.no_server
@pytest.mark.parametrize(
    ("start", "end", "unit", "count", "labels"),
    [
        ("2026-01-01", "2026-04-01", "month", 1, ["2026-01", "2026-02", "2026-03"]),
        ("2026-01-31", "2026-03-15", "month", 1, ["2026-01-31 to 2026-02-28", "2026-02-28 to 2026-03-15"]),
        ("2025-01-01", "2027-01-01", "year", 1, ["2025", "2026"]),
        ("2026-03-07", "2026-03-10", "day", 1, ["2026-03-07", "2026-03-08", "2026-03-09"]),
        ("2026-01-01", "2026-01-20", "week", 2, ["2026-01-01 to 2026-01-15", "2026-01-15 to 2026-01-20"]),
        (
            "2026-03-08",
            "2026-03-09",
            "hour",
            12,
            ["2026-03-08 00:00 to 2026-03-08 13:00", "2026-03-08 13:00 to 2026-03-09 00:00"],
        ),
    ],
)
async def test_a_range_is_cut(start: str, end: str, unit: Unit, count: int, labels: list[str]) -> None:
    """By the calendar of the time zone; hours are of 60 minutes; the last interval may be shorter."""
    cut = await split(new_york(start), new_york(end), unit=unit, count=count)
    assert [interval.label for interval in cut] == labels
    assert covered(DataInterval(start=new_york(start), end=new_york(end)), cut)


@pytest.mark.no_server
async def test_the_hour_that_comes_twice() -> None:
    """The day on which clocks go back has 25 hours, of which two are called one o'clock."""
    cut = await split(new_york("2026-11-01"), new_york("2026-11-02"), unit="hour")
    assert len(cut) == 25
    assert [interval.vars["data_interval_start"] for interval in cut[1:3]] == [
        "2026-11-01T01:00:00-04:00",
        "2026-11-01T01:00:00-05:00",
    ]


@pytest.mark.no_server
async def test_a_range_is_cut_by_cron() -> None:
    """At the dates of the expression, what lies before the first and after the last of them included."""
    cut = await split(new_york("2026-03-07"), new_york("2026-03-09"), cron="0 6 * * *")
    assert [interval.start.isoformat() for interval in cut] == [
        "2026-03-07T00:00:00-05:00",
        "2026-03-07T06:00:00-05:00",
        "2026-03-08T06:00:00-04:00",
    ]


@pytest.mark.no_server
async def test_a_range_that_can_not_be_cut() -> None:
    """It says what is wrong with it."""
    day = new_york("2026-01-01")
    with pytest.raises(InputError, match=r"The range is empty: .* is not before"):
        await split(day, day)
    with pytest.raises(InputError, match="more than 10,000 intervals: take longer ones"):
        await split(day, day + timedelta(days=700), unit="hour")
    with pytest.raises(InputError, match="'every day' is no cron expression"):
        await split(day, day + timedelta(days=7), cron="every day")
    with pytest.raises(InputError, match="There is no time zone 'Berlin'"):
        zone_of("Berlin")
    with pytest.raises(ValidationError, match="ends after it starts"):
        DataInterval(start="2026-01-02", end="2026-01-01")


@pytest.mark.no_server
async def test_what_is_done_covers() -> None:
    """Intervals that are done cover one whatever they were cut by; a gap is left to do."""
    days = await split(MARCH.start, MARCH.end)
    assert covered(MARCH, reversed(days))
    assert covered(days[7], [MARCH])
    assert not covered(MARCH, [day for day in days if day is not days[7]])
    assert not covered(MARCH, [])


# -- given on


@pytest.mark.no_server
def test_dbt_core_gets_it_as_variables_and_event_times(tmp_path: Path) -> None:
    """Beside its other variables; the event times in UTC, for the commands that have them."""
    berlin = DataInterval(start="2026-03-01T00:00:00+01:00", end="2026-04-01T00:00:00+02:00")
    dbt = DbtCore(project_dir=tmp_path, vars={"a": 1}, data_interval=berlin)
    built, listed = dbt.arguments(command="build"), dbt.arguments(command="ls")
    ends = (
        '"data_interval_end": "2026-04-01T00:00:00+02:00", "data_interval_start": "2026-03-01T00:00:00+01:00"'
    )
    assert built[built.index("--vars") + 1] == f'{{"a": 1, {ends}}}'
    assert built[built.index("--event-time-start") + 1] == "2026-02-28T23:00:00"
    assert built[built.index("--event-time-end") + 1] == "2026-03-31T22:00:00"
    assert "--vars" in listed
    assert "--event-time-start" not in listed
    with pytest.raises(ValidationError, match="leave out data_interval_end"):
        DbtCore(project_dir=tmp_path, vars={"data_interval_end": "x"}, data_interval=berlin)


@pytest.mark.no_server
def test_dbt_cloud_gets_it_in_its_steps() -> None:
    """Each command that runs nodes gets the variables beside its own; one that can't take them is refused."""
    steps = ["dbt seed", """dbt build -s a --vars '{b: 2}' --threads 3""", "dbt docs generate"]
    ends = (
        '"data_interval_end": "2026-04-01T00:00:00+00:00", "data_interval_start": "2026-03-01T00:00:00+00:00"'
    )
    times = "--event-time-start 2026-03-01T00:00:00 --event-time-end 2026-04-01T00:00:00"
    assert add_vars(steps, {}, MARCH) == [
        f"dbt seed --vars '{{{ends}}}'",
        f"""dbt build -s a --threads 3 --vars '{{"b": 2, {ends}}}' {times}""",
        "dbt docs generate",
    ]
    assert add_vars(steps, {}, None) == steps
    with pytest.raises(DbtError, match=r"`dbt retry` can't be given variables .data_interval_start"):
        add_vars(["dbt retry"], {}, MARCH)
    with pytest.raises(DbtError, match="can't be read, so nothing can be added"):
        add_vars(["dbt run --vars nonsense"], {}, MARCH)
    for flag in ("--full-refresh", "-f"):
        with pytest.raises(DbtError, match="would leave incremental models with nothing but that interval"):
            add_vars(["dbt seed --full-refresh", f"dbt build {flag}"], {}, MARCH)
        assert add_vars([f"dbt build {flag}"], {"a": 1}, None) == [
            f"""dbt build {flag} --vars '{{"a": 1}}'"""
        ]


@pytest.mark.no_server
def test_sql_gets_it() -> None:
    """Where the placeholders are; a run without an interval is refused there."""
    statements = ["delete from a where day >= '{{ data_interval_start }}'", "select '{{ other }}'"]
    assert fill_in(statements, MARCH) == [
        "delete from a where day >= '2026-03-01T00:00:00+00:00'",
        "select '{{ other }}'",
    ]
    with pytest.raises(InputError, match="this run has no data interval"):
        fill_in(statements, None)


# -- a run


@pytest.fixture
def shop(tmp_path: Path) -> Project:
    """A model that keeps the interval of each build."""
    project = Project(tmp_path)
    project.model(
        "asked",
        "{{ config(materialized='incremental') }} select"
        " '{{ var('data_interval_start', 'none') }}' as a, '{{ var('data_interval_end', 'none') }}' as b",
    )
    return project


def asked(project: Project) -> list[tuple[Any, ...]]:
    with duckdb.connect(str(project.warehouse), read_only=True) as db:
        return db.execute("select a, b from asked").fetchall()


@pytest.fixture
def scheduled(shop: Project, prefect_server: str) -> Iterator[FlowRun]:
    """A run that the server's own scheduler has made, of a deployment with two schedules."""
    parameters = {"dbt": shop.core().model_dump(mode="json"), "data_interval": "schedule", "retries": 0}
    daily = ClientCron(cron="0 6 * * *", timezone="America/New_York")
    paused = DeploymentScheduleCreate(schedule=ClientCron(cron="0 0 1 * *"), active=False)
    with get_client(sync_client=True) as client:
        deployment = client.create_deployment(
            client.create_flow(build_project),
            "interval",
            schedules=[paused, DeploymentScheduleCreate(schedule=daily, slug="daily")],
            parameters=parameters,
        )
        of_deployment = FlowRunFilter(deployment_id=FlowRunFilterDeploymentId(any_=[deployment]))
        deadline = time.monotonic() + 90
        while not (found := client.read_flow_runs(flow_run_filter=of_deployment)):
            assert time.monotonic() < deadline, "the scheduler has made no run"
            time.sleep(0.2)
        # Its time has not come; that of one that is late or was enqueued has long gone.
        client.set_flow_run_state(found[0].id, Pending(), force=True)
        yield found[0]
        client.delete_deployment(deployment)


def test_a_scheduled_run_and_its_retry(shop: Project, scheduled: FlowRun) -> None:
    """The interval ends at the scheduled time, whenever the run starts, and a retry has the same."""
    runs = Runs()
    assert scheduled.expected_start_time is not None
    end = scheduled.expected_start_time.astimezone(NEW_YORK)
    start = (end.replace(tzinfo=None) - timedelta(days=1)).replace(tzinfo=NEW_YORK)
    model = (shop.folder / "models/asked.sql").read_text()
    shop.model("asked", f"{model}, no_such_column")
    assert runs.run(build_project, scheduled.id).is_failed()
    # By the time of the retry the schedules are gone.
    with get_client(sync_client=True) as client:
        for schedule in client._client.get(f"/deployments/{scheduled.deployment_id}/schedules").json():
            client._client.delete(f"/deployments/{scheduled.deployment_id}/schedules/{schedule['id']}")
    shop.model("asked", model)
    again = runs.run(build_project, scheduled.id)
    assert again.is_completed(), again.message
    assert asked(shop) == [(start.isoformat(), end.isoformat())]


def test_a_run_that_goes_on_after_its_approval(shop: Project, scheduled: FlowRun) -> None:
    """It keeps its interval like a retry, although Prefect does not count it as another attempt."""
    policy = FlowRunPolicy(pause_keys={"approval"})
    kept = ArtifactCreate(key="data-interval", type="markdown", data=_text(MARCH), flow_run_id=scheduled.id)
    with get_client(sync_client=True) as client:
        client.update_flow_run(scheduled.id, empirical_policy=policy)
        client._client.post("/artifacts/", json=kept.model_dump(mode="json", exclude_unset=True))
    assert Runs().run(build_project, scheduled.id).is_completed()
    assert asked(shop) == [tuple(MARCH.vars.values())]


def test_a_run_by_hand(shop: Project) -> None:
    """It has none by the schedule, the one that it is given, or that of the build that it takes up."""
    result: DbtResult = build_project(dbt=shop.core(), data_interval="schedule")
    assert result.counts == {"success": 1}
    build_project(dbt=shop.core(), data_interval=MARCH)
    ends = ("2026-03-01T00:00:00+00:00", "2026-04-01T00:00:00+00:00")
    assert asked(shop) == [("none", "none"), ends]


def test_no_full_refresh_with_an_interval(shop: Project, scheduled: FlowRun) -> None:
    """Of a run that gets its interval by hand or from its schedule, too: the rest of the model stays."""
    build_project(dbt=shop.core(), retries=0)
    sentence = "would leave incremental models with nothing but that interval"
    with pytest.raises(ValidationError, match=sentence):
        shop.core(full_refresh=True, data_interval=MARCH)
    with pytest.raises(InputError, match=sentence):
        build_project(dbt=shop.core(full_refresh=True), data_interval=MARCH)
    dbt = shop.core(full_refresh=True).model_dump(mode="json")
    parameters = {**scheduled.parameters, "dbt": dbt}
    with pytest.raises(InputError, match=sentence):
        run_flow(build_project, flow_run=scheduled, parameters=parameters)
    with pytest.raises(DbtInputError, match=f"{sentence}.*Nothing was started"):
        full_refresh(dbt=shop.core(data_interval=MARCH), models=["asked"])
    with pytest.raises(DbtInputError, match="DBT_FULL_REFRESH in the environment and a data interval"):
        build_project(
            dbt=shop.core(env={**shop.core().env, "DBT_FULL_REFRESH": "1"}), data_interval=MARCH, retries=0
        )
    assert asked(shop) == [("none", "none")]
    assert shop.core(full_refresh=True, data_interval=MARCH, command="seed").full_refresh


def test_a_build_is_taken_up_with_its_interval(shop: Project) -> None:
    """A retry of another run has that run's interval, for a microbatch model too."""
    shop.model(
        "happened",
        "{{ config(materialized='table', event_time='at_time') }}"
        " select timestamp '2026-02-27' + interval (i) day as at_time from range(40) as days(i)",
    )
    by_day = (
        "{{ config(materialized='incremental', incremental_strategy='microbatch', batch_size='day',"
        " event_time='at_time', begin='2026-01-01') }}"
        " select at_time, '{{ var('data_interval_start') }}' as start from {{ ref('happened') }}"
    )
    shop.model("by_day", f"{by_day} where at < no_such_column")
    interval = DataInterval(start="2026-03-01", end="2026-03-03")
    state = build_project(dbt=shop.core(), data_interval=interval, retries=0, return_state=True)
    assert state.is_failed()
    shop.model("by_day", by_day)
    again = build_project(
        dbt=shop.core(), retry_of=state.state_details.flow_run_id, retries=0, return_state=True
    )
    assert again.is_completed(), again.message
    result: DbtResult = asyncio.run(again.aresult())
    assert {node.name: node.earlier for node in result.nodes} == {
        "asked": True,
        "happened": True,
        "by_day": False,
    }
    with duckdb.connect(str(shop.warehouse), read_only=True) as db:
        rows = db.execute("select cast(at_time as varchar), start from by_day order by at_time").fetchall()
    assert rows == [
        ("2026-03-01 00:00:00", "2026-03-01T00:00:00+00:00"),
        ("2026-03-02 00:00:00", "2026-03-01T00:00:00+00:00"),
    ]


@pytest.mark.no_server
@pytest.mark.parametrize(
    ("until", "warned"), [("2026-03-01T12:00:00-05:00", True), ("2026-03-02T06:00:00-05:00", False)]
)
def test_part_of_a_day_is_told(tmp_path: Path, until: str, warned: bool) -> None:
    """The stage's models take whole days: what an interval within one day builds, nothing, is no secret."""
    project = Project(tmp_path / "shop")
    project.set(vars={"data_interval_start": None, "data_interval_end": None})
    macro = Path(__file__).parent.parent / "sandbox/dbt/macros/increment_window.sql"
    (project.folder / "macros").mkdir()
    shutil.copy(macro, project.folder / "macros")
    project.model("days", "select 1 as id where {{ increment_window(\"date '2026-03-01'\") }}")
    interval = {"data_interval_start": "2026-03-01T06:00:00-05:00", "data_interval_end": until}
    done = subprocess.run(  # noqa: S603
        [str(Path(sys.executable).with_name("dbt")), "compile", "--vars", json.dumps(interval)],
        cwd=project.folder,
        env={**os.environ, "SHOP_WAREHOUSE": str(project.warehouse)},
        capture_output=True,
        text=True,
        check=False,
        timeout=150,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert ("begins and ends on one day" in done.stdout) is warned
