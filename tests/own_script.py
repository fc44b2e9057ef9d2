"""A script that does its work when it is imported."""

from __future__ import annotations

import sys


def main() -> None:
    """Never reached."""


sys.exit(1)
