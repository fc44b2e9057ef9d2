"""dbt Cloud's runs for the engine: started with a cause that is found again, watched a hundred a request."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Literal

from blocks.dbtcloud import DbtCloudApi, account_of, api_of
from blocks.dbtcloud_model import Overrides, Run, meant
from blocks.http import TRANSIENT, NotFoundError, VendorError, VendorUnavailable
from blocks.reference import block_name
from tasks.jobs import AccountVendor, AlreadyRunning, Intent, JobHandle, JobRequest, JobState, JobStatus

if TYPE_CHECKING:
    from prefect_dbt.cloud import DbtCloudCredentials

CAUSE_LIMIT = 255  # characters
_STATES = {
    1: (JobState.QUEUED, "Queued"),
    2: (JobState.RUNNING, "Starting"),
    3: (JobState.RUNNING, "Running"),
    10: (JobState.SUCCEEDED, "Success"),
    20: (JobState.FAILED, "Error"),
    30: (JobState.CANCELLED, "Cancelled"),
}
_FEW = 2  # up to so many runs are read one by one
_RETRY = "retry-"


@dataclass(frozen=True)
class RunRequest:
    """A run of a job, as the engine takes it.

    Attributes:
        resource_id: The job.
        name: What a person calls it.
        owner: Who is told when it fails.
        cause: Why, for dbt Cloud's list of runs.
        overrides: What the run does otherwise than the job says.
        retries: The failed run that is taken up where it broke; then neither cause nor overrides hold.
        alone: Whether a run that is active already is looked for. Without, dbt Cloud queues ours behind it.
    """

    resource_id: str
    name: str
    owner: str | None = None
    cause: str = ""
    overrides: Overrides = field(default_factory=Overrides)
    retries: int | None = None
    alone: bool = False

    @property
    def operation(self) -> str:
        """`run`, or `retry-<run>`: by it a retry is found again, since it carries no text of ours."""
        return "run" if self.retries is None else f"{_RETRY}{self.retries}"


class DbtCloudVendor(AccountVendor[DbtCloudApi]):
    """dbt Cloud's runs for the engine."""

    name = "dbt-cloud"
    on_partial: Literal["fail", "warn", "ok"] = "fail"
    # A fresh run may be answered with 404 at first.
    grace = 60.0

    def __init__(self, credentials: DbtCloudCredentials) -> None:
        super().__init__(
            partial(api_of, credentials), account_of(credentials), block_name(credentials, type(credentials))
        )

    async def start(self, request: RunRequest, intent: Intent) -> JobHandle:
        """`POST /jobs/{id}/run/`, or `POST /runs/{id}/retry/`."""
        async with self._connect() as api:
            if request.alone and (active := await api.active_runs(request.resource_id)):
                same = _does_the_same(active[0], request)
                raise AlreadyRunning(self.handle(api, active[0], request.resource_id), same=same)
            if request.retries is not None:
                run = await api.retry_run(str(request.retries))
            else:
                cause = cause_with(request.cause, intent.marker)
                run = await api.trigger(request.resource_id, cause, request.overrides)
            return self.handle(api, run, request.resource_id, intent.marker)

    async def find(self, request: JobRequest, intent: Intent) -> JobHandle | None:
        """The run whose cause carries our marker; of a retry, the one that says what it retries."""
        retries = request.operation.removeprefix(_RETRY) if request.operation.startswith(_RETRY) else None
        async with self._connect() as api:
            for run in await api.runs_since(request.resource_id, api.theirs(intent.since)):
                if str(run.id) in intent.known:
                    continue
                cause = (run.trigger.cause if run.trigger else None) or ""
                if str(run.retrying_run_id) == retries or (intent.marker and f"[{intent.marker}]" in cause):
                    return self.handle(api, run, request.resource_id, intent.marker)
        return None

    async def observe(self, handles: Sequence[JobHandle]) -> Mapping[str, JobStatus | Exception]:
        """Lists of a hundred runs a request; one by one only few, and old ones that no list shows."""
        seen: dict[str, JobStatus | Exception] = {}
        async with self._connect() as api:
            if len(handles) > _FEW:
                runs = await api.runs_by_id({int(handle.job_id) for handle in handles})
                seen = {str(run.id): status_of(run) for run in runs}
            slots = asyncio.Semaphore(10)
            look = [
                h for h in handles if h.job_id not in seen and (len(handles) <= _FEW or not self._young(h))
            ]
            seen.update(await asyncio.gather(*(_observe_one(api, handle, slots) for handle in look)))
        return seen

    async def cancel(self, handle: JobHandle) -> JobState | None:
        """`POST /runs/{id}/cancel/`, and then looking until the run has ended: it goes on for a moment."""
        async with self._connect() as api:
            try:
                run = await api.cancel(handle.job_id)
            except NotFoundError as error:
                if not self._young(handle):
                    raise
                raise VendorUnavailable(error.vendor, "the run is not visible yet", sent=False) from None
            except TRANSIENT:
                raise
            except VendorError:
                # A run that has ended can't be cancelled; what is said then is not documented.
                run = await api.run(handle.job_id)
                if not status_of(run).state.terminal:
                    raise
            while not (state := status_of(run).state).terminal:
                await asyncio.sleep(0.5)
                run = await api.run(handle.job_id)
            return state

    def handle(self, api: DbtCloudApi, run: Run, job_id: str, marker: str = "") -> JobHandle:
        """Where a run can be found again."""
        return JobHandle(
            vendor=self.name,
            resource_id=job_id,
            job_id=str(run.id),
            marker=marker,
            started_at=run.created_at or api.theirs(datetime.now(UTC)),
            url=api.page_of(run),
        )

    def _young(self, handle: JobHandle) -> bool:
        return (self.theirs(datetime.now(UTC)) - handle.started_at).total_seconds() < self.grace


async def _observe_one(
    api: DbtCloudApi, handle: JobHandle, slots: asyncio.Semaphore
) -> tuple[str, JobStatus | Exception]:
    async with slots:
        try:
            return handle.job_id, status_of(await api.run(handle.job_id, retry=False))
        except VendorError as error:
            return handle.job_id, error


def _does_the_same(run: Run, request: RunRequest) -> bool:
    given = run.trigger.overridden if run.trigger else {}
    return request.retries is None and given == meant(request.overrides.given)


def cause_with(text: str, marker: str) -> str:
    """A cause of 255 characters at most, with the marker whole."""
    end = f"[{marker}]"
    room = CAUSE_LIMIT - len(end) - 1
    text = text if len(text) <= room else f"{text[: room - 1]}…"
    return f"{text} {end}".strip()


def status_of(run: Run) -> JobStatus:
    """One observation of a run, by the number of its status: the words for it have changed before."""
    known = run.status in _STATES
    state, word = _STATES.get(
        run.status, (JobState.RUNNING, f"{run.status_humanized or ''} ({run.status})".strip())
    )
    if not known and run.is_complete:
        # dbt Cloud says that it has ended and not in what way we know: no success that it does not name.
        state = JobState.SUCCEEDED if run.is_success else JobState.FAILED
        state = JobState.CANCELLED if run.is_cancelled else state
    message = run.status_message
    if state is JobState.FAILED:
        message = message or f"dbt Cloud says {word}"
    elif state is JobState.CANCELLED:
        message = message or "it was cancelled in dbt Cloud"
    return JobStatus(
        state=state,
        known=known or state.terminal,
        word=word,
        duration=run.seconds if state.terminal else None,
        message=message if state.terminal else None,
    )
