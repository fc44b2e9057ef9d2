"""PostgreSQL's LISTEN/NOTIFY, listened to.

A NOTIFY is lost when nobody listens: PostgreSQL keeps none for whoever comes later, and what is in hand when
this process dies is gone. So it is a wake-up and no queue. Where rows with a watermark are given (`watch`),
they are looked at whenever the connection is made anew, after each notification, and from time to time; what
was lost meanwhile is then told as `elt.database.rows.changed`. Of these one process must listen in each
environment: two would look at once, and tell of some rows twice.

Vendor documentation: https://www.postgresql.org/docs/current/sql-notify.html
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any, Literal, cast
from uuid import uuid4

import asyncpg
import httpx
from prefect.client.orchestration import get_client
from prefect_sqlalchemy import SqlAlchemyConnector
from pydantic import Field, ValidationError
from sqlalchemy.engine import URL

from tasks.events import EltEvent
from tasks.looking.events import bounded
from tasks.looking.listener import Batch, ListenError, ListenerSettings, SourceAway, log, saved_block
from tasks.looking.memory import MemoryUnreadable
from tasks.looking.rows import Change, DatabaseError, Rows, RowsLooker

NOTIFIED = "elt.postgres.notified"
_AT_ONCE = 100  # notifications in one hand-over
_WAITING = 10_000  # notifications in hand while the Prefect server is away; what is more, is lost
_PULSE = 30.0  # seconds without a word after which the connection is tried
_WRONG = (
    asyncpg.InvalidAuthorizationSpecificationError,  # also a wrong password
    asyncpg.InvalidCatalogNameError,
    asyncpg.InsufficientPrivilegeError,
    asyncpg.SyntaxOrAccessError,
)
_AWAY = (OSError, asyncpg.PostgresError, asyncpg.InterfaceError, TimeoutError)


class PostgresChannels(ListenerSettings):
    """Channels of a database to listen to."""

    source: Literal["postgres"] = "postgres"
    database: str = Field(min_length=1, description="Name of a saved SQLAlchemy Connector block.")
    channels: list[str] = Field(min_length=1, description="What `LISTEN` is called with.")
    id_field: str | None = Field(
        default=None,
        description="Field of a JSON payload by which a notification is known again, so that two listeners "
        "of the same channel start one run.",
    )
    watch: Rows | None = Field(
        default=None, description="Rows to look at for what was notified while nobody listened."
    )
    look_every: float = Field(default=300.0, ge=1, description="Seconds between two looks at `watch`.")


class PostgresSource:
    """Channels as `listen` takes them.

    Args:
        settings: Which.
        prefix: Of the environment, whose watermark is its own.
    """

    def __init__(self, settings: PostgresChannels, prefix: str = "") -> None:
        self._settings = settings
        self._whose = f"listen {prefix}" if prefix else "listen"
        self._connection: asyncpg.Connection[Any] | None = None
        self._said: asyncio.Queue[tuple[str, str, str]] = asyncio.Queue(_WAITING)
        self._gone = asyncio.Event()
        self._connector: SqlAlchemyConnector | None = None
        self._look_at = 0.0
        self._heard = 0.0
        self._lost = 0

    @property
    def label(self) -> str:
        """What logs call it."""
        return f"postgres {self._settings.name}"

    async def connect(self) -> None:
        """Listen to the channels, on a new connection.

        Raises:
            ListenError: The block, the password or the database is wrong.
            SourceAway: The server is away.
        """
        await self._drop()
        if self._connector is None:
            self._connector = await saved_block(SqlAlchemyConnector, self._settings.database)
        try:
            connection = cast(
                "asyncpg.Connection[Any]",
                await asyncpg.connect(_dsn(self._connector), timeout=20, command_timeout=20),
            )
            self._connection = connection
            self._gone = gone = asyncio.Event()
            connection.add_termination_listener(lambda _: gone.set())
            for channel in self._settings.channels:
                await connection.add_listener(channel, self._notified)
        except _WRONG as error:
            raise ListenError(f"PostgreSQL refused: {_one_line(error)}") from None
        except ValueError as error:
            raise ListenError(f"the address in the block can't be used: {_one_line(error)}") from None
        except _AWAY as error:
            raise SourceAway(f"PostgreSQL can't be reached ({type(error).__name__}).") from None
        self._heard = time.monotonic()
        self._look_at = 0.0  # for what was notified while nobody listened

    async def next(self) -> Batch | None:
        """Notifications, or rows that are new; None when there is neither for a second.

        Raises:
            SourceAway: The connection broke.
        """
        if self._settings.watch is not None and time.monotonic() >= self._look_at:
            return await self._look()
        said = await self._wait()
        if said:
            self._heard = time.monotonic()
            self._look_at = 0.0  # the watermark follows
            return Batch([event for one in said if (event := self._event(*one))])
        if self._gone.is_set():
            raise SourceAway("PostgreSQL has closed the connection; notifications may be lost meanwhile.")
        if time.monotonic() - self._heard > _PULSE:
            await self._pulse()
        return None

    async def keep(self, batch: Batch) -> None:
        """Nothing to do: notifications come in beside."""

    async def done(self, batch: Batch) -> None:
        """Move the watermark, if it was rows.

        Raises:
            SourceAway: The Prefect server can't be reached; the same event is handed over again.
        """
        if isinstance(batch.receipt, Change):
            async with self._looker() as looker:
                await looker.accept(batch.receipt)

    async def release(self, batch: Batch) -> None:
        """A notification can't be given back; rows are found again."""
        if not isinstance(batch.receipt, Change):
            log.warning(
                "%s: %s notifications were not handed over, and PostgreSQL keeps none.",
                self.label,
                len(batch.events),
            )

    async def close(self) -> None:
        """Let go of the connection, and say what was heard and is not handed over any more."""
        await self._drop()
        if waiting := self._said.qsize():
            log.warning("%s: %s more notifications were not handed over.", self.label, waiting)

    def _notified(self, _connection: Any, _pid: int, channel: str, payload: object) -> None:
        try:
            self._said.put_nowait((channel, str(payload), uuid4().hex))
        except asyncio.QueueFull:
            self._lost += 1
            if self._lost & (self._lost - 1) == 0:  # 1, 2, 4, 8 … so that a flood does not flood the log
                log.error("%s: %s notifications lost: too many wait already.", self.label, self._lost)

    async def _wait(self) -> list[tuple[str, str, str]]:
        said = []
        with contextlib.suppress(TimeoutError):
            said.append(await asyncio.wait_for(self._said.get(), 1.0))
        while said and len(said) < _AT_ONCE and not self._said.empty():
            said.append(self._said.get_nowait())
        return said

    async def _pulse(self) -> None:
        # A server that vanished without a word leaves a connection on which nothing ever comes.
        if self._connection is None:
            return
        try:
            await self._connection.execute("SELECT 1")
        except _AWAY as error:
            raise SourceAway(f"PostgreSQL does not answer any more ({type(error).__name__}).") from None
        self._heard = time.monotonic()

    async def _look(self) -> Batch | None:
        async with self._looker() as looker:
            change = await looker.find()
        if change is None:
            self._look_at = time.monotonic() + self._settings.look_every
            return None
        return Batch([change.event], receipt=change)

    @contextlib.asynccontextmanager
    async def _looker(self) -> AsyncIterator[RowsLooker]:
        settings = self._settings
        if settings.watch is None or self._connector is None:
            raise ListenError("there are no rows to look at.")
        try:
            async with get_client() as client:
                yield RowsLooker(settings.name, settings.watch, self._connector, client, whose=self._whose)
        except (DatabaseError, MemoryUnreadable) as error:
            raise SourceAway(f"{_one_line(error).rstrip('.')}.") from None
        except (httpx.HTTPError, RuntimeError) as error:
            raise SourceAway(
                f"the Prefect server, which keeps the watermark, can't be asked ({type(error).__name__})."
            ) from None

    def _event(self, channel: str, payload: str, received: str) -> EltEvent | None:
        try:
            body = json.loads(payload) if payload else None
        except ValueError:
            body = None
        known_by = received
        if self._settings.id_field is not None and isinstance(body, dict):
            known_by = str(body.get(self._settings.id_field) or received)
        name = self._settings.name
        try:
            return EltEvent(
                name=NOTIFIED,
                key=bounded(f"postgres:{name}/{channel}/{known_by}"),
                occurred=datetime.now(UTC),
                resource_id=bounded(f"elt.postgres.channel.{name}.{channel}"),
                resource_name=channel,
                payload={"channel": channel, "text": payload, "body": body},
            )
        except ValidationError:
            log.error("%s: a notification on %s holds what no event can carry.", self.label, channel)
            return None

    async def _drop(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None and not connection.is_closed():
            try:
                await connection.close(timeout=5)
            except _AWAY:
                connection.terminate()


def _dsn(connector: SqlAlchemyConnector) -> str:
    """The block's address as asyncpg takes it: the same for any driver of SQLAlchemy's."""
    info = connector.connection_info
    url: URL = info.create_url() if hasattr(info, "create_url") else connector.get_engine().url
    if url.get_backend_name() != "postgresql":
        raise ValueError(f"the block is for {url.get_backend_name()}, not for PostgreSQL")
    more = {key: str(value) for key, value in (connector.connect_args or {}).items() if key == "sslmode"}
    return url.set(drivername="postgresql").update_query_dict(more).render_as_string(hide_password=False)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
