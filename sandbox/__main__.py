"""`python -m sandbox`: the stage from a terminal."""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from pathlib import Path

from deployments.server import ServerError
from sandbox.demo import add_commands
from sandbox.guide import guide
from sandbox.server import Sandbox


def main(argv: list[str] | None = None) -> int:
    """Run one of the commands, `serve` if none is named, and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m sandbox", description="The rehearsal stage on loopback.")
    commands = parser.add_subparsers(dest="command", required=True)
    _add_serve(commands)
    add_commands(commands)
    args = parser.parse_args((sys.argv[1:] if argv is None else argv) or ["serve"])
    try:
        code: int = args.run(args)
    except ServerError as error:
        print(error, file=sys.stderr)
        return 1
    return code


def _add_serve(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    serve = commands.add_parser("serve", help="serve the vendors' APIs until Ctrl-C")
    serve.add_argument(
        "--port", type=int, default=8000, help="port on 127.0.0.1, 0 for a free one (default: 8000)"
    )
    serve.add_argument(
        "--state", type=Path, default=Path(".sandbox"), help="folder for data (default: .sandbox)"
    )
    serve.add_argument(
        "--warehouse", type=Path, help="DuckDB file (default: warehouse.duckdb in the state folder)"
    )
    serve.add_argument(
        "--job-seconds", type=float, default=3.0, help="how long a job takes at least (default: 3)"
    )
    serve.add_argument(
        "--webhooks", metavar="URL", help="of a receiver: tell it of jobs that end, as the vendors would"
    )
    serve.set_defaults(run=_serve)


def _serve(args: argparse.Namespace) -> int:
    sandbox = Sandbox(args.state, args.port, args.warehouse, job_seconds=args.job_seconds)
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    try:
        sandbox.start()
    except OSError as exc:
        print(
            f"The sandbox cannot listen on port {args.port}: {exc.strerror}. Try --port 0.", file=sys.stderr
        )
        return 1
    if args.webhooks:
        sandbox.webhooks.to(args.webhooks)
    try:
        print(guide(sandbox))
        print("Ctrl-C ends it.", flush=True)
        ended.wait()
    finally:
        sandbox.stop()
    print("The sandbox has stopped.")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
