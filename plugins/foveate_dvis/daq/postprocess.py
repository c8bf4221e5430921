"""From class and mask logits to answers: the best pairs of track and class, masks over the original pixels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from foveate.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Answers:
    """The best pairs of track and class. A track stands in several answers where several of its classes score.

    ``scores`` (answer,), probabilities; ``labels`` (answer,), class numbers; ``index`` (answer,): row of the
    track in the logits given; ``masks`` bool (answer, frame, y, x) over original pixels.
    """

    scores: Tensor
    labels: Tensor
    index: Tensor
    masks: Tensor


def best_pairs(logits: Tensor, max_num: int, *, upstream_exact: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Scores, labels and track rows of the ``max_num`` best pairs of track and class.

    By softmax of ``logits`` (track, class + 1), the last class ("no object") left out.

    Best first, equals in the order of track and class; fewer where there are fewer pairs. ``upstream_exact``:
    raises ModelError there, as upstream's top-k does.
    """
    scores = logits.softmax(dim=-1)[:, :-1]
    classes = scores.shape[-1]
    flat = scores.flatten()
    if upstream_exact and len(flat) < max_num:
        raise ModelError(
            f"{len(logits)} tracks of {classes} classes are {len(flat)} pairs: fewer than the {max_num} answers "
            "asked for, where upstream fails",
            remedy="upstream_exact=False gives the answers that there are",
        )
    best, index = torch.sort(flat, descending=True, stable=True)
    best, index = best[:max_num], index[:max_num]
    return best, index % classes, index // classes


def full_masks(
    masks: Tensor, padded: tuple[int, int], shown: tuple[int, int], original: tuple[int, int]
) -> Tensor:
    """Mask logits (track, frame, y/4, x/4) over original pixels, float (track, frame, y, x).

    Bilinear to the ``padded`` size of the model's input, cropped to what the picture took of it (``shown``),
    bilinear to the ``original`` size; all (height, width).
    """
    large = F.interpolate(masks, size=padded, mode="bilinear", align_corners=False)
    crop = large[..., : shown[0], : shown[1]]
    return F.interpolate(crop, size=original, mode="bilinear", align_corners=False)


def answer(
    logits: Tensor,
    masks: Tensor,
    *,
    max_num: int,
    padded: tuple[int, int],
    shown: tuple[int, int],
    original: tuple[int, int],
    upstream_exact: bool = False,
) -> Answers:
    """Class logits (track, class + 1) and mask logits (track, frame, y/4, x/4) to answers. No track: no answer."""
    scores, labels, index = best_pairs(logits, max_num, upstream_exact=upstream_exact)
    shape = (len(index), masks.shape[1], *original)
    found = torch.zeros(shape, dtype=torch.bool, device=masks.device)
    for track in index.unique().tolist():  # one at a time: original pixels of every frame are many
        found[index == track] = full_masks(masks[track][None], padded, shown, original)[0] > 0
    return Answers(scores, labels, index, found)
