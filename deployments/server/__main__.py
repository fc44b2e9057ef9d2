"""`make server`: a Prefect server on PostgreSQL, on this machine, until Ctrl-C."""

from __future__ import annotations

import argparse
import shlex
import signal
import sys
from pathlib import Path
from types import FrameType

from deployments.server.local import LocalServer, free_port
from deployments.server.postgres import ServerError


def main(argv: list[str] | None = None) -> int:
    """Start the server and keep it up; 0 when it was stopped, or when one is up already."""
    args = _arguments(argv)
    if url := LocalServer.running(args.data):
        print(f"It is up already.\n{_guide(url, args.data)}")
        return 0
    # Both end it in the same way, also while it is starting.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    server = LocalServer(args.data, args.port or free_port())
    try:
        with server:
            print(_guide(server.url, args.data))
            if not server.postgres.folder.is_relative_to(server.data):
                print(f"PostgreSQL may not enter that folder; its data is in {server.postgres.folder}")
            print("Ctrl-C ends it; the data stays.", flush=True)
            while not server.wait(1.0):
                pass
            print(f"The Prefect server has ended by itself; {server.log} says why.", file=sys.stderr)
            return 1
    except ServerError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Stopped.")
        return 0


def _interrupt(number: int, frame: FrameType | None) -> None:
    # Once: the stopping that follows takes its bounded time, and a second Ctrl-C would leave things behind.
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)
    raise KeyboardInterrupt


def _guide(url: str, data: Path) -> str:
    setting = f"PREFECT_API_URL={url}/api"
    return "\n".join(
        (
            f"Prefect UI  {url}/v2   (the older interface: {url})",
            f"data        {data}",
            "",
            "Tell the other terminals of it, each:",
            f"  export {setting}",
            "or once, for all that use this Prefect profile:",
            f"  {shlex.quote(sys.executable)} -m prefect config set {setting}",
            "",
        )
    )


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m deployments.server",
        description="A Prefect server on PostgreSQL out of a wheel, on 127.0.0.1, until Ctrl-C.",
    )
    parser.add_argument(
        "--data", type=Path, default=Path(".sandbox/server"), help="folder for data (default: %(default)s)"
    )
    parser.add_argument("--port", type=int, default=4200, help="port, 0 for a free one (default: 4200)")
    args = parser.parse_args(argv)
    if not 0 <= args.port <= 65535:
        parser.error(f"--port {args.port}: there are only 0 to 65535")
    return args


if __name__ == "__main__":
    raise SystemExit(main())
