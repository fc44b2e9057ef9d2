"""Airbyte's jobs that have ended, by looking at its own list: what no notification told.

Airbyte tells of a job once and keeps nothing, so a receiver that was away has missed it. A look asks which
jobs have changed since the last one, and hands over the same events that the receiver would have: one that
has come both ways starts its runs once. A cancelled job, of which there is no notification, is told, too.

What was handed over is written down after that. A look that died in between hands over the same events
again, which start nothing twice.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Annotated

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import PrefectClient, get_client
from prefect.logging import get_run_logger
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from blocks.airbyte_model import Job
from blocks.errors import NotFoundError
from blocks.receiver import AirbyteWebhook
from blocks.reference import NAMED, NamesBlock, load_block
from tasks.airbyte_ended import ended_event
from tasks.airbyte_jobs import AirbyteVendor
from tasks.events import EltEvent, HandOverError, OnceTrigger, hand_over
from tasks.jobs import tag_run, without_traceback
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
        "lists late.",
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
        since: The end of the last job that was handed over.
        handed: Jobs that were, with their ends: those of the overlap.
    """

    began: datetime
    since: datetime
    handed: dict[str, datetime] = {}


@task(name="airbyte-ended", task_run_name="look at {what.webhook}", cache_policy=NO_CACHE)
async def look_at_jobs(what: WatchedJobs, triggers: Sequence[OnceTrigger]) -> JobsLook:
    """Hand over every job that has ended since the last look, as the receiver does.

    Args:
        what: Whose jobs.
        triggers: Which deployments are started by them.

    Returns:
        What came of it.

    Raises:
        VendorError: Airbyte can't be asked. What was handed over until then is not again.
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
        changed = await api.jobs_changed((kept.since if kept else what.since or now) - overlap)
        if kept is None:
            # After the list, whose reply shows what Airbyte's clock says.
            began = what.since or api.theirs(now).replace(microsecond=0) - 2 * _SECOND
            kept = Remembered(began=began, since=began)
        ended = sorted((job for job in changed if job.ended), key=lambda job: job.ended_at)
        new = [job for job in ended if job.ended_at >= kept.began and job.id not in kept.handed]
        vendor, runs = AirbyteVendor(block.server), 0
        for first in range(0, len(new), _SLICE):
            some = new[first : first + _SLICE]
            events = await asyncio.gather(*(_event(what.source, vendor, job, client) for job in some))
            taken = await hand_over([event for event in events if event], triggers, client)
            runs += sum(len(one.runs) for one in taken)
            kept.handed |= {job.id: job.ended_at for job in some}
            await _keep(memory, what, kept)
        if ended and (last := ended[-1].ended_at) > kept.since:
            kept.since = last
        # A second more than is asked for again, because that is asked for in whole seconds.
        kept.handed = {id_: at for id_, at in kept.handed.items() if at >= kept.since - overlap - _SECOND}
        await _keep(memory, what, kept)
    if new and not runs:
        log.warning("No run was started: no once_triggers of a deployment cover these events.")
    message = f"{len(new):,} jobs that have ended, {runs:,} runs" if new else "no other job has ended"
    log.info("%s: %s; what was handed over is kept in the artifact %s", what.source, message, key)
    return JobsLook(jobs=len(new), runs=runs, message=message)


async def _event(source: str, vendor: AirbyteVendor, job: Job, client: PrefectClient) -> EltEvent | None:
    try:
        found = await vendor.look_up(job.id)
    except NotFoundError:
        # To fail over it would hide every later job.
        get_run_logger().warning(
            "Airbyte job %s of connection %s is not told: its connection is gone.", job.id, job.connection_id
        )
        return None
    return await ended_event(source, found, client, occurred=job.ended_at)


async def _keep(memory: ArtifactMemory[Remembered], what: WatchedJobs, kept: Remembered) -> None:
    text = f"### {what.source}\n\nJobs that ended up to {kept.since:%Y-%m-%d %H:%M:%S} UTC were handed over."
    await memory.write(kept, text)
