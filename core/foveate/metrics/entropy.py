"""How evenly a row spreads over its keys, in information terms.

Entropy grows with the number of keys, so that 5.5 nats is the most a 16 x 16 grid can have and half of what
matters on another: compare ``entropy_normalised`` (or the effective number over K) between grids.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from foveate.interfaces import MetricInfo, TokenAxis
from foveate.metrics.rows import Reducible, entropy_of, namespace, normalise

SHANNON = "Shannon 1948, A Mathematical Theory of Communication, sec. 6"


class Entropy(Reducible):
    """H = -sum_j p_j ln p_j."""

    info = MetricInfo(
        name="entropy",
        summary="Shannon entropy of the row, at most ln K",
        unit="nat",
        citation=SHANNON,
        bounds=(0.0, float("inf")),
    )
    reduction: ClassVar[str] = "entropy"
    over: ClassVar[Literal["all", "each"]] = "all"

    def kernel(self, rows: Any, *, query: TokenAxis | None = None, key: TokenAxis | None = None) -> Any:
        """``(..., query, key)`` to nats ``(..., query)``."""
        return entropy_of(normalise(rows).p)

    def reduce(self, values: Any, count: Any) -> Any:
        """The entropy as captured."""
        return values


class EntropyNormalised(Reducible):
    """H / ln K: 0 for one key, 1 for all keys alike, whatever the grid. NaN where K is 1."""

    info = MetricInfo(
        name="entropy_normalised",
        summary="entropy over its largest possible value, H / ln K (Pielou's evenness)",
        unit="1",
        citation="Pielou 1966, J. Theor. Biol. 13, 131-144",
        bounds=(0.0, 1.0),
    )
    reduction: ClassVar[str] = "entropy"
    over: ClassVar[Literal["all", "each"]] = "all"

    def kernel(self, rows: Any, *, query: TokenAxis | None = None, key: TokenAxis | None = None) -> Any:
        """``(..., query, key)`` to ``(..., query)`` in [0, 1]."""
        p, count = normalise(rows)
        return self.reduce(entropy_of(p), count)

    def reduce(self, values: Any, count: Any) -> Any:
        """H / ln K."""
        xp = namespace(values)
        ceiling = xp.log(count)
        return values / xp.where(ceiling > 0, ceiling, xp.full_like(ceiling, float("nan")))


class EffectiveNumber(Reducible):
    """exp(H): how many equally weighted keys would have this entropy."""

    info = MetricInfo(
        name="effective_number",
        summary="effective number of keys, exp(H) (Hill number of order 1), from 1 to K",
        unit="key",
        citation="Hill 1973, Ecology 54, 427-432, eq. 5",
        bounds=(1.0, float("inf")),
    )
    reduction: ClassVar[str] = "entropy"
    over: ClassVar[Literal["all", "each"]] = "all"

    def kernel(self, rows: Any, *, query: TokenAxis | None = None, key: TokenAxis | None = None) -> Any:
        """``(..., query, key)`` to keys ``(..., query)``."""
        return self.reduce(entropy_of(normalise(rows).p), None)

    def reduce(self, values: Any, count: Any) -> Any:
        """exp(H)."""
        return namespace(values).exp(values)
