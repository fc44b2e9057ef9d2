"""Failure follows lineage: what may be built and activated when some connections did not land."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from flows.report import Step, node_key
from tasks.dbt.lineage import TESTS, Lineage, LineageNode, listed
from tasks.dbt.model import DbtNode, DbtPlan, DbtState
from tasks.gates import SOURCE, Finding
from tasks.jobs import Checked, JobResult, JobState, Parameters
from tasks.tools import TOOLS

_BUILT = frozenset({"model", "seed", "snapshot"})


@dataclass
class Gate:
    """Decides by the dbt project's lineage; where that says nothing, what is in doubt is held back.

    Args:
        plan: What dbt would run, with the lineage; None for a chain without a transform.
        checked: The connections of the run.
        outcomes: How their syncs ended, in the same order.
    """

    plan: DbtPlan | None
    checked: Sequence[Checked[Any]]
    outcomes: Sequence[JobResult]
    findings: Sequence[Finding] = field(default=(), init=False)
    failed_nodes: list[str] = field(default_factory=list)
    skipped_nodes: list[str] = field(default_factory=list)
    untested: list[str] = field(default_factory=list)
    transform_trouble: str | None = None
    transform_key: str | None = None

    def __post_init__(self) -> None:
        self._sources: dict[tuple[str, str], set[str]] = {}
        for found in self.checked:
            request = found.request
            self._sources[request.tool, request.resource_id] = (
                self.plan.lineage.sources_of(
                    request.resource_id,
                    key=TOOLS[request.tool].meta,
                    namespace=found.namespace,
                    prefix=found.prefix,
                    streams=found.streams,
                )
                if self.plan
                else set()
            )
        self.late = [job for job in self.outcomes if not job.good]

    def stay_shut(self, findings: Sequence[Finding]) -> None:
        """Hold back, too, what is built on connections and dbt sources that something was found about."""
        self.findings = findings
        shut = {(finding.vendor, finding.resource_id) for finding in findings}
        self.late = [job for job in self.outcomes if not job.good or (job.vendor, job.resource_id) in shut]
        for finding in findings:
            if finding.vendor == SOURCE:
                self._sources[SOURCE, finding.resource_id] = {finding.resource_id}
                self.late.append(_stale(finding))

    @property
    def late_sources(self) -> set[str]:
        """The dbt sources whose data is late, or is not what it should be."""
        return set().union(*map(self.sources_of, self.late))

    def sources_of(self, job: JobResult | Step) -> set[str]:
        """The dbt sources that a sync fills."""
        vendor = job.vendor if isinstance(job, JobResult) else job.tool
        return self._sources[vendor, job.resource_id]

    def sources_filled_by(self, names: Collection[str]) -> set[str]:
        """The dbt sources that connections fill, of which the ids or names are given."""
        found = [r for r in (c.request for c in self.checked) if {r.resource_id, r.label} & set(names)]
        return set().union(*(self._sources[r.tool, r.resource_id] for r in found))

    @property
    def exclude(self) -> list[str]:
        """What dbt must leave out, in its selection syntax."""
        return self.plan.lineage.exclude_selectors(self.late_sources) if self.plan else []

    def held_nodes(self) -> dict[str, str]:
        """Models, seeds and snapshots that are not built because of late data, with the reason."""
        if self.plan is None:
            return {}
        lineage = self.plan.lineage
        held: dict[str, str] = {}
        for job in self.late:
            below = lineage.downstream(self.sources_of(job))
            for node in below.intersection(self.plan.selected):
                if lineage.nodes[node].resource_type in _BUILT:
                    held.setdefault(lineage.name_of(node), self._said([job]))
        return held

    def why_not_transform(self) -> str | None:
        """Why dbt can't run at all; None if it can."""
        if self.plan is None or not self.late:
            return None
        if blind := [job for job in self.late if not self.sources_of(job)]:
            them = "it" if len(blind) == 1 else "them"
            keys = " or ".join(sorted({f"meta.{TOOLS[job.vendor].meta}" for job in blind}))
            return (
                f"{self._said(blind)}, and no dbt source names {them} "
                f"({keys}) or has its schema and table, so everything may be built on it"
            )
        left = set(self.plan.selected) - self.plan.lineage.downstream(self.late_sources)
        if not left:
            return f"{self._said(self.late)}, and all that is selected is built on it"
        return None

    @property
    def _what(self) -> str:
        parts = ["did not land"] if any(not job.good for job in self.late) else []
        parts += ["did not pass the gate"] if any(job.good for job in self.late) else []
        return " or ".join(parts)

    def _said(self, late: Sequence[JobResult]) -> str:
        """`orders did not land`, or that it landed and a gate stays shut for it."""
        missing = [job.name for job in late if not job.good]
        doubtful = [job.name for job in late if job.good]
        parts = [f"{listed(missing)} did not land"] if missing else []
        parts += [f"{listed(doubtful)} did not pass the gate"] if doubtful else []
        return " and ".join(parts)

    def built(self, nodes: Sequence[DbtNode]) -> None:
        """Take in how the transform ended, node by node."""
        self.failed_nodes = [n.unique_id for n in nodes if n.state in (DbtState.FAIL, DbtState.ERROR)]
        skipped = {n.unique_id: n.resource_type for n in nodes if n.state is DbtState.SKIPPED}
        self.skipped_nodes = [unique_id for unique_id, kind in skipped.items() if kind in _BUILT]
        # A test that was skipped though all that it reads was built: dbt stopped before it came to it (with
        # `fail_fast`; dbt Cloud between two commands), and nothing speaks for what it tests. All above it
        # counts: of an ephemeral model between there is no result.
        lineage = self.plan.lineage if self.plan else Lineage({})
        bad = {*skipped, *self.failed_nodes}
        self.untested = [
            unique_id
            for unique_id, kind in skipped.items()
            if kind in TESTS and not bad.intersection(lineage.upstream([unique_id]))
        ]

    @property
    def tainted(self) -> set[str]:
        """The dbt nodes that must not be trusted after the transform."""
        if self.plan is None:
            return set()
        return self.plan.lineage.tainted([*self.failed_nodes, *self.untested], self.skipped_nodes)

    def exposures_of(self, activation: Parameters) -> list[LineageNode]:
        """The dbt exposures that stand for an activation."""
        if self.plan is None:
            return []
        key = TOOLS[activation.tool].meta
        return self.plan.lineage.exposures_for(key=key, value=activation.resource_id)

    def why_not_activate(self, activation: Parameters) -> str | None:
        """Why an activation is held back; None if all that it is built on is fresh."""
        late = self._said(self.late) if self.late else None
        if self.plan is None:
            return late
        if self.transform_trouble:
            return self.transform_trouble
        lineage = self.plan.lineage
        if exposures := self.exposures_of(activation):
            tainted = self.tainted
            reasons = (
                lineage.why_held(exposure, self.late_sources, tainted, what=self._what)
                for exposure in exposures
            )
            return next((why for why in reasons if why), None)
        trouble = late or ("the transform did not succeed" if self.failed_nodes else None)
        if trouble:
            key = TOOLS[activation.tool].meta
            return f"{trouble}, and no dbt exposure says what this is built on (meta.{key})"
        return None

    def causes_of(self, activation: Parameters | None = None) -> list[str]:
        """Keys of the steps and nodes for which an activation, or the transform, is held back."""
        late, failed = self.late, self.failed_nodes
        exposures = self.exposures_of(activation) if activation else []
        if self.plan and exposures and not self.transform_trouble:
            lineage = self.plan.lineage
            above = lineage.upstream([exposure.unique_id for exposure in exposures])
            late = [job for job in late if above & self.sources_of(job)]
            failed = [node for node in failed if above & lineage.tainted([node])]
        waits_for = {(job.vendor, job.resource_id) for job in late}
        keys = [f"{job.vendor}/{job.resource_id}" for job in late if not job.good]
        keys += [found.key for found in self.findings if (found.vendor, found.resource_id) in waits_for]
        return [*keys, *map(node_key, failed), *([self.transform_key] if self.transform_key else [])]


def _stale(finding: Finding) -> JobResult:
    """A source as if a sync of its own had filled it, which went well for all that anybody knows."""
    return JobResult(
        vendor=SOURCE, resource_id=finding.resource_id, name=finding.name, state=JobState.SUCCEEDED
    )
