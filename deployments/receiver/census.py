"""Census's webhooks: a sync run has ended.

Vendor documentation: https://docs.getcensus.com/basics/developers/webhooks. A run's end is told twice, by
`sync.completed` and by `sync.success` or `sync.failed`; both are the same event. They carry no time.
"""

from __future__ import annotations

from datetime import UTC, datetime

from pydantic import BaseModel, Field

from blocks.receiver import CensusWebhook
from blocks.signatures import check_signature
from deployments.receiver.source import Hook, Reading, Source
from tasks.events import EltEvent

_OUTCOMES = {
    ("sync.completed", "ok"): "succeeded",
    ("sync.completed", "emergency"): "failed",
    ("sync.success", None): "succeeded",
    ("sync.failed", None): "failed",
}


class _Told(BaseModel):
    event: str
    status: str | None = None


class _Run(BaseModel):
    workspace_id: int
    sync_id: int
    sync_run_id: int = Field(ge=1)


class CensusSource(Source[CensusWebhook]):
    """Each run that has ended is an event; everything else is acknowledged."""

    kind = CensusWebhook

    async def read(self, hook: Hook) -> Reading:
        """See `Source.read`."""
        check_signature("census", hook.headers, hook.body, self.block.secrets)
        what = hook.read(_Told)
        status = what.status if what.event == "sync.completed" else None
        if (outcome := _OUTCOMES.get((what.event, status))) is None:
            return Reading(ignored=f"{what.event} is not an event that is used")
        run = hook.read(_Run)
        event = EltEvent(
            name=f"elt.census.sync.{outcome}",
            key=f"census:{run.sync_run_id}",
            occurred=datetime.now(UTC),
            resource_id=f"elt.census.sync.{run.sync_id}",
            payload={
                "workspace_id": str(run.workspace_id),
                "sync_id": str(run.sync_id),
                "sync_run_id": str(run.sync_run_id),
            },
        )
        return Reading((event,))
