"""Which intervals of a backfill are done, kept in the Prefect API while it runs.

From there another run goes on, in whatever process and on whatever machine. In the API it is a table artifact
with the same key in every run of the same backfill, `backfill-<project>-<what is built, and where>`: for a
person the intervals with state, rows and message, for us the same, with the models that they were built of as
JSON in a comment in its description. An interval is done only for the models that it was built of.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import ArtifactCreate, ArtifactUpdate
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey
from prefect.client.schemas.sorting import ArtifactSort
from prefect.logging import get_run_logger
from prefect.runtime import flow_run
from pydantic import BaseModel, ConfigDict, Field

from tasks.dbt.lineage import LineageNode
from tasks.dbt.model import DbtCore, DbtPlan, one_line
from tasks.environment import prefix_here
from tasks.intervals import DataInterval

_PAGE = 50
_SHARE = 20  # writing takes at most a twentieth of the time: thousands of intervals make a large table


BELOW = "what is built on them"
"""The last row of the table."""
# What says which backfill it is. Not profiles_dir: where that leads to does, and it may be another checkout.
_ASKED = ("select", "exclude", "selector", "vars", "env")


class IntervalState(StrEnum):
    """How far an interval is."""

    LEFT = "left"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"


class IntervalRecord(BaseModel):
    """One interval of a backfill."""

    model_config = ConfigDict(frozen=True)

    interval: DataInterval
    state: IntervalState = IntervalState.LEFT
    earlier: bool = Field(
        default=False, description="Done by an earlier run, or by the one that was retried."
    )
    seconds: float | None = None
    rows: int | None = None
    message: str | None = None
    ended: datetime | None = None
    flow_run_id: str = Field(default="", description="The run that has built it.")

    @property
    def row(self) -> dict[str, Any]:
        """As it is in the table."""
        return {
            "interval": self.interval.label,
            "state": self.state.value,
            "rows": self.rows,
            "seconds": None if self.seconds is None else round(self.seconds, 1),
            "message": self.message,
            "ended": self.ended.isoformat(timespec="seconds") if self.ended else None,
            "start": self.interval.start.isoformat(),
            "end": self.interval.end.isoformat(),
            "flow run": self.flow_run_id,
        }


@dataclass(frozen=True)
class Models:
    """What a backfill builds; each model as a mark of its name and of the table that it is in the warehouse.

    Attributes:
        each: For every interval.
        below: On them, when all intervals are done.
    """

    each: frozenset[str]
    below: frozenset[str]

    @classmethod
    def of(cls, each: Iterable[LineageNode], below: Iterable[LineageNode]) -> Models:
        """The marks of these nodes."""
        return cls(frozenset(map(mark_of, each)), frozenset(map(mark_of, below)))

    @classmethod
    def parse(cls, description: str | None) -> Models:
        """Those of a table; none where it does not tell, so that nothing in it counts as done."""
        found = re.search(r"^<!-- models (.*) -->$", description or "", re.MULTILINE)
        said = json.loads(found[1]) if found else {}
        return cls(frozenset(said.get("each", ())), frozenset(said.get("below", ())))

    @property
    def comment(self) -> str:
        """For the description of a table."""
        return f"<!-- models {json.dumps({'each': sorted(self.each), 'below': sorted(self.below)})} -->"


def mark_of(node: LineageNode) -> str:
    """What stands for a model in a table: moved to another schema, or called otherwise there, it is new."""
    return _digest([node.unique_id, node.relation])[:12]


@dataclass(frozen=True)
class Before:
    """What earlier runs have done.

    Attributes:
        intervals: What any of them has done of all models that are asked for now.
        below: Whether the last has also done what is built on them.
        short: The ends of intervals that were done without these models.
    """

    intervals: list[IntervalRecord]
    below: bool
    short: dict[tuple[datetime, datetime], frozenset[str]]


def artifact_key(dbt: DbtCore, plan: DbtPlan, each: Iterable[LineageNode]) -> str:
    """The key under which all runs of a backfill are kept.

    What one environment has built says nothing of another's tables, though it is the same project with the
    same parameters: a run's warehouse and schema may come from its worker's environment alone. So it holds
    where dbt writes to, not by what way it learns of that.

    Args:
        dbt: What is asked for.
        plan: What that comes to.
        each: What is built for every interval.
    """
    said = {
        **dbt.model_dump(mode="json", include={*_ASKED}),
        "project": plan.project,
        "target": plan.target,
        "place": plan.place,
        "schemas": sorted({node.schema for node in each}),
        "environment": prefix_here(),
    }
    name = re.sub(r"[^a-z0-9]+", "-", plan.project.lower()).strip("-")
    return f"backfill-{name}-{_digest(said)[:8]}"


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def done_before(key: str, models: Models) -> Before:
    """What runs have done under this key.

    Args:
        key: Of the artifacts.
        models: What has to be in an interval for it to be done.

    Raises:
        Exception: What the Prefect client raises when the API can't be reached.
    """
    done: dict[tuple[datetime, datetime], IntervalRecord] = {}
    short: dict[tuple[datetime, datetime], AbstractSet[str]] = {}
    scope = ArtifactFilter(key=ArtifactFilterKey(any_=[key]))
    with get_client(sync_client=True) as client:
        tables = [
            (_rows(each.data), Models.parse(each.description)) for each in _all_artifacts(client, scope)
        ]
        for rows, built in tables:
            lacking = models.each - built.each
            for row in rows:
                if row["state"] == IntervalState.DONE and row["interval"] != BELOW:
                    record = IntervalRecord(
                        interval=DataInterval(start=row["start"], end=row["end"]),
                        state=IntervalState.DONE,
                        earlier=True,
                        seconds=row["seconds"],
                        rows=row["rows"],
                        message=row["message"],
                        ended=row["ended"],
                        flow_run_id=row["flow run"],
                    )
                    ends = (record.interval.start, record.interval.end)
                    if lacking:
                        short[ends] = short.get(ends, lacking) & lacking
                    elif ends not in done or _ended(record) > _ended(done[ends]):
                        done[ends] = record
    last, built = tables[0] if tables else ([], models)
    below = any(row["interval"] == BELOW and row["state"] == IntervalState.DONE for row in last)
    return Before(
        intervals=list(done.values()),
        below=below and models.each <= built.each and models.below <= built.below,
        short={ends: frozenset(lacking) for ends, lacking in short.items() if ends not in done},
    )


def _rows(data: Any) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(data) if isinstance(data, str) else data or []
    return found


def _ended(record: IntervalRecord) -> datetime:
    return record.ended or datetime.min.replace(tzinfo=UTC)


def _all_artifacts(client: SyncPrefectClient, scope: ArtifactFilter) -> list[Any]:
    found: list[Any] = []
    while True:
        page = client.read_artifacts(
            artifact_filter=scope, sort=ArtifactSort.CREATED_DESC, limit=_PAGE, offset=len(found)
        )
        found += page
        if len(page) < _PAGE:
            return found


class BackfillTable:
    """The table of this run, written while it runs.

    Args:
        key: Of the artifact.
        title: What is backfilled, for people.
        records: The intervals, in the order in which they are shown.
        models: What is built.
    """

    def __init__(self, key: str, title: str, records: Sequence[IntervalRecord], models: Models) -> None:
        self._key = key
        self._title = title
        self._models = models
        self.records = list(records)
        self._artifact: UUID | None = None
        self._not_before = 0.0
        self._behind = False
        self._below = IntervalState.LEFT

    def of(self, *states: IntervalState) -> list[IntervalRecord]:
        """The intervals in these states."""
        return [record for record in self.records if record.state in states]

    @property
    def sentence(self) -> str:
        """How far it is: `12 intervals: 5 done, 1 failed, 6 left`."""
        counted = [
            f"{len(found)} {state.value}"
            for state in (
                IntervalState.DONE,
                IntervalState.FAILED,
                IntervalState.RUNNING,
                IntervalState.LEFT,
            )
            if (found := self.of(state))
        ]
        noun = "interval" if len(self.records) == 1 else "intervals"
        return f"{len(self.records)} {noun}: {', '.join(counted)}"

    def note(self, interval: DataInterval, state: IntervalState, **fields: Any) -> None:
        """An interval has come further."""
        place = next(i for i, record in enumerate(self.records) if record.interval == interval)
        ended = datetime.now(UTC) if state in (IntervalState.DONE, IntervalState.FAILED) else None
        self.records[place] = IntervalRecord(
            interval=interval, state=state, ended=ended, flow_run_id=flow_run.id or "", **fields
        )
        self._behind = True
        if state is not IntervalState.RUNNING and time.monotonic() >= self._not_before:
            self.write()

    def note_below(self, state: IntervalState) -> None:
        """What is built on the intervals has come further."""
        self._below = state
        self._behind = True

    def write(self) -> None:
        """Write what is not written yet. An API that is away costs the memory, not the backfill."""
        if not self._behind and self._artifact:
            return
        began = time.monotonic()
        below = dict.fromkeys(self.records[0].row) | {"interval": BELOW, "state": self._below.value}
        rows = json.dumps([*(record.row for record in self.records), below])
        text = f"{self._title}\n\n{self.sentence}\n\n{self._models.comment}\n"
        try:
            with get_client(sync_client=True) as client:
                if self._artifact:
                    client.update_artifact(self._artifact, ArtifactUpdate(data=rows, description=text))
                else:
                    wanted = ArtifactCreate(
                        key=self._key,
                        type="table",
                        data=rows,
                        description=text,
                        flow_run_id=UUID(flow_run.id) if flow_run.id else None,
                    )
                    self._artifact = client.create_artifact(wanted).id
            self._behind = False
        except Exception as error:  # noqa: BLE001 - whatever ails the API
            get_run_logger().warning(
                "What is done can't be recorded (%s): another run may do it again.", one_line(str(error))
            )
        took = time.monotonic() - began
        self._not_before = time.monotonic() + _SHARE * took if took > 0.1 else 0.0
