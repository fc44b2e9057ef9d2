"""S3's tasks against a real HTTP server of the S3 API."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any

import pytest
from moto.core import DEFAULT_ACCOUNT_ID
from moto.s3.models import s3_backends
from prefect import flow
from prefect_aws import AwsCredentials, MinIOCredentials, S3Bucket
from prefect_aws.client_parameters import AwsClientParameters

import blocks.s3
import tasks.s3
from blocks.reference import BlockNotFound
from blocks.s3 import BucketClient
from tasks.jobs import InputError
from tasks.s3 import (
    S3Error,
    S3Missing,
    S3Object,
    S3Timeout,
    S3Unavailable,
    s3_delete,
    s3_list,
    s3_move,
    s3_wait_for,
)
from tests.jobs_fixtures import PREFECTS_SOCKETS, collected, until
from tests.looking_fixtures import aws, aws_client

__all__ = ["aws", "collected"]

pytestmark = [
    *PREFECTS_SOCKETS,
    # Prefect's, on every line that a task outside of a flow logs.
    pytest.mark.filterwarnings("ignore:.*without a flow run id:UserWarning"),
]
ODD = ["a b+c&d.csv", "ü/ß 100%.csv", "q?x=1#y.csv", 'it\'s "so".csv', "..//x.csv", "tab\there.csv"]


class Store:
    """A bucket, and what the tasks ask of it."""

    def __init__(self, endpoint: str, name: str) -> None:
        self.endpoint, self.name = endpoint, name
        self.s3 = aws_client("s3", endpoint)
        self.s3.create_bucket(Bucket=name)

    def block(self, folder: str = "", name: str | None = None, **credentials: Any) -> S3Bucket:
        chosen = {"aws_access_key_id": "a-key", "aws_secret_access_key": "a-secret-key", **credentials}
        parameters = AwsClientParameters(endpoint_url=self.endpoint, config={"retries": {"max_attempts": 1}})
        return S3Bucket(
            bucket_name=name or self.name,
            bucket_folder=folder,
            credentials=AwsCredentials(region_name="us-east-1", aws_client_parameters=parameters, **chosen),
        )

    def put(self, *keys: str, body: bytes = b"x", **more: Any) -> None:
        for key in keys:
            self.s3.put_object(Bucket=self.name, Key=key, Body=body, **more)

    def keys(self) -> list[str]:
        pages = self.s3.get_paginator("list_objects_v2").paginate(Bucket=self.name)
        return [found["Key"] for page in pages for found in page.get("Contents", [])]


@pytest.fixture
def store(aws: str, request: pytest.FixtureRequest) -> Iterator[Store]:
    name = f"landing-{abs(hash(request.node.name)):x}"
    made = Store(aws, name)
    yield made
    made.s3.close()


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The operations that are asked of the store, and from which kind of thread."""
    seen: list[str] = []
    original = BucketClient._in_thread

    async def noting(self: BucketClient, operation: str, *args: Any, **kwargs: Any) -> Any:
        seen.append(operation)
        return await original(self, operation, *args, **kwargs)

    monkeypatch.setattr(BucketClient, "_in_thread", noting)
    return seen


# -- list


async def test_a_list_goes_on_past_the_first_thousand(store: Store, asked: list[str]) -> None:
    """All objects are listed, however many pages that takes, and typed."""
    backend = s3_backends[DEFAULT_ACCOUNT_ID]["aws"]  # two thousand requests would take ten seconds
    for n in range(2050):
        backend.put_object(store.name, f"in/{n:04}.csv", b"x")
    found = await s3_list(store.block(), "in/")
    assert [there.key for there in found] == [f"in/{n:04}.csv" for n in range(2050)]
    assert asked.count("list_objects_v2") == 3
    first = found[0]
    assert (first.bucket, first.size, len(first.etag)) == (store.name, 1, 32)
    assert abs(first.last_modified - datetime.now(UTC)) < timedelta(minutes=5)
    assert first.uri == f"s3://{store.name}/in/0000.csv"
    assert len(await s3_list(store.block(), "in/", limit=3)) == 3


async def test_what_a_list_leaves_out(store: Store) -> None:
    """Patterns look at what is after the prefix; folders' own objects and old files can be left out."""
    store.put("raw/in/a.csv", "raw/in/b.json", "raw/in/2026/c.csv", "raw/other/d.csv")
    store.put("raw/in/", body=b"")
    bucket = store.block(folder="/raw/")
    assert [f.key for f in await s3_list(bucket, "in/")] == [
        "raw/in/2026/c.csv",
        "raw/in/a.csv",
        "raw/in/b.json",
    ]
    assert [f.key for f in await s3_list(bucket, "in/", "*.csv")] == ["raw/in/2026/c.csv", "raw/in/a.csv"]
    assert [f.key for f in await s3_list(bucket, "in/", "?.csv")] == ["raw/in/a.csv"]
    later = datetime.now(UTC) + timedelta(hours=1)
    assert await s3_list(bucket, "in/", since=later) == []
    assert len(await s3_list(bucket, "in/", since=later.replace(tzinfo=None) - timedelta(hours=2))) == 3


async def test_the_same_with_minio(store: Store) -> None:
    """MinIO's credentials and endpoint serve as well, and so does the name of a saved block."""
    store.put("a.csv")
    credentials = MinIOCredentials(
        minio_root_user="a-key",
        minio_root_password="a-secret-key",
        region_name="us-east-1",
        aws_client_parameters=AwsClientParameters(endpoint_url=store.endpoint),
    )
    block = S3Bucket(bucket_name=store.name, credentials=credentials)
    assert [f.key for f in await s3_list(block)] == ["a.csv"]
    await block.save("landing-minio", overwrite=True)  # type: ignore[misc]  # a coroutine on a running loop
    assert [f.key for f in await s3_list("landing-minio")] == ["a.csv"]
    with pytest.raises(BlockNotFound, match="landing-minio"):
        await s3_list("landing-minoi")


# -- wait


async def test_waiting_holds_no_thread(store: Store, asked: list[str]) -> None:
    """Fifty waits for a file that comes later hold no thread between their looks."""
    before = threading.active_count()
    most = 0

    async def watch() -> None:
        nonlocal most
        await until(lambda: len(asked) >= 50)  # all have looked, none has found
        most = threading.active_count()
        store.put("in/late.csv")

    bucket = store.block()
    found, *_ = await asyncio.gather(
        *(s3_wait_for(bucket, "in/", pattern="*.csv", poll=0.8, timeout=60) for _ in range(50)), watch()
    )
    assert [there.key for there in found] == ["in/late.csv"]
    # Ten of ours, which are kept for the next look, and those of the server that has them served.
    assert most - before < 35


async def test_waiting_for_more(store: Store) -> None:
    """It waits until enough objects are there, and for keys until each of them is."""
    bucket = store.block()
    store.put("in/1.csv")

    async def deliver() -> None:
        for key in ("in/2.csv", "in/3.csv", "done/_SUCCESS"):
            await asyncio.sleep(0.15)
            await asyncio.to_thread(store.put, key)

    three, marker, _ = await asyncio.gather(
        s3_wait_for(bucket, "in/", min_objects=3, poll=0.05, timeout=60),
        s3_wait_for(bucket, keys=["in/1.csv", "done/_SUCCESS"], poll=0.05, timeout=60),
        deliver(),
    )
    assert [there.key for there in three] == ["in/1.csv", "in/2.csv", "in/3.csv"]
    assert [there.key for there in marker] == ["in/1.csv", "done/_SUCCESS"]


async def test_many_keys_take_one_list(store: Store, asked: list[str]) -> None:
    """More than a few keys are looked for with one list."""
    keys = [f"in/{n}.csv" for n in range(30)]
    store.put(*keys, "in/other.csv")
    found = await s3_wait_for(store.block(), keys=keys, poll=0.05, timeout=60)
    assert sorted(there.key for there in found) == sorted(keys)
    assert asked.count("list_objects_v2") == 1


async def test_a_key_that_begins_like_another(store: Store) -> None:
    """in/1.csv.tmp is not in/1.csv."""
    store.put("in/1.csv.tmp")
    with pytest.raises(S3Timeout, match=r"in/1\.csv did not come within 0\.2 s"):
        await s3_wait_for(store.block(), keys=["in/1.csv"], poll=0.05, timeout=0.2)


class Looks:
    """A clock on which there is a second between two looks, and what happens before each of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, happens: Callable[[int], None]) -> None:
        self.count = 0
        look = tasks.s3._Arrival.look

        async def next_look(wait: Any) -> list[S3Object]:
            self.count += 1
            await asyncio.to_thread(happens, self.count)
            return await look(wait)

        monkeypatch.setattr(tasks.s3._Arrival, "look", next_look)
        monkeypatch.setattr(tasks.s3, "time", SimpleNamespace(monotonic=lambda: float(self.count)))


async def test_settling(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Objects that still come or grow are waited for until they have been still for a while."""
    store.put("in/1.csv")

    def grow(look: int) -> None:
        if look == 3:
            store.put("in/1.csv", body=b"xx")
        elif look == 5:
            store.put("in/2.csv")

    with monkeypatch.context() as patch:
        looks = Looks(patch, grow)
        found = await s3_wait_for(store.block(), "in/", settle=5, poll=0.01, timeout=60)
    assert [(there.key, there.size) for there in found] == [("in/1.csv", 2), ("in/2.csv", 1)]
    assert looks.count == 10


async def test_what_is_never_still_is_late(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """What changes until the timeout is said to be changing, not to be missing."""
    with monkeypatch.context() as patch:
        Looks(patch, lambda look: store.put("in/1.csv", body=b"x" * look))
        with pytest.raises(S3Timeout, match=r"still changing after 8 s \(1 there\)") as caught:
            await s3_wait_for(store.block(), "in/", settle=4, poll=0.01, timeout=8)
    assert [there.key for there in caught.value.found] == ["in/1.csv"]


async def test_yesterdays_file_does_not_count(store: Store) -> None:
    """With `since`, a file that has been there for long is not the one that is waited for."""
    store.put("in/daily.csv")
    later = datetime.now(UTC) + timedelta(seconds=60)
    for what in ({"prefix": "in/"}, {"keys": ["in/daily.csv"]}):
        with pytest.raises(S3Timeout, match="did not come within"):
            await s3_wait_for(store.block(), since=later, poll=0.05, timeout=0.2, **what)  # type: ignore[arg-type]


async def test_a_bad_minute_is_borne(store: Store, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    """A store that fails for a while is asked again, and that is said once."""
    store.put("in/1.csv")
    failing = 3
    original = BucketClient._in_thread

    async def flaky(self: BucketClient, operation: str, *args: Any, **kwargs: Any) -> Any:
        nonlocal failing
        if operation == "list_objects_v2" and failing:
            failing -= 1
            raise S3Unavailable("The store failed on its own side (SlowDown).")
        return await original(self, operation, *args, **kwargs)

    monkeypatch.setattr(BucketClient, "_in_thread", flaky)
    assert len(await s3_wait_for(store.block(), "in/", poll=0.05, timeout=60)) == 1
    assert caplog.text.count("SlowDown") == 1


@pytest.mark.parametrize(
    "wrong",
    [
        {"min_objects": 0},
        {"poll": 0},
        {"timeout": 0},
        {"settle": 5, "timeout": 5},
        {"keys": ["a"], "prefix": "b"},
    ],
)
async def test_waits_that_make_no_sense(store: Store, wrong: dict[str, Any]) -> None:
    """Arguments that contradict each other are refused before anything is asked."""
    with pytest.raises(InputError):
        await s3_wait_for(store.block(), **wrong)


# -- move


async def test_moving(store: Store) -> None:
    """Objects are where they are to be and no longer where they were, whatever is in their keys."""
    keys = [f"in/{odd}" for odd in ODD]
    store.put(*keys, body=b"some data", Metadata={"origin": "jfk"}, ContentType="text/csv")
    found = await s3_list(store.block(), "in/")
    moved = await s3_move(found, store.block(), "archive/", strip="in/")
    assert sorted(store.keys()) == sorted(f"archive/{odd}" for odd in ODD)
    assert [there.key for there in moved] == [f"archive/{f.key.removeprefix('in/')}" for f in found]
    assert [(m.size, m.etag) for m in moved] == [(f.size, f.etag) for f in found]
    head = store.s3.head_object(Bucket=store.name, Key=moved[0].key)
    assert (head["Metadata"], head["ContentType"]) == ({"origin": "jfk"}, "text/csv")


async def test_moving_to_another_bucket(store: Store) -> None:
    """The destination has a bucket and a folder of its own."""
    archive = f"archive-{store.name}"
    store.s3.create_bucket(Bucket=archive)
    store.put("in/deep/1.csv")
    found = await s3_list(store.block())
    moved = await s3_move(found, store.block(), "2026/", destination=store.block("cold", archive))
    assert [there.uri for there in moved] == [f"s3://{archive}/cold/2026/1.csv"]
    assert store.keys() == []


async def test_large_objects_are_copied_in_parts(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is too large for one copy request is copied in parts, and keeps its metadata."""
    monkeypatch.setattr(blocks.s3, "COPY_AT_ONCE", 6 * 1024**2)
    monkeypatch.setattr(blocks.s3, "PART", 5 * 1024**2)
    body = bytes(range(256)) * 4096 * 11  # 11 MiB
    store.put("in/large.parquet", body=body, Metadata={"origin": "jfk"}, ContentType="x/parquet")
    (moved,) = await s3_move(await s3_list(store.block()), store.block(), "out/")
    assert moved.etag.endswith("-3")
    got = store.s3.get_object(Bucket=store.name, Key="out/large.parquet")
    assert got["Body"].read() == body
    assert (got["Metadata"], got["ContentType"]) == ({"origin": "jfk"}, "x/parquet")
    assert store.keys() == ["out/large.parquet"]


@pytest.mark.parametrize("crash_at", ["head_object", "delete_object"])
async def test_a_retry_finishes_a_move(store: Store, monkeypatch: pytest.MonkeyPatch, crash_at: str) -> None:
    """Stopped between copy and delete, a move is finished by a retry; what was moved before stays moved."""
    store.put("in/1.csv", "in/2.csv", body=b"12")
    found = await s3_list(store.block(), "in/")
    await s3_move(found[:1], store.block(), "out/")
    original = BucketClient._in_thread

    async def crash(self: BucketClient, operation: str, about: str, *args: Any, **kwargs: Any) -> Any:
        if operation == crash_at and "2.csv" in about:
            raise S3Unavailable("gone")
        return await original(self, operation, about, *args, **kwargs)

    monkeypatch.setattr(BucketClient, "_in_thread", crash)
    with pytest.raises(S3Unavailable, match="1 of 2 objects were not moved: gone"):
        await s3_move(found, store.block(), "out/")
    assert store.keys() == ["in/2.csv", "out/1.csv", "out/2.csv"]
    monkeypatch.setattr(BucketClient, "_in_thread", original)
    moved = await s3_move(found, store.block(), "out/")
    assert [there.key for there in moved] == ["out/1.csv", "out/2.csv"]
    assert store.keys() == ["out/1.csv", "out/2.csv"]


async def test_what_is_gone_is_said(store: Store) -> None:
    """An object that is neither here nor there is an error that names it; the others are moved."""
    store.put("in/1.csv", "in/2.csv", "in/3.csv")
    found = await s3_list(store.block(), "in/")
    store.s3.delete_object(Bucket=store.name, Key="in/2.csv")
    with pytest.raises(S3Error, match=r"1 of 3 objects were not moved.*in/2\.csv"):
        await s3_move(found, store.block(), "out/")
    assert store.keys() == ["out/1.csv", "out/3.csv"]
    with pytest.raises(S3Missing, match=r"no object s3://.*in/2\.csv"):
        await s3_move(found[1:2], store.block(), "elsewhere/")


async def test_a_new_version_is_not_moved_by_mistake(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was written anew after it was listed, or while it is moved, is not deleted."""
    store.put("in/1.csv", body=b"old")
    (found,) = await s3_list(store.block())
    original = BucketClient.copy

    async def overtaken(self: BucketClient, *args: Any) -> None:
        await original(self, *args)
        await asyncio.to_thread(store.put, "in/1.csv", body=b"newer")

    monkeypatch.setattr(BucketClient, "copy", overtaken)
    with pytest.raises(S3Error, match="written anew while it was moved"):
        await s3_move([found], store.block(), "out/")
    assert store.s3.head_object(Bucket=store.name, Key="in/1.csv")["ContentLength"] == 5


async def test_what_was_written_anew_is_kept(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """What has changed since it was listed is not what was to be moved: the store is told, and it is kept."""
    conditions = []
    original = BucketClient._in_thread

    async def noting(self: BucketClient, operation: str, *args: Any, **kwargs: Any) -> Any:
        if operation == "copy_object":
            conditions.append(kwargs["CopySourceIfMatch"])
        return await original(self, operation, *args, **kwargs)

    monkeypatch.setattr(BucketClient, "_in_thread", noting)
    store.put("in/1.csv", body=b"old")
    (found,) = await s3_list(store.block())
    store.put("in/1.csv", body=b"new")
    with pytest.raises(S3Error, match="written anew"):
        await s3_move([found], store.block(), "out/")
    # moto copies all the same; S3 refuses.
    assert conditions == [f'"{found.etag}"']
    assert store.s3.get_object(Bucket=store.name, Key="in/1.csv")["Body"].read() == b"new"


async def test_moves_that_would_lose_something(store: Store) -> None:
    """Two objects under one key, or one onto itself: refused before anything is moved."""
    store.put("in/a/1.csv", "in/b/1.csv")
    found = await s3_list(store.block())
    with pytest.raises(InputError, match=r"would both become out/1\.csv"):
        await s3_move(found, store.block(), "out/")
    with pytest.raises(InputError, match="onto itself"):
        await s3_move(found, store.block(), "in/", strip="in/")
    with pytest.raises(InputError, match="does not begin with 'out/'"):
        await s3_move(found, store.block(), "x/", strip="out/")
    with pytest.raises(InputError, match="not in the bucket other"):
        await s3_move(found, store.block(name="other"), "x/")
    chain = [found[0], found[0].model_copy(update={"key": "x/in/a/1.csv"})]
    with pytest.raises(InputError, match=r"x/in/a/1\.csv would be moved and overwritten at once"):
        await s3_move(chain, store.block(), "x/", strip="")
    assert store.keys() == ["in/a/1.csv", "in/b/1.csv"]


# -- delete


async def test_deleting(store: Store, asked: list[str]) -> None:
    """A thousand keys a request, whatever is in them; what is gone already is no error."""
    keys = [*ODD, "line\nbreak.csv", "bell\x07.csv"]
    for key in keys:
        s3_backends[DEFAULT_ACCOUNT_ID]["aws"].put_object(store.name, key, b"x")
    one = S3Object(bucket=store.name, key="", size=1, etag="", last_modified=datetime.now(UTC))
    never = [one.model_copy(update={"key": f"never/{n}"}) for n in range(2100)]
    there = [one.model_copy(update={"key": key}) for key in keys]
    assert await s3_delete([*there, *never], store.block()) == len(keys) + 2100
    assert store.keys() == []
    assert asked.count("delete_objects") == 3
    assert asked.count("delete_object") == 1  # the bell, which no XML can hold


async def test_what_could_not_be_deleted(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys that the store refuses are named with the reason; those that it failed on are tried again."""
    store.put("a", "b", "c")
    found = await s3_list(store.block())
    original = BucketClient._call
    replies = [
        [("a", "AccessDenied", "Access Denied"), ("b", "SlowDown", "Please reduce your request rate.")],
        [("b", "InternalError", "We encountered an internal error.")],
        [],
    ]

    async def refusing(self: BucketClient, operation: str, **arguments: Any) -> Any:
        if operation != "delete_objects":
            return await original(self, operation, **arguments)
        refused = replies.pop(0)
        return {"Errors": [{"Key": key, "Code": code, "Message": why} for key, code, why in refused]}

    monkeypatch.setattr(BucketClient, "_call", refusing)
    with pytest.raises(S3Error, match=r"1 of 3 objects were not deleted: a \(AccessDenied: Access Denied\)"):
        await s3_delete(found, store.block())
    assert replies == []


# -- what users get wrong


async def test_no_such_bucket(store: Store) -> None:
    """A bucket that is not there is named, also when it is the destination."""
    store.put("a")
    found = await s3_list(store.block())
    with pytest.raises(S3Error, match=r"There is no bucket nobodys at http"):
        await s3_list(store.block(name="nobodys"))
    with pytest.raises(S3Error, match="There is no bucket nobodys"):
        await s3_move(found, store.block(), "x/", destination=store.block(name="nobodys"))
    with pytest.raises(S3Error, match=r"can't be asked: .*[Bb]ucket name"):
        await s3_list(store.block(name="not a bucket"))


async def test_no_credentials(store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """Missing credentials are said with what to do."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    bucket = store.block(aws_access_key_id=None, aws_secret_access_key=None)
    with pytest.raises(S3Error, match=r"no usable credentials.*block's credentials"):
        await s3_list(bucket)


@pytest.mark.parametrize(
    ("status", "code", "headers", "said", "kind"),
    [
        (403, "AccessDenied", {}, "may not do that: list_objects_v2 was refused", S3Error),
        (403, "SignatureDoesNotMatch", {}, "refused the credentials", S3Error),
        (
            400,
            "AuthorizationHeaderMalformed",
            {"x-amz-bucket-region": "eu-west-1"},
            "region eu-west-1",
            S3Error,
        ),
        (400, "IllegalLocationConstraintException", {}, "in another region", S3Error),
        (503, "SlowDown", {}, "failed on its own side", S3Unavailable),
        (500, "", {}, "failed on its own side", S3Unavailable),
        (418, "Teapot", {}, "refused list_objects_v2: Teapot Short and stout", S3Error),
    ],
)
async def test_the_stores_refusals(
    sandbox: Any, status: int, code: str, headers: dict[str, str], said: str, kind: type[S3Error]
) -> None:
    """What the store answers is said in one sentence, without a secret."""
    details = f"<Code>{code}</Code><Message>Short and stout</Message><AWSAccessKeyId>a-key</AWSAccessKeyId>"
    body = f"<Error>{details}</Error>"
    sandbox.faults.add(kind="status", status=status, body=body if code else "oops", headers=headers)
    store = Store.__new__(Store)
    store.endpoint, store.name = sandbox.hightouch_url, "landing"
    with pytest.raises(kind, match=said) as caught:
        await s3_list(store.block())
    assert "a-key" not in str(caught.value)


async def test_nobody_there(store: Store) -> None:
    """A store that can't be reached is named."""
    store.endpoint = "http://127.0.0.1:9"
    with pytest.raises(S3Unavailable, match=r"at http://127\.0\.0\.1:9 can't be reached"):
        await s3_list(store.block())


def test_an_error_is_one_line(store: Store, caplog: Any, capfd: Any) -> None:
    """In a flow's log an error is a sentence, without a traceback and without the key."""

    @flow
    async def landing() -> None:
        await s3_wait_for(store.block(name="nobodys"), "in/")

    with pytest.raises(S3Error, match="no bucket nobodys"):
        asyncio.run(landing())
    seen = caplog.text + "".join(capfd.readouterr())
    assert "no bucket nobodys" in seen
    assert "botocore" not in seen
    assert "a-secret-key" not in seen


async def test_cancelled_in_a_request(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cancellation does not wait for a request that hangs."""
    entered, leave = threading.Event(), threading.Event()
    waited_out: list[bool] = []

    def hang(*_: Any, **__: Any) -> None:
        entered.set()
        waited_out.append(not leave.wait(60))

    async def stuck(_: BucketClient) -> Any:
        return type("Client", (), {"list_objects_v2": staticmethod(hang)})

    monkeypatch.setattr(BucketClient, "_client", stuck)
    listing = asyncio.create_task(s3_list(store.block()))  # type: ignore[arg-type]
    await until(entered.is_set)
    listing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await listing
    assert waited_out == []
    leave.set()
