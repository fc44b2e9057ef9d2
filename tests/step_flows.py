"""A chain of one step that takes ten minutes in a thread, for test_steps.py to interrupt.

`python -m tests.step_flows <python or sql> <folder>`; the file `began` in the folder says that it is at work.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from prefect import flow
from prefect_sqlalchemy import SqlAlchemyConnector
from sqlalchemy import Engine, event

from tasks.jobs import EventLoopTaskRunner
from tasks.steps import PythonStep, SqlStep, run_step

LONG = (
    "CREATE TABLE t AS SELECT sum(a.range % 7 * b.range % 5) AS n FROM range(100000000) a, range(1000000) b"
)


@flow(task_runner=EventLoopTaskRunner())
def one_step(kind: str, folder: str) -> None:
    began = Path(folder, "began")
    step: Any
    if kind == "python":
        step = PythonStep(call="tests.own_functions:hold", arguments={"path": str(began)})
    else:
        event.listen(Engine, "before_cursor_execute", lambda *_: began.touch())
        database = SqlAlchemyConnector(connection_info=f"duckdb:///{folder}/w.duckdb")
        step = SqlStep(database=database, statements=[LONG])
    run_step.submit(step, "test").wait()


if __name__ == "__main__":
    one_step(sys.argv[1], sys.argv[2])
