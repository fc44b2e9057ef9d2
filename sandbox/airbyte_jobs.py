"""Airbyte's connections and jobs on the stage, how they can be told to behave, and how they are written.

The public API writes a job in one way and the Config API in another; both are made from the same `Job`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from sandbox import catalog
from sandbox.timeline import FOREVER, AirbyteOutcome, ConnectionBehaviour, Phase, Timeline, iso

JobType = Literal["sync", "reset", "clear", "refresh"]
ConnectionStatus = Literal["active", "inactive", "deprecated", "locked"]
_BYTES_PER_ROW = 120  # of a synthetic connection
_CONFIG_TYPES = {"reset": "reset_connection"}


class AirbyteSettings(BaseModel):
    """What can be set about the Airbyte server as a whole."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True)

    auth: Literal["token", "basic", "none"] = "token"
    token_seconds: float = Field(900.0, gt=0, description="Lifetime of tokens issued from now on.")
    announce_expiry: bool = Field(True, description="Off: only the JWT says when it expires.")
    cancel_seconds: float = Field(0.05, ge=0, description="How long a cancel request blocks.")
    requests_per_minute: int | None = Field(None, ge=1, description="Beyond it: 429 without Retry-After.")
    apis: Literal["both", "public", "config"] = Field(
        "both",
        description="Which APIs the server has; in place of another one there is its web page or a 404.",
    )
    age: Literal["now", "2025", "2023"] = Field(
        "now",
        description="2025: the public API lists clears and refreshes only where its jobType asks for them. "
        "2023: it knows neither, nor does the Config API, nor workspace lists, status or tokens.",
    )


class ConnectionChange(ConnectionBehaviour):
    """A change to one connection: any field of its behaviour, its status, or the rows of a synthetic one."""

    status: ConnectionStatus = "active"
    status_reason: str | None = Field(None, description="Why Airbyte itself took it out of service.")
    tags: list[str] = Field(default_factory=list, description="All of its tags, by name.")
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
    workspace_id: str = catalog.WORKSPACE_ID
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

    def _common(self) -> dict[str, Any]:
        reply: dict[str, Any] = {
            "connectionId": self.connection_id,
            "name": self.name,
            "sourceId": catalog.SOURCE_ID,
            "destinationId": catalog.DESTINATION_ID,
            "workspaceId": self.workspace_id,
            "status": self.status,
            "namespaceFormat": self.namespace_format,
            "prefix": self.prefix,
            "tags": self.tags,
        }
        return reply | ({"statusReason": self.status_reason} if self.status_reason else {})

    def reply(self) -> dict[str, Any]:
        """The connection as the public API's ConnectionResponse."""
        return {
            **self._common(),
            "schedule": self.schedule,
            "nonBreakingSchemaUpdatesBehavior": "ignore",
            "namespaceDefinition": self.namespace_definition,
            "configurations": {"streams": self.streams},
            "createdAt": catalog.CREATED_AT,
        }

    def config_reply(self, *, old: bool) -> dict[str, Any]:
        """The connection as the Config API's ConnectionRead."""
        reply = {
            **self._common(),
            "scheduleType": self.schedule["scheduleType"],
            "namespaceDefinition": self.namespace_definition.replace("_", ""),
            "operationIds": [],
            "breakingChange": False,
            "syncCatalog": {"streams": [_stream_config(stream) for stream in self.streams]},
            "created_at": catalog.CREATED_AT,
        }
        if old:
            for name in ("workspaceId", "tags", "created_at", "statusReason"):
                reply.pop(name, None)
        return reply


def _stream_config(stream: dict[str, Any]) -> dict[str, Any]:
    namespace = {"namespace": stream["namespace"]} if stream.get("namespace") else {}
    return {
        "stream": {
            "name": stream["name"],
            **namespace,
            "jsonSchema": {},
            "supportedSyncModes": ["full_refresh"],
        },
        "config": {
            "syncMode": "full_refresh",
            "destinationSyncMode": "overwrite",
            "cursorField": [],
            "primaryKey": stream.get("primaryKey", []),
            "aliasName": stream["name"],
            "selected": True,
        },
    }


@dataclass(slots=True)
class Job:
    """One job; everything that changes about it is read from its timeline."""

    job_id: int
    job_type: JobType
    connection_id: str
    connection_name: str
    streams: list[tuple[str, str | None]]
    behaviour: ConnectionBehaviour
    outcome: AirbyteOutcome
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
        """The job as the public API's JobResponse."""
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

    # -- as the Config API writes it --

    @property
    def config_type(self) -> str:
        """The Config API's word for the kind of job."""
        return _CONFIG_TYPES.get(self.job_type, self.job_type)

    def config_reply(self, *, old: bool) -> dict[str, Any]:
        """The job as JobRead."""
        word, since, _ = self.timeline.at()
        if old and word == "queued":
            word = "pending"  # servers of that time have no such status
        reply: dict[str, Any] = {
            "id": self.job_id,
            "configType": self.config_type,
            "configId": self.connection_id,
            "createdAt": int(self.created_wall),
            "updatedAt": int(self.timeline.wall(since)),
            "status": word,
        }
        if not old:
            stats = self._stats(*self._counts(word), self.behaviour.rejected if word == "succeeded" else 0)
            reply |= {
                "enabledStreams": [_named("name", "namespace", stream) for stream in self.streams],
                "aggregatedStats": stats,
                "streamAggregatedStats": self._stream_stats(word),
            }
        return reply

    def attempts(self) -> list[dict[str, Any]]:
        """Its attempts up to now as AttemptRead, oldest first; none just after its creation."""
        word, since, final = self.timeline.at()
        began: list[float] = []
        ended: list[float] = []
        moment, before = self.timeline.started, "incomplete"
        for phase in self.timeline.phases:
            if moment > since:
                break
            if phase.word == "running" and before in ("pending", "queued", "incomplete"):
                began.append(moment)
            elif phase.word == "incomplete":
                ended.append(moment)
            moment, before = moment + phase.seconds, phase.word
        if final and len(ended) < len(began):
            ended.append(since)
        return [
            self._attempt(number, start, ended[number] if number < len(ended) else None, word, len(began))
            for number, start in enumerate(began)
        ]

    def _attempt(
        self, number: int, start: float, end: float | None, word: str, attempts: int
    ) -> dict[str, Any]:
        last = number == attempts - 1
        good = last and word == "succeeded"
        status = "running" if end is None else "succeeded" if good else "failed"
        rows, size = self._counts(word) if last else (0, 0)
        reply: dict[str, Any] = {
            "id": number,
            "status": status,
            "createdAt": int(self.timeline.wall(start)),
            "updatedAt": int(self.timeline.wall(end or start)),
            "bytesSynced": size,
            "recordsSynced": rows,
            "totalStats": self._stats(rows, size, self.behaviour.rejected if good else 0),
            "streamStats": [
                {
                    **_named("streamName", "streamNamespace", stream),
                    "stats": self._stats(rows_of_it, size_of_it, 0),
                }
                for stream, rows_of_it, size_of_it in self._shares(rows, size)
            ],
        }
        if end is not None:
            reply["endedAt"] = int(self.timeline.wall(end))
        if status == "failed" or (good and self.outcome == "partial"):
            failure = self._failure(cancelled=last and word == "cancelled", at=end or start)
            reply["failureSummary"] = {"failures": [failure], "partialSuccess": good}
        return reply

    def _failure(self, *, cancelled: bool, at: float) -> dict[str, Any]:
        behaviour, work = self.behaviour, self.timeline.work
        failure: dict[str, Any] = {
            "failureOrigin": behaviour.origin,
            "failureType": behaviour.failure,
            "externalMessage": behaviour.reason,
            "internalMessage": f"java.lang.RuntimeException: {behaviour.reason}",
            "retryable": behaviour.failure != "config_error",
            "timestamp": int(self.timeline.wall(at) * 1000),
        }
        if work is not None and work.error:
            failure |= {"failureOrigin": "destination", "externalMessage": work.error}
        if cancelled:
            failure |= {"failureType": "manual_cancellation", "externalMessage": "Setting attempt to FAILED"}
        if self.outcome == "partial":
            failure["streamDescriptor"] = _named("name", "namespace", self.streams[-1])
        return failure

    def _shares(self, rows: int, size: int) -> list[tuple[tuple[str, str | None], int, int]]:
        """Rows and bytes by stream: evenly, and nothing of the one that failed."""
        giving = self.streams[:-1] if self.outcome == "partial" else self.streams
        shares = []
        for number, stream in enumerate(self.streams):
            share = 0 if number >= len(giving) else rows // len(giving)
            if number == 0 and giving:
                share += rows % len(giving)
            shares.append((stream, share, size * share // rows if rows else 0))
        return shares

    def _stream_stats(self, word: str) -> list[dict[str, Any]]:
        return [
            {**_named("streamName", "streamNamespace", stream), **self._stats(rows, size, 0)}
            for stream, rows, size in self._shares(*self._counts(word))
        ]

    @staticmethod
    def _stats(rows: int, size: int, rejected: int) -> dict[str, int]:
        return {
            "recordsEmitted": rows + rejected,
            "bytesEmitted": size,
            "recordsCommitted": rows,
            "bytesCommitted": size,
            "recordsRejected": rejected,
        }


def _named(name: str, namespace: str, stream: tuple[str, str | None]) -> dict[str, str]:
    return {name: stream[0], **({namespace: stream[1]} if stream[1] else {})}


def course(behaviour: ConnectionBehaviour, outcome: AirbyteOutcome) -> tuple[tuple[Phase, ...], str]:
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
            course = _attempts(running, max(2, behaviour.attempts))
        case "fail":
            course = _attempts(running, behaviour.attempts)
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


def _attempts(seconds: float, number: int) -> list[Phase]:
    """So many times running, with a pause of half the length before each new attempt."""
    part = seconds / (1.5 * number - 0.5)
    one = [Phase("running", part), Phase("incomplete", part / 2)]
    return (one * number)[:-1]


def duration_text(seconds: float) -> str:
    """Seconds as an ISO 8601 duration, whole seconds, the way Java writes it."""
    whole = int(seconds)
    hours, minutes, rest = whole // 3600, whole % 3600 // 60, whole % 60
    text = (f"{hours}H" if hours else "") + (f"{minutes}M" if minutes else "") + (f"{rest}S" if rest else "")
    return f"PT{text or '0S'}"
