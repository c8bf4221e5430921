"""Preprocessing equals transformers' own Pillow processors, and knows where every pixel went."""

from __future__ import annotations

import importlib
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from detr_models import photos
from foveate.errors import SampleError, UsageError
from foveate.interfaces import Sample
from foveate_detr.owl import PaddedSquare
from foveate_detr.preprocess import PaddedRecipe, SteppedRecipe
from foveate_vit.preprocess import Recipe

SHAPES = ((60, 90), (100, 70), (33, 31), (200, 40))
SMALL = {"size": {"shortest_edge": 64, "longest_edge": 128}}
PADDING = {
    "detr": ("DetrImageProcessor", {}),
    "conditional_detr": ("ConditionalDetrImageProcessor", {}),
    "deformable_detr": ("DeformableDetrImageProcessor", {}),
    "grounding_dino": ("GroundingDinoImageProcessor", {}),
    "mask2former": ("Mask2FormerImageProcessor", {"size_divisor": 32}),
    "maskformer": ("MaskFormerImageProcessor", {"size_divisor": 32}),
}


def theirs(module: str, name: str, **options: Any) -> Any:
    return getattr(importlib.import_module(f"transformers.models.{module}.image_processing_pil_{module}"), name)(
        **options
    )


def ours(config: dict[str, Any] | None, name: str, **options: Any) -> PaddedRecipe:
    return PaddedRecipe.read(config, default=name, **options)


@pytest.mark.parametrize("module", PADDING)
def test_padded_batches_equal_transformers(module: str) -> None:
    name, more = PADDING[module]
    samples = photos(*SHAPES)
    expected = theirs(module, f"{name}Pil", **SMALL, **more)([s.pixels for s in samples], return_tensors="np")
    found = ours(SMALL | more, name, canvas="batch")(samples)
    assert found.inputs.shape == np.shape(expected["pixel_values"])
    np.testing.assert_allclose(found.inputs, expected["pixel_values"], atol=2e-6)
    np.testing.assert_array_equal(found.mask, expected["pixel_mask"])


def test_eomt_pads_with_black() -> None:
    samples = photos(*SHAPES)
    size = {"size": {"shortest_edge": 64, "longest_edge": 64}}
    expected = theirs("eomt", "EomtImageProcessorPil", **size, do_pad=True)([s.pixels for s in samples])
    recipe = replace(ours(size, "EomtImageProcessor", canvas=(64, 64)), black=True)
    np.testing.assert_allclose(recipe(samples).inputs, np.stack(expected["pixel_values"]), atol=2e-6)


def test_default_sizes_are_those_of_transformers() -> None:
    sample = photos((300, 451))
    expected = theirs("detr", "DetrImageProcessorPil")([sample[0].pixels], return_tensors="np")["pixel_values"]
    np.testing.assert_allclose(
        ours(None, "DetrImageProcessor", canvas="batch")(sample).inputs, expected, atol=2e-6
    )


def test_fixed_sizes_equal_transformers() -> None:
    samples = photos(*SHAPES)
    size = {"size": {"height": 64, "width": 96}}
    expected = theirs("rt_detr", "RTDetrImageProcessorPil", **size)(
        [s.pixels for s in samples], return_tensors="np"
    )
    found = ours(size, "RTDetrImageProcessor")(samples)
    np.testing.assert_allclose(found.inputs, expected["pixel_values"], atol=2e-6)
    assert found.mask.all()


@pytest.mark.parametrize("shape", SHAPES)
def test_yolos_rounds_down_to_whole_patches(shape: tuple[int, int]) -> None:
    (sample,) = photos(shape)
    expected = theirs("yolos", "YolosImageProcessorPil", **SMALL)([sample.pixels], return_tensors="np")
    read = ours(SMALL, "YolosImageProcessor").recipe
    recipe = SteppedRecipe.over(read, 16, up=False)
    np.testing.assert_allclose(recipe(sample.pixels)[0][None], expected["pixel_values"], atol=2e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_owl_pads_to_a_square_before_it_resizes(shape: tuple[int, int]) -> None:
    (sample,) = photos(shape)
    size = {"size": {"height": 48, "width": 48}}
    expected = theirs("owlv2", "Owlv2ImageProcessorPil", **size)([sample.pixels], return_tensors="np")
    read = ours(size, "Owlv2ImageProcessor").recipe
    recipe = PaddedSquare("owl", exact=(48, 48), resample=2, mean=read.mean, std=read.std)
    values, geometry = recipe(sample.pixels)
    np.testing.assert_allclose(values[None], expected["pixel_values"], atol=2e-5)
    assert geometry.scale_y == geometry.scale_x == 48 / max(shape)


# ------------------------------------------------------------------------------ canvas


def test_fixed_canvas_gives_an_image_the_same_input_whatever_its_batch() -> None:
    samples = photos(*SHAPES)
    recipe = ours(SMALL, "DetrImageProcessor")
    together = recipe(samples)
    assert together.inputs.shape[-2:] == recipe.size() == (128, 128)
    for i, sample in enumerate(samples):
        np.testing.assert_array_equal(recipe([sample]).inputs[0], together.inputs[i])


def test_mask_is_where_the_image_is_and_nothing_lies_outside() -> None:
    for i, sample in enumerate(photos(*SHAPES)):
        found = ours(SMALL, "DetrImageProcessor")([sample])
        rows, columns = (int(found.mask[0].any(axis).sum()) for axis in (1, 0))
        assert found.mask[0, :rows, :columns].all()
        assert not found.mask[0, rows:].any()
        assert not found.inputs[0][:, found.mask[0] == 0].any()
        height, width = SHAPES[i]
        assert found.geometry[0].to_input(height, width) == pytest.approx((rows, columns))
        assert found.geometry[0].visible == pytest.approx((0, 0, height, width))


def test_sides_are_multiples_of_the_divisor() -> None:
    found = ours(SMALL, "DetrImageProcessor", canvas="batch", divisor=32)(photos(*SHAPES))
    assert found.inputs.shape[-2] % 32 == found.inputs.shape[-1] % 32 == 0


def test_one_pixel_is_an_image() -> None:
    found = ours(SMALL, "DetrImageProcessor")([Sample("dot", np.full((1, 1, 3), 200, np.uint8))])
    assert found.inputs.shape == (1, 3, 128, 128)
    assert found.mask.sum() == 64 * 64


def test_old_files_with_one_number_and_max_size() -> None:
    recipe = ours({"size": 64, "max_size": 128, "feature_extractor_type": "DetrFeatureExtractor"}, "x")
    assert (recipe.recipe.edge, recipe.recipe.longest, recipe.size()) == (64, 128, (128, 128))


def test_what_does_not_fit_names_the_sample() -> None:
    with pytest.raises(SampleError, match=r"photo-0.*canvas is \(32, 32\)"):
        ours(SMALL, "DetrImageProcessor", canvas=(32, 32))(photos((60, 90)))
    bad = [*photos((60, 90)), Sample("photo-1", np.zeros((4, 4), np.uint8))]
    with pytest.raises(SampleError, match="photo-1"):
        ours(SMALL, "DetrImageProcessor")(bad)
    no_padding = PaddedRecipe(Recipe("x", edge=64, longest=128), pads=False)
    with pytest.raises(SampleError, match="images of one size"):
        no_padding(photos((60, 90), (90, 60)))


def test_an_unknown_canvas_is_refused() -> None:
    from detr_models import tiny

    with pytest.raises(UsageError, match="canvas 'huge'"):
        tiny("DETR", canvas="huge")
    with pytest.raises(UsageError, match="takes no option 'prompts'"):
        tiny("DETR", prompts=["a cat"])
