"""The sandbox's Slack webhooks: what is kept, and what is refused in Slack's words."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from sandbox import Sandbox, catalog
from tests.sandbox_fixtures import box, sources

__all__ = ["box", "sources"]

SECTION = {"type": "section", "text": {"type": "mrkdwn", "text": "*weather* failed"}}


def test_message_is_kept_for_its_channel(box: Sandbox) -> None:
    """A post is answered with the text `ok` and can be read back with its channel, text and blocks."""
    reply = httpx.post(box.slack_url("weather-desk"), json={"text": "weather failed", "blocks": [SECTION]})
    assert (reply.status_code, reply.text) == (200, "ok")
    assert reply.headers["content-type"].startswith("text/plain")
    (message,) = box.slack.sent_to("weather-desk")
    assert (message.text, message.blocks) == ("weather failed", [SECTION])
    assert message.full_text == "weather failed\n*weather* failed"
    assert box.slack.sent_to("flight-ops") == []


def test_form_payload_is_taken(box: Sandbox) -> None:
    """The older form with a `payload` field works too."""
    assert httpx.post(box.slack_url(), data={"payload": '{"text":"hello"}'}).text == "ok"
    assert [message.text for message in box.slack.messages] == ["hello"]


@pytest.mark.parametrize(
    ("body", "word"),
    [
        ({}, "no_text"),
        ({"text": ""}, "no_text"),
        ({"text": 5}, "invalid_payload"),
        ([], "invalid_payload"),
        ({"text": "x" * 40_001}, "msg_too_long"),
        ({"text": "x", "blocks": [SECTION] * 51}, "invalid_blocks"),
        ({"text": "x", "blocks": [{"type": "section", "text": {"text": "x" * 3001}}]}, "invalid_blocks"),
        ({"text": "x", "blocks": [{"type": "header", "text": {"text": "x" * 151}}]}, "invalid_blocks"),
        ({"text": "x", "blocks": ["text"]}, "invalid_blocks"),
    ],
)
def test_bad_messages_are_refused(box: Sandbox, body: Any, word: str) -> None:
    """A message beyond Slack's limits is 400 with Slack's word for it, and is not kept."""
    reply = httpx.post(box.slack_url(), json=body)
    assert (reply.status_code, reply.text) == (400, word)
    assert box.slack.messages == []


@pytest.mark.parametrize(
    ("old", "new", "status", "word"),
    [
        ("T0SANDBOX", "T0OTHER", 404, "no_team"),
        ("B0DATAALERTS", "B0OTHER", 404, "no_service"),
        ("sandboxDataAlerts0001", "guess", 403, "invalid_token"),
    ],
)
def test_wrong_address(box: Sandbox, old: str, new: str, status: int, word: str) -> None:
    """A webhook address that is wrong in one part is refused."""
    reply = httpx.post(box.slack_url().replace(old, new), json={"text": "x"})
    assert (reply.status_code, reply.text) == (status, word)


def test_channel_can_be_broken_and_healed(box: Sandbox) -> None:
    """An archived channel answers 410 to every post until it is healed."""
    box.slack.break_channel("flight-ops", "channel_is_archived")
    reply = httpx.post(box.slack_url("flight-ops"), json={"text": "x"})
    assert (reply.status_code, reply.text) == (410, "channel_is_archived")
    box.slack.break_channel("flight-ops", None)
    assert httpx.post(box.slack_url("flight-ops"), json={"text": "x"}).text == "ok"
    with pytest.raises(KeyError):
        box.slack.break_channel("no-such-channel", None)


def test_rate_limit_holds_only_when_switched_on(box: Sandbox) -> None:
    """One message a second per webhook, with Retry-After, when asked for; no limit otherwise."""
    with httpx.Client() as client:
        url = box.slack_url()
        assert {client.post(url, json={"text": "x"}).status_code for _ in range(5)} == {200}
        box.slack.settings.messages_per_second = 1
        assert client.post(url, json={"text": "x"}).status_code == 200
        refused = client.post(url, json={"text": "x"})
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        assert client.post(box.slack_url("flight-ops"), json={"text": "x"}).status_code == 200


# -- the Web API --------------------------------------------------------------------------------------------


def _call(box: Sandbox, method: str, token: str = catalog.SLACK_TOKEN, **body: Any) -> httpx.Response:
    headers = {"authorization": f"Bearer {token}"} if token else {}
    return httpx.post(f"{box.slack_api_url}{method}", json=body, headers=headers)


def test_messages_threads_and_changes(box: Sandbox) -> None:
    """A message has an id; it can be answered and changed, by the channel's id and not by its name."""
    first = _call(box, "chat.postMessage", channel="data-alerts", text="first").json()
    assert first["ok"] is True
    assert first["channel"] == catalog.CHANNEL_IDS["data-alerts"]
    reply = _call(
        box, "chat.postMessage", channel=first["channel"], text="reply", thread_ts=first["ts"]
    ).json()
    assert reply["ts"] > first["ts"]
    changed = _call(box, "chat.update", channel=first["channel"], ts=first["ts"], text="changed").json()
    assert (changed["ok"], changed["text"]) == (True, "changed")
    by_name = _call(box, "chat.update", channel="data-alerts", ts=first["ts"], text="again").json()
    assert by_name == {"ok": False, "error": "channel_not_found"}
    (answer,) = box.slack.thread(first["ts"])
    assert answer.text == "reply"
    assert "changed" in httpx.get(f"{box.url}/slack").text


@pytest.mark.parametrize(
    ("method", "body", "word"),
    [
        ("chat.postMessage", {"token": ""}, "not_authed"),
        ("chat.postMessage", {"token": "xoxb-guess"}, "invalid_auth"),
        ("chat.postMessage", {"channel": "no-such-channel"}, "channel_not_found"),
        ("chat.postMessage", {"text": ""}, "no_text"),
        ("chat.postMessage", {"text": "x" * 40_001}, "msg_too_long"),
        ("chat.postMessage", {"thread_ts": "1.000001"}, "thread_not_found"),
        ("chat.update", {"channel": "C0SANDBOX01", "ts": "1.000001"}, "message_not_found"),
    ],
)
def test_refusals_have_status_200(box: Sandbox, method: str, body: dict[str, Any], word: str) -> None:
    """Slack's Web API says `ok: false` with a word, and its status is 200; nothing is kept."""
    reply = _call(box, method, **{"channel": "data-alerts", "text": "x", **body})
    assert (reply.status_code, reply.json()) == (200, {"ok": False, "error": word})
    assert box.slack.messages == []


def test_a_webhooks_message_can_not_be_changed(box: Sandbox) -> None:
    """What came over a webhook is another's message."""
    httpx.post(box.slack_url(), json={"text": "x"})
    (message,) = box.slack.messages
    reply = _call(box, "chat.update", channel="C0SANDBOX01", ts=message.ts, text="y")
    assert reply.json()["error"] == "cant_update_message"


def test_the_rate_limit_and_archived_channels(box: Sandbox) -> None:
    """Only the rate limit has a status of its own, with Retry-After; no token is in the request log."""
    box.slack.settings.messages_per_second = 1
    replies = [_call(box, "chat.postMessage", channel="#data-alerts", text="x") for _ in range(2)]
    assert (replies[1].status_code, replies[1].headers["retry-after"]) == (429, "1")
    assert replies[1].json() == {"ok": False, "error": "ratelimited"}
    box.slack.break_channel("flight-ops", "channel_is_archived")
    archived = _call(box, "chat.postMessage", channel="flight-ops", text="x")
    assert archived.json()["error"] == "is_archived"
    assert catalog.SLACK_TOKEN not in str(box.requests.find(vendor="slack"))
