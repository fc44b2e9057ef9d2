"""The HTTP manners that every vendor's client shares.

One `ApiClient` per account and event loop, kept open while it is used. It adds timeouts, retries of what is
safe to repeat, `Retry-After`, a rate limit per account, and the errors of `blocks/errors.py`.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Hashable, Mapping, Sequence
from contextlib import asynccontextmanager
from copy import copy
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from functools import cache
from typing import Any, Protocol, TypeVar
from weakref import WeakKeyDictionary

import httpx
import stamina
from aiolimiter import AsyncLimiter
from pydantic import TypeAdapter, ValidationError

from blocks.errors import (
    RETRY_AFTER_CAP,
    TRANSIENT,
    AuthError,
    BadReply,
    ConflictError,
    NotFoundError,
    RateLimited,
    VendorError,
    VendorUnavailable,
    parse_retry_after,
)

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

_RETRYABLE = frozenset({408, 425, 500, 502, 503, 504, 520, 521, 522, 523, 524})


class TokenAuth(httpx.Auth):
    """Bearer tokens from a token endpoint: one token per account, fetched ahead of its expiry.

    On a 401 the token is dropped, fetched once and the request sent once more. A lock keeps a fan-out from
    fetching a token per job.

    Args:
        vendor: For error messages.
        request_token: Builds the request to the token endpoint.
        read_token: Takes the endpoint's JSON and returns the token and its lifetime in seconds.
        header: The header that carries the token.
        prefix: What stands before the token in it.
        what: What a refusal was about, for error messages.
    """

    def __init__(
        self,
        vendor: str,
        request_token: Callable[[], httpx.Request],
        read_token: Callable[[Any], tuple[str, float]],
        *,
        header: str = "Authorization",
        prefix: str = "Bearer ",
        what: str = "the client id or the client secret",
    ) -> None:
        self._vendor = vendor
        self._request_token = request_token
        self._read_token = read_token
        self._header = header
        self._prefix = prefix
        self._what = what
        self._lock = asyncio.Lock()
        self._token: str | None = None
        self._expires = 0.0
        self._refusals = 0
        self._refusal: VendorError | None = None

    async def async_auth_flow(self, request: httpx.Request) -> AsyncGenerator[httpx.Request, httpx.Response]:
        """Send, refresh once on 401, send again."""
        for _ in range(2):
            refusals = self._refusals
            async with self._lock:
                if self._refusal is not None and self._refusals != refusals:
                    # Whoever had the lock before us was refused, and a hundred more would be too.
                    raise copy(self._refusal)
                if self._token is None or time.monotonic() >= self._expires:
                    await self._accept((yield self._token_request()))
                token = self._token
            request.headers[self._header] = f"{self._prefix}{token}"
            response = yield request
            if response.status_code != httpx.codes.UNAUTHORIZED:
                return
            if self._token == token:  # else another request has refreshed it meanwhile
                self._token = None

    async def sign_in(self, client: httpx.AsyncClient) -> None:
        """Have a token, before the first request needs one.

        Raises:
            VendorError, httpx.TransportError: There is none to be had.
        """
        async with self._lock:
            if self._token is None or time.monotonic() >= self._expires:
                await self._accept(await client.send(self._token_request(), auth=None))

    def _token_request(self) -> httpx.Request:
        request = self._request_token()
        request.extensions["token_request"] = True
        return request

    async def _accept(self, response: httpx.Response) -> None:
        await response.aread()
        try:
            self._token, lifetime = self._read(response)
        except VendorError as error:
            self._refusal = error
            self._refusals += 1
            raise
        # A token is fetched anew a little ahead of its end: a request takes time to arrive.
        self._expires = time.monotonic() + lifetime - min(60.0, lifetime * 0.05)

    def _read(self, response: httpx.Response) -> tuple[str, float]:
        request, status = response.request, response.status_code
        # The token request itself has no effect, and the request that it was for was not sent.
        where: dict[str, Any] = {"method": request.method, "path": request.url.path, "sent": False}
        if status == httpx.codes.OK:
            try:
                return self._read_token(response.json())
            except (ValueError, KeyError, TypeError):
                raise bad_reply(self._vendor, response, where) from None
        if status == httpx.codes.TOO_MANY_REQUESTS:
            where["status"] = status
            raise _rate_limited(self._vendor, "too many token requests", response, where)
        if status in _RETRYABLE:
            raise VendorUnavailable(self._vendor, "no token to be had", status=status, **where)
        if response.is_redirect or _is_html(response):
            raise bad_reply(self._vendor, response, where)
        if status == httpx.codes.NOT_FOUND:
            raise NotFoundError(
                self._vendor,
                "there is no token endpoint here",
                status=status,
                guidance="Check the base URL, or use basic auth for an old self-managed server.",
                **where,
            )
        if status in (400, 401, 403, 422):
            raise AuthError(
                self._vendor,
                f"{self._what} was refused",
                status=status,
                guidance="Check them in the block; nothing was started.",
                **where,
            )
        raise VendorError(self._vendor, "no token to be had", status=status, **where)


_ADDRESS_GUIDANCE = "Check that the base URL is that of the API and not of the web interface."


def _is_html(response: httpx.Response) -> bool:
    text = response.text.lstrip()[:200].lower()
    return "html" in response.headers.get("content-type", "") or text.startswith(("<!doctype", "<html"))


def bad_reply(vendor: str, response: httpx.Response, where: Mapping[str, Any]) -> BadReply:
    """The error for a reply that no such API sends, and whether the address is likely to blame."""
    wrong_address = response.is_redirect or _is_html(response)
    what = "it answered with something that is not the expected JSON"
    if response.is_redirect:
        what = "it redirects elsewhere"
    elif wrong_address:
        what = "it answered with an HTML page where JSON was expected"
    elif not response.text.strip():
        what = "it answered with an empty body where JSON was expected"
    guidance = _ADDRESS_GUIDANCE if wrong_address else ""
    error = BadReply(vendor, what, status=response.status_code, guidance=guidance, **where)
    error.wrong_address = wrong_address
    return error


def _rate_limited(
    vendor: str, message: str, response: httpx.Response, details: Mapping[str, Any]
) -> RateLimited:
    limited = RateLimited(vendor, message, **details)
    limited.retry_after = parse_retry_after(response.headers.get("Retry-After"), _clock_of(response))
    if limited.over_cap:
        limited.guidance = (
            f"It asks to wait {limited.retry_after:.0f} s; we wait {RETRY_AFTER_CAP:.0f} s at a time."
        )
    return limited


def _clock_of(response: httpx.Response) -> datetime | None:
    try:
        moment = parsedate_to_datetime(response.headers["Date"])
    except (KeyError, ValueError):
        return None
    return moment if moment.tzinfo is not None else None


def _first_problem(error: ValidationError) -> str:
    problem = error.errors(include_url=False, include_input=False, include_context=False)[0]
    return f"{'.'.join(str(part) for part in problem['loc']) or 'document'}: {problem['msg']}"


def _vendor_message(body: Any) -> str | None:
    """The vendor's own words in an error body, most specific first."""
    if isinstance(body, str):
        return body.strip()[:500] or None
    if not isinstance(body, Mapping):
        return None
    data, status, error = body.get("data"), body.get("status"), body.get("error")
    parts = [
        data.get("message") if isinstance(data, Mapping) else None,
        _envelope_message(status) if isinstance(status, Mapping) else None,  # dbt Cloud
        *(error.get(key) for key in ("message", "detail", "code") if isinstance(error, Mapping)),
        *(body.get(key) for key in ("message", "error", "detail", "title")),
    ]
    for part in parts:
        if isinstance(part, str) and part.strip():
            return part.strip()[:500]
    if isinstance(body.get("errorId"), str):
        return f"error id {body['errorId']}"
    return None


def _envelope_message(status: Mapping[str, Any]) -> str:
    words = (status.get("user_message"), status.get("developer_message"))
    return " ".join(word.strip() for word in words if isinstance(word, str))


@cache
def _tls() -> ssl.SSLContext:
    # One for all: reading the certificates holds the event loop up for 50 ms.
    return httpx.create_ssl_context()


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
        self._limiter = AsyncLimiter(*rate) if rate else None
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
                if _is_html(response):
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
                f"its reply is not what the API promises ({_first_problem(error)})",
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
        if (theirs := _clock_of(response)) is not None:
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
        message = self._redact(_vendor_message(body) or response.reason_phrase or "no reason given")
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
                return _rate_limited(self.vendor, message, response, refused)
        details: dict[str, Any] = {**where, "status": status, "body": body}
        if status in _RETRYABLE:
            return VendorUnavailable(self.vendor, message, **details)
        return VendorError(self.vendor, message, **(details if status >= 500 else refused))

    def _redact(self, text: str) -> str:
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return text


def _worth_repeating(error: Exception) -> bool | float:
    if isinstance(error, RateLimited):
        return error.pause
    return isinstance(error, VendorUnavailable) or (isinstance(error, BadReply) and not error.wrong_address)


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
