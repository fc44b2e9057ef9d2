"""The rehearsal stage: vendors' APIs on loopback over a real warehouse with real flights.

with Sandbox(Path(".sandbox")) as sandbox:
sandbox.airbyte_url, sandbox.hightouch_url, sandbox.slack_url("data-alerts")
sandbox.airbyte.set("weather", outcome="fail")
sandbox.faults.add(kind="status", status=503, vendor="airbyte", times=3)
sandbox.requests.count(vendor="airbyte", method="POST", path=r"/jobs$")
"""

from sandbox.server import Sandbox

__all__ = ["Sandbox"]
