"""Environments and entries: what a file says, and what an environment makes of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from deployments.entries import TRIGGER_MARK, Entry, load_triggers, read_entries
from deployments.environments import (
    DeployError,
    Environments,
    branch_slug,
    environment,
    read_environments,
)

pytestmark = pytest.mark.no_server

ENTRY: dict[str, Any] = {
    "name": "daily",
    "entrypoint": "flows.transform.build_project",
    "tags": ["dbt", "owner:flight-ops"],
    "work_pool": {"name": "elt", "job_variables": {"env": {"TZ": "UTC"}}},
    "triggers": [{"name": "when asked", "type": "event", "expect": ["a"]}],
    "once_triggers": [{"name": "when it came", "expect": ["b"]}],
    "parameters": {"dbt": {"tool": "dbt-core", "project_dir": "sandbox/dbt"}, "notify": [{"tool": "slack"}]},
}


def entry(**fields: Any) -> Entry:
    return Entry.model_validate({**ENTRY, **fields})


def environments(**fields: Any) -> Environments:
    return Environments.model_validate({"default": "prod", "environments": {"prod": {}}, **fields})


def test_the_default_is_the_file_as_it_is() -> None:
    """Without a name it is the file's own environment, in which only a mark is added."""
    prod = environment()
    assert (prod.prefix, prod.variables, prod.schedules, prod.triggers) == ("", {}, True, True)
    before = entry()
    after = before.within(prod)
    assert after.tags == [*before.tags, "env:prod"]
    same = {"tags", "triggers"}
    assert after.model_dump(exclude=same) == before.model_dump(exclude=same)
    (trigger,) = after.triggers
    assert trigger == {**before.triggers[0], "description": TRIGGER_MARK}


def test_what_an_environment_changes() -> None:
    """Name, pool, variables and parameters are the environment's, and nothing is given to who doesn't ask."""
    dev = {
        "prefix": "dev.",
        "schema": "dev",
        "env": {"REGION": "eu"},
        "work_pool": "small",
        "parameters": {"notify": [], "activations": []},
    }
    here = environments(environments={"prod": {}, "dev": dev}).named("dev")
    found = entry().within(here)
    assert found.full_name == "dbt-build/dev.daily" == here.deployment_name("dbt-build/daily")
    assert found.work_pool.name == "small"
    env = {"TZ": "UTC", "REGION": "eu", "ELT_SCHEMA": "dev", "ELT_PREFIX": "dev."}
    changes = '{"parameters":{"notify":[],"activations":[]}}'
    assert found.work_pool.job_variables == {"env": {**env, "ELT_TRIGGERS": changes}}
    assert found.parameters["notify"] == []
    assert "activations" not in found.parameters
    assert found.owner == "flight-ops"
    assert [trigger["name"] for trigger in found.triggers] == ["dev.when asked"]
    assert [trigger["name"] for trigger in found.once_triggers] == ["dev.when it came"]


def test_a_date_among_the_parameters(tmp_path: Path) -> None:
    """YAML reads it as one; runs are told of it as text."""
    file = tmp_path / "environments.yaml"
    file.write_text("{default: prod, environments: {prod: {parameters: {since: 2026-03-01T00:00:00Z}}}}")
    assert read_environments(file).named().here.parameters == {"since": "2026-03-01T00:00:00Z"}


def test_what_is_left_out_is_not_started(tmp_path: Path) -> None:
    """No event starts a deployment that an environment is without, or any where its triggers are off."""
    file = tmp_path / "prefect.yaml"
    other = {**ENTRY, "name": "hourly", "once_triggers": [{"name": "when more came", "expect": ["c"]}]}
    entries = [{**one, "entrypoint": "flows/transform.py:build_project"} for one in (ENTRY, other)]
    file.write_text(yaml.safe_dump({"deployments": entries}))
    found = environments(
        environments={
            "prod": {},
            "dev": {"prefix": "dev-", "without": ["hourly"]},
            "quiet": {"prefix": "q-", "triggers": False},
        }
    )

    def started(name: str) -> list[str]:
        return [trigger.deployment for trigger in load_triggers(found.named(name), [file])]

    assert started("prod") == ["dbt-build/daily", "dbt-build/hourly"]
    assert started("dev") == ["dbt-build/dev-daily"]
    assert started("quiet") == []


def test_a_branch() -> None:
    """A branch has its own names, mark and schema, and no event starts anything of it."""
    here = read_environments().of_branch("feature/New_Mart")
    found = entry().within(here)
    assert found.name == "feature-new-mart.daily"
    assert found.tags[-1] == "branch:feature-new-mart"
    assert found.work_pool.job_variables["env"]["ELT_SCHEMA"] == "feature_new_mart"
    assert (here.schedules, here.triggers, found.once_triggers) == (False, False, [])


@pytest.mark.parametrize(
    ("branch", "slug"),
    [
        ("my-feature", "my-feature"),
        ("Feature/ABC_12", "feature-abc-12"),
        ("a" * 40, "a" * 25 + "-"),
        ("a" * 39 + "b", "a" * 25 + "-"),
    ],
)
def test_slugs(branch: str, slug: str) -> None:
    """A branch's name becomes one that fits a deployment and a schema."""
    assert branch_slug(branch).startswith(slug)
    assert len(branch_slug(branch)) <= 32


def test_long_branches_are_told_apart() -> None:
    """Two branches whose names begin alike are two."""
    assert branch_slug("a" * 40) != branch_slug("a" * 39 + "b")


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"default": "live"}, "the default is 'live', which is none of the environments"),
        ({"environments": {"prod": {}, "dev": {}}}, "two environments have the same prefix"),
        ({"environments": {"prod": {"schedule": False}}}, "environments.prod.schedule: Extra"),
        (
            {"environments": {"prod": {"schema": "my-schema"}}},
            "environments.prod.schema: String should match",
        ),
        ({"environments": {"prod": {"prefix": "a/"}}}, "environments.prod.prefix: String should match"),
    ],
)
def test_environments_that_make_no_sense(fields: dict[str, Any], says: str, tmp_path: Path) -> None:
    """A mistake in the file is named with its place."""
    file = tmp_path / "environments.yaml"
    file.write_text(yaml.safe_dump({"default": "prod", "environments": {"prod": {}}, **fields}))
    with pytest.raises(DeployError, match=says):
        read_environments(file)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda file: None, "there is no .*environments"),
        (lambda file: file.mkdir(), r"environments\.yaml can't be read: Is a directory"),
        (lambda file: file.write_text("a: ["), r"environments\.yaml is no YAML"),
    ],
    ids=["missing", "a folder", "no YAML"],
)
def test_file_that_cannot_be_read(make: Callable[[Path], object], says: str, tmp_path: Path) -> None:
    """A file that can't be read is an error of one line, whatever the cause."""
    file = tmp_path / "environments.yaml"
    make(file)
    with pytest.raises(DeployError, match=says) as raised:
        read_environments(file)
    assert len(str(raised.value).splitlines()) == 1


def test_names_that_are_not_there() -> None:
    """An unknown environment, and a branch that would be taken for one, are refused."""
    with pytest.raises(DeployError, match=r"no environment 'live'; environments\.yaml has prod, dev"):
        environment("live")
    with pytest.raises(DeployError, match="'Dev' would be taken for the environment dev"):
        environment(branch="Dev")
    with pytest.raises(DeployError, match="name one"):
        environment("dev", "my-feature")
    with pytest.raises(DeployError, match="no name can be made"):
        environment(branch="//")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"scheduls": []}, "deployments.daily.scheduls: Extra inputs are not permitted"),
        ({"work_pool": None}, "deployments.daily.work_pool: Input should be"),
        ({"schedules": [{"cron": "0 6 * * *"}]}, "deployments.daily.schedules.0.slug: Field required"),
        ({"concurrency_limit": {"limit": 0}}, "deployments.daily.concurrency_limit.limit: Input should be"),
    ],
)
def test_entries_that_make_no_sense(change: dict[str, Any], says: str, tmp_path: Path) -> None:
    """What `prefect deploy` would pass over in silence is an error, with the deployment's name."""
    with pytest.raises(DeployError, match=says):
        read_entries(_file(tmp_path, {**ENTRY, **change}))


def test_two_of_one_name(tmp_path: Path) -> None:
    """A name that stands for two deployments is refused, across files too."""
    with pytest.raises(DeployError, match="two deployments are called daily"):
        read_entries(_file(tmp_path, ENTRY), _file(tmp_path, ENTRY, name="other.yaml"))


def test_entrypoints_that_do_not_import(tmp_path: Path) -> None:
    """`prefect deploy` takes an entrypoint that can't be imported; here it is an error with the cause."""
    with pytest.raises(DeployError, match=r"daily: flows\.nowhere\.flow can't be imported: ModuleNotFound"):
        _ = entry(entrypoint="flows.nowhere.flow").flow
    with pytest.raises(DeployError, match=r"daily: flows\.elt\.Gate is no flow"):
        _ = entry(entrypoint="flows.elt.Gate").flow


def _file(folder: Path, *entries: dict[str, Any], name: str = "prefect.yaml") -> Path:
    file = folder / name
    pull = [{"deployments.steps.change_to_repository": {}}]
    file.write_text(yaml.safe_dump({"name": "elt", "pull": pull, "deployments": list(entries)}))
    return file
