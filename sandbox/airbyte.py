"""Airbyte's side of the stage: connections, jobs and tokens, and the controls over how they behave.

The HTTP faces of this state are in `airbyte_api.py` (public API) and `airbyte_config_api.py` (Config API).
"""

from __future__ import annotations

import base64
import json
import math
import secrets
import threading
import time
from typing import Any, Literal
from uuid import NAMESPACE_URL, uuid5

import duckdb

from sandbox import catalog
from sandbox.airbyte_jobs import (
    AirbyteSettings,
    Connection,
    ConnectionChange,
    Job,
    JobType,
    StartRefused,
    course,
)
from sandbox.timeline import LONG, STOP_WITHIN, AirbyteOutcome, ConnectionBehaviour, Timeline, Work, Workers
from sandbox.warehouse import Interrupted, Warehouse, WarehouseLocked

_LOADS = ("sync", "refresh")


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
        self.next_job = 1001
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
        """Change how a connection's next jobs behave (`ConnectionBehaviour`), its `status`, `tags` or `rows`.

        Raises:
            KeyError: no such connection.
            pydantic.ValidationError: a field that does not exist, or a value that does not fit.
        """
        connection = self.connection(name_or_id)
        change = ConnectionChange.model_validate(changes)
        sent = change.model_dump(exclude_unset=True)
        with self.lock:
            connection.status = sent.pop("status", connection.status)
            connection.status_reason = sent.pop("status_reason", connection.status_reason)
            connection.rows = sent.pop("rows", connection.rows)
            if "tags" in sent:
                connection.tags = [catalog.tag(name) for name in sent.pop("tags")]
            connection.behaviour = ConnectionBehaviour.model_validate(
                connection.behaviour.model_dump() | sent
            )
        return connection

    @property
    def workspaces(self) -> list[str]:
        """The ids of the workspaces that have connections; the flights' is the first."""
        with self.lock:
            return list(dict.fromkeys(connection.workspace_id for connection in self.connections.values()))

    def add_connections(
        self,
        count: int,
        *,
        duration: float = 3.0,
        rows: int = 1000,
        prefix: str = "synthetic",
        workspace: str = catalog.WORKSPACE_ID,
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
                    workspace_id=workspace,
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
                if job_type in _LOADS:
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
        outcome: AirbyteOutcome = behaviour.outcome if job_type in _LOADS else "succeed"
        if job_type in _LOADS and outcome != "succeed" and behaviour.times is not None:
            connection.behaviour = behaviour.used_once()
        phases, end_word = course(behaviour, outcome)
        loads = connection.stream is not None and end_word == "succeeded" and outcome != "zero_rows"
        fixed = None if loads else connection.rows
        if outcome == "zero_rows" or job_type not in _LOADS:
            fixed = 0
        timeline = Timeline(phases, end_word, work=Work() if loads else None)
        job_id, self.next_job = self.next_job, self.next_job + 1
        return Job(
            job_id=job_id,
            job_type=job_type,
            connection_id=connection.connection_id,
            connection_name=connection.name,
            streams=[(stream["name"], stream.get("namespace")) for stream in connection.streams],
            behaviour=behaviour,
            outcome=outcome,
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
            if job.job_type not in _LOADS:
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
