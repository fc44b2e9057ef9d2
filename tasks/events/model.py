"""An event from outside, before it is Prefect's: what happened, to what, and by what it is known again."""

from __future__ import annotations

import math
from functools import cached_property
from typing import Annotated
from uuid import UUID, uuid5

from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, Field, JsonValue, StringConstraints

_OURS = UUID("5d0c0f1e-5a0a-5a52-9a55-6f1f0f5a7f10")
"""The namespace of our event ids. Never to be changed: it would make every replay a new event."""

_DEEPEST = 60
_LEAST, _MOST = -(2**63), 2**64 - 1


def storable(value: JsonValue, depth: int = 0) -> JsonValue:
    """What JSON allows and the server does not take is refused here, where the sender can still be told.

    Raises:
        ValueError: It holds such a thing; says what, without the value.
    """
    match value:
        case str():
            if "\0" in value:
                raise ValueError("it holds a NUL character, which no database keeps")
            try:
                value.encode()
            except UnicodeEncodeError:
                raise ValueError("it holds half of a surrogate pair, which is no text") from None
        # One such parameter of one run, and the server can't answer with any list that this run is in.
        case int() if not _LEAST <= value <= _MOST:
            raise ValueError("it holds a whole number of more than 64 bits; write it as text")
        case float() if not math.isfinite(value):
            raise ValueError("it holds a number that JSON can't carry (NaN or infinity)")
        case list() | dict():
            if depth == _DEEPEST:
                raise ValueError(f"it is nested deeper than {_DEEPEST} levels")
            for item in value:
                storable(item, depth + 1)
            if isinstance(value, dict):
                for item in value.values():
                    storable(item, depth + 1)
    return value


def _storable_text(value: str) -> str:
    storable(value)
    return value


def _storable_object(value: dict[str, JsonValue]) -> dict[str, JsonValue]:
    storable(value)
    return value


Text = Annotated[str, StringConstraints(min_length=1, max_length=1024), AfterValidator(_storable_text)]
"""One line that stands in the database: an id, a key, a name."""

Payload = Annotated[dict[str, JsonValue], AfterValidator(_storable_object)]
"""A JSON object that every database of Prefect's keeps as it is."""

EventName = Annotated[
    str,
    # `prefect.` is Prefect's own: a stranger's hook must not pass for the end of a flow run.
    StringConstraints(max_length=255, pattern=r"^[a-z][a-z0-9_-]*(\.[a-z0-9_-]+)+$"),
    AfterValidator(lambda name: _not_prefects(name)),
]


def _not_prefects(name: str) -> str:
    if name.startswith("prefect."):
        raise ValueError("names that begin with `prefect.` are Prefect's own events")
    return name


class Related(BaseModel):
    """Another thing that the event is about, as Prefect's related resources are."""

    model_config = ConfigDict(frozen=True)

    id: Text
    role: Text
    name: str = ""


class EltEvent(BaseModel):
    """Something that has happened outside, once, however often it is told.

    Two events with the same name and key are one: they have the same id, and start each of their runs once.
    Where the name says more than every reading of the sender tells, `known_as` stands for it in that.
    """

    model_config = ConfigDict(frozen=True)

    name: EventName = Field(description="What happened: `elt.<tool>.<thing>.<what>`.")
    key: Text = Field(description="The sender's own identity of this, such as `s3:bucket/key@etag`.")
    known_as: EventName | None = Field(
        default=None, description="The name that the identity is made of; by default the event's own."
    )
    occurred: AwareDatetime = Field(description="When it happened, by the sender's clock.")
    resource_id: Text = Field(description="What it happened to, such as `elt.airbyte.connection.<id>`.")
    resource_name: str = Field(default="", description="That thing's name for people.")
    labels: dict[Text, Text] = Field(
        default_factory=dict,
        max_length=50,
        description="More of that thing, for triggers' `match`, such as `elt.git.branch: main`.",
    )
    payload: Payload = Field(default_factory=dict, description="The facts, for triggers' templates.")
    related: tuple[Related, ...] = Field(default=(), max_length=50)

    @cached_property
    def id(self) -> UUID:
        """The event's id, the same for every replay."""
        return uuid5(_OURS, f"{self.known_as or self.name}\n{self.key}")

    @property
    def label(self) -> str:
        """What a person reads: the event and its key, in one line."""
        return f"{self.name} ({self.key if self.key.isprintable() else ascii(self.key)})"


class StartedRun(BaseModel):
    """A flow run that an event has started, now or when it was first told."""

    model_config = ConfigDict(frozen=True)

    flow_run_id: UUID
    deployment: str
    name: str


class HandedOver(BaseModel):
    """An event that the Prefect server has, with the runs that it started.

    Attributes:
        event_id: The event's id, also in Prefect.
        runs: Those of the triggers that cover it.
        failed: The names of the triggers that could not start theirs; `elt.trigger.failed` says why.
    """

    model_config = ConfigDict(frozen=True)

    event_id: UUID
    runs: tuple[StartedRun, ...] = ()
    failed: tuple[str, ...] = ()


class HandOverError(Exception):
    """The Prefect server did not take everything. To be tried again whole: nothing is made twice."""
