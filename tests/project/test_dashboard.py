"""Grafana dashboard and Prometheus alerts: their queries are of the service's metrics, and their readers accept them."""

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
# Values that Grafana puts in place of its variables before it queries Prometheus.
VARIABLES = {"$__rate_interval": "1m", "$job": ".*", "$instance": ".*"}
OF_PROMETHEUS = {"job", "instance"}  # labels that Prometheus adds to each series


def with_values(expression: str) -> str:
    for variable, value in VARIABLES.items():
        expression = expression.replace(variable, value)
    return expression


PANEL_EXPRESSIONS = [with_values(target["expr"]) for panel in PANELS for target in panel.get("targets", ())]
ALERT_EXPRESSIONS = [rule["expr"] for rule in ALERTS]
SELECTORS = re.compile(r"\b((?:latent_encoder|process)_\w+)(?:\{([^}]*)\})?")


def selectors() -> Iterator[tuple[str, list[str]]]:
    """Yield each metric that is queried, with the labels in its selector."""
    for expression in PANEL_EXPRESSIONS + ALERT_EXPRESSIONS:
        for name, matchers in SELECTORS.findall(expression):
            yield name, re.findall(r"(\w+)\s*(?:=~|!=|!~|=)", matchers)


def labels_by_name() -> dict[str, set[str]]:
    """Return the labels of each series that the service can expose, also of series without a sample yet."""
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
    """Each expression is valid PromQL and has a metric of the service."""
    promql_parser.parse(expression)
    assert SELECTORS.search(expression)


def test_metrics_are_the_services() -> None:
    """The service exposes each queried metric, with the labels in its selector."""
    exposed = labels_by_name()
    assert {name for name, _ in selectors()} <= exposed.keys()
    for name, labels in selectors():
        assert set(labels) <= exposed[name] | OF_PROMETHEUS, name


def test_dashboard_shows_every_metric() -> None:
    """Each metric of the service is in a panel."""
    shown = re.sub(r"_(bucket|sum|count)\b", "", " ".join(PANEL_EXPRESSIONS))
    own = {re.sub(r"_(bucket|sum|count)$", "", name) for name in labels_by_name() if name.startswith("latent_encoder_")}
    assert {name for name in own if not re.search(rf"\b{name}\b", shown)} == set()


def test_dashboard_can_be_imported() -> None:
    """The dashboard has the fields that Grafana requires, and takes its data source from a variable that the reader sets."""
    assert re.fullmatch(r"[\w-]{1,40}", DASHBOARD["uid"])
    assert DASHBOARD["title"]
    assert DASHBOARD["schemaVersion"] >= 39  # Grafana 11
    variables = DASHBOARD["templating"]["list"]
    assert [each["name"] for each in variables if each["type"] == "datasource"] == ["DS_PROMETHEUS"]
    sources = [each["datasource"]["uid"] for each in [*PANELS, *variables] if "datasource" in each]
    sources += [target["datasource"]["uid"] for panel in PANELS for target in panel.get("targets", ())]
    assert set(sources) == {"${DS_PROMETHEUS}"}


def test_panels_are_complete() -> None:
    """Each panel has its own id, a title, a description and a unit, and distinct names for its queries."""
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
    """Panels do not overlap and do not exceed the grid."""
    for panel in PANELS:
        assert cells(panel), panel["title"]
        assert all(0 <= column < GRID_WIDTH for column, _ in cells(panel)), panel["title"]
    for one, other in itertools.combinations(PANELS, 2):
        assert not cells(one) & cells(other), (one["title"], other["title"])


def test_alerts_say_what_to_do() -> None:
    """Each alert has its own name, a severity, and a text that uses only labels that its expression keeps."""
    names = [rule["alert"] for rule in ALERTS]
    assert len(set(names)) == len(names)
    for rule in ALERTS:
        assert rule["labels"]["severity"] in ("warning", "critical")
        texts = rule["annotations"]["summary"] + rule["annotations"]["description"]
        kept = re.findall(r"by \(([^)]*)\)", rule["expr"])
        labels = {label for group in kept for label in group.split(", ")} or OF_PROMETHEUS
        assert set(re.findall(r"\$labels\.(\w+)", texts)) <= labels, rule["alert"]
