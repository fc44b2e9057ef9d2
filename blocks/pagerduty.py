"""PagerDuty: the block with an integration's routing key, and a typed client for the Events API v2.

Vendor documentation: https://developer.pagerduty.com/docs/events-api-v2-overview
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Hashable, Mapping
from contextlib import AbstractAsyncContextManager
from datetime import UTC, datetime
from typing import Any, ClassVar, Literal

from prefect.blocks.core import Block
from pydantic import BaseModel, ConfigDict, Field, HttpUrl, SecretStr, TypeAdapter, field_validator

from blocks.delivery import deliver
from blocks.fields import MASKED_GUIDANCE, check_base_url, clean_secret, is_masked
from blocks.http import ApiClient, AuthError, VendorError, shared_client

_EXAMPLE = "https://events.pagerduty.com/v2"
_KEY_LENGTH = 32
_SUMMARY, _DEDUP_KEY, _BODY = 1024, 255, 512_000  # PagerDuty's limits: characters, characters, bytes
_FIELD = 255  # ours, for the short fields of a payload: PagerDuty names no limit
_LINKS = 20

Severity = Literal["critical", "error", "warning", "info"]
Action = Literal["trigger", "acknowledge", "resolve"]


class Link(BaseModel):
    """A link that an alert shows."""

    model_config = ConfigDict(frozen=True)

    href: str
    text: str = ""


class Alert(BaseModel):
    """What a trigger says. Too long texts are cut, with an ellipsis, and never refused.

    Attributes:
        summary: The alert's title, up to 1,024 characters.
        source: Where it happened, such as the tool.
        severity: How bad.
        timestamp: When it happened. A time without a zone is taken as UTC.
        component: The part that is affected.
        group: What it belongs to, such as the pipeline.
        kind: The class of the event, such as `sync failed`.
        details: Anything else, as JSON.
        links: To click.
        client_url: The page of whoever tells it.
    """

    model_config = ConfigDict(frozen=True)

    summary: str = Field(min_length=1)
    source: str = Field(min_length=1)
    severity: Severity = "error"
    timestamp: datetime = Field(default_factory=lambda: datetime.now(UTC))
    component: str = ""
    group: str = ""
    kind: str = ""
    details: Mapping[str, Any] = {}
    links: tuple[Link, ...] = ()
    client_url: str | None = None

    def payload(self) -> dict[str, Any]:
        """The alert as the API takes it."""
        optional = {"component": self.component, "group": self.group, "class": self.kind}
        return {
            "summary": cut(self.summary, _SUMMARY),
            "source": cut(self.source, _FIELD),
            "severity": self.severity,
            "timestamp": timestamp(self.timestamp),
            **{key: cut(text, _FIELD) for key, text in optional.items() if text},
            **({"custom_details": dict(self.details)} if self.details else {}),
        }


class _Reply(BaseModel):
    status: str
    message: str = ""
    dedup_key: str | None = None


_REPLY = TypeAdapter(_Reply)


class PagerDutyRouting(Block):
    """Where a team's alerts go: the integration key of one PagerDuty service or ruleset.

    Example:
        ```python
        PagerDutyRouting(routing_key="…").save("data-platform")
        ```
    """

    _block_type_name: ClassVar[str] = "PagerDuty Routing"
    _block_type_slug: ClassVar[str] = "pagerduty-routing"
    _logo_url: ClassVar[HttpUrl | None] = HttpUrl("https://www.pagerduty.com/favicon.ico")
    _documentation_url: ClassVar[HttpUrl | None] = HttpUrl(
        "https://developer.pagerduty.com/docs/events-api-v2-overview"
    )
    _description: ClassVar[str] = "Opens and resolves alerts in a PagerDuty service."

    # pydantic's errors quote what they were given, and that may be the key in the wrong field.
    model_config = ConfigDict(hide_input_in_errors=True)

    routing_key: SecretStr = Field(
        title="Integration key",
        description="Of an Events API v2 integration: Service, Integrations. It has 32 characters.",
    )
    base_url: str = Field(
        default=_EXAMPLE,
        title="Base URL",
        description="Where the Events API is; another one for accounts in another service region.",
    )
    events_per_minute: int = Field(
        default=100,
        gt=0,
        title="Events per minute",
        description="An upper limit for this key. PagerDuty takes about 120.",
    )

    @field_validator("base_url")
    @classmethod
    def _normalise(cls, value: str) -> str:
        return check_base_url(value, example=_EXAMPLE).removesuffix("/enqueue")

    @field_validator("routing_key")
    @classmethod
    def _clean(cls, value: SecretStr) -> SecretStr:
        if is_masked(value):
            return value
        key = clean_secret(value)
        text = key.get_secret_value()
        if len(text) != _KEY_LENGTH or not text.isalnum():
            raise ValueError(
                f"An integration key has {_KEY_LENGTH} letters and digits, and this has {len(text)} "
                "characters. A REST API key is something else; take it from the service's integration."
            )
        return key

    @property
    def account(self) -> Hashable:
        """What makes two blocks the same integration: they share a client and its rate limit."""
        return ("pagerduty", self.base_url, self.routing_key)

    def api(self) -> AbstractAsyncContextManager[PagerDutyEvents]:
        """The client of this integration on the running event loop, shared with all its other users."""
        return shared_client(self.account, lambda: PagerDutyEvents(self))


class PagerDutyEvents(ApiClient):
    """The Events API v2: trigger, acknowledge and resolve by `dedup_key`.

    A routing key and a `dedup_key` name an alert. A trigger while it is open adds to it; so each of these is
    safe to send again.
    """

    def __init__(self, routing: PagerDutyRouting) -> None:
        if is_masked(routing.routing_key):
            raise AuthError(
                "PagerDuty", "the integration key is masked", guidance=MASKED_GUIDANCE, sent=False
            )
        self._key = routing.routing_key.get_secret_value()
        super().__init__(
            "PagerDuty",
            routing.base_url,
            rate=(routing.events_per_minute, 60.0),
            secrets=[self._key],
            read_timeout=8.0,
        )

    async def trigger(self, dedup_key: str, alert: Alert, *, patience: float = 15.0) -> str:
        """Open an alert, or add to the open one of this key.

        Args:
            dedup_key: What is wrong, the same for every occurrence; more than 255 characters are cut to
                a text that is as unique.
            alert: What to say.
            patience: Seconds for all attempts together.

        Returns:
            The key under which PagerDuty has it.

        Raises:
            VendorError: It was not taken; with PagerDuty's own list of errors where it gave one.
        """
        body = {
            "payload": alert.payload(),
            "client": "elt-flows",
            "links": [
                {"href": link.href, **({"text": cut(link.text, _FIELD)} if link.text else {})}
                for link in alert.links[:_LINKS]
            ],
            **({"client_url": alert.client_url} if alert.client_url else {}),
        }
        return await self._enqueue("trigger", dedup_key, body, patience)

    async def resolve(self, dedup_key: str, *, patience: float = 15.0) -> str:
        """Close the open alert of this key; where none is open, PagerDuty drops it.

        Raises:
            VendorError: It was not taken.
        """
        return await self._enqueue("resolve", dedup_key, {}, patience)

    async def acknowledge(self, dedup_key: str, *, patience: float = 15.0) -> str:
        """Say that somebody is at it.

        Raises:
            VendorError: It was not taken.
        """
        return await self._enqueue("acknowledge", dedup_key, {}, patience)

    async def _enqueue(self, action: Action, dedup_key: str, body: Mapping[str, Any], patience: float) -> str:
        key = shorten(dedup_key, _DEDUP_KEY)
        event = {"routing_key": self._key, "event_action": action, "dedup_key": key, **body}
        event = _fit(event)

        async def send() -> str:
            # The client takes any 2xx; PagerDuty's success is 202, whatever other clients believe.
            reply = await self.send("POST", "/enqueue", _REPLY, body=event)
            if reply.status != "success":
                raise VendorError(self.vendor, f"{reply.status}: {reply.message}", method="POST")
            return reply.dedup_key or key

        try:
            return await deliver(send, patience=patience, repeatable=True)
        except VendorError as error:
            raise self._with_reasons(error) from None

    def _with_reasons(self, error: VendorError) -> VendorError:
        """The same error with PagerDuty's list of what is wrong in it."""
        reasons = error.body.get("errors") if isinstance(error.body, dict) else None
        if isinstance(reasons, list) and reasons:
            error.message = self._redact(f"{error.message} ({'; '.join(str(r) for r in reasons)})")[:1000]
        return error


def timestamp(moment: datetime) -> str:
    """ISO 8601 with milliseconds and exactly one zone: `2026-03-02T05:00:41.000+00:00`."""
    aware = moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)
    return aware.astimezone(UTC).isoformat(timespec="milliseconds")


def cut(text: str, most: int) -> str:
    """The text, or its beginning with an ellipsis."""
    return text if len(text) <= most else text[: most - 1] + "…"


def shorten(key: str, most: int) -> str:
    """The key, or its beginning with a digest of the whole: cut keys of two things must not be the same."""
    if len(key) <= most:
        return key
    digest = hashlib.sha256(key.encode()).hexdigest()[:16]
    return f"{key[: most - 17]}-{digest}"


def _fit(event: dict[str, Any]) -> dict[str, Any]:
    """The event within PagerDuty's size: what can grow are the details, so they are what goes."""
    payload = event.get("payload")
    if payload is None or len(json.dumps(event).encode()) <= _BODY:
        return event
    small = {key: cut(str(value), 1000) for key, value in list(payload["custom_details"].items())[:50]}
    small["cut"] = "the details were larger than PagerDuty takes"
    return {**event, "payload": {**payload, "custom_details": small}}
