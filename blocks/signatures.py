"""Whether a webhook was really sent by whom it says: the signatures of those vendors that sign.

For whoever receives webhooks. The body must be the bytes as they came, before any parsing. Airbyte and
Hightouch do not sign. Of these signatures only Slack's holds a time, so a caller must also remember what it
has seen: `sync_id` and event of Fivetran, `eventId` of dbt Cloud, `sync_run_id` and event of Census, Slack's
signature.

Vendor documentation:
    Fivetran: https://fivetran.com/docs/rest-api/webhooks
    dbt Cloud: https://docs.getdbt.com/docs/deploy/webhooks
    Census: https://docs.getcensus.com/basics/developers/webhooks
    Slack: https://docs.slack.dev/authentication/verifying-requests-from-slack
    PagerDuty: https://developer.pagerduty.com/docs/verifying-webhook-signatures
"""

from __future__ import annotations

import base64
import hmac
import time
from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import Literal

from pydantic import SecretStr

Sender = Literal["fivetran", "dbt-cloud", "census", "slack", "pagerduty"]
Encoding = Literal["hex", "base64"]

_HEADERS: dict[Sender, str] = {
    "fivetran": "X-Fivetran-Signature-256",
    "dbt-cloud": "Authorization",  # the header itself is the signature, without a scheme
    "census": "X-Signature",
    "slack": "X-Slack-Signature",
    "pagerduty": "X-PagerDuty-Signature",
}
_SLACK_TIME = "X-Slack-Request-Timestamp"
_LONGEST_TIME = 20  # digits
_SLACK_WINDOW = 300  # seconds, as Slack's documentation asks


class BadSignature(Exception):
    """A request is not signed by whom it says, or too long ago. To be answered with 401."""


def check_signature(
    sender: Sender,
    headers: Mapping[str, str],
    body: bytes,
    secrets: Sequence[SecretStr],
    *,
    now: float | None = None,
) -> None:
    """See that a request was signed with one of the secrets.

    Args:
        sender: Who says to have sent it.
        headers: Of the request; their names in any case.
        body: The bytes of the request as they came.
        secrets: The secrets that are valid, more than one while one is being changed.
        now: Seconds since 1970; the present moment by default.

    Raises:
        BadSignature: It was not; says why, without the signature or a secret.
    """
    found = {name.casefold(): value for name, value in headers.items()}
    given = found.get(_HEADERS[sender].casefold(), "").strip()
    if not given:
        raise BadSignature(f"there is no header {_HEADERS[sender]}")
    signed = body
    if sender == "slack":
        moment = found.get(_SLACK_TIME.casefold(), "")
        # Before it is made a number: what Slack sends is digits alone, and not hundreds of them.
        if not (moment.isascii() and moment.isdigit() and len(moment) <= _LONGEST_TIME):
            raise BadSignature(f"the header {_SLACK_TIME} holds no time")
        if abs((time.time() if now is None else now) - int(moment)) > _SLACK_WINDOW:
            raise BadSignature(f"it was signed more than {_SLACK_WINDOW} s ago, or ahead")
        signed = b"v0:" + moment.encode() + b":" + body
    # Compared as bytes: the texts of a stranger may hold anything.
    candidates = [part.strip().encode() for part in (given.split(",") if sender == "pagerduty" else [given])]
    for secret in secrets:
        digest = hmac.new(secret.get_secret_value().encode(), signed, sha256)
        expected = _written(sender, digest)
        for candidate in candidates:
            # Fivetran writes its hex in capitals; hex means the same either way.
            if sender in ("fivetran", "dbt-cloud"):
                candidate = candidate.lower()
            if hmac.compare_digest(candidate, expected):
                return
    raise BadSignature(f"the header {_HEADERS[sender]} does not fit the body")


def check_hmac(
    headers: Mapping[str, str],
    body: bytes,
    secrets: Sequence[SecretStr],
    *,
    header: str,
    prefix: str = "",
    encoding: Encoding = "hex",
) -> None:
    """See that a header holds the HMAC-SHA256 of the body, made with one of the secrets.

    Args:
        headers: Of the request; their names in any case.
        body: The bytes of the request as they came.
        secrets: The secrets that are valid.
        header: Name of the header with the signature.
        prefix: What stands before it, such as `sha256=`.
        encoding: How it is written.

    Raises:
        BadSignature: It does not.
    """
    given = {name.casefold(): value for name, value in headers.items()}.get(header.casefold(), "").strip()
    if not given.startswith(prefix) or not given:
        raise BadSignature(f"there is no header {header}" + (f" that begins with {prefix}" if prefix else ""))
    candidate = given.removeprefix(prefix).encode()
    for secret in secrets:
        digest = hmac.new(secret.get_secret_value().encode(), body, sha256)
        if encoding == "base64":
            expected = base64.b64encode(digest.digest())
        else:
            expected, candidate = digest.hexdigest().encode(), candidate.lower()
        if hmac.compare_digest(candidate, expected):
            return
    raise BadSignature(f"the header {header} does not fit the body")


def check_token(headers: Mapping[str, str], secrets: Sequence[SecretStr], *, header: str) -> None:
    """See that a header holds one of the secrets itself, as GitLab and EventBridge send it.

    Raises:
        BadSignature: It does not.
    """
    given = {name.casefold(): value for name, value in headers.items()}.get(header.casefold(), "")
    if not is_secret(given, secrets):
        raise BadSignature(f"the header {header} is not there or holds another secret")


def is_secret(given: str, secrets: Sequence[SecretStr]) -> bool:
    """Whether a stranger's text is one of the secrets; takes as long whatever they have in common."""
    return any(hmac.compare_digest(given.encode(), one.get_secret_value().encode()) for one in secrets)


def _written(sender: Sender, digest: hmac.HMAC) -> bytes:
    match sender:
        case "census":
            return base64.b64encode(digest.digest())
        case "slack":
            return b"v0=" + digest.hexdigest().encode()
        case "pagerduty":
            return b"v1=" + digest.hexdigest().encode()
        case _:
            return digest.hexdigest().encode()
