"""Slack: telling channels what went wrong, and that it is well again.

Over an incoming webhook (`SlackNotify`) a run tells a channel all that is new to it in one message. A
webhook knows no threads, so a repeat is left out until `remind` seconds have passed since the incident was
last told, or comes along with a message that is sent anyway. Over the Web API (`SlackChannel`) each incident
is a message of its own: repeats count up in it, and after `remind` seconds go into its thread too; the end is
told in the thread, and the message is marked as resolved.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Literal

from prefect_slack import SlackCredentials, SlackWebhook
from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    WithJsonSchema,
    field_serializer,
    field_validator,
)

from blocks.fields import check_base_url
from blocks.http import NotFoundError, VendorError
from blocks.reference import NAMED, UNSAVED, block_name, load_block
from tasks.alerts import Notifier, NotifyParameters, is_gone, place
from tasks.incidents import Alarm, Bulletin, Change, Happened
from tasks.slack_api import SlackChat, post_webhook
from tasks.slack_text import digest, root

_REMIND = 4 * 3600.0
_API = "https://slack.com/api/"

WebhookRef = Annotated[
    SlackWebhook | str,
    NAMED,
    # In a form and in a deployment it is the name; the URL is the credential and belongs into a block.
    WithJsonSchema({"type": "string", "description": "Name of a saved Slack Incoming Webhook block."}),
]
CredentialsRef = Annotated[
    SlackCredentials | str,
    NAMED,
    WithJsonSchema({"type": "string", "description": "Name of a saved Slack Credentials block."}),
]


class _SlackNotify(NotifyParameters):
    """What both ways to Slack have in common."""

    on: Literal["always", "failure"] = Field(
        default="always", title="On", description="Whether a run without failures is told too."
    )
    remind: float = Field(
        default=_REMIND,
        ge=0,
        allow_inf_nan=False,
        title="Remind",
        description="Seconds after which an incident that is still open is told again.",
    )


class SlackNotify(_SlackNotify):
    """Who is told on Slack over incoming webhooks, and when."""

    tool: Literal["slack"] = "slack"
    webhook: WebhookRef = Field(
        title="Webhook", description="The channel for summaries, and for failures that have no owner."
    )
    owners: dict[str, WebhookRef] = Field(
        default_factory=dict, title="Owners", description="The channel of each owner, by the owner's name."
    )

    @field_serializer("webhook", "owners", mode="wrap")
    def _by_name(self, value: Any, handler: SerializerFunctionWrapHandler) -> Any:
        # What is stored with a flow run must work in a retry of it, and hold no URL.
        if isinstance(value, dict):
            return {owner: _name(webhook, SlackWebhook) for owner, webhook in value.items()}
        return _name(value, SlackWebhook)

    async def check(self) -> None:
        """See that every webhook block that is named is saved.

        Raises:
            BlockNotFound: One is not.
        """
        for webhook in (self.webhook, *self.owners.values()):
            await load_block(SlackWebhook, webhook)

    def notifier(self) -> Notifier:
        """Posts to the webhooks."""
        return _Webhooks(self)


class SlackChannel(_SlackNotify):
    """Who is told on Slack over its Web API, with a thread for each incident, and when.

    The app needs the scope `chat:write` and must be in the channels.
    """

    tool: Literal["slack-channel"] = "slack-channel"
    credentials: CredentialsRef = Field(title="Credentials", description="With the app's bot token.")
    channel: str = Field(
        title="Channel",
        pattern=r"^#?[\w.-]+$",
        description="Name or id of the channel for summaries, and for failures that have no owner.",
    )
    owners: dict[str, str] = Field(
        default_factory=dict, title="Owners", description="The channel of each owner, by the owner's name."
    )
    api_url: str = Field(
        default=_API, title="API URL", description="Where Slack's Web API is; another one for GovSlack."
    )

    @field_validator("api_url")
    @classmethod
    def _normalise(cls, value: str) -> str:
        return check_base_url(value, example=_API) + "/"

    @field_serializer("credentials", mode="wrap")
    def _by_name(self, value: Any, handler: SerializerFunctionWrapHandler) -> Any:
        return _name(value, SlackCredentials)

    async def check(self) -> None:
        """See that the credentials are saved.

        Raises:
            BlockNotFound: They are not.
        """
        await load_block(SlackCredentials, self.credentials)

    def notifier(self) -> Notifier:
        """Posts into the channels, and answers there."""
        return _Channels(self)


def _name(block: Any, kind: type[SlackWebhook | SlackCredentials]) -> str:
    return block_name(block, kind) or UNSAVED


def _due(change: Change, remind: float) -> bool:
    """Whether an incident that goes on is to be told again."""
    told_at = change.incident.told_at
    return told_at is None or datetime.now(UTC) - told_at >= timedelta(seconds=remind)


class _Webhooks:
    """Tells over incoming webhooks: one message for each channel and run."""

    title = "Slack"

    def __init__(self, notify: SlackNotify) -> None:
        self._remind = notify.remind
        self._main = _webhook_place(notify.webhook)
        self._owners = {owner: _webhook_place(webhook) for owner, webhook in notify.owners.items()}
        self._given: dict[str, SlackWebhook | str] = {
            _webhook_place(webhook): webhook for webhook in (notify.webhook, *notify.owners.values())
        }
        self.route = f"slack/{self._main}"
        self.summary_to = self._main if notify.on == "always" else None

    def to(self, owner: str | None) -> str:
        return self._owners.get(owner or "", self._main)

    async def gone(self, to: str) -> bool:
        return to not in self._given and await is_gone(SlackWebhook, to)

    def wants(self, alarm: Alarm) -> bool:
        return True

    async def deliver(self, to: str, changes: Sequence[Change], bulletin: Bulletin, patience: float) -> None:
        webhook = await load_block(SlackWebhook, self._given.get(to, to))
        # What nobody was told of needs no end.
        told = [c for c in changes if not (c.ends and c.incident.told is None)]
        news = [c for c in told if c.happened is not Happened.REPEATED or _due(c, self._remind)]
        sums_up = to == self.summary_to and not bulletin.alarms
        if news or sums_up:
            text = digest(told, bulletin if sums_up else bulletin.model_copy(update={"summary": []}))
            await post_webhook(webhook, text, patience=patience)
        for change in changes:
            change.done({}, said=bool(news) and change in told)


def _webhook_place(webhook: SlackWebhook | str) -> str:
    secret = "" if isinstance(webhook, str) else webhook.url.get_secret_value()
    return place(webhook, SlackWebhook, secret)


class _Channels:
    """Tells over the Web API: a message for each incident, with a thread."""

    title = "Slack"

    def __init__(self, notify: SlackChannel) -> None:
        self._notify = notify
        self._main = notify.channel
        token = "" if isinstance(notify.credentials, str) else notify.credentials.token.get_secret_value()
        self.route = f"slack-channel/{place(notify.credentials, SlackCredentials, token)}/{self._main}"
        self.summary_to = self._main if notify.on == "always" else None

    def to(self, owner: str | None) -> str:
        return self._notify.owners.get(owner or "", self._main)

    async def gone(self, to: str) -> bool:
        return False  # a channel is no block: what is wrong with it, Slack says

    def wants(self, alarm: Alarm) -> bool:
        return True

    async def deliver(self, to: str, changes: Sequence[Change], bulletin: Bulletin, patience: float) -> None:
        credentials = await load_block(SlackCredentials, self._notify.credentials)
        chat = SlackChat(credentials, self._notify.api_url, patience)
        deadline = asyncio.get_running_loop().time() + patience
        # One after the other: Slack takes about one message a second for a channel.
        for change in changes:
            if asyncio.get_running_loop().time() >= deadline:
                return
            try:
                await self._tell(chat, to, change, bulletin)
            except VendorError as error:
                change.problem = str(error)
        if to == self.summary_to and not bulletin.alarms and bulletin.summary:
            await chat.post(to, digest([], bulletin))

    async def _tell(self, chat: SlackChat, to: str, change: Change, bulletin: Bulletin) -> None:
        first = change.incident.told
        if not first:
            if not change.ends:  # what nobody was told of needs no end
                change.done(await chat.post(to, root(change, bulletin)))
            else:
                change.done({}, said=False)
            return
        channel, ts = first["channel"], first["ts"]
        try:
            # First what can be repeated: should the rest fail, the next run does it all again.
            await chat.update(channel, ts, root(change, bulletin))
            said = change.ends or _due(change, self._notify.remind)
            if said:
                await chat.post(channel, _reply(change, bulletin), thread=ts)
        except NotFoundError:
            # Somebody has deleted the message.
            change.done(await chat.post(to, _reply(change, bulletin)))
        else:
            change.done(said=said)


def _reply(change: Change, bulletin: Bulletin) -> str:
    return digest([change], bulletin.model_copy(update={"summary": []}))
