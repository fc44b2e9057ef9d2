"""The flow that `bench.backfill` runs in a process of its own."""

from __future__ import annotations

import time
from datetime import date
from typing import Any

from bench.measured import report
from flows import backfill
from tasks.dbt_core import DbtCore


def run(order: dict[str, Any]) -> tuple[float, dict[str, Any]]:
    """Take the seconds of the flow's call."""
    dbt = DbtCore(project_dir=order["project"], env={"ELT_PG_HOST": order["host"]})
    began = time.perf_counter()
    done = backfill(date(2025, 1, 1), date(2026, 1, 1), at_once=order["at_once"], dbt=dbt)
    wall = time.perf_counter() - began
    return wall, {"intervals": len(done.intervals), "rows": sum(each.rows or 0 for each in done.intervals)}


if __name__ == "__main__":
    report(run)
