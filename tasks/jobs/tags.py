"""Tags of a task run that cost nothing."""

from __future__ import annotations

from prefect.context import TaskRunContext


def tag_run(*tags: str) -> None:
    """Tag the current task run, so that people can filter by it; the UI shows them when the task run ends.

    For tasks that are mapped by the hundred. For each run of a task with `tags=[...]` Prefect asks its API
    for a concurrency slot, whether or not there is a limit on the tag, and it asks one by one: 500 syncs then
    take seconds longer to start. A limit on such a tag therefore does not bind these runs; `max_concurrency`
    does.
    """
    if context := TaskRunContext.get():
        context.task_run.tags = sorted({*context.task_run.tags, *tags})
