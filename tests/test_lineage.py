"""Lineage: who feeds whom, from the connection to the activation."""

from __future__ import annotations

from typing import Any

import pytest

from tasks.dbt.lineage import Lineage


def manifest(**sections: dict[str, Any]) -> dict[str, Any]:
    return {"metadata": {}, "nodes": {}, "sources": {}, "exposures": {}, "groups": {}, **sections}


def source(name: str, schema: str, **more: Any) -> dict[str, Any]:
    return {
        "name": name,
        "resource_type": "source",
        "source_name": schema,
        "schema": schema,
        "identifier": name,
        **more,
    }


def node(name: str, *parents: str, kind: str = "model", **more: Any) -> dict[str, Any]:
    return {"name": name, "resource_type": kind, "depends_on": {"nodes": list(parents)}, **more}


WEATHER, FLIGHTS = "source.x.raw_weather.weather", "source.x.raw_flights.flights"


@pytest.fixture
def lineage() -> Lineage:
    """flights → stg_flights → fct; weather → stg_weather → delays (which reads fct too) → exposures."""
    return Lineage.from_manifest(
        manifest(
            sources={
                WEATHER: source(
                    "weather", "raw_weather", config={"meta": {"airbyte_connection_id": "7F1A-W"}}
                ),
                FLIGHTS: source("flights", "RAW_Flights"),
            },
            nodes={
                "model.x.stg_flights": node("stg_flights", FLIGHTS),
                "model.x.stg_weather": node("stg_weather", WEATHER, config={"group": "met"}),
                "model.x.fct": node("fct", "model.x.stg_flights", meta={"owner": "ops"}),
                "model.x.delays": node("delays", "model.x.fct", "model.x.stg_weather"),
                "test.x.fct_id": node("fct_id", "model.x.fct", kind="test", attached_node="model.x.fct"),
                "test.x.rel": node(
                    "rel", "model.x.fct", "model.x.stg_weather", kind="test", attached_node="model.x.fct"
                ),
                "test.x.both": node("both", "model.x.fct", "model.x.stg_weather", kind="test"),
            },
            unit_tests={"unit_test.x.u": node("u", "model.x.delays", "model.x.fct", kind="unit_test")},
            exposures={
                "exposure.x.scores": node(
                    "scores",
                    "model.x.fct",
                    kind="exposure",
                    type="application",
                    url="https://crm",
                    owner={"name": "ops-crm"},
                    meta={"hightouch_sync_id": 101},
                ),
                "exposure.x.alerts": node(
                    "alerts", "model.x.delays", kind="exposure", config={"meta": {"hightouch_sync_id": "102"}}
                ),
                "exposure.x.raw": node("raw", WEATHER, kind="exposure"),
            },
            groups={"group.x.met": {"name": "met", "owner": {"name": None, "email": "met@example.com"}}},
        )
    )


def test_a_source_names_its_connection_in_its_meta(lineage: Lineage) -> None:
    """`meta` decides, upper or lower case, also where dbt has moved it under `config`."""
    assert lineage.sources_of("7f1a-w") == {WEATHER}
    assert lineage.sources_of("7f1a-w", namespace="raw_flights", streams=["flights"]) == {WEATHER}


def test_a_connection_that_no_source_names_is_matched_by_schema_and_table(lineage: Lineage) -> None:
    """Schema and prefix + stream find the source, unless that source names another connection."""
    assert lineage.sources_of("other", namespace="raw_flights", streams=["Flights"]) == {FLIGHTS}
    assert lineage.sources_of("other", namespace="raw_flights", prefix="fl", streams=["ights"]) == {FLIGHTS}
    assert lineage.sources_of("other", namespace="raw_flights", prefix="x_", streams=["flights"]) == set()
    assert lineage.sources_of("other", namespace="raw_flights") == {FLIGHTS}
    assert lineage.sources_of("other", namespace="raw_weather", streams=["weather"]) == set()
    assert lineage.sources_of("other") == set()


def test_downstream_and_upstream_follow_the_graph_and_leave_out_where_they_start(lineage: Lineage) -> None:
    """Everything built on a node, and everything it is built on, tests and exposures included."""
    below = lineage.downstream([WEATHER])
    assert {"model.x.stg_weather", "model.x.delays", "exposure.x.alerts", "exposure.x.raw"} <= below
    assert not below & {"model.x.fct", "exposure.x.scores", "test.x.fct_id", WEATHER}
    assert lineage.upstream(["exposure.x.scores"]) == {"model.x.fct", "model.x.stg_flights", FLIGHTS}


def test_exposures_are_found_by_the_id_of_what_they_stand_for(lineage: Lineage) -> None:
    """A number and its text are the same id."""
    (by_text,) = lineage.exposures_for(key="hightouch_sync_id", value="101")
    (by_number,) = lineage.exposures_for(key="hightouch_sync_id", value=102)
    assert (by_text.name, by_text.owner, by_text.url) == ("scores", "ops-crm", "https://crm")
    assert by_number.name == "alerts"
    assert lineage.exposures_for(key="hightouch_sync_id", value="10") == []


def test_a_failed_model_taints_itself_and_what_is_below(lineage: Lineage) -> None:
    """What is beside it stays trusted."""
    tainted = lineage.tainted(["model.x.stg_weather"])
    assert {"model.x.stg_weather", "model.x.delays", "exposure.x.alerts"} <= tainted
    assert not tainted & {"model.x.fct", "exposure.x.scores"}


def test_a_failed_test_taints_what_it_tests_but_a_skipped_test_does_not(lineage: Lineage) -> None:
    """A failed test casts doubt on the node it is on, else on all that it reads; skipped says nothing."""
    assert {"model.x.fct", "model.x.delays", "exposure.x.scores"} <= lineage.tainted(["test.x.fct_id"])
    assert "model.x.stg_weather" not in lineage.tainted(["test.x.rel"])
    assert {"model.x.fct", "model.x.stg_weather"} <= lineage.tainted(["test.x.both"])
    assert lineage.tainted([], skipped=["test.x.rel"]) == {"test.x.rel"}
    unit = lineage.tainted(["unit_test.x.u"])
    assert "model.x.delays" in unit
    assert "model.x.fct" not in unit


def test_what_must_wait_is_told_why_in_words(lineage: Lineage) -> None:
    """The reason names what did not land or build, and through what it matters; None when all is well."""
    late = {WEATHER}
    tainted = lineage.tainted(["model.x.stg_flights"])
    assert (
        lineage.why_held("exposure.x.alerts", late, set())
        == "weather did not land, and delays is built on it"
    )
    assert lineage.why_held("exposure.x.raw", late, set()) == "weather did not land"
    assert lineage.why_held("exposure.x.scores", late, set()) is None
    assert lineage.why_held("exposure.x.scores", set(), tainted) == (
        "stg_flights did not build cleanly, and fct is built on it"
    )
    assert lineage.why_held("exposure.x.scores", set(), {"model.x.fct"}) == "fct did not build cleanly"
    both = lineage.why_held("exposure.x.alerts", {WEATHER, FLIGHTS}, set())
    assert both == "flights and weather did not land, and delays is built on them"


def test_owners_come_from_groups_exposures_and_meta(lineage: Lineage) -> None:
    """A node's group owns it, by name or else email; `meta.owner` serves where there is no group."""
    assert lineage.nodes["model.x.stg_weather"].owner == "met@example.com"
    assert lineage.nodes["model.x.fct"].owner == "ops"
    assert lineage.nodes["model.x.delays"].owner is None


def test_exclude_selectors_leave_out_everything_below_a_source(lineage: Lineage) -> None:
    """The words are dbt's own selection syntax, in a stable order."""
    assert lineage.exclude_selectors({WEATHER, FLIGHTS}) == [
        "source:RAW_Flights.flights+",
        "source:raw_weather.weather+",
    ]


class Counted(dict[str, list[str]]):
    """Children, and how often they were asked for."""

    asked = 0

    def get(self, key: str, default: Any = None) -> Any:
        self.asked += 1
        return super().get(key, default)


def test_ten_thousand_nodes_are_walked_once() -> None:
    """A chain and a fan of 10,000 models is walked, however deep, and no model twice."""
    nodes = {"model.x.m0": node("m0")}
    for i in range(1, 10_000):
        nodes[f"model.x.m{i}"] = node(f"m{i}", f"model.x.m{i - 1}", f"model.x.m{i // 2}")
    lineage = Lineage.from_manifest(manifest(nodes=nodes))
    children = Counted(lineage._children)
    object.__setattr__(lineage, "_children", children)  # it is frozen
    assert len(lineage.downstream(["model.x.m0"])) == 9_999
    assert children.asked == 10_000
