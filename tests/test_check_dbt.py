"""`make check-dbt`: what a pull request is told about the dbt project."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from deployments.check_dbt import ANY, DbtProject, Failed, ids, known_ids
from tasks.dbt.lineage import Lineage, LineageNode
from tasks.dbt.packages import UNFINISHED

ROOT = Path(__file__).parent.parent
PREFECT_FILE = ROOT / "deployments" / "prefect.yaml"


def check(project: Path, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "deployments.check_dbt", "--project", str(project)]
    return subprocess.run(  # noqa: S603
        command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=150, env={**os.environ, **env}
    )


def test_the_stage_passes() -> None:
    """The stage's own project keeps its standards, and names only what the deployments run."""
    done = check(ROOT / "sandbox" / "dbt")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == [
        "✓ parse",
        "✓ standards",
        "✓ selectors",
        "✓ exposures",
        "✓ ids",
    ]
    assert "\x1b" not in done.stdout


def test_every_mistake_is_named(tmp_path: Path) -> None:
    """One mistake does not hide the next: each check says its own.

    The profiles may lie in another folder, where dbt is told to look for them. Packages are installed, also
    where that had broken off.
    """
    project = tmp_path / "dbt"
    shutil.copytree(ROOT / "sandbox" / "dbt", project, ignore=shutil.ignore_patterns("target", "logs"))
    selectors = project / "selectors.yml"
    text = selectors.read_text().replace("value: weather_stations", "value: weather_station")
    selectors.write_text(
        text + "  - name: mistyped\n    definition:\n      union:\n        - tag:weahter\n"
        "        - path:models/marts\n"
        "        - intersection:\n            - 'fqn:dim_airlines+'\n            - resource_type:model\n"
        "            - exclude: [{method: tag, value: nobodys}]\n"
    )
    sources = project / "models" / "sources" / "sources.yml"
    sources.write_text(sources.read_text().replace("7f1a6001-2013", "7f1a6009-2013"))
    standards = project / "pyproject.toml"
    standards.write_text(standards.read_text().replace("fail_project_under = 9.0", "fail_project_under = 11"))
    exposures = project / "models" / "exposures.yml"
    of_scorecard = r"depends_on:\s+- ref\('mart_carrier_scorecard'\)"
    exposures.write_text(re.sub(of_scorecard, "depends_on: []", exposures.read_text()))
    (tmp_path / "paints").mkdir()
    (tmp_path / "paints" / "dbt_project.yml").write_text("{name: paints, version: '1.0'}")
    (project / "packages.yml").write_text("packages: [{local: ../paints}]")
    (project / "dbt_packages" / "paints").mkdir(parents=True)
    (project / UNFINISHED).touch()
    profiles = tmp_path / "profiles" / "profiles.yml"
    profiles.parent.mkdir()
    (project / "profiles.yml").rename(profiles)
    done = check(project, DBT_PROFILES_DIR=str(profiles.parent))
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    assert lines[0].startswith("✓ parse: ")
    assert "✗ exposures: exposure crm_carrier_scorecard depends on nothing that is enabled" in lines
    assert any(line.startswith("✗ standards: ") for line in lines)
    assert (
        "✗ selectors: nothing is selected by weather; mistyped: nothing is selected by tag:weahter" in lines
    )
    assert (
        "✗ ids: source flights: airbyte_connection_id is 7f1a6009-2013-4a00-8000-000000000001, which no "
        "deployment runs"
    ) in lines


def test_a_project_that_does_not_parse(tmp_path: Path) -> None:
    """A project that does not parse is told so in dbt's words, and nothing else is looked at."""
    project = tmp_path / "dbt"
    shutil.copytree(ROOT / "sandbox" / "dbt", project, ignore=shutil.ignore_patterns("target", "logs"))
    (project / "models" / "marts" / "broken.sql").write_text("select * from {{ ref('nowhere') }}")
    done = check(project)
    assert done.returncode == 1
    assert done.stdout.startswith("✗ parse: ")
    assert "depends on a node named 'nowhere' which was not found" in done.stdout
    assert "selectors" not in done.stdout


def test_parameters_that_are_no_parameters(tmp_path: Path) -> None:
    """A deployment whose parameters its flow would refuse is named."""
    file = tmp_path / "prefect.yaml"
    file.write_text(PREFECT_FILE.read_text().replace("7f1a6001-2013-4a00-8000-000000000001", "flights", 1))
    with pytest.raises(Failed, match=r"syncs\.0.* of deployment flights: .*not an Airbyte connection"):
        known_ids(file)


def test_a_selection_may_stand_for_any_connection(tmp_path: Path) -> None:
    """Where a deployment takes connections by tag, only the vendor can tell which ids there are."""
    file = tmp_path / "prefect.yaml"
    file.write_text(
        "deployments: [{name: tagged, parameters: {syncs: "
        "[{tool: airbyte-connections, server: airbyte, tags: [nightly]}]}}]"
    )
    known = known_ids(file)
    assert known == {"airbyte": {ANY}}
    known["airbyte"].add("one")
    project = DbtProject(tmp_path, tmp_path)
    project.lineage = Lineage(
        {
            name: LineageNode(name, name, "source", meta={"airbyte_connection_id": id_})
            for name, id_ in (("flights", "One"), ("weather", "two"), ("planes", "three"))
        }
    )
    assert ids(project, known) == (
        "1 ids in meta; 2 were not checked, because a deployment takes what its vendor selects: "
        "source weather: airbyte_connection_id two, source planes: airbyte_connection_id three"
    )


def test_an_exposure_of_nobody(tmp_path: Path) -> None:
    """An exposure without an owner's name is told: nobody would hear that it is late."""
    project = DbtProject(tmp_path, tmp_path)
    model = LineageNode("model.p.m", "m", "model")
    exposure = LineageNode("exposure.p.e", "e", "exposure", (model.unique_id,))
    project.lineage = Lineage({node.unique_id: node for node in (model, exposure)})
    with pytest.raises(Failed, match="exposure e has no owner"):
        project.exposures()
