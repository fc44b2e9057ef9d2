"""Steps of one's own in a chain: a Python function, shell commands, or SQL against the warehouse.

They have the same outcome as a vendor's job, so that a report shows them beside it. What is written here is
the least that a chain needs of them; prefect-shell runs the commands, prefect-sqlalchemy the SQL.
"""

from __future__ import annotations

import asyncio
import inspect
import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pkgutil import resolve_name
from typing import Annotated, Any, Literal

import psutil  # type: ignore[import-untyped]
from prefect import task
from prefect.cache_policies import INPUTS, NO_CACHE, RUN_ID
from prefect.logging import get_run_logger
from prefect.runtime import task_run
from prefect_shell import ShellOperation
from prefect_shell.commands import ShellProcess
from prefect_sqlalchemy import SqlAlchemyConnector
from pydantic import (
    Field,
    WithJsonSchema,
    field_serializer,
    field_validator,
    model_validator,
)
from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from blocks.reference import load_block
from tasks.intervals import END_VAR, START_VAR, DataInterval, fill_in
from tasks.jobs import InputError, JobFailed, JobResult, JobState, ToolParameters, without_traceback
from tasks.jobs.threads import check_waiter, in_thread
from tasks.sql import DatabaseRef, reason_of, with_database

_STOP_PATIENCE = 5  # seconds for commands to end when they are told to; then they are killed
_LONGEST_MESSAGE = 300


class _Step(ToolParameters):
    """What every step has."""

    name: str = Field(default="", title="Name", description="For people; what it does by default.")
    owner: str | None = Field(default=None, title="Owner", description="Who is told of a failure.")
    when: Literal["complete", "always"] = Field(
        default="complete",
        title="When",
        description="Of a step after the chain: only if all before it was done, or always.",
    )
    retries: int = Field(default=0, ge=0, title="Retries", description="How often it is tried again.")
    retry_delay: float = Field(
        default=0.0, ge=0, title="Retry delay", description="Seconds to wait before each retry."
    )

    @property
    def what(self) -> str:
        """What it does, in a few words."""
        raise NotImplementedError

    @property
    def label(self) -> str:
        """What a person calls it."""
        return self.name or _cut(self.what, 60)

    @property
    def resource_id(self) -> str:
        """What it does."""
        return self.what

    @property
    def task_options(self) -> dict[str, Any]:
        """The retry policy as keyword arguments of `Task.with_options`."""
        return {"retries": self.retries, "retry_delay_seconds": self.retry_delay}


class PythonStep(_Step):
    """A call of a Python function, sync or async; a Prefect flow is one too.

    One that has parameters `data_interval_start` and `data_interval_end` gets the two ends of the run's data
    interval as datetimes, None for a run without one. A text that it returns is shown in the report, a whole
    number is taken for the rows that it moved.
    """

    tool: Literal["python"] = "python"
    call: Annotated[
        str | Callable[..., Any],
        WithJsonSchema(
            {"type": "string", "description": "Where the function is: `package.module:function`."}
        ),
    ] = Field(title="Call")
    arguments: dict[str, Any] = Field(
        default={}, title="Arguments", description="By name. Not for secrets: they are stored with the run."
    )
    timeout: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        title="Timeout",
        description="Seconds after which an async function is cancelled; a sync one can't be.",
    )

    @field_serializer("call")
    def _by_name(self, call: str | Callable[..., Any]) -> str:
        return _name_of(call)

    @property
    def what(self) -> str:
        """Where the function is."""
        return _name_of(self.call)

    def function(self) -> Callable[..., Any]:
        """The function itself.

        Raises:
            InputError: There is none, it can't be called, or not with these arguments.
        """
        if callable(self.call):
            found = self.call
        else:
            try:
                found = resolve_name(self.call)
            except (ImportError, AttributeError, ValueError) as error:
                raise InputError(
                    f"There is no Python function {self.call!r} here ({error}). Write it as "
                    "package.module:function, with the package on the worker's path."
                ) from error
            except SystemExit:
                raise InputError(
                    f"{self.call!r} can't be imported: its module exits. Put what it does into a function."
                ) from None
        if not callable(found):
            raise InputError(f"{self.what} is no function; it can't be called.")
        try:
            # Of an interval it is only asked which names the function has for it.
            inspect.signature(found).bind(**self.arguments_with(found, None))
        except TypeError as error:
            raise InputError(f"{self.what} can't be called with these arguments: {error}.") from error
        except ValueError:
            pass  # some builtins don't tell their signature
        if self.timeout is not None and not _is_async(found):
            raise InputError(
                f"{self.what} is not async, so a timeout could not stop it: make it async, or drop the "
                "timeout."
            )
        return found

    def arguments_with(self, function: Callable[..., Any], interval: DataInterval | None) -> dict[str, Any]:
        """The arguments of the call, with the run's data interval if the function has parameters for it.

        Raises:
            ValueError: The function does not tell its signature.
        """
        ends = {
            START_VAR: interval.start if interval else None,
            END_VAR: interval.end if interval else None,
        }
        known = inspect.signature(getattr(function, "fn", function)).parameters  # of a Prefect flow
        return {**{name: end for name, end in ends.items() if name in known}, **self.arguments}


class ShellStep(_Step):
    """Commands for bash, run as one script that ends at the first that fails.

    The ends of the run's data interval, if it has one, are in the environment in ISO 8601:
    `DATA_INTERVAL_START` and `DATA_INTERVAL_END`.
    """

    tool: Literal["shell"] = "shell"
    commands: list[str] = Field(title="Commands", min_length=1)
    working_dir: str | None = Field(default=None, title="Working directory")
    env: dict[str, str] = Field(
        default={},
        title="Environment",
        description="Beside the worker's own. Not for secrets: it is stored with the run.",
    )
    timeout: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        title="Timeout",
        description="Seconds after which the commands, and all that they have started, are stopped.",
    )

    @field_validator("commands")
    @classmethod
    def _say_something(cls, commands: list[str]) -> list[str]:
        if not any(command.strip() for command in commands):
            raise ValueError("there is no command in it")
        return commands

    @property
    def what(self) -> str:
        """The commands."""
        return "; ".join(command.strip() for command in self.commands if command.strip())

    def operation(self, interval: DataInterval | None = None) -> ShellOperation:
        """The commands as prefect-shell takes them.

        They are a job of their own in bash, so that all that they start can be stopped with them: bash alone
        dies at once when it is told to and leaves its children running. It ends when they have.
        """
        still_there = "kill -0 -- -$! 2> /dev/null"
        stop = (
            '[ -n "$!" ] || exit 143; kill -TERM -- -$!; '
            f"for _ in {{1..{_STOP_PATIENCE * 10}}}; do {still_there} || exit 143; "
            "sleep 0.1; done; kill -KILL -- -$!"
        )
        return ShellOperation(  # noqa: S604 - running commands is what it is for
            commands=[
                "set -m",
                f"trap '{stop}' TERM",  # before there is anything that it would have to stop
                "(set -eo pipefail",
                *self.commands,
                ") < /dev/null &",
                "wait $!",
            ],
            env={
                **({name.upper(): end for name, end in interval.vars.items()} if interval else {}),
                **self.env,
            },
            working_dir=self.working_dir,
            log_prefix=None,
            shell="bash",
        )


class SqlStep(_Step):
    """Statements against a database, in one transaction.

    `{{ data_interval_start }}` and `{{ data_interval_end }}` in them are replaced by the ends of the run's
    data interval in ISO 8601; nothing else is.
    """

    tool: Literal["sql"] = "sql"
    database: DatabaseRef = Field(title="Database")
    statements: list[str] = Field(title="Statements", min_length=1)

    @model_validator(mode="after")
    def _say_something(self) -> SqlStep:
        if not all(statement.strip() for statement in self.statements):
            raise ValueError("one of the statements is empty")
        return self

    @property
    def what(self) -> str:
        """The statements."""
        return "; ".join(" ".join(statement.split()) for statement in self.statements)


OwnStep = Annotated[PythonStep | ShellStep | SqlStep, Field(discriminator="tool")]
"""A step of one's own."""


@task(name="check-steps", task_run_name="check steps of one's own", cache_policy=NO_CACHE)
async def check_steps(steps: list[OwnStep], interval: DataInterval | None = None) -> None:
    """See that every function can be called, every folder is there and every database block is saved.

    Args:
        steps: What is to be done.
        interval: The data interval of the run, if it has one.

    Raises:
        InputError: One is not. Nothing was started.
        BlockNotFound: A database is the name of a block that is not saved.
    """
    without_traceback()
    for step in steps:
        match step:
            case PythonStep():
                step.function()
            case ShellStep():
                try:
                    step.operation()
                except ValueError as error:
                    raise InputError(
                        f"There is no folder {step.working_dir} to run {step.label} in."
                    ) from error
            case SqlStep():
                fill_in(step.statements, interval)
                await load_block(SqlAlchemyConnector, step.database)


def _run_name() -> str:
    step = task_run.get_parameters().get("step")
    return step.label if isinstance(step, _Step) else "step"


@task(
    name="step",
    task_run_name=_run_name,
    persist_result=True,
    # Not the task's source: a fix to this file between a run and its retry must not repeat what is done.
    cache_policy=INPUTS + RUN_ID,
)
async def run_step(step: OwnStep, place: str, interval: DataInterval | None = None) -> JobResult:
    """Run one step. A retry of the same flow run does not run it again once it has succeeded.

    Args:
        step: What to do.
        place: Where in the chain it is; two steps that are alike are two steps.
        interval: The data interval of the run, if it has one.

    Returns:
        What a vendor's job returns, with the duration in seconds.

    Raises:
        JobFailed: It failed; `.result` says why. The traceback of a Python function is in the log.
        InputError: It can't be run.
    """
    without_traceback()
    began = time.monotonic()
    result = JobResult(
        vendor=step.tool,
        resource_id=step.resource_id,
        name=step.label,
        owner=step.owner,
        state=JobState.SUCCEEDED,
    )
    try:
        match step:
            case PythonStep():
                done = await _call(step, interval)
            case ShellStep():
                done = await _shell(step, interval)
            case SqlStep():
                done = await _sql(step, interval)
    except _Failed as error:
        seconds = time.monotonic() - began
        failed = {"state": JobState.FAILED, "message": _cut(str(error)), "duration": seconds}
        raise JobFailed(result.model_copy(update=failed)) from None
    return result.model_copy(update={**done, "duration": time.monotonic() - began})


class _Failed(Exception):
    """A step failed, with the reason."""


async def _call(step: PythonStep, interval: DataInterval | None) -> dict[str, Any]:
    function = step.function()
    try:
        arguments = step.arguments_with(function, interval)
    except ValueError:
        arguments = step.arguments  # some builtins don't tell their signature
    try:
        if _is_async(function):
            async with asyncio.timeout(step.timeout):
                returned = await function(**arguments)
        else:
            returned = await in_thread(partial(function, **arguments))
    except SystemExit as error:  # as the main function of a script ends; here it would take the flow with it
        if error.code not in (None, 0):
            said = f"exit code {error.code}" if isinstance(error.code, int) else str(error.code)
            raise _Failed(said) from None
        return {}
    except Exception as error:  # noqa: BLE001 - whatever the user's code raises, the step has failed
        if isinstance(error, TimeoutError) and step.timeout is not None:
            raise _Failed(f"it did not end in {step.timeout:g} s and was cancelled") from None
        # The user's own code: here the traceback is of use.
        get_run_logger().exception("%s failed", step.label)
        raise _Failed(f"{type(error).__name__}: {error}") from None
    if isinstance(returned, str):
        return {"message": _cut(returned)}
    if isinstance(returned, int) and not isinstance(returned, bool):
        return {"rows": returned}
    return {}


def _is_async(function: Callable[..., Any]) -> bool:
    """Whether a call gives something to be awaited; of a Prefect flow its `isasync` tells."""
    return bool(getattr(function, "isasync", False)) or inspect.iscoroutinefunction(function)


async def _shell(step: ShellStep, interval: DataInterval | None) -> dict[str, Any]:
    async with step.operation(interval) as operation:
        # Shielded: cancelled in the middle of it, prefect-shell kills bash, whose commands would stay.
        starting: asyncio.Task[ShellProcess] = asyncio.ensure_future(operation.atrigger())
        try:
            process = await asyncio.shield(starting)
            async with asyncio.timeout(step.timeout):
                await process.await_for_completion()
        except RuntimeError:
            said = [line for line in await process.afetch_result() if line.strip()]
            last = f": {said[-1].strip()}" if said else ""
            raise _Failed(f"exit code {process.return_code}{last}") from None
        except TimeoutError:
            await _stop(process)
            raise _Failed(f"it did not end in {step.timeout:g} s and was stopped") from None
        except asyncio.CancelledError:
            await asyncio.shield(_stop(await starting))
            raise
    return {}


async def _stop(process: ShellProcess) -> None:
    running: Any = process._process  # noqa: SLF001 - prefect-shell has no public way to stop one
    job = _job_of(running.pid)
    with suppress(ProcessLookupError):
        running.terminate()
        try:
            async with asyncio.timeout(_STOP_PATIENCE + 2):
                await running.wait()
        except TimeoutError:
            running.kill()
    if job is not None:  # bash, told to end in its very first moments, may have left it
        with suppress(ProcessLookupError):
            os.killpg(job, signal.SIGKILL)


def _job_of(bash: int) -> int | None:
    """The process group of the commands, which are a job of bash's."""
    with suppress(psutil.NoSuchProcess):
        return next((child.pid for child in psutil.Process(bash).children()), None)
    return None


async def _sql(step: SqlStep, interval: DataInterval | None) -> dict[str, Any]:
    statements = fill_in(step.statements, interval)
    try:
        return {"rows": await with_database(step.database, lambda engine: _execute(engine, statements))}
    except SQLAlchemyError as error:
        raise _Failed(reason_of(error)) from None


def _execute(engine: Engine, statements: list[str]) -> int | None:
    with engine.begin() as connection:
        # As they are: `:name` and `%` mean what they mean in the database.
        counts = [connection.exec_driver_sql(statement).rowcount for statement in statements]
        check_waiter()  # of a run that was cancelled meanwhile nothing is to be seen
    told = [count for count in counts if count >= 0]
    return sum(told) if told else None


def _name_of(call: str | Callable[..., Any]) -> str:
    if isinstance(call, str):
        return call
    function = getattr(call, "fn", call)  # of a Prefect flow or task
    return f"{function.__module__}:{getattr(function, '__qualname__', type(function).__qualname__)}"


def _cut(text: str, limit: int = _LONGEST_MESSAGE) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= limit else flat[: limit - 1] + "…"
