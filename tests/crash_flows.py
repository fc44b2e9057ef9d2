"""The flow that test_runs.py starts in another process, to kill it: `python crash_flows.py <flow run id>`."""

from __future__ import annotations

import asyncio
import sys
from uuid import UUID

from prefect import flow
from prefect.client.orchestration import get_client
from prefect.flow_engine import run_flow

from tasks.airbyte import AirbyteSync, airbyte_sync
from tasks.jobs import JobPolicy, JobResult


@flow
async def one_sync(server: str, connection_id: str) -> JobResult:
    policy = JobPolicy(poll=0.1, timeout=60)
    return await airbyte_sync(AirbyteSync(server=server, connection_id=connection_id, policy=policy))


async def run_again(flow_run_id: UUID) -> JobResult:
    """Run the flow run, with the parameters that the server has stored."""
    async with get_client() as client:
        flow_run = await client.read_flow_run(flow_run_id)
    return await run_flow(one_sync, flow_run=flow_run, parameters=flow_run.parameters)


if __name__ == "__main__":
    asyncio.run(run_again(UUID(sys.argv[1])))
