"""How much failure a run may bear and still be called complete in part."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from flows.report import Step
from tasks.jobs import InputError


class AtMost(BaseModel):
    """So many steps may fail."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    at_most: int = Field(ge=0, title="At most", description="Number of steps that may fail of themselves.")


class Required(BaseModel):
    """These must succeed; the others may fail."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    required: list[str] = Field(
        min_length=1,
        title="Required",
        description="Ids or names of the connections and syncs that must succeed.",
    )


# What a run is for. That a gate was open or a step of one's own went well refreshes nothing.
_WORK = ("sync", "transform", "activation")

AllowFailure = Literal["none", "any"] | AtMost | Required
"""`none`, `any`, `{"at_most": n}` or `{"required": [ids]}`."""


def check_rule(rule: AllowFailure, steps: Iterable[tuple[str, str]]) -> None:
    """See that a rule only names what is there.

    Args:
        rule: The rule.
        steps: Id and name of each connection and sync of the run.

    Raises:
        InputError: It names something else. Nothing was started.
    """
    if not isinstance(rule, Required):
        return
    pairs = list(steps)
    known = {text for pair in pairs for text in pair}
    if unknown := [wanted for wanted in rule.required if wanted not in known]:
        raise InputError(
            f"allow_failure requires {', '.join(unknown)}, which is not in this run. "
            f"In it are: {', '.join(sorted({name or id_ for id_, name in pairs}))}. Nothing was started."
        )


def bears(rule: AllowFailure, steps: Sequence[Step]) -> bool:
    """Whether the rule allows these steps to have ended as they did, given that not all ended well."""
    work = [step for step in steps if step.kind in _WORK] or steps
    if not any(step.good for step in work):
        return False  # to call a run in which nothing was done partially refreshed would be a lie
    match rule:
        case "none":
            return False
        case "any":
            return True
        case AtMost(at_most=most):
            return sum(step.failed for step in steps) <= most
        case Required(required=names):
            return all(step.good for step in steps if step.resource_id in names or step.name in names)
