"""Events in: what outside tells becomes a Prefect event, and each of its runs exactly one.

    model       EltEvent: what happened, with an identity that outlives replays
    triggers    OnceTrigger: which deployment an event starts, read from the deployments' YAML
    hand_over   the runs first, then the event itself, all of it safe to repeat

Whoever listens (the receiver of webhooks, a sensor, a queue's listener) makes `EltEvent`s, calls `hand_over`,
and acknowledges to its sender only when that has returned.
"""

from tasks.events.hand_over import hand_over
from tasks.events.model import EltEvent, HandedOver, HandOverError, Related, StartedRun
from tasks.events.triggers import OnceTrigger, TriggerFailed, TriggersWrong, read_triggers, render

__all__ = [
    "EltEvent",
    "HandOverError",
    "HandedOver",
    "OnceTrigger",
    "Related",
    "StartedRun",
    "TriggerFailed",
    "TriggersWrong",
    "hand_over",
    "read_triggers",
    "render",
]
