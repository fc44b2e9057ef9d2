"""A Prefect server on this machine, on a PostgreSQL of its own: what `make server` and the stage start."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import httpx
import psutil  # type: ignore[import-untyped]

from deployments.server.postgres import Postgres, ServerError
from deployments.server.processes import end, running, undisturbed

HOST = "127.0.0.1"
_START_SECONDS = 120.0
_STOP_SECONDS = 15.0
_LEASES = "prefect.server.concurrency.lease_storage.filesystem"
_GUARD = Path(__file__).with_name("guard.py")
_GUARD_SECONDS = 150.0  # for a guard to end both servers: PostgreSQL alone may take two minutes
SERVER_SETTINGS = {
    # One at a time, the default, the recorder is seconds behind with the task runs of a fan-out, and takes
    # five times the CPU.
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_BATCH_SIZE": "100",
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_READ_BATCH_SIZE": "100",
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_FLUSH_INTERVAL": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_LOGGING_SERVER_LEVEL": "WARNING",
}


def free_port(preferred: int = 0) -> int:
    """The preferred port if nobody has it, so that links keep working from run to run; else a free one."""
    for port in (preferred, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise OSError("no free port on 127.0.0.1")


class LocalServer:
    """A Prefect server and its PostgreSQL as processes of their own: a context manager for both.

    Events misfire on SQLite, where a trigger's transaction that finds the database locked is done again, and
    fires again. The data stays when the server is stopped. Both end soon after the process that started them,
    also when that is killed: see `guard.py`. What is left up all the same, because the guard was killed as
    well, is ended first by whoever has the folder next.

    Args:
        data: Everything that lasts: the database, the logs, and the server's PREFECT_HOME.
        port: Where it listens, on 127.0.0.1 only: it asks nobody for a password.
        durable: Off: the database is not flushed to disk. For tests.

    Raises:
        ServerError: On start: somebody else has the folder or the port, or it does not come up.
    """

    def __init__(self, data: Path, port: int, *, durable: bool = True) -> None:
        self.data = data.absolute()
        self.port = port
        self.url = f"http://{HOST}:{port}"
        self.api_url = f"{self.url}/api"
        self.postgres = Postgres(self.data / "postgres", durable=durable)
        self.log = self.data / "server.log"
        self._lock: IO[str] | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._guard: subprocess.Popen[bytes] | None = None

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs to use this server."""
        return {
            "PREFECT_HOME": str(self.data),
            "PREFECT_API_URL": self.api_url,
            "PREFECT_UI_URL": self.url,
            "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "false",
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "DO_NOT_TRACK": "1",
        }

    @property
    def pid(self) -> int | None:
        """The Prefect server's process, while there is one."""
        return self._process.pid if self._process else None

    @staticmethod
    def running(data: Path) -> str | None:
        """The address of the server that has this folder, if one is up."""
        try:
            lock = _note(data).open("r+")
        except FileNotFoundError:
            return None
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                note = _read(lock)
                return None if _owner_is_gone(note) else str(note.get("url", "")) or None
        return None

    def start(self) -> Self:
        """Start PostgreSQL, then the server, and wait until it answers; at most some minutes."""
        self.data.mkdir(parents=True, exist_ok=True)
        self._take_lock()
        try:
            self._write_note()
            self._end_left_over()
            self._check_port()
            self._start_guard()
            self.postgres.start()
            self.start_prefect()
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self) -> None:
        """Stop the server, then PostgreSQL. The data stays."""
        self.stop_prefect()
        self.postgres.stop()
        self._give_back()
        if self._guard:
            self._guard.kill()
            self._guard.communicate()
            self._guard = None

    def end_left_over(self) -> bool:
        """End both servers of a process that was killed; False if somebody else has the folder by now."""
        try:
            self._take_lock()
        except ServerError:
            return False
        try:
            self._end_left_over()
            self.postgres.stop_left_over()
        finally:
            self._give_back()
        return True

    def start_prefect(self) -> None:
        """Start the Prefect server alone, where PostgreSQL is up."""
        command = ["server", "start", "--host", HOST, "--port", str(self.port)]
        with self.log.open("ab") as output, undisturbed():
            self._process = subprocess.Popen(  # noqa: S603 - our own interpreter
                [sys.executable, "-m", "prefect", "--no-prompt", *command],
                env={
                    **os.environ,
                    **SERVER_SETTINGS,
                    **self.environment,
                    "PREFECT_SERVER_DATABASE_CONNECTION_URL": self.postgres.url(),
                    # The pages ask this address; they would ask port 4200 otherwise.
                    "PREFECT_UI_API_URL": self.api_url,
                    # In memory, the default, slots that are taken at a restart would be taken for ever. Here
                    # and not in SERVER_SETTINGS: the files are in PREFECT_HOME.
                    "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": _LEASES,
                },
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                # Its own group: a Ctrl-C in the terminal is for us, and we stop it when all is written.
                start_new_session=True,
            )
        self._write_note()
        deadline = time.monotonic() + _START_SECONDS
        while not answers(f"{self.api_url}/health"):
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise ServerError(f"The Prefect server did not start. {self.log} says why:\n{self._tail()}")
            time.sleep(0.1)

    def stop_prefect(self, *, at_once: bool = False) -> None:
        """Stop the Prefect server alone.

        Args:
            at_once: Kill it, as a machine that fails would.
        """
        if self._process:
            if self._process.poll() is None:
                how = signal.SIGKILL if at_once else signal.SIGTERM
                end(psutil.Process(self._process.pid), how, _STOP_SECONDS)
            self._process.wait()
            self._process = None

    def wait(self, seconds: float) -> bool:
        """Wait for the Prefect server's own end, at most so long; whether it has ended."""
        if self._process is None:
            return True
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    # -- inside

    def _take_lock(self) -> None:
        lock = _note(self.data).open("a+")
        deadline = time.monotonic() + _GUARD_SECONDS
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                note = _read(lock)
                if _owner_is_gone(note) and time.monotonic() < deadline:
                    time.sleep(0.1)  # its guard has the folder, and gives it back when all has ended
                    continue
                lock.close()
                raise ServerError(
                    f"A server has {self.data} already: {note.get('url') or 'it is starting'}"
                ) from None
            self._lock = lock
            return

    def _give_back(self) -> None:
        if self._lock:
            self._lock.close()
            self._lock = None

    def _start_guard(self) -> None:
        with self.log.open("ab") as output, undisturbed():
            self._guard = subprocess.Popen(  # noqa: S603 - our own interpreter
                [sys.executable, str(_GUARD), str(self.data), str(self.port)],
                # The pipe's other end is ours alone: when we end, however we do, the guard reads its end.
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=output,
                # It has to outlive what kills everything of our terminal or our process group.
                start_new_session=True,
            )

    def _write_note(self) -> None:
        if self._lock:
            note: dict[str, Any] = {"owner": os.getpid(), "owner_born": psutil.Process().create_time()}
            if self._process:
                note["url"] = self.url
            self._lock.truncate(0)
            json.dump(note, self._lock)
            self._lock.flush()

    def _end_left_over(self) -> None:
        """End the Prefect server of a process that was killed; its PostgreSQL is taken over instead."""
        # Not by a number that it would have noted: it may have been killed before it could.
        home = str(self.data)

        def is_it(command: list[str], environment: dict[str, str]) -> bool:
            return {"prefect", "server"} <= set(command) and environment.get("PREFECT_HOME") == home

        for process in running(is_it):
            end(process, signal.SIGTERM, _STOP_SECONDS)

    def _check_port(self) -> None:
        if free_port(self.port) == self.port:
            return
        who = "another Prefect server" if answers(f"{self.api_url}/health") else "another program"
        raise ServerError(f"Port {self.port} on {HOST} is taken by {who}. Stop it, or name another port.")

    def _tail(self) -> str:
        return self.log.read_text(errors="replace")[-2000:].strip()


def answers(url: str) -> bool:
    """Whether a GET succeeds there within two seconds."""
    try:
        return httpx.get(url, timeout=2, trust_env=False).is_success
    except httpx.HTTPError:
        return False


def _note(data: Path) -> Path:
    return data / "server.json"


def _read(note: IO[str]) -> dict[str, Any]:
    note.seek(0)
    try:
        found = json.load(note)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _owner_is_gone(note: dict[str, Any]) -> bool:
    """Whether the process that had the folder is known, and dead."""
    if "owner" not in note:
        return False
    try:
        owner = psutil.Process(note["owner"])
        return bool(owner.create_time() != note["owner_born"] or owner.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True
