"""Our clients and the sandbox against the vendors' own OpenAPI files, exchange by exchange.

Each vendor's client and sandbox are driven through their calls over a socket; what went over the wire is then
held against the file. Where a vendor's file is known to be wrong, `spec_slips.py` says so.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import get_args

import pytest

from sandbox.faults import Vendor
from tests.jobs_fixtures import PREFECTS_SOCKETS, collected
from tests.spec_drives import AIRBYTE_PREFIX, Drive, airbyte_contract
from tests.spec_fixtures import Contract, Exchange, distinct, folder, untried, witnessed

__all__ = ["collected"]

pytestmark = [*PREFECTS_SOCKETS, pytest.mark.no_server]


# -- and held against


@dataclass(frozen=True)
class Driven:
    """What one vendor was driven through, and what it is held against."""

    contract: Contract
    exchanges: list[Exchange]
    untried: list[str]


_Contract = Callable[[Path], Contract]
_Drive = Callable[[Drive], Awaitable[None]]


def _found() -> dict[str, tuple[_Contract, _Drive]]:
    """Every `drive_<vendor>` of a `spec_*.py` in this folder, with the `<vendor>_contract` beside it."""
    found = {}
    for file in sorted(Path(__file__).parent.glob("spec_*.py")):
        module = vars(import_module(f"tests.{file.stem}"))
        for name, drive in module.items():
            if name.startswith("drive_"):
                vendor = name.removeprefix("drive_")
                found[vendor] = (module[f"{vendor}_contract"], drive)
    return found


VENDORS = _found()


def test_no_vendor_is_left_out() -> None:
    """Every vendor of the sandbox is held against its file, but for those that publish none."""
    assert VENDORS.keys() >= set(get_args(Vendor)) - {"slack", "power_bi", "tableau"}


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
