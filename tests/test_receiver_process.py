"""The receiver as a process of its own: killed, pestered and left without a server."""

from __future__ import annotations

import asyncio
import json
import os
import random
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import httpx
import pytest
import yaml
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.settings import PREFECT_API_URL, temporary_settings
from pydantic import SecretStr

from blocks import AirbyteServer
from blocks.receiver import (
    AirbyteWebhook,
    CensusWebhook,
    DbtCloudWebhook,
    EventSource,
    FivetranWebhook,
    GitWebhook,
    PagerDutyWebhook,
    S3Webhook,
    SignedWebhook,
    SlackCommand,
)
from deployments.receiver.__main__ import main
from deployments.server import LocalServer, free_port
from sandbox import Sandbox, catalog
from sandbox.webhooks import save_sources
from tests.deployed import REPOSITORY
from tests.events_fixtures import Target, until
from tests.receiver_fixtures import (
    SECRET,
    Sent,
    an_id,
    as_json,
    by_census,
    by_dbt_cloud,
    by_fivetran,
    by_git,
    by_pagerduty,
    by_signed,
    by_slack,
)
from tests.server_fixtures import own_server, server_folder, using

__all__ = ["own_server", "server_folder"]

# It has a server of its own, on PostgreSQL, and some of it takes a while where the machine is busy.
pytestmark = [pytest.mark.no_server, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def api(own_server: LocalServer) -> Iterator[SyncPrefectClient]:
    with using(own_server), get_client(sync_client=True) as client:
        yield client


@pytest.fixture
def target(api: SyncPrefectClient) -> Target:
    return Target(api)


@dataclass
class Receiver:
    """`python -m deployments.receiver` with some sources, whose events start a deployment."""

    folder: Path
    sources: list[str]
    target: Target
    expect: list[str]
    port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> Path:
        return self.folder / "receiver.log"

    def command(self) -> list[str]:
        trigger = {
            "name": f"once of {self.target.flow}",
            "expect": self.expect,
            "parameters": {"word": "{{ event.event }}"},
        }
        entry = {
            "name": self.target.name,
            "flow_name": self.target.flow,
            "entrypoint": "flows.elt.elt_chain",
            "once_triggers": [trigger],
        }
        file = self.folder / "prefect.yaml"
        file.write_text(yaml.safe_dump({"deployments": [entry]}))
        command = [
            sys.executable,
            "-m",
            "deployments.receiver",
            "--port",
            str(self.port),
            "--file",
            str(file),
        ]
        return [*command, *[word for source in self.sources for word in ("--source", source)]]

    def start(self) -> None:
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(  # noqa: S603
                self.command(), cwd=REPOSITORY, env={**os.environ}, stdout=output, stderr=output
            )
        until("the receiver is up", self._up)

    def _up(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, self.log.read_text()
        try:
            return httpx.get(f"{self.url}/health", timeout=5).is_success
        except httpx.TransportError:
            return False

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.kill()


@pytest.fixture
def receiver(tmp_path: Path, target: Target) -> Iterator[Receiver]:
    """Not started, with a source that takes any signed JSON."""
    SignedWebhook(secret=SECRET, id_path="id").save("main", overwrite=True)
    receiver = Receiver(tmp_path, ["signed-webhook/main"], target, ["elt.hook.received"])
    yield receiver
    receiver.stop()


def test_killed_in_the_middle(receiver: Receiver, target: Target, api: SyncPrefectClient) -> None:
    """500 signed hooks, a fifth of them duplicates, a SIGKILL in the middle: one run for each event."""
    distinct = [by_signed({"id": f"{n}-{an_id()}"}) for n in range(400)]
    chance = random.Random(5)  # noqa: S311 - an order, no secret
    waiting = [*distinct, *chance.sample(distinct, 100)]
    chance.shuffle(waiting)
    acknowledged = 0
    event_ids: set[str] = set()

    async def send(client: httpx.AsyncClient) -> None:
        nonlocal acknowledged
        while waiting:
            sent = waiting.pop()
            while True:  # as a vendor does, until it is taken
                try:
                    reply = await client.post(sent.path, content=sent.body, headers=sent.headers)
                except httpx.TransportError:
                    await asyncio.sleep(0.2)
                    continue
                if reply.is_success:
                    break
                assert reply.status_code == 503, reply.text
                await asyncio.sleep(0.2)
            acknowledged += 1
            event_ids.update(event["id"] for event in reply.json()["events"])

    async def kill_in_the_middle() -> None:
        deadline = time.monotonic() + 120
        while acknowledged < 150:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.02)
        receiver.kill()
        await asyncio.to_thread(receiver.start)

    async def everything() -> None:
        async with httpx.AsyncClient(base_url=receiver.url, timeout=60) as client:
            await asyncio.gather(kill_in_the_middle(), *[send(client) for _ in range(8)])

    receiver.start()
    asyncio.run(everything())
    assert (acknowledged, len(event_ids)) == (500, 400)
    runs = target.runs()
    assert len(runs) == 400
    assert {run.labels["elt.event.id"] for run in runs} == event_ids
    assert SECRET.get_secret_value() not in receiver.log.read_text()


async def test_the_server_goes_and_comes_back(
    receiver: Receiver, target: Target, own_server: LocalServer, api: SyncPrefectClient
) -> None:
    """While the server is away nothing is acknowledged; what is sent again later starts its run."""
    receiver.start()
    before, sent = by_signed({"id": an_id()}), by_signed({"id": an_id()})
    async with httpx.AsyncClient(base_url=receiver.url, timeout=60) as client:
        assert (
            await client.post(before.path, content=before.body, headers=before.headers)
        ).status_code == 200
        own_server.stop_prefect(at_once=True)
        try:
            away = await client.post(sent.path, content=sent.body, headers=sent.headers)
            ready = await client.get("/ready")
        finally:
            own_server.start_prefect()
        assert (away.status_code, away.headers["Retry-After"]) == (503, "10")
        assert ready.status_code == 503
        back = await client.post(sent.path, content=sent.body, headers=sent.headers)
        assert back.status_code == 200
    assert len(target.runs()) == 2


# --- strangers ---

_S3, _TOPIC = "/hooks/s3-webhook/main", "arn:aws:sns:us-east-1:1:landing"
_EVENT = {"event": "sync_end", "created": "2026-03-02T07:02:54Z", "connector_id": "x", "sync_id": "y"}
_VALID = {
    "fivetran-webhook": by_fivetran({**_EVENT, "data": {"status": "SUCCESSFUL"}}),
    "dbt-cloud-webhook": by_dbt_cloud(
        {
            "accountId": 1,
            "timestamp": "2026-03-02T06:14:51Z",
            "eventType": "job.run.completed",
            "data": {"jobId": "1", "runId": "2", "runStatusCode": 10},
        }
    ),
    "census-webhook": by_census({"event": "sync.success", "workspace_id": 1, "sync_id": 2, "sync_run_id": 3}),
    "pagerduty-webhook": by_pagerduty(
        {
            "event": {
                "id": "1",
                "event_type": "incident.triggered",
                "occurred_at": "2026-03-02T06:14:51Z",
                "data": {"id": "P1"},
            }
        }
    ),
    "signed-webhook": by_signed({"id": "1"}),
}
_SIGN = {
    "fivetran-webhook": by_fivetran,
    "dbt-cloud-webhook": by_dbt_cloud,
    "census-webhook": by_census,
    "pagerduty-webhook": by_pagerduty,
    "signed-webhook": by_signed,
    "git-webhook": lambda body: by_git("github", "push", body),
    "slack-command": by_slack,
}


def _save_all() -> list[str]:
    """A block of each kind that needs nothing outside."""
    push = GitWebhook(provider="github", secret=SECRET)
    command = SlackCommand(secret=SECRET, team_id="T1", users=["U1"], deployments=["a/b"])
    airbyte = AirbyteWebhook(
        url_secret=SECRET, server=AirbyteServer(base_url="http://127.0.0.1:9", token=SecretStr("x"))
    )
    blocks: list[EventSource] = [
        S3Webhook(api_key=SECRET, topics=[_TOPIC]),
        FivetranWebhook(secret=SECRET),
        DbtCloudWebhook(secret=SECRET),
        CensusWebhook(secret=SECRET),
        PagerDutyWebhook(secret=SECRET),
        SignedWebhook(secret=SECRET, id_path="id"),
        push,
        command,
        airbyte,
    ]
    for block in blocks:
        block.save("main", overwrite=True)
    return [f"{block.get_block_type_slug()}/main" for block in blocks]


def _by_strangers(chance: random.Random) -> Iterator[Sent]:
    """What nobody should send: with and without the right signature."""
    junk = [
        b"", b"null", b"[]", b"0", b'""', b"{", b"\x00", b"\xff\xfe\x00", b"[" * 50_000, b'{"a":' * 5_000,
        b'{"event": "\\ud800"}', b'{"event": NaN}', b"1e999", b"9" * 10_000, "\ufeff{}".encode(),
        b"a=b&c=d", b"%ff=%ff", b"&" * 5000,
    ]  # fmt: skip
    for kind, sign in _SIGN.items():
        for body in junk:
            yield sign(body)
        yield sign(chance.randbytes(200))
        yield sign(junk[0]).but(headers={})
        yield Sent(f"/hooks/{kind}/main", b"{}", {"X-Signature": "é".encode("latin-1").decode("latin-1")})
    for valid in _VALID.values():
        yield valid.but(headers={})
        yield valid.but(body=valid.body + b" ")
        yield valid.but(headers={name: value[:-1] for name, value in valid.headers.items()})
        yield valid.but(headers={name: "0" * len(value) for name, value in valid.headers.items()})
    secret = SECRET.get_secret_value()
    for tail in ("", "/", "/wrong", f"/{secret}x", f"/{secret}/", f"//{secret}", "/%00", "/%ff"):
        yield Sent(f"/hooks/airbyte-webhook/main{tail}", as_json({"data": {"jobId": 1}}))
    for body in (b"[]", b"{", b'{"data": 1}', b'{"data": {"jobId": {}}}', b'{"data": {"jobId": -1}}'):
        yield Sent(f"/hooks/airbyte-webhook/main/{secret}", body)
    yield by_slack({"team_id": "T1"}, at=time.time() - 1000)
    for digits in (20, 400, 5_000):
        slack = by_slack({"team_id": "T1"})
        yield slack.but(headers={**slack.headers, "X-Slack-Request-Timestamp": "9" * digits})
    for address in ("\nx.pem", "\ud800.pem", " .pem", "x" * 70_000 + ".pem", "\t:99999999/x.pem"):
        yield _by_topic(SigningCertURL=f"https://sns.us-east-1.amazonaws.com/{address}")
        yield _by_topic(SigningCertURL=f"https://sns.us-east-1.amazonaws.com{address}")
    for body in (b"[]", b"5", b"[" * 50_000, as_json({"Type": "Notification", "Message": "[" * 50_000})):
        yield Sent(_S3, body, {"x-amz-sns-message-type": "Notification"})
        yield Sent(_S3, body, {"x-api-key": SECRET.get_secret_value()})
    yield Sent("/hooks/nothing/main", b"{}")
    yield Sent("/hooks/", b"{}")


def _by_topic(**changes: str) -> Sent:
    """A message of SNS's topic that SNS has not signed."""
    message = {
        "Type": "Notification",
        "MessageId": "1",
        "TopicArn": _TOPIC,
        "Message": "{}",
        "Timestamp": datetime.now(UTC).isoformat(),
        "SignatureVersion": "1",
        "Signature": "",
        **changes,
    }
    return Sent(_S3, as_json(message), {"x-amz-sns-message-type": "Notification"})


def _by_slips(chance: random.Random) -> Iterator[Sent]:
    """What each vendor sends, with one value that is something else."""
    for kind, valid in _VALID.items():
        for value in (None, [], {}, -1, 1.5, True, "x" * 5000, "a\0b", "\ud800", "2026-13-45T99:99:99Z"):
            yield _SIGN[kind](as_json(_with(json.loads(valid.body), value, chance)))


def _with(document: dict[str, object], value: object, chance: random.Random) -> dict[str, object]:
    """The document with one of its values replaced, at whatever depth."""
    here: dict[str, object] = document
    while True:
        name = chance.choice(sorted(here))
        inside = here[name]
        if not isinstance(inside, dict) or chance.random() < 0.3:
            here[name] = value
            return document
        here = inside


def test_pestered(tmp_path: Path, target: Target) -> None:
    """Whatever is sent, signed or not: 4xx, or acknowledged as needless; never 5xx, no run, still up."""
    receiver = Receiver(tmp_path, _save_all(), target, ["elt.*"])
    chance = random.Random(7)  # noqa: S311 - what is sent, no secret

    async def pester() -> None:
        async with httpx.AsyncClient(base_url=receiver.url, timeout=60) as client:
            answers = await _answers(client, _by_strangers(chance))
            assert answers[400] > 50
            assert answers[401] > 20
            assert not target.runs()
            # Of these some are well: the value that was replaced nobody reads.
            answers = await _answers(client, _by_slips(chance))
            assert answers[400] > 10
            big = by_signed(b" " * 10_000_000)
            for body in (big.body, _chunks(big.body)):
                reply = await client.post(big.path, content=body, headers=big.headers)
                assert reply.status_code == 413
            await asyncio.to_thread(_cut_off, receiver.port)
            await asyncio.to_thread(_upgrade, receiver.port)
            assert (await client.get("/ready")).status_code == 200

    receiver.start()
    try:
        asyncio.run(pester())
    finally:
        receiver.stop()
    log = receiver.log.read_text()
    assert "Traceback" not in log
    assert SECRET.get_secret_value() not in log


async def _answers(client: httpx.AsyncClient, requests: Iterable[Sent]) -> Counter[int]:
    """How many of these had which answer; none had a 5xx."""
    answers: Counter[int] = Counter()
    for sent in requests:
        headers = {name: value.encode("latin-1") for name, value in sent.headers.items()}
        reply = await client.post(sent.path, content=sent.body, headers=headers)
        assert reply.status_code < 500, (sent.path, sent.body[:200], reply.text)
        answers[reply.status_code] += 1
    return answers


async def _chunks(body: bytes) -> AsyncIterator[bytes]:
    for start in range(0, len(body), 65_536):
        yield body[start : start + 65_536]


def _cut_off(port: int) -> None:
    """Senders that hang up in the middle of their headers and of their body, and that speak no HTTP."""
    request = b"POST /hooks/signed-webhook/main HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n"
    for text in (request, request + b"\r\nhalf of it", b"\x16\x03\x01\x02\x00", b"GET / HTTP/9.9\r\n\r\n"):
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(text)


def _upgrade(port: int) -> None:
    """Senders that ask for a WebSocket or for HTTP/2, at an address with a secret."""
    address = f"/hooks/airbyte-webhook/main/{SECRET.get_secret_value()}"
    websocket = "websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="
    for to in (websocket, "h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__"):
        asked = f"GET {address} HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: {to}\r\n\r\n"
        with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
            connection.sendall(asked.encode())
            assert connection.recv(12) == b"HTTP/1.1 404"


# --- the whole way ---


def test_vendors_of_the_sandbox(
    tmp_path: Path, target: Target, api: SyncPrefectClient, sandbox: Sandbox
) -> None:
    """What each vendor of the sandbox sends at the end of a job starts a run, once."""
    sources = save_sources(sandbox.url)
    names = ["elt.airbyte.job.*", "elt.fivetran.sync.*", "elt.dbt_cloud.run.*", "elt.census.sync.*"]
    receiver = Receiver(tmp_path, sources, target, names)
    receiver.start()
    try:
        sandbox.webhooks.to(receiver.url)
        (connection,) = sandbox.airbyte.add_connections(1, duration=0.1)
        sandbox.airbyte.start(connection, "sync")
        (fivetran,) = sandbox.fivetran.add_connections(1, duration=0.1)
        sandbox.fivetran.trigger(fivetran)
        (job,) = sandbox.dbt_cloud.add_jobs(1, duration=0.1)
        sandbox.dbt_cloud.trigger(job)
        (sync,) = sandbox.census.add_syncs(1, duration=0.1)
        sandbox.census.trigger(sync)
        until("all four are told", lambda: sum(one.status == 200 for one in sandbox.webhooks.deliveries) == 4)
    finally:
        receiver.stop()
    assert sorted(str(run.parameters["word"]) for run in target.runs()) == [
        "elt.airbyte.job.succeeded",
        "elt.census.sync.succeeded",
        "elt.dbt_cloud.run.succeeded",
        "elt.fivetran.sync.succeeded",
    ]
    log = receiver.log.read_text()
    assert catalog.WEBHOOK_SECRET not in log
    assert "/hooks/airbyte-webhook/sandbox/<secret>" in log


@pytest.mark.parametrize(
    ("arguments", "api_url", "said"),
    [
        (["--source", "signed-webhook/not-saved"], True, "no Signed Webhook block named 'not-saved'"),
        (["--source", "unknown/main"], True, "the kind one of airbyte-webhook"),
        (["--source", "signed-webhook"], True, "<kind>/<name>"),
        (["--file", "nowhere.yaml"], True, "nowhere.yaml can't be read"),
        (["--env", "nowhere"], True, "no environment 'nowhere'"),
        ([], None, "PREFECT_API_URL is not set"),
        ([], "http://127.0.0.1:9/api", "can't be reached"),
    ],
    ids=str,
)
def test_it_says_why_it_does_not_start(
    own_server: LocalServer,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    api_url: str | bool | None,
    said: str,
) -> None:
    """What is missing is said at the start, in a sentence."""
    url = own_server.api_url if api_url is True else api_url
    with temporary_settings({PREFECT_API_URL: url}):
        assert main(arguments) == 1
    assert said in capsys.readouterr().err
