"""Not at the same time as a deployment's runs: by the concurrency limits that deployments have themselves.

Prefect's own `concurrency()` is not enough for it. What it has taken it knows only in its own process: a run
that is killed and started again would wait for its own slots, beside the very runs that it has to keep out.
So the lease is kept with the run, as the artifact `slots-held`, and its next attempt goes on with it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any
from uuid import UUID

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import ArtifactCreate
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterFlowRunId,
    ArtifactFilterKey,
    FlowRunFilter,
    FlowRunFilterDeploymentId,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import ConcurrencyLeaseHolder, StateType
from prefect.client.schemas.responses import (
    ConcurrencyLimitWithLeaseResponse,
    DeploymentResponse,
    GlobalConcurrencyLimitResponse,
)
from prefect.client.schemas.sorting import ArtifactSort
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError
from prefect.logging import get_run_logger
from prefect.runtime import flow_run

from tasks.jobs.attempt import end_if_superseded
from tasks.jobs.slots import ask_again_after, lease_is_gone

ARTIFACT_KEY = "slots-held"

_LEASE = 600.0  # seconds: for a run that was killed to be found dead and started again, several times over
_RENEW = 60.0  # seconds
_RETRY = 10.0  # seconds between two tries while the server is away
_AT_WORK = [StateType.RUNNING, StateType.PENDING, StateType.CANCELLING]
_ERRORS = (PrefectHTTPStatusError, httpx.TransportError)


@contextmanager
def alone(*deployments: DeploymentResponse) -> Iterator[None]:
    """Wait until no run of these deployments is at work, and let none begin meanwhile.

    All slots of their concurrency limits are taken: the Prefect server keeps them, over all machines. A run
    of one whose time comes meanwhile waits for its slot, as it does for another run of its deployment; with
    the collision strategy CANCEL_NEW it is cancelled. Of a run that is killed in between they stay taken
    until it has been started again, or for ten minutes.

    Args:
        deployments: Whose runs. One without a limit bears several runs at a time and is not waited for.
    """
    with ExitStack() as stack:
        # In the same order everywhere: two that wait for each other's would wait for ever.
        for deployment in sorted(deployments, key=lambda each: each.id):
            stack.enter_context(_without(deployment))
        yield


@contextmanager
def _without(deployment: DeploymentResponse) -> Iterator[None]:
    lease = _taken(deployment)
    if lease is None:
        yield
        return
    ended, log = threading.Event(), get_run_logger()
    keeper = threading.Thread(target=_keep, args=(lease, deployment.name, ended, log), daemon=True)
    keeper.start()
    try:
        yield
    finally:
        ended.set()
        end_if_superseded()  # the slots are the other attempt's then
        _release(lease, deployment.name, log)


def _taken(deployment: DeploymentResponse) -> UUID | None:
    """Wait for all slots of a deployment's limit; None if it has none.

    Nothing has begun yet, so that whatever becomes of the server or of the limit meanwhile is waited out.
    """
    log, name = get_run_logger(), deployment.name
    said: set[str] = set()
    while True:
        words = ""
        try:
            with get_client(sync_client=True) as client:
                limit = client.read_deployment(deployment.id).global_concurrency_limit
                if limit is None:
                    log.warning(
                        "%s has no concurrency limit, so a run of it may load and build the same at the same "
                        "time.",
                        name,
                    )
                if limit is None or not limit.active or not limit.limit:
                    return None
                got = _earlier(client, limit) or _ask(client, limit)
                if isinstance(got, UUID):
                    return got
                wait = got
                if at_work := _at_work(client, deployment):
                    words = f"Waits until {', '.join(at_work)} of {name} has ended. Nothing was started."
        except ObjectNotFound:
            log.warning("%s is gone, so there is no run of it to wait for.", name)
            return None
        except _ERRORS as error:
            wait = _RETRY
            why = "no answer"
            if isinstance(error, PrefectHTTPStatusError):
                why = f"HTTP {error.response.status_code}"
            words = f"The Prefect server gives no slots of {name} now ({why}); it is asked again."
        if words and words not in said:
            log.info(words)
            said.add(words)
        time.sleep(wait)


def _earlier(client: SyncPrefectClient, limit: GlobalConcurrencyLimitResponse) -> UUID | None:
    """The lease of an earlier attempt at this run, if it has not ended."""
    if not flow_run.id:
        return None
    kept = client.read_artifacts(
        artifact_filter=ArtifactFilter(
            key=ArtifactFilterKey(any_=[ARTIFACT_KEY]),
            flow_run_id=ArtifactFilterFlowRunId(any_=[UUID(str(flow_run.id))]),
        ),
        sort=ArtifactSort.CREATED_DESC,
    )
    for artifact in kept:
        data: Any = artifact.data
        if data["limit"] == limit.name:
            lease = UUID(data["lease"])
            return lease if _renewed(client, lease) else None
    return None


def _ask(client: SyncPrefectClient, limit: GlobalConcurrencyLimitResponse) -> UUID | float:
    """The lease of all slots, or the seconds after which to ask again."""
    holder = ConcurrencyLeaseHolder(type="flow_run", id=UUID(str(flow_run.id))) if flow_run.id else None
    try:
        reply = client.increment_concurrency_slots_with_lease(
            [limit.name], slots=limit.limit, mode="concurrency", lease_duration=_LEASE, holder=holder
        )
    except PrefectHTTPStatusError as error:
        if (wait := ask_again_after(error)) is None:
            raise
        return wait
    found = ConcurrencyLimitWithLeaseResponse.model_validate_json(reply.content)
    if not found.limits:  # it has been deleted in this moment, which the next look sees
        return 1.0
    if flow_run.id:
        kept = ArtifactCreate(
            key=ARTIFACT_KEY,
            type="json",
            description="Slots that keep other runs out; the next attempt at this run goes on with them.",
            data={"limit": limit.name, "lease": str(found.lease_id)},
            flow_run_id=UUID(str(flow_run.id)),
        )
        with suppress(*_ERRORS):  # asked for again, we would wait for ourselves
            client.create_artifact(kept)
    return found.lease_id


def _keep(lease: UUID, name: str, ended: threading.Event, log: Any) -> None:
    """Renew a lease until the run has ended. One that is lost costs the guard, not the run under way."""
    while not ended.wait(_RENEW):
        try:
            with get_client(sync_client=True) as client:
                if not _renewed(client, lease):
                    log.warning("The slots of %s were lost: a run of it may begin beside this one.", name)
                    return
        except _ERRORS as error:
            log.debug("The slots of %s can't be renewed now: %s", name, error)


def _renewed(client: SyncPrefectClient, lease: UUID) -> bool:
    """Whether a lease goes on; not if it has ended or was given back."""
    try:
        client.renew_concurrency_lease(lease, lease_duration=_LEASE)
    except PrefectHTTPStatusError as error:
        if lease_is_gone(error):
            return False
        raise
    return True


def _release(lease: UUID, name: str, log: Any) -> None:
    try:
        with get_client(sync_client=True) as client:
            client.release_concurrency_slots_with_lease(lease)
    except _ERRORS as error:
        log.warning("The slots of %s are not given back; they are free in ten minutes: %s", name, error)


def _at_work(client: SyncPrefectClient, deployment: DeploymentResponse) -> list[str]:
    """The names of the deployment's runs that have a slot."""
    at_work = FlowRunFilter(
        deployment_id=FlowRunFilterDeploymentId(any_=[deployment.id]),
        state=FlowRunFilterState(type=FlowRunFilterStateType(any_=_AT_WORK)),
    )
    return sorted(run.name for run in client.read_flow_runs(flow_run_filter=at_work))
