"""The HTTP manners that every vendor's client shares.

One `ApiClient` per account and event loop, kept open while it is used. It adds timeouts, retries of what is
safe to repeat, `Retry-After`, a rate limit per account, and errors that say what to do:

    VendorError
    ├── AuthError           401, 403: wrong or missing credentials or role
    ├── NotFoundError       404
    ├── ConflictError       409: a business state, never retried here
    ├── RateLimited         429, with the wait that the vendor asked for
    ├── VendorUnavailable   no connection, timeout, 408, 425, 5xx
    └── BadReply            a reply that is not what the API promises (HTML, half a JSON document)

An error carries method, path, status, the vendor's own message and a line of guidance. It never carries a
header, a body of ours, a query string or a URL with credentials.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Hashable, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar
from urllib.parse import urlsplit
from weakref import WeakKeyDictionary

import httpx
import stamina
from aiolimiter import AsyncLimiter
from pydantic import TypeAdapter, ValidationError

T = TypeVar("T")

RETRY_AFTER_CAP = 120.0
"""The longest wait, in seconds, that a vendor's `Retry-After` can impose on one request."""

RATE_LIMIT_PAUSE = 30.0
"""Seconds to wait after a 429 that names no time (Airbyte and Hightouch send none)."""

_RETRYABLE = frozenset({408, 425, 500, 502, 503, 504, 520, 521, 522, 523, 524})


class VendorError(Exception):
    """A vendor's API refused or failed.

    Attributes:
        vendor: Which API.
        method: HTTP method of the request.
        path: Path of the request, without query.
        status: HTTP status; None where there was no reply.
        message: What happened, in the vendor's own words where there are any.
        guidance: What to do about it.
        sent: Whether the request can have had an effect. False only when it surely had none.
    """

    def __init__(
        self,
        vendor: str,
        message: str,
        *,
        method: str = "",
        path: str = "",
        status: int | None = None,
        guidance: str = "",
        sent: bool = True,
        body: Any = None,
    ) -> None:
        super().__init__(vendor, message)
        self.vendor = vendor
        self.message = message
        self.method = method
        self.path = path
        self.status = status
        self.guidance = guidance
        self.sent = sent
        self.body = body

    def __str__(self) -> str:
        where = f" {self.method} {self.path}" if self.method else ""
        status = f" answered {self.status}" if self.status else ""
        guidance = f" {self.guidance}" if self.guidance else ""
        return f"{self.vendor}{where}{status}: {self.message.rstrip('.')}.{guidance}"

    __repr__ = __str__

    def __reduce__(self) -> tuple[Any, ...]:
        # Prefect pickles exceptions into results; keyword-only arguments need this.
        return (_rebuild, (type(self), self.vendor, self.message, {**self.__dict__, "body": None}))


def _rebuild(cls: type[VendorError], vendor: str, message: str, state: dict[str, Any]) -> VendorError:
    error = cls(vendor, message)
    error.__dict__.update(state)
    return error


class AuthError(VendorError):
    """The credentials are wrong, missing or lack the role."""


class NotFoundError(VendorError):
    """What was asked for does not exist or is not visible to these credentials."""


class ConflictError(VendorError):
    """The vendor's state forbids the request (409)."""


class RateLimited(VendorError):
    """Too many requests (429).

    Attributes:
        retry_after: Seconds that the vendor asked us to wait; None when it named no time.
    """

    retry_after: float | None = None

    @property
    def pause(self) -> float:
        """Seconds to wait: what the vendor asked for, up to the cap."""
        return min(RATE_LIMIT_PAUSE if self.retry_after is None else self.retry_after, RETRY_AFTER_CAP)

    @property
    def over_cap(self) -> bool:
        """Whether the vendor asked for a longer wait than one request is made to bear."""
        return self.retry_after is not None and self.retry_after > RETRY_AFTER_CAP


class VendorUnavailable(VendorError):
    """The API can't be reached or fails on its own side. Nothing is said about the job."""


class BadReply(VendorError):
    """The reply is not what the API promises.

    Attributes:
        html: Whether it is a web page: then the base URL is likely wrong, and asking again is no help.
    """

    html = False


TRANSIENT = (VendorUnavailable, RateLimited, BadReply)
"""What a poll bears for the outage budget."""


def parse_retry_after(value: str | None, now: datetime | None = None) -> float | None:
    """Seconds in a `Retry-After` header: a number or an HTTP date (RFC 9110, 10.2.3); None if neither."""
    if not value:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            at = parsedate_to_datetime(value)
        except ValueError:
            return None
        if at.tzinfo is None:
            at = at.replace(tzinfo=UTC)
        seconds = (at - (now or datetime.now(UTC))).total_seconds()
    return max(0.0, seconds) if seconds == seconds and seconds != float("inf") else None


class TokenAuth(httpx.Auth):
    """Bearer tokens from a token endpoint: one token per account, fetched ahead of its expiry.

    On a 401 the token is dropped, fetched once and the request sent once more. A lock keeps a fan-out from
    fetching a token per job.

    Args:
        vendor: For error messages.
        request_token: Builds the request to the token endpoint.
        read_token: Takes the endpoint's JSON and returns the token and its lifetime in seconds.
    """

    def __init__(
        self,
        vendor: str,
        request_token: Callable[[], httpx.Request],
        read_token: Callable[[Any], tuple[str, float]],
    ) -> None:
        self._vendor = vendor
        self._request_token = request_token
        self._read_token = read_token
        self._lock = asyncio.Lock()
        self._token: str | None = None
        self._expires = 0.0

    async def async_auth_flow(self, request: httpx.Request) -> AsyncGenerator[httpx.Request, httpx.Response]:
        """Send, refresh once on 401, send again."""
        token = self._token
        if token is None or time.monotonic() >= self._expires:
            async with self._lock:
                if self._token is None or time.monotonic() >= self._expires:
                    await self._accept((yield self._token_request()))
                token = self._token
        request.headers["Authorization"] = f"Bearer {token}"
        response = yield request
        if response.status_code != httpx.codes.UNAUTHORIZED:
            return
        async with self._lock:
            if self._token == token:  # else another request has refreshed it meanwhile
                self._token = None
                await self._accept((yield self._token_request()))
            token = self._token
        request.headers["Authorization"] = f"Bearer {token}"
        yield request

    def _token_request(self) -> httpx.Request:
        request = self._request_token()
        request.extensions["token_request"] = True
        return request

    async def _accept(self, response: httpx.Response) -> None:
        await response.aread()
        request, status = response.request, response.status_code
        where: dict[str, Any] = {
            "method": request.method,
            "path": request.url.path,
            "status": status,
            "sent": False,
        }
        if status in (400, 401, 403, 422):
            raise AuthError(
                self._vendor,
                "the client id or the client secret was refused",
                guidance="Check both in the block; nothing was started.",
                **where,
            )
        if status == httpx.codes.TOO_MANY_REQUESTS:
            limited = RateLimited(self._vendor, "too many token requests", **where)
            limited.retry_after = parse_retry_after(response.headers.get("Retry-After"))
            raise limited
        if status == httpx.codes.NOT_FOUND:
            raise NotFoundError(
                self._vendor,
                "there is no token endpoint here",
                guidance="Check the base URL, or use basic auth for an old self-managed server.",
                **where,
            )
        if status != httpx.codes.OK:
            raise VendorUnavailable(self._vendor, "no token to be had", **where)
        try:
            self._token, lifetime = self._read_token(response.json())
        except (ValueError, KeyError, TypeError) as error:
            raise _bad_reply(
                self._vendor, response, {"method": request.method, "path": request.url.path}, sent=False
            ) from error
        # A token is fetched anew a little ahead of its end: a request takes time to arrive.
        self._expires = time.monotonic() + lifetime - min(60.0, lifetime * 0.05)


_HTML_GUIDANCE = "Check that the base URL is that of the API and not of the web interface."


def _bad_reply(
    vendor: str, response: httpx.Response, where: Mapping[str, Any], *, sent: bool = True
) -> BadReply:
    text = response.text.lstrip()[:200].lower()
    html = "html" in response.headers.get("content-type", "") or text.startswith(("<!doctype", "<html"))
    what = "an HTML page" if html else "something that is not the expected JSON" if text else "an empty body"
    error = BadReply(
        vendor,
        f"it answered with {what}" + (" where JSON was expected" if html or not text else ""),
        status=response.status_code,
        guidance=_HTML_GUIDANCE if html else "",
        sent=sent,
        **where,
    )
    error.html = html
    return error


def _first_problem(error: ValidationError) -> str:
    problem = error.errors(include_url=False, include_input=False, include_context=False)[0]
    return f"{'.'.join(str(part) for part in problem['loc']) or 'document'}: {problem['msg']}"


def _vendor_message(body: Any) -> str | None:
    """The vendor's own words in an error body, most specific first."""
    if isinstance(body, str):
        return body.strip()[:500] or None
    if not isinstance(body, Mapping):
        return None
    data = body.get("data")
    parts = [
        data.get("message") if isinstance(data, Mapping) else None,
        *(body.get(key) for key in ("message", "error", "detail", "title")),
    ]
    for part in parts:
        if isinstance(part, str) and part.strip():
            return part.strip()[:500]
    if isinstance(body.get("errorId"), str):
        return f"error id {body['errorId']}"
    return None


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
        if not retry:
            return await self.send("GET", path, reply, params=params)
        async for attempt in stamina.retry_context(
            on=_worth_repeating, attempts=6, timeout=self._retry_budget, wait_initial=0.2, wait_max=10.0
        ):
            with attempt:
                return await self.send("GET", path, reply, params=params)
        raise AssertionError  # stamina re-raises the last error; this is for the type checker

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
        where: dict[str, Any] = {"method": method, "path": path}
        if self._limiter:
            await self._limiter.acquire()
        try:
            response = await self._http.request(method, path, params=params, json=body)
        except (httpx.UnsupportedProtocol, httpx.InvalidURL) as error:
            raise VendorError(
                self.vendor, f"the base URL can't be used ({error})", sent=False, **where
            ) from None
        except httpx.TransportError as error:
            raise self._transport_error(error, where) from None
        self._learn_clock(response)
        if not response.is_success:
            raise self._status_error(response, where)
        try:
            document = response.json()
        except ValueError:
            raise _bad_reply(self.vendor, response, where) from None
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
        return VendorUnavailable(self.vendor, what, sent=not (not_sent or about_token), **where)

    def _status_error(self, response: httpx.Response, where: Mapping[str, Any]) -> VendorError:
        status = response.status_code
        try:
            body = response.json()
        except ValueError:
            body = None
        message = self._redact(_vendor_message(body) or response.reason_phrase or "no reason given")
        details: dict[str, Any] = {**where, "status": status, "body": body}
        if status == httpx.codes.UNAUTHORIZED:
            return AuthError(
                self.vendor, message, guidance="Check the credentials in the block.", sent=False, **details
            )
        if status == httpx.codes.FORBIDDEN:
            return AuthError(
                self.vendor,
                message,
                guidance="The credentials lack the role or the workspace.",
                sent=False,
                **details,
            )
        if status == httpx.codes.NOT_FOUND:
            return NotFoundError(self.vendor, message, sent=False, **details)
        if status == httpx.codes.CONFLICT:
            return ConflictError(self.vendor, message, sent=False, **details)
        if status == httpx.codes.TOO_MANY_REQUESTS:
            limited = RateLimited(self.vendor, message, sent=False, **details)
            limited.retry_after = parse_retry_after(response.headers.get("Retry-After"))
            if limited.over_cap:
                limited.guidance = (
                    f"It asks to wait {limited.retry_after:.0f} s; we wait {RETRY_AFTER_CAP:.0f} s at a time."
                )
            return limited
        if status in _RETRYABLE:
            return VendorUnavailable(self.vendor, message, **details)
        if response.is_redirect:
            return BadReply(self.vendor, "it redirects elsewhere", guidance=_HTML_GUIDANCE, **details)
        return VendorError(self.vendor, message, sent=status >= 500, **details)

    def _redact(self, text: str) -> str:
        for secret in self._secrets:
            text = text.replace(secret, "***")
        return text

    def _learn_clock(self, response: httpx.Response) -> None:
        try:
            theirs = parsedate_to_datetime(response.headers["Date"])
        except (KeyError, ValueError):
            return
        if theirs.tzinfo is not None:
            self._skew = theirs - datetime.now(UTC)


def _worth_repeating(error: Exception) -> bool | float:
    if isinstance(error, RateLimited):
        return error.pause
    return isinstance(error, VendorUnavailable) or (isinstance(error, BadReply) and not error.html)


def check_base_url(value: str, *, example: str) -> str:
    """A base URL with scheme and host and without credentials, query or trailing slash.

    Raises:
        ValueError: With a sentence that says what is wrong; it does not repeat credentials.
    """
    value = value.strip()
    if not value:
        raise ValueError(f"The base URL is empty; give one such as {example}.")
    if "://" not in value:
        host = value.split("/", 1)[0].split(":", 1)[0]
        local = host in ("localhost", "host.docker.internal") or host.replace(".", "").isdigit()
        value = f"{'http' if local else 'https'}://{value}"
    try:
        parts = urlsplit(value)
        _ = parts.port
    except ValueError:
        raise ValueError(f"The base URL can't be read; give one such as {example}.") from None
    if parts.username or parts.password:
        raise ValueError("The base URL holds credentials; put them into the block's own fields instead.")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(
            f"The base URL must start with http:// or https:// and name a host, such as {example}."
        )
    return f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}"


ClientT = TypeVar("ClientT", bound=ApiClient)
_Clients = dict[Hashable, tuple[ApiClient, int]]
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
