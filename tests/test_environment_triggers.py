"""What an environment changes in the deployments that events, schedules and looks start."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect.server.events.schemas.events import ReceivedEvent
from prefect.utilities.collections import visit_collection

from deployments.checks import EXAMPLES, blocks_named, with_trigger_blocks
from deployments.deploy import entries_of
from deployments.entries import FILES, Entry, load_triggers, read_entries
from deployments.environments import DeployError, Environment, read_environments
from tasks.environment import TRIGGERS_VARIABLE
from tasks.events import EltEvent, OnceTrigger, TriggersWrong
from tasks.looking.triggers import triggers_here
from tests.deployed import REPOSITORY

pytestmark = pytest.mark.no_server

AIRBYTE = Environment(name="dev", prefix="dev.", blocks={"airbyte": "airbyte-dev", "landing": "landing-dev"})
SYNCS = [{"tool": "airbyte", "server": "airbyte", "connection_id": "{{ event.payload.connection_id }}"}]
FLIGHTS = [{**SYNCS[0], "connection_id": "7f1a6001-2013-4a00-8000-000000000001"}]
WRITTEN = {  # the block's name is inside of the template
    "__prefect_kind": "json",
    "value": {
        "__prefect_kind": "jinja",
        "template": '[{"tool": "airbyte", "server": "airbyte", '
        '"connection_id": {{ event.payload.connection_id | tojson }}}]',
    },
}
LOADS: dict[str, Any] = {
    "name": "loads",
    "entrypoint": "flows.syncs.sync_connections",
    "work_pool": {"name": "elt"},
    "schedules": [{"slug": "at-six", "cron": "0 6 * * *", "parameters": {"syncs": FLIGHTS, "notify": []}}],
    "triggers": [
        {"name": "a", "type": "event", "expect": ["elt.source.landed"], "parameters": {"syncs": SYNCS}}
    ],
    "once_triggers": [{"name": "b", "expect": ["elt.source.landed"], "parameters": {"syncs": WRITTEN}}],
    "parameters": {"notify": []},
}


@pytest.fixture(autouse=True)
def _from_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)


def _file(folder: Path, *entries: dict[str, Any]) -> Path:
    file = folder / "prefect.yaml"
    pull = [{"deployments.steps.change_to_repository": {}}]
    file.write_text(yaml.safe_dump({"name": "elt", "pull": pull, "deployments": list(entries)}))
    return file


def _example(name: str) -> EltEvent:
    event = ReceivedEvent.model_validate(
        {"id": "00000000-0000-0000-0000-000000000000", "occurred": "2026-01-01T00:00:00Z"}
        | json.loads((EXAMPLES / f"{name}.json").read_text())
    )
    return EltEvent(
        name=name,
        key="1",
        occurred=event.occurred,
        resource_id=event.resource.id,
        payload=event.payload,
    )


def _servers(triggers: tuple[OnceTrigger, ...]) -> Iterator[str]:
    """The Airbyte server of every sync that an event would start."""
    for trigger in triggers:
        for name in trigger.expect:
            if trigger.parameters:
                for sync in trigger.rendered(_example(name)).get("syncs", ()):
                    yield sync["server"]


def _told(environment: Environment, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `make deploy` has it in every run of the environment."""
    for name, value in environment.variables.items():
        monkeypatch.setenv(name, value)


def test_events_start_syncs_on_the_environments_own_account(monkeypatch: pytest.MonkeyPatch) -> None:
    """No event of dev starts a sync on production's account: not by a receiver, not by a look."""
    assert set(_servers(load_triggers(read_environments().named("prod")))) == {"airbyte"}
    assert [*_servers(load_triggers(AIRBYTE))] == ["airbyte-dev"] * 3
    _told(AIRBYTE, monkeypatch)
    looks = [str(file.relative_to(REPOSITORY)) for file in FILES]
    assert [*_servers(triggers_here(looks))] == ["airbyte-dev"] * 3


def test_a_task_gets_a_trigger_as_it_is() -> None:
    """Prefect looks for results in what a task is given, and may make models anew: the blocks stay."""
    given = visit_collection({"triggers": load_triggers(AIRBYTE)}, visit_fn=lambda one: one, return_data=True)
    assert [*_servers(given["triggers"])] == ["airbyte-dev"] * 3


def test_schedules_and_triggers_of_an_environment() -> None:
    """Blocks and parameters of an environment hold for schedules and for Prefect's own triggers, too."""
    told = [{"tool": "slack", "webhook": "playground"}]
    here = AIRBYTE.model_copy(update={"parameters": {"notify": told, "activations": []}})

    def there(**fields: Any) -> Entry:
        return with_trigger_blocks(Entry.model_validate({**LOADS, **fields}), here, EXAMPLES).within(here)

    found = there()
    assert found.schedules[0].parameters["syncs"][0]["server"] == "airbyte-dev"
    assert found.schedules[0].parameters["notify"] == found.parameters["notify"] == told
    assert "activations" not in found.schedules[0].parameters
    (trigger,) = found.triggers
    assert trigger["parameters"] == {"syncs": [{**SYNCS[0], "server": "airbyte-dev"}]}
    trigger = {**LOADS["triggers"][0], "parameters": {"syncs": SYNCS, "notify": []}}
    (trigger,) = there(triggers=[trigger]).triggers
    assert trigger["parameters"]["notify"] == told


def test_a_template_of_prefects_own_that_names_a_block(tmp_path: Path) -> None:
    """What can't be replaced, because the server renders it, is not deployed on production's account."""
    trigger = {**LOADS["triggers"][0], "parameters": {"syncs": WRITTEN}}
    file = _file(tmp_path, {**LOADS, "triggers": [trigger]})
    with pytest.raises(
        DeployError, match="loads: trigger a: a template writes the name of airbyte-server/airbyte"
    ):
        entries_of(AIRBYTE, file)
    assert len(entries_of(read_environments().named("prod"), file)) == 1
    assert len(entries_of(AIRBYTE, _file(tmp_path, LOADS))) == 1


@pytest.mark.parametrize("kind", ["schedules", "triggers", "once_triggers"])
def test_blocks_that_only_some_runs_name(kind: str) -> None:
    """A block that is missing is missed also where only a schedule or a trigger names it."""
    only = {**LOADS, "schedules": [], "triggers": [], "once_triggers": [], kind: LOADS[kind]}
    entry = Entry.model_validate(only)
    for here, server in ((read_environments().named("prod"), "airbyte"), (AIRBYTE, "airbyte-dev")):
        there = with_trigger_blocks(entry, here, EXAMPLES).within(here)
        assert blocks_named(there, here, EXAMPLES) == {f"airbyte-server/{server}"}


def test_triggers_tell_of_the_environments_own_deployments(tmp_path: Path) -> None:
    """A once trigger that waits for what a deployment did waits for the environment's."""
    related = {"prefect.resource.role": "deployment", "prefect.resource.name": "daily"}
    trigger = {**LOADS["once_triggers"][0], "match_related": related}
    entry = {**LOADS, "once_triggers": [trigger]}
    (found,) = load_triggers(AIRBYTE, [_file(tmp_path, entry)])
    assert found.match_related == {**related, "prefect.resource.name": "dev.daily"}


@pytest.mark.parametrize(
    ("environment", "started"),
    [
        (Environment(name="q", prefix="q.", triggers=False), []),
        (Environment(name="q", prefix="q.", without=["by-hand", "hourly"]), ["by-hand", "hourly"]),
    ],
    ids=["triggers are off", "without two"],
)
def test_looks_start_what_is_there(
    environment: Environment, started: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A look that somebody starts by hand starts nothing that its environment does not have events start."""
    _told(environment, monkeypatch)
    found = [one.deployment for one in triggers_here(["deployments/prefect.yaml"])]
    assert not environment.triggers or found
    assert not [one for one in found for name in ("by-hand", "hourly") if one.endswith(name)]
    assert started == (environment.without if environment.triggers else found)


def test_told_what_nobody_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A look that can't tell what its environment starts, starts nothing."""
    monkeypatch.setenv(TRIGGERS_VARIABLE, "off")
    with pytest.raises(TriggersWrong, match="ELT_TRIGGERS is not as"):
        triggers_here(["deployments/prefect.yaml"])


@pytest.mark.parametrize("environment", ["dev", "a branch"])
def test_no_look_takes_productions_files(environment: str) -> None:
    """What is shipped puts no look into dev or a branch that moves or deletes production's files."""
    found = read_environments()
    here = found.of_branch("my-feature") if environment == "a branch" else found.named(environment)
    looks = [one for one in entries_of(here) if one.parameters.get("what", {}).get("action")]
    assert looks == []


def test_a_look_that_takes_files_needs_a_place_of_its_own(tmp_path: Path) -> None:
    """Under a prefix a look that moves or deletes is refused until the environment names its bucket."""
    landing = next(one for one in read_entries() if one.name == "landing")
    file = _file(tmp_path, landing.model_dump(mode="json", exclude_unset=True))
    dev = Environment(name="dev", prefix="dev.")
    with pytest.raises(
        DeployError, match="landing: env:dev would move files of the place that the file names"
    ):
        entries_of(dev, file)
    assert entries_of(dev.model_copy(update={"without": ["landing"]}), file) == ()
    for blocks in ({"landing": "landing-dev"}, {"s3-bucket/landing": "landing-dev"}):
        (look,) = entries_of(dev.model_copy(update={"blocks": blocks}), file)
        assert look.parameters["what"]["bucket"] == "landing-dev"
    elsewhere = {**landing.parameters["what"], "bucket": "other"}
    (look,) = entries_of(dev.model_copy(update={"parameters": {"what": elsewhere}}), file)
    assert look.parameters["what"]["bucket"] == "other"
