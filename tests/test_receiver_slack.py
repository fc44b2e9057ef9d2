"""The Slack command: who may give it starts what is allowed, once, and hears how it went."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

import httpx
import pytest
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import DeploymentUpdate
from prefect.client.schemas.objects import FlowRun
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Completed, Failed, Running
from pydantic import ValidationError

from blocks.receiver import SlackCommand
from deployments.receiver import slack as receiver_slack
from deployments.receiver import slack_confirm
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
    source: SlackSource | None = None

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
    mine = f"{target.flow}/{target.name}"
    given = {
        "secret": SECRET,
        "team_id": "T0001",
        "users": ["U0001"],
        "deployments": [mine, "elt-chain/not-deployed"],
        "parameters": {mine: ["word", "number", "anything"]},
        **fields,
    }
    return SlackCommand(**given)


@pytest.fixture
async def slack(target: Target, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Slack]:
    monkeypatch.setattr(receiver_slack, "_LOOK", 0.1)
    monkeypatch.setattr(receiver_slack, "_ANSWER", 60.0)  # the machine may be busy
    source, answers = SlackSource(block(target, channels=["C0009"]), "main"), Answers()
    async with running([source]) as client:
        monkeypatch.setattr(source, "_slack", httpx.AsyncClient(transport=httpx.MockTransport(answers.take)))
        yield Slack(client, target, answers, source)


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
        ("target notify=[]", {}, "`notify` may not be given here"),
        ("target other=1", {}, "/target` takes `word`, `number`, `anything`."),
        ("not-deployed max_concurrency=1", {}, "`elt-chain/not-deployed` takes no parameters"),
        ('target anything=\'{"a": [{"tool": "shell", "commands": ["id"]}]}\'', {}, "may not be given"),
        ('target anything=\'{"tool": "slack", "webhook": "other"}\'', {}, "may not be given"),
        ("target confirm=6920123e-0123456789abcdef", {}, "is too old"),
        ("target confirm=é", {}, "is too old"),
        ("target word='{{' full", {}, "`full` is not `name=value`"),
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


async def test_a_block_without_parameters(target: Target) -> None:
    """A plain list of deployments, as blocks had before, lets them be started as they are."""
    async with running([SlackSource(block(target, parameters={}), "main")]) as client:
        slack = Slack(client, target, Answers())
        assert "takes no parameters" in await slack.say("target word=x")
        assert not target.runs()
        assert "Taken" in await slack.say("target")
    assert [run.parameters for run in target.runs()] == [{}]


@pytest.mark.no_server
@pytest.mark.parametrize("name", ["before", "after", "steps", "gates", "notify", "approval", "confirm"])
def test_parameters_that_nobody_may_give(name: str) -> None:
    """Steps, who is told and what is approved can't be allowed; nor can parameters of what may not start."""
    given: dict[str, Any] = {"secret": SECRET, "team_id": "T1", "users": ["U1"], "deployments": ["a/b"]}
    with pytest.raises(ValidationError, match=f"{name} of a/b can't be given"):
        SlackCommand(**given, parameters={"a/b": ["word", name]})
    with pytest.raises(ValidationError, match="c/d is not one of the deployments"):
        SlackCommand(**given, parameters={"c/d": ["word"]})


# -- loading everything anew

ANEW = "target word='two  {words}' anything='{\"mode\": \"full_refresh\"}'"


def code_in(said: str) -> str:
    """What is to be typed, from the answer that asks for it."""
    assert "load or build everything anew" in said, said
    typed = said.partition("```")[2].removesuffix("```")
    assert typed.startswith("/elt ")
    return typed.removeprefix("/elt ")


async def test_a_full_load_needs_a_second_command(slack: Slack) -> None:
    """It is asked whether it is meant; what the answer says to type starts one run, however often."""
    again = code_in(await slack.say(ANEW))
    assert not slack.target.runs()
    assert [("Taken" in await slack.say(again)) for _ in range(2)] == [True, True]
    (run,) = slack.target.runs()
    assert run.parameters == {"word": "two  {words}", "anything": {"mode": "full_refresh"}}


async def test_whose_second_command_it_is(slack: Slack, monkeypatch: pytest.MonkeyPatch) -> None:
    """The code is for the same person, the same command and five minutes."""
    again = code_in(await slack.say(ANEW))
    assert "is too old" in await slack.say(again, user_id="U0002", channel_id="C0009")
    assert "is too old" in await slack.say(again.replace("two", "three"))
    now = time.time()
    with monkeypatch.context() as later:
        later.setattr(slack_confirm.time, "time", lambda: now + slack_confirm.WITHIN + 1)
        assert "is too old" in await post_at(slack, again, now + slack_confirm.WITHIN + 1)
    assert not slack.target.runs()


async def post_at(slack: Slack, text: str, at: float) -> str:
    reply = await post(slack.client, by_slack(slack.fields(text), at=at))
    said: str = reply.json()["text"]
    return said


async def test_two_receivers(slack: Slack, target: Target) -> None:
    """A code that one receiver has given out is good at another, and still for one run alone."""
    again = code_in(await slack.say(ANEW))
    async with running([SlackSource(block(target), "main")]) as client:
        assert "Taken" in await Slack(client, target, slack.answers).say(again)
    assert "Taken" in await slack.say(again)
    assert len(target.runs()) == 1


async def test_a_deployment_that_loads_everything_anew(api: SyncPrefectClient, slack: Slack) -> None:
    """It is asked also where the deployment's own parameters say so, and nothing was typed."""
    api.update_deployment(slack.target.id, DeploymentUpdate(parameters={"anything": {"full_refresh": True}}))
    again = code_in(await slack.say("target"))
    assert not slack.target.runs()
    assert "Taken" in await slack.say(again)
    assert "Taken" in await slack.say("target anything='{\"full_refresh\": false}'")
    assert len(slack.target.runs()) == 2


@pytest.mark.no_server
@pytest.mark.parametrize(
    ("deployment", "parameters", "anew"),
    [
        ("reload/reload", {"mode": "full_refresh"}, True),
        ("reload/reload", {"mode": "incremental"}, False),
        ("dbt-full-refresh/on-demand", {}, True),
        ("dbt-build/daily", {"dbt": {"tool": "dbt-core", "full_refresh": True}}, True),
        ("dbt-build/daily", {"dbt": {"tool": "dbt-core", "full_refresh": False}}, False),
        ("elt-chain/a", {"syncs": [{"tool": "airbyte", "before": "clear"}]}, True),
        ("elt-chain/a", {"before": [{"tool": "sql", "statements": ["select 1"]}]}, False),
        ("elt-chain/a", {"syncs": [{"tool": "fivetran", "resync": {"shop": ["orders"]}}]}, True),
        ("elt-chain/a", {"syncs": [{"tool": "fivetran", "resync": "none"}]}, False),
        ("elt-chain/a", {"activations": [{"tool": "hightouch", "full_resync": True}]}, True),
        ("elt-chain/a", {"activations": [{"tool": "census", "full_sync": True}]}, True),
        ("elt-chain/a", {"transform": {"overrides": {"steps_override": ["dbt build --full-refresh"]}}}, True),
        ("elt-chain/a", {"transform": {"overrides": {"steps_override": ["dbt build -f -s orders"]}}}, True),
        ("elt-chain/a", {"transform": {"overrides": {"steps_override": ["dbt build -xf"]}}}, True),
        ("elt-chain/a", {"transform": {"overrides": {"steps_override": ["dbt build --fail-fast"]}}}, False),
        ("elt-chain/a", {"before": [{"tool": "shell", "command": "rm -f done"}]}, False),
        ("elt-chain/a", {"max_concurrency": 1, "allow_failure": "any"}, False),
    ],
    ids=str,
)
def test_what_loads_everything_anew(deployment: str, parameters: dict[str, Any], anew: bool) -> None:
    """Each tool's way to say it is known."""
    assert slack_confirm.loads_anew(deployment, parameters) is anew


# -- who may, and what is no command


async def test_everybody_in_a_channel(slack: Slack) -> None:
    """In a channel that is allowed everybody may."""
    assert "Taken" in await slack.say("target", user_id="U0002", channel_id="C0009")


async def test_probes_and_what_is_no_command(slack: Slack) -> None:
    """Slack's probes are answered; a body that is no form, or not of a command, is the sender's mistake."""
    assert (await slack.client.get("/hooks/slack-command/main")).status_code == 200
    probe = by_slack({"ssl_check": "1", "token": "x"})
    assert (await post(slack.client, probe)).status_code == 200
    assert (await post(slack.client, probe.but(headers={}))).status_code == 200
    command = by_slack(slack.fields("target", ssl_check="0"))
    assert (await post(slack.client, command.but(headers={}))).status_code == 401
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


@pytest.mark.parametrize("how", ["fails", "does not end"])
async def test_a_run_that_can_t_be_read(
    slack: Slack, api: SyncPrefectClient, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """A run that was created is told as such, whatever becomes of looks at it: else it is asked for twice."""
    assert slack.source is not None
    read, away = slack.source.client.read_flow_run, asyncio.Event()

    async def look(run_id: UUID) -> FlowRun:
        if away.is_set():
            return await read(run_id)
        if how == "fails":
            raise httpx.ConnectError("the server is away")
        await away.wait()
        return await read(run_id)

    monkeypatch.setattr(slack.source.client, "read_flow_run", look)
    async with asyncio.timeout(90):
        said = await slack.say("target")
    (run,) = slack.target.runs()
    assert ("Taken" in said, run.name in said) == (True, True)
    api.set_flow_run_state(run.id, Completed(), force=True)
    away.set()
    assert "*Completed*" in (await slack.answers.until(1))[-1]


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
