"""What a run did, step by step: as a typed report, and as Markdown for the UI."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import datetime
from enum import StrEnum
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from tasks.dbt.model import DbtNode
from tasks.jobs import JobResult, Request


class StepState(StrEnum):
    """How a step of a run ended."""

    SUCCEEDED = "SUCCEEDED"
    PARTIAL = "PARTIAL"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"
    SKIPPED = "SKIPPED"
    HELD = "HELD"


_TELLING = ("before", "gate", "transform", "approval", "after")
_MARKS = {
    StepState.SUCCEEDED: "✓",
    StepState.PARTIAL: "◐",
    StepState.FAILED: "✗",
    StepState.CANCELLED: "✗",
    StepState.SKIPPED: "-",
    StepState.HELD: "○",
}


Kind = Literal["before", "sync", "gate", "transform", "approval", "activation", "after"]
"""Where in the chain a step is."""


Ending = Literal["Completed", "PartiallyRefreshed", "Failed", "Rejected", "AwaitingApproval"]
"""How a run ends, or that it waits."""


class Step(BaseModel):
    """One step of a run: a connection's sync, the transform, an activation, or one of the user's own."""

    model_config = ConfigDict(frozen=True)

    kind: Kind
    tool: str
    resource_id: str
    name: str
    state: StepState
    owner: str | None = None
    rows: int | None = None
    bytes: int | None = None
    duration: float | None = Field(default=None, description="Seconds.")
    job_id: str | None = None
    url: str | None = None
    message: str | None = None
    tolerated: bool = False
    because: list[str] = Field(default=[], description="Keys of what it waits for; none: all that failed.")

    @property
    def key(self) -> str:
        """What it is a step of, the same in every run."""
        return f"{self.tool}/{self.resource_id}"

    @classmethod
    def of_job(cls, kind: Kind, job: JobResult) -> Step:
        """The step that a job's result stands for."""
        fields = job.model_dump(
            include={
                "resource_id",
                "name",
                "owner",
                "rows",
                "bytes",
                "duration",
                "job_id",
                "url",
                "message",
                "tolerated",
            }
        )
        return cls(kind=kind, tool=job.vendor, state=StepState(job.state.value), **fields)

    @classmethod
    def held(cls, kind: Kind, request: Request, why: str, because: Sequence[str] = ()) -> Step:
        """The step of a request that was not started.

        Args:
            kind: Where in the chain it is.
            request: What was asked for.
            why: Why not, in words.
            because: Keys of the steps and nodes that it waits for; none: of all that failed.
        """
        return cls(
            kind=kind,
            tool=request.tool,
            resource_id=request.resource_id,
            name=request.label,
            owner=request.owner,
            state=StepState.HELD,
            message=why,
            because=list(because),
        )

    @property
    def good(self) -> bool:
        """Whether it did what was asked for."""
        return self.state is StepState.SUCCEEDED or (self.state is StepState.PARTIAL and self.tolerated)

    @property
    def failed(self) -> bool:
        """Whether it went wrong of itself, and was not just held back for another's sake."""
        return not self.good and self.state is not StepState.HELD

    @property
    def line(self) -> str:
        """The step in one line."""
        parts = [
            f"{self.rows:,} rows" if self.rows is not None else "",
            f"{self.duration:.1f} s" if self.duration is not None else "",
            # What a vendor says of a job that went well is no news; a dbt build's summary is.
            (self.message or "") if not self.good or self.tolerated or self.kind in _TELLING else "",
        ]
        return f"{_MARKS[self.state]} {self.name}: " + ", ".join(
            [self.state.value.lower(), *(part for part in parts if part)]
        )


def node_key(unique_id: str) -> str:
    """The key of a dbt node, beside those of steps."""
    return f"dbt/{unique_id}"


class Report(BaseModel):
    """What every run's report has.

    Attributes:
        flow_run_id: The run; empty outside of Prefect.
        flow_run_name: Its name.
        flow_run_url: Its page in the Prefect UI.
        started_at: When it began.
        duration: Seconds until the report was written.
        ending: The name of the run's final state.
        message: The ending in one sentence.
        steps: Every step with its outcome.
    """

    flow_run_id: str = ""
    flow_run_name: str = ""
    flow_run_url: str | None = None
    started_at: datetime | None = None
    duration: float = 0.0
    ending: Ending = "Completed"
    message: str = ""
    steps: list[Step] = []

    @property
    def complete(self) -> bool:
        """Whether everything that was asked for was done."""
        return self.ending == "Completed"

    @property
    def failed(self) -> list[Step]:
        """Steps that went wrong of themselves."""
        return [step for step in self.steps if step.failed]

    @property
    def held(self) -> list[Step]:
        """Steps that were not started because what they need did not arrive."""
        return [step for step in self.steps if step.state is StepState.HELD]

    def sentence(self) -> str:
        """How it went, in one sentence."""
        done = sum(step.good for step in self.steps)
        parts = [f"{done} of {len(self.steps)} steps done"]
        if self.failed:
            parts.append("failed: " + ", ".join(step.name for step in self.failed))
        if self.held:
            parts.append("held back: " + ", ".join(step.name for step in self.held))
        return "; ".join(parts)


class SyncReport(Report):
    """What `sync_connections` did.

    Attributes:
        outcomes: One result per connection, in the order of the parameters.
    """

    outcomes: list[JobResult] = []

    def markdown(self) -> str:
        """The report for the UI."""
        return f"# {_title(self)}\n\n{_table(self.steps)}"


class Edge(BaseModel):
    """A line of the lineage picture."""

    model_config = ConfigDict(frozen=True)

    source: str
    target: str


class EltReport(Report):
    """What `elt_chain` did.

    Attributes:
        nodes: Every dbt node that ran, with its state.
        held_nodes: Names of the dbt nodes that were not built, with the reason.
        passed: Keys of what passed a gate: an incident that is open for one of them is over.
        boxes: The picture's boxes, from connections to activations: id to label and class.
        edges: Its lines.
    """

    nodes: list[DbtNode] = []
    held_nodes: dict[str, str] = {}
    passed: list[str] = []
    boxes: dict[str, tuple[str, str]] = {}
    edges: list[Edge] = []

    def of(self, kind: Kind) -> list[Step]:
        """The steps of a kind."""
        return [step for step in self.steps if step.kind == kind]

    def markdown(self) -> str:
        """The report for the UI: first the table, which every interface shows, then the picture."""
        parts = [f"# {_title(self)}", _table(self.steps)]
        if held := [step for step in self.steps if step.state is StepState.HELD]:
            parts += ["## Held back", "\n".join(f"- **{step.name}**: {step.message}" for step in held)]
        if self.held_nodes:
            parts.append(_held_nodes(self.held_nodes))
        if bad := [node for node in self.nodes if node.state in ("fail", "error", "warn")]:
            parts += ["## dbt nodes with something to say", _nodes(bad)]
        if self.edges:
            parts += ["## From connection to activation", f"```\n{self.tree()}\n```", self.mermaid()]
        return "\n\n".join(parts) + "\n"

    def mermaid(self) -> str:
        """The lineage as a picture; interfaces that can't draw it show its text."""
        lines = ["```mermaid", "flowchart LR"]
        lines += [f'  {id_}["{label}"]:::{kind}' for id_, (label, kind) in self.boxes.items()]
        lines += [f"  {edge.source} --> {edge.target}" for edge in self.edges]
        lines += [
            "  classDef ok fill:#d7f5dd,stroke:#2f9e44,color:#123",
            "  classDef warn fill:#fff3bf,stroke:#f08c00,color:#321",
            "  classDef failed fill:#ffe3e3,stroke:#e03131,color:#411",
            "  classDef held fill:#f1f3f5,stroke:#868e96,color:#333,stroke-dasharray: 4 3",
            "```",
        ]
        return "\n".join(lines)

    def tree(self) -> str:
        """The lineage as text, from each end back to the connections."""
        above: dict[str, list[str]] = {}
        for edge in self.edges:
            above.setdefault(edge.target, []).append(edge.source)
        ends = [id_ for id_ in self.boxes if id_ in above and not any(e.source == id_ for e in self.edges)]
        lines: list[str] = []
        for end in ends:
            roots = sorted(_roots(end, above))
            lines.append(_plain(self.boxes[end]))
            lines += [
                f"{'└' if i == len(roots) - 1 else '├'}─ {_plain(self.boxes[root])}"
                for i, root in enumerate(roots)
            ]
        return "\n".join(lines)


def _roots(end: str, above: dict[str, list[str]]) -> set[str]:
    seen: set[str] = set()
    stack = [end]
    while stack:
        box = stack.pop()
        if box not in seen:
            seen.add(box)
            stack += above.get(box, [])
    return {box for box in seen if box not in above}


_KIND_MARKS = {"ok": "✓", "warn": "◐", "failed": "✗", "held": "○"}


def _plain(box: tuple[str, str]) -> str:
    return f"{_KIND_MARKS[box[1]]} {box[0]}"


def _title(report: Report) -> str:
    name = f" — {report.flow_run_name}" if report.flow_run_name else ""
    return f"{report.ending}{name}"


def cell(text: Any) -> str:
    """Text as it may stand in a table."""
    return " ".join(str(text).split()).replace("|", "\\|")[:300]


def _table(steps: Iterable[Step]) -> str:
    lines = ["| | step | state | rows | seconds | owner | |", "|---|---|---|---:|---:|---|---|"]
    for step in steps:
        job = f"[{step.tool} {step.job_id}]({step.url})" if step.url else step.tool
        rows = f"{step.rows:,}" if step.rows is not None else ""
        seconds = f"{step.duration:.1f}" if step.duration is not None else ""
        message = f"<br>{cell(step.message)}" if step.message else ""
        lines.append(
            f"| {_MARKS[step.state]} | {cell(step.name)} | {step.state.value}{message} | {rows} | {seconds} "
            f"| {cell(step.owner or '')} | {job} |"
        )
    return "\n".join(lines)


def _nodes(nodes: Iterable[DbtNode]) -> str:
    lines = ["| node | state | message |", "|---|---|---|"]
    lines += [f"| {cell(node.label)} | {node.state.value} | {cell(node.message or '')} |" for node in nodes]
    return "\n".join(lines)


def _held_nodes(held: dict[str, str]) -> str:
    by_reason: dict[str, list[str]] = {}
    for name, reason in held.items():
        by_reason.setdefault(reason, []).append(name)
    lines = ["## dbt nodes that were not built", ""]
    for reason, names in by_reason.items():
        lines.append(f"- {reason}: " + ", ".join(f"`{name}`" for name in sorted(names)))
    return "\n".join(lines)
