"""A backfill of a year by months on PostgreSQL, one and several intervals at a time."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench.measured import Measured, run_measured
from bench.stage import BenchError, Stage
from deployments import server

_PATIENCE = 900.0  # seconds for one backfill
_ROWS_PER_DAY = 1000
_PROJECT = """\
name: history
profile: history
flags: {send_anonymous_usage_stats: false}
vars: {data_interval_start: null, data_interval_end: null}
"""
_PROFILES = """\
history:
  target: dev
  outputs:
    dev:
      type: postgres
      host: "{{ env_var('ELT_PG_HOST') }}"
      port: 5432
      user: postgres
      password: ""
      dbname: postgres
      schema: %s
      threads: 1
"""
_MODEL = """\
{{ config(materialized='incremental', incremental_strategy='delete+insert', unique_key='id') }}
select day::date || '-' || n as id, day::date as day, n
from generate_series(timestamp '2025-01-01', timestamp '2025-12-31', interval '1 day') as days(day),
     generate_series(1, %d) as numbers(n)
where true
{%% if var('data_interval_start') is not none %%}
  and day >= cast('{{ var('data_interval_start')[:10] }}' as date)
  and day < cast('{{ var('data_interval_end')[:10] }}' as date)
{%% endif %%}
"""


@dataclass(frozen=True)
class BackfillCost:
    """One backfill.

    Attributes:
        at_once: How many intervals at a time.
        intervals: How many there were.
        rows: How many rows they came to.
        measured: What it cost.
    """

    at_once: int
    intervals: int
    rows: int
    measured: Measured


def measure(stage: Stage, each: Sequence[int]) -> list[BackfillCost]:
    """Backfill the same year from nothing, as often as there are numbers of intervals at a time.

    Raises:
        BenchError: A backfill failed, or not every row is there.
    """
    found: list[BackfillCost] = []
    with _postgres() as host:
        for at_once in each:
            folder = _project(stage.folder / f"history-{at_once}", schema=f"at_{at_once}")
            order = {"project": str(folder), "host": host, "at_once": at_once}
            stage.settle()
            measured = run_measured(stage, "bench.backfill_flow", order, folder.name, _PATIENCE)
            intervals, rows = measured.told["intervals"], measured.told["rows"]
            if rows != 365 * _ROWS_PER_DAY:
                raise BenchError(f"A backfill {at_once} at a time made {rows:,} rows.")
            found.append(BackfillCost(at_once, intervals, rows, measured))
    return found


def _project(folder: Path, *, schema: str) -> Path:
    (folder / "models").mkdir(parents=True)
    (folder / "dbt_project.yml").write_text(_PROJECT)
    (folder / "profiles.yml").write_text(_PROFILES % schema)
    (folder / "models" / "fct.sql").write_text(_MODEL % _ROWS_PER_DAY)
    return folder


@contextmanager
def _postgres() -> Iterator[str]:
    """A server out of a wheel; the folder of its socket."""
    # Started by root, the server runs as another user, who may not enter a temporary folder of root's.
    with tempfile.TemporaryDirectory(prefix="elt-flows-bench-pg-") as name:
        Path(name).chmod(0o755)
        with server.Postgres(Path(name) / "postgres", durable=False) as running:
            yield str(running.socket_folder)
