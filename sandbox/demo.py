"""The demo: the main job once, on real flights, with a calm account of it in the terminal."""

from __future__ import annotations

import argparse
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self
from uuid import UUID

from deployments.server.local import free_port
from sandbox import catalog
from sandbox.stage import Stage
from sandbox.webhooks import save_sources

if TYPE_CHECKING:
    from flows import EltReport

_ROOT = Path(__file__).parent.parent
RECEIVER_PORT = 4280
_QUIET = {
    # The account below takes the place of Prefect's own console; the UI has every line.
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
    "PREFECT_LOGGING_LEVEL": "INFO",
}


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `demo` and `ui` to the command line."""
    demo = commands.add_parser("demo", help="run the main job once and say what happened")
    demo.add_argument("--fail", action="append", default=[], metavar="CONNECTION", help="make this sync fail")
    demo.add_argument(
        "--resume",
        action="store_true",
        help="go on with the newest run that was killed, instead of a new one",
    )
    ui = commands.add_parser("ui", help="keep the Prefect server and the sandbox up until Ctrl-C")
    for command, run in ((demo, run_demo), (ui, run_ui)):
        command.add_argument(
            "--state", type=Path, default=Path(".sandbox"), help="folder for data (default: .sandbox)"
        )
        command.set_defaults(run=run)


def run_demo(args: argparse.Namespace) -> int:
    """Set the stage, run the chain, print the summary. 0 only if everything that was asked for was done."""
    names = [spec.name for spec in catalog.CONNECTIONS]
    if unknown := [name for name in args.fail if name not in names]:
        print(f"There is no connection {', '.join(unknown)}; there are {', '.join(names)}.", file=sys.stderr)
        return 2
    began = time.monotonic()
    _say(began, "starting a Prefect server and the sandbox")
    with Stage(args.state) as stage:
        os.environ.update(_QUIET)
        _say(began, f"Prefect  {stage.prefect_url}" + ("  (that of `make ui`)" if stage.shared else ""))
        _say(began, f"sandbox  {stage.sandbox_url}")
        stage.save_blocks(dbt_cloud=False)  # the demo builds with dbt Core
        for name in args.fail:
            stage.control("PATCH", f"/connections/{name}", {"outcome": "fail", "times": 1})
            _say(began, f"the {name} connection will fail once")
        told_before = len(stage.messages())
        report = _run_chain(stage, began, resume=args.resume)
        _settle(report)
        if report is None:
            return 1
        _print_summary(report, stage, told_before)
    return 0 if report.complete else 1


def run_ui(args: argparse.Namespace) -> int:
    """Keep everything up, with the deployments on a worker, so that the UI's buttons work."""
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    with Stage(args.state) as stage:
        if stage.shared:
            print(f"It is up already: {stage.prefect_url}", file=sys.stderr)
            return 1
        stage.save_blocks()
        print(f"Prefect UI  {stage.prefect_url}/v2   (the older interface: {stage.prefect_url})")
        print(f"sandbox     {stage.sandbox_url}")
        print(f"warehouse   {stage.warehouse}")
        with _Worker(stage) as worker:
            print(f"receiver    {worker.receiver_url}")
            print("The deployments are on a worker: run them from the UI.")
            print("A sync by Airbyte's own scheduler is told to the receiver, which starts dbt on it:")
            print(f"  curl -X POST {stage.sandbox_url}/_sandbox/connections/weather/jobs")
            print("Ctrl-C ends all of it.", flush=True)
            ended.wait()
    print("Stopped.")
    return 0


class _Worker:
    """Deploys everything and keeps a process worker for it, and a receiver to which the sandbox tells."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._log = stage.state / "prefect" / "worker.log"
        self._port = free_port(RECEIVER_PORT)
        self._processes: list[subprocess.Popen[bytes]] = []

    @property
    def receiver_url(self) -> str:
        """Where the receiver is."""
        return f"http://127.0.0.1:{self._port}"

    def __enter__(self) -> Self:
        sources = [word for source in save_sources(self._stage.sandbox_url) for word in ("--source", source)]
        python = [sys.executable, "-m"]
        with self._log.open("ab") as output:
            deploy = [*python, "deployments.deploy"]
            subprocess.run(deploy, cwd=_ROOT, stdout=output, stderr=output, check=True)  # noqa: S603
            for command in (
                [*python, "prefect", "worker", "start", "--pool", "elt", "--type", "process"],
                [*python, "deployments.receiver", "--port", str(self._port), *sources],
            ):
                self._processes.append(
                    subprocess.Popen(  # noqa: S603
                        command,
                        cwd=_ROOT,
                        env={**os.environ, "PREFECT_WORKER_QUERY_SECONDS": "2"},
                        stdout=output,
                        stderr=output,
                        start_new_session=True,
                    )
                )
        self._stage.control("PUT", "/webhooks", {"receiver": self.receiver_url})
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _run_chain(stage: Stage, began: float, *, resume: bool) -> EltReport | None:
    from prefect.logging.configuration import setup_logging

    from flows import EltReport, RunFailed
    from flows.fan_out import KNOWN_ERRORS

    setup_logging()
    account = _Account(began)
    for name in ("prefect.flow_runs", "prefect.task_runs"):
        logging.getLogger(name).addHandler(account)
    try:
        report = _resumed() if resume else _chain(stage)
    except RunFailed as error:
        report = error.report
    except KNOWN_ERRORS as error:
        print(f"\n{error}", file=sys.stderr)
        return None
    assert isinstance(report, EltReport)  # noqa: S101 - for the type checker
    return report


def _chain(stage: Stage) -> Any:
    from flows import elt_chain
    from tasks.airbyte import AirbyteSync
    from tasks.dbt_core import DbtCore
    from tasks.hightouch import HightouchSync
    from tasks.slack import SlackNotify

    return elt_chain(
        syncs=[
            AirbyteSync(server="airbyte", connection_id=spec.connection_id, name=spec.name)
            for spec in catalog.CONNECTIONS
        ],
        transform=DbtCore(project_dir=_ROOT / "sandbox" / "dbt", env={"ELT_WAREHOUSE": str(stage.warehouse)}),
        activations=[
            HightouchSync(credentials="hightouch", sync_id=str(spec.sync_id), name=spec.slug)
            for spec in catalog.SYNCS
        ],
        notify=[
            SlackNotify(webhook=catalog.DEFAULT_CHANNEL, owners={name: name for name in catalog.OWNERS}),
        ],
        allow_failure="any",
    )


def _resumed() -> Any:
    """The newest run of the chain that has not ended, from where its journal says that it was."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import (
        FlowFilter,
        FlowFilterName,
        FlowRunFilter,
        FlowRunFilterDeploymentId,
        FlowRunFilterState,
        FlowRunFilterStateType,
    )
    from prefect.client.schemas.objects import StateType
    from prefect.client.schemas.sorting import FlowRunSort
    from prefect.flow_engine import run_flow
    from prefect.states import AwaitingRetry

    from flows import elt_chain
    from tasks.jobs import InputError

    unfinished = [StateType.RUNNING, StateType.PENDING, StateType.CRASHED, StateType.FAILED]
    with get_client(sync_client=True) as client:
        runs = client.read_flow_runs(
            flow_filter=FlowFilter(name=FlowFilterName(any_=[elt_chain.name])),
            flow_run_filter=FlowRunFilter(
                # Begun and not ended well; those of the deployments are the worker's to retry.
                state=FlowRunFilterState(type=FlowRunFilterStateType(any_=unfinished)),
                deployment_id=FlowRunFilterDeploymentId(is_null_=True),
            ),
            sort=FlowRunSort.START_TIME_DESC,
            limit=1,
        )
        if not runs:
            raise InputError("There is no run of the demo to resume: each has ended well, or there is none.")
        # What was killed is Running for ever as far as the server knows.
        client.set_flow_run_state(runs[0].id, AwaitingRetry(), force=True)
        run = client.read_flow_run(runs[0].id)
    return run_flow(elt_chain, flow_run=run, parameters=run.parameters)


def _settle(report: EltReport | None) -> None:
    """Wait until the server has everything: what is under way when it stops would be lost."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId, TaskRunFilter
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogHandler

    APILogHandler().flush()
    EventsWorker.drain_all()
    if report is None:
        return
    of_run = FlowRunFilter(id=FlowRunFilterId(any_=[UUID(report.flow_run_id)]))
    deadline = time.monotonic() + 15
    with get_client(sync_client=True) as client:
        while time.monotonic() < deadline:
            runs = client.read_task_runs(flow_run_filter=of_run, task_run_filter=TaskRunFilter(), limit=200)
            if runs and all(run.state and run.state.is_final() for run in runs):
                return
            time.sleep(0.3)


class _Account(logging.Handler):
    """What happens, a line per step; of dbt's nodes only how many are done."""

    def __init__(self, began: float) -> None:
        super().__init__(logging.INFO)
        self._began = began
        self._nodes = 0
        self._said = 0.0

    def emit(self, record: logging.LogRecord) -> None:
        step = getattr(record, "task_run_name", None) or ""
        text = " ".join(record.getMessage().split())
        kind = step.split(" ", 1)[0]
        ended = text.startswith("Finished in state")
        if kind in ("model", "test", "seed", "snapshot", "unit", "exposure", "hook"):
            self._nodes += ended
            if ended and time.monotonic() - self._said > 2:
                self._said = time.monotonic()
                _say(self._began, f"dbt: {self._nodes} nodes done")
            if not (ended and "Failed" in text):
                return
        if text.startswith("Beginning flow run") or (ended and not step):
            return
        if not step:
            _say(self._began, text)
            return
        text = re.sub(r" http\S+", "", text).removeprefix("Task run failed with exception: ")
        if kind in ("sync", "activate", "dbt"):
            if not ended:  # their own last line says how they ended, with name and rows
                _say(self._began, text)
            return
        _say(self._began, f"{step}: {text}".replace("Finished in state Completed()", "done"))


def _say(began: float, text: str) -> None:
    seconds = int(time.monotonic() - began)
    print(f"{seconds // 60:02}:{seconds % 60:02}  {text}", flush=True)


def _print_summary(report: EltReport, stage: Stage, told_before: int) -> None:
    print(f"\n{report.ending}: {report.message}\n")
    for step in report.steps:
        print(f"  {step.line}" + (f" (owner: {step.owner})" if step.failed and step.owner else ""))
    if report.held_nodes:
        print(f"\n  not built: {', '.join(sorted(report.held_nodes))}")
    print()
    for line in report.tree().splitlines():
        print(f"  {line}")
    print("\nTold on Slack:")
    for message in stage.messages()[told_before:]:
        print(f"  #{message['channel']}")
        for line in message["text"].splitlines():
            # Slack's links, <url|text>, as their text.
            print("    " + re.sub(r"<[^|>]*\|([^>]*)>", r"\1", line))
    print("\nWhere to look:")
    print("  make ui                 the Prefect UI with this run, its report and its task runs")
    if report.flow_run_url:
        print(f"                          then {report.flow_run_url}")
    print(f"  {stage.warehouse}   the warehouse (DuckDB)")
