"""Models that a person names, looked up before dbt starts, and written as dbt selects them."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Sequence

from tasks.dbt.lineage import TESTS, Lineage, LineageNode, listed
from tasks.dbt.model import DbtInputError

_BUILT = frozenset({"model", "seed", "snapshot"})
_SHOWN = 20


def with_all_below(lineage: Lineage, names: Sequence[str]) -> list[str]:
    """The words that select these nodes and everything downstream of them.

    Args:
        lineage: The project.
        names: Names of models, seeds and snapshots, of sources as `source.table`, or unique ids. A version
            of a model is `name.v2`.

    Raises:
        DbtInputError: One of them is not in the project, with what is.
    """
    found = [_one(lineage, name, lambda node: node.resource_type in {*_BUILT, "source"}) for name in names]
    return [f"{_word(lineage, node)}+" for node in found]


def incremental_models(lineage: Lineage, names: Sequence[str]) -> list[LineageNode]:
    """The incremental models of these names.

    Raises:
        DbtInputError: One of them is not in the project, is not incremental, or its own `full_refresh: false`
            forbids what is asked for, which dbt would pass over in silence.
    """
    there = [node for node in lineage.nodes.values() if is_incremental(node)]
    has = f"incremental models of the project: {_some([_name(node) for node in there])}"
    chosen: list[LineageNode] = []
    for name in names:
        node = _one(lineage, name, lambda node: node.resource_type == "model", fitting=there)
        if not is_incremental(node):
            raise DbtInputError(
                f"{node.name!r} is not incremental but a {node.materialized or 'model'}, which every build"
                f" makes anew; {has}."
            )
        if node.full_refresh is False:
            raise DbtInputError(
                f"{node.name!r} has `full_refresh: false` in its config, with which dbt does not rebuild it:"
                " take that out first if it is meant to be rebuilt."
            )
        chosen.append(node)
    return chosen


def words(lineage: Lineage, nodes: Sequence[LineageNode]) -> list[str]:
    """The words that select exactly these nodes."""
    return [_word(lineage, node) for node in nodes]


def below_of(lineage: Lineage, ids: Collection[str]) -> tuple[list[str], list[str]]:
    """What is built downstream of these nodes, and the tests that read it and one of these nodes.

    Args:
        lineage: The project.
        ids: Unique ids of nodes.

    Returns:
        The words that select exactly these models, seeds and snapshots, and those for the tests.
    """
    below = {id_ for id_ in lineage.downstream(ids) if lineage.nodes[id_].resource_type in _BUILT}
    both = {
        child
        for id_ in ids
        for child in lineage.children(id_)
        if lineage.nodes[child].resource_type in TESTS and below.intersection(lineage.parents(child))
    }
    built, tests = ([lineage.nodes[id_] for id_ in sorted(found)] for found in (below, both))
    return words(lineage, built), words(lineage, tests)


def is_incremental(node: LineageNode) -> bool:
    """Whether it is an incremental model, a microbatch one too."""
    return node.resource_type == "model" and node.materialized == "incremental"


def _name(node: LineageNode) -> str:
    if node.resource_type == "source":
        return f"{node.source_name}.{node.name}"
    # A model with versions: their fqn ends in the version, the name does not have it.
    versioned = len(node.fqn) > 1 and node.fqn[-1] != node.name and node.fqn[-2] == node.name
    return f"{node.name}.{node.fqn[-1]}" if versioned else node.name


def _word(lineage: Lineage, node: LineageNode) -> str:
    if node.resource_type == "source":
        return f"source:{node.source_name}.{node.name}"
    # A plain name selects folders and other packages' models of that name as well.
    same = sum(node.name in other.fqn for other in lineage.nodes.values() if other.resource_type in _BUILT)
    return f"fqn:{'.'.join(node.fqn)}" if same > 1 and node.fqn else node.name


def _one(
    lineage: Lineage,
    name: str,
    wanted: Callable[[LineageNode], bool],
    *,
    fitting: Sequence[LineageNode] = (),
) -> LineageNode:
    nodes = [node for node in lineage.nodes.values() if wanted(node)]
    asked = name.strip().removeprefix("source:")
    found = [node for node in nodes if asked in {_name(node), node.unique_id}]
    found = found or [node for node in nodes if asked == node.name]
    if len(found) == 1:
        return found[0]
    if found:
        names = sorted({_name(node) for node in found})
        if len(names) == len(found):
            raise DbtInputError(f"{name!r} can be {' or '.join(names)}: say which.")
        raise DbtInputError(
            f"{name!r} is {listed(sorted(node.unique_id for node in found))}: say which, by its unique id."
        )
    there = sorted({_name(node) for node in (fitting or nodes)})
    close = difflib.get_close_matches(asked, there, n=3, cutoff=0.5)
    meant = f" Do you mean {' or '.join(close)}?" if close else ""
    raise DbtInputError(f"There is no {name!r} in the dbt project.{meant} There are: {_some(there)}.")


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(sorted(names)[:_SHOWN]) or "none"
    return shown + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
