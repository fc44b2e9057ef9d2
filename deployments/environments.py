"""Environments: where deployments are put, and what is different there.

They stand in `deployments/environments.yaml`. A branch deployment is one too: of the settings under
`branches`, with a prefix and a warehouse schema made from the branch's name.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import to_jsonable_python

from tasks.environment import Here
from tasks.events.triggers import named

FILE = Path(__file__).with_name("environments.yaml")

SCHEMA_VARIABLE = "ELT_SCHEMA"
"""Environment variable by which a run's dbt profile learns of its schema."""

_LONGEST = 32  # of a branch's slug: PostgreSQL cuts names at 63, and `_intermediate` is still to come

ModelT = TypeVar("ModelT", bound=BaseModel)
Word = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]


class DeployError(Exception):
    """What was asked for can't be deployed; the message says why and what to do. Nothing was changed."""


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Settings(_Strict):
    """What is different in an environment; see the top of environments.yaml."""

    schedules: bool = True
    triggers: bool = True
    env: dict[Word, str] = {}
    work_pool: str | None = None
    blocks: dict[str, str] = {}
    # YAML reads a date as one, and runs are told of them as JSON.
    parameters: Annotated[dict[str, Any], AfterValidator(to_jsonable_python)] = {}
    without: list[str] = []


class NamedSettings(Settings):
    """Those of an environment that is no branch."""

    prefix: str = Field(default="", pattern=r"^[^/%&><\s]*$")
    schema_name: Word | None = Field(default=None, alias="schema")


class Environment(Settings):
    """Where deployments are put.

    Attributes:
        name: As in `ENV=…`; of a branch its slug.
        branch: Whether it is a branch's.
        prefix: Stands before the name of every deployment.
        schema_name: The warehouse schema that dbt's schemas begin with; None for those of the project.
    """

    name: str
    branch: bool = False
    prefix: str = ""
    schema_name: Word | None = None

    @property
    def tag(self) -> str:
        """What marks a deployment, and every run of it, as put there by `make deploy`."""
        return f"{'branch' if self.branch else 'env'}:{self.name}"

    @property
    def variables(self) -> dict[str, str]:
        """The environment variables of every run."""
        schema = {SCHEMA_VARIABLE: self.schema_name} if self.schema_name else {}
        return {**self.env, **schema, **self.here.variables}

    @property
    def here(self) -> Here:
        """What is different for those who start its deployments."""
        return Here.model_validate(self.model_dump(include={*Here.model_fields}))

    def deployment_name(self, name: str) -> str:
        """The name here of a deployment that the files call so; `flow/name` stays `flow/…`."""
        return named(name, self.prefix)


class WorkPoolSettings(_Strict):
    """A work pool: its worker's own template, ours of its type over it, and these values over both.

    Attributes:
        type: What kind of worker it is for.
        description: What it is for.
        variables: Defaults of job variables, such as the image.
    """

    type: Literal["process", "docker", "kubernetes", "ecs"]
    description: str | None = None
    variables: dict[str, Any] = {}


class Environments(_Strict):
    """All of environments.yaml.

    Attributes:
        concurrency_limits: How many of a vendor's jobs may run at a time over all flow runs and machines, by
            the name that the policies of its jobs give as their `concurrency_limit`.
    """

    default: str
    environments: dict[str, NamedSettings]
    branches: Settings = Settings(schedules=False, triggers=False)
    work_pools: dict[str, WorkPoolSettings] = {}
    concurrency_limits: dict[str, Annotated[int, Field(ge=1)]] = {}

    @model_validator(mode="after")
    def _sound(self) -> Environments:
        if self.default not in self.environments:
            raise ValueError(f"the default is {self.default!r}, which is none of the environments")
        prefixes = [settings.prefix for settings in self.environments.values()]
        if len({*prefixes}) < len(prefixes):
            raise ValueError("two environments have the same prefix: one's deployments would be the other's")
        return self

    def named(self, name: str | None = None) -> Environment:
        """An environment by name; the default without one.

        Raises:
            DeployError: There is none of this name.
        """
        name = name or self.default
        if name not in self.environments:
            known = ", ".join(self.environments)
            raise DeployError(f"there is no environment {name!r}; environments.yaml has {known}")
        return Environment(name=name, **dict(self.environments[name]))

    def pick(self, name: str | None = None, branch: str | None = None) -> Environment:
        """The environment of this name, of this branch, or the default.

        Raises:
            DeployError: There is none such.
        """
        if name and branch:
            raise DeployError("an environment and a branch are two things: name one")
        return self.of_branch(branch) if branch else self.named(name)

    def of_branch(self, branch: str) -> Environment:
        """The environment of a branch.

        Raises:
            DeployError: No name can be made of it, or an environment has its prefix.
        """
        slug = branch_slug(branch)
        prefix = f"{slug}."
        taken = next((name for name, one in self.environments.items() if one.prefix == prefix), None)
        if taken:
            raise DeployError(f"the branch {branch!r} would be taken for the environment {taken}: rename it")
        schema = slug.replace("-", "_")
        schema = f"b_{schema}" if schema[0].isdigit() else schema
        return Environment(name=slug, branch=True, prefix=prefix, schema_name=schema, **dict(self.branches))


def branch_slug(branch: str) -> str:
    """A branch's name as it is written in deployments: `feature/New_Mart` as `feature-new-mart`.

    Raises:
        DeployError: There is no letter and no digit in it.
    """
    slug = re.sub(r"[^a-z0-9]+", "-", branch.lower()).strip("-")
    if not slug:
        raise DeployError(f"no name can be made of the branch {branch!r}")
    if len(slug) > _LONGEST:  # cut off alone, two branches could become one
        mark = hashlib.sha256(branch.encode()).hexdigest()[:6]
        slug = f"{slug[: _LONGEST - 7].rstrip('-')}-{mark}"
    return slug


def read_environments(file: Path = FILE) -> Environments:
    """Read environments.yaml.

    Raises:
        DeployError: It is not there, or something in it is wrong.
    """
    return parse(Environments, load_yaml(file), file)


def environment(name: str | None = None, branch: str | None = None, file: Path = FILE) -> Environment:
    """The environment of this name, of this branch, or the default.

    Raises:
        DeployError: There is none such, or the file is wrong.
    """
    return read_environments(file).pick(name, branch)


def load_yaml(file: Path) -> Any:
    """The document in a file.

    Raises:
        DeployError: It can't be read.
    """
    try:
        return yaml.safe_load(file.read_text())
    except FileNotFoundError:
        raise DeployError(f"there is no {file}") from None
    except OSError as error:
        raise DeployError(f"{file} can't be read: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise DeployError(f"{file} is no YAML: {' '.join(str(error).split())}") from None


def parse(model: type[ModelT], document: Any, file: Path) -> ModelT:
    """A document as a model.

    Raises:
        DeployError: With the place and what is wrong there, a line for each.
    """
    try:
        return model.model_validate(document)
    except ValidationError as error:
        wrong = error.errors(include_url=False, include_input=False, include_context=False)
        lines = [f"{_place(one['loc'], document)}: {one['msg']}" for one in wrong]
        raise DeployError(f"{file}:\n  " + "\n  ".join(lines)) from None


def _place(loc: tuple[int | str, ...], document: Any) -> str:
    """Where it is, with an entry of a list called by its name where it has one."""
    words: list[str] = []
    for step in loc:
        document = _inside(document, step)
        named = isinstance(step, int) and isinstance(document, dict) and document.get("name")
        words.append(str(named or step))
    return ".".join(words) or "the file"


def _inside(document: Any, step: int | str) -> Any:
    try:
        return document[step]
    except (KeyError, IndexError, TypeError):
        return None
