"""An SQS queue, listened to: long polling, ten messages at a time, each deleted only when it was handed over.

What S3 puts into a queue, by itself or through SNS or EventBridge, becomes `elt.s3.object.created`; any other
JSON object becomes `elt.sqs.message.received`. While handing over takes long, the messages in hand are kept
from other readers. A message that can't be read is said once and left to the queue's own redrive policy.

Vendor documentation: https://docs.aws.amazon.com/AWSSimpleQueueService/latest/APIReference/
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import OrderedDict
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Literal, TypeVar

import anyio.to_thread
from botocore.exceptions import BotoCoreError, ClientError
from prefect_aws import AwsCredentials
from pydantic import Field, ValidationError

from tasks.events import EltEvent
from tasks.looking.events import bounded
from tasks.looking.listener import Batch, ListenError, ListenerSettings, SourceAway, log, saved_block
from tasks.looking.notices import s3_events

RECEIVED = "elt.sqs.message.received"
_MESSAGES = 10  # the most that SQS gives, deletes and prolongs at once
_TOLD = 10_000  # ids of messages that were said to be unreadable
_BYTES = 256 * 1024  # of a body: a run's parameters may have 512 KiB
_NOT_THERE = frozenset({"AWS.SimpleQueueService.NonExistentQueue", "QueueDoesNotExist"})
_REFUSED = frozenset(
    {
        "AccessDenied",
        "AccessDeniedException",
        "AuthFailure",
        "ExpiredToken",
        "InvalidAccessKeyId",
        "InvalidAddress",
        "InvalidClientTokenId",
        "InvalidSecurity",
        "MissingAuthenticationToken",
        "SignatureDoesNotMatch",
        "UnrecognizedClientException",
    }
)
T = TypeVar("T")


class SqsQueue(ListenerSettings):
    """A queue to listen to."""

    source: Literal["sqs"] = "sqs"
    queue: str = Field(
        min_length=1, description="The queue's name, or its URL where it is another account's."
    )
    credentials: str | None = Field(
        default=None,
        description="Name of a saved AWS Credentials block; without one, what boto3 finds on the machine.",
    )
    region: str | None = Field(default=None, description="In place of the credentials' region.")
    expects: Literal["s3", "any"] = Field(
        default="any",
        description="`s3`: what is no notification of S3's can't be read. `any`: it is a message of its own.",
    )
    encoded_keys: bool = Field(
        default=True, description="Whether keys in S3 notifications are URL-encoded, as AWS does it."
    )
    visibility: int = Field(
        default=60, ge=10, le=43_200, description="Seconds that a message in hand is kept from other readers."
    )
    wait: int = Field(default=10, ge=1, le=20, description="Seconds that one poll waits for messages.")


class SqsSource:
    """A queue as `listen` takes it.

    Args:
        settings: Which, and how.
    """

    def __init__(self, settings: SqsQueue) -> None:
        self._settings = settings
        self._sqs: Any = None
        self._url = ""
        self._told: OrderedDict[str, None] = OrderedDict()

    @property
    def label(self) -> str:
        """What logs call it."""
        return f"sqs {self._settings.name}"

    async def connect(self) -> None:
        """Find the queue.

        Raises:
            ListenError: There is none, or the credentials may not read it.
            SourceAway: AWS can't be reached.
        """
        if self._sqs is None:
            self._sqs = await self._client()
        if not self._url:
            self._url = await self._find()
        reply = await self._call("get_queue_attributes", AttributeNames=["RedrivePolicy"])
        if "RedrivePolicy" not in reply.get("Attributes", {}):
            log.warning(
                "%s: the queue has no redrive policy, so what can't be read comes back until it is too old; "
                "give it a dead-letter queue.",
                self.label,
            )

    async def next(self) -> Batch | None:
        """Up to ten messages; None when none comes within the wait.

        Raises:
            SourceAway: AWS can't be reached.
        """
        reply = await self._call(
            "receive_message",
            MaxNumberOfMessages=_MESSAGES,
            WaitTimeSeconds=self._settings.wait,
            VisibilityTimeout=self._settings.visibility,
            MessageSystemAttributeNames=["SentTimestamp", "MessageGroupId"],
            MessageAttributeNames=["All"],
        )
        batch = Batch(receipt=[])
        for message in reply.get("Messages", []):
            try:
                events = self._read(message)
            except (ValueError, RecursionError) as error:  # a ValidationError is a ValueError
                self._tell(message, error)
                continue
            batch.events += events
            batch.receipt.append(message)
        return batch if batch.receipt else None

    async def keep(self, batch: Batch) -> None:
        """Keep the messages from other readers, again and again, before their time is up."""
        while True:
            await asyncio.sleep(self._settings.visibility / 3)
            with contextlib.suppress(SourceAway):  # there are two more times before it is up
                await self._visible_in(batch, self._settings.visibility)

    async def done(self, batch: Batch) -> None:
        """Delete the messages.

        Raises:
            SourceAway: AWS can't be reached.
        """
        entries = [
            {"Id": str(n), "ReceiptHandle": message["ReceiptHandle"]}
            for n, message in enumerate(batch.receipt)
        ]
        reply = await self._call("delete_message_batch", Entries=entries)
        if failed := reply.get("Failed", []):
            codes = ", ".join(sorted({entry["Code"] for entry in failed}))
            log.warning(
                "%s: %s messages were handed over and not deleted (%s); they come again, for nothing.",
                self.label,
                len(failed),
                codes,
            )

    async def release(self, batch: Batch) -> None:
        """Let others have the messages at once.

        Raises:
            SourceAway: AWS can't be reached; they can have them when their time is up.
        """
        await self._visible_in(batch, 0)

    async def close(self) -> None:
        """Let go of the connections."""
        if self._sqs is not None:
            self._sqs.close()

    async def _visible_in(self, batch: Batch, seconds: int) -> None:
        entries = [
            {"Id": str(n), "ReceiptHandle": message["ReceiptHandle"], "VisibilityTimeout": seconds}
            for n, message in enumerate(batch.receipt)
        ]
        await self._call("change_message_visibility_batch", Entries=entries)

    def _read(self, message: dict[str, Any]) -> list[EltEvent]:
        """What a message tells.

        Raises:
            ValueError: It can't be read; says why, without a word of the message.
        """
        text: str = message["Body"]
        if len(text.encode()) > _BYTES:
            raise ValueError(f"its body has more than {_BYTES // 1024} KiB")
        try:
            body = json.loads(text)
        except ValueError:
            raise ValueError("its body is not JSON") from None
        events = s3_events(body, encoded_keys=self._settings.encoded_keys)
        if events is not None:
            return events
        if self._settings.expects == "s3":
            raise ValueError("it is no notification of S3's")
        if not isinstance(body, dict):
            raise ValueError("its body is not a JSON object")  # noqa: TRY004 - the message is wrong, not a type
        system = message.get("Attributes", {})
        try:
            return [
                EltEvent(
                    name=RECEIVED,
                    key=bounded(f"sqs:{self._queue_name}/{message['MessageId']}"),
                    occurred=datetime.fromtimestamp(int(system.get("SentTimestamp", 0)) / 1000, UTC),
                    resource_id=f"elt.sqs.queue.{self._queue_name}",
                    resource_name=self._queue_name,
                    payload={
                        "queue": self._queue_name,
                        "message_id": message["MessageId"],
                        "group": system.get("MessageGroupId"),
                        "attributes": {
                            name: given["StringValue"]
                            for name, given in message.get("MessageAttributes", {}).items()
                            if "StringValue" in given
                        },
                        "body": body,
                    },
                )
            ]
        except ValidationError as error:
            raise ValueError(error.errors(include_input=False)[0]["msg"]) from None

    def _tell(self, message: dict[str, Any], error: Exception) -> None:
        message_id = message["MessageId"]
        if message_id not in self._told:
            why = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
            log.error(
                "%s: message %s can't be read: %s. It is left to the queue's redrive policy.",
                self.label,
                message_id,
                why,
            )
        self._told[message_id] = None
        self._told.move_to_end(message_id)
        if len(self._told) > _TOLD:
            self._told.popitem(last=False)

    @property
    def _queue_name(self) -> str:
        return self._url.rstrip("/").rsplit("/", 1)[-1]

    async def _client(self) -> Any:
        settings = self._settings
        block = (
            await saved_block(AwsCredentials, settings.credentials)
            if settings.credentials
            else AwsCredentials()
        )
        session = await self._in_thread(block.get_boto3_session)
        parameters = block.aws_client_parameters.get_params_override()
        if settings.region:
            parameters = {**parameters, "region_name": settings.region}
        return await self._in_thread(lambda: session.client("sqs", **parameters))

    async def _find(self) -> str:
        if "://" in self._settings.queue:
            return self._settings.queue
        reply = await self._in_thread(lambda: self._sqs.get_queue_url(QueueName=self._settings.queue))
        return str(reply["QueueUrl"])

    async def _call(self, operation: str, **arguments: Any) -> dict[str, Any]:
        method = getattr(self._sqs, operation)
        reply: dict[str, Any] = await self._in_thread(lambda: method(QueueUrl=self._url, **arguments))
        return reply

    async def _in_thread(self, function: Callable[[], T]) -> T:
        """Boto3 off the event loop, and its errors in one sentence without account, key id or signature."""
        try:
            return await anyio.to_thread.run_sync(function, abandon_on_cancel=True)
        except ClientError as error:
            code = str(error.response.get("Error", {}).get("Code", ""))
            if code in _NOT_THERE:
                raise ListenError(f"there is no queue {self._settings.queue}.") from None
            if code in _REFUSED:
                raise ListenError(
                    f"the credentials may not use the queue {self._settings.queue} ({code}); "
                    "docs/events/sqs.md says what they need."
                ) from None
            raise SourceAway(f"SQS answered {code or 'with an error'}.") from None
        except BotoCoreError as error:
            kind = type(error).__name__
            if kind in ("NoCredentialsError", "NoRegionError", "PartialCredentialsError", "ProfileNotFound"):
                raise ListenError(f"no usable AWS credentials or region ({kind}).") from None
            raise SourceAway(f"SQS can't be reached ({kind}).") from None
