"""What of a pipeline's parameters goes with a part of it: a run refuses what it can't have."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from flows.approval import Approval
from flows.parameters import Activation, GateCheck, OwnStep, Transform
from flows.rules import AllowFailure, Required
from tasks.dbt_core import DbtCore
from tasks.gates import FreshnessGate
from tasks.intervals import fill_in
from tasks.jobs import InputError
from tasks.steps import SqlStep

Has = Callable[[str], bool]
"""Whether a part has the connection, or the step, of this id or name."""


def gate_of_part(gate: GateCheck, has: Has, transform: Transform | None) -> GateCheck | None:
    """A gate as it is about a part; None if it is about nothing in it.

    Args:
        gate: Of the whole.
        has: What is in the part.
        transform: Of the part.
    """
    if isinstance(gate, FreshnessGate) and not isinstance(transform, DbtCore):
        return None
    left = [name for name in gate.connections if has(name)]
    if gate.connections and not left:
        return None
    return gate.model_copy(update={"connections": left})


def rule_of_part(rule: AllowFailure, has: Has) -> AllowFailure:
    """How much failure a part may bear; none if all that had to succeed is elsewhere."""
    if not isinstance(rule, Required):
        return rule
    left = [name for name in rule.required if has(name)]
    return Required(required=left) if left else "none"


def approval_of_part(approval: Approval | None, activations: Sequence[Activation]) -> Approval | None:
    """Where a part waits for approval: not before activations if it has none."""
    if approval is None or activations:
        return approval
    left = [place for place in approval.before if place != "activations"]
    return approval.model_copy(update={"before": left}) if left else None


def needs_interval(step: OwnStep) -> bool:
    """Whether a step of one's own can't be run without a data interval."""
    if not isinstance(step, SqlStep):
        return False
    try:
        fill_in(step.statements, None)
    except InputError:
        return True
    return False
