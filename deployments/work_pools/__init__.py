"""Work pools: the workers' own templates with what this project needs over them.

A base job template is some hundred lines, most of them Prefect's, and changes with the worker's version. So
only the differences are kept here, one file per type: new defaults and new variables, and what is added to
the job's configuration. `make deploy` makes the pools of environments.yaml that a deployment runs in;
`python -m deployments.work_pools <type>` shows a template whole.
"""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
from prefect.exceptions import ObjectNotFound
from prefect.workers.base import BaseWorker
from pydantic import BaseModel, ConfigDict

from deployments.environments import DeployError, WorkPoolSettings, load_yaml, parse

_EXTRAS = {"docker": "docker", "kubernetes": "kubernetes"}


class Overlay(BaseModel):
    """What is different from the worker's own template.

    Attributes:
        variables: For each job variable what is new in its JSON schema, or the whole of a new one's.
        job_configuration: What is added to the job's configuration; lists are joined item by item.
    """

    model_config = ConfigDict(extra="forbid")

    variables: dict[str, dict[str, Any]] = {}
    job_configuration: dict[str, Any] = {}


def base_job_template(settings: WorkPoolSettings) -> dict[str, Any]:
    """The template of a pool.

    Raises:
        DeployError: The worker's package is not installed, or a variable is none of the template's.
    """
    worker = BaseWorker.get_worker_class_from_type(settings.type)
    if worker is None:
        extra = _EXTRAS.get(settings.type, "dev")
        raise DeployError(
            f"a {settings.type} work pool needs its worker: pip install '.[{extra}]' in the checkout of "
            "elt-flows"
        )
    file = Path(__file__).with_name(f"{settings.type}.yaml")
    overlay = parse(Overlay, load_yaml(file), file)
    template: dict[str, Any] = deepcopy(worker.get_default_base_job_template())
    variables = template["variables"]["properties"]
    for name, schema in overlay.variables.items():
        variables[name] = {**variables.get(name, {}), **schema}
    for name, value in settings.variables.items():
        if name not in variables:
            known = ", ".join(sorted(variables))
            raise DeployError(f"a {settings.type} work pool has no variable {name}; it has {known}")
        default = variables[name].get("default")
        both = isinstance(default, dict) and isinstance(value, dict)
        variables[name]["default"] = {**default, **value} if both else value
    template["job_configuration"] = _joined(template["job_configuration"], overlay.job_configuration)
    return template


def _joined(base: Any, over: Any) -> Any:
    if isinstance(base, dict) and isinstance(over, dict):
        return {**base, **{key: _joined(base.get(key), value) for key, value in over.items()}}
    if isinstance(base, list) and isinstance(over, list):
        pairs = [_joined(one, other) for one, other in zip(base, over, strict=False)]
        return [*pairs, *base[len(pairs) :], *over[len(pairs) :]]
    return over


async def pool_differs(client: PrefectClient, name: str, settings: WorkPoolSettings) -> str | None:
    """What is to be done so that the pool is there as it should be; None if nothing is.

    Whether it is paused and how many runs it takes at a time is the operator's.

    Raises:
        DeployError: It is there with another type, which can't be changed.
    """
    try:
        there = await client.read_work_pool(name)
    except ObjectNotFound:
        return "new"
    if there.type != settings.type:
        raise DeployError(
            f"the work pool {name} is of type {there.type}, not {settings.type}: delete it, or name another"
        )
    if there.base_job_template != base_job_template(settings):
        return "template"
    if there.description != settings.description:
        return "description"
    return None


async def put_pool(client: PrefectClient, name: str, settings: WorkPoolSettings) -> None:
    """Make the pool, or give it the template and the description that it should have."""
    template = base_job_template(settings)
    try:
        await client.read_work_pool(name)
    except ObjectNotFound:
        await client.create_work_pool(
            WorkPoolCreate(
                name=name, type=settings.type, description=settings.description, base_job_template=template
            )
        )
    else:
        update = WorkPoolUpdate(description=settings.description, base_job_template=template)
        await client.update_work_pool(name, update)
