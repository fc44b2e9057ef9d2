"""The official `airbyte-api` SDK, unchanged, against the sandbox: a client that we did not write agrees."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import httpx
import pytest
from airbyte_api import AirbyteAPI, api, models
from airbyte_api._hooks.clientcredentials import ClientCredentialsHook
from airbyte_api.errors import SDKError

from sandbox import Sandbox, catalog
from tests.sandbox_fixtures import IDS, box, sources

__all__ = ["box", "sources"]


@pytest.fixture
def sdk(box: Sandbox) -> Iterator[AirbyteAPI]:
    """The SDK as its own page says it is set up for a self-managed server."""
    # It keeps tokens by client id for the whole process; each test's sandbox is a server of its own.
    ClientCredentialsHook._sessions.clear()
    credentials = models.SchemeClientCredentials(
        client_id=catalog.CLIENT_ID,
        client_secret=catalog.CLIENT_SECRET,
        token_url=f"{box.airbyte_url}/applications/token",
    )
    with (
        httpx.Client(follow_redirects=True) as client,
        AirbyteAPI(
            server_url=box.airbyte_url,
            security=models.Security(client_credentials=credentials),
            client=client,
        ) as opened,
    ):
        yield opened


def started(sdk: AirbyteAPI, name: str, job_type: models.JobTypeEnum) -> models.JobResponse:
    request = models.JobCreateRequest(connection_id=IDS[name], job_type=job_type)
    reply = sdk.jobs.create_job(request=request).job_response
    assert reply is not None
    return reply


def ended(sdk: AirbyteAPI, job_id: int) -> models.JobResponse:
    deadline = time.monotonic() + 60
    while True:
        job = sdk.jobs.get_job(request=api.GetJobRequest(job_id=job_id)).job_response
        assert job is not None
        if job.status in ("succeeded", "failed", "cancelled"):
            return job
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_trigger_and_poll(box: Sandbox, sdk: AirbyteAPI) -> None:
    """The SDK signs in, starts a sync and sees it load every row; a clear empties the table again."""
    job = started(sdk, "airlines", models.JobTypeEnum.SYNC)
    assert job.status in (models.JobStatusEnum.PENDING, models.JobStatusEnum.RUNNING)
    done = ended(sdk, job.job_id)
    assert (done.status, done.rows_synced, done.connection_id) == ("succeeded", 16, IDS["airlines"])
    assert done.bytes_synced
    assert str(done.duration).startswith("PT")
    cleared = ended(sdk, started(sdk, "airlines", models.JobTypeEnum.CLEAR).job_id)
    assert (cleared.job_type, cleared.status) == (models.JobTypeEnum.CLEAR, "succeeded")
    assert box.airbyte.token_requests == 1


@pytest.mark.parametrize(
    ("behaviour", "expected"),
    [({"outcome": "fail"}, "failed"), ({"outcome": "incomplete_then_succeed"}, "succeeded")],
)
def test_every_word_is_one_that_the_sdk_knows(
    box: Sandbox, sdk: AirbyteAPI, behaviour: dict[str, str], expected: str
) -> None:
    """The states on the way, `queued` and `incomplete` among them, are in the SDK's own list."""
    box.airbyte.set("planes", duration=0.6, queued_seconds=0.2, **behaviour)
    assert ended(sdk, started(sdk, "planes", models.JobTypeEnum.SYNC).job_id).status == expected


def test_list(box: Sandbox, sdk: AirbyteAPI) -> None:
    """Lists by connection, workspace, status, time, order and page are what the SDK asks for."""
    jobs = [ended(sdk, started(sdk, name, models.JobTypeEnum.SYNC).job_id) for name in ("airlines", "planes")]
    newest, oldest = jobs[1].job_id, jobs[0].job_id

    def listed(request: api.ListJobsRequest) -> list[int]:
        reply = sdk.jobs.list_jobs(request=request).jobs_response
        assert reply is not None
        return [job.job_id for job in reply.data]

    workspace = [catalog.WORKSPACE_ID, catalog.SOURCE_ID]
    assert listed(api.ListJobsRequest()) == [oldest, newest]
    assert listed(api.ListJobsRequest(order_by="createdAt|DESC", workspace_ids=workspace)) == [newest, oldest]
    assert listed(api.ListJobsRequest(connection_id=IDS["planes"])) == [newest]
    assert listed(api.ListJobsRequest(limit=1, offset=1)) == [newest]
    assert listed(api.ListJobsRequest(status=models.JobStatusEnum.FAILED)) == []
    assert listed(api.ListJobsRequest(job_type=models.JobTypeEnum.SYNC)) == [oldest, newest]
    hour = timedelta(hours=1)
    assert listed(api.ListJobsRequest(created_at_start=datetime.now(UTC) + hour)) == []
    assert listed(api.ListJobsRequest(created_at_start=datetime.now(UTC) - hour)) == [oldest, newest]


def test_cancel(box: Sandbox, sdk: AirbyteAPI) -> None:
    """A running job is cancelled, and cancelling it again is the conflict that the contract names."""
    box.airbyte.set("airlines", outcome="stuck")
    job = started(sdk, "airlines", models.JobTypeEnum.SYNC)
    request = api.CancelJobRequest(job_id=job.job_id)
    cancelled = sdk.jobs.cancel_job(request=request).job_response
    assert cancelled is not None
    assert cancelled.status is models.JobStatusEnum.CANCELLED
    with pytest.raises(SDKError) as caught:
        sdk.jobs.cancel_job(request=request)
    assert caught.value.status_code == 409
    assert "Job is not currently running" in caught.value.body


def test_refusals_reach_the_sdk(box: Sandbox, sdk: AirbyteAPI) -> None:
    """A second start, an inactive connection and an unknown job are errors with their status and body."""
    box.airbyte.set("airlines", outcome="stuck")
    started(sdk, "airlines", models.JobTypeEnum.SYNC)
    with pytest.raises(SDKError, match="409") as running:
        started(sdk, "airlines", models.JobTypeEnum.SYNC)
    assert "try-again-later" in running.value.body
    box.airbyte.set("planes", status="inactive")
    with pytest.raises(SDKError, match="409") as inactive:
        started(sdk, "planes", models.JobTypeEnum.SYNC)
    assert "state-conflict" in inactive.value.body
    with pytest.raises(SDKError, match="422"):
        started(sdk, "weather", models.JobTypeEnum.REFRESH)
    with pytest.raises(SDKError, match="404"):
        sdk.jobs.get_job(request=api.GetJobRequest(job_id=999_999))


def test_connections_and_workspaces(sdk: AirbyteAPI) -> None:
    """Connections with their streams and tags, and the workspace, are documents that the SDK can read."""
    reply = sdk.connections.list_connections(
        request=api.ListConnectionsRequest(limit=100)
    ).connections_response
    assert reply is not None
    assert {connection.name for connection in reply.data} == set(IDS)
    one = sdk.connections.get_connection(
        request=api.GetConnectionRequest(connection_id=IDS["flights"])
    ).connection_response
    assert one is not None
    assert {tag.name for tag in one.tags} == {"nightly", "owner:flight-ops"}
    streams = one.configurations.streams
    assert streams
    assert [stream.name for stream in streams] == ["flights"]
    workspaces = sdk.workspaces.list_workspaces(request=api.ListWorkspacesRequest()).workspaces_response
    assert workspaces is not None
    assert [workspace.workspace_id for workspace in workspaces.data] == [catalog.WORKSPACE_ID]


def test_a_token_that_expired_is_asked_for_anew(box: Sandbox, sdk: AirbyteAPI) -> None:
    """After a token's end the SDK asks for another."""
    ended(sdk, started(sdk, "airlines", models.JobTypeEnum.SYNC).job_id)
    box.airbyte.revoke_tokens()
    request = api.ListJobsRequest()
    with pytest.raises(SDKError, match="401"):
        sdk.jobs.list_jobs(request=request)  # it drops the token, and does not try again by itself
    assert sdk.jobs.list_jobs(request=request).jobs_response
    assert box.airbyte.token_requests == 2
