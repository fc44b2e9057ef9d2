"""What can be seen to be wrong without starting dbt, and what dbt's own end says in one sentence."""

from __future__ import annotations

import re
import signal
from pathlib import Path
from typing import Any

import yaml

from tasks.dbt.lineage import Lineage
from tasks.dbt.model import DbtCore, DbtError, DbtInputError, one_line
from tasks.dbt.process import DbtProcess

# dbt's exceptions about what is written in files or on the command line, and about packages that are not
# installed, each with all that are derived from it: no second try mends them.
_USERS_ERRORS = frozenset(
    {
        "CompilationError",
        "DbtConfigError",
        "DbtUsageException",
        "DbtValidationError",
        "DependencyError",
        "InvalidSelectorError",
        "ParsingError",
        "VersionsNotCompatibleError",
    }
)


def look_at(dbt: DbtCore) -> str:
    """What can be seen to be wrong without starting dbt.

    Returns:
        The name of the project.

    Raises:
        DbtInputError: A file is missing or can't be right.
    """
    if not dbt.project.is_dir():
        raise DbtInputError(
            f"The dbt project folder {dbt.project} does not exist: set project_dir to the right one."
        )
    file = dbt.project / "dbt_project.yml"
    if not file.is_file():
        raise DbtInputError(f"{dbt.project} is not a dbt project: it has no dbt_project.yml.")
    # dbt takes it as its own option, which beside an interval the parameters refuse.
    if dbt.data_interval and any(said.startswith("DBT_FULL_REFRESH=") for said in dbt.options_in_environment):
        raise DbtInputError(
            "DBT_FULL_REFRESH in the environment and a data interval would leave incremental models with"
            " nothing but that interval: take it out of the environment."
        )
    profiles_file = dbt.find_profiles_dir() / "profiles.yml"
    if not profiles_file.is_file():
        raise DbtInputError(
            f"No profiles.yml in {profiles_file.parent}: set profiles_dir to the folder that has it,"
            " or put one into the dbt project."
        )
    project, profiles = _yaml(file), _yaml(profiles_file)
    called = str(project.get("name"))
    said = dbt.variable("DBT_PROFILE")
    name = said or project.get("profile")
    if not isinstance(name, str) or "{{" in name:
        return called  # rendered by dbt, which will tell
    if name not in profiles:
        known = ", ".join(sorted(key for key in profiles if key != "config")) or "none"
        raise DbtInputError(
            f"Profile {name!r} (of {'DBT_PROFILE' if said else file}) is not in {profiles_file};"
            f" profiles there: {known}."
        )
    outputs = (profiles[name] or {}).get("outputs") or {}
    if dbt.target and dbt.target not in outputs:
        raise DbtInputError(
            f"Target {dbt.target!r} is not in profile {name!r} of {profiles_file};"
            f" targets there: {', '.join(sorted(outputs)) or 'none'}."
        )
    return called


def _yaml(path: Path) -> dict[str, Any]:
    try:
        found = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise DbtInputError(f"{path} is not valid YAML: {one_line(str(error))}") from error
    if not isinstance(found, dict):
        raise DbtInputError(f"{path} is empty or not a YAML mapping.")
    return found


def nothing_selected(dbt: DbtCore) -> str:
    """The sentence about a selection that matches nothing."""
    words = " ".join(dbt.selection()) or "everything"
    return (
        f"The dbt selection matches nothing that `dbt {dbt.command}` runs: {words}, in {dbt.project}."
        " `dbt ls` with the same words shows what they match."
    )


def nothing_to_look_at(dbt: DbtCore, lineage: Lineage | None) -> str:
    """The sentence about a project, or a selection, of which no source can be too old."""
    if lineage is not None and not lineage.sources:
        return f"The dbt project {dbt.project} has no sources, so there is no age to be looked at."
    words = " ".join(dbt.selection()) or "the project"
    return (
        f"No source of {words} in {dbt.project} has a freshness threshold: give it `freshness` with"
        " warn_after or error_after, and a loaded_at_field."
    )


def check_end(end: dict[str, Any] | None, process: DbtProcess, command: str, done: int = 0) -> None:
    """Raise unless dbt came to a proper end.

    Args:
        end: The last record of `tasks/dbt/child.py`; None if it sent none.
        process: The process that has ended.
        command: dbt's command.
        done: How many nodes were done.

    Raises:
        DbtError: dbt could not run, or was killed.
    """
    if end is not None and end["error"] is None:
        return
    if end is not None:
        text = str(end["error"])
        # dbt has no class of its own for a selector that is not there.
        users = not _USERS_ERRORS.isdisjoint(end.get("kinds", ())) or "Could not find selector" in text
        wrong = DbtInputError if users else DbtError
        raise wrong(
            locked(text) or _no_selector(text) or f"dbt {command} could not run: {one_line(text, 800)}"
        )
    code = process.exit_code or 0
    after = f" after {done} nodes" if done else ""
    if code < 0:
        name = signal.Signals(-code).name
        hint = "; the machine may be out of memory" if -code == signal.SIGKILL else ""
        raise DbtError(f"dbt {command} was killed by {name}{after}{hint}.")
    last = process.stderr.splitlines()[-1:] or ["it said nothing"]
    raise DbtError(f"dbt {command} broke off with exit code {code}{after}: {one_line(last[0], 800)}")


def _no_selector(text: str) -> str | None:
    """What is wrong with a selector's name, with those that there are; None if the text is not about that."""
    found = re.search(r"Could not find selector named (.+?), expected one of \[(.*)\]", text)
    if not found:
        return None
    there = found[2].replace("'", "") or "none, or there is no such file"
    return (
        f"The dbt project has no selector {found[1]!r}; those in its selectors.yml: {there}."
        " Name one of them, or no selector and a select list."
    )


def locked(text: str) -> str | None:
    """DuckDB's lock error as a sentence that names the file and who holds it; None if the text is not one."""
    file = re.search(r'Could not set lock on file "([^"]+)"', text)
    if not file:
        return None
    holder = re.search(r"Conflicting lock is held in (.+?) \(PID (\d+)\)", text)
    by = f"process {holder[2]} ({holder[1]})" if holder else "another process"
    return f"The DuckDB file {file[1]} is locked by {by}: end that first, DuckDB takes one writer at a time."
