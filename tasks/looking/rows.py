"""New rows of a table, by looking at a column that only grows: a time of change, a sequence.

The watermark is the highest value that was handed over, and with it the number of rows from there on, because
rows may still come with that very value: `>` alone would miss them, `>=` alone would tell the last rows again
and again. With `overlap` this holds for values somewhat below it, too: a transaction that began before others
and is committed after them brings rows that are older than the newest.

An event is written down, in the Variable that keeps the watermark, before it is handed over; the watermark is
moved after that. A look that died in between is finished by the next one, with the same event.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import Annotated, Any, Literal

import sqlalchemy as sa
from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import PrefectClient, get_client
from prefect.logging import get_run_logger
from prefect_sqlalchemy import SqlAlchemyConnector
from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema, field_serializer, model_validator
from sqlalchemy.exc import SQLAlchemyError

from blocks.reference import NAMED, UNSAVED, block_name, load_block
from tasks.events import EltEvent, HandOverError, OnceTrigger, hand_over
from tasks.jobs import tag_run, without_traceback
from tasks.looking.events import bounded
from tasks.looking.memory import MemoryUnreadable, VariableState, memory_name, owner

CHANGED = "elt.database.rows.changed"
_BIND = re.compile(r"(?<!:):(?=\w)")  # what SQLAlchemy would take for a parameter


class DatabaseError(Exception):
    """The database can't be asked, or not this. The message is for people and holds no secret."""


class Rows(BaseModel):
    """Which rows are looked at."""

    # pydantic's errors quote what they were given, and that may be a block with its secret.
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    table: str | None = Field(
        default=None, title="Table", description="`orders` or `sales.orders`; or give a query."
    )
    query: str | None = Field(
        default=None,
        title="Query",
        description="In place of a table: a SELECT of the rows that count, with the column among the others.",
    )
    column: str = Field(min_length=1, title="Column", description="Only grows: a time of change, a sequence.")
    start: Literal["now", "beginning"] = Field(
        default="now", title="Start", description="Whether rows that are there at the first look are new."
    )
    overlap: float = Field(
        default=0.0,
        ge=0,
        title="Overlap",
        description="How far below the highest value late rows may come: seconds for times, else a number.",
    )

    @model_validator(mode="after")
    def _one_of_both(self) -> Rows:
        if (self.table is None) == (self.query is None):
            raise ValueError("give either a table or a query")
        return self


class WatchedRows(Rows):
    """Rows of a database, with a name by which their watermark is kept."""

    name: str = Field(
        pattern=r"^[a-z0-9][a-z0-9_-]*$",
        max_length=60,
        title="Name",
        description="What events and the watermark are called by; lower case, `-` and `_`.",
    )
    database: Annotated[
        SqlAlchemyConnector | str,
        NAMED,
        WithJsonSchema({"type": "string", "description": "Name of a saved SQLAlchemy Connector block."}),
    ] = Field(title="Database")

    @field_serializer("database")
    def _by_name(self, database: SqlAlchemyConnector | str) -> str:
        # What is stored with a flow run must hold no secret, and the block's URL is plain text.
        return block_name(database, SqlAlchemyConnector) or UNSAVED


class Value(BaseModel):
    """A value of the column, kept with its type."""

    model_config = ConfigDict(frozen=True)

    kind: Literal["datetime", "date", "int", "float", "decimal", "str"]
    value: str

    @classmethod
    def of(cls, given: Any) -> Value:
        """From the database's own.

        Raises:
            DatabaseError: It is of a type that is no watermark.
        """
        match given:
            case bool():
                pass
            case datetime() | date():
                return cls(
                    kind="datetime" if isinstance(given, datetime) else "date", value=given.isoformat()
                )
            case int() | float() | Decimal() | str():
                kind: Any = type(given).__name__.lower()
                return cls(kind=kind, value=str(given))
        raise DatabaseError(f"the column holds {type(given).__name__}, which can't be a watermark")

    @property
    def python(self) -> Any:
        """As the database takes it."""
        parse: dict[str, Callable[[str], Any]] = {
            "datetime": datetime.fromisoformat,
            "date": date.fromisoformat,
            "int": int,
            "float": float,
            "decimal": Decimal,
            "str": str,
        }
        return parse[self.kind](self.value)

    def below(self, overlap: float) -> Value:
        """The value this much lower.

        Raises:
            DatabaseError: There is no such thing for text.
        """
        if not overlap:
            return self
        if self.kind == "str":
            raise DatabaseError("overlap needs a column of times or numbers; this one holds text")
        given = self.python
        if isinstance(given, date):
            return Value.of(given - timedelta(seconds=overlap))
        return Value.of(given - type(given)(overlap))


class Watermark(BaseModel):
    """Up to where rows were handed over. A person may set it back.

    Attributes:
        began: When the first look was; tells this watermark from one that was deleted.
        events: How many events were made.
        top: The highest value; None while there are no rows.
        floor: From where on rows are counted: `top` less the overlap.
        count: How many rows there were from `floor` to `top`.
        pending: An event that was about to be handed over.
        then: What the watermark is after it.
    """

    began: datetime
    events: int = 0
    top: Value | None = None
    floor: Value | None = None
    count: int = 0
    pending: EltEvent | None = None
    then: Watermark | None = None


@dataclass(frozen=True)
class Change:
    """Rows that are to be handed over, and the watermark after that."""

    event: EltEvent
    then: Watermark

    @property
    def rows(self) -> int:
        """How many."""
        return int(str(self.event.payload["rows"]))


class RowsLook(BaseModel):
    """What one look came to.

    Attributes:
        rows: New rows.
        runs: Flow runs that they have started.
        message: In a sentence.
    """

    model_config = ConfigDict(frozen=True)

    rows: int = 0
    runs: int = 0
    message: str = ""


class RowsLooker:
    """Looks at rows, and keeps the watermark.

    Args:
        name: What they are called.
        rows: Which.
        connector: Their database.
        client: Prefect's client.
        whose: Whose watermark it is; the deployment's by default.
    """

    def __init__(
        self,
        name: str,
        rows: Rows,
        connector: SqlAlchemyConnector,
        client: PrefectClient,
        whose: str | None = None,
    ) -> None:
        self._name = name
        self._rows = rows
        self._connector = connector
        self.variable = memory_name("elt-watermark", name, owner() if whose is None else whose)
        self._state = VariableState(client, self.variable, Watermark)

    async def find(self) -> Change | None:
        """What is new, written down as about to be handed over; None if nothing is.

        Raises:
            DatabaseError: The database can't be asked.
            MemoryUnreadable: The watermark can't be read.
        """
        known = await self._state.read()
        if known is not None and known.pending is not None and known.then is not None:
            return Change(known.pending, known.then)
        if known is None:
            known = Watermark(began=datetime.now(UTC))
            if self._rows.start == "now":
                seen = await self._look(known)
                await self._state.write(seen.then)
                return None
        seen = await self._look(known)
        if seen.top is None or not seen.new:
            if seen.then != known:  # rows were deleted, or the overlap is another
                await self._state.write(seen.then)
            return None
        then = seen.then.model_copy(update={"events": known.events + 1})
        change = Change(self._event(known, then, seen.new), then)
        await self._state.write(known.model_copy(update={"pending": change.event, "then": then}))
        return change

    async def accept(self, change: Change) -> None:
        """Move the watermark: the event was handed over."""
        await self._state.write(change.then)

    async def _look(self, known: Watermark) -> _Seen:
        try:
            return await asyncio.to_thread(self._ask, known)
        except SQLAlchemyError as error:
            # Its own text quotes the query and an address; the driver's says what is wrong.
            reason = " ".join(str(getattr(error, "orig", None) or error).split())
            raise DatabaseError(f"the rows {self._name} can't be looked at: {reason[:300]}") from None

    def _ask(self, known: Watermark) -> _Seen:
        column: sa.ColumnClause[Any] = sa.column(self._rows.column)
        rows = self._source(column)
        engine = self._connector.get_engine()
        try:
            with engine.connect() as connection:
                from_floor = [] if known.floor is None else [column >= known.floor.python]
                highest = connection.execute(
                    sa.select(sa.func.max(column)).select_from(rows).where(*from_floor)
                )
                if (found := highest.scalar()) is None:
                    return _Seen(None, 0, known)
                top = Value.of(found)
                floor = top.below(self._rows.overlap)
                # Both counts in one statement, so that a row that comes now is in both or in neither.
                both = sa.select(_count_from(column, known.floor), _count_from(column, floor))
                # The new floor is the lower one where the overlap was made larger.
                lowest = min(floor.python, known.floor.python) if known.floor else None
                within = [column <= top.python, *([] if lowest is None else [column >= lowest])]
                total, after = connection.execute(both.select_from(rows).where(*within)).one()
        finally:
            engine.dispose()  # a DuckDB file that stays open can't be opened by dbt
        grown = known.top is None or top.python > known.top.python
        new = max(int(total) - known.count, 1 if grown else 0)
        then = known.model_copy(update={"top": top, "floor": floor, "count": int(after)})
        return _Seen(top, new, then)

    def _source(self, column: sa.ColumnClause[Any]) -> sa.FromClause:
        if self._rows.query is not None:
            query = _BIND.sub(r"\\:", self._rows.query.strip().rstrip(";"))
            return sa.text(query).columns(column).subquery("watched")
        schema, _, table = str(self._rows.table).rpartition(".")
        return sa.table(table, column, schema=schema or None)

    def _event(self, known: Watermark, then: Watermark, rows: int) -> EltEvent:
        before = known.top.value if known.top else None
        after = then.top.value if then.top else None
        return EltEvent(
            name=CHANGED,
            key=bounded(
                f"rows:{self.variable}@{known.began.isoformat()}/{then.events}:{before}/{known.count}"
                f"..{after}/{then.count}"
            ),
            occurred=datetime.now(UTC),
            resource_id=f"elt.database.rows.{self._name}",
            resource_name=self._name,
            payload={
                "name": self._name,
                "table": self._rows.table,
                "column": self._rows.column,
                "from": before,
                "to": after,
                "rows": rows,
            },
        )


@dataclass(frozen=True)
class _Seen:
    top: Value | None
    new: int
    then: Watermark


def _count_from(column: sa.ColumnClause[Any], floor: Value | None) -> sa.ColumnElement[int]:
    counted = sa.literal(1) if floor is None else sa.case((column >= floor.python, 1), else_=0)
    return sa.func.coalesce(sa.func.sum(counted), 0)


@task(name="database-rows", task_run_name="look at {what.name}", cache_policy=NO_CACHE)
async def look_at_rows(what: WatchedRows, triggers: Sequence[OnceTrigger]) -> RowsLook:
    """Hand over that rows are new, once, and then move the watermark.

    Args:
        what: Which rows.
        triggers: Which deployments are started by them.

    Returns:
        What came of it.

    Raises:
        DatabaseError: The database can't be asked.
        HandOverError: The Prefect server did not take everything. The next look hands over the same event.
        MemoryUnreadable: The watermark can't be read.
        BlockNotFound: The database is the name of a block that is not saved.
    """
    tag_run("database")
    without_traceback(DatabaseError, HandOverError, MemoryUnreadable)
    log = get_run_logger()
    connector = await load_block(SqlAlchemyConnector, what.database)
    async with get_client() as client:
        looker = RowsLooker(what.name, what, connector, client)
        change = await looker.find()
        if change is None:
            look = RowsLook(message=f"no new rows in {what.name}")
        else:
            (taken,) = await hand_over([change.event], triggers, client)
            await looker.accept(change)
            if not taken.runs:
                log.warning("No run was started: no once_triggers of a deployment cover this event.")
            upto = f"up to {change.event.payload['to']}"
            look = RowsLook(
                rows=change.rows,
                runs=len(taken.runs),
                message=f"{change.rows:,} new rows in {what.name}, {upto}, {len(taken.runs)} runs",
            )
    log.info("%s; the watermark is the Variable %s", look.message, looker.variable)
    return look
