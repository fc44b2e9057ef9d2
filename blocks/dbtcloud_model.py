"""What dbt Cloud's Administrative API (v2) says of jobs and runs.

Vendor documentation: https://docs.getdbt.com/dbt-cloud/api-v2
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator


def _aware(moment: datetime) -> datetime:
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


_Moment = Annotated[datetime, AfterValidator(_aware)]


class Overrides(BaseModel):
    """What one run does otherwise than its job says. What is None is not sent: the job's own counts."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    git_sha: str | None = Field(default=None, min_length=1, description="Commit to check out.")
    git_branch: str | None = Field(default=None, min_length=1, description="Branch to check out.")
    schema_override: str | None = Field(default=None, min_length=1, description="Schema to build in.")
    dbt_version_override: str | None = Field(default=None, min_length=1, description="dbt's version.")
    threads_override: int | None = Field(default=None, ge=1, description="dbt threads.")
    target_name_override: str | None = Field(default=None, min_length=1, description="`target.name`.")
    generate_docs_override: bool | None = Field(default=None, description="Whether docs are generated.")
    timeout_seconds_override: int | None = Field(
        default=None, ge=0, description="Seconds after which dbt Cloud itself stops the run."
    )
    steps_override: list[str] | None = Field(
        default=None, min_length=1, description="dbt commands in place of the job's."
    )

    @property
    def given(self) -> dict[str, Any]:
        """Those that are given, as the API takes them."""
        return self.model_dump(exclude_none=True)


class Trigger(BaseModel):
    """Why a run was started, and what it does otherwise than its job.

    Attributes:
        cause: Why.
        overridden: What was overridden. What we ask for is checked; what dbt Cloud says is taken as it is.
    """

    model_config = ConfigDict(extra="ignore")

    cause: str | None = None
    overridden: dict[str, Any] = {}

    @model_validator(mode="before")
    @classmethod
    def _gather(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        said = {name: data[name] for name in Overrides.model_fields if name in data}
        return {"cause": data.get("cause"), "overridden": meant(said)}


def meant(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Without those that leave the job's own: None and, in what dbt Cloud writes, empty ones and 0."""
    return {name: value for name, value in overrides.items() if value or value is False}


class RunStep(BaseModel):
    """One step of a run."""

    index: int
    name: str = ""
    status: int | None = None
    logs: str | None = None
    debug_logs: str | None = None

    @property
    def command(self) -> str | None:
        """The dbt command, which is in the name of the steps that run one: "Invoke dbt with `dbt build`".

        How many steps of dbt Cloud's own come before those of the job varies, so no index says it.
        """
        found = re.search(r"`\s*(dbt\b[^`]*)`", self.name)
        return found[1].strip() if found else None

    @property
    def failed(self) -> bool:
        """Whether the run broke here."""
        return self.status == 20


class JobSettings(BaseModel):
    """How a job runs dbt."""

    target_name: str | None = None
    threads: int | None = None


class Job(BaseModel):
    """A job definition; only what is used here. With a run it comes without its id."""

    id: int | None = None
    name: str = ""
    state: int | None = None
    execute_steps: list[str] | None = None
    settings: JobSettings | None = None

    @property
    def deleted(self) -> bool:
        """Whether it was deleted: such a job can be read and not run."""
        return self.state == 2


class Run(BaseModel):
    """A run of a job; only what is used here."""

    id: int
    job_definition_id: int | None = None
    project_id: int | None = None
    status: int
    status_humanized: str | None = None
    status_message: str | None = None
    is_complete: bool | None = None
    is_success: bool | None = None
    is_error: bool | None = None
    is_cancelled: bool | None = None
    artifacts_saved: bool | None = None
    created_at: _Moment | None = None
    duration: str | None = None
    href: str | None = None
    trigger: Trigger | None = None
    job: Job | None = None
    run_steps: list[RunStep] | None = None
    retrying_run_id: int | None = None
    can_retry: bool | None = None
    retry_not_supported_reason: str | None = None

    @property
    def seconds(self) -> float | None:
        """How long it took from its creation on: dbt Cloud writes "HH:MM:SS"."""
        found = re.fullmatch(
            r"(?:(\d+) days?, )?(\d+):(\d\d):(\d\d(?:\.\d+)?)", (self.duration or "").strip()
        )
        if not found:
            return None
        days, hours, minutes, seconds = found.groups()
        return int(days or 0) * 86400 + int(hours) * 3600 + int(minutes) * 60 + float(seconds)
