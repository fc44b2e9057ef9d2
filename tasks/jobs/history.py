"""What earlier runs moved: the rows of the last good syncs, out of the journals in the Prefect API."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from uuid import UUID

from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterKey,
    FlowRunFilter,
    FlowRunFilterDeploymentId,
)
from prefect.client.schemas.objects import Artifact
from prefect.client.schemas.sorting import ArtifactSort
from pydantic import ValidationError

from tasks.jobs.journal import ARTIFACT_KEY, RunJournal, current_journal, entries_of
from tasks.jobs.model import JobResult, JobState

_PAGE = 20  # journals per request: one may hold a hundred jobs
_MOST_PAGES = 10

Resource = tuple[str, str]
"""A vendor's name, and the id of a connection of it."""


@dataclass(frozen=True)
class Earlier:
    """What was found of earlier syncs.

    Attributes:
        rows: The rows of each connection's last syncs, newest first. Only connections with a history are in
            it.
        complete: Whether what is not in it has no history; else there are older journals, not looked through.
    """

    rows: dict[Resource, list[int]]
    complete: bool


async def rows_of_earlier_runs(
    wanted: Collection[Resource], *, runs: int, but: UUID | None, since: datetime | None = None
) -> Earlier:
    """The rows of each connection's last syncs that moved some and were not found too few.

    The newest two hundred journals of the same deployment are looked through first: others may write that
    many between two of its runs. Then, for connections that were not synced often enough by it, the newest
    two hundred of any flow.

    Args:
        wanted: The connections.
        runs: How many syncs of each at most.
        but: The flow run that is going on: its own syncs are no history.
        since: Runs that began before are no history.
    """
    search = _Search(set(wanted), runs, but, since)
    async with get_client() as client:
        if but is not None:
            own = (await client.read_flow_run(but)).deployment_id
            of_it = FlowRunFilterDeploymentId(any_=[own] if own else None, is_null_=None if own else True)
            await search.look(client, FlowRunFilter(deployment_id=of_it))
        complete = not search.missing or await search.look(client, None)
    return Earlier(search.rows(), complete)


@dataclass
class _Search:
    missing: set[Resource]
    runs: int
    but: UUID | None
    since: datetime | None
    _found: dict[Resource, list[tuple[datetime, int]]] = field(default_factory=dict)
    _seen: set[tuple[UUID, str]] = field(default_factory=set)

    async def look(self, client: PrefectClient, flow_runs: FlowRunFilter | None) -> bool:
        """Look through the newest journals, and say whether there are no others that could count."""
        for page in range(_MOST_PAGES):
            journals = await client.read_artifacts(
                artifact_filter=ArtifactFilter(key=ArtifactFilterKey(any_=[ARTIFACT_KEY])),
                flow_run_filter=flow_runs,
                sort=ArtifactSort.CREATED_DESC,
                limit=_PAGE,
                offset=page * _PAGE,
            )
            for journal in journals:
                if self.since and journal.created and journal.created < self.since:
                    return True
                if self.but is None or journal.flow_run_id != self.but:
                    self._take(journal)
            if not self.missing or len(journals) < _PAGE:
                return True
        return False

    def _take(self, journal: Artifact) -> None:
        try:
            entries = entries_of(journal)
        except ValidationError:
            return  # somebody broke it, or another version wrote it: of other runs' it only tells rows
        for entry in entries:
            # The attempts of a run tell of the same syncs; the last one's journal comes first.
            one = (journal.flow_run_id or journal.id, entry.key)
            resource, result = (entry.vendor, entry.resource_id), entry.result
            if resource not in self.missing or one in self._seen or ":sync:" not in entry.key:
                continue
            self._seen.add(one)
            # A sync of too little is what is looked for; it must not become what is usual.
            if result is None or result.state is not JobState.SUCCEEDED or not result.rows or entry.too_few:
                continue
            found = self._found.setdefault(resource, [])
            found.append((journal.created or entry.updated, result.rows))
            if len(found) >= self.runs:
                self.missing.discard(resource)

    def rows(self) -> dict[Resource, list[int]]:
        return {
            resource: [rows for _, rows in sorted(found, key=lambda pair: pair[0], reverse=True)]
            for resource, found in self._found.items()
        }


async def note_too_few(gate: str, found: Mapping[Resource, bool], jobs: Collection[JobResult]) -> None:
    """Write to the run's journal which syncs a gate has found too few rows in, and which no longer.

    Args:
        gate: What the gate is called; another of the same run may find otherwise.
        found: For each connection whether it has.
        jobs: The syncs.
    """
    journal = current_journal()
    if not isinstance(journal, RunJournal):
        return
    ids = {(job.vendor, job.resource_id): job.job_id for job in jobs}
    for entry in await journal.entries():
        resource = (entry.vendor, entry.resource_id)
        if ":sync:" not in entry.key or entry.result is None or resource not in found:
            continue
        shut = found[resource] and entry.result.job_id == ids[resource]
        # No await between reading and recording: other gates note theirs at the same time.
        entry = await journal.entry(entry.key) or entry
        said = [label for label in entry.too_few if label != gate] + ([gate] if shut else [])
        if said != entry.too_few:
            await journal.record(entry.model_copy(update={"too_few": said}))
