"""The receiver: a vendor's hook becomes one event with a documented shape, a stranger's becomes none."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from prefect.client.orchestration import SyncPrefectClient
from prefect.settings import PREFECT_API_URL, temporary_settings
from pydantic import ValidationError
from starlette.applications import Starlette

from blocks.receiver import CensusWebhook, DbtCloudWebhook, FivetranWebhook, GitWebhook, PagerDutyWebhook
from deployments.receiver.app import Limits, Receiver
from deployments.receiver.census import CensusSource
from deployments.receiver.dbt_cloud import DbtCloudSource
from deployments.receiver.fivetran import FivetranSource
from deployments.receiver.git import GitSource
from deployments.receiver.pagerduty import PagerDutySource
from deployments.receiver.source import Hook, Reading, Source
from sandbox.stage import free_port
from tasks.events import EltEvent
from tests.events_fixtures import Target, api, stored, target
from tests.receiver_fixtures import (
    SECRET,
    Sent,
    an_id,
    by_census,
    by_dbt_cloud,
    by_fivetran,
    by_git,
    by_pagerduty,
    by_signed,
    post,
    running,
    signed_source,
)

__all__ = ["api", "target"]

FIVETRAN = FivetranSource(FivetranWebhook(secret=SECRET), "main")
DBT_CLOUD = DbtCloudSource(DbtCloudWebhook(secret=SECRET), "main")
CENSUS = CensusSource(CensusWebhook(secret=SECRET), "main")
PAGERDUTY = PagerDutySource(PagerDutyWebhook(secret=SECRET), "main")


def read(source: Source[Any], sent: Sent) -> Reading:
    headers = {name.lower(): value for name, value in sent.headers.items()}
    return asyncio.run(source.read(Hook(headers, sent.body)))


def the_event(source: Source[Any], sent: Sent) -> EltEvent:
    (event,) = read(source, sent).events
    return event


# --- what each vendor tells ---

SYNC_END = {
    "event": "sync_end",
    "created": "2026-03-02T07:02:54.318Z",
    "connector_type": "postgres",
    "connector_id": "mystified_presidency",
    "connector_name": "orders_pg",
    "sync_id": "1b0c7e13-3c1d-4fd4-8a1e-2f63f1c2a222",
    "destination_group_id": "projected_sickle",
    "data": {
        "status": "FAILURE_WITH_TASK",
        "reason": "Could not connect to the source",
        "taskType": "reconnect",
    },
}


@pytest.mark.no_server
@pytest.mark.parametrize(
    ("status", "outcome"),
    [
        ("SUCCESSFUL", "succeeded"),
        ("FAILURE", "failed"),
        ("FAILURE_WITH_TASK", "failed"),
        ("RESCHEDULED", "rescheduled"),
        ("CANCELED", "cancelled"),
    ],
)
def test_fivetran(status: str, outcome: str) -> None:
    """The end of a sync is an event, known by the sync and how it ended."""
    event = the_event(FIVETRAN, by_fivetran({**SYNC_END, "data": {**SYNC_END["data"], "status": status}}))
    assert event.name == f"elt.fivetran.sync.{outcome}"
    assert event.key == f"fivetran:1b0c7e13-3c1d-4fd4-8a1e-2f63f1c2a222:{outcome}"
    assert event.resource_id == "elt.fivetran.connection.mystified_presidency"
    assert event.occurred.isoformat() == "2026-03-02T07:02:54.318000+00:00"
    assert event.payload == {
        "connection_id": "mystified_presidency",
        "connection_name": "orders_pg",
        "service": "postgres",
        "group_id": "projected_sickle",
        "sync_id": "1b0c7e13-3c1d-4fd4-8a1e-2f63f1c2a222",
        "status": status,
        "reason": "Could not connect to the source",
        "task": "reconnect",
    }


RUN_ENDED = {
    "accountId": 1,
    "webhooksID": "wsu_12345abcde",
    "eventId": "wev_1f2718829464548c",
    "timestamp": "2026-03-02T06:14:51.002Z",
    "eventType": "job.run.completed",
    "webhookName": "Steering",
    "data": {
        "jobId": "123",
        "jobName": "Nightly build",
        "runId": "12345",
        "environmentId": "1234",
        "environmentName": "Production",
        "projectName": "Analytics",
        "runStatus": "Success",
        "runStatusCode": 10,
        "runStatusMessage": "None",
        "runReason": "Kicked off from the UI by test@example.com",
    },
}


def ended(event_type: str, code: int, reason: str = "by schedule") -> dict[str, Any]:
    data = {**RUN_ENDED["data"], "runStatusCode": code, "runReason": reason}  # type: ignore[dict-item]
    return {**RUN_ENDED, "eventType": event_type, "eventId": f"wev_{an_id()}", "data": data}


@pytest.mark.no_server
def test_dbt_cloud() -> None:
    """The end of a run is an event; of a failed one, errored and completed are the same one."""
    event = the_event(DBT_CLOUD, by_dbt_cloud(RUN_ENDED))
    assert (event.name, event.key) == ("elt.dbt_cloud.run.succeeded", "dbt-cloud:1:12345")
    assert event.resource_id == "elt.dbt_cloud.job.123"
    assert event.labels == {"elt.started-by": "dbt-cloud"}
    assert event.payload == {
        "account_id": "1",
        "job_id": "123",
        "job_name": "Nightly build",
        "run_id": "12345",
        "project": "Analytics",
        "environment": "Production",
        "cause": "Kicked off from the UI by test@example.com",
        "message": None,
    }
    errored = the_event(DBT_CLOUD, by_dbt_cloud(ended("job.run.errored", 20)))
    completed = the_event(DBT_CLOUD, by_dbt_cloud(ended("job.run.completed", 20)))
    assert errored.name == "elt.dbt_cloud.run.failed"
    assert errored.id == completed.id
    assert the_event(DBT_CLOUD, by_dbt_cloud(ended("job.run.completed", 30))).name.endswith("cancelled")


@pytest.mark.no_server
def test_dbt_cloud_runs_of_our_own() -> None:
    """A run that a flow run of ours has started says so: its cause carries our marker."""
    from tasks.dbt_cloud_runs import cause_with

    cause = cause_with("orders have landed", "elt:dbt-cloud/123:1:0a1b2c3d")
    event = the_event(DBT_CLOUD, by_dbt_cloud(ended("job.run.completed", 10, cause)))
    assert event.labels == {"elt.started-by": "elt-flows"}


@pytest.mark.no_server
@pytest.mark.parametrize(
    ("told", "outcome"),
    [
        ({"event": "sync.completed", "status": "ok"}, "succeeded"),
        ({"event": "sync.success"}, "succeeded"),
        ({"event": "sync.completed", "status": "emergency"}, "failed"),
        ({"event": "sync.failed"}, "failed"),
    ],
)
def test_census(told: dict[str, str], outcome: str) -> None:
    """The end of a run is one event, though it is told twice."""
    event = the_event(CENSUS, by_census({"workspace_id": 31, "sync_id": 52, "sync_run_id": 3244, **told}))
    assert (event.name, event.key) == (f"elt.census.sync.{outcome}", "census:3244")
    assert event.resource_id == "elt.census.sync.52"
    assert event.payload == {"workspace_id": "31", "sync_id": "52", "sync_run_id": "3244"}


@pytest.mark.no_server
def test_pagerduty() -> None:
    """What happens to an incident is an event."""
    service = {"id": "PF9KMXH", "summary": "Data platform", "type": "service_reference"}
    incident = {
        "id": "PGR0VU2",
        "type": "incident",
        "number": 2,
        "status": "acknowledged",
        "title": "orders are late",
        "html_url": "https://acme.pagerduty.com/incidents/PGR0VU2",
        "urgency": "high",
        "service": service,
    }
    told = {
        "id": "01BBYA",
        "event_type": "incident.acknowledged",
        "resource_type": "incident",
        "occurred_at": "2026-03-02T06:14:51.002Z",
        "data": incident,
    }
    event = the_event(PAGERDUTY, by_pagerduty({"event": told}))
    assert (event.name, event.key) == ("elt.pagerduty.incident.acknowledged", "pagerduty:01BBYA")
    assert event.payload["service"] == "Data platform"
    assert event.payload["url"] == "https://acme.pagerduty.com/incidents/PGR0VU2"


A, B = "a" * 40, "b" * 40
PUSHES: dict[str, tuple[str, dict[str, Any]]] = {
    "github": (
        "push",
        {
            "ref": "refs/heads/main",
            "before": A,
            "after": B,
            "repository": {"full_name": "acme/dbt", "name": "dbt"},
            "pusher": {"name": "steve"},
            "compare": "https://example.com/compare",
            "head_commit": {"id": B, "message": "Add a mart"},
        },
    ),
    "gitlab": (
        "Push Hook",
        {
            "object_kind": "push",
            "ref": "refs/heads/main",
            "before": A,
            "after": B,
            "user_username": "steve",
            "project": {"name": "dbt", "path_with_namespace": "acme/dbt"},
            "commits": [{"id": B, "message": "Add a mart", "url": "https://example.com/compare"}],
        },
    ),
    "bitbucket": (
        "repo:push",
        {
            "actor": {"nickname": "steve"},
            "repository": {"full_name": "acme/dbt"},
            "push": {
                "changes": [
                    {
                        "old": {"type": "branch", "name": "main", "target": {"hash": A}},
                        "new": {
                            "type": "branch",
                            "name": "main",
                            "target": {"hash": B, "message": "Add a mart"},
                        },
                    }
                ]
            },
        },
    ),
}


def git(provider: str, **fields: Any) -> GitSource:
    return GitSource(GitWebhook(provider=provider, secret=SECRET, **fields), "main")


@pytest.mark.no_server
@pytest.mark.parametrize("provider", PUSHES)
def test_git(provider: str) -> None:
    """A push to a branch is the same event whoever hosts the repository."""
    event = the_event(git(provider), by_git(provider, *PUSHES[provider]))
    assert event.name == "elt.git.pushed"
    assert event.key == f"git:{provider}:acme/dbt:branch:main@{A}..{B}"
    assert event.resource_id == "elt.git.repository.acme/dbt"
    assert event.labels == {"elt.git.branch": "main"}
    assert event.payload["after"] == B
    assert (event.payload["branch"], event.payload["tag"]) == ("main", None)
    assert (event.payload["pusher"], event.payload["message"]) == ("steve", "Add a mart")


@pytest.mark.no_server
@pytest.mark.parametrize("provider", ["github", "gitlab"])
def test_git_the_same_commits_pushed_again(provider: str) -> None:
    """From A to B, back, and to B again are two pushes to B; one that is delivered again is the same."""
    what, document = PUSHES[provider]

    def sent(push: int) -> EltEvent:
        body = {**document}
        if provider == "github":
            body["repository"] = {**document["repository"], "pushed_at": push}
        plain = by_git(provider, what, body)
        more = {"Idempotency-Key": str(push), "X-Gitlab-Event-UUID": an_id()}
        return the_event(git(provider), plain.but(headers={**plain.headers, **more}))

    first, again, third = sent(1767225600), sent(1767225600), sent(1767225999)
    assert first.id == again.id
    assert first.id != third.id


@pytest.mark.no_server
@pytest.mark.parametrize("provider", ["github", "bitbucket"])
def test_git_a_signed_body_under_another_id(provider: str) -> None:
    """Who caught a signed body can't make another push of it by the headers, which nobody signs."""
    plain = by_git(provider, *PUSHES[provider])
    more = {name: an_id() for name in ("X-GitHub-Delivery", "X-Request-UUID", "Idempotency-Key")}
    caught = plain.but(headers={**plain.headers, **more})
    assert the_event(git(provider), caught).id == the_event(git(provider), plain).id


@pytest.mark.no_server
def test_git_branches_that_end_and_begin() -> None:
    """A branch that was deleted is no event; one that is new has nothing before it; a tag is a tag."""
    _, push = PUSHES["github"]
    assert not read(git("github"), by_git("github", "push", {**push, "after": "0" * 40})).events
    new = the_event(git("github"), by_git("github", "push", {**push, "before": "0" * 40}))
    assert new.payload["before"] is None
    tag = the_event(git("github"), by_git("github", "push", {**push, "ref": "refs/tags/v1"}))
    assert (tag.labels, tag.payload["tag"]) == ({"elt.git.tag": "v1"}, "v1")


# --- what every sender gets as an answer ---


@pytest.fixture
async def receiver(prefect_server: str) -> AsyncIterator[httpx.AsyncClient]:
    allowed = git("github", repositories=["acme/other"])
    allowed.name = "allowed"
    sources = [FIVETRAN, DBT_CLOUD, CENSUS, PAGERDUTY, git("github"), allowed, signed_source()]
    async with running(sources) as client:
        yield client


NEEDLESS = [
    by_fivetran({"event": "sync_start", "connector_id": "x"}),
    by_fivetran({"event": "test_event", "connector_id": "_connection_1", "data": {}}),
    by_fivetran({**SYNC_END, "connector_id": "_connection_1", "sync_id": None}),
    by_fivetran({**SYNC_END, "data": {"status": "NEW_WORD"}}),
    by_dbt_cloud({**RUN_ENDED, "eventType": "job.run.started"}),
    by_dbt_cloud(ended("job.run.completed", 99)),
    by_census({"event": "sync.triggered", "workspace_id": 1, "sync_id": 1, "sync_run_id": 1}),
    by_census({"event": "sync.completed", "status": "new", "sync_run_id": 1}),
    by_pagerduty({"event": {"event_type": "pagey.ping", "data": {"message": "Hello"}}}),
    by_git("github", "ping", {"zen": "Keep it logically awesome."}),
]


@pytest.mark.parametrize("sent", NEEDLESS, ids=lambda sent: f"{sent.path[7:15]} {sent.body[:40]!r}")
async def test_what_nobody_needs_is_acknowledged(receiver: httpx.AsyncClient, sent: Sent) -> None:
    """A sender that would otherwise try for ever is told that it is well, and that nothing was done."""
    reply = await post(receiver, sent)
    assert reply.status_code == 200
    assert reply.json().keys() == {"ignored"}


WRONG = [
    (by_fivetran(b"{"), 400, "no JSON"),
    (by_fivetran(b"\xff\xfe"), 400, "not UTF-8"),
    (by_fivetran(b"[" * 100_000), 400, "no JSON"),
    (by_fivetran([]), 400, "valid dictionary"),
    (by_fivetran({"event": 1}), 400, "event"),
    (by_fivetran({**SYNC_END, "sync_id": None}), 400, "sync_id"),
    (by_fivetran({**SYNC_END, "sync_id": "x" * 2000}), 400, "key"),
    (by_fivetran({**SYNC_END, "sync_id": "a\0b"}), 400, "NUL"),
    (by_fivetran({**SYNC_END, "connector_name": "\ud800"}), 400, "surrogate"),
    (by_fivetran({**SYNC_END, "created": "yesterday"}), 400, "created"),
    (by_fivetran({**SYNC_END, "created": "2026-03-02T07:02:54"}), 400, "created"),
    (by_fivetran({**SYNC_END, "data": []}), 400, "data"),
    (by_dbt_cloud({**RUN_ENDED, "data": {**RUN_ENDED["data"], "runStatusCode": "x"}}), 400, "runStatusCode"),  # type: ignore[dict-item]
    (by_census({"event": "sync.success", "sync_run_id": {}}), 400, "workspace_id"),
    (by_git("github", "push", {**PUSHES["github"][1], "ref": "main"}), 400, "ref"),
    (by_git("github", "push", PUSHES["github"][1], "allowed"), 401, "repository"),
    (by_signed({"no": "id"}), 400, "id"),
    (by_signed({"id": True}), 400, "id"),
    (by_signed([1]), 400, "no JSON object"),
    (by_signed({"id": "x", "n": float("inf")}), 400, "NaN or infinity"),
    (by_signed({"id": "x"}).but(headers={}), 401, "X-Signature-256"),
    (by_signed({"id": "x"}).but(body=b'{"id": "y"}'), 401, "does not fit"),
    (by_signed({"id": "x"}).but(path="/hooks/signed-webhook/other"), 404, "no such source"),
    (by_signed({"id": "x"}).but(path="/hooks/signed-webhook"), 404, "no such source"),
    (by_signed({"id": "x"}).but(path="/hooks//"), 404, "no such source"),
    (by_signed(b" " * 1_000_001), 413, "bigger than 1000000"),
]


@pytest.mark.parametrize(("sent", "status", "said"), WRONG, ids=lambda value: str(value)[:60])
async def test_what_is_wrong_is_the_senders(
    receiver: httpx.AsyncClient, sent: Sent, status: int, said: str
) -> None:
    """Whatever is wrong with a request, the answer is a 4xx that says what, and gives nothing away."""
    reply = await post(receiver, sent)
    assert reply.status_code == status
    assert said in reply.json()["error"]
    assert SECRET.get_secret_value() not in reply.text


async def test_a_get_is_no_hook(receiver: httpx.AsyncClient) -> None:
    """Only what takes a GET answers one."""
    assert (await receiver.get("/hooks/signed-webhook/main")).status_code == 404
    assert (await receiver.put("/hooks/signed-webhook/main")).status_code == 405


async def test_a_slow_body_is_given_up() -> None:
    """A body that comes drop by drop is given up in time."""
    async with running([signed_source()], limits=Limits(reading=0.5)) as client:
        transport: Any = client._transport
        sent: list[Any] = []

        async def receive() -> dict[str, Any]:
            await asyncio.sleep(0.05)
            return {"type": "http.request", "body": b" ", "more_body": True}

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {
            "type": "http",
            "method": "POST",
            "path": "/hooks/signed-webhook/main",
            "raw_path": b"/hooks/signed-webhook/main",
            "query_string": b"",
            "headers": [],
            "http_version": "1.1",
            "scheme": "http",
            "server": ("receiver", 80),
            "client": ("127.0.0.1", 1),
            "root_path": "",
        }
        await transport.app(scope, receive, send)
    assert sent[0]["status"] == 408


async def test_a_hook_starts_its_run_once(api: SyncPrefectClient, target: Target) -> None:
    """A hook that comes ten times, to two receivers, gives one event and one run."""
    once = target.trigger(expect=["elt.hook.received"], parameters={"word": "{{ event.payload.word }}"})
    sent = by_signed({"id": an_id(), "word": "yes"})
    replies = []
    for _ in range(2):
        async with running([signed_source()], [once]) as client:
            replies += await asyncio.gather(*[post(client, sent) for _ in range(5)])
    assert {reply.status_code for reply in replies} == {200}
    assert len({reply.text for reply in replies}) == 1
    (run,) = target.runs()
    (event,) = replies[0].json()["events"]
    assert (event["runs"], run.parameters) == ([str(run.id)], {"word": "yes"})
    (there,) = stored(api, event["id"])
    assert (there["event"], there["resource"]["prefect.resource.id"]) == (
        "elt.hook.received",
        "elt.hook.main",
    )


async def test_while_the_server_is_away(target: Target) -> None:
    """With no server nothing is acknowledged, and the receiver is not ready; later the hook is taken."""
    once = target.trigger(expect=["elt.hook.received"])
    sent = by_signed({"id": an_id()})
    with temporary_settings({PREFECT_API_URL: f"http://127.0.0.1:{free_port()}/api"}):
        async with running([signed_source()], [once]) as client:
            reply, ready, health = (
                await post(client, sent),
                await client.get("/ready"),
                await client.get("/health"),
            )
    assert (reply.status_code, reply.headers["Retry-After"]) == (503, "10")
    assert (ready.status_code, health.status_code) == (503, 200)
    async with running([signed_source()], [once]) as client:
        assert (await client.get("/ready")).status_code == 200
        assert (await post(client, sent)).status_code == 200
    assert len(target.runs()) == 1


async def test_a_trigger_that_failed_is_tried_again(api: SyncPrefectClient, target: Target) -> None:
    """When a trigger is mended, the hook that is sent again starts its run."""
    sent = by_signed({"id": an_id()})
    late = target.trigger(expect=["elt.hook.received"]).model_copy(
        update={"deployment": f"{target.flow}/deployed-later"}
    )
    async with running([signed_source()], [late]) as client:
        first = await post(client, sent)
        later = Target(api, flow=target.flow, name="deployed-later")
        second = await post(client, sent)
    assert (first.status_code, first.json()["events"][0]["runs"]) == (200, [])
    assert second.json()["events"][0]["runs"] == [str(run.id) for run in later.runs()]


@pytest.mark.no_server
@pytest.mark.parametrize("kind", [FivetranWebhook, DbtCloudWebhook, CensusWebhook, PagerDutyWebhook])
@pytest.mark.parametrize("secret", ["", "  "])
def test_a_source_without_a_secret(kind: type[FivetranWebhook], secret: str) -> None:
    """A block without a secret, which would let everybody in, can't be made; an empty old one is none."""
    with pytest.raises(ValidationError, match="It is empty"):
        kind(secret=secret)
    assert len(kind(secret=SECRET, previous_secret="").secrets) == 1
    assert len(kind(secret=SECRET, previous_secret="the-old-one").secrets) == 2


async def test_what_does_not_end_when_it_stops(prefect_server: str, caplog: pytest.LogCaptureFixture) -> None:
    """The receiver does not wait for it for ever, and its log says what was dropped."""
    receiver = Receiver({}, (), Limits(handing_over=0.2))
    async with receiver.running(Starlette()):
        receiver.later(asyncio.sleep(3600), "/hooks/signed-webhook/main: job 7")
    assert "/hooks/signed-webhook/main: job 7: dropped: the receiver was stopped" in caplog.text
