"""PagerDuty: an alert for each incident, which repeats add to and recovery resolves.

Vendor documentation: https://developer.pagerduty.com/docs/events-api-v2-overview
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    WithJsonSchema,
    field_serializer,
)

from blocks.http import VendorError
from blocks.pagerduty import Alert, Link, PagerDutyEvents, PagerDutyRouting, Severity
from blocks.reference import NAMED, load_block, stored_block
from tasks.alerts import Notifier, NotifyParameters, is_gone, place
from tasks.incidents import Alarm, Bulletin, Change, Level

_AT_ONCE = 10
_HELD = 50

RoutingRef = Annotated[
    PagerDutyRouting | str,
    NAMED,
    # In a form and in a deployment it is the name; the key belongs into a block.
    WithJsonSchema({"type": "string", "description": "Name of a saved PagerDuty Routing block."}),
]


class Severities(BaseModel):
    """How bad each kind of failure is. One without a severity is not told."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    failed: Severity | None = Field(
        default="error", title="Failed", description="A step failed, and the run with it."
    )
    partial: Severity | None = Field(
        default="warning",
        title="Partial",
        description="A step failed, and the run's rule bears that: it ended as PartiallyRefreshed.",
    )
    refused: Severity | None = Field(
        default="critical",
        title="Refused",
        description="The run could not begin, or its process died: nothing at all is refreshed.",
    )
    waiting: Severity | None = Field(
        default="info", title="Waiting", description="The run waits for somebody's approval."
    )


class PagerDutyNotify(NotifyParameters):
    """Who is paged, and how loudly."""

    tool: Literal["pagerduty"] = "pagerduty"
    routing: RoutingRef = Field(title="Routing", description="For failures that have no owner.")
    owners: dict[str, RoutingRef] = Field(
        default_factory=dict, title="Owners", description="The routing of each owner, by the owner's name."
    )
    severity: Severities = Field(default_factory=Severities, title="Severity")

    @field_serializer("routing", mode="wrap")
    def _by_name(self, routing: PagerDutyRouting | str, handler: SerializerFunctionWrapHandler) -> Any:
        # What is stored with a flow run must work in a retry of it, and hold no key.
        return stored_block(routing, PagerDutyRouting, handler)

    @field_serializer("owners", mode="wrap")
    def _each_by_name(
        self, owners: dict[str, PagerDutyRouting | str], handler: SerializerFunctionWrapHandler
    ) -> Any:
        stored = handler(owners)
        return {owner: _stored(routing, stored[owner]) for owner, routing in owners.items()}

    async def check(self) -> None:
        """See that every routing block that is named is saved.

        Raises:
            BlockNotFound: One is not.
        """
        for routing in (self.routing, *self.owners.values()):
            await load_block(PagerDutyRouting, routing)

    def notifier(self) -> Notifier:
        """Sends events."""
        return _Events(self)


class _Events:
    """Tells by events of PagerDuty's Events API v2, one for each incident and run."""

    title = "PagerDuty"
    summary_to: str | None = None

    def __init__(self, notify: PagerDutyNotify) -> None:
        self._severity = notify.severity
        self._main = _routing_place(notify.routing)
        self._owners = {owner: _routing_place(routing) for owner, routing in notify.owners.items()}
        self._given: dict[str, PagerDutyRouting | str] = {
            _routing_place(routing): routing for routing in (notify.routing, *notify.owners.values())
        }
        self.route = f"pagerduty/{self._main}"

    def to(self, owner: str | None) -> str:
        return self._owners.get(owner or "", self._main)

    async def gone(self, to: str) -> bool:
        return to not in self._given and await is_gone(PagerDutyRouting, to)

    def wants(self, alarm: Alarm) -> bool:
        return self._of(alarm.level) is not None

    def _of(self, level: Level) -> Severity | None:
        severity: Severity | None = getattr(self._severity, level)
        return severity

    async def deliver(self, to: str, changes: Sequence[Change], bulletin: Bulletin, patience: float) -> None:
        routing = await load_block(PagerDutyRouting, self._given.get(to, to))
        slots = asyncio.Semaphore(_AT_ONCE)
        async with routing.api() as api:

            async def send(change: Change) -> None:
                async with slots:
                    try:
                        await self._send(api, change, bulletin, patience)
                    except VendorError as error:
                        change.problem = str(error)

            await asyncio.gather(*(send(change) for change in changes))

    async def _send(self, api: PagerDutyEvents, change: Change, bulletin: Bulletin, patience: float) -> None:
        key = change.incident.key
        if change.ends:
            # Also where we don't know that it was told: what is not open, PagerDuty drops.
            await api.resolve(key, patience=patience)
        else:
            await api.trigger(key, self._alert(change, bulletin), patience=patience)
        change.done({"dedup_key": key})

    def _alert(self, change: Change, bulletin: Bulletin) -> Alert:
        incident = change.incident
        reason = " ".join(incident.reason.split())
        links = [
            Link(href=incident.url, text=incident.link) if incident.url else None,
            Link(href=bulletin.run_url, text=f"run {bulletin.run}") if bulletin.run_url else None,
        ]
        details = {
            "reason": incident.reason,
            "owner": incident.owner,
            "run": bulletin.run,
            "run id": bulletin.run_id,
            "deployment": bulletin.deployment,
            "tags": bulletin.tags,
            "failing since": incident.since.isoformat(timespec="seconds"),
            "runs that failed": incident.runs,
            "held back": change.held[:_HELD],
            "steps": [alarm.title for alarm in change.alarms[:_HELD]] if incident.many else [],
        }
        return Alert(
            summary=f"{incident.title} {incident.what} in {bulletin.pipeline}"
            + (f": {reason}" if reason else ""),
            source=incident.tool or bulletin.pipeline,
            severity=self._of(incident.level) or "error",
            timestamp=bulletin.at,
            component=incident.title,
            group=bulletin.pipeline,
            kind=incident.what,
            details={key: value for key, value in details.items() if value},
            links=tuple(link for link in links if link),
            client_url=bulletin.run_url,
        )


def _stored(routing: PagerDutyRouting | str, written: Any) -> Any:
    return stored_block(routing, PagerDutyRouting, lambda _: written)


def _routing_place(routing: PagerDutyRouting | str) -> str:
    secret = "" if isinstance(routing, str) else routing.routing_key.get_secret_value()
    return place(routing, PagerDutyRouting, secret)
