"""The flows that `bench.fan_out` runs in a process of its own: ours, and the plain one."""

from __future__ import annotations

import time
from typing import Any

import httpx
from prefect import flow, task
from prefect.task_runners import ThreadPoolTaskRunner

from bench.measured import report
from sandbox import catalog


def ours(order: dict[str, Any]) -> tuple[float, dict[str, Any]]:
    """The way of this project."""
    # Not at the top: the plain way must not pay for the import.
    from blocks import AirbyteServer
    from flows import sync_connections
    from flows.parameters import Sync
    from tasks.airbyte import AirbyteSync
    from tasks.jobs import JobState

    server = AirbyteServer(
        base_url=order["base_url"], client_id=catalog.CLIENT_ID, client_secret=catalog.CLIENT_SECRET
    )
    syncs: list[Sync] = [AirbyteSync(server=server, connection_id=each) for each in order["connections"]]
    began = time.perf_counter()
    done = sync_connections(syncs=syncs, max_concurrency=order["concurrency"])
    wall = time.perf_counter() - began
    return wall, {"succeeded": sum(outcome.state is JobState.SUCCEEDED for outcome in done.outcomes)}


@task
def plain_sync(base_url: str, token: str, connection_id: str) -> str:
    """Start a sync and ask for its job once a second, as prefect-airbyte did; a client per task, too."""
    with httpx.Client(headers={"authorization": f"Bearer {token}"}, timeout=60) as client:
        body = {"connectionId": connection_id, "jobType": "sync"}
        job = client.post(f"{base_url}/jobs", json=body).raise_for_status().json()
        while job["status"] not in ("succeeded", "failed", "cancelled"):
            time.sleep(1)
            job = client.get(f"{base_url}/jobs/{job['jobId']}").raise_for_status().json()
    return str(job["status"])


@flow
def plain_syncs(base_url: str, connections: list[str]) -> list[str]:
    """A polling task per connection, mapped."""
    secrets = {"client_id": catalog.CLIENT_ID, "client_secret": catalog.CLIENT_SECRET}
    reply = httpx.post(f"{base_url}/applications/token", json=secrets).raise_for_status()
    return plain_sync.map(base_url, reply.json()["access_token"], connections).result()


def plain(order: dict[str, Any]) -> tuple[float, dict[str, Any]]:
    """Prefect's own default way; its runner is bounded only where the concurrency asks for it."""
    connections, concurrency = order["connections"], order["concurrency"]
    run = plain_syncs
    if concurrency < len(connections):
        # Prefect's own annotations disagree about the kind of future.
        runner: Any = ThreadPoolTaskRunner(max_workers=concurrency)
        run = run.with_options(task_runner=runner)
    began = time.perf_counter()
    words = run(order["base_url"], connections)
    return time.perf_counter() - began, {"succeeded": words.count("succeeded")}


if __name__ == "__main__":
    report(lambda order: {"ours": ours, "plain": plain}[order["way"]](order))
