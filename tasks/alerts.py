"""Telling people: what every way of telling has in common.

An alert must not fail the run that it is about, nor hold it up: whatever goes wrong is said in the log, and
after `PATIENCE` seconds the run goes on. What could not be told is told by the next run.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import defaultdict
from collections.abc import Iterable, Sequence
from contextlib import AsyncExitStack
from typing import Any, Protocol

from prefect import task
from prefect.blocks.core import Block
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.events import emit_event
from prefect.logging import get_run_logger
from prefect.runtime import task_run
from prefect.states import Completed
from pydantic import Field

from blocks.http import VendorError
from blocks.logs import Log
from blocks.reference import BlockError, BlockNotFound, block_name, load_block
from tasks.incidents import SEVERAL, Alarm, Bulletin, Change, Happened, compare
from tasks.jobs import ToolParameters, without_traceback
from tasks.memory import Memory, variable_memory

PATIENCE = 20.0
"""Seconds for which a run waits for all that it has to tell, one way of telling beside the other."""

UNDELIVERED = "elt.alert.undelivered"
"""Event of an alert that did not reach whom it was for."""

_NAMED = 10  # alarms in that event
_TO_REMEMBER = 4.0  # of them, seconds for reading what is open, and as many for writing it down


class Notifier(Protocol):
    """What differs from one way of telling to another.

    Attributes:
        title: What the log calls it.
        route: What makes it another than the notifier beside it; its incidents are remembered under it.
        summary_to: Where a run without failures is summed up; None: nowhere.
    """

    title: str
    route: str
    summary_to: str | None

    def to(self, owner: str | None) -> str:
        """Where an owner is told, in one word that can be remembered."""

    async def gone(self, to: str) -> bool:
        """Whether nothing can be told there any more, because its block is not saved now."""

    def wants(self, alarm: Alarm) -> bool:
        """Whether it is to be told at all."""

    async def deliver(self, to: str, changes: Sequence[Change], bulletin: Bulletin, patience: float) -> None:
        """Tell, and mark each change as done or say what its problem is.

        Args:
            to: Where, as `to` said it in this run or an earlier one.
            changes: What; all of one run for this place. Empty where it is only to be summed up.
            bulletin: What the run has to say.
            patience: Seconds.

        Raises:
            VendorError, BlockError: The problem of all changes that are not marked.
        """


class NotifyParameters(ToolParameters):
    """Who is told of what went wrong, and that it is well again."""

    pipeline: str = Field(
        default="",
        title="Pipeline",
        description="What incidents are kept under; by default the deployment, or the flow. Deployments with "
        "the same name here share their incidents: a load by hand ends what the nightly one opened.",
    )
    several: int = Field(
        default=SEVERAL,
        ge=1,
        title="Several",
        description="More new failures than this at once, for one owner, are told as one.",
    )

    async def check(self) -> None:
        """See that the blocks that it names are saved.

        Raises:
            BlockNotFound: One is not.
        """
        raise NotImplementedError

    def notifier(self) -> Notifier:
        """How it tells."""
        raise NotImplementedError


@task(name="notify-check", task_run_name="check whom to tell", cache_policy=NO_CACHE)
async def notify_check(notify: Sequence[NotifyParameters]) -> None:
    """See that every block for alerts that is named is saved, before anything is started.

    Raises:
        BlockNotFound: One is not.
    """
    without_traceback()
    await asyncio.gather(*(one.check() for one in notify))


def _run_name() -> str:
    notify = task_run.get_parameters().get("notify")
    return f"tell {notify.notifier().title if isinstance(notify, NotifyParameters) else ''}"


@task(name="tell", task_run_name=_run_name, tags=["alerts"], cache_policy=NO_CACHE)
async def tell(notify: NotifyParameters, bulletin: Bulletin) -> State[Any]:
    """Tell one team what a run has to say. Never fails, and never takes longer than `PATIENCE`.

    Args:
        notify: Who is told, and how.
        bulletin: What.

    Returns:
        Completed; under the name `Undelivered` where something could not be told. The log says what and why.
    """
    if await announce(notify, bulletin, get_run_logger()):
        return Completed(message="All was told, or there was nothing to tell.")
    return Completed(name="Undelivered", message="Not all could be told; the log says why.")


async def announce(notify: NotifyParameters, bulletin: Bulletin, log: Log) -> bool:
    """`tell` without a task run, for hooks. What can't be told is an event, by which the server tells of it.

    Returns:
        Whether all was told that was to be.
    """
    if notify.pipeline:
        bulletin = bulletin.under(notify.pipeline)
    notifier = notify.notifier()
    told = await _announced(notifier, notify.several, bulletin, log)
    if not told:
        _emit_undelivered(notifier, bulletin)
    return told


async def _announced(notifier: Notifier, several: int, bulletin: Bulletin, log: Log) -> bool:
    try:
        async with asyncio.timeout(PATIENCE), AsyncExitStack() as stack:
            return await _Round(notifier, bulletin, log, several).run(stack)
    except TimeoutError:
        log.warning("%s: not all was told within %.0f s, and the run goes on", notifier.title, PATIENCE)
    except Exception as error:  # noqa: BLE001 - whatever it is, it must not fail the run; it may hold a URL
        log.warning("%s was not told: %s", notifier.title, _words(error))
    return False


def _emit_undelivered(notifier: Notifier, bulletin: Bulletin) -> None:
    emit_event(
        UNDELIVERED,
        resource={
            "prefect.resource.id": f"elt.alerts.{notifier.route}",
            "prefect.resource.name": notifier.route,
        },
        payload={
            "pipeline": bulletin.pipeline,
            "run": bulletin.run,
            "run_id": bulletin.run_id,
            "run_url": bulletin.run_url,
            "alarms": [f"{alarm.title} {alarm.what}" for alarm in bulletin.alarms[:_NAMED]],
        },
    )


class _Round:
    """One notifier, told of one run."""

    def __init__(self, notifier: Notifier, bulletin: Bulletin, log: Log, several: int) -> None:
        self._notifier = notifier
        self._bulletin = bulletin
        self._log = log
        self._several = several
        self._memory: Memory | None = None
        self._deadline = asyncio.get_running_loop().time() + PATIENCE - _TO_REMEMBER

    async def run(self, stack: AsyncExitStack) -> bool:
        changes = await self._ours(await self._compare(stack))
        await self._follow(changes)
        by_place: defaultdict[str, list[Change]] = defaultdict(list)
        for change in changes:
            if change.happened is not Happened.SHRUNK:
                by_place[change.incident.to].append(change)
        summary_to = self._notifier.summary_to
        if summary_to is not None and not self._bulletin.alarms:
            by_place.setdefault(summary_to, [])
        told = await asyncio.gather(*(self._deliver(to, found) for to, found in by_place.items()))
        await self._remember(changes)
        self._say(changes)
        return all(told)

    async def _compare(self, stack: AsyncExitStack) -> list[Change]:
        notifier, bulletin = self._notifier, self._bulletin
        open_ = []
        try:
            async with asyncio.timeout(_TO_REMEMBER):
                memory = await stack.enter_async_context(variable_memory(bulletin.pipeline, notifier.route))
                open_ = await memory.read()
            self._memory = memory
        except Exception as error:  # noqa: BLE001 - Prefect's API is away: better told twice than not at all
            self._log.warning(
                "%s: which incidents are open could not be read (%s); what is told may have been told "
                "before, and what is well again is left to the next run",
                notifier.title,
                _words(error),
            )
        return compare(open_, bulletin, to=notifier.to, wanted=notifier.wants, several=self._several)

    async def _ours(self, changes: Sequence[Change]) -> list[Change]:
        """The changes that no other run has taken on."""
        if self._memory is None:
            return list(changes)
        taken = await asyncio.gather(*(self._take(change, self._memory) for change in changes))
        return [change for change, ours in zip(changes, taken, strict=True) if ours]

    async def _follow(self, changes: Sequence[Change]) -> None:
        """Have an incident whose place is gone told where its owner is told now.

        Else a block that is renamed while an incident is open would leave it open for ever, untold.
        """
        moved = [c for c in changes if c.incident.to != self._notifier.to(c.incident.owner)]
        try:
            async with asyncio.timeout(_TO_REMEMBER):
                gone = {to for to in {c.incident.to for c in moved} if await self._notifier.gone(to)}
        except Exception as error:  # noqa: BLE001 - where it was told before it is tried, and said what is wrong
            self._log.debug("%s: %s", self._notifier.title, _words(error))
            return
        for change in moved:
            if change.incident.to in gone:
                to = self._notifier.to(change.incident.owner)
                # As if it had not been told lately: where it is told now nobody has heard of it.
                change.incident = change.incident.model_copy(update={"to": to, "told_at": None})

    async def _take(self, change: Change, memory: Memory) -> bool:
        opens = change.happened is Happened.OPENED and not change.known
        if not (opens or change.ends):
            return True
        try:
            async with asyncio.timeout(_TO_REMEMBER):
                return await (memory.open(change.incident) if opens else memory.claim_end(change.incident))
        except Exception as error:  # noqa: BLE001 - a beginning is better told twice, an end can wait
            title, what = self._notifier.title, change.incident.title
            self._log.warning("%s: %s could not be kept: %s", title, what, _words(error))
            return opens

    async def _deliver(self, to: str, changes: Sequence[Change]) -> bool:
        problem = "no answer in time"
        try:
            patience = max(0.1, self._deadline - asyncio.get_running_loop().time())
            async with asyncio.timeout(patience):
                await self._notifier.deliver(to, changes, self._bulletin, patience * 0.9)
        except Exception as error:  # noqa: BLE001 - the other places are to be told all the same
            problem = _words(error) or problem
            if not changes:
                self._log.warning(
                    "%s (%s) was not told how the run went: %s", self._notifier.title, to, problem
                )
                return False
        for change in changes:
            if change.told is None and change.problem is None:
                change.problem = problem
        return all(change.told is not None for change in changes)

    async def _remember(self, changes: Sequence[Change]) -> None:
        if self._memory is None:
            return
        kept = (self._keep(change, self._memory) for change in changes)
        for failed in await asyncio.gather(*kept, return_exceptions=True):
            if isinstance(failed, BaseException):
                self._log.warning(
                    "%s: an incident could not be kept: %s", self._notifier.title, _words(failed)
                )

    async def _keep(self, change: Change, memory: Memory) -> None:
        incident = change.incident
        if change.happened is Happened.SHRUNK:
            await memory.keep(incident)
        elif change.ends:
            await (memory.release_end(incident) if change.told is None else memory.close(incident))
        elif change.told is not None:
            await memory.keep(incident.model_copy(update={"told": change.told, "undelivered": False}))
        else:
            await memory.keep(incident.model_copy(update={"undelivered": True}))

    def _say(self, changes: Iterable[Change]) -> None:
        """Name what could not be told, one line for each reason."""
        problems: defaultdict[str, list[str]] = defaultdict(list)
        for change in changes:
            if change.problem and change.told is None:
                problems[change.problem].append(
                    f"{change.incident.title} ({change.happened.lower()}, to {change.incident.to})"
                )
        for problem, titles in problems.items():
            self._log.warning(
                "%s was not told of %s: %s. The next run tries again.",
                self._notifier.title,
                ", ".join(titles),
                problem.rstrip("."),
            )


def _words(error: BaseException) -> str:
    """An error as it may stand in a log: of what is not ours only the kind, for its text may hold a URL."""
    if isinstance(error, VendorError | BlockError):
        return str(error)
    return "no answer in time" if isinstance(error, TimeoutError) else type(error).__name__


async def is_gone(kind: type[Block], name: str) -> bool:
    """Whether no block of this name is saved.

    Raises:
        BlockUnusable: One is, and not filled in as it must be.
    """
    try:
        await load_block(kind, name)
    except BlockNotFound:
        return True
    return False


def place(block: Block | str, kind: type[Block], secret: str) -> str:
    """A word for where a block leads that can be remembered: its name, or a digest where it has none."""
    name = block_name(block, kind)
    if name:
        return name.split("/", 1)[1]
    return f"unsaved-{hashlib.sha256(secret.encode()).hexdigest()[:8]}"
