"""Incidents: what is wrong between one run and the next, so that each is told once, and its end too.

An incident has a key that says what is wrong (pipeline, tool, resource) and never when: the same failure in
the next run is the same incident. What a run has to say is an `Alarm` for each thing that is wrong and the
keys of all that is well; `compare` tells which incidents that opens, repeats and ends.

Open incidents are kept as Prefect Variables, one for each, tagged `elt-incident` (see `tasks/memory.py`).
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

Level = Literal["failed", "partial", "refused", "waiting"]
"""failed: a step failed, and the run with it. partial: a step failed, and the run's rule bears that. refused:
the run could not begin, or its process died. waiting: nothing is wrong, the run waits for somebody."""

RUN = "run"
"""The key of a run that could not begin or died."""

GIVEN_UP = "run-given-up"
"""The key of a run that died so often that it is not started again."""

STUCK = "run-stuck"
"""The key of a run that does not begin, or does not end."""

OF_RUNS = (RUN, GIVEN_UP, STUCK)
"""What the next run of a deployment that goes well, or the same run, ends."""

SEVERAL = 10
FORGET = timedelta(days=14)
TELLING = timedelta(seconds=60)
_MARK = 6  # characters; a mark only has to differ from some hundreds of others
_MEMBERS = 250
_REASON, _TITLE, _LINK = 500, 150, 500


class Alarm(BaseModel):
    """One thing that is wrong in a run.

    Attributes:
        key: What it is, the same in every run: tool and resource.
        title: What people call it: `airbyte airports`.
        what: What happened to it, as a class of events: `sync failed`.
        level: How bad it is for the run.
        reason: Why, in the vendor's words.
        tool: Which tool it is of.
        owner: Who is told.
        url: The vendor's page about it.
        link: What that page is called: `job 12`.
        held: What waits because of it, in words.
    """

    model_config = ConfigDict(frozen=True)

    key: str
    title: str
    what: str
    level: Level = "failed"
    reason: str = ""
    tool: str = ""
    owner: str | None = None
    url: str | None = None
    link: str = "job"
    held: list[str] = []


class Bulletin(BaseModel):
    """What a run has to say.

    Attributes:
        pipeline: What the incidents are kept under: the deployment, or the flow.
        run: The run's name.
        run_url: Its page.
        run_id: Its id.
        deployment: The deployment that it is a run of, `flow/deployment`; the flow alone where it is of none.
        tags: Its tags.
        occasion: This attempt of this run. An incident that was told on it is not told on it again.
        at: When.
        alarms: What is wrong.
        fine: The keys of what worked. What is in neither was not run, and says nothing.
        summary: How the run went, a line per step; for those who are told of every run.
    """

    model_config = ConfigDict(frozen=True)

    pipeline: str
    run: str = ""
    run_url: str | None = None
    run_id: str = ""
    deployment: str = ""
    tags: list[str] = []
    occasion: str = ""
    at: datetime = Field(default_factory=lambda: datetime.now(UTC))
    alarms: list[Alarm] = []
    fine: list[str] = []
    summary: list[str] = []

    def under(self, pipeline: str) -> Bulletin:
        """The same, with its incidents kept under another name, which other deployments may share.

        That this deployment's runs can't begin stays its own: another's that can are no sign of recovery.
        """
        own = {key: f"{key}/{self.pipeline}" for key in OF_RUNS}
        alarms = [a.model_copy(update={"key": own.get(a.key, a.key)}) for a in self.alarms]
        fine = [own.get(key, key) for key in self.fine]
        return self.model_copy(update={"pipeline": pipeline, "alarms": alarms, "fine": fine})


class Incident(BaseModel):
    """Something that is wrong until it is known to be well.

    Attributes:
        key: With the pipeline; PagerDuty's `dedup_key`.
        to: Where it was told: a block's name or a channel. Its end is told there too.
        many: Whether it stands for more than one thing, because many came at once.
        members: Marks of the alarms that it stands for.
        since: When it was first seen.
        last: When it was last seen.
        runs: How many runs have seen it.
        occasion: The last of them.
        told: What its first message is known by where that was sent; None while it was not.
        told_at: When it was last told.
        undelivered: Whether telling it was tried in vain.
    """

    key: str
    to: str
    title: str
    what: str
    level: Level = "failed"
    tool: str = ""
    owner: str | None = None
    reason: str = ""
    url: str | None = None
    link: str = "job"
    many: bool = False
    members: list[str] = []
    since: datetime
    last: datetime
    runs: int = 1
    occasion: str = ""
    told: dict[str, str] | None = None
    told_at: datetime | None = None
    undelivered: bool = False


class Happened(StrEnum):
    """What a run means for an incident."""

    OPENED = "OPENED"
    REPEATED = "REPEATED"
    RECOVERED = "RECOVERED"
    FORGOTTEN = "FORGOTTEN"
    """Nothing that runs has said anything about it for two weeks."""
    SHRUNK = "SHRUNK"
    """Some of what it stands for is well again. Nothing to tell, something to remember."""


@dataclass
class Change:
    """What a run means for one incident, and whether that could be told.

    Attributes:
        happened: What.
        incident: The incident as it is now.
        alarms: What this run has to say about it.
        known: Whether there is a memory of it from before this run.
        told: What the message is known by (empty where there is nothing to know it by); None: not told.
        problem: Why not.
    """

    happened: Happened
    incident: Incident
    alarms: Sequence[Alarm] = ()
    known: bool = False
    told: dict[str, str] | None = None
    problem: str | None = None

    def done(self, told: dict[str, str] | None = None, *, said: bool = True) -> None:
        """Note that it was told.

        Args:
            told: What the message is known by from now on; as before if not given.
            said: Off where a repeat was passed over in silence.
        """
        self.told = told if told is not None else self.incident.told or {}
        if said:
            self.incident = self.incident.model_copy(update={"told_at": datetime.now(UTC)})

    @property
    def ends(self) -> bool:
        """Whether the incident is over."""
        return self.happened in (Happened.RECOVERED, Happened.FORGOTTEN)

    @property
    def held(self) -> list[str]:
        """What waits because of it."""
        return list(dict.fromkeys(text for alarm in self.alarms for text in alarm.held))


def mark(key: str) -> str:
    """A short text that stands for a key, so that the marks of hundreds fit into a variable."""
    return hashlib.sha256(key.encode()).hexdigest()[:_MARK]


def compare(
    open_: Iterable[Incident],
    bulletin: Bulletin,
    *,
    to: Callable[[str | None], str],
    wanted: Callable[[Alarm], bool] = lambda _: True,
    several: int = SEVERAL,
) -> list[Change]:
    """What a run means for the incidents of its pipeline.

    Args:
        open_: The incidents that are open.
        bulletin: What the run has to say.
        to: Where an owner is told.
        wanted: Whether an alarm is to be told; one that is not neither opens nor ends anything.
        several: More alarms than this that are new, for one owner, are one incident.
    """
    alarms = {mark(key): alarm for key, alarm in _by_key(bulletin.alarms).items() if wanted(alarm)}
    # Two steps may share a key, such as two calls of one function: if one went wrong it is not well.
    fine = {mark(key) for key in bulletin.fine} - {mark(alarm.key) for alarm in bulletin.alarms}
    changes: list[Change] = []
    groups: dict[str | None, Change] = {}
    for incident in open_:
        ours = [alarms.pop(member) for member in incident.members if member in alarms]
        left = [member for member in incident.members if member not in fine]
        change = _change(incident, ours, left, bulletin)
        if change:
            changes.append(change)
        if incident.many:
            groups[incident.owner] = change or Change(Happened.SHRUNK, incident, known=True)
    by_owner: defaultdict[str | None, list[Alarm]] = defaultdict(list)
    for alarm in alarms.values():
        by_owner[alarm.owner].append(alarm)
    for owner, new in by_owner.items():
        if len(new) <= several:
            changes += [_opened([alarm], to(owner), bulletin) for alarm in new]
        elif owner not in groups:
            changes.append(_opened(new, to(owner), bulletin))
        elif groups[owner].incident.occasion != bulletin.occasion or groups[owner] in changes:
            _join(groups[owner], new, bulletin)
            if groups[owner] not in changes:
                changes.append(groups[owner])
    return changes


def _by_key(alarms: Iterable[Alarm]) -> dict[str, Alarm]:
    """One alarm for each key, with the reasons of all that share it."""
    found: dict[str, Alarm] = {}
    for alarm in alarms:
        first = found.setdefault(alarm.key, alarm)
        if alarm.reason not in first.reason:
            both = {"reason": f"{first.reason}; {alarm.reason}", "held": [*first.held, *alarm.held]}
            found[alarm.key] = first.model_copy(update=both)
    return found


def _change(incident: Incident, ours: list[Alarm], left: list[str], bulletin: Bulletin) -> Change | None:
    if ours:
        if incident.told is not None and incident.occasion == bulletin.occasion:
            return None  # a second hook for the same death; a retry of the run is another occasion
        untold = incident.told is None and not incident.undelivered
        if untold and incident.occasion != bulletin.occasion and bulletin.at - incident.last < TELLING:
            return None  # another run has just met it, and is telling
        seen = _seen(incident, ours, left, bulletin)
        happened = Happened.OPENED if incident.told is None else Happened.REPEATED
        return Change(happened, seen, ours, known=True)
    if not left:
        return Change(Happened.RECOVERED, incident, known=True)
    if bulletin.at - incident.last > FORGET:
        return Change(Happened.FORGOTTEN, incident, known=True)
    if left != incident.members:
        return Change(Happened.SHRUNK, incident.model_copy(update={"members": left}), known=True)
    return None


def _seen(incident: Incident, alarms: Sequence[Alarm], members: list[str], bulletin: Bulletin) -> Incident:
    """The incident as this run saw it."""
    first = alarms[0]
    again = incident.occasion == bulletin.occasion
    return incident.model_copy(
        update={
            "members": members,
            "last": bulletin.at,
            "runs": incident.runs + (not again),
            "occasion": bulletin.occasion,
            "level": _worst(alarms),
            "reason": _reason(alarms)[:_REASON],
            **({} if incident.many else _latest(first)),
        }
    )


def _latest(alarm: Alarm) -> dict[str, str | None]:
    return {"what": alarm.what, "url": (alarm.url or "")[:_LINK] or None, "link": alarm.link}


def _join(group: Change, new: list[Alarm], bulletin: Bulletin) -> None:
    """Put more alarms into the one incident that stands for many."""
    alarms = [*group.alarms, *new]
    members = list(dict.fromkeys([*group.incident.members, *(mark(alarm.key) for alarm in new)]))[:_MEMBERS]
    if group.happened is not Happened.OPENED:
        group.happened = Happened.REPEATED
        if not group.alarms:
            group.incident = _seen(group.incident, alarms, members, bulletin)
    group.alarms = alarms
    group.incident = group.incident.model_copy(
        update={"members": members, "reason": _reason(alarms)[:_REASON], "level": _worst(alarms)}
    )


def _opened(alarms: Sequence[Alarm], to: str, bulletin: Bulletin) -> Change:
    first, many = alarms[0], len(alarms) > 1
    owner = f"/{first.owner}" if first.owner else ""
    title = f"{len(alarms)} steps" + (f" of {first.owner}" if first.owner else "")
    incident = Incident(
        key=f"{bulletin.pipeline}{owner}/several" if many else f"{bulletin.pipeline}/{first.key}",
        to=to,
        title=(title if many else first.title)[:_TITLE],
        what="failed" if many else first.what,
        level=_worst(alarms),
        tool="" if many else first.tool,
        owner=first.owner,
        reason=_reason(alarms)[:_REASON],
        url=None if many else (first.url or "")[:_LINK] or None,
        link=first.link,
        many=many,
        members=[mark(alarm.key) for alarm in alarms][:_MEMBERS],
        since=bulletin.at,
        last=bulletin.at,
        occasion=bulletin.occasion,
    )
    return Change(Happened.OPENED, incident, alarms)


def _worst(alarms: Sequence[Alarm]) -> Level:
    order: tuple[Level, ...] = ("refused", "failed", "partial", "waiting")
    return min((alarm.level for alarm in alarms), key=order.index)


def _reason(alarms: Sequence[Alarm]) -> str:
    if len(alarms) == 1:
        return alarms[0].reason
    names = ", ".join(alarm.title for alarm in alarms[:SEVERAL])
    more = f" and {len(alarms) - SEVERAL} more" if len(alarms) > SEVERAL else ""
    return f"{names}{more}. The first: {alarms[0].reason}"
