"""`python -m deployments.work_pools <type>`: a work pool's template whole, as JSON."""

from __future__ import annotations

import argparse
import json
import sys

from deployments.environments import DeployError, WorkPoolSettings
from deployments.work_pools import base_job_template


def main(arguments: list[str] | None = None) -> int:
    """Print the template and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m deployments.work_pools", description=__doc__)
    parser.add_argument("type", choices=["process", "docker", "kubernetes", "ecs"])
    options = parser.parse_args(arguments)
    try:
        template = base_job_template(WorkPoolSettings(type=options.type))
    except DeployError as error:
        print(f"✗ {error}", file=sys.stderr)  # noqa: T201 - it is a command
        return 1
    print(json.dumps(template, indent=2))  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
