"""What Airbyte's two APIs have in common on their way in: credentials, load shedding, JSON."""

from __future__ import annotations

import base64
import binascii
import time
from collections import deque
from typing import Any
from urllib.parse import parse_qsl
from uuid import uuid4

import orjson
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from sandbox import catalog
from sandbox.airbyte import Airbyte
from sandbox.airbyte_problems import Problem

# What a self-managed server sends for any address that it does not know: its web interface.
_WEB_APP = "<!doctype html><html><head><title>Airbyte</title></head><body><div id=root></div></body></html>"


class Door:
    """Lets requests in, for both APIs of one server."""

    def __init__(self, airbyte: Airbyte) -> None:
        self.airbyte = airbyte
        self._recent: deque[float] = deque()

    def check(self, request: Request) -> None:
        """Let a request in.

        Raises:
            Problem: 401 without the right credentials, 429 beyond the limit that is set.
        """
        self._authorize(request)
        self._shed_load()

    def _authorize(self, request: Request) -> None:
        settings = self.airbyte.settings
        scheme, _, credentials = request.headers.get("authorization", "").partition(" ")
        if settings.auth == "none":
            return
        if settings.auth == "basic":
            try:
                sent = base64.b64decode(credentials, validate=True).decode()
            except (binascii.Error, UnicodeDecodeError):
                sent = ""
            if scheme.lower() == "basic" and sent == f"{catalog.BASIC_USER}:{catalog.BASIC_PASSWORD}":
                return
        elif scheme.lower() == "bearer" and self.airbyte.token_is_valid(credentials.strip()):
            return
        raise Problem(401)

    def _shed_load(self) -> None:
        limit = self.airbyte.settings.requests_per_minute
        if limit is None:
            return
        now = time.monotonic()
        while self._recent and self._recent[0] < now - 60:
            self._recent.popleft()
        if len(self._recent) >= limit:
            raise Problem(429, body={"message": "You are being rate limited."})
        self._recent.append(now)

    async def token(self, request: Request) -> tuple[str, float]:
        """A bearer token and its lifetime for client credentials, as JSON or a form.

        Raises:
            Problem: 400, 401 or 422.
        """
        body = await request.body()
        if "x-www-form-urlencoded" in request.headers.get("content-type", ""):
            sent: Any = dict(parse_qsl(body.decode("utf-8", "replace")))
        else:
            sent = parsed(body)
        if not isinstance(sent, dict):
            raise Problem(422, "The body is not an object")
        self.airbyte.token_requests += 1
        grant = sent.get("grant_type", sent.get("grant-type", "client_credentials"))
        if grant != "client_credentials":
            raise Problem(400, f"Unsupported grant type: {grant}")
        if (sent.get("client_id"), sent.get("client_secret")) != (catalog.CLIENT_ID, catalog.CLIENT_SECRET):
            raise Problem(401, body={"errorId": str(uuid4())})
        return self.airbyte.issue_token()


def reply(body: Any, status: int = 200, media: str = "application/json") -> Response:
    """A JSON reply, or plain text for a string."""
    if isinstance(body, str):
        return Response(body, status, media_type="text/plain")
    return Response(orjson.dumps(body), status, media_type=media)


def web_app() -> Response:
    """The web interface's page, which stands where there is no API."""
    return HTMLResponse(_WEB_APP)


def parsed(body: bytes) -> Any:
    """A JSON body.

    Raises:
        Problem: 422, it is none.
    """
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as exc:
        raise Problem(422, "The body is not valid JSON") from exc
