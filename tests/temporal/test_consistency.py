"""Consistency of maps over frames: oracles, the sink that fools Pearson's r, and maps that follow an object."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import linprog

from foveate.errors import UsageError
from foveate.stats.agreement import JS_DIVERGENCE, SPEARMAN
from foveate.temporal.consistency import compared, consistency, displaced, measures, pearson, transport, warped

RNG = np.random.default_rng(3)


def work(p: np.ndarray, q: np.ndarray, shape: tuple[int, int]) -> float:
    """Least work by the linear programme itself, over the grid's diagonal."""
    cells = [(i + 0.5, j + 0.5) for i in range(shape[0]) for j in range(shape[1])]
    cost = np.array([[np.hypot(a[0] - b[0], a[1] - b[1]) for b in cells] for a in cells])
    n = len(cells)
    leave = np.kron(np.eye(n), np.ones(n))
    arrive = np.kron(np.ones(n), np.eye(n))
    found = linprog(cost.ravel(), A_eq=np.vstack([leave, arrive]), b_eq=np.concatenate([p / p.sum(), q / q.sum()]))
    return float(found.fun / np.hypot(*shape))


def test_transport_against_a_linear_programme() -> None:
    shape = (3, 4)
    measure = transport(shape)
    a, b = RNG.random((5, 12)), RNG.random((5, 12))
    expected = [work(p, q, shape) for p, q in zip(a, b, strict=True)]
    np.testing.assert_allclose(measure.score(a, b), expected, atol=1e-8)
    np.testing.assert_allclose(measure.score(a, a), 0.0, atol=1e-9)


def test_transport_of_one_cell_to_another_is_their_distance() -> None:
    one, other = np.zeros(25), np.zeros(25)
    one[0], other[24] = 2.0, 5.0  # opposite corners of 5 x 5: distance 4 sqrt 2 of a diagonal of 5 sqrt 2
    assert transport((5, 5)).score(one[None], other[None])[0] == pytest.approx(0.8)


def test_transport_of_maps_without_mass_or_with_negative_values_is_unknown() -> None:
    measure = transport((2, 2))
    full, empty, signed = np.ones((1, 4)), np.zeros((1, 4)), np.array([[1.0, -1.0, 1.0, 1.0]])
    assert np.isnan(measure.score(full, empty)[0])
    assert np.isnan(measure.score(full, signed)[0])
    with pytest.raises(UsageError, match="are not 2 x 2"):
        measure.score(np.ones((1, 5)), np.ones((1, 5)))


def test_pearson_against_numpy_and_with_unknown_cells() -> None:
    a, b = RNG.random((4, 30)), RNG.random((4, 30))
    expected = [np.corrcoef(p, q)[0, 1] for p, q in zip(a, b, strict=True)]
    np.testing.assert_allclose(pearson(a, b), expected)
    a[:, 7] = np.nan
    expected = [np.corrcoef(np.delete(p, 7), np.delete(q, 7))[0, 1] for p, q in zip(a, b, strict=True)]
    np.testing.assert_allclose(pearson(a, b), expected)


def test_own_and_null_against_loops() -> None:
    maps = RNG.random((6, 4, 9)) ** 4
    for measure in (JS_DIVERGENCE, SPEARMAN):
        found = consistency(maps, measure)
        own = [[measure.score(maps[v, t][None], maps[v, t + 1][None])[0] for t in range(3)] for v in range(6)]
        np.testing.assert_allclose(found.own, np.mean(own, axis=1))
        np.testing.assert_allclose(found.pairs, own)
        null = np.zeros((6, 3))
        for v in range(6):
            for t in range(3):
                scores = [
                    measure.score(maps[one, t][None], maps[two, t + 1][None])[0]
                    for other in range(6)
                    if other != v
                    for one, two in ((v, other), (other, v))
                ]
                null[v, t] = np.mean(scores)
        np.testing.assert_allclose(found.null, null.mean(1), atol=1e-12)


def test_a_shared_sink_fools_pearson_and_not_the_excess() -> None:
    maps = RNG.random((12, 5, 196))
    maps /= maps.sum(-1, keepdims=True) / 0.7
    maps[..., 3] += 0.3
    said = {m.name: consistency(maps, m) for m in measures((14, 14)) if m.name != "emd"}
    assert said["pearson"].own.mean() > 0.95
    assert abs(said["spearman"].own.mean()) < 0.05
    for found in said.values():
        assert abs(found.excess.mean()) < 0.02  # maps of different videos are as alike


def test_maps_that_stay_are_closer_than_across_videos() -> None:
    still = np.repeat(RNG.random((8, 1, 16)) ** 3, 4, axis=1) + 0.01 * RNG.random((8, 4, 16))
    for measure in measures((4, 4)):
        assert (consistency(still, measure).excess > 0).all(), measure.name


def test_a_frame_where_the_track_is_not_there_leaves_its_pairs_out() -> None:
    maps = RNG.random((3, 4, 9))
    maps[1, 2] = np.nan
    found = consistency(maps, SPEARMAN)
    assert np.isnan(found.pairs[1]).tolist() == [False, True, True]
    assert found.own[1] == pytest.approx(found.pairs[1, 0])
    assert np.isnan(consistency(np.full((1, 3, 9), np.nan), SPEARMAN).own[0])


def test_one_frame_and_one_video() -> None:
    with pytest.raises(UsageError, match="at least two frames"):
        consistency(RNG.random((3, 1, 9)), SPEARMAN)
    alone = consistency(RNG.random((1, 3, 9)), SPEARMAN)
    assert np.isfinite(alone.own).all()
    assert np.isnan(alone.null).all()


def blob(y: float, x: float, width: float = 1.5) -> np.ndarray:
    rows, columns = np.mgrid[0:20, 0:24]
    made = np.exp(-((rows - y) ** 2 + (columns - x) ** 2) / (2 * width**2))
    return np.asarray(made / made.sum())


def test_a_map_that_follows_an_object_is_consistent_once_moved_back() -> None:
    centre = np.array([[6.0, 6.0], [8.0, 9.0], [10.0, 12.0], [12.0, 15.0]])
    maps = np.stack([blob(y, x) for y, x in centre])
    moved = displaced(maps, centre)
    np.testing.assert_array_equal(moved[0], maps[0])
    flat = moved.reshape(1, 4, -1)
    fixed = consistency(maps.reshape(1, 4, -1), JS_DIVERGENCE).own[0]
    assert fixed > 0.4
    assert consistency(flat, JS_DIVERGENCE).own[0] < 1e-3
    np.testing.assert_allclose(np.nansum(moved, axis=(1, 2)), 1.0)


def test_a_growing_object_is_brought_back_to_its_size() -> None:
    centre = np.full((2, 2), 10.0)
    maps = np.stack([blob(10, 10, 1.5), blob(10, 10, 3.0)])
    moved = displaced(maps, centre, np.array([1.0, 2.0]))
    np.testing.assert_allclose(moved[1][6:15, 6:15], maps[0][6:15, 6:15], atol=2e-3)


def test_whole_cells_are_moved_exactly_and_nothing_is_invented() -> None:
    values = RNG.random((2, 5, 6))
    moved = displaced(values, np.array([[0.0, 0.0], [2.0, 1.0]]))
    scale = values[1].sum() / values[1][2:, 1:].sum()
    np.testing.assert_allclose(moved[1][:3, :5], values[1][2:, 1:] * scale)
    assert np.isnan(moved[1][3:]).all()
    assert np.isnan(moved[1][:, 5]).all()


def test_an_absent_object_and_wrong_shapes() -> None:
    values = RNG.random((2, 5, 6))
    moved = displaced(values, np.array([[np.nan, np.nan], [2.0, 1.0]]))
    assert np.isnan(moved[0]).all()
    np.testing.assert_allclose(moved[1], values[1])
    with pytest.raises(UsageError, match="need centres"):
        displaced(values, np.zeros((3, 2)))


def test_warped_brings_a_later_map_back() -> None:
    """A map that moved by (1, -2) cells, and the flow that says so, give the map again where it is known."""
    now = RNG.random((3, 8, 9))
    later = np.roll(now, (1, -2), axis=(1, 2))
    flow = np.broadcast_to(np.array([1.0, -2.0])[None, :, None, None], (3, 2, 8, 9))
    back = warped(later, flow)
    inside = np.isfinite(back)
    assert inside[:, :-1, 2:].all()
    assert not inside[:, -1].any()
    ratio = back[inside].reshape(3, -1) / now[inside].reshape(3, -1)
    np.testing.assert_allclose(ratio, np.broadcast_to(ratio[:, :1], ratio.shape))
    np.testing.assert_allclose(np.nansum(back, axis=(1, 2)), later.sum((1, 2)))
    np.testing.assert_allclose(warped(now, np.zeros((3, 2, 8, 9))), now)
    with pytest.raises(UsageError, match="do not fit"):
        warped(now, flow[:2])


def test_windows_of_one_video_are_no_null() -> None:
    maps = RNG.random((4, 3, 10))
    found = consistency(maps, JS_DIVERGENCE, videos=["a", "a", "b", "b"])
    crossed = [
        np.mean(
            [
                (JS_DIVERGENCE.score(maps[i, t], maps[j, t + 1]) + JS_DIVERGENCE.score(maps[j, t], maps[i, t + 1]))
                / 2
                for t in range(2)
                for j in ((2, 3) if i < 2 else (0, 1))
            ]
        )
        for i in range(4)
    ]
    np.testing.assert_allclose(found.null, crossed)
    again = compared(maps[:, :-1], maps[:, 1:], JS_DIVERGENCE, videos=["a", "a", "b", "b"])
    np.testing.assert_allclose(again.pairs, found.pairs)
    with pytest.raises(UsageError, match="two arrays"):
        compared(maps[:, :-1], maps, JS_DIVERGENCE)
