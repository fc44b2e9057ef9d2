"""The signature of an SNS message, and the confirmation of a subscription.

Everything in a message is a stranger's until its signature is verified, also the address of the certificate:
only AWS's own hosts are asked for one.

Vendor documentation: https://docs.aws.amazon.com/sns/latest/dg/sns-verify-signature-of-message.html
"""

from __future__ import annotations

import base64
import binascii
import re
from collections import OrderedDict
from datetime import UTC, datetime, timedelta
from urllib.parse import urlsplit

import httpx
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from pydantic import AwareDatetime, BaseModel, Field

from blocks.signatures import BadSignature
from deployments.receiver.source import TryAgain

_HOST = re.compile(r"sns\.[a-z]{2,4}(-[a-z]+)+-\d{1,2}\.amazonaws\.com(\.cn)?")
_HASHES: dict[str, hashes.HashAlgorithm] = {"1": hashes.SHA1(), "2": hashes.SHA256()}  # noqa: S303 - SNS's default
_OF_A_SUBSCRIPTION = ("Message", "MessageId", "SubscribeURL", "Timestamp", "Token", "TopicArn", "Type")
_SIGNED = {
    "Notification": ("Message", "MessageId", "Subject", "Timestamp", "TopicArn", "Type"),
    "SubscriptionConfirmation": _OF_A_SUBSCRIPTION,
    "UnsubscribeConfirmation": _OF_A_SUBSCRIPTION,
}
# SNS tries for up to 23 days, but only where it is asked to; an hour by default.
_OLDEST = timedelta(hours=24)
_PASSES = (408, 429)  # of AWS's answers, beside 5xx
_ADDRESS = re.compile(r"[!-~]{1,2048}")
_KEPT = 16  # certificates
_LARGEST = 20_000  # bytes of a certificate


class SnsMessage(BaseModel):
    """A message as SNS posts it."""

    type: str = Field(alias="Type")
    message_id: str = Field(alias="MessageId")
    topic: str = Field(alias="TopicArn")
    message: str = Field(alias="Message")
    timestamp: AwareDatetime = Field(alias="Timestamp")
    version: str = Field(alias="SignatureVersion")
    signature: str = Field(alias="Signature")
    certificate_url: str = Field(alias="SigningCertURL")
    subscribe_url: str | None = Field(default=None, alias="SubscribeURL")


class Sns:
    """Verifies messages and confirms subscriptions.

    Args:
        client: For AWS's certificates and confirmations; must not follow redirects.
    """

    def __init__(self, client: httpx.AsyncClient) -> None:
        self._client = client
        self._certificates: OrderedDict[str, x509.Certificate] = OrderedDict()

    async def verify(self, message: SnsMessage, raw: dict[str, object]) -> None:
        """See that AWS has signed this message, and not long ago.

        Args:
            message: The message.
            raw: The same as it came: its texts are what is signed.

        Raises:
            BadSignature: It has not.
            TryAgain: The certificate can't be fetched now.
        """
        algorithm, names = _HASHES.get(message.version), _SIGNED.get(message.type)
        if algorithm is None or names is None:
            raise BadSignature("this type or version of a signature is not known")
        if abs(datetime.now(UTC) - message.timestamp) > _OLDEST:
            raise BadSignature("it was signed more than a day ago, or ahead")
        signed = "".join(f"{name}\n{raw[name]}\n" for name in names if raw.get(name) is not None)
        certificate = await self._certificate(message.certificate_url)
        key = certificate.public_key()
        if not isinstance(key, rsa.RSAPublicKey):
            raise BadSignature("the certificate holds no RSA key")
        try:
            signature = base64.b64decode(message.signature, validate=True)
            key.verify(signature, signed.encode(), padding.PKCS1v15(), algorithm)
        except (InvalidSignature, binascii.Error, ValueError):
            raise BadSignature("the signature does not fit the message") from None

    async def confirm(self, message: SnsMessage) -> None:
        """Visit the address that confirms a subscription; the message must be verified.

        Raises:
            BadSignature: It is no address of SNS's, or SNS knows of no such subscription.
            TryAgain: SNS does not take it now.
        """
        await self._get(message.subscribe_url or "", "the confirmation")

    async def _certificate(self, url: str) -> x509.Certificate:
        if (known := self._certificates.get(url)) is not None:
            return known
        if not urlsplit_path(url).endswith(".pem"):
            raise BadSignature("the certificate's address is none of AWS's")
        text = await self._get(url, "the certificate")
        try:
            certificate = x509.load_pem_x509_certificate(text)
        except ValueError:
            raise BadSignature("the certificate is none") from None
        now = datetime.now(UTC)
        if not certificate.not_valid_before_utc <= now <= certificate.not_valid_after_utc:
            raise BadSignature("the certificate is not valid now")
        self._certificates[url] = certificate
        if len(self._certificates) > _KEPT:
            self._certificates.popitem(last=False)
        return certificate

    async def _get(self, url: str, what: str) -> bytes:
        if not is_sns(url):
            raise BadSignature(f"the address of {what} is none of AWS's")
        try:
            reply = await self._client.get(url)
        except (httpx.InvalidURL, UnicodeError):
            raise BadSignature(f"the address of {what} is none") from None
        except httpx.HTTPError as error:
            raise TryAgain(f"{what} can't be fetched ({type(error).__name__})") from None
        if reply.is_server_error or reply.status_code in _PASSES:
            raise TryAgain(f"{what}: AWS answered {reply.status_code}")
        if not reply.is_success or len(reply.content) > _LARGEST:  # a stranger has made the address up
            raise BadSignature(f"{what}: AWS answered {reply.status_code}")
        return reply.content


def urlsplit_path(url: str) -> str:
    """The path of an address; nothing where it is none."""
    try:
        return urlsplit(url).path
    except ValueError:
        return ""


def is_sns(url: str) -> bool:
    """Whether this is an https address of SNS itself."""
    # Python's parser takes line breaks out of an address, httpx refuses it because of them.
    if not _ADDRESS.fullmatch(url):
        return False
    try:
        parts = urlsplit(url)
    except ValueError:
        return False
    return parts.scheme == "https" and _HOST.fullmatch(parts.netloc) is not None
