"""Looks Airbyte's connections up before anything is started, and finds those that a selection means.

Vendor documentation: https://reference.airbyte.com/reference/listconnections
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger

from blocks.airbyte import AirbyteServer
from blocks.airbyte_model import Connection, Stream
from blocks.fields import OWNER_TAG
from blocks.http import NotFoundError
from blocks.reference import load_block
from tasks.airbyte_jobs import AirbyteVendor, refuse_unless_active
from tasks.airbyte_model import AirbyteConnections, AirbyteSync
from tasks.jobs import Checked, InputError, refuse_twice, watcher_for, without_traceback

_FEW = 3  # up to so many connections are read one by one: a list would cost as much
_SHOWN = 20  # names in a message


@task(
    name="airbyte-check", task_run_name="check Airbyte connections", tags=["airbyte"], cache_policy=NO_CACHE
)
async def airbyte_check(syncs: list[AirbyteSync | AirbyteConnections]) -> list[Checked[AirbyteSync]]:
    """Look up the connections of a fan-out before anything is started, a hundred per request.

    Args:
        syncs: Syncs and selections, of one or more servers. A connection that is in several selections, or
            listed as a sync as well, comes once: as it is listed, else by the first selection that takes it.

    Returns:
        The syncs with names and owners filled in, each selection replaced by its connections. An inactive
        connection carries its `problem`; one that a selection takes and that was paused by hand is left out.

    Raises:
        InputError: A connection does not exist or is listed twice, a selection is empty, or a policy asks for
            what the server does not tell. Nothing was started.
        BlockNotFound: A server is the name of a block that is not saved.
        VendorError: The server can't be reached or refuses the credentials.
    """
    without_traceback()
    servers: dict[Hashable, AirbyteServer] = {}
    accounts: list[Hashable] = []
    for sync in syncs:
        server = await load_block(AirbyteServer, sync.server)
        refuse_uncounted(server, sync)
        servers[server.account] = server
        accounts.append(server.account)
    requests = list(zip(accounts, syncs, strict=True))
    pairs = [(account, sync.connection_id) for account, sync in requests if isinstance(sync, AirbyteSync)]
    refuse_twice("Connection", pairs)
    known: dict[Hashable, dict[str, Connection]] = {}
    for account, server in servers.items():
        wanted = [connection for of, connection in pairs if of == account]
        selects = any(of == account and isinstance(sync, AirbyteConnections) for of, sync in requests)
        known[account] = await _read(server, wanted, whole=selects)
    if unknown := [connection for account, connection in pairs if connection not in known[account]]:
        raise InputError(
            f"Airbyte knows no connection {', '.join(unknown)}, or these credentials may not see it. "
            "Nothing was started."
        )
    taken = set(pairs)
    checked: list[Checked[AirbyteSync]] = []
    for account, sync in requests:
        if isinstance(sync, AirbyteSync):
            checked.append(_checked(sync, known[account][sync.connection_id]))
            continue
        for connection in _select(sync, list(known[account].values())):
            if (account, connection.id) not in taken:
                taken.add((account, connection.id))
                checked.append(_checked(sync.sync_of(connection), connection))
    return checked


async def _read(server: AirbyteServer, wanted: Sequence[str], *, whole: bool) -> dict[str, Connection]:
    """The connections that are wanted, by id, and all others where there is a selection."""
    # What is read here, and the token, serve the syncs that follow on this loop.
    await watcher_for(AirbyteVendor(server))
    known: dict[str, Connection] = {}
    async with server.connect() as api:
        if whole or len(wanted) > _FEW:
            known.update((connection.id, connection) for connection in await api.connections())
        for connection_id in wanted:
            if connection_id not in known:
                try:
                    known[connection_id] = await api.connection(connection_id)
                except NotFoundError:
                    continue
    return known


def _select(selection: AirbyteConnections, connections: Sequence[Connection]) -> list[Connection]:
    """The connections that a selection means, by name.

    Raises:
        InputError: There is none.
    """
    log = get_run_logger()
    fitting = sorted((c for c in connections if selection.takes(c)), key=lambda c: (c.name, c.id))
    # Somebody who pauses a connection means it. Airbyte, which disables what keeps failing, gives a reason.
    paused = [c for c in fitting if c.status == "inactive" and not c.status_reason]
    if paused:
        log.warning("%s: left out, because paused in Airbyte: %s", selection.label, _names(paused))
    found = [c for c in fitting if c not in paused]
    if not found:
        what = f"all {len(paused)} of them are paused" if paused else "there is none"
        tags = sorted({tag for c in connections for tag in c.tags if not tag.startswith(OWNER_TAG)})
        hint = f" Tags in use: {', '.join(tags[:_SHOWN]) or 'none'}." if selection.tags and not paused else ""
        raise InputError(
            f"Airbyte, {selection.label}: {what}, of {len(connections)} connections that these credentials "
            f"may see.{hint} Nothing was started."
        )
    for tag in selection.tags:
        if not any(tag in c.tags for c in fitting):
            log.warning("%s: no connection has the tag %r", selection.label, tag)
    log.info("%s: %d: %s", selection.label, len(found), _names(found))
    return found


def _names(connections: Sequence[Connection]) -> str:
    names = [connection.name for connection in connections]
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _checked(sync: AirbyteSync, connection: Connection) -> Checked[AirbyteSync]:
    problem = None
    try:
        refuse_unless_active(connection)
        streams_of(connection, sync.streams)
    except InputError as error:
        problem = str(error)
    return Checked(
        named(sync, connection),
        namespace=connection.namespace,
        prefix=connection.prefix or "",
        streams=tuple(stream.name for stream in connection.streams),
        problem=problem,
    )


def refuse_uncounted(server: AirbyteServer, sync: AirbyteSync | AirbyteConnections) -> None:
    """Refuse a limit that could never be kept.

    Raises:
        InputError: Rejected rows are limited, and nobody will tell how many there were. Nothing was started.
    """
    if server.in_cloud and sync.policy.max_rows_rejected is not None:
        raise InputError(
            f"Airbyte, {sync.label}: Airbyte Cloud's API does not tell how many rows were rejected, so that "
            "max_rows_rejected can't be checked. Test the rows in dbt, or by a gate. Nothing was started."
        )


def streams_of(connection: Connection, names: Sequence[str]) -> tuple[Stream, ...]:
    """The streams of these names.

    Raises:
        InputError: The connection does not have one of them. Nothing was started.
    """
    known = {stream.name for stream in connection.streams}
    if unknown := [name for name in names if name not in known]:
        raise InputError(
            f"Airbyte connection {connection.name!r} has no stream {', '.join(unknown)}. "
            f"It has: {', '.join(sorted(known))}. Nothing was started."
        )
    return tuple(stream for stream in connection.streams if stream.name in names)


def named(sync: AirbyteSync, connection: Connection) -> AirbyteSync:
    """The sync with Airbyte's name and owner where it has none of its own."""
    return sync.model_copy(
        update={"name": sync.name or connection.name, "owner": sync.owner or connection.owner}
    )
