"""The cost of watching: how many requests it takes to look at a thousand running jobs once a second."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from bench.measured import Measured, run_measured
from bench.stage import BenchError, Stage

Tool = Literal["airbyte", "airbyte-config", "fivetran", "dbt-cloud", "hightouch", "census"]


@dataclass(frozen=True)
class Watch:
    """Jobs of one tool to be watched, and the requests that it may cost.

    Attributes:
        tool: Whose.
        title: For people.
        jobs: How many at once.
        seconds: How long each of them runs.
        pages: Requests that a look at all of them takes.
        spare: What may come on top: the first and the last look, and what the tool's API makes necessary.
        each: Requests per job that has ended, where a list does not tell how.
        rate: Requests a second that our limit allows, where there is no list at all: then only that counts.
    """

    tool: Tool
    title: str
    jobs: int = 1000
    seconds: float = 60.0
    pages: int = 10
    spare: int = 50
    each: int = 0
    rate: float | None = None

    def limit(self, wall: float) -> int:
        """What the requests may come to when the last end was seen after so many seconds."""
        if self.rate is not None:
            return round(self.rate * wall) + self.spare
        return round(self.pages * self.seconds) + self.spare + self.each * self.jobs


WATCHES = (
    Watch("airbyte", "Airbyte"),
    Watch("airbyte-config", "Airbyte, Config API"),
    Watch("fivetran", "Fivetran", pages=1, spare=5),
    Watch("dbt-cloud", "dbt Cloud"),
    Watch("hightouch", "Hightouch, one per finished run among them", spare=100, each=1),
    Watch("census", "Census, as many as its limit allows", spare=100, rate=10.0),
)
QUICK = (replace(WATCHES[0], jobs=20, seconds=2.0),)


@dataclass(frozen=True)
class Watched:
    """What watching came to."""

    watch: Watch
    measured: Measured
    looks: int
    requests: dict[str, int]


def measure(stage: Stage, watch: Watch) -> Watched:
    """Watch the jobs of one tool to their end, in a process of its own.

    Raises:
        BenchError: Not every job was seen to succeed.
    """
    order = {"tool": watch.tool, "jobs": watch.jobs, "seconds": watch.seconds, "state": str(stage.folder)}
    name = f"watching-{watch.tool}"
    measured = run_measured(stage, "bench.watching_jobs", order, name, patience=watch.seconds * 5 + 60)
    told = measured.told
    if told["succeeded"] != watch.jobs:
        raise BenchError(f"{name}: {told['succeeded']} of {watch.jobs} jobs were seen to succeed.")
    return Watched(watch, measured, told["looks"], told["requests"])
