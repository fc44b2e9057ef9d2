"""The sandbox as a running server: all vendors' APIs on one loopback port, in a thread of this process."""

from __future__ import annotations

import asyncio
import socket
import ssl
import threading
import time
from email.utils import formatdate
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from sandbox import (
    airbyte_api,
    airbyte_config_api,
    catalog,
    census_api,
    control,
    dashboards_api,
    dbt_cloud_api,
    fivetran_api,
    hightouch_api,
    pagerduty,
    pages,
    slack_chat,
)
from sandbox.airbyte import Airbyte
from sandbox.airbyte_door import Door
from sandbox.census import Census
from sandbox.dashboards import Dashboards
from sandbox.dbt_cloud import DbtCloud
from sandbox.faults import FaultBook
from sandbox.fivetran import Fivetran
from sandbox.front import Front
from sandbox.hightouch import Hightouch
from sandbox.pagerduty import PagerDuty
from sandbox.requestlog import RequestLog
from sandbox.slack import Slack
from sandbox.warehouse import Warehouse
from sandbox.webhooks import Webhooks

HOST = "127.0.0.1"
_STARTED_WITHIN = 10.0
_JOBS_PER_START = 100_000


class _Protocol(H11Protocol):
    """uvicorn's HTTP/1.1 with the connection handed to the application, so that a fault can really cut it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.access_log = False  # the request log takes its place

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.app_state = {**self.app_state, "transport": transport}


class Sandbox:
    """The whole stage behind one port; a context manager that starts and stops it.

    Args:
        state_dir: where unzipped sources, and the warehouse if no path is given, are kept.
        port: the port on 127.0.0.1; 0 takes a free one.
        warehouse: the DuckDB file that connections load and activations read.
        job_seconds: how long jobs take at least, until changed per connection or sync.
        tls: serve https with its certificate, for clients that know nothing else.

    Raises:
        OSError: on start, when the port is taken.
    """

    def __init__(
        self,
        state_dir: Path,
        port: int = 0,
        warehouse: Path | None = None,
        *,
        job_seconds: float = 3.0,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.state_dir = Path(state_dir).absolute()
        self.port = port
        self._tls = tls
        self.warehouse = Warehouse(
            (warehouse or self.state_dir / "warehouse.duckdb").absolute(), self.state_dir
        )
        self.airbyte = Airbyte(self.warehouse, job_seconds)
        self.hightouch = Hightouch(self.warehouse, job_seconds)
        self.dbt_cloud = DbtCloud(self.warehouse, job_seconds)
        self.fivetran = Fivetran(self.warehouse, job_seconds)
        self.dashboards = Dashboards(self.warehouse, job_seconds)
        self.census = Census(self.warehouse, job_seconds)
        self.slack = Slack()
        self.pagerduty = PagerDuty()
        self.webhooks = Webhooks(self.airbyte, self.fivetran, self.dbt_cloud, self.census)
        self.requests = RequestLog()
        self.faults = FaultBook()
        self._state = ServerState()
        self._config = uvicorn.Config(
            Front(self._app(), self.requests, self.faults),
            interface="asgi3",
            http=_Protocol,
            ws="none",
            lifespan="off",
            proxy_headers=False,
            log_config=None,
            timeout_keep_alive=75,
        )
        self._listener: asyncio.Server | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopping: asyncio.Event | None = None
        self._thread: threading.Thread | None = None
        self._started = threading.Event()

    def _app(self) -> Starlette:
        door = Door(self.airbyte)
        return Starlette(
            routes=[
                *airbyte_api.AirbyteApi(door).routes(),
                *airbyte_config_api.AirbyteConfigApi(door).routes(),
                *hightouch_api.HightouchApi(self.hightouch).routes(),
                *dbt_cloud_api.DbtCloudApi(self.dbt_cloud).routes(),
                *fivetran_api.FivetranApi(self.fivetran).routes(),
                *dashboards_api.DashboardsApi(self.dashboards).routes(),
                *census_api.CensusApi(self.census).routes(),
                *self.slack.routes(),
                *slack_chat.SlackChat(self.slack).routes(),
                *self.pagerduty.routes(),
                *control.Control(self).routes(),
                *pages.Pages(self).routes(),
            ]
        )

    # -- addresses --

    @property
    def url(self) -> str:
        """The server's address, without a slash at the end."""
        return f"{'https' if self._tls else 'http'}://{HOST}:{self.port}"

    @property
    def airbyte_url(self) -> str:
        """The base URL of Airbyte's Public API."""
        return f"{self.url}{airbyte_api.PREFIX}"

    @property
    def airbyte_config_url(self) -> str:
        """The base URL of Airbyte's Config API."""
        return f"{self.url}{airbyte_config_api.PREFIX}"

    @property
    def hightouch_url(self) -> str:
        """The base URL of Hightouch's API."""
        return f"{self.url}{hightouch_api.PREFIX}"

    @property
    def census_url(self) -> str:
        """The base URL of Census's API."""
        return f"{self.url}{census_api.PREFIX}"

    @property
    def dbt_cloud_url(self) -> str:
        """What a block for the sandbox's dbt Cloud takes as its domain; a real one has no scheme."""
        return self.url

    @property
    def fivetran_url(self) -> str:
        """The base URL of Fivetran's API; the version is part of its paths."""
        return f"{self.url}{fivetran_api.PREFIX.removesuffix('/v1')}"

    @property
    def power_bi_url(self) -> str:
        """The base URL of Power BI's API."""
        return f"{self.url}{dashboards_api.POWER_BI}"

    @property
    def power_bi_login_url(self) -> str:
        """Where Power BI's tokens are."""
        return f"{self.url}{dashboards_api.POWER_BI_LOGIN}"

    @property
    def tableau_url(self) -> str:
        """The address of the Tableau server."""
        return f"{self.url}{dashboards_api.TABLEAU}"

    def slack_url(self, channel: str = catalog.DEFAULT_CHANNEL) -> str:
        """The incoming webhook of a channel.

        Raises:
            KeyError: no such channel.
        """
        webhook, secret = catalog.WEBHOOKS[channel]
        return f"{self.url}/services/{catalog.SLACK_TEAM}/{webhook}/{secret}"

    @property
    def slack_api_url(self) -> str:
        """The base URL of Slack's Web API."""
        return f"{self.url}{slack_chat.PREFIX}/"

    @property
    def pagerduty_url(self) -> str:
        """The base URL of PagerDuty's Events API."""
        return f"{self.url}{pagerduty.PREFIX}"

    # -- life --

    def start(self) -> Self:
        """Bind the port and serve from a daemon thread.

        Raises:
            OSError: the port is taken.
        """
        self.state_dir.mkdir(parents=True, exist_ok=True)
        listening = self._bind()
        self._number_on()
        self._thread = threading.Thread(target=self._run, args=(listening,), name="sandbox", daemon=True)
        self._thread.start()
        if not self._started.wait(_STARTED_WITHIN):
            raise RuntimeError("The sandbox's thread did not come up")
        return self

    def _number_on(self) -> None:
        """Give no job the id of one from before a restart: its events would be taken for repeats."""
        file = self.state_dir / "starts"
        starts = int(file.read_text()) if file.exists() else 0
        file.write_text(str(starts + 1))
        skipped = starts * _JOBS_PER_START
        self.airbyte.next_job += skipped
        for tool in (self.hightouch, self.census, self.dbt_cloud):
            tool.next_run += skipped

    def stop(self) -> None:
        """Stop serving; connections are cut, jobs that still run are forgotten, nothing is waited for."""
        if self._thread is None or self._loop is None or self._stopping is None:
            return
        self._loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join()
        self._thread = None
        self.airbyte.stop()
        self.hightouch.stop()
        self.census.stop()
        self.dbt_cloud.stop()
        self.fivetran.stop()
        self.dashboards.stop()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    # -- outages --

    def pause(self) -> None:
        """Close the port and all connections: from now on a connect is refused."""
        self._in_loop(self._close())

    def resume(self) -> None:
        """Open the port again after `pause`.

        Raises:
            OSError: another program took the port meanwhile.
        """
        self._in_loop(self._open(self._bind()))

    def outage(self, seconds: float) -> None:
        """Refuse connections for some seconds, beginning now; returns at once."""
        self._in_loop(self.begin_outage(seconds))

    async def begin_outage(self, seconds: float) -> None:
        """`outage`, for code that runs in the server's own loop."""
        await self._close()
        loop = asyncio.get_running_loop()
        loop.call_later(seconds, lambda: loop.create_task(self._open(self._bind())))

    def _in_loop(self, coroutine: Any) -> None:
        if self._loop is None:
            coroutine.close()
            raise RuntimeError("The sandbox is not running")
        asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(_STARTED_WITHIN)

    # -- inside the thread --

    def _bind(self) -> socket.socket:
        # The protocol is named because asyncio sets TCP_NODELAY only then; without, each reply takes 40 ms.
        listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        try:
            # Without it a port that was just closed stays taken while old connections fade.
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind((HOST, self.port))
        except OSError:
            listening.close()
            raise
        self.port = listening.getsockname()[1]
        return listening

    def _run(self, listening: socket.socket) -> None:
        # Not asyncio.run(): it would wait for the default executor's threads at the end.
        with asyncio.Runner() as runner:
            runner.run(self._serve(listening))

    async def _serve(self, listening: socket.socket) -> None:
        self._loop = asyncio.get_running_loop()
        self._stopping = asyncio.Event()
        beside = [asyncio.create_task(work) for work in (self._tick(), self.webhooks.run())]
        await self._open(listening)
        self._started.set()
        await self._stopping.wait()
        for task in beside:
            task.cancel()
        await self._close()
        for task in list(self._state.tasks):
            task.cancel()
        await asyncio.gather(*beside, *self._state.tasks, return_exceptions=True)
        self._loop = None
        self._started.clear()

    async def _tick(self) -> None:
        """Keep the Date header right, as uvicorn's own main loop does."""
        while True:
            date = formatdate(time.time(), usegmt=True).encode()
            self._state.default_headers = [(b"date", date), (b"server", b"uvicorn")]
            await asyncio.sleep(1)

    async def _open(self, listening: socket.socket) -> None:
        if self._listener is not None:
            listening.close()
            return
        loop = asyncio.get_running_loop()
        self._listener = await loop.create_server(self._protocol, sock=listening, ssl=self._tls, backlog=2048)

    def _protocol(self) -> _Protocol:
        return _Protocol(config=self._config, server_state=self._state, app_state={}, _loop=self._loop)

    async def _close(self) -> None:
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        for connection in list(self._state.connections):
            cast("_Protocol", connection).transport.abort()
        # Two turns of the loop, so that every connection has learnt of its end.
        await asyncio.sleep(0)
        await asyncio.sleep(0)
