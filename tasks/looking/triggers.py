"""The once triggers that a look hands events over to: those of its own environment."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import yaml
from prefect.runtime import deployment

from tasks.events import OnceTrigger, read_triggers


def triggers_here(files: Sequence[str]) -> tuple[OnceTrigger, ...]:
    """The once triggers in files of deployments, with the names that these have in this run's environment.

    A run of `dev.landing` starts runs of `dev.flights`; one of `landing`, or of a script, those of `flights`.

    Args:
        files: Paths, from the root of the repository.

    Raises:
        TriggersWrong: A file can't be read, or an entry can't be used.
    """
    paths = [Path(file) for file in files]
    read = read_triggers(*paths)  # says what is wrong with a file before its names are looked at
    prefix = _prefix(deployment.name, paths)
    return read_triggers(*paths, prefix=prefix) if prefix else read


def _prefix(deployed_as: str | None, files: Sequence[Path]) -> str:
    """What `make deploy` has put before the names of this environment's deployments."""
    if deployed_as is None:
        return ""
    names = {entry["name"] for file in files for entry in yaml.safe_load(file.read_text())["deployments"]}
    fitting = [name for name in names if deployed_as.endswith(name)]
    return deployed_as.removesuffix(max(fitting, key=len)) if fitting else ""
