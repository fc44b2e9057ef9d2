"""Fivetran's REST API v1 over the state in `fivetran.py`: paths, envelopes, pages and error bodies."""

from __future__ import annotations

import asyncio
import base64
import binascii
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Literal, TypeVar

import orjson
from pydantic import BaseModel, ConfigDict, ValidationError
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from sandbox import catalog
from sandbox.fivetran import Connection, Fivetran, ResyncRefused, Scope, instant

PREFIX = "/fivetran/v1"
_MEDIA = ("application/json", "application/*", "*/*")
_BEFORE_NEXT_LOOK = 0.02  # seconds
_Model = TypeVar("_Model", bound=BaseModel)


class FivetranError(Exception):
    """An error reply of Fivetran's, raised by a handler."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.body = {"code": code, "message": message}


class _SyncBody(BaseModel):
    """The body of POST /connections/{id}/sync."""

    model_config = ConfigDict(extra="ignore", strict=True)

    force: bool = False


class _ResyncBody(BaseModel):
    """The body of POST /connections/{id}/resync."""

    model_config = ConfigDict(extra="ignore", strict=True)

    scope: Scope | None = None


class _Update(BaseModel):
    """The body of PATCH /connections/{id}."""

    model_config = ConfigDict(extra="ignore", strict=True)

    paused: bool | None = None
    schedule_type: Literal["auto", "manual"] | None = None
    sync_frequency: int | None = None
    is_historical_sync: bool | None = None


class FivetranApi:
    """The routes of the API."""

    def __init__(self, fivetran: Fivetran) -> None:
        self.fivetran = fivetran
        self._recent: deque[float] = deque()

    def routes(self) -> list[Route]:
        """All routes."""
        return [
            self._route("/connections", GET=self.list_connections),
            self._route("/connections/{connection}", GET=self.get_connection, PATCH=self.update_connection),
            self._route("/connections/{connection}/sync", POST=self.sync),
            self._route("/connections/{connection}/resync", POST=self.resync),
            self._route("/connections/{connection}/schemas/tables/resync", POST=self.resync_tables),
            self._route("/connections/{connection}/schemas", GET=self.get_schemas),
            self._route("/connections/{connection}/state", GET=self.get_state),
            self._route("/groups", GET=self.list_groups),
            self._route("/groups/{group}", GET=self.get_group),
            self._route("/groups/{group}/connections", GET=self.list_connections),
        ]

    def _route(self, path: str, **handlers: Callable[[Request], Any]) -> Route:
        async def endpoint(request: Request) -> Response:
            headers: dict[str, str] = {}
            try:
                self._admit(request, headers)
                body, status = {"code": "Success", **await handlers[request.method](request)}, 200
            except FivetranError as error:
                body, status = error.body, error.status
            return Response(orjson.dumps(body), status, headers, media_type="application/json")

        return Route(PREFIX + path, endpoint, methods=list(handlers))

    # -- the door --

    def _admit(self, request: Request, headers: dict[str, str]) -> None:
        """Let a request in that has the key, says what it speaks and keeps to the rate limit."""
        if request.headers.get("authorization") != _BASIC:
            raise FivetranError(401, "AuthFailed", "Invalid authorization credentials")
        self._count(headers)
        accepted = [part.strip().split(";") for part in request.headers.get("accept", "*/*").split(",")]
        if not any(kind[0].strip().lower() in _MEDIA and _version(kind[1:]) for kind in accepted):
            raise FivetranError(406, "NotAcceptable", "The Accept header must be application/json;version=2")
        kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
        if request.method in ("POST", "PATCH") and kind != "application/json":
            raise FivetranError(415, "UnsupportedMediaType", "The Content-Type must be application/json")

    def _count(self, headers: dict[str, str]) -> None:
        limit = self.fivetran.settings.requests_per_hour
        if limit is None:
            return
        now = time.monotonic()
        while self._recent and self._recent[0] < now - 3600:
            self._recent.popleft()
        headers |= {"X-Rate-Limit": str(limit), "X-Rate-Limit-Remaining": str(limit - len(self._recent))}
        if len(self._recent) >= limit:
            headers |= {
                "X-Rate-Limit-Remaining": "0",
                "Retry-After": str(self.fivetran.settings.retry_after),
            }
            raise FivetranError(429, "TooManyRequests", "The limit of requests per hour is reached")
        self._recent.append(now)

    # -- triggers --

    async def sync(self, request: Request) -> dict[str, Any]:
        """POST /connections/{id}/sync: the same reply whether or not something was started."""
        connection = self._connection(request)
        body = _valid(_SyncBody, await _json(request))
        self.fivetran.trigger(connection.connection_id, force=body.force)
        return _triggered(connection)

    async def resync(self, request: Request) -> dict[str, Any]:
        """POST /connections/{id}/resync: everything, or what `scope` names."""
        connection = self._connection(request)
        await self._resync(connection, _valid(_ResyncBody, await _json(request)).scope)
        return _triggered(connection)

    async def resync_tables(self, request: Request) -> dict[str, Any]:
        """POST /connections/{id}/schemas/tables/resync: the body is the scope."""
        connection = self._connection(request)
        await self._resync(connection, _valid(_ResyncBody, {"scope": await _json(request)}).scope)
        return {"message": "Re-sync has been triggered successfully"}

    async def _resync(self, connection: Connection, scope: Scope | None) -> None:
        give_up = time.monotonic() + self.fivetran.settings.resync_patience
        while True:
            try:
                self.fivetran.resync(connection.connection_id, scope)
            except ResyncRefused as refused:
                if not refused.conflict:
                    raise FivetranError(400, "InvalidInput", str(refused)) from None
                if time.monotonic() >= give_up:
                    raise FivetranError(409, "Conflict", str(refused)) from None
            else:
                return
            await asyncio.sleep(_BEFORE_NEXT_LOOK)

    # -- connections --

    async def list_connections(self, request: Request) -> dict[str, Any]:
        """GET /connections and /groups/{id}/connections: in pages of 100 unless told."""
        query = request.query_params
        group, schema = query.get("group_id"), query.get("schema")
        if "group" in request.path_params:
            group = self._group(request)
        limit = _limit(query.get("limit", "100"))
        after = _cursor(query["cursor"]) if "cursor" in query else -1
        with self.fivetran.lock:
            found = [
                (number, connection)
                for number, connection in enumerate(self.fivetran.connections.values())
                if number > after
                and group in (None, catalog.FIVETRAN_GROUP_ID)
                and schema in (None, connection.schema)
            ]
            page = found[:limit]
            for _, connection in page:
                connection.settle(stopped_is_failed=self.fivetran.settings.stopped_is_failed)
            data: dict[str, Any] = {"items": [connection.reply() for _, connection in page]}
        if len(found) > limit:
            data["next_cursor"] = base64.urlsafe_b64encode(f"after:{page[-1][0]}".encode()).decode()
        return {"data": data}

    async def get_connection(self, request: Request) -> dict[str, Any]:
        """GET /connections/{id}."""
        return {"data": self._connection(request).reply()}

    async def update_connection(self, request: Request) -> dict[str, Any]:
        """PATCH /connections/{id}."""
        connection = self._connection(request)
        change = _valid(_Update, await _json(request))
        with self.fivetran.lock:
            connection.schedule_type = change.schedule_type or connection.schedule_type
            connection.sync_frequency = change.sync_frequency or connection.sync_frequency
            if change.is_historical_sync is not None:
                connection.historical = change.is_historical_sync
            if change.paused is not None:
                self.fivetran.pause(connection, change.paused)
            return {"message": "Connection has been updated", "data": connection.reply()}

    async def get_schemas(self, request: Request) -> dict[str, Any]:
        """GET /connections/{id}/schemas: what is in the source, and what it is called in the warehouse."""
        connection = self._connection(request)
        stream = connection.stream
        schema = stream.schema if stream else connection.schema
        table = stream.name if stream else "rows"
        tables = {
            table: {
                "name_in_destination": table,
                "enabled": True,
                "enabled_patch_settings": {"allowed": True},
                "sync_mode": "SOFT_DELETE",
                "columns": {},
                "supports_columns_config": True,
                "supports_history_mode": False,
            }
        }
        schemas = {
            connection.source_schema: {"name_in_destination": schema, "enabled": True, "tables": tables}
        }
        return {"data": {"schema_change_handling": "ALLOW_ALL", "schemas": schemas}}

    async def get_state(self, request: Request) -> dict[str, Any]:
        """GET /connections/{id}/state: nothing is there before the first success."""
        connection = self._connection(request)
        if connection.succeeded_at is None:
            raise FivetranError(400, "InvalidInput", "No state has been written yet")
        return {"data": {"state": {"cursor": instant(connection.succeeded_at)}}}

    async def list_groups(self, request: Request) -> dict[str, Any]:
        """GET /groups: there is one."""
        return {"data": {"items": [_GROUP]}}

    async def get_group(self, request: Request) -> dict[str, Any]:
        """GET /groups/{id}."""
        self._group(request)
        return {"data": _GROUP}

    def _group(self, request: Request) -> str:
        group: str = request.path_params["group"]
        if group != catalog.FIVETRAN_GROUP_ID:
            raise FivetranError(404, "NotFound_Group", f"Cannot find group with id '{group}'")
        return group

    def _connection(self, request: Request) -> Connection:
        connection_id: str = request.path_params["connection"]
        with self.fivetran.lock:
            if connection_id not in self.fivetran.connections:
                raise FivetranError(
                    404, "NotFound_Connector", f"Cannot find connector with id '{connection_id}'"
                )
            return self.fivetran.connection(connection_id)


_GROUP = {
    "id": catalog.FIVETRAN_GROUP_ID,
    "name": "New_York_flights",
    "created_at": instant(catalog.CREATED_AT),
}
_BASIC = (
    "Basic " + base64.b64encode(f"{catalog.FIVETRAN_API_KEY}:{catalog.FIVETRAN_API_SECRET}".encode()).decode()
)


def _triggered(connection: Connection) -> dict[str, Any]:
    said = f"Sync has been successfully triggered for connection with id '{connection.connection_id}'"
    return {"message": said}


def _version(parameters: list[str]) -> bool:
    said = [text.split("=")[1].strip() for text in parameters if text.strip().startswith("version=")]
    return not said or said[0] in ("1", "2")


def _limit(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 1000:
        raise FivetranError(400, "InvalidInput", "The limit must be a number between 1 and 1000")
    return int(text)


def _cursor(text: str) -> int:
    try:
        return int(base64.urlsafe_b64decode(text).decode().removeprefix("after:"))
    except (binascii.Error, ValueError):
        raise FivetranError(400, "InvalidInput", "The cursor is not one of ours") from None


async def _json(request: Request) -> Any:
    try:
        return orjson.loads(await request.body() or b"{}")
    except orjson.JSONDecodeError:
        raise FivetranError(400, "InvalidInput", "The body is not valid JSON") from None


def _valid(model: type[_Model], sent: Any) -> _Model:
    try:
        return model.model_validate(sent)
    except ValidationError as exc:
        first = exc.errors(include_url=False, include_context=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise FivetranError(400, "InvalidInput", f"{where}: {first['msg']}") from None
