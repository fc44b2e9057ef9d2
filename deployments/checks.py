"""What is wrong with a deployment, found before a server hears of it."""

from __future__ import annotations

import fnmatch
import inspect
import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

from prefect.client.schemas.schedules import CronSchedule, IntervalSchedule, RRuleSchedule
from prefect.events import DeploymentTriggerTypes
from prefect.exceptions import ParameterTypeError, PrefectException
from prefect.server.events.schemas.events import ReceivedEvent
from prefect.utilities.importtools import import_object
from prefect.utilities.schema_tools.hydration import HydrationError
from pydantic import TypeAdapter, ValidationError

from deployments.entries import Entry, Schedule
from deployments.environments import DeployError, Environment
from tasks.block_references import OutOfReach, block_references, with_blocks
from tasks.events import OnceTrigger, render

EXAMPLES = Path(__file__).with_name("examples")
"""An event of each kind that a trigger expects, `<event>.json`, as it is posted to Prefect."""

_TRIGGER: TypeAdapter[Any] = TypeAdapter(DeploymentTriggerTypes)


def problems_of(entries: Sequence[Entry], examples: Path = EXAMPLES) -> list[str]:
    """Everything that is wrong with these deployments, a line each; empty if nothing is.

    Entrypoints import, parameters are what the flows take, also those that a trigger makes of an example of
    its event, schedules are schedules, triggers are triggers, and pull steps can be called.

    Args:
        entries: The deployments.
        examples: Where the example events are.
    """
    found: list[str] = []
    for entry in entries:
        try:
            _ = entry.flow
        except DeployError as error:
            found.append(str(error))
            continue
        with _quiet():
            found += [f"{entry.name}: {problem}" for problem in _problems(entry, examples)]
    names = Counter(trigger.get("name") for entry in entries for trigger in _triggers(entry))
    found += [f"{count} triggers are called {name!r}" for name, count in names.items() if name and count > 1]
    return found


@contextmanager
def _quiet() -> Iterator[None]:
    """Prefect logs what it finds wrong, all parameters and a traceback with it, before it raises it."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


def _problems(entry: Entry, examples: Path) -> Iterator[str]:
    bare = any(not schedule.parameters for schedule in entry.schedules)
    yield from _parameters(entry, entry.parameters, needs_all=bare)
    for schedule in entry.schedules:
        where = f"schedule {schedule.slug}"
        try:
            as_prefect_has_it(schedule)
        except (DeployError, ValueError) as error:
            yield f"{where}: {_first_line(error)}"
        if schedule.parameters:
            together = {**entry.parameters, **schedule.parameters}
            yield from (f"{where}: {problem}" for problem in _parameters(entry, together, needs_all=True))
    for slug, count in Counter(schedule.slug for schedule in entry.schedules).items():
        if count > 1:
            yield f"{count} schedules have the slug {slug}"
    for trigger in _triggers(entry):
        where = f"trigger {trigger.get('name') or '?'}"
        yield from (f"{where}: {problem}" for problem in _trigger(entry, trigger, examples))
    for step in entry.pull or ():
        yield from _step(step)


# -- parameters ---------------------------------------------------------------------------------------------


def _parameters(entry: Entry, parameters: dict[str, Any], *, needs_all: bool) -> Iterator[str]:
    """What the flow says to these parameters, its models' cross-field rules included."""
    unknown = parameters.keys() - inspect.signature(entry.flow.fn).parameters.keys()
    if unknown:
        yield f"{entry.flow.name} takes no {', '.join(sorted(unknown))}"
        return
    try:
        entry.flow.validate_parameters(parameters)
    except ParameterTypeError as error:
        cause = error.__cause__ or error.__context__
        if not isinstance(cause, ValidationError):
            yield str(error)
            return
        for one in cause.errors(include_url=False, include_input=False, include_context=False):
            # What a deployment leaves out, a form or a trigger gives; a schedule has nothing to give.
            if needs_all or one["type"] != "missing" or len(one["loc"]) > 1:
                yield f"{'.'.join(str(step) for step in one['loc'])}: {one['msg']}"


# -- schedules ----------------------------------------------------------------------------------------------


def as_prefect_has_it(schedule: Schedule) -> CronSchedule | IntervalSchedule | RRuleSchedule:
    """The schedule as Prefect's own model.

    Raises:
        DeployError: It is none of cron, interval and rrule, or more than one.
        ValueError: It does not parse.
    """
    kinds = [name for name in ("cron", "interval", "rrule") if getattr(schedule, name) is not None]
    if len(kinds) != 1:
        raise DeployError(f"needs one of cron, interval and rrule, and has {' and '.join(kinds) or 'none'}")
    zone = {"timezone": schedule.timezone} if schedule.timezone else {}
    if schedule.cron:
        day_or = {} if schedule.day_or is None else {"day_or": schedule.day_or}
        return CronSchedule.model_validate({"cron": schedule.cron, **zone, **day_or})
    if schedule.rrule:
        return RRuleSchedule.model_validate({"rrule": schedule.rrule, **zone})
    anchor = {"anchor_date": schedule.anchor_date} if schedule.anchor_date else {}
    every = timedelta(seconds=schedule.interval or 0)
    return IntervalSchedule.model_validate({"interval": every, **zone, **anchor})


# -- triggers -----------------------------------------------------------------------------------------------


def _triggers(entry: Entry) -> Iterable[dict[str, Any]]:
    return (*entry.triggers, *entry.once_triggers)


def _trigger(entry: Entry, spec: dict[str, Any], examples: Path) -> Iterator[str]:
    if not spec.get("name"):
        yield "it has no name, and Prefect's own names repeat"
    try:
        trigger = _read(entry, spec)
    except ValidationError as error:
        for one in error.errors(include_url=False, include_input=False, include_context=False):
            # Without the names of the models that it might have been.
            place = [str(step) for step in one["loc"] if not str(step)[:1].isupper()]
            yield f"{'.'.join(place)}: {one['msg']}"
        return
    if unknown := sorted(spec.keys() - type(trigger).model_fields.keys()):  # Prefect passes over them
        yield f"a trigger has no {', '.join(unknown)}"
    if not trigger.parameters:
        return
    for event, files in _examples(spec, examples):
        if not files:
            yield f"there is no example of the event {event}: put one into {examples.name}/{event}.json"
        for file in files:
            yield from (f"{file.name}: {problem}" for problem in _rendered(entry, trigger.parameters, file))


def _examples(spec: dict[str, Any], examples: Path) -> Iterator[tuple[str, list[Path]]]:
    """The files with examples of each event that a trigger expects."""
    for event in sorted(_expected(spec)):
        yield event, sorted(file for file in examples.glob("*.json") if fnmatch.fnmatch(file.stem, event))


def _read(entry: Entry, spec: dict[str, Any]) -> Any:
    """The trigger as whoever fires it reads it: Prefect, or our own receivers and listeners."""
    if spec in entry.once_triggers:
        own = {key: value for key, value in spec.items() if (key, value) != ("type", "event")}
        return OnceTrigger.model_validate({**own, "deployment": entry.full_name})
    return _TRIGGER.validate_python({"type": "event", **spec})


def _expected(spec: dict[str, Any]) -> set[str]:
    """The events that a trigger expects, those of the triggers within it included."""
    expect = spec.get("expect") or []
    inner = [_expected(one) for one in spec.get("triggers") or ()]
    return {expect} if isinstance(expect, str) else {*expect}.union(*inner)


def _rendered(entry: Entry, parameters: dict[str, Any], example: Path) -> Iterator[str]:
    """What is wrong with the parameters that a trigger makes of an example of its event."""
    try:
        event = _event(example)
    except ValueError as error:
        yield f"the example is no event: {_first_line(error)}"
        return
    try:
        made = render(parameters, event)
    except (HydrationError, PrefectException) as error:
        yield f"its parameters do not render: {_first_line(error)}"
        return
    yield from _parameters(entry, {**entry.parameters, **made}, needs_all=True)


def _event(example: Path) -> ReceivedEvent:
    return ReceivedEvent.model_validate(
        {"id": "00000000-0000-0000-0000-000000000000", "occurred": "2026-01-01T00:00:00Z"}
        | json.loads(example.read_text())
    )


# -- in an environment --------------------------------------------------------------------------------------


def with_trigger_blocks(entry: Entry, here: Environment, examples: Path) -> Entry:
    """The same deployment, with an environment's blocks in the parameters of Prefect's own triggers.

    Which of them are blocks is seen in what they render to.

    Args:
        entry: As it is in the file, with nothing wrong in it.
        here: The environment.
        examples: Where the example events are.

    Raises:
        DeployError: A template writes a block's name. Prefect renders it itself, so it can't be replaced.
    """
    triggers = []
    for spec in entry.triggers:
        try:
            given = with_blocks(entry.flow, spec.get("parameters") or {}, here.blocks, _made(spec, examples))
        except OutOfReach as block:
            raise DeployError(
                f"{entry.name}: trigger {spec['name']}: a template writes the name of {block}, and "
                f"{here.tag} has another: write it outside of the template"
            ) from None
        triggers.append({**spec, "parameters": given} if given else spec)
    return entry.model_copy(update={"triggers": triggers})


def not_its_own(entry: Entry, here: Environment) -> Iterator[str]:
    """Why a look must not be in an environment: a run of it would take away another environment's files.

    Args:
        entry: As it is in the file.
        here: The environment.
    """
    what = entry.parameters.get("what")
    if not (here.prefix and isinstance(what, dict) and what.get("action") in ("move", "delete")):
        return
    slugs = {f"{found.kind}/{found.name}" for found in block_references(entry.flow, {"what": what})}
    if "what" not in here.parameters and not here.blocks.keys() & {what.get("bucket"), *slugs}:
        yield (
            f"{entry.name}: {here.tag} would {what['action']} files of the place that the file names: put it "
            "into `without`, or its bucket into `blocks`, in environments.yaml"
        )


def blocks_named(entry: Entry, here: Environment, examples: Path) -> set[str]:
    """The slugs of all blocks that runs of a deployment name: by its own parameters, schedules and triggers.

    Args:
        entry: As it is in the environment, with nothing wrong in it.
        here: The environment.
        examples: Where the example events are.
    """
    given = [entry.parameters, *(schedule.parameters for schedule in entry.schedules)]
    for spec in entry.triggers:
        given += _made(spec, examples)
    for spec in entry.once_triggers:
        given += (with_blocks(entry.flow, made, here.blocks) for made in _made(spec, examples))
    return {found.slug for parameters in given for found in block_references(entry.flow, parameters)}


def _made(spec: dict[str, Any], examples: Path) -> list[dict[str, Any]]:
    """What a trigger renders to on each example of its events."""
    parameters = spec.get("parameters") or {}
    files = [file for _, found in _examples(spec, examples) for file in found] if parameters else []
    return [render(parameters, _event(file)) for file in files]


# -- pull steps ---------------------------------------------------------------------------------------------


def _step(step: dict[str, Any]) -> Iterator[str]:
    for name, arguments in step.items():
        try:
            function = import_object(name)
            given = {key: value for key, value in (arguments or {}).items() if key not in ("id", "requires")}
            inspect.signature(function).bind(**given)
        except (ImportError, AttributeError, PrefectException) as error:
            yield f"the pull step {name} can't be imported: {_first_line(error)}"
        except TypeError as error:
            yield f"the pull step {name}: {error}"


def _first_line(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        return f"{'.'.join(str(step) for step in first['loc'])}: {first['msg']}"
    return (str(error) or type(error).__name__).splitlines()[0]
