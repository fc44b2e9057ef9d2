"""New objects under an S3 prefix: each handed over once, whatever is killed or refused in between."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey
from pydantic import ValidationError

from deployments.environments import Environment
from flows import looking
from flows.looking import s3_arrivals
from tasks.events import EltEvent, HandedOver, HandOverError, OnceTrigger, TriggersWrong
from tasks.looking import arrivals
from tasks.looking.arrivals import CREATED_TOGETHER, Look, S3Prefix, look_at_prefix
from tasks.looking.memory import MemoryUnreadable, memory_name
from tasks.looking.notices import CREATED
from tasks.looking.triggers import triggers_here
from tests.jobs_fixtures import PREFECTS_SOCKETS, collected
from tests.looking_fixtures import REPOSITORY, Child, Landing, Target, aws, child, keys_of, landing, target

__all__ = ["aws", "child", "collected", "landing", "target"]

pytestmark = [
    *PREFECTS_SOCKETS,
    # Prefect's, on every line that a task outside of a flow logs.
    pytest.mark.filterwarnings("ignore:.*without a flow run id:UserWarning"),
]
FILES = 1000


async def look(landing: Landing, target: Target, **what: Any) -> Look:
    prefix = S3Prefix(**{"bucket": landing.block(), "prefix": "in/", **what})
    return await look_at_prefix(prefix, [target.trigger(CREATED, CREATED_TOGETHER)])


def is_away(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """The Prefect server takes so many hand-overs and no more."""
    real, calls = arrivals.hand_over, iter(range(after))

    async def hand(events: Sequence[EltEvent], *more: Any) -> list[HandedOver]:
        if next(calls, None) is None:
            raise HandOverError("the Prefect server can't be reached")
        return await real(events, *more)

    monkeypatch.setattr(arrivals, "hand_over", hand)


async def test_each_object_is_one_event(landing: Landing, target: Target) -> None:
    """What is new is handed over with what a run needs to read it, and the next look finds nothing new."""
    landing.put("in/a.csv", "in/b/ü 1.csv", "elsewhere.csv", body=b"12345")
    assert (await look(landing, target)).runs == 2
    assert (await look(landing, target)).message == "nothing new among 2 objects"
    (odd,) = [payload for payload in target.payloads() if "ü" in payload["key"]]
    assert odd.pop("last_modified").endswith("+00:00")
    assert odd == {
        "bucket": landing.name,
        "key": "in/b/ü 1.csv",
        "uri": f"s3://{landing.name}/in/b/ü 1.csv",
        "size": 5,
        "etag": "827ccb0eea8a706c4c34a16891f84e7b",
    }
    assert landing.keys() == ["elsewhere.csv", "in/a.csv", "in/b/ü 1.csv"]


async def test_written_anew_is_a_new_event(landing: Landing, target: Target) -> None:
    """The same key with other content is handed over again."""
    landing.put("in/a.csv", body=b"1")
    await look(landing, target)
    landing.put("in/a.csv", body=b"2")
    assert (await look(landing, target)).handed_over == 1
    assert len({payload["etag"] for payload in target.payloads()}) == 2


@pytest.mark.parametrize("action", ["move", "delete"])
async def test_same_content_again_is_a_new_event(landing: Landing, target: Target, action: Any) -> None:
    """A file that comes every day with the same content starts a run every day."""
    for day in (1, 2):
        landing.put("in/daily.csv", body=b"the same")
        assert (await look(landing, target, action=action)).handed_over == 1
        assert len(target.runs()) == day
        await asyncio.sleep(1.1)  # S3 tells times by the second
    moved = 2 if action == "move" else 0
    assert [key.rsplit("/", 1)[-1] for key in landing.keys("")] == ["daily.csv"] * moved


async def test_run_is_told_where_the_object_goes(landing: Landing, target: Target) -> None:
    """An object is moved below a folder of its own time, and the payload has its new place."""
    landing.put("in/2026/a.csv")
    await look(landing, target, prefix="in/20", action="move", move_to="done/%Y/%m%d-%H%M%S/")
    (payload,) = target.payloads()
    written = datetime.fromisoformat(payload["last_modified"])
    expected = f"done/{written:%Y/%m%d-%H%M%S}/2026/a.csv"
    assert payload["moved_to"]["key"] == expected
    assert landing.keys() == [expected]


async def test_only_what_fits(landing: Landing, target: Target) -> None:
    """Pattern, folder, time and rest choose; what was moved is not found again."""
    landing.put("box/in/a.csv", "box/in/a.tmp", "box/in/", "in/b.csv", body=b"")
    bucket = landing.block("box")
    soon = datetime.now(UTC) + timedelta(hours=1)
    assert (await look(landing, target, bucket=bucket, since=soon)).found == 0
    assert (await look(landing, target, bucket=bucket, settle=3600)).found == 0
    for found in (1, 0):
        seen = await look(landing, target, bucket=bucket, prefix="", pattern="*.csv", action="move")
        assert seen.found == found
    assert keys_of(target.payloads()) == ["box/in/a.csv"]


async def test_oldest_first_and_not_all_at_once(landing: Landing, target: Target) -> None:
    """What is more than `at_most` is left to the next look."""
    landing.put("in/a", "in/b", "in/c")
    first = await look(landing, target, at_most=2)
    assert (first.handed_over, first.waiting) == (2, 1)
    assert "1 wait for the next look" in first.message
    assert (await look(landing, target, at_most=2)).handed_over == 1
    assert keys_of(target.payloads()) == ["in/a", "in/b", "in/c"]


@pytest.mark.parametrize("action", ["none", "move", "delete"])
async def test_nothing_is_done_before_the_server_has_it(
    landing: Landing, target: Target, action: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the Prefect server is away no object is moved, deleted or remembered."""
    landing.put("in/a", "in/b")
    with monkeypatch.context() as patch:
        is_away(patch, after=0)
        with pytest.raises(HandOverError, match="can't be reached"):
            await look(landing, target, action=action)
    assert landing.keys() == ["in/a", "in/b"]
    assert (await look(landing, target, action=action)).runs == 2
    assert len(target.runs()) == 2


@pytest.mark.parametrize("action", ["none", "move", "delete"])
async def test_one_event_for_all(landing: Landing, target: Target, action: Any) -> None:
    """Together, the objects of a look are the list of one event."""
    landing.put("in/a", "in/b")
    seen = await look(landing, target, action=action, together=True)
    assert (seen.handed_over, seen.events, seen.runs) == (2, 1, 1)
    landing.put("in/c")
    await look(landing, target, action=action, together=True)
    assert (await look(landing, target, action=action, together=True)).handed_over == 0
    payloads = target.payloads()
    assert sorted((payload["count"], keys_of(payload["objects"])) for payload in payloads) == [
        (1, ["in/c"]),
        (2, ["in/a", "in/b"]),
    ]


@pytest.mark.parametrize("action", ["none", "move"])
async def test_a_broken_off_list_is_finished_first(
    landing: Landing, target: Target, action: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A list that was handed over before the look died is the same event, though half of it is moved."""
    landing.put("in/a", "in/b")

    async def dies(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(arrivals.Looker, "_after", dies)
        with pytest.raises(KeyboardInterrupt):
            await look(landing, target, action=action, together=True)
    if action == "move":
        (payload,) = target.payloads()
        there = payload["objects"][0]
        source = {"Bucket": landing.name, "Key": there["key"]}
        landing.s3.copy_object(Bucket=landing.name, Key=there["moved_to"]["key"], CopySource=source)
        landing.s3.delete_object(**source)
    landing.put("in/c")
    await look(landing, target, action=action, together=True)
    assert sorted(keys_of(payload["objects"]) for payload in target.payloads()) == [
        ["in/a", "in/b"],
        ["in/c"],
    ]
    assert len(landing.keys("in/")) == (3 if action == "none" else 0)


async def test_lists_fit_into_a_run(
    landing: Landing, target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Together they are so many events as their lists need."""
    monkeypatch.setattr(arrivals, "_TOGETHER", 700)
    landing.put(*(f"in/{n}" for n in range(5)))
    seen = await look(landing, target, together=True)
    assert (seen.handed_over, seen.events) == (5, 3)
    assert sum(payload["count"] for payload in target.payloads()) == 5


@pytest.mark.parametrize("action", ["move", "delete"])
async def test_written_anew_in_between_is_not_lost(
    landing: Landing, target: Target, action: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is written anew after it was listed is neither moved nor deleted, and is the next look's."""
    landing.put("in/a", "in/b", body=b"old")
    real = arrivals.hand_over

    async def writes(events: Sequence[EltEvent], *more: Any) -> list[HandedOver]:
        done = await real(events, *more)
        landing.put("in/a", body=b"new!")
        return done

    with monkeypatch.context() as patch:
        patch.setattr(arrivals, "hand_over", writes)
        assert (await look(landing, target, action=action)).handed_over == 2
    assert landing.keys("in/") == ["in/a"]
    assert (await look(landing, target, action=action)).handed_over == 1
    assert sorted(payload["size"] for payload in target.payloads()) == [3, 3, 4]


async def test_what_cannot_be_moved_is_said(landing: Landing, target: Target) -> None:
    """A look whose objects can't be moved fails, and the next one starts no second run."""
    landing.put("in/a")
    policy = {
        "Statement": [{"Effect": "Deny", "Principal": "*", "Action": "s3:DeleteObject", "Resource": "*"}]
    }
    landing.s3.put_bucket_policy(Bucket=landing.name, Policy=json.dumps({"Version": "2012-10-17", **policy}))
    for _ in range(2):
        with pytest.raises(arrivals.S3Error, match="in/a"):
            await look(landing, target, action="move")
    assert len(target.runs()) == 1


async def test_spoiled_memory_is_said(landing: Landing, target: Target) -> None:
    """Where what was handed over can't be read any more, nothing is handed over anew."""
    landing.put("in/a")
    await look(landing, target)
    key = memory_name("s3-arrivals", f"{landing.name}/in/", "script")
    (artifact,) = target.client.read_artifacts(
        artifact_filter=ArtifactFilter(key=ArtifactFilterKey(any_=[key]))
    )
    assert "1 objects that are there were handed over" in str(artifact.data)
    target.client.request(
        "PATCH", "/artifacts/{id}", path_params={"id": artifact.id}, json={"data": "spoiled"}
    )
    with pytest.raises(MemoryUnreadable, match=key):
        await look(landing, target)
    assert len(target.runs()) == 1


async def test_no_trigger_is_said(landing: Landing, caplog: pytest.LogCaptureFixture) -> None:
    """Objects that start nothing are events all the same, and the log says that no run was started."""
    landing.put("in/a")
    with caplog.at_level(logging.WARNING):
        await look_at_prefix(S3Prefix(bucket=landing.block(), prefix="in/"), [])
    assert "No run was started" in caplog.text


@pytest.mark.no_server
@pytest.mark.parametrize(
    ("what", "said"),
    [
        ({"action": "move", "move_to": "in/"}, "a prefix that is not looked at"),
        ({"action": "move", "move_to": "%Y/"}, "a prefix that is not looked at"),
        ({"action": "archive"}, "none"),
        ({"at_most": 0}, "at_most"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_wrong_settings_are_refused(what: dict[str, Any], said: str) -> None:
    """What can't work is said before anything is looked at."""
    with pytest.raises(ValidationError, match=said):
        S3Prefix(bucket="landing", prefix="in/orders/", **what)


def test_flow_says_what_it_found(landing: Landing, target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    """The deployment's flow reads the triggers of the files, and its state says what came of the look."""
    trigger: tuple[OnceTrigger, ...] = (target.trigger(CREATED),)
    monkeypatch.setattr(looking, "triggers_here", lambda files: trigger if files == ["here"] else ())
    landing.put("in/a")
    landing.block().save(landing.name)
    what = S3Prefix(bucket=landing.name, prefix="in/")
    states = [s3_arrivals(what, ["here"], return_state=True) for _ in range(2)]
    assert [state.name for state in states] == ["HandedOver", "NothingNew"]
    assert states[0].message == "1 objects handed over in 1 events, 1 runs"
    assert len(target.runs()) == 1


@pytest.mark.no_server
@pytest.mark.parametrize(
    ("prefix", "started"),
    [
        ("", "elt-chain/flights"),
        ("dev.", "elt-chain/dev.flights"),
        ("my-branch.", "elt-chain/my-branch.flights"),
        ("dev-", "elt-chain/dev-flights"),
    ],
)
def test_environments_are_apart(prefix: str, started: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A look of an environment starts the deployments of that environment, however its prefix ends."""
    for name, value in Environment(name="here", prefix=prefix).variables.items():
        monkeypatch.setenv(name, value)  # as `make deploy` has it in every run of the environment
    found = triggers_here(["deployments/prefect.yaml"])
    assert [one.deployment for one in found if "files have landed" in one.name] == [started]


async def test_example_is_what_is_sent(landing: Landing, target: Target) -> None:
    """The example event, by which the templates of triggers are tried, has the fields of a real one."""
    landing.put("in/a")
    await look(landing, target, action="move", together=True)
    (sent,) = target.payloads()
    example = json.loads((REPOSITORY / f"deployments/examples/{CREATED_TOGETHER}.json").read_text())[
        "payload"
    ]
    assert sent.keys() == example.keys()
    assert sent["objects"][0].keys() == example["objects"][0].keys()
    assert sent["objects"][0]["moved_to"].keys() == example["objects"][0]["moved_to"].keys()


def test_wrong_file_of_triggers_is_said_first(landing: Landing) -> None:
    """Without triggers that can be read, nothing is looked at."""
    with pytest.raises(TriggersWrong, match=r"nowhere\.yaml"):
        s3_arrivals(S3Prefix(bucket=landing.block()), ["nowhere.yaml"])


_SENSOR = """
import asyncio, sys
from tasks.events import OnceTrigger
from tasks.looking.arrivals import S3Prefix, look_at_prefix
bucket, trigger = sys.argv[1:]
what = S3Prefix(bucket=bucket, prefix="in/", action="move")
asyncio.run(look_at_prefix(what, [OnceTrigger.model_validate_json(trigger)]))
"""


@pytest.mark.timeout(600)
def test_killed_in_the_middle(landing: Landing, target: Target, child: Callable[..., Child]) -> None:
    """A thousand files in one look, killed while it moves them: then one run each, all moved."""
    landing.put(*(f"in/{n:04}.csv" for n in range(FILES)))
    landing.block().save(landing.name)
    sensor = child("-c", _SENSOR, landing.name, target.trigger(CREATED).model_dump_json())
    sensor.until("it is in the middle", lambda: len(landing.keys("handled/")) > FILES // 10, 150)
    sensor.kill()
    begun, moved = len(target.runs()), len(landing.keys("handled/"))
    assert 0 < moved <= begun < FILES
    asyncio.run(look(landing, target, action="move"))
    payloads = target.payloads()
    assert keys_of(payloads) == [f"in/{n:04}.csv" for n in range(FILES)]
    assert landing.keys("in/") == []
    assert sorted(landing.keys()) == sorted(payload["moved_to"]["key"] for payload in payloads)
