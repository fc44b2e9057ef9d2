"""Slack task: post a message through prefect-slack's own webhook block.

Vendor documentation: https://docs.slack.dev/messaging/sending-messages-using-incoming-webhooks
"""

from __future__ import annotations

import asyncio
from typing import Annotated, Any, Literal

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger
from prefect_slack import SlackWebhook
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    WithJsonSchema,
    field_serializer,
)
from slack_sdk.http_retry.builtin_async_handlers import AsyncRateLimitErrorRetryHandler

from blocks.reference import block_name, load_block
from tasks.jobs import without_traceback

_PATIENCE = 20.0  # seconds for one message, waits for the rate limit included
_TEXT_LIMIT = 40_000

WebhookRef = Annotated[
    SlackWebhook | str,
    # In a form and in a deployment it is the name; the URL is the credential and belongs into a block.
    WithJsonSchema({"type": "string", "description": "Name of a saved Slack Incoming Webhook block."}),
]


class SlackNotify(BaseModel):
    """Who is told on Slack, and when."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tool: Literal["slack"] = "slack"
    webhook: WebhookRef = Field(
        title="Webhook", description="The channel for summaries, and for failures that have no owner."
    )
    owners: dict[str, WebhookRef] = Field(
        default_factory=dict, title="Owners", description="The channel of each owner, by the owner's name."
    )
    on: Literal["always", "failure"] = Field(
        default="always", title="On", description="Whether a run without failures is told too."
    )

    @field_serializer("webhook", "owners", mode="wrap")
    def _by_name(self, value: Any, handler: SerializerFunctionWrapHandler) -> Any:
        # What is stored with a flow run must work in a retry of it, and hold no URL.
        if isinstance(value, dict):
            return {owner: _name(webhook) for owner, webhook in value.items()}
        return _name(value)


def _name(webhook: SlackWebhook | str) -> str:
    return block_name(webhook, SlackWebhook) or "(a block that is not saved)"


@task(name="slack-check", task_run_name="check Slack webhooks", tags=["slack"], cache_policy=NO_CACHE)
async def slack_check(notify: SlackNotify) -> None:
    """See that every webhook block that is named is saved, before anything is started.

    Raises:
        BlockNotFound: One is not.
    """
    without_traceback()
    for webhook in (notify.webhook, *notify.owners.values()):
        await load_block(SlackWebhook, webhook)


@task(name="slack-message", task_run_name="tell {to}", tags=["slack"], cache_policy=NO_CACHE)
async def slack_message(webhook: WebhookRef, text: str, to: str = "Slack") -> bool:
    """Post a message to a Slack channel. Never raises: an alert must not fail the run that it is about.

    Args:
        webhook: A `SlackWebhook` block or the name of a saved one.
        text: In Slack's mrkdwn, with `&`, `<` and `>` escaped where they are meant literally.
        to: Who is told, for the name of the task run.

    Returns:
        Whether Slack took it. Why not is in the log, without the webhook's URL.
    """
    log = get_run_logger()
    try:
        block = await load_block(SlackWebhook, webhook)
        client = block.get_client()
        client.timeout = 10
        client.retry_handlers.append(AsyncRateLimitErrorRetryHandler(max_retry_count=2))
        async with asyncio.timeout(_PATIENCE):
            response = await client.send(text=_cut(text))
    except Exception as error:  # noqa: BLE001 - whatever it is, it must not fail the run; it may hold the URL
        log.warning("Slack was not told (%s): %s", to, type(error).__name__)
        return False
    if response.status_code != 200 or response.body != "ok":
        log.warning(
            "Slack was not told (%s): it answered %s %s", to, response.status_code, response.body[:100]
        )
        return False
    return True


def escape(text: str) -> str:
    """Text that Slack shows as it is."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _cut(text: str) -> str:
    return text if len(text) <= _TEXT_LIMIT else text[: _TEXT_LIMIT - 1] + "…"
