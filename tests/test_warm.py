"""The warm worker: Prefect's own process worker with runs that are forked, against a real Prefect server."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import psutil  # type: ignore[import-untyped]
import pytest
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.objects import FlowRun
from prefect.states import Cancelling

from tests import warm_flows
from tests.deployed import REPOSITORY, Runs, until

pytestmark = pytest.mark.timeout(400)

STAND_IN = REPOSITORY / "deployments" / "warm" / "stand_in.py"
PATIENT = 120.0


@dataclass
class Warm:
    """A warm worker and its deployments `<flow>/warm`."""

    runs: Runs
    process: subprocess.Popen[bytes]
    folder: Path
    code: Path

    def start(self, flow: str, **parameters: Any) -> UUID:
        return self.runs.start(f"{flow}/warm", **parameters)

    def ended(self, run: UUID) -> FlowRun:
        return self.runs.ended(run, PATIENT)

    def where(self, name: str) -> dict[str, Any]:
        """What a run of `where` tells of itself, once it has ended well."""
        place = self.folder / name
        assert self.ended(self.start("where", place=str(place))).state_name == "Completed"
        return told(place)

    def keepers(self) -> list[psutil.Process]:
        found = []
        for process in psutil.Process(self.process.pid).children():
            with suppress(psutil.Error):  # of a run that is just ending
                if is_keeper(process.cmdline()):
                    found.append(process)
        return found

    def until_warm(self) -> None:
        """Wait until a run is forked."""
        until(
            "a run is forked",
            lambda: is_keeper(self.where(f"warm-{uuid4().hex}")["parent"]),
            PATIENT,
        )


def is_keeper(command: list[str]) -> bool:
    return "deployments.warm.keeper" in command


def told(place: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(
        until(f"{place.name} is told", lambda: place.exists() and place.read_text())
    )
    return found


@pytest.fixture(scope="module")
def client(prefect_server: str) -> Iterator[SyncPrefectClient]:
    with get_client(sync_client=True) as client:
        yield client


@pytest.fixture(scope="module")
def warm(
    client: SyncPrefectClient, prefect_server: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Warm]:
    folder = tmp_path_factory.mktemp("warm")
    code = folder / "code" / "warm_code.py"
    code.parent.mkdir()
    code.write_text("VERSION = 1\n")
    client.create_work_pool(WorkPoolCreate(name="warm", type="process"))
    for flow in (warm_flows.where, warm_flows.waits, warm_flows.fails, warm_flows.ends):
        client.create_deployment(
            client.create_flow_from_name(flow.name),
            "warm",
            entrypoint=f"tests.warm_flows.{flow.fn.__name__}",
            work_pool_name="warm",
            pull_steps=[{"prefect.deployments.steps.set_working_directory": {"directory": str(REPOSITORY)}}],
            job_variables={"env": {"ELT_TEST_MARK": f"of {flow.name}"}},
        )
    command = ["-m", "deployments.warm", "--pool", "warm", "--keep-code", "--code", "warm_code"]
    with (folder / "worker.log").open("wb") as log:
        process = subprocess.Popen(  # noqa: S603
            [sys.executable, *command],
            cwd=REPOSITORY,
            env={**os.environ, "PYTHONPATH": str(code.parent)},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    worker = Warm(Runs(client, prefect_server), process, folder, code)
    try:
        worker.until_warm()
        yield worker
        family = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGTERM)
        process.wait(PATIENT)
        until("keepers and stand-ins have ended", lambda: not any(p.is_running() for p in family), PATIENT)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        sys.stdout.write((folder / "worker.log").read_text()[-5000:])


def test_a_run_is_a_fork_with_its_own_surroundings(warm: Warm) -> None:
    """A run is forked from the keeper, and has folder, environment, arguments and streams of its own."""
    found = warm.where("own")
    assert is_keeper(found["parent"])
    assert found["argv"][0].endswith("engine.py")
    assert found["cwd"] == str(REPOSITORY)
    assert found["mark"] == "of where"
    assert warm.where("own-2")["pid"] != found["pid"]
    assert "on standard output" in (warm.folder / "worker.log").read_text()
    assert os.environ.get("ELT_TEST_MARK") is None


def test_cancelled(warm: Warm, client: SyncPrefectClient) -> None:
    """Cancelling reaches the flow's code as it does under Prefect's own worker, and nothing is left."""
    place = warm.folder / "cancelled"
    run = warm.start("waits", place=str(place))
    fork = psutil.Process(told(place)["pid"])
    client.set_flow_run_state(run, Cancelling())
    assert warm.ended(run).state_name == "Cancelled"
    assert told(warm.folder / "cancelled-cancelled")["pid"] == fork.pid
    until("the fork has ended", lambda: not fork.is_running(), PATIENT)


@pytest.mark.parametrize("victim", ["run", "stand-in"])
def test_killed(warm: Warm, victim: str) -> None:
    """Whether the run is killed or what stands in for it, both end and the run is Crashed."""
    place = warm.folder / f"killed-{victim}"
    run = warm.start("waits", place=str(place))
    fork = psutil.Process(told(place)["pid"])
    stand_in = warm.runs.process(run)
    assert str(STAND_IN) in stand_in.cmdline()
    (fork if victim == "run" else stand_in).kill()
    ended = warm.ended(run)
    assert ended.state_name == "Crashed"
    assert ended.state is not None
    assert "-9" in str(ended.state.message)
    until("both have ended", lambda: not (fork.is_running() or stand_in.is_running()), PATIENT)


def test_ends(warm: Warm) -> None:
    """A failed run is Failed, and a process that ends without a word is Crashed with its exit code."""
    failed, ended = warm.start("fails"), warm.start("ends", code=23)
    state = warm.ended(failed).state
    assert state is not None
    assert (state.name, "on purpose" in str(state.message)) == ("Failed", True)
    state = warm.ended(ended).state
    assert state is not None
    assert (state.name, "23" in str(state.message)) == ("Crashed", True)


def test_many_at_once(warm: Warm) -> None:
    """Thirty runs at the same time are thirty processes, and all end well."""
    places = [warm.folder / f"many-{number}" for number in range(30)]
    runs = [warm.start("where", place=str(place)) for place in places]
    assert {warm.ended(run).state_name for run in runs} == {"Completed"}
    found = [told(place) for place in places]
    assert len({one["pid"] for one in found}) == 30
    # Not all: one that is not answered in time starts as it would without the keeper.
    assert any(is_keeper(one["parent"]) for one in found)


def test_changed_code(warm: Warm) -> None:
    """A run that begins after a change of the code has it as it is now, and runs are warm again after."""
    assert warm.where("before")["version"] == 1
    [before] = warm.keepers()
    place = warm.folder / "goes on"
    run = warm.start("waits", place=str(place))
    fork = psutil.Process(told(place)["pid"])

    warm.code.write_text("VERSION = 2\n")
    assert warm.where("after")["version"] in (None, 2)  # it imports what it needs, which this is not
    warm.until_warm()
    assert warm.where("later")["version"] == 2
    assert fork.is_running()  # what runs goes on with what it has
    assert before.is_running()
    warm.runs.client.set_flow_run_state(run, Cancelling())
    assert warm.ended(run).state_name == "Cancelled"
    until("the keeper that has retired ends with its last run", lambda: not lives(before), PATIENT)


def lives(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def test_keeper_is_killed(warm: Warm) -> None:
    """With its keeper dies a run, which is Crashed; further ones begin without, and with the next keeper."""
    place = warm.folder / "keeper is killed"
    run = warm.start("waits", place=str(place))
    fork = psutil.Process(told(place)["pid"])
    fork.parent().kill()
    assert warm.ended(run).state_name == "Crashed"
    until("the fork has ended", lambda: not lives(fork), PATIENT)
    assert warm.where("next")["cwd"] == str(REPOSITORY)
    warm.until_warm()


def test_without_a_keeper(client: SyncPrefectClient, tmp_path: Path) -> None:
    """Where no keeper listens, the stand-in becomes the engine itself."""
    place = tmp_path / "cold"
    run = client.create_flow_run(warm_flows.where, parameters={"place": str(place)})
    environment = {
        **os.environ,
        "PREFECT__FLOW_RUN_ID": str(run.id),
        "PREFECT__FLOW_ENTRYPOINT": "tests/warm_flows.py:where",
    }
    command = [sys.executable, "-I", "-S", str(STAND_IN), str(tmp_path / "no keeper")]
    with subprocess.Popen(command, cwd=REPOSITORY, env=environment) as process:  # noqa: S603
        assert process.wait(PATIENT) == 0
    assert told(place)["pid"] == process.pid
    assert client.read_flow_run(run.id).state_name == "Completed"


def in_a_keeper(code: str, *, folder: Path) -> str:
    """What a process prints that imports what `warm_code` needs."""
    script = f"from deployments.warm.keeper import *\n{code}"
    return subprocess.run(  # noqa: S603
        [sys.executable, "-c", script],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": f"{folder}:{REPOSITORY}"},
        capture_output=True,
        text=True,
        timeout=PATIENT,
        check=True,
    ).stdout


@pytest.mark.no_server
def test_code_itself_is_not_kept(tmp_path: Path) -> None:
    """What the code needs is imported and the code is not, so that each run imports its own version of it."""
    (tmp_path / "warm_code.py").write_text("import jmespath\n")
    names = ("prefect.flow_engine", "jmespath", "warm_code")
    see = f"import sys; print([name in sys.modules for name in {names}])"
    found = in_a_keeper(f"import_all(['warm_code'], keep_code=False)\n{see}", folder=tmp_path)
    assert found == "[True, True, False]\n"
    found = in_a_keeper(f"import_all(['no_such_code'], keep_code=False)\n{see}", folder=tmp_path)
    assert found == "[True, False, False]\n"
