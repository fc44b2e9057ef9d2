"""What can go wrong with a vendor's API, as a small tree of errors that say what to do.

    VendorError
    ├── AuthError           401, 403: wrong or missing credentials or role
    ├── NotFoundError       404
    ├── ConflictError       409: a business state, never retried here
    ├── RateLimited         429, with the wait that the vendor asked for
    ├── VendorUnavailable   no connection, timeout, 408, 425, 5xx but 501
    └── BadReply            a reply that is not what the API promises (HTML, half a JSON document)

An error carries method, path, status, the vendor's own message and a line of guidance. It never carries a
header, a body of ours, a query string or a URL with credentials.
"""

from __future__ import annotations

from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

RETRY_AFTER_CAP = 120.0
"""The longest wait, in seconds, that a vendor's `Retry-After` can impose on one request."""

RATE_LIMIT_PAUSE = 30.0
"""Seconds to wait after a 429 that names no time (Airbyte and Hightouch send none)."""


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
        wrong_address: Whether the base URL is likely wrong (a web page, a redirect): asking again is no help.
    """

    wrong_address = False


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
