"""Slack's side of the stage: channels that keep what was posted, to be read by people and tests.

Here are the channels and their incoming webhooks; the Web API is in `slack_chat.py`.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import parse_qs

import orjson
from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from sandbox import catalog

ChannelError = Literal[
    "channel_not_found", "channel_is_archived", "action_prohibited", "rollup_error", "user_not_found"
]
_STATUS = {
    "channel_not_found": 404,
    "channel_is_archived": 410,
    "action_prohibited": 403,
    "rollup_error": 500,
    "user_not_found": 400,
}
_TEXT_KEYS = ("text", "title", "pretext", "value", "fields", "elements", "blocks")
_MAX_BLOCKS, _MAX_SECTION, _MAX_HEADER, _MAX_TEXT = 50, 3000, 150, 40_000


class SlackSettings(BaseModel):
    """What can be set about Slack as a whole."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True)

    messages_per_second: int | None = Field(None, ge=1, description="Per webhook; beyond it: 429. None: off.")


@dataclass(frozen=True, slots=True)
class Message:
    """One message that a channel has received."""

    channel: str
    text: str
    blocks: list[dict[str, Any]]
    attachments: list[dict[str, Any]]
    time: float  # epoch seconds
    ts: str | None = None  # Slack's id of it; a webhook is not told
    thread_ts: str | None = None
    earlier: tuple[str, ...] = ()  # what it said before it was changed
    by_webhook: bool = False

    @property
    def full_text(self) -> str:
        """The text and all text inside blocks and attachments, a line each."""
        return "\n".join(_texts([self.text, self.blocks, self.attachments]))


class Slack:
    """The channels and what was posted to them."""

    def __init__(self) -> None:
        self.settings = SlackSettings()
        self.messages: list[Message] = []  # oldest first
        self.errors: dict[str, ChannelError] = {}
        self._by_webhook = {(webhook, secret): name for name, (webhook, secret) in catalog.WEBHOOKS.items()}
        self._recent: dict[str, deque[float]] = {name: deque() for name in catalog.WEBHOOKS}
        self._last_ts = 0

    def sent_to(self, channel: str) -> list[Message]:
        """The messages of a channel, oldest first."""
        return [message for message in self.messages if message.channel == channel]

    def thread(self, ts: str | None) -> list[Message]:
        """The replies to a message, oldest first."""
        return [message for message in self.messages if ts is not None and message.thread_ts == ts]

    def find(self, channel: str, ts: str) -> Message | None:
        """The message of this channel with this `ts`."""
        return next((message for message in self.sent_to(channel) if message.ts == ts), None)

    def delete(self, ts: str) -> None:
        """What a person does with a message they no longer want to see."""
        self.messages[:] = [message for message in self.messages if message.ts != ts]

    def new_ts(self) -> str:
        """An id as Slack has them: seconds and microseconds, no two alike."""
        self._last_ts = max(self._last_ts + 1, int(time.time() * 1e6))
        return f"{self._last_ts // 1_000_000}.{self._last_ts % 1_000_000:06d}"

    def break_channel(self, channel: str, error: ChannelError | None) -> None:
        """Answer every post to a channel with this error; None heals it.

        Raises:
            KeyError: no such channel.
        """
        if channel not in catalog.WEBHOOKS:
            raise KeyError(channel)
        if error is None:
            self.errors.pop(channel, None)
        else:
            self.errors[channel] = error

    def clear(self) -> None:
        """Forget all messages."""
        self.messages.clear()

    def routes(self) -> list[Route]:
        """The one route that incoming webhooks have."""
        return [Route("/services/{team}/{webhook}/{secret}", self._post, methods=["POST"])]

    async def _post(self, request: Request) -> Response:
        parts = request.path_params
        channel = self._by_webhook.get((parts["webhook"], parts["secret"]))
        if parts["team"] != catalog.SLACK_TEAM:
            return _text("no_team", 404)
        if channel is None:
            known = any(webhook == parts["webhook"] for webhook, _ in self._by_webhook)
            return _text("invalid_token", 403) if known else _text("no_service", 404)
        if (error := self.errors.get(channel)) is not None:
            return _text(error, _STATUS[error])
        if self.too_fast(channel):
            return Response("rate_limited", 429, {"retry-after": "1"}, "text/plain")
        payload = await _payload(request)
        if payload is None:
            return _text("invalid_payload", 400)
        if (word := refusal(payload)) is not None:
            return _text(word, 400)
        self.messages.append(
            Message(
                channel=channel,
                text=payload.get("text") or "",
                blocks=payload.get("blocks") or [],
                attachments=payload.get("attachments") or [],
                time=time.time(),
                ts=self.new_ts(),
                by_webhook=True,
            )
        )
        return _text("ok", 200)

    def too_fast(self, channel: str) -> bool:
        """Whether a message more is one too many, counted as one if it is not."""
        limit = self.settings.messages_per_second
        if limit is None:
            return False
        recent, now = self._recent[channel], time.monotonic()
        while recent and recent[0] < now - 1:
            recent.popleft()
        if len(recent) >= limit:
            return True
        recent.append(now)
        return False


async def _payload(request: Request) -> dict[str, Any] | None:
    """The message, sent as JSON or as a form's `payload`; None when it is neither."""
    body = await request.body()
    if "x-www-form-urlencoded" in request.headers.get("content-type", ""):
        body = parse_qs(body.decode("utf-8", "replace")).get("payload", [""])[0].encode()
    try:
        parsed = orjson.loads(body)
    except orjson.JSONDecodeError:
        return None
    return parsed if isinstance(parsed, dict) else None


def refusal(payload: dict[str, Any]) -> str | None:
    """Slack's word for what is wrong with a message, None when nothing is."""
    text, blocks = payload.get("text"), payload.get("blocks") or []
    if text is not None and not isinstance(text, str):
        return "invalid_payload"
    if not text and not blocks and not payload.get("attachments"):
        return "no_text"
    if len(text or "") > _MAX_TEXT:
        return "msg_too_long"
    if not isinstance(blocks, list) or len(blocks) > _MAX_BLOCKS:
        return "invalid_blocks"
    return None if all(_block_fits(block) for block in blocks) else "invalid_blocks"


def _block_fits(block: Any) -> bool:
    if not isinstance(block, dict) or not isinstance(block.get("type"), str):
        return False
    text = block.get("text")
    if block["type"] not in ("section", "header") or text is None:
        return True
    limit = _MAX_SECTION if block["type"] == "section" else _MAX_HEADER
    words = text.get("text") if isinstance(text, dict) else None
    return isinstance(words, str) and 0 < len(words) <= limit


def _texts(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value] if value else []
    if isinstance(value, list):
        return [text for inner in value for text in _texts(inner)]
    if isinstance(value, dict):
        return [text for key, inner in value.items() if key in _TEXT_KEYS for text in _texts(inner)]
    return []


def _text(word: str, status: int) -> Response:
    return Response(word, status, media_type="text/plain")
