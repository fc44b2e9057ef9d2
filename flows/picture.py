"""The lineage of a run, from connections to activations, coloured by how each step ended."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from flows.gate import Gate
from flows.report import Edge, Step, StepState
from tasks.dbt.lineage import Lineage
from tasks.dbt.model import DbtNode, DbtState
from tasks.jobs import Parameters

_MOST_BOXES = 60  # past that a picture is no help, and the models between the ends are left out
_DRAWN = frozenset({"model", "seed", "snapshot", "source", "exposure"})
_NODE_KIND = {
    DbtState.SUCCESS: "ok",
    DbtState.WARN: "warn",
    DbtState.FAIL: "failed",
    DbtState.ERROR: "failed",
    DbtState.SKIPPED: "held",
}
Boxes = dict[str, tuple[str, str]]


def picture(
    gate: Gate, steps: Sequence[Step], activations: Sequence[Parameters], nodes: Sequence[DbtNode]
) -> tuple[Boxes, list[Edge], dict[str, str]]:
    """Boxes (id to label and class) and lines of the picture; empty without a dbt project.

    Returns:
        Beside them which box stands for which activation, as the key of its step: see `coloured`.
    """
    if gate.plan is None:
        return {}, [], {}
    lineage = gate.plan.lineage
    drawn = _drawn(lineage)
    if len(drawn) > _MOST_BOXES:
        drawn = {id_ for id_ in drawn if lineage.nodes[id_].resource_type in ("source", "exposure")}
    look = _Look(gate, steps, activations, nodes)
    short = {id_: f"n{number}" for number, id_ in enumerate(sorted(drawn))}
    boxes = {short[id_]: look.box(id_) for id_ in sorted(drawn)}
    lines = {(short[parent], short[id_]) for id_ in drawn for parent in _nearest_drawn(id_, lineage, drawn)}
    ends = {short[id_]: step.key for id_, step in look.by_exposure.items() if id_ in drawn}
    return boxes, [Edge(source=source, target=target) for source, target in sorted(lines)], ends


def coloured(boxes: Boxes, ends: Mapping[str, str], steps: Sequence[Step]) -> Boxes:
    """The boxes, with the activations as they ended, which was not known when they were drawn."""
    ended = {step.key: _box(step) for step in steps if step.kind == "activation"}
    return {id_: ended.get(ends.get(id_, ""), box) for id_, box in boxes.items()}


def _drawn(lineage: Lineage) -> set[str]:
    """Everything between a source and an exposure."""
    exposures = {node.unique_id for node in lineage.exposures}
    above = lineage.upstream(exposures)
    return {id_ for id_ in exposures | above if lineage.nodes[id_].resource_type in _DRAWN}


def _nearest_drawn(unique_id: str, lineage: Lineage, drawn: set[str]) -> set[str]:
    found: set[str] = set()
    stack, seen = list(lineage.parents(unique_id)), set()
    while stack:
        parent = stack.pop()
        if parent in seen:
            continue
        seen.add(parent)
        if parent in drawn:
            found.add(parent)
        else:
            stack += lineage.parents(parent)
    return found


class _Look:
    """What each box says and which class it has."""

    def __init__(
        self,
        gate: Gate,
        steps: Sequence[Step],
        activations: Sequence[Parameters],
        nodes: Sequence[DbtNode],
    ) -> None:
        assert gate.plan is not None  # noqa: S101 - for the type checker; the caller looks
        self.lineage = gate.plan.lineage
        self.by_source = {
            source: step for step in steps if step.kind == "sync" for source in gate.sources_of(step)
        }
        self.by_exposure: dict[str, Step] = {}
        done = {(step.tool, step.resource_id): step for step in steps if step.kind == "activation"}
        for activation in activations:
            if step := done.get((activation.tool, activation.resource_id)):
                for exposure in gate.exposures_of(activation):
                    self.by_exposure[exposure.unique_id] = step
        self.states: Mapping[str, DbtState] = {node.unique_id: node.state for node in nodes}
        late = self.lineage.downstream(gate.late_sources)
        self.doubtful = late | gate.tainted

    def box(self, unique_id: str) -> tuple[str, str]:
        node = self.lineage.nodes[unique_id]
        step = self.by_source.get(unique_id) or self.by_exposure.get(unique_id)
        if step:
            return _box(step)
        label = node.label or node.name
        state = self.states.get(unique_id)
        if state is not None and _NODE_KIND[state] != "ok":
            return _safe(label), _NODE_KIND[state]
        return _safe(label), "held" if unique_id in self.doubtful else "ok"


def _box(step: Step) -> tuple[str, str]:
    label = f"{step.name}: {step.rows:,} rows" if step.rows is not None else step.name
    return _safe(label), _step_kind(step)


def _step_kind(step: Step) -> str:
    if step.state is StepState.HELD:
        return "held"
    if not step.good:
        return "failed"
    return "warn" if step.state is StepState.PARTIAL else "ok"


def _safe(label: str) -> str:
    return label.replace('"', "'").replace("`", "'").replace("<", "(").replace(">", ")")
