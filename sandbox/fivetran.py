"""Fivetran's side of the stage: connections, their syncs, and the controls over how they behave.

Fivetran shows no syncs: only what a connection is doing, and when it last succeeded and last failed. The
syncs that are kept here are for tests to look at. The HTTP face of this state is in `fivetran_api.py`.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal
from uuid import uuid4

import duckdb
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from sandbox import catalog
from sandbox.timeline import (
    FOREVER,
    LONG,
    STOP_WITHIN,
    FivetranBehaviour,
    FivetranOutcome,
    Phase,
    Timeline,
    Work,
    Workers,
)
from sandbox.warehouse import Interrupted, Warehouse, WarehouseLocked

SetupState = Literal["incomplete", "connected", "broken"]
Scope = dict[str, list[str]]
_ADDED = "false AS _fivetran_deleted, now() AS _fivetran_synced"
_RECONNECT = {"code": "reconnect", "message": "Reconnect", "details": "The source refused our credentials"}
_END_WORDS: dict[FivetranOutcome, str] = {
    "fail": "failed",
    "cancel": "stopped",
    "pause": "paused",
    "break": "broken",
}
DATABASES = ("postgres", "mysql", "oracle", "sql_server")
"""Connectors whose tables can be re-synced one by one."""


class FivetranSettings(BaseModel):
    """What can be set about the Fivetran account as a whole."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True)

    requests_per_hour: int | None = Field(20_000, ge=1, description="Beyond it: 429. None: no limit.")
    retry_after: int = Field(3600, ge=0, description="Seconds in the Retry-After of such a 429.")
    resync_patience: float = Field(
        0.5, ge=0, description="A re-sync waits so long for a sync in progress; then it is refused (409)."
    )
    stopped_is_failed: bool = Field(
        False, description="Whether a sync that was stopped counts as a failed one."
    )


class FivetranChange(FivetranBehaviour):
    """A change to one connection: any field of its behaviour, or what it is."""

    paused: bool = False
    setup_state: SetupState = "connected"
    schedule_type: Literal["auto", "manual"] = "auto"
    succeeded_at: AwareDatetime | None = None
    failed_at: AwareDatetime | None = None
    warnings: list[str] = Field(default_factory=list)


class ResyncRefused(Exception):
    """A re-sync can't be had: `conflict` names the case, the message the reason."""

    def __init__(self, message: str, *, conflict: bool = False) -> None:
        super().__init__(message)
        self.conflict = conflict


@dataclass(slots=True)
class Sync:
    """One sync. No reply of the API has it."""

    connection_id: str
    started_by: Literal["api", "schedule"]
    forced: bool
    historical: bool
    outcome: FivetranOutcome
    timeline: Timeline
    hidden_until: float  # monotonic; before it, the connection still says `scheduled`
    rescheduled_seconds: float
    sync_id: str = field(default_factory=lambda: str(uuid4()))
    settled: bool = False

    @property
    def word(self) -> str:
        """What it is doing, or how it ended: `succeeded`, `failed`, `stopped`, `paused` or `broken`."""
        return self.timeline.at()[0]

    @property
    def over(self) -> bool:
        """Whether it has ended."""
        return self.timeline.at()[2]

    @property
    def rescheduled_for(self) -> float | None:
        """When it is to run again, epoch seconds, while it waits for that."""
        word, since, _ = self.timeline.at()
        return self.timeline.wall(since) + self.rescheduled_seconds if word == "rescheduled" else None


@dataclass(slots=True)
class Connection:
    """One Fivetran connection and how its next sync will behave."""

    connection_id: str
    service: str
    schema: str
    source_schema: str
    behaviour: FivetranBehaviour
    stream: catalog.Stream | None = None  # None: synthetic, no data is loaded
    paused: bool = False
    setup_state: SetupState = "connected"
    schedule_type: Literal["auto", "manual"] = "auto"
    sync_frequency: int = 1440
    succeeded_at: float | None = None  # epoch seconds
    failed_at: float | None = None
    historical: bool = False
    tasks: list[dict[str, str]] = field(default_factory=list)
    warnings: list[dict[str, str]] = field(default_factory=list)
    syncs: list[Sync] = field(default_factory=list)

    @property
    def current(self) -> Sync | None:
        """The sync that is under way, waiting ones included."""
        return self.syncs[-1] if self.syncs and not self.syncs[-1].over else None

    def settle(self, *, stopped_is_failed: bool = False) -> None:
        """Take in how syncs have ended since the last look."""
        for sync in self.syncs[-2:]:  # one that was stopped, and the one that took its place
            word, since, final = sync.timeline.at()
            if sync.settled or not final:
                continue
            sync.settled = True
            ended = sync.timeline.wall(since)
            if word == "succeeded":
                self.succeeded_at, self.historical, self.tasks = ended, False, []
            elif word == "failed" or (word == "stopped" and stopped_is_failed):
                self.failed_at = ended
                self.tasks = [_RECONNECT] if word == "failed" else self.tasks
            elif word == "paused":
                self.paused = True
            elif word == "broken":
                self.setup_state, self.tasks = "broken", [_RECONNECT]

    def sync_state(self) -> str:
        """The word of this moment."""
        sync = self.current
        if sync is not None and sync.word != "scheduled" and time.monotonic() >= sync.hidden_until:
            return sync.word
        return "paused" if self.paused else "scheduled"

    def reply(self) -> dict[str, Any]:
        """The connection as the API has it. `settle` comes first."""
        state = self.sync_state()
        status: dict[str, Any] = {
            "setup_state": self.setup_state,
            "sync_state": state,
            "update_state": "on_schedule",
            "is_historical_sync": self.historical,
            "tasks": self.tasks,
            "warnings": self.warnings,
        }
        again = self.current.rescheduled_for if self.current is not None else None
        if again is not None and state == "rescheduled":
            status["rescheduled_for"] = instant(again)
        return {
            "id": self.connection_id,
            "service": self.service,
            "schema": self.schema,
            "group_id": catalog.FIVETRAN_GROUP_ID,
            "connected_by": catalog.FIVETRAN_USER_ID,
            "created_at": instant(catalog.CREATED_AT),
            "succeeded_at": None if self.succeeded_at is None else instant(self.succeeded_at),
            "failed_at": None if self.failed_at is None else instant(self.failed_at),
            "paused": self.paused,
            "pause_after_trial": False,
            "sync_frequency": self.sync_frequency,
            "schedule_type": self.schedule_type,
            "data_delay_sensitivity": "NORMAL",
            "service_version": 1,
            "status": status,
        }


class Fivetran:
    """All of Fivetran's state, safe to use from the server's thread and from a test's."""

    def __init__(self, warehouse: Warehouse, job_seconds: float = 3.0) -> None:
        self.settings = FivetranSettings()
        self.warehouse = warehouse
        self.lock = threading.RLock()
        self._workers = Workers(self._cancel_work)
        self.connections = {
            spec.connection_id: Connection(
                connection_id=spec.connection_id,
                service=spec.service,
                schema=spec.schema,
                source_schema=spec.source_schema,
                behaviour=FivetranBehaviour(duration=job_seconds),
                stream=spec.stream,
            )
            for spec in catalog.FIVETRAN_CONNECTIONS
        }

    # -- controls --

    def connection(self, key: str) -> Connection:
        """A connection by its id or its schema, as it is now.

        Raises:
            KeyError: there is none.
        """
        with self.lock:
            found = self.connections.get(key)
            if found is None:
                found = next((c for c in self.connections.values() if c.schema == key), None)
            if found is None:
                raise KeyError(key)
            found.settle(stopped_is_failed=self.settings.stopped_is_failed)
            return found

    def set(self, key: str, **changes: Any) -> Connection:
        """Change how a connection's next syncs behave (`FivetranBehaviour`), or what it is.

        Raises:
            KeyError: no such connection.
            pydantic.ValidationError: a field that does not exist, or a value that does not fit.
        """
        sent = FivetranChange.model_validate(changes).model_dump(exclude_unset=True)
        with self.lock:
            connection = self.connection(key)
            for name in ("succeeded_at", "failed_at"):
                if name in sent:
                    moment = sent.pop(name)
                    setattr(connection, name, None if moment is None else moment.timestamp())
            if "warnings" in sent:
                connection.warnings = [{"code": "warning", "message": text} for text in sent.pop("warnings")]
            for name in ("setup_state", "schedule_type"):
                setattr(connection, name, sent.pop(name, getattr(connection, name)))
            paused = sent.pop("paused", connection.paused)
            connection.behaviour = FivetranBehaviour.model_validate(connection.behaviour.model_dump() | sent)
            self.pause(connection, paused)
        return connection

    def pause(self, connection: Connection, paused: bool) -> None:
        """Pause a connection, or let it run again: a re-sync that was asked for meanwhile begins then."""
        with self.lock:
            was, connection.paused = connection.paused, paused
            if was and not paused and connection.historical:
                self._begin(connection, historical=True)

    def add_connections(self, count: int, *, duration: float = 3.0, prefix: str = "synthetic") -> list[str]:
        """Add connections that load no data, for benches, and return their ids."""
        with self.lock:
            first = len(self.connections) + 1
            ids = [f"{prefix}_{number:04d}" for number in range(first, first + count)]
            for connection_id in ids:
                self.connections[connection_id] = Connection(
                    connection_id=connection_id,
                    service="postgres",
                    schema=f"raw_{connection_id}",
                    source_schema="public",
                    behaviour=FivetranBehaviour(duration=duration),
                )
        return ids

    def syncs_of(self, key: str) -> list[Sync]:
        """The syncs of a connection, oldest first."""
        with self.lock:
            return list(self.connection(key).syncs)

    def run_schedule(self, key: str) -> Sync:
        """Start a sync as Fivetran's own scheduler does."""
        with self.lock:
            return self._begin(self.connection(key), started_by="schedule")

    def finish_sync(self, key: str, word: Literal["succeeded", "failed", "stopped"]) -> None:
        """End the sync that is under way at once; `stopped` leaves no trace in the API."""
        with self.lock:
            current = self.connection(key).current
            if current is not None:
                current.timeline.finish(word)

    def stop(self) -> None:
        """Tell all loading threads to give up, and give them a moment to do so."""
        self._workers.stop(STOP_WITHIN)

    def _cancel_work(self) -> None:
        with self.lock:
            for connection in self.connections.values():
                for sync in connection.syncs:
                    if sync.timeline.work is not None:
                        sync.timeline.work.cancelled.set()

    # -- syncs --

    def trigger(self, connection_id: str, *, force: bool = False) -> Sync | None:
        """Start a sync; None where nothing is started, of which the API says nothing.

        Raises:
            KeyError: no such connection.
        """
        with self.lock:
            connection = self.connection(connection_id)
            if connection.paused or connection.setup_state != "connected":
                # What Fivetran answers here is not documented; silence is the hardest for a client.
                return None
            current = connection.current
            if current is not None:
                again = current.rescheduled_for
                due = again is not None and connection.schedule_type == "manual" and time.time() >= again
                if not (force or due):
                    return None
                current.timeline.finish("stopped")
            return self._begin(connection, forced=force)

    def resync(self, connection_id: str, scope: Scope | None) -> Sync | None:
        """Start a historical sync; on a paused connection it is remembered, and None comes back.

        Raises:
            KeyError: no such connection.
            ResyncRefused: the scope does not fit, or a sync is in progress.
        """
        with self.lock:
            connection = self.connection(connection_id)
            if scope is not None:
                _check_scope(connection, scope)
            if connection.current is not None:
                raise ResyncRefused("A sync is in progress and could not be completed", conflict=True)
            connection.historical = True
            return None if connection.paused else self._begin(connection, historical=True)

    def _begin(
        self,
        connection: Connection,
        *,
        started_by: Literal["api", "schedule"] = "api",
        forced: bool = False,
        historical: bool = False,
    ) -> Sync:
        behaviour = connection.behaviour
        outcome = behaviour.outcome
        if outcome != "succeed" and behaviour.times is not None:
            connection.behaviour = behaviour.used_once()
        phases = _course(behaviour, outcome, connection.schedule_type)
        loads = connection.stream is not None and outcome in ("succeed", "reschedule")
        loads = loads and phases[-1].seconds < FOREVER
        timeline = Timeline(phases, _END_WORDS.get(outcome, "succeeded"), work=Work() if loads else None)
        previous = connection.syncs[-1] if connection.syncs else None
        sync = Sync(
            connection_id=connection.connection_id,
            started_by=started_by,
            forced=forced,
            historical=historical,
            outcome=outcome,
            timeline=timeline,
            hidden_until=timeline.started + behaviour.visibility_delay,
            rescheduled_seconds=behaviour.rescheduled_seconds,
        )
        connection.settle(stopped_is_failed=self.settings.stopped_is_failed)
        connection.syncs.append(sync)
        work = timeline.work
        if work is not None and connection.stream is not None:
            before = previous.timeline.work if previous is not None else None
            name = f"sandbox-fivetran-{connection.connection_id}"
            self._workers.start(name, self._work, timeline, connection.stream, work, before)
        return sync

    def _work(self, timeline: Timeline, stream: catalog.Stream, work: Work, before: Work | None) -> None:
        """Load the data of one sync: staged while it runs, made visible only when it is due to end."""
        try:
            # One that was stopped puts its own things away first.
            while before is not None and before.done_at is None:
                if work.cancelled.wait(0.02):
                    return
            if work.cancelled.wait(min(LONG, timeline.phases[0].seconds)):
                return
            work.rows, work.size = self.warehouse.stage(stream, _ADDED, work.cancelled)
            if work.cancelled.wait(min(LONG, max(0.0, timeline.planned_end - time.monotonic()))):
                self.warehouse.discard(stream)
                return
            self.warehouse.publish(stream, work.cancelled)
        except (Interrupted, duckdb.InterruptException):
            self.warehouse.discard(stream)
        except (WarehouseLocked, duckdb.Error, OSError) as exc:
            work.error = str(exc)
        finally:
            work.done_at = time.monotonic()


def instant(epoch: float) -> str:
    """An epoch time as Java writes an instant: in UTC, with none, three or six digits of a second."""
    moment = datetime.fromtimestamp(epoch, UTC)
    digits = "seconds" if not moment.microsecond else "microseconds"
    if moment.microsecond and moment.microsecond % 1000 == 0:
        digits = "milliseconds"
    return moment.isoformat(timespec=digits).replace("+00:00", "Z")


def _check_scope(connection: Connection, scope: Scope) -> None:
    if not scope or not all(scope.values()):
        raise ResyncRefused("The scope and the list of tables of each of its schemas must not be empty")
    if connection.service not in DATABASES:
        raise ResyncRefused(f"The connector {connection.service} does not support the re-sync of tables")
    table = connection.stream.name if connection.stream else None
    for schema, tables in scope.items():
        for name in tables:
            if schema != connection.source_schema or table not in (None, name):
                raise ResyncRefused(f"There is no table {schema}.{name}")


def _course(behaviour: FivetranBehaviour, outcome: FivetranOutcome, schedule: str) -> tuple[Phase, ...]:
    """The phases of a sync with this outcome."""
    waiting, syncing = Phase("scheduled", behaviour.queued_seconds), Phase("syncing", behaviour.duration)
    match outcome:
        case "stuck":
            return waiting, Phase("syncing", FOREVER)
        case "reschedule" if schedule == "manual":
            # Nobody but the API's user starts it again.
            return waiting, syncing, Phase("rescheduled", FOREVER)
        case "reschedule":
            return waiting, syncing, Phase("rescheduled", behaviour.rescheduled_seconds), syncing
        case "unknown_word":
            shown = FOREVER if behaviour.word_seconds is None else behaviour.word_seconds
            half = Phase("syncing", behaviour.duration / 2)
            return waiting, half, Phase(behaviour.word, shown), half
    return waiting, syncing
