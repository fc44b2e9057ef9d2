"""Known errors in the log as one sentence.

Prefect logs every exception of a task with its traceback. For a failed sync or a mistyped connection id that
is thirty lines from the inside of this collection around the one line that somebody has to read.
"""

from __future__ import annotations

import logging

from blocks.http import VendorError
from blocks.reference import BlockNotFound
from tasks.jobs.model import InputError, JobError

_LOGGERS = ("prefect.task_runs", "prefect.flow_runs")


class _WithoutTraceback(logging.Filter):
    def __init__(self, kinds: tuple[type[BaseException], ...]) -> None:
        super().__init__()
        self.kinds = kinds

    def filter(self, record: logging.LogRecord) -> bool:
        if isinstance(record.exc_info, tuple) and isinstance(record.exc_info[1], self.kinds):
            record.exc_info = None
            record.exc_text = None
        return True


def without_traceback(*kinds: type[BaseException]) -> None:
    """Have Prefect log these errors, beside a vendor's and a job's, without their traceback.

    Called at run time and not at import, because Prefect sets its loggers up anew when a run begins.
    """
    wanted = (VendorError, BlockNotFound, InputError, JobError, *kinds)
    for name in _LOGGERS:
        logger = logging.getLogger(name)
        ours = next((f for f in logger.filters if isinstance(f, _WithoutTraceback)), None)
        if ours is None:
            logger.addFilter(_WithoutTraceback(wanted))
        else:
            ours.kinds = tuple({*ours.kinds, *wanted})
