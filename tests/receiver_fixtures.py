"""What the tests of the receiver send: hooks as each vendor signs them, to an application or a process."""

from __future__ import annotations

import base64
import hmac
import json
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any
from urllib.parse import urlencode
from uuid import uuid4

import httpx
from pydantic import SecretStr

from blocks.receiver import SignedWebhook
from deployments.receiver.app import Limits, build_app
from deployments.receiver.signed import SignedWebhookSource
from deployments.receiver.source import Source
from tasks.events import OnceTrigger

SECRET = SecretStr("a-secret-of-the-tests")


def mac(body: bytes, secret: SecretStr = SECRET) -> hmac.HMAC:
    return hmac.new(secret.get_secret_value().encode(), body, sha256)


@dataclass(frozen=True)
class Sent:
    """A request of a sender's."""

    path: str
    body: bytes
    headers: dict[str, str] = field(default_factory=dict)

    def but(self, **changes: Any) -> Sent:
        return Sent(**{"path": self.path, "body": self.body, "headers": self.headers, **changes})


def as_json(document: Any) -> bytes:
    return json.dumps(document).encode()


def by_fivetran(document: Any, name: str = "main") -> Sent:
    body = document if isinstance(document, bytes) else as_json(document)
    signature = mac(body).hexdigest().upper()
    return Sent(f"/hooks/fivetran-webhook/{name}", body, {"X-Fivetran-Signature-256": signature})


def by_dbt_cloud(document: Any, name: str = "main") -> Sent:
    body = document if isinstance(document, bytes) else as_json(document)
    return Sent(f"/hooks/dbt-cloud-webhook/{name}", body, {"Authorization": mac(body).hexdigest()})


def by_census(document: Any, name: str = "main") -> Sent:
    body = document if isinstance(document, bytes) else as_json(document)
    signature = base64.b64encode(mac(body).digest()).decode()
    return Sent(f"/hooks/census-webhook/{name}", body, {"X-Signature": signature})


def by_pagerduty(document: Any, name: str = "main") -> Sent:
    body = document if isinstance(document, bytes) else as_json(document)
    signature = f"v1={'0' * 64},v1={mac(body).hexdigest()}"
    return Sent(f"/hooks/pagerduty-webhook/{name}", body, {"X-PagerDuty-Signature": signature})


def by_git(provider: str, event: str, document: Any, name: str = "main") -> Sent:
    body = document if isinstance(document, bytes) else as_json(document)
    signature = f"sha256={mac(body).hexdigest()}"
    headers = {
        "github": {"X-GitHub-Event": event, "X-Hub-Signature-256": signature},
        "gitlab": {"X-Gitlab-Event": event, "X-Gitlab-Token": SECRET.get_secret_value()},
        "bitbucket": {"X-Event-Key": event, "X-Hub-Signature": signature},
    }[provider]
    return Sent(f"/hooks/git-webhook/{name}", body, headers)


def by_signed(document: Any, name: str = "main") -> Sent:
    body = document if isinstance(document, bytes) else as_json(document)
    return Sent(f"/hooks/signed-webhook/{name}", body, {"X-Signature-256": mac(body).hexdigest()})


def by_slack(fields: dict[str, str] | bytes, at: float | None = None, name: str = "main") -> Sent:
    body = fields if isinstance(fields, bytes) else urlencode(fields).encode()
    moment = str(int(time.time() if at is None else at))
    signature = mac(b"v0:" + moment.encode() + b":" + body).hexdigest()
    headers = {"X-Slack-Request-Timestamp": moment, "X-Slack-Signature": f"v0={signature}"}
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    return Sent(f"/hooks/slack-command/{name}", body, headers | form)


def signed_source(name: str = "main", **fields: Any) -> SignedWebhookSource:
    return SignedWebhookSource(SignedWebhook(**{"secret": SECRET, "id_path": "id", **fields}), name)


@asynccontextmanager
async def running(
    sources: Sequence[Source[Any]], triggers: Sequence[OnceTrigger] = (), limits: Limits | None = None
) -> AsyncIterator[httpx.AsyncClient]:
    """The application, as a server runs it, and a client for it."""
    app = build_app(sources, triggers, limits)
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(app.router.lifespan_context(app))
        transport = httpx.ASGITransport(app)
        yield await stack.enter_async_context(
            httpx.AsyncClient(transport=transport, base_url="http://receiver")
        )


async def post(client: httpx.AsyncClient, sent: Sent) -> httpx.Response:
    return await client.post(sent.path, content=sent.body, headers=sent.headers)


def an_id() -> str:
    return uuid4().hex
