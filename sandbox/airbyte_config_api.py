"""Airbyte's Config API (`/api/v1`) over the state in `airbyte.py`: every call a POST, times in seconds."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any
from uuid import UUID, uuid4

from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from sandbox import catalog
from sandbox.airbyte_door import Door, parsed, reply
from sandbox.airbyte_jobs import Connection, Job, JobType, StartRefused
from sandbox.airbyte_problems import Problem
from sandbox.faults import HTML_PAGE

PREFIX = "/api/v1"
_CONFIG_TYPES = (
    *("check_connection_source", "check_connection_destination", "discover_schema", "get_spec"),
    *("sync", "reset_connection", "refresh", "clear"),
)
_OLD_CONFIG_TYPES = _CONFIG_TYPES[:6]
_ERRORS = "io.airbyte.commons.server.errors"
_UNKNOWN_HANGS = 0.3  # seconds; on real old servers, as long as the proxy in front of them is patient


class AirbyteConfigApi:
    """The routes of the Config API."""

    def __init__(self, door: Door) -> None:
        self.door = door
        self.airbyte = door.airbyte

    def routes(self) -> list[Route]:
        """All routes."""
        start = self._start_handler
        return [
            self._route("/jobs/get_without_logs", self.job),
            self._route("/jobs/get", self.job_with_logs),
            self._route("/jobs/get_light", self.job_light),
            self._route("/jobs/list", self.jobs),
            self._route("/jobs/list_for_workspaces", self.jobs_of_workspaces, since="2024"),
            self._route("/jobs/cancel", self.cancel),
            self._route("/connections/sync", start("sync")),
            self._route("/connections/reset", start("reset")),
            self._route("/connections/reset/stream", start("reset")),
            self._route("/connections/clear", start("clear"), since="2024"),
            self._route("/connections/clear/stream", start("clear"), since="2024"),
            self._route("/connections/refresh", self.refresh, since="2024"),
            self._route("/connections/get", self.connection),
            self._route("/connections/list", self.connections),
            self._route("/connections/status", self.statuses, since="2024"),
            self._route("/workspaces/list", self.workspaces),
            self._route("/tags/list", self.tags, since="2024"),
            self._route("/applications/token", self.token, since="2024", guarded=False),
            self._route("/health", self.health, method="GET", guarded=False),
        ]

    def _route(
        self,
        path: str,
        handler: Callable[[dict[str, Any], Request], Any],
        *,
        method: str = "POST",
        since: str = "",
        guarded: bool = True,
    ) -> Route:
        async def endpoint(request: Request) -> Response:
            settings = self.airbyte.settings
            if settings.apis == "public" or (since and settings.age == "2023"):
                return reply({"message": "Object not found."}, 404)
            try:
                if guarded:
                    self.door.check(request)
                sent = parsed(await request.body()) if guarded else {}
                if not isinstance(sent, dict):
                    raise _invalid("body")
                answer = await handler(sent, request)
            except Problem as problem:
                if problem.status == 401:  # here it is no problem document
                    return reply({"message": "Unauthorized", "errorId": str(uuid4())}, 401)
                return reply(problem.body, problem.status)
            return answer if isinstance(answer, Response) else reply(answer)

        return Route(PREFIX + path, endpoint, methods=[method])

    @property
    def _old(self) -> bool:
        return self.airbyte.settings.age == "2023"

    # -- token, health, workspaces --

    async def health(self, sent: dict[str, Any], request: Request) -> dict[str, Any]:
        """GET /health."""
        return {"available": True}

    async def token(self, sent: dict[str, Any], request: Request) -> dict[str, Any]:
        """A token; unlike the public API's reply this one does not say how long it lives."""
        token, _ = await self.door.token(request)
        return {"access_token": token}

    async def workspaces(self, sent: dict[str, Any], request: Request) -> dict[str, Any]:
        """All workspaces."""
        return {
            "workspaces": [
                {
                    "workspaceId": workspace_id,
                    "name": catalog.workspace_name(workspace_id),
                    "slug": catalog.workspace_name(workspace_id).lower().replace(" ", "-"),
                    "initialSetupComplete": True,
                }
                for workspace_id in self.airbyte.workspaces
            ]
        }

    async def tags(self, sent: dict[str, Any], request: Request) -> list[dict[str, str]]:
        """The tags of a workspace."""
        if _uuid(sent, "workspaceId") != catalog.WORKSPACE_ID:
            return []
        names = [f"owner:{owner}" for owner in catalog.OWNERS] + [catalog.NIGHTLY_TAG]
        return [catalog.tag(name) for name in names]

    # -- starting --

    def _start_handler(self, job_type: JobType) -> Callable[[dict[str, Any], Request], Any]:
        async def start(sent: dict[str, Any], request: Request) -> Any:
            return await self._start(sent, job_type)

        return start

    async def refresh(self, sent: dict[str, Any], request: Request) -> Any:
        """Load streams anew; the reply is a job without attempts."""
        if sent.get("refreshMode") not in ("Truncate", "Merge"):
            raise _invalid("refreshMode")
        connection = self._connection(sent)
        known = {stream["name"] for stream in connection.streams}
        for stream in sent.get("streams") or []:
            if stream.get("streamName") not in known:
                raise _conflict(
                    "Streams to refresh not found in the catalog", "IllegalArgumentException", 400
                )
        started = await self._start(sent, "refresh")
        return started if isinstance(started, Response) else {"job": started["job"]}

    async def _start(self, sent: dict[str, Any], job_type: JobType) -> Any:
        connection_id = _uuid(sent, "connectionId")
        try:
            job = self.airbyte.start(connection_id, job_type)
        except StartRefused as refused:
            if refused.reason == "unknown":
                if self._old:
                    await asyncio.sleep(_UNKNOWN_HANGS)
                    return HTMLResponse(HTML_PAGE, 504)
                raise _not_found("STANDARD_SYNC", connection_id) from refused
            if refused.reason == "inactive":
                raise _conflict("Can only sync an active connection", "IllegalStateException") from refused
            known = f"{_ERRORS}.ValueConflictKnownException"
            raise _conflict(f"A sync is already running for: {connection_id}", known) from refused
        return self._info(job)

    # -- jobs --

    async def job(self, sent: dict[str, Any], request: Request) -> dict[str, Any]:
        """A job and its attempts."""
        return self._info(self._job(sent))

    async def job_with_logs(self, sent: dict[str, Any], request: Request) -> dict[str, Any]:
        """The same with logs, which may be of any size."""
        info = self._info(self._job(sent))
        line = "replication-orchestrator > syncing"
        for attempt in info["attempts"]:
            attempt |= {"logType": "formatted", "logs": {"logLines": [line] * 2000}}
        return info

    async def job_light(self, sent: dict[str, Any], request: Request) -> dict[str, Any]:
        """A job alone."""
        return {"job": self._job(sent).config_reply(old=self._old)}

    async def cancel(self, sent: dict[str, Any], request: Request) -> dict[str, Any]:
        """Stop what the job's connection runs now, which need not be the job asked for."""
        job = self._job(sent)
        running = self.airbyte.connections[job.connection_id].active_job
        if running is None:
            raise _conflict("Job is not currently running", "IllegalStateException")
        await asyncio.sleep(self.airbyte.settings.cancel_seconds)
        running.timeline.finish("cancelled")
        return self._info(job)

    async def jobs(self, sent: dict[str, Any], request: Request) -> dict[str, Any]:
        """The jobs of a connection, newest first."""
        return self._list(sent)

    async def jobs_of_workspaces(self, sent: dict[str, Any], request: Request) -> dict[str, Any]:
        """The jobs of workspaces, newest first."""
        return self._list(sent, sent.get("workspaceIds") or [])

    def _list(self, sent: dict[str, Any], workspaces: list[str] | None = None) -> dict[str, Any]:
        types = sent.get("configTypes")
        known = _OLD_CONFIG_TYPES if self._old else _CONFIG_TYPES
        if not isinstance(types, list) or not types or not set(types) <= set(known):
            raise _invalid("configTypes")
        statuses, config_id = set(sent.get("statuses") or []), sent.get("configId")
        start, end = (_time(sent, f"createdAt{edge}") for edge in ("Start", "End"))
        changed = _time(sent, "updatedAtStart")
        now = time.monotonic()
        with self.airbyte.lock:
            found = [
                job
                for job in self.airbyte.jobs.values()
                if (
                    workspaces is None
                    or self.airbyte.connections[job.connection_id].workspace_id in workspaces
                )
                and job.hidden_until <= now
                and job.config_type in types
                and (config_id is None or job.connection_id == config_id)
                and (not statuses or job.status in statuses)
                and (start is None or job.created_wall >= start)
                and (end is None or job.created_wall <= end)
                and (changed is None or _updated(job) >= changed)
            ]
        if sent.get("orderByField") == "updatedAt":
            found.sort(key=_updated)
        if sent.get("orderByMethod", "DESC") == "DESC":
            found.reverse()
        pagination = sent.get("pagination") or {}
        size, offset = int(pagination.get("pageSize", 20)), int(pagination.get("rowOffset", 0))
        return {
            "jobs": [
                {"job": job.config_reply(old=self._old), "attempts": job.attempts()}
                for job in found[offset : offset + size]
            ],
            "totalJobCount": len(found),
        }

    def _info(self, job: Job) -> dict[str, Any]:
        attempts = [{"attempt": attempt} for attempt in job.attempts()]
        return {"job": job.config_reply(old=self._old), "attempts": attempts}

    def _job(self, sent: dict[str, Any]) -> Job:
        job_id = sent.get("id")
        if not isinstance(job_id, int):
            raise _invalid("id")
        job = self.airbyte.jobs.get(job_id)
        if job is None:
            raise _not_found("JOB", str(job_id))
        return job

    # -- connections --

    async def connection(self, sent: dict[str, Any], request: Request) -> dict[str, Any]:
        """One connection, a deleted one too."""
        return self._connection(sent).config_reply(old=self._old)

    async def connections(self, sent: dict[str, Any], request: Request) -> dict[str, Any]:
        """The connections of a workspace that are not deleted, all in one reply."""
        workspace = _uuid(sent, "workspaceId")
        with self.airbyte.lock:
            found = [
                c
                for c in self.airbyte.connections.values()
                if c.status != "deprecated" and c.workspace_id == workspace
            ]
        return {"connections": [connection.config_reply(old=self._old) for connection in found]}

    async def statuses(self, sent: dict[str, Any], request: Request) -> list[dict[str, Any]]:
        """What each of some connections does at the moment."""
        wanted = sent.get("connectionIds") or []
        return [self._status(self._connection({"connectionId": one})) for one in wanted]

    def _status(self, connection: Connection) -> dict[str, Any]:
        job, words = connection.latest, {"failed": "incomplete", "cancelled": "incomplete"}
        answer: dict[str, Any] = {"connectionId": connection.connection_id, "connectionSyncStatus": "pending"}
        if connection.status != "active":
            answer["connectionSyncStatus"] = "paused"
        elif job is not None:
            ended = words.get(job.status, "synced")
            queued = job.status in ("pending", "queued")
            active = connection.active_job is not None
            answer["connectionSyncStatus"] = ("queued" if queued else "running") if active else ended
        if job is not None:
            answer |= {"lastSyncJobId": job.job_id, "lastSyncJobCreatedAt": int(job.created_wall)}
            if connection.active_job is not None:
                answer["activeJob"] = job.config_reply(old=False)
            failures = (job.attempts() or [{}])[-1].get("failureSummary", {}).get("failures")
            if failures:
                answer["failureReason"] = failures[0]
        return answer

    def _connection(self, sent: dict[str, Any]) -> Connection:
        connection_id = _uuid(sent, "connectionId")
        connection = self.airbyte.connections.get(connection_id)
        if connection is None:
            raise _not_found("STANDARD_SYNC", connection_id)
        return connection


def _uuid(sent: dict[str, Any], name: str) -> str:
    try:
        return str(UUID(sent[name]))
    except (KeyError, ValueError, TypeError, AttributeError) as exc:
        raise _invalid(name) from exc


def _updated(job: Job) -> float:
    return job.timeline.wall(job.timeline.at()[1])


def _time(sent: dict[str, Any], name: str) -> float | None:
    if (text := sent.get(name)) is None:
        return None
    try:
        moment = datetime.fromisoformat(text)
    except (TypeError, ValueError) as exc:
        raise _invalid(name) from exc
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def _invalid(name: str) -> Problem:
    """422: a field is missing or has a value that it can't have."""
    body = {
        "message": "Some properties contained invalid input.",
        "exceptionClassName": f"{_ERRORS}.InvalidInputExceptionInfo",
        "validationErrors": [{"propertyPath": name, "message": "invalid"}],
    }
    return Problem(422, body=body)


def _not_found(kind: str, resource_id: str) -> Problem:
    """404: no such connection or job."""
    body = {
        "id": resource_id,
        "message": f"Could not find configuration for {kind}: {resource_id}.",
        "exceptionClassName": f"{_ERRORS}.IdNotFoundKnownException",
        "exceptionStack": [],
        "rootCauseExceptionStack": [],
    }
    return Problem(404, body=body)


def _conflict(message: str, exception: str, status: int = 409) -> Problem:
    return Problem(status, body={"message": message, "exceptionClassName": exception, "exceptionStack": []})
