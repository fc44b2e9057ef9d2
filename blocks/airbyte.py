"""Airbyte: the block with its credentials and where it is, in the Cloud or self-managed.

Vendor documentation: https://reference.airbyte.com/reference/getting-started
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Hashable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import ClassVar

from prefect.blocks.core import Block
from pydantic import ConfigDict, Field, HttpUrl, SecretStr, field_validator, model_validator

from blocks.airbyte_client import AirbyteClient
from blocks.airbyte_config import ConfigApi
from blocks.airbyte_model import ApiKind
from blocks.airbyte_public import PublicApi
from blocks.fields import check_base_url, clean_secret
from blocks.http import shared_client

_CLOUD = "https://api.airbyte.com"
_EXAMPLE = "https://api.airbyte.com/v1 or http://localhost:8000"
_PATHS: dict[ApiKind, str] = {"public": "/api/public/v1", "config": "/api/v1"}


class AirbyteServer(Block):
    """An Airbyte instance, in the Cloud or self-managed, and how to sign in to it.

    Sign in with a client id and secret (an application), a ready-made token, a user name and password (old
    self-managed servers), or nothing at all.

    Example:
        ```python
        AirbyteServer(
            base_url="https://api.airbyte.com/v1", client_id="…", client_secret="…"
        ).save("airbyte")
        ```
    """

    _block_type_name: ClassVar[str] = "Airbyte Server"
    _block_type_slug: ClassVar[str] = "airbyte-server"
    _logo_url: ClassVar[HttpUrl | None] = HttpUrl(
        "https://cdn.sanity.io/images/3ugk85nk/production/7f50097d1915fe75b0ee84c951c742a83d3c53cb-250x250.png"
    )
    _documentation_url: ClassVar[HttpUrl | None] = HttpUrl(
        "https://reference.airbyte.com/reference/getting-started"
    )
    _description: ClassVar[str] = "Signs in to Airbyte Cloud or a self-managed Airbyte and runs its jobs."

    # pydantic's errors quote what they were given, and that may be a secret in the wrong field.
    model_config = ConfigDict(hide_input_in_errors=True)

    base_url: str = Field(
        default="https://api.airbyte.com/v1",
        title="Base URL",
        description="https://api.airbyte.com/v1 for the Cloud, http(s)://your-host for a self-managed one. "
        "The address of the web interface will do.",
    )
    api: ApiKind | None = Field(
        default=None,
        title="API",
        description="`public`, or `config` for the older Config API of self-managed servers. Empty: what the "
        "base URL says (/api/public/v1 or /api/v1), else found out by asking the server.",
    )
    client_id: str | None = Field(
        default=None, title="Client ID", description="Of an application in Airbyte."
    )
    client_secret: SecretStr | None = Field(
        default=None, title="Client secret", description="Of the same application."
    )
    token: SecretStr | None = Field(
        default=None, title="Token", description="A ready-made bearer token; it is not refreshed."
    )
    username: str | None = Field(
        default=None, title="User name", description="For basic auth on an old self-managed server."
    )
    password: SecretStr | None = Field(default=None, title="Password", description="For basic auth.")
    workspace_ids: list[str] = Field(
        default_factory=list,
        title="Workspaces",
        description="Limits what is listed and watched to these workspaces; empty for all that are visible.",
    )
    requests_per_second: float | None = Field(
        default=None,
        gt=0,
        title="Requests per second",
        description="An upper limit for this account. Airbyte publishes no figure.",
    )

    @field_validator("base_url")
    @classmethod
    def _normalise(cls, value: str) -> str:
        root, kind = split_address(value)
        return address_of(root, kind)

    @field_validator("client_id")
    @classmethod
    def _strip(cls, value: str | None) -> str | None:
        return (value or "").strip() or None

    @field_validator("client_secret", "token")
    @classmethod
    def _clean(cls, value: SecretStr | None) -> SecretStr | None:
        return clean_secret(value) if value else None  # a form sends an empty field as an empty text

    @model_validator(mode="after")
    def _one_way_in(self) -> AirbyteServer:
        if (self.client_id is None) != (self.client_secret is None):
            raise ValueError("A client id and a client secret go together; give both or neither.")
        if (self.username is None) != (self.password is None):
            raise ValueError("A user name and a password go together; give both or neither.")
        ways = [
            name
            for name, value in (
                ("client id and secret", self.client_id),
                ("token", self.token),
                ("user name and password", self.username),
            )
            if value is not None
        ]
        if len(ways) > 1:
            raise ValueError(f"Give one way to sign in, not {' and '.join(ways)}.")
        return self

    @model_validator(mode="after")
    def _one_api(self) -> AirbyteServer:
        if self.api == "config" and self.in_cloud:
            raise ValueError("Airbyte Cloud has no Config API for its users; leave `api` empty.")
        if self.api is not None:
            self.base_url = self.url_of(self.api)
        return self

    @property
    def account(self) -> Hashable:
        """What makes two blocks the same account: they share a client, a token and a watcher."""
        return (
            "airbyte",
            self.base_url,
            self.client_id,
            self.client_secret,
            self.token,
            self.username,
            self.password,
            tuple(self.workspace_ids),
        )

    @property
    def kind(self) -> ApiKind | None:
        """Which API is to be used; None where that is to be found out."""
        return self.api or split_address(self.base_url)[1]

    @property
    def in_cloud(self) -> bool:
        """Whether this is Airbyte Cloud."""
        return self.base_url.startswith(_CLOUD)

    @property
    def app_url(self) -> str:
        """Where the web interface is, for links."""
        return "https://cloud.airbyte.com" if self.in_cloud else split_address(self.base_url)[0]

    def url_of(self, kind: ApiKind) -> str:
        """The base URL of one of the server's APIs."""
        return address_of(split_address(self.base_url)[0], kind)

    def client(self) -> AbstractAsyncContextManager[AirbyteClient]:
        """The client of this account on the running event loop, shared with all its other users."""
        return shared_client(self.account, lambda: AirbyteClient(self))

    @asynccontextmanager
    async def connect(self) -> AsyncIterator[PublicApi | ConfigApi]:
        """The account's API: the one that the block names, or else the one that the server has.

        Raises:
            VendorError: Where that has to be found out first: the server can't be reached or is no Airbyte.
        """
        async with self.client() as client:
            yield await client.api()


def split_address(value: str) -> tuple[str, ApiKind | None]:
    """Where the server is, and which API is meant, from any reasonable spelling of either's address.

    Raises:
        ValueError: With a sentence that says what is wrong.
    """
    url = check_base_url(value, example=_EXAMPLE)
    scheme, rest = url.split("://", 1)
    host, _, path = rest.partition("/")
    if host in ("api.airbyte.com", "cloud.airbyte.com"):
        return _CLOUD, "public"
    segments = [segment for segment in path.split("/") if segment]
    end = next((n for n, s in enumerate(segments) if s in ("api", "v1", "workspaces")), len(segments))
    kinds: dict[tuple[str, ...], ApiKind] = {("api", "public"): "public", ("api", "v1"): "config"}
    return f"{scheme}://{'/'.join([host, *segments[:end]])}", kinds.get(tuple(segments[end : end + 2]))


def address_of(root: str, kind: ApiKind | None) -> str:
    """The base URL of a server's API; the server's own address where it is not known which."""
    if root == _CLOUD:
        return f"{_CLOUD}/v1"
    return root + (_PATHS[kind] if kind else "")
