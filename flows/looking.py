"""Looks where nobody pushes: at an S3 prefix for new objects, at a table for new rows, at Airbyte's jobs.

Deployed with an interval, each look hands over what is new as events, and the `once_triggers` of other
deployments say what these start. Listeners that stay up (SQS, Kafka, PostgreSQL's NOTIFY) are in
`deployments/listen.py`.
"""

# No `from __future__ import annotations` here: see flows/elt.py.
from typing import Annotated, Any

from prefect import flow
from prefect.states import Completed
from pydantic import Field

from flows.fan_out import submit
from tasks.events import HandOverError, TriggersWrong
from tasks.jobs import EventLoopTaskRunner, without_traceback
from tasks.looking.airbyte import JobsLook, WatchedJobs, look_at_jobs
from tasks.looking.arrivals import Look, S3Prefix, look_at_prefix
from tasks.looking.memory import MemoryUnreadable
from tasks.looking.rows import DatabaseError, RowsLook, WatchedRows, look_at_rows
from tasks.looking.triggers import triggers_here
from tasks.s3 import S3Error

TriggerFiles = Annotated[
    list[str],
    Field(
        title="Triggers",
        description="Files of deployments whose `once_triggers` say what an event starts; from the "
        "repository's root.",
    ),
]
_FILES = ["deployments/prefect.yaml", "deployments/pipelines.yaml"]
_KNOWN = (S3Error, DatabaseError, HandOverError, MemoryUnreadable, TriggersWrong)


@flow(name="s3-arrivals", task_runner=EventLoopTaskRunner())
def s3_arrivals(
    what: S3Prefix,
    triggers: TriggerFiles = _FILES,
) -> Look:
    """Hand over every object that is new under an S3 prefix as `elt.s3.object.created`, each once.

    An object is moved or deleted only when its runs were created, so a look may be killed at any moment: the
    next one goes on, and starts nothing twice.

    Args:
        what: The prefix, and what becomes of an object that was handed over.
        triggers: Files of deployments, from the root of the repository.

    Returns:
        What was found and handed over.

    Raises:
        S3Error, BlockNotFound: The store or the block is not as it must be.
        HandOverError: The Prefect server did not take everything; the next look goes on.
        TriggersWrong: A file of deployments can't be used. Nothing was looked at.
    """
    without_traceback(*_KNOWN)
    look = submit(look_at_prefix, what, triggers_here(triggers)).result()
    return _ended(look, "NothingNew" if not look.handed_over else "HandedOver")  # type: ignore[no-any-return]


@flow(name="database-changes", task_runner=EventLoopTaskRunner())
def database_changes(
    what: WatchedRows,
    triggers: TriggerFiles = _FILES,
) -> RowsLook:
    """Hand over that rows are new in a database as `elt.database.rows.changed`, with the watermarks.

    The watermark is the Variable that the log names. It is moved only when the event was handed over, so a
    look may be killed at any moment: the next one hands over the same event, and starts nothing twice.

    Args:
        what: The rows, and the column that only grows.
        triggers: Files of deployments, from the root of the repository.

    Returns:
        How many rows were new.

    Raises:
        DatabaseError, BlockNotFound: The database or the block is not as it must be.
        HandOverError: The Prefect server did not take everything; the next look goes on.
        TriggersWrong: A file of deployments can't be used. Nothing was looked at.
    """
    without_traceback(*_KNOWN)
    look = submit(look_at_rows, what, triggers_here(triggers)).result()
    return _ended(look, "NothingNew" if not look.rows else "HandedOver")  # type: ignore[no-any-return]


@flow(name="airbyte-ended", task_runner=EventLoopTaskRunner())
def airbyte_ended(
    what: WatchedJobs,
    triggers: TriggerFiles = _FILES,
) -> JobsLook:
    """Hand over every Airbyte job that has ended as `elt.airbyte.job.…`, as the receiver does.

    An event that has come by a notification as well is the same one, and starts nothing twice. A look may be
    killed at any moment: the next one goes on.

    Args:
        what: Whose jobs.
        triggers: Files of deployments, from the root of the repository.

    Returns:
        How many jobs were handed over.

    Raises:
        VendorError, BlockNotFound: Airbyte or the block is not as it must be.
        HandOverError: The Prefect server did not take everything; the next look goes on.
        TriggersWrong: A file of deployments can't be used. Nothing was looked at.
    """
    without_traceback(*_KNOWN)
    look = submit(look_at_jobs, what, triggers_here(triggers)).result()
    return _ended(look, "NothingNew" if not look.jobs else "HandedOver")  # type: ignore[no-any-return]


def _ended(look: Any, name: str) -> Any:
    # Prefect takes a State for the result in it.
    return Completed(name=name, message=look.message, data=look)
