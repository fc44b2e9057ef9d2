"""What a dbt Cloud step is asked to do."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    field_serializer,
    field_validator,
    model_validator,
)

from blocks.dbtcloud import CredentialsRef
from blocks.dbtcloud_model import Overrides
from blocks.reference import stored_block
from tasks.intervals import DataInterval
from tasks.jobs import JobPolicy, ToolParameters


class DbtCloud(ToolParameters):
    """A dbt Cloud job and how to run it: a flow parameter, a form in the UI, a line in a deployment."""

    tool: Literal["dbt-cloud"] = "dbt-cloud"
    credentials: CredentialsRef = Field(title="Credentials")
    job_id: str = Field(title="Job ID", pattern=r"^\d+$", description="The number in the job's address.")
    name: str = Field(default="", title="Name", description="For people; the job's id by default.")
    owner: str | None = Field(default=None, title="Owner", description="Who is told when this step fails.")
    cause: str = Field(
        default="", title="Cause", description="Put before the flow run's name in dbt Cloud's list of runs."
    )
    overrides: Overrides = Field(
        default_factory=Overrides, title="Overrides", description="What the run does otherwise than the job."
    )
    vars: dict[str, Any] = Field(
        default={},
        title="Variables",
        description="dbt variables, added as --vars to each of the job's commands that runs nodes.",
    )
    data_interval: DataInterval | None = Field(
        default=None,
        title="Data interval",
        description="Which part of the data: the variables data_interval_start and data_interval_end, and the"
        " event times of microbatch models. Set by the flow that has an interval.",
    )
    retry_from_failure: bool = Field(
        default=False,
        title="Retry from failure",
        description="In a retry of the flow run, take the failed run up where it broke, instead of running "
        "the whole job again. Not with overrides: dbt Cloud ignores them in a retry.",
    )
    retries: int = Field(
        default=0, ge=0, description="How often the whole dbt step is tried again when it fails."
    )
    retry_delay: float = Field(default=0.0, ge=0, description="Seconds to wait before each retry.")
    policy: JobPolicy = Field(default_factory=JobPolicy, title="Policy")

    @field_validator("job_id", mode="before")
    @classmethod
    def _text(cls, value: Any) -> Any:
        return str(value) if isinstance(value, int) else value

    @model_validator(mode="after")
    def _combinations(self) -> DbtCloud:
        given = [*self.overrides.given, *(name for name in ("vars", "data_interval") if getattr(self, name))]
        if self.retry_from_failure and given:
            raise ValueError(
                "retry_from_failure and overrides exclude each other, for dbt Cloud ignores overrides in a "
                f"retry, here {', '.join(given)}."
            )
        if self.policy.on_active == "skip":
            raise ValueError(
                "on_active: skip is not for a transform: what comes after it would use old models."
            )
        if self.policy.min_rows is not None or self.policy.max_rows_rejected is not None:
            raise ValueError(
                "min_rows and max_rows_rejected mean nothing here: a dbt Cloud run counts no rows."
            )
        return self

    @field_serializer("credentials", mode="wrap")
    def _by_name(self, credentials: Any, handler: SerializerFunctionWrapHandler) -> Any:
        # What is stored with a flow run must work in a retry of it, and hold no secret.
        return (
            credentials
            if isinstance(credentials, str)
            else stored_block(credentials, type(credentials), handler)
        )

    @property
    def resource_id(self) -> str:
        """The job."""
        return self.job_id

    @property
    def label(self) -> str:
        """What a person calls it."""
        return self.name or self.job_id

    @property
    def what(self) -> str:
        """The job in short, for people."""
        return f"dbt Cloud job {self.label}"

    @property
    def changes_steps(self) -> bool:
        """Whether the job's commands need something added to them."""
        return bool(self.vars or self.data_interval)

    @property
    def task_options(self) -> dict[str, Any]:
        """The retry policy as keyword arguments of `Task.with_options`."""
        return {"retries": self.retries, "retry_delay_seconds": self.retry_delay}
