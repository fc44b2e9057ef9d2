"""The request log: who asked what, when, and what came back, with secrets left out."""

from __future__ import annotations

import re
import time
from collections import deque
from dataclasses import asdict, dataclass
from typing import Any
from urllib.parse import parse_qsl

import orjson

_SECRET = re.compile(r"secret|password|token|api_?key|routing_?key|authorization", re.IGNORECASE)
_WEBHOOK = re.compile(r"^(/services/[^/]+/[^/]+)/.+$")
_HIDDEN = "***"


@dataclass(slots=True)
class LoggedRequest:
    """One request. `status` is None while it is served, and when the connection was cut without a reply."""

    vendor: str
    method: str
    path: str
    query: str
    body: Any
    time: float  # epoch seconds
    status: int | None = None
    seconds: float | None = None
    fault: str | None = None


class RequestLog:
    """The latest requests to the vendors' APIs, oldest first."""

    def __init__(self, keep: int = 100_000) -> None:
        self._entries: deque[LoggedRequest] = deque(maxlen=keep)

    def add(self, vendor: str, method: str, path: str, query: str, body: bytes) -> LoggedRequest:
        """Note a request at its arrival."""
        shown = _WEBHOOK.sub(rf"\1/{_HIDDEN}", path) if vendor == "slack" else path
        entry = LoggedRequest(
            vendor, method, shown, query, _without_secrets(body) if body else None, time.time()
        )
        self._entries.append(entry)
        return entry

    def find(
        self, *, vendor: str | None = None, method: str | None = None, path: str | None = None
    ) -> list[LoggedRequest]:
        """The requests that fit; `path` is a regular expression searched for in the path."""
        pattern = re.compile(path) if path else None
        return [
            entry
            for entry in self._entries.copy()
            if (vendor is None or entry.vendor == vendor)
            and (method is None or entry.method == method.upper())
            and (pattern is None or pattern.search(entry.path))
        ]

    def count(self, *, vendor: str | None = None, method: str | None = None, path: str | None = None) -> int:
        """How many requests fit, see `find`."""
        return len(self.find(vendor=vendor, method=method, path=path))

    def clear(self) -> None:
        """Forget all."""
        self._entries.clear()

    def __len__(self) -> int:
        return len(self._entries)


def as_dict(entry: LoggedRequest) -> dict[str, Any]:
    """The entry as the control API writes it."""
    return asdict(entry)


def _without_secrets(body: bytes) -> Any:
    try:
        parsed = orjson.loads(body)
    except orjson.JSONDecodeError:
        text = body.decode("utf-8", "replace")
        parsed = dict(parse_qsl(text)) or text[:1000]
    return _redact(parsed)


def _redact(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _HIDDEN if _SECRET.search(str(key)) else _redact(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_redact(inner) for inner in value]
    return value
