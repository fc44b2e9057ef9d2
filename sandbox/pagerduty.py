"""PagerDuty's side of the stage: the Events API v2 with the alerts that come of its events."""

from __future__ import annotations

import threading
import time
from collections import deque
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from sandbox import catalog

PREFIX = "/pagerduty/v2"
_SIZE = 512_000  # bytes
_SUMMARY, _DEDUP_KEY = 1024, 255
AlertState = Literal["triggered", "acknowledged", "resolved"]


class PagerDutySettings(BaseModel):
    """What can be set about PagerDuty as a whole."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True)

    events_per_minute: int | None = Field(120, ge=1, description="Per key; beyond it: 429. None: off.")


class _Link(BaseModel):
    href: str = Field(min_length=1)
    text: str = ""


class _Image(BaseModel):
    src: str = Field(pattern=r"^https://")
    href: str | None = None
    alt: str | None = None


class _Payload(BaseModel):
    summary: str = Field(min_length=1, max_length=_SUMMARY)
    source: str = Field(min_length=1)
    severity: Literal["critical", "error", "warning", "info"]
    timestamp: datetime | None = None
    component: str | None = None
    group: str | None = None
    kind: str | None = Field(None, alias="class")
    custom_details: Any = None


class _Event(BaseModel):
    routing_key: str
    event_action: Literal["trigger", "acknowledge", "resolve"]
    dedup_key: str | None = Field(None, min_length=1, max_length=_DEDUP_KEY)
    payload: _Payload | None = None
    links: list[_Link] = []
    images: list[_Image] = []
    client: str | None = None
    client_url: str | None = None


@dataclass
class Alert:
    """One alert of a service, from its trigger to its resolve."""

    service: str
    dedup_key: str
    state: AlertState
    events: list[dict[str, Any]] = field(default_factory=list)  # oldest first, without the routing key
    opened: float = field(default_factory=time.time)  # epoch seconds

    @property
    def triggers(self) -> list[dict[str, Any]]:
        """The triggers: the one that opened it, and what was added to it."""
        return [event for event in self.events if event["event_action"] == "trigger"]

    @property
    def summary(self) -> str:
        """What the last trigger says."""
        return str(self.triggers[-1]["payload"]["summary"])

    @property
    def severity(self) -> str:
        """How bad the last trigger says it is."""
        return str(self.triggers[-1]["payload"]["severity"])

    def reply(self) -> dict[str, Any]:
        """The alert as the control API writes it."""
        return {
            "service": self.service,
            "dedup_key": self.dedup_key,
            "state": self.state,
            "severity": self.severity,
            "summary": self.summary,
            "opened": self.opened,
            "events": self.events,
        }


class PagerDuty:
    """The services, one for each integration key, and their alerts."""

    def __init__(self) -> None:
        self.settings = PagerDutySettings()
        self.alerts: list[Alert] = []  # oldest first
        self.dropped: list[dict[str, Any]] = []  # what was accepted and had no open alert to act on
        self._services = {key: name for name, key in catalog.PAGERDUTY_KEYS.items()}
        self._recent: dict[str, deque[float]] = {name: deque() for name in catalog.PAGERDUTY_KEYS}
        self._lock = threading.Lock()

    def open_of(self, service: str | None = None) -> list[Alert]:
        """The alerts that are not resolved, by key: those of one run arrive in any order."""
        found = [a for a in self.alerts if a.state != "resolved" and service in (None, a.service)]
        return sorted(found, key=lambda alert: alert.dedup_key)

    def resolve_by_hand(self, dedup_key: str) -> None:
        """What a person does in PagerDuty's app.

        Raises:
            KeyError: no open alert of this key.
        """
        found = [alert for alert in self.open_of() if alert.dedup_key == dedup_key]
        if not found:
            raise KeyError(dedup_key)
        for alert in found:
            alert.state = "resolved"

    def clear(self) -> None:
        """Forget all alerts."""
        with self._lock:
            self.alerts.clear()
            self.dropped.clear()

    def routes(self) -> list[Route]:
        """The one route that the Events API has for alerts."""
        return [Route(f"{PREFIX}/enqueue", self._enqueue, methods=["POST"])]

    async def _enqueue(self, request: Request) -> Response:
        body = await request.body()
        if len(body) > _SIZE:
            return _refused(400, "Event object is invalid", ["the event is larger than 512 KB"])
        try:
            raw = orjson.loads(body)
        except orjson.JSONDecodeError:
            return _reply(
                400, "Unrecognized object", "Event object format is unrecognized", errors=["JSON parse error"]
            )
        try:
            event = _Event.model_validate(raw)
        except ValidationError as error:
            return _refused(400, "Event object is invalid", _problems(error))
        if event.event_action == "trigger" and event.payload is None:
            return _refused(400, "Event object is invalid", ["'payload' is missing or blank"])
        if event.event_action != "trigger" and not event.dedup_key:
            return _refused(400, "Event object is invalid", ["'dedup_key' is missing or blank"])
        service = self._services.get(event.routing_key)
        if service is None:
            return _refused(400, "Event object is invalid", ["Invalid routing key"])
        if self._too_fast(service):
            return _reply(429, "throttle exceeded", "Requests for this service are arriving too quickly.")
        with self._lock:
            key = self._take(service, event, raw)
        return _reply(202, "success", "Event processed", dedup_key=key)

    def _take(self, service: str, event: _Event, raw: dict[str, Any]) -> str:
        key = event.dedup_key or f"{len(self.alerts) + 1:032x}"
        shown = {name: value for name, value in raw.items() if name != "routing_key"} | {"dedup_key": key}
        alert = next((a for a in self.open_of(service) if a.dedup_key == key), None)
        if alert is None and event.event_action != "trigger":
            self.dropped.append(shown)
            return key
        if alert is None:
            alert = Alert(service, key, "triggered")
            self.alerts.append(alert)
        alert.events.append(shown)
        if event.event_action == "acknowledge":
            alert.state = "acknowledged"
        elif event.event_action == "resolve":
            alert.state = "resolved"
        return key

    def _too_fast(self, service: str) -> bool:
        limit = self.settings.events_per_minute
        if limit is None:
            return False
        recent, now = self._recent[service], time.monotonic()
        while recent and recent[0] < now - 60:
            recent.popleft()
        if len(recent) >= limit:
            return True
        recent.append(now)
        return False


def _problems(error: ValidationError) -> list[str]:
    return [
        f"'{'.'.join(str(part) for part in problem['loc']) or 'event'}' is invalid: {problem['msg']}"
        for problem in error.errors(include_url=False, include_input=False, include_context=False)
    ]


def _refused(status: int, message: str, errors: list[str]) -> Response:
    return _reply(status, "invalid event", message, errors=errors)


def _reply(status: int, word: str, message: str, **more: Any) -> Response:
    body = orjson.dumps({"status": word, "message": message, **more})
    return Response(body, status, media_type="application/json")
