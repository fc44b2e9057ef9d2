"""dbt Cloud: a typed client for its Administrative API (v2), on prefect-dbt's own credentials block.

The block is taken as it is. Its `domain` may be a whole address too (`http://127.0.0.1:8010`), which is how a
rehearsal server is reached; prefect-dbt's own client only knows https. Of prefect-dbt nothing is imported
before it is needed: that takes seconds.

Vendor documentation: https://docs.getdbt.com/dbt-cloud/api-v2
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Hashable, Iterable, Sequence
from contextlib import AbstractAsyncContextManager
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any, Generic, NoReturn, TypeAlias, TypeVar

from prefect.blocks.core import Block
from pydantic import (
    BaseModel,
    BeforeValidator,
    TypeAdapter,
    ValidationError,
    WithJsonSchema,
)

from blocks.dbtcloud_model import Job, Overrides, Run
from blocks.fields import MASKED_GUIDANCE, check_base_url, clean_secret, is_masked
from blocks.http import ApiClient, AuthError, BadReply, NotFoundError, VendorError, shared_client
from blocks.reference import NAMED, NamesBlock, load_block
from blocks.replies import readable

SLUG = "dbt-cloud-credentials"
PAGE = 100
"""The longest list that one request gives."""

_REQUESTS = (4500, 60.0)  # dbt Cloud allows an account 5,000 a minute
_EXAMPLE = "cloud.getdbt.com"

T = TypeVar("T")


def _block_type() -> Any:
    from prefect_dbt.cloud import DbtCloudCredentials

    return DbtCloudCredentials


def _credentials(value: Any) -> Any:
    if isinstance(value, str) and value.strip():
        return value.strip()
    if isinstance(value, Block) and value.get_block_type_slug() == SLUG:
        return value
    if isinstance(value, dict):
        try:
            return _block_type()(**value)
        except ValidationError as error:
            # Its text quotes what it was given, and that may be the key in the wrong field.
            problem = error.errors(include_url=False, include_input=False, include_context=False)[0]
            where = ".".join(str(part) for part in problem["loc"])
            raise ValueError(f"{where}: {problem['msg']}") from None
    raise ValueError("Give a dbt Cloud Credentials block of prefect-dbt, or the name of a saved one.")


if TYPE_CHECKING:
    from prefect_dbt.cloud import DbtCloudCredentials

    CredentialsRef: TypeAlias = DbtCloudCredentials | str
else:
    CredentialsRef = Annotated[
        Any,
        NAMED,  # looks at what `_credentials` has made of it
        BeforeValidator(_credentials),
        # In a form and in a deployment it is the name; instances are for scripts.
        WithJsonSchema({"type": "string", "description": "Name of a saved dbt Cloud Credentials block."}),
        NamesBlock("dbt-cloud-credentials"),
    ]
"""prefect-dbt's block, or the name of a saved one."""


class _Status(BaseModel):
    code: int | None = None
    is_success: bool | None = None
    user_message: str | None = None
    developer_message: str | None = None


class _Envelope(BaseModel, Generic[T]):
    status: _Status | None = None
    data: T | None = None


_JOB = TypeAdapter(_Envelope[Job])
_RUN = TypeAdapter(_Envelope[Run])
_RUNS = TypeAdapter(_Envelope[list[Run]])
_ITEMS = TypeAdapter(_Envelope[list[Any]])
_ITEM = TypeAdapter(Run)
_NAMES = TypeAdapter(_Envelope[list[str]])


def _since(run: Run, moment: datetime) -> bool:
    return run.created_at is None or run.created_at >= moment


async def load_credentials(reference: CredentialsRef) -> DbtCloudCredentials:
    """The block itself, or the saved one of this name.

    Raises:
        BlockNotFound: With the names that are saved.
    """
    if isinstance(reference, Block):
        return reference  # its kind was checked by CredentialsRef
    # In a thread: prefect-dbt imports dbt and more, and other tasks are waiting meanwhile.
    kind = await asyncio.to_thread(_block_type)
    block: DbtCloudCredentials = await load_block(kind, reference)
    return block


def base_url_of(credentials: DbtCloudCredentials) -> str:
    """Where dbt Cloud is, without a slash at the end.

    Raises:
        VendorError: The block's domain is none.
    """
    try:
        return check_base_url(credentials.domain, example=_EXAMPLE)
    except ValueError as error:
        raise VendorError(
            "dbt Cloud", str(error), guidance="Check `domain` in the block.", sent=False
        ) from None


def account_of(credentials: DbtCloudCredentials) -> Hashable:
    """What makes two blocks the same account: they share a client and a watcher."""
    return ("dbt-cloud", base_url_of(credentials), credentials.account_id, credentials.api_key)


def api_of(credentials: DbtCloudCredentials) -> AbstractAsyncContextManager[DbtCloudApi]:
    """The client of this account on the running event loop, shared with all its other users."""
    return shared_client(account_of(credentials), lambda: DbtCloudApi(credentials))


class DbtCloudApi(ApiClient):
    """The calls of dbt Cloud's API that running jobs needs. Without its last slash a path is not found."""

    def __init__(self, credentials: DbtCloudCredentials) -> None:
        if is_masked(credentials.api_key):
            raise AuthError("dbt Cloud", "the API key is masked", guidance=MASKED_GUIDANCE, sent=False)
        try:
            token = clean_secret(credentials.api_key).get_secret_value()
        except ValueError as error:
            guidance = "Check the API key in the block."
            raise AuthError("dbt Cloud", str(error), guidance=guidance, sent=False) from None
        web = base_url_of(credentials)
        self._account = credentials.account_id
        self._web = web
        # What is known of the filter `pk__in`, which is documented in name only: None until it was tried.
        self._by_ids: bool | None = None
        super().__init__(
            "dbt Cloud",
            f"{web}/api/v2/accounts/{credentials.account_id}",
            headers={"Authorization": f"Bearer {token}"},
            rate=_REQUESTS,
            secrets=[token],
        )

    async def job(self, job_id: str) -> Job:
        """One job.

        Raises:
            NotFoundError: There is none with this id.
        """
        return self._open(await self.get(f"/jobs/{job_id}/", _JOB))

    async def trigger(self, job_id: str, cause: str, overrides: Overrides) -> Run:
        """Start a run. Not repeated: every request makes a run, there is no idempotency key.

        Args:
            job_id: The job.
            cause: Why, 255 characters at most; the only text of ours that dbt Cloud keeps with the run.
            overrides: What it does otherwise than the job says.

        Raises:
            VendorError: `sent` says whether a run may have been started.
        """
        body = {"cause": cause, **overrides.given}
        return self._open(await self.send("POST", f"/jobs/{job_id}/run/", _RUN, body=body), started=True)

    async def retry_run(self, run_id: str) -> Run:
        """Start a run from the point at which another failed. There is no body: overrides do not hold for it.

        Raises:
            VendorError: `sent` says whether a run may have been started.
        """
        return self._open(await self.send("POST", f"/runs/{run_id}/retry/", _RUN), started=True)

    async def cancel(self, run_id: str) -> Run:
        """Ask for a run to be stopped; it goes on for a moment."""
        return self._open(await self.send("POST", f"/runs/{run_id}/cancel/", _RUN))

    async def run(self, run_id: str, *, related: Sequence[str] = (), retry: bool = True) -> Run:
        """One run.

        Args:
            run_id: The run.
            related: `trigger`, `run_steps` and the like. Steps come with logs of megabytes: for ended runs.
            retry: Off for polls.

        Raises:
            NotFoundError: There is none, or it is not visible yet, which a new run may be for a minute.
        """
        params = {"include_related": ",".join(related)} if related else None
        return self._open(await self.get(f"/runs/{run_id}/", _RUN, params, retry=retry))

    async def runs_since(self, job_id: str, since: datetime) -> list[Run]:
        """The runs of a job that were created since then, with their triggers, newest first."""
        found: list[Run] = []
        while True:
            # Unless told, the list begins with the oldest run.
            page = await self._newest(job_id, offset=len(found))
            found += page
            if len(page) < PAGE or not _since(page[-1], since):
                return [run for run in found if _since(run, since)]

    async def active_runs(self, job_id: str) -> list[Run]:
        """The runs of a job that have not ended, newest first."""
        return await self._newest(job_id, status__in=json.dumps([1, 2, 3]))

    async def _newest(self, job_id: str, **more: Any) -> list[Run]:
        params = {"job_definition_id": job_id, "order_by": "-id", "limit": PAGE, "include_related": "trigger"}
        return self._open(await self.get("/runs/", _RUNS, {**params, **more}, retry=False))

    async def runs_by_id(self, ids: Iterable[int]) -> list[Run]:
        """The runs of these ids that are visible, a hundred a request.

        The filter by ids is documented in name only. Where a server refuses or ignores it, that is noticed
        once, and from then on the list from the oldest of them on is read.
        """
        wanted = sorted(ids)
        found: list[Run] = []
        for start in range(0, len(wanted), PAGE):
            some = wanted[start : start + PAGE]
            found += await (self._filtered(some) if self._by_ids is not False else self._from(some))
        return found

    async def _filtered(self, ids: list[int]) -> list[Run]:
        # A list in a query is JSON text in brackets; anything else is refused with 400.
        params = {"pk__in": json.dumps(ids, separators=(",", ":")), "order_by": "-id", "limit": PAGE}
        try:
            listed = self._open(await self.get("/runs/", _ITEMS, params, retry=False))
        except VendorError as error:
            if error.status != 400:
                raise
            self._by_ids = False
        else:
            runs = readable(listed, _ITEM)
            if all(run.id in ids for run in runs):
                # An empty list says nothing: they may all be invisible yet.
                self._by_ids = self._by_ids or bool(runs) or None
                return runs
            self._by_ids = False
        return await self._from(ids)

    async def _from(self, ids: list[int]) -> list[Run]:
        """The list from the oldest of them on; those that it does not show soon are for single requests."""
        wanted, found = set(ids), dict[int, Run]()
        last = ids[0] - 1
        for _ in range(len(ids) // 10 + 2):
            params = {"id__gt": last, "order_by": "id", "limit": PAGE}
            listed = self._open(await self.get("/runs/", _ITEMS, params, retry=False))
            page = readable(listed, _ITEM)
            found.update({run.id: run for run in page if run.id in wanted})
            if len(listed) < PAGE or not page or page[-1].id >= ids[-1]:
                break
            last = page[-1].id
        return list(found.values())

    async def artifacts(self, run_id: str) -> list[str]:
        """The paths of the files that a run left in its last step."""
        return self._open(await self.get(f"/runs/{run_id}/artifacts/", _NAMES))

    async def artifact(self, run_id: str, path: str, step: int | None = None) -> bytes | None:
        """A file that a run left, as it is; None if there is none, which is common."""
        params = {"step": step} if step is not None else None
        try:
            return await self.file(f"/runs/{run_id}/artifacts/{path}", params)
        except NotFoundError:
            return None

    async def job_artifact(self, job_id: str, path: str) -> bytes | None:
        """A file of the job's latest run that left it; None if no run did yet."""
        try:
            return await self.file(f"/jobs/{job_id}/artifacts/{path}")
        except NotFoundError:
            return None

    def page_of(self, run: Run) -> str:
        """The run's page in dbt Cloud."""
        project = f"/projects/{run.project_id}" if run.project_id else ""
        return run.href or f"{self._web}/deploy/{self._account}{project}/runs/{run.id}/"

    def _open(self, envelope: _Envelope[T], *, started: bool = False) -> T:
        status = envelope.status
        if status is not None and status.is_success is False:
            self._refused(status, started)
        if envelope.data is None:
            raise BadReply(self.vendor, "its reply holds no data", sent=started)
        return envelope.data

    def _refused(self, status: _Status, started: bool) -> NoReturn:
        # An error in a reply of status 200: its code is in the envelope.
        words = [word for word in (status.user_message, status.developer_message) if word]
        message = self._redact(" ".join(words)[:500]) or "no reason given"
        kind = {401: AuthError, 403: AuthError, 404: NotFoundError}.get(status.code or 0, VendorError)
        raise kind(self.vendor, message, status=status.code, sent=started and (status.code or 500) >= 500)
