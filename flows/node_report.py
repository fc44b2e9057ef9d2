"""What a dbt job did, as Markdown for the UI: node by node, or source by source."""

from __future__ import annotations

from prefect.artifacts import create_markdown_artifact

from flows.report import cell
from tasks.dbt.freshness import Freshness, span
from tasks.dbt.model import DbtNode, DbtResult, DbtState

_MARKS = {
    DbtState.SUCCESS: "✓",
    DbtState.WARN: "◐",
    DbtState.FAIL: "✗",
    DbtState.ERROR: "✗",
    DbtState.SKIPPED: "○",
}
_ORDER = (DbtState.ERROR, DbtState.FAIL, DbtState.SKIPPED, DbtState.WARN, DbtState.SUCCESS)
_MOST = 500  # rows: past that the page is slow, and the table `dbt-nodes` has them all


def publish_build(ending: str, results: list[DbtResult]) -> None:
    """Show what was built as the run's artifact `dbt-report`.

    Args:
        ending: Name of the run's final state.
        results: One for each time that dbt was run.
    """
    parts = [f"# {ending}"]
    for result in results:
        parts += [f"## {result.command}", f"{result.message} ({result.duration:.1f} s)"]
        if result.nodes:
            parts.append(_nodes(result.nodes))
        if result.warnings:
            parts.append("**dbt warns**\n\n" + "\n".join(f"- {cell(text)}" for text in result.warnings))
    create_markdown_artifact(
        "\n\n".join(parts) + "\n", key="dbt-report", description=results[-1].message if results else ending
    )


def publish_freshness(ending: str, result: Freshness) -> None:
    """Show the age of the sources as the run's artifact `freshness-report`."""
    lines = [
        "| | source | state | age | warns after | fails after | owner |",
        "|---|---|---|---:|---:|---:|---|",
    ]
    for source in sorted(result.sources, key=lambda source: (_ORDER.index(source.state), source.name)):
        message = f"<br>{cell(source.message)}" if source.message else ""
        lines.append(
            f"| {_MARKS[source.state]} | {cell(source.name)} | {source.state.value}{message} "
            f"| {span(source.age)} | {span(source.warn_after)} | {span(source.error_after)} "
            f"| {cell(source.owner or '')} |"
        )
    text = "\n\n".join([f"# {ending}", f"{result.message} ({result.duration:.1f} s)", "\n".join(lines)])
    create_markdown_artifact(text + "\n", key="freshness-report", description=result.message)


def _nodes(nodes: list[DbtNode]) -> str:
    lines = ["| | node | state | rows | seconds | owner |", "|---|---|---|---:|---:|---|"]
    in_order = sorted(nodes, key=lambda node: _ORDER.index(node.state))
    for node in in_order[:_MOST]:
        message = f"<br>{cell(node.message)}" if node.message and node.state is not DbtState.SUCCESS else ""
        compiled = f"<br>`{node.compiled_path}`" if node.compiled_path and node.state in _ORDER[:2] else ""
        rows = f"{node.rows:,}" if node.rows is not None else ""
        state = "done earlier" if node.earlier else node.state.value
        lines.append(
            f"| {_MARKS[node.state]} | {cell(node.label)} | {state}{message}{compiled} | {rows} "
            f"| {node.duration:.1f} | {cell(node.owner or '')} |"
        )
    if len(in_order) > _MOST:
        lines.append(f"\n{len(in_order) - _MOST} more are in the table `dbt-nodes`.")
    return "\n".join(lines)
