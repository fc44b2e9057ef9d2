"""`make deploy`: puts all deployments on a Prefect server, with what they need; run twice it does nothing.

Everything in deployments/prefect.yaml and deployments/pipelines.yaml, for one environment of
deployments/environments.yaml or for a branch: checked first, compared with what is there, and only what
differs is deployed, by `prefect deploy`. Work pools, concurrency limits and block types are made where they
are missing. What an operator has switched off stays off. What is in no file any more is deleted with
`--prune`, or after a question.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from uuid import UUID

import httpx
import yaml
from prefect.blocks.core import Block
from prefect.cli import app as prefect_command
from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.filters import WorkerFilter, WorkerFilterStatus
from prefect.exceptions import ObjectNotFound
from prefect.settings import get_current_settings

import blocks
from deployments.checks import EXAMPLES, blocks_named, not_its_own, problems_of, with_trigger_blocks
from deployments.entries import Entry, read_entries
from deployments.environments import FILE, DeployError, Environment, Environments, read_environments
from deployments.plan import DeploymentPlan, marked_deployments, plan_deployments
from deployments.switches import forget, remember
from deployments.work_pools import pool_differs, put_pool


@dataclass
class Plan:
    """What is to be done.

    Attributes:
        pools: Work pools to be made or changed, and what about them.
        limits: Concurrency limits to be made or changed.
        block_types: Kinds of blocks that the server does not know, or not as they are now.
        deployments: What is to be done with deployments.
        missing_blocks: Blocks that deployments name and that are not saved, with those that name them.
    """

    pools: dict[str, str] = field(default_factory=dict)
    limits: dict[str, int] = field(default_factory=dict)
    block_types: list[type[Block]] = field(default_factory=list)
    deployments: DeploymentPlan = field(default_factory=DeploymentPlan)
    missing_blocks: dict[str, list[str]] = field(default_factory=dict)

    @property
    def nothing(self) -> bool:
        """Whether the server has everything as it should be."""
        return not (self.pools or self.limits or self.block_types or self.deployments.changes)


def entries_of(environment: Environment, *files: Path, examples: Path = EXAMPLES) -> tuple[Entry, ...]:
    """The deployments as they are in an environment, checked.

    Args:
        environment: Where they are to be put.
        files: Where they stand, if not in prefect.yaml and pipelines.yaml.
        examples: Where an example of each event is that a trigger expects.

    Raises:
        DeployError: Something is wrong with them: a line for each.
    """
    entries = read_entries(*files)
    if unknown := set(environment.without) - {entry.name for entry in entries}:
        raise DeployError(f"{environment.tag} is without {', '.join(sorted(unknown))}, which is in no file")
    if problems := problems_of(entries, examples):
        raise DeployError("\n".join(problems))
    there = [entry for entry in entries if entry.name not in environment.without]
    if problems := [one for entry in there for one in not_its_own(entry, environment)]:
        raise DeployError("\n".join(problems))
    changed = tuple(with_trigger_blocks(one, environment, examples).within(environment) for one in there)
    if environment.parameters and (problems := problems_of(changed, examples)):
        raise DeployError("\n".join(problems))
    return changed


async def make_plan(
    client: PrefectClient,
    environments: Environments,
    environment: Environment,
    entries: Sequence[Entry],
    examples: Path = EXAMPLES,
) -> Plan:
    """What there is to do. Nothing is changed.

    Args:
        client: Of the server.
        environments: All of environments.yaml.
        environment: Where they are to be put.
        entries: As they are there, checked.
        examples: Where an example of each event is that a trigger expects.

    Raises:
        DeployError: A work pool is neither in environments.yaml nor on the server, or is of another type.
    """
    plan = Plan()
    for name in _pools(entries):
        if name in environments.work_pools:
            differs = await pool_differs(client, name, environments.work_pools[name])
            if differs:
                plan.pools[name] = differs
        elif not await _has_pool(client, name):
            raise DeployError(f"there is no work pool {name}: add it to work_pools in environments.yaml")
    for name, limit in environments.concurrency_limits.items():
        if await _limit(client, name) != limit:
            plan.limits[name] = limit
    plan.block_types = [kind for kind in _block_types() if not await _is_registered(client, kind)]
    plan.deployments = await plan_deployments(client, entries, environment)
    named = {entry.name: blocks_named(entry, environment, examples) for entry in entries}
    plan.missing_blocks = await _missing_blocks(client, named)
    return plan


async def apply(client: PrefectClient, environments: Environments, plan: Plan) -> None:
    """Do it; nothing is deleted but schedules that are no longer in the file.

    Raises:
        DeployError: `prefect deploy` failed. What it had done by then stays; a second try goes on from there.
    """
    for name in plan.pools:
        await put_pool(client, name, environments.work_pools[name])
    for name, limit in plan.limits.items():
        await client.upsert_global_concurrency_limit_by_name(name=name, limit=limit)
    for kind in plan.block_types:
        await kind.register_type_and_schema(client=client)
    changed = [change.entry for change in plan.deployments.changes]
    if not changed:
        return
    await remember(client, changed)
    await asyncio.to_thread(_prefect_deploy, changed)
    await forget(client, changed)
    for entry in changed:
        slugs = {schedule.slug for schedule in entry.schedules}
        there = await client.read_deployment_by_name(entry.full_name)
        for schedule in there.schedules:
            if schedule.slug not in slugs:  # `prefect deploy` leaves it where none of its slugs is given
                await client.delete_deployment_schedule(there.id, schedule.id)


async def delete(client: PrefectClient, deployments: dict[str, UUID]) -> None:
    """Delete deployments, with their automations and the runs that are still to come."""
    for id_ in deployments.values():
        await client.delete_resource_owned_automations(f"prefect.deployment.{id_}")
        await client.delete_deployment(id_)


def _prefect_deploy(entries: Sequence[Entry]) -> None:
    """Prefect's own command, with a file of what is to be deployed."""
    document = {
        "name": "elt-flows",
        "deployments": [
            {
                # An update by `prefect deploy` leaves it as it is there where the file does not say.
                "enforce_parameter_schema": True,
                **entry.model_dump(mode="json", exclude_unset=True, exclude={"once_triggers"}),
                # Said, or it becomes the git commit's where there is a remote or a git host's CI, and every
                # commit would deploy everything anew. Prefect shows the commit beside it in either case.
                "version": entry.version or entry.flow.version,
            }
            for entry in entries
        ],
    }
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "prefect.yaml")
        file.write_text(yaml.safe_dump(document, sort_keys=False))
        code, said = _prefect("--no-prompt", "deploy", "--all", "--prefect-file", str(file))
    if code:
        raise DeployError(f"`prefect deploy` failed:\n{said}")


def _prefect(*command: str) -> tuple[object, str]:
    """A `prefect` command in this process, which has imported everything; its exit code and its output."""
    said, before = io.StringIO(), sys.argv
    sys.argv = ["prefect", *command]
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            prefect_command()
    except SystemExit as ended:
        return ended.code, said.getvalue()
    finally:
        sys.argv = before
    return 0, said.getvalue()


def _pools(entries: Sequence[Entry]) -> list[str]:
    return sorted({entry.work_pool.name for entry in entries})


async def _has_pool(client: PrefectClient, name: str) -> bool:
    try:
        await client.read_work_pool(name)
    except ObjectNotFound:
        return False
    return True


async def _limit(client: PrefectClient, name: str) -> int | None:
    try:
        return (await client.read_global_concurrency_limit_by_name(name)).limit
    except ObjectNotFound:
        return None


def _block_types() -> list[type[Block]]:
    found = (getattr(blocks, name) for name in blocks.__all__)
    return [kind for kind in found if isinstance(kind, type) and issubclass(kind, Block)]


async def _is_registered(client: PrefectClient, kind: type[Block]) -> bool:
    try:
        await client.read_block_type_by_slug(kind.get_block_type_slug())
        await client.read_block_schema_by_checksum(kind._calculate_schema_checksum())  # noqa: SLF001 - no public way
    except ObjectNotFound:
        return False
    return True


async def _missing_blocks(client: PrefectClient, named: Mapping[str, set[str]]) -> dict[str, list[str]]:
    missing = {}
    for slug in sorted(set().union(*named.values())):
        kind, name = slug.split("/", 1)
        try:
            await client.read_block_document_by_name(name, kind, include_secrets=False)
        except ObjectNotFound:
            missing[slug] = [name for name, slugs in named.items() if slug in slugs]
    return missing


# -- the command --------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Deploy, or take a branch down again.

    Returns:
        The exit code: 1 if something is wrong or, with `--check`, to be done.
    """
    options = _parser().parse_args(arguments)
    try:
        return asyncio.run(_undeploy(options) if options.undeploy else _deploy(options))
    except DeployError as error:
        for line in str(error).splitlines():
            _say(f"✗ {line}")
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m deployments.deploy", description=__doc__)
    parser.add_argument("--env", help="an environment of environments.yaml (default: the one it says)")
    parser.add_argument("--branch", help="a branch: its own names and schema, schedules and triggers off")
    parser.add_argument(
        "--prefect-file", type=Path, action="append", help="instead of prefect.yaml and pipelines.yaml"
    )
    parser.add_argument("--examples", type=Path, default=EXAMPLES, help="instead of deployments/examples")
    parser.add_argument("--environments", type=Path, default=FILE, help="instead of environments.yaml")
    parser.add_argument("--check", action="store_true", help="change nothing; say what is to be done")
    parser.add_argument("--strict", action="store_true", help="a block that is not saved is an error")
    parser.add_argument("--prune", action="store_true", help="delete what is in no file any more")
    parser.add_argument("--undeploy", action="store_true", help="delete all deployments of the branch")
    return parser


async def _deploy(options: argparse.Namespace) -> int:
    environments = read_environments(options.environments)
    here = environments.pick(options.env, options.branch)
    entries = entries_of(here, *(options.prefect_file or ()), examples=options.examples)
    async with _server() as client:
        plan = await make_plan(client, environments, here, entries, options.examples)
        _tell(plan, here)
        if plan.missing_blocks and options.strict:
            raise DeployError("blocks are missing, and --strict was asked for: nothing was changed")
        gone = plan.deployments.gone
        if plan.nothing and not gone:
            _say(f"✓ nothing to do: {len(entries)} deployments are as in the files")
        elif options.check:
            return 1
        else:
            await apply(client, environments, plan)
            pruned = bool(gone) and (options.prune or _agreed(gone))
            if pruned:
                await delete(client, gone)
            done = f"{len(plan.deployments.changes)} deployed, {len(plan.deployments.same)} as they were"
            _say(f"✓ {done}{f', {len(gone)} deleted' if pruned else ''}")
            if gone and not pruned:
                _say(f"  {len(gone)} in no file any more: --prune deletes them")
        for pool in _pools(entries):
            if not await _has_worker(client, pool):
                _say(f"  no worker is up for {pool}: .venv/bin/prefect worker start --pool {pool}")
    return 0


async def _undeploy(options: argparse.Namespace) -> int:
    if not options.branch or options.env:
        raise DeployError("only a branch is taken down: name it with --branch")
    here = read_environments(options.environments).of_branch(options.branch)
    async with _server() as client:
        found = await marked_deployments(client, here)
        for name in sorted(found):
            _say(f"- {name}")
        if found and not options.check:
            await delete(client, found)
    if not found:
        _say(f"✓ nothing to do: no deployment has the tag {here.tag}")
        return 0
    _say(f"✓ {len(found)} {'would be ' if options.check else ''}deleted")
    _say(f"  what they built is left in the warehouse, in the schemas {here.schema_name}_*")
    return 0


@contextlib.asynccontextmanager
async def _server() -> AsyncIterator[PrefectClient]:
    """A client of the server, once it is sure that there is one."""
    url = get_current_settings().api.url
    if not url:  # else Prefect would start a server of its own and deploy to that
        raise DeployError("which server? Set PREFECT_API_URL, for example to http://127.0.0.1:4200/api")
    async with get_client() as client:
        problem = await client.api_healthcheck()
        if problem is not None:
            status = problem.response.status_code if isinstance(problem, httpx.HTTPStatusError) else None
            why = f"it answers {status}" if status else str(problem) or type(problem).__name__
            raise DeployError(f"no Prefect server can be used at {url}: {why}")
        yield client


def _tell(plan: Plan, here: Environment) -> None:
    """What is to be done, a line each; of what differs never the values."""
    _say(f"{here.tag} on {get_current_settings().api.url}")
    for name, what in plan.pools.items():
        _say(f"+ work pool {name}" if what == "new" else f"~ work pool {name}: {what}")
    for name, limit in plan.limits.items():
        _say(f"+ concurrency limit {name}: {limit}")
    for kind in plan.block_types:
        _say(f"+ block type {kind.get_block_type_name()}")
    for change in plan.deployments.changes:
        if change.new:
            _say(f"+ {change.entry.full_name}")
        else:
            _say(f"~ {change.entry.full_name}: {', '.join(change.differs)}")
    for name in sorted(plan.deployments.gone):
        _say(f"- {name}: in no file any more")
    for slug, names in plan.missing_blocks.items():
        _say(f"! the block {slug} is not saved: {', '.join(names)} can't run without it")


def _agreed(gone: dict[str, UUID]) -> bool:
    if not sys.stdin.isatty():
        return False
    return input(f"Delete the {len(gone)} in no file any more? [y/N] ").strip().lower() in ("y", "yes")


async def _has_worker(client: PrefectClient, pool: str) -> bool:
    online = WorkerFilter(status=WorkerFilterStatus(any_=["ONLINE"]))
    return bool(await client.read_workers_for_work_pool(pool, worker_filter=online))


def _say(line: str) -> None:
    print(line, flush=True)  # noqa: T201 - it is a command


if __name__ == "__main__":
    sys.exit(main())
