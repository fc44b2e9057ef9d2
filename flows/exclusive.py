"""Not at the same time as a deployment's runs: by the concurrency limits that deployments have themselves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterDeploymentId,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import ConcurrencyLeaseHolder, StateType
from prefect.client.schemas.responses import DeploymentResponse
from prefect.concurrency.sync import concurrency
from prefect.logging import get_run_logger
from prefect.runtime import flow_run

_LEASE = 120.0  # seconds: so long a run that was killed keeps the others waiting, its own retry too
_AT_WORK = [StateType.RUNNING, StateType.PENDING, StateType.CANCELLING]


@contextmanager
def alone(*deployments: DeploymentResponse) -> Iterator[None]:
    """Wait until no run of these deployments is at work, and let none begin meanwhile.

    All slots of their concurrency limits are taken: the Prefect server keeps them, over all machines. A run
    of one whose time comes meanwhile waits for its slot, as it does for another run of its deployment; with
    the collision strategy CANCEL_NEW it is cancelled.

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
    limit = deployment.global_concurrency_limit
    if limit is None or not limit.active or not limit.limit:
        if limit is None:
            get_run_logger().warning(
                "%s has no concurrency limit, so a run of it may load and build the same at the same time.",
                deployment.name,
            )
        yield
        return
    if at_work := _at_work(deployment):
        get_run_logger().info(
            "Waits until %s of %s has ended. Nothing was started.", ", ".join(at_work), deployment.name
        )
    holder = ConcurrencyLeaseHolder(type="flow_run", id=flow_run.id) if flow_run.id else None
    with concurrency(
        limit.name,
        occupy=limit.limit,
        lease_duration=_LEASE,
        strict=True,
        holder=holder,
        # A server that is away for longer than the lease costs the guard, not the run that is under way.
        raise_on_lease_renewal_failure=False,
    ):
        yield


def _at_work(deployment: DeploymentResponse) -> list[str]:
    """The names of the deployment's runs that have a slot."""
    at_work = FlowRunFilter(
        deployment_id=FlowRunFilterDeploymentId(any_=[deployment.id]),
        state=FlowRunFilterState(type=FlowRunFilterStateType(any_=_AT_WORK)),
    )
    with get_client(sync_client=True) as client:
        return sorted(run.name for run in client.read_flow_runs(flow_run_filter=at_work))
