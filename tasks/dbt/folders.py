"""Where dbt writes: in the project, or beside it where the project can only be read.

dbt wants to write into `target` and `logs` of the project, and does not run if it can't. A project may well
be read-only: a volume that a git-sync fills, a layer of an image that another user owns. Then both go under
`$PREFECT_HOME/dbt`, a folder for each project, so that what is parsed lasts from one run to the next.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import yaml
from prefect.settings import get_current_settings

from tasks.dbt.model import DbtCore

_FOLDERS = {"DBT_TARGET_PATH": ("target-path", "target"), "DBT_LOG_PATH": ("log-path", "logs")}


def led_out(dbt: DbtCore) -> dict[str, str]:
    """The variables that lead dbt out of a project that it can't write into; none where it can."""
    settings = settings_of(dbt)
    found: dict[str, str] = {}
    for variable, (key, usual) in _FOLDERS.items():
        if dbt.variable(variable) or (variable == "DBT_TARGET_PATH" and dbt.target_path):
            continue  # whoever says where dbt shall write means it
        wanted = str(settings.get(key) or usual)
        if "{{" not in wanted and not writable(dbt.project / wanted):
            found[variable] = str(outside(dbt) / usual)
    return found


def target_of(dbt: DbtCore) -> Path:
    """The folder that dbt writes its artifacts into."""
    said = dbt.target_path or dbt.variable("DBT_TARGET_PATH") or led_out(dbt).get("DBT_TARGET_PATH")
    return dbt.project / (said or settings_of(dbt).get("target-path") or "target")


def settings_of(dbt: DbtCore) -> dict[str, Any]:
    """What dbt_project.yml says; nothing if it can't be read."""
    try:
        found = yaml.safe_load((dbt.project / "dbt_project.yml").read_text())
    except (OSError, yaml.YAMLError):
        return {}  # dbt, or the look at the project, says it better
    return found if isinstance(found, dict) else {}


def writable(folder: Path) -> bool:
    """Whether a folder can be written into, or made."""
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return os.access(folder, os.W_OK)


def outside(dbt: DbtCore) -> Path:
    """The folder for what belongs to a project and does not lie in it."""
    mark = hashlib.sha256(str(dbt.project).encode()).hexdigest()[:12]
    return get_current_settings().home / "dbt" / f"{dbt.project.name}-{mark}"
