"""What a remote job is, whatever the vendor: its request, handle, state, policy and result."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from datetime import datetime
from enum import StrEnum
from typing import Any, Literal, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator


class JobState(StrEnum):
    """The state of a remote job in one vocabulary for every vendor."""

    QUEUED = "QUEUED"
    RUNNING = "RUNNING"
    RETRYING = "RETRYING"
    SUCCEEDED = "SUCCEEDED"
    PARTIAL = "PARTIAL"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"
    SKIPPED = "SKIPPED"

    @property
    def terminal(self) -> bool:
        """Whether the job has ended and its state will not change any more."""
        return self not in (JobState.QUEUED, JobState.RUNNING, JobState.RETRYING)


class JobPolicy(BaseModel):
    """How long to wait for a job, how often to look, and what its less clear ends mean."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    poll: float = Field(
        default=1.0,
        gt=0,
        allow_inf_nan=False,
        description="Seconds between two looks at a young job; grows with the job's age.",
    )
    poll_cap: float = Field(
        default=30.0, gt=0, allow_inf_nan=False, description="Longest time between two looks, in seconds."
    )
    timeout: float = Field(
        default=6 * 3600.0,
        gt=0,
        allow_inf_nan=False,
        description="Seconds from the start of the job until `on_timeout` is applied. Waiting for another "
        "run of the same job to end (`on_active: queue`) is bounded by the same figure.",
    )
    on_timeout: Literal["cancel", "detach"] = Field(
        default="cancel", description="At the timeout: cancel the vendor's job, or leave it running."
    )
    outage: float = Field(
        default=300.0,
        ge=0,
        allow_inf_nan=False,
        description="Seconds for which an unreachable or failing API is borne. The job is not touched.",
    )
    on_active: Literal["queue", "adopt", "skip", "fail"] = Field(
        default="queue",
        description="When the vendor says that a run is active already: wait for it and then start ours "
        "(queue), take it as ours (adopt), do nothing (skip), or fail.",
    )
    on_partial: Literal["fail", "warn", "ok"] | None = Field(
        default=None,
        description="What a partial end is: a failure, a success with a warning, or a success. "
        "Empty: the tool's default (Airbyte fail; Hightouch and Census warn). Airbyte Cloud's API calls "
        "a job of which only a part landed a success, and so must we.",
    )
    min_rows: int | None = Field(
        default=None, ge=0, description="A job that succeeded with fewer rows than this is PARTIAL."
    )
    max_rows_rejected: int | None = Field(
        default=None,
        ge=0,
        description="More rejected rows than this are a failure, whatever `on_partial` says, and so is a job "
        "that does not say how many there were.",
    )
    concurrency_limit: str | None = Field(
        default=None,
        min_length=1,
        description="Name of a Prefect global concurrency limit: a job of ours starts only with one of its "
        "slots, over all flow runs and machines. For an account that bears only so many jobs at a time.",
    )

    @model_validator(mode="after")
    def _cap_not_below_poll(self) -> JobPolicy:
        if self.poll > self.poll_cap:
            # Only reached with the default cap or a slip; the slower of the two is what was meant.
            object.__setattr__(self, "poll_cap", self.poll)
        return self

    def interval(self, age: float) -> float:
        """Seconds until the next look at a job that is `age` seconds old."""
        return min(self.poll_cap, max(self.poll, age * 0.05))


class Intent(BaseModel):
    """What is kept of a job before it is started, so that it can be found again from any process."""

    model_config = ConfigDict(frozen=True)

    marker: str = Field(default="", description="A text of ours, for vendors that keep one with the job.")
    since: datetime = Field(description="Our clock when we set out to start it.")
    known: list[str] = Field(default=[], description="Ids of earlier jobs of this resource: they are not it.")
    baseline: str | None = Field(default=None, description="What the vendor's `baseline` said before.")
    repeat: bool = Field(
        default=False, description="Whether an earlier attempt of the same run has started this job before."
    )


class JobHandle(BaseModel):
    """Where a started job can be found again, from any process."""

    model_config = ConfigDict(frozen=True)

    vendor: str
    resource_id: str
    job_id: str
    marker: str = ""
    started_at: datetime = Field(description="When the vendor says that the job was created, or our start.")
    baseline: str | None = Field(
        default=None, description="What a vendor without job ids needs to tell this run from the one before."
    )
    url: str | None = Field(default=None, description="The job's page in the vendor's own interface.")


class StreamResult(BaseModel):
    """What a job did with one stream, where the vendor tells that."""

    model_config = ConfigDict(frozen=True)

    name: str
    namespace: str | None = None
    state: JobState | None = None
    rows: int | None = None
    bytes: int | None = None
    message: str | None = None


class JobStatus(BaseModel):
    """One observation of a job."""

    model_config = ConfigDict(frozen=True)

    state: JobState
    word: str = Field(description="The vendor's own word for the state.")
    known: bool = Field(default=True, description="False when the vendor's word is not in the contract.")
    rows: int | None = None
    bytes: int | None = None
    rows_rejected: int | None = None
    attempts: int | None = None
    duration: float | None = None
    message: str | None = None
    streams: list[StreamResult] = []


class JobResult(BaseModel):
    """How a job ended. Also the outcome of one connection or activation in a flow's report.

    Attributes:
        vendor: The tool, for example `airbyte`.
        resource_id: The connection or sync.
        name: A name that a person reads; the resource id when none is known.
        owner: Who is told when it fails.
        job_id: The vendor's id of the job; None when none was started.
        state: How it ended.
        rows: Rows moved; None when the vendor does not say.
        bytes: Bytes moved; None when the vendor does not say.
        rows_rejected: Rows that the destination refused.
        duration: Seconds from the job's creation to its end, as the vendor counts them.
        attempts: The vendor's own attempts.
        message: The reason, in the vendor's words where there are any.
        url: The job's page in the vendor's interface.
        streams: What was done with each stream, where the vendor tells that.
        tolerated: Whether the end was partial and passes under the policy.
    """

    model_config = ConfigDict(frozen=True)

    vendor: str
    resource_id: str
    name: str
    owner: str | None = None
    job_id: str | None = None
    state: JobState
    rows: int | None = None
    bytes: int | None = None
    rows_rejected: int | None = None
    duration: float | None = None
    attempts: int | None = None
    message: str | None = None
    url: str | None = None
    streams: list[StreamResult] = []
    tolerated: bool = False

    @property
    def good(self) -> bool:
        """Whether what is built on it may go on."""
        return self.state is JobState.SUCCEEDED or (self.state is JobState.PARTIAL and self.tolerated)

    def sentence(self) -> str:
        """The result in one line: name, state, reason, link."""
        job = f" (job {self.job_id})" if self.job_id else ""
        rows = f", {self.rows:,} rows" if self.rows is not None else ""
        why = f": {self.message}" if self.message else ""
        link = f" {self.url}" if self.url and not self.good else ""
        return f"{self.name}{job} {self.state.value.lower()}{rows}{why}{link}"


class JobRequest(Protocol):
    """What the engine needs to know of a vendor's request."""

    @property
    def resource_id(self) -> str:
        """The connection, sync or job definition to run."""

    @property
    def operation(self) -> str:
        """What is done to it, for example `sync` or `clear`."""

    @property
    def name(self) -> str:
        """What a person calls it."""

    @property
    def owner(self) -> str | None:
        """Who is told when it fails."""


RequestT = TypeVar("RequestT", bound=JobRequest, contravariant=True)


class JobVendor(Protocol[RequestT]):
    """What differs from vendor to vendor. Everything else is the engine's.

    Attributes:
        name: The tool, as in `JobHandle.vendor`.
        account: What makes two vendor objects the same account: they share one watcher.
        block: The name of the saved block (`slug/name`) that a hook in another process can load, or None.
        on_partial: What a partial end means where the policy does not say.
        grace: Seconds for which a fresh job may not be visible to `find` and `observe`.
    """

    name: str
    account: Hashable
    block: str | None
    on_partial: Literal["fail", "warn", "ok"]
    grace: float

    def session(self) -> AbstractAsyncContextManager[Any]:
        """Held open while a job is run, so that its requests share one client."""

    def theirs(self, moment: datetime) -> datetime:
        """A moment of our clock on the vendor's, as its replies tell it."""

    async def baseline(self, request: RequestT) -> str | None:
        """What must be remembered from before the start to tell our job from the one before.

        Read right before each start and kept in the journal. None where job ids do that.
        """

    async def start(self, request: RequestT, intent: Intent) -> JobHandle:
        """Begin the job.

        Raises:
            AlreadyRunning: The vendor refuses because a run is active.
            VendorError: Anything else; `sent` says whether the request can have had an effect.
        """

    async def find(self, request: JobRequest, intent: Intent) -> JobHandle | None:
        """The job that an earlier `start` of ours made, or None. One look: the engine repeats it.

        Args:
            request: What was to be run; only `resource_id` and `operation` are used.
            intent: What `start` was given. Compare its `since` by the vendor's clock.
        """

    async def observe(self, handles: Sequence[JobHandle]) -> Mapping[str, JobStatus | Exception]:
        """The state of many jobs, keyed by job id, in as few requests as the vendor's API allows.

        No two of them have the same id: jobs of two resources that do are asked for in two calls.

        A job that the vendor does not know carries its error as the value, and one that the vendor accepted
        and then did not run because another was active carries `AlreadyRunning`. What is not in the reply is
        taken as not visible yet.
        """

    async def cancel(self, handle: JobHandle) -> JobState | None:
        """Stop the job, unless it has ended; safe to repeat.

        Returns:
            CANCELLED when it was stopped, how it had ended before that, or None when this vendor cannot.
        """


class AlreadyRunning(Exception):
    """The vendor refused to start, or skipped what it had accepted, because a run of the same is active.

    Attributes:
        active: The active run, where the vendor could name it.
        same: Whether it does what ours was to do; a clear is no sync and can't be taken for one.
    """

    def __init__(self, active: JobHandle | None, *, same: bool = True) -> None:
        super().__init__(active)
        self.active = active
        self.same = same

    def __str__(self) -> str:
        return (
            f"a run is active already: job {self.active.job_id}" if self.active else "a run is active already"
        )


class JobError(Exception):
    """A job did not end well. Carries the result, so that a fan-out can go on with it.

    Attributes:
        result: How the job ended, with the vendor's reason and link.
    """

    def __init__(self, result: JobResult) -> None:
        super().__init__(result)
        self.result = result

    def __str__(self) -> str:
        return self.result.sentence()

    def __repr__(self) -> str:
        # Prefect logs exceptions by their repr; thirteen fields of a result are no reading matter.
        return f"{type(self).__name__}: {self}"

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(self), (self.result,))


class JobFailed(JobError):
    """The vendor says failed, or a partial end is a failure under the policy."""


class JobCancelled(JobError):
    """The vendor's job was cancelled by somebody. That is neither a success nor a failure of ours."""


class JobTimeout(JobError):
    """The job did not end in time."""


class InputError(ValueError):
    """What the user gave can't be run. Raised before anything is started."""
