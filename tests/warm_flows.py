"""Flows that tests run on a warm worker."""

import asyncio
import json
import os
import sys
from pathlib import Path

import psutil  # type: ignore[import-untyped]
from prefect import flow, task


def tell(place: str, **what: object) -> None:
    """Write it where the test looks, whole or not at all."""
    file = Path(place)
    file.with_suffix(".new").write_text(json.dumps({"pid": os.getpid(), **what}))
    file.with_suffix(".new").rename(file)


@task
def double(number: int) -> int:
    return 2 * number


@flow(log_prints=True)
def where(place: str) -> int:
    """Tell of the process that this runs in."""
    print("on standard output")  # noqa: T201
    parent = psutil.Process(os.getppid()).cmdline()
    code = sys.modules.get("warm_code")
    tell(
        place,
        parent=parent,
        argv=sys.argv,
        cwd=str(Path.cwd()),
        mark=os.environ.get("ELT_TEST_MARK"),
        version=getattr(code, "VERSION", None),
    )
    return sum(double.map(range(5)).result())


@flow
async def waits(place: str) -> None:
    """Wait until it is cancelled."""
    tell(place)
    try:
        await asyncio.sleep(600)
    except asyncio.CancelledError:
        tell(f"{place}-cancelled")
        raise


@flow
def fails() -> None:
    """Fail."""
    raise ValueError("on purpose")


@flow
def ends(code: int) -> None:
    """End the process without a word."""
    os._exit(code)
