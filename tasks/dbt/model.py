"""What a dbt Core step is asked to do, and what comes back.

Errors:

    DbtError                     dbt could not do its work at all: no connection, a locked file, a crash
    ├── DbtInputError            project, profile or selection is wrong; trying again does not help
    ├── DbtTimeout               the time allowed was over, dbt was stopped
    └── DbtBuildFailed           dbt ran, some nodes failed; `.result` has every node
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from tasks.dbt.lineage import Lineage
from tasks.intervals import END_VAR, START_VAR, DataInterval
from tasks.jobs import ToolParameters

Command = Literal["build", "run", "test", "seed", "snapshot"]

# What each command runs; `build` runs whatever is not in NEVER_RUN.
COMMAND_TYPES: dict[str, frozenset[str]] = {
    "run": frozenset({"model"}),
    "test": frozenset({"test", "unit_test"}),
    "seed": frozenset({"seed"}),
    "snapshot": frozenset({"snapshot"}),
}
NEVER_RUN = frozenset({"source", "exposure", "metric", "semantic_model", "analysis"})

# Options of dbt's that decide what a build does, and that it also takes from its environment.
_OPTIONS = (
    "DBT_FULL_REFRESH",
    "DBT_EMPTY",
    "DBT_SAMPLE",
    "DBT_RESOURCE_TYPES",
    "DBT_EXCLUDE_RESOURCE_TYPES",
    "DBT_INDIRECT_SELECTION",
    "DBT_DEFER",
    "DBT_FAVOR_STATE",
    "DBT_FAIL_FAST",
)
_OFF = ("0", "false", "f", "no", "n", "off")


class DbtCore(ToolParameters):
    """A dbt Core project and how to run it: a flow parameter, a form in the UI, a line in a deployment."""

    # It holds no block; what was written wrong may be shown.
    model_config = ConfigDict(hide_input_in_errors=False)

    tool: Literal["dbt-core"] = "dbt-core"
    project_dir: Path = Field(description="Folder that holds dbt_project.yml.")
    profiles_dir: Path | None = Field(
        default=None,
        description="Folder that holds profiles.yml. Default: DBT_PROFILES_DIR, the project's folder if it is"
        " there, else ~/.dbt. The file may hold Prefect blocks and variables ({{ prefect.variables.x }}).",
    )
    target: str | None = Field(default=None, description="Target of the profile; default: the profile's own.")
    select: list[str] = Field(
        default=[], description="What to build, in dbt's selection syntax; empty: everything."
    )
    exclude: list[str] = Field(
        default=[], description="What to leave out, in dbt's selection syntax; not beside a selector."
    )
    selector: str | None = Field(
        default=None, description="Name of a selector in selectors.yml, in place of select and exclude."
    )
    vars: dict[str, Any] = Field(default={}, description="dbt variables (--vars).")
    full_refresh: bool = Field(
        default=False,
        description="Rebuild incremental models and seeds from nothing; not in a run with a data interval.",
    )
    threads: int | None = Field(default=None, ge=1, description="dbt threads; default: the profile's.")
    data_interval: DataInterval | None = Field(
        default=None,
        title="Data interval",
        description="Which part of the data: the variables data_interval_start and data_interval_end, and the"
        " event times of microbatch models. Set by the flow that has an interval.",
    )
    target_path: Path | None = Field(
        default=None,
        description="Folder for what dbt writes (target), seen from the project. Two dbt processes at a time"
        " need one each.",
    )
    command: Command = Field(default="build", description="The dbt command to run.")
    env: dict[str, str] = Field(
        default={},
        description="Environment of dbt, for env_var() in the project or profile. Not for secrets: it is"
        " stored with the run's parameters.",
    )
    install_packages: bool = Field(
        default=True,
        title="Install packages",
        description="Run `dbt deps` when packages that the project declares are not installed.",
    )
    timeout: float | None = Field(default=None, gt=0, description="Seconds after which dbt is stopped.")
    retries: int = Field(
        default=0, ge=0, description="How often the whole dbt step is tried again when it fails."
    )
    retry_delay: float = Field(default=0.0, ge=0, description="Seconds to wait before each retry.")
    owner: str | None = Field(default=None, description="Who is told when this step fails.")
    engine: Literal["subprocess", "prefect-dbt"] = Field(
        default="subprocess",
        description="subprocess: dbt in its own process, every node live, can be cancelled."
        " prefect-dbt: PrefectDbtRunner inside this process (asset events; slower, cannot be cancelled).",
    )

    @model_validator(mode="after")
    def _combinations(self) -> DbtCore:
        if self.selector and self.select:
            raise ValueError(
                "dbt takes a selector or a select list, not both: it would silently ignore the select list."
                f" Drop selector={self.selector!r} or select={self.select!r}."
            )
        if self.selector and self.exclude:
            raise ValueError(
                "dbt takes a selector or an exclude list, not both: it would silently build what the list"
                f" leaves out. Write the exclude into selector {self.selector!r} of selectors.yml, or"
                " select in place of the selector."
            )
        if self.full_refresh and self.command not in {"build", "run", "seed"}:
            raise ValueError(
                f"full_refresh means nothing to `dbt {self.command}`: use it with build, run or seed."
            )
        if self.full_refresh and self.data_interval and self.command != "seed":
            raise ValueError(
                "a full refresh with a data interval would leave incremental models with nothing but that"
                " interval: refresh them without an interval, or build the interval without full_refresh."
            )
        if self.engine == "prefect-dbt" and self.timeout is not None:
            raise ValueError(
                "engine='prefect-dbt' runs dbt inside this process and cannot be stopped: no timeout."
            )
        if given := sorted({START_VAR, END_VAR} & self.vars.keys()) if self.data_interval else []:
            raise ValueError(f"data_interval sets the dbt variables, so vars can't: leave out {given[0]}.")
        if blank := [text for text in (*self.select, *self.exclude) if not text.strip()]:
            raise ValueError(f"select and exclude hold an empty entry ({blank[0]!r}): remove it.")
        return self

    @property
    def what(self) -> str:
        """The command with its selection in short, for people: `dbt build tag:daily`."""
        words = self.select or ([f"selector {self.selector}"] if self.selector else [])
        text = f"dbt {self.command}" + (f" {' '.join(words)}" if words else "")
        return text if len(text) <= 80 else text[:79] + "…"

    @property
    def without_full_refresh(self) -> DbtCore:
        """For `dbt retry`, which has the flag from the state."""
        return self.model_copy(update={"full_refresh": False})

    @property
    def flags(self) -> dict[str, Any]:
        """What `dbt retry` must know of the command that it repeats, as dbt's run_results.json has it."""
        flags: dict[str, Any] = {"which": self.command}
        if self.full_refresh:
            flags["full_refresh"] = True
        if self.target:
            flags["target"] = self.target
        if self.threads:
            flags["threads"] = self.threads
        if self.all_vars:
            flags["vars"] = json_text(self.all_vars)
        for flag, moment in self._event_times(self.command).items():
            flags[flag.removeprefix("--").replace("-", "_")] = moment
        return flags

    @property
    def all_vars(self) -> dict[str, Any]:
        """The variables, with those of the data interval."""
        return {**self.vars, **(self.data_interval.vars if self.data_interval else {})}

    def _event_times(self, command: str) -> dict[str, str]:
        """What microbatch models take their batches from; only these commands have the options."""
        if self.data_interval is None or command not in {"build", "run"}:
            return {}
        start, end = self.data_interval.utc
        # Whole seconds are the finest that dbt takes.
        return {
            "--event-time-start": f"{start:%Y-%m-%dT%H:%M:%S}",
            "--event-time-end": f"{end:%Y-%m-%dT%H:%M:%S}",
        }

    @property
    def task_options(self) -> dict[str, Any]:
        """The retry policy as keyword arguments of `Task.with_options`."""
        return {"retries": self.retries, "retry_delay_seconds": self.retry_delay}

    @property
    def whole(self) -> DbtCore:
        """The same project without a selection."""
        return self.model_copy(update={"select": [], "exclude": [], "selector": None})

    @property
    def project(self) -> Path:
        """The project folder, absolute."""
        return self.project_dir.expanduser().absolute()

    def variable(self, name: str) -> str | None:
        """What dbt will find in its environment under this name; None if that is nothing."""
        return self.env.get(name, os.environ.get(name)) or None

    @property
    def options_in_environment(self) -> list[str]:
        """What a worker's environment says to dbt about what is built: nobody sees it in the parameters."""
        said = {name: self.variable(name) for name in _OPTIONS}
        return [f"{name}={value}" for name, value in said.items() if value and value.lower() not in _OFF]

    def find_profiles_dir(self) -> Path:
        """Where profiles.yml is looked for: dbt's own rules, seen from the project folder."""
        if self.profiles_dir is not None:
            return self.profiles_dir.expanduser().absolute()
        if configured := self.variable("DBT_PROFILES_DIR"):
            return Path(configured).expanduser().absolute()
        return self.project if (self.project / "profiles.yml").is_file() else Path.home() / ".dbt"

    def arguments(self, *, command: str) -> list[str]:
        """The project's part of the dbt command line: no command, no profiles folder, no selection.

        Args:
            command: The command that it is for: `build`, `ls` and so on.
        """
        args = ["--project-dir", str(self.project), "--write-json"]
        if self.target:
            args += ["--target", self.target]
        if self.target_path:
            args += ["--target-path", str(self.project / self.target_path)]
        if self.all_vars:
            args += ["--vars", json_text(self.all_vars)]
        for flag, moment in self._event_times(command).items():
            args += [flag, moment]
        if command != "ls":
            if self.threads:
                args += ["--threads", str(self.threads)]
            if self.full_refresh:
                args += ["--full-refresh"]
        return args

    def selection(self, exclude: Sequence[str] = ()) -> list[str]:
        """The command line's selection: `--select … --exclude … --selector …`.

        Args:
            exclude: What to leave out beside the project's own `exclude`.
        """
        args = ["--selector", self.selector] if self.selector else []
        for flag, words in (("--select", self.select), ("--exclude", [*self.exclude, *exclude])):
            args += [flag, *words] if words else []
        return args

    def must_narrow(self, exclude: Sequence[str]) -> bool:
        """Whether dbt would get this wrong if `exclude` were just added to the command line.

        It ignores --exclude beside --selector, and drops a default selector when there is an --exclude:
        either way what must be left out would be built.
        """
        default_possible = not self.select and not self.exclude and (self.project / "selectors.yml").is_file()
        return bool(exclude) and (self.selector is not None or default_possible)


def json_text(value: Any) -> str:
    """JSON with sorted keys: dbt throws its parse cache away when the text of --vars changes."""
    return json.dumps(value, sort_keys=True)


class DbtState(StrEnum):
    """How a node, or a whole invocation, ended."""

    SUCCESS = "success"
    WARN = "warn"
    FAIL = "fail"
    ERROR = "error"
    SKIPPED = "skipped"


class DbtNode(BaseModel):
    """One node (model, test, seed, snapshot, hook …) of a finished dbt invocation."""

    model_config = ConfigDict(frozen=True)

    unique_id: str
    name: str
    resource_type: str
    state: DbtState
    message: str | None = Field(
        default=None, description="dbt's or the database's own words, or why it was skipped."
    )
    rows: int | None = Field(default=None, description="Rows written, where the warehouse tells.")
    failures: int | None = Field(default=None, description="Of a test: how many rows failed it.")
    duration: float = Field(default=0.0, description="Seconds.")
    compiled_path: str | None = None
    group: str | None = None
    owner: str | None = Field(default=None, description="Owner of the node's dbt group.")
    earlier: bool = Field(default=False, description="Done by an earlier attempt, and not run again.")

    @property
    def label(self) -> str:
        """How people call it: `model fct_flights`, `test not_null_flights_id`."""
        return label_of(self.resource_type, self.name)


class DbtResult(BaseModel):
    """A finished dbt invocation, node by node."""

    model_config = ConfigDict(frozen=True)

    state: DbtState
    nodes: list[DbtNode] = []
    counts: dict[str, int] = Field(default={}, description="Number of nodes per state.")
    duration: float = Field(default=0.0, description="Seconds, dbt's start included.")
    invocation_id: str | None = None
    url: str | None = None
    message: str = ""
    command: str = ""
    warnings: list[str] = Field(default=[], description="What dbt warned of that concerns no single node.")

    @classmethod
    def from_nodes(
        cls,
        nodes: list[DbtNode],
        *,
        command: str,
        duration: float,
        invocation_id: str | None = None,
        warnings: Sequence[str] = (),
    ) -> DbtResult:
        """Sums the nodes up: state, counts and the one-line message."""
        counts = Counter(node.state.value for node in nodes)
        return cls(
            state=_state_of(counts),
            nodes=nodes,
            counts=dict(counts),
            duration=duration,
            invocation_id=invocation_id,
            message=_summary(nodes),
            command=command,
            warnings=list(warnings),
        )

    @property
    def failed(self) -> list[DbtNode]:
        """Nodes that failed: tests that found bad rows, nodes that the database refused."""
        return [node for node in self.nodes if node.state in {DbtState.FAIL, DbtState.ERROR}]

    @property
    def skipped(self) -> list[DbtNode]:
        """Nodes that dbt did not run because something above them failed."""
        return [node for node in self.nodes if node.state is DbtState.SKIPPED]

    @property
    def warned(self) -> list[DbtNode]:
        """Tests that found bad rows but are only meant to warn."""
        return [node for node in self.nodes if node.state is DbtState.WARN]

    @property
    def built(self) -> list[DbtNode]:
        """Models, seeds and snapshots that are now up to date."""
        kinds = {"model", "seed", "snapshot"}
        return [node for node in self.nodes if node.resource_type in kinds and node.state is DbtState.SUCCESS]


class DbtPlan(BaseModel):
    """What dbt would run, seen before anything is started."""

    model_config = ConfigDict(frozen=True)

    project: str
    adapter: str = Field(description="The warehouse: duckdb, postgres, snowflake …")
    target: str | None = None
    place: str = Field(default="", description="Which warehouse it is, as a digest: its host, or its file.")
    selected: list[str] = Field(description="Unique ids of the nodes that the command would run.")
    lineage: Lineage = Field(description="The whole project's graph, sources and exposures included.")


class DbtError(Exception):
    """dbt could not do its work; the message is one sentence that says why and, where known, what to do."""


class DbtInputError(DbtError):
    """What was asked for can't be done with this project, profile or selection; a retry would not help."""


class DbtTimeout(DbtError):
    """dbt did not finish in the time allowed and was stopped."""


class DbtBuildFailed(DbtError):
    """dbt ran to its end and some nodes failed; `.result` tells about every node."""

    def __init__(self, result: DbtResult) -> None:
        super().__init__(result.message)
        self.result = result

    def __reduce__(self) -> tuple[type[DbtBuildFailed], tuple[DbtResult]]:
        # Prefect pickles exceptions into result storage; the default would pass the message as `result`.
        return (type(self), (self.result,))


def label_of(resource_type: str, name: str) -> str:
    """`model fct_flights`, `unit test daily_totals`, `hook shop.on-run-start.0`."""
    kind = "hook" if resource_type == "operation" else resource_type.replace("_", " ")
    return f"{kind} {name}"


def one_line(text: str | None, limit: int = 300) -> str:
    """Several lines of dbt output as one, cut to a readable length."""
    flat = " ".join((text or "").split())
    return flat if len(flat) <= limit else flat[: limit - 1] + "…"


def reason_of(text: str | None) -> str:
    """The database's complaint out of dbt's message: no `Runtime Error in model x (…)`, no SQL."""
    body = re.sub(r"\A\s*(?:\w+ Error in .*|\S+ failed, error:)\n", "", text or "")
    body = re.split(r"\n\s*\n|\n\s*LINE \d+:|\n\s*compiled code at ", body.strip())[0]
    return one_line(body or text, 200)


def _state_of(counts: Counter[str]) -> DbtState:
    worst_first = (DbtState.ERROR, DbtState.FAIL, DbtState.SKIPPED, DbtState.WARN)
    if not counts:
        return DbtState.SKIPPED
    return next((state for state in worst_first if counts[state.value]), DbtState.SUCCESS)


def _summary(nodes: list[DbtNode]) -> str:
    """`3 of 50 nodes failed: model x: <error>, …; 5 skipped`."""
    by_state = Counter(node.state for node in nodes)
    failed = [node for node in nodes if node.state in {DbtState.FAIL, DbtState.ERROR}]
    extra = [f"{by_state[DbtState.WARN]} warned"] if by_state[DbtState.WARN] else []
    extra += [f"{by_state[DbtState.SKIPPED]} skipped"] if by_state[DbtState.SKIPPED] else []
    earlier = sum(node.earlier for node in nodes)
    extra += [f"{earlier} done in an earlier attempt"] if earlier else []
    tail = "".join(f"; {part}" for part in extra)
    if not nodes:
        return "nothing was selected, so nothing was built"
    noun = "node" if len(nodes) == 1 else "nodes"
    if not failed:
        return f"{by_state[DbtState.SUCCESS]} of {len(nodes)} {noun} succeeded{tail}"
    shown = ", ".join(f"{node.label}: {reason_of(node.message)}" for node in failed[:3])
    more = f", and {len(failed) - 3} more" if len(failed) > 3 else ""
    return f"{len(failed)} of {len(nodes)} {noun} failed: {shown}{more}{tail}"
