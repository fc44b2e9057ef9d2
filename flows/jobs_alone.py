"""A flow of jobs and nothing else: looked up, run side by side, and told of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any

from flows.alerts import Telling
from flows.fan_out import (
    KNOWN_ERRORS,
    Checking,
    conclude,
    final_state,
    ids_and_names,
    publish,
    refuse,
    refuse_none,
    run_each,
)
from flows.parameters import Notify
from flows.report import EltReport, SyncReport
from flows.rules import AllowFailure, check_rule
from tasks.jobs import JobResult, Parameters, limit_concurrency


def run_jobs(
    requests: Sequence[Parameters],
    what: str,
    report: Callable[[list[JobResult]], SyncReport | EltReport],
    *,
    key: str,
    max_concurrency: int,
    allow_failure: AllowFailure,
    notify: Sequence[Notify],
) -> Any:
    """The whole of such a flow.

    Args:
        requests: The jobs.
        what: One of them in a word, such as `sync`.
        report: Makes the report of their outcomes, which come in the order of the jobs.
        key: Of the artifact that shows the report.
        max_concurrency: How many may run at the same time.
        allow_failure: How much failure the run may bear.
        notify: Who is told of what fails and of its recovery.

    Returns:
        The final state. Calling the flow from a script returns the report or raises what is in the state.
    """
    limit_concurrency(max_concurrency)
    began = datetime.now(UTC)
    telling = Telling(notify)
    try:
        refuse_none(requests, what)
        checked = Checking(requests).result(allow_failure)
        telling.checked()
        check_rule(allow_failure, ids_and_names(found.request for found in checked))
    except KNOWN_ERRORS as error:
        telling.refused(error)
        return refuse(error)
    concluded = conclude(report(run_each(checked)), allow_failure, began=began)
    publish(concluded, key)
    telling.ended(concluded)
    return final_state(concluded)
