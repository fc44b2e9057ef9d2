"""A Prefect server of a test's own, to stop, kill and start again; the suite's own must stay up."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings

from deployments.server import LocalServer, free_port


@pytest.fixture(scope="module")
def server_folder() -> Iterator[Path]:
    """A folder that everybody may enter, as PostgreSQL has to when root starts it; pytest's own is not."""
    with TemporaryDirectory(prefix="elt-flows-server-") as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.fixture(scope="module")
def own_server(server_folder: Path) -> Iterator[LocalServer]:
    """A Prefect server on a PostgreSQL of its own.

    `environment` is for processes that shall use it, `using` for the test itself; `stop_prefect` (also
    `at_once`, by SIGKILL) and `start_prefect` take it away and bring it back with its data.
    """
    with LocalServer(server_folder / "server", free_port(), durable=False) as server:
        yield server


@contextmanager
def using(server: LocalServer) -> Iterator[None]:
    """Prefect's clients of this process use that server, and so do processes that are started meanwhile."""
    before = os.environ["PREFECT_API_URL"]
    os.environ["PREFECT_API_URL"] = server.api_url
    try:
        with temporary_settings({PREFECT_API_URL: server.api_url}):
            yield
    finally:
        os.environ["PREFECT_API_URL"] = before
