"""dbt Cloud's Administrative API v2 over the state in `dbt_cloud.py`: paths, filters, replies, errors."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any, TypeVar
from urllib.parse import parse_qsl

import orjson
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.types import Receive, Scope, Send

from sandbox import catalog
from sandbox.dbt_cloud import DbtCloud, Job, NotRetriable, Run
from sandbox.dbt_cloud import latest_artifact as latest_of_job
from sandbox.dbt_cloud_replies import job_reply, run_reply

PREFIX = "/api/v2/accounts/{account:int}"
_PAGE = 100
_OF_LIST = ("trigger", "job", "audit", "debug_logs")
_OF_RUN = (*_OF_LIST, "environment", "repository", "run_steps", "run_retries", "used_repo_cache")
_INTS = TypeAdapter(list[int])
_TIMES = TypeAdapter(list[datetime])
_L = TypeVar("_L")


class DbtCloudError(Exception):
    """An error reply of dbt Cloud's, raised by a handler."""

    def __init__(self, status: int, message: str, developer: str = "") -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.developer = developer


class _Trigger(BaseModel):
    """The body of POST /jobs/{id}/run/: what is not overridden is left out, null is refused."""

    model_config = ConfigDict(extra="forbid")

    cause: str = Field(min_length=1, max_length=255)
    git_sha: str = Field("", min_length=1)
    git_branch: str = Field("", min_length=1)
    azure_pull_request_id: int = 0
    github_pull_request_id: int = 0
    gitlab_merge_request_id: int = 0
    non_native_pull_request_id: int = 0
    schema_override: str = Field("", min_length=1)
    dbt_version_override: str = Field("", min_length=1)
    threads_override: int = 0
    target_name_override: str = Field("", min_length=1)
    generate_docs_override: bool = False
    timeout_seconds_override: int = 0
    steps_override: list[str] = Field(default_factory=list)


class DbtCloudApi:
    """The routes of the API."""

    def __init__(self, dbt_cloud: DbtCloud) -> None:
        self.dbt_cloud = dbt_cloud
        self._recent: deque[float] = deque()

    def routes(self) -> list[BaseRoute]:
        """All routes, and last what else may be asked for below them."""
        routes = [
            self._route("/jobs/", self.list_jobs, "GET"),
            self._route("/jobs/{job:int}/", self.get_job, "GET"),
            self._route("/jobs/{job:int}/run/", self.trigger, "POST"),
            self._route("/jobs/{job:int}/rerun/", self.rerun, "POST"),
            self._route("/jobs/{job:int}/artifacts/{path:path}", self.job_artifact, "GET"),
            self._route("/runs/", self.list_runs, "GET"),
            self._route("/runs/{run:int}/", self.get_run, "GET"),
            self._route("/runs/{run:int}/cancel/", self.cancel, "POST"),
            self._route("/runs/{run:int}/retry/", self.retry, "POST"),
            self._route("/runs/{run:int}/retry/", self.failure, "GET"),
            self._route("/runs/{run:int}/artifacts/", self.list_artifacts, "GET"),
            self._route("/runs/{run:int}/artifacts/{path:path}", self.artifact, "GET"),
        ]

        async def elsewhere(scope: Scope, receive: Receive, send: Send) -> None:
            """A path without its slash redirects (GET) or is not there (POST), as all else is not."""
            path: str = scope["path"]
            method: str = scope["method"]
            reply: Response = _reply(404, None, message="The requested resource was not found.")
            if any(route.path_regex.match(path) for route in routes):
                reply = _reply(405, None, message=f"Method {method} not allowed.")
            elif method == "GET" and any(route.path_regex.match(f"{path}/") for route in routes):
                reply = RedirectResponse(f"{path}/", 301)
            await reply(scope, receive, send)

        return [*routes, Mount("/api/v2", app=elsewhere)]

    def _route(self, path: str, handler: Callable[[Request], Awaitable[Any]], method: str) -> Route:
        async def endpoint(request: Request) -> Response:
            try:
                self._admit(request)
                found = await handler(request)
            except DbtCloudError as error:
                return _reply(error.status, None, message=error.message, developer=error.developer)
            if isinstance(found, Response):
                return found
            return _reply(200, *found) if isinstance(found, tuple) else _reply(200, found)

        return Route(PREFIX + path, endpoint, methods=[method])

    def _admit(self, request: Request) -> None:
        """Let a request in that has the token, is for our account and keeps to the rate limit."""
        kind, _, token = request.headers.get("authorization", "").partition(" ")
        if kind not in ("Token", "Bearer") or token != catalog.DBT_CLOUD_TOKEN:
            raise DbtCloudError(401, "Invalid token.", "Authentication credentials were not provided.")
        if request.path_params["account"] != catalog.DBT_CLOUD_ACCOUNT_ID:
            raise DbtCloudError(403, "You do not have permission to perform this action.")
        limit = self.dbt_cloud.settings.requests_per_minute
        if limit is None:
            return
        now = time.monotonic()
        while self._recent and self._recent[0] < now - 60:
            self._recent.popleft()
        if len(self._recent) >= limit:
            raise DbtCloudError(429, "Too many requests")
        self._recent.append(now)

    # -- jobs --

    async def list_jobs(self, request: Request) -> Any:
        """GET /jobs/: the active ones, unless told."""
        query = request.query_params
        state = query.get("state", "active")
        name = query.get("name__icontains", "").lower()
        found = [
            job
            for job in self.dbt_cloud.jobs.values()
            if (state == "all" or job.deleted == (state in ("deleted", "2"))) and name in job.name.lower()
        ]
        return _page(request, [job_reply(job) for job in found])

    async def get_job(self, request: Request) -> Any:
        """GET /jobs/{id}/."""
        job = self._job(request)
        reply = job_reply(job)
        if "most_recent_run" in _related(request, ("most_recent_run", "most_recent_completed_run")):
            runs = [run for run in self.dbt_cloud.runs_of(job.job_id) if run.visible]
            reply |= {"most_recent_run": run_reply(runs[-1], request)} if runs else {}
        return reply

    async def trigger(self, request: Request) -> Any:
        """POST /jobs/{id}/run/: every request makes a run; there is no idempotency key."""
        job = self._job(request)
        sent = await _trigger_body(request)
        overrides = sent.model_dump(exclude_unset=True, exclude={"cause"})
        return run_reply(
            self.dbt_cloud.trigger(job.job_id, sent.cause, **overrides), request, related=("trigger",)
        )

    async def rerun(self, request: Request) -> Any:
        """POST /jobs/{id}/rerun/: the latest run from its failure, or a new run."""
        job = self._job(request)
        runs = self.dbt_cloud.runs_of(job.job_id)
        if runs and runs[-1].why_no_retry() is None:
            return run_reply(self.dbt_cloud.retry(runs[-1]), request)
        return run_reply(self.dbt_cloud.trigger(job.job_id, "Rerun of the job"), request)

    async def job_artifact(self, request: Request) -> Response:
        """GET /jobs/{id}/artifacts/{path}: of the latest run that left it."""
        job, path = self._job(request), request.path_params["path"]
        self.dbt_cloud.runs_of(job.job_id)
        content = latest_of_job(job, path)
        if content is None:
            raise DbtCloudError(404, "The requested artifact was not found.", f"{path} does not exist")
        return Response(content, media_type="application/json")

    # -- runs --

    async def list_runs(self, request: Request) -> Any:
        """GET /runs/: filtered, ordered by id ascending unless told, a hundred at most."""
        wanted = self._filter(request)
        found = [run for run in self.dbt_cloud.all_runs() if run.visible and wanted(run)]
        order = request.query_params.get("order_by", "id")
        keys: dict[str, Callable[[Run], float]] = {
            "id": lambda run: run.run_id,
            "created_at": lambda run: run.created,
            "finished_at": lambda run: run.ended or float("inf"),
        }
        if order.removeprefix("-") not in keys:
            raise _invalid("order_by", f"{order} is not one of id, created_at, finished_at")
        found.sort(key=keys[order.removeprefix("-")], reverse=order.startswith("-"))
        related = _related(request, _OF_LIST)
        return _page(request, found, lambda run: run_reply(run, request, related=related))

    def _filter(self, request: Request) -> Callable[[Run], bool]:
        pk_in = self.dbt_cloud.settings.pk_in
        if pk_in == "refused" and "pk__in" in request.query_params:
            raise _invalid("pk__in", "unknown filter")
        pks = None if pk_in == "ignored" else _list(request, "pk__in", _INTS)
        statuses, projects = _list(request, "status__in", _INTS), _list(request, "project_id__in", _INTS)
        created, finished = (
            _list(request, "created_at__range", _TIMES),
            _list(request, "finished_at__range", _TIMES),
        )
        job, status, pk = _int(request, "job_definition_id"), _int(request, "status"), _int(request, "pk")
        after = _int(request, "id__gt")
        project, environment = _int(request, "project_id"), _int(request, "environment_id")
        ours = (
            project in (None, catalog.DBT_CLOUD_PROJECT_ID)
            and (projects is None or catalog.DBT_CLOUD_PROJECT_ID in projects)
            and environment in (None, catalog.DBT_CLOUD_ENVIRONMENT_ID)
        )
        return lambda run: (
            ours
            and job in (None, run.job.job_id)
            and pk in (None, run.run_id)
            and (after is None or run.run_id > after)
            and (pks is None or run.run_id in pks)
            and (status is None or run.status == status)
            and (statuses is None or run.status in statuses)
            and _within(created, run.created_wall)
            and _within(finished, None if run.ended is None else run.wall(run.ended))
        )

    async def get_run(self, request: Request) -> Any:
        """GET /runs/{id}/: 404 too while it is not visible yet."""
        return run_reply(self._run(request), request, related=_related(request, _OF_RUN))

    async def cancel(self, request: Request) -> Any:
        """POST /runs/{id}/cancel/."""
        run = self._run(request)
        stopped = self.dbt_cloud.cancel(run)
        if not stopped and self.dbt_cloud.settings.cancel_finished == "refused":
            raise DbtCloudError(400, "The run could not be cancelled.", "The run has already finished")
        return run_reply(run, request)

    async def failure(self, request: Request) -> Any:
        """GET /runs/{id}/retry/: where it broke and what was not run for it."""
        run = self._run(request)
        step = run.failed_step
        if not run.final or step is None:
            raise DbtCloudError(400, "This run can't be retried.", "RETRY_NOT_FAILED_RUN")
        later = [one.command for one in run.steps[step.index :] if one.command]
        return {"failed_step": step.command or step.name, "skipped_steps": later}

    async def retry(self, request: Request) -> Any:
        """POST /runs/{id}/retry/: from the failure; there is no body, so no override and no cause."""
        try:
            return run_reply(self.dbt_cloud.retry(self._run(request)), request)
        except NotRetriable as refused:
            raise DbtCloudError(400, "This run can't be retried.", str(refused)) from refused

    async def list_artifacts(self, request: Request) -> Any:
        """GET /runs/{id}/artifacts/."""
        return sorted(self._run(request).artifacts(_int(request, "step")))

    async def artifact(self, request: Request) -> Response:
        """GET /runs/{id}/artifacts/{path}?step=: the file itself, in no envelope."""
        path = request.path_params["path"]
        content = self._run(request).artifacts(_int(request, "step")).get(path)
        if content is None:
            raise DbtCloudError(404, "The requested artifact was not found.", f"{path} does not exist")
        return Response(content, media_type="application/json")

    def _job(self, request: Request) -> Job:
        job = self.dbt_cloud.jobs.get(request.path_params["job"])
        if job is None or (job.deleted and request.method == "POST"):
            raise DbtCloudError(
                404, "The requested resource was not found.", "No Job matches the given query."
            )
        return job

    def _run(self, request: Request) -> Run:
        try:
            run = self.dbt_cloud.run(request.path_params["run"])
        except KeyError:
            run = None
        if run is None or not run.visible:
            raise DbtCloudError(
                404, "The requested resource was not found.", "No Run matches the given query."
            )
        return run


def _reply(
    status: int, data: Any, extra: Any = None, *, message: str = "Success!", developer: str = ""
) -> Response:
    envelope = {
        "status": {
            "code": status,
            "is_success": status < 400,
            "user_message": message,
            "developer_message": developer,
        },
        "data": data,
    }
    if extra is not None:
        envelope["extra"] = extra
    return Response(orjson.dumps(envelope), status, media_type="application/json")


def _page(
    request: Request, found: list[_L], show: Callable[[_L], Any] = lambda item: item
) -> tuple[Any, Any]:
    limit, offset = _int(request, "limit"), _int(request, "offset") or 0
    limit = _PAGE if limit is None else min(limit, _PAGE)
    shown = [show(item) for item in found[offset : offset + limit]]
    extra = {
        "filters": {"limit": limit, "offset": offset, "account_id": catalog.DBT_CLOUD_ACCOUNT_ID},
        "order_by": request.query_params.get("order_by", "id"),
        "pagination": {"count": len(shown), "total_count": len(found)},
    }
    return shown, extra


async def _trigger_body(request: Request) -> _Trigger:
    body = await request.body()
    try:
        if "urlencoded" in request.headers.get("content-type", ""):
            pairs = parse_qsl(body.decode())
            sent: Any = dict(pairs)
            if steps := [value for key, value in pairs if key == "steps_override"]:
                sent["steps_override"] = steps
        else:
            sent = orjson.loads(body)
        return _Trigger.model_validate(sent)
    except orjson.JSONDecodeError as exc:
        raise DbtCloudError(400, "The request was invalid.", "JSON parse error") from exc
    except ValidationError as exc:
        first = exc.errors(include_url=False, include_context=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise _invalid(where, first["msg"]) from exc


def _invalid(name: str, message: str) -> DbtCloudError:
    return DbtCloudError(
        400,
        "The request was invalid. Please double check the provided data and try again.",
        f"{name}: {message}",
    )


def _int(request: Request, name: str) -> int | None:
    text = request.query_params.get(name)
    if text is None:
        return None
    if not text.isdecimal():
        raise _invalid(name, f"{text} is not a number")
    return int(text)


def _list(request: Request, name: str, kind: TypeAdapter[list[_L]]) -> list[_L] | None:
    """A list in the query: bracketed JSON text and nothing else."""
    text = request.query_params.get(name)
    if text is None:
        return None
    try:
        return kind.validate_json(text)
    except ValidationError as exc:
        raise _invalid(name, f"{text} is not a list in brackets") from exc


def _within(between: list[datetime] | None, epoch: float | None) -> bool:
    if between is None:
        return True
    first, last = (moment if moment.tzinfo else moment.replace(tzinfo=UTC) for moment in between)
    return epoch is not None and first.timestamp() <= epoch <= last.timestamp()


def _related(request: Request, allowed: tuple[str, ...]) -> tuple[str, ...]:
    """The related objects that are asked for: joined by commas or as repeated keys."""
    texts = request.query_params.getlist("include_related")
    asked = tuple(part.strip() for text in texts for part in text.split(",") if part.strip())
    if strange := [part for part in asked if part not in allowed]:
        raise _invalid("include_related", f"{strange[0]} is not one of {', '.join(allowed)}")
    return asked
