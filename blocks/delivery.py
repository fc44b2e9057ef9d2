"""Delivering a message: tried again for as long as the caller can wait, and not a second longer."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

import stamina

from blocks.http import BadReply, RateLimited, VendorUnavailable

T = TypeVar("T")


async def deliver(send: Callable[[], Awaitable[T]], *, patience: float, repeatable: bool) -> T:
    """Send until it is taken or the patience is over.

    Tried again are 429, 5xx and connections that were not made; a request whose reply was lost or can't be
    read only where a second one does no harm. A wait that the vendor asks for is kept to where it fits into
    the patience; where it does not (an hour), there is no waiting at all.

    Args:
        send: Sends once, and raises one of the errors of `blocks.errors` where that fails.
        patience: Seconds for all attempts together.
        repeatable: Whether sending twice does no more than sending once.

    Raises:
        VendorError: The last attempt's.
    """
    deadline = time.monotonic() + patience

    def again(error: Exception) -> bool | float:
        if isinstance(error, RateLimited) and error.retry_after is not None:
            fits = time.monotonic() + error.retry_after < deadline
            return max(error.retry_after, 0.1) if fits else False
        if isinstance(error, RateLimited):
            return True
        if isinstance(error, BadReply) and (error.status or 0) < 400:
            return repeatable
        return isinstance(error, VendorUnavailable) and (repeatable or not error.sent or bool(error.status))

    async for attempt in stamina.retry_context(
        on=again, attempts=8, timeout=patience, wait_initial=0.5, wait_max=8.0, wait_jitter=0.5
    ):
        with attempt:
            return await send()
    raise AssertionError  # stamina re-raises the last error; this is for the type checker
