"""The sandbox's Slack webhooks: what is kept, and what is refused in Slack's words."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from sandbox import Sandbox
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
