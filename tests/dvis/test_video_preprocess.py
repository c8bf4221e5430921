"""Frames and pixels of clips, against transformers' own processors and a slow float64 filter."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st

from foveate.errors import ModelError, SampleError
from foveate_dvis.clip_preprocess import DEFAULTS, ClipRecipe, choose_frames

SHAPES = [(40, 60), (61, 37), (224, 224), (300, 223), (500, 90)]


def noise(height: int, width: int, frames: int = 3) -> np.ndarray:
    return np.random.default_rng(height).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)


def theirs(name: str, fields: dict[str, Any], pixels: np.ndarray) -> np.ndarray:
    processor = getattr(transformers, name)(**fields)
    return np.asarray(processor(list(pixels), return_tensors="np")["pixel_values"][0])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("kind", "name", "fields"),
    [
        ("VideoMAE", "VideoMAEImageProcessorPil", {}),
        ("VideoMAE", "VideoMAEImageProcessorPil", {"size": {"shortest_edge": 50}, "crop_size": 41}),
        ("VideoMAE", "VideoMAEImageProcessorPil", {"image_mean": [0.485, 0.456, 0.406], "resample": 3}),
        ("Vivit", "VivitImageProcessor", {}),
        ("Vivit", "VivitImageProcessor", {"offset": False, "rescale_factor": 1 / 255}),
        ("Vivit", "VivitImageProcessor", {"do_normalize": False}),
    ],
)
def test_clips_become_what_transformers_makes_of_them(
    kind: str, name: str, fields: dict[str, Any], shape: tuple[int, int]
) -> None:
    pixels = noise(*shape)
    given_file = {"image_processor_type": name, **fields} if fields else None
    mine, geometry = ClipRecipe.read(given_file, default=kind)(pixels)
    np.testing.assert_allclose(mine, theirs(name, fields, pixels), atol=2e-6)
    assert (geometry.original_height, geometry.original_width) == shape
    assert (geometry.input_height, geometry.input_width) == mine.shape[-2:]


def test_a_timesformer_file_names_the_extractor_of_videomae() -> None:
    pixels = noise(40, 60)
    fields = {"image_mean": [0.45, 0.45, 0.45], "image_std": [0.225, 0.225, 0.225], "size": {"shortest_edge": 224}}
    read = ClipRecipe.read(fields | {"feature_extractor_type": "VideoMAEFeatureExtractor"}, default="Timesformer")
    np.testing.assert_allclose(read(pixels)[0], theirs("VideoMAEImageProcessorPil", fields, pixels), atol=2e-6)


def resized(values: np.ndarray, size: int, axis: int) -> np.ndarray:
    """Triangle filter widened by the shrink factor, pixel centres at i + 1/2, one axis, float64, a slow loop."""
    have = values.shape[axis]
    factor = have / size
    support = max(factor, 1.0)
    moved = np.moveaxis(values.astype(np.float64), axis, 0)
    out = np.zeros((size, *moved.shape[1:]))
    for i in range(size):
        centre = (i + 0.5) * factor
        weights = np.array([max(0.0, 1 - abs(j + 0.5 - centre) / support) for j in range(have)])
        out[i] = np.tensordot(weights / weights.sum(), moved, 1)
    return np.moveaxis(out, 0, axis)


@pytest.mark.parametrize("shape", [(40, 60), (61, 37), (90, 80)])
@pytest.mark.parametrize("kind", ["VJEPA2", "Videomt", "Sam2"])
def test_processors_of_torchvision_only(kind: str, shape: tuple[int, int]) -> None:
    """8-bit filtering rounds after each axis: one grey level at most from the float64 filter."""
    pixels = noise(*shape, frames=1)
    name = "Sam2ImageProcessorFast" if kind == "Sam2" else f"{kind}VideoProcessor"
    config: dict[str, Any] = {"image_processor_type" if kind == "Sam2" else "video_processor_type": name}
    if kind == "VJEPA2":
        config |= {"crop_size": {"height": 56, "width": 56}, "size": {"shortest_edge": 999}}
        short = min(shape)
        rows, columns = (64 if side == short else int(64 * side / short) for side in shape)
        top, left = (rows - 56) // 2, (columns - 56) // 2
        window = np.s_[top : top + 56, left : left + 56]
    else:
        config |= {"size": {"height": 48, "width": 72}}
        rows, columns, window = 48, 72, np.s_[:, :]
    mine, geometry = ClipRecipe.read(config, default=kind)(pixels)
    filtered = resized(resized(pixels[0], rows, 0), columns, 1)[window]
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    levels = (mine[0].transpose(1, 2, 0) * std + mean) * 255
    assert np.abs(levels - np.round(levels)).max() < 1e-3
    assert np.abs(levels - filtered).max() < 1.5
    assert np.abs(levels - filtered).mean() < 0.5
    assert geometry.scale_y == pytest.approx(rows / shape[0])
    assert geometry.offset_x == (-window[1].start if window[1].start else 0)


def test_videos_of_a_pillow_processor_differ_from_torchs_filter_by_one_level_at_most() -> None:
    pixels = noise(300, 223, frames=1)
    pillow = ClipRecipe.read({"image_processor_type": "VideoMAEImageProcessor"}, default="?")(pixels)[0]
    torch = ClipRecipe.read({"video_processor_type": "VideoMAEVideoProcessor"}, default="?")(pixels)[0]
    assert 0 < np.abs(pillow - torch).max() < 1.01 / 127.5


@given(have=st.integers(1, 400), want=st.integers(1, 80))
def test_frames_are_spread_evenly(have: int, want: int) -> None:
    index = choose_frames(have, want)
    assert index.shape == (want,)
    assert index[0] >= 0
    assert index[-1] < have
    for i, chosen in enumerate(index.tolist()):  # the middle of span i lies in it
        middle = Fraction(2 * i + 1, 2) * Fraction(have, want)
        assert chosen <= middle < chosen + 1
    steps = np.diff(index)
    assert steps.size == 0 or (steps.min() >= 0 and steps.max() - steps.min() <= 1)


def test_all_frames_one_frame_and_no_frame() -> None:
    np.testing.assert_array_equal(choose_frames(9, 9), np.arange(9))
    np.testing.assert_array_equal(choose_frames(1, 4), [0, 0, 0, 0])
    np.testing.assert_array_equal(choose_frames(2, 4), [0, 0, 1, 1])
    np.testing.assert_array_equal(choose_frames(16, 4), [2, 6, 10, 14])
    with pytest.raises(SampleError, match="0 frames"):
        choose_frames(0, 4)


@pytest.mark.parametrize("shape", [(40, 60, 3), (0, 40, 60, 3), (2, 40, 60, 4)])
def test_what_is_no_clip_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(SampleError, match=r"expected a clip|no frame|expected one RGB image"):
        ClipRecipe.read(None, default="VideoMAE")(np.zeros(shape, np.uint8))


def test_an_unreadable_file_is_said() -> None:
    with pytest.raises(ModelError, match="preprocessor_config"):
        ClipRecipe.read({"video_processor_type": "VideoMAEVideoProcessor", "image_mean": "grey"}, default="?")


@pytest.mark.parametrize("kind", DEFAULTS)
def test_another_size_keeps_the_rule(kind: str) -> None:
    recipe = ClipRecipe.read(None, default=kind).at(32, 48)
    assert recipe.output_size() == (32, 48)
    assert recipe(noise(70, 90))[0].shape == (3, 3, 32, 48)
