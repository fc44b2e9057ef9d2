"""`make warm-worker`: Prefect's process worker, with runs that begin warm."""

from __future__ import annotations

import argparse
import atexit
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

_HERE = Path(__file__).parent
_CODE = ("flows", "blocks")
_LOOK_SECONDS = 0.5
_RETRY_SECONDS = 5.0


class Keepers:
    """Sees that there is a keeper: starts another one when the last has retired or died.

    Args:
        folder: For its socket.
        code: Packages whose needs are imported.
        keep_code: Keep these packages themselves imported, too.
    """

    def __init__(self, folder: Path, code: list[str], *, keep_code: bool = False) -> None:
        self.path = folder / "keeper.sock"
        self._command = [
            *(sys.executable, "-m", "deployments.warm.keeper"),
            *(str(self.path), "1" if keep_code else "0", *code),
        ]
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="keepers", daemon=True)

    def start(self) -> None:
        """Start the first one; runs that come before it is ready begin without it."""
        self._thread.start()

    def stop(self) -> None:
        """Let the keeper end with its last run."""
        self._ending.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ending.is_set():
            keeper = subprocess.Popen(  # noqa: S603 - our own module
                self._command,
                stdin=subprocess.PIPE,  # which it sees closed when this process ends
                start_new_session=True,  # Ctrl-C in the terminal is for the worker and the stand-ins
            )
            is_ready = False
            while not self._ending.wait(_LOOK_SECONDS):
                is_ready = is_ready or self.path.exists()
                if is_ready and not self.path.exists():  # retired
                    break
                if keeper.poll() is not None:
                    # Once more, but not at once: each start costs seconds of CPU.
                    self._ending.wait(_RETRY_SECONDS)
                    break
            if keeper.stdin:
                keeper.stdin.close()


def main(argv: list[str] | None = None) -> None:
    """Start the worker; what is not ours is an option of `prefect worker start`."""
    parser = argparse.ArgumentParser(
        prog="python -m deployments.warm",
        description="Prefect's process worker, with runs that begin in a fork of a process that has imported "
        "everything.",
        epilog="All other options are those of `prefect worker start`.",
    )
    parser.add_argument("--pool", required=True, help="a work pool of type process")
    parser.add_argument(
        "--query-seconds",
        type=float,
        default=0.5,
        help="how often it asks for runs (default: %(default)s; PREFECT_WORKER_QUERY_SECONDS otherwise)",
    )
    parser.add_argument(
        "--keep-code",
        action="store_true",
        help="keep the code itself imported, too: only where every run of the pool has its code from here",
    )
    parser.add_argument(
        "--code",
        nargs="*",
        default=list(_CODE),
        help="packages whose needs are imported (default: %(default)s)",
    )
    args, others = parser.parse_known_args(argv)
    os.environ["PREFECT_WORKER_QUERY_SECONDS"] = str(args.query_seconds)  # read when prefect is imported

    folder = Path(tempfile.mkdtemp(prefix="elt-flows-warm-"))
    keepers = Keepers(folder, args.code, keep_code=args.keep_code)
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    atexit.register(keepers.stop)
    keepers.start()
    _use(keepers.path)

    from prefect.cli import app

    sys.argv = ["prefect", "worker", "start", "--type", "process", "--pool", args.pool, *others]
    app()


def _use(keeper: Path) -> None:
    """Have the process worker start stand-ins, where a pool or a deployment says no command of its own."""
    from prefect.utilities.processutils import command_to_string
    from prefect.workers.process import ProcessJobConfiguration, ProcessWorker

    command = command_to_string([sys.executable, "-I", "-S", str(_HERE / "stand_in.py"), str(keeper)])

    class WarmConfiguration(ProcessJobConfiguration):
        def prepare_for_flow_run(self, *args: object, **kwargs: object) -> None:
            self.command = self.command or command
            super().prepare_for_flow_run(*args, **kwargs)  # type: ignore[arg-type]

    ProcessWorker.job_configuration = WarmConfiguration


if __name__ == "__main__":
    main()
