"""The once triggers that a look hands events over to: those of its own environment."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from tasks.environment import TRIGGERS_VARIABLE, here
from tasks.events import OnceTrigger, TriggersWrong, read_triggers


def triggers_here(files: Sequence[str]) -> tuple[OnceTrigger, ...]:
    """The once triggers in files of deployments, as they are in this run's environment.

    A run of `dev.landing` starts runs of `dev.flights`; one of `landing`, or of a script, those of `flights`.
    There are none where the environment's triggers are off.

    Args:
        files: Paths, from the root of the repository.

    Raises:
        TriggersWrong: A file can't be read, or an entry can't be used.
    """
    try:
        environment = here()
    except ValidationError:
        raise TriggersWrong(f"{TRIGGERS_VARIABLE} is not as `make deploy` writes it") from None
    return read_triggers(*(Path(file) for file in files), here=environment)
