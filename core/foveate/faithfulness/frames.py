"""Which moments matter: frames are taken away, or given back, in the order of their importance.

Any importance of frames can be tested so: attention a frame receives, the weights of a tracker's time pooling, a
map summed over its pixels.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from foveate.errors import UsageError
from foveate.faithfulness.curves import Protocol
from foveate.faithfulness.scoring import Scores, Scoring, score_maps
from foveate.faithfulness.units import Unit

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from foveate.attribution.objective import Objective

FRAME_DELETION = Scoring(Protocol(baselines=("freeze", "mean")), unit=Unit("frames", value="mean"))
"""Kept frames stand in for deleted ones first, so that a clip never shows what no camera saw."""


def frame_curves(
    objective: Objective, importance: Mapping[str, NDArray[np.float64]], scoring: Scoring = FRAME_DELETION
) -> Scores:
    """Deletion and insertion of frame cells by each importance ``(target, frame cell)``, beside random orders.

    With ``steps`` of at least the number of frame cells, one vanishes at a time. Raises UsageError for images, or
    where an importance does not have one number a target row and frame cell.
    """
    shape = objective.map_shape
    if len(shape) != 3:
        raise UsageError("frame_curves: an image has no frames")
    maps = {}
    for name, values in importance.items():
        array = np.asarray(values, dtype=np.float64)
        if array.shape != (len(objective), shape[0]):
            raise UsageError(
                f"frame_curves: {name} has shape {array.shape}, expected ({len(objective)}, {shape[0]}): one "
                "number for each target row and frame cell"
            )
        maps[name] = np.repeat(array, shape[1] * shape[2], axis=1)
    unit = replace(scoring.unit, kind="frames", span=None, value="mean")
    return score_maps(objective, maps, objective.source.cells(objective.batch), replace(scoring, unit=unit))
