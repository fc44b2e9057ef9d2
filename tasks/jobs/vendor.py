"""What most vendors have in common: a client of the account, and requests that say no more than they must."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Hashable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Generic, Protocol, TypeVar


class AccountClient(Protocol):
    """A client that knows the clock of its vendor."""

    def theirs(self, moment: datetime) -> datetime:
        """A moment of our clock on the vendor's."""


ClientT = TypeVar("ClientT", bound=AccountClient)


class AccountVendor(Generic[ClientT]):
    """A vendor whose jobs are run by one shared client of the account. The verbs are a subclass's.

    Args:
        connect: Opens the account's client, or joins in one that is open already.
        account: What makes two vendor objects the same account: they share one watcher.
        block: The name of the saved block (`slug/name`) that a hook in another process can load, or None.
    """

    def __init__(
        self,
        connect: Callable[[], AbstractAsyncContextManager[ClientT]],
        account: Hashable,
        block: str | None,
    ) -> None:
        self._connect = connect
        self._client: ClientT | None = None
        self.account = account
        self.block = block

    @asynccontextmanager
    async def session(self) -> AsyncIterator[None]:
        """Keep the account's client open."""
        async with self._connect() as self._client:
            yield

    def theirs(self, moment: datetime) -> datetime:
        """A moment of our clock on the vendor's, as far as its replies have told it."""
        return self._client.theirs(moment) if self._client else moment

    async def baseline(self, request: Any) -> str | None:
        """Nothing: a job has an id, which tells it from the one before."""
        return None


@dataclass(frozen=True)
class PlainRequest:
    """A request that says no more than what every vendor must know.

    Attributes:
        resource_id: The connection, sync or job definition to run.
        operation: What is done to it.
        name: What a person calls it.
        owner: Who is told when it fails.
    """

    resource_id: str
    operation: str
    name: str
    owner: str | None = None
