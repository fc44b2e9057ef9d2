"""Steps of one's own: a Python function, shell commands, SQL, with the outcome of any other job."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import duckdb
import psutil  # type: ignore[import-untyped]
import pytest
from prefect import flow
from prefect_sqlalchemy import SqlAlchemyConnector
from pydantic import TypeAdapter, ValidationError
from sqlalchemy import Engine, event

from blocks.reference import BlockNotFound
from flows import RunFailed, StepState, elt_chain
from sandbox import Sandbox
from tasks.jobs import InputError, JobFailed, JobResult, JobState
from tasks.steps import OwnStep, PythonStep, ShellStep, SqlStep, check_steps, run_step
from tests import own_functions
from tests.flows_fixtures import Runs, box, runs, sources, starts, sync_parameters
from tests.jobs_fixtures import PREFECTS_SOCKETS, collected, until

__all__ = ["box", "collected", "runs", "sources"]

pytestmark = [
    *PREFECTS_SOCKETS,
    # Prefect's, on every line that a task outside of a flow logs.
    pytest.mark.filterwarnings("ignore:.*without a flow run id:UserWarning"),
]
HERE = "tests.own_functions"


async def done(step: OwnStep) -> JobResult:
    return await run_step.with_options(persist_result=False)(step, "test")


async def failed(step: OwnStep) -> JobResult:
    with pytest.raises(JobFailed) as caught:
        await done(step)
    assert caught.value.result.state is JobState.FAILED
    return caught.value.result


# -- Python


async def test_a_function(tmp_path: Path) -> None:
    """A function is called with its arguments; a whole number that it returns is its rows."""
    calls = str(tmp_path / "calls")
    result = await done(PythonStep(call=f"{HERE}:count", arguments={"path": calls, "by": 3}, owner="me"))
    assert (result.state, result.rows, result.vendor, result.owner) == (
        JobState.SUCCEEDED,
        3,
        "python",
        "me",
    )
    assert result.name == f"{HERE}:count"
    assert result.duration is not None


@pytest.mark.parametrize("call", [f"{HERE}:greet", own_functions.greet])
async def test_an_async_function_by_name_or_itself(call: Any) -> None:
    """An async function is awaited; the text that it returns is its message."""
    step = PythonStep(call=call, arguments={"name": "you"})
    assert (await done(step)).message == "hello you"
    assert step.model_dump(mode="json")["call"] == f"{HERE}:greet"


async def test_a_flow_is_a_function_too() -> None:
    """A Prefect flow can be a step."""
    assert (await done(PythonStep(call=own_functions.subflow, arguments={"n": 4}))).rows == 8


async def test_a_function_that_raises(caplog: pytest.LogCaptureFixture) -> None:
    """The outcome says in one line what was raised; the traceback of the user's own code is in the log."""
    result = await failed(PythonStep(call=f"{HERE}:breaks", name="turn the key"))
    assert result.message == "RuntimeError: the key in the lock broke"
    assert result.name == "turn the key"
    assert "in breaks" in caplog.text


@pytest.mark.parametrize(("code", "says"), [(2, "exit code 2"), ("no orders today", "no orders today")])
async def test_a_main_function_that_exits(code: int | str, says: str) -> None:
    """`sys.exit()`, as scripts end with it, ends the step and not the flow."""
    result = await failed(PythonStep(call=f"{HERE}:leaves", arguments={"code": code}))
    assert result.message == says


async def test_a_main_function_that_exits_well() -> None:
    """`sys.exit(0)` is a success, and so is `sys.exit()`."""
    assert (await done(PythonStep(call=f"{HERE}:leaves", arguments={"code": 0}))).good
    assert (await done(PythonStep(call=f"{HERE}:leaves"))).good


async def test_a_function_that_takes_too_long() -> None:
    """An async function is cancelled at its timeout."""
    result = await failed(PythonStep(call=f"{HERE}:sleep", timeout=0.1))
    assert result.message == "it did not end in 0.1 s and was cancelled"


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"call": "no_such_package:run"}, "There is no Python function 'no_such_package:run' here"),
        ({"call": f"{HERE}:missing"}, "There is no Python function"),
        ({"call": ""}, "There is no Python function"),
        ({"call": "tests.own_script:main"}, "its module exits"),
        ({"call": f"{HERE}:NOT_A_FUNCTION"}, "can't be called"),
        ({"call": f"{HERE}:greet"}, "missing a required argument: 'name'"),
        ({"call": f"{HERE}:greet", "arguments": {"name": "x", "nmae": "y"}}, "unexpected keyword argument"),
        ({"call": f"{HERE}:breaks", "timeout": 1}, "is not async, so a timeout could not stop it"),
    ],
)
async def test_functions_that_cannot_be_called(fields: dict[str, Any], says: str) -> None:
    """What can't be called is refused before anything is started."""
    with pytest.raises(InputError, match=says):
        await check_steps([PythonStep(**fields)])


# -- shell


async def test_commands(tmp_path: Path) -> None:
    """Commands run in their folder, with their environment, as one script."""
    step = ShellStep(
        commands=["greeting=$WORD", 'echo "$greeting" > said'], env={"WORD": "hi"}, working_dir=str(tmp_path)
    )
    assert (await done(step)).state is JobState.SUCCEEDED
    assert (tmp_path / "said").read_text() == "hi\n"


@pytest.mark.parametrize("command", ["echo no room on disk; exit 3", "echo no room on disk; false | cat"])
async def test_the_first_command_that_fails_is_the_end(tmp_path: Path, command: str) -> None:
    """A command that fails, also in the middle of a pipe, is not covered up by the next."""
    result = await failed(ShellStep(commands=[command, "touch went-on"], working_dir=str(tmp_path)))
    assert (result.message or "").startswith("exit code ")
    assert (result.message or "").endswith(": no room on disk")
    assert not (tmp_path / "went-on").exists()


def _alive(pid: int) -> bool:
    try:
        # A process that has ended and that nobody has asked about is a zombie.
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _started(pids: Path) -> list[int]:
    return [int(line) for line in pids.read_text().split()] if pids.exists() else []


async def test_a_timeout_stops_what_was_started(tmp_path: Path) -> None:
    """At the timeout the commands end, and what they have started too."""
    pids = tmp_path / "pids"
    commands = [f"sleep 600 & echo $! >> {pids}", f"bash -c 'echo $$ >> {pids}; sleep 600; true'"]
    result = await failed(ShellStep(commands=commands, timeout=5))
    assert result.message == "it did not end in 5 s and was stopped"
    assert len(_started(pids)) == 2
    await until(lambda: not any(map(_alive, _started(pids))))


async def test_a_timeout_waits_for_the_end(tmp_path: Path) -> None:
    """What clears up when it is told to end is waited for, so that a retry does not run beside it."""
    tidy = "trap 'sleep 1; touch tidy; exit 1' TERM; touch begun; while :; do sleep 0.1; done"
    await failed(ShellStep(commands=[tidy], working_dir=str(tmp_path), timeout=5))
    assert (tmp_path / "begun").exists()
    assert (tmp_path / "tidy").exists()


async def test_a_timeout_of_what_will_not_end(tmp_path: Path) -> None:
    """What does not end when it is told to is killed before the step is said to have been stopped."""
    pids = tmp_path / "pids"
    deaf = f"trap '' TERM; echo $BASHPID > {pids}; sleep 600; echo survived"
    result = await failed(ShellStep(commands=[deaf], timeout=5))
    assert result.message == "it did not end in 5 s and was stopped"
    assert [_alive(pid) for pid in _started(pids)] == [False]


async def test_cancelling_stops_what_was_started(tmp_path: Path) -> None:
    """When the task is cancelled, nothing of its commands stays behind."""
    pids = tmp_path / "pids"
    running = asyncio.create_task(done(ShellStep(commands=[f"sleep 600 & echo $! >> {pids}", "wait"])))
    await until(lambda: len(_started(pids)) == 1)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    await until(lambda: not any(map(_alive, _started(pids))))


async def test_a_folder_that_is_not_there() -> None:
    """A missing folder is refused before anything is started."""
    with pytest.raises(InputError, match="There is no folder /no/such/folder"):
        await check_steps([ShellStep(commands=["true"], working_dir="/no/such/folder")])


# -- SQL


@pytest.fixture
def database(tmp_path: Path) -> SqlAlchemyConnector:
    return SqlAlchemyConnector(connection_info=f"duckdb:///{tmp_path}/w.duckdb")


async def test_statements(tmp_path: Path, database: SqlAlchemyConnector) -> None:
    """Statements reach the database as they are, and the file is free for dbt afterwards."""
    statements = ["CREATE TABLE t AS SELECT 7 AS n, '50%' AS share, ':x' AS y", "SELECT n::text FROM t"]
    assert (await done(SqlStep(database=database, statements=statements))).state is JobState.SUCCEEDED
    with duckdb.connect(str(tmp_path / "w.duckdb")) as warehouse:
        assert warehouse.sql("FROM t").fetchall() == [(7, "50%", ":x")]


async def test_statements_are_one_transaction(tmp_path: Path, database: SqlAlchemyConnector) -> None:
    """When one statement fails, none has happened; the message is the database's own."""
    step = SqlStep(database=database, statements=["CREATE TABLE t (n int)", "SELECT missing FROM nowhere"])
    result = await failed(step)
    assert "Table with name nowhere does not exist" in (result.message or "")
    assert "duckdb://" not in (result.message or "")
    with duckdb.connect(str(tmp_path / "w.duckdb")) as warehouse:
        assert warehouse.sql("SHOW TABLES").fetchall() == []


async def test_statements_of_a_run_that_was_cancelled_are_not_committed(
    database: SqlAlchemyConnector,
) -> None:
    """A thread can't be stopped, but what it does when nobody waits any more is taken back."""
    began, go, ended = threading.Event(), threading.Event(), threading.Event()
    ends: list[str] = []

    def execute(*_: Any) -> None:
        began.set()
        go.wait(60)

    def end(how: str) -> None:
        ends.append(how)
        ended.set()

    listeners: list[tuple[str, Any]] = [
        ("before_cursor_execute", execute),
        ("commit", lambda _: end("commit")),
        ("rollback", lambda _: end("rollback")),
    ]
    for name, listener in listeners:
        event.listen(Engine, name, listener)
    try:
        step = asyncio.create_task(done(SqlStep(database=database, statements=["CREATE TABLE t (n int)"])))
        await until(began.is_set)
        step.cancel()
        with pytest.raises(asyncio.CancelledError):
            await step
        ends.clear()  # DuckDB's dialect asks a few things of its own when it connects
        ended.clear()
        go.set()
        await until(ended.is_set)
    finally:
        for name, listener in listeners:
            event.remove(Engine, name, listener)
    assert ends == ["rollback"]


@pytest.mark.parametrize("kind", ["python", "sql"])
def test_an_interrupt_ends_the_process_under_a_step_in_a_thread(kind: str, tmp_path: Path) -> None:
    """Pitfall: Python waits at exit for the threads of `asyncio.to_thread`, however long they take."""
    log = tmp_path / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(  # noqa: S603
            [sys.executable, "-m", "tests.step_flows", kind, str(tmp_path)],
            stdout=output,
            stderr=output,
            cwd=Path(__file__).parents[1],
        )
    try:
        began = tmp_path / "began"
        deadline = time.monotonic() + 120
        while not began.exists():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        time.sleep(1)  # for the query to be in DuckDB's own code, under which a thread can't just be ended
        process.send_signal(signal.SIGINT)
        process.wait(120)  # a fifth of what the step takes
    finally:
        process.kill()
        process.wait()
    assert process.returncode != -signal.SIGABRT, log.read_text()


async def test_a_database_that_is_not_saved() -> None:
    """A block that nobody saved is refused before anything is started."""
    with pytest.raises(BlockNotFound, match="'nowhere'"):
        await check_steps([SqlStep(database="nowhere", statements=["SELECT 1"])])


def test_no_secret_is_stored() -> None:
    """What is stored of a step with a database at hand has no password in it."""
    database = SqlAlchemyConnector(connection_info="postgresql+psycopg2://me:hunter2@host/db")
    stored = SqlStep(database=database, statements=["SELECT 1"]).model_dump_json()
    assert "hunter2" not in stored


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"tool": "shell", "commands": []}, "at least 1"),
        ({"tool": "shell", "commands": [" "]}, "no command in it"),
        ({"tool": "sql", "database": "w", "statements": ["SELECT 1", ""]}, "statements is empty"),
        ({"tool": "python"}, "call"),
        ({"tool": "ruby", "call": "x"}, "'ruby'"),
    ],
)
def test_steps_that_make_no_sense(fields: dict[str, Any], says: str) -> None:
    """A step that could do nothing is refused when it is written down."""
    with pytest.raises(ValidationError, match=says):
        TypeAdapter(OwnStep).validate_python(fields)


# -- in a chain


def test_before_and_after(box: Sandbox, runs: Runs, tmp_path: Path) -> None:
    """Steps before and after the chain are in its report, and a retry does not repeat what was done."""
    before, after = tmp_path / "before", tmp_path / "after"
    parameters = {
        "syncs": sync_parameters("airlines"),
        "before": [{"tool": "python", "call": f"{HERE}:count", "arguments": {"path": str(before)}}],
        "after": [
            {"tool": "shell", "commands": [f"test -e {tmp_path}/ready"], "name": "look"},
            {"tool": "python", "call": f"{HERE}:count", "arguments": {"path": str(after)}, "when": "always"},
            {"tool": "shell", "commands": ["true"], "name": "never"},
        ],
    }
    run_id = runs.create(elt_chain, parameters)
    state = runs.run(elt_chain, run_id)
    with pytest.raises(RunFailed) as caught:
        state.result()
    report = caught.value.report
    assert [(step.kind, step.state) for step in report.steps] == [
        ("before", StepState.SUCCEEDED),
        ("sync", StepState.SUCCEEDED),
        ("after", StepState.FAILED),
        ("after", StepState.SUCCEEDED),
        ("after", StepState.HELD),
    ]
    assert report.steps[-1].message == "look was not done"

    (tmp_path / "ready").touch()
    again = runs.run(elt_chain, run_id).result()
    assert again.complete
    assert (before.read_text(), after.read_text(), starts(box)) == ("x", "x", 1)


def test_a_failing_step_before_holds_the_chain(box: Sandbox, runs: Runs, tmp_path: Path) -> None:
    """Nothing is started after a step that failed before the chain; clean-up runs all the same."""
    cleaned = tmp_path / "cleaned"
    parameters = {
        "syncs": sync_parameters("airlines", "planes"),
        "before": [
            {"tool": "shell", "commands": ["false"], "name": "unlock", "retries": 1},
            {"tool": "shell", "commands": [f"touch {tmp_path}/second"]},
        ],
        "after": [{"tool": "shell", "commands": [f"touch {cleaned}"], "when": "always", "name": "lock"}],
        "allow_failure": "any",
    }
    state = runs.run(elt_chain, runs.create(elt_chain, parameters))
    assert "failed: unlock" in (state.message or "")
    assert "held back: touch" in (state.message or "")
    assert starts(box) == 0
    assert cleaned.exists()
    assert not (tmp_path / "second").exists()


def test_a_step_can_be_tried_again(tmp_path: Path) -> None:
    """A step has its own retries."""
    tries = tmp_path / "tries"

    @flow
    async def one() -> JobResult:
        step = ShellStep(commands=[f"echo x >> {tries}", f"test $(wc -l < {tries}) -ge 2"], retries=1)
        return await run_step.with_options(**step.task_options)(step, "0")

    result: Any = asyncio.run(one())  # type: ignore[arg-type]  # Prefect's types of an async flow
    assert result.state is JobState.SUCCEEDED
    assert tries.read_text() == "x\nx\n"
