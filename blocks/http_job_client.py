"""The client of a declared job API: signs in as declared, and fills and sends the declared requests."""

from __future__ import annotations

import json
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import httpx

from blocks.fields import MASKED_GUIDANCE
from blocks.http import ApiClient, AuthError, BadReply, TokenAuth, VendorError
from blocks.http_job import HttpJob
from blocks.http_job_auth import BasicAuth, BearerToken, ClientCredentials, HeaderToken, SignIn, secrets_of
from blocks.http_job_fill import Value, Values, fill, fill_document, fill_path, search
from blocks.http_job_parts import Cancel, Listing, Lookup, Query, Request, Start
from blocks.replies import bad_reply


@dataclass(frozen=True)
class Reply:
    """A successful reply: the document in it, if there is one, and its headers."""

    status: int
    document: Any
    headers: Mapping[str, str]
    text: str


class HttpJobApi(ApiClient):
    """An account of a declared API."""

    def __init__(self, job: HttpJob) -> None:
        secrets = secrets_of(job.auth)
        if any(set(secret) == {"*"} for secret in secrets):
            raise AuthError(job.service, "a secret is masked", guidance=MASKED_GUIDANCE, sent=False)
        self._job = job
        self._session: dict[str, Value] = {}
        self._looked_up: dict[tuple[Hashable, str], tuple[Values, str | None]] = {}
        auth, headers = self._authorisation(job)
        self._token = auth if isinstance(auth, TokenAuth) else None
        per_minute = job.requests_per_minute
        super().__init__(
            job.service,
            job.base_url,
            auth=auth,
            headers={**job.headers, **headers},
            rate=(per_minute, 60.0) if per_minute else None,
            secrets=secrets,
        )

    def _authorisation(self, job: HttpJob) -> tuple[httpx.Auth | None, dict[str, str]]:
        auth = job.auth
        match auth:
            case BearerToken():
                return None, {"Authorization": f"Bearer {auth.token.get_secret_value()}"}
            case HeaderToken():
                return None, {auth.header: auth.value.get_secret_value()}
            case BasicAuth():
                return httpx.BasicAuth(auth.username, auth.password.get_secret_value()), {}
            case ClientCredentials():
                return TokenAuth(job.service, lambda: _token_request(auth), _read_token), {}
            case SignIn():
                return self._signing_in(job, auth), {}
        return None, {}

    def _signing_in(self, job: HttpJob, auth: SignIn) -> TokenAuth:
        def request() -> httpx.Request:
            body = fill_document(auth.body, auth.secrets.get_secret_value())
            return httpx.Request(
                "POST", f"{job.base_url}{auth.path}", json=body, headers={"Accept": "application/json"}
            )

        def read(document: Any) -> tuple[str, float]:
            token = search(auth.token, document)
            found = {name: search(path, document) for name, path in auth.values.items()}
            if not isinstance(token, str) or None in found.values():
                raise KeyError(auth.token)
            self._session = found
            return token, auth.lifetime

        return TokenAuth(
            job.service, request, read, header=auth.header, prefix=auth.prefix, what="one of the credentials"
        )

    async def session_values(self) -> Values:
        """What the reply to the sign-in says, where that is declared to be used.

        Raises:
            VendorError: The API refuses us or can't be reached.
        """
        if self._token and isinstance(self._job.auth, SignIn) and self._job.auth.values and not self._session:
            try:
                await self._token.sign_in(self._http)
            except httpx.TransportError as error:
                where = {"method": "POST", "path": self._job.auth.path, "sent": False}
                raise self._transport_error(error, where) from None
        return self._session

    async def look_up(
        self, job: HttpJob, resource: str, arguments: Values, *, fresh: bool = False
    ) -> tuple[Values, str | None]:
        """All values that the requests for a job are filled with, and why it can't be started now, if so.

        From memory when it was looked up on this client already and `fresh` is off.

        Raises:
            NotFoundError: What a lookup asks for does not exist.
            VendorError: Anything else.
        """
        key = (job.declaration, resource)
        if fresh or key not in self._looked_up:
            values: dict[str, Value] = {**arguments, **await self.session_values()}
            problem: str | None = None
            for lookup in job.lookups:
                found, why = await self._look_up(lookup, values)
                values |= found
                problem = problem or why
            self._looked_up[key] = (values, problem)
        values_then, problem = self._looked_up[key]
        return {**values_then, **self._session}, problem

    def rendered(self, query: Query, values: Values) -> Hashable:
        """What makes two requests one and the same."""
        return (
            fill_path(query.path, values),
            *(fill(text, values) for text in query.params.values()),
            text_of(fill_document(query.body, values)),
        )

    async def query(self, query: Query, values: Values) -> Reply:
        """Send a request that changes nothing, once; its reply has a document.

        Raises:
            VendorError: One of the tree in `blocks/errors.py`.
        """
        body = fill_document(query.body, values)
        return await self._send(query, values, query.method, asks=True, body=body)

    async def _look_up(self, lookup: Lookup, values: Values) -> tuple[dict[str, Value], str | None]:
        reply = await self.query(lookup, values)
        found = {name: search(path, reply.document) for name, path in lookup.values.items()}
        if missing := [name for name, value in found.items() if not isinstance(value, str | int | float)]:
            path = lookup.values[missing[0]]
            raise BadReply(
                self.vendor, f"its reply has no {path}", method=lookup.method, path=lookup.path, sent=False
            )
        problem = search(lookup.problem, reply.document)
        return found, problem if isinstance(problem, str) and problem else None

    async def start(self, start: Start, values: Values) -> Reply:
        """Send a start, once."""
        return await self._send(
            start,
            values,
            start.method,
            body=fill_document(start.body, values),
            form={name: fill(text, values) for name, text in start.form.items()} if start.form else None,
            headers={name: fill(text, values) for name, text in start.headers.items()},
        )

    async def cancel(self, cancel: Cancel, values: Values) -> Reply:
        """Send a cancellation, once."""
        return await self._send(cancel, values, cancel.method, body=fill_document(cancel.body, values))

    async def items(self, listing: Listing, values: Values) -> dict[str, Any]:
        """The jobs of a list by their ids, in its order."""
        reply = await self.query(listing, values)
        found = search(listing.items, reply.document)
        if found is None and reply.document is not None:
            found = []  # a list that is left out when there is nothing in it
        if not isinstance(found, list):
            raise BadReply(
                self.vendor,
                f"its reply has no list at {listing.items}",
                method=listing.method,
                path=listing.path,
                sent=False,
            )
        ids = [search(listing.id, item) for item in found]
        return {str(i): item for i, item in zip(ids, found, strict=True) if i is not None}

    async def _send(
        self,
        request: Request,
        values: Values,
        method: str,
        *,
        asks: bool = False,
        body: Any = None,
        form: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Reply:
        """Send a declared request, once, and read the document of its reply; one that asks must have one."""
        path = _path(self.vendor, request.path, values)
        params = {name: fill(text, values) for name, text in request.params.items()} or None
        # Asking starts nothing, however it ends.
        where: dict[str, Any] = {"method": method, "path": path, "sent": not asks}
        response = await self._exchange(where, params=params, json=body, data=form, headers=headers)
        document: Any = None
        if response.text.strip():
            try:
                document = response.json()
            except ValueError:
                raise bad_reply(self.vendor, response, where) from None
        elif asks:
            raise bad_reply(self.vendor, response, where)
        self._take_clock(response)
        return Reply(response.status_code, document, response.headers, response.text)


def _path(vendor: str, template: str, values: Values) -> str:
    path = fill_path(template, values)
    if any(part in (".", "..") for part in path.split("/")) or "//" in path:
        # Such a part would be taken out of the address, which then is another one.
        raise VendorError(vendor, f"an argument makes {path!r} another path than {template!r}", sent=False)
    return path


def _token_request(auth: ClientCredentials) -> httpx.Request:
    form = {
        "grant_type": "client_credentials",
        "client_id": auth.client_id,
        "client_secret": auth.client_secret.get_secret_value(),
        **({"scope": auth.scope} if auth.scope else {}),
        **auth.extra,
    }
    return httpx.Request("POST", auth.token_url, data=form, headers={"Accept": "application/json"})


def _read_token(document: Any) -> tuple[str, float]:
    token, lifetime = document["access_token"], float(document.get("expires_in") or 3600.0)
    if not isinstance(token, str):
        raise TypeError
    return token, lifetime


def moment_of(value: Any) -> datetime | None:
    """A time as APIs write it: ISO 8601 (UTC without a zone), or seconds or milliseconds since 1970."""
    try:
        if isinstance(value, str) and not value.replace(".", "", 1).isdigit():
            moment = datetime.fromisoformat(value)
            return moment if moment.tzinfo else moment.replace(tzinfo=UTC)
        seconds = float(value)
        return datetime.fromtimestamp(seconds / 1000 if seconds > 1e11 else seconds, UTC)
    except (TypeError, ValueError, OverflowError, OSError):
        return None


def text_of(document: Any) -> str:
    """A document as text, to look for words in it."""
    return document if isinstance(document, str) else json.dumps(document, ensure_ascii=False)
