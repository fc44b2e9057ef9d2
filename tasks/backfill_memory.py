"""Which intervals of a backfill are done, kept in the Prefect API while it runs.

From there another run goes on, in whatever process and on whatever machine. In the API it is a table artifact
with the same key in every run of the same backfill, `backfill-<project>-<what is built>`: for a person the
intervals with state, rows and message, for us the same.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
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

from tasks.dbt.model import one_line
from tasks.intervals import DataInterval

_PAGE = 50
_SHARE = 20  # writing takes at most a twentieth of the time: thousands of intervals make a large table


BELOW = "what is built on them"
"""The last row of the table."""


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


def artifact_key(project: str, build: str) -> str:
    """The key under which all runs of a backfill are kept.

    Args:
        project: The dbt project's name.
        build: What is built, as `build_id` says it.
    """
    name = re.sub(r"[^a-z0-9]+", "-", project.lower()).strip("-")
    return f"backfill-{name}-{build[:8]}"


def done_before(key: str) -> tuple[list[IntervalRecord], bool]:
    """What runs have done under this key.

    Returns:
        The intervals that any of them has done, and whether the last has also done what is built on them.

    Raises:
        Exception: What the Prefect client raises when the API can't be reached.
    """
    done: dict[tuple[datetime, datetime], IntervalRecord] = {}
    scope = ArtifactFilter(key=ArtifactFilterKey(any_=[key]))
    with get_client(sync_client=True) as client:
        tables = [_rows(artifact.data) for artifact in _all_artifacts(client, scope)]
        for rows in tables:
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
                    if ends not in done or _ended(record) > _ended(done[ends]):
                        done[ends] = record
    last = tables[0] if tables else []
    below = any(row["interval"] == BELOW and row["state"] == IntervalState.DONE for row in last)
    return list(done.values()), below


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
    """

    def __init__(self, key: str, title: str, records: Sequence[IntervalRecord]) -> None:
        self._key = key
        self._title = title
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
        text = f"{self._title}\n\n{self.sentence}"
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
