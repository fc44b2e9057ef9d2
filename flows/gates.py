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
from tasks.dbt.lineage import LineageNode, listed
from tasks.dbt.model import DbtError, DbtPlan, DbtState
from tasks.dbt.parts import IN_A_FILE
from tasks.dbt_core import DbtCore, dbt_freshness
from tasks.gates import Finding, FreshnessGate, RowsGate, look_at_gate
from tasks.jobs import Checked, InputError, without_traceback
from tasks.tools import TOOLS


def check_gate_names(
    gates: Sequence[GateCheck],
    checked: Sequence[Checked[Any]],
    transform: Transform | None,
    plan: DbtPlan | None = None,
) -> None:
    """See that gates are about connections that are in the run, and that there is something to look at.

    Raises:
        InputError: One is not; freshness has no threshold, or rows are asked of a tool that counts none.
            Nothing was started.
    """
    if any(isinstance(gate, FreshnessGate) for gate in gates):
        if not isinstance(transform, DbtCore):
            raise InputError("A gate of freshness needs a transform by dbt-core. Nothing was started.")
        if plan and not any(source.watched for source in plan.lineage.sources):
            raise InputError(
                f"A gate of freshness needs sources with a freshness threshold, and the dbt project "
                f"{plan.project} has none. Nothing was started."
            )
    requests = [found.request for found in checked]
    known = {text for request in requests for text in (request.resource_id, request.label)}
    for gate in gates:
        if unknown := [name for name in gate.connections if name not in known]:
            raise InputError(
                f"The gate {gate.label} is about {', '.join(unknown)}, which is not in this run. In it are: "
                f"{', '.join(sorted({request.label for request in requests}))}. Nothing was started."
            )
        if isinstance(gate, RowsGate) and gate.at_least is not None:
            about = [
                found for found in checked if gate.is_about(found.request.resource_id, found.request.label)
            ]
            if never := [found.request for found in about if not found.counts_rows]:
                raise InputError(
                    f"The gate {gate.label} expects at least {gate.at_least:,} rows of "
                    f"{listed(sorted(request.label for request in never))}, and "
                    f"{listed(sorted({TOOLS[request.tool].title for request in never}))} does not tell how "
                    "many there were: name other connections, or ask the warehouse by a gate of SQL. Nothing "
                    "was started."
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
        self,
        gate: GateCheck,
        found: Sequence[Finding],
        passed: Sequence[str],
        idle: str,
        trouble: str | None,
        unknown: Sequence[str] = (),
    ) -> None:
        """Take in what came of a gate.

        Args:
            gate: What is expected.
            found: For what it stays shut.
            passed: Keys of what passed.
            idle: What to say if it is about nothing.
            trouble: Why it could not be looked at.
            unknown: Of which syncs nothing could be compared.
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
        elif passed and not unknown:
            self.steps.append(_step(gate, StepState.SUCCEEDED))
        else:
            if unknown:
                idle = f"nothing to compare for {listed(unknown)}: it is not told how many rows landed"
            log.warning("%s: %s", gate.label, idle)
            self.steps.append(_step(gate, StepState.PARTIAL, idle))


def look_at_gates(gates: Sequence[GateCheck], chain: Gate, transform: Transform | None) -> Looked:
    """Look at all gates at the same time, and once at the age of the sources for all that ask for it.

    A gate that could not be looked at stays shut for all that it is about.

    Args:
        gates: What is expected.
        chain: How the syncs ended, and what is selected of the dbt project.
        transform: The dbt project.
    """
    without_traceback(DbtError)
    jobs = chain.outcomes
    looks: dict[int, PrefectFuture[Any]] = {
        number: submit(look_at_gate, gate, list(jobs))
        for number, gate in enumerate(gates)
        if not isinstance(gate, FreshnessGate)
    }
    ages: Any = None
    if isinstance(transform, DbtCore) and len(looks) < len(gates):
        if chain.plan and chain.plan.adapter in IN_A_FILE:
            for look in looks.values():
                look.wait()  # dbt is another process, and could not open the file meanwhile
        ages = submit(dbt_freshness, transform.whole).result(raise_on_failure=False)
    looked = Looked()
    for number, gate in enumerate(gates):
        if isinstance(gate, FreshnessGate):
            looked.add_sources(gate, ages, chain)
            continue
        answer: Any = looks[number].result(raise_on_failure=False)
        landed = [job for job in gate.about(jobs) if job.good]
        trouble = None if isinstance(answer, list) else _why(answer)
        found = [Finding.of(gate, job, trouble) for job in landed] if trouble else answer
        shut = {(finding.vendor, finding.resource_id) for finding in found}
        open_for = [job for job in landed if (job.vendor, job.resource_id) not in shut]
        # Without rows a gate of rows stays shut as soon as it has anything to compare them to.
        unknown = [job for job in open_for if isinstance(gate, RowsGate) and job.rows is None]
        passed = [Finding.of(gate, job, "").key for job in open_for if job not in unknown]
        idle = "none of the connections that it is about has landed: nothing was looked at"
        looked.add(gate, found, passed, idle, trouble, [job.name for job in unknown])
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
