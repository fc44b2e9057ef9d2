"""A flow that tests start in another process, to kill it: `python crash_flows.py <flow run id>`."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from uuid import UUID

from prefect import flow
from prefect.client.orchestration import get_client
from prefect.flow_engine import run_flow
from prefect.states import AwaitingRetry

from tasks.airbyte import AirbyteSync, airbyte_sync
from tasks.jobs import JobPolicy, JobResult

if TYPE_CHECKING:
    from tests.jobs_fixtures import Desk


@flow
async def one_sync(
    server: str,
    connection_id: str,
    before: Literal["clear", "reset"] | None = None,
    limit: str | None = None,
) -> JobResult:
    policy = JobPolicy(poll=0.1, timeout=60, concurrency_limit=limit)
    sync = AirbyteSync(server=server, connection_id=connection_id, before=before, policy=policy)
    return await airbyte_sync(sync)


async def run_again(flow_run_id: UUID) -> JobResult:
    """Run the flow run, with the parameters that the server has stored."""
    async with get_client() as client:
        flow_run = await client.read_flow_run(flow_run_id)
    return await run_flow(one_sync, flow_run=flow_run, parameters=flow_run.parameters)


@asynccontextmanager
async def killed(desk: Desk, **parameters: str) -> AsyncIterator[UUID]:
    """A flow run of one sync in a process of its own, which is killed when the body is done."""
    await desk.vendor._server.save("crash", overwrite=True)  # type: ignore[misc]  # async in an async context
    async with get_client() as client:
        flow_run = await client.create_flow_run(
            one_sync, parameters={"server": "crash", "connection_id": desk.connection_id, **parameters}
        )
    process = subprocess.Popen(  # noqa: ASYNC220, S603 - it returns at once
        [sys.executable, __file__, str(flow_run.id)],
        cwd=Path(__file__).parent.parent,
        env={**os.environ, "PYTHONPATH": "."},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield flow_run.id
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    async with get_client() as client:
        await client.set_flow_run_state(flow_run.id, AwaitingRetry(), force=True)


if __name__ == "__main__":
    asyncio.run(run_again(UUID(sys.argv[1])))
