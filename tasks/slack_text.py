"""What Slack is told, in its mrkdwn.

Vendor documentation: https://docs.slack.dev/messaging/formatting-message-text
"""

from __future__ import annotations

import re
from datetime import datetime

from tasks.incidents import Bulletin, Change, Happened, Incident

TEXT_LIMIT = 40_000
_HELD = 5
_LINES = 30


def escape(text: str) -> str:
    """Text that Slack shows as it is."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def link(url: str | None, text: str) -> str:
    """A link; the bare text where there is no address."""
    return f"<{escape(url.replace('|', '%7C'))}|{escape(text)}>" if url else escape(text)


def cut(text: str, most: int = TEXT_LIMIT) -> str:
    """The text within Slack's limit."""
    return text if len(text) <= most else text[: most - 1] + "…"


def plain(text: str) -> str:
    """The text without any markup, for when Slack finds fault with it."""
    text = re.sub(r"<!date\^[^|>]*\|([^>]*)>", r"\1", text)
    text = re.sub(r"<([^|>]+)\|([^>]*)>", r"\2 (\1)", text)
    return text.replace("*", "").replace("~", "")


def moment(at: datetime) -> str:
    """A time, which Slack shows in the reader's own zone."""
    return f"<!date^{int(at.timestamp())}^{{date_short_pretty}} {{time}}|{at:%Y-%m-%d %H:%M} UTC>"


def header(bulletin: Bulletin) -> str:
    """Which run speaks."""
    run = f", run {link(bulletin.run_url, bulletin.run)}" if bulletin.run else ""
    return f"*{escape(bulletin.pipeline)}*{run}"


def footer(bulletin: Bulletin) -> list[str]:
    """Of what deployment it is a run, with which tags, and its id, for whoever has to look it up."""
    parts = [
        f"deployment {bulletin.deployment}" if bulletin.deployment else "",
        f"tags {', '.join(bulletin.tags)}" if bulletin.tags else "",
        f"run {bulletin.run_id}" if bulletin.run_id else "",
    ]
    said = " · ".join(part for part in parts if part)
    return [f"_{escape(said)}_"] if said else []


def line(change: Change) -> str:
    """What a run means for an incident, in one line and what hangs on it."""
    incident = change.incident
    title = f"*{escape(incident.title)}*"
    waiting = incident.level == "waiting"
    match change.happened:
        case Happened.RECOVERED if waiting:
            return f"✓ {title} is no longer waited for"
        case Happened.RECOVERED:
            return f"✓ {title} is well again, {_history(incident)}"
        case Happened.FORGOTTEN:
            return f"- {title}: closed, since nothing has run it after {moment(incident.last)}"
        case Happened.REPEATED:
            since = f"{_ordinal(incident.runs)} run, since {moment(incident.since)}"
            text = f"✗ {title} is still failing ({since})"
        case _:
            text = f"{'◦' if waiting else '✗'} {title} {escape(incident.what)}"
    return "\n".join([f"{text}{_why(incident)}", *_held(change)])


def root(change: Change, bulletin: Bulletin) -> str:
    """The first message of an incident, as it is now."""
    incident = change.incident
    if change.ends:
        return f"✓ ~{escape(incident.title)}~ {escape(incident.what)} in {header(bulletin)}: {_end(change)}"
    since = ""
    if incident.runs > 1:
        since = f"\n{_ordinal(incident.runs)} run, since {moment(incident.since)}"
    sign = "◦" if incident.level == "waiting" else "✗"
    first = f"{sign} *{escape(incident.title)}* {escape(incident.what)} in {header(bulletin)}{_why(incident)}"
    return "\n".join([first + since, *_held(change), *footer(bulletin)])


def digest(changes: list[Change], bulletin: Bulletin) -> str:
    """One message about several incidents, and how the run went where it is to be summed up."""
    lines = [line(change) for change in changes]
    if not bulletin.alarms:
        lines += [escape(text) for text in bulletin.summary]
    if len(lines) > _LINES:
        lines = [*lines[:_LINES], f"… and {len(lines) - _LINES} more"]
    last = footer(bulletin) if changes else []
    return cut("\n".join([header(bulletin), *lines, *last]))


def _end(change: Change) -> str:
    if change.happened is Happened.FORGOTTEN:
        return "closed, since nothing has run it for two weeks"
    if change.incident.level == "waiting":
        return "answered, or its time was up"
    return f"resolved, {_history(change.incident)}"


def _history(incident: Incident) -> str:
    runs = "one run" if incident.runs == 1 else f"{incident.runs} runs"
    return f"after {runs} that failed, since {moment(incident.since)}"


def _why(incident: Incident) -> str:
    reason = " ".join(incident.reason.split())
    job = f" {link(incident.url, incident.link)}" if incident.url else ""
    owner = f" (owner: {escape(incident.owner)})" if incident.owner and not incident.many else ""
    return f": {escape(reason)}{job}{owner}" if reason else f"{job}{owner}"


def _held(change: Change) -> list[str]:
    held = [f"○ held back: {escape(text)}" for text in change.held[:_HELD]]
    more = len(change.held) - _HELD
    return [*held, f"○ and {more} more held back"] if more > 0 else held


def _ordinal(number: int) -> str:
    special = number % 100 in (11, 12, 13)
    ending = "th" if special else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"
