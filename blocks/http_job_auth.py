"""How to sign in to a declared API."""

from __future__ import annotations

from typing import Annotated, Literal

from prefect.types import SecretDict
from pydantic import AfterValidator, Field, JsonValue, SecretStr, field_validator, model_validator

from blocks.fields import check_base_url, clean_secret
from blocks.http_job_fill import JmesPath, Part, names_in


def _clean(secret: SecretStr) -> SecretStr:
    return clean_secret(secret)


Secret = Annotated[SecretStr, AfterValidator(_clean)]


def _address(url: str) -> str:
    return check_base_url(url, example="https://login.example.com/oauth2/token")


class NoAuth(Part):
    """The API asks for no credentials."""

    kind: Literal["none"] = "none"


class BearerToken(Part):
    """A token that does not change, in the Authorization header."""

    kind: Literal["bearer"] = "bearer"
    token: Secret


class HeaderToken(Part):
    """A key in a header of the API's own, such as `X-API-Key`."""

    kind: Literal["header"] = "header"
    header: str = Field(pattern=r"^[A-Za-z0-9-]+$")
    value: Secret


class BasicAuth(Part):
    """User and password."""

    kind: Literal["basic"] = "basic"
    username: str
    password: SecretStr


class ClientCredentials(Part):
    """OAuth2 client credentials (RFC 6749, 4.4), as Microsoft's and many other clouds have them."""

    kind: Literal["client-credentials"] = "client-credentials"
    token_url: Annotated[str, AfterValidator(_address)]
    client_id: str = Field(min_length=1)
    client_secret: Secret
    scope: str | None = None
    extra: dict[str, str] = Field(default={}, description="Sent as well, such as an audience or resource.")


class SignIn(Part):
    """A session: a request with our credentials is answered with a token, which a header then carries."""

    kind: Literal["sign-in"] = "sign-in"
    path: str = Field(pattern=r"^/", description="Appended to the base URL.")
    body: JsonValue = Field(description="Sent as JSON; {placeholders} are of `secrets`.")
    secrets: SecretDict = Field(description="The credentials, by the names that the body has for them.")
    token: JmesPath = Field(description="The token in the reply.")
    values: dict[str, JmesPath] = Field(
        default={}, description="What else of the reply becomes placeholders, such as the id of a site."
    )
    header: str = Field(default="Authorization", pattern=r"^[A-Za-z0-9-]+$")
    prefix: str = Field(default="Bearer ", description="What stands before the token in the header.")
    lifetime: float = Field(default=3600.0, gt=0, description="Seconds after which a new one is asked for.")

    @field_validator("body")
    @classmethod
    def _readable(cls, body: JsonValue) -> JsonValue:
        names_in(body)
        return body

    @model_validator(mode="after")
    def _known(self) -> SignIn:
        if unknown := sorted(names_in(self.body) - set(self.secrets.get_secret_value())):
            raise ValueError(f"body: {{{unknown[0]}}} is not one of the secrets")
        return self


Auth = Annotated[
    NoAuth | BearerToken | HeaderToken | BasicAuth | ClientCredentials | SignIn, Field(discriminator="kind")
]


def secrets_of(
    auth: NoAuth | BearerToken | HeaderToken | BasicAuth | ClientCredentials | SignIn,
) -> list[str]:
    """The secret texts in it."""
    match auth:
        case BearerToken():
            return [auth.token.get_secret_value()]
        case HeaderToken():
            return [auth.value.get_secret_value()]
        case BasicAuth():
            return [auth.password.get_secret_value()]
        case ClientCredentials():
            return [auth.client_secret.get_secret_value()]
        case SignIn():
            return [str(secret) for secret in auth.secrets.get_secret_value().values()]
    return []
