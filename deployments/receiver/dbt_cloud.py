"""dbt Cloud's webhooks: a run of a job has ended.

Vendor documentation: https://docs.getdbt.com/docs/deploy/webhooks. Retried up to five times. A run that
failed is told twice, by `job.run.errored` at once and by `job.run.completed` when its artifacts are there:
the first to come is the event, and the second is the same one.
"""

from __future__ import annotations

import re

from pydantic import AwareDatetime, BaseModel, Field

from blocks.receiver import DbtCloudWebhook
from blocks.signatures import check_signature
from deployments.receiver.source import Hook, Reading, Source
from tasks.events import EltEvent

_OUTCOMES = {10: "succeeded", 20: "failed", 30: "cancelled"}
_MARKED = re.compile(r"\[elt:[^\[\]]+\]")
"""What our own runs leave in the cause; see `tasks.dbt_cloud_runs`."""


class _Told(BaseModel):
    event_type: str = Field(alias="eventType")


class _Run(BaseModel):
    run_id: str = Field(alias="runId", min_length=1, coerce_numbers_to_str=True)
    job_id: str = Field(alias="jobId", min_length=1, coerce_numbers_to_str=True)
    job_name: str = Field(default="", alias="jobName")
    project: str = Field(default="", alias="projectName")
    environment: str = Field(default="", alias="environmentName")
    status_code: int = Field(alias="runStatusCode")
    message: str | None = Field(default=None, alias="runStatusMessage")
    reason: str = Field(default="", alias="runReason")


class _Ended(BaseModel):
    account_id: int = Field(alias="accountId")
    timestamp: AwareDatetime
    data: _Run


class DbtCloudSource(Source[DbtCloudWebhook]):
    """Each run that has ended is an event; everything else is acknowledged."""

    kind = DbtCloudWebhook

    async def read(self, hook: Hook) -> Reading:
        """See `Source.read`."""
        check_signature("dbt-cloud", hook.headers, hook.body, self.block.secrets)
        what = hook.read(_Told).event_type
        if what not in ("job.run.completed", "job.run.errored"):
            return Reading(ignored=f"{what} is not an event that is used")
        ended = hook.read(_Ended)
        run = ended.data
        if (outcome := _OUTCOMES.get(run.status_code)) is None:
            return Reading(ignored=f"{run.status_code} is not an outcome that is known")
        event = EltEvent(
            name=f"elt.dbt_cloud.run.{outcome}",
            key=f"dbt-cloud:{ended.account_id}:{run.run_id}",
            occurred=ended.timestamp,
            resource_id=f"elt.dbt_cloud.job.{run.job_id}",
            resource_name=run.job_name,
            labels={"elt.started-by": "elt-flows" if _MARKED.search(run.reason) else "dbt-cloud"},
            payload={
                "account_id": str(ended.account_id),
                "job_id": run.job_id,
                "job_name": run.job_name,
                "run_id": run.run_id,
                "project": run.project,
                "environment": run.environment,
                "cause": run.reason,
                "message": None if run.message == "None" else run.message,
            },
        )
        return Reading((event,))
