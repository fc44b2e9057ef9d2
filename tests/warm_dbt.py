"""A dbt that is imported already, for tests of what comes of a build and not of how its process is started.

Importing dbt is most of what a small build costs, and a chain starts dbt twice. Here one process has imported
it, and forks for every start: the same `tasks/dbt/child.py`, with the pipes, the folder, the environment and
the signals that it would have had. `python -P warm_dbt.py <address>` is that process, until its stdin is
closed. Without an argument, and with the address in `ELT_TESTS_WARM_DBT`, the file stands for `child.py`.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

_ADDRESS = "ELT_TESTS_WARM_DBT"
_LENGTH = 8  # bytes that say how long a request is


# -- in place of child.py -----------------------------------------------------------------------------------


def start() -> NoReturn:
    """Have a dbt started with what we were given, pass signals on to it, and end as it ends."""
    passed_on = {signal.SIGINT, signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, passed_on)  # until we know whom to pass them on to
    server = socket.socket(socket.AF_UNIX)
    server.connect(os.environ[_ADDRESS])
    request = json.dumps({"folder": str(Path.cwd()), "env": dict(os.environ)}).encode()
    socket.send_fds(server, [len(request).to_bytes(_LENGTH, "big")], [0, 1, 2])
    server.sendall(request)
    nothing = os.open(os.devnull, os.O_RDWR)
    for ours in (0, 1, 2):  # else whoever reads them would wait for us, too
        os.dup2(nothing, ours)
    dbt = int.from_bytes(_received(server, _LENGTH), "big")
    for signum in passed_on:
        signal.signal(signum, lambda signum, _: _signal(dbt, signum))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, passed_on)
    code = os.waitstatus_to_exitcode(int.from_bytes(_received(server, _LENGTH), "big"))
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def _signal(dbt: int, signum: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        try:
            os.killpg(dbt, signum)
        except ProcessLookupError:
            os.kill(dbt, signum)  # it has no group of its own yet


def _received(connection: socket.socket, size: int) -> bytes:
    found = b""
    while len(found) < size:
        if not (piece := connection.recv(size - len(found))):
            os._exit(1)  # the other side is gone
        found += piece
    return found


# -- the process that has dbt imported ----------------------------------------------------------------------


def serve(address: str) -> None:
    """Fork for everybody who connects, until stdin is closed."""
    import importlib.util
    import select

    import dbt.adapters.duckdb
    import dbt.cli.main  # noqa: F401 - what this is all for

    child = Path(__file__).parent.parent / "tasks" / "dbt" / "child.py"
    spec = importlib.util.spec_from_file_location("child", child)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those who wait for a dbt
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(64)
    print("ready", flush=True)  # noqa: T201 - to whoever started us
    while True:
        ready, _, _ = select.select([listener, 0], [], [])
        if 0 in ready:
            return
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            _see_to(connection, module.main)
        connection.close()


def _see_to(connection: socket.socket, main: object) -> NoReturn:
    """Be the parent of one dbt: tell who it is and how it ended, and kill it when nobody cares any more."""
    import threading

    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    length, pipes, _, _ = socket.recv_fds(connection, _LENGTH, 3)
    request = json.loads(_received(connection, int.from_bytes(length, "big")))
    dbt = os.fork()
    if dbt == 0:
        connection.close()
        _be(main, request, pipes)
    for pipe in pipes:
        os.close(pipe)

    def watch() -> None:
        if not connection.recv(1):
            _signal(dbt, signal.SIGKILL)

    connection.sendall(dbt.to_bytes(_LENGTH, "big"))
    threading.Thread(target=watch, daemon=True).start()
    _, status = os.waitpid(dbt, 0)
    connection.sendall(status.to_bytes(_LENGTH, "big"))
    os._exit(0)


def _be(main: object, request: dict[str, object], pipes: list[int]) -> NoReturn:
    """Become a dbt that is run as it would have been run."""
    import atexit
    import random
    import threading
    import traceback

    code = 1
    try:
        os.setsid()
        for pipe, ours in zip(pipes, (0, 1, 2), strict=True):
            os.dup2(pipe, ours)
            os.close(pipe)
        os.chdir(str(request["folder"]))
        os.environ.clear()
        os.environ.update(request["env"])  # type: ignore[call-overload]
        del os.environ[_ADDRESS]
        random.seed()
        main()  # type: ignore[operator]
        code = 0
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:  # noqa: BLE001 - as the interpreter does with whatever nobody has caught
        traceback.print_exc()
    finally:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


# -- in the tests -------------------------------------------------------------------------------------------


def running(folder: Path) -> Iterator[str]:
    """Such a process, for as long as it is needed; its address."""
    address = str(folder / "dbt.sock")
    command = [sys.executable, "-P", __file__, address]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as server:  # noqa: S603
        assert server.stdout is not None
        assert server.stdin is not None
        assert server.stdout.readline() == b"ready\n"
        yield address
        server.stdin.close()


if __name__ == "__main__":
    if len(sys.argv) > 1:
        serve(sys.argv[1])
    else:
        start()
