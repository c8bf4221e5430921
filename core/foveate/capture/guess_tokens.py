"""Where tokens lie: from the pixels that reach each of them."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from foveate.capture.guess_sources import Roots
from foveate.interfaces import TOKEN_KINDS, TokenAxis


def tokens_from_pixels(pixels: Tensor, count: int, size: tuple[int, ...]) -> TokenAxis:
    """Token table of a stream from ``pixels`` ``(pixel,)``, the token that each pixel reaches (-1: none).

    ``size`` is (y, x) or (frame, y, x) of the input. A token's box bounds its pixels. Tokens that no pixel
    reaches are learned: the first is called ``cls``, others ``register``.
    """
    frames, height, width = (1, *size) if len(size) == 2 else size
    place = np.full((3, 2, count), np.nan)  # (frame, y, x) x (low, high) x token
    token = pixels.numpy().reshape(frames, height, width)
    for axis, coordinate in enumerate(np.indices(token.shape)):
        place[axis] = _bounds(coordinate[token >= 0], token[token >= 0], count)
    seen = np.isfinite(place[0, 0])
    kind = np.where(seen, TOKEN_KINDS.index("patch"), TOKEN_KINDS.index("register")).astype(np.uint8)
    learned = np.flatnonzero(~seen)
    kind[learned[:1]] = TOKEN_KINDS.index("cls")
    single = (place[0, 0] == place[0, 1]) & (frames > 1)
    (y0, y1), (x0, x1) = place[1], place[2]
    return TokenAxis(
        kind,
        y=((y0 + y1 + 1) / 2).astype(np.float32),
        x=((x0 + x1 + 1) / 2).astype(np.float32),
        height=(y1 - y0 + 1).astype(np.float32),
        width=(x1 - x0 + 1).astype(np.float32),
        level=np.where(seen, 0, -1).astype(np.int32),
        frame=np.where(single, np.nan_to_num(place[0, 0], nan=-1), -1).astype(np.int32),
    )


def _bounds(values: NDArray[np.intp], token: NDArray[np.int64], count: int) -> NDArray[np.float64]:
    """Least and greatest value of each token, (2, token); NaN where it has none."""
    low, high = np.full(count, np.inf), np.full(count, -np.inf)
    np.minimum.at(low, token, values)
    np.maximum.at(high, token, values)
    bounds = np.stack([low, high])
    return np.where(np.isfinite(bounds), bounds, np.nan)


def tokens_by_grid(count: int, size: tuple[int, int]) -> TokenAxis | None:
    """A guess from numbers alone: up to 8 learned tokens, then a grid with the input's proportions.

    For models whose stem overlaps, so that pixels do not name their token. None where no grid fits.
    """
    height, width = size
    for prefix in range(min(9, count)):
        rows = round(((count - prefix) * height / width) ** 0.5)
        if (
            rows
            and (count - prefix) % rows == 0
            and abs((count - prefix) // rows * height - rows * width) < height
        ):
            columns = (count - prefix) // rows
            parts = [TokenAxis.of_kind("cls", min(prefix, 1)), TokenAxis.of_kind("register", max(prefix - 1, 0))]
            return TokenAxis.concat(*parts, TokenAxis.patches(rows, columns, height=height, width=width))
    return None


def tokens_by_roots(count: int, roots: Roots, *, whole: bool) -> TokenAxis:
    """Tokens without a place: learned queries, words where ``whole`` numbers came in, else patches."""
    if roots and all(root.kind == "parameter" for root in roots):
        return TokenAxis.of_kind("pool" if count == 1 else "object", count)
    return TokenAxis.of_kind("text" if whole else "patch", count)


def image_size(tensor: Tensor | None) -> tuple[int, ...] | None:
    """(y, x) of an image batch, (frame, y, x) of a clip batch, None for anything else."""
    if tensor is None or not torch.is_floating_point(tensor) or tensor.dim() not in (4, 5):
        return None
    size = tensor.shape
    return (int(size[2]), int(size[3])) if len(size) == 4 else (int(size[1]), int(size[3]), int(size[4]))
