"""Tell of a run that does not tell itself: to the people of its own parameters, or else to those named here.

Started by the automations in `deployments/automations.yaml`, for flows of any kind. Its blocks are those of
its `notify`.
"""

# No `from __future__ import annotations` here: see flows/elt.py.
from datetime import UTC, datetime, timedelta
from typing import Annotated, Literal
from uuid import UUID

from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import StateType
from prefect.exceptions import ObjectNotFound
from prefect.logging import get_run_logger
from prefect.states import Failed
from pydantic import Field

from flows.alerts import how, people_of, tell_of_run, tell_run_is_well
from flows.parameters import NotifyList
from tasks.environment import is_elsewhere, prefix_here
from tasks.incidents import STUCK

_CLOCKS = timedelta(minutes=1)  # by which that of the server, who counts as well, may differ

Told = Literal["told", "nothing to tell"]


@flow(name="alert", flow_run_name="alert {flow_run_id}")
async def alert(
    flow_run_id: UUID,
    notify: NotifyList = [],  # noqa: B006 - never changed; a form shows it as an empty list
    stuck_for: Annotated[float, Field(ge=0)] | None = None,
) -> Told:
    """Tell how a run is: that it failed or crashed, that it does not end, or that all is well again.

    A run whose parameters name whom to tell has told how it ended itself, and is passed over, and so is a run
    of another environment. One whose `notify` can't be read could not tell. What is told already is not told
    twice.

    Args:
        flow_run_id: The run.
        notify: Who is told of runs whose own parameters name nobody.
        stuck_for: Seconds after which a run that is Pending or Running is told of, because it does not end.
            Without it none is: one that failed a moment ago may be at it again, rescued or retried.

    Returns:
        Whether there was something to tell. The run is Failed as `Undelivered` if not all of it was
        delivered; and Failed if nobody is named to whom, but in an environment with a prefix, which is for
        rehearsals.
    """
    log = get_run_logger()
    async with get_client() as client:
        try:
            run = await client.read_flow_run(flow_run_id)
        except ObjectNotFound:
            return "nothing to tell"
        if await is_elsewhere(client, run):
            return "nothing to tell"
    state = run.state
    if state is None:
        return "nothing to tell"
    if state.type in (StateType.PENDING, StateType.RUNNING):
        if stuck_for is None or datetime.now(UTC) - state.timestamp < timedelta(seconds=stuck_for) - _CLOCKS:
            return "nothing to tell"
        reason = f"It has been {state.name} since {state.timestamp:%Y-%m-%d %H:%M} UTC."
        delivered = await tell_of_run(
            run, "does not end", reason, log, key=STUCK, level="failed", otherwise=notify
        )
    elif people_of(run):
        return "nothing to tell"
    elif state.is_completed():
        delivered = await tell_run_is_well(run, log, notify)
    elif state.is_failed() or state.is_crashed():
        delivered = await tell_of_run(run, how(state), state.message or "", log, otherwise=notify)
    else:
        return "nothing to tell"
    if delivered:
        return "told"
    if notify or people_of(run):
        why = "Not all could be told; the log says why."
        return Failed(name="Undelivered", message=why)  # type: ignore[return-value]  # Prefect takes it for a result
    if prefix_here():
        return "nothing to tell"
    # Under Prefect's own name, by which an automation tells of it: no way of telling was tried that could.
    return Failed(message="Nobody is named who is to be told.")  # type: ignore[return-value]  # as above
