"""Slack: refusals that are seen, repeats that fold, threads that end, and no address in any log."""

from __future__ import annotations

import logging
import time
from typing import Any

import pytest
from prefect_slack import SlackCredentials, SlackWebhook
from pydantic import ValidationError

from blocks.http import AuthError, NotFoundError, RateLimited, VendorError, VendorUnavailable
from sandbox import Sandbox, catalog
from sandbox.slack import Message
from tasks.slack import SlackChannel, SlackNotify
from tasks.slack_api import SlackChat, post_webhook
from tasks.slack_text import cut, escape, link, moment, plain
from tests.alerts_fixtures import NOON, alarm, channel, webhook
from tests.sandbox_fixtures import box, sources

__all__ = ["box", "sources"]


async def _post(box: Sandbox, text: str = "*weather* failed", patience: float = 5.0) -> None:
    await post_webhook(SlackWebhook(url=box.slack_url()), text, patience=patience)


def _chat(box: Sandbox, token: str = catalog.SLACK_TOKEN, patience: float = 5.0) -> SlackChat:
    return SlackChat(SlackCredentials(token=token), box.slack_api_url, patience)


# -- texts --------------------------------------------------------------------------------------------------


def test_escaping_is_in_order() -> None:
    """Pitfall: `&` is escaped first, else the others' escapes are escaped again (and it is no `$amp;`)."""
    assert escape("a < b && c > d &lt;") == "a &lt; b &amp;&amp; c &gt; d &amp;lt;"
    assert link("https://x.test/?a=1&b=|", "job <1>") == "<https://x.test/?a=1&amp;b=%7C|job &lt;1&gt;>"
    assert link(None, "<job>") == "&lt;job&gt;"


def test_a_text_fits_and_a_plain_one_has_no_markup() -> None:
    """Slack takes 40,000 characters; the plain form has the links' addresses beside their names."""
    assert len(cut("x" * 50_000)) == 40_000
    assert plain(f"*a* <https://x.test|job> {moment(NOON)}") == "a job (https://x.test) 2026-03-02 12:00 UTC"


# -- webhooks -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        ("channel_not_found", NotFoundError),
        ("channel_is_archived", VendorError),
        ("action_prohibited", AuthError),
        ("rollup_error", VendorUnavailable),
    ],
)
async def test_a_refusal_is_an_error(box: Sandbox, error: Any, kind: type[VendorError]) -> None:
    """Pitfall: slack_sdk's webhook client returns error statuses, and callers forget to look."""
    box.slack.break_channel("data-alerts", error)
    with pytest.raises(kind) as refused:
        await _post(box, patience=0.3)
    assert type(refused.value) is kind
    assert "sandboxDataAlerts" not in repr(refused.value)


async def test_dead_webhooks_are_not_asked_twice(box: Sandbox) -> None:
    """404 is for good, and says what to do."""
    dead = SlackWebhook(url=box.slack_url().replace("B0DATAALERTS", "B0GONE"))
    with pytest.raises(VendorError, match=r"no_service.*make a new one"):
        await post_webhook(dead, "x", patience=5)
    assert box.requests.count(vendor="slack") == 1


async def test_what_slack_finds_fault_with_is_sent_plain_once(box: Sandbox) -> None:
    """After 400 the text goes once more, without its markup."""
    fault = {"status": 400, "body": "invalid_payload", "vendor": "slack"}
    box.faults.add(kind="status", times=1, **fault)
    await _post(box, "*weather* <https://x.test|job> failed")
    assert [message.text for message in box.slack.messages] == ["weather job (https://x.test) failed"]
    box.faults.add(kind="status", **fault)
    with pytest.raises(VendorError, match="invalid_payload"):
        await _post(box)
    assert box.requests.count(vendor="slack") == 4


async def test_retry_after_is_honoured(box: Sandbox) -> None:
    """Pitfall: no retry and no honouring of `Retry-After` in task-style senders."""
    box.slack.settings.messages_per_second = 1
    began = time.monotonic()
    await _post(box, "one")
    await _post(box, "two")
    assert time.monotonic() - began >= 1
    assert [message.text for message in box.slack.messages] == ["one", "two"]


async def test_an_hour_is_not_waited_for(box: Sandbox) -> None:
    """A wait that is longer than the patience ends the attempt at once, and is named."""
    box.faults.add(kind="status", status=429, headers={"Retry-After": "3600"}, vendor="slack")
    with pytest.raises(RateLimited, match="3600 s"):
        await _post(box)
    with pytest.raises(RateLimited, match="3600 s"):
        await _chat(box).post("data-alerts", "x")
    assert box.requests.count(vendor="slack") == 2


async def test_a_500_is_tried_again(box: Sandbox) -> None:
    """Slack's own failures pass."""
    box.faults.add(kind="status", status=500, body="rollup_error", vendor="slack", times=1)
    await _post(box)
    assert len(box.slack.messages) == 1


async def test_a_lost_reply_is_not_posted_twice(box: Sandbox) -> None:
    """A webhook knows no idempotency: what may have arrived is not sent again (slack_sdk would)."""
    box.faults.add(kind="drop_after", vendor="slack")
    with pytest.raises(VendorUnavailable, match="may have been posted"):
        await _post(box)
    with pytest.raises(VendorUnavailable, match="may have been posted"):
        await _chat(box).post("data-alerts", "x")
    assert len(box.slack.messages) == 2


async def test_a_refused_connection_is_tried_again(box: Sandbox) -> None:
    """What surely did not arrive is sent again."""
    box.outage(0.8)
    await _post(box)
    assert len(box.slack.messages) == 1


@pytest.mark.parametrize("url", ["https://hooks.slack.test/services/T/B/s3cret", "not a url s3cret"])
async def test_no_error_holds_the_url(url: str) -> None:
    """The URL is the credential: no error of ours has it, whatever is wrong with it."""
    with pytest.raises(VendorError) as refused:
        await post_webhook(SlackWebhook(url=url), "x", patience=0.2)
    assert "s3cret" not in f"{refused.value}{refused.value.__cause__}{refused.value.__context__!r:.0}"
    assert refused.value.__suppress_context__


# -- the Web API --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("token", "to", "word"),
    [
        ("xoxb-wrong-token", "data-alerts", "invalid_auth"),
        (catalog.SLACK_TOKEN, "no-such-channel", "channel_not_found.*is the app in it"),
    ],
)
async def test_a_200_may_be_a_refusal(box: Sandbox, token: str, to: str, word: str) -> None:
    """The Web API refuses with status 200 and `ok: false`; the token is in no error."""
    with pytest.raises(VendorError, match=word) as refused:
        await _chat(box, token).post(to, "x")
    assert token not in repr(refused.value)
    assert box.requests.count(vendor="slack") == 1


async def test_threads_and_changes(box: Sandbox) -> None:
    """A reply goes into the thread, a change into the message; also under a rate limit."""
    box.slack.settings.messages_per_second = 1
    chat = _chat(box)
    first = await chat.post("#data-alerts", "first")
    await chat.post(first["channel"], "reply", thread=first["ts"])
    await chat.update(first["channel"], first["ts"], "changed")
    root, reply = box.slack.messages
    assert (root.text, root.earlier) == ("changed", ("first",))
    assert reply.thread_ts == first["ts"]


async def test_html_is_no_reply(box: Sandbox) -> None:
    """A proxy's page is Slack's failure, not ours."""
    box.faults.add(kind="html", vendor="slack", path="/slack/api/", times=1)
    await _chat(box).update("C0SANDBOX01", (await _chat(box).post("data-alerts", "x"))["ts"], "y")
    assert box.slack.messages[0].text == "y"


# -- telling over webhooks ----------------------------------------------------------------------------------


def _texts(messages: list[Message]) -> str:
    return "\n".join(message.text for message in messages)


async def test_one_message_for_a_run_and_a_channel(box: Sandbox) -> None:
    """Owners are told of what is theirs, all of it in one message, with the reason, links and what waits."""
    runs = webhook(box, owners={"weather-desk": SlackWebhook(url=box.slack_url("weather-desk"))})
    await runs.run(
        alarm("a", owner="weather-desk", held=["braze (a did not land)"], reason="Bad <token>"),
        alarm("b", owner="weather-desk"),
        alarm("c"),
    )
    (message,) = box.slack.sent_to("weather-desk")
    assert message.text == (
        f"*{runs.name}*, run <https://prefect.test/runs/1|run-1>\n"
        "✗ *airbyte a* sync failed: Bad &lt;token&gt; <https://airbyte.test/jobs/a|job 12>"
        " (owner: weather-desk)\n"
        "○ held back: braze (a did not land)\n"
        "✗ *airbyte b* sync failed: Source is down <https://airbyte.test/jobs/b|job 12> (owner: weather-desk)"
    )
    (other,) = box.slack.sent_to("data-alerts")
    assert "airbyte c" in other.text
    assert "airbyte a" not in other.text


async def test_a_repeat_is_left_out_until_it_is_due(box: Sandbox) -> None:
    """Pitfall: no folding of repeats. An hourly failure is told once, and briefly again when it is due."""
    runs = webhook(box)
    for _ in range(3):
        await runs.run("a")
    assert len(box.slack.messages) == 1
    await runs.run("a", "b")
    assert "*airbyte a* is still failing (4th run, since <!date^" in box.slack.messages[1].text
    await runs.run("b", fine=["a"])
    assert len(box.slack.messages) == 3
    assert "✓ *airbyte a* is well again, after 4 runs that failed" in box.slack.messages[2].text
    due = webhook(box, remind=0)
    await due.run("c")
    await due.run("c")
    assert "*airbyte c* is still failing (2nd run" in box.slack.messages[-1].text


async def test_a_run_without_failures_is_summed_up_where_asked_for(box: Sandbox) -> None:
    """`on: always` adds a summary to the main channel; `on: failure` says nothing."""
    await webhook(box).run(fine=["a"])
    assert box.slack.messages == []
    await webhook(box, on="always", owners={"x": SlackWebhook(url=box.slack_url("flight-ops"))}).run(
        fine=["a"]
    )
    (message,) = box.slack.messages
    assert (message.channel, message.text.splitlines()[1]) == ("data-alerts", "Completed: 1 of 1 steps done")


async def test_an_end_is_told_only_where_the_beginning_was(box: Sandbox) -> None:
    """What could not be told, and is well by the next run, is not told at all."""
    runs = webhook(box)
    box.slack.break_channel("data-alerts", "channel_is_archived")
    assert not await runs.run("a")
    box.slack.break_channel("data-alerts", None)
    assert await runs.run(fine=["a"])
    assert box.slack.messages == []


async def test_what_was_not_told_is_told_by_the_next_run(box: Sandbox) -> None:
    """A run that can't reach Slack leaves it to the next, which tells it as new."""
    runs = webhook(box)
    box.slack.break_channel("data-alerts", "channel_is_archived")
    assert not await runs.run("a")
    box.slack.break_channel("data-alerts", None)
    assert await runs.run("a")
    assert "*airbyte a* sync failed" in _texts(box.slack.messages)


# -- telling over the Web API -------------------------------------------------------------------------------


async def test_an_incident_is_a_message_with_a_thread(box: Sandbox) -> None:
    """A repeat goes into the thread, the end too, and the message is marked as resolved."""
    runs = channel(box)
    await runs.run("a", "b")
    await runs.run("a", "b")
    await runs.run("b", fine=["a"])
    a, b = (message for message in box.slack.messages if message.thread_ts is None)
    assert a.text.startswith(f"✓ ~airbyte a~ sync failed in *{runs.name}*, run ")
    assert "resolved, after 2 runs that failed, since <!date^" in a.text
    assert b.text.startswith(f"✗ *airbyte b* sync failed in *{runs.name}*")
    assert "3rd run, since" in b.text
    repeat, end = box.slack.thread(a.ts)
    assert "is still failing (2nd run" in repeat.text
    assert "is well again" in end.text


async def test_a_repeat_that_is_not_due_only_counts_up(box: Sandbox) -> None:
    """Within `remind` seconds nobody is disturbed: the message itself says how many runs there were."""
    runs = channel(box, remind=3600)
    for _ in range(3):
        await runs.run("a")
    (message,) = box.slack.messages
    assert "3rd run, since" in message.text


async def test_a_deleted_message_is_posted_anew(box: Sandbox) -> None:
    """Whoever deletes the message does not stop the telling."""
    runs = channel(box)
    await runs.run("a")
    box.slack.delete(box.slack.messages[0].ts or "")
    await runs.run("a")
    assert "is still failing" in box.slack.messages[0].text
    await runs.run(fine=["a"])
    assert box.slack.messages[0].text.startswith("✓ ~airbyte a~")


async def test_owners_and_summaries_have_their_channels(box: Sandbox) -> None:
    """An owner's incidents go to the owner's channel, a summary to the main one."""
    runs = channel(box, owners={"flight-ops": "flight-ops"}, on="always")
    await runs.run(alarm("a", owner="flight-ops"))
    await runs.run(fine=["a"])
    assert len(box.slack.sent_to("flight-ops")) == 2
    (summary,) = box.slack.sent_to("data-alerts")
    assert "Completed: 1 of 1 steps done" in summary.text


async def test_a_wrong_token_is_in_the_log_and_its_text_is_not(
    box: Sandbox, caplog: pytest.LogCaptureFixture
) -> None:
    """The log says what was not told and why; debugging slack_sdk itself shows no token either."""
    runs = channel(box, credentials=SlackCredentials(token="xoxb-a-wrong-token"))
    with caplog.at_level(logging.DEBUG):
        assert not await runs.run("a")
    assert "Slack was not told of airbyte a (opened, to data-alerts): Slack" in caplog.text
    assert "invalid_auth" in caplog.text
    assert "xoxb-a-wrong-token" not in caplog.text


# -- parameters ---------------------------------------------------------------------------------------------


def test_parameters_hold_no_url_and_no_token(box: Sandbox) -> None:
    """What is stored with a run are names."""
    given = SlackNotify(webhook=SlackWebhook(url="https://hooks.slack.com/s3cret"), owners={"a": "a-channel"})
    assert given.model_dump(mode="json")["owners"] == {"a": "slack-incoming-webhook/a-channel"}
    assert "s3cret" not in given.model_dump_json()
    chat = SlackChannel(credentials=SlackCredentials(token="xoxb-s3cret"), channel="#a")
    assert "s3cret" not in chat.model_dump_json()


def test_a_url_in_place_of_a_channel_is_not_repeated() -> None:
    """Whoever pastes a webhook's URL into the wrong field does not find it in the error."""
    with pytest.raises(ValidationError) as refused:
        SlackChannel(credentials="slack", channel="https://hooks.slack.com/services/T/B/s3cret")
    assert "s3cret" not in str(refused.value)
