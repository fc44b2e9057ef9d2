"""Fivetran's syncs for the engine.

Fivetran has no jobs: a trigger returns nothing, and a connection says only what it is doing and when it last
succeeded and last failed. So what a connection said right before the trigger is kept (`Before`), and the
first end that is newer than that is ours.

Vendor documentation: https://fivetran.com/docs/rest-api and its tutorial "Trigger syncs manually".
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict

from blocks.fivetran import Connection, FivetranApi, FivetranCredentials, Notice
from blocks.http import TRANSIENT, ConflictError, VendorError
from blocks.reference import block_name
from tasks.jobs import (
    AccountVendor,
    AlreadyRunning,
    InputError,
    Intent,
    JobHandle,
    JobRequest,
    JobState,
    JobStatus,
    PlainRequest,
)

How = Literal["sync", "force", "resync"]
Rescheduled = Literal["wait", "fail", "retrigger"]

_FEW = 3  # up to so many connections are read one by one: a list would cost as much
_AT_ONCE = 10
_BEFORE_NEXT_TRIGGER = 60.0  # seconds in which the same connection is not triggered again


@dataclass(frozen=True)
class FivetranRequest(PlainRequest):
    """A sync of one connection, as the engine takes it."""

    how: How = "sync"
    scope: Mapping[str, Sequence[str]] | None = None
    rescheduled: Rescheduled = "retrigger"
    timeout: float = 0.0


class Before(BaseModel):
    """What must be remembered from before a trigger. It is a handle's `baseline`, as JSON.

    Attributes:
        at: When it was read, by our clock. It names the sync: Fivetran's we know only to a second.
        asked: The same moment by Fivetran's clock.
        ended: When a sync of the connection had last ended, well or not; None when none ever had.
        state: What the connection was doing.
        historical: Whether a historical sync was unfinished.
        how: What is asked for.
        rescheduled: What to do if Fivetran puts the sync off.
        until: When we stop waiting: nothing is triggered after that.
    """

    model_config = ConfigDict(frozen=True)

    at: AwareDatetime
    asked: AwareDatetime
    ended: AwareDatetime | None = None
    state: str
    historical: bool = False
    how: How = "sync"
    rescheduled: Rescheduled = "wait"
    until: AwareDatetime | None = None

    @property
    def over_another(self) -> bool:
        """Whether a sync was running already."""
        return self.state == "syncing"

    def text(self) -> str:
        """As it is kept."""
        return self.model_dump_json(exclude_none=True)

    @classmethod
    def of_intent(cls, intent: Intent) -> Before | None:
        """What was kept with an intent; None where we did not come to that."""
        if intent.baseline is None:
            return None
        before = cls.model_validate_json(intent.baseline)
        # A retry must not stop the sync of an earlier attempt, which Fivetran went on with, nor have history
        # loaded anew while it is being loaded.
        if intent.repeat and (before.how == "force" or before.historical):
            return before.model_copy(update={"how": "sync"})
        return before


class FivetranVendor(AccountVendor[FivetranApi]):
    """Fivetran's syncs for the engine."""

    name = "fivetran"
    on_partial: Literal["fail", "warn", "ok"] = "fail"
    # For how long a connection goes on saying `scheduled` after a trigger is not documented.
    grace = 20.0

    def __init__(self, credentials: FivetranCredentials) -> None:
        super().__init__(credentials.api, credentials.account, block_name(credentials, FivetranCredentials))
        self._credentials = credentials
        # By connection: the time that it was rescheduled for when we triggered it again, and when that was.
        self._again: dict[str, tuple[datetime | None, float]] = {}

    # -- starting -----------------------------------------------------------------------------------------

    async def baseline(self, request: FivetranRequest) -> str:
        """What the connection says right before the trigger.

        Raises:
            InputError: It is paused, or its setup is broken or incomplete: no sync of it would run.
        """
        async with self._connect() as api:
            connection = await api.connection(request.resource_id, fresh=True, retry=False)
            if problem := problem_of(connection):
                raise InputError(problem)
            now = datetime.now(UTC)
            asked = api.theirs(now)
        return Before(
            at=now,
            asked=asked,
            ended=connection.ended_at,
            state=connection.status.sync_state,
            historical=bool(connection.status.is_historical_sync),
            how=request.how,
            rescheduled=request.rescheduled,
            until=now + timedelta(seconds=request.timeout),
        ).text()

    async def start(self, request: FivetranRequest, intent: Intent) -> JobHandle:
        """`POST /v1/connections/{id}/sync` or `/resync`. Neither returns an id.

        Raises:
            AlreadyRunning: A sync is running: a trigger would do nothing and not say so.
        """
        before = Before.of_intent(intent)
        assert before is not None  # noqa: S101 - for the type checker; the engine has asked for it
        connection_id = request.resource_id
        handle = self.handle(connection_id, before, intent.marker)
        if before.over_another and before.how != "force":
            raise AlreadyRunning(handle, same=before.how == "sync")
        async with self._connect() as api:
            if before.how != "resync":
                await api.sync(connection_id, force=before.how == "force")
                return handle
            try:
                await api.resync(connection_id, request.scope)
            except ConflictError:
                now = await api.connection(connection_id, fresh=True, retry=False)
                active = before.model_copy(update={"ended": now.ended_at, "state": now.status.sync_state})
                running = self.handle(connection_id, active, "") if now.syncing else None
                raise AlreadyRunning(running, same=False) from None
        return handle

    async def find(self, request: JobRequest, intent: Intent) -> JobHandle | None:
        """The sync that runs now or has ended since, where none did before.

        Raises:
            VendorError: It is not to be seen, and what was asked for can't be asked for twice.
        """
        before = Before.of_intent(intent)
        if before is None or (before.over_another and before.how != "force"):
            return None  # it was not triggered
        shown_by = time.monotonic() + self.grace
        while True:
            async with self._connect() as api:
                connection = await api.connection(request.resource_id, fresh=True, retry=False)
            if _shows_ours(connection, before):
                return self.handle(request.resource_id, before, intent.marker)
            if before.how == "sync":
                return None  # to be triggered again: if ours is on its way, that does nothing
            if time.monotonic() >= shown_by:
                raise VendorError(
                    "Fivetran",
                    f"a {_NAMES[before.how]} of {connection.schema_name} ({connection.id}) was asked for, "
                    "and whether Fivetran has begun it can't be told",
                    guidance="It is not asked for twice. Look at the connection in Fivetran, and start a new "
                    f"run if it is still needed. {self._credentials.link(connection.id)}",
                )
            await asyncio.sleep(min(1.0, self.grace / 3))

    def handle(self, connection_id: str, before: Before, marker: str = "") -> JobHandle:
        """The sync that comes after this. Its id is of our making: the connection and when we asked."""
        at = before.at.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        return JobHandle(
            vendor=self.name,
            resource_id=connection_id,
            job_id=f"{connection_id}@{at}",
            marker=marker,
            started_at=before.asked,
            baseline=before.text(),
            url=self._credentials.link(connection_id),
        )

    # -- watching -----------------------------------------------------------------------------------------

    async def observe(self, handles: Sequence[JobHandle]) -> Mapping[str, JobStatus | Exception]:
        """A thousand connections a request; few are read one by one."""
        async with self._connect() as api:
            wanted = {handle.resource_id for handle in handles}
            seen: dict[str, Connection | VendorError] = {}
            if len(wanted) > max(_FEW, api.pages):
                seen.update(await api.connections(wanted, retry=False))
            # What is in no list, too: it answers with the reason.
            seen.update(await _each(api, wanted.difference(seen)))
            statuses: dict[str, JobStatus | Exception] = {}
            for handle in handles:
                connection = seen[handle.resource_id]
                if isinstance(connection, VendorError):
                    statuses[handle.job_id] = connection
                    continue
                before = Before.model_validate_json(handle.baseline or "")
                statuses[handle.job_id] = status_of(
                    connection, before, api.theirs(datetime.now(UTC)), self.grace
                )
                if self._is_due(connection, before):
                    try:
                        await api.sync(connection.id)
                    except TRANSIENT:
                        self._again.pop(connection.id)  # at the next look
                    except VendorError as error:
                        statuses[handle.job_id] = error
        return statuses

    def _is_due(self, connection: Connection, before: Before) -> bool:
        """Whether a sync that was put off has to be triggered again, which is for us where no schedule is."""
        status = connection.status
        if status.sync_state != "rescheduled" or connection.schedule_type != "manual":
            return False
        now = datetime.now(UTC)
        if before.rescheduled != "retrigger" or before.until is None or now >= before.until:
            return False
        if status.rescheduled_for is not None and self.theirs(now) < status.rescheduled_for:
            return False
        last, moment = self._again.get(connection.id, (None, -_BEFORE_NEXT_TRIGGER))
        soon = time.monotonic() - moment < _BEFORE_NEXT_TRIGGER
        if soon and last == status.rescheduled_for:
            return False
        self._again[connection.id] = (status.rescheduled_for, time.monotonic())
        return True

    async def cancel(self, handle: JobHandle) -> JobState | None:
        """Fivetran's API has no way to stop a sync; at most it has ended. Pausing is not said to stop one."""
        try:
            status = (await self.observe([handle.model_copy(update={"baseline": _idle(handle)})])).get(
                handle.job_id
            )
        except VendorError:
            return None
        return status.state if isinstance(status, JobStatus) and status.state.terminal else None


_NAMES: dict[How, str] = {"sync": "sync", "force": "forced sync", "resync": "re-sync"}


def _idle(handle: JobHandle) -> str:
    """A handle's baseline without leave to trigger anything."""
    before = Before.model_validate_json(handle.baseline or "")
    return before.model_copy(update={"rescheduled": "wait"}).text()


async def _each(api: FivetranApi, wanted: set[str]) -> dict[str, Connection | VendorError]:
    slots = asyncio.Semaphore(_AT_ONCE)

    async def one(connection_id: str) -> tuple[str, Connection | VendorError]:
        async with slots:
            try:
                return connection_id, await api.connection(connection_id, fresh=True, retry=False)
            except VendorError as error:
                return connection_id, error

    return dict(await asyncio.gather(*map(one, wanted)))


def problem_of(connection: Connection) -> str | None:
    """Why no sync of a connection can be started, and what to do; None if one can."""
    if connection.problem is None:
        return None
    return (
        f"Fivetran connection {connection.schema_name} ({connection.id}) can't be synced: "
        f"{connection.problem}. See to it in Fivetran, or take it out of the list; nothing was changed."
    )


def _shows_ours(connection: Connection, before: Before) -> bool:
    """Whether our trigger had an effect, as far as a connection shows that."""
    if before.over_another:
        return False  # what runs or has ended may as well be the one that was to be stopped
    newer = connection.ended_at is not None and (before.ended is None or connection.ended_at > before.ended)
    moved = connection.status.sync_state in ("syncing", "rescheduled")
    asked = before.how == "resync" and bool(connection.status.is_historical_sync) and not before.historical
    return newer or asked or (moved and connection.status.sync_state != before.state)


def status_of(connection: Connection, before: Before, now: datetime, grace: float) -> JobStatus:
    """The state of the sync that comes after `before`.

    Args:
        connection: What it says now.
        before: What it said before the sync was asked for.
        now: This moment by Fivetran's clock.
        grace: Seconds for which a connection may go on as if nothing had been asked of it.
    """
    ended, status = connection.ended_at, connection.status
    if ended is not None and (before.ended is None or ended > before.ended):
        # A failure may be that of the sync that ours has stopped; then ours is running or about to.
        stopped = before.how == "force" and before.over_another and not connection.succeeded
        if not (stopped and (connection.syncing or now - ended < timedelta(seconds=grace))):
            return _ended(connection, before, ended)
    if status.setup_state in ("broken", "incomplete"):
        return _failed(status.setup_state, f"{connection.problem}; no end of the sync is known")
    if not connection.syncing and (connection.paused or status.sync_state == "paused"):
        return _failed("paused", "the connection was paused in Fivetran before our sync had ended")
    match status.sync_state:
        case "syncing":
            return JobStatus(state=JobState.RUNNING, word="syncing")
        case "scheduled":
            return JobStatus(state=JobState.QUEUED, word="scheduled")
        case "rescheduled":
            return _rescheduled(connection, before)
    return JobStatus(state=JobState.RUNNING, word=status.sync_state, known=False)


def _ended(connection: Connection, before: Before, ended: datetime) -> JobStatus:
    # Of a sync that was running already we know no beginning.
    started_by_us = before.how == "force" or not before.over_another
    duration = max(0.0, (ended - before.asked).total_seconds()) if started_by_us else None
    if connection.succeeded:
        return JobStatus(
            state=JobState.SUCCEEDED,
            word="succeeded",
            duration=duration,
            message=_said(connection.status.warnings),
        )
    reason = _said(connection.status.tasks) or "the sync failed; Fivetran's API names no reason"
    return _failed("failed", reason).model_copy(update={"duration": duration})


def _rescheduled(connection: Connection, before: Before) -> JobStatus:
    at = connection.status.rescheduled_for
    when = f"{at:%Y-%m-%d %H:%M:%S} UTC" if at else "a time that Fivetran does not name"
    why = "the source takes no more requests for now"
    if before.rescheduled == "fail":
        return _failed("rescheduled", f"{why}: Fivetran put the sync off until {when}")
    who = "Fivetran runs it again then"
    if connection.schedule_type == "manual":
        who = "its schedule is manual, so it waits for somebody to trigger it again then"
        if before.rescheduled == "retrigger":
            who = "its schedule is manual, so we trigger it again then"
    return JobStatus(state=JobState.QUEUED, word=f"rescheduled for {when}", message=f"{why}; {who}")


def _failed(word: str, message: str) -> JobStatus:
    return JobStatus(state=JobState.FAILED, word=word, message=message[:500])


def _said(notices: Sequence[Notice]) -> str | None:
    return "; ".join(str(notice) for notice in notices)[:500] or None
