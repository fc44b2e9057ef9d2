"""dbt Cloud's part of the comparison with the vendors' own OpenAPI files: its calls, and the file's slips."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from blocks.dbtcloud import api_of
from blocks.dbtcloud_model import Overrides
from sandbox import catalog
from tasks.dbt_cloud_results import outcome_of
from tasks.dbt_cloud_runs import DbtCloudVendor, RunRequest
from tasks.jobs import JobError, JobPolicy, JobResult, JobTimeout, MemoryJournal, run_job
from tests.dbt_cloud_fixtures import JOB, STEPS, credentials_of
from tests.spec_drives import Drive
from tests.spec_fixtures import Contract, Slip, read

PREFIX = "/api/v2"
_ACCOUNT = "/api/v2/accounts/{account_id}"
_QUICK = JobPolicy(poll=0.03, timeout=60, outage=60)
_REFUSAL = {
    "description": "",
    "content": {
        "application/json": {
            "schema": {
                "type": "object",
                "required": ["status", "data"],
                "properties": {
                    "status": {"$ref": "#/components/schemas/ResponseStatus"},
                    "data": {"enum": [None], "nullable": True},
                },
            }
        }
    },
}
# The file knows 200 and nothing else; that requests are refused is in the docs and in issues.
_REFUSED = [
    ("/jobs/", "get", 401),
    ("/jobs/", "get", 403),
    ("/jobs/", "get", 429),
    ("/jobs/{id}/", "get", 404),
    ("/jobs/{job_id}/run/", "post", 400),
    ("/jobs/{job_id}/run/", "post", 404),
    ("/jobs/{job_id}/artifacts/{remainder}", "get", 404),
    ("/runs/", "get", 400),
    ("/runs/{id}/", "get", 404),
    ("/runs/{run_id}/artifacts/{remainder}", "get", 404),
    ("/runs/{run_id}/cancel/", "post", 400),
    ("/runs/{run_id}/retry/", "get", 400),
    ("/runs/{run_id}/retry/", "post", 400),
]
_TIMES = {
    "RunResponse": ("created_at", "updated_at", "started_at", "finished_at"),
    "HumanReadableJobDefinitionResponse": ("created_at", "updated_at"),
}
_LISTS = ("pk__in", "status__in")  # those that our client sends


def dbt_cloud_contract(files: Path) -> Contract:
    """The file, with its slips."""
    document = read(files / "dbt-cloud-v2.yaml")
    parameters = document["paths"][f"{_ACCOUNT}/runs/"]["get"]["parameters"]
    place: Any = {parameter["name"]: number for number, parameter in enumerate(parameters)}
    slips = [
        *(
            Slip(
                "the server wants a list as JSON text in brackets (airflow 40047)",
                ("paths", f"{_ACCOUNT}/runs/", "get", "parameters", place[name], "schema"),
                {"type": "string", "pattern": r"^\[.*\]$"},
            )
            for name in _LISTS
        ),
        *(
            Slip(
                f"{method} {path} is refused with {status}",
                ("paths", f"{_ACCOUNT}{path}", method, "responses", str(status)),
                _REFUSAL,
            )
            for path, method, status in _REFUSED
        ),
        *(
            Slip(
                "live times have a blank in place of the T",
                ("components", "schemas", schema, "properties", name, "format"),
            )
            for schema, names in _TIMES.items()
            for name in names
        ),
        Slip(
            "include_related=most_recent_run adds it",
            ("components", "schemas", "HumanReadableJobDefinitionResponse", "properties", "most_recent_run"),
            {"$ref": "#/components/schemas/RunResponse"},
        ),
        Slip(
            "live steps say it in words too, and prefect-dbt reads those",
            ("components", "schemas", "RunStep", "properties", "status_humanized"),
            {"type": "string"},
        ),
    ]
    return Contract(document, PREFIX, "https://cloud.getdbt.com/api/v2", slips)


async def drive_dbt_cloud(drive: Drive) -> None:
    """dbt Cloud."""
    cloud = drive.sandbox.dbt_cloud
    credentials = credentials_of(drive.sandbox)
    vendor = DbtCloudVendor(credentials)

    async def run(job: int = JOB, *, policy: JobPolicy = _QUICK, **fields: Any) -> JobResult:
        request = RunRequest(str(job), "nightly", cause="the comparison", **fields)
        return await run_job(vendor, request, policy, journal=MemoryJournal())

    overrides = Overrides(
        git_sha="9aac0c39",
        git_branch="main",
        schema_override="pr_1",
        dbt_version_override="1.11.2",
        threads_override=2,
        target_name_override="ci",
        generate_docs_override=True,
        timeout_seconds_override=600,
        steps_override=["dbt run"],
    )
    async with api_of(credentials) as api:
        await run(overrides=overrides)
        done = await run(STEPS)
        await outcome_of(api, str(done.job_id))
        await api.job(str(JOB))
        await api.job_artifact(str(JOB), "manifest.json")
        await api.job_artifact(str(JOB), "nothing.json")
        assert await api.artifact(str(done.job_id), "nothing.json", 4) is None
        await api.runs_since(str(JOB), datetime.now(UTC) - timedelta(hours=1))
        # One fails and is taken up where it broke, one is cancelled by us; five at once are watched by lists.
        cloud.set(JOB, outcome="fail", times=1)
        with pytest.raises(JobError) as failed:
            await run()
        await outcome_of(api, str(failed.value.result.job_id))
        await run(retries=int(str(failed.value.result.job_id)))
        cloud.set(JOB, outcome="stuck", times=1)
        with pytest.raises(JobTimeout):
            await run(policy=_QUICK.model_copy(update={"timeout": 0.2}))
        other = cloud.trigger(JOB)
        await run(alone=True, policy=_QUICK.model_copy(update={"on_active": "adopt"}))
        assert other.final
        await asyncio.gather(*(run(each) for each in cloud.add_jobs(5, duration=0.2)))

    drive.base = f"{drive.sandbox.url}/api/v2/accounts/{catalog.DBT_CLOUD_ACCOUNT_ID}"
    await drive.ask("GET", "/jobs/", 401)
    drive.headers = {"Authorization": f"Bearer {catalog.DBT_CLOUD_TOKEN}"}
    here, drive.base = drive.base, f"{drive.sandbox.url}/api/v2/accounts/1"
    await drive.ask("GET", "/jobs/", 403)
    drive.base = here
    await drive.ask("GET", "/jobs/?limit=2&offset=1&name__icontains=scripted")
    await drive.ask("GET", "/jobs/9/", 404)
    await drive.ask("GET", f"/jobs/{JOB}/?include_related=most_recent_run")
    await drive.ask(
        "POST", f"/jobs/{JOB}/run/", data={"cause": "a form", "steps_override": ["dbt run", "dbt test"]}
    )
    await drive.ask("POST", f"/jobs/{JOB}/run/", 400, json={"cause": "x" * 256})
    await drive.ask("POST", f"/jobs/{JOB}/run/", 400, json={"cause": "x", "git_sha": None})
    await drive.ask("POST", "/jobs/9/run/", 404, json={"cause": "x"})
    again = (await drive.ask("POST", f"/jobs/{JOB}/rerun/"))["data"]["id"]
    await drive.ask("GET", "/runs/?pk__in=1,2", 400)
    day = '["2026-01-01T00:00:00Z","2100-01-01T00:00:00Z"]'
    filters = {
        "created_at__range": day,
        "finished_at__range": day,
        "status__in": "[10,20]",
        "project_id__in": f"[{catalog.DBT_CLOUD_PROJECT_ID}]",
        "include_related": "trigger,job",
        "order_by": "-finished_at",
        "limit": "2",
    }
    found = await drive.ask("GET", "/runs/", params=filters)
    assert len(found["data"]) == 2
    related = "trigger,job,run_steps,debug_logs"
    await drive.ask("GET", f"/runs/{again}/?include_related={related}")
    await drive.ask("GET", "/runs/9/", 404)
    await drive.ask("GET", f"/runs/{again}/retry/", 400)
    await drive.ask("POST", f"/runs/{again}/retry/", 400)
    await drive.ask("GET", f"/runs/{failed.value.result.job_id}/retry/")
    cloud.settings.cancel_finished = "refused"
    await drive.ask("POST", f"/runs/{done.job_id}/cancel/", 400)
    cloud.settings.requests_per_minute = 1
    await drive.ask("GET", "/jobs/", 429)
