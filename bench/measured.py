"""One measured process: what it reports of itself, and what is seen of it from outside."""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import psutil  # type: ignore[import-untyped]

from bench.stage import BenchError, Stage


@dataclass(frozen=True)
class Measured:
    """A flow that ran in a process of its own.

    Attributes:
        wall: Seconds of the flow's call, from the call to its return.
        process_wall: Seconds of the whole process, imports and all.
        rss: Peak memory of the process in MB (1e6 bytes).
        threads: The most threads that it had.
        cpu: CPU seconds of the process.
        server_cpu: CPU seconds that the Prefect server spent meanwhile.
        told: What else it reported.
    """

    wall: float
    process_wall: float
    rss: float
    threads: int
    cpu: float
    server_cpu: float
    told: dict[str, Any]


def run_measured(stage: Stage, module: str, order: dict[str, Any], name: str, patience: float) -> Measured:
    """Run `python -m <module>` with an order, and watch it.

    Args:
        stage: Where it runs.
        module: A module whose main part is `report(...)`.
        order: What it shall do, as JSON.
        name: Of its log.
        patience: Seconds after which it is given up.

    Raises:
        BenchError: It failed, or took longer than `patience`.
    """
    answer = stage.folder / f"{name}-{uuid4().hex[:6]}.json"
    server_cpu, began, threads = stage.server_cpu(), time.perf_counter(), 0
    process = stage.spawn(["-m", module, str(answer), json.dumps(order)], name)
    seen = psutil.Process(process.pid)
    while process.poll() is None:
        if time.perf_counter() - began > patience:
            process.kill()
            raise BenchError(f"{name} took longer than {patience:.0f} s.\n{stage.log_of(name)}")
        try:
            threads = max(threads, seen.num_threads())
        except psutil.NoSuchProcess:
            break
        time.sleep(0.1)
    process.wait()
    process_wall = time.perf_counter() - began
    if process.returncode != 0 or not answer.exists():
        raise BenchError(f"{name} ended with exit code {process.returncode}.\n{stage.log_of(name)}")
    told = json.loads(answer.read_text())
    return Measured(
        wall=told.pop("wall"),
        process_wall=process_wall,
        rss=told.pop("rss"),
        threads=threads,
        cpu=told.pop("cpu"),
        server_cpu=stage.server_cpu() - server_cpu,
        told=told,
    )


def report(work: Callable[[dict[str, Any]], tuple[float, dict[str, Any]]]) -> None:
    """The main part of a measured module: take the order, do the work, leave the answer.

    Args:
        work: Takes the order; returns the seconds of the flow's call, and what else there is to tell.
    """
    answer, order = Path(sys.argv[1]), json.loads(sys.argv[2])
    wall, told = work(order)
    used = resource.getrusage(resource.RUSAGE_SELF)
    # Linux counts KiB, macOS bytes. A child's figure begins with its parent's size, so the parent (which
    # imports neither prefect nor dbt) is kept small.
    rss = used.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6
    cpu = os.times()
    answer.write_text(json.dumps({"wall": wall, "rss": rss, "cpu": cpu.user + cpu.system, **told}))
