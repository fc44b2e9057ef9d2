"""What flows take: the jobs of every tool, told apart by their `tool`.

In a deployment and in a form `tool` is written out; in Python the class says it.
"""

# No `from __future__ import annotations` here: see flows/elt.py.
from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from tasks.airbyte import AirbyteConnections, AirbyteSync
from tasks.census import CensusSync
from tasks.dbt_cloud_model import DbtCloud
from tasks.dbt_core import DbtCore
from tasks.fivetran import FivetranSync
from tasks.gates import GateCheck
from tasks.hightouch import HightouchSequence, HightouchSync
from tasks.http_job import HttpJobRun
from tasks.jobs import without_parameters
from tasks.pagerduty import PagerDutyNotify
from tasks.slack import SlackChannel, SlackNotify
from tasks.steps import OwnStep

__all__ = ["Activation", "GateCheck", "Notify", "NotifyList", "OwnStep", "Sync", "Transform"]

# Prefect looks at the parameters before a line of a flow has run, so it is done here.
without_parameters()

Sync = Annotated[AirbyteSync | AirbyteConnections | FivetranSync | HttpJobRun, Field(discriminator="tool")]
"""What loads a connection, or connections by tag."""

Transform = Annotated[DbtCore | DbtCloud, Field(discriminator="tool")]
"""What builds models."""

Activation = Annotated[
    HightouchSync | HightouchSequence | CensusSync | HttpJobRun, Field(discriminator="tool")
]
"""What sends models on to where they are used."""

Notify = Annotated[SlackNotify | SlackChannel | PagerDutyNotify, Field(discriminator="tool")]
"""Who is told."""


def _many(given: Any) -> Any:
    if given is None:
        return []
    return list(given) if isinstance(given, list | tuple) else [given]


NotifyList = Annotated[list[Notify], BeforeValidator(_many)]
"""All who are told; in Python one may be given alone."""
