"""Known errors in the log as one sentence, and without what nobody is to read.

Prefect logs every exception of a task with its traceback. For a failed sync or a mistyped connection id that
is thirty lines from the inside of this collection around the one line that somebody has to read.
"""

from __future__ import annotations

import logging

from blocks.http import VendorError
from blocks.reference import BlockError
from tasks.jobs.model import InputError, JobError

_PARAMETERS = "prefect.flows"
_REFUSED = "Parameter validation failed for flow"
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


class _WithoutParameters(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        if record.getMessage().startswith(_REFUSED):
            record.msg = (
                f"{_REFUSED}; they are not repeated here, for they may hold secrets. "
                "The run's state says what is wrong."
            )
            record.args = ()
        return True


def without_parameters() -> None:
    """Have Prefect not log the parameters that a flow has refused.

    It logs all of them, also a webhook's URL that was given in place of a block's name. The other parts of
    its answer, the state and the exception, hold no more than where it is wrong and why.
    """
    logger = logging.getLogger(_PARAMETERS)
    if not any(isinstance(f, _WithoutParameters) for f in logger.filters):
        logger.addFilter(_WithoutParameters())


def without_traceback(*kinds: type[BaseException]) -> None:
    """Have Prefect log these errors, beside a vendor's and a job's, without their traceback.

    Called at run time and not at import, because Prefect sets its loggers up anew when a run begins.
    """
    wanted = (VendorError, BlockError, InputError, JobError, *kinds)
    for name in _LOGGERS:
        logger = logging.getLogger(name)
        ours = next((f for f in logger.filters if isinstance(f, _WithoutTraceback)), None)
        if ours is None:
            logger.addFilter(_WithoutTraceback(wanted))
        else:
            ours.kinds = tuple({*ours.kinds, *wanted})
