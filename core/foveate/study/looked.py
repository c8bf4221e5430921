"""What a look found, whatever was looked at: a picture or a clip."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from foveate.interfaces import CallKey, Prediction
from foveate.render.panel import Panel, Rule
from foveate.render.style import Picture
from foveate.study.quick_check import Check

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from foveate.capture.trace import Trace


@dataclass(frozen=True, eq=False)
class Look:
    """What one look found. ``maps`` holds the drawn panels (values on the model's cells) by name."""

    model: str
    target: str
    score: float
    predictions: tuple[Prediction, ...]
    caveats: tuple[str, ...]
    maps: Mapping[str, Panel]
    rule: Rule
    check: Check
    picture: Picture
    seconds: float

    def save(self, out: Path | str) -> Path:
        """Write the figure: PNG, SVG or PDF by suffix."""
        return self.picture.save(out)

    def summary(self) -> dict[str, Any]:
        """Everything but the pixels, as plain values."""
        answers = [
            {"label": p.label, "score": p.score, "class_index": p.class_index, "object": p.object}
            for p in self.predictions
        ]
        return {
            "model": self.model,
            "target": self.target,
            "score": self.score,
            "predictions": answers,
            "rule": str(self.rule),
            "keys": self.rule.keys,
            "maps": {name: _strongest(panel) for name, panel in self.maps.items()},
            "deletion": asdict(self.check),
            "caveats": list(self.caveats),
            "seconds": round(self.seconds, 2),
        }

    def __str__(self) -> str:
        answers = [f"  {p.score:5.2f}  {p.label}{_object(p)}" for p in self.predictions[:5]]
        notes = [f"  - {caveat}" for caveat in self.caveats]
        said = f"{self.model} answers" if answers else f"{self.model} gives no answer"
        return "\n".join([said, *answers, str(self.rule), "caveats", *notes])

    def _repr_html_(self) -> str:
        image = base64.b64encode(self.picture.png()).decode()
        notes = "".join(f"<li>{html.escape(caveat)}</li>" for caveat in self.caveats)
        return f'<img style="max-width:100%" src="data:image/png;base64,{image}"/><ul>{notes}</ul>'


def _object(answer: Prediction) -> str:
    if answer.object is None:
        return ""
    if answer.track is not None:
        return f"  (track {answer.track}, object {answer.object})"
    return f"  (object query {answer.object})"


def _strongest(panel: Panel) -> dict[str, Any]:
    """Where a map is highest: centre of the cell in original pixels, and how many times uniform."""
    values, cells = panel.visible_values
    row, column = np.unravel_index(int(np.nanargmax(values)), values.shape)
    y, x = cells.centres
    lift = float(values[row, column] / panel.uniform)
    return {"grid": list(panel.values.shape), "peak": [float(y[row]), float(x[column])], "peak_lift": lift}


def sinks_of(traced: Trace, call: CallKey) -> tuple[int, float]:
    """Number of sink tokens in this layer and their share of all received attention, mean over heads."""
    from foveate.metrics.sinks import is_sink, sink_share

    with torch.no_grad():
        received = traced.record(call).stats().received[0].mean(dim=0).double().cpu().numpy()
    return int(np.sum(is_sink(received))), float(sink_share(received))


def evenness(weights: NDArray[np.float64]) -> float:
    """Entropy over ln K of non-negative weights, normalised to sum 1; NaN ones left out."""
    known = weights[np.isfinite(weights)].ravel()
    if known.size < 2 or known.sum() <= 0:
        return float("nan")
    share = known / known.sum()
    positive = share[share > 0]
    return float(-(positive * np.log(positive)).sum() / np.log(known.size))
