"""A build that failed or was killed goes on where it ended: in another process, from another checkout."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import duckdb
import psutil  # type: ignore[import-untyped]
import pytest
from prefect import flow
from prefect.cache_policies import NO_CACHE
from prefect.runtime import flow_run

from flows import build_project
from tasks.dbt import memory
from tasks.dbt.memory import BuildRecord, Recorder, read_records
from tasks.dbt_core import DbtBuildFailed, DbtInputError, DbtNode, DbtResult, DbtState, dbt_build
from tests.dbt_project import Project, dbt_starts
from tests.flows_fixtures import Runs
from tests.jobs_fixtures import PREFECTS_SOCKETS, collected
from tests.test_dbt_core import ENDLESS

__all__ = ["collected", "dbt_starts"]

pytestmark = [
    *PREFECTS_SOCKETS,
    pytest.mark.usefixtures("warm_dbt"),
]

YEAR = datetime.now(UTC).year
TABLE = "{{ config(materialized='table') }} select '{{ invocation_id }}' as built_by"
THROUGH = "{{{{ config(materialized='ephemeral') }}}} select * from {{{{ ref('{}') }}}}"


def other_checkout(project: Project) -> None:
    """The same files in the same place, and nothing that dbt has left there."""
    aside = project.folder.with_name(f"aside-{uuid4().hex[:6]}")
    project.folder.rename(aside)
    shutil.copytree(aside, project.folder, ignore=shutil.ignore_patterns("target", "logs", "*.duckdb*"))
    for file in aside.glob("*.duckdb*"):
        file.rename(project.folder / file.name)  # the warehouse is no part of the checkout


def built_by(project: Project, *tables: str) -> dict[str, str]:
    with duckdb.connect(str(project.warehouse), read_only=True) as db:
        rows = {name: db.execute(f"select any_value(built_by) from {name}").fetchone() for name in tables}  # noqa: S608
    return {name: str(row[0]) for name, row in rows.items() if row}


def names(nodes: list[DbtNode]) -> set[str]:
    return {node.name for node in nodes}


# -- what failed, and what was skipped for it ---------------------------------------------------------------


@dataclass
class Twice:
    """A build that failed in the middle, and its retry from another checkout after a repair."""

    project: Project
    first: DbtResult
    first_id: UUID
    first_tables: dict[str, str] = field(default_factory=dict)
    second: DbtResult | None = None
    second_id: UUID | None = None


@pytest.fixture(scope="module")
def twice(prefect_server: str, tmp_path_factory: pytest.TempPathFactory) -> Twice:
    project = Project(tmp_path_factory.mktemp("middle") / "checkout")
    project.set(vars={"limit": 3, "note": "the project's"})
    project.model("top", TABLE)
    project.model("middle", f"{TABLE}, id from {{{{ ref('top') }}}}, range(3) as ids(id)")
    project.model("through", THROUGH.format("top"))
    project.model("beside", f"{TABLE} from {{{{ ref('through') }}}}")
    project.model(
        "below",
        f"{TABLE}, {{{{ 'true' if var('limit') is none else 'false' }}}} as no_limit,"
        " '{{ var('note') }}' as note from {{ ref('middle') }}",
    )
    project.model("further", f"{TABLE} from {{{{ ref('below') }}}}")
    project.model(
        "happened",
        "{{ config(materialized='table', event_time='at_time') }}"  # noqa: S608
        f" select make_timestamp({YEAR} - i, 1, 1, 0, 0, 0) as at_time, i from range(3) as years(i)",
    )
    project.model("by_year", _by_year("case when i = 1 then error('a bad year') end"))
    project.write("tests/no_twos.sql", "select * from {{ ref('middle') }} where id = 2")
    project.write(
        "models/schema.yml", "models: [{name: top, columns: [{name: built_by, data_tests: [unique]}]}]"
    )
    dbt = project.core(vars={"limit": None, "note": "mine: {still}"}, exclude=["never_there"])
    ids: list[UUID] = []

    @flow(name="first")
    async def first() -> DbtResult:
        ids.append(UUID(str(flow_run.id)))
        with pytest.raises(DbtBuildFailed) as caught:
            await dbt_build(dbt)
        return caught.value.result

    found = Twice(project, asyncio.run(first()), ids[0])
    found.first_tables = built_by(project, "top", "middle", "beside")
    other_checkout(project)
    project.write("tests/no_twos.sql", "select * from {{ ref('middle') }} where id = 3")
    project.model("by_year", _by_year("null"))
    state = build_project(dbt=project.core(), retry_of=ids[0], retries=0, return_state=True)
    assert state.state_details.flow_run_id is not None
    found.second_id = state.state_details.flow_run_id
    found.second = asyncio.run(state.aresult())
    return found


def _by_year(checked: str) -> str:
    batches = f"batch_size='year', event_time='at_time', begin='{YEAR - 2}-01-01'"
    return (
        f"{{{{ config(materialized='incremental', incremental_strategy='microbatch', {batches}) }}}}"  # noqa: S608
        f" select *, '{{{{ invocation_id }}}}' as built_by, {checked} as ok from {{{{ ref('happened') }}}}"
    )


def test_a_failing_test_in_the_middle_skips_only_what_is_below_it(twice: Twice) -> None:
    """What hangs beside it is built, and what is below names the test."""
    assert names(twice.first.failed) == {"no_twos", "by_year"}
    assert names(twice.first.skipped) == {"below", "further"}
    assert {node.message for node in twice.first.skipped} == {"test no_twos failed"}
    assert {"top", "middle", "beside", "happened"} <= names(twice.first.built)


def test_a_retry_runs_what_failed_and_was_skipped_and_nothing_else(twice: Twice) -> None:
    """Also from another checkout, without a target folder; the tables of the others are not touched."""
    assert twice.second is not None
    ran = [node for node in twice.second.nodes if not node.earlier]
    assert names(ran) == {"no_twos", "below", "further", "by_year"}
    assert built_by(twice.project, "top", "middle", "beside") == twice.first_tables
    again = built_by(twice.project, "below", "further")
    assert set(again.values()) == {twice.second.invocation_id}


def test_the_result_of_a_retry_has_every_node(twice: Twice) -> None:
    """Those that were done before are marked, and the sentence counts them; an ephemeral model is none."""
    assert twice.second is not None
    assert twice.second.state is DbtState.SUCCESS
    assert names(twice.second.nodes) == names(twice.first.nodes)
    for run_id in (twice.first_id, twice.second_id):
        (record,) = asyncio.run(read_records(run_id))
        assert names(record.nodes) == names(twice.first.nodes)
        assert record.hidden == {"model.shop.through"}
    assert twice.second.message == "9 of 9 nodes succeeded; 5 done in an earlier attempt"


def test_a_retry_of_a_microbatch_model_runs_only_the_batches_that_failed(twice: Twice) -> None:
    """The batches that were done keep their rows; those that failed have new ones."""
    assert twice.second is not None
    with duckdb.connect(str(twice.project.warehouse), read_only=True) as db:
        rows = dict(db.execute("select i, built_by from by_year").fetchall())
    assert rows == {
        2: twice.first.invocation_id,
        1: twice.second.invocation_id,
        0: twice.first.invocation_id,
    }


def test_a_retry_has_the_variables_of_the_build_that_it_retries(twice: Twice) -> None:
    """Those of its own command line do not count, and null stays null, which `dbt retry` makes `None`."""
    with duckdb.connect(str(twice.project.warehouse), read_only=True) as db:
        assert db.execute("select no_limit, note from below").fetchone() == (True, "mine: {still}")


def test_a_retry_can_be_retried_and_one_that_left_nothing_does_nothing(
    twice: Twice, dbt_starts: list[Any]
) -> None:
    """The record of a retry has what was done before it; dbt is not even started."""
    state = build_project(dbt=twice.project.core(), retry_of=twice.second_id, return_state=True)
    assert (state.name, state.message) == (
        "NothingToRetry",
        f"flow run {twice.second_id} left nothing undone: every node succeeded",
    )
    assert dbt_starts == []


@pytest.mark.parametrize(
    "which", ["unknown", "another project", "another environment", "both ways", "engine"]
)
def test_what_can_not_be_retried_is_refused(
    twice: Twice, tmp_path: Path, dbt_starts: list[Any], monkeypatch: pytest.MonkeyPatch, which: str
) -> None:
    """With what is wrong about it, before dbt starts."""
    dbt, more, sentence = twice.project.core(), {}, ""
    if which == "unknown":
        more, sentence = {"retry_of": uuid4()}, "has no dbt build that could be retried"
    elif which == "another project":
        other = Project(tmp_path)
        other.set(name="other")
        dbt, sentence = other.core(), "built the dbt project 'shop', and .* is 'other'"
    elif which == "another environment":
        monkeypatch.setenv("ELT_PREFIX", "dev.")
        sentence = "built in another environment .its prefix is '', here it is 'dev.'."
    elif which == "both ways":
        more, sentence = {"from_models": ["top"]}, "from_models and retry_of are two things"
    else:
        dbt, sentence = twice.project.core(engine="prefect-dbt"), "Only with engine='subprocess'"
    with pytest.raises(DbtInputError, match=sentence):
        build_project(**{"dbt": dbt, "retry_of": twice.first_id, **more})
    assert dbt_starts == []


# -- in the same run ----------------------------------------------------------------------------------------


def test_a_retry_inside_the_run_goes_on_and_a_second_build_begins_anew(tmp_path: Path) -> None:
    """Prefect's own retry of the task does what is left; the same call again is meant to build again."""
    project = Project(tmp_path)
    project.model("a", TABLE)
    project.model("b", f"{TABLE} from {{{{ ref('a') }}}} where error('not yet') is null")

    def repair(*_: Any) -> bool:
        project.model("b", f"{TABLE} from {{{{ ref('a') }}}}")
        return True

    @flow
    async def chain() -> list[DbtResult]:
        options = {"retries": 1, "retry_condition_fn": repair, "cache_policy": NO_CACHE}
        return [await dbt_build.with_options(**options)(project.core()) for _ in range(2)]

    retried, anew = asyncio.run(chain())
    assert [(node.name, node.earlier) for node in retried.nodes] == [("a", True), ("b", False)]
    assert [(node.name, node.earlier) for node in anew.nodes] == [("a", False), ("b", False)]


@pytest.mark.parametrize("mended", [False, True], ids=["still fails", "passes now"])
def test_a_retry_asks_the_unit_tests_before_it_builds_their_model(tmp_path: Path, mended: bool) -> None:
    """A model whose unit test fails again is skipped again, with all below it; it is built once that passes.

    Its own test and one above it are what could make the order go round in a circle.
    """
    project = Project(tmp_path)
    project.model("top", "select 1 as id")
    project.model("doubled", "select id * 3 as id from {{ ref('top') }}")
    project.model("below", "select * from {{ ref('doubled') }}")
    project.write(
        "models/schema.yml",
        """
        models:
          - {name: top, columns: [{name: id, data_tests: [unique]}]}
          - {name: doubled, columns: [{name: id, data_tests: [unique]}]}
        unit_tests:
          - name: doubles
            model: doubled
            given: [{input: ref('top'), rows: [{id: 1}]}]
            expect: {rows: [{id: 2}]}
        """,
    )

    def repair(*_: Any) -> bool:
        if mended:
            project.model("doubled", "select id * 2 as id from {{ ref('top') }}")
        return True

    @flow
    async def chain() -> DbtResult:
        options = {"retries": 1, "retry_condition_fn": repair, "cache_policy": NO_CACHE}
        try:
            return await dbt_build.with_options(**options)(project.core())
        except DbtBuildFailed as error:
            return error.result

    nodes = {node.name: (node.state, node.earlier) for node in asyncio.run(chain()).nodes}
    asked = DbtState.SUCCESS if mended else DbtState.FAIL
    behind = (DbtState.SUCCESS if mended else DbtState.SKIPPED, False)
    assert nodes == {
        "top": (DbtState.SUCCESS, True),
        "unique_top_id": (DbtState.SUCCESS, True),
        "doubles": (asked, False),
        "doubled": behind,
        "unique_doubled_id": behind,
        "below": behind,
    }


def test_a_warehouse_in_memory_is_built_again_from_the_beginning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What was built there went with the process; that is said."""
    project = Project(tmp_path)
    project.model("a", TABLE)
    project.model("b", f"{TABLE} from {{{{ ref('a') }}}} where error('not yet') is null")

    def repair(*_: Any) -> bool:
        project.model("b", f"{TABLE} from {{{{ ref('a') }}}}")
        return True

    @flow
    async def chain() -> DbtResult:
        options = {"retries": 1, "retry_condition_fn": repair}
        return await dbt_build.with_options(**options)(project.core(env={"SHOP_WAREHOUSE": ":memory:"}))

    result = asyncio.run(chain())
    assert [(node.name, node.earlier) for node in result.nodes] == [("a", False), ("b", False)]
    assert "everything is built again" in caplog.text


def test_what_no_retry_mends_is_not_tried_again(tmp_path: Path) -> None:
    """Retries are for what may pass: with a wrong folder or selection the first attempt is the last."""
    with pytest.raises(DbtInputError, match="does not exist: set project_dir to the right one"):
        build_project(dbt=Project(tmp_path).core(project_dir=tmp_path / "nowhere"), retry_delay=3600)


# -- killed -------------------------------------------------------------------------------------------------


def until(what: Callable[[], Any], seconds: float = 300) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < deadline, "it did not come to that in time"
        time.sleep(0.1)
    return found


@pytest.mark.timeout(600)
def test_a_build_that_was_killed_goes_on_from_another_checkout(tmp_path: Path) -> None:
    """SIGKILL of flow and dbt in mid-build, the run retried: what was finished is not run again."""
    project = Project(tmp_path / "checkout")
    project.model("a", TABLE)
    project.model("through", THROUGH.format("a"))
    project.model("b", f"{TABLE} from {{{{ ref('through') }}}}")
    project.model("slow", "{{ config(materialized='table') }} " + ENDLESS.replace("ref('a')", "ref('b')"))
    project.model("after", f"{TABLE} from {{{{ ref('slow') }}}}")
    project.write(
        "models/schema.yml", "models: [{name: b, columns: [{name: built_by, data_tests: [unique]}]}]"
    )
    runs = Runs()
    run_id = runs.create(build_project, {"dbt": json.loads(project.core().model_dump_json()), "retries": 0})
    script = [sys.executable, str(Path(__file__).with_name("dbt_crash.py")), str(run_id)]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    with subprocess.Popen(script, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:  # noqa: S603

        def done() -> set[str]:
            assert process.poll() is None, "it ended by itself"
            return {node.name for record in asyncio.run(read_records(run_id)) for node in record.done}

        try:
            until(lambda: done() >= {"a", "b", "unique_b_built_by"})
        finally:
            family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
            for each in family:
                with suppress(psutil.Error):  # it has ended meanwhile
                    each.kill()
            psutil.wait_procs(family, 10)
    before = built_by(project, "a", "b")
    other_checkout(project)
    project.model("slow", TABLE)

    state = runs.run(build_project, run_id)

    assert state.name == "Completed", state.message
    result: DbtResult = asyncio.run(state.aresult())
    assert {node.name: node.earlier for node in result.nodes} == {
        "a": True,
        "b": True,
        "unique_b_built_by": True,
        "slow": False,
        "after": False,
    }
    assert built_by(project, "a", "b") == before
    assert set(built_by(project, "slow", "after").values()) == {result.invocation_id}


# -- the record ---------------------------------------------------------------------------------------------


def _record(**more: Any) -> BuildRecord:
    return BuildRecord(
        build="x",
        project="shop",
        asked={"vars": {"a": "--> <!-- "}},
        started_at=datetime.now(UTC),
        attempt=1,
        **more,
    )


def test_the_record_says_the_same_after_a_journey_through_the_api() -> None:
    """Nodes, batches and what was asked for, whatever characters are in them."""
    node = DbtNode(
        unique_id="model.shop.a",
        name="a",
        resource_type="model",
        state=DbtState.WARN,
        message="--> <b>",
        rows=3,
        failures=1,
        duration=1.25,
        compiled_path="target/a.sql",
        group="g",
        owner="o",
        earlier=True,
    )
    batches = {"successful": [["2026-01-01T00:00:00+00:00", "2026-02-01T00:00:00+00:00"]], "failed": []}

    @flow
    async def keeping() -> tuple[BuildRecord, list[BuildRecord]]:
        record = _record()
        recorder = Recorder(record)
        recorder.note(node, batches)
        recorder.finished()
        await recorder.close()
        return record, await read_records(UUID(str(flow_run.id)))

    record, (found,) = asyncio.run(keeping())
    assert found == record.model_copy(
        update={"nodes": [node], "batches": {"model.shop.a": batches}, "complete": True}
    )


def test_a_build_goes_on_when_what_is_done_can_not_be_recorded(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An API that is away costs the memory and one warning, not the build."""

    def away() -> Any:
        raise OSError("nobody there")

    @flow
    async def keeping() -> None:
        recorder = Recorder(_record())
        with monkeypatch.context() as patch:
            patch.setattr(memory, "get_client", away)
            for name in "ab":
                recorder.note(
                    DbtNode(unique_id=name, name=name, resource_type="model", state=DbtState.SUCCESS)
                )
                await asyncio.sleep(0.6)
            await recorder.close()

    with caplog.at_level(logging.WARNING):
        asyncio.run(keeping())
    assert caplog.text.count("What is done can't be recorded (nobody there)") == 1


def test_many_nodes_are_written_in_few_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two thousand nodes that end within one pause cost a write at its beginning and one at the end."""
    writes: list[int] = []
    monkeypatch.setattr(memory, "_PAUSE", 600.0)

    @flow
    async def keeping() -> None:
        recorder = Recorder(_record())
        write = recorder._write

        async def counted() -> float:
            writes.append(1)
            return await write()

        monkeypatch.setattr(recorder, "_write", counted)
        for number in range(2000):
            recorder.note(
                DbtNode(unique_id=f"m{number}", name="m", resource_type="model", state=DbtState.SUCCESS)
            )
            if number % 20 == 0:
                await asyncio.sleep(0.01)
        await recorder.close()

    asyncio.run(keeping())
    assert len(writes) == 2
