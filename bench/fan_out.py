"""The fan-out: N connections of D seconds at concurrency K, with our flow and in the plain way."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from bench.measured import Measured, run_measured
from bench.stage import BenchError, Stage

Way = Literal["ours", "plain"]


@dataclass(frozen=True)
class Case:
    """A fan-out to measure, and what it should cost; a target of None is none."""

    connections: int
    concurrency: int
    seconds: float
    wall: float | None = None
    requests: int | None = None
    rss: float | None = None

    @property
    def ideal(self) -> float:
        """Seconds that the vendor's jobs take by themselves."""
        return self.seconds * math.ceil(self.connections / self.concurrency)

    def __str__(self) -> str:
        return f"{self.connections} syncs of {self.seconds:g} s, {self.concurrency} at a time"


@dataclass(frozen=True)
class FanOut:
    """What one way of doing a case cost."""

    case: Case
    way: Way
    measured: Measured
    requests: dict[str, int]


def measure(stage: Stage, case: Case, way: Way) -> FanOut:
    """Run one case one way, in a fresh process against a fresh sandbox.

    Raises:
        BenchError: It failed, or not every connection was synced exactly once.
    """
    stage.settle()
    name = f"fan-out-{case.connections}-{way}"
    with stage.sandbox(f"sandbox-{name}") as sandbox:
        order = {
            "way": way,
            "base_url": sandbox.airbyte_url,
            "connections": sandbox.add_connections(case.connections, case.seconds),
            "concurrency": case.concurrency,
        }
        measured = run_measured(stage, "bench.fan_out_flows", order, name, patience=case.ideal * 10 + 120)
        requests = sandbox.requests()
    succeeded = measured.told["succeeded"]
    if succeeded != case.connections or requests["start"] != case.connections:
        raise BenchError(
            f"{name}: {succeeded} of {case.connections} syncs succeeded, with {requests['start']} starts."
        )
    return FanOut(case, way, measured, requests)
