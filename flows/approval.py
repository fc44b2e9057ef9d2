"""A person's yes or no in a flow: as a parameter of `elt_chain`, and for flows of one's own."""

# No `from __future__ import annotations` here: see flows/elt.py.
import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal
from uuid import UUID

from prefect import flow
from prefect.artifacts import acreate_markdown_artifact
from prefect.logging import get_run_logger
from prefect.states import Completed
from prefect.utilities.asyncutils import run_coro_as_sync
from pydantic import BaseModel, ConfigDict, Field

from flows.alerts import tell_waiting
from flows.fan_out import conclude
from flows.parameters import Activation, Notify, Transform
from flows.progress import Progress
from flows.report import Step, StepState
from tasks.approval import (
    END_APPROVAL,
    Answer,
    Question,
    check_approval,
    end_waiting,
    question_under_way,
    request_answer,
)
from tasks.jobs import Checked, InputError

Place = Literal["load", "activations"]
_OUTCOMES = {
    "approved": StepState.SUCCEEDED,
    "rejected": StepState.CANCELLED,
    "timed out": StepState.FAILED,
}


class Approval(BaseModel):
    """Where a run waits for a person's approval."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    before: Annotated[list[Place], Field(min_length=1)] = Field(
        default=["activations"],
        title="Before",
        description="`load`: before anything is started. `activations`: when the syncs and the transform "
        "have ended, before anything is sent on.",
    )
    timeout: float = Field(
        default=3600.0,
        gt=0,
        le=30 * 86400,
        title="Timeout",
        description="Seconds to wait for an answer; none in time is a rejection.",
    )
    message: str = Field(
        default="", title="Message", description="What whoever approves should look at, as Markdown."
    )


async def arequest_approval(
    what: str,
    *,
    shown: str = "",
    timeout: float = 3600.0,  # noqa: ASYNC109 - it does not cancel, it answers
    notify: Sequence[Notify] = (),
    of: str = "",
) -> Answer:
    """`request_approval` for async flows."""

    async def tell(question: Question) -> None:
        await tell_waiting(notify, question)

    return await request_answer(what, shown=shown, timeout=timeout, of=of, tell=tell)


def request_approval(
    what: str, *, shown: str = "", timeout: float = 3600.0, notify: Sequence[Notify] = (), of: str = ""
) -> Answer:
    """Ask a person in the middle of a flow, and wait for the answer.

    A run of a deployment is suspended meanwhile: its process ends, its slots are free, and when it is
    answered it runs again from the beginning. So tasks before this call must persist their results
    (`persist_result=True`), as all of ours do. Elsewhere the process waits.

    Args:
        what: What is to be approved, in a few words. A run asks each thing once.
        shown: What there is to know about it, as Markdown; above the form.
        timeout: Seconds to wait. No answer in time is a no.
        notify: Who is told that it waits.
        of: What exactly is approved. An approval stands, also over a retry of the run, where this is the
            same; where the run comes back from waiting with another, it asks again. So no times in it.

    Returns:
        The answer: `.approved`, `.by`, `.comment`, `.answered_at`. It is also in the log and an artifact.

    Raises:
        InputError: The run would have to be suspended, and there is no deployment of `end-approval`.
    """
    return run_coro_as_sync(arequest_approval(what, shown=shown, timeout=timeout, notify=notify, of=of))


@flow(name=END_APPROVAL)
async def end_approval(flow_run_id: UUID, key: str) -> str:
    """End the waiting of a run that has asked for an approval and got no answer.

    Runs of it are scheduled by the runs that wait, for their deadline; nobody needs to start one.

    Args:
        flow_run_id: The run that waits.
        key: Of its question.

    Returns:
        What was done, in words.
    """
    done = await end_waiting(flow_run_id, key)
    get_run_logger().info("Flow run %s: %s", flow_run_id, done)
    return Completed(message=done, data=done)  # type: ignore[return-value]  # Prefect takes a State for the result


class Asking:
    """The approvals of one run of the chain.

    Args:
        approval: Where it waits; None: nowhere.
        notify: Who is told that it waits.
    """

    def __init__(self, approval: Approval | None, notify: Sequence[Notify]) -> None:
        self._approval = approval
        self._notify = notify

    def progress(self) -> Progress | None:
        """How far the run had come when it began to wait before its activations; None if it did not."""
        if not self._asks("activations"):
            return None
        question: Question | None = run_coro_as_sync(question_under_way(_what("activations")))
        return Progress.model_validate(question.progress) if question and question.progress else None

    def check(self, activations: Sequence[Activation]) -> None:
        """See that what is asked for can be asked.

        Raises:
            InputError: It can't. Nothing was started.
        """
        if self._asks("activations") and not activations:
            raise InputError(
                "`approval` is to be asked before the activations, and this run has none. Nothing was "
                "started."
            )
        if self._approval:
            run_coro_as_sync(check_approval())

    def before_load(
        self, syncs: Sequence[Checked[Any]], transform: Transform | None, activations: Sequence[Checked[Any]]
    ) -> Step | None:
        """Ask before anything is started; None if that is not asked for."""
        if not self._asks("load"):
            return None
        parts = [f"- sync: {found.request.label} ({found.request.tool})" for found in syncs]
        parts += [f"- transform: {transform.what} ({transform.tool})"] if transform else []
        parts += [f"- activation: {found.request.label} ({found.request.tool})" for found in activations]
        requests = [found.request for found in (*syncs, *activations)]
        of = sorted(f"{request.tool}/{request.resource_id}" for request in requests)
        return self._ask("load", "\n".join(parts), json.dumps([of, transform.what if transform else None]))

    def before_activations(self, progress: Progress) -> Step | None:
        """Ask before the activations that are ready; None if that is not asked for, or none is ready."""
        if not self._asks("activations"):
            return None
        if not progress.ready:
            get_run_logger().info("No activation is ready, so there is nothing to approve.")
            return None
        report = progress.report.model_copy(update={"steps": progress.waiting("waits for approval")})
        report = conclude(report, "none", began=progress.began)
        report = report.model_copy(update={"ending": "AwaitingApproval"})
        return self._ask("activations", report.markdown(), progress.facts(), progress)

    def _asks(self, place: Place) -> bool:
        return self._approval is not None and place in self._approval.before

    def _ask(self, place: Place, shown: str, of: str, progress: Progress | None = None) -> Step:
        assert self._approval is not None  # noqa: S101 - for the type checker; the callers look
        what = _what(place)

        async def tell(question: Question) -> None:
            if progress:  # so that the run's page says what it waits for, whatever becomes of it
                await acreate_markdown_artifact(
                    shown, key="elt-report", description=f"waits for approval until {question.until}"
                )
            await tell_waiting(self._notify, question)

        answer = run_coro_as_sync(
            request_answer(
                what,
                shown="\n\n".join(part for part in (self._approval.message, shown) if part),
                timeout=self._approval.timeout,
                of=of,
                progress=progress.model_dump(mode="json") if progress else None,
                tell=tell,
            )
        )
        assert answer is not None  # noqa: S101 - as above: it was waited for
        return Step(
            kind="approval",
            tool="prefect",
            resource_id=what,
            name=f"approval of {what}",
            state=_OUTCOMES[answer.outcome],
            message=answer.sentence,
        )


def _what(place: Place) -> str:
    return f"the {place}"
