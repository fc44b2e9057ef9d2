"""The HTTP manners that every vendor's client shares.

One `ApiClient` per account and event loop, kept open while it is used. It adds timeouts, retries of what is
safe to repeat, `Retry-After`, a rate limit per account, and the errors of `blocks/errors.py`.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import AsyncIterator, Callable, Hashable, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import Any, Protocol, TypeVar
from weakref import WeakKeyDictionary

import httpx
import stamina
from aiolimiter import AsyncLimiter
from pydantic import TypeAdapter, ValidationError

from blocks.errors import (
    TRANSIENT,
    AuthError,
    BadReply,
    ConflictError,
    NotFoundError,
    RateLimited,
    VendorError,
    VendorUnavailable,
)
from blocks.logs import run_logger
from blocks.replies import (
    bad_reply,
    clock_of,
    first_problem,
    is_html,
    may_pass,
    rate_limited,
    vendor_message,
)
from blocks.tokens import TokenAuth

__all__ = [
    "TRANSIENT",
    "ApiClient",
    "AuthError",
    "BadReply",
    "ConflictError",
    "NotFoundError",
    "RateLimited",
    "TokenAuth",
    "VendorError",
    "VendorUnavailable",
    "shared_client",
]

T = TypeVar("T")

# Its own line says only that something will be tried again; ours says what, and why.
logging.getLogger("stamina").setLevel(logging.ERROR)


@cache
def _tls() -> ssl.SSLContext:
    # One for all: reading the certificates holds the event loop up for 50 ms.
    return httpx.create_ssl_context()


def _limiter(requests: float, seconds: float) -> AsyncLimiter:
    """A limiter that lets no more than so many requests through in any such time.

    The library's own reading of the two figures is a bucket of `requests` that drains meanwhile: in the first
    such time it lets twice as many through, which a vendor that counts refuses.
    """
    burst = max(1.0, requests * 0.2)
    per_second = max(1.0, requests - burst) / seconds
    return AsyncLimiter(burst, burst / per_second)


class ApiClient:
    """An account's HTTP client: JSON in, typed documents out, errors as a small tree.

    Args:
        vendor: The tool's name, for errors.
        base_url: What paths are appended to.
        auth: How requests are authorised.
        headers: Sent with every request.
        rate: At most this many requests (first) in so many seconds (second); None for no limit of ours.
        secrets: Texts that must not appear in an error even if the vendor echoes them.
        read_timeout: Seconds to wait for a reply. Long, because some servers answer a start only when the
            job is running; a short one loses the job's id.
        retry_budget: Seconds for which a request that is safe to repeat is repeated.
    """

    def __init__(
        self,
        vendor: str,
        base_url: str,
        *,
        auth: httpx.Auth | None = None,
        headers: Mapping[str, str] | None = None,
        rate: tuple[float, float] | None = None,
        secrets: Sequence[str] = (),
        read_timeout: float = 60.0,
        retry_budget: float = 60.0,
    ) -> None:
        self.vendor = vendor
        self._secrets = tuple(secret for secret in secrets if len(secret) > 3)
        self._limiter = _limiter(*rate) if rate else None
        self._retry_budget = retry_budget
        self._skew = timedelta(0)
        self._http = httpx.AsyncClient(
            base_url=base_url,
            auth=auth,
            headers={"Accept": "application/json", "User-Agent": "elt-flows", **(headers or {})},
            verify=_tls(),
            # No pool timeout: waiting for one of our own connections is not a failure of the vendor.
            timeout=httpx.Timeout(read_timeout, connect=10.0, pool=None),
        )

    async def aclose(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    def theirs(self, moment: datetime) -> datetime:
        """A moment of our clock on the vendor's, by the `Date` header of its last reply (to a second)."""
        return moment + self._skew

    async def get(
        self,
        path: str,
        reply: TypeAdapter[T],
        params: Mapping[str, Any] | None = None,
        *,
        retry: bool = True,
    ) -> T:
        """GET a document; repeated on a failure of the vendor's side unless `retry` is off.

        Args:
            path: Appended to the base URL.
            reply: What the document must be.
            params: The query.
            retry: Off for polls, whose caller bears failures on a budget of its own.

        Raises:
            VendorError: One of the tree in the module docstring.
        """
        return await self._read("GET", path, reply, params, None, retry=retry)

    async def ask(self, path: str, reply: TypeAdapter[T], body: Any = None, *, retry: bool = True) -> T:
        """POST for a document, where that is how an API is read: as safe to repeat as `get`.

        Raises:
            VendorError: As `get`; its `sent` is False, for a question has no effect.
        """
        try:
            return await self._read("POST", path, reply, None, body, retry=retry)
        except VendorError as error:
            error.sent = False
            raise

    async def _read(
        self,
        method: str,
        path: str,
        reply: TypeAdapter[T],
        params: Mapping[str, Any] | None,
        body: Any,
        *,
        retry: bool,
    ) -> T:
        if not retry:
            return await self.send(method, path, reply, params=params, body=body)
        async for attempt in self._attempts():
            with attempt:
                return await self.send(method, path, reply, params=params, body=body)
        raise AssertionError  # stamina re-raises the last error; this is for the type checker

    async def file(self, path: str, params: Mapping[str, Any] | None = None) -> bytes:
        """GET a file as it is, whatever is in it; repeated on a failure of the vendor's side.

        Raises:
            VendorError: One of the tree in the module docstring.
        """
        async for attempt in self._attempts():
            with attempt:
                where: dict[str, Any] = {"method": "GET", "path": path, "sent": False}
                response = await self._exchange(where, params=params, headers={"Accept": "*/*"})
                if is_html(response):
                    raise bad_reply(self.vendor, response, where)
                return response.content
        raise AssertionError  # as above

    def _attempts(self) -> AsyncIterator[stamina.Attempt]:
        return stamina.retry_context(
            on=_worth_repeating, attempts=6, timeout=self._retry_budget, wait_initial=0.2, wait_max=10.0
        )

    async def send(
        self,
        method: str,
        path: str,
        reply: TypeAdapter[T],
        *,
        params: Mapping[str, Any] | None = None,
        body: Any = None,
    ) -> T:
        """Send one request, once, and read the reply.

        Raises:
            VendorError: One of the tree in the module docstring.
        """
        # Asking for a document starts nothing, however it ends.
        where: dict[str, Any] = {"method": method, "path": path, "sent": method != "GET"}
        response = await self._exchange(where, params=params, json=body)
        try:
            document = response.json()
        except ValueError:
            raise bad_reply(self.vendor, response, where) from None
        self._take_clock(response)
        try:
            return reply.validate_python(document)
        except ValidationError as error:
            raise BadReply(
                self.vendor,
                f"its reply is not what the API promises ({first_problem(error)})",
                status=response.status_code,
                body=document,
                **where,
            ) from None

    async def _exchange(self, where: Mapping[str, Any], **request: Any) -> httpx.Response:
        """Send one request, once; its reply if that is a success."""
        if self._limiter:
            await self._limiter.acquire()
        try:
            response = await self._http.request(where["method"], where["path"], **request)
        except (httpx.UnsupportedProtocol, httpx.InvalidURL) as error:
            raise VendorError(
                self.vendor, f"the base URL can't be used ({error})", **{**where, "sent": False}
            ) from None
        except httpx.TransportError as error:
            raise self._transport_error(error, where) from None
        except httpx.DecodingError:
            raise BadReply(self.vendor, "its reply is compressed and broken", **where) from None
        if not response.is_success:
            raise self._status_error(response, where)
        return response

    def _take_clock(self, response: httpx.Response) -> None:
        # Only from what is surely the API's own: a proxy's page from its cache may be hours old.
        if (theirs := clock_of(response)) is not None:
            self._skew = theirs - datetime.now(UTC)

    def _transport_error(self, error: httpx.TransportError, where: Mapping[str, Any]) -> VendorError:
        try:
            about_token = "token_request" in error.request.extensions
        except RuntimeError:  # httpx raises when no request is attached
            about_token = False
        not_sent = isinstance(error, httpx.ConnectError | httpx.ConnectTimeout | httpx.PoolTimeout)
        what = {
            httpx.ConnectError: "the connection was refused or the host is unknown",
            httpx.ConnectTimeout: "no connection within 10 s",
            httpx.ReadTimeout: "no reply in time",
        }.get(type(error), "the connection was lost")
        if "certificate" in str(error).lower():
            what = "its TLS certificate was not accepted"
        sent = where["sent"] and not (not_sent or about_token)
        return VendorUnavailable(self.vendor, what, **{**where, "sent": sent})

    def _status_error(self, response: httpx.Response, where: Mapping[str, Any]) -> VendorError:
        status = response.status_code
        try:
            body = response.json()
        except ValueError:
            body = None
        refused = {**where, "sent": False}
        # The API's own 404 is a document; a bare one comes from whatever stands where the API should be.
        if response.is_redirect or (status in (404, 405) and not isinstance(body, Mapping)):
            return bad_reply(self.vendor, response, refused)
        message = self._redact(vendor_message(body) or response.reason_phrase or "no reason given")
        refused |= {"status": status, "body": body}
        match status:
            case 401:
                guidance = "Check the credentials in the block."
                return AuthError(self.vendor, message, guidance=guidance, **refused)
            case 403:
                guidance = "The credentials lack the role or the workspace."
                return AuthError(self.vendor, message, guidance=guidance, **refused)
            case 404:
                return NotFoundError(self.vendor, message, **refused)
            case 409:
                return ConflictError(self.vendor, message, **refused)
            case 429:
                return rate_limited(self.vendor, message, response, refused)
        details: dict[str, Any] = {**where, "status": status, "body": body}
        if may_pass(status):
            return VendorUnavailable(self.vendor, message, **details)
        return VendorError(self.vendor, message, **(details if status >= 500 else refused))

    def _redact(self, text: str) -> str:
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return text


def _worth_repeating(error: Exception) -> bool | float:
    log = run_logger("elt.http")
    if isinstance(error, RateLimited):
        # That may be minutes, in which nothing else would be heard of the task.
        log.warning("%s Pausing for %.0f s.", error, error.pause)
        return error.pause
    repeat = isinstance(error, VendorUnavailable) or (isinstance(error, BadReply) and not error.wrong_address)
    if repeat:
        log.info("%s That is worth another try.", error)
    return repeat


class Closable(Protocol):
    """What can be shared: a client, or several of one account that are closed together."""

    async def aclose(self) -> None:
        """Close the connections."""


ClientT = TypeVar("ClientT", bound=Closable)
_Clients = dict[Hashable, tuple[Closable, int]]
_open_clients: WeakKeyDictionary[asyncio.AbstractEventLoop, _Clients] = WeakKeyDictionary()


@asynccontextmanager
async def shared_client(account: Hashable, make: Callable[[], ClientT]) -> AsyncIterator[ClientT]:
    """The one client of an account on this event loop; closed when its last user leaves.

    Args:
        account: What makes two users the same account.
        make: Builds the client for the first of them.
    """
    clients = _open_clients.setdefault(asyncio.get_running_loop(), {})
    client, users = clients.get(account) or (make(), 0)
    clients[account] = (client, users + 1)
    try:
        yield client  # type: ignore[misc]  # one account, one `make`
    finally:
        client, users = clients[account]
        if users > 1:
            clients[account] = (client, users - 1)
        else:
            del clients[account]
            await client.aclose()
