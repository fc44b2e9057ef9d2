"""Flows: thin compositions of the tasks."""

from flows.elt import elt_chain
from flows.fan_out import RunFailed
from flows.report import EltReport, Step, StepState, SyncReport
from flows.syncs import sync_connections

__all__ = ["EltReport", "RunFailed", "Step", "StepState", "SyncReport", "elt_chain", "sync_connections"]
