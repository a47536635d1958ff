"""Grafana dashboard and Prometheus alerts: that they ask for metrics that the service has, and are what their readers take."""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import prometheus_client
import promql_parser
import pytest
import yaml

from latent_encoder.telemetry import metrics

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
DASHBOARD = json.loads((DEPLOY / "grafana-dashboard.json").read_text(encoding="utf-8"))
PANELS = DASHBOARD["panels"]
ALERTS = [
    rule
    for group in yaml.safe_load((DEPLOY / "prometheus-alerts.yaml").read_text(encoding="utf-8"))["groups"]
    for rule in group["rules"]
]
GRID_WIDTH = 24  # columns
# What Grafana puts in place of its variables before it asks Prometheus.
VARIABLES = {"$__rate_interval": "1m", "$job": ".*", "$instance": ".*"}
OF_PROMETHEUS = {"job", "instance"}  # labels that it adds to each series


def with_values(expression: str) -> str:
    for variable, value in VARIABLES.items():
        expression = expression.replace(variable, value)
    return expression


PANEL_EXPRESSIONS = [with_values(target["expr"]) for panel in PANELS for target in panel.get("targets", ())]
ALERT_EXPRESSIONS = [rule["expr"] for rule in ALERTS]
SELECTORS = re.compile(r"\b((?:latent_encoder|process)_\w+)(?:\{([^}]*)\})?")


def selectors() -> Iterator[tuple[str, list[str]]]:
    """Each metric that is asked for, with the labels that it is asked to have."""
    for expression in PANEL_EXPRESSIONS + ALERT_EXPRESSIONS:
        for name, matchers in SELECTORS.findall(expression):
            yield name, re.findall(r"(\w+)\s*(?:=~|!=|!~|=)", matchers)


def labels_by_name() -> dict[str, set[str]]:
    """The series that the service can expose, with their labels; those without a sample yet too."""
    collectors = [getattr(metrics, name) for name in dir(metrics)]
    own = {each._name: each for each in collectors if isinstance(each, prometheus_client.metrics.MetricWrapperBase)}
    labels: dict[str, set[str]] = {}
    for family in prometheus_client.REGISTRY.collect():
        has = set(own[family.name]._labelnames) if family.name in own else set()
        suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count"), "info": ("_info",)}
        for suffix in suffixes.get(family.type, ("",)):
            labels[family.name + suffix] = has | ({"le"} if suffix == "_bucket" else set())
    return labels


@pytest.mark.parametrize("expression", PANEL_EXPRESSIONS + ALERT_EXPRESSIONS)
def test_expressions_are_promql(expression: str) -> None:
    """The parser finds nothing to say, and each has a metric of ours."""
    promql_parser.parse(expression)
    assert SELECTORS.search(expression)


def test_metrics_are_the_services() -> None:
    """Each metric is one that the service exposes, with the labels that are asked for."""
    exposed = labels_by_name()
    assert {name for name, _ in selectors()} <= exposed.keys()
    for name, labels in selectors():
        assert set(labels) <= exposed[name] | OF_PROMETHEUS, name


def test_dashboard_shows_every_metric() -> None:
    """None of the service's metrics is left out."""
    shown = re.sub(r"_(bucket|sum|count)\b", "", " ".join(PANEL_EXPRESSIONS))
    own = {re.sub(r"_(bucket|sum|count)$", "", name) for name in labels_by_name() if name.startswith("latent_encoder_")}
    assert {name for name in own if not re.search(rf"\b{name}\b", shown)} == set()


def test_dashboard_can_be_imported() -> None:
    """It has what Grafana wants, and asks for its data source by the variable that the reader chooses."""
    assert re.fullmatch(r"[\w-]{1,40}", DASHBOARD["uid"])
    assert DASHBOARD["title"]
    assert DASHBOARD["schemaVersion"] >= 39  # Grafana 11
    variables = DASHBOARD["templating"]["list"]
    assert [each["name"] for each in variables if each["type"] == "datasource"] == ["DS_PROMETHEUS"]
    sources = [each["datasource"]["uid"] for each in [*PANELS, *variables] if "datasource" in each]
    sources += [target["datasource"]["uid"] for panel in PANELS for target in panel.get("targets", ())]
    assert set(sources) == {"${DS_PROMETHEUS}"}


def test_panels_are_complete() -> None:
    """Each has an id of its own, says what it shows and in which unit, and names its queries differently."""
    assert [number for number, count in Counter(panel["id"] for panel in PANELS).items() if count > 1] == []
    for panel in PANELS:
        if panel["type"] != "row":
            assert panel["title"], panel
            assert panel["description"], panel["title"]
            assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
            references = [target["refId"] for target in panel["targets"]]
            assert len(set(references)) == len(references) > 0, panel["title"]


def cells(panel: dict[str, Any]) -> set[tuple[int, int]]:
    place = panel["gridPos"]
    columns, rows = (range(place[start], place[start] + place[size]) for start, size in (("x", "w"), ("y", "h")))
    return set(itertools.product(columns, rows))


def test_panels_do_not_overlap() -> None:
    """Nor do they stand out of the grid."""
    for panel in PANELS:
        assert cells(panel), panel["title"]
        assert all(0 <= column < GRID_WIDTH for column, _ in cells(panel)), panel["title"]
    for one, other in itertools.combinations(PANELS, 2):
        assert not cells(one) & cells(other), (one["title"], other["title"])


def test_alerts_say_what_to_do() -> None:
    """Each has a name of its own, a severity, and a text that uses only labels that its expression keeps."""
    names = [rule["alert"] for rule in ALERTS]
    assert len(set(names)) == len(names)
    for rule in ALERTS:
        assert rule["labels"]["severity"] in ("warning", "critical")
        texts = rule["annotations"]["summary"] + rule["annotations"]["description"]
        kept = re.findall(r"by \(([^)]*)\)", rule["expr"])
        labels = {label for group in kept for label in group.split(", ")} or OF_PROMETHEUS
        assert set(re.findall(r"\$labels\.(\w+)", texts)) <= labels, rule["alert"]
