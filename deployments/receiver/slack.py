"""A Slack slash command that starts deployments: `/elt flights`, `/elt flights allow_failure=any`.

The command is an event like any other, `elt.slack.command`, and starts its run once. Slack wants an answer
within three seconds: it is that the command is taken, with a link. That the run has begun and how it ended is
told later, to the command's `response_url`, for as long as Slack takes it (30 minutes).

Whoever may give the command may set only the parameters that the block names, and what would give them a
shell on a worker, silence an alert or skip an approval nobody may. A run that deletes and loads everything
anew starts at a second command of the same person.

Vendor documentation: https://docs.slack.dev/interactivity/implementing-slash-commands
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import shlex
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from urllib.parse import parse_qs

import httpx
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.objects import StateType
from prefect.exceptions import ObjectNotFound
from prefect.utilities.urls import url_for
from pydantic import BaseModel, Field, ValidationError
from starlette.responses import Response

from blocks.receiver import SlackCommand
from blocks.signatures import check_signature
from deployments.receiver.slack_confirm import WITHIN, code_for, fits, loads_anew
from deployments.receiver.source import Desk, Hook, Reading, Refused, Reply, Source, read_as, told
from tasks.events import EltEvent, HandOverError, OnceTrigger, StartedRun
from tasks.pagerduty import PagerDutyNotify
from tasks.slack import SlackChannel, SlackNotify
from tasks.steps import PythonStep, ShellStep, SqlStep

_log = logging.getLogger("elt.receiver")

_ANSWER = 2.5  # seconds until Slack must have something; it waits three
_FOLLOWED = 29 * 60.0  # seconds for which later answers are taken
_LOOK = 2.0  # seconds between two looks at a run
_SMART = str.maketrans({0x201C: '"', 0x201D: '"', 0x2018: "'", 0x2019: "'"})  # quotes as phones write them
_AGAIN = (2.0, 5.0, 10.0, 20.0, 40.0)  # seconds between tries to hand a command over: Slack sends it once
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_CONFIRM = "confirm"  # the word with the code of a second command

_KEPT_TOOLS = frozenset(
    kind.model_fields["tool"].default
    for kind in (PythonStep, ShellStep, SqlStep, SlackNotify, SlackChannel, PagerDutyNotify)
)
"""What runs code on a worker or says who is told: typed by nobody, whatever the parameter is called."""


class NotUnderstood(Exception):
    """The command can't be carried out; says why, for who gave it."""


class _Command(BaseModel):
    team_id: str
    channel_id: str
    channel_name: str = ""
    user_id: str
    user_name: str = ""
    command: str = Field(min_length=1, max_length=80)
    text: str = Field(default="", max_length=4000)
    response_url: str = ""
    trigger_id: str = Field(min_length=1)


class _Unconfirmed(Exception):
    """The command would load everything anew, and nobody has said twice that this is meant."""


@dataclass(frozen=True)
class _Wanted:
    """What a command asks for.

    Attributes:
        event: The command.
        trigger: What it starts.
        parameters: As they were typed.
        who: The workspace and the person.
        typed: The command.
        confirmed: Whether it has come with one.
    """

    event: EltEvent
    trigger: OnceTrigger
    parameters: dict[str, Any]
    who: tuple[str, str]
    typed: str
    confirmed: bool

    @property
    def deployment(self) -> str:
        """What is to be started."""
        return self.trigger.deployment


class SlackSource(Source[SlackCommand]):
    """Each command of somebody who may, about a deployment that may be started, is an event."""

    kind = SlackCommand
    methods = ("GET", "POST")

    async def open(self, stack: AsyncExitStack, client: PrefectClient) -> None:
        """Also hold a client for answers; it follows no redirects, which could lead anywhere."""
        await super().open(stack, client)
        self._slack = await stack.enter_async_context(httpx.AsyncClient(timeout=10.0, follow_redirects=False))

    async def answer(self, hook: Hook, desk: Desk) -> Response:
        """Take the command and say so; what comes later is told later."""
        if hook.method == "GET" or _is_probe(hook.body):
            return Response("")
        command = self._read(hook)
        try:
            wanted = self._wanted(command)
        except NotUnderstood as error:
            return _say(str(error))
        except ValidationError as error:
            return _say(f"Nothing was started: the command holds what can't be stored ({told(error)}).")
        starting = asyncio.create_task(self._start(wanted, desk))
        done, _ = await asyncio.wait([starting], timeout=_ANSWER)
        if done:
            text, run = await starting
            if run is not None:
                desk.later(self._follow(run, command, desk), f"{self.path}: following {run.name}")
            return _say(text)
        desk.later(self._late(starting, command, desk), f"{self.path}: {wanted.event.label}")
        return _say(f"Starting `{wanted.deployment}` takes a moment; it is told here when it has.")

    async def read(self, hook: Hook) -> Reading:
        """See `Source.read`. Whether a command needs a second one is only known to `answer`."""
        try:
            wanted = self._wanted(self._read(hook))
        except NotUnderstood as error:
            raise Refused(str(error)) from None
        return Reading((wanted.event,), (wanted.trigger,))

    def _read(self, hook: Hook) -> _Command:
        check_signature("slack", hook.headers, hook.body, self.block.secrets)
        try:
            return read_as(_Command, _fields(hook.body))
        except ValueError:
            raise Refused("the body is no form in UTF-8") from None

    def _wanted(self, command: _Command) -> _Wanted:
        block = self.block
        if command.team_id != block.team_id:
            raise NotUnderstood("This command is not for your workspace.")
        if command.user_id not in block.users and command.channel_id not in block.channels:
            raise NotUnderstood(
                "You may not give this command here; who may stands in the Slack Command block."
            )
        deployment, parameters, code = self._parse(command)
        who = (command.team_id, command.user_id)
        if code is not None and not fits(code, who, deployment, parameters, block.secrets):
            raise NotUnderstood(
                f"`{_CONFIRM}={_plain(code)}` is too old, or was given to somebody else or for another "
                "command. Give the command without it to get a new one."
            )
        event = EltEvent(
            name="elt.slack.command",
            # A code is good for one run, however often it is typed.
            key=f"slack:{command.team_id}:{f'{_CONFIRM}:{code}' if code else command.trigger_id}",
            occurred=datetime.now(UTC),
            resource_id=f"elt.slack.channel.{command.channel_id}",
            resource_name=command.channel_name,
            payload={
                "command": command.command,
                "text": command.text,
                "deployment": deployment,
                "parameters": parameters,
                "team_id": command.team_id,
                "channel_id": command.channel_id,
                "channel_name": command.channel_name,
                "user_id": command.user_id,
                "user_name": command.user_name,
            },
        )
        # Out of the event, not written into the trigger: what a person types is no template.
        templates = {name: f"{{{{ event.payload.parameters['{name}'] }}}}" for name in parameters}
        trigger = OnceTrigger(
            deployment=deployment,
            name=f"Slack {command.command}",
            expect=frozenset({event.name}),
            parameters=dict(templates),
        )
        typed = f"{command.command} {command.text}"
        return _Wanted(event, trigger, parameters, who, typed, confirmed=code is not None)

    def _parse(self, command: _Command) -> tuple[str, dict[str, Any], str | None]:
        may = self.block.deployments
        usage = f"`{command.command} <deployment> [name=value …]` starts one of " + ", ".join(
            f"`{name}` ({takes})" if (takes := self._takes(name)) else f"`{name}`" for name in may
        )
        try:
            words = shlex.split(command.text.translate(_SMART))
        except ValueError:
            raise NotUnderstood(f"A quote is not closed. {usage}") from None
        if not words or words == ["help"]:
            raise NotUnderstood(usage)
        wanted = [name for name in may if words[0] in (name, name.partition("/")[2])]
        if len(wanted) != 1:
            raise NotUnderstood(
                f"`{words[0]}` is {'none' if not wanted else 'more than one'} of them. {usage}"
            )
        deployment, code = wanted[0], None
        parameters: dict[str, Any] = {}
        for word in words[1:]:
            name, given, value = word.partition("=")
            if not given or not _NAME.fullmatch(name):
                raise NotUnderstood(f"`{_plain(word)}` is not `name=value`. {usage}")
            if name == _CONFIRM:
                code = value
                continue
            if name not in self.block.parameters.get(deployment, ()):
                takes = self._takes(deployment) or "no parameters"
                raise NotUnderstood(f"`{name}` may not be given here: `{deployment}` takes {takes}.")
            parameters[name] = _value(value)
            if _holds_kept(parameters[name]):
                raise NotUnderstood(
                    f"`{name}` holds a step of one's own, or says who is told: that may not be given here."
                )
        return deployment, parameters, code

    def _takes(self, deployment: str) -> str:
        return ", ".join(f"`{name}`" for name in self.block.parameters.get(deployment, ()))

    async def _start(self, wanted: _Wanted, desk: Desk) -> tuple[str, StartedRun | None]:
        """Start what is wanted, or ask whether it is meant: what to say of it, and the run if any."""
        try:
            run = await self._started(wanted, desk)
        except _Unconfirmed:
            code = code_for(wanted.who, wanted.deployment, wanted.parameters, self.block.secret)
            return (
                f"⚠️ `{wanted.deployment}` would load or build everything anew. Nothing was started. If you "
                f"mean it, give within {WITHIN // 60} minutes:\n"
                f"```{_escaped(f'{wanted.typed} {_CONFIRM}={code}')}```",
                None,
            )
        except HandOverError as error:
            _log.error("%s: %s: dropped: %s", self.path, wanted.event.label, error)
            return f"`{wanted.deployment}` was not started: the Prefect server does not answer.", None
        if run is None:
            return (
                f"`{wanted.deployment}` could not be started: is it deployed, and are the values right?",
                None,
            )
        return f"Taken: `{wanted.deployment}` as {_link(run)}.", run

    async def _started(self, wanted: _Wanted, desk: Desk) -> StartedRun | None:
        """Hand a command over, in several tries; however many of them arrive, they start one run.

        Returns:
            The run, without a look at it: whoever gave the command must hear of it in time, or gives it
            again.

        Raises:
            HandOverError: None of the tries arrived, and no more are made.
            _Unconfirmed: It would load everything anew, and has come without a code.
        """
        goes_on, pauses = True, iter(_AGAIN)
        while True:
            try:
                if not wanted.confirmed and await self._loads_anew(wanted):
                    raise _Unconfirmed
                (handed,) = await desk.hand_over([wanted.event], [wanted.trigger])
            except HandOverError:
                pause = next(pauses, None)
                if pause is None or not goes_on:
                    raise
                goes_on = await desk.pause(pause)
            else:
                return next((run for run in handed.runs if run.deployment == wanted.deployment), None)

    async def _loads_anew(self, wanted: _Wanted) -> bool:
        """Whether the run would be a full load: by what was typed, and what the deployment itself says."""
        try:
            deployment = await self.client.read_deployment_by_name(wanted.deployment)
        except ObjectNotFound:
            return False  # it can't be started, and that is told
        except httpx.HTTPError as error:
            raise HandOverError(f"the Prefect server can't be reached ({type(error).__name__})") from error
        return loads_anew(wanted.deployment, {**deployment.parameters, **wanted.parameters})

    async def _late(
        self, starting: asyncio.Task[tuple[str, StartedRun | None]], command: _Command, desk: Desk
    ) -> None:
        text, run = await starting
        await self._post(command, text)
        if run is not None:
            await self._follow(run, command, desk)

    async def _follow(self, run: StartedRun, command: _Command, desk: Desk) -> None:
        """Tell when the run begins and how it ends, for as long as Slack takes answers and we are up."""
        begun = False
        loop = asyncio.get_running_loop()
        until = loop.time() + _FOLLOWED
        while loop.time() < until:
            state = None
            with suppress(httpx.HTTPError):  # the server is away for a moment
                state = (await self.client.read_flow_run(run.flow_run_id)).state
            if state is not None and state.is_final():
                message = f"\n>{_plain(state.message)}" if state.message else ""
                mark = "✅" if state.type == StateType.COMPLETED else "❌"
                await self._post(command, f"{mark} {_link(run)} is *{state.name}*.{message}")
                return
            if state is not None and state.is_running() and not begun:
                begun = True
                await self._post(command, f"▶️ {_link(run)} has begun.")
            if not await desk.pause(_LOOK):
                _log.warning("%s: stopped: nobody is told how %s ends", self.path, run.name)
                return
        await self._post(command, f"{_link(run)} is still going on; Slack takes no answer after 30 minutes.")

    async def _post(self, command: _Command, text: str) -> None:
        if not self.block.may_answer(command.response_url):
            _log.warning(
                "%s: the command's response_url is no address of Slack's: nothing is sent", self.path
            )
            return
        try:
            reply = await self._slack.post(command.response_url, json=_message(text))
        except httpx.HTTPError as error:
            _log.warning("%s: Slack could not be answered (%s)", self.path, type(error).__name__)
            return
        if not reply.is_success:
            _log.warning("%s: Slack took the answer with %s", self.path, reply.status_code)


def _fields(body: bytes) -> dict[str, str]:
    """The fields of a form.

    Raises:
        ValueError: It is none, or not in UTF-8.
    """
    fields = parse_qs(body.decode("utf-8", "strict"), keep_blank_values=True, max_num_fields=100)
    return {name: values[-1] for name, values in fields.items()}


def _is_probe(body: bytes) -> bool:
    """Whether this is Slack's look at the certificate. It starts nothing, so it need not be signed."""
    with suppress(ValueError):
        return b"ssl_check" in body and _fields(body).get("ssl_check") == "1"
    return False


def _holds_kept(value: Any) -> bool:
    match value:
        case list():
            return any(map(_holds_kept, value))
        case dict():
            tool = value.get("tool")
            return (isinstance(tool, str) and tool in _KEPT_TOOLS) or any(map(_holds_kept, value.values()))
    return False


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _plain(text: str) -> str:
    return _escaped(" ".join(text.split())[:500])


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _link(run: StartedRun) -> str:
    url = url_for("flow-run", obj_id=run.flow_run_id, url_type="ui", default_base_url=None)
    return f"<{url}|{run.name}>" if url else f"`{run.name}`"


def _message(text: str) -> dict[str, str]:
    return {"response_type": "ephemeral", "text": text}


def _say(text: str) -> Response:
    return Reply(_message(text))
