"""A dbt project of a dozen nodes, and what dbt would leave behind after a command on it.

The scripted runs of the sandbox's dbt Cloud are made from it in no time, by construction: its manifest and
run results have the shape that dbt 1.11 writes (schemas v12 and v6). A job that is `real` runs dbt itself.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

from sandbox import catalog
from sandbox.timeline import iso

PROJECT = "nyc_flights"
DBT_VERSION = "1.11.2"
COMMANDS = {
    "build": ("seed", "snapshot", "model", "test"),
    "run": ("model",),
    "test": ("test",),
    "seed": ("seed",),
    "snapshot": ("snapshot",),
}


@dataclass(frozen=True, slots=True)
class Node:
    """A node of the project; `rows` is what the warehouse says that it wrote."""

    unique_id: str
    parents: tuple[str, ...] = ()
    group: str | None = None
    rows: int = 0
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """model, test, seed and so on."""
        return self.unique_id.split(".", 1)[0]

    @property
    def name(self) -> str:
        """The name without project; of a source, without the source's."""
        return self.unique_id.split(".")[3 if self.kind == "source" else 2]


def _source(source: str, spec: catalog.ConnectionSpec) -> Node:
    return Node(
        f"source.{PROJECT}.{source}.{spec.stream.name}", meta={"airbyte_connection_id": spec.connection_id}
    )


_FLIGHTS = _source("flight_operations", catalog.CONNECTIONS[0])
_WEATHER = _source("weather_stations", catalog.CONNECTIONS[1])


def _node(kind: str, name: str, *parents: str, group: str | None = None, rows: int = 0) -> Node:
    return Node(f"{kind}.{PROJECT}.{name}", parents, group, rows)


# In the order in which dbt would run them.
NODES = (
    _node("seed", "cancellation_codes", rows=4),
    _node("model", "stg_flights", _FLIGHTS.unique_id, group="flight-ops", rows=336776),
    _node("test", "not_null_stg_flights_carrier.0a1b", f"model.{PROJECT}.stg_flights"),
    _node("model", "stg_weather", _WEATHER.unique_id, group="weather-desk", rows=26115),
    _node(
        "model",
        "fct_flights",
        f"model.{PROJECT}.stg_flights",
        f"seed.{PROJECT}.cancellation_codes",
        group="flight-ops",
        rows=336776,
    ),
    _node("test", "unique_fct_flights_flight_id.1c2d", f"model.{PROJECT}.fct_flights"),
    _node("model", "mart_carrier_scorecard", f"model.{PROJECT}.fct_flights", group="flight-ops", rows=16),
    _node(
        "model",
        "mart_weather_delays",
        f"model.{PROJECT}.fct_flights",
        f"model.{PROJECT}.stg_weather",
        group="weather-desk",
        rows=3,
    ),
)
SOURCES = (_FLIGHTS, _WEATHER)
EXPOSURES = (
    Node(
        f"exposure.{PROJECT}.crm_carrier_scorecard",
        (f"model.{PROJECT}.mart_carrier_scorecard",),
        meta={"hightouch_sync_id": 101},
    ),
    Node(
        f"exposure.{PROJECT}.braze_weather_delays",
        (f"model.{PROJECT}.mart_weather_delays",),
        meta={"hightouch_sync_id": 102},
    ),
)


def find(name: str) -> Node:
    """A node by its name, with or without the hash of a test.

    Raises:
        KeyError: There is none.
    """
    found = next((node for node in NODES if name in (node.name, node.unique_id)), None)
    if found is None:
        raise KeyError(name)
    return found


def manifest() -> dict[str, Any]:
    """The project's manifest.json."""
    return {
        "metadata": {
            "dbt_schema_version": "https://schemas.getdbt.com/dbt/manifest/v12.json",
            "dbt_version": DBT_VERSION,
            "project_name": PROJECT,
            "adapter_type": "duckdb",
        },
        "nodes": {node.unique_id: _written(node) for node in NODES},
        "sources": {node.unique_id: _written(node) for node in SOURCES},
        "exposures": {node.unique_id: _written(node) for node in EXPOSURES},
        "groups": {
            f"group.{PROJECT}.{owner}": {
                "name": owner,
                "owner": {"name": owner, "email": f"{owner}@example.com"},
            }
            for owner in ("flight-ops", "weather-desk")
        },
        "selectors": {},
    }


def _written(node: Node) -> dict[str, Any]:
    written: dict[str, Any] = {
        "unique_id": node.unique_id,
        "name": node.name,
        "resource_type": node.kind,
        "package_name": PROJECT,
        "fqn": [PROJECT, node.name],
        "tags": [],
        "group": node.group,
        "config": {"meta": node.meta, "group": node.group},
        "depends_on": {"nodes": list(node.parents)},
    }
    if node.kind == "source":
        table = node.name
        written |= {
            "source_name": node.unique_id.split(".")[2],
            "schema": f"raw_{table}",
            "identifier": table,
        }
    if node.kind == "test":
        written["attached_node"] = node.parents[0]
    if node.kind == "exposure":
        written |= {"type": "application", "owner": {"name": None}}
    return written


def command_of(step: str) -> str | None:
    """The command of a step that runs nodes: build, run, test, seed, snapshot, retry; None for any other."""
    words = shlex.split(step)[1:]
    return next((word for word in words if word in COMMANDS or word == "retry"), None)


def selected(step: str) -> list[Node]:
    """The nodes that a step runs, by command, --select and --exclude (names, `source:a.b`, each with +)."""
    words = shlex.split(step)
    chosen = _options(words, "--select", "-s")
    left_out = _matched(_options(words, "--exclude"))
    wanted = _matched(chosen) if chosen else {node.unique_id for node in NODES}
    kinds = COMMANDS.get(command_of(step) or "", ())
    return [node for node in NODES if node.kind in kinds and node.unique_id in wanted - left_out]


def _options(words: Sequence[str], *flags: str) -> list[str]:
    found: list[str] = []
    taking = False
    for word in words:
        if word.startswith("-"):
            taking = word in flags
        elif taking:
            found.append(word)
    return found


def _matched(words: Iterable[str]) -> set[str]:
    ids: set[str] = set()
    for word in words:
        bare = word.strip("+")
        if bare.startswith("source:"):
            hits = {
                node.unique_id
                for node in SOURCES
                if f".{bare.removeprefix('source:')}." in f"{node.unique_id}."
            }
        else:
            hits = {node.unique_id for node in NODES if bare in (node.name, node.unique_id)}
        ids |= hits
        if word.endswith("+"):
            ids |= _below(hits)
        elif hits:
            ids |= {node.unique_id for node in NODES if node.kind == "test" and hits & set(node.parents)}
    return ids


def _below(ids: set[str]) -> set[str]:
    found = set(ids)
    while more := {node.unique_id for node in NODES if found & set(node.parents)} - found:
        found |= more
    return found - ids


def run_results(
    step: str, nodes: Sequence[Node], *, broken: Node | None = None, warns: bool = False, which: str = ""
) -> dict[str, Any]:
    """The run_results.json of a step: `broken` fails (a test with failures), what is below is skipped."""
    skipped: set[str] = set()
    if broken is not None and broken in nodes:
        # dbt holds back what is below a failed test's model, too.
        skipped = _below(set(broken.parents) if broken.kind == "test" else {broken.unique_id})
        skipped -= {broken.unique_id}
    results: list[dict[str, Any]] = []
    failed = False
    for node in nodes:
        failed = failed or node is broken
        held = node.unique_id in skipped and failed
        results.append(_result(node, broken=node is broken, skipped=held, warns=warns))
    return {
        "metadata": {
            "dbt_schema_version": "https://schemas.getdbt.com/dbt/run-results/v6.json",
            "dbt_version": DBT_VERSION,
            "invocation_id": str(uuid4()),
            "generated_at": iso(catalog.CREATED_AT),
        },
        "args": {"which": which or command_of(step), "invocation_command": step},
        "elapsed_time": 0.1 * len(results),
        "results": results,
    }


def _result(node: Node, *, broken: bool, skipped: bool, warns: bool) -> dict[str, Any]:
    status, message, failures = ("pass", None, 0) if node.kind == "test" else ("success", "OK", None)
    if skipped:
        status, message, failures = "skipped", None, None
    elif broken and node.kind == "test":
        status, message, failures = "fail", "Got 7 results, configured to fail if != 0", 7
    elif broken:
        status = "error"
        message = (
            f"Runtime Error in model {node.name} (models/{node.name}.sql)\n"
            f'  Binder Error: Referenced column "no_such_column" not found in FROM clause!'
        )
    elif warns and node.kind == "test":
        status, message, failures = "warn", "Got 3 results, configured to warn if != 0", 3
    wrote = status == "success"
    return {
        "unique_id": node.unique_id,
        "status": status,
        "message": message,
        "failures": failures,
        "execution_time": 0.1 if status != "skipped" else 0.0,
        "thread_id": "Thread-1",
        "timing": [],
        "adapter_response": {"_message": "OK", "rows_affected": node.rows} if wrote else {},
        "compiled": status != "skipped",
        "compiled_code": "select 1",
        "relation_name": f'"warehouse"."marts"."{node.name}"' if node.kind != "test" else None,
    }


def log_of(results: dict[str, Any]) -> str:
    """What dbt would print for these results."""
    lines = [f"06:14:44  Running with dbt={DBT_VERSION}"]
    rows = results["results"]
    for number, result in enumerate(rows, 1):
        name = result["unique_id"].split(".", 2)[2]
        lines.append(f"06:14:44  {number} of {len(rows)} {result['status'].upper()} {name}")
    bad = [result for result in rows if result["status"] in ("error", "fail")]
    if bad:
        lines.append(f"06:14:45  Completed with {len(bad)} error(s) and 0 warnings:")
        lines += [f"06:14:45    {result['message']}" for result in bad]
    else:
        lines.append("06:14:45  Completed successfully")
    return "\n".join(lines) + "\n"
