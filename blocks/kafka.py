"""A Kafka cluster: where it is and how to sign in."""

from __future__ import annotations

from typing import Any, Literal

from prefect.blocks.core import Block
from pydantic import ConfigDict, Field, SecretStr, field_validator, model_validator

_OWN = {
    "bootstrap.servers": "bootstrap_servers",
    "sasl.password": "password",
    "sasl.username": "username",
    "sasl.mechanism": "sasl_mechanism",
    "sasl.mechanisms": "sasl_mechanism",
    "security.protocol": "security_protocol",
}


class KafkaCluster(Block):
    """A Kafka cluster, or what speaks its protocol.

    Vendor documentation: https://github.com/confluentinc/librdkafka/blob/master/CONFIGURATION.md
    """

    # pydantic's errors quote what they were given, and that may be the password.
    model_config = ConfigDict(hide_input_in_errors=True)

    _block_type_name = "Kafka Cluster"
    _block_type_slug = "kafka-cluster"

    bootstrap_servers: str = Field(
        min_length=1, title="Bootstrap servers", description="`host:port`, several with commas between them."
    )
    security_protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = Field(
        default="PLAINTEXT", title="Security protocol"
    )
    sasl_mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"] | None = Field(
        default=None, title="SASL mechanism"
    )
    username: str | None = Field(
        default=None, title="User name", description="Of Confluent Cloud: the API key."
    )
    password: SecretStr | None = Field(default=None, title="Password")
    settings: dict[str, str | int | bool] = Field(
        default={},
        title="More settings",
        description="Of librdkafka, such as `ssl.ca.location`. Not for secrets: they are kept as plain text.",
    )

    @field_validator("settings")
    @classmethod
    def _not_ours(cls, value: dict[str, Any]) -> dict[str, Any]:
        for name in value:
            if name in _OWN:
                raise ValueError(f"{name} has a field of its own, {_OWN[name]}")
        return value

    @model_validator(mode="after")
    def _signs_in(self) -> KafkaCluster:
        sasl = self.security_protocol.startswith("SASL")
        if sasl and not (self.sasl_mechanism and self.username and self.password):
            raise ValueError(f"{self.security_protocol} needs sasl_mechanism, username and password")
        if not sasl and (self.username or self.password):
            raise ValueError("a user name and a password need security_protocol SASL_SSL or SASL_PLAINTEXT")
        return self

    def librdkafka(self) -> dict[str, Any]:
        """The settings of a client, with the password in them."""
        signed_in = {
            "sasl.mechanism": self.sasl_mechanism,
            "sasl.username": self.username,
            "sasl.password": self.password.get_secret_value() if self.password else None,
        }
        return {
            **self.settings,
            "bootstrap.servers": self.bootstrap_servers,
            "security.protocol": self.security_protocol,
            **{name: value for name, value in signed_in.items() if value is not None},
        }
