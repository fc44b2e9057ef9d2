"""A person's yes or no in the middle of a flow run, given in the form of Prefect's own `wait_for_input`.

A run of a deployment is suspended while it waits: its process ends, and its slots are free. When somebody
answers, Prefect schedules it again and it runs from its beginning to the answer. What is not of a deployment,
or is a subflow, can't be suspended: there the process waits.

Silence is no. Prefect itself would only mark a run that nobody resumes as failed, without a process in which
the run could say so. So for a run that suspends itself another one is scheduled, of the flow `end-approval`,
which resumes it at the deadline. Should that not work, Prefect fails the run a day later.

The questions are kept with the flow run, as Prefect keeps the answers, so that every attempt at it on any
machine knows them.

Vendor documentation: https://docs.prefect.io/v3/advanced/interactive
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Any, Literal
from uuid import UUID

import httpx
from prefect.artifacts import acreate_markdown_artifact
from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterFlowRunId,
    ArtifactFilterKey,
    FlowFilter,
    FlowFilterName,
)
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.client.schemas.responses import DeploymentResponse, SetStateStatus
from prefect.context import FlowRunContext
from prefect.exceptions import ObjectNotFound
from prefect.flow_runs import asuspend_flow_run
from prefect.input import RunInput, keyset_from_base_key, keyset_from_paused_state
from prefect.input.actions import aread_flow_run_input
from prefect.logging import get_run_logger
from prefect.states import Paused, Scheduled
from prefect.utilities.slugify import slugify
from pydantic import BaseModel, ConfigDict, Field, JsonValue

from tasks.jobs import InputError

END_APPROVAL = "end-approval"
"""The flow that ends the waiting of a suspended run."""

_NOBODY = "(nobody)"  # who answers when the time is up
_GRACE = timedelta(days=1)  # after the deadline, for workers that are away, before Prefect fails the run
_LOOK = 2.0  # seconds between two looks of a process that waits
_ENDED = frozenset({StateType.COMPLETED, StateType.FAILED, StateType.CANCELLED})
_AWAY = (httpx.TransportError, httpx.HTTPStatusError)


class Decision(RunInput):
    """The form."""

    decision: Literal["approve", "reject"] = Field(title="Decision")
    name: str = Field(
        title="Your name",
        pattern=r"\S",
        description="Goes into the record: Prefect does not know who you are.",
    )
    comment: str = Field(default="", title="Comment")


class Question(BaseModel):
    """What a run has asked.

    Attributes:
        key: Prefect's key of the pause.
        what: What is to be approved, in words.
        of: A digest of it; what was approved once need not be approved again.
        asked_at: When.
        deadline: When no answer becomes a no.
        ender: The run that sees to that.
        shown: What there was to know about it, as Markdown.
        again: Whether what was approved had changed meanwhile, so that it is asked once more.
        progress: Whatever the flow wants to find again when it goes on.
    """

    model_config = ConfigDict(frozen=True)

    key: str
    what: str
    of: str
    asked_at: datetime
    deadline: datetime
    ender: UUID | None = None
    shown: str = ""
    again: bool = False
    progress: JsonValue = None

    @property
    def number(self) -> int:
        """Which of the questions of its run about this it is, from 1."""
        return int(self.key.rpartition("-")[2])

    @property
    def until(self) -> str:
        """The deadline in words."""
        return f"{self.deadline:%Y-%m-%d %H:%M:%S} UTC"


class Answer(BaseModel):
    """What came of a question.

    Attributes:
        outcome: `timed out` is a no, too.
        by: Who answered, as they said themselves.
        comment: Why.
        answered_at: When the answer came in, or the time was up, by the clock of Prefect's server.
        question: What was asked.
    """

    model_config = ConfigDict(frozen=True)

    outcome: Literal["approved", "rejected", "timed out"]
    by: str = ""
    comment: str = ""
    answered_at: datetime
    question: Question

    @property
    def approved(self) -> bool:
        """Whether it may go on."""
        return self.outcome == "approved"

    @property
    def sentence(self) -> str:
        """The answer in one sentence."""
        if self.outcome == "timed out":
            said = f"not approved within {_span(self.question.deadline - self.question.asked_at)}"
            late = f" ({self.by} answered after that)" if self.by else ""
            return said + late
        return f"{self.outcome} by {self.by}" + (f": {self.comment}" if self.comment else "")

    def markdown(self) -> str:
        """The record: who answered what, when, and to what."""
        shown = self.question.shown
        by = f" by {self.by}" if self.by else ""
        said = [
            f"# {self.outcome.capitalize()}{by}: {self.question.what}",
            f"> {self.comment}" if self.comment else "",
            f"Asked {_clock(self.question.asked_at)}, to be answered until {_clock(self.question.deadline)}, "
            f"{'over' if self.outcome == 'timed out' else 'answered'} {_clock(self.answered_at)}.",
            "## What was shown" if shown else "",
            shown,
        ]
        return "\n\n".join(part for part in said if part) + "\n"


async def check_approval() -> None:
    """See that the run, if it is one that would suspend itself, would be ended when nobody answers.

    Raises:
        InputError: There is no deployment of the flow `end-approval`.
    """
    async with get_client() as client:
        run = await client.read_flow_run(_flow_run_id())
        if _suspends(run):
            await _ender(client, run)


async def question_under_way(what: str) -> Question | None:
    """The question on which this run is suspended, or was until it was answered.

    None if it has not asked, or has ended since, well or badly: a retry of such a run begins anew. A crash is
    no end: the next attempt takes up where it was.

    Args:
        what: As it was asked.
    """
    async with get_client() as client:
        asked = await _Asked.read(client, _flow_run_id(), what)
    return asked.under_way


async def request_answer(
    what: str,
    *,
    shown: str = "",
    timeout: float = 3600.0,  # noqa: ASYNC109 - it does not cancel, it answers
    of: str = "",
    progress: JsonValue = None,
    tell: Callable[[Question], Awaitable[None]] | None = None,
) -> Answer:
    """Ask, and wait for the answer.

    Args:
        what: What is to be approved. A run asks each thing once.
        shown: What there is to know about it, as Markdown.
        timeout: Seconds to wait for an answer.
        of: What exactly it is. Where an earlier attempt at this run got this approved, it stands; an approval
            of anything else does not, and it is asked again.
        progress: Kept with the question, for `question_under_way`.
        tell: Called once the question is going to be asked.

    Returns:
        The answer, as soon as there is one.

    Raises:
        InputError: The run would have to be suspended, and nobody would end that.
        Pause: The run is suspended. It is Prefect's signal to leave the flow, and not to be caught.
    """
    digest = hashlib.sha256(of.encode()).hexdigest()[:16]
    async with get_client() as client:
        run = await client.read_flow_run(_flow_run_id())
        asked = await _Asked.read(client, run.id, what)
        answer = await asked.answer(digest)
        if answer is None:
            question = await asked.ask(run, digest, timedelta(seconds=timeout), shown, progress)
            get_run_logger().warning("Waiting for approval of %s until %s", what, question.until)
            if tell:
                await tell(question)
            form = Decision.with_initial_data(description=shown or what)
            if _suspends(run):
                left = question.deadline - datetime.now(UTC) + _GRACE
                await asuspend_flow_run(
                    wait_for_input=form, timeout=int(left.total_seconds()), key=question.key
                )
            else:
                await _wait_here(client, run.id, question, form)
            answer = await (await _Asked.read(client, run.id, what)).answer(digest)
            if answer is None:
                raise RuntimeError(f"The run was stopped while it waited for approval of {what}.")
        await _record(client, run.id, answer)
    return answer


async def end_waiting(flow_run_id: UUID, key: str) -> str:
    """Have a run that waits for an approval go on without: it finds that nobody has answered in time.

    Args:
        flow_run_id: The run.
        key: Of the question that has not been answered.

    Returns:
        What was done, in words.
    """
    async with get_client() as client:
        try:
            run = await client.read_flow_run(flow_run_id)
        except ObjectNotFound:
            return "the run has been deleted"
        if not (run.state and run.state.is_paused() and run.state.state_details.pause_key == key):
            return "it has been answered"
        if await _answer_nothing(client, flow_run_id):
            return "nobody has answered in time"
        # It was suspended, and its process died before the form was saved.
        again: State[Any] = Scheduled(name="Resuming")
        moved = await client.set_flow_run_state(flow_run_id, again)
        return "nobody could answer" if moved.status is SetStateStatus.ACCEPT else "it has been answered"


class _Asked:
    """The questions of one run about one thing, and what became of them."""

    def __init__(
        self,
        client: PrefectClient,
        run_id: UUID,
        what: str,
        questions: list[Question],
        states: list[State[Any]],
    ) -> None:
        self._client = client
        self._run_id = run_id
        self._what = what
        self._count = len(questions)
        self._questions = sorted((one for one in questions if one.what == what), key=lambda one: one.asked_at)
        self._states = sorted(states, key=lambda state: state.timestamp)

    @classmethod
    async def read(cls, client: PrefectClient, run_id: UUID, what: str) -> _Asked:
        found = await client.filter_flow_run_input(run_id, f"{_prefix(what)}-", 1000, set())
        questions = [Question.model_validate(one.decoded_value) for one in found]
        states = await client.read_flow_run_states(run_id)
        return cls(client, run_id, what, questions, states)

    @property
    def under_way(self) -> Question | None:
        last = self._questions[-1] if self._questions else None
        pause = self._pause(last)
        if pause is None or any(s.type in _ENDED and s.timestamp > pause.timestamp for s in self._states):
            return None
        return last

    def _pause(self, question: Question | None) -> State[Any] | None:
        pauses = (s for s in self._states if question and s.state_details.pause_key == question.key)
        return next((state for state in pauses if state.type is StateType.PAUSED), None)

    async def answer(self, of: str) -> Answer | None:
        """What stands."""
        now = self.under_way
        for question in reversed(self._questions):
            found = await self._answer_to(question)
            # What the run would do may have changed while it waited: of that nobody has said yes.
            if question is now and not (found and found.approved):
                return found or _timed_out(question)
            if found and found.approved and question.of == of:
                return found
        return None

    async def _answer_to(self, question: Question) -> Answer | None:
        pause = self._pause(question)
        if pause is None:
            return None
        keys = keyset_from_base_key(f"{str(pause.name).lower()}-{question.key}")
        said = await aread_flow_run_input(keys["response"], flow_run_id=self._run_id)
        if not said:
            return None
        given = Decision.model_validate(said)
        resumed = (s.timestamp for s in self._states if s.timestamp > pause.timestamp)
        at = next(resumed, datetime.now(UTC))
        late = given.name == _NOBODY or at > question.deadline
        return Answer(
            outcome="timed out" if late else "approved" if given.decision == "approve" else "rejected",
            by="" if given.name == _NOBODY else given.name.strip(),
            comment=given.comment.strip(),
            answered_at=at,
            question=question,
        )

    async def ask(
        self, run: FlowRun, of: str, patience: timedelta, shown: str, progress: JsonValue
    ) -> Question:
        """Keep a new question, with the deadline of one that was dropped as the run was moved on by hand."""
        key = f"{_prefix(self._what)}-{self._count + 1}"
        now = datetime.now(UTC)
        dropped = self.under_way
        outdated = await self._answer_to(dropped) if dropped else None
        if outdated:
            await _record(self._client, run.id, outdated)
            get_run_logger().warning(
                "%s: what was approved is not what would be done now, so it is asked again", self._what
            )
            dropped = None
        asked_at, deadline = (dropped.asked_at, dropped.deadline) if dropped else (now, now + patience)
        ender: UUID | None = None
        if _suspends(run):
            deployment = await _ender(self._client, run)
            at_deadline: State[Any] = Scheduled(scheduled_time=deadline)
            made = await self._client.create_flow_run_from_deployment(
                deployment.id,
                parameters={"flow_run_id": str(run.id), "key": key},
                name=f"{run.name} at its deadline",
                state=at_deadline,
                idempotency_key=f"{run.id}:{key}",
            )
            ender = made.id
        question = Question(
            key=key,
            what=self._what,
            of=of,
            asked_at=asked_at,
            deadline=deadline,
            ender=ender,
            shown=shown,
            again=outdated is not None,
            progress=progress,
        )
        await self._client.create_flow_run_input(run.id, key, question.model_dump_json())
        return question


async def _wait_here(client: PrefectClient, run_id: UUID, question: Question, form: type[Decision]) -> None:
    """Wait in this process, for as long as the run is paused."""
    paused: State[Any] = Paused(pause_expiration_time=question.deadline + _GRACE, pause_key=question.key)
    keys = keyset_from_paused_state(paused)
    paused.state_details.run_input_keyset = dict(keys)  # type: ignore[arg-type]  # its keys are literals
    await form.asave(keys, run_id)
    moved = await client.set_flow_run_state(run_id, paused)
    if moved.status is not SetStateStatus.ACCEPT:
        raise RuntimeError(f"The run can't wait for approval: {getattr(moved.details, 'reason', '')}")
    while (left := (question.deadline - datetime.now(UTC)).total_seconds()) > 0:
        await asyncio.sleep(min(left, _LOOK))
        with suppress(*_AWAY):  # the server may be restarted meanwhile
            state = (await client.read_flow_run(run_id)).state
            if state is None or not state.is_paused():
                return
    await _answer_nothing(client, run_id)


async def _answer_nothing(client: PrefectClient, run_id: UUID) -> bool:
    """Resume a run in nobody's name; False if it has no form, or has been resumed."""
    nothing = Decision(decision="reject", name=_NOBODY)
    done = await client.resume_flow_run(run_id, nothing.model_dump(mode="json"))
    return done.status is SetStateStatus.ACCEPT


async def _ender(client: PrefectClient, run: FlowRun) -> DeploymentResponse:
    """The deployment that ends the waiting; on the run's own work pool, if there is one on it."""
    named = FlowFilter(name=FlowFilterName(any_=[END_APPROVAL]))
    found = [d for d in await client.read_deployments(flow_filter=named) if not d.paused]
    if not found:
        raise InputError(
            f"An approval in a run of a deployment needs a deployment of the flow {END_APPROVAL}, which ends "
            "the waiting when nobody answers. deployments/prefect.yaml has one: deploy it. Nothing was "
            "started."
        )
    return next((d for d in found if d.work_pool_name == run.work_pool_name), found[0])


async def _record(client: PrefectClient, run_id: UUID, answer: Answer) -> None:
    """Write down who answered what and when; once, whatever happens to the run later."""
    question = answer.question
    if question.ender is not None:
        # The run that would have ended the waiting is not needed any more; that it stays is no harm.
        with suppress(ObjectNotFound, *_AWAY):
            ender = await client.read_flow_run(question.ender)
            if ender.state and ender.state.is_scheduled():
                await client.delete_flow_run(question.ender)
    key = _prefix(question.what)
    of_run = ArtifactFilter(
        flow_run_id=ArtifactFilterFlowRunId(any_=[run_id]), key=ArtifactFilterKey(any_=[key])
    )
    said = f"{answer.sentence} ({_clock(answer.answered_at)})"
    if said in {artifact.description for artifact in await client.read_artifacts(artifact_filter=of_run)}:
        return
    get_run_logger().warning("%s: %s", question.what, said)
    await acreate_markdown_artifact(answer.markdown(), key=key, description=said)


def _timed_out(question: Question) -> Answer | None:
    """Nobody answered, and the time is up; None if it is not."""
    now = datetime.now(UTC)
    return (
        Answer(outcome="timed out", answered_at=now, question=question) if now >= question.deadline else None
    )


def _flow_run_id() -> UUID:
    context = FlowRunContext.get()
    if context is None or context.flow_run is None:
        raise RuntimeError("An approval can only be asked for in a flow run.")
    return context.flow_run.id


def _suspends(run: FlowRun) -> bool:
    """Whether a run suspends itself; Prefect refuses that for a subflow, and without a deployment."""
    return run.deployment_id is not None and run.parent_task_run_id is None


def _prefix(what: str) -> str:
    return f"approval-{slugify(what, max_length=60) or 'of-something'}"


def _clock(at: datetime) -> str:
    return f"{at:%Y-%m-%d %H:%M:%S} UTC"


def _span(span: timedelta) -> str:
    seconds = span.total_seconds()
    for length, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= length and round(seconds / length, 1) == seconds / length:
            return f"{seconds / length:g} {unit}"
    return f"{seconds:g} s"
