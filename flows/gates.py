"""The gates of a chain: looked at when the syncs have ended, before anything is built."""

from __future__ import annotations

from collections.abc import Sequence
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


def look_at_gates(gates: Sequence[GateCheck], jobs: Sequence[JobResult]) -> tuple[list[Finding], list[Step]]:
    """Look at all gates at the same time.

    Returns:
        For which connections one stays shut, and the steps of the report. A gate that could not be looked at
        stays shut for all that it is about.
    """
    looks = [submit(look_at_gate, gate, list(jobs)) for gate in gates]
    findings: list[Finding] = []
    steps: list[Step] = []
    for gate, look in zip(gates, looks, strict=True):
        answer: Any = look.result(raise_on_failure=False)
        found = answer if isinstance(answer, list) else _blind(gate, jobs, answer)
        findings += found
        steps += [_step(gate, finding) for finding in found]
        if not found:
            steps.append(
                Step(
                    kind="gate",
                    tool=gate.tool,
                    resource_id=gate.label,
                    name=gate.label,
                    owner=gate.owner,
                    state=StepState.SUCCEEDED,
                )
            )
    return findings, steps


def _blind(gate: GateCheck, jobs: Sequence[JobResult], error: Any) -> list[Finding]:
    return [
        Finding(
            gate=gate.label,
            vendor=job.vendor,
            resource_id=job.resource_id,
            name=job.name,
            owner=gate.owner or job.owner,
            message=f"the gate could not be looked at: {error}",
        )
        for job in gate.about(jobs)
        if job.good
    ]


def _step(gate: GateCheck, finding: Finding) -> Step:
    get_run_logger().warning("%s, %s: %s", finding.name, finding.gate, finding.message)
    return Step(
        kind="gate",
        tool=gate.tool,
        resource_id=f"{finding.resource_id}/{finding.gate}",
        name=f"{finding.gate} of {finding.name}",
        owner=finding.owner,
        state=StepState.FAILED,
        message=finding.message,
    )
