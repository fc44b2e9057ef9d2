"""Small dbt projects on DuckDB, written to order for the tests of dbt."""

from __future__ import annotations

import json
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest

from tasks.dbt.process import DbtProcess
from tasks.dbt_core import DbtCore


class Project:
    """A dbt project in a folder of its own; add models, then ask for a `DbtCore` of it."""

    def __init__(self, folder: Path, *, threads: int = 4) -> None:
        self.folder = folder
        self.warehouse = folder / "warehouse.duckdb"
        self.settings: dict[str, object] = {
            "name": "shop",
            "version": "1.0",
            "profile": "shop",
            "flags": {"send_anonymous_usage_stats": False},
        }
        self.write(
            "profiles.yml",
            f"""
            shop:
              target: dev
              outputs:
                dev:
                  type: duckdb
                  path: "{{{{ env_var('SHOP_WAREHOUSE') }}}}"
                  threads: {threads}
            """,
        )
        self.set()

    def set(self, **settings: object) -> None:
        """Put keys into dbt_project.yml."""
        self.settings.update(settings)
        self.write("dbt_project.yml", json.dumps(self.settings))

    def write(self, path: str, text: str) -> Path:
        file = self.folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(dedent(text))
        return file

    def model(self, name: str, sql: str) -> None:
        self.write(f"models/{name}.sql", sql)

    def core(self, **settings: object) -> DbtCore:
        values = {"project_dir": self.folder, "env": {"SHOP_WAREHOUSE": str(self.warehouse)}, **settings}
        return DbtCore.model_validate(values)


@pytest.fixture
def dbt_starts(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What dbt was started for from here on."""
    started: list[Any] = []
    running = DbtProcess.running

    def noting(request: dict[str, Any], **more: Any) -> Any:
        started.append(request)
        return running(request, **more)

    monkeypatch.setattr(DbtProcess, "running", noting)
    return started


def everything(folder: Path) -> Project:
    """One of each: what can succeed, warn, fail, error and be skipped, and what shows up in odd ways."""
    project = Project(folder)
    project.set(**{"on-run-start": ["select 1"], "on-run-end": ["select 2"]})
    project.write("seeds/colours.csv", "id,name\n1,red\n2,green\n3,\n")
    project.model("good", "select * from {{ ref('colours') }}")
    project.model("passing_through", "{{ config(materialized='ephemeral') }} select * from {{ ref('good') }}")
    project.model("after_ephemeral", "select * from {{ ref('passing_through') }}")
    project.model("broken", "select no_such_column from {{ ref('good') }}")
    project.model("below_broken", "select * from {{ ref('broken') }}")
    project.model("further_below", "select * from {{ ref('below_broken') }}")
    project.model("tested", "select * from {{ ref('good') }}")
    project.model("below_tested", "select * from {{ ref('tested') }}")
    project.model("switched_off", "{{ config(enabled=false) }} select 1 as id")
    project.write(
        "snapshots/kept.sql",
        """
        {% snapshot kept %}
        {{ config(target_schema='main', unique_key='id', strategy='check', check_cols='all') }}
        select * from {{ ref('good') }}
        {% endsnapshot %}
        """,
    )
    project.write(
        "tests/only_warns.sql",
        """
        {{ config(severity='warn') }} select * from {{ ref('good') }} where name is null
        """,
    )
    project.write(
        "models/schema.yml",
        """
        groups:
          - name: paint
            owner: {name: painters, email: paint@example.com}
        models:
          - name: good
            config: {group: paint}
            columns:
              - name: id
                data_tests: [unique]
          - name: tested
            columns:
              - name: name
                data_tests: [not_null]
        unit_tests:
          - name: good_keeps_rows
            model: good
            given:
              - input: ref('colours')
                rows: [{id: 1, name: a}]
            expect:
              rows: [{id: 1, name: a}]
        """,
    )
    return project
