"""Runs that have something to say, without the runs: bulletins, and ways of telling at the sandbox."""

from __future__ import annotations

import logging
from datetime import UTC, datetime, timedelta
from itertools import count
from typing import Any
from uuid import uuid4

import pytest
from prefect_slack import SlackCredentials, SlackWebhook

from blocks import PagerDutyRouting
from sandbox import Sandbox, catalog
from tasks.alerts import NotifyParameters, announce
from tasks.incidents import Alarm, Bulletin
from tasks.pagerduty import PagerDutyNotify
from tasks.slack import SlackChannel, SlackNotify

NOON = datetime(2026, 3, 2, 12, tzinfo=UTC)
LOG = logging.getLogger("tests.alerts")


def alarm(name: str = "airports", **changes: Any) -> Alarm:
    fields: dict[str, Any] = {
        "key": f"airbyte/{name}",
        "title": f"airbyte {name}",
        "what": "sync failed",
        "reason": "Source is down",
        "tool": "airbyte",
        "url": f"https://airbyte.test/jobs/{name}",
        "link": "job 12",
    }
    return Alarm(**{**fields, **changes})


class Pipeline:
    """Runs of one pipeline, one after the other, of which one team is told."""

    def __init__(self, notify: NotifyParameters, log: logging.Logger | None = None) -> None:
        self.notify = notify
        self.log = log or LOG
        self.name = f"p-{uuid4().hex[:10]}"
        self._numbers = count(1)

    def bulletin(self, *failing: str | Alarm, fine: list[str] | None = None, **changes: Any) -> Bulletin:
        number = next(self._numbers)
        fields: dict[str, Any] = {
            "pipeline": self.name,
            "run": f"run-{number}",
            "run_url": f"https://prefect.test/runs/{number}",
            "occasion": f"run-{number}:1",
            "at": NOON + timedelta(minutes=number),
            "alarms": [one if isinstance(one, Alarm) else alarm(one) for one in failing],
            "fine": [f"airbyte/{name}" for name in fine or []],
            "summary": ["Completed: 1 of 1 steps done"],
        }
        return Bulletin(**{**fields, **changes})

    async def run(self, *failing: str | Alarm, fine: list[str] | None = None, **changes: Any) -> bool:
        """A run in which these fail and those are fine; whether all was told."""
        return await announce(self.notify, self.bulletin(*failing, fine=fine, **changes), self.log)


def routing(box: Sandbox, service: str = "data-platform") -> PagerDutyRouting:
    return PagerDutyRouting(routing_key=catalog.PAGERDUTY_KEYS[service], base_url=box.pagerduty_url)


def pagerduty(box: Sandbox, **changes: Any) -> Pipeline:
    return Pipeline(PagerDutyNotify(**{"routing": routing(box), **changes}))


def webhook(box: Sandbox, **changes: Any) -> Pipeline:
    fields = {"webhook": SlackWebhook(url=box.slack_url()), "on": "failure", **changes}
    return Pipeline(SlackNotify(**fields))


def channel(box: Sandbox, **changes: Any) -> Pipeline:
    fields = {
        "credentials": SlackCredentials(token=catalog.SLACK_TOKEN),
        "channel": catalog.DEFAULT_CHANNEL,
        "api_url": box.slack_api_url,
        "on": "failure",
        "remind": 0,
        **changes,
    }
    return Pipeline(SlackChannel(**fields))


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Telling may take 10 s in place of 20, six of them for remembering."""
    monkeypatch.setattr("tasks.alerts.PATIENCE", 10.0)
    monkeypatch.setattr("tasks.alerts._TO_REMEMBER", 6.0)
