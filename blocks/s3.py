"""One bucket through boto3, off the event loop: the requests that S3 tasks need, and errors in one sentence.

Credentials, endpoint and client come from prefect-aws' blocks. Its own S3 tasks give untyped dicts, copy no
object of more than 5 GB, delete the original of a copy that nobody has looked at, and leave boto3's errors as
they are.

Vendor documentation: https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import anyio
import anyio.to_thread
from boto3.s3.transfer import TransferConfig
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectionClosedError,
    EndpointConnectionError,
    HTTPClientError,
    NoCredentialsError,
    NoRegionError,
    PartialCredentialsError,
    ProfileNotFound,
    SSLError,
)
from prefect_aws import MinIOCredentials, S3Bucket

COPY_AT_ONCE = 5 * 1024**3
"""The largest object, in bytes, that S3 copies in one request."""
PART = 512 * 1024**2
_THREADS = 10  # as many as a boto3 client has connections
_BATCH = 1000  # keys that one request may delete
_AGAIN = 3  # times that keys are deleted again whose deletion failed on the store's side

_GONE = frozenset({"NoSuchKey", "404", "NotFound"})
_BUSY = frozenset(
    {
        "InternalError",
        "SlowDown",
        "ServiceUnavailable",
        "RequestTimeout",
        "ThrottlingException",
        "Throttling",
        "RequestLimitExceeded",
        "XMinioServerNotInitialized",
        "500",
        "502",
        "503",
        "504",
    }
)
_ELSEWHERE = frozenset(
    {"PermanentRedirect", "301", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException"}
)
# What XML 1.0 can't hold; such keys are deleted one by one.
_NO_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_KEPT = (
    "CacheControl",
    "ContentDisposition",
    "ContentEncoding",
    "ContentLanguage",
    "ContentType",
    "Metadata",
    "SSEKMSKeyId",
    "ServerSideEncryption",
    "StorageClass",
)

T = TypeVar("T")


class S3Error(Exception):
    """A request to the object store did not do what it was to do. The message is for people."""


class S3Missing(S3Error):
    """There is no such object."""


class S3Unavailable(S3Error):
    """The store can't be reached, or fails on its own side."""


_limiters: WeakKeyDictionary[asyncio.AbstractEventLoop, anyio.CapacityLimiter] = WeakKeyDictionary()


def _limiter() -> anyio.CapacityLimiter:
    # Of our own, so that copies do not take the threads that Prefect needs.
    return _limiters.setdefault(asyncio.get_running_loop(), anyio.CapacityLimiter(_THREADS))


class BucketClient:
    """A bucket, whose requests run in threads; cancelled, they are not waited for.

    Args:
        block: prefect-aws' bucket block.
    """

    def __init__(self, block: S3Bucket) -> None:
        self.name = block.bucket_name
        self._block = block
        folder = block.bucket_folder.strip("/")
        self._folder = f"{folder}/" if folder else ""
        self._s3: Any = None

    def full(self, key: str) -> str:
        """A key or prefix with the block's folder before it."""
        return f"{self._folder}{key}"

    def same_as(self, other: BucketClient) -> bool:
        """Whether both are one bucket of one store."""
        return self.name == other.name and self._endpoint == other._endpoint

    @property
    def _endpoint(self) -> str | None:
        endpoint: str | None = self._block.credentials.aws_client_parameters.endpoint_url
        return endpoint

    async def pages(self, prefix: str) -> AsyncIterator[list[dict[str, Any]]]:
        """All objects under a prefix, up to a thousand at a time (`ListObjectsV2`)."""
        more: dict[str, Any] = {}
        while True:
            page = await self._call("list_objects_v2", Bucket=self.name, Prefix=prefix, **more)
            yield page.get("Contents", [])
            if not page.get("IsTruncated"):
                return
            more = {"ContinuationToken": page["NextContinuationToken"]}

    async def first(self, prefix: str) -> dict[str, Any] | None:
        """The first object under a prefix; the one of that key, if it exists."""
        page = await self._call("list_objects_v2", Bucket=self.name, Prefix=prefix, MaxKeys=1)
        found: list[dict[str, Any]] = page.get("Contents", [])
        return found[0] if found else None

    async def head(self, key: str) -> dict[str, Any] | None:
        """What is known of an object (`HeadObject`); None if there is none."""
        try:
            head: dict[str, Any] = await self._call("head_object", Bucket=self.name, Key=key)
        except S3Missing:
            return None
        return head

    async def copy(self, key: str, etag: str, size: int, bucket: str, new_key: str) -> None:
        """Copy an object as it was listed, inside the store (`CopyObject`, or `UploadPartCopy` if large).

        Raises:
            S3Missing: It is not there any more.
            S3Error: It was written anew since, and the like.
        """
        source = {"Bucket": self.name, "Key": key}
        unchanged = {"CopySourceIfMatch": f'"{etag}"'}
        about = f"s3://{self.name}/{key}, to be copied to s3://{bucket}/{new_key}"
        client = await self._client()
        if size <= COPY_AT_ONCE:
            where = {"Bucket": bucket, "Key": new_key}
            await self._in_thread(
                "copy_object", about, client.copy_object, CopySource=source, **where, **unchanged
            )
            return
        head = await self._call("head_object", Bucket=self.name, Key=key)
        # A copy in parts is a new object to S3, which knows nothing of the old one's metadata.
        kept = {name: head[name] for name in _KEPT if head.get(name)}
        in_parts = TransferConfig(
            multipart_threshold=COPY_AT_ONCE, multipart_chunksize=PART, max_concurrency=_THREADS
        )
        # The parts run in threads of boto3's own; if one fails it takes the others back.
        extra = {**kept, **unchanged}
        await self._in_thread(
            "copy_object", about, client.copy, source, bucket, new_key, ExtraArgs=extra, Config=in_parts
        )

    async def delete_one(self, key: str, etag: str | None = None) -> None:
        """Delete an object (`DeleteObject`); none is deleted as well.

        Args:
            key: Which.
            etag: Only if it is as it was listed. Stores that know no conditional delete pay no heed to it.

        Raises:
            S3Error: It was written anew since, and the like.
        """
        unchanged = {} if etag is None else {"IfMatch": f'"{etag}"'}
        try:
            await self._call("delete_object", Bucket=self.name, Key=key, **unchanged)
        except S3Missing:
            # AWS says so of a conditional delete alone.
            return

    async def delete(self, keys: Sequence[str]) -> dict[str, str]:
        """Delete objects, a thousand a request (`DeleteObjects`).

        Returns:
            What could not be deleted, with the store's reason.
        """
        plain = [key for key in keys if not _NO_XML.search(key)]
        refused: dict[str, str] = {}
        for begin in range(0, len(plain), _BATCH):
            refused |= await self._delete_batch(plain[begin : begin + _BATCH])
        for key in keys:
            if _NO_XML.search(key):
                try:
                    await self.delete_one(key)
                except S3Error as error:
                    refused[key] = str(error)
        return refused

    async def _delete_batch(self, keys: list[str]) -> dict[str, str]:
        refused: dict[str, str] = {}
        for attempt in range(_AGAIN):
            objects = {"Objects": [{"Key": key} for key in keys], "Quiet": True}
            reply = await self._call("delete_objects", Bucket=self.name, Delete=objects)
            errors: list[dict[str, str]] = reply.get("Errors", [])
            reasons = {error["Key"]: f"{error['Code']}: {error.get('Message', '')}" for error in errors}
            keys = [error["Key"] for error in errors if error["Code"] in _BUSY]
            refused |= {key: why for key, why in reasons.items() if key not in keys}
            if not keys:
                return refused
            if attempt < _AGAIN - 1:
                await asyncio.sleep(0.5 * 2**attempt)
        return refused | {key: reasons[key] for key in keys}

    async def _client(self) -> Any:
        if self._s3 is None:
            # Reads files, and asks STS where a role is to be assumed.
            self._s3 = await self._in_thread("sign in", "", self._block.credentials.get_client, "s3")
        return self._s3

    async def _call(self, operation: str, **arguments: Any) -> Any:
        client = await self._client()
        key = arguments.get("Key")
        about = f"the bucket {self.name}" if key is None else f"s3://{self.name}/{key}"
        return await self._in_thread(operation, about, getattr(client, operation), **arguments)

    async def _in_thread(
        self, operation: str, about: str, function: Callable[..., T], *args: Any, **kwargs: Any
    ) -> T:
        try:
            return await anyio.to_thread.run_sync(
                lambda: function(*args, **kwargs), abandon_on_cancel=True, limiter=_limiter()
            )
        except ClientError as error:
            raise self._refusal(operation, about, error) from None
        except (NoCredentialsError, PartialCredentialsError, ProfileNotFound) as error:
            raise S3Error(
                f"There are no usable credentials for the bucket {self.name} ({str(error).rstrip('.')}). "
                "Put them into the block's credentials, or into the worker's environment."
            ) from None
        except NoRegionError:
            raise S3Error(f"Which region is the bucket {self.name} in? Say it in the credentials.") from None
        except SSLError:
            raise S3Error(f"{self._where} has a TLS certificate that was not accepted.") from None
        except (EndpointConnectionError, ConnectionClosedError, HTTPClientError) as error:
            raise S3Unavailable(f"{self._where} can't be reached ({type(error).__name__}).") from None
        except (BotoCoreError, ValueError) as error:
            # A bucket name that can't be one, an endpoint that is no URL: boto3 sees those before it sends.
            raise S3Error(f"{self._where} can't be asked: {_one_line(error)}") from None

    @property
    def _where(self) -> str:
        kind = "MinIO" if isinstance(self._block.credentials, MinIOCredentials) else "S3"
        return f"The bucket {self.name} at {self._endpoint or kind}"

    def _refusal(self, operation: str, about: str, error: ClientError) -> S3Error:
        """boto3's error in one sentence. It names no account id, key id or request signature."""
        details = error.response.get("Error", {})
        code = str(details.get("Code", ""))
        metadata = error.response.get("ResponseMetadata", {})
        status = int(metadata.get("HTTPStatusCode", 0))
        if operation == "sign in":
            return S3Error(f"{self._where}: the role in the credentials can't be assumed ({code}).")
        if code == "NoSuchBucket":
            bucket = details.get("BucketName", self.name)
            return S3Error(f"There is no bucket {bucket} at {self._endpoint or 'S3'}.")
        if code in _GONE:
            return S3Missing(f"There is no object {about}.")
        if code in ("PreconditionFailed", "412"):
            return S3Error(f"{about}: it was written anew since it was listed. It was not touched.")
        if code in _ELSEWHERE:
            region = metadata.get("HTTPHeaders", {}).get("x-amz-bucket-region")
            place = f"in the region {region}" if region else "in another region"
            return S3Error(f"The bucket {self.name} is {place}; set that region in the block's credentials.")
        if code in ("AccessDenied", "403", "AllAccessDisabled", "AccountProblem"):
            return S3Error(
                f"The credentials may not do that: {operation} was refused for {about}. Check their policy, "
                "and that the bucket is theirs."
            )
        if code in ("InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken"):
            return S3Error(f"{self._where} refused the credentials ({code}). Check those of the block.")
        if code in _BUSY or status >= 500:
            return S3Unavailable(f"{self._where} failed on its own side ({code or status}).")
        message = details.get("Message") or "no reason given"
        return S3Error(f"{self._where} refused {operation}: {code} {_one_line(message)}")


def _one_line(error: object) -> str:
    return " ".join(str(error).split())[:300]
