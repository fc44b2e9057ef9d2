"""Power BI's and Tableau's REST APIs over the state in `dashboards.py`: paths, replies and error bodies.

Power BI: https://learn.microsoft.com/power-bi/connect-data/asynchronous-refresh
Tableau: https://help.tableau.com/current/api/rest_api/en-us/REST/rest_api_ref_jobs_tasks_and_schedules.htm
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import parse_qs
from uuid import NAMESPACE_URL, uuid5

import orjson
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from sandbox import catalog
from sandbox.dashboards import Dashboard, Dashboards, Refresh, RefreshRunning
from sandbox.timeline import iso

POWER_BI = "/power_bi/v1.0/myorg"
POWER_BI_LOGIN = "/power_bi/login"
TABLEAU = "/tableau"
TABLEAU_VERSION = "3.24"
_SCOPE = "https://analysis.windows.net/powerbi/api/.default"
# Power BI: what the list calls `status`, and what only `extendedStatus` says.
_POWER_BI = {
    "queued": ("Unknown", "NotStarted"),
    "running": ("Unknown", "InProgress"),
    "succeeded": ("Completed", "Completed"),
    "failed": ("Failed", "Failed"),
    "cancelled": ("Cancelled", "Cancelled"),
}
_TABLEAU = {
    "queued": "Pending",
    "running": "InProgress",
    "succeeded": "Success",
    "failed": "Failed",
    "cancelled": "Cancelled",
}
_FINISH_CODES = {"succeeded": "0", "failed": "1", "cancelled": "2"}


class _Refused(Exception):
    def __init__(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        super().__init__(str(body))
        self.status, self.body, self.headers = status, body, headers or {}


Reply = tuple[int, Any, dict[str, str]]
Handler = Callable[[Request], Awaitable[Reply]]


class DashboardsApi:
    """The routes of both APIs."""

    def __init__(self, dashboards: Dashboards) -> None:
        self.dashboards = dashboards
        self._recent: deque[float] = deque()

    def routes(self) -> list[Route]:
        """All routes."""
        model = f"{POWER_BI}/groups/{{group}}/datasets/{{model}}"
        site = f"{TABLEAU}/api/{TABLEAU_VERSION}/sites/{{site}}"
        return [
            self._route(f"{POWER_BI_LOGIN}/{{tenant}}/oauth2/v2.0/token", self.token, "POST"),
            self._route(model, self.model, "GET"),
            self._route(f"{model}/refreshes", self.refreshes, "GET"),
            self._route(f"{model}/refreshes", self.refresh_model, "POST"),
            self._route(f"{model}/refreshes/{{refresh}}", self.refresh, "GET"),
            self._route(f"{model}/refreshes/{{refresh}}", self.cancel_refresh, "DELETE"),
            self._route(f"{TABLEAU}/api/{TABLEAU_VERSION}/auth/signin", self.sign_in, "POST"),
            self._route(f"{site}/workbooks/{{workbook}}", self.workbook, "GET"),
            self._route(f"{site}/workbooks/{{workbook}}/refresh", self.refresh_workbook, "POST"),
            self._route(f"{site}/jobs", self.jobs, "GET"),
            self._route(f"{site}/jobs/{{job}}", self.job, "GET"),
            self._route(f"{site}/jobs/{{job}}", self.cancel_job, "PUT"),
        ]

    def _route(self, path: str, handler: Handler, method: str) -> Route:
        async def endpoint(request: Request) -> Response:
            try:
                self._admit()
                status, body, headers = await handler(request)
            except _Refused as refused:
                status, body, headers = refused.status, refused.body, refused.headers
            content = b"" if body is None else orjson.dumps(body)
            return Response(content, status, headers, media_type="application/json" if content else None)

        return Route(path, endpoint, methods=[method])

    def _admit(self) -> None:
        limit, now = self.dashboards.settings.requests, time.monotonic()
        if limit is None:
            return
        while self._recent and self._recent[0] < now - 60:
            self._recent.popleft()
        if len(self._recent) >= limit:
            wait = str(int(60 - (now - self._recent[0])) + 1)
            raise _Refused(429, {"error": {"code": "RequestThrottled"}}, {"Retry-After": wait})
        self._recent.append(now)

    # -- Power BI --

    async def token(self, request: Request) -> Reply:
        """POST /{tenant}/oauth2/v2.0/token, as Microsoft Entra ID answers it."""
        form = {name: values[0] for name, values in parse_qs((await request.body()).decode()).items()}
        if request.path_params["tenant"] != catalog.POWER_BI_TENANT:
            raise _Refused(400, _entra("invalid_request", 90002, "Tenant was not found."))
        if form.get("grant_type") != "client_credentials":
            raise _Refused(400, _entra("unsupported_grant_type", 70003, "The grant type is not supported."))
        if form.get("client_id") != catalog.POWER_BI_CLIENT_ID:
            raise _Refused(400, _entra("unauthorized_client", 700016, "The application was not found."))
        if form.get("client_secret") != catalog.POWER_BI_CLIENT_SECRET:
            raise _Refused(401, _entra("invalid_client", 7000215, "Invalid client secret provided."))
        if form.get("scope") != _SCOPE:
            raise _Refused(400, _entra("invalid_scope", 70011, "The provided value for scope is not valid."))
        lifetime = int(self.dashboards.settings.token_seconds)
        token = self.dashboards.new_token()
        return 200, {"token_type": "Bearer", "expires_in": lifetime, "access_token": token}, {}

    def _model(self, request: Request) -> Dashboard:
        token = request.headers.get("authorization", "").removeprefix("Bearer ")
        if self.dashboards.tokens.get(token, 0.0) < time.monotonic():
            raise _Refused(401, None)
        try:
            board = self.dashboards.dashboard(request.path_params["model"])
        except KeyError:
            board = None
        if request.path_params["group"] != catalog.POWER_BI_GROUP or board is None:
            raise _Refused(404, {"error": {"code": "PowerBIEntityNotFound", "pbi.error": {}}})
        return board

    async def model(self, request: Request) -> Reply:
        """GET .../datasets/{id}."""
        board = self._model(request)
        spec = board.spec
        return 200, {"id": spec.dashboard_id, "name": spec.name, "isRefreshable": board.refreshable}, {}

    async def refresh_model(self, request: Request) -> Reply:
        """POST .../refreshes: the id is in the headers only, and the body is empty."""
        board = self._model(request)
        sent = orjson.loads(await request.body() or b"{}")
        if not set(sent) - {"notifyOption"} or "notifyOption" in sent:
            # Without a field of its own it would be a standard refresh, which can't be read or cancelled.
            raise _Refused(400, _power_bi("InvalidRequest", "Not an enhanced refresh"))
        try:
            refresh = self.dashboards.refresh(board.spec.dashboard_id)
        except RefreshRunning:
            conflict = self.dashboards.settings.conflict
            message = "Invalid dataset refresh request. Another refresh request is already executing"
            raise _Refused(conflict, _power_bi("InvalidRequest", message)) from None
        location = f"{str(request.url).rstrip('/')}/{refresh.refresh_id}"
        request_id = str(uuid5(NAMESPACE_URL, refresh.refresh_id))  # that of the request, not of the refresh
        return 202, None, {"Location": location, "x-ms-request-id": request_id}

    async def refreshes(self, request: Request) -> Reply:
        """GET .../refreshes: the newest first."""
        board = self._model(request)
        top = int(request.query_params.get("$top", "60"))
        shown = [r for r in reversed(board.refreshes) if r.hidden_until <= time.monotonic()]
        return 200, {"value": [_listed_refresh(refresh) for refresh in shown[:top]]}, {}

    async def refresh(self, request: Request) -> Reply:
        """GET .../refreshes/{id}: 202 while it is in progress."""
        refresh = self._refresh(request)
        detail = {key: value for key, value in _listed_refresh(refresh).items() if key != "requestId"}
        detail |= {"type": "Full", "numberOfAttempts": 0, "objects": []}
        word, _, final = refresh.at()
        if word == "failed":
            reason = refresh.work.error or "The credentials of the data source are not valid."
            detail["messages"] = [{"code": "0xC112001C", "message": reason, "type": "Error"}]
        return 200 if final else 202, detail, {}

    async def cancel_refresh(self, request: Request) -> Reply:
        """DELETE .../refreshes/{id}."""
        refresh = self._refresh(request)
        if refresh.at()[2]:
            raise _Refused(400, _power_bi("InvalidRequest", "The refresh is not in progress"))
        self.dashboards.finish(refresh, "cancelled")
        return 200, None, {}

    def _refresh(self, request: Request) -> Refresh:
        board, wanted = self._model(request), request.path_params["refresh"]
        found = next((refresh for refresh in board.refreshes if refresh.refresh_id == wanted), None)
        if found is None or found.hidden_until > time.monotonic():
            raise _Refused(404, {"error": {"code": "PowerBIEntityNotFound", "pbi.error": {}}})
        return found

    # -- Tableau --

    async def sign_in(self, request: Request) -> Reply:
        """POST /auth/signin with a personal access token: the session before it ends."""
        sent = orjson.loads(await request.body() or b"{}").get("credentials", {})
        if (sent.get("personalAccessTokenName"), sent.get("personalAccessTokenSecret")) != (
            catalog.TABLEAU_TOKEN_NAME,
            catalog.TABLEAU_TOKEN_SECRET,
        ) or sent.get("site", {}).get("contentUrl") != catalog.TABLEAU_SITE:
            raise _tableau(401, "401001", "Signin Error", "Error signing in to Tableau Server")
        credentials = {
            "site": {"id": catalog.TABLEAU_SITE_ID, "contentUrl": catalog.TABLEAU_SITE},
            "user": {"id": str(uuid5(NAMESPACE_URL, "sandbox-tableau-user"))},
            "token": self.dashboards.new_session(),
            "estimatedTimeToExpiration": "7:59:59",
        }
        return 200, {"credentials": credentials}, {}

    def _signed_in(self, request: Request) -> None:
        if request.headers.get("x-tableau-auth") != self.dashboards.session or not self.dashboards.session:
            raise _tableau(
                401, "401002", "Unauthorized Access", "Your authentication credentials are invalid."
            )
        if request.path_params["site"] != catalog.TABLEAU_SITE_ID:
            raise _tableau(404, "404000", "Resource Not Found", "Site could not be found.")

    def _workbook(self, request: Request) -> Dashboard:
        self._signed_in(request)
        try:
            return self.dashboards.dashboard(request.path_params["workbook"])
        except KeyError:
            raise _tableau(404, "404006", "Resource Not Found", "Workbook could not be found.") from None

    async def workbook(self, request: Request) -> Reply:
        """GET /sites/{id}/workbooks/{id}."""
        spec = self._workbook(request).spec
        page = f"{request.base_url}tableau/site/{catalog.TABLEAU_SITE}/workbooks/{spec.dashboard_id}"
        return 200, {"workbook": {"id": spec.dashboard_id, "name": spec.name, "webpageUrl": page}}, {}

    async def refresh_workbook(self, request: Request) -> Reply:
        """POST /sites/{id}/workbooks/{id}/refresh."""
        board = self._workbook(request)
        try:
            refresh = self.dashboards.refresh(board.spec.dashboard_id)
        except RefreshRunning:
            detail = f"Job for '{board.spec.name}' extract is already queued. Not queuing a duplicate."
            raise _tableau(409, "409093", "Resource Conflict", detail) from None
        created = iso(refresh.created_wall)
        job = {
            "id": refresh.refresh_id,
            "mode": "Asynchronous",
            "type": "RefreshExtract",
            "createdAt": created,
        }
        return 202, {"job": job}, {}

    async def jobs(self, request: Request) -> Reply:
        """GET /sites/{id}/jobs: other fields than those of one job."""
        self._signed_in(request)
        shown = [
            (board, refresh)
            for board in self.dashboards.dashboards.values()
            if board.spec.product == "tableau"
            for refresh in board.refreshes
            if refresh.hidden_until <= time.monotonic()
        ]
        shown.sort(key=lambda pair: pair[1].created_wall, reverse=True)
        size = int(request.query_params.get("pageSize", "100"))
        found = [
            {
                "id": refresh.refresh_id,
                "status": _TABLEAU.get(refresh.at()[0], refresh.at()[0]),
                "createdAt": iso(refresh.created_wall),
                "jobType": "refresh_extracts",
                "title": board.spec.name,
                **_times(refresh, "startedAt", "endedAt"),
            }
            for board, refresh in shown[:size]
        ]
        paging = {"pageNumber": "1", "pageSize": str(size), "totalAvailable": str(len(shown))}
        jobs = {"backgroundJob": found} if found else {}
        return 200, {"pagination": paging, "backgroundJobs": jobs}, {}

    async def job(self, request: Request) -> Reply:
        """GET /sites/{id}/jobs/{id}: there is no state, only times and a finish code."""
        board, refresh = self._job(request)
        job: dict[str, Any] = {
            "id": refresh.refresh_id,
            "mode": "Asynchronous",
            "type": "RefreshExtract",
            "createdAt": iso(refresh.created_wall),
            "extractRefreshJob": {"workbook": {"id": board.spec.dashboard_id, "name": board.spec.name}},
            **_times(refresh, "startedAt", "completedAt"),
        }
        word = refresh.at()[0]
        # Before the end the code says nothing; -1 is what stands there.
        job["finishCode"] = _FINISH_CODES.get(word, "-1")
        if word == "failed":
            job["extractRefreshJob"]["notes"] = refresh.work.error or "Unable to connect to the data source."
        return 200, {"job": job}, {}

    async def cancel_job(self, request: Request) -> Reply:
        """PUT /sites/{id}/jobs/{id}."""
        _, refresh = self._job(request)
        if refresh.at()[2]:
            raise _tableau(409, "409074", "Resource Conflict", "The job has already finished.")
        self.dashboards.finish(refresh, "cancelled")
        return 200, None, {}

    def _job(self, request: Request) -> tuple[Dashboard, Refresh]:
        self._signed_in(request)
        for board in self.dashboards.dashboards.values():
            for refresh in board.refreshes:
                if refresh.refresh_id == request.path_params["job"]:
                    return board, refresh
        raise _tableau(404, "404031", "Resource Not Found", "Job could not be found.")


def _listed_refresh(refresh: Refresh) -> dict[str, Any]:
    word = refresh.at()[0]
    status, extended = _POWER_BI.get(word, ("Unknown", word))
    ended = refresh.ended_wall
    listed = {
        "requestId": refresh.refresh_id,
        "refreshType": "ViaEnhancedApi",
        "startTime": iso(refresh.created_wall, millis=True),
        "status": status,
        "extendedStatus": extended,
    }
    if ended is not None:
        listed["endTime"] = iso(ended, millis=True)
    if word == "failed":
        listed["serviceExceptionJson"] = '{"errorCode":"ModelRefreshFailed_CredentialsNotSpecified"}'
    return listed


def _times(refresh: Refresh, started: str, ended: str) -> dict[str, str]:
    times = {started: refresh.started_wall, ended: refresh.ended_wall}
    return {name: iso(moment) for name, moment in times.items() if moment is not None}


def _power_bi(code: str, message: str) -> dict[str, Any]:
    return {"error": {"code": code, "message": message}}


def _entra(error: str, number: int, description: str) -> dict[str, Any]:
    return {"error": error, "error_description": f"AADSTS{number}: {description}", "error_codes": [number]}


def _tableau(status: int, code: str, summary: str, detail: str) -> _Refused:
    return _Refused(status, {"error": {"summary": summary, "detail": detail, "code": code}})
