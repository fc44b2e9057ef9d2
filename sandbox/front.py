"""The front door: an ASGI layer before all routes that logs every vendor request and lets faults happen."""

from __future__ import annotations

import asyncio
import logging
import socket
import struct
import time
from typing import Any

import orjson
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sandbox.faults import Fault, FaultBook
from sandbox.requestlog import LoggedRequest, RequestLog

_log = logging.getLogger("sandbox")
_VENDORS = (
    ("/api/public/", "airbyte"),
    ("/api/v1/", "airbyte"),
    ("/hightouch/api/", "hightouch"),
    ("/census/api/", "census"),
    ("/services/", "slack"),
    ("/api/v2/", "dbt_cloud"),
    ("/fivetran/v1/", "fivetran"),
    ("/slack/api/", "slack"),
    ("/pagerduty/v2/", "pagerduty"),
    ("/power_bi/", "power_bi"),
    ("/tableau/api/", "tableau"),
)
_AFTER_THE_VENDOR = ("drop_after", "cut", "truncated_json", "null_fields")


def vendor_of(path: str) -> str | None:
    """Whose API a path belongs to, if any vendor's."""
    return next((vendor for prefix, vendor in _VENDORS if path.startswith(prefix)), None)


class Front:
    """Logs, delays, breaks, or passes a request on."""

    def __init__(self, app: ASGIApp, log: RequestLog, faults: FaultBook) -> None:
        self.app = app
        self.log = log
        self.faults = faults

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            return
        path: str = scope["path"]
        vendor = vendor_of(path)
        answered = False

        async def noting_send(message: Message) -> None:
            nonlocal answered
            answered = True
            await send(message)

        try:
            if vendor is None:
                await self.app(scope, receive, noting_send)
            else:
                await self._vendor_request(vendor, path, scope, receive, noting_send)
        except asyncio.CancelledError:
            # The sandbox is being stopped: the client's connection is gone, nothing is left to answer.
            return
        except Exception:  # noqa: BLE001 - a server's last resort: say it and answer 500, whatever it was
            _log.exception("The sandbox failed on %s %s", scope["method"], path)
            if not answered:
                await _answer(send, 500, b"The sandbox failed", [(b"content-type", b"text/plain")])

    async def _vendor_request(
        self, vendor: str, path: str, scope: Scope, receive: Receive, send: Send
    ) -> None:
        began = time.perf_counter()
        method: str = scope["method"]
        body = b"" if method == "GET" else await _body(receive)
        entry = self.log.add(vendor, method, path, scope["query_string"].decode("latin-1"), body)

        async def replay() -> Message:
            return {"type": "http.request", "body": body, "more_body": False}

        async def noting_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                entry.status = message["status"]
            await send(message)

        try:
            fault = self.faults.take(vendor, method, path)
            if fault is None:
                await self.app(scope, replay, noting_send)
            else:
                await self._with_fault(fault, entry, (scope, replay, noting_send), receive)
        finally:
            entry.seconds = round(time.perf_counter() - began, 6)

    async def _with_fault(
        self, fault: Fault, entry: LoggedRequest, request: tuple[Scope, Receive, Send], receive: Receive
    ) -> None:
        scope, replay, send = request
        entry.fault = fault.kind
        if fault.delay:
            await asyncio.sleep(fault.delay)
        if fault.kind == "delay":
            await self.app(scope, replay, send)
        elif fault.kind in ("drop", "reset"):
            await _hang_up(scope, receive, reset=fault.kind == "reset")
        elif fault.kind in _AFTER_THE_VENDOR:
            status, body, headers = await self._processed(scope, replay)
            if fault.kind == "drop_after":
                await _hang_up(scope, receive)
            elif fault.kind == "cut":
                await _start(send, status, headers, len(body))
                await send({"type": "http.response.body", "body": body[: len(body) // 2], "more_body": True})
                await _hang_up(scope, receive)
            elif fault.kind == "truncated_json":
                await _answer(send, status, body[: len(body) // 2], headers)
            else:
                await _answer(send, status, _nulled(body, fault.fields), headers)
        else:
            status, body, headers = fault.reply()
            await _answer(send, status, body, headers)

    async def _processed(
        self, scope: Scope, receive: Receive
    ) -> tuple[int, bytes, list[tuple[bytes, bytes]]]:
        """The vendor's own reply to a request, held back."""
        status, headers, chunks = 200, list[tuple[bytes, bytes]](), list[bytes]()

        async def capture(message: Message) -> None:
            nonlocal status, headers
            if message["type"] == "http.response.start":
                status, headers = message["status"], list(message["headers"])
            else:
                chunks.append(message.get("body", b""))

        await self.app(scope, receive, capture)
        return status, b"".join(chunks), headers


async def _body(receive: Receive) -> bytes:
    chunks: list[bytes] = []
    while True:
        message = await receive()
        chunks.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(chunks)


async def _start(send: Send, status: int, headers: list[tuple[bytes, bytes]], length: int) -> None:
    kept = [(name, value) for name, value in headers if name.lower() != b"content-length"]
    kept.append((b"content-length", str(length).encode()))
    await send({"type": "http.response.start", "status": status, "headers": kept})


async def _answer(send: Send, status: int, body: bytes, headers: list[tuple[bytes, bytes]]) -> None:
    await _start(send, status, headers, len(body))
    await send({"type": "http.response.body", "body": body})


async def _hang_up(scope: Scope, receive: Receive, *, reset: bool = False) -> None:
    """Close the client's connection for real, and wait until the server has noticed."""
    transport: asyncio.Transport = scope["state"]["transport"]
    if reset:
        connection = transport.get_extra_info("socket")
        # Lingering for no time makes the kernel send a reset in place of an orderly end.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.close()
    while (await receive())["type"] != "http.disconnect":
        pass


def _nulled(body: bytes, fields: list[str]) -> bytes:
    try:
        parsed = orjson.loads(body)
    except orjson.JSONDecodeError:
        return body
    return orjson.dumps(_set_null(parsed, set(fields)))


def _set_null(value: Any, fields: set[str]) -> Any:
    if isinstance(value, list):
        return [_set_null(inner, fields) for inner in value]
    if not isinstance(value, dict):
        return value
    return {
        key: None if not fields or key in fields else _set_null(inner, fields) for key, inner in value.items()
    }
