"""Which environment a run belongs to."""

from __future__ import annotations

import os

PREFIX_VARIABLE = "ELT_PREFIX"
"""Environment variable that tells a run what stands before the names of its environment's deployments."""


def prefix_here() -> str:
    """What `make deploy` has put before the names of the deployments beside this run's own, such as `dev.`.

    Empty in an environment without a prefix, and in a run that is no deployment's. It can't be told from the
    run's name: a prefix may end with anything, and a name may hold what looks like one.
    """
    return os.environ.get(PREFIX_VARIABLE, "")
