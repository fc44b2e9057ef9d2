"""A desk from which one job of the sandbox's dbt Cloud is run, through the engine or through its tasks."""

from __future__ import annotations

from typing import Any

import pytest
from prefect import flow
from prefect_dbt.cloud import DbtCloudCredentials
from pydantic import SecretStr

from sandbox import Sandbox, catalog
from sandbox.dbt_cloud import Run
from tasks import dbt_cloud_results
from tasks.dbt.model import DbtResult
from tasks.dbt_cloud import DbtCloud, Overrides, dbt_cloud_build
from tasks.dbt_cloud_runs import DbtCloudVendor, RunRequest
from tasks.jobs import JobPolicy, JobResult, MemoryJournal, run_job
from tests.jobs_fixtures import PREFECTS_SOCKETS, collected

__all__ = ["JOB", "PREFECTS_SOCKETS", "Desk", "cloud", "collected", "credentials_of"]

JOB = 302  # scripted, `dbt build`
STEPS = 303  # scripted, three commands and docs


def credentials_of(box: Sandbox, **fields: Any) -> DbtCloudCredentials:
    """prefect-dbt's own block, as a user has it, but for the address."""
    values = {
        "api_key": SecretStr(catalog.DBT_CLOUD_TOKEN),
        "account_id": catalog.DBT_CLOUD_ACCOUNT_ID,
        "domain": box.dbt_cloud_url,
        **fields,
    }
    return DbtCloudCredentials(**values)


class Desk:
    """Runs one job, and knows what became of it at dbt Cloud. Attempts of one desk share a journal."""

    def __init__(self, box: Sandbox, job: int = JOB) -> None:
        self.box = box
        self.job = job
        self.credentials = credentials_of(box)
        self.vendor = DbtCloudVendor(self.credentials)
        self.journal = MemoryJournal()

    def behave(self, **changes: Any) -> None:
        self.box.dbt_cloud.set(self.job, **changes)

    def fault(self, **fields: Any) -> int:
        return self.box.faults.add(vendor="dbt_cloud", **fields)

    async def run(
        self, overrides: Overrides | None = None, retries: int | None = None, **policy: Any
    ) -> JobResult:
        request = RunRequest(
            str(self.job),
            "nightly",
            cause="the tests",
            overrides=overrides or Overrides(),
            retries=retries,
            alone=policy.get("on_active", "queue") != "queue",
        )
        settings = JobPolicy(**{"poll": 0.03, "timeout": 90.0, **policy})
        return await run_job(self.vendor, request, settings, journal=self.journal)

    def parameters(self, **fields: Any) -> DbtCloud:
        settings = JobPolicy(**{"poll": 0.05, "timeout": 90.0, **fields.pop("policy", {})})
        values = {"credentials": self.credentials, "job_id": self.job, "policy": settings, **fields}
        return DbtCloud(**values)

    async def build(self, exclude: list[str] | None = None, **fields: Any) -> DbtResult:
        """Through the task, in a flow run of its own."""
        parameters = self.parameters(**fields)

        @flow
        async def only_dbt() -> DbtResult:
            return await dbt_cloud_build(parameters, exclude or [])

        return await only_dbt()

    @property
    def runs(self) -> list[Run]:
        return self.box.dbt_cloud.runs_of(self.job)

    @property
    def ids(self) -> list[str]:
        return [str(run.run_id) for run in self.runs]

    def posts(self, path: str = "/run/$") -> int:
        return self.box.requests.count(vendor="dbt_cloud", method="POST", path=path)

    def gets(self, path: str = "/runs/") -> int:
        return self.box.requests.count(vendor="dbt_cloud", method="GET", path=path)


@pytest.fixture
def cloud(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> Desk:
    """With short patience, so that what never comes does not take a minute."""
    monkeypatch.setattr(DbtCloudVendor, "grace", 0.5)
    monkeypatch.setattr(dbt_cloud_results, "ARTIFACTS_PATIENCE", 1.5)
    monkeypatch.setattr(dbt_cloud_results, "LOGS_PATIENCE", 1.5)
    return Desk(sandbox)
