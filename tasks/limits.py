"""Concurrency limits that jobs name, looked up before anything is started."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from prefect import task
from prefect.cache_policies import NO_CACHE

from tasks.jobs import check_limit


@task(name="check-limits", task_run_name="check concurrency limits", cache_policy=NO_CACHE)
async def check_limits(names: Sequence[str]) -> None:
    """See that every limit is on the Prefect server: a job would start without one that is not.

    Args:
        names: As the policies name them.

    Raises:
        InputError: One is not there, or lets nothing run. Nothing was started.
    """
    await asyncio.gather(*(check_limit(name) for name in names))
