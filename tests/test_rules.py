"""How much failure a run may bear."""

from __future__ import annotations

import pytest

from flows.report import Kind, Step, StepState
from flows.rules import AllowFailure, AtMost, bears

pytestmark = pytest.mark.no_server


def step(kind: Kind, state: StepState) -> Step:
    return Step(kind=kind, tool="t", resource_id=kind, name=kind, state=state)


@pytest.mark.parametrize("rule", ["any", AtMost(at_most=9)])
@pytest.mark.parametrize("beside", ["before", "gate", "approval", "after"])
def test_what_refreshes_nothing_is_no_part_of_a_success(rule: AllowFailure, beside: Kind) -> None:
    """That nothing at all was loaded, built or sent on is a failure, however well all else went."""
    failed = [step("sync", StepState.FAILED), step("transform", StepState.HELD)]
    well = step(beside, StepState.SUCCEEDED)
    assert not bears(rule, [*failed, well])
    assert bears(rule, [*failed, well, step("activation", StepState.SUCCEEDED)])


def test_steps_of_ones_own_alone() -> None:
    """Where there is nothing else, they are what the run is for."""
    assert bears("any", [step("before", StepState.SUCCEEDED), step("after", StepState.FAILED)])
    assert not bears("any", [step("before", StepState.FAILED)])
