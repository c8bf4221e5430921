"""Each relevance rule alone: what arrives adds up to what was given, entry by entry against slow sums."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate.attribution.lrp import rules

SEEDS = st.integers(0, 10**6)
SIZES = st.integers(1, 5)
few = settings(deadline=None, max_examples=25)


def drawn(seed, *shapes):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes]


def alike(found, wanted):
    return torch.allclose(found, wanted, rtol=1e-9, atol=1e-9 * float(1 + wanted.abs().max()))


@few
@given(SEEDS, SIZES, SIZES, SIZES)
def test_a_linear_layer_shares_among_what_speaks_for_it(seed, rows, inward, outward):
    x, w, R = drawn(seed, (rows, inward), (inward, outward), (rows, outward))
    found = rules.positive(x, w, R)
    for n in range(rows):
        for j in range(inward):
            total = 0.0
            for i in range(outward):
                speaking = sum(max(float(x[n, k] * w[k, i]), 0.0) for k in range(inward))
                total += max(float(x[n, j] * w[j, i]), 0.0) / speaking * float(R[n, i]) if speaking else 0.0
            assert abs(total - float(found[n, j])) < 1e-9 * (1 + abs(total))
    silent = (x.clamp(min=0) @ w.clamp(min=0) + x.clamp(max=0) @ w.clamp(max=0)) == 0
    assert alike(found.sum(), R[~silent].sum())  # all of it arrives, save where nothing speaks for an output


@few
@given(SEEDS, SIZES, SIZES, SIZES)
def test_a_product_gives_each_operand_half_by_the_printed_normalisation(seed, rows, inner, columns):
    u, v, R = drawn(seed, (2, rows, inner), (2, inner, columns), (2, rows, columns))
    R = R.abs()  # away from R adding up to zero, where the printed quotient is noise
    to_u, to_v = rules.product(u, v, R)
    terms = u[..., None] * v[:, None] / (u @ v)[:, :, None] * R[:, :, None]  # (batch, row, inner, column)
    for found, plain in ((to_u, terms.sum(-1)), (to_v, terms.sum(1))):
        other = terms.sum()
        wanted = plain * plain.sum().abs() / (plain.sum().abs() + other.abs()) * R.sum() / plain.sum()
        assert alike(found, wanted)
    assert alike(to_u.sum() + to_v.sum(), R.sum())


@few
@given(SEEDS, SIZES, SIZES)
def test_a_sum_is_conserved_and_neither_operand_is_counted_against(seed, rows, columns):
    u, v, R = drawn(seed, (rows, columns), (rows, columns), (rows, columns))
    to_u, to_v = rules.addition(u, v, R)
    assert alike(to_u.sum() + to_v.sum(), R.sum())
    assert (to_u.sum() * R.sum()) >= 0 <= (to_v.sum() * R.sum())  # what the plain rule does not give
    share = (u * R / (u + v)).sum().abs(), (v * R / (u + v)).sum().abs()
    assert alike(to_u.sum(), share[0] / (share[0] + share[1]) * R.sum())
    row = v[:1]
    assert rules.addition(u, row, R)[1].shape == row.shape


@few
@given(SEEDS, SIZES, SIZES)
def test_gates_halve_and_means_share(seed, rows, columns):
    u, v, R = drawn(seed, (rows, columns), (rows, 1), (rows, columns))
    to_u, to_v = rules.gated(u, v, R)
    assert alike(to_u, R / 2)
    assert alike(to_v, R.sum(1, keepdim=True) / 2)
    pooled = rules.generic(lambda x: x.mean(0), u, R[0])
    assert alike(pooled, u / u.sum(0) * R[0])


def test_nothing_is_divided_by_zero():
    u = torch.tensor([[1.0, -2.0], [0.0, 0.0]], dtype=torch.float64)
    R = torch.ones(2, 2, dtype=torch.float64)
    assert all(not part.any() for part in rules.addition(u, -u, R))
    assert not rules.positive(u, torch.tensor([[-1.0], [1.0]], dtype=torch.float64), R[:, :1]).any()
    assert all(part.isfinite().all() for part in rules.product(u, u, R))
