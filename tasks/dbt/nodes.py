"""Every dbt node as a Prefect task run of its own, live while dbt runs.

The node's task does no work: it waits for what the dbt process reports, passes dbt's log lines on, and ends
in the state that dbt gave the node. So it is cheap (no cache, no retries, no persisted result) and its times
are dbt's.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.context import TaskRunContext
from prefect.logging import get_run_logger
from prefect.states import Cancelled, Completed, Failed
from prefect.transactions import CommitMode, get_transaction

from tasks.dbt.lineage import Lineage
from tasks.dbt.model import DbtNode, DbtState, label_of

_STATES = {
    "success": DbtState.SUCCESS,
    "pass": DbtState.SUCCESS,
    "no-op": DbtState.SUCCESS,
    "warn": DbtState.WARN,
    "fail": DbtState.FAIL,
    "skipped": DbtState.SKIPPED,
}
_LEVELS = {"info": logging.INFO, "warn": logging.WARNING, "error": logging.ERROR}


class _Feed(asyncio.Queue[tuple[int, str] | Callable[[], State[None]]]):
    """What the node's task is told: log lines (level, text), at last how to end.

    Not the state itself: one made before the task was Running carries an earlier time than Running, and the
    server would keep the node Running for ever.
    """


@task(name="dbt node", task_run_name="{label}", cache_policy=NO_CACHE, persist_result=False, retries=0)
async def dbt_node(label: str, kind: str, feed: _Feed) -> State[None]:
    """Stands for one node of a running dbt and ends as the node ends."""
    if context := TaskRunContext.get():
        # Not as tags of the task: Prefect would ask the API for a concurrency slot per tag (a request per
        # node), and with a limit on the tag `dbt` the nodes would wait for a slot that their own build holds.
        context.task_run.tags = sorted({*context.task_run.tags, "dbt", kind})
    if transaction := get_transaction():
        # A node that is done is done. By default its transaction waits for that of the build, and when the
        # build fails, every node that had succeeded turns from Completed into RolledBack.
        transaction.commit_mode = CommitMode.EAGER
    logger = get_run_logger()
    while True:
        item = await feed.get()
        if callable(item):
            return item()
        logger.log(*item)


@dataclass
class _Open:
    feed: _Feed
    runs: int = 1  # a microbatch model starts and finishes once for itself and once for each batch, nested


@dataclass
class NodeRuns:
    """The node task runs of one dbt invocation."""

    finished: dict[str, DbtState] = field(default_factory=dict)
    _complaints: dict[str, str] = field(default_factory=dict)
    _open: dict[str, _Open] = field(default_factory=dict)
    _tasks: list[asyncio.Task[Any]] = field(default_factory=list)

    def start(self, unique_id: str, kind: str, name: str) -> None:
        """A node starts: its task run appears."""
        if unique_id in self.finished:
            return
        if node := self._open.get(unique_id):
            node.runs += 1
            return
        node = self._open[unique_id] = _Open(_Feed())
        # Prefect's overloads do not know an async task that returns a state.
        run: Any = dbt_node(label_of(kind, name), kind, node.feed, return_state=True)
        self._tasks.append(asyncio.create_task(run))

    def log(self, unique_id: str, level: str, text: str) -> bool:
        """Passes a line of dbt's on to the node's own log; False if the node is not running."""
        node = self._open.get(unique_id)
        if node is not None:
            # dbt says when a node starts, and so does its task run.
            quiet = level == "info" and " START " in text
            node.feed.put_nowait((logging.DEBUG if quiet else _LEVELS[level], text.strip()))
        return node is not None

    def finish(
        self,
        unique_id: str,
        status: str,
        message: str | None,
        rows: int | None = None,
        compiled: str | None = None,
    ) -> None:
        """A node ends, and so does its task run.

        Args:
            unique_id: dbt's id of the node.
            status: dbt's word for how it ended.
            message: dbt's or the database's words; of a skipped node: why.
            rows: Rows written, if known.
            compiled: The file with the SQL that was sent, told with the message of a node that failed.
        """
        node = self._open.get(unique_id)
        if node is None:
            return
        node.runs -= 1
        if node.runs:
            if message and state_of(status) is DbtState.ERROR:
                self.complain(unique_id, message)
            return
        del self._open[unique_id]
        state = self.finished[unique_id] = state_of(status)
        message = self.explained(unique_id, message)
        if state in {DbtState.FAIL, DbtState.ERROR}:
            message = message or "dbt gave no reason"
            message += f"\ncompiled: {compiled}" if compiled else ""
            # dbt prints errors at its end only, when nobody knows any more which node is meant.
            node.feed.put_nowait((logging.ERROR, message))
        node.feed.put_nowait(partial(_prefect_state, state, message, rows))

    def complain(self, unique_id: str, text: str) -> None:
        """Part of a node (a batch) failed for this reason, which the node's own message will not repeat."""
        self._complaints.setdefault(unique_id, text)

    def explained(self, unique_id: str, message: str | None) -> str | None:
        """A node's message together with what was complained about its parts."""
        complaint = self._complaints.get(unique_id)
        if complaint is None or complaint in (message or ""):
            return message
        return f"{message}: {complaint}" if message else complaint

    def settle(
        self,
        unique_id: str,
        kind: str,
        name: str,
        status: str,
        message: str | None,
        rows: int | None = None,
        compiled: str | None = None,
    ) -> None:
        """A node's last word: ends its task run if it is open, shows one if there was none."""
        if unique_id in self.finished:
            return
        if unique_id not in self._open:
            self.start(unique_id, kind, name)
        self._open[unique_id].runs = 1
        self.finish(unique_id, status, message, rows, compiled)

    async def close(self, why: str) -> None:
        """Ends what is still open as Cancelled and waits for the task runs to be through.

        Args:
            why: What became of dbt, for the nodes that it left unfinished.
        """
        for node in self._open.values():
            node.feed.put_nowait(partial(Cancelled, message=why))
        self._open.clear()
        if not self._tasks:
            return
        # Each has its last word in its queue; the limit is for a Prefect API that does not answer.
        _, stuck = await asyncio.wait(self._tasks, timeout=5)
        for run in stuck:
            run.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


def state_of(status: str) -> DbtState:
    """Our state for dbt's word; a word that is not known (`partial success`, `runtime error`) is an error."""
    return _STATES.get(status, DbtState.ERROR)


def _prefect_state(state: DbtState, message: str | None, rows: int | None) -> State[None]:
    if state in {DbtState.FAIL, DbtState.ERROR}:
        return Failed(message=message)
    if state is DbtState.SKIPPED:
        return Cancelled(name="Skipped", message=message)
    if state is DbtState.WARN:
        return Completed(name="Warned", message=message)
    return Completed(message=f"{rows:,} rows" if rows is not None else None)


class Blame:
    """Why dbt skipped a node: which failure above it did that."""

    def __init__(self) -> None:
        self._lineage: Lineage | None = None
        self._failed: list[tuple[str, str]] = []
        self._reasons: dict[str, str] = {}
        self._hook: str | None = None  # one before all nodes, for whose failure dbt may skip them

    def know(self, lineage: Lineage) -> None:
        """The graph, as soon as it has been read."""
        self._lineage = lineage
        for unique_id, label in self._failed:
            self.failed(unique_id, label)

    def failed(self, unique_id: str, label: str) -> None:
        """A node failed; for a test, what it tests is in doubt."""
        reason = f"{label} failed"
        self._reasons[unique_id] = reason
        if unique_id.startswith("operation.") and "-on-run-start-" in unique_id:
            self._hook = reason
        if self._lineage is None:
            self._failed.append((unique_id, label))
            return
        node = self._lineage.nodes.get(unique_id)
        if node is not None and node.resource_type in {"test", "unit_test"}:
            # dbt holds back whatever is below any node that a failed test reads, not only below the one it is
            # on.
            for parent in node.parents:
                self._reasons.setdefault(parent, reason)

    def reason(self, unique_id: str, told: str | None = None) -> str:
        """Why this node was skipped.

        Args:
            unique_id: The node.
            told: What dbt says of it, which counts where no failure above it is known.
        """
        above: list[str] = [unique_id]
        if self._lineage:
            # What it reads directly first: of several failures the nearest is meant.
            above += [*self._lineage.parents(unique_id), *sorted(self._lineage.upstream([unique_id]))]
        found = next((self._reasons[i] for i in above if i in self._reasons), None)
        if found is None:
            some = "something above it failed" if self._failed or self._reasons else "dbt did not run it"
            return self._hook or told or some
        self._reasons[unique_id] = found
        return found


def node_from(record: dict[str, Any], reason: str | None, lineage: Lineage | None) -> DbtNode:
    """A result record of the dbt process as a `DbtNode`.

    Args:
        record: See `record_of` in `tasks/dbt/child.py`.
        reason: Why it was skipped, if it was.
        lineage: The graph, for the owner of the node's group.
    """
    state = state_of(record["status"])
    known = lineage.nodes.get(record["id"]) if lineage else None
    return DbtNode(
        unique_id=record["id"],
        name=record["name"],
        resource_type=record["kind"],
        state=state,
        message=reason if reason and state is DbtState.SKIPPED else record["message"],
        rows=record["rows"],
        failures=record["failures"],
        duration=record["seconds"],
        compiled_path=record["compiled_path"],
        group=record["group"] or (known.group if known else None),
        owner=known.owner if known else None,
    )
