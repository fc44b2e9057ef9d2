"""`make automations`: puts the automations of deployments/automations.yaml on a Prefect server.

Run twice, the second time says that there is nothing to do. An automation is known again by its name and the
tag `elt-flows`, with the environment's prefix. What has changed in the file is changed on the server, in
place. One that an operator has switched off stays off. One that is no longer in the file is offered for
deletion.

With `--env` they are another environment's: they start its deployments, and those by which the server itself
tells are left to the default environment, because they are of the whole server.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect.client.orchestration import PrefectClient, get_client
from prefect.events.filters import AutomationFilter, AutomationFilterTags
from prefect.events.schemas.automations import Automation, AutomationCore
from prefect.exceptions import ObjectNotFound
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from deployments.environments import DeployError, Environment, load_yaml, parse, read_environments

FILE = Path(__file__).with_name("automations.yaml")
TAG = "elt-flows"
"""What marks an automation as one of ours; behind it stands the environment's prefix, if it has one."""

_PAGE = 200


class AutomationsError(Exception):
    """The automations can't be put there; the message says why and what to do. Nothing was changed."""


class Entry(BaseModel):
    """An automation as the file has it."""

    model_config = ConfigDict(extra="forbid")

    name: str
    description: str = ""
    enabled: bool = True
    trigger: dict[str, Any]
    actions: list[dict[str, Any]] = Field(min_length=1)


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid")

    definitions: Any = None
    automations: list[Entry]


@dataclass
class Plan:
    """What is to be done so that a server has what the file says.

    Attributes:
        create: What is not there.
        update: What is there and is different, by its id.
        remove: What is there and no longer in the file.
        off: The names of those that an operator has switched off.
    """

    create: list[AutomationCore] = field(default_factory=list)
    update: dict[UUID, AutomationCore] = field(default_factory=dict)
    remove: list[Automation] = field(default_factory=list)
    off: list[str] = field(default_factory=list)


def read_entries(file: Path = FILE) -> list[Entry]:
    """The automations of a file.

    Raises:
        AutomationsError: It can't be read, or something in it is wrong.
    """
    try:
        entries = parse(_File, load_yaml(file), file).automations
    except DeployError as error:
        raise AutomationsError(str(error)) from None
    names = [entry.name for entry in entries]
    if twice := {name for name in names if names.count(name) > 1}:
        raise AutomationsError(f"{file}: two automations are called {', '.join(sorted(twice))}")
    return entries


def of_environment(entries: Sequence[Entry], here: Environment) -> list[Entry]:
    """The automations of an environment that is not the default: those that start its deployments."""
    return [
        entry.model_copy(update={"name": f"{here.prefix}{entry.name}"})
        for entry in entries
        if all("deployment" in action for action in entry.actions)
    ]


def tag_of(here: Environment | None) -> str:
    """What marks the automations of an environment."""
    return f"{TAG}:{here.prefix}" if here and here.prefix else TAG


async def resolve(
    client: PrefectClient,
    entries: Iterable[Entry],
    here: Environment | None = None,
    notes: list[str] | None = None,
) -> list[AutomationCore]:
    """The automations as this server takes them, with its ids of deployments and blocks.

    Args:
        client: Prefect's client.
        entries: The automations, by the names of the environment.
        here: The environment, whose prefix the deployments have.
        notes: What an operator should know is put here: which block stands in for one that is not saved.

    Raises:
        AutomationsError: A deployment or a block is not there, or an entry is no automation.
    """
    names = _Names(client, here)
    found: list[AutomationCore] = []
    problems: list[str] = []
    for entry in entries:
        actions = [await names.resolved(action) for action in entry.actions]
        try:
            found.append(
                AutomationCore.model_validate(
                    {**entry.model_dump(), "actions": actions, "tags": [tag_of(here)]}
                )
            )
        except ValidationError as error:
            if not names.missing:
                problems.append(f"{entry.name}: {error}")
    if names.missing or problems:
        raise AutomationsError("\n".join([*dict.fromkeys(names.missing), *problems]))
    if notes is not None:
        notes += dict.fromkeys(names.standing_in)
    return found


class _Names:
    """Looks up what the file calls by name."""

    def __init__(self, client: PrefectClient, here: Environment | None) -> None:
        self._client, self._here = client, here
        self._known: dict[tuple[str, str], str | None] = {}
        self.missing: list[str] = []
        self.standing_in: list[str] = []

    async def resolved(self, action: dict[str, Any]) -> dict[str, Any]:
        action = dict(action)
        for key, id_key in (("deployment", "deployment_id"), ("block", "block_document_id")):
            if key in action:
                action[id_key] = await self._id(key, action.pop(key))
        return action

    async def _id(self, key: str, name: str | list[str]) -> str | None:
        """The id; of several names that of the first that is there."""
        names = [self._here_called(key, one) for one in ([name] if isinstance(name, str) else name)]
        for one in names:
            if found := await self._known_id(key, one):
                if one != names[0]:
                    self.standing_in.append(
                        f"There is no {key} {names[0]} on this server, and {one} stands in for it: save it, "
                        "so that what can't be told one way is told another."
                    )
                return found
        how = {
            "deployment": "deploy it first: `make deploy`",
            "block": "save it, or name another one in deployments/automations.yaml",
        }
        self.missing.append(f"There is no {key} {names[-1]} on this server: {how[key]}.")
        return None

    def _here_called(self, key: str, name: str) -> str:
        if self._here and key == "deployment":
            return self._here.deployment_name(name)
        if self._here and key == "block":
            kind, _, block = name.partition("/")
            return f"{kind}/{self._here.blocks.get(name) or self._here.blocks.get(block) or block}"
        return name

    async def _known_id(self, key: str, name: str) -> str | None:
        if (key, name) not in self._known:
            try:
                self._known[key, name] = str(await self._read(key, name))
            except ObjectNotFound:
                self._known[key, name] = None
        return self._known[key, name]

    async def _read(self, key: str, name: str) -> UUID:
        if key == "deployment":
            return (await self._client.read_deployment_by_name(name)).id
        kind, _, block = name.partition("/")
        return (await self._client.read_block_document_by_name(block, kind)).id


async def plan(
    client: PrefectClient, wanted: Sequence[AutomationCore], here: Environment | None = None
) -> Plan:
    """What there is to do in an environment. Nothing is changed."""
    there = {automation.name: automation for automation in await _ours(client, tag_of(here))}
    todo = Plan(remove=[a for name, a in there.items() if name not in {w.name for w in wanted}])
    for automation in wanted:
        old = there.get(automation.name)
        if old is None:
            todo.create.append(automation)
            continue
        if not old.enabled and automation.enabled:
            todo.off.append(automation.name)
        # Whether it is on is the operator's business once it is there.
        new = automation.model_copy(update={"enabled": old.enabled})
        if _settings(new) != _settings(old):
            todo.update[old.id] = new
    return todo


async def apply(client: PrefectClient, todo: Plan) -> None:
    """Create and update; nothing is deleted."""
    for automation in todo.create:
        await client.create_automation(automation)
    for automation_id, automation in todo.update.items():
        # Prefect's client leaves out what was not set, and its server then misses the posture.
        whole = AutomationCore.model_validate(automation.model_dump(exclude={"owner_resource"}))
        await client.update_automation(automation_id, whole)


async def remove(client: PrefectClient, automations: Iterable[Automation]) -> None:
    """Delete automations."""
    for automation in automations:
        await client.delete_automation(automation.id)


async def _ours(client: PrefectClient, tag: str) -> list[Automation]:
    """Every automation of this server with this tag."""
    of_ours = AutomationFilter(tags=AutomationFilterTags(all_=[tag]))
    found: list[Automation] = []
    while True:
        page = await client.read_automations(automations=of_ours, limit=_PAGE, offset=len(found))
        found += page
        if len(page) < _PAGE:
            return found


def _settings(automation: AutomationCore) -> dict[str, Any]:
    """What is compared: sets in order, and without what the server adds."""
    return _sorted(automation.model_dump(exclude={"id", "owner_resource"}))  # type: ignore[no-any-return]


def _sorted(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _sorted(inner) for key, inner in value.items()}
    return [_sorted(inner) for inner in value] if isinstance(value, list) else value


async def main(arguments: Sequence[str] | None = None) -> int:
    """The command.

    Returns:
        Its exit code: 1 if it could not do what it was asked to, or if `--check` finds something to do.
    """
    parser = argparse.ArgumentParser(prog="python -m deployments.automations", description=__doc__)
    parser.add_argument("--check", action="store_true", help="only say what is to be done; 1 if anything is")
    parser.add_argument("--prune", action="store_true", help="delete those that are no longer in the file")
    parser.add_argument("--file", type=Path, default=FILE, help="another file of automations")
    parser.add_argument("--env", help="an environment of environments.yaml (default: the one it says)")
    asked = parser.parse_args(arguments)
    async with get_client() as client:
        try:
            environments = read_environments()
            here = environments.named(asked.env)
            entries = read_entries(asked.file)
            if here.name != environments.default:
                entries = of_environment(entries, here)
            notes: list[str] = []
            todo = await plan(client, await resolve(client, entries, here, notes), here)
        except (AutomationsError, DeployError) as error:
            sys.stderr.write(f"{error}\n")
            return 1
        for note in notes:
            _print(note)
        _say(todo)
        if asked.check:
            return 1 if todo.create or todo.update or todo.remove else 0
        await apply(client, todo)
        if todo.remove and (asked.prune or _confirmed(todo.remove)):
            await remove(client, todo.remove)
            _print(f"deleted: {_names(todo.remove)}")
        elif todo.remove:
            _print(f"no longer in the file: {_names(todo.remove)}. ARGS=--prune deletes them.")
    return 0


def _say(todo: Plan) -> None:
    for automation in todo.create:
        _print(f"new: {automation.name}")
    for automation in todo.update.values():
        _print(f"changed: {automation.name}")
    for name in todo.off:
        _print(f"switched off by an operator, and left so: {name}")
    if not (todo.create or todo.update or todo.remove):
        _print("Nothing to do.")


def _print(text: str) -> None:
    sys.stdout.write(f"{text}\n")


def _confirmed(automations: Iterable[Automation]) -> bool:
    if not sys.stdin.isatty():
        return False
    return input(f"No longer in the file: {_names(automations)}. Delete? [y/N] ").strip().lower() == "y"


def _names(automations: Iterable[Automation]) -> str:
    return ", ".join(automation.name for automation in automations)


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
