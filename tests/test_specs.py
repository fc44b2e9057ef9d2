"""Our clients and the sandbox against the vendors' own OpenAPI files, exchange by exchange.

Each vendor's client and sandbox are driven through their calls over a socket; what went over the wire is then
held against the file. Where a vendor's file is known to be wrong, `spec_slips.py` says so.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.jobs_fixtures import PREFECTS_SOCKETS, collected
from tests.spec_census import census_contract, drive_census
from tests.spec_dbt_cloud import dbt_cloud_contract, drive_dbt_cloud
from tests.spec_drives import Drive, drive_airbyte, drive_airbyte_config, drive_hightouch, drive_pagerduty
from tests.spec_fivetran import drive_fivetran, fivetran_contract
from tests.spec_fixtures import Contract, Exchange, distinct, folder, read, untried, witnessed
from tests.spec_slips import AIRBYTE_CONFIG, AIRBYTE_PUBLIC, HIGHTOUCH, PAGERDUTY, airbyte_public

__all__ = ["collected"]

pytestmark = [*PREFECTS_SOCKETS, pytest.mark.no_server]

AIRBYTE_PREFIX = "/api/public/v1"
HIGHTOUCH_PREFIX = "/hightouch/api/v1"


# -- and held against


@dataclass(frozen=True)
class Driven:
    """What one vendor was driven through, and what it is held against."""

    contract: Contract
    exchanges: list[Exchange]
    untried: list[str]


def airbyte_contract(files: Path) -> Contract:
    document = airbyte_public(read(files / "airbyte-public-api.yaml"), read(files / "airbyte-problems.yaml"))
    return Contract(document, AIRBYTE_PREFIX, "https://api.airbyte.com/v1", AIRBYTE_PUBLIC)


def airbyte_config_contract(files: Path) -> Contract:
    document = read(files / "airbyte-config-api.yaml")
    return Contract(document, "/api/v1", "https://cloud.airbyte.com/api/v1", AIRBYTE_CONFIG)


def hightouch_contract(files: Path) -> Contract:
    return Contract(
        read(files / "hightouch.yaml"), HIGHTOUCH_PREFIX, "https://api.hightouch.com/api/v1", HIGHTOUCH
    )


def pagerduty_contract(files: Path) -> Contract:
    document = read(files / "pagerduty-events-v2.json")
    return Contract(document, "/pagerduty/v2", "https://events.pagerduty.com/v2", PAGERDUTY)


VENDORS: dict[str, tuple[Callable[[Path], Contract], Callable[[Drive], Awaitable[None]]]] = {
    "airbyte": (airbyte_contract, drive_airbyte),
    "airbyte-config": (airbyte_config_contract, drive_airbyte_config),
    "fivetran": (fivetran_contract, drive_fivetran),
    "census": (census_contract, drive_census),
    "dbt-cloud": (dbt_cloud_contract, drive_dbt_cloud),
    "hightouch": (hightouch_contract, drive_hightouch),
    "pagerduty": (pagerduty_contract, drive_pagerduty),
}


@pytest.fixture(scope="module", params=VENDORS)
def driven(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Driven:
    """One vendor, driven through its calls once for all tests."""
    contract, drive = VENDORS[request.param]
    held = contract(folder())
    state = tmp_path_factory.mktemp(f"specs-{request.param}")
    with witnessed(state, state / "warehouse.duckdb") as (sandbox, witness):
        asyncio.run(drive(Drive(sandbox)))
        exchanges = [each for each in witness.exchanges if each.path.startswith(held.prefix)]
        return Driven(held, exchanges, untried(sandbox, held.prefix, exchanges))


def test_requests_and_replies_are_the_vendors(driven: Driven) -> None:
    """What our client asks and what the sandbox answers is what the vendor's own file describes."""
    assert any(exchange.ours for exchange in driven.exchanges)
    assert driven.contract.all_faults(driven.exchanges) == []


def test_nothing_escapes_the_comparison(driven: Driven) -> None:
    """Every route that the sandbox serves for the vendor was driven."""
    assert driven.untried == []


def test_every_slip_is_needed(driven: Driven) -> None:
    """A slip of the file that we allow for is one that something runs into: the list stays short and true."""
    exchanges = distinct(driven.exchanges)
    needless = []
    for slip in driven.contract.slips:
        without = driven.contract.without(slip)
        if not any(without.faults(exchange) for exchange in exchanges):
            needless.append(slip.why)
    assert needless == []


JOB = (
    b'{"jobId":1,"status":"running","jobType":"sync","startTime":"2026-03-02T04:00:11Z",'
    b'"connectionId":"9924bcd0-99be-453d-ba47-c2c9766f7da5"}'
)


def exchange(
    method: str, target: str, *, body: bytes = b"", status: int = 200, reply: bytes = JOB, media: str = "json"
) -> Exchange:
    path, _, query = target.partition("?")
    pairs = [(name, value) for name, _, value in (pair.partition("=") for pair in query.split("&") if pair)]
    headers = {"content-type": "application/json", "user-agent": "elt-flows"}
    where = f"{AIRBYTE_PREFIX}{path}"
    return Exchange(method, where, pairs, headers, body, status, f"application/{media}", reply)


NO_JOBS = b'{"data":[]}'


@pytest.mark.parametrize(
    ("wrong", "fault"),
    [
        (exchange("GET", "/jobs/1", reply=JOB.replace(b"running", b"done")), "status: 'done' is not one of"),
        (exchange("GET", "/jobs/1", reply=JOB.replace(b"{", b'{"x":1,')), "'x' was unexpected"),
        (exchange("GET", "/jobs/1", reply=b"{}"), "'jobId' is a required property"),
        (exchange("GET", "/jobs/1", status=418), "Unknown response http status: 418"),
        (
            exchange("GET", "/jobs/1", status=404, reply=b"gone", media="problem+json"),
            "Failed to deserialize value",
        ),
        (exchange("GET", "/jobs?workspaceId=a", reply=NO_JOBS), "no query parameter 'workspaceId'"),
        (exchange("GET", "/jobs?limit=200", reply=NO_JOBS), "200 is greater than the maximum of 100"),
        (exchange("POST", "/jobs", body=b'{"jobType":"sync"}'), "'connectionId' is a required property"),
        (exchange("POST", "/jobs", body=b'{"connectionID":"a"}'), "'connectionID' was unexpected"),
        (exchange("PUT", "/jobs"), "Operation put not found"),
        (exchange("GET", "/job"), "Path not found"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_comparison_finds(wrong: Exchange, fault: str) -> None:
    """A wrong word, field, status, body, parameter, method or path is told, not let through."""
    found = airbyte_contract(folder()).faults(wrong)
    assert fault in " ".join(found)


def test_the_comparison_lets_right_ones_through() -> None:
    """What the file describes is no fault."""
    assert airbyte_contract(folder()).faults(exchange("GET", "/jobs/1")) == []
