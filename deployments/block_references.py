"""Which saved blocks a deployment's parameters name, found by the types of the flow's parameters."""

from __future__ import annotations

import typing
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from types import UnionType
from typing import Any, get_args, get_origin

from prefect import Flow
from prefect.blocks.core import Block
from pydantic import BaseModel, TypeAdapter

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
        parameters: As they stand in a file; those that are there must be valid.
    """
    hints = typing.get_type_hints(flow.fn, include_extras=True)
    return [
        found
        for name, given in parameters.items()
        # One by one: those that a form or a trigger gives are not there.
        for found in _within(given, TypeAdapter(hints[name]).validate_python(given), hints[name], (name,))
    ]


def with_blocks(
    flow: Flow[..., Any], parameters: Mapping[str, Any], replaced: Mapping[str, str]
) -> dict[str, Any]:
    """The same parameters, with other blocks in the place of some.

    Args:
        flow: Whose parameters they are.
        parameters: As they stand in a file.
        replaced: Name in the file, or `type-slug/name` for only those of one type, to the name to use.
    """
    changed = deepcopy(dict(parameters))
    for found in block_references(flow, parameters) if replaced else ():
        other = replaced.get(found.slug, replaced.get(found.name))
        if other is not None:
            *way, last = found.path
            place: Any = changed
            for step in way:
                place = place[step]
            place[last] = other
    return changed


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
