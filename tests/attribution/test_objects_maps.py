"""Own boxes and masks, and D-RISE on a detector known in closed form."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from detector_fakes import WINDOWS, WindowDetector, bound_spots, padded, spots
from foveate.attribution.drise import DRise, random_mask, similarities
from foveate.attribution.objects import OwnBox, OwnMask, box_share, own_share
from foveate.attribution.padding import visible_share
from foveate.attribution.seeding import sample_seed
from foveate.errors import UsageError
from foveate.geometry import CellGrid, Geometry
from foveate.interfaces import Prediction, Target
from foveate.testing.tiny import TinySource

CELLS = CellGrid.regular(4, 4, height=32, width=32)


def share_by_pixels(box, geometry, grid, fine=16):
    """Counting points of a fine lattice over the input."""
    height, width = geometry.input_height, geometry.input_width
    y = (np.arange(height * fine) + 0.5) / fine
    x = (np.arange(width * fine) + 0.5) / fine
    oy, ox = (y - geometry.offset_y) / geometry.scale_y, (x - geometry.offset_x) / geometry.scale_x
    image = np.outer((oy > 0) & (oy < geometry.original_height), (ox > 0) & (ox < geometry.original_width))
    inside = np.outer((oy > box[0]) & (oy < box[2]), (ox > box[1]) & (ox < box[3])) & image
    out = np.full(grid.shape, np.nan)
    for i in range(grid.shape[0]):
        for j in range(grid.shape[1]):
            cell = np.outer((y > grid.y[i]) & (y < grid.y[i + 1]), (x > grid.x[j]) & (x < grid.x[j + 1]))
            if (image & cell).any():
                out[i, j] = (inside & cell).sum() / (image & cell).sum()
    return out


@pytest.mark.parametrize("box", [(3.0, 5.0, 20.0, 30.0), (-9.0, -9.0, 4.0, 99.0), (7.0, 7.0, 7.0, 9.0)])
def test_the_share_of_a_box_is_its_area_in_each_cell(box):
    geometry = Geometry(24, 40, 32, 32, 1.0, 0.5, 0.0, 4.0)
    found = box_share(box, geometry, CELLS)
    np.testing.assert_allclose(found, share_by_pixels(box, geometry, CELLS), atol=0.02)
    assert np.isnan(found[3]).all()  # the image ends at input row 24
    assert np.isnan(box_share((0, 0, np.nan, 3), geometry, CELLS)).all()


def test_what_is_padding_is_known():
    share = visible_share(Geometry(20, 32, 32, 32, 1.0, 1.0), CELLS)
    np.testing.assert_allclose(share, np.repeat([[1.0], [1.0], [0.5], [0.0]], 4, axis=1))


def test_own_box_and_own_mask_are_each_objects_own():
    source = WindowDetector(masks=True)
    batch, bound = bound_spots(source, [(0, 1), (2,)])
    boxes, masks = OwnBox().attribute(source, batch, bound), OwnMask().attribute(source, batch, bound)
    assert boxes.values.shape == (3, 4, 4)
    for row, one, mask in zip(bound.rows, boxes.values, masks.values, strict=True):
        t, left, b, r = WINDOWS[row.object]
        assert one.sum() * 64 == pytest.approx((b - t) * (r - left))
        assert mask.sum() * 64 == pytest.approx((b - t) * (r - left) / 2)
        assert (mask <= one + 1e-6).all()
    short = padded(batch, 24, 32)
    assert np.isnan(OwnBox().attribute(source, short, bound).values[:, 3]).all()


def test_targets_that_are_no_objects_have_no_box():
    source = TinySource()
    batch = source.encode(spots([(0,)]))
    bound = source.bind(source.forward(batch), batch, Target())
    for method in (OwnBox(), OwnMask(), DRise(masks=2)):
        with pytest.raises(UsageError, match="not objects"):
            method.attribute(source, batch, bound)


def test_masks_are_enlarged_random_cells():
    random = torch.Generator().manual_seed(0)
    masks = torch.stack([random_mask((4, 8), (32, 40), 0.3, random) for _ in range(2000)])
    assert masks.shape == (2000, 32, 40)
    assert masks.min() >= 0
    assert masks.max() <= 1 + 1e-6
    assert masks.mean() == pytest.approx(0.3, abs=0.01)
    np.testing.assert_allclose(masks.mean(0), 0.3, atol=0.05)  # no place is shown more often than another


def prediction(box, score=1.0, class_index=0):
    return Prediction(str(class_index), score, class_index, 0, box)


def test_similarity_is_the_best_overlap_of_the_same_class_times_its_score():
    target = prediction((0, 0, 10, 10))
    answers = [
        [prediction((0, 0, 10, 10), 0.4), prediction((0, 0, 10, 5), 0.9)],
        [prediction((0, 0, 10, 10), 0.99, class_index=1)],
        [prediction((20, 20, 30, 30)), prediction((0, float("nan"), 10, 10))],
        [],
    ]
    np.testing.assert_allclose(similarities([target], answers)[:, 0], [0.45, 0.0, 0.0, 0.0])


def drise_by_hand(source, sample_inputs, sample_id, row, method, seed, cells=(4, 4)):
    """Equation 2, mask by mask, in float64."""
    generator = torch.Generator().manual_seed(sample_seed(seed, sample_id))
    total, shown = np.zeros((32, 32)), np.zeros((32, 32))
    t, left, b, r = WINDOWS[row.object]
    for _ in range(method.masks):
        mask = random_mask(cells, (32, 32), method.probability, generator).double().numpy()
        picture = sample_inputs.double().numpy() * mask
        # windows of one class do not overlap, so the best answer is the object's own query
        similarity = picture[0, t:b, left:r].mean()
        total, shown = total + similarity * mask, shown + mask
    return (total / shown).reshape(4, 8, 4, 8).mean((1, 3))


def test_drise_equals_the_definition_and_serves_all_objects_with_one_set_of_masks(monkeypatch):
    source = WindowDetector()
    batch, bound = bound_spots(source, [(0, 1), (2,)])
    method = DRise(masks=60)
    shown = []
    forward = source.forward
    monkeypatch.setattr(source, "forward", lambda b, **k: shown.append(len(b)) or forward(b, **k))
    made = method.attribute(source, batch, bound, seed=5)
    assert sum(shown) <= 2 * 60 * 2 + 10  # two images, two seeds; not three objects
    for i, row in enumerate(bound.rows):
        truth = drise_by_hand(source, batch.inputs[row.sample], batch.ids[row.sample], row, method, 5)
        np.testing.assert_allclose(made.values[i], truth, rtol=1e-4)
    tight = DRise(masks=60, rows=7).attribute(source, batch, bound, seed=5)
    np.testing.assert_allclose(tight.values, made.values, rtol=1e-5)
    other = method.attribute(source, batch, bound, seed=6)
    assert np.abs(other.values - made.values).max() > 1e-3
    assert made.info["masks"] == 60
    assert made.info["forward_passes"] == 120


def test_enough_masks_find_the_object_and_converge():
    source = WindowDetector()
    batch, bound = bound_spots(source, [(1,)])
    made = DRise(masks=1500).attribute(source, batch, bound)
    assert made.converged
    assert made.info["per_row"]["seed_spearman"][0] > 0.8
    rows, columns = np.unravel_index(np.argsort(-made.values[0], axis=None)[:4], (4, 4))
    assert set(rows) == {2, 3}
    assert set(columns) == {2, 3}
    few = DRise(masks=3).attribute(source, batch, bound)
    assert few.info["per_row"]["seed_spearman"][0] < made.info["per_row"]["seed_spearman"][0]


def test_an_object_that_is_never_found_again_gives_a_flat_map_that_has_not_converged():
    source = WindowDetector()
    batch, bound = bound_spots(source, [(0,)])
    kept = source.predictions
    intact = batch.inputs

    def only_when_intact(outputs, shown):
        whole = shown.inputs.shape == intact.shape and torch.equal(shown.inputs, intact)
        return kept(outputs, shown) if whole else [[] for _ in shown.ids]

    source.predictions = only_when_intact
    made = DRise(masks=10).attribute(source, batch, bound)
    assert (made.values == 0).all()
    assert not made.converged


@pytest.mark.parametrize("options", [{"masks": 0}, {"repeats": 1}, {"probability": 1.0}])
def test_bad_options(options):
    with pytest.raises(UsageError, match="drise"):
        DRise(**options)


def test_segmenters_without_boxes_are_matched_by_their_masks():
    a, b = np.zeros((4, 4), bool), np.zeros((4, 4), bool)
    a[:2], b[:3] = True, True
    target = Prediction("0", 1.0, 0, 0, mask=a)
    answers = [
        [Prediction("0", 0.9, 0, 0, mask=b)],
        [Prediction("0", 0.9, 0, 0)],
        [Prediction("1", 0.9, 1, 0, mask=a)],
    ]
    np.testing.assert_allclose(similarities([target], answers)[:, 0], [0.9 * 2 / 3, 0.0, 0.0])


def test_an_objects_place_is_its_box_or_else_its_mask():
    geometry, mask = Geometry.identity(32, 32), np.zeros((32, 32), bool)
    mask[:8] = True
    only_mask = Prediction("0", 1.0, 0, 0, mask=mask)
    np.testing.assert_array_equal(own_share(only_mask, geometry, CELLS), [[1.0] * 4] + [[0.0] * 4] * 3)
    both = Prediction("0", 1.0, 0, 0, (0.0, 0.0, 32.0, 8.0), mask)
    np.testing.assert_array_equal(own_share(both, geometry, CELLS)[:, 0], [1.0] * 4)
    assert np.isnan(own_share(None, geometry, CELLS)).all()
