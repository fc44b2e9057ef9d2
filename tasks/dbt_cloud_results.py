"""What a dbt Cloud run did, node by node, from the artifacts that it left; and why one broke before that."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from prefect.logging import get_run_logger
from pydantic import BaseModel, Field, ValidationError

from blocks.dbtcloud import DbtCloudApi
from blocks.dbtcloud_model import Run, RunStep
from tasks.dbt.child import rows_of
from tasks.dbt.lineage import Lineage
from tasks.dbt.model import DbtNode, DbtState, label_of, one_line
from tasks.dbt.nodes import Blame, NodeRuns, state_of
from tasks.dbt_cloud_steps import RUNS_NODES, Project, command_of

RESULTS, MANIFEST = "run_results.json", "manifest.json"
_SKIPPED = 40  # the status of a step that was not run
_SHOWN = 300  # nodes; of a greater run only those that need looking at get a task run
_AT_ONCE = 50
# Files and logs may come a moment after the end. Seconds.
ARTIFACTS_PATIENCE = 15.0
LOGS_PATIENCE = 5.0


class NodeResult(BaseModel):
    """One result of a run_results.json."""

    unique_id: str
    status: str
    message: str | None = None
    failures: int | None = None
    execution_time: float | None = None
    adapter_response: dict[str, Any] | None = None


class _Args(BaseModel):
    which: str | None = None


class _Metadata(BaseModel):
    invocation_id: str | None = None


class RunResults(BaseModel):
    """A run_results.json (schemas v4 to v6); only what is used here."""

    metadata: _Metadata = Field(default_factory=_Metadata)
    args: _Args = Field(default_factory=_Args)
    results: list[NodeResult]


@dataclass(frozen=True)
class Outcome:
    """A finished run.

    Attributes:
        run: With its steps.
        nodes: What it did with each node; empty where it left no results.
        invocation_id: dbt's own, of the last command.
    """

    run: Run
    nodes: list[DbtNode]
    invocation_id: str | None = None


async def outcome_of(api: DbtCloudApi, run_id: str) -> Outcome:
    """Reads what a finished run left. Files that are missing are no error: a failed run may have none.

    Of a retry only what it did again has results of its own; the rest is taken from the run that it retries.

    Raises:
        VendorError: The API can't be reached or does not know the run.
    """
    run = await api.run(run_id, related=["run_steps"])
    found, manifest = await _files(api, run)
    project = await _project(manifest)
    nodes = _nodes(found, project.lineage if project else None)
    if project is not None and nodes:
        nodes += _not_reached(run, project, {node.unique_id for node in nodes})
    if run.retrying_run_id is not None:
        before = await outcome_of(api, str(run.retrying_run_id))
        nodes = list({node.unique_id: node for node in [*before.nodes, *nodes]}.values())
    return Outcome(run, nodes, found[-1].metadata.invocation_id if found else None)


async def _files(api: DbtCloudApi, run: Run) -> tuple[list[RunResults], bytes | None]:
    """The run results of each step, and the last manifest."""
    # By default the API gives those of the last step, and of a job with several commands that is a part.
    steps: Sequence[RunStep | None] = [step for step in run.run_steps or [] if _ran_nodes(step)] or [None]
    expected = steps != [None]
    deadline = time.monotonic() + ARTIFACTS_PATIENCE
    while True:
        last = not expected or run.artifacts_saved or time.monotonic() >= deadline
        # The list is of the last step, which may have left nothing where an earlier one did.
        if await api.artifacts(str(run.id)) or (last and expected):
            indexes = [step.index if step else None for step in steps]
            found = [one for index in indexes if (one := await _results(api, run, index))]
            if found or last:
                return found, await _last_manifest(api, run, indexes)
        elif last:
            return [], None
        await asyncio.sleep(0.5)
        run = run.model_copy(update={"artifacts_saved": (await api.run(str(run.id))).artifacts_saved})


async def _last_manifest(api: DbtCloudApi, run: Run, indexes: Sequence[int | None]) -> bytes | None:
    # It may have tens of megabytes: one is enough.
    for index in reversed(indexes):
        if content := await api.artifact(str(run.id), MANIFEST, index):
            return content
    return None


def _ran_nodes(step: RunStep) -> bool:
    if step.command is None or step.status == _SKIPPED:
        return False
    return command_of(step.command) in RUNS_NODES | {"retry"}


async def _results(api: DbtCloudApi, run: Run, index: int | None) -> RunResults | None:
    content = await api.artifact(str(run.id), RESULTS, index)
    if content is None:
        return None
    try:
        results = await asyncio.to_thread(RunResults.model_validate_json, content)
    except ValidationError:
        get_run_logger().warning("%s of dbt Cloud run %s can't be read: taken as missing", RESULTS, run.id)
        return None
    # `dbt docs generate` and `dbt compile` write this file too, with a success for all that they compiled.
    return results if results.args.which in (None, "retry", *RUNS_NODES) else None


async def _project(manifest: bytes | None) -> Project | None:
    if manifest is None:
        return None
    try:
        return await asyncio.to_thread(Project.read, manifest)
    except ValueError:
        return None


def _not_reached(run: Run, project: Project, told: set[str]) -> list[DbtNode]:
    """What a failed run did not come to: it ends with the first command that fails."""
    missing: dict[str, str] = {}
    for step in run.run_steps or []:
        if step.status == _SKIPPED and step.command and command_of(step.command) in RUNS_NODES:
            for unique_id in project.selected([step.command]):
                if unique_id not in told and project.lineage.nodes[unique_id].materialized != "ephemeral":
                    missing.setdefault(unique_id, step.command)
    return [
        DbtNode(
            unique_id=unique_id,
            name=_name(unique_id, project.lineage),
            resource_type=_kind(unique_id),
            state=DbtState.SKIPPED,
            message=f"`{command}` was not reached",
            group=project.lineage.nodes[unique_id].group,
            owner=project.lineage.nodes[unique_id].owner,
        )
        for unique_id, command in missing.items()
    ]


def _nodes(found: Sequence[RunResults], lineage: Lineage | None) -> list[DbtNode]:
    results = {one.unique_id: one for file in found for one in file.results}
    blame = Blame()
    if lineage is not None:
        blame.know(lineage)
    for unique_id, one in results.items():
        if state_of(one.status) in (DbtState.FAIL, DbtState.ERROR):
            blame.failed(unique_id, label_of(_kind(unique_id), _name(unique_id, lineage)))
    return [_node(one, blame, lineage) for one in results.values()]


def _node(one: NodeResult, blame: Blame, lineage: Lineage | None) -> DbtNode:
    kind, state = _kind(one.unique_id), state_of(one.status)
    known = lineage.nodes.get(one.unique_id) if lineage else None
    reason = blame.reason(one.unique_id) if state is DbtState.SKIPPED else None
    return DbtNode(
        unique_id=one.unique_id,
        name=_name(one.unique_id, lineage),
        resource_type=kind,
        state=state,
        message=one.message or reason,
        rows=rows_of(kind, known.materialized if known else None, one.adapter_response or {}, one.message),
        failures=one.failures if kind in ("test", "unit_test") else None,
        duration=one.execution_time or 0.0,
        group=known.group if known else None,
        owner=known.owner if known else None,
    )


def _kind(unique_id: str) -> str:
    return unique_id.split(".", 1)[0]


def _name(unique_id: str, lineage: Lineage | None) -> str:
    if lineage is not None and unique_id in lineage.nodes:
        return lineage.nodes[unique_id].name
    parts = unique_id.split(".")
    return parts[2] if len(parts) > 2 else unique_id


async def show(nodes: Sequence[DbtNode]) -> None:
    """Give each node a task run that ends as the node did. They are shown after the run, all at once."""
    if len(nodes) > _SHOWN:
        quiet = [node for node in nodes if node.state is DbtState.SUCCESS]
        nodes = [node for node in nodes if node.state is not DbtState.SUCCESS][:_SHOWN]
        get_run_logger().info("%d nodes that succeeded are in the result, without task runs", len(quiet))
    for start in range(0, len(nodes), _AT_ONCE):
        runs = NodeRuns()
        for node in nodes[start : start + _AT_ONCE]:
            runs.settle(node.unique_id, node.resource_type, node.name, node.state, node.message, node.rows)
        await runs.close("its state could not be shown in time")


async def why_it_broke(api: DbtCloudApi, run: Run) -> str:
    """Why a run failed without a failed node: the step at which it broke, and what dbt printed there."""
    deadline = time.monotonic() + LOGS_PATIENCE
    while True:
        step = next((step for step in run.run_steps or [] if step.failed), None)
        # Not the shortened debug logs: that field may stay empty for ever.
        logs = (step.logs or step.debug_logs) if step else None
        if logs or step is None or time.monotonic() >= deadline:
            break
        await asyncio.sleep(0.5)
        run = await api.run(str(run.id), related=["run_steps"])
    if step is None:
        return run.status_message or "dbt Cloud gives no reason"
    what = f"the step `{step.command or step.name}` failed"
    told = complaint_in(logs or "") or run.status_message
    return f"{what}: {told}" if told else what


def complaint_in(logs: str) -> str:
    """What went wrong, out of what dbt printed: from its error on, else the last lines."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", logs)
    lines = [re.sub(r"^\d\d:\d\d:\d\d(\.\d+)?\s*", "", line).strip() for line in plain.splitlines()]
    lines = [line for line in lines if line and not line.startswith("Running with dbt=")]
    starts = [n for n, line in enumerate(lines) if re.search(r"\bError\b|Encountered an error", line)]
    some = lines[starts[0] :] if starts else lines[-3:]
    return one_line(" ".join(line for line in some if line != "Encountered an error:"), 500)
