"""dbt Cloud's tasks: the plan, what is late left out, results per node, and retries that repeat nothing."""

from __future__ import annotations

import asyncio
import json
import logging
from typing import Any

import pytest
from prefect import flow
from prefect.cache_policies import NO_CACHE

from blocks.dbtcloud import api_of
from sandbox.dbt_cloud_project import manifest
from tasks.dbt.lineage import Lineage
from tasks.dbt_cloud import (
    Overrides,
    dbt_cloud_build,
    dbt_cloud_plan,
    dbt_cloud_retry,
    dbt_cloud_status,
)
from tasks.dbt_cloud_results import complaint_in, outcome_of
from tasks.dbt_cloud_steps import Project, command_of, has_selection, leave_out
from tasks.dbt_core import DbtBuildFailed, DbtError, DbtResult, DbtState
from tasks.jobs import InputError, JobCancelled, JobFailed, JobState, JobTimeout
from tests.dbt_cloud_fixtures import PREFECTS_SOCKETS, STEPS, Desk, cloud, collected
from tests.flows_fixtures import task_runs
from tests.jobs_fixtures import until

__all__ = ["cloud", "collected"]

pytestmark = [
    *PREFECTS_SOCKETS,
    # Prefect's, on every line that a task outside of a flow logs.
    pytest.mark.filterwarnings("ignore:.*without a flow run id:UserWarning"),
]
WEATHER = "source:weather_stations.weather+"
BELOW_WEATHER = {"stg_weather", "mart_weather_delays"}


def states(result: DbtResult) -> dict[str, str]:
    return {node.name.split(".")[0]: node.state.value for node in result.nodes}


# -- steps


@pytest.mark.parametrize(
    ("step", "command"),
    [
        ("dbt build", "build"),
        ("dbt --log-format json run --select a", "run"),
        ("dbt run-operation clean_up", "run-operation"),
        ("dbt source freshness --select source:a", "source"),
        ("dbt docs generate", "docs"),
        ("dbt --version", None),
    ],
)
def test_commands(step: str, command: str | None) -> None:
    """The command is a word of its own: run-operation is no run."""
    assert command_of(step) == command


@pytest.mark.parametrize(
    ("step", "without"),
    [
        ("dbt build", f"dbt build --exclude {WEATHER}"),
        ("dbt run -s tag:daily", f"dbt run -s tag:daily --exclude {WEATHER}"),
        ("dbt test --exclude big slow --threads 2", f"dbt test --exclude {WEATHER} big slow --threads 2"),
        ("dbt build --exclude=big", f"dbt build --exclude big {WEATHER}"),
        ("""dbt seed --vars '{"a": 1}'""", f"""dbt seed --vars '{{"a": 1}}' --exclude {WEATHER}"""),
        ("dbt source freshness", "dbt source freshness"),
        ("dbt docs generate", "dbt docs generate"),
        ("dbt run-operation clean_up", "dbt run-operation clean_up"),
    ],
)
def test_late_data_is_left_out(step: str, without: str) -> None:
    """Each command that runs nodes leaves it out beside what it leaves out itself; no other is touched."""
    assert leave_out([step], [WEATHER]) == [without]
    assert leave_out([step], []) == [step]


@pytest.mark.parametrize(
    ("step", "sentence"),
    [
        ("dbt build --selector nightly", "dbt ignores --exclude beside --selector"),
        ("dbt build --selector=nightly", "dbt ignores --exclude beside --selector"),
        ("dbt retry", "dbt takes no selection"),
        ("dbt build --select 'a", "can't be read as a command"),
    ],
)
def test_steps_that_can_leave_nothing_out(step: str, sentence: str) -> None:
    """Where dbt would build the late data all the same, nothing is started."""
    with pytest.raises(DbtError, match=sentence):
        leave_out([step], [WEATHER])


def project() -> Project:
    return Project.read(json.dumps(manifest()).encode())


@pytest.mark.parametrize(
    ("step", "names"),
    [
        ("dbt seed", {"cancellation_codes"}),
        ("dbt run -s stg_flights+1", {"stg_flights", "fct_flights"}),
        (
            "dbt run --select +mart_carrier_scorecard",
            {"stg_flights", "fct_flights", "mart_carrier_scorecard"},
        ),
        ("dbt run --select mart_*", {"mart_carrier_scorecard", "mart_weather_delays"}),
        ("dbt run --select source:weather_stations+", BELOW_WEATHER),
        ("dbt run -s stg_flights stg_weather --exclude stg_weather", {"stg_flights"}),
        ("dbt run -s stg_weather+,mart_weather_delays", {"mart_weather_delays"}),
        ("dbt run -s group:weather-desk --threads 4", BELOW_WEATHER),
        ("dbt test -s fct_flights", {"unique_fct_flights_flight_id"}),
        ("dbt run -s nothing_like_it", set()),
        ("dbt docs generate", set()),
    ],
)
def test_selection(step: str, names: set[str]) -> None:
    """What a step would run is told from the manifest."""
    found = {unique_id.split(".")[2] for unique_id in project().selected([step])}
    # A number of generations is not counted: rather too many.
    assert found == names or (step.endswith("+1") and found > names)


def test_selection_that_is_not_understood_is_everything() -> None:
    """Of a word that can't be judged from a manifest, everything is assumed."""
    everything = project().selected(["dbt build"])
    assert len(everything) == 8
    for word in ("state:modified+", "config.materialized:table", "fct_flights,result:error"):
        assert project().selected([f"dbt build --select {word}"]) == everything
    assert project().selected(["dbt build --exclude state:modified"]) == everything


def test_default_selectors_are_noticed() -> None:
    """A project with a default selector says so; a step with a selection of its own does not mind."""
    document = manifest() | {"selectors": {"nightly": {"name": "nightly", "default": True}}}
    assert Project.read(json.dumps(document).encode()).default_selector
    assert [has_selection(step) for step in ("dbt build", "dbt build -s a", "dbt docs generate")] == [
        False,
        True,
        True,
    ]


# -- the plan


async def test_plan(cloud: Desk) -> None:
    """The plan has the lineage and the nodes of the job's latest manifest."""
    await cloud.build()
    plan = await dbt_cloud_plan(cloud.parameters())
    assert (plan.project, plan.adapter, plan.target, len(plan.selected)) == (
        "nyc_flights",
        "duckdb",
        "prod",
        8,
    )
    source = next(iter(plan.lineage.sources_of("7f1a6002-2013-4a00-8000-000000000002")))
    assert plan.lineage.exclude_selectors([source]) == [WEATHER]
    assert cloud.posts() == 1


async def test_plan_without_a_manifest(cloud: Desk, caplog: pytest.LogCaptureFixture) -> None:
    """A job that has never run has no manifest: that is said, and the lineage is empty."""

    @flow
    async def plan() -> Any:
        return await dbt_cloud_plan(cloud.parameters())

    found = await plan()
    assert (found.project, found.selected, found.lineage) == ("scripted build", [], Lineage({}))
    assert "everything is held back" in caplog.text


@pytest.mark.parametrize(
    ("change", "fields", "sentence"),
    [
        ({}, {"job_id": 999}, "knows no job 999"),
        ({"deleted": True}, {}, "is deleted"),
        ({"steps": ["make coffee"]}, {}, "no dbt command to run"),
    ],
)
async def test_plan_refuses(cloud: Desk, change: Any, fields: Any, sentence: str) -> None:
    """What can't run is said before anything is started."""
    cloud.behave(**change)
    with pytest.raises(InputError, match=sentence):
        await dbt_cloud_plan(cloud.parameters(**fields))
    assert cloud.posts() == 0


# -- the build


async def test_build(cloud: Desk) -> None:
    """Every node has its state, rows, seconds and owner; the cause names the flow run."""
    result = await cloud.build(cause="orders landed")
    assert (result.state, result.counts) == (DbtState.SUCCESS, {"success": 8})
    assert result.url
    assert result.url.endswith(f"/runs/{cloud.ids[0]}/")
    assert result.invocation_id
    node = next(node for node in result.nodes if node.name == "fct_flights")
    assert (node.rows, node.owner, node.group, node.label) == (
        336776,
        "flight-ops",
        "flight-ops",
        "model fct_flights",
    )
    (run,) = cloud.runs
    assert run.cause.startswith("orders landed, Prefect flow run ")
    assert len(run.cause) <= 255


async def test_every_node_is_a_task_run(cloud: Desk) -> None:
    """Nodes are shown as they ended, with dbt's words."""
    cloud.behave(outcome="fail", node="unique_fct_flights_flight_id")
    ids = []

    @flow
    async def only_dbt() -> None:
        from prefect.runtime import flow_run

        ids.append(flow_run.id)
        with pytest.raises(DbtBuildFailed):
            await dbt_cloud_build(cloud.parameters())

    await only_dbt()
    runs = await asyncio.to_thread(task_runs, ids[0], until=9)
    shown = {run.name: (run.state_name, run.state.message) for run in runs if run.state}
    assert shown["model stg_flights"] == ("Completed", "336,776 rows")
    assert shown["model mart_weather_delays"][0] == "Skipped"
    test = next(value for name, value in shown.items() if name.startswith("test unique_fct"))
    assert test == ("Failed", "Got 7 results, configured to fail if != 0")


async def test_a_failed_run_tells_of_every_node(cloud: Desk) -> None:
    """Artifacts of a failed run count too: what failed, what was skipped for it, and what was built."""
    cloud.behave(outcome="fail", node="fct_flights")
    with pytest.raises(
        DbtBuildFailed, match=r"1 of 8 nodes failed: model fct_flights: Binder Error"
    ) as caught:
        await cloud.build()
    result = caught.value.result
    assert {node.name for node in result.skipped} >= {"mart_carrier_scorecard", "mart_weather_delays"}
    assert result.skipped[0].message == "model fct_flights failed"
    assert {node.name for node in result.built} == {"cancellation_codes", "stg_flights", "stg_weather"}
    assert result.url


async def test_warnings(cloud: Desk) -> None:
    """A run with warnings is a success whose tests have warned."""
    cloud.behave(outcome="warn")
    result = await cloud.build()
    assert (result.state, len(result.warned), result.warned[0].failures) == (DbtState.WARN, 2, 3)


async def test_late_data_is_left_out_of_the_run(cloud: Desk) -> None:
    """What is late is left out, and only that: `--exclude` is in the steps of this run alone."""
    result = await cloud.build([WEATHER])
    assert BELOW_WEATHER.isdisjoint(states(result))
    assert len(result.nodes) == 6
    assert cloud.runs[0].overrides == {"steps_override": [f"dbt build --exclude {WEATHER}"]}
    assert cloud.box.dbt_cloud.job(cloud.job).execute_steps == ["dbt build"]


async def test_overridden_steps_leave_it_out_too(cloud: Desk) -> None:
    """Given steps are what late data is left out of."""
    overrides = Overrides(steps_override=["dbt run -s stg_weather stg_flights"], threads_override=2)
    result = await cloud.build([WEATHER], overrides=overrides)
    assert states(result) == {"stg_flights": "success"}
    assert cloud.runs[0].overrides["threads_override"] == 2


async def test_nothing_is_started_where_nothing_can_be_left_out(cloud: Desk) -> None:
    """With a selector in its steps the job is not started while something is late."""
    cloud.behave(steps=["dbt build --selector nightly"])
    with pytest.raises(DbtError, match="dbt ignores --exclude beside --selector"):
        await cloud.build([WEATHER])
    assert cloud.posts() == 0


async def test_all_steps_count(cloud: Desk) -> None:
    """Of a job with several commands every step's results are read, and those of `docs generate` are not.

    By default the API gives the last step's, and docs leave a success for all that they compiled.
    """
    desk = Desk(cloud.box, STEPS)
    result = await desk.build()
    assert len(result.nodes) == 8
    desk.behave(outcome="fail", node="fct_flights")
    with pytest.raises(DbtBuildFailed) as caught:
        await desk.build()
    seen = states(caught.value.result)
    assert (seen["cancellation_codes"], seen["fct_flights"]) == ("success", "error")
    unique = next(node for node in caught.value.result.nodes if node.name.startswith("unique_fct_flights"))
    assert (unique.state, unique.message) == (DbtState.SKIPPED, "`dbt test` was not reached")


@pytest.mark.parametrize("deps", [True, False])
async def test_dbt_clouds_own_steps_are_not_counted_off(cloud: Desk, deps: bool) -> None:
    """Two or three automatic steps come first; the job's are found by name, not by index (prefect-dbt)."""
    cloud.behave(deps=deps)
    assert len((await cloud.build()).nodes) == 8


# -- what is missing


async def test_no_run_results(cloud: Desk) -> None:
    """A run that left no run results is judged by its status."""
    cloud.behave(missing=["run_results.json"])
    result = await cloud.build()
    assert (result.state, result.nodes, result.message) == (
        DbtState.SUCCESS,
        [],
        "it succeeded, and left no run results",
    )


async def test_no_manifest(cloud: Desk) -> None:
    """Without a manifest names come from the ids, and owners are not known."""
    cloud.behave(missing=["manifest.json"], outcome="fail", node="stg_weather")
    with pytest.raises(DbtBuildFailed) as caught:
        await cloud.build()
    assert [node.name for node in caught.value.result.failed] == ["stg_weather"]
    assert caught.value.result.failed[0].owner is None


async def test_artifacts_come_late(cloud: Desk) -> None:
    """Artifacts that come a moment after the end are waited for."""
    cloud.behave(artifacts_delay=0.8)
    assert len((await cloud.build()).nodes) == 8


async def test_run_results_that_break_off(cloud: Desk, caplog: pytest.LogCaptureFixture) -> None:
    """Half a run_results.json is taken as missing, and said."""
    cloud.fault(kind="truncated_json", path="run_results.json$")
    result = await cloud.build()
    assert result.nodes == []
    assert "can't be read: taken as missing" in caplog.text


async def test_a_run_that_broke_before_any_node(cloud: Desk) -> None:
    """A run that broke in its setup says at which step, with what dbt printed; logs may come late."""
    cloud.behave(outcome="fail_setup", logs_delay=0.6)
    with pytest.raises(DbtError, match=r"the step `dbt deps` failed: .*hub.getdbt.com.*/runs/") as caught:
        await cloud.build()
    assert not isinstance(caught.value, DbtBuildFailed)


async def test_logs_never_come(cloud: Desk) -> None:
    """Where no log ever comes, dbt Cloud's own message is said after a short wait (kestra plugin-dbt 299)."""
    cloud.behave(outcome="fail_setup", logs_delay=600)
    with pytest.raises(DbtError, match="the step `dbt deps` failed: Invoke dbt with `dbt deps` failed"):
        await cloud.build()


def test_complaints() -> None:
    """The complaint is taken out of what dbt printed: without times, colours and the greeting."""
    logs = "06:14:44  Running with dbt=1.11.2\n06:14:44  \x1b[31mEncountered an error:\x1b[0m\n"
    logs += "Compilation Error in x\n  y"
    assert complaint_in(logs) == "Compilation Error in x y"
    assert complaint_in("1\n2\n3\n4\n") == "2 3 4"
    assert complaint_in("") == ""


# -- ends


async def test_cancelled_by_somebody(cloud: Desk) -> None:
    """A run that somebody cancelled is neither a success nor a failed build."""
    cloud.behave(outcome="cancel")
    with pytest.raises(JobCancelled, match="cancelled"):
        await cloud.build()


async def test_timeout(cloud: Desk) -> None:
    """A build that takes too long is cancelled at dbt Cloud."""
    cloud.behave(outcome="stuck")
    with pytest.raises(JobTimeout):
        await cloud.build(policy={"timeout": 0.5})
    assert [run.status for run in cloud.runs] == [30]


async def test_another_run_and_the_policy_says_fail(cloud: Desk) -> None:
    """Where another run is active and that is a failure, its results are not taken for ours."""
    cloud.behave(duration=5)
    cloud.box.dbt_cloud.trigger(cloud.job)
    with pytest.raises(JobFailed, match="running already"):
        await cloud.build(policy={"on_active": "fail"})


# -- again


async def test_a_build_that_succeeded_is_not_run_again(cloud: Desk) -> None:
    """A retry of the flow run has the first attempt's result, without a second run."""
    attempts = []
    parameters = cloud.parameters()

    @flow(retries=1)
    async def chain() -> int:
        result = await dbt_cloud_build(parameters, [])
        attempts.append(result)
        if len(attempts) == 1:
            raise RuntimeError("an activation failed")
        return len(result.nodes)

    assert await chain() == 8
    assert cloud.posts() == 1


async def test_retry_from_failure(cloud: Desk) -> None:
    """In a retry of the flow run the failed run is taken up where it broke, and both runs' nodes are told."""
    cloud.behave(outcome="fail", node="fct_flights", times=1)
    parameters = cloud.parameters(retry_from_failure=True)

    @flow(retries=1)
    async def chain() -> DbtResult:
        return await dbt_cloud_build(parameters, [])

    result = await chain()
    assert (cloud.posts(), cloud.posts("/retry/$")) == (1, 1)
    assert len(result.nodes) == 8
    assert set(states(result).values()) == {"success"}
    again = await outcome_of_last(cloud)
    assert cloud.runs[1].retrying is cloud.runs[0]
    assert again == 8


async def outcome_of_last(cloud: Desk) -> int:
    async with api_of(cloud.credentials) as api:
        return len((await outcome_of(api, cloud.ids[-1])).nodes)


async def test_a_scheduled_run_is_no_retry(cloud: Desk) -> None:
    """A new flow run begins anew, though the last run failed (airflow 43347)."""
    cloud.behave(outcome="fail", times=1)
    with pytest.raises(DbtBuildFailed):
        await cloud.build(retry_from_failure=True)
    assert len((await cloud.build(retry_from_failure=True)).nodes) == 8
    assert (cloud.posts(), cloud.posts("/retry/$")) == (2, 0)


@pytest.mark.parametrize("setup", [False, True])
async def test_a_whole_run_where_a_retry_would_be_wrong(
    cloud: Desk, setup: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """What dbt Cloud can't retry, or what was left out of, runs whole again; the log says why."""
    cloud.behave(outcome="fail_setup" if setup else "fail", times=1)
    parameters = cloud.parameters(retry_from_failure=True)

    @flow(retries=1)
    async def chain() -> DbtResult:
        return await dbt_cloud_build(parameters, [] if setup else [WEATHER])

    assert (await chain()).state is DbtState.SUCCESS
    assert (cloud.posts(), cloud.posts("/retry/$")) == (2, 0)
    assert "the whole job runs again, because" in caplog.text


async def test_a_lost_reply_of_a_retry(cloud: Desk) -> None:
    """A retry carries no text of ours; it is found by the run that it says it retries."""
    cloud.behave(outcome="fail", times=1)
    with pytest.raises(JobFailed):
        await cloud.run()
    cloud.fault(kind="drop_after", method="POST", path="/retry/$", times=1)
    result = await cloud.run(retries=int(cloud.ids[0]))
    assert (result.job_id, result.state) == (cloud.ids[1], JobState.SUCCEEDED)
    assert cloud.posts("/retry/$") == 1


async def test_a_retry_that_was_begun_is_attached_to(cloud: Desk) -> None:
    """Also with the credentials of a saved block, under whose name the journal keeps it."""
    await cloud.credentials.save("retried", overwrite=True)  # type: ignore[misc]  # a coroutine in a loop
    cloud.behave(outcome="fail", node="fct_flights", times=1)
    run = cloud.box.dbt_cloud.trigger(cloud.job)
    await until(lambda: run.final)
    parameters = cloud.parameters(credentials="retried")
    retry = dbt_cloud_retry.with_options(persist_result=False, cache_policy=NO_CACHE)
    attempts = []

    @flow(retries=1)
    async def again() -> DbtResult:
        attempts.append(await retry(parameters, str(run.run_id)))
        if len(attempts) == 1:
            raise RuntimeError("an activation failed")
        return attempts[-1]

    assert set(states(await again()).values()) == {"success"}
    assert (cloud.posts(), cloud.posts("/retry/$")) == (0, 1)


async def test_retry_by_hand(cloud: Desk, caplog: pytest.LogCaptureFixture) -> None:
    """A failed run is taken up by its id; that its overrides do not hold is said."""
    cloud.behave(outcome="fail", node="fct_flights", times=1)
    run = cloud.box.dbt_cloud.trigger(cloud.job, "by hand", git_branch="fix")
    await until(lambda: run.final)
    parameters = cloud.parameters()

    @flow
    async def again() -> DbtResult:
        return await dbt_cloud_retry(parameters, str(run.run_id))

    with caplog.at_level(logging.WARNING):
        assert set(states(await again()).values()) == {"success"}
    assert "ignores overrides (git_branch)" in caplog.text


@pytest.mark.parametrize(
    ("behaviour", "sentence"),
    [
        ({}, "it did not fail"),
        ({"outcome": "fail", "missing": ["run_results.json"]}, "it left no run results"),
        ({"outcome": "fail_setup"}, "the command that failed can't be retried"),
    ],
)
async def test_retry_by_hand_of_what_cant_be(cloud: Desk, behaviour: Any, sentence: str) -> None:
    """What dbt Cloud can't retry is refused in words, and nothing is started."""
    cloud.behave(**behaviour)
    run = cloud.box.dbt_cloud.trigger(cloud.job)
    await until(lambda: run.final)
    with pytest.raises(InputError, match=sentence):
        await dbt_cloud_retry(cloud.parameters(), str(run.run_id))
    assert cloud.posts("/retry/$") == 0


async def test_retry_of_another_jobs_run(cloud: Desk) -> None:
    """A run of another job is refused by name."""
    run = cloud.box.dbt_cloud.trigger(STEPS)
    with pytest.raises(InputError, match="is of job 303 and not of 302"):
        await dbt_cloud_retry(cloud.parameters(), str(run.run_id))
    with pytest.raises(InputError, match="knows no run 1"):
        await dbt_cloud_retry(cloud.parameters(), "1")


async def test_status(cloud: Desk) -> None:
    """The state of any run, whoever started it, without waiting."""
    cloud.behave(outcome="stuck")
    run = cloud.box.dbt_cloud.trigger(cloud.job)
    found = await dbt_cloud_status(cloud.credentials, str(run.run_id))
    assert not found.state.terminal
    assert (found.name, found.resource_id) == ("scripted build", "302")
