"""Which saved blocks the parameters of a deployment or a run name, by the types of the flow's parameters."""

from __future__ import annotations

import contextlib
import typing
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from types import UnionType
from typing import Any, get_args, get_origin

from prefect import Flow
from prefect.blocks.core import Block
from pydantic import BaseModel, TypeAdapter, ValidationError

from blocks.reference import NamesBlock

Path = tuple[str | int, ...]


@dataclass(frozen=True)
class BlockReference:
    """A parameter that names a saved block.

    Attributes:
        kind: The slug of the block's type.
        name: As it is written, without that slug.
        path: Where in the parameters.
    """

    kind: str
    name: str
    path: Path

    @property
    def slug(self) -> str:
        """`airbyte-server/airbyte`, as Prefect's commands take it."""
        return f"{self.kind}/{self.name}"


def block_references(flow: Flow[..., Any], parameters: Mapping[str, Any]) -> list[BlockReference]:
    """Every saved block that these parameters name, in the order of the parameters.

    Args:
        flow: Whose parameters they are.
        parameters: As they stand in a file. One that the flow does not take names none: a run with it ends
            before it loads any.
    """
    hints = typing.get_type_hints(flow.fn, include_extras=True)
    found: list[BlockReference] = []
    for name, given in parameters.items():  # one by one: those that a form or a trigger gives are not there
        if name in hints:
            with contextlib.suppress(ValidationError):
                valid = TypeAdapter(hints[name]).validate_python(given)
                found += _within(given, valid, hints[name], (name,))
    return found


class OutOfReach(ValueError):
    """A template writes the name of a block that is to be replaced; the message is the block's slug."""


def with_blocks(
    flow: Flow[..., Any],
    parameters: Mapping[str, Any],
    replaced: Mapping[str, str],
    rendered: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """The same parameters, with other blocks in the place of some.

    Args:
        flow: Whose parameters they are.
        parameters: As they stand in a file.
        replaced: Name in the file, or `type-slug/name` for only those of one type, to the name to use.
        rendered: What the templates in them make of them, on examples; without any there are no templates.

    Raises:
        OutOfReach: A name is not in the parameters, but made by a template.
    """
    changed = deepcopy(dict(parameters))
    if not replaced:
        return changed
    pairs = [(one, found) for one in rendered or [parameters] for found in block_references(flow, one)]
    for meant, found in pairs:
        other = replaced.get(found.slug, replaced.get(found.name))
        if other is None:
            continue
        try:
            written = _at(parameters, found.path)
        except (LookupError, TypeError):
            written = None
        if written != _at(meant, found.path):
            raise OutOfReach(found.slug)
        *way, last = found.path
        _at(changed, way)[last] = other
    return changed


def _at(value: Any, path: Sequence[str | int]) -> Any:
    for step in path:
        value = value[step]
    return value


def _within(given: Any, valid: Any, hint: Any, path: Path) -> Iterator[BlockReference]:
    """Go down what was given along what it means; only the latter knows the types."""
    if isinstance(given, str):
        if isinstance(valid, str) and (kind := _kind(hint)):
            yield BlockReference(kind, given.removeprefix(f"{kind}/"), path)
    elif isinstance(given, Mapping):
        if isinstance(valid, list | tuple) and len(valid) == 1:  # one may be given where many are taken
            valid = valid[0]
        if isinstance(valid, BaseModel):
            fields = type(valid).model_fields
            for name, value in given.items():
                if name in fields:
                    hint = typing.Annotated[fields[name].annotation, None, *fields[name].metadata]
                    yield from _within(value, getattr(valid, name), hint, (*path, name))
        elif isinstance(valid, Mapping):
            for name, value in given.items():
                yield from _within(value, valid.get(name), _inner(hint), (*path, name))
    elif isinstance(given, list | tuple) and isinstance(valid, list | tuple) and len(given) == len(valid):
        for index, (value, meant) in enumerate(zip(given, valid, strict=True)):
            yield from _within(value, meant, _inner(hint), (*path, index))


def _kind(hint: Any) -> str | None:
    """The type of the block that `SomeBlock | str` stands for."""
    for one in _alternatives(hint):
        if isinstance(one, NamesBlock):
            return one.slug
        if isinstance(one, type) and issubclass(one, Block):
            return one.get_block_type_slug()
    return None


def _alternatives(hint: Any) -> Iterator[Any]:
    if get_origin(hint) is typing.Annotated:
        inner, *marks = get_args(hint)
        yield from _alternatives(inner)
        yield from marks
    elif get_origin(hint) in (typing.Union, UnionType):
        for one in get_args(hint):
            yield from _alternatives(one)
    else:
        yield hint


def _inner(hint: Any) -> Any:
    """What a list or a mapping holds."""
    for one in _alternatives(hint):
        if arguments := [each for each in get_args(one) if each is not Ellipsis]:
            return arguments[-1]
    return None
