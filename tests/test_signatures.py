"""Signatures of webhooks: those that vendors make pass, and whatever else a stranger may send does not."""

from __future__ import annotations

import hashlib
import hmac
from typing import Any

import pytest
from pydantic import SecretStr

from blocks.signatures import BadSignature, Sender, check_signature

pytestmark = pytest.mark.no_server

SECRET = SecretStr("steering-test-secret")
HOOK = '{"event":"sync_end","connector_id":"mystified_presidency","data":{"status":"SUCCESSFUL"}}'
SLASH = (
    "token=gIkuvaNzQIHg97ATvDxqgjtO&team_id=T0001&team_domain=example&channel_id=C2147483"
    "705&channel_name=data-ops&user_id=U2147483697&user_name=steve&command=%2Fsteering&te"
    "xt=resync+orders_pg+--full&api_app_id=A123456&response_url=https%3A%2F%2Fhooks.slack"
    ".com%2Fcommands%2F1234%2F5678&trigger_id=13345224609.738474920.8088930838d88f008e0"
)
# Slack's own example, from its documentation on verifying requests.
PUBLISHED = (
    "token=xyzz0WbapA4vBCDEFasx0q6G&team_id=T1DC2JH3J&team_domain=testteamnow&channel_id="
    "G8PSS9T3V&channel_name=foobar&user_id=U2CERLKJA&user_name=roadrunner&command=%2Fwebh"
    "ook-collect&text=&response_url=https%3A%2F%2Fhooks.slack.com%2Fcommands%2FT1DC2JH3J%"
    "2F397700885554%2F96rGlfmibIGlgcZRskXaIFfN&trigger_id=398738663015.47445629121.803a0b"
    "c887a14d10d2c447fce8b6703c"
)
PUBLISHED_SECRET = SecretStr("8f742231b10e8888abcd99yyyzzz85a5")
NOW = 1772431200.0

SIGNED: dict[Sender, dict[str, str]] = {
    "fivetran": {
        "X-Fivetran-Signature-256": "33AF5DEF286DB40F29D64710C183648BE88F583160CF84626AB25C7D8A54C575"
    },
    "dbt-cloud": {"Authorization": "33af5def286db40f29d64710c183648be88f583160cf84626ab25c7d8a54c575"},
    "census": {"X-Signature": "M69d7yhttA8p1kcQwYNki+iPWDFgz4RiarJcfYpUxXU="},
    "slack": {
        "X-Slack-Request-Timestamp": "1772431200",
        "X-Slack-Signature": "v0=e186f4794f80742f7311764f74970638321bf40eb88ad55e8fd5738035a02501",
    },
    "pagerduty": {
        # The second of two, as while a secret is being changed.
        "X-PagerDuty-Signature": "v1="
        + "0" * 64
        + ",v1="
        + hmac.new(b"steering-test-secret", HOOK.encode(), hashlib.sha256).hexdigest()
    },
}
SENDERS = sorted(SIGNED)


def body(sender: Sender) -> bytes:
    return (SLASH if sender == "slack" else HOOK).encode()


def check(sender: Sender, **changes: Any) -> None:
    given = {"headers": SIGNED[sender], "body": body(sender), "secrets": [SECRET], "now": NOW, **changes}
    check_signature(sender, **given)


@pytest.mark.parametrize("sender", SENDERS)
def test_what_a_vendor_signed(sender: Sender) -> None:
    """What the vendor signed passes, however the name of the header is written."""
    check(sender)
    check(sender, headers={name.lower(): value for name, value in SIGNED[sender].items()})
    check(sender, secrets=[SecretStr("the next one"), SECRET])


def test_slacks_own_example() -> None:
    """The example that Slack publishes passes at its time."""
    headers = {
        "X-Slack-Request-Timestamp": "1531420618",
        "X-Slack-Signature": "v0=a2114d57b48eac39b9ad189dd8316235a7b4a8d21a10bd27519666489c69b503",
    }
    check_signature("slack", headers, PUBLISHED.encode(), [PUBLISHED_SECRET], now=1531420618.0)


@pytest.mark.parametrize("sender", SENDERS)
@pytest.mark.parametrize(
    "changes",
    [
        {"body": b"{}"},
        {"body": b"\xff\xfe"},
        {"secrets": [SecretStr("another")]},
        {"secrets": []},
        {"headers": {}},
    ],
    ids=["body", "not text", "secret", "no secret", "no header"],
)
def test_what_a_stranger_sends(sender: Sender, changes: dict[str, Any]) -> None:
    """Another body, another secret or no header at all is refused, in words that give nothing away."""
    with pytest.raises(BadSignature) as caught:
        check(sender, **changes)
    told = str(caught.value)
    assert "steering" not in told
    assert not any(value in told for value in SIGNED[sender].values())


@pytest.mark.parametrize("sender", SENDERS)
@pytest.mark.parametrize("signature", ["", " ", "v0=", "é" * 64, "=" * 44, "0" * 64])
def test_signatures_that_are_none(sender: Sender, signature: str) -> None:
    """Whatever stands in the header, the answer is a refusal and not an error of ours."""
    name = next(name for name in SIGNED[sender] if "Timestamp" not in name)
    with pytest.raises(BadSignature):
        check(sender, headers={**SIGNED[sender], name: signature})


@pytest.mark.parametrize(
    "moment",
    ["", "now", "-1772431200", "1772431200.5", "٣٤", "1772430899", "1772431501", "9" * 400, "9" * 5000],
)
def test_slack_requests_of_another_time(moment: str) -> None:
    """A request from more than five minutes ago or ahead, or of no time at all, is refused."""
    with pytest.raises(BadSignature):
        check("slack", headers={**SIGNED["slack"], "X-Slack-Request-Timestamp": moment})
