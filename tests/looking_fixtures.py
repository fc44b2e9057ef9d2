"""A deployment that events start, and its runs; a store and queues of a real HTTP server; a child to kill."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

import boto3
import pytest
import yaml
from moto.server import ThreadedMotoServer
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterDeploymentId
from prefect.client.schemas.objects import FlowRun
from prefect_aws import AwsCredentials, S3Bucket
from prefect_aws.client_parameters import AwsClientParameters

from tasks.events import OnceTrigger

REPOSITORY = Path(__file__).parent.parent
_PAGE = 200


class Target:
    """A deployment of its own, that nobody works for: its runs stay as they were created."""

    def __init__(self, client: SyncPrefectClient) -> None:
        self.client = client
        self.flow = f"told-{uuid4().hex[:8]}"
        flow_id = client.create_flow_from_name(self.flow)
        self.id = client.create_deployment(flow_id, "target", entrypoint="nowhere.py:none")

    def trigger(self, *expect: str, **match: str) -> OnceTrigger:
        """Starts a run for each of these events, with the whole payload as its parameter."""
        return OnceTrigger(
            deployment=f"{self.flow}/target",
            name=f"of {self.flow}",
            expect=frozenset(expect),
            match=match,
            parameters={
                "payload": {"__prefect_kind": "json", "value": {
                    "__prefect_kind": "jinja", "template": "{{ event.payload | tojson }}",
                }},
            },
        )  # fmt: skip

    def runs(self) -> list[FlowRun]:
        found: list[FlowRun] = []
        of_deployment = FlowRunFilter(deployment_id=FlowRunFilterDeploymentId(any_=[self.id]))
        while True:
            page = self.client.read_flow_runs(
                flow_run_filter=of_deployment, limit=_PAGE, offset=len(found), sort="START_TIME_ASC"
            )
            found += page
            if len(page) < _PAGE:
                return found

    def payloads(self) -> list[dict[str, Any]]:
        return [run.parameters["payload"] for run in self.runs()]


@pytest.fixture
def target(prefect_server: str) -> Iterator[Target]:
    with get_client(sync_client=True) as client:
        yield Target(client)


@pytest.fixture(scope="module")
def aws() -> Iterator[str]:
    """The address of a server of the S3 and SQS API."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


def aws_client(service: str, endpoint: str) -> Any:
    session = boto3.Session("a-key", "a-secret-key", region_name="us-east-1")
    return session.client(service, endpoint_url=endpoint)


def credentials(endpoint: str) -> AwsCredentials:
    return AwsCredentials(
        region_name="us-east-1",
        aws_access_key_id="a-key",
        aws_secret_access_key="a-secret-key",
        aws_client_parameters=AwsClientParameters(
            endpoint_url=endpoint, config={"retries": {"max_attempts": 1}}
        ),
    )


class Landing:
    """A bucket of its own."""

    def __init__(self, endpoint: str) -> None:
        self.endpoint, self.name = endpoint, f"landing-{uuid4().hex[:8]}"
        self.s3 = aws_client("s3", endpoint)
        self.s3.create_bucket(Bucket=self.name)

    def block(self, folder: str = "") -> S3Bucket:
        return S3Bucket(bucket_name=self.name, bucket_folder=folder, credentials=credentials(self.endpoint))

    def put(self, *keys: str, body: bytes = b"x") -> None:
        for key in keys:
            self.s3.put_object(Bucket=self.name, Key=key, Body=body)

    def keys(self, prefix: str = "") -> list[str]:
        pages = self.s3.get_paginator("list_objects_v2").paginate(Bucket=self.name, Prefix=prefix)
        return [found["Key"] for page in pages for found in page.get("Contents", [])]


@pytest.fixture
def landing(aws: str) -> Iterator[Landing]:
    made = Landing(aws)
    yield made
    made.s3.close()


class Child:
    """A Python process that can be killed, with what it says in a file."""

    def __init__(self, log: Path, *arguments: str, env: dict[str, str] | None = None) -> None:
        self.log = log
        with log.open("ab") as output:
            self.process = subprocess.Popen(  # noqa: S603
                [sys.executable, *arguments],
                cwd=REPOSITORY,
                env={**os.environ, **(env or {})},
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def until(self, what: str, happened: Callable[[], bool], within: float = 90.0) -> None:
        deadline = time.monotonic() + within
        while not happened():
            said = self.log.read_text()
            assert self.process.poll() is None, f"it ended before {what}:\n{said}"
            assert time.monotonic() < deadline, f"not within {within:g} s: {what}\n{said}"
            time.sleep(0.05)

    def kill(self) -> None:
        """As a machine that is switched off: nothing can be tidied up."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(30)

    def terminate(self) -> int:
        self.process.terminate()
        return self.process.wait(60)

    def ended(self, within: float = 120.0) -> None:
        assert self.process.wait(within) == 0, self.log.read_text()


@pytest.fixture
def child(tmp_path: Path) -> Iterator[Callable[..., Child]]:
    """Starts processes; none of them outlives its test."""
    started: list[Child] = []

    def start(*arguments: str, **env: str) -> Child:
        started.append(Child(tmp_path / "child.log", *arguments, env=env))
        return started[-1]

    yield start
    for one in started:
        if one.process.poll() is None:
            one.kill()


def keys_of(payloads: Sequence[dict[str, Any]]) -> list[str]:
    return sorted(payload["key"] for payload in payloads)


class Listening:
    """`python -m deployments.listen`, as people start it, with files of its own."""

    def __init__(self, folder: Path, target: Target, start: Callable[..., Child]) -> None:
        self._folder, self._target, self._start = folder, target, start

    def files(self, listener: dict[str, Any], *expect: str) -> Path:
        """The file of listeners, and the deployment's triggers beside it."""
        trigger = self._target.trigger(*expect).model_dump(mode="json", include={"name", "parameters"})
        deployment = {
            "name": "target",
            "flow_name": self._target.flow,
            "once_triggers": [{**trigger, "expect": list(expect)}],
        }
        triggers = self._folder / "deployments.yaml"
        triggers.write_text(yaml.safe_dump({"deployments": [deployment]}))
        file = self._folder / "listeners.yaml"
        file.write_text(yaml.safe_dump({"triggers": [str(triggers)], "listeners": [listener]}))
        return file

    def start(self, listener: dict[str, Any], *expect: str, patch: str = "", **env: str) -> Child:
        """Start it; `patch` is Python that is run in it before."""
        file = self.files(listener, *expect)
        call = f"import sys; from deployments.listen import main; sys.exit(main(['--file', {str(file)!r}]))"
        return self._start("-c", f"{patch}\n{call}", **env)


@pytest.fixture
def listening(tmp_path: Path, target: Target, child: Callable[..., Child]) -> Listening:
    return Listening(tmp_path, target, child)
