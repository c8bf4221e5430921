"""How maps change over the frames of clips, against slow numbers from pictures, masks and rows."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import entropy

from foveate.data.run import Run
from foveate.geometry import CellGrid
from foveate.study import temporal_evolution
from foveate.study.temporal_evolution import ENTROPY, ON_TRACK, evolution, spread
from foveate.study.temporal_maps import ClipMaps, clip_maps
from foveate.study.temporal_subject import ClipSubject, Outcome
from temporal_runs import CLIPS, capture


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> ClipSubject:
    return ClipSubject(Run.open(capture(tmp_path_factory.mktemp("swim"))))


@pytest.fixture(scope="module")
def outcome(subject: ClipSubject) -> Outcome:
    return evolution(subject)


def means(mask: np.ndarray, grid: CellGrid) -> np.ndarray:
    """Mean of (y, x) pixels in every cell, pixel borders being cell borders."""
    y, x = (np.round(edges).astype(int) for edges in (grid.y, grid.x))
    np.testing.assert_allclose(grid.y, y)
    rows = range(grid.shape[0])
    return np.array([[mask[y[r] : y[r + 1], x[c] : x[c + 1]].mean() for c in range(grid.shape[1])] for r in rows])


def test_spread_is_the_entropy_over_its_largest_value() -> None:
    rng = np.random.default_rng(0)
    values = rng.random((2, 3, 4, 5))
    values[0, 1, 2, 3] = np.nan
    values[1, 2] = np.nan
    found = spread(ClipMaps(values, CellGrid.regular(4, 5, height=4, width=5), "s", 0, "r", np.zeros(2)))
    for place in np.ndindex(2, 3):
        known = values[place][np.isfinite(values[place])]
        expected = entropy(known) / np.log(known.size) if known.size else np.nan
        np.testing.assert_allclose(found[place], expected)


def test_mass_on_the_track_and_its_area(outcome: Outcome, subject: ClipSubject) -> None:
    product, maps = outcome.products["temporal/evolution"], clip_maps(subject, sinks=True)
    at = list(product["metric"].values).index(ON_TRACK)
    area = next(one for one in outcome.findings if one.quantity == ON_TRACK).baseline
    for i in range(CLIPS):
        masks = subject.run.tracks["mask"].values[i, 0].astype(np.float64)
        shares, covered = np.full(6, np.nan), np.full(6, np.nan)
        for t in range(6):
            inside = means(masks[t], maps.grid)
            if inside.any():
                shares[t] = (maps.values[i, t] * inside).sum() / maps.values[i, t].sum()
                covered[t] = inside.mean()
        np.testing.assert_allclose(product["value"].values[i, at], shares, rtol=1e-5)
        np.testing.assert_allclose(np.asarray(area)[i], np.nanmean(covered), rtol=1e-6)
        born = int(np.flatnonzero(np.isfinite(shares))[0])
        np.testing.assert_allclose(product["by_age"].values[i, at, : 6 - born], shares[born:], rtol=1e-5)
        assert np.isnan(product["by_age"].values[i, at, 6 - born :]).all()


def test_flicker_over_what_changed(outcome: Outcome, subject: ClipSubject) -> None:
    product, maps = outcome.products["temporal/evolution"], clip_maps(subject, sinks=True)
    finding = next(one for one in outcome.findings if one.quantity.startswith("flicker"))
    share = maps.flat / maps.flat.sum(-1, keepdims=True)
    for i in range(CLIPS):
        pixels = subject.sample(i).pixels.astype(np.float64).mean(-1)
        for t in range(5):
            own = np.abs(share[i, t + 1] - share[i, t]).sum() / 2
            seen = np.abs(means(pixels[t + 1], maps.grid) - means(pixels[t], maps.grid)).mean() / 255
            assert float(product["flicker"].values[i, t]) == pytest.approx(own, rel=1e-4)
            assert float(product["flicker_relative"].values[i, t]) == pytest.approx(own / seen, rel=1e-4)
        others = [
            np.abs(share[j, t + 1] - share[i, t]).sum() / 2 for j in range(CLIPS) if j != i for t in range(5)
        ]
        assert np.asarray(finding.baseline)[i] == pytest.approx(np.mean(others), rel=1e-6)


def test_jumps_are_found_where_the_map_narrows(subject: ClipSubject, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twelve frames: even maps, then a single cell; and maps that stay as they are."""
    rng = np.random.default_rng(0)
    grid = CellGrid.regular(8, 8, height=48, width=48)
    values = 1.0 + 0.1 * rng.random((CLIPS, 12, 8, 8))
    values[0, 6:, 3, 3] += 500.0
    made = ClipMaps(values, grid, "s", 0, "r", np.zeros(CLIPS))
    monkeypatch.setattr(temporal_evolution, "clip_maps", lambda *_, **__: made)
    monkeypatch.setattr(temporal_evolution, "has_tracks", lambda _: False)
    monkeypatch.setattr(temporal_evolution, "_flicker", lambda *_: (np.zeros((CLIPS, 5)), np.zeros((CLIPS, 5))))
    monkeypatch.setattr(ClipSubject, "frames", 12)
    found = evolution(subject)
    jump = next(one for one in found.findings if one.quantity.startswith("clips with a jump"))
    assert jump.values[0] == 1.0
    assert found.products["temporal/evolution"]["jumps"].values[0, 0] >= 1
    assert ENTROPY in jump.quantity
    short = replace(made, values=values[:, :6])
    monkeypatch.setattr(temporal_evolution, "clip_maps", lambda *_, **__: short)
    monkeypatch.setattr(ClipSubject, "frames", 6)
    few = next(one for one in evolution(subject).findings if one.quantity.startswith("clips with a jump"))
    assert np.isnan(few.values).all()  # six frames can show no jump
