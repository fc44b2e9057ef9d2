"""Any tool with a job API: the block that declares how its jobs are started, watched, found and cancelled.

Declared jobs are run by the same engine as those of the tools that this collection knows by name, with the
same promises. Two whole declarations are in `blocks/dashboards.py`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Mapping
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, Any, ClassVar, Literal
from urllib.parse import parse_qsl, urlencode

from prefect.blocks.core import Block
from pydantic import ConfigDict, Field, HttpUrl, field_validator, model_validator

from blocks.fields import check_base_url
from blocks.http import shared_client
from blocks.http_job_auth import Auth, NoAuth, SignIn, secrets_of
from blocks.http_job_fill import Value, Values, names_in
from blocks.http_job_parts import (
    Cancel,
    Find,
    Listing,
    Lookup,
    Parameter,
    Poll,
    Start,
    States,
    canonical,
)

if TYPE_CHECKING:
    from blocks.http_job_client import HttpJobApi

_RESERVED = frozenset({"job_id", "marker", "since"})


class HttpJob(Block):
    """A kind of job of a tool that has an HTTP API for it.

    Example:
        ```python
        HttpJob(
            service="Reports",
            base_url="https://reports.example.com/api",
            auth=BearerToken(token="…"),
            parameters={"report": Parameter(type="integer")},
            start=Start(path="/reports/{report}/runs", job_id=JobId(path="run.id")),
            poll=Poll(path="/runs/{job_id}", read=Reading(state="run.status", rows="run.rows")),
            states=States(running=["active"], succeeded=["done"], failed=["error"]),
            cancel=Cancel(method="DELETE", path="/runs/{job_id}"),
        ).save("reports")
        ```
    """

    _block_type_name: ClassVar[str] = "HTTP Job"
    _block_type_slug: ClassVar[str] = "http-job"
    _logo_url: ClassVar[HttpUrl | None] = HttpUrl("https://www.w3.org/favicon.ico")
    _documentation_url: ClassVar[HttpUrl | None] = HttpUrl("https://jmespath.org/specification.html")
    _description: ClassVar[str] = "Runs the jobs of any tool that has an API for them."

    # pydantic's errors quote what they were given, and that may be a key in the wrong field.
    model_config = ConfigDict(hide_input_in_errors=True)

    service: str = Field(title="Service", min_length=1, description="What people call the tool.")
    base_url: str = Field(title="Base URL", description="What all paths are appended to.")
    auth: Auth = Field(default=NoAuth(), title="Sign-in")
    headers: dict[str, str] = Field(default={}, description="Sent with every request. No place for a secret.")
    parameters: dict[str, Parameter] = Field(
        default={}, description="What a run of the job is told, by name. They are no place for a secret."
    )
    lookups: list[Lookup] = Field(default=[], description="Asked before a job is started, in this order.")
    start: Start
    poll: Poll | None = None
    listing: Listing | None = None
    states: States
    find: Find | None = Field(
        default=None,
        description="How a job is found whose start was not answered. Without it, and unless the start is "
        "repeatable, a run then ends with an error, for nobody can tell whether there is a job.",
    )
    cancel: Cancel | None = Field(default=None, description="None: this API can't cancel.")
    url: str | None = Field(default=None, title="Page", description="A job's page, with {placeholders}.")
    grace: float = Field(
        default=10.0,
        ge=0,
        allow_inf_nan=False,
        description="Seconds for which a fresh job may not show in the API's replies.",
    )
    requests_per_minute: int | None = Field(
        default=None, gt=0, description="An upper limit for this account; none of ours if empty."
    )
    on_partial: Literal["fail", "warn", "ok"] = Field(
        default="fail", description="What a partial end is where a run's policy does not say."
    )

    @field_validator("base_url")
    @classmethod
    def _normalise(cls, value: str) -> str:
        return check_base_url(value, example="https://api.example.com/v1")

    @model_validator(mode="after")
    def _coherent(self) -> HttpJob:
        problems = list(_problems(self))
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @property
    def declaration(self) -> Hashable:
        """What makes two blocks the same kind of job of the same account: they share a watcher."""
        return ("http-job", self.account, canonical(self))

    @property
    def account(self) -> Hashable:
        """What makes two blocks the same account: they share a client, its token and its rate limit."""
        secret = hashlib.sha256("\0".join(secrets_of(self.auth)).encode()).hexdigest()
        headers = tuple(sorted(self.headers.items()))
        return ("http-job", self.base_url, canonical(self.auth), secret, headers, self.requests_per_minute)

    def api(self) -> AbstractAsyncContextManager[HttpJobApi]:
        """The client of this account on the running event loop, shared with all its other users."""
        from blocks.http_job_client import HttpJobApi

        return shared_client(self.account, lambda: HttpJobApi(self))

    def arguments(self, given: Mapping[str, Any]) -> dict[str, Value]:
        """The values of all parameters.

        Raises:
            ValueError: One is missing, unknown or not what it is declared to be.
        """
        if unknown := sorted(set(given) - set(self.parameters)):
            known = f"It takes {', '.join(self.parameters)}." if self.parameters else "It takes none."
            raise ValueError(f"{unknown[0]!r} is no parameter of this job. {known}")
        values: dict[str, Value] = {}
        for name, parameter in self.parameters.items():
            value = given.get(name, parameter.default)
            if value is None:
                raise ValueError(f"The argument {name!r} is missing.")
            try:
                values[name] = parameter.read(value)
            except ValueError as error:
                raise ValueError(f"The argument {name!r} is not right: {error}.") from None
        return values


def resource_id(name: str, arguments: Values) -> str:
    """What a run of a job is known by: `name`, or `name?argument=value&…` in alphabetical order.

    In a dbt project's `meta` a source or exposure names the job so.
    """
    texts = {
        key: str(value).lower() if isinstance(value, bool) else value for key, value in arguments.items()
    }
    return f"{name}?{urlencode(sorted(texts.items()))}" if texts else name


def arguments_of(resource: str) -> dict[str, str]:
    """The arguments in a `resource_id`, as text."""
    return dict(parse_qsl(resource.partition("?")[2], keep_blank_values=True))


def _problems(job: HttpJob) -> Any:
    """What is wrong with a declaration as a whole; each sentence begins with the field."""
    yield from _wrong_names(job)
    known = set(job.parameters) | set(job.auth.values if isinstance(job.auth, SignIn) else ())
    used: set[str] = set()

    def check(field: str, template: Any, allowed: set[str]) -> Any:
        try:
            names = template.names() if hasattr(template, "names") else names_in(template)
        except ValueError as error:
            yield f"{field}: {error}"
            return
        used.update(names)
        for name in sorted(names - allowed):
            yield f"{field}: {{{name}}} is not one of {', '.join(sorted(allowed)) or 'any parameters'}"

    for position, lookup in enumerate(job.lookups):
        yield from check(f"lookups.{position}", lookup, known)
        known |= set(lookup.values)
    yield from check(
        "start", job.start, known | {"marker"} | ({"job_id"} if job.start.job_id.ours else set())
    )
    if job.start.job_id.ours and "job_id" not in used:
        yield "start.job_id.ours: the start does not send {job_id}"
    marked = "marker" in used
    for field in ("poll", "cancel", "url"):
        template = getattr(job, field)
        if template is not None:
            yield from check(field, template, known | {"job_id"})
    yield from _cannot_watch(job)
    if job.listing:
        yield from check("listing", job.listing, known)
    if job.find:
        yield from _cannot_find(job, job.find, marked)
        yield from check("find.match", list(job.find.match.values()), known)
        if job.find.listing:
            yield from check("find.listing", job.find.listing, known | {"since"})
    for name in sorted(set(job.parameters) - used):
        yield f"parameters.{name}: nothing uses it"


def _wrong_names(job: HttpJob) -> Any:
    declared = list(job.parameters)
    fields = [f"parameters.{name}" for name in declared]
    if isinstance(job.auth, SignIn):
        declared += job.auth.values
        fields += [f"auth.values.{name}" for name in job.auth.values]
    for position, lookup in enumerate(job.lookups):
        declared += lookup.values
        fields += [f"lookups.{position}.values.{name}" for name in lookup.values]
    for position, (name, field) in enumerate(zip(declared, fields, strict=True)):
        if not name.isidentifier() or not name.isascii():
            yield f"{field}: a name consists of letters, digits and _"
        if name in _RESERVED:
            yield f"{field}: the name {name} is taken"
        if name in declared[:position]:
            yield f"{field}: the name {name} is there already"
    for name, parameter in job.parameters.items():
        if parameter.default is not None:
            try:
                parameter.read(parameter.default)
            except ValueError as error:
                yield f"parameters.{name}.default: {error}"


def _cannot_watch(job: HttpJob) -> Any:
    if job.poll and "job_id" not in job.poll.names():
        yield "poll: without {job_id} it can't tell which job it reads"
    if job.cancel and "job_id" not in job.cancel.names():
        yield "cancel: without {job_id} it would stop who knows what"
    if job.poll is None and job.listing is None:
        yield "poll: there must be a poll, a listing, or both; nothing would see the job's end"
    elif job.poll is None and job.listing and job.listing.read is None:
        yield "listing.read: there is no poll, so the listing must say where the state is"


def _cannot_find(job: HttpJob, find: Find, marked: bool) -> Any:
    if find.created_at is None and find.marker is None:
        yield "find: give created_at, marker or both; an old job can't be told from ours else"
    if find.marker is not None and not marked:
        yield "find.marker: the start does not send {marker}"
    if find.listing is None and job.listing is None:
        yield "find.listing: there is no listing to look in"
