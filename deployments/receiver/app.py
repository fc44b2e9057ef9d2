"""The ASGI application of the receiver.

    answer  when
    200     the event is handed over (or was before), or it is one that nobody needs
    400     the body is not what the sender's documentation promises
    401     the signature does not fit; 404 where the address carries the secret
    408, 413  the body came too slowly, or is too big
    503     with Retry-After: the Prefect server, or the vendor's own API, did not take or tell it now

A sender's mistake is never a 5xx, or it would try again for ever.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

from prefect import get_client
from prefect.client.orchestration import PrefectClient
from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from blocks.errors import VendorError
from blocks.signatures import BadSignature
from deployments.receiver.source import AWAY, Desk, Hook, Refused, Reply, Source, TryAgain, told
from tasks.events import EltEvent, HandedOver, HandOverError, OnceTrigger, hand_over

_log = logging.getLogger("elt.receiver")

_DRAINED = 20  # times the greatest body
_REMEMBERED = 10_000  # events; what comes again after more than these goes to the server again


@dataclass(frozen=True)
class Limits:
    """What a request may cost.

    Attributes:
        body: Bytes.
        reading: Seconds for the body to come.
        handing_over: Seconds for the server to take the events; shorter than senders wait (dbt Cloud: 10).
        retry_after: Seconds after which a sender shall try again.
        answering: Seconds for the server to say that it is there.
    """

    body: int = 1_000_000
    reading: float = 10.0
    handing_over: float = 8.0
    retry_after: int = 10
    answering: float = 5.0


@dataclass
class Receiver:
    """The application's state: sources, triggers, and what was handed over a moment ago."""

    sources: Mapping[str, Source[Any]]
    triggers: Sequence[OnceTrigger]
    limits: Limits = field(default_factory=Limits)
    _client: PrefectClient | None = None
    _handed: OrderedDict[UUID, HandedOver] = field(default_factory=OrderedDict)
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)
    _stopping: asyncio.Event = field(default_factory=asyncio.Event)

    @asynccontextmanager
    async def running(self, _app: Starlette) -> AsyncIterator[None]:
        """Hold the server's client open, and end what is going on in the background."""
        async with AsyncExitStack() as stack:
            self._client = await stack.enter_async_context(get_client())
            for source in self.sources.values():
                await source.open(stack, self._client)
            try:
                yield
            finally:
                await self._stop()

    async def _stop(self) -> None:
        """Have everything in the background tried once more, at once, and end what is not done then."""
        self._stopping.set()
        if self._tasks:
            # All of it in the time of one hand-over: whatever has asked us to stop does not wait for long.
            await asyncio.wait(self._tasks, timeout=self.limits.handing_over)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def pause(self, seconds: float) -> bool:
        """Wait, but not for longer than the receiver runs.

        Returns:
            Whether it goes on; if not, this is the last try.
        """
        with suppress(TimeoutError):
            await asyncio.wait_for(self._stopping.wait(), seconds)
        return not self._stopping.is_set()

    def later(self, work: Coroutine[Any, Any, None], what: str) -> None:
        """Go on with something in the background; that it came to nothing is logged.

        Args:
            work: To be done. It waits by `pause`.
            what: The source, and what it is about, by its id.
        """

        async def guarded() -> None:
            try:
                await work
            except asyncio.CancelledError:
                _log.error("%s: dropped: the receiver was stopped", what)
                raise
            except Exception as error:  # noqa: BLE001 - there is nobody left to answer; the log has it
                _log.error("%s: dropped: %s", what, _named(error))

        task = asyncio.create_task(guarded())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def hand_over(
        self, events: Sequence[EltEvent], triggers: Sequence[OnceTrigger] = ()
    ) -> list[HandedOver]:
        """Hand events over; those that were a moment ago are known.

        Raises:
            HandOverError: The server did not take everything in time.
        """
        handed = {event.id: self._handed[event.id] for event in events if event.id in self._handed}
        new = {event.id: event for event in events if event.id not in handed}
        if new:
            try:
                async with asyncio.timeout(self.limits.handing_over):
                    done = await hand_over(list(new.values()), [*self.triggers, *triggers], self._client)
            except TimeoutError:
                raise HandOverError("the Prefect server did not answer in time") from None
            for event, one in zip(new.values(), done, strict=True):
                _log.info("%s: %s", event.label, _outcome(one))
                handed[event.id] = one
                if not one.failed:  # else it shall be tried when it is sent again, the trigger mended
                    self._handed[event.id] = one
        while len(self._handed) > _REMEMBERED:
            self._handed.popitem(last=False)
        return [handed[event.id] for event in events]

    async def hook(self, request: Request) -> Response:
        """A request to `/hooks/<kind>/<name>[/…]`."""
        kind, _, rest = request.path_params["path"].partition("/")
        name, _, tail = rest.partition("/")
        source = self.sources.get(f"/hooks/{kind}/{name}")
        if source is None or request.method not in source.methods:
            return _refused(404, "there is no such source")
        try:
            body = await self._body(request)
            hook = Hook(request.headers, body, tail, request.method)
            return await source.answer(hook, Desk(self.hand_over, self.later, self.pause))
        except BadSignature as error:
            _log.warning("%s: refused: %s", source.shown_path, error)
            return _refused(401, str(error))
        except Refused as error:
            _log.warning("%s: refused: %s", source.shown_path, error.reason)
            return _refused(error.status, error.reason)
        except ValidationError as error:  # of an event: an id that is too long, a NUL in a text
            _log.warning("%s: refused: %s", source.shown_path, told(error))
            return _refused(400, told(error))
        except AWAY as error:
            _log.error("%s: not taken, to be sent again: %s", source.shown_path, _named(error))
            return _refused(503, "not taken; send it again", {"Retry-After": str(self.limits.retry_after)})

    async def _body(self, request: Request) -> bytes:
        """The body, or what is wrong with it."""
        body, length = bytearray(), 0
        said = request.headers.get("content-length", "")
        too_big = said.isascii() and said.isdigit() and int(said[:20]) > self.limits.body
        try:
            async with asyncio.timeout(self.limits.reading):
                async for chunk in request.stream():
                    length += len(chunk)
                    if too_big := too_big or length > self.limits.body:
                        # Read on without keeping it: a sender that is cut off does not see the answer.
                        body.clear()
                        if length > _DRAINED * self.limits.body:
                            break
                    else:
                        body += chunk
        except TimeoutError:
            raise Refused("the body came too slowly", 408) from None
        except ClientDisconnect:
            raise Refused("the body did not come whole") from None
        if too_big:
            raise Refused(f"the body is bigger than {self.limits.body} bytes", 413)
        return bytes(body)

    async def ready(self, _request: Request) -> Response:
        """Whether the Prefect server can be reached: with it away no hook would be taken."""
        with suppress(TimeoutError):
            async with asyncio.timeout(self.limits.answering):
                if self._client and await self._client.api_healthcheck() is None:
                    return Reply({"ready": True})
        return Reply({"ready": False, "reason": "the Prefect server can't be reached"}, 503)


async def _health(_request: Request) -> Response:
    return Reply({"healthy": True})


def build_app(
    sources: Sequence[Source[Any]], triggers: Sequence[OnceTrigger], limits: Limits | None = None
) -> Starlette:
    """The application.

    Args:
        sources: Those that are on.
        triggers: What their events start.
        limits: What a request may cost.
    """
    receiver = Receiver({source.path: source for source in sources}, triggers, limits or Limits())
    return Starlette(
        routes=[
            Route("/health", _health),
            Route("/ready", receiver.ready),
            Route("/hooks/{path:path}", receiver.hook, methods=["GET", "POST"]),
        ],
        lifespan=receiver.running,
    )


def _refused(status: int, reason: str, headers: dict[str, str] | None = None) -> Response:
    return Reply({"error": reason}, status, headers)


def _outcome(handed: HandedOver) -> str:
    runs = ", ".join(f"{run.deployment} {run.name}" for run in handed.runs) or "no run"
    return f"{runs}; FAILED to start: {', '.join(handed.failed)}" if handed.failed else runs


def _named(error: BaseException) -> str:
    # Errors of ours are written to be shown; what another's holds nobody knows.
    ours = isinstance(error, HandOverError | TryAgain | VendorError)
    return str(error) if ours else type(error).__name__
