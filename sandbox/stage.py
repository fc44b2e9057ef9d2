"""The stage for the demo: a real Prefect server and the sandbox, on loopback, with the blocks that they need.

Nothing here imports prefect before the server's address is known: prefect reads its settings once.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx

from sandbox import catalog
from sandbox.server import HOST, Sandbox

PREFECT_PORT = 4210
SANDBOX_PORT = 8010
_START_SECONDS = 90.0
RECORDER_SETTINGS = {
    # One at a time, the default, the recorder is seconds behind with the task runs of a fan-out, and takes
    # five times the CPU.
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_BATCH_SIZE": "100",
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_READ_BATCH_SIZE": "100",
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_FLUSH_INTERVAL": "1",
}


def free_port(preferred: int = 0) -> int:
    """The preferred port if nobody has it, so that links keep working from run to run; else a free one."""
    for port in (preferred, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise OSError("no free port on 127.0.0.1")


class PrefectServer:
    """A Prefect server as a child process: a context manager that starts and stops it.

    Args:
        home: Its PREFECT_HOME: database, logs, results.
        port: Where it listens on 127.0.0.1.

    Raises:
        RuntimeError: It does not answer in time; its log's place is in the message.
    """

    def __init__(self, home: Path, port: int) -> None:
        self.home = home.absolute()
        self.url = f"http://{HOST}:{port}"
        self.api_url = f"{self.url}/api"
        self._port = port
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs to use this server."""
        return {
            "PREFECT_HOME": str(self.home),
            "PREFECT_API_URL": self.api_url,
            "PREFECT_UI_URL": self.url,
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "false",
            "DO_NOT_TRACK": "1",
        }

    def __enter__(self) -> Self:
        self.home.mkdir(parents=True, exist_ok=True)
        log = self.home / "server.log"
        with log.open("ab") as output:
            self._process = subprocess.Popen(  # noqa: S603 - our own interpreter
                [
                    sys.executable,
                    "-m",
                    "prefect",
                    "server",
                    "start",
                    "--host",
                    HOST,
                    "--port",
                    str(self._port),
                ],
                # The UI asks this address; it would ask port 4200 otherwise.
                env={
                    **os.environ,
                    **self.environment,
                    **RECORDER_SETTINGS,
                    "PREFECT_UI_API_URL": self.api_url,
                    "PREFECT_LOGGING_SERVER_LEVEL": "WARNING",
                },
                stdout=output,
                stderr=subprocess.STDOUT,
                # Its own group: a Ctrl-C in the terminal is for us, and we stop it when all is written.
                start_new_session=True,
            )
        deadline = time.monotonic() + _START_SECONDS
        while not _answers(f"{self.api_url}/health"):
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.__exit__(None, None, None)
                raise RuntimeError(f"The Prefect server did not start; {log} says why.")
            time.sleep(0.1)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(15)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None


class Stage:
    """Server and sandbox together. Uses those that `make ui` keeps up, if it does; starts its own otherwise.

    Args:
        state: The folder with everything that lasts: server database, warehouse, unzipped sources.
        job_seconds: How long a job in the sandbox takes at least.
    """

    def __init__(self, state: Path, *, job_seconds: float = 3.0) -> None:
        self.state = state.absolute()
        self.warehouse = self.state / "warehouse.duckdb"
        self._note = self.state / "stage.json"
        self._job_seconds = job_seconds
        self._server: PrefectServer | None = None
        self._sandbox: Sandbox | None = None
        self.prefect_url = ""
        self.sandbox_url = ""

    @property
    def shared(self) -> bool:
        """Whether the stage is somebody else's."""
        return self._server is None

    def __enter__(self) -> Self:
        self.state.mkdir(parents=True, exist_ok=True)
        if not self._join():
            self._sandbox = Sandbox(
                self.state, free_port(SANDBOX_PORT), self.warehouse, job_seconds=self._job_seconds
            ).start()
            server = PrefectServer(self.state / "prefect", free_port(PREFECT_PORT))
            try:
                self._server = server.__enter__()
            except BaseException:
                self._sandbox.stop()
                raise
            self.prefect_url, self.sandbox_url = server.url, self._sandbox.url
            self._note.write_text(json.dumps({"prefect": self.prefect_url, "sandbox": self.sandbox_url}))
        os.environ.update(PrefectServer(self.state / "prefect", _port(self.prefect_url)).environment)
        os.environ["ELT_WAREHOUSE"] = str(self.warehouse)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.shared:
            return
        self._note.unlink(missing_ok=True)
        if self._server:
            self._server.__exit__(kind, error, trace)
        if self._sandbox:
            self._sandbox.stop()

    def _join(self) -> bool:
        try:
            note = json.loads(self._note.read_text())
            prefect, sandbox = str(note["prefect"]), str(note["sandbox"])
        except (OSError, ValueError, KeyError):
            return False
        if not (_answers(f"{prefect}/api/health") and _answers(f"{sandbox}/_sandbox/")):
            return False
        self.prefect_url, self.sandbox_url = prefect, sandbox
        return True

    def control(self, method: str, path: str, body: Any = None) -> Any:
        """A request to the sandbox's control API."""
        response = httpx.request(method, f"{self.sandbox_url}/_sandbox{path}", json=body, timeout=10)
        response.raise_for_status()
        return response.json() if response.content else None

    def messages(self) -> list[dict[str, Any]]:
        """What was posted to Slack, oldest first."""
        posted: list[dict[str, Any]] = self.control("GET", "/slack/messages")["data"]
        return posted

    def save_blocks(self, *, dbt_cloud: bool = True) -> None:
        """Save the blocks that flows and deployments name: the vendors' accounts and the Slack channels.

        Args:
            dbt_cloud: dbt Cloud's too, which is prefect-dbt's block: importing that takes seconds.
        """
        from prefect_slack import SlackCredentials, SlackWebhook

        from blocks import (
            AirbyteServer,
            CensusCredentials,
            FivetranCredentials,
            HightouchCredentials,
            PagerDutyRouting,
        )
        from blocks.dashboards import power_bi_refresh, tableau_extract_refresh

        AirbyteServer(
            base_url=f"{self.sandbox_url}/api/public/v1",
            client_id=catalog.CLIENT_ID,
            client_secret=catalog.CLIENT_SECRET,
        ).save("airbyte", overwrite=True)
        HightouchCredentials(
            api_key=catalog.HIGHTOUCH_API_KEY,
            base_url=f"{self.sandbox_url}/hightouch/api/v1",
            app_url=f"{self.sandbox_url}/hightouch",
        ).save("hightouch", overwrite=True)
        CensusCredentials(
            api_key=catalog.CENSUS_API_KEY,
            base_url=f"{self.sandbox_url}/census/api/v1",
            app_url=f"{self.sandbox_url}/census",
            workspace_id=str(catalog.CENSUS_WORKSPACE_ID),
        ).save("census", overwrite=True)
        FivetranCredentials(
            api_key=catalog.FIVETRAN_API_KEY,
            api_secret=catalog.FIVETRAN_API_SECRET,
            base_url=f"{self.sandbox_url}/fivetran",
            app_url=f"{self.sandbox_url}/fivetran",
        ).save("fivetran", overwrite=True)
        power_bi_refresh(
            catalog.POWER_BI_TENANT,
            catalog.POWER_BI_CLIENT_ID,
            catalog.POWER_BI_CLIENT_SECRET,
            base_url=f"{self.sandbox_url}/power_bi/v1.0/myorg",
            login_url=f"{self.sandbox_url}/power_bi/login",
            app_url=f"{self.sandbox_url}/power_bi/app",
        ).save("power-bi", overwrite=True)
        tableau_extract_refresh(
            f"{self.sandbox_url}/tableau",
            catalog.TABLEAU_TOKEN_NAME,
            catalog.TABLEAU_TOKEN_SECRET,
            site=catalog.TABLEAU_SITE,
        ).save("tableau", overwrite=True)
        for channel, (webhook_id, secret) in catalog.WEBHOOKS.items():
            url = f"{self.sandbox_url}/services/{catalog.SLACK_TEAM}/{webhook_id}/{secret}"
            SlackWebhook(url=url).save(channel, overwrite=True)
        SlackCredentials(token=catalog.SLACK_TOKEN).save("slack", overwrite=True)
        for service, key in catalog.PAGERDUTY_KEYS.items():
            PagerDutyRouting(routing_key=key, base_url=f"{self.sandbox_url}/pagerduty/v2").save(
                service, overwrite=True
            )
        if dbt_cloud:
            from prefect_dbt.cloud import DbtCloudCredentials

            DbtCloudCredentials(
                api_key=catalog.DBT_CLOUD_TOKEN,
                account_id=catalog.DBT_CLOUD_ACCOUNT_ID,
                domain=self.sandbox_url,
            ).save("dbt-cloud", overwrite=True)


def _port(url: str) -> int:
    return httpx.URL(url).port or 80


def _answers(url: str) -> bool:
    try:
        return httpx.get(url, timeout=2).is_success
    except httpx.HTTPError:
        return False
