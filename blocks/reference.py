"""Blocks by name: a flow takes a block or the name of a saved one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from prefect.blocks.core import Block
from prefect.client.orchestration import get_client

BlockT = TypeVar("BlockT", bound=Block)

_loading: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[tuple[type[Block], str], asyncio.Task[Any]]] = (
    WeakKeyDictionary()
)


@dataclass(frozen=True)
class NamesBlock:
    """Says of a parameter that it names a saved block, where its type does not say of which kind.

    Attributes:
        slug: Of the block's type.
    """

    slug: str


class BlockNotFound(ValueError):
    """There is no saved block of this name."""


async def load_block(kind: type[BlockT], reference: BlockT | str) -> BlockT:
    """The block itself, or the saved one of this name: `my-airbyte` or `airbyte-server/my-airbyte`.

    A fan-out of hundreds of tasks asks the API once: what was loaded is kept for as long as the event loop.

    Raises:
        BlockNotFound: With the names that are saved.
    """
    if isinstance(reference, kind):
        return reference
    name = str(reference).removeprefix(f"{kind.get_block_type_slug()}/")
    loading = _loading.setdefault(asyncio.get_running_loop(), {})
    key = (kind, name)
    if key not in loading or (loading[key].done() and _failed(loading[key])):
        loading[key] = asyncio.create_task(_load(kind, name))
    block: BlockT = await asyncio.shield(loading[key])
    return block


def _failed(task: asyncio.Task[Any]) -> bool:
    return task.cancelled() or task.exception() is not None


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
            raise BlockNotFound(f"There is no {kind.get_block_type_name()} block named {name!r}. {others}")
        block: BlockT = await kind.aload(name, client=client)
        return block


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
