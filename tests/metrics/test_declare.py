"""What is declared is what exists, in the same words."""

from __future__ import annotations

import inspect
import pkgutil
from importlib import import_module
from pathlib import Path

import foveate.metrics
from foveate.interfaces import Metric
from foveate.metrics.declare import foveate_metrics


def metric_classes() -> set[type[Metric]]:
    found = set()
    for module in pkgutil.iter_modules(foveate.metrics.__path__):
        loaded = import_module(f"foveate.metrics.{module.name}")
        found |= {
            item
            for item in vars(loaded).values()
            if inspect.isclass(item) and issubclass(item, Metric) and "info" in vars(item)
        }
    return found


def test_every_metric_is_declared_once_under_its_own_name_and_summary() -> None:
    specs = foveate_metrics()
    assert len({spec.name for spec in specs}) == len(specs)
    assert {spec.load() for spec in specs} == metric_classes()
    for spec in specs:
        info = spec.load().info
        assert (spec.name, spec.summary) == (info.name, info.summary)


def test_every_metric_says_where_it_comes_from_and_what_it_can_be() -> None:
    for metric in metric_classes():
        info = metric.info
        assert info.citation
        assert info.unit
        assert info.bounds[0] < info.bounds[1]
        assert set(info.consumes) <= {"head", "query", "key"}


def test_every_metric_is_documented() -> None:
    page = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text(encoding="utf-8")
    assert [spec.name for spec in foveate_metrics() if f"`{spec.name}`" not in page] == []
