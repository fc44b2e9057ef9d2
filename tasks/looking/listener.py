"""What every long-running listener has in common: hand over, only then acknowledge, and wait out bad times.

A source supplies what differs: how it is reached, what came, and how it is told that something was taken.
That a message is acknowledged only when `hand_over` has returned, that nothing is lost while the Prefect
server or the source is away, and that SIGTERM lets what is in hand be finished, is written here, once.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import httpx
from prefect.blocks.core import Block
from pydantic import BaseModel, ConfigDict, Field

from blocks.reference import BlockError, load_block
from tasks.events import EltEvent, HandedOver, HandOverError
from tasks.looking.events import HandOver

log = logging.getLogger("elt.listen")
BlockT = TypeVar("BlockT", bound=Block)


class ListenError(Exception):
    """A listener can't begin as it is configured. The message is for people and holds no secret."""


class SourceAway(Exception):
    """The source can't be reached, or fails on its own side. It is tried again."""


class ListenerSettings(BaseModel):
    """What a listener of any kind is told."""

    # pydantic's errors quote what they were given, and that may be a secret in a wrong place.
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$", description="What it is called in logs and events.")
    enabled: bool = Field(default=True, description="Whether `make listen` starts it.")


@dataclass
class Batch:
    """What came at once.

    Attributes:
        events: What it means.
        receipt: What the source needs to acknowledge it.
    """

    events: list[EltEvent] = field(default_factory=list)
    receipt: Any = None


class Source(Protocol):
    """Something to listen to."""

    @property
    def label(self) -> str:
        """What logs call it."""

    async def connect(self) -> None:
        """Make ready, again after `SourceAway`.

        Raises:
            ListenError: It is configured wrongly, or may not be used so.
            SourceAway: It is away.
        """

    async def next(self) -> Batch | None:
        """What comes within some seconds; None if nothing does.

        Raises:
            SourceAway: It is away.
        """

    async def keep(self, batch: Batch) -> None:
        """Hold what is in hand while handing over takes long; cancelled when that has ended."""

    async def done(self, batch: Batch) -> None:
        """Acknowledge: all of it was handed over.

        Raises:
            SourceAway: It can't be told. The same comes again, and makes nothing twice.
        """

    async def release(self, batch: Batch) -> None:
        """Give back what was not handed over."""

    async def close(self) -> None:
        """Let go of it."""


@dataclass
class BackOff:
    """Seconds between attempts: doubled from one to the next, with jitter, up to a limit."""

    first: float = 1.0
    most: float = 60.0
    attempts: int = 0

    def seconds(self) -> float:
        """The next wait."""
        self.attempts += 1
        wait = min(self.most, self.first * float(2 ** min(self.attempts - 1, 10)))
        return wait * random.uniform(0.5, 1.0)  # noqa: S311 - so that many do not come at once

    def reset(self) -> None:
        """It went well."""
        self.attempts = 0


async def stopped_within(stop: asyncio.Event, seconds: float) -> bool:
    """Wait, but not longer than until it is to stop; whether it is."""
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(stop.wait(), seconds)
    return stop.is_set()


async def saved_block(kind: type[BlockT], name: str) -> BlockT:
    """A saved block.

    Raises:
        ListenError: There is none of this name, or it is not filled in as it must be.
        SourceAway: The Prefect server can't be asked.
    """
    try:
        return await load_block(kind, name)
    except BlockError as error:
        raise ListenError(str(error)) from None
    except (httpx.HTTPError, RuntimeError) as error:  # the latter is Prefect's of an API that is away
        raise SourceAway(f"the Prefect server can't be asked for a block ({type(error).__name__}).") from None


async def listen(
    source: Source, hand: HandOver, stop: asyncio.Event, *, back_off: BackOff | None = None
) -> None:
    """Listen until `stop` is set.

    Args:
        source: What to listen to.
        hand: Hands events over to the Prefect server.
        stop: Set from outside; what is in hand is finished.
        back_off: How long to wait when the source or the server is away.

    Raises:
        ListenError: The source could not even be begun with. Later, when it worked once, everything is waited
            out.
    """
    back_off = back_off or BackOff()
    worked = connected = told = False
    try:
        while not stop.is_set():
            try:
                if not connected:
                    await source.connect()
                    log.info("%s: listening", source.label)
                    worked, connected = True, True
                batch = await source.next()
                back_off.reset()
                told = False
                if batch is not None:
                    await _take(source, batch, hand, stop, back_off)
            except ListenError as error:
                if not worked:
                    raise
                trouble = str(error)
            except SourceAway as error:
                trouble = str(error)
            else:
                continue
            connected = False
            wait = back_off.seconds()
            if not told:
                log.warning("%s: %s Trying again, after %.0f s at first.", source.label, trouble, wait)
                told = True
            await stopped_within(stop, wait)
    finally:
        await source.close()
    log.info("%s: stopped", source.label)


async def _take(source: Source, batch: Batch, hand: HandOver, stop: asyncio.Event, back_off: BackOff) -> None:
    """Hand a batch over, however long that takes, and acknowledge it."""
    taken: Sequence[HandedOver] = []
    if batch.events:
        async with _kept(source, batch):
            while True:
                try:
                    taken = await hand(batch.events)
                except HandOverError as error:
                    if not back_off.attempts:
                        log.warning(
                            "%s: %s. Nothing is acknowledged; trying again.",
                            source.label,
                            str(error).rstrip("."),
                        )
                    if await stopped_within(stop, back_off.seconds()):
                        log.warning("%s: stopped before %s", source.label, _labels(batch))
                        with contextlib.suppress(SourceAway):  # it comes again by itself, only later
                            await source.release(batch)
                        return
                else:
                    break
        back_off.reset()
    await source.done(batch)
    for event, outcome in zip(batch.events, taken, strict=True):
        runs = ", ".join(f"{run.deployment} {run.name}" for run in outcome.runs) or "no run"
        failed = f"; failed: {', '.join(outcome.failed)}" if outcome.failed else ""
        log.info("%s: %s → %s%s", source.label, event.label, runs, failed)


@contextlib.asynccontextmanager
async def _kept(source: Source, batch: Batch) -> AsyncIterator[None]:
    keeping = asyncio.create_task(source.keep(batch))
    try:
        yield
    finally:
        keeping.cancel()
        # Whatever it met: the batch was handed over or was not, and is acknowledged or comes again.
        (outcome,) = await asyncio.gather(keeping, return_exceptions=True)
        if isinstance(outcome, Exception):
            log.warning("%s: %s", source.label, outcome)


def _labels(batch: Batch) -> str:
    more = f" and {len(batch.events) - 1} more" if len(batch.events) > 1 else ""
    return f"{batch.events[0].label}{more}, which was not handed over"
