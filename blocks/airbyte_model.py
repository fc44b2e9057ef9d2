"""Airbyte's connections and jobs as its APIs describe them, and the calls that both APIs have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from datetime import datetime, timedelta
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from blocks.fields import tagged_owner
from blocks.http import ApiClient, BadReply
from blocks.replies import first_problem

Operation = Literal["sync", "clear", "reset", "refresh"]
ApiKind = Literal["public", "config"]
RefreshMode = Literal["Merge", "Truncate"]

PAGE = 100  # the most that either API gives at a time


class Stream(BaseModel):
    """One stream of a connection."""

    model_config = ConfigDict(frozen=True)

    name: str
    namespace: str | None = None


class Connection(BaseModel):
    """A connection; only what is used here."""

    model_config = ConfigDict(extra="ignore", populate_by_name=True)

    id: str = Field(alias="connectionId")
    name: str
    workspace_id: str = Field(default="", alias="workspaceId")  # left out by Config APIs of 2023
    status: str = "active"
    status_reason: str | None = Field(default=None, alias="statusReason")
    namespace_definition: str | None = Field(default=None, alias="namespaceDefinition")
    namespace_format: str | None = Field(default=None, alias="namespaceFormat")
    prefix: str | None = None
    streams: list[Stream] = []
    tags: list[str] = []

    @model_validator(mode="before")
    @classmethod
    def _flatten(cls, data: Any) -> Any:
        if not isinstance(data, dict) or "streams" in data:
            return data
        tags = data.get("tags") or []
        return {
            **data,
            "streams": _streams(data),
            "tags": [tag["name"] if isinstance(tag, dict) else tag for tag in tags],
        }

    @property
    def owner(self) -> str | None:
        """The owner that a tag `owner:<name>` names; Airbyte has no field of its own for it."""
        return tagged_owner(self.tags)

    @property
    def namespace(self) -> str | None:
        """The schema in the destination, where the connection fixes one."""
        if self.namespace_definition in ("custom_format", "customformat"):
            return self.namespace_format
        return None


def _streams(connection: dict[str, Any]) -> list[Any]:
    catalog = connection.get("syncCatalog")
    if not isinstance(catalog, dict):  # the public API's own form
        return (connection.get("configurations") or {}).get("streams") or []
    found = catalog.get("streams") or []
    # Those that were not chosen are listed as well.
    return [item["stream"] for item in found if (item.get("config") or {}).get("selected") is not False]


class Failure(BaseModel):
    """Why an attempt failed, as the Config API tells it."""

    model_config = ConfigDict(extra="ignore", populate_by_name=True)

    origin: str | None = Field(default=None, alias="failureOrigin")
    type: str | None = Field(default=None, alias="failureType")
    message: str | None = Field(default=None, alias="externalMessage")
    internal: str | None = Field(default=None, alias="internalMessage")
    retryable: bool | None = None
    stream: Stream | None = Field(default=None, alias="streamDescriptor")

    def __str__(self) -> str:
        text = (self.message or self.internal or "no reason given").strip().rstrip(".")[:500]
        kind = ", ".join(part for part in (self.origin, self.type) if part)
        return f"{text} ({kind})" if kind else text


class StreamStats(BaseModel):
    """What was moved of one stream; rows and bytes are those that the destination has committed."""

    name: str
    namespace: str | None = None
    rows: int | None = None
    bytes: int | None = None


class Attempt(BaseModel):
    """One of Airbyte's own attempts at a job."""

    status: str
    failures: list[Failure] = []
    partial: bool = False
    streams: list[StreamStats] = []


class Job(BaseModel):
    """A job. Attempts, streams and rejected rows are known only where the Config API tells them."""

    model_config = ConfigDict(extra="ignore", populate_by_name=True)

    id: str = Field(alias="jobId", coerce_numbers_to_str=True)
    status: str
    type: str = Field(default="sync", alias="jobType")
    connection_id: str = Field(alias="connectionId")
    created_at: datetime = Field(alias="startTime")  # the job's *created* time, in spite of its name
    updated_at: datetime | None = Field(default=None, alias="lastUpdatedAt")  # of one that has ended
    duration: timedelta | None = None  # from creation to the last update, so with the time in the queue
    bytes_synced: int | None = Field(default=None, alias="bytesSynced")
    rows_synced: int | None = Field(default=None, alias="rowsSynced")
    rows_rejected: int | None = None
    attempts: list[Attempt] | None = None
    streams: list[StreamStats] = []

    @property
    def ended(self) -> bool:
        """Whether the status is one of the three that do not change any more."""
        return self.status in ("succeeded", "failed", "cancelled")

    @property
    def ended_at(self) -> datetime:
        """When a job that has ended did so, to a second."""
        return self.updated_at or self.created_at + (self.duration or timedelta())

    @property
    def failures(self) -> list[Failure]:
        """Why the last attempt that has ended badly did so."""
        return next((a.failures for a in reversed(self.attempts or []) if a.failures), [])

    @property
    def told(self) -> bool:
        """Whether it has its details; a list of an old server is short of some."""
        return bool(self.streams) and (self.status != "failed" or bool(self.failures))

    def with_details(self, told: Job) -> Job:
        """The job with what another reading of it tells of attempts and streams."""
        details = {"attempts": told.attempts, "streams": told.streams, "rows_rejected": told.rows_rejected}
        return self.model_copy(update=details)

    def does(self, operation: str) -> bool:
        """Whether the job is of this kind. A clear may be listed as a reset: Airbyte has one of them."""
        same = {"reset": "clear"}
        return same.get(self.type, self.type) == same.get(operation, operation)


class Changed(NamedTuple):
    """Jobs that have changed, and the ids of those that can't be read; `?` for one without an id."""

    jobs: list[Job]
    unreadable: set[str]


def id_of(row: Any, name: str) -> str:
    """The id of a job that can't be read otherwise; `?` where it has none."""
    value = row.get(name) if isinstance(row, dict) else None
    return str(value)[:64] if isinstance(value, int | str) and value != "" else "?"


class AirbyteApi(ApiClient, ABC):
    """The calls that running jobs needs, whichever of Airbyte's APIs they go to."""

    kind: ApiKind

    def begin(self, workspaces: Sequence[str]) -> None:
        """Limit what is listed to these workspaces; none given: all that are visible."""
        self._workspaces = list(workspaces)
        self._known: dict[str, Connection] = {}

    def workspaces_of(self, connection_ids: Collection[str]) -> list[str]:
        """Of those that have been read; the jobs of another are asked for one by one."""
        read = (self._known.get(connection_id) for connection_id in connection_ids)
        found = {connection.workspace_id for connection in read if connection}
        return sorted(found - {""}) or self._workspaces

    async def connections(self) -> list[Connection]:
        """Every connection that is visible and not deleted."""
        found = await self._list_connections()
        self._known.update((connection.id, connection) for connection in found)
        return found

    async def connection(self, connection_id: str) -> Connection:
        """One connection, from memory when it was seen on this client already.

        Raises:
            NotFoundError: There is none with this id.
        """
        if connection_id not in self._known:
            self._known[connection_id] = await self._read_connection(connection_id)
        return self._known[connection_id]

    def forget(self, connection_id: str) -> None:
        """Read the connection anew when it is asked for next: what was known of it has proved wrong."""
        self._known.pop(connection_id, None)

    def _newest(self, items: Sequence[Any], read: Callable[[Any], Job], since: datetime | None) -> list[Job]:
        """What `newest_jobs` promises, of a list that begins with the newest."""
        found: list[Job] = []
        for item in items:
            try:
                job = read(item)
            except ValidationError as error:
                if since is None:
                    continue
                problem = f"one of its jobs is not what the API promises ({first_problem(error)})"
                raise BadReply(self.vendor, problem, body=item, sent=False) from None
            if since is not None and job.created_at < since:
                break
            found.append(job)
        return found

    @abstractmethod
    async def _list_connections(self) -> list[Connection]: ...

    @abstractmethod
    async def _read_connection(self, connection_id: str) -> Connection: ...

    @abstractmethod
    async def create_job(self, connection_id: str, operation: Operation) -> Job:
        """Start a job. Not repeated: neither API has an idempotency key.

        Raises:
            ConflictError: A job is running, or the connection's state forbids it.
            VendorError: Anything else; `sent` says whether a job may have been started.
        """

    @abstractmethod
    async def job(self, job_id: str, *, retry: bool = True) -> Job:
        """One job.

        Raises:
            NotFoundError: There is none with this id.
        """

    @abstractmethod
    async def newest_jobs(
        self,
        connection_id: str,
        operation: Operation | None = None,
        *,
        since: datetime | None = None,
        retry: bool = True,
    ) -> list[Job]:
        """The newest jobs of a connection, newest first.

        Args:
            connection_id: Whose jobs.
            operation: Those that do this are wanted, and there may be others among them; None: of any kind.
            since: No others than those created since then, by Airbyte's clock, and all of them.
            retry: Off for looks, whose caller bears failures on a budget of its own.

        Raises:
            BadReply: One that may have been created since then can't be read. Without `since` it is left out.
        """

    @abstractmethod
    def jobs_since(
        self, created: datetime, connection_ids: Collection[str], *, pages: int
    ) -> AsyncIterator[list[Job]]:
        """Pages of the jobs that were created since a time, newest first, at most so many pages.

        Args:
            created: By Airbyte's clock.
            connection_ids: Whose jobs are wanted; there may be others among them.
            pages: Of a hundred jobs each.
        """

    @abstractmethod
    async def jobs_changed(self, since: datetime) -> Changed:
        """All jobs of the workspaces that have changed since a time, by Airbyte's clock; of every kind.

        One that can't be read hides no other, and is named.
        """

    @abstractmethod
    async def cancel_job(self, job_id: str) -> Job:
        """Cancel what the connection of this job is running *now*: read the job first.

        Returns:
            The job of this id, as it is then; it may have ended before, and another have been cancelled.

        Raises:
            ConflictError: It runs nothing.
        """
