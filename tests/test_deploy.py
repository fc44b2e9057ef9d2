"""`make deploy`: twice is once, what differs is put right, what somebody switched off stays off."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import duckdb
import httpx
import pytest
import yaml
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import DeploymentScheduleCreate
from prefect.client.schemas.objects import StateType
from prefect.client.schemas.responses import DeploymentResponse
from prefect.client.schemas.schedules import CronSchedule
from prefect.exceptions import ObjectNotFound
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect_slack import SlackWebhook

from blocks import AirbyteServer
from deployments import deploy, switches
from deployments.deploy import delete, main
from deployments.entries import read_entries
from deployments.environments import WorkPoolSettings, read_environments
from deployments.plan import marked_deployments
from deployments.work_pools import base_job_template
from tests.deployed import Runs, background
from tests.jobs_fixtures import PREFECTS_SOCKETS, collected

__all__ = ["collected"]

pytestmark = [*PREFECTS_SOCKETS, pytest.mark.timeout(240)]

POOL = "deploying"
DAILY, FRESH = "dbt-build/daily", "dbt-freshness/fresh"
ENVIRONMENTS: dict[str, Any] = {
    "default": "test",
    "environments": {
        "test": {"prefix": "test."},
        "quiet": {
            "prefix": "quiet.",
            "schedules": False,
            "triggers": False,
            "blocks": {"alerts": "others"},
            "without": ["fresh"],
        },
    },
    "branches": {"schedules": False, "triggers": False},
    "work_pools": {POOL: {"type": "process"}},
    "concurrency_limits": {"deploying-airbyte": 3},
}
DBT = {"tool": "dbt-core", "project_dir": "sandbox/dbt"}
TRIGGER = {"name": "when asked", "type": "event", "expect": ["elt.asked"], "parameters": {"retries": 3}}
ENTRIES: list[dict[str, Any]] = [
    {
        "name": "daily",
        "entrypoint": "flows.transform.build_project",
        "description": "Builds it.",
        "tags": ["dbt", "owner:flight-ops"],
        "work_pool": {"name": POOL, "job_variables": {"env": {"REGION": "eu"}}},
        "concurrency_limit": {"limit": 1, "collision_strategy": "CANCEL_NEW", "grace_period_seconds": 120},
        "schedules": [
            {"slug": "at-six", "cron": "0 6 * * *", "timezone": "America/New_York"},
            {"slug": "often", "interval": 7200, "parameters": {"retries": 1}},
        ],
        "triggers": [
            TRIGGER,
            {
                "name": "when both",
                "type": "compound",
                "require": "all",
                "within": 60,
                "triggers": [
                    {"type": "event", "expect": ["elt.b", "elt.a"], "match": {"prefect.resource.id": "a.*"}},
                    {"type": "event", "expect": ["elt.c"]},
                ],
            },
        ],
        "parameters": {
            "dbt": {**DBT, "command": "seed", "select": ["airline_alliances"]},
            "notify": [{"tool": "slack", "webhook": "alerts"}],
        },
    },
    {
        "name": "fresh",
        "entrypoint": "flows.transform.source_freshness",
        "tags": ["dbt"],
        "work_pool": {"name": POOL},
        "parameters": {"dbt": DBT},
    },
]


class Deploying:
    """The command on files of its own, and what the server then has."""

    def __init__(self, folder: Path, client: SyncPrefectClient, capsys: pytest.CaptureFixture[str]) -> None:
        self.client = client
        self._capsys = capsys
        self._file, self._environments = folder / "prefect.yaml", folder / "environments.yaml"
        self.examples = folder / "examples"
        self.examples.mkdir()
        event = {"resource": {"prefect.resource.id": "somebody"}, "payload": {}}
        for name in ("elt.asked", "elt.begged"):
            (self.examples / f"{name}.json").write_text(json.dumps({**event, "event": name}))
        self.environments: dict[str, Any] = yaml.safe_load(yaml.safe_dump(ENVIRONMENTS))
        self.entries: list[dict[str, Any]] = yaml.safe_load(yaml.safe_dump(ENTRIES))

    def __call__(self, *arguments: str, code: int = 0) -> str:
        pull = [{"deployments.steps.change_to_repository": {}}]
        self._file.write_text(yaml.safe_dump({"name": "t", "pull": pull, "deployments": self.entries}))
        self._environments.write_text(yaml.safe_dump(self.environments))
        files = ["--prefect-file", str(self._file), "--environments", str(self._environments)]
        files += ["--examples", str(self.examples)]
        found = main([*files, *arguments])
        said = self._capsys.readouterr().out
        assert found == code, said
        return said

    def there(self, name: str, prefix: str = "test.") -> DeploymentResponse:
        flow, own = name.split("/")
        return self.client.read_deployment_by_name(f"{flow}/{prefix}{own}")

    def automations(self, name: str, prefix: str = "test.") -> dict[str, dict[str, Any]]:
        url = f"{self.client.api_url}automations/related-to/prefect.deployment.{self.there(name, prefix).id}"
        return {one["name"]: one for one in httpx.get(url).raise_for_status().json()}

    def change(self, name: str, **fields: Any) -> None:
        """What somebody changes in the UI."""
        url = f"{self.client.api_url}deployments/{self.there(name).id}"
        httpx.patch(url, json=fields).raise_for_status()

    def switch(self, name: str, slug: str, *, active: bool) -> None:
        deployment = self.there(name)
        (schedule,) = (one for one in deployment.schedules if one.slug == slug)
        url = f"{self.client.api_url}deployments/{deployment.id}/schedules/{schedule.id}"
        httpx.patch(url, json={"active": active}).raise_for_status()

    def switch_trigger(self, name: str, trigger: str, *, enabled: bool) -> None:
        url = f"{self.client.api_url}automations/{self.automations(name)[trigger]['id']}"
        httpx.patch(url, json={"enabled": enabled}).raise_for_status()

    def snapshot(self) -> dict[str, Any]:
        return {
            name: (
                self.there(name).model_dump(exclude={"updated", "status", "last_polled"}),
                self.automations(name),
            )
            for name in (DAILY, FRESH)
        }


@pytest.fixture
def deploying(
    prefect_server: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> Iterator[Deploying]:
    """On a server that has none of it, and shall have none of it afterwards."""
    SlackWebhook(url="https://hooks.slack.test/x").save("alerts", overwrite=True)
    with get_client(sync_client=True) as client:
        made = Deploying(tmp_path, client, capsys)
        yield made
        file = tmp_path / "environments.yaml"
        environments = read_environments(file)
        heres = [environments.named(name) for name in environments.environments]
        _delete(*heres, environments.of_branch("my-feature"))
        SlackWebhook.delete("alerts")


def _delete(*environments: Any) -> None:
    async def all_of_them() -> None:
        async with get_client() as client:
            for environment in environments:
                await delete(client, await marked_deployments(client, environment))

    asyncio.run(all_of_them())


# -- twice ---------------------------------------------------------------------------------------------------


def test_everything_of_the_repository_twice(prefect_server: str, capsys: pytest.CaptureFixture[str]) -> None:
    """All of this repository's deployments on a server: the second time says that there is nothing to do."""
    prod = read_environments().named()
    entries = [entry.within(prod) for entry in read_entries()]
    with get_client(sync_client=True) as client:
        for entry in entries:  # another test may have deployed some of them
            try:
                client.delete_deployment(client.read_deployment_by_name(entry.full_name).id)
            except ObjectNotFound:
                continue
        try:
            assert main([]) == 0
            first = capsys.readouterr().out
            assert f"✓ {len(entries)} deployed, 0 as they were" in first
            assert "! the block airbyte-server/airbyte is not saved: flights, by-hand" in first
            before = {name: client.read_deployment_by_name(name) for name in (e.full_name for e in entries)}
            assert main([]) == 0
            again = capsys.readouterr().out
            assert f"✓ nothing to do: {len(entries)} deployments are as in the files" in again
            after = {name: client.read_deployment_by_name(name) for name in before}
            assert [one.updated for one in after.values()] == [one.updated for one in before.values()]
            assert main(["--check"]) == 0
        finally:
            _delete(prod)


def test_nothing_is_touched_the_second_time(deploying: Deploying) -> None:
    """Schedules, limits, compound triggers, job variables: the server's reading of them is no difference."""
    first = deploying()
    assert f"+ work pool {POOL}" in first
    assert "+ concurrency limit deploying-airbyte: 3" in first
    assert "+ dbt-build/test.daily" in first
    before = deploying.snapshot()
    daily = before[DAILY][0]
    assert daily["tags"] == ["dbt", "owner:flight-ops", "env:test"]
    assert {one["slug"]: one["active"] for one in daily["schedules"]} == {"at-six": True, "often": True}
    assert all(one["enabled"] for one in before[DAILY][1].values())
    assert len(before[DAILY][1]) == 2
    assert "✓ nothing to do: 2 deployments" in deploying()
    assert deploying.snapshot() == before


def test_a_date_in_the_file(deploying: Deploying) -> None:
    """YAML reads it as one, and the server has it as text: no difference, wherever it stands."""
    one_day = {"start": datetime(2026, 3, 1, tzinfo=UTC), "end": datetime(2026, 3, 2, tzinfo=UTC)}
    daily = deploying.entries[0]
    daily["parameters"]["data_interval"] = one_day
    daily["schedules"][1]["parameters"]["data_interval"] = one_day
    daily["triggers"][0]["parameters"]["data_interval"] = one_day
    daily["work_pool"]["job_variables"]["env"]["SINCE"] = one_day["start"].date()
    deploying()
    assert deploying.there(DAILY).parameters["data_interval"]["end"] == "2026-03-02T00:00:00Z"
    assert "✓ nothing to do: 2 deployments" in deploying()


def test_from_a_git_hosts_ci(deploying: Deploying, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefect would take the commit for the version: the next commit then changes no deployment."""
    commit = {
        "GITHUB_REF_NAME": "main",
        "GITHUB_REPOSITORY": "us/elt",
        "GITHUB_SERVER_URL": "https://git.test",
    }
    for name, value in {**commit, "GITHUB_SHA": "a" * 40}.items():
        monkeypatch.setenv(name, value)
    deploying()
    monkeypatch.setenv("GITHUB_SHA", "b" * 40)
    assert "nothing to do" in deploying()
    assert deploying.there(DAILY).version != "a" * 8


# -- what differs --------------------------------------------------------------------------------------------


def test_what_was_changed_by_hand(deploying: Deploying) -> None:
    """A change in the UI is seen, named without its value, and put right; the other deployment is left."""
    deploying()
    before = deploying.snapshot()
    deploying.change(
        DAILY,
        description="Something else.",
        tags=["dbt", "env:test"],
        parameters={"dbt": DBT},
        job_variables={},
        entrypoint="flows.elt.elt_chain",
        pull_steps=[],
        concurrency_limit=5,
        enforce_parameter_schema=False,
    )
    said = deploying()
    differs = "description, tags, entrypoint, job variables, parameters, enforcing the schema"
    assert f"~ dbt-build/test.daily: {differs}, concurrency limit, pull steps\n" in said
    assert "✓ 1 deployed, 1 as they were" in said
    assert "nothing to do" in deploying()
    now = deploying.there(DAILY).model_dump()
    for name, value in before[DAILY][0].items():
        if name not in ("version_id", "updated_by", "schedules", "global_concurrency_limit"):
            assert now[name] == value, name
    assert now["global_concurrency_limit"]["limit"] == 1


def test_what_was_changed_in_the_file(deploying: Deploying) -> None:
    """Schedules and triggers that are changed, added and taken out: the server then has those of the file."""
    deploying()
    daily = deploying.entries[0]
    daily["schedules"] = [{"slug": "at-seven", "cron": "0 7 * * *", "timezone": "Etc/UTC"}]
    daily["triggers"] = [{**TRIGGER, "expect": ["elt.asked", "elt.begged"], "parameters": {}}]
    assert "~ dbt-build/test.daily: schedules, triggers" in deploying()
    assert [one.slug for one in deploying.there(DAILY).schedules] == ["at-seven"]
    (trigger,) = deploying.automations(DAILY).values()
    assert sorted(trigger["trigger"]["expect"]) == ["elt.asked", "elt.begged"]
    daily["schedules"] = daily["triggers"] = []
    assert "~ dbt-build/test.daily: schedules, triggers" in deploying()
    assert (deploying.there(DAILY).schedules, deploying.automations(DAILY)) == ([], {})
    assert "nothing to do" in deploying()


def test_a_schedule_made_by_hand_is_in_no_file(deploying: Deploying) -> None:
    """The file is the truth: what somebody has added to a deployment is taken away, and said."""
    deploying()
    made = DeploymentScheduleCreate(schedule=CronSchedule(cron="0 1 * * *"), active=True)
    url = f"{deploying.client.api_url}deployments/{deploying.there(FRESH).id}/schedules"
    httpx.post(url, json=[made.model_dump(mode="json", exclude_unset=True)]).raise_for_status()
    assert "~ dbt-freshness/test.fresh: schedules" in deploying()
    assert deploying.there(FRESH).schedules == []
    assert "nothing to do" in deploying()


def test_an_automation_of_somebody_else_is_left(deploying: Deploying) -> None:
    """An automation that somebody made to start a deployment is no difference, and outlives a deploy."""
    deploying()
    action = {"type": "run-deployment", "source": "selected", "deployment_id": str(deploying.there(DAILY).id)}
    theirs = {
        "name": "theirs",
        "trigger": {"type": "event", "expect": ["elt.theirs"], "posture": "Reactive", "threshold": 1},
        "actions": [action],
    }
    url = f"{deploying.client.api_url}automations/"
    made = httpx.post(url, json=theirs).raise_for_status().json()
    try:
        assert "nothing to do" in deploying()
        deploying.change(DAILY, description="Something else.")
        assert "✓ 1 deployed" in deploying()
        assert "theirs" in deploying.automations(DAILY)
    finally:
        httpx.delete(f"{url}{made['id']}").raise_for_status()


def test_check_changes_nothing(deploying: Deploying) -> None:
    """`--check` says what there is to do, ends with 1, and does none of it."""
    assert "+ dbt-build/test.daily" in deploying("--check", code=1)
    with pytest.raises(ObjectNotFound):
        deploying.there(DAILY)
    deploying()
    assert "nothing to do" in deploying("--check")


# -- what was switched off -----------------------------------------------------------------------------------


def test_what_was_switched_off_stays_off(deploying: Deploying) -> None:
    """A deploy that has something else to change leaves schedules and triggers as somebody switched them."""
    deploying()
    deploying.switch(DAILY, "at-six", active=False)
    deploying.switch_trigger(DAILY, "test.when asked", enabled=False)
    assert "nothing to do" in deploying()
    deploying.entries[0]["description"] = "Builds it well."
    deploying.entries[0]["schedules"][0]["cron"] = "0 5 * * *"
    deploying.entries[0]["triggers"][0]["expect"] = ["elt.asked", "elt.begged"]
    assert "~ dbt-build/test.daily: description, schedules, triggers" in deploying()
    found = {one.slug: one for one in deploying.there(DAILY).schedules}
    assert {slug: one.active for slug, one in found.items()} == {"at-six": False, "often": True}
    assert isinstance(found["at-six"].schedule, CronSchedule)
    assert found["at-six"].schedule.cron == "0 5 * * *"
    switched = {name: one["enabled"] for name, one in deploying.automations(DAILY).items()}
    assert switched == {"test.when asked": False, "test.when both": True}


def test_killed_while_the_triggers_were_made_anew(
    deploying: Deploying, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prefect deletes automations and makes them anew: what was off between the two is not on after that."""
    deploying()
    deploying.switch_trigger(DAILY, "test.when asked", enabled=False)
    deploying.entries[0]["description"] = "Builds it well."

    def killed(_: object) -> None:
        resource = f"prefect.deployment.{deploying.there(DAILY).id}"
        httpx.delete(f"{deploying.client.api_url}automations/owned-by/{resource}").raise_for_status()
        raise InterruptedError

    with monkeypatch.context() as patch:
        patch.setattr(deploy, "_prefect_deploy", killed)
        with pytest.raises(InterruptedError):
            deploying()
    assert deploying.automations(DAILY) == {}
    assert "~ dbt-build/test.daily: description, triggers" in deploying()
    switched = {name: one["enabled"] for name, one in deploying.automations(DAILY).items()}
    assert switched == {"test.when asked": False, "test.when both": True}
    # Remembered no longer than that: who switches it on finds it on.
    deploying.switch_trigger(DAILY, "test.when asked", enabled=True)
    deploying.entries[0]["description"] = "Builds it."
    deploying()
    assert deploying.automations(DAILY)["test.when asked"]["enabled"] is True
    variables = httpx.post(f"{deploying.client.api_url}variables/filter", json={}).raise_for_status().json()
    assert [one["name"] for one in variables if switches.TAG in one["tags"]] == []


def test_what_the_file_switches_off(deploying: Deploying) -> None:
    """`active: false` and `enabled: false` in the file hold, whoever has switched it on."""
    deploying()
    deploying.entries[0]["schedules"][1]["active"] = False
    deploying.entries[0]["triggers"][1]["enabled"] = False
    assert "~ dbt-build/test.daily: schedules, triggers" in deploying()
    assert [one.active for one in deploying.there(DAILY).schedules if one.slug == "often"] == [False]
    assert deploying.automations(DAILY)["test.when both"]["enabled"] is False
    assert "nothing to do" in deploying()
    deploying.switch(DAILY, "often", active=True)
    assert "~ dbt-build/test.daily: schedules" in deploying()


def test_an_environment_begins_switched_off(deploying: Deploying) -> None:
    """Where schedules and triggers are off at first, somebody may switch one on, and it stays on."""
    deploying("--env", "quiet")
    assert [one.active for one in deploying.there(DAILY, "quiet.").schedules] == [False, False]
    automations = deploying.automations(DAILY, "quiet.")
    assert [one["enabled"] for one in automations.values()] == [False, False]
    deployment = deploying.there(DAILY, "quiet.")
    url = f"{deploying.client.api_url}deployments/{deployment.id}/schedules/{deployment.schedules[0].id}"
    httpx.patch(url, json={"active": True}).raise_for_status()
    deploying.entries[0]["description"] = "Builds it well."
    deploying("--env", "quiet")
    with pytest.raises(ObjectNotFound):
        deploying.there(FRESH, "quiet.")
    deploying.environments["environments"]["quiet"]["without"] = ["nowhere"]
    assert "is without nowhere, which is in no file" in deploying("--env", "quiet", code=1)
    active = {one.slug: one.active for one in deploying.there(DAILY, "quiet.").schedules}
    assert active == {one.slug: one.id == deployment.schedules[0].id for one in deployment.schedules}


# -- what is gone --------------------------------------------------------------------------------------------


def test_removed_entries_are_offered(deploying: Deploying) -> None:
    """What is in no file any more is named, and deleted with `--prune`; what is not ours never is."""
    deploying()
    daily = deploying.there(DAILY)
    foreign = deploying.client.create_deployment(flow_id=daily.flow_id, name="theirs")
    deploying.entries.pop(0)
    said = deploying()
    assert "- dbt-build/test.daily: in no file any more" in said
    assert "--prune deletes them" in said
    assert deploying.there(DAILY).id == daily.id
    assert "1 deleted" in deploying("--prune")
    with pytest.raises(ObjectNotFound):
        deploying.there(DAILY)
    url = f"{deploying.client.api_url}automations/filter"
    names = {one["name"] for one in httpx.post(url, json={}).raise_for_status().json()}
    assert not names & {"test.when asked", "test.when both"}
    assert deploying.client.read_deployment(foreign).name == "theirs"
    deploying.client.delete_deployment(foreign)
    assert "nothing to do" in deploying()


@pytest.mark.parametrize(("answer", "there"), [("y", False), ("", True)])
def test_the_question(
    deploying: Deploying, monkeypatch: pytest.MonkeyPatch, answer: str, *, there: bool
) -> None:
    """At a terminal it is asked, and only a yes deletes."""
    deploying()
    deploying.entries.pop(0)
    asked: list[str] = []
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda text: (asked.append(text), answer)[1])
    deploying()
    assert asked == ["Delete the 1 in no file any more? [y/N] "]
    names = [one.name for one in deploying.client.read_deployments()]
    assert ("test.daily" in names) is there


# -- what is wrong -------------------------------------------------------------------------------------------


def test_nothing_is_deployed_if_something_is_wrong(deploying: Deploying) -> None:
    """All mistakes are said at once, with their deployments, and the server is not even asked."""
    daily, fresh = deploying.entries
    daily["schedules"][0]["cron"] = "0 25 * * *"
    daily["parameters"]["retries"] = -1
    daily["triggers"][0]["parameters"] = {"retries": "{{ event.payload.often }}"}
    fresh["entrypoint"] = "flows.transform.nowhere"
    said = deploying(code=1)
    assert 'daily: schedule at-six: cron: Value error, Invalid cron string: "0 25 * * *"' in said
    assert "daily: retries: Input should be greater than or equal to 0" in said
    assert "daily: trigger when asked: elt.asked.json: its parameters do not render" in said
    assert "fresh: flows.transform.nowhere can't be imported: AttributeError" in said
    with pytest.raises(ObjectNotFound):
        deploying.there(DAILY)


def test_a_refusal_of_the_server_is_shown(deploying: Deploying) -> None:
    """What only the server can tell, such as a job variable of the wrong type, is told in its words."""
    deploying.entries[1]["work_pool"]["job_variables"] = {"stream_output": "perhaps"}
    assert "stream_output" in deploying(code=1) or pytest.fail("the server took it")


def test_blocks_that_are_not_saved(deploying: Deploying) -> None:
    """A block that a deployment names and nobody has saved is a warning, and an error with `--strict`."""
    deploying.entries[0]["parameters"]["notify"][0]["webhook"] = "nobody"
    said = deploying("--strict", code=1)
    assert "! the block slack-incoming-webhook/nobody is not saved: test.daily can't run without it" in said
    with pytest.raises(ObjectNotFound):
        deploying.there(DAILY)
    assert "✓ 2 deployed" in deploying()


def test_blocks_of_an_environment(deploying: Deploying) -> None:
    """Where an environment has its own block for one of the files, its deployments name that one."""
    said = deploying("--env", "quiet")
    assert deploying.there(DAILY, "quiet.").parameters["notify"] == [{"tool": "slack", "webhook": "others"}]
    assert "slack-incoming-webhook/others is not saved" in said


def test_work_pools(deploying: Deploying) -> None:
    """A pool is made with its template, kept as an operator paused it, and never changed in its type."""
    deploying()
    url = f"{deploying.client.api_url}work_pools/{POOL}"
    made = httpx.get(url).raise_for_status().json()
    env = made["base_job_template"]["variables"]["properties"]["env"]["default"]
    assert env == {"PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30"}
    httpx.patch(url, json={"is_paused": True, "concurrency_limit": 7}).raise_for_status()
    assert "nothing to do" in deploying()
    deploying.environments["work_pools"][POOL]["variables"] = {"env": {"TZ": "UTC"}}
    assert f"~ work pool {POOL}: template" in deploying()
    now = httpx.get(url).raise_for_status().json()
    assert (now["is_paused"], now["concurrency_limit"]) == (True, 7)
    assert now["base_job_template"]["variables"]["properties"]["env"]["default"] == {**env, "TZ": "UTC"}
    deploying.environments["work_pools"][POOL] = {"type": "docker"}
    assert f"the work pool {POOL} is of type process, not docker" in deploying(code=1)
    deploying.environments["work_pools"] = {}
    assert "nothing to do" in deploying()  # one that somebody else has made will do
    deploying.entries[0]["work_pool"]["name"] = "nowhere"
    assert "there is no work pool nowhere: add it" in deploying(code=1)
    httpx.delete(url).raise_for_status()


@pytest.mark.parametrize(
    ("kind", "variables", "ours", "wrong"),
    [
        ("docker", {"image": "registry.test/elt:1"}, {"mem_limit": "4g"}, {"auto_remove": "perhaps"}),
        ("kubernetes", {"secret_name": "elt"}, {"memory_limit": "4Gi"}, {"finished_job_ttl": "soon"}),
        (
            "ecs",
            {"secrets": [{"name": "A", "valueFrom": "arn:aws:ssm:a"}]},
            {"cpu": 1024},
            {"cpu": "many"},
        ),
    ],
)
def test_pools_of_containers(
    deploying: Deploying, kind: Any, variables: dict[str, Any], ours: dict[str, Any], wrong: dict[str, Any]
) -> None:
    """The server takes each template and holds job variables against it; the second time is nothing to do."""
    pool = f"deploying-{kind}"
    deploying.environments["work_pools"][pool] = {"type": kind, "variables": variables}
    for entry in deploying.entries:
        entry["work_pool"] = {"name": pool, "job_variables": {**ours, "env": {"REGION": "eu"}}}
    fresh = deploying.entries[1]["work_pool"]
    deploying.entries[1]["work_pool"] = {"name": pool, "job_variables": wrong}
    url = f"{deploying.client.api_url}work_pools/{pool}"
    try:
        said = deploying(code=1)
        assert f"+ work pool {pool}" in said
        assert next(iter(wrong)) in said.split("`prefect deploy` failed", 1)[1]
        deploying.entries[1]["work_pool"] = fresh
        assert "✓ 1 deployed, 1 as they were" in deploying()
        there = httpx.get(url).raise_for_status().json()
        template = base_job_template(WorkPoolSettings(type=kind, variables=variables))
        assert (there["type"], there["base_job_template"]) == (kind, template)
        assert "nothing to do" in deploying()
    finally:
        httpx.delete(url).raise_for_status()


def test_limits_and_block_types(deploying: Deploying) -> None:
    """A limit is made and follows the file; a block type that the server lost is registered again."""
    deploying()
    found = deploying.client.read_global_concurrency_limit_by_name("deploying-airbyte")
    assert (found.limit, found.active) == (3, True)
    deploying.environments["concurrency_limits"]["deploying-airbyte"] = 2
    assert "+ concurrency limit deploying-airbyte: 2" in deploying()
    assert deploying.client.read_global_concurrency_limit_by_name("deploying-airbyte").limit == 2
    AirbyteServer.register_type_and_schema()
    url = f"{deploying.client.api_url}block_types"
    kind = httpx.get(f"{url}/slug/airbyte-server").raise_for_status().json()
    httpx.delete(f"{url}/{kind['id']}").raise_for_status()
    assert "+ block type Airbyte Server" in deploying()
    assert "nothing to do" in deploying()


def test_no_server(deploying: Deploying) -> None:
    """Without an address nothing is deployed to some server of Prefect's own; one that is away is named."""
    with temporary_settings({PREFECT_API_URL: None}):
        assert "which server? Set PREFECT_API_URL" in deploying(code=1)
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}):
        assert "no Prefect server can be used at http://127.0.0.1:9/api" in deploying(code=1)


# -- branches ------------------------------------------------------------------------------------------------


def test_a_branch_comes_and_goes(deploying: Deploying) -> None:
    """A branch has deployments of its own with all switched off, and one command takes them down again."""
    deploying()
    before = deploying.snapshot()
    deploying("--branch", "My-Feature")
    there = deploying.there(DAILY, "my-feature.")
    assert there.tags == ["dbt", "owner:flight-ops", "branch:my-feature"]
    assert [one.active for one in there.schedules] == [False, False]
    own = {"ELT_SCHEMA": "my_feature", "ELT_PREFIX": "my-feature.", "ELT_TRIGGERS": '{"triggers":false}'}
    assert there.job_variables["env"] == {"REGION": "eu", **own}
    automations = deploying.automations(DAILY, "my-feature.")
    assert {name: one["enabled"] for name, one in automations.items()} == {
        "my-feature.when asked": False,
        "my-feature.when both": False,
    }
    assert "nothing to do" in deploying("--branch", "my-feature")
    assert "2 would be deleted" in deploying("--undeploy", "--branch", "my-feature", "--check")
    said = deploying("--undeploy", "--branch", "my-feature")
    assert "- dbt-build/my-feature.daily" in said
    assert "✓ 2 deleted" in said
    assert "my_feature_*" in said
    assert "nothing to do" in deploying("--undeploy", "--branch", "my-feature")
    assert deploying.snapshot() == before
    assert "only a branch is taken down" in deploying("--undeploy", "--env", "test", code=1)


@pytest.mark.timeout(480)
def test_a_branch_builds_into_its_own_schema(deploying: Deploying, tmp_path: Path) -> None:
    """On a real worker a branch's run writes tables of its own, and production's are left as they were."""
    warehouse = tmp_path / "warehouse.duckdb"
    env = {
        "ELT_WAREHOUSE": str(warehouse),
        "PREFECT_WORKER_QUERY_SECONDS": "1",
        "DBT_TARGET_PATH": str(tmp_path / "target"),
        "DBT_LOG_PATH": str(tmp_path / "logs"),
    }
    deploying.entries[0]["parameters"]["notify"] = []
    deploying()
    deploying("--branch", "my-feature")
    runs = Runs(deploying.client, str(deploying.client.api_url).rstrip("/"))
    command = ["-m", "prefect", "worker", "start", "--pool", POOL]
    with background(command, tmp_path / "worker.log", **env):
        ended = runs.ended(runs.start("dbt-build/test.daily"), within=180)
        assert ended.state is not None
        assert ended.state.type is StateType.COMPLETED, ended.state.message
        with duckdb.connect(str(warehouse)) as db:
            # A seed that is loaded again would be without it.
            db.execute("insert into seeds.airline_alliances (carrier_code) values ('??')")
            before = db.execute("from seeds.airline_alliances order by carrier_code").fetchall()
        ended = runs.ended(runs.start("dbt-build/my-feature.daily"), within=180)
        assert ended.state is not None
        assert ended.state.type is StateType.COMPLETED, ended.state.message
    with duckdb.connect(str(warehouse), read_only=True) as db:
        assert db.execute("from seeds.airline_alliances order by carrier_code").fetchall() == before
        (count,) = db.execute("select count(*) from my_feature_seeds.airline_alliances").fetchone() or (0,)
        assert count == len(before) - 1
        names = {
            name for (name,) in db.execute("select schema_name from information_schema.schemata").fetchall()
        }
        assert {name for name in names if name.startswith("my_feature")} == {"my_feature_seeds"}
