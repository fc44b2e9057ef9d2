"""The manners of `ApiClient`: tokens, retries, limits, and errors that say enough and not too much."""

from __future__ import annotations

import asyncio
import base64
import json
import pickle
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import httpx
import pytest
import stamina
from pydantic import SecretStr, TypeAdapter, ValidationError

from blocks import AirbyteServer, HightouchCredentials
from blocks.airbyte import address_of, split_address
from blocks.airbyte_client import _read_token
from blocks.errors import RETRY_AFTER_CAP, parse_retry_after
from blocks.http import (
    ApiClient,
    AuthError,
    BadReply,
    ConflictError,
    NotFoundError,
    RateLimited,
    VendorError,
    VendorUnavailable,
    shared_client,
)
from sandbox import Sandbox, catalog

ANYTHING: TypeAdapter[Any] = TypeAdapter(Any)
FLIGHTS = catalog.CONNECTIONS[0].connection_id
SECRET = catalog.CLIENT_SECRET
NOW = datetime(2013, 1, 1, 12, 0, 0, tzinfo=UTC)


@asynccontextmanager
async def answering(*replies: bytes | None) -> AsyncIterator[str]:
    """A server that sends these bytes in turn, the last one for ever, or nothing until the client leaves."""
    left = list(replies)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        if (answer := left.pop(0) if len(left) > 1 else left[0]) is None:
            await reader.read()
        else:
            writer.write(answer)
            await writer.drain()
        writer.close()
        await writer.wait_closed()
        closed.release()

    closed = asyncio.Semaphore(0)
    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        await closed.acquire()  # its end of the connection is closed too


def reply(body: bytes, *headers: str, status: str = "200 OK") -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", "Connection: close", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + body


async def ask(base_url: str, method: str = "GET", **options: Any) -> Any:
    client = ApiClient("Vendor", base_url, **options)
    try:
        return await client.send(method, "/thing", ANYTHING, body=None if method == "GET" else {})
    finally:
        await client.aclose()


# -- Retry-After


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        (None, None),
        ("", None),
        ("7", 7.0),
        ("0.5", 0.5),
        ("-3", 0.0),
        ("soon", None),
        ("nan", None),
        ("1e999", None),
        ("Tue, 01 Jan 2013 12:00:30 GMT", 30.0),
        ("Tue, 01 Jan 2013 11:00:00 GMT", 0.0),
        ("Tue, 01 Jan 2013 13:00:30 +0100", 30.0),
        ("Tue, 99 Jan 2013 12:00:30 GMT", None),
    ],
)
def test_retry_after_spellings(header: str | None, seconds: float | None) -> None:
    """Retry-After is read as seconds or a date; what is neither counts as not sent."""
    assert parse_retry_after(header, NOW) == seconds


async def test_hours_are_capped_and_said(sandbox: Sandbox, airbyte: AirbyteServer) -> None:
    """A Retry-After of hours is cut to the cap, and the error says so."""
    sandbox.faults.add(kind="status", status=429, path="/jobs", headers={"Retry-After": "7200"})
    async with airbyte.connect() as api:
        with pytest.raises(RateLimited, match="asks to wait 7200 s; we wait 120 s") as caught:
            await api.job("1", retry=False)
    assert caught.value.pause == RETRY_AFTER_CAP


async def test_retry_after_date_by_the_vendors_clock() -> None:
    """A Retry-After date is taken by the clock of the vendor that sent it, however wrong that is."""
    theirs = datetime.now(UTC).replace(microsecond=0) + timedelta(hours=9)
    headers = [
        f"{name}: {format_datetime(moment, usegmt=True)}"
        for name, moment in (("Date", theirs), ("Retry-After", theirs + timedelta(seconds=20)))
    ]
    async with answering(reply(b"{}", *headers, status="429 Too Many")) as url:
        with pytest.raises(RateLimited) as caught:
            await ask(url)
    assert caught.value.retry_after == 20.0


async def test_a_get_waits_as_long_as_it_was_told(sandbox: Sandbox, airbyte: AirbyteServer) -> None:
    """A GET that was answered with 429 and Retry-After: 1 is sent again after a second."""
    sandbox.faults.add(kind="status", status=429, path="/jobs", headers={"Retry-After": "1"}, times=1)
    began = time.monotonic()
    async with airbyte.connect() as api:
        assert await api.newest_jobs(FLIGHTS, "sync") == []
    assert time.monotonic() - began >= 1.0
    assert sandbox.requests.count(path="/jobs") == 2


# -- tokens


async def test_one_token_for_fifty_requests(sandbox: Sandbox, airbyte: AirbyteServer) -> None:
    """Fifty requests at once share one token request."""
    async with airbyte.connect() as api:
        await asyncio.gather(*(api.newest_jobs(FLIGHTS, "sync") for _ in range(50)))
    assert sandbox.airbyte.token_requests == 1


async def test_a_revoked_token_is_replaced_once(sandbox: Sandbox, airbyte: AirbyteServer) -> None:
    """A token that is refused before its time is fetched once more for all who hold it."""
    async with airbyte.connect() as api:
        await api.newest_jobs(FLIGHTS, "sync")
        sandbox.airbyte.revoke_tokens()
        # Some hear of it only when the others have a new one already, which they must not throw away.
        sandbox.faults.add(kind="status", status=401, delay=0.3, path="/jobs", times=10)
        await asyncio.gather(*(api.newest_jobs(FLIGHTS, "sync") for _ in range(50)))
        assert await api.newest_jobs(FLIGHTS, "sync") == []
    assert sandbox.airbyte.token_requests == 2


async def test_401_for_ever_is_an_auth_error(sandbox: Sandbox, airbyte: AirbyteServer) -> None:
    """A 401 with a fresh token ends at the second try."""
    fault = sandbox.faults.add(kind="status", status=401, path="/jobs")
    async with airbyte.connect() as api:
        with pytest.raises(AuthError, match="Check the credentials"):
            await api.newest_jobs(FLIGHTS, "sync")
    assert sandbox.faults.hits(fault) == 2
    assert sandbox.airbyte.token_requests == 2


async def test_short_lived_tokens(sandbox: Sandbox, airbyte: AirbyteServer) -> None:
    """Fifty pollers outlive a token of three seconds with one token request in three seconds."""
    sandbox.airbyte.settings.token_seconds = 3.0

    async def poll(api: Any) -> None:
        for _ in range(8):
            await api.newest_jobs(FLIGHTS, "sync")
            await asyncio.sleep(0.5)

    began = time.monotonic()
    async with airbyte.connect() as api:
        await asyncio.gather(*(poll(api) for _ in range(50)))
    seconds = time.monotonic() - began
    assert 2 <= sandbox.airbyte.token_requests <= seconds / 2.85 + 1


def _jwt(claims: dict[str, Any]) -> str:
    return f"e30.{base64.urlsafe_b64encode(json.dumps(claims).encode()).decode().rstrip('=')}.x"


_DATED = "a JWT that ends in 3000 s"


@pytest.mark.parametrize(
    ("body", "seconds"),
    [
        ({"access_token": "t", "expires_in": 900}, 900),
        ({"access_token": _DATED}, 3000),
        ({"access_token": _DATED, "expires_in": None}, 3000),
        ({"access_token": _jwt({"exp": 1})}, 150),
        ({"access_token": _jwt({"sub": "x"})}, 150),
        ({"access_token": "a.b.c", "expires_in": "soon"}, 150),
        ({"access_token": "opaque", "expires_in": 0}, 150),
    ],
)
def test_how_long_a_token_lives(body: dict[str, Any], seconds: float) -> None:
    """A token lives as long as the reply says, else as the JWT says, else as long as Airbyte's shortest."""
    if body["access_token"] is _DATED:  # made here: the table is made minutes before the test runs
        body = {**body, "access_token": _jwt({"exp": time.time() + 3000})}
    assert _read_token(body)[1] == pytest.approx(seconds, abs=90)


async def test_a_wrong_secret_is_tried_once(sandbox: Sandbox, airbyte: AirbyteServer) -> None:
    """Fifty requests at once with a wrong secret send it once, and all fail with the same sentence."""
    wrong = airbyte.model_copy(update={"client_secret": SecretStr("wrong-secret")})
    async with wrong.connect() as api:
        errors = await asyncio.gather(
            *(api.newest_jobs(FLIGHTS, "sync") for _ in range(50)), return_exceptions=True
        )
    assert sandbox.airbyte.token_requests == 1
    assert {type(error) for error in errors} == {AuthError}
    assert "client id or the client secret was refused" in str(errors[7])


async def test_no_token_during_an_outage_is_no_auth_error(sandbox: Sandbox, airbyte: AirbyteServer) -> None:
    """When a token expires while the token endpoint is down, that is an outage for all who wait."""
    async with airbyte.connect() as api:
        await api.newest_jobs(FLIGHTS, "sync")
        sandbox.airbyte.revoke_tokens()
        sandbox.faults.add(kind="status", status=503, path="/token", delay=0.05)
        errors = await asyncio.gather(*(api.job("1", retry=False) for _ in range(10)), return_exceptions=True)
    assert {type(error) for error in errors} == {VendorUnavailable}


@pytest.mark.parametrize(
    ("fault", "error", "says"),
    [
        ({"kind": "html", "status": 200}, BadReply, "HTML page"),
        ({"kind": "html", "status": 403}, BadReply, "web interface"),
        ({"kind": "html", "status": 405}, BadReply, "web interface"),
        ({"kind": "html", "status": 502}, VendorUnavailable, "no token"),
        ({"kind": "html", "status": 526}, VendorUnavailable, "no token"),
        ({"kind": "status", "status": 501}, VendorError, "no token"),
        ({"kind": "status", "status": 302, "headers": {"Location": "/login"}}, BadReply, "redirects"),
        ({"kind": "status", "status": 404, "body": {}}, NotFoundError, "no token endpoint"),
        ({"kind": "status", "status": 429, "headers": {"Retry-After": "9"}}, RateLimited, "token"),
        ({"kind": "status", "status": 200, "body": {"access_token": 1}}, BadReply, "JSON"),
        ({"kind": "status", "status": 200, "body": []}, BadReply, "JSON"),
        ({"kind": "truncated_json"}, BadReply, "JSON"),
        ({"kind": "drop"}, VendorUnavailable, "lost"),
    ],
)
async def test_token_endpoint_troubles(
    sandbox: Sandbox, airbyte: AirbyteServer, fault: dict[str, Any], error: type[VendorError], says: str
) -> None:
    """Whatever the token endpoint does, the error says what it is and that nothing was started."""
    sandbox.faults.add(path="/token", **fault)
    async with airbyte.connect() as api:
        with pytest.raises(error, match=says) as caught:
            await api.create_job(FLIGHTS, "sync")
    assert caught.value.sent is False
    assert sandbox.airbyte.jobs == {}


# -- errors


@pytest.mark.parametrize(
    ("fault", "error", "may_have_started"),
    [
        ({"kind": "status", "status": 400, "body": {"message": "no"}}, VendorError, False),
        ({"kind": "status", "status": 401}, AuthError, False),
        ({"kind": "status", "status": 403}, AuthError, False),
        ({"kind": "status", "status": 404, "body": {"title": "gone"}}, NotFoundError, False),
        ({"kind": "status", "status": 404, "body": "404 page not found"}, BadReply, False),
        ({"kind": "status", "status": 409, "body": {}}, ConflictError, False),
        ({"kind": "status", "status": 422, "body": {}}, VendorError, False),
        ({"kind": "status", "status": 429}, RateLimited, False),
        ({"kind": "status", "status": 408}, VendorUnavailable, True),
        ({"kind": "status", "status": 500, "body": "Internal Server Error"}, VendorUnavailable, True),
        ({"kind": "status", "status": 501}, VendorError, True),
        ({"kind": "status", "status": 507, "body": {}}, VendorUnavailable, True),
        ({"kind": "html", "status": 530}, VendorUnavailable, True),
        ({"kind": "html", "status": 503}, VendorUnavailable, True),
        ({"kind": "html", "status": 200}, BadReply, True),
        ({"kind": "html", "status": 404}, BadReply, False),
        ({"kind": "status", "status": 307, "headers": {"Location": "http://x/"}}, BadReply, False),
        ({"kind": "empty"}, BadReply, True),
        ({"kind": "garbage"}, BadReply, True),
        ({"kind": "truncated_json"}, BadReply, True),
        ({"kind": "null_fields"}, BadReply, True),
        ({"kind": "drop"}, VendorUnavailable, True),
        ({"kind": "reset"}, VendorUnavailable, True),
        ({"kind": "cut"}, VendorUnavailable, True),
        ({"kind": "drop_after"}, VendorUnavailable, True),
    ],
)
async def test_the_tree(
    sandbox: Sandbox,
    airbyte: AirbyteServer,
    fault: dict[str, Any],
    error: type[VendorError],
    may_have_started: bool,
) -> None:
    """Each failure has its place in the tree and says if the start may have had an effect. No repeats."""
    sandbox.faults.add(method="POST", path="/jobs", **fault)
    async with airbyte.connect() as api:
        with pytest.raises(VendorError) as caught:
            await api.create_job(FLIGHTS, "sync")
    assert type(caught.value) is error
    assert caught.value.sent is may_have_started
    assert (caught.value.method, caught.value.path) == ("POST", "/jobs")
    expected = 2 if fault.get("status") == 401 else 1  # a refused token is renewed once
    assert sandbox.requests.count(method="POST", path="/jobs") == expected


async def test_refused_connections_start_nothing(sandbox: Sandbox, airbyte: AirbyteServer) -> None:
    """A connection that was refused has surely had no effect."""
    sandbox.pause()
    async with airbyte.connect() as api:
        with pytest.raises(VendorUnavailable, match="refused") as caught:
            await api.create_job(FLIGHTS, "sync")
    assert caught.value.sent is False


async def test_asking_starts_nothing(sandbox: Sandbox, airbyte: AirbyteServer) -> None:
    """A GET that fails, however it does, is never taken for a start that may have had an effect."""
    sandbox.faults.add(kind="drop", path="/jobs")
    async with airbyte.connect() as api:
        with pytest.raises(VendorUnavailable) as caught:
            await api.job("1", retry=False)
    assert caught.value.sent is False


async def test_broken_compression_is_a_bad_reply() -> None:
    """A body that can't be unpacked is a bad reply, borne like any other."""
    async with answering(reply(b"not packed at all", "Content-Encoding: gzip")) as url:
        with pytest.raises(BadReply, match="compressed"):
            await ask(url)


async def test_a_slow_vendor_is_unavailable() -> None:
    """No reply within the read timeout is an outage, and a start may have had an effect."""
    async with answering(None) as url:
        with pytest.raises(VendorUnavailable, match="no reply in time") as caught:
            await ask(url, "POST", read_timeout=0.2)
    assert caught.value.sent is True


@pytest.mark.parametrize(
    "fault",
    [
        {"kind": "status", "status": 500, "body": {"message": f"secret {SECRET} is not mine"}},
        {"kind": "status", "status": 422, "body": {"detail": f"{{'client_secret': '{SECRET}'}}"}},
        {"kind": "status", "status": 409, "body": {"data": {"message": SECRET}}},
        {"kind": "status", "status": 200, "body": {"jobId": [SECRET]}},
        {"kind": "drop"},
    ],
)
async def test_no_secret_leaves(sandbox: Sandbox, airbyte: AirbyteServer, fault: dict[str, Any]) -> None:
    """A secret that the vendor echoes is in no text of the error, and in nothing that Prefect would store."""
    sandbox.faults.add(method="POST", path="/jobs", **fault)
    async with airbyte.connect() as api:
        with pytest.raises(VendorError) as caught:
            await api.create_job(FLIGHTS, "sync")
    shown = f"{caught.value} {caught.value!r} {caught.value.args}".encode()
    assert SECRET.encode() not in shown + pickle.dumps(caught.value)
    assert b"eyJ" not in shown + pickle.dumps(caught.value), "a token"


@pytest.mark.parametrize(
    "kind",
    [AuthError, BadReply, ConflictError, NotFoundError, RateLimited, VendorError, VendorUnavailable],
)
def test_errors_survive_pickling(kind: type[VendorError]) -> None:
    """An error comes back from Prefect's result storage with all that it said."""
    error = kind("Airbyte", "it broke", method="GET", path="/jobs", status=418, guidance="Do.", sent=False)
    if isinstance(error, RateLimited):
        error.retry_after = 3.0
    back = pickle.loads(pickle.dumps(error))  # noqa: S301 - our own bytes
    assert type(back) is kind
    assert str(back) == str(error) == "Airbyte GET /jobs answered 418: it broke. Do."
    assert back.__dict__ == error.__dict__


# -- repeating, limiting, sharing


@pytest.mark.parametrize("kind", ["drop", "garbage", "empty"])
async def test_gets_are_repeated(sandbox: Sandbox, airbyte: AirbyteServer, kind: str) -> None:
    """A GET is repeated until the vendor answers as it should."""
    sandbox.faults.add(kind=kind, path="/jobs", times=2)
    with stamina.set_testing(True, attempts=6):
        async with airbyte.connect() as api:
            assert await api.newest_jobs(FLIGHTS, "sync") == []
    assert sandbox.requests.count(path="/jobs") == 3


async def test_a_pause_is_said_aloud(
    sandbox: Sandbox, airbyte: AirbyteServer, caplog: pytest.LogCaptureFixture
) -> None:
    """While a request is not sent because the vendor asked us to wait, the log says so."""
    sandbox.faults.add(kind="status", status=429, headers={"Retry-After": "90"}, path="/jobs", times=1)
    with stamina.set_testing(True, attempts=6):  # without the wait itself
        async with airbyte.connect() as api:
            assert await api.newest_jobs(FLIGHTS, "sync") == []
    assert "Airbyte GET /jobs answered 429: Too Many Requests. Pausing for 90 s." in caplog.text


@pytest.mark.parametrize("fault", [{"kind": "html", "status": 200}, {"kind": "status", "status": 404}])
async def test_what_repeating_can_not_mend(
    sandbox: Sandbox, airbyte: AirbyteServer, fault: dict[str, Any]
) -> None:
    """Where it is the base URL that is wrong, the first request says so."""
    sandbox.faults.add(path="/jobs", **fault)
    with stamina.set_testing(True, attempts=6):
        async with airbyte.connect() as api:
            with pytest.raises(BadReply):
                await api.newest_jobs(FLIGHTS, "sync")
    assert sandbox.requests.count(path="/jobs") == (1 if fault["kind"] == "html" else 6)


async def test_the_rate_limit_holds(sandbox: Sandbox, airbyte: AirbyteServer) -> None:
    """No more requests leave per second than the block allows."""
    slow = airbyte.model_copy(update={"requests_per_second": 10.0})
    began = time.monotonic()
    async with slow.connect() as api:
        await asyncio.gather(*(api.newest_jobs(FLIGHTS, "sync") for _ in range(20)))
    assert time.monotonic() - began >= 0.9


async def test_the_rate_limit_holds_from_the_first_request(sandbox: Sandbox) -> None:
    """No more than so many requests go out in any such time, the first one too: vendors count that way."""
    sandbox.hightouch.settings.requests_per_10_seconds = None
    client = ApiClient(
        "Hightouch",
        sandbox.hightouch_url,
        headers={"Authorization": f"Bearer {catalog.HIGHTOUCH_API_KEY}"},
        rate=(20, 1.0),
    )
    times: list[float] = []

    async def leaves(_: httpx.Request) -> None:
        times.append(time.monotonic())

    client._http.event_hooks["request"].append(leaves)
    await asyncio.gather(*(client.get("/syncs", ANYTHING) for _ in range(50)))
    await client.aclose()
    assert len(times) == 50
    most = max(sum(start <= each < start + 0.95 for each in times) for start in times)
    assert most <= 20


async def test_a_client_is_shared_and_closed() -> None:
    """An account has one client while it has users; the last one closes it, even when cancelled."""
    made: list[ApiClient] = []

    def make() -> ApiClient:
        made.append(ApiClient("Vendor", "http://127.0.0.1:9"))
        return made[-1]

    async def use(enough: asyncio.Event) -> None:
        async with shared_client("account", make):
            await enough.wait()

    never, now = asyncio.Event(), asyncio.Event()
    users = [asyncio.create_task(use(never)), asyncio.create_task(use(now))]
    now.set()
    await users[1]
    assert len(made) == 1
    assert not made[0]._http.is_closed
    users[0].cancel()
    await asyncio.gather(*users, return_exceptions=True)
    assert made[0]._http.is_closed
    async with shared_client("account", make):
        assert len(made) == 2


async def test_the_vendors_clock_is_learnt_from_the_vendor() -> None:
    """The vendor's clock is taken from its own documents, never from a page that a proxy kept."""
    ahead, stale = (
        f"Date: {format_datetime(datetime.now(UTC) + delta, usegmt=True)}"
        for delta in (timedelta(hours=2), timedelta(hours=-30))
    )
    document, page = reply(b"{}", ahead), reply(b"<html>", stale, status="503 Later")
    async with answering(document, page) as url:
        client = ApiClient("Vendor", url)
        await client.send("GET", "/", ANYTHING)
        with pytest.raises(VendorUnavailable):
            await client.send("GET", "/", ANYTHING)
        await client.aclose()
    assert abs(client.theirs(NOW) - NOW - timedelta(hours=2)) < timedelta(minutes=30)


# -- fields


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("https://api.airbyte.com/v1", "https://api.airbyte.com/v1"),
        ("https://api.airbyte.com", "https://api.airbyte.com/v1"),
        ("API.airbyte.com/v1/", "https://api.airbyte.com/v1"),
        ("https://cloud.airbyte.com/workspaces/abc/connections", "https://api.airbyte.com/v1"),
        (" http://localhost:8000 ", "http://localhost:8000"),
        ("localhost:8000", "http://localhost:8000"),
        ("10.0.0.7:8000/", "http://10.0.0.7:8000"),
        ("airbyte.corp.example", "https://airbyte.corp.example"),
        ("http://localhost:8000/workspaces/abc", "http://localhost:8000"),
        ("http://localhost:8000/api", "http://localhost:8000"),
        ("http://localhost:8000/v1/", "http://localhost:8000"),
        ("http://localhost:8000/api/v1", "http://localhost:8000/api/v1"),
        ("http://localhost:8000/api/public", "http://localhost:8000/api/public/v1"),
        ("http://localhost:8000/api/public/v1//", "http://localhost:8000/api/public/v1"),
        ("https://corp.example/tools/airbyte/api/v1?x=1#y", "https://corp.example/tools/airbyte/api/v1"),
        ("http://[::1]:8000/api//public", "http://[::1]:8000/api/public/v1"),
        ("HTTPS://Airbyte.Corp.Example/", "https://airbyte.corp.example"),
    ],
)
def test_base_url_spellings(given: str, expected: str) -> None:
    """Any reasonable spelling of the base URL, or of the web interface's, leads to the server and its API."""
    assert address_of(*split_address(given)) == expected


@pytest.mark.parametrize(
    "given",
    ["", "   ", "ftp://host", "http://", "http://host:eighty", "http://my host/", "file:///etc/passwd"],
)
def test_unusable_base_urls(given: str) -> None:
    """A base URL that can't be one is refused with an example of a right one."""
    with pytest.raises(ValueError, match=r"base URL.*such as https://api\.airbyte\.com/v1"):
        split_address(given)


@pytest.mark.parametrize(
    "build",
    [
        lambda: AirbyteServer(base_url="http://me:hunter2@host"),
        lambda: AirbyteServer(client_secret=SecretStr("hunter2")),
        lambda: AirbyteServer(client_secret="hunter2"),  # type: ignore[arg-type]
        lambda: AirbyteServer(username="me", password="hunter2", token="hunter2"),  # type: ignore[arg-type]
        lambda: AirbyteServer(token="hunter2 \u2026"),  # type: ignore[arg-type]
        lambda: HightouchCredentials(api_key="hunter2\thunter2"),  # type: ignore[arg-type]
        lambda: HightouchCredentials(api_key="k", base_url="http://hunter2@h"),  # type: ignore[arg-type]
    ],
)
def test_refused_fields_are_not_repeated(build: Callable[[], Any]) -> None:
    """A block that is refused does not quote the secret that it was given."""
    with pytest.raises(ValidationError) as caught:
        build()
    assert "hunter2" not in f"{caught.value} {caught.value!r}"


def test_keys_are_trimmed() -> None:
    """A key that was copied with its line end works."""
    assert HightouchCredentials(api_key=SecretStr("key\r\n")).api_key.get_secret_value() == "key"
    server = AirbyteServer(client_id=" id ", client_secret=SecretStr(" secret\n"))
    assert server.client_secret
    assert (server.client_id, server.client_secret.get_secret_value()) == ("id", "secret")


def test_another_secret_is_another_account(airbyte: AirbyteServer) -> None:
    """Two blocks that differ in a secret only do not share a client: one of them may be wrong."""
    other = airbyte.model_copy(update={"client_secret": SecretStr("other")})
    assert other.account != airbyte.account
