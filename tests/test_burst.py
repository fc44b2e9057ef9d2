"""A hundred events at once, on a Prefect server on PostgreSQL."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from bench.latency import WAYS, Events, Way, burst


@pytest.fixture(scope="module")
def events(prefect_server: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Events]:
    with httpx.Client(base_url=f"{prefect_server}/", timeout=60) as client:
        prepared = Events(client, tmp_path_factory.mktemp("places"))
        prepared.prepare()
        yield prepared


@pytest.mark.timeout(700)
@pytest.mark.parametrize("way", WAYS)
def test_one_run_per_event(events: Events, way: Way) -> None:
    """Through Prefect's own trigger and through `hand_over`, a hundred events are a hundred runs."""
    come = burst(events, way, 100)
    assert come.runs == dict.fromkeys((f"burst-{number}" for number in range(100)), 1)
    assert come.exact
