"""A transformers-style model that foveate has never heard of needs a registry row and no code."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from foveate.capture.engine import capture_batch
from foveate.errors import ModelError
from foveate.interfaces import CapturePlan, SitePlan, Target
from foveate.plugins.opening import open_source
from foveate.plugins.registry import registry
from foveate_vit.vision import ENCODER
from vit_models import SHAPE, photos, sharpen

ROW = """
schema = 1
[[family]]
id = "{family}"
source = "vit"
model_types = ["{kind}"]
  [family.layout]
  prefix = {prefix}
  readout = "{readout}"
  feature = "cls"
  architectures = {{ {kind} = "{architecture}" }}
  [[family.site]]
  id = "vision.encoder.self"
  module = "{module}"
  kind = "self"
  query = "vision.tokens"
  key = "vision.tokens"
"""
MSN: dict[str, Any] = {
    "family": "msn",
    "kind": "vit_msn",
    "architecture": "ViTMSNModel",
    "prefix": '["cls"]',
    "readout": "cls",
    "module": "layers.{layer}.attention",
}
IJEPA = MSN | {
    "family": "jepa",
    "kind": "ijepa",
    "architecture": "IJepaModel",
    "prefix": "[]",
    "readout": "token mean",
}


@pytest.fixture
def user_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    def write(row: dict[str, Any]) -> Any:
        (tmp_path / "registry.toml").write_text(ROW.format(**row))
        monkeypatch.setenv("FOVEATE_REGISTRY", str(tmp_path / "registry.toml"))
        registry.cache_clear()
        assert not registry().problems
        source = open_source(row["family"], weights="random", config=SHAPE)
        sharpen(source.module)
        return source

    yield write
    registry.cache_clear()


@pytest.mark.parametrize("row", [MSN, IJEPA], ids=lambda row: row["kind"])
def test_a_row_opens_captures_and_explains(row: dict[str, Any], user_row: Any) -> None:
    source = user_row(row)
    assert type(source.module).__name__ == row["architecture"]
    batch = source.encode(photos(2))
    plan = CapturePlan((SitePlan(ENCODER, rows="all"),), dtype="float32")
    mine = capture_batch(source, batch, plan).sites[ENCODER].arrays["attention"]
    source.module.set_attn_implementation("eager")
    with torch.no_grad():
        theirs = source.module(batch.inputs, output_attentions=True).attentions
    assert mine.shape[1] == len(theirs) == 3
    for layer, expected in enumerate(theirs):
        np.testing.assert_allclose(mine[:, layer], expected.numpy(), atol=5e-6)
    batch.inputs.requires_grad_(True)
    outputs = source.forward(batch, grad=True)
    scores = source.score(outputs, batch, source.bind(outputs, batch, Target()))
    (gradient,) = torch.autograd.grad(scores.sum(), batch.inputs)
    assert (gradient.abs().sum((1, 2, 3)) > 0).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"module": "blocks.{layer}.attn"}, r"no module matches blocks\.\{layer\}\.attn"),
        ({"architecture": "ViTMSNThing"}, "no architecture 'ViTMSNThing'"),
    ],
)
def test_a_wrong_row_is_named(change: dict[str, Any], message: str, user_row: Any) -> None:
    with pytest.raises(ModelError, match=message):
        user_row(MSN | change)


def test_a_readout_that_the_tokens_do_not_have_is_refused(user_row: Any) -> None:
    source = user_row(IJEPA | {"readout": "cls"})
    with pytest.raises(ModelError, match="readout 'cls' does not fit"):
        source.fixed_readout(source.encode(photos(1)))
