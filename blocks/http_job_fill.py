"""Placeholders in declared requests, and paths into replies.

A placeholder is `{name}`; a brace itself is written twice. A path is a JMESPath expression
(https://jmespath.org), so that a state can be worked out of several fields of a reply.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from typing import Annotated, Any
from urllib.parse import quote

import jmespath
from jmespath.exceptions import JMESPathError
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue

Value = str | int | float | bool
Values = Mapping[str, Value]

_PLACEHOLDER = re.compile(r"\{\{|\}\}|\{([A-Za-z_][A-Za-z0-9_]*)\}|[{}]")


class Part(BaseModel):
    """What all parts of a declaration have in common."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)


# -- placeholders ------------------------------------------------------------------------------------------


def names_in(template: JsonValue) -> set[str]:
    """The names of the placeholders in a text, or in all the texts of a document.

    Raises:
        ValueError: There is a brace that belongs to no placeholder.
    """
    if isinstance(template, str):
        for found in _PLACEHOLDER.finditer(template):
            if found.group() in ("{", "}"):
                raise ValueError(f"{template!r} has a brace that belongs to no placeholder; write it twice.")
        return {found.group(1) for found in _PLACEHOLDER.finditer(template) if found.group(1)}
    parts = (
        template.values() if isinstance(template, dict) else template if isinstance(template, list) else ()
    )
    return set().union(*map(names_in, parts))


def fill(template: str, values: Values) -> str:
    """A text with its placeholders replaced."""
    return _PLACEHOLDER.sub(lambda found: _text(values[found[1]]) if found[1] else found[0][0], template)


def fill_path(template: str, values: Values) -> str:
    """A path with its placeholders replaced, each as one segment whatever is in it."""
    return fill(template, {name: quote(_text(value), safe="") for name, value in values.items()})


def fill_document(template: JsonValue, values: Values) -> Any:
    """A document with its placeholders replaced; a text that is one placeholder becomes the value itself."""
    if isinstance(template, dict):
        return {key: fill_document(value, values) for key, value in template.items()}
    if isinstance(template, list):
        return [fill_document(value, values) for value in template]
    if not isinstance(template, str):
        return template
    whole = _PLACEHOLDER.fullmatch(template)
    return values[whole[1]] if whole and whole[1] else fill(template, values)


def _text(value: Value) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


# -- paths into replies ------------------------------------------------------------------------------------


def _check_path(expression: str) -> str:
    try:
        with warnings.catch_warnings():
            # `active` for 'active' is out of use, and a likely slip: in backquotes stands JSON.
            warnings.simplefilter("error", PendingDeprecationWarning)
            parsed = jmespath.compile(expression).parsed
    except PendingDeprecationWarning:
        raise ValueError(f"{expression!r}: a text is written 'so'; in backquotes stands JSON.") from None
    except JMESPathError as error:
        reason = str(error).split("\n", 1)[0]
        raise ValueError(f"{expression!r} is not a JMESPath expression: {reason}") from None
    if parsed["type"] in ("literal", "identity"):
        raise ValueError(f"{expression!r} says the same of every reply; name the field that is to be read.")
    return expression


JmesPath = Annotated[str, Field(min_length=1), AfterValidator(_check_path)]
"""A JMESPath expression that is known to compile."""


def search(expression: str | None, document: Any) -> Any:
    """What an expression finds; None where it finds nothing or does not fit the document."""
    if expression is None:
        return None
    try:
        return jmespath.search(expression, document)
    except JMESPathError:  # a function was given a null, for example
        return None


def _check_pattern(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is not a regular expression: {error}") from None
    return pattern


Pattern = Annotated[str, AfterValidator(_check_pattern)]
