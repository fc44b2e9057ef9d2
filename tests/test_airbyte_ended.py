"""Airbyte's jobs that have ended, by looking: what no notification told starts its run, once."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import pytest
from prefect.client.orchestration import PrefectClient, get_client
from pydantic import SecretStr

from blocks import AirbyteServer, airbyte_config, airbyte_public
from blocks.airbyte_model import AirbyteApi
from blocks.errors import VendorError
from blocks.receiver import AirbyteWebhook
from deployments.receiver.airbyte import AirbyteSource
from flows import looking, sync_connections
from flows.looking import airbyte_ended
from sandbox import Sandbox
from sandbox.airbyte_jobs import Job as SandboxJob
from tasks.airbyte import AirbyteSync
from tasks.events import HandOverError
from tasks.jobs import JobPolicy
from tasks.jobs.journal import ARTIFACT_KEY
from tasks.looking import airbyte as airbyte_look
from tasks.looking.airbyte import JobsLook, Remembered, WatchedJobs, look_at_jobs
from tasks.looking.memory import ArtifactMemory, memory_name, owner
from tests.airbyte_fixtures import server
from tests.jobs_fixtures import PREFECTS_SOCKETS, collected, until
from tests.looking_fixtures import Target, target
from tests.receiver_fixtures import Sent, as_json, post, running

__all__ = ["collected", "target"]

pytestmark = [
    *PREFECTS_SOCKETS,
    # Prefect's, on every line that a task outside of a flow logs.
    pytest.mark.filterwarnings("ignore:.*without a flow run id:UserWarning"),
]
ALL = ("elt.airbyte.job.*",)
URL_SECRET = SecretStr("an-unguessable-part-of-the-address")
AGO = timedelta(hours=1)


@dataclass
class Watched:
    """An Airbyte whose jobs are looked at, with a receiver that may be up or not."""

    sandbox: Sandbox
    target: Target
    block: AirbyteWebhook
    name: str

    async def ended(self, *connections: str, how: str = "succeeded", kind: Any = "sync") -> list[int]:
        """Jobs of Airbyte's own scheduler that have ended."""
        jobs = []
        for connection in connections:
            self.sandbox.airbyte.set(connection, outcome="stuck")
            job = self.sandbox.airbyte.start(connection, kind)
            self.sandbox.airbyte.finish_job(job.job_id, how)
            jobs.append(job.job_id)
        return jobs

    def connections(self, count: int) -> list[str]:
        return list(self.sandbox.airbyte.add_connections(count))

    async def look(self, **what: Any) -> JobsLook:
        """One look; by default what has ended within the last hour is new to the first one."""
        said = {"webhook": self.name, "since": datetime.now(UTC) - AGO, **what}
        return await look_at_jobs(WatchedJobs(**said), [self.target.trigger(*ALL)])

    async def told(self, job: int, connection: str) -> None:
        """The notification of a job reaches a receiver."""
        data = {"jobId": job, "connection": {"id": connection}, "finishedAt": "2026-03-02T04:12:49Z"}
        source = AirbyteSource(self.block, self.name)
        async with running([source], [self.target.trigger(*ALL)]) as client:
            reply = await post(
                client, Sent(f"{source.path}/{URL_SECRET.get_secret_value()}", as_json({"data": data}))
            )
        assert reply.status_code == 200, reply.text

    async def remembered(self) -> Remembered:
        """What the last look has kept."""
        async with get_client() as client:
            key = memory_name("airbyte-ended", self.name, owner())
            kept = await ArtifactMemory(client, key, Remembered).read()
        assert kept is not None
        return kept

    def jobs(self) -> list[tuple[str, str]]:
        """Job and operation of each run's event."""
        return sorted((one["job_id"], one["operation"]) for one in self.target.payloads())


async def watched_at(sandbox: Sandbox, target: Target, block: AirbyteServer) -> Watched:
    webhook, name = AirbyteWebhook(url_secret=URL_SECRET, server=block), f"w{uuid4().hex[:8]}"
    await webhook.save(name)  # type: ignore[misc]  # a coroutine on a running loop
    return Watched(sandbox, target, webhook, name)


@pytest.fixture
async def watched(sandbox: Sandbox, target: Target, airbyte: AirbyteServer) -> Watched:
    return await watched_at(sandbox, target, airbyte)


async def test_while_no_receiver_was_up(watched: Watched) -> None:
    """A job that ended while nobody took its notification starts its run, once."""
    (connection,) = watched.connections(1)
    (job,) = await watched.ended(connection)
    look = await watched.look()
    assert (look.jobs, look.runs) == (1, 1)
    assert (await watched.look()).jobs == 0
    assert watched.jobs() == [(str(job), "sync")]
    (more,) = await watched.ended(connection, how="failed")
    assert (await watched.look()).jobs == 1
    assert watched.jobs() == [(str(job), "sync"), (str(more), "sync")]


@pytest.mark.parametrize("first", ["the receiver", "the look"])
async def test_told_both_ways(watched: Watched, first: str) -> None:
    """What a notification tells and a look finds is one event, whichever comes first."""
    (connection,) = watched.connections(1)
    (job,) = await watched.ended(connection)
    if first == "the look":
        await watched.look()
    await watched.told(job, connection)
    assert (await watched.look()).jobs == (1 if first == "the receiver" else 0)
    assert watched.jobs() == [(str(job), "sync")]


async def test_only_ends(watched: Watched) -> None:
    """A job that runs is told when it has ended, and one that was cancelled as well."""
    running, cancelled = watched.connections(2)
    watched.sandbox.airbyte.set(running, outcome="stuck")
    job = watched.sandbox.airbyte.start(running, "sync").job_id
    await watched.ended(cancelled, how="cancelled")
    assert (await watched.look()).jobs == 1
    assert (await watched.look()).jobs == 0
    watched.sandbox.airbyte.finish_job(job, "succeeded")
    assert (await watched.look()).jobs == 1
    assert len(watched.jobs()) == 2


async def test_from_the_first_look_on(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without `since` nothing is told that ended before the first look; what ends after it is."""
    one, two = watched.connections(2)
    await watched.ended(one)
    # Airbyte's clock at the first look, by whose replies it is known to a second or two.
    later = datetime.now(UTC) + timedelta(seconds=3)
    monkeypatch.setattr(AirbyteApi, "theirs", lambda *_: later)
    assert (await watched.look(since=None)).jobs == 0
    await asyncio.sleep(3)
    (job,) = await watched.ended(two)
    assert (await watched.look(since=None)).jobs == 1
    assert watched.jobs() == [(str(job), "sync")]


async def test_killed_in_the_middle(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    """A look that died after handing over, before it wrote that down, is repeated without a second run."""
    monkeypatch.setattr(airbyte_look, "_SLICE", 2)
    jobs = await watched.ended(*watched.connections(5))
    write, written = ArtifactMemory.write, 0

    async def dies(memory: Any, state: Any, text: str) -> None:
        nonlocal written
        written += 1
        if written == 2:
            raise KeyError("killed")
        await write(memory, state, text)

    with monkeypatch.context() as killed:
        killed.setattr(ArtifactMemory, "write", dies)
        with pytest.raises(KeyError):
            await watched.look()
    assert len(watched.jobs()) == 4
    assert (await watched.look()).jobs == 3
    assert watched.jobs() == sorted((str(job), "sync") for job in jobs)
    assert (await watched.look()).jobs == 0


async def test_the_server_does_not_take_it(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the Prefect server did not take is handed over by the next look."""
    await watched.ended(*watched.connections(1))

    async def away(*_: Any) -> None:
        raise HandOverError("the Prefect server can't be reached")

    with monkeypatch.context() as server_away:
        server_away.setattr(airbyte_look, "hand_over", away)
        with pytest.raises(HandOverError):
            await watched.look()
    assert (await watched.look()).runs == 1


async def test_a_job_that_is_listed_late(watched: Watched) -> None:
    """A job that ended before the last one that was told is found within the overlap."""
    one, two = watched.connections(2)
    (late,) = await watched.ended(one)
    watched.sandbox.airbyte.jobs[late].hidden_until = float("inf")
    await watched.ended(two)
    assert (await watched.look()).jobs == 1
    watched.sandbox.airbyte.jobs[late].hidden_until = 0.0
    assert (await watched.look()).jobs == 1
    assert len(watched.jobs()) == 2


async def test_a_connection_that_is_gone(watched: Watched) -> None:
    """A job of a connection that Airbyte does not know any more hides no other."""
    gone, there = watched.connections(2)
    await watched.ended(gone)
    (job,) = await watched.ended(there)
    del watched.sandbox.airbyte.connections[gone]
    assert (await watched.look()).runs == 1
    assert watched.jobs() == [(str(job), "sync")]
    assert (await watched.look()).jobs == 0


@pytest.mark.parametrize(
    ("api", "settings"),
    [
        ("public", {}),
        ("public", {"age": "2025"}),
        ("config", {}),
        ("config", {"apis": "config", "age": "2023", "auth": "basic"}),
    ],
    ids=str,
)
async def test_each_api(
    sandbox: Sandbox,
    target: Target,
    monkeypatch: pytest.MonkeyPatch,
    api: str,
    settings: dict[str, Any],
) -> None:
    """Many pages, clears too, by each API; a server of 2023 is asked connection by connection."""
    monkeypatch.setattr(airbyte_public, "PAGE", 2)
    monkeypatch.setattr(airbyte_config, "PAGE", 2)
    for name, value in settings.items():
        setattr(sandbox.airbyte.settings, name, value)
    basic = {"username": "airbyte", "password": SecretStr("password")} if "auth" in settings else {}
    watched = await watched_at(sandbox, target, server(sandbox, api, **basic))
    connections = watched.connections(5)
    jobs = [(str(job), "sync") for job in await watched.ended(*connections)]
    kind = "reset" if settings.get("age") == "2023" else "clear"
    jobs += [(str(job), kind) for job in await watched.ended(connections[0], kind=kind)]
    assert (await watched.look()).jobs == 6
    assert watched.jobs() == sorted(jobs)
    assert (await watched.look()).jobs == 0


async def test_airbyte_is_away(watched: Watched) -> None:
    """While Airbyte can't be asked the look fails, and the next one finds what ended meanwhile."""
    await watched.look()
    await watched.ended(*watched.connections(1))
    watched.sandbox.faults.add(kind="status", vendor="airbyte", path="/jobs$", status=403)
    with pytest.raises(VendorError):
        await watched.look()
    watched.sandbox.faults.clear()
    assert (await watched.look()).runs == 1


async def test_a_job_of_which_only_a_part_has_landed(
    sandbox: Sandbox, target: Target, airbyte: AirbyteServer
) -> None:
    """It is no success, and not passed over either: by a notification and by a look it is `partial`."""
    watched = await watched_at(sandbox, target, airbyte)
    (connection,) = watched.connections(1)
    sandbox.airbyte.set(connection, outcome="partial", duration=0.1)
    job = sandbox.airbyte.start(connection, "sync")
    await until(lambda: job.status == "succeeded")
    await watched.told(job.job_id, connection)
    await watched.look()
    (run,) = target.runs()
    assert run.labels["elt.event.name"] == "elt.airbyte.job.partial"


async def partial(watched: Watched) -> tuple[int, str]:
    """A job of which only a part has landed, and its connection."""
    (connection,) = watched.connections(1)
    watched.sandbox.airbyte.set(connection, outcome="partial", duration=0.1)
    job = watched.sandbox.airbyte.start(connection, "sync")
    await until(lambda: job.status == "succeeded")
    return job.job_id, connection


def without_details(sandbox: Sandbox) -> None:
    """The Config API can't tell now what became of a job."""
    sandbox.faults.add(kind="status", vendor="airbyte", path="/jobs/get_without_logs$", status=400)


async def test_details_that_only_the_look_was_told(watched: Watched) -> None:
    """`succeeded` to the receiver, `partial` to the look: it is one event, and starts one run."""
    job, connection = await partial(watched)
    without_details(watched.sandbox)
    await watched.told(job, connection)
    watched.sandbox.faults.clear()
    assert (await watched.look()).jobs == 1
    (run,) = watched.target.runs()
    assert run.labels["elt.event.name"] == "elt.airbyte.job.succeeded"


async def test_details_that_are_late(watched: Watched) -> None:
    """While it can't be told whether all has landed a look waits, and another job's end is told."""
    await partial(watched)
    without_details(watched.sandbox)
    (other,) = watched.connections(1)
    (cancelled,) = await watched.ended(other, how="cancelled")
    assert (await watched.look()).jobs == 1
    assert watched.jobs() == [(str(cancelled), "sync")]
    watched.sandbox.faults.clear()
    assert (await watched.look()).jobs == 1
    names = {run.labels["elt.event.name"] for run in watched.target.runs()}
    assert names == {"elt.airbyte.job.cancelled", "elt.airbyte.job.partial"}


async def test_details_that_never_come(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the overlap has passed the job is told by Airbyte's own word."""
    await partial(watched)
    without_details(watched.sandbox)
    assert (await watched.look()).jobs == 0
    later = datetime.now(UTC) + timedelta(minutes=6)
    monkeypatch.setattr(AirbyteApi, "theirs", lambda *_: later)
    assert (await watched.look()).jobs == 1
    (run,) = watched.target.runs()
    assert run.labels["elt.event.name"] == "elt.airbyte.job.succeeded"


@pytest.mark.parametrize("overlap", [0, 300])
async def test_a_job_that_may_not_be_read(
    watched: Watched, monkeypatch: pytest.MonkeyPatch, overlap: int
) -> None:
    """It holds up no other, in its slice or after it; it fails the look, and is told as soon as it can be."""
    monkeypatch.setattr(airbyte_look, "_SLICE", 2)
    forbidden, *others = watched.connections(4)
    (first,) = await watched.ended(forbidden)
    jobs = await watched.ended(*others)
    path = f"/connections/{forbidden}$"
    watched.sandbox.faults.add(kind="status", vendor="airbyte", path=path, status=403)
    for _ in range(2):
        with pytest.raises(VendorError):
            await watched.look(overlap=overlap)
        assert watched.jobs() == sorted((str(job), "sync") for job in jobs)
    watched.sandbox.faults.clear()
    assert (await watched.look(overlap=overlap)).jobs == 1
    assert watched.jobs() == sorted((str(job), "sync") for job in [first, *jobs])


@pytest.mark.parametrize(("api", "reply"), [("public", "reply"), ("config", "config_reply")])
async def test_a_row_that_cannot_be_read(
    sandbox: Sandbox,
    target: Target,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    api: str,
    reply: str,
) -> None:
    """It stops no other job, is named, and the next looks do not begin after it; in the end they do."""
    watched = await watched_at(sandbox, target, server(sandbox, api))
    one, two = watched.connections(2)
    (bad,) = await watched.ended(one)
    (good,) = await watched.ended(two)
    whole = getattr(SandboxJob, reply)

    def broken(job: SandboxJob, **how: Any) -> dict[str, Any]:
        document: dict[str, Any] = whole(job, **how)
        return {**document, "status": None} if job.job_id == bad else document

    with monkeypatch.context() as unreadable, caplog.at_level("WARNING"):
        unreadable.setattr(SandboxJob, reply, broken)
        assert (await watched.look()).jobs == 1
    assert watched.jobs() == [(str(good), "sync")]
    assert f"Airbyte job {bad} can't be read" in caplog.text
    kept = await watched.remembered()
    assert list(kept.unreadable) == [str(bad)]
    assert kept.since == kept.began
    with monkeypatch.context() as unreadable:
        unreadable.setattr(SandboxJob, reply, broken)
        await watched.look(overlap=0)
    moved = await watched.remembered()
    assert moved.since > moved.began
    assert (await watched.look()).jobs == 1
    assert not (await watched.remembered()).unreadable
    assert watched.jobs() == sorted((str(job), "sync") for job in (bad, good))


def test_whose_jobs_they_are(
    sandbox: Sandbox, target: Target, airbyte: AirbyteServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The journals that tell our jobs from others' are read once a look, not once a job."""
    name = f"w{uuid4().hex[:8]}"
    AirbyteWebhook(url_secret=URL_SECRET, server=airbyte).save(name)
    watched = Watched(sandbox, target, AirbyteWebhook.load(name), name)
    connection, *others = watched.connections(4)
    sandbox.airbyte.set(connection, duration=0.1)
    sync = AirbyteSync(server=airbyte, connection_id=connection, policy=JobPolicy(poll=0.1))
    state = sync_connections(syncs=[sync], return_state=True)
    asyncio.run(watched.ended(*others))
    (ours,) = sandbox.airbyte.jobs_of(connection)
    read, asked = PrefectClient.read_artifacts, 0

    async def counted(client: PrefectClient, **what: Any) -> Any:
        nonlocal asked
        asked += what["artifact_filter"].key.any_ == [ARTIFACT_KEY] and not what.get("offset")
        return await read(client, **what)

    monkeypatch.setattr(PrefectClient, "read_artifacts", counted)
    assert asyncio.run(watched.look()).jobs == 4
    assert asked == 1
    started = {one["job_id"]: one["started_by_flow_run"] for one in target.payloads()}
    assert started.pop(str(ours.job_id)) == str(state.state_details.flow_run_id)
    assert set(started.values()) == {None}


def test_the_flow(
    sandbox: Sandbox, target: Target, airbyte: AirbyteServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The deployment's flow says in its state what came of the look."""
    name = f"w{uuid4().hex[:8]}"
    AirbyteWebhook(url_secret=URL_SECRET, server=airbyte).save(name)
    monkeypatch.setattr(looking, "triggers_here", lambda _: (target.trigger(*ALL),))
    watched = Watched(sandbox, target, AirbyteWebhook.load(name), name)
    asyncio.run(watched.ended(*watched.connections(1)))
    what = WatchedJobs(webhook=f"airbyte-webhook/{name}", since=datetime.now(UTC) - AGO)
    states = [airbyte_ended(what, ["here"], return_state=True).name for _ in range(2)]
    assert states == ["HandedOver", "NothingNew"]
    assert len(target.runs()) == 1
