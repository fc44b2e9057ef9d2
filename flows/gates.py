"""The gates of a chain: looked at when the syncs have ended, before anything is built."""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Any

from prefect.futures import PrefectFuture
from prefect.logging import get_run_logger

from flows.fan_out import submit
from flows.parameters import GateCheck, Transform
from flows.report import Step, StepState
from tasks.dbt.freshness import Freshness, SourceAge, SourcesStale
from tasks.dbt.model import DbtError, DbtPlan
from tasks.dbt_core import DbtCore, dbt_freshness
from tasks.gates import Finding, FreshnessGate, look_at_gate
from tasks.jobs import InputError, JobResult, Request, without_traceback


def check_gate_names(
    gates: Sequence[GateCheck], requests: Sequence[Request], transform: Transform | None
) -> None:
    """See that gates are about connections that are in the run, and that freshness has a dbt project.

    Raises:
        InputError: One is not, or has none. Nothing was started.
    """
    if any(isinstance(gate, FreshnessGate) for gate in gates) and not isinstance(transform, DbtCore):
        raise InputError("A gate of freshness needs a transform by dbt-core. Nothing was started.")
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

    def add_sources(
        self, gate: FreshnessGate, ages: Sequence[SourceAge], plan: DbtPlan, missing: AbstractSet[str]
    ) -> None:
        """Take in how old the sources are that something selected is built on.

        What did not land is old, too; that it did not land has been said.
        """
        above = plan.lineage.upstream(plan.selected) - missing
        ages = [age for age in ages if age.unique_id in above]
        found = [gate.finding(age) for age in ages if gate.shut_for(age)]
        for finding in found:
            get_run_logger().warning("source %s: %s", finding.name, finding.message)
        self.findings += found
        self.steps += [_shut(gate, finding) for finding in found] or [_open(gate)]
        self.passed += [gate.finding(age).key for age in ages if not gate.shut_for(age)]


def look_at_gates(
    gates: Sequence[GateCheck],
    jobs: Sequence[JobResult],
    transform: Transform | None,
    plan: DbtPlan | None,
    missing: AbstractSet[str] = frozenset(),
) -> Looked:
    """Look at all gates at the same time.

    A gate that could not be looked at stays shut for all that it is about.

    Args:
        gates: What is expected.
        jobs: How the syncs ended.
        transform: The dbt project.
        plan: What is selected of it.
        missing: The sources that did not land.
    """
    without_traceback(DbtError)
    looks: list[PrefectFuture[Any]] = [
        submit(dbt_freshness, transform.whole)
        if isinstance(gate, FreshnessGate) and isinstance(transform, DbtCore)
        else submit(look_at_gate, gate, list(jobs))  # type: ignore[arg-type]  # freshness was just looked for
        for gate in gates
    ]
    looked = Looked()
    for gate, look in zip(gates, looks, strict=True):
        answer: Any = look.result(raise_on_failure=False)
        if isinstance(gate, FreshnessGate) and plan and isinstance(answer, Freshness | SourcesStale):
            ages = (answer.result if isinstance(answer, SourcesStale) else answer).sources
            looked.add_sources(gate, ages, plan, missing)
            continue
        found = answer if isinstance(answer, list) else _blind(gate, jobs, answer)
        for finding in found:
            get_run_logger().warning("%s, %s: %s", finding.name, finding.gate, finding.message)
        looked.findings += found
        looked.steps += [_shut(gate, finding) for finding in found] or [_open(gate)]
        shut = {(finding.vendor, finding.resource_id) for finding in found}
        looked.passed += [
            Finding.of(gate, job, "").key
            for job in gate.about(jobs)
            if job.good and (job.vendor, job.resource_id) not in shut
        ]
    return looked


def _open(gate: GateCheck) -> Step:
    return Step(
        kind="gate",
        tool=gate.tool,
        resource_id=gate.label,
        name=gate.label,
        owner=gate.owner,
        state=StepState.SUCCEEDED,
    )


def _blind(gate: GateCheck, jobs: Sequence[JobResult], error: Any) -> list[Finding]:
    why = f"the gate could not be looked at: {error}"
    return [Finding.of(gate, job, why) for job in gate.about(jobs) if job.good]


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
