"""Workers and processes that are killed in mid-sync, and the automations that bring their runs to an end."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

import httpx
import psutil  # type: ignore[import-untyped]
import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterId,
)
from prefect.client.schemas.objects import StateType, TaskRun

from deployments.automations import Entry, apply, plan, read_entries, remove, resolve
from sandbox import Sandbox
from tasks.rescue import RESCHEDULED
from tests.deployed import BY_HAND, PREFECT_FILE, Runs, Stage, prefect, saved_blocks, until

pytestmark = pytest.mark.timeout(400)

RECOVER = "recover/dead-runs"
_SILENT = 20  # seconds; a run of these tests beats when it begins, and then after 30 s


@pytest.fixture(scope="module")
def runs(prefect_server: str) -> Iterator[Runs]:
    with get_client(sync_client=True) as client:
        yield Runs(client, prefect_server)


@pytest.fixture(scope="module")
def stage(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """The sandbox, and the deployments that rescue and tell beside one that syncs."""
    prefect("work-pool", "create", "elt", "--type", "process", "--overwrite")
    names = [part for name in ("by-hand", "dead-runs", "untold-runs") for part in ("-n", name)]
    prefect("--no-prompt", "deploy", "--prefect-file", PREFECT_FILE, *names)
    with Sandbox(tmp_path_factory.mktemp("stage"), job_seconds=0.3) as box, saved_blocks(box):
        yield Stage(box)


def _quick(entry: Entry) -> Entry:
    """An automation as it is shipped, but for what would have a test wait for minutes."""
    trigger = dict(entry.trigger)
    if "heartbeats stopped" in entry.name:
        trigger["within"] = _SILENT
    actions = [
        {**action, "parameters": {**action["parameters"], "delay": 10, "silent_for": _SILENT}}
        if action.get("deployment") == RECOVER
        else action
        for action in entry.actions
    ]
    return entry.model_copy(update={"trigger": trigger, "actions": actions})


@dataclass
class Automations:
    """Those of deployments/automations.yaml, on the server."""

    runs: Runs
    ids: dict[str, UUID]

    def off(self, words: str) -> None:
        """Switch one off, as an operator does."""
        (found,) = [automation for name, automation in self.ids.items() if words in name]
        reply = httpx.patch(f"{self.runs.api_url}/automations/{found}", json={"enabled": False})
        reply.raise_for_status()


@pytest.fixture
async def automations(runs: Runs, stage: Stage) -> AsyncIterator[Automations]:
    async with get_client() as client:
        wanted = await resolve(client, [_quick(entry) for entry in read_entries()])
        await apply(client, await plan(client, wanted))
        there = (await plan(client, [])).remove
        yield Automations(runs, {automation.name: automation.id for automation in there})
        await remove(client, there)


@contextmanager
def machine(log: Path) -> Iterator[psutil.Process]:
    """A worker; what is still there of it and of its runs is killed in the end."""
    command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", "elt"]
    env = {**os.environ, "PREFECT_WORKER_QUERY_SECONDS": "1"}
    with log.open("wb") as output:
        worker = subprocess.Popen(command, cwd=log.parent, env=env, stdout=output, stderr=output)  # noqa: S603
        try:
            yield psutil.Process(worker.pid)
        finally:
            if worker.poll() is None:
                power_off(psutil.Process(worker.pid))
            worker.wait()


def power_off(worker: psutil.Process) -> None:
    """SIGKILL for a worker and all that it has started, at once."""
    for process in _family(worker):
        process.suspend()  # so that nobody reports the death of another
    for process in _family(worker):
        process.kill()


def _family(process: psutil.Process) -> list[psutil.Process]:
    return [process, *process.children(recursive=True)]


def _task_runs(runs: Runs, run: UUID) -> list[TaskRun]:
    return runs.client.read_task_runs(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[run])))


def _names(runs: Runs, run: UUID) -> list[str | None]:
    return [state.name for state in sorted(runs.states(run), key=lambda state: state.timestamp)]


def test_killed_in_mid_sync_and_rescued_without_a_hand(
    runs: Runs, stage: Stage, automations: Automations, tmp_path: Path
) -> None:
    """One process killed, then its worker and all else: both runs end well, with one job per connection."""
    killed = {}
    for name in ("process", "machine"):
        stage.add(name, 2, outcome="stuck")
    with machine(tmp_path / "first.log") as first:
        for name in ("process", "machine"):
            killed[name] = runs.start(BY_HAND, syncs=stage.syncs(name))
        for name in killed:
            stage.started(name)
        for process in _family(runs.process(killed["process"])):
            process.kill()
        ended = runs.ended(killed["process"])
        assert ended.state is not None
        assert ended.state.type is StateType.CRASHED
        power_off(first)

    with machine(tmp_path / "second.log"):
        for name, run in killed.items():
            until(f"{name}: rescued", lambda run=run: RESCHEDULED in _names(runs, run), within=180)  # type: ignore[misc]
        # These runs beat every 30 s, and the test's patience is shorter: the next attempt would be dead, too.
        automations.off("heartbeats stopped")
        for name, run in killed.items():
            until(f"{name}: runs again", lambda run=run: runs.read(run).run_count == 2, within=120)  # type: ignore[misc]
        for name, run in killed.items():
            for connection in stage.groups[name]:
                for job in stage.box.airbyte.jobs_of(connection):
                    job.timeline.finish("succeeded")
            ended = runs.ended(run, within=120)
            assert ended.state is not None
            assert ended.state.type is StateType.COMPLETED, ended.state.message
            assert stage.statuses(name) == ["succeeded"] * 2  # one job for each connection
            assert stage.cancels(name) == [0, 0]
            _all_is_closed(runs, run)
    messages = [message.text for message in stage.box.slack.messages]
    assert [text for text in messages if "the run* crashed" in text]
    assert [text for text in messages if "the run* is well again" in text]


def _all_is_closed(runs: Runs, run: UUID) -> None:
    """Nothing of the dead attempt is said to be running still."""

    def closed() -> bool:
        found = _task_runs(runs, run)
        return all(one.state and one.state.is_final() for one in found)

    until("every task run has ended", closed)


@pytest.mark.timeout(900)
def test_a_machine_that_slept_and_wakes(runs: Runs, stage: Stage, tmp_path: Path) -> None:
    """Its runs were rescued meanwhile: its processes start nothing, tell nothing, and end without a word."""
    # One run has a sync to start yet when the machine wakes, the other has only its end to tell.
    stage.add("starts", 2, outcome="stuck")
    stage.add("ends", 1, outcome="stuck")
    names = ("starts", "ends")
    pages = len(stage.box.slack.messages)
    with machine(tmp_path / "asleep.log") as asleep:
        begun = [runs.start(BY_HAND, syncs=stage.syncs(name), max_concurrency=1) for name in names]
        until(
            "a job of each runs",
            lambda: [stage.statuses(name) for name in names] == [["running"]] * 2,
            within=180,
        )
        first = [runs.process(run) for run in begun]
        sleeping = _stand_still(asleep)

        with machine(tmp_path / "awake.log"):
            for run in begun:
                runs.start(RECOVER, flow_run_id=str(run), silent_for=5, delay=10)
            second = [_second_attempt(runs, run, old) for run, old in zip(begun, first, strict=True)]
            # They stand still while the first ones wake: what happens then is those ones' doing.
            stopped = [member for process in second for member in _stand_still(process)]
            before = [_names(runs, run) for run in begun]
            for name in names:
                _finish_all(stage, name)
            _go_on(sleeping)
            for process in first:
                until("a first process ends", lambda process=process: not process.is_running(), within=180)  # type: ignore[misc]
            said, log = "this is attempt 1, and starts nothing", tmp_path / "asleep.log"
            until("both have said why", lambda: log.read_text().count(said) == 2)
            assert [_names(runs, run) for run in begun] == before
            assert stage.statuses("starts") == ["succeeded"]
            # Of the rescues people are told, of nothing else.
            assert all("the run* crashed" in message.text for message in stage.box.slack.messages[pages:])

            _go_on(stopped)
            until("the other sync", lambda: sorted(stage.statuses("starts")) == ["running", "succeeded"], 180)
            _finish_all(stage, "starts")
            for run, states in zip(begun, before, strict=True):
                assert runs.ended(run, within=180).run_count == 2
                assert _names(runs, run) == [*states, "Completed"]
                _all_is_closed(runs, run)
    assert stage.statuses("starts") == ["succeeded"] * 2  # one job for each connection
    assert stage.statuses("ends") == ["succeeded"]
    assert stage.cancels("starts") + stage.cancels("ends") == [0, 0, 0]


def _second_attempt(runs: Runs, run: UUID, sleeper: psutil.Process) -> psutil.Process:
    """The process of a run's second attempt, once there is one."""

    def another() -> psutil.Process | None:
        found = runs.process(run)
        return found if found != sleeper and runs.read(run).run_count == 2 else None

    return until("another attempt runs", another, within=300)


def _stand_still(process: psutil.Process) -> list[psutil.Process]:
    """Suspend a process and all that it has started."""
    family = _family(process)
    for member in family:
        member.suspend()
    return family


def _go_on(family: list[psutil.Process]) -> None:
    for member in family:
        member.resume()


def _finish_all(stage: Stage, name: str) -> None:
    for connection in stage.groups[name]:
        for job in stage.box.airbyte.jobs_of(connection):
            job.timeline.finish("succeeded")
