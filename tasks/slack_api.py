"""Slack over prefect-slack's clients, with this project's manners and errors.

slack_sdk's own retries are switched off: they repeat a message whose reply was lost, which posts it twice,
and sit out whatever `Retry-After` asks for. Its webhook client returns refusals as if they were replies, and
its exceptions may hold the webhook's URL, which is the credential.

Vendor documentation: https://docs.slack.dev/messaging/sending-messages-using-incoming-webhooks and
https://docs.slack.dev/reference/methods/chat.postMessage
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import aiohttp
from prefect_slack import SlackCredentials, SlackWebhook
from slack_sdk.errors import SlackApiError, SlackClientError

from blocks.delivery import deliver
from blocks.errors import parse_retry_after
from blocks.http import AuthError, NotFoundError, RateLimited, VendorError, VendorUnavailable
from tasks.slack_text import cut, plain

_TIMEOUT = 8  # seconds for one request
_NOT_SENT = (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError)
_AWAY = frozenset({"internal_error", "service_unavailable", "request_timeout"})
_AUTH = frozenset(
    {
        "invalid_auth",
        "not_authed",
        "account_inactive",
        "token_revoked",
        "token_expired",
        "missing_scope",
        "invalid_token",
        "action_prohibited",
    }
)
_GONE = frozenset(
    {
        "message_not_found",
        "thread_not_found",
        "cant_update_message",
        "edit_window_closed",
        "channel_not_found",
    }
)
_GUIDANCE = {
    "not_in_channel": "Invite the app into the channel.",
    "channel_not_found": "Is the channel's name right, and is the app in it if it is private?",
    "is_archived": "The channel is archived.",
    "channel_is_archived": "The channel is archived.",
    "no_service": "The webhook is gone; make a new one and save it in the block.",
    "no_team": "The webhook is gone; make a new one and save it in the block.",
    "missing_scope": "The app needs chat:write.",
}


async def post_webhook(webhook: SlackWebhook, text: str, *, patience: float) -> None:
    """Post to an incoming webhook.

    A text that Slack refuses is sent once more without markup. What may have been posted is not sent again:
    a webhook knows no idempotency.

    Args:
        webhook: The block.
        text: In mrkdwn; cut to Slack's limit.
        patience: Seconds for all attempts together.

    Raises:
        VendorError: It was not taken; never with the URL.
    """
    client = webhook.get_client()
    client.timeout = _TIMEOUT
    client.retry_handlers = []

    async def send(message: str) -> None:
        response = await _guarded(lambda: client.send(text=message, unfurl_links=False))
        body = str(response.body).strip()
        if response.status_code != 200 or body != "ok":
            raise _refusal(response.status_code, body[:100] or "an empty body", response.headers)

    try:
        await deliver(lambda: send(cut(text)), patience=patience, repeatable=False)
    except VendorError as error:
        if error.status != 400:
            raise
        await deliver(lambda: send(cut(plain(text))), patience=patience, repeatable=False)


class SlackChat:
    """The calls of Slack's Web API that threads need.

    Args:
        credentials: prefect-slack's block with a bot token.
        api_url: Where the Web API is.
        patience: Seconds for one call with all its attempts.
    """

    def __init__(self, credentials: SlackCredentials, api_url: str, patience: float) -> None:
        self._client = credentials.get_client()
        self._client.base_url = api_url.rstrip("/") + "/"
        self._client.timeout = _TIMEOUT
        self._client.retry_handlers = []
        self._patience = patience

    async def post(self, channel: str, text: str, *, thread: str | None = None) -> dict[str, str]:
        """Post a message, or a reply in a thread.

        Returns:
            The channel's id and the message's `ts`, by which it can be answered and changed.

        Raises:
            VendorError: It was not taken.
            NotFoundError: The thread or the channel is gone.
        """
        found = await self._call(
            "chat.postMessage",
            {
                "channel": channel,
                "text": cut(text),
                "unfurl_links": False,
                **({"thread_ts": thread} if thread else {}),
            },
            repeatable=False,
        )
        return {"channel": str(found.get("channel") or channel), "ts": str(found.get("ts") or "")}

    async def update(self, channel: str, ts: str, text: str) -> None:
        """Change a message; safe to repeat.

        Raises:
            VendorError: It was not taken.
            NotFoundError: The message is gone.
        """
        await self._call("chat.update", {"channel": channel, "ts": ts, "text": cut(text)}, repeatable=True)

    async def _call(self, method: str, body: dict[str, Any], *, repeatable: bool) -> Mapping[str, Any]:
        async def send() -> Mapping[str, Any]:
            try:
                reply = await _guarded(lambda: self._client.api_call(method, json=body))
            except SlackApiError as error:
                raise _refusal_of(error) from None
            data: Mapping[str, Any] = reply.data if isinstance(reply.data, dict) else {}
            return data

        return await deliver(send, patience=self._patience, repeatable=repeatable)


async def _guarded(call: Callable[[], Awaitable[Any]]) -> Any:
    """The call with the errors of ours in place of those that may hold the URL."""
    try:
        return await call()
    except SlackApiError:
        raise
    except _NOT_SENT:
        raise VendorUnavailable("Slack", "no connection could be made", sent=False) from None
    except TimeoutError:
        raise VendorUnavailable("Slack", "no reply in time; it may have been posted") from None
    except UnicodeDecodeError:  # a ValueError too, but not of the URL
        raise VendorUnavailable("Slack", "its reply is no text; it may have been posted") from None
    except (aiohttp.InvalidURL, ValueError):
        raise VendorError("Slack", "the block's URL can't be used", sent=False) from None
    except (aiohttp.ClientError, SlackClientError, OSError):
        raise VendorUnavailable("Slack", "the connection was lost; it may have been posted") from None


def _refusal_of(error: SlackApiError) -> VendorError:
    response = error.response
    if isinstance(
        response, aiohttp.ClientResponse
    ):  # slack_sdk gives its own only where it could read the JSON
        if response.status < 400:
            return VendorUnavailable("Slack", "its reply is broken JSON; it may have been posted")
        return _refusal(response.status, "broken JSON; it may have been posted", response.headers)
    data = response.data if isinstance(response.data, dict) else {}
    word = data.get("error") or ("no reason" if data else "no JSON")
    return _refusal(response.status_code, str(word), response.headers)


def _refusal(status: int, word: str, headers: Mapping[str, str]) -> VendorError:
    """The error that a refusal stands for; Slack's Web API refuses with status 200 too."""
    if status == 429 or word in ("ratelimited", "rate_limited"):
        limited = RateLimited("Slack", "too many messages", status=status)
        limited.retry_after = parse_retry_after(headers.get("Retry-After") or headers.get("retry-after"))
        if limited.retry_after is not None:
            limited.message += f"; it asks to wait {limited.retry_after:.0f} s"
        return limited
    if status >= 500 or word in _AWAY:
        return VendorUnavailable("Slack", "it fails on its own side", status=status)
    kind = AuthError if word in _AUTH else NotFoundError if word in _GONE else VendorError
    return kind("Slack", word, status=status, sent=False, guidance=_GUIDANCE.get(word, ""))
