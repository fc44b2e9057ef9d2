"""Slack's Web API over the messages in `slack.py`: `chat.postMessage`, `chat.update` and `auth.test`."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from urllib.parse import parse_qs

import orjson
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from sandbox import catalog
from sandbox.slack import Message, Slack, refusal

PREFIX = "/slack/api"


class SlackError(Exception):
    """An `ok: false` of Slack's, raised by a handler."""


class SlackChat:
    """The routes of the Web API. Whatever is wrong, the status is 200; only a rate limit is 429."""

    def __init__(self, slack: Slack) -> None:
        self.slack = slack

    def routes(self) -> list[Route]:
        """All routes."""
        return [
            self._route("chat.postMessage", self._post),
            self._route("chat.update", self._update),
            self._route("auth.test", self._test),
        ]

    def _route(self, method: str, handler: Callable[[dict[str, Any]], dict[str, Any]]) -> Route:
        async def endpoint(request: Request) -> Response:
            try:
                sent = await _sent(request)
                _admit(request, sent)
                if (channel := self._limited(sent)) is not None and self.slack.too_fast(channel):
                    return _reply({"ok": False, "error": "ratelimited"}, 429, {"retry-after": "1"})
                return _reply({"ok": True, **handler(sent)})
            except SlackError as error:
                return _reply({"ok": False, "error": str(error)})

        return Route(f"{PREFIX}/{method}", endpoint, methods=["POST"])

    def _limited(self, sent: dict[str, Any]) -> str | None:
        return catalog.CHANNEL_NAMES.get(_plain(sent.get("channel")), None)

    def _channel(self, given: Any, *, by_name: bool) -> str:
        """The name of a channel; the API takes its id, and when posting its name too."""
        text = _plain(given)
        name = catalog.CHANNEL_NAMES.get(text) if by_name or text.startswith("C0") else None
        if name is None:
            raise SlackError("channel_not_found")
        error = self.slack.errors.get(name)
        if error is not None:
            raise SlackError({"channel_is_archived": "is_archived"}.get(error, error))
        return name

    def _post(self, sent: dict[str, Any]) -> dict[str, Any]:
        channel = self._channel(sent.get("channel"), by_name=True)
        _check(sent)
        thread = sent.get("thread_ts")
        if thread is not None and self.slack.find(channel, str(thread)) is None:
            raise SlackError("thread_not_found")
        message = Message(
            channel=channel,
            text=sent.get("text") or "",
            blocks=sent.get("blocks") or [],
            attachments=sent.get("attachments") or [],
            time=time.time(),
            ts=self.slack.new_ts(),
            thread_ts=str(thread) if thread is not None else None,
        )
        self.slack.messages.append(message)
        return _message(message)

    def _update(self, sent: dict[str, Any]) -> dict[str, Any]:
        channel = self._channel(sent.get("channel"), by_name=False)
        _check(sent)
        found = self.slack.find(channel, str(sent.get("ts") or ""))
        if found is None:
            raise SlackError("message_not_found")
        if found.ts is None or found.by_webhook:
            raise SlackError("cant_update_message")
        changed = replace(
            found,
            text=sent.get("text") or "",
            blocks=sent.get("blocks") or [],
            earlier=(*found.earlier, found.text),
        )
        self.slack.messages[self.slack.messages.index(found)] = changed
        return _message(changed)

    def _test(self, sent: dict[str, Any]) -> dict[str, Any]:
        return {"url": "https://sandbox.slack.com/", "team_id": catalog.SLACK_TEAM, "user": "elt"}


def _message(message: Message) -> dict[str, Any]:
    return {
        "channel": catalog.CHANNEL_IDS[message.channel],
        "ts": message.ts,
        "text": message.text,
        "message": {"type": "message", "text": message.text, "ts": message.ts},
    }


def _check(sent: dict[str, Any]) -> None:
    word = refusal(sent)
    if word is not None:
        raise SlackError({"invalid_payload": "invalid_arguments"}.get(word, word))


def _admit(request: Request, sent: dict[str, Any]) -> None:
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    token = token if scheme == "Bearer" else str(sent.get("token") or "")
    if not token:
        raise SlackError("not_authed")
    if token != catalog.SLACK_TOKEN:
        raise SlackError("invalid_auth")


async def _sent(request: Request) -> dict[str, Any]:
    body = await request.body()
    if "json" in request.headers.get("content-type", ""):
        try:
            parsed = orjson.loads(body)
        except orjson.JSONDecodeError as error:
            raise SlackError("invalid_json") from error
        if not isinstance(parsed, dict):
            raise SlackError("json_not_object")
        return parsed
    return {key: values[-1] for key, values in parse_qs(body.decode("utf-8", "replace")).items()}


def _plain(channel: Any) -> str:
    return str(channel or "").removeprefix("#")


def _reply(body: dict[str, Any], status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(orjson.dumps(body), status, headers, "application/json")
