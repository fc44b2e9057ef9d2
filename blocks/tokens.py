"""Sign-in by tokens that run out: one token per account, however many requests wait for it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from copy import copy
from typing import Any

import httpx

from blocks.errors import AuthError, NotFoundError, VendorError, VendorUnavailable
from blocks.replies import bad_reply, is_html, may_pass, rate_limited


class TokenAuth(httpx.Auth):
    """Bearer tokens from a token endpoint: one token per account, fetched ahead of its expiry.

    On a 401 the token is dropped, fetched once and the request sent once more. A lock keeps a fan-out from
    fetching a token per job.

    Args:
        vendor: For error messages.
        request_token: Builds the request to the token endpoint.
        read_token: Takes the endpoint's JSON and returns the token and its lifetime in seconds.
        header: The header that carries the token.
        prefix: What stands before the token in it.
        what: What a refusal was about, for error messages.
    """

    def __init__(
        self,
        vendor: str,
        request_token: Callable[[], httpx.Request],
        read_token: Callable[[Any], tuple[str, float]],
        *,
        header: str = "Authorization",
        prefix: str = "Bearer ",
        what: str = "the client id or the client secret",
    ) -> None:
        self._vendor = vendor
        self._request_token = request_token
        self._read_token = read_token
        self._header = header
        self._prefix = prefix
        self._what = what
        self._lock = asyncio.Lock()
        self._token: str | None = None
        self._expires = 0.0
        self._refusals = 0
        self._refusal: VendorError | None = None

    async def async_auth_flow(self, request: httpx.Request) -> AsyncGenerator[httpx.Request, httpx.Response]:
        """Send, refresh once on 401, send again."""
        for _ in range(2):
            refusals = self._refusals
            async with self._lock:
                if self._refusal is not None and self._refusals != refusals:
                    # Whoever had the lock before us was refused, and a hundred more would be too.
                    raise copy(self._refusal)
                if self._token is None or time.monotonic() >= self._expires:
                    await self._accept((yield self._token_request()))
                token = self._token
            request.headers[self._header] = f"{self._prefix}{token}"
            response = yield request
            if response.status_code != httpx.codes.UNAUTHORIZED:
                return
            if self._token == token:  # else another request has refreshed it meanwhile
                self._token = None

    async def sign_in(self, client: httpx.AsyncClient) -> None:
        """Have a token, before the first request needs one.

        Raises:
            VendorError, httpx.TransportError: There is none to be had.
        """
        async with self._lock:
            if self._token is None or time.monotonic() >= self._expires:
                await self._accept(await client.send(self._token_request(), auth=None))

    def _token_request(self) -> httpx.Request:
        request = self._request_token()
        request.extensions["token_request"] = True
        return request

    async def _accept(self, response: httpx.Response) -> None:
        await response.aread()
        try:
            self._token, lifetime = self._read(response)
        except VendorError as error:
            self._refusal = error
            self._refusals += 1
            raise
        # A token is fetched anew a little ahead of its end: a request takes time to arrive.
        self._expires = time.monotonic() + lifetime - min(60.0, lifetime * 0.05)

    def _read(self, response: httpx.Response) -> tuple[str, float]:
        request, status = response.request, response.status_code
        # The token request itself has no effect, and the request that it was for was not sent.
        where: dict[str, Any] = {"method": request.method, "path": request.url.path, "sent": False}
        if status == httpx.codes.OK:
            try:
                return self._read_token(response.json())
            except (ValueError, KeyError, TypeError):
                raise bad_reply(self._vendor, response, where) from None
        if status == httpx.codes.TOO_MANY_REQUESTS:
            where["status"] = status
            raise rate_limited(self._vendor, "too many token requests", response, where)
        if may_pass(status):
            raise VendorUnavailable(self._vendor, "no token to be had", status=status, **where)
        if response.is_redirect or is_html(response):
            raise bad_reply(self._vendor, response, where)
        if status == httpx.codes.NOT_FOUND:
            raise NotFoundError(
                self._vendor,
                "there is no token endpoint here",
                status=status,
                guidance="Check the base URL, or use basic auth for an old self-managed server.",
                **where,
            )
        if status in (400, 401, 403, 422):
            raise AuthError(
                self._vendor,
                f"{self._what} was refused",
                status=status,
                guidance="Check them in the block; nothing was started.",
                **where,
            )
        raise VendorError(self._vendor, "no token to be had", status=status, **where)
