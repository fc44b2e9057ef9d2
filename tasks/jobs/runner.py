"""`EventLoopTaskRunner`: many waits, one thread.

A Prefect task runner under which `.submit()` and `.map()` of async tasks all run on one event loop in one
background thread, with one API client. Prefect's own thread-pool runner gives every async task a thread, a
loop and a client of its own, and its tasks do not hear of a cancellation; under this runner they get
`asyncio.CancelledError` at once and have time to clean up. The loop itself is in `tasks.jobs.loop`.

Prefect 3.8 internals that this file rests on, and why:

- The flow engine enters `flow.task_runner.duplicate()` and leaves it, in the main thread, with the exception
  that ended the flow function, except that an ordinary `Exception` has been caught by then: what arrives in
  `__exit__` is nothing, or an interrupt (Ctrl-C, SIGTERM as `TerminationSignal`, a cancelled async flow).
  Its `cancel_all()` hook is called on the original, never on the duplicate in use, so it is of no help here.
- A sync flow joins its heartbeat thread before it leaves the runner, so tasks may hear of an interrupt up to
  a second late.
- The state of a flow run is final before the runner is left: a flow that does not wait for its futures is
  Completed while they still run, and stays so when they are interrupted.
- `PrefectConcurrentFuture._add_prefect_done_callback`: how `as_completed` and `wait(timeout=...)` block.
"""

import concurrent.futures
import threading
from collections.abc import Awaitable, Callable, Iterable
from types import TracebackType
from typing import Any, Self, TypeVar
from uuid import UUID

from prefect.client.schemas.objects import RunInput
from prefect.context import FlowRunContext
from prefect.futures import PrefectConcurrentFuture, PrefectFuture
from prefect.task_runners import TaskRunner
from prefect.tasks import Task

from tasks.jobs.loop import Interrupt, LoopSession, Submission, current_session, settled

__all__ = [
    "EventLoopFuture",
    "EventLoopTaskRunner",
    "Interrupt",
    "at_loop_exit",
    "current_interrupt",
    "limit_concurrency",
]

R = TypeVar("R")


def current_interrupt() -> Interrupt | None:
    """Say, inside a task that got `asyncio.CancelledError`, why it is being stopped.

    Returns:
        `"cancelled"` when a person asked for it: Ctrl-C, or the flow run was cancelled in the UI, CLI or API.
        `"terminated"` when only this process is to end (SIGTERM of its machine or container), or when the API
        could not be asked: the flow run may be started again, so remote work should be left alone.
        None when nothing is being stopped, and in tasks that run under another task runner.
    """
    session = current_session.get()
    return session.interrupt if session else None


def at_loop_exit(callback: Callable[[], Awaitable[object]]) -> bool:
    """Have `callback` awaited on the runner's event loop after its last task, before the loop closes.

    For what tasks share on the loop, such as an HTTP client. Callbacks run in reverse order and have
    5 seconds together; what they raise is logged.

    Returns:
        False, with nothing registered, when the caller is not on the loop of an `EventLoopTaskRunner`.
    """
    session = current_session.get()
    return session is not None and session.add_closer(callback)


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
        await settled(self)
        self.wait()

    async def result_async(self, raise_on_failure: bool = True) -> R:
        """Wait for the result of the task run without blocking the event loop of the caller."""
        await settled(self)
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


class EventLoopTaskRunner(TaskRunner[PrefectFuture[Any]]):
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
        self._live: LoopSession | None = None
        self.max_concurrency: int | None = None
        self.limit(max_concurrency)

    def limit(self, max_concurrency: int | None) -> None:
        """Set `max_concurrency`, as long as no task has been submitted; see `limit_concurrency`."""
        if max_concurrency is not None and max_concurrency < 1:
            raise ValueError(
                f"max_concurrency must be at least 1, or None for no bound; got {max_concurrency}."
            )
        if self._live is not None and max_concurrency != self.max_concurrency:
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
                self._live = LoopSession(*self._settings(), self.logger)
        call = Submission(task, parameters, wait_for, dependencies)
        self._live.submit(call)
        return EventLoopFuture(call.task_run_id, call.outcome, self._live.thread_id)

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if self._live is not None:
                self._live.end(exc_value)
        finally:
            self._live = None
            super().__exit__(exc_type, exc_value, traceback)
