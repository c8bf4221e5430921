"""Weights for the zoo: random but alive, with q and k scaled until attention is peaked.

Random initialisation gives attention that is uniform to five digits, on which any comparison succeeds.
Every weight is drawn again with unit gain, biases and tables are made non-zero (a lost bias must matter),
then the q and k projections of each call grow until the median entropy of its rows is below
:data:`PEAKED` of ln K.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from foveate.capture.deformable import DeformableRecord
from foveate.capture.records import Record

PEAKED = 0.6
ROUNDS = 24
QK_WORDS = frozenset(("q", "k", "kv", "qk", "qkv", "wq", "wk", "query", "key", "queries", "keys"))
QK_NAMES = ("in_proj_weight", "c_attn", "attention_weights", "logit_scale")
"""How parameters of q and k are called: one of these words, or a name that contains one of these."""


@torch.no_grad()
def revive(module: nn.Module, seed: int = 0) -> None:
    """Draw all parameters again: matrices with gain 1, biases, tables and scales plainly non-zero."""
    draw = torch.Generator().manual_seed(seed)
    embeddings = {id(part.weight) for part in module.modules() if isinstance(part, nn.Embedding)}
    norms = {id(v) for part in module.modules() if _is_norm(part) for v in part.parameters(recurse=False)}
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

    ``run`` gives the records of a forward; ``uniform`` are patterns of modules to leave out. Later calls depend
    on earlier ones, so all are measured again each time.
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
            for part, value in projections(module, name, extra):
                if id(value) not in grown:
                    grown.add(id(value))
                    _grow(part, value)
    return worst


def _grow(name: str, value: Tensor) -> None:
    """Scores grow with the product of the factors of q and k; a logarithm of a scale grows by addition."""
    if name.endswith("logit_scale"):
        value += 0.3
    else:
        value *= 1.3


def projections(module: nn.Module, owner: str, extra: tuple[str, ...]) -> list[tuple[str, Tensor]]:
    """Parameters of q and k next to a call: in its module, or else in the module around it; none further away."""
    for path in (owner, owner.rpartition(".")[0]):
        found = [
            (name, value)
            for name, value in module.get_submodule(path).named_parameters()
            if not name.endswith("bias") and _makes_scores(name, extra)
        ]
        if found:
            return found
    return []


def _makes_scores(name: str, extra: tuple[str, ...]) -> bool:
    words = name.replace(".", "_").split("_")
    return not QK_WORDS.isdisjoint(words) or any(part in name for part in (*QK_NAMES, *extra))
