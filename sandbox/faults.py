"""Faults: what can be made to go wrong with the vendors' APIs, and the rules that say when."""

from __future__ import annotations

import itertools
import re
import threading
import time
from typing import Any, Literal, Self

import orjson
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Vendor = Literal[
    "airbyte",
    "hightouch",
    "slack",
    "pagerduty",
    "dbt_cloud",
    "fivetran",
    "power_bi",
    "tableau",
    "census",
]
FaultKind = Literal[
    "status",
    "html",
    "empty",
    "garbage",
    "truncated_json",
    "null_fields",
    "delay",
    "drop",
    "reset",
    "drop_after",
    "cut",
]

HTML_PAGE = (
    "<!doctype html><html><head><title>Service unavailable</title></head><body><h1>We'll be back</h1></html>"
)
GARBAGE = bytes([0x00, 0xFF, 0xFE]) + b'{"jobId": \x80\x81' + bytes(range(32))


class Fault(BaseModel):
    """One rule. It holds for requests that fit `vendor`, `method` and `path`; the oldest rule that fits wins.

    Kinds, answered in place of the vendor (the request is not processed):
        status: `status`, `body` and `headers`; html: a web page with `status`; empty: 200 without a body;
        garbage: 200 with bytes that are no text; drop: the connection is closed without a reply (FIN);
        reset: the same with a TCP reset.
    Kinds after the vendor (the request IS processed):
        drop_after: the connection is closed in place of the reply; cut: in the middle of the reply;
        truncated_json: the first half of the reply, as if whole; null_fields: the reply with `fields` (none
        given: all) set to null.
    delay: the request is processed `delay` seconds late; any other kind may have a `delay` as well.
    """

    model_config = ConfigDict(extra="forbid")

    kind: FaultKind
    vendor: Vendor | None = None
    method: str | None = None
    path: str | None = Field(None, description="Regular expression, searched for in the path.")
    status: int = Field(503, ge=100, le=599)
    body: Any = Field(None, description="Text, or anything else to be sent as JSON.")
    headers: dict[str, str] = Field(default_factory=dict)
    delay: float = Field(0.0, ge=0, description="Seconds before anything happens.")
    fields: list[str] = Field(default_factory=list)
    times: int | None = Field(None, ge=1, description="How many requests it hits; none: no limit.")
    after: int = Field(0, ge=0, description="How many requests that fit are let through first.")
    seconds: float | None = Field(None, gt=0, description="How long the rule lives; none: until deleted.")

    @field_validator("path")
    @classmethod
    def _compiles(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                re.compile(value)
            except re.error as exc:
                raise ValueError(f"not a regular expression: {exc}") from exc
        return value

    @model_validator(mode="after")
    def _delay_says_how_long(self) -> Self:
        if self.kind == "delay" and self.delay <= 0:
            raise ValueError("kind delay needs a delay in seconds")
        return self

    def reply(self) -> tuple[int, bytes, list[tuple[bytes, bytes]]]:
        """Status, body and headers of a kind that answers in place of the vendor."""
        if self.kind == "html":
            return self.status, HTML_PAGE.encode(), self._headers("text/html; charset=utf-8")
        if self.kind == "empty":
            return 200, b"", self._headers("application/json")
        if self.kind == "garbage":
            return 200, GARBAGE, self._headers("application/json")
        if isinstance(self.body, str):
            return self.status, self.body.encode(), self._headers("text/plain; charset=utf-8")
        body = b"" if self.body is None else orjson.dumps(self.body)
        return self.status, body, self._headers("application/json")

    def _headers(self, content_type: str) -> list[tuple[bytes, bytes]]:
        named = {"content-type": content_type} | {name.lower(): value for name, value in self.headers.items()}
        return [(name.encode("latin-1"), value.encode("latin-1")) for name, value in named.items()]


class _Rule:
    """A fault with its counters."""

    def __init__(self, fault_id: int, fault: Fault) -> None:
        self.id = fault_id
        self.fault = fault
        self.pattern = re.compile(fault.path) if fault.path else None
        self.until = None if fault.seconds is None else time.monotonic() + fault.seconds
        self.seen = 0
        self.hits = 0

    @property
    def spent(self) -> bool:
        worn = self.fault.times is not None and self.hits >= self.fault.times
        return worn or (self.until is not None and time.monotonic() >= self.until)

    def fits(self, vendor: str, method: str, path: str) -> bool:
        fault = self.fault
        return (
            (fault.vendor is None or fault.vendor == vendor)
            and (fault.method is None or fault.method.upper() == method)
            and (self.pattern is None or self.pattern.search(path) is not None)
        )


class FaultBook:
    """The rules that are switched on."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ids = itertools.count(1)
        self._rules: dict[int, _Rule] = {}

    def add(self, fault: Fault | None = None, **fields: Any) -> int:
        """Switch a fault on and return its id: `add(kind="status", status=503, times=2)`.

        Raises:
            pydantic.ValidationError: the fields make no fault.
        """
        rule = _Rule(next(self._ids), fault or Fault.model_validate(fields))
        with self._lock:
            self._rules[rule.id] = rule
        return rule.id

    def remove(self, fault_id: int) -> bool:
        """Switch a fault off; False when there is none of that id."""
        with self._lock:
            return self._rules.pop(fault_id, None) is not None

    def clear(self) -> None:
        """Switch all faults off."""
        with self._lock:
            self._rules.clear()

    def hits(self, fault_id: int) -> int:
        """How many requests a fault has hit so far."""
        return self._rules[fault_id].hits

    def take(self, vendor: str, method: str, path: str) -> Fault | None:
        """The fault for this request, counted as a hit, or None."""
        if not self._rules:
            return None
        with self._lock:
            for rule in self._rules.values():
                if rule.spent or not rule.fits(vendor, method, path):
                    continue
                rule.seen += 1
                if rule.seen > rule.fault.after:
                    rule.hits += 1
                    return rule.fault
        return None

    def listing(self) -> list[dict[str, Any]]:
        """All rules with their counters, as the control API writes them."""
        with self._lock:
            return [
                {
                    "id": rule.id,
                    "hits": rule.hits,
                    "spent": rule.spent,
                    **rule.fault.model_dump(exclude_defaults=True),
                }
                for rule in self._rules.values()
            ]
