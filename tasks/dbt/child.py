"""The other side of the pipe: runs dbt in this process and tells what happens, one JSON line per event.

Run as a script (`python -P child.py`), with nothing imported but the standard library and dbt. dbt's own JSON
log would serve too, but the database's error and a node's real start and end are only in its debug stream,
which carries every SQL statement along; a callback of dbt's public `dbtRunner` picks out the dozen events
that matter.

stdin carries one JSON line (the request) and then stays open: it is the lifeline. When the parent dies,
however it dies, the pipe closes and dbt is interrupted, so that no orphan goes on writing to the warehouse.
That needs no signal arithmetic, holds on every Unix, and does not mistake the end of the parent's *thread*
for its death as PR_SET_PDEATHSIG does.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import signal
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

LONGEST_MESSAGE = 20_000  # characters: some databases echo the whole statement in their errors
ORPHAN_GRACE = 4.0  # seconds that dbt has to cancel its queries once the parent is gone


def record_of(result: Any) -> dict[str, Any]:
    """What we keep of one of dbt's node results."""
    node = result.node
    response = result.adapter_response if isinstance(result.adapter_response, dict) else {}
    message = str(result.message)[:LONGEST_MESSAGE] if result.message is not None else None
    config = getattr(node, "config", None)
    return {
        "id": node.unique_id,
        "name": _hook_name(node)
        if str(node.resource_type) == "operation"
        else _name(node.unique_id, node.name),
        "kind": str(node.resource_type),
        "status": str(result.status),
        "message": message,
        "seconds": float(result.execution_time or 0.0),
        "failures": result.failures if str(node.resource_type) in {"test", "unit_test"} else None,
        "rows": rows_of(str(node.resource_type), getattr(config, "materialized", None), response, message),
        "compiled_path": getattr(node, "compiled_path", None),
        "group": getattr(node, "group", None) or getattr(config, "group", None),
        "batches": batches_of(result),
    }


def freshness_of(result: Any) -> dict[str, Any]:
    """What dbt found out about a source.

    Not read from `sources.json`: what could not be looked at (no such table) is not in it.
    """
    loaded, age = getattr(result, "max_loaded_at", None), getattr(result, "age", None)
    threshold = result.node.freshness
    return {
        **record_of(result),
        "name": f"{result.node.source_name}.{result.node.name}",
        "loaded_at": loaded.isoformat() if loaded is not None else None,
        "age": float(age) if age is not None else None,
        "warn_after": seconds_of(getattr(threshold, "warn_after", None)),
        "error_after": seconds_of(getattr(threshold, "error_after", None)),
        "owner": (result.node.meta or {}).get("owner"),
    }


def seconds_of(time: Any) -> float | None:
    """A threshold of dbt's in seconds; None if there is none."""
    if time is None or not time.count or not time.period:
        return None
    return float(time.count) * {"minute": 60, "hour": 3600, "day": 86400}[str(time.period)]


def batches_of(result: Any) -> dict[str, Any] | None:
    """Which batches of a microbatch model are done, if some are and some are not."""
    found = getattr(result, "batch_results", None)
    if found is None or not found.successful or not found.failed:
        return None
    return {
        how: [[moment.isoformat() for moment in batch] for batch in getattr(found, how)]
        for how in ("successful", "failed")
    }


def rows_of(kind: str, materialized: str | None, response: dict[str, Any], message: str | None) -> int | None:
    """Rows written, if the adapter tells; for seeds dbt itself says `INSERT 16`.

    Of a test an adapter tells the rows of its answer, of a view some tell that there is one.
    """
    if kind not in {"model", "seed", "snapshot"} or materialized == "view":
        return None
    affected = response.get("rows_affected")
    if isinstance(affected, (int, float)) and affected >= 0:
        return int(affected)
    if kind == "seed" and (found := re.fullmatch(r"[A-Z]+ (\d+)", message or "")):
        return int(found[1])
    return None


def _name(unique_id: str, name: str) -> str:
    # Versions of a model have their name in common: `model.shop.dim.v2` is called `dim.v2`.
    return unique_id.split(".", 2)[2] if unique_id.startswith("model.") else name


def _hook_name(node: Any) -> str:
    # The node of a hook is called like `shop-on-run-start-0`; dbt's own output says `shop.on-run-start.0`.
    return re.sub(r"^(.*)-(on-run-(?:start|end))-(\d+)$", r"\1.\2.\3", str(node.name))


class Reporter:
    """Writes events as JSON lines; dbt calls it from all of its threads."""

    def __init__(self, fd: int) -> None:
        self._out = os.fdopen(fd, "wb")
        self._lock = threading.Lock()

    def send(self, **record: Any) -> None:
        """Send one record to the parent; a parent that is gone is the lifeline's business."""
        line = json.dumps(record, default=str).encode() + b"\n"
        with self._lock:
            try:
                self._out.write(line)
                self._out.flush()
            except BrokenPipeError:
                pass

    def on_event(self, event: Any) -> None:
        """Take an event of dbt's: see `dbtRunner(callbacks=[...])` in dbt's programmatic invocations."""
        info, data = event.info, event.data
        name = info.name
        node: Any = getattr(data, "node_info", None)
        if name == "NodeStart":
            self._node("start", node)
        elif name == "NodeFinished":
            found = data.run_result
            self._node(
                "finish",
                node,
                status=found.status,
                message=found.message[:LONGEST_MESSAGE] or None,
                seconds=found.execution_time,
                rows=rows_of(
                    node.resource_type, node.materialized, dict(found.adapter_response), found.message
                ),
            )
        elif name == "LogHookStartLine":
            self._node("start", node, name=data.statement)
        elif name == "LogHookEndLine" and data.status == "success":
            # A failed hook's error is only in the results at the end, so it is finished there.
            self._node(
                "finish",
                node,
                name=data.statement,
                status=data.status,
                message=None,
                rows=None,
                seconds=data.execution_time,
            )
        elif name == "ArtifactWritten" and data.artifact_type == "WritableManifest":
            self.send(
                t="manifest", path=str(Path(data.artifact_path).absolute()), invocation=info.invocation_id
            )
        elif name == "GenericExceptionOnRun":
            # The only word about a batch of a microbatch model that broke; the model itself just says ERROR.
            self.send(t="complaint", id=data.unique_id, text=data.exc[:LONGEST_MESSAGE])
        elif info.level in {"info", "warn", "error"} and info.msg.strip():
            unique_id = node.unique_id if node is not None else ""
            self.send(t="log", id=unique_id, name=name, level=info.level, text=info.msg[:LONGEST_MESSAGE])

    def _node(self, what: str, node: Any, name: str | None = None, **more: Any) -> None:
        if node.resource_type == "source":
            name = ".".join(node.unique_id.split(".")[2:])  # its table alone says little
        self.send(
            t=what,
            id=node.unique_id,
            name=name or _name(node.unique_id, node.node_name),
            kind=node.resource_type,
            hidden=node.materialized == "ephemeral",
            **more,
        )


def watch_lifeline(fd: int) -> None:
    """Interrupt dbt, then end this process group, once the parent has gone."""
    while os.read(fd, 4096):
        pass
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(ORPHAN_GRACE)
    os.killpg(0, signal.SIGKILL)


def main_message(exception: BaseException) -> str:
    """Say in dbt's own words why it could not run."""
    text = str(exception).strip()
    if type(exception).__module__.startswith("dbt") and text:
        return text
    return f"{type(exception).__name__}: {text}" if text else type(exception).__name__


def invoke(args: list[str], callbacks: list[Any], manifest: Any = None) -> Any:
    """Run one dbt command without output of its own."""
    from dbt.cli.main import dbtRunner

    return dbtRunner(manifest, callbacks).invoke([*args, "--log-level", "none", "--no-use-colors"])


def written_out(listing: Any) -> list[str]:
    """A selection that chooses exactly what `dbt ls --output selector` listed; empty if that is nothing."""
    not_run = ("source:", "exposure:", "metric:", "semantic_model:")
    chosen = [line for line in listing.result or [] if not line.startswith(not_run)]
    return ["--indirect-selection", "empty", "--select", *chosen] if chosen else []


def read_parsed(path: str | None) -> Any:
    """The project as dbt has left it in a `partial_parse.msgpack`; None if it is not there."""
    if path is None or not Path(path).is_file():
        return None
    from dbt.contracts.graph.manifest import Manifest

    return Manifest.from_msgpack(Path(path).read_bytes())


class Unable(Exception):
    """dbt refused a listing that a run needs first."""


def listed(args: list[str], *keys: str) -> Any:
    """What `dbt ls` says to these arguments."""
    listing = invoke([*args, *keys], [])
    if listing.exception is not None:
        raise Unable from listing.exception
    return listing


def run(request: dict[str, Any], reporter: Reporter) -> None:
    """build, run, test, seed, snapshot, source freshness: events while it runs, results, the end."""
    args, selection, parsed = list(request["args"]), list(request["selection"]), request.get("parsed")
    with tempfile.TemporaryDirectory(prefix="dbt-state-") as folder:
        try:
            if request["narrow"]:
                listing = listed([*request["list_args"], *selection], "--output", "selector")
                if not (chosen := written_out(listing)):
                    reporter.send(t="end", success=True, error=None)
                    return
                selection = ["--exclude", *request["narrow"], *chosen]
            if (resume := request["resume"]) and (
                again := what_is_left(request, selection, reporter)
            ) is not None:
                if not again:
                    reporter.send(t="end", success=True, error=None)
                    return
                write_state(resume, again, folder)
                take_vars_from_state()
                put_unit_tests_first()
                args, selection, parsed = [*resume["args"], "--state", folder], [], None
        except Unable as error:
            send_end(reporter, False, error.__cause__)
            return
        have_duckdb_tell_rows()
        outcome = invoke([*args, *selection], [reporter.on_event], read_parsed(parsed))
    tell = freshness_of if request["mode"] == "freshness" else record_of
    for result in getattr(outcome.result, "results", None) or []:
        reporter.send(t="result", **tell(result))
    send_end(reporter, outcome.success, outcome.exception)


def send_end(reporter: Reporter, success: bool, exception: BaseException | None) -> None:
    """Send the last record."""
    error = main_message(exception) if exception is not None else None
    kinds = [kind.__name__ for kind in type(exception).__mro__]
    reporter.send(t="end", success=success, error=error, kinds=kinds)


def what_is_left(request: dict[str, Any], selection: list[str], reporter: Reporter) -> list[str] | None:
    """The nodes that an earlier attempt has left to do; None if nothing of what it did has lasted."""
    keys = ["--output", "json", "--output-keys", "unique_id", "resource_type"]
    found = [json.loads(line) for line in listed([*request["list_args"], *selection], *keys).result or []]
    resume = request["resume"]
    if in_memory():
        reporter.send(t="resume", again=None)
        return None
    done = set(resume["done"])
    failed = set(resume["failed"]) if resume["complete"] else None
    again = [
        node["unique_id"]
        for node in found
        if node["unique_id"] not in done
        and (failed is None or node["unique_id"] in failed)
        and (node["resource_type"] in resume["kinds"]) is not resume["kinds_not"]
    ]
    reporter.send(t="resume", again=again)
    return again


def in_memory() -> bool:
    """Whether the warehouse ended with the process that built it."""
    from dbt.adapters.factory import FACTORY

    adapter: Any = next(iter(FACTORY.adapters.values()))
    credentials = adapter.config.credentials
    return credentials.type == "duckdb" and str(credentials.path).startswith(":memory:")


def write_state(resume: dict[str, Any], again: list[str], folder: str) -> None:
    """Write the `run_results.json` from which `dbt retry` takes up these nodes.

    It knows what `dbt retry` needs and no more: the original command with its flags, when it began (a
    microbatch model builds up to that moment), which nodes have to be run, and of which batches are done.
    """
    results = [
        {
            "unique_id": unique_id,
            "status": "error",
            "timing": [],
            "thread_id": "",
            "execution_time": 0.0,
            "adapter_response": {},
            "message": None,
            "failures": None,
            "compiled": False,
            "compiled_code": None,
            "relation_name": None,
            "batch_results": resume["batches"].get(unique_id),
        }
        for unique_id in again
    ]
    metadata = {
        "dbt_schema_version": "https://schemas.getdbt.com/dbt/run-results/v6.json",
        "generated_at": resume["started_at"],
        "invocation_started_at": resume["started_at"],
    }
    state: dict[str, Any] = {"metadata": metadata, "results": results, "elapsed_time": 0.0}
    state["args"] = {**resume["flags"], "use_colors": False}
    Path(folder, "run_results.json").write_text(json.dumps(state))


def take_vars_from_state() -> None:
    """Have `dbt retry` read the dbt variables in its state, where they are JSON.

    Those of its own command line it passes on as Python text, in which null has become the word None.
    """
    import dbt.task.retry

    overridden: set[str] = getattr(dbt.task.retry, "ALLOW_CLI_OVERRIDE_FLAGS", set())
    overridden.discard("vars")


def put_unit_tests_first() -> None:
    """Have a retried build run unit tests before their models, as `dbt build` does.

    A build takes them out of its queue and runs them with their model. `dbt retry` has a queue of its own, in
    which they come below the model: it would be built, and all that is below it, whatever they say.
    """
    from dbt.task.build import BuildTask

    compile_manifest = BuildTask.compile_manifest

    def compile_and_turn(task: Any) -> None:
        compile_manifest(task)
        graph = task.graph.graph
        tested = {test.unique_id: test.depends_on.nodes[0] for test in task.manifest.unit_tests.values()}
        for unit_test in tested:
            # All of them: there may be one from another test of the model, which comes after it.
            graph.remove_edges_from(list(graph.in_edges(unit_test)))
        waits_for = {model: list(graph.predecessors(model)) for model in set(tested.values())}
        for unit_test, model in tested.items():
            graph.add_edges_from((above, unit_test) for above in waits_for[model])
            graph.add_edge(unit_test, model)

    BuildTask.compile_manifest = compile_and_turn  # type: ignore[assignment]


def have_duckdb_tell_rows() -> None:
    """Have dbt-duckdb tell how many rows a statement wrote.

    DuckDB answers such a statement with their number, in a column `Count`, which the adapter does not read.
    """
    from dbt.adapters.sql.connections import SQLConnectionManager

    execute = SQLConnectionManager.execute

    def execute_and_count(self: Any, sql: str, *args: Any, **options: Any) -> Any:
        response, table = found = execute(self, sql, *args, **options)
        if self.TYPE == "duckdb" and not table.column_names:  # what is read already was asked for rows
            cursor = self.get_thread_connection().handle.cursor()
            if [column[0] for column in cursor.description or ()] == ["Count"] and (row := cursor.fetchone()):
                response.rows_affected = row[0]
        return found

    SQLConnectionManager.execute = execute_and_count  # type: ignore[method-assign]


def plan(request: dict[str, Any], reporter: Reporter) -> None:
    """`dbt ls`: what would run, on which warehouse, and whether a DuckDB file can be written."""
    from dbt.adapters.factory import FACTORY

    keys = ["--output", "json", "--output-keys", "unique_id", "resource_type"]
    outcome = invoke([*request["args"], *keys], [reporter.on_event])
    if outcome.exception is not None:
        send_end(reporter, False, outcome.exception)
        return
    nodes = [json.loads(line) for line in outcome.result or []]
    adapter: Any = next(iter(FACTORY.adapters.values()))
    config = adapter.config
    credentials = config.credentials
    path = getattr(credentials, "path", None) if credentials.type == "duckdb" else None
    reporter.send(
        t="plan",
        nodes=nodes,
        adapter=credentials.type,
        target=config.target_name,
        place=place_of(credentials),
        locked=lock_of(path, float(request["lock_wait"])) if path else None,
    )
    reporter.send(t="end", success=True, error=None)


def packages_in(folder: Path) -> int:
    """How many packages are installed in a folder, as dbt counts them."""
    return sum(each.is_dir() and not each.name.startswith("__") for each in folder.glob("*"))


def deps(request: dict[str, Any], reporter: Reporter) -> None:
    """`dbt deps`, one at a time: it deletes what another would just have installed.

    A file stands in the project until it has succeeded: one that breaks off may leave folders enough, for dbt
    also installs what the packages need.
    """
    unfinished = Path(request["unfinished"])
    with open(request["lock"], "w") as lock:  # noqa: PTH123 - a file descriptor is wanted, not a path
        fcntl.flock(lock, fcntl.LOCK_EX)
        if packages_in(Path(request["folder"])) >= request["declared"] and not unfinished.exists():
            reporter.send(t="end", success=True, error=None)
            return
        unfinished.touch()
        outcome = invoke(request["args"], [reporter.on_event])
        if outcome.success:
            unfinished.unlink(missing_ok=True)
        send_end(reporter, outcome.success, outcome.exception)


def place_of(credentials: Any) -> str:
    """Which warehouse it is, whoever connects to it and however: a digest, with no secret in it."""
    path = str(getattr(credentials, "path", ""))
    if credentials.type == "duckdb" and path and ":" not in path:
        where = os.path.realpath(path)
    else:
        try:
            where = str(credentials.unique_field)
        except Exception:  # noqa: BLE001 - an adapter of someone's need not have it
            where = ""
    said = [credentials.type, where, str(getattr(credentials, "port", "")), str(credentials.database)]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()


def lock_of(path: str, patience: float) -> str | None:
    """DuckDB's message if another process holds the file, else None.

    Opened from this process and not from the flow's: POSIX locks are per process, so that closing a second
    connection there would drop the locks of the first.
    """
    if ":" in path or not Path(path).exists():  # :memory:, md:, s3://
        return None
    import duckdb

    deadline = time.monotonic() + patience
    while True:
        try:
            duckdb.connect(path).close()
        except duckdb.IOException as error:
            if "lock" not in str(error).lower():
                return None
            if time.monotonic() > deadline:
                return str(error)
            time.sleep(0.2)
        else:
            return None


def main() -> None:
    """Read the request, hold on to the lifeline, run."""
    # A shell that starts a job in the background has it ignore SIGINT, and we would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    reporter = Reporter(os.dup(1))
    os.dup2(2, 1)  # whatever a Python model or an adapter prints must not land between our lines
    lifeline = os.dup(0)
    text = b""
    while not text.endswith(b"\n"):
        if not (piece := os.read(0, 65536)):
            return
        text += piece
    with open(os.devnull, "rb") as nothing:  # noqa: PTH123 - a file descriptor is wanted, not a path
        os.dup2(nothing.fileno(), 0)
    threading.Thread(target=watch_lifeline, args=(lifeline,), daemon=True).start()
    request = json.loads(text)
    {"plan": plan, "deps": deps}.get(request["mode"], run)(request, reporter)


if __name__ == "__main__":
    main()
