"""The gates of a chain: looked at when the syncs have ended, before anything is built."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from prefect.futures import PrefectFuture
from prefect.logging import get_run_logger

from flows.fan_out import submit
from flows.gate import Gate
from flows.parameters import GateCheck, Transform
from flows.report import Step, StepState
from tasks.dbt.freshness import Freshness, SourceAge, SourcesStale
from tasks.dbt.lineage import LineageNode
from tasks.dbt.model import DbtError, DbtPlan, DbtState
from tasks.dbt_core import DbtCore, dbt_freshness
from tasks.gates import Finding, FreshnessGate, look_at_gate
from tasks.jobs import InputError, Request, without_traceback


def check_gate_names(
    gates: Sequence[GateCheck],
    requests: Sequence[Request],
    transform: Transform | None,
    plan: DbtPlan | None = None,
) -> None:
    """See that gates are about connections that are in the run, and that freshness has something to look at.

    Raises:
        InputError: One is not, or has none. Nothing was started.
    """
    if any(isinstance(gate, FreshnessGate) for gate in gates):
        if not isinstance(transform, DbtCore):
            raise InputError("A gate of freshness needs a transform by dbt-core. Nothing was started.")
        if plan and not any(source.watched for source in plan.lineage.sources):
            raise InputError(
                f"A gate of freshness needs sources with a freshness threshold, and the dbt project "
                f"{plan.project} has none. Nothing was started."
            )
    known = {text for request in requests for text in (request.resource_id, request.label)}
    for gate in gates:
        if unknown := [name for name in gate.connections if name not in known]:
            raise InputError(
                f"The gate {gate.label} is about {', '.join(unknown)}, which is not in this run. In it are: "
                f"{', '.join(sorted({request.label for request in requests}))}. Nothing was started."
            )


@dataclass
class Looked:
    """What came of the gates.

    Attributes:
        findings: For which connections one stays shut.
        steps: The steps of the report: one per finding, one per gate that is open.
        passed: The keys that findings about connections would have that have passed.
    """

    findings: list[Finding] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    passed: list[str] = field(default_factory=list)

    def add_sources(self, gate: FreshnessGate, answer: Any, chain: Gate) -> None:
        """Take in how old the sources are that something selected is built on.

        What did not land is old, too; that it did not land has been said.

        Args:
            gate: What is expected.
            answer: What dbt found; an error if it could not look.
            chain: What is selected, and what did not land.
        """
        if chain.plan is None:
            return
        found = answer.result if isinstance(answer, SourcesStale) else answer
        told = {age.unique_id: age for age in found.sources} if isinstance(found, Freshness) else {}
        trouble = None if isinstance(found, Freshness) else _why(answer)
        lineage = chain.plan.lineage
        about = lineage.upstream(chain.plan.selected)
        if gate.connections:
            about &= chain.sources_filled_by(gate.connections)
        watched = {s.unique_id: s for s in lineage.sources if s.unique_id in about}
        watched = {id_: source for id_, source in watched.items() if source.watched or id_ in told}
        # One that is not told of, because dbt broke or left off at the first that was too old, may be of any
        # age, and who fills it may be nobody of this run.
        ages = [
            told.get(id_) or _unseen(source, trouble or "dbt did not look at it")
            for id_, source in sorted(watched.items())
            if id_ not in chain.late_sources
        ]
        idle = "has landed" if watched else "has a freshness threshold"
        self.add(
            gate,
            [gate.finding(age) for age in ages if gate.shut_for(age)],
            [gate.finding(age).key for age in ages if not gate.shut_for(age)],
            f"none of the sources that it is about {idle}: nothing was looked at",
            trouble,
        )

    def add(
        self, gate: GateCheck, found: Sequence[Finding], passed: Sequence[str], idle: str, trouble: str | None
    ) -> None:
        """Take in what came of a gate.

        Args:
            gate: What is expected.
            found: For what it stays shut.
            passed: Keys of what passed.
            idle: What to say if it is about nothing.
            trouble: Why it could not be looked at.
        """
        log = get_run_logger()
        for finding in found:
            log.warning("%s, %s: %s", finding.name, finding.gate, finding.message)
        self.findings += found
        self.passed += passed
        if found:
            self.steps += [_shut(gate, finding) for finding in found]
        elif trouble:
            log.warning("%s: %s", gate.label, trouble)
            self.steps.append(_step(gate, StepState.FAILED, trouble))
        elif passed:
            self.steps.append(_step(gate, StepState.SUCCEEDED))
        else:
            log.warning("%s: %s", gate.label, idle)
            self.steps.append(_step(gate, StepState.PARTIAL, idle))


def look_at_gates(gates: Sequence[GateCheck], chain: Gate, transform: Transform | None) -> Looked:
    """Look at all gates at the same time.

    A gate that could not be looked at stays shut for all that it is about.

    Args:
        gates: What is expected.
        chain: How the syncs ended, and what is selected of the dbt project.
        transform: The dbt project.
    """
    without_traceback(DbtError)
    jobs = chain.outcomes
    looks: list[PrefectFuture[Any]] = [
        submit(dbt_freshness, transform.whole)
        if isinstance(gate, FreshnessGate) and isinstance(transform, DbtCore)
        else submit(look_at_gate, gate, list(jobs))  # type: ignore[arg-type]  # freshness was just looked for
        for gate in gates
    ]
    looked = Looked()
    for gate, look in zip(gates, looks, strict=True):
        answer: Any = look.result(raise_on_failure=False)
        if isinstance(gate, FreshnessGate):
            looked.add_sources(gate, answer, chain)
            continue
        landed = [job for job in gate.about(jobs) if job.good]
        trouble = None if isinstance(answer, list) else _why(answer)
        found = [Finding.of(gate, job, trouble) for job in landed] if trouble else answer
        shut = {(finding.vendor, finding.resource_id) for finding in found}
        passed = [Finding.of(gate, j, "").key for j in landed if (j.vendor, j.resource_id) not in shut]
        idle = "none of the connections that it is about has landed: nothing was looked at"
        looked.add(gate, found, passed, idle, trouble)
    return looked


def _why(error: Any) -> str:
    return f"the gate could not be looked at: {error}"


def _unseen(source: LineageNode, why: str) -> SourceAge:
    return SourceAge(
        unique_id=source.unique_id,
        name=f"{source.source_name}.{source.name}",
        state=DbtState.ERROR,
        message=why,
        owner=source.owner,
    )


def _step(gate: GateCheck, state: StepState, message: str | None = None) -> Step:
    return Step(
        kind="gate",
        tool=gate.tool,
        resource_id=gate.label,
        name=gate.label,
        owner=gate.owner,
        state=state,
        message=message,
        tolerated=state is StepState.PARTIAL,
    )


def _shut(gate: GateCheck, finding: Finding) -> Step:
    return Step(
        kind="gate",
        tool=gate.tool,
        resource_id=finding.about,
        name=f"{finding.gate} of {finding.name}",
        owner=finding.owner,
        state=StepState.FAILED,
        message=finding.message,
    )
