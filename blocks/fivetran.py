"""Fivetran: the block with its API key, and a typed client for its REST API (v1).

Vendor documentation: https://fivetran.com/docs/rest-api
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from datetime import UTC, datetime
from typing import Annotated, Any, ClassVar, Generic, TypeVar

import httpx
from prefect.blocks.core import Block
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    HttpUrl,
    SecretStr,
    TypeAdapter,
    field_validator,
)

from blocks.fields import MASKED_GUIDANCE, check_base_url, clean_secret, is_masked
from blocks.http import ApiClient, AuthError, BadReply, VendorError, shared_client
from blocks.replies import readable

_EXAMPLE = "https://api.fivetran.com"
_PAGE = 1000
_SUCCESS = "Success"

T = TypeVar("T")


def _in_utc(moment: datetime) -> datetime:
    # Moments are compared as such and never as text: the digits of their fractions vary.
    return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)


Moment = Annotated[datetime, AfterValidator(_in_utc)]


class Notice(BaseModel):
    """A task (something that a person has to do) or a warning of a connection."""

    code: str | None = None
    message: str | None = None
    details: str | None = None

    def __str__(self) -> str:
        return ": ".join(part for part in (self.message or self.code, self.details) if part)


Notices = Annotated[list[Notice], BeforeValidator(lambda value: value or [])]


class Status(BaseModel):
    """What a connection is doing."""

    model_config = ConfigDict(extra="ignore")

    setup_state: str
    sync_state: str
    is_historical_sync: bool | None = None
    rescheduled_for: Moment | None = None
    tasks: Notices = []
    warnings: Notices = []


class Connection(BaseModel):
    """A connection; only what is used here."""

    model_config = ConfigDict(extra="ignore", populate_by_name=True)

    id: str
    service: str = ""
    schema_name: str = Field(alias="schema")
    group_id: str = ""
    paused: bool
    schedule_type: str = "auto"
    succeeded_at: Moment | None = None
    failed_at: Moment | None = None
    status: Status

    @property
    def ended_at(self) -> datetime | None:
        """When its last sync ended, well or not; None when none ever has."""
        ends = [moment for moment in (self.succeeded_at, self.failed_at) if moment]
        return max(ends, default=None)

    @property
    def succeeded(self) -> bool:
        """Whether its last sync ended well."""
        return self.succeeded_at is not None and (
            self.failed_at is None or self.succeeded_at > self.failed_at
        )

    @property
    def syncing(self) -> bool:
        """Whether a sync is running now."""
        return self.status.sync_state == "syncing"

    @property
    def namespace(self) -> str:
        """The schema that it writes to. Some connectors fill one table: they are called `schema.table`."""
        return self.schema_name.partition(".")[0]

    @property
    def tables(self) -> list[str]:
        """The table that it fills, where its name says so; empty when it fills whatever its source has."""
        table = self.schema_name.partition(".")[2]
        return [table] if table else []

    @property
    def problem(self) -> str | None:
        """Why no sync of it can be expected to run, with what Fivetran says about it; None if one can."""
        asked = "; ".join(str(task) for task in self.status.tasks)
        because = f" ({asked})" if asked else ""
        match self.status.setup_state:
            case "incomplete":
                return f"its setup is incomplete{because}"
            case "broken":
                return f"its setup is broken{because}"
        return "it is paused" if self.paused else None


class _Reply(BaseModel, Generic[T]):
    """The envelope that is around everything."""

    code: str
    message: str | None = None
    data: T | None = None


class _Page(BaseModel):
    items: list[Any]
    next_cursor: str | None = None


_ITEM = TypeAdapter(Connection)
_CONNECTION = TypeAdapter(_Reply[Connection])
_CONNECTIONS = TypeAdapter(_Reply[_Page])
_DONE = TypeAdapter(_Reply[Any])


class FivetranCredentials(Block):
    """A Fivetran account's API key and secret.

    Example:
        ```python
        FivetranCredentials(api_key="…", api_secret="…").save("fivetran")
        ```
    """

    _block_type_name: ClassVar[str] = "Fivetran Credentials"
    _block_type_slug: ClassVar[str] = "fivetran-credentials"
    _logo_url: ClassVar[HttpUrl | None] = HttpUrl("https://fivetran.com/favicon.ico")
    _documentation_url: ClassVar[HttpUrl | None] = HttpUrl(
        "https://fivetran.com/docs/rest-api/getting-started"
    )
    _description: ClassVar[str] = "Signs in to a Fivetran account and runs its connections."

    # pydantic's errors quote what they were given, and that may be the secret in the wrong field.
    model_config = ConfigDict(hide_input_in_errors=True)

    api_key: str = Field(title="API key", description="From your user's settings, API key, or a system key.")
    api_secret: SecretStr = Field(title="API secret", description="Shown once, beside the key.")
    base_url: str = Field(
        default=_EXAMPLE, title="Base URL", description="Where the API is; rarely anything but the default."
    )
    app_url: str = Field(
        default="https://fivetran.com", title="App URL", description="Where the dashboard is, for links."
    )
    requests_per_hour: int = Field(
        default=18_000,
        gt=0,
        title="Requests per hour",
        description="An upper limit for this account. Fivetran allows 20,000, and 500 during a trial.",
    )

    @field_validator("base_url", "app_url")
    @classmethod
    def _normalise(cls, value: str) -> str:
        # The version belongs to the paths; people paste addresses with it.
        return check_base_url(value, example=_EXAMPLE).removesuffix("/v1")

    @field_validator("api_key")
    @classmethod
    def _clean_key(cls, value: str) -> str:
        return clean_secret(SecretStr(value)).get_secret_value()

    @field_validator("api_secret")
    @classmethod
    def _clean_secret(cls, value: SecretStr) -> SecretStr:
        return clean_secret(value)

    @property
    def account(self) -> Hashable:
        """What makes two blocks the same account: they share a client and a watcher."""
        return ("fivetran", self.base_url, self.api_key, self.api_secret)

    def api(self) -> AbstractAsyncContextManager[FivetranApi]:
        """The client of this account on the running event loop, shared with all its other users."""
        return shared_client(self.account, lambda: FivetranApi(self))

    def link(self, connection_id: str) -> str:
        """A connection's page in the dashboard."""
        return f"{self.app_url}/dashboard/connectors/{connection_id}/status"


class FivetranApi(ApiClient):
    """The calls of Fivetran's API that running syncs needs. It changes nothing about a connection."""

    def __init__(self, credentials: FivetranCredentials) -> None:
        if is_masked(credentials.api_secret):
            raise AuthError("Fivetran", "the API secret is masked", guidance=MASKED_GUIDANCE, sent=False)
        secret = credentials.api_secret.get_secret_value()
        self._known: dict[str, Connection] = {}
        self.pages = 1
        """How many requests the last list of all connections took."""
        super().__init__(
            "Fivetran",
            credentials.base_url,
            auth=httpx.BasicAuth(credentials.api_key, secret),
            headers={"Accept": "application/json;version=2"},
            rate=(credentials.requests_per_hour, 3600.0),
            secrets=[secret],
        )

    async def connection(self, connection_id: str, *, fresh: bool = False, retry: bool = True) -> Connection:
        """One connection, from memory when it was seen on this client already and `fresh` is off.

        Raises:
            NotFoundError: There is none with this id, or the key may not see it.
        """
        if fresh or connection_id not in self._known:
            path = f"/v1/connections/{connection_id}"
            self._known[connection_id] = self._data(path, await self.get(path, _CONNECTION, retry=retry))
        return self._known[connection_id]

    async def connections(self, wanted: Collection[str], *, retry: bool = True) -> dict[str, Connection]:
        """Those of these connections that the account has, by id; a thousand per request."""
        path, missing = "/v1/connections", set(wanted)
        found: dict[str, Connection] = {}
        cursor: str | None = None
        pages = 0
        while missing:
            params = {"limit": _PAGE} | ({"cursor": cursor} if cursor else {})
            page = self._data(path, await self.get(path, _CONNECTIONS, params, retry=retry))
            pages += 1
            found.update((item.id, item) for item in readable(page.items, _ITEM) if item.id in missing)
            missing.difference_update(found)
            if not page.next_cursor or page.next_cursor == cursor:
                break
            cursor = page.next_cursor
        self.pages = max(1, pages)
        self._known.update(found)
        return found

    async def sync(self, connection_id: str, *, force: bool = False) -> None:
        """`POST /v1/connections/{id}/sync`. No id comes back. Sent once.

        Without `force` it may be sent again, for it does nothing while a sync is running. With it, it stops
        the sync that is running.

        Raises:
            VendorError: `sent` says whether it may have had an effect.
        """
        await self._post(f"/v1/connections/{connection_id}/sync", {"force": force})

    async def resync(self, connection_id: str, scope: Mapping[str, Sequence[str]] | None = None) -> None:
        """`POST /v1/connections/{id}/resync`: load all history anew, or that of some tables. Sent once.

        Args:
            connection_id: The connection.
            scope: Tables by their schema in the source; None for everything.

        Raises:
            ConflictError: A sync is running and Fivetran could not finish it first.
            VendorError: `sent` says whether it may have had an effect.
        """
        body = {"scope": {schema: list(tables) for schema, tables in scope.items()}} if scope else {}
        await self._post(f"/v1/connections/{connection_id}/resync", body)

    async def _post(self, path: str, body: dict[str, Any]) -> None:
        self._check(path, await self.send("POST", path, _DONE, body=body), method="POST")

    def _data(self, path: str, reply: _Reply[T]) -> T:
        self._check(path, reply)
        if reply.data is None:
            raise BadReply(self.vendor, "its reply holds no data", method="GET", path=path, sent=False)
        return reply.data

    def _check(self, path: str, reply: _Reply[Any], *, method: str = "GET") -> None:
        """The status says first whether a request went well; the code in the envelope has the last word."""
        if reply.code != _SUCCESS:
            raise VendorError(
                self.vendor,
                f"{reply.code}: {reply.message or 'no reason given'}",
                method=method,
                path=path,
                sent=False,
            )
