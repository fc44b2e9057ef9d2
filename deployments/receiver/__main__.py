"""Starts the receiver: `make receiver`, or `python -m deployments.receiver`."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import sys
from pathlib import Path
from typing import Any

import uvicorn
from prefect import get_client
from prefect.settings import PREFECT_API_URL
from starlette.applications import Starlette

from deployments.entries import FILES, load_triggers
from deployments.environments import DeployError, environment
from deployments.receiver.app import Limits, build_app
from deployments.receiver.setup import KINDS, SetupWrong, load_sources
from deployments.receiver.source import Source
from tasks.events import OnceTrigger, TriggersWrong

_ABOUT = f"""\
Takes webhooks and commands, makes each a Prefect event, and starts the deployments whose once_triggers cover
it, once. What is on are the saved blocks of these kinds: {", ".join(KINDS)}; --source (or
ELT_RECEIVER_SOURCES) restricts it to some. PREFECT_API_URL says where the Prefect server is. docs/events/ has
each vendor's settings.
"""


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m deployments.receiver", description=_ABOUT)
    parser.add_argument("--host", default="127.0.0.1", help="to listen on (127.0.0.1)")
    parser.add_argument("--port", type=int, default=4280, help="to listen on (4280)")
    parser.add_argument(
        "--source",
        action="append",
        metavar="KIND/NAME",
        help="a source that is on, such as fivetran-webhook/main; may be given several times. "
        "By default ELT_RECEIVER_SOURCES (separated by commas), else every saved block",
    )
    parser.add_argument(
        "--env", help="environment of deployments/environments.yaml whose deployments are started"
    )
    parser.add_argument("--branch", help="the same for a branch's deployments")
    parser.add_argument(
        "--file",
        action="append",
        type=Path,
        metavar="YAML",
        help="of deployments with once_triggers; may be given several times. "
        "By default deployments/prefect.yaml and deployments/pipelines.yaml",
    )
    parser.add_argument("--max-body", type=int, default=Limits.body, help="bytes of a body (1000000)")
    parser.add_argument("--concurrency", type=int, default=200, help="requests at a time; more get 503 (200)")
    return parser.parse_args(arguments)


async def _load(options: argparse.Namespace) -> tuple[list[Source[Any]], tuple[OnceTrigger, ...]]:
    if not PREFECT_API_URL.value():
        raise SetupWrong("PREFECT_API_URL is not set: say where the Prefect server is")
    triggers = load_triggers(environment(options.env, options.branch), options.file or FILES)
    named = options.source or [
        one for one in os.environ.get("ELT_RECEIVER_SOURCES", "").split(",") if one.strip()
    ]
    async with get_client() as client:
        if (error := await client.api_healthcheck()) is not None:
            raise SetupWrong(f"the Prefect server at {PREFECT_API_URL.value()} can't be reached: {error}")
        return await load_sources(client, [one.strip() for one in named]), triggers


def _log_to_stderr() -> None:
    """What the receiver itself says; Prefect has set up the root logger for warnings alone."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    for name in ("elt.receiver", "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(logging.INFO)
    for name in ("httpx", "httpcore"):  # they write whole addresses, and those of Slack's answers are secret
        logging.getLogger(name).setLevel(logging.WARNING)


def _serve(app: Starlette, options: argparse.Namespace) -> None:
    # No access log: it would write addresses, and one of them carries a secret.
    uvicorn.run(
        app,
        host=options.host,
        port=options.port,
        access_log=False,
        log_config=None,
        ws="none",  # a handshake would be logged with its address, whoever sends it
        limit_concurrency=options.concurrency,
        timeout_graceful_shutdown=15,
        server_header=False,
    )


def main(arguments: list[str] | None = None) -> int:
    """Start the receiver and stay until it is stopped.

    Returns:
        The exit code: 1 where it could not be started.
    """
    options = _options(arguments)
    try:
        sources, triggers = asyncio.run(_load(options))
    except (SetupWrong, TriggersWrong, DeployError) as error:
        print(f"✗ {error}", file=sys.stderr)  # noqa: T201 - it is a command
        return 1
    _log_to_stderr()
    log = logging.getLogger("elt.receiver")
    for source in sources:
        log.info("on: %s", source.shown_path)
    for trigger in triggers:
        log.info("%s starts %s", " or ".join(sorted(trigger.expect)), trigger.deployment)
    _serve(build_app(sources, triggers, Limits(body=options.max_body)), options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
