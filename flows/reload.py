"""Load one connection of a pipeline anew, and build and activate what hangs below it.

For a source that was repaired, or a table that is in doubt. Its blocks are those of the pipeline.
"""

# No `from __future__ import annotations` here: see flows/elt.py.
from typing import Any, Literal

from prefect import flow
from prefect.client.schemas.objects import State

from flows.alerts import Telling, tell_of_end
from flows.elt import elt_chain
from flows.exclusive import alone
from flows.fan_out import KNOWN_ERRORS, refuse
from flows.intervals import DataInterval
from flows.parameters import Notify, NotifyList
from flows.reloading import Pipeline, beside, deployment_of, narrowed, pipeline_of
from flows.report import EltReport
from tasks.cancellation import cancel_open_jobs
from tasks.jobs import EventLoopTaskRunner, limit_concurrency


@flow(
    name="reload",
    task_runner=EventLoopTaskRunner(),
    on_cancellation=[cancel_open_jobs],
    on_crashed=[tell_of_end],
    on_failure=[tell_of_end],
)
def reload(
    connection: str,
    mode: Literal["incremental", "full_refresh"] = "incremental",
    streams: list[str] = [],  # noqa: B006 - never changed; a form shows it as an empty list
    data_interval: DataInterval | None = None,
    pipeline: str = "elt-chain/flights",
    notify: NotifyList = [],  # noqa: B006 - as above
) -> EltReport:
    """Load one connection of a pipeline, then build and activate what hangs below it.

    It is the pipeline's own chain, with its accounts, gates and owners, for a part of it. It waits while a
    run of the pipeline is at work, and such a run waits for it. With `full_refresh` what was loaded is
    deleted first, then loaded from the beginning, and the incremental models below are built from nothing;
    with a data interval they keep the rest and are built for the interval. Safe to retry: the deletion is
    before the load, and each is done once.

    Args:
        connection: Id or name of one of the pipeline's connections.
        mode: `incremental` loads what is new; `full_refresh` deletes and loads everything.
        streams: With `full_refresh`, only these; of Fivetran's written `schema.table`. Empty: all.
        data_interval: Build incremental models for this part of the data only, and never from nothing; what
            is loaded is not limited by it.
        pipeline: The deployment of `elt-chain` whose connection it is.
        notify: Who is told; those of the pipeline if nobody is named.

    Returns:
        The chain's report.

    Raises:
        RunFailed: Something failed; `.report` has every outcome.
        InputError, BlockNotFound, DbtError, VendorError: What was asked for can't be run, and nothing was
            started.
    """
    whole: Pipeline | None = None
    try:
        base = deployment_of(pipeline)
        # What deletes a table has to be alone with all that read it.
        others = beside(base) if mode == "full_refresh" else []
        whole = pipeline_of(base)
        if notify:
            whole = whole.model_copy(update={"notify": notify})
    except KNOWN_ERRORS as error:
        return _refused(error, notify)  # type: ignore[no-any-return]
    # From before the look at the warehouse, which a run of the pipeline may hold, to the last activation.
    with alone(base, *others):
        try:
            limit_concurrency(whole.max_concurrency)
            part = narrowed(whole, connection, mode=mode, streams=streams, interval=data_interval)
        except KNOWN_ERRORS as error:
            return _refused(error, whole.notify)  # type: ignore[no-any-return]
        # Its body, in this very run: a retry of this run finds the jobs that it has started in its journal.
        report: EltReport | State[EltReport] = elt_chain.fn(**part.parameters)
        return report  # type: ignore[return-value]  # Prefect takes a State for the result in it


def _refused(error: Exception, notify: list[Notify]) -> Any:
    Telling(notify).refused(error)
    return refuse(error)
