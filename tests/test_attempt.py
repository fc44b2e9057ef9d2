"""A process that was taken for dead, beside the next attempt of its run: it starts nothing more."""

from __future__ import annotations

import asyncio
import os
import sys
from datetime import UTC, datetime
from uuid import UUID

import pytest
from prefect import flow, task
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun
from prefect.context import FlowRunContext
from prefect.states import Crashed, Paused, Running, Scheduled

from tasks.jobs import Entry, EventLoopTaskRunner, RunJournal, read_entries
from tasks.jobs.attempt import Superseded, end_if_superseded
from tests.deployed import REPOSITORY
from tests.jobs_fixtures import PREFECTS_SOCKETS, collected

__all__ = ["collected"]

pytestmark = [*PREFECTS_SOCKETS, pytest.mark.timeout(200)]

_COME_BACK = """
import asyncio, sys
from uuid import UUID
from prefect.client.orchestration import get_client
from tasks.jobs.attempt import stop_if_superseded

async def main():
    async with get_client() as client:
        await stop_if_superseded(client, UUID(sys.argv[1]), 2)
        print("still the last", flush=True)
        await stop_if_superseded(client, UUID(sys.argv[1]), 1)
        print("goes on", flush=True)

try:
    asyncio.run(main())
finally:
    print("cleans up", flush=True)
"""


@flow
def a_flow() -> None:
    """Stands for any."""


async def _in_its_second_attempt() -> FlowRun:
    async with get_client() as client:
        run = await client.create_flow_run(a_flow)
        for state in (Running(), Scheduled(), Running()):
            await client.set_flow_run_state(run.id, state, force=True)
        run = await client.read_flow_run(run.id)
    assert run.run_count == 2
    return run


def _entry() -> Entry:
    return Entry(key="airbyte:sync:1", vendor="airbyte", resource_id="1", name="n", since=datetime.now(UTC))


def _journal(run: UUID, attempt: int) -> RunJournal:
    journal = RunJournal(run, None)
    journal._attempt = attempt
    return journal


async def test_an_earlier_attempt_writes_no_intent() -> None:
    """Without an intent nothing is started; what has ended may still be written down."""
    run = await _in_its_second_attempt()
    with pytest.raises(Superseded, match=r"Attempt 2 of this run has begun; this is attempt 1"):
        await _journal(run.id, 1).record(_entry(), urgent=True)
    assert await read_entries(run.id) == []
    await _journal(run.id, 1).record(_entry())
    assert len(await read_entries(run.id)) == 1


async def test_the_last_attempt_goes_on() -> None:
    """It writes its intents."""
    run = await _in_its_second_attempt()
    await _journal(run.id, 2).record(_entry(), urgent=True)
    assert len(await read_entries(run.id)) == 1


async def test_a_pause_is_no_other_attempt() -> None:
    """Prefect counts up when a paused run is resumed, which goes on in the process that was paused."""
    async with get_client() as client:
        run = await client.create_flow_run(a_flow)
        await client.set_flow_run_state(run.id, Running(), force=True)
        for _ in range(2):
            await client.set_flow_run_state(run.id, Paused(timeout_seconds=60))
            await client.resume_flow_run(run.id)
        run = await client.read_flow_run(run.id)
        assert run.run_count > 1
        await _journal(run.id, 1).record(_entry(), urgent=True)
        assert len(await read_entries(run.id)) == 1
        for state in (Crashed(), Scheduled(), Running()):
            await client.set_flow_run_state(run.id, state, force=True)
    with pytest.raises(Superseded):
        await _journal(run.id, 1).record(_entry(), urgent=True)


async def test_a_workers_process_ends_without_a_word() -> None:
    """With exit code 0, which a worker does not take for a crash, and no state of its own."""
    run = await _in_its_second_attempt()
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        _COME_BACK,
        str(run.id),
        cwd=REPOSITORY,
        env={**os.environ, "PREFECT__FLOW_RUN_ID": str(run.id)},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    said, logged = await process.communicate()
    assert b"Attempt 2 of this run has begun; this is attempt 1, and starts nothing." in logged
    assert b"Traceback" not in logged
    assert said.decode().splitlines() == ["still the last"]
    assert process.returncode == 0
    async with get_client() as client:
        after = await client.read_flow_run(run.id)
    assert after.state is not None
    assert after.state.name == "Running"


@task
async def a_step() -> None:
    """Stands for any: a build, an activation."""
    _done.append("a step")


_done: list[str] = []


@flow(task_runner=EventLoopTaskRunner())
def asleep() -> list[str]:
    """Its run is given to another attempt before it has begun its step."""
    context = FlowRunContext.get()
    assert context is not None
    assert context.flow_run is not None
    with get_client(sync_client=True) as client:
        for state in (Scheduled(), Running()):
            client.set_flow_run_state(context.flow_run.id, state, force=True)
    stopped = []
    for what in (lambda: a_step.submit().result(), end_if_superseded):
        try:
            what()
        except Superseded as error:
            stopped.append(str(error))
    return stopped


def test_no_step_begins_and_no_end_is_told() -> None:
    """What starts no vendor's job is not started either, and a flow does not come to telling its end."""
    said = "Attempt 2 of this run has begun; this is attempt 1, and starts nothing."
    assert asleep() == [said, said]
    assert _done == []
