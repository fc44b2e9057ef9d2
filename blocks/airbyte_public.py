"""Airbyte's public API (v1), of the Cloud and of self-managed servers since 2023.

Vendor documentation: https://reference.airbyte.com/reference/getting-started
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection
from datetime import UTC, datetime
from typing import Any

from pydantic import BaseModel, TypeAdapter

from blocks.airbyte_model import PAGE, AirbyteApi, Changed, Connection, Job, Operation, id_of
from blocks.http import VendorError
from blocks.replies import readable, sorted_out

_NEWEST_FIRST = "createdAt|DESC"  # must be said: left out, the API answers with the oldest
# Servers before 2026-02 list only syncs and resets, unless they are asked for another kind by name.
_JOB_TYPES: dict[Operation | None, tuple[Operation | None, ...]] = {
    None: (None, "clear", "refresh"),
    "sync": ("sync",),
    "clear": ("clear", "reset"),
    "reset": ("reset", "clear"),
    "refresh": ("refresh",),
}


class _Jobs(BaseModel):
    data: list[Any]


class _Connections(BaseModel):
    data: list[Connection]


_JOB = TypeAdapter(Job)
_JOBS = TypeAdapter(_Jobs)
_CONNECTION = TypeAdapter(Connection)
_CONNECTIONS = TypeAdapter(_Connections)


class PublicApi(AirbyteApi):
    """The public API. It tells no attempts, no streams and no reason of a failure."""

    kind = "public"

    async def _list_connections(self) -> list[Connection]:
        found: list[Connection] = []
        while True:
            # `next` is never followed: it drops filters and names the server's configured host.
            params = {"limit": PAGE, "offset": len(found), **self._of_workspaces()}
            page = (await self.get("/connections", _CONNECTIONS, params)).data
            found += page
            if len(page) < PAGE:
                return found

    async def _read_connection(self, connection_id: str) -> Connection:
        return await self.get(f"/connections/{connection_id}", _CONNECTION)

    async def create_job(self, connection_id: str, operation: Operation) -> Job:
        """`POST /jobs`."""
        body = {"connectionId": connection_id, "jobType": operation}
        return await self.send("POST", "/jobs", _JOB, body=body)

    async def job(self, job_id: str, *, retry: bool = True) -> Job:
        """`GET /jobs/{id}`."""
        return await self.get(f"/jobs/{job_id}", _JOB, retry=retry)

    async def newest_jobs(
        self,
        connection_id: str,
        operation: Operation | None = None,
        *,
        since: datetime | None = None,
        retry: bool = True,
    ) -> list[Job]:
        """`GET /jobs` of one connection, once for each kind that has to be named."""
        found: dict[str, Job] = {}
        first, *others = _JOB_TYPES[operation]
        for job_type in (first, *others):
            params: dict[str, Any] = {"connectionId": connection_id, "limit": 20, "orderBy": _NEWEST_FIRST}
            if job_type:
                params["jobType"] = job_type
            try:
                reply = await self.get("/jobs", _JOBS, params, retry=retry)
            except VendorError as error:
                if job_type == first or error.status not in (400, 422):
                    raise
                continue  # an old server, which has no such kind
            found |= {job.id: job for job in self._newest(reply.data, _JOB.validate_python, since)}
        return sorted(found.values(), key=lambda job: job.created_at, reverse=True)

    async def jobs_since(
        self, created: datetime, connection_ids: Collection[str], *, pages: int
    ) -> AsyncIterator[list[Job]]:
        """`GET /jobs` of the workspaces, page by page."""
        params: dict[str, Any] = {
            "limit": PAGE,
            "orderBy": _NEWEST_FIRST,
            "createdAtStart": created.strftime("%Y-%m-%dT%H:%M:%SZ"),
            **self._of_workspaces(),
        }
        for page in range(pages):
            reply = await self.get("/jobs", _JOBS, {**params, "offset": page * PAGE}, retry=False)
            yield readable(reply.data, _JOB)
            if len(reply.data) < PAGE:
                return

    async def jobs_changed(self, since: datetime) -> Changed:
        """`GET /jobs` of the workspaces, once for each kind that has to be named."""
        found: dict[str, Job] = {}
        unreadable: set[str] = set()
        for job_type in _JOB_TYPES[None]:
            # Newest first: what changes between two pages moves to the front, and none is passed over.
            params: dict[str, Any] = {
                "limit": PAGE,
                "orderBy": "updatedAt|DESC",
                "updatedAtStart": since.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
                **({"jobType": job_type} if job_type else {}),
                **self._of_workspaces(),
            }
            full, offset = True, 0
            while full:
                try:
                    reply = await self.get("/jobs", _JOBS, {**params, "offset": offset})
                except VendorError as error:
                    if job_type is None or error.status not in (400, 422):
                        raise
                    break  # an old server, which has no such kind
                jobs, left_out = sorted_out(reply.data, _JOB)
                found |= {job.id: job for job in jobs}
                unreadable |= {id_of(row, "jobId") for row in left_out}
                full, offset = len(reply.data) == PAGE, offset + PAGE
        return Changed(list(found.values()), unreadable)

    async def cancel_job(self, job_id: str) -> Job:
        """`DELETE /jobs/{id}`."""
        return await self.send("DELETE", f"/jobs/{job_id}", _JOB)

    def _of_workspaces(self) -> dict[str, list[str]]:
        # Only the plural is a parameter: a `workspaceId` is ignored without a word. One key for each of them.
        return {"workspaceIds": self._workspaces} if self._workspaces else {}
