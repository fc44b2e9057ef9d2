"""A Slack slash command that starts deployments: `/elt flights`, `/elt flights allow_failure=any`.

The command is an event like any other, `elt.slack.command`, and starts its run once. Slack wants an answer
within three seconds: it is that the command is taken, with a link. That the run has begun and how it ended is
told later, to the command's `response_url`, for as long as Slack takes it (30 minutes).

Vendor documentation: https://docs.slack.dev/interactivity/implementing-slash-commands
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import shlex
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from typing import Any
from urllib.parse import parse_qs

import httpx
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.utilities.urls import url_for
from pydantic import BaseModel, Field, ValidationError
from starlette.responses import Response

from blocks.receiver import SlackCommand
from blocks.signatures import check_signature
from deployments.receiver.source import Desk, Hook, Reading, Refused, Reply, Source, read_as, told
from tasks.events import EltEvent, HandedOver, HandOverError, OnceTrigger

_log = logging.getLogger("elt.receiver")

_ANSWER = 2.5  # seconds until Slack must have something; it waits three
_FOLLOWED = 29 * 60.0  # seconds for which later answers are taken
_LOOK = 2.0  # seconds between two looks at a run
_SMART = str.maketrans({0x201C: '"', 0x201D: '"', 0x2018: "'", 0x2019: "'"})  # quotes as phones write them
_AGAIN = (2.0, 5.0, 10.0, 20.0, 40.0)  # seconds between tries to hand a command over: Slack sends it once
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


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
        if hook.method == "GET":
            return Response("")  # Slack's probe of the certificate
        command = self._read(hook)
        if command is None:
            return Response("")
        try:
            event, trigger = self._wanted(command)
        except NotUnderstood as error:
            return _say(str(error))
        except ValidationError as error:
            return _say(f"Nothing was started: the command holds what can't be stored ({told(error)}).")
        handing = asyncio.create_task(_hand_over(desk, event, trigger))
        done, _ = await asyncio.wait([handing], timeout=_ANSWER)
        if done:
            text, run = await self._outcome(handing, trigger, event.label)
            if run is not None:
                desk.later(self._follow(run, command, desk), f"{self.path}: following {run.name}")
            return _say(text)
        late = self._late(handing, trigger, command, desk, event.label)
        desk.later(late, f"{self.path}: {event.label}")
        return _say(f"Starting `{trigger.deployment}` takes a moment; it is told here when it has.")

    async def read(self, hook: Hook) -> Reading:
        """See `Source.read`."""
        command = self._read(hook)
        if command is None:
            return Reading(ignored="a probe")
        try:
            event, trigger = self._wanted(command)
        except NotUnderstood as error:
            raise Refused(str(error)) from None
        return Reading((event,), (trigger,))

    def _read(self, hook: Hook) -> _Command | None:
        check_signature("slack", hook.headers, hook.body, self.block.secrets)
        try:
            fields = parse_qs(hook.body.decode("utf-8", "strict"), keep_blank_values=True, max_num_fields=100)
        except ValueError:
            raise Refused("the body is no form in UTF-8") from None
        given = {name: values[-1] for name, values in fields.items()}
        if given.get("ssl_check") == "1":
            return None
        return read_as(_Command, given)

    def _wanted(self, command: _Command) -> tuple[EltEvent, OnceTrigger]:
        block = self.block
        if command.team_id != block.team_id:
            raise NotUnderstood("This command is not for your workspace.")
        if command.user_id not in block.users and command.channel_id not in block.channels:
            raise NotUnderstood(
                "You may not give this command here; who may stands in the Slack Command block."
            )
        deployment, parameters = self._parse(command)
        event = EltEvent(
            name="elt.slack.command",
            key=f"slack:{command.team_id}:{command.trigger_id}",
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
        return event, trigger

    def _parse(self, command: _Command) -> tuple[str, dict[str, Any]]:
        may = self.block.deployments
        usage = f"`{command.command} <deployment> [name=value …]` starts one of " + ", ".join(
            f"`{name}`" for name in may
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
        parameters: dict[str, Any] = {}
        for word in words[1:]:
            name, given, value = word.partition("=")
            if not given or not _NAME.fullmatch(name):
                raise NotUnderstood(f"`{word}` is not `name=value`. {usage}")
            parameters[name] = _value(value)
        return wanted[0], parameters

    async def _outcome(
        self, handing: asyncio.Task[list[HandedOver]], trigger: OnceTrigger, what: str
    ) -> tuple[str, FlowRun | None]:
        """What to say of a hand-over, and the run where there is one."""
        try:
            (handed,) = await handing
        except HandOverError as error:
            _log.error("%s: %s: dropped: %s", self.path, what, error)
            return f"`{trigger.deployment}` was not started: the Prefect server does not answer.", None
        run = next((run for run in handed.runs if run.deployment == trigger.deployment), None)
        if run is None:
            return (
                f"`{trigger.deployment}` could not be started: is it deployed, and are the values right?",
                None,
            )
        read = await self.client.read_flow_run(run.flow_run_id)
        return f"Taken: `{trigger.deployment}` as {_link(read)}.", read

    async def _late(
        self,
        handing: asyncio.Task[list[HandedOver]],
        trigger: OnceTrigger,
        command: _Command,
        desk: Desk,
        what: str,
    ) -> None:
        text, run = await self._outcome(handing, trigger, what)
        await self._post(command, text)
        if run is not None:
            await self._follow(run, command, desk)

    async def _follow(self, run: FlowRun, command: _Command, desk: Desk) -> None:
        """Tell when the run begins and how it ends, for as long as Slack takes answers and we are up."""
        begun = False
        loop = asyncio.get_running_loop()
        until = loop.time() + _FOLLOWED
        while loop.time() < until:
            state = run.state
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
            try:
                run = await self.client.read_flow_run(run.id)
            except httpx.HTTPError:
                continue  # the server is away for a moment
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


async def _hand_over(desk: Desk, event: EltEvent, trigger: OnceTrigger) -> list[HandedOver]:
    """Hand a command over, in several tries; however many of them arrive, they start one run.

    Raises:
        HandOverError: None did, and no more are made.
    """
    goes_on = True
    for pause in _AGAIN:
        try:
            return await desk.hand_over([event], [trigger])
        except HandOverError:
            if not goes_on:
                raise
            goes_on = await desk.pause(pause)
    return await desk.hand_over([event], [trigger])


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _plain(text: str) -> str:
    text = " ".join(text.split())[:500]
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _link(run: FlowRun) -> str:
    url = url_for("flow-run", obj_id=run.id, url_type="ui", default_base_url=None)
    return f"<{url}|{run.name}>" if url else f"`{run.name}`"


def _message(text: str) -> dict[str, str]:
    return {"response_type": "ephemeral", "text": text}


def _say(text: str) -> Response:
    return Reply(_message(text))
