"""The part of a row that never reached a patch.

The other metrics look at patch keys by default, scaled to sum to 1. What that leaves out is given here: the mass
on prefix tokens (CLS, registers, text) and a query's weight on itself. A CLS row may keep 99 % for itself.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from foveate.errors import UsageError
from foveate.interfaces import TOKEN_KINDS, Metric, MetricInfo, TokenAxis
from foveate.metrics.rows import like, namespace, normalise

CITATION = "Clark et al. 2019, What Does BERT Look at?, BlackboxNLP, sec. 3.2 (attention to separator tokens)"
_PATCH, _PADDING = TOKEN_KINDS.index("patch"), TOKEN_KINDS.index("padding")


def is_prefix(key: TokenAxis) -> NDArray[np.bool_]:
    """Which keys are neither patches nor padding, (key,)."""
    return np.asarray((key.kind != _PATCH) & (key.kind != _PADDING))


def itself(query: TokenAxis, key: TokenAxis) -> NDArray[np.intp]:
    """For each query the position of the same token among the keys, or -1 where it is not there or not unique."""
    names = _names(key)
    found: dict[tuple[object, ...], int] = {}
    for position, name in enumerate(names):
        found[name] = -1 if name in found else position
    return np.array([found.get(name, -1) for name in _names(query)], dtype=np.intp)


def _names(tokens: TokenAxis) -> list[tuple[object, ...]]:
    place = np.nan_to_num(np.stack([tokens.y, tokens.x]), nan=-1e9)
    labels = tokens.label or ("",) * len(tokens)
    columns = (tokens.kind, *place, tokens.level, tokens.frame)
    return list(zip(*(column.tolist() for column in columns), labels, strict=True))


class PrefixMass(Metric):
    """Share of the row's mass on tokens that are not patches."""

    info = MetricInfo(
        name="prefix_mass",
        summary="share of the row on keys that are not patches (CLS, registers, text)",
        unit="1",
        citation=CITATION,
        bounds=(0.0, 1.0),
        needs=("all_keys",),
    )

    def kernel(self, rows: Any, *, query: TokenAxis | None = None, key: TokenAxis | None = None) -> Any:
        """``(..., query, key)`` over all keys to ``(..., query)``."""
        if key is None:
            raise UsageError("prefix_mass: key tokens are missing", remedy="pass key= to the kernel")
        p = normalise(rows).p
        return namespace(p).sum(p * like(is_prefix(key), p), axis=-1)


class SelfMass(Metric):
    """A query's weight on its own token. NaN where the query is not one of the keys, or cannot be told apart."""

    info = MetricInfo(
        name="self_mass",
        summary="share of the row on the query's own token",
        unit="1",
        citation=CITATION,
        bounds=(0.0, 1.0),
        needs=("all_keys",),
    )

    def kernel(self, rows: Any, *, query: TokenAxis | None = None, key: TokenAxis | None = None) -> Any:
        """``(..., query, key)`` over all keys to ``(..., query)``."""
        if query is None or key is None:
            raise UsageError("self_mass: tokens are missing", remedy="pass query= and key= to the kernel")
        p = normalise(rows).p
        own = itself(query, key)
        pick = np.zeros((len(query), len(key)))
        pick[np.arange(len(query)), np.maximum(own, 0)] = np.where(own >= 0, 1.0, 0.0)
        return namespace(p).sum(p * like(pick, p), axis=-1) + like(np.where(own >= 0, 0.0, np.nan), p)
