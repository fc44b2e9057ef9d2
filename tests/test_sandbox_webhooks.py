"""What the sandbox's vendors send when a job has ended: signed, and tried again, as the real ones do."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest
from pydantic import SecretStr

from blocks.signatures import Sender, check_signature
from sandbox import Sandbox, catalog
from tests.events_fixtures import until

pytestmark = pytest.mark.no_server


@dataclass
class Receiver:
    """Takes what comes, from the second time on."""

    url: str = ""
    refused: set[bytes] = field(default_factory=set)
    taken: list[tuple[str, dict[str, str], bytes]] = field(default_factory=list)

    def take(self, path: str, headers: dict[str, str], body: bytes) -> int:
        if body not in self.refused:
            self.refused.add(body)
            return 503
        self.taken.append((path, headers, body))
        return 200


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    receiver = Receiver()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(receiver.take(self.path, dict(self.headers.items()), body))
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        receiver.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield receiver
        server.shutdown()
        thread.join()


def test_webhooks(sandbox: Sandbox, receiver: Receiver) -> None:
    """Fivetran, dbt Cloud and Census sign and try again until they are heard; Airbyte does neither."""
    told = httpx.put(f"{sandbox.url}/_sandbox/webhooks", json={"receiver": receiver.url})
    assert told.json()["urls"]["fivetran"] == f"{receiver.url}/hooks/fivetran-webhook/sandbox"
    (connection,) = sandbox.airbyte.add_connections(1, duration=0.1)
    started = httpx.post(f"{sandbox.url}/_sandbox/connections/{connection}/jobs").json()
    (fivetran,) = sandbox.fivetran.add_connections(1, duration=0.1)
    sandbox.fivetran.trigger(fivetran)
    (job,) = sandbox.dbt_cloud.add_jobs(1, duration=0.1)
    sandbox.dbt_cloud.trigger(job, "by hand")
    (sync,) = sandbox.census.add_syncs(1, duration=0.1)
    sandbox.census.trigger(sync)
    until("three are taken", lambda: len(receiver.taken) == 3)
    until("all is noted", lambda: len(sandbox.webhooks.deliveries) == 7)
    by_path = {path.split("/")[2]: (headers, body) for path, headers, body in receiver.taken}
    senders: dict[str, Sender] = {
        "fivetran-webhook": "fivetran",
        "dbt-cloud-webhook": "dbt-cloud",
        "census-webhook": "census",
    }
    assert by_path.keys() == senders.keys()
    for path, sender in senders.items():
        check_signature(sender, *by_path[path], [SecretStr(catalog.WEBHOOK_SECRET)])
    assert json.loads(by_path["dbt-cloud-webhook"][1])["data"]["runReason"] == "by hand"
    deliveries = httpx.get(f"{sandbox.url}/_sandbox/webhooks").json()["deliveries"]
    airbyte = [one for one in deliveries if one["vendor"] == "airbyte"]
    assert airbyte == [{"vendor": "airbyte", "about": str(started["jobId"]), "status": 503}]
    assert sorted(one["status"] for one in deliveries) == [200] * 3 + [503] * 4


def test_only_from_now_on(sandbox: Sandbox, receiver: Receiver) -> None:
    """What has ended before somebody wanted to be told is told to nobody, and neither is a cancelled job."""
    before, cancelled, after = sandbox.airbyte.add_connections(3, duration=0.1)
    sandbox.airbyte.start(before, "sync")
    until("the first job ends", lambda: sandbox.airbyte.jobs_of(before)[0].status == "succeeded")
    sandbox.webhooks.to(receiver.url)
    sandbox.airbyte.set(cancelled, duration=60)
    job = sandbox.airbyte.start(cancelled, "sync")
    sandbox.airbyte.finish_job(job.job_id, "cancelled")
    last = sandbox.airbyte.start(after, "sync")
    until("the last is told", lambda: bool(sandbox.webhooks.deliveries))
    assert [one.about for one in sandbox.webhooks.deliveries] == [str(last.job_id)]


def test_a_running_connection_can_t_be_started_again(sandbox: Sandbox) -> None:
    """As with the real scheduler, a connection that runs is not started a second time."""
    (connection,) = sandbox.airbyte.add_connections(1, duration=60)
    url = f"{sandbox.url}/_sandbox/connections/{connection}/jobs"
    assert httpx.post(url).is_success
    again = httpx.post(url)
    assert (again.status_code, "running" in again.text) == (422, True)
