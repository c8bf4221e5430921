"""The unit of statistics of clips: the video, not the window that was cut from it.

Windows of one recording show the same animal in the same light. Counting them as independent would shrink
intervals for nothing, so their scores are averaged first, and everything after that is one number a video.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

if TYPE_CHECKING:
    from numpy.typing import NDArray


def video_numbers(table: xr.Dataset | xr.DataArray) -> NDArray[np.intp] | None:
    """Number of each sample's video, in order of first appearance; None where samples are not of videos."""
    if "video" not in table.coords:
        return None
    names = [str(name) for name in table["video"].values]
    order = {name: number for number, name in enumerate(dict.fromkeys(names))}
    return np.array([order[name] for name in names], np.intp)


def mean_over_videos(scores: xr.DataArray) -> xr.DataArray:
    """``(..., sample, ...)`` with one entry a video: the mean over its samples; unchanged where there is no video.

    With a dim ``method``, over those samples that every method has; a method without any score of a video does not
    take part in what "every" means there and stays NaN. So no method looks better for lacking the hardest window.
    """
    number = video_numbers(scores)
    if number is None or len(np.unique(number)) == len(number):
        return scores
    rest = [dim for dim in scores.dims if dim not in ("method", "sample")]
    known = scores.notnull().any(rest) if rest else scores.notnull()
    videos = [np.flatnonzero(number == v) for v in range(number.max() + 1)]
    parts = [_one(scores.isel(sample=rows), known.isel(sample=rows)) for rows in videos]
    return xr.concat(parts, dim="sample").transpose(*scores.dims)


def _one(scores: xr.DataArray, known: xr.DataArray) -> xr.DataArray:
    """The mean of one video's samples."""
    if "method" in known.dims:
        takes_part = known.any("sample")
        scores = scores.where((known | ~takes_part).all("method"))
    return scores.drop_vars([name for name in scores.coords if "sample" in scores[name].dims]).mean(
        "sample", skipna=True
    )
