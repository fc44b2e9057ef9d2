"""Airbyte: the block with its credentials, and a typed client for its public API (v1).

The API is that of Airbyte Cloud and of self-managed servers with the public API
(https://reference.airbyte.com/reference/getting-started).
"""

from __future__ import annotations

import base64
import binascii
import json
import time
from collections.abc import AsyncIterator, Hashable
from contextlib import AbstractAsyncContextManager, suppress
from datetime import datetime, timedelta
from typing import Any, ClassVar

import httpx
from prefect.blocks.core import Block
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    HttpUrl,
    SecretStr,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)

from blocks.fields import MASKED_GUIDANCE, check_base_url, clean_secret, is_masked
from blocks.http import ApiClient, AuthError, TokenAuth, shared_client

_EXAMPLE = "https://api.airbyte.com/v1 or http://localhost:8000/api/public/v1"
_PAGE = 100  # the API's own limit
_NEWEST_FIRST = "createdAt|DESC"  # must be said: left out, the API answers with the oldest
_TOKEN_LIFETIME = 150.0  # where neither `expires_in` nor the JWT says: Cloud's oldest figure is 180 s


class Stream(BaseModel):
    """One stream of a connection."""

    name: str
    namespace: str | None = None


class Connection(BaseModel):
    """A connection as the API describes it; only what is used here."""

    model_config = ConfigDict(extra="ignore", populate_by_name=True)

    id: str = Field(alias="connectionId")
    name: str
    workspace_id: str = Field(alias="workspaceId")
    status: str = "active"
    status_reason: str | None = Field(default=None, alias="statusReason")
    namespace_definition: str | None = Field(default=None, alias="namespaceDefinition")
    namespace_format: str | None = Field(default=None, alias="namespaceFormat")
    prefix: str | None = None
    streams: list[Stream] = []
    tags: list[str] = []

    @model_validator(mode="before")
    @classmethod
    def _flatten(cls, data: Any) -> Any:
        if isinstance(data, dict) and "streams" not in data:
            configurations = data.get("configurations") or {}
            tags = data.get("tags") or []
            data = {
                **data,
                "streams": configurations.get("streams") or [],
                "tags": [tag["name"] if isinstance(tag, dict) else tag for tag in tags],
            }
        return data

    @property
    def owner(self) -> str | None:
        """The owner that a tag `owner:<name>` names; Airbyte has no field of its own for it."""
        return next((tag.removeprefix("owner:") for tag in self.tags if tag.startswith("owner:")), None)

    @property
    def namespace(self) -> str | None:
        """The schema in the destination, where the connection fixes one."""
        if self.namespace_definition in ("custom_format", "customformat"):
            return self.namespace_format
        return None


class Job(BaseModel):
    """A job as the API describes it."""

    model_config = ConfigDict(extra="ignore", populate_by_name=True)

    id: str = Field(alias="jobId", coerce_numbers_to_str=True)
    status: str
    type: str = Field(default="sync", alias="jobType")
    connection_id: str = Field(alias="connectionId")
    created_at: datetime = Field(alias="startTime")  # the job's *created* time, in spite of its name
    duration: timedelta | None = None  # from creation to the last update, so with the time in the queue
    bytes_synced: int | None = Field(default=None, alias="bytesSynced")
    rows_synced: int | None = Field(default=None, alias="rowsSynced")

    @property
    def ended(self) -> bool:
        """Whether the status is one of the three that do not change any more."""
        return self.status in ("succeeded", "failed", "cancelled")


class _Jobs(BaseModel):
    # Any: one job that is not what the API promises must not hide the other ninety-nine.
    data: list[Any]

    @property
    def readable(self) -> list[Job]:
        found: list[Job] = []
        for item in self.data:
            with suppress(ValidationError):
                found.append(Job.model_validate(item))
        return found


class _Connections(BaseModel):
    data: list[Connection]


_JOB = TypeAdapter(Job)
_JOBS = TypeAdapter(_Jobs)
_CONNECTION = TypeAdapter(Connection)
_CONNECTIONS = TypeAdapter(_Connections)
_ANYTHING: TypeAdapter[Any] = TypeAdapter(Any)


class AirbyteServer(Block):
    """An Airbyte instance, in the Cloud or self-managed, and how to sign in to it.

    Sign in with a client id and secret (an application), a ready-made token, a user name and password (old
    self-managed servers), or nothing at all.

    Example:
        ```python
        AirbyteServer(
            base_url="https://api.airbyte.com/v1", client_id="…", client_secret="…"
        ).save("airbyte")
        ```
    """

    _block_type_name: ClassVar[str] = "Airbyte Server"
    _block_type_slug: ClassVar[str] = "airbyte-server"
    _logo_url: ClassVar[HttpUrl | None] = HttpUrl(
        "https://cdn.sanity.io/images/3ugk85nk/production/7f50097d1915fe75b0ee84c951c742a83d3c53cb-250x250.png"
    )
    _documentation_url: ClassVar[HttpUrl | None] = HttpUrl(
        "https://reference.airbyte.com/reference/getting-started"
    )
    _description: ClassVar[str] = "Signs in to Airbyte Cloud or a self-managed Airbyte and runs its jobs."

    # pydantic's errors quote what they were given, and that may be a secret in the wrong field.
    model_config = ConfigDict(hide_input_in_errors=True)

    base_url: str = Field(
        default="https://api.airbyte.com/v1",
        title="Base URL",
        description="Where the public API is: https://api.airbyte.com/v1 for the Cloud, "
        "http(s)://your-host/api/public/v1 for a self-managed server. "
        "The address of the web interface will do.",
    )
    client_id: str | None = Field(
        default=None, title="Client ID", description="Of an application in Airbyte."
    )
    client_secret: SecretStr | None = Field(
        default=None, title="Client secret", description="Of the same application."
    )
    token: SecretStr | None = Field(
        default=None, title="Token", description="A ready-made bearer token; it is not refreshed."
    )
    username: str | None = Field(
        default=None, title="User name", description="For basic auth on an old self-managed server."
    )
    password: SecretStr | None = Field(default=None, title="Password", description="For basic auth.")
    workspace_ids: list[str] = Field(
        default_factory=list,
        title="Workspaces",
        description="Limits what is listed and watched to these workspaces; empty for all that are visible.",
    )
    requests_per_second: float | None = Field(
        default=None,
        gt=0,
        title="Requests per second",
        description="An upper limit for this account. Airbyte publishes no figure.",
    )

    @field_validator("base_url")
    @classmethod
    def _normalise(cls, value: str) -> str:
        return public_api_url(value)

    @field_validator("client_id")
    @classmethod
    def _strip(cls, value: str | None) -> str | None:
        return (value or "").strip() or None

    @field_validator("client_secret", "token")
    @classmethod
    def _clean(cls, value: SecretStr | None) -> SecretStr | None:
        return clean_secret(value) if value else None  # a form sends an empty field as an empty text

    @model_validator(mode="after")
    def _one_way_in(self) -> AirbyteServer:
        if (self.client_id is None) != (self.client_secret is None):
            raise ValueError("A client id and a client secret go together; give both or neither.")
        if (self.username is None) != (self.password is None):
            raise ValueError("A user name and a password go together; give both or neither.")
        ways = [
            name
            for name, value in (
                ("client id and secret", self.client_id),
                ("token", self.token),
                ("user name and password", self.username),
            )
            if value is not None
        ]
        if len(ways) > 1:
            raise ValueError(f"Give one way to sign in, not {' and '.join(ways)}.")
        return self

    @property
    def account(self) -> Hashable:
        """What makes two blocks the same account: they share a client, a token and a watcher."""
        return (
            "airbyte",
            self.base_url,
            self.client_id,
            self.client_secret,
            self.token,
            self.username,
            self.password,
            tuple(self.workspace_ids),
        )

    @property
    def app_url(self) -> str:
        """Where the web interface is, for links."""
        if self.base_url == "https://api.airbyte.com/v1":
            return "https://cloud.airbyte.com"
        return self.base_url.removesuffix("/api/public/v1")

    def api(self) -> AbstractAsyncContextManager[AirbyteApi]:
        """The client of this account on the running event loop, shared with all its other users."""
        return shared_client(self.account, lambda: AirbyteApi(self))


def public_api_url(value: str) -> str:
    """The public API's address, from any reasonable spelling of it or of the web interface's.

    Raises:
        ValueError: With a sentence that says what is wrong.
    """
    url = check_base_url(value, example=_EXAMPLE)
    scheme, rest = url.split("://", 1)
    host, _, path = rest.partition("/")
    if host in ("api.airbyte.com", "cloud.airbyte.com"):
        return "https://api.airbyte.com/v1"
    segments: list[str] = []
    for segment in path.split("/"):
        if segment in ("api", "v1", "workspaces"):
            break
        if segment:
            segments.append(segment)
    return f"{scheme}://{'/'.join([host, *segments])}/api/public/v1"


class AirbyteApi(ApiClient):
    """The calls of Airbyte's public API that running jobs needs."""

    def __init__(self, server: AirbyteServer) -> None:
        self._workspaces = list(server.workspace_ids)
        self._known: dict[str, Connection] = {}
        given = [secret for secret in (server.client_secret, server.token, server.password) if secret]
        if any(map(is_masked, given)):
            raise AuthError("Airbyte", "the server's secret is masked", guidance=MASKED_GUIDANCE, sent=False)
        super().__init__(
            "Airbyte",
            server.base_url,
            auth=_auth(server),
            rate=(max(1.0, server.requests_per_second), max(1.0, 1 / server.requests_per_second))
            if server.requests_per_second
            else None,
            secrets=[secret.get_secret_value() for secret in given],
        )

    async def connections(self) -> list[Connection]:
        """Every connection that is visible, a hundred per request."""
        found: list[Connection] = []
        while True:
            params: dict[str, Any] = {"limit": _PAGE, "offset": len(found)}
            if self._workspaces:
                params["workspaceIds"] = ",".join(self._workspaces)
            # `next` is never followed: it drops filters and names the server's configured host.
            page = (await self.get("/connections", _CONNECTIONS, params)).data
            found += page
            if len(page) < _PAGE:
                break
        self._known.update((connection.id, connection) for connection in found)
        return found

    async def connection(self, connection_id: str) -> Connection:
        """One connection, from memory when it was seen on this client already.

        Raises:
            NotFoundError: There is none with this id.
        """
        if connection_id not in self._known:
            self._known[connection_id] = await self.get(f"/connections/{connection_id}", _CONNECTION)
        return self._known[connection_id]

    def forget(self, connection_id: str) -> None:
        """Read the connection anew when it is asked for next: what was known of it has proved wrong."""
        self._known.pop(connection_id, None)

    async def create_job(self, connection_id: str, job_type: str) -> Job:
        """Start a job: `sync`, `reset` or `clear`. Not repeated: the API has no idempotency key.

        Raises:
            ConflictError: A job is running, or the connection's state forbids it.
            VendorError: Anything else; `sent` says whether a job may have been started.
        """
        return await self.send(
            "POST", "/jobs", _JOB, body={"connectionId": connection_id, "jobType": job_type}
        )

    async def job(self, job_id: str, *, retry: bool = True) -> Job:
        """One job."""
        return await self.get(f"/jobs/{job_id}", _JOB, retry=retry)

    async def newest_jobs(self, connection_id: str, *, retry: bool = True) -> list[Job]:
        """The newest jobs of a connection, newest first."""
        params = {"connectionId": connection_id, "limit": 20, "orderBy": _NEWEST_FIRST}
        return (await self.get("/jobs", _JOBS, params, retry=retry)).readable

    async def jobs_since(self, created: datetime, *, pages: int) -> AsyncIterator[list[Job]]:
        """Pages of all jobs that were created since a time, newest first, at most so many pages."""
        params: dict[str, Any] = {
            "limit": _PAGE,
            "orderBy": _NEWEST_FIRST,
            "createdAtStart": created.strftime("%Y-%m-%dT%H:%M:%SZ"),
        }
        if self._workspaces:
            params["workspaceIds"] = ",".join(self._workspaces)
        for page in range(pages):
            reply = await self.get("/jobs", _JOBS, {**params, "offset": page * _PAGE}, retry=False)
            yield reply.readable
            if len(reply.data) < _PAGE:
                return

    async def cancel_job(self, job_id: str) -> None:
        """Cancel what the connection of this job is running *now*: read the job first."""
        await self.send("DELETE", f"/jobs/{job_id}", _ANYTHING)


def _auth(server: AirbyteServer) -> httpx.Auth | None:
    if server.client_id and (secret := server.client_secret):
        return TokenAuth("Airbyte", lambda: _token_request(server, secret), _read_token)
    if server.token:
        return _Bearer(server.token.get_secret_value())
    if server.username and server.password:
        return httpx.BasicAuth(server.username, server.password.get_secret_value())
    return None


class _Bearer(httpx.Auth):
    def __init__(self, token: str) -> None:
        self._token = token

    def auth_flow(self, request: httpx.Request) -> Any:
        request.headers["Authorization"] = f"Bearer {self._token}"
        yield request


def _token_request(server: AirbyteServer, secret: SecretStr) -> httpx.Request:
    return httpx.Request(
        "POST",
        f"{server.base_url}/applications/token",
        # The API's own file names the property both ways; servers differ in which one they read.
        json={
            "client_id": server.client_id,
            "client_secret": secret.get_secret_value(),
            "grant_type": "client_credentials",
            "grant-type": "client_credentials",
        },
        headers={"Accept": "application/json"},
    )


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
