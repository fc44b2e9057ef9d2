"""A part of a pipeline: one connection of it, and what hangs below that by the dbt project's lineage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowFilter, FlowFilterName
from prefect.client.schemas.responses import DeploymentResponse
from prefect.exceptions import ObjectNotFound, ParameterTypeError
from prefect.logging import get_run_logger
from pydantic import BaseModel, ConfigDict, ValidationError

from blocks.fields import words_of
from flows.approval import Approval
from flows.elt import elt_chain
from flows.fan_out import Checking, submit
from flows.intervals import DataInterval
from flows.narrowing import approval_of_part, gate_of_part, needs_interval
from flows.parameters import Activation, GateCheck, Notify, OwnStep, Sync, Transform
from tasks.airbyte import AirbyteSync
from tasks.dbt.choice import words
from tasks.dbt.lineage import Lineage, LineageNode
from tasks.dbt.model import DbtPlan
from tasks.dbt_core import DbtCore
from tasks.environment import prefix_here
from tasks.fivetran import FivetranSync
from tasks.jobs import Checked, InputError
from tasks.tools import TOOLS, TRANSFORMS

_PAGE = 100
Mode = Literal["incremental", "full_refresh"]


class Pipeline(BaseModel):
    """What a deployment of `elt-chain` gives its flow. What is not narrowed is passed on as it is."""

    model_config = ConfigDict(extra="allow")

    syncs: list[Sync]
    transform: Transform | None = None
    activations: list[Activation] = []
    gates: list[GateCheck] = []
    before: list[OwnStep] = []
    after: list[OwnStep] = []
    approval: Approval | None = None
    notify: list[Notify] = []
    max_concurrency: int = 100

    @property
    def parameters(self) -> dict[str, Any]:
        """For the flow."""
        return {name: getattr(self, name) for name in (*type(self).model_fields, *(self.model_extra or {}))}


def deployment_of(name: str) -> DeploymentResponse:
    """The deployment of a pipeline, of this run's own environment and of no other.

    Args:
        name: The deployment's, `elt-chain/flights` or just `flights`; with the environment's prefix or
            without.

    Raises:
        InputError: There is no such deployment of `elt-chain`.
    """
    flow_name, slash, own = name.partition("/")
    flow_name, own = (flow_name, own) if slash else (elt_chain.name, flow_name)
    here = own if own.startswith(prefix_here()) else f"{prefix_here()}{own}"
    with get_client(sync_client=True) as client:
        base = _deployment(client, f"{flow_name}/{here}") if flow_name == elt_chain.name else None
        if base is None:
            of_chain = FlowFilter(name=FlowFilterName(any_=[elt_chain.name]))
            there = sorted(each.name for each in client.read_deployments(flow_filter=of_chain))
            raise InputError(
                f"There is no pipeline {name!r}. Deployments of {elt_chain.name}: "
                f"{', '.join(there) or 'none'}. Nothing was started."
            )
    return base


def beside(base: DeploymentResponse) -> list[DeploymentResponse]:
    """The other pipelines of the same environment that build the same dbt project, from the same tables."""
    project = _project(base)
    of_chain = FlowFilter(name=FlowFilterName(any_=[elt_chain.name]))
    found: list[DeploymentResponse] = []
    with get_client(sync_client=True) as client:
        while page := client.read_deployments(flow_filter=of_chain, limit=_PAGE, offset=len(found)):
            found += page
    return [
        each
        for each in found
        if each.id != base.id
        and project is not None
        and (_project(each), _environment(each)) == (project, _environment(base))
    ]


def _project(deployment: DeploymentResponse) -> Any:
    transform = deployment.parameters.get("transform")
    return transform.get("project_dir") if isinstance(transform, dict) else None


def _environment(deployment: DeploymentResponse) -> set[str]:
    """The tag of `make deploy`; none of a deployment that was put there otherwise."""
    return {tag for tag in deployment.tags if tag.startswith(("env:", "branch:"))}


def pipeline_of(base: DeploymentResponse) -> Pipeline:
    """The pipeline that a deployment is.

    Raises:
        InputError: Its parameters are not what the flow takes.
    """
    try:
        return Pipeline.model_validate(elt_chain.validate_parameters(base.parameters))
    except (ParameterTypeError, ValidationError) as error:
        raise InputError(f"The parameters of {base.name} do not fit its flow: {error}") from None


def _deployment(client: SyncPrefectClient, name: str) -> DeploymentResponse | None:
    try:
        return client.read_deployment_by_name(name)
    except ObjectNotFound:
        return None


def narrowed(
    whole: Pipeline,
    connection: str,
    *,
    mode: Mode,
    streams: Sequence[str],
    interval: DataInterval | None,
) -> Pipeline:
    """The pipeline with one connection, and what hangs below it.

    Args:
        whole: The pipeline.
        connection: Id or name of one of its connections.
        mode: How it is loaded.
        streams: What of it, with `full_refresh`; empty: all.
        interval: Of the run.

    Raises:
        InputError: There is no such connection or stream, or its tool can't do that.
    """
    checking = Checking(whole.syncs)
    planning = submit(TRANSFORMS[whole.transform.tool].plan, whole.transform) if whole.transform else None
    found = _one(checking.result("any"), connection)
    sync = _loading(found, mode, streams)
    plan = planning.result() if planning else None
    activations = whole.activations
    transform = whole.transform
    if transform and plan:
        sources = _sources(plan.lineage, found, streams)
        below = plan.lineage.downstream(sources)
        # From nothing with an interval would leave the models below with that interval alone.
        from_nothing = mode == "full_refresh" and not (interval or transform.data_interval)
        transform = _building(transform, plan, sources, below, full_refresh=from_nothing)
        activations = [each for each in activations if _hangs_below(each, plan.lineage, below)]
    left_out = [each.label for each in whole.activations if each not in activations]
    if left_out:
        get_run_logger().info("Not below %s, so not run: %s", sync.label, ", ".join(left_out))
    mine = {sync.resource_id, sync.label, found.request.label}
    gates = [gate_of_part(gate, mine.__contains__, transform) for gate in whole.gates]
    return whole.model_copy(
        update={
            "syncs": [sync],
            "transform": transform,
            "activations": activations,
            "gates": [gate for gate in gates if gate],
            "before": _for_interval(whole.before, interval),
            "after": _for_interval(whole.after, interval),
            "approval": approval_of_part(whole.approval, activations),
            "allow_failure": "none",
            "data_interval": interval or "none",
        }
    )


def _for_interval(steps: Sequence[OwnStep], interval: DataInterval | None) -> list[OwnStep]:
    """The steps that can be run with this interval, or without one."""
    left_out = [] if interval else [step for step in steps if needs_interval(step)]
    if left_out:
        names = ", ".join(step.label for step in left_out)
        get_run_logger().warning("Not run, as they need a data interval and this run has none: %s", names)
    return [step for step in steps if step not in left_out]


def _one(checked: Sequence[Checked[Any]], connection: str) -> Checked[Any]:
    fitting = [c for c in checked if connection.strip() in (c.request.resource_id, c.request.label)]
    if len(fitting) == 1:
        if fitting[0].problem:
            raise InputError(fitting[0].problem)
        return fitting[0]
    names = ", ".join(sorted(f"{c.request.label} ({c.request.resource_id})" for c in fitting or checked))
    if fitting:
        raise InputError(
            f"{connection!r} is more than one: {names}. Say which by its id. Nothing was started."
        )
    raise InputError(f"The pipeline has no connection {connection!r}. It has: {names}. Nothing was started.")


def _loading(found: Checked[Any], mode: Mode, streams: Sequence[str]) -> Any:
    """The sync, with what has to be deleted before it."""
    sync = found.request
    if mode == "incremental":
        if streams:
            raise InputError(
                f"A sync of {sync.label} loads all of its streams: streams are for the mode full_refresh. "
                "Nothing was started."
            )
        return sync
    unknown = [name for name in streams if found.streams and name not in found.streams]
    if unknown:
        raise InputError(
            f"{sync.label} has no stream {', '.join(unknown)}. It has: {', '.join(sorted(found.streams))}. "
            "Nothing was started."
        )
    match sync:
        case AirbyteSync():
            return sync.model_copy(update={"before": sync.before or "clear", "streams": list(streams)})
        case FivetranSync():
            # The form is the confirmation.
            asked = {
                "resync": _by_schema(streams) or "all",
                "confirm_resync": sync.connection_id,
                "force": False,
            }
            return FivetranSync(
                **{name: getattr(sync, name) for name in FivetranSync.model_fields if name not in asked},
                **asked,
            )
    raise InputError(
        f"{sync.tool} has no full refresh of {sync.label}: load it incrementally. Nothing was started."
    )


def _by_schema(streams: Sequence[str]) -> dict[str, list[str]]:
    tables: dict[str, list[str]] = {}
    for stream in streams:
        schema, dot, table = stream.partition(".")
        if not (schema and dot and table):
            raise InputError(
                f"{stream!r} is no table of Fivetran's: write schema.table. Nothing was started."
            )
        tables.setdefault(schema, []).append(table)
    return tables


def _sources(lineage: Lineage, found: Checked[Any], streams: Sequence[str]) -> set[str]:
    """The dbt sources that are loaded anew.

    Raises:
        InputError: The project has none of this connection, so that nothing is known of what hangs below.
    """
    request = found.request
    sources = lineage.sources_of(
        request.resource_id,
        key=TOOLS[request.tool].meta,
        namespace=found.namespace,
        prefix=found.prefix,
        streams=found.streams,
    )
    if not sources:
        raise InputError(
            f"No source of the dbt project is filled by {request.label}: name it in the source's meta, as "
            f"{TOOLS[request.tool].meta}. Nothing was started."
        )
    tables = {f"{found.prefix}{stream.rpartition('.')[2]}".casefold() for stream in streams}
    return {id_ for id_ in sources if lineage.nodes[id_].identifier.casefold() in tables} or sources


def _building(
    transform: Transform, plan: DbtPlan, sources: set[str], below: set[str], *, full_refresh: bool
) -> Transform | None:
    """The transform of what hangs below; None if nothing does."""
    lineage = plan.lineage
    wanted = [lineage.nodes[id_] for id_ in sorted(below & set(plan.selected))]
    if not wanted:
        get_run_logger().info("Nothing that the transform builds hangs below.")
        return None
    if full_refresh and (kept := [node.name for node in wanted if node.full_refresh is False]):
        get_run_logger().warning("Not rebuilt from nothing, by their own config: %s", ", ".join(sorted(kept)))
    if isinstance(transform, DbtCore):
        select = _words(transform, lineage, sources, wanted)
        chosen = {"select": select, "selector": None, "full_refresh": full_refresh}
        try:
            return DbtCore.model_validate({**transform.model_dump(), **chosen})
        except ValidationError as error:
            raise InputError(f"{words_of(error)} Nothing was started.") from None
    step = ["dbt build", *(["--full-refresh"] if full_refresh else []), "--select", *_below(lineage, sources)]
    overrides = transform.overrides.model_copy(update={"steps_override": [" ".join(step)]})
    return transform.model_copy(update={"overrides": overrides})


def _words(dbt: DbtCore, lineage: Lineage, sources: set[str], wanted: Sequence[LineageNode]) -> list[str]:
    if dbt.select or dbt.selector:  # of what hangs below only that
        return words(lineage, wanted)
    return _below(lineage, sources)


def _below(lineage: Lineage, sources: set[str]) -> list[str]:
    return lineage.exclude_selectors(sources)


def _hangs_below(activation: Activation, lineage: Lineage, below: set[str]) -> bool:
    key = TOOLS[activation.tool].meta
    exposures = lineage.exposures_for(key=key, value=activation.resource_id)
    return any(exposure.unique_id in below for exposure in exposures)
