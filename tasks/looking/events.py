"""What all looks have in common: how events are handed over, and how long an identity may be."""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable, Sequence

from tasks.events import EltEvent, HandedOver

HandOver = Callable[[Sequence[EltEvent]], Awaitable[list[HandedOver]]]
"""Hands events over; raises `HandOverError` if the server did not take all of them."""

_LONGEST = 1024  # characters of an event's key and of a resource's id


def bounded(text: str) -> str:
    """An identity as it is; one that is too long is cut off, with a digest of the whole at its end."""
    if len(text) <= _LONGEST:
        return text
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]
    return f"{text[: _LONGEST - len(digest) - 1]}~{digest}"
