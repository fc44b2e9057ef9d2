"""What deployments/prefect.yaml and deployments/pipelines.yaml say, as it is in an environment."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from prefect import Flow
from prefect.utilities.importtools import import_object
from pydantic import BaseModel, ConfigDict, Field

from blocks.fields import tagged_owner
from deployments.environments import DeployError, Environment, load_yaml, parse
from tasks.events import OnceTrigger, read_triggers

FILES = tuple(Path(__file__).with_name(name) for name in ("prefect.yaml", "pipelines.yaml"))

TRIGGER_MARK = (
    "Made by `make deploy`. Switched off here it stays off; any other change belongs into its file."
)
"""How the description of an automation ends that `make deploy` has made of a deployment's trigger."""


class _Strict(BaseModel):
    # `prefect deploy` passes over a key that it doesn't know, such as a misspelt one.
    model_config = ConfigDict(extra="forbid")


class Schedule(_Strict):
    """When runs are made. By its slug a schedule is known again: paused in the UI, it stays paused."""

    slug: str
    cron: str | None = None
    interval: float | None = Field(default=None, description="Seconds.")
    rrule: str | None = None
    timezone: str | None = None
    anchor_date: str | None = None
    day_or: bool | None = None
    active: bool | None = None
    parameters: dict[str, Any] = {}


class WorkPool(_Strict):
    """Where runs are executed."""

    name: str
    work_queue_name: str | None = None
    job_variables: dict[str, Any] = {}


class ConcurrencyLimit(_Strict):
    """How many runs at a time, and what becomes of one too many."""

    limit: int = Field(ge=1)
    collision_strategy: Literal["ENQUEUE", "CANCEL_NEW"] = "ENQUEUE"
    grace_period_seconds: int | None = None


class Entry(_Strict):
    """One deployment.

    Attributes:
        triggers: As Prefect takes them.
        once_triggers: Of the same shape; by them our own receivers start a run, once for each event.
    """

    name: str = Field(pattern=r"^[^/%&><\s]+$")
    entrypoint: str
    description: str | None = None
    version: str | None = None
    tags: list[str] = []
    work_pool: WorkPool
    concurrency_limit: ConcurrencyLimit | None = None
    paused: bool | None = None
    schedules: list[Schedule] = []
    triggers: list[dict[str, Any]] = []
    once_triggers: list[dict[str, Any]] = []
    parameters: dict[str, Any] = {}
    enforce_parameter_schema: bool | None = None
    pull: list[dict[str, Any]] | None = None

    @cached_property
    def flow(self) -> Flow[..., Any]:
        """The flow that it runs.

        Raises:
            DeployError: The entrypoint can't be imported, or is no flow.
        """
        try:
            found = import_object(self.entrypoint)
        except Exception as error:  # whatever the module does when it is imported
            cause = f"{type(error).__name__}: {error}"
            raise DeployError(f"{self.name}: {self.entrypoint} can't be imported: {cause}") from error
        if not isinstance(found, Flow):
            raise DeployError(f"{self.name}: {self.entrypoint} is no flow")
        return found

    @property
    def full_name(self) -> str:
        """`flow/deployment`, as Prefect's commands take it."""
        return f"{self.flow.name}/{self.name}"

    @property
    def owner(self) -> str | None:
        """Whose it is: the tag `owner:<name>`."""
        return tagged_owner(self.tags)

    def within(self, environment: Environment) -> Entry:
        """The same deployment as it is in an environment; names of blocks are left as they are."""
        variables = {**self.work_pool.job_variables}
        if environment.variables:
            variables["env"] = {**variables.get("env", {}), **environment.variables}
        pool = environment.work_pool or self.work_pool.name
        replaced = {name: value for name, value in environment.parameters.items() if name in self.parameters}
        return self.model_copy(
            update={
                "name": environment.deployment_name(self.name),
                "tags": [*self.tags, environment.tag],
                "work_pool": self.work_pool.model_copy(update={"name": pool, "job_variables": variables}),
                "parameters": {**self.parameters, **replaced},
                "triggers": [_marked(_renamed(trigger, environment)) for trigger in self.triggers],
                "once_triggers": [_renamed(t, environment) for t in self.once_triggers]
                if environment.triggers
                else [],
            }
        )


def _renamed(trigger: dict[str, Any], environment: Environment) -> dict[str, Any]:
    """Automations are told apart by name, and a branch's is another one, of the branch's own deployments."""
    renamed = {**trigger}
    if "name" in trigger:
        renamed["name"] = f"{environment.prefix}{trigger['name']}"
    if "triggers" in trigger:
        renamed["triggers"] = [_renamed(one, environment) for one in trigger["triggers"]]
    if related := trigger.get("match_related"):
        specs = [
            _of_environment(one, environment) for one in (related if isinstance(related, list) else [related])
        ]
        renamed["match_related"] = specs if isinstance(related, list) else specs[0]
    return renamed


def _of_environment(spec: dict[str, Any], environment: Environment) -> dict[str, Any]:
    """Related deployments under the names that they have here."""
    names = spec.get("prefect.resource.name")
    if spec.get("prefect.resource.role") != "deployment" or not names:
        return spec
    here = [environment.deployment_name(name) for name in ([names] if isinstance(names, str) else names)]
    return {**spec, "prefect.resource.name": here[0] if isinstance(names, str) else here}


def _marked(trigger: dict[str, Any]) -> dict[str, Any]:
    """With our mark in what the UI shows of it: a server does not tell whose an automation is."""
    own = trigger.get("description")
    return {**trigger, "description": f"{own}\n\n{TRIGGER_MARK}" if own else TRIGGER_MARK}


class PrefectFile(_Strict):
    """A file as `prefect deploy` reads it."""

    name: str
    prefect_version: str | None = Field(default=None, alias="prefect-version")
    pull: list[dict[str, Any]]
    definitions: Any = None
    deployments: list[Entry]


def read_entries(*files: Path) -> tuple[Entry, ...]:
    """Every deployment of these files, by default of prefect.yaml and pipelines.yaml.

    Raises:
        DeployError: A file can't be read, something in it is wrong, or two deployments have one name.
    """
    entries: list[Entry] = []
    for file in files or FILES:
        parsed = parse(PrefectFile, load_yaml(file), file)
        entries += [
            entry.model_copy(update={"pull": entry.pull or parsed.pull}) for entry in parsed.deployments
        ]
    twice = [name for name, count in Counter(entry.name for entry in entries).items() if count > 1]
    if twice:
        raise DeployError(f"two deployments are called {', '.join(twice)}: `prefect deploy -n` takes a name")
    return tuple(entries)


def load_triggers(environment: Environment, files: Sequence[Path] = FILES) -> tuple[OnceTrigger, ...]:
    """The once triggers of an environment's deployments; none where triggers are off.

    Args:
        environment: Whose deployments events start.
        files: Where the deployments stand.

    Raises:
        TriggersWrong: A file can't be read, or an entry can't be used.
    """
    if not environment.triggers:
        return ()
    return read_triggers(*files, prefix=environment.prefix, without=environment.without)
