"""Listen where events are not pushed to us: SQS queues, Kafka topics, PostgreSQL's channels.

    python -m deployments.listen [--file FILE] [--only NAME ...] [--env ENV | --branch BRANCH] [--check]

What is listened to stands in `listeners.yaml`; what events start, under `once_triggers` in the deployments'
files. One process runs all listeners. Nothing is acknowledged to a source before the Prefect server has it,
so the process may be killed at any moment. SIGTERM and Ctrl-C let what is in hand be finished. Several
machines may run the same listeners: queues and consumer groups share the work among them, and notifications
that have an id start one run. One with rows to `watch` is for one machine: two would move one watermark.

Another environment listens beside: its consumer groups and watermarks are its own. A queue has each message
once, so its listener must name a queue of its own.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_URL
from pydantic import BaseModel, ConfigDict, Field, model_validator

from deployments.entries import FILES, load_triggers
from deployments.environments import DeployError, Environment, environment, load_yaml, parse
from tasks.events import EltEvent, HandedOver, OnceTrigger, TriggersWrong, hand_over
from tasks.looking.kafka import KafkaSource, KafkaTopics
from tasks.looking.listener import ListenError, Source, listen, log
from tasks.looking.postgres import PostgresChannels, PostgresSource
from tasks.looking.sqs import SqsQueue, SqsSource

LISTENERS = Path(__file__).with_name("listeners.yaml")
Listener = Annotated[SqsQueue | KafkaTopics | PostgresChannels, Field(discriminator="source")]


class Listeners(BaseModel):
    """All of listeners.yaml."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    triggers: tuple[Path, ...] = Field(
        default=FILES, min_length=1, description="Files of deployments with `once_triggers`."
    )
    listeners: list[Listener]

    @model_validator(mode="after")
    def _apart(self) -> Listeners:
        names = [one.name for one in self.listeners]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"two listeners are called {', '.join(twice)}")
        return self


def read_listeners(file: Path) -> Listeners:
    """Read a file of listeners.

    Raises:
        ListenError: With the place and what is wrong there, a line for each.
    """
    try:
        return parse(Listeners, load_yaml(file), file)
    except DeployError as error:
        raise ListenError(str(error)) from None


def source_of(listener: SqsQueue | KafkaTopics | PostgresChannels, prefix: str = "") -> Source:
    """What listens as these settings say.

    Args:
        listener: The settings.
        prefix: Of the environment: keeps apart what it remembers of what it has heard.
    """
    match listener:
        case SqsQueue():
            return SqsSource(listener)
        case KafkaTopics():
            return KafkaSource(listener.model_copy(update={"group": f"{prefix}{listener.group}"}))
        case PostgresChannels():
            return PostgresSource(listener, prefix)


async def run(sources: Sequence[Source], triggers: Sequence[OnceTrigger]) -> None:
    """Listen to all of these until SIGTERM or Ctrl-C.

    Raises:
        ListenError: One could not even be begun with. Whatever ends one, the others are stopped as well.
    """
    if not PREFECT_API_URL.value():
        raise ListenError("PREFECT_API_URL is not set: there is no Prefect server to hand events to")
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)

    async with get_client() as client:

        async def hand(events: Sequence[EltEvent]) -> list[HandedOver]:
            return await hand_over(events, triggers, client)

        async def one(source: Source) -> None:
            try:
                await listen(source, hand, stop)
            except ListenError as error:
                raise ListenError(f"{source.label}: {error}") from None
            finally:
                stop.set()  # one that has ended, whyever, must not go unnoticed beside others that go on

        outcomes = await asyncio.gather(*(one(source) for source in sources), return_exceptions=True)
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code: 2 where something must be mended first."""
    parser = argparse.ArgumentParser(prog="python -m deployments.listen", description=__doc__.split("\n")[0])
    parser.add_argument("--file", type=Path, default=LISTENERS, help="which listeners (%(default)s)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these alone, also if they are not enabled")
    parser.add_argument("--env", help="start deployments of this environment")
    parser.add_argument("--branch", help="start deployments of this branch")
    parser.add_argument(
        "--check", action="store_true", help="read the files, say what would be done, and end"
    )
    options = parser.parse_args(arguments)
    logging.basicConfig(
        format="%(asctime)s %(levelname)-7s %(message)s", level=logging.WARNING, stream=sys.stdout
    )
    log.setLevel(logging.INFO)
    try:
        given = read_listeners(options.file)
        chosen = _chosen(given, options)
        here = environment(options.env, options.branch)
        _apart(chosen, here, options.file)
        triggers = load_triggers(here, given.triggers)
        for listener in chosen:
            log.info("%s: %s", listener.source, listener.name)
        log.info("%s once triggers of the environment %s", len(triggers), here.name)
        if not options.check:
            asyncio.run(run([source_of(listener, here.prefix) for listener in chosen], triggers))
    except (DeployError, ListenError, TriggersWrong) as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return 0


def _apart(chosen: Sequence[Listener], here: Environment, file: Path) -> None:
    """See that no environment takes another's messages out of a queue.

    Raises:
        ListenError: One would.
    """
    queues = [one.name for one in chosen if isinstance(one, SqsQueue)]
    if here.prefix and queues and file.resolve() == LISTENERS.resolve():
        raise ListenError(
            f"{', '.join(queues)}: SQS gives each message to one reader, so {here.name} would take those of "
            "the environment whose queues stand in listeners.yaml. Name queues of its own in another file "
            "(--file), or leave them out (--only)."
        )


def _chosen(given: Listeners, options: argparse.Namespace) -> list[Listener]:
    if not options.only:
        if chosen := [one for one in given.listeners if one.enabled]:
            return chosen
        raise ListenError(
            f"no listener in {options.file} is enabled: set `enabled: true`, or name it with --only"
        )
    names = {one.name: one for one in given.listeners}
    if unknown := [name for name in options.only if name not in names]:
        raise ListenError(f"{options.file} has no listener {', '.join(unknown)}; it has: {', '.join(names)}")
    return [names[name] for name in options.only]


if __name__ == "__main__":
    sys.exit(main())
