"""What the standing dbt jobs have in common: building with retries, telling, and ending honestly."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed
from pydantic import ValidationError

from blocks.fields import words_of
from flows.alerts import Telling
from flows.fan_out import KNOWN_ERRORS, conclude, refuse, submit
from flows.node_report import publish_build, publish_freshness
from flows.parameters import Notify
from flows.report import EltReport, Step, StepState
from tasks.dbt.freshness import Freshness, SourceAge
from tasks.dbt_core import (
    DbtBuildFailed,
    DbtCore,
    DbtInputError,
    DbtNode,
    DbtPlan,
    DbtResult,
    DbtState,
    SourcesStale,
    dbt_build,
    dbt_freshness,
    dbt_plan,
)
from tasks.jobs import without_traceback

_AS_LOOKED = {
    DbtState.SUCCESS: "Completed",
    DbtState.WARN: "Stale",
    DbtState.SKIPPED: "NothingToLookAt",
}


class StandingJob:
    """One run of a standing job.

    Args:
        dbt: The project.
        notify: Who is told how it went.
        retries: How often a dbt step that fails is tried again.
        delay: Seconds to wait before that.
    """

    def __init__(self, dbt: DbtCore, notify: Sequence[Notify], retries: int, delay: float) -> None:
        self._dbt = dbt
        self._began = datetime.now(UTC)
        self._retry: dict[str, Any] = {"retries": retries, "retry_delay_seconds": delay}
        self._telling = Telling(notify)
        self._done: list[DbtResult | Exception] = []
        self._steps: list[Step] = []

    def ready(self) -> None:
        """See that whoever is to be told can be.

        Raises:
            BlockNotFound: A block is not there.
        """
        self._telling.checked()

    def plan(self, dbt: DbtCore) -> DbtPlan:
        """What dbt would run.

        Raises:
            DbtError: It can't.
        """
        self.ready()
        return submit(dbt_plan, dbt).result()

    def like(self, **said: Any) -> DbtCore:
        """The same project with another command and selection.

        Raises:
            DbtInputError: That can't go with what else it has.
        """
        nothing: dict[str, Any] = {"select": [], "exclude": [], "selector": None, "full_refresh": False}
        try:
            return DbtCore.model_validate({**self._dbt.model_dump(), **nothing, "command": "build", **said})
        except ValidationError as error:
            raise DbtInputError(f"{words_of(error)} Nothing was started.") from None

    def build(
        self, dbt: DbtCore, exclude: Sequence[str] = (), retry_of: UUID | None = None
    ) -> DbtResult | None:
        """Run dbt.

        Returns:
            The result; None if the step failed, its retries used up.
        """
        step = dbt_build.with_options(**self._retry)
        found: Any = submit(step, dbt, exclude, retry_of).result(raise_on_failure=False)
        self._done.append(found if isinstance(found, DbtResult | Exception) else RuntimeError(str(found)))
        self._steps.append(self._step(dbt.what, found))
        return found if isinstance(found, DbtResult) else None

    def look(self) -> Freshness | Exception:
        """How old the sources are, or why that is not known."""
        step = dbt_freshness.with_options(**self._retry)
        found: Any = submit(step, self._dbt, may_have_none=True).result(raise_on_failure=False)
        self._steps.append(self._step("dbt source freshness", found))
        return found if isinstance(found, Freshness | Exception) else RuntimeError(str(found))

    def refuse(self, error: Exception) -> Any:
        """The final state of a run that was not begun."""
        self._telling.refused(error)
        return refuse(error)

    def ended(self, name: str = "Failed", what: str = "", *, all_results: bool = False) -> Any:
        """Publish the report, tell, and end as the last dbt step has ended.

        Args:
            name: Of the final state, should it have failed.
            what: What failed, in words.
            all_results: Whether the run's result is all results, and not the last one.
        """
        last = self._done[-1]
        results = [found.result if isinstance(found, DbtBuildFailed) else found for found in self._done]
        reported = [found for found in results if isinstance(found, DbtResult)]
        publish_build(name if isinstance(last, Exception) else "Completed", reported)
        # A node that was run twice is told of as it was at last.
        self._tell(list({node.unique_id: node for found in reported for node in found.nodes}.values()))
        if isinstance(last, Exception):
            return _failed(last, name, f"{what}: {last}" if what else str(last))
        return Completed(message=last.message, data=self._done if all_results else last)

    def looked(self, found: Freshness | Exception) -> Any:
        """Publish the sources' ages, tell, and end as they are."""
        result = found.result if isinstance(found, SourcesStale) else found
        if not isinstance(result, Freshness):
            self._tell([])
            return _failed(result, "Failed", str(result))
        ending = _AS_LOOKED.get(result.state, "Failed")
        publish_freshness(ending, result)
        self._tell([_as_node(source) for source in result.sources])
        if isinstance(found, Exception):
            return _failed(found, ending, result.message)
        return Completed(name=ending, message=result.message, data=result)

    def _tell(self, nodes: list[DbtNode]) -> None:
        report = EltReport(steps=self._steps, nodes=nodes)
        self._telling.ended(conclude(report, "none", began=self._began))

    def _step(self, what: str, found: Any) -> Step:
        good = isinstance(found, DbtResult | Freshness)
        of_nodes = found.result if isinstance(found, DbtBuildFailed | SourcesStale) else found
        return Step(
            kind="transform",
            tool=self._dbt.tool,
            resource_id=f"{self._dbt.project.name}/{what}",
            name=f"{what} ({self._dbt.project.name})",
            state=StepState.SUCCEEDED if good else StepState.FAILED,
            owner=self._dbt.owner,
            duration=getattr(of_nodes, "duration", None),
            message=getattr(of_nodes, "message", None) or str(found),
        )


def _as_node(source: SourceAge) -> DbtNode:
    return DbtNode(
        unique_id=source.unique_id,
        name=source.name,
        resource_type="source",
        state=source.state,
        message=source.sentence,
        owner=source.owner,
    )


def _failed(error: Exception, name: str, message: str) -> State[Any]:
    without_traceback(*KNOWN_ERRORS)
    return Failed(name=name, message=message, data=error.with_traceback(None))
