"""Census's REST API v1 over the state in `census.py`: paths, envelopes, pages and error bodies."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import orjson
from pydantic import BaseModel, ConfigDict, ValidationError
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from sandbox import catalog
from sandbox.census import Census, Run, RunEnded, Sync, SyncPaused

PREFIX = "/census/api/v1"
_MOST_PER_PAGE = 100


class CensusError(Exception):
    """An error reply of Census's, raised by a handler."""

    def __init__(self, status: int, message: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.headers = headers or {}
        # The status of a 404 is a number; of anything else it is a word.
        self.body: dict[str, Any] = (
            {"status": 404} if status == 404 else {"status": "error", "message": message}
        )


class _Update(BaseModel):
    """As much of the body of PATCH /syncs/{id} as the stage takes in."""

    model_config = ConfigDict(extra="ignore", strict=True)

    paused: bool | None = None


class CensusApi:
    """The routes of the API."""

    def __init__(self, census: Census) -> None:
        self.census = census
        self._recent: deque[float] = deque()

    def routes(self) -> list[Route]:
        """All routes."""
        return [
            self._route("/syncs", self.list_syncs, "GET"),
            self._route("/syncs/{sync_id}", self.get_sync, "GET"),
            self._route("/syncs/{sync_id}", self.update_sync, "PATCH"),
            self._route("/syncs/{sync_id}/trigger", self.trigger, "POST"),
            self._route("/syncs/{sync_id}/sync_runs", self.list_runs, "GET"),
            self._route("/sync_runs/{run_id}", self.get_run, "GET"),
            self._route("/sync_runs/{run_id}/cancel", self.cancel, "POST"),
        ]

    def _route(self, path: str, handler: Callable[..., Any], method: str) -> Route:
        async def endpoint(request: Request) -> Response:
            headers: dict[str, str] = {}
            try:
                self._admit(request)
                body, status = await handler(request), 200
            except CensusError as error:
                body, status, headers = error.body, error.status, error.headers
            return Response(orjson.dumps(body), status, headers, media_type="application/json")

        return Route(PREFIX + path, endpoint, methods=[method])

    def _admit(self, request: Request) -> None:
        """Let a request in that has the key and keeps to the rate limit."""
        if request.headers.get("authorization") != f"Bearer {catalog.CENSUS_API_KEY}":
            raise CensusError(401, "Unauthorized")
        settings = self.census.settings
        if settings.requests_per_10_seconds is None:
            return
        now = time.monotonic()
        while self._recent and self._recent[0] < now - 10:
            self._recent.popleft()
        if len(self._recent) >= settings.requests_per_10_seconds:
            wait = settings.retry_after
            raise CensusError(
                429, "Too many requests", None if wait is None else {"retry-after": f"{wait:g}"}
            )
        self._recent.append(now)

    # -- syncs --

    async def list_syncs(self, request: Request) -> dict[str, Any]:
        """GET /syncs: in pages."""
        return _page(request, [sync.reply() for sync in self.census.syncs.values()])

    async def get_sync(self, request: Request) -> dict[str, Any]:
        """GET /syncs/{id}."""
        return {"status": "success", "data": self._sync(request).reply()}

    async def update_sync(self, request: Request) -> dict[str, Any]:
        """PATCH /syncs/{id}: the stage takes in whether it is paused, and ignores the rest."""
        sync = self._sync(request)
        try:
            change = _Update.model_validate(orjson.loads(await request.body() or b"{}"))
        except (orjson.JSONDecodeError, ValidationError) as exc:
            raise CensusError(422, "The sync's attributes are not valid") from exc
        if change.paused is not None:
            sync.paused = change.paused
        return {"status": "updated", "data": sync.reply()}

    # -- runs --

    async def trigger(self, request: Request) -> dict[str, Any]:
        """POST /syncs/{id}/trigger?force_full_sync=: the flag is read in the query and nowhere else."""
        full = request.query_params.get("force_full_sync", "").lower() == "true"
        try:
            run = self.census.trigger(self._sync(request).spec.sync_id, full_sync=full)
        except SyncPaused as exc:
            raise CensusError(400, "This sync is paused") from exc
        return {"status": "success", "data": {"sync_run_id": run.run_id}}

    async def list_runs(self, request: Request) -> dict[str, Any]:
        """GET /syncs/{id}/sync_runs: in pages; a fresh run may be missing."""
        now = time.monotonic()
        runs = [
            run for run in self.census.runs_of(self._sync(request).spec.sync_id) if run.hidden_until <= now
        ]
        return _page(request, [run.reply() for run in runs])

    async def get_run(self, request: Request) -> dict[str, Any]:
        """GET /sync_runs/{id}."""
        return {"status": "success", "data": self._run(request).reply()}

    async def cancel(self, request: Request) -> dict[str, Any]:
        """POST /sync_runs/{id}/cancel: the status of the reply is neither `success` nor `error`."""
        try:
            self.census.cancel(self._run(request).run_id)
        except RunEnded as exc:
            raise CensusError(400, "This sync run is not running") from exc
        return {"status": "cancelled", "data": {}}

    def _sync(self, request: Request) -> Sync:
        text = request.path_params["sync_id"]
        if not text.isdecimal() or int(text) not in self.census.syncs:
            raise CensusError(404, "Not found")
        return self.census.syncs[int(text)]

    def _run(self, request: Request) -> Run:
        text = request.path_params["run_id"]
        try:
            return self.census.run(int(text))
        except (KeyError, ValueError) as exc:
            raise CensusError(404, "Not found") from exc


def _page(request: Request, oldest_first: list[dict[str, Any]]) -> dict[str, Any]:
    """One page, newest first unless told; asked for more than a hundred, a hundred without a word."""
    page = max(1, _whole(request, "page", 1))
    per_page = min(max(1, _whole(request, "per_page", 25)), _MOST_PER_PAGE)
    rows = oldest_first if request.query_params.get("order") == "asc" else oldest_first[::-1]
    last = max(1, math.ceil(len(rows) / per_page))
    return {
        "status": "success",
        "data": rows[(page - 1) * per_page : page * per_page],
        "pagination": {
            "total_records": len(rows),
            "per_page": per_page,
            "prev_page": page - 1 if page > 1 else None,
            "page": page,
            "next_page": page + 1 if page < last else None,
            "last_page": last,
        },
    }


def _whole(request: Request, name: str, default: int) -> int:
    text = request.query_params.get(name, "")
    return int(text) if text.isdecimal() else default
