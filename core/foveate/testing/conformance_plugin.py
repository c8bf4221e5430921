"""Checks of a package: it registers, costs nothing to list, and everything it declares is there."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from typing import Any, ClassVar

import numpy as np

from foveate.interfaces import Metric, MetricInfo, Renderer, TokenAxis
from foveate.plugins.discovery import REGISTRIES, Installed, installed
from foveate.plugins.manager import HEAVY, Record, plugin_manager
from foveate.plugins.registry import registry
from foveate.plugins.specs import Spec
from foveate.testing.kit import Kit

_LIGHT = (
    "import sys; before = set(sys.modules); import {module}; print([n for n in {heavy!r} if n in sys.modules])"
)


class PluginConformance(Kit):
    """Subclass and set ``entry_point`` (and ``distribution`` where two packages use the same name)."""

    entry_point: ClassVar[str]
    distribution: ClassVar[str] = ""

    @property
    def record(self) -> Record:
        """What the manager says of this plugin."""
        found = [record for record in plugin_manager().records if self._is_mine(record.plugin)]
        assert found, f"no entry point {self.entry_point!r} in group 'foveate' is installed: pip install -e ."
        assert len(found) == 1, f"{[r.plugin.title for r in found]} share a name: set `distribution` in the test"
        return found[0]

    def offers(self, kind: str) -> list[Spec]:
        """What it declares of one kind; skips the check where there is nothing, or where a package is absent."""
        specs = self.record.offers.get(kind, ())
        usable = [spec for spec in specs if not spec.missing()]
        if specs and not usable:
            self.skip(f"{kind}: needs {', '.join(specs[0].missing())}")
        if not specs:
            self.skip(f"offers no {kind}")
        return usable

    def test_registers(self) -> None:
        """It loads, and none of its names was taken."""
        record = self.record
        assert record.state == "loaded", f"{record.error}; {record.remedy}"
        assert any(record.offers.values()), "it loads but offers nothing: does it implement a hook?"

    def test_is_light_to_list(self) -> None:
        """Importing the declarations imports no torch, numpy or other heavy package."""
        command = _LIGHT.format(module=self.record.plugin.module, heavy=HEAVY)
        done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == "[]", f"{self.record.plugin.module} imports {done.stdout.strip()}"

    def test_states_its_api(self) -> None:
        """``FOVEATE_API = (major, minor)`` lets a later foveate refuse it with a clear message."""
        module = import_module(self.record.plugin.module)
        assert hasattr(module, "FOVEATE_API"), f"{module.__name__} lacks FOVEATE_API = (1, 0)"

    def test_every_target_loads(self) -> None:
        """Each declared class imports and keeps its contract."""
        specs = [spec for offered in self.record.offers.values() for spec in offered if not spec.missing()]
        if not specs:
            self.skip("every offer needs a package that is absent")
        for spec in specs:
            spec.load()

    def test_metrics_keep_their_word(self) -> None:
        """Shapes, bounds, and equal numbers from numpy and torch."""
        for spec in self.offers("metric"):
            check_metric(spec.create())

    def test_renderers_say_what_they_draw(self) -> None:
        """``name`` and ``draws`` are what ``foveate plot --list`` shows."""
        for spec in self.offers("renderer"):
            drawn: type[Renderer] = spec.load()
            assert drawn.name == spec.name, f"declared as {spec.name!r}, but the class is named {drawn.name!r}"
            assert drawn.draws, f"{spec.name}: `draws` is empty"

    def test_registry_rows_are_sound(self) -> None:
        """The package's registry fragment, where it has one, has no problem."""
        if not any(plugin.distribution == self.record.plugin.distribution for plugin in installed(REGISTRIES)):
            self.skip("no registry fragment")
        problems = [p.message for p in registry().problems if p.owner == self.record.plugin.distribution]
        assert problems == []

    def _is_mine(self, plugin: Installed) -> bool:
        return plugin.name == self.entry_point and self.distribution in ("", plugin.distribution)


def check_metric(metric: Metric) -> None:
    """Hold one metric against its own :class:`~foveate.interfaces.MetricInfo` on random rows.

    Raises AssertionError where shape, bounds, the agreement of numpy and torch fail, or where keys that do not
    count (NaN) are counted.
    """
    import torch

    info = metric.info
    axis = TokenAxis.concat(TokenAxis.of_kind("cls", 1), TokenAxis.patches(4, 5, height=32, width=40))
    rows = _rows(2, 3, len(axis), len(axis))
    found = np.asarray(metric.kernel(rows, query=axis, key=axis))
    dims = 4 - len(info.consumes) + len(info.produces)
    assert found.ndim == dims, (
        f"{info.name}: expected {dims} dims after consuming {info.consumes}, got {found.shape}"
    )
    finite = found[np.isfinite(found)]
    assert finite.size, f"{info.name}: no finite value on ordinary rows"
    _check_bounds(info, finite)
    twin = np.asarray(metric.kernel(torch.from_numpy(rows), query=axis, key=axis))
    np.testing.assert_allclose(twin, found, rtol=1e-5, atol=1e-7, err_msg=f"{info.name}: torch and numpy differ")
    if "key" in info.consumes and "all_keys" not in info.needs:
        _check_left_out_keys(metric, rows, axis)


def _check_left_out_keys(metric: Metric, rows: np.ndarray[Any, Any], axis: TokenAxis) -> None:
    """With ``keys="patch"``, the default, CLS and registers reach the kernel as NaN: as if they were not there."""
    import torch

    patches = axis.where("patch")
    masked = rows.copy()
    masked[..., axis.where("cls")] = np.nan
    wanted = metric.kernel(rows[..., patches], query=axis, key=axis.take(patches.tolist()))
    for given in (masked, torch.from_numpy(masked)):
        np.testing.assert_allclose(
            np.asarray(metric.kernel(given, query=axis, key=axis)),
            np.asarray(wanted),
            rtol=1e-5,
            atol=1e-7,
            err_msg=f"{metric.info.name}: a key that is NaN does not count; see foveate.metrics.rows",
        )


def _check_bounds(info: MetricInfo, values: np.ndarray[Any, Any]) -> None:
    low, high = info.bounds
    slack = 1e-6 * max(1.0, *(abs(bound) for bound in info.bounds if np.isfinite(bound)), 1.0)
    assert values.min() >= low - slack, f"{info.name}: {values.min()} is below its bound {low}"
    assert values.max() <= high + slack, f"{info.name}: {values.max()} is above its bound {high}"


def _rows(*shape: int) -> np.ndarray[Any, Any]:
    """Peaked rows that sum to 1, float64 ``(sample, head, query, key)``."""
    drawn = np.random.default_rng(0).gamma(0.3, size=shape) + 1e-9
    rows: np.ndarray[Any, Any] = drawn / drawn.sum(-1, keepdims=True)
    return rows
