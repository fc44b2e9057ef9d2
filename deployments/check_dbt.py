"""Looks over a dbt project before it is merged: `make check-dbt`, or `python -m deployments.check_dbt`.

For any CI: it needs no warehouse, no vendor and no Prefect server, prints one line per check, and exits with
1 if one of them fails. It sees that the project parses, that it keeps its own standards (dbt-score, with the
rules and limits in the project's `pyproject.toml`), that every selector and each of its criteria selects
something, that every exposure has an owner and stands on models that are enabled, and that every connection
and activation that the project names in its `meta` is one that a deployment runs.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import click
import yaml
from dbt.cli.main import dbtRunner
from dbt.compilation import Linker
from dbt.graph.cli import parse_from_definition
from dbt.graph.selector import NodeSelector
from dbt.graph.selector_spec import SelectionCriteria, SelectionDifference, SelectionSpec
from dbt_common.events.contextvars import task_contextvars
from pydantic import TypeAdapter, ValidationError

from flows.parameters import Activation, Sync
from tasks.dbt.lineage import Lineage, LineageNode
from tasks.dbt.model import DbtCore, DbtError
from tasks.dbt.packages import install_packages
from tasks.jobs import Parameters
from tasks.tools import TOOLS

ANY = "*"
"""Stands for the connections of a selection."""

_REQUESTS: dict[str, TypeAdapter[Any]] = {
    "syncs": TypeAdapter(list[Sync]),
    "activations": TypeAdapter(list[Activation]),
}


class Failed(Exception):
    """A check failed; the message says what to do."""


class DbtProject:
    """A dbt project, parsed once into a folder of its own.

    Args:
        folder: Where dbt_project.yml is.
        target: Where dbt may write.
    """

    def __init__(self, folder: Path, target: Path) -> None:
        self.folder = folder.absolute()
        self.target = target
        self.manifest: Any = None
        self.lineage = Lineage({})

    def parse(self) -> str:
        """Parse it; what is wrong is in dbt's own words."""
        dbt = DbtCore(project_dir=self.folder, env={"DBT_LOG_PATH": str(self.target)})
        try:
            asyncio.run(install_packages(dbt))
        except DbtError as error:
            raise Failed(str(error)) from None
        result = self._dbt("parse")
        self.manifest = result
        self.lineage = Lineage.from_manifest(json.loads((self.target / "manifest.json").read_text()))
        return f"{len(self.lineage.nodes)} nodes"

    def selectors(self) -> str:
        """Every selector of selectors.yml selects at least one node, and so does each of its criteria.

        One that is mistyped in a union would never be missed. What a selector excludes need not be there.
        """
        selectors: dict[str, Any] = dict(sorted(self.manifest.selectors.items()))
        empty = [name for name in selectors if not self._dbt("ls", "--selector", name)]
        wrong = [f"nothing is selected by {', '.join(empty)}"] if empty else []
        graph = Linker().get_graph(self.manifest)
        nodes = NodeSelector(graph, self.manifest)
        for name, selector in selectors.items():
            with task_contextvars(project_root=str(self.folder)):  # what `path:` is seen from
                idle = [
                    f"{one.method}:{one.value}"
                    for one in _included(parse_from_definition(selector["definition"]))
                    if not nodes.select_included(nodes.graph.nodes(), one)
                ]
            if idle and name not in empty:
                wrong.append(f"{name}: nothing is selected by {', '.join(idle)}")
        if wrong:
            raise Failed("; ".join(wrong))
        return ", ".join(selectors) or "there are none"

    def exposures(self) -> str:
        """Every exposure has an owner and stands on something that is enabled."""
        for exposure in self.lineage.exposures:
            if not exposure.owner:
                raise Failed(f"exposure {exposure.name} has no owner: nobody would be told that it is late")
            if not self.lineage.parents(exposure.unique_id):
                raise Failed(f"exposure {exposure.name} depends on nothing that is enabled")
        return ", ".join(exposure.name for exposure in self.lineage.exposures) or "there are none"

    def standards(self) -> str:
        """dbt-score, with the project's own limits."""
        command = ["lint", "--manifest", str(self.target / "manifest.json"), "--format", "plain"]
        done = subprocess.run(  # noqa: S603
            [str(Path(sys.executable).with_name("dbt-score")), *command],
            cwd=self.folder,
            capture_output=True,
            text=True,
            check=False,
        )
        # Its `plain` has escape codes in it, also where it is not written to a terminal.
        lines = click.unstyle(done.stdout.strip() or done.stderr.strip()).splitlines()
        if done.returncode:
            raise Failed("\n".join(lines))
        return lines[-1] if lines else "passed"

    def _dbt(self, *command: str) -> Any:
        profiles = DbtCore(project_dir=self.folder).find_profiles_dir()
        folders = ["--project-dir", str(self.folder), "--profiles-dir", str(profiles)]
        folders += ["--log-path", str(self.target), "--target-path", str(self.target)]
        # dbt names what it does on stdout; only what we make of it is of interest.
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):  # noqa: PTH123
            done = dbtRunner(manifest=self.manifest).invoke([*command, "--quiet", *folders])
        if not done.success:
            raise Failed(str(done.exception or done.result))
        return done.result


def _included(selection: SelectionSpec) -> Iterator[SelectionCriteria]:
    """The criteria of a selection, without those of what it excludes."""
    if isinstance(selection, SelectionCriteria):
        yield selection
        return
    parts = list(selection.components)
    for part in parts[:1] if isinstance(selection, SelectionDifference) else parts:
        yield from _included(part)


def requests_of(deployment: Mapping[str, Any], name: str) -> list[Parameters]:
    """What a deployment asks for, as its flow takes it.

    Args:
        deployment: Its entry in a prefect.yaml.
        name: Which of its parameters, `syncs` or `activations`.

    Raises:
        Failed: They are not what the flow takes.
    """
    written = (deployment.get("parameters") or {}).get(name) or []
    try:
        requests: list[Parameters] = _REQUESTS[name].validate_python(written)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in (name, *first["loc"]))
        raise Failed(f"{where} of deployment {deployment['name']}: {first['msg']}") from None
    return requests


def known_ids(prefect_file: Path) -> dict[str, set[str]]:
    """What the deployments run, by tool.

    Raises:
        Failed: The parameters of a deployment are not what its flow takes.
    """
    known: dict[str, set[str]] = {}
    for deployment in yaml.safe_load(prefect_file.read_text())["deployments"]:
        for name in _REQUESTS:
            for request in requests_of(deployment, name):
                tool = TOOLS[request.tool]
                # A selection stands for connections that only its vendor can tell.
                id_ = request.resource_id.casefold() if request.tool == tool.name else ANY
                known.setdefault(tool.name, set()).add(id_)
    return known


def ids(project: DbtProject, known: Mapping[str, set[str]]) -> str:
    """Every connection and activation that the project names is one that a deployment runs."""
    count = 0
    unchecked: list[str] = []
    for node in (*project.lineage.sources, *project.lineage.exposures):
        for tool, value in _named_by(node):
            where = f"{node.resource_type} {node.name}: {TOOLS[tool].meta}"
            if value.casefold() in known.get(tool, set()):
                count += 1
            elif ANY in known.get(tool, set()):
                unchecked.append(f"{where} {value}")
            else:
                raise Failed(f"{where} is {value}, which no deployment runs")
    said = f"{count} ids in meta"
    if unchecked:
        said += (
            f"; {len(unchecked)} were not checked, because a deployment takes what its vendor selects: "
            f"{', '.join(unchecked)}"
        )
    return said


def _named_by(node: LineageNode) -> Iterator[tuple[str, str]]:
    for tool in {tool.name: tool for tool in TOOLS.values()}.values():
        value = node.meta.get(tool.meta)
        for one in value if isinstance(value, list) else [value]:
            if one is not None:
                yield tool.name, str(one)


def main(arguments: list[str] | None = None) -> int:
    """Run all checks and print them.

    Returns:
        The exit code: 0 if all of them passed.
    """
    parser = argparse.ArgumentParser(prog="python -m deployments.check_dbt", description=__doc__)
    parser.add_argument(
        "--project", type=Path, default=Path("sandbox/dbt"), help="folder with dbt_project.yml"
    )
    parser.add_argument("--prefect-file", type=Path, default=Path("deployments/prefect.yaml"))
    options = parser.parse_args(arguments)
    for needed in (options.project / "dbt_project.yml", options.prefect_file):
        if not needed.is_file():
            parser.error(f"there is no {needed}")
    with tempfile.TemporaryDirectory() as target:
        # A profile may ask for the path of a warehouse; to parse, dbt never opens it.
        os.environ.setdefault("ELT_WAREHOUSE", f"{target}/none.duckdb")
        project = DbtProject(options.project, Path(target))
        checks: dict[str, Callable[[], str]] = {
            "parse": project.parse,
            "standards": project.standards,
            "selectors": project.selectors,
            "exposures": project.exposures,
            "ids": lambda: ids(project, known_ids(options.prefect_file)),
        }
        bad = 0
        for name, check in checks.items():
            try:
                print(f"✓ {name}: {check()}")  # noqa: T201 - it is a command
            except Failed as error:
                bad += 1
                print(f"✗ {name}: {error}")  # noqa: T201
                if name == "parse":
                    break  # without a manifest there is nothing more to look at
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
