"""The sandbox's dbt Cloud, over HTTP: runs that queue, show late, break and are retried; its oddities."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from sandbox import Sandbox, catalog
from tests.sandbox_fixtures import box, control, sources, until

__all__ = ["box", "control", "sources"]

pytestmark = pytest.mark.no_server
JOB = 302
BUILT = ["manifest.json", "run_results.json"]


@pytest.fixture
def cloud(box: Sandbox) -> Iterator[httpx.Client]:
    headers = {"authorization": f"Token {catalog.DBT_CLOUD_TOKEN}"}
    base = f"{box.dbt_cloud_url}/api/v2/accounts/{catalog.DBT_CLOUD_ACCOUNT_ID}"
    with httpx.Client(base_url=base, headers=headers) as client:
        yield client


def trigger(client: httpx.Client, job: int = JOB, **body: Any) -> dict[str, Any]:
    reply = client.post(f"/jobs/{job}/run/", json={"cause": "a test", **body})
    data: dict[str, Any] = reply.raise_for_status().json()["data"]
    return data


def read(client: httpx.Client, run_id: int, **query: str) -> dict[str, Any]:
    data: dict[str, Any] = client.get(f"/runs/{run_id}/", params=query).raise_for_status().json()["data"]
    return data


def ended(client: httpx.Client, run_id: int, **query: str) -> dict[str, Any]:
    return until(lambda: read(client, run_id, **query), lambda run: run["is_complete"])


def nodes(client: httpx.Client, run_id: int, step: int | None = None) -> dict[str, str]:
    query = {"step": str(step)} if step else {}
    reply = client.get(f"/runs/{run_id}/artifacts/run_results.json", params=query).raise_for_status().json()
    return {one["unique_id"].split(".")[2]: one["status"] for one in reply["results"]}


def test_a_run_walks_through_its_states(box: Sandbox, cloud: httpx.Client) -> None:
    """Queued, starting, running, success; flags and times say the same."""
    box.dbt_cloud.set(JOB, duration=10, queued_seconds=1.3)
    run = trigger(cloud)
    assert (run["status"], run["is_complete"], "finished_at" in run) == (1, False, False)
    seen = []

    def look() -> dict[str, Any]:
        found = read(cloud, run["id"])
        if found["status"] not in seen:
            seen.append(found["status"])
        return found

    last = until(look, lambda found: found["is_complete"])
    assert seen == [1, 2, 3, 10]
    assert (last["is_success"], last["status_humanized"], last["duration"]) == (True, "Success", "00:00:11")
    assert last["created_at"] <= last["started_at"] < last["finished_at"]


def test_runs_of_a_job_queue_behind_each_other(box: Sandbox, cloud: httpx.Client) -> None:
    """The second run starts when the first has ended; a run of another job does not wait."""
    box.dbt_cloud.set(JOB, outcome="stuck", times=1)
    first, second, other = trigger(cloud), trigger(cloud), trigger(cloud, 303)
    ended(cloud, other["id"])
    assert [read(cloud, run["id"])["status"] for run in (first, second)] == [3, 1]
    cloud.post(f"/runs/{first['id']}/cancel/")
    assert ended(cloud, second["id"])["status"] == 10
    assert read(cloud, first["id"])["status"] == 30


def test_a_queued_run_is_cancelled_at_once(box: Sandbox, cloud: httpx.Client) -> None:
    """From the queue a run goes straight to cancelled."""
    box.dbt_cloud.set(JOB, outcome="stuck")
    trigger(cloud)
    waiting = trigger(cloud)
    assert cloud.post(f"/runs/{waiting['id']}/cancel/").json()["data"]["status"] == 30


def test_late_visibility(box: Sandbox, cloud: httpx.Client) -> None:
    """For a time a new run is 404 and in no list."""
    box.dbt_cloud.set(JOB, visibility_delay=2)
    run = trigger(cloud)
    assert cloud.get(f"/runs/{run['id']}/").status_code == 404
    assert cloud.get("/runs/").json()["data"] == []
    until(
        lambda: {"status": cloud.get(f"/runs/{run['id']}/").status_code}, lambda found: found["status"] == 200
    )


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/runs", 301),
        ("POST", "/jobs/302/run", 404),
        ("GET", "//runs/", 404),
        ("GET", "/runs/1/artifacts/manifest.json/", 404),
        ("GET", "/nothing/", 404),
        ("PUT", "/jobs/302/run/", 405),
    ],
)
def test_slashes(cloud: httpx.Client, method: str, path: str, status: int) -> None:
    """Without its slash a GET redirects and a POST is not there; a double one is not there either."""
    assert cloud.request(method, path, json={"cause": "x"} if method != "GET" else None).status_code == status


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("pk__in=1,2", "pk__in: 1,2 is not a list in brackets"),
        ("status__in=10", "status__in: 10 is not a list in brackets"),
        ("order_by=name", "order_by: name is not one of"),
        ("include_related=run_steps", "include_related: run_steps is not one of"),
        ("limit=many", "limit: many is not a number"),
    ],
)
def test_filters_that_are_refused(cloud: httpx.Client, query: str, message: str) -> None:
    """A filter that can't be read is 400, with the reason for developers."""
    reply = cloud.get(f"/runs/?{query}")
    assert reply.status_code == 400
    assert message in reply.json()["status"]["developer_message"]


def test_lists(cloud: httpx.Client) -> None:
    """Ascending unless told, a hundred at most, filtered by job, status and ids."""
    first, second = trigger(cloud), trigger(cloud, 303)
    ended(cloud, second["id"])
    ended(cloud, first["id"])

    def ids(query: str) -> list[int]:
        return [run["id"] for run in cloud.get(f"/runs/?{query}").raise_for_status().json()["data"]]

    assert ids("") == [first["id"], second["id"]]
    assert ids("order_by=-id&limit=1") == [second["id"]]
    assert ids(f"id__gt={first['id']}") == ids("job_definition_id=303") == [second["id"]]
    assert ids(f"pk__in=[{first['id']},1]") == [first["id"]]
    assert ids("status__in=[1,2,3]") == ids("project_id__in=[1]") == []
    assert cloud.get("/runs/?limit=5000").json()["extra"]["filters"]["limit"] == 100
    assert cloud.get("/runs/?offset=1").json()["extra"]["pagination"] == {"count": 1, "total_count": 2}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({}, "cause: Field required"),
        ({"cause": "x" * 256}, "cause: String should have at most 255"),
        ({"cause": "x", "git_branch": None}, "git_branch: Input should be a valid string"),
        ({"cause": "x", "branch": "main"}, "branch: Extra inputs"),
    ],
)
def test_triggers_that_are_refused(cloud: httpx.Client, body: Any, message: str) -> None:
    """A cause is required and short; an override that is null or unknown is refused."""
    reply = cloud.post(f"/jobs/{JOB}/run/", json=body)
    assert (reply.status_code, message in reply.json()["status"]["developer_message"]) == (400, True)


def test_a_failed_run_and_its_retry(box: Sandbox, cloud: httpx.Client) -> None:
    """A broken node breaks its step; a retry runs what failed and what was skipped, and nothing else."""
    box.dbt_cloud.set(JOB, outcome="fail", node="fct_flights", times=1)
    run = ended(cloud, trigger(cloud)["id"], include_related="run_steps")
    assert (run["status"], run["can_retry"]) == (20, True)
    assert [step["status_humanized"] for step in run["run_steps"]] == ["Success"] * 3 + ["Error"]
    assert "no_such_column" in run["run_steps"][3]["logs"]
    assert nodes(cloud, run["id"])["mart_carrier_scorecard"] == "skipped"
    again = cloud.post(f"/runs/{run['id']}/retry/").json()["data"]
    assert again["retrying_run_id"] == run["id"]
    ended(cloud, again["id"])
    assert set(nodes(cloud, again["id"]).values()) <= {"success", "pass"}
    assert "stg_flights" not in nodes(cloud, again["id"])
    refused = cloud.post(f"/runs/{run['id']}/retry/")
    assert (refused.status_code, refused.json()["status"]["developer_message"]) == (
        400,
        "RETRY_NOT_LATEST_RUN",
    )


def test_steps_after_the_broken_one_are_skipped(box: Sandbox, cloud: httpx.Client) -> None:
    """Of several commands the ones behind the broken one are not run, and leave nothing."""
    box.dbt_cloud.set(303, outcome="fail", node="fct_flights", times=1)
    run = ended(cloud, trigger(cloud, 303)["id"], include_related="run_steps")
    words = [step["status_humanized"] for step in run["run_steps"]]
    assert words == ["Success"] * 4 + ["Error", "Skipped", "Skipped"]
    assert cloud.get(f"/runs/{run['id']}/artifacts/run_results.json?step=6").status_code == 404
    assert nodes(cloud, run["id"], step=4) == {"cancellation_codes": "success"}
    assert cloud.get(f"/runs/{run['id']}/retry/").json()["data"] == {
        "failed_step": "dbt run",
        "skipped_steps": ["dbt test", "dbt docs generate"],
    }


def test_rerun(box: Sandbox, cloud: httpx.Client) -> None:
    """A rerun takes a failed run up where it broke, and starts anew after a success."""
    assert "retrying_run_id" not in cloud.post(f"/jobs/{JOB}/rerun/").json()["data"]
    box.dbt_cloud.set(JOB, outcome="fail", times=1)
    failed = ended(cloud, trigger(cloud)["id"])
    assert cloud.post(f"/jobs/{JOB}/rerun/").json()["data"]["retrying_run_id"] == failed["id"]


def test_selection_is_obeyed(cloud: httpx.Client) -> None:
    """A scripted run leaves out what its steps exclude."""
    steps = ["dbt build --exclude source:weather_stations.weather+"]
    run = trigger(cloud, steps_override=steps)
    ended(cloud, run["id"])
    assert len(nodes(cloud, run["id"])) == 6
    assert not {"stg_weather", "mart_weather_delays"} & set(nodes(cloud, run["id"]))


def test_artifacts_of_a_job_are_its_latest(box: Sandbox, cloud: httpx.Client) -> None:
    """Of a job's artifacts the latest run's count that left any; before the first there is none."""
    assert cloud.get(f"/jobs/{JOB}/artifacts/manifest.json").status_code == 404
    ended(cloud, trigger(cloud)["id"])
    box.dbt_cloud.set(JOB, outcome="fail_setup")
    broken = ended(cloud, trigger(cloud)["id"])
    assert cloud.get(f"/runs/{broken['id']}/artifacts/").json()["data"] == []
    found = cloud.get(f"/jobs/{JOB}/artifacts/manifest.json").json()
    assert found["metadata"]["project_name"] == "nyc_flights"


def test_who_may_ask(box: Sandbox, cloud: httpx.Client) -> None:
    """A wrong token is 401, a wrong account 403, a deleted job is not run, too many requests are 429."""
    assert cloud.get("/jobs/", headers={"authorization": "Token wrong"}).status_code == 401
    assert cloud.get("/jobs/", headers={"authorization": f"Bearer {catalog.DBT_CLOUD_TOKEN}"}).is_success
    assert cloud.get(f"{box.url}/api/v2/accounts/1/jobs/").status_code == 403
    box.dbt_cloud.set(JOB, deleted=True)
    assert cloud.post(f"/jobs/{JOB}/run/", json={"cause": "x"}).status_code == 404
    assert JOB not in {job["id"] for job in cloud.get("/jobs/").json()["data"]}
    box.dbt_cloud.settings.requests_per_minute = 1
    assert [cloud.get("/jobs/").status_code for _ in range(2)][1] == 429


def test_control(box: Sandbox, control: httpx.Client, cloud: httpx.Client) -> None:
    """Over the control API: how the next runs behave, and what ran."""
    assert control.patch(f"/dbt/jobs/{JOB}", json={"outcome": "fail", "times": 1}).json()["outcome"] == "fail"
    assert control.patch(f"/dbt/jobs/{JOB}", json={"node": "nobody"}).status_code == 404
    assert control.patch("/dbt/jobs/9", json={}).status_code == 404
    run = ended(cloud, trigger(cloud)["id"])
    (shown,) = control.get("/dbt/runs").json()["scripted build"]
    assert (shown["id"], shown["status"], shown["cause"]) == (run["id"], 20, "a test")
    assert control.patch("/settings", json={"dbt_cloud": {"pk_in": "refused"}}).is_success
    assert cloud.get("/runs/?pk__in=[1]").status_code == 400
    page = httpx.get(run["href"])
    assert (page.status_code, "no_such_column" in page.text) == (200, True)


def test_debug_logs_are_cut_by_lines(box: Sandbox, cloud: httpx.Client) -> None:
    """Unless they are asked for, a step's debug logs are its last 1,000 lines, however long those are."""
    run = ended(cloud, trigger(cloud)["id"])
    step = box.dbt_cloud.runs_of(JOB)[-1].steps[-1]
    lines = [f"{number:04} {'debug ' * 20}\n" for number in range(1500)]
    step.logs = "".join(lines)
    (*_, cut) = read(cloud, run["id"], include_related="run_steps")["run_steps"]
    (*_, whole) = read(cloud, run["id"], include_related="run_steps,debug_logs")["run_steps"]
    assert cut["debug_logs"] == "".join(lines[-1000:])
    assert whole["debug_logs"] == "".join(lines)
