"""Fivetran's webhooks: a sync has ended.

Vendor documentation: https://fivetran.com/docs/rest-api/webhooks. Retried for up to 24 hours after any answer
but 2xx, then switched off: events that are of no use here are acknowledged.
"""

from __future__ import annotations

from pydantic import AwareDatetime, BaseModel, Field

from blocks.receiver import FivetranWebhook
from blocks.signatures import check_signature
from deployments.receiver.source import Hook, Reading, Source
from tasks.events import EltEvent

_OUTCOMES = {
    "SUCCESSFUL": "succeeded",
    "FAILURE": "failed",
    "FAILURE_WITH_TASK": "failed",
    "RESCHEDULED": "rescheduled",
    "CANCELED": "cancelled",
}
_DUMMY = "_connection_1"  # of the test that a webhook can be put to


class _Data(BaseModel):
    status: str
    reason: str | None = None
    task_type: str | None = Field(default=None, alias="taskType")


class _Told(BaseModel):
    event: str


class _SyncEnd(BaseModel):
    created: AwareDatetime
    connector_id: str = Field(min_length=1)
    connector_name: str = ""
    connector_type: str = ""
    sync_id: str = Field(min_length=1)
    destination_group_id: str | None = None
    data: _Data


class FivetranSource(Source[FivetranWebhook]):
    """Each `sync_end` is an event; everything else is acknowledged."""

    kind = FivetranWebhook

    async def read(self, hook: Hook) -> Reading:
        """See `Source.read`."""
        check_signature("fivetran", hook.headers, hook.body, self.block.secrets)
        what = hook.read(_Told).event
        if what != "sync_end":
            return Reading(ignored=f"{what} is not an event that is used")
        if isinstance(document := hook.json(), dict) and document.get("connector_id") == _DUMMY:
            return Reading(ignored="a test")
        sync = hook.read(_SyncEnd)
        if (outcome := _OUTCOMES.get(sync.data.status)) is None:
            return Reading(ignored=f"{sync.data.status} is not an outcome that is known")
        event = EltEvent(
            name=f"elt.fivetran.sync.{outcome}",
            # A sync that is rescheduled goes on under its id.
            key=f"fivetran:{sync.sync_id}:{outcome}",
            occurred=sync.created,
            resource_id=f"elt.fivetran.connection.{sync.connector_id}",
            resource_name=sync.connector_name,
            payload={
                "connection_id": sync.connector_id,
                "connection_name": sync.connector_name,
                "service": sync.connector_type,
                "group_id": sync.destination_group_id,
                "sync_id": sync.sync_id,
                "status": sync.data.status,
                "reason": sync.data.reason,
                "task": sync.data.task_type,
            },
        )
        return Reading((event,))
