"""Functions that steps of one's own call, by name."""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path

from prefect import flow


def count(path: str, by: int = 1) -> int:
    """Write down that it was called, and return how often that was."""
    calls = Path(path)
    calls.write_text(calls.read_text() + "x" * by if calls.exists() else "x" * by)
    return len(calls.read_text())


async def greet(name: str) -> str:
    return f"hello {name}"


async def sleep() -> None:
    await asyncio.sleep(60)


def hold(path: str) -> None:
    Path(path).touch()
    time.sleep(600)


def breaks() -> None:
    raise RuntimeError("the key in the lock broke")


def leaves(code: int | str | None = None) -> None:
    sys.exit(code)


@flow
def subflow(n: int) -> int:
    return n * 2


NOT_A_FUNCTION = 3
