"""S3 tasks, also for MinIO and R2: list objects, wait for them, move them, delete them.

The account and the bucket are prefect-aws' `S3Bucket` block, whose `bucket_folder` is put before every prefix
and key given here; what these tasks return holds whole keys. For MinIO, R2 and the like set `endpoint_url` in
the client parameters of the block's credentials.

Vendor documentation: https://docs.aws.amazon.com/AmazonS3/latest/API/
"""

from __future__ import annotations

import asyncio
import os.path
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger
from prefect_aws import S3Bucket
from pydantic import BaseModel, ConfigDict

from blocks.reference import load_block
from blocks.s3 import BucketClient, S3Error, S3Missing, S3Unavailable
from tasks.jobs import InputError, tag_run, without_traceback

__all__ = [
    "S3Error",
    "S3Missing",
    "S3Object",
    "S3Timeout",
    "S3Unavailable",
    "s3_delete",
    "s3_list",
    "s3_move",
    "s3_wait_for",
]

_AT_ONCE = 10  # requests; the pool of a boto3 client has as many connections
_ONE_BY_ONE = 10  # up to so many keys are looked for one by one, more of them by a list


class S3Object(BaseModel):
    """An object as a list shows it.

    Attributes:
        bucket: The bucket's name.
        key: The whole key, with the block's folder.
        size: Bytes.
        etag: The entity tag without quotes; changes with the content.
        last_modified: When it was written.
    """

    model_config = ConfigDict(frozen=True)

    bucket: str
    key: str
    size: int
    etag: str
    last_modified: datetime

    @property
    def uri(self) -> str:
        """`s3://bucket/key`."""
        return f"s3://{self.bucket}/{self.key}"


class S3Timeout(S3Error):
    """What was waited for did not come in time.

    Attributes:
        found: What was there at the last look.
    """

    def __init__(self, message: str, found: Sequence[S3Object] = ()) -> None:
        super().__init__(message)
        self.found = list(found)


@task(name="s3-list", task_run_name="list s3 {prefix}", cache_policy=NO_CACHE)
async def s3_list(
    bucket: S3Bucket | str,
    prefix: str = "",
    pattern: str | None = None,
    *,
    since: datetime | None = None,
    limit: int | None = None,
) -> list[S3Object]:
    """The objects under a prefix, in the order of their keys; folders' own empty objects are left out.

    Args:
        bucket: An S3 Bucket block, or the name of a saved one.
        prefix: What keys begin with, below the block's folder.
        pattern: What the rest of the key must look like: `*.csv`, `2026-??/*`. A `*` also takes slashes.
        since: Only what was written at this time or later.
        limit: At most so many. By default all, however many pages that takes.

    Raises:
        S3Error: There is no such bucket, the credentials may not list it, and the like; in one sentence.
        BlockNotFound: The bucket is the name of a block that is not saved.
    """
    client = await _begin(bucket)
    return await list_objects(client, client.full(prefix), pattern, since, limit)


@task(name="s3-wait-for", task_run_name="wait for s3 {prefix}", cache_policy=NO_CACHE)
async def s3_wait_for(
    bucket: S3Bucket | str,
    prefix: str = "",
    *,
    keys: Sequence[str] = (),
    pattern: str | None = None,
    since: datetime | None = None,
    min_objects: int = 1,
    timeout: float = 3600.0,  # noqa: ASYNC109 - a file that is late is an error of its own, which names it
    poll: float = 10.0,
    settle: float = 0.0,
) -> list[S3Object]:
    """Wait until objects have come. No thread is held meanwhile, so a thousand of these can wait at once.

    A bad minute of the store is borne until the timeout. Safe to retry: it only looks.

    Args:
        bucket: An S3 Bucket block, or the name of a saved one.
        prefix: What keys begin with, below the block's folder.
        keys: Wait for exactly these, below the block's folder; then `prefix` and `min_objects` say nothing.
        pattern: As in `s3_list`.
        since: Only what was written at this time or later counts: not yesterday's file of the same name.
        min_objects: How many must be there.
        timeout: Seconds until it is given up.
        poll: Seconds between two looks.
        settle: Seconds in which nothing more must have come or changed, for uploads of many parts or files.

    Returns:
        All that is there and fits, in the order of the keys.

    Raises:
        S3Timeout: It did not come, or did not come to rest, in time; `.found` is what is there.
        InputError: The arguments contradict each other.
        S3Error: As `s3_list`.
    """
    if min_objects < 1 or poll <= 0 or timeout <= 0 or settle < 0:
        raise InputError("min_objects must be at least 1, poll and timeout above 0 and settle not below 0.")
    if settle >= timeout:
        raise InputError(f"It can't be still for {settle:g} s (settle) within {timeout:g} s (timeout).")
    if keys and (prefix or pattern):
        raise InputError("Give either keys, or a prefix and a pattern.")
    client = await _begin(bucket)
    wanted = [client.full(key) for key in dict.fromkeys(keys)]
    arrival = _Arrival(client, client.full(prefix), wanted, pattern, since, min_objects)
    return await arrival.settled(timeout, poll, settle)


@dataclass(frozen=True)
class _Arrival:
    """What is waited for."""

    client: BucketClient
    prefix: str
    keys: list[str]
    pattern: str | None
    since: datetime | None
    min_objects: int

    def __str__(self) -> str:
        under = f"s3://{self.client.name}/{self.prefix}{self.pattern or ''}"
        return _listed(self.keys) or f"{self.min_objects} of {under}"

    async def look(self) -> list[S3Object]:
        if self.keys:
            return await _those(self.client, self.keys, self.since)
        return await list_objects(self.client, self.prefix, self.pattern, self.since, None)

    def complete(self, found: Sequence[S3Object]) -> bool:
        return len(found) >= (len(self.keys) or self.min_objects)

    async def settled(self, seconds: float, poll: float, settle: float) -> list[S3Object]:
        log = get_run_logger()
        deadline = time.monotonic() + seconds
        found: list[S3Object] = []
        still_since, trouble = time.monotonic(), False
        while True:
            now = time.monotonic()
            try:
                seen = await self.look()
                trouble = False
            except S3Unavailable as error:
                if now >= deadline:
                    raise
                if not trouble:
                    log.warning("%s Looking again.", error)
                seen, trouble = found, True
            if seen != found:
                log.info("%s: %s there", self, len(seen))
                found, still_since = seen, now
            if not trouble and self.complete(found) and now - still_since >= settle:
                return found
            if now >= deadline:
                raise self._too_late(found, seconds)
            wait = min(poll, deadline - now)
            if self.complete(found):
                wait = min(wait, max(0.1, still_since + settle - now))
            await asyncio.sleep(wait)

    def _too_late(self, found: Sequence[S3Object], seconds: float) -> S3Timeout:
        there = {found.key for found in found}
        if self.complete(found):
            return S3Timeout(f"{self}: still changing after {seconds:g} s ({len(found)} there).", found)
        missing = _listed([key for key in self.keys if key not in there]) or str(self)
        also = "" if self.keys else f"; {len(found)} there"
        return S3Timeout(f"{missing} did not come within {seconds:g} s{also}.", found)


@task(name="s3-move", cache_policy=NO_CACHE)
async def s3_move(
    objects: Sequence[S3Object],
    source: S3Bucket | str,
    prefix: str,
    *,
    destination: S3Bucket | str | None = None,
    strip: str | None = None,
) -> list[S3Object]:
    """Move objects: copy, verify the copy, and only then delete the original.

    What is moved is what was listed: an object that was written anew since then is not touched, and said.
    Safe to retry, also after a crash in the middle: what an earlier attempt has moved counts as moved.
    Objects of more than 5 GB are copied in parts; metadata stays, also theirs.

    Args:
        objects: What to move, as `s3_list` or `s3_wait_for` gave it.
        source: The block of their bucket, or the name of a saved one.
        prefix: Put before each key, below the destination's folder: `archive/2026-11-21/`.
        destination: The block of another bucket, which the source's credentials can write to.
        strip: What is taken off the front of each key before; by default all up to the last slash, so that
            only the file's name is kept.

    Returns:
        The objects where they are now, in the same order.

    Raises:
        InputError: Two objects would have one key, or an object would be moved onto itself. Nothing was
            moved.
        S3Error: Some could not be moved; the message names them, and all the others were moved.
    """
    client = await _begin(source)
    target = await open_bucket(destination) if destination is not None else client
    moved = await move_objects(client, target, _moves(objects, client, target, prefix, strip))
    get_run_logger().info("%s objects moved to s3://%s/%s", len(moved), target.name, target.full(prefix))
    return moved


async def move_objects(
    client: BucketClient, target: BucketClient, moves: Sequence[tuple[S3Object, str]]
) -> list[S3Object]:
    """Move each object to a whole key of its own, some at a time.

    Raises:
        S3Error: As `s3_move`.
    """
    slots = asyncio.Semaphore(_AT_ONCE)
    done = await asyncio.gather(
        *(_move(client, target, found, key, slots) for found, key in moves), return_exceptions=True
    )
    _raise_for([d for d in done if isinstance(d, BaseException)], len(done), "moved")
    return [outcome for outcome in done if isinstance(outcome, S3Object)]


async def delete_unchanged(client: BucketClient, objects: Sequence[S3Object]) -> None:
    """Delete objects one by one, each only if it is still what was listed. One that is gone is deleted.

    Raises:
        S3Error: Some were not; the message names them, and all the others were deleted.
    """
    slots = asyncio.Semaphore(_AT_ONCE)

    async def delete(found: S3Object) -> None:
        async with slots:
            # Looked at as well, for stores that know no conditional delete.
            there = await client.head(found.key)
            if there is not None and there["ETag"].strip('"') != found.etag:
                raise S3Error(f"{found.uri} was written anew since it was listed. It was not touched.")
            await client.delete_one(found.key, found.etag)

    done = await asyncio.gather(*(delete(found) for found in objects), return_exceptions=True)
    _raise_for([d for d in done if d is not None], len(done), "deleted")


@task(name="s3-delete", cache_policy=NO_CACHE)
async def s3_delete(objects: Sequence[S3Object], bucket: S3Bucket | str) -> int:
    """Delete objects, a thousand a request. What is not there any more counts as deleted.

    Args:
        objects: What to delete, as `s3_list` gave it.
        bucket: The block of their bucket, or the name of a saved one.

    Returns:
        How many.

    Raises:
        S3Error: Some could not be deleted; the message names them with the reason.
        InputError: An object is of another bucket. Nothing was deleted.
    """
    client = await _begin(bucket)
    _check_bucket(objects, client)
    refused = await client.delete(list(dict.fromkeys(found.key for found in objects)))
    if refused:
        reasons = [f"{key} ({why})" for key, why in refused.items()]
        raise S3Error(f"{len(refused)} of {len(objects)} objects were not deleted: {_listed(reasons)}.")
    get_run_logger().info("%s objects deleted from s3://%s", len(objects), client.name)
    return len(objects)


async def _begin(bucket: S3Bucket | str) -> BucketClient:
    tag_run("s3")
    without_traceback(S3Error)
    return await open_bucket(bucket)


async def open_bucket(bucket: S3Bucket | str) -> BucketClient:
    """The bucket of a block, or of a saved one by its name."""
    return BucketClient(await load_block(S3Bucket, bucket))


async def list_objects(
    client: BucketClient,
    prefix: str,
    pattern: str | None = None,
    since: datetime | None = None,
    limit: int | None = None,
) -> list[S3Object]:
    """As `s3_list`, under a whole prefix."""
    found: list[S3Object] = []
    since = _aware(since)
    async for page in client.pages(prefix):
        for raw in page:
            listed = _object(client, raw)
            if (
                not (listed.key.endswith("/") and not listed.size)
                and (pattern is None or fnmatchcase(listed.key[len(prefix) :], pattern))
                and (since is None or listed.last_modified >= since)
            ):
                found.append(listed)
        if limit is not None and len(found) >= limit:
            break
    return found[:limit]


async def _those(client: BucketClient, keys: Sequence[str], since: datetime | None) -> list[S3Object]:
    if len(keys) > _ONE_BY_ONE:
        wanted = set(keys)
        # By character: it is a prefix for S3, not a folder.
        prefix = os.path.commonprefix(list(keys))  # noqa: RUF071
        found = await list_objects(client, prefix, None, since, None)
        return [there for there in found if there.key in wanted]
    since = _aware(since)
    looks = await asyncio.gather(*(client.first(key) for key in keys))
    there = [_object(client, raw) for raw, key in zip(looks, keys, strict=True) if raw and raw["Key"] == key]
    return [found for found in there if since is None or found.last_modified >= since]


def _aware(since: datetime | None) -> datetime | None:
    return since.replace(tzinfo=UTC) if since is not None and since.tzinfo is None else since


def _object(client: BucketClient, raw: dict[str, Any]) -> S3Object:
    return S3Object(
        bucket=client.name,
        key=raw["Key"],
        size=raw["Size"],
        etag=str(raw["ETag"]).strip('"'),
        last_modified=raw["LastModified"],
    )


def _check_bucket(objects: Sequence[S3Object], client: BucketClient) -> None:
    if other := next((found for found in objects if found.bucket != client.name), None):
        raise InputError(f"{other.uri} is not in the bucket {client.name} of the block. Nothing was done.")


def _moves(
    objects: Sequence[S3Object], client: BucketClient, target: BucketClient, prefix: str, strip: str | None
) -> list[tuple[S3Object, str]]:
    """Each object with its new key."""
    _check_bucket(objects, client)
    moves: dict[str, S3Object] = {}
    start = client.full(strip) if strip is not None else ""
    for found in objects:
        if strip is not None and not found.key.startswith(start):
            raise InputError(f"{found.uri} does not begin with {start!r} (strip). Nothing was moved.")
        rest = found.key[len(start) :] if strip is not None else found.key.rsplit("/", 1)[-1]
        key = target.full(prefix + rest)
        if target.same_as(client) and key == found.key:
            raise InputError(f"{found.uri} would be moved onto itself. Nothing was moved.")
        if key in moves and moves[key] != found:
            raise InputError(
                f"{moves[key].uri} and {found.uri} would both become {key}; keep more of their keys with "
                "`strip`. Nothing was moved."
            )
        moves[key] = found
    if target.same_as(client) and (both := {found.key for found in objects} & set(moves)):
        raise InputError(
            f"{_listed(sorted(both))} would be moved and overwritten at once. Nothing was moved."
        )
    return [(found, key) for key, found in moves.items()]


async def _move(
    client: BucketClient, target: BucketClient, found: S3Object, key: str, slots: asyncio.Semaphore
) -> S3Object:
    async with slots:
        try:
            await client.copy(found.key, found.etag, found.size, target.name, key)
        except S3Missing:
            # Gone: moved by an earlier attempt of this task, or lost to somebody else.
            there = await target.head(key)
            if there is None or there["ContentLength"] != found.size:
                raise
            return _moved(target, key, there)
        there = await target.head(key)
        if there is None or there["ContentLength"] != found.size:
            raise S3Error(f"{found.uri} was copied, but its copy is not whole; the original is kept.")
        original = await client.head(found.key)
        if original is not None and original["ETag"].strip('"') != found.etag:
            raise S3Error(f"{found.uri} was written anew while it was moved; the new original is kept.")
        await client.delete_one(found.key, found.etag)
        return _moved(target, key, there)


def _moved(target: BucketClient, key: str, head: dict[str, Any]) -> S3Object:
    return S3Object(
        bucket=target.name,
        key=key,
        size=head["ContentLength"],
        etag=str(head["ETag"]).strip('"'),
        last_modified=head["LastModified"],
    )


def _raise_for(errors: Sequence[BaseException], total: int, verb: str) -> None:
    if other := next((error for error in errors if not isinstance(error, S3Error)), None):
        raise other
    if len(errors) == 1 and total == 1:
        raise errors[0]
    if errors:
        kind = S3Unavailable if all(isinstance(error, S3Unavailable) for error in errors) else S3Error
        reasons = _listed([str(error).rstrip(".") for error in errors])
        raise kind(f"{len(errors)} of {total} objects were not {verb}: {reasons}.")


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more
