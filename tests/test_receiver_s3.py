"""S3's events, pushed: EventBridge by its key, SNS by its signature, and nobody else."""

from __future__ import annotations

import asyncio
import base64
import json
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.x509.oid import NameOID
from pydantic import ValidationError

from blocks.receiver import S3Webhook
from blocks.signatures import BadSignature
from deployments.receiver.s3 import S3Source
from deployments.receiver.sns import Sns, is_sns
from deployments.receiver.source import Hook, Reading, Refused, TryAgain
from tests.receiver_fixtures import SECRET, as_json

pytestmark = pytest.mark.no_server

TOPIC = "arn:aws:sns:eu-west-1:123456789012:landing"
CERTIFICATE_URL = "https://sns.eu-west-1.amazonaws.com/SimpleNotificationService-example.pem"
SUBSCRIBE_URL = "https://sns.eu-west-1.amazonaws.com/?Action=ConfirmSubscription&Token=x"

BRIDGED: dict[str, Any] = {
    "version": "0",
    "id": "17793124-05d4-b198-2fde-7ededc63b103",
    "detail-type": "Object Created",
    "source": "aws.s3",
    "time": "2026-03-02T06:00:00Z",
    "detail": {
        "bucket": {"name": "landing-bucket"},
        "object": {
            "key": "orders/2026-03-02/part 0001.parquet",
            "size": 5,
            "etag": "b1946ac92492d2347c6235b4d2611184",
            "sequencer": "617f08299329d189",
        },
        "reason": "PutObject",
    },
}
RECORDS = {
    "Records": [
        {
            "eventVersion": "2.1",
            "eventSource": "aws:s3",
            "eventTime": "2026-03-02T06:00:00.000Z",
            "eventName": "ObjectCreated:Put",
            "s3": {
                "bucket": {"name": "landing-bucket"},
                "object": {
                    "key": "orders/part+1.csv",
                    "size": 3,
                    "eTag": "d41d8cd9",
                    "sequencer": "0055AED6",
                },
            },
        }
    ]
}


@dataclass
class Aws:
    """AWS's side of SNS: a key, its certificate, and what it was asked for."""

    age: timedelta = timedelta(days=1)
    asked: list[str] = field(default_factory=list)
    status: int = 200

    def __post_init__(self) -> None:
        self.key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "sns.amazonaws.com")])
        began = datetime.now(UTC) - self.age
        self.certificate = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(self.key.public_key())
            .serial_number(1)
            .not_valid_before(began)
            .not_valid_after(began + timedelta(days=30))
            .sign(self.key, hashes.SHA256())
            .public_bytes(serialization.Encoding.PEM)
        )

    def answer(self, request: httpx.Request) -> httpx.Response:
        self.asked.append(str(request.url))
        return httpx.Response(self.status, content=self.certificate)

    def message(self, kind: str = "Notification", version: str = "2", **changes: Any) -> dict[str, Any]:
        message = {
            "Type": kind,
            "MessageId": "22b80b92-fdea-4c2c-8f9d-bdfb0c7bf324",
            "TopicArn": TOPIC,
            "Subject": "Amazon S3 Notification",
            "Message": json.dumps(RECORDS),
            "Timestamp": datetime.now(UTC).isoformat().replace("+00:00", "Z"),
            "SignatureVersion": version,
            "SigningCertURL": CERTIFICATE_URL,
            **({"Token": "x", "SubscribeURL": SUBSCRIBE_URL} if kind != "Notification" else {}),
            **changes,
        }
        names = ["Message", "MessageId", "Subject", "SubscribeURL", "Timestamp", "Token", "TopicArn", "Type"]
        if kind != "Notification":
            names.remove("Subject")
        signed = "".join(f"{name}\n{message[name]}\n" for name in names if name in message)
        algorithm = hashes.SHA1() if version == "1" else hashes.SHA256()  # noqa: S303 - SNS's version 1
        signature = self.key.sign(signed.encode(), padding.PKCS1v15(), algorithm)
        return {**message, "Signature": base64.b64encode(signature).decode()}


def read(body: Any, headers: dict[str, str], aws: Aws | None = None, **fields: Any) -> Reading:
    """What the source reads, with AWS answering for AWS."""

    async def reading() -> Reading:
        source = S3Source(S3Webhook(**{"api_key": SECRET, "topics": [TOPIC], **fields}), "main")
        async with AsyncExitStack() as stack:
            outside = httpx.AsyncClient(transport=httpx.MockTransport((aws or Aws()).answer))
            source._sns = Sns(await stack.enter_async_context(outside))
            return await source.read(Hook(headers, body if isinstance(body, bytes) else as_json(body)))

    return asyncio.run(reading())


KEY = {"x-api-key": SECRET.get_secret_value()}
FROM_SNS = {"x-amz-sns-message-type": "Notification"}


def test_eventbridge() -> None:
    """An object that EventBridge tells of is an event; one that was deleted is none."""
    (event,) = read(BRIDGED, KEY).events
    assert event.name == "elt.s3.object.created"
    assert event.payload["key"] == "orders/2026-03-02/part 0001.parquet"
    assert event.payload["bucket"] == "landing-bucket"
    assert not read({**BRIDGED, "detail-type": "Object Deleted"}, KEY).events


@pytest.mark.parametrize("version", ["1", "2"])
def test_sns(version: str) -> None:
    """An object that SNS tells of is an event, signed in either of its two ways."""
    aws = Aws()
    (event,) = read(aws.message(version=version), FROM_SNS, aws).events
    assert event.payload["key"] == "orders/part 1.csv"
    assert aws.asked == [CERTIFICATE_URL]


def test_a_subscription_is_confirmed() -> None:
    """The first message of a topic is answered by visiting the address in it, once it is verified."""
    aws = Aws()
    assert (
        read(aws.message("SubscriptionConfirmation"), FROM_SNS, aws).ignored
        == "the subscription is confirmed"
    )
    assert aws.asked == [CERTIFICATE_URL, SUBSCRIBE_URL]


def test_nothing_is_asked_of_others() -> None:
    """No host but SNS's own is asked for a certificate or told of a subscription."""
    aws = Aws()
    elsewhere = "https://sns.eu-west-1.amazonaws.com.example.org/x.pem"
    with pytest.raises(BadSignature):
        read(aws.message(SigningCertURL=elsewhere), FROM_SNS, aws)
    with pytest.raises(BadSignature):
        read(aws.message("SubscriptionConfirmation", SubscribeURL="http://169.254.169.254/"), FROM_SNS, aws)
    assert aws.asked == [CERTIFICATE_URL]


@pytest.mark.parametrize(
    ("url", "is_it"),
    [
        (CERTIFICATE_URL, True),
        ("https://sns.us-gov-west-1.amazonaws.com/x.pem", True),
        ("https://sns.cn-north-1.amazonaws.com.cn/x.pem", True),
        ("http://sns.eu-west-1.amazonaws.com/x.pem", False),
        ("https://sns.eu-west-1.amazonaws.com:444/x.pem", False),
        ("https://x@sns.eu-west-1.amazonaws.com/x.pem", False),
        ("https://bucket.s3.eu-west-1.amazonaws.com/x.pem", False),
        ("https://example.org/sns.eu-west-1.amazonaws.com", False),
        ("https://[", False),
        ("https://sns.eu-west-1.amazonaws.com/\nx.pem", False),
        ("https://sns.eu-west-1.amazonaws.com/\ud800x.pem", False),
        ("https://sns.eu-west-1.amazonaws.com/ x.pem", False),
        (f"https://sns.eu-west-1.amazonaws.com/{'x' * 70_000}.pem", False),
        ("", False),
    ],
)
def test_addresses_of_sns(url: str, is_it: bool) -> None:
    """A bucket's address is AWS's, too, but anybody can put a certificate into a bucket."""
    assert is_sns(url) is is_it


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"TopicArn": "arn:aws:sns:eu-west-1:1:other"}, "topic"),
        ({"Message": json.dumps({**RECORDS, "more": 1})}, "does not fit"),
        ({"Signature": "no base64!"}, "does not fit"),
        ({"Signature": base64.b64encode(b"x" * 256).decode()}, "does not fit"),
        ({"SignatureVersion": "3"}, "not known"),
        ({"Type": "Other"}, "not known"),
        ({"Timestamp": "2020-01-01T00:00:00Z"}, "more than a day ago"),
    ],
    ids=str,
)
def test_messages_that_were_tampered_with(changes: dict[str, Any], said: str) -> None:
    """Whatever is changed after the signing, the message is refused."""
    aws = Aws()
    with pytest.raises(BadSignature, match=said):
        read({**aws.message(), **changes}, FROM_SNS, aws)


def test_certificates_that_are_none() -> None:
    """A certificate that has expired or is none is refused; one that can't be had now is asked for again."""
    old, none, away = Aws(age=timedelta(days=60)), Aws(), Aws(status=500)
    none.certificate = b"hello"
    for aws in (old, none):
        with pytest.raises(BadSignature, match="certificate"):
            read(aws.message(), FROM_SNS, aws)
    with pytest.raises(TryAgain, match="500"):
        read(away.message(), FROM_SNS, away)


@pytest.mark.parametrize("status", [301, 403, 404])
def test_certificates_that_aws_does_not_have(status: int) -> None:
    """Anybody can make up an address at AWS: that is a forged message, and not one to be sent again."""
    aws = Aws(status=status)
    with pytest.raises(BadSignature, match=str(status)):
        read(aws.message(), FROM_SNS, aws)


@pytest.mark.parametrize("status", [408, 429, 503])
def test_certificates_that_aws_has_later(status: int) -> None:
    """What passes at AWS is no fault of the sender's."""
    aws = Aws(status=status)
    with pytest.raises(TryAgain, match=str(status)):
        read(aws.message(), FROM_SNS, aws)


@pytest.mark.parametrize(
    "said", ["[" * 5_000, '{"a":' * 5_000, "5", "null", '"Type"', '{"Type": "Notification"}']
)
def test_a_topic_that_carries_something_else(said: str) -> None:
    """Signed by AWS, and nothing of S3's in it: refused, whatever it is."""
    aws = Aws()
    with pytest.raises(Refused, match="no event of S3's"):
        read(aws.message(Message=said), FROM_SNS, aws)


@pytest.mark.parametrize(
    ("body", "headers", "fields", "error"),
    [
        (BRIDGED, {}, {}, BadSignature),
        (BRIDGED, {"x-api-key": "another"}, {}, BadSignature),
        (BRIDGED, KEY, {"api_key": None}, BadSignature),
        ({"anything": "else"}, KEY, {}, Refused),
        (b"{", KEY, {}, Refused),
        ([], FROM_SNS, {}, Refused),
        ({"Type": "Notification"}, FROM_SNS, {}, Refused),
    ],
    ids=str,
)
def test_who_and_what_is_refused(
    body: Any, headers: dict[str, str], fields: dict[str, Any], error: type[Exception]
) -> None:
    """Without the key, or with a body that is nothing of S3's, there is no event."""
    with pytest.raises(error):
        read(body, headers, **fields)


def test_a_block_that_lets_nobody_send() -> None:
    """A block with neither key nor topic is refused."""
    with pytest.raises(ValidationError, match="Give an API key"):
        S3Webhook()
