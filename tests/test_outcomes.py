"""What Prefect's own triggers start: when all connections are fresh, and by how a build has ended."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import State
from prefect.states import Completed, Crashed, Failed, Pending, Running

from deployments.entries import read_entries
from deployments.environments import environment
from flows import sync_connections
from flows.expected import ExpectedConnection, expect_fresh
from sandbox import Sandbox, catalog
from tasks.fresh import resource_of
from tasks.slack import SlackNotify
from tests.deployed import PREFECT_FILE, Runs, prefect, saved_blocks, until
from tests.jobs_fixtures import PREFECTS_SOCKETS, collected

__all__ = ["collected"]

pytestmark = [*PREFECTS_SOCKETS, pytest.mark.timeout(300)]

DAILY, ALL_FRESH = "dbt-build/daily", "dbt-build/all-fresh"
AFTER_BUILD, FRESHNESS = "activate/after-build", "dbt-freshness/every-six-hours"
CONNECTIONS = [spec.connection_id for spec in catalog.CONNECTIONS]


@pytest.fixture(scope="module")
def runs(prefect_server: str) -> Iterator[Runs]:
    """The deployments with their triggers, in a pool that no worker polls."""
    prefect("work-pool", "create", "elt", "--type", "process", "--overwrite")
    names = [name.split("/")[1] for name in (DAILY, ALL_FRESH, AFTER_BUILD, FRESHNESS)]
    prefect(
        "--no-prompt",
        "deploy",
        "--prefect-file",
        PREFECT_FILE,
        *(part for name in names for part in ("-n", name)),
    )
    with get_client(sync_client=True) as client:
        yield Runs(client, prefect_server)


@pytest.fixture(scope="module")
def box(runs: Runs, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandbox]:
    folder = tmp_path_factory.mktemp("box")
    (folder / "starts").write_text("1000")  # the server may know jobs of these connections from another file
    with Sandbox(folder, job_seconds=0.1) as box, saved_blocks(box):
        yield box


def _sync(connections: list[str]) -> None:
    syncs = [{"tool": "airbyte", "server": "airbyte", "connection_id": one} for one in connections]
    assert len(sync_connections(syncs=syncs).outcomes) == len(connections)  # type: ignore[arg-type]


def _triggered(runs: Runs, name: str) -> list[UUID]:
    return [run.id for run in runs.of(name) if not run.auto_scheduled]


def test_when_all_are_fresh(runs: Runs, box: Sandbox) -> None:
    """Four of five start nothing; the fifth, by another run, starts one build; and then all begins anew."""
    _sync(CONNECTIONS[:4])
    _sync(CONNECTIONS[:2])
    time.sleep(5)  # in which nothing is to happen
    assert _triggered(runs, ALL_FRESH) == []
    _sync(CONNECTIONS[4:])
    until("a build is started", lambda: _triggered(runs, ALL_FRESH))
    _sync(CONNECTIONS[4:])
    time.sleep(5)
    assert len(_triggered(runs, ALL_FRESH)) == 1


def _ended(runs: Runs, *states: State[Any]) -> None:
    run = runs.client.create_flow_run_from_deployment(runs.deployment(DAILY).id)
    for state in (Pending(), Running(), *states):
        runs.client.set_flow_run_state(run.id, state, force=True)


def test_branch_on_the_outcome(runs: Runs) -> None:
    """A build that failed or crashed has the sources looked at; one that completed is sent on."""
    _ended(runs, Failed(message="2 models failed"))
    until("the sources are looked at", lambda: len(_triggered(runs, FRESHNESS)) == 1)
    _ended(runs, Crashed())
    until("the sources are looked at again", lambda: len(_triggered(runs, FRESHNESS)) == 2)
    assert _triggered(runs, AFTER_BUILD) == []
    _ended(runs, Completed())
    until("what was built is sent on", lambda: len(_triggered(runs, AFTER_BUILD)) == 1)
    time.sleep(3)
    assert (len(_triggered(runs, FRESHNESS)), len(_triggered(runs, AFTER_BUILD))) == (2, 1)


def test_not_fresh_by_now(runs: Runs, box: Sandbox) -> None:
    """A connection that was not loaded in time: the run is NotFresh, and its owner told until it is."""
    (orders,) = box.airbyte.add_connections(1, prefix="orders", duration=0.1)
    expected = [ExpectedConnection(connection_id=orders, name="orders", owner="flight-ops")]
    notify = [SlackNotify(webhook="data-alerts", owners={"flight-ops": "flight-ops"}, on="failure")]
    state: State[Any] = expect_fresh(expected, notify=notify, return_state=True)
    assert (state.name, state.message) == (
        "NotFresh",
        "1 of 1 were not loaded in the last 24 h: orders",
    )
    (told,) = box.slack.sent_to("flight-ops")
    assert (
        "*airbyte orders* is not fresh: It was not loaded in the last 24 h (owner: flight-ops)" in told.text
    )
    _sync([orders])

    def fresh() -> bool:  # events are stored some moments after they were sent
        return expect_fresh(expected, notify=notify, return_state=True).name == "Completed"

    until("it is fresh", fresh)
    assert "*airbyte orders* is well again" in box.slack.sent_to("flight-ops")[-1].text
    # A load that is new enough says nothing of a sync that has failed since then.
    box.airbyte.set(orders, outcome="fail")
    failing = {"tool": "airbyte", "server": "airbyte", "connection_id": orders, "owner": "flight-ops"}
    shared = [notify[0].model_copy(update={"pipeline": "orders"})]
    sync_connections(syncs=[failing], notify=shared, return_state=True)  # type: ignore[list-item]
    assert "sync failed" in box.slack.sent_to("flight-ops")[-1].text
    assert expect_fresh(expected, notify=shared, return_state=True).name == "Completed"
    assert "sync failed" in box.slack.sent_to("flight-ops")[-1].text


def test_a_clear_is_no_load(runs: Runs, box: Sandbox) -> None:
    """Airbyte's jobs of every kind succeed under one name: what empties a table does not make it fresh."""
    connection = f"of-{uuid4().hex[:8]}"
    expected = [ExpectedConnection(connection_id=connection)]
    resource = resource_of("airbyte", connection)
    began = datetime.now(UTC)

    def succeeded(operation: str, minute: int) -> None:
        labels = {"prefect.resource.id": resource, "elt.airbyte.operation": operation}
        event = {
            "id": str(uuid4()),
            "occurred": (began - timedelta(minutes=10 - minute)).isoformat(),
            "event": "elt.airbyte.job.succeeded",
            "resource": labels,
        }
        runs.client.request("POST", "/events", json=[event])

    def state() -> str | None:
        found: State[Any] = expect_fresh(expected, return_state=True)
        return found.name

    def heard(count: int) -> None:
        query = {"filter": {"resource": {"id": [resource]}}}
        until(
            "the event is stored",
            lambda: runs.client.request("POST", "/events/filter", json=query).json()["total"] == count,
        )

    for count, (operation, fresh) in enumerate(
        {"clear": "NotFresh", "sync": "Completed", "reset": "NotFresh", "refresh": "Completed"}.items(), 1
    ):
        succeeded(operation, count)
        heard(count)
        assert (operation, state()) == (operation, fresh)


def test_a_look_that_can_not_look(runs: Runs, box: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing can be said of any connection: that is told as well, and is over with the next look."""

    async def away(*_: Any) -> None:
        raise ConnectionError("the API is away")

    expected = [ExpectedConnection(connection_id="of-none", name="of none")]
    notify = [SlackNotify(webhook="data-alerts", on="failure")]
    with monkeypatch.context() as patch:
        patch.setattr("flows.expected.last_landed", away)
        assert expect_fresh(expected, notify=notify, return_state=True).name == "Failed"
    assert "*the run* failed: " in box.slack.sent_to("data-alerts")[-1].text
    told = len(box.slack.messages)
    assert expect_fresh(expected, notify=notify, return_state=True).name == "NotFresh"
    assert "*the run* is well again" in " ".join(message.text for message in box.slack.messages[told:])


@pytest.mark.no_server
def test_a_branch_reacts_to_its_own_builds() -> None:
    """Deployed for a branch, a trigger on the end of a build is one on the branch's build."""
    (entry,) = [entry for entry in read_entries() if entry.name == "after-build"]
    (trigger,) = entry.within(environment(branch="try-it")).triggers
    assert trigger["match_related"][1]["prefect.resource.name"] == "try-it.daily"
    assert trigger["match_related"][0]["prefect.resource.name"] == "dbt-build"
