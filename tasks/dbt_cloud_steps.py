"""The dbt commands of a dbt Cloud job: what they run, and how they leave out what is late.

Pure: text and a manifest in, text and ids out.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import yaml

from tasks.dbt.lineage import Lineage
from tasks.dbt.model import COMMAND_TYPES, NEVER_RUN, DbtError, json_text
from tasks.intervals import DataInterval

RUNS_NODES = frozenset({"build", *COMMAND_TYPES})
_COMMANDS = RUNS_NODES | {
    *("clean", "clone", "compile", "debug", "deps", "docs", "freshness", "init", "list", "ls", "parse"),
    *("retry", "run-operation", "show", "source"),
}
_SELECT = frozenset({"--select", "-s", "--models", "-m", "--model"})
_FULL_REFRESH = frozenset({"--full-refresh", "-f"})
_ATOM = re.compile(r"(?P<at>@)?(?:(?P<up>\d*)\+)?(?P<what>[^+@][^+]*?)(?P<down>\+\d*)?")


def command_of(step: str) -> str | None:
    """The dbt command of a step, such as `build` or `docs`; None if it is none.

    Raises:
        DbtError: The step can't be read as a command line.
    """
    return next((word for word in _words(step)[1:] if word in _COMMANDS), None)


def leave_out(steps: Sequence[str], exclude: Sequence[str]) -> list[str]:
    """The steps with `--exclude` for everything that runs nodes; what a step excludes itself stays excluded.

    Args:
        steps: The job's commands.
        exclude: Words of dbt's selection syntax.

    Raises:
        DbtError: A step can't leave anything out: dbt ignores --exclude beside --selector, and retries what
            failed whatever it is told.
    """
    return [_leaving_out(step, exclude) if exclude else step for step in steps]


def add_vars(steps: Sequence[str], variables: Mapping[str, Any], interval: DataInterval | None) -> list[str]:
    """The steps with dbt variables, and an interval's event times, for everything that runs nodes.

    Args:
        steps: The job's commands; of the variables that they have themselves those of the same name go.
        variables: What to add to `--vars`.
        interval: Of a build or a run, also the event times of its microbatch models.

    Raises:
        DbtError: A step can't take variables: it retries what failed with those that it had, or its own
            `--vars` can't be read. Or it has `--full-refresh` and there is an interval.
    """
    added = {**variables, **(interval.vars if interval else {})}
    return [_with_vars(step, added, interval) if added else step for step in steps]


def _with_vars(step: str, added: Mapping[str, Any], interval: DataInterval | None) -> str:
    words, command = _words(step), command_of(step)
    if command == "retry":
        raise DbtError(
            f"The step `{step}` can't be given variables ({', '.join(added)}): dbt takes those of the run "
            "that it retries."
        )
    if command not in RUNS_NODES:
        return step
    if interval and command in ("build", "run") and not _FULL_REFRESH.isdisjoint(words):
        raise DbtError(
            f"The step `{step}` can't have a data interval: it would leave incremental models with nothing"
            " but that interval. Refresh them without an interval, or take --full-refresh out of the step."
        )
    own: dict[str, Any] = {}
    kept: list[str] = []
    rest = iter(words)
    for word in rest:
        if word == "--vars" or word.startswith("--vars="):
            text = next(rest, "") if word == "--vars" else word.removeprefix("--vars=")
            own |= _own_vars(step, text)
        else:
            kept.append(word)
    kept += ["--vars", json_text({**own, **added})]
    if interval and command in ("build", "run"):
        start, end = interval.utc
        kept += ["--event-time-start", f"{start:%Y-%m-%dT%H:%M:%S}"]
        kept += ["--event-time-end", f"{end:%Y-%m-%dT%H:%M:%S}"]
    return shlex.join(kept)


def _own_vars(step: str, text: str) -> dict[str, Any]:
    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError:
        found = None
    if not isinstance(found, dict):
        raise DbtError(f"The --vars of the step `{step}` can't be read, so nothing can be added to them.")
    return found


def has_selection(step: str) -> bool:
    """Whether a step says itself what it runs; what runs no nodes does."""
    return command_of(step) not in RUNS_NODES or bool(_values(_words(step), _SELECT))


def _leaving_out(step: str, exclude: Sequence[str]) -> str:
    words, command = _words(step), command_of(step)
    if command == "retry":
        raise DbtError(
            f"The step `{step}` can't leave out late data ({' '.join(exclude)}): dbt takes no selection."
        )
    if command not in RUNS_NODES:
        return step
    if any(word.split("=", 1)[0] == "--selector" for word in words):
        raise DbtError(
            f"The step `{step}` can't leave out late data ({' '.join(exclude)}): dbt ignores --exclude beside"
            " --selector. Give the job --select in its place, or this transform a `steps_override`."
        )
    # Right behind the words of an --exclude that is there already: a second one might replace the first.
    for place, word in enumerate(words):
        if word == "--exclude":
            return shlex.join([*words[: place + 1], *exclude, *words[place + 1 :]])
        if word.startswith("--exclude="):
            own = word.removeprefix("--exclude=")
            return shlex.join([*words[:place], "--exclude", own, *exclude, *words[place + 1 :]])
    return shlex.join([*words, "--exclude", *exclude])


def _words(step: str) -> list[str]:
    try:
        return shlex.split(step)
    except ValueError as error:
        raise DbtError(f"The step `{step}` can't be read as a command: {error}.") from None


@dataclass(frozen=True)
class Project:
    """What a job's manifest tells about its project.

    Attributes:
        name: The project's.
        adapter: The warehouse: snowflake, bigquery …
        lineage: The graph.
        tags: Of every node.
        paths: The file of every node.
        default_selector: Whether a selector is used where a command has no selection of its own.
    """

    name: str
    adapter: str
    lineage: Lineage
    tags: Mapping[str, frozenset[str]]
    paths: Mapping[str, str]
    default_selector: bool

    @classmethod
    def read(cls, manifest: bytes) -> Project:
        """From a `manifest.json` of any size: not for an event loop.

        Raises:
            ValueError: It is no JSON document.
        """
        document: dict[str, Any] = json.loads(manifest)
        about = document.get("metadata") or {}
        nodes = {**(document.get("nodes") or {}), **(document.get("sources") or {})}
        selectors = (document.get("selectors") or {}).values()
        return cls(
            name=str(about.get("project_name") or ""),
            adapter=str(about.get("adapter_type") or ""),
            lineage=Lineage.from_manifest(document),
            tags={unique_id: frozenset(node.get("tags") or ()) for unique_id, node in nodes.items()},
            paths={unique_id: str(node.get("original_file_path") or "") for unique_id, node in nodes.items()},
            default_selector=any(one.get("default") for one in selectors if isinstance(one, dict)),
        )

    def selected(self, steps: Sequence[str]) -> list[str]:
        """Unique ids of what the steps would run; rather too many where a word is not understood.

        Names, paths, `tag:`, `source:`, `exposure:`, `group:`, `package:`, `resource_type:` are, with their
        `+`, `@`, `*` and commas; state, selectors and configurations are not.
        """
        chosen: set[str] = set()
        for step in steps:
            command = command_of(step)
            if command not in RUNS_NODES:
                continue
            kinds = COMMAND_TYPES.get(command)
            ids = self._chosen(_words(step))
            chosen |= {
                unique_id
                for unique_id in ids
                if (kind := self.lineage.nodes[unique_id].resource_type)
                and (kind in kinds if kinds else kind not in NEVER_RUN)
            }
        return sorted(chosen)

    def _chosen(self, words: Sequence[str]) -> set[str]:
        everything = set(self.lineage.nodes)
        selected = self._union(_values(words, _SELECT))
        left_out = self._union(_values(words, frozenset({"--exclude"})))
        return (everything if selected is None else selected) - (left_out or set())

    def _union(self, words: Iterable[str]) -> set[str] | None:
        """What the words select together with the tests on it; None where there is no word, or no telling."""
        found: set[str] | None = None
        for word in words:
            parts = [self._atom(part) for part in word.split(",")]
            known = [part for part in parts if part is not None]
            if len(known) < len(parts):
                return None
            found = (found or set()) | set.intersection(*known)
        if found is None:
            return None
        tests = {
            child
            for unique_id in found
            for child in self.lineage.children(unique_id)
            if self.lineage.nodes[child].resource_type in ("test", "unit_test")
        }
        return found | tests

    def _atom(self, text: str) -> set[str] | None:
        shape = _ATOM.fullmatch(text.strip())
        if shape is None:
            return None
        found = self._matching(shape["what"])
        if found is None:
            return None
        wanted = set(found)
        if shape["down"] or shape["at"]:
            wanted |= self.lineage.downstream(found)
        if shape["at"]:
            wanted |= self.lineage.upstream(wanted)
        elif shape["up"] is not None:
            wanted |= self.lineage.upstream(found)
        return wanted

    def _matching(self, what: str) -> set[str] | None:
        method, colon, value = what.partition(":")
        if not colon:
            method, value = ("path" if "/" in what or what.endswith((".sql", ".py")) else "fqn"), what
        nodes = self.lineage.nodes.values()
        match method:
            case "fqn":
                last = value.rsplit(".", 1)[-1]
                return {node.unique_id for node in nodes if fnmatchcase(node.name, last)}
            case "tag":
                return {i for i, tags in self.tags.items() if any(fnmatchcase(tag, value) for tag in tags)}
            case "path":
                folder = value.rstrip("/").removesuffix("/*")
                return {
                    i for i, path in self.paths.items() if path == folder or path.startswith(f"{folder}/")
                }
            case "source":
                dotted = [part for part in value.split(".") if part][-2:]
                return {
                    node.unique_id
                    for node in self.lineage.sources
                    if fnmatchcase(node.source_name, dotted[0])
                    and (len(dotted) == 1 or fnmatchcase(node.name, dotted[1]))
                }
            case "exposure":
                return {node.unique_id for node in self.lineage.exposures if fnmatchcase(node.name, value)}
            case "group":
                return {node.unique_id for node in nodes if node.group == value}
            case "package":
                return {node.unique_id for node in nodes if node.unique_id.split(".")[1] == value}
            case "resource_type":
                return {node.unique_id for node in nodes if node.resource_type == value}
        return None


def _values(words: Sequence[str], flags: frozenset[str]) -> list[str]:
    """The words behind these options: dbt takes as many as come until the next option."""
    found: list[str] = []
    taking = False
    for word in words:
        if word.startswith("-") and not word[1:2].isdigit():
            flag, equals, value = word.partition("=")
            taking = flag in flags
            if taking and equals:
                found += value.split()
        elif taking:
            found += word.split()
    return found
