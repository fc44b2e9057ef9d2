"""The once triggers that a look hands events over to: those of its own environment."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tasks.environment import prefix_here
from tasks.events import OnceTrigger, read_triggers


def triggers_here(files: Sequence[str]) -> tuple[OnceTrigger, ...]:
    """The once triggers in files of deployments, with the names that these have in this run's environment.

    A run of `dev.landing` starts runs of `dev.flights`; one of `landing`, or of a script, those of `flights`.

    Args:
        files: Paths, from the root of the repository.

    Raises:
        TriggersWrong: A file can't be read, or an entry can't be used.
    """
    return read_triggers(*(Path(file) for file in files), prefix=prefix_here())
