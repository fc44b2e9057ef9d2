"""Run activations alone: after a build that another deployment has made, or by hand.

In a chain activations belong into `elt_chain`, which holds back those whose inputs were not built. This is
for a trigger on the end of a build. Its blocks: one per account of each tool.
"""

# No `from __future__ import annotations` here: see flows/elt.py.
from collections.abc import Sequence
from typing import Annotated

from prefect import flow
from pydantic import Field

from flows.alerts import tell_of_end
from flows.jobs_alone import run_jobs
from flows.parameters import Activation, NotifyList
from flows.report import EltReport, Step
from flows.rules import AllowFailure
from tasks.cancellation import cancel_open_jobs
from tasks.jobs import EventLoopTaskRunner


@flow(
    name="activate",
    task_runner=EventLoopTaskRunner(),
    on_cancellation=[cancel_open_jobs],
    on_crashed=[tell_of_end],
    on_failure=[tell_of_end],
)
def activate(
    activations: Annotated[Sequence[Activation], Field(min_length=1)],
    max_concurrency: Annotated[int, Field(ge=1)] = 100,
    allow_failure: AllowFailure = "none",
    notify: NotifyList = [],  # noqa: B006 - never changed; a form shows it as an empty list
) -> EltReport:
    """Run activations, each as a task run of its own; one that fails stops none of the others.

    Safe to retry: one that succeeded is not started again, one that is running is attached to.

    Args:
        activations: What runs, each with its tool, account, owner and policy.
        max_concurrency: How many may run at the same time.
        allow_failure: How much failure the run may bear: `none`, `any`, `{"at_most": n}` or
            `{"required": [ids or names]}`. Only the final state depends on it.
        notify: Who is told of what fails and of its recovery, on Slack and PagerDuty.

    Returns:
        One step per activation. The run is Completed if all succeeded, and PartiallyRefreshed (a Completed
        state) if the rule bears what failed.

    Raises:
        RunFailed: Something failed that the rule does not bear; `.report` has every outcome.
        InputError, BlockNotFound, VendorError: What was asked for can't be run. Nothing was started.
    """
    return run_jobs(  # type: ignore[no-any-return]  # Prefect takes a State for the result in it
        activations,
        "activation",
        lambda jobs: EltReport(steps=[Step.of_job("activation", job) for job in jobs]),
        key="elt-report",
        max_concurrency=max_concurrency,
        allow_failure=allow_failure,
        notify=notify,
    )
