"""Processes of a local server: none that was started is forgotten, and what it has started ends with it."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import psutil  # type: ignore[import-untyped]

_ENDING = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Let Ctrl-C and a termination wait until this is over.

    In the middle of `Popen` they would leave a process that nobody knows of.
    """
    came: list[int] = []

    def wait(number: int, frame: FrameType | None) -> None:
        came.append(number)

    before: dict[signal.Signals, Callable[..., Any]] = {}
    if threading.current_thread() is threading.main_thread():
        # Only what is handled in Python: what is ignored or ends us at once has to be so in the process, too.
        for number in _ENDING:
            handler = signal.getsignal(number)
            if callable(handler):
                before[number] = handler
                signal.signal(number, wait)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if came:
            signal.raise_signal(came[0])


def end(process: psutil.Process, number: signal.Signals, seconds: float) -> None:
    """Tell a process and all that it has started to end, and kill what is there after so many seconds."""
    family = _family(process)
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.send_signal(number)
    _, left = psutil.wait_procs(family, seconds)
    for member in {each for one in left for each in _family(one)}:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    psutil.wait_procs(left, seconds)


def _family(process: psutil.Process) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return [process, *process.children(recursive=True)]
    return []


def running(is_it: Callable[[list[str], dict[str, str]], bool]) -> list[psutil.Process]:
    """The processes whose command and environment are so; without those that we may not look at."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if (command := process.cmdline()) and is_it(command, process.environ()):
                found.append(process)
    return found
