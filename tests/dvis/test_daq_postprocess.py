"""Best pairs of track and class, and masks over original pixels, against slow oracles."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from foveate.errors import ModelError
from foveate_dvis.daq.postprocess import answer, best_pairs, full_masks

Array = NDArray[np.float64]


@pytest.mark.parametrize(("tracks", "classes", "count"), [(5, 3, 4), (2, 2, 20), (1, 1, 1), (7, 1, 3)])
def test_best_pairs(tracks: int, classes: int, count: int) -> None:
    logits = torch.randn(tracks, classes + 1, generator=torch.Generator().manual_seed(tracks), dtype=torch.float64)
    pairs = []
    for n in range(tracks):
        total = sum(math.exp(float(x)) for x in logits[n])
        pairs += [(math.exp(float(logits[n, k])) / total, k, n) for k in range(classes)]
    pairs.sort(reverse=True)
    scores, labels, index = best_pairs(logits, count)
    assert list(zip(labels.tolist(), index.tolist(), strict=True)) == [(k, n) for _, k, n in pairs[:count]]
    np.testing.assert_allclose(scores.numpy(), [p for p, _, _ in pairs[:count]], rtol=1e-12)


def test_equal_scores_keep_the_order_of_tracks_and_classes() -> None:
    _, labels, index = best_pairs(torch.zeros(3, 3), 5)
    assert labels.tolist() == [0, 1, 0, 1, 0]
    assert index.tolist() == [0, 0, 1, 1, 2]


def test_fewer_pairs_than_answers() -> None:
    logits = torch.randn(2, 4)
    assert len(best_pairs(logits, 20)[0]) == 6
    with pytest.raises(ModelError, match=r"6 pairs: fewer than the 20"):
        best_pairs(logits, 20, upstream_exact=True)
    assert len(best_pairs(logits, 6, upstream_exact=True)[0]) == 6


def bilinear(image: Array, height: int, width: int) -> Array:
    """Pixel centres at half-integers, edges repeated."""
    out = np.zeros((height, width))
    for y, x in itertools.product(range(height), range(width)):
        sy = min(max((y + 0.5) * image.shape[0] / height - 0.5, 0), image.shape[0] - 1)
        sx = min(max((x + 0.5) * image.shape[1] / width - 0.5, 0), image.shape[1] - 1)
        y0, x0 = int(sy), int(sx)
        y1, x1 = min(y0 + 1, image.shape[0] - 1), min(x0 + 1, image.shape[1] - 1)
        fy, fx = sy - y0, sx - x0
        top = (1 - fx) * image[y0, x0] + fx * image[y0, x1]
        out[y, x] = (1 - fy) * top + fy * ((1 - fx) * image[y1, x0] + fx * image[y1, x1])
    return out


@pytest.mark.parametrize("original", [(13, 21), (40, 50), (26, 30)])
def test_masks_over_original_pixels(original: tuple[int, int]) -> None:
    masks = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = full_masks(masks, (32, 32), (26, 30), original)
    for n, t in itertools.product(range(2), range(3)):
        large = bilinear(masks[n, t].numpy(), 32, 32)
        expected = bilinear(large[:26, :30], *original)
        np.testing.assert_allclose(found[n, t].numpy(), expected, atol=1e-10)


def test_a_track_of_two_labels_has_one_mask() -> None:
    logits = torch.tensor([[4.0, 3.9, 0.0], [-5.0, -5.0, 9.0]])
    masks = torch.randn(2, 2, 4, 4)
    got = answer(logits, masks, max_num=3, padded=(16, 16), shown=(16, 16), original=(16, 16))
    assert got.index.tolist()[:2] == [0, 0]
    assert got.labels.tolist()[:2] == [0, 1]
    assert torch.equal(got.masks[0], got.masks[1])
    assert torch.equal(got.masks[0], full_masks(masks[:1], (16, 16), (16, 16), (16, 16))[0] > 0)


def test_no_track_no_answer() -> None:
    got = answer(
        torch.zeros(0, 4), torch.zeros(0, 5, 4, 4), max_num=20, padded=(16, 16), shown=(9, 9), original=(18, 18)
    )
    assert got.masks.shape == (0, 5, 18, 18)
    assert len(got.scores) == 0
