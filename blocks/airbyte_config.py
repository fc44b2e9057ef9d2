"""Airbyte's Config API (`/api/v1`) of self-managed servers: every call is a POST.

The only API of old servers, and on newer ones the only one that can refresh and that tells why an attempt
failed. Airbyte calls it deprecated.

Vendor documentation: https://docs.airbyte.com/platform/api-documentation
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from blocks.airbyte_model import (
    PAGE,
    AirbyteApi,
    Attempt,
    Changed,
    Connection,
    Failure,
    Job,
    Operation,
    RefreshMode,
    Stream,
    StreamStats,
    id_of,
)
from blocks.http import AuthError, NotFoundError, VendorError
from blocks.replies import readable, sorted_out

_TYPES = {"sync": "sync", "reset_connection": "reset", "clear": "clear", "refresh": "refresh"}
_OLD_TYPES = ("sync", "reset_connection")  # all that servers of 2023 know, and another word is an error there


class _Document(BaseModel):
    model_config = ConfigDict(extra="ignore", populate_by_name=True)


class _Stats(_Document):
    rows: int | None = Field(default=None, alias="recordsCommitted")
    bytes: int | None = Field(default=None, alias="bytesCommitted")
    rejected: int | None = Field(default=None, alias="recordsRejected")


class _JobStream(_Stats):
    name: str = Field(alias="streamName")
    namespace: str | None = Field(default=None, alias="streamNamespace")


class _AttemptStream(_Document):
    name: str = Field(alias="streamName")
    namespace: str | None = Field(default=None, alias="streamNamespace")
    stats: _Stats = _Stats()


class _FailureSummary(_Document):
    failures: list[Failure] = []
    partial: bool | None = Field(default=None, alias="partialSuccess")


class _Attempt(_Document):
    status: str
    rows: int | None = Field(default=None, alias="recordsSynced")
    bytes: int | None = Field(default=None, alias="bytesSynced")
    total: _Stats | None = Field(default=None, alias="totalStats")
    streams: list[_AttemptStream] | None = Field(default=None, alias="streamStats")
    summary: _FailureSummary | None = Field(default=None, alias="failureSummary")


class _Job(_Document):
    id: str = Field(coerce_numbers_to_str=True)
    type: str = Field(default="sync", alias="configType")
    connection_id: str = Field(alias="configId")
    created: int = Field(alias="createdAt")  # epoch seconds, as all times here
    updated: int = Field(alias="updatedAt")
    status: str
    total: _Stats | None = Field(default=None, alias="aggregatedStats")
    streams: list[_JobStream] | None = Field(default=None, alias="streamAggregatedStats")


class _JobInfo(_Document):
    job: _Job
    attempts: list[dict[str, Any]] | None = (
        None  # a list of jobs has them bare, a single job has them wrapped
    )


class _Jobs(_Document):
    jobs: list[Any]


class _Connections(_Document):
    connections: list[dict[str, Any]]


class _Workspace(_Document):
    id: str = Field(alias="workspaceId")


class _Workspaces(_Document):
    workspaces: list[_Workspace]


_INFO = TypeAdapter(_JobInfo)
_JOBS = TypeAdapter(_Jobs)
_ATTEMPT = TypeAdapter(_Attempt)
_CONNECTION = TypeAdapter(Connection)
_CONNECTIONS = TypeAdapter(_Connections)
_WORKSPACES = TypeAdapter(_Workspaces)


class ConfigApi(AirbyteApi):
    """The Config API. Servers of 2023 know less of it; what they lack is done without or said."""

    kind = "config"
    _types: tuple[str, ...] = tuple(_TYPES)
    _lists_workspaces = True

    async def _list_connections(self) -> list[Connection]:
        workspaces = self._workspaces or await self._all_workspaces()
        found: list[Connection] = []
        for workspace in workspaces:
            body = {"workspaceId": workspace}
            reply = await self.ask("/connections/list", _CONNECTIONS, body)
            # Which workspace it is in, a server of 2023 does not say.
            found += [_CONNECTION.validate_python({**body, **item}) for item in reply.connections]
        return found

    async def _all_workspaces(self) -> list[str]:
        try:
            reply = await self.ask("/workspaces/list", _WORKSPACES, {})
        except (AuthError, NotFoundError) as error:
            error.guidance = "These credentials may not list workspaces; name them in the block."
            raise
        return [workspace.id for workspace in reply.workspaces]

    async def _read_connection(self, connection_id: str) -> Connection:
        # Always asked for before a start: an old server lets the sync of an unknown one hang until a 504.
        connection = await self.ask("/connections/get", _CONNECTION, {"connectionId": connection_id})
        if connection.status == "deprecated":  # deleted
            raise NotFoundError(self.vendor, "the connection has been deleted", path="/connections/get")
        if connection.workspace_id:
            return connection
        if len(self._workspaces) == 1:
            return connection.model_copy(update={"workspace_id": self._workspaces[0]})
        return next((c for c in await self.connections() if c.id == connection_id), connection)

    async def create_job(self, connection_id: str, operation: Operation) -> Job:
        """`POST /connections/sync`, `/clear` or `/reset`; all streams of it for `/refresh`."""
        if operation == "refresh":
            return await self.refresh(connection_id, "Merge")
        body = {"connectionId": connection_id}
        return _job(await self._start(f"/connections/{operation}", operation, body))

    async def clear_streams(
        self, connection_id: str, operation: Literal["clear", "reset"], streams: Sequence[Stream]
    ) -> Job:
        """`POST /connections/clear/stream` or `/reset/stream`: delete what was loaded of these.

        Raises:
            ConflictError, VendorError: As `create_job`.
        """
        body = {"connectionId": connection_id, "streams": _named(streams)}
        return _job(await self._start(f"/connections/{operation}/stream", operation, body))

    async def refresh(self, connection_id: str, mode: RefreshMode, streams: Sequence[Stream] = ()) -> Job:
        """`POST /connections/refresh`: load streams anew; none given: all of them.

        Raises:
            ConflictError, VendorError: As `create_job`.
        """
        body: dict[str, Any] = {"connectionId": connection_id, "refreshMode": mode}
        if streams:
            body["streams"] = _named(streams)
        return _job(await self._start("/connections/refresh", "refresh", body))

    async def _start(self, path: str, operation: str, body: dict[str, Any]) -> _JobInfo:
        try:
            return await self.send("POST", path, _INFO, body=body)
        except NotFoundError as error:  # of the path: the connection has been read before
            other = " Ask for a reset instead." if operation == "clear" else ""
            error.guidance = f"This server may be too old to know {operation}.{other}"
            raise

    async def job(self, job_id: str, *, retry: bool = True) -> Job:
        """`POST /jobs/get_without_logs`; the logs may be of any size."""
        return _job(await self.ask("/jobs/get_without_logs", _INFO, {"id": _number(job_id)}, retry=retry))

    async def newest_jobs(
        self,
        connection_id: str,
        operation: Operation | None = None,
        *,
        since: datetime | None = None,
        retry: bool = True,
    ) -> list[Job]:
        """`POST /jobs/list` of one connection; of every kind that the server knows."""
        reply = await self._newest_page(connection_id, retry=retry)
        return self._newest(reply.jobs, lambda item: _job(_INFO.validate_python(item)), since)

    def jobs_since(
        self, created: datetime, connection_ids: Collection[str], *, pages: int
    ) -> AsyncIterator[list[Job]]:
        """`POST /jobs/list_for_workspaces`, page by page; nothing where the server does not know it."""
        return self.jobs_of(self.workspaces_of(connection_ids), created, pages=pages)

    async def jobs_of(
        self, workspaces: Sequence[str], created: datetime, *, pages: int
    ) -> AsyncIterator[list[Job]]:
        """The same of these workspaces."""
        body: dict[str, Any] = {
            "workspaceIds": list(workspaces),
            "createdAtStart": created.strftime("%Y-%m-%dT%H:%M:%SZ"),
            "orderByField": "createdAt",
            "orderByMethod": "DESC",
        }
        for page in range(pages if self._lists_workspaces else 0):
            body["pagination"] = {"pageSize": PAGE, "rowOffset": page * PAGE}
            try:
                reply = await self._list("/jobs/list_for_workspaces", body, retry=False)
            except NotFoundError:
                self._lists_workspaces = False
                return
            yield _jobs(reply)
            if len(reply.jobs) < PAGE:
                return

    async def jobs_changed(self, since: datetime) -> Changed:
        """`POST /jobs/list_for_workspaces`; where the server has none, the newest of each connection."""
        found: dict[str, Job] = {}
        unreadable: set[str] = set()

        def sort(reply: _Jobs) -> None:
            infos, left_out = sorted_out(reply.jobs, _INFO)
            found.update((info.job.id, _job(info)) for info in infos)
            rows = (row.get("job") if isinstance(row, dict) else None for row in left_out)
            unreadable.update(id_of(row, "id") for row in rows)

        body: dict[str, Any] = {
            "workspaceIds": self._workspaces or await self._all_workspaces(),
            "updatedAtStart": since.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            # Newest first: what changes between two pages moves to the front, and none is passed over.
            "orderByField": "updatedAt",
            "orderByMethod": "DESC",
        }
        full, offset = self._lists_workspaces, 0
        while full:
            body["pagination"] = {"pageSize": PAGE, "rowOffset": offset}
            try:
                reply = await self._list("/jobs/list_for_workspaces", body, retry=True)
            except NotFoundError:
                self._lists_workspaces = False
                break
            sort(reply)
            full, offset = len(reply.jobs) == PAGE, offset + PAGE
        if not self._lists_workspaces:
            for connection in await self.connections():
                sort(await self._newest_page(connection.id, retry=True))
        since = since.replace(microsecond=0)
        return Changed([job for job in found.values() if job.ended_at >= since], unreadable)

    async def _newest_page(self, connection_id: str, *, retry: bool) -> _Jobs:
        body = {"configId": connection_id, "pagination": {"pageSize": 20, "rowOffset": 0}}
        return await self._list("/jobs/list", body, retry=retry)

    async def _list(self, path: str, body: dict[str, Any], *, retry: bool) -> _Jobs:
        try:
            return await self.ask(path, _JOBS, {"configTypes": list(self._types), **body}, retry=retry)
        except VendorError as error:
            if error.status not in (400, 422) or self._types == _OLD_TYPES:
                raise
        self._types = _OLD_TYPES
        return await self.ask(path, _JOBS, {"configTypes": list(self._types), **body}, retry=retry)

    async def cancel_job(self, job_id: str) -> Job:
        """`POST /jobs/cancel`."""
        return _job(await self.send("POST", "/jobs/cancel", _INFO, body={"id": _number(job_id)}))


def _named(streams: Sequence[Stream]) -> list[dict[str, str]]:
    return [
        {"streamName": s.name, **({"streamNamespace": s.namespace} if s.namespace else {})} for s in streams
    ]


def _number(job_id: str) -> int:
    try:
        return int(job_id)
    except ValueError:
        raise NotFoundError("Airbyte", f"{job_id!r} is no job id; those are numbers", sent=False) from None


def _jobs(reply: _Jobs) -> list[Job]:
    return [_job(info) for info in readable(reply.jobs, _INFO)]


def _job(info: _JobInfo) -> Job:
    job = info.job
    attempts = readable([item.get("attempt", item) for item in info.attempts or []], _ATTEMPT)
    total = job.total or _total(attempts)
    created = datetime.fromtimestamp(job.created, UTC)
    found = Job(
        id=job.id,
        status=job.status,
        type=_TYPES.get(job.type, job.type),
        connection_id=job.connection_id,
        created_at=created,
        updated_at=datetime.fromtimestamp(job.updated, UTC),
        rows_synced=total.rows,
        bytes_synced=total.bytes,
        rows_rejected=total.rejected,
        attempts=None if info.attempts is None else [_attempt(attempt) for attempt in attempts],
        streams=[StreamStats(**stream.model_dump(exclude={"rejected"})) for stream in job.streams or []],
    )
    if not found.streams:
        found.streams = _sum_streams(found.attempts or [])
    if found.ended:
        found.duration = timedelta(seconds=job.updated - job.created)
    return found


def _attempt(attempt: _Attempt) -> Attempt:
    summary = attempt.summary or _FailureSummary()
    return Attempt(
        status=attempt.status,
        failures=summary.failures,
        partial=bool(summary.partial),
        streams=[
            StreamStats(name=s.name, namespace=s.namespace, rows=s.stats.rows, bytes=s.stats.bytes)
            for s in attempt.streams or []
        ],
    )


def _total(attempts: Sequence[_Attempt]) -> _Stats:
    """What a job has moved, for servers that do not add it up: each attempt commits rows of its own."""
    stats = [a.total or _Stats(rows=a.rows, bytes=a.bytes) for a in attempts]
    return _Stats(
        rows=_sum(s.rows for s in stats),
        bytes=_sum(s.bytes for s in stats),
        rejected=_sum(s.rejected for s in stats),
    )


def _sum_streams(attempts: Sequence[Attempt]) -> list[StreamStats]:
    by_stream: dict[tuple[str, str | None], list[StreamStats]] = {}
    for attempt in attempts:
        for stream in attempt.streams:
            by_stream.setdefault((stream.name, stream.namespace), []).append(stream)
    return [
        StreamStats(
            name=name,
            namespace=namespace,
            rows=_sum(s.rows for s in found),
            bytes=_sum(s.bytes for s in found),
        )
        for (name, namespace), found in by_stream.items()
    ]


def _sum(numbers: Any) -> int | None:
    known = [number for number in numbers if number is not None]
    return sum(known) if known else None
