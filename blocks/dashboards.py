"""Two tools with a job API, declared: a semantic model's refresh in Power BI, an extract's in Tableau.

Both are whole and in use as they are; they also show how a third is written.

Vendor documentation:
    Power BI: https://learn.microsoft.com/power-bi/connect-data/asynchronous-refresh
    Tableau: https://help.tableau.com/current/api/rest_api/en-us/REST/rest_api_ref_jobs_tasks_and_schedules.htm
"""

from __future__ import annotations

from prefect.types import SecretDict
from pydantic import SecretStr

from blocks.http_job import HttpJob
from blocks.http_job_auth import ClientCredentials, SignIn
from blocks.http_job_parts import (
    Cancel,
    Find,
    JobId,
    Listing,
    Lookup,
    Parameter,
    Poll,
    Reading,
    Refusal,
    Start,
    States,
)

_GUID = r"[0-9A-Fa-f]{8}(-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}"


def power_bi_refresh(
    tenant_id: str,
    client_id: str,
    client_secret: SecretStr | str,
    *,
    base_url: str = "https://api.powerbi.com/v1.0/myorg",
    login_url: str = "https://login.microsoftonline.com",
    app_url: str = "https://app.powerbi.com",
) -> HttpJob:
    """Power BI's enhanced refresh of a semantic model (dataset), with a service principal.

    For workspaces on Premium, Premium per user, Fabric or Embedded capacity; elsewhere a refresh can't be
    cancelled or read by its id. Its runs take `group_id` (the workspace) and `dataset_id`, and may take
    `refresh_type` (`full` unless given) and `retry_count`.

    What it follows, and where that differs from what one would expect:
    the id of a refresh is the end of the reply's `Location`, and the body is empty; a refresh that is under
    way has the status `Unknown` in the list, and only `extendedStatus` says more; while one is running the
    documentation promises 409, and the service answers 400 with a sentence. Power BI may drop requests that
    come too fast without an error: such a refresh is in no list, and ends in "not in its replies".

    Args:
        tenant_id: The directory in Microsoft Entra ID.
        client_id: The application's id. It must be allowed to use the API, and a member of the workspace.
        client_secret: The application's secret.
        base_url: Where the API is; another one for national clouds.
        login_url: Where tokens are.
        app_url: Where the web interface is, for links.
    """
    refreshes = "/groups/{group_id}/datasets/{dataset_id}/refreshes"
    message = "serviceExceptionJson || (messages[?type=='Error'].message | [0])"
    reading = Reading(
        state="extendedStatus || status",
        message=message,
        attempts="numberOfAttempts",
        started_at="startTime",
        ended_at="endTime",
    )
    return HttpJob(
        service="Power BI",
        base_url=base_url,
        auth=ClientCredentials(
            token_url=f"{login_url}/{tenant_id}/oauth2/v2.0/token",
            client_id=client_id,
            client_secret=SecretStr(_plain(client_secret)),
            scope="https://analysis.windows.net/powerbi/api/.default",
        ),
        parameters={
            "group_id": Parameter(pattern=_GUID, description="The workspace."),
            "dataset_id": Parameter(pattern=_GUID, description="The semantic model."),
            "refresh_type": Parameter(
                pattern="full|automatic|dataOnly|calculate|clearValues|defragment", default="full"
            ),
            "retry_count": Parameter(type="integer", default=0, description="Power BI's own retries."),
        },
        lookups=[
            Lookup(
                path="/groups/{group_id}/datasets/{dataset_id}",
                values={"name": "name"},
                problem="isRefreshable == `false` && 'Power BI says that it can not be refreshed'",
            )
        ],
        start=Start(
            path=refreshes,
            # Any field beside `notifyOption` makes it an enhanced refresh.
            body={"type": "{refresh_type}", "commitMode": "transactional", "retryCount": "{retry_count}"},
            job_id=JobId(header="Location", pattern="[^/]+$"),
            already_running=[Refusal(status=409), Refusal(status=400, text="already executing")],
        ),
        poll=Poll(path=f"{refreshes}/{{job_id}}", read=reading),
        listing=Listing(path=refreshes, params={"$top": "60"}, items="value", id="requestId", read=reading),
        states=States(
            queued=["NotStarted"],
            running=["InProgress", "Unknown"],
            succeeded=["Completed"],
            failed=["Failed", "TimedOut", "Disabled"],
            cancelled=["Cancelled"],
        ),
        # One refresh runs at a time, so the one that began after ours was asked for is ours.
        find=Find(created_at="startTime"),
        cancel=Cancel(method="DELETE", path=f"{refreshes}/{{job_id}}"),
        url=f"{app_url}/groups/{{group_id}}/settings/datasets/{{dataset_id}}",
        requests_per_minute=200,
    )


def tableau_extract_refresh(
    server_url: str,
    token_name: str,
    token_secret: SecretStr | str,
    *,
    site: str = "",
    version: str = "3.24",
) -> HttpJob:
    """Tableau's extract refresh of a workbook, on Tableau Cloud or Server, with a personal access token.

    Its runs take `workbook_id`. What it follows, and where that differs from what one would expect:
    paths hold the id of the site, which only the reply to the sign-in tells; `finishCode` means something
    only once `completedAt` is there; the list of jobs has other fields than a job, and a workbook's name
    in place of its id; a second refresh of a workbook that waits or runs is refused with 409093. A
    personal access token has one session: whoever signs in with it elsewhere ends ours, and we sign in anew.

    Args:
        server_url: The server or pod, such as `https://10ax.online.tableau.com`.
        token_name: The personal access token's name.
        token_secret: Its secret.
        site: The site's content URL, as in the address after `/site/`; empty for a Server's default site.
        version: Of the REST API: 3.16 and later.
    """
    return HttpJob(
        service="Tableau",
        base_url=f"{server_url.rstrip('/')}/api/{version}",
        auth=SignIn(
            path="/auth/signin",
            body={
                "credentials": {
                    "personalAccessTokenName": "{token_name}",
                    "personalAccessTokenSecret": "{token_secret}",
                    "site": {"contentUrl": site.replace("{", "{{").replace("}", "}}")},
                }
            },
            secrets=SecretDict({"token_name": token_name, "token_secret": _plain(token_secret)}),
            token="credentials.token",  # noqa: S106 - where it is in the reply
            values={"site_id": "credentials.site.id"},
            header="X-Tableau-Auth",
            prefix="",
            lifetime=2 * 3600.0,
        ),
        parameters={"workbook_id": Parameter(pattern=_GUID, description="The workbook's LUID.")},
        lookups=[
            Lookup(
                path="/sites/{site_id}/workbooks/{workbook_id}",
                values={"name": "workbook.name", "page": "workbook.webpageUrl"},
            )
        ],
        start=Start(
            path="/sites/{site_id}/workbooks/{workbook_id}/refresh",
            body={},
            job_id=JobId(path="job.id"),
            already_running=[Refusal(status=409, text="409093")],
        ),
        poll=Poll(
            path="/sites/{site_id}/jobs/{job_id}",
            read=Reading(
                state="job.completedAt && to_string(job.finishCode) "
                "|| (job.startedAt && 'InProgress' || 'Pending')",
                message="job.extractRefreshJob.notes",
                started_at="job.startedAt",
                ended_at="job.completedAt",
            ),
        ),
        listing=Listing(
            path="/sites/{site_id}/jobs",
            params={"filter": "jobType:eq:refresh_extracts", "sort": "createdAt:desc", "pageSize": "1000"},
            items="backgroundJobs.backgroundJob",
            id="id",
            read=Reading(state="status", started_at="startedAt", ended_at="endedAt"),
        ),
        states=States(
            queued=["Pending"],
            running=["InProgress"],
            succeeded=["Success", "0"],
            failed=["Failed", "1"],
            cancelled=["Cancelled", "2"],
        ),
        find=Find(created_at="createdAt", match={"title": "{name}"}),
        cancel=Cancel(method="PUT", path="/sites/{site_id}/jobs/{job_id}"),
        url="{page}",
        grace=15.0,
    )


def _plain(secret: SecretStr | str) -> str:
    return secret.get_secret_value() if isinstance(secret, SecretStr) else secret
