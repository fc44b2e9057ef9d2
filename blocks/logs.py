"""Where what happens is told."""

from __future__ import annotations

import logging
from typing import Any

from prefect.exceptions import MissingContextError
from prefect.logging import get_run_logger

Log = logging.Logger | logging.LoggerAdapter[Any]


def run_logger(otherwise: str) -> Log:
    """The log of the flow or task run; outside of one, Python's own logger of this name."""
    try:
        return get_run_logger()
    except MissingContextError:
        return logging.getLogger(otherwise)
