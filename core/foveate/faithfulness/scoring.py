"""All maps of one batch scored in one go: methods, controls and the random reference on the same pictures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from foveate.errors import UsageError
from foveate.faithfulness.curves import Protocol, perturbation_curves
from foveate.faithfulness.leaderboard import RANDOM
from foveate.faithfulness.orders import TIE_RULE, cell_order, random_maps
from foveate.faithfulness.units import CELLS, Unit

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from foveate.attribution.objective import Objective
    from foveate.geometry import CellGrid


@dataclass(frozen=True)
class Scoring:
    """Protocols, how many random orders an image is compared with, the seed of those and of ties, and the unit."""

    protocol: Protocol = field(default_factory=Protocol)
    random_orders: int = 20
    seed: int = 0
    unit: Unit = CELLS

    def record(self) -> dict[str, Any]:
        """What is stored beside every score; :meth:`~foveate.faithfulness.units.Unit.record` comes with clips."""
        return {
            "steps": self.protocol.steps,
            "baselines": list(self.protocol.baselines),
            "scales": list(self.protocol.scales),
            "random_orders": self.random_orders,
            "seed": self.seed,
            "ties": TIE_RULE,
            "area": "trapezoid over the fraction of cells changed",
        }


@dataclass(frozen=True, eq=False)
class Scores:
    """``curves`` float32 ``(target, method, mode, baseline, scale, step)`` in the order of ``methods``.

    The last method is "random": the mean over random orders. NaN where a method has no map.
    """

    methods: tuple[str, ...]
    curves: NDArray[np.float32]
    fractions: NDArray[np.float64]
    forwards: int


def score_maps(
    objective: Objective,
    maps: Mapping[str, NDArray[np.float64]],
    grid: CellGrid,
    scoring: Scoring,
    visible: NDArray[np.bool_] | None = None,
) -> Scores:
    """Score maps ``{name: (target, cell)}`` on the objective's bound targets, with the random reference.

    ``cell`` runs over the cells of ``grid``, of a clip frame cell after frame cell; ``scoring.unit`` says which of
    them vanish together. A row of a map that is NaN everywhere counts as missing. ``visible`` ``(target, cell)``
    are the cells that show the image; the others, padding, come last in every order. Raises UsageError where a map
    is called "random".
    """
    if RANDOM in maps:
        raise UsageError(f"a map cannot be called {RANDOM!r}: that is the reference")
    ids, units = objective.batch.ids, scoring.unit.of((*objective.map_shape[:-2], *grid.shape))
    orders, seed = scoring.random_orders, scoring.seed
    drawn = np.stack([random_maps(i, units.count, orders=orders, seed=seed) for i in ids], axis=1)
    own_values = [values if visible is None else np.where(visible, values, np.nan) for values in maps.values()]
    values = np.concatenate([units.pool(np.stack(own_values)), drawn]) if maps else drawn
    values = values if visible is None else np.where(units.any(visible), values, np.nan)
    curves = perturbation_curves(objective, cell_order(values, ids, seed=seed), grid, scoring.protocol, units)
    own = curves.values[: len(maps)]
    own[np.isnan(values[: len(maps)]).all(axis=-1)] = np.nan
    reference = curves.values[len(maps) :].mean(axis=0, keepdims=True)
    together = np.concatenate([own, reference]).swapaxes(0, 1)
    return Scores((*maps, RANDOM), together, curves.fractions, curves.forwards)
