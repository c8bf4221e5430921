"""What a leaderboard about objects needs besides: fair means within an image, and the object's own place to beat.

The unit is the image, so its objects are averaged first, over those objects that all its methods have maps of;
else a method without a map of the hardest object would look better for it. And since objects are where boxes are,
a method explains something only if it beats the predicted box (or mask), filled evenly, as well as a random order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from foveate.stats.paired import Comparison, compare_family

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np
    import xarray as xr

OWN_PLACE = ("own_box", "own_mask")
"""Controls that know where the model put the object, and nothing else."""


def mean_over_objects(areas: xr.DataArray) -> xr.DataArray:
    """``(method, sample, target, ...)`` without ``target``: the mean over the objects that every method has.

    A method without any map of an image does not take part in what "every" means there; it stays NaN.
    """
    if "target" not in areas.dims:
        return areas
    rest = [dim for dim in areas.dims if dim not in ("method", "sample", "target")]
    known = areas.notnull().any(rest)
    takes_part = known.any("target")
    shared = (known | ~takes_part).all("method")
    return areas.where(shared).mean("target", skipna=True)


def beyond_own_place(
    column: Mapping[str, np.ndarray], ranked: Sequence[str], *, lower_is_better: bool, seed: int
) -> dict[str, dict[str, Comparison]]:
    """Each ranked method against each control of :data:`OWN_PLACE` that was scored: ``{control: {method: ...}}``.

    ``column`` holds scores a image ``(sample,)`` by method. One family of tests a control.
    """
    return {
        control: compare_family(
            {name: column[name] - column[control] for name in ranked}, lower_is_better=lower_is_better, seed=seed
        )
        for control in OWN_PLACE
        if control in column and ranked
    }
