"""`EventLoopTaskRunner`, against a real Prefect server; what signals do is tried on real processes."""

import asyncio
import concurrent.futures
import gc
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import cloudpickle
import pytest
from prefect import allow_failure, flow, get_client, tags, task, unmapped
from prefect.context import TagsContext
from prefect.futures import PrefectConcurrentFuture, as_completed
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Completed
from prefect.utilities.annotations import quote

from tasks.jobs.runner import EventLoopTaskRunner, at_loop_exit, current_interrupt, limit_concurrency
from tests.jobs_fixtures import until

HERE = Path(__file__).parent


@task
async def double(number: int) -> int:
    await asyncio.sleep(0.01)
    return 2 * number


@task
async def fail() -> int:
    raise ValueError("no")


# -- what runs where


def test_async_tasks_share_a_loop_a_thread_and_a_client() -> None:
    """Mapped async tasks all run on one background loop with one API client."""

    @task
    async def where(_: int) -> tuple[int, int, int]:
        await asyncio.sleep(0.05)
        return threading.get_ident(), id(asyncio.get_running_loop()), id(get_client())

    @flow(task_runner=EventLoopTaskRunner())
    def run() -> list[tuple[int, int, int]]:
        return where.map(range(20)).result()

    places = set(run())
    assert len(places) == 1
    assert places.pop()[0] != threading.get_ident()


def test_waits_overlap() -> None:
    """Fifty tasks wait at the same time: each of them until all have begun."""
    waiting = 0

    @task
    async def wait(number: int) -> int:
        nonlocal waiting
        waiting += 1
        await until(lambda: waiting == 50)
        return number

    @flow(task_runner=EventLoopTaskRunner())
    def run() -> list[int]:
        return wait.map(range(50)).result()

    assert run() == list(range(50))


def test_sync_tasks_run_on_few_threads() -> None:
    """Sync tasks run off the loop, at most `max_threads` at a time, and don't hold async tasks up."""
    running, peak, lock = 0, 0, threading.Lock()
    both, answered = threading.Barrier(2), threading.Event()

    @task
    def block(number: int) -> int:
        nonlocal running, peak
        with lock:
            running += 1
            peak = max(peak, running)
        if number < 2:
            both.wait(60)
            answered.wait(60)
        time.sleep(0.05)
        with lock:
            running -= 1
        return threading.get_ident()

    @flow(task_runner=EventLoopTaskRunner(max_threads=2))
    def run() -> tuple[int, bool]:
        blocked = block.map(range(12))
        answer = double.submit(21).result()
        busy = not any(future.wrapped_future.done() for future in blocked)
        answered.set()
        blocked.wait()
        return answer, busy

    assert run() == (42, True)
    assert peak == 2


def test_context_of_the_caller_reaches_the_task_and_no_other() -> None:
    """A task sees the context variables and tags of its caller; what it sets stays with it."""
    variable: ContextVar[str] = ContextVar("variable", default="none")

    @task
    async def look(mine: str) -> tuple[str, set[str]]:
        seen = variable.get()
        variable.set(mine)
        await asyncio.sleep(0.05)
        assert variable.get() == mine
        return seen, TagsContext.get().current_tags

    @flow(task_runner=EventLoopTaskRunner())
    def run() -> list[tuple[str, set[str]]]:
        variable.set("flow")
        with tags("blue"):
            futures = look.map(["a", "b", "c"])
        return [*futures.result(), look.submit("d").result()]

    assert run() == [("flow", {"blue"})] * 3 + [("flow", set())]


# -- bounds and dependencies


@pytest.mark.parametrize("by_parameter", [False, True])
def test_max_concurrency_bounds_running_tasks(by_parameter: bool) -> None:
    """Never more than `max_concurrency` tasks run, whether the decorator or the flow sets it."""
    running, peak, three = 0, 0, asyncio.Barrier(3)

    @task
    async def count(number: int) -> None:
        nonlocal running, peak
        running += 1
        peak = max(peak, running)
        if number < 3:
            await three.wait()
        await asyncio.sleep(0.05)
        running -= 1

    def body() -> None:
        if by_parameter:
            limit_concurrency(3)
        count.map(range(12)).wait()

    flow(task_runner=EventLoopTaskRunner(None if by_parameter else 3))(body)()
    assert peak == 3


def test_bound_is_refused_where_it_would_not_hold() -> None:
    """`limit_concurrency` raises outside of such a flow, after the first task, and for nonsense."""

    @flow(task_runner=EventLoopTaskRunner())
    def late() -> None:
        double.submit(1).wait()
        limit_concurrency(3)

    with pytest.raises(RuntimeError, match="EventLoopTaskRunner"):
        limit_concurrency(3)
    with pytest.raises(RuntimeError, match="after the first task"):
        late()
    with pytest.raises(ValueError, match="at least 1"):
        EventLoopTaskRunner(max_concurrency=0)


def test_a_waiting_task_holds_no_slot() -> None:
    """With one slot, a task that waits for a dependency lets the task run that brings it about."""
    outside: concurrent.futures.Future[Any] = concurrent.futures.Future()
    gate = PrefectConcurrentFuture(uuid4(), outside)

    @task
    async def open_gate() -> None:
        outside.set_result(Completed(data=5))

    @flow(task_runner=EventLoopTaskRunner(max_concurrency=1))
    def run() -> int:
        first = double.submit(gate)
        second = double.submit(first)
        open_gate.submit().wait(10)
        return second.result(timeout=90)

    assert run() == 20


def test_dependencies_do_not_block_the_loop() -> None:
    """While tasks wait for a slow upstream, the other tasks on the loop go on."""

    others_are_done = threading.Event()

    @task
    def slow() -> bool:
        return others_are_done.wait(60)

    @task
    async def go_on() -> None:
        await asyncio.sleep(0.01)

    @flow(task_runner=EventLoopTaskRunner())
    def run() -> list[int]:
        upstream = slow.submit()
        waiting = [double.submit(upstream) for _ in range(5)]
        for _ in range(5):
            go_on.submit().wait()
        others_are_done.set()
        return [future.result() for future in waiting]

    assert run() == [2] * 5


def test_inputs_keep_prefects_semantics() -> None:
    """Nested futures, `allow_failure`, `unmapped`, `quote` and failed upstreams work as ever."""

    @dataclass
    class Box:
        content: Any

    @task
    async def echo(value: Any, other: Any = None) -> Any:
        return value, other

    @flow(task_runner=EventLoopTaskRunner())
    def run() -> dict[str, Any]:
        two, failed = double.submit(1), fail.submit()
        not_ready = echo.submit(failed)
        after = echo.submit(0, wait_for=[failed])
        not_ready.wait()
        after.wait()
        return {
            "nested": echo.submit({"a": [two], "b": Box(two)}).result(),
            "allowed": echo.submit(allow_failure(failed)).result(),
            "cascade": echo.submit(allow_failure(not_ready)).result(),
            "late": echo.submit(1, wait_for=[allow_failure(failed)]).result(),
            "mapped": echo.map(double.map([1, 2]), unmapped([7, 8])).result(),
            "quoted": isinstance(echo.submit(quote(two)).result()[0], PrefectConcurrentFuture),
            "states": [not_ready.state.name, after.state.name],
        }

    seen = run(return_state=True).result(raise_on_failure=False)
    assert seen["nested"] == ({"a": [2], "b": Box(2)}, None)
    assert isinstance(seen["allowed"][0], ValueError)
    assert seen["cascade"] == (None, None)
    assert seen["late"] == (1, None)
    assert seen["mapped"] == [(2, [7, 8]), (4, [7, 8])]
    assert seen["quoted"]
    assert seen["states"] == ["NotReady", "NotReady"]


# -- tasks that use tasks


def test_tasks_may_call_and_submit_tasks() -> None:
    """A task awaits a child directly or submits it and awaits the future, also with a single slot."""

    @task
    async def parent() -> tuple[int, int]:
        return await double(1), await double.submit(2).result_async()

    @flow(task_runner=EventLoopTaskRunner(max_concurrency=1))
    def run() -> tuple[int, int]:
        return parent.submit().result(timeout=90)

    assert run() == (2, 4)


def test_sync_parents_can_wait_for_sync_children() -> None:
    """As many parents as there are threads can all wait for their children."""

    @task
    def child(number: int) -> int:
        return number + 1

    @task
    def parent(number: int) -> int:
        return child.submit(number).result(timeout=90)

    @flow(task_runner=EventLoopTaskRunner(max_threads=2, max_concurrency=2))
    def run() -> list[int]:
        return parent.map([1, 2, 3]).result(timeout=90)

    assert run() == [2, 3, 4]


@pytest.mark.parametrize(
    "block",
    [
        lambda future: future.result(),
        lambda future: future.wait(),
        lambda future: list(as_completed([future])),
    ],
    ids=["result", "wait", "as_completed"],
)
def test_blocking_the_loop_is_refused(block: Callable[[Any], object]) -> None:
    """A blocking wait on the loop would be a deadlock; it raises and says what to write instead."""

    @task
    async def parent() -> None:
        block(double.submit(1))

    @flow(task_runner=EventLoopTaskRunner())
    def run() -> None:
        parent.submit().result(timeout=90)

    with pytest.raises(RuntimeError, match="result_async"):
        run()


def test_exit_in_a_task_ends_only_that_task() -> None:
    """`sys.exit()` in one task leaves the loop to the others."""

    @task
    async def leave() -> None:
        sys.exit(3)

    @flow(task_runner=EventLoopTaskRunner())
    def run() -> int:
        with pytest.raises(SystemExit):
            leave.submit().result()
        return double.submit(4).result()

    assert run() == 8


# -- life of the runner


@pytest.mark.parametrize("fails", [False, True])
def test_submitted_tasks_are_waited_for(fails: bool) -> None:
    """When the flow function returns or raises, tasks already submitted run to their end."""
    done: list[int] = []

    @task
    async def work(number: int) -> None:
        await asyncio.sleep(0.5)
        assert current_interrupt() is None
        done.append(number)

    @flow(task_runner=EventLoopTaskRunner())
    def run() -> None:
        work.map(range(5))
        if fails:
            raise ValueError("the flow's own trouble")

    state = run(return_state=True)
    assert state.is_failed() == fails
    assert sorted(done) == list(range(5))


def test_flow_retries_start_anew() -> None:
    """A retried flow gets a new loop, and the old one's thread is gone."""
    threads: list[threading.Thread] = []

    @task
    async def thread() -> None:
        threads.append(threading.current_thread())

    @flow(task_runner=EventLoopTaskRunner(), retries=1)
    def run() -> int:
        thread.submit().result()
        if len(threads) == 1:
            raise ValueError("first time")
        return len(threads)

    assert run() == 2
    assert threads[0] is not threads[1]
    assert not any(thread.is_alive() for thread in threads)


def test_subflows_have_their_own_loop() -> None:
    """A subflow's tasks end with it, while its parent's go on."""

    @task
    async def wait(seconds: float) -> int:
        await asyncio.sleep(seconds)
        return threading.get_ident()

    @flow(task_runner=EventLoopTaskRunner())
    def child() -> int:
        return wait.submit(0.1).result()

    @flow(task_runner=EventLoopTaskRunner())
    def parent() -> tuple[int, int]:
        mine = wait.submit(1.0)
        theirs = child()
        return theirs, mine.result()

    theirs, mine = parent()
    assert theirs != mine


# Prefect leaves a sync client open behind an async flow; its socket is collected here, not in a later test.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
async def test_async_flows_can_await_futures() -> None:
    """In an async flow the tasks run on the background loop and the flow's own loop stays free."""

    @flow(task_runner=EventLoopTaskRunner())
    async def run() -> list[int]:
        futures = double.map([1, 2, 3])
        await asyncio.gather(*[future.wait_async() for future in futures])
        return [await future.result_async() for future in futures]

    assert await run() == [2, 4, 6]
    gc.collect()


def test_loop_exit_callbacks_run_once_after_the_last_task() -> None:
    """What is registered for the loop's exit is awaited on it at the end; one that fails hurts nobody."""
    events: list[str] = []

    async def close() -> None:
        await asyncio.sleep(0)
        events.append(f"closed on {threading.get_ident()}")

    async def stumble() -> None:
        raise OSError("already closed")

    @task
    async def work(first: bool) -> bool:
        registered = at_loop_exit(close) and at_loop_exit(stumble) if first else True
        await asyncio.sleep(0.3)
        events.append(f"worked on {threading.get_ident()}")
        return registered

    @task
    def sync_work() -> bool:
        return at_loop_exit(close)

    @flow(task_runner=EventLoopTaskRunner())
    def run() -> tuple[list[bool], bool]:
        return work.map([True, False]).result(), sync_work.submit().result()

    assert run() == ([True, True], False)
    assert [event.split()[0] for event in events] == ["worked", "worked", "closed"]
    assert len({event.split()[-1] for event in events}) == 1
    assert at_loop_exit(close) is False


def test_runner_is_a_value() -> None:
    """A runner can be duplicated, compared and pickled, even one in use."""
    runner = EventLoopTaskRunner(max_concurrency=5, max_threads=2, cancel_grace=1.5)
    with runner:
        copies = runner.duplicate(), cloudpickle.loads(cloudpickle.dumps(runner))
    assert all(copy == runner and copy is not runner for copy in copies)
    assert runner != EventLoopTaskRunner(max_concurrency=6, max_threads=2, cancel_grace=1.5)


def test_no_api_is_an_error_not_a_hang() -> None:
    """If the API can't be reached when the loop starts, `submit` raises."""
    with (
        temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}),
        EventLoopTaskRunner() as runner,
        pytest.raises(RuntimeError, match=r"127\.0\.0\.1:9"),
    ):
        runner.submit(double, {"number": 1})


# -- interrupts, on processes of their own


@dataclass
class Script:
    process: "subprocess.Popen[bytes]"
    log: Path

    def events(self) -> Counter[str]:
        """How often each event was noted, without the numbers of tasks."""
        lines = self.log.read_text().splitlines()
        return Counter(re.sub(r" \d+$", "", line) for line in lines)

    def wait_for(self, event: str, count: int) -> None:
        deadline = time.monotonic() + 120
        while self.events()[event] < count:
            assert time.monotonic() < deadline, f"no {count} x {event!r}: {self.events()}"
            time.sleep(0.1)


@contextmanager
def script(name: str, tmp_path: Path) -> Iterator[Script]:
    log = tmp_path / "events"
    log.touch()
    process = subprocess.Popen([sys.executable, str(HERE / "runner_flows.py"), name, str(log)])  # noqa: S603
    try:
        yield Script(process, log)
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    ("name", "signum", "tasks", "why"),
    [
        ("fan_out", signal.SIGINT, 30, "cancelled"),
        ("fan_out", signal.SIGTERM, 30, "terminated"),
        ("fire_and_forget", signal.SIGINT, 3, "cancelled"),
        ("async_fan_out", signal.SIGINT, 10, "cancelled"),
        ("async_fan_out", signal.SIGTERM, 10, "terminated"),
        ("parent", signal.SIGINT, 31, "cancelled"),
    ],
)
def test_interrupt_reaches_every_task(
    name: str, signum: signal.Signals, tasks: int, why: str, tmp_path: Path
) -> None:
    """Ctrl-C and SIGTERM cancel every running task and say why; queued ones never start."""
    with script(name, tmp_path) as run:
        run.wait_for("start", tasks)
        run.process.send_signal(signum)
        run.process.wait(60)  # half of what they would sleep
        events = run.events()
    assert events["start"] == events[f"told {why}"] == events["clean"] == tasks
    assert events["loop-exit"] == 1


def test_doubled_ctrl_c_still_lets_tasks_clean_up(tmp_path: Path) -> None:
    """Ctrl-C that arrives twice at once, from a terminal and a supervisor, counts as one."""
    with script("fan_out", tmp_path) as run:
        run.wait_for("start", 30)
        run.process.send_signal(signal.SIGINT)
        run.process.send_signal(signal.SIGINT)
        run.process.wait(60)
        assert run.events()["clean"] == 30


def test_another_ctrl_c_stops_waiting(tmp_path: Path) -> None:
    """A second Ctrl-C, a moment later, ends the wait for tasks that clean up."""
    with script("stubborn", tmp_path) as run:
        run.wait_for("start", 3)
        run.process.send_signal(signal.SIGINT)
        run.wait_for("told cancelled", 3)
        time.sleep(1)
        run.process.send_signal(signal.SIGINT)
        run.process.wait(60)
        assert run.events()["clean"] == 0


def test_clean_up_has_a_bound(tmp_path: Path) -> None:
    """After `cancel_grace` the process ends, whatever its tasks and threads are doing."""
    with script("short_grace", tmp_path) as run:
        run.wait_for("start", 3)
        run.wait_for("start thread", 1)
        run.process.send_signal(signal.SIGINT)
        run.process.wait(60)
        events = run.events()
    assert events["told cancelled"] == 3
    assert events["clean"] == events["end thread"] == 0


@pytest.fixture(scope="module")
def pool() -> Iterator[str]:
    """A process work pool with a real worker."""
    name = f"runner-{uuid4().hex[:8]}"
    command = [sys.executable, "-m", "prefect", "worker", "start", "--type", "process", "--pool", name]
    environment = {**os.environ, "PREFECT_WORKER_QUERY_SECONDS": "1"}
    worker = subprocess.Popen(command, env=environment, start_new_session=True)  # noqa: S603
    try:
        with get_client(sync_client=True) as client:
            deadline = time.monotonic() + 120
            named = {"work_pools": {"name": {"any_": [name]}}}  # other tests have pools of their own
            while not client.request("POST", "/work_pools/filter", json=named).json():
                assert time.monotonic() < deadline
                time.sleep(0.5)
        yield name
    finally:
        worker.terminate()
        worker.wait(60)


@pytest.mark.parametrize(
    ("how", "why", "final"), [("cancel", "cancelled", "Cancelled"), ("SIGTERM", "terminated", "Crashed")]
)
def test_interrupt_on_a_worker(how: str, why: str, final: str, pool: str, tmp_path: Path) -> None:
    """On a process worker, cancelling the run tells tasks "cancelled"; SIGTERM alone, "terminated"."""
    log = tmp_path / "events"
    log.touch()
    with get_client(sync_client=True) as client:
        flow_id = client.create_flow_from_name("fan-out")
        deployment = client.create_deployment(
            flow_id,
            f"fan-out-{how}",
            work_pool_name=pool,
            entrypoint="runner_flows.py:fan_out",
            path=str(HERE),
            parameters={"log": str(log)},
            enforce_parameter_schema=False,
        )
        run = client.create_flow_run_from_deployment(deployment)

        def state() -> str:
            found = client.read_flow_run(run.id).state
            return found.name if found else ""

        here = Script(None, log)  # the process is the worker's
        here.wait_for("start", 30)
        start = time.monotonic()
        if how == "cancel":
            command = [sys.executable, "-m", "prefect", "flow-run", "cancel", str(run.id)]
            subprocess.run(command, check=True)  # noqa: S603
        else:
            pid = next(line.split()[1] for line in log.read_text().splitlines() if line.startswith("pid"))
            os.kill(int(pid), signal.SIGTERM)
        while state() != final:
            assert time.monotonic() - start < 90, state()
            time.sleep(0.2)
    # All were told, so that none was killed: a worker does that after 30 s.
    events = here.events()
    assert events["start"] == events[f"told {why}"] == events["clean"] == 30
