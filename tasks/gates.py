"""Gates before the transform: is what has landed enough, and is it what it should be?

A sync may succeed with nothing in it. A gate that stays shut holds back what is built on the connections that
it is about, by lineage, as if they had not landed, and says what was expected and what was found.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Annotated, Any, Literal
from uuid import UUID

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger
from prefect.runtime import flow_run, task_run
from prefect_sqlalchemy import SqlAlchemyConnector
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    model_validator,
)
from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from blocks.reference import load_block
from tasks.dbt.freshness import SourceAge
from tasks.dbt.model import DbtState
from tasks.intervals import Moment
from tasks.jobs import JobResult, JobState, ToolParameters, without_traceback
from tasks.jobs.history import Resource, note_too_few, rows_of_earlier_runs
from tasks.sql import DatabaseRef, reason_of, with_database

SOURCE = "dbt-source"
"""Stands for the vendor of a finding about a dbt source, which nobody but dbt knows of."""


class _Gate(ToolParameters):
    tool: str
    name: str = Field(default="", title="Name", description="For people; what is expected by default.")
    connections: list[str] = Field(
        default=[],
        title="Connections",
        description="Ids or names of the connections that it is about; empty: all of the run.",
    )
    owner: str | None = Field(
        default=None, title="Owner", description="Who is told; the connection's owner by default."
    )

    @property
    def label(self) -> str:
        """What a person calls it."""
        raise NotImplementedError

    def is_about(self, *names: str) -> bool:
        """Whether it is about a connection, by its id and its name."""
        return not self.connections or not set(names).isdisjoint(self.connections)

    def about(self, jobs: Sequence[JobResult]) -> list[JobResult]:
        """The syncs that it is about."""
        return [job for job in jobs if self.is_about(job.resource_id, job.name)]


class RowsGate(_Gate):
    """How many rows each sync must have moved.

    A sync with a history of rows that now moved none, or far fewer than usual, did not do its work, whatever
    its vendor says. Of one that is not told how many rows it moved, now or ever, nothing can be compared: the
    gate opens and says so.
    """

    tool: Literal["rows"] = "rows"
    at_least: int | None = Field(
        default=None,
        ge=0,
        title="At least",
        description="Rows. Not for a connection whose tool counts none, such as Fivetran's.",
    )
    share_of_usual: float | None = Field(
        default=None,
        gt=0,
        le=1,
        title="Share of usual",
        description="Of the median of the last good syncs; without a history every number of rows passes. A "
        "sync that a gate of rows found too small is none of them.",
    )
    runs: int = Field(default=5, ge=1, le=50, title="Runs", description="How many syncs make what is usual.")
    usual_since: Moment | None = Field(
        default=None,
        title="Usual since",
        description="Runs that began before do not count for what is usual. For a source that is smaller for "
        "good: from this day on its syncs are measured by those that follow.",
    )

    @model_validator(mode="after")
    def _expects_something(self) -> RowsGate:
        if self.at_least is None and self.share_of_usual is None:
            raise ValueError("a gate of rows needs at_least, share_of_usual, or both")
        if self.usual_since is not None and self.share_of_usual is None:
            raise ValueError("usual_since is about share_of_usual, which is not given")
        return self

    @property
    def label(self) -> str:
        """What a person calls it."""
        return self.name or "rows"


class SqlGate(_Gate):
    """A question to the warehouse whose answer must be right.

    The first value of the first row is compared: one that is no finite number keeps it shut. Without a
    comparison, a row in the answer is a complaint.
    """

    tool: Literal["sql"] = "sql"
    database: DatabaseRef = Field(title="Database")
    query: str = Field(min_length=1, title="Query")
    at_least: float | None = Field(default=None, allow_inf_nan=False, title="At least")
    at_most: float | None = Field(default=None, allow_inf_nan=False, title="At most")

    @property
    def label(self) -> str:
        """What a person calls it."""
        short = " ".join(self.query.split())
        return self.name or (short if len(short) <= 60 else f"{short[:59]}…")

    @property
    def expected(self) -> str:
        """What the answer must be, in words."""
        bounds = [
            f"{words} {bound:,g}"
            for words, bound in (("at least", self.at_least), ("at most", self.at_most))
            if bound is not None
        ]
        return " and ".join(bounds) or "no row"


class FreshnessGate(_Gate):
    """`dbt source freshness`: the thresholds of the dbt project decide, source by source.

    For a chain whose transform is dbt Core. A source past its error threshold, or that can't be looked at,
    holds back what is built on it, whoever fills it. With `connections`, only the sources that these fill
    are looked at.
    """

    tool: Literal["freshness"] = "freshness"
    warnings: Literal["pass", "shut"] = Field(
        default="pass", title="Warnings", description="What a source past its warning threshold does."
    )

    @property
    def label(self) -> str:
        """What a person calls it."""
        return self.name or "freshness"

    def shut_for(self, age: SourceAge) -> bool:
        """Whether it stays shut for a source of this age."""
        late = (DbtState.FAIL, DbtState.ERROR, *([DbtState.WARN] if self.warnings == "shut" else []))
        return age.state in late

    def finding(self, age: SourceAge) -> Finding:
        """What it has to say of a source."""
        return Finding(
            tool=self.tool,
            gate=self.label,
            vendor=SOURCE,
            resource_id=age.unique_id,
            name=age.name,
            owner=self.owner or age.owner,
            message=age.sentence,
        )


GateCheck = Annotated[RowsGate | SqlGate | FreshnessGate, Field(discriminator="tool")]
"""A gate before the transform."""


class Finding(BaseModel):
    """That a gate stays shut for a connection or a dbt source, and why.

    Attributes:
        tool: The gate's kind.
        gate: The gate's label.
        vendor: The vendor of the connection; `SOURCE` of a source.
        resource_id: The connection; a source's unique id.
        name: Its name.
        owner: Who is told.
        message: What was expected and what was found.
    """

    model_config = ConfigDict(frozen=True)

    tool: str
    gate: str
    vendor: str
    resource_id: str
    name: str
    owner: str | None
    message: str

    @property
    def about(self) -> str:
        """What the gate's step is about: this gate, for this connection."""
        return f"{self.resource_id}/{self.gate}"

    @property
    def key(self) -> str:
        """The key of the gate's step."""
        return f"{self.tool}/{self.about}"

    @classmethod
    def of(cls, gate: _Gate, job: JobResult, message: str) -> Finding:
        """What a gate has to say of a sync."""
        return cls(
            tool=gate.tool,
            gate=gate.label,
            vendor=job.vendor,
            resource_id=job.resource_id,
            name=job.name,
            owner=gate.owner or job.owner,
            message=message,
        )


@task(name="check-gates", task_run_name="check gates", cache_policy=NO_CACHE)
async def check_gates(gates: list[GateCheck]) -> None:
    """See that every database block that a gate asks is saved, before anything is started.

    Raises:
        BlockNotFound: One is not.
    """
    without_traceback()
    for gate in gates:
        if isinstance(gate, SqlGate):
            await load_block(SqlAlchemyConnector, gate.database)


def _run_name() -> str:
    gate = task_run.get_parameters().get("gate")
    return f"gate: {gate.label}" if isinstance(gate, _Gate) else "gate"


@task(name="gate", task_run_name=_run_name, cache_policy=NO_CACHE)
async def look_at_gate(gate: RowsGate | SqlGate, jobs: list[JobResult]) -> list[Finding]:
    """See whether a gate of rows or of SQL opens. Not kept for a retry: what is looked at may have changed.

    Args:
        gate: What is expected.
        jobs: The syncs of the run.

    Returns:
        One finding per connection for which it stays shut; none where all is well. Syncs that did not end
        well are not looked at: what is built on them is held back already.
    """
    without_traceback()
    landed = [job for job in gate.about(jobs) if job.good]
    if isinstance(gate, RowsGate):
        found = await _rows(gate, landed)
    else:
        trouble = await _sql(gate)
        found = {job.resource_id: trouble for job in landed} if trouble else {}
    return [Finding.of(gate, job, found[job.resource_id]) for job in landed if job.resource_id in found]


async def _rows(gate: RowsGate, jobs: Sequence[JobResult]) -> dict[str, str]:
    # A sync that a retry did not repeat has its rows too.
    told = [job for job in jobs if job.state is not JobState.SKIPPED]
    usual = await _usual(gate, told) if gate.share_of_usual is not None else {}
    found: dict[str, str] = {}
    for job in told:
        rows = job.rows or 0
        landed = (
            f"{rows:,} rows landed" if job.rows is not None else f"{job.vendor} does not say how many rows"
        )
        history = usual.get((job.vendor, job.resource_id), [])
        if gate.at_least is not None and rows < gate.at_least:
            found[job.resource_id] = f"{landed}; at least {gate.at_least:,} were expected"
        elif gate.share_of_usual is not None and history and rows < gate.share_of_usual * median(history):
            runs = f"the last {len(history)} syncs" if len(history) > 1 else "the sync before"
            found[job.resource_id] = (
                f"{landed}; at least {gate.share_of_usual:.0%} of the usual {median(history):,.0f} were "
                f"expected ({runs})"
            )
    # Else a source that stays small would be usual before long, and its alarm be taken back.
    await note_too_few(
        gate.label, {(job.vendor, job.resource_id): job.resource_id in found for job in told}, told
    )
    return found


async def _usual(gate: RowsGate, jobs: Sequence[JobResult]) -> Mapping[Resource, list[int]]:
    this_run = UUID(flow_run.id) if flow_run.id else None
    wanted = {(job.vendor, job.resource_id) for job in jobs}
    earlier = await rows_of_earlier_runs(wanted, runs=gate.runs, but=this_run, since=gate.usual_since)
    for job in jobs:
        if not earlier.complete and (job.vendor, job.resource_id) not in earlier.rows:
            # It stays open: a connection that is new has none either, and would never get any.
            get_run_logger().warning(
                "%s, %s: no earlier sync of it is in the newest journals, so that nothing is known of what "
                "is usual, and the gate opens whatever has landed",
                job.name,
                gate.label,
            )
    return earlier.rows


async def _sql(gate: SqlGate) -> str | None:
    try:
        rows = await with_database(gate.database, lambda engine: _ask(engine, gate.query))
    except SQLAlchemyError as error:
        return f"{gate.expected} was expected; the question could not be asked: {reason_of(error)[:200]}"
    if gate.at_least is None and gate.at_most is None:
        if not rows:
            return None
        return f"no row was expected, {'one was' if len(rows) == 1 else 'some were'} found: {_shown(rows[0])}"
    value = rows[0][0] if rows else None
    try:
        number = float(value)  # type: ignore[arg-type]  # the errors are what tells
    except (TypeError, ValueError):
        return f"{gate.expected} was expected, {'nothing' if value is None else repr(value)} was found"
    if not math.isfinite(number):
        # A division by nothing has measured nothing, and no bound is broken by NaN.
        return f"{gate.expected} was expected, no number was found: {number}"
    low = gate.at_least is not None and number < gate.at_least
    high = gate.at_most is not None and number > gate.at_most
    return f"{gate.expected} was expected, {number:,g} was found" if low or high else None


def _ask(engine: Engine, query: str) -> list[tuple[Any, ...]]:
    with engine.connect() as connection:
        return [tuple(row) for row in connection.exec_driver_sql(query).fetchmany(2)]


def _shown(row: tuple[Any, ...]) -> str:
    text = ", ".join(str(value) for value in row)
    return text if len(text) <= 100 else f"{text[:99]}…"
