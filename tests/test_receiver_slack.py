"""The Slack command: who may give it starts what is allowed, once, and hears how it went."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
from prefect.client.orchestration import SyncPrefectClient
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Completed, Failed, Running
from pydantic import ValidationError

from blocks.receiver import SlackCommand
from deployments.receiver import slack as receiver_slack
from deployments.receiver.slack import SlackSource
from sandbox.stage import free_port
from tests.events_fixtures import Target, api, target
from tests.receiver_fixtures import SECRET, an_id, by_slack, post, running

__all__ = ["api", "target"]

RESPONSE_URL = "https://hooks.slack.com/commands/1234/5678"


@dataclass
class Answers:
    """What was posted to Slack later, and where."""

    posted: list[tuple[str, str]] = field(default_factory=list)

    def take(self, request: httpx.Request) -> httpx.Response:
        self.posted.append((str(request.url), json.loads(request.content)["text"]))
        return httpx.Response(200, text="ok")

    async def until(self, count: int) -> list[str]:
        deadline = time.monotonic() + 90
        while len(self.posted) < count:
            assert time.monotonic() < deadline, self.posted
            await asyncio.sleep(0.1)
        return [text for _, text in self.posted]


@dataclass
class Slack:
    """A Slack workspace with a command for one deployment."""

    client: httpx.AsyncClient
    target: Target
    answers: Answers

    def fields(self, text: str, **changes: str) -> dict[str, str]:
        return {
            "team_id": "T0001",
            "channel_id": "C0001",
            "channel_name": "data-ops",
            "user_id": "U0001",
            "user_name": "steve",
            "command": "/elt",
            "text": text,
            "response_url": RESPONSE_URL,
            "trigger_id": an_id(),
            **changes,
        }

    async def say(self, text: str, **changes: str) -> str:
        reply = await post(self.client, by_slack(self.fields(text, **changes)))
        assert reply.status_code == 200, reply.text
        said: str = reply.json()["text"]
        return said


def block(target: Target, **fields: Any) -> SlackCommand:
    allowed = [f"{target.flow}/{target.name}", "elt-chain/not-deployed"]
    given = {"secret": SECRET, "team_id": "T0001", "users": ["U0001"], "deployments": allowed, **fields}
    return SlackCommand(**given)


@pytest.fixture
async def slack(target: Target, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Slack]:
    monkeypatch.setattr(receiver_slack, "_LOOK", 0.1)
    monkeypatch.setattr(receiver_slack, "_ANSWER", 60.0)  # the machine may be busy
    source, answers = SlackSource(block(target, channels=["C0009"]), "main"), Answers()
    async with running([source]) as client:
        monkeypatch.setattr(source, "_slack", httpx.AsyncClient(transport=httpx.MockTransport(answers.take)))
        yield Slack(client, target, answers)


async def test_a_command_starts_a_deployment(api: SyncPrefectClient, slack: Slack) -> None:
    """The command is taken at once; that the run has begun and how it ended is told later."""
    said = await slack.say("target word=“two words” number=3 anything='{\"a\": [1]}'")
    (run,) = slack.target.runs()
    assert said.startswith(f"Taken: `{slack.target.flow}/target` as")
    assert run.name in said
    assert run.parameters == {"word": "two words", "number": 3, "anything": {"a": [1]}}
    api.set_flow_run_state(run.id, Running(), force=True)
    (begun,) = await slack.answers.until(1)
    assert run.name in begun
    assert "begun" in begun
    api.set_flow_run_state(run.id, Failed(message="dbt <failed>"), force=True)
    _, ended = await slack.answers.until(2)
    assert "*Failed*" in ended
    assert "dbt &lt;failed&gt;" in ended
    assert {url for url, _ in slack.answers.posted} == {RESPONSE_URL}


async def test_a_replay_starts_nothing(slack: Slack) -> None:
    """The same request again within its five minutes is the same command; a later one is refused."""
    fields = slack.fields("target")
    first, second = [await post(slack.client, by_slack(fields)) for _ in range(2)]
    assert first.json() == second.json()
    old = await post(slack.client, by_slack(fields, at=time.time() - 301))
    assert old.status_code == 401
    assert len(slack.target.runs()) == 1


async def test_what_is_typed_is_no_template(api: SyncPrefectClient, slack: Slack) -> None:
    """Braces, blocks and variables that a person types start nothing but what they say."""
    await slack.say("target word='{{ event.id }}'")
    assert slack.target.runs()[0].parameters == {"word": "{{ event.id }}"}
    variable = '{"__prefect_kind": "workspace_variable", "variable_name": "x"}'
    assert "could not be started" in await slack.say(f"target anything='{variable}'")
    assert len(slack.target.runs()) == 1


@pytest.mark.parametrize(
    ("text", "changes", "said"),
    [
        ("target", {"user_id": "U0002"}, "You may not"),
        ("target", {"team_id": "T0002"}, "not for your workspace"),
        ("", {}, "starts one of"),
        ("help", {}, "starts one of"),
        ("other/deployment", {}, "`other/deployment` is none of them"),
        ("target x", {}, "`x` is not `name=value`"),
        ("target word'=1", {}, "quote is not closed"),
        ("target a']}}b=1", {}, "quote is not closed"),
        ("target a}}b=1", {}, "is not `name=value`"),
        ("target number=many", {}, "could not be started"),
        ("target word=\0", {}, "can't be stored"),
        (f"target word={2**64}", {}, "a whole number of more than 64 bits; write it as text"),
        ("not-deployed", {}, "could not be started"),
    ],
    ids=str,
)
async def test_what_starts_nothing(slack: Slack, text: str, changes: dict[str, str], said: str) -> None:
    """Who may not, and what is not allowed or not understood, gets an answer that says so."""
    assert said in await slack.say(text, **changes)
    assert not slack.target.runs()


async def test_everybody_in_a_channel(slack: Slack) -> None:
    """In a channel that is allowed everybody may."""
    assert "Taken" in await slack.say("target", user_id="U0002", channel_id="C0009")


async def test_probes_and_what_is_no_command(slack: Slack) -> None:
    """Slack's probes are answered; a body that is no form, or not of a command, is the sender's mistake."""
    assert (await slack.client.get("/hooks/slack-command/main")).status_code == 200
    assert (await post(slack.client, by_slack({"ssl_check": "1"}))).status_code == 200
    for body in (b"\xff\xfe", b"", b"a=1", b"&" * 1000 + b"=" * 1000, "team_id=é".encode("latin-1")):
        assert (await post(slack.client, by_slack(body))).status_code == 400


async def test_a_slow_server(slack: Slack, api: SyncPrefectClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """What can't be done in three seconds is promised in time, and told when it is done."""
    monkeypatch.setattr(receiver_slack, "_ANSWER", 0.0)
    assert "takes a moment" in await slack.say("target")
    (taken,) = await slack.answers.until(1)
    (run,) = slack.target.runs()
    assert (taken.startswith("Taken"), run.name in taken) == (True, True)
    api.set_flow_run_state(run.id, Completed(), force=True)
    assert "*Completed*" in (await slack.answers.until(2))[-1]


async def test_no_server(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the Prefect server is away the command is tried again, and the person is told that it failed."""
    monkeypatch.setattr(receiver_slack, "_AGAIN", (0.05,))
    source, answers = SlackSource(block(target), "main"), Answers()
    with temporary_settings({PREFECT_API_URL: f"http://127.0.0.1:{free_port()}/api"}):
        async with running([source]) as client:
            outside = httpx.AsyncClient(transport=httpx.MockTransport(answers.take))
            monkeypatch.setattr(source, "_slack", outside)
            monkeypatch.setattr(receiver_slack, "_ANSWER", 60.0)
            assert "was not started" in await Slack(client, target, answers).say("target")
    assert not target.runs()


async def test_stopped_before_it_is_tried_again(
    target: Target, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Slack sends it once: a receiver that is stopped tries once more, and tells who gave the command."""
    monkeypatch.setattr(receiver_slack, "_AGAIN", (3600.0,))
    monkeypatch.setattr(receiver_slack, "_ANSWER", 1.0)
    source, answers = SlackSource(block(target), "main"), Answers()
    with temporary_settings({PREFECT_API_URL: f"http://127.0.0.1:{free_port()}/api"}):
        async with running([source]) as client:
            outside = httpx.AsyncClient(transport=httpx.MockTransport(answers.take))
            monkeypatch.setattr(source, "_slack", outside)
            assert "takes a moment" in await Slack(client, target, answers).say("target", trigger_id="7.7")
    (said,) = await answers.until(1)
    assert "was not started" in said
    assert "/hooks/slack-command/main: elt.slack.command (slack:T0001:7.7): dropped" in caplog.text


async def test_answers_go_to_slack_alone(slack: Slack, api: SyncPrefectClient) -> None:
    """A response_url that is none of Slack's gets nothing, whoever signed it."""
    said = await slack.say("target", response_url="https://hooks.slack.com.example.org/x")
    assert "Taken" in said
    (run,) = slack.target.runs()
    api.set_flow_run_state(run.id, Completed(), force=True)
    other = await slack.say("target")
    assert "Taken" in other
    second = next(one for one in slack.target.runs() if one.id != run.id)
    api.set_flow_run_state(second.id, Completed(), force=True)
    await slack.answers.until(1)
    assert [url for url, _ in slack.answers.posted] == [RESPONSE_URL]


@pytest.mark.no_server
@pytest.mark.parametrize(
    ("url", "may"),
    [
        (RESPONSE_URL, True),
        ("https://hooks.slack-gov.com/commands/1", True),
        ("http://hooks.slack.com/commands/1", False),
        ("https://hooks.slack.com:8443/commands/1", False),
        ("https://hooks.slack.com@example.org/", False),
        ("https://user:x@hooks.slack.com/", False),
        ("https://example.org/hooks.slack.com", False),
        ("https://169.254.169.254/", False),
        ("http://127.0.0.1:8000/commands", False),
        ("https://[::1", False),
        ("", False),
    ],
)
def test_where_answers_may_go(url: str, may: bool) -> None:
    """Only to Slack's own hosts, over https: a signed request is no leave to post anywhere."""
    command = SlackCommand(secret=SECRET, team_id="T1", users=["U1"], deployments=["a/b"])
    assert command.may_answer(url) is may


@pytest.mark.no_server
def test_rehearsals_and_blocks_for_nobody() -> None:
    """A rehearsal's port can be allowed; a block that lets nobody give the command is refused."""
    hosts = ["127.0.0.1:8000"]
    command = SlackCommand(
        secret=SECRET, team_id="T1", users=["U1"], deployments=["a/b"], response_hosts=hosts
    )
    assert command.may_answer("http://127.0.0.1:8000/commands/1")
    assert not command.may_answer("http://127.0.0.1:8001/commands/1")
    with pytest.raises(ValidationError, match="nobody may give"):
        SlackCommand(secret=SECRET, team_id="T1", deployments=["a/b"])
