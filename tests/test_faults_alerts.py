"""The table of faults by ways of telling: what the log says, and how often the vendor was told.

Every cell is one run that has one failure to tell, to the sandbox, over a socket. Whatever goes wrong,
telling raises nothing and ends by itself; what could not be told is said in the log.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, get_args

import pytest

from flows.parameters import Notify
from sandbox import Sandbox
from tests.alerts_fixtures import Pipeline, channel, pagerduty, webhook
from tests.sandbox_fixtures import box, sources

__all__ = ["box", "sources"]

WAYS: dict[str, Callable[[Sandbox], Pipeline]] = {
    "slack": webhook,
    "slack-channel": channel,
    "pagerduty": pagerduty,
}


@dataclass(frozen=True)
class Cell:
    """What goes wrong, and what comes of it.

    Attributes:
        fault: What the vendor answers.
        says: Part of what must be in the log; None: all was told, and nothing is warned of.
        arrived: Messages or alerts at the vendor.
        asked: Requests that it got; None: as many as there was time for.
        hurried: Whether the run waits for some 5 s only, because the fault does not pass.
    """

    fault: dict[str, Any]
    says: str | None = None
    arrived: int = 1
    asked: int | None = 1
    hurried: bool = False


def status(code: int, body: Any = None, times: int | None = None, **headers: str) -> dict[str, Any]:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return {"kind": "status", "status": code, "body": body, "times": times, "headers": named}


def html(code: int, times: int | None = 1) -> dict[str, Any]:
    return {"kind": "html", "status": code, "times": times}


POSTED = "may have been posted"
PASSES: dict[str, Any] = {"asked": 2}
# Which of the two runs out of time first, the attempts or the waiting for them, is a matter of moments.
HURRIED: dict[str, Any] = {"says": "", "arrived": 0, "asked": None, "hurried": True}

# As it is for Slack, which can't tell a message that comes twice: what may have arrived is not sent again.
TABLE: dict[str, Cell] = {
    "no reply in time": Cell({"kind": "delay", "delay": 600}, **HURRIED),
    "no reply, taken": Cell({"kind": "drop_after", "times": 1}, POSTED),
    "no reply, not taken": Cell({"kind": "drop", "times": 1}, POSTED, arrived=0),
    "401": Cell(status(401), "answered 401", arrived=0),
    "403": Cell(status(403), "answered 403", arrived=0),
    "404": Cell(status(404), "answered 404", arrived=0),
    "409": Cell(status(409), "answered 409", arrived=0),
    "429 with a time": Cell(status(429, times=1, retry_after="0.2"), **PASSES),
    "429 without": Cell(status(429, times=1), **PASSES),
    "429 for ever": Cell(status(429), **HURRIED),
    "429 of an hour": Cell(status(429, retry_after="3600"), "asks to wait 3600 s", arrived=0),
    "500": Cell(html(500), **PASSES),
    "502": Cell(html(502), **PASSES),
    "503": Cell(html(503), **PASSES),
    "503 for ever": Cell(html(503, None), **HURRIED),
    "an HTML page": Cell(html(200), "answered 200", arrived=0),
    "an empty body": Cell({"kind": "empty", "times": 1}, "answered 200", arrived=0),
    "no text at all": Cell({"kind": "garbage", "times": 1}, f"is no text; it {POSTED}", arrived=0),
    "half a document": Cell({"kind": "truncated_json", "times": 1}, "answered 200"),
    "null fields": Cell({"kind": "null_fields", "times": 1}, "answered 200: no reason"),
}

# An event with the same key is the same alert: whatever was not answered as it should be is sent again.
AGAIN: dict[str, Any] = {"says": None, "arrived": 1, "asked": 2}
EXCEPTIONS: dict[tuple[str, str], dict[str, Any]] = {
    **{
        ("pagerduty", row): AGAIN
        for row in (
            *("no reply, taken", "no reply, not taken", "an HTML page", "an empty body"),
            *("no text at all", "half a document", "null fields"),
        )
    },
    # Half of `ok`, which is all that a webhook ever says, and nothing in it can be null.
    ("slack", "half a document"): {"says": "answered 200: o"},
    ("slack", "null fields"): {"says": None},
    ("slack-channel", "half a document"): {"says": f"broken JSON; it {POSTED}"},
}


def arrived(sandbox: Sandbox) -> int:
    """Messages and alerts, at whichever vendor."""
    return len(sandbox.slack.messages) + len(sandbox.pagerduty.alerts)


def warnings(caplog: pytest.LogCaptureFixture) -> str:
    return "\n".join(each.getMessage() for each in caplog.records if each.levelno >= logging.WARNING)


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Telling has some 3 s in place of 16; remembering has more, so that it is not what runs out of time."""
    monkeypatch.setattr("tasks.alerts.PATIENCE", 14.0)
    monkeypatch.setattr("tasks.alerts._TO_REMEMBER", 9.0)


async def tell(sandbox: Sandbox, way: str) -> bool:
    """One run with one failure to tell: it neither raises nor waits for ever."""
    async with asyncio.timeout(60):
        return await WAYS[way](sandbox).run("airports")


@pytest.mark.parametrize(
    ("way", "cell"),
    [
        pytest.param(way, replace(cell, **EXCEPTIONS.get((way, row), {})), id=f"{row}-{way}")
        for way in WAYS
        for row, cell in TABLE.items()
    ],
)
async def test_one_alert(
    box: Sandbox, caplog: pytest.LogCaptureFixture, request: pytest.FixtureRequest, way: str, cell: Cell
) -> None:
    """An alert that can't be delivered fails no run and holds none up; the log says whom it did not reach."""
    if cell.hurried:
        request.getfixturevalue("hurried")
    fault = box.faults.add(**cell.fault)
    told = await tell(box, way)
    assert told == (cell.says is None)
    assert arrived(box) == cell.arrived
    if cell.asked is not None:
        assert len(box.requests) == cell.asked
    assert box.faults.hits(fault), "the fault hit no request: this cell shows nothing"
    said = warnings(caplog)
    if cell.says is None:
        assert said == ""
    else:
        assert cell.says in said
        assert "was not told of airbyte airports" in said
        assert "The next run tries again." in said


@pytest.mark.parametrize("way", WAYS)
async def test_refused_for_a_moment(box: Sandbox, way: str) -> None:
    """A vendor that is down for a moment is waited for, and told once."""
    box.outage(0.3)
    assert await tell(box, way)
    assert arrived(box) == 1


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.usefixtures("hurried")
async def test_refused_for_longer(box: Sandbox, caplog: pytest.LogCaptureFixture, way: str) -> None:
    """One that stays down is not waited for beyond the patience."""
    box.pause()
    try:
        assert not await tell(box, way)
    finally:
        box.resume()
    assert arrived(box) == 0
    assert "was not told of airbyte airports" in warnings(caplog)


def test_no_vendor_that_is_told_is_left_out() -> None:
    """Every tool that the parameters of a flow offer for alerts is in the table."""
    assert WAYS.keys() == {kind.model_fields["tool"].default for kind in get_args(get_args(Notify)[0])}
