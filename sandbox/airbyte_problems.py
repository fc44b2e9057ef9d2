"""Airbyte's error replies: problem bodies with fixed texts, the specifics in `data`."""

from __future__ import annotations

from typing import Any

_ERRORS = "https://reference.airbyte.com/reference/errors"
_PROBLEMS = {
    400: ("bad-request", "The request could not be understood by the server due to malformed syntax."),
    401: ("invalid-api-key", "The API key in the Authorization header is invalid."),
    404: ("resource-not-found", "The requested resource could not be found."),
    422: ("unprocessable-entity", "The body of the request was not understood"),
}


class Problem(Exception):
    """An error reply of Airbyte's, raised by a handler."""

    def __init__(self, status: int, message: str = "", *, body: dict[str, Any] | None = None) -> None:
        super().__init__(message)
        title, detail = _PROBLEMS.get(status, ("", ""))
        self.status = status
        self.body = body or {
            "status": status,
            "type": f"{_ERRORS}#{title}",
            "title": title,
            "detail": detail,
            **({"data": {"message": message}} if message else {}),
        }


def try_again_later(message: str) -> Problem:
    """409: something runs already."""
    body = {
        "status": 409,
        "type": f"{_ERRORS}#try-again-later",
        "title": "try-again-later",
        "detail": "Please try again later.",
        "data": {"message": message},
    }
    return Problem(409, body=body)


def state_conflict(message: str) -> Problem:
    """409: the state does not allow it."""
    body = {
        "status": 409,
        "type": f"{_ERRORS}#409-state-conflict",
        "title": "state-conflict",
        "detail": "State conflict",
        "data": {"message": message},
    }
    return Problem(409, body=body)


def not_found(kind: str, resource_id: str) -> Problem:
    """404: no such connection, job or workspace."""
    body = {
        "status": 404,
        "type": f"{_ERRORS}#resource-not-found",
        "title": "resource-not-found",
        "detail": "The requested resource could not be found.",
        "data": {"resourceType": kind, "resourceId": resource_id},
    }
    return Problem(404, body=body)
