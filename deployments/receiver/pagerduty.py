"""PagerDuty's V3 webhooks: an incident was opened, acknowledged, resolved and so on.

Vendor documentation: https://developer.pagerduty.com/docs/webhooks-overview
"""

from __future__ import annotations

import re

from pydantic import AwareDatetime, BaseModel, Field

from blocks.receiver import PagerDutyWebhook
from blocks.signatures import check_signature
from deployments.receiver.source import Hook, Reading, Source
from tasks.events import EltEvent

_INCIDENT = re.compile(r"incident\.([a-z_.]{1,60})")


class _Service(BaseModel):
    id: str = ""
    summary: str = ""


class _Incident(BaseModel):
    id: str = Field(min_length=1)
    number: int | None = None
    title: str = ""
    status: str = ""
    urgency: str | None = None
    html_url: str | None = None
    incident_key: str | None = None
    service: _Service = _Service()


class _Told(BaseModel):
    event_type: str


class _Message(BaseModel):
    event: _Told


class _Event(BaseModel):
    id: str = Field(min_length=1)
    occurred_at: AwareDatetime
    data: _Incident


class _Whole(BaseModel):
    event: _Event


class PagerDutySource(Source[PagerDutyWebhook]):
    """Each `incident.…` is an event; everything else (a ping, services) is acknowledged."""

    kind = PagerDutyWebhook

    async def read(self, hook: Hook) -> Reading:
        """See `Source.read`."""
        check_signature("pagerduty", hook.headers, hook.body, self.block.secrets)
        what = hook.read(_Message).event.event_type
        if (named := _INCIDENT.fullmatch(what)) is None:
            return Reading(ignored=f"{what} is not an event that is used")
        told = hook.read(_Whole).event
        incident = told.data
        event = EltEvent(
            name=f"elt.pagerduty.incident.{named.group(1)}",
            key=f"pagerduty:{told.id}",
            occurred=told.occurred_at,
            resource_id=f"elt.pagerduty.incident.{incident.id}",
            resource_name=incident.title,
            payload={
                "incident_id": incident.id,
                "number": incident.number,
                "title": incident.title,
                "status": incident.status,
                "urgency": incident.urgency,
                "url": incident.html_url,
                "incident_key": incident.incident_key,
                "service_id": incident.service.id,
                "service": incident.service.summary,
            },
        )
        return Reading((event,))
