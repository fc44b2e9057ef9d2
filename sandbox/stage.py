"""The stage for the demo: a real Prefect server and the sandbox, on loopback, with the blocks that they need.

Nothing here imports prefect before the server's address is known: prefect reads its settings once.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx

from deployments.server.local import LocalServer, answers, free_port
from sandbox import catalog
from sandbox.server import Sandbox

PREFECT_PORT = 4210
SANDBOX_PORT = 8010


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
        self._server: LocalServer | None = None
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
            server = LocalServer(self.state / "prefect", free_port(PREFECT_PORT))
            try:
                self._server = server.start()
            except BaseException:
                self._sandbox.stop()
                raise
            self.prefect_url, self.sandbox_url = server.url, self._sandbox.url
            self._note.write_text(json.dumps({"prefect": self.prefect_url, "sandbox": self.sandbox_url}))
        os.environ.update(LocalServer(self.state / "prefect", _port(self.prefect_url)).environment)
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
            self._server.stop()
        if self._sandbox:
            self._sandbox.stop()

    def _join(self) -> bool:
        try:
            note = json.loads(self._note.read_text())
            prefect, sandbox = str(note["prefect"]), str(note["sandbox"])
        except (OSError, ValueError, KeyError):
            return False
        if not (answers(f"{prefect}/api/health") and answers(f"{sandbox}/_sandbox/")):
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
