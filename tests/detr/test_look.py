"""One picture, one command: detectors of every kind can be looked at."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from detr_models import CASES, photos, tiny
from foveate.geometry import Geometry
from foveate.interfaces import TokenAxis
from foveate.render.panel import Panel
from foveate.study.look import look


@pytest.mark.parametrize("name", CASES)
def test_every_detector_can_be_looked_at(name: str, tmp_path: Path) -> None:
    (sample,) = photos((64, 90))
    Image.fromarray(sample.pixels).save(tmp_path / "photo.png")
    found = look(tiny(name, threshold=0.0), tmp_path / "photo.png", check=False)
    assert found is not None


def test_no_object_above_the_threshold_is_a_caveat(tmp_path: Path) -> None:
    Image.fromarray(np.full((96, 96, 3), 128, np.uint8)).save(tmp_path / "flat.png")
    found = look("foveate/shapes-cdetr", tmp_path / "flat.png")
    assert any("no object is above the threshold" in caveat for caveat in found.caveats)


def test_a_pyramids_row_keeps_its_mass_and_uniform_is_one() -> None:
    tokens = TokenAxis.concat(
        TokenAxis.patches(8, 12, height=64, width=96, level=0),
        TokenAxis.patches(2, 3, height=64, width=96, level=1),
    )
    image, geometry = np.zeros((64, 96, 3), np.uint8), Geometry.identity(64, 96)
    row = np.random.default_rng(0).dirichlet(np.ones(len(tokens)))
    panel = Panel.attention(image, geometry, row, tokens)
    assert panel.values.shape == (8, 12)
    assert panel.values.sum() == pytest.approx(1.0)
    # each coarse token covers 4 x 4 cells and gives each of them a sixteenth
    expected = row[:96].reshape(8, 12) + np.kron(row[96:].reshape(2, 3), np.ones((4, 4))) / 16
    np.testing.assert_allclose(panel.values, expected, atol=1e-12)
    even = Panel.attention(image, geometry, np.full(len(tokens), 1 / len(tokens)), tokens)
    np.testing.assert_allclose(even.values / even.uniform, 1.0)
