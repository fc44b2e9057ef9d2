"""The event loop behind `EventLoopTaskRunner`: its thread, its tasks, and how they end.

Prefect 3.8 internals that this file rests on, and why:

- `run_task_async` / `run_task_sync` (`prefect.task_engine`): what every Prefect task runner calls.
- `AsyncClientContext.__var__`: the engine reuses the client found there when it belongs to the running loop.
  Entering the same context object once per task would close the client under the others, so it is only set.
- `PREFECT__FLOW_RUN_ID`: the flow run that a worker or `serve()` started this process for.
- The flow engine leaves the exception that failed a flow in the state of the context's flow run.
"""

import asyncio
import atexit
import concurrent.futures
import functools
import gc
import logging
import os
import signal
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from contextlib import AsyncExitStack, nullcontext, suppress
from contextvars import Context, ContextVar, copy_context
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, cast
from uuid import UUID

from httpx import HTTPError
from prefect._internal.result_records import ResultRecord
from prefect._internal.uuid7 import uuid7
from prefect.client.schemas.objects import FlowRun, RunInput, State
from prefect.context import AsyncClientContext, FlowRunContext
from prefect.exceptions import TerminationSignal
from prefect.futures import PrefectConcurrentFuture, PrefectFuture
from prefect.task_engine import run_task_async, run_task_sync
from prefect.tasks import Task
from prefect.utilities.annotations import quote
from prefect.utilities.collections import StopVisiting, visit_collection

from tasks.jobs.attempt import current_attempt, stop_if_superseded
from tasks.jobs.threads import start_thread

Interrupt = Literal["cancelled", "terminated"]
T = TypeVar("T")

_API_SECONDS = 3.0  # for the one question to the API when a flow run is interrupted
_REPEAT_SECONDS = 0.5  # in which a second SIGINT is the same Ctrl-C, passed on by make or a supervisor
_LOOK_SECONDS = 15.0  # that a look at the run is good for; who is taken for dead has been silent for longer
_CLOSE_SECONDS = 5.0  # for everything that was registered with `add_closer`


@dataclass(eq=False)
class Submission:
    """One call of `submit`, with the context variables of its caller."""

    task: Task[Any, Any]
    parameters: dict[str, Any]
    wait_for: Iterable[PrefectFuture[Any]] | None
    dependencies: dict[str, set[RunInput]] | None
    task_run_id: UUID = field(default_factory=uuid7)
    context: Context = field(default_factory=copy_context)
    outcome: concurrent.futures.Future[State[Any]] = field(default_factory=concurrent.futures.Future)

    def engine_arguments(self) -> dict[str, Any]:
        """What Prefect's task engine is called with."""
        return {
            "task": self.task,
            "task_run_id": self.task_run_id,
            "parameters": self.parameters,
            "wait_for": self.wait_for,
            "return_type": "state",
            "dependencies": self.dependencies,
        }


class LoopSession:
    """The event loop, its thread and its tasks, from the first submitted task to the end of the flow run."""

    def __init__(
        self, max_concurrency: int | None, max_threads: int, cancel_grace: float, logger: logging.Logger
    ) -> None:
        self.interrupt: Interrupt | None = None
        flow_context = FlowRunContext.get()
        self._flow_run: FlowRun | None = flow_context.flow_run if flow_context else None
        self._attempt = current_attempt()
        self._looked = 0.0
        self._looking = asyncio.Lock()
        self._closers = AsyncExitStack()
        self._grace = cancel_grace
        self._logger = logger
        self._slots = asyncio.Semaphore(max_concurrency) if max_concurrency else None
        self._threads = asyncio.Semaphore(max_threads)
        self._tasks: dict[asyncio.Task[State[Any] | BaseException], Submission] = {}
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
        # A signal that hits Python's own `with` machinery skips every `__exit__` of the flow engine.
        atexit.register(self.end, KeyboardInterrupt())

    # -- in the thread of the flow

    @property
    def thread_id(self) -> int | None:
        """The identifier of the loop's thread."""
        return self._thread.ident

    def submit(self, call: Submission) -> None:
        """Have the call run; from any thread."""
        self._loop.call_soon_threadsafe(self._begin, call, current_session.get() is self)

    def end(self, error: BaseException | None) -> None:
        """Wait for the tasks, or stop them if `error` is an interrupt or one comes while waiting."""
        late: BaseException | None = None
        error = error or self._interrupt_behind_failure()
        if not _is_interrupt(error):
            try:
                self._call(self._drain()).result()
            except BaseException as exc:  # noqa: BLE001  # a signal cut the wait short; raised again below
                error = late = exc
        try:
            if _is_interrupt(error):
                outer = current_session.get()
                inherited = outer.interrupt if outer else None
                known = "cancelled" if _came_from_keyboard(error) else inherited
                self._wait_out(self._call(self._cancel(known)))
        finally:
            atexit.unregister(self.end)
            self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join(_API_SECONDS + _CLOSE_SECONDS)
        if late is not None:
            raise late

    def _interrupt_behind_failure(self) -> BaseException | None:
        # Two signals at once (a terminal's and a supervisor's) break Python's locks: the flow fails by a
        # "RuntimeError: release unlocked lock" that was raised while a KeyboardInterrupt was on its way.
        state = self._flow_run.state if self._flow_run else None
        data: Any = state.data if state else None
        error = data.result if isinstance(data, ResultRecord) else data
        while isinstance(error, BaseException) and not _is_interrupt(error):
            error = error.__context__
        return error if isinstance(error, BaseException) else None

    def _call(self, coroutine: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def _wait_out(self, cleanup: concurrent.futures.Future[None]) -> None:
        # Supervisors repeat signals; only a person, by a later Ctrl-C, says that the clean-up may be cut.
        began = time.monotonic()
        bound = began + _API_SECONDS + self._grace + 1
        while not cleanup.done():
            try:
                cleanup.result(max(0.0, bound - time.monotonic()))
            except TerminationSignal:
                continue
            except TimeoutError:  # a task blocks the loop
                self._logger.warning("The event loop does not answer; its tasks are abandoned.")
                return
            except KeyboardInterrupt:
                if time.monotonic() > began + _REPEAT_SECONDS:
                    raise

    # -- in the thread of the loop

    def add_closer(self, callback: Callable[[], Awaitable[object]]) -> bool:
        """Have `callback` awaited before the loop closes; False if this is not the loop's thread."""
        if threading.get_ident() != self.thread_id:
            return False
        self._closers.push_async_callback(_as_coroutine, callback)
        return True

    def _main(self, started: concurrent.futures.Future[AsyncClientContext]) -> None:
        # Hundreds of tasks set the garbage collector off again and again. It need not search each time what
        # was there before them, which is all that has been imported: a sixth of the CPU of 500 syncs.
        gc.freeze()
        try:
            self._loop.run_until_complete(self._serve(started))
        except BaseException as exc:  # no API, for one: the flow must hear of it, not wait for ever
            if started.done():
                raise
            started.set_exception(exc)
        finally:
            self._loop.close()
            gc.unfreeze()

    async def _serve(self, started: concurrent.futures.Future[AsyncClientContext]) -> None:
        async with AsyncClientContext() as client:
            started.set_result(client)
            await self._end.wait()
            try:
                async with asyncio.timeout(_CLOSE_SECONDS):
                    await self._closers.aclose()
            except Exception:  # whatever it is, the flow's work is done: nothing to fail any more
                self._logger.warning("A callback of at_loop_exit() failed.", exc_info=True)
        if not self._tasks:  # else their generators are still in use
            await self._loop.shutdown_asyncgens()

    def _begin(self, call: Submission, nested: bool) -> None:
        if self._stopping:
            self._deliver(call, asyncio.CancelledError())
            return
        task = self._loop.create_task(self._drive(call, nested), context=call.context)
        self._tasks[task] = call
        task.add_done_callback(self._finish)

    def _finish(self, task: asyncio.Task[State[Any] | BaseException]) -> None:
        # Here and not in the coroutine, which never runs if it is cancelled before its first step.
        call = self._tasks.pop(task)
        error = asyncio.CancelledError() if task.cancelled() else task.exception()
        self._deliver(call, error or task.result())

    def _deliver(self, call: Submission, outcome: State[Any] | BaseException) -> None:
        if self._stopping:
            # A signal may have left the lock of a waiter, which futures notify, taken for ever.
            threading.Thread(target=_settle, args=(call.outcome, outcome), daemon=True).start()
        else:
            _settle(call.outcome, outcome)

    async def _drive(self, call: Submission, nested: bool) -> State[Any] | BaseException:
        try:
            return await self._run(call, nested)
        except (KeyboardInterrupt, SystemExit) as exc:
            return exc  # raised, either of them would end the loop under all the other tasks

    async def _run(self, call: Submission, nested: bool) -> State[Any]:
        # The engine resolves futures by a blocking wait, which on this loop would be a deadlock, so they are
        # waited for before it starts; and before a slot is taken, which the awaited tasks may need.
        for dependency in futures_in(call.parameters, call.wait_for):
            await settled(dependency)
        thread = nullcontext() if nested or call.task.isasync else self._threads
        slot = nullcontext() if nested or self._slots is None else self._slots
        async with thread, slot:
            if self._stopping:
                raise asyncio.CancelledError
            await self._stop_if_superseded()
            current_session.set(self)
            if not call.task.isasync:
                return await self._run_in_thread(call)
            AsyncClientContext.__var__.set(self._client)
            # return_type="state", so it is one; the signature can't tell.
            return cast("State[Any]", await run_task_async(**call.engine_arguments()))

    async def _stop_if_superseded(self) -> None:
        """Start nothing after a sleep in which the run was given to another process."""
        if self._flow_run is None:
            return
        async with self._looking:  # one for all that begin at this moment
            # The clock on the wall: the others stand still while a machine is suspended.
            if abs(time.time() - self._looked) < _LOOK_SECONDS:
                return
            with suppress(HTTPError):  # a server that is away has nothing against it
                await stop_if_superseded(self._client.client, self._flow_run.id, self._attempt)
            self._looked = time.time()

    async def _run_in_thread(self, call: Submission) -> State[Any]:
        cancel_event = threading.Event()  # Prefect looks at it before it calls the task's function
        work = functools.partial(
            run_task_sync, **call.engine_arguments(), context={"cancel_event": cancel_event}
        )
        waiter = asyncio.wrap_future(start_thread(cast("Callable[[], State[Any]]", work), call.task.name))
        try:
            return await asyncio.shield(waiter)
        except asyncio.CancelledError:
            cancel_event.set()
            return await waiter

    async def _drain(self) -> None:
        while self._tasks:
            await asyncio.wait(self._tasks)

    async def _cancel(self, known: Interrupt | None) -> None:
        self._stopping = True
        deadline = time.monotonic() + self._grace
        self.interrupt = known or ("cancelled" if await self._is_cancelled_in_api() else "terminated")
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=max(0.0, deadline - time.monotonic()))
        for call in self._tasks.values():
            self._logger.warning("%s did not end within %s s; it is abandoned.", call.task.name, self._grace)
            self._deliver(call, asyncio.CancelledError())

    async def _is_cancelled_in_api(self) -> bool:
        # A subflow in this process is stopped because the run that the process was started for is cancelled.
        flow_run_id = os.environ.get("PREFECT__FLOW_RUN_ID") or (self._flow_run and self._flow_run.id)
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


current_session: ContextVar[LoopSession | None] = ContextVar("event_loop_session", default=None)


async def _as_coroutine(callback: Callable[[], Awaitable[object]]) -> None:
    await callback()


def _settle(future: concurrent.futures.Future[State[Any]], outcome: State[Any] | BaseException) -> None:
    with suppress(concurrent.futures.InvalidStateError):  # an abandoned task that ended after all
        if isinstance(outcome, BaseException):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)


def futures_in(*expressions: Any) -> list[PrefectFuture[Any]]:
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


async def settled(future: PrefectFuture[Any]) -> None:
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
