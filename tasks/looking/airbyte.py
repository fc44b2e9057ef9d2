"""Airbyte's jobs that have ended, by looking at its own list: what no notification told.

Airbyte tells of a job once and keeps nothing, so a receiver that was away has missed it. A look asks which
jobs have changed since the last one, and hands over the same events that the receiver would have: one that
has come both ways starts its runs once. A cancelled job, of which there is no notification, is told, too.

What was handed over is written down after that. A look that died in between hands over the same events
again, which start nothing twice. A job that can't be read holds up no other, and is looked at again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Annotated
from uuid import UUID

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import PrefectClient, get_client
from prefect.logging import get_run_logger
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from blocks.airbyte_model import Job
from blocks.errors import NotFoundError, VendorError
from blocks.receiver import AirbyteWebhook
from blocks.reference import NAMED, NamesBlock, load_block
from tasks.airbyte_ended import ended_event
from tasks.airbyte_jobs import AirbyteVendor
from tasks.events import EltEvent, HandOverError, OnceTrigger, hand_over
from tasks.jobs import tag_run, without_traceback
from tasks.jobs.started import JobKey, started_since
from tasks.looking.memory import ArtifactMemory, MemoryUnreadable, memory_name, owner

_SLICE = 20  # jobs between two writes of the memory: what a kill can cost is to hand over these again
_SECOND = timedelta(seconds=1)  # to which Airbyte's times are known


class WatchedJobs(BaseModel):
    """Whose jobs are looked at."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    webhook: Annotated[str, NAMED, NamesBlock("airbyte-webhook")] = Field(
        title="Webhook",
        description="Name of a saved Airbyte Webhook block: its server is asked, and its name is part of "
        "what an event is known by.",
    )
    since: AwareDatetime | None = Field(
        default=None,
        title="Since",
        description="Of the first look: tell what has ended since then. By default nothing from before it.",
    )
    overlap: float = Field(
        default=300.0,
        ge=0,
        title="Overlap",
        description="How many seconds before the last job's end are looked at again, for jobs that Airbyte "
        "lists late, and for how long a job is waited for that can't be read, or of which it is not told yet "
        "whether all of it has landed.",
    )

    @property
    def source(self) -> str:
        """The block's name without its kind."""
        return self.webhook.rpartition("/")[2]


class JobsLook(BaseModel):
    """What one look came to.

    Attributes:
        jobs: Jobs that were handed over.
        runs: Flow runs that they have started, now or when the receiver told of them.
        message: In a sentence.
    """

    model_config = ConfigDict(frozen=True)

    jobs: int = 0
    runs: int = 0
    message: str = ""


class Remembered(BaseModel):
    """What is kept between looks.

    Attributes:
        began: What ended before this is not told.
        since: Up to here what has ended was handed over.
        handed: Jobs that were, with their ends: those of the overlap.
        unreadable: Jobs that can't be read in Airbyte's list, with when that was first seen.
    """

    began: datetime
    since: datetime
    handed: dict[str, datetime] = {}
    unreadable: dict[str, datetime] = {}


@task(name="airbyte-ended", task_run_name="look at {what.webhook}", cache_policy=NO_CACHE)
async def look_at_jobs(what: WatchedJobs, triggers: Sequence[OnceTrigger]) -> JobsLook:
    """Hand over every job that has ended since the last look, as the receiver does.

    Args:
        what: Whose jobs.
        triggers: Which deployments are started by them.

    Returns:
        What came of it.

    Raises:
        VendorError: Airbyte can't be asked, or not of one of the jobs; then the others were handed over.
        HandOverError: The Prefect server did not take everything; the next look goes on.
        MemoryUnreadable: What earlier looks have kept can't be read.
        BlockNotFound: The webhook is not a saved block.
    """
    tag_run("airbyte")
    without_traceback(HandOverError, MemoryUnreadable)
    log = get_run_logger()
    block = await load_block(AirbyteWebhook, what.webhook)
    async with get_client() as client, block.server.connect() as api:
        key = memory_name("airbyte-ended", what.source, owner())
        memory = ArtifactMemory(client, key, Remembered)
        kept, now = await memory.read(), datetime.now(UTC)
        overlap = timedelta(seconds=what.overlap)
        changed, unreadable = await api.jobs_changed((kept.since if kept else what.since or now) - overlap)
        if kept is None:
            # After the list, whose reply shows what Airbyte's clock says.
            began = what.since or api.theirs(now).replace(microsecond=0) - 2 * _SECOND
            kept = Remembered(began=began, since=began)
        ended = sorted((job for job in changed if job.ended), key=lambda job: job.ended_at)
        new = [job for job in ended if job.ended_at >= kept.began and job.id not in kept.handed]
        kept.unreadable = {id_: kept.unreadable.get(id_, now) for id_ in unreadable}
        for id_ in sorted(unreadable):
            log.warning("Airbyte job %s can't be read in Airbyte's list: it is not told.", id_)
        ours = await started_since(client, min(job.created_at for job in new)) if new else {}
        teller = _Teller(what.source, AirbyteVendor(block.server), client, ours, api.theirs(now) - overlap)
        told, runs, errors = 0, 0, list[Exception]()
        open_ = list[datetime]()  # when those ended that are to be looked at again
        for first in range(0, len(new), _SLICE):
            some = new[first : first + _SLICE]
            found = await asyncio.gather(*(teller.events(job) for job in some), return_exceptions=True)
            events: list[EltEvent] = []
            done: dict[str, datetime] = {}
            for job, one in zip(some, found, strict=True):
                if isinstance(one, list):
                    events += one
                    done[job.id] = job.ended_at
                    continue
                open_.append(job.ended_at)
                if isinstance(one, Exception):
                    why = one if isinstance(one, VendorError) else type(one).__name__
                    log.error("Airbyte job %s is not told yet: %s", job.id, why)
                    errors.append(one)
                elif one is not None:
                    raise one
            taken = await hand_over(events, triggers, client)
            told += len(done)
            runs += sum(len(one.runs) for one in taken)
            kept.handed |= done
            await _keep(memory, what, kept)
        if ended and all(seen + overlap <= now for seen in kept.unreadable.values()):
            kept.since = max(kept.since, min([ended[-1].ended_at, *(at - _SECOND for at in open_)]))
        # A second more than is asked for again, because that is asked for in whole seconds.
        kept.handed = {id_: at for id_, at in kept.handed.items() if at >= kept.since - overlap - _SECOND}
        await _keep(memory, what, kept)
    if errors:
        raise errors[0]
    if told and not runs:
        log.warning("No run was started: no once_triggers of a deployment cover these events.")
    message = f"{told:,} jobs that have ended, {runs:,} runs" if told else "no other job has ended"
    log.info("%s: %s; what was handed over is kept in the artifact %s", what.source, message, key)
    return JobsLook(jobs=told, runs=runs, message=message)


@dataclass(frozen=True)
class _Teller:
    source: str
    vendor: AirbyteVendor
    client: PrefectClient
    ours: Mapping[JobKey, UUID | None]
    patient_from: datetime

    async def events(self, job: Job) -> list[EltEvent] | None:
        """What is told of a job; None where that is to be found out by a later look."""
        try:
            found, whole = await self.vendor.look_closely(job.id)
        except NotFoundError:
            get_run_logger().warning(
                "Airbyte job %s of connection %s is not told: its connection is gone.",
                job.id,
                job.connection_id,
            )
            return []
        if not whole and job.ended_at > self.patient_from:
            get_run_logger().info("Airbyte job %s: its details did not come; it is told later.", job.id)
            return None
        event = await ended_event(self.source, found, self.client, occurred=job.ended_at, ours=self.ours)
        return [event] if event else []


async def _keep(memory: ArtifactMemory[Remembered], what: WatchedJobs, kept: Remembered) -> None:
    text = f"### {what.source}\n\nJobs that ended up to {kept.since:%Y-%m-%d %H:%M:%S} UTC were handed over."
    await memory.write(kept, text)
