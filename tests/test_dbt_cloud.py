"""dbt Cloud's runs through the engine: found by their cause, late to show, watched together, cancelled."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import pytest
from prefect_dbt.cloud import DbtCloudCredentials
from pydantic import SecretStr, TypeAdapter, ValidationError

from blocks.dbtcloud import api_of, base_url_of
from blocks.dbtcloud_model import Run, RunStep
from blocks.http import AuthError, BadReply, NotFoundError, RateLimited, VendorError, VendorUnavailable
from sandbox import Sandbox, catalog
from sandbox.dbt_cloud_replies import run_reply
from tasks.dbt_cloud import DbtCloud, Overrides
from tasks.dbt_cloud_runs import DbtCloudVendor, RunRequest, cause_with, status_of
from tasks.jobs import (
    Intent,
    JobCancelled,
    JobFailed,
    JobHandle,
    JobPolicy,
    JobState,
    JobTimeout,
    MemoryJournal,
    wait_for_job,
)
from tests.dbt_cloud_fixtures import PREFECTS_SOCKETS, Desk, cloud, collected, credentials_of
from tests.jobs_fixtures import until

__all__ = ["cloud", "collected"]

pytestmark = [*PREFECTS_SOCKETS, pytest.mark.no_server]


# -- states


@pytest.mark.parametrize(
    ("outcome", "state", "error"),
    [
        ("succeed", JobState.SUCCEEDED, None),
        ("warn", JobState.SUCCEEDED, None),
        ("fail", JobState.FAILED, JobFailed),
        ("fail_setup", JobState.FAILED, JobFailed),
        ("cancel", JobState.CANCELLED, JobCancelled),
    ],
)
async def test_states(cloud: Desk, outcome: str, state: JobState, error: type[Exception] | None) -> None:
    """Each end has its class; a run with warnings is a success, and a cancelled one is none."""
    cloud.behave(outcome=outcome)
    if error is None:
        result = await cloud.run()
    else:
        with pytest.raises(error) as caught:
            await cloud.run()
        result = caught.value.result  # type: ignore[attr-defined]
        assert result.message
    assert (result.state, [result.job_id]) == (state, cloud.ids)
    assert result.url == f"{cloud.box.url}/deploy/2013/projects/3001/runs/{result.job_id}/"
    assert result.duration is not None


def test_statuses_are_numbers() -> None:
    """The number of the status counts, not its word, which has changed (kestra plugin-dbt 271, 275)."""

    def seen(status: int, **more: Any) -> tuple[JobState, bool]:
        found = status_of(Run.model_validate({"id": 1, "status": status, **more}))
        return found.state, found.known

    assert seen(20, status_humanized="Success") == (JobState.FAILED, True)
    assert [seen(number)[0].terminal for number in (1, 2, 3, 10, 20, 30)] == [False] * 3 + [True] * 3
    assert seen(7) == (JobState.RUNNING, False)
    assert seen(7, is_complete=True) == (JobState.FAILED, True)
    assert seen(7, is_complete=True, is_success=True)[0] is JobState.SUCCEEDED
    assert seen(7, is_complete=True, is_cancelled=True)[0] is JobState.CANCELLED


@pytest.mark.parametrize("name", ["job_run_started", "job_run_completed", "job_run_errored"])
def test_status_codes_of_the_published_events(name: str) -> None:
    """The codes in dbt Cloud's own example events are the states that they tell of."""
    specs = os.environ.get("ELT_SPECS")
    if not specs:
        pytest.skip("ELT_SPECS is not set: the vendors' example payloads are not here")
    data = json.loads(Path(specs, "payloads", f"dbt_webhook_{name}.json").read_text())["data"]
    expected = {"started": JobState.RUNNING, "completed": JobState.SUCCEEDED, "errored": JobState.FAILED}
    # Ids are text there and numbers in the API.
    run = Run.model_validate({"id": data["runId"], "status": data["runStatusCode"]})
    assert (status_of(run).state, run.id) == (expected[name.rsplit("_", 1)[1]], 12345)


async def test_an_unknown_number(cloud: Desk, caplog: pytest.LogCaptureFixture) -> None:
    """A number that is in no contract is waited through, and said once."""
    cloud.behave(outcome="unknown_word", word="7")
    with caplog.at_level(logging.WARNING, "elt.jobs"):
        waiting = asyncio.create_task(cloud.run())
        await until(lambda: "not in its contract" in caplog.text)
        looks = cloud.gets(r"/runs/\d+/$")
        await until(lambda: cloud.gets(r"/runs/\d+/$") > looks + 2)
        cloud.box.dbt_cloud.finish_run(int(cloud.ids[0]), 10)
        assert (await waiting).state is JobState.SUCCEEDED
    assert caplog.text.count("not in its contract") == 1


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("00:09:41", 581.0),
        ("26:00:01", 93601.0),
        ("1 day, 2:00:01", 93601.0),
        ("00:00:01.5", 1.5),
        ("", None),
    ],
)
def test_durations_are_clocks(text: str, seconds: float | None) -> None:
    """ "HH:MM:SS" is read, beyond a day too; what is not a clock is no duration."""
    assert Run.model_validate({"id": 1, "status": 10, "duration": text}).seconds == seconds
    assert Run.model_validate({"id": 1, "status": 10, "duration": None}).seconds is None


def test_moments_with_a_blank_and_without_a_zone() -> None:
    """Moments come with a blank in the middle; one without a zone is UTC."""
    for text in (
        "2026-03-02 06:14:44.123456+00:00",
        "2026-03-02T06:14:44.123456Z",
        "2026-03-02 06:14:44.123456",
    ):
        run = Run.model_validate({"id": 1, "status": 3, "created_at": text})
        assert run.created_at == datetime(2026, 3, 2, 6, 14, 44, 123456, UTC)


# -- starting


async def test_what_is_sent(cloud: Desk) -> None:
    """Only overrides that are given are sent: dbt Cloud refuses null. The path ends in a slash."""
    await cloud.run(Overrides(git_branch="release", threads_override=8, generate_docs_override=False))
    (entry,) = cloud.box.requests.find(vendor="dbt_cloud", method="POST")
    assert entry.path == "/api/v2/accounts/2013/jobs/302/run/"
    assert sorted(entry.body) == ["cause", "generate_docs_override", "git_branch", "threads_override"]
    assert re.fullmatch(r"the tests \[elt:dbt-cloud:run:302:1:[0-9a-f]{8}\]", entry.body["cause"])


@pytest.mark.parametrize("length", [0, 10, 250, 5000])
def test_a_long_cause_keeps_its_marker(length: int) -> None:
    """A cause is 255 characters at most, and what is cut off is never the marker."""
    cause = cause_with("é" * length, "elt:dbt-cloud:run:302:1:0a1b2c3d")
    assert len(cause) <= 255
    assert cause.endswith("[elt:dbt-cloud:run:302:1:0a1b2c3d]")
    assert ("…" in cause) == (length > 220)


async def test_a_lost_reply(cloud: Desk) -> None:
    """A trigger whose reply was lost is found by the marker in its cause, not sent again: there is no key."""
    cloud.fault(kind="drop_after", method="POST", path="/run/$", times=1)
    cloud.behave(visibility_delay=0.2)
    result = await cloud.run()
    assert ([result.job_id], cloud.posts()) == (cloud.ids, 1)
    (listed, *_) = cloud.box.requests.find(vendor="dbt_cloud", method="GET", path="/runs/$")
    query = parse_qs(listed.query)
    assert (query["order_by"], query["include_related"]) == (["-id"], ["trigger"])


async def test_somebody_elses_run_is_not_ours(cloud: Desk) -> None:
    """A run that somebody else starts while our reply is lost is not taken for ours."""
    cloud.fault(kind="drop", method="POST", path="/run/$", times=1)
    cloud.box.dbt_cloud.trigger(cloud.job, "by hand [elt:dbt-cloud:run:302:1:ffffffff]")
    result = await cloud.run()
    assert cloud.posts() == 2
    assert cloud.ids[1:] == [result.job_id]


async def test_a_retry_attaches(cloud: Desk) -> None:
    """After an outage the next attempt attaches to the run of the first (airflow 51801)."""
    cloud.behave(outcome="stuck")
    first = asyncio.create_task(cloud.run(outage=0.2))
    await until(lambda: cloud.gets(r"/runs/\d+/$") > 0)
    cloud.box.pause()
    with pytest.raises(VendorUnavailable, match="was not touched"):
        await first
    cloud.box.resume()
    cloud.box.dbt_cloud.finish_run(int(cloud.ids[0]), 10)
    result = await cloud.run()
    assert ([result.job_id], cloud.posts()) == (cloud.ids, 1)


async def test_a_crash_before_the_id_was_written(cloud: Desk) -> None:
    """An attempt that died between its trigger and writing the id down is found by the next."""
    first = asyncio.create_task(cloud.run())
    await until(lambda: cloud.posts() == 1)
    (entry,) = cloud.journal.entries.values()
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    cloud.journal.entries[entry.key] = entry.model_copy(update={"handle": None, "result": None})
    cloud.box.dbt_cloud.runs_of(cloud.job)
    with pytest.raises(JobCancelled):
        await cloud.run()
    assert cloud.posts() == 1


async def test_bad_minutes_are_borne(cloud: Desk, caplog: pytest.LogCaptureFixture) -> None:
    """503, HTML, nothing and half a reply while polling do not fail the wait (kestra plugin-dbt 294)."""
    cloud.behave(duration=1.2)
    for fault in ({"kind": "status"}, {"kind": "html"}, {"kind": "empty"}, {"kind": "truncated_json"}):
        cloud.fault(method="GET", path=r"/runs/\d+/$", times=1, **fault)
    assert (await cloud.run()).state is JobState.SUCCEEDED
    assert cloud.posts() == 1


async def test_ours_queues_behind_another(cloud: Desk) -> None:
    """Runs of one job queue behind each other: ours comes after the one that runs, and is waited for."""
    other = cloud.box.dbt_cloud.trigger(cloud.job)
    result = await cloud.run()
    assert cloud.ids == [str(other.run_id), result.job_id]
    assert cloud.runs[1].created < (other.ended or 0) <= (cloud.runs[1].ended or 0)


@pytest.mark.parametrize("on_active", ["adopt", "fail"])
async def test_another_run_is_active(cloud: Desk, on_active: Any) -> None:
    """Where the policy says so, an active run is looked for first, and taken over or a failure."""
    cloud.behave(outcome="stuck")
    other = cloud.box.dbt_cloud.trigger(cloud.job, "by hand")
    if on_active == "adopt":
        waiting = asyncio.create_task(cloud.run(on_active=on_active))
        await until(lambda: any(entry.handle for entry in cloud.journal.entries.values()))
        cloud.box.dbt_cloud.finish_run(other.run_id, 10)
        assert (await waiting).job_id == str(other.run_id)
    else:
        with pytest.raises(JobFailed, match="running already"):
            await cloud.run(on_active=on_active)
    assert cloud.posts() == 0


# -- not visible yet


async def test_404_right_after_the_trigger(cloud: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is answered with 404 at first is waited for (prefect-dbt 145)."""
    monkeypatch.setattr(DbtCloudVendor, "grace", 30.0)
    cloud.behave(visibility_delay=1.5)
    assert (await cloud.run()).job_id in cloud.ids
    assert 404 in {entry.status for entry in cloud.box.requests.find(vendor="dbt_cloud", method="GET")}


async def test_404_of_an_old_run(cloud: Desk) -> None:
    """A run that is not known after the time of grace is an error at once."""
    handle = JobHandle(
        vendor="dbt-cloud",
        resource_id="302",
        job_id="999",
        started_at=datetime.now(UTC) - timedelta(hours=1),
    )
    seen = await cloud.vendor.observe([handle])
    assert isinstance(seen["999"], NotFoundError)
    assert "No Run matches" in str(seen["999"])


# -- cancelling


async def test_cancel(cloud: Desk) -> None:
    """Cancelled in mid-run, the run is cancelled at dbt Cloud, and its end is seen."""
    cloud.behave(outcome="stuck", cancel_seconds=0.3)
    waiting = asyncio.create_task(cloud.run())
    await until(lambda: cloud.gets(r"/runs/\d+/$") > 0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert [run.status for run in cloud.runs] == [30]
    (entry,) = cloud.journal.entries.values()
    assert entry.result is not None
    assert "it was cancelled" in str(entry.result.message)


async def test_a_timeout_cancels(cloud: Desk) -> None:
    """At the timeout the run does not go on (airflow 61467), and the error names it."""
    cloud.behave(outcome="stuck")
    with pytest.raises(JobTimeout, match=r"did not end in 0\.5 s; it was cancelled"):
        await cloud.run(timeout=0.5)
    assert [run.status for run in cloud.runs] == [30]


async def test_our_timeout_is_honoured_whatever_dbt_clouds(cloud: Desk) -> None:
    """An override of dbt Cloud's own timeout does not lengthen ours (prefect 20577)."""
    cloud.behave(outcome="stuck")
    with pytest.raises(JobTimeout):
        await cloud.run(Overrides(timeout_seconds_override=3600), timeout=0.4)
    assert cloud.runs[0].overrides == {"timeout_seconds_override": 3600}


@pytest.mark.parametrize("answer", ["unchanged", "refused"])
async def test_cancel_after_the_end(cloud: Desk, answer: Any) -> None:
    """Cancelling a run that has ended is no error, whichever way dbt Cloud answers it."""
    cloud.box.dbt_cloud.settings.cancel_finished = answer
    result = await cloud.run()
    handle = JobHandle(
        vendor="dbt-cloud", resource_id="302", job_id=str(result.job_id), started_at=datetime.now(UTC)
    )
    assert await cloud.vendor.cancel(handle) is JobState.SUCCEEDED


async def test_cancel_before_it_is_visible(cloud: Desk) -> None:
    """A run that is not visible yet is cancelled as soon as it is."""
    cloud.behave(outcome="stuck", visibility_delay=0.3)
    waiting = asyncio.create_task(cloud.run())
    await until(
        lambda: bool(cloud.journal.entries) and bool(next(iter(cloud.journal.entries.values())).handle)
    )
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    assert [run.status for run in cloud.runs] == [30]


# -- many runs


def handles(cloud: Desk, count: int) -> list[JobHandle]:
    found = []
    for job in cloud.box.dbt_cloud.add_jobs(count, duration=30.0):
        run = cloud.box.dbt_cloud.trigger(job)
        handle = JobHandle(
            vendor="dbt-cloud",
            resource_id=str(job),
            job_id=str(run.run_id),
            started_at=datetime.now(UTC) - timedelta(hours=1),
        )
        found.append(handle)
    return found


@pytest.mark.parametrize("pk_in", ["understood", "refused", "ignored"])
async def test_a_hundred_runs_a_request(cloud: Desk, pk_in: Any) -> None:
    """250 runs are watched with three requests, whatever becomes of the filter that is not documented."""
    cloud.box.dbt_cloud.settings.pk_in = pk_in
    watched = handles(cloud, 250)
    async with cloud.vendor.session():
        first = await cloud.vendor.observe(watched)
        before = cloud.gets()
        seen = await cloud.vendor.observe(watched)
        assert cloud.gets() - before == 3
    assert len(first) == len(seen) == 250
    assert not any(isinstance(one, Exception) or one.state.terminal for one in seen.values())
    queries = [parse_qs(entry.query) for entry in cloud.box.requests.find(vendor="dbt_cloud", path="/runs/$")]
    by_ids = [query["pk__in"][0] for query in queries if "pk__in" in query]
    assert all(re.fullmatch(r"\[\d+(,\d+)*\]", text) for text in by_ids)  # airflow 40047: brackets, or 400
    assert len(by_ids) == (6 if pk_in == "understood" else 1)


@pytest.mark.parametrize("pk_in", ["understood", "refused"])
async def test_one_odd_run_hides_no_other(cloud: Desk, monkeypatch: pytest.MonkeyPatch, pk_in: Any) -> None:
    """A run that can't be read is an error of its own, and the others of its page are seen."""
    cloud.box.dbt_cloud.settings.pk_in = pk_in
    watched = handles(cloud, 5)
    odd = watched[2].job_id

    def reply(run: Any, *given: Any, **more: Any) -> dict[str, Any]:
        told = run_reply(run, *given, **more)
        return told | {"status": "who knows"} if str(run.run_id) == odd else told

    monkeypatch.setattr("sandbox.dbt_cloud_api.run_reply", reply)
    seen = await cloud.vendor.observe(watched)
    assert isinstance(seen[odd], BadReply)
    others = [seen[handle.job_id] for handle in watched if handle.job_id != odd]
    assert not any(isinstance(one, Exception) for one in others)
    # A job whose item is never readable ends with that error when the budget is spent, and not before.
    watched[2] = watched[2].model_copy(update={"started_at": datetime.now(UTC)})
    request = RunRequest(watched[2].resource_id, "nightly")
    with pytest.raises(BadReply, match=r"not what the API promises.*was not touched"):
        await wait_for_job(cloud.vendor, request, watched[2], JobPolicy(poll=0.05, outage=0.2, timeout=60))


@pytest.mark.parametrize(
    "said",
    [{"schema_override": ""}, {"git_branch": ""}, {"steps_override": []}, {"threads_override": 0}],
)
def test_overrides_that_are_none(said: dict[str, Any]) -> None:
    """dbt Cloud writes what was not overridden in several ways; none of them makes a run unreadable."""
    trigger = {"cause": "why", "generate_docs_override": False, "target_name_override": None, **said}
    run = Run.model_validate({"id": 1, "status": 10, "trigger": trigger})
    assert run.trigger
    assert (run.trigger.cause, run.trigger.overridden) == ("why", {"generate_docs_override": False})


async def test_runs_far_apart_without_the_filter(cloud: Desk) -> None:
    """Without the filter, runs that hundreds of others lie between are found all the same."""
    cloud.box.dbt_cloud.settings.pk_in = "refused"
    some = handles(cloud, 450)
    watched = [*some[:2], *some[-2:]]
    seen = await cloud.vendor.observe(watched)
    assert set(seen) == {handle.job_id for handle in watched}
    assert cloud.gets() <= 8


async def test_many_of_which_some_are_not_visible(cloud: Desk) -> None:
    """A fresh run that no list shows is not asked for on its own; the watcher waits for it."""
    watched = handles(cloud, 4)
    cloud.box.dbt_cloud.set(watched[0].resource_id, visibility_delay=60)
    late = cloud.box.dbt_cloud.trigger(watched[0].resource_id)
    fresh = watched[0].model_copy(update={"job_id": str(late.run_id), "started_at": datetime.now(UTC)})
    async with cloud.vendor.session():
        seen = await cloud.vendor.observe([*watched, fresh])
    assert set(seen) == {handle.job_id for handle in watched}
    assert cloud.gets() == 1


# -- addresses, keys, replies


async def test_wrong_key(cloud: Desk) -> None:
    """A wrong key is said once, with dbt Cloud's words and without the key."""
    cloud.vendor = DbtCloudVendor(credentials_of(cloud.box, api_key=SecretStr("dbtc_wrong-key")))
    with pytest.raises(AuthError, match=r"401: Invalid token.*Check the credentials") as caught:
        await cloud.run()
    assert "dbtc_wrong" not in str(caught.value)
    assert cloud.posts() == 1


async def test_wrong_account(cloud: Desk) -> None:
    """A wrong account is not waited for."""
    cloud.vendor = DbtCloudVendor(credentials_of(cloud.box, account_id=1))
    with pytest.raises(AuthError, match="permission"):
        await cloud.run()


async def test_masked_key(cloud: Desk) -> None:
    """A key that Prefect has masked says to save the block."""
    vendor = DbtCloudVendor(credentials_of(cloud.box, api_key=SecretStr("********")))
    with pytest.raises(AuthError, match="save the block"):
        async with vendor.session():
            pass


@pytest.mark.parametrize(
    ("domain", "base"),
    [
        ("cloud.getdbt.com", "https://cloud.getdbt.com"),
        ("ab123.us1.dbt.com/", "https://ab123.us1.dbt.com"),
        ("https://emea.dbt.com", "https://emea.dbt.com"),
        ("http://127.0.0.1:8010", "http://127.0.0.1:8010"),
    ],
)
def test_domains(domain: str, base: str) -> None:
    """A bare domain means https; a whole address is taken as it is."""
    block = DbtCloudCredentials(api_key=SecretStr("k"), account_id=1, domain=domain)
    assert base_url_of(block) == base


def test_a_bad_domain_is_one_sentence() -> None:
    """What can be no domain is said with the field's name."""
    block = DbtCloudCredentials(api_key=SecretStr("k"), account_id=1, domain="cloud getdbt com")
    with pytest.raises(VendorError, match=r"holds a blank.*Check `domain`"):
        base_url_of(block)


async def test_an_error_in_the_envelope(cloud: Desk) -> None:
    """An error that comes with status 200 is one all the same, in dbt Cloud's words."""
    body = {
        "status": {
            "code": 400,
            "is_success": False,
            "user_message": "No such branch",
            "developer_message": "x/y",
        },
        "data": None,
    }
    cloud.fault(kind="status", status=200, body=body, method="POST", path="/run/$")
    with pytest.raises(VendorError, match="No such branch x/y") as caught:
        await cloud.run()
    assert (caught.value.sent, cloud.posts()) == (False, 1)


async def test_a_bad_override_in_dbt_clouds_words(cloud: Desk) -> None:
    """400 for an override carries both of dbt Cloud's messages."""
    body = {
        "status": {
            "code": 400,
            "is_success": False,
            "user_message": "Invalid.",
            "developer_message": "git_sha",
        }
    }
    cloud.fault(kind="status", status=400, body=body, method="POST")
    with pytest.raises(VendorError, match=r"answered 400: Invalid\. git_sha"):
        await cloud.run()


@pytest.mark.parametrize(("seconds", "waits"), [(None, 30.0), ("2", 2.0), ("3600", 120.0)])
async def test_429(cloud: Desk, seconds: str | None, waits: float) -> None:
    """Too many requests: `Retry-After` is honoured where there is one, up to a cap."""
    headers = {"Retry-After": seconds} if seconds else {}
    cloud.fault(kind="status", status=429, headers=headers, body={"status": {"user_message": "slow down"}})
    async with api_of(cloud.credentials) as api:
        with pytest.raises(RateLimited) as caught:
            await api.run("1", retry=False)
    assert caught.value.pause == waits


async def test_a_missing_slash_is_said(cloud: Desk) -> None:
    """Where a server redirects instead of answering, the address is blamed and nothing is repeated."""
    async with api_of(cloud.credentials) as api:
        with pytest.raises(BadReply, match="redirects elsewhere"):
            await api.get("/runs", TypeAdapter(dict), retry=False)
        with pytest.raises(NotFoundError):
            await api.get("//runs/", TypeAdapter(dict), retry=False)


async def test_null_data(cloud: Desk) -> None:
    """A reply without data is borne as a bad reply while polling."""
    cloud.behave(duration=0.6)
    cloud.fault(kind="null_fields", fields=["data"], method="GET", times=2)
    assert (await cloud.run()).state is JobState.SUCCEEDED


def test_commands_are_read_from_step_names() -> None:
    """Which step ran which command is in its name: the number of dbt Cloud's own steps varies."""
    names = {
        "Invoke dbt with `dbt build --select tag:daily`": "dbt build --select tag:daily",
        "Invoke dbt with ` dbt deps `": "dbt deps",
        "Clone git repository": None,
        "Create profile from connection `Snowflake`": None,
    }
    for name, command in names.items():
        assert RunStep(index=1, name=name).command == command


# -- parameters


def test_parameters_in_a_deployment() -> None:
    """As JSON: the block by name, ids as numbers or text; read back it is the same."""
    dbt = DbtCloud.model_validate(
        {"tool": "dbt-cloud", "credentials": "dbt-cloud", "job_id": 302, "overrides": {"git_branch": "main"}}
    )
    assert (dbt.resource_id, dbt.label, dbt.what) == ("302", "302", "dbt Cloud job 302")
    assert DbtCloud.model_validate(dbt.model_dump(mode="json")) == dbt
    schema = json.dumps(DbtCloud.model_json_schema())
    assert "Name of a saved dbt Cloud Credentials block" in schema
    assert "api_key" not in schema


def test_a_block_is_stored_without_its_key(sandbox: Sandbox) -> None:
    """An unsaved block in parameters is stored without its key, and read back says so."""
    dbt = DbtCloud(credentials=credentials_of(sandbox), job_id="302")
    stored = dbt.model_dump(mode="json")
    assert catalog.DBT_CLOUD_TOKEN not in json.dumps(stored) + repr(dbt)
    assert set(DbtCloud.model_validate(stored).credentials.api_key.get_secret_value()) == {"*"}  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"credentials": 7}, "dbt Cloud Credentials block of prefect-dbt"),
        ({"credentials": {"api_key": "sesame-7", "account_id": "abc"}}, "account_id: Input should be"),
        ({"job_id": "nightly"}, "should match pattern"),
        ({"retry_from_failure": True, "overrides": {"git_branch": "x"}}, "ignores overrides in a retry"),
        ({"policy": {"on_active": "skip"}}, "would use old models"),
        ({"policy": {"min_rows": 1}}, "counts no rows"),
        ({"overrides": {"steps_override": []}}, "at least 1"),
        ({"overrides": {"branch": "x"}}, "Extra inputs are not permitted"),
    ],
)
def test_bad_parameters(fields: dict[str, Any], sentence: str) -> None:
    """What can't be run is refused before anything is, in a sentence, without the key."""
    with pytest.raises(ValidationError) as caught:
        DbtCloud.model_validate({"credentials": "dbt-cloud", "job_id": "302", **fields})
    assert sentence in str(caught.value)
    assert "sesame" not in str(caught.value)


async def test_find_needs_the_marker(cloud: Desk) -> None:
    """An intent without a marker, as of an old journal, finds nothing rather than anything."""
    cloud.box.dbt_cloud.trigger(cloud.job, "[]")

    class Request:
        resource_id, operation, name, owner = "302", "run", "x", None

    intent = Intent(since=datetime.now(UTC) - timedelta(hours=1))
    async with cloud.vendor.session():
        assert await cloud.vendor.find(Request(), intent) is None  # type: ignore[arg-type]
    assert isinstance(cloud.journal, MemoryJournal)
