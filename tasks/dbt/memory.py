"""What a dbt build has done so far, kept in the Prefect API while it runs.

From there a retry goes on, in whatever process and on whatever machine: it needs neither dbt's target folder
nor a result storage that the machines share. `dbt` itself writes its results only when it ends, so that of a
build that is killed nothing would be known.

In the API it is a table artifact with the key `dbt-nodes`: for a person the nodes of the build with state,
rows and message, for us the same, with what was asked for as JSON in a comment in its description.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import time
from collections.abc import Iterable
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import ArtifactCreate, ArtifactUpdate
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterFlowRunId,
    ArtifactFilterKey,
    ArtifactFilterTaskRunId,
)
from prefect.client.schemas.sorting import ArtifactSort
from prefect.context import FlowRunContext, TaskRunContext
from prefect.logging import get_run_logger
from pydantic import BaseModel, ConfigDict, Field

from tasks.dbt.model import DbtCore, DbtNode, DbtState, one_line
from tasks.environment import prefix_here
from tasks.jobs import attempt_of

ARTIFACT_KEY = "dbt-nodes"
_PAGE = 20
_PAUSE = 0.5  # seconds between two writes: what was done in the last of them before a kill is done again
_PATIENCE = 5.0  # seconds for the last write: an API that is away must not hold up the end of a build
_DONE = frozenset({DbtState.SUCCESS, DbtState.WARN})
# What says which build it is, as against how patiently or where it is run.
_ASKED = ("command", "target", "select", "exclude", "selector", "vars", "data_interval", "full_refresh")


class BuildRecord(BaseModel):
    """What is known of one dbt invocation."""

    model_config = ConfigDict(frozen=True)

    build: str = Field(description="Which build it is: the same in every attempt at it.")
    project: str
    asked: dict[str, Any] = Field(description="The part of DbtCore that says what is built.")
    environment: str | None = Field(
        default=None, description="What stands before the names of its environment's deployments."
    )
    left_out: list[str] = Field(default=[], description="What was excluded beside that.")
    started_at: datetime = Field(description="When the first attempt at this build began.")
    attempt: int = Field(description="The how manieth attempt at its flow run it belongs to.")
    task_run_id: UUID | None = None
    complete: bool = Field(default=False, description="Whether dbt came to its end.")
    batches: dict[str, dict[str, Any]] = Field(
        default={}, description="Of microbatch models that are done in part: the batches."
    )
    hidden: set[str] = Field(
        default=set(),
        description="Ephemeral models that are done. Nothing is built of them: they are no nodes.",
    )
    nodes: list[DbtNode] = []

    @property
    def done(self) -> list[DbtNode]:
        """What need not be run again. Not hooks: they belong to every invocation."""
        return [node for node in self.nodes if node.state in _DONE and node.resource_type != "operation"]

    @property
    def left(self) -> list[DbtNode]:
        """What failed or was skipped; of a build that broke off there is more."""
        return [node for node in self.nodes if node.state not in _DONE and node.resource_type != "operation"]

    def apply(self, dbt: DbtCore) -> DbtCore:
        """The same build, with the folders, threads and patience of `dbt`."""
        return DbtCore.model_validate({**dbt.model_dump(), **self.asked})


def build_id(dbt: DbtCore, project: str, exclude: Iterable[str], retry_of: UUID | None) -> str:
    """What two attempts at the same build have in common. Not the folder: it may be another checkout."""
    said = dbt.model_dump(mode="json", include={*_ASKED, "env", "profiles_dir"})
    said |= {"project": project, "left_out": sorted(exclude), "retry_of": str(retry_of)}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16]


def new_record(dbt: DbtCore, project: str, exclude: list[str], build: str) -> BuildRecord:
    """A record for a build that begins here and now."""
    flow, task = FlowRunContext.get(), TaskRunContext.get()
    return BuildRecord(
        build=build,
        project=project,
        asked=dbt.model_dump(mode="json", include=set(_ASKED)),
        environment=prefix_here(),
        left_out=exclude,
        started_at=datetime.now(UTC),
        attempt=attempt_of(flow.flow_run) if flow and flow.flow_run else 0,
        task_run_id=task.task_run.id if task else None,
    )


async def earlier_attempt(begun: BuildRecord) -> BuildRecord | None:
    """What an earlier attempt at the same build, in the same flow run, has done.

    Only a retry has one: the same call a second time in one attempt of a flow is meant to build again.
    """
    task = TaskRunContext.get()
    if begun.attempt <= 1 and not (task and task.task_run.run_count > 1):
        return None
    flow_run_id, task_run_id = _scope()
    for record in await read_records(flow_run_id, task_run_id, build=begun.build):
        if record.attempt < begun.attempt or record.task_run_id == begun.task_run_id:
            return record
    return None


async def read_records(
    flow_run_id: UUID | None, task_run_id: UUID | None = None, *, build: str | None = None
) -> list[BuildRecord]:
    """The builds of a flow run (of a task run outside of flows), from any process, latest first.

    Args:
        flow_run_id: The flow run.
        task_run_id: The task run, where there is no flow run.
        build: Only the latest attempts at this build.
    """
    scope = ArtifactFilter(key=ArtifactFilterKey(any_=[ARTIFACT_KEY]))
    if flow_run_id:
        scope.flow_run_id = ArtifactFilterFlowRunId(any_=[flow_run_id])
    else:
        scope.task_run_id = ArtifactFilterTaskRunId(any_=[task_run_id or UUID(int=0)])
    found: list[BuildRecord] = []
    read = 0
    async with get_client() as client:
        while True:
            page = await client.read_artifacts(
                artifact_filter=scope, sort=ArtifactSort.CREATED_DESC, limit=_PAGE, offset=read
            )
            read += len(page)
            records = [_parse(artifact.description, artifact.data) for artifact in page]
            found += [record for record in records if build is None or record.build == build]
            if len(page) < _PAGE or (found and build is not None):
                return found


class Recorder:
    """Writes a build's record while the build runs, every half second and no more than a sixth of the time.

    Args:
        record: What is known at the beginning.
    """

    def __init__(self, record: BuildRecord) -> None:
        self._record = record
        self._nodes = {node.unique_id: node for node in record.nodes}
        self._flow_run_id, self._task_run_id = _scope()
        self._artifact: UUID | None = None
        self._news = asyncio.Event()
        self._closed = asyncio.Event()
        self._writer: asyncio.Task[None] | None = None
        self._complained = False

    def note(self, node: DbtNode, batches: dict[str, Any] | None = None) -> None:
        """A node has ended."""
        self._nodes[node.unique_id] = node
        if batches:
            self._record.batches[node.unique_id] = batches
        else:
            self._record.batches.pop(node.unique_id, None)
        self._tell()

    def note_hidden(self, unique_id: str) -> None:
        """An ephemeral model is done, which may have failed in an earlier attempt."""
        self._nodes.pop(unique_id, None)
        self._record.hidden.add(unique_id)
        self._tell()

    def _tell(self) -> None:
        self._news.set()
        if self._writer is None:
            self._writer = asyncio.create_task(self._write_on())

    def forget(self) -> None:
        """Nothing of what an earlier attempt did has lasted."""
        self._nodes.clear()
        self._record.hidden.clear()

    def finished(self) -> None:
        """What has not run by now was not asked for: dbt came to its end."""
        self._record = self._record.model_copy(update={"complete": True})
        self._news.set()

    async def close(self) -> None:
        """Write what is not written yet."""
        self._closed.set()
        with suppress(TimeoutError):
            async with asyncio.timeout(_PATIENCE):
                if self._writer is not None:
                    self._news.set()
                    await self._writer
                elif self._news.is_set():
                    await self._write()

    async def _write_on(self) -> None:
        while not self._closed.is_set():
            await self._news.wait()
            took = await self._write()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._closed.wait(), max(_PAUSE, 5 * took))
        if self._news.is_set():
            await self._write()

    async def _write(self) -> float:
        self._news.clear()
        began = time.monotonic()
        text, rows = _dump(self._record, list(self._nodes.values()))
        try:
            async with get_client() as client:
                if self._artifact is not None:
                    await client.update_artifact(self._artifact, ArtifactUpdate(data=rows, description=text))
                else:
                    wanted = ArtifactCreate(
                        key=ARTIFACT_KEY,
                        type="table",
                        data=rows,
                        description=text,
                        flow_run_id=self._flow_run_id,
                        task_run_id=self._task_run_id,
                    )
                    self._artifact = (await client.create_artifact(wanted)).id
        except Exception as error:  # noqa: BLE001 - a build goes on without its memory, whatever ails the API
            if not self._complained:
                self._complained = True
                get_run_logger().warning(
                    "What is done can't be recorded (%s): a retry may do it again.", one_line(str(error))
                )
        return time.monotonic() - began


def _scope() -> tuple[UUID | None, UUID | None]:
    flow, task = FlowRunContext.get(), TaskRunContext.get()
    flow_run_id = task.task_run.flow_run_id if task else None
    if flow_run_id is None and flow and flow.flow_run:
        flow_run_id = flow.flow_run.id
    return flow_run_id, task.task_run.id if task else None


def _dump(record: BuildRecord, nodes: list[DbtNode]) -> tuple[str, str]:
    rows = [
        {
            "node": node.label,
            "state": node.state.value,
            "rows": node.rows,
            "seconds": round(node.duration, 2),
            "message": one_line(node.message, 500) if node.message else None,
            "owner": node.owner,
            "unique_id": node.unique_id,
            "resource_type": node.resource_type,
            "name": node.name,
            "group": node.group,
            "failures": node.failures,
            "compiled": node.compiled_path,
            "earlier": node.earlier,
        }
        for node in nodes
    ]
    head = record.model_dump_json(exclude={"nodes"}).replace("<", "\\u003c").replace(">", "\\u003e")
    said = "" if record.complete else " so far"
    return f"What dbt did in {record.project}{said}\n\n<!-- dbt {head} -->\n", json.dumps(rows)


def _parse(description: str | None, data: Any) -> BuildRecord:
    found = re.search(r"^<!-- dbt (.*) -->$", description or "", re.MULTILINE)
    if not found:
        raise ValueError(f"An artifact {ARTIFACT_KEY!r} of this run is not one of a dbt build.")
    nodes = [
        {
            **{
                key: row[key] for key in ("state", "rows", "message", "owner", "group", "failures", "earlier")
            },
            **{key: row[key] for key in ("unique_id", "resource_type", "name")},
            "duration": row["seconds"],
            "compiled_path": row["compiled"],
        }
        for row in (json.loads(data) if isinstance(data, str) else data)
    ]
    return BuildRecord.model_validate({**json.loads(found[1]), "nodes": nodes})
