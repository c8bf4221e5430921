"""Every localisation score against the literal pixel-level definition on the blown-up map."""

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from foveate.attribution.reference import mask_share
from foveate.faithfulness.localisation import LOCALISATION, localisation
from foveate.geometry import CellGrid, Geometry

PATCH = 4


def pixels_of(cells):
    return np.kron(cells, np.ones((PATCH, PATCH)))


def slow_scores(cells, mask, rng, draws=600):
    """Pixel by pixel; ties in pointing and rank accuracy by averaging many random orders."""
    values, truth = pixels_of(cells).ravel(), mask.ravel()
    hits, ranks = [], []
    for _ in range(draws):
        order = np.lexsort((rng.random(values.size), -values))
        hits.append(truth[order[0]])
        ranks.append(truth[order[: truth.sum()]].mean())
    positive = np.clip(values, 0, None)
    return [
        np.mean(hits),
        roc_auc_score(truth, values),
        np.mean(ranks),
        positive[truth].sum() / positive.sum(),
        truth.mean(),
    ]


def setting(seed):
    rng = np.random.default_rng(seed)
    mask = np.zeros((6 * PATCH, 5 * PATCH), bool)
    mask[3:14, 5:12] = True
    grid = CellGrid.regular(6, 5, height=6 * PATCH, width=5 * PATCH)
    share = mask_share(mask, Geometry.identity(*mask.shape), grid)
    return rng, mask, share, grid


@pytest.mark.parametrize("seed", range(4))
def test_scores_are_those_of_the_pixel_map(seed):
    rng, mask, share, grid = setting(seed)
    cells = rng.integers(-2, 4, (6, 5)).astype(float) + 2.0 * (share > 0.5)
    ours = localisation(cells.ravel(), share.ravel(), grid.areas.ravel())
    slow = slow_scores(cells, mask, rng)
    np.testing.assert_allclose(ours[[1, 3, 4]], np.array(slow)[[1, 3, 4]], atol=1e-12)
    np.testing.assert_allclose(ours[[0, 2]], np.array(slow)[[0, 2]], atol=0.07)


def test_a_uniform_map_scores_chance():
    _, mask, share, grid = setting(0)
    scores = dict(
        zip(LOCALISATION, localisation(np.full(30, 0.2), share.ravel(), grid.areas.ravel()), strict=True)
    )
    assert scores.pop("roc_auc") == pytest.approx(0.5)
    assert list(scores.values()) == pytest.approx([mask.mean()] * 4)


def test_the_mask_itself_scores_best_and_order_is_all_that_ranks_use():
    rng, _, share, grid = setting(1)
    flat, area = share.ravel(), grid.areas.ravel()
    oracle, stretched = localisation(flat, flat, area), localisation(np.exp(3 * flat), flat, area)
    assert oracle[0] == 1.0
    assert oracle[1] > 0.97  # cells on the rim are half covered
    np.testing.assert_allclose(oracle[[0, 1, 2]], stretched[[0, 1, 2]])
    others = localisation(rng.random((50, 30)), flat, area)
    assert np.all(others[:, [1, 2, 3]] < oracle[[1, 2, 3]])


def test_batch_equals_singles_and_unknown_cells_do_not_count():
    rng, _, share, grid = setting(2)
    maps = rng.normal(size=(3, 30))
    maps[1, 4] = np.nan
    batch = localisation(maps, share.ravel(), grid.areas.ravel())
    for row, values in zip(batch, maps, strict=True):
        keep = np.isfinite(values)
        single = localisation(values[keep], share.ravel()[keep], grid.areas.ravel()[keep])
        np.testing.assert_allclose(row, single)


def test_nothing_can_be_said_without_a_mask_or_without_an_outside():
    _, _, share, grid = setting(3)
    for empty in (np.zeros(30), np.ones(30)):
        assert np.all(np.isnan(localisation(share.ravel(), empty, grid.areas.ravel())))
    assert np.isnan(localisation(-np.ones(30), share.ravel(), grid.areas.ravel())[3])


def test_the_mask_is_followed_through_a_crop():
    mask = np.zeros((40, 80), bool)
    mask[:, :20] = True
    geometry = Geometry(40, 80, 20, 20, 0.5, 0.5, 0.0, -10.0)  # sees columns 20..60 of the original
    grid = CellGrid.regular(5, 5, height=20, width=20)
    assert mask_share(mask, geometry, grid).max() == 0.0
    mask[:, 20:28] = True
    np.testing.assert_allclose(mask_share(mask, geometry, grid)[0], [1, 0, 0, 0, 0])
