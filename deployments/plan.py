"""What has to be done on a Prefect server so that it has the deployments as the files say.

`prefect deploy` writes every deployment anew each time, deletes its automations and makes them again,
switched on, and lets a schedule run on that is no longer in the file. So we compare first, deploy only what
differs, and hand over as it is what an operator has switched off.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterTags
from prefect.client.schemas.objects import ConcurrencyOptions, DeploymentSchedule
from prefect.client.schemas.responses import DeploymentResponse
from prefect.events import DeploymentTriggerTypes
from prefect.events.schemas.automations import Automation, AutomationCore
from prefect.exceptions import ObjectNotFound
from prefect.utilities.callables import parameter_schema
from prefect.utilities.templating import (
    apply_values,
    resolve_block_document_references,
    resolve_variables,
)
from pydantic import TypeAdapter

from deployments.checks import as_prefect_has_it
from deployments.entries import TRIGGER_MARK, ConcurrencyLimit, Entry
from deployments.environments import Environment
from deployments.switches import remembered

_TRIGGER: TypeAdapter[Any] = TypeAdapter(DeploymentTriggerTypes)
_TEMPLATED = {"description", "tags", "parameters", "work_pool", "version"}
_PAGE = 200


@dataclass(frozen=True)
class Change:
    """A deployment that is not on the server as it is in the files.

    Attributes:
        entry: As it is to be deployed: what an operator has switched off is off in it.
        new: Whether it is not there at all.
        differs: What is different, in words.
    """

    entry: Entry
    new: bool
    differs: tuple[str, ...] = ()


@dataclass
class DeploymentPlan:
    """What is to be done with deployments.

    Attributes:
        changes: What is to be deployed.
        same: The names of those that are as in the files.
        gone: Those that were put there by us and are in no file any more, by name.
    """

    changes: list[Change] = field(default_factory=list)
    same: list[str] = field(default_factory=list)
    gone: dict[str, UUID] = field(default_factory=dict)


async def plan_deployments(
    client: PrefectClient, entries: Sequence[Entry], environment: Environment
) -> DeploymentPlan:
    """Compare; nothing is changed.

    Args:
        client: Of the server.
        entries: As they are in the environment, with nothing wrong in them.
        environment: What is switched off at first there, and by which mark its deployments are known.
    """
    plan = DeploymentPlan()
    for entry in entries:
        try:
            there = await client.read_deployment_by_name(entry.full_name)
        except ObjectNotFound:
            plan.changes.append(Change(_switched(entry, environment, {}, {}), new=True))
            continue
        automations = await our_automations(client, there.id, entry)
        differs = await _differences(client, entry, there, automations)
        if not differs:
            plan.same.append(entry.full_name)
            continue
        ready = _switched(
            entry,
            environment,
            {schedule.slug: schedule.active for schedule in there.schedules if schedule.slug},
            {
                **dict.fromkeys(await remembered(client, entry.full_name), False),
                **{automation.name: automation.enabled for automation in automations},
            },
        )
        if entry.paused is None:
            ready = ready.model_copy(update={"paused": there.paused})
        plan.changes.append(Change(ready, new=False, differs=tuple(differs)))
    wanted = {entry.full_name for entry in entries}
    marked = await marked_deployments(client, environment)
    plan.gone = {name: id_ for name, id_ in marked.items() if name not in wanted}
    return plan


async def marked_deployments(client: PrefectClient, environment: Environment) -> dict[str, UUID]:
    """Every deployment that was put there for this environment, by its full name."""
    marked = DeploymentFilter(tags=DeploymentFilterTags(all_=[environment.tag]))
    found: list[DeploymentResponse] = []
    while True:
        page = await client.read_deployments(deployment_filter=marked, limit=_PAGE, offset=len(found))
        found += page
        if len(page) < _PAGE:
            break
    flows = {one.flow_id for one in found}
    names = {flow: (await client.read_flow(flow)).name for flow in flows}
    return {f"{names[one.flow_id]}/{one.name}": one.id for one in found}


async def our_automations(client: PrefectClient, deployment: UUID, entry: Entry) -> list[Automation]:
    """The automations that were made of a deployment's triggers.

    Those that somebody else has made to start it are not among them. A server does not say whose one is, so
    it is known by its name or, if it is in no file any more, by the mark that we put into its description.
    """
    names = {trigger["name"] for trigger in entry.triggers}
    related = await client.read_resource_related_automations(f"prefect.deployment.{deployment}")
    return [one for one in related if one.name in names or (one.description or "").endswith(TRIGGER_MARK)]


def _switched(
    entry: Entry, environment: Environment, schedules: dict[str, bool], triggers: dict[str, bool]
) -> Entry:
    """The deployment with its schedules and triggers on or off, as they are there or begin to be.

    What the file itself switches off is off; else what is there stays as somebody has set it; what is new is
    as the environment says.
    """
    return entry.model_copy(
        update={
            "schedules": [
                one.model_copy(
                    update={
                        "active": one.active is not False and schedules.get(one.slug, environment.schedules)
                    }
                )
                for one in entry.schedules
            ],
            "triggers": [
                {
                    **one,
                    "enabled": one.get("enabled", True) and triggers.get(one["name"], environment.triggers),
                }
                for one in entry.triggers
            ],
        }
    )


# -- comparing ----------------------------------------------------------------------------------------------


async def _differences(
    client: PrefectClient, entry: Entry, there: DeploymentResponse, automations: Sequence[Automation]
) -> list[str]:
    """What `prefect deploy` would change, in words and without values: there may be secrets among them."""
    # Templates are filled in by Prefect's own functions, in Prefect's order. As JSON, which is what is sent:
    # YAML reads a date as one.
    spec: Any = entry.model_dump(mode="json", include={*_TEMPLATED, "triggers"})
    spec = await resolve_block_document_references(spec, client=client)
    spec = await resolve_variables(spec, client=client)
    spec = apply_values(spec, dict(os.environ), remove_notset=False)
    triggers = spec.pop("triggers")
    wanted, found = _wanted(entry, apply_values(spec, {}, skip_prefixes=["ctx."])), _found(there)
    differs = [name for name in wanted if wanted[name] != found[name]]
    if _schedules_differ(entry, there.schedules):
        differs.append("schedules")
    if _triggers_differ(triggers, there.id, automations):
        differs.append("triggers")
    return differs


def _wanted(entry: Entry, spec: dict[str, Any]) -> dict[str, Any]:
    flow, pool = entry.flow, spec["work_pool"]
    wanted = {
        "description": spec["description"] or flow.description,
        "tags": sorted(spec["tags"]),
        "entrypoint": entry.entrypoint,
        "version": spec["version"] or flow.version,
        "work pool": pool["name"],
        "work queue": pool.get("work_queue_name") or "default",
        "job variables": _json(pool.get("job_variables") or {}),
        "parameters": _json(spec["parameters"]),
        "parameters' schema": _json(parameter_schema(flow).model_dump(mode="json", exclude_unset=True)),
        "enforcing the schema": entry.enforce_parameter_schema is not False,
        "concurrency limit": _limit(entry.concurrency_limit),
        "pull steps": entry.model_dump(mode="json", include={"pull"})["pull"] or [],
    }
    return wanted if entry.paused is None else {**wanted, "paused": entry.paused}


def _found(there: DeploymentResponse) -> dict[str, Any]:
    limit = there.global_concurrency_limit
    return {
        "description": there.description,
        "tags": sorted(there.tags),
        "entrypoint": there.entrypoint,
        "version": there.version,
        "work pool": there.work_pool_name,
        "work queue": there.work_queue_name,
        "job variables": _json(there.job_variables),
        "parameters": _json(there.parameters),
        "parameters' schema": _json(there.parameter_openapi_schema),
        "enforcing the schema": there.enforce_parameter_schema,
        "concurrency limit": limit and (limit.limit, _options(there.concurrency_options)),
        "pull steps": _json(there.pull_steps or []),
        "paused": there.paused,
    }


def _limit(limit: ConcurrencyLimit | None) -> tuple[int, dict[str, Any]] | None:
    if limit is None:
        return None
    options = limit.model_dump(include={"collision_strategy", "grace_period_seconds"}, exclude_none=True)
    return limit.limit, _options(ConcurrencyOptions.model_validate(options))


def _options(options: ConcurrencyOptions | None) -> dict[str, Any]:
    return _json(options.model_dump(mode="json")) if options else {}


def _schedules_differ(entry: Entry, there: Sequence[DeploymentSchedule]) -> bool:
    found = {schedule.slug or str(schedule.id): schedule for schedule in there}
    if found.keys() != {schedule.slug for schedule in entry.schedules}:
        return True
    for schedule in entry.schedules:
        other = found[schedule.slug]
        # Without an anchor in the file Prefect takes the moment of the first deploy.
        leave_out = {"anchor_date"} if schedule.anchor_date is None else set()
        wanted = as_prefect_has_it(schedule).model_dump(mode="json", exclude=leave_out)
        if wanted != other.schedule.model_dump(mode="json", exclude=leave_out):
            return True
        if schedule.model_dump(mode="json")["parameters"] != _json(other.parameters):
            return True
        if schedule.active is False and other.active:
            return True
    return False


def _triggers_differ(
    triggers: Sequence[dict[str, Any]], deployment: UUID, there: Sequence[Automation]
) -> bool:
    wanted: dict[str, Any] = {}
    for spec in triggers:
        trigger = _TRIGGER.validate_python(spec)
        trigger.set_deployment_id(deployment)
        wanted[trigger.name] = _settings(trigger.as_automation())
        if spec.get("enabled", True) is False and any(a.name == trigger.name and a.enabled for a in there):
            return True
    return len(there) != len(wanted) or wanted != {one.name: _settings(one) for one in there}


def _settings(automation: AutomationCore) -> Any:
    """What is compared of an automation: not whether it is on."""
    fields = {"name", "description", "trigger", "actions"}
    return _in_order(automation.model_dump(mode="json", include=fields))


def _in_order(value: Any) -> Any:
    """Sets become lists of any order in JSON, and Prefect gives the triggers within a trigger ids."""
    if isinstance(value, dict):
        return {key: _in_order(inner) for key, inner in value.items() if key != "id"}
    if isinstance(value, list):
        inner = [_in_order(one) for one in value]
        return sorted(inner) if all(isinstance(one, str) for one in inner) else inner
    return value


def _json(value: Any) -> Any:
    """As it comes back from a server."""
    return json.loads(json.dumps(value, default=str))
