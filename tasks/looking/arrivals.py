"""New objects under an S3 prefix, by looking: each is handed over as an event once, then moved or deleted.

The order is what makes it safe to kill at any moment: first the runs are created, under the object's own
identity, and only then it is moved, deleted or remembered. A look that died in between finds the object again
and hands over the same event, which makes no second run. Where many objects are one event, the list of them
is written down before it is handed over, so that the next look finishes that list before it makes another.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from fnmatch import fnmatchcase
from typing import Annotated, Any, Literal

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.logging import get_run_logger
from prefect_aws import S3Bucket
from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema, field_serializer, model_validator

from blocks.reference import NAMED, UNSAVED, block_name
from blocks.s3 import BucketClient
from tasks.events import EltEvent, HandedOver, HandOverError, OnceTrigger, hand_over
from tasks.jobs import tag_run, without_traceback
from tasks.looking.events import HandOver, bounded
from tasks.looking.memory import ArtifactMemory, MemoryUnreadable, memory_name, owner
from tasks.looking.notices import CREATED
from tasks.s3 import S3Error, S3Object, delete_unchanged, list_objects, move_objects, open_bucket

CREATED_TOGETHER = "elt.s3.objects.created"
_SLICE = 100  # objects between two writes of the memory: what a kill can cost is to hand over these again
_TOGETHER = 256 * 1024  # bytes of JSON in one event: a run's parameters may have 512 KiB


class S3Prefix(BaseModel):
    """What is looked at, and what becomes of an object whose runs were created."""

    # pydantic's errors quote what they were given, and that may be a block with its secret.
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    bucket: Annotated[
        S3Bucket | str,
        NAMED,
        WithJsonSchema({"type": "string", "description": "Name of a saved S3 Bucket block."}),
    ] = Field(title="Bucket")
    prefix: str = Field(
        default="", title="Prefix", description="What keys begin with, below the block's folder."
    )
    pattern: str | None = Field(
        default=None,
        title="Pattern",
        description="What the rest of the key must look like: `*.csv`. A `*` also takes slashes.",
    )
    action: Literal["none", "move", "delete"] = Field(
        default="none",
        title="Action",
        description="What becomes of an object when its runs were created. `none` leaves and remembers it.",
    )
    move_to: str = Field(
        default="handled/%Y-%m-%d/%H%M%S/",
        title="Move to",
        description="Prefix for `move`, below the block's folder. `%Y` and the like are filled with when the "
        "object was written (UTC), so that tomorrow's file of the same name does not replace today's.",
    )
    together: bool = Field(
        default=False,
        title="Together",
        description=f"One event `{CREATED_TOGETHER}` for all new objects of a look, not one for each.",
    )
    since: datetime | None = Field(
        default=None,
        title="Since",
        description="Only what was written at this time or later: what lay there before starts nothing.",
    )
    settle: float = Field(
        default=0.0,
        ge=0,
        title="Settle",
        description="Seconds that an object must have rested, for writers that write a key several times.",
    )
    at_most: int = Field(
        default=1000, ge=1, le=10_000, title="At most", description="Objects in one look, oldest first."
    )

    @field_serializer("bucket")
    def _by_name(self, bucket: S3Bucket | str) -> str:
        # What is stored with a flow run must hold no secret.
        return block_name(bucket, S3Bucket) or UNSAVED

    @model_validator(mode="after")
    def _can_be_moved(self) -> S3Prefix:
        if self.action == "move" and (not self.target_head or self.prefix.startswith(self.target_head)):
            raise ValueError(
                f"move_to must begin with a prefix that is not looked at; {self.move_to!r} is where "
                f"{self.prefix!r} is"
            )
        return self

    @property
    def target_head(self) -> str:
        """The part of `move_to` that is the same for every object; nothing below it is looked at."""
        return self.move_to.split("%", 1)[0]

    @property
    def label(self) -> str:
        """What a person calls it."""
        name = self.bucket if isinstance(self.bucket, str) else self.bucket.bucket_name
        return f"{name}/{self.prefix}{self.pattern or ''}"


class Look(BaseModel):
    """What one look came to.

    Attributes:
        found: Objects that fit, new or not.
        handed_over: Objects that this look has handed over, also those that an earlier one did not finish.
        events: Events they made.
        runs: Flow runs that these events have started, by this look or by one before it.
        waiting: New objects that were left to the next look (`at_most`).
    """

    model_config = ConfigDict(frozen=True)

    found: int = 0
    handed_over: int = 0
    events: int = 0
    runs: int = 0
    waiting: int = 0

    @property
    def message(self) -> str:
        """In a sentence."""
        if not self.handed_over:
            return f"nothing new among {self.found:,} objects"
        later = f"; {self.waiting:,} wait for the next look" if self.waiting else ""
        return (
            f"{self.handed_over:,} objects handed over in {self.events:,} events, {self.runs:,} runs{later}"
        )


class Remembered(BaseModel):
    """What is kept between looks.

    Attributes:
        handed: Fingerprints of objects that are still there and were handed over (`action: none`).
        pending: The objects of an event that was about to be handed over (`together`).
    """

    handed: list[str] = []
    pending: list[S3Object] = []


def fingerprint(found: S3Object) -> str:
    """An object as it is now, in 16 characters. Written anew it has another, also with the same content."""
    said = f"{found.key}\n{found.etag}\n{found.last_modified.isoformat()}"
    return hashlib.sha256(said.encode()).hexdigest()[:16]


class Looker:
    """Looks at one prefix.

    Args:
        what: The prefix.
        client: Its bucket.
        memory: What earlier looks have kept.
        hand: Hands events over.
    """

    def __init__(
        self, what: S3Prefix, client: BucketClient, memory: ArtifactMemory[Remembered], hand: HandOver
    ) -> None:
        self._what = what
        self._client = client
        self._memory = memory
        self._hand = hand
        self._prefix = client.full(what.prefix)
        self._events = self._runs = self._done = 0

    async def look(self) -> Look:
        """Hand over what is new.

        Raises:
            S3Error: The store refused something. What was handed over and not moved is found again.
            HandOverError: The Prefect server did not take everything; the rest is left to the next look.
            MemoryUnreadable: What earlier looks have kept can't be read.
        """
        kept = await self._memory.read() or Remembered()
        if kept.pending:
            get_run_logger().warning(
                "An earlier look did not finish the %s objects of one event; they come first.",
                len(kept.pending),
            )
            await self._together(kept, kept.pending)
        there = await list_objects(self._client, self._prefix)
        fitting = [found for found in there if self._fits(found)]
        handed = set(kept.handed)
        if self._what.action == "none":
            # What is gone need not be remembered.
            kept.handed = [mark for found in there if (mark := fingerprint(found)) in handed]
            handed = set(kept.handed)
        new = [found for found in fitting if fingerprint(found) not in handed]
        new.sort(key=lambda found: (found.last_modified, found.key))
        chosen, waiting = new[: self._what.at_most], len(new[self._what.at_most :])
        if self._what.together:
            for part in _parts(chosen, self._what):
                await self._together(kept, part)
        else:
            for begin in range(0, len(chosen), _SLICE):
                await self._each(kept, chosen[begin : begin + _SLICE])
        return Look(
            found=len(fitting), handed_over=self._done, events=self._events, runs=self._runs, waiting=waiting
        )

    def _fits(self, found: S3Object) -> bool:
        what = self._what
        rest = found.key[len(self._prefix) :]
        return (
            "\0" not in found.key  # no event can carry it
            and not (what.action == "move" and found.key.startswith(self._client.full(what.target_head)))
            and (what.pattern is None or fnmatchcase(rest, what.pattern))
            and (what.since is None or found.last_modified >= _aware(what.since))
            and (not what.settle or datetime.now(UTC) - found.last_modified >= timedelta(seconds=what.settle))
        )

    async def _each(self, kept: Remembered, objects: Sequence[S3Object]) -> None:
        taken = await self._hand([self._event(found) for found in objects])
        await self._after(kept, objects, taken)

    async def _together(self, kept: Remembered, objects: Sequence[S3Object]) -> None:
        kept.pending = list(objects)
        await self._keep(kept)
        taken = await self._hand([self._event_of_all(objects)])
        kept.pending = []
        await self._after(kept, objects, taken, keep=True)

    async def _after(
        self,
        kept: Remembered,
        objects: Sequence[S3Object],
        taken: Sequence[HandedOver],
        *,
        keep: bool = False,
    ) -> None:
        self._done += len(objects)
        self._events += len(taken)
        self._runs += sum(len(event.runs) for event in taken)
        if self._what.action != "none":
            await self._away(objects)
        else:
            kept.handed += [fingerprint(found) for found in objects]
            keep = True
        if keep:
            await self._keep(kept)

    async def _away(self, objects: Sequence[S3Object]) -> None:
        """Move or delete; what was written anew meanwhile stays, for the next look."""
        try:
            if self._what.action == "delete":
                await delete_unchanged(self._client, objects)
            else:
                await move_objects(
                    self._client, self._client, [(found, self._new_key(found)) for found in objects]
                )
        except S3Error:
            there = {fingerprint(found) for found in await list_objects(self._client, self._prefix)}
            if any(fingerprint(found) in there for found in objects):
                raise
            get_run_logger().info("Some were written anew or taken away meanwhile, and were left.")

    def _new_key(self, found: S3Object) -> str:
        # Below the last slash of the prefix, which may be the beginning of a file's name.
        below = found.key[self._prefix.rfind("/") + 1 :]
        return self._client.full(found.last_modified.astimezone(UTC).strftime(self._what.move_to)) + below

    async def _keep(self, kept: Remembered) -> None:
        text = f"### {self._what.label}\n\n{len(kept.handed):,} objects that are there were handed over."
        if kept.pending:
            text += f" {len(kept.pending):,} are being handed over as one event."
        await self._memory.write(kept, text)

    def _shown(self, found: S3Object) -> dict[str, Any]:
        shown = {
            "bucket": found.bucket,
            "key": found.key,
            "uri": found.uri,
            "size": found.size,
            "etag": found.etag,
            "last_modified": found.last_modified.astimezone(UTC).isoformat(),
        }
        if self._what.action == "move":
            key = self._new_key(found)
            shown["moved_to"] = {"bucket": found.bucket, "key": key, "uri": f"s3://{found.bucket}/{key}"}
        return shown

    def _event(self, found: S3Object) -> EltEvent:
        return EltEvent(
            name=CREATED,
            # With the time: a file that comes every day with the same content has the same etag every day.
            key=bounded(f"s3:{found.bucket}/{found.key}@{found.etag}/{found.last_modified.isoformat()}"),
            occurred=found.last_modified,
            resource_id=bounded(f"elt.s3.object.{found.bucket}/{found.key}"),
            resource_name=found.uri,
            payload=self._shown(found),
        )

    def _event_of_all(self, objects: Sequence[S3Object]) -> EltEvent:
        marks = "".join(sorted(fingerprint(found) for found in objects))
        where = f"{self._client.name}/{self._prefix}"
        return EltEvent(
            name=CREATED_TOGETHER,
            key=bounded(f"s3:{where}@{hashlib.sha256(marks.encode()).hexdigest()}"),
            occurred=max(found.last_modified for found in objects),
            resource_id=bounded(f"elt.s3.prefix.{where}"),
            resource_name=f"s3://{where}",
            payload={
                "bucket": self._client.name,
                "prefix": self._prefix,
                "count": len(objects),
                "objects": [self._shown(found) for found in objects],
            },
        )


def _parts(objects: Sequence[S3Object], what: S3Prefix) -> list[list[S3Object]]:
    """So many objects as one event can hold."""
    parts: list[list[S3Object]] = []
    room = 0
    for found in objects:
        # Of one byte of a key JSON may make six; the key is there twice, and twice more if it is moved.
        size = 300 + len(found.key.encode()) * (5 if what.action == "move" else 3)
        if room < size:
            parts.append([])
            room = _TOGETHER
        parts[-1].append(found)
        room -= size
    return parts


def _aware(since: datetime) -> datetime:
    return since if since.tzinfo else since.replace(tzinfo=UTC)


@task(name="s3-arrivals", task_run_name="look at s3", cache_policy=NO_CACHE)
async def look_at_prefix(what: S3Prefix, triggers: Sequence[OnceTrigger]) -> Look:
    """Hand over every object that is new under a prefix, then do to it what `action` says.

    Args:
        what: The prefix.
        triggers: Which deployments are started by an object.

    Returns:
        What came of it.

    Raises:
        S3Error: There is no such bucket, the credentials may not list it, move or delete in it, and the like.
        HandOverError: The Prefect server did not take everything. The next look goes on.
        MemoryUnreadable: What earlier looks have kept can't be read.
        BlockNotFound: The bucket is the name of a block that is not saved.
    """
    tag_run("s3")
    without_traceback(S3Error, HandOverError, MemoryUnreadable)
    bucket = await open_bucket(what.bucket)
    async with get_client() as client:

        async def hand(events: Sequence[EltEvent]) -> list[HandedOver]:
            return await hand_over(events, triggers, client)

        where = f"{bucket.name}/{bucket.full(what.prefix)}"
        key = memory_name("s3-arrivals", where, owner())
        memory = ArtifactMemory(client, key, Remembered)
        look = await Looker(what, bucket, memory, hand).look()
    if look.events and not look.runs:
        get_run_logger().warning("No run was started: no once_triggers of a deployment cover these events.")
    get_run_logger().info("%s: %s", what.label, look.message)
    return look
