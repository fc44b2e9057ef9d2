"""The steps of a dbt Cloud run: what they leave behind, scripted or by really running dbt."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path

import orjson

from sandbox import dbt_cloud_project as project
from sandbox.timeline import DbtJobBehaviour
from sandbox.warehouse import Interrupted, Warehouse

DBT_PROJECT = Path(__file__).with_name("dbt")
_STOP = ((signal.SIGINT, 3.0), (signal.SIGKILL, 2.0))
_KEPT = ("manifest.json", "run_results.json", "catalog.json", "sources.json")


class StepStatus(IntEnum):
    """How a step ended."""

    SUCCESS = 10
    ERROR = 20
    CANCELLED = 30
    SKIPPED = 40


@dataclass(slots=True)
class Step:
    """One step of a run and what it left behind."""

    index: int
    name: str
    command: str | None = None
    status: StepStatus = StepStatus.SUCCESS
    logs: str = ""
    artifacts: dict[str, bytes] = field(default_factory=dict)
    folder: Path | None = None

    @property
    def runs(self) -> str | None:
        """The dbt command, if it is one that runs nodes."""
        return project.command_of(self.command) if self.command else None


def plan_steps(
    commands: list[str], behaviour: DbtJobBehaviour, *, docs: bool, retrying: list[Step] | None
) -> list[Step]:
    """The steps of a run: dbt Cloud's own first, then the job's commands; scripted ones with their results.

    Args:
        commands: The job's commands, or what overrides them.
        behaviour: How the run behaves.
        docs: Whether `dbt docs generate` comes last.
        retrying: The steps of the run that is retried.
    """
    steps = [
        Step(
            1, "Clone git repository", logs="Cloning into '/tmp/jobs'...\nSuccessfully cloned repository.\n"
        ),
        Step(2, "Create profile from connection DuckDB", logs="Profile:\n  nyc_flights:\n    target: dev\n"),
    ]
    if retrying is not None:
        broke = next(number for number, step in enumerate(retrying) if step.status is StepStatus.ERROR)
        later = [step.command for step in retrying[broke + 1 :] if step.command]
        commands, docs = ["dbt retry", *later], False
    first = ["dbt deps"] if behaviour.deps else []
    last = ["dbt docs generate"] if docs else []
    for command in [*first, *commands, *last]:
        steps.append(Step(len(steps) + 1, f"Invoke dbt with `{command}`", command))
    if not behaviour.real:
        _script(steps, behaviour, retrying)
    return steps


def _script(steps: list[Step], behaviour: DbtJobBehaviour, retrying: list[Step] | None) -> None:
    broken = project.find(behaviour.node) if behaviour.outcome == "fail" else None
    ended: StepStatus | None = None
    for number, step in enumerate(steps):
        if ended is not None:
            step.status = StepStatus.SKIPPED
            continue
        if behaviour.outcome == "fail_setup" and number == (2 if behaviour.deps else 1):
            step.logs = (
                "06:14:44  Running with dbt=1.11.2\n06:14:44  Encountered an error:\n"
                "External connection exception occurred: hub.getdbt.com could not be reached\n"
            )
            step.status = ended = StepStatus.ERROR
        elif step.command is not None:
            _script_command(step, behaviour, broken, retrying)
            ended = step.status if step.status is StepStatus.ERROR else None
        if behaviour.outcome in ("cancel", "stuck") and step.runs:
            step.status, ended, step.artifacts = StepStatus.CANCELLED, StepStatus.CANCELLED, {}


def _script_command(
    step: Step, behaviour: DbtJobBehaviour, broken: project.Node | None, retrying: list[Step] | None
) -> None:
    assert step.command is not None  # noqa: S101 - for the type checker
    manifest = orjson.dumps(project.manifest())
    if step.command == "dbt deps":
        step.logs = "06:14:44  Warning: No packages were found in packages.yml\n"
        return
    if step.command == "dbt docs generate":
        # It compiles everything and leaves run results of that: no word about what was built.
        results = project.run_results(step.command, project.selected("dbt build"), which="generate")
        step.artifacts = {"manifest.json": manifest, "catalog.json": b"{}"}
    elif step.runs == "retry":
        before = next(one for one in retrying or [] if one.status is StepStatus.ERROR)
        left = _unfinished(before)
        nodes = [node for node in project.NODES if node.unique_id in left]
        results = project.run_results(step.command, nodes, broken=broken, which=before.runs or "build")
        step.artifacts = {"manifest.json": manifest}
    elif step.runs:
        nodes = project.selected(step.command)
        warns = behaviour.outcome == "warn"
        results = project.run_results(step.command, nodes, broken=broken, warns=warns)
        step.artifacts = {"manifest.json": manifest}
    else:
        step.logs = f"06:14:44  Ran {step.command}\n"
        return
    step.artifacts["run_results.json"] = orjson.dumps(results)
    step.artifacts = {name: text for name, text in step.artifacts.items() if name not in behaviour.missing}
    step.logs = project.log_of(results)
    if any(result["status"] in ("error", "fail") for result in results["results"]):
        step.status = StepStatus.ERROR


def _unfinished(step: Step) -> set[str]:
    results = orjson.loads(step.artifacts["run_results.json"])["results"]
    return {one["unique_id"] for one in results if one["status"] in ("error", "fail", "skipped")}


def really_run(
    steps: list[Step],
    warehouse: Warehouse,
    cancelled: threading.Event,
    *,
    folder: Path,
    threads: int | None = None,
    state: Path | None = None,
) -> str | None:
    """Run the steps' commands with the dbt that is installed, on the stage's project and warehouse.

    Args:
        steps: Filled in with logs, artifacts and status as they run.
        warehouse: The DuckDB file; nobody else gets it meanwhile.
        cancelled: Set to interrupt dbt.
        folder: Where dbt writes, a folder per step.
        threads: dbt's threads; the profile's by default.
        state: Of a retry: the folder of the step that failed.

    Returns:
        What went wrong; None if all steps succeeded.
    """
    broken: str | None = None
    for step in steps:
        if cancelled.is_set():
            step.status = StepStatus.CANCELLED
        elif broken:
            step.status = StepStatus.SKIPPED
        elif step.command is not None and step.command != "dbt deps":
            step.folder = folder / str(step.index)
            extra = ["--threads", str(threads)] if threads else []
            extra += ["--state", str(state)] if step.runs == "retry" and state else []
            try:
                with warehouse.lent(cancelled) as path:
                    code = _invoke(step, path, cancelled, extra)
            except Interrupted:
                code = -1
            if cancelled.is_set():
                step.status = StepStatus.CANCELLED
            elif code:
                step.status, broken = StepStatus.ERROR, f"{step.command} ended with code {code}"
    return broken


def _invoke(step: Step, path: Path, cancelled: threading.Event, extra: list[str]) -> int:
    folder = step.folder
    assert folder is not None  # noqa: S101 - for the type checker
    assert step.command is not None  # noqa: S101 - for the type checker
    folder.mkdir(parents=True, exist_ok=True)
    place = ["--project-dir", str(DBT_PROJECT), "--profiles-dir", str(DBT_PROJECT)]
    written = ["--target-path", str(folder), "--log-path", str(folder), "--no-use-colors"]
    dbt = str(Path(sys.executable).with_name("dbt"))
    process = subprocess.Popen(  # noqa: S603 - a sandbox: its commands come from its own jobs
        [dbt, *shlex.split(step.command)[1:], *place, *written, *extra],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=folder,
        env={
            **os.environ,
            "ELT_WAREHOUSE": str(path),
            "DO_NOT_TRACK": "1",
            "DBT_SEND_ANONYMOUS_USAGE_STATS": "false",
        },
        start_new_session=True,
    )
    guard = threading.Thread(target=_stop_when, args=(cancelled, process), daemon=True)
    guard.start()
    step.logs, _ = process.communicate()
    guard.join()
    for name in _KEPT:
        if (file := folder / name).exists():
            step.artifacts[name] = file.read_bytes()
    return process.returncode


def _stop_when(cancelled: threading.Event, process: subprocess.Popen[str]) -> None:
    while process.poll() is None and not cancelled.wait(0.05):
        pass
    for signum, patience in _STOP:
        if process.poll() is not None:
            return
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signum)
        with suppress(subprocess.TimeoutExpired):
            process.wait(patience)
