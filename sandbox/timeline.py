"""How a vendor's job passes through its states: behaviours a person can set, and the clockwork behind them.

A job's course is fixed when it starts, and its state is worked out from the clock when somebody asks, so a
thousand waiting jobs cost nothing.
"""

from __future__ import annotations

import atexit
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from threading import Event, Thread
from typing import Any, Literal, Self
from weakref import WeakSet

from pydantic import BaseModel, ConfigDict, Field

FOREVER = float("inf")
LONG = 1e6  # seconds; to wait for ever in a thread takes a finite number
STOP_WITHIN = 0.1  # seconds that threads get to give up when the sandbox stops
EXIT_WITHIN = 10.0  # the same when the interpreter exits
AirbyteOutcome = Literal[
    "succeed", "fail", "cancel", "incomplete_then_succeed", "partial", "stuck", "zero_rows", "unknown_word"
]
AirbyteFailure = Literal["config_error", "system_error", "transient_error", "heartbeat_timeout"]
HightouchOutcome = Literal[
    "succeed", "warn", "fail", "cancel", "interrupt", "stuck", "zero_rows", "unknown_word"
]
SequenceOutcome = Literal["succeed", "cancel", "stuck", "unknown_word"]
CensusOutcome = Literal["succeed", "partial", "fail", "cancel", "stuck", "zero_rows", "unknown_word"]

DbtCloudOutcome = Literal["succeed", "warn", "fail", "fail_setup", "cancel", "stuck", "unknown_word"]
FivetranOutcome = Literal[
    "succeed", "fail", "reschedule", "stuck", "pause", "break", "cancel", "unknown_word"
]


class Behaviour(BaseModel):
    """How jobs behave from the next start on. Times are seconds."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True)

    duration: float = Field(3.0, ge=0, description="A job works at least this long, once out of the queue.")
    queued_seconds: float = Field(0.0, ge=0, description="How long a job waits for capacity.")
    times: int | None = Field(None, ge=1, description="The outcome holds for so many jobs.")
    word: str = Field("paused", description="The status text of outcome unknown_word.")
    word_seconds: float | None = Field(None, ge=0, description="How long that text is shown; none: for ever.")
    visibility_delay: float = Field(
        0.0, ge=0, description="For this long a new job is missing from the vendor's lists."
    )

    def used_once(self) -> Self:
        """The behaviour after one job that its outcome was limited to."""
        left = (self.times or 1) - 1
        spent: dict[str, Any] = {"times": None, "outcome": "succeed"}
        return self.model_copy(update={"times": left} if left else spent)


class ConnectionBehaviour(Behaviour):
    """How an Airbyte connection's jobs behave."""

    outcome: AirbyteOutcome = "succeed"
    attempts: int = Field(1, ge=1, description="Of outcomes fail and incomplete_then_succeed (two at least).")
    reason: str = Field("The source refused the connection.", description="Why an attempt fails.")
    origin: Literal["source", "destination", "replication"] = "source"
    failure: AirbyteFailure = "transient_error"
    rejected: int = Field(0, ge=0, description="Rows that the destination rejects.")


class SyncBehaviour(Behaviour):
    """How a Hightouch sync's runs behave."""

    outcome: HightouchOutcome = "succeed"
    rejected: float = Field(0.1, gt=0, le=1, description="The share of rows that outcome warn rejects.")


class DbtJobBehaviour(Behaviour):
    """How a dbt Cloud job's runs behave."""

    outcome: DbtCloudOutcome = "succeed"
    word: str = Field("7", pattern=r"^\d+$", description="The status number of outcome unknown_word.")
    visibility_delay: float = Field(0.0, ge=0, description="For this long a new run is answered with 404.")
    real: bool = Field(False, description="Whether dbt really runs, on the stage's project and warehouse.")
    node: str = Field("fct_flights", description="The node (or test) that outcome fail breaks.")
    deps: bool = Field(True, description="Whether the automatic first steps include `dbt deps`.")
    missing: list[str] = Field(default_factory=list, description="Artifacts that a run leaves out.")
    artifacts_delay: float = Field(0.0, ge=0, description="For so long after the end there are none.")
    logs_delay: float = Field(0.0, ge=0, description="For so long after the end steps' logs are empty.")
    cancel_seconds: float = Field(0.1, ge=0, description="How long a cancelled run goes on running.")


class FivetranBehaviour(Behaviour):
    """How a Fivetran connection's syncs behave."""

    outcome: FivetranOutcome = "succeed"
    rescheduled_seconds: float = Field(
        1.0, ge=0, description="How far ahead a sync that the source's quota stopped is rescheduled."
    )


class SequenceBehaviour(Behaviour):
    """How a Hightouch sequence's runs behave; how its syncs end, the syncs say."""

    duration: float = Field(0.0, ge=0, description="A run goes on at least this long after its last sync.")
    outcome: SequenceOutcome = "succeed"


class CensusBehaviour(Behaviour):
    """How a Census sync's runs behave."""

    outcome: CensusOutcome = "succeed"
    failed: float = Field(0.1, ge=0, le=1, description="The share of rows outcome partial fails.")
    invalid: float = Field(0.05, ge=0, le=1, description="The share of rows that it finds invalid.")
    cancel_word: str = Field("cancelled", description="The status beside `canceled: true`: undocumented.")


@dataclass(frozen=True, slots=True)
class Phase:
    """A status and how long it lasts, in seconds."""

    word: str
    seconds: float


@dataclass(slots=True)
class Work:
    """What a job really does, in a thread of its own: the job ends no earlier than this is done."""

    cancelled: Event = field(default_factory=Event)
    done_at: float | None = None  # monotonic
    rows: int = 0
    size: int = 0
    error: str | None = None


class Workers:
    """The threads that do the real work of jobs.

    They are daemons, so a forgotten sandbox keeps no process alive. But a daemon thread that is inside DuckDB
    while the interpreter goes away aborts the process: so at exit all are told to stop and waited for.

    Args:
        tell: tells all threads to give up.
    """

    def __init__(self, tell: Callable[[], None]) -> None:
        self._tell = tell
        self._threads: set[Thread] = set()
        _all_workers.add(self)

    def start(self, name: str, function: Callable[..., None], *args: object) -> None:
        """Run a function in a thread of its own."""
        self._threads = {thread for thread in self._threads if thread.is_alive()}
        thread = Thread(target=function, name=name, args=args, daemon=True)
        self._threads.add(thread)
        thread.start()

    def stop(self, within: float) -> None:
        """Tell the threads to give up, and give them so many seconds in all to do it."""
        self._tell()
        deadline = time.monotonic() + within
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))


_all_workers: WeakSet[Workers] = WeakSet()


@atexit.register
def _stop_all_workers() -> None:
    for workers in list(_all_workers):
        workers.stop(EXIT_WITHIN)


@dataclass(slots=True)
class Timeline:
    """The course of one job: phases in order, then an end word, unless it is cut short."""

    phases: tuple[Phase, ...]
    end_word: str
    failed_word: str = "failed"
    work: Work | None = None
    started: float = field(default_factory=time.monotonic)
    started_wall: float = field(default_factory=time.time)
    cut: tuple[float, str] | None = None  # monotonic time and the word it ended with

    def wall(self, moment: float) -> float:
        """The wall clock (epoch seconds) at a monotonic moment of this job's life."""
        return self.started_wall + (moment - self.started)

    @property
    def planned_end(self) -> float:
        """The monotonic moment at which the phases are over."""
        return self.started + sum(phase.seconds for phase in self.phases)

    def at(self, now: float | None = None) -> tuple[str, float, bool]:
        """The status at a moment, the moment it began, and whether it is final."""
        now = time.monotonic() if now is None else now
        if self.cut is not None:
            return self.cut[1], self.cut[0], True
        begin = self.started
        for phase in self.phases:
            if now < begin + phase.seconds:
                return phase.word, begin, False
            begin += phase.seconds
        if self.work is None:
            return self.end_word, begin, True
        if self.work.done_at is None:
            last = self.phases[-1]
            return last.word, begin - last.seconds, False
        ended = max(begin, self.work.done_at)
        return (self.failed_word if self.work.error else self.end_word), ended, True

    def finish(self, word: str) -> None:
        """End the job now with this word, unless it has ended; its work is told to stop."""
        if not self.at()[2]:
            self.cut = (time.monotonic(), word)
            if self.work is not None:
                self.work.cancelled.set()


def iso(epoch: float, *, millis: bool = False) -> str:
    """An epoch time as RFC 3339 in UTC, to the second (Airbyte) or the millisecond (Hightouch)."""
    moment = datetime.fromtimestamp(epoch, UTC)
    text = moment.isoformat(timespec="milliseconds" if millis else "seconds")
    return text.replace("+00:00", "Z")
