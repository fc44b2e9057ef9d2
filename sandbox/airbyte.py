"""Airbyte's side of the stage: connections, jobs and tokens, and the controls over how they behave.

The HTTP face of this state is in `airbyte_api.py`.
"""

from __future__ import annotations

import base64
import json
import math
import secrets
import threading
import time
from dataclasses import dataclass, field
from typing import Any, Literal
from uuid import NAMESPACE_URL, uuid5

import duckdb
from pydantic import BaseModel, ConfigDict, Field

from sandbox import catalog
from sandbox.timeline import (
    FOREVER,
    LONG,
    STOP_WITHIN,
    AirbyteOutcome,
    ConnectionBehaviour,
    Phase,
    Timeline,
    Work,
    Workers,
    iso,
)
from sandbox.warehouse import Interrupted, Warehouse, WarehouseLocked

JobType = Literal["sync", "reset", "clear"]
ConnectionStatus = Literal["active", "inactive", "deprecated", "locked"]
_BYTES_PER_ROW = 120  # of a synthetic connection


class AirbyteSettings(BaseModel):
    """What can be set about the Airbyte server as a whole."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True)

    auth: Literal["token", "basic", "none"] = "token"
    token_seconds: float = Field(900.0, gt=0, description="Lifetime of tokens issued from now on.")
    announce_expiry: bool = Field(True, description="Off: only the JWT says when it expires.")
    cancel_seconds: float = Field(0.05, ge=0, description="How long a cancel request blocks.")
    requests_per_minute: int | None = Field(None, ge=1, description="Beyond it: 429 without Retry-After.")


class ConnectionChange(ConnectionBehaviour):
    """A change to one connection: any field of its behaviour, its status, or the rows of a synthetic one."""

    status: ConnectionStatus = "active"
    rows: int = Field(1000, ge=0)


class StartRefused(Exception):
    """A job cannot be started: `reason` is the name of the case."""

    def __init__(self, reason: Literal["unknown", "inactive", "running"]) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(slots=True)
class Connection:
    """One Airbyte connection and how its next job will behave."""

    connection_id: str
    name: str
    tags: list[dict[str, str]]
    behaviour: ConnectionBehaviour
    stream: catalog.Stream | None = None  # None: synthetic, no data is loaded
    rows: int = 1000  # of a synthetic connection
    status: ConnectionStatus = "active"
    schedule: dict[str, str] = field(default_factory=lambda: {"scheduleType": "manual"})
    status_reason: str | None = None
    prefix: str = ""
    namespace_definition: str = "custom_format"
    namespace_format: str = ""
    streams: list[dict[str, Any]] = field(default_factory=list)
    latest: Job | None = None

    @property
    def active_job(self) -> Job | None:
        """The job that runs now, if one does."""
        return self.latest if self.latest is not None and not self.latest.timeline.at()[2] else None

    def reply(self) -> dict[str, Any]:
        """The connection as ConnectionResponse."""
        reply = {
            "connectionId": self.connection_id,
            "name": self.name,
            "sourceId": catalog.SOURCE_ID,
            "destinationId": catalog.DESTINATION_ID,
            "workspaceId": catalog.WORKSPACE_ID,
            "status": self.status,
            "schedule": self.schedule,
            "nonBreakingSchemaUpdatesBehavior": "ignore",
            "namespaceDefinition": self.namespace_definition,
            "namespaceFormat": self.namespace_format,
            "prefix": self.prefix,
            "configurations": {"streams": self.streams},
            "createdAt": catalog.CREATED_AT,
            "tags": self.tags,
        }
        return reply | ({"statusReason": self.status_reason} if self.status_reason else {})


@dataclass(slots=True)
class Job:
    """One job; everything that changes about it is read from its timeline."""

    job_id: int
    job_type: JobType
    connection_id: str
    connection_name: str
    timeline: Timeline
    fixed_rows: int | None  # of a job that loads nothing; None: what the work loaded
    hidden_until: float  # monotonic; before it, lists do not show the job

    @property
    def status(self) -> str:
        """The status word of this moment."""
        return self.timeline.at()[0]

    @property
    def created_wall(self) -> float:
        """When the job was created, epoch seconds."""
        return self.timeline.started_wall

    def reply(self) -> dict[str, Any]:
        """The job as JobResponse."""
        word, since, final = self.timeline.at()
        reply: dict[str, Any] = {
            "jobId": self.job_id,
            "status": word,
            "jobType": self.job_type,
            "startTime": iso(self.created_wall),
            "connectionId": self.connection_id,
        }
        if word != "pending":
            reply["duration"] = duration_text(since - self.timeline.started)
        if final:
            rows, size = self._counts(word)
            reply |= {
                "lastUpdatedAt": iso(self.timeline.wall(since)),
                "bytesSynced": size,
                "rowsSynced": rows,
            }
        return reply

    def _counts(self, word: str) -> tuple[int, int]:
        if word != "succeeded":
            return 0, 0
        if self.fixed_rows is not None:
            return self.fixed_rows, self.fixed_rows * _BYTES_PER_ROW
        work = self.timeline.work
        return (work.rows, work.size) if work is not None else (0, 0)


class Airbyte:
    """All of Airbyte's state, safe to use from the server's thread and from a test's."""

    def __init__(self, warehouse: Warehouse, job_seconds: float = 3.0) -> None:
        self.settings = AirbyteSettings()
        self.warehouse = warehouse
        self.lock = threading.RLock()
        self.connections: dict[str, Connection] = {}
        self.jobs: dict[int, Job] = {}  # in order of creation
        self.token_requests = 0
        self._tokens: dict[str, float] = {}
        self._next_job = 1001
        self._workers = Workers(self._cancel_work)
        for spec in catalog.CONNECTIONS:
            self.connections[spec.connection_id] = Connection(
                connection_id=spec.connection_id,
                name=spec.name,
                tags=[catalog.tag(f"owner:{spec.owner}"), catalog.tag(catalog.NIGHTLY_TAG)],
                behaviour=ConnectionBehaviour(duration=job_seconds),
                stream=spec.stream,
                namespace_format=spec.stream.schema,
                streams=[_stream_reply(spec.stream)],
            )

    # -- controls --

    def connection(self, name_or_id: str) -> Connection:
        """A connection by its name or id.

        Raises:
            KeyError: there is none.
        """
        with self.lock:
            found = self.connections.get(name_or_id.lower())
            for connection in self.connections.values() if found is None else ():
                if connection.name == name_or_id:
                    return connection
        if found is None:
            raise KeyError(name_or_id)
        return found

    def set(self, name_or_id: str, **changes: Any) -> Connection:
        """Change how a connection's next jobs behave (`ConnectionBehaviour`), or its `status` or `rows`.

        Raises:
            KeyError: no such connection.
            pydantic.ValidationError: a field that does not exist, or a value that does not fit.
        """
        connection = self.connection(name_or_id)
        change = ConnectionChange.model_validate(changes)
        sent = change.model_dump(exclude_unset=True)
        with self.lock:
            connection.status = sent.pop("status", connection.status)
            connection.rows = sent.pop("rows", connection.rows)
            connection.behaviour = ConnectionBehaviour.model_validate(
                connection.behaviour.model_dump() | sent
            )
        return connection

    def add_connections(
        self, count: int, *, duration: float = 3.0, rows: int = 1000, prefix: str = "synthetic"
    ) -> list[str]:
        """Add connections that load no data, for benches, and return their ids."""
        ids: list[str] = []
        with self.lock:
            first = len(self.connections) + 1
            for number in range(first, first + count):
                name = f"{prefix}-{number:04d}"
                connection_id = str(uuid5(NAMESPACE_URL, f"sandbox-connection/{name}"))
                self.connections[connection_id] = Connection(
                    connection_id=connection_id,
                    name=name,
                    tags=[],
                    behaviour=ConnectionBehaviour(duration=duration),
                    rows=rows,
                    namespace_format=f"raw_{prefix}",
                    streams=[{"name": name, "syncMode": "full_refresh_overwrite"}],
                )
                ids.append(connection_id)
        return ids

    def jobs_of(self, name_or_id: str) -> list[Job]:
        """The jobs of a connection, oldest first."""
        connection_id = self.connection(name_or_id).connection_id
        with self.lock:
            return [job for job in self.jobs.values() if job.connection_id == connection_id]

    def finish_job(self, job_id: int, word: Literal["failed", "cancelled"]) -> None:
        """End a job at once, as if the vendor had; what it had loaded is dropped."""
        self.jobs[job_id].timeline.finish(word)

    def stop(self) -> None:
        """Tell all loading threads to give up, and give them a moment to do so."""
        self._workers.stop(STOP_WITHIN)

    def _cancel_work(self) -> None:
        with self.lock:
            for job in self.jobs.values():
                if job.timeline.work is not None:
                    job.timeline.work.cancelled.set()

    # -- tokens --

    def issue_token(self) -> tuple[str, float]:
        """A new bearer token and its lifetime in seconds."""
        lifetime = self.settings.token_seconds
        claims = {
            "sub": catalog.CLIENT_ID,
            "exp": math.ceil(time.time() + lifetime),
            "jti": secrets.token_hex(8),
        }
        parts = [
            base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=").decode()
            for part in (_JWT, claims)
        ]
        token = ".".join([*parts, secrets.token_urlsafe(16)])
        with self.lock:
            self._tokens[token] = time.monotonic() + lifetime
        return token, lifetime

    def token_is_valid(self, token: str) -> bool:
        """Whether the token was issued here and has not expired."""
        return self._tokens.get(token, 0.0) > time.monotonic()

    def revoke_tokens(self) -> None:
        """Make every token that was issued invalid at once."""
        with self.lock:
            self._tokens.clear()

    # -- jobs --

    def start(self, connection_id: str, job_type: JobType) -> Job:
        """Start a job.

        Raises:
            StartRefused: unknown or inactive connection, or a job of it is running.
        """
        with self.lock:
            connection = self.connections.get(connection_id.lower())
            if connection is None or connection.status == "deprecated":
                raise StartRefused("unknown")
            if connection.status != "active":
                raise StartRefused("inactive")
            active = connection.active_job
            if active is not None:
                if job_type == "sync":
                    raise StartRefused("running")
                # A clear or reset takes the place of a running sync.
                active.timeline.finish("cancelled")
            job = self._new_job(connection, job_type)
            self.jobs[job.job_id] = job
            connection.latest = job
        work = job.timeline.work
        if work is not None and connection.stream is not None:
            self._workers.start(f"sandbox-job-{job.job_id}", self._work, job, connection.stream, work)
        return job

    def _new_job(self, connection: Connection, job_type: JobType) -> Job:
        behaviour = connection.behaviour
        outcome: AirbyteOutcome = behaviour.outcome if job_type == "sync" else "succeed"
        if job_type == "sync" and outcome != "succeed" and behaviour.times is not None:
            connection.behaviour = behaviour.used_once()
        phases, end_word = _course(behaviour, outcome)
        loads = connection.stream is not None and end_word == "succeeded" and outcome != "zero_rows"
        fixed = None if loads else connection.rows
        if outcome == "zero_rows" or job_type != "sync":
            fixed = 0
        timeline = Timeline(phases, end_word, work=Work() if loads else None)
        job_id, self._next_job = self._next_job, self._next_job + 1
        return Job(
            job_id=job_id,
            job_type=job_type,
            connection_id=connection.connection_id,
            connection_name=connection.name,
            timeline=timeline,
            fixed_rows=fixed,
            hidden_until=timeline.started + behaviour.visibility_delay,
        )

    def _work(self, job: Job, stream: catalog.Stream, work: Work) -> None:
        """Load the data of one job: staged while it runs, made visible only when it is due to end."""
        timeline = job.timeline
        waiting = sum(phase.seconds for phase in timeline.phases if phase.word in ("pending", "queued"))
        try:
            if work.cancelled.wait(min(LONG, waiting)):
                return
            if job.job_type != "sync":
                self.warehouse.clear(stream, work.cancelled)
            else:
                work.rows, work.size = self.warehouse.stage(stream, _added(job.job_id), work.cancelled)
                if work.cancelled.wait(min(LONG, max(0.0, timeline.planned_end - time.monotonic()))):
                    self.warehouse.discard(stream)
                    return
                self.warehouse.publish(stream, work.cancelled)
        except (Interrupted, duckdb.InterruptException):
            self.warehouse.discard(stream)
        except (WarehouseLocked, duckdb.Error, OSError) as exc:
            work.error = str(exc)
        finally:
            work.done_at = time.monotonic()


_JWT = {"alg": "HS256", "typ": "JWT"}


def _added(job_id: int) -> str:
    """The columns that Airbyte adds to each table."""
    return f"""
        uuid()::VARCHAR AS _airbyte_raw_id,
        now() AS _airbyte_extracted_at,
        '{{"sync_id":{job_id},"changes":[]}}'::JSON AS _airbyte_meta,
        {job_id}::BIGINT AS _airbyte_generation_id
    """


def _stream_reply(stream: catalog.Stream) -> dict[str, Any]:
    return {
        "name": stream.name,
        "syncMode": "full_refresh_overwrite",
        "primaryKey": [[column] for column in stream.primary_key],
        "cursorField": [],
    }


def _course(behaviour: ConnectionBehaviour, outcome: AirbyteOutcome) -> tuple[tuple[Phase, ...], str]:
    """The phases of a job with this outcome, and the word that it ends with."""
    duration = behaviour.duration
    pending = Phase("pending", min(0.2, duration / 10))
    before = [pending] + ([Phase("queued", behaviour.queued_seconds)] if behaviour.queued_seconds else [])
    running = duration - pending.seconds
    end_word = {"fail": "failed", "cancel": "cancelled"}.get(outcome, "succeeded")
    match outcome:
        case "stuck":
            course = [Phase("running", FOREVER)]
        case "incomplete_then_succeed":
            course = [
                Phase("running", running * 0.4),
                Phase("incomplete", running * 0.2),
                Phase("running", running * 0.4),
            ]
        case "unknown_word":
            shown = FOREVER if behaviour.word_seconds is None else behaviour.word_seconds
            course = [
                Phase("running", running / 2),
                Phase(behaviour.word, shown),
                Phase("running", running / 2),
            ]
        case _:
            course = [Phase("running", running)]
    return (*before, *course), end_word


def duration_text(seconds: float) -> str:
    """Seconds as an ISO 8601 duration, whole seconds, the way Java writes it."""
    whole = int(seconds)
    hours, minutes, rest = whole // 3600, whole % 3600 // 60, whole % 60
    text = (f"{hours}H" if hours else "") + (f"{minutes}M" if minutes else "") + (f"{rest}S" if rest else "")
    return f"PT{text or '0S'}"
