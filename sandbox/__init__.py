"""The rehearsal stage: vendors' APIs on loopback over a real warehouse with real flights.

Example:
    A test or a script starts it, makes trouble, and reads back what happened::

        with Sandbox(Path(".sandbox")) as sandbox:
            sandbox.airbyte.set("weather", outcome="fail", times=1)
            sandbox.faults.add(kind="status", status=503, vendor="airbyte", times=3)
            ...  # use sandbox.airbyte_url, sandbox.hightouch_url, sandbox.slack_url("data-alerts")
            sandbox.requests.count(vendor="airbyte", method="POST", path=r"/jobs$")
"""

from sandbox.server import Sandbox

__all__ = ["Sandbox"]
