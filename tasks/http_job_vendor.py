"""A declared job API for the engine."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Hashable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Literal
from uuid import NAMESPACE_URL, uuid5

from prefect.utilities.slugify import slugify

from blocks.http import BadReply, NotFoundError, VendorError
from blocks.http_job import HttpJob, arguments_of
from blocks.http_job_client import HttpJobApi, Reply, moment_of, text_of
from blocks.http_job_fill import Values, fill, search
from blocks.http_job_parts import Find, Listing, Reading
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
)

_AT_ONCE = 10  # requests
_CONFIRM = 0.5  # seconds between two looks at whether a cancellation has come to pass


def job_name(job: HttpJob | str) -> str:
    """A block's name; the service's for one that is not saved."""
    name = block_name(job, HttpJob)
    return name.split("/", 1)[1] if name else slugify(job.service) if isinstance(job, HttpJob) else job


class HttpJobVendor(AccountVendor[HttpJobApi]):
    """The jobs of one declaration for the engine."""

    name = "http-job"

    def __init__(self, job: HttpJob) -> None:
        super().__init__(job.api, job.declaration, block_name(job, HttpJob))
        self._job = job
        self.on_partial: Literal["fail", "warn", "ok"] = job.on_partial
        self.grace = job.grace

    async def start(self, request: JobRequest, intent: Intent) -> JobHandle:
        """The declared start."""
        job = self._job
        async with self._connect() as api:
            values = await self._values(api, request.resource_id)
            sent = {**values, "marker": intent.marker, "job_id": _our_id(intent)}
            try:
                reply = await api.start(job.start, sent)
            except VendorError as error:
                if self._means_running(error.status, f"{error.message} {text_of(error.body)}"):
                    raise AlreadyRunning(await self._active(api, values, request, intent)) from None
                raise
            if self._means_running(reply.status, reply.text):
                raise AlreadyRunning(await self._active(api, values, request, intent))
            job_id = sent["job_id"] if job.start.job_id.ours else self._job_id(reply)
            url = search(job.start.url, reply.document)
            started = api.theirs(datetime.now(UTC))
            return self._handle(
                request, values, str(job_id), started, intent, url if isinstance(url, str) else None
            )

    async def find(self, request: JobRequest, intent: Intent) -> JobHandle | None:
        """The job with our id or mark, or else the first that was created since then."""
        async with self._connect() as api:
            values = await self._values(api, request.resource_id)
            if self._job.start.job_id.ours:
                return await self._ours(api, values, request, intent)
            if self._job.find is not None:
                return await self._found(api, self._job.find, values, request, intent)
        if self._job.start.repeatable:
            return None
        raise VendorError(
            self._job.service,
            "the reply to a start was lost or could not be read, or the run was cut short before it came. A "
            "job may be running, and its declaration does not say how to find it",
            guidance=f"Look in {self._job.service} for a job that was begun at about "
            f"{intent.since:%Y-%m-%d %H:%M:%S} UTC. This run starts no second one; a new run does. Declare "
            "`find`, or `start.repeatable` if a second job does no harm.",
        )

    async def observe(self, handles: Sequence[JobHandle]) -> Mapping[str, JobStatus | Exception]:
        """By the declared list where jobs share one, and one by one what is not on it."""
        job = self._job
        seen: dict[str, JobStatus | Exception] = {}
        async with self._connect() as api:
            values: dict[str, Values] = {}
            for resource in dict.fromkeys(handle.resource_id for handle in handles):
                try:
                    values[resource] = await self._values(api, resource)
                except VendorError as error:
                    seen |= {h.job_id: error for h in handles if h.resource_id == resource}
            handles = [handle for handle in handles if handle.resource_id in values]
            if job.listing and job.listing.read:
                await self._observe_lists(api, job.listing, job.listing.read, handles, values, seen)
            if job.poll:
                slots = asyncio.Semaphore(_AT_ONCE)
                look = [handle for handle in handles if handle.job_id not in seen]
                found = await asyncio.gather(
                    *(self._observe_one(api, handle, values[handle.resource_id], slots) for handle in look)
                )
                seen |= {handle.job_id: status for handle, status in zip(look, found, strict=True)}
        return seen

    async def cancel(self, handle: JobHandle) -> JobState | None:
        """The declared request, and then looks until the job has ended."""
        job = self._job
        refused: VendorError | None = None
        async with self._connect() as api:
            values = await self._values(api, handle.resource_id)
            if job.cancel is not None:
                try:
                    await api.cancel(job.cancel, {**values, "job_id": handle.job_id})
                except BadReply:
                    pass  # whatever it says beside its status; the job's state counts
                except VendorError as error:
                    if error.sent:
                        raise
                    refused = error  # because it has ended already?
            while True:
                status = (await self.observe([handle])).get(handle.job_id)
                if isinstance(status, JobStatus) and status.state.terminal:
                    return status.state
                if refused is not None:
                    raise refused
                if job.cancel is None:
                    return None
                if isinstance(status, NotFoundError):
                    return JobState.CANCELLED  # it was taken away
                if isinstance(status, Exception):
                    raise status
                await asyncio.sleep(_CONFIRM)

    # -- starting and finding ------------------------------------------------------------------------------

    async def _values(self, api: HttpJobApi, resource: str) -> Values:
        """What all requests for a resource are filled with; asked for once and then remembered."""
        try:
            arguments = self._job.arguments(arguments_of(resource))
        except ValueError as error:
            raise InputError(f"{self._job.service} ({resource}): {error}") from None
        return (await api.look_up(self._job, resource, arguments))[0]

    def _means_running(self, status: int | None, text: str) -> bool:
        return any(refusal.fits(status, text) for refusal in self._job.start.already_running)

    def _job_id(self, reply: Reply) -> str:
        where = self._job.start.job_id
        found = search(where.path, reply.document) if where.path else reply.headers.get(where.header or "")
        if where.pattern and isinstance(found, str):
            match = re.search(where.pattern, found)
            found = match[0] if match else None
        if isinstance(found, bool) or not isinstance(found, str | int) or found == "":
            raise BadReply(
                self._job.service,
                f"its reply to the start has no job id at {where.path or where.header}",
                method=self._job.start.method,
                path=self._job.start.path,
                status=reply.status,
            )
        return str(found)

    async def _active(
        self, api: HttpJobApi, values: Values, request: JobRequest, intent: Intent
    ) -> JobHandle | None:
        """The job that is running, where the declared list can tell."""
        listing = self._job.listing
        if listing is None or listing.read is None:
            return None
        find = self._job.find or Find.model_construct(created_at=None, match={})
        try:
            items = await api.items(listing, values)
        except VendorError:
            return None  # then it is waited for without knowing it
        for job_id, item in items.items():
            status = self._status(listing.read, item)
            if status.known and not status.state.terminal and _matches(find, item, values):
                # Without a time of its own it must not pass for one that was begun after ours was asked for.
                created = moment_of(search(find.created_at, item)) or intent.since - timedelta(minutes=10)
                return self._handle(request, values, job_id, created, intent)
        return None

    async def _ours(
        self, api: HttpJobApi, values: Values, request: JobRequest, intent: Intent
    ) -> JobHandle | None:
        handle = self._handle(request, values, _our_id(intent), intent.since, intent)
        status = (await self.observe([handle])).get(handle.job_id)
        if status is None or isinstance(status, NotFoundError):
            return None
        if isinstance(status, Exception):
            raise status
        return handle.model_copy(update={"started_at": api.theirs(datetime.now(UTC))})

    async def _found(
        self, api: HttpJobApi, find: Find, values: Values, request: JobRequest, intent: Intent
    ) -> JobHandle | None:
        since = api.theirs(intent.since)
        listing = find.listing or self._job.listing
        assert listing is not None  # noqa: S101 - for the type checker; the declaration was checked
        items = await api.items(listing, {**values, "since": f"{since:%Y-%m-%dT%H:%M:%SZ}"})
        ours: list[tuple[datetime, str]] = []
        for job_id, item in items.items():
            if job_id in intent.known or not _matches(find, item, values):
                continue
            if find.marker and str(search(find.marker, item)) != intent.marker:
                continue
            created = moment_of(search(find.created_at, item))
            if find.created_at and (created is None or created < since):
                continue
            ours.append((created or api.theirs(datetime.now(UTC)), job_id))
        if not ours:
            return None
        created, job_id = min(ours)
        return self._handle(request, values, job_id, created, intent)

    def _handle(
        self,
        request: JobRequest,
        values: Values,
        job_id: str,
        started_at: datetime,
        intent: Intent,
        url: str | None = None,
    ) -> JobHandle:
        if url is None and self._job.url:
            url = fill(self._job.url, {**values, "job_id": job_id})
        return JobHandle(
            vendor=self.name,
            resource_id=request.resource_id,
            job_id=job_id,
            marker=intent.marker,
            started_at=started_at,
            url=url,
        )

    # -- observing -----------------------------------------------------------------------------------------

    async def _observe_lists(
        self,
        api: HttpJobApi,
        listing: Listing,
        reading: Reading,
        handles: Sequence[JobHandle],
        values: Mapping[str, Values],
        seen: dict[str, JobStatus | Exception],
    ) -> None:
        """One request for all jobs that one list holds; a job alone is read by itself where that goes."""
        lists: dict[Hashable, list[JobHandle]] = {}
        for handle in handles:
            lists.setdefault(api.rendered(listing, values[handle.resource_id]), []).append(handle)
        for together in lists.values():
            if len(together) == 1 and self._job.poll:
                continue
            try:
                items = await api.items(listing, values[together[0].resource_id])
            except VendorError as error:
                seen |= {handle.job_id: error for handle in together}
                continue
            seen |= {
                handle.job_id: self._status(reading, items[handle.job_id])
                for handle in together
                if handle.job_id in items
            }

    async def _observe_one(
        self, api: HttpJobApi, handle: JobHandle, values: Values, slots: asyncio.Semaphore
    ) -> JobStatus | Exception:
        poll = self._job.poll
        assert poll is not None  # noqa: S101 - for the type checker; the caller looks
        async with slots:
            try:
                reply = await api.query(poll, {**values, "job_id": handle.job_id})
            except VendorError as error:
                return error
        return self._status(poll.read, reply.document)

    def _status(self, reading: Reading, document: Any) -> JobStatus:
        found = search(reading.state, document)
        word = text_of(found) if found is not None else "(no state)"
        name = self._job.states.of(word)
        state = JobState[name.upper()] if name else JobState.RUNNING
        began, ended = (moment_of(search(path, document)) for path in (reading.started_at, reading.ended_at))
        message = search(reading.message, document)
        if message is None and state is JobState.FAILED:
            message = f"{self._job.service} says {word}"
        return JobStatus(
            state=state,
            known=name is not None,
            word=word,
            rows=_count(search(reading.rows, document)),
            bytes=_count(search(reading.bytes, document)),
            rows_rejected=_count(search(reading.rows_rejected, document)),
            attempts=_count(search(reading.attempts, document)),
            duration=(ended - began).total_seconds() if began and ended else None,
            message=text_of(message)[:500] if message else None,
        )


def _our_id(intent: Intent) -> str:
    # The marker says which run and which job of it, the time which attempt to start it: kept in the journal.
    return str(uuid5(NAMESPACE_URL, f"{intent.marker} {intent.since.isoformat()}"))


def _matches(find: Find, item: Any, values: Values) -> bool:
    return all(str(search(path, item)) == fill(text, values) for path, text in find.match.items())


def _count(value: Any) -> int | None:
    try:
        return None if value is None or isinstance(value, bool) else int(float(value))
    except (TypeError, ValueError, OverflowError):
        return None
