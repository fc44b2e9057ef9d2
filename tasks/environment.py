"""Which environment a run belongs to, and what that changes in the deployments that events start."""

from __future__ import annotations

import os

from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.objects import FlowRun
from prefect.exceptions import ObjectNotFound
from pydantic import BaseModel, ConfigDict, JsonValue

PREFIX_VARIABLE = "ELT_PREFIX"
"""Environment variable that tells a run what stands before the names of its environment's deployments."""

TRIGGERS_VARIABLE = "ELT_TRIGGERS"
"""Environment variable that tells a run the rest of `Here`, as JSON; not there where nothing is different."""


class Here(BaseModel):
    """What is different in an environment for those who start its deployments; see environments.yaml.

    Attributes:
        prefix: Stands before the names of deployments and triggers.
        triggers: Whether events start anything.
        without: Deployments, by their names in the files, that are not there.
        blocks: Names of blocks in the files, to those that are used in their place.
        parameters: Values in place of those in the files, wherever there is such a parameter.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    prefix: str = ""
    triggers: bool = True
    without: tuple[str, ...] = ()
    blocks: dict[str, str] = {}
    parameters: dict[str, JsonValue] = {}

    @property
    def variables(self) -> dict[str, str]:
        """The environment variables by which a run knows of it."""
        rest = self.model_dump_json(exclude={"prefix"}, exclude_defaults=True)
        prefix = {PREFIX_VARIABLE: self.prefix} if self.prefix else {}
        return prefix if rest == "{}" else {**prefix, TRIGGERS_VARIABLE: rest}

    def instead(self, parameters: dict[str, JsonValue]) -> dict[str, JsonValue]:
        """The same parameters, with the environment's own values."""
        return {name: self.parameters.get(name, value) for name, value in parameters.items()}


def here() -> Here:
    """What `make deploy` has told this run of its environment; nothing differs where it has told nothing.

    Raises:
        ValidationError: The environment variable does not hold what `make deploy` puts there.
    """
    rest = Here.model_validate_json(os.environ.get(TRIGGERS_VARIABLE) or "{}")
    return rest.model_copy(update={"prefix": prefix_here()})


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
