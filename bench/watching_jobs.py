"""What `bench.watching` runs in a process of its own: a sandbox with jobs, and one watcher over them all."""

from __future__ import annotations

import asyncio
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from bench.measured import report
from blocks import AirbyteServer, CensusCredentials, FivetranCredentials, HightouchCredentials
from sandbox import Sandbox, catalog
from tasks.airbyte_jobs import AirbyteVendor
from tasks.census import CensusVendor
from tasks.dbt_cloud_runs import DbtCloudVendor
from tasks.fivetran_jobs import Before, FivetranVendor
from tasks.hightouch_jobs import HightouchVendor
from tasks.jobs import JobHandle, JobPolicy, JobState, JobVendor, watcher_for

EACH_SECOND = JobPolicy(poll=1.0, poll_cap=1.0)
Begun = tuple[JobVendor[Any], list[JobHandle]]


def _handle(vendor: JobVendor[Any], resource: object, job: object) -> JobHandle:
    now = datetime.now(UTC)
    return JobHandle(vendor=vendor.name, resource_id=str(resource), job_id=str(job), started_at=now)


def _airbyte(kind: Any) -> Callable[[Sandbox, int, float], Begun]:
    def begin(sandbox: Sandbox, jobs: int, seconds: float) -> Begun:
        server = AirbyteServer(
            base_url=sandbox.url,
            api=kind,
            client_id=catalog.CLIENT_ID,
            client_secret=SecretStr(catalog.CLIENT_SECRET),
            workspace_ids=[catalog.WORKSPACE_ID],
        )
        vendor, airbyte = AirbyteVendor(server), sandbox.airbyte
        ids = airbyte.add_connections(jobs, duration=seconds)
        return vendor, [_handle(vendor, each, airbyte.start(each, "sync").job_id) for each in ids]

    return begin


def _fivetran(sandbox: Sandbox, jobs: int, seconds: float) -> Begun:
    credentials = FivetranCredentials(
        api_key=catalog.FIVETRAN_API_KEY,
        api_secret=SecretStr(catalog.FIVETRAN_API_SECRET),
        base_url=sandbox.fivetran_url,
    )
    vendor, fivetran = FivetranVendor(credentials), sandbox.fivetran
    fivetran.connections.clear()  # those of the stage would be a second page
    handles: list[JobHandle] = []
    for each in fivetran.add_connections(jobs, duration=seconds):
        now = datetime.now(UTC)
        handles.append(vendor.handle(each, Before(at=now, asked=now, state="scheduled")))
        fivetran.trigger(each)
    return vendor, handles


def _dbt_cloud(sandbox: Sandbox, jobs: int, seconds: float) -> Begun:
    from prefect_dbt.cloud import DbtCloudCredentials  # of all tools only this one needs it

    credentials = DbtCloudCredentials(
        api_key=SecretStr(catalog.DBT_CLOUD_TOKEN),
        account_id=catalog.DBT_CLOUD_ACCOUNT_ID,
        domain=sandbox.dbt_cloud_url,
    )
    vendor, cloud = DbtCloudVendor(credentials), sandbox.dbt_cloud
    ids = cloud.add_jobs(jobs, duration=seconds)
    return vendor, [_handle(vendor, each, cloud.trigger(each).run_id) for each in ids]


def _hightouch(sandbox: Sandbox, jobs: int, seconds: float) -> Begun:
    credentials = HightouchCredentials(
        api_key=SecretStr(catalog.HIGHTOUCH_API_KEY), base_url=sandbox.hightouch_url
    )
    vendor, hightouch = HightouchVendor(credentials), sandbox.hightouch
    hightouch.syncs.clear()  # those of the stage would be another page
    ids = hightouch.add_syncs(jobs, duration=seconds)
    return vendor, [_handle(vendor, each, hightouch.trigger(each).run_id) for each in ids]


def _census(sandbox: Sandbox, jobs: int, seconds: float) -> Begun:
    credentials = CensusCredentials(api_key=SecretStr(catalog.CENSUS_API_KEY), base_url=sandbox.census_url)
    vendor, census = CensusVendor(credentials), sandbox.census
    ids = census.add_syncs(jobs, duration=seconds)
    return vendor, [_handle(vendor, each, census.trigger(each).run_id) for each in ids]


BEGIN: Mapping[str, Callable[[Sandbox, int, float], Begun]] = {
    "airbyte": _airbyte("public"),
    "airbyte-config": _airbyte("config"),
    "fivetran": _fivetran,
    "dbt-cloud": _dbt_cloud,
    "hightouch": _hightouch,
    "census": _census,
}


async def watch(vendor: JobVendor[Any], handles: Sequence[JobHandle]) -> tuple[int, int]:
    """Watch all jobs to their ends: how many succeeded, and how many looks it took."""
    looks = 0
    observe = vendor.observe

    async def counted(some: Sequence[JobHandle]) -> Any:
        nonlocal looks
        looks += 1
        return await observe(some)

    vendor.observe = counted  # type: ignore[method-assign, assignment]
    async with vendor.session():
        watcher = await watcher_for(vendor)
        ends = await asyncio.gather(*(watcher.wait(handle, EACH_SECOND) for handle in handles))
    return sum(end.state is JobState.SUCCEEDED for end in ends), looks


def work(order: dict[str, Any]) -> tuple[float, dict[str, Any]]:
    """Begin the jobs at the tool itself, so that only the watching is counted."""
    with Sandbox(Path(order["state"]) / order["tool"], job_seconds=order["seconds"]) as sandbox:
        vendor, handles = BEGIN[order["tool"]](sandbox, order["jobs"], order["seconds"])
        began = time.perf_counter()
        succeeded, looks = asyncio.run(watch(vendor, handles))
        wall = time.perf_counter() - began
        kinds = Counter(_kind(each.method, each.path) for each in sandbox.requests.find())
    return wall, {"succeeded": succeeded, "looks": looks, "requests": dict(kinds.most_common())}


def _kind(method: str, path: str) -> str:
    """A request without what differs from job to job."""
    parts = [part for part in path.split("/") if part and not re.search(r"\d", part)]
    return f"{method} …/{'/'.join(parts[-2:])}"


if __name__ == "__main__":
    report(work)
