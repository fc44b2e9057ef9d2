"""Which attempt of a flow run this process is, and whether it still is the last.

A process that was taken for dead may come back: a machine that was suspended, a network that was cut. By then
another attempt of the run may be at work, which has attached to its jobs. Starting more of them is that one's
business, and so is the run's state: what this process told Prefect would be taken for news of the other.

So it looks before it writes down that it will start a job (`tasks.jobs.journal`), before any task begins if
it has not looked for some seconds (`tasks.jobs.loop`), and before a flow tells how it has ended.
"""

from __future__ import annotations

import asyncio
import logging
import os
from contextlib import suppress
from itertools import pairwise
from uuid import UUID

from httpx import HTTPError
from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.context import FlowRunContext
from prefect.logging.handlers import APILogHandler
from prefect.utilities.asyncutils import run_coro_as_sync

_LAST_WORDS = 5.0  # seconds for the log to be sent


class Superseded(Exception):
    """Another attempt of this flow run is at work; nothing was started."""


def current_attempt() -> int:
    """The number of the attempt that runs here, 1 for the first; 0 outside of a flow run."""
    context = FlowRunContext.get()
    return context.flow_run.run_count if context and context.flow_run else 0


def attempt_of(flow_run: FlowRun) -> int:
    """The how manieth process it is that does a run, with those that go on after the run was suspended.

    Prefect's `run_count`, which says whether another attempt has begun, does not count these.
    """
    return flow_run.run_count + len(flow_run.empirical_policy.pause_keys or ())


async def stop_if_superseded(client: PrefectClient, flow_run_id: UUID, attempt: int) -> None:
    """End this process without a word if it is a worker's and another attempt of the run has begun.

    Args:
        client: Prefect's client.
        flow_run_id: The run.
        attempt: The number of ours.

    Raises:
        Superseded: Another has begun, and this process is not the run's alone.
    """
    run = await client.read_flow_run(flow_run_id)
    if run.run_count <= attempt or await _only_paused(client, run, attempt):
        return
    message = f"Attempt {run.run_count} of this run has begun; this is attempt {attempt}, and starts nothing."
    if os.environ.get("PREFECT__FLOW_RUN_ID") != str(flow_run_id):
        raise Superseded(message)
    # The console's format has both; without the name it would print a traceback in place of the message.
    names = {"flow_run_id": str(flow_run_id), "flow_run_name": run.name}
    logging.getLogger("prefect.flow_runs").error(message, extra=names)
    with suppress(TimeoutError):
        async with asyncio.timeout(_LAST_WORDS):
            await APILogHandler.aflush()
    # Any other exit code is a crash to the worker, of the run that goes on.
    os._exit(0)


def end_if_superseded() -> None:
    """The same for the flow run that runs here, from its own thread; nothing outside of a flow run.

    A server that can't be asked has nothing against it.

    Raises:
        Superseded: Another attempt has begun, and this process is not the run's alone.
    """
    context, attempt = FlowRunContext.get(), current_attempt()
    if context is None or context.flow_run is None or attempt == 0:
        return
    flow_run_id = context.flow_run.id

    async def look() -> None:
        async with get_client() as client:
            await stop_if_superseded(client, flow_run_id, attempt)

    with suppress(HTTPError):
        run_coro_as_sync(look())


async def _only_paused(client: PrefectClient, run: FlowRun, attempt: int) -> bool:
    """Whether the run was paused since this attempt began, and resumed in this process, each time it began.

    Prefect counts that, too: `pause_flow_run` leaves the process where it is, and the run is Running again.
    """
    states = sorted(await client.read_flow_run_states(run.id), key=lambda state: state.timestamp)
    began_from = [
        before.type
        for before, state in pairwise(states)
        if state.type is StateType.RUNNING and before.type is not StateType.RUNNING
    ]
    return all(before is StateType.PAUSED for before in began_from[attempt - run.run_count :])
