"""The parts of a declared job API: its parameters, its requests and what its replies mean."""

from __future__ import annotations

import json
import math
import re
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, Field, JsonValue, TypeAdapter, ValidationError, model_validator

from blocks.http_job_fill import JmesPath, Part, Pattern, Value, names_in

_TYPES: dict[str, TypeAdapter[Any]] = {
    "text": TypeAdapter(Annotated[str, Field(min_length=1)]),
    "integer": TypeAdapter(int),
    "number": TypeAdapter(float),
    "boolean": TypeAdapter(bool),
}


class Parameter(Part):
    """What a run of the job is told, for example which dashboard to refresh."""

    type: Literal["text", "integer", "number", "boolean"] = "text"
    pattern: Pattern | None = Field(default=None, description="What the whole of a text must look like.")
    default: str | int | float | bool | None = Field(default=None, description="None: it must be given.")
    description: str = ""

    def read(self, value: Any) -> Value:
        """A value in this parameter's type.

        Raises:
            ValueError: It has another type or does not look like the pattern.
        """
        if self.type == "text" and isinstance(value, int) and not isinstance(value, bool):
            value = str(value)  # ids are numbers to some people
        if isinstance(value, bool) and self.type != "boolean":
            raise ValueError(f"it is no {self.type}")
        try:
            read: Value = _TYPES[self.type].validate_python(value)
        except ValidationError as error:
            raise ValueError(error.errors(include_url=False)[0]["msg"]) from None
        if isinstance(read, float) and not math.isfinite(read):
            raise ValueError("it is no finite number")
        if self.pattern and not re.fullmatch(self.pattern, str(read)):
            raise ValueError(f"it does not look like {self.pattern}")
        return read


class Request(Part):
    """What every request has."""

    path: str = Field(pattern=r"^/", description="Appended to the base URL, with {placeholders}.")
    params: dict[str, str] = Field(default={}, description="The query, with {placeholders}.")

    def names(self) -> set[str]:
        """The placeholders in it."""
        return names_in(self.path) | names_in(dict(self.params))


class Query(Request):
    """A request that only asks, and is sent again without a second thought."""

    method: Literal["GET", "POST"] = Field(
        default="GET", description="POST only for an API that is asked by it, such as GraphQL."
    )
    body: JsonValue = Field(default=None, description="Sent as JSON with a POST, with {placeholders}.")

    @model_validator(mode="after")
    def _body_of_a_post(self) -> Self:
        if self.body is not None and self.method == "GET":
            raise ValueError("a body is sent with method POST only")
        return self

    def names(self) -> set[str]:
        """The placeholders in it."""
        return super().names() | names_in(self.body)


class Reading(Part):
    """Where a job's reply, or an item of a list of jobs, says what."""

    state: JmesPath
    rows: JmesPath | None = None
    bytes: JmesPath | None = None
    rows_rejected: JmesPath | None = None
    attempts: JmesPath | None = None
    message: JmesPath | None = None
    started_at: JmesPath | None = Field(default=None, description="For the duration.")
    ended_at: JmesPath | None = Field(default=None, description="For the duration.")


class Poll(Query):
    """The request that reads one job, by {job_id}."""

    read: Reading


class Listing(Query):
    """The request that reads many jobs at once, the newest among them."""

    items: JmesPath = Field(description="The list of jobs in the reply.")
    id: JmesPath = Field(description="The job's id within an item.")
    read: Reading | None = Field(
        default=None, description="With it, jobs are watched by this list: one request for all that it holds."
    )


class Find(Part):
    """How a job is found again whose start was not answered: by its time, or by a mark that we left."""

    created_at: JmesPath | None = Field(
        default=None, description="When the job was created, within an item: ISO 8601 or seconds since 1970."
    )
    marker: JmesPath | None = Field(
        default=None, description="Where the {marker} is that was sent with the start, within an item."
    )
    match: dict[JmesPath, str] = Field(
        default={}, description="What else must be in an item of ours: path to text, with {placeholders}."
    )
    listing: Listing | None = Field(
        default=None, description="The list to look in, if not the job's own; {since} is our start's time."
    )


class JobId(Part):
    """Where the id of a started job comes from. Exactly one of `path`, `header` and `ours`."""

    path: JmesPath | None = Field(default=None, description="In the reply to the start.")
    header: str | None = Field(default=None, description="In this header of the reply.")
    pattern: Pattern | None = Field(
        default=None, description="What of the header is the id: the last part of an address is [^/]+$"
    )
    ours: bool = Field(default=False, description="We choose it and send it as {job_id}.")

    @model_validator(mode="after")
    def _one(self) -> JobId:
        if (self.path is not None) + (self.header is not None) + self.ours != 1:
            raise ValueError("say where the id is: exactly one of path, header and ours")
        if self.pattern is not None and self.header is None:
            raise ValueError("a pattern is for a header")
        return self


class Refusal(Part):
    """A reply that means that a job is running already."""

    status: int | None = Field(default=None, ge=200, le=599)
    text: str | None = Field(default=None, min_length=1, description="Somewhere in the reply, in any case.")

    @model_validator(mode="after")
    def _something(self) -> Refusal:
        if self.status is None and self.text is None:
            raise ValueError("give a status, a text, or both")
        return self

    def fits(self, status: int | None, reply: str) -> bool:
        """Whether a reply is this one."""
        return (self.status in (None, status)) and (
            self.text is None or self.text.casefold() in reply.casefold()
        )


class Start(Request):
    """The request that starts a job."""

    method: Literal["POST", "PUT", "PATCH"] = "POST"
    body: JsonValue = Field(default=None, description="Sent as JSON, with {placeholders}.")
    form: dict[str, str] | None = Field(default=None, description="Sent as a form, with {placeholders}.")
    headers: dict[str, str] = Field(default={}, description="Sent with it, with {placeholders}.")
    job_id: JobId
    url: JmesPath | None = Field(default=None, description="Where the reply has the job's page.")
    already_running: list[Refusal] = Field(
        default=[Refusal(status=409)], description="Replies that mean that a job is running already."
    )
    repeatable: bool = Field(
        default=False,
        description="A second start does no harm, so one whose reply was lost may be sent again.",
    )

    @model_validator(mode="after")
    def _one_body(self) -> Start:
        if self.body is not None and self.form is not None:
            raise ValueError("give a body or a form, not both")
        return self

    def names(self) -> set[str]:
        """The placeholders in it."""
        return super().names() | names_in([self.body, dict(self.form or {}), dict(self.headers)])


class Cancel(Request):
    """The request that stops a job, by {job_id}."""

    method: Literal["POST", "PUT", "PATCH", "DELETE"] = "POST"
    body: JsonValue = Field(default=None, description="Sent as JSON, with {placeholders}.")

    def names(self) -> set[str]:
        """The placeholders in it."""
        return super().names() | names_in(self.body)


class Lookup(Query):
    """A request before a start: whether something exists and may be run, and what else is to be known of it.

    What it reads becomes placeholders of all that comes after it. `name` is also the job's name for people,
    and `owner` who is told of a failure.
    """

    values: dict[str, JmesPath] = Field(default={}, description="Placeholder to path in the reply.")
    problem: JmesPath | None = Field(
        default=None, description="If it finds a text, that is why the job can't be started now."
    )


class States(Part):
    """The API's words for a job's states, in any case. A word that is in no list is taken as not ended."""

    queued: list[str] = Field(default=[])
    running: list[str] = Field(default=[])
    retrying: list[str] = Field(default=[])
    succeeded: list[str]
    partial: list[str] = Field(default=[])
    failed: list[str]
    cancelled: list[str] = Field(default=[])
    skipped: list[str] = Field(default=[])

    @model_validator(mode="after")
    def _unambiguous(self) -> States:
        seen: dict[str, str] = {}
        for state, words in self.by_state().items():
            for word in words:
                other = seen.setdefault(word.casefold(), state)
                if other != state:
                    raise ValueError(f"{word!r} is both {other} and {state}")
        for state in ("succeeded", "failed"):
            if not self.by_state()[state]:
                raise ValueError(
                    f"{state} is empty: a job that has {state} would be waited for until the timeout"
                )
        return self

    def by_state(self) -> dict[str, list[str]]:
        """The words of each state."""
        return {name: getattr(self, name) for name in type(self).model_fields}

    def of(self, word: str) -> str | None:
        """The state that a word means."""
        wanted = word.casefold()
        return next(
            (state for state, words in self.by_state().items() if wanted in {w.casefold() for w in words}),
            None,
        )


def canonical(part: BaseModel) -> str:
    """All that a declaration says but its secrets, as text: two that say the same are the same."""
    return json.dumps(part.model_dump(mode="json", exclude_unset=False), sort_keys=True, default=str)
