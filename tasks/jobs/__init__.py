"""What every vendor's job has in common: model, engine, watcher, journal and task runner."""

from tasks.jobs.attempt import attempt_of
from tasks.jobs.engine import run_job, wait_for_job
from tasks.jobs.journal import Entry, Journal, MemoryJournal, RunJournal, read_entries
from tasks.jobs.model import (
    AlreadyRunning,
    InputError,
    Intent,
    JobCancelled,
    JobError,
    JobFailed,
    JobHandle,
    JobPolicy,
    JobRequest,
    JobResult,
    JobState,
    JobStatus,
    JobTimeout,
    JobVendor,
    StreamResult,
)
from tasks.jobs.outcome import Cancellation, cancel_job, result_of
from tasks.jobs.quiet import without_parameters, without_traceback
from tasks.jobs.runner import EventLoopTaskRunner, at_loop_exit, current_interrupt, limit_concurrency
from tasks.jobs.slots import check_limit
from tasks.jobs.sweep import Sweep
from tasks.jobs.tags import tag_run
from tasks.jobs.tool import Checked, Parameters, Request, Tool, ToolParameters, refuse_twice
from tasks.jobs.vendor import AccountVendor, PlainRequest
from tasks.jobs.watcher import JobWatcher, watcher_for

__all__ = [
    "AccountVendor",
    "AlreadyRunning",
    "Cancellation",
    "Checked",
    "Entry",
    "EventLoopTaskRunner",
    "InputError",
    "Intent",
    "JobCancelled",
    "JobError",
    "JobFailed",
    "JobHandle",
    "JobPolicy",
    "JobRequest",
    "JobResult",
    "JobState",
    "JobStatus",
    "JobTimeout",
    "JobVendor",
    "JobWatcher",
    "Journal",
    "MemoryJournal",
    "Parameters",
    "PlainRequest",
    "Request",
    "RunJournal",
    "StreamResult",
    "Sweep",
    "Tool",
    "ToolParameters",
    "at_loop_exit",
    "attempt_of",
    "cancel_job",
    "check_limit",
    "current_interrupt",
    "limit_concurrency",
    "read_entries",
    "refuse_twice",
    "result_of",
    "run_job",
    "tag_run",
    "wait_for_job",
    "watcher_for",
    "without_parameters",
    "without_traceback",
]
