"""A few web pages, so that a job's link leads to something: the guide, a connection's jobs, a sync's runs."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from sandbox.guide import guide
from sandbox.timeline import iso

if TYPE_CHECKING:
    from sandbox.server import Sandbox

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; color: #222 }
table { border-collapse: collapse; width: 100% } th, td { text-align: left; padding: .3rem .8rem .3rem 0 }
th { border-bottom: 1px solid #999 } tr.this { background: #fff3c4 } pre { font-size: 13px; overflow-x: auto }
"""


class Pages:
    """The routes of the pages, at the addresses that the vendors' own apps use."""

    def __init__(self, sandbox: Sandbox) -> None:
        self.sandbox = sandbox

    def routes(self) -> list[Route]:
        """All routes."""
        return [
            Route("/", self.home),
            Route("/workspaces/{workspace}/connections/{connection}", self.connection),
            Route("/workspaces/{workspace}/connections/{connection}/{rest:path}", self.connection),
            Route("/slack", self.slack),
            Route("/pagerduty", self.pagerduty),
            Route("/hightouch/{workspace}/syncs/{sync}", self.sync),
            Route("/hightouch/{workspace}/syncs/{sync}/runs/{run}", self.sync),
            Route("/power_bi/app/groups/{group}/settings/datasets/{board}", self.dashboard),
            Route("/tableau/site/{site}/workbooks/{board}", self.dashboard),
            Route("/hightouch/sequences/{sequence}", self.sequence),
            Route("/census/workspaces/{workspace}/syncs/{sync}/sync-history", self.census),
            Route("/fivetran/dashboard/connectors/{connection}/status", self.fivetran),
            Route("/deploy/{account}/projects/{project}/runs/{run:int}/", self.dbt_run),
        ]

    async def home(self, request: Request) -> Response:
        """The guide; as plain text for curl, as a page for a browser."""
        text = guide(self.sandbox)
        if "text/html" not in request.headers.get("accept", ""):
            return Response(text, media_type="text/plain")
        return _page("Sandbox", f"<pre>{escape(text)}</pre>")

    async def connection(self, request: Request) -> Response:
        """A connection and its jobs, newest first; `jobId` in the query is marked."""
        key = request.path_params["connection"]
        try:
            connection, jobs = self.sandbox.airbyte.connection(key), self.sandbox.airbyte.jobs_of(key)
        except KeyError:
            return _page("Not found", "<p>There is no such connection.</p>", 404)
        rows = []
        for job in reversed(jobs):
            reply = job.reply()
            rows.append(
                [job.job_id, job.job_type, reply["status"], reply["startTime"], reply.get("rowsSynced", "")]
            )
        table = _table(["job", "type", "status", "started", "rows"], rows, request.query_params.get("jobId"))
        return _page(f"Airbyte connection {connection.name}", f"<p>Status: {connection.status}</p>{table}")

    async def sync(self, request: Request) -> Response:
        """A sync and its runs, newest first; the run in the path is marked."""
        try:
            sync = self.sandbox.hightouch.sync(request.path_params["sync"])
        except KeyError:
            return _page("Not found", "<p>There is no such sync.</p>", 404)
        rows = [
            [
                run.run_id,
                run.status,
                iso(run.created_wall),
                run.reply()["querySize"],
                run.reply()["error"] or "",
            ]
            for run in reversed(list(sync.runs))
        ]
        table = _table(["run", "status", "created", "rows", "error"], rows, request.path_params.get("run"))
        return _page(f"Hightouch sync {sync.spec.slug}", f"<p>Model: {sync.spec.table}</p>{table}")

    async def dashboard(self, request: Request) -> Response:
        """A semantic model or workbook and its refreshes, newest first."""
        try:
            board = self.sandbox.dashboards.dashboard(request.path_params["board"])
        except KeyError:
            return _page("Not found", "<p>There is no such dashboard.</p>", 404)
        rows: list[list[object]] = [
            [refresh.refresh_id, refresh.at()[0], iso(refresh.created_wall), refresh.work.rows]
            for refresh in reversed(list(board.refreshes))
        ]
        table = _table(["refresh", "state", "created", "rows"], rows, None)
        return _page(f"{board.spec.product} {board.spec.name}", f"<p>Shows {board.spec.table}</p>{table}")

    async def sequence(self, request: Request) -> Response:
        """A Hightouch sequence and its runs, newest first."""
        try:
            sequence = self.sandbox.hightouch.sequences.sequence(request.path_params["sequence"])
        except KeyError:
            return _page("Not found", "<p>There is no such sequence.</p>", 404)
        rows: list[list[object]] = [
            [run.run_id, run.word, ", ".join(f"{member.sync_id} {member.status}" for member in run.members)]
            for run in reversed(list(sequence.runs))
        ]
        table = _table(["run", "status", "syncs"], rows, None)
        return _page(f"Hightouch sequence {sequence.spec.name}", table)

    async def census(self, request: Request) -> Response:
        """A Census sync and its runs, newest first."""
        try:
            sync = self.sandbox.census.sync(request.path_params["sync"])
        except KeyError:
            return _page("Not found", "<p>There is no such sync.</p>", 404)
        rows: list[list[object]] = [
            [
                reply["id"],
                reply["status"],
                reply["created_at"],
                reply["records_updated"],
                reply["error_detail"],
            ]
            for reply in (run.reply() for run in reversed(list(sync.runs)))
        ]
        table = _table(["run", "status", "created", "records", "error"], rows, None)
        return _page(f"Census sync {sync.spec.label}", f"<p>Source: {sync.spec.table}</p>{table}")

    async def fivetran(self, request: Request) -> Response:
        """A Fivetran connection and its syncs, newest first."""
        try:
            connection = self.sandbox.fivetran.connection(request.path_params["connection"])
        except KeyError:
            return _page("Not found", "<p>There is no such connection.</p>", 404)
        rows: list[list[object]] = [
            [sync.sync_id, sync.started_by, sync.word, iso(sync.timeline.started_wall)]
            for sync in reversed(list(connection.syncs))
        ]
        status = "paused" if connection.paused else connection.setup_state
        table = _table(["sync", "started by", "state", "started"], rows, None)
        return _page(f"Fivetran connection {connection.schema}", f"<p>Status: {status}</p>{table}")

    async def dbt_run(self, request: Request) -> Response:
        """A dbt Cloud run: its steps with what they printed."""
        try:
            run = self.sandbox.dbt_cloud.run(request.path_params["run"])
        except KeyError:
            return _page("Not found", "<p>There is no such run.</p>", 404)
        steps = "".join(
            f"<h2>{escape(step.name)}</h2><pre>{escape(step.logs)}</pre>" for step in run.steps if run.final
        )
        about = f"<p>Status: {run.status}. Cause: {escape(run.cause)}</p>"
        return _page(f"dbt Cloud run {run.run_id} of {run.job.name}", about + steps)

    async def slack(self, request: Request) -> Response:
        """What was posted, newest first, replies with the time of what they answer."""
        rows: list[list[object]] = [
            [iso(message.time), message.channel, message.thread_ts or "", message.full_text]
            for message in reversed(list(self.sandbox.slack.messages))
        ]
        return _page("Slack", _table(["posted", "channel", "in thread", "text"], rows, None))

    async def pagerduty(self, request: Request) -> Response:
        """The alerts, newest first."""
        rows: list[list[object]] = [
            [iso(a.opened), a.service, a.state, a.severity, len(a.triggers), a.dedup_key, a.summary]
            for a in reversed(list(self.sandbox.pagerduty.alerts))
        ]
        heads = ["opened", "service", "state", "severity", "triggers", "dedup key", "summary"]
        return _page("PagerDuty", _table(heads, rows, None))


def _table(heads: list[str], rows: list[list[object]], marked: str | None) -> str:
    def cells(tag: str, values: list[str] | list[object]) -> str:
        return "".join(f"<{tag}>{escape(str(value))}</{tag}>" for value in values)

    lines = [
        f"<tr{' class=this' if marked is not None and str(row[0]) == marked else ''}>{cells('td', row)}</tr>"
        for row in rows
    ]
    return f"<table><tr>{cells('th', heads)}</tr>{''.join(lines)}</table>"


def _page(title: str, body: str, status: int = 200) -> HTMLResponse:
    heading = escape(title)
    return HTMLResponse(
        f"<!doctype html><html><head><meta charset=utf-8><title>{heading}</title>"
        f"<style>{_STYLE}</style></head>"
        f"<body><h1>{heading}</h1>{body}</body></html>",
        status,
    )
