"""Maps on moving regions: loops, closed cases, and optical flow of a square that is known to move."""

from __future__ import annotations

import numpy as np
import pytest

from foveate.errors import UsageError
from foveate.temporal.enrichment import enrichment, flow, flow_speed, moving_region

RNG = np.random.default_rng(2)


def slow(values: np.ndarray, region: np.ndarray) -> tuple[float, float, float]:
    inside, outside = values[region], values[~region]
    wins = sum(float(a > b) + 0.5 * float(a == b) for a in inside for b in outside)
    lift = inside.sum() / values.sum() / region.mean()
    return lift, wins / inside.size / outside.size, (inside.mean() - values.mean()) / values.std()


def test_against_loops() -> None:
    values, region = RNG.integers(0, 6, (6, 7)).astype(float), RNG.random((6, 7)) < 0.3
    found = enrichment(values, region, shifts=41)
    np.testing.assert_allclose((found.lift, found.auc, found.nss), slow(values, region))
    shifted = np.array(
        [slow(np.roll(values, (i, j), (0, 1)), region) for i in range(6) for j in range(7) if (i, j) != (0, 0)]
    )
    np.testing.assert_allclose((found.shifted_lift, found.shifted_auc, found.shifted_nss), shifted.mean(0))
    assert found.p == pytest.approx((1 + (shifted[:, 1] >= found.auc - 1e-12).sum()) / 42)


def test_a_map_on_the_object_and_a_map_of_nothing() -> None:
    region = np.zeros((8, 8), bool)
    region[2:4, 5:7] = True
    on = enrichment(region.astype(float), region)
    assert on.lift == pytest.approx(16.0)
    assert on.auc == 1.0
    assert on.p < 0.05
    flat = enrichment(np.ones((8, 8)), region)
    assert (flat.lift, flat.auc, flat.nss, flat.p) == (1.0, 0.5, 0.0, 1.0)


def test_unknown_cells_and_regions_that_tell_nothing() -> None:
    values, region = RNG.random((5, 5)), np.zeros((5, 5), bool)
    region[0, :3] = True
    values[4] = np.nan
    found = enrichment(values, region)
    np.testing.assert_allclose((found.lift, found.auc, found.nss), slow(values[:4], region[:4]))
    for nothing in (np.zeros((5, 5), bool), np.ones((5, 5), bool)):
        assert np.isnan(enrichment(RNG.random((5, 5)), nothing).auc)
    assert np.isnan(enrichment(np.full((5, 5), np.nan), region).lift)
    with pytest.raises(UsageError, match="equal grids"):
        enrichment(np.ones((4, 5)), region)


def textured_square(shift: int, frames: int = 3) -> tuple[np.ndarray, np.ndarray]:
    pytest.importorskip("skimage")
    from scipy.ndimage import gaussian_filter

    back = gaussian_filter(RNG.random((64, 64, 3)), (2, 2, 0))
    square = gaussian_filter(RNG.random((20, 20, 3)), (2, 2, 0))
    clip = np.repeat(back[None], frames, axis=0)
    masks = np.zeros((frames, 64, 64), bool)
    for t in range(frames):
        place = (slice(22, 42), slice(12 + shift * t, 32 + shift * t))
        clip[t][place] = square
        masks[t][place] = True
    low, high = clip.min(), clip.max()
    return ((clip - low) / (high - low) * 255).astype(np.uint8), masks


def test_flow_finds_a_moving_square_and_its_direction() -> None:
    clip, masks = textured_square(2)
    found = flow(clip)
    assert found.shape == (2, 2, 64, 64)
    inner = np.zeros((64, 64), bool)
    inner[26:38, 18:28] = True
    np.testing.assert_allclose(np.median(found[0, 1][inner]), 2.0, atol=0.3)  # x
    np.testing.assert_allclose(np.median(found[0, 0][inner]), 0.0, atol=0.3)  # y
    speed = flow_speed(clip)
    assert np.median(speed[0][~masks[0] & ~masks[1]]) < 0.2
    assert enrichment(speed[0], masks[0]).auc > 0.9


def test_nothing_moves_in_a_still_clip() -> None:
    clip, _ = textured_square(0)
    assert not moving_region(flow_speed(clip)).any()
    moving, masks = textured_square(2)
    region = moving_region(flow_speed(moving), quantile=0.9)
    assert (region[0] & (masks[0] | masks[1])).sum() / region[0].sum() > 0.8


@pytest.mark.parametrize("shape", [(1, 8, 8, 3), (3, 8, 8), (3, 8, 8, 4)])
def test_flow_of_what_is_no_clip(shape: tuple[int, ...]) -> None:
    pytest.importorskip("skimage")
    with pytest.raises(UsageError, match="at least two RGB frames"):
        flow(np.zeros(shape, np.uint8))
