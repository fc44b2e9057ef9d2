"""SQS, listened to: what S3 says and what others say, deleted only when it was handed over."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from moto.server import ThreadedMotoServer

from deployments.listen import LISTENERS, main, read_listeners, source_of
from sandbox.stage import free_port
from tasks.events import EltEvent, HandedOver, HandOverError, hand_over
from tasks.looking.kafka import KafkaTopics
from tasks.looking.listener import BackOff, Batch, ListenError, SourceAway, listen
from tasks.looking.notices import CREATED, s3_events
from tasks.looking.sqs import RECEIVED, SqsQueue, SqsSource
from tests.jobs_fixtures import PREFECTS_SOCKETS, collected, until
from tests.looking_fixtures import (
    Child,
    Listening,
    Target,
    aws,
    aws_client,
    child,
    credentials,
    listening,
    target,
)

__all__ = ["aws", "child", "collected", "listening", "target"]

pytestmark = PREFECTS_SOCKETS
QUICK = BackOff(first=0.05, most=0.2)
RECORD = {
    "eventVersion": "2.1",
    "eventSource": "aws:s3",
    "eventTime": "2026-11-21T06:00:00.000Z",
    "eventName": "ObjectCreated:Put",
    "s3": {
        "bucket": {"name": "landing"},
        "object": {"key": "in/red+flower%2B.csv", "size": 3, "eTag": "abc", "sequencer": "00A1"},
    },
}
NOTIFICATION = {"Records": [RECORD]}
BRIDGE = {
    "version": "0",
    "source": "aws.s3",
    "detail-type": "Object Created",
    "time": "2026-11-21T06:00:00Z",
    "detail": {
        "bucket": {"name": "landing"},
        "object": {"key": "in/red flower+.csv", "size": 3, "etag": "abc", "sequencer": "00A1"},
        "reason": "PutObject",
    },
}


class Queue:
    """A queue of its own, with a dead-letter queue."""

    def __init__(self, endpoint: str) -> None:
        self.sqs, self.name = aws_client("sqs", endpoint), f"queue-{uuid4().hex[:8]}"
        dead = self.sqs.create_queue(QueueName=f"{self.name}-dead")["QueueUrl"]
        arn = self.sqs.get_queue_attributes(QueueUrl=dead, AttributeNames=["QueueArn"])["Attributes"]
        policy = {"deadLetterTargetArn": arn["QueueArn"], "maxReceiveCount": "2"}
        attributes = {"RedrivePolicy": json.dumps(policy)}
        self.url = self.sqs.create_queue(QueueName=self.name, Attributes=attributes)["QueueUrl"]
        self.dead = dead
        self.block = self.name
        credentials(endpoint).save(self.block)

    def settings(self, **more: Any) -> SqsQueue:
        said = {"name": "orders", "queue": self.name, "credentials": self.block, "wait": 1, **more}
        # Not validated: a test need not wait for the shortest visibility that is allowed.
        return SqsQueue.model_construct(**{**SqsQueue(name="a", queue="b").model_dump(), **said})

    def send(self, *bodies: Any) -> None:
        for body in bodies:
            text = body if isinstance(body, str) else json.dumps(body)
            self.sqs.send_message(QueueUrl=self.url, MessageBody=text)

    def left(self, url: str | None = None) -> int:
        """Messages that are not deleted, whoever has them."""
        names = ["ApproximateNumberOfMessages", "ApproximateNumberOfMessagesNotVisible"]
        counts = self.sqs.get_queue_attributes(QueueUrl=url or self.url, AttributeNames=names)["Attributes"]
        return sum(int(counts[name]) for name in names)

    def free(self) -> int:
        """Messages that another reader would get now."""
        got = self.sqs.receive_message(QueueUrl=self.url, MaxNumberOfMessages=10, VisibilityTimeout=0)
        return len(got.get("Messages", []))


@pytest.fixture
def queue(aws: str, prefect_server: str) -> Iterator[Queue]:
    made = Queue(aws)
    yield made
    made.sqs.close()


async def listened(
    settings: SqsQueue,
    target: Target,
    happened: Callable[[], bool],
    hand: Callable[[Sequence[EltEvent]], Any] | None = None,
) -> None:
    """Listen until something is so."""
    stop = asyncio.Event()
    triggers = [target.trigger(CREATED, RECEIVED)]

    async def really(events: Sequence[EltEvent]) -> list[HandedOver]:
        return await hand_over(events, triggers)

    async def watch() -> None:
        deadline = time.monotonic() + 90
        while not await asyncio.to_thread(happened):
            assert time.monotonic() < deadline
            await asyncio.sleep(0.05)
        stop.set()

    async with asyncio.TaskGroup() as group:
        group.create_task(listen(SqsSource(settings), hand or really, stop, back_off=QUICK))
        group.create_task(watch())


async def test_what_is_read(queue: Queue, target: Target) -> None:
    """S3's words become objects, in any envelope and once; other JSON becomes messages; all are deleted."""
    wrapped = {"Type": "Notification", "Message": json.dumps(NOTIFICATION)}
    queue.send(NOTIFICATION, wrapped, BRIDGE, {"Event": "s3:TestEvent", "Bucket": "landing"}, {"order": 7})
    await listened(queue.settings(), target, lambda: queue.left() == 0)
    by_body = {("body" in payload): payload for payload in target.payloads()}
    assert len(target.runs()) == 2
    assert by_body[False]["uri"] == "s3://landing/in/red flower+.csv"
    assert by_body[False]["etag"] == "abc"
    assert by_body[True]["body"] == {"order": 7}
    assert by_body[True]["queue"] == queue.name


@pytest.mark.no_server
@pytest.mark.parametrize(
    ("body", "keys"),
    [
        (NOTIFICATION, ["in/red flower+.csv"]),
        ({"Records": [RECORD, RECORD | {"eventName": "ObjectRemoved:Delete"}]}, ["in/red flower+.csv"]),
        (BRIDGE, ["in/red flower+.csv"]),
        (BRIDGE | {"detail-type": "Object Deleted"}, []),
        ({"Event": "s3:TestEvent"}, []),
        ({"Records": [{"dynamodb": {}}]}, None),
        ({"Records": [{"s3": {}}]}, None),
        ({"Records": ["s3"]}, None),
        ({"Type": "Notification", "Message": "no JSON"}, None),
        ({"Type": "Notification", "Message": json.dumps({"Type": "Notification"})}, None),
        ({}, None),
        ([], None),
        ("text", None),
    ],
)
def test_shapes(body: Any, keys: list[str] | None) -> None:
    """Each shape is told from the others; nothing else is taken for S3's."""
    events = s3_events(body)
    assert (events if events is None else [event.payload["key"] for event in events]) == keys


@pytest.mark.no_server
def test_two_ways_one_event() -> None:
    """What comes by EventBridge and by a notification is the same event; another writing is another."""
    (one,), (other,) = s3_events(NOTIFICATION) or (), s3_events(BRIDGE) or ()
    assert one.id == other.id
    assert one.occurred == datetime(2026, 11, 21, 6, tzinfo=UTC)
    later = {**BRIDGE["detail"]["object"], "sequencer": "00A2"}  # type: ignore[index]
    (again,) = s3_events(BRIDGE | {"detail": {**BRIDGE["detail"], "object": later}}) or ()  # type: ignore[dict-item]
    assert again.id != one.id
    plain = {**RECORD, "s3": {"bucket": {"name": "b"}, "object": {"key": "a+b%20.csv"}}}
    (unencoded,) = s3_events({"Records": [plain]}, encoded_keys=False) or ()
    assert unencoded.payload["key"] == "a+b%20.csv"


async def test_nothing_is_deleted_before_the_server_has_it(
    queue: Queue, target: Target, caplog: pytest.LogCaptureFixture
) -> None:
    """While the Prefect server is away messages stay ours and undeleted; then each starts one run."""
    queue.send({"n": 1}, {"n": 2})
    triggers, tries = [target.trigger(RECEIVED)], 0

    async def hand(events: Sequence[EltEvent]) -> list[HandedOver]:
        nonlocal tries
        tries += 1
        if tries <= 3:
            assert queue.left() == 2
            raise HandOverError("the Prefect server can't be reached")
        return await hand_over(events, triggers)

    with caplog.at_level(logging.INFO, "elt.listen"):
        await listened(queue.settings(), target, lambda: queue.left() == 0, hand)
    assert sorted(payload["body"]["n"] for payload in target.payloads()) == [1, 2]
    assert caplog.text.count("can't be reached. Nothing is acknowledged") == 1


async def test_slow_hand_over_keeps_the_messages(queue: Queue, target: Target) -> None:
    """While handing over takes longer than the visibility, no other reader gets the message."""
    queue.send({"n": 1})
    seen: list[int] = []

    async def slow(events: Sequence[EltEvent]) -> list[HandedOver]:
        for _ in range(10):
            await asyncio.sleep(0.5)
            seen.append(await asyncio.to_thread(queue.free))
        return [HandedOver(event_id=event.id) for event in events]

    await listened(queue.settings(visibility=2), target, lambda: queue.left() == 0, slow)
    assert seen == [0] * 10


@pytest.mark.no_server
async def test_messages_are_kept_on_after_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    """SQS away for a moment is no end of the keeping: it is tried again before their time is up."""
    tries: list[float] = []
    enough = asyncio.Event()

    async def prolong(_: SqsSource, batch: Batch, seconds: int) -> None:
        tries.append(seconds)
        if len(tries) == 3:
            enough.set()
        if len(tries) < 3:
            raise SourceAway("SQS can't be reached.")

    monkeypatch.setattr(SqsSource, "_visible_in", prolong)
    settings = SqsQueue.model_construct(name="orders", queue="orders", visibility=1)
    keeping = asyncio.create_task(SqsSource(settings).keep(Batch([], receipt=[])))
    waiting = asyncio.create_task(enough.wait())
    await asyncio.wait([keeping, waiting], timeout=60, return_when=asyncio.FIRST_COMPLETED)
    keeping.cancel()
    waiting.cancel()
    assert tries[:3] == [1, 1, 1]


async def test_stopped_gives_messages_back(queue: Queue, target: Target) -> None:
    """Stopped while the Prefect server is away, it leaves the messages to other readers at once."""
    queue.send({"n": 1})
    tried = False

    async def away(_: Sequence[EltEvent]) -> list[HandedOver]:
        nonlocal tried
        tried = True
        raise HandOverError("the Prefect server can't be reached")

    await listened(queue.settings(visibility=600), target, lambda: tried, away)
    assert queue.free() == 1


@pytest.mark.parametrize("body", ["{broken", "[1]", '{"a": "\\u0000"}', "[" * 100_000])
async def test_poison_is_left_to_the_redrive_policy(
    queue: Queue, target: Target, body: str, caplog: pytest.LogCaptureFixture
) -> None:
    """What can't be read is said once, without a word of it, and becomes a dead letter; others pass."""
    queue.send(body, {"n": 1})
    settings = queue.settings(visibility=1)
    with caplog.at_level(logging.INFO, "elt.listen"):
        await listened(settings, target, lambda: queue.left(queue.dead) == 1 and queue.left() == 0)
    assert len(target.runs()) == 1
    assert caplog.text.count("can't be read: ") == 1
    assert body not in caplog.text


async def test_strangers_are_left_where_s3_is_expected(queue: Queue, target: Target) -> None:
    """A queue for S3 alone takes nothing else."""
    queue.send(NOTIFICATION, {"order": 7})
    settings = queue.settings(visibility=1, expects="s3")
    await listened(settings, target, lambda: queue.left(queue.dead) == 1 and queue.left() == 0)
    assert len(target.runs()) == 1


@pytest.mark.parametrize(
    ("said", "words"),
    [({"queue": "no-such"}, "there is no queue no-such"), ({"credentials": "none"}, "'none'")],
)
async def test_wrong_settings_are_said_at_once(
    queue: Queue, target: Target, said: dict[str, str], words: str
) -> None:
    """A queue or block that is not there ends the listener, with what is wrong."""
    with pytest.raises(ListenError, match=words):
        await listen(SqsSource(queue.settings(**said)), hand_over, asyncio.Event())  # type: ignore[arg-type]


async def test_queue_away_is_waited_out(
    queue: Queue, target: Target, caplog: pytest.LogCaptureFixture
) -> None:
    """A listener that begins while AWS can't be reached says so once, waits, and then listens."""
    port = free_port()
    await credentials(f"http://127.0.0.1:{port}").save(f"{queue.block}-later")
    queue.send({"n": 1})
    later = ThreadedMotoServer("127.0.0.1", port, verbose=False)  # has the same queues

    def away() -> bool:
        return "SQS can't be reached" in caplog.text

    with caplog.at_level(logging.INFO, "elt.listen"):
        async with asyncio.TaskGroup() as group:
            settings = queue.settings(credentials=f"{queue.block}-later")
            group.create_task(listened(settings, target, lambda: queue.left() == 0))
            await until(away, within=60)
            await asyncio.to_thread(later.start)
    later.stop()
    assert len(target.runs()) == 1
    assert caplog.text.count("SQS can't be reached") == 1


def test_one_that_cannot_begin_ends_the_command(
    queue: Queue, listening: Listening, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command says which listener is wrong and ends with 2, rather than going on without it."""
    wrong = {"source": "sqs", "name": "orders", "queue": "no-such", "credentials": queue.block}
    assert main(["--file", str(listening.files(wrong, RECEIVED))]) == 2
    assert capsys.readouterr().err == "sqs orders: there is no queue no-such.\n"


@pytest.mark.no_server
@pytest.mark.parametrize(
    ("listeners", "arguments", "said"),
    [
        ([{"source": "sqs", "name": "a", "queue": "q", "visibility": 1}], [], "listeners.a.sqs.visibility"),
        ([{"source": "sqs", "name": "a", "queue": "q", "secret": "hush"}], [], "listeners.a.sqs.secret"),
        ([{"source": "rabbit", "name": "a"}], [], "listeners.a: Input tag 'rabbit'"),
        ([{"source": "sqs", "name": "a", "queue": "q"}] * 2, [], "two listeners are called a"),
        ([{"source": "sqs", "name": "a", "queue": "q", "enabled": False}], [], "is enabled"),
        ([{"source": "sqs", "name": "a", "queue": "q"}], ["--only", "b"], "has no listener b; it has: a"),
        ([{"source": "sqs", "name": "a", "queue": "q"}], ["--env", "moon"], "there is no environment 'moon'"),
    ],
)
def test_wrong_file_is_said(
    tmp_path: Path, listeners: Any, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is wrong in the file or the arguments is said before anything is listened to."""
    file = tmp_path / "listeners.yaml"
    file.write_text(json.dumps({"listeners": listeners}))
    assert main(["--file", str(file), "--check", *arguments]) == 2
    assert said in (text := capsys.readouterr().err)
    assert "hush" not in text


@pytest.mark.no_server
def test_another_environment_does_not_take_productions_messages(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The queues of the shipped file are not read by `--env dev`; those of a file of its own are."""
    assert main(["--check", "--only", "landing", "--env", "dev"]) == 2
    assert "landing: SQS gives each message to one reader, so dev would take those" in capsys.readouterr().err
    assert main(["--check", "--only", "loads", "shop", "--env", "dev"]) == 0
    file = tmp_path / "listeners.yaml"
    file.write_text(json.dumps({"listeners": [{"source": "sqs", "name": "landing", "queue": "landing-dev"}]}))
    assert main(["--check", "--file", str(file), "--env", "dev"]) == 0


@pytest.mark.no_server
def test_an_environment_is_a_consumer_group_of_its_own() -> None:
    """In production's group it would be given some of production's partitions."""
    topics = KafkaTopics(name="loads", cluster="kafka", topics=["orders"], group="elt-flows")
    groups = [source_of(topics, prefix)._settings.group for prefix in ("", "dev.")]  # type: ignore[attr-defined]
    assert groups == ["elt-flows", "dev.elt-flows"]


@pytest.mark.no_server
def test_shipped_file_is_right() -> None:
    """The examples can be listened to as they are, once their blocks are there."""
    names = [one.name for one in read_listeners(LISTENERS).listeners]
    assert main(["--check", "--only", *names]) == 0


@pytest.mark.timeout(240)
def test_killed_and_terminated(queue: Queue, target: Target, listening: Listening) -> None:
    """Killed in the middle and started again, each message starts one run; SIGTERM ends it cleanly."""
    queue.send(*({"n": n} for n in range(120)))
    settings = {
        "source": "sqs",
        "name": "orders",
        "queue": queue.name,
        "credentials": queue.block,
        "visibility": 10,
        "wait": 1,
    }
    first: Child = listening.start(settings, RECEIVED)
    first.until("it is in the middle", lambda: len(target.runs()) > 20)
    first.kill()
    assert queue.left() > 0
    second = listening.start(settings, RECEIVED)
    second.until("the queue is empty", lambda: queue.left() == 0, within=150)
    assert second.terminate() == 0
    assert sorted(payload["body"]["n"] for payload in target.payloads()) == list(range(120))
    said = second.log.read_text()
    assert "sqs orders: stopped" in said
    assert "a-secret-key" not in said
