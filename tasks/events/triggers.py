"""Once triggers: which deployment an event starts, with which parameters, exactly once.

Prefect's own triggers fire more than once, or not at all, when the server is pressed or restarted, and the
runs that they make carry a random idempotency key. A once trigger has the same shape and stands beside them
in the deployment's YAML, under `once_triggers`; its run carries the event's own identity as the key. What has
no single event (compound, sequence, proactive) stays with Prefect's `triggers`.

What covers an event and what a template renders to is decided by Prefect's own code.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import yaml
from jinja2 import Environment, meta
from prefect import Flow
from prefect.flows import load_flow_arguments_from_entrypoint
from prefect.server.events.actions import RunDeployment
from prefect.server.events.schemas.automations import EventTrigger, Posture
from prefect.server.events.schemas.events import ReceivedEvent
from prefect.utilities.importtools import import_object
from prefect.utilities.schema_tools.hydration import (
    HydrationContext,
    HydrationError,
    ValidJinja,
    WorkspaceVariable,
    hydrate,
)
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    PrivateAttr,
    ValidationError,
    field_validator,
    model_validator,
)

from tasks.block_references import with_blocks
from tasks.environment import Here
from tasks.events.model import EltEvent, storable

_KINDS = ("__prefect_kind", "$ref")
"""Keys by which Prefect replaces parts of parameters: by variables and templates, by blocks."""

_FILES = Here()
"""Everything as in the files."""


class TriggersWrong(ValueError):
    """A once trigger in a file can't be used; says which, where and what to do."""


class TriggerFailed(Exception):
    """A trigger covers an event, but can't start its run. No retry of the event would help."""


class _Template(RunDeployment):
    """The parameters of Prefect's own action, tried and rendered without a server."""

    def problem(self) -> str | None:
        """What is wrong with the templates, as far as that can be known without an event."""
        for placeholder in self._placeholders():
            if isinstance(placeholder, WorkspaceVariable):
                return (
                    f"the variable {placeholder.variable_name} can't be read here; "
                    "put it into the deployment's own parameters"
                )
            if isinstance(placeholder, ValidJinja):
                names = meta.find_undeclared_variables(Environment().parse(placeholder.template))  # noqa: S701
                if unknown := names - {"event", "range"}:
                    return f"the template knows `event`, but not {', '.join(sorted(unknown))}"
        return None

    @classmethod
    def render(cls, parameters: dict[str, Any], event: ReceivedEvent) -> dict[str, Any]:
        cls._register_filters_if_needed()
        context = HydrationContext(raise_on_error=True, render_jinja=True, jinja_context={"event": event})
        return hydrate(cls._upgraded(parameters), context)

    @classmethod
    def _upgraded(cls, parameters: dict[str, Any]) -> dict[str, Any]:
        upgraded = copy.deepcopy(parameters)
        cls._upgrade_v1_templates(upgraded)
        return upgraded

    def _placeholders(self) -> list[Any]:
        return self._collect_placeholders(hydrate(self._upgraded(self.parameters or {}), HydrationContext()))


def render(parameters: dict[str, Any], event: ReceivedEvent) -> dict[str, Any]:
    """A trigger's parameters for an event, by Prefect's own code: a once trigger's or one of Prefect's.

    Raises:
        HydrationError: A template does not render, or not to JSON where it must.
    """
    # Without making an action of them: that would look at the templates first, and refuse in other words.
    return _Template.render(parameters, event)


class OnceTrigger(BaseModel):
    """One run of a deployment for each event that it covers, as written under `once_triggers`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    deployment: str = Field(description="`flow/deployment`.")
    name: str = Field(min_length=1, description="Unique among all once triggers: it is part of the key.")
    description: str = ""
    enabled: bool = True
    expect: frozenset[str] = Field(min_length=1, description="Names of events; `*` at the end is a wildcard.")
    match: dict[str, str | list[str]] = Field(default_factory=dict)
    match_related: dict[str, str | list[str]] | list[dict[str, str | list[str]]] = Field(default_factory=dict)
    parameters: dict[str, JsonValue] = Field(default_factory=dict)
    job_variables: dict[str, JsonValue] | None = None
    schedule_after: timedelta = Field(
        default=timedelta(0), ge=timedelta(0), description="Seconds, or ISO 8601."
    )
    # Private, because a file can't give them.
    _flow: Flow[..., Any] | None = PrivateAttr(default=None)
    _here: Here = PrivateAttr(default=_FILES)

    @field_validator("expect", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _usable(self) -> Self:
        if problem := self._template.problem():
            raise ValueError(f"parameters: {problem}")
        _ = self._trigger
        return self

    @cached_property
    def _trigger(self) -> EventTrigger:
        return EventTrigger.model_validate(
            {
                "posture": Posture.Reactive,
                "expect": self.expect,
                "match": self.match,
                "match_related": self.match_related,
            }
        )

    @cached_property
    def _template(self) -> _Template:
        return _Template(source="inferred", parameters=self.parameters)

    def covers(self, event: EltEvent) -> bool:
        """Whether the event starts a run."""
        return (
            self.enabled
            and self._trigger.covers(seen := received(event))
            and self._trigger.expects(seen.event)
        )

    def rendered(self, event: EltEvent) -> dict[str, Any]:
        """The parameters of the run that the event starts.

        Raises:
            TriggerFailed: A template does not render, or to what the server does not take; or the payload
                holds what Prefect would go on to replace by a variable or a block: a sender must not be able
                to name those.
        """
        try:
            parameters = render(self.parameters, received(event))
        except HydrationError as error:
            raise TriggerFailed(str(error)) from error
        try:
            storable(parameters)
        except ValueError as error:
            raise TriggerFailed(f"the parameters can't be stored: {error}") from None
        for key in _KINDS:
            if key in _keys(event.payload) and key in _keys(parameters):
                raise TriggerFailed(f"the payload holds the key {key}, which Prefect would resolve")
        if self._flow is None:
            return parameters
        return self._here.instead(with_blocks(self._flow, parameters, self._here.blocks))

    def using_blocks_of(self, here: Here, flow: Flow[..., Any]) -> OnceTrigger:
        """The same trigger, with an environment's blocks in its runs; also for those that a template writes.

        Args:
            here: Has the blocks.
            flow: Of the deployment: the types of its parameters tell what is a block.
        """
        made = self.model_copy()
        made._here, made._flow = here, flow  # noqa: SLF001 - its own
        return made


def _keys(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        yield from value
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _keys(item)


def received(event: EltEvent) -> ReceivedEvent:
    """The event as Prefect's triggers and templates see it."""
    resource = {**event.labels, "prefect.resource.id": event.resource_id}
    if event.resource_name:
        resource["prefect.resource.name"] = event.resource_name
    return ReceivedEvent.model_validate(
        {
            "id": event.id,
            "event": event.name,
            "occurred": event.occurred,
            "resource": resource,
            "related": [
                {
                    "prefect.resource.id": related.id,
                    "prefect.resource.role": related.role,
                    **({"prefect.resource.name": related.name} if related.name else {}),
                }
                for related in event.related
            ],
            "payload": event.payload,
        }
    )


def renamed(trigger: dict[str, Any], prefix: str) -> dict[str, Any]:
    """A trigger of a file, in an environment: its name and those of deployments in it are others."""
    changed = {**trigger}
    if isinstance(trigger.get("name"), str):
        changed["name"] = f"{prefix}{trigger['name']}"
    if "triggers" in trigger:
        changed["triggers"] = [renamed(one, prefix) for one in trigger["triggers"]]
    if related := trigger.get("match_related"):
        specs = [_related(one, prefix) for one in (related if isinstance(related, list) else [related])]
        changed["match_related"] = specs if isinstance(related, list) else specs[0]
    return changed


def _related(spec: Any, prefix: str) -> Any:
    """Related deployments under the names that they have in an environment."""
    names = spec.get("prefect.resource.name") if isinstance(spec, dict) else None
    if not names or spec.get("prefect.resource.role") != "deployment":
        return spec
    here = [named(name, prefix) for name in ([names] if isinstance(names, str) else names)]
    return {**spec, "prefect.resource.name": here[0] if isinstance(names, str) else here}


def named(name: str, prefix: str) -> str:
    """The name in an environment of a deployment that the files call so; `flow/name` stays `flow/…`."""
    flow, slash, own = name.rpartition("/")
    return f"{flow}{slash}{prefix}{own}"


def read_triggers(*files: Path, here: Here = _FILES) -> tuple[OnceTrigger, ...]:
    """The once triggers of all deployments in these files; none where events start nothing.

    Args:
        files: Such as `deployments/prefect.yaml`.
        here: What is different in the environment whose deployments they are to start. The triggers of those
            that it is without are left out, unread.

    Raises:
        TriggersWrong: A file can't be read, or an entry can't be used.
    """
    found: dict[str, OnceTrigger] = {}
    for file in files if here.triggers else ():
        for trigger in _of_file(file, here):
            if (other := found.get(trigger.name)) is not None:
                raise TriggersWrong(
                    f"{file}: there are two once triggers {trigger.name!r}, of {other.deployment} and of "
                    f"{trigger.deployment}; the name is part of the key that makes a run the only one"
                )
            found[trigger.name] = trigger
    return tuple(found.values())


def _of_file(file: Path, here: Here) -> Iterator[OnceTrigger]:
    try:
        document = yaml.safe_load(file.read_text())
    except OSError as error:
        raise TriggersWrong(f"{file} can't be read: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise TriggersWrong(f"{file} is no YAML: {error}") from None
    entries = document.get("deployments") if isinstance(document, dict) else None
    if not isinstance(entries, list) or not all(
        isinstance(entry, dict) and "name" in entry for entry in entries
    ):
        raise TriggersWrong(f"{file} has no list of deployments with a name each")
    for entry in entries:
        if entry["name"] in here.without:
            continue
        given = entry.get("once_triggers") or []
        where = f"{file}: deployment {entry['name']}, once_triggers"
        if not isinstance(given, list):
            raise TriggersWrong(f"{where}: it must be a list")
        for position, one in enumerate(given, start=1):
            if not isinstance(one, dict):
                raise TriggersWrong(f"{where}, number {position}: it must have a name, `expect` and so on")
            yield _trigger(one, f"{where}, {one.get('name') or f'number {position}'}", entry, here)


def _trigger(given: dict[str, Any], where: str, entry: dict[str, Any], here: Here) -> OnceTrigger:
    flow = entry.get("flow_name") or _flow_name(entry.get("entrypoint"), where)
    # Prefect's own triggers may say their type; here there is only one.
    fields = {key: value for key, value in given.items() if (key, value) != ("type", "event")}
    if counting := {"type", "posture", "threshold", "within", "after", "for_each", "triggers"} & set(fields):
        raise TriggersWrong(
            f"{where}: {', '.join(sorted(counting))} belongs under `triggers`; "
            "a once trigger starts one run for each event"
        )
    fields = renamed(fields, here.prefix)
    if isinstance(fields.get("parameters"), dict):
        fields["parameters"] = here.instead(fields["parameters"])
    try:
        trigger = OnceTrigger.model_validate(
            {**fields, "deployment": f"{flow}/{named(entry['name'], here.prefix)}"}
        )
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        field = ".".join(str(part) for part in first["loc"])
        raise TriggersWrong(f"{where}: {field + ': ' if field else ''}{first['msg']}") from None

    if not here.blocks:  # what tells which parameters are blocks takes seconds to import
        return trigger
    try:
        return trigger.using_blocks_of(here, import_object(entry["entrypoint"]))
    except Exception as error:  # whatever the module does when it is imported
        raise TriggersWrong(f"{where}: {entry['entrypoint']} can't be imported: {error}") from error


def _flow_name(entrypoint: Any, where: str) -> str:
    try:
        return str(load_flow_arguments_from_entrypoint(str(entrypoint), {"name"})["name"])
    except (ValueError, OSError, ImportError, SyntaxError) as error:
        raise TriggersWrong(f"{where}: the entrypoint {entrypoint} is no flow: {error}") from None
