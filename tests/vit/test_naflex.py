"""SigLIP 2 NaFlex on a fixed grid: patches, square photos and other grids against the library's own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import Siglip2ImageProcessorPil

from foveate.errors import ModelError
from foveate.interfaces import Sample
from foveate_vit.naflex import NOTE, to_patches
from vit_models import open_tiny


@pytest.mark.parametrize("side", [28, 40, 97])
def test_a_square_photo_is_treated_exactly_as_by_naflex(side: int) -> None:
    source = open_tiny("Siglip2Model")
    pixels = np.random.default_rng(side).integers(0, 256, (side, side, 3), dtype=np.uint8)
    theirs = Siglip2ImageProcessorPil(patch_size=7, max_num_patches=16)(pixels, return_tensors="pt")
    assert theirs["spatial_shapes"].tolist() == [[4, 4]]
    batch = source.encode([Sample("square", pixels)])
    torch.testing.assert_close(to_patches(batch.inputs, (7, 7)), theirs["pixel_values"], atol=2e-6, rtol=0)
    expected = source.module.get_image_features(**theirs).pooler_output
    torch.testing.assert_close(source.forward(batch).pooler_output, expected, atol=2e-4, rtol=1e-4)


def test_another_grid_is_the_librarys_own_at_that_grid() -> None:
    source = open_tiny("Siglip2Model", image_size=(14, 49))
    pixels = np.random.default_rng(0).integers(0, 256, (14, 49, 3), dtype=np.uint8)
    batch = source.encode([Sample("wide", pixels)])
    assert source.cells(batch).shape == (2, 7)
    patches = to_patches(batch.inputs, (7, 7))
    padded = torch.cat([patches, torch.zeros(1, 2, patches.shape[-1])], dim=1)  # NaFlex's own padding to 16
    mask = torch.tensor([[1] * 14 + [0] * 2])
    theirs = source.module.get_image_features(
        pixel_values=padded, pixel_attention_mask=mask, spatial_shapes=torch.tensor([[2, 7]])
    )
    torch.testing.assert_close(source.forward(batch).pooler_output, theirs.pooler_output, atol=2e-4, rtol=1e-4)


def test_stretching_is_in_the_geometry_and_on_the_card() -> None:
    source = open_tiny("Siglip2Model")
    geometry = source.encode([Sample("tall", np.zeros((56, 14, 3), np.uint8))]).geometry[0]
    assert (geometry.scale_y, geometry.scale_x) == (0.5, 2.0)
    assert NOTE in source.card.notes


def test_a_size_that_is_not_whole_patches_is_refused() -> None:
    with pytest.raises(ModelError, match="whole number"):
        open_tiny("Siglip2Model", image_size=30)
