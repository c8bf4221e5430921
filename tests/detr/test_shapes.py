"""The scenes are what their docstring promises: boxes and masks of visible pixels, labels by hue or shape."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from foveate.testing.shapes import (
    CLASSES,
    MOST,
    SHAPES,
    SIZE,
    Scene,
    box_of,
    names,
    scene,
    scenes,
    write_dataset,
)
from foveate.testing.synthetic import HUES


@pytest.fixture(scope="module")
def data() -> list[Scene]:
    return scenes(150, seed=5)


def test_a_picture_depends_on_seed_and_index_alone(data: list[Scene]) -> None:
    for again, before in zip(scenes(3, seed=5, start=10), data[10:13], strict=True):
        np.testing.assert_array_equal(again.image, before.image)
        np.testing.assert_array_equal(again.masks, before.masks)
    assert not np.array_equal(scene(0, seed=6).image, data[0].image)
    assert scenes(0, seed=1) == []


def test_types_counts_and_all_classes(data: list[Scene]) -> None:
    for drawn in data:
        assert drawn.image.shape == (SIZE, SIZE, 3)
        assert drawn.image.dtype == np.uint8
        assert drawn.masks.shape == (len(drawn), SIZE, SIZE)
        assert drawn.boxes.shape == (len(drawn), 4)
        assert 1 <= len(drawn) <= MOST
    assert {len(drawn) for drawn in data} == set(range(1, MOST + 1))
    assert {int(hue) for drawn in data for hue in drawn.labels()} == set(range(len(CLASSES)))
    assert {int(kind) for drawn in data for kind in drawn.labels("shape")} == set(range(len(SHAPES)))


def test_boxes_are_the_smallest_around_the_visible_pixels(data: list[Scene]) -> None:
    for drawn in data[:40]:
        assert drawn.masks.sum(0).max() <= 1  # a pixel shows one object
        for mask, (top, left, bottom, right) in zip(drawn.masks, drawn.boxes.astype(int), strict=True):
            y, x = np.nonzero(mask)
            assert (y.min(), x.min(), y.max() + 1, x.max() + 1) == (top, left, bottom, right)


def test_the_pixels_of_an_object_have_its_hue_and_no_others_have(data: list[Scene]) -> None:
    palette = np.array(list(HUES.values()))
    for drawn in data[:40]:
        for mask, hue in zip(drawn.masks, drawn.hues, strict=True):
            inside = drawn.image[mask].mean(0) / 255
            assert np.argmin(np.abs(inside - palette).sum(1)) == hue
        outside = drawn.image[~drawn.masks.any(0)] / 255
        # saturated means: far from grey by more than texture and noise make it
        spread = outside.max(1) - outside.min(1)
        assert np.mean(spread > 0.6) < 0.01


def test_shapes_are_told_apart_by_how_they_fill_their_circle() -> None:
    """Area over that of the circle through the furthest pixel, mean over many, as plane geometry has it."""
    filled: dict[int, list[float]] = {kind: [] for kind in range(len(SHAPES))}
    for drawn in scenes(200, seed=8):
        for mask, kind in zip(drawn.masks, drawn.shapes, strict=True):
            y, x = np.nonzero(mask)
            furthest = np.hypot(y - y.mean(), x - x.mean()).max()
            filled[int(kind)].append(mask.sum() / (np.pi * furthest**2))
    means = [np.mean(filled[kind]) for kind in range(len(SHAPES))]
    assert means[0] == pytest.approx(1.0, abs=0.1)  # disc
    assert means[1] == pytest.approx(2 / np.pi, abs=0.08)  # square: 2 r^2 of pi r^2
    assert means[2] == pytest.approx(3 * np.sqrt(3) / 4 / np.pi, abs=0.08)  # triangle
    cross = (8 * 0.34 * 0.94 - 4 * 0.34**2) / np.pi / (0.34**2 + 0.94**2)
    assert means[3] == pytest.approx(cross, abs=0.08)


def test_hue_and_shape_are_independent() -> None:
    table = np.zeros((len(CLASSES), len(SHAPES)))
    for drawn in scenes(400, seed=2):
        np.add.at(table, (drawn.hues, drawn.shapes), 1)
    expected = table.sum(1, keepdims=True) * table.sum(0) / table.sum()
    assert ((table - expected) ** 2 / expected).sum() < 40  # chi squared, 15 degrees of freedom: p > 5e-4


def test_a_box_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        box_of(np.zeros((4, 4), bool))


@pytest.mark.parametrize("by", ["hue", "shape"])
def test_a_written_dataset_says_what_the_scenes_say(tmp_path: Path, by: str) -> None:
    manifest = write_dataset(tmp_path, 5, seed=7, by=by)  # type: ignore[arg-type]
    rows = list(csv.DictReader(manifest.open(newline="")))
    truth = json.loads((tmp_path / "objects.json").read_text())
    assert truth["classes"] == list(names(by))  # type: ignore[arg-type]
    assert [row["path"] for row in rows] == list(truth["images"])
    for row, drawn in zip(rows, scenes(5, seed=7), strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / row["path"])), drawn.image)
        np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / row["mask"])) == 255, drawn.masks.any(0))
        objects = truth["images"][row["path"]]
        assert int(row["objects"]) == len(objects) == len(drawn)
        labels = drawn.labels(by)  # type: ignore[arg-type]
        assert row["label"] == names(by)[labels[drawn.masks.sum((1, 2)).argmax()]]  # type: ignore[arg-type]
        for entry, mask, box, label in zip(objects, drawn.masks, drawn.boxes, labels, strict=True):
            assert entry["label"] == names(by)[label]  # type: ignore[arg-type]
            assert entry["box"] == box.tolist()
            np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / entry["mask"])) == 255, mask)


def test_writing_again_gives_the_same_bytes(tmp_path: Path) -> None:
    write_dataset(tmp_path / "a", 3, seed=1)
    write_dataset(tmp_path / "b", 3, seed=1)
    files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*") if p.is_file())
    assert len(files) > 8
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
