"""Every tool that flows know. A new vendor is one line here and one in `flows/parameters.py`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

from prefect import Task

from tasks import airbyte, census, dbt_cloud, dbt_core, fivetran, hightouch, http_job
from tasks.dbt.model import DbtPlan, DbtResult
from tasks.jobs import JobVendor, Tool


@dataclass(frozen=True)
class Transform:
    """A tool that builds models.

    Attributes:
        name: The `tool` of its parameters.
        plan: A task that tells what would be built, before anything is started.
        build: A task that builds, without what is given as excluded.
        vendor: As of a `Tool`, where it builds by a remote job; None where it builds here.
    """

    name: str
    plan: Task[[Any], Coroutine[Any, Any, DbtPlan]]
    build: Task[[Any, Sequence[str]], Coroutine[Any, Any, DbtResult]]
    vendor: Callable[[str], Awaitable[JobVendor[Any]]] | None = None


TOOLS: dict[str, Tool] = {
    word: tool
    for tool in (
        airbyte.TOOL,
        census.TOOL,
        fivetran.TOOL,
        hightouch.TOOL,
        hightouch.SEQUENCE_TOOL,
        http_job.TOOL,
    )
    for word in (tool.name, *tool.selections)
}
"""The tools whose jobs a flow runs, by what is written as `tool`."""

TRANSFORMS: dict[str, Transform] = {
    transform.name: transform
    for transform in (
        Transform("dbt-core", dbt_core.dbt_plan, dbt_core.dbt_build),
        Transform(
            "dbt-cloud", dbt_cloud.dbt_cloud_plan, dbt_cloud.dbt_cloud_build, dbt_cloud.dbt_cloud_vendor
        ),
    )
}
"""The tools that build models, by name."""

VENDORS: dict[str, Callable[[str], Awaitable[JobVendor[Any]]]] = {
    **{tool.name: tool.vendor for tool in TOOLS.values()},
    **{transform.name: transform.vendor for transform in TRANSFORMS.values() if transform.vendor},
}
"""How a vendor is made from the name of a saved block, by the vendor's name in the journal."""
