"""The explicit float64 twin of a tiny source, whatever spelling of attention it uses."""

from dataclasses import replace

from foveate.testing.oracles import explicit_tiny_vit
from foveate.testing.tiny import TinyViT

RENAMED = (("in_proj_", "qkv."), ("out_proj.", "proj."))


def explicit(source, batch):
    """Logits and A of each layer ``(sample, head, query, key)``, in float64 and in the graph."""
    state = {}
    for name, value in source.module.state_dict().items():
        for old, new in RENAMED:
            name = name.replace(old, new)
        state[name] = value
    twin = TinyViT(replace(source.config, style="sdpa"))
    twin.load_state_dict(state)
    return explicit_tiny_vit(twin, batch.inputs.detach())
