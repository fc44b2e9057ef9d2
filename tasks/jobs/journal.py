"""The journal: which jobs a flow run means to start, has started and has seen the end of.

It is kept in the Prefect API, so that a retry, another worker on another machine and a cancellation hook can
read it: an intent is written before the start request, the job's id right after it, the end last.

In the API it is a Markdown artifact with the key `elt-jobs`: for a person a table with a link to every job in
the vendor's interface, for us the same as JSON in a comment at its end. Up to a hundred jobs share a page,
and all that is to be written at one moment goes in one request: an artifact of its own for each of 500 jobs
costs the server more time than the jobs take to start.
"""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections.abc import Hashable, Iterable
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any, Protocol
from urllib.parse import quote
from uuid import UUID, uuid4
from weakref import WeakKeyDictionary

from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import ArtifactCreate, ArtifactUpdate
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterFlowRunId,
    ArtifactFilterKey,
    ArtifactFilterTaskRunId,
)
from prefect.client.schemas.objects import Artifact
from prefect.client.schemas.sorting import ArtifactSort
from prefect.context import FlowRunContext, TaskRunContext
from pydantic import ConfigDict, Field, TypeAdapter

from tasks.jobs.attempt import attempt_of, current_attempt, stop_if_superseded
from tasks.jobs.model import Intent, JobHandle, JobResult

ARTIFACT_KEY = "elt-jobs"
_PAGE = 100
_URL = ":/?#[]@!$&'*+,;=%~"  # what quote() leaves as it is: all but what would end a Markdown link
_REMEMBERED = 50_000  # calls; a process that runs flows for ever must not grow with each
_PAUSE = 0.1  # seconds over which what is not urgent is gathered into one write


class Entry(Intent):
    """What the journal knows of one job."""

    model_config = ConfigDict(frozen=False)

    key: str = Field(description="Vendor, operation, resource, block; `#2` for a repeat in one run.")
    vendor: str
    resource_id: str
    name: str
    block: str | None = Field(default=None, description="Saved block with which a hook can reach the vendor.")
    handle: JobHandle | None = None
    result: JobResult | None = None
    lease: UUID | None = Field(default=None, description="Its slot of a concurrency limit: see slots.py.")
    too_few: list[str] = Field(default=[], description="Gates that found too few rows in it.")
    updated: datetime = Field(default_factory=lambda: datetime.now(UTC))

    @property
    def open(self) -> bool:
        """Whether a job may be running for it."""
        return self.result is None


_ENTRIES = TypeAdapter(list[Entry])


class Journal(Protocol):
    """Where entries are kept."""

    async def entry(self, key: str) -> Entry | None:
        """The latest entry under a key."""

    async def record(self, entry: Entry, *, urgent: bool = False) -> None:
        """Write an entry; returns when it is kept. `urgent` writes at once, the rest is gathered."""

    async def job_ids(self, vendor: str, resource_id: str) -> list[str]:
        """Every job of a resource that is in the journal."""

    def key(self, base: str) -> str:
        """The key of this call: `base`, or `base#n` for the n-th such job of the flow run."""


class MemoryJournal:
    """A journal for jobs that are run outside of Prefect: it ends with the process."""

    def __init__(self) -> None:
        self.entries: dict[str, Entry] = {}

    async def entry(self, key: str) -> Entry | None:
        """The latest entry under a key."""
        return self.entries.get(key)

    async def record(self, entry: Entry, *, urgent: bool = False) -> None:
        """Keep an entry."""
        self.entries[entry.key] = entry

    async def job_ids(self, vendor: str, resource_id: str) -> list[str]:
        """Every job of a resource that is in the journal."""
        return _job_ids(self.entries.values(), vendor, resource_id)

    def key(self, base: str) -> str:
        """Outside of a flow run nothing tells a repeat from a retry: one job per key."""
        return base


class RunJournal:
    """The journal of one flow run (or of one task run outside of flows), in the Prefect API.

    Args:
        flow_run_id: The flow run.
        task_run_id: The task run, where there is no flow run.
    """

    def __init__(self, flow_run_id: UUID | None, task_run_id: UUID | None) -> None:
        self._flow_run_id = flow_run_id
        self._task_run_id = task_run_id
        self._entries: dict[str, Entry] = {}
        # This process writes pages of its own only: what an earlier attempt wrote stays as it was.
        self._pages: list[list[str]] = []
        self._page_of: dict[str, int] = {}
        self._artifacts: dict[int, UUID] = {}
        self._dirty: set[int] = set()
        self._waiting: list[asyncio.Future[None]] = []
        self._urgent = asyncio.Event()
        self._writer: asyncio.Task[None] | None = None
        self._loaded: asyncio.Task[None] | None = None
        self._attempt = 0

    async def entry(self, key: str) -> Entry | None:
        """The latest entry under a key, of this attempt or an earlier one."""
        await self._load()
        return self._entries.get(key)

    async def entries(self) -> list[Entry]:
        """All entries."""
        await self._load()
        return list(self._entries.values())

    async def job_ids(self, vendor: str, resource_id: str) -> list[str]:
        """Every job of a resource that is in the journal, of this attempt and of earlier ones."""
        await self._load()
        return _job_ids(self._entries.values(), vendor, resource_id)

    def key(self, base: str) -> str:
        """The key of this call: `base`, or `base#n` for the n-th such job of the flow run.

        A retry of the same task run, and the same call in a retry of the flow run, get the same key; a second
        call in one run is a second job.
        """
        flow, task = FlowRunContext.get(), TaskRunContext.get()
        attempt = attempt_of(flow.flow_run) if flow and flow.flow_run else 0
        scope = self._flow_run_id or self._task_run_id
        number = _calls.number((scope, attempt, base), task.task_run.id if task else uuid4())
        return base if number == 1 else f"{base}#{number}"

    async def record(self, entry: Entry, *, urgent: bool = False) -> None:
        """Write an entry; returns when the API has it.

        What is urgent is written before a job is started, and only if no other attempt of the run has begun.

        Raises:
            Superseded: Another attempt has begun.
            Exception: What the Prefect client raises when the API can't be reached.
        """
        self._attempt = max(self._attempt, current_attempt())
        entry = entry.model_copy(update={"updated": datetime.now(UTC)})
        self._entries[entry.key] = entry
        if entry.key not in self._page_of:
            if not self._pages or len(self._pages[-1]) >= _PAGE:
                self._pages.append([])
            self._pages[-1].append(entry.key)
            self._page_of[entry.key] = len(self._pages) - 1
        self._dirty.add(self._page_of[entry.key])
        written = asyncio.get_running_loop().create_future()
        self._waiting.append(written)
        if urgent:
            self._urgent.set()
        if self._writer is None or self._writer.done():
            self._writer = asyncio.create_task(self._write())
        await asyncio.shield(written)

    async def _load(self) -> None:
        """Read once what earlier attempts wrote."""
        if self._loaded is None or (self._loaded.done() and self._loaded.exception()):
            self._loaded = asyncio.create_task(self._read())
        await asyncio.shield(self._loaded)

    async def _read(self) -> None:
        for entry in await read_entries(self._flow_run_id, self._task_run_id):
            self._entries.setdefault(entry.key, entry)

    async def _write(self) -> None:
        while self._waiting:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._urgent.wait(), timeout=_PAUSE)
            await asyncio.sleep(0)  # let everything that is ready at this moment join
            urgent = self._urgent.is_set()
            self._urgent.clear()
            waiting, self._waiting = self._waiting, []
            dirty, self._dirty = self._dirty, set()
            try:
                async with get_client() as client:
                    if urgent and self._flow_run_id and self._attempt:
                        await stop_if_superseded(client, self._flow_run_id, self._attempt)
                    for page in sorted(dirty):
                        await self._write_page(client, page)
            except Exception as error:  # noqa: BLE001 - handed to whoever waits for this write
                self._dirty |= dirty
                for future in waiting:
                    if not future.done():
                        future.set_exception(error)
                        future.exception()  # a waiter may be gone; then nobody needs to hear of it
            else:
                for future in waiting:
                    if not future.done():
                        future.set_result(None)

    async def _write_page(self, client: Any, page: int) -> None:
        text = _page_text([self._entries[key] for key in self._pages[page]])
        if page in self._artifacts:
            await client.update_artifact(self._artifacts[page], ArtifactUpdate(data=text))
            return
        artifact = await client.create_artifact(
            ArtifactCreate(
                key=ARTIFACT_KEY,
                type="markdown",
                data=text,
                description="The vendors' jobs of this run",
                flow_run_id=self._flow_run_id,
                task_run_id=None if self._flow_run_id else self._task_run_id,
            )
        )
        self._artifacts[page] = artifact.id


class _Calls:
    """Which call of a run is the how manieth for its job, over all threads and loops of this process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._callers: dict[Hashable, list[UUID]] = {}

    def number(self, job: Hashable, caller: UUID) -> int:
        with self._lock:
            callers = self._callers.setdefault(job, [])
            if len(self._callers) > _REMEMBERED:
                del self._callers[next(iter(self._callers))]
            if caller not in callers:
                callers.append(caller)
            return callers.index(caller) + 1


_calls = _Calls()
_journals: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[UUID, RunJournal]] = WeakKeyDictionary()


def current_journal() -> RunJournal | MemoryJournal:
    """The journal of the flow run that is running here, or of the task run outside of flows."""
    flow, task = FlowRunContext.get(), TaskRunContext.get()
    task_run_id = task.task_run.id if task else None
    flow_run_id = task.task_run.flow_run_id if task else None
    if flow_run_id is None and flow and flow.flow_run:
        flow_run_id = flow.flow_run.id
    scope = flow_run_id or task_run_id
    if scope is None:
        return MemoryJournal()
    journals = _journals.setdefault(asyncio.get_running_loop(), {})
    if scope not in journals:
        journals[scope] = RunJournal(flow_run_id, task_run_id)
    return journals[scope]


async def read_entries(flow_run_id: UUID | None, task_run_id: UUID | None = None) -> list[Entry]:
    """The journal of a flow run, from any process: the latest entry of each key."""
    scope = ArtifactFilter(key=ArtifactFilterKey(any_=[ARTIFACT_KEY]))
    if flow_run_id:
        scope.flow_run_id = ArtifactFilterFlowRunId(any_=[flow_run_id])
    elif task_run_id:
        scope.task_run_id = ArtifactFilterTaskRunId(any_=[task_run_id])
    artifacts: list[Artifact] = []
    async with get_client() as client:
        while True:
            # Oldest last: a page that is written meanwhile pushes others back, and none is missed.
            page = await client.read_artifacts(
                artifact_filter=scope, sort=ArtifactSort.CREATED_DESC, limit=_PAGE, offset=len(artifacts)
            )
            artifacts += page
            if len(page) < _PAGE:
                break
    latest: dict[str, Entry] = {}
    for artifact in artifacts:
        for entry in entries_of(artifact):
            if entry.key not in latest or entry.updated > latest[entry.key].updated:
                latest[entry.key] = entry
    return list(latest.values())


def _job_ids(entries: Iterable[Entry], vendor: str, resource_id: str) -> list[str]:
    ids: dict[str, None] = {}
    for entry in entries:
        if (entry.vendor, entry.resource_id) == (vendor, resource_id):
            ids |= dict.fromkeys(entry.known)
            if entry.handle:
                ids[entry.handle.job_id] = None
    return list(ids)


def _cell(text: str) -> str:
    """Text of a vendor's as it may stand in a table, where it can't begin anything of its own."""
    text = re.sub(r"\s+", " ", text)[:200]
    return re.sub(r"([\\`*_\[\]|])", r"\\\1", text).replace("<", "&lt;")


def _page_text(entries: Iterable[Entry]) -> str:
    entries = list(entries)
    lines = ["| what | job | state | |", "|---|---|---|---|"]
    for entry in entries:
        job = "start requested"
        if entry.handle:
            job = _cell(entry.handle.job_id)
            if entry.handle.url:
                job = f"[{job}]({quote(entry.handle.url, safe=_URL)})"
        state = entry.result.state.value if entry.result else "RUNNING" if entry.handle else ""
        message = (entry.result.message if entry.result else None) or ""
        lines.append(f"| {entry.vendor} {_cell(entry.name)} | {job} | {state} | {_cell(message)} |")
    # Escaped so that no text in it can end the comment.
    record = json.dumps(_ENTRIES.dump_python(entries, mode="json", exclude_defaults=True))
    record = record.replace("<", "\\u003c").replace(">", "\\u003e")
    return "\n".join(lines) + f"\n\n<!-- journal {record} -->\n"


def entry_key(vendor: str, operation: str, resource_id: str, block: str | None) -> str:
    """What an entry is kept under.

    Two accounts may know the same id; of two that are not saved nothing lasting tells which is which.
    """
    return f"{vendor}:{operation}:{resource_id}" + (f"@{block}" if block else "")


def entries_of(artifact: Artifact) -> list[Entry]:
    """The entries of one page of a journal."""
    text = artifact.data
    found = re.search(r"^<!-- journal (.*) -->$", text, re.MULTILINE) if isinstance(text, str) else None
    # One that can't be read fails the run: whoever starts jobs without knowing starts them twice.
    return _ENTRIES.validate_json(found.group(1)) if found else []
