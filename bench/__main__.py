"""`python -m bench`: measure, and say what it came to."""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

from bench import backfill, dbt_build, fan_out, latency, watching
from bench.fan_out import Case
from bench.measured import run_measured
from bench.stage import BenchError, Stage
from bench.table import (
    Section,
    as_markdown,
    as_text,
    backfill_section,
    burst_section,
    dbt_section,
    fan_out_section,
    latency_section,
    machine,
    watching_section,
)

CASES = (
    Case(10, 10, 10.0, wall=11.5),
    Case(500, 500, 10.0, wall=14.0, requests=700, rss=250.0),
)
_MODELS = 300
_ONLY = "leave the others out; backfill is measured only if it is asked for"
_PAIRS = 4
_EVENTS = 30
_AT_ONCE = 100


def main(argv: list[str] | None = None) -> int:
    """Measure what was asked for; 0 unless something broke. A target that is not met is told, no failure."""
    args = _arguments(argv)
    where = machine()
    folder = Path(tempfile.mkdtemp(prefix="elt-flows-bench-"))
    # Its `finally` blocks stop the servers.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        # The measurements of events start a server of their own, on PostgreSQL.
        api_url = "" if args.only == "latency" else args.api_url
        with Stage(folder, api_url, patient=not args.quick) as stage:
            sections = _measure(stage, args)
    except BenchError as error:
        print(f"The bench broke off: {error}", file=sys.stderr)
        print(f"The logs are in {folder}.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        shutil.rmtree(folder, ignore_errors=True)
        return 130
    shutil.rmtree(folder, ignore_errors=True)
    print(as_text(sections, where))
    if args.save:
        saved = Path(__file__).with_name("results.md")
        saved.write_text(as_markdown(sections, where))
        print(f"Saved as {saved}")
    return 0


def _measure(stage: Stage, args: argparse.Namespace) -> list[Section]:
    sections: list[Section] = []
    if args.only in (None, "watching"):
        sections.append(_watching(stage, quick=args.quick))
    if args.only == "watching":
        return sections
    if args.only == "latency":
        return _latency(stage, quick=args.quick)
    _tell("starting the Prefect server")
    stage.ready()
    if not args.quick:
        # The first flow of a server pays for what the server does only once, so it is not the one to count.
        empty = min(run_measured(stage, "bench.empty_flow", {}, "empty", 60).wall for _ in range(3))
        sections.append(Section(f"A flow that does nothing: {empty:.1f} s", [], []))
    if args.only == "backfill":
        _tell("a backfill of 12 months, 1 and 4 at a time")
        return [*sections, backfill_section(backfill.measure(stage, (1, 4)))]
    if args.only != "dbt":
        sections += [_fan_out(stage, case, with_plain=not args.no_plain) for case in _cases(args)]
    if args.only == "fan-out":
        return sections
    if args.quick:
        with dbt_build.generated_project(stage, models=5) as few:
            return [*sections, dbt_section(_dbt(stage, few, pairs=1, warm=False), limit=None)]
    if args.models is None:
        sections.append(dbt_section(_dbt(stage, dbt_build.demo_project(stage), args.pairs)))
    for adapter in ("duckdb", "postgres") if args.adapter is None else (args.adapter,):
        with dbt_build.generated_project(stage, args.models or _MODELS, adapter) as generated:
            sections.append(dbt_section(_dbt(stage, generated, args.pairs)))
    # Last, because this process imports Prefect for it, and what it starts begins with its size.
    return sections if args.only == "dbt" else [*sections, *_latency(stage, quick=False)]


def _cases(args: argparse.Namespace) -> tuple[Case, ...]:
    if args.quick and args.n is None:
        return (Case(5, 5, 1.0),)
    if args.n is None and args.k is None and args.d is None:
        return CASES
    n = args.n or 500
    asked = Case(n, args.k or n, 10.0 if args.d is None else args.d)
    known = next((c for c in CASES if c == asked or str(c) == str(asked)), None)
    return (known or asked,)


def _fan_out(stage: Stage, case: Case, *, with_plain: bool) -> Section:
    _tell(f"{case}: sync_connections")
    ours = fan_out.measure(stage, case, "ours")
    plain = None
    if with_plain:
        _tell(f"{case}: the plain way")
        plain = fan_out.measure(stage, case, "plain")
    return fan_out_section(ours, plain)


def _watching(stage: Stage, *, quick: bool) -> Section:
    watched: list[watching.Watched] = []
    for watch in watching.QUICK if quick else watching.WATCHES:
        _tell(f"watching {watch.jobs:,} jobs of {watch.title}")
        watched.append(watching.measure(stage, watch))
    return watching_section(watched)


def _latency(stage: Stage, *, quick: bool) -> list[Section]:
    events, at_once = (3, 10) if quick else (_EVENTS, _AT_ONCE)
    _tell("starting a Prefect server on PostgreSQL")
    with latency.events(stage) as prepared:
        bursts = []
        for way in latency.WAYS:
            _tell(f"{at_once} events at once, {way}")
            bursts.append(latency.burst(prepared, way, at_once))
        measured = []
        for worker in (latency.COLD, latency.WARM):
            for way in latency.WAYS:
                _tell(f"{events} events, one at a time, {way}, {worker.name}")
                measured.append(latency.measure(stage, prepared, worker, way, events))
    return [latency_section(measured), burst_section(bursts)]


def _dbt(stage: Stage, project: dbt_build.Project, pairs: int, *, warm: bool = True) -> dbt_build.DbtCost:
    _tell(f"dbt build of {project.name}, {pairs} x both ways")
    return dbt_build.measure(stage, project, pairs, warm=warm)


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description="Measure watching, fan-out, dbt build and events against ideals and the plain ways.",
        epilog="N, K and D are also read from the environment: make bench N=100 D=5.",
    )
    env = os.environ
    parser.add_argument("-n", type=int, default=env.get("N"), help="connections (default: 10, then 500)")
    parser.add_argument("-k", type=int, default=env.get("K"), help="how many at a time (default: all)")
    parser.add_argument("-d", type=float, default=env.get("D"), help="seconds per job (default: 10)")
    parser.add_argument("--only", choices=("fan-out", "dbt", "watching", "latency", "backfill"), help=_ONLY)
    parser.add_argument(
        "--models",
        type=int,
        help=f"of the generated dbt project, without the demo's (default: {_MODELS})",
    )
    parser.add_argument(
        "--adapter", choices=("duckdb", "postgres"), help="of the generated dbt project (default: both)"
    )
    parser.add_argument(
        "--pairs", type=int, default=_PAIRS, help=f"of dbt builds, ours and plain (default: {_PAIRS})"
    )
    parser.add_argument("--no-plain", action="store_true", help="fan-out without the plain way beside it")
    parser.add_argument("--quick", action="store_true", help="small sizes: proves that it runs, no more")
    parser.add_argument("--save", action="store_true", help="also write bench/results.md")
    parser.add_argument(
        "--api-url", help="a standing Prefect server to measure against; by default one is started, on SQLite"
    )
    args = parser.parse_args(argv)
    if any(value is not None and value <= 0 for value in (args.n, args.k, args.d, args.models, args.pairs)):
        parser.error("Every number must be greater than 0")
    return args


def _tell(what: str) -> None:
    print(f"· {what} …", file=sys.stderr, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
