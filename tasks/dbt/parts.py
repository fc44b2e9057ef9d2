"""Which part of a selection a backfill builds once, and which for every interval."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tasks.dbt.choice import is_incremental, words
from tasks.dbt.lineage import Lineage, LineageNode, listed
from tasks.dbt.model import DbtCore, DbtInputError, DbtPlan

_TESTS = frozenset({"test", "unit_test"})
IN_A_FILE = frozenset({"duckdb", "sqlite"})
"""Adapters of a warehouse that one process may have open at a time."""


@dataclass(frozen=True)
class Parts:
    """The nodes of a plan, by when a backfill builds them.

    Attributes:
        lineage: The project.
        above: Before the first interval: what the incremental models are built on, and what has nothing to do
            with them.
        each: For every interval: the incremental models.
        between: What lies between two of them. For the first interval; for every one, what is no view.
        below: After the last interval: what is built on the incremental models, and the tests of these.
    """

    lineage: Lineage
    above: frozenset[str]
    each: frozenset[str]
    between: frozenset[str]
    below: frozenset[str]

    @classmethod
    def of(cls, plan: DbtPlan) -> Parts:
        """Part the nodes that a plan selects.

        Raises:
            DbtInputError: No incremental model is among them.
        """
        lineage, selected = plan.lineage, set(plan.selected)
        each = {id_ for id_ in selected if is_incremental(lineage.nodes[id_])}
        if not each:
            there = sorted(node.name for node in lineage.nodes.values() if is_incremental(node))
            raise DbtInputError(
                "There is nothing to backfill in the selection: no incremental model is in it."
                f" The project has: {', '.join(there) or 'none'}."
            )
        below = lineage.downstream(each) & selected - each
        between = {
            id_
            for id_ in below & lineage.upstream(each)
            if lineage.nodes[id_].resource_type not in _TESTS
            and lineage.nodes[id_].materialized != "ephemeral"
        }
        return cls(
            lineage,
            above=frozenset(selected - each - below),
            each=frozenset(each),
            between=frozenset(between),
            below=frozenset(below - between),
        )

    def nodes(self, ids: Iterable[str], *, tests: bool = True) -> list[LineageNode]:
        """Nodes by their ids, with the tests among them or without."""
        found = [self.lineage.nodes[id_] for id_ in sorted(ids)]
        return [node for node in found if tests or node.resource_type not in _TESTS]

    @property
    def tables_between(self) -> frozenset[str]:
        """What lies between and has to be built for every interval."""
        return frozenset(id_ for id_ in self.between if self.lineage.nodes[id_].materialized != "view")

    def at_once(self, asked: int, adapter: str) -> tuple[int, str | None]:
        """How many intervals may be built at a time, and why not as many as asked for."""
        if asked > 1 and adapter in IN_A_FILE:
            return 1, f"{adapter} lets one process write at a time"
        if asked > 1 and self.tables_between:
            names = listed(sorted(self.lineage.name_of(id_) for id_ in self.tables_between))
            return 1, f"{names}, between incremental models, can't be built by two at a time"
        return asked, None

    def selecting(self, dbt: DbtCore, ids: Iterable[str], *, tests: bool) -> tuple[DbtCore, list[str]]:
        """The build of some of the nodes, and what it must leave out.

        Args:
            dbt: The project.
            ids: Of nodes.
            tests: Whether the tests among them are to be run; else none is.
        """
        chosen = set(ids)
        only = dbt.model_copy(
            update={
                "select": words(self.lineage, self.nodes(chosen)),
                "exclude": [],
                "selector": None,
                "command": "build",
            }
        )
        if not tests:
            return only, [f"resource_type:{kind}" for kind in sorted(_TESTS)]
        # dbt runs every test of a node that is selected, those too that read what is not built yet.
        others = {child for id_ in chosen for child in self.lineage.children(id_)} - chosen
        left_out = [self.lineage.nodes[id_] for id_ in sorted(others)]
        return only, words(self.lineage, [node for node in left_out if node.resource_type in _TESTS])


def parsed_alike(one: Path, other: Path) -> bool:
    """Whether two folders of dbt's hold the same project, whatever variables each was parsed with.

    A variable in a model's SQL is read when the model runs. One in a config (`incremental_predicates`, say)
    is read when the project is parsed, which then can't be done once for all intervals.

    Args:
        one: Folder that holds a manifest.json.
        other: The same.
    """
    return _parsed(one) == _parsed(other)


def _parsed(folder: Path) -> dict[str, Any]:
    manifest = json.loads((folder / "manifest.json").read_bytes())
    sections = ("nodes", "sources", "exposures", "unit_tests", "disabled", "macros", "snapshots")
    return {section: _without_times(manifest.get(section)) for section in sections}


def _without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_times(item) for key, item in value.items() if key != "created_at"}
    return [_without_times(item) for item in value] if isinstance(value, list) else value
