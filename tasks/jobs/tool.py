"""A tool as flows see it: how its requests are checked, run, and cancelled from another process."""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Hashable, Iterable
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from prefect import Task
from pydantic import BaseModel, ConfigDict

from tasks.jobs.model import InputError, JobPolicy, JobResult, JobVendor


class Request(Protocol):
    """What a report needs to know of anything that a flow is asked to do."""

    @property
    def tool(self) -> str:
        """The tool's name."""

    @property
    def resource_id(self) -> str:
        """The connection, sync or job definition to run; what to do of a step of one's own."""

    @property
    def label(self) -> str:
        """What a person calls it."""

    @property
    def owner(self) -> str | None:
        """Who is told when it fails."""


class Parameters(Request, Protocol):
    """What the parameters of every tool's job have: a flow takes them, a deployment writes them down."""

    @property
    def policy(self) -> JobPolicy:
        """How long to wait, and what the less clear ends mean."""


def _tool_required(schema: dict[str, Any]) -> None:
    """`tool` has a default in Python and none in JSON.

    A server judges parameters by their schema alone, and where `tool` is left out it takes one tool's for
    another's.
    """
    schema["required"] = ["tool", *(name for name in schema.get("required", ()) if name != "tool")]


class ToolParameters(BaseModel):
    """What a flow takes for one tool, told apart from the others' by its `tool`."""

    # pydantic's errors quote what they were given, and that may be a block with its secret.
    model_config = ConfigDict(
        frozen=True, extra="forbid", hide_input_in_errors=True, json_schema_extra=_tool_required
    )


P = TypeVar("P", bound=Parameters, covariant=True)


@dataclass(frozen=True)
class Checked(Generic[P]):
    """A request that was looked up at the vendor before anything is started.

    Attributes:
        request: With the vendor's name and owner filled in where none was given.
        namespace: The schema of the warehouse that it writes to, where that is fixed.
        prefix: What is put before each stream's name to make the table's.
        streams: The streams that it loads; empty where the vendor does not say.
        problem: Why it can't be started now (inactive, paused, broken); None if it can.
        counts_rows: Whether the vendor tells how many rows a job of it has moved.
    """

    request: P
    namespace: str | None = None
    prefix: str = ""
    streams: tuple[str, ...] = ()
    problem: str | None = None
    counts_rows: bool = True


@dataclass(frozen=True)
class Tool:
    """A tool whose jobs flows run.

    Attributes:
        name: The `tool` of its parameters, and the vendor's name in journals and results.
        title: Its name as people write it.
        check: A task that looks requests up before anything is started. May return more than it is given,
            where a request stands for many.
        run: A task that runs one request to its end.
        vendor: Makes the vendor from the name of a saved block, for a hook in another process.
        meta: The `meta` key with which a dbt source or exposure names the resource.
        selections: Words in `tool` of parameters that stand for many requests, which `check` takes as well.
    """

    name: str
    title: str
    check: Task[[list[Any]], Coroutine[Any, Any, list[Checked[Any]]]]
    run: Task[[Any], Coroutine[Any, Any, JobResult]]
    vendor: Callable[[str], Awaitable[JobVendor[Any]]]
    meta: str
    selections: tuple[str, ...] = ()


def refuse_twice(what: str, resources: Iterable[tuple[Hashable, str]]) -> None:
    """Refuse to run the same thing twice at the same time.

    Args:
        what: What it is, for people.
        resources: The account and the id of each.

    Raises:
        InputError: One is there more than once.
    """
    if twice := sorted(id_ for (_, id_), count in Counter(resources).items() if count > 1):
        raise InputError(f"{what} {', '.join(twice)} is listed more than once. Nothing was started.")
