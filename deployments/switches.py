"""Triggers that are switched off, remembered while `prefect deploy` makes them anew.

It deletes the automations of a deployment and creates them again. Killed between the two, nothing on the
server would say any more that an operator had switched one off, and the next deploy would switch it on. So
what is off is written down before, in a Variable of each such deployment, and taken away when all is done.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.actions import VariableCreate, VariableUpdate
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound
from pydantic import BaseModel, ValidationError

from deployments.entries import Entry

TAG = "elt-deploy"


class _Off(BaseModel):
    deployment: str
    triggers: list[str]


async def remembered(client: PrefectClient, deployment: str) -> list[str]:
    """The triggers that were off when a deploy of this deployment was broken off; none if none was.

    Args:
        client: Of the server.
        deployment: Its full name.
    """
    variable = await client.read_variable_by_name(_name(deployment))
    if variable is None:
        return []
    try:
        return _Off.model_validate(variable.value).triggers
    except ValidationError:  # somebody's own
        return []


async def remember(client: PrefectClient, entries: Sequence[Entry]) -> None:
    """Write down which triggers of these deployments are to be off."""
    for entry in entries:
        off = [str(one["name"]) for one in entry.triggers if not one.get("enabled", True)]
        if not off:
            continue
        name, value = _name(entry.full_name), _Off(deployment=entry.full_name, triggers=off).model_dump()
        try:
            await client.create_variable(VariableCreate(name=name, value=value, tags=[TAG]))
        except ObjectAlreadyExists:
            await client.update_variable(VariableUpdate(name=name, value=value))


async def forget(client: PrefectClient, entries: Sequence[Entry]) -> None:
    """The triggers of these deployments are there again, on or off."""
    for entry in entries:
        if not entry.triggers:
            continue
        try:
            await client.delete_variable_by_name(_name(entry.full_name))
        except ObjectNotFound:
            continue


def _name(deployment: str) -> str:
    return f"elt-triggers-off-{hashlib.sha256(deployment.encode()).hexdigest()[:16]}"
