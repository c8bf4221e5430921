"""A look says what the model's own matrices say, whatever the picture's size."""

from __future__ import annotations

import copy
import json
import time

import numpy as np
import pytest
import torch
from PIL import Image

import foveate
from foveate.errors import CaptureError, SampleError, UsageError
from foveate.interfaces import ModelCard
from foveate.study import quick_check as checking
from foveate.study.look import look
from foveate.testing.tiny import TinyConfig, TinyCropSource, TinySource, tiny_samples

CONFIG = TinyConfig(layers=3)


def matrices(source: TinySource, inputs: torch.Tensor) -> list[np.ndarray]:
    """Attention ``(head, query, key)`` of every layer in float64, step by step from the weights."""
    module = copy.deepcopy(source.module).double()
    x = module.embed(inputs.double()).flatten(2).transpose(1, 2)
    x = torch.cat([module.cls, x], 1) + module.position
    found = []
    for block in module.blocks:
        h = block.norm1(x)[0]
        q, k, v = (part.reshape(len(h), CONFIG.heads, -1) for part in block.attention.qkv(h).chunk(3, dim=-1))
        logits = torch.einsum("qhd,khd->hqk", q, k) / q.shape[-1] ** 0.5
        weights = logits.exp() / logits.exp().sum(-1, keepdim=True)
        found.append(weights.detach().numpy())
        mixed = torch.einsum("hqk,khd->qhd", weights, v).reshape(1, len(h), -1)
        x = x + block.attention.proj(mixed)
        x = x + block.mlp(block.norm2(x))
    return found


@pytest.fixture
def pixels() -> np.ndarray:
    return tiny_samples(1, height=40, width=60, seed=2)[0].pixels


@pytest.mark.parametrize("kind", [TinySource, TinyCropSource])
def test_maps_equal_the_matrices_of_a_hand_written_forward(kind: type[TinySource], pixels: np.ndarray) -> None:
    source = kind(CONFIG)
    inputs = torch.from_numpy(source.prepare(pixels)[0])[None]
    layers = matrices(source, inputs)
    assert np.median([np.exp(-(a * np.log(a)).sum(-1)).max() for a in layers]) < 0.9 * 17  # peaked, not uniform
    seen = look(source, pixels, check=False)
    np.testing.assert_allclose(seen.maps["attention"].values.ravel(), layers[-1].mean(0)[0, 1:], atol=1e-5)
    product = np.eye(17)
    for a in layers:
        product = (a.mean(0) + np.eye(17)) / 2 @ product
    np.testing.assert_allclose(seen.maps["rollout"].values.ravel(), product[0, 1:], atol=1e-5)
    one = look(source, pixels, layer=1, head=2, check=False)
    np.testing.assert_allclose(one.maps["attention"].values.ravel(), layers[1][2, 0, 1:], atol=1e-5)
    assert "layer 1 of 0–2" in str(one.rule)
    assert "head 2 of 3" in str(one.rule)
    assert seen.rule.keys == 17


def test_the_answer_is_the_models_own(pixels: np.ndarray) -> None:
    source = TinySource(CONFIG)
    seen = look(source, pixels, check=False)
    with torch.no_grad():
        scores = source.module(torch.from_numpy(source.prepare(pixels)[0])[None]).softmax(-1)[0]
    assert seen.predictions[0].class_index == int(scores.argmax())
    assert seen.score == pytest.approx(float(scores.max()), abs=1e-6)
    other = look(source, pixels, target="blue", check=False)
    assert other.target == "blue"
    assert other.score == pytest.approx(float(scores[2]), abs=1e-6)


def test_the_quick_check_deletes_in_the_order_of_the_map(pixels: np.ndarray) -> None:
    source = TinySource(CONFIG)
    seen = look(source, pixels)
    values = seen.maps["attention"].values
    inputs = torch.from_numpy(source.prepare(pixels)[0])[None]
    order = np.argsort(-values.ravel())
    counts = [0, 3, 6, 10, 13, 16]
    scores = []
    for count in counts:
        changed = inputs.clone()
        for cell in order[:count]:
            y, x = divmod(int(cell), 4)
            patch = changed[0, :, y * 8 : y * 8 + 8, x * 8 : x * 8 + 8]
            patch[:] = inputs[0].mean((1, 2))[:, None, None]
        with torch.no_grad():
            scores.append(float(source.module(changed).softmax(-1)[0, seen.predictions[0].class_index]))
    area = sum(
        (b - a) / 16 * (s + t) / 2 for a, b, s, t in zip(counts, counts[1:], scores, scores[1:], strict=False)
    )
    assert seen.check.row == pytest.approx(area, abs=1e-5)
    assert seen.check.low <= seen.check.random <= seen.check.high
    assert seen.check.orders == checking.ORDERS
    assert look(source, pixels).check == seen.check  # seeded


def test_a_slow_model_is_not_checked_and_says_so(pixels: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checking, "BUDGET", 0.0)
    began = time.perf_counter()
    seen = look(TinySource(CONFIG), pixels)
    assert time.perf_counter() - began < 20
    assert "forward passes would take about" in seen.check.skipped
    assert any(seen.check.skipped in caveat for caveat in seen.caveats)
    assert "switched off" in " ".join(look(TinySource(CONFIG), pixels, check=False).caveats)


def test_what_was_found_comes_out_in_every_form(pixels: np.ndarray, tmp_path) -> None:
    Image.fromarray(pixels).save(tmp_path / "photo é.png")
    seen = foveate.look(TinyCropSource(CONFIG), tmp_path / "photo é.png")
    for suffix in (".png", ".svg", ".pdf"):
        assert seen.save(tmp_path / f"out{suffix}").stat().st_size > 1000
    page = seen._repr_html_()
    assert page.startswith("<img")
    assert "<li>" in page
    text = str(seen)
    assert seen.predictions[0].label in text
    assert all(caveat in text and caveat in seen.picture.caption for caveat in seen.caveats)
    plain = json.loads(json.dumps(seen.summary()))
    y, x = plain["maps"]["attention"]["peak"]
    assert 0 < y < 40
    assert 10 < x < 50  # inside the crop
    assert any("33% of the picture" in caveat for caveat in seen.caveats)


def test_bad_requests_are_refused_with_what_exists(pixels: np.ndarray, tmp_path) -> None:
    source = TinySource(CONFIG)
    with pytest.raises(UsageError, match=r"no layer 9.*\n.*0, 1, 2"):
        look(source, pixels, layer=9)
    with pytest.raises(UsageError, match=r"no head 3.*\n.*0 to 2"):
        look(source, pixels, head=3)
    with pytest.raises(UsageError, match="rainbow"):
        look(source, pixels, scale="rainbow")
    with pytest.raises(UsageError, match="purple"):
        look(source, pixels, target="purple")
    with pytest.raises(UsageError, match=r"foveate\.open"):
        look(source, pixels, prompts=["a"])
    with pytest.raises(SampleError, match="float64"):
        look(source, pixels / 255)
    with pytest.raises(SampleError, match="no such file"):
        look(source, tmp_path / "absent.png")


def test_broken_attention_is_an_error_not_a_picture(pixels: np.ndarray) -> None:
    source = TinySource(CONFIG)
    with torch.no_grad():
        source.module.blocks[1].attention.qkv.weight.fill_(float("nan"))
    with pytest.raises(CaptureError):
        look(source, pixels)


def test_random_weights_are_called_what_they_are(pixels: np.ndarray) -> None:
    source = TinySource(CONFIG)
    source.card = ModelCard("m", "tiny", "TinySource", weights_sha256="random:0")
    assert "random" in look(source, pixels, check=False).caveats[0]
