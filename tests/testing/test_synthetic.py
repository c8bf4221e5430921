"""The pictures are what their docstring promises, and no filter that ignores the rim solves them."""

from __future__ import annotations

import colorsys
import csv

import numpy as np
import pytest
from PIL import Image

from foveate.testing.synthetic import CLASSES, HUES, SIZE, RimDiscs, rim_discs, write_dataset


@pytest.fixture(scope="module")
def data() -> RimDiscs:
    return rim_discs(400, seed=5)


def test_a_picture_depends_on_seed_and_position_alone(data: RimDiscs) -> None:
    part = rim_discs(3, seed=5, start=10)
    np.testing.assert_array_equal(part.images, data.images[10:13])
    np.testing.assert_array_equal(part.masks, data.masks[10:13])
    np.testing.assert_array_equal(part.labels, data.labels[10:13])
    assert not np.array_equal(rim_discs(1, seed=6).images, data.images[:1])


def test_shapes_types_and_all_classes(data: RimDiscs) -> None:
    assert data.images.shape == (400, SIZE, SIZE, 3)
    assert data.images.dtype == np.uint8
    assert data.masks.dtype == np.bool_
    assert set(data.labels) == set(range(len(CLASSES)))
    assert len(data) == 400
    assert len(rim_discs(0, seed=1)) == 0


def test_all_hues_are_equally_saturated_and_bright() -> None:
    hsv = np.array([colorsys.rgb_to_hsv(*colour) for colour in HUES.values()])
    np.testing.assert_allclose(hsv[:, 1], hsv[0, 1])
    np.testing.assert_allclose(hsv[:, 2], hsv[0, 2])
    np.testing.assert_allclose(np.sort(hsv[:, 0]), np.arange(6) / 6, atol=1e-9)


def test_the_mask_is_the_disc_with_the_light_rim_and_its_hue_is_the_class(data: RimDiscs) -> None:
    for image, label, mask in zip(data.images[:50], data.labels[:50], data.masks[:50], strict=True):
        y, x = np.nonzero(mask)
        radius = np.sqrt(mask.sum() / np.pi)
        distance = np.hypot(y - y.mean(), x - x.mean()) / radius
        rim = image[y[distance > 0.85], x[distance > 0.85]]
        inside = image[y[distance < 0.55], x[distance < 0.55]].mean(axis=0) / 255
        assert rim.mean() > 200
        nearest = np.argmin([np.abs(inside - np.array(colour)).sum() for colour in HUES.values()])
        assert nearest == label


def pointed(maps: np.ndarray, masks: np.ndarray) -> float:
    """Share of pictures whose strongest 8 x 8 cell lies at least a quarter on the mask."""
    cells = [array.reshape(-1, 8, 8, 8, 8).mean((2, 4)).reshape(len(array), -1) for array in (maps, masks * 1.0)]
    return float(np.mean(cells[1][np.arange(len(maps)), cells[0].argmax(1)] > 0.25))


def test_saturation_and_centre_do_not_find_the_evidence_but_the_mask_does(data: RimDiscs) -> None:
    pixels = data.images / 255.0
    high, low = pixels.max(-1), pixels.min(-1)
    y, x = np.mgrid[0:SIZE, 0:SIZE] + 0.5
    centre = np.broadcast_to(np.exp(-((y - 32) ** 2 + (x - 32) ** 2) / 512), high.shape)
    assert pointed(data.masks * 1.0, data.masks) == 1.0
    chroma = pointed(high - low, data.masks)
    assert abs(chroma - 1 / 3) < 0.08  # one disc of three
    assert pointed((high - low) / np.maximum(high, 1e-9), data.masks) < 0.34
    assert pointed(centre, data.masks) < 0.2


def test_a_dataset_on_disk_is_what_the_generator_gives(tmp_path, data: RimDiscs) -> None:
    manifest = write_dataset(tmp_path / "rim", 5, seed=5)
    with manifest.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["path", "label", "mask"]
    for i, row in enumerate(rows):
        np.testing.assert_array_equal(np.asarray(Image.open(manifest.parent / row["path"])), data.images[i])
        np.testing.assert_array_equal(np.asarray(Image.open(manifest.parent / row["mask"])) > 0, data.masks[i])
        assert row["label"] == CLASSES[data.labels[i]]
