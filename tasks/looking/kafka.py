"""Kafka topics, listened to: an offset is committed only when its message was handed over.

Committed is by hand, after each hand-over and for the partitions that are still ours. A message that was
handed over and not committed (a crash, a rebalance) comes again with the same topic, partition, offset and
timestamp, so it is the same event and starts nothing twice. While handing over takes long, the partitions are
paused and polled on, so that the group does not take this consumer for dead.

Needs the extra `kafka` (confluent-kafka).

Vendor documentation: https://docs.confluent.io/platform/current/clients/confluent-kafka-python/html/index.html
"""

from __future__ import annotations

import asyncio
import base64
import json
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from pydantic import Field, JsonValue, ValidationError

from blocks.kafka import KafkaCluster
from tasks.events import EltEvent
from tasks.looking.events import bounded
from tasks.looking.listener import Batch, ListenError, ListenerSettings, SourceAway, log, saved_block

if TYPE_CHECKING:
    from confluent_kafka import Consumer, KafkaError, Message, TopicPartition

RECEIVED = "elt.kafka.message.received"
_AT_ONCE = 100  # messages in one hand-over
_PATIENCE = 2.0  # seconds of handing over after which the partitions are paused and polled on
_LOOK = 10.0  # seconds for a question to the cluster
_BYTES = 256 * 1024  # of a value: a run's parameters may have 512 KiB
T = TypeVar("T")


class KafkaTopics(ListenerSettings):
    """Topics to listen to."""

    source: Literal["kafka"] = "kafka"
    cluster: str = Field(min_length=1, description="Name of a saved Kafka Cluster block.")
    topics: list[str] = Field(min_length=1, description="By name.")
    group: str = Field(
        min_length=1, description="The consumer group: each of its members reads some of the partitions."
    )
    value: Literal["json", "text", "base64"] = Field(
        default="json", description="How a message's value becomes the event's: parsed, or as it is."
    )
    start: Literal["now", "beginning"] = Field(
        default="now", description="Where a group begins that has committed nothing yet."
    )


class KafkaSource:
    """Topics as `listen` takes them.

    Args:
        settings: Which.
    """

    def __init__(self, settings: KafkaTopics) -> None:
        self._settings = settings
        self._cluster: KafkaCluster | None = None
        self._consumer: Consumer | None = None
        # The consumer's calls block and its callbacks come within them: all in one thread of its own.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"kafka-{settings.name}")
        self._aside: list[Message] = []
        self._paused = False
        self._down = False
        self._refused = ""
        self._unmarked = False

    @property
    def label(self) -> str:
        """What logs call it."""
        return f"kafka {self._settings.name}"

    async def connect(self) -> None:
        """Join the group.

        Raises:
            ListenError: A topic is not there, the sign-in is refused, or confluent-kafka is not installed.
            SourceAway: No broker can be reached.
        """
        if self._cluster is None:
            self._cluster = await saved_block(KafkaCluster, self._settings.cluster)
        await self._in_thread(self._join)

    async def next(self) -> Batch | None:
        """Messages, or None when none comes within a second.

        Raises:
            SourceAway: The cluster refused to go on.
        """
        messages = await self._in_thread(self._consume)
        if not messages:
            return None
        return Batch([self._event(message) for message in messages], receipt=messages)

    async def keep(self, batch: Batch) -> None:
        """Stay in the group, with the partitions paused."""
        await asyncio.sleep(_PATIENCE)
        while True:
            await self._in_thread(self._pause_and_poll)
            await asyncio.sleep(1.0)

    async def done(self, batch: Batch) -> None:
        """Commit what is after the last message of each partition.

        Raises:
            SourceAway: It can't be committed; the same messages come again.
        """
        await self._in_thread(lambda: self._commit(batch.receipt))

    async def release(self, batch: Batch) -> None:
        """Nothing to do: what is not committed comes again."""

    async def close(self) -> None:
        """Leave the group, so that others take the partitions at once."""
        await self._in_thread(self._leave)
        self._thread.shutdown(wait=False)

    # -- in the consumer's thread

    def _join(self) -> None:
        try:
            from confluent_kafka import Consumer
        except ImportError:
            raise ListenError(
                "confluent-kafka is not installed: `pip install '.[kafka]'` in the checkout of elt-flows."
            ) from None
        if self._cluster is None:
            raise ListenError("the block of the cluster was not loaded.")
        self._leave()
        self._refused = ""
        quiet = logging.getLogger("elt.listen.librdkafka")
        quiet.setLevel(logging.ERROR)  # what it warns of comes to `_trouble` as well
        try:
            consumer = Consumer(
                {
                    **self._cluster.librdkafka(),
                    "group.id": self._settings.group,
                    "enable.auto.commit": False,
                    "enable.auto.offset.store": False,
                    "auto.offset.reset": "earliest" if self._settings.start == "beginning" else "latest",
                    "error_cb": self._trouble,
                },
                logger=quiet,
            )
        except _errors() as error:
            raise ListenError(f"librdkafka does not take the settings of the block: {_said(error)}") from None
        self._consumer = consumer
        there = consumer.list_topics(timeout=_LOOK).topics
        if missing := [topic for topic in self._settings.topics if topic not in there]:
            raise ListenError(
                f"there is no topic {', '.join(missing)}, or the block's user may not describe it."
            )
        consumer.subscribe(self._settings.topics, on_assign=self._assigned, on_revoke=self._revoked)

    def _assigned(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        from confluent_kafka import KafkaException

        try:
            self._mark(consumer, partitions)
        except KafkaException:  # must not leave the callback, which is called from C; `_consume` tries again
            self._unmarked = True

    def _mark(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        """Write down where we begin, so that what comes while nobody listens is not passed over later."""
        from confluent_kafka import OFFSET_INVALID, TopicPartition

        begin = []
        for found in consumer.committed(partitions, timeout=_LOOK) if partitions else ():
            if found.offset == OFFSET_INVALID:
                low, high = consumer.get_watermark_offsets(found, timeout=_LOOK)
                offset = low if self._settings.start == "beginning" else high
                begin.append(TopicPartition(found.topic, found.partition, offset))
        if begin:
            consumer.commit(offsets=begin, asynchronous=False)

    def _revoked(self, _consumer: Consumer, partitions: list[TopicPartition]) -> None:
        gone = {(one.topic, one.partition) for one in partitions}
        self._aside = [m for m in self._aside if (m.topic(), m.partition()) not in gone]

    def _consume(self) -> list[Message]:
        consumer = self._joined()
        if self._paused:
            consumer.resume(consumer.assignment())
            self._paused = False
        if self._aside:
            messages, self._aside = self._aside, []
        else:
            self._mark_again(consumer)
            messages = consumer.consume(_AT_ONCE, timeout=1.0)
        good = []
        for message in messages:
            if (error := message.error()) is None:
                good.append(message)
            elif not error.retriable():
                raise SourceAway(f"Kafka answered: {error.str()}.")
        if good and self._down:
            self._down = False
            log.info("%s: Kafka is back", self.label)
        return good

    def _mark_again(self, consumer: Consumer) -> None:
        """Write down where we begin, if that failed when the partitions were given to us."""
        from confluent_kafka import KafkaError, KafkaException

        if not self._unmarked:
            return
        try:
            self._mark(consumer, consumer.assignment())
        except KafkaException as error:
            moving = (
                KafkaError.REBALANCE_IN_PROGRESS,
                KafkaError.ILLEGAL_GENERATION,
                KafkaError.UNKNOWN_MEMBER_ID,
            )
            # Partitions that are just being taken away again are written down by whoever gets them.
            if error.args[0].code() not in moving:
                raise
        else:
            self._unmarked = False

    def _pause_and_poll(self) -> None:
        consumer = self._joined()
        consumer.pause(consumer.assignment())
        self._paused = True
        # A partition that has just been given to us may not be paused yet: what it brings is not lost.
        if (message := consumer.poll(0)) is not None and message.error() is None:
            self._aside.append(message)

    def _commit(self, messages: list[Message]) -> None:
        from confluent_kafka import TopicPartition

        consumer = self._joined()
        ours = {(one.topic, one.partition) for one in consumer.assignment()}
        after: dict[tuple[str, int], int] = {}
        for message in messages:
            place = (str(message.topic()), int(message.partition() or 0))
            after[place] = max(after.get(place, 0), int(message.offset() or 0) + 1)
        offsets = [TopicPartition(*place, offset) for place, offset in after.items() if place in ours]
        if offsets:
            consumer.commit(offsets=offsets, asynchronous=False)
        if len(offsets) < len(after):
            log.info("%s: another consumer of the group has taken over partitions in hand", self.label)

    def _leave(self) -> None:
        consumer, self._consumer = self._consumer, None
        self._aside, self._paused = [], False
        if consumer is not None:
            consumer.close()

    def _joined(self) -> Consumer:
        if self._consumer is None:
            raise SourceAway("The consumer was closed.")
        return self._consumer

    def _trouble(self, error: KafkaError) -> None:
        """What librdkafka goes on to repair by itself; said once."""
        from confluent_kafka import KafkaError

        if error.code() in (KafkaError._AUTHENTICATION, KafkaError._SSL):  # noqa: SLF001 - its own names
            self._refused = error.str()
        elif error.code() == KafkaError._ALL_BROKERS_DOWN and not self._down:  # noqa: SLF001 - as above
            self._down = True
            log.warning("%s: no broker can be reached; waiting.", self.label)

    async def _in_thread(self, function: Callable[[], T]) -> T:
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._thread, function)
        except _errors() as error:
            if self._refused:
                raise ListenError(f"Kafka refused the sign-in: {self._refused[:200]}") from None
            raise SourceAway(f"Kafka: {_said(error)}.") from None

    # -- what a message means

    def _event(self, message: Message) -> EltEvent:
        value, problem = self._value(message.value())
        try:
            event = self._with(message, value, problem)
        except ValidationError:
            problem = "its value, key or headers hold what no event can carry"
            event = self._with(message, None, problem, bare=True)
        if problem:
            log.error("%s: %s: %s. It is handed over without its value.", self.label, event.key, problem)
        return event

    def _value(self, raw: Any) -> tuple[JsonValue, str | None]:
        if raw is None:  # a tombstone
            return None, None
        data = raw if isinstance(raw, bytes) else str(raw).encode()
        if len(data) > _BYTES:
            return None, f"its value has more than {_BYTES // 1024} KiB"
        if self._settings.value == "base64":
            return base64.b64encode(data).decode(), None
        try:
            text = data.decode()
            return (json.loads(text) if self._settings.value == "json" else text), None
        except UnicodeDecodeError:
            return None, "its value is not UTF-8"
        except (ValueError, RecursionError):
            return None, "its value is not JSON"

    def _with(
        self, message: Message, value: JsonValue, problem: str | None, *, bare: bool = False
    ) -> EltEvent:
        topic, partition, offset = message.topic(), message.partition(), message.offset()
        _, milliseconds = message.timestamp()
        headers = [] if bare else list(message.headers() or [])
        return EltEvent(
            name=RECEIVED,
            # With the time: a topic that was deleted and made anew begins at 0 again.
            key=bounded(f"kafka:{topic}/{partition}/{offset}@{milliseconds}"),
            occurred=datetime.fromtimestamp(max(milliseconds, 0) / 1000, UTC),
            resource_id=f"elt.kafka.topic.{topic}",
            resource_name=str(topic),
            payload={
                "topic": topic,
                "partition": partition,
                "offset": offset,
                "key": None if bare else _text(message.key()),
                "headers": {name: _text(header) for name, header in headers},
                "value": value,
                "problem": problem,
            },
        )


def _errors() -> tuple[type[Exception], ...]:
    try:
        from confluent_kafka import KafkaException
    except ImportError:
        return ()
    return (KafkaException,)


def _said(error: BaseException) -> str:
    inner = error.args[0] if error.args else error
    return str(inner.str() if hasattr(inner, "str") else inner)[:300].rstrip(".")


def _text(raw: Any) -> str | None:
    return raw.decode(errors="replace") if isinstance(raw, bytes) else raw
