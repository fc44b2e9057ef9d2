"""`make docs`: the site of a dbt project."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.dbt_project import Project

ROOT = Path(__file__).parent.parent


def test_a_project_of_ones_own(tmp_path: Path) -> None:
    """`PROJECT` says which, its profiles are found by dbt's own rule, and nothing is written into it."""
    project = Project(tmp_path / "shop")
    project.model("orders", "select 1 as id")
    profiles = tmp_path / "profiles" / "profiles.yml"
    profiles.parent.mkdir()
    (project.folder / "profiles.yml").rename(profiles)
    here = Path(sys.prefix)
    # None of what a `make test` around this was told. What is installed stays: the tests run with it.
    said = {"VENV": here, "PROJECT": project.folder, "STATE": tmp_path / "state", "ARGS": ""}
    env = {"DBT_PROFILES_DIR": str(profiles.parent), "SHOP_WAREHOUSE": str(tmp_path / "shop.duckdb")}
    command = ["make", "-s", "-o", str(here / ".ready"), "docs"]
    done = subprocess.run(  # noqa: S603
        [*command, *(f"{name}={value}" for name, value in said.items())],
        cwd=ROOT,
        env={**os.environ, "MAKEFLAGS": "", **env},
        capture_output=True,
        text=True,
        check=False,
        timeout=150,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    site = tmp_path / "state" / "docs" / "static_index.html"
    assert done.stdout.splitlines()[-1] == f"The dbt project's site: {site}"
    assert "model.shop.orders" in site.read_text()
    assert sorted(path.name for path in project.folder.iterdir()) == ["dbt_project.yml", "models"]
