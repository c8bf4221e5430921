"""Interventions on every spelling of attention equal a model whose attention is edited by hand in float64."""

import math

import pytest
import torch

from capture.edited import HEADS, SPELLINGS, WIDTH, B, Block, N, inputs, twin, without
from foveate.capture.intervening import intervene
from foveate.capture.interventions import AblateHeads, Knockout, Replace, ScaleAttention
from foveate.capture.tap import Tap
from foveate.errors import CaptureError, UsageError
from foveate.interfaces import CallKey

ALL = slice(None)
EDGES = torch.rand(B, HEADS, N, N, generator=torch.Generator().manual_seed(3)) < 0.4
EDGES[..., range(N), range(N)] = False  # every row keeps itself
PADDING = torch.ones(B, 1, 1, N, dtype=torch.bool)
PADDING[0, ..., -3:] = False
MASKS = {
    "none": None,
    "causal": "causal",
    "padding": PADDING,
    "bias": torch.randn(1, HEADS, N, N, generator=torch.Generator().manual_seed(5)),
    "lowest": torch.zeros(B, 1, N, N).masked_fill(~PADDING, torch.finfo(torch.float32).min),
}


def site_of(block):
    return "mha" if block.spelling.startswith("mha") else ""


def changed(block, *interventions, x=None):
    """Output and recorded attention of the changed block; the record's certificate must hold."""
    with intervene(block, interventions) as editor, Tap(block) as tap:
        out = block(inputs() if x is None else x)
    (record,) = tap.records
    check = record.certificate(ALL)
    assert check.value_error < 1e-5 or (block.spelling == "einsum" and math.isnan(check.value_error))
    assert editor.applied
    return out, record.rows(ALL).double()


def agree(found, expected):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other.double(), atol=2e-5, rtol=1e-5)


def test_the_attention_that_is_edited_is_peaked():
    for spelling in SPELLINGS:
        weights = twin(Block(spelling), inputs())[1]
        entropy = -(weights * weights.clamp_min(1e-30).log()).sum(-1)
        assert entropy.median() < 0.6 * math.log(N)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_knockout_equals_weights_set_to_zero_and_renormalised(spelling, mask):
    block = Block(spelling, MASKS[mask])
    out, weights = changed(block, Knockout(site_of(block), mask=EDGES))
    agree((out, weights), twin(block, inputs(), without(EDGES)))
    assert (weights[EDGES] == 0).all()


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_knockout_by_positions_and_heads(spelling):
    block = Block(spelling)
    edges = torch.zeros(1, HEADS, N, N, dtype=torch.bool)
    edges[:, 1:3, 0, 2:6] = True
    out, weights = changed(block, Knockout(site_of(block), heads=[1, 2], query="at:0", key="at:2-5"))
    agree((out, weights), twin(block, inputs(), without(edges)))


@pytest.mark.parametrize("mask", ["none", "padding", "bias"])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_scaling_multiplies_weights_and_renormalises(spelling, mask):
    def edit(weights):
        scaled = torch.where(EDGES, 3.5 * weights, weights)
        return scaled / scaled.sum(-1, keepdim=True)

    block = Block(spelling, MASKS[mask])
    agree(changed(block, ScaleAttention(site_of(block), mask=EDGES, factor=3.5)), twin(block, inputs(), edit))


def test_scaling_by_zero_is_a_knockout():
    block = Block()
    agree(changed(block, ScaleAttention("", mask=EDGES, factor=0.0)), twin(block, inputs(), without(EDGES)))


@pytest.mark.parametrize("mask", ["none", "causal", "padding", "lowest"])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_uniform_attention_is_uniform_over_the_keys_that_the_model_may_see(spelling, mask):
    block = Block(spelling, MASKS[mask])

    def edit(weights):
        seen = (block.additive(inputs()) > -1e3).expand(weights.shape)
        even = seen.double() / seen.sum(-1, keepdim=True)
        rows = torch.zeros(HEADS, N, 1, dtype=torch.bool)
        rows[2, 3:] = True
        return torch.where(rows, even, weights)

    found = changed(block, Replace(site_of(block), heads=2, query=list(range(3, N)), by="uniform"))
    agree(found, twin(block, inputs(), edit))


def test_uniform_among_some_keys_keeps_their_total():
    block = Block("manual")

    def edit(weights):
        weights = weights.clone()
        weights[..., 2:5] = weights[..., 2:5].mean(-1, keepdim=True)
        return weights

    agree(changed(block, Replace("", key=[2, 3, 4], by="uniform")), twin(block, inputs(), edit))


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_replacing_by_an_array(spelling):
    block = Block(spelling)
    given = torch.rand(1, HEADS, N, N, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    given[..., 2] = 0
    given /= given.sum(-1, keepdim=True)
    out, weights = changed(block, Replace(site_of(block), by=given))
    agree((out, weights), twin(block, inputs(), lambda a: given.expand_as(a)))
    assert (weights[..., 2] == 0).all()


@pytest.mark.parametrize("spelling", ["sdpa", "manual", "mha"])
def test_patching_in_the_attention_of_another_input(spelling):
    block, other = Block(spelling), inputs(seed=9)
    with Tap(block) as tap:
        block(other)
    found = changed(block, Replace(site_of(block), heads=[0, 3], by=tap.records[0]))
    patch = twin(block, other)[1]
    heads = torch.tensor([True, False, False, True])[:, None, None]
    agree(found, twin(block, inputs(), lambda a: torch.where(heads, patch, a)))


def test_shuffled_rows_hold_the_same_weights_elsewhere_and_follow_the_seed():
    block = Block("sdpa", PADDING)
    own = twin(block, inputs())[1]
    _, first = changed(block, Replace("", by="shuffled", seed=1))
    _, again = changed(block, Replace("", by="shuffled", seed=1))
    _, other = changed(block, Replace("", by="shuffled", seed=2))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)
    assert not torch.allclose(first, own, atol=1e-3)
    torch.testing.assert_close(first.sort(-1).values, own.sort(-1).values, atol=1e-6, rtol=1e-4)
    assert (first[0, ..., -3:] == 0).all()


def test_shuffling_some_keys_leaves_the_others():
    block = Block()
    own = twin(block, inputs())[1]
    _, found = changed(block, Replace("", key="at:0-4", by="shuffled"))
    torch.testing.assert_close(found[..., 5:], own[..., 5:], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(found[..., :5].sort(-1).values, own[..., :5].sort(-1).values, atol=1e-6, rtol=1e-4)
    assert not torch.allclose(found[..., :5], own[..., :5], atol=1e-3)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_an_ablated_head_puts_out_zero_and_keeps_its_attention(spelling):
    def silent(out):
        out = out.clone()
        out[:, [1, 2]] = 0
        return out

    block = Block(spelling)
    found = changed(block, AblateHeads(site_of(block), heads=[1, 2]))
    agree(found, twin(block, inputs(), edit_heads=silent))


@pytest.mark.parametrize("mask", ["none", "causal", "padding"])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_an_ablated_head_puts_out_its_mean_over_queries(spelling, mask):
    def mean(out):
        out = out.clone()
        out[:, 3] = out[:, 3].mean(1, keepdim=True)
        return out

    block = Block(spelling, MASKS[mask])
    out, _ = changed(block, AblateHeads(site_of(block), heads=3, to="mean"))
    agree((out,), twin(block, inputs(), edit_heads=mean)[:1])


@pytest.mark.parametrize("spelling", ["sdpa", "manual", "einsum", "mha_weights", "grouped"])
def test_an_ablated_head_puts_out_the_mean_of_reference_data(spelling):
    block = Block(spelling)
    means = torch.randn(HEADS, WIDTH // HEADS, generator=torch.Generator().manual_seed(2))

    def constant(out):
        out = out.clone()
        out[:, 0] = means[0].double()
        return out

    given = {CallKey(site_of(block), 0): means}
    found = changed(block, AblateHeads(site_of(block), heads=0, to=given))
    agree(found, twin(block, inputs(), edit_heads=constant))


def test_interventions_act_in_order_and_contexts_nest():
    block = Block()
    uniform, knockout = Replace("", heads=0, by="uniform"), Knockout("", mask=EDGES)
    both = changed(block, uniform, knockout)
    with intervene(block, [knockout]), intervene(block, [uniform]), Tap(block) as tap:
        out = block(inputs())

    def edit(weights):
        weights = weights.clone()
        weights[:, 0] = 1 / N
        return without(EDGES)(weights)

    agree(both, twin(block, inputs(), edit))
    agree((out, tap.records[0].rows(ALL).double()), both)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_tap_outside_the_context_sees_the_same(spelling):
    block = Block(spelling)
    knockout = Knockout(site_of(block), mask=EDGES)
    inside = changed(block, knockout)
    with Tap(block) as tap, intervene(block, [knockout]):
        out = block(inputs())
    agree((out, tap.records[0].rows(ALL).double()), inside)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_an_empty_choice_is_a_no_op_to_the_bit(spelling):
    block, nothing = Block(spelling), torch.zeros(N, N, dtype=torch.bool)
    with Tap(block):
        plain = block(inputs())
    site = site_of(block)
    empty = [
        Knockout(site, mask=nothing),
        Replace(site, heads=(), by="shuffled"),
        AblateHeads(site, heads=()),
        ScaleAttention(site, query=[], factor=7.0),
        Knockout(site, layers=()),
    ]
    with intervene(block, empty) as editor:
        assert torch.equal(block(inputs()), plain)
    assert {applied.edges for applied in editor.applied} == {0}
    with intervene(block, []):
        assert torch.equal(block(inputs()), plain)


@pytest.mark.parametrize("spelling", ["sdpa", "manual", "mha", "grouped"])
def test_gradients_are_those_of_the_edited_model(spelling):
    block = Block(spelling)
    site = site_of(block)
    x = inputs().requires_grad_()
    changes = [Knockout(site, mask=EDGES), AblateHeads(site, heads=1), Replace(site, heads=2, query=[1])]
    with intervene(block, changes):
        block(x)[0, 1].square().sum().backward()
    twin_x = inputs().double().requires_grad_()

    def edit(weights):
        weights = without(EDGES)(weights)
        even = (~EDGES).double() / (~EDGES).sum(-1, keepdim=True)
        rows = torch.zeros(HEADS, N, 1, dtype=torch.bool)
        rows[2, 1] = True
        return torch.where(rows, even, weights)

    def silent(out):
        return out * torch.tensor([1.0, 0, 1, 1])[:, None, None]

    twin(block, twin_x, edit, silent)[0][0, 1].square().sum().backward()
    torch.testing.assert_close(x.grad.double(), twin_x.grad, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("by", ["uniform", "shuffled"])
def test_replacing_leaves_no_nan_in_gradients_where_weights_underflow(by):
    block = Block("sdpa", PADDING)
    x = (30 * inputs()).requires_grad_()
    with intervene(block, [Replace("", by=by), AblateHeads("", heads=0, to="mean")]):
        block(x).sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("spelling", ["sdpa", "manual", "mha"])
def test_a_row_without_keys_is_an_error_that_names_it(spelling):
    block = Block(spelling, PADDING)
    with (
        pytest.raises(CaptureError, match=r"3 rows of .* layer 0 .* batch index 0, head 2, query 1"),
        intervene(block, [Knockout(site_of(block), heads=2, query="at:1-3", key="at:0-5")]),
    ):
        block(inputs())


def test_the_lowest_number_counts_as_a_mask():
    block = Block("manual", MASKS["lowest"])
    with pytest.raises(CaptureError, match="keep no key"), intervene(block, [Knockout("", key="at:0-5")]):
        block(inputs())


def test_an_exception_leaves_everything_as_it_was():
    block = Block("manual")
    with Tap(block):
        plain = block(inputs())
    with pytest.raises(RuntimeError), intervene(block, [Knockout("", mask=EDGES)]):
        block(torch.zeros(2, 2))
    with Tap(block) as tap:
        assert torch.equal(block(inputs()), plain)
    assert len(tap.records) == 1


@pytest.mark.parametrize(
    ("intervention", "message"),
    [
        (lambda: Knockout("nothing"), "no module .* matches 'nothing'"),
        (lambda: Knockout("", layers=3), r"no layers \[3\]"),
        (lambda: Knockout("", heads=7), "heads 0 to 3"),
        (lambda: Knockout("", key="at:99"), "axis of 9 tokens"),
        (lambda: Knockout("", key="patch"), "need labels"),
        (lambda: Knockout("", key="pach"), "no condition 'pach'"),
        (lambda: Knockout("", mask=torch.ones(3, 3)), "mask must be boolean"),
        (lambda: Knockout("", mask=torch.ones(3, 3, dtype=torch.bool)), "does not fit"),
        (lambda: Replace("", by="zeros"), "no replacement"),
        (lambda: Replace("", by=torch.ones(N, N)), "sum to 1"),
        (lambda: Replace("", by=torch.full((3, 4), 0.25)), "do not fit"),
        (lambda: Replace("", by={}), "nothing given"),
        (lambda: ScaleAttention("", factor=-1.0), "not negative"),
        (lambda: AblateHeads("", key="at:1"), "as a whole"),
        (lambda: AblateHeads("", to="median"), "no ablation"),
    ],
)
def test_what_cannot_be_done_is_a_usage_error(intervention, message):
    block = Block()
    with pytest.raises(UsageError, match=message), intervene(block, [intervention()]):
        block(inputs())


def test_a_chosen_module_that_runs_no_attention_is_an_error():
    block = Block()
    chosen = [Knockout("mha", mask=EDGES)]
    with pytest.raises(CaptureError, match=r"never ran under it\n  Knockout: mha"), intervene(block, chosen):
        block(inputs())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spelling", ["sdpa", "manual"])
def test_low_precision(spelling, dtype):
    block = Block(spelling).to(dtype)
    changes = [Knockout("", heads=1, mask=EDGES), Replace("", heads=2, by="uniform")]
    with intervene(block, changes), Tap(block) as tap:
        out = block(inputs().to(dtype))
    weights = tap.records[0].rows(ALL)
    assert out.dtype == dtype
    assert (weights[:, 1][EDGES[:, 1]] == 0).all()
    torch.testing.assert_close(weights[:, 2], torch.full((B, N, N), 1 / N), atol=2e-3, rtol=0)


def test_autocast():
    block = Block()
    changes = [Knockout("", mask=EDGES), ScaleAttention("", factor=2.0, key="at:0")]
    with torch.autocast("cpu", dtype=torch.bfloat16), intervene(block, changes), Tap(block) as tap:
        block(inputs())
    weights = tap.records[0].rows(ALL)
    assert (weights[EDGES] == 0).all()
    assert tap.records[0].certificate(ALL).value_error < 2e-2


def test_deformable_modules_whose_samples_are_never_summed_are_named():
    block = Block("manual")
    block.sampling_offsets = torch.nn.Linear(2, 2)
    with pytest.raises(CaptureError, match="never ran"), intervene(block, [AblateHeads("")]):
        block(inputs())


class Functional(torch.nn.Module):
    """Calls the function itself, so that nothing but the call says how many heads there are."""

    def __init__(self, block):
        super().__init__()
        self.block, self.spelling = [block], "functional"

    def forward(self, x):
        mha, rows = self.block[0].mha, x.transpose(0, 1)
        out, _ = torch.nn.functional.multi_head_attention_forward(
            *(rows, rows, rows, WIDTH, HEADS, mha.in_proj_weight, mha.in_proj_bias, None, None, False, 0.0),
            *(mha.out_proj.weight, mha.out_proj.bias),
            training=False,
            need_weights=True,
        )
        return out.transpose(0, 1)


def test_the_functional_form_says_its_heads_to_every_tap():
    block = Block()
    model = Functional(block)
    knockout = Knockout("", heads=2, mask=EDGES)
    edges = EDGES & (torch.arange(HEADS) == 2)[:, None, None]
    expected = twin(block, inputs(), without(edges))
    with Tap(model) as outside, intervene(model, [knockout]), Tap(model) as inside:
        out = model(inputs())
    for tap in (outside, inside):
        agree((out, tap.records[0].rows(ALL).double()), expected)
