"""The data interval of a run: which part of the data it is about, as a half-open span of time.

Pure: no dbt and no Prefect API in it; schedules are only asked for their dates.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, date, datetime, time, timedelta, timezone
from itertools import pairwise
from typing import Annotated, Any, Literal
from zoneinfo import ZoneInfo

from dateutil.relativedelta import relativedelta  # type: ignore[import-untyped]
from prefect.server.schemas.schedules import CronSchedule, IntervalSchedule, RRuleSchedule
from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    model_validator,
)

from tasks.jobs import InputError

START_VAR, END_VAR = "data_interval_start", "data_interval_end"
"""The names under which dbt, Python functions and SQL get the two ends."""

MOST = 10_000
"""So many intervals may a range be cut into."""

Unit = Literal["hour", "day", "week", "month", "year"]
Schedule = CronSchedule | IntervalSchedule | RRuleSchedule

_STEPS = {
    "day": relativedelta(days=1),
    "week": relativedelta(weeks=1),
    "month": relativedelta(months=1),
    "year": relativedelta(years=1),
}
_LONGEST_GAP = timedelta(days=366 * 10)  # between two dates of a schedule; 29 February is eight years apart


def _fixed_offset(value: datetime) -> datetime:
    # Python compares two times of one zone by the clock on the wall, which shows an hour a year twice.
    return value.replace(tzinfo=timezone(value.utcoffset() or timedelta(0)), fold=0)


def _utc_if_naive(value: Any) -> Any:
    if isinstance(value, str):
        try:
            value = datetime.fromisoformat(value)
        except ValueError:
            return value  # pydantic says what is wrong with it
    if isinstance(value, date) and not isinstance(value, datetime):
        value = datetime.combine(value, time())  # YAML makes a date of one without quotation marks
    return value.replace(tzinfo=UTC) if isinstance(value, datetime) and value.tzinfo is None else value


Moment = Annotated[AwareDatetime, BeforeValidator(_utc_if_naive), AfterValidator(_fixed_offset)]


class DataInterval(BaseModel):
    """A span of time, its start included and its end not. Of a time without an offset UTC is assumed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    start: Moment = Field(title="Start", description="The first moment, such as 2026-01-01T00:00:00+01:00.")
    end: Moment = Field(title="End", description="The first moment that is not in it any more.")

    @model_validator(mode="after")
    def _forwards(self) -> DataInterval:
        if self.start >= self.end:
            raise ValueError(f"a data interval ends after it starts: {self.start} is not before {self.end}")
        return self

    @property
    def vars(self) -> dict[str, str]:
        """Both ends in ISO 8601, with the offset that they have in the time zone of the schedule."""
        return {START_VAR: self.start.isoformat(), END_VAR: self.end.isoformat()}

    @property
    def utc(self) -> tuple[datetime, datetime]:
        """Both ends in UTC and without an offset, as dbt takes the event times of microbatch models."""
        return self.start.astimezone(UTC).replace(tzinfo=None), self.end.astimezone(UTC).replace(tzinfo=None)

    @property
    def label(self) -> str:
        """For people: `2026`, `2026-01` and `2026-01-31` where it is just that, else both ends."""
        midnights = self.start.time() == self.end.time() == time(0)
        for unit, form in (("year", "%Y"), ("month", "%Y-%m"), ("day", "%Y-%m-%d")):
            begins = self.start.replace(tzinfo=None)
            first = {"year": begins.timetuple().tm_yday == 1, "month": begins.day == 1}.get(unit, True)
            if midnights and first and self.end.replace(tzinfo=None) == begins + _STEPS[unit]:
                return begins.strftime(form)
        form = "%Y-%m-%d" if midnights else "%Y-%m-%d %H:%M"
        return f"{self.start.strftime(form)} to {self.end.strftime(form)}"


async def previous_date(schedule: Schedule, date: datetime) -> datetime | None:
    """The date of a schedule before one of its dates, with the schedule's own rules for clock changes.

    Args:
        schedule: A cron, interval or RRule schedule.
        date: A moment with an offset.

    Returns:
        None if there is none in the ten years before it.
    """
    # Schedules only tell what comes next, so it is asked from further and further back.
    back = timedelta(minutes=1)
    while True:
        latest: datetime | None = None
        start = date - back
        while found := await schedule.get_dates(n=500, start=start, end=date):
            latest = max((each for each in found if each < date), default=latest)
            if len(found) < 500 or found[-1] >= date:
                break
            start = found[-1] + timedelta(microseconds=1)
        if latest is not None or back > _LONGEST_GAP:
            return latest
        back *= 2


def zone_of(name: str) -> ZoneInfo:
    """The time zone of this name.

    Raises:
        InputError: There is none.
    """
    try:
        return ZoneInfo(name)
    except (ValueError, OSError, KeyError) as error:
        raise InputError(f"There is no time zone {name!r}: write it as in Europe/Berlin, or UTC.") from error


async def split(
    start: datetime, end: datetime, *, unit: Unit = "day", count: int = 1, cron: str = ""
) -> list[DataInterval]:
    """Cut a range into intervals; the last may be shorter.

    Days, weeks, months and years follow the calendar of the range's time zone, so that a day may have 23 or
    25 hours. Hours are of 60 minutes.

    Args:
        start: Where the first begins, in the wanted time zone.
        end: Where the last ends, in the same.
        unit: What an interval is long.
        count: How many of these.
        cron: Cut at the dates of this expression instead.

    Raises:
        InputError: The range is empty or makes too many intervals, or the cron expression is none.
    """
    if start.timestamp() >= end.timestamp():  # see _fixed_offset
        raise InputError(f"The range is empty: {start.isoformat()} is not before {end.isoformat()}.")
    cuts = await _dates(start, end, cron) if cron else _steps(start, unit, count)
    bounds = [start]
    for cut in cuts:
        if cut.timestamp() >= end.timestamp():
            break
        bounds.append(cut)
        if len(bounds) > MOST:
            raise InputError(
                f"That makes more than {MOST:,} intervals: take longer ones, or a shorter range."
            )
    bounds.append(end)
    return [DataInterval(start=a, end=b) for a, b in pairwise(bounds)]


def _steps(start: datetime, unit: Unit, count: int) -> Iterator[datetime]:
    number = 0
    while True:
        number += count
        if unit == "hour":
            yield (start.astimezone(UTC) + timedelta(hours=number)).astimezone(start.tzinfo)
        else:
            yield start + _STEPS[unit] * number  # by the clock on the wall


async def _dates(start: datetime, end: datetime, cron: str) -> list[datetime]:
    try:
        schedule = CronSchedule(cron=cron, timezone=str(start.tzinfo))
    except ValueError as error:
        raise InputError(f"{cron!r} is no cron expression: {error}") from error
    cuts: list[datetime] = []
    begin = start
    while len(cuts) <= MOST:
        found = await schedule.get_dates(n=500, start=begin, end=end)
        cuts += (date.astimezone(start.tzinfo) for date in found if date > start.astimezone(UTC))
        if len(found) < 500:
            break
        begin = found[-1] + timedelta(microseconds=1)
    return cuts


def covered(interval: DataInterval, done: Iterable[DataInterval]) -> bool:
    """Whether intervals that are done leave nothing of this one to do.

    Args:
        interval: The interval.
        done: In any order; they may overlap.
    """
    reached = interval.start
    for other in sorted(done, key=lambda each: each.start):
        if other.start > reached:
            break
        reached = max(reached, other.end)
    return reached >= interval.end


def fill_in(statements: Sequence[str], interval: DataInterval | None) -> list[str]:
    """SQL with `{{ data_interval_start }}` and `{{ data_interval_end }}` replaced.

    Raises:
        InputError: They are in it, and the run has no interval.
    """
    filled: list[str] = []
    for statement in statements:
        for name in (START_VAR, END_VAR):
            placeholder = f"{{{{ {name} }}}}"
            if placeholder in statement:
                if interval is None:
                    raise InputError(
                        f"A statement has {placeholder} in it, and this run has no data interval."
                    )
                statement = statement.replace(placeholder, interval.vars[name])
        filled.append(statement)
    return filled
