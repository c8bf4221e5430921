"""The exporter: what it records against what the modules computed, and that it leaves no trace in the model."""

from __future__ import annotations

import ast
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import recording_fakes as fakes
from foveate_dvis.exporter.__main__ import EXPORTER, main

PICTURE = np.zeros((1, 8, 8, 3), np.uint8)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def export(tmp_path):
    return fakes.exporter(tmp_path)


def opened(path):
    arrays = np.load(path, allow_pickle=False)
    return arrays, json.loads(bytes(arrays["meta"]))


class Holder(nn.Module):
    """A model with one attention module that is called with whatever the test gives."""

    def __init__(self, attn):
        super().__init__()
        self.attn = fakes.sharpened(attn)

    def forward(self, *args, **kwargs):
        return self.attn(*args, **kwargs)


def oracle(module, query, key, mask=None, padding=None):
    """softmax(q k' / sqrt(d)) in float64, one head and one pair of tokens at a time; (batch, head, query, key)."""
    matrix, bias = module.in_proj_weight.double(), module.in_proj_bias.double()
    width, heads = module.embed_dim, module.num_heads
    size = width // heads
    found = torch.zeros(query.shape[1], heads, len(query), len(key), dtype=torch.float64)
    for b in range(query.shape[1]):
        for h in range(heads):
            part = slice(h * size, (h + 1) * size)
            for i in range(len(query)):
                q = matrix[:width][part] @ query[i, b].double() + bias[:width][part]
                scores = []
                for j in range(len(key)):
                    k = matrix[width : 2 * width][part] @ key[j, b].double() + bias[width : 2 * width][part]
                    hidden = (mask is not None and mask[b * heads + h, i, j]) or (
                        padding is not None and padding[b, j]
                    )
                    scores.append(float("-inf") if hidden else float((q @ k).detach()) / size**0.5)
                found[b, h, i] = torch.tensor(scores, dtype=torch.float64).softmax(0)
    return found.detach().numpy()


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_multihead_attention(export, tmp_path, batch_first, masked):
    model = Holder(nn.MultiheadAttention(fakes.WIDTH, fakes.HEADS, batch_first=batch_first))
    query, key = torch.randn(4, 3, fakes.WIDTH), torch.randn(6, 3, fakes.WIDTH)
    mask = padding = None
    if masked:
        mask = torch.rand(3 * fakes.HEADS, 4, 6) < 0.3
        mask[..., 0] = False
        padding = torch.zeros(3, 6, dtype=torch.bool)
        padding[1, 4:] = True
    given = [t.transpose(0, 1) if batch_first else t for t in (query, key, key)]
    with torch.no_grad():
        plain = model(*given, attn_mask=mask, key_padding_mask=padding)
        with export.record(model, tmp_path / "x.npz", frames=PICTURE):
            recorded = model(*given, attn_mask=mask, key_padding_mask=padding)
    assert torch.equal(plain[0], recorded[0])
    arrays, meta = opened(tmp_path / "x.npz")
    expected = oracle(model.attn, query, key, mask, padding)
    assert expected.max() > 0.9, "attention must be peaked for this test to mean anything"
    assert np.abs(arrays["attention/attn::0::weights"] - expected).max() < 2e-6
    assert meta["calls"][0]["error"] < 2e-6
    assert meta["silent"] == []
    assert ("attention/attn::0::blocked" in arrays) == masked
    if masked:
        assert not (arrays["attention/attn::0::weights"][arrays["attention/attn::0::blocked"]]).any()


@pytest.mark.parametrize("padded", [False, True])
def test_deformable_attention(export, tmp_path, padded):
    model = Holder(fakes.Deformable())
    shapes = torch.tensor([[2, 3], [4, 5]])
    start = torch.tensor([0, 6])
    padding = torch.zeros(2, 26, dtype=torch.bool)
    padding[1, 20:] = padded
    given = (
        torch.randn(2, 3, fakes.WIDTH),
        torch.rand(2, 3, 2, 2),
        torch.randn(2, 26, fakes.WIDTH),
        shapes,
        start,
    )
    with torch.no_grad(), export.record(model, tmp_path / "x.npz", frames=PICTURE):
        model(*given, padding if padded else None)
    arrays, meta = opened(tmp_path / "x.npz")
    assert np.abs(arrays["attention/attn::0::weights"] - model.attn.seen.numpy()).max() < 1e-6
    assert np.abs(arrays["attention/attn::0::locations"] - model.attn.where.numpy()).max() < 1e-6
    # The model sums corner by corner, the exporter through grid_sample: the proof holds between the two.
    assert meta["calls"][0]["error"] < 1e-5
    assert ("attention/attn::0::hidden" in arrays) == padded


def test_the_proof_can_fail(export, tmp_path):
    """A module that does something else with its weights is recorded with the error that says so."""
    model = Holder(fakes.Slots())
    honest = model.attn.forward
    model.attn.forward = lambda *args: honest(*args) * 1.5  # an instance's own forward, as some wrappers leave it
    given = torch.randn(1, 5, fakes.WIDTH), torch.randn(1, 5, fakes.WIDTH), torch.randn(1, 3, fakes.WIDTH)
    with torch.no_grad(), export.record(model, tmp_path / "x.npz", frames=PICTURE):
        model(*given)
    assert opened(tmp_path / "x.npz")[1]["calls"][0]["error"] == pytest.approx(1 / 3, rel=1e-4)
    assert "forward" in vars(model.attn), "the wrapper that was there must still be there"
    assert torch.allclose(model(*given), honest(*given) * 1.5)


def test_slot_attention(export, tmp_path):
    model = Holder(fakes.Slots())
    given = torch.randn(1, 5, fakes.WIDTH), torch.randn(1, 5, fakes.WIDTH), torch.randn(1, 3, fakes.WIDTH)
    with torch.no_grad(), export.record(model, tmp_path / "x.npz", frames=PICTURE):
        model(*given)
    arrays, meta = opened(tmp_path / "x.npz")
    found = arrays["attention/attn::0::weights"]
    assert np.abs(found - model.attn.seen.numpy()).max() < 1e-6
    assert np.allclose(found.sum(1), 1, atol=1e-6)
    assert meta["calls"][0]["error"] < 1e-6


def test_a_softmax_of_its_own(export, tmp_path):
    model = Holder(fakes.Attention())
    with torch.no_grad(), export.record(model, tmp_path / "x.npz", frames=PICTURE):
        model(torch.randn(2, 5, fakes.WIDTH))
    found = opened(tmp_path / "x.npz")[0]["attention/attn::0::weights"]
    assert np.array_equal(found, model.attn.seen.numpy().reshape(2, fakes.HEADS, 5, 5))


def test_half_precision_is_noted(export, tmp_path):
    model = Holder(nn.MultiheadAttention(fakes.WIDTH, fakes.HEADS)).bfloat16()
    x = torch.randn(5, 1, fakes.WIDTH).bfloat16()
    with torch.no_grad(), export.record(model, tmp_path / "x.npz", frames=PICTURE):
        model(x, x, x)
    (call,) = opened(tmp_path / "x.npz")[1]["calls"]
    assert call["dtype"] == "bfloat16"
    assert 1e-4 < call["error"] < 4e-2


@pytest.mark.parametrize("causal", [False, True])
def test_fused_attention(export, tmp_path, causal):
    class Fused(nn.Module):
        def forward(self, q, k, v):
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal)

    model, (q, k, v) = Holder(Fused()), (torch.randn(2, 3, 4, 8) * 3 for _ in range(3))
    with torch.no_grad(), export.record(model, tmp_path / "x.npz", frames=PICTURE):
        model(q, k, v)
    scores = (q.double() @ k.double().transpose(-1, -2)) * 8**-0.5
    if causal:
        scores = scores.masked_fill(torch.ones(4, 4, dtype=torch.bool).triu(1), -torch.inf)
    arrays, meta = opened(tmp_path / "x.npz")
    assert np.abs(arrays["attention/attn::0::weights"] - scores.softmax(-1).numpy()).max() < 2e-6
    assert meta["calls"][0]["error"] < 2e-6


def test_class_probabilities_are_no_attention(export, tmp_path):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = fakes.sharpened(fakes.Attention())

        def forward(self, x):
            return F.softmax(self.attn(x), -1)

    model = Two()
    with torch.no_grad(), export.record(model, tmp_path / "x.npz", frames=PICTURE):
        model(torch.randn(1, 5, fakes.WIDTH))
    meta = opened(tmp_path / "x.npz")[1]
    assert [call["path"] for call in meta["calls"]] == ["attn"]
    assert "" in meta["skipped"]


def state_of(model):
    names = ("forward", "inference", "run_window_inference", "common_inference")
    return {path: {n: vars(m)[n] for n in names if n in vars(m)} for path, m in model.named_modules()}


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_left_behind(export, tmp_path, fails):
    model = fakes.sharpened(fakes.Model())
    before, out = state_of(model), tmp_path / "x.npz"
    functions = F.softmax, torch.softmax, F.scaled_dot_product_attention
    frames = list(fakes.clip())
    if fails:
        frames[3] = frames[3][:, :8]  # stack refuses it in the model, in the middle of its forward
    try:
        with torch.no_grad(), export.record(model, out):
            model([{"image": frames}])
    except RuntimeError:
        assert fails
    assert state_of(model) == before
    assert (F.softmax, torch.softmax, F.scaled_dot_product_attention) == functions
    assert "softmax" not in vars(torch.Tensor)
    assert out.exists() != fails
    assert not list(tmp_path.glob("*.part"))


def test_answers_are_the_same_to_the_bit(export, tmp_path):
    clip = [{"image": list(fakes.clip())}]
    with torch.no_grad():
        plain = fakes.sharpened(fakes.Model())(clip)
        model = fakes.sharpened(fakes.Model())
        with export.record(model, tmp_path / "x.npz"):
            recorded = model(clip)
    assert all(torch.equal(plain[name], recorded[name]) for name in plain)


def test_tracks_rows_births_and_deaths(export, tmp_path):
    model = fakes.sharpened(fakes.Model())
    with torch.no_grad(), export.record(model, tmp_path / "x.npz"):
        model([{"image": list(fakes.clip(9)), "height": 64, "width": 128}])
    arrays, meta = opened(tmp_path / "x.npz")
    told, daq = model.tracker.told, meta["daq"]
    born = [seq for frame in told for _, seq in frame["births"]]
    assert sum(len(frame["deaths"]) for frame in told) > 1, "the plan must be worth testing"
    assert len(born) > 5
    number = {seq: i for i, seq in enumerate(born)}
    for frame, expected in zip(daq["frames"], told, strict=True):
        assert frame["ids"] == [number[i] for i in expected["carried"]]
        assert frame["births"] == [[row, number[i]] for row, i in expected["births"]]
        assert frame["deaths"] == [number[i] for i in expected["deaths"]]
        assert frame["rows"] == len(expected["carried"]) + fakes.QUERIES
    for track, seq in zip(daq["tracks"], born, strict=True):
        own = model.tracker.video_ins_hub[seq]
        assert (track["start"], track["appearance"], track["dead"]) == (own.sT, own.appearance, own.dead)
    assert meta["geometry"] == {"original": [64, 128], "image": [fakes.HEIGHT, fakes.COLUMNS]}
    assert meta["labels"] == ["cod", "wrasse", "eel"]
    assert np.array_equal(arrays["frames"], fakes.clip(9).permute(0, 2, 3, 1).numpy())


def test_bgr_models_give_rgb_pictures(export, tmp_path):
    model = fakes.sharpened(fakes.Model())
    with torch.no_grad(), export.record(model, tmp_path / "x.npz", channels="BGR"):
        model([{"image": list(fakes.clip())}])
    assert np.array_equal(
        opened(tmp_path / "x.npz")[0]["frames"][..., ::-1], fakes.clip().permute(0, 2, 3, 1).numpy()
    )


def test_called_below_forward(export, tmp_path):
    """``run_window_inference`` alone: pictures come back from the normalised input."""
    model = fakes.sharpened(fakes.Model())
    with torch.no_grad(), export.record(model, tmp_path / "x.npz"):
        model.run_window_inference((fakes.clip().float() - model.pixel_mean) / model.pixel_std)
    assert np.array_equal(opened(tmp_path / "x.npz")[0]["frames"], fakes.clip().permute(0, 2, 3, 1).numpy())


def test_only_the_chosen_modules(export, tmp_path):
    model = fakes.sharpened(fakes.Model())
    with torch.no_grad(), export.record(model, tmp_path / "x.npz", sites=["tracker.*"], dtype="float16"):
        model([{"image": list(fakes.clip())}])
    arrays, meta = opened(tmp_path / "x.npz")
    assert all(call["path"].startswith("tracker.") for call in meta["calls"])
    assert {arrays[n].dtype for n in arrays.files if n.endswith("::weights")} == {np.dtype("float16")}


def test_without_attention_it_says_so(export, tmp_path):
    model = nn.Linear(2, 2)
    with pytest.raises(RuntimeError, match="no attention was seen"), export.record(model, tmp_path / "x.npz"):
        model(torch.zeros(1, 2))
    assert list(tmp_path.glob("x*")) == []


def test_python_3_8_reads_it_and_it_needs_torch_and_numpy_alone():
    tree = ast.parse(EXPORTER.read_text(encoding="utf-8"), feature_version=(3, 8))
    found = {
        alias.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names
    }
    found |= {str(node.module).split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert found - set(sys.stdlib_module_names) == {"numpy", "torch"}


def test_the_command_that_writes_it(tmp_path, capsys):
    main(["-o", str(tmp_path)])
    text = EXPORTER.read_text(encoding="utf-8")
    assert (tmp_path / "foveate_export.py").read_text(encoding="utf-8") == text
    main([])
    assert capsys.readouterr().out == text


@pytest.mark.slow
def test_the_module_runs_as_a_command(tmp_path):
    subprocess.run([sys.executable, "-m", "foveate_dvis.exporter", "-o", str(tmp_path / "e.py")], check=True)
    assert (tmp_path / "e.py").exists()
