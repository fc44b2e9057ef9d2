"""What dbt Cloud's API says of a job, a run and a step: the state in `dbt_cloud.py` as its documents.

What is not known is left out rather than null: the specification has no field that may be null.
"""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Any

from starlette.requests import Request

from sandbox import catalog
from sandbox.dbt_cloud import CANCELLED, ERROR, RUNNING, SUCCESS, Job, Run
from sandbox.dbt_cloud_project import DBT_VERSION

_DEBUG_LINES = 1000  # of a step's debug logs, unless all are asked for
_HUMAN = {
    1: "Queued",
    2: "Starting",
    3: "Running",
    10: "Success",
    20: "Error",
    30: "Cancelled",
    40: "Skipped",
}


def job_reply(job: Job) -> dict[str, Any]:
    """The job as HumanReadableJobDefinitionResponse."""
    made = _moment(catalog.CREATED_AT)
    account = {"name": "New York flights", "state": 1}
    project = {
        "name": "nyc_flights",
        "account_id": catalog.DBT_CLOUD_ACCOUNT_ID,
        "state": 1,
        "type": 0,
    }
    environment = {
        "account_id": catalog.DBT_CLOUD_ACCOUNT_ID,
        "project_id": catalog.DBT_CLOUD_PROJECT_ID,
        "name": "Production",
        "state": 1,
        "supports_docs": True,
        "type": "deployment",
        "use_custom_branch": False,
    }
    return {
        "id": job.job_id,
        "account_id": catalog.DBT_CLOUD_ACCOUNT_ID,
        "project_id": catalog.DBT_CLOUD_PROJECT_ID,
        "environment_id": catalog.DBT_CLOUD_ENVIRONMENT_ID,
        "name": job.name,
        "description": "",
        "execute_steps": job.execute_steps,
        "execution": {"timeout_seconds": 0},
        "generate_docs": job.generate_docs,
        "generate_sources": False,
        "run_generate_sources": False,
        "settings": {"threads": 4, "target_name": "prod"},
        "state": 2 if job.deleted else 1,
        "triggers": {"github_webhook": False, "schedule": False},
        "job_type": "other",
        "is_deferrable": False,
        "raw_dbt_version": DBT_VERSION,
        "run_failure_count": 0,
        "lifecycle_webhooks_url": "",
        "job_completion_trigger_condition": {},
        "fusion_readiness": {},
        "account": account,
        "project": project,
        "environment": environment,
        "created_at": made,
        "updated_at": made,
    }


def _job_of_run(job: Job) -> dict[str, Any]:
    """The job as InternalJobDefinition, which has no id."""
    same = ("account_id", "project_id", "environment_id", "name", "description", "execute_steps", "execution")
    more = ("generate_docs", "run_generate_sources", "settings", "state", "triggers", "job_type")
    definition = job_reply(job)
    return {name: definition[name] for name in same + more} | dict.fromkeys(
        ("lifecycle_webhooks", "run_compare_changes", "run_lint", "errors_on_lint_failure"), False
    )


def run_reply(run: Run, request: Request, *, related: tuple[str, ...] = ()) -> dict[str, Any]:
    """The run as RunResponse."""
    word, since, final = run.at()
    status = int(word)
    began = None if run.timeline is None else run.timeline.started
    base = f"{request.url.scheme}://{request.url.netloc}"
    reply: dict[str, Any] = {
        "id": run.run_id,
        "trigger_id": run.run_id + 1_000_000,
        "account_id": catalog.DBT_CLOUD_ACCOUNT_ID,
        "environment_id": catalog.DBT_CLOUD_ENVIRONMENT_ID,
        "project_id": catalog.DBT_CLOUD_PROJECT_ID,
        "job_definition_id": run.job.job_id,
        "job_id": run.job.job_id,
        "status": status,
        "status_humanized": _HUMAN.get(status, "Unheard of"),
        "status_message": _status_message(run, status),
        "dbt_version": run.overrides.get("dbt_version_override", DBT_VERSION),
        "git_branch": run.overrides.get("git_branch", "main"),
        "git_sha": run.overrides.get("git_sha", "9aac0c3990eeeb10"),
        "artifacts_saved": final and bool(run.artifacts()),
        "created_at": _moment(run.created_wall),
        "updated_at": _moment(run.wall(since)),
        "started_at": None if began is None or status == 1 else _moment(run.wall(began)),
        "finished_at": _moment(run.wall(since)) if final else None,
        "in_progress": not final,
        "is_complete": final,
        "is_success": word == SUCCESS,
        "is_error": word == ERROR,
        "is_cancelled": word == CANCELLED,
        "is_running": word == RUNNING,
        "duration": _clock((since if final else time.monotonic()) - run.created),
        "queued_duration": _clock((began if began is not None else time.monotonic()) - run.created),
        "run_duration": _clock(0 if began is None else (since if final else time.monotonic()) - began),
        "href": f"{base}/deploy/{catalog.DBT_CLOUD_ACCOUNT_ID}/projects/{catalog.DBT_CLOUD_PROJECT_ID}"
        f"/runs/{run.run_id}/",
        "retrying_run_id": run.retrying.run_id if run.retrying else None,
        "can_retry": run.why_no_retry() is None,
        "retry_not_supported_reason": run.why_no_retry(),
    }
    if "trigger" in related:
        reply["trigger"] = {
            "cause": run.cause,
            "cause_category": "rerun" if run.retrying else "api",
            "job_definition_id": run.job.job_id,
            **run.overrides,
        }
    if "job" in related:
        reply["job"] = _job_of_run(run.job)
    if "run_steps" in related:
        reply["run_steps"] = [
            _step(run, number, debug="debug_logs" in related) for number in range(len(run.steps))
        ]
    return {key: value for key, value in reply.items() if value is not None}


def _status_message(run: Run, status: int) -> str | None:
    step = run.failed_step
    return f"{step.name} failed" if status == int(ERROR) and step is not None else None


def _step(run: Run, number: int, *, debug: bool) -> dict[str, Any]:
    step = run.steps[number]
    status = int(step.status) if run.final else 3
    if run.status == int(CANCELLED) and step.runs:
        status = int(CANCELLED)
    logs = step.logs if run.shows(run.behaviour.logs_delay) else ""
    return {
        "run_id": run.run_id,
        "account_id": catalog.DBT_CLOUD_ACCOUNT_ID,
        "index": step.index,
        "name": step.name,
        "status": status,
        "status_humanized": _HUMAN[status],
        "logs": logs,
        "debug_logs": logs if debug else "".join(logs.splitlines(keepends=True)[-_DEBUG_LINES:]),
    }


def _moment(epoch: float) -> str:
    return datetime.fromtimestamp(epoch, UTC).isoformat(sep=" ", timespec="microseconds")


def _clock(seconds: float) -> str:
    whole = max(0, int(seconds))
    return f"{whole // 3600:02}:{whole // 60 % 60:02}:{whole % 60:02}"
