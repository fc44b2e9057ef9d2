"""A flow that tests start in another process, to kill it: `python backfill_crash.py <flow run> [reload]`."""

from __future__ import annotations

import sys
from uuid import UUID

from prefect.client.orchestration import get_client
from prefect.flow_engine import run_flow

from flows import backfill, reload

if __name__ == "__main__":
    with get_client(sync_client=True) as client:
        flow_run = client.read_flow_run(UUID(sys.argv[1]))
    flow = reload if sys.argv[2:] == ["reload"] else backfill
    run_flow(flow, flow_run=flow_run, parameters=flow_run.parameters, return_type="state")
