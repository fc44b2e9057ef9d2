"""The bench's account: one row per figure, with what it should be."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import psutil  # type: ignore[import-untyped]

from bench.backfill import BackfillCost
from bench.dbt_build import DbtCost
from bench.fan_out import FanOut
from bench.latency import Burst, Latency
from bench.watching import Watched

DBT_RATIO = 1.3
_WAYS = {"native": "Prefect's trigger", "ours": "hand_over"}


@dataclass(frozen=True)
class Row:
    """One figure. `limit` is what it may be at most; `beside` is the plain way's."""

    figure: str
    measured: float
    unit: str
    limit: float | None = None
    beside: float | None = None
    digits: int = 1

    def cells(self) -> list[str]:
        """Figure, limit, measured, beside, verdict."""
        verdict = "" if self.limit is None else "ok" if self.measured <= self.limit else "NOT MET"
        limit = "" if self.limit is None else f"≤ {self._text(self.limit)}"
        beside = "" if self.beside is None else self._text(self.beside)
        return [self.figure, limit, self._text(self.measured), beside, verdict]

    def _text(self, value: float) -> str:
        return f"{value:,.{self.digits}f}{self.unit}"


@dataclass(frozen=True)
class Section:
    """The rows of one case."""

    title: str
    rows: list[Row]
    notes: list[str]


def fan_out_section(ours: FanOut, plain: FanOut | None) -> Section:
    """What a fan-out cost, beside the plain way if that was measured."""
    case, mine, theirs = ours.case, ours.measured, plain.measured if plain else None

    def beside(name: str) -> float | None:
        return getattr(theirs, name) if theirs else None

    rows = [
        Row("wall of the flow's call", mine.wall, " s", case.wall, beside("wall")),
        Row("wall against the ideal", mine.wall / case.ideal, " x", None, _over(theirs, case.ideal), 2),
        Row(
            "requests to Airbyte",
            sum(ours.requests.values()),
            "",
            case.requests,
            sum(plain.requests.values()) if plain else None,
            0,
        ),
        Row("peak memory", mine.rss, " MB", case.rss, beside("rss"), 0),
        Row("threads at most", mine.threads, "", None, beside("threads"), 0),
        Row("CPU of the process", mine.cpu, " s", None, beside("cpu")),
        Row("CPU of the Prefect server", mine.server_cpu, " s", None, beside("server_cpu")),
        Row("wall of the process", mine.process_wall, " s", None, beside("process_wall")),
    ]
    notes = [f"requests: {_kinds(ours)}"]
    if plain:
        notes.append(f"plain:    {_kinds(plain)}")
    return Section(f"{case}, ideal {case.ideal:g} s", rows, notes)


def dbt_section(cost: DbtCost, *, limit: float | None = DBT_RATIO) -> Section:
    """What a dbt build cost, beside plain `dbt build`."""
    ours, plain = statistics.median(cost.ours), statistics.median(cost.plain)
    rows = [
        Row("against plain dbt build", cost.ratio, " x", limit, digits=2),
        Row("wall of the flow's call", ours, " s", None, plain),
        Row("peak memory, without dbt", cost.measured.rss, " MB", digits=0),
    ]
    pairs = ", ".join(f"{a:.1f}/{b:.1f}" for a, b in zip(cost.ours, cost.plain, strict=True))
    notes = [f"pairs of ours/plain in s, one after the other: {pairs}"]
    return Section(f"dbt build of {cost.project}, each of {cost.nodes} nodes a task run", rows, notes)


def backfill_section(costs: Sequence[BackfillCost]) -> Section:
    """What a backfill of a year took, so many intervals at a time."""
    first = costs[0]
    rows = [Row(f"{each.at_once} at a time", each.measured.wall, " s", None) for each in costs]
    cpu = ", ".join(f"{each.at_once}: {each.measured.cpu:.0f} s" for each in costs)
    notes = [f"CPU of the flow's process alone, without dbt's: {cpu}"]
    return Section(f"Backfill of {first.intervals} months on PostgreSQL, {first.rows:,} rows", rows, notes)


def watching_section(watched: Sequence[Watched]) -> Section:
    """What it cost to watch many jobs, tool by tool."""
    rows = [
        Row(
            each.watch.title,
            sum(each.requests.values()),
            "",
            each.watch.limit(each.measured.wall),
            digits=0,
        )
        for each in watched
    ]
    first = watched[0].watch
    notes = [
        f"{each.watch.title.partition(',')[0]}: {each.looks} looks in {each.measured.wall:.1f} s, "
        f"{each.measured.cpu:.0f} s of CPU with the sandbox's; "
        + ", ".join(f"{count:,} {kind}" for kind, count in each.requests.items())
        for each in watched
    ]
    title = f"Requests to watch {first.jobs:,} jobs of {first.seconds:g} s, with a look each second"
    return Section(title, rows, notes)


def latency_section(measured: Sequence[Latency]) -> Section:
    """How long it took from an accepted event to user code."""
    rows = [
        Row(f"{each.worker.name}, {_WAYS[each.way]}, {what}", value, " s", limit, digits=2)
        for each in measured
        for what, value, limit in (
            ("median", each.median, each.worker.limit),
            ("p99", each.p99, None),
        )
    ]
    notes = [
        f"{each.worker.name}, {_WAYS[each.way]}: looks for runs each {each.worker.query_seconds:g} s, "
        f"{len(each.seconds)} events, "
        f"{min(each.seconds):.2f} to {max(each.seconds):.2f} s, load {each.load:.1f}"
        for each in measured
    ]
    return Section("Event accepted → user code running, on PostgreSQL", rows, notes)


def burst_section(bursts: Sequence[Burst]) -> Section:
    """What many events at once came to."""
    rows = [
        row
        for each in bursts
        for row in (
            Row(f"{_WAYS[each.way]}: runs", each.runs.total(), "", each.events, digits=0),
            Row(f"{_WAYS[each.way]}: until the events were accepted", each.accepted, " s"),
            Row(f"{_WAYS[each.way]}: until every run was there", each.created, " s"),
        )
    ]
    notes = [f"{_WAYS[b.way]}: {'one run per event' if b.exact else 'NOT one run per event'}" for b in bursts]
    return Section(f"{bursts[0].events} events at once, on PostgreSQL", rows, notes)


def machine() -> str:
    """Where the figures are from."""
    memory = psutil.virtual_memory().total / 1e9
    load = os.getloadavg()[0]
    parts = [
        f"{os.cpu_count()} x {_processor()}",
        f"{memory:.0f} GB",
        f"{platform.system()} {platform.release()}",
        f"Python {platform.python_version()}",
        f"Prefect {version('prefect')}",
        f"dbt {version('dbt-core')}",
        f"load {load:.1f} at the start",
    ]
    return ", ".join(parts)


def as_text(sections: Sequence[Section], where: str) -> str:
    """For the terminal."""
    lines = [where, ""]
    head = ["", "target", "measured", "plain way", ""]
    for section in sections:
        cells = [head, *(row.cells() for row in section.rows)] if section.rows else []
        widths = [max((len(row[column]) for row in cells), default=0) for column in range(len(head))]
        widths[0] = max(widths[0], 28)
        lines.append(section.title)
        for row in cells:
            first, *others = (text.rjust(width) for text, width in zip(row, widths, strict=True))
            lines.append("  " + "   ".join([first.strip().ljust(widths[0]), *others]).rstrip())
        lines += [f"  {note}" for note in section.notes]
        lines.append("")
    return "\n".join(lines)


def as_markdown(sections: Sequence[Section], where: str) -> str:
    """For `bench/results.md`."""
    lines = ["# Bench", "", f"`make bench` on {where}.", ""]
    for section in sections:
        lines += [f"## {section.title}", ""]
        if section.rows:
            lines += ["| | target | measured | plain way | |", "|---|---|---|---|---|"]
        lines += [f"| {' | '.join(row.cells())} |" for row in section.rows]
        lines += ["", *(f"{note}  " for note in section.notes), ""]
    return "\n".join(lines)


def _over(measured: object, ideal: float) -> float | None:
    wall = getattr(measured, "wall", None)
    return None if wall is None else float(wall) / ideal


def _kinds(run: FanOut) -> str:
    return ", ".join(f"{count:,} {kind}" for kind, count in run.requests.items())


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return platform.processor() or platform.machine()
    found = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return found or platform.machine()
