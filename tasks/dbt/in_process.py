"""dbt inside the flow's own process, by `prefect-dbt`'s runner, for those who want its asset events.

Slower (about 0.18 s a node), it cannot be cancelled, and dbt's settings are global to the process: one at a
time.
"""

from __future__ import annotations

import asyncio
import json
import os
import threading
import time
from typing import Any

from tasks.dbt.child import invoke, main_message, record_of, written_out
from tasks.dbt.folders import target_of
from tasks.dbt.lineage import Lineage
from tasks.dbt.model import DbtCore, DbtError, DbtNode, DbtResult, one_line
from tasks.dbt.nodes import Blame, node_from, state_of
from tasks.dbt.process import surroundings

_one_at_a_time = threading.Lock()


async def run_in_process(dbt: DbtCore, exclude: list[str]) -> DbtResult:
    """Runs dbt through `PrefectDbtRunner`; arguments and result as for `dbt_build`."""
    started = time.monotonic()
    async with surroundings(dbt) as (_, env):
        records, lineage = await asyncio.to_thread(_run, dbt, exclude, env)
    blame = Blame()
    blame.know(lineage)
    for record in records:
        if state_of(record["status"]).value in {"fail", "error"}:
            blame.failed(record["id"], f"{record['kind']} {record['name']}")
    nodes: list[DbtNode] = [
        node_from(
            record,
            blame.reason(record["id"], record["message"]) if record["status"] == "skipped" else None,
            lineage,
        )
        for record in records
    ]
    return DbtResult.from_nodes(nodes, command=dbt.what, duration=time.monotonic() - started)


def _run(dbt: DbtCore, exclude: list[str], env: dict[str, str]) -> tuple[list[dict[str, Any]], Lineage]:
    from dbt_common.events.base_types import EventLevel
    from prefect_dbt import PrefectDbtRunner, PrefectDbtSettings

    settings = PrefectDbtSettings(
        profiles_dir=dbt.find_profiles_dir(), project_dir=dbt.project, log_level=EventLevel.INFO
    )
    with _one_at_a_time:
        before = dict(os.environ)
        os.environ.update(env)
        try:
            with settings.resolve_profiles_yml() as profiles:
                args = [dbt.command, *dbt.arguments(command=dbt.command)]
                if dbt.must_narrow(exclude):
                    listing = invoke(
                        [
                            "ls",
                            *dbt.arguments(command="ls"),
                            "--profiles-dir",
                            profiles,
                            *dbt.selection(),
                            "--output",
                            "selector",
                        ],
                        [],
                    )
                    if listing.exception is not None:
                        raise DbtError(
                            f"dbt ls could not run: {one_line(main_message(listing.exception), 800)}"
                        )
                    if not (chosen := written_out(listing)):
                        return [], Lineage({})
                    args += ["--exclude", *exclude, *chosen]
                else:
                    args += dbt.selection(exclude)
            try:
                outcome = PrefectDbtRunner(settings=settings, raise_on_failure=False).invoke(args)
            except ValueError as error:
                raise DbtError(f"dbt {dbt.command} could not run: {one_line(str(error), 800)}") from error
        finally:
            os.environ.clear()
            os.environ.update(before)
    records = [record_of(result) for result in getattr(outcome.result, "results", None) or []]
    manifest = target_of(dbt) / "manifest.json"
    return records, Lineage.from_manifest(json.loads(manifest.read_bytes()))
