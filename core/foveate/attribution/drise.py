"""D-RISE: where must the picture stay visible for this object to be found? The model is a black box.

Random masks hide parts of the picture; each is weighted by how well the detector still finds the object, the
best of all its answers (Petsiuk et al., CVPR 2021, arXiv:2006.03204, sec. 3). The object may move to another
query: only boxes, classes and scores are read, so this follows the object by best match whatever the target.
Where no answer of its class touches the object, the similarity is 0.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F

from foveate.attribution.baselines import Baseline, make_baseline
from foveate.attribution.clips import Frames
from foveate.attribution.objective import Objective
from foveate.attribution.objects import own_predictions
from foveate.attribution.pixels import AGREEMENT, Cost, seed_agreement
from foveate.attribution.pooling import pixel_grid
from foveate.attribution.seeding import sample_seed
from foveate.detection.boxes import iou
from foveate.errors import UsageError
from foveate.geometry import regrid
from foveate.interfaces import Attribution, AttributionMap

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from foveate.interfaces import AttentionSource, Batch, BoundTarget, Prediction

MOMENTS = 4
"""Random cells along the time of a clip: what shows in one frame alone is seldom missed."""
PAPER_GRID = 16
"""Random cells a side of a mask in the paper, for images of some 800 pixels."""


@dataclass(frozen=True)
class DRise(Attribution):
    """Mean similarity of the best answer over the masks that show a place.

    ``masks`` are drawn for each image and seed (``repeats`` seeds, at least 2: their correlation says whether
    the map has converged) and serve all its objects. ``side`` is the number of random cells a side (None: 16 as
    in the paper, or the model's own cells where those are fewer), ``probability`` the chance that one is shown.
    Masks of clips are random in time too, with :data:`MOMENTS` random cells along it (or as many as the model has
    frame cells), and a track's likeness is the overlap of its masks over all frames.
    """

    name: ClassVar[str] = "drise"
    citation: ClassVar[str] = "Petsiuk et al., CVPR 2021, arXiv:2006.03204, eq. 2-5"
    diagnostics: ClassVar[tuple[str, ...]] = ("seed_spearman",)
    masks: int = 1000
    repeats: int = 2
    side: int | None = None
    probability: float = 0.5
    baseline: Baseline = "zero"
    rows: int | None = None

    def __post_init__(self) -> None:
        if self.masks < 1 or self.repeats < 2 or not 0.0 < self.probability < 1.0:
            raise UsageError(
                f"drise: expected masks >= 1, repeats >= 2 and a probability between 0 and 1; got "
                f"masks={self.masks}, repeats={self.repeats}, probability={self.probability}"
            )

    def attribute(
        self, source: AttentionSource, batch: Batch, bound: BoundTarget, *, seed: int = 0
    ) -> AttributionMap:
        """``masks * repeats`` forward passes an image. Raises UsageError where no row has a box or a mask."""
        objective = Objective(source, batch, bound, rows=self.rows)
        own = own_predictions(source, objective.batch, objective.bound)
        if not any(_usable(one) for one in own):
            raise UsageError("drise: the explained targets are not objects with a box or a mask")
        grid = source.cells(batch)
        maps = np.full((self.repeats, len(own), *objective.map_shape), np.nan)
        for rows in _by_image(objective, own):
            image = objective.take(rows[:1])
            targets = [one for one in (own[row] for row in rows) if one is not None]
            for repeat in range(self.repeats):
                number = sample_seed(seed + repeat, image.batch.ids[0])
                pixels = self._map(image, targets, torch.Generator().manual_seed(number))
                maps[repeat, rows] = regrid(pixels, pixel_grid(*pixels.shape[-2:]), grid)
        agreed = seed_agreement(maps)
        ok = agreed >= AGREEMENT  # NaN (never found, or no box) is not agreement
        info = {**self._record(objective), "seed": seed}
        info |= {"per_row": {"seed_spearman": agreed}, "converged_rows": ok}
        return AttributionMap(self.name, maps[0].astype(np.float32), grid, converged=bool(ok.all()), info=info)

    def cost(self, shape: tuple[int, ...]) -> Cost:
        """All masks of all seeds, for one object; further objects of an image cost nothing."""
        return Cost(self.masks * self.repeats)

    def _map(
        self, image: Objective, targets: Sequence[Prediction], generator: torch.Generator
    ) -> NDArray[np.float64]:
        """Similarity-weighted mean of the masks, ``(target, [frame cell,] y, x)``: eq. 2, E[M] of the masks drawn.

        Dividing by what the masks really showed keeps a map flat where nothing matters.
        """
        base, size = make_baseline(self.baseline, image), _size(image)
        total = torch.zeros(len(targets), *size, dtype=torch.float64)
        shown = torch.zeros(*size, dtype=torch.float64)
        for masks in self._draw(image, generator):
            visible = _over_frames(masks, image.frames).to(image.inputs)
            answers = _answers(image, visible * image.inputs + (1 - visible) * base)
            weights = torch.as_tensor(similarities(targets, answers))
            total += torch.einsum("mt,m...yx->t...yx", weights, masks.double())
            shown += masks.double().sum(0)
        return np.asarray((total / shown.clamp_min(1e-12)).numpy())

    def _draw(self, image: Objective, generator: torch.Generator) -> Iterator[torch.Tensor]:
        """Blocks of masks; draws do not depend on the blocks."""
        size, shape = image.rows(grad=False), _size(image)
        cells = self._cells(image.map_shape)
        for start in range(0, self.masks, size):
            count = min(size, self.masks - start)
            yield torch.stack([random_mask(cells, shape, self.probability, generator) for _ in range(count)])

    def _cells(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Random cells along ``([frame cell,] y, x)`` for maps of that shape."""
        moments = tuple(min(MOMENTS, frames) for frames in shape[:-2])
        if self.side is not None:
            return *moments, self.side, self.side
        return *moments, min(PAPER_GRID, shape[-2]), min(PAPER_GRID, shape[-1])

    def _record(self, objective: Objective) -> dict[str, Any]:
        shape = objective.map_shape
        cost = self.cost(shape)
        return {
            "citation": self.citation,
            "masks": self.masks,
            "repeats": self.repeats,
            "mask_cells": self._cells(shape),
            "probability": self.probability,
            "baseline": self.baseline,
            "scale": objective.bound.scale,
            "follows": "best match",
            "forward_passes": cost.forward,
            "backward_passes": 0,
            "evaluations_per_patch": cost.forward / math.prod(shape),
            **({"frame_cells": objective.frames} if objective.frames else {}),
        }


def random_mask(
    cells: Sequence[int], size: Sequence[int], probability: float, generator: torch.Generator
) -> torch.Tensor:
    """One mask in [0, 1], ``(y, x)``: random cells, enlarged bilinearly and shifted by a random part of a cell.

    RISE (Petsiuk, Das and Saenko, BMVC 2018, sec. 3.2): ``cells`` random bits are enlarged to one cell more than
    the image a side, and a crop of the image's ``size`` is taken at random. With three ``cells`` and sizes, also
    along time: ``(frame, y, x)``, trilinear.
    """
    bits = (torch.rand(1, 1, *cells, generator=generator) < probability).float()
    step = [-(-side // count) for side, count in zip(size, cells, strict=True)]
    large = [(count + 1) * one for count, one in zip(cells, step, strict=True)]
    mode = "bilinear" if len(large) == 2 else "trilinear"
    soft = F.interpolate(bits, size=large, mode=mode, align_corners=False)[0, 0]
    starts = [int(torch.randint(0, one, (1,), generator=generator)) for one in step]
    return soft[tuple(slice(start, start + side) for start, side in zip(starts, size, strict=True))]


def similarities(targets: Sequence[Prediction], answers: Sequence[Sequence[Prediction]]) -> NDArray[np.float64]:
    """How well each picture's best answer is each target, ``(picture, target)`` in [0, 1].

    Equation 3: overlap (IoU, of boxes, or of masks where a segmenter gives no boxes) times agreement of classes
    times score. Answers carry one class each: the paper's cosine of class vectors is 1 for the same class, else 0.
    """
    found = np.zeros((len(answers), len(targets)))
    for picture, row in enumerate(answers):
        row = [one for one in row if _usable(one)]
        if row:
            scores = np.array([one.score for one in row])
            same = np.array([[_same_class(target, one) for one in row] for target in targets])
            found[picture] = (_overlap(targets, row) * scores * same).max(1)
    return found


def _overlap(targets: Sequence[Prediction], answers: Sequence[Prediction]) -> NDArray[np.float64]:
    """Intersection over union, ``(target, answer)``."""
    if all(one.box is not None for one in (*targets, *answers)):
        places, boxes = (torch.tensor([o.box for o in some], dtype=torch.float64) for some in (targets, answers))
        return np.asarray(iou(places[:, None], boxes[None]).numpy())
    return np.array([[_mask_overlap(a.mask, b.mask) for b in answers] for a in targets])


def _mask_overlap(a: NDArray[np.bool_] | None, b: NDArray[np.bool_] | None) -> float:
    if a is None or b is None or a.shape != b.shape:
        return 0.0
    union = int((a | b).sum())
    return int((a & b).sum()) / union if union else 0.0


def _same_class(a: Prediction, b: Prediction) -> bool:
    return a.class_index == b.class_index if a.class_index is not None else a.label == b.label


def _usable(one: Prediction | None) -> bool:
    """Whether an answer says where its object is."""
    if one is None:
        return False
    return one.mask is not None if one.box is None else bool(np.isfinite(one.box).all())


def _size(image: Objective) -> tuple[int, ...]:
    """Size of a mask over the input: ``([frame cell,] y, x)``."""
    return (*image.map_shape[:-2], *image.inputs.shape[-2:])


def _over_frames(masks: torch.Tensor, frames: Frames) -> torch.Tensor:
    """Masks ``(mask, [frame cell,] y, x)`` over inputs: ``(mask, [frame,] 1, y, x)``."""
    return (masks[:, list(frames)] if frames else masks).unsqueeze(-3)


def _answers(image: Objective, inputs: torch.Tensor) -> list[list[Prediction]]:
    batch = image.batch.replace(inputs, [0] * len(inputs))
    with torch.no_grad():
        return image.source.predictions(image.source.forward(batch), batch)


def _by_image(objective: Objective, own: Sequence[Prediction | None]) -> list[list[int]]:
    """Rows with a usable box, those of one image together."""
    groups: list[list[int]] = []
    for row, one in enumerate(own):
        if not _usable(one):
            continue
        group = next((group for group in groups if _same_image(objective, group[0], row)), None)
        if group is None:
            groups.append([row])
        else:
            group.append(row)
    return groups


def _same_image(objective: Objective, a: int, b: int) -> bool:
    ids, inputs = objective.batch.ids, objective.inputs
    return ids[a] == ids[b] and torch.equal(inputs[a], inputs[b])
