"""The package in use, through the command line, against numbers worked out slowly here."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from foveate_example.metric import BorderLift
from foveate_example.model import HEADS, WIDE, seeded
from foveate_example.source import SITE, BlockViTSource
from PIL import Image

import foveate
from foveate import Sample, Target
from foveate.cli import main
from foveate.errors import ModelError, UsageError
from foveate.interfaces import TokenAxis


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    random = np.random.default_rng(0)
    for i, shape in enumerate([(60, 90, 3), (100, 50, 3), (48, 64, 3)]):
        Image.fromarray(random.integers(0, 256, shape, dtype=np.uint8)).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def run(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "run.zarr"
    arguments = ["capture", "example/block-vit", str(photos), "-o", str(path), "--store-dtype", "float32"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    return path


def slow_readout_rows(source: BlockViTSource, inputs: torch.Tensor) -> np.ndarray:
    """Mean over the patch queries of softmax(q k^T / sqrt(d)), (sample, layer, head, key), in float64."""
    model = source.module.double()
    x = model.patchify(inputs.double()).flatten(2).transpose(1, 2) + model.position
    x = torch.cat([model.register.expand(len(x), -1, -1), x], 1)
    layers = []
    for block in model.blocks:
        q, k, _ = block.attention.to_qkv(block.norm_a(x)).chunk(3, -1)
        size = WIDE // HEADS
        heads = []
        for h in range(HEADS):
            part = slice(h * size, (h + 1) * size)
            scores = torch.einsum("sqc,skc->sqk", q[..., part], k[..., part]) / size**0.5
            heads.append(scores.softmax(-1)[:, 1:].mean(1))
        layers.append(torch.stack(heads, 1))
        x = block(x)
    model.float()
    return torch.stack(layers, 1).detach().numpy()


def test_the_run_holds_the_attention_of_the_model(run: Path, photos: Path) -> None:
    import xarray as xr

    stored = xr.open_datatree(run, engine="zarr")[f"sites/{SITE}"]["attention"].squeeze("query").values
    source = foveate.open("example/block-vit")
    samples = [Sample(p.name, np.asarray(Image.open(p))) for p in sorted(photos.iterdir())]
    wanted = slow_readout_rows(source, source.encode(samples).inputs)
    assert stored.shape == wanted.shape == (3, 2, 4, 49)
    np.testing.assert_allclose(stored, wanted, atol=2e-6)
    entropy = -(wanted * np.log(wanted)).sum(-1) / np.log(49)
    assert np.median(entropy) < 0.98, "attention that is uniform would prove nothing"


def test_border_lift_is_what_it_says() -> None:
    axis = TokenAxis.concat(TokenAxis.of_kind("register", 1), TokenAxis.patches(3, 4, height=24, width=32))
    row = np.random.default_rng(1).random(13)
    border = sum(row[1 + 4 * y + x] for y in range(3) for x in range(4) if y in (0, 2) or x in (0, 3))
    expected = border / row[1:].sum() / (10 / 12)
    assert float(BorderLift().kernel(row, key=axis)) == pytest.approx(expected)
    assert float(BorderLift().kernel(np.ones(13), key=axis)) == pytest.approx(1.0)


def test_the_text_picture_prints_scale_rule_and_grid(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "row.txt"
    result = CliRunner().invoke(main, ["plot", str(run), "--kind", "text", "-o", str(out)])
    assert result.exit_code == 0, result.output
    head, scale, *rows, _ = out.read_text().split("\n")
    assert "layer 1" in head
    assert "K = 49" in head
    assert "times uniform" in scale
    assert [len(row) for row in rows] == [16] * 6


def test_inspect_says_where_the_answer_is_read(run: Path) -> None:
    result = CliRunner().invoke(main, ["inspect", "example/block-vit", "--json"])
    (site,) = json.loads(result.stdout)["sites"]
    assert site["readout"] == "patch mean"
    assert site["key"] == {"register": 1, "patch": 48}


def test_a_dark_photo_is_padded_with_grey_and_mapped_back() -> None:
    source = foveate.open("example/block-vit")
    batch = source.encode([Sample("tall", np.zeros((96, 32, 3), np.uint8))])
    assert batch.geometry[0].visible == (0, 0, 96, 32)
    assert batch.inputs[0, 0, :, 0].tolist() == [0.0] * 48, "padding is grey"
    assert batch.inputs[0, 0, 24, 32] == -1


def test_mistakes_are_told(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="takes no option 'sead'"):
        foveate.open("example/block-vit", weights="random", sead=3)
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(b"nonsense")
    with pytest.raises(ModelError, match="not weights of BlockViT"):
        foveate.open("example/block-vit", weights=bad)
    source = foveate.open("example/block-vit")
    batch = source.encode([Sample("a", np.zeros((8, 8, 3), np.uint8))])
    with pytest.raises(UsageError, match="no class 'cat'"):
        source.bind(source.forward(batch), batch, Target(label="cat"))


def test_the_shipped_weights_follow_from_the_seed() -> None:
    shipped = foveate.open("example/block-vit").module.state_dict()
    for name, value in seeded().half().state_dict().items():
        assert torch.equal(shipped[name].half(), value), name
