"""One run of the dbt process, from its records to node task runs and to the end that it came to."""

from __future__ import annotations

import asyncio
import json
import re
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from prefect.logging import get_run_logger

from tasks.dbt.checks import check_end
from tasks.dbt.lineage import Lineage
from tasks.dbt.model import NEVER_RUN, DbtCore, DbtState, DbtTimeout, label_of, one_line
from tasks.dbt.nodes import Blame, NodeRuns, state_of
from tasks.dbt.process import DbtProcess, surroundings, to_the_end


@dataclass
class Invocation:
    """Runs dbt and shows each node while it runs; what comes of it is in `results`.

    Attributes:
        dbt: The project and what to run of it.
        exclude: What else to leave out.
        results: The child's last word on each node, see `record_of` in `tasks/dbt/child.py`.
        lineage: The graph, once dbt has written it.
        invocation: dbt's own id of the run.
        warnings: What dbt warned of that concerns no single node.
        seconds: How long it took.
    """

    dbt: DbtCore
    exclude: list[str]
    runs: NodeRuns = field(default_factory=NodeRuns)
    blame: Blame = field(default_factory=Blame)
    results: list[dict[str, Any]] = field(default_factory=list)
    lineage: Lineage | None = None
    invocation: str | None = None
    warnings: list[str] = field(default_factory=list)
    seconds: float = 0.0
    end: dict[str, Any] | None = None
    manifest: str | None = None
    reading: asyncio.Task[None] | None = None

    mode: ClassVar[Literal["run", "freshness"]] = "run"

    @property
    def what(self) -> str:
        """The command in short, for people."""
        return self.dbt.what

    @property
    def command(self) -> list[str]:
        """The command as dbt takes it."""
        return [self.dbt.command]

    async def invoke(self) -> None:
        """Run dbt to its end.

        Raises:
            DbtTimeout: It took longer than allowed.
            DbtError: It could not run, or was killed.
        """
        started = time.monotonic()
        why = "dbt ended without a word about this node"
        try:
            async with (
                asyncio.timeout(self.dbt.timeout) as limit,
                surroundings(self.dbt) as (profiles_dir, env),
            ):
                request = self.request(profiles_dir)
                async with DbtProcess.running(request, env=env, cwd=self.dbt.project) as process:
                    async for record in process.records():
                        if record.get("status") in {"error", "fail"} and self.reading:
                            await self.reading  # with the graph it can be said where the compiled SQL is
                        self.take(record)
            check_end(self.end, process, " ".join(self.command), done=len(self.runs.finished))
            await self._know()
            self.well_ended()
        except TimeoutError:
            if not limit.expired():
                raise
            why = f"dbt was stopped after {self.dbt.timeout:g} s"
            raise DbtTimeout(
                f"{self.what} did not finish within {self.dbt.timeout:g} s and was stopped;"
                f" {len(self.runs.finished)} nodes were done."
            ) from None
        except asyncio.CancelledError:
            why = "dbt was stopped because the run was cancelled"
            raise
        finally:
            self.seconds = time.monotonic() - started
            if self.reading is not None:
                self.reading.cancel()
            await to_the_end(self.close(why))

    async def close(self, why: str) -> None:
        """Put away what is open, however it ended."""
        await self.runs.close(why)

    def well_ended(self) -> None:
        """Act on dbt's having come to its end, before what is open is put away."""

    def request(self, profiles_dir: Path) -> dict[str, Any]:
        """What the child is asked to do."""
        narrow = self.dbt.must_narrow(self.exclude)
        return {
            "mode": self.mode,
            "args": command_line(self.dbt, self.command, profiles_dir),
            "selection": self.dbt.selection() if narrow else self.dbt.selection(self.exclude),
            "narrow": self.exclude if narrow else None,
            "list_args": command_line(self.dbt, ["ls"], profiles_dir),
            "resume": None,
        }

    def take(self, record: dict[str, Any]) -> None:
        """Take one record of the child's."""
        match record["t"]:
            case "start" if not record["hidden"]:
                self.runs.start(record["id"], record["kind"], record["name"])
            case "finish":
                self.finish(record)
            case "log":
                self._log(record)
            case "complaint":
                self.runs.complain(record["id"], record["text"])
            case "manifest":
                self._learn(record)
            case "result":
                self.results.append(record)
                self.finish(record)
            case "end":
                self.end = record

    def finish(self, record: dict[str, Any]) -> None:
        """A node has ended: live, or in the results with which dbt ends."""
        unique_id, state = record["id"], state_of(record["status"])
        message = record["message"]
        if state in {DbtState.FAIL, DbtState.ERROR}:
            self.blame.failed(unique_id, label_of(record["kind"], record["name"]))
        elif record.get("hidden"):
            return  # an ephemeral model that did not fail: nothing is built, there is nothing to show
        elif state is DbtState.SKIPPED:
            message = self.blame.reason(unique_id, message)
        if record["t"] == "result" or record.get("hidden"):
            # The last word on it, also for what was not seen while it ran (skipped by fail_fast, a failed
            # hook).
            self.runs.settle(
                unique_id,
                record["kind"],
                record["name"],
                record["status"],
                message,
                record.get("rows"),
                self.compiled(record),
            )
        else:
            self.runs.finish(unique_id, record["status"], message, record["rows"], self.compiled(record))

    def compiled(self, record: dict[str, Any]) -> str | None:
        """The file with a node's compiled SQL, seen from the project; None if dbt has not written any."""
        if (told := record.get("compiled_path")) is not None:
            return self._seen(Path(told))
        node = self.lineage.nodes.get(record["id"]) if self.lineage else None
        if node is None or not node.compiled or self.manifest is None:
            return None
        file = Path(self.manifest).parent / "compiled" / node.compiled
        if not file.is_file():
            file = file.with_suffix("")  # a file for each batch of a microbatch model
            if not file.is_dir():
                return None
        return self._seen(file)

    def _seen(self, file: Path) -> str:
        for project in (
            self.dbt.project,
            self.dbt.project.resolve(),
        ):  # dbt's own paths have no links in them
            if file.is_relative_to(project):
                return str(file.relative_to(project))
        return str(file)

    def _log(self, record: dict[str, Any]) -> None:
        if self.runs.log(record["id"], record["level"], record["text"]) or record["id"]:
            return
        # Without a node: dbt's warnings (deprecations, unused configs). Its errors come back with the
        # results.
        if record["level"] == "warn":
            text = _without_heading(record["text"])
            if record["name"] != "DeprecationsSummary":  # each has been told
                self.warnings.append(text)
            get_run_logger().warning("%s", text)
        else:
            get_run_logger().debug("%s", record["text"].strip())

    def _learn(self, record: dict[str, Any]) -> None:
        self.invocation, self.manifest = record["invocation"], record["path"]
        if self.reading is None:  # dbt writes it twice, before it runs and after
            self.reading = asyncio.create_task(self._read(record["path"]))

    async def _read(self, path: str) -> None:
        # Should dbt be writing it for the second time just now, it is read again at the end.
        with suppress(ValueError):
            self.lineage = await asyncio.to_thread(read_lineage, path)
            self.blame.know(self.lineage)

    async def _know(self) -> None:
        if self.reading is not None:
            await self.reading
        if self.lineage is None and self.manifest is not None:
            await self._read(self.manifest)


def _without_heading(text: str) -> str:
    """A warning of dbt's in one line: `[WARNING][SomeDeprecation]: Deprecated functionality …` without it."""
    flat = one_line(text, 1000)
    return re.sub(r"^\[WARNING\](?:\[(\w+)\])?: (?:Deprecated functionality )?", r"\1: ", flat).removeprefix(
        ": "
    )


def command_line(dbt: DbtCore, command: list[str], profiles_dir: Path) -> list[str]:
    """What dbt is called with, but for the selection."""
    return [*command, "--profiles-dir", str(profiles_dir), *dbt.arguments(command=command[0])]


def read_lineage(path: str) -> Lineage:
    """The graph out of a manifest.json."""
    return Lineage.from_manifest(json.loads(Path(path).read_bytes()))


def runs_kind(kinds: frozenset[str] | None, resource_type: str) -> bool:
    """Whether a command runs nodes of this type.

    Args:
        kinds: What the command runs, of COMMAND_TYPES; None for `build`.
        resource_type: The type.
    """
    return resource_type in kinds if kinds else resource_type not in NEVER_RUN
