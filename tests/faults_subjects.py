"""One job of each vendor, for the table of faults: a class here is all that a new vendor joins it with."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, ClassVar
from uuid import uuid4

from prefect_dbt.cloud import DbtCloudCredentials

from blocks import AirbyteServer, CensusCredentials, FivetranCredentials, HightouchCredentials, HttpJob
from blocks.dashboards import power_bi_refresh, tableau_extract_refresh
from sandbox import Sandbox, catalog
from sandbox.census import Sync as CensusSync
from sandbox.dashboards import Dashboard, DashboardBehaviour
from sandbox.hightouch import Sync
from sandbox.hightouch_sequences import Sequence as SyncSequence
from sandbox.timeline import CensusBehaviour, SyncBehaviour
from tasks.airbyte_jobs import AirbyteRequest, AirbyteVendor
from tasks.census import CensusVendor
from tasks.dbt_cloud_runs import DbtCloudVendor, RunRequest
from tasks.fivetran_jobs import FivetranRequest, FivetranVendor
from tasks.hightouch_jobs import HightouchRequest, HightouchVendor
from tasks.hightouch_sequences import HightouchSequenceVendor
from tasks.http_job import HttpJobRun
from tasks.http_job_vendor import HttpJobVendor
from tasks.jobs import JobResult, PlainRequest
from tests.faults_fixtures import GRACE, SUBJECTS, Subject

__all__ = ["SUBJECTS"]

JOB = 0.15  # seconds that a job takes
_numbers = itertools.count(1)


class Airbyte(Subject):
    """A sync of a synthetic connection, by the public API."""

    name = "airbyte"
    title = "Airbyte"
    has_token = True
    sandbox_name = "airbyte"
    start = r"^/api/public/v1/jobs$"
    look = r"^/api/public/v1/jobs"
    cancel = ("DELETE", r"/jobs/\d+$")
    vendor_class = AirbyteVendor
    api: ClassVar[Any] = "public"

    def __init__(self, sandbox: Sandbox) -> None:
        super().__init__(sandbox)
        self.connection_id = sandbox.airbyte.add_connections(1, duration=JOB)[0]
        self.vendor = AirbyteVendor(
            AirbyteServer(
                base_url=sandbox.url,
                api=self.api,
                client_id=catalog.CLIENT_ID,
                client_secret=catalog.CLIENT_SECRET,
            )
        )
        self.request = AirbyteRequest(self.connection_id, "sync", "orders", "sales")

    def behave(self, **changes: Any) -> None:
        self.sandbox.airbyte.set(self.connection_id, **changes)

    def start_by_hand(self) -> None:
        self.sandbox.airbyte.start(self.connection_id, "sync")

    @property
    def runs(self) -> Sequence[Any]:
        return self.sandbox.airbyte.jobs_of(self.connection_id)

    def expire_sign_in(self) -> None:
        self.sandbox.airbyte.revoke_tokens()


class AirbyteConfig(Airbyte):
    """The same by the Config API, where everything is a POST."""

    name = "airbyte-config"
    start = r"^/api/v1/connections/sync$"
    look = r"^/api/v1/jobs/(get|list)"
    look_method = "POST"
    cancel = ("POST", r"/jobs/cancel$")
    api = "config"


class Hightouch(Subject):
    """A run of a sync of one table."""

    name = "hightouch"
    title = "Hightouch"
    sandbox_name = "hightouch"
    start = r"/syncs/\d+/trigger$"
    look = r"/syncs/\d+/runs$"
    vendor_class = HightouchVendor
    good = "success"

    def __init__(self, sandbox: Sandbox) -> None:
        super().__init__(sandbox)
        self.sync_id = 1000 + next(_numbers)
        spec = dataclasses.replace(catalog.SYNCS[0], sync_id=self.sync_id, slug=f"crm-{self.sync_id}")
        sandbox.hightouch.syncs[self.sync_id] = Sync(spec, SyncBehaviour(duration=JOB))
        self.vendor = HightouchVendor(
            HightouchCredentials(
                api_key=catalog.HIGHTOUCH_API_KEY,
                base_url=sandbox.hightouch_url,
                requests_per_10_seconds=10_000,
            )
        )
        sandbox.hightouch.settings.requests_per_10_seconds = None
        self.request: PlainRequest = HightouchRequest(str(self.sync_id), "sync", "crm")

    async def run(self, **policy: Any) -> JobResult:
        if isinstance(self.request, HightouchRequest):  # as the task says it
            alone = policy.get("on_active", "queue") != "queue"
            self.request = dataclasses.replace(self.request, alone=alone)
        return await super().run(**policy)

    def behave(self, **changes: Any) -> None:
        self.sandbox.hightouch.set(self.sync_id, **changes)

    def start_by_hand(self) -> None:
        self.sandbox.hightouch.trigger(self.sync_id)

    @property
    def runs(self) -> Sequence[Any]:
        return self.sandbox.hightouch.runs_of(self.sync_id)


class HightouchSequence(Hightouch):
    """A run of a sequence of one sync, in a workspace that queues runs of sequences."""

    name = "hightouch-sequence"
    start = r"/sync-sequences/[\w-]+/trigger$"
    look = r"/sync-sequences/runs/"
    vendor_class = HightouchSequenceVendor

    def __init__(self, sandbox: Sandbox) -> None:
        super().__init__(sandbox)
        self.sequence_id = f"of-{self.sync_id}"
        spec = catalog.SequenceSpec(self.sequence_id, self.sequence_id, (self.sync_id,))
        sandbox.hightouch.sequences.all[self.sequence_id] = SyncSequence(spec)
        self.vendor = HightouchSequenceVendor(
            HightouchCredentials(
                api_key=catalog.HIGHTOUCH_API_KEY,
                base_url=sandbox.hightouch_url,
                requests_per_10_seconds=10_000,
            )
        )
        self.request = PlainRequest(self.sequence_id, "sync", "crm", None)

    def behave(self, **changes: Any) -> None:
        # How long it takes and whether it goes well is up to the sync; the rest to the sequence.
        if changes.keys() <= {"duration"} or changes.get("outcome") == "fail":
            super().behave(**changes)
        else:
            self.sandbox.hightouch.sequences.set(self.sequence_id, **changes)

    def start_by_hand(self) -> None:
        self.sandbox.hightouch.sequences.trigger(self.sequence_id)

    @property
    def runs(self) -> Sequence[Any]:
        return self.sandbox.hightouch.sequences.runs_of(self.sequence_id)

    def end_first(self) -> None:
        run = self.runs[0]
        for member in run.members:
            member.timeline.finish(self.good)
        if not run.final:
            run.word = "done"
            run.cut.set()


class DbtCloud(Subject):
    """A run of a scripted job."""

    name = "dbt-cloud"
    title = "dbt Cloud"
    sandbox_name = "dbt_cloud"
    start = r"/jobs/\d+/run/$"
    look = r"/runs/"
    cancel = ("POST", r"/runs/\d+/cancel/$")
    vendor_class = DbtCloudVendor
    good = "10"

    def __init__(self, sandbox: Sandbox) -> None:
        super().__init__(sandbox)
        self.job_id = sandbox.dbt_cloud.add_jobs(1, duration=JOB)[0]
        self.vendor = DbtCloudVendor(
            DbtCloudCredentials(
                api_key=catalog.DBT_CLOUD_TOKEN,
                account_id=catalog.DBT_CLOUD_ACCOUNT_ID,
                domain=sandbox.dbt_cloud_url,
            )
        )
        self.request = RunRequest(str(self.job_id), "nightly", alone=True)

    def behave(self, **changes: Any) -> None:
        self.sandbox.dbt_cloud.set(self.job_id, **changes)

    def start_by_hand(self) -> None:
        self.sandbox.dbt_cloud.trigger(self.job_id)

    @property
    def runs(self) -> Sequence[Any]:
        return self.sandbox.dbt_cloud.runs_of(self.job_id)


class Fivetran(Subject):
    """A sync of a synthetic connection."""

    name = "fivetran"
    title = "Fivetran"
    sandbox_name = "fivetran"
    start = r"/connections/\w+/sync$"
    look = r"/connections"
    vendor_class = FivetranVendor

    def __init__(self, sandbox: Sandbox) -> None:
        super().__init__(sandbox)
        self.connection_id = sandbox.fivetran.add_connections(1, duration=JOB)[0]
        self.vendor = FivetranVendor(
            FivetranCredentials(
                api_key=catalog.FIVETRAN_API_KEY,
                api_secret=catalog.FIVETRAN_API_SECRET,
                base_url=sandbox.fivetran_url,
            )
        )
        self.request = FivetranRequest(self.connection_id, "sync", "orders", "sales")

    def behave(self, **changes: Any) -> None:
        self.sandbox.fivetran.set(self.connection_id, **changes)

    def start_by_hand(self) -> None:
        self.sandbox.fivetran.trigger(self.connection_id)

    @property
    def runs(self) -> Sequence[Any]:
        return self.sandbox.fivetran.syncs_of(self.connection_id)


class PowerBI(Subject):
    """A refresh of a semantic model, as a declaration of Power BI's API."""

    name = "power-bi"
    title = "Power BI"
    has_token = True
    sandbox_name = "power_bi"
    start = r"/refreshes$"
    look = r"/refreshes"
    cancel = ("DELETE", r"/refreshes/")
    vendor_class = HttpJobVendor
    spec: ClassVar[catalog.DashboardSpec] = catalog.DASHBOARDS[0]

    def __init__(self, sandbox: Sandbox) -> None:
        super().__init__(sandbox)
        self.board = str(uuid4())
        spec = dataclasses.replace(
            self.spec, dashboard_id=self.board, name=self.board, table=catalog.SYNCS[0].table
        )
        sandbox.dashboards.dashboards[self.board] = Dashboard(spec, DashboardBehaviour(duration=JOB))
        job, arguments = self.declared()
        job = job.model_copy(update={"grace": GRACE, "requests_per_minute": None})
        run = HttpJobRun(job=job, arguments=arguments)
        self.vendor = HttpJobVendor(job)
        self.request = PlainRequest(run.resource_id, "run", "the dashboard", None)

    def declared(self) -> tuple[HttpJob, dict[str, Any]]:
        """The declaration, and what its run is of."""
        job = power_bi_refresh(
            catalog.POWER_BI_TENANT,
            catalog.POWER_BI_CLIENT_ID,
            catalog.POWER_BI_CLIENT_SECRET,
            base_url=self.sandbox.power_bi_url,
            login_url=self.sandbox.power_bi_login_url,
        )
        return job, {"group_id": catalog.POWER_BI_GROUP, "dataset_id": self.board}

    def behave(self, **changes: Any) -> None:
        self.sandbox.dashboards.set(self.board, **changes)

    def start_by_hand(self) -> None:
        self.sandbox.dashboards.refresh(self.board)

    @property
    def runs(self) -> Sequence[Any]:
        return self.sandbox.dashboards.refreshes_of(self.board)

    def expire_sign_in(self) -> None:
        self.sandbox.dashboards.tokens.clear()


class Tableau(PowerBI):
    """An extract refresh of a workbook, as a declaration of Tableau's API."""

    name = "tableau"
    title = "Tableau"
    sandbox_name = "tableau"
    start = r"/workbooks/[\w-]+/refresh$"
    look = r"/jobs"
    cancel = ("PUT", r"/jobs/")
    spec = next(each for each in catalog.DASHBOARDS if each.product == "tableau")

    def declared(self) -> tuple[HttpJob, dict[str, Any]]:
        job = tableau_extract_refresh(
            self.sandbox.tableau_url,
            catalog.TABLEAU_TOKEN_NAME,
            catalog.TABLEAU_TOKEN_SECRET,
            site=catalog.TABLEAU_SITE,
        )
        return job, {"workbook_id": self.board}

    def expire_sign_in(self) -> None:
        self.sandbox.dashboards.session = None


class Census(Subject):
    """A run of a sync of one table."""

    name = "census"
    title = "Census"
    sandbox_name = "census"
    start = r"/syncs/\d+/trigger$"
    look = r"/sync_runs/\d+$"
    cancel = ("POST", r"/sync_runs/\d+/cancel$")
    vendor_class = CensusVendor
    good = "completed"

    def __init__(self, sandbox: Sandbox) -> None:
        super().__init__(sandbox)
        self.sync_id = 1000 + next(_numbers)
        spec = dataclasses.replace(
            catalog.CENSUS_SYNCS[0],
            sync_id=self.sync_id,
            label=f"crm-{self.sync_id}",
            table=catalog.SYNCS[0].table,
        )
        sandbox.census.syncs[self.sync_id] = CensusSync(spec, CensusBehaviour(duration=JOB))
        self.vendor = CensusVendor(
            CensusCredentials(
                api_key=catalog.CENSUS_API_KEY,
                base_url=sandbox.census_url,
                requests_per_10_seconds=10_000,
            )
        )
        self.request = PlainRequest(str(self.sync_id), "sync", "crm", None)

    def behave(self, **changes: Any) -> None:
        self.sandbox.census.set(self.sync_id, **changes)

    def start_by_hand(self) -> None:
        self.sandbox.census.trigger(self.sync_id)

    @property
    def runs(self) -> Sequence[Any]:
        return self.sandbox.census.runs_of(self.sync_id)
