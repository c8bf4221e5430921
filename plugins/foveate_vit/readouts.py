"""Where a vision transformer's answer is read from, as weights over the queries of its encoder.

One word a rule; the registry's ``layout.readout`` (and ``layout.readouts`` by architecture) choose one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from foveate.errors import ModelError

if TYPE_CHECKING:
    import torch

RULES = ("cls", "cls + distillation", "cls + patch mean", "patch mean", "token mean", "pooling head")


def weights_of(rule: str, *, prefix: tuple[str, ...], tokens: int) -> torch.Tensor:
    """Weights over ``tokens`` queries, float32 ``(query,)``, summing to 1.

    ``cls + patch mean`` weighs both halves of DINOv2's concatenated classifier input equally.
    Raises ModelError for an unknown rule or one that the tokens do not allow.
    """
    import torch

    weights = torch.zeros(tokens)
    start = len(prefix)
    if rule == "cls" and "cls" in prefix:
        weights[prefix.index("cls")] = 1.0
    elif rule == "cls + distillation" and {"cls", "distillation"} <= set(prefix):
        weights[[prefix.index("cls"), prefix.index("distillation")]] = 0.5
    elif rule == "cls + patch mean" and "cls" in prefix:
        weights[start:] = 0.5 / (tokens - start)
        weights[prefix.index("cls")] = 0.5
    elif rule == "patch mean":
        weights[start:] = 1.0 / (tokens - start)
    elif rule == "token mean":
        weights[:] = 1.0 / tokens
    else:
        raise ModelError(
            f"readout {rule!r} does not fit tokens that begin with {prefix or 'patches'}",
            remedy=f"layout.readout is one of: {', '.join(RULES)}",
        )
    return weights
