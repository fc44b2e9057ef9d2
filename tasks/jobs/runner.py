"""`EventLoopTaskRunner`: many waits, one thread.

A Prefect task runner under which `.submit()` and `.map()` of async tasks all run on one event loop in one
background thread, with one API client. Prefect's own thread-pool runner gives every async task a thread, a
loop and a client of its own, and its tasks do not hear of a cancellation; under this runner they get
`asyncio.CancelledError` at once and have time to clean up.

Prefect 3.8 internals that this file rests on, and why:

- `run_task_async` / `run_task_sync` (`prefect.task_engine`): what every Prefect task runner calls.
- The flow engine enters `flow.task_runner.duplicate()` and leaves it, in the main thread, with the exception
  that ended the flow function, except that an ordinary `Exception` has been caught by then: what arrives in
  `__exit__` is nothing, or an interrupt (Ctrl-C, SIGTERM as `TerminationSignal`, a cancelled async flow).
  Its `cancel_all()` hook is called on the original, never on the duplicate in use, so it is of no help here.
- `AsyncClientContext.__var__`: the engine reuses the client found there when it belongs to the running loop.
  Entering the same context object once per task would close the client under the others, so it is only set.
- `PrefectConcurrentFuture._add_prefect_done_callback`: how `as_completed` and `wait(timeout=...)` block.
- `PREFECT__FLOW_RUN_ID`: the flow run that a worker or `serve()` started this process for.
"""

import asyncio
import concurrent.futures
import functools
import logging
import os
import signal
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from contextlib import AsyncExitStack, nullcontext, suppress
from contextvars import Context, ContextVar, copy_context
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal, Self, TypeVar, cast
from uuid import UUID

from prefect._internal.uuid7 import uuid7
from prefect.client.schemas.objects import RunInput, State
from prefect.context import AsyncClientContext, FlowRunContext
from prefect.exceptions import TerminationSignal
from prefect.futures import PrefectConcurrentFuture, PrefectFuture
from prefect.task_engine import run_task_async, run_task_sync
from prefect.task_runners import TaskRunner
from prefect.tasks import Task
from prefect.utilities.annotations import quote
from prefect.utilities.collections import StopVisiting, visit_collection

__all__ = [
    "EventLoopFuture",
    "EventLoopTaskRunner",
    "Interrupt",
    "at_loop_exit",
    "current_interrupt",
    "limit_concurrency",
]

Interrupt = Literal["cancelled", "terminated"]
R = TypeVar("R")
T = TypeVar("T")

_API_SECONDS = 3.0  # for the one question to the API when a flow run is interrupted
_CLOSE_SECONDS = 5.0  # for everything that was registered with `at_loop_exit`


def current_interrupt() -> Interrupt | None:
    """Say, inside a task that got `asyncio.CancelledError`, why it is being stopped.

    Returns:
        `"cancelled"` when a person asked for it: Ctrl-C, or the flow run was cancelled in the UI, CLI or API.
        `"terminated"` when only this process is to end (SIGTERM of its machine or container), or when the API
        could not be asked: the flow run may be started again, so remote work should be left alone.
        None when nothing is being stopped, and in tasks that run under another task runner.
    """
    session = _session.get()
    return session.interrupt if session else None


def at_loop_exit(callback: Callable[[], Awaitable[object]]) -> bool:
    """Have `callback` awaited on the runner's event loop after its last task, before the loop closes.

    For what tasks share on the loop, such as an HTTP client. Callbacks run in reverse order and have
    5 seconds together; what they raise is logged.

    Returns:
        False, with nothing registered, when the caller is not on the loop of an `EventLoopTaskRunner`.
    """
    session = _session.get()
    if session is None or not session.owns_this_thread():
        return False
    session.closers.push_async_callback(_as_coroutine, callback)
    return True


def limit_concurrency(max_concurrency: int | None) -> None:
    """Set the `max_concurrency` of the running flow's task runner, for flows that take it as a parameter.

    Args:
        max_concurrency: The most tasks that may run at a time; None for no bound.

    Raises:
        RuntimeError: Outside of a flow run, in one with another task runner, or after the first `.submit()`.
        ValueError: If the number is not positive.
    """
    context = FlowRunContext.get()
    runner = context.task_runner if context else None
    if not isinstance(runner, EventLoopTaskRunner):
        raise RuntimeError("limit_concurrency() works inside a flow that has an EventLoopTaskRunner.")  # noqa: TRY004  # the place is wrong, not a type
    runner.limit(max_concurrency)


class EventLoopFuture(PrefectConcurrentFuture[R]):
    """The future of a task under `EventLoopTaskRunner`.

    Beside Prefect's blocking methods it has `wait_async` and `result_async`, for async flows and for tasks
    that submit other tasks. A blocking call on the runner's own loop would wait for ever, so it raises.
    """

    def __init__(
        self, task_run_id: UUID, wrapped_future: concurrent.futures.Future[R], loop_thread: int | None
    ):
        super().__init__(task_run_id, wrapped_future)
        self._loop_thread = loop_thread

    def wait(self, timeout: float | None = None) -> None:
        """Block until the task run is done or `timeout` seconds have passed."""
        self._refuse_deadlock()
        super().wait(timeout)

    def result(self, timeout: float | None = None, raise_on_failure: bool = True) -> R:
        """Block for the result of the task run; see `PrefectConcurrentFuture.result`."""
        self._refuse_deadlock()
        return super().result(timeout, raise_on_failure)

    async def wait_async(self) -> None:
        """Wait for the task run without blocking the event loop of the caller."""
        await _settled(self)
        self.wait()

    async def result_async(self, raise_on_failure: bool = True) -> R:
        """Wait for the result of the task run without blocking the event loop of the caller."""
        await _settled(self)
        return self.result(raise_on_failure=raise_on_failure)

    def _add_prefect_done_callback(self, fn: Callable[[PrefectFuture[R]], None]) -> None:
        self._refuse_deadlock()
        super()._add_prefect_done_callback(fn)

    def _refuse_deadlock(self) -> None:
        if threading.get_ident() == self._loop_thread and not self.wrapped_future.done():
            raise RuntimeError(
                "A task on the event loop of EventLoopTaskRunner would block that loop, and with it the task "
                "it waits for. Write `await future.result_async()` (or `await future.wait_async()`), or call "
                "the other task directly: `await other_task(...)`."
            )


class EventLoopTaskRunner(TaskRunner[EventLoopFuture[Any]]):
    """Runs the async tasks of a flow on one event loop, and its sync tasks on a few threads.

    When the flow function returns or fails, tasks that it has submitted are waited for: a failed flow does
    not stop healthy work. When the flow run is interrupted (Ctrl-C, SIGTERM, cancelled in the UI or CLI),
    tasks that have not begun never begin, and running ones get `asyncio.CancelledError` and up to
    `cancel_grace` seconds to clean up (`current_interrupt()` tells them why); a sync task can't be stopped,
    so it is waited for that long. Another Ctrl-C ends the waiting.

    A task that is submitted by a task of the same flow takes no place in `max_concurrency` or `max_threads`:
    its parent, which may be waiting for it, holds one already.

    Args:
        max_concurrency: The most tasks that may run at a time; None for no bound. Tasks that wait for another
            task's result do not count.
        max_threads: The most sync tasks that may run at a time.
        cancel_grace: Seconds that interrupted tasks have to clean up. A process worker kills after 30.

    Raises:
        ValueError: If a bound is not positive or the grace is negative.

    Example:
        ```python
        @flow(task_runner=EventLoopTaskRunner(max_concurrency=100))
        def refresh(names: list[str]) -> list[str]:
            return sync.map(names).result()      # `sync` is an async task
        ```
    """

    def __init__(
        self, max_concurrency: int | None = None, max_threads: int = 8, cancel_grace: float = 20.0
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # prefect has no annotation there
        if max_threads < 1 or cancel_grace < 0:
            raise ValueError("max_threads must be at least 1, and cancel_grace not negative.")
        self.max_threads = max_threads
        self.cancel_grace = cancel_grace
        self._lock = threading.Lock()
        self._live: _Session | None = None
        self.limit(max_concurrency)

    def limit(self, max_concurrency: int | None) -> None:
        """Set `max_concurrency`, as long as no task has been submitted; see `limit_concurrency`."""
        if max_concurrency is not None and max_concurrency < 1:
            raise ValueError(
                f"max_concurrency must be at least 1, or None for no bound; got {max_concurrency}."
            )
        if self._live is not None:
            raise RuntimeError("max_concurrency can't change after the first task was submitted.")
        self.max_concurrency = max_concurrency

    def _settings(self) -> tuple[int | None, int, float]:
        return self.max_concurrency, self.max_threads, self.cancel_grace

    def duplicate(self) -> Self:
        """Return a new, not started runner with the same settings."""
        return type(self)(*self._settings())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, EventLoopTaskRunner) and self._settings() == other._settings()

    __hash__ = None  # type: ignore[assignment]  # equal by settings that can change, like Prefect's own

    def __reduce__(self) -> tuple[Any, ...]:
        # Prefect pickles a flow with its runner for a subprocess: locks and threads stay behind.
        return type(self), self._settings()

    # One signature for Prefect's overloads: they only tell sync tasks from async ones.
    def submit(
        self,
        task: Task[Any, Any],
        parameters: dict[str, Any],
        wait_for: Iterable[PrefectFuture[Any]] | None = None,
        dependencies: dict[str, set[RunInput]] | None = None,
    ) -> EventLoopFuture[Any]:
        """Start a task run, once the futures among its parameters and in `wait_for` are done.

        Args:
            task: The task, sync or async.
            parameters: Its parameters; futures in them are replaced by their results.
            wait_for: Futures that must be done first.
            dependencies: Task run inputs that `map` has found already.

        Returns:
            The future of the task run.

        Raises:
            RuntimeError: If the runner is not started, that is, outside of its flow run.
        """
        if not self._started:
            raise RuntimeError("The task runner must be started before submitting work.")
        with self._lock:
            if self._live is None:
                self._live = _Session(self.max_concurrency, self.max_threads, self.logger)
        return self._live.submit(_Submission(task, parameters, wait_for, dependencies))

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if self._live is not None:
                self._live.end(exc_value, self.cancel_grace)
        finally:
            self._live = None
            super().__exit__(exc_type, exc_value, traceback)


@dataclass(eq=False)
class _Submission:
    """One call of `submit`, with the context variables of its caller."""

    task: Task[Any, Any]
    parameters: dict[str, Any]
    wait_for: Iterable[PrefectFuture[Any]] | None
    dependencies: dict[str, set[RunInput]] | None
    task_run_id: UUID = field(default_factory=uuid7)
    context: Context = field(default_factory=copy_context)
    outcome: concurrent.futures.Future[State[Any]] = field(default_factory=concurrent.futures.Future)

    def engine_arguments(self) -> dict[str, Any]:
        return {
            "task": self.task,
            "task_run_id": self.task_run_id,
            "parameters": self.parameters,
            "wait_for": self.wait_for,
            "return_type": "state",
            "dependencies": self.dependencies,
        }


class _Session:
    """The event loop, its thread and its tasks, from the first submitted task to the end of the flow run."""

    def __init__(self, max_concurrency: int | None, max_threads: int, logger: logging.Logger) -> None:
        self.interrupt: Interrupt | None = None
        self.closers = AsyncExitStack()
        flow_context = FlowRunContext.get()
        self._flow_run_id = flow_context.flow_run.id if flow_context and flow_context.flow_run else None
        self._logger = logger
        self._slots = asyncio.Semaphore(max_concurrency) if max_concurrency else None
        self._threads = asyncio.Semaphore(max_threads)
        self._tasks: dict[asyncio.Task[None], _Submission] = {}
        self._stopping = False
        self._end = asyncio.Event()
        self._loop = asyncio.new_event_loop()
        started: concurrent.futures.Future[AsyncClientContext] = concurrent.futures.Future()
        # A daemon, so that a task which ignores its cancellation can't keep the process alive.
        self._thread = threading.Thread(
            target=copy_context().run, args=(self._main, started), name="event-loop-tasks", daemon=True
        )
        self._thread.start()
        self._client = started.result()

    # -- in the thread of the flow

    def owns_this_thread(self) -> bool:
        return threading.get_ident() == self._thread.ident

    def submit(self, call: _Submission) -> EventLoopFuture[Any]:
        future = EventLoopFuture(call.task_run_id, call.outcome, self._thread.ident)
        self._loop.call_soon_threadsafe(self._begin, call, _session.get() is self)
        return future

    def end(self, error: BaseException | None, grace: float) -> None:
        """Wait for the tasks, or stop them if `error` is an interrupt or one comes while waiting."""
        late: BaseException | None = None
        if not _is_interrupt(error):
            try:
                self._call(self._drain()).result()
            except BaseException as exc:  # noqa: BLE001  # a signal cut the wait short; raised again below
                error = late = exc
        try:
            if _is_interrupt(error):
                known = "cancelled" if _came_from_keyboard(error) else current_interrupt()
                self._wait_out(self._call(self._cancel(known, grace)))
        finally:
            self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join(_API_SECONDS + _CLOSE_SECONDS)
        if late is not None:
            raise late

    def _call(self, coroutine: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def _wait_out(self, cleanup: concurrent.futures.Future[None]) -> None:
        # Supervisors repeat SIGTERM; only a person, by Ctrl-C, says that the clean-up is not worth the wait.
        while not cleanup.done():
            with suppress(TerminationSignal):
                cleanup.result()

    # -- in the thread of the loop

    def _main(self, started: concurrent.futures.Future[AsyncClientContext]) -> None:
        try:
            self._loop.run_until_complete(self._serve(started))
        except BaseException as exc:  # no API, for one: the flow must hear of it, not wait for ever
            if started.done():
                raise
            started.set_exception(exc)
        finally:
            self._loop.close()

    async def _serve(self, started: concurrent.futures.Future[AsyncClientContext]) -> None:
        async with AsyncClientContext() as client:
            started.set_result(client)
            await self._end.wait()
            try:
                async with asyncio.timeout(_CLOSE_SECONDS):
                    await self.closers.aclose()
            except Exception:  # whatever it is, the flow's work is done: nothing to fail any more
                self._logger.warning("A callback of at_loop_exit() failed.", exc_info=True)
        if not self._tasks:  # else their generators are still in use
            await self._loop.shutdown_asyncgens()

    def _begin(self, call: _Submission, nested: bool) -> None:
        if self._stopping:
            call.outcome.set_exception(asyncio.CancelledError())
            return
        task = self._loop.create_task(self._drive(call, nested), context=call.context)
        self._tasks[task] = call
        task.add_done_callback(self._finish)

    def _finish(self, task: asyncio.Task[None]) -> None:
        # Here and not in the coroutine, which never runs if it is cancelled before its first step.
        call = self._tasks.pop(task)
        if call.outcome.done():
            return
        error = asyncio.CancelledError() if task.cancelled() else task.exception()
        if error is not None:
            call.outcome.set_exception(error)

    async def _drive(self, call: _Submission, nested: bool) -> None:
        try:
            call.outcome.set_result(await self._run(call, nested))
        except (KeyboardInterrupt, SystemExit) as exc:
            # asyncio would end the loop under all the other tasks for these two.
            call.outcome.set_exception(exc)

    async def _run(self, call: _Submission, nested: bool) -> State[Any]:
        # The engine resolves futures by a blocking wait, which on this loop would be a deadlock, so they are
        # waited for before it starts; and before a slot is taken, which the awaited tasks may need.
        for dependency in _futures_in(call.parameters, call.wait_for):
            await _settled(dependency)
        thread = nullcontext() if nested or call.task.isasync else self._threads
        slot = nullcontext() if nested or self._slots is None else self._slots
        async with thread, slot:
            if self._stopping:
                raise asyncio.CancelledError
            _session.set(self)
            if not call.task.isasync:
                return await self._run_in_thread(call)
            AsyncClientContext.__var__.set(self._client)
            # return_type="state", so it is one; the signature can't tell.
            return cast("State[Any]", await run_task_async(**call.engine_arguments()))

    async def _run_in_thread(self, call: _Submission) -> State[Any]:
        outcome: concurrent.futures.Future[State[Any]] = concurrent.futures.Future()
        cancel_event = threading.Event()  # Prefect looks at it before it calls the task's function
        work = functools.partial(
            run_task_sync, **call.engine_arguments(), context={"cancel_event": cancel_event}
        )
        # Not a ThreadPoolExecutor: Python waits for its threads at exit, however long they take.
        threading.Thread(
            target=copy_context().run, args=(_fulfil, outcome, work), name=call.task.name, daemon=True
        ).start()
        waiter = asyncio.wrap_future(outcome)
        try:
            return await asyncio.shield(waiter)
        except asyncio.CancelledError:
            cancel_event.set()
            return await waiter

    async def _drain(self) -> None:
        while self._tasks:
            await asyncio.wait(self._tasks)

    async def _cancel(self, known: Interrupt | None, grace: float) -> None:
        self._stopping = True
        deadline = time.monotonic() + grace
        self.interrupt = known or ("cancelled" if await self._is_cancelled_in_api() else "terminated")
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=max(0.0, deadline - time.monotonic()))
        for call in self._tasks.values():
            self._logger.warning("%s did not end within %s s; it is abandoned.", call.task.name, grace)
            if not call.outcome.done():
                call.outcome.set_exception(asyncio.CancelledError())

    async def _is_cancelled_in_api(self) -> bool:
        # A subflow in this process is stopped because the run that the process was started for is cancelled.
        flow_run_id = os.environ.get("PREFECT__FLOW_RUN_ID") or self._flow_run_id
        if flow_run_id is None:
            return False
        try:
            async with asyncio.timeout(_API_SECONDS):
                flow_run = await self._client.client.read_flow_run(UUID(str(flow_run_id)))
        except Exception:  # unreachable, slow or broken: what a cancelled run is told can't be known
            self._logger.warning(
                "Could not ask why the flow run is stopped; taken as terminated.", exc_info=True
            )
            return False
        return flow_run.state is not None and (
            flow_run.state.is_cancelling() or flow_run.state.is_cancelled()
        )


_session: ContextVar[_Session | None] = ContextVar("event_loop_session", default=None)


async def _as_coroutine(callback: Callable[[], Awaitable[object]]) -> None:
    await callback()


def _fulfil(outcome: concurrent.futures.Future[T], work: Callable[[], T]) -> None:
    try:
        outcome.set_result(work())
    except BaseException as exc:  # noqa: BLE001  # the task's waiter gets it, as from any executor
        outcome.set_exception(exc)


def _futures_in(*expressions: Any) -> list[PrefectFuture[Any]]:
    """Find the futures that the engine is going to resolve, walking as `resolve_to_final_result` does."""
    found: list[PrefectFuture[Any]] = []

    def note(expression: Any, context: dict[str, Any]) -> Any:
        if isinstance(context.get("annotation"), quote):
            raise StopVisiting
        if isinstance(expression, PrefectFuture):
            found.append(expression)
        return expression

    visit_collection(expressions, note, return_data=False, context={})
    return found


async def _settled(future: PrefectFuture[Any]) -> None:
    """Wait until `future` is done, whatever its state, without blocking the running loop."""
    if isinstance(future, PrefectConcurrentFuture):
        loop, done = asyncio.get_running_loop(), asyncio.Event()

        def wake(_: object) -> None:
            with suppress(RuntimeError):  # this waiter was cancelled and its loop is closed
                loop.call_soon_threadsafe(done.set)

        future.wrapped_future.add_done_callback(wake)
        await done.wait()
    elif hasattr(future, "wait_async"):  # a task or flow run in another process
        await future.wait_async()
    else:
        await asyncio.to_thread(future.wait)


def _is_interrupt(error: BaseException | None) -> bool:
    # Closing a generator flow is no interrupt: its caller has had enough of its values.
    return error is not None and not isinstance(error, Exception | GeneratorExit)


def _came_from_keyboard(error: BaseException | None) -> bool:
    if isinstance(error, KeyboardInterrupt):
        return True
    # In an async flow, asyncio turns Ctrl-C into a CancelledError; only its signal handler knows.
    handler = getattr(signal.getsignal(signal.SIGINT), "func", None)
    runner = getattr(handler, "__self__", None)
    return isinstance(runner, asyncio.Runner) and getattr(runner, "_interrupt_count", 0) > 0
