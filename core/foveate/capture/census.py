"""An independent count of attention: every softmax, SDPA, grid-sample and fused kernel that torch ran.

The tap could overlook a call and then certify its own blindness. The census does not use the tap: a
``TorchDispatchMode`` sees the kernels themselves, below Python, and each must belong to a declared site or
be ignored by the source with a stated reason.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from foveate.capture.claims import Claims
from foveate.capture.owners import Owners
from foveate.interfaces import AttentionSource, Batch

ATTENTION_KERNELS = ("_scaled_dot_product_", "_native_multi_head_attention", "_transformer_encoder_layer_fwd")
SOFTMAX_KERNELS = ("_softmax", "_safe_softmax")
JOIN = " + "
SAMPLING_KERNELS = ("grid_sampler_2d", "grid_sampler_3d", "_grid_sampler_2d_cpu_fallback")


@dataclass(frozen=True)
class CensusRow:
    """``count`` dispatches of ``kernel`` in module ``owner``, and who answers for them.

    ``claim`` is a site id (several where one module attends for several sites), ``ignored: <reason>``, or empty
    where nobody does.
    """

    owner: str
    kernel: str
    count: int
    claim: str


class Census(TorchDispatchMode):
    """Counts (owner, kernel) of everything that could be attention."""

    def __init__(self, owners: Owners) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: Counter[tuple[str, str]] = Counter()
        self._owners = owners

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Count, and run the kernel."""
        name = func.__name__.split(".")[0]
        if name in SOFTMAX_KERNELS or name in SAMPLING_KERNELS or name.startswith(ATTENTION_KERNELS):
            self.seen[self._owners.current() or "", name] += 1
        return func(*args, **(kwargs or {}))


def census(source: AttentionSource, batch: Batch) -> tuple[CensusRow, ...]:
    """Run one plain forward and say of each kernel that could be attention who answers for it."""
    counter = Census(Owners(source.module))
    with torch.no_grad(), counter:
        source.forward(batch)
    claims = Claims(source)
    return tuple(
        CensusRow(owner, kernel, count, _claim(claims, owner))
        for (owner, kernel), count in sorted(counter.seen.items())
    )


def softmax_calls(rows: tuple[CensusRow, ...]) -> Counter[str]:
    """By site id: how often attention weights were computed, one for each softmax or fused kernel."""
    counts: Counter[str] = Counter()
    for row in rows:
        if row.claim and not row.claim.startswith("ignored") and row.kernel not in SAMPLING_KERNELS:
            sites = row.claim.split(JOIN)
            for site in sites:  # a module that attends several times runs each of its softmaxes as often
                counts[site] += row.count // len(sites)
    return counts


def _claim(claims: Claims, owner: str) -> str:
    found = claims.sites(owner)
    if found:
        return JOIN.join(dict.fromkeys(site.id for site in found))
    reason = claims.ignored(owner)
    return "" if reason is None else f"ignored: {reason}"
