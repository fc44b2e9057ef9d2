"""Where open incidents are remembered between runs and machines: a Prefect Variable for each.

A variable because its name is unique in Prefect's database: of two runs that meet the same trouble at the
same moment, one creates it and tells, and the other learns that it need not. An artifact can only be added
to, so both would tell; one variable for all would have to be read, changed and written, so one of two runs
would lose what it wrote, and 5,000 characters hold some ten incidents. In the UI, Variables with the tag
`elt-incident` are the list of what is broken now; whoever deletes one closes it, and what is still wrong is
told anew.

Measured on SQLite: 12 ms to create, 11 to change, 10 to delete, 6 to read all of a pipeline.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any, Protocol

import orjson
from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.actions import VariableCreate, VariableUpdate
from prefect.client.schemas.objects import Variable
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound, PrefectHTTPStatusError
from pydantic import ValidationError

from tasks.incidents import Incident

TAG = "elt-incident"
_PREFIX = "elt-incident"
_PAGE = 200
_AT_ONCE = 10
_MOST = 4900  # characters: Prefect takes 5,000
# Longer than telling may take: whoever has claimed an end and is not done by then, is dead.
_STALE = timedelta(seconds=60)


class Memory(Protocol):
    """The open incidents of one pipeline, as one notifier has told them."""

    async def read(self) -> list[Incident]:
        """All that are open."""

    async def open(self, incident: Incident) -> bool:
        """Remember a new one; False if another run has done so before us."""

    async def keep(self, incident: Incident) -> None:
        """Remember how one is now."""

    async def claim_end(self, incident: Incident) -> bool:
        """Take it on to tell the end of one; False if another run is at it."""

    async def release_end(self, incident: Incident) -> None:
        """Leave the end to the next run."""

    async def close(self, incident: Incident) -> None:
        """Forget one that is over."""


class VariableMemory:
    """Incidents in Prefect's Variables.

    Args:
        client: Prefect's client.
        pipeline: Whose they are.
        route: Who has told them.
    """

    def __init__(self, client: PrefectClient, pipeline: str, route: str) -> None:
        self._client = client
        self._pipeline = pipeline
        self._scope = f"{_PREFIX}-{_digest(pipeline, 8)}{_digest(route, 8)}"
        self._slots = asyncio.Semaphore(_AT_ONCE)

    async def read(self) -> list[Incident]:
        """All that are open. One that can't be read is forgotten, and what it was is told anew."""
        found: list[Variable] = []
        while True:
            response = await self._client.request(
                "POST",
                "/variables/filter",
                json={
                    "variables": {"name": {"like_": f"{self._scope}-"}},
                    "limit": _PAGE,
                    "offset": len(found),
                },
            )
            page = [Variable.model_validate(raw) for raw in response.json()]
            found += page
            if len(page) < _PAGE:
                break
        open_: list[Incident] = []
        for variable in found:
            if variable.name.endswith("-ending"):
                continue
            if (incident := _parsed(variable.value)) is None:
                await self._delete(variable.name)
            else:
                open_.append(incident)
        return open_

    async def open(self, incident: Incident) -> bool:
        """Remember a new one; False if another run has done so before us."""
        return await self._create(self._name(incident), _fitting(incident))

    async def keep(self, incident: Incident) -> None:
        """Remember how one is now, also where it was closed meanwhile: what we saw is newer."""
        name = self._name(incident)
        async with self._slots:
            try:
                await self._client.update_variable(VariableUpdate(name=name, value=_fitting(incident)))
            except PrefectHTTPStatusError as error:
                if error.response.status_code != 404:
                    raise
            else:
                return
        await self._create(name, _fitting(incident))

    async def claim_end(self, incident: Incident) -> bool:
        """Take it on to tell the end of one; False if another run is at it or has done it."""
        name = self._ending(incident)
        if not await self._create(name, datetime.now(UTC).isoformat()):
            async with self._slots:
                other = await self._client.read_variable_by_name(name)
            if other is None or not _is_stale(other.value):
                return False
            await self._delete(name)
            if not await self._create(name, datetime.now(UTC).isoformat()):
                return False
        # Another run may have told it and let go between our reading and our claim.
        async with self._slots:
            if await self._client.read_variable_by_name(self._name(incident)) is not None:
                return True
        await self._delete(name)
        return False

    async def release_end(self, incident: Incident) -> None:
        """Leave the end to the next run."""
        await self._delete(self._ending(incident))

    async def close(self, incident: Incident) -> None:
        """Forget one that is over, and then that we were at it."""
        await self._delete(self._name(incident))
        await self._delete(self._ending(incident))

    def _name(self, incident: Incident) -> str:
        return f"{self._scope}-{_digest(incident.key, 16)}"

    def _ending(self, incident: Incident) -> str:
        return f"{self._name(incident)}-ending"

    async def _create(self, name: str, value: Any) -> bool:
        async with self._slots:
            try:
                await self._client.create_variable(
                    VariableCreate(name=name, value=value, tags=[TAG, self._pipeline])
                )
            except ObjectAlreadyExists:
                return False
        return True

    async def _delete(self, name: str) -> None:
        async with self._slots:
            try:
                await self._client.delete_variable_by_name(name)
            except ObjectNotFound:
                return


@asynccontextmanager
async def variable_memory(pipeline: str, route: str) -> AsyncIterator[VariableMemory]:
    """The memory, with a client of its own."""
    async with get_client() as client:
        yield VariableMemory(client, pipeline, route)


def _digest(text: str, length: int) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:length]


def _parsed(value: Any) -> Incident | None:
    try:
        return Incident.model_validate(value)
    except ValidationError:
        return None


def _is_stale(value: Any) -> bool:
    try:
        return datetime.now(UTC) - datetime.fromisoformat(str(value)) > _STALE
    except (ValueError, TypeError):
        return True


def _fitting(incident: Incident) -> dict[str, Any]:
    """The incident as a variable can hold it: the vendor's words are what may be long."""
    while True:
        stored: dict[str, Any] = incident.model_dump(mode="json", exclude_defaults=True)
        # Prefect counts characters of ASCII JSON, in which a letter may be six of them.
        size = sum(6 if ord(c) > 127 else 1 for c in orjson.dumps(stored).decode())
        if size <= _MOST or not incident.reason:
            return stored
        incident = incident.model_copy(update={"reason": incident.reason[: len(incident.reason) // 2]})
