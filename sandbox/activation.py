"""What the activation tools' syncs have in common: they read a model's table and send what has changed."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from itertools import islice

import duckdb

from sandbox.timeline import Work
from sandbox.warehouse import Interrupted, Warehouse, WarehouseLocked


@dataclass(slots=True)
class Change:
    """What a run finds in its model's table, against what the destination has already.

    Rows are known by their hash alone, so a changed row is one that is gone and one that is new.
    """

    rows: Counter[int] = field(default_factory=Counter)
    added: Counter[int] = field(default_factory=Counter)
    removed: int = 0

    @classmethod
    def between(cls, before: Counter[int], now: Counter[int]) -> Change:
        """From what the destination has to what the table holds."""
        return cls(now, now - before, (before - now).total())

    def delivered(self, rejected: int) -> Counter[int]:
        """What the destination has after the run: rejected rows are sent again by the next one."""
        return self.rows - Counter(islice(self.added.elements(), rejected))


def read_model(warehouse: Warehouse, table: str, work: Work, before: Counter[int]) -> Change:
    """Query a model's table; where that fails, `work.error` says why and nothing has changed."""
    try:
        hashes = warehouse.hashes(table, work.cancelled)
    except (Interrupted, duckdb.InterruptException):
        return Change()  # the run was cut short: nobody will ask for its rows
    except (WarehouseLocked, duckdb.Error) as exc:
        work.error = f"Query failed: {exc}"
        return Change()
    if hashes is None:
        work.error = f'Query failed: Catalog Error: Table "{table}" does not exist'
        return Change()
    return Change.between(before, Counter(hashes))
