"""Census (Fivetran Activations): the block with its API key, and a typed client for its API (v1).

Vendor documentation: https://developers.getcensus.com/api-reference
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from contextlib import AbstractAsyncContextManager
from datetime import datetime
from typing import Any, ClassVar, Generic, TypeVar

from prefect.blocks.core import Block
from pydantic import BaseModel, ConfigDict, Field, HttpUrl, SecretStr, TypeAdapter, field_validator

from blocks.fields import MASKED_GUIDANCE, check_base_url, clean_secret, is_masked
from blocks.http import ApiClient, AuthError, BadReply, VendorError, shared_client
from blocks.replies import readable

_EXAMPLE = "https://app.getcensus.com/api/v1"
_PAGE = 100  # asked for more, Census gives a hundred and does not say so
_FEW = 3  # up to so many syncs are read one by one: a page of them would cost as much

T = TypeVar("T")


class SyncRun(BaseModel):
    """A run of a sync."""

    model_config = ConfigDict(extra="ignore")

    id: str = Field(coerce_numbers_to_str=True)
    sync_id: str = Field(coerce_numbers_to_str=True)
    status: str
    canceled: bool | None = None
    full_sync: bool | None = None
    source_record_count: int | None = None
    records_processed: int | None = None
    records_updated: int | None = None
    records_failed: int | None = None
    records_invalid: int | None = None
    created_at: datetime
    updated_at: datetime | None = None
    # Null on a run that failed: it says when a run completed, not whether it has ended.
    completed_at: datetime | None = None
    scheduled_execution_time: datetime | None = None
    error_code: str | None = None
    error_message: str | None = None
    error_detail: str | None = None
    current_step: str | None = None

    @property
    def rejected(self) -> int | None:
        """Records that the destination failed and that Census found invalid; None where it counts neither."""
        counts = [count for count in (self.records_failed, self.records_invalid) if count is not None]
        return sum(counts) if counts else None


class Sync(BaseModel):
    """A sync; only what is used here."""

    model_config = ConfigDict(extra="ignore")

    id: str = Field(coerce_numbers_to_str=True)
    label: str | None = None
    operation: str | None = None
    paused: bool | None = None


class _Reply(BaseModel, Generic[T]):
    # This status is about the request; that of the run is in `data`. On a cancel it is `cancelled`.
    status: str | int | None = None
    data: T


class _Pagination(BaseModel):
    next_page: int | None = None


class _Page(BaseModel):
    data: list[Any]
    pagination: _Pagination


class _Triggered(BaseModel):
    sync_run_id: str = Field(coerce_numbers_to_str=True)


_TRIGGERED = TypeAdapter(_Reply[_Triggered])
_RUN = TypeAdapter(_Reply[SyncRun])
_RUNS = TypeAdapter(_Reply[list[SyncRun]])
_SYNC = TypeAdapter(_Reply[Sync])
_ITEM = TypeAdapter(Sync)
_SYNCS = TypeAdapter(_Page)
_CANCELLED = TypeAdapter(_Reply[Any])


class CensusCredentials(Block):
    """A Census workspace's API key.

    Example:
        ```python
        CensusCredentials(api_key="…").save("census")
        ```
    """

    _block_type_name: ClassVar[str] = "Census Credentials"
    _block_type_slug: ClassVar[str] = "census-credentials"
    _logo_url: ClassVar[HttpUrl | None] = HttpUrl("https://app.getcensus.com/favicon.ico")
    _documentation_url: ClassVar[HttpUrl | None] = HttpUrl("https://developers.getcensus.com/api-reference")
    _description: ClassVar[str] = "Signs in to a Census workspace and runs its syncs."

    # pydantic's errors quote what they were given, and that may be the key in the wrong field.
    model_config = ConfigDict(hide_input_in_errors=True)

    api_key: SecretStr = Field(
        title="API key", description="Of one workspace, from its settings, API access."
    )
    base_url: str = Field(
        default=_EXAMPLE,
        title="Base URL",
        description="Where the API is. In Europe https://app-eu.getcensus.com/api/v1.",
    )
    app_url: str = Field(
        default="",
        title="App URL",
        description="Where the web interface is, for links; by default the host of the base URL.",
    )
    workspace_id: str | None = Field(
        default=None,
        title="Workspace ID",
        pattern=r"^\d+$",
        description="For links: the number after /workspaces/ in Census's addresses.",
    )
    requests_per_10_seconds: int = Field(
        default=100,
        gt=0,
        title="Requests per 10 seconds",
        description="An upper limit for this workspace. Census has no list of all runs, so watching takes a "
        "request per run: with many at a time, this is how often each is looked at. Census names no limit.",
    )

    @field_validator("base_url")
    @classmethod
    def _normalise(cls, value: str) -> str:
        return check_base_url(value, example=_EXAMPLE)

    @field_validator("app_url")
    @classmethod
    def _normalise_app(cls, value: str) -> str:
        return check_base_url(value, example="https://app.getcensus.com") if value.strip() else ""

    @field_validator("api_key")
    @classmethod
    def _clean(cls, value: SecretStr) -> SecretStr:
        return clean_secret(value)

    @property
    def account(self) -> Hashable:
        """What makes two blocks the same account: they share a client and a watcher."""
        return ("census", self.base_url, self.api_key)

    def history_url(self, sync_id: str) -> str:
        """A sync's page in the web interface that lists its runs; a run has none of its own."""
        app = self.app_url or self.base_url.removesuffix("/api/v1")
        workspace = f"/workspaces/{self.workspace_id}" if self.workspace_id else ""
        return f"{app}{workspace}/syncs/{sync_id}/sync-history"

    def api(self) -> AbstractAsyncContextManager[CensusApi]:
        """The client of this workspace on the running event loop, shared with all its other users."""
        return shared_client(self.account, lambda: CensusApi(self))


class CensusApi(ApiClient):
    """The calls of Census's API that running syncs needs."""

    def __init__(self, credentials: CensusCredentials) -> None:
        if is_masked(credentials.api_key):
            raise AuthError("Census", "the API key is masked", guidance=MASKED_GUIDANCE, sent=False)
        key = credentials.api_key.get_secret_value()
        self._known: dict[str, Sync] = {}
        super().__init__(
            "Census",
            credentials.base_url,
            headers={"Authorization": f"Bearer {key}", "Accept": "*/*"},  # as its documentation asks
            rate=(credentials.requests_per_10_seconds, 10.0),
            secrets=[key],
        )

    async def sync(self, sync_id: str, *, fresh: bool = False) -> Sync:
        """One sync, from memory when it was seen on this client already and `fresh` is off.

        Raises:
            NotFoundError: There is none with this id.
        """
        if fresh or sync_id not in self._known:
            reply = await self._asked(f"/syncs/{sync_id}", _SYNC)
            self._known[sync_id] = reply.data
        return self._known[sync_id]

    async def learn(self, sync_ids: set[str]) -> None:
        """Read many syncs ahead, a hundred per request; `sync` then has them in memory."""
        if len(sync_ids) > _FEW:
            page: int | None = 1
            while page is not None and not sync_ids <= self._known.keys():
                reply = await self._asked("/syncs", _SYNCS, {"page": page, "per_page": _PAGE})
                self._known.update({sync.id: sync for sync in readable(reply.data, _ITEM)})
                page = reply.pagination.next_page if reply.data else None

    async def trigger(self, sync_id: str, *, full_sync: bool = False) -> str:
        """Start a run and return its id. Not repeated: a second request may start a second run.

        Raises:
            VendorError: `sent` says whether a run may have been started.
        """
        # In the query: a flag in the body is not read.
        params = {"force_full_sync": "true"} if full_sync else None
        try:
            reply = await self.send("POST", f"/syncs/{sync_id}/trigger", _TRIGGERED, params=params)
        except BadReply as error:
            raise _refusal(error) from None
        return reply.data.sync_run_id

    async def run(self, run_id: str, *, retry: bool = False) -> SyncRun:
        """One run.

        Raises:
            NotFoundError: There is none with this id, or it is not shown yet.
        """
        return (await self._asked(f"/sync_runs/{run_id}", _RUN, retry=retry)).data

    async def runs(self, sync_id: str) -> list[SyncRun]:
        """The newest hundred runs of a sync, newest first."""
        params = {"page": 1, "per_page": _PAGE, "order": "desc"}
        reply = await self._asked(f"/syncs/{sync_id}/sync_runs", _RUNS, params, retry=False)
        return sorted(reply.data, key=lambda run: (run.created_at, int(run.id)), reverse=True)

    async def cancel(self, run_id: str) -> None:
        """Cancel a run that is going on.

        Raises:
            VendorError: Census refuses, for example because the run has ended.
        """
        try:
            await self.send("POST", f"/sync_runs/{run_id}/cancel", _CANCELLED)
        except BadReply as error:
            raise _refusal(error) from None

    async def _asked(
        self,
        path: str,
        reply: TypeAdapter[T],
        params: Mapping[str, Any] | None = None,
        *,
        retry: bool = True,
    ) -> T:
        try:
            return await self.get(path, reply, params, retry=retry)
        except BadReply as error:
            raise _refusal(error) from None


def _refusal(error: BadReply) -> VendorError:
    """What a refusal under a successful HTTP status is; any other bad reply stays what it is."""
    body = error.body
    if not (isinstance(body, dict) and body.get("status") == "error"):
        return error
    return VendorError(
        error.vendor,
        str(body.get("message") or "it refuses and gives no reason"),
        method=error.method,
        path=error.path,
        status=error.status,
        sent=False,
    )
