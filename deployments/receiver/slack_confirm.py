"""The second command that a full load from Slack needs: nothing is kept between the two.

The answer to the first command holds a code, which is the time and an HMAC of who may use it for what. Any
receiver that has the same block can check it, also one that was started in between.
"""

from __future__ import annotations

import hmac
import json
import re
import time
from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import Any

from pydantic import SecretStr

WITHIN = 300  # seconds for which a code is good
_CLOCKS = 30  # seconds by which the clocks of two receivers may differ
_CODE = re.compile(r"([0-9a-f]{8,12})-([0-9a-f]{16})", re.ASCII)
_SHORT = re.compile(r"""["']?-\w*f""", re.ASCII)  # alone or with others: -xf; what only looks so is asked for
_SWITCHES = ("full_refresh", "full_resync", "full_sync")  # of dbt, Hightouch and Census
_FLOWS = ("dbt-full-refresh",)  # of which every run is one


def loads_anew(deployment: str, parameters: Mapping[str, Any]) -> bool:
    """Whether a run with these parameters deletes and loads, or builds, everything anew.

    Args:
        deployment: `flow/deployment`.
        parameters: All that the run will have, or some of them.
    """
    return deployment.partition("/")[0] in _FLOWS or _asks_for_all(parameters)


def _asks_for_all(value: Any) -> bool:
    match value:
        case str():
            return _is_step_that_does(value)
        case list() | tuple():
            return any(map(_asks_for_all, value))
        case Mapping():
            return any(_is_switch(name, one) or _asks_for_all(one) for name, one in value.items())
    return False


def _is_step_that_does(text: str) -> bool:
    """Whether it is a step, as those of a dbt Cloud job, that does: `-f` is dbt's short word for it."""
    words = text.split()
    return "--full-refresh" in text or (words[:1] == ["dbt"] and any(map(_SHORT.match, words)))


def _is_switch(name: str, value: Any) -> bool:
    if name == "mode":  # of a reload
        return bool(value == "full_refresh")
    if name == "before":  # of an Airbyte sync; a chain's is a list
        return isinstance(value, str)
    if name == "resync":  # of a Fivetran sync
        return value not in (None, "none")
    # Whatever pydantic may take for true; to ask once too often does no harm.
    return name in _SWITCHES and value not in (None, False)


def code_for(who: Sequence[str], deployment: str, parameters: Mapping[str, Any], secret: SecretStr) -> str:
    """A code with which these people may start this, for a while.

    Args:
        who: Ids of whom it is for.
        deployment: What is started.
        parameters: With what, as they were typed.
        secret: The command's signing secret.
    """
    moment = f"{int(time.time()):x}"
    return f"{moment}-{_mark(moment, who, deployment, parameters, secret)}"


def fits(
    code: str,
    who: Sequence[str],
    deployment: str,
    parameters: Mapping[str, Any],
    secrets: Sequence[SecretStr],
) -> bool:
    """Whether a code was given out for exactly this, with one of the secrets, not too long ago."""
    parts = _CODE.fullmatch(code)
    if parts is None or not -_CLOCKS <= time.time() - int(parts[1], 16) <= WITHIN:
        return False
    marks = (_mark(parts[1], who, deployment, parameters, secret) for secret in secrets)
    return any(hmac.compare_digest(parts[2], mark) for mark in marks)


def _mark(
    moment: str, who: Sequence[str], deployment: str, parameters: Mapping[str, Any], secret: SecretStr
) -> str:
    # The word in front keeps it apart from what Slack signs with the same secret.
    said = json.dumps(["elt-confirm", moment, *who, deployment, parameters], sort_keys=True)
    return hmac.new(secret.get_secret_value().encode(), said.encode(), sha256).hexdigest()[:16]
