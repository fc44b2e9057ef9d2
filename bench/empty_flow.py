"""What a flow costs that does nothing, which every other figure contains."""

from __future__ import annotations

import time
from typing import Any

from prefect import flow

from bench.measured import report


@flow
def nothing() -> None:
    """Do nothing."""


def run(_: dict[str, Any]) -> tuple[float, dict[str, Any]]:
    """Take the seconds of the flow's call."""
    began = time.perf_counter()
    nothing()
    return time.perf_counter() - began, {}


if __name__ == "__main__":
    report(run)
