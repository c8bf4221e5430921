"""Artefact tokens of one layer, and maps with and without them.

Some patch tokens of large vision transformers stop describing their patch: their norms stick out and they receive
attention from everywhere (Darcet et al. 2024). A fixed norm threshold fits one model only, so both signs are
measured by robust z-scores within each image, on patches alone: class and register tokens are meant to be
different. Maps are then reported twice, as they are and without the flagged tokens; neither is "the" map.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from foveate.errors import UsageError
from foveate.interfaces import TOKEN_KINDS, TokenAxis
from foveate.metrics.rows import as_float, like, namespace
from foveate.metrics.sinks import LIFT, ROBUST_Z, artefact_tokens, robust_z


@dataclass(frozen=True, eq=False)
class Artefacts:
    """What was found in one layer, all ``(..., key)``; NaN at tokens that were not asked about.

    ``received`` is the column mean of attention, ``received_z`` its robust z-score, ``norms`` and ``norm_z`` are
    those of the tokens' vectors (None where unknown). ``flagged`` are the tokens that stick out by ``rule``.
    """

    received: Any
    received_z: Any
    norms: Any
    norm_z: Any
    flagged: Any
    rule: str

    def summary(self) -> dict[str, Any]:
        """Plain values for a store: the rule, tokens flagged per image, their share of what all receive."""
        flagged, received = _numpy(self.flagged), _numpy(self.received)
        total = np.nansum(received, axis=-1)
        share = np.where(flagged, received, 0.0).sum(-1) / np.where(total > 0, total, np.nan)
        return {"rule": self.rule, "flagged": flagged.sum(-1).tolist(), "received_share": share.tolist()}


def find_artefacts(
    received: Any,
    norms: Any = None,
    *,
    key: TokenAxis | None = None,
    kinds: Sequence[str] = ("patch",),
    z: float = ROBUST_Z,
) -> Artefacts:
    """Flag tokens that receive like sinks and, where ``norms`` are given, stick out by norm as well.

    ``received`` and ``norms`` are ``(..., key)``, numpy or torch. With ``key``, only tokens of ``kinds`` are asked
    about. Raises UsageError where sizes do not agree or no token is of these kinds.
    """
    received = _restricted(received, key, kinds)
    norms = None if norms is None else _restricted(norms, key, kinds)
    if norms is not None and norms.shape[-1] != received.shape[-1]:
        raise UsageError(f"artefacts: {received.shape[-1]} columns of attention, {norms.shape[-1]} token norms")
    by_norm = "" if norms is None else f" and robust z of the token norm > {z:g}"
    return Artefacts(
        received,
        robust_z(received),
        norms,
        None if norms is None else robust_z(norms),
        artefact_tokens(received, norms, z=z),
        f"robust z of received mass > {z:g} and > {LIFT:g} x its mean{by_norm}, over {', '.join(kinds)} tokens",
    )


def without_tokens(rows: Any, flagged: Any) -> tuple[Any, Any]:
    """Rows ``(..., query, key)`` without the flagged keys, and what was removed ``(..., query)``.

    Flagged keys become NaN, which metrics do not count and pictures leave blank; the rest of each row is scaled
    to the total that the row had. A row that had nothing else has no distribution left: NaN. ``flagged`` is
    ``(..., key)`` with the leading axes of ``rows`` before ``query`` (1 where it is the same, such as heads).
    """
    rows = as_float(rows)
    xp = namespace(rows)
    drop = xp.asarray(flagged)[..., None, :]
    zero, nan = xp.zeros_like(rows), xp.full_like(rows, float("nan"))
    known = xp.where(xp.isnan(rows), zero, rows)
    kept = xp.where(drop, zero, known).sum(-1)
    removed = xp.where(drop, known, zero).sum(-1)
    scale = (kept + removed) / xp.where(kept > 0, kept, xp.full_like(kept, float("nan")))
    return xp.where(drop, nan, rows * scale[..., None]), removed


def _restricted(values: Any, key: TokenAxis | None, kinds: Sequence[str]) -> Any:
    """NaN at tokens of other kinds."""
    values = as_float(values)
    if key is None:
        return values
    if values.shape[-1] != len(key):
        raise UsageError(f"artefacts: {values.shape[-1]} values for {len(key)} tokens")
    asked = np.isin(key.kind, [TOKEN_KINDS.index(kind) for kind in kinds])
    if not asked.any():
        raise UsageError(f"artefacts: no token is of kind {', '.join(kinds)}")
    outside = like(np.where(asked, 0.0, np.nan), values)
    return values + outside


def _numpy(array: Any) -> Any:
    return array if isinstance(array, np.ndarray) else array.detach().cpu().numpy()
