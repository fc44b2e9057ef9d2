"""Sync many connections at the same time, without a transform.

For when the warehouse is built elsewhere, or for an extra load by hand. Its blocks: one per account that the
connections are on.
"""

# No `from __future__ import annotations` here: `serve()` sends the flow to its process as a pickle, in which
# the types of its parameters are found only if they are more than text.
from collections.abc import Sequence
from typing import Annotated

from prefect import flow
from pydantic import Field

from flows.alerts import tell_of_end
from flows.fan_out import steps_of
from flows.jobs_alone import run_jobs
from flows.parameters import NotifyList, Sync
from flows.report import SyncReport
from flows.rules import AllowFailure
from tasks.cancellation import cancel_open_jobs
from tasks.jobs import EventLoopTaskRunner


@flow(
    name="sync-connections",
    task_runner=EventLoopTaskRunner(),
    on_cancellation=[cancel_open_jobs],
    on_crashed=[tell_of_end],
    on_failure=[tell_of_end],
)
def sync_connections(
    syncs: Sequence[Sync],
    max_concurrency: Annotated[int, Field(ge=1)] = 100,
    allow_failure: AllowFailure = "none",
    notify: NotifyList = [],  # noqa: B006 - never changed; a form shows it as an empty list
) -> SyncReport:
    """Sync connections, each as a task run of its own; one that fails stops none of the others.

    Safe to retry: a sync that succeeded is not started again, one that is running is attached to.

    Args:
        syncs: The connections, each with its server, owner and policy.
        max_concurrency: How many may run at the same time.
        allow_failure: How much failure the run may bear: `none`, `any`, `{"at_most": n}` or
            `{"required": [ids or names]}`. Only the final state depends on it: all connections are synced.
        notify: Who is told of what fails and of its recovery, on Slack and PagerDuty.

    Returns:
        One outcome per connection. The run is Completed if all succeeded, and PartiallyRefreshed (a
        Completed state) if the rule bears what failed.

    Raises:
        RunFailed: Something failed that the rule does not bear; `.report` has every outcome.
        InputError, BlockNotFound, VendorError: What was asked for can't be run. Nothing was started.
    """
    return run_jobs(  # type: ignore[no-any-return]  # Prefect takes a State for the result in it
        syncs,
        "sync",
        lambda jobs: SyncReport(outcomes=jobs, steps=steps_of(jobs)),
        key="sync-report",
        max_concurrency=max_concurrency,
        allow_failure=allow_failure,
        notify=notify,
    )
