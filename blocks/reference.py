"""Blocks by name: a flow takes a block or the name of a saved one.

What can be wrong with it:

- `BlockError`
  - `BlockNotFound`: none of this name is saved
  - `BlockUnusable`: it is saved, and not filled in as its type needs it
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from prefect.blocks.core import Block
from prefect.client.orchestration import get_client
from pydantic import BeforeValidator, ValidationError

from blocks.fields import MASKED_GUIDANCE

BlockT = TypeVar("BlockT", bound=Block)

_KEPT = 60.0  # seconds for which a loaded block is good; then its key may be another


@dataclass(frozen=True)
class _Loading:
    began: float
    task: asyncio.Task[Any]

    def serves(self, now: float) -> bool:
        if not self.task.done():
            return True
        return now - self.began < _KEPT and not self.task.cancelled() and self.task.exception() is None


_loading: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[tuple[type[Block], str], _Loading]] = (
    WeakKeyDictionary()
)


@dataclass(frozen=True)
class NamesBlock:
    """Says of a parameter that it names a saved block, where its type does not say of which kind.

    Attributes:
        slug: Of the block's type.
    """

    slug: str


class BlockError(ValueError):
    """A block can't be had by this name. The message is for people and holds no secret."""


class BlockNotFound(BlockError):
    """There is no saved block of this name."""


class BlockUnusable(BlockError):
    """The saved block of this name is not filled in as its type needs it."""


# What Prefect takes for the name of a block, and before it the slug of its type.
_REFERENCE = re.compile(r"(?:[a-z0-9-]+/)?[a-z0-9-]+")
_NO_NAME = (
    "Give the name of a saved block, such as on-call: a name holds only a-z, 0-9 and dashes. What was given "
    "is not repeated here, for it may be a URL or a key that nobody is to read; those belong into a block."
)
UNSAVED = "(a block that is not saved)"
"""What stands in a flow run's parameters for a block that has no name."""

_KEY_LENGTH, _KEY_DIGITS = 20, 6  # from which on what may be a name may be a key as well


def _check_reference(given: Any) -> Any:
    if isinstance(given, str) and given != UNSAVED and not _REFERENCE.fullmatch(given):
        raise ValueError(_NO_NAME)
    return given


NAMED = BeforeValidator(_check_reference)
"""Of `SomeBlock | str`: refuses a text that can't be a block's name, without repeating it.

A webhook's URL that is pasted where its block's name belongs would else be told to everybody who is told
that there is no such block.
"""


async def load_block(kind: type[BlockT], reference: BlockT | str) -> BlockT:
    """The block itself, or the saved one of this name: `my-airbyte` or `airbyte-server/my-airbyte`.

    A fan-out of hundreds of tasks asks the API once: what was loaded is kept for a minute. Not for as long as
    the event loop, for in a process that serves flows for weeks a key is changed meanwhile.

    Raises:
        BlockNotFound: With the names that are saved. What can't be a name, or may be a key, is not repeated.
        BlockUnusable: It is not filled in as it must be.
    """
    if isinstance(reference, kind):
        return reference
    if reference == UNSAVED:
        raise BlockNotFound(f"The parameters hold {UNSAVED}. {MASKED_GUIDANCE}")
    if not _REFERENCE.fullmatch(str(reference)):
        raise BlockNotFound(_NO_NAME)
    name = str(reference).removeprefix(f"{kind.get_block_type_slug()}/")
    loop = asyncio.get_running_loop()
    loading = _loading.setdefault(loop, {})
    found = loading.get((kind, name))
    if found is None or not found.serves(loop.time()):
        found = loading[kind, name] = _Loading(loop.time(), asyncio.create_task(_load(kind, name)))
    block: BlockT = await asyncio.shield(found.task)
    return block


async def _load(kind: type[BlockT], name: str) -> BlockT:
    slug = kind.get_block_type_slug()
    async with get_client() as client:
        # Block.load's own error ("Unable to find block document …") is the same for every cause.
        saved = {
            document.name
            for document in await client.read_block_documents_by_type(slug)
            if document.name and not document.is_anonymous
        }
        if name not in saved:
            others = f"Saved are: {', '.join(sorted(saved))}." if saved else "None is saved yet."
            called = "of the name that was given" if _may_be_key(name) else f"named {name!r}"
            raise BlockNotFound(f"There is no {kind.get_block_type_name()} block {called}. {others}")
        try:
            block: BlockT = await kind.aload(name, client=client)
        except RuntimeError as error:
            if not isinstance(error.__cause__, ValidationError):
                raise
            # Prefect's own advice is to load it without validation, which helps nobody here.
            raise BlockUnusable(
                f"The {kind.get_block_type_name()} block {name!r} can't be used: "
                f"{_wrong_fields(kind, error.__cause__)}. Mend it in Prefect, under Blocks."
            ) from None
        return block


def _wrong_fields(kind: type[Block], refused: ValidationError) -> str:
    ours = kind.__module__.partition(".")[0] == __name__.partition(".")[0]
    wrong: dict[str, None] = {}  # without repeats, in their order
    for one in refused.errors(include_url=False, include_input=False, include_context=False):
        field = ".".join(str(step) for step in one["loc"]) or "its fields"
        # What the checks of other packages' blocks say may quote the secret that they refuse.
        said = one["msg"] if ours or one["type"] not in ("value_error", "assertion_error") else "Not valid"
        wrong[f"{field}: {said.removeprefix('Value error, ').rstrip('.')}"] = None
    return "; ".join(wrong)


def _may_be_key(name: str) -> bool:
    return len(name) >= _KEY_LENGTH and sum(character.isdigit() for character in name) >= _KEY_DIGITS


def block_name(block: Block | str, kind: type[Block]) -> str | None:
    """`slug/name` of a saved block, by which another process can load it; None for one that is not saved."""
    name = block if isinstance(block, str) else block._block_document_name  # noqa: SLF001 - no public way
    return f"{kind.get_block_type_slug()}/{name.rsplit('/', 1)[-1]}" if name else None


def stored_block(block: Block | str, kind: type[Block], handler: Callable[[Any], Any]) -> Any:
    """What is stored of a block in a flow run's parameters: its name, or its fields without the secrets.

    Args:
        block: The block or its name.
        kind: Its class.
        handler: How pydantic would write it.
    """
    if isinstance(block, kind) and (name := block_name(block, kind)):
        return name
    stored = handler(block)
    if isinstance(stored, dict):
        # To read this one back, Prefect imports every collection that is installed, which takes seconds.
        stored.pop("block_type_slug", None)
    return stored
