"""The flow that `bench.dbt_build` runs in a process of its own."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from prefect import flow
from prefect.runtime import flow_run

from bench.measured import report
from tasks.dbt_core import DbtCore, DbtResult, dbt_build


@flow
async def build(dbt: DbtCore) -> tuple[str, DbtResult]:
    """One dbt build, every node a task run."""
    return flow_run.id or "", await dbt_build(dbt)


def run(order: dict[str, Any]) -> tuple[float, dict[str, Any]]:
    """Take the seconds of the flow's call."""
    dbt = DbtCore(project_dir=order["project"], env=order["env"], threads=order["threads"])
    began = time.perf_counter()
    flow_run_id, result = asyncio.run(build(dbt))
    wall = time.perf_counter() - began
    return wall, {"flow_run_id": flow_run_id, "nodes": len(result.nodes)}


if __name__ == "__main__":
    report(run)
