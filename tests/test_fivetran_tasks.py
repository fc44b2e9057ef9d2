"""Fivetran's block, parameters and tasks, and a flow that runs them beside Airbyte's."""

from __future__ import annotations

import asyncio
import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from prefect import flow
from pydantic import SecretStr, TypeAdapter, ValidationError

from blocks import AirbyteServer, FivetranCredentials
from blocks.fivetran import Connection
from blocks.http import AuthError, BadReply
from flows import sync_connections
from flows.fan_out import RunFailed
from sandbox import Sandbox, catalog
from tasks import cancellation
from tasks.dbt.lineage import Lineage
from tasks.fivetran import (
    TOOL,
    FivetranSync,
    FivetranVendor,
    fivetran_check,
    fivetran_status,
    fivetran_sync,
    fivetran_wait,
)
from tasks.fivetran_jobs import FivetranRequest
from tasks.jobs import Entry, InputError, JobFailed, JobPolicy, JobState, JobTimeout
from tests.fivetran_fixtures import LONG_AGO, credentials
from tests.jobs_fixtures import PREFECTS_SOCKETS, collected, until
from tests.spec_fixtures import folder

__all__ = ["collected", "credentials"]

pytestmark = [
    *PREFECTS_SOCKETS,
    # Prefect's, on every line that a task outside of a flow logs.
    pytest.mark.filterwarnings("ignore:.*without a flow run id:UserWarning"),
]
WEATHER, FLEET, SHEET = (spec.connection_id for spec in catalog.FIVETRAN_CONNECTIONS)


def sync(credentials: FivetranCredentials | str, connection_id: str = WEATHER, **fields: Any) -> FivetranSync:
    policy = JobPolicy(**{"poll": 0.05, "timeout": 20.0, **fields.pop("policy", {})})
    return FivetranSync(credentials=credentials, connection_id=connection_id, policy=policy, **fields)


# -- parameters


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"connection_id": "not one"}, "pattern"),
        ({"connection_id": "../groups"}, "pattern"),
        ({"resync": "all"}, "repeat the connection ID in confirm_resync"),
        ({"resync": "all", "confirm_resync": FLEET}, "repeat the connection ID"),
        ({"resync": {"public": ["orders"]}, "confirm_resync": "yes"}, "repeat the connection ID"),
        ({"resync": {}, "confirm_resync": WEATHER}, "names at least one"),
        ({"resync": {"public": []}, "confirm_resync": WEATHER}, "names at least one"),
        ({"resync": "some"}, "resync"),
        ({"resync": "all", "confirm_resync": WEATHER, "force": True}, "can't be had together"),
        ({"force": True, "policy": {"on_active": "skip"}}, "on_active has nothing left to decide"),
        ({"policy": {"min_rows": 1}}, "counts no rows"),
        ({"policy": {"max_rows_rejected": 0}}, "counts no rows"),
        ({"rescheduled": "ignore"}, "rescheduled"),
        ({"resynch": "all"}, "Extra inputs"),
    ],
)
def test_parameters_that_make_no_sense(fields: dict[str, Any], says: str) -> None:
    """What can't be meant is refused when it is written, a re-sync without its confirmation above all."""
    connection_id = fields.pop("connection_id", WEATHER)
    with pytest.raises(ValidationError, match=says):
        sync("fivetran", connection_id, **fields)


def test_parameters() -> None:
    """As a deployment has them; what is stored holds the block's name and no secret."""
    stored = {
        "tool": "fivetran",
        "credentials": "fivetran",
        "connection_id": FLEET,
        "resync": {"public": ["planes"]},
        "confirm_resync": FLEET,
    }
    parsed = FivetranSync.model_validate(stored)
    assert (parsed.how, parsed.label, parsed.resource_id) == ("resync", FLEET, FLEET)
    assert FivetranSync.model_validate_json(parsed.model_dump_json()) == parsed
    block = FivetranCredentials(api_key="key", api_secret=SecretStr("very-secret"))
    given = FivetranSync(credentials=block, connection_id=FLEET, force=True)
    assert given.how == "force"
    assert "very-secret" not in json.dumps(given.model_dump(mode="json")) + repr(given)


def test_the_block() -> None:
    """Addresses and keys may be pasted with their blanks and their version; secrets stay secret."""
    block = FivetranCredentials(
        api_key=" key ", api_secret=SecretStr(" secret\n"), base_url="https://api.fivetran.com/v1/"
    )
    assert (block.api_key, block.api_secret.get_secret_value()) == ("key", "secret")
    assert block.base_url == "https://api.fivetran.com"
    assert block.link("one_two") == "https://fivetran.com/dashboard/connectors/one_two/status"
    for wrong in ({"api_key": ""}, {"base_url": "https://me:mine@api.fivetran.com"}, {"api_secret": "a b"}):
        with pytest.raises(ValidationError) as caught:
            FivetranCredentials(**{"api_key": "key", "api_secret": "hunter2", **wrong})
        assert "hunter2" not in str(caught.value)
        assert "mine@" not in str(caught.value)


@pytest.mark.parametrize("secret", ["wrong-secret", "**********"])
def test_a_wrong_key_is_one_line(
    credentials: FivetranCredentials, secret: str, caplog: Any, capfd: Any
) -> None:
    """A wrong or a masked secret is said in one line, without a traceback and without the secret."""
    wrong = credentials.model_copy(update={"api_secret": SecretStr(secret)})

    @flow
    async def load() -> None:
        await fivetran_sync(sync(wrong))

    with pytest.raises(AuthError, match="masked.*save the block" if "*" in secret else "Invalid authoriz"):
        asyncio.run(load())
    seen = caplog.text + "".join(capfd.readouterr())
    assert "Fivetran" in seen
    assert "Traceback" not in seen
    assert "wrong-secret" not in seen


async def test_html_is_not_fivetran(sandbox: Sandbox, credentials: FivetranCredentials) -> None:
    """A base URL of something else than the API is said at once."""
    sandbox.faults.add(kind="html", status=200)
    async with asyncio.timeout(60):
        with pytest.raises(BadReply, match="Check that the base URL"):
            await fivetran_sync(sync(credentials))


def test_the_payload_of_the_sheet() -> None:
    """The contract's example of a connection is read as it is meant."""
    payload = (folder() / "payloads" / "fivetran_connection.json").read_text()
    found = TypeAdapter(Connection).validate_python(json.loads(payload)["data"])
    assert (found.namespace, found.tables, found.schedule_type) == ("orders_pg", [], "auto")
    assert (found.succeeded, found.ended_at, found.problem) == (True, found.succeeded_at, None)


# -- checking


async def test_check(sandbox: Sandbox, credentials: FivetranCredentials) -> None:
    """A check names connections by their schemas, says where they write to, and what is wrong with them."""
    sandbox.fivetran.set(FLEET, paused=True)
    sandbox.fivetran.set(SHEET, setup_state="broken")
    given = [
        sync(credentials),
        sync(credentials, FLEET, name="planes", owner="reference-data"),
        sync(credentials, SHEET),
    ]
    weather, fleet, sheet = await fivetran_check(given)
    assert (weather.request.name, weather.request.owner, weather.problem) == ("fivetran_weather", None, None)
    assert (fleet.request.name, fleet.request.owner) == ("planes", "reference-data")
    assert "fivetran_fleet (jaunty_hangar) can't be synced: it is paused" in str(fleet.problem)
    assert "its setup is broken" in str(sheet.problem)
    assert (weather.namespace, weather.streams) == ("fivetran_weather", ())
    assert (sheet.namespace, sheet.streams) == ("fivetran_sheets", ("airports",))
    assert not any(found.counts_rows for found in (weather, fleet, sheet))
    assert sandbox.requests.count(vendor="fivetran", method="POST") == 0


async def test_check_many(sandbox: Sandbox, credentials: FivetranCredentials) -> None:
    """A hundred connections are looked up in one request."""
    ids = sandbox.fivetran.add_connections(100)
    checked = await fivetran_check([sync(credentials, id_) for id_ in ids])
    assert [found.request.name for found in checked] == [f"raw_{id_}" for id_ in ids]
    assert sandbox.requests.count(vendor="fivetran") == 1


@pytest.mark.parametrize(
    ("ids", "says"),
    [
        ((WEATHER, WEATHER), f"{WEATHER} is listed more than once"),
        ((WEATHER, "no_such"), "knows no connection no_such"),
        ((WEATHER, FLEET, SHEET, "no_such", "nor_such"), "knows no connection no_such, nor_such"),
    ],
)
async def test_check_refuses(
    sandbox: Sandbox, credentials: FivetranCredentials, ids: tuple[str, ...], says: str
) -> None:
    """An unknown or repeated connection is refused before anything is started."""
    with pytest.raises(InputError, match=f"{says}.*[Nn]othing was started"):
        await fivetran_check([sync(credentials, id_) for id_ in ids])
    assert sandbox.requests.count(vendor="fivetran", method="POST") == 0


async def test_lineage(credentials: FivetranCredentials) -> None:
    """dbt's sources are found by the connection's id in their `meta`, else by schema, or schema and table."""

    def source(schema: str, table: str, **meta: str) -> dict[str, Any]:
        return {
            "name": table,
            "resource_type": "source",
            "schema": schema,
            "identifier": table,
            "meta": meta,
        }

    lineage = Lineage.from_manifest(
        {
            "sources": {
                "weather": source("fivetran_weather", "weather"),
                "audit": source("fivetran_weather", "fivetran_audit"),
                "planes": source("fivetran_fleet_public", "planes", fivetran_connection_id=FLEET),
                "airports": source("FIVETRAN_SHEETS", "AIRPORTS"),
                "others": source("fivetran_sheets", "others"),
            }
        }
    )
    checked = await fivetran_check([sync(credentials, id_) for id_ in (WEATHER, FLEET, SHEET)])
    found = [
        lineage.sources_of(
            each.request.resource_id, key=TOOL.meta, namespace=each.namespace, streams=each.streams
        )
        for each in checked
    ]
    assert found == [{"weather", "audit"}, {"planes"}, {"airports"}]


# -- running


async def test_sync(sandbox: Sandbox, credentials: FivetranCredentials) -> None:
    """The task loads the connection's table and names the result by its schema."""
    result = await fivetran_sync(sync(credentials, SHEET))
    assert (result.state, result.name, result.vendor) == (
        JobState.SUCCEEDED,
        "fivetran_sheets.airports",
        "fivetran",
    )
    assert sandbox.warehouse.count("fivetran_sheets.airports") == 1458


async def test_a_resync_of_tables(sandbox: Sandbox, credentials: FivetranCredentials) -> None:
    """With its confirmation, a re-sync of some tables is asked for as such."""
    result = await fivetran_sync(
        sync(credentials, FLEET, resync={"public": ["planes"]}, confirm_resync=FLEET)
    )
    assert result.state is JobState.SUCCEEDED
    assert [each.historical for each in sandbox.fivetran.syncs_of(FLEET)] == [True]


async def test_a_scope_that_can_not_be(sandbox: Sandbox, credentials: FivetranCredentials) -> None:
    """A table that a connector can't re-sync by itself is Fivetran's refusal, in its words."""
    wrong = sync(credentials, SHEET, resync={"google_sheets": ["airports"]}, confirm_resync=SHEET)
    with pytest.raises(Exception, match="google_sheets does not support the re-sync of tables"):
        await fivetran_sync(wrong)
    assert sandbox.fivetran.syncs_of(SHEET) == []


@pytest.mark.parametrize("connection_id", ["no_such", WEATHER])
async def test_refused(sandbox: Sandbox, credentials: FivetranCredentials, connection_id: str) -> None:
    """An unknown or a paused connection is bad input, and nothing is started."""
    sandbox.fivetran.set(WEATHER, paused=True)
    with pytest.raises(InputError, match=r"knows no connection no_such|it is paused"):
        await fivetran_sync(sync(credentials, connection_id))
    assert sandbox.requests.count(vendor="fivetran", method="POST") == 0


# -- waiting for others' syncs, and looking


@pytest.mark.parametrize("outcome", ["succeed", "fail"])
async def test_wait(sandbox: Sandbox, credentials: FivetranCredentials, outcome: str) -> None:
    """A sync of Fivetran's own schedule is waited for; when none is running, the last one's end is told at
    once, so that a wait that begins too late does not last for ever (airflow-provider-fivetran #39, #49)."""
    sandbox.fivetran.set(WEATHER, outcome=outcome, failed_at=LONG_AGO)
    sandbox.fivetran.run_schedule(WEATHER)
    for _ in range(2):
        async with asyncio.timeout(60):
            if outcome == "succeed":
                result = await fivetran_wait(credentials, WEATHER, policy=JobPolicy(poll=0.05))
            else:
                with pytest.raises(JobFailed, match="Reconnect") as caught:
                    await fivetran_wait(credentials, WEATHER, policy=JobPolicy(poll=0.05))
                result = caught.value.result
        assert result.duration is None
    assert len(sandbox.fivetran.syncs_of(WEATHER)) == 1
    assert sandbox.requests.count(vendor="fivetran", method="POST") == 0


async def test_wait_since(sandbox: Sandbox, credentials: FivetranCredentials) -> None:
    """An end after a moment is waited for, also of a sync that has yet to begin; an older one is none."""
    sandbox.fivetran.set(WEATHER, succeeded_at=LONG_AGO)
    policy = JobPolicy(poll=0.05, timeout=60)
    earlier = LONG_AGO - timedelta(seconds=1)
    assert (await fivetran_wait(credentials, WEATHER, earlier, policy)).state is JobState.SUCCEEDED
    with pytest.raises(JobTimeout, match="was left running"):
        await fivetran_wait(credentials, WEATHER, LONG_AGO, JobPolicy(poll=0.05, timeout=0.3))
    waiting = asyncio.create_task(fivetran_wait(credentials, WEATHER, LONG_AGO, policy))
    await asyncio.sleep(0.2)
    sandbox.fivetran.run_schedule(WEATHER)
    assert (await waiting).state is JobState.SUCCEEDED


async def test_there_is_nothing_to_wait_for(sandbox: Sandbox, credentials: FivetranCredentials) -> None:
    """A connection that was never synced and does nothing is not waited for."""
    with pytest.raises(InputError, match="has never been synced and is not syncing now"):
        await fivetran_wait(credentials, WEATHER)


@pytest.mark.parametrize(
    ("change", "state", "says"),
    [
        ({}, JobState.QUEUED, "never been synced"),
        ({"succeeded_at": LONG_AGO}, JobState.SUCCEEDED, None),
        ({"succeeded_at": LONG_AGO, "warnings": ["Slow"]}, JobState.SUCCEEDED, "Slow"),
        ({"failed_at": LONG_AGO}, JobState.FAILED, "names no reason"),
        ({"succeeded_at": LONG_AGO, "paused": True}, JobState.SUCCEEDED, "it is paused"),
        ({"setup_state": "incomplete"}, JobState.QUEUED, "its setup is incomplete"),
    ],
)
async def test_status(
    sandbox: Sandbox,
    credentials: FivetranCredentials,
    change: dict[str, Any],
    state: JobState,
    says: str | None,
) -> None:
    """The state of a connection at rest is how its last sync ended, with why none will follow."""
    sandbox.fivetran.set(WEATHER, **change)
    result = await fivetran_status(credentials, WEATHER)
    assert (result.state, result.name, result.job_id) == (state, "fivetran_weather", None)
    assert says in str(result.message) if says else result.message is None


async def test_status_of_what_goes_on(sandbox: Sandbox, credentials: FivetranCredentials) -> None:
    """While a sync runs the state is RUNNING, and QUEUED while it is put off."""
    sandbox.fivetran.set(WEATHER, outcome="stuck", succeeded_at=LONG_AGO)
    sandbox.fivetran.run_schedule(WEATHER)
    assert (await fivetran_status(credentials, WEATHER)).state is JobState.RUNNING
    sandbox.fivetran.finish_sync(WEATHER, "succeeded")
    sandbox.fivetran.set(WEATHER, outcome="reschedule", rescheduled_seconds=600, duration=0.1)
    sandbox.fivetran.run_schedule(WEATHER)
    await until(lambda: sandbox.fivetran.connection(WEATHER).sync_state() == "rescheduled")
    result = await fivetran_status(credentials, WEATHER)
    assert (result.state, "takes no more requests" in str(result.message)) == (JobState.QUEUED, True)


# -- in flows


def test_beside_airbyte(sandbox: Sandbox, airbyte: AirbyteServer, credentials: FivetranCredentials) -> None:
    """One fan-out runs connections of both tools; a paused one fails for its reason, the others run."""
    credentials.save("fivetran", overwrite=True)
    airbyte.save("airbyte", overwrite=True)
    sandbox.fivetran.set(FLEET, paused=True)
    policy = {"poll": 0.1}
    syncs: list[Any] = [
        {"tool": "fivetran", "credentials": "fivetran", "connection_id": WEATHER, "policy": policy},
        {
            "tool": "airbyte",
            "server": "airbyte",
            "connection_id": catalog.CONNECTIONS[4].connection_id,
            "policy": policy,
        },
        {"tool": "fivetran", "credentials": "fivetran", "connection_id": FLEET, "policy": policy},
    ]
    with pytest.raises(RunFailed) as caught:
        sync_connections(syncs=syncs, allow_failure={"required": [FLEET]})
    report = caught.value.report
    assert [(step.tool, step.name, step.state.value) for step in report.steps] == [
        ("fivetran", "fivetran_weather", "SUCCEEDED"),
        ("airbyte", "airlines", "SUCCEEDED"),
        ("fivetran", "fivetran_fleet", "FAILED"),
    ]
    assert "it is paused" in str(report.steps[2].message)
    assert sandbox.warehouse.count("fivetran_weather.weather") == 26_115


async def test_the_hook_of_a_cancelled_run(sandbox: Sandbox, credentials: FivetranCredentials) -> None:
    """From another process, a start without its reply is found by the journal alone, and said to go on."""
    await credentials.save("fivetran-hook", overwrite=True)  # type: ignore[misc]  # a coroutine in a loop
    sandbox.fivetran.set(WEATHER, duration=5)
    vendor = FivetranVendor(credentials)
    request = FivetranRequest(WEATHER, "sync", "weather", None, timeout=60)
    async with vendor.session():
        entry = Entry(
            key=f"fivetran:sync:{WEATHER}",
            vendor="fivetran",
            resource_id=WEATHER,
            name="weather",
            block="fivetran-credentials/fivetran-hook",
            since=datetime.now(UTC),
            baseline=await vendor.baseline(request),
        )
        await vendor.start(request, entry)
    cancelled = await cancellation._cancel(entry)
    assert (cancelled.words, cancelled.over) == ("fivetran can't cancel; it goes on", False)
