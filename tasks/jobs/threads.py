"""Blocking work in threads that nobody has to wait for.

Not in a ThreadPoolExecutor, and so not by `asyncio.to_thread`: Python waits for its threads at exit, however
long they take, and a Ctrl-C would not end a process before a query does that runs for an hour.
"""

import asyncio
import concurrent.futures
import threading
from collections.abc import Callable
from contextvars import ContextVar, copy_context
from typing import TypeVar

T = TypeVar("T")

_STOP_SECONDS = 5.0
_gone: ContextVar[threading.Event | None] = ContextVar("waiter_is_gone", default=None)


class WaiterGone(Exception):
    """Nobody waits for this work any more, so it is not to be finished."""


def start_thread(work: Callable[[], T], name: str | None = None) -> concurrent.futures.Future[T]:
    """Do something in a daemon thread, with the caller's context variables.

    Args:
        work: What to do.
        name: The thread's.
    """
    outcome: concurrent.futures.Future[T] = concurrent.futures.Future()
    outcome.set_running_or_notify_cancel()  # from now on it can't be cancelled, only left alone
    threading.Thread(target=copy_context().run, args=(_fulfil, outcome, work), name=name, daemon=True).start()
    return outcome


async def in_thread(work: Callable[[], T], *, stop: Callable[[], object] | None = None) -> T:
    """What `asyncio.to_thread` does, in a thread that does not outlive the process.

    If this is cancelled, the thread goes on; `check_waiter` tells it so.

    Args:
        work: What to do.
        stop: What makes it end early when this is cancelled, called in another thread; it is given some
            seconds for that.
    """
    gone = threading.Event()
    token = _gone.set(gone)
    try:
        waiter = asyncio.wrap_future(start_thread(work))
    finally:
        _gone.reset(token)
    try:
        return await asyncio.shield(waiter)
    except asyncio.CancelledError:
        gone.set()
        if stop is not None:
            # A thread in the middle of a driver's native code may abort a process that ends under it.
            start_thread(stop)
            await asyncio.wait([waiter], timeout=_STOP_SECONDS)
        if not waiter.cancel():
            waiter.exception()  # looked at, or asyncio complains that nobody has
        raise


def check_waiter() -> None:
    """To be called by work of `in_thread` before what can't be undone.

    Raises:
        WaiterGone: Nobody waits for it any more.
    """
    gone = _gone.get()
    if gone is not None and gone.is_set():
        raise WaiterGone


def _fulfil(outcome: concurrent.futures.Future[T], work: Callable[[], T]) -> None:
    try:
        outcome.set_result(work())
    except BaseException as exc:  # noqa: BLE001  # who waits gets it, as from any executor
        outcome.set_exception(exc)
