"""Jobs of any tool with a job API, as a saved `HttpJob` block declares them: run one and wait for its end."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.runtime import task_run
from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    StrictBool,
    StrictFloat,
    StrictInt,
    WithJsonSchema,
    field_serializer,
)

from blocks.http import NotFoundError
from blocks.http_job import HttpJob, resource_id
from blocks.http_job_fill import Value
from blocks.http_job_parts import Reading
from blocks.reference import NAMED, load_block, stored_block
from tasks.http_job_vendor import HttpJobVendor, job_name
from tasks.jobs import (
    Checked,
    InputError,
    JobPolicy,
    JobResult,
    PlainRequest,
    Tool,
    ToolParameters,
    refuse_twice,
    run_job,
    tag_run,
    without_traceback,
)

JobRef = Annotated[
    HttpJob | str,
    NAMED,
    # In a form and in a deployment it is the name; instances are for scripts.
    WithJsonSchema({"type": "string", "description": "Name of a saved HTTP Job block."}),
]


class HttpJobRun(ToolParameters):
    """A run of a declared job, as a flow takes it."""

    tool: Literal["http-job"] = "http-job"
    job: JobRef = Field(title="Job")
    arguments: dict[str, StrictBool | StrictInt | StrictFloat | str] = Field(
        default={}, title="Arguments", description="The job's parameters. No place for a secret."
    )
    name: str = Field(default="", title="Name", description="For people.")
    owner: str | None = Field(default=None, title="Owner", description="Who is told of a failure.")
    policy: JobPolicy = Field(default_factory=JobPolicy, title="Policy")

    @field_serializer("job", mode="wrap")
    def _by_name(self, job: HttpJob | str, handler: SerializerFunctionWrapHandler) -> Any:
        # What is stored with a flow run must work in a retry of it, and hold no secret.
        return stored_block(job, HttpJob, handler)

    @property
    def resource_id(self) -> str:
        """The job with its arguments, as in `meta.http_job` of a dbt project: `name?argument=value`."""
        return resource_id(job_name(self.job), self.arguments)

    @property
    def label(self) -> str:
        """What a person calls it."""
        return self.name or self.resource_id


def _readings(job: HttpJob) -> list[Reading]:
    return [part.read for part in (job.poll, job.listing) if part and part.read]


def _arguments(run: HttpJobRun, job: HttpJob) -> dict[str, Value]:
    try:
        return job.arguments(run.arguments)
    except ValueError as error:
        raise InputError(f"{job.service} ({job_name(run.job)}): {error} Nothing was started.") from None


def _refuse_uncounted(run: HttpJobRun, job: HttpJob) -> None:
    told = any(reading.rows_rejected for reading in _readings(job))
    if run.policy.max_rows_rejected is not None and not told:
        raise InputError(
            f"{job.service} ({job_name(run.job)}): the declaration does not say where `rows_rejected` is, so "
            "that max_rows_rejected can't be checked. Nothing was started."
        )


async def _look_up(run: HttpJobRun, job: HttpJob) -> Checked[HttpJobRun]:
    arguments = _arguments(run, job)
    _refuse_uncounted(run, job)
    async with job.api() as api:
        try:
            values, problem = await api.look_up(job, run.resource_id, arguments, fresh=True)
        except NotFoundError as error:
            raise InputError(
                f"{job.service} knows nothing at {error.path} ({run.label}), or these credentials may not "
                "see it. Nothing was started."
            ) from error
    named = run.model_copy(
        update={
            "name": run.name or str(values.get("name") or ""),
            "owner": run.owner or (str(values["owner"]) if values.get("owner") else None),
        }
    )
    if problem:
        problem = f"{job.service}: {named.label} can't be started: {problem}. Nothing was started for it."
    counts_rows = any(reading.rows for reading in _readings(job))
    return Checked(named, problem=problem, counts_rows=counts_rows)


@task(name="http-job-check", task_run_name="check HTTP jobs", tags=["http-job"], cache_policy=NO_CACHE)
async def http_job_check(runs: list[HttpJobRun]) -> list[Checked[HttpJobRun]]:
    """Check the declared jobs of a chain before anything is started: arguments, and what they look up.

    Args:
        runs: The jobs.

    Returns:
        The same with names and owners filled in, where a lookup gives them.

    Raises:
        InputError: An argument is missing or wrong, a lookup finds nothing, or a job is named twice. Nothing
            was started.
        BlockNotFound: A job is the name of a block that is not saved.
        VendorError: The API can't be reached or refuses the credentials.
    """
    without_traceback()
    jobs = [(run, await load_block(HttpJob, run.job)) for run in runs]
    refuse_twice("The HTTP job", ((job.declaration, run.resource_id) for run, job in jobs))
    return [await _look_up(run, job) for run, job in jobs]


def _run_name() -> str:
    run = task_run.get_parameters().get("run")
    return f"run {run.label if isinstance(run, HttpJobRun) else ''}"


@task(name="http-job", task_run_name=_run_name, cache_policy=NO_CACHE)
async def http_job(run: HttpJobRun) -> JobResult:
    """Run one job of a tool that a saved block declares, and wait for its end.

    Safe to retry: a retry attaches to the job that an earlier attempt started, and one that succeeded is not
    started again. A start whose reply was lost is looked for as the declaration's `find` says. Where it says
    nothing, the task fails with what to look for rather than start a second job, unless the declaration calls
    the start repeatable.

    Args:
        run: The job, its arguments and its policy (times in seconds).

    Returns:
        What the declaration reads of it: rows, attempts, the duration in seconds, the job's page.

    Raises:
        InputError: An argument is wrong, or there is no such thing to run. Nothing was started.
        JobFailed, JobCancelled, JobTimeout: The job did not end well; `.result` says how.
        VendorError: The API refused, or was out of reach for longer than `policy.outage`.
    """
    tag_run("http-job")
    without_traceback()
    job = await load_block(HttpJob, run.job)
    async with job.api():
        checked = await _look_up(run, job)
        if checked.problem:
            raise InputError(checked.problem)
        named = checked.request
        request = PlainRequest(run.resource_id, "run", named.label, named.owner)
        return await run_job(HttpJobVendor(job), request, run.policy)


async def _vendor(block: str) -> HttpJobVendor:
    return HttpJobVendor(await load_block(HttpJob, block))


TOOL = Tool("http-job", "HTTP job", http_job_check, http_job, _vendor, meta="http_job")
