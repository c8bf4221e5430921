"""How much each key receives from all queries: the column mean.

The mean over the whole matrix is 1/K for every model and image, so it says nothing; its columns do. Weights are
taken as they are (not renormalised over patches), so that a column of a full row-stochastic matrix has mean 1/K.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from foveate.interfaces import MetricInfo, TokenAxis
from foveate.metrics.rows import Reducible, as_float, nanmean

CITATION = "Xiao et al. 2024, Efficient Streaming Language Models with Attention Sinks, ICLR, sec. 3.1"


class ReceivedMass(Reducible):
    """r_j = mean_i A_ij over the captured queries."""

    info = MetricInfo(
        name="received_mass",
        summary="mean weight that a key receives from the queries (column mean)",
        unit="1",
        citation=CITATION,
        consumes=("query",),
        accumulate="mean",
        bounds=(0.0, 1.0),
        needs=("all_rows",),
    )
    reduction: ClassVar[str] = "received"
    over: ClassVar[Literal["all", "each"]] = "each"

    def kernel(self, rows: Any, *, query: TokenAxis | None = None, key: TokenAxis | None = None) -> Any:
        """``(..., query, key)`` to ``(..., key)``; NaN for keys that no query may see."""
        return nanmean(as_float(rows), axis=-2)

    def reduce(self, values: Any, count: Any) -> Any:
        """The column mean as captured."""
        return values
