"""A desk on each of Airbyte's two APIs."""

from __future__ import annotations

from typing import Any

import pytest

from blocks import AirbyteServer
from sandbox import Sandbox, catalog
from tasks.airbyte import AirbyteVendor
from tasks.jobs import JobPolicy
from tests.jobs_fixtures import Desk

APIS = ("public", "config")
QUICK = JobPolicy(poll=0.03, timeout=60)


def server(sandbox: Sandbox, api: str | None = None, **fields: Any) -> AirbyteServer:
    """The block for one of the sandbox's APIs; for none, with an address that does not say which."""
    urls = {"public": sandbox.airbyte_url, "config": sandbox.airbyte_config_url, None: sandbox.url}
    secret = {"client_id": catalog.CLIENT_ID, "client_secret": catalog.CLIENT_SECRET}
    return AirbyteServer(base_url=urls[api], **(fields or secret))


@pytest.fixture(params=APIS)
def both(request: pytest.FixtureRequest, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> Desk:
    """A desk on each of the two APIs."""
    monkeypatch.setattr(AirbyteVendor, "grace", 0.3)
    return Desk(sandbox, server(sandbox, request.param))


@pytest.fixture
def config(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> Desk:
    """A desk on the Config API."""
    monkeypatch.setattr(AirbyteVendor, "grace", 0.3)
    return Desk(sandbox, server(sandbox, "config"))
