"""dbt as a child process: started in its own group, read line by line, always brought to an end."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import sys
import threading
from collections.abc import AsyncIterator, Coroutine
from contextlib import ExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import anyio

from tasks.dbt.folders import led_out
from tasks.dbt.model import DbtCore, DbtError

_CHILD = Path(__file__).with_name("child.py")
_LINE_LIMIT = 16 * 2**20  # bytes; a listing of a large project is one line
_STDERR_KEPT = 8_000  # bytes; the end of what dbt printed, for a crash without a message
# SIGINT is what makes dbt cancel its queries in the warehouse; the others are for a dbt that does not listen.
_STOP = ((signal.SIGINT, 3.0), (signal.SIGTERM, 1.5), (signal.SIGKILL, 1.0))
_TEMPLATED = re.compile(r"\{\{\s*prefect\.(blocks|variables)\b")
_environ_lock = threading.Lock()


class DbtProcess:
    """A running dbt: get one from `running`, read its `records`, then ask for `exit_code` and `stderr`."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._stderr = b""
        self._draining = asyncio.create_task(self._drain())

    @classmethod
    @asynccontextmanager
    async def running(
        cls, request: dict[str, Any], *, env: dict[str, str], cwd: Path
    ) -> AsyncIterator[DbtProcess]:
        """Starts dbt, and stops it if the block is left early, by an error or a cancellation.

        Args:
            request: What `tasks/dbt/child.py` shall do.
            env: The whole environment of dbt.
            cwd: Where dbt runs; relative paths in profiles start here.
        """
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-P",  # the script's folder must not be importable: dbt imports whatever is called dbt_*
            str(_CHILD),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=env,
            cwd=cwd,
            limit=_LINE_LIMIT,
            start_new_session=True,  # a Ctrl-C in the terminal is ours to pass on, once
        )
        dbt = cls(process)
        try:
            assert process.stdin is not None  # noqa: S101 - for the type checker, we asked for a pipe
            with suppress(
                BrokenPipeError, ConnectionResetError
            ):  # it died at once: exit_code and stderr tell
                process.stdin.write(json.dumps(request).encode() + b"\n")
                await process.stdin.drain()
            yield dbt
            await dbt._finish()
        finally:
            await to_the_end(dbt._stop())

    @property
    def exit_code(self) -> int | None:
        """0 if it ended as it should, negative for the signal that killed it, None while it runs."""
        return self._process.returncode

    @property
    def stderr(self) -> str:
        """The last of what dbt wrote to its error stream."""
        return self._stderr.decode(errors="replace").strip()

    async def records(self) -> AsyncIterator[dict[str, Any]]:
        """What dbt reports, as it happens, until it ends."""
        assert self._process.stdout is not None  # noqa: S101 - for the type checker, we asked for a pipe
        async for line in self._process.stdout:
            yield json.loads(line)

    async def _drain(self) -> None:
        assert self._process.stderr is not None  # noqa: S101 - for the type checker, we asked for a pipe
        while piece := await self._process.stderr.read(65536):
            self._stderr = (self._stderr + piece)[-_STDERR_KEPT:]

    async def _finish(self) -> None:
        await self._process.wait()
        await self._draining

    async def _stop(self) -> None:
        for signum, patience in _STOP:
            if self._process.returncode is not None:
                break
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signum)
            with suppress(TimeoutError):
                async with asyncio.timeout(patience):
                    # Its pipes must be read on, else a talkative dbt blocks on a full one and never hears.
                    await asyncio.gather(self._process.wait(), self._discard())
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._draining.cancel()
        with suppress(asyncio.CancelledError):
            await self._draining

    async def _discard(self) -> None:
        assert self._process.stdout is not None  # noqa: S101 - for the type checker, we asked for a pipe
        while await self._process.stdout.read(65536):
            pass


async def to_the_end(work: Coroutine[Any, Any, None]) -> None:
    """Await a clean-up to its end even if we are being cancelled, once (asyncio) or at every await (anyio).

    A cancellation that comes meanwhile is not lost: it is raised when the work is done.
    """
    task = asyncio.create_task(work)
    cancelled: asyncio.CancelledError | None = None
    with anyio.CancelScope(shield=True):
        while not task.done():
            try:
                await asyncio.shield(task)
            except asyncio.CancelledError as error:
                cancelled = error
    if cancelled is not None:
        raise cancelled


@asynccontextmanager
async def surroundings(dbt: DbtCore) -> AsyncIterator[tuple[Path, dict[str, str]]]:
    """The profiles folder and the environment that dbt shall see.

    A profiles.yml with Prefect blocks or variables in it is resolved by prefect-dbt into a temporary folder;
    a plain one is used where it lies, and prefect-dbt (1.5 s and 80 MB of imports) is left alone.
    """
    directory = dbt.find_profiles_dir()
    try:
        text = await asyncio.to_thread((directory / "profiles.yml").read_text)
    except OSError:
        text = ""  # dbt says it better, and DBT_PROFILES_DIR in a .env of its own is possible
    own = {**await asyncio.to_thread(led_out, dbt), **dbt.env}
    if not _TEMPLATED.search(text):
        yield directory, {**os.environ, **own}
        return
    with ExitStack() as stack:
        directory, env = await asyncio.to_thread(_resolve, dbt, directory, stack)
        yield directory, {**env, **own}


def _resolve(dbt: DbtCore, directory: Path, stack: ExitStack) -> tuple[Path, dict[str, str]]:
    from dbt_common.events.base_types import EventLevel
    from prefect_dbt import PrefectDbtSettings

    settings = PrefectDbtSettings(profiles_dir=directory, project_dir=dbt.project, log_level=EventLevel.INFO)
    # prefect-dbt hands secrets to dbt through os.environ of the calling process. They are dbt's alone: taken
    # out again as soon as they are copied, so that they reach neither later children nor another build.
    with _environ_lock:
        before = dict(os.environ)
        try:
            resolved = stack.enter_context(settings.resolve_profiles_yml())
        except ValueError as error:
            raise DbtError(f"{directory / 'profiles.yml'} cannot be resolved: {error}") from error
        env = dict(os.environ)
        for name in env.keys() - before.keys():
            del os.environ[name]
    return Path(resolved), env
