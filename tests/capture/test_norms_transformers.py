"""Value paths of transformers' own models: found without names, equal to explicit vectors by their names."""

import pytest
import torch

from foveate.capture.norms import NormWeights, value_error
from foveate.capture.value_paths import ValueTap

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

ALL = slice(None)
VISION = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 32,
    "patch_size": 8,
}
MODELS = {
    "CLIPVision": {},
    "SiglipVision": {},
    "ViT": {},
    "DeiT": {},
    "Dinov2": {"layerscale_value": 0.3},
    "DINOv3ViT": {},
    "Beit": {"use_relative_position_bias": True, "layer_scale_init_value": 0.1},
    "Swin": {"patch_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4},
}


def opened(name):
    """A tiny random model with peaked attention, its tap and its paths on two images."""
    torch.manual_seed(0)
    options = MODELS[name] if name == "Swin" else {**VISION, **MODELS[name]}
    config = getattr(transformers, f"{name}Config")(**{"image_size": 32, **options})
    model = getattr(transformers, f"{name}Model")(config).eval()
    with torch.no_grad():
        for path, value in model.named_parameters():
            if path.endswith((".weight", ".bias")) and path.split(".")[-2] in QUERY_KEY:
                value.copy_(6 * torch.randn(value.shape) * 0.2)
    with torch.no_grad(), ValueTap(model) as tap:
        model(torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    return model, tap


QUERY_KEY = {"q_proj", "k_proj", "query", "key"}


@pytest.mark.parametrize("name", MODELS)
def test_contributions_add_up_to_the_modules_own_output(name):
    _, tap = opened(name)
    assert len(tap.paths) == len(tap.records) >= 2
    for path in tap.paths:
        rows = path.record.rows(ALL)
        entropy = -(rows * rows.clamp_min(1e-30).log()).sum(-1)
        pooled = path.shape.queries == 1
        assert pooled or entropy.median() < 0.6 * torch.tensor(float(path.shape.keys)).log()
        assert path.residual is not None
        assert value_error(path) < 1e-5
        assert pooled or NormWeights(path, "norm").mixing_ratio().isfinite().all()


def explicit(hidden, weights, value, out, heads):
    """||sum_h α^h_ij f^h(x_j)|| from named modules, ``(batch, query, key)``, one head at a time in float64."""
    v = hidden.double() @ value.weight.double().T + value.bias.double()
    size = v.shape[-1] // heads
    total = 0
    for h in range(heads):
        columns = slice(h * size, (h + 1) * size)
        moved = v[..., columns] @ out.weight.double()[:, columns].T
        total = total + weights[:, h, :, :, None].double() * moved[:, None]
    return total


def test_clip_by_its_own_names():
    model, tap = opened("CLIPVision")
    seen = []
    layer = model.get_submodule("encoder.layers.1")
    layer.layer_norm1.register_forward_hook(lambda module, args, out: seen.append((args[0], out)))
    with torch.no_grad():
        model(torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    (residual, hidden), attention = seen[0], layer.self_attn
    moved = explicit(hidden, tap.records[1].rows(ALL), attention.v_proj, attention.out_proj, 4)
    torch.testing.assert_close(NormWeights(tap.paths[1]).rows(ALL), moved.norm(dim=-1), atol=1e-6, rtol=1e-4)
    here = range(moved.shape[1])
    moved[:, here, here] += residual.double()
    found = NormWeights(tap.paths[1], "residual").rows(ALL)
    torch.testing.assert_close(found, moved.norm(dim=-1), atol=1e-5, rtol=1e-4)


def test_dinov2_with_its_layer_scale():
    model, tap = opened("Dinov2")
    layer = model.get_submodule("encoder.layer.1")
    seen = []
    layer.norm1.register_forward_hook(lambda module, args, out: seen.append(out))
    with torch.no_grad():
        model(torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    linear = {
        name.split(".")[-1]: m for name, m in layer.attention.named_modules() if isinstance(m, torch.nn.Linear)
    }
    value = linear.get("value") or linear["v_proj"]
    out = linear.get("dense") or linear["o_proj"]
    moved = explicit(seen[0], tap.records[1].rows(ALL), value, out, 4) * layer.layer_scale1.lambda1.double()
    torch.testing.assert_close(NormWeights(tap.paths[1]).rows(ALL), moved.norm(dim=-1), atol=1e-6, rtol=1e-4)
