"""The packages that a dbt project declares: installed where nobody has, as on a fresh checkout.

What is there is left alone, whatever its version: `dbt deps` begins by deleting it. What an installation has
left that broke off is not relied on, but installed anew.
"""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Any

import yaml
from prefect.exceptions import MissingContextError
from prefect.logging import get_logger, get_run_logger

from tasks.dbt.checks import check_end
from tasks.dbt.child import packages_in
from tasks.dbt.folders import outside, settings_of, writable
from tasks.dbt.model import DbtCore, DbtError, DbtInputError, json_text
from tasks.dbt.process import DbtProcess, surroundings

UNFINISHED = ".dbt-packages-unfinished"
"""The file in the project that says that its packages are being installed, or that this has broken off."""

LIMIT = 600.0  # seconds for all attempts together
_ATTEMPTS = 3
_PAUSE = 10.0  # seconds between two of them
_LEVELS = {"info": logging.INFO, "warn": logging.WARNING, "error": logging.ERROR}


async def install_packages(dbt: DbtCore) -> None:
    """Install the packages of a project if they are not there.

    Not where `dbt.install_packages` is off, or nobody may write into the project: then dbt says what is
    missing.

    Args:
        dbt: The project.

    Raises:
        DbtInputError: What is declared can't be installed.
        DbtError: They could not be installed now; another attempt may help.
    """
    folder, declared = await asyncio.to_thread(missing_packages, dbt)
    if not declared:
        return
    said = f"The packages of {dbt.project} could not be installed"
    try:
        async with asyncio.timeout(LIMIT) as limit:
            for left in reversed(range(_ATTEMPTS)):
                try:
                    await _deps(dbt, folder, declared)
                except DbtInputError as error:
                    raise DbtInputError(f"{said}: {error}") from None
                except DbtError as error:
                    if not left:
                        raise DbtError(f"{said}: {error}") from None
                    _logger().warning("%s: %s Trying again in %g s.", said, error, _PAUSE)
                else:
                    return
                await asyncio.sleep(_PAUSE)
    except TimeoutError:
        if not limit.expired():
            raise
        raise DbtError(f"{said} within {LIMIT:g} s.") from None


def missing_packages(dbt: DbtCore) -> tuple[Path, int]:
    """Where packages have to be installed, and how many are declared: 0 if there is nothing to do.

    As dbt itself counts them before it parses a project; while they are being installed, and when that has
    broken off, they are missing, however many there are.
    """
    folder = str(settings_of(dbt).get("packages-install-path") or "dbt_packages")
    place = dbt.project / folder
    declared = sum(_declared(dbt.project / name) for name in ("packages.yml", "dependencies.yml"))
    # Counted first: what is there when the file has gone was installed to the end.
    missing = packages_in(place) < declared or (dbt.project / UNFINISHED).exists()
    wanted = dbt.install_packages and "{{" not in folder and missing
    # A lock file goes into the project, too.
    return place, declared if wanted and writable(dbt.project) and writable(place) else 0


def _declared(file: Path) -> int:
    try:
        found = yaml.safe_load(file.read_text())
    except (OSError, yaml.YAMLError):
        return 0  # dbt says it better
    packages = found.get("packages") if isinstance(found, dict) else None
    return len(packages) if isinstance(packages, list) else 0


async def _deps(dbt: DbtCore, folder: Path, declared: int) -> None:
    logger = _logger()
    logger.info("Of %d packages that %s declares not all are installed: dbt deps.", declared, dbt.project)
    lock = outside(dbt) / "packages.lock"
    await asyncio.to_thread(lock.parent.mkdir, parents=True, exist_ok=True)
    async with surroundings(dbt) as (profiles_dir, env):
        args = ["deps", "--project-dir", str(dbt.project), "--profiles-dir", str(profiles_dir)]
        args += ["--target", dbt.target] if dbt.target else []
        args += ["--vars", json_text(dbt.all_vars)] if dbt.all_vars else []
        request = {
            "mode": "deps",
            "args": args,
            "lock": str(lock),
            "folder": str(folder),
            "declared": declared,
            "unfinished": str(dbt.project / UNFINISHED),
        }
        end: dict[str, Any] | None = None
        async with DbtProcess.running(request, env=env, cwd=dbt.project) as process:
            async for record in process.records():
                if record["t"] == "log":
                    logger.log(_LEVELS[record["level"]], "%s", record["text"].strip())
                elif record["t"] == "end":
                    end = record
        check_end(end, process, "deps")


def _logger() -> Any:
    try:
        return get_run_logger()
    except MissingContextError:  # a project is looked at outside of runs, too
        return get_logger("dbt")
