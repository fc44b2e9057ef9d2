"""All slots of a deployment's limit: kept over a death, waited for whatever becomes of server and limit."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest
from prefect import flow
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import DeploymentUpdate
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId
from prefect.client.schemas.objects import FlowRun
from prefect.client.schemas.responses import DeploymentResponse
from prefect.flow_engine import run_flow
from prefect.runtime import flow_run
from prefect.states import AwaitingRetry, Cancelled, Pending

from flows import exclusive
from flows.exclusive import alone
from tests.jobs_fixtures import PREFECTS_SOCKETS, collected
from tests.test_backfill import until

__all__ = ["collected"]

pytestmark = [*PREFECTS_SOCKETS, pytest.mark.timeout(200)]


class Nightly:
    """A deployment, two runs of it at a time."""

    def __init__(self, client: SyncPrefectClient, deployment: DeploymentResponse) -> None:
        self.client = client
        self.deployment = deployment

    def limit(self, limit: int | None) -> None:
        self.client.update_deployment(self.deployment.id, DeploymentUpdate(concurrency_limit=limit))

    @property
    def taken(self) -> int | None:
        limit = self.client.read_deployment(self.deployment.id).global_concurrency_limit
        assert limit is not None
        return limit.active_slots

    def run(self) -> FlowRun:
        """One that a worker takes on, if it gets a slot."""
        run = self.client.create_flow_run_from_deployment(self.deployment.id)
        self.client.set_flow_run_state(run.id, Pending())
        return self.client.read_flow_run(run.id)

    def waiting(self) -> bool:
        run = self.run()
        self.client.set_flow_run_state(run.id, Cancelled())
        return run.state_name == "AwaitingConcurrencySlot"

    def alone(self, pool: ThreadPoolExecutor) -> Future[Any]:
        """A run that waits for the others, in another thread."""
        return pool.submit(_reloads, self.deployment)


@flow
def _reloads(base: Any) -> bool:
    with alone(base):
        return True


@pytest.fixture
def nightly() -> Iterator[Nightly]:
    @flow(name=f"nightly-{uuid4().hex[:8]}")
    def ours() -> None:
        """Stands for a pipeline."""

    with get_client(sync_client=True) as client:
        made = client.create_deployment(client.create_flow(ours), "small", concurrency_limit=2)
        yield Nightly(client, client.read_deployment(made))
        client.delete_deployment(made)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exclusive, "_RETRY", 0.2)
    monkeypatch.setattr("tasks.jobs.slots._LONGEST_WAIT", 0.5)


def test_killed_and_started_again(nightly: Nightly, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody gets a slot in between, and the next attempt has them at once, and not twice."""
    attempts: list[int | None] = []

    @flow
    def reloads() -> None:
        with alone(nightly.deployment):
            attempts.append(nightly.taken)
            if len(attempts) == 1:
                raise SystemExit  # as good as SIGKILL, when nothing is given back

    run = nightly.client.create_flow_run(reloads)
    with monkeypatch.context() as killed:
        killed.setattr(exclusive, "_release", lambda *_: None)
        with pytest.raises(SystemExit):
            run_flow(reloads, flow_run=run)
    assert nightly.waiting()
    nightly.client.set_flow_run_state(run.id, AwaitingRetry(), force=True)
    run_flow(reloads, flow_run=nightly.client.read_flow_run(run.id))
    assert attempts == [2, 2]
    assert nightly.taken == 0
    assert not nightly.waiting()


def test_what_was_given_back_is_not_taken_for_ones_own(nightly: Nightly) -> None:
    """A retry after a failure takes the slots anew."""
    attempts: list[int | None] = []

    @flow(retries=1)
    def reloads() -> None:
        with alone(nightly.deployment):
            attempts.append(nightly.taken)
            if len(attempts) == 1:
                raise ValueError("The first time.")

    reloads()
    assert attempts == [2, 2]
    assert nightly.taken == 0


@pytest.mark.parametrize("limit", [1, None])
def test_the_limit_is_changed_meanwhile(
    nightly: Nightly, caplog: pytest.LogCaptureFixture, limit: int | None
) -> None:
    """Lowered, all that are left are waited for; without one there is nothing to wait for."""
    at_work = nightly.run()
    with ThreadPoolExecutor(1) as pool:
        reloading = nightly.alone(pool)
        until(lambda: f"Waits until {at_work.name} of small has ended" in caplog.text, 60)
        nightly.limit(limit)
        if limit:
            nightly.client.set_flow_run_state(at_work.id, Cancelled())
        assert reloading.result(100)


def test_the_server_is_away(
    nightly: Nightly, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is asked again, and that is said in a sentence, once."""
    tries: list[bool] = []

    def away(**given: Any) -> Any:
        tries.append(len(tries) < 3)
        if tries[-1]:
            raise httpx.ConnectError("refused")
        return get_client(**given)

    monkeypatch.setattr(exclusive, "get_client", away)
    assert _reloads(nightly.deployment)
    assert tries[:4] == [True, True, True, False]
    assert caplog.text.count("The Prefect server gives no slots of small now (no answer)") == 1
    assert "Traceback" not in caplog.text


def test_slots_that_are_lost(
    nightly: Nightly, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """They cost the guard, and not the run; that is said."""
    monkeypatch.setattr(exclusive, "_RENEW", 0.2)

    @flow
    def reloads() -> bool:
        with alone(nightly.deployment):
            of_run = ArtifactFilterFlowRunId(any_=[UUID(str(flow_run.id))])
            (kept,) = nightly.client.read_artifacts(artifact_filter=ArtifactFilter(flow_run_id=of_run))
            data: Any = kept.data
            nightly.client.release_concurrency_slots_with_lease(UUID(data["lease"]))
            until(lambda: "The slots of small were lost" in caplog.text, 60)
            return True

    assert reloads()
