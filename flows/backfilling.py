"""The work of a backfill: what is left of a range, interval by interval, so many at a time."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefect.futures import PrefectConcurrentFuture
from prefect.logging import get_run_logger
from prefect.runtime import flow_run

from flows.fan_out import submit
from tasks.backfill_memory import (
    BackfillTable,
    Before,
    IntervalRecord,
    IntervalState,
    Models,
    artifact_key,
    done_before,
    mark_of,
)
from tasks.dbt.folders import target_of
from tasks.dbt.lineage import listed
from tasks.dbt.model import DbtBuildFailed, DbtCore, DbtNode, DbtPlan, DbtResult, DbtState, one_line
from tasks.dbt.parts import Parts, parsed_alike
from tasks.dbt_core import dbt_build
from tasks.intervals import DataInterval, covered

LAST = "last"
"""Folder for what dbt has parsed with the last interval, to be held against what it has with the first."""
FEW = 3
"""So many intervals are parsed one by one: to find out whether that is needed would take as long."""
_PARSED = "partial_parse.msgpack"


@dataclass
class Backfilling:
    """A backfill that has been looked at and is ready to begin.

    Args:
        dbt: The project, and what of it.
        plan: What that comes to.
        intervals: The range, cut, in the order in which they are to be built.
        again: Whether what is done is done again.
    """

    dbt: DbtCore
    plan: DbtPlan
    intervals: Sequence[DataInterval]
    again: bool
    nodes: dict[str, DbtNode] = field(default_factory=dict)
    trouble: str | None = None

    def __post_init__(self) -> None:
        self.parts = Parts.of(self.plan)
        each = self.parts.nodes(self.parts.each)
        models = Models.of(each, self.parts.nodes(self.parts.below, tests=False))
        key = artifact_key(self.dbt, self.plan, each)
        self._folder = target_folder(self.dbt)
        folder = self.dbt.project / self._folder
        alike = len(self.intervals) > FEW and parsed_alike(folder, folder / LAST)
        self._parsed = folder / _PARSED if alike else None
        title = f"Backfill of {self.dbt.what} in {self.plan.project}"
        before = done_before(key, models)
        self.table = BackfillTable(key, title, self._known(before.intervals), models)
        self._say_what_is_new(before)
        # What is built on the intervals has to be built again once one of them has been.
        self.complete = not self.left and (before.below or not self.parts.below)
        if self.complete:
            self.table.note_below(IntervalState.DONE)

    def _known(self, earlier: Sequence[IntervalRecord]) -> list[IntervalRecord]:
        """Every interval, with what earlier runs have done of it."""
        if self.again:  # but what an attempt at this very run has done is not done again
            earlier = [record for record in earlier if record.flow_run_id == flow_run.id]
        same = {(record.interval.start, record.interval.end): record for record in earlier}
        spans = [record.interval for record in earlier]
        known: list[IntervalRecord] = []
        for interval in self.intervals:
            record = same.get((interval.start, interval.end))
            if record is None and covered(interval, spans):
                message = "done in intervals that were cut otherwise"
                record = IntervalRecord(
                    interval=interval, state=IntervalState.DONE, earlier=True, message=message
                )
            known.append(record or IntervalRecord(interval=interval))
        return known

    def _say_what_is_new(self, before: Before) -> None:
        """An interval that was done without a model of today's is left, for all of its models."""
        lacking = [
            before.short[ends] for each in self.left if (ends := (each.start, each.end)) in before.short
        ]
        if lacking:
            new = frozenset().union(*lacking)
            nodes = self.parts.nodes(self.parts.each)
            names = listed(sorted(node.name for node in nodes if mark_of(node) in new))
            get_run_logger().warning(
                "%d of the intervals have been done, but without %s: they are built again.",
                len(lacking),
                names,
            )

    @property
    def left(self) -> list[DataInterval]:
        """What is to be built."""
        return [record.interval for record in self.table.of(IntervalState.LEFT)]

    def run(self, *, at_once: int, stop_on_failure: bool) -> None:
        """Build what the intervals need, then the intervals, then what is built on them.

        Args:
            at_once: How many intervals at a time.
            stop_on_failure: Whether no interval is begun any more once one has failed.
        """
        self.table.write()
        try:
            if self.left and not self._once("above the intervals", self.parts.above):
                self.trouble = "what the intervals are built from failed"
                return
            self._each(self.left, at_once=at_once, stop_on_failure=stop_on_failure)
            if self.table.of(IntervalState.FAILED, IntervalState.LEFT):
                if self.parts.below:
                    self.trouble = "what is built on the intervals waits until all of them are done"
                return
            good = self._once("below the intervals", self.parts.below)
            self.table.note_below(IntervalState.DONE if good else IntervalState.FAILED)
            self.trouble = None if good else "what is built on the intervals failed"
        finally:
            self.table.write()

    def _once(self, name: str, ids: frozenset[str]) -> bool:
        """Build what is not built by interval; without the interval's variables."""
        if not ids:
            return True
        dbt, exclude = self.parts.selecting(self.dbt, ids, tests=True)
        step = dbt_build.with_options(task_run_name=name, **self.dbt.task_options)
        dbt = dbt.model_copy(update={"target_path": self._folder})
        return self._took(submit(step, dbt, exclude).result(raise_on_failure=False)) is None

    def _each(self, left: Sequence[DataInterval], *, at_once: int, stop_on_failure: bool) -> None:
        waiting = list(left)
        slots = list(range(at_once))
        running: dict[concurrent.futures.Future[Any], tuple[DataInterval, int, Any]] = {}
        # Alone until one is done: a table that is not there yet can't be made by two at the same time.
        alone = True
        while running or waiting:
            stopped = stop_on_failure and bool(self.table.of(IntervalState.FAILED))
            while waiting and slots and not stopped and not (alone and running):
                interval, slot = waiting.pop(0), slots.pop()
                future = self._begin(interval, slot, first=alone)
                running[future.wrapped_future] = (interval, slot, future)
                if alone:
                    break
            if not running:
                return
            self.table.write()
            done, _ = concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED)
            for each in done:
                interval, slot, future = running.pop(each)
                slots.append(slot)
                self._ended(interval, future.result(raise_on_failure=False))
            alone = all(record.earlier for record in self.table.of(IntervalState.DONE))

    def _begin(self, interval: DataInterval, slot: int, *, first: bool) -> PrefectConcurrentFuture[Any]:
        between = self.parts.between if first else self.parts.tables_between
        dbt, exclude = self.parts.selecting(self.dbt, self.parts.each | between, tests=False)
        dbt = for_interval(dbt, interval, self._folder / str(slot))
        step = dbt_build.with_options(task_run_name=interval.label, **self.dbt.task_options)
        self.table.note(interval, IntervalState.RUNNING)
        found: Any = submit(step, dbt, exclude, None, self._parsed)
        return found  # type: ignore[no-any-return]

    def _ended(self, interval: DataInterval, found: Any) -> None:
        why = self._took(found)
        result = found.result if isinstance(found, DbtBuildFailed) else found
        seconds = result.duration if isinstance(result, DbtResult) else None
        counted = [node.rows for node in getattr(result, "nodes", ()) if node.rows is not None]
        state = IntervalState.FAILED if why else IntervalState.DONE
        self.table.note(interval, state, seconds=seconds, rows=sum(counted) if counted else None, message=why)
        say: Callable[..., None] = get_run_logger().error if why else get_run_logger().info
        say("%s: %s. %s", interval.label, why or "done", self.table.sentence)

    def _took(self, found: Any) -> str | None:
        """Keep the nodes of a build; why it failed, None if it did not."""
        result = found.result if isinstance(found, DbtBuildFailed) else found
        if isinstance(result, DbtResult):
            for node in result.nodes:
                # What failed in one interval failed, however the others went.
                known = self.nodes.get(node.unique_id)
                if known is None or known.state not in (DbtState.FAIL, DbtState.ERROR):
                    self.nodes[node.unique_id] = node
            return result.message if result.failed else None
        return one_line(str(found) or type(found).__name__)


def for_interval(dbt: DbtCore, interval: DataInterval, folder: Path) -> DbtCore:
    """The build of an interval, which writes into a folder."""
    return dbt.model_copy(update={"data_interval": interval, "target_path": folder})


def target_folder(dbt: DbtCore) -> Path:
    """Where a backfill's dbt processes write: each of those at a time in a folder of its own in it."""
    return target_of(dbt) / "backfill"
