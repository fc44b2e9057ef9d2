"""dbt Core as a Prefect task: true node states, clear errors, a real end whatever happens."""

from __future__ import annotations

import asyncio
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest
from prefect import flow
from prefect.blocks.system import Secret
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.client.schemas.objects import TaskRun
from prefect.runtime import flow_run
from prefect.variables import Variable
from pydantic import ValidationError

from tasks.dbt_core import (
    DbtBuildFailed,
    DbtCore,
    DbtError,
    DbtPlan,
    DbtResult,
    DbtState,
    DbtTimeout,
    check_dbt,
    dbt_build,
    dbt_plan,
)
from tests.dbt_project import Project, everything
from tests.jobs_fixtures import PREFECTS_SOCKETS, collected

__all__ = ["collected"]

pytestmark = [
    *PREFECTS_SOCKETS,
    pytest.mark.usefixtures("warm_dbt"),
]

# Runs for hours in DuckDB, and can be interrupted.
ENDLESS = """-- depends_on: {{ ref('a') }}
select count(*) as n from range(1000000000) a, range(1000000) b where a.range + b.range = -1"""


@dataclass
class Run:
    """What a flow run left behind: its id and the result of its dbt build."""

    id: str
    result: DbtResult
    error: DbtBuildFailed | None


def build(dbt: DbtCore, exclude: list[str] | None = None) -> Run:
    @flow
    async def dbt_only() -> Run:
        run_id = str(flow_run.id)
        try:
            return Run(run_id, await dbt_build(dbt, exclude or []), None)
        except DbtBuildFailed as error:
            return Run(run_id, error.result, error)

    return asyncio.run(dbt_only())


async def task_runs(flow_run_id: str, ready: Callable[[list[TaskRun]], bool]) -> list[TaskRun]:
    """The run's task runs, once they are as `ready` wants them: the server is a second behind."""
    deadline = time.monotonic() + 60
    async with get_client() as client:
        while True:
            wanted = FlowRunFilter(id=FlowRunFilterId(any_=[flow_run_id]))
            found = await client.read_task_runs(flow_run_filter=wanted)
            if ready(found) or time.monotonic() > deadline:
                return found
            await asyncio.sleep(0.2)


def ended(names: int) -> Callable[[list[TaskRun]], bool]:
    return lambda runs: len(runs) >= names and all(run.state and run.state.is_final() for run in runs)


def children(of: int | None = None) -> list[psutil.Process]:
    """The dbt processes below a process of ours."""
    try:
        below = psutil.Process(of).children(recursive=True)
        return [p for p in below if any("child.py" in word for word in p.cmdline())]
    except psutil.NoSuchProcess:
        return []


async def until(condition: Callable[[], Any], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(0.05)
    return True


@pytest.fixture(scope="module")
def zoo(prefect_server: str, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One build of a project in which everything happens that can happen to a node."""
    return build(everything(tmp_path_factory.mktemp("zoo")).core())


@pytest.fixture
def small(tmp_path: Path) -> Project:
    project = Project(tmp_path)
    project.model("a", "select 1 as id")
    project.model("b", "select * from {{ ref('a') }}")
    return project


class TestStates:
    def test_every_node_comes_back_in_its_true_state(self, zoo: Run) -> None:
        """Success, warning, failure, error and skip are told apart; ephemeral, disabled: not there."""
        states = {node.name: node.state.value for node in zoo.result.nodes}
        assert states == {
            "shop.on-run-start.0": "success",
            "colours": "success",
            "good_keeps_rows": "success",
            "good": "success",
            "unique_good_id": "success",
            "only_warns": "warn",
            "broken": "error",
            "below_broken": "skipped",
            "further_below": "skipped",
            "after_ephemeral": "success",
            "tested": "success",
            "not_null_tested_name": "fail",
            "below_tested": "skipped",
            "kept": "success",
            "shop.on-run-end.0": "success",
        }
        assert zoo.result.counts == {"success": 9, "warn": 1, "error": 1, "fail": 1, "skipped": 3}
        assert zoo.result.state is DbtState.ERROR
        assert {node.name for node in zoo.result.built} == {
            "colours",
            "good",
            "tested",
            "after_ephemeral",
            "kept",
        }

    def test_a_node_carries_what_is_known_of_it(self, zoo: Run) -> None:
        """The database's own error, the rows, the failing rows of a test, the group's owner."""
        nodes = {node.name: node for node in zoo.result.nodes}
        assert 'Referenced column "no_such_column" not found' in (nodes["broken"].message or "")
        rows = {node.name: node.rows for node in zoo.result.nodes if node.rows is not None}
        assert rows == {"colours": 3, "kept": 3}  # the models are views
        assert nodes["not_null_tested_name"].failures == 1
        assert (nodes["good"].group, nodes["good"].owner) == ("paint", "painters")
        assert (nodes["good"].compiled_path or "").endswith("good.sql")
        assert nodes["kept"].duration > 0

    def test_a_skipped_node_says_which_failure_it_owes_that_to(self, zoo: Run) -> None:
        """The reason is the first failure above, also across several skipped nodes and for a failed test."""
        reasons = {node.name: node.message for node in zoo.result.skipped}
        assert reasons == {
            "below_broken": "model broken failed",
            "further_below": "model broken failed",
            "below_tested": "test not_null_tested_name failed",
        }

    def test_the_failure_is_one_line_that_says_what_and_why(self, zoo: Run) -> None:
        """Count, node, the database's words, warnings and skips; and it survives being pickled."""
        assert zoo.error is not None
        message = str(zoo.error)
        assert message.startswith("2 of 15 nodes failed: ")
        assert "model broken: Binder Error: Referenced column" in message
        assert "test not_null_tested_name: Got 1 result" in message
        assert message.endswith("; 1 warned; 3 skipped")
        assert "\n" not in message
        again = pickle.loads(pickle.dumps(zoo.error))  # noqa: S301 - our own
        assert again.result == zoo.result
        assert DbtResult.model_validate_json(zoo.result.model_dump_json()) == zoo.result

    async def test_every_node_is_a_task_run_that_says_the_same(self, zoo: Run) -> None:
        """Names, states, reasons, tags and the parent in the Prefect API are those of dbt's nodes."""
        runs = {run.name: run for run in await task_runs(zoo.id, ended(16))}
        assert len(runs) == 16
        seen = {name: run.state.name for name, run in runs.items() if run.state}
        assert seen["dbt build"] == "Failed"
        assert seen["model good"] == seen["hook shop.on-run-end.0"] == seen["snapshot kept"] == "Completed"
        assert seen["unit test good_keeps_rows"] == "Completed"
        assert seen["test only_warns"] == "Warned"
        assert seen["model further_below"] == "Skipped"
        assert seen["test not_null_tested_name"] == seen["model broken"] == "Failed"
        broken, skipped = runs["model broken"].state, runs["model further_below"].state
        assert broken is not None
        assert 'Referenced column "no_such_column" not found' in (broken.message or "")
        assert skipped is not None
        assert (skipped.message, skipped.is_cancelled()) == ("model broken failed", True)
        assert set(runs["test only_warns"].tags) == {"dbt", "test"}
        parents = [
            found.id for found in runs["model good"].task_inputs["__parents__"] if hasattr(found, "id")
        ]
        assert parents == [runs["dbt build"].id]


class TestOnce:
    def test_a_retried_flow_run_does_not_build_again_what_was_built(self, small: Project) -> None:
        """A retry takes the persisted result; another exclude list is another build."""
        seen: list[Any] = []

        @flow(retries=1)
        def chain(dbt: DbtCore) -> str:
            # On the default task runner, which runs an async task in a thread with a loop of its own.
            seen.append(dbt_build.submit(dbt).result())
            if len(seen) == 1:
                raise RuntimeError("something after dbt failed")
            seen.append(dbt_build.submit(dbt, ["b"]).result())
            return str(flow_run.id)

        chain(small.core(vars={"day": "monday"}))
        first, again, narrower = seen
        assert again.invocation_id == first.invocation_id
        assert [node.name for node in first.nodes] == ["a", "b"]
        assert narrower.invocation_id != first.invocation_id
        assert [node.name for node in narrower.nodes] == ["a"]

    def test_a_limit_on_the_tag_dbt_holds_the_build_and_not_its_nodes(self, small: Project) -> None:
        """With one slot for the tag `dbt`, held by the build, its nodes run nevertheless."""

        async def limited() -> DbtResult:
            async with get_client() as client:
                await client.create_concurrency_limit(tag="dbt", concurrency_limit=1)
                try:
                    return await nodes()
                finally:
                    await client.delete_concurrency_limit_by_tag("dbt")

        @flow
        async def nodes() -> DbtResult:
            return await dbt_build(small.core())

        result = asyncio.run(limited())
        assert result.state is DbtState.SUCCESS


class TestSelection:
    @pytest.mark.parametrize("how", ["selector", "default selector"])
    def test_what_is_excluded_is_left_out_of_a_selector_too(self, small: Project, how: str) -> None:
        """`dbt` itself would ignore the exclude list, or the default selector."""
        small.model("c", "select 3 as id")
        small.write(
            "selectors.yml",
            f"""
            selectors:
              - name: pair
                default: {str(how == "default selector").lower()}
                definition: {{union: [a, b]}}
            """,
        )
        run = build(small.core(selector="pair" if how == "selector" else None), ["b"])
        assert [node.name for node in run.result.nodes] == ["a"]

    def test_an_exclude_list_that_leaves_nothing_is_not_an_error_and_not_a_success(
        self, small: Project
    ) -> None:
        """The result says `skipped`, with no nodes."""
        result = build(small.core(select=["a"]), ["a"]).result
        assert (result.state, result.nodes) == (DbtState.SKIPPED, [])
        assert result.message == "nothing was selected, so nothing was built"

    async def test_the_plan_says_what_would_run(self, tmp_path: Path) -> None:
        """`check_dbt` and its task give the selected nodes and the whole lineage, and start nothing."""
        project = everything(tmp_path)

        @flow
        async def plan_only() -> DbtPlan:
            return await dbt_plan(project.core(select=["good+1"]))

        plan = await plan_only()
        assert (plan.project, plan.adapter, plan.target) == ("shop", "duckdb", "dev")
        assert {"model.shop.good", "model.shop.tested", "snapshot.shop.kept"} <= set(plan.selected)
        assert "model.shop.below_tested" not in plan.selected
        assert plan.lineage.downstream(["model.shop.broken"]) == {
            "model.shop.below_broken",
            "model.shop.further_below",
        }
        assert not project.warehouse.exists()


class TestBadInput:
    @pytest.mark.parametrize(
        ("settings", "sentence"),
        [
            ({"selector": "x", "select": ["y"]}, "a selector or a select list, not both"),
            ({"selector": "x", "exclude": ["y"]}, "a selector or an exclude list, not both"),
            ({"command": "test", "full_refresh": True}, "full_refresh means nothing to `dbt test`"),
            ({"engine": "prefect-dbt", "timeout": 5}, "cannot be stopped"),
            ({"exclude": [" "]}, "empty entry"),
            ({"profile": "x"}, "Extra inputs are not permitted"),
        ],
    )
    def test_settings_that_do_not_go_together_are_refused(
        self, settings: dict[str, Any], sentence: str
    ) -> None:
        """With a sentence, before anything runs."""
        with pytest.raises(ValidationError, match=sentence):
            DbtCore.model_validate({"project_dir": "/x", **settings})

    @pytest.mark.parametrize(
        ("break_it", "settings", "sentence"),
        [
            (lambda p: None, {"project_dir": "/no/such/folder"}, "/no/such/folder does not exist"),
            (lambda p: (p.folder / "dbt_project.yml").unlink(), {}, "it has no dbt_project.yml"),
            (lambda p: None, {"profiles_dir": "/no/profiles"}, "No profiles.yml in /no/profiles"),
            (lambda p: p.set(profile="office"), {}, "Profile 'office' .* profiles there: shop"),
            (lambda p: None, {"target": "prod"}, "Target 'prod' is not in .* targets there: dev"),
            (lambda p: p.write("dbt_project.yml", "a: [b"), {}, "not valid YAML"),
        ],
    )
    async def test_a_project_or_profile_that_is_not_there_is_named(
        self, small: Project, break_it: Callable[[Project], None], settings: dict[str, Any], sentence: str
    ) -> None:
        """What is missing, where it was looked for, and what is there instead; dbt is not even started."""
        break_it(small)
        with pytest.raises(DbtError, match=sentence):
            await check_dbt(small.core(**settings))

    async def test_a_selection_that_matches_nothing_is_an_error(self, small: Project) -> None:
        """A typing error must not pass as a build of nothing."""
        with pytest.raises(DbtError, match=r"matches nothing that `dbt build` runs: --select tag:nope"):
            await check_dbt(small.core(select=["tag:nope"]))

    async def test_a_project_that_does_not_compile_is_told_in_dbts_words(self, small: Project) -> None:
        """One line, with the file and what is missing in it."""
        small.model("c", "select * from {{ ref('not_there') }}")
        with pytest.raises(DbtError, match=r"models/c.sql\) depends on a node named 'not_there'") as caught:
            await check_dbt(small.core())
        assert "\n" not in str(caught.value)

    async def test_a_locked_duckdb_file_is_named_with_who_holds_it(self, small: Project) -> None:
        """Before anything starts, with the process id of the one that has it open."""
        hold = "import duckdb, sys; c = duckdb.connect(sys.argv[1]); print(flush=True); sys.stdin.read()"
        holder = subprocess.Popen(  # noqa: ASYNC220, S603
            [sys.executable, "-c", hold, str(small.warehouse)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert holder.stdout is not None
        try:
            holder.stdout.readline()
            with pytest.raises(DbtError, match=rf"warehouse.duckdb is locked by process {holder.pid} "):
                await check_dbt(small.core(), lock_wait=0.1)
        finally:
            holder.communicate()


class TestProfiles:
    def test_profiles_may_hold_prefect_variables_and_secrets(
        self, small: Project, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """They are resolved for dbt alone: no secret stays in this process's environment."""
        Variable.set("shop_file", str(small.warehouse), overwrite=True)
        Secret(value="hunter-2").save("shop-word", overwrite=True)
        small.write(
            "profiles.yml",
            """
            shop:
              target: dev
              outputs:
                dev:
                  type: duckdb
                  path: "{{ prefect.variables.shop_file }}"
                  schema: "{{ prefect.blocks.secret.shop-word }}"
            """,
        )
        small.model("a", "select '{{ target.schema | length }}' as id")
        before = dict(os.environ)
        result = build(small.core(env={})).result
        assert result.state is DbtState.SUCCESS
        assert "hunter-2" in (small.folder / "target/run_results.json").read_text()
        assert dict(os.environ) == before


@pytest.mark.usefixtures("cold_dbt")
class TestTheEnd:
    async def test_a_cancelled_build_stops_dbt_and_its_query(self, small: Project) -> None:
        """Once the cancellation is through, dbt is gone with its endless query, and the node is Cancelled."""
        small.model("b", f"{{{{ config(materialized='table') }}}} {ENDLESS}")
        ids: list[str] = []

        @flow
        async def chain() -> None:
            ids.append(str(flow_run.id))
            await dbt_build(small.core())

        running = asyncio.create_task(chain())
        await until(lambda: ids, 30)
        seen = await task_runs(
            ids[0], lambda runs: any(r.name == "model b" and r.state and r.state.is_running() for r in runs)
        )
        assert "model b" in {run.name for run in seen}
        (dbt,) = children()
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert not dbt.is_running()
        runs = {run.name: run.state for run in await task_runs(ids[0], ended(3))}
        assert {name: state.name for name, state in runs.items() if state} == {
            "dbt build": "Crashed",
            "model a": "Completed",
            "model b": "Cancelled",
        }

    def test_a_build_that_takes_too_long_is_stopped(self, small: Project) -> None:
        """The error says how long was allowed, and no dbt stays behind."""
        with pytest.raises(DbtTimeout, match=r"dbt build did not finish within 0\.5 s and was stopped"):
            build(small.core(timeout=0.5))
        assert children() == []

    async def test_a_dbt_that_is_killed_is_reported_as_killed(self, small: Project) -> None:
        """The signal is named, with what was done until then."""

        @flow
        async def chain() -> None:
            await dbt_build(small.core())

        running = asyncio.create_task(chain())
        assert await until(children, 30)
        children()[0].send_signal(signal.SIGKILL)
        with pytest.raises(DbtError, match="killed by SIGKILL; the machine may be out of memory"):
            await running

    async def test_dbt_does_not_outlive_the_process_that_started_it(self, small: Project) -> None:
        """When the flow's process is killed, its dbt interrupts its query and ends, too."""
        small.model("b", f"{{{{ config(materialized='table') }}}} {ENDLESS}")
        script = small.write(
            "run.py",
            f"""
            import asyncio
            from prefect import flow
            from tasks.dbt_core import DbtCore, dbt_build

            @flow
            async def chain():
                await dbt_build(DbtCore.model_validate_json({small.core().model_dump_json()!r}))

            asyncio.run(chain())
            """,
        )
        parent = subprocess.Popen(  # noqa: ASYNC220, S603
            [sys.executable, str(script)],
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            assert await until(lambda: children(parent.pid), 60)
            (dbt,) = children(parent.pid)
            # It is at work once it holds the warehouse open.
            assert await until(small.warehouse.exists, 60)
            await asyncio.sleep(1)
        finally:
            parent.kill()
            parent.wait()
        assert await until(lambda: not dbt.is_running(), 60)


class TestInProcess:
    def test_prefect_dbts_runner_gives_the_same_result(self, tmp_path: Path) -> None:
        """The other engine tells the same states and reasons (in its own process, as dbt leaves traces)."""
        project = everything(tmp_path)
        script = dedent(f"""
            import asyncio
            from prefect import flow
            from tasks.dbt_core import DbtBuildFailed, DbtCore, dbt_build

            @flow
            async def chain():
                dbt = DbtCore.model_validate_json({project.core(engine="prefect-dbt").model_dump_json()!r})
                try:
                    await dbt_build(dbt)
                except DbtBuildFailed as error:
                    return error.result

            print("RESULT", asyncio.run(chain()).model_dump_json())
            """)
        done = subprocess.run(  # noqa: S603
            [sys.executable, "-c", script],
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
            cwd=Path.cwd(),
        )
        line = next((text for text in done.stdout.splitlines() if text.startswith("RESULT ")), None)
        assert line is not None, done.stderr[-3000:]
        result = DbtResult.model_validate_json(line.removeprefix("RESULT "))
        assert result.counts == {"success": 9, "warn": 1, "error": 1, "fail": 1, "skipped": 3}
        assert {n.name: n.message for n in result.skipped}["further_below"] == "model broken failed"
