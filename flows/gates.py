"""The gates of a chain: looked at when the syncs have ended, before anything is built."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from prefect.logging import get_run_logger

from flows.fan_out import submit
from flows.report import Step, StepState
from tasks.gates import Finding, GateCheck, look_at_gate
from tasks.jobs import InputError, JobResult, Request


def check_gate_names(gates: Sequence[GateCheck], requests: Sequence[Request]) -> None:
    """See that gates are about connections that are in the run.

    Raises:
        InputError: One names something else. Nothing was started.
    """
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


def look_at_gates(gates: Sequence[GateCheck], jobs: Sequence[JobResult]) -> Looked:
    """Look at all gates at the same time.

    A gate that could not be looked at stays shut for all that it is about.
    """
    looks = [submit(look_at_gate, gate, list(jobs)) for gate in gates]
    looked = Looked()
    for gate, look in zip(gates, looks, strict=True):
        answer: Any = look.result(raise_on_failure=False)
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
