"""A PostgreSQL server out of a wheel, with the sources of the stage loaded into it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psycopg2
import pytest

from deployments import server
from sandbox import catalog
from sandbox.warehouse import Warehouse

_AIRBYTE_COLUMNS = """
    _airbyte_raw_id text DEFAULT gen_random_uuid()::text,
    _airbyte_extracted_at timestamptz DEFAULT now(),
    _airbyte_meta jsonb DEFAULT '{}',
    _airbyte_generation_id bigint DEFAULT 1
"""


class Postgres:
    """A server on a unix socket, and how dbt and psycopg2 reach it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def env(self) -> dict[str, str]:
        """What the sandbox project's profile reads."""
        return {"ELT_PG_HOST": str(self.folder), "ELT_WAREHOUSE": "unused"}

    def execute(self, statement: str) -> list[tuple[Any, ...]]:
        with closing(self.connect()) as connection, connection, connection.cursor() as cursor:
            cursor.execute(statement)
            return cursor.fetchall() if cursor.description else []

    def connect(self) -> Any:
        return psycopg2.connect(host=str(self.folder), user="postgres", dbname="postgres")

    def load(self, sources: Path) -> None:
        """Every source as a loader leaves it that keeps all as text."""
        files = Warehouse(sources / "unused.duckdb", sources)
        with closing(self.connect()) as connection, connection, connection.cursor() as cursor:
            for spec in catalog.CONNECTIONS:
                stream = spec.stream
                names = ", ".join(f'"{name}"' for name in stream.columns)
                columns = ", ".join(f'"{name}" text' for name in stream.columns)
                cursor.execute(f"CREATE SCHEMA {stream.schema}")
                cursor.execute(f"CREATE TABLE {stream.table} ({columns}, {_AIRBYTE_COLUMNS})")
                copy = f"COPY {stream.table} ({names}) FROM STDIN (FORMAT csv, HEADER, NULL 'NA')"
                with files.source_file(stream).open() as rows:
                    cursor.copy_expert(copy, rows)


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    # Not in pytest's own folder: started by root, the server runs as another user, who may not enter it.
    with TemporaryDirectory(prefix="elt-flows-pg-") as name:
        Path(name).chmod(0o755)
        with server.Postgres(Path(name) / "postgres", durable=False) as running:
            yield Postgres(running.socket_folder)
