"""Failure follows lineage: what may be built and activated when some connections did not land."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from tasks.airbyte import Checked
from tasks.dbt.lineage import listed
from tasks.dbt_core import DbtNode, DbtPlan, DbtState
from tasks.hightouch import HightouchSync
from tasks.jobs import JobResult

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
    checked: Sequence[Checked]
    outcomes: Sequence[JobResult]
    failed_nodes: list[str] = field(default_factory=list)
    skipped_nodes: list[str] = field(default_factory=list)
    transform_trouble: str | None = None

    def __post_init__(self) -> None:
        self.sources: dict[str, set[str]] = {}
        for found in self.checked:
            self.sources[found.sync.connection_id] = (
                self.plan.lineage.sources_of(
                    found.sync.connection_id,
                    key="airbyte_connection_id",
                    namespace=found.namespace,
                    prefix=found.prefix,
                    streams=found.streams,
                )
                if self.plan
                else set()
            )
        self.late = [job for job in self.outcomes if not job.good]
        self.late_sources: set[str] = set().union(*(self.sources[job.resource_id] for job in self.late))

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
            below = lineage.downstream(self.sources[job.resource_id])
            for node in below.intersection(self.plan.selected):
                if lineage.nodes[node].resource_type in _BUILT:
                    held.setdefault(lineage.name_of(node), f"{job.name} did not land")
        return held

    def why_not_transform(self) -> str | None:
        """Why dbt can't run at all; None if it can."""
        if self.plan is None:
            return None
        if blind := [job.name for job in self.late if not self.sources[job.resource_id]]:
            them = "it" if len(blind) == 1 else "them"
            return (
                f"{listed(blind)} did not land, and no dbt source names {them} "
                "(meta.airbyte_connection_id) or has its schema and table, so everything may be built on it"
            )
        left = set(self.plan.selected) - self.plan.lineage.downstream(self.late_sources)
        if not left:
            late = listed([job.name for job in self.late])
            return f"all that is selected is built on {late}, which did not land"
        return None

    def built(self, nodes: Sequence[DbtNode]) -> None:
        """Take in how the transform ended, node by node."""
        self.failed_nodes = [n.unique_id for n in nodes if n.state in (DbtState.FAIL, DbtState.ERROR)]
        self.skipped_nodes = [
            n.unique_id for n in nodes if n.state is DbtState.SKIPPED and n.resource_type in _BUILT
        ]

    def why_not_activate(self, sync: HightouchSync) -> str | None:
        """Why an activation is held back; None if all that it is built on is fresh."""
        late = f"{listed([job.name for job in self.late])} did not land" if self.late else None
        if self.plan is None:
            return late
        if self.transform_trouble:
            return self.transform_trouble
        lineage = self.plan.lineage
        exposure = lineage.exposure_for(key="hightouch_sync_id", value=sync.sync_id)
        if exposure is not None:
            tainted = lineage.tainted(self.failed_nodes, self.skipped_nodes)
            return lineage.why_held(exposure, self.late_sources, tainted)
        trouble = late or ("the transform did not succeed" if self.failed_nodes else None)
        if trouble:
            return f"{trouble}, and no dbt exposure says what this sync is built on (meta.hightouch_sync_id)"
        return None
