"""An Airbyte account's client: signs in, finds out which API the server has, and keeps it open."""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import logging
import math
import time
from collections.abc import Collection
from datetime import datetime
from typing import TYPE_CHECKING, Any, TypeVar

import httpx
import stamina
from pydantic import SecretStr, TypeAdapter

from blocks.airbyte_config import ConfigApi
from blocks.airbyte_model import AirbyteApi, ApiKind, Job
from blocks.airbyte_public import PublicApi
from blocks.fields import MASKED_GUIDANCE, is_masked
from blocks.http import (
    ApiClient,
    AuthError,
    BadReply,
    NotFoundError,
    RateLimited,
    TokenAuth,
    VendorError,
    VendorUnavailable,
)

if TYPE_CHECKING:
    from blocks.airbyte import AirbyteServer

_TOKEN_LIFETIME = 150.0  # where neither `expires_in` nor the JWT says: Cloud's oldest figure is 180 s
_EXPLAIN_WITHIN = 5.0  # seconds; details that are long in coming must not hold up the watching of others
_EXPLAIN_AGAIN = 60.0  # seconds without asking after some that did not come
_AT_ONCE = 10
_ANYTHING: TypeAdapter[Any] = TypeAdapter(Any)
_log = logging.getLogger("elt.airbyte")
_KINDS: tuple[ApiKind, ...] = ("public", "config")
_Api = TypeVar("_Api", bound=AirbyteApi)


class AirbyteClient:
    """What is kept of an account while it is used: its APIs, and one token for both.

    Args:
        server: The block.
    """

    def __init__(self, server: AirbyteServer) -> None:
        self._server = server
        self._secrets = [secret for secret in (server.client_secret, server.token, server.password) if secret]
        if any(map(is_masked, self._secrets)):
            raise AuthError("Airbyte", "the server's secret is masked", guidance=MASKED_GUIDANCE, sent=False)
        self._kind: ApiKind | None = server.kind
        self._auth = self._make_auth()
        self._finding = asyncio.Lock()
        self._open: dict[ApiKind, AirbyteApi] = {}
        self._explains_from = math.inf if server.in_cloud else 0.0  # monotonic seconds
        # With a limit they would wait for their turns, and that wait is not the server's.
        self._explaining = asyncio.Semaphore(1 if server.requests_per_second else _AT_ONCE)

    async def aclose(self) -> None:
        """Close the connections."""
        for api in self._open.values():
            await api.aclose()

    def theirs(self, moment: datetime) -> datetime:
        """A moment of our clock on Airbyte's, by the `Date` header of its last reply (to a second)."""
        api = self._open.get(self._kind) if self._kind else None
        return api.theirs(moment) if api else moment

    async def api(self) -> PublicApi | ConfigApi:
        """The API that the block names, or else the one that the server turns out to have.

        Raises:
            VendorError: The server can't be reached, or what answers there is no Airbyte.
        """
        async with self._finding:
            if self._kind is None:
                self._kind = await self._find_out()
        return self._of(PublicApi) if self._kind == "public" else self._of(ConfigApi)

    @property
    def config(self) -> ConfigApi | None:
        """The Config API of the same server; None in the Cloud, which has none for its users."""
        return None if self._server.in_cloud else self._of(ConfigApi)

    @property
    def may_explain(self) -> bool:
        """Whether details that did not come may come another time."""
        return math.isfinite(self._explains_from)

    async def explain(self, job: Job) -> Job:
        """The job with its attempts and their failures, its streams and rejected rows, where they can be had.

        The public API does not tell them, but a self-managed server's Config API may, to the same
        credentials. What has ended is asked for again while there is time: what is not told then never is.
        Never raises a `VendorError`: a job's end is told with or without its details.
        """
        async with self._explaining:
            if time.monotonic() < self._explains_from or (config := self.config) is None:
                return job
            try:
                async with asyncio.timeout(_EXPLAIN_WITHIN):
                    told = await config.job(job.id, retry=job.ended)
            except (VendorError, TimeoutError) as error:
                # A server that is busy may tell later; one without such an API, or that refuses, will not.
                if isinstance(error, AuthError | NotFoundError) or getattr(error, "wrong_address", False):
                    self._explains_from = math.inf
                elif isinstance(error, TimeoutError):
                    self._explains_from = time.monotonic() + _EXPLAIN_AGAIN
                _log.debug("no details to be had of Airbyte job %s: %s", job.id, error)
                return job
        return job.with_details(told)

    async def explain_many(self, jobs: Collection[Job]) -> dict[str, Job]:
        """Those of the public API's jobs, with their details, that the Config API's lists tell whole.

        A hundred cost a request. What is not among them has to be asked for one by one.
        """
        found: dict[str, Job] = {}
        async with self._explaining:
            if time.monotonic() < self._explains_from or (config := self.config) is None:
                return found
            wanted = {job.id: job for job in jobs}
            workspaces = self._of(PublicApi).workspaces_of({job.connection_id for job in jobs})
            since = min(job.created_at for job in jobs)
            try:
                async with asyncio.timeout(_EXPLAIN_WITHIN):
                    async for page in config.jobs_of(workspaces, since, pages=len(wanted) // 10 + 2):
                        for told in page:
                            job = wanted.pop(told.id, None)
                            if job is not None and told.status == job.status and told.told:
                                found[job.id] = job.with_details(told)
                        if not wanted:
                            break
            except (VendorError, TimeoutError) as error:
                # Of the others each is asked for alone, and shows whether there is any use in that.
                _log.debug("no details to be had of %d Airbyte jobs together: %s", len(wanted), error)
        return found

    def _of(self, api: type[_Api]) -> _Api:
        if api.kind not in self._open:
            rate = self._server.requests_per_second
            made = api(
                "Airbyte",
                self._server.url_of(api.kind),
                auth=self._auth,
                rate=(max(1.0, rate), max(1.0, 1 / rate)) if rate else None,
                secrets=[secret.get_secret_value() for secret in self._secrets],
            )
            made.begin(self._server.workspace_ids)
            self._open[api.kind] = made
        return self._open[api.kind]  # type: ignore[return-value]  # its kind is its key

    # -- finding out ----------------------------------------------------------------------------------------

    async def _find_out(self) -> ApiKind:
        """Ask both APIs for their health, which takes no token; the public one is preferred."""
        # A token can't be had before it is known where; what is sent with every request may be needed.
        auth = None if isinstance(self._auth, TokenAuth) else self._auth
        async for attempt in stamina.retry_context(
            on=(VendorUnavailable, RateLimited), attempts=6, timeout=60.0, wait_initial=0.2, wait_max=10.0
        ):
            with attempt:
                trouble: VendorError | None = None
                for kind in _KINDS:
                    probe = ApiClient("Airbyte", self._server.url_of(kind), auth=auth)
                    try:
                        if await _is_there(probe):
                            _log.info("Airbyte at %s: its %s API is used", self._server.base_url, kind)
                            return kind
                    except VendorError as error:
                        trouble = trouble or error
                    finally:
                        await probe.aclose()
                if trouble is not None:
                    raise trouble
        raise BadReply(
            "Airbyte",
            "neither its public API (/api/public/v1) nor its Config API (/api/v1) answers at the base URL",
            guidance="Check the base URL; if the server is right, say in the block which API it has.",
            sent=False,
        )

    # -- signing in -----------------------------------------------------------------------------------------

    def _make_auth(self) -> httpx.Auth | None:
        server = self._server
        if server.client_id and (secret := server.client_secret):
            return TokenAuth("Airbyte", lambda: self._token_request(secret), _read_token)
        if server.token:
            return _Bearer(server.token.get_secret_value())
        if server.username and server.password:
            return httpx.BasicAuth(server.username, server.password.get_secret_value())
        return None

    def _token_request(self, secret: SecretStr) -> httpx.Request:
        body = {"client_id": self._server.client_id, "client_secret": secret.get_secret_value()}
        kind = self._kind or "public"
        if kind == "public":
            # The API's own file names the property both ways; servers differ in which one they read.
            body |= {"grant_type": "client_credentials", "grant-type": "client_credentials"}
        return httpx.Request(
            "POST",
            f"{self._server.url_of(kind)}/applications/token",
            json=body,
            headers={"Accept": "application/json"},
        )


async def _is_there(probe: ApiClient) -> bool:
    try:
        await probe.get("/health", _ANYTHING, retry=False)
    except BadReply as error:
        return (
            error.status == httpx.codes.OK and not error.wrong_address
        )  # the public API answers in plain text
    except NotFoundError:
        return False
    return True


class _Bearer(httpx.Auth):
    def __init__(self, token: str) -> None:
        self._token = token

    def auth_flow(self, request: httpx.Request) -> Any:
        request.headers["Authorization"] = f"Bearer {self._token}"
        yield request


def _read_token(body: Any) -> tuple[str, float]:
    token = body["access_token"]
    if not isinstance(token, str):
        raise TypeError
    expires_in = body.get("expires_in")
    if isinstance(expires_in, int | float) and expires_in > 0:
        return token, float(expires_in)
    return token, _jwt_lifetime(token) or _TOKEN_LIFETIME


def _jwt_lifetime(token: str) -> float | None:
    """Seconds until the `exp` of a JWT; None where the token is no JWT or says nothing useful."""
    try:
        payload = token.split(".")[1]
        claims = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
        left = float(claims["exp"]) - time.time()
    except (IndexError, KeyError, ValueError, TypeError, binascii.Error):
        return None
    return left if left > 0 else None
