"""The LRP variant of Chefer et al. against a slow oracle written from the paper, contribution by contribution."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import nn

from attribution_fakes import bound_batch, only, snapshot, two_targets_a_sample
from foveate.attribution.chefer_cvpr21 import CheferCVPR21
from foveate.errors import CaptureError, UsageError
from foveate.interfaces import AttentionStep, CallKey, CallLabels, Target
from foveate.testing.tiny import SITE, STREAM, TinyConfig, TinySource, tiny_samples
from foveate.testing.tiny_detector import TinyDetector
from vit_models import open_tiny, photos

# ------------------------------------------------------------------------------------------ the oracle


@dataclass
class Layer:
    """One block's weights: ``norms`` are modules, linear maps are (weight (out, in), bias)."""

    norms: tuple
    qkv: tuple
    proj: tuple
    fc1: tuple
    fc2: tuple


@dataclass
class Plain:
    """A plain ViT above its embedding: what the oracle is told of a model."""

    layers: list
    heads: int
    activation: object
    norm: object
    head: tuple
    readout: slice  # tokens whose mean is classified


def quotient(a, b):
    return torch.where(b == 0, 0.0, a / b)


def linear_rule(x, weight, R):
    """R_j = sum_i [c_ij >= 0] c_ij / (sum_j' [..] c_ij') R_i with c_ij = x_j w_ij; x (n, in), R (n, out)."""
    c = (x[:, None, :] * weight[None]).clamp(min=0)
    return (quotient(c, c.sum(-1, keepdim=True)) * R[..., None]).sum(1)


def normalised(Ru, Rv, R):
    """The two-operand normalisation, by the sums, as printed."""
    su, sv = Ru.sum(), Rv.sum()
    total = su.abs() + sv.abs()
    return Ru * su.abs() / total * R.sum() / su, Rv * sv.abs() / total * R.sum() / sv


def add_rule(u, v, R):
    return normalised(quotient(u * R, u + v), quotient(v * R, u + v), R)


def matmul_rule(u, v, R):
    """u (h, n, m), v (h, m, d), R (h, n, d): every product u_nm v_md takes its share of R_nd."""
    c = u[..., None] * v[:, None]  # (h, n, m, d)
    shares = quotient(c, c.sum(2, keepdim=True)) * R[:, :, None]
    return normalised(shares.sum(-1), shares.sum(1), R)


def split(x, heads):
    """(n, heads * d) to (heads, n, d)."""
    return x.view(len(x), heads, -1).transpose(0, 1)


def merge(x):
    return x.transpose(0, 1).reshape(x.shape[1], -1)


def forward(plain, x):
    """Every intermediate value of one sample ``(token, width)``, and the logits."""
    kept = []
    for layer in plain.layers:
        h = layer.norms[0](x)
        q, k, v = (split(h @ w.T + b, plain.heads) for w, b in layer.qkv)
        A = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)
        A.requires_grad_() if A.is_leaf else A.retain_grad()
        mixed = merge(A @ v)
        attended = mixed @ layer.proj[0].T + layer.proj[1]
        y = x + attended
        g = layer.norms[1](y)
        hidden = plain.activation(g @ layer.fc1[0].T + layer.fc1[1])
        out = hidden @ layer.fc2[0].T + layer.fc2[1]
        kept.append((x, h, q, k, v, A, mixed, attended, y, g, hidden, out))
        x = y + out
    pooled = plain.norm(x)[plain.readout]
    return kept, pooled, pooled.mean(0) @ plain.head[0].T + plain.head[1]


def oracle(plain, x, chosen):
    """The readout's row of the product of I + mean_h (dA * R_A)+, ``(token,)``."""
    kept, pooled, logits = forward(plain, x.detach().requires_grad_())
    logits[chosen].backward()
    with torch.no_grad():
        start = torch.zeros_like(logits)
        start[chosen] = 1
        mean = pooled.mean(0)
        R_mean = linear_rule(mean[None], plain.head[0], start[None])[0]
        R = torch.zeros_like(x)
        R[plain.readout] = quotient(pooled, pooled.sum(0)) * R_mean
        matrices = []
        for layer, (x0, h, q, k, v, A, mixed, attended, y, g, hidden, out) in zip(
            reversed(plain.layers), reversed(kept), strict=True
        ):
            R_y, R_out = add_rule(y, out, R)
            R_y = R_y + linear_rule(g, layer.fc1[0], linear_rule(hidden, layer.fc2[0], R_out))
            R_x, R_attended = add_rule(x0, attended, R_y)
            R_mixed = split(linear_rule(mixed, layer.proj[0], R_attended), plain.heads)
            R_A, R_v = matmul_rule(A, v, R_mixed)
            R_q, R_kT = matmul_rule(q, k.mT, R_A)
            for (weight, _), part in zip(layer.qkv, (R_q, R_kT.mT, R_v), strict=True):
                R_x = R_x + linear_rule(h, weight, merge(part))
            matrices.append((A.grad * R_A).clamp(min=0).mean(0))
            R = R_x
        row = torch.zeros(len(x), dtype=torch.float64)
        row[plain.readout] = 1 / len(pooled)
        eye = torch.eye(len(x), dtype=torch.float64)
        return torch.linalg.multi_dot([row[None], *[eye + m for m in matrices]])[0]


# ------------------------------------------------------------------------------------------ models


def pair(linear):
    return linear.weight.detach(), linear.bias.detach()


def of_tiny(model):
    def layer(block):
        if hasattr(block.attention, "qkv"):
            weight, bias, out = *pair(block.attention.qkv), block.attention.proj
        else:
            inside = block.attention
            weight, bias, out = inside.in_proj_weight.detach(), inside.in_proj_bias.detach(), inside.out_proj
        qkv = tuple(zip(weight.chunk(3), bias.chunk(3), strict=True))
        return Layer((block.norm1, block.norm2), qkv, pair(out), pair(block.mlp[0]), pair(block.mlp[2]))

    layers = [layer(block) for block in model.blocks]
    return Plain(layers, model.config.heads, nn.functional.gelu, model.norm, pair(model.head), slice(0, 1))


def tiny_tokens(model, inputs):
    patches = model.embed(inputs).flatten(2).transpose(1, 2)
    return torch.cat([model.cls.expand(len(inputs), -1, -1), patches], 1) + model.position


def of_transformers(tower, head, norm, readout):
    """The blocks of a library's tower, whose modules are told apart by the names they have."""

    def find(block, *names):
        return pair(next(m for n, m in block.named_modules() if n.endswith(names) and isinstance(m, nn.Linear)))

    def layer(block):
        qkv = tuple(
            find(block, name, other)
            for name, other in (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value"))
        )
        norms = tuple(m for m in block.modules() if isinstance(m, nn.LayerNorm))
        linear = [m for m in block.modules() if isinstance(m, nn.Linear)]
        wide = next(m for m in linear if m.out_features > m.in_features)
        narrow = next(m for m in linear if m.in_features > m.out_features)
        rest = [m for m in linear if m not in (wide, narrow)]
        known = [w for w, _ in qkv]
        out = next(m for m in rest if not any(m.weight.data_ptr() == w.data_ptr() for w in known))
        return Layer(norms, qkv, pair(out), pair(wide), pair(narrow))

    blocks = next(m for m in tower.modules() if isinstance(m, nn.ModuleList))
    activation = next(m for n, m in blocks[0].named_modules() if "act" in n and not len(list(m.children())))
    return Plain(
        [layer(b) for b in blocks], tower.config.num_attention_heads, activation, norm, pair(head), readout
    )


def block_input(model, blocks, inputs):
    """Tokens that enter the first block."""
    seen = []
    hook = blocks[0].register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    with torch.no_grad():
        model(inputs)
    hook.remove()
    return seen[0].detach()


def relative(found, truth):
    return float(np.abs(found - truth).max() / np.abs(truth).max())


# ------------------------------------------------------------------------------------------ tests


@pytest.fixture(scope="module")
def tiny():
    source = TinySource(TinyConfig(layers=3, sharpness=8.0))
    return source, *bound_batch(source, 3)


@pytest.fixture(scope="module")
def truth(tiny):
    source, batch, bound = tiny
    model = TinySource(source.config).module.double()
    plain, tokens = of_tiny(model), tiny_tokens(model, batch.inputs.double())
    entropy = -torch.special.xlogy(*2 * [torch.cat([k[5] for k in forward(plain, tokens[0])[0]])]).sum(-1)
    assert entropy.median() < 0.6 * math.log(17)  # peaked, or equality would prove nothing
    return np.stack([oracle(plain, tokens[r.sample], r.class_index)[1:].reshape(4, 4) for r in bound.rows])


@pytest.mark.parametrize("style", ["sdpa", "manual", "mha", "mha_weights"])
def test_equals_the_paper_in_every_spelling_of_attention(tiny, truth, style):
    spelled = TinySource(replace(tiny[0].config, style=style))
    made = CheferCVPR21().attribute(spelled, *tiny[1:])
    assert relative(made.values, truth) < 1e-5
    assert made.method == "chefer_cvpr21"
    assert made.grid == tiny[0].cells(tiny[1])
    spelled.module.double()
    batch = replace(tiny[1], inputs=tiny[1].inputs.double())
    assert relative(CheferCVPR21().attribute(spelled, batch, tiny[2]).values, truth) < 1e-6


@pytest.mark.parametrize(
    "case", ["ViTForImageClassification", "DeiTForImageClassification", "CLIPForImageClassification"]
)
def test_equals_the_paper_on_the_librarys_classifiers(case):
    source = open_tiny(case)
    batch = source.encode(photos())
    bound = source.bind(source.forward(batch), batch, Target(scale="logit"))
    made = CheferCVPR21().attribute(source, batch, bound).values

    model = source.module.double()
    inputs = batch.inputs.double()
    clip = case.startswith("CLIP")
    tower = getattr(model, "vision_model", None) or getattr(model, "vit", None) or model.deit
    norm = nn.Identity() if clip else tower.layernorm
    prefix = {"ViT": 1, "DeiT": 2, "CLIP": 1}[case.split("For")[0]]
    plain = of_transformers(tower, model.classifier, norm, slice(1, None) if clip else slice(0, 1))
    blocks = next(m for m in tower.modules() if isinstance(m, nn.ModuleList))
    tokens = block_input(model, blocks, inputs)
    logits = torch.stack([forward(plain, t)[2] for t in tokens]).detach()
    assert torch.allclose(logits, model(inputs).logits, atol=1e-9)  # the oracle knows the model
    want = [oracle(plain, tokens[r.sample], r.class_index)[prefix:].reshape(4, 4) for r in bound.rows]
    assert relative(made, np.stack(want)) < 2e-5


def test_targets_and_scales(tiny):
    source, batch, bound = tiny
    both = two_targets_a_sample(bound, 3)
    made = CheferCVPR21().attribute(source, batch, both)
    alone = [CheferCVPR21().attribute(source, *only(both, batch, sample)).values for sample in range(3)]
    np.testing.assert_allclose(made.values, np.concatenate(alone), atol=1e-5 * made.values.max())
    assert np.abs(made.values[0] - made.values[1]).max() > 1e-3 * made.values.max()
    flat = CheferCVPR21().attribute(source, batch, bound.at("probability"))
    assert flat.info["scale"] == "probability"
    assert np.abs(flat.values - made.values[::2]).max() > 1e-3 * made.values.max()


def test_float32_rounding_of_the_forward_does_not_matter():
    """Skip connections nearly cancel: here the authors' code in float32 is up to 0.38 of the maximum off."""
    source = TinySource(TinyConfig(layers=6, width=48, image=64, heads=4))
    batch, bound = bound_batch(source, 4)
    single = CheferCVPR21().attribute(source, batch, bound).values
    source.module.double()
    double = CheferCVPR21().attribute(source, replace(batch, inputs=batch.inputs.double()), bound).values
    assert max(relative(s, d) for s, d in zip(single, double, strict=True)) < 2e-5


def test_a_class_without_weights_explains_nothing(tiny):
    source = TinySource(tiny[0].config)
    with torch.no_grad():
        source.module.head.weight.zero_()
    assert not CheferCVPR21().attribute(source, *tiny[1:]).values.any()


def test_the_model_is_left_alone(tiny):
    source, batch, bound = tiny
    before = snapshot(source.module)
    CheferCVPR21().attribute(source, batch, bound)
    assert snapshot(source.module) == before
    assert not batch.inputs.requires_grad


class Odd(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


@pytest.mark.parametrize(
    ("function", "name"), [(torch.sin, r"aten\.sin"), (lambda x: x.mul(1.0).add_(1), r"aten\.add_.*overwrites")]
)
def test_an_operation_without_a_rule_is_named_with_its_module(tiny, function, name):
    source = TinySource(tiny[0].config)
    source.module.blocks[2].mlp[1] = Odd(function)
    with pytest.raises(UsageError, match=name) as raised:
        CheferCVPR21().attribute(source, *tiny[1:])
    assert "blocks.2.mlp.1" in str(raised.value)
    below = TinySource(tiny[0].config)
    below.module.embed = nn.Sequential(below.module.embed, Odd(torch.sin))
    CheferCVPR21().attribute(below, *tiny[1:])  # no relevance goes below the first attention


def test_what_is_not_a_plain_vit_is_refused(tiny):
    detector = TinyDetector()
    batch = detector.encode(tiny_samples(1))
    bound = detector.bind(detector.forward(batch), batch, Target())
    with pytest.raises(UsageError, match="defined for plain vision transformers"):
        CheferCVPR21().attribute(detector, batch, bound)

    windows = TinySource(tiny[0].config)
    label = windows.label
    windows.label = lambda *call: CallLabels((("sample", 1), ("window", 1)), label(*call).query, label(*call).key)
    with pytest.raises(UsageError, match="parts of an image"):
        CheferCVPR21().attribute(windows, *tiny[1:])

    short = TinySource(tiny[0].config)
    short.flow = lambda *_: [AttentionStep(CallKey(SITE, 7), STREAM, STREAM)]
    with pytest.raises(CaptureError, match="no softmax seen"):
        CheferCVPR21().attribute(short, *tiny[1:])

    loose = TinySource(tiny[0].config)
    loose.score = lambda *_: torch.ones(1)
    with pytest.raises(CaptureError, match="not computed from the inputs"):
        CheferCVPR21().attribute(loose, *tiny[1:])
