"""Dense records against explicit float64 softmax, on every layout and mask that SDPA accepts."""

import math

import pytest
import torch
import torch.nn.functional as F

from foveate.capture.certificate import TOLERANCE, check_record
from foveate.capture.dense import DenseRecord
from foveate.testing.oracles import attention_weights, entropy_rows

B, H, Q, K, D = 2, 3, 21, 17, 8


def tensors(seed=0, *, queries=Q, keys=K, heads=H, key_heads=None, dtype=torch.float32, sharp=2.0):
    random = torch.Generator().manual_seed(seed)
    q = torch.randn(B, heads, queries, D, generator=random) * sharp
    k = torch.randn(B, key_heads or heads, keys, D, generator=random) * sharp
    v = torch.randn(B, key_heads or heads, keys, 5, generator=random)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def record_of(q, k, v, **options):
    """What the tap makes of one SDPA call."""
    names = {"mask": "attn_mask", "causal": "is_causal"}
    out = F.scaled_dot_product_attention(
        q, k, v, enable_gqa=q.shape[1] != k.shape[1], **{names.get(n, n): x for n, x in options.items()}
    )
    return DenseRecord("attention", q, k, v, out, **options)


def masks():
    random = torch.Generator().manual_seed(5)
    keep = torch.rand(B, 1, Q, K, generator=random) > 0.4
    keep[..., 0] = True
    padding = torch.ones(B, 1, 1, K, dtype=torch.bool)
    padding[1, ..., 11:] = False
    infinite = torch.zeros(Q, K).masked_fill(~keep[0, 0], -math.inf)
    return {
        "none": {},
        "bool": {"mask": keep},
        "padding": {"mask": padding},
        "-inf": {"mask": infinite},
        "bias per head": {"mask": torch.randn(B, H, Q, K, generator=random)},
        "causal": {"causal": True},
        "scale": {"scale": 0.3},
    }


@pytest.mark.parametrize("case", masks())
def test_rows_equal_explicit_softmax_and_reproduce_the_output(case):
    q, k, v = tensors()
    options = masks()[case]
    record = record_of(q, k, v, **options)
    truth = attention_weights(q, k, **options)
    assert entropy_rows(truth).median() < 0.6 * math.log(K)
    assert (record.rows(slice(None)) - truth).abs().max() < 2e-6
    assert (record.rows([4, 0]) - truth[:, :, [4, 0]]).abs().max() < 2e-6
    check = check_record(record)
    assert check.value_error < 2e-6
    assert check.row_error < 1e-6


def test_blocks_join_to_all_rows(monkeypatch):
    monkeypatch.setattr("foveate.capture.blocks.MIN_ROWS", 4)
    monkeypatch.setattr("foveate.capture.blocks.BUDGET", 1)
    record = record_of(*tensors(), **masks()["bool"])
    blocks = list(record.blocks())
    assert len(blocks) == 6
    assert torch.allclose(torch.cat([block for _, block in blocks], -2), record.rows(slice(None)), atol=1e-6)
    chosen = torch.tensor([20, 3, 3, 0, 7])
    parts = list(record.blocks(chosen))
    assert [list(map(int, positions)) for positions, _ in parts] == [[20, 3, 3, 0], [7]]
    assert torch.allclose(torch.cat([b for _, b in parts], -2), record.rows(chosen), atol=1e-6)


def test_products_and_statistics():
    q, k, v = tensors()
    record = record_of(q, k, v, **masks()["bias per head"])
    truth = attention_weights(q, k, **masks()["bias per head"])
    r = torch.rand(B, 4, Q)
    u = torch.rand(B, K, 2)
    for fuse, fused in (("mean", truth.mean(1)), ("max", truth.amax(1)), ("min", truth.amin(1))):
        assert torch.allclose(record.left(r, fuse=fuse).double(), r.double() @ fused, atol=1e-5)
        assert torch.allclose(record.right(u, fuse=fuse).double(), fused @ u.double(), atol=1e-5)
    sparse = torch.zeros(B, 1, Q)
    sparse[0, 0, 7], sparse[1, 0, 2] = 1.0, 0.5
    assert torch.allclose(record.left(sparse).double(), sparse.double() @ truth.mean(1), atol=1e-6)
    stats = record.stats()
    assert torch.allclose(stats.entropy.double(), entropy_rows(truth), atol=1e-5)
    assert torch.allclose(stats.received.double(), truth.mean(2), atol=1e-6)
    weights = torch.rand(B, Q)
    weighted = record.weighted(weights)[:, :, 0]
    assert torch.allclose(weighted.double(), torch.einsum("bq,bhqk->bhk", weights.double(), truth), atol=1e-5)


def test_statistics_where_the_mask_leaves_zeros():
    record = record_of(*tensors(), causal=True)
    entropy = record.stats().entropy
    assert torch.isfinite(entropy).all()
    assert entropy[..., 0].abs().max() == 0


def test_grouped_queries_share_keys():
    q, k, v = tensors(heads=6, key_heads=2)
    record = record_of(q, k, v)
    truth = attention_weights(q, k.repeat_interleave(3, 1))
    assert record.shape == (B, 6, Q, K)
    assert (record.rows(slice(None)) - truth).abs().max() < 2e-6
    assert check_record(record).value_error < 2e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_softmax_is_float32_or_better_whatever_the_model_computes_in(dtype):
    q, k, v = tensors(dtype=dtype)
    record = record_of(q, k, v)
    rows = record.rows(slice(None))
    error = (rows.double() - attention_weights(q, k)).abs().max()
    assert rows.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert error < (1e-12 if dtype == torch.float64 else 2e-6)
    assert check_record(record).value_error < TOLERANCE[dtype] / 2


@pytest.mark.parametrize("layout", ["two axes", "three axes", "three axes with heads", "five axes"])
def test_other_layouts(layout):
    q, k, v = tensors()
    mask = masks()["bias per head"]["mask"]
    heads = 1
    truth = attention_weights(q, k, mask=mask)
    if layout == "two axes":
        q, k, v, mask, truth = q[0, 0], k[0, 0], v[0, 0], mask[0, 0], truth[:1, :1]
    elif layout == "three axes":
        q, k, v, mask, truth = q[:, 0], k[:, 0], v[:, 0], mask[:, 0], truth[:, :1]
    elif layout == "three axes with heads":
        q, k, v, mask = (t.flatten(0, 1) for t in (q, k, v, mask))
        heads = H
    else:
        q, k, v = (t[:, None].expand(-1, 2, -1, -1, -1) for t in (q, k, v))
        mask = mask[:, None]
        truth = truth.repeat_interleave(2, 0)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    record = DenseRecord("attention", q, k, v, out, mask=mask, heads=heads)
    assert record.rows(slice(None)).shape == truth.shape
    assert (record.rows(slice(None)) - truth).abs().max() < 2e-6
    assert check_record(record).value_error < 2e-6


def test_rows_without_a_key_are_zero_and_counted():
    q, k, v = tensors()
    mask = torch.ones(B, 1, Q, K, dtype=torch.bool)
    mask[0, 0, 3] = False
    record = record_of(q, k, v, mask=mask)
    rows = record.rows(slice(None))
    assert rows[0, :, 3].abs().max() == 0
    assert torch.isfinite(rows).all()
    assert record.certificate([2, 3]).masked_rows == H
    assert record.certificate([2, 3]).row_error < 1e-6


def test_not_a_number_is_not_hidden():
    q, k, v = tensors()
    q[0, 0, 0, 0] = math.nan
    check = check_record(record_of(q, k, v, mask=torch.ones(Q, K, dtype=torch.bool)))
    assert check.value_error == math.inf


MUTANTS = {
    "swapped heads": lambda q, k: {"q": q.flip(1), "k": k},
    "lost scale": lambda q, k: {"scale": 1.0},
    "lost bias": lambda q, k: {"mask": None},
    "lost causal": lambda q, k: {"causal": False},
    "shifted layer": lambda q, k: {"q": tensors(9, queries=K)[0], "k": tensors(9)[1]},
    "transposed": lambda q, k: {"q": k, "k": q},
    "dropout": lambda q, k: {"q": q * 1.01},
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_certificate_catches(mutant):
    q, k, v = tensors(queries=K)
    bias = None if mutant == "lost causal" else torch.randn(B, H, K, K, generator=torch.Generator().manual_seed(2))
    options = {"mask": bias, "causal": mutant == "lost causal", "scale": None}
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=options["causal"])
    honest = check_record(DenseRecord("attention", q, k, v, out, **options))
    wrong = {"q": q, "k": k, **options, **MUTANTS[mutant](q, k)}
    caught = check_record(DenseRecord("attention", wrong.pop("q"), wrong.pop("k"), v, out, **wrong))
    assert honest.value_error < 2e-6
    assert caught.value_error > 50 * TOLERANCE[torch.float32]


def test_gradient_products_equal_autograd():
    q, k, v = (t.double().requires_grad_() for t in tensors())
    weights = torch.softmax(q @ k.transpose(-1, -2) * D**-0.5, -1)
    out = weights @ v
    slope = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    (truth,) = torch.autograd.grad((out * slope).sum(), weights)
    bar = (weights * truth).relu().mean(1).detach()
    record = DenseRecord("attention", q, k, v, out)
    r, u = torch.rand(B, 2, Q, dtype=torch.float64), torch.rand(B, K, 1, dtype=torch.float64)
    assert torch.allclose(record.grad_left(r, slope), r @ bar)
    assert torch.allclose(record.grad_right(u, slope), bar @ u)
