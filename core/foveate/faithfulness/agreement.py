"""How much each method agrees with Captum's maps, beyond what any two images' maps have in common.

Agreement is not faithfulness: two methods can share a mistake, and a method that follows the model closely
may be the one that disagrees. So this is a column beside the ranking, never the ranking, and it stands
between two ceilings: how much Captum's methods agree with each other, and how much a sampled method agrees
with itself under another seed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

from foveate.faithfulness.videos import mean_over_videos
from foveate.stats.agreement import SPEARMAN, TOP_OVERLAP, agreement
from foveate.stats.intervals import Interval, bootstrap_mean

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

MEASURES = (SPEARMAN, TOP_OVERLAP)


def captum_agreement(
    maps: Mapping[str, NDArray[np.float64]],
    captum: Sequence[str],
    samples: Sequence[str],
    *,
    videos: Sequence[str] | None = None,
    seed: int = 0,
) -> xr.Dataset:
    """Agreement of every method with every Captum method.

    ``maps`` holds values on the model's cells, ``(sample, target, cell)``, NaN where a map is missing.
    Returns ``own`` and ``null`` ``(measure, method, captum, sample)``, means over targets: the agreement on
    one image, and the mean agreement across different images. A method beside itself is NaN.

    ``videos`` names the video of each sample: then the null is across different videos, and
    intervals are over videos.
    """
    shape = (len(MEASURES), len(maps), len(captum), len(samples))
    own, null = np.full(shape, np.nan), np.full(shape, np.nan)
    for m, measure in enumerate(MEASURES):
        for i, (name, a) in enumerate(maps.items()):
            for j, other in enumerate(captum):
                if name != other:
                    pairs = [
                        agreement(a[:, t], maps[other][:, t], measure, groups=videos, seed=seed)
                        for t in range(a.shape[1])
                    ]
                    own[m, i, j] = _mean([pair.own for pair in pairs])
                    null[m, i, j] = _mean([pair.null for pair in pairs])
    dims = ("measure", "method", "captum", "sample")
    return xr.Dataset(
        {"own": (dims, own), "null": (dims, null)},
        coords={
            "measure": [measure.name for measure in MEASURES],
            "method": list(maps),
            "captum": list(captum),
            "id": ("sample", list(samples)),
            **({"video": ("sample", list(videos))} if videos is not None else {}),
        },
        attrs={
            "ties": "expected value over random tie breaking",
            "null": f"same pair of methods, maps of different {'images' if videos is None else 'videos'}",
        },
    )


def excess(table: xr.Dataset, method: str, measure: str = "spearman", *, seed: int = 0) -> Interval:
    """One method's agreement with Captum beyond the null, mean over Captum's methods, interval over images."""
    return bootstrap_mean(_excess(table, measure).sel({"method": method}).mean("captum").values, seed=seed)


def captum_ceiling(table: xr.Dataset, measure: str = "spearman", *, seed: int = 0) -> Interval:
    """What Captum's methods reach among themselves, beyond the same null."""
    among = _excess(table, measure).sel({"method": table["captum"].values})
    return bootstrap_mean(among.mean(["method", "captum"]).values, seed=seed)


def by_pair(table: xr.Dataset, *, seed: int = 0) -> list[dict[str, str | float]]:
    """Every method with every Captum method: means of own and null, the excess with its interval."""
    rows: list[dict[str, str | float]] = []
    for measure in map(str, table["measure"].values):
        for method in map(str, table["method"].values):
            for captum in map(str, table["captum"].values):
                pair = table.sel({"measure": measure, "method": method, "captum": captum})
                own, null = (mean_over_videos(pair[name]).values for name in ("own", "null"))
                beyond = bootstrap_mean(own - null, seed=seed)
                if np.isfinite(own).any():
                    names: dict[str, str | float] = {"measure": measure, "method": method, "captum": captum}
                    numbers = {
                        "own": float(np.nanmean(own)),
                        "null": float(np.nanmean(null)) if beyond.n else np.nan,
                    }
                    rows.append({**names, **numbers, "excess": beyond.estimate, **_bounds(beyond)})
    return rows


def _bounds(one: Interval) -> dict[str, float]:
    return {"low": one.low, "high": one.high, "n": one.n}


def _excess(table: xr.Dataset, measure: str) -> xr.DataArray:
    return mean_over_videos((table["own"] - table["null"]).sel(measure=measure))


def _mean(columns: list[NDArray[np.float64]]) -> NDArray[np.float64]:
    """Mean over targets that exist, (sample,)."""
    table = np.stack(columns)
    known = np.isfinite(table)
    with np.errstate(invalid="ignore"):
        return np.asarray(np.where(known, table, 0.0).sum(axis=0) / known.sum(axis=0))
