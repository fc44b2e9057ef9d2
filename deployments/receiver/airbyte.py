"""Airbyte's notifications: a job has succeeded or failed.

Airbyte signs nothing and sends each notification once, so the address carries a secret, a notification is
no more than a hint, and the job is read again from Airbyte's own API: what that says is the event. Of a
cancelled job there is no notification, and none at all where the receiver was away: those are for the look at
Airbyte's own list of jobs (`tasks.looking.airbyte`).

Vendor documentation: https://docs.airbyte.com/platform/cloud/managing-airbyte-cloud/manage-airbyte-cloud-notifications
"""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from uuid import UUID

from prefect.client.orchestration import PrefectClient
from pydantic import AwareDatetime, BaseModel, Field
from starlette.responses import Response

from blocks.errors import NotFoundError
from blocks.receiver import AirbyteWebhook
from blocks.signatures import is_secret
from deployments.receiver.source import AWAY, Desk, Hook, Reading, Refused, Source, TryAgain
from tasks.airbyte_ended import ended_event
from tasks.airbyte_jobs import AirbyteVendor

_EARLY = (0.5, 1.0, 2.0)
"""Seconds between looks at a job that has not ended yet, while Airbyte waits for the answer."""

_PATIENCE = 15.0
"""Seconds for all of that, handing over included."""

_LATER = (5.0, 10.0, 15.0, 30.0, 60.0, 120.0, 300.0)
"""The same when it has had its answer, 503: it does not ask again."""


class _Connection(BaseModel):
    id: UUID


class _Data(BaseModel):
    job_id: int = Field(alias="jobId", ge=1)
    connection: _Connection
    finished_at: AwareDatetime | None = Field(default=None, alias="finishedAt")


class _Notification(BaseModel):
    data: _Data | None = None


class NotEnded(TryAgain):
    """The job that was told of is still running by Airbyte's own API."""


class AirbyteSource(Source[AirbyteWebhook]):
    """Each job that has ended is an event; notices without a job are acknowledged."""

    kind = AirbyteWebhook

    def __init__(self, block: AirbyteWebhook, name: str) -> None:
        super().__init__(block, name)
        self._vendor = AirbyteVendor(block.server)

    @property
    def shown_path(self) -> str:
        """With a placeholder for the secret."""
        return f"{self.path}/<secret>"

    async def open(self, stack: AsyncExitStack, client: PrefectClient) -> None:
        """Also hold the account's client, and with it the token, for the next notification."""
        await super().open(stack, client)
        await stack.enter_async_context(self.block.server.client())

    async def answer(self, hook: Hook, desk: Desk) -> Response:
        """As any source; but what can't be taken now is tried again here, for Airbyte tells of it once."""
        try:
            async with asyncio.timeout(_PATIENCE):
                return await super().answer(hook, desk)
        except TimeoutError:
            desk.later(self._later(hook, desk), self._what(hook))
            raise TryAgain("Airbyte's API does not answer in time") from None
        except AWAY:
            desk.later(self._later(hook, desk), self._what(hook))
            raise

    def _what(self, hook: Hook) -> str:
        """What a person can look up at Airbyte when it comes to nothing."""
        data = hook.read(_Notification).data
        return f"{self.shown_path}: job {data.job_id if data else '?'}"

    async def _later(self, hook: Hook, desk: Desk) -> None:
        for last, pause in enumerate(_LATER, start=1 - len(_LATER)):
            goes_on = await desk.pause(pause)
            try:
                await desk.hand_over((await self._read(hook, ())).events, ())
            except AWAY:
                if not last or not goes_on:
                    raise
            else:
                return

    async def read(self, hook: Hook) -> Reading:
        """See `Source.read`."""
        return await self._read(hook, _EARLY)

    async def _read(self, hook: Hook, looks: tuple[float, ...]) -> Reading:
        if not is_secret(hook.tail, [self.block.url_secret]):
            raise Refused("there is no such source", 404)
        data = hook.read(_Notification).data
        if data is None:
            return Reading(ignored="a notice without a job")
        if data.finished_at is None:
            return Reading(ignored="a job that has not begun")  # in a notice of one that is queued
        return await self._ended(data, looks)

    async def _ended(self, data: _Data, looks: tuple[float, ...]) -> Reading:
        for pause in (*looks, None):
            try:
                found = await self._vendor.look_up(str(data.job_id))
            except NotFoundError:
                raise Refused(f"this Airbyte has no job {data.job_id}") from None
            if found[0].resource_id != str(data.connection.id):
                raise Refused(f"job {data.job_id} is not of this connection")
            if event := await ended_event(self.name, found, self.client, occurred=data.finished_at):
                return Reading((event,))
            if pause is not None:
                await asyncio.sleep(pause)
        raise NotEnded(f"job {data.job_id} has not ended by Airbyte's own word")
