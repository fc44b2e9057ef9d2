"""Pipelines from the manifest: what a team writes in its dbt project becomes a deployment."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from deployments import pipelines
from deployments.check_dbt import Failed
from deployments.pipelines import declared_pipelines, deployment
from flows import elt_chain
from tasks.dbt.lineage import Lineage, LineageNode

ROOT = Path(__file__).parent.parent
GENERATED = ROOT / "deployments" / "pipelines.yaml"
A = "7f1a6001-2013-4a00-8000-000000000001"
B = "7f1a6002-2013-4a00-8000-000000000002"
C = "7f1a6003-2013-4a00-8000-000000000003"
BASE: dict[str, Any] = {
    "name": "base",
    "entrypoint": "flows.elt.elt_chain",
    "work_pool": {"name": "elt"},
    "concurrency_limit": 1,
    "parameters": {
        "syncs": [{"tool": "airbyte", "server": "airbyte", "connection_id": id_} for id_ in (A, B, C)],
        "transform": {"tool": "dbt-core", "project_dir": "dbt", "threads": 2},
        "activations": [
            {"tool": "hightouch", "credentials": "hightouch", "sync_id": id_} for id_ in ("1", "2", "3")
        ],
    },
}


def node(kind: str, name: str, *parents: str, meta: dict[str, Any] | None = None, **more: Any) -> LineageNode:
    return LineageNode(f"{kind}.{name}", name, kind, parents, meta=meta or {}, **more)


def lineage(*, pipeline: Any = True, unnamed: bool = False) -> Lineage:
    nodes = [
        node("source", "orders", meta={} if unnamed else {"airbyte_connection_id": A}),
        node("source", "people", meta={"airbyte_connection_id": B}),
        node("model", "stg_orders", "source.orders"),
        node("model", "fct_orders", "model.stg_orders", tags=("finance",)),
        node("model", "dim_people", "source.people"),
        node("exposure", "books", "model.fct_orders", meta={"hightouch_sync_id": 1, "pipeline": pipeline}),
        node("exposure", "crm", "model.fct_orders", "model.dim_people", meta={"hightouch_sync_id": 2}),
    ]
    return Lineage({each.unique_id: each for each in nodes})


def generated(graph: Lineage, variables: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    return [deployment(each, graph, BASE) for each in declared_pipelines(graph, variables or {})]


def test_the_file_is_up_to_date() -> None:
    """What is in the repository is what the stage's project declares, and its flow takes it."""
    command = [sys.executable, "-m", "deployments.pipelines", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=150)  # noqa: S603
    assert done.returncode == 0, done.stdout + done.stderr
    entries = yaml.safe_load(GENERATED.read_text())["deployments"]
    assert [entry["name"] for entry in entries] == [
        "exposure-braze-weather-delays",
        "exposure-ops-dashboard",
        "tag-reference",
    ]
    for entry in entries:
        elt_chain.validate_parameters(entry["parameters"])


def test_check_says_what_is_out_of_date(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file that lags behind is not written in a check, and the difference is shown."""
    old = tmp_path / "pipelines.yaml"
    old.write_text(GENERATED.read_text().replace("*/30 5-23", "*/15 5-23"))
    before = old.read_text()
    monkeypatch.setattr(pipelines, "write", lambda *_: GENERATED.read_text())
    assert pipelines.main(["--check", "--output", str(old)]) == 1
    shown = capsys.readouterr().out
    assert "-    cron: '*/15 5-23 * * *'" in shown
    assert "+    cron: '*/30 5-23 * * *'" in shown
    assert old.read_text() == before


def test_an_exposure() -> None:
    """An exposure's pipeline syncs what feeds it, builds what is above it and activates what hangs on it."""
    (entry,) = generated(lineage(pipeline={"cron": "0 7 * * *", "owner": "finance"}))
    parameters = entry["parameters"]
    assert entry["name"] == "exposure-books"
    assert [sync["connection_id"] for sync in parameters["syncs"]] == [A]
    assert parameters["transform"] == {
        "tool": "dbt-core",
        "project_dir": "dbt",
        "threads": 2,
        "select": ["+exposure:books"],
    }
    assert [activation["sync_id"] for activation in parameters["activations"]] == ["1"]
    assert entry["schedules"] == [{"slug": "declared", "cron": "0 7 * * *", "timezone": "UTC"}]
    assert "owner:finance" in entry["tags"]


def test_a_tag() -> None:
    """A tag's pipeline builds what is tagged with what it is built on; an exposure on more is not its own."""
    (_, entry) = generated(lineage(), {"pipelines": {"finance": None}})
    assert entry["name"] == "tag-finance"
    assert entry["parameters"]["transform"]["select"] == ["+tag:finance"]
    assert [activation["sync_id"] for activation in entry["parameters"]["activations"]] == ["1"]
    assert "schedules" not in entry


def test_connections_that_no_source_names() -> None:
    """Where a source does not say who fills it, every connection that no source names may be the one."""
    (entry,) = generated(lineage(unnamed=True))
    assert [sync["connection_id"] for sync in entry["parameters"]["syncs"]] == [A, C]


def test_a_job_that_has_no_number() -> None:
    """An HTTP job is known by its name and arguments, as in `meta.http_job`."""
    graph = lineage()
    books = graph.nodes["exposure.books"]
    books.meta.update(http_job="power-bi?dataset=5")
    (pipeline,) = declared_pipelines(graph, {})
    jobs = [{"tool": "http-job", "job": "power-bi", "arguments": {"dataset": number}} for number in (4, 5)]
    base = {**BASE, "parameters": {**BASE["parameters"], "activations": jobs}}
    assert deployment(pipeline, graph, base)["parameters"]["activations"] == jobs[1:]


def test_what_names_something_else_stays_behind() -> None:
    """Gates, rule, approval and selector of the base are narrowed as its connections are."""
    graph = lineage()
    graph.nodes["exposure.books"].meta.pop("hightouch_sync_id")
    (pipeline,) = declared_pipelines(graph, {})
    base = based(
        transform={**BASE["parameters"]["transform"], "selector": "nightly"},
        gates=[
            {"tool": "rows", "at_least": 1, "connections": [A, B]},
            {"tool": "rows", "at_least": 2, "connections": [B]},
            {"tool": "rows", "at_least": 3},
            {"tool": "freshness", "connections": ["orders, as Airbyte calls it"]},
        ],
        allow_failure={"required": [A, B, "1"]},
        approval={"before": ["load", "activations"], "timeout": 60},
    )
    parameters = deployment(pipeline, graph, base)["parameters"]
    assert parameters["activations"] == []
    assert parameters["gates"] == [
        {"tool": "rows", "at_least": 1, "connections": [A]},
        {"tool": "rows", "at_least": 3},
        {"tool": "freshness", "connections": ["orders, as Airbyte calls it"]},
    ]
    assert parameters["allow_failure"] == {"required": [A]}
    assert parameters["approval"] == {"before": ["load"], "timeout": 60}
    assert parameters["transform"]["select"] == ["+exposure:books"]
    assert "selector" not in parameters["transform"]
    elt_chain.validate_parameters(parameters)
    base = based(allow_failure={"required": [B]}, approval={"before": ["activations"]})
    parameters = deployment(pipeline, graph, base)["parameters"]
    assert parameters["allow_failure"] == "none"
    assert "approval" not in parameters


def based(**parameters: Any) -> dict[str, Any]:
    return {**BASE, "parameters": {**BASE["parameters"], **parameters}}


def test_a_base_without_a_limit() -> None:
    """Then its pipelines have none, either."""
    graph = lineage()
    (pipeline,) = declared_pipelines(graph, {})
    base = {key: value for key, value in BASE.items() if key != "concurrency_limit"}
    assert "concurrency_limit" not in deployment(pipeline, graph, base)


@pytest.mark.parametrize(
    ("base", "says"),
    [
        ({**BASE, "entrypoint": "flows.ingest.sync_connections"}, "the base has to be one of elt_chain"),
        (based(transform=None), "the deployment base has no transform by dbt-core"),
        (based(syncs="all"), "the parameters of the deployment base do not fit its flow: .*syncs"),
        (based(transform={**BASE["parameters"]["transform"], "command": "sing"}), "transform"),
    ],
)
def test_what_can_be_no_base(base: dict[str, Any], says: str) -> None:
    """It is said what is wrong about it."""
    graph = lineage()
    (pipeline,) = declared_pipelines(graph, {})
    with pytest.raises(Failed, match=re.compile(says, re.DOTALL)):
        deployment(pipeline, graph, base)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "there is no .*other.yaml"),
        ("deployments: [", "is no YAML"),
        ("name: x", "has no deployments"),
        ("deployments: [{name: by-hand}]", "has no deployment flights"),
    ],
)
def test_a_file_that_can_not_be_used(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    text: str | None,
    says: str,
) -> None:
    """A line, and no traceback."""
    file = tmp_path / "other.yaml"
    if text is not None:
        file.write_text(text)
    monkeypatch.setattr(pipelines.DbtProject, "parse", lambda _: "")
    monkeypatch.chdir(ROOT)
    assert pipelines.main(["--prefect-file", str(file), "--output", str(tmp_path / "out.yaml")]) == 1
    assert re.search(f"^✗ .*{says}", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("pipeline", "variables", "says"),
    [
        ({"cron": "0 7 * * *", "time_zone": "UTC"}, {}, r"meta.pipeline of exposure books: time_zone: Extra"),
        ("daily", {}, r"meta.pipeline of exposure books: Input should be"),
        (True, {"pipelines": ["finance"]}, "has to say for each tag what its pipeline is like"),
        (True, {"pipelines": {"finnance": {}}}, "the tag finnance, which is on no model"),
        (True, {"pipelines": {"finance": {"cron": 7}}}, "vars.pipelines.finance of dbt_project.yml: cron"),
    ],
)
def test_declarations_that_make_no_sense(pipeline: Any, variables: dict[str, Any], says: str) -> None:
    """A mistake in a declaration is named with its place."""
    with pytest.raises(Failed, match=says):
        generated(lineage(pipeline=pipeline), variables)


def test_a_pipeline_that_nothing_feeds() -> None:
    """A pipeline without a connection is a mistake, not an empty deployment."""
    graph = lineage()
    (pipeline,) = declared_pipelines(graph, {})
    others = {**BASE, "parameters": {**BASE["parameters"], "syncs": BASE["parameters"]["syncs"][1:2]}}
    with pytest.raises(Failed, match=r"no connection of the deployment base feeds \+exposure:books"):
        deployment(pipeline, graph, others)
