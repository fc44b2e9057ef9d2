"""dbt projects that are laid out as other people lay out theirs: the jobs run on them, or say why not."""

from __future__ import annotations

import asyncio
import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import pytest
from prefect.client.schemas.objects import State, StateType

from flows import build_project, full_refresh, smoke_test, source_freshness
from tasks.dbt.folders import led_out, outside, target_of
from tasks.dbt.packages import UNFINISHED
from tasks.dbt_core import DbtBuildFailed, DbtCore, DbtError, DbtInputError, DbtResult, DbtState, check_dbt
from tests.dbt_project import Project, dbt_starts
from tests.flows_fixtures import task_runs
from tests.jobs_fixtures import PREFECTS_SOCKETS, collected

__all__ = ["collected"]

__all__ = ["dbt_starts"]

pytestmark = [
    *PREFECTS_SOCKETS,
    pytest.mark.usefixtures("warm_dbt"),
]


def fill(project: Project) -> Project:
    """What other people's projects have: versions, a package, a Python model, a snapshot; no sources."""
    project.write("seeds/colours.csv", "id,name\n1,red\n2,green\n")
    project.write("dbt_packages/paints/dbt_project.yml", "{name: paints, version: '1.0'}")
    project.write("dbt_packages/paints/models/mixed.sql", "select 3 as id, 'brown' as name")
    project.write("packages.yml", "packages: [{local: ../paints}]")
    project.model("dim_v1", "select id from {{ ref('colours') }}")
    project.model(
        "dim_v2",
        "{{ config(materialized='incremental', unique_key='id') }} select id, name, now() as at_time"
        " from {{ ref('colours') }} union all select *, now() from {{ ref('mixed') }}",
    )
    project.write(
        "models/in_python.py",
        """
        def model(dbt, session):
            print("what a model prints must not land in what dbt reports")
            return dbt.ref("dim", v=2).df()
        """,
    )
    project.write(
        "snapshots/kept.yml",
        """
        snapshots:
          - name: kept
            relation: ref('colours')
            config: {unique_key: id, strategy: check, check_cols: all, schema: snaps}
        """,
    )
    project.write(
        "models/schema.yml",
        """
        models:
          - name: dim
            latest_version: 2
            versions: [{v: 1}, {v: 2}]
            columns: [{name: id, data_tests: [unique]}]
        """,
    )
    return project


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """In a folder with blanks and letters that are not ASCII, reached by a link, its output elsewhere."""
    folder = tmp_path_factory.mktemp("layouts")
    project = fill(Project(folder / "Projekt größer 数据"))
    project.set(**{"target-path": "out/target", "log-path": "out/logs"})
    (folder / "link").symlink_to(project.folder)
    project.folder = folder / "link"
    return project


@pytest.fixture(scope="module")
def built(prefect_server: str, theirs: Project) -> State[Any]:
    """How its full build ended."""
    state: State[Any] = build_project(dbt=theirs.core(), retries=0, return_state=True)
    return state


@pytest.fixture
def plain(tmp_path: Path) -> Project:
    project = Project(tmp_path / "shop")
    project.model("a", "select 1 as id")
    project.model("b", "select no_such_column from {{ ref('a') }}")
    return project


def told(state: State[Any]) -> Any:
    return state.result(raise_on_failure=False)


def results(state: State[Any]) -> dict[str, str]:
    found = told(state)
    assert isinstance(found, DbtResult | DbtBuildFailed), state.message
    nodes = found.nodes if isinstance(found, DbtResult) else found.result.nodes
    return {node.name: node.state.value for node in nodes}


class TestTheirs:
    def test_the_full_build(self, theirs: Project, built: State[Any]) -> None:
        """Every kind of node, and the versions of a model told apart: as nodes, and as task runs."""
        assert results(built) == dict.fromkeys(
            (
                "colours",
                "mixed",
                "dim.v1",
                "dim.v2",
                "in_python",
                "kept",
                "unique_dim_v1_id",
                "unique_dim_v2_id",
            ),
            "success",
        )
        assert built.state_details.flow_run_id is not None
        runs = {run.name for run in task_runs(built.state_details.flow_run_id, until=9)}
        assert {"model dim.v1", "model dim.v2", "model in_python", "snapshot kept"} <= runs
        assert (theirs.folder / "out/target/manifest.json").is_file()
        assert not {"target", "logs"} & {path.name for path in theirs.folder.iterdir()}

    def test_the_smoke_test_without_selectors(self, theirs: Project) -> None:
        """What `dbt` selects takes the place of a selector."""
        state = smoke_test(dbt=theirs.core(select=["dim.v2"]), selector=None, retries=0, return_state=True)
        assert state.name == "Completed", state.message
        seeds, smoke = told(state)
        assert {node.name for node in seeds.nodes} == {"colours"}
        assert {node.name for node in smoke.nodes} == {"dim.v2", "unique_dim_v2_id"}

    @pytest.mark.usefixtures("built")
    def test_the_full_refresh(self, theirs: Project) -> None:
        """Of one version of a model, and not of the other."""
        state = full_refresh(dbt=theirs.core(), models=["dim.v2"], retries=0, return_state=True)
        assert state.name == "Completed", state.message
        (result,) = told(state)
        assert {node.name for node in result.nodes} == {"dim.v2", "unique_dim_v2_id"}
        with duckdb.connect(str(theirs.warehouse), read_only=True) as db:
            assert db.execute("select count(*), count(distinct at_time) from dim_v2").fetchone() == (3, 1)

    def test_the_freshness_of_sources_that_it_has_not(
        self, theirs: Project, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Is nothing to fail for; the run says that there are none, and not that they lack a threshold."""
        state = source_freshness(dbt=theirs.core(), retries=0, return_state=True)
        assert (state.name, state.type) == ("NothingToLookAt", StateType.COMPLETED)
        assert (state.message or "").endswith("has no sources, so there is no age to be looked at.")
        assert (told(state).state, told(state).sources) == (DbtState.SKIPPED, [])
        (said,) = [each for each in caplog.records if each.getMessage() == state.message]
        assert said.levelname == "WARNING"

    def test_a_failed_node_names_its_compiled_file(self, theirs: Project) -> None:
        """Seen from the project, also where it is reached by a link."""
        theirs.model("broken", "select no_such_column from {{ ref('colours') }}")
        state = build_project(dbt=theirs.core(select=["broken"]), retries=0, return_state=True)
        (node,) = told(state).result.nodes
        (theirs.folder / "models/broken.sql").unlink()
        assert node.compiled_path == "out/target/compiled/shop/models/broken.sql"


@pytest.mark.no_server
class TestRefused:
    @pytest.mark.parametrize(
        ("change", "settings", "sentence"),
        [
            (
                lambda p: p.write("packages.yml", "packages: [{local: ../paints}]"),
                {"install_packages": False},
                r'1 package\(s\) specified in packages\.yml, but only 0 .* Run "dbt deps" to install',
            ),
            (lambda p: p.set(profile="{{ var('must') }}"), {}, "Required var 'must' not found in config"),
            (
                lambda p: None,
                {"selector": "smoke"},
                r"no selector 'smoke'; those in its selectors\.yml: none, or there is no such file",
            ),
            (
                lambda p: p.write(
                    "selectors.yml", "selectors: [{name: x, definition: a}, {name: y, definition: b}]"
                ),
                {"selector": "smoke"},
                r"no selector 'smoke'; those in its selectors\.yml: x, y\. Name one",
            ),
            (
                lambda p: None,
                {"env": {"DBT_PROFILE": "office"}},
                r"Profile 'office' \(of DBT_PROFILE\) .* there: shop",
            ),
            (lambda p: None, {"env": {"DBT_LOG_FORMAT": "loud"}}, "'loud' is not one of"),
        ],
        ids=["deps", "variable", "no selectors", "other selectors", "profile", "flag"],
    )
    async def test_what_a_retry_does_not_mend(
        self, plain: Project, change: Callable[[Project], Any], settings: dict[str, Any], sentence: str
    ) -> None:
        """The sentence says what is missing, and the error is of the kind that is not tried again."""
        change(plain)
        dbt = DbtCore.model_validate({**plain.core().model_dump(), **settings})
        dbt = dbt.model_copy(update={"env": {**plain.core().env, **dbt.env}})
        with pytest.raises(DbtInputError, match=sentence):
            await check_dbt(dbt)


class TestPackages:
    @pytest.fixture
    def paints(self, plain: Project) -> Path:
        """A package that the project declares, and that is not installed."""
        folder = plain.folder.parent / "paints"
        (folder / "models").mkdir(parents=True)
        (folder / "dbt_project.yml").write_text("{name: paints, version: '1.0'}")
        (folder / "models/mixed.sql").write_text("select 3 as id")
        plain.write("packages.yml", "packages: [{local: ../paints}]")
        plain.model("b", "select * from {{ ref('mixed') }}")
        return folder

    @pytest.mark.usefixtures("paints")
    def test_they_are_installed_once(
        self, plain: Project, dbt_starts: list[Any], caplog: pytest.LogCaptureFixture
    ) -> None:
        """On a fresh checkout by the first dbt that needs them, and the run's log has what was installed."""
        for expected in (["deps", "run"], ["run"]):
            dbt_starts.clear()
            state = build_project(dbt=plain.core(), retries=0, return_state=True)
            assert results(state) == dict.fromkeys(("a", "b", "mixed"), "success")
            assert [request["mode"] for request in dbt_starts] == expected
        assert [each.message for each in caplog.records if "Installing" in each.message] == [
            "Installing ../paints"
        ]

    @pytest.mark.no_server
    @pytest.mark.usefixtures("paints")
    async def test_two_at_the_same_time_install_them_once(
        self, plain: Project, caplog: pytest.LogCaptureFixture
    ) -> None:
        """The second waits for the first, and leaves alone what it finds then."""
        both = [check_dbt(plain.core(target_path=Path("target", name))) for name in "ab"]
        with caplog.at_level("INFO", "prefect.dbt"):
            await asyncio.gather(*both)
        assert [each.message for each in caplog.records].count("Installing ../paints") == 1

    @pytest.mark.no_server
    async def test_what_can_not_be_installed(self, plain: Project, paints: Path) -> None:
        """Is told in one sentence, and not tried again: it is not there."""
        shutil.rmtree(paints)
        sentence = r"The packages of \S+/shop could not be installed: dbt deps could not run: .*paints"
        with pytest.raises(DbtInputError, match=sentence):
            await check_dbt(plain.core())

    @pytest.mark.no_server
    @pytest.mark.usefixtures("paints")
    async def test_a_network_that_is_away_is_tried_again(
        self, plain: Project, dbt_starts: list[Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Three times; what it comes to then is an error that a retry of the run may mend."""
        monkeypatch.setattr("tasks.dbt.packages._PAUSE", 0.0)
        plain.write("packages.yml", "packages: [{package: dbt-labs/dbt_utils, version: 1.0.0}]")
        env = {**plain.core().env, "DBT_PACKAGE_HUB_URL": "http://127.0.0.1:1/"}
        with pytest.raises(DbtError, match=r"could not be installed: .* Connection refused") as caught:
            await check_dbt(plain.core(env=env))
        assert not isinstance(caught.value, DbtInputError)
        assert [request["mode"] for request in dbt_starts] == ["deps"] * 3

    @pytest.mark.no_server
    async def test_one_that_broke_off_is_repaired(
        self, plain: Project, paints: Path, dbt_starts: list[Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """By the next attempt, and by the next run, though there are as many folders as were declared."""
        monkeypatch.setattr("tasks.dbt.packages._PAUSE", 0.0)
        monkeypatch.setattr("tasks.dbt.checks._USERS_ERRORS", frozenset())  # as if a network were away
        brushes = paints.with_name("brushes")
        (brushes / "models").mkdir(parents=True)
        (brushes / "dbt_project.yml").write_text("{name: brushes, version: '1.0'}")
        (brushes / "models/brush.sql").write_text("select 3 as id")
        (paints / "packages.yml").write_text("packages: [{local: ../brushes}]")
        (paints / "models/mixed.sql").write_text("select * from {{ ref('brush') }}")
        await check_dbt(plain.core())  # leaves a lock file, which projects have in Git
        shutil.rmtree(plain.folder / "dbt_packages")
        dbt_starts.clear()
        brushes.rename(brushes.with_name("away"))
        with pytest.raises(DbtError, match=r"could not be installed: dbt deps could not run: .*brushes"):
            await check_dbt(plain.core())
        assert [path.name for path in (plain.folder / "dbt_packages").iterdir()] == ["paints"]
        brushes.with_name("away").rename(brushes)
        for _ in range(2):
            await check_dbt(plain.core())
        assert [request["mode"] for request in dbt_starts] == [*["deps"] * 4, "plan", "plan"]
        assert not (plain.folder / UNFINISHED).exists()

    @pytest.mark.no_server
    @pytest.mark.usefixtures("paints")
    @pytest.mark.parametrize("begun", [False, True])
    async def test_an_installation_ends_in_time(
        self, plain: Project, begun: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """One that hangs is stopped, and the sentence says after how long; another's is waited for, too."""
        if begun:
            plain.write(UNFINISHED, "")
            plain.write("dbt_packages/paints/dbt_project.yml", "")
        monkeypatch.setattr("tasks.dbt.packages.LIMIT", 0.5)
        lock = outside(plain.core()) / "packages.lock"
        lock.parent.mkdir(parents=True)
        with lock.open("w") as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            with pytest.raises(DbtError, match=r"could not be installed within 0\.5 s"):
                await check_dbt(plain.core())
        assert (plain.folder / "dbt_packages").exists() is begun


class TestSurroundings:
    def test_what_dbt_reads_in_the_environment_does_not_deafen_us(
        self, plain: Project, tmp_path: Path
    ) -> None:
        """Its log silenced, its artifacts switched off or led elsewhere: the nodes still come out right."""
        odd = {
            "DBT_LOG_FORMAT": "json",
            "DBT_LOG_LEVEL": "error",
            "DBT_QUIET": "1",
            "DBT_PRINT": "0",
            "DBT_WRITE_JSON": "0",
            "DBT_WARN_ERROR": "1",
            "DBT_TARGET_PATH": str(tmp_path / "elsewhere"),
            "DBT_PROJECT_DIR": "/no/such/folder",
        }
        env = {**plain.core().env, **odd}
        state = build_project(dbt=plain.core(env=env), retries=0, return_state=True)
        assert results(state) == {"a": "success", "b": "error"}
        compiled = {node.name: node.compiled_path for node in told(state).result.nodes}["b"]
        assert compiled == str(tmp_path / "elsewhere/compiled/shop/models/b.sql")

    def test_options_in_the_environment_are_told(
        self, plain: Project, caplog: pytest.LogCaptureFixture
    ) -> None:
        """What a worker's environment changes about a build stands in the log of the run."""
        env = {**plain.core().env, "DBT_RESOURCE_TYPES": "seed model", "DBT_FULL_REFRESH": "false"}
        build_project(dbt=plain.core(env=env), retries=0, return_state=True)
        (said,) = [record.message for record in caplog.records if "from the environment" in record.message]
        assert "environment: DBT_RESOURCE_TYPES=seed model. They" in said

    async def test_a_profile_in_the_home_folder(
        self, plain: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Is found there; without one it is said where one was looked for."""
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.delenv("DBT_PROFILES_DIR", raising=False)
        (tmp_path / ".dbt").mkdir()
        shutil.move(plain.folder / "profiles.yml", tmp_path / ".dbt" / "profiles.yml")
        assert (await check_dbt(plain.core())).adapter == "duckdb"
        (tmp_path / ".dbt" / "profiles.yml").unlink()
        with pytest.raises(DbtInputError, match=rf"No profiles\.yml in {tmp_path}/\.dbt"):
            await check_dbt(plain.core())


class TestReadOnly:
    @pytest.fixture
    def sealed(self, plain: Project, monkeypatch: pytest.MonkeyPatch) -> Project:
        """A project into which nobody may write, root included."""
        plain.warehouse = plain.folder.parent / "warehouse.duckdb"
        allowed = os.access
        monkeypatch.setattr(
            "tasks.dbt.folders.os.access",
            lambda path, mode: not Path(path).is_relative_to(plain.folder) and allowed(path, mode),
        )
        return plain

    def test_it_is_built_and_left_as_it_was(self, sealed: Project) -> None:
        """What dbt writes goes to Prefect's own folder, one for each project."""
        before = sorted(sealed.folder.rglob("*"))
        state = build_project(dbt=sealed.core(), retries=0, return_state=True)
        assert results(state) == {"a": "success", "b": "error"}
        assert sorted(sealed.folder.rglob("*")) == before
        compiled = {node.name: node.compiled_path for node in told(state).result.nodes}["b"]
        assert compiled == str(target_of(sealed.core()) / "compiled/shop/models/b.sql")
        assert Path(os.environ["PREFECT_HOME"], "dbt") in target_of(sealed.core()).parents

    @pytest.mark.no_server
    async def test_no_packages_are_installed_in_it(self, sealed: Project, dbt_starts: list[Any]) -> None:
        """dbt says what is missing."""
        sealed.write("packages.yml", "packages: [{local: ../paints}]")
        sealed.write(UNFINISHED, "")
        with pytest.raises(DbtInputError, match=r'Run "dbt deps" to install'):
            await check_dbt(sealed.core())
        assert [request["mode"] for request in dbt_starts] == ["plan"]

    @pytest.mark.no_server
    def test_what_is_said_about_folders_holds(self, sealed: Project, tmp_path: Path) -> None:
        """A folder that was named, in whichever way, is not exchanged for another."""
        assert set(led_out(sealed.core())) == {"DBT_TARGET_PATH", "DBT_LOG_PATH"}
        assert set(led_out(sealed.core(target_path=tmp_path))) == {"DBT_LOG_PATH"}
        assert set(led_out(sealed.core(env={"DBT_LOG_PATH": "x"}))) == {"DBT_TARGET_PATH"}
        sealed.set(**{"target-path": str(tmp_path / "t"), "log-path": "{{ env_var('LOGS') }}"})
        assert led_out(sealed.core()) == {}
        assert target_of(sealed.core()) == tmp_path / "t"
