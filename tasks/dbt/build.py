"""A dbt build that remembers: it goes on where an earlier attempt at it ended."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect.logging import get_run_logger

from tasks.dbt.invocation import Invocation, command_line
from tasks.dbt.memory import BuildRecord, Recorder
from tasks.dbt.model import COMMAND_TYPES, NEVER_RUN, DbtCore, DbtNode, DbtResult, DbtState
from tasks.dbt.nodes import node_from, state_of


class Build(Invocation):
    """build, run, test, seed or snapshot.

    What is left to do of an earlier attempt is done by dbt's own `retry`. It gets the state that it needs
    from the record, and not from a target folder that may be on another machine or, as dbt writes it only
    when it ends, was never written. An equivalent selection (`--select` with the names of what is left) would
    run all batches of a microbatch model again, and let it end at another moment than it began with.

    Args:
        dbt: The project and what to run of it.
        exclude: What else to leave out.
        record: Under which the build is remembered.
        earlier: What an earlier attempt has done; None to begin at the beginning.
        parsed: What dbt has parsed already, for which it need not be parsed again.
    """

    def __init__(
        self,
        dbt: DbtCore,
        exclude: list[str],
        record: BuildRecord,
        earlier: BuildRecord | None = None,
        parsed: Path | None = None,
    ) -> None:
        super().__init__(dbt, exclude)
        self._parsed = parsed
        self._earlier = earlier
        self._done: dict[str, DbtNode] = {}
        if earlier is not None:
            self._done = {n.unique_id: n.model_copy(update={"earlier": True}) for n in earlier.done}
            record = record.model_copy(
                update={
                    "started_at": earlier.started_at,
                    "nodes": [*self._done.values(), *earlier.left],
                    "batches": dict(earlier.batches),
                    "hidden": set(earlier.hidden),
                }
            )
        self._recorder = Recorder(record)

    async def run(self) -> DbtResult:
        """Run what is to be run.

        Returns:
            Every node, those that an earlier attempt has done included.
        """
        await self.invoke()
        ran = [self._node(record) for record in self.results]
        again = {node.unique_id for node in ran}
        return DbtResult.from_nodes(
            [*(node for id_, node in self._done.items() if id_ not in again), *ran],
            command=self.what,
            duration=self.seconds,
            invocation_id=self.invocation,
            warnings=self.warnings,
        )

    def request(self, profiles_dir: Path) -> dict[str, Any]:
        """What the child is asked to do, with what is left of an earlier attempt."""
        request = super().request(profiles_dir)
        request["parsed"] = str(self._parsed) if self._parsed else None
        if self._earlier is not None:
            kinds = COMMAND_TYPES.get(self.dbt.command)
            request["resume"] = {
                "args": command_line(self.dbt.without_full_refresh, ["retry"], profiles_dir),
                "flags": self.dbt.flags,
                "started_at": self._earlier.started_at.isoformat(),
                "complete": self._earlier.complete,
                "done": [*self._done, *self._earlier.hidden],
                "failed": [node.unique_id for node in self._earlier.left],
                "batches": self._earlier.batches,
                "kinds": sorted(kinds or NEVER_RUN),
                "kinds_not": kinds is None,
            }
        return request

    def take(self, record: dict[str, Any]) -> None:
        """Take one record of the child's."""
        if record["t"] == "resume":
            self._resumed(record["again"])
            return
        super().take(record)
        if record["t"] == "result":
            self._recorder.note(self._node(record), record["batches"])

    def finish(self, record: dict[str, Any]) -> None:
        """A node has ended."""
        super().finish(record)
        if record["t"] != "finish":
            return
        # Before the results, in which there is more about it: those are never seen if dbt is killed.
        if record["hidden"]:
            if state_of(record["status"]) is DbtState.SUCCESS:
                self._recorder.note_hidden(record["id"])
        elif record["id"] in self.runs.finished:
            seen = {"id": record["id"], "name": record["name"], "kind": record["kind"]}
            told = {"status": record["status"], "message": record["message"], "rows": record["rows"]}
            rest = {"seconds": record["seconds"], "failures": None, "compiled_path": None, "group": None}
            self._recorder.note(node_from({**seen, **told, **rest}, None, self.lineage))

    def well_ended(self) -> None:
        """The record is complete: what has not run by now was not asked for."""
        self._recorder.finished()

    async def close(self, why: str) -> None:
        """Put away what is open, and write down what was done."""
        await super().close(why)
        await self._recorder.close()

    def _resumed(self, again: list[str] | None) -> None:
        logger = get_run_logger()
        if again is None:
            self._done.clear()
            self._recorder.forget()
            logger.warning(
                "The warehouse is DuckDB in memory, and gone with the process that built it:"
                " everything is built again."
            )
            return
        broke_off = not self._earlier or not self._earlier.complete
        logger.info(
            "%s is taken up where it %s: %d nodes are done and not run again, %d are left.%s",
            self.what,
            "broke off" if broke_off else "failed",
            len(self._done),
            len(again),
            # dbt commits a node before it tells of it, and we write down in turns what it tells.
            " What was being built at that moment may have been done, which nobody knows: it is run again."
            if broke_off and again
            else "",
        )

    def _node(self, record: dict[str, Any]) -> DbtNode:
        skipped = record["status"] == "skipped"
        reason = self.blame.reason(record["id"], record["message"]) if skipped else None
        message = self.runs.explained(record["id"], record["message"])
        compiled = self.compiled(record)
        return node_from({**record, "message": message, "compiled_path": compiled}, reason, self.lineage)
