"""dbt Cloud's side of the stage: jobs, their runs with steps and artifacts, and the controls over them.

The HTTP face of this state is in `dbt_cloud_api.py`. Runs of one job queue behind each other. A scripted run
costs nothing while nobody asks; a `real` one runs dbt on the stage's project (`dbt_cloud_run.py`).
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from sandbox import catalog
from sandbox import dbt_cloud_project as project
from sandbox.dbt_cloud_run import Step, StepStatus, plan_steps, really_run
from sandbox.timeline import FOREVER, STOP_WITHIN, DbtJobBehaviour, Phase, Timeline, Work, Workers
from sandbox.warehouse import Warehouse

QUEUED, STARTING, RUNNING, SUCCESS, ERROR, CANCELLED = "1", "2", "3", "10", "20", "30"
NotRetried = Literal[
    "RETRY_UNSUPPORTED_CMD",
    "RETRY_NOT_LATEST_RUN",
    "RETRY_NOT_FAILED_RUN",
    "RETRY_NO_RUN_RESULTS",
]


class DbtCloudSettings(BaseModel):
    """What can be set about the dbt Cloud server as a whole."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True)

    requests_per_minute: int | None = Field(5000, ge=1, description="Beyond it: 429. None: no limit.")
    pk_in: Literal["understood", "refused", "ignored"] = Field(
        "understood", description="What becomes of the filter `pk__in`, of which little is documented."
    )
    cancel_finished: Literal["unchanged", "refused"] = Field(
        "unchanged", description="What cancelling a run that has ended does: 200 and nothing, or 400."
    )


class JobChange(DbtJobBehaviour):
    """A change to one job: any field of its behaviour, whether it is deleted, or its steps."""

    deleted: bool = False
    steps: list[str] = Field(default_factory=list)
    generate_docs: bool = False


class NotRetriable(Exception):
    """The run can't be retried; the only argument is dbt Cloud's reason."""


@dataclass(slots=True)
class Run:
    """One run of a job. `timeline` is None while it waits for the run before it to end."""

    run_id: int
    job: Job
    cause: str
    overrides: dict[str, Any]
    behaviour: DbtJobBehaviour
    steps: list[Step]
    created: float = field(default_factory=time.monotonic)
    created_wall: float = field(default_factory=time.time)
    retrying: Run | None = None
    work: Work | None = None
    timeline: Timeline | None = None
    cancel_at: float | None = None  # monotonic

    @property
    def visible(self) -> bool:
        """Whether the API shows it yet."""
        return time.monotonic() >= self.created + self.behaviour.visibility_delay

    def at(self) -> tuple[str, float, bool]:
        """The status, the moment it began (monotonic), and whether it is final."""
        now = time.monotonic()
        if self.timeline is None:
            return QUEUED, self.created, False
        if self.cancel_at is not None and self.timeline.cut is None:
            if now < self.cancel_at:
                return RUNNING, self.timeline.started, False
            self.timeline.cut = (self.cancel_at, CANCELLED)
        return self.timeline.at(now)

    @property
    def status(self) -> int:
        """The status of this moment: 1, 2, 3, 10, 20 or 30, or what is in no contract."""
        return int(self.at()[0])

    @property
    def final(self) -> bool:
        """Whether it has ended."""
        return self.at()[2]

    @property
    def ended(self) -> float | None:
        """Monotonic moment of the end; None before."""
        _, since, final = self.at()
        return since if final else None

    def wall(self, moment: float) -> float:
        """The epoch seconds of a monotonic moment."""
        return self.created_wall + (moment - self.created)

    def shows(self, delay: float) -> bool:
        """Whether it ended at least so many seconds ago."""
        ended = self.ended
        return ended is not None and time.monotonic() >= ended + delay

    def artifacts(self, step: int | None = None) -> dict[str, bytes]:
        """The files of a step, or of the last step that has any; none before the end."""
        if not self.shows(self.behaviour.artifacts_delay):
            return {}
        wanted = [one for one in self.steps if one.artifacts and step in (None, one.index)]
        return wanted[-1].artifacts if wanted else {}

    @property
    def failed_step(self) -> Step | None:
        """The step at which it broke."""
        return next((step for step in self.steps if step.status is StepStatus.ERROR), None)

    def why_no_retry(self) -> NotRetried | None:
        """Why it can't be retried from its failure; None if it can."""
        step = self.failed_step
        if self.status != int(ERROR):
            return "RETRY_NOT_FAILED_RUN"
        if self.job.runs[-1] is not self:
            return "RETRY_NOT_LATEST_RUN"
        if step is None or step.runs is None:
            return "RETRY_UNSUPPORTED_CMD"
        return None if "run_results.json" in step.artifacts else "RETRY_NO_RUN_RESULTS"


@dataclass(slots=True)
class Job:
    """One job and how its next run will behave."""

    job_id: int
    name: str
    execute_steps: list[str]
    behaviour: DbtJobBehaviour
    generate_docs: bool = False
    deleted: bool = False
    runs: list[Run] = field(default_factory=list)


class DbtCloud:
    """All of dbt Cloud's state, safe to use from the server's thread and from a test's."""

    def __init__(self, warehouse: Warehouse, job_seconds: float = 3.0) -> None:
        self.settings = DbtCloudSettings()
        self.warehouse = warehouse
        self.lock = threading.RLock()
        self.jobs = {
            spec.job_id: Job(
                spec.job_id,
                spec.name,
                list(spec.steps),
                DbtJobBehaviour(duration=job_seconds, real=spec.real),
                spec.generate_docs,
            )
            for spec in catalog.DBT_JOBS
        }
        self.runs: dict[int, Run] = {}
        self.next_run = 70_471_001
        self._workers = Workers(self._cancel_work)
        self._stopping = threading.Event()

    def job(self, key: int | str) -> Job:
        """A job by its id (number or digits) or its name.

        Raises:
            KeyError: there is none.
        """
        if str(key).isdecimal() and int(key) in self.jobs:
            return self.jobs[int(key)]
        found = next((job for job in self.jobs.values() if job.name == key), None)
        if found is None:
            raise KeyError(key)
        return found

    def set(self, key: int | str, **changes: Any) -> Job:
        """Change how a job's next runs behave (`DbtJobBehaviour`), its `steps`, or whether it is `deleted`.

        Raises:
            KeyError: no such job or node.
            pydantic.ValidationError: a field that does not exist, or a value that does not fit.
        """
        job = self.job(key)
        sent = JobChange.model_validate(changes).model_dump(exclude_unset=True)
        project.find(sent.get("node", job.behaviour.node))
        with self.lock:
            job.deleted = sent.pop("deleted", job.deleted)
            job.execute_steps = sent.pop("steps", job.execute_steps)
            job.generate_docs = sent.pop("generate_docs", job.generate_docs)
            job.behaviour = DbtJobBehaviour.model_validate(job.behaviour.model_dump() | sent)
        return job

    def add_jobs(self, count: int, *, duration: float = 3.0, prefix: str = "synthetic") -> list[int]:
        """Scripted jobs of one `dbt build` each; returns their ids."""
        with self.lock:
            first = max(self.jobs) + 1
            for number in range(first, first + count):
                behaviour = DbtJobBehaviour(duration=duration)
                self.jobs[number] = Job(number, f"{prefix}-{number}", ["dbt build"], behaviour)
        return list(range(first, first + count))

    def run(self, run_id: int) -> Run:
        """A run, brought up to this moment.

        Raises:
            KeyError: there is none.
        """
        with self.lock:
            run = self.runs[run_id]
            self._advance(run.job)
            return run

    def runs_of(self, key: int | str) -> list[Run]:
        """The runs of a job, oldest first."""
        with self.lock:
            job = self.job(key)
            self._advance(job)
            return list(job.runs)

    def all_runs(self) -> list[Run]:
        """Every run, oldest first."""
        with self.lock:
            for job in self.jobs.values():
                self._advance(job)
            return list(self.runs.values())

    def trigger(self, key: int | str, cause: str = "Triggered in the sandbox", **overrides: Any) -> Run:
        """Start a run; while another of the job goes on, it is queued behind it.

        Raises:
            KeyError: no such job, or it is deleted.
        """
        job = self.job(key)
        if job.deleted:
            raise KeyError(key)
        return self._begin(job, cause, overrides)

    def retry(self, run: Run) -> Run:
        """Start a run from the point at which another failed; what was overridden for that one is not.

        Raises:
            NotRetriable: With dbt Cloud's reason.
        """
        if reason := run.why_no_retry():
            raise NotRetriable(reason)
        return self._begin(run.job, f"Retry of run {run.run_id}", {}, retrying=run)

    def cancel(self, run: Run) -> bool:
        """Stop a run; it goes on for a moment. False if it has ended."""
        with self.lock:
            if run.final:
                return False
            if run.timeline is None:
                run.timeline = Timeline((), CANCELLED)
            elif run.cancel_at is None:
                run.cancel_at = time.monotonic() + run.behaviour.cancel_seconds
            if run.work is not None:
                run.work.cancelled.set()
            return True

    def finish_run(self, run_id: int, status: Literal[10, 20, 30]) -> None:
        """End a run at once, as if the vendor had."""
        run = self.run(run_id)
        if run.timeline is None:
            run.timeline = Timeline((), str(status))
        run.timeline.finish(str(status))

    def stop(self) -> None:
        """Tell all running dbt processes to give up, and give them a moment to do so."""
        self._workers.stop(STOP_WITHIN)

    def _cancel_work(self) -> None:
        self._stopping.set()
        with self.lock:
            for run in self.runs.values():
                if run.work is not None:
                    run.work.cancelled.set()

    def _begin(self, job: Job, cause: str, overrides: dict[str, Any], retrying: Run | None = None) -> Run:
        with self.lock:
            self._advance(job)
            behaviour = job.behaviour
            if behaviour.outcome != "succeed" and behaviour.times is not None:
                job.behaviour = behaviour.used_once()
            commands = list(overrides.get("steps_override") or job.execute_steps)
            docs = overrides.get("generate_docs_override", job.generate_docs)
            steps = plan_steps(commands, behaviour, docs=docs, retrying=retrying.steps if retrying else None)
            run = Run(
                run_id=self.next_run,
                job=job,
                cause=cause,
                overrides=overrides,
                behaviour=behaviour,
                steps=steps,
                retrying=retrying,
                work=Work() if behaviour.real else None,
            )
            self.next_run += 1
            self.runs[run.run_id] = run
            job.runs.append(run)
            self._advance(job)
        if run.work is not None:
            self._workers.start(f"sandbox-dbt-{run.run_id}", self._work, run, run.work)
        return run

    def _advance(self, job: Job) -> None:
        """Let the next run out of the queue at the moment at which the one before it ended."""
        free_at = 0.0
        for run in job.runs:
            if run.timeline is None:
                begun = max(run.created, free_at)
                run.timeline = _course(run, begun)
            ended = run.ended
            if ended is None:
                return
            free_at = ended

    def _work(self, run: Run, work: Work) -> None:
        """Run dbt once the run is out of the queue."""
        while self.run(run.run_id).timeline is None:
            if self._stopping.wait(0.02):
                return
        before = run.retrying.failed_step if run.retrying else None
        try:
            if not work.cancelled.is_set():
                folder = self.warehouse.path.parent / "dbt-cloud" / str(run.run_id)
                work.error = really_run(
                    run.steps,
                    self.warehouse,
                    work.cancelled,
                    folder=folder,
                    threads=run.overrides.get("threads_override"),
                    state=before.folder if before else None,
                )
        finally:
            work.done_at = time.monotonic()


def _course(run: Run, begun: float) -> Timeline:
    """The timeline of a run that leaves the queue now, or left it a while ago."""
    behaviour = run.behaviour
    running: list[Phase] = [Phase(RUNNING, behaviour.duration * 0.9)]
    if behaviour.outcome == "stuck":
        running = [Phase(RUNNING, FOREVER)]
    elif behaviour.outcome == "unknown_word":
        shown = FOREVER if behaviour.word_seconds is None else behaviour.word_seconds
        running = [Phase(RUNNING, behaviour.duration * 0.5), Phase(behaviour.word, shown)]
    phases = (
        Phase(QUEUED, behaviour.queued_seconds + behaviour.duration * 0.05),
        Phase(STARTING, behaviour.duration * 0.05),
        *running,
    )
    end = {"cancel": CANCELLED}.get(behaviour.outcome, ERROR if run.failed_step else SUCCESS)
    return Timeline(
        phases, end, failed_word=ERROR, work=run.work, started=begun, started_wall=run.wall(begun)
    )


def latest_artifact(job: Job, path: str) -> bytes | None:
    """A file of the job's latest run that left one."""
    found = (run.artifacts().get(path) for run in reversed(job.runs) if run.visible)
    return next((content for content in found if content is not None), None)
