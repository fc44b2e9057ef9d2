"""Flows that test_runner.py starts in processes of their own, to interrupt them.

`python runner_flows.py <flow> <log file>`; every event is a line in the log file.
"""

import asyncio
import os
import sys
import time
from pathlib import Path

from prefect import flow, task

from tasks.jobs.runner import EventLoopTaskRunner, at_loop_exit, current_interrupt


def note(log: str, line: str) -> None:
    with Path(log).open("a") as file:  # one short write in append mode: lines of many tasks don't mix
        file.write(line + "\n")


async def say_goodbye(log: str) -> None:
    await asyncio.sleep(0)
    note(log, "loop-exit")


@task
async def wait_long(number: int, log: str, cleanup: float = 0.2) -> None:
    if number == 0:
        at_loop_exit(lambda: say_goodbye(log))
    note(log, f"start {number}")
    try:
        await asyncio.sleep(120)
    except asyncio.CancelledError:
        note(log, f"told {current_interrupt()}")
        await asyncio.sleep(cleanup)
        note(log, f"clean {number}")
        raise


@task
def hold_thread(log: str, seconds: float) -> None:
    note(log, "start thread")
    time.sleep(seconds)
    note(log, "end thread")


@flow(task_runner=EventLoopTaskRunner(max_concurrency=30))
def fan_out(log: str) -> None:
    note(log, f"pid {os.getpid()}")
    wait_long.map(range(50), log=log).result()


@flow(task_runner=EventLoopTaskRunner())
def fire_and_forget(log: str) -> None:
    wait_long.map(range(3), log=log)


@flow(task_runner=EventLoopTaskRunner(cancel_grace=120))
def stubborn(log: str) -> None:
    wait_long.map(range(3), log=log, cleanup=100).result()


@flow(task_runner=EventLoopTaskRunner(cancel_grace=1))
def short_grace(log: str) -> None:
    thread = hold_thread.submit(log, 100)
    wait_long.map(range(3), log=log, cleanup=100).wait()
    thread.wait()


@flow(task_runner=EventLoopTaskRunner())
async def async_fan_out(log: str) -> None:
    futures = wait_long.map(range(10), log=log)
    await asyncio.gather(*[future.result_async() for future in futures])


@flow(task_runner=EventLoopTaskRunner())
def parent(log: str) -> None:
    wait_long.submit(99, log)
    fan_out(log)


if __name__ == "__main__":
    name, log_file = sys.argv[1:]
    if name == "async_fan_out":
        asyncio.run(async_fan_out(log_file))
    else:
        globals()[name](log_file)
