"""Pull steps: where a worker runs our flows."""

from __future__ import annotations

import os
from pathlib import Path

_REPOSITORY = Path(__file__).resolve().parent.parent


def change_to_repository() -> dict[str, str]:
    """Work in the folder that this project is installed from, on the machine of whoever runs the flow.

    Relative paths in parameters, such as a dbt project's, start there.

    Returns:
        The folder, as `directory`, for steps that come after.
    """
    os.chdir(_REPOSITORY)
    return {"directory": str(_REPOSITORY)}
