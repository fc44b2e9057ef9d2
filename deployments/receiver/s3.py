"""S3's events, pushed: by EventBridge through an API destination, or by SNS through an HTTPS subscription.

The events are the same as of `tasks.looking`, which gets them from a queue.

Vendor documentation: https://docs.aws.amazon.com/eventbridge/latest/userguide/eb-api-destinations.html and
https://docs.aws.amazon.com/sns/latest/dg/sns-http-https-endpoint-as-subscriber.html
"""

from __future__ import annotations

from contextlib import AsyncExitStack
from typing import Any

import httpx
from prefect.client.orchestration import PrefectClient

from blocks.receiver import S3Webhook
from blocks.signatures import BadSignature, check_token
from deployments.receiver.sns import Sns, SnsMessage
from deployments.receiver.source import Hook, Reading, Refused, Source, read_as
from tasks.looking.notices import s3_events


class S3Source(Source[S3Webhook]):
    """Each object that was created is an event; deletions and tests are acknowledged."""

    kind = S3Webhook

    async def open(self, stack: AsyncExitStack, client: PrefectClient) -> None:
        """Also hold a client for AWS's certificates; it follows no redirects, which could lead anywhere."""
        await super().open(stack, client)
        outside = httpx.AsyncClient(timeout=5.0, follow_redirects=False, trust_env=True)
        self._sns = Sns(await stack.enter_async_context(outside))

    async def read(self, hook: Hook) -> Reading:
        """See `Source.read`."""
        if "x-amz-sns-message-type" in hook.headers:
            return await self._of_topic(hook)
        if self.block.api_key is None:
            raise BadSignature("only SNS may send here: the block has no API key")
        check_token(hook.headers, [self.block.api_key], header="X-Api-Key")
        return _objects(hook.json())

    async def _of_topic(self, hook: Hook) -> Reading:
        raw = hook.json()
        message = read_as(SnsMessage, raw)
        if message.topic not in self.block.topics:
            raise BadSignature("this topic is not one of those that may")
        await self._sns.verify(message, raw)
        if message.type == "SubscriptionConfirmation":
            await self._sns.confirm(message)
            return Reading(ignored="the subscription is confirmed")
        if message.type != "Notification":
            return Reading(ignored=f"{message.type} needs nothing done")
        return _objects(raw)


def _objects(body: Any) -> Reading:
    events = s3_events(body)
    if events is None:
        raise Refused("the body is no event of S3's")
    return Reading(tuple(events), ignored="" if events else "no object was created")
