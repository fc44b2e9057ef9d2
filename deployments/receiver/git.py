"""Pushes to repositories on GitHub, GitLab and Bitbucket.

A push is known by repository, branch and the commits before and after, so that one which is delivered again
is the same event; and by what else tells a branch that goes from A to B, back, and to B again. Never by a
header beside a signed body: whoever caught it could send it under another id. Deleted branches and everything
that is no push are acknowledged.

Vendor documentation: https://docs.github.com/webhooks/webhook-events-and-payloads#push,
https://docs.gitlab.com/user/project/integrations/webhook_events/#push-events,
https://docs.gitlab.com/user/project/integrations/webhooks/#delivery-headers,
https://support.atlassian.com/bitbucket-cloud/docs/event-payloads/#Push
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from pydantic import AliasChoices, BaseModel, Field

from blocks.receiver import GitWebhook
from blocks.signatures import BadSignature, check_hmac, check_token
from deployments.receiver.source import Hook, Reading, Refused, Source
from tasks.events import EltEvent

_NOTHING = "0" * 40  # in place of a commit, where a branch begins or ends
_PREFIXES = {"refs/heads/": "branch", "refs/tags/": "tag"}


@dataclass(frozen=True)
class Push:
    """A push to one branch or tag, whoever told of it."""

    repository: str
    kind: str
    name: str
    before: str | None
    after: str | None
    pusher: str
    message: str
    url: str
    at: str = ""


class _Named(BaseModel):
    name: str = ""
    full_name: str = ""
    path_with_namespace: str = ""
    nickname: str = ""
    display_name: str = ""


class _Repository(_Named):
    pushed_at: int | str = ""


class _Commit(BaseModel):
    id: str = Field(default="", validation_alias=AliasChoices("hash", "id"))
    message: str = ""
    url: str = ""


class _GitHub(BaseModel):
    ref: str
    before: str
    after: str
    repository: _Repository
    pusher: _Named = _Named()
    compare: str = ""
    head_commit: dict[str, Any] | None = None

    def pushes(self) -> Iterator[Push]:
        kind, name = _ref(self.ref)
        message = str((self.head_commit or {}).get("message", ""))
        yield Push(
            self.repository.full_name,
            kind,
            name,
            self.before,
            self.after,
            self.pusher.name,
            message,
            self.compare,
            str(self.repository.pushed_at),
        )


class _GitLab(BaseModel):
    ref: str
    before: str
    after: str
    user_username: str = ""
    project: _Named
    commits: list[_Commit] = []

    def pushes(self) -> Iterator[Push]:
        kind, name = _ref(self.ref)
        last = self.commits[-1] if self.commits else _Commit()
        repository = self.project.path_with_namespace
        yield Push(
            repository, kind, name, self.before, self.after, self.user_username, last.message, last.url
        )


class _Target(BaseModel):
    type: str
    name: str
    target: _Commit


class _Change(BaseModel):
    old: _Target | None = None
    new: _Target | None = None


class _Changes(BaseModel):
    changes: list[_Change] = Field(max_length=50)


class _Bitbucket(BaseModel):
    push: _Changes
    repository: _Named
    actor: _Named = _Named()

    def pushes(self) -> Iterator[Push]:
        for change in self.push.changes:
            if (there := change.new or change.old) is not None:
                yield Push(
                    self.repository.full_name,
                    there.type,
                    there.name,
                    change.old.target.id if change.old else None,
                    change.new.target.id if change.new else None,
                    self.actor.nickname or self.actor.display_name,
                    there.target.message,
                    "",
                )


def _ref(ref: str) -> tuple[str, str]:
    for prefix, kind in _PREFIXES.items():
        if ref.startswith(prefix):
            return kind, ref.removeprefix(prefix)
    raise Refused("ref: neither a branch nor a tag")


@dataclass(frozen=True)
class _Provider:
    event_header: str
    pushes: tuple[str, ...]
    model: type[_GitHub] | type[_GitLab] | type[_Bitbucket]
    check: Callable[[Hook, GitWebhook], None]
    id_header: str = ""  # of an id that is another for each push, and the same when it is delivered again


def _signed(hook: Hook, block: GitWebhook) -> None:
    header = "X-Hub-Signature-256" if block.provider == "github" else "X-Hub-Signature"
    check_hmac(hook.headers, hook.body, block.secrets, header=header, prefix="sha256=")


def _token(hook: Hook, block: GitWebhook) -> None:
    check_token(hook.headers, block.secrets, header="X-Gitlab-Token")


_PROVIDERS = {
    "github": _Provider("x-github-event", ("push",), _GitHub, _signed),
    # Nothing of GitLab's is signed. The id is there since 17.4; its X-Gitlab-Event-UUID and -Webhook-UUID are
    # new ones at each delivery.
    "gitlab": _Provider("x-gitlab-event", ("Push Hook", "Tag Push Hook"), _GitLab, _token, "idempotency-key"),
    "bitbucket": _Provider("x-event-key", ("repo:push",), _Bitbucket, _signed),
}


class GitSource(Source[GitWebhook]):
    """Each branch or tag of a push is an event."""

    kind = GitWebhook

    async def read(self, hook: Hook) -> Reading:
        """See `Source.read`."""
        provider = _PROVIDERS[self.block.provider]
        provider.check(hook, self.block)
        what = hook.headers.get(provider.event_header, "")
        if what not in provider.pushes:
            return Reading(ignored=f"{what[:60] or 'this'} is not an event that is used")
        pushes = list(hook.read(provider.model).pushes())
        allowed = self.block.repositories
        if allowed and any(push.repository not in allowed for push in pushes):
            raise BadSignature("this repository is not one of those that may")
        given = hook.headers.get(provider.id_header, "").strip()
        events = tuple(
            self._event(push, given or push.at) for push in pushes if push.after and push.after != _NOTHING
        )
        return Reading(events, ignored="" if events else "nothing was pushed but what ends a branch")

    def _event(self, push: Push, which: str) -> EltEvent:
        before = None if push.before == _NOTHING else push.before
        known = f"{push.repository}:{push.kind}:{push.name}@{before}..{push.after}"
        if not push.repository:
            raise Refused("repository: it has no name")
        return EltEvent(
            name="elt.git.pushed",
            key=f"git:{self.block.provider}:{known}{f'#{which}' if which else ''}",
            occurred=datetime.now(UTC),
            resource_id=f"elt.git.repository.{push.repository}",
            resource_name=push.repository,
            labels={f"elt.git.{push.kind}": push.name} if push.kind in _PREFIXES.values() else {},
            payload={
                "provider": self.block.provider,
                "repository": push.repository,
                "branch": push.name if push.kind == "branch" else None,
                "tag": push.name if push.kind == "tag" else None,
                "before": before,
                "after": push.after,
                "pusher": push.pusher,
                "message": push.message[:2000],
                "url": push.url,
            },
        )
