"""Which sources are on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prefect.client.orchestration import PrefectClient

from blocks.receiver import SOURCES, EventSource
from blocks.reference import BlockNotFound, load_block
from deployments.receiver.airbyte import AirbyteSource
from deployments.receiver.census import CensusSource
from deployments.receiver.dbt_cloud import DbtCloudSource
from deployments.receiver.fivetran import FivetranSource
from deployments.receiver.git import GitSource
from deployments.receiver.pagerduty import PagerDutySource
from deployments.receiver.s3 import S3Source
from deployments.receiver.signed import SignedWebhookSource
from deployments.receiver.slack import SlackSource
from deployments.receiver.source import Source

KINDS: dict[str, type[Source[Any]]] = {
    source.kind.get_block_type_slug(): source
    for source in (
        AirbyteSource,
        FivetranSource,
        DbtCloudSource,
        CensusSource,
        PagerDutySource,
        SlackSource,
        S3Source,
        GitSource,
        SignedWebhookSource,
    )
}
"""Every kind of source, by its block."""


class SetupWrong(Exception):
    """The receiver can't be started as it was asked to; says what to do."""


async def load_sources(client: PrefectClient, references: Sequence[str] = ()) -> list[Source[Any]]:
    """The sources that are on: those that are named, else every saved block of one of the kinds.

    Args:
        client: Of the Prefect server.
        references: Such as `fivetran-webhook/main`.

    Raises:
        SetupWrong: One that is named is not saved or is of no kind; or none is saved at all.
    """
    wanted = list(references) or [
        f"{slug}/{document.name}"
        for slug in KINDS
        for document in await client.read_block_documents_by_type(slug)
        if document.name and not document.is_anonymous
    ]
    if not wanted:
        names = ", ".join(kind.get_block_type_name() for kind in SOURCES)
        raise SetupWrong(
            f"no source is on: save a block of one of these types first ({names}). "
            "`.venv/bin/prefect block register -m blocks` makes them known; docs/events/ has each vendor's "
            "settings."
        )
    return [await _source(reference) for reference in wanted]


async def _source(reference: str) -> Source[Any]:
    slug, _, name = reference.partition("/")
    if slug not in KINDS or not name:
        raise SetupWrong(f"{reference}: name a block as <kind>/<name>, the kind one of {', '.join(KINDS)}")
    try:
        block: EventSource = await load_block(KINDS[slug].kind, name)
    except (BlockNotFound, ValueError, RuntimeError) as error:
        # A stored block that today's class refuses; pydantic's text of these blocks hides what was given.
        raise SetupWrong(f"{reference}: {error}") from None
    return KINDS[slug](block, name)
