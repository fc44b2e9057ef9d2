"""Whether what went over the wire is what a vendor's own OpenAPI file describes.

The files are not part of this repository: `$ELT_SPECS` names the folder that has them.
"""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import pytest
import yaml
from openapi_core import Config, OpenAPI
from openapi_core.templating.paths.exceptions import PathError
from openapi_core.templating.paths.finders import APICallPathFinder
from openapi_core.testing import MockRequest, MockResponse
from openapi_core.validation.request.exceptions import SecurityValidationError
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from werkzeug.datastructures import Headers, ImmutableMultiDict

from sandbox import Sandbox

NOT_SET = "ELT_SPECS is not set: nothing was held against the vendors' own OpenAPI files"
BY_HAND = "by-hand"  # the User-Agent of requests that a test makes itself, some of them wrong on purpose


def folder() -> Path:
    """Where the vendors' files are; skips the test, and says so, where nobody has named a folder."""
    named = os.environ.get("ELT_SPECS")
    if not named:
        pytest.skip(NOT_SET)
    found = Path(named)
    assert found.is_dir(), f"ELT_SPECS names {named}, and there is no such folder"
    return found


# -- what went over the wire


@dataclass(frozen=True)
class Exchange:
    """One request and its reply, as they were on the wire."""

    method: str
    path: str
    query: list[tuple[str, str]]
    headers: dict[str, str]
    body: bytes
    status: int
    reply_type: str
    reply: bytes

    @property
    def ours(self) -> bool:
        """Whether one of our clients asked, and not a test by hand."""
        return self.headers.get("user-agent") != BY_HAND

    def __str__(self) -> str:
        return f"{self.method} {self.path} → {self.status}"


class Witness:
    """An ASGI layer that keeps every exchange of the application below."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self.exchanges: list[Exchange] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sent, status, reply_type, reply = b"", 0, "", b""

        async def receiving() -> Message:
            nonlocal sent
            message = await receive()
            sent += message.get("body", b"")
            return message

        async def sending(message: Message) -> None:
            nonlocal status, reply_type, reply
            if message["type"] == "http.response.start":
                status = message["status"]
                reply_type = _text(message["headers"]).get("content-type", "")
            reply += message.get("body", b"")
            if message["type"] == "http.response.body" and not message.get("more_body", False):
                # Before it is sent: whoever has the reply may look here at once.
                query = parse_qsl(scope["query_string"].decode(), keep_blank_values=True)
                headers = _text(scope["headers"])
                self.exchanges.append(
                    Exchange(scope["method"], scope["path"], query, headers, sent, status, reply_type, reply)
                )
            await send(message)

        await self.app(scope, receiving, sending)


def _text(headers: Iterable[tuple[bytes, bytes]]) -> dict[str, str]:
    return {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in headers}


def distinct(exchanges: Iterable[Exchange]) -> list[Exchange]:
    """One each of those that look alike: the same kind of request, with replies of the same shape."""
    alike = {
        (
            each.method,
            re.sub(r"[^/]*\d[^/]*", "…", each.path),
            each.status,
            tuple(sorted(name for name, _ in each.query)),
            _shape(each.body),
            _shape(each.reply),
        ): each
        for each in exchanges
    }
    return list(alike.values())


def _shape(body: bytes) -> str:
    try:
        return str(_types(json.loads(body)))
    except ValueError:
        return ""


def _types(value: Any) -> Any:
    if isinstance(value, dict):
        return sorted((name, str(_types(inner))) for name, inner in value.items())
    if isinstance(value, list):
        return sorted({str(_types(inner)) for inner in value})
    return type(value).__name__


@contextmanager
def witnessed(state: Path, warehouse: Path) -> Iterator[tuple[Sandbox, Witness]]:
    """A sandbox all of whose exchanges are kept."""
    sandbox = Sandbox(state, warehouse=warehouse, job_seconds=0.1)
    witness = Witness(sandbox._config.app)  # type: ignore[arg-type]
    sandbox._config.app = witness
    with sandbox:
        yield sandbox, witness


def untried(sandbox: Sandbox, prefix: str, exchanges: Sequence[Exchange]) -> list[str]:
    """The routes of a vendor that the sandbox serves and that nobody has asked for."""
    routes = [route for route in sandbox._app().routes if isinstance(route, Route)]
    return [
        f"{method} {route.path}"
        for route in routes
        if route.path.startswith(prefix)
        for method in sorted((route.methods or set()) - {"HEAD"})
        if not any(_serves(routes, each) is route and each.method == method for each in exchanges)
    ]


def _serves(routes: list[Route], exchange: Exchange) -> Route | None:
    """The route that Starlette takes: the first that fits."""
    return next(
        (
            route
            for route in routes
            if route.path_regex.match(exchange.path) and exchange.method in (route.methods or ())
        ),
        None,
    )


# -- what the vendor says


class _Drop:
    """In place of a value: there should be none."""


DROP = _Drop()


@dataclass(frozen=True)
class Slip:
    """One place where a vendor's file says other than the vendor does.

    Args:
        why: How we know.
        where: The keys that lead to the place.
        value: What should be there; DROP for nothing. In a list, the item to be dropped is named last.
    """

    why: str
    where: tuple[str, ...]
    value: Any = DROP

    def mend(self, document: dict[str, Any]) -> None:
        """Put it right.

        Raises:
            KeyError, ValueError: The file is not (or no longer) as this slip says.
        """
        *parents, last = self.where
        place: Any = document
        for key in parents:
            place = place[key]
        if isinstance(place, list):
            place.remove(last)
        elif self.value is DROP:
            del place[last]
        else:
            place[last] = copy.deepcopy(self.value)


class Contract:
    """A vendor's OpenAPI file, with its known slips put right.

    It is held against more strictly than OpenAPI asks: what the file does not name (a property, a query
    parameter, a status) does not exist.

    Args:
        document: The file.
        prefix: Where the sandbox has this API.
        server: Where the vendor has it, as the file says.
        slips: What is wrong with the file.
    """

    def __init__(self, document: dict[str, Any], prefix: str, server: str, slips: Sequence[Slip]) -> None:
        self.prefix = prefix
        self.server = server
        self.slips = list(slips)
        self._original = document

    @cached_property
    def _document(self) -> dict[str, Any]:
        document = copy.deepcopy(self._original)
        for slip in self.slips:
            slip.mend(document)
        return document

    @cached_property
    def _openapi(self) -> OpenAPI:
        # Their defaults and examples break rules of the format; what they say of requests is what counts.
        config = Config(
            spec_validator_cls=None,
            additional_properties_default_policy="forbid",
            extra_media_type_deserializers={"application/problem+json": json.loads},
        )
        return OpenAPI.from_dict(self._document, config=config)

    def without(self, slip: Slip) -> Contract:
        """The same, with one slip left in."""
        rest = [each for each in self.slips if each is not slip]
        return Contract(self._original, self.prefix, self.server, rest)

    def faults(self, exchange: Exchange) -> list[str]:
        """What is wrong with an exchange, in words."""
        request = self._request(exchange)
        found: list[str] = []
        if exchange.ours:
            found += [f"request: {_reason(error)}" for error in self._openapi.iter_request_errors(request)]
            found += [f"request: no query parameter {name!r}" for name in self._undeclared(exchange, request)]
        reply = MockResponse(exchange.reply, exchange.status, content_type=exchange.reply_type)
        errors = self._openapi.iter_response_errors(request, reply)
        found += [f"reply: {_reason(error)}" for error in errors]
        return [f"{exchange}: {fault}" for fault in dict.fromkeys(found)]

    def all_faults(self, exchanges: Iterable[Exchange]) -> list[str]:
        """What is wrong with any of them, each thing once."""
        theirs = [exchange for exchange in exchanges if exchange.path.startswith(self.prefix)]
        assert theirs, f"nothing was asked of {self.prefix}"
        return list(dict.fromkeys(fault for exchange in theirs for fault in self.faults(exchange)))

    def _request(self, exchange: Exchange) -> MockRequest:
        scheme, _, address = self.server.partition("://")
        host, slash, base = address.rstrip("/").partition("/")
        request = MockRequest(
            f"{scheme}://{host}",
            exchange.method,
            f"{slash}{base}{exchange.path.removeprefix(self.prefix)}",
            headers=exchange.headers,
            data=exchange.body,
            content_type=exchange.headers.get("content-type", ""),
        )
        request.parameters.query = ImmutableMultiDict(exchange.query)
        request.parameters.header = Headers(exchange.headers)
        return request

    def _undeclared(self, exchange: Exchange, request: MockRequest) -> list[str]:
        url = f"{request.host_url}{request.path}"
        try:
            found = APICallPathFinder(self._openapi.spec).find(request.method, url)
        except PathError:
            return []  # openapi-core has said so already
        with found.path.resolve() as path, found.operation.resolve() as operation:
            listed = [*path.contents.get("parameters", []), *operation.contents.get("parameters", [])]
        names = {self._resolved(parameter)["name"] for parameter in listed}
        return [name for name, _ in exchange.query if name not in names]

    def _resolved(self, parameter: dict[str, Any]) -> dict[str, Any]:
        if "$ref" not in parameter:
            return parameter
        place: Any = self._document
        for key in parameter["$ref"].removeprefix("#/").split("/"):
            place = place[key]
        return dict(place)


def _reason(error: BaseException) -> str:
    """The innermost errors, which name the field."""
    if isinstance(error, SecurityValidationError):
        return str(error.__cause__ or error)
    cause = error.__cause__ or error
    inner = getattr(cause, "schema_errors", None)
    if inner:
        return "; ".join(
            f"{'.'.join(str(part) for part in each.absolute_path) or 'document'}: {_deepest(each)}"
            for each in inner
        )
    return f"{type(cause).__name__}: {cause}"


def _deepest(error: Any) -> str:
    return error.message if not error.context else "; ".join(_deepest(each) for each in error.context)


class _Loader(yaml.CSafeLoader):
    """YAML as JSON would have it: a date in an example is a text."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.CSafeLoader.yaml_implicit_resolvers.items()
}


def read(file: Path) -> dict[str, Any]:
    """A vendor's file, YAML or JSON."""
    document: dict[str, Any] = yaml.load(file.read_text(), Loader=_Loader)  # noqa: S506 - a safe loader
    return document
