"""The deployments: deployed, scheduled, started by events, run by a real worker, cancelled and killed."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4
from zoneinfo import ZoneInfo

import duckdb
import httpx
import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import DeploymentScheduleCreate
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.client.schemas.schedules import IntervalSchedule
from prefect.exceptions import PrefectHTTPStatusError
from prefect.states import Cancelling, Scheduled

from deployments.checks import problems_of
from deployments.entries import Entry, read_entries
from deployments.environments import environment
from deployments.steps import change_to_repository
from flows import elt_chain, sync_connections
from flows.expected import ExpectedConnection
from sandbox import Sandbox, catalog
from tasks.cancellation import cancel_open_jobs
from tasks.events import EltEvent, hand_over, read_triggers
from tests.deployed import (
    BY_HAND,
    CHAIN,
    PREFECT_FILE,
    REPOSITORY,
    Runs,
    Stage,
    background,
    deploy,
    prefect,
    saved_blocks,
    specs,
    until,
)

# A process for a run takes seconds to start, and a run of the chain builds the whole project.
pytestmark = pytest.mark.timeout(600)

IDS = {spec.name: spec.connection_id for spec in catalog.CONNECTIONS}
AFTER_BUILD = "activate/after-build"
SERVED = "sync-connections/served"
_SERVE = "from flows import sync_connections; sync_connections.serve(name='served')"
# What the automations of deployments/automations.yaml add.
_BY_OTHERS = {name: {"flow_run_id": str(uuid4())} for name in ("dead-runs", "untold-runs")}
_BY_OTHERS["when-time-is-up"] = {"flow_run_id": str(uuid4()), "key": "approval-the-load-1"}
_STUCK = 25  # connections of a run that is to be cancelled


@pytest.fixture(scope="module")
def runs(prefect_server: str) -> Iterator[Runs]:
    with get_client(sync_client=True) as client:
        yield Runs(client, prefect_server)


@pytest.fixture(scope="module")
def deployed(runs: Runs) -> Runs:
    """Everything deployed by the commands at the top of the file."""
    prefect("work-pool", "create", "elt", "--type", "process", "--overwrite")
    deploy()
    return runs


@pytest.fixture(scope="module")
def stage(prefect_server: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """The sandbox with quick jobs; the blocks that the deployments name are saved while it is up."""
    with Sandbox(tmp_path_factory.mktemp("stage"), job_seconds=0.3) as box, saved_blocks(box):
        yield Stage(box)


@pytest.fixture(scope="module")
def worker(deployed: Runs, stage: Stage, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    """A real process worker on the pool, which no schedule gives anything to do beside the tests."""
    for deployment in deployed.client.read_deployments():
        for schedule in deployment.schedules:
            url = f"{deployed.api_url}/deployments/{deployment.id}/schedules/{schedule.id}"
            httpx.patch(url, json={"active": False}).raise_for_status()
    folder = tmp_path_factory.mktemp("worker")
    command = ["-m", "prefect", "worker", "start", "--pool", "elt"]
    env = {
        "ELT_WAREHOUSE": str(stage.box.warehouse.path),
        "PREFECT_WORKER_QUERY_SECONDS": "1",
        # Another test may be building the same project at this moment.
        "DBT_TARGET_PATH": str(folder / "target"),
        "DBT_LOG_PATH": str(folder / "logs"),
    }
    with background(command, folder / "worker.log", **env):
        yield deployed


# -- what the file says -------------------------------------------------------------------------------------


def test_a_load_that_does_not_come_is_looked_for_alone() -> None:
    """A look back over 26 hours finds well what the look at 07:00 has told to be late."""
    spec = specs()["flights-by-07"]
    looked_at = {
        trigger["match"]["prefect.resource.id"]: trigger["parameters"]["connections"]
        for trigger in spec["triggers"]
    }
    expected = [ExpectedConnection.model_validate(one) for one in spec["parameters"]["connections"]]
    assert {
        resource: [ExpectedConnection.model_validate(one) for one in found]
        for resource, found in looked_at.items()
    } == {one.resource: [one] for one in expected}


@pytest.mark.parametrize("place", ["prod", "dev", "a branch"])
@pytest.mark.parametrize("entry", read_entries(), ids=lambda entry: entry.name)
def test_nothing_is_wrong_with(entry: Entry, place: str) -> None:
    """Entrypoint, parameters, schedules, triggers on example events and pull steps, in each environment."""
    here = environment(branch="my-feature") if place == "a branch" else environment(place)
    there = [entry.within(here)] if entry.name not in here.without else []
    assert problems_of([entry]) + problems_of(there) == []
    entry.flow.validate_parameters({**_BY_OTHERS.get(entry.name, {}), **entry.parameters})


@pytest.mark.parametrize("entry", read_entries(), ids=lambda entry: entry.name)
def test_a_reader_understands(entry: Entry) -> None:
    """Every deployment says what it does, whose it is, and in which time zone its clock is."""
    assert entry.description
    assert entry.owner
    assert all(schedule.timezone for schedule in entry.schedules if schedule.cron)


(_ready,) = (
    one for one in read_triggers(REPOSITORY / PREFECT_FILE) if one.expect == frozenset({"elt.source.ready"})
)


def _source_ready(payload: dict[str, Any]) -> EltEvent:
    return EltEvent(
        name="elt.source.ready",
        key=uuid4().hex,
        occurred=datetime.now(UTC),
        resource_id="elt.hook.ready",
        payload=payload,
    )


@pytest.mark.parametrize(
    ("payload", "connections"),
    [
        ({"connection_ids": [IDS["weather"]]}, ["weather"]),
        ({"connection_ids": IDS["weather"]}, ["weather"]),
        ({"connection_ids": list(IDS.values())}, list(IDS)),
        ({"connection_ids": []}, []),
        ({}, []),
    ],
    ids=["one", "plain string", "all", "none", "no such key"],
)
def test_event_becomes_syncs(payload: dict[str, Any], connections: list[str]) -> None:
    """The payload's ids, one or many, become the flow's syncs."""
    rendered = _ready.rendered(_source_ready(payload))
    assert rendered["syncs"] == [
        {"tool": "airbyte", "server": "airbyte", "connection_id": IDS[name]} for name in connections
    ]
    elt_chain.validate_parameters(rendered)


def test_pull_step_goes_to_the_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever a worker starts a run, relative paths in its parameters begin at the repository."""
    monkeypatch.chdir(tmp_path)
    assert change_to_repository() == {"directory": str(REPOSITORY)}
    assert Path.cwd() == REPOSITORY
    assert Path(specs()["flights"]["parameters"]["transform"]["project_dir"], "dbt_project.yml").is_file()


# -- what the server makes of it ----------------------------------------------------------------------------


def test_no_path_of_this_machine_is_deployed(deployed: Runs) -> None:
    """What is stored fits any machine on which the project is installed."""
    for name in (CHAIN, BY_HAND):
        assert str(REPOSITORY) not in deployed.deployment(name).model_dump_json()


@pytest.mark.parametrize("name", [CHAIN, BY_HAND])
def test_server_takes_the_parameters(deployed: Runs, name: str) -> None:
    """A run can be made with what the deployment holds, and not with what the flow's schema forbids."""
    later: State[Any] = Scheduled(scheduled_time=datetime.now(UTC) + timedelta(days=1))
    run = deployed.client.create_flow_run_from_deployment(deployed.deployment(name).id, state=later)
    assert [sync["connection_id"] for sync in run.parameters["syncs"]] == list(IDS.values())
    deployed.client.delete_flow_run(run.id)
    with pytest.raises(PrefectHTTPStatusError, match=r"syncs\[0\]"):
        deployed.start(name, syncs=[{"server": "airbyte"}])


def test_daily_run_is_scheduled_at_six_in_new_york(deployed: Runs) -> None:
    """The schedule makes runs, each at 06:00 on the clocks of New York, in summer and in winter."""

    def scheduled() -> list[FlowRun]:
        return [run for run in deployed.of(CHAIN) if run.auto_scheduled]

    found = until("a run is scheduled", scheduled)
    clocks = {
        run.expected_start_time.astimezone(ZoneInfo("America/New_York")).strftime("%H:%M")
        for run in found
        if run.expected_start_time
    }
    assert clocks == {"06:00"}
    assert [run for run in deployed.of(BY_HAND) if run.auto_scheduled] == []


def test_interval_schedule_makes_runs(deployed: Runs) -> None:
    """The installed versions of Prefect's own dependencies schedule runs, which some silently do not."""
    every_minute = DeploymentScheduleCreate(
        schedule=IntervalSchedule(interval=timedelta(minutes=1)), active=True
    )
    # In no work pool: nobody runs them.
    made = deployed.client.create_deployment(
        flow_id=deployed.deployment(BY_HAND).flow_id, name="each-minute", schedules=[every_minute]
    )
    try:
        found = until(
            "a run each minute is scheduled",
            lambda: of if len(of := deployed.of("sync-connections/each-minute")) >= 3 else None,
        )
        assert {run.state.type for run in found if run.state} == {StateType.SCHEDULED}
    finally:
        httpx.delete(f"{deployed.api_url}/deployments/{made}").raise_for_status()


def test_deploying_again_changes_nothing(deployed: Runs) -> None:
    """A second deploy keeps ids and the number of automations, and a paused schedule stays paused."""

    def snapshot() -> dict[str, Any]:
        found = {name: deployed.deployment(name) for name in (CHAIN, BY_HAND, AFTER_BUILD)}
        fields = {"id", "parameters", "description", "tags", "pull_steps", "job_variables", "work_pool_name"}
        return {
            name: (
                deployment.model_dump(include=fields),
                [(schedule.id, schedule.slug, schedule.active) for schedule in deployment.schedules],
                [automation["name"] for automation in deployed.automations(name)],
            )
            for name, deployment in found.items()
        }

    chain = deployed.deployment(CHAIN)
    (schedule,) = chain.schedules
    url = f"{deployed.api_url}/deployments/{chain.id}/schedules/{schedule.id}"
    httpx.patch(url, json={"active": False}).raise_for_status()
    before = snapshot()
    deploy()
    assert snapshot() == before
    assert before[CHAIN][1] == [(schedule.id, "daily-at-06", False)]
    assert len(before[AFTER_BUILD][2]) == 1
    assert before[BY_HAND][1:] == ([], [])


# -- a worker takes runs to the end -------------------------------------------------------------------------


def test_manual_run_on_a_worker(worker: Runs, stage: Stage) -> None:
    """A run by hand syncs the connections that were left in the form, and no other."""
    reference = [
        {"tool": "airbyte", "server": "airbyte", "connection_id": IDS[name]}
        for name in ("airlines", "airports")
    ]
    run = worker.start(BY_HAND, syncs=reference)
    ended = worker.ended(run)
    assert ended.state is not None
    assert ended.state.name == "Completed", ended.state.message
    assert "sync-report" in _artifacts(worker, run)
    assert _count(stage, "raw_airlines.airlines") == 16
    assert [len(stage.box.airbyte.jobs_of(name)) for name in ("airlines", "airports", "flights")] == [1, 1, 0]


@pytest.mark.timeout(600)
async def test_event_starts_the_whole_chain(worker: Runs, stage: Stage) -> None:
    """`elt.source.ready`, told twice, starts one run with its connections, which a worker ends."""
    known = {run.id for run in worker.of(CHAIN)}
    # In another order than the deployment's own list, so that it can't be taken for that one.
    ids = sorted(IDS.values(), reverse=True)
    event = _source_ready({"connection_ids": ids})
    for _ in range(2):
        await hand_over([event], [_ready])
    (begun,) = (run for run in worker.of(CHAIN) if run.id not in known and not run.auto_scheduled)
    ended = worker.ended(begun.id, within=480)
    assert [sync["connection_id"] for sync in ended.parameters["syncs"]] == ids
    assert ended.state is not None
    assert ended.state.name == "Completed", ended.state.message
    assert "elt-report" in _artifacts(worker, ended.id)
    assert _count(stage, "marts.fct_flights") == _count(stage, "raw_flights.flights") == 336_776
    for sync in catalog.SYNCS:
        assert [run.status for run in stage.box.hightouch.sync(sync.slug).runs] == ["success"]
    assert catalog.DEFAULT_CHANNEL in {message.channel for message in stage.box.slack.messages}


@pytest.mark.timeout(600)
def test_a_generated_pipeline_on_a_worker(worker: Runs, stage: Stage) -> None:
    """It loads what feeds its exposure, looks at the gates of its base, builds, and sends on that alone."""
    name = "exposure-braze-weather-delays"
    prefect("--no-prompt", "deploy", "--name", name, "--prefect-file", "deployments/pipelines.yaml")

    def done() -> list[int]:
        loads = [len(stage.box.airbyte.jobs_of(load)) for load in IDS]
        return [*loads, *(len(stage.box.hightouch.sync(sync.slug).runs) for sync in catalog.SYNCS)]

    before = done()
    run = worker.start(f"elt-chain/{name}")
    ended = worker.ended(run, within=360)
    assert ended.state is not None
    assert ended.state.name == "Completed", ended.state.message
    its_own = [*(load in ("flights", "weather") for load in IDS)]
    its_own += [sync.slug == "weather-delays-to-braze" for sync in catalog.SYNCS]
    assert [now - then for now, then in zip(done(), before, strict=True)] == its_own
    assert _count(stage, "marts.mart_weather_delays") > 0
    report = str(_artifacts(worker, run)["elt-report"])
    assert "| ✓ | rows | SUCCEEDED |" in report
    assert "| ✓ | freshness | SUCCEEDED |" in report


def _artifacts(runs: Runs, run: UUID) -> dict[str | None, Any]:
    of_run = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[run]))
    return {found.key: found.data for found in runs.client.read_artifacts(artifact_filter=of_run)}


def _count(stage: Stage, table: str) -> int:
    with duckdb.connect(str(stage.box.warehouse.path), read_only=True) as db:
        (count,) = db.execute(f"select count(*) from {table}").fetchone() or (0,)  # noqa: S608
    return int(count)


# -- stopped in the middle ----------------------------------------------------------------------------------


@dataclass
class InFlight:
    """Runs whose syncs never end, by what is going to be done to them."""

    runs: dict[str, UUID]
    stopped: float


@pytest.fixture(scope="module")
def in_flight(worker: Runs, stage: Stage, tmp_path_factory: pytest.TempPathFactory) -> Iterator[InFlight]:
    """All at once, because each process takes seconds to start; two of them are then stopped by a signal."""
    started = {}
    for name, count in {"killed": 3, "terminated": 3, "cancelled": _STUCK, "served": _STUCK}.items():
        stage.add(name, count, outcome="stuck")
    for name in ("killed", "terminated", "cancelled"):
        started[name] = worker.start(BY_HAND, syncs=stage.syncs(name))
    log = tmp_path_factory.mktemp("serve") / "serve.log"
    with background(["-c", _SERVE], log, PREFECT_RUNNER_POLL_FREQUENCY="1"):
        until("the flow is served", lambda: _exists(worker, SERVED))
        started["served"] = worker.start(SERVED, syncs=stage.syncs("served"))
        for name in started:
            stage.started(name)
        worker.process(started["killed"]).send_signal(signal.SIGKILL)
        worker.process(started["terminated"]).send_signal(signal.SIGTERM)
        yield InFlight(started, time.monotonic())


def _exists(runs: Runs, deployment: str) -> bool:
    return any(found.name == deployment.split("/")[1] for found in runs.client.read_deployments())


def test_terminated_process_leaves_its_jobs_alone(worker: Runs, stage: Stage, in_flight: InFlight) -> None:
    """SIGTERM without a cancellation, as when a machine is drained, does not stop the vendor's jobs."""
    ended = worker.ended(in_flight.runs["terminated"])
    assert ended.state is not None
    assert ended.state.type is StateType.CRASHED
    assert stage.statuses("terminated") == ["running"] * 3
    assert stage.cancels("terminated") == [0] * 3


async def test_hook_cancels_what_a_dead_process_left(worker: Runs, stage: Stage, in_flight: InFlight) -> None:
    """The cancellation hook, knowing only the run's id, cancels its open jobs; a second call does nothing."""
    run = worker.ended(in_flight.runs["terminated"])
    for _ in range(2):
        await cancel_open_jobs(sync_connections, run, Cancelling())
        assert stage.statuses("terminated") == ["cancelled"] * 3
        assert stage.cancels("terminated") == [1] * 3


@pytest.mark.parametrize("name", ["cancelled", "served"], ids=["on a worker", "while serving"])
def test_cancelled_run_cancels_its_jobs(worker: Runs, stage: Stage, in_flight: InFlight, name: str) -> None:
    """`prefect flow-run cancel` ends a fan-out with every vendor job cancelled and none twice."""
    run = in_flight.runs[name]
    prefect("flow-run", "cancel", str(run))
    ended = worker.ended(run)
    assert ended.state is not None
    assert ended.state.type is StateType.CANCELLED
    assert [state.type for state in worker.states(run)].count(StateType.CANCELLING) == 1
    assert stage.statuses(name) == ["cancelled"] * _STUCK
    assert stage.cancels(name) == [1] * _STUCK


def test_killed_run_is_taken_up_again(worker: Runs, stage: Stage, in_flight: InFlight) -> None:
    """SIGKILL in mid-sync and a retry of the same run: it attaches to its jobs and starts none."""
    run = in_flight.runs["killed"]
    crashed = worker.ended(run)
    assert crashed.state is not None
    assert crashed.state.type is StateType.CRASHED
    # Its process can't have told; the worker's did, by the run's parameters, and once for two runs that died.
    told = until("the crash is told", lambda: _told(stage, "the run* crashed"))
    assert len(told) == 1
    assert "*flights*, run " in told[0]
    # A worker reports the crash once more after some seconds, which would undo a retry that came before it.
    time.sleep(max(0.0, in_flight.stopped + 6 - time.monotonic()))
    jobs = [job for c in stage.groups["killed"] for job in stage.box.airbyte.jobs_of(c)]
    asked = time.time()
    prefect("flow-run", "retry", str(run))
    until("it looks at each job", lambda: all(stage.looks(job.job_id, since=asked) for job in jobs))
    for job in jobs:
        job.timeline.finish("succeeded")
    ended = worker.ended(run)
    assert ended.state is not None
    assert ended.state.type is StateType.COMPLETED, ended.state.message
    assert ended.run_count == 2
    assert stage.statuses("killed") == ["succeeded"] * 3
    assert len(_told(stage, "the run* crashed")) == 1
    assert _told(stage, "the run* is well again")


def _told(stage: Stage, words: str) -> list[str]:
    return [message.text for message in stage.box.slack.messages if words in message.text]
