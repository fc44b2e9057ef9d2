"""New rows by looking, and PostgreSQL's NOTIFY by listening."""

# ruff: noqa: S608 - the names in the statements are the tests' own

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any
from uuid import uuid4

import pytest
from prefect.client.schemas.actions import VariableUpdate
from prefect_sqlalchemy import ConnectionComponents, SqlAlchemyConnector, SyncDriver
from pydantic import ValidationError

from deployments.listen import source_of
from flows import looking
from flows.looking import database_changes
from tasks.events import EltEvent, HandedOver, HandOverError
from tasks.looking import rows
from tasks.looking.listener import ListenError, listen
from tasks.looking.memory import MemoryUnreadable, memory_name
from tasks.looking.postgres import NOTIFIED, PostgresChannels, PostgresSource
from tasks.looking.rows import CHANGED, DatabaseError, RowsLook, WatchedRows, look_at_rows
from tests.jobs_fixtures import PREFECTS_SOCKETS, collected
from tests.looking_fixtures import Child, Listening, Target, child, listening, target
from tests.postgres_fixtures import Postgres, postgres

__all__ = ["child", "collected", "listening", "postgres", "target"]

pytestmark = [
    *PREFECTS_SOCKETS,
    # Prefect's, on every line that a task outside of a flow logs.
    pytest.mark.filterwarnings("ignore:.*without a flow run id:UserWarning"),
]


def connector(server: Postgres, **more: Any) -> SqlAlchemyConnector:
    return SqlAlchemyConnector(
        connection_info=ConnectionComponents(
            driver=SyncDriver.POSTGRESQL_PSYCOPG2,
            username="postgres",
            database="postgres",
            query={"host": str(server.folder)},
        ),
        **more,
    )


class Table:
    """A table of its own, and what looks at it find."""

    def __init__(self, server: Postgres, target: Target) -> None:
        self.server, self.target, self.name = server, target, f"orders_{uuid4().hex[:8]}"
        server.execute(f"CREATE TABLE {self.name} (id int, changed timestamptz)")

    def add(self, *ids: int, at: str = "2026-11-21 06:00:00.123456+00") -> None:
        values = ", ".join(f"({n}, '{at}')" for n in ids)
        self.server.execute(f"INSERT INTO {self.name} VALUES {values}")

    async def look(self, **what: Any) -> RowsLook:
        said = {"name": self.name, "database": connector(self.server), "column": "id"}
        said |= {} if "query" in what else {"table": f"public.{self.name}"}
        return await look_at_rows(WatchedRows(**{**said, **what}), [self.target.trigger(CHANGED)])

    @property
    def variable(self) -> str:
        return memory_name("elt-watermark", self.name, "script")

    def told(self) -> list[tuple[Any, Any, int]]:
        """From, to and rows of each run's event, in the order of their ends."""
        found = [(p["from"], p["to"], p["rows"]) for p in self.target.payloads()]
        return sorted(found, key=lambda one: (len(one[1]), one[1], one[2]))


@pytest.fixture
def table(postgres: Postgres, target: Target) -> Table:
    return Table(postgres, target)


# -- rows


async def test_new_rows_are_told_once(table: Table) -> None:
    """From the first look on, each look tells the rows since the one before."""
    table.add(1, 2)
    assert (await table.look()).rows == 0
    assert (await table.look()).rows == 0
    table.add(3, 4, 5)
    look = await table.look()
    assert (look.rows, look.runs) == (3, 1)
    assert (await table.look()).rows == 0
    table.add(6)
    await table.look()
    assert table.told() == [("2", "5", 3), ("5", "6", 1)]


async def test_from_the_beginning(table: Table) -> None:
    """Asked to, the first look tells what is there; an empty table becomes one with rows."""
    assert (await table.look(start="beginning")).rows == 0
    table.add(1, 2)
    assert (await table.look(start="beginning")).rows == 2
    assert table.told() == [(None, "2", 2)]


async def test_empty_at_first(table: Table) -> None:
    """All rows of a table that was empty at the first look are new."""
    await table.look()
    table.add(1, 2)
    assert (await table.look()).rows == 2


async def test_late_rows_with_the_same_value(table: Table) -> None:
    """Rows that come with the very watermark are not missed, and those before are not told again."""
    await table.look(column="changed")
    table.add(1, 2)
    assert (await table.look(column="changed")).rows == 2
    table.add(3)
    assert (await table.look(column="changed")).rows == 1
    assert (await table.look(column="changed")).rows == 0
    assert len(table.told()) == 2


async def test_late_rows_below_the_watermark(table: Table) -> None:
    """With an overlap, rows that are committed late are told; without one they are not."""
    table.add(1, at="2026-11-21 06:00:00+00")
    plain, wide = {"column": "changed"}, {"column": "changed", "name": f"w{table.name}", "overlap": 60}
    await table.look(**plain)
    await table.look(**wide)
    table.add(2, at="2026-11-21 05:59:30+00")
    table.add(3, at="2026-11-21 05:58:30+00")
    assert (await table.look(**plain)).rows == 0
    assert (await table.look(**wide)).rows == 1
    table.add(4, at="2026-11-21 06:05:00+00")
    assert (await table.look(**wide)).rows == 1
    assert (await table.look(**{**wide, "overlap": 3600})).rows == 0
    table.add(5, at="2026-11-21 05:40:00+00")
    assert (await table.look(**{**wide, "overlap": 3600})).rows == 1


async def test_deleted_rows_hide_no_new_ones(table: Table) -> None:
    """Rows that were deleted are not counted against those that come later."""
    table.add(7, 7, 7)
    await table.look()
    table.server.execute(f"DELETE FROM {table.name}")
    table.add(7)
    assert (await table.look()).rows == 0
    table.add(7)
    assert (await table.look()).rows == 1


async def test_query_in_place_of_a_table(table: Table) -> None:
    """Only the rows of the query count; its colons and quotes are its own."""
    query = (
        f"SELECT id, 'a :b'::text AS t FROM {table.name} WHERE id % 2 = 0 AND changed::date > '2000-01-01';"
    )
    await table.look(query=query)
    table.add(1, 2, 3, 4)
    assert (await table.look(query=query)).rows == 2


async def test_watermark_is_moved_after_the_hand_over(table: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hand-over that the server did not take is done again, with the same event, whatever came since."""
    await table.look()
    table.add(1)
    real = rows.hand_over

    async def lost(events: Sequence[EltEvent], *more: Any) -> list[HandedOver]:
        await real(events, *more)
        raise HandOverError("the Prefect server can't be reached")

    with monkeypatch.context() as patch:
        patch.setattr(rows, "hand_over", lost)
        with pytest.raises(HandOverError):
            await table.look()
    table.add(2)
    assert (await table.look()).rows == 1
    assert (await table.look()).rows == 1
    assert table.told() == [(None, "1", 1), ("1", "2", 1)]


async def test_watermark_can_be_set_back(table: Table) -> None:
    """Whoever sets the Variable back has the rows told again, as a new event."""
    await table.look()
    table.add(1, 2)
    await table.look()
    variable = table.target.client.read_variable_by_name(table.variable)
    assert variable is not None
    one = {"kind": "int", "value": "1"}
    value = {**variable.value, "top": one, "floor": one, "count": 1}  # type: ignore[dict-item]
    table.target.client.update_variable(VariableUpdate(name=table.variable, value=value))
    await table.look()
    assert table.told() == [("1", "2", 1), (None, "2", 2)]
    table.target.client.update_variable(VariableUpdate(name=table.variable, value="yesterday"))
    with pytest.raises(MemoryUnreadable, match=f"{table.variable} holds no watermark"):
        await table.look()


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ({"table": "nowhere"}, 'relation "nowhere" does not exist'),
        ({"column": "nothing"}, "nothing does not exist"),
        ({"query": "SELECT true AS id"}, "function max\\(boolean\\) does not exist"),
        ({"query": "SELECT ARRAY[1] AS id"}, "holds list"),
        ({"query": "SELECT 'a' AS id", "overlap": 1}, "this one holds text"),
    ],
)
async def test_what_cannot_be_looked_at_is_said(table: Table, what: dict[str, Any], said: str) -> None:
    """The database's own reason, in one line."""
    with pytest.raises(DatabaseError, match=said):
        await table.look(**what)


async def test_server_away_is_said(table: Table) -> None:
    """A database that can't be reached is said without the password."""
    away = SqlAlchemyConnector(
        connection_info=ConnectionComponents(
            driver=SyncDriver.POSTGRESQL_PSYCOPG2,
            username="u",
            password="hush-hush",
            host="127.0.0.1",
            port=9,
            database="d",
        )
    )
    with pytest.raises(DatabaseError, match="refused") as caught:
        await table.look(database=away)
    assert "hush" not in str(caught.value)


@pytest.mark.no_server
@pytest.mark.parametrize("what", [{}, {"table": "a", "query": "b"}, {"table": "a", "name": "A b"}])
def test_wrong_settings_are_refused(what: dict[str, Any]) -> None:
    """A table or a query, and a name that a Variable may have."""
    with pytest.raises(ValidationError):
        WatchedRows(**{"name": "orders", "database": "warehouse", "column": "id", **what})


def test_flow_says_what_it_found(table: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    """The deployment's flow says in its state what came of the look."""
    monkeypatch.setattr(looking, "triggers_here", lambda _: (table.target.trigger(CHANGED),))
    connector(table.server).save("looked-at", overwrite=True)
    what = WatchedRows(name=table.name, database="looked-at", table=table.name, column="id")
    states = []
    for n in (1, 2, 3):
        states.append(database_changes(what, ["here"], return_state=True).name)
        if n == 1:
            table.add(1)
    assert states == ["NothingNew", "HandedOver", "NothingNew"]


_LOOK = """
import asyncio, sys
from tasks.events import OnceTrigger
from tasks.looking.rows import RowsLooker, WatchedRows, look_at_rows
database, name, trigger = sys.argv[1:]
async def never(self, change):
    await asyncio.sleep(600)
RowsLooker.accept = never
what = WatchedRows(name=name, database=database, table=name, column="id")
asyncio.run(look_at_rows(what, [OnceTrigger.model_validate_json(trigger)]))
"""


def test_killed_between_hand_over_and_watermark(
    table: Table, child: Callable[..., Child], block: str
) -> None:
    """Killed there, the next look hands over the same event, and the rows since in one of their own."""
    asyncio.run(table.look())
    table.add(1, 2)
    looking = child("-c", _LOOK, block, table.name, table.target.trigger(CHANGED).model_dump_json())
    looking.until("the run is there", lambda: len(table.target.runs()) == 1)
    looking.kill()
    table.add(3)
    for new in (2, 1, 0):
        assert asyncio.run(table.look()).rows == new
    assert table.told() == [(None, "2", 2), ("2", "3", 1)]


# -- NOTIFY


@pytest.fixture
def block(postgres: Postgres, prefect_server: str) -> str:
    connector(postgres).save("listened-to", overwrite=True)
    return "listened-to"


@pytest.fixture
def channel() -> str:
    return f"orders_{uuid4().hex[:8]}"


def listener(block: str, channel: str, **more: Any) -> dict[str, Any]:
    return {"source": "postgres", "name": channel, "database": block, "channels": [channel], **more}


def backends(server: Postgres, channel: str) -> list[int]:
    """The connections that listen to a channel."""
    found = server.execute(f"SELECT pid FROM pg_stat_activity WHERE query LIKE 'LISTEN%{channel}%'")
    return [pid for (pid,) in found]


def told(target: Target) -> list[Any]:
    return sorted(payload["body"]["n"] for payload in target.payloads())


def test_notified_and_reconnected(
    postgres: Postgres, target: Target, listening: Listening, block: str, channel: str
) -> None:
    """Each notification starts a run, also after the connection was cut; SIGTERM ends it cleanly."""
    running = listening.start(listener(block, channel, id_field="n"), NOTIFIED)
    running.until("it listens", lambda: bool(backends(postgres, channel)))

    def notified(n: int) -> bool:
        # Sent again until it is told, under the same id: a LISTEN is shown before it has effect.
        postgres.execute(f"""NOTIFY {channel}, '{{"n": {n}}}'""")
        return n in told(target)

    running.until("one is told", lambda: notified(1))
    (before,) = backends(postgres, channel)
    postgres.execute(f"SELECT pg_terminate_backend({before})")
    running.until("it listens again", lambda: backends(postgres, channel) not in ([], [before]))
    running.until("the other is told", lambda: notified(2))
    assert running.terminate() == 0
    assert told(target) == [1, 2]
    assert target.payloads()[0]["channel"] == channel
    assert "closed the connection" in running.log.read_text()


def test_what_nobody_heard_is_looked_for(
    postgres: Postgres, target: Target, listening: Listening, block: str, channel: str
) -> None:
    """Killed and started again, it finds by the watermark what was notified meanwhile."""
    postgres.execute(f"CREATE TABLE {channel} (id int)")
    watching = listener(block, channel, watch={"table": channel, "column": "id"})
    first = listening.start(watching, CHANGED)
    variable = memory_name("elt-watermark", channel, "listen")
    first.until("it has looked", lambda: target.client.read_variable_by_name(variable) is not None)
    first.until("it listens", lambda: bool(backends(postgres, channel)))
    postgres.execute(f"INSERT INTO {channel} VALUES (1); NOTIFY {channel}")
    first.until("it is told", lambda: len(target.runs()) == 1)
    first.kill()
    postgres.execute(f"INSERT INTO {channel} VALUES (2), (3); NOTIFY {channel}")
    second = listening.start(watching, CHANGED)
    second.until("the rest is told", lambda: len(target.runs()) == 2)
    assert second.terminate() == 0
    payloads = target.payloads()
    assert sorted((payload["to"], payload["rows"]) for payload in payloads) == [("1", 1), ("3", 2)]


async def test_environments_have_watermarks_of_their_own(
    postgres: Postgres, prefect_server: str, block: str, channel: str
) -> None:
    """What was told in dev is told in production as well, whoever was the first to look."""
    postgres.execute(f"CREATE TABLE {channel} (id int)")
    settings = PostgresChannels(**listener(block, channel, watch={"table": channel, "column": "id"}))
    told: list[EltEvent] = []
    sources = [source_of(settings, prefix) for prefix in ("", "dev.")]
    for source in sources:
        await source.connect()
        assert await source.next() is None  # the first look only remembers
        await source.close()
    await asyncio.to_thread(postgres.execute, f"INSERT INTO {channel} VALUES (1), (2)")
    for source in sources:
        await source.connect()
        batch = await source.next()
        assert batch is not None
        told += batch.events
        await source.done(batch)
        await source.close()
    assert [(event.payload["to"], event.payload["rows"]) for event in told] == [("2", 2)] * 2
    assert len({event.id for event in told}) == 2


async def test_known_by_its_own_id(postgres: Postgres, target: Target, block: str, channel: str) -> None:
    """Two listeners of one channel start one run where the payload has an id."""
    stop, handed = asyncio.Event(), []

    async def hand(events: Sequence[EltEvent]) -> list[HandedOver]:
        handed.extend(events)
        return [HandedOver(event_id=event.id) for event in events]

    settings = PostgresChannels(**listener(block, channel, id_field="order"))
    async with asyncio.TaskGroup() as group:
        for _ in range(2):
            group.create_task(listen(PostgresSource(settings), hand, stop))
        async with asyncio.timeout(60):
            while len(await asyncio.to_thread(backends, postgres, channel)) < 2:  # noqa: ASYNC110 - a server
                await asyncio.sleep(0.05)
            for payload in ('{"order": 7}', '{"order": 7}', "plain", ""):
                await asyncio.to_thread(postgres.execute, f"NOTIFY {channel}, '{payload}'")
            while len(handed) < 8:  # noqa: ASYNC110 - as above
                await asyncio.sleep(0.05)
        stop.set()
    assert len({event.id for event in handed if event.payload["body"]}) == 1
    assert len({event.id for event in handed if not event.payload["body"]}) == 4


@pytest.mark.parametrize(
    ("database", "said"), [("none-such", "'none-such'"), ("lite", "for sqlite, not for PostgreSQL")]
)
async def test_wrong_block_is_said_at_once(
    prefect_server: str, channel: str, database: str, said: str
) -> None:
    """A block that is not there, or of another database, ends the listener."""
    lite = ConnectionComponents(driver=SyncDriver.SQLITE_PYSQLITE, database=":memory:")
    await SqlAlchemyConnector(connection_info=lite).save("lite", overwrite=True)
    source = PostgresSource(PostgresChannels(**listener(database, channel)))
    with pytest.raises(ListenError, match=said):
        await listen(source, rows.hand_over, asyncio.Event())  # type: ignore[arg-type]
