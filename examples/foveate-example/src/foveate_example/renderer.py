"""A picture for a terminal: the readout row of one sample, each patch a character."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from foveate.errors import UsageError
from foveate.geometry import tokens_to_cells
from foveate.interfaces import Renderer

STEPS = " .:-=+*#%@"


class TextGrid(Renderer):
    """Characters of rising weight, on a scale that is printed."""

    name = "text"
    draws = "one sample's readout row, mean over heads, as characters"

    def render(
        self,
        selection: Any,
        *,
        out: Path,
        scale: str = "lift",
        sample: int = 0,
        site: str | None = None,
        layer: int = -1,
        **options: Any,
    ) -> Path:
        """Write ``sample`` of a run to a text file and return it. Raises UsageError for another scale."""
        if scale != "lift":
            raise UsageError(f"text: no scale {scale!r}", remedy="use 'lift'")
        chosen = site or selection.site_ids[0]
        stored = selection.site(chosen)["attention"].isel(sample=sample, layer=layer, query=0)
        row = stored.mean("head").values.astype(np.float64)
        values, _ = tokens_to_cells(row, selection.tokens(chosen))
        lift = values * row.size
        level = np.digitize(np.log2(np.maximum(lift, 1e-6)), np.linspace(-3, 3, len(STEPS) - 1))
        lines = ["".join(STEPS[i] * 2 for i in line) for line in level]
        rule = f"layer {int(stored.layer)}, mean over {selection.site(chosen).sizes['head']} heads, K = {row.size}"
        legend = f"'{STEPS}' from 1/8 to 8 times uniform"
        out = Path(out)
        out.write_text(
            "\n".join([f"{selection.model_id}, {chosen}, {rule}", legend, *lines, ""]), encoding="utf-8"
        )
        return out
