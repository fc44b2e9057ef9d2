"""PagerDuty: events that are right, alerts that fold and end, and refusals that are borne."""

from __future__ import annotations

import json
import pickle
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import httpx
import pytest
from pydantic import ValidationError

from blocks import PagerDutyRouting
from blocks.http import AuthError, RateLimited, VendorError, VendorUnavailable
from blocks.pagerduty import Alert, Link, timestamp
from sandbox import Sandbox, catalog
from tasks.pagerduty import PagerDutyNotify
from tests.alerts_fixtures import alarm, pagerduty, routing
from tests.sandbox_fixtures import box, sources

__all__ = ["box", "sources"]

KEY = catalog.PAGERDUTY_KEYS["data-platform"]
EASTERN = timezone(timedelta(hours=-5))
ALERT = Alert(summary="orders_pg -> warehouse failed", source="airbyte")


# -- the events ---------------------------------------------------------------------------------------------


async def test_an_event_is_as_the_contract_has_it(box: Sandbox) -> None:
    """Every field of a trigger arrives under PagerDuty's name for it."""
    alert = Alert(
        summary="orders_pg -> warehouse failed",
        source="airbyte",
        severity="error",
        timestamp=datetime(2026, 3, 2, 5, 0, 41, tzinfo=UTC),
        component="orders_pg",
        group="ingest",
        kind="sync failed",
        details={"jobId": 18473},
        links=(Link(href="https://example.com/runs/1", text="run"),),
        client_url="https://example.com/runs/1",
    )
    async with routing(box).api() as api:
        assert await api.trigger("airbyte/9924bcd0", alert) == "airbyte/9924bcd0"
    (event,) = box.pagerduty.alerts[0].events
    assert event == {
        "event_action": "trigger",
        "dedup_key": "airbyte/9924bcd0",
        "client": "elt-flows",
        "client_url": "https://example.com/runs/1",
        "payload": {
            "summary": "orders_pg -> warehouse failed",
            "source": "airbyte",
            "severity": "error",
            "timestamp": "2026-03-02T05:00:41.000+00:00",
            "component": "orders_pg",
            "group": "ingest",
            "class": "sync failed",
            "custom_details": {"jobId": 18473},
        },
        "links": [{"href": "https://example.com/runs/1", "text": "run"}],
    }


@pytest.mark.parametrize(
    ("moment", "text"),
    [
        (datetime(2026, 3, 2, 5, 0, 41, tzinfo=UTC), "2026-03-02T05:00:41.000+00:00"),
        (datetime(2026, 3, 2, 5, 0, 41, 999_999, tzinfo=UTC), "2026-03-02T05:00:41.999+00:00"),
        (datetime(2026, 3, 2, 5, 0, 41), "2026-03-02T05:00:41.000+00:00"),
        (
            datetime(2026, 3, 2, 0, 0, 41, tzinfo=timezone(timedelta(hours=-5))),
            "2026-03-02T05:00:41.000+00:00",
        ),
    ],
)
def test_a_timestamp_has_one_zone(moment: datetime, text: str) -> None:
    """Pitfall: `isoformat() + "Z"` on an aware time gives `+00:00Z`, which is no time at all."""
    assert timestamp(moment) == text
    assert datetime.fromisoformat(text).tzinfo is not None


async def test_202_is_success(box: Sandbox) -> None:
    """Pitfall: PagerDuty answers 202, and who takes only 200 for success sends again and again."""
    async with routing(box).api() as api:
        await api.trigger("a", ALERT)
    (request,) = box.requests.find(vendor="pagerduty")
    assert request.status == 202


async def test_a_refusal_in_a_2xx_is_none(box: Sandbox) -> None:
    """A reply that does not say `success` is no success, whatever its status."""
    box.faults.add(kind="status", status=202, body={"status": "nope", "message": "no"}, vendor="pagerduty")
    async with routing(box).api() as api:
        with pytest.raises(VendorError, match="nope: no"):
            await api.trigger("a", ALERT)


async def test_too_long_texts_are_cut_and_not_refused(box: Sandbox) -> None:
    """A summary of 1,024 characters, a key of 255 and a body of 512 KB are the most that PagerDuty takes."""
    alert = Alert(
        summary="s" * 5000,
        source="airbyte",
        details={f"column {number}": "x" * 10_000 for number in range(100)},
        links=tuple(Link(href=f"https://x.test/{number}", text="t" * 999) for number in range(99)),
    )
    async with routing(box).api() as api:
        one = await api.trigger("k" * 500 + "1", alert)
        two = await api.trigger("k" * 500 + "2", alert)
    assert len(box.pagerduty.open_of()) == 2, "keys that are cut must not become the same"
    assert len(one) == len(two) == 255
    payload = box.pagerduty.alerts[0].events[0]["payload"]
    assert len(payload["summary"]) == 1024
    assert payload["summary"].endswith("…")
    assert payload["custom_details"]["cut"]


# -- idempotency --------------------------------------------------------------------------------------------


async def test_a_lost_reply_opens_no_second_alert(box: Sandbox) -> None:
    """Pitfall: a trigger without a `dedup_key` that is sent again is a second incident."""
    box.faults.add(kind="drop_after", vendor="pagerduty", times=1)
    async with routing(box).api() as api:
        await api.trigger("airbyte/orders", ALERT)
    (alert,) = box.pagerduty.alerts
    assert len(alert.triggers) == 2


async def test_resolve_closes_and_the_next_trigger_opens_anew(box: Sandbox) -> None:
    """The whole life of an alert; what is resolved without being open, PagerDuty drops."""
    async with routing(box).api() as api:
        await api.resolve("a")
        await api.trigger("a", ALERT)
        await api.acknowledge("a")
        await api.resolve("a")
        await api.trigger("a", ALERT)
    assert [alert.state for alert in box.pagerduty.alerts] == ["resolved", "triggered"]
    assert [event["event_action"] for event in box.pagerduty.dropped] == ["resolve"]


async def test_another_key_never_matches(box: Sandbox) -> None:
    """A `dedup_key` is of one integration: an alert can only be resolved where it was opened."""
    async with routing(box).api() as one, routing(box, "flight-ops").api() as other:
        await one.trigger("a", ALERT)
        await other.resolve("a")
    assert [alert.service for alert in box.pagerduty.open_of()] == ["data-platform"]


# -- what goes wrong ----------------------------------------------------------------------------------------


async def test_a_400_is_not_repeated_and_says_what_is_wrong(box: Sandbox) -> None:
    """PagerDuty's own list of errors is in ours, the key is not."""
    stranger = PagerDutyRouting(routing_key="X" * 32, base_url=box.pagerduty_url)
    async with stranger.api() as api:
        with pytest.raises(VendorError, match="Invalid routing key") as refused:
            await api.trigger("a", ALERT)
    assert box.requests.count(vendor="pagerduty") == 1
    assert "X" * 32 not in f"{refused.value!r}{pickle.loads(pickle.dumps(refused.value))}"  # noqa: S301


@pytest.mark.parametrize("fault", [{"kind": "status", "status": 500}, {"kind": "html"}, {"kind": "reset"}])
async def test_what_passes_is_sent_again(box: Sandbox, fault: dict[str, Any]) -> None:
    """5xx, a proxy's page and a cut connection are tried again, and once is enough."""
    box.faults.add(vendor="pagerduty", times=2, **fault)
    async with routing(box).api() as api:
        await api.trigger("a", ALERT)
    assert len(box.pagerduty.alerts) == 1
    assert box.requests.count(vendor="pagerduty") == 3


async def test_429_is_not_repeated_for_ever(box: Sandbox) -> None:
    """Pitfall: PagerDuty's own client repeats a 429 without end, and a run waits for good."""
    box.faults.add(kind="status", status=429, vendor="pagerduty")
    async with routing(box).api() as api:
        with pytest.raises(RateLimited):
            await api.trigger("a", ALERT, patience=1.5)
    assert box.requests.count(vendor="pagerduty") <= 3  # with pauses of at least half a second


async def test_an_hour_is_not_waited_for(box: Sandbox) -> None:
    """A `Retry-After` beyond the patience ends the attempt at once."""
    box.faults.add(kind="status", status=429, headers={"Retry-After": "3600"}, vendor="pagerduty")
    async with routing(box).api() as api:
        with pytest.raises(RateLimited, match="3600 s"):
            await api.trigger("a", ALERT)
    assert box.requests.count(vendor="pagerduty") == 1


async def test_an_unreachable_server(box: Sandbox) -> None:
    """A refused connection is tried for as long as there is patience, and then named."""
    box.pause()
    try:
        async with routing(box).api() as api:
            with pytest.raises(VendorUnavailable, match="refused"):
                await api.trigger("a", ALERT, patience=0.5)
    finally:
        box.resume()


# -- the block and the parameters ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "sentence"),
    [
        ("", "empty"),
        ("short", "this has 5"),
        ("u+" + "x" * 30, "letters and digits"),
        ("two parts", "a blank"),
    ],
)
def test_a_wrong_key_is_named_without_being_repeated(key: str, sentence: str) -> None:
    """A REST API key in the wrong field is found when the block is made, not when a page is due."""
    with pytest.raises(ValidationError, match=sentence) as refused:
        PagerDutyRouting(routing_key=key)
    assert not key or key not in str(refused.value)


def test_the_address_may_be_another(box: Sandbox) -> None:
    """The base URL is settable, for other service regions; the whole address may be pasted."""
    block = PagerDutyRouting(routing_key=f" {KEY}\n", base_url="events.eu.pagerduty.com/v2/enqueue/")
    assert block.base_url == "https://events.eu.pagerduty.com/v2"
    assert block.routing_key.get_secret_value() == KEY
    assert KEY not in repr(block)


async def test_parameters_hold_no_key(box: Sandbox) -> None:
    """A block instance is stored with its key masked, and a masked key says what to do."""
    notify = PagerDutyNotify(
        routing=routing(box), owners={"flight-ops": routing(box, "flight-ops"), "b": "saved"}
    )
    stored = notify.model_dump(mode="json")
    assert "R0SANDBOX" not in json.dumps(stored)
    assert stored["owners"]["b"] == "saved"
    again = PagerDutyNotify.model_validate(stored)
    assert isinstance(again.routing, PagerDutyRouting)
    with pytest.raises(AuthError, match="save the block"):
        async with again.routing.api():
            pass


# -- telling ------------------------------------------------------------------------------------------------


async def test_repeats_fold_and_recovery_resolves(box: Sandbox) -> None:
    """Pitfall: no resolve on recovery. Three runs that fail are one alert, and one that works ends it."""
    runs = pagerduty(box)
    for _ in range(3):
        assert await runs.run("airports", fine=["planes"])
    (alert,) = box.pagerduty.open_of()
    assert alert.dedup_key == f"{runs.name}/airbyte/airports", "stable, and without a run's id"
    assert len(alert.triggers) == 3
    assert alert.summary == f"airbyte airports sync failed in {runs.name}: Source is down"
    assert alert.triggers[-1]["payload"]["custom_details"]["runs that failed"] == 3
    assert await runs.run(fine=["airports", "planes"])
    assert box.pagerduty.open_of() == []
    assert box.pagerduty.dropped == [], "what was always fine was not resolved"
    count = box.requests.count(vendor="pagerduty")
    assert await runs.run(fine=["airports", "planes"])
    assert box.requests.count(vendor="pagerduty") == count, "nothing is sent for what is fine"


async def test_the_owner_is_paged_and_the_end_goes_there_too(box: Sandbox) -> None:
    """An alert goes to its owner's integration, and its end too when it has another owner by then."""
    runs = pagerduty(box, owners={"flight-ops": routing(box, "flight-ops")})
    await runs.run(alarm("airports", owner="flight-ops"), alarm("planes", owner="nobody-known"))
    assert {(a.service, a.dedup_key.rsplit("/", 1)[1]) for a in box.pagerduty.open_of()} == {
        ("flight-ops", "airports"),
        ("data-platform", "planes"),
    }
    await runs.run(fine=["airports", "planes"])
    assert box.pagerduty.open_of() == []


async def test_severities_follow_the_policy(box: Sandbox) -> None:
    """What the rule bears is a warning, what stops everything is critical; and one may be told of neither."""
    runs = pagerduty(box)
    await runs.run(alarm("a", level="failed"), alarm("b", level="partial"), alarm("c", level="refused"))
    assert [alert.severity for alert in box.pagerduty.open_of()] == ["error", "warning", "critical"]
    quiet = pagerduty(box, severity={"partial": None})
    await quiet.run(alarm("d", level="partial"))
    assert len(box.pagerduty.open_of()) == 3


async def test_what_is_not_told_any_more_is_not_taken_for_fine(box: Sandbox) -> None:
    """A failure that has become bearable, of which nobody is to be told, does not end the alert."""
    runs = pagerduty(box, severity={"partial": None})
    await runs.run(alarm("a", level="failed"))
    await runs.run(alarm("a", level="partial"))
    (alert,) = box.pagerduty.open_of()
    assert len(alert.triggers) == 1


async def test_what_waits_is_in_the_alert_of_its_cause(box: Sandbox) -> None:
    """What is held back is no alert of its own."""
    runs = pagerduty(box)
    await runs.run(alarm("a", held=["places-to-crm (airports did not land)"]), "b")
    a, b = box.pagerduty.open_of()
    assert a.events[0]["payload"]["custom_details"]["held back"] == ["places-to-crm (airports did not land)"]
    assert "held back" not in b.events[0]["payload"]["custom_details"]
    assert [link["text"] for link in a.events[0]["links"]] == ["job 12", "run run-1"]


async def test_a_resolve_by_hand_is_respected_until_the_next_failure(box: Sandbox) -> None:
    """Who resolves an alert in PagerDuty is paged anew if the next run fails too."""
    runs = pagerduty(box)
    await runs.run("a")
    box.pagerduty.resolve_by_hand(f"{runs.name}/airbyte/a")
    await runs.run("a")
    assert [alert.state for alert in box.pagerduty.alerts] == ["resolved", "triggered"]


async def test_a_storm_is_one_alert(box: Sandbox) -> None:
    """Forty connections of one owner fail at once: one alert, which ends when the last of them is well."""
    runs = pagerduty(box)
    names = [f"c{number}" for number in range(40)]
    await runs.run(*names)
    await runs.run(*names[:5], fine=names[5:])
    (alert,) = box.pagerduty.open_of()
    assert alert.triggers[0]["payload"]["summary"].startswith(f"40 steps failed in {runs.name}: airbyte c0, ")
    assert len(alert.triggers) == 2
    await runs.run(*names[:1], fine=names[1:])
    assert box.pagerduty.open_of() == [alert]
    await runs.run(fine=names[:1])
    assert box.pagerduty.open_of() == []


# -- the sandbox --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        (b"{", "JSON parse error"),
        ({"event_action": "trigger"}, "routing_key"),
        ({"routing_key": KEY, "event_action": "trigger"}, "payload"),
        ({"routing_key": KEY, "event_action": "resolve"}, "dedup_key"),
        ({"routing_key": KEY, "event_action": "close", "dedup_key": "a"}, "event_action"),
        (
            {
                "routing_key": KEY,
                "event_action": "trigger",
                "payload": {
                    "summary": "s",
                    "source": "s",
                    "severity": "error",
                    "timestamp": "2026-03-02T05:00:41+00:00Z",
                },
            },
            "timestamp",
        ),
        (
            {
                "routing_key": KEY,
                "event_action": "trigger",
                "payload": {"summary": "s" * 1025, "source": "s", "severity": "error"},
            },
            "summary",
        ),
    ],
)
def test_the_sandbox_refuses_what_pagerduty_refuses(box: Sandbox, body: Any, problem: str) -> None:
    """A wrong event is 400 with PagerDuty's kind of body, and leaves no alert."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    reply = httpx.post(f"{box.pagerduty_url}/enqueue", content=content)
    assert reply.status_code == 400
    assert set(reply.json()) == {"status", "message", "errors"}
    assert problem in str(reply.json()["errors"])
    assert box.pagerduty.alerts == []


def test_the_sandbox_limits_makes_keys_and_shows(box: Sandbox) -> None:
    """A rate limit per key, a key where none is given, no key in the log, and a page to look at."""
    box.pagerduty.settings.events_per_minute = 2
    event = {
        "routing_key": KEY,
        "event_action": "trigger",
        "payload": {"summary": "down", "source": "s", "severity": "info"},
    }
    replies = [httpx.post(f"{box.pagerduty_url}/enqueue", json=event) for _ in range(3)]
    assert [reply.status_code for reply in replies] == [202, 202, 429]
    assert replies[0].json()["dedup_key"] != replies[1].json()["dedup_key"]
    assert KEY not in str(box.requests.find(vendor="pagerduty"))
    assert "down" in httpx.get(f"{box.url}/pagerduty").text
    shown = httpx.get(f"{box.url}/_sandbox/pagerduty/alerts").json()
    assert [alert["state"] for alert in shown["data"]] == ["triggered", "triggered"]
    httpx.delete(f"{box.url}/_sandbox/pagerduty/alerts")
    assert box.pagerduty.alerts == []
