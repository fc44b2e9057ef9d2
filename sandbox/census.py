"""Census's side of the stage: syncs, their runs, and the controls over how they behave.

The HTTP face of this state is in `census_api.py`.
"""

from __future__ import annotations

import math
import threading
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from sandbox import catalog
from sandbox.activation import Change, read_model
from sandbox.timeline import (
    FOREVER,
    LONG,
    STOP_WITHIN,
    CensusBehaviour,
    CensusOutcome,
    Phase,
    Timeline,
    Work,
    Workers,
    iso,
)
from sandbox.warehouse import Warehouse

_CHECKING = "Checking source and destination configuration"
_UNLOADING = "Unloading data from warehouse"
_LOADING = "Loading data into destination service"
_COMMITTING = "Committing data to destination service"
_STEPS = (_CHECKING, _UNLOADING, _LOADING, _COMMITTING)
_SKIP_AFTER = 0.05  # seconds in the queue until a run is skipped for another


class CensusSettings(BaseModel):
    """What can be set about the Census server as a whole."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True)

    requests_per_10_seconds: int | None = Field(
        None, ge=1, description="Beyond it: 429. None: no limit, for Census names none."
    )
    retry_after: float | None = Field(
        None, ge=0, description="Seconds that a 429 asks to wait; None: unsaid."
    )


class CensusChange(CensusBehaviour):
    """A change to one sync: any field of its behaviour, or whether it is paused."""

    paused: bool = False


class SyncPaused(Exception):
    """The sync was paused by its user, so it is not run."""


class RunEnded(Exception):
    """There is nothing to cancel."""


@dataclass(slots=True)
class Run:
    """One run of a sync."""

    run_id: int
    sync_id: int
    behaviour: CensusBehaviour
    full_sync: bool
    timeline: Timeline
    work: Work
    reason: str
    created: float = field(default_factory=time.time)  # epoch seconds
    hidden_until: float = 0.0  # monotonic; before it, the API does not know the run
    change: Change = field(default_factory=Change)
    skipped: bool = False  # from the start: another run was going
    cancelled: bool = False

    @property
    def final(self) -> bool:
        """Whether it has ended."""
        return self.timeline.at()[2]

    @property
    def status(self) -> str:
        """The status word of this moment."""
        word = self.timeline.at()[0]
        return "working" if word in _STEPS else word

    def counts(self) -> dict[str, int | None]:
        """Records by what became of them; null until they have been unloaded."""
        word, _, final = self.timeline.at()
        known = word in (_LOADING, _COMMITTING) or (final and self.work.done_at and not self.work.error)
        if not known or self.skipped:
            return dict.fromkeys(
                ("records_processed", "records_updated", "records_failed", "records_invalid"), None
            )
        processed = self.change.added.total()
        partial = self.behaviour.outcome == "partial" and word == "completed"
        failed = math.ceil(processed * self.behaviour.failed) if partial else 0
        invalid = math.ceil(processed * self.behaviour.invalid) if partial else 0
        sent = processed - failed - invalid if word == "completed" else 0
        return {
            "records_processed": processed,
            "records_updated": sent,
            "records_failed": failed,
            "records_invalid": invalid,
        }

    def reply(self) -> dict[str, Any]:
        """The run as SyncRun. `completed_at` stays null on a run that failed."""
        word, since, final = self.timeline.at()
        changed = iso(max(self.created, self.timeline.wall(since)), millis=True)
        failed = word == "failed" and not self.cancelled
        reply = {
            "id": self.run_id,
            "sync_id": self.sync_id,
            **self.counts(),
            "created_at": iso(self.created, millis=True),
            "updated_at": changed,
            "completed_at": changed if final and word == "completed" else None,
            "scheduled_execution_time": None,
            "error_code": ("SOURCE_ERROR" if self.work.error else "DESTINATION_ERROR") if failed else None,
            "error_message": "The sync failed." if failed else None,
            "error_detail": (self.work.error or "The destination refused the request: 403 Forbidden")
            if failed
            else None,
            "status": self.status,
            "canceled": self.cancelled and final,
            "full_sync": self.full_sync,
            "sync_trigger_reason": {"ui_tag": self.reason, "ui_detail": f"{self.reason}, by the sandbox"},
        }
        if word in _STEPS:
            reply["current_step"] = word
        if self.work.done_at is not None and not self.work.error:
            reply["source_record_count"] = self.change.rows.total()
        return reply


@dataclass(slots=True)
class Sync:
    """One sync and how its next run will behave."""

    spec: catalog.CensusSyncSpec
    behaviour: CensusBehaviour
    paused: bool = False
    runs: list[Run] = field(default_factory=list)

    def delivered(self) -> Counter[int] | None:
        """What the destination has of the source, by the latest run that sent anything; None before one."""
        for run in reversed(self.runs):
            if run.status == "completed" and run.behaviour.outcome != "zero_rows":
                counts = run.counts()
                return run.change.delivered(
                    (counts["records_failed"] or 0) + (counts["records_invalid"] or 0)
                )
        return None

    def reply(self) -> dict[str, Any]:
        """The sync as the API's Sync: its status knows nothing of a run that is going."""
        last = next((run.status for run in reversed(self.runs) if run.final and not run.skipped), None)
        schema, table = self.spec.table.split(".")
        created = iso(catalog.CREATED_AT, millis=True)
        return {
            "id": self.spec.sync_id,
            "label": self.spec.label,
            "status": {None: "ready", "completed": "up to date"}.get(last, "failing"),
            "operation": self.spec.operation,
            "paused": self.paused,
            "created_at": created,
            "updated_at": created,
            "source_attributes": {
                "connection_id": 12,
                "object": {"type": "table", "table_schema": schema, "table_name": table},
            },
            "destination_attributes": {"connection_id": 15, "object": self.spec.destination},
            "mappings": [
                {
                    "from": {"type": "column", "data": self.spec.primary_key},
                    "to": self.spec.primary_key,
                    "is_primary_identifier": True,
                }
            ],
            "schedule_frequency": "never",
            "triggers": {},
        }


class Census:
    """All of Census's state, safe to use from the server's thread and from a test's."""

    def __init__(self, warehouse: Warehouse, job_seconds: float = 3.0) -> None:
        self.settings = CensusSettings()
        self.warehouse = warehouse
        self.lock = threading.RLock()
        behaviour = CensusBehaviour(duration=job_seconds)
        self.syncs = {spec.sync_id: Sync(spec, behaviour.model_copy()) for spec in catalog.CENSUS_SYNCS}
        self.runs: dict[int, Run] = {}
        self.next_run = 324_399_613
        self._workers = Workers(self._cancel_work)

    def sync(self, key: int | str) -> Sync:
        """A sync by its id (number or digits) or its label.

        Raises:
            KeyError: there is none.
        """
        if str(key).isdecimal() and int(key) in self.syncs:
            return self.syncs[int(key)]
        found = next((sync for sync in self.syncs.values() if sync.spec.label == key), None)
        if found is None:
            raise KeyError(key)
        return found

    def set(self, key: int | str, **changes: Any) -> Sync:
        """Change how a sync's next runs behave (`CensusBehaviour`), or whether it is `paused`.

        Raises:
            KeyError: no such sync.
            pydantic.ValidationError: a field that does not exist, or a value that does not fit.
        """
        sync = self.sync(key)
        sent = CensusChange.model_validate(changes).model_dump(exclude_unset=True)
        with self.lock:
            sync.paused = sent.pop("paused", sync.paused)
            sync.behaviour = CensusBehaviour.model_validate(sync.behaviour.model_dump() | sent)
        return sync

    def add_syncs(self, count: int, *, duration: float = 3.0, prefix: str = "synthetic") -> list[int]:
        """Add syncs that read no data, for benches, and return their ids."""
        with self.lock:
            first = max(self.syncs) + 1
            for number in range(first, first + count):
                spec = replace(catalog.CENSUS_SYNCS[0], sync_id=number, label=f"{prefix}-{number}", table="")
                self.syncs[number] = Sync(spec, CensusBehaviour(duration=duration))
        return list(range(first, first + count))

    def runs_of(self, key: int | str) -> list[Run]:
        """The runs of a sync, oldest first."""
        with self.lock:
            return list(self.sync(key).runs)

    def trigger(self, key: int | str, *, full_sync: bool = False, reason: str = "Manual") -> Run:
        """Start a run. While another is going, the new one is skipped once it leaves the queue.

        Raises:
            KeyError: no such sync.
            SyncPaused: it is paused.
        """
        sync = self.sync(key)
        with self.lock:
            if sync.paused:
                raise SyncPaused(sync.spec.label)
            skipped = any(not run.final and not run.skipped for run in sync.runs)
            behaviour = sync.behaviour
            if not skipped and behaviour.outcome != "succeed" and behaviour.times is not None:
                sync.behaviour = behaviour.used_once()
            # An append sync can't be synced in full: asked for it, it appends as ever.
            full = sync.delivered() is None or (full_sync and sync.spec.operation != "append")
            work = Work()
            run = Run(
                run_id=self.next_run,
                sync_id=sync.spec.sync_id,
                behaviour=behaviour,
                full_sync=full,
                timeline=_skipped(behaviour) if skipped else _course(behaviour, work),
                work=work,
                reason=reason,
                hidden_until=time.monotonic() + behaviour.visibility_delay,
                skipped=skipped,
                cancelled=behaviour.outcome == "cancel" and not skipped,
            )
            self.next_run += 1
            sync.runs.append(run)
            self.runs[run.run_id] = run
        if not sync.spec.table:
            work.done_at = time.monotonic()
        elif not skipped:
            self._workers.start(f"sandbox-census-{run.run_id}", self._work, sync, run)
        return run

    def run(self, run_id: int) -> Run:
        """A run by its id.

        Raises:
            KeyError: there is none, or it is not shown yet.
        """
        run = self.runs[run_id]
        if time.monotonic() < run.hidden_until:
            raise KeyError(run_id)
        return run

    def cancel(self, run_id: int) -> None:
        """Cancel a run.

        Raises:
            KeyError: there is none.
            RunEnded: it has ended.
        """
        run = self.run(run_id)
        with self.lock:
            if run.final:
                raise RunEnded(run_id)
            run.cancelled = True
            run.timeline.finish(run.behaviour.cancel_word)

    def finish_run(self, run_id: int, word: Literal["failed", "completed", "cancelled"]) -> None:
        """End a run at once, as if Census had."""
        run = self.runs[run_id]
        run.cancelled = run.cancelled or (word == "cancelled" and not run.final)
        run.timeline.finish(word)

    def stop(self) -> None:
        """Tell all threads to give up, and give them a moment to do so."""
        self._workers.stop(STOP_WITHIN)

    def _cancel_work(self) -> None:
        with self.lock:
            for run in self.runs.values():
                run.work.cancelled.set()

    def _work(self, sync: Sync, run: Run) -> None:
        """Read the source once the run has left the queue."""
        work = run.work
        if not work.cancelled.wait(min(LONG, sum(phase.seconds for phase in run.timeline.phases[:2]))):
            before = Counter[int]() if run.full_sync else sync.delivered() or Counter[int]()
            change = read_model(self.warehouse, sync.spec.table, work, before)
            run.change = Change() if run.behaviour.outcome == "zero_rows" else change
        if work.error is not None:
            # A query that failed ends the run there.
            run.timeline.phases = run.timeline.phases[:3]
        work.done_at = time.monotonic()


def _skipped(behaviour: CensusBehaviour) -> Timeline:
    return Timeline((Phase("queued", behaviour.queued_seconds + _SKIP_AFTER),), "skipped")


def _course(behaviour: CensusBehaviour, work: Work) -> Timeline:
    """The timeline of a run that begins now."""
    duration, outcome = behaviour.duration, behaviour.outcome
    loading = [Phase(_LOADING, FOREVER if outcome == "stuck" else duration * 0.4)]
    if outcome == "unknown_word":
        shown = FOREVER if behaviour.word_seconds is None else behaviour.word_seconds
        loading.append(Phase(behaviour.word, shown))
    phases = (
        Phase("queued", behaviour.queued_seconds + duration * 0.05),
        Phase(_CHECKING, duration * 0.1),
        Phase(_UNLOADING, duration * 0.2),
        *loading,
        Phase(_COMMITTING, duration * 0.25),
    )
    ends: dict[CensusOutcome, str] = {"fail": "failed", "cancel": behaviour.cancel_word}
    return Timeline(phases, ends.get(outcome, "completed"), work=work)
