"""Attention sinks and artefact tokens: keys that receive far more than their share, whatever the picture shows.

A sink is flagged by two rules at once, both fixed here: a robust z-score above 3.5 (median and median absolute
deviation; the cut-off of Iglewicz and Hoaglin) and at least five times the mean of the keys. The first alone
flags the tail of any skewed distribution, the second alone depends on how peaked the model is.
High-norm artefact tokens (Darcet et al. 2024) are the same question asked of token norms.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from foveate.interfaces import MetricInfo, TokenAxis
from foveate.metrics.received import ReceivedMass
from foveate.metrics.rows import Reducible, as_float, median, namespace, nanmean

ROBUST_Z = 3.5
LIFT = 5.0
CITATION = (
    "Iglewicz and Hoaglin 1993, How to Detect and Handle Outliers, ch. 3 (robust z, cut-off 3.5); "
    "Xiao et al. 2024, ICLR (sinks); Darcet et al. 2024, Vision Transformers Need Registers, ICLR (artefacts)"
)


def robust_z(values: Any) -> Any:
    """(x - median) / (1.4826 MAD) over the last axis, ignoring NaN.

    Where more than half of the values are equal the MAD is 0 and 1.2533 times the mean absolute deviation
    stands in (Iglewicz and Hoaglin 1993, sec. 3.3); where all are equal every score is 0.
    """
    values = as_float(values)
    xp = namespace(values)
    centred = values - median(values)[..., None]
    mad = 1.4826 * median(xp.abs(centred))
    mean = 1.2533 * nanmean(xp.abs(centred), axis=-1)
    scale = xp.where(mad > 0, mad, mean)[..., None]
    scores = centred / xp.where(scale > 0, scale, xp.ones_like(scale))
    return xp.where(xp.isnan(scale), scale, scores)


def is_sink(received: Any, *, z: float = ROBUST_Z, lift: float = LIFT) -> Any:
    """Which keys are sinks, from what they receive: ``(..., key)`` to bool ``(..., key)``."""
    share = as_float(received)
    return (robust_z(share) > z) & (share > lift * nanmean(share, axis=-1)[..., None])


def artefact_tokens(received: Any, norms: Any = None, *, z: float = ROBUST_Z) -> Any:
    """Patch tokens that behave as artefacts: they receive like sinks and, where ``norms`` are known, stick out
    by norm as well. Both ``(..., key)``, to bool ``(..., key)``.
    """
    flagged = is_sink(received, z=z)
    return flagged if norms is None else flagged & (robust_z(norms) > z)


def sink_share(received: Any) -> Any:
    """Share of the received mass on sinks, ``(..., key)`` to ``(...)``; NaN where nothing was received."""
    share = as_float(received)
    xp = namespace(share)
    zero = xp.zeros_like(share)
    total = xp.sum(xp.where(xp.isnan(share), zero, share), axis=-1)
    flagged = xp.sum(xp.where(is_sink(share), share, zero), axis=-1)
    return flagged / xp.where(total > 0, total, xp.full_like(total, float("nan")))


class _FromReceived(Reducible):
    reduction: ClassVar[str] = "received"
    over: ClassVar[Literal["all", "each"]] = "each"

    def kernel(self, rows: Any, *, query: TokenAxis | None = None, key: TokenAxis | None = None) -> Any:
        """From rows ``(..., query, key)``, all queries at once."""
        return self.reduce(ReceivedMass().kernel(rows), None)


class SinkScore(_FromReceived):
    """Robust z-score of what each key receives."""

    info = MetricInfo(
        name="sink_score",
        summary="robust z-score of the mass a key receives",
        unit="robust sd",
        citation=CITATION,
        consumes=("query",),
        needs=("all_rows",),
    )

    def reduce(self, values: Any, count: Any) -> Any:
        """``(..., key)`` to ``(..., key)``."""
        return robust_z(values)


class SinkMass(_FromReceived):
    """Share of the mass that goes to sinks."""

    info = MetricInfo(
        name="sink_mass",
        summary="share of the received mass on sinks (robust z > 3.5 and > 5 x the mean of the keys)",
        unit="1",
        citation=CITATION,
        consumes=("query", "key"),
        bounds=(0.0, 1.0),
        needs=("all_rows",),
    )

    def reduce(self, values: Any, count: Any) -> Any:
        """``(..., key)`` to ``(...)``."""
        return sink_share(values)


class SinkCount(_FromReceived):
    """Number of sinks."""

    info = MetricInfo(
        name="sink_count",
        summary="number of keys that are sinks (robust z > 3.5 and > 5 x the mean of the keys)",
        unit="key",
        citation=CITATION,
        consumes=("query", "key"),
        bounds=(0.0, float("inf")),
        needs=("all_rows",),
    )

    def reduce(self, values: Any, count: Any) -> Any:
        """``(..., key)`` to keys ``(...)``."""
        values = as_float(values)
        xp = namespace(values)
        sinks = xp.sum(xp.where(is_sink(values), xp.ones_like(values), xp.zeros_like(values)), axis=-1)
        known = ~xp.isnan(nanmean(values, axis=-1))
        return xp.where(known, sinks, xp.full_like(sinks, float("nan")))
