"""Who may send events to the receiver, and how that is proven: a block for each kind of sender.

A saved block is a source that is switched on: the block *Fivetran Webhook* called `main` is served under
`/hooks/fivetran-webhook/main`. `docs/events/` says what to set on each vendor's side.
"""

from __future__ import annotations

from typing import ClassVar, Literal
from urllib.parse import urlsplit

import jmespath
from prefect.blocks.core import Block
from pydantic import ConfigDict, Field, HttpUrl, SecretStr, field_validator, model_validator

from blocks.airbyte import AirbyteServer
from blocks.fields import clean_secret
from blocks.signatures import Encoding

_DOCS = HttpUrl("https://docs.prefect.io/v3/concepts/event-triggers")
_NEVER_GIVEN = frozenset({"before", "after", "steps", "gates", "notify", "approval", "confirm"})
"""Parameters that a Slack command never sets: with a step whoever types it would have a shell on a worker."""

_SHORTEST = 16  # characters of a secret that is part of an address: it must not be guessed


class EventSource(Block):
    """What all of them have in common. It is no block of its own."""

    _documentation_url: ClassVar[HttpUrl | None] = _DOCS

    # pydantic's errors quote what they were given, and that may be a secret.
    model_config = ConfigDict(hide_input_in_errors=True)

    @field_validator("secret", "url_secret", check_fields=False)
    @classmethod
    def _clean(cls, value: SecretStr) -> SecretStr:
        return clean_secret(value)

    @field_validator("previous_secret", "api_key", check_fields=False)
    @classmethod
    def _clean_if_any(cls, value: SecretStr | None) -> SecretStr | None:
        return clean_secret(value) if value else None  # a form sends an empty field as an empty text


class SignedSource(EventSource):
    """A sender that signs with a secret that both know. It is no block of its own."""

    secret: SecretStr = Field(title="Secret", description="With which the sender signs.")
    previous_secret: SecretStr | None = Field(
        default=None, title="Previous secret", description="Also valid, while the secret is being changed."
    )

    @property
    def secrets(self) -> list[SecretStr]:
        """All that are valid."""
        return [self.secret, *([self.previous_secret] if self.previous_secret else [])]


class AirbyteWebhook(EventSource):
    """Notifications of an Airbyte workspace: a job has succeeded or failed.

    Airbyte signs nothing, so its address carries a secret, and nothing is believed that Airbyte's own API
    does not say as well.
    """

    _block_type_name: ClassVar[str] = "Airbyte Webhook"
    _block_type_slug: ClassVar[str] = "airbyte-webhook"
    _description: ClassVar[str] = "Takes an Airbyte workspace's notifications of jobs that have ended."

    url_secret: SecretStr = Field(
        title="Secret in the address",
        description="The last part of the address of the hook: at least 16 letters, digits, - or _.",
    )
    server: AirbyteServer = Field(title="Server", description="Of which each job is read again.")

    @field_validator("url_secret")
    @classmethod
    def _unguessable(cls, value: SecretStr) -> SecretStr:
        text = value.get_secret_value()
        if len(text) < _SHORTEST or not text.replace("-", "").replace("_", "").isalnum():
            raise ValueError(f"Give at least {_SHORTEST} letters, digits, - or _: `openssl rand -hex 24`.")
        return value


class FivetranWebhook(SignedSource):
    """An account's or a group's webhook: a sync has ended."""

    _block_type_name: ClassVar[str] = "Fivetran Webhook"
    _block_type_slug: ClassVar[str] = "fivetran-webhook"
    _description: ClassVar[str] = "Takes Fivetran's webhooks of syncs that have ended."


class DbtCloudWebhook(SignedSource):
    """An account's webhook subscription: a run of a job has ended."""

    _block_type_name: ClassVar[str] = "dbt Cloud Webhook"
    _block_type_slug: ClassVar[str] = "dbt-cloud-webhook"
    _description: ClassVar[str] = "Takes dbt Cloud's webhooks of job runs that have ended."


class CensusWebhook(SignedSource):
    """A workspace's webhook: a sync run has ended."""

    _block_type_name: ClassVar[str] = "Census Webhook"
    _block_type_slug: ClassVar[str] = "census-webhook"
    _description: ClassVar[str] = "Takes Census's webhooks of sync runs that have ended."


class PagerDutyWebhook(SignedSource):
    """A V3 webhook subscription: an incident was opened, acknowledged, resolved and so on."""

    _block_type_name: ClassVar[str] = "PagerDuty Webhook"
    _block_type_slug: ClassVar[str] = "pagerduty-webhook"
    _description: ClassVar[str] = "Takes PagerDuty's V3 webhooks of incidents."


class SlackCommand(SignedSource):
    """A slash command that starts deployments: who may give it, and which it may start."""

    _block_type_name: ClassVar[str] = "Slack Command"
    _block_type_slug: ClassVar[str] = "slack-command"
    _description: ClassVar[str] = "Takes a Slack slash command that starts deployments."

    secret: SecretStr = Field(title="Signing secret", description="Of the Slack app.")
    team_id: str = Field(title="Workspace", description="Id of the Slack workspace: T….")
    users: list[str] = Field(default_factory=list, title="Users", description="Ids (U…) of who may.")
    channels: list[str] = Field(
        default_factory=list, title="Channels", description="Ids (C…) of channels in which everybody may."
    )
    deployments: list[str] = Field(
        min_length=1, title="Deployments", description="Which may be started: `flow/deployment`."
    )
    parameters: dict[str, list[str]] = Field(
        default_factory=dict,
        title="Parameters",
        description="Which of a deployment's parameters may be given, by their names; of one that is not "
        'named here, none: {"elt-chain/flights": ["max_concurrency"]}.',
    )
    response_hosts: list[str] = Field(
        default_factory=lambda: ["hooks.slack.com", "hooks.slack-gov.com"],
        title="Hosts of answers",
        description="To which answers may go, over https; for rehearsals also 127.0.0.1:<port>, over http.",
    )

    @model_validator(mode="after")
    def _only_what_may_be_given(self) -> SlackCommand:
        for deployment, names in self.parameters.items():
            if deployment not in self.deployments:
                raise ValueError(f"parameters: {deployment} is not one of the deployments.")
            if kept := sorted(_NEVER_GIVEN.intersection(names)):
                raise ValueError(
                    f"parameters: {', '.join(kept)} of {deployment} can't be given by a command. Who is "
                    "told, what has to be approved and which steps run are the deployment's own."
                )
        return self

    @model_validator(mode="after")
    def _somebody(self) -> SlackCommand:
        if not (self.users or self.channels):
            raise ValueError("Name users or channels: as it is, nobody may give the command.")
        return self

    def may_answer(self, url: str) -> bool:
        """Whether this is an address of Slack's: whoever signs could else have us post anywhere."""
        try:
            parts = urlsplit(url)
            host, port = parts.hostname or "", parts.port
        except ValueError:
            return False
        if parts.username or parts.password or parts.netloc not in self.response_hosts:
            return False
        return parts.scheme == "https" or (
            parts.scheme == "http" and host == "127.0.0.1" and port is not None
        )


class S3Webhook(EventSource):
    """S3's events, pushed by EventBridge (an API destination) or by SNS (an HTTPS subscription)."""

    _block_type_name: ClassVar[str] = "S3 Webhook"
    _block_type_slug: ClassVar[str] = "s3-webhook"
    _description: ClassVar[str] = "Takes S3's events from an EventBridge API destination or an SNS topic."

    api_key: SecretStr | None = Field(
        default=None, title="API key", description="That the EventBridge connection sends as X-Api-Key."
    )
    topics: list[str] = Field(
        default_factory=list, title="Topics", description="ARNs of the SNS topics that may send."
    )

    @model_validator(mode="after")
    def _some_way(self) -> S3Webhook:
        if not (self.api_key or self.topics):
            raise ValueError("Give an API key for EventBridge, or the ARN of an SNS topic, or both.")
        return self


class GitWebhook(SignedSource):
    """Pushes to repositories on GitHub, GitLab or Bitbucket."""

    _block_type_name: ClassVar[str] = "Git Webhook"
    _block_type_slug: ClassVar[str] = "git-webhook"
    _description: ClassVar[str] = "Takes pushes to repositories on GitHub, GitLab or Bitbucket."

    provider: Literal["github", "gitlab", "bitbucket"] = Field(title="Provider")
    secret: SecretStr = Field(title="Secret", description="Of the webhook; GitLab's secret token.")
    repositories: list[str] = Field(
        default_factory=list, title="Repositories", description="`owner/name` of those that may; empty: all."
    )


class SignedWebhook(SignedSource):
    """Any sender that posts JSON with an HMAC-SHA256 of it in a header."""

    _block_type_name: ClassVar[str] = "Signed Webhook"
    _block_type_slug: ClassVar[str] = "signed-webhook"
    _description: ClassVar[str] = "Takes any JSON that is signed with an HMAC-SHA256."

    header: str = Field(default="X-Signature-256", title="Header", description="That holds the signature.")
    prefix: str = Field(default="", title="Prefix", description="Before the signature, such as `sha256=`.")
    encoding: Encoding = Field(default="hex", title="Encoding", description="Of the signature.")
    id_path: str = Field(
        default="",
        title="Path of the id",
        description="JMESPath of what tells events apart, such as `event.id`. Empty: the whole body.",
    )
    event: str = Field(default="elt.hook.received", title="Event", description="Name of the Prefect event.")
    resource: str = Field(
        default="",
        title="Resource",
        description="Id of what it is about; by default `elt.hook.<block's name>`.",
    )

    @field_validator("id_path")
    @classmethod
    def _a_path(cls, value: str) -> str:
        if value:
            try:
                jmespath.compile(value)
            except jmespath.exceptions.JMESPathError:
                raise ValueError("It is no JMESPath; an example is `event.id`.") from None
        return value


SOURCES: tuple[type[EventSource], ...] = (
    AirbyteWebhook,
    FivetranWebhook,
    DbtCloudWebhook,
    CensusWebhook,
    PagerDutyWebhook,
    SlackCommand,
    S3Webhook,
    GitWebhook,
    SignedWebhook,
)
"""Every kind of source."""
