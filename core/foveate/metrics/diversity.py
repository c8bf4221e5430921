"""How differently the heads of a layer attend.

The head mean hides this: the entropy of the mean row exceeds the mean entropy of the rows by exactly the
generalised Jensen-Shannon divergence between heads, which is therefore the cost of averaging.
"""

from __future__ import annotations

from typing import Any

from foveate.interfaces import Metric, MetricInfo, TokenAxis
from foveate.metrics.rows import entropy_of, namespace, normalise

CITATION = "Lin 1991, IEEE Trans. Inf. Theory 37, 145-151, eq. 5.1"


def jensen_shannon(rows: Any) -> tuple[Any, Any]:
    """Divergence between heads in nats and K, ``(..., head, query, key)`` to ``(..., query)``."""
    p, count = normalise(rows)
    xp = namespace(p)
    gap = entropy_of(xp.mean(p, axis=-3)) - xp.mean(entropy_of(p), axis=-2)
    return xp.clip(gap, 0, None), xp.amax(count, axis=-2)


class HeadDivergence(Metric):
    """JS(p_1 .. p_n) = H(mean_h p_h) - mean_h H(p_h)."""

    info = MetricInfo(
        name="head_divergence",
        summary="generalised Jensen-Shannon divergence between heads, at most ln min(heads, K)",
        unit="nat",
        citation=CITATION,
        consumes=("head", "key"),
        bounds=(0.0, float("inf")),
        needs=("heads",),
    )

    def kernel(self, rows: Any, *, query: TokenAxis | None = None, key: TokenAxis | None = None) -> Any:
        """``(..., head, query, key)`` to nats ``(..., query)``."""
        return jensen_shannon(rows)[0]


class HeadDiversity(Metric):
    """The same divergence over its largest possible value. NaN for one head."""

    info = MetricInfo(
        name="head_diversity",
        summary="Jensen-Shannon divergence between heads over ln min(heads, K); 0 = heads alike, 1 = disjoint",
        unit="1",
        citation=CITATION,
        consumes=("head", "key"),
        bounds=(0.0, 1.0),
        needs=("heads",),
    )

    def kernel(self, rows: Any, *, query: TokenAxis | None = None, key: TokenAxis | None = None) -> Any:
        """``(..., head, query, key)`` to ``(..., query)`` in [0, 1]."""
        gap, count = jensen_shannon(rows)
        xp = namespace(gap)
        heads = xp.full_like(count, float(rows.shape[-3]))
        ceiling = xp.log(xp.minimum(count, heads))
        return gap / xp.where(ceiling > 0, ceiling, xp.full_like(ceiling, float("nan")))
