"""What flows take of Airbyte: a sync of one connection, and connections by tag, workspace or name."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Annotated, Any, Literal
from uuid import UUID

from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    WithJsonSchema,
    field_serializer,
    field_validator,
    model_validator,
)

from blocks.airbyte import AirbyteServer
from blocks.airbyte_model import Connection
from blocks.reference import NAMED, stored_block
from tasks.jobs import JobPolicy, ToolParameters

ServerRef = Annotated[
    AirbyteServer | str,
    NAMED,
    # In a form and in a deployment it is the name; instances are for scripts.
    WithJsonSchema({"type": "string", "description": "Name of a saved Airbyte Server block."}),
]
Before = Annotated[
    Literal["clear", "reset"] | None,
    Field(
        title="Before",
        description="Delete what was loaded, so that the sync loads everything anew: `clear`, or `reset` for "
        "servers before 2024 and where the role allows no clear. Until the sync ends the tables are empty.",
    ),
]


class _OnServer(ToolParameters):
    server: ServerRef = Field(title="Server")

    @field_serializer("server", mode="wrap")
    def _by_name(self, server: AirbyteServer | str, handler: SerializerFunctionWrapHandler) -> Any:
        # What is stored with a flow run must work in a retry of it, and hold no secret.
        return stored_block(server, AirbyteServer, handler)


class AirbyteSync(_OnServer):
    """A sync of one connection, as a flow takes it."""

    tool: Literal["airbyte"] = "airbyte"
    connection_id: str = Field(title="Connection ID", description="The UUID in the connection's address.")
    name: str = Field(default="", title="Name", description="For people; Airbyte's own name by default.")
    owner: str | None = Field(
        default=None,
        title="Owner",
        description="Who is told of a failure; by default the tag `owner:<name>`.",
    )
    before: Before = None
    streams: list[str] = Field(
        default=[],
        title="Streams",
        description="With `before`: delete these only. Not in Airbyte Cloud, which has no API for it.",
    )
    policy: JobPolicy = Field(default_factory=JobPolicy, title="Policy")

    @field_validator("connection_id")
    @classmethod
    def _is_uuid(cls, value: str) -> str:
        return _uuid(value, "connection")

    @model_validator(mode="after")
    def _streams_of_what(self) -> AirbyteSync:
        if self.streams and not self.before:
            raise ValueError(
                "streams say what is deleted before a sync, which loads all of them: set `before`"
            )
        return self

    @property
    def resource_id(self) -> str:
        """The connection."""
        return self.connection_id

    @property
    def label(self) -> str:
        """What a person calls it."""
        return self.name or self.connection_id[:8]


class AirbyteConnections(_OnServer):
    """Syncs of all connections that are tagged, named or placed so, looked up when the run begins.

    One that is also listed as an `AirbyteSync` runs once, as it is listed. One that somebody has paused is
    left out, with a line in the log; one that Airbyte itself took out of service is a problem of the run, as
    is a selection that nothing fits.
    """

    tool: Literal["airbyte-connections"] = "airbyte-connections"
    tags: list[str] = Field(
        default=[], title="Tags", description="Names of tags; a connection with any of them is taken."
    )
    pattern: str | None = Field(
        default=None, title="Pattern", description="Of the connection's name, such as `sales-*`; `*` for all."
    )
    workspace_ids: list[str] = Field(
        default=[],
        title="Workspaces",
        description="UUIDs; a connection in any of them is taken. Empty: all that the server's block lists.",
    )
    name: str = Field(default="", title="Name", description="Of the selection, for people.")
    owner: str | None = Field(
        default=None,
        title="Owner",
        description="Who is told of the failure of a connection that has no tag `owner:<name>`.",
    )
    before: Before = None
    policy: JobPolicy = Field(default_factory=JobPolicy, title="Policy", description="Of each of the syncs.")

    @field_validator("workspace_ids")
    @classmethod
    def _are_uuids(cls, values: list[str]) -> list[str]:
        return [_uuid(value, "workspace") for value in values]

    @model_validator(mode="after")
    def _not_everything(self) -> AirbyteConnections:
        if not (self.tags or self.pattern or self.workspace_ids):
            raise ValueError("Say which connections: by tags, pattern or workspace_ids; pattern '*' is all.")
        return self

    @property
    def resource_id(self) -> str:
        """The selection in words; it has no id."""
        return self.label

    @property
    def label(self) -> str:
        """What a person calls it."""
        parts = [
            f"tagged {' or '.join(self.tags)}" if self.tags else "",
            f"named {self.pattern}" if self.pattern else "",
            f"in workspace {' or '.join(self.workspace_ids)}" if self.workspace_ids else "",
        ]
        return self.name or f"connections {', '.join(filter(None, parts))}"

    def takes(self, connection: Connection) -> bool:
        """Whether a connection fits all of tags, pattern and workspaces."""
        return (
            (not self.tags or not set(self.tags).isdisjoint(connection.tags))
            and (self.pattern is None or fnmatchcase(connection.name, self.pattern))
            and (not self.workspace_ids or connection.workspace_id in self.workspace_ids)
        )

    def sync_of(self, connection: Connection) -> AirbyteSync:
        """The sync of one connection of the selection."""
        return AirbyteSync(
            server=self.server,
            connection_id=connection.id,
            name=connection.name,
            owner=connection.owner or self.owner,
            before=self.before,
            policy=self.policy,
        )


def _uuid(value: str, of: str) -> str:
    try:
        return str(UUID(value))
    except ValueError:
        raise ValueError(
            f"{value!r} is not an Airbyte {of} id; that is the UUID in the {of}'s address"
        ) from None
