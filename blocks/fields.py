"""What people write into the fields of a block and into tags: checked, and put into one form."""

from __future__ import annotations

from collections.abc import Iterable
from urllib.parse import urlsplit

from pydantic import SecretStr, ValidationError

OWNER_TAG = "owner:"
"""What a tag begins with that names the owner of a connection, a deployment or a run."""


def check_base_url(value: str, *, example: str) -> str:
    """A base URL with scheme and host and without credentials, query or trailing slash.

    Raises:
        ValueError: With a sentence that says what is wrong; it does not repeat credentials.
    """
    value = value.strip()
    if any(character.isspace() for character in value):
        raise ValueError(f"The base URL holds a blank; give one such as {example}.")
    if not value:
        raise ValueError(f"The base URL is empty; give one such as {example}.")
    if "://" not in value:
        host = value.split("/", 1)[0].split(":", 1)[0]
        local = host in ("localhost", "host.docker.internal") or host.replace(".", "").isdigit()
        value = f"{'http' if local else 'https'}://{value}"
    try:
        parts = urlsplit(value)
        _ = parts.port
    except ValueError:
        raise ValueError(f"The base URL can't be read; give one such as {example}.") from None
    if parts.username or parts.password:
        raise ValueError("The base URL holds credentials; put them into the block's own fields instead.")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(
            f"The base URL must start with http:// or https:// and name a host, such as {example}."
        )
    return f"{parts.scheme}://{parts.netloc.lower()}{parts.path.rstrip('/')}"


def clean_secret(secret: SecretStr) -> SecretStr:
    """A key or token without the blanks and line ends that come along when it is copied.

    Raises:
        ValueError: It is empty or holds what no header can carry; the secret itself is not repeated.
    """
    text = secret.get_secret_value().strip()
    if not text:
        raise ValueError("It is empty.")
    if not (text.isascii() and text.isprintable()) or " " in text:
        raise ValueError("It holds a blank or a character that no key has; was it copied whole?")
    return SecretStr(text)


def is_masked(secret: SecretStr | None) -> bool:
    """Whether this is what Prefect keeps of a secret in the parameters of a run: asterisks."""
    return secret is not None and set(secret.get_secret_value()) == {"*"}


def tagged_owner(tags: Iterable[str]) -> str | None:
    """Whose something is: the name in the first tag `owner:<name>`; None without such a tag."""
    return next((tag.removeprefix(OWNER_TAG) for tag in tags if tag.startswith(OWNER_TAG)), None)


MASKED_GUIDANCE = (
    "Prefect stores parameters without their secrets: to retry or deploy this flow, save the block and "
    "pass its name."
)


def words_of(error: ValidationError) -> str:
    """What a check of ours has said first, without what pydantic puts before it and without the input."""
    said: str = error.errors(include_url=False, include_input=False)[0]["msg"]
    return said.removeprefix("Value error, ")
