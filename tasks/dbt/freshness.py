"""How old the data of each source is, judged by the thresholds that the dbt project sets."""

from __future__ import annotations

from collections import Counter
from datetime import datetime
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from tasks.dbt.invocation import Invocation
from tasks.dbt.model import DbtError, DbtState, reason_of


class SourceAge(BaseModel):
    """What `dbt source freshness` found out about one source."""

    model_config = ConfigDict(frozen=True)

    unique_id: str
    name: str = Field(description="As `source.table`.")
    state: DbtState = Field(
        description="success; warn or fail: past the threshold; error: it could not be looked at."
    )
    loaded_at: datetime | None = Field(default=None, description="The newest row.")
    age: float | None = Field(default=None, description="Seconds since then.")
    warn_after: float | None = Field(default=None, description="Seconds.")
    error_after: float | None = Field(default=None, description="Seconds.")
    message: str | None = Field(default=None, description="The database's own words, if it had any.")
    owner: str | None = None

    @property
    def late(self) -> bool:
        """Whether anybody need look at it."""
        return self.state is not DbtState.SUCCESS

    @property
    def sentence(self) -> str:
        """How old it is, and what is allowed."""
        if self.state is DbtState.ERROR or self.age is None:
            return reason_of(self.message) or "it could not be looked at"
        limit, word = self.warn_after, "warns"
        if self.state is DbtState.FAIL or limit is None:
            limit, word = self.error_after, "fails"
        allowed = f", {word} after {span(limit)}" if limit is not None else ""
        return f"last row {span(self.age)} old{allowed}"


class Freshness(BaseModel):
    """The age of every source that the project sets a threshold for."""

    model_config = ConfigDict(frozen=True)

    state: DbtState
    sources: list[SourceAge] = []
    message: str = ""
    duration: float = Field(default=0.0, description="Seconds, dbt's start included.")

    @classmethod
    def of(cls, sources: list[SourceAge], duration: float) -> Freshness:
        """Sums the sources up."""
        worst_first = (DbtState.ERROR, DbtState.FAIL, DbtState.WARN)
        found = Counter(source.state for source in sources)
        state = next((state for state in worst_first if found[state]), DbtState.SUCCESS)
        late = sorted((s for s in sources if s.late), key=lambda s: worst_first.index(s.state))
        message = f"{len(sources) - len(late)} of {len(sources)} sources are fresh"
        if late:
            told = "; ".join(f"{source.name}: {source.sentence}" for source in late[:5])
            message += f"; {told}" + (f"; and {len(late) - 5} more" if len(late) > 5 else "")
        return cls(state=state, sources=sources, message=message, duration=duration)

    @property
    def late(self) -> list[SourceAge]:
        """The sources that are past a threshold, or could not be looked at."""
        return [source for source in self.sources if source.late]

    @property
    def failed(self) -> list[SourceAge]:
        """Those of them that are worse than a warning."""
        return [s for s in self.sources if s.state in {DbtState.FAIL, DbtState.ERROR}]


class SourcesStale(DbtError):
    """A source is older than the project's error threshold, or can't be looked at; see `.result`."""

    def __init__(self, result: Freshness) -> None:
        super().__init__(result.message)
        self.result = result

    def __reduce__(self) -> tuple[type[SourcesStale], tuple[Freshness]]:
        return (type(self), (self.result,))


class FreshnessCheck(Invocation):
    """`dbt source freshness`, each source a task run."""

    mode: ClassVar[Literal["run", "freshness"]] = "freshness"

    @property
    def what(self) -> str:
        """The command, for people."""
        return "dbt source freshness"

    @property
    def command(self) -> list[str]:
        """The command as dbt takes it."""
        return ["source", "freshness"]

    async def run(self) -> Freshness:
        """Look at every selected source that has a threshold."""
        await self.invoke()
        return Freshness.of([_age(record) for record in self.results], self.seconds)

    def finish(self, record: dict[str, Any]) -> None:
        """The end of a source's task run: dbt tells the age only in its results, a moment later."""
        if record["t"] != "result":
            return
        if record["kind"] != "source":  # a project hook
            super().finish(record)
            return
        found = _age(record)
        self.runs.settle(found.unique_id, "source", found.name, found.state.value, found.sentence)


def _age(record: dict[str, Any]) -> SourceAge:
    # dbt says `error` for too old, and `runtime error` for what could not be looked at.
    states = {"pass": DbtState.SUCCESS, "warn": DbtState.WARN, "error": DbtState.FAIL}
    return SourceAge(
        unique_id=record["id"],
        state=states.get(record["status"], DbtState.ERROR),
        **{
            key: record[key]
            for key in ("name", "loaded_at", "age", "warn_after", "error_after", "message", "owner")
        },
    )


def span(seconds: float | None) -> str:
    """A length of time for people: `36 h`, `2.5 d`."""
    if seconds is None:
        return ""
    for unit, length in (("d", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * length or (seconds >= length and unit == "min"):
            many = seconds / length
            return f"{many:,.0f} {unit}" if many >= 10 else f"{many:.2g} {unit}"
    return f"{max(seconds, 0):.0f} s"
