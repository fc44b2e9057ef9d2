"""The data interval of a run: as a flow takes it, and given on to the transform."""

# No `from __future__ import annotations` here: see flows/elt.py.
from typing import Annotated, Literal, TypeVar, cast

from pydantic import Field, ValidationError

from blocks.fields import words_of
from flows.fan_out import submit
from tasks.dbt_cloud_model import DbtCloud
from tasks.dbt_core import DbtCore
from tasks.intervals import DataInterval
from tasks.jobs import InputError
from tasks.schedules import scheduled_interval

__all__ = ["DataInterval", "IntervalOfRun", "given", "interval_of_run"]

IntervalOfRun = Annotated[
    Literal["none", "schedule"] | DataInterval,
    Field(
        title="Data interval",
        description="Which part of the data the run is about. schedule: from the date of the schedule before "
        "this run's to this run's, none for a run by hand. Or a start and an end.",
    ),
]
"""`none`, `schedule`, or `{"start": …, "end": …}`."""

T = TypeVar("T", bound=DbtCore | DbtCloud)


def interval_of_run(asked: Literal["none", "schedule"] | DataInterval) -> DataInterval | None:
    """The interval of this run, the same in each attempt at it."""
    if asked == "schedule":
        return submit(scheduled_interval).result()
    return asked if isinstance(asked, DataInterval) else None


def given(transform: T, interval: DataInterval | None) -> T:
    """The transform with the interval of the run; one of its own is kept if the run has none.

    Raises:
        InputError: It can't have one.
    """
    if interval is None:
        return transform
    try:
        fields = {name: getattr(transform, name) for name in type(transform).model_fields}
        return cast("T", type(transform).model_validate({**fields, "data_interval": interval}))
    except ValidationError as error:
        raise InputError(f"{transform.what} can't have a data interval: {words_of(error)}") from None
