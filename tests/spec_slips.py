"""Where the vendors' own OpenAPI files say other than the vendors do: each known slip, and how it is known.

A strict list. What is not in it is a fault of ours, and a slip that no exchange needs fails a test as well.
"""

from __future__ import annotations

import copy
from typing import Any

from tests.spec_fixtures import DROP, Slip

_METHODS = {"get", "post", "patch", "put", "delete"}


def _schema(name: str, *rest: str) -> tuple[str, ...]:
    return ("components", "schemas", name, *rest)


def _reply(path: str, method: str, status: int) -> tuple[str, ...]:
    return ("paths", path, method, "responses", str(status))


def _says(schema: dict[str, Any], media: str = "application/json") -> dict[str, Any]:
    return {"description": "", "content": {media: {"schema": schema}}}


def _object(**properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "required": list(properties), "properties": properties}


_TEXT = {"type": "string"}


# -- Airbyte, public API


def airbyte_public(document: dict[str, Any], problems: dict[str, Any]) -> dict[str, Any]:
    """The public API with the bodies of its errors, which Airbyte keeps in a file of their own."""
    document = copy.deepcopy(document)
    schemas = problems["components"]["schemas"]
    by_status: dict[int, list[dict[str, Any]]] = {}
    for name, schema in schemas.items():
        if not name.endswith("ProblemResponse"):
            continue
        # One object of its two halves: as an `allOf`, each would forbid what the other names.
        fields = {**schemas["BaseProblemFields"]["properties"], **schema["allOf"][-1]["properties"]}
        fields = {field: _constant(each, schemas) for field, each in fields.items()}
        whole = {"type": "object", "required": ["type", "title"], "properties": fields}
        by_status.setdefault(fields["status"]["enum"][0], []).append(whole)
    for operations in document["paths"].values():
        for method in _METHODS & operations.keys():
            for status in (400, 401, 403, 404, 409, 422):
                operations[method]["responses"][str(status)] = _says(
                    {"oneOf": by_status[status]}, "application/problem+json"
                )
    return document


def _constant(field: dict[str, Any], schemas: dict[str, Any]) -> dict[str, Any]:
    """Defaults "are considered constants for a given problem type", says the file."""
    if "$ref" in field:
        field = schemas[field["$ref"].rpartition("/")[2]]
    return {**field, "enum": [field["default"]]} if "default" in field else dict(field)


AIRBYTE_PUBLIC = [
    Slip(
        "names the property grant-type and requires grant_type; servers differ, so our client sends both",
        _schema("ApplicationTokenRequestWithGrant", "properties", "grant_type"),
        {"enum": ["client_credentials"]},
    ),
    Slip(
        "a wrong client id or secret is answered with an id of the error only",
        _reply("/applications/token", "post", 401),
        _says(_object(errorId={"type": "string", "format": "uuid"}), "application/problem+json"),
    ),
    Slip(
        "beyond the rate the server sheds load with a message, and no problem",
        _reply("/jobs", "get", 429),
        _says(_object(message=_TEXT), "application/problem+json"),
    ),
]


# -- Airbyte, Config API

_KNOWN = _says({"$ref": "#/components/schemas/NotFoundKnownExceptionInfo"})  # known ones all look alike

AIRBYTE_CONFIG = [
    Slip(
        "names the property jsonSchema and requires json_schema, and forbids whatever it does not name",
        _schema("AirbyteStream", "required", "json_schema"),
        DROP,
    ),
    *(
        Slip("a conflict is a known exception with its class", _reply(path, "post", 409), _KNOWN)
        for path in ("/v1/connections/sync", "/v1/jobs/cancel")
    ),
    Slip(
        "the same for a stream that is not in the catalog",
        _reply("/v1/connections/refresh", "post", 400),
        _KNOWN,
    ),
    Slip("no call says what a missing token gets", _reply("/v1/jobs/get", "post", 401), _KNOWN),
    Slip(
        "left out when the file was trimmed; of its reply we read the ids only",
        ("paths", "/v1/workspaces/list"),
        {
            "post": {
                "requestBody": _says({"type": "object"}),
                "responses": {
                    "200": _says(
                        _object(
                            workspaces={
                                "type": "array",
                                "items": {
                                    "type": "object",
                                    "required": ["workspaceId", "name", "slug", "initialSetupComplete"],
                                    "additionalProperties": True,
                                },
                            }
                        )
                    )
                },
            }
        },
    ),
]


# -- Hightouch

_RUN = _schema("SyncRun")

HIGHTOUCH = [
    Slip("its own example has `error: null`", (*_RUN, "properties", "error", "nullable"), True),
    Slip("null until the run starts", (*_RUN, "properties", "startedAt", "nullable"), True),
    Slip("null until the run ends", (*_RUN, "properties", "finishedAt", "nullable"), True),
    Slip("null until the query is done", (*_RUN, "properties", "querySize", "nullable"), True),
    *(
        Slip("absent until the query is done", (*_RUN, "required", name), DROP)
        for name in ("plannedRows", "successfulRows", "failedRows")
    ),
    Slip(
        "an unknown sync is said to be one, with the body of the other trigger operations",
        _reply("/syncs/{syncId}/trigger", "post", 404),
        _says(_object(error=_TEXT)),
    ),
    Slip(
        "the same when it is asked for by slug",
        _reply("/syncs/trigger", "post", 404),
        _says(_object(error=_TEXT)),
    ),
    Slip(
        "an unknown sequence",
        _reply("/sync-sequences/{syncSequenceId}/trigger", "post", 404),
        _says(_object(error=_TEXT)),
    ),
    Slip(
        "an unknown run of a sequence",
        _reply("/sync-sequences/runs/{syncSequenceRunId}", "get", 404),
        _says(_object(error=_TEXT)),
    ),
    Slip(
        "null until the sync ends",
        (
            *_schema("SyncSequenceStatusOutput"),
            *("properties", "syncRuns", "items", "properties", "finishedAt", "nullable"),
        ),
        True,
    ),
    Slip(
        "the runs of an unknown sync",
        _reply("/syncs/{syncId}/runs", "get", 404),
        _says(_object(message=_TEXT)),
    ),
    Slip(
        "200 requests in 10 seconds are allowed, say the docs",
        _reply("/syncs", "get", 429),
        _says(_object(error=_TEXT)),
    ),
]


# -- PagerDuty, Events API v2

PAGERDUTY = [
    Slip(
        "details are anything, as its own example has them",
        _schema("Payload", "properties", "custom_details", "additionalProperties"),
        True,
    ),
]
