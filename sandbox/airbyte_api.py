"""Airbyte's Public API v1 over the state in `airbyte.py`: paths, parameters, replies and problem bodies."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlencode
from uuid import UUID

from pydantic import BaseModel, ConfigDict, ValidationError
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from sandbox import catalog
from sandbox.airbyte_door import Door, parsed, reply, web_app
from sandbox.airbyte_jobs import Connection, ConnectionStatus, Job, JobType, StartRefused
from sandbox.airbyte_problems import Problem, not_found, state_conflict, try_again_later

PREFIX = "/api/public/v1"
# A real server writes its own configured address into `next`, not the one the client used.
_CONFIGURED_HOST = f"http://airbyte.internal:8001{PREFIX}"
_STATUSES = ("pending", "queued", "running", "incomplete", "failed", "succeeded", "cancelled")
_JOB_TYPES = ("sync", "reset", "refresh", "clear")
_OLD_JOB_TYPES = _JOB_TYPES[:2]


class _ConnectionPatch(BaseModel):
    """PATCH /connections/{id}: the fields that this server keeps; others are accepted and ignored."""

    model_config = ConfigDict(extra="ignore")

    name: str | None = None
    status: ConnectionStatus | None = None
    schedule: dict[str, str] | None = None
    tags: list[dict[str, str]] | None = None
    prefix: str | None = None
    namespaceDefinition: str | None = None  # noqa: N815 - Airbyte's name
    namespaceFormat: str | None = None  # noqa: N815 - Airbyte's name
    configurations: dict[str, list[dict[str, Any]]] | None = None


class AirbyteApi:
    """The routes of the Public API."""

    def __init__(self, door: Door) -> None:
        self.door = door
        self.airbyte = door.airbyte

    def routes(self) -> list[Route]:
        """All routes, most used first: Starlette tries them in order."""
        return [
            self._route("/jobs/{job_id}", self.get_job, "GET"),
            self._route("/jobs", self.list_jobs, "GET"),
            self._route("/jobs", self.create_job, "POST"),
            self._route("/jobs/{job_id}", self.cancel_job, "DELETE"),
            self._route("/applications/token", self.token, "POST", guarded=False),
            self._route("/connections", self.list_connections, "GET"),
            self._route("/connections/{connection_id}", self.get_connection, "GET"),
            self._route("/connections/{connection_id}", self.patch_connection, "PATCH"),
            self._route("/workspaces", self.list_workspaces, "GET"),
            self._route("/workspaces/{workspace_id}", self.get_workspace, "GET"),
            self._route("/tags", self.list_tags, "GET"),
            self._route("/health", self.health, "GET", guarded=False),
        ]

    def _route(self, path: str, handler: Callable[..., Any], method: str, *, guarded: bool = True) -> Route:
        async def endpoint(request: Request) -> Response:
            if self.airbyte.settings.apis == "config":
                return web_app()
            try:
                if guarded:
                    self.door.check(request)
                return reply(await handler(request))
            except Problem as problem:
                return reply(problem.body, problem.status, media="application/problem+json")

        return Route(PREFIX + path, endpoint, methods=[method])

    # -- token, health --

    async def health(self, request: Request) -> str:
        """GET /health."""
        return "Successful operation"

    async def token(self, request: Request) -> dict[str, Any]:
        """POST /applications/token: a bearer token for client credentials."""
        token, lifetime = await self.door.token(request)
        answer: dict[str, Any] = {"access_token": token, "token_type": "Bearer"}
        return answer | ({"expires_in": int(lifetime)} if self.airbyte.settings.announce_expiry else {})

    # -- jobs --

    async def create_job(self, request: Request) -> dict[str, Any]:
        """POST /jobs: start a sync, a reset or a clear."""
        sent = parsed(await request.body())
        if not isinstance(sent, dict):
            raise Problem(422, "The body is not an object")
        connection_id, job_type = sent.get("connectionId"), sent.get("jobType")
        if not isinstance(connection_id, str) or job_type not in self._job_types:
            raise Problem(422, "connectionId and jobType (sync, reset, clear) are required")
        if job_type == "refresh":
            raise Problem(422, "Refreshes are not supported in the public API")
        _uuid(connection_id, "connectionId")
        kind: JobType = job_type
        try:
            return self.airbyte.start(connection_id, kind).reply()
        except StartRefused as refused:
            if refused.reason == "unknown":
                raise not_found("connection", connection_id) from refused
            if refused.reason == "inactive":
                raise state_conflict("Could not fulfill request") from refused
            raise try_again_later(f"A sync is already running for: {connection_id}") from refused

    async def get_job(self, request: Request) -> dict[str, Any]:
        """GET /jobs/{id}."""
        return self._job(request).reply()

    async def cancel_job(self, request: Request) -> dict[str, Any]:
        """DELETE /jobs/{id}: stop what the job's connection runs now."""
        job_id = _integer(request.path_params["job_id"], "jobId")
        job = self.airbyte.jobs.get(job_id)
        if job is None:
            raise state_conflict("Job is not currently running")
        # Whatever its connection runs now is cancelled, which need not be the job asked for.
        running = self.airbyte.connections[job.connection_id].active_job
        if running is None:
            raise state_conflict("Job is not currently running")
        await asyncio.sleep(self.airbyte.settings.cancel_seconds)
        running.timeline.finish("cancelled")
        return job.reply()

    async def list_jobs(self, request: Request) -> dict[str, Any]:
        """GET /jobs: filtered, ordered (oldest first unless told), in pages."""
        query = request.query_params
        limit, offset = _page(request)
        keep = self._job_filter(request)
        field, descending = _order(query.get("orderBy", "createdAt|ASC"))
        now = time.monotonic()
        with self.airbyte.lock:
            jobs = [job for job in self.airbyte.jobs.values() if job.hidden_until <= now and keep(job)]
        if field == "updatedAt":
            jobs.sort(key=_updated)
        if descending:
            jobs.reverse()
        page = [job.reply() for job in jobs[offset : offset + limit]]
        # Faithful to the original: the links lose the status, the time filters and the order.
        kept = [
            (key, value)
            for key, value in query.multi_items()
            if key in ("connectionId", "workspaceIds", "jobType")
        ]
        return {"data": page, **_links("/jobs", kept, limit, offset, empty=not page)}

    @property
    def _job_types(self) -> tuple[str, ...]:
        return _OLD_JOB_TYPES if self.airbyte.settings.age == "2023" else _JOB_TYPES

    def _job_filter(self, request: Request) -> Callable[[Job], bool]:
        query = request.query_params
        tests: list[Callable[[Job], bool]] = []
        connection_id, workspaces = query.get("connectionId"), _ids(request, "workspaceIds")
        if connection_id is not None:
            wanted = _uuid(connection_id, "connectionId")
            tests.append(lambda job: job.connection_id == wanted)
        elif workspaces:
            tests.append(lambda job: self.airbyte.connections[job.connection_id].workspace_id in workspaces)
        if (job_type := query.get("jobType")) is not None:
            if job_type not in self._job_types:
                raise Problem(400, f"Failed to convert argument [jobType] for value [{job_type}]")
            tests.append(lambda job: job.job_type == job_type)
        elif self.airbyte.settings.age != "now":
            tests.append(lambda job: job.job_type in _OLD_JOB_TYPES)
        if (status := query.get("status")) is not None:
            if status not in _STATUSES:
                raise Problem(400, f"Failed to convert argument [status] for value [{status}]")
            tests.append(lambda job: job.status == status)
        for name, moment in (("createdAt", _created), ("updatedAt", _updated)):
            tests += _window(request, name, moment)
        return lambda job: all(test(job) for test in tests)

    def _job(self, request: Request) -> Job:
        job_id = _integer(request.path_params["job_id"], "jobId")
        job = self.airbyte.jobs.get(job_id)
        if job is None:
            raise not_found("job", str(job_id))
        return job

    # -- connections, workspaces, tags --

    async def list_connections(self, request: Request) -> dict[str, Any]:
        """GET /connections."""
        limit, offset = _page(request)
        workspaces, tags = _ids(request, "workspaceIds"), set(_ids(request, "tagIds"))
        deleted = request.query_params.get("includeDeleted") == "true"
        with self.airbyte.lock:
            found = [
                connection
                for connection in self.airbyte.connections.values()
                if (deleted or connection.status != "deprecated")
                and (not workspaces or connection.workspace_id in workspaces)
                and (not tags or any(tag["tagId"] in tags for tag in connection.tags))
            ]
        page = [connection.reply() for connection in found[offset : offset + limit]]
        return {"data": page, **_links("/connections", [], limit, offset, empty=not page)}

    async def get_connection(self, request: Request) -> dict[str, Any]:
        """GET /connections/{id}."""
        return self._connection(request).reply()

    async def patch_connection(self, request: Request) -> dict[str, Any]:
        """PATCH /connections/{id}."""
        connection = self._connection(request)
        try:
            change = _ConnectionPatch.model_validate(parsed(await request.body()))
        except ValidationError as exc:
            raise Problem(422, str(exc.errors(include_url=False, include_context=False)[0]["msg"])) from exc
        with self.airbyte.lock:
            connection.name = change.name or connection.name
            connection.status = change.status or connection.status
            connection.schedule = change.schedule or connection.schedule
            connection.tags = connection.tags if change.tags is None else change.tags
            connection.prefix = connection.prefix if change.prefix is None else change.prefix
            connection.namespace_definition = change.namespaceDefinition or connection.namespace_definition
            connection.namespace_format = change.namespaceFormat or connection.namespace_format
            if change.configurations is not None:
                connection.streams = change.configurations.get("streams", connection.streams)
        return connection.reply()

    def _connection(self, request: Request) -> Connection:
        connection_id = _uuid(request.path_params["connection_id"], "connectionId")
        connection = self.airbyte.connections.get(connection_id)
        if connection is None:
            raise not_found("connection", connection_id)
        return connection

    async def list_workspaces(self, request: Request) -> dict[str, Any]:
        """GET /workspaces."""
        limit, offset = _page(request)
        wanted = _ids(request, "workspaceIds")
        found = [known for known in self.airbyte.workspaces if not wanted or known in wanted]
        page = [_workspace(known) for known in found[offset : offset + limit]]
        return {"data": page, **_links("/workspaces", [], limit, offset, empty=not page)}

    async def get_workspace(self, request: Request) -> dict[str, Any]:
        """GET /workspaces/{id}."""
        workspace_id = _uuid(request.path_params["workspace_id"], "workspaceId")
        if workspace_id not in self.airbyte.workspaces:
            raise not_found("workspace", workspace_id)
        return _workspace(workspace_id)

    async def list_tags(self, request: Request) -> dict[str, Any]:
        """GET /tags."""
        wanted = _ids(request, "workspaceIds")
        if wanted and catalog.WORKSPACE_ID not in wanted:
            return {"data": []}
        names = [f"owner:{owner}" for owner in catalog.OWNERS] + [catalog.NIGHTLY_TAG]
        return {"data": [catalog.tag(name) for name in names]}


def _workspace(workspace_id: str) -> dict[str, Any]:
    return {
        "workspaceId": workspace_id,
        "name": catalog.workspace_name(workspace_id),
        "dataResidency": "auto",
        "notifications": {
            "failure": {"webhook": {"enabled": False}},
            "success": {"webhook": {"enabled": False}},
        },
    }


def _created(job: Job) -> float:
    return job.created_wall


def _updated(job: Job) -> float:
    return job.timeline.wall(job.timeline.at()[1])


def _window(request: Request, name: str, moment: Callable[[Job], float]) -> list[Callable[[Job], bool]]:
    tests: list[Callable[[Job], bool]] = []
    start, end = (_time(request, f"{name}{edge}") for edge in ("Start", "End"))
    if start is not None:
        tests.append(lambda job: moment(job) >= start)
    if end is not None:
        tests.append(lambda job: moment(job) <= end)
    return tests


def _time(request: Request, name: str) -> float | None:
    text = request.query_params.get(name)
    if text is None:
        return None
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as exc:
        raise Problem(400, f"Failed to convert argument [{name}] for value [{text}]") from exc
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def _order(text: str) -> tuple[str, bool]:
    field, _, direction = text.partition("|")
    if field not in ("createdAt", "updatedAt") or direction not in ("ASC", "DESC"):
        raise Problem(400, f"Invalid order by clause provided: {text}")
    return field, direction == "DESC"


def _page(request: Request) -> tuple[int, int]:
    limit = _integer(request.query_params.get("limit", "20"), "limit")
    offset = _integer(request.query_params.get("offset", "0"), "offset")
    if not 1 <= limit <= 100:
        raise Problem(400, "limit: must be between 1 and 100")
    if offset < 0:
        raise Problem(400, "offset: must be greater than or equal to 0")
    return limit, offset


def _links(path: str, kept: list[tuple[str, str]], limit: int, offset: int, *, empty: bool) -> dict[str, str]:
    def link(start: int) -> str:
        return f"{_CONFIGURED_HOST}{path}?" + urlencode([*kept, ("limit", limit), ("offset", start)])

    return {
        "previous": link(max(0, offset - limit)) if offset else "",
        "next": "" if empty else link(offset + limit),
    }


def _ids(request: Request, name: str) -> list[str]:
    """A list parameter, written as repeated keys or joined with commas."""
    values = [part for value in request.query_params.getlist(name) for part in value.split(",") if part]
    return [_uuid(value, name) for value in values]


def _uuid(text: str, name: str) -> str:
    try:
        return str(UUID(text))
    except ValueError as exc:
        raise Problem(400, f"Failed to convert argument [{name}] for value [{text}]") from exc


def _integer(text: str, name: str) -> int:
    try:
        return int(text)
    except ValueError as exc:
        raise Problem(400, f"Failed to convert argument [{name}] for value [{text}]") from exc
