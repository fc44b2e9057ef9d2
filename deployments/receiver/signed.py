"""Any JSON that is signed with an HMAC-SHA256 in a header of the sender's choice."""

from __future__ import annotations

from datetime import UTC, datetime
from hashlib import sha256

import jmespath

from blocks.receiver import SignedWebhook
from blocks.signatures import check_hmac
from deployments.receiver.source import Hook, Reading, Refused, Source
from tasks.events import EltEvent


class SignedWebhookSource(Source[SignedWebhook]):
    """Each body is an event, known by the id in it, or by the whole of it where it has none."""

    kind = SignedWebhook

    async def read(self, hook: Hook) -> Reading:
        """See `Source.read`."""
        block = self.block
        check_hmac(
            hook.headers,
            hook.body,
            block.secrets,
            header=block.header,
            prefix=block.prefix,
            encoding=block.encoding,
        )
        body = hook.json()
        if not isinstance(body, dict):
            raise Refused("the body is no JSON object")
        event = EltEvent(
            name=block.event,
            key=f"hook:{self.name}:{self._identity(hook, body)}",
            occurred=datetime.now(UTC),
            resource_id=block.resource or f"elt.hook.{self.name}",
            payload=body,
        )
        return Reading((event,))

    def _identity(self, hook: Hook, body: object) -> str:
        if not self.block.id_path:
            return sha256(hook.body).hexdigest()
        try:
            found = jmespath.search(self.block.id_path, body)
        except jmespath.exceptions.JMESPathError:
            found = None  # a function in the path that this body's types don't fit
        if not isinstance(found, str | int) or isinstance(found, bool) or found == "":
            raise Refused(f"{self.block.id_path}: there is no text or number, so nothing tells events apart")
        return str(found)
