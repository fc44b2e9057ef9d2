"""Declared jobs: what a declaration must say, and two of them against their APIs in the sandbox."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import duckdb
import httpx
import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from pydantic import SecretStr

from blocks import HttpJob
from blocks.dashboards import power_bi_refresh, tableau_extract_refresh
from blocks.http import AuthError, BadReply, VendorError, VendorUnavailable
from flows import sync_connections
from sandbox import Sandbox, catalog
from tasks.dbt.lineage import Lineage
from tasks.http_job import TOOL, HttpJobRun, http_job, http_job_check
from tasks.http_job_vendor import HttpJobVendor
from tasks.jobs import (
    InputError,
    Intent,
    JobCancelled,
    JobFailed,
    JobHandle,
    JobPolicy,
    JobResult,
    JobState,
    JobTimeout,
    MemoryJournal,
    PlainRequest,
    cancel_job,
    run_job,
)
from tests.jobs_fixtures import PREFECTS_SOCKETS, collected, until

__all__ = ["collected"]

pytestmark = [
    *PREFECTS_SOCKETS,
    # Prefect's, on every line that a task outside of a flow logs.
    pytest.mark.filterwarnings("ignore:.*without a flow run id:UserWarning"),
]
MODEL, WORKBOOK = (spec.dashboard_id for spec in catalog.DASHBOARDS)


class Desk:
    """One dashboard of the sandbox, refreshed through the engine."""

    def __init__(self, box: Sandbox, product: str) -> None:
        self.box = box
        self.product = product
        if product == "power_bi":
            self.board, self.arguments = MODEL, {"group_id": catalog.POWER_BI_GROUP, "dataset_id": MODEL}
        else:
            self.board, self.arguments = WORKBOOK, {"workbook_id": WORKBOOK}
        self.job = self.declared()
        self.journal = MemoryJournal()

    def declared(self, **changes: Any) -> HttpJob:
        """The declaration, with a short grace and what else a test changes."""
        if self.product == "power_bi":
            job = power_bi_refresh(
                catalog.POWER_BI_TENANT,
                catalog.POWER_BI_CLIENT_ID,
                catalog.POWER_BI_CLIENT_SECRET,
                base_url=self.box.power_bi_url,
                login_url=self.box.power_bi_login_url,
                app_url=f"{self.box.url}/power_bi/app",
            )
        else:
            job = tableau_extract_refresh(
                self.box.tableau_url,
                catalog.TABLEAU_TOKEN_NAME,
                catalog.TABLEAU_TOKEN_SECRET,
                site=catalog.TABLEAU_SITE,
            )
        return job.model_copy(update={"grace": 0.4, **changes})

    def change(self, **changes: Any) -> None:
        self.job = self.job.model_copy(update=changes)

    def behave(self, **changes: Any) -> None:
        self.box.dashboards.set(self.board, **changes)

    def fault(self, **fields: Any) -> int:
        return self.box.faults.add(vendor=self.product, **fields)

    def parameters(self, **policy: Any) -> HttpJobRun:
        settings = JobPolicy(**{"poll": 0.05, "timeout": 90.0, **policy})
        return HttpJobRun(job=self.job, arguments=self.arguments, policy=settings)

    async def run(self, **policy: Any) -> JobResult:
        """One attempt; attempts of one desk are retries of each other."""
        parameters = self.parameters(**policy)
        request = PlainRequest(parameters.resource_id, "run", "the dashboard", None)
        return await run_job(HttpJobVendor(self.job), request, parameters.policy, journal=self.journal)

    @property
    def starts(self) -> int:
        """How many start requests came in."""
        return self.box.requests.count(vendor=self.product, method="POST", path="refresh(es)?$")

    @property
    def cancels(self) -> int:
        return self.box.requests.count(vendor=self.product, method="DELETE") + self.box.requests.count(
            vendor=self.product, method="PUT"
        )

    @property
    def refreshes(self) -> list[str]:
        return [refresh.refresh_id for refresh in self.box.dashboards.refreshes_of(self.board)]

    @property
    def words(self) -> list[str]:
        return [refresh.at()[0] for refresh in self.box.dashboards.refreshes_of(self.board)]

    async def until_watched(self) -> None:
        await until(lambda: bool(self.journal.entries) and self.entry.handle is not None)

    def end_first(self) -> None:
        """Let the oldest refresh succeed now."""
        self.box.dashboards.refreshes_of(self.board)[0].timeline.finish("succeeded")

    @property
    def entry(self) -> Any:
        (entry,) = self.journal.entries.values()
        return entry


@pytest.fixture
def box(sandbox: Sandbox) -> Sandbox:
    """A sandbox whose warehouse has ten rows for each dashboard."""
    with duckdb.connect(str(sandbox.warehouse.path)) as warehouse:
        warehouse.execute("CREATE SCHEMA marts")
        for spec in catalog.DASHBOARDS:
            warehouse.sql("SELECT range AS n FROM range(10)").create(spec.table)
    return sandbox


@pytest.fixture(params=["power_bi", "tableau"])
def desk(box: Sandbox, request: pytest.FixtureRequest) -> Desk:
    return Desk(box, request.param)


@pytest.fixture
def power_bi(box: Sandbox) -> Desk:
    return Desk(box, "power_bi")


@pytest.fixture
def tableau(box: Sandbox) -> Desk:
    return Desk(box, "tableau")


# -- ends


@pytest.mark.parametrize(
    ("outcome", "state", "error"),
    [
        ("succeed", JobState.SUCCEEDED, None),
        ("fail", JobState.FAILED, JobFailed),
        ("cancel", JobState.CANCELLED, JobCancelled),
    ],
)
async def test_ends(desk: Desk, outcome: str, state: JobState, error: type[Exception] | None) -> None:
    """Each end of a refresh has its class, with the vendor's reason, the duration and the page."""
    desk.behave(outcome=outcome)
    if error is None:
        result = await http_job(desk.parameters())
    else:
        with pytest.raises(error) as caught:
            await http_job(desk.parameters())
        result = caught.value.result  # type: ignore[attr-defined]
    assert (result.state, result.job_id) == (state, desk.refreshes[0])
    assert result.name == desk.box.dashboards.dashboard(desk.board).spec.name
    assert result.duration is not None
    assert desk.board in str(result.url)
    assert (await asyncio.to_thread(httpx.get, str(result.url))).status_code == 200
    if outcome == "fail":
        reason = {"power_bi": "CredentialsNotSpecified", "tableau": "Unable to connect"}
        assert reason[desk.product] in str(result.message)


async def test_an_unknown_word(power_bi: Desk, caplog: pytest.LogCaptureFixture) -> None:
    """A word that is in no list is waited through, and said."""
    power_bi.behave(outcome="unknown_word", word="Pondering")
    waiting = asyncio.create_task(power_bi.run())
    await until(lambda: "'Pondering'" in caplog.text)
    power_bi.end_first()
    assert (await waiting).state is JobState.SUCCEEDED


async def test_a_finish_code_before_the_end(tableau: Desk, caplog: pytest.LogCaptureFixture) -> None:
    """Tableau's finish code says nothing before there is a completedAt."""
    tableau.behave(duration=0.5)
    tableau.fault(kind="null_fields", fields=["startedAt"], method="GET", path="/jobs/")
    assert (await tableau.run()).state is JobState.SUCCEEDED
    assert "not in its contract" not in caplog.text


async def test_not_visible_yet(power_bi: Desk) -> None:
    """A refresh that is in no reply for a while is waited for; one that Power BI dropped is an error."""
    grace = power_bi.job.grace
    power_bi.change(grace=30)
    power_bi.behave(visibility_delay=1.5)
    assert (await power_bi.run()).state is JobState.SUCCEEDED
    power_bi.change(grace=grace)
    power_bi.behave(visibility_delay=600)
    power_bi.journal = MemoryJournal()
    with pytest.raises(VendorError, match=r"PowerBIEntityNotFound|not in its replies"):
        await power_bi.run(outage=0.5)


# -- never twice


async def test_a_lost_reply(desk: Desk) -> None:
    """A start whose reply was lost is found in the list, not sent again."""
    desk.behave(visibility_delay=0.2, duration=0.8)
    desk.fault(kind="drop_after", method="POST", path="refresh(es)?$", times=1)
    result = await desk.run()
    assert [result.job_id] == desk.refreshes
    assert desk.starts == 1


async def test_a_lost_reply_and_nothing_to_find_it_by(desk: Desk) -> None:
    """Without `find` a start whose reply was lost is never sent again; it is said what to look for."""
    desk.change(find=None)
    desk.fault(kind="drop_after", method="POST", path="refresh(es)?$", times=1)
    for _ in range(2):
        with pytest.raises(VendorError, match=r"does not say how to find it.*Look in (Power BI|Tableau)"):
            await desk.run()
    assert desk.starts == 1
    assert desk.entry.open


async def test_a_start_that_may_be_repeated(desk: Desk) -> None:
    """With `repeatable` it is sent again, and the job that is in its way then is known as ours."""
    desk.change(find=None, start=desk.job.start.model_copy(update={"repeatable": True}))
    desk.behave(duration=2)
    desk.fault(kind="drop_after", method="POST", path="refresh(es)?$", times=1)
    if desk.product == "tableau":  # its list is of all workbooks, so only `find` could tell whose job it is
        desk.fault(kind="drop", method="POST", path="refresh(es)?$", times=1, after=1)
    result = await desk.run()
    assert desk.starts >= 2
    assert result.state is JobState.SUCCEEDED
    assert result.job_id in desk.refreshes


async def test_a_reply_without_an_id(power_bi: Desk) -> None:
    """A start that was accepted without saying the id is looked for, too."""
    power_bi.fault(kind="status", status=202, method="POST", path="refreshes$", times=1)
    with pytest.raises(BadReply, match="no job id at Location"):
        await power_bi.run(outage=0)
    assert power_bi.starts == 1


async def test_a_retry_attaches(desk: Desk) -> None:
    """A retry after an outage attaches to the job of the first attempt."""
    desk.behave(outcome="stuck")
    first = asyncio.create_task(desk.run(outage=0.2))
    await desk.until_watched()
    desk.box.pause()
    with pytest.raises(VendorUnavailable, match="was not touched"):
        await first
    desk.box.resume()
    desk.end_first()
    assert [(await desk.run()).job_id] == desk.refreshes
    assert desk.starts == 1


@pytest.mark.parametrize("status", [429, 503])
async def test_a_bad_moment(desk: Desk, status: int) -> None:
    """A start that was surely refused is sent again; polls that fail are borne."""
    headers = {"Retry-After": "0"} if status == 429 else {}
    if status == 429:
        desk.fault(kind="status", status=429, headers=headers, method="POST", path="refresh(es)?$", times=2)
    desk.fault(kind="status", status=status, headers=headers, method="GET", path="refreshes|jobs", times=3)
    assert (await desk.run()).state is JobState.SUCCEEDED
    assert len(desk.refreshes) == 1


async def test_a_session_that_ends(desk: Desk) -> None:
    """A token that is no longer good is asked for anew, once: also where somebody else's sign-in ended it."""
    desk.behave(duration=0.8)
    running = asyncio.create_task(desk.run())
    await desk.until_watched()
    if desk.product == "power_bi":
        desk.box.dashboards.tokens.clear()
    else:
        desk.box.dashboards.new_session()
    before = desk.box.dashboards.sign_ins
    assert (await running).state is JobState.SUCCEEDED
    assert desk.box.dashboards.sign_ins == before + 1


# -- already running


@pytest.mark.parametrize("conflict", [400, 409])
async def test_ours_comes_after_theirs(desk: Desk, conflict: Any) -> None:
    """A refresh that runs already is waited for, and then ours is started: data before it is not enough."""
    desk.box.dashboards.settings.conflict = conflict
    desk.behave(duration=0.6)
    theirs = desk.box.dashboards.refresh(desk.board)
    result = await desk.run()
    assert [theirs.refresh_id, result.job_id] == desk.refreshes
    assert theirs.at()[0] == "succeeded"


@pytest.mark.parametrize("on_active", ["adopt", "skip", "fail"])
async def test_other_ways_with_theirs(desk: Desk, on_active: str) -> None:
    """A refresh that runs already is taken over, left alone, or a failure, as the policy says."""
    desk.behave(outcome="stuck")
    theirs = desk.box.dashboards.refresh(desk.board)
    if on_active == "fail":
        with pytest.raises(JobFailed, match="running already"):
            await desk.run(on_active=on_active)
    else:
        waiting = asyncio.create_task(desk.run(on_active=on_active))
        if on_active == "adopt":
            await desk.until_watched()
            desk.end_first()
        result = await waiting
        assert result.state is (JobState.SUCCEEDED if on_active == "adopt" else JobState.SKIPPED)
        assert result.job_id == theirs.refresh_id
    assert desk.refreshes == [theirs.refresh_id]


async def test_another_workbooks_job_is_not_ours(tableau: Desk) -> None:
    """Tableau's list is of all workbooks: a job of another one is not taken for ours."""
    tableau.fault(kind="drop", method="POST", path="refresh$", times=1)
    boards = tableau.box.dashboards
    other = boards.dashboards[MODEL]
    object.__setattr__(other.spec, "product", "tableau")
    try:
        running = asyncio.create_task(tableau.run())
        await until(lambda: tableau.starts == 1)
        theirs = boards.refresh(MODEL)
        result = await running
    finally:
        object.__setattr__(other.spec, "product", "power_bi")
    assert result.job_id != theirs.refresh_id
    assert [result.job_id] == tableau.refreshes


# -- cancelling


async def test_cancelled_in_mid_run(desk: Desk) -> None:
    """Cancelling the run cancels the refresh."""
    desk.behave(outcome="stuck")
    running = asyncio.create_task(desk.run())
    await desk.until_watched()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert (desk.words, desk.cancels) == (["cancelled"], 1)
    assert desk.entry.result.state is JobState.CANCELLED


async def test_stuck(desk: Desk) -> None:
    """A refresh that never ends is cancelled at the timeout."""
    desk.behave(outcome="stuck")
    with pytest.raises(JobTimeout, match=r"did not end in 0\.5 s; it was cancelled"):
        await desk.run(timeout=0.5)
    assert desk.words == ["cancelled"]


async def test_no_way_to_cancel(desk: Desk) -> None:
    """Where no cancellation is declared it is said that the job goes on, with its page."""
    desk.change(cancel=None)
    desk.behave(outcome="stuck")
    with pytest.raises(JobTimeout, match=r"http-job can't cancel; it goes on.*http"):
        await desk.run(timeout=0.5)
    assert desk.words == ["running"]


async def test_cancelling_what_has_ended(desk: Desk) -> None:
    """A cancellation that comes too late says how the job had ended."""
    result = await desk.run()
    handle = desk.entry.handle
    async with desk.job.api():
        assert (await cancel_job(HttpJobVendor(desk.job), handle)).words == "it had ended already: succeeded"
    assert result.state is JobState.SUCCEEDED


async def test_a_cancellation_that_fails(desk: Desk) -> None:
    """A cancellation that is refused for another reason is said to be."""
    desk.behave(outcome="stuck")
    desk.fault(kind="status", status=403, method="DELETE" if desk.product == "power_bi" else "PUT")
    with pytest.raises(JobTimeout, match=r"could not be cancelled and may go on.*403"):
        await desk.run(timeout=0.5)


async def test_cancelled_from_another_process(desk: Desk) -> None:
    """By the block's name and what is in the journal a hook finds and cancels the job."""
    await desk.job.save(f"hook-{desk.product.replace('_', '-')}", overwrite=True)  # type: ignore[misc]
    desk.job = await HttpJob.aload(f"hook-{desk.product.replace('_', '-')}")
    desk.behave(outcome="stuck")
    desk.fault(kind="drop_after", method="POST", path="refresh(es)?$", times=1)
    vendor = HttpJobVendor(desk.job)
    parameters = desk.parameters()
    request = PlainRequest(parameters.resource_id, "run", "", None)
    intent = Intent(marker="m", since=datetime.now(UTC).replace(microsecond=0))
    async with vendor.session():
        with pytest.raises(VendorUnavailable):
            await vendor.start(request, intent)
    assert vendor.block
    theirs = await TOOL.vendor(vendor.block)
    async with theirs.session():
        handle = await theirs.find(request, intent)
        assert handle
        assert (await cancel_job(theirs, handle)).words == "it was cancelled"
    assert desk.words == ["cancelled"]


# -- many at a time


async def test_many_jobs_few_requests(tableau: Desk) -> None:
    """Fifty of Tableau's jobs are seen with one request; what is not on the list is asked for by itself."""
    tableau.behave(outcome="stuck")
    handles = []
    for _ in range(50):
        refresh = tableau.box.dashboards.refresh(tableau.board)
        handles.append(
            JobHandle(
                vendor="http-job",
                resource_id=tableau.parameters().resource_id,
                job_id=refresh.refresh_id,
                started_at=datetime.now(UTC),
            )
        )
        tableau.box.dashboards.finish(refresh, "failed")
    vendor = HttpJobVendor(tableau.job)
    async with vendor.session():
        await vendor.observe(handles[:1])  # signs in, and looks the workbook up
        before = tableau.box.requests.count(vendor="tableau")
        seen = await vendor.observe(handles)
        assert tableau.box.requests.count(vendor="tableau") == before + 1
        tableau.box.dashboards.refreshes_of(tableau.board)[3].hidden_until = float("inf")
        again = await vendor.observe(handles)
        assert tableau.box.requests.count(vendor="tableau") == before + 3
    assert {status.state for status in (*seen.values(), *again.values())} == {JobState.FAILED}  # type: ignore[union-attr]
    assert len(again) == 50


# -- before anything is started


async def test_checked(desk: Desk) -> None:
    """A check finds the name, and refuses what does not exist, is listed twice or can't be refreshed."""
    (found,) = await http_job_check([desk.parameters()])
    assert found.request.name == desk.box.dashboards.dashboard(desk.board).spec.name
    assert not found.counts_rows  # the declaration reads none
    with pytest.raises(InputError, match="listed more than once"):
        await http_job_check([desk.parameters()] * 2)
    nobodys = desk.parameters().model_copy(
        update={"arguments": {**desk.arguments, next(reversed(desk.arguments)): str(UUID(int=7))}}
    )
    with pytest.raises(InputError, match=r"knows nothing at .*Nothing was started"):
        await http_job_check([nobodys])
    if desk.product == "power_bi":
        desk.behave(refreshable=False)
        (found,) = await http_job_check([desk.parameters()])
        assert "can not be refreshed" in str(found.problem)
        with pytest.raises(InputError, match="can not be refreshed"):
            await http_job(desk.parameters())
    assert desk.starts == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({}, "The argument 'group_id' is missing"),
        (
            {"group_id": "x", "dataset_id": MODEL},
            "The argument 'group_id' is not right: it does not look like",
        ),
        ({"workspace": 1}, "'workspace' is no parameter of this job. It takes group_id, dataset_id"),
        ({"group_id": MODEL, "dataset_id": MODEL, "retry_count": "many"}, "'retry_count' is not right"),
        ({"group_id": MODEL, "dataset_id": True}, "'dataset_id' is not right: it is no text"),
    ],
)
async def test_wrong_arguments(power_bi: Desk, arguments: dict[str, Any], said: str) -> None:
    """Arguments are checked against the declaration before anything is asked."""
    run = HttpJobRun(job=power_bi.job, arguments=arguments)
    with pytest.raises(InputError) as caught:
        await http_job_check([run])
    assert said in str(caught.value)
    assert power_bi.box.requests.count(vendor="power_bi") == 0


async def test_rejected_rows_that_nobody_declared(power_bi: Desk) -> None:
    """A limit of rejected rows, and no declaration of where their number is, is refused before the start."""
    for refused in (
        http_job_check([power_bi.parameters(max_rows_rejected=0)]),
        http_job(power_bi.parameters(max_rows_rejected=0)),
    ):
        with pytest.raises(InputError, match=r"does not say where `rows_rejected` is.*Nothing was started"):
            await refused
    assert power_bi.starts == 0


def test_a_wrong_secret_is_one_line(desk: Desk, caplog: Any, capfd: Any) -> None:
    """Wrong and masked credentials are said in one line, without a traceback and without the secret."""
    for secret, said in (("a-wrong-one", "refused"), ("**********", "masked.*save the block")):
        auth = desk.job.auth
        if desk.product == "power_bi":
            wrong = auth.model_copy(update={"client_secret": SecretStr(secret)})
        else:
            secrets = {"token_name": "sandbox", "token_secret": secret}
            wrong = auth.model_copy(update={"secrets": type(auth.secrets)(secrets)})  # type: ignore[union-attr]
        desk.change(auth=wrong)

        @flow
        async def refresh() -> None:
            await http_job(desk.parameters())

        with pytest.raises(AuthError, match=said):
            asyncio.run(refresh())
    seen = caplog.text + "".join(capfd.readouterr())
    assert "refused" in seen
    assert "Traceback" not in seen
    assert "a-wrong-one" not in seen


async def test_saved_and_loaded(desk: Desk) -> None:
    """A saved block is the same when it is loaded, and its secrets are shown nowhere."""
    name = f"saved-{desk.product.replace('_', '-')}"
    await desk.job.save(name, overwrite=True)  # type: ignore[misc]
    loaded = await HttpJob.aload(name)
    assert loaded.declaration == desk.job.declaration
    async with get_client() as client:
        shown = await client.read_block_document_by_name(name, "http-job", include_secrets=False)
    stored = HttpJobRun(job=desk.job, arguments=desk.arguments).model_dump_json()
    for secret in (catalog.POWER_BI_CLIENT_SECRET, catalog.TABLEAU_TOKEN_SECRET):
        assert secret not in shown.model_dump_json() + repr(loaded) + str(desk.job) + stored
    by_name = HttpJobRun(job=loaded, arguments=desk.arguments)
    assert by_name.model_dump(mode="json")["job"] == f"http-job/{name}"
    texts = "&".join(f"{key}={value}" for key, value in sorted(desk.arguments.items()))
    assert by_name.resource_id == f"{name}?{texts}"


def test_in_a_dbt_project(desk: Desk) -> None:
    """An exposure names the job with its arguments, so that a dashboard waits for what it is built on."""
    run = HttpJobRun(job="dashboards", arguments=desk.arguments)
    manifest = {
        "sources": {"source.p.raw.weather": {"name": "weather", "source_name": "raw"}},
        "nodes": {"model.p.delays": {"name": "delays", "depends_on": {"nodes": ["source.p.raw.weather"]}}},
        "exposures": {
            "exposure.p.board": {
                "name": "board",
                "depends_on": {"nodes": ["model.p.delays"]},
                "config": {"meta": {"http_job": run.resource_id}},
            }
        },
    }
    lineage = Lineage.from_manifest(manifest)
    (exposure,) = lineage.exposures_for(key=TOOL.meta, value=run.resource_id)
    assert exposure.name == "board"
    assert lineage.why_held(exposure, ["source.p.raw.weather"], []) == (
        "weather did not land, and delays is built on it"
    )


def test_in_a_flow(desk: Desk) -> None:
    """As one of a flow's jobs, by the name of its block, it's in the report under its own name."""
    desk.job.save("in-a-flow", overwrite=True)
    report = sync_connections(
        syncs=[HttpJobRun(job="in-a-flow", arguments=desk.arguments, policy=JobPolicy(poll=0.1))]
    )
    (outcome,) = report.outcomes
    assert (outcome.state, outcome.vendor) == (JobState.SUCCEEDED, "http-job")
    assert outcome.name == desk.box.dashboards.dashboard(desk.board).spec.name
    assert outcome.resource_id.startswith("in-a-flow?")
