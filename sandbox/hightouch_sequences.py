"""Hightouch's sync sequences: syncs that run one after the other, and the runs of the whole."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from sandbox import catalog
from sandbox.timeline import LONG, SequenceBehaviour, Workers, iso

if TYPE_CHECKING:
    from sandbox.hightouch import Hightouch, Run

_LOOK = 0.02  # seconds between two looks of a sequence at the sync that it waits for


@dataclass(slots=True)
class SequenceRun:
    """One run of a sequence."""

    sequence_id: str
    behaviour: SequenceBehaviour
    run_id: str = field(default_factory=lambda: str(uuid4()))
    created: float = field(default_factory=time.monotonic)
    word: str = "pending"
    members: list[Run] = field(default_factory=list)
    cut: threading.Event = field(default_factory=threading.Event)

    @property
    def final(self) -> bool:
        """Whether it has ended."""
        return self.word in ("done", "failed", "cancelled")

    @property
    def hidden(self) -> bool:
        """Whether the API does not know it yet."""
        return time.monotonic() < self.created + self.behaviour.visibility_delay

    def reply(self) -> dict[str, Any]:
        """The run as SyncSequenceStatusOutput; only syncs that have been started are in it."""
        return {
            "id": self.run_id,
            "status": self.word,
            "syncRuns": [
                {
                    "syncId": run.sync_id,
                    "syncRunId": run.run_id,
                    "status": run.status,
                    "finishedAt": None if run.finished_wall is None else iso(run.finished_wall, millis=True),
                }
                for run in list(self.members)
            ],
        }


@dataclass(slots=True)
class Sequence:
    """One sequence and how its next run will behave."""

    spec: catalog.SequenceSpec
    behaviour: SequenceBehaviour = field(default_factory=SequenceBehaviour)
    runs: list[SequenceRun] = field(default_factory=list)


class Sequences:
    """All sequences of the workspace.

    Args:
        hightouch: whose syncs they run.
        workers: the threads of the runs.
        stopping: set when all is to give up.
    """

    def __init__(self, hightouch: Hightouch, workers: Workers, stopping: threading.Event) -> None:
        self.all = {spec.sequence_id: Sequence(spec) for spec in catalog.SEQUENCES}
        self._hightouch = hightouch
        self._workers = workers
        self._stopping = stopping

    def sequence(self, key: str) -> Sequence:
        """A sequence by its id or name.

        Raises:
            KeyError: there is none.
        """
        found = self.all.get(key) or next((s for s in self.all.values() if s.spec.name == key), None)
        if found is None:
            raise KeyError(key)
        return found

    def set(self, key: str, **changes: Any) -> Sequence:
        """Change how a sequence's next runs behave (`SequenceBehaviour`).

        Raises:
            KeyError: no such sequence.
            pydantic.ValidationError: a field that does not exist, or a value that does not fit.
        """
        sequence = self.sequence(key)
        sent = SequenceBehaviour.model_validate(changes).model_dump(exclude_unset=True)
        sequence.behaviour = SequenceBehaviour.model_validate(sequence.behaviour.model_dump() | sent)
        return sequence

    def runs_of(self, key: str) -> list[SequenceRun]:
        """The runs of a sequence, oldest first."""
        with self._hightouch.lock:
            return list(self.sequence(key).runs)

    def run(self, run_id: str) -> SequenceRun:
        """A run by its id.

        Raises:
            KeyError: there is none, or it is not shown yet.
        """
        for sequence in self.all.values():
            for run in sequence.runs:
                if run.run_id == run_id and not run.hidden:
                    return run
        raise KeyError(run_id)

    def trigger(self, key: str) -> SequenceRun:
        """Start a run, never beside another: the one that is queued or in progress is given in its place.

        Raises:
            KeyError: no such sequence.
        """
        sequence = self.sequence(key)
        with self._hightouch.lock:
            going = [run for run in sequence.runs if not run.final]
            if len(going) > 1 or (going and not self._hightouch.settings.queue_sequences):
                return going[-1]
            behaviour = sequence.behaviour
            if behaviour.outcome != "succeed" and behaviour.times is not None:
                sequence.behaviour = behaviour.used_once()
            run = SequenceRun(sequence.spec.sequence_id, behaviour)
            sequence.runs.append(run)
        self._workers.start(f"sandbox-sequence-{run.run_id}", self._work, sequence, run, going)
        return run

    def finish_run(self, run_id: str) -> None:
        """Cancel a run at once, with the sync that it is at."""
        run = self.run(run_id)
        if not run.final:
            run.word = "cancelled"
            run.cut.set()
            for member in run.members:
                self._hightouch.finish_run(member.run_id, "cancelled")

    def _work(self, sequence: Sequence, run: SequenceRun, before: list[SequenceRun]) -> None:
        behaviour = run.behaviour
        while any(not earlier.final for earlier in before):
            if self._stopping.wait(_LOOK):
                return
        if self._pause(run, behaviour.queued_seconds):
            return
        run.word = "running"
        word = "done"
        for sync_id in sequence.spec.sync_ids:
            member = self._hightouch.trigger(sync_id)
            run.members.append(member)
            while not member.at()[2]:
                if self._pause(run, _LOOK):
                    return
            if member.status not in ("success", "warning") and self._hightouch.settings.stop_sequences:
                word = "failed"
                break
        if behaviour.outcome == "unknown_word":
            run.word = behaviour.word
            if self._pause(run, LONG if behaviour.word_seconds is None else behaviour.word_seconds):
                return
        if self._pause(run, LONG if behaviour.outcome == "stuck" else behaviour.duration):
            return
        run.word = "cancelled" if behaviour.outcome == "cancel" else word

    def _pause(self, run: SequenceRun, seconds: float) -> bool:
        """Wait so long; whether the run is over meanwhile."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            if self._stopping.is_set() or run.cut.wait(min(left, 0.05)):
                return True
        return self._stopping.is_set() or run.cut.is_set()
