"""The journal in the Prefect API: complete, readable by anybody, and not to be forged by a name."""

from __future__ import annotations

import asyncio
import json
import re
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from typing import Any
from uuid import UUID, uuid4

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import ArtifactCreate
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId
from prefect.settings import PREFECT_API_URL, temporary_settings
from pydantic import ValidationError

from tasks.jobs import Entry, JobHandle, JobResult, JobState, MemoryJournal, RunJournal, read_entries
from tasks.jobs.journal import ARTIFACT_KEY
from tests.jobs_fixtures import PREFECTS_SOCKETS, collected

__all__ = ["collected"]

pytestmark = PREFECTS_SOCKETS
NOW = datetime(2013, 1, 1, tzinfo=UTC)


def entry(number: int, **fields: object) -> Entry:
    base = Entry(key=f"airbyte:sync:{number}", vendor="airbyte", resource_id=f"{number}", name="n", since=NOW)
    return base.model_copy(update=fields)


def handle(job_id: str, url: str | None = None) -> JobHandle:
    return JobHandle(vendor="airbyte", resource_id="1", job_id=job_id, started_at=NOW, url=url)


def result(**fields: object) -> JobResult:
    base = JobResult(vendor="airbyte", resource_id="1", name="n", state=JobState.FAILED)
    return base.model_copy(update=fields)


def away() -> AbstractContextManager[object]:
    """A time in which nobody listens where the API should be."""
    return temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"})


async def pages(flow_run_id: UUID) -> list[str]:
    scope = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[flow_run_id]))
    async with get_client() as client:
        return [str(page.data) for page in await client.read_artifacts(artifact_filter=scope)]


async def test_another_process_reads_it() -> None:
    """What is recorded is in the API when `record` returns: intent, job, end, in that order."""
    run, journal = uuid4(), RunJournal(uuid4(), None)
    journal._flow_run_id = run
    steps = [
        entry(1),
        entry(1, handle=handle("7", "http://v/7")),
        entry(1, handle=handle("7"), result=result()),
    ]
    for step in steps:
        await journal.record(step, urgent=step.handle is None)
        (found,) = await read_entries(run)
        assert (found.handle, found.result) == (step.handle, step.result)
        assert found.since == NOW
    assert len(await pages(run)) == 1, "one artifact, updated"


async def test_more_entries_than_a_page_holds() -> None:
    """A fan-out of 250 jobs takes three artifacts and few requests, and is read back whole."""
    run = uuid4()
    journal = RunJournal(run, None)
    await asyncio.gather(*(journal.record(entry(number), urgent=True) for number in range(250)))
    await asyncio.gather(
        *(journal.record(entry(number, handle=handle(str(number)))) for number in range(250))
    )
    assert len(await pages(run)) == 3
    found = await read_entries(run)
    assert {e.resource_id for e in found if e.handle and e.handle.job_id == e.resource_id} == {
        str(number) for number in range(250)
    }


async def test_more_artifacts_than_are_read_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run whose every task wrote a page of its own is read back whole."""
    monkeypatch.setattr("tasks.jobs.journal._PAGE", 10)
    run = uuid4()
    await asyncio.gather(*(RunJournal(run, None).record(entry(n), urgent=True) for n in range(25)))
    assert len(await read_entries(run)) == 25


HOSTILE = [
    "a | b || c",
    "two\nlines\r\nand\u2028more",
    "--> <!-- journal [] -->",
    "\n<!-- journal [] -->\n",
    "<script>alert(1)</script>",
    "[click](http://evil.example) `code` **bold** \\",
    "</td> | \\| \\\\| -->",
    "\x00\x1b[31m \ud83d\ude00 \u202e",
]


@pytest.mark.parametrize("text", HOSTILE)
async def test_names_do_not_break_out(text: str) -> None:
    """Whatever a connection or a message is called, it is read back as it was and stays in its cell."""
    text = text.encode("utf-16", "surrogatepass").decode("utf-16")
    run = uuid4()
    written = entry(
        1,
        name=text,
        resource_id=text,
        marker=text,
        known=[text],
        handle=handle(text, f"http://v/{text})"),
        result=result(message=text, name=text),
    )
    await RunJournal(run, None).record(written, urgent=True)
    (found,) = await read_entries(run)
    assert found.model_dump(exclude={"updated"}) == written.model_dump(exclude={"updated"})
    (page,) = await pages(run)
    table, _, record = page.partition("\n\n")
    rows = table.split("\n")
    assert len(rows) == 3
    assert len(re.findall(r"(?<!\\)(?:\\\\)*\|", rows[2])) == 5, "four cells"
    assert "<" not in table
    assert record.count("-->") == 1


async def test_the_newest_word_counts() -> None:
    """Of two attempts that wrote about one job, the later one is believed."""
    run = uuid4()
    first, second = RunJournal(run, None), RunJournal(run, None)
    await first.record(entry(1), urgent=True)
    await second.record(entry(1, handle=handle("2")), urgent=True)
    await first.record(entry(2), urgent=True)  # the first one's page is the last that was written
    found = {e.key: e for e in await RunJournal(run, None).entries()}
    assert found["airbyte:sync:1"].handle
    assert len(found) == 2


async def test_a_page_that_cannot_be_read() -> None:
    """A page that somebody broke is an error, for whoever starts without knowing starts twice."""
    run = uuid4()
    async with get_client() as client:
        for text in ("just a note", json.dumps({"a": 1})):
            await client.create_artifact(
                ArtifactCreate(key=ARTIFACT_KEY, type="markdown", data=text, flow_run_id=run)
            )
        assert await read_entries(run) == []
        broken = '<!-- journal [{"key": 1}] -->'
        await client.create_artifact(
            ArtifactCreate(key=ARTIFACT_KEY, type="markdown", data=broken, flow_run_id=run)
        )
    with pytest.raises(ValidationError):
        await RunJournal(run, None).entry("airbyte:sync:1")


async def test_the_api_is_away() -> None:
    """A record that can't be written says so, and is written with the next one that can."""
    run = uuid4()
    journal = RunJournal(run, None)
    await journal.record(entry(1), urgent=True)
    with away(), pytest.raises(Exception, match="connect"):
        await journal.record(entry(1, handle=handle("7")), urgent=True)
    await journal.record(entry(2))
    found = {e.key: e for e in await read_entries(run)}
    assert found["airbyte:sync:1"].handle == handle("7")
    assert "airbyte:sync:2" in found


async def test_reading_is_tried_again() -> None:
    """A journal that could not be read at first is read when it is asked again."""
    run = uuid4()
    await RunJournal(run, None).record(entry(1), urgent=True)
    journal = RunJournal(run, None)
    with away(), pytest.raises(Exception, match="connect"):
        await journal.entry("airbyte:sync:1")
    assert await journal.entry("airbyte:sync:1")


async def test_what_is_not_urgent_is_gathered(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundred ends of jobs within a moment are one write of one page."""
    run = uuid4()
    journal = RunJournal(run, None)
    await journal.record(entry(0), urgent=True)
    write, written = journal._write_page, []

    async def noting(client: Any, page: int) -> None:
        written.append(page)
        await write(client, page)

    monkeypatch.setattr(journal, "_write_page", noting)
    await asyncio.gather(*(journal.record(entry(number)) for number in range(100)))
    assert written == [0]
    assert len(await read_entries(run)) == 100


async def test_a_waiter_who_leaves_loses_nothing() -> None:
    """A record whose writer is cancelled in the middle is written all the same."""
    run = uuid4()
    journal = RunJournal(run, None)
    record = asyncio.create_task(journal.record(entry(1)))
    await asyncio.sleep(0.01)
    record.cancel()
    await journal.record(entry(2), urgent=True)
    assert len(await read_entries(run)) == 2


async def test_jobs_of_a_resource() -> None:
    """Both journals know every job that a resource has had, whatever became of it."""
    for journal in (MemoryJournal(), RunJournal(uuid4(), None)):
        for number, job_id in ((1, "10"), (2, "11")):
            await journal.record(
                entry(number, resource_id="r", known=["9"], handle=handle(job_id)), urgent=True
            )
        await journal.record(entry(3, resource_id="other", handle=handle("99")), urgent=True)
        assert await journal.job_ids("airbyte", "r") == ["9", "10", "11"]
