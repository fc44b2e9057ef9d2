"""The data interval of a run that a schedule has started: from the date before its own to its own.

Both are dates of the schedule, whenever the run really starts: one that is late, was enqueued or is retried
has the same interval. So that it keeps it when the schedule is changed meanwhile, it is kept with the run, as
the artifact `data-interval`, where it can be seen too.
"""

from __future__ import annotations

import re
from uuid import UUID

from prefect import task
from prefect.artifacts import acreate_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId, ArtifactFilterKey
from prefect.client.schemas.objects import DeploymentSchedule, FlowRun
from prefect.logging import get_run_logger
from prefect.runtime import flow_run
from pydantic import TypeAdapter

from tasks.intervals import DataInterval, Schedule, previous_date
from tasks.jobs import attempt_of

ARTIFACT_KEY = "data-interval"
_SCHEDULE: TypeAdapter[Schedule] = TypeAdapter(Schedule)


@task(name="data interval", task_run_name="look up the data interval", cache_policy=NO_CACHE)
async def scheduled_interval() -> DataInterval | None:
    """The interval of this flow run by the schedule of its deployment.

    Returns:
        None for a run that no schedule has started, and for the first date of a schedule.
    """
    logger = get_run_logger()
    if not flow_run.id:
        return None
    async with get_client() as client:
        run = await client.read_flow_run(UUID(flow_run.id))
        kept = await _kept(client, run) if attempt_of(run) > 1 else None
        interval = kept or await _by_schedule(client, run)
    if interval is None:
        logger.info("No schedule has started this run, so it has no data interval.")
        return None
    if kept is None:
        await acreate_markdown_artifact(_text(interval), key=ARTIFACT_KEY, description=interval.label)
    logger.info("Data interval: %s", interval.label)
    return interval


async def _by_schedule(client: PrefectClient, run: FlowRun) -> DataInterval | None:
    maker = run.created_by
    if maker is None or maker.type != "SCHEDULE" or not run.deployment_id or not run.expected_start_time:
        return None
    schedules = await client.read_deployment_schedules(run.deployment_id)
    of_run = [each for each in schedules if each.id == maker.id]
    # A deploy makes schedules without a slug anew, under other ids.
    of_run = of_run or [each for each in schedules if each.slug and each.slug == maker.display_value]
    of_run = of_run or schedules
    if len(of_run) != 1:
        get_run_logger().warning(
            "The schedule that has started this run is not there any more, so its data interval is not known."
        )
        return None
    return await _ending(of_run[0], run)


async def _ending(of_run: DeploymentSchedule, run: FlowRun) -> DataInterval | None:
    # The client's own classes tell no dates, the server's do; they are the same else.
    schedule = _SCHEDULE.validate_python(of_run.schedule.model_dump())
    # Never changed after the run was made, whatever happens to it; `state_details.scheduled_time` is.
    date = run.expected_start_time
    before = await previous_date(schedule, date) if date else None
    if date is None or before is None:
        return None
    return DataInterval(start=before, end=date.astimezone(before.tzinfo))


async def _kept(client: PrefectClient, run: FlowRun) -> DataInterval | None:
    found = await client.read_artifacts(
        artifact_filter=ArtifactFilter(
            key=ArtifactFilterKey(any_=[ARTIFACT_KEY]), flow_run_id=ArtifactFilterFlowRunId(any_=[run.id])
        ),
        limit=1,
    )
    ends = re.findall(r"`(\S+)`", str(found[0].data)) if found else []
    return DataInterval.model_validate({"start": ends[0], "end": ends[1]}) if len(ends) == 2 else None


def _text(interval: DataInterval) -> str:
    start, end = interval.vars.values()
    return f"From `{start}` to `{end}`, which is not in it any more."
