"""Approvals: in a script and on a worker, given, refused, late, never answered, and asked again."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
import psutil  # type: ignore[import-untyped]
import pytest
from prefect import Flow, flow, task
from prefect.cache_policies import RUN_ID
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.client.schemas.responses import OrchestrationResult, SetStateStatus
from prefect.exceptions import Pause
from prefect.flow_engine import run_flow
from prefect.settings import PREFECT_LOCAL_STORAGE_PATH, temporary_settings
from prefect.states import AwaitingRetry, Scheduled
from prefect.utilities.asyncutils import run_coro_as_sync
from prefect.utilities.callables import parameter_schema

import tasks.approval
from flows import elt_chain
from flows.approval import arequest_approval, end_approval, request_approval
from sandbox import Sandbox
from tasks.approval import end_waiting
from tasks.dbt_core import DbtCore, DbtNode, dbt_build
from tests.dbt_project import Project
from tests.deployed import Runs as DeployedRuns
from tests.deployed import background, prefect, until
from tests.flows_fixtures import Runs, box, sources, starts, sync_parameters, two_models
from tests.flows_fixtures import runs as plain_runs
from tests.jobs_fixtures import PREFECTS_SOCKETS, collected

__all__ = ["box", "collected", "plain_runs", "sources"]

pytestmark = [*PREFECTS_SOCKETS, pytest.mark.timeout(480)]

ADA = {"decision": "approve", "name": "Ada Lovelace", "comment": "looks right"}
NO = {"decision": "reject", "name": "Ada Lovelace", "comment": "wrong day"}
POOL = "approvals"
CRM = "103"  # the first sync that is added to the catalog's


@pytest.fixture
def runs(plain_runs: Runs, box: Sandbox) -> Runs:
    """With a sync that needs no table."""
    assert box.hightouch.add_syncs(1, duration=0.2, prefix="crm") == [int(CRM)]
    return plain_runs


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks.approval, "_LOOK", 0.1)


@pytest.fixture
def client() -> Iterator[SyncPrefectClient]:
    with get_client(sync_client=True) as found:
        yield found


@pytest.fixture
def aside() -> Iterator[ThreadPoolExecutor]:
    """Where a script waits while the test answers."""
    with ThreadPoolExecutor(1) as threads:
        yield threads


def waiting(client: SyncPrefectClient, run_id: UUID, *, again: bool = False) -> FlowRun:
    """The run, once it waits; an end that it comes to instead is an error, unless it is run again."""

    def look() -> FlowRun | None:
        run = client.read_flow_run(run_id)
        assert run.state is not None
        assert again or not run.state.is_final(), f"{run.state.name}: {run.state.message}"
        # The form is saved after the run is paused.
        saved = httpx.post(
            f"{client.api_url}/flow_runs/{run_id}/input/filter",
            json={"prefix": f"{str(run.state.name).lower()}-{run.state.state_details.pause_key}-schema"},
        )
        return run if run.state.is_paused() and saved.json() else None

    return until(f"run {run_id} waits", look, within=180)


def answer(client: SyncPrefectClient, run_id: UUID, said: dict[str, Any]) -> OrchestrationResult[Any]:
    found: OrchestrationResult[Any] = client.resume_flow_run(run_id, said)
    return found


def artifacts(client: SyncPrefectClient, run_id: UUID, key: str) -> list[tuple[str, str]]:
    """Description and text of the run's artifacts, oldest first."""
    of_run = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[run_id]))
    found = [one for one in client.read_artifacts(artifact_filter=of_run, limit=100) if one.key == key]
    return [(str(one.description), str(one.data)) for one in sorted(found, key=lambda one: str(one.created))]


def chain(*names: str, **settings: Any) -> dict[str, Any]:
    """Two small syncs, then one activation that has to be approved."""
    return {
        "syncs": sync_parameters(*(names or ("airlines", "airports"))),
        "activations": [
            {"tool": "hightouch", "credentials": "hightouch", "sync_id": CRM, "policy": {"poll": 0.1}}
        ],
        "approval": {"before": ["activations"], "timeout": 60},
        **settings,
    }


def steps(state: State[Any]) -> dict[str, tuple[str, str | None]]:
    """The report's steps: name to state and message."""
    found: Any = state.result(raise_on_failure=False)
    report = getattr(found, "report", found)
    return {step.name: (step.state.value, step.message) for step in report.steps}


def sent(box: Sandbox) -> int:
    return len(box.hightouch.runs_of(CRM))


# -- in a script: the process waits -------------------------------------------------------------------------


def test_approved_in_a_script(
    box: Sandbox, runs: Runs, client: SyncPrefectClient, aside: ThreadPoolExecutor
) -> None:
    """The run pauses before its activations; approved it goes on, and who, when and why are kept."""
    notify = [{"tool": "slack", "webhook": "data-alerts"}]
    run_id = runs.create(elt_chain, chain(notify=notify))
    done = aside.submit(runs.run, elt_chain, run_id)
    paused = waiting(client, run_id)
    assert paused.state is not None
    assert paused.state.name == "Paused"
    assert (starts(box), sent(box)) == (2, 0)
    assert answer(client, run_id, ADA).status is SetStateStatus.ACCEPT
    state = done.result(60)
    assert state.name == "Completed", state.message
    assert (starts(box), sent(box)) == (2, 1)
    assert steps(state)["approval of the activations"] == (
        "SUCCEEDED",
        "approved by Ada Lovelace: looks right",
    )
    ((description, text),) = artifacts(client, run_id, "approval-the-activations")
    assert re.fullmatch(
        r"approved by Ada Lovelace: looks right \(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC\)", description
    )
    assert text.startswith("# Approved by Ada Lovelace: the activations\n\n> looks right\n")
    assert "| ✓ | airports | SUCCEEDED |" in text  # what was shown
    before, after = artifacts(client, run_id, "elt-report")
    assert before[0].startswith("waits for approval until ")
    assert after[0] == "4 of 4 steps done"
    told = [message.text for message in box.slack.messages]
    assert [text for text in told if "◦ *approval of the activations* is waited for" in text] == told[:1]
    assert "✓ *approval of the activations* is no longer waited for" in told[1]
    assert len(told) == 2


def test_rejected_and_asked_again(
    box: Sandbox, runs: Runs, client: SyncPrefectClient, aside: ThreadPoolExecutor
) -> None:
    """Rejected, the run fails as Rejected with nothing sent; retried, it asks again and repeats nothing."""
    always = {
        "tool": "python",
        "call": "tests.own_functions:greet",
        "arguments": {"name": "Ada"},
        "when": "always",
    }
    run_id = runs.create(
        elt_chain, chain(allow_failure="any", after=[always, {**always, "when": "complete"}])
    )
    done = aside.submit(runs.run, elt_chain, run_id)
    waiting(client, run_id)
    answer(client, run_id, NO)
    state = done.result(60)
    assert (state.type, state.name) == (StateType.FAILED, "Rejected")
    told = steps(state)
    assert told["approval of the activations"] == ("CANCELLED", "rejected by Ada Lovelace: wrong day")
    assert told["crm-103"] == ("HELD", "rejected by Ada Lovelace: wrong day")
    again = aside.submit(runs.run, elt_chain, run_id)
    waiting(client, run_id, again=True)
    answer(client, run_id, ADA)
    assert again.result(60).name == "Completed"
    assert (starts(box), sent(box)) == (2, 1)
    assert [said.split(" (")[0] for said, _ in artifacts(client, run_id, "approval-the-activations")] == [
        "rejected by Ada Lovelace: wrong day",
        "approved by Ada Lovelace: looks right",
    ]


def test_an_approval_outlives_a_failure_behind_it(
    box: Sandbox, runs: Runs, client: SyncPrefectClient, aside: ThreadPoolExecutor
) -> None:
    """What failed after the approval is retried without asking again: what was approved is the same."""
    box.hightouch.set(CRM, outcome="fail", times=1)
    run_id = runs.create(elt_chain, chain())
    done = aside.submit(runs.run, elt_chain, run_id)
    waiting(client, run_id)
    answer(client, run_id, ADA)
    assert done.result(60).name == "Failed"
    assert runs.run(elt_chain, run_id).name == "Completed"
    assert (starts(box), sent(box)) == (2, 2)
    assert len(artifacts(client, run_id, "approval-the-activations")) == 1


def test_silence_in_a_script(box: Sandbox, runs: Runs, client: SyncPrefectClient) -> None:
    """Nobody answers: the run is Rejected, what was ready is held back, and the people are told."""
    settings = {
        "approval": {"before": ["activations"], "timeout": 1.5},
        "notify": [{"tool": "slack", "webhook": "data-alerts"}],
    }
    run_id = runs.create(elt_chain, chain(**settings))
    state = runs.run(elt_chain, run_id)
    assert (state.type, state.name) == (StateType.FAILED, "Rejected")
    assert steps(state)["approval of the activations"] == ("FAILED", "not approved within 1.5 s")
    assert steps(state)["crm-103"] == ("HELD", "not approved within 1.5 s")
    assert sent(box) == 0
    assert answer(client, run_id, ADA).status is SetStateStatus.ABORT
    told = box.slack.messages[-1].text
    assert "✗ *approval of the activations* was not given: not approved within 1.5 s" in told
    assert "○ held back: crm-103" in told


def test_asked_before_the_load(
    box: Sandbox, runs: Runs, client: SyncPrefectClient, aside: ThreadPoolExecutor
) -> None:
    """Before a load nothing is started until it is approved; both may be asked for, and either ends it."""
    approval = {"before": ["load", "activations"], "message": "A **whole** reload."}
    run_id = runs.create(elt_chain, chain(approval=approval))
    done = aside.submit(runs.run, elt_chain, run_id)
    key = waiting(client, run_id).state.state_details.pause_key  # type: ignore[union-attr]
    shown = client.request(
        "GET", "/flow_runs/{id}/input/{key}", path_params={"id": run_id, "key": f"paused-{key}-description"}
    ).json()
    assert shown.startswith("A **whole** reload.\n\n- sync: airlines (airbyte)\n- sync: airports (airbyte)")
    assert starts(box) == 0
    answer(client, run_id, ADA)
    until("the syncs have run", lambda: starts(box) == 2)
    until(
        "it asks again",
        lambda: waiting(client, run_id).state.state_details.pause_key != key,  # type: ignore[union-attr]
    )
    answer(client, run_id, NO)
    told = steps(done.result(60))
    assert told["approval of the load"][0] == "SUCCEEDED"
    assert told["approval of the activations"][0] == "CANCELLED"
    assert sent(box) == 0


def test_a_load_that_is_not_approved(
    box: Sandbox, runs: Runs, client: SyncPrefectClient, aside: ThreadPoolExecutor
) -> None:
    """Rejected before the load, nothing at all is done, and the report names everything as held back."""
    before = [
        {"tool": "python", "call": "tests.own_functions:greet", "arguments": {"name": "Ada"}, "name": "first"}
    ]
    run_id = runs.create(elt_chain, chain(approval={"before": ["load"]}, before=before))
    done = aside.submit(runs.run, elt_chain, run_id)
    waiting(client, run_id)
    answer(client, run_id, NO)
    told = steps(done.result(60))
    assert {name: state for name, (state, _) in told.items()} == {
        "approval of the load": "CANCELLED",
        "first": "HELD",
        "airlines": "HELD",
        "airports": "HELD",
        "crm-103": "HELD",
    }
    assert (starts(box), sent(box)) == (0, 0)


@pytest.mark.parametrize(
    ("said", "why"),
    [
        (None, "'decision' is a required property"),
        ({"decision": "approve"}, "'name' is a required property"),
        ({**ADA, "name": "  "}, "does not match"),
        ({**ADA, "decision": "maybe"}, "is not one of"),
        ({**ADA, "approved": True}, "Additional properties"),
    ],
    ids=["nothing", "nobody", "a blank name", "neither", "more"],
)
def test_an_answer_that_is_none(
    runs: Runs, client: SyncPrefectClient, aside: ThreadPoolExecutor, said: Any, why: str
) -> None:
    """What is not an answer is refused with the reason, and the run goes on waiting."""

    @flow
    def asks() -> str:
        return request_approval("the rest").sentence

    run_id = runs.create(asks, {})
    done = aside.submit(runs.run, asks, run_id)
    waiting(client, run_id)
    refused = answer(client, run_id, said)
    assert refused.status is SetStateStatus.REJECT
    assert why in str(refused.details)
    assert client.read_flow_run(run_id).state.is_paused()  # type: ignore[union-attr]
    answer(client, run_id, NO)
    assert done.result(60).result() == "rejected by Ada Lovelace: wrong day"


def test_nothing_to_approve(box: Sandbox, runs: Runs) -> None:
    """Where every activation is held back by lineage, nobody is asked."""
    box.airbyte.set("airlines", outcome="fail", times=1)
    state = runs.run(elt_chain, runs.create(elt_chain, chain(allow_failure="any")))
    assert state.name == "PartiallyRefreshed"
    assert "approval of the activations" not in steps(state)


def test_an_approval_of_nothing_is_refused(box: Sandbox, runs: Runs) -> None:
    """To approve activations where there are none is a mistake, said before anything is started."""
    state = runs.run(elt_chain, runs.create(elt_chain, chain(activations=[])))
    assert "before the activations, and this run has none. Nothing was started." in str(state.message)
    assert starts(box) == 0


# -- of a deployment: the run is suspended ------------------------------------------------------------------


def deploy(client: SyncPrefectClient, deployed: Flow[..., Any], name: str, **settings: Any) -> UUID:
    """A deployment of a flow on the pool of these tests."""
    return client.create_deployment(
        flow_id=client.create_flow(deployed),
        name=name,
        entrypoint=f"{deployed.fn.__module__}.{deployed.fn.__name__}",
        work_pool_name=POOL,
        pull_steps=[{"deployments.steps.change_to_repository": {}}],
        parameter_openapi_schema=parameter_schema(deployed).model_dump_for_openapi(),
        **settings,
    )


@pytest.fixture(scope="module")
def pool(prefect_server: str) -> Iterator[str]:
    """A work pool with the deployment that ends the waiting."""
    prefect("work-pool", "create", POOL, "--type", "process", "--overwrite")
    with get_client(sync_client=True) as client:
        deploy(client, end_approval, "at-the-deadline")
    yield POOL
    with get_client(sync_client=True) as client:
        for deployment in client.read_deployments():
            if deployment.work_pool_name == POOL:
                client.request("DELETE", "/deployments/{id}", path_params={"id": deployment.id})


done_before: list[int] = []


@task(persist_result=True, cache_policy=RUN_ID)
def before() -> None:
    done_before.append(1)


@flow
def asks_once(within: float) -> str:
    before()
    return request_approval("the rest", timeout=within).sentence


@flow
async def builds_and_asks(dbt: DbtCore) -> list[DbtNode]:
    built = await dbt_build(dbt)
    await arequest_approval("the rest")
    return built.nodes


@pytest.fixture
def suspended(pool: str, client: SyncPrefectClient) -> DeployedRuns:
    """A flow with a deployment, whose runs are taken up here and not by a worker."""
    done_before.clear()
    deploy(client, asks_once, "by-nobody")
    return DeployedRuns(client, str(client.api_url))


def take_up(client: SyncPrefectClient, run_id: UUID, of: Flow[..., Any] = asks_once) -> State[Any] | None:
    """Run what a worker would run; None if it is suspended."""
    run = client.read_flow_run(run_id)
    try:
        found: Any = run_flow(of, flow_run=run, parameters=run.parameters, return_type="state")
    except Pause:
        return None
    assert isinstance(found, State)
    return found


def test_a_late_approval_does_not_go_through(suspended: DeployedRuns, client: SyncPrefectClient) -> None:
    """Approved after the deadline, while no worker was there to end the waiting, the answer is still no."""
    run_id = suspended.start("asks-once/by-nobody", within=0.5)
    assert take_up(client, run_id) is None
    deadline = datetime.now(UTC) + timedelta(seconds=0.6)
    until("the time is up", lambda: datetime.now(UTC) > deadline)
    assert answer(client, run_id, ADA).status is SetStateStatus.ACCEPT
    state = take_up(client, run_id)
    assert state is not None
    assert state.result() == "not approved within 0.5 s (Ada Lovelace answered after that)"
    assert done_before == [1]


def test_moved_on_by_hand(suspended: DeployedRuns, client: SyncPrefectClient) -> None:
    """A run that somebody schedules without an answer asks again, with the same deadline."""
    run_id = suspended.start("asks-once/by-nobody", within=100)
    assert take_up(client, run_id) is None
    (first,) = _questions(client, run_id)
    client.set_flow_run_state(run_id, Scheduled())
    assert take_up(client, run_id) is None
    _, second = _questions(client, run_id)
    assert second["deadline"] == first["deadline"]
    assert second["key"] != first["key"]
    assert answer(client, run_id, ADA).status is SetStateStatus.ACCEPT
    assert take_up(client, run_id).result() == "approved by Ada Lovelace: looks right"  # type: ignore[union-attr]
    assert done_before == [1]


def test_killed_after_the_answer(suspended: DeployedRuns, client: SyncPrefectClient) -> None:
    """A run that dies after its approval is not asked again when it is taken up."""
    run_id = suspended.start("asks-once/by-nobody", within=100)
    assert take_up(client, run_id) is None
    answer(client, run_id, ADA)
    client.set_flow_run_state(run_id, State(type=StateType.CRASHED), force=True)
    client.set_flow_run_state(run_id, AwaitingRetry(), force=True)
    assert take_up(client, run_id).result() == "approved by Ada Lovelace: looks right"  # type: ignore[union-attr]
    assert done_before == [1]


def test_another_connection_than_those_that_were_approved(
    box: Sandbox, runs: Runs, pool: str, client: SyncPrefectClient
) -> None:
    """What is selected while a run waits was seen by nobody: it is asked again, and only then loaded.

    The record of each approval says what was shown for it.
    """
    for name, tags in (
        ("airlines", ["agreed"]),
        ("airports", ["agreed"]),
        ("planes", []),
        ("weather", []),
    ):
        box.airbyte.set(name, tags=tags)
    selection = {"tool": "airbyte-connections", "server": "airbyte", "tags": ["agreed"]}
    notify = [{"tool": "slack", "webhook": "data-alerts", "pipeline": "by-tag"}]
    asked = chain(approval={"before": ["load"]}, activations=[], notify=notify)
    asked["syncs"] = [{**selection, "policy": {"poll": 0.1}}]
    run_id = client.create_flow_run_from_deployment(deploy(client, elt_chain, "by-tag", parameters=asked)).id
    assert take_up(client, run_id, elt_chain) is None
    box.airbyte.set("planes", tags=["agreed"])
    assert answer(client, run_id, ADA).status is SetStateStatus.ACCEPT
    assert take_up(client, run_id, elt_chain) is None
    assert starts(box) == 0
    box.airbyte.set("weather", tags=["agreed"])
    assert answer(client, run_id, {**ADA, "name": "Hedy Lamarr"}).status is SetStateStatus.ACCEPT
    assert take_up(client, run_id, elt_chain) is None
    first, second, third = sorted(_questions(client, run_id), key=lambda question: str(question["key"]))
    assert "planes" not in first["shown"]
    assert ("planes" in second["shown"], "weather" in second["shown"]) == (True, False)
    assert ("planes" in third["shown"], "weather" in third["shown"]) == (True, True)
    assert second["deadline"] > first["deadline"]
    told = [message.text for message in box.slack.messages]
    assert "◦ *approval of the load* is waited for" in told[0]
    for later in told[1:3]:
        assert "◦ *approval of the load, which has changed since it was given,* is waited for" in later
    assert answer(client, run_id, {**ADA, "name": "Grace Hopper"}).status is SetStateStatus.ACCEPT
    ended = take_up(client, run_id, elt_chain)
    assert ended is not None
    assert ended.name == "Completed", ended.message
    assert starts(box) == 4
    records = artifacts(client, run_id, "approval-the-load")
    assert [(said.split(":")[0], "planes" in text, "weather" in text) for said, text in records] == [
        ("approved by Ada Lovelace", False, False),
        ("approved by Hedy Lamarr", True, False),
        ("approved by Grace Hopper", True, True),
    ]
    assert box.slack.messages[-1].text.count("is no longer waited for") == 3


async def test_resumed_elsewhere(pool: str, client: SyncPrefectClient, tmp_path: Path) -> None:
    """On a machine that has no stored results, dbt does not build again what it built before the question."""
    project = Project(tmp_path)
    project.model("one", "select 1 as id")
    deploy(client, builds_and_asks, "by-nobody", parameters={"dbt": project.core().model_dump(mode="json")})
    run = client.create_flow_run_from_deployment(
        client.read_deployment_by_name("builds-and-asks/by-nobody").id
    )
    with temporary_settings({PREFECT_LOCAL_STORAGE_PATH: tmp_path / "here"}), pytest.raises(Pause):
        await run_flow(builds_and_asks, flow_run=run, parameters=run.parameters)
    answer(client, run.id, ADA)
    run = client.read_flow_run(run.id)
    with temporary_settings({PREFECT_LOCAL_STORAGE_PATH: tmp_path / "there"}):
        nodes = await run_flow(builds_and_asks, flow_run=run, parameters=run.parameters)
    assert [(node.name, node.earlier) for node in nodes] == [("one", True)]


def test_the_run_that_ends_the_waiting(suspended: DeployedRuns, client: SyncPrefectClient) -> None:
    """It waits for the deadline, is gone when there is an answer, and leaves a later question alone."""
    run_id = suspended.start("asks-once/by-nobody", within=100)
    assert take_up(client, run_id) is None
    (question,) = _questions(client, run_id)
    ender = client.read_flow_run(UUID(question["ender"]))
    assert ender.expected_start_time == datetime.fromisoformat(question["deadline"])
    assert ender.parameters == {"flow_run_id": str(run_id), "key": question["key"]}
    assert run_coro_as_sync(end_waiting(run_id, "approval-of-another-1")) == "it has been answered"
    assert client.read_flow_run(run_id).state.is_paused()  # type: ignore[union-attr]
    answer(client, run_id, ADA)
    take_up(client, run_id)
    assert ender.id not in {run.id for run in suspended.of("end-approval/at-the-deadline")}


def _questions(client: SyncPrefectClient, run_id: UUID) -> list[dict[str, Any]]:
    found = client.request(
        "POST",
        "/flow_runs/{id}/input/filter",
        path_params={"id": run_id},
        json={"prefix": "approval-", "limit": 10},
    ).json()
    return [json.loads(one["value"]) for one in found]


def worker(folder: Path, log: str) -> AbstractContextManager[None]:
    """A real process worker on the pool."""
    command = ["-m", "prefect", "worker", "start", "--pool", POOL]
    return background(command, folder / log, PREFECT_WORKER_QUERY_SECONDS="1")


def test_on_a_worker(box: Sandbox, runs: Runs, pool: str, client: SyncPrefectClient, tmp_path: Path) -> None:
    """Suspended, a run holds neither process nor slot; answered under another worker, it repeats nothing.

    Not even what failed: what goes on is what was approved.
    """
    project = two_models(tmp_path / "shop", below_places=f"hightouch_sync_id: {CRM}")
    box.airbyte.set("airlines", outcome="fail", times=1)
    other = {"tool": "hightouch", "credentials": "hightouch", "sync_id": "101"}
    asked = chain(
        transform={
            "tool": "dbt-core",
            "project_dir": str(project.folder),
            "env": {"SHOP_WAREHOUSE": str(box.warehouse.path)},
        },
        allow_failure="any",
    )
    asked = {**asked, "activations": [*asked["activations"], other]}
    asked["approval"]["timeout"] = 3600
    deployment = deploy(client, elt_chain, "approved", parameters=asked, concurrency_limit=1)
    run_id = client.create_flow_run_from_deployment(deployment).id
    with worker(tmp_path, "first.log"):
        run = waiting(client, run_id)
        assert run.state is not None
        assert run.state.name == "Suspended"
        pid = int(str(run.infrastructure_pid).rsplit(":", 1)[-1])
        until("its process has ended", lambda: not psutil.pid_exists(pid))
    (limit,) = [
        found
        for found in client.request("POST", "/v2/concurrency_limits/filter", json={}).json()
        if found["name"] == f"deployment:{deployment}"
    ]
    assert limit["active_slots"] == 0
    assert (starts(box), sent(box)) == (2, 0)
    assert answer(client, run_id, ADA).status is SetStateStatus.ACCEPT
    with worker(tmp_path, "second.log"):
        ended = DeployedRuns(client, str(client.api_url)).ended(run_id, within=180)
    assert ended.state is not None
    assert ended.state.name == "PartiallyRefreshed", ended.state.message
    names = [state.name for state in client.read_flow_run_states(run_id)]
    assert names.count("Suspended") == names.count("Resuming") == 1
    assert (starts(box), sent(box), len(box.hightouch.runs_of("101"))) == (2, 1, 0)
    assert len(artifacts(client, run_id, "dbt-nodes")) == 1
    ((_, text),) = artifacts(client, run_id, "approval-the-activations")
    assert "| ✗ | airlines | FAILED<br>" in text
    assert "| ◐ | dbt build (shop) | PARTIAL<br>" in text
    report = artifacts(client, run_id, "elt-report")[-1][1]
    assert (
        "| ✓ | approval of the activations | SUCCEEDED<br>approved by Ada Lovelace: looks right |" in report
    )
    assert '["crm-103: 0 rows"]:::ok' in report
    assert '["carrier-scorecard-to-crm"]:::held' in report
    assert [run for run in _of(client, "end-approval/at-the-deadline") if _asks_for(run, run_id)] == []


def test_silence_on_a_worker(
    box: Sandbox, runs: Runs, pool: str, client: SyncPrefectClient, tmp_path: Path
) -> None:
    """Nobody answers a suspended run: at the deadline it is resumed, and rejects itself and tells so."""
    asked = chain(approval={"timeout": 12}, notify=[{"tool": "slack", "webhook": "data-alerts"}])
    deployment = deploy(client, elt_chain, "unanswered", parameters=asked)
    run_id = client.create_flow_run_from_deployment(deployment).id
    with worker(tmp_path, "worker.log"):
        assert waiting(client, run_id).state.name == "Suspended"  # type: ignore[union-attr]
        ended = DeployedRuns(client, str(client.api_url)).ended(run_id, within=180)
        until(
            "its end was seen to",
            lambda: (
                [
                    run.state.message
                    for run in _of(client, "end-approval/at-the-deadline")
                    if run.state and run.state.is_completed() and _asks_for(run, run_id)
                ]
                == ["nobody has answered in time"]
            ),
        )
    assert ended.state is not None
    assert (ended.state.type, ended.state.name) == (StateType.FAILED, "Rejected")
    assert (starts(box), sent(box)) == (2, 0)
    report = artifacts(client, run_id, "elt-report")[-1][1]
    assert "| ○ | crm-103 | HELD<br>not approved within 12 s |" in report
    assert "*approval of the activations* was not given" in box.slack.messages[-1].text


def _of(client: SyncPrefectClient, deployment: str) -> list[FlowRun]:
    return DeployedRuns(client, str(client.api_url)).of(deployment)


def _asks_for(run: FlowRun, run_id: UUID) -> bool:
    return run.parameters["flow_run_id"] == str(run_id)


def test_nobody_would_end_the_waiting(runs: Runs, client: SyncPrefectClient, box: Sandbox) -> None:
    """Without a deployment of `end-approval` a run of a deployment does not begin."""
    prefect("work-pool", "create", POOL, "--type", "process", "--overwrite")
    for found in client.read_deployments():
        if found.name == "at-the-deadline":
            client.request("DELETE", "/deployments/{id}", path_params={"id": found.id})
    deployment = deploy(client, elt_chain, "unended", parameters=chain())
    run = client.create_flow_run_from_deployment(deployment)
    state: Any = run_flow(elt_chain, flow_run=run, parameters=run.parameters, return_type="state")
    assert "needs a deployment of the flow end-approval" in str(state.message)
    assert starts(box) == 0
