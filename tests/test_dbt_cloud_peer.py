"""prefect-dbt's own dbt Cloud client, which we did not write, against the sandbox: unchanged, over TLS."""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme
from prefect import flow
from prefect_dbt.cloud import DbtCloudCredentials, DbtCloudJob
from prefect_dbt.cloud.exceptions import DbtCloudJobRunCancelled, DbtCloudJobRunFailed
from prefect_dbt.cloud.jobs import (
    DbtCloudJobRun,
    get_dbt_cloud_job_info,
    retry_dbt_cloud_job_run_subset_and_wait_for_completion,
    trigger_dbt_cloud_job_run_and_wait_for_completion,
)
from prefect_dbt.cloud.models import TriggerJobRunOptions
from prefect_dbt.cloud.runs import get_dbt_cloud_run_artifact, list_dbt_cloud_run_artifacts

from blocks import http
from sandbox import Sandbox
from tasks.dbt_cloud import DbtCloud, dbt_cloud_build
from tasks.dbt_core import DbtResult
from tasks.jobs import JobPolicy
from tests.dbt_cloud_fixtures import JOB, PREFECTS_SOCKETS, STEPS, collected, credentials_of

__all__ = ["collected"]

pytestmark = [
    *PREFECTS_SOCKETS,
    # Prefect's, on every line that a task outside of a flow logs.
    pytest.mark.filterwarnings("ignore:.*without a flow run id:UserWarning"),
    # prefect-dbt's: a copy of a pydantic model, and its clients' sockets.
    pytest.mark.filterwarnings("ignore:The `copy` method is deprecated"),
]


@pytest.fixture
def box(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Sandbox]:
    """The sandbox behind a throw-away certificate, which httpx is told to trust."""
    authority = trustme.CA()
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(tls)
    trusted = tmp_path / "authority.pem"
    authority.cert_pem.write_to_path(str(trusted))
    monkeypatch.setenv("SSL_CERT_FILE", str(trusted))
    # Our own client's settings are made once in a process.
    http._tls.cache_clear()
    with Sandbox(tmp_path, job_seconds=0.2, tls=tls) as running:
        yield running
    http._tls.cache_clear()


@pytest.fixture
def credentials(box: Sandbox) -> DbtCloudCredentials:
    """As prefect-dbt wants it: a bare domain."""
    return credentials_of(box, domain=box.url.removeprefix("https://"))


async def test_trigger_and_wait(box: Sandbox, credentials: DbtCloudCredentials) -> None:
    """Its flow triggers a job with overrides, waits for the end and lists the artifacts."""
    options = TriggerJobRunOptions(cause="a peer", git_branch="main", threads_override=2)
    data = await trigger_dbt_cloud_job_run_and_wait_for_completion(
        dbt_cloud_credentials=credentials,
        job_id=JOB,
        trigger_job_run_options=options,
        poll_frequency_seconds=1,
    )
    (run,) = box.dbt_cloud.runs_of(JOB)
    assert (data["id"], data["status"], data["artifact_paths"]) == (
        run.run_id,
        10,
        ["manifest.json", "run_results.json"],
    )
    assert (run.cause, run.overrides) == ("a peer", {"git_branch": "main", "threads_override": 2})


async def test_artifacts(box: Sandbox, credentials: DbtCloudCredentials) -> None:
    """Its tasks read the list of artifacts, one step's run results and a job's details."""
    run = box.dbt_cloud.trigger(STEPS)
    box.dbt_cloud.finish_run(run.run_id, 10)

    @flow
    async def read() -> tuple[list[str], Any, Any]:
        names = await list_dbt_cloud_run_artifacts(credentials, run.run_id)
        seeds = await get_dbt_cloud_run_artifact(credentials, run.run_id, "run_results.json", step=4)
        return names, seeds, await get_dbt_cloud_job_info(credentials, STEPS)

    names, seeds, job = await read()
    assert names == ["catalog.json", "manifest.json", "run_results.json"]
    assert [one["unique_id"] for one in seeds["results"]] == ["seed.nyc_flights.cancellation_codes"]
    assert job["execute_steps"] == ["dbt seed", "dbt run", "dbt test"]


async def test_block_and_failure(box: Sandbox, credentials: DbtCloudCredentials) -> None:
    """Its job block triggers, waits, and tells a failure and a cancellation as what they are."""
    block = DbtCloudJob(dbt_cloud_credentials=credentials, job_id=JOB, interval_seconds=1, timeout_seconds=20)

    async def end() -> Any:
        run: DbtCloudJobRun = await block.trigger()
        await run.wait_for_completion()
        return await run.fetch_result()

    box.dbt_cloud.set(JOB, outcome="fail", times=1)
    with pytest.raises(DbtCloudJobRunFailed):
        await end()
    box.dbt_cloud.set(JOB, outcome="cancel", times=1)
    with pytest.raises(DbtCloudJobRunCancelled):
        await end()
    assert (await end())["artifact_paths"] == ["manifest.json", "run_results.json"]


async def test_retry_of_what_failed(box: Sandbox, credentials: DbtCloudCredentials) -> None:
    """Its flow reads the steps and results of a failed run and runs only what failed in it."""
    box.dbt_cloud.set(JOB, outcome="fail", node="fct_flights", times=1)
    failed = box.dbt_cloud.trigger(JOB)
    box.dbt_cloud.finish_run(failed.run_id, 20)

    @flow
    async def retry() -> Any:
        return await retry_dbt_cloud_job_run_subset_and_wait_for_completion(
            credentials, failed.run_id, poll_frequency_seconds=1
        )

    assert (await retry())["status"] == 10
    (step,) = box.dbt_cloud.runs_of(JOB)[1].overrides["steps_override"]
    assert step.split()[:4] == ["dbt", "build", "-s", "fct_flights"]
    assert set(step.split()[4:]) == {
        "unique_fct_flights_flight_id",
        "mart_carrier_scorecard",
        "mart_weather_delays",
    }


async def test_cancel(box: Sandbox, credentials: DbtCloudCredentials) -> None:
    """Its client has no cancel of its own; through its `call_endpoint` it cancels."""
    box.dbt_cloud.set(JOB, outcome="stuck", cancel_seconds=0)
    run = box.dbt_cloud.trigger(JOB)
    async with credentials.get_administrative_client() as client:
        await client.call_endpoint("POST", f"/runs/{run.run_id}/cancel/")
        reply = await client.get_run(run.run_id, include_related=["trigger", "run_steps"])
    assert reply.json()["data"]["is_cancelled"] is True


async def test_the_same_saved_block_serves_both(box: Sandbox, credentials: DbtCloudCredentials) -> None:
    """Saved once by the peer, the block is what our task takes by name, over TLS too."""
    await credentials_of(box).save("dbt-cloud-peer", overwrite=True)
    dbt = DbtCloud(credentials="dbt-cloud-peer", job_id=JOB, policy=JobPolicy(poll=0.05))

    @flow
    async def build() -> DbtResult:
        return await dbt_cloud_build(dbt, [])

    result = await build()
    assert len(result.nodes) == 8
    assert str(result.url).startswith("https://127.0.0.1:")
