"""A chain that a test runs in another process: `python -m tests.away_flows <parameters as JSON>`."""

from __future__ import annotations

import json
import sys

from flows import elt_chain

if __name__ == "__main__":
    elt_chain(**json.loads(sys.argv[1]))
