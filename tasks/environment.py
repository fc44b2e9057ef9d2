"""Which environment a run belongs to."""

from __future__ import annotations

import os

from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.objects import FlowRun
from prefect.exceptions import ObjectNotFound

PREFIX_VARIABLE = "ELT_PREFIX"
"""Environment variable that tells a run what stands before the names of its environment's deployments."""


def prefix_here() -> str:
    """What `make deploy` has put before the names of the deployments beside this run's own, such as `dev.`.

    Empty in an environment without a prefix, and in a run that is no deployment's. It can't be told from the
    run's name: a prefix may end with anything, and a name may hold what looks like one.
    """
    return os.environ.get(PREFIX_VARIABLE, "")


async def is_elsewhere(client: PrefectClient, run: FlowRun) -> bool:
    """Whether a flow run is of another environment than the run that asks.

    Automations know flows by name, and environments on one server have the same flows.

    Args:
        client: Prefect's client.
        run: The flow run. One of no deployment is of every environment.
    """
    if run.deployment_id is None:
        return False
    try:
        deployment = await client.read_deployment(run.deployment_id)
    except ObjectNotFound:
        return False
    variables = (deployment.job_variables or {}).get("env") or {}
    return bool((variables.get(PREFIX_VARIABLE) or "") != prefix_here())
