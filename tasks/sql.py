"""Databases: named by a SQLAlchemy Connector block, spoken to in a thread, and given free again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, TypeVar

from prefect_sqlalchemy import SqlAlchemyConnector
from pydantic import PlainSerializer, WithJsonSchema
from sqlalchemy import Engine, event
from sqlalchemy.exc import SQLAlchemyError

from blocks.reference import NAMED, UNSAVED, block_name, load_block
from tasks.jobs.threads import in_thread

T = TypeVar("T")


def _by_name(database: SqlAlchemyConnector | str) -> str:
    # What is stored with a flow run must hold no secret, and the block's URL is plain text.
    return block_name(database, SqlAlchemyConnector) or UNSAVED


DatabaseRef = Annotated[
    SqlAlchemyConnector | str,
    NAMED,
    PlainSerializer(_by_name, return_type=str),
    # In a form and in a deployment it is the name; instances are for scripts.
    WithJsonSchema({"type": "string", "description": "Name of a saved SQLAlchemy Connector block."}),
]
"""A database, or the name of its block."""


async def with_database(database: DatabaseRef, work: Callable[[Engine], T]) -> T:
    """Do something with a database, in a thread of its own.

    Args:
        database: The block, or the name of a saved one.
        work: What to do. It is not for an async engine. When this is cancelled, the database is asked to stop
            what it does; not every driver can, so work does well to call `check_waiter` before it commits.

    Returns:
        What `work` returns.

    Raises:
        BlockNotFound: The database is the name of a block that is not saved.
        SQLAlchemyError: The database can't be reached or refuses; `reason_of` it is for people.
    """
    # The block keeps an engine, and others may have the same block: this is an engine of our own.
    connector = (await load_block(SqlAlchemyConnector, database)).model_copy()
    connector._engine = None  # noqa: SLF001 - a block has no public way to an engine of one's own
    connections: list[Any] = []

    def note(connection: Any, _: object) -> None:
        connections.append(connection)

    def run() -> T:
        engine = connector.get_engine()
        event.listen(engine, "connect", note)
        try:
            return work(engine)
        finally:
            engine.dispose()  # a DuckDB file that stays open can't be opened by dbt

    def stop() -> None:
        for connection in connections:
            # psycopg's name for it, and that of DuckDB and SQLite; a driver without either is left alone.
            end = getattr(connection, "cancel", None) or getattr(connection, "interrupt", None)
            if end is not None:
                end()

    return await in_thread(run, stop=stop)


def reason_of(error: SQLAlchemyError) -> str:
    """What is wrong, in one line: the driver's words. SQLAlchemy's own quote the statement and an address."""
    return " ".join(str(getattr(error, "orig", None) or error).split())
