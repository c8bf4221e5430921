"""A metric is a few lines on complete rows; foveate labels, streams and stores its results."""

from __future__ import annotations

from typing import Any

import numpy as np

from foveate.interfaces import Metric, MetricInfo, TokenAxis


class BorderLift(Metric):
    """Mass on the outermost patches over their share of all patches: above 1, a head prefers the border."""

    info = MetricInfo(
        name="border_lift",
        summary="mass on the outermost patches over their share of the patches; 1 = uniform",
        unit="1",
        citation="this example",
        bounds=(0.0, float("inf")),
        needs=("key_positions",),
    )

    def kernel(self, rows: Any, *, query: TokenAxis | None = None, key: TokenAxis | None = None) -> Any:
        """``(..., key)``, numpy or torch, to ``(...)``."""
        if key is None:
            raise ValueError("border_lift: needs the positions of the keys")
        patches = key.where("patch")
        y, x = key.y[patches], key.x[patches]
        outer = np.isin(y, (y.min(), y.max())) | np.isin(x, (x.min(), x.max()))
        mass = rows[..., patches]
        return mass[..., np.flatnonzero(outer)].sum(-1) / mass.sum(-1) / outer.mean()
