"""Flows: thin compositions of the tasks."""

from flows.approval import Approval, arequest_approval, request_approval
from flows.backfill import BackfillFailed, BackfillReport, backfill
from flows.elt import elt_chain
from flows.fan_out import RunFailed
from flows.reload import reload
from flows.report import EltReport, Step, StepState, SyncReport
from flows.syncs import sync_connections
from flows.transform import build_project, full_refresh, smoke_test, source_freshness

__all__ = [
    "Approval",
    "BackfillFailed",
    "BackfillReport",
    "EltReport",
    "RunFailed",
    "Step",
    "StepState",
    "SyncReport",
    "arequest_approval",
    "backfill",
    "build_project",
    "elt_chain",
    "full_refresh",
    "reload",
    "request_approval",
    "smoke_test",
    "source_freshness",
    "sync_connections",
]
