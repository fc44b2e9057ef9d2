"""Handing an event over to the Prefect server: its runs first, then the event itself.

In this order, because a run is created with an idempotency key and so is either there or not, while an event
that the server has accepted may still be lost with its memory. Whoever calls acknowledges to its sender only
when `hand_over` has returned; until then it, or its sender, tries again, and no run is made twice.

The event itself is stored once, but Prefect's own triggers see it each time that it is handed over.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from datetime import UTC, datetime
from typing import TypeVar
from uuid import UUID

import httpx
from prefect import get_client
from prefect.client.orchestration import PrefectClient
from prefect.exceptions import ObjectNotFound
from prefect.settings import PREFECT_API_URL
from prefect.states import Scheduled
from prefect.types._datetime import now

from tasks.events.model import EltEvent, HandedOver, HandOverError, Related, StartedRun
from tasks.events.triggers import OnceTrigger, TriggerFailed, received

TRIGGER_FAILED = "elt.trigger.failed"

_AT_ONCE = 5
"""Requests at a time: with more, a server on SQLite (one writer) answers 503 and the client waits."""

_TOGETHER = 100
"""Events in one request."""

_REFUSED = (400, 404, 409, 422)
"""What the server answers where the parameters are wrong, or the deployment is gone."""

T = TypeVar("T")
R = TypeVar("R")


async def hand_over(
    events: Sequence[EltEvent], triggers: Sequence[OnceTrigger], client: PrefectClient | None = None
) -> list[HandedOver]:
    """Start what the events start, once, and make them events of the Prefect server.

    A trigger that can't start its run (a template that does not render, parameters that the deployment
    refuses, no such deployment) is not the sender's fault, and no retry would help: it becomes an event
    `elt.trigger.failed`, and everything else goes on.

    Args:
        events: What has happened; the same event may come again, here or in a later call.
        triggers: From `read_triggers`.
        client: Of the server; one for the time of this call by default.

    Returns:
        For each event, in the same order, its runs: those made now and those made when it first came.

    Raises:
        HandOverError: The server did not take everything. The caller must not acknowledge.
    """
    distinct = {event.id: event for event in events}
    pairs = [(event, trigger) for event in distinct.values() for trigger in triggers if trigger.covers(event)]
    with _told_as_ours():
        async with _connected(client) as api:
            names = dict.fromkeys(trigger.deployment for _, trigger in pairs)
            ids = dict(zip(names, await _each(names, lambda name: _deployment(api, name)), strict=True))
            started = await _each(pairs, lambda pair: _start(api, *pair, ids[pair[1].deployment]))
            done = {id_: HandedOver(event_id=id_) for id_ in distinct}
            failures: list[EltEvent] = []
            for (event, trigger), outcome in zip(pairs, started, strict=True):
                so_far = done[event.id]
                if isinstance(outcome, StartedRun):
                    so_far = so_far.model_copy(update={"runs": (*so_far.runs, outcome)})
                else:
                    failures.append(_failure(event, trigger, ids[trigger.deployment], str(outcome)))
                    so_far = so_far.model_copy(update={"failed": (*so_far.failed, trigger.name)})
                done[event.id] = so_far
            told = [_with_runs(event, done[event.id].runs) for event in distinct.values()] + failures
            for first in range(0, len(told), _TOGETHER):
                await _post(api, told[first : first + _TOGETHER])
    return [done[event.id] for event in events]


@contextlib.contextmanager
def _told_as_ours() -> Iterator[None]:
    try:
        yield
    except httpx.HTTPStatusError as error:
        status = error.response.status_code
        what = (
            "credentials are wrong or missing (PREFECT_API_AUTH_STRING)"
            if status in (401, 403)
            else "it failed"
        )
        raise HandOverError(f"the Prefect server answered {status}: {what}") from error
    except httpx.HTTPError as error:
        raise HandOverError(f"the Prefect server can't be reached ({type(error).__name__})") from error


@contextlib.asynccontextmanager
async def _connected(client: PrefectClient | None) -> AsyncIterator[PrefectClient]:
    if client is not None:
        yield client
        return
    if not PREFECT_API_URL.value():
        # Prefect would start a server of its own for this call, and the events would end with it.
        raise HandOverError("PREFECT_API_URL is not set: there is no Prefect server to hand events to")
    async with get_client() as own:
        yield own


async def _each(items: Sequence[T] | dict[T, None], work: Callable[[T], Awaitable[R]]) -> list[R]:
    """The results for all items, a few at a time; the first error ends the others."""
    limit = asyncio.Semaphore(_AT_ONCE)

    async def one(item: T) -> R:
        async with limit:
            return await work(item)

    running = [asyncio.ensure_future(one(item)) for item in items]
    try:
        return await asyncio.gather(*running)
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


async def _deployment(api: PrefectClient, name: str) -> UUID | None:
    try:
        return (await api.read_deployment_by_name(name)).id
    except ObjectNotFound:
        return None


async def _start(
    api: PrefectClient, event: EltEvent, trigger: OnceTrigger, deployment: UUID | None
) -> StartedRun | TriggerFailed:
    """The run of a trigger for an event: a new one, or that which the event has started before."""
    if deployment is None:
        return TriggerFailed(f"there is no deployment {trigger.deployment} on the server: was it deployed?")
    try:
        run = await api.create_flow_run_from_deployment(
            deployment,
            parameters=trigger.rendered(event),
            job_variables=trigger.job_variables,
            state=Scheduled(
                scheduled_time=now("UTC") + trigger.schedule_after,
                message=f"Started by {event.label}, trigger {trigger.name!r}, event {event.id}",
            ),
            tags=[f"event:{event.name}"],
            # Two deployments of one flow, such as of two environments, may have the same trigger.
            idempotency_key=f"{event.id}:{trigger.deployment}:{trigger.name}",
            labels={
                "elt.event.id": str(event.id),
                "elt.event.name": event.name,
                "elt.event.key": event.key,
                "elt.trigger": trigger.name,
            },
        )
    except TriggerFailed as error:
        return error
    except httpx.HTTPStatusError as error:
        if error.response.status_code not in _REFUSED:
            raise
        return TriggerFailed(f"{trigger.deployment} refused the parameters: {_detail(error.response)}")
    return StartedRun(flow_run_id=run.id, deployment=trigger.deployment, name=run.name)


def _detail(response: httpx.Response) -> str:
    try:
        reply = response.json()
    except ValueError:
        return response.text[:500]
    detail = reply.get("detail") or reply.get("exception_detail") if isinstance(reply, dict) else reply
    return str(detail)[:500]


def _with_runs(event: EltEvent, runs: Sequence[StartedRun]) -> EltEvent:
    """The event with its runs beside it, so that it stands on their pages, too."""
    related = [
        Related(id=f"prefect.flow-run.{run.flow_run_id}", role="flow-run", name=run.name) for run in runs
    ]
    return event.model_copy(update={"related": (*event.related, *related)})


def _failure(event: EltEvent, trigger: OnceTrigger, deployment: UUID | None, reason: str) -> EltEvent:
    related = [Related(id=f"prefect.deployment.{deployment}", role="deployment")] if deployment else []
    return EltEvent(
        name=TRIGGER_FAILED,
        key=f"{event.id}:{trigger.deployment}:{trigger.name}",
        occurred=datetime.now(UTC),
        resource_id=f"elt.trigger.{trigger.name}",
        resource_name=trigger.name,
        payload={
            "trigger": trigger.name,
            "deployment": trigger.deployment,
            "reason": reason,
            "event": {
                "id": str(event.id),
                "name": event.name,
                "key": event.key,
                "resource_id": event.resource_id,
            },
        },
        related=tuple(related),
    )


async def _post(api: PrefectClient, events: Sequence[EltEvent]) -> None:
    told = [received(event).model_dump(mode="json", exclude={"received"}) for event in events]
    response = await api.request("POST", "/events", json=told)
    response.raise_for_status()
