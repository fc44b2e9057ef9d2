"""What a look remembers between runs and machines, kept in the Prefect API.

Two places, by size. A watermark is small, and people want to set it back to have rows handed over anew, so it
is a Variable. The list of files that were handed over may be long, so it is an artifact: what a person reads
as text, with what we read as JSON in a comment in it. Neither belongs to a flow run, so neither is removed
with one.

A memory belongs to a deployment: the same look deployed for another environment has one of its own.
"""

from __future__ import annotations

import hashlib
import re
from typing import Generic, TypeVar
from uuid import UUID

from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.actions import ArtifactCreate, ArtifactUpdate, VariableCreate, VariableUpdate
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey
from prefect.client.schemas.sorting import ArtifactSort
from prefect.exceptions import ObjectAlreadyExists
from prefect.runtime import deployment, flow_run
from pydantic import BaseModel, ValidationError

TAG = "elt-watermark"
StateT = TypeVar("StateT", bound=BaseModel)
_COMMENT = re.compile(r"<!-- elt-memory (.*?) -->", re.DOTALL)


class MemoryUnreadable(ValueError):
    """What a look has kept can't be read any more. It begins anew only when a person says so."""


def owner() -> str:
    """Whose memory it is: the deployment of the current flow run, or `script` outside of one."""
    name = deployment.name
    return f"{flow_run.flow_name}/{name}" if name else "script"


def memory_name(kind: str, name: str, whose: str) -> str:
    """A key for an artifact, and a name for a Variable: readable, and apart from every other's."""
    readable = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:60] or "all"
    digest = hashlib.sha256(f"{name}\n{whose}".encode()).hexdigest()[:8]
    return f"{kind}-{readable}-{digest}"


class ArtifactMemory(Generic[StateT]):
    """One state in an artifact, whose latest version counts.

    Args:
        client: Prefect's client.
        key: The artifact's key.
        kind: The state's model.
    """

    def __init__(self, client: PrefectClient, key: str, kind: type[StateT]) -> None:
        self.key = key
        self._client = client
        self._kind = kind
        self._id: UUID | None = None

    async def read(self) -> StateT | None:
        """What was kept last; None if nothing was.

        Raises:
            MemoryUnreadable: Something is there, and it is not ours.
        """
        found = await self._client.read_artifacts(
            artifact_filter=ArtifactFilter(key=ArtifactFilterKey(any_=[self.key])),
            sort=ArtifactSort.ID_DESC,
            limit=1,
        )
        if not found:
            return None
        self._id = found[0].id
        kept = _COMMENT.search(str(found[0].data))
        try:
            return self._kind.model_validate_json(kept[1] if kept else "")
        except ValidationError:
            raise MemoryUnreadable(
                f"The artifact {self.key}, in which this look keeps what it has handed over, can't be read. "
                "Delete it to begin anew."
            ) from None

    async def write(self, state: StateT, text: str) -> None:
        """Keep a state, with what a person reads of it."""
        # In JSON `--` can only be within a string, where a hyphen may be written like this.
        kept = state.model_dump_json(exclude_defaults=True).replace("--", "-\\u002d")
        data = f"{text}\n\n<!-- elt-memory {kept} -->"
        if self._id is None:
            made = await self._client.create_artifact(
                ArtifactCreate(key=self.key, type="markdown", data=data)
            )
            self._id = made.id
        else:
            await self._client.update_artifact(self._id, ArtifactUpdate(data=data))


class VariableState(Generic[StateT]):
    """One small state in a Variable, up to 5,000 characters.

    Args:
        client: Prefect's client.
        name: The Variable's name.
        kind: The state's model.
    """

    def __init__(self, client: PrefectClient, name: str, kind: type[StateT]) -> None:
        self.name = name
        self._client = client
        self._kind = kind
        self._known = False

    async def read(self) -> StateT | None:
        """What was kept last; None if nothing was.

        Raises:
            MemoryUnreadable: The Variable holds something else.
        """
        variable = await self._client.read_variable_by_name(self.name)
        if variable is None:
            return None
        self._known = True
        try:
            return self._kind.model_validate(variable.value)
        except ValidationError as error:
            wrong = "; ".join(
                f"{'.'.join(map(str, e['loc'])) or 'value'}: {e['msg']}" for e in error.errors()
            )
            raise MemoryUnreadable(
                f"The Variable {self.name} holds no watermark ({wrong}). Mend it, or delete it to begin anew."
            ) from None

    async def write(self, state: StateT) -> None:
        """Keep a state."""
        value = state.model_dump(mode="json", exclude_defaults=True)
        if not self._known:
            try:
                await self._client.create_variable(VariableCreate(name=self.name, value=value, tags=[TAG]))
            except ObjectAlreadyExists:
                pass  # by another look, since ours began
            else:
                self._known = True
                return
        self._known = True
        await self._client.update_variable(VariableUpdate(name=self.name, value=value))
