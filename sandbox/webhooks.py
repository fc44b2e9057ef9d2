"""The stage's vendors tell of jobs that have ended, as the real ones do: signed, and tried again or not.

Nothing is sent until an address is set: by `box.webhooks.to(…)`, `PUT /_sandbox/webhooks` or
`python -m sandbox serve --webhooks <receiver>`. The secret of all is `catalog.WEBHOOK_SECRET`.
"""

from __future__ import annotations

import asyncio
import base64
import hmac
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from typing import Any, Literal

import httpx
import orjson
from pydantic import SecretStr

from sandbox import catalog
from sandbox.airbyte import Airbyte
from sandbox.airbyte_jobs import Job
from sandbox.census import Census
from sandbox.census import Run as CensusRun
from sandbox.dbt_cloud import DbtCloud, Run
from sandbox.fivetran import Connection as FivetranConnection
from sandbox.fivetran import Fivetran, Sync
from sandbox.timeline import iso

Vendor = Literal["airbyte", "fivetran", "dbt_cloud", "census"]

PATHS: dict[Vendor, str] = {
    "airbyte": f"/hooks/airbyte-webhook/sandbox/{catalog.WEBHOOK_SECRET}",
    "fivetran": "/hooks/fivetran-webhook/sandbox",
    "dbt_cloud": "/hooks/dbt-cloud-webhook/sandbox",
    "census": "/hooks/census-webhook/sandbox",
}
"""Where a receiver takes them, from blocks that are called `sandbox`."""

_LOOK = 0.1  # seconds between looks for jobs that have ended
_TRIES: dict[Vendor, int] = {"airbyte": 1, "fivetran": 20, "dbt_cloud": 5, "census": 5}
_PAUSE = 1.0  # seconds before a delivery is tried again; the real ones take minutes


def save_sources(sandbox_url: str) -> list[str]:
    """Save the blocks by which a receiver takes the sandbox's webhooks, and return their names.

    Args:
        sandbox_url: Where the sandbox is, for the receiver to read Airbyte's jobs again.
    """
    # Imports prefect, which reads its settings once: not before the server's address is known.
    from blocks import AirbyteServer, AirbyteWebhook, CensusWebhook, DbtCloudWebhook, FivetranWebhook

    secret = SecretStr(catalog.WEBHOOK_SECRET)
    airbyte = AirbyteServer(
        base_url=f"{sandbox_url}/api/public/v1",
        client_id=catalog.CLIENT_ID,
        client_secret=SecretStr(catalog.CLIENT_SECRET),
    )
    sources = [
        AirbyteWebhook(url_secret=secret, server=airbyte),
        FivetranWebhook(secret=secret),
        DbtCloudWebhook(secret=secret),
        CensusWebhook(secret=secret),
    ]
    for source in sources:
        source.save("sandbox", overwrite=True)
    return [f"{source.get_block_type_slug()}/sandbox" for source in sources]


@dataclass(frozen=True)
class Delivery:
    """One attempt to deliver a webhook; `status` is None where nothing answered."""

    vendor: Vendor
    about: str
    status: int | None


@dataclass(frozen=True)
class _Notice:
    vendor: Vendor
    about: str
    write: Callable[[], dict[str, Any]]

    @property
    def id(self) -> tuple[Vendor, str]:
        return self.vendor, self.about


@dataclass
class Webhooks:
    """What is sent to whom, and what became of it."""

    airbyte: Airbyte
    fivetran: Fivetran
    dbt_cloud: DbtCloud
    census: Census
    urls: dict[Vendor, str] = field(default_factory=dict)
    deliveries: list[Delivery] = field(default_factory=list)
    _known: set[tuple[Vendor, str]] = field(default_factory=set)
    _sending: set[asyncio.Task[None]] = field(default_factory=set)

    def to(self, receiver: str) -> None:
        """Tell a receiver that has a block `sandbox` for each vendor, of what ends from now on."""
        self.set({vendor: receiver.rstrip("/") + path for vendor, path in PATHS.items()})

    def set(self, urls: dict[Vendor, str]) -> None:
        """Tell these addresses, and nobody else, of what ends from now on."""
        self._known.update(notice.id for notice in self._ended())
        self.urls = dict(urls)

    async def run(self) -> None:
        """Tell of every job as it ends, until cancelled."""
        async with httpx.AsyncClient(timeout=30.0, trust_env=False) as client:
            while True:
                if self.urls:
                    for notice in self._ended():
                        if notice.id not in self._known:
                            self._known.add(notice.id)
                            self._begin(client, notice)
                await asyncio.sleep(_LOOK)

    def _begin(self, client: httpx.AsyncClient, notice: _Notice) -> None:
        if (url := self.urls.get(notice.vendor)) is None:
            return
        task = asyncio.create_task(self._deliver(client, url, notice))
        self._sending.add(task)
        task.add_done_callback(self._sending.discard)

    async def _deliver(self, client: httpx.AsyncClient, url: str, notice: _Notice) -> None:
        body = orjson.dumps(notice.write())
        headers = {"Content-Type": "application/json", **_signature(notice.vendor, body)}
        for _ in range(_TRIES[notice.vendor]):
            try:
                status: int | None = (await client.post(url, content=body, headers=headers)).status_code
            except httpx.HTTPError:
                status = None
            self.deliveries.append(Delivery(notice.vendor, notice.about, status))
            if status is not None and status < 300:
                return
            await asyncio.sleep(_PAUSE)

    def _ended(self) -> Iterator[_Notice]:
        with self.airbyte.lock:
            jobs = list(self.airbyte.jobs.values())
        for job in jobs:
            word, since, final = job.timeline.at()
            if final and word in ("succeeded", "failed"):  # nobody is told of a cancelled one
                yield _Notice("airbyte", str(job.job_id), partial(_airbyte, job, word, since))
        with self.fivetran.lock:
            syncs = [(c, sync) for c in self.fivetran.connections.values() for sync in c.syncs if sync.over]
        for connection, sync in syncs:
            yield _Notice("fivetran", sync.sync_id, partial(_fivetran, connection, sync))
        for dbt_run in self.dbt_cloud.all_runs():
            if dbt_run.final and dbt_run.status in _DBT_WORDS:
                yield _Notice("dbt_cloud", str(dbt_run.run_id), partial(_dbt_cloud, dbt_run))
        with self.census.lock:
            census_runs = [run for run in self.census.runs.values() if run.final]
        for run in census_runs:
            yield _Notice("census", str(run.run_id), partial(_census, run))


def _signature(vendor: Vendor, body: bytes) -> dict[str, str]:
    mac = hmac.new(catalog.WEBHOOK_SECRET.encode(), body, sha256)
    written: dict[Vendor, Callable[[], dict[str, str]]] = {
        "airbyte": dict,  # signs nothing
        "fivetran": lambda: {"X-Fivetran-Signature-256": mac.hexdigest().upper()},
        "dbt_cloud": lambda: {"Authorization": mac.hexdigest()},
        "census": lambda: {"X-Signature": base64.b64encode(mac.digest()).decode()},
    }
    return written[vendor]()


def _airbyte(job: Job, word: str, since: float) -> dict[str, Any]:
    reply = job.reply()
    rows, size = reply.get("rowsSynced", 0), reply.get("bytesSynced", 0)
    good = word == "succeeded"
    what = "succeeded" if good else "just failed..."
    return {
        "text": f"Your connection {job.connection_name} {what}\n\nJob ID: {job.job_id}",
        "blocks": [],
        "data": {
            "workspace": {"id": catalog.WORKSPACE_ID, "name": "sandbox", "url": ""},
            "connection": {"id": job.connection_id, "name": job.connection_name, "url": ""},
            "source": {"id": catalog.SOURCE_ID, "name": job.connection_name, "url": ""},
            "destination": {"id": catalog.DESTINATION_ID, "name": "warehouse", "url": ""},
            "jobId": job.job_id,
            "startedAt": iso(job.created_wall),
            "finishedAt": iso(job.timeline.wall(since)),
            "bytesEmitted": size,
            "bytesCommitted": size,
            "recordsEmitted": rows,
            "recordsCommitted": rows,
            "errorMessage": None if good else job.behaviour.reason,
            "errorType": None if good else job.behaviour.failure,
            "errorOrigin": None if good else job.behaviour.origin,
            "success": good,
            "durationInSeconds": int(since - job.timeline.started),
        },
    }


def _fivetran(connection: FivetranConnection, sync: Sync) -> dict[str, Any]:
    outcome = {"succeeded": "SUCCESSFUL", "failed": "FAILURE"}.get(sync.word, "CANCELED")
    return {
        "event": "sync_end",
        "created": iso(sync.timeline.wall(sync.timeline.at()[1]), millis=True),
        "connector_type": connection.service,
        "connector_id": connection.connection_id,
        "connector_name": connection.schema,
        "sync_id": sync.sync_id,
        "destination_group_id": catalog.FIVETRAN_GROUP_ID,
        "data": {"status": outcome, **({"reason": sync.word} if outcome == "FAILURE" else {})},
    }


def _census(run: CensusRun) -> dict[str, Any]:
    return {
        "workspace_id": catalog.CENSUS_WORKSPACE_ID,
        "sync_id": run.sync_id,
        "sync_run_id": run.run_id,
        "event": "sync.completed",
        "status": "ok" if run.status == "completed" else "emergency",
    }


_DBT_WORDS = {10: "Success", 20: "Errored", 30: "Cancelled"}


def _dbt_cloud(run: Run) -> dict[str, Any]:
    ended = iso(run.wall(run.ended or run.created), millis=True)
    return {
        "accountId": catalog.DBT_CLOUD_ACCOUNT_ID,
        "webhooksID": "wsu_sandbox",
        "eventId": f"wev_{run.run_id:016d}",
        "timestamp": ended,
        "eventType": "job.run.completed",
        "webhookName": "sandbox",
        "data": {
            "jobId": str(run.job.job_id),
            "jobName": run.job.name,
            "runId": str(run.run_id),
            "environmentId": "1",
            "environmentName": "Production",
            "projectName": "sandbox",
            "projectId": "1",
            "runStatus": _DBT_WORDS[run.status],
            "runStatusCode": run.status,
            "runStatusMessage": "None",
            "runReason": run.cause,
            "runStartedAt": iso(run.created_wall),
            "runFinishedAt": ended,
        },
    }
