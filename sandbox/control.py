"""The control API under `/_sandbox/`: change how the stage behaves and read back what happened, over HTTP."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from sandbox import control_replies as replies
from sandbox.airbyte_jobs import ConnectionChange, StartRefused
from sandbox.census import CensusChange
from sandbox.dashboards import DashboardChange
from sandbox.dbt_cloud import JobChange
from sandbox.faults import Fault
from sandbox.fivetran import FivetranChange
from sandbox.hightouch import SyncChange
from sandbox.requestlog import as_dict
from sandbox.slack import ChannelError
from sandbox.timeline import SequenceBehaviour
from sandbox.webhooks import Vendor

if TYPE_CHECKING:
    from sandbox.server import Sandbox

PREFIX = "/_sandbox"
_Model = TypeVar("_Model", bound=BaseModel)
_BEFORE_OUTAGE = 0.05  # seconds, so that the reply that announces an outage still gets out


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class _NewConnections(_Body):
    count: int = Field(ge=1, le=10_000)
    duration: float = Field(3.0, ge=0)
    rows: int = Field(1000, ge=0)
    prefix: str = Field("synthetic", pattern=r"^[a-z][a-z0-9_-]*$")


class _Outage(_Body):
    seconds: float = Field(gt=0, le=3600)


class _Webhooks(_Body):
    receiver: str | None = Field(None, description="Base URL of a receiver with blocks called `sandbox`.")
    urls: dict[Vendor, str] = Field(default_factory=dict, description="Or an address for each vendor.")


class _Finish(_Body):
    status: Literal["failed", "cancelled"]


class _Channel(_Body):
    error: ChannelError | None


class _Settings(_Body):
    airbyte: dict[str, Any] = Field(default_factory=dict)
    hightouch: dict[str, Any] = Field(default_factory=dict)
    census: dict[str, Any] = Field(default_factory=dict)
    dbt_cloud: dict[str, Any] = Field(default_factory=dict)
    fivetran: dict[str, Any] = Field(default_factory=dict)
    dashboards: dict[str, Any] = Field(default_factory=dict)
    slack: dict[str, Any] = Field(default_factory=dict)
    pagerduty: dict[str, Any] = Field(default_factory=dict)


class Control:
    """The routes of the control API."""

    def __init__(self, sandbox: Sandbox) -> None:
        self.sandbox = sandbox
        self._pending: set[asyncio.Task[None]] = set()

    def routes(self) -> list[Route]:
        """All routes."""
        return [
            _route("/", self.state, "GET"),
            _route("/state", self.state, "GET"),
            _route("/requests", self.get_requests, "GET"),
            _route("/requests", self.delete_requests, "DELETE"),
            _route("/faults", self.get_faults, "GET"),
            _route("/faults", self.add_fault, "POST"),
            _route("/faults", self.delete_faults, "DELETE"),
            _route("/faults/{fault_id:int}", self.delete_fault, "DELETE"),
            _route("/outage", self.outage, "POST"),
            _route("/webhooks", self.get_webhooks, "GET"),
            _route("/webhooks", self.put_webhooks, "PUT"),
            _route("/settings", self.get_settings, "GET"),
            _route("/settings", self.patch_settings, "PATCH"),
            _route("/tokens", self.revoke_tokens, "DELETE"),
            _route("/connections", self.get_connections, "GET"),
            _route("/connections", self.add_connections, "POST"),
            _route("/connections/{key}", self.patch_connection, "PATCH"),
            _route("/connections/{key}/jobs", self.start_job, "POST"),
            _route("/jobs", self.get_jobs, "GET"),
            _route("/jobs/{job_id:int}", self.finish_job, "PATCH"),
            _route("/syncs", self.get_syncs, "GET"),
            _route("/syncs/{key}", self.patch_sync, "PATCH"),
            _route("/runs", self.get_runs, "GET"),
            _route("/sequences", self.get_sequences, "GET"),
            _route("/sequences/{key}", self.patch_sequence, "PATCH"),
            _route("/census/syncs", self.get_census, "GET"),
            _route("/census/syncs/{key}", self.patch_census, "PATCH"),
            _route("/dbt/jobs", self.get_dbt_jobs, "GET"),
            _route("/dbt/jobs/{key}", self.patch_dbt_job, "PATCH"),
            _route("/dbt/runs", self.get_dbt_runs, "GET"),
            _route("/dashboards", self.get_dashboards, "GET"),
            _route("/dashboards/{key}", self.patch_dashboard, "PATCH"),
            _route("/fivetran/connections", self.get_fivetran, "GET"),
            _route("/fivetran/connections/{key}", self.patch_fivetran, "PATCH"),
            _route("/slack/messages", self.get_messages, "GET"),
            _route("/slack/messages", self.delete_messages, "DELETE"),
            _route("/slack/channels/{channel}", self.patch_channel, "PATCH"),
            _route("/pagerduty/alerts", self.get_alerts, "GET"),
            _route("/pagerduty/alerts", self.delete_alerts, "DELETE"),
        ]

    # -- what happened --

    async def state(self, request: Request) -> dict[str, Any]:
        """GET /state: the whole stage at a glance."""
        box = self.sandbox
        with box.airbyte.lock:
            jobs = list(box.airbyte.jobs.values())
        starts = dict.fromkeys((c.name for c in list(box.airbyte.connections.values())[:50]), 0)
        for job in jobs:
            if job.connection_name in starts:
                starts[job.connection_name] += 1
        return {
            "urls": {
                "airbyte": box.airbyte_url,
                "hightouch": box.hightouch_url,
                "census": box.census_url,
                "dbt_cloud": box.dbt_cloud_url,
                "fivetran": box.fivetran_url,
            },
            "warehouse": str(box.warehouse.path),
            "connections": len(box.airbyte.connections),
            "jobs": len(jobs),
            "running": sum(1 for job in jobs if not job.timeline.at()[2]),
            "starts": starts,
            "token_requests": box.airbyte.token_requests,
            "runs": {sync.spec.slug: len(sync.runs) for sync in box.hightouch.syncs.values()},
            "census_runs": {str(sync.spec.label): len(sync.runs) for sync in box.census.syncs.values()},
            "dbt_runs": len(box.dbt_cloud.runs),
            "fivetran_syncs": {c.schema: len(c.syncs) for c in list(box.fivetran.connections.values())[:50]},
            "messages": len(box.slack.messages),
            "alerts": len(box.pagerduty.open_of()),
            "requests": len(box.requests),
            "faults": box.faults.listing(),
        }

    async def get_requests(self, request: Request) -> dict[str, Any]:
        """GET /requests?vendor=&method=&path=&limit=: the request log, newest last."""
        query = request.query_params
        found = self.sandbox.requests.find(
            vendor=query.get("vendor"), method=query.get("method"), path=query.get("path")
        )
        limit = int(query.get("limit", "1000"))
        return {"total": len(found), "data": [as_dict(entry) for entry in found[-limit:]]}

    async def delete_requests(self, request: Request) -> dict[str, Any]:
        """DELETE /requests: forget the log."""
        self.sandbox.requests.clear()
        return {}

    async def get_jobs(self, request: Request) -> dict[str, Any]:
        """GET /jobs: every Airbyte job, oldest first, with the reason of a failed load."""
        with self.sandbox.airbyte.lock:
            jobs = list(self.sandbox.airbyte.jobs.values())
        shown = []
        for job in jobs:
            work = job.timeline.work
            shown.append(
                {**job.reply(), "connection": job.connection_name, "error": work.error if work else None}
            )
        return {"data": shown}

    async def get_runs(self, request: Request) -> dict[str, Any]:
        """GET /runs: every Hightouch run, by sync."""
        syncs = self.sandbox.hightouch.syncs.values()
        return {sync.spec.slug: [run.reply() for run in list(sync.runs)] for sync in syncs}

    async def get_dbt_runs(self, request: Request) -> dict[str, Any]:
        """GET /dbt/runs: every dbt Cloud run with its steps, by job."""
        box = self.sandbox.dbt_cloud
        return {
            job.name: [replies.dbt_run(run) for run in box.runs_of(job.job_id)] for job in box.jobs.values()
        }

    async def get_messages(self, request: Request) -> dict[str, Any]:
        """GET /slack/messages?channel=: what was posted, oldest first."""
        channel = request.query_params.get("channel")
        messages = list(self.sandbox.slack.messages)
        return {"data": [asdict(m) for m in messages if channel in (None, m.channel)]}

    async def delete_messages(self, request: Request) -> dict[str, Any]:
        """DELETE /slack/messages: forget them."""
        self.sandbox.slack.clear()
        return {}

    async def get_alerts(self, request: Request) -> dict[str, Any]:
        """GET /pagerduty/alerts: every alert with its events, oldest first, and what was dropped."""
        pagerduty = self.sandbox.pagerduty
        return {"data": [alert.reply() for alert in pagerduty.alerts], "dropped": pagerduty.dropped}

    async def delete_alerts(self, request: Request) -> dict[str, Any]:
        """DELETE /pagerduty/alerts: forget them."""
        self.sandbox.pagerduty.clear()
        return {}

    # -- what shall go wrong --

    async def get_faults(self, request: Request) -> dict[str, Any]:
        """GET /faults: the rules with their counters."""
        return {"data": self.sandbox.faults.listing()}

    async def add_fault(self, request: Request) -> dict[str, Any]:
        """POST /faults: switch a fault on."""
        return {"id": self.sandbox.faults.add(await _parsed(request, Fault))}

    async def delete_faults(self, request: Request) -> dict[str, Any]:
        """DELETE /faults: switch all off."""
        self.sandbox.faults.clear()
        return {}

    async def delete_fault(self, request: Request) -> dict[str, Any]:
        """DELETE /faults/{id}: switch one off."""
        if not self.sandbox.faults.remove(request.path_params["fault_id"]):
            raise KeyError(f"fault {request.path_params['fault_id']}")
        return {}

    async def start_job(self, request: Request) -> dict[str, Any]:
        """POST /connections/{key}/jobs: start a sync, as Airbyte's own scheduler would."""
        connection = self.sandbox.airbyte.connection(request.path_params["key"])
        try:
            job = self.sandbox.airbyte.start(connection.connection_id, "sync")
        except StartRefused as refused:
            raise ValueError(f"the connection is {refused.reason}") from None
        return {"jobId": job.job_id}

    async def get_webhooks(self, request: Request) -> dict[str, Any]:
        """GET /webhooks: to whom the vendors tell of ended jobs, and what became of it."""
        webhooks = self.sandbox.webhooks
        return {"urls": webhooks.urls, "deliveries": [asdict(one) for one in webhooks.deliveries]}

    async def put_webhooks(self, request: Request) -> dict[str, Any]:
        """PUT /webhooks: tell these of jobs that end from now on; an empty body: nobody."""
        body = await _parsed(request, _Webhooks)
        if body.receiver:
            self.sandbox.webhooks.to(body.receiver)
        else:
            self.sandbox.webhooks.set(body.urls)
        return await self.get_webhooks(request)

    async def outage(self, request: Request) -> dict[str, Any]:
        """POST /outage: from a moment after the reply on, connections are refused for some seconds."""
        seconds = (await _parsed(request, _Outage)).seconds

        async def later() -> None:
            await asyncio.sleep(_BEFORE_OUTAGE)
            await self.sandbox.begin_outage(seconds)

        task = asyncio.get_running_loop().create_task(later())
        self._pending.add(task)
        task.add_done_callback(self._pending.discard)
        return {"seconds": seconds}

    async def patch_channel(self, request: Request) -> dict[str, Any]:
        """PATCH /slack/channels/{channel}: answer every post with an error, or (null) heal it."""
        error = (await _parsed(request, _Channel)).error
        self.sandbox.slack.break_channel(request.path_params["channel"], error)
        return {"channel": request.path_params["channel"], "error": error}

    async def finish_job(self, request: Request) -> dict[str, Any]:
        """PATCH /jobs/{id}: end an Airbyte job now, failed or cancelled."""
        status = (await _parsed(request, _Finish)).status
        job_id = request.path_params["job_id"]
        self.sandbox.airbyte.finish_job(job_id, status)
        return self.sandbox.airbyte.jobs[job_id].reply()

    async def revoke_tokens(self, request: Request) -> dict[str, Any]:
        """DELETE /tokens: make all bearer tokens invalid."""
        self.sandbox.airbyte.revoke_tokens()
        return {}

    # -- how things behave --

    async def get_settings(self, request: Request) -> dict[str, Any]:
        """GET /settings: of the vendors' servers."""
        box = self.sandbox
        return {vendor: getattr(box, vendor).settings.model_dump() for vendor in _Settings.model_fields}

    async def patch_settings(self, request: Request) -> dict[str, Any]:
        """PATCH /settings: change some."""
        box = self.sandbox
        change = await _parsed(request, _Settings)
        # All are checked before one is changed.
        checked = {}
        for vendor, settings in change.model_dump(exclude_unset=True).items():
            now = getattr(box, vendor).settings
            checked[vendor] = type(now).model_validate(now.model_dump() | settings)
        for vendor, settings in checked.items():
            getattr(box, vendor).settings = settings
        return await self.get_settings(request)

    async def get_connections(self, request: Request) -> dict[str, Any]:
        """GET /connections: each with its behaviour."""
        return {"data": [replies.connection(c) for c in list(self.sandbox.airbyte.connections.values())]}

    async def add_connections(self, request: Request) -> dict[str, Any]:
        """POST /connections: add connections that load no data."""
        new = await _parsed(request, _NewConnections)
        ids = self.sandbox.airbyte.add_connections(
            new.count, duration=new.duration, rows=new.rows, prefix=new.prefix
        )
        return {"connectionIds": ids}

    async def patch_connection(self, request: Request) -> dict[str, Any]:
        """PATCH /connections/{id or name}: how its next jobs behave."""
        change = await _parsed(request, ConnectionChange)
        fields = change.model_dump(exclude_unset=True)
        return replies.connection(self.sandbox.airbyte.set(request.path_params["key"], **fields))

    async def get_syncs(self, request: Request) -> dict[str, Any]:
        """GET /syncs: each with its behaviour."""
        return {"data": [replies.sync(sync) for sync in self.sandbox.hightouch.syncs.values()]}

    async def patch_sync(self, request: Request) -> dict[str, Any]:
        """PATCH /syncs/{id or slug}: how its next runs behave."""
        change = await _parsed(request, SyncChange)
        fields = change.model_dump(exclude_unset=True)
        return replies.sync(self.sandbox.hightouch.set(request.path_params["key"], **fields))

    async def get_dashboards(self, request: Request) -> dict[str, Any]:
        """GET /dashboards: each with its behaviour and its refreshes."""
        return {"data": [replies.dashboard(board) for board in self.sandbox.dashboards.dashboards.values()]}

    async def patch_dashboard(self, request: Request) -> dict[str, Any]:
        """PATCH /dashboards/{id or name}: how its next refreshes behave."""
        change = await _parsed(request, DashboardChange)
        fields = change.model_dump(exclude_unset=True)
        return replies.dashboard(self.sandbox.dashboards.set(request.path_params["key"], **fields))

    async def get_sequences(self, request: Request) -> dict[str, Any]:
        """GET /sequences: Hightouch's, each with its behaviour and its runs."""
        return {
            "data": [replies.sequence(sequence) for sequence in self.sandbox.hightouch.sequences.all.values()]
        }

    async def patch_sequence(self, request: Request) -> dict[str, Any]:
        """PATCH /sequences/{id or name}: how its next runs behave."""
        change = await _parsed(request, SequenceBehaviour)
        fields = change.model_dump(exclude_unset=True)
        return replies.sequence(self.sandbox.hightouch.sequences.set(request.path_params["key"], **fields))

    async def get_census(self, request: Request) -> dict[str, Any]:
        """GET /census/syncs: each with its behaviour and its runs."""
        return {"data": [replies.census(sync) for sync in self.sandbox.census.syncs.values()]}

    async def patch_census(self, request: Request) -> dict[str, Any]:
        """PATCH /census/syncs/{id or label}: how its next runs behave, or whether it is paused."""
        change = await _parsed(request, CensusChange)
        fields = change.model_dump(exclude_unset=True)
        return replies.census(self.sandbox.census.set(request.path_params["key"], **fields))

    async def get_fivetran(self, request: Request) -> dict[str, Any]:
        """GET /fivetran/connections: each with its behaviour and its syncs, which Fivetran's API has not."""
        keys = list(self.sandbox.fivetran.connections)
        return {"data": [replies.fivetran(self.sandbox.fivetran.connection(key)) for key in keys]}

    async def patch_fivetran(self, request: Request) -> dict[str, Any]:
        """PATCH /fivetran/connections/{id or schema}: how its next syncs behave, or what it is."""
        change = await _parsed(request, FivetranChange)
        fields = change.model_dump(exclude_unset=True)
        return replies.fivetran(self.sandbox.fivetran.set(request.path_params["key"], **fields))

    async def get_dbt_jobs(self, request: Request) -> dict[str, Any]:
        """GET /dbt/jobs: each with its behaviour."""
        return {"data": [replies.dbt_job(job) for job in self.sandbox.dbt_cloud.jobs.values()]}

    async def patch_dbt_job(self, request: Request) -> dict[str, Any]:
        """PATCH /dbt/jobs/{id or name}: how its next runs behave."""
        change = await _parsed(request, JobChange)
        fields = change.model_dump(exclude_unset=True)
        return replies.dbt_job(self.sandbox.dbt_cloud.set(request.path_params["key"], **fields))


async def _parsed(request: Request, model: type[_Model]) -> _Model:
    return model.model_validate_json(await request.body() or b"{}")


def _route(path: str, handler: Callable[[Request], Awaitable[dict[str, Any]]], method: str) -> Route:
    async def endpoint(request: Request) -> Response:
        try:
            body, status = await handler(request), 200
        except ValidationError as exc:
            errors = [
                {"field": ".".join(str(part) for part in error["loc"]), "error": error["msg"]}
                for error in exc.errors(include_url=False, include_context=False)
            ]
            body, status = {"errors": errors}, 422
        except (ValueError, re.error) as exc:  # a query parameter that is no number, or no pattern
            body, status = {"errors": [{"field": "query", "error": str(exc)}]}, 422
        except KeyError as exc:
            body, status = {"errors": [{"field": "path", "error": f"There is no {exc.args[0]} here"}]}, 404
        return Response(orjson.dumps(body), status, media_type="application/json")

    return Route(PREFIX + path, endpoint, methods=[method])
