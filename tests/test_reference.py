"""Blocks by name: what can't be a name is told to nobody, and what is filled in wrongly is said in short."""

from __future__ import annotations

import asyncio
import logging
from typing import Any
from uuid import uuid4

import pytest
from prefect.blocks.core import Block
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import BlockDocumentCreate
from prefect.exceptions import ParameterTypeError
from prefect_slack import SlackWebhook
from pydantic import TypeAdapter, ValidationError, field_validator

from blocks import AirbyteServer, PagerDutyRouting
from blocks.reference import UNSAVED, BlockNotFound, BlockUnusable, load_block
from flows import elt_chain, sync_connections
from flows.parameters import GateCheck, Notify, OwnStep, Sync, Transform
from tasks.slack import SlackNotify

SECRET = "sEcReT0123456789"  # noqa: S105 - stands for one
CONNECTION = "00000000-0000-4000-8000-000000000001"
URL = f"https://hooks.slack.com/services/T0/B0/{SECRET}"

WAYS: list[tuple[Any, dict[str, Any], str]] = [
    (Notify, {"tool": "slack"}, "webhook"),
    (Notify, {"tool": "slack-channel", "channel": "#data"}, "credentials"),
    (Notify, {"tool": "pagerduty"}, "routing"),
    (Sync, {"tool": "airbyte", "connection_id": CONNECTION}, "server"),
    (Sync, {"tool": "fivetran", "connection_id": "abc"}, "credentials"),
    (Sync, {"tool": "http-job"}, "job"),
    (Transform, {"tool": "dbt-cloud", "job_id": "1"}, "credentials"),
    (GateCheck, {"tool": "sql", "query": "SELECT 1", "at_least": 1}, "database"),
    (OwnStep, {"tool": "sql", "statements": ["SELECT 1"]}, "database"),
]


@pytest.mark.no_server
@pytest.mark.parametrize(("kind", "rest", "field"), WAYS, ids=[f"{way[1]['tool']}" for way in WAYS])
@pytest.mark.parametrize("given", [URL, SECRET, f"{SECRET}@host/db", f"on call {SECRET}"])
def test_what_can_be_no_name_is_refused_and_not_repeated(
    kind: Any, rest: dict[str, Any], field: str, given: str
) -> None:
    """A URL or a key that is pasted where a block's name belongs stays where it is."""
    with pytest.raises(ValidationError, match="Give the name of a saved block") as refused:
        TypeAdapter(kind).validate_python({**rest, field: given})
    (problem,) = refused.value.errors(include_input=False)
    assert problem["loc"][-1] == field
    assert SECRET not in problem["msg"]


@pytest.mark.no_server
def test_the_text_of_the_refusal_hides_what_was_given() -> None:
    """Pitfall: pydantic's own text quotes it."""
    for fields in ({"webhook": URL}, {"webhook": "on-call", "owners": {"weather": URL}}):
        with pytest.raises(ValidationError) as refused:
            SlackNotify(**fields)
        assert SECRET not in str(refused.value)


@pytest.mark.no_server
@pytest.mark.parametrize("name", ["on-call", "2nd", "slack-incoming-webhook/on-call", "-", UNSAVED])
def test_every_name_that_prefect_permits_is_taken(name: str) -> None:
    """With the slug of the block's type or without; and what a run's parameters hold of an unsaved block."""
    assert SlackNotify(webhook=name).webhook == name


def test_a_flow_that_refuses_it_repeats_it_nowhere(caplog: pytest.LogCaptureFixture) -> None:
    """Neither the state nor any log has it; Prefect's own logs all parameters that a flow refuses."""
    others = {"tool": "pagerduty", "routing": "on-call"}
    with caplog.at_level(logging.DEBUG):
        state = sync_connections(
            syncs=[], notify=[{"tool": "slack", "webhook": URL}, others], return_state=True
        )
    assert state.is_failed()
    assert "Give the name of a saved block" in str(state.message)
    assert SECRET not in str(state.message)
    ours = "\n".join(record.getMessage() for record in caplog.records if record.name.startswith("prefect."))
    assert "Parameter validation failed" in ours
    assert SECRET not in ours
    with pytest.raises(ParameterTypeError) as refused:
        elt_chain.validate_parameters({"syncs": [], "notify": {"tool": "slack", "webhook": URL}})
    assert SECRET not in str(refused.value)


async def test_a_missing_block_is_named_unless_it_may_be_a_key() -> None:
    """A mistyped name is said; a PagerDuty key could be a name, and is not."""
    with pytest.raises(BlockNotFound, match="named 'on-cal'"):
        await load_block(PagerDutyRouting, "on-cal")
    key = "r0ab1c2d3e4f5061728394a5b6c7d8e9"
    for given in (key, f"pagerduty-routing/{key}"):
        with pytest.raises(BlockNotFound, match="of the name that was given") as missing:
            await load_block(PagerDutyRouting, given)
        assert key not in str(missing.value)
    with pytest.raises(BlockNotFound, match="Give the name of a saved block") as missing:
        await load_block(SlackWebhook, URL)
    assert SECRET not in str(missing.value)
    with pytest.raises(BlockNotFound, match="save the block and pass its name"):
        await load_block(SlackWebhook, UNSAVED)


# -- for how long a block is good ---------------------------------------------------------------------------


async def test_a_changed_key_is_used_within_a_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks of one fan-out share what was loaded; a process that runs for weeks does not keep it."""
    name = f"on-call-{uuid4().hex[:4]}"
    old, new = "0" * 32, "1" * 32
    await _saved(PagerDutyRouting, name, {"routing_key": old})
    first, same = await asyncio.gather(*(load_block(PagerDutyRouting, name) for _ in range(2)))
    assert first is same
    await PagerDutyRouting(routing_key=new).save(name, overwrite=True)  # type: ignore[misc]  # async here
    assert await load_block(PagerDutyRouting, name) is first
    now = asyncio.get_running_loop().time()
    monkeypatch.setattr(asyncio.get_running_loop(), "time", lambda: now + 61)
    assert (await load_block(PagerDutyRouting, name)).routing_key.get_secret_value() == new


# -- blocks that are filled in wrongly ----------------------------------------------------------------------


async def _saved(kind: type[Block], name: str, data: dict[str, Any]) -> None:
    """A block as somebody fills it in in the UI, which checks next to nothing."""
    async with get_client() as client:
        await kind.aregister_type_and_schema(client=client)
        type_ = await client.read_block_type_by_slug(kind.get_block_type_slug())
        schema = await client.read_block_schema_by_checksum(kind._calculate_schema_checksum())
        await client.create_block_document(
            BlockDocumentCreate(name=name, data=data, block_type_id=type_.id, block_schema_id=schema.id)
        )


async def test_a_block_that_is_filled_in_wrongly_is_said_in_a_sentence() -> None:
    """Which field and why, without what is in it; not Prefect's advice to load it unchecked."""
    name = f"on-call-{uuid4().hex[:4]}"
    await _saved(PagerDutyRouting, name, {"routing_key": f"{SECRET} ü"})
    with pytest.raises(BlockUnusable) as unusable:
        await load_block(PagerDutyRouting, name)
    said = str(unusable.value)
    assert said.startswith(
        f"The PagerDuty Routing block {name!r} can't be used: routing_key: It holds a blank"
    )
    assert SECRET not in said
    assert "validate" not in said
    assert unusable.value.__suppress_context__


async def test_other_packages_checks_are_not_quoted() -> None:
    """Only pydantic's own words are: a check of somebody's block may repeat what it refuses."""
    name = f"talker-{uuid4().hex[:4]}"
    await _saved(Talker, name, {"key": SECRET})
    with pytest.raises(BlockUnusable, match="used: key: Not valid; other: Field required") as unusable:
        await load_block(Talker, name)
    assert SECRET not in str(unusable.value)


class Talker(Block):
    """A block of another package, whose check says too much."""

    key: str
    other: int

    @field_validator("key")
    @classmethod
    def _repeat(cls, value: str) -> str:
        raise ValueError(f"{value} is wrong")


def test_a_run_with_such_a_block_ends_with_the_sentence(caplog: pytest.LogCaptureFixture) -> None:
    """It is a known error: no traceback, and nothing was started."""
    name = f"airbyte-{uuid4().hex[:4]}"
    asyncio.run(_saved(AirbyteServer, name, {"base_url": ""}))
    state: Any = sync_connections(
        syncs=[{"tool": "airbyte", "server": name, "connection_id": CONNECTION}], return_state=True
    )
    assert state.is_failed()
    assert state.message == (
        f"The Airbyte Server block {name!r} can't be used: base_url: The base URL is empty; give one such as "
        "https://api.airbyte.com/v1 or http://localhost:8000. Mend it in Prefect, under Blocks."
    )
    assert not any(record.exc_info for record in caplog.records)
