"""Kafka topics, listened to on librdkafka's own mock cluster: an offset is committed after the hand-over."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Any
from uuid import uuid4

import pytest
from confluent_kafka import Consumer, Producer, TopicPartition
from pydantic import ValidationError

from blocks import KafkaCluster
from tasks.events import EltEvent, HandedOver, HandOverError, hand_over
from tasks.looking import kafka
from tasks.looking.kafka import RECEIVED, KafkaSource, KafkaTopics
from tasks.looking.listener import BackOff, ListenError, listen
from tests.jobs_fixtures import PREFECTS_SOCKETS, collected
from tests.looking_fixtures import Listening, Target, child, listening, target

__all__ = ["child", "collected", "listening", "target"]

pytestmark = PREFECTS_SOCKETS
QUICK = BackOff(first=0.05, most=0.5)
# The mock cluster keeps a killed member's partitions for as long as its session.
SETTINGS: dict[str, str | int | bool] = {"session.timeout.ms": 6000, "heartbeat.interval.ms": 500}


class Cluster:
    """A cluster inside of a producer, which speaks Kafka's protocol on a socket."""

    def __init__(self) -> None:
        self.producer = Producer({"test.mock.num.brokers": 1, "bootstrap.servers": "ignored", "log_level": 0})
        (broker,) = self.producer.list_topics(timeout=30).brokers.values()
        self.address = f"{broker.host}:{broker.port}"

    def topic(self) -> str:
        name = f"orders-{uuid4().hex[:8]}"
        self.producer.list_topics(name, timeout=30)  # makes it
        return name

    def send(self, topic: str, *values: bytes | None, **more: Any) -> None:
        for value in values:
            self.producer.produce(topic, value, **more)
        assert self.producer.flush(30) == 0

    def committed(self, topic: str, group: str) -> int:
        """How many messages the group has behind it, over all partitions."""
        reader = Consumer({"bootstrap.servers": self.address, "group.id": group, "log_level": 0})
        try:
            parts = self.producer.list_topics(topic, timeout=30).topics[topic].partitions
            found = reader.committed([TopicPartition(topic, part) for part in parts], timeout=30)
            return sum(max(0, one.offset) for one in found)
        finally:
            reader.close()


@pytest.fixture(scope="module")
def cluster(prefect_server: str) -> Cluster:
    made = Cluster()
    KafkaCluster(bootstrap_servers=made.address, settings=SETTINGS).save("mock", overwrite=True)
    return made


@pytest.fixture
def topic(cluster: Cluster) -> str:
    return cluster.topic()


def settings(topic: str, **more: Any) -> dict[str, Any]:
    said = {"source": "kafka", "name": "orders", "cluster": "mock", "topics": [topic], "group": topic}
    return {**said, "start": "beginning", **more}


async def listened(
    topic: str,
    until: Callable[[], bool],
    hand: Callable[[Sequence[EltEvent]], Any],
    **more: Any,
) -> None:
    """Listen until something is so."""
    stop = asyncio.Event()

    async def watch() -> None:
        deadline = time.monotonic() + 90
        while not await asyncio.to_thread(until):
            assert time.monotonic() < deadline
            await asyncio.sleep(0.05)
        stop.set()

    source = KafkaSource(KafkaTopics(**settings(topic, **more)))
    async with asyncio.TaskGroup() as group:
        group.create_task(listen(source, hand, stop, back_off=QUICK))
        group.create_task(watch())


class Hand:
    """Notes what is handed over."""

    def __init__(self) -> None:
        self.events: list[EltEvent] = []

    async def __call__(self, events: Sequence[EltEvent]) -> list[HandedOver]:
        self.events += events
        return [HandedOver(event_id=event.id) for event in events]

    @property
    def payloads(self) -> list[Any]:
        return [event.payload for event in self.events]


async def test_each_message_is_an_event(cluster: Cluster, topic: str) -> None:
    """Key, headers and value are in the payload; what can't be carried is said and blocks nothing."""
    cluster.send(topic, b'{"n": 1}', key="k", headers={"h": b"v"}, partition=0)
    cluster.send(topic, None, b"no JSON", b"\xff", b'"\\u0000"', b"1" * 300_000, partition=0)
    hand = Hand()
    await listened(topic, lambda: len(hand.events) == 6, hand)
    first, *others = hand.payloads
    assert first | {"offset": 0} == {
        "topic": topic,
        "partition": 0,
        "offset": 0,
        "key": "k",
        "headers": {"h": "v"},
        "value": {"n": 1},
        "problem": None,
    }
    assert [payload["value"] for payload in others] == [None] * 5
    assert [payload["problem"] for payload in others] == [
        None,
        "its value is not JSON",
        "its value is not UTF-8",
        "its value, key or headers hold what no event can carry",
        "its value has more than 256 KiB",
    ]
    assert hand.events[0].key.startswith(f"kafka:{topic}/0/0@")
    assert hand.events[0].resource_id == f"elt.kafka.topic.{topic}"


@pytest.mark.parametrize(("kind", "value"), [("text", "[1"), ("base64", "WzE=")])
async def test_raw_values(cluster: Cluster, topic: str, kind: str, value: str) -> None:
    """A value may be taken as it is."""
    cluster.send(topic, b"[1")
    hand = Hand()
    await listened(topic, lambda: bool(hand.events), hand, value=kind)
    assert hand.payloads[0]["value"] == value


async def test_nothing_is_committed_before_the_server_has_it(
    cluster: Cluster, topic: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the Prefect server is away the offset stays; the consumer stays in its group, and goes on."""
    monkeypatch.setattr(kafka, "_PATIENCE", 0.1)
    cluster.send(topic, b"1", b"2")
    hand, tries = Hand(), 0

    async def away(events: Sequence[EltEvent]) -> list[HandedOver]:
        nonlocal tries
        tries += 1
        if tries <= 8:
            assert await asyncio.to_thread(cluster.committed, topic, topic) == 0
            if tries == 4:
                await asyncio.to_thread(cluster.send, topic, b"3")
            raise HandOverError("the Prefect server can't be reached")
        return await hand(events)

    await listened(topic, lambda: cluster.committed(topic, topic) == 3, away)
    assert sorted(payload["value"] for payload in hand.payloads) == [1, 2, 3]


async def test_begins_now_and_misses_nothing_since(cluster: Cluster, topic: str) -> None:
    """A new group begins at the end, and from then on gets also what came while it was away."""
    cluster.send(topic, b"1", partition=0)
    hand = Hand()
    await listened(topic, lambda: cluster.committed(topic, topic) == 1, hand, start="now")
    cluster.send(topic, b"2", partition=0)
    await listened(topic, lambda: bool(hand.events), hand, start="now")
    assert [payload["value"] for payload in hand.payloads] == [2]


async def test_two_share_the_work(cluster: Cluster, topic: str) -> None:
    """A second consumer takes over partitions; what is in hand then is at most handed over again."""
    hand, count = Hand(), 40
    cluster.send(topic, *(str(n).encode() for n in range(count)))
    done = [cluster.committed, topic, topic]

    async def slowly(events: Sequence[EltEvent]) -> list[HandedOver]:
        await asyncio.sleep(1.0)
        return await hand(events)

    def all_done() -> bool:
        return done[0](*done[1:]) == count + 20  # type: ignore[operator]

    async def more() -> None:
        await asyncio.sleep(2)
        await asyncio.to_thread(cluster.send, topic, *(str(n).encode() for n in range(count, count + 20)))

    await asyncio.gather(listened(topic, all_done, slowly), listened(topic, all_done, slowly), more())
    assert {payload["value"] for payload in hand.payloads} == set(range(count + 20))
    places = {event.id: event.payload["value"] for event in hand.events}
    assert sorted(map(int, places.values())) == list(range(count + 20))


@pytest.mark.timeout(240)
def test_killed_between_hand_over_and_commit(
    cluster: Cluster, topic: str, target: Target, listening: Listening
) -> None:
    """The same events come again after the kill, and start no second run; SIGTERM ends it cleanly."""
    cluster.send(topic, *(str(n).encode() for n in range(10)))
    never = "import time, tasks.looking.kafka as k; k.KafkaSource._commit = lambda *_: time.sleep(600)"
    first = listening.start(settings(topic), RECEIVED, patch=never)
    first.until("runs are there", lambda: len(target.runs()) > 0)
    first.kill()
    assert cluster.committed(topic, topic) == 0
    cluster.send(topic, b"10")
    second = listening.start(settings(topic), RECEIVED)
    second.until("all is committed", lambda: cluster.committed(topic, topic) == 11)
    assert second.terminate() == 0
    assert sorted(payload["value"] for payload in target.payloads()) == list(range(11))
    assert "kafka orders: stopped" in second.log.read_text()


@pytest.mark.parametrize(
    ("said", "words"),
    [({"topics": ["none-such"]}, "no topic none-such"), ({"cluster": "none-such"}, "'none-such'")],
)
async def test_wrong_settings_are_said_at_once(
    cluster: Cluster, topic: str, said: dict[str, Any], words: str
) -> None:
    """A topic or block that is not there ends the listener."""
    source = KafkaSource(KafkaTopics(**settings(topic, **said)))
    with pytest.raises(ListenError, match=words):
        await listen(source, hand_over, asyncio.Event())  # type: ignore[arg-type]


async def test_wrong_librdkafka_setting_is_said(cluster: Cluster, topic: str) -> None:
    """A setting that librdkafka does not know ends the listener, with its name."""
    await KafkaCluster(bootstrap_servers="a:1", settings={"no.such": 1}).save("odd", overwrite=True)
    source = KafkaSource(KafkaTopics(**settings(topic, cluster="odd")))
    with pytest.raises(ListenError, match=r"no\.such"):
        await listen(source, hand_over, asyncio.Event())  # type: ignore[arg-type]


@pytest.mark.no_server
@pytest.mark.parametrize(
    "said",
    [
        {"security_protocol": "SASL_SSL"},
        {"username": "u", "password": "hush-hush"},
        {"settings": {"sasl.password": "hush-hush"}},
    ],
)
def test_wrong_cluster_is_refused(said: dict[str, Any]) -> None:
    """A sign-in must be whole, and its password in its own field; the error does not repeat it."""
    with pytest.raises(ValidationError) as caught:
        KafkaCluster(bootstrap_servers="broker:9092", **said)
    assert "hush" not in str(caught.value)


@pytest.mark.no_server
def test_sign_in_reaches_librdkafka() -> None:
    """The block's fields become librdkafka's settings, and its repr keeps the password."""
    block = KafkaCluster(
        bootstrap_servers="broker:9092",
        security_protocol="SASL_SSL",
        sasl_mechanism="PLAIN",
        username="key",
        password="hush-hush",
        settings={"ssl.ca.location": "/ca.pem"},
    )
    assert block.librdkafka() == {
        "bootstrap.servers": "broker:9092",
        "security.protocol": "SASL_SSL",
        "sasl.mechanism": "PLAIN",
        "sasl.username": "key",
        "sasl.password": "hush-hush",
        "ssl.ca.location": "/ca.pem",
    }
    assert "hush" not in repr(block)
