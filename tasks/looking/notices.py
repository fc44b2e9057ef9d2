"""What S3 says of its objects, in whatever envelope it comes, as events.

Four shapes, all at least once and in no order: a notification (`Records`), the same as text in an SNS
message, an EventBridge event, and the test event that AWS sends when notifications are switched on.

Vendor documentation: https://docs.aws.amazon.com/AmazonS3/latest/userguide/notification-content-structure.html
and https://docs.aws.amazon.com/AmazonS3/latest/userguide/ev-mapping-troubleshooting.html
"""

from __future__ import annotations

import json
from datetime import datetime
from typing import Annotated, Any, Literal
from urllib.parse import unquote_plus

from pydantic import AwareDatetime, BaseModel, Field, ValidationError

from tasks.events import EltEvent
from tasks.looking.events import bounded

CREATED = "elt.s3.object.created"
"""The event of a new object, by whichever way it was learned of."""


class _Bucket(BaseModel):
    name: str


class _Object(BaseModel):
    key: str
    size: int | None = None
    etag: Annotated[str | None, Field(validation_alias="eTag")] = None
    version_id: Annotated[str | None, Field(validation_alias="versionId")] = None
    sequencer: str | None = None


class _S3(BaseModel):
    bucket: _Bucket
    object: _Object


class _Record(BaseModel):
    """One record of a notification; its keys are encoded as in a form."""

    name: Annotated[str, Field(validation_alias="eventName")]
    time: Annotated[AwareDatetime, Field(validation_alias="eventTime")]
    s3: _S3


class _BridgeObject(BaseModel):
    key: str
    size: int | None = None
    etag: str | None = None
    version_id: Annotated[str | None, Field(validation_alias="version-id")] = None
    sequencer: str | None = None


class _Detail(BaseModel):
    bucket: _Bucket
    object: _BridgeObject
    reason: str | None = None


class _BridgeEvent(BaseModel):
    """EventBridge's own; its keys are as they are."""

    source: Literal["aws.s3"]
    kind: Annotated[str, Field(validation_alias="detail-type")]
    time: AwareDatetime
    detail: _Detail


def s3_events(body: Any, *, encoded_keys: bool = True) -> list[EltEvent] | None:
    """The created objects of which a body tells.

    Args:
        body: Parsed JSON, of a queue's message or of a hook.
        encoded_keys: Whether keys in notifications are encoded, as AWS does it; some stores do not.

    Returns:
        An event for each; none for a test event and for what is told of deleted objects and the like. None if
        this is nothing of S3's.
    """
    if not isinstance(body, dict):
        return None
    if body.get("Type") == "Notification" and isinstance(body.get("Message"), str):
        try:
            body = json.loads(body["Message"])
        except (ValueError, RecursionError):
            return None
        within = isinstance(body, dict) and "Type" not in body  # one envelope, not a hundred of them
        return s3_events(body, encoded_keys=encoded_keys) if within else None
    if body.get("Event") == "s3:TestEvent":
        return []
    try:
        if body.get("source") == "aws.s3":
            return _of_bridge(_BridgeEvent.model_validate(body))
        records = body.get("Records")
        if isinstance(records, list) and records and all("s3" in record for record in records):
            return _of_records([_Record.model_validate(record) for record in records], encoded_keys)
    except (ValidationError, TypeError):
        return None
    return None


def _of_bridge(told: _BridgeEvent) -> list[EltEvent]:
    if told.kind != "Object Created":
        return []
    there = told.detail.object
    return [
        _event(
            told.detail.bucket.name, there.key, told.time, there.etag, there.version_id, there.sequencer,
            there.size, told.detail.reason,
        )
    ]  # fmt: skip


def _of_records(records: list[_Record], encoded_keys: bool) -> list[EltEvent]:
    events = []
    for told in records:
        _, _, what = told.name.removeprefix("s3:").partition("ObjectCreated:")
        if not what:
            continue
        there = told.s3.object
        key = unquote_plus(there.key) if encoded_keys else there.key
        events.append(
            _event(
                told.s3.bucket.name, key, told.time, there.etag, there.version_id, there.sequencer,
                there.size, what,
            )
        )  # fmt: skip
    return events


def _event(
    bucket: str,
    key: str,
    time: datetime,
    etag: str | None,
    version_id: str | None,
    sequencer: str | None,
    size: int | None,
    reason: str | None,
) -> EltEvent:
    # The sequencer tells two writings of one content apart; it is the same by whichever way it comes.
    known_by = "/".join(part for part in (version_id or etag, sequencer) if part) or time.isoformat()
    uri = f"s3://{bucket}/{key}"
    return EltEvent(
        name=CREATED,
        key=bounded(f"s3:{bucket}/{key}@{known_by}"),
        occurred=time,
        resource_id=bounded(f"elt.s3.object.{bucket}/{key}"),
        resource_name=uri,
        payload={
            "bucket": bucket,
            "key": key,
            "uri": uri,
            "size": size,
            "etag": etag,
            "version_id": version_id,
            "sequencer": sequencer,
            "reason": reason,
        },
    )
