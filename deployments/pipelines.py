"""Writes a deployment per pipeline that the dbt project declares: `make pipelines`.

A team owns a pipeline by what it writes in the dbt project, not in YAML of ours:

- an exposure with `meta: {pipeline: {cron: "0 7 * * *", timezone: Europe/Berlin}}` is one,
  `+exposure:<name>`;
- a tag that `vars: {pipelines: {<tag>: {cron: …}}}` of dbt_project.yml names is one, `+tag:<tag>`: with what
  the tagged models are built on, for a model that is built on yesterday's staging is yesterday's.

Each becomes a deployment of `elt_chain` that syncs the connections that feed it, builds it, and activates
what hangs below it. Accounts, activations and people come from one deployment of `deployments/prefect.yaml`,
the base. With `--check` nothing is written, and the exit code says whether the file is out of date: for CI.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from prefect.exceptions import ParameterTypeError
from pydantic import BaseModel, ConfigDict, ValidationError

from blocks.fields import OWNER_TAG
from deployments.check_dbt import DbtProject, Failed
from deployments.environments import DeployError, load_yaml
from flows.elt import elt_chain
from flows.narrowing import approval_of_part, gate_of_part, rule_of_part
from tasks.dbt.lineage import Lineage
from tasks.dbt.model import DbtCore
from tasks.jobs import Parameters
from tasks.tools import TOOLS

_HEADER = """\
# Written by `make pipelines` from the dbt project's manifest and deployments/prefect.yaml. Do not edit:
# change the exposure's meta or the tag's entry in dbt_project.yml, and write it anew.
# `make deploy` puts them on a server, with those of prefect.yaml.

"""


class Declaration(BaseModel):
    """What a team says of its pipeline; all of it may be left out."""

    model_config = ConfigDict(extra="forbid")

    cron: str | None = None
    timezone: str = "UTC"
    owner: str | None = None


@dataclass(frozen=True)
class Pipeline:
    """One pipeline: what is selected, and the nodes that this comes to."""

    name: str
    select: str
    what: str
    declared: Declaration
    owner: str | None
    nodes: frozenset[str]


def declared_pipelines(lineage: Lineage, variables: dict[str, Any]) -> list[Pipeline]:
    """The pipelines that a project declares, exposures first.

    Args:
        lineage: The project's graph.
        variables: The `vars` of dbt_project.yml.

    Raises:
        Failed: A declaration is wrong, or a tag that it names is on no model.
    """
    found: list[Pipeline] = []
    for node in sorted(lineage.exposures, key=lambda node: node.name):
        if "pipeline" in node.meta:
            declared = _declaration(node.meta["pipeline"], f"meta.pipeline of exposure {node.name}")
            found.append(
                Pipeline(
                    name=f"exposure-{node.name.replace('_', '-')}",
                    select=f"+exposure:{node.name}",
                    what=f"the exposure **{node.label or node.name}**",
                    declared=declared,
                    owner=declared.owner or node.owner,
                    nodes=frozenset(lineage.upstream([node.unique_id]) | {node.unique_id}),
                )
            )
    tags = variables.get("pipelines") or {}
    if not isinstance(tags, dict):
        raise Failed(
            "vars.pipelines of dbt_project.yml has to say for each tag what its pipeline is like: "
            "`pipelines: {finance: {cron: …}}`, or `{finance: }` for one without a schedule"
        )
    for tag, entry in sorted(tags.items()):
        declared = _declaration(entry, f"vars.pipelines.{tag} of dbt_project.yml")
        tagged = {node.unique_id for node in lineage.nodes.values() if tag in node.tags}
        if not any(lineage.nodes[id_].resource_type == "model" for id_ in tagged):
            raise Failed(f"dbt_project.yml declares a pipeline for the tag {tag}, which is on no model")
        found.append(
            Pipeline(
                name=f"tag-{tag}",
                select=f"+tag:{tag}",
                what=f"what is tagged **{tag}**",
                declared=declared,
                owner=declared.owner,
                nodes=frozenset(lineage.upstream(tagged) | tagged),
            )
        )
    return found


def _declaration(value: Any, where: str) -> Declaration:
    try:
        return Declaration.model_validate({} if value in (None, True) else value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        field = ".".join(str(part) for part in first["loc"])
        raise Failed(f"{where}: {field + ': ' if field else ''}{first['msg']}") from None


def deployment(pipeline: Pipeline, lineage: Lineage, base: dict[str, Any]) -> dict[str, Any]:
    """The deployment of a pipeline.

    Raises:
        Failed: No connection of the base feeds it, or the base can't be one.
    """
    whole = _understood(base)
    # They are written down as the base has them, and understood as its flow understands them.
    parameters = dict(base["parameters"])
    syncs = list(zip(parameters["syncs"], whole["syncs"], strict=True))
    feeding = [(written, sync) for written, sync in syncs if _feeds(sync, pipeline, lineage)]
    if not feeding:
        raise Failed(f"no connection of the deployment {base['name']} feeds {pipeline.select}")
    below = {
        exposure.unique_id
        for exposure in lineage.exposures
        if exposure.parents and set(exposure.parents) <= pipeline.nodes
    } | pipeline.nodes
    parameters["syncs"] = [written for written, _ in feeding]
    transform = {name: value for name, value in parameters["transform"].items() if name != "selector"}
    parameters["transform"] = {**transform, "select": [pipeline.select]}
    activations = list(zip(parameters.get("activations") or (), whole["activations"], strict=True))
    hanging = [(written, one) for written, one in activations if _stands_on(one, below, lineage)]
    parameters["activations"] = [written for written, _ in hanging]
    _narrow(parameters, whole, [one for _, one in feeding], [one for _, one in hanging])
    try:
        elt_chain.validate_parameters(parameters)
    except ParameterTypeError as error:
        raise Failed(f"{pipeline.name} can't be made from the deployment {base['name']}: {error}") from None
    models = sorted(
        lineage.nodes[id_].name for id_ in pipeline.nodes if lineage.nodes[id_].resource_type == "model"
    )
    entry: dict[str, Any] = {
        "name": pipeline.name,
        "entrypoint": base["entrypoint"],
        "description": _description(pipeline, [sync for _, sync in feeding], models),
        "tags": ["elt", "pipeline", *([f"{OWNER_TAG}{pipeline.owner}"] if pipeline.owner else [])],
        "work_pool": base["work_pool"],
    }
    if "concurrency_limit" in base:
        entry["concurrency_limit"] = base["concurrency_limit"]
    if pipeline.declared.cron:
        schedule = {"cron": pipeline.declared.cron, "timezone": pipeline.declared.timezone}
        entry["schedules"] = [{"slug": "declared", **schedule}]
    return {**entry, "parameters": parameters}


def _understood(base: dict[str, Any]) -> dict[str, Any]:
    """The parameters of the base as its flow understands them, with its defaults.

    Raises:
        Failed: It is no deployment of elt-chain, builds with something else than dbt Core, or is wrong.
    """
    name, written = base.get("name"), base.get("parameters") or {}
    if not str(base.get("entrypoint")).replace(":", ".").endswith(f".{elt_chain.fn.__name__}"):
        raise Failed(
            f"the deployment {name} runs {base.get('entrypoint')}: the base has to be one of elt_chain"
        )
    try:
        found = elt_chain.validate_parameters(written)
    except ParameterTypeError as error:
        raise Failed(f"the parameters of the deployment {name} do not fit its flow: {error}") from None
    if not isinstance(found.get("transform"), DbtCore):
        raise Failed(
            f"the deployment {name} has no transform by dbt-core, so no pipeline can be made from it"
        )
    return {"activations": [], **found}


def _narrow(
    parameters: dict[str, Any],
    whole: dict[str, Any],
    syncs: list[Parameters],
    activations: list[Parameters],
) -> None:
    """Take out of gates, rule and approval what the pipeline does not have, or its runs would be refused.

    What the base names and nobody here knows may be of a selection, or a name that only the vendor knows: it
    stays, and a run says it.
    """
    kept = _named([*syncs, *activations])
    gone = _named([*whole["syncs"], *whole["activations"]]) - kept

    def has(name: str) -> bool:
        return name not in gone

    if parameters.get("gates"):
        gates = [gate_of_part(gate, has, whole["transform"]) for gate in whole["gates"]]
        parameters["gates"] = [
            {**written, "connections": list(gate.connections)} if gate.connections else written
            for written, gate in zip(parameters["gates"], gates, strict=True)
            if gate
        ]
    if isinstance(parameters.get("allow_failure"), dict):
        rule = rule_of_part(whole["allow_failure"], has)
        parameters["allow_failure"] = rule if isinstance(rule, str) else rule.model_dump()
    if parameters.get("approval"):
        approval = approval_of_part(whole["approval"], activations)  # type: ignore[arg-type]  # of elt_chain
        if approval is None:
            del parameters["approval"]
        elif approval != whole["approval"]:
            parameters["approval"] = {**parameters["approval"], "before": list(approval.before)}


def _named(requests: list[Parameters]) -> set[str]:
    return {text for request in requests for text in (request.resource_id, request.label)}


def _feeds(sync: Parameters, pipeline: Pipeline, lineage: Lineage) -> bool:
    """Whether a connection fills a source of the pipeline; one that no source names may fill any."""
    tool = TOOLS[sync.tool]
    if sync.tool != tool.name:  # a selection: only its vendor can tell what is in it
        return True
    key = tool.meta
    named = lineage.sources_of(sync.resource_id, key=key)
    if named:
        return bool(named & pipeline.nodes)
    return any(not source.filler_named for source in lineage.sources if source.unique_id in pipeline.nodes)


def _stands_on(activation: Parameters, below: set[str], lineage: Lineage) -> bool:
    key = TOOLS[activation.tool].meta
    exposures = lineage.exposures_for(key=key, value=activation.resource_id)
    return bool(exposures) and all(exposure.unique_id in below for exposure in exposures)


def _description(pipeline: Pipeline, syncs: list[Parameters], models: list[str]) -> str:
    names = ", ".join(sync.label for sync in syncs)
    owner = f" Owned by **{pipeline.owner}**." if pipeline.owner else ""
    return (
        f"Keeps {pipeline.what} fresh: `{pipeline.select}`.{owner}\n\n"
        f"| step | what |\n|---|---|\n| syncs | {names} |\n| models | {', '.join(models)} |\n"
    )


def write(project: Path, prefect_file: Path, base_name: str) -> str:
    """The text of the generated file.

    Raises:
        Failed: The project does not parse, a declaration is wrong, or there is no such base.
    """
    try:
        settings = load_yaml(prefect_file)
    except DeployError as error:
        raise Failed(str(error)) from None
    if not isinstance(settings, dict) or not isinstance(settings.get("deployments"), list):
        raise Failed(f"{prefect_file} has no deployments")
    if not (project / "dbt_project.yml").is_file():
        raise Failed(f"there is no {project / 'dbt_project.yml'}")
    with tempfile.TemporaryDirectory() as target:
        parsed = DbtProject(project, Path(target))
        parsed.parse()
    base = next((entry for entry in settings["deployments"] if entry.get("name") == base_name), None)
    if base is None:
        raise Failed(f"{prefect_file} has no deployment {base_name}")
    variables = load_yaml(project / "dbt_project.yml").get("vars") or {}
    pipelines = declared_pipelines(parsed.lineage, variables)
    document = {
        **{key: settings[key] for key in ("name", "prefect-version", "pull") if key in settings},
        "deployments": [deployment(pipeline, parsed.lineage, base) for pipeline in pipelines],
    }
    return _HEADER + yaml.dump(document, Dumper=_Dumper, sort_keys=False, width=110, allow_unicode=True)


class _Dumper(yaml.SafeDumper):
    """Without anchors, and with texts of several lines as they are read."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)


def main(arguments: list[str] | None = None) -> int:
    """Write the file, or look whether it is up to date.

    Returns:
        The exit code: 1 if something is wrong, or, with `--check`, out of date.
    """
    parser = argparse.ArgumentParser(prog="python -m deployments.pipelines", description=__doc__)
    parser.add_argument(
        "--project", type=Path, default=Path("sandbox/dbt"), help="folder with dbt_project.yml"
    )
    parser.add_argument("--prefect-file", type=Path, default=Path("deployments/prefect.yaml"))
    parser.add_argument("--base", default="flights", help="the deployment that knows accounts and people")
    parser.add_argument("--output", type=Path, default=Path("deployments/pipelines.yaml"))
    parser.add_argument("--check", action="store_true", help="write nothing; say what is out of date")
    options = parser.parse_args(arguments)
    # A profile may ask for the path of a warehouse; to parse, dbt never opens it.
    os.environ.setdefault("ELT_WAREHOUSE", "/nowhere/none.duckdb")
    try:
        text = write(options.project, options.prefect_file, options.base)
    except Failed as error:
        print(f"✗ {error}")  # noqa: T201 - it is a command
        return 1
    before = ""
    with contextlib.suppress(FileNotFoundError):
        before = options.output.read_text()
    if before == text:
        print(f"✓ {options.output} is up to date")  # noqa: T201
        return 0
    if not options.check:
        options.output.write_text(text)
        print(f"✓ {options.output} is written")  # noqa: T201
        return 0
    lines = difflib.unified_diff(before.splitlines(), text.splitlines(), "as it is", "as it should be", n=1)
    print(f"✗ {options.output} is out of date; run `make pipelines`:\n" + "\n".join(lines))  # noqa: T201
    return 1


if __name__ == "__main__":
    sys.exit(main())
