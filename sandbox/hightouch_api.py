"""Hightouch's REST API v1 over the state in `hightouch.py`: paths, parameters, replies and error bodies."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, TypeVar

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from sandbox import catalog
from sandbox.hightouch import Hightouch, Run, Sync, SyncDisabled

PREFIX = "/hightouch/api/v1"
_Model = TypeVar("_Model", bound=BaseModel)


class HightouchError(Exception):
    """An error reply of Hightouch's, raised by a handler."""

    def __init__(self, status: int, body: Any) -> None:
        super().__init__(str(body))
        self.status = status
        self.body = body


class _Trigger(BaseModel):
    """The body of POST /syncs/{id}/trigger."""

    model_config = ConfigDict(extra="forbid", strict=True)

    fullResync: bool = False  # noqa: N815 - Hightouch's name
    resetCDC: bool = False  # noqa: N815 - Hightouch's name
    clearAndFill: bool = False  # noqa: N815 - Hightouch's name


class _TriggerCustom(_Trigger):
    """The body of POST /syncs/trigger."""

    syncId: str | None = Field(None, pattern="^[0-9]+$")  # noqa: N815 - Hightouch's name
    syncSlug: str | None = None  # noqa: N815 - Hightouch's name


class _SyncUpdate(BaseModel):
    """The body of PATCH /syncs/{id}."""

    model_config = ConfigDict(extra="forbid", strict=True)

    disabled: bool = False
    schedule: dict[str, Any] | None = None
    configuration: dict[str, Any] = Field(default_factory=dict)


class HightouchApi:
    """The routes of the API."""

    def __init__(self, hightouch: Hightouch) -> None:
        self.hightouch = hightouch
        self._recent: deque[float] = deque()

    def routes(self) -> list[Route]:
        """All routes."""
        return [
            self._route("/syncs/{sync_id}/runs", self.list_runs, "GET"),
            self._route("/syncs/{sync_id}/trigger", self.trigger, "POST"),
            self._route("/syncs/trigger", self.trigger_custom, "POST"),
            self._route("/sync-sequences/{sequence_id}/trigger", self.trigger_sequence, "POST"),
            self._route("/sync-sequences/runs/{run_id}", self.get_sequence_run, "GET"),
            self._route("/syncs", self.list_syncs, "GET"),
            self._route("/syncs/{sync_id}", self.get_sync, "GET"),
            self._route("/syncs/{sync_id}", self.update_sync, "PATCH"),
        ]

    def _route(self, path: str, handler: Callable[..., Any], method: str) -> Route:
        async def endpoint(request: Request) -> Response:
            try:
                self._admit(request)
                body, status = await handler(request), 200
            except HightouchError as error:
                body, status = error.body, error.status
            return Response(orjson.dumps(body), status, media_type="application/json")

        return Route(PREFIX + path, endpoint, methods=[method])

    def _admit(self, request: Request) -> None:
        """Let a request in that has the key and keeps to the rate limit."""
        if request.headers.get("authorization") != f"Bearer {catalog.HIGHTOUCH_API_KEY}":
            raise HightouchError(401, {"message": "Unauthorized"})
        limit = self.hightouch.settings.requests_per_10_seconds
        if limit is None:
            return
        now = time.monotonic()
        while self._recent and self._recent[0] < now - 10:
            self._recent.popleft()
        if len(self._recent) >= limit:
            raise HightouchError(429, {"error": "Too many requests"})
        self._recent.append(now)

    # -- triggers --

    async def trigger(self, request: Request) -> dict[str, str]:
        """POST /syncs/{id}/trigger: the run's id comes back as text."""
        return self._start(request.path_params["sync_id"], await self._parsed(request, _Trigger))

    async def trigger_custom(self, request: Request) -> dict[str, Any]:
        """POST /syncs/trigger: by id (digits as text) or slug."""
        try:
            sent = await self._parsed(request, _TriggerCustom)
            key = sent.syncId or sent.syncSlug
            if key is None:
                raise _invalid("requestBody", "syncId or syncSlug is required")
        except HightouchError as error:
            # This call may answer a body that does not validate with 200, and the error in place of the id.
            if error.status == 422 and isinstance(error.body, dict):
                return error.body
            raise
        return self._start(key, sent)

    def _start(self, key: str, sent: _Trigger) -> dict[str, str]:
        try:
            return {"id": str(self.hightouch.trigger(key, full_resync=sent.fullResync).run_id)}
        except KeyError as exc:
            raise HightouchError(404, {"error": "Sync not found"}) from exc
        except SyncDisabled as exc:
            raise HightouchError(400, {"error": "Sync is disabled"}) from exc

    async def trigger_sequence(self, request: Request) -> dict[str, str]:
        """POST /sync-sequences/{id}/trigger: the id of the run that is queued or in progress, if one is."""
        try:
            return {"id": self.hightouch.sequences.trigger(request.path_params["sequence_id"]).run_id}
        except KeyError as exc:
            raise HightouchError(404, {"error": "Sync sequence not found"}) from exc

    async def get_sequence_run(self, request: Request) -> dict[str, Any]:
        """GET /sync-sequences/runs/{id}."""
        try:
            return self.hightouch.sequences.run(request.path_params["run_id"]).reply()
        except KeyError as exc:
            raise HightouchError(404, {"error": "Sync sequence run not found"}) from exc

    # -- syncs and runs --

    async def list_syncs(self, request: Request) -> dict[str, Any]:
        """GET /syncs: in pages of 100 unless told."""
        query = request.query_params
        model, after, before = (
            _number(request, "modelId"),
            _moment(request, "after"),
            _moment(request, "before"),
        )

        def wanted(sync: Sync) -> bool:
            ran = sync.current.started_wall if sync.current is not None else None
            return (
                query.get("slug") in (None, sync.spec.slug)
                and model in (None, sync.reply()["modelId"])
                and (after is None or (ran is not None and ran >= after))
                and (before is None or (ran is not None and ran <= before))
            )

        order = _choice(request, "orderBy", ("id", "name", "slug", "createdAt", "updatedAt"))
        found = [sync for sync in self.hightouch.syncs.values() if wanted(sync)]
        if order in ("name", "slug"):
            found.sort(key=lambda sync: sync.spec.slug)
        return self._page(request, [sync.reply() for sync in found])

    async def get_sync(self, request: Request) -> dict[str, Any]:
        """GET /syncs/{id}."""
        return self._sync(request).reply()

    async def update_sync(self, request: Request) -> dict[str, Any]:
        """PATCH /syncs/{id}: disabled, schedule, configuration."""
        sync = self._sync(request)
        change = await self._parsed(request, _SyncUpdate)
        if "disabled" in change.model_fields_set:
            sync.disabled = change.disabled
        if "schedule" in change.model_fields_set:
            sync.schedule = change.schedule
        sync.configuration = sync.configuration | change.configuration
        return sync.reply()

    async def list_runs(self, request: Request) -> dict[str, Any]:
        """GET /syncs/{id}/runs: filters on time hide runs that have not started."""
        sync = self._sync(request)
        run_id, within = _number(request, "runId"), _number(request, "within")
        after, before = _moment(request, "after"), _moment(request, "before")
        if within is not None:
            after = max(after or 0.0, time.time() - within * 60)
        order = _choice(request, "orderBy", ("id", "createdAt", "startedAt", "finishedAt"))
        now = time.monotonic()

        def wanted(run: Run) -> bool:
            started = run.started_wall
            return (
                run.hidden_until <= now
                and run_id in (None, run.run_id)
                and (after is None or (started is not None and started >= after))
                and (before is None or (started is not None and started <= before))
            )

        found = [run for run in self.hightouch.runs_of(sync.spec.sync_id) if wanted(run)]
        keys: dict[str, Callable[[Run], float]] = {
            "id": lambda run: run.run_id,
            "createdAt": lambda run: run.created_wall,
            "startedAt": lambda run: run.started_wall or float("inf"),
            "finishedAt": lambda run: run.finished_wall or float("inf"),
        }
        found.sort(key=keys[order], reverse=not self.hightouch.settings.oldest_first)
        old = self.hightouch.settings.form == "2022"
        replies = [run.reply() | ({"id": str(run.run_id)} if old else {}) for run in found]
        return self._page(request, replies)

    def _page(self, request: Request, found: list[dict[str, Any]]) -> dict[str, Any]:
        old = self.hightouch.settings.form == "2022"
        limit = int(_number(request, "limit", 5 if old else 100) or 0)
        offset = int(_number(request, "offset", 0) or 0)
        if limit < 0 or offset < 0:
            raise _invalid("limit", "must not be negative")
        data: dict[str, Any] = {"data": found[offset : offset + limit]}
        return data if old else {"hasMore": len(found) > offset + limit, **data}

    def _sync(self, request: Request) -> Sync:
        text = request.path_params["sync_id"]
        if not text.isdecimal():
            raise _invalid("syncId", f"invalid float number: {text}")
        try:
            return self.hightouch.sync(text)
        except KeyError as exc:
            raise HightouchError(404, {"message": "Not found"}) from exc

    async def _parsed(self, request: Request, model: type[_Model]) -> _Model:
        body = await request.body()
        try:
            return model.model_validate(orjson.loads(body or b"{}"))
        except orjson.JSONDecodeError as exc:
            raise HightouchError(400, {"message": "Bad request: the body is not valid JSON"}) from exc
        except ValidationError as exc:
            first = exc.errors(include_url=False, include_context=False)[0]
            field = ".".join(["requestBody", *(str(part) for part in first["loc"])])
            raise _invalid(field, first["msg"]) from exc


def _invalid(field: str, message: str) -> HightouchError:
    return HightouchError(422, {"message": "Validation failed", "details": {field: {"message": message}}})


def _number(request: Request, name: str, default: float | None = None) -> float | None:
    text = request.query_params.get(name)
    if text is None:
        return default
    try:
        return float(text)
    except ValueError as exc:
        raise _invalid(name, f"invalid float number: {text}") from exc


def _choice(request: Request, name: str, allowed: tuple[str, ...]) -> str:
    text = request.query_params.get(name, allowed[0])
    if text not in allowed:
        raise _invalid(name, f"should be one of the following; {list(allowed)}")
    return text


def _moment(request: Request, name: str) -> float | None:
    text = request.query_params.get(name)
    if text is None:
        return None
    try:
        moment = datetime.fromisoformat(text)
    except ValueError as exc:
        raise _invalid(name, "invalid ISO 8601 datetime format, i.e. YYYY-MM-DDTHH:mm:ss") from exc
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
