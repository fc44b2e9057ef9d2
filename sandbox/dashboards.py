"""The dashboards' side of the stage: Power BI's semantic models and Tableau's workbooks, and their refreshes.

A refresh really reads its table from the warehouse. The HTTP faces of this state are in `dashboards_api.py`.
"""

from __future__ import annotations

import secrets
import threading
import time
from dataclasses import dataclass, field
from typing import Any, Literal
from uuid import uuid4

import duckdb
from pydantic import BaseModel, ConfigDict, Field

from sandbox import catalog
from sandbox.timeline import FOREVER, LONG, STOP_WITHIN, Behaviour, Phase, Timeline, Work, Workers
from sandbox.warehouse import Interrupted, Warehouse, WarehouseLocked

DashboardOutcome = Literal["succeed", "fail", "cancel", "stuck", "unknown_word"]
_END_WORDS: dict[DashboardOutcome, str] = {"fail": "failed", "cancel": "cancelled"}


class DashboardSettings(BaseModel):
    """What can be set about the dashboards' servers as a whole."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True)

    token_seconds: float = Field(3600.0, gt=0, description="How long a Power BI token is good.")
    conflict: Literal[400, 409] = Field(
        400,
        description="How Power BI refuses a second refresh: as it does (400), or as it is documented (409).",
    )
    requests: int | None = Field(None, ge=1, description="Beyond so many a minute: 429. None: no limit.")


class DashboardBehaviour(Behaviour):
    """How a dashboard's refreshes behave."""

    outcome: DashboardOutcome = "succeed"


class DashboardChange(DashboardBehaviour):
    """A change to one dashboard: any field of its behaviour, or whether it can be refreshed at all."""

    refreshable: bool = True


class RefreshRunning(Exception):
    """A refresh of this dashboard waits or runs already."""


@dataclass(slots=True)
class Refresh:
    """One refresh."""

    refresh_id: str
    created_wall: float
    hidden_until: float  # monotonic; before it, lists do not show the refresh
    timeline: Timeline
    work: Work

    def at(self) -> tuple[str, float, bool]:
        """The state (`queued`, `running`, an end or a strange word), since when, and whether it is final."""
        return self.timeline.at()

    @property
    def started_wall(self) -> float | None:
        """When it left the queue, epoch seconds; None before."""
        word, _, _ = self.at()
        if word == "queued":
            return None
        return self.timeline.started_wall + self.timeline.phases[0].seconds

    @property
    def ended_wall(self) -> float | None:
        """When it ended, epoch seconds; None before."""
        _, since, final = self.at()
        return self.timeline.wall(since) if final else None


@dataclass(slots=True)
class Dashboard:
    """One semantic model or workbook, and how its next refresh will behave."""

    spec: catalog.DashboardSpec
    behaviour: DashboardBehaviour
    refreshable: bool = True
    refreshes: list[Refresh] = field(default_factory=list)

    @property
    def active(self) -> Refresh | None:
        """The refresh that has not ended."""
        return next((refresh for refresh in self.refreshes if not refresh.at()[2]), None)


class Dashboards:
    """All of the dashboards' state, safe to use from the server's thread and from a test's."""

    def __init__(self, warehouse: Warehouse, job_seconds: float = 3.0) -> None:
        self.settings = DashboardSettings()
        self.warehouse = warehouse
        self.lock = threading.RLock()
        self.tokens: dict[str, float] = {}  # Power BI's, with the moment at which each ends
        self.session: str | None = None  # Tableau's: one personal access token has one
        self.sign_ins = 0
        behaviour = DashboardBehaviour(duration=job_seconds)
        self.dashboards = {
            spec.dashboard_id: Dashboard(spec, behaviour.model_copy()) for spec in catalog.DASHBOARDS
        }
        self._workers = Workers(self._cancel_work)

    def dashboard(self, key: str) -> Dashboard:
        """A dashboard by its id or its name.

        Raises:
            KeyError: there is none.
        """
        found = self.dashboards.get(key) or next(
            (board for board in self.dashboards.values() if board.spec.name == key), None
        )
        if found is None:
            raise KeyError(key)
        return found

    def set(self, key: str, **changes: Any) -> Dashboard:
        """Change how a dashboard's next refreshes behave, or whether it can be refreshed (`DashboardChange`).

        Raises:
            KeyError: no such dashboard.
            pydantic.ValidationError: a field that does not exist, or a value that does not fit.
        """
        board = self.dashboard(key)
        sent = DashboardChange.model_validate(changes).model_dump(exclude_unset=True)
        with self.lock:
            board.refreshable = sent.pop("refreshable", board.refreshable)
            board.behaviour = DashboardBehaviour.model_validate(board.behaviour.model_dump() | sent)
        return board

    def refreshes_of(self, key: str) -> list[Refresh]:
        """The refreshes of a dashboard, oldest first."""
        with self.lock:
            return list(self.dashboard(key).refreshes)

    def refresh(self, key: str) -> Refresh:
        """Start a refresh.

        Raises:
            KeyError: no such dashboard.
            RefreshRunning: one waits or runs.
        """
        board = self.dashboard(key)
        with self.lock:
            if board.active is not None:
                raise RefreshRunning(board.spec.name)
            behaviour, work = board.behaviour, Work()
            if behaviour.outcome != "succeed" and behaviour.times is not None:
                board.behaviour = behaviour.used_once()
            refresh = Refresh(
                refresh_id=str(uuid4()),
                created_wall=time.time(),
                hidden_until=time.monotonic() + behaviour.visibility_delay,
                timeline=_course(behaviour, work),
                work=work,
            )
            board.refreshes.append(refresh)
        self._workers.start(f"sandbox-refresh-{refresh.refresh_id[:8]}", self._work, board, refresh)
        return refresh

    def finish(self, refresh: Refresh, word: Literal["failed", "cancelled"]) -> None:
        """End a refresh at once."""
        refresh.timeline.finish(word)

    def new_token(self) -> str:
        """A bearer token for Power BI."""
        token = secrets.token_urlsafe(24)
        with self.lock:
            self.sign_ins += 1
            self.tokens[token] = time.monotonic() + self.settings.token_seconds
        return token

    def new_session(self) -> str:
        """A session for Tableau; the one before it ends."""
        with self.lock:
            self.sign_ins += 1
            self.session = secrets.token_urlsafe(24)
            return self.session

    def stop(self) -> None:
        """Tell all reading threads to give up, and give them a moment to do so."""
        self._workers.stop(STOP_WITHIN)

    def _cancel_work(self) -> None:
        with self.lock:
            for board in self.dashboards.values():
                for refresh in board.refreshes:
                    refresh.work.cancelled.set()

    def _work(self, board: Dashboard, refresh: Refresh) -> None:
        """Read the table, once the refresh is running."""
        work = refresh.work
        try:
            if work.cancelled.wait(min(LONG, refresh.timeline.phases[0].seconds)):
                return
            rows = self.warehouse.count(board.spec.table, work.cancelled)
            if rows is None:
                work.error = f'Table "{board.spec.table}" does not exist'
            else:
                work.rows = rows
        except (Interrupted, duckdb.InterruptException):
            pass  # it was cut short: nobody will ask for its rows
        except (WarehouseLocked, duckdb.Error) as exc:
            work.error = str(exc)
        finally:
            work.done_at = time.monotonic()


def _course(behaviour: DashboardBehaviour, work: Work) -> Timeline:
    working = [Phase("running", behaviour.duration)]
    if behaviour.outcome == "stuck":
        working = [Phase("running", FOREVER)]
    elif behaviour.outcome == "unknown_word":
        shown = FOREVER if behaviour.word_seconds is None else behaviour.word_seconds
        working = [Phase("running", behaviour.duration), Phase(behaviour.word, shown)]
    phases = (Phase("queued", behaviour.queued_seconds), *working)
    return Timeline(phases, _END_WORDS.get(behaviour.outcome, "succeeded"), work=work)
