"""dbt Core as Prefect tasks: a build with every node live in the UI, and a check before anything is started.

dbt runs as a child process that reports what happens node by node; see `tasks/dbt/child.py` for why that and
not `prefect-dbt`'s runner, which stays available as `engine="prefect-dbt"`. From `prefect-dbt` come the
profiles with Prefect blocks and variables in them.

    plan = await check_dbt(dbt)  # a clear sentence if project, profile or selection is wrong
    result = await dbt_build(dbt, exclude=plan.lineage.exclude_selectors(late_sources))
"""

from __future__ import annotations

import asyncio
import json
import re
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from prefect import task
from prefect.cache_policies import INPUTS, NO_CACHE, RUN_ID
from prefect.logging import get_run_logger
from prefect.runtime import task_run

from tasks.dbt.lineage import Lineage, LineageNode
from tasks.dbt.model import (
    COMMAND_TYPES,
    NEVER_RUN,
    DbtBuildFailed,
    DbtCore,
    DbtError,
    DbtNode,
    DbtPlan,
    DbtResult,
    DbtState,
    DbtTimeout,
    label_of,
    one_line,
)
from tasks.dbt.nodes import Blame, NodeRuns, node_from, state_of
from tasks.dbt.process import DbtProcess, surroundings, to_the_end

__all__ = [
    "DbtBuildFailed",
    "DbtCore",
    "DbtError",
    "DbtNode",
    "DbtPlan",
    "DbtResult",
    "DbtState",
    "DbtTimeout",
    "Lineage",
    "LineageNode",
    "check_dbt",
    "dbt_build",
    "dbt_plan",
]


def _run_name() -> str:
    dbt = task_run.parameters.get("dbt")
    return dbt.what if isinstance(dbt, DbtCore) else "dbt"


@task(
    name="dbt build",
    task_run_name=_run_name,
    tags=["dbt"],
    persist_result=True,
    # Not the task's source: a fix to this file between a run and its retry must not build everything again.
    cache_policy=INPUTS + RUN_ID,
)
async def dbt_build(dbt: DbtCore, exclude: Sequence[str] = ()) -> DbtResult:
    """Runs dbt and shows every node as a task run of its own, with dbt's and the database's own words.

    A retry of the same flow run with the same arguments does not run dbt again once it has succeeded. Node
    failures are not retried inside; to retry the step: `dbt_build.with_options(**dbt.task_options)`.

    When the task is cancelled, or `dbt.timeout` is over, dbt is interrupted (which makes it cancel its
    queries), then terminated, then killed, within 6 seconds. When this process dies, dbt notices and stops
    too.

    Args:
        dbt: The project and what to run of it.
        exclude: What else to leave out, in dbt's selection syntax, such as `source:raw_weather.weather+`.
        Unlike
            dbt's own --exclude it holds beside a selector too.

    Returns:
        Every node with state, message, rows and seconds. State `skipped` if `exclude` left nothing to do.

    Raises:
        DbtBuildFailed: dbt ran and some nodes failed; `.result` has all of them.
        DbtTimeout: It took longer than `dbt.timeout`.
        DbtError: dbt could not run at all, or the selection matches nothing.
    """
    logger = get_run_logger()
    await asyncio.to_thread(_look_at, dbt)
    excluded = sorted(set(exclude))
    if dbt.engine == "prefect-dbt":
        from tasks.dbt.in_process import run_in_process

        result = await run_in_process(dbt, excluded)
    else:
        result = await _Build(dbt, excluded).run()
    if not result.nodes and not excluded:
        raise DbtError(_nothing_selected(dbt))
    if result.failed:
        raise DbtBuildFailed(result)
    logger.info("%s: %s in %.1f s", result.command, result.message, result.duration)
    return result


@task(name="check dbt project", task_run_name="check dbt project", tags=["dbt"], cache_policy=NO_CACHE)
async def dbt_plan(dbt: DbtCore, lock_wait: float = 3.0) -> DbtPlan:
    """`check_dbt` as a task."""
    return await check_dbt(dbt, lock_wait=lock_wait)


async def check_dbt(dbt: DbtCore, *, lock_wait: float = 3.0) -> DbtPlan:
    """Looks whether dbt could run, before anything else is started, and what it would run.

    Args:
        dbt: The project and what to run of it.
        lock_wait: Seconds to wait for another process to let go of a DuckDB file.

    Returns:
        The nodes that the command would run, and the project's lineage.

    Raises:
        DbtError: With one sentence about what is wrong: project, profile, target, selection, a compilation
        error, a
            DuckDB file that another process holds.
    """
    await asyncio.to_thread(_look_at, dbt)
    found: dict[str, Any] = {}
    manifest: str | None = None
    async with surroundings(dbt) as (profiles_dir, env):
        args = _command_line(dbt, "ls", profiles_dir) + dbt.selection()
        request = {"mode": "plan", "args": args, "lock_wait": lock_wait}
        end: dict[str, Any] | None = None
        async with DbtProcess.running(request, env=env, cwd=dbt.project) as process:
            async for record in process.records():
                match record["t"]:
                    case "plan":
                        found = record
                    case "manifest":
                        manifest = record["path"]
                    case "end":
                        end = record
        _check_end(end, process, "ls")
    if found["locked"]:
        raise DbtError(_locked(found["locked"]) or one_line(found["locked"]))
    kinds = COMMAND_TYPES.get(dbt.command)
    selected = [
        str(node["unique_id"])
        for node in found["nodes"]
        if (node["resource_type"] in kinds if kinds else node["resource_type"] not in NEVER_RUN)
    ]
    if not selected:
        raise DbtError(_nothing_selected(dbt))
    if manifest is None:
        raise DbtError(f"dbt wrote no manifest.json for {dbt.project}, so its lineage is not known.")
    lineage = await asyncio.to_thread(_read_lineage, manifest)
    project = yaml.safe_load((dbt.project / "dbt_project.yml").read_text())["name"]
    return DbtPlan(
        project=str(project),
        adapter=found["adapter"],
        target=found["target"],
        selected=selected,
        lineage=lineage,
    )


@dataclass
class _Build:
    """One dbt invocation, from the child's records to a result."""

    dbt: DbtCore
    exclude: list[str]
    runs: NodeRuns = field(default_factory=NodeRuns)
    blame: Blame = field(default_factory=Blame)
    results: list[dict[str, Any]] = field(default_factory=list)
    end: dict[str, Any] | None = None
    invocation: str | None = None
    manifest: str | None = None
    reading: asyncio.Task[None] | None = None
    lineage: Lineage | None = None

    async def run(self) -> DbtResult:
        started = time.monotonic()
        why = "dbt ended without a word about this node"
        try:
            async with (
                asyncio.timeout(self.dbt.timeout) as limit,
                surroundings(self.dbt) as (profiles_dir, env),
            ):
                request = self._request(profiles_dir)
                async with DbtProcess.running(request, env=env, cwd=self.dbt.project) as process:
                    async for record in process.records():
                        self._take(record)
            _check_end(self.end, process, self.dbt.command, done=len(self.runs.finished))
            nodes = await self._nodes()
        except TimeoutError:
            if not limit.expired():
                raise
            why = f"dbt was stopped after {self.dbt.timeout:g} s"
            raise DbtTimeout(
                f"{self.dbt.what} did not finish within {self.dbt.timeout:g} s and was stopped;"
                f" {len(self.runs.finished)} nodes were done."
            ) from None
        except asyncio.CancelledError:
            why = "dbt was stopped because the run was cancelled"
            raise
        finally:
            if self.reading is not None:
                self.reading.cancel()
            await to_the_end(self.runs.close(why))
        return DbtResult.from_nodes(
            nodes, command=self.dbt.what, duration=time.monotonic() - started, invocation_id=self.invocation
        )

    def _request(self, profiles_dir: Path) -> dict[str, Any]:
        args = _command_line(self.dbt, self.dbt.command, profiles_dir)
        if not self.dbt.must_narrow(self.exclude):
            return {"mode": "run", "args": args + self.dbt.selection(self.exclude), "list_args": None}
        listing = _command_line(self.dbt, "ls", profiles_dir) + self.dbt.selection()
        return {"mode": "run", "args": [*args, "--exclude", *self.exclude], "list_args": listing}

    def _take(self, record: dict[str, Any]) -> None:
        match record["t"]:
            case "start" if not record["hidden"]:
                self.runs.start(record["id"], record["kind"], record["name"])
            case "finish":
                self._finish(record)
            case "log":
                self._log(record)
            case "complaint":
                self.runs.complain(record["id"], record["text"])
            case "manifest":
                self._learn(record)
            case "result":
                self.results.append(record)
                self._finish(record)
            case "end":
                self.end = record

    def _finish(self, record: dict[str, Any]) -> None:
        unique_id, state = record["id"], state_of(record["status"])
        message = record["message"]
        if state in {DbtState.FAIL, DbtState.ERROR}:
            self.blame.failed(unique_id, label_of(record["kind"], record["name"]))
        elif state is DbtState.SKIPPED:
            message = message or self.blame.reason(unique_id)
        elif record.get("hidden"):
            return  # an ephemeral model that compiled: nothing was built, there is nothing to show
        if record["t"] == "result" or record.get("hidden"):
            # The last word on it, also for what was not seen while it ran (skipped by fail_fast, a failed
            # hook).
            self.runs.settle(
                unique_id, record["kind"], record["name"], record["status"], message, record.get("rows")
            )
        else:
            self.runs.finish(unique_id, record["status"], message, record["rows"])

    def _log(self, record: dict[str, Any]) -> None:
        if self.runs.log(record["id"], record["level"], record["text"]) or record["id"]:
            return
        # Without a node: dbt's warnings (deprecations, unused configs). Its errors come back with the
        # results.
        if record["level"] == "warn":
            get_run_logger().warning("%s", one_line(record["text"], 1000))
        else:
            get_run_logger().debug("%s", record["text"].strip())

    def _learn(self, record: dict[str, Any]) -> None:
        self.invocation, self.manifest = record["invocation"], record["path"]
        if self.reading is None:  # dbt writes it twice, before it runs and after
            self.reading = asyncio.create_task(self._read(record["path"]))

    async def _read(self, path: str) -> None:
        # Should dbt be writing it for the second time just now, it is read again at the end.
        with suppress(ValueError):
            self.lineage = await asyncio.to_thread(_read_lineage, path)
            self.blame.know(self.lineage)

    async def _nodes(self) -> list[DbtNode]:
        if self.reading is not None:
            await self.reading
        if self.lineage is None and self.manifest is not None:
            await self._read(self.manifest)
        return [self._node(record) for record in self.results]

    def _node(self, record: dict[str, Any]) -> DbtNode:
        reason = self.blame.reason(record["id"]) if record["status"] == "skipped" else None
        message = self.runs.explained(record["id"], record["message"])
        return node_from({**record, "message": message}, reason, self.lineage)


def _command_line(dbt: DbtCore, command: str, profiles_dir: Path) -> list[str]:
    return [command, "--profiles-dir", str(profiles_dir), *dbt.arguments(command=command)]


def _read_lineage(path: str) -> Lineage:
    return Lineage.from_manifest(json.loads(Path(path).read_bytes()))


def _check_end(end: dict[str, Any] | None, process: DbtProcess, command: str, done: int = 0) -> None:
    """Raise unless dbt came to a proper end."""
    if end is not None and end["error"] is None:
        return
    if end is not None:
        text = str(end["error"])
        raise DbtError(_locked(text) or f"dbt {command} could not run: {one_line(text, 800)}")
    code = process.exit_code or 0
    after = f" after {done} nodes" if done else ""
    if code < 0:
        name = signal.Signals(-code).name
        hint = "; the machine may be out of memory" if -code == signal.SIGKILL else ""
        raise DbtError(f"dbt {command} was killed by {name}{after}{hint}.")
    last = process.stderr.splitlines()[-1:] or ["it said nothing"]
    raise DbtError(f"dbt {command} broke off with exit code {code}{after}: {one_line(last[0], 800)}")


def _look_at(dbt: DbtCore) -> None:
    """What can be seen to be wrong without starting dbt."""
    if not dbt.project.is_dir():
        raise DbtError(
            f"The dbt project folder {dbt.project} does not exist: set project_dir to the right one."
        )
    file = dbt.project / "dbt_project.yml"
    if not file.is_file():
        raise DbtError(f"{dbt.project} is not a dbt project: it has no dbt_project.yml.")
    profiles_file = dbt.find_profiles_dir() / "profiles.yml"
    if not profiles_file.is_file():
        raise DbtError(
            f"No profiles.yml in {profiles_file.parent}: set profiles_dir to the folder that has it,"
            " or put one into the dbt project."
        )
    project, profiles = _yaml(file), _yaml(profiles_file)
    name = project.get("profile")
    if not isinstance(name, str) or "{{" in name:
        return  # rendered by dbt, which will tell
    if name not in profiles:
        known = ", ".join(sorted(key for key in profiles if key != "config")) or "none"
        raise DbtError(f"Profile {name!r} (of {file}) is not in {profiles_file}; profiles there: {known}.")
    outputs = (profiles[name] or {}).get("outputs") or {}
    if dbt.target and dbt.target not in outputs:
        raise DbtError(
            f"Target {dbt.target!r} is not in profile {name!r} of {profiles_file};"
            f" targets there: {', '.join(sorted(outputs)) or 'none'}."
        )


def _yaml(path: Path) -> dict[str, Any]:
    try:
        found = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise DbtError(f"{path} is not valid YAML: {one_line(str(error))}") from error
    if not isinstance(found, dict):
        raise DbtError(f"{path} is empty or not a YAML mapping.")
    return found


def _nothing_selected(dbt: DbtCore) -> str:
    words = " ".join(dbt.selection()) or "everything"
    return (
        f"The dbt selection matches nothing that `dbt {dbt.command}` runs: {words}, in {dbt.project}."
        " `dbt ls` with the same words shows what they match."
    )


def _locked(text: str) -> str | None:
    """DuckDB's lock error as a sentence that names the file and who holds it; None if the text is not one."""
    file = re.search(r'Could not set lock on file "([^"]+)"', text)
    if not file:
        return None
    holder = re.search(r"Conflicting lock is held in (.+?) \(PID (\d+)\)", text)
    by = f"process {holder[2]} ({holder[1]})" if holder else "another process"
    return f"The DuckDB file {file[1]} is locked by {by}: end that first, DuckDB takes one writer at a time."
