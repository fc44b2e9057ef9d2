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
from tasks.block_references import with_blocks
from tasks.environment import Here
from tasks.events import OnceTrigger, read_triggers
from tasks.events.triggers import renamed

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
        """The same deployment as it is in an environment.

        Only the blocks that triggers name are as in the file: a template may stand where a parameter is not
        yet what the flow takes, see `with_trigger_blocks` and `OnceTrigger.using_blocks_of`.
        """
        variables = {**self.work_pool.job_variables}
        if environment.variables:
            variables["env"] = {**variables.get("env", {}), **environment.variables}
        pool = environment.work_pool or self.work_pool.name
        here = environment.here
        triggers = [renamed(one, here.prefix) for one in self.triggers]
        once = [renamed(one, here.prefix) for one in self.once_triggers] if here.triggers else []
        return self.model_copy(
            update={
                "name": environment.deployment_name(self.name),
                "tags": [*self.tags, environment.tag],
                "work_pool": self.work_pool.model_copy(update={"name": pool, "job_variables": variables}),
                "parameters": self._parameters(self.parameters, here),
                "schedules": [
                    one.model_copy(update={"parameters": self._parameters(one.parameters, here)})
                    if one.parameters
                    else one
                    for one in self.schedules
                ],
                "triggers": [_marked(_in_place(one, here)) for one in triggers],
                "once_triggers": [_in_place(one, here) for one in once],
            }
        )

    def _parameters(self, given: dict[str, Any], here: Here) -> dict[str, Any]:
        return here.instead(with_blocks(self.flow, given, here.blocks) if here.blocks else given)


def _in_place(trigger: dict[str, Any], here: Here) -> dict[str, Any]:
    """A trigger with the environment's own values, where it gives such parameters."""
    given = trigger.get("parameters")
    return {**trigger, "parameters": here.instead(given)} if given else trigger


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
    return read_triggers(*files, here=environment.here)
