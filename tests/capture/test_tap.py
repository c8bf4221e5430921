"""The tap on every spelling of attention; models stay untouched, whatever happens."""

import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.functional import scaled_dot_product_attention as imported_by_name

from foveate.capture.certificate import check_record
from foveate.capture.tap import Tap
from foveate.errors import CaptureError
from foveate.testing.oracles import attention_weights

B, N, WIDTH, HEADS = 2, 11, 24, 4


class Attention(nn.Module):
    """Self-attention in one of the spellings found in the wild."""

    def __init__(self, spelling="sdpa", seed=0):
        super().__init__()
        self.spelling = spelling
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.softmax = nn.Softmax(dim=-1)
        self.dropout = nn.Dropout(0.5)
        with torch.no_grad():
            self.qkv.weight.normal_(0, 0.4, generator=torch.Generator().manual_seed(seed))
        self.eval()

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        self.seen = (q.detach(), k.detach())
        return getattr(self, f"_{self.spelling}")(q, k, v).transpose(1, 2).flatten(2)

    def _sdpa(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v)

    def _by_name(self, q, k, v):
        return imported_by_name(q, k, v)

    def _method(self, q, k, v):
        return self.dropout(self._scores(q, k).softmax(dim=-1)) @ v

    def _module(self, q, k, v):
        return torch.matmul(self.softmax(self._scores(q, k)), v)

    def _function(self, q, k, v):
        weights = F.softmax(self._scores(q, k), dim=-1, dtype=torch.float32).to(q.dtype)
        return torch.bmm(weights.flatten(0, 1), v.flatten(0, 1)).unflatten(0, (len(q), HEADS))

    def _einsum(self, q, k, v):
        weights = torch.softmax(torch.einsum("bhqd,bhkd->bhqk", q, k) * q.shape[-1] ** -0.5, -1)
        return torch.einsum("bhqk,bhkd->bhqd", weights, v)

    @staticmethod
    def _scores(q, k):
        return (q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5


def inputs(seed=1):
    return torch.randn(B, N, WIDTH, generator=torch.Generator().manual_seed(seed))


SPELLINGS = ["sdpa", "by_name", "method", "module", "function", "einsum"]


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_is_seen_once_and_exactly(spelling, grad):
    model = nn.Sequential(Attention(spelling), Attention(spelling, seed=3))
    with torch.set_grad_enabled(grad):
        plain = model(inputs())
        with Tap(model) as tap:
            tapped = model(inputs())
    assert torch.equal(plain, tapped)
    assert [record.name.split(".")[0] for record in tap.records] == ["0", "1"]
    assert not tap.unlinked
    for layer, record in zip(model, tap.records, strict=True):
        assert (record.rows(slice(None)) - attention_weights(*layer.seen)).abs().max() < 2e-6
        check = check_record(record)
        assert check.row_error < 1e-6
        assert check.value_error < 2e-6 or spelling == "einsum"
        assert (record.node is not None) == grad


def mha_cases():
    return list(_mha_cases())


def _mha_cases():
    for training in (False, True):
        for grad in (False, True):
            for ask in (False, True):
                for mask in ("none", "padding", "causal"):
                    yield training, grad, ask, mask


@pytest.mark.parametrize(("training", "grad", "ask", "mask"), mha_cases())
def test_multihead_attention(training, grad, ask, mask):
    module = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True).train(training)
    with torch.no_grad():
        module.in_proj_weight.normal_(0, 0.4, generator=torch.Generator().manual_seed(0))
    x = inputs()
    options = {"need_weights": ask}
    if mask == "padding":
        options["key_padding_mask"] = torch.arange(N)[None].expand(B, -1) > torch.tensor([[N], [6]])
    if mask == "causal":
        options["attn_mask"] = torch.ones(N, N, dtype=torch.bool).triu(1)
        options["is_causal"] = not ask
    with torch.set_grad_enabled(grad):
        asked = {**options, "need_weights": True, "is_causal": False, "average_attn_weights": False}
        expected, truth = module(x, x, x, **asked)
        with Tap(module) as tap:
            out, returned = module(x, x, x, **options)
    (record,) = tap.records
    assert record.shape == (B, HEADS, N, N)
    assert (record.rows(slice(None)) - truth).abs().max() < 2e-6
    assert (out - expected).abs().max() < 4e-6
    assert check_record(record).value_error < 1e-6
    if ask:
        assert (returned - truth.mean(1)).abs().max() < 1e-6
    if grad:
        (slope,) = torch.autograd.grad(out.sum(), record.node)
        assert slope.abs().max() > 0


def test_dropout_in_training_fails_the_certificate():
    module = nn.MultiheadAttention(WIDTH, HEADS, dropout=0.3, batch_first=True).train()
    x = inputs()
    for ask in (False, True):
        with torch.no_grad(), Tap(module) as tap:
            module(x, x, x, need_weights=ask)
        assert check_record(tap.records[0]).value_error > 0.05


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_transformer_layers_in_eval_leave_their_fast_path(mode):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 32, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(WIDTH, HEADS, 32, batch_first=True), 1).eval()
    padding = torch.zeros(B, N, dtype=torch.bool)
    padding[1, 7:] = True
    with mode():
        plain = encoder(inputs(), src_key_padding_mask=padding)
        with Tap(encoder) as tap:
            tapped = encoder(inputs(), src_key_padding_mask=padding)
        with Tap(decoder) as other:
            decoder(inputs()[:, :4], tapped)
    assert (plain - tapped)[~padding].abs().max() < 1e-6
    assert [record.name for record in tap.records] == ["layers.0.self_attn", "layers.1.self_attn"]
    assert tap.records[0].rows(slice(None))[1, :, :, 7:].abs().max() == 0
    assert [record.shape[2:] for record in other.records] == [(4, 4), (4, N)]


def test_softmax_that_weighs_nothing_is_not_attention():
    class Classifier(nn.Module):
        def forward(self, x):
            return x.softmax(-1)

    model = nn.Sequential(Attention(), Classifier())
    with Tap(model) as tap:
        model(inputs())
    assert [record.name for record in tap.records] == ["0"]
    assert [record.name for record in tap.unlinked] == ["1"]


def test_nested_taps_see_the_same_calls():
    model = nn.Sequential(Attention("method"), nn.MultiheadAttention(WIDTH, HEADS, batch_first=True).eval())

    def run():
        x = model[0](inputs())
        return model[1](x, x, x, need_weights=False)

    with torch.no_grad(), Tap(model) as outer, Tap(model, lambda record: inner.append(record.rows([0]))):
        inner: list[torch.Tensor] = []
        run()
    assert len(outer.records) == len(inner) == 2
    for record, row in zip(outer.records, inner, strict=True):
        assert torch.equal(record.rows([0]), row)


def test_exception_in_mid_forward_leaves_everything_as_before():
    class Failing(nn.Module):
        def forward(self, x):
            raise RuntimeError("on purpose")

    model = nn.Sequential(Attention(), Failing())
    hooks = {name: (len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()}
    with pytest.raises(RuntimeError, match="on purpose"), Tap(model) as tap:
        model(inputs())
    assert len(tap.records) == 1
    assert torch.overrides._get_current_function_mode_stack() == []
    assert hooks == {n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()}
    assert F.multi_head_attention_forward.__globals__["has_torch_function"] is torch.overrides.has_torch_function


def test_exception_in_the_sink_ends_the_forward():
    def sink(record):
        raise CaptureError("sink failed")

    with pytest.raises(CaptureError, match="sink failed"), Tap(model := Attention(), sink):
        model(inputs())
    assert torch.overrides._get_current_function_mode_stack() == []


def test_a_tap_can_be_used_again_but_not_twice_at_once():
    model = Attention()
    tap = Tap(model)
    for _ in range(2):
        with tap:
            model(inputs())
    assert len(tap.records) == 2
    with tap, pytest.raises(CaptureError, match="already active"):
        tap.__enter__()


def test_other_threads_are_refused_or_unseen():
    model = Attention()
    with pytest.raises(CaptureError, match="other threads"):
        Tap(nn.DataParallel(model))
    with Tap(model) as tap:
        worker = threading.Thread(target=lambda: model(inputs()))
        worker.start()
        worker.join()
    assert tap.records == []


def test_autocast_is_compared_in_the_dtype_the_kernel_saw():
    model = Attention()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), Tap(model) as tap:
        model(inputs())
    (record,) = tap.records
    rows = record.rows(slice(None))
    assert rows.dtype == torch.float32
    assert check_record(record).value_error < 2e-2
    q, k = (t.to(torch.bfloat16) for t in model.seen)
    assert (rows - attention_weights(q, k)).abs().max() < 2e-6


def test_learned_queries_behind_frozen_weights_still_get_a_gradient():
    model = Attention().requires_grad_(False)
    head = nn.Parameter(torch.randn(WIDTH, generator=torch.Generator().manual_seed(4)))
    for grad, expected in ((False, False), (True, True)):
        with Tap(model, grad=grad) as tap:
            (model(inputs()) @ head).sum()
        assert (tap.records[0].node is not None) == expected


def test_grid_sampling_outside_deformable_attention_is_let_pass():
    class Warp(nn.Module):
        def forward(self, x):
            return F.grid_sample(x[:, None], torch.zeros(B, 3, 3, 2), align_corners=False)

    with Tap(model := Warp()) as tap:
        model(inputs())
    assert tap.records == tap.unlinked == []
