"""The keeper: imports everything once, and forks a flow run from itself whenever a stand-in asks for one.

It has one thread, so that forking is safe, and runs nothing itself. It retires, which is to take no more
orders and to end with its last run, when its standard input is closed because the worker has ended, or when
the source of a module that it has imported changes; the worker starts another one then.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import sys
import threading
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_LENGTH = 8
_ORDER_BYTES = 16 * 1024 * 1024  # an environment is never larger
_ENGINE = ("prefect.engine", "prefect.flow_engine", "prefect.runner")


@dataclass(eq=False)
class _Order:
    """One stand-in's connection, from its greeting to the end of its run."""

    connection: socket.socket
    received: bytearray = field(default_factory=bytearray)
    length: int | None = None
    streams: list[int] = field(default_factory=list)
    pid: int | None = None

    @property
    def complete(self) -> bool:
        return self.length is not None and len(self.received) >= self.length

    def close(self) -> None:
        self.connection.close()
        for stream in self.streams:
            os.close(stream)
        self.streams.clear()


class Keeper:
    """The loop that takes orders.

    Args:
        path: Where it listens: a Unix socket that is only for its user.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._open: list[_Order] = []
        self._selector = selectors.DefaultSelector()
        self._listener: socket.socket | None = None
        self._sources = _sources()
        self._wake_up = socket.socketpair()

    def serve(self) -> dict[str, Any] | None:
        """Take orders until retired and done.

        Returns:
            In a fork, the order that it is to carry out; None in the keeper itself.
        """
        self._listen()
        while self._listener or self._open:
            for key, _ in self._selector.select():
                if key.data == "listener":
                    self._accept()
                elif key.data == "ended":
                    self._wake_up[0].recv(4096)
                    self._reap()
                elif key.data == "worker":
                    if not os.read(0, 4096):
                        self._selector.unregister(0)
                        self.retire()
                elif (order := self._read(key.data)) is not None:
                    return order
        return None

    def retire(self) -> None:
        """Take no more orders."""
        if self._listener:
            self._path.unlink(missing_ok=True)
            self._selector.unregister(self._listener)
            self._listener.close()
            self._listener = None

    def _listen(self) -> None:
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        # Elsewhere first: who finds it there finds it open.
        new = self._path.with_suffix(".new")
        new.unlink(missing_ok=True)
        self._listener.bind(str(new))
        self._listener.listen(512)
        new.rename(self._path)
        self._selector.register(self._listener, selectors.EVENT_READ, "listener")
        self._selector.register(0, selectors.EVENT_READ, "worker")
        for end in self._wake_up:
            end.setblocking(False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self._wake_up[1].fileno(), warn_on_full_buffer=False)
        self._selector.register(self._wake_up[0], selectors.EVENT_READ, "ended")

    def _accept(self) -> None:
        assert self._listener  # noqa: S101 - for the type checker
        connection, _ = self._listener.accept()
        if _changed(self._sources):
            connection.close()  # it begins without us, with the code as it is now
            self.retire()
            return
        order = _Order(connection)
        try:
            connection.sendall(b"+")
        except OSError:
            order.close()
            return
        self._open.append(order)
        self._selector.register(connection, selectors.EVENT_READ, order)

    def _read(self, order: _Order) -> dict[str, Any] | None:
        if order not in self._open:
            return None  # its run was seen to end in this same turn
        try:
            if order.length is None:
                data, streams, _, _ = socket.recv_fds(order.connection, _LENGTH, 3)
                order.streams += streams
            else:
                data = order.connection.recv(65536)
        except OSError:
            data = b""
        order.received += data
        if order.length is None and len(order.received) >= _LENGTH:
            order.length = int.from_bytes(order.received[:_LENGTH], "big")
            del order.received[:_LENGTH]
        if not data or (order.length or 0) > _ORDER_BYTES:
            self._forget(order)
        elif order.pid is not None:
            self._pass_on(order)
        elif order.complete:
            return self._fork(order)
        return None

    def _forget(self, order: _Order) -> None:
        """The stand-in is gone; its run has no one to report to, and goes with it."""
        self._selector.unregister(order.connection)
        if order.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(order.pid, signal.SIGKILL)
        else:
            order.close()
            self._open.remove(order)

    def _pass_on(self, order: _Order) -> None:
        assert order.pid is not None  # noqa: S101 - for the type checker
        while b"\n" in order.received:
            line, _, rest = bytes(order.received).partition(b"\n")
            order.received = bytearray(rest)
            # It is not reaped yet, so the number is still its own.
            os.kill(order.pid, int(json.loads(line)["signal"]))

    def _fork(self, order: _Order) -> dict[str, Any] | None:
        wanted: dict[str, Any] = json.loads(bytes(order.received[: order.length]))
        del order.received[: order.length]
        # In the fork no signal may find the keeper's handlers.
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
        pid = os.fork()
        if pid == 0:
            signal.set_wakeup_fd(-1)
            for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            for target, stream in enumerate(order.streams):
                os.dup2(stream, target)
            self._close_all()
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
            return wanted
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
        order.pid = pid
        self._tell(order, pid=pid)
        for stream in order.streams:
            os.close(stream)
        order.streams.clear()
        self._pass_on(order)  # what came with the order
        return None

    def _close_all(self) -> None:
        """In the fork: what belongs to the keeper."""
        self._selector.close()
        for end in (*self._wake_up, *([self._listener] if self._listener else [])):
            end.close()
        for order in self._open:
            order.close()

    def _reap(self) -> None:
        for order, pid in [(order, order.pid) for order in self._open]:
            if pid is None:
                continue
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                self._open.remove(order)
                with contextlib.suppress(KeyError):  # the stand-in was gone before
                    self._selector.unregister(order.connection)
                self._tell(order, ended=os.waitstatus_to_exitcode(status))
                order.close()

    def _tell(self, order: _Order, **answer: int) -> None:
        with contextlib.suppress(OSError):  # if the stand-in is gone, that is seen when it is read from
            order.connection.sendall(json.dumps(answer).encode() + b"\n")


def run(order: dict[str, Any]) -> None:
    """In the fork: become `python -m prefect.engine`, started in that folder with that environment."""
    env: dict[str, str] = order["env"]
    os.chdir(order["cwd"])
    python = {name: value for name, value in os.environ.items() if name.startswith("PYTHON")}
    if python != {name: value for name, value in env.items() if name.startswith("PYTHON")}:
        # Another path or other switches: what is imported here may not be what would be imported then.
        os.execve(sys.executable, [sys.executable, "-m", "prefect.engine"], env)  # noqa: S606
    os.environ.clear()
    os.environ.update(env)
    time.tzset()
    sys.path[0] = order["cwd"]
    sys.argv = ["prefect.engine"]
    importlib.invalidate_caches()

    from prefect.context import refresh_global_settings_context
    from prefect.logging.configuration import setup_logging

    refresh_global_settings_context()
    setup_logging(incremental=False)
    sys.modules.pop("prefect.engine", None)  # it is about to be run, not imported
    runpy.run_module("prefect.engine", run_name="__main__", alter_sys=True)


def import_all(code: list[str], *, keep_code: bool) -> None:
    """Import Prefect and all that the code needs; the code itself only if it is to be kept.

    What it needs is found out in a fork, so that nothing of the code itself stays behind: two deployments of
    a pool may have two versions of it, each in its own folder.
    """
    for name in _ENGINE:
        importlib.import_module(name)
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        names: list[str] = []
        with contextlib.suppress(ImportError):  # code that is not here: only Prefect itself is warm then
            for name in code:
                importlib.import_module(name)
            names = [name for name, module in list(sys.modules.items()) if _is_installed(module)]
        with os.fdopen(writing, "w") as pipe:
            json.dump(names, pipe)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        needed: list[str] = json.loads(pipe.read() or "[]")
    os.waitpid(pid, 0)
    for name in needed:
        with contextlib.suppress(ImportError):  # some modules can only be imported by their own package
            importlib.import_module(name)
    if keep_code:
        for name in code:
            importlib.import_module(name)


def _is_installed(module: Any) -> bool:
    return "site-packages" in (getattr(module, "__file__", None) or "")


def _sources() -> dict[str, int]:
    """The files of all modules, with their times."""
    files = {file for module in list(sys.modules.values()) if (file := getattr(module, "__file__", None))}
    found: dict[str, int] = {}
    for file in files:
        with contextlib.suppress(OSError):
            found[file] = os.stat(file).st_mtime_ns  # noqa: PTH116 - a thousand of them, for each run
    return found


def _changed(sources: dict[str, int]) -> bool:
    try:
        return any(os.stat(file).st_mtime_ns != then for file, then in sources.items())  # noqa: PTH116
    except OSError:
        return True


def main() -> int:
    """`keeper.py <socket> <keep code: 0 or 1> <modules ...>`."""
    path, keep, *code = sys.argv[1:]
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)  # it ends with the worker and its runs
    import_all(code, keep_code=keep == "1")
    if threading.active_count() > 1:
        sys.stderr.write(f"The keeper does not fork beside other threads: {threading.enumerate()}\n")
        return 1
    gc.collect()
    gc.freeze()  # so that collecting garbage in a fork does not copy what they share
    order = Keeper(Path(path)).serve()
    if order is None:
        return 0
    try:
        run(order)
    except Exception:  # noqa: BLE001 - as the interpreter would do with it
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
