"""Analyses over time of maps: consistency and what moves, against slow numbers from the run and the masks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy.spatial.distance import jensenshannon
from scipy.stats import rankdata

from foveate.data.run import Run
from foveate.errors import UsageError
from foveate.geometry import CellGrid
from foveate.study import temporal_maps
from foveate.study.detection import Report
from foveate.study.temporal import analyse_clips
from foveate.study.temporal_consistency import _flow
from foveate.study.temporal_maps import clip_maps
from foveate.study.temporal_subject import ClipSubject
from foveate.study.temporal_tracks import displaced_frames, moving_cells, path_of
from temporal_runs import CLIPS, capture

LAST = 2  # layer of the decoder


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return capture(tmp_path_factory.mktemp("swim"))


@pytest.fixture(scope="module")
def subject(path: Path) -> ClipSubject:
    return ClipSubject(Run.open(path))


@pytest.fixture(scope="module")
def report(subject: ClipSubject) -> Report:
    return analyse_clips(subject, ["consistency", "moving"])


def slow_maps(run: Run) -> np.ndarray:
    """The best track's row, mean over heads, cell by cell: (clip, frame, y, x)."""
    rows, columns = run.grid.shape
    maps = np.zeros((CLIPS, 6, rows, columns))
    site = run.site("decoder.cross")
    for i in range(CLIPS):
        best = str(run.predictions["track"].values[i, 0])
        row = [str(name) for name in site["query_label"].values].index(best)
        weights = site["attention"].values[i, LAST, :, row].astype(np.float64).mean(0)
        key = run.tokens("decoder.cross", "key", i)
        for k, weight in enumerate(weights):
            y = int((key.y[k] - run.grid.y[0]) // np.diff(run.grid.y)[0])
            x = int((key.x[k] - run.grid.x[0]) // np.diff(run.grid.x)[0])
            maps[i, key.frame[k], y, x] += weight
    return maps


def test_the_map_is_the_row_of_the_surest_track(subject: ClipSubject) -> None:
    maps = clip_maps(subject, sinks=True)
    np.testing.assert_allclose(maps.values, slow_maps(subject.run), rtol=1e-6)
    assert (maps.site, maps.layer, maps.row) == ("decoder.cross", LAST, "row of the surest track")


def test_sinks_are_taken_out_and_told(subject: ClipSubject, monkeypatch: pytest.MonkeyPatch) -> None:
    """Key 5 of every clip is called a sink."""

    def found(received: np.ndarray, **_: object) -> object:
        return type("Found", (), {"flagged": np.arange(received.size) == 5})

    monkeypatch.setattr(temporal_maps, "find_artefacts", found)
    maps, slow = clip_maps(subject), slow_maps(subject.run)
    flat = slow.reshape(CLIPS, -1)
    np.testing.assert_allclose(maps.removed, flat[:, 5] / flat.sum(1), rtol=1e-6)
    expected = flat * (flat.sum(1) / (flat.sum(1) - flat[:, 5]))[:, None]
    expected[:, 5] = np.nan
    np.testing.assert_allclose(maps.values.reshape(CLIPS, -1), expected, rtol=1e-6)


def slow_js(a: np.ndarray, b: np.ndarray) -> float:
    known = np.isfinite(a) & np.isfinite(b)
    return float(jensenshannon(a[known], b[known], base=2) ** 2)


def slow_spearman(a: np.ndarray, b: np.ndarray) -> float:
    known = np.isfinite(a) & np.isfinite(b)
    one, two = rankdata(a[known]), rankdata(b[known])  # ties at their expected ranks: Kendall's rho_a
    m = one.size
    return float(1.0 - 6.0 * (((one - two) ** 2).sum() + ties(one) + ties(two)) / (m * (m**2 - 1)))


def ties(ranks: np.ndarray) -> float:
    """What the sum of squared ranks lost to ties."""
    return float((np.arange(1, ranks.size + 1) ** 2).sum() - (ranks**2).sum())


def slow_pearson(a: np.ndarray, b: np.ndarray) -> float:
    known = np.isfinite(a) & np.isfinite(b)
    return float(np.corrcoef(a[known], b[known])[0, 1])


def test_sinks_are_looked_for_among_the_cells_themselves(subject: ClipSubject) -> None:
    run = subject.run
    received = run.site("encoder.self")["received"].values[:, -1].astype(np.float64).mean(1)
    middle = np.median(received, axis=1, keepdims=True)
    spread = 1.4826 * np.median(np.abs(received - middle), axis=1, keepdims=True)
    sinks = ((received - middle) / spread > 3.5) & (received > 5 * received.mean(1, keepdims=True))
    missing = np.isnan(clip_maps(subject).values).reshape(CLIPS, -1)
    np.testing.assert_array_equal(missing, sinks)


def test_consistency_beside_other_videos(report: Report, subject: ClipSubject) -> None:
    stored = subject.run.product("temporal/consistency")
    flat = clip_maps(subject).values.reshape(CLIPS, 6, -1)
    assert (clip_maps(subject).removed > 0).any()  # of this model, some cells are sinks
    slow = {"js_divergence": slow_js, "spearman": slow_spearman, "pearson": slow_pearson}
    names = [str(name) for name in stored["measure"].values]
    assert set(names) == {"emd", *slow, "js_divergence_moved", "spearman_moved"}
    for name, measure in slow.items():
        at = names.index(name)
        own = [[measure(flat[i, t], flat[i, t + 1]) for t in range(5)] for i in range(CLIPS)]
        np.testing.assert_allclose(stored["pairs"].values[:, at], own, rtol=1e-4, atol=1e-6)
        null = [
            np.mean(
                [
                    (measure(flat[i, t], flat[j, t + 1]) + measure(flat[j, t], flat[i, t + 1])) / 2
                    for t in range(5)
                    for j in range(CLIPS)
                    if j != i
                ]
            )
            for i in range(CLIPS)
        ]
        np.testing.assert_allclose(stored["null"].values[:, at], null, rtol=1e-4, atol=1e-6)
        sign = -1 if name == "js_divergence" else 1
        np.testing.assert_allclose(
            stored["excess"].values[:, at], sign * (np.mean(own, 1) - null), rtol=1e-3, atol=1e-6
        )
    assert any("along the track" in one for one in report.values["quantity"])


def test_one_video_has_nothing_to_be_compared_with(path: Path) -> None:
    with pytest.raises(UsageError, match="one video has no other"):
        analyse_clips(ClipSubject(Run.open(path), at_most=1), ["consistency"])


def test_the_path_of_a_track_is_the_centroid_of_its_mask(subject: ClipSubject) -> None:
    run = subject.run
    for place in range(CLIPS):
        found = path_of(subject, place, run.grid)
        mask = run.tracks["mask"].values[place, 0].astype(np.float64)  # the canvas has a cell a pixel
        side = np.diff(run.grid.y)[0]
        for t in range(6):
            y, x = np.nonzero(mask[t])
            if not y.size:
                assert np.isnan(found.centre[t]).all()
                continue
            centre = np.average(y + 0.5, weights=mask[t][y, x]), np.average(x + 0.5, weights=mask[t][y, x])
            np.testing.assert_allclose(found.centre[t], np.array(centre) / side - 0.5, rtol=1e-5)
            assert found.size[t] == pytest.approx(np.sqrt(mask[t].sum()), rel=1e-5)


def test_flow_is_measured_in_cells(subject: ClipSubject, monkeypatch: pytest.MonkeyPatch) -> None:
    """A texture that goes three pixels to the right each frame."""
    pytest.importorskip("skimage")
    from dataclasses import replace

    from scipy.ndimage import gaussian_filter

    wide = gaussian_filter(np.random.default_rng(0).random((48, 96)), 2.0)
    wide = ((wide - wide.min()) / np.ptp(wide) * 255).astype(np.uint8)
    pixels = np.stack([np.repeat(wide[:, 40 - 3 * t : 88 - 3 * t, None], 3, 2) for t in range(6)])
    sample = replace(subject.sample(0), pixels=pixels)
    monkeypatch.setattr(ClipSubject, "sample", lambda self, place: sample)
    moved = _flow(subject, 0, subject.run.grid)
    assert moved.shape == (5, 2, *subject.run.grid.shape)
    inner = moved[:, :, 2:-2, 2:-2]
    assert np.median(inner[:, 1]) == pytest.approx(3 / np.diff(subject.run.grid.x)[0], rel=0.1)
    assert abs(np.median(inner[:, 0])) < 0.03


@pytest.mark.parametrize(
    ("places", "moves"),
    [
        ([0, 0, 0], [False, False, False]),
        ([0, 2, 2], [True, True, False]),
        ([0, None, 2], [False, False, False]),  # it dies, and is born again elsewhere
        ([0, 1, None, 4, 5], [True, True, False, False, True]),
        ([3], [False]),
    ],
)
def test_when_a_mask_is_displaced(places: list[int | None], moves: list[bool]) -> None:
    masks = np.zeros((len(places), 4, 8))
    for t, place in enumerate(places):
        if place is not None:
            masks[t, 1:3, place : place + 2] = 1.0
    assert displaced_frames(masks).tolist() == moves
    masks[np.zeros_like(masks, bool)] = np.nan
    assert displaced_frames(np.where(masks > 0, masks, np.nan)).tolist() == moves


def test_what_moves_covers_half_a_cell_or_is_the_most_covered(subject: ClipSubject) -> None:
    mask, grid = subject.sample(1).mask, subject.run.grid
    assert mask is not None
    found = moving_cells(subject, 1, grid, "true masks")
    for t in range(6):
        share = np.array(
            [
                [
                    mask[
                        t, round(grid.y[r]) : round(grid.y[r + 1]), round(grid.x[c]) : round(grid.x[c + 1])
                    ].mean()
                    for c in range(grid.shape[1])
                ]
                for r in range(grid.shape[0])
            ]
        )
        expected = share >= 0.5 if (share >= 0.5).any() else (share == share.max()) & (share > 0)
        np.testing.assert_array_equal(found[t], expected)


def test_maps_on_what_moves_pair_by_pair(report: Report, subject: ClipSubject) -> None:
    stored, maps = subject.run.product("temporal/moving"), slow_maps(subject.run)
    for i in range(CLIPS):
        regions = moving_cells(subject, i, subject.run.grid, "true masks")
        for t in (0, 3):
            inside, outside = maps[i, t][regions[t]], maps[i, t][~regions[t]]
            wins = np.mean([(a > b) + 0.5 * (a == b) for a in inside for b in outside])
            assert float(stored["auc"].values[i, t]) == pytest.approx(wins, rel=1e-5)
            lift = inside.mean() / maps[i, t].mean()
            assert float(stored["lift"].values[i, t]) == pytest.approx(lift, rel=1e-5)
    line = report.values.query("quantity == 'AUC on what moves (true masks)'")
    np.testing.assert_allclose(line["value"].tolist()[:CLIPS], stored["auc"].values.mean(1), rtol=1e-5)
    assert stored.attrs["moves"] == "true masks"


def test_a_map_of_what_moves_beats_shifts_and_the_centre(
    subject: ClipSubject, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataclasses import replace

    from foveate.study import temporal_moving

    whole = clip_maps(subject, sinks=True)
    values = np.stack([moving_cells(subject, i, whole.grid, "true masks") for i in range(CLIPS)]) + 0.01
    monkeypatch.setattr(
        temporal_moving, "clip_maps", lambda *_, **__: replace(whole, values=values.astype(np.float64))
    )
    findings = temporal_moving.on_what_moves(subject).findings
    auc = [one for one in findings if one.quantity.startswith("AUC")]
    assert all(np.allclose(one.values, 1.0) for one in auc)
    assert all((np.asarray(one.baseline) < 0.99).all() for one in auc)


def test_tracks_and_flow_stand_in_for_masks(subject: ClipSubject) -> None:
    grid = CellGrid.regular(8, 8, height=48, width=48)
    tracks = moving_cells(subject, 0, grid, "tracks")
    flow = moving_cells(subject, 0, grid, "optical flow")
    assert tracks.shape == flow.shape == (6, 8, 8)
    assert flow.any()
