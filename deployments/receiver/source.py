"""What a source of events is: it proves who sends, and reads what is sent."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

import httpx
from prefect.client.orchestration import PrefectClient
from pydantic import BaseModel, ValidationError
from starlette.responses import JSONResponse, Response

from blocks.errors import VendorError
from blocks.receiver import EventSource
from tasks.events import EltEvent, HandedOver, HandOverError, OnceTrigger

BlockT = TypeVar("BlockT", bound=EventSource)
ModelT = TypeVar("ModelT", bound=BaseModel)


class Refused(Exception):
    """The request is answered with an error of the sender's, which trying again would not change.

    Attributes:
        status: HTTP status, 4xx.
        reason: For the sender; holds nothing that a stranger should not know.
    """

    def __init__(self, reason: str, status: int = 400) -> None:
        super().__init__(reason)
        self.status, self.reason = status, reason


class TryAgain(Exception):
    """Nothing was taken, for a reason that passes: answered with 503, so that the sender tries again."""


AWAY = (HandOverError, TryAgain, VendorError, httpx.HTTPError)
"""What passes: the Prefect server (httpx's errors are its client's) or a vendor's API can't be reached."""


class Reply(JSONResponse):
    """JSON in ASCII: what a stranger sent may stand in it, and need not be text that can be encoded."""

    def render(self, content: Any) -> bytes:
        """The body."""
        return json.dumps(content).encode()


@dataclass(frozen=True)
class Hook:
    """A request of a sender.

    Attributes:
        headers: Names in lower case.
        body: The bytes as they came: signatures are of these.
        tail: What stands in the path behind the source's own address.
        method: `POST`, or `GET` for sources that take it.
    """

    headers: Mapping[str, str]
    body: bytes
    tail: str = ""
    method: str = "POST"

    def json(self) -> Any:
        """The body as JSON.

        Raises:
            Refused: It is none.
        """
        try:
            return json.loads(self.body.decode("utf-8", "strict"))
        except UnicodeDecodeError:
            raise Refused("the body is not UTF-8") from None
        except (ValueError, RecursionError):
            raise Refused("the body is no JSON") from None

    def read(self, model: type[ModelT]) -> ModelT:
        """The body as what the vendor's documentation promises.

        Raises:
            Refused: It is not; says what is wrong and where, without the value.
        """
        return read_as(model, self.json())


def read_as(model: type[ModelT], document: Any) -> ModelT:
    """A document as a model.

    Raises:
        Refused: It is not; says what is wrong and where, without the value.
    """
    try:
        return model.model_validate(document)
    except ValidationError as error:
        raise Refused(told(error)) from None


def told(error: ValidationError) -> str:
    """The first thing that is wrong, without the value."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    return f"{where}: {first['msg']}" if where else str(first["msg"])


@dataclass(frozen=True)
class Reading:
    """What a request says.

    Attributes:
        events: What has happened.
        triggers: What the request itself asks to be started, beside the once triggers of the deployments.
        ignored: Why there are no events; for the sender.
    """

    events: tuple[EltEvent, ...] = ()
    triggers: tuple[OnceTrigger, ...] = ()
    ignored: str = ""


HandOver = Callable[[Sequence[EltEvent], Sequence[OnceTrigger]], Awaitable[list[HandedOver]]]


@dataclass(frozen=True)
class Desk:
    """What a source may do with what it has read.

    Attributes:
        hand_over: Takes events and the request's own triggers; raises `HandOverError` where not all of it was
            taken.
        later: Goes on with something when the request is answered; logs by what it is called, should it come
            to nothing.
        pause: Waits between two tries. False if the receiver is being stopped: then the next is the last.
    """

    hand_over: HandOver
    later: Callable[[Coroutine[Any, Any, None], str], None]
    pause: Callable[[float], Awaitable[bool]]


class Source(ABC, Generic[BlockT]):
    """A source of events.

    Args:
        block: Its settings and secrets.
        name: The name under which the block is saved.
    """

    kind: ClassVar[type[EventSource]]
    """The block that switches it on."""

    methods: ClassVar[tuple[str, ...]] = ("POST",)

    client: PrefectClient

    def __init__(self, block: BlockT, name: str) -> None:
        self.block, self.name = block, name

    @property
    def path(self) -> str:
        """Where it is served."""
        return f"/hooks/{self.kind.get_block_type_slug()}/{self.name}"

    @property
    def shown_path(self) -> str:
        """The same for people and logs, with a placeholder for what is secret."""
        return self.path

    @abstractmethod
    async def read(self, hook: Hook) -> Reading:
        """Prove who sends, and read what is sent.

        Raises:
            BadSignature: It was sent by somebody else: 401.
            Refused: The body is not what the vendor's documentation promises.
            VendorError, TryAgain: It can't be judged now: 503.
        """

    async def answer(self, hook: Hook, desk: Desk) -> Response:
        """Read the request, hand its events over, and answer.

        Raises:
            HandOverError: The server did not take everything: 503. And what `read` raises.
        """
        reading = await self.read(hook)
        if not reading.events:
            return Reply({"ignored": reading.ignored})
        handed = await desk.hand_over(reading.events, reading.triggers)
        return Reply(
            {
                "events": [
                    {"id": str(one.event_id), "runs": [str(run.flow_run_id) for run in one.runs]}
                    for one in handed
                ]
            }
        )

    async def open(self, stack: AsyncExitStack, client: PrefectClient) -> None:
        """Make ready: what is entered into the stack is held open while the receiver runs."""
        self.client = client
