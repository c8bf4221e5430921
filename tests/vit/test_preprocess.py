"""Preprocessing against transformers' own Pillow processors, and its geometry against a dot of light."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from foveate.errors import ModelError, SampleError
from foveate_vit.preprocess import DEFAULTS, Recipe

SHAPES = [(40, 60), (61, 37), (224, 224), (10, 9), (300, 223), (1, 1), (500, 33)]
PROCESSORS = [
    "CLIPImageProcessor",
    "BitImageProcessor",
    "ViTImageProcessor",
    "DeiTImageProcessor",
    "SiglipImageProcessor",
]


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def theirs(name: str, fields: dict[str, Any], pixels: np.ndarray) -> np.ndarray:
    processor = getattr(transformers, name + "Pil")(**fields)
    return np.asarray(processor(Image.fromarray(pixels), return_tensors="np")["pixel_values"][0])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", PROCESSORS)
def test_the_defaults_of_every_processor_are_transformers_own(name: str, shape: tuple[int, int]) -> None:
    pixels = noise(*shape)
    mine, _ = Recipe.read(None, default=name)(pixels)
    np.testing.assert_allclose(mine, theirs(name, {}, pixels), atol=2e-6)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("CLIPImageProcessor", {"size": {"shortest_edge": 50}, "crop_size": {"height": 70, "width": 45}}),
        ("CLIPImageProcessor", {"size": 50, "crop_size": 41}),
        ("CLIPImageProcessor", {"size": {"shortest_edge": 50, "longest_edge": 60}, "do_center_crop": False}),
        ("CLIPImageProcessor", {"do_resize": False, "crop_size": {"height": 64, "width": 65}}),
        ("ViTImageProcessor", {"size": 33, "resample": 0, "do_normalize": False}),
        ("ViTImageProcessor", {"size": {"height": 20, "width": 50}, "resample": 1, "do_rescale": False}),
        (
            "BitImageProcessor",
            {"size": {"shortest_edge": 256}, "image_mean": [0.1, 0.2, 0.3], "rescale_factor": 0.01},
        ),
    ],
)
def test_every_field_of_the_file_is_obeyed(name: str, fields: dict[str, Any], shape: tuple[int, int]) -> None:
    pixels = noise(*shape)
    mine, _ = Recipe.read({"image_processor_type": name, **fields}, default="?")(pixels)
    np.testing.assert_allclose(mine, theirs(name, fields, pixels), atol=2e-5)


@pytest.mark.parametrize("name", PROCESSORS)
def test_a_saved_file_is_read_whatever_suffix_the_class_has(name: str) -> None:
    saved = getattr(transformers, name + "Pil")().to_dict()
    expected = Recipe.read(None, default=name)
    for spelling in (name, name + "Fast", name.replace("ImageProcessor", "FeatureExtractor")):
        read = Recipe.read(saved | {"image_processor_type": spelling}, default="?")
        assert read.processor == name
        np.testing.assert_array_equal(read(noise(30, 50))[0], expected(noise(30, 50))[0])


def antialiased(values: np.ndarray, size: int, axis: int) -> np.ndarray:
    """Triangle filter widened by the shrink factor, pixel centres at i + 1/2, one axis, float64, a slow loop."""
    have = values.shape[axis]
    factor = have / size
    support = max(factor, 1.0)
    moved = np.moveaxis(values.astype(np.float64), axis, 0)
    out = np.empty((size, *moved.shape[1:]))
    for i in range(size):
        centre = (i + 0.5) * factor
        weights = np.array([max(0.0, 1 - abs((j + 0.5 - centre) / support)) for j in range(have)])
        out[i] = np.tensordot(weights / weights.sum(), moved, axes=1)
    return np.moveaxis(out, 0, axis)


@pytest.mark.parametrize("shape", [(40, 60), (224, 100), (300, 250), (700, 229)])
def test_dinov3_rescales_then_resizes_in_float(shape: tuple[int, int]) -> None:
    pixels = noise(*shape)
    mine, geometry = Recipe.read(None, default="DINOv3ViTImageProcessor")(pixels)
    resized = antialiased(antialiased(pixels / 255, 224, 0), 224, 1)
    expected = (resized - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(mine, expected.transpose(2, 0, 1), atol=1e-4)  # a grey level is 0.018
    assert (geometry.scale_y, geometry.scale_x) == (224 / shape[0], 224 / shape[1])


def found_dot(
    recipe: Recipe, height: int, width: int, y: int, x: int, size: int
) -> tuple[Any, tuple[float, float]]:
    """Where a white ``size x size`` block around (y, x) shows up brightest, in original pixels."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[max(0, y - size // 2) : y + size // 2 + 1, max(0, x - size // 2) : x + size // 2 + 1] = 255
    values, geometry = recipe(pixels)
    light = values.sum(0).astype(np.float64) - values.sum(0).min()
    light[light < 0.5 * light.max()] = 0.0
    rows, columns = np.indices(light.shape)
    centre = (np.sum(light * (rows + 0.5)) / light.sum(), np.sum(light * (columns + 0.5)) / light.sum())
    return geometry, geometry.to_original(*centre)


@settings(max_examples=25, deadline=None)
@given(st.sampled_from([*PROCESSORS, "DINOv3ViTImageProcessor"]), st.floats(0.03, 0.97), st.floats(0.03, 0.97))
def test_a_bright_dot_in_a_full_hd_photo_is_found_again_within_half_a_patch(
    name: str, down: float, along: float
) -> None:
    recipe, patch = Recipe.read(None, default=name), 14
    _, blank = recipe(np.zeros((1080, 1920, 3), np.uint8))
    top, left, bottom, right = blank.visible
    y, x = int(top + down * (bottom - top)), int(left + along * (right - left))
    geometry, (found_y, found_x) = found_dot(recipe, 1080, 1920, y, x, 13)
    assert abs(found_y - y - 0.5) < patch / 2 / geometry.scale_y
    assert abs(found_x - x - 0.5) < patch / 2 / geometry.scale_x


def test_what_the_crop_removed_is_nan_on_the_canvas_and_dark_in_the_input() -> None:
    recipe = Recipe.read(None, default="CLIPImageProcessor")
    pixels = np.zeros((1080, 1920, 3), np.uint8)
    values, geometry = recipe(pixels)
    assert geometry.visible == pytest.approx((0, 87 * 1920 / 398, 1080, 311 * 1920 / 398))  # 398 x 224
    pixels[500:580, 100:300] = 255  # outside the visible square
    np.testing.assert_array_equal(recipe(pixels)[0], values)
    from foveate.geometry import CellGrid

    grid, canvas = CellGrid.regular(16, 16, height=224, width=224), geometry.canvas()
    laid = geometry.to_canvas(np.ones((16, 16)), grid, canvas)
    assert np.isnan(laid[:, :419]).all()
    assert np.isnan(laid[:, 1501:]).all()
    np.testing.assert_allclose(laid[:, 420:1500], 1.0)


def test_a_smaller_image_is_padded_with_black_and_the_geometry_knows() -> None:
    recipe = Recipe.read(
        {"do_resize": False, "crop_size": {"height": 60, "width": 61}}, default="CLIPImageProcessor"
    )
    geometry, (y, x) = found_dot(recipe, 31, 40, 20, 11, 3)
    assert (y, x) == pytest.approx((20.5, 11.5), abs=1e-6)
    assert geometry.offset_y == 15  # 29 missing rows: 15 above, 14 below
    assert geometry.visible == (0, 0, 31, 40)


@pytest.mark.parametrize(("name", "ratio"), [("CLIPImageProcessor", 1.0), ("DeiTImageProcessor", 256 / 224)])
def test_another_input_size_keeps_the_ratio_of_resize_and_crop(name: str, ratio: float) -> None:
    values, geometry = Recipe.read(None, default=name).at(336, 336)(noise(400, 400))
    assert values.shape == (3, 336, 336)
    assert geometry.scale_y * 400 == round(336 * ratio)


def test_what_cannot_be_read_names_the_field() -> None:
    with pytest.raises(ModelError, match="crop_size"):
        Recipe.read({"do_center_crop": True, "image_processor_type": "ViTImageProcessor"}, default="?")
    with pytest.raises(ModelError, match="resample"):
        Recipe.read({"size": 224}, default="UnheardOfImageProcessor")


@pytest.mark.parametrize("shape", [(2, 30, 40, 3), (30, 40), (30, 40, 4), (0, 4, 3)])
def test_only_one_rgb_image_is_taken(shape: tuple[int, ...]) -> None:
    with pytest.raises(SampleError, match="RGB"):
        Recipe.read(None, default="ViTImageProcessor")(np.zeros(shape, np.uint8))


def test_a_hairline_of_an_image_is_refused_before_it_fills_the_memory() -> None:
    with pytest.raises(SampleError, match="elongated"):
        Recipe.read(None, default="CLIPImageProcessor")(np.zeros((1, 9000, 3), np.uint8))


def test_every_known_processor_has_complete_defaults() -> None:
    for name in DEFAULTS:
        assert Recipe.read({}, default=name).mean is not None
