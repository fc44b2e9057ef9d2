"""Steps of one's own, before and after the chain: one after the other, in the order of the parameters."""

from __future__ import annotations

from collections.abc import Sequence

from prefect.logging import get_run_logger

from flows.fan_out import outcome, submit
from flows.report import Kind, Step
from tasks.intervals import DataInterval
from tasks.steps import OwnStep, run_step


def run_before(
    steps: Sequence[OwnStep], interval: DataInterval | None = None, why: str | None = None
) -> tuple[list[Step], str | None]:
    """Run the steps before the chain; the first that fails holds back all that follows.

    Args:
        steps: What to do.
        interval: The data interval of the run, if it has one.
        why: Why all are held back, if they are.

    Returns:
        Every step with its outcome, and why the chain is held back, if it is.
    """
    done: list[Step] = []
    for number, step in enumerate(steps):
        done.append(_hold("before", step, why) if why else _run("before", step, number, interval))
        if not why and not done[-1].good:
            why = f"{step.label}, which comes before, failed"
    return done, why


def run_after(
    steps: Sequence[OwnStep], so_far: Sequence[Step], interval: DataInterval | None = None
) -> list[Step]:
    """Run the steps after the chain.

    Args:
        steps: What to do; a step with `when: complete` is held back unless all before it was done.
        so_far: How everything before them ended.
        interval: The data interval of the run, if it has one.
    """
    done: list[Step] = []
    for number, step in enumerate(steps):
        bad = next((other for other in (*so_far, *done) if not other.good), None)
        if bad is None or step.when == "always":
            done.append(_run("after", step, number, interval))
        else:
            done.append(_hold("after", step, f"{bad.name} was not done"))
    return done


def _run(kind: Kind, step: OwnStep, number: int, interval: DataInterval | None) -> Step:
    task = run_step.with_options(**step.task_options)
    return Step.of_job(kind, outcome(submit(task, step, f"{kind} {number}", interval), step))


def _hold(kind: Kind, step: OwnStep, why: str) -> Step:
    get_run_logger().warning("held back: %s, because %s", step.label, why)
    return Step.held(kind, step, why)
