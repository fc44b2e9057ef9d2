"""How far a chain has come when only its activations are left, so that it can go on from there."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime

from pydantic import BaseModel, ConfigDict

from flows.report import EltReport, Step


class Progress(BaseModel):
    """A chain before its activations.

    Attributes:
        began: When the run began.
        report: Every step before the activations, with its outcome; in the picture the activations wait.
        activations: The activations as they would stand in the report if none of them was started.
        ready: Keys of those of which all that they are built on is fresh.
        ends: Which box of the picture stands for which activation: the box's id to the step's key.
    """

    model_config = ConfigDict(frozen=True)

    began: datetime
    report: EltReport
    activations: list[Step] = []
    ready: list[str] = []
    ends: dict[str, str] = {}

    def after(self, steps: Sequence[Step]) -> Progress:
        """The same, with steps that came before."""
        report = self.report.model_copy(update={"steps": [*steps, *self.report.steps]})
        return self.model_copy(update={"report": report})

    def facts(self) -> str:
        """What somebody approves who approves that the activations are started."""
        steps = [(step.key, step.state, step.job_id, step.rows) for step in self.report.steps]
        nodes = sorted((node.unique_id, node.state) for node in self.report.nodes)
        return json.dumps([steps, nodes, self.ready])

    def waiting(self, why: str) -> list[Step]:
        """All steps, with those activations held back that could be started.

        Args:
            why: Why they are.
        """
        return [*self.report.steps, *self.held(why)]

    def held(self, why: str, because: Sequence[str] = ()) -> list[Step]:
        """The activations, if those that are ready are not started either.

        Args:
            why: Why they are not.
            because: Keys of what they wait for.
        """
        said = {"message": why, "because": list(because)}
        return [s.model_copy(update=said) if s.key in self.ready else s for s in self.activations]
