"""Who feeds whom in a dbt project: from an ingestion connection to the activation at the far end.

Pure: a manifest in (as `target/manifest.json` holds it, schema v12, dbt 1.9 to 1.11), answers out. The links
to the outside world come from where dbt users already write them down: `meta` of sources and exposures, and
the schema and table of a source.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

TESTS = frozenset({"test", "unit_test"})
"""Kinds of nodes that test others."""

_SECTIONS = (
    "nodes",
    "sources",
    "exposures",
    "unit_tests",
    "metrics",
    "semantic_models",
    "saved_queries",
    "functions",
)


@dataclass(frozen=True, slots=True)
class LineageNode:
    """One node of the graph, of any kind."""

    unique_id: str
    name: str
    resource_type: str
    parents: tuple[str, ...] = ()
    owner: str | None = None
    group: str | None = None
    meta: dict[str, Any] = field(default_factory=dict)
    tags: tuple[str, ...] = ()
    # Of what is built
    materialized: str = ""
    full_refresh: bool | None = None  # the model's own say, which dbt puts above --full-refresh
    fqn: tuple[str, ...] = ()
    relation: str = ""  # as the warehouse calls it: `"flights"."marts"."fct_flights"`
    compiled: str = ""  # where dbt puts its SQL, seen from target/compiled
    # Of a source
    source_name: str = ""
    schema: str = ""
    identifier: str = ""
    watched: bool = False  # it has a freshness threshold
    # Of a test: the node that it is written on
    attached: str | None = None
    # Of an exposure
    exposure_type: str = ""
    url: str | None = None
    label: str | None = None

    @property
    def filler_named(self) -> bool:
        """Whether a source says itself who fills it."""
        return any(name.endswith("_connection_id") or name == "http_job" for name in self.meta)


@dataclass(frozen=True)
class Lineage:
    """A dbt project as a graph.

    Attributes:
        nodes: Every node by its unique id: models, tests, seeds, snapshots, sources, exposures and the rest.
    """

    nodes: dict[str, LineageNode]
    _children: dict[str, list[str]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        children: dict[str, list[str]] = {}
        for node in self.nodes.values():
            for parent in node.parents:
                children.setdefault(parent, []).append(node.unique_id)
        object.__setattr__(self, "_children", children)

    @classmethod
    def from_manifest(cls, manifest: Mapping[str, Any]) -> Lineage:
        """Reads the graph out of a parsed `manifest.json`."""
        owners = {
            str(group.get("name")): _owner_name(group.get("owner"))
            for group in (manifest.get("groups") or {}).values()
        }
        nodes: dict[str, LineageNode] = {}
        for section in _SECTIONS:
            for unique_id, raw in (manifest.get(section) or {}).items():
                nodes[unique_id] = _node(unique_id, raw, owners)
        return cls(nodes)

    @property
    def sources(self) -> list[LineageNode]:
        """Tables that something outside dbt fills."""
        return [node for node in self.nodes.values() if node.resource_type == "source"]

    @property
    def exposures(self) -> list[LineageNode]:
        """What hangs below the project: dashboards, activations."""
        return [node for node in self.nodes.values() if node.resource_type == "exposure"]

    def name_of(self, unique_id: str) -> str:
        """The name that people use for a node."""
        node = self.nodes.get(unique_id)
        return node.name if node else unique_id.rsplit(".", 1)[-1]

    def parents(self, unique_id: str) -> tuple[str, ...]:
        """What a node reads from directly."""
        node = self.nodes.get(unique_id)
        return node.parents if node else ()

    def children(self, unique_id: str) -> tuple[str, ...]:
        """What reads from a node directly, its tests included."""
        return tuple(self._children.get(unique_id, ()))

    def downstream(self, ids: Iterable[str]) -> set[str]:
        """Everything that is built, directly or not, on any of these nodes; they are not in it themselves."""
        return self._walk(ids, self._children)

    def upstream(self, ids: Iterable[str]) -> set[str]:
        """Everything that these nodes are, directly or not, built on (they are not in it themselves)."""
        start = set(ids)
        found: set[str] = set()
        stack = list(start)
        while stack:
            for parent in self.parents(stack.pop()):
                if parent not in found:
                    found.add(parent)
                    stack.append(parent)
        return found - start

    def _walk(self, ids: Iterable[str], edges: Mapping[str, list[str]]) -> set[str]:
        start = set(ids)
        found: set[str] = set()
        stack = list(start)
        while stack:
            for other in edges.get(stack.pop(), ()):
                if other not in found:
                    found.add(other)
                    stack.append(other)
        return found - start

    def sources_of(
        self,
        connection_id: str | None = None,
        *,
        key: str = "airbyte_connection_id",
        namespace: str | None = None,
        prefix: str = "",
        streams: Iterable[str] = (),
    ) -> set[str]:
        """The sources that a connection fills.

        What the project says itself, in the `meta` of a source, counts first; only a connection that no
        source names is matched by schema and table. A source that names another connection is never matched
        by table.

        Args:
            connection_id: The vendor's id of the connection.
            key: The `meta` key that holds such ids; its value may be one id or a list.
            namespace: Schema that the connection writes to.
            prefix: What the connection puts before each stream's name to make the table's.
            streams: Names of the streams; empty: every table of the schema that has the prefix.
        """
        if connection_id is not None:
            wanted = str(connection_id).casefold()
            named = {s.unique_id for s in self.sources if wanted in _texts(s.meta.get(key))}
            if named:
                return named
        if namespace is None:
            return set()
        schema, start = namespace.casefold(), prefix.casefold()
        tables = {start + stream.casefold() for stream in streams}
        return {
            source.unique_id
            for source in self.sources
            if not source.filler_named
            and source.schema.casefold() == schema
            and (
                source.identifier.casefold() in tables
                if tables
                else source.identifier.casefold().startswith(start)
            )
        }

    def exposures_for(self, *, key: str, value: str | int) -> list[LineageNode]:
        """The exposures whose `meta` has this value under this key, such as `hightouch_sync_id: 101`.

        One activation may stand behind several: a sequence of syncs behind one for each of them.
        """
        wanted = str(value).casefold()
        return [node for node in self.exposures if wanted in _texts(node.meta.get(key))]

    def tainted(self, failed: Iterable[str], skipped: Iterable[str] = ()) -> set[str]:
        """The nodes that must not be trusted after a run.

        A failed or skipped node is, and so is everything downstream of it. A failed test casts its doubt on
        the node that it tests; a skipped test says nothing about it (it may have been skipped for its other
        parent's sake).

        Args:
            failed: Unique ids of nodes that failed.
            skipped: Unique ids of nodes that dbt did not run.
        """
        bad: set[str] = set()
        for unique_id in failed:
            bad.add(unique_id)
            bad.update(self.tested_by(unique_id))
        for unique_id in skipped:
            bad.add(unique_id)
        return bad | self.downstream(bad)

    def tested_by(self, unique_id: str) -> tuple[str, ...]:
        """The nodes that a test is about; empty for anything that is not a test."""
        node = self.nodes.get(unique_id)
        if node is None or node.resource_type not in TESTS:
            return ()
        if node.attached:
            return (node.attached,)
        # The first dependency of a unit test is the model under test, the others only lend their columns.
        return node.parents[:1] if node.resource_type == "unit_test" else node.parents

    def why_held(
        self,
        exposure: LineageNode | str,
        held: Iterable[str],
        tainted: Iterable[str],
        *,
        what: str = "did not land",
    ) -> str | None:
        """Why what hangs below the project must wait, in words; None if it need not.

        Args:
            exposure: The exposure, or its unique id.
            held: Unique ids of sources whose data did not land.
            tainted: Unique ids of nodes that must not be trusted, as `tainted` gives them.
            what: What is wrong with the sources.
        """
        unique_id = exposure if isinstance(exposure, str) else exposure.unique_id
        above = self.upstream([unique_id])
        direct = set(self.parents(unique_id))
        if missing := above & set(held):
            return self._because(missing, direct, what)
        bad = {i for i in above & set(tainted) if self.nodes[i].resource_type not in TESTS}
        roots = {i for i in bad if not bad.intersection(self.parents(i))}
        return self._because(roots, direct, "did not build cleanly") if roots else None

    def _because(self, causes: set[str], direct: set[str], what: str) -> str:
        names = listed(sorted({self.name_of(i) for i in causes}))
        below = self.downstream(causes)
        through = sorted({self.name_of(i) for i in direct & below if i not in causes})
        if not through:
            return f"{names} {what}"
        verb = "is" if len(through) == 1 else "are"
        return f"{names} {what}, and {listed(through)} {verb} built on {'it' if len(causes) == 1 else 'them'}"

    def exclude_selectors(self, source_ids: Iterable[str]) -> list[str]:
        """Words for --exclude that leave out all that is built on these sources: `source:raw.weather+`."""
        chosen = (self.nodes[i] for i in source_ids)
        return sorted({f"source:{source.source_name}.{source.name}+" for source in chosen})


def _node(unique_id: str, raw: Mapping[str, Any], owners: Mapping[str, str | None]) -> LineageNode:
    config = raw.get("config") or {}
    # dbt moves `meta` under `config`; manifests of different versions have it in one place, the other, or
    # both.
    meta = {**(raw.get("meta") or {}), **(config.get("meta") or {})}
    group = raw.get("group") or config.get("group")
    own = raw.get("owner")
    owner = _owner_name(own) if own else owners.get(str(group)) if group else None
    kind = str(raw.get("resource_type") or unique_id.split(".", 1)[0])
    depends_on = raw.get("depends_on") or {}
    return LineageNode(
        unique_id=unique_id,
        name=str(raw.get("name") or unique_id),
        resource_type=kind,
        parents=tuple(dict.fromkeys(depends_on.get("nodes") or ())),
        owner=owner or (str(meta["owner"]) if meta.get("owner") else None),
        group=str(group) if group else None,
        meta=meta,
        tags=tuple(raw.get("tags") or config.get("tags") or ()),
        materialized=str(config.get("materialized") or ""),
        full_refresh=config.get("full_refresh"),
        fqn=tuple(raw.get("fqn") or ()),
        relation=str(raw.get("relation_name") or ""),
        compiled=_compiled(kind, raw),
        source_name=str(raw.get("source_name") or ""),
        schema=str(raw.get("schema") or ""),
        identifier=str(raw.get("identifier") or raw.get("alias") or ""),
        watched=kind == "source" and _has_threshold(raw.get("freshness", config.get("freshness"))),
        attached=raw.get("attached_node"),
        exposure_type=str(raw.get("type") or "") if kind == "exposure" else "",
        url=raw.get("url"),
        label=raw.get("label"),
    )


def _has_threshold(freshness: Any) -> bool:
    times = (freshness or {}).get("warn_after"), (freshness or {}).get("error_after")
    return any(time and time.get("count") is not None and time.get("period") for time in times)


def _compiled(kind: str, raw: Mapping[str, Any]) -> str:
    """By dbt's own rule, as it writes a node's path into the manifest only after the node has run."""
    if kind not in {"model", "test", "snapshot"}:
        return ""
    path, file = PurePath(raw.get("path") or ""), PurePath(raw.get("original_file_path") or "")
    # Several nodes of one file (the tests of a schema.yml) lie in a folder that is called like it.
    return str(PurePath(raw.get("package_name") or "") / (file if path.name == file.name else file / path))


def _owner_name(owner: Any) -> str | None:
    if not isinstance(owner, Mapping):
        return None
    found = owner.get("name") or owner.get("email")
    if isinstance(found, list):
        found = found[0] if found else None
    return str(found) if found else None


def _texts(value: Any) -> set[str]:
    if value is None:
        return set()
    many = value if isinstance(value, (list, tuple, set)) else [value]
    return {str(item).casefold() for item in many}


def listed(names: Sequence[str]) -> str:
    """Names as a sentence has them: `a, b and c`."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
