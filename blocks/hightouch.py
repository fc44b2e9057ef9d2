"""Hightouch: the block with its API key, and a typed client for its API (v1).

Vendor documentation: https://hightouch.com/docs/developer-tools/api-guide
"""

from __future__ import annotations

from collections.abc import Collection, Hashable
from contextlib import AbstractAsyncContextManager
from datetime import UTC, datetime
from typing import Any, ClassVar

from prefect.blocks.core import Block
from pydantic import BaseModel, ConfigDict, Field, HttpUrl, SecretStr, TypeAdapter, field_validator

from blocks.fields import MASKED_GUIDANCE, check_base_url, clean_secret, is_masked
from blocks.http import ApiClient, AuthError, BadReply, VendorError, shared_client
from blocks.replies import readable

_EXAMPLE = "https://api.hightouch.com/api/v1"
_PAGE = 100
_FEW = 3  # up to so many syncs are read one by one: a page of them would cost as much


class Rows(BaseModel):
    """Row counts of a run, by what is done with them."""

    added: int | None = Field(default=None, alias="addedCount")
    changed: int | None = Field(default=None, alias="changedCount")
    removed: int | None = Field(default=None, alias="removedCount")

    @property
    def total(self) -> int:
        """All of them."""
        return (self.added or 0) + (self.changed or 0) + (self.removed or 0)


class SyncRun(BaseModel):
    """A run of a sync."""

    model_config = ConfigDict(extra="ignore", populate_by_name=True)

    # Text in the reply to a trigger, a number in lists of runs: always text here.
    id: str = Field(coerce_numbers_to_str=True)
    status: str
    created_at: datetime = Field(alias="createdAt")
    started_at: datetime | None = Field(default=None, alias="startedAt")
    finished_at: datetime | None = Field(default=None, alias="finishedAt")
    successful: Rows | None = Field(default=None, alias="successfulRows")
    failed: Rows | None = Field(default=None, alias="failedRows")
    error: Any = None


class SequenceMember(BaseModel):
    """The run of one sync within a run of a sequence."""

    model_config = ConfigDict(extra="ignore", populate_by_name=True)

    sync_id: str = Field(alias="syncId", coerce_numbers_to_str=True)
    run_id: str = Field(alias="syncRunId", coerce_numbers_to_str=True)
    status: str
    finished_at: datetime | None = Field(default=None, alias="finishedAt")


class SequenceRun(BaseModel):
    """A run of a sync sequence."""

    model_config = ConfigDict(extra="ignore", populate_by_name=True)

    id: str
    status: str
    members: list[SequenceMember] = Field(default=[], alias="syncRuns")

    @field_validator("members", mode="before")
    @classmethod
    def _none(cls, value: Any) -> Any:
        return value or []


class Sync(BaseModel):
    """A sync; only what is used here."""

    model_config = ConfigDict(extra="ignore", populate_by_name=True)

    id: str = Field(coerce_numbers_to_str=True)
    slug: str = ""
    status: str | None = None
    disabled: bool = False
    workspace_id: str | None = Field(default=None, alias="workspaceId", coerce_numbers_to_str=True)
    last_run_at: datetime | None = Field(default=None, alias="lastRunAt")
    tags: dict[str, Any] | None = None

    @property
    def owner(self) -> str | None:
        """The owner that a tag `owner` names."""
        owner = (self.tags or {}).get("owner")
        return owner if isinstance(owner, str) else None


class _Triggered(BaseModel):
    # A failed validation comes with status 200 and without an id, so the id is required here.
    id: str = Field(coerce_numbers_to_str=True)


class _Runs(BaseModel):
    data: list[SyncRun]
    more: bool | None = Field(default=None, alias="hasMore")  # not there in the API's older form


class _Syncs(BaseModel):
    data: list[Any]


_TRIGGERED = TypeAdapter(_Triggered)
_RUNS = TypeAdapter(_Runs)
_SEQUENCE_RUN = TypeAdapter(SequenceRun)
_SYNC = TypeAdapter(Sync)
_SYNCS = TypeAdapter(_Syncs)


class HightouchCredentials(Block):
    """A Hightouch workspace's API key.

    Example:
        ```python
        HightouchCredentials(api_key="…").save("hightouch")
        ```
    """

    _block_type_name: ClassVar[str] = "Hightouch Credentials"
    _block_type_slug: ClassVar[str] = "hightouch-credentials"
    _logo_url: ClassVar[HttpUrl | None] = HttpUrl("https://hightouch.com/favicon-32x32.png")
    _documentation_url: ClassVar[HttpUrl | None] = HttpUrl(
        "https://hightouch.com/docs/developer-tools/api-guide"
    )
    _description: ClassVar[str] = "Signs in to a Hightouch workspace and runs its syncs."

    # pydantic's errors quote what they were given, and that may be the key in the wrong field.
    model_config = ConfigDict(hide_input_in_errors=True)

    api_key: SecretStr = Field(title="API key", description="Of one workspace, from Settings, API keys.")
    base_url: str = Field(
        default=_EXAMPLE, title="Base URL", description="Where the API is; rarely anything but the default."
    )
    app_url: str = Field(
        default="https://app.hightouch.com",
        title="App URL",
        description="Where the web interface is, for links.",
    )
    requests_per_10_seconds: int = Field(
        default=180,
        gt=0,
        title="Requests per 10 seconds",
        description="An upper limit for this workspace. Hightouch allows 200.",
    )

    @field_validator("base_url", "app_url")
    @classmethod
    def _normalise(cls, value: str) -> str:
        return check_base_url(value, example=_EXAMPLE)

    @field_validator("api_key")
    @classmethod
    def _clean(cls, value: SecretStr) -> SecretStr:
        return clean_secret(value)

    @property
    def account(self) -> Hashable:
        """What makes two blocks the same account: they share a client and a watcher."""
        return ("hightouch", self.base_url, self.api_key)

    def api(self) -> AbstractAsyncContextManager[HightouchApi]:
        """The client of this workspace on the running event loop, shared with all its other users."""
        return shared_client(self.account, lambda: HightouchApi(self))


class HightouchApi(ApiClient):
    """The calls of Hightouch's API that running syncs needs."""

    def __init__(self, credentials: HightouchCredentials) -> None:
        if is_masked(credentials.api_key):
            raise AuthError("Hightouch", "the API key is masked", guidance=MASKED_GUIDANCE, sent=False)
        key = credentials.api_key.get_secret_value()
        self._known: dict[str, Sync] = {}
        self.pages = 1
        """How many requests the last list of all syncs took."""
        super().__init__(
            "Hightouch",
            credentials.base_url,
            headers={"Authorization": f"Bearer {key}"},
            rate=(credentials.requests_per_10_seconds, 10.0),
            secrets=[key],
        )

    async def sync(self, sync_id: str, *, fresh: bool = False) -> Sync:
        """One sync, from memory when it was seen on this client already and `fresh` is off.

        Raises:
            NotFoundError: There is none with this id.
        """
        if fresh or sync_id not in self._known:
            self._known[sync_id] = await self.get(f"/syncs/{sync_id}", _SYNC)
        return self._known[sync_id]

    async def syncs(self, *, retry: bool = True) -> list[Sync]:
        """Every sync of the workspace with its present status, a hundred per request."""
        found: list[Sync] = []
        offset = 0
        while True:
            params = {"limit": _PAGE, "offset": offset}
            page = (await self.get("/syncs", _SYNCS, params, retry=retry)).data
            offset += len(page)
            found += readable(page, _SYNC)
            if len(page) < _PAGE:
                self._known.update({sync.id: sync for sync in found})
                self.pages = offset // _PAGE + 1
                return found

    async def learn(self, sync_ids: Collection[str]) -> None:
        """Read many syncs ahead, a hundred per request; `sync` then has them in memory."""
        if len(sync_ids) > _FEW and not self._known.keys() >= set(sync_ids):
            await self.syncs()

    async def greet(self) -> None:
        """Ask for next to nothing: shows that the API is there and takes the key."""
        await self.get("/syncs", _SYNCS, {"limit": 1})

    async def trigger(self, sync_id: str, *, full_resync: bool = False) -> str:
        """Start a run and return its id. Not repeated: a second request may start a second run.

        Raises:
            VendorError: `sent` says whether a run may have been started.
        """
        return await self._triggered(f"/syncs/{sync_id}/trigger", {"fullResync": full_resync})

    async def trigger_sequence(self, sequence_id: str) -> str:
        """Start a run of a sequence, and return its id or that of the run that is queued or in progress.

        Raises:
            VendorError: `sent` says whether a run may have been started.
        """
        return await self._triggered(f"/sync-sequences/{sequence_id}/trigger")

    async def _triggered(self, path: str, body: dict[str, Any] | None = None) -> str:
        try:
            return (await self.send("POST", path, _TRIGGERED, body=body)).id
        except BadReply as error:
            # Hightouch refuses with status 200 too: a message in place of the id.
            refusal = error.body.get("message") if isinstance(error.body, dict) else None
            if refusal is None:
                raise
            details = f": {error.body['details']}" if error.body.get("details") else ""
            raise VendorError(
                self.vendor,
                f"{refusal}{details}",
                method=error.method,
                path=error.path,
                status=error.status,
                sent=False,
            ) from None

    async def run(self, sync_id: str, run_id: str, *, retry: bool = False) -> SyncRun | None:
        """One run; None while it is not visible yet, which happens for a short time after the trigger."""
        reply = await self.get(f"/syncs/{sync_id}/runs", _RUNS, {"runId": run_id}, retry=retry)
        return next((run for run in reply.data if run.id == run_id), None)

    async def sequence_run(self, run_id: str, *, retry: bool = False) -> SequenceRun:
        """One run of a sequence, with the runs of its syncs that have begun.

        Raises:
            NotFoundError: There is none with this id, or it is not shown yet.
        """
        return await self.get(f"/sync-sequences/runs/{run_id}", _SEQUENCE_RUN, retry=retry)

    async def runs(self, sync_id: str, since: datetime, *, retry: bool = True) -> list[SyncRun]:
        """The runs of a sync that were created since then, newest first.

        Not with the API's own `after`: that one hides runs that have not started yet.
        """
        return [run for run in await self._runs(sync_id, since, retry=retry) if run.created_at >= since]

    async def newest_runs(self, sync_id: str) -> list[SyncRun]:
        """The runs of a sync, newest first: the last hundred or more."""
        return await self._runs(sync_id, self.theirs(datetime.now(UTC)), retry=True)

    async def _runs(self, sync_id: str, since: datetime, *, retry: bool) -> list[SyncRun]:
        """Pages of runs, newest first, until all that were created since then are among them."""
        found: list[SyncRun] = []
        while True:
            params = {"limit": _PAGE, "offset": len(found), "orderBy": "createdAt"}
            reply = await self.get(f"/syncs/{sync_id}/runs", _RUNS, params, retry=retry)
            page, found = reply.data, found + reply.data
            more = bool(page) and (len(page) == _PAGE if reply.more is None else reply.more)
            # The API does not state the direction of its order: where it ascends, ours are at the end.
            descends = bool(page) and page[0].created_at > page[-1].created_at
            if not more or (descends and page[-1].created_at < since):
                return sorted(found, key=lambda run: run.created_at, reverse=True)
