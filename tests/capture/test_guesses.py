"""Token maps read off gradients, data flow, and einsum layouts, each against something known by construction."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from foveate.capture.einsums import einsum_operands, einsum_output
from foveate.capture.guess_kind import guess_kind
from foveate.capture.guess_maps import is_identity, merge_matrix, per_sample, token_map
from foveate.capture.guess_sources import DataFlow
from foveate.capture.guess_tokens import tokens_by_grid, tokens_from_pixels
from foveate.capture.records import Shape
from foveate.capture.tap import Tap
from foveate.interfaces import TOKEN_KINDS

CHANNELS = 6


def source(count, seed=0):
    return torch.randn(count, CHANNELS, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def tokenwise(x, seed=1):
    """A residual MLP with norms: nonlinear, but each token for itself."""
    torch.manual_seed(seed)
    first, second = nn.Linear(CHANNELS, 9), nn.Linear(9, CHANNELS)
    return F.layer_norm(x + second(F.gelu(first(F.layer_norm(x, (CHANNELS,))))), (CHANNELS,))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 300), st.integers(0, 9))
def test_any_permutation_is_found(count, seed):
    x = source(count, seed)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    found = token_map(x, tokenwise(x)[order], lambda t: t)
    assert torch.equal(found, order.argsort())
    assert is_identity(found, count) == bool((order == torch.arange(count)).all())


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 7), min_size=1, max_size=40))
def test_any_merge_is_found_and_averaged(targets):
    x, index = source(len(targets)), torch.tensor(targets)
    merged = torch.zeros(8, CHANNELS).index_add(0, index, tokenwise(x))
    found = token_map(x, merged, lambda t: t)
    assert torch.equal(found, index)
    matrix = merge_matrix(found, 8)
    if set(targets) != set(range(8)):
        assert matrix is None
        return
    for target in range(8):
        for j, other in enumerate(targets):
            assert matrix[target, j] == pytest.approx((other == target) / targets.count(target))


def test_large_grids_keep_their_numbers():
    x = source(20000)
    order = torch.randperm(20000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(token_map(x, tokenwise(x)[order], lambda t: t), order.argsort())


@pytest.mark.parametrize("strength", [1.0, 0.05])
def test_tokens_that_mix_have_no_map(strength):
    x = source(50)
    y = tokenwise(x)
    assert token_map(x, y + strength * y.roll(1, 0), lambda t: t) is None
    assert token_map(x, y + strength * y.mean(0), lambda t: t) is None


def test_tokens_that_reach_nothing_are_minus_one():
    x = source(6)
    assert token_map(x, tokenwise(x)[[4, 2]], lambda t: t).tolist() == [-1, -1, 1, -1, 0, -1]
    assert token_map(x, source(3, seed=5) * 1.0, lambda t: t).tolist() == [-1] * 6


def test_samples_must_be_alike_and_slowest():
    assert per_sample(torch.tensor([1, 0, 3, 2]), 2, 4).tolist() == [1, 0]
    assert per_sample(torch.tensor([1, 0, 2, 3]), 2, 4) is None
    assert per_sample(torch.tensor([0, 2, 1, 3]), 2, 4) is None
    assert per_sample(torch.tensor([0, -1, 1, -1]), 2, 2).tolist() == [0, -1]
    assert per_sample(torch.tensor([0, 1, 2]), 2, 4) is None


# ------------------------------------------------------------------------------- data flow


class TwoInputs(nn.Module):
    """Attention between tokens made of two inputs, in the way that ``wiring`` says."""

    def __init__(self, wiring):
        super().__init__()
        self.wiring = wiring
        self.q, self.k = nn.Linear(CHANNELS, CHANNELS), nn.Linear(CHANNELS, CHANNELS)
        self.position = nn.Parameter(torch.randn(1, 5, CHANNELS))
        self.learned = nn.Parameter(torch.randn(1, 5, CHANNELS))

    def forward(self, x, y):
        query, key = getattr(self, f"_{self.wiring}")(x, y)
        q, k = F.normalize(self.q(query), dim=-1), self.k(key)
        return F.scaled_dot_product_attention(q[:, None], k[:, None], k[:, None])[:, 0]

    def _same(self, x, y):
        return x + self.position, F.layer_norm(x, (CHANNELS,))

    def _other(self, x, y):
        return x, y

    def _both(self, x, y):
        return x, torch.cat([x, y], 1)

    def _learned(self, x, y):
        return self.learned.expand_as(x), x

    def _part(self, x, y):
        return x[:, :1], x

    def _written(self, x, y):
        z = torch.zeros_like(x)
        z[:, :] = x
        return z, x

    def _mixed(self, x, y):
        joined = torch.stack([x, y]).mean(0)
        return joined, joined.clone()


@pytest.mark.parametrize(
    ("wiring", "kind"),
    [
        ("same", "self"),
        ("other", "cross"),
        ("both", "cross"),
        ("learned", "cross"),
        ("part", "self"),
        ("written", "self"),
        ("mixed", "self"),
    ],
)
@pytest.mark.parametrize("grad", [False, True])
def test_self_or_cross_follows_from_the_sources_alone(wiring, kind, grad):
    model = TwoInputs(wiring)
    x, y = (torch.randn(2, 5, CHANNELS) for _ in range(2))
    guesses = []
    flow = DataFlow(model, [("x", x), ("y", y)])
    with (
        torch.set_grad_enabled(grad),
        flow,
        Tap(model, lambda record: guesses.append(guess_kind(record.name, record.shape, flow.take()))),
    ):
        model(x, y)
    (guess,) = guesses
    assert guess.kind == kind
    assert ("input x" in guess.reason) or wiring in ("mixed",)


def test_without_sources_lengths_decide_and_say_so():
    assert guess_kind("a", Shape(1, 1, 4, 4), None).kind == "self"
    cross = guess_kind("a", Shape(1, 1, 4, 6), None)
    assert cross.kind == "cross"
    assert "was not seen" in cross.reason
    assert guess_kind("temporal_attention.attn", Shape(1, 1, 4, 4), None).kind == "temporal"
    assert guess_kind("timestamp.attn", Shape(1, 1, 4, 4), None).kind == "self"


# ------------------------------------------------------------------------------- layouts and places


@pytest.mark.parametrize(
    ("equation", "left", "right"),
    [
        ("bhqd,bhkd->bhqk", (2, 3, 4, 6), (2, 3, 5, 6)),
        ("bqhd,bkhd->bhqk", (2, 4, 3, 6), (2, 5, 3, 6)),
        ("... i d, ... j d -> ... i j", (2, 3, 4, 6), (2, 3, 5, 6)),
        ("qbd,kbd->bqk", (4, 2, 6), (5, 2, 6)),
    ],
)
def test_einsum_operands_are_laid_out_as_scores_need_them(equation, left, right):
    q, k = torch.randn(left), torch.randn(right)
    laid_q, laid_k = einsum_operands(equation, q, k)
    assert torch.allclose(torch.einsum(equation, q, k), laid_q @ laid_k.transpose(-2, -1), atol=1e-5)


def test_einsum_outputs_are_laid_out_by_query():
    weights, values = torch.randn(2, 3, 4, 5), torch.randn(2, 5, 3, 6)
    arranged = einsum_output("bhqk,bkhd->bqhd", 0, (4, 4))
    expected = weights @ values.transpose(1, 2)
    assert torch.allclose(arranged(torch.einsum("bhqk,bkhd->bqhd", weights, values)), expected, atol=1e-5)
    assert einsum_output("ab,bc,cd->ad", 0, (2, 2)) is None
    assert einsum_operands("bhqd,bhkd", weights, weights) == (None, None)


def test_boxes_bound_the_pixels_that_reach_a_token():
    pixels = torch.tensor([[1, 1, 2, 2], [1, 1, 2, 2]]).flatten()
    tokens = tokens_from_pixels(pixels, 4, (2, 4))
    assert [TOKEN_KINDS[code] for code in tokens.kind] == ["cls", "patch", "patch", "register"]
    assert tokens.x[1:3].tolist() == [1, 3]
    assert tokens.y[1:3].tolist() == [1, 1]
    assert tokens.width[1:3].tolist() == tokens.height[1:3].tolist() == [2, 2]
    clip = tokens_from_pixels(torch.arange(2).repeat_interleave(4), 2, (2, 2, 2))
    assert clip.frame.tolist() == [0, 1]


def test_grids_by_proportion():
    tokens = tokens_by_grid(197, (224, 224))
    assert tokens.where("cls").tolist() == [0]
    assert tokens_by_grid(50 + 4, (70, 35)).where("register").size == 3
    assert tokens_by_grid(2 * 8, (16, 64)).height[0] == 8
    assert tokens_by_grid(7, (1000, 10)) is None or len(tokens_by_grid(7, (1000, 10))) == 7
