"""Build the increments of a range of time, interval by interval.

For history that is to be built anew or for the first time. It needs a block only for whom to tell.
"""

# No `from __future__ import annotations` here: see flows/elt.py.
from datetime import UTC, date, datetime, time
from typing import Annotated, Any
from zoneinfo import ZoneInfo

from prefect import flow
from prefect.logging import get_run_logger
from prefect.states import Completed, Failed
from prefect.utilities.asyncutils import run_coro_as_sync
from pydantic import BaseModel, Field, WithJsonSchema

from flows.alerts import Telling, tell_of_end
from flows.backfilling import FEW, LAST, Backfilling, for_interval, target_folder
from flows.fan_out import KNOWN_ERRORS, conclude, refuse, submit
from flows.parameters import NotifyList
from flows.report import EltReport, Step, StepState
from tasks.backfill_memory import IntervalRecord, IntervalState
from tasks.dbt_core import DbtCore, DbtInputError, DbtPlan, dbt_plan
from tasks.intervals import DataInterval, Unit, split, zone_of
from tasks.jobs import EventLoopTaskRunner, without_traceback

Day = Annotated[
    # In this order: of a text, pydantic takes a midnight for the day, and its offset would be lost.
    datetime | date,
    # A form shows a calendar; in a deployment and by API it may be a time as well.
    WithJsonSchema({"type": "string", "format": "date"}),
]


class BackfillReport(BaseModel):
    """What became of every interval.

    Attributes:
        message: How far it is, in one sentence.
        intervals: In the order in which they were asked for.
    """

    message: str
    intervals: list[IntervalRecord]


class BackfillFailed(Exception):
    """Not every interval was built; `.report` has them all."""

    def __init__(self, report: BackfillReport) -> None:
        super().__init__(report.message)
        self.report = report

    def __reduce__(self) -> tuple[Any, ...]:
        # Prefect pickles exceptions into result storage; the default would pass the message as `report`.
        return (type(self), (self.report,))


@flow(name="backfill", task_runner=EventLoopTaskRunner(), on_crashed=[tell_of_end], on_failure=[tell_of_end])
def backfill(
    start: Day,
    end: Day,
    every: Unit = "month",
    count: Annotated[int, Field(ge=1)] = 1,
    cron: str = "",
    timezone: str = "UTC",
    at_once: Annotated[int, Field(ge=1, le=64)] = 1,
    again: bool = False,
    stop_on_failure: bool = False,
    *,
    dbt: DbtCore,  # here and not at the front, that the form begins with the range
    notify: NotifyList = [],  # noqa: B006 - never changed; a form shows it as an empty list
) -> BackfillReport:
    """Build incremental models for a range of time, interval by interval.

    What they are built from is built once before, what is built on them once after all intervals are done,
    with the tests. Which intervals are done is kept in the Prefect API, as the artifact `backfill-…`: another
    run of the same skips them, whatever became of this one.

    Args:
        start: The first day, or moment; in `timezone` where it has no offset.
        end: The first day, or moment, that is not built any more.
        every: How long an interval is: an hour, day, week, month or year.
        count: So many of these.
        cron: Cut the range at the dates of this expression instead.
        timezone: Of the range, such as Europe/Berlin.
        at_once: How many intervals are built at a time; on DuckDB it is one.
        again: Also build what is done already.
        stop_on_failure: Begin no interval any more once one has failed.
        dbt: The project, and what of it; everything if it selects nothing.
        notify: Who is told of what fails and of its recovery.

    Returns:
        Every interval with its state. The run is Completed if all are done, and Failed otherwise; then it is
        called PartiallyDone if some are.

    Raises:
        BackfillFailed: An interval, or what is built before or after them, failed; `.report` has all of them.
        DbtError, InputError, BlockNotFound: What was asked for can't be done, and nothing was started.
    """
    began = datetime.now(UTC)
    logger = get_run_logger()
    telling = Telling(notify)
    try:
        zone = zone_of(timezone)
        cutting = split(_moment(start, zone), _moment(end, zone), unit=every, count=count, cron=cron)
        intervals: list[DataInterval] = run_coro_as_sync(cutting) or []
        _refuse_what_no_interval_bears(dbt)
        telling.checked()
        work = Backfilling(dbt, _plan(dbt, intervals), intervals, again)
        most, why = work.parts.at_once(at_once, work.plan.adapter)
    except KNOWN_ERRORS as error:
        telling.refused(error)
        return refuse(error)  # type: ignore[return-value]  # Prefect takes a State for the result in it
    if why:
        logger.warning("One interval at a time, not %d: %s.", at_once, why)
    if work.complete:
        work.table.write()
        logger.info("Every interval is done already; `again` builds them again.")
    else:
        logger.info("%s. Building %s.", work.table.sentence, _some(work.left))
        work.run(at_once=most, stop_on_failure=stop_on_failure)
    report = _concluded(work, began)
    telling.ended(report)
    return _final_state(work)  # type: ignore[no-any-return]


def _plan(dbt: DbtCore, intervals: list[DataInterval]) -> DbtPlan:
    """What dbt would build. For many intervals it is parsed with the last of them too, to be compared."""
    folder = target_folder(dbt)
    planning = [submit(dbt_plan, for_interval(dbt, intervals[0], folder))]
    if len(intervals) > FEW:
        planning.append(submit(dbt_plan, for_interval(dbt, intervals[-1], folder / LAST)))
    first, *_ = [each.result() for each in planning]
    return first


def _moment(value: date | datetime, zone: ZoneInfo) -> datetime:
    if not isinstance(value, datetime):
        return datetime.combine(value, time.min, zone)
    return value.astimezone(zone) if value.tzinfo else value.replace(tzinfo=zone)


def _refuse_what_no_interval_bears(dbt: DbtCore) -> None:
    """See that the build can be repeated for each interval.

    Raises:
        DbtInputError: It can't.
    """
    if dbt.full_refresh:
        raise DbtInputError(
            "A full refresh in every interval would leave only the last of them: refresh the models first "
            "(dbt-full-refresh), or build the range in one interval."
        )
    if dbt.data_interval:
        raise DbtInputError("The intervals come from start and end: leave data_interval of dbt empty.")
    if dbt.command != "build":
        raise DbtInputError(f"A backfill builds, and does not {dbt.command}: leave the command of dbt empty.")
    if dbt.engine != "subprocess":
        raise DbtInputError("Only with engine='subprocess' can dbt build intervals, and be stopped.")


def _some(intervals: list[DataInterval]) -> str:
    if not intervals:
        return "what is built on them"
    if len(intervals) <= 3:
        return ", ".join(interval.label for interval in intervals)
    return f"{len(intervals)} intervals, from {intervals[0].label} to {intervals[-1].label}"


def _concluded(work: Backfilling, began: datetime) -> EltReport:
    """The report for whoever is told."""
    name = f"backfill ({work.plan.project})"
    step = Step(
        kind="transform",
        tool=work.dbt.tool,
        resource_id=f"{work.plan.project}/backfill",
        name=name,
        state=StepState.SUCCEEDED if _complete(work) else StepState.FAILED,
        owner=work.dbt.owner,
        message=_message(work),
    )
    return conclude(EltReport(steps=[step], nodes=list(work.nodes.values())), "none", began=began)


def _complete(work: Backfilling) -> bool:
    return not work.trouble and len(work.table.of(IntervalState.DONE)) == len(work.table.records)


def _message(work: Backfilling) -> str:
    parts = [work.table.sentence]
    if earlier := [record for record in work.table.of(IntervalState.DONE) if record.earlier]:
        parts.append(f"{len(earlier)} of them done before this attempt")
    if failed := work.table.of(IntervalState.FAILED):
        parts.append("failed: " + ", ".join(f"{each.interval.label} ({each.message})" for each in failed[:3]))
    if work.trouble:
        parts.append(work.trouble)
    return "; ".join(parts)


def _final_state(work: Backfilling) -> Any:
    report = BackfillReport(message=_message(work), intervals=work.table.records)
    if _complete(work):
        return Completed(message=report.message, data=report)
    without_traceback()
    some = work.table.of(IntervalState.DONE)
    name = "PartiallyDone" if some else "Failed"
    return Failed(name=name, message=report.message, data=BackfillFailed(report))
