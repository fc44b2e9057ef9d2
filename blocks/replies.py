"""What a vendor's reply says where it is not what was asked for: whose fault it is, and in which words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

import httpx
from pydantic import BaseModel, TypeAdapter, ValidationError

from blocks.errors import RETRY_AFTER_CAP, BadReply, RateLimited, parse_retry_after

ModelT = TypeVar("ModelT", bound=BaseModel)
_ADDRESS_GUIDANCE = "Check that the base URL is that of the API and not of the web interface."


def may_pass(status: int) -> bool:
    """Whether a server, or what stands before it, may think better of an answer in a moment.

    Any 5xx may: content networks have a dozen of their own for a server that they can't reach. Not 501: what
    a server does not know how to do it will not have learnt by then.
    """
    return status in (408, 425) or (status >= 500 and status != httpx.codes.NOT_IMPLEMENTED)


def is_html(response: httpx.Response) -> bool:
    """Whether a reply is a page for people."""
    text = response.text.lstrip()[:200].lower()
    return "html" in response.headers.get("content-type", "") or text.startswith(("<!doctype", "<html"))


def bad_reply(vendor: str, response: httpx.Response, where: Mapping[str, Any]) -> BadReply:
    """The error for a reply that no such API sends, and whether the address is likely to blame."""
    wrong_address = response.is_redirect or is_html(response)
    what = "it answered with something that is not the expected JSON"
    if response.is_redirect:
        what = "it redirects elsewhere"
    elif wrong_address:
        what = "it answered with an HTML page where JSON was expected"
    elif not response.text.strip():
        what = "it answered with an empty body where JSON was expected"
    guidance = _ADDRESS_GUIDANCE if wrong_address else ""
    error = BadReply(vendor, what, status=response.status_code, guidance=guidance, **where)
    error.wrong_address = wrong_address
    return error


def rate_limited(
    vendor: str, message: str, response: httpx.Response, details: Mapping[str, Any]
) -> RateLimited:
    """The error for a 429, with the wait that it asks for."""
    limited = RateLimited(vendor, message, **details)
    limited.retry_after = parse_retry_after(response.headers.get("Retry-After"), clock_of(response))
    if limited.over_cap:
        limited.guidance = (
            f"It asks to wait {limited.retry_after:.0f} s; we wait {RETRY_AFTER_CAP:.0f} s at a time."
        )
    return limited


def clock_of(response: httpx.Response) -> datetime | None:
    """The vendor's clock, by the `Date` header; None where there is none."""
    try:
        moment = parsedate_to_datetime(response.headers["Date"])
    except (KeyError, ValueError):
        return None
    return moment if moment.tzinfo is not None else None


def first_problem(error: ValidationError) -> str:
    """What is wrong with a document, and where in it."""
    problem = error.errors(include_url=False, include_input=False, include_context=False)[0]
    return f"{'.'.join(str(part) for part in problem['loc']) or 'document'}: {problem['msg']}"


def readable(items: Sequence[Any], kind: TypeAdapter[ModelT]) -> list[ModelT]:
    """Those that are what the API promises: one that is not must not hide the other ninety-nine.

    For lists by which jobs are watched: what is missing in one is read by itself, and that tells what is
    wrong with it. Not where a job is looked for that may have been started: there, missing means it was not.
    """
    return sorted_out(items, kind)[0]


def sorted_out(items: Sequence[Any], kind: TypeAdapter[ModelT]) -> tuple[list[ModelT], list[Any]]:
    """Those that are what the API promises, and those that are not, for who must say what was left out."""
    found: list[ModelT] = []
    left_out: list[Any] = []
    for item in items:
        try:
            found.append(kind.validate_python(item))
        except ValidationError:
            left_out.append(item)
    return found, left_out


def vendor_message(body: Any) -> str | None:
    """The vendor's own words in an error body, most specific first."""
    if isinstance(body, str):
        return body.strip()[:500] or None
    if not isinstance(body, Mapping):
        return None
    data, status, error = body.get("data"), body.get("status"), body.get("error")
    parts = [
        data.get("message") if isinstance(data, Mapping) else None,
        _envelope_message(status) if isinstance(status, Mapping) else None,  # dbt Cloud
        *(error.get(key) for key in ("message", "detail", "code") if isinstance(error, Mapping)),
        *(body.get(key) for key in ("message", "error", "detail", "title")),
    ]
    for part in parts:
        if isinstance(part, str) and part.strip():
            return part.strip()[:500]
    if isinstance(body.get("errorId"), str):
        return f"error id {body['errorId']}"
    return None


def _envelope_message(status: Mapping[str, Any]) -> str:
    words = (status.get("user_message"), status.get("developer_message"))
    return " ".join(word.strip() for word in words if isinstance(word, str))
