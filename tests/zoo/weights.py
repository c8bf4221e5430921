"""Weights for the zoo: random but alive, with q and k scaled until attention is peaked.

Random initialisation gives attention that is uniform to five digits, on which any comparison succeeds.
Every weight is drawn again with unit gain, biases and tables are made non-zero (a lost bias must matter),
then the q and k projections of each call grow until the median entropy of its rows is below
:data:`PEAKED` of ln K.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from foveate.capture.deformable import DeformableRecord
from foveate.capture.records import Record

PEAKED = 0.6
ROUNDS = 24
QK = re.compile(
    r"(^|[._])(q|k|qk|kv|qkv|q_a|q_b|kv_a|kv_b|query|key|query_key_value|in_proj|in_proj_weight|q_lin|k_lin|wq|wk|c_attn|"
    r"queries_keys_values|query_projection|key_projection|attention_weights|logit_scale|qkv_proj|q_norm|k_norm|"
    r"q_proj|k_proj|kv_proj|queries|keys|q_up|k_up|query_proj|key_proj|q_layernorm|k_layernorm|to_q|to_k|"
    r"[a-z]+_query|[a-z]+_key|[a-z]*_?q_proj|[a-z]*_?k_proj|[a-z]*_?kv_proj|sa_[qk]\w*|ca_[qk]\w*|[a-z]+_[qk]_(content|pos)_proj|"
    r"linear_q|linear_k|q_linear|k_linear|fc_q|fc_k|to_qkv|to_kv|q_pos_proj|k_pos_proj|query_layer|key_layer|proj_q|proj_k)"
    r"([._](weight|conv|linear|projection|weight_?\w*|\d+)*)*$"
)


@torch.no_grad()
def revive(module: nn.Module, seed: int = 0) -> None:
    """Draw all parameters again: matrices with gain 1, biases, tables and scales plainly non-zero."""
    draw = torch.Generator().manual_seed(seed)
    embeddings = {id(part.weight) for part in module.modules() if isinstance(part, nn.Embedding)}
    norms = {id(value) for part in module.modules() for value in _own(part) if _is_norm(part)}
    for name, value in module.named_parameters():
        if not value.is_floating_point() or value.is_meta or name.endswith("logit_scale"):
            continue
        fresh = torch.randn(value.shape, generator=draw, dtype=torch.float32).to(value.dtype)
        if id(value) in norms:
            value.copy_(0.1 * fresh + (0.0 if name.endswith("bias") else 1.0))
        elif id(value) in embeddings or value.dim() == 1 or not name.endswith("weight"):
            value.copy_(0.5 * fresh)
        else:
            value.copy_(fresh / math.sqrt(value[0].numel()))


def _own(module: nn.Module) -> Iterable[Tensor]:
    return module.parameters(recurse=False)


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower()


def peakedness(record: Record) -> float:
    """Median row entropy in units of ln K (over the sampling points of deformable attention); 0 for one key."""
    weights = record.weights if isinstance(record, DeformableRecord) else record.rows(slice(None))
    keys = weights.shape[-1]
    if keys < 2:
        return 0.0
    weights = weights.double()
    weights = weights / weights.sum(-1, keepdim=True)
    entropy = torch.special.entr(weights).sum(-1)
    entropy = entropy[entropy.isfinite()]
    return float(entropy.median() / math.log(keys)) if entropy.numel() else 0.0


@torch.no_grad()
def sharpen(
    module: nn.Module,
    run: Callable[[], list[Record]],
    extra: tuple[str, ...] = (),
    uniform: Iterable[str] = (),
) -> float:
    """Scale q and k of every call until it is peaked; the worst :func:`peakedness` left.

    ``run`` gives the records of a forward; ``uniform`` are patterns of modules to leave out. Later calls depend on earlier ones, so all are measured again each time.
    """
    worst = 1.0
    for _ in range(ROUNDS):
        flat = {}
        worst = 0.0
        for record in run():
            if any(fnmatchcase(record.name, pattern) for pattern in uniform):
                continue
            value = peakedness(record)
            worst = max(worst, value)
            if value >= PEAKED - 0.02:
                flat[record.name] = record
        if not flat:
            return worst
        grown: set[int] = set()
        for name in flat:
            for value in projections(module, name, extra):
                if id(value) not in grown:
                    grown.add(id(value))
                    _grow(value)
    return worst


def _grow(value: Tensor) -> None:
    if value.dim() <= 3 and value.numel() <= 64 and value.squeeze().dim() <= 1 and float(value.abs().max()) < 20:
        value += 0.3 if value.dim() >= 2 or value.numel() == 1 else 0.3 * value.sign()
    else:
        value *= 1.3


def projections(module: nn.Module, owner: str, extra: tuple[str, ...]) -> list[Any]:
    """Parameters of q and k next to a call: in its module, or else in the module around it; none further away."""
    for path in (owner, owner.rpartition(".")[0]):
        found = [
            value
            for name, value in module.get_submodule(path).named_parameters()
            if not name.endswith("bias") and (QK.search(name) or any(part in name for part in extra))
        ]
        if found:
            return found
    return []
