"""What the control API shows of the stage's parts: more than their vendors do."""

from __future__ import annotations

from typing import Any

from sandbox.airbyte_jobs import Connection
from sandbox.census import Sync as CensusSync
from sandbox.dashboards import Dashboard
from sandbox.dbt_cloud import Job, Run
from sandbox.fivetran import Connection as FivetranConnection
from sandbox.hightouch import Sync
from sandbox.hightouch_sequences import Sequence


def dbt_job(job: Job) -> dict[str, Any]:
    """A job with its behaviour."""
    return {
        "id": job.job_id,
        "name": job.name,
        "deleted": job.deleted,
        "steps": job.execute_steps,
        **job.behaviour.model_dump(),
    }


def dbt_run(run: Run) -> dict[str, Any]:
    """A run of a job with its steps."""
    steps = [{"name": step.name, "status": step.status.name, "logs": step.logs} for step in run.steps]
    return {"id": run.run_id, "status": run.status, "cause": run.cause, "steps": steps, **run.overrides}


def dashboard(board: Dashboard) -> dict[str, Any]:
    """A dashboard with its refreshes."""
    return {
        "id": board.spec.dashboard_id,
        "name": board.spec.name,
        "product": board.spec.product,
        "refreshable": board.refreshable,
        "refreshes": [{"id": r.refresh_id, "state": r.at()[0]} for r in list(board.refreshes)],
        **board.behaviour.model_dump(),
    }


def fivetran(connection: FivetranConnection) -> dict[str, Any]:
    """A connection with its syncs, which Fivetran's API has not."""
    syncs = [
        {
            "id": sync.sync_id,
            "started_by": sync.started_by,
            "forced": sync.forced,
            "historical": sync.historical,
            "state": sync.word,
            "rows": sync.timeline.work.rows if sync.timeline.work else None,
        }
        for sync in list(connection.syncs)
    ]
    return {**connection.reply(), **connection.behaviour.model_dump(), "syncs": syncs}


def connection(connection: Connection) -> dict[str, Any]:
    """A connection of Airbyte's with its behaviour."""
    return {
        "connectionId": connection.connection_id,
        "name": connection.name,
        "status": connection.status,
        **connection.behaviour.model_dump(),
    }


def sync(sync: Sync) -> dict[str, Any]:
    """A sync of Hightouch's with its behaviour."""
    return {
        "id": sync.spec.sync_id,
        "slug": sync.spec.slug,
        "disabled": sync.disabled,
        **sync.behaviour.model_dump(),
    }


def sequence(sequence: Sequence) -> dict[str, Any]:
    """A sequence of Hightouch's with its runs."""
    return {
        "id": sequence.spec.sequence_id,
        "name": sequence.spec.name,
        "syncs": sequence.spec.sync_ids,
        **sequence.behaviour.model_dump(),
        "runs": [run.reply() for run in list(sequence.runs)],
    }


def census(sync: CensusSync) -> dict[str, Any]:
    """A sync of Census's with its runs."""
    return {
        "id": sync.spec.sync_id,
        "label": sync.spec.label,
        "paused": sync.paused,
        **sync.behaviour.model_dump(),
        "runs": [run.reply() for run in list(sync.runs)],
    }
