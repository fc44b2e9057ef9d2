"""A slot of a Prefect global concurrency limit, held for as long as a vendor's job of ours runs.

For an account that bears only so many jobs at a time, whoever starts them: the limit is kept by the Prefect
server, over all flow runs and machines. A slot is a lease that is renewed while the job is watched. It is
written into the journal with the intent, so that an attempt which attaches to the job of a dead one goes on
with its slot; of a run that never comes back the server takes the slot when the lease has ended.

Prefect's own `concurrency()` can't do that: it knows only its own process, and takes a thread for each slot.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from uuid import UUID
from weakref import WeakKeyDictionary

import httpx
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import ConcurrencyLeaseHolder
from prefect.client.schemas.responses import ConcurrencyLimitWithLeaseResponse
from prefect.context import TaskRunContext
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError

from blocks.logs import Log
from tasks.jobs.model import InputError

LEASE = 300.0
"""Seconds for which a slot stays taken after a sign of life: time to notice a dead run and start it again."""

_RENEW = 60.0  # seconds
_RETRY = 10.0  # seconds between two tries while the server is away
_LONGEST_WAIT = 10.0  # seconds between two tries to get a slot; the server would have up to 30

_queues: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[str, asyncio.Lock]] = WeakKeyDictionary()


class NoSlot(Exception):
    """No slot became free in time."""


class _Gone(Exception):
    """The server knows no such lease any more."""


class Slot:
    """A slot of one limit, or none where no limit is named.

    Args:
        limit: The name of the limit.
        log: Where waiting and losing it are told.
    """

    def __init__(self, limit: str | None, log: Log) -> None:
        self._limit = limit
        self._log = log
        self._keeper: asyncio.Task[None] | None = None
        self.lease: UUID | None = None

    async def take(self, within: float, lease: UUID | None = None) -> None:
        """Wait for a slot.

        Args:
            within: Seconds to wait.
            lease: The slot of an earlier attempt: if it is still ours, there is nothing to wait for.

        Raises:
            InputError: There is no such limit, or it lets nothing run.
            NoSlot: None became free.
        """
        if self._limit is None or self.lease is not None:
            return
        try:
            async with asyncio.timeout(within):
                if not await self._again(lease):
                    await self._wait(self._limit)
        except TimeoutError:
            raise NoSlot(
                f"no slot of the concurrency limit {self._limit} became free in {within:g} s"
            ) from None
        self._keep()

    async def go_on(self, lease: UUID | None) -> None:
        """Go on with the slot of an earlier attempt, or get another one while the job is watched already."""
        if self._limit is None or self.lease is not None:
            return
        await self._again(lease)
        self._keep()

    async def release(self) -> None:
        """Give the slot back."""
        await self.leave()
        if self.lease is None:
            return
        lease, self.lease = self.lease, None
        await self._give_back(lease)

    async def _give_back(self, lease: UUID) -> None:
        try:
            async with get_client() as client:
                await client.release_concurrency_slots_with_lease(lease)
        except (PrefectHTTPStatusError, httpx.TransportError) as error:
            self._log.warning(
                "the slot of the limit %s is not given back; it ends by itself: %s", self._limit, error
            )

    async def leave(self) -> None:
        """Stop renewing it, and leave it to the next attempt until the lease ends."""
        if self._keeper is not None:
            self._keeper.cancel()
            with suppress(asyncio.CancelledError):
                await self._keeper
            self._keeper = None

    async def _again(self, lease: UUID | None) -> bool:
        """Whether the slot of an earlier attempt is still ours."""
        if lease is not None:
            with suppress(_Gone, PrefectHTTPStatusError, httpx.TransportError):
                await _renew(lease)
                self.lease = lease
        return self.lease is not None

    def _keep(self) -> None:
        self._keeper = asyncio.create_task(self._kept())

    async def _kept(self) -> None:
        """Renew the slot; get one first where the job runs without."""
        while True:
            if self.lease is None:
                assert self._limit is not None  # noqa: S101 - for the type checker
                try:
                    await self._wait(self._limit)
                except InputError as error:
                    self._log.warning("the job is watched without a slot: %s", error)
                    return
            await asyncio.sleep(_RENEW)
            try:
                if self.lease is not None:
                    await _renew(self.lease)
            except _Gone:
                # A server that has lost its leases in a restart counts the slot for ever: a second one
                # would make that two.
                self.lease = None
                self._log.warning("the slot of the limit %s was lost; the job goes on", self._limit)
                return
            except (PrefectHTTPStatusError, httpx.TransportError) as error:
                self._log.debug("the slot of the limit %s can't be renewed now: %s", self._limit, error)

    async def _wait(self, limit: str) -> None:
        """Ask until there is a slot; of all who wait in this process one asks for all, in their order."""
        began = time.monotonic()
        async with _queues.setdefault(asyncio.get_running_loop(), {}).setdefault(limit, asyncio.Lock()):
            said = False
            while (wait := await self._ask(limit)) is not None:
                if not said:
                    self._log.info("waiting for a slot of the concurrency limit %s", limit)
                    said = True
                await asyncio.sleep(wait)
        if time.monotonic() - began > 1:
            self._log.info("got a slot of %s after %.0f s", limit, time.monotonic() - began)

    async def _ask(self, limit: str) -> float | None:
        """Take a slot if there is one; else the seconds after which to ask again."""
        # Cut off in the middle, a slot might be ours without our knowing it, until its lease ends.
        asking = asyncio.create_task(_acquire(limit))
        try:
            reply = await asyncio.shield(asking)
        except asyncio.CancelledError:
            with suppress(InputError):  # of a limit that nobody waits for any more
                if isinstance(got := await asking, UUID):
                    await self._give_back(got)
            raise
        if isinstance(reply, UUID):
            self.lease = reply
            return None
        return reply


async def check_limit(name: str) -> None:
    """See that a limit is there.

    Raises:
        InputError: It is not, or lets nothing run. Nothing was started.
    """
    async with get_client() as client:
        try:
            limit = await client.read_global_concurrency_limit_by_name(name)
        except ObjectNotFound:
            raise InputError(_missing(name)) from None
    if limit.active and limit.limit < 1:
        raise InputError(f"The concurrency limit {name} is 0: no job can run. Nothing was started.")


async def _acquire(name: str) -> UUID | float:
    """A slot's lease, or the seconds after which to ask again.

    Raises:
        InputError: There is no such limit, or it lets nothing run.
    """
    try:
        async with get_client() as client:
            reply = await client.increment_concurrency_slots_with_lease(
                [name], slots=1, mode="concurrency", lease_duration=LEASE, holder=_holder()
            )
    except PrefectHTTPStatusError as error:
        if (wait := ask_again_after(error)) is not None:
            return wait
        if error.response.status_code == httpx.codes.UNPROCESSABLE_ENTITY:
            raise InputError(f"The concurrency limit {name} is 0: no job can run.") from None
        return _RETRY
    except httpx.TransportError:
        return _RETRY
    found = ConcurrencyLimitWithLeaseResponse.model_validate_json(reply.content)
    if not found.limits:  # Prefect lets what it does not know pass
        raise InputError(_missing(name))
    return found.lease_id


async def _renew(lease: UUID) -> None:
    try:
        async with get_client() as client:
            await client.renew_concurrency_lease(lease, lease_duration=LEASE)
    except PrefectHTTPStatusError as error:
        if lease_is_gone(error):
            raise _Gone from None
        raise


def ask_again_after(error: PrefectHTTPStatusError) -> float | None:
    """Seconds after which to ask for slots again; None if it was not refused because none is free."""
    if error.response.status_code != httpx.codes.LOCKED:
        return None
    return min(float(error.response.headers.get("Retry-After", 1)), _LONGEST_WAIT)


def lease_is_gone(error: PrefectHTTPStatusError) -> bool:
    """Whether a lease was not renewed because it has ended or was given back."""
    return error.response.status_code in (httpx.codes.GONE, httpx.codes.NOT_FOUND)


def _holder() -> ConcurrencyLeaseHolder | None:
    """Who holds it, for whoever looks at the limit."""
    context = TaskRunContext.get()
    return ConcurrencyLeaseHolder(type="task_run", id=context.task_run.id) if context else None


def _missing(name: str) -> str:
    return (
        f"There is no concurrency limit {name!r} on the Prefect server. Put it under concurrency_limits in "
        f"deployments/environments.yaml and `make deploy`, or `prefect gcl create {name} --limit N`. "
        "Nothing was started."
    )
