"""Hightouch's side of the stage: syncs, their runs, and the controls over how they behave.

The HTTP face of this state is in `hightouch_api.py`.
"""

from __future__ import annotations

import math
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from sandbox import catalog
from sandbox.activation import Change, read_model
from sandbox.hightouch_sequences import Sequences
from sandbox.timeline import (
    FOREVER,
    LONG,
    STOP_WITHIN,
    HightouchOutcome,
    Phase,
    SyncBehaviour,
    Timeline,
    Work,
    Workers,
    iso,
)
from sandbox.warehouse import Warehouse

_END_WORDS: dict[HightouchOutcome, str] = {
    "warn": "warning",
    "fail": "failed",
    "cancel": "cancelled",
    "interrupt": "interrupted",
}


class HightouchSettings(BaseModel):
    """What can be set about the Hightouch server as a whole."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True)

    form: Literal["2022", "2026"] = Field(
        "2026", description="Of the API; in the older one lists have no hasMore, and ids of runs are text."
    )
    requests_per_10_seconds: int | None = Field(200, ge=1, description="Beyond it: 429. None: no limit.")
    oldest_first: bool = Field(False, description="Lists of runs ascend; the API does not say what they do.")
    queue_sequences: bool = Field(
        True, description="A trigger during a sequence's run queues another; off: it gives the run's own id."
    )
    stop_sequences: bool = Field(True, description="A sequence ends with the first sync that fails.")


class SyncChange(SyncBehaviour):
    """A change to one sync: any field of its behaviour, or whether it is disabled."""

    disabled: bool = False


class SyncDisabled(Exception):
    """The sync was switched off by its user, so it is not run."""


@dataclass(slots=True)
class Run:
    """One run of a sync. `timeline` is None while it waits for the run before it to end."""

    run_id: int
    sync_id: int
    created_wall: float
    outcome: HightouchOutcome
    rejected: float
    hidden_until: float  # monotonic; before it, lists do not show the run
    work: Work
    full_resync: bool = False
    timeline: Timeline | None = None
    change: Change = field(default_factory=Change)

    def at(self) -> tuple[str, float, bool]:
        """The status, the moment it began, and whether it is final."""
        return ("queued", 0.0, False) if self.timeline is None else self.timeline.at()

    @property
    def status(self) -> str:
        """The status word of this moment."""
        return self.at()[0]

    @property
    def started_wall(self) -> float | None:
        """When the run left the queue, epoch seconds; None before."""
        if self.timeline is None or self.status == "queued":
            return None
        return self.timeline.started_wall + self.timeline.phases[0].seconds

    @property
    def finished_wall(self) -> float | None:
        """When the run ended, epoch seconds; None before."""
        _, since, final = self.at()
        return self.timeline.wall(since) if self.timeline is not None and final else None

    def reply(self) -> dict[str, Any]:
        """The run as SyncRun; the rows are missing until the query is done, as an early run's may be."""
        word, _, final = self.at()
        started, finished = self.started_wall, self.finished_wall
        reply: dict[str, Any] = {
            "id": self.run_id,
            "createdAt": iso(self.created_wall, millis=True),
            "startedAt": None if started is None else iso(started, millis=True),
            "finishedAt": None if finished is None else iso(finished, millis=True),
            "querySize": None,
            "status": word,
            "completionRatio": 0,
            "error": self._error(word),
        }
        if word in ("queued", "querying") or (final and self.work.error):
            return reply
        change, rejected = self.change, self.rejected_rows
        added, removed = change.added.total(), change.removed
        sent = word in ("success", "warning")
        return reply | {
            "querySize": change.rows.total(),
            # No sign of success: that of Hightouch's own example of a success is 0.54.
            "completionRatio": 0.54 if sent else 0.5,
            "plannedRows": _counts(added, removed),
            "successfulRows": _counts(added - rejected, removed) if sent else _counts(),
            "failedRows": _counts(rejected),
        }

    @property
    def rejected_rows(self) -> int:
        """How many rows the destination refused, once it has."""
        return math.ceil(self.change.added.total() * self.rejected) if self.status == "warning" else 0

    def _error(self, word: str) -> str | None:
        if word == "failed":
            return self.work.error or "The destination refused the request: 403 Forbidden"
        return "The run was interrupted by a restart" if word == "interrupted" else None


@dataclass(slots=True)
class Sync:
    """One sync and how its next run will behave."""

    spec: catalog.SyncSpec
    behaviour: SyncBehaviour
    disabled: bool = False
    schedule: dict[str, Any] | None = None
    configuration: dict[str, Any] = field(default_factory=dict)
    runs: list[Run] = field(default_factory=list)

    def delivered(self) -> Counter[int]:
        """What the destination has of the model, by the latest run that sent anything."""
        for run in reversed(self.runs):
            if run.status in ("success", "warning"):
                return run.change.delivered(run.rejected_rows)
        return Counter()

    @property
    def current(self) -> Run | None:
        """The latest run that has left the queue of runs, if any ever did."""
        return next((run for run in reversed(self.runs) if run.timeline is not None), None)

    def reply(self) -> dict[str, Any]:
        """The sync as the API's Sync."""
        current = self.current
        started = None if current is None else current.started_wall
        created = iso(catalog.CREATED_AT, millis=True)
        status = "disabled" if self.disabled else "pending" if current is None else current.status
        return {
            "id": self.spec.sync_id,
            "slug": self.spec.slug,
            "workspaceId": catalog.HIGHTOUCH_WORKSPACE_ID,
            "createdAt": created,
            "updatedAt": created,
            "destinationId": self.spec.sync_id + 200,
            "modelId": self.spec.sync_id + 100,
            "configuration": {"mode": "upsert", "object": self.spec.destination} | self.configuration,
            "schedule": self.schedule,
            "disabled": self.disabled,
            "status": status,
            "lastRunAt": None if started is None else iso(started, millis=True),
            "referencedColumns": [self.spec.primary_key],
            "primaryKey": self.spec.primary_key,
            "externalSegment": {},
            "tags": {"owner": self.spec.owner},
        }


class Hightouch:
    """All of Hightouch's state, safe to use from the server's thread and from a test's."""

    def __init__(self, warehouse: Warehouse, job_seconds: float = 3.0) -> None:
        self.settings = HightouchSettings()
        self.warehouse = warehouse
        self.lock = threading.RLock()
        behaviour = SyncBehaviour(duration=job_seconds)
        self.syncs = {spec.sync_id: Sync(spec, behaviour.model_copy()) for spec in catalog.SYNCS}
        self.next_run = 6134
        self._stopping = threading.Event()
        self._workers = Workers(self._cancel_work)
        self.sequences = Sequences(self, self._workers, self._stopping)

    def sync(self, key: int | str) -> Sync:
        """A sync by its id (number or digits) or its slug.

        Raises:
            KeyError: there is none.
        """
        if str(key).isdecimal() and int(key) in self.syncs:
            return self.syncs[int(key)]
        found = next((sync for sync in self.syncs.values() if sync.spec.slug == key), None)
        if found is None:
            raise KeyError(key)
        return found

    def set(self, key: int | str, **changes: Any) -> Sync:
        """Change how a sync's next runs behave (`SyncBehaviour`), or whether it is `disabled`.

        Raises:
            KeyError: no such sync.
            pydantic.ValidationError: a field that does not exist, or a value that does not fit.
        """
        sync = self.sync(key)
        sent = SyncChange.model_validate(changes).model_dump(exclude_unset=True)
        with self.lock:
            sync.disabled = sent.pop("disabled", sync.disabled)
            sync.behaviour = SyncBehaviour.model_validate(sync.behaviour.model_dump() | sent)
        return sync

    def add_syncs(self, count: int, *, duration: float = 3.0, prefix: str = "synthetic") -> list[int]:
        """Add syncs that read no data, for benches, and return their ids."""
        with self.lock:
            first = max(self.syncs, default=1000) + 1
            for number in range(first, first + count):
                spec = catalog.SyncSpec(number, f"{prefix}-{number}", "", "id", "nowhere", "nobody")
                self.syncs[number] = Sync(spec, SyncBehaviour(duration=duration))
        return list(range(first, first + count))

    def runs_of(self, key: int | str) -> list[Run]:
        """The runs of a sync, oldest first."""
        with self.lock:
            return list(self.sync(key).runs)

    def trigger(self, key: int | str, *, full_resync: bool = False) -> Run:
        """Start a run; while one is in progress, one follow-up is queued, and asked again it is the same.

        Raises:
            KeyError: no such sync.
            SyncDisabled: it is switched off.
        """
        sync = self.sync(key)
        with self.lock:
            if sync.disabled:
                raise SyncDisabled(sync.spec.slug)
            latest = sync.runs[-1] if sync.runs else None
            if latest is not None and latest.timeline is None:
                latest.full_resync |= full_resync
                return latest
            previous = latest if latest is not None and not latest.at()[2] else None
            behaviour, run = sync.behaviour, self._new_run(sync, full_resync=full_resync)
            if previous is None:
                run.timeline = _course(behaviour, run)
            sync.runs.append(run)
        if sync.spec.table or previous is not None:
            self._workers.start(f"sandbox-run-{run.run_id}", self._work, sync, run, previous, behaviour)
        else:
            run.work.done_at = time.monotonic()
        return run

    def finish_run(self, run_id: int, word: Literal["failed", "cancelled", "interrupted"]) -> None:
        """End a run at once, as if the vendor had."""
        run = next(run for sync in self.syncs.values() for run in sync.runs if run.run_id == run_id)
        if run.timeline is not None:
            run.timeline.finish(word)

    def stop(self) -> None:
        """Tell all threads to give up, and give them a moment to do so."""
        self._workers.stop(STOP_WITHIN)

    def _cancel_work(self) -> None:
        self._stopping.set()
        with self.lock:
            for sync in self.syncs.values():
                for run in sync.runs:
                    run.work.cancelled.set()

    def _new_run(self, sync: Sync, *, full_resync: bool) -> Run:
        behaviour = sync.behaviour
        if behaviour.outcome != "succeed" and behaviour.times is not None:
            sync.behaviour = behaviour.used_once()
        run_id, self.next_run = self.next_run, self.next_run + 1
        return Run(
            run_id=run_id,
            sync_id=sync.spec.sync_id,
            created_wall=time.time(),
            outcome=behaviour.outcome,
            rejected=behaviour.rejected,
            hidden_until=time.monotonic() + behaviour.visibility_delay,
            work=Work(),
            full_resync=full_resync,
        )

    def _work(self, sync: Sync, run: Run, previous: Run | None, behaviour: SyncBehaviour) -> None:
        """Wait for the run before, then read the model once the run is querying."""
        while previous is not None and not previous.at()[2]:
            if self._stopping.wait(0.02):
                return
        if run.timeline is None:
            run.timeline = _course(behaviour, run)
        work = run.work
        if sync.spec.table and not work.cancelled.wait(min(LONG, run.timeline.phases[0].seconds)):
            before = Counter[int]() if run.full_resync else sync.delivered()
            change = read_model(self.warehouse, sync.spec.table, work, before)
            run.change = Change() if run.outcome == "zero_rows" else change
        if work.error is not None:
            # A query that failed ends the run there.
            run.timeline.phases = run.timeline.phases[:2]
        work.done_at = time.monotonic()


def _counts(added: int = 0, removed: int = 0) -> dict[str, int]:
    return {"addedCount": added, "changedCount": 0, "removedCount": removed}


def _course(behaviour: SyncBehaviour, run: Run) -> Timeline:
    """The timeline of a run that begins now."""
    duration = behaviour.duration
    processing: list[Phase]
    if run.outcome == "stuck":
        processing = [Phase("processing", FOREVER)]
    elif run.outcome == "unknown_word":
        shown = FOREVER if behaviour.word_seconds is None else behaviour.word_seconds
        processing = [Phase("processing", duration * 0.5), Phase(behaviour.word, shown)]
    else:
        processing = [Phase("processing", duration * 0.5)]
    phases = (
        Phase("queued", behaviour.queued_seconds + duration * 0.05),
        Phase("querying", duration * 0.25),
        *processing,
        Phase("reporting", duration * 0.2),
    )
    return Timeline(phases, _END_WORDS.get(run.outcome, "success"), work=run.work)
