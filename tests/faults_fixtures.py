"""A job of any vendor, to be run through the engine while something goes wrong.

The vendors' own are in `faults_subjects.py`: a class there is all that it takes to be in the table of faults.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import pytest

from sandbox import Sandbox
from tasks.jobs import Entry, JobPolicy, JobResult, JobVendor, MemoryJournal, run_job
from tests.jobs_fixtures import until

GRACE = 0.3  # seconds for which a job that was started may not be seen


class Noting(MemoryJournal):
    """A journal that tells when a job is known to have started: before the first look at it."""

    def __init__(self) -> None:
        super().__init__()
        self.once_started: Callable[[], object] = lambda: None

    async def record(self, entry: Entry, *, urgent: bool = False) -> None:
        await super().record(entry, urgent=urgent)
        if entry.handle:
            then, self.once_started = self.once_started, lambda: None
            then()


SUBJECTS: dict[str, type[Subject]] = {}
"""Every class of a vendor's job, by its name."""


class Subject(ABC):
    """A job of one vendor: how it is run, what can happen to it, and what the vendor saw of it.

    Attributes:
        vendor: How the engine starts, finds, observes and cancels it.
        request: What is run.
        journal: Kept over the runs of one subject: they are retries of each other.
    """

    name: ClassVar[str]
    title: ClassVar[str]  # as errors call it
    has_token: ClassVar[bool] = False  # it signs in for a token that expires, where others have a key
    sandbox_name: ClassVar[str]
    start: ClassVar[str]  # the path of a start request, a POST
    look: ClassVar[str]  # the path of a request by which a job is watched
    look_method: ClassVar[str] = "GET"
    good: ClassVar[str] = "succeeded"  # the word for a good end
    cancel: ClassVar[tuple[str, str] | None] = None  # method and path; None where the vendor has none
    vendor_class: ClassVar[type]

    vendor: JobVendor[Any]
    request: Any

    def __init_subclass__(cls) -> None:
        assert cls.name not in SUBJECTS, f"{cls.__name__} needs a name of its own"
        SUBJECTS[cls.name] = cls

    def __init__(self, sandbox: Sandbox) -> None:
        self.sandbox = sandbox
        self.journal = Noting()
        self.faults: list[int] = []

    @abstractmethod
    def behave(self, **changes: Any) -> None:
        """Set how the next job behaves."""

    @abstractmethod
    def start_by_hand(self) -> None:
        """What somebody else starts."""

    @property
    @abstractmethod
    def runs(self) -> Sequence[Any]:
        """The jobs at the vendor, oldest first."""

    @property
    def jobs(self) -> int:
        """How many jobs the vendor has seen."""
        return len(self.runs)

    def end_first(self) -> None:
        """Let the oldest job succeed now, if it has not ended."""
        self.runs[0].timeline.finish(self.good)

    @property
    def cancels(self) -> int:
        """How many requests to cancel have arrived."""
        if self.cancel is None:
            return 0
        method, path = self.cancel
        return self.sandbox.requests.count(vendor=self.sandbox_name, method=method, path=path)

    def expire_sign_in(self) -> None:  # noqa: B027 - most vendors have keys that do not expire
        """Make what we have signed in with invalid, where that is a token that can be had anew."""

    def break_start(self, **fault: Any) -> None:
        """Let start requests go wrong."""
        self._fault(method="POST", path=self.start, **fault)

    def break_look(self, **fault: Any) -> None:
        """Let the requests go wrong by which jobs are watched."""
        self._fault(method=self.look_method, path=self.look, **fault)

    def _fault(self, **fault: Any) -> None:
        self.faults.append(self.sandbox.faults.add(vendor=self.sandbox_name, **fault))

    @property
    def hit(self) -> bool:
        """Whether every fault that was switched on has hit at least one request."""
        return all(self.sandbox.faults.hits(fault) for fault in self.faults)

    async def run(self, **policy: Any) -> JobResult:
        """Run it once."""
        settings = JobPolicy(**{"poll": 0.03, "timeout": 90.0, "outage": 90.0, **policy})
        return await run_job(self.vendor, self.request, settings, journal=self.journal)

    def begin(self, **policy: Any) -> asyncio.Task[JobResult]:
        """Run it in the background."""
        return asyncio.create_task(self.run(**policy))

    @property
    def started(self) -> bool:
        """Whether the engine has its job's id."""
        return any(entry.handle or entry.result for entry in self.journal.entries.values())

    async def until_started(self) -> None:
        """Wait for it."""
        await until(lambda: self.started)


@pytest.fixture
def scaled(monkeypatch: pytest.MonkeyPatch) -> None:
    """The waits of the contract, scaled down so that a test can sit them out."""
    for subject in SUBJECTS.values():
        monkeypatch.setattr(subject.vendor_class, "grace", GRACE, raising=False)
    monkeypatch.setattr("blocks.errors.RATE_LIMIT_PAUSE", 0.2)  # for 30 s
    monkeypatch.setattr("blocks.errors.RETRY_AFTER_CAP", 0.3)  # for 120 s
