"""One real Prefect server for the whole suite, and a sandbox for each test that asks for it."""

from __future__ import annotations

import atexit
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest

from deployments.server import LocalServer, ServerError, free_port  # imports no prefect
from tests import warm_dbt as warm_dbt_process

if TYPE_CHECKING:
    from blocks import AirbyteServer
    from sandbox import Sandbox

# The tests start hundreds of processes, each of which would compile all that it imports.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# A shell that starts something in the background has it ignore Ctrl-C, and all that it starts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Set before prefect is imported: its settings are read once.
_HOME = tempfile.mkdtemp(prefix="elt-flows-tests-")
atexit.register(shutil.rmtree, _HOME, ignore_errors=True)
Path(_HOME).chmod(0o755)  # started by root, PostgreSQL runs as another user, who has to enter it

_PORT = free_port()
API_URL = f"http://127.0.0.1:{_PORT}/api"
os.environ.update(
    PREFECT_HOME=_HOME,
    PREFECT_API_URL=API_URL,
    PREFECT_SERVER_ANALYTICS_ENABLED="false",
    PREFECT_SERVER_ALLOW_EPHEMERAL_MODE="false",
    PREFECT_LOGGING_LEVEL="INFO",
    DO_NOT_TRACK="1",
    # Of a server: an event can be asked for after a second, not five.
    PREFECT_SERVER_SERVICES_EVENT_PERSISTER_FLUSH_INTERVAL="1",
)
from prefect.events.worker import EventsWorker  # noqa: E402 - after the settings
from prefect.logging.handlers import APILogHandler  # noqa: E402

_SERVING: list[LocalServer] = []
_LEFT = ("deployments", "automations", "v2/concurrency_limits", "block_documents", "work_pools")


@pytest.fixture(autouse=True)
def _served(request: pytest.FixtureRequest) -> None:
    """The Prefect server is there for every test that is not marked as one that needs none."""
    if request.node.get_closest_marker("no_server") is None:
        request.getfixturevalue("prefect_server")


@pytest.fixture(scope="session")
def prefect_server() -> Iterator[str]:
    """The API's address. The ephemeral server would lose task runs and start anew for every process."""
    try:
        server = LocalServer(Path(_HOME), _PORT, durable=False).start()
    except ServerError as error:
        pytest.exit(str(error), 3)
    try:
        _SERVING.append(server)
        yield server.api_url
        # What is still on its way to the server would complain that there is none.
        APILogHandler().flush()
        EventsWorker.drain_all()
    finally:
        server.stop()


@pytest.fixture(scope="module", autouse=True)
def _left_nothing() -> Iterator[None]:
    """No file finds what another has put on the server: which comes before which is up to the workers."""
    yield
    if _SERVING:
        with httpx.Client(base_url=API_URL, timeout=60) as api:
            for kind in _LEFT:
                while found := api.post(f"/{kind}/filter", json={"limit": 200}).raise_for_status().json():
                    for one in found:
                        key = one["name"] if kind == "work_pools" else one["id"]
                        gone = api.delete(f"/{kind}/{key}")
                        assert gone.is_success or gone.status_code == 404, gone.text


@pytest.fixture(scope="session")
def _imported_dbt() -> Iterator[str]:
    yield from warm_dbt_process.running(Path(_HOME))


@pytest.fixture(scope="module")
def warm_dbt(_imported_dbt: str) -> Iterator[None]:
    """Builds of this process do not import dbt anew each time: see `tests/warm_dbt.py`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ELT_TESTS_WARM_DBT", _imported_dbt)
        patch.setattr("tasks.dbt.process._CHILD", Path(warm_dbt_process.__file__))
        yield


@pytest.fixture
def cold_dbt(monkeypatch: pytest.MonkeyPatch) -> None:
    """dbt is started as it is anywhere else, for a test that is about its process."""
    from tasks.dbt import child

    monkeypatch.setattr("tasks.dbt.process._CHILD", Path(child.__file__))


@pytest.fixture
def sandbox(tmp_path: Path) -> Iterator[Sandbox]:
    """The vendors on a free port, with jobs of 0.3 s and a warehouse of their own."""
    from sandbox import Sandbox

    with Sandbox(tmp_path, job_seconds=0.3) as running:
        yield running


@pytest.fixture
def airbyte(sandbox: Sandbox) -> AirbyteServer:
    """The block for the sandbox's Airbyte, not saved."""
    from blocks import AirbyteServer
    from sandbox import catalog

    return AirbyteServer(
        base_url=sandbox.airbyte_url, client_id=catalog.CLIENT_ID, client_secret=catalog.CLIENT_SECRET
    )


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say aloud that nothing was compared with the vendors' own files, where that is so."""
    skipped = terminalreporter.stats.get("skipped", [])
    count = sum("ELT_SPECS is not set" in str(report.longrepr) for report in skipped)
    if count:
        terminalreporter.section("NOT TESTED: the vendors' OpenAPI files", red=True)
        terminalreporter.line(
            f"ELT_SPECS names no folder, so {count} tests that hold our clients and the sandbox against the "
            "vendors' own files did not run."
        )


# Longest first, so that none of them begins when the others are about to end: a file is one worker's.
_SLOW = (
    "test_backfill",
    "test_flows",
    "test_approval",
    "test_reload",
    "test_gates",
    "test_deploy",
    "test_dbt_core",
    "test_check_dbt",
    "test_dbt_retry",
    "test_kafka",
    "test_bench",
    "test_burst",
    "test_deployments",
    "test_survival",
    "test_dbt_layouts",
    "test_server_away",
    "test_dbt_cloud_chain",
    "test_warm",
    "test_receiver_process",
    "test_server",
    "test_dbt_jobs",
    "test_arrivals",
    "test_outcomes",
    "test_postgres",
    "test_production_server",
    "test_sqs",
    "test_rescue",
    "test_sandbox_project",
)
_LONGEST = (
    *_SLOW,
    "test_runner",
    "test_steps",
    "test_faults",
    "test_database_events",
    "test_alerts",
    "test_intervals",
    "test_http_job",
    "test_specs",
    "test_hightouch",
    "test_s3",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order the files for `--dist loadfile --no-loadscope-reorder`, which hands them out as they come."""
    rank = {name: place for place, name in enumerate(_LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))
    for item in items:
        if item.path.stem in _SLOW:
            item.add_marker("slow")
