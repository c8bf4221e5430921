"""A fixed choice of the zoo in every test run, and proof that its examination can fail.

``make zoo`` examines all of it and writes docs/zoo.md.
"""

import dataclasses
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")

from foveate.capture.deformable import DeformableRecord
from foveate.capture.dense import DenseRecord
from foveate.capture.tap import Tap
from foveate.testing.oracles import attention_weights, deformable_matrix
from zoo import kernels
from zoo.aliases import fingerprint
from zoo.catalogue.all import ZOO
from zoo.examine import examine
from zoo.weights import peakedness, revive

CHOSEN = (
    "CLIP text",  # causal and padded
    "SigLIP vision",  # nn.MultiheadAttention as a pooling head
    "BEiT",  # relative position bias
    "DINOv3",  # registers, rotary positions
    "Swin",  # shifted windows through SDPA
    "Swin v2",  # cosine attention, softmax in Python
    "CvT",  # einsum
    "SegFormer",  # strided keys
    "TimeSformer",  # divided space and time
    "DETR",  # encoder, decoder, padding
    "RT-DETR v2, discrete",  # whole cells by index
    "Grounding DINO",  # deformable, text, fusion in both directions
    "Mask2Former",  # masked cross-attention
    "BLIP-2 Q-Former",  # queries that read a picture
    "Qwen2.5-VL vision",  # pictures packed in one sequence
)
SPECIES = {species.name: species for species in ZOO}


@pytest.mark.parametrize("name", CHOSEN)
def test_chosen_architectures_pass(name):
    report = examine(SPECIES[name])
    assert report.failures == []
    assert report.recomputed == report.calls > 0
    assert report.kernels == report.calls + sum(report.ignored.values())
    assert report.caught == report.tried
    assert report.tried["swapped heads"]
    assert report.tried["shifted layer"]


def test_the_zoo_is_large_and_its_names_differ():
    assert len(SPECIES) == len(ZOO) >= 150


def test_the_table_has_a_row_for_every_architecture():
    table = (Path(__file__).parents[2] / "docs" / "zoo.md").read_text(encoding="utf-8")
    assert [name for name in SPECIES if f"| {name} |" not in table and f"| **{name}: FAILS** |" not in table] == []


# --------------------------------------------------------------------- the examination can fail


def unmasked(self, scores, positions):
    return scores


def test_a_lost_mask_is_found(monkeypatch):
    monkeypatch.setattr(DenseRecord, "_masked", unmasked)
    failures = examine(SPECIES["DETR"]).failures
    assert any("weights off" in line for line in failures)
    assert any("certificate" in line for line in failures)
    assert any("closest record off" in line for line in failures)


def test_transposed_weights_are_found(monkeypatch):
    rows = DenseRecord.rows
    monkeypatch.setattr(DenseRecord, "rows", lambda self, index: rows(self, slice(None)).transpose(-1, -2))
    assert any("weights off" in line for line in examine(SPECIES["ViT"]).failures)


def test_a_call_that_the_tap_overlooks_is_found(monkeypatch):
    monkeypatch.setattr(Tap, "_attention", lambda self, func, args, kwargs: func(*args, **kwargs))
    failures = examine(SPECIES["ViT"]).failures
    assert "no attention was recorded" in failures
    assert any(line.startswith("unclaimed: 1 x") for line in failures)


def test_changed_outputs_are_found(monkeypatch):
    watched = Tap._attention

    def slightly(self, func, args, kwargs):
        return watched(self, func, args, kwargs) * (1 + 1e-6)

    monkeypatch.setattr(Tap, "_attention", slightly)
    assert "outputs differ with and without capture" in examine(SPECIES["ViT"]).failures


def test_a_model_left_changed_is_found(monkeypatch):
    leave = Tap.__exit__

    def untidy(self, kind, error, trace):
        leave(self, kind, error, trace)
        if kind is not None:
            self.owners.root.train()

    monkeypatch.setattr(Tap, "__exit__", untidy)
    assert "the model changed after an exception in mid-forward" in examine(SPECIES["ViT"]).failures


def test_shifted_sampling_is_found(monkeypatch):
    build = DeformableRecord.__init__

    def shifted(self, name, weights, levels, out=None):
        moved = [dataclasses.replace(level, grid=level.grid + 0.1) for level in levels]
        build(self, name, weights, moved, out)

    monkeypatch.setattr(DeformableRecord, "__init__", shifted)
    failures = examine(SPECIES["Deformable DETR"]).failures
    assert any("weights off" in line for line in failures)


def test_random_initialisation_would_prove_nothing():
    model, inputs = SPECIES["ViT"].build()
    with torch.no_grad(), Tap(model) as tap:
        model(**inputs)
    assert all(peakedness(record) > 0.999 for record in tap.records)
    revive(model)
    assert all((value != 0).any() for value in model.parameters())


# ------------------------------------------------------------------------------ the references


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_fused_scores_are_those_of_the_definition(causal, masked):
    draw = torch.Generator().manual_seed(5)
    q, k = torch.randn(2, 4, 5, 8, generator=draw), torch.randn(2, 2, 7, 8, generator=draw)
    mask = torch.randn(2, 1, 5, 7, generator=draw) if masked else None
    weights = kernels.softmax(kernels.fused(q, k, k, is_causal=causal, attn_mask=mask, scale=0.3), -1)
    truth = attention_weights(q, k.repeat_interleave(2, 1), mask=mask, scale=0.3, causal=causal)
    assert (weights - truth).abs().max() < 1e-12


def test_a_row_without_keys_is_zero():
    scores = torch.tensor([[1.0, 2.0], [-torch.inf, -torch.inf]], dtype=torch.float64)
    weights = kernels.softmax(scores, -1)
    assert weights[1].tolist() == [0.0, 0.0]
    assert weights[0].sum() == pytest.approx(1)


def test_one_hot_sampling_equals_the_loop_over_corners():
    draw = torch.Generator().manual_seed(6)
    sizes = [(3, 4), (2, 2)]
    points = torch.rand(5, 2, 2, 3, 2, generator=draw) * 1.4 - 0.2  # some outside
    weights = torch.randn(5, 2, 6, generator=draw).double().softmax(-1)
    call = kernels.Call("", "_softmax", weights[None])
    for level, (height, width) in enumerate(sizes):
        grid = (2 * points[:, :, level] - 1).transpose(0, 1)
        call.samples.append((torch.zeros(2, 1, height, width), grid, False))
    truth = deformable_matrix(points, weights.unflatten(-1, (2, 3)), sizes).transpose(0, 1)
    assert (call.splatted()[0] - truth).abs().max() < 1e-6


def test_copies_under_another_name_are_the_same_code():
    from transformers.models.deit.modeling_deit import DeiTAttention
    from transformers.models.swin.modeling_swin import SwinAttention
    from transformers.models.vit.modeling_vit import ViTAttention

    assert fingerprint(ViTAttention) == fingerprint(DeiTAttention)
    assert fingerprint(ViTAttention) != fingerprint(SwinAttention)
