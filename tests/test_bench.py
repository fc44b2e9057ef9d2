"""The bench measures what it says; the figures themselves are for a quiet machine, not for the tests."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.dbt_build import DbtCost
from bench.fan_out import Case, FanOut
from bench.measured import Measured
from bench.table import as_markdown, as_text, dbt_section, fan_out_section
from bench.watching_jobs import BEGIN, watch
from sandbox import Sandbox
from tests.jobs_fixtures import PREFECTS_SOCKETS, collected

__all__ = ["collected"]

pytestmark = PREFECTS_SOCKETS

ROOT = Path(__file__).resolve().parent.parent


def measured(wall: float, rss: float = 100.0) -> Measured:
    return Measured(
        wall=wall, process_wall=wall + 3, rss=rss, threads=9, cpu=5.0, server_cpu=4.0, told={"succeeded": 20}
    )


@pytest.mark.timeout(700)  # the first test to ask for the Prefect server waits for it, too
def test_bench_runs_both_ways_and_leaves_nothing_behind(prefect_server: str, tmp_path: Path) -> None:
    """`python -m bench --quick` measures our way and the plain one, and cleans up after itself."""
    ended = subprocess.run(  # noqa: S603
        [sys.executable, "-m", "bench", "--quick", "--api-url", prefect_server],
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )

    assert ended.returncode == 0, ended.stderr
    assert "5 syncs of 1 s, 5 at a time, ideal 1 s" in ended.stdout
    assert "plain:    1 token, 5 start, 0 list" in ended.stdout
    assert "Requests to watch 20 jobs of 2 s, with a look each second" in ended.stdout
    assert "dbt build of 5 trivial models on duckdb, each of 5 nodes a task run" in ended.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.no_server
@pytest.mark.parametrize("tool", BEGIN)
async def test_watching(tool: str, tmp_path: Path) -> None:
    """Jobs are watched to their ends with a list a look, and not one by one where a tool has lists."""
    jobs = 6
    with Sandbox(tmp_path) as sandbox:
        vendor, handles = BEGIN[tool](sandbox, jobs, 1.5)
        succeeded, looks = await watch(vendor, handles)
        requests = sandbox.requests.count()
    assert succeeded == jobs
    assert looks <= 4
    a_look = jobs if tool == "census" else 1
    ends = {"hightouch": jobs, "airbyte": 1}.get(tool, 0)  # read one by one; a list of what is hidden
    assert requests <= a_look * looks + ends + 1  # a token, or a run that is read to make sure


@pytest.mark.no_server
def test_a_figure_over_its_target_is_said_to_be() -> None:
    """A target that is not met stands out, one that is met does not hide the plain way's figure."""
    case = Case(20, 10, 5.0, wall=14.0, requests=30)
    requests = {"token": 1, "start": 20, "list": 10, "get": 0, "other": 1}
    ours = FanOut(case, "ours", measured(12.5), requests)
    plain = FanOut(case, "plain", measured(20.0), {**requests, "get": 400})

    text = as_text([fan_out_section(ours, plain)], "a machine")

    rows = {line.strip().split("   ")[0]: line.split() for line in text.splitlines() if line.strip()}
    assert "ideal 10 s" in text
    assert rows["wall of the flow's call"][-7:] == ["14.0", "s", "12.5", "s", "20.0", "s", "ok"]
    assert rows["requests to Airbyte"][-5:] == ["30", "32", "432", "NOT", "MET"]
    assert rows["wall against the ideal"][-4:] == ["1.25", "x", "2.00", "x"]


@pytest.mark.no_server
def test_dbt_ratio_is_the_median_of_pairs() -> None:
    """One disturbed pair does not decide the ratio."""
    cost = DbtCost("a project", 7, ours=[12.0, 11.0, 40.0], plain=[10.0, 10.0, 10.0], measured=measured(40.0))

    assert cost.ratio == pytest.approx(1.2)
    assert "| against plain dbt build | ≤ 1.30 x | 1.20 x |  | ok |" in as_markdown([dbt_section(cost)], "")
