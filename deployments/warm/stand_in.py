"""What a warm worker starts in place of the engine: it has the keeper fork the run, and stands in for it.

Imports nothing but the standard library: it is to be there in a few hundredths of a second.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
from pathlib import Path
from types import FrameType

_PATIENCE = 5.0  # seconds for a keeper to say that it will do it; after that the run begins without one
_PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def main() -> None:
    """Take the place of `python -m prefect.engine`; the argument is the keeper's socket."""
    try:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.settimeout(_PATIENCE)
        connection.connect(sys.argv[1])
        if connection.recv(1) != b"+":
            raise ConnectionError
    except OSError:
        # No keeper, or one that is being replaced.
        os.execv(sys.executable, [sys.executable, "-m", "prefect.engine"])  # noqa: S606
    connection.settimeout(None)

    def pass_on(number: int, frame: FrameType | None) -> None:
        with contextlib.suppress(OSError):  # no keeper, no run
            connection.sendall(json.dumps({"signal": number}).encode() + b"\n")

    order = json.dumps({"cwd": str(Path.cwd()), "env": dict(os.environ)}).encode()
    signal.pthread_sigmask(
        signal.SIG_BLOCK, _PASSED_ON
    )  # until the order is out, which may take several writes
    for number in _PASSED_ON:
        signal.signal(number, pass_on)
    socket.send_fds(connection, [len(order).to_bytes(8, "big")], [0, 1, 2])
    connection.sendall(order)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _PASSED_ON)
    told: dict[str, int] = {}
    with connection.makefile("r") as answers, contextlib.suppress(OSError):
        for line in answers:
            told |= json.loads(line)
    _end(told)


def _end(told: dict[str, int]) -> None:
    """End as the run has ended, which the keeper says last."""
    if "ended" not in told:  # the keeper was killed, and the run has no one to report to
        if "pid" in told:
            os.kill(told["pid"], signal.SIGKILL)
        told["ended"] = -signal.SIGKILL
    if told["ended"] >= 0:
        os._exit(told["ended"])
    # By the same signal, so that the worker sees what has happened.
    number = signal.Signals(-told["ended"])
    if number not in (signal.SIGKILL, signal.SIGSTOP):
        signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    signal.pause()


if __name__ == "__main__":
    main()
