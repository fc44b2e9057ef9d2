"""dbt with every node visible as a task run, beside plain `dbt build` of the same project and state."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import httpx

from bench.measured import Measured, run_measured
from bench.stage import ROOT, BenchError, Stage
from deployments.server import Postgres

_THREADS = 8
_WIDTH = 8  # models of a generated project that can be built at the same time
_PATIENCE = 600.0  # seconds for one dbt build
_SHOWN_WITHIN = 60.0  # seconds until the server must show the task runs of a build

Adapter = Literal["duckdb", "postgres"]
_OUTPUTS: dict[Adapter, dict[str, Any]] = {
    "duckdb": {"type": "duckdb", "path": "{{ env_var('ELT_WAREHOUSE') }}"},
    "postgres": {
        "type": "postgres",
        "host": "{{ env_var('ELT_WAREHOUSE') }}",
        "port": 5432,
        "user": "postgres",
        "password": "",
        "dbname": "postgres",
        "schema": "generated",
    },
}


@dataclass(frozen=True)
class Project:
    """A dbt project in a folder of its own.

    Attributes:
        warehouse: The DuckDB file, or the folder with PostgreSQL's socket.
    """

    name: str
    folder: Path
    warehouse: Path

    @property
    def env(self) -> dict[str, str]:
        """What its profile needs."""
        return {"ELT_WAREHOUSE": str(self.warehouse)}


@dataclass(frozen=True)
class DbtCost:
    """Both ways of building a project, measured in pairs one after the other.

    Attributes:
        nodes: How many nodes each build ran, and the Prefect server showed as task runs.
        ours: Seconds of the flow's call, one figure per pair.
        plain: Seconds of the `dbt build` process, one per pair.
        measured: The last of ours.
    """

    project: str
    nodes: int
    ours: list[float]
    plain: list[float]
    measured: Measured

    @property
    def ratio(self) -> float:
        """The median of the pairs' ratios."""
        return statistics.median(ours / plain for ours, plain in zip(self.ours, self.plain, strict=True))


def demo_project(stage: Stage) -> Project:
    """The sandbox's project, with all data landed by the sandbox's own loader."""
    folder, warehouse = stage.folder / "demo-dbt", stage.folder / "demo.duckdb"
    shutil.copytree(
        ROOT / "sandbox" / "dbt", folder, ignore=shutil.ignore_patterns("target", "logs", "dbt_packages")
    )
    with stage.sandbox("sandbox-loading", warehouse) as sandbox:
        sandbox.load_everything()
    return Project("the demo's project", folder, warehouse)


@contextmanager
def generated_project(stage: Stage, models: int, adapter: Adapter = "duckdb") -> Iterator[Project]:
    """Tables of one row, eight beside each other, so that dbt's own work and ours are all there is.

    Args:
        stage: Where it is put.
        models: How many.
        adapter: On what. PostgreSQL comes from a wheel, and runs as long as this is open.
    """
    folder = stage.folder / f"generated-{models}-{adapter}"
    (folder / "models").mkdir(parents=True)
    output = {**_OUTPUTS[adapter], "threads": _THREADS}
    settings = {"name": "generated", "profile": "generated", "flags": {"send_anonymous_usage_stats": False}}
    settings["models"] = {"generated": {"+materialized": "table"}}
    (folder / "dbt_project.yml").write_text(json.dumps(settings))
    profile = {"generated": {"target": "dev", "outputs": {"dev": output}}}
    (folder / "profiles.yml").write_text(json.dumps(profile))
    for number in range(models):
        above = f"{{{{ ref('model_{number - _WIDTH:03d}') }}}}"
        source = above if number >= _WIDTH else "(select 1 as id) as one"
        sql = f"select id + 1 as id from {source}\n"  # noqa: S608 - a generated model, not a query of ours
        (folder / "models" / f"model_{number:03d}.sql").write_text(sql)
    name = f"{models} trivial models on {adapter}"
    if adapter == "duckdb":
        yield Project(name, folder, stage.folder / f"{folder.name}.duckdb")
        return
    # Started by root, the server runs as another user, who may not enter the bench's own folder.
    with TemporaryDirectory(prefix="elt-flows-bench-pg-") as place:
        Path(place).chmod(0o755)
        with Postgres(Path(place) / "postgres", durable=False) as running:
            yield Project(name, folder, running.socket_folder)


def measure(stage: Stage, project: Project, pairs: int, *, warm: bool = True) -> DbtCost:
    """Build the project by turns both ways, each first as often as second, from the same warm partial parse.

    Args:
        stage: Where it runs.
        project: What to build.
        pairs: How many pairs of measurements to take.
        warm: Off: without the build before all, so that the first of the pairs has to parse.

    Raises:
        BenchError: A build failed, or the Prefect server did not show every node.
    """
    if warm:
        _plain(stage, project)  # parses, and builds what is incremental
    ours: list[float] = []
    plain: list[float] = []
    for pair in range(pairs):
        stage.settle()
        if pair % 2:
            plain.append(_plain(stage, project))
            stage.settle()
        measured = _ours(stage, project)
        ours.append(measured.wall)
        _await_shown(stage, measured.told["flow_run_id"], measured.told["nodes"])
        if not pair % 2:
            stage.settle()
            plain.append(_plain(stage, project))
    return DbtCost(project.name, measured.told["nodes"], ours, plain, measured)


def _ours(stage: Stage, project: Project) -> Measured:
    order = {"project": str(project.folder), "env": project.env, "threads": _THREADS}
    return run_measured(stage, "bench.dbt_flow", order, f"dbt-{project.folder.name}", _PATIENCE)


def _plain(stage: Stage, project: Project) -> float:
    arguments = ["build", "--project-dir", str(project.folder), "--profiles-dir", str(project.folder)]
    began = time.perf_counter()
    # A pipe is read as a scheduler's log would be; a terminal or /dev/null would cost dbt less or more.
    done = subprocess.run(  # noqa: S603 - the dbt of this environment
        [str(Path(sys.executable).with_name("dbt")), *arguments, "--threads", str(_THREADS)],
        cwd=project.folder,
        env={**os.environ, **project.env, "DO_NOT_TRACK": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=_PATIENCE,
        check=False,
    )
    wall = time.perf_counter() - began
    if done.returncode != 0:
        raise BenchError(f"dbt build of {project.name} failed.\n{done.stdout.decode()[-3000:]}")
    return wall


def _await_shown(stage: Stage, flow_run_id: str, nodes: int) -> None:
    """What is not visible would be no fair comparison."""
    scope: dict[str, Any] = {
        "flow_runs": {"id": {"any_": [flow_run_id]}},
        "task_runs": {"name": {"like_": " "}, "state": {"type": {"any_": ["COMPLETED"]}}},
    }
    deadline = time.monotonic() + _SHOWN_WITHIN
    while True:
        reply = httpx.post(f"{stage.api_url}/task_runs/count", json=scope, timeout=10).raise_for_status()
        shown = int(reply.json()) - 1  # the build itself is a task run as well
        if shown >= nodes:
            return
        if time.monotonic() > deadline:
            raise BenchError(f"The Prefect server shows {shown} of {nodes} nodes as completed task runs.")
        time.sleep(0.3)
