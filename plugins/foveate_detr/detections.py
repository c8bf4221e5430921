"""What a detector said, in one form for all of the family: class logits, boxes in original pixels, masks.

Boxes are (top, left, bottom, right) in edge coordinates of the original image, differentiable in the
model's outputs. Detectors with a softmax keep a last "no object" class, which is no answer of an object; the
others score every class by its own sigmoid.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from foveate.errors import CaptureError

if TYPE_CHECKING:
    from torch import Tensor

    from foveate.geometry import Geometry

Activation = Literal["softmax", "sigmoid"]
Frame = Literal["image", "input"]
"""What a model's normalised boxes are relative to: the image without its padding, or the whole padded input."""


@dataclass(frozen=True, eq=False)
class Detections:
    """``logits`` (sample, query, class), with "no object" last where ``activation`` is softmax.

    ``boxes`` is (sample, query, 4) or None; ``masks`` are mask logits (sample, query, y, x) on a grid that
    tiles the model's input, or None.
    """

    logits: Tensor
    activation: Activation
    boxes: Tensor | None = None
    masks: Tensor | None = None

    @property
    def answers(self) -> Tensor:
        """Logits of true classes only, (sample, query, class)."""
        return self.logits[..., :-1] if self.activation == "softmax" else self.logits

    @property
    def probabilities(self) -> Tensor:
        """Probability of each true class, float32 (sample, query, class)."""
        logits = self.logits.float()
        return logits.softmax(-1)[..., :-1] if self.activation == "softmax" else logits.sigmoid()

    @property
    def queries(self) -> int:
        """Number of object queries."""
        return int(self.logits.shape[1])

    def check(self, ids: Sequence[str]) -> None:
        """Raise CaptureError where a logit or a box is NaN or infinite, naming sample and query."""
        for name, values in (("class logits", self.answers), ("boxes", self.boxes)):
            # text-grounded detectors put -inf where a query has no such word
            bad = None if values is None else values.isnan() if name == "class logits" else ~values.isfinite()
            if bad is not None and bool(bad.any()):
                sample, query = (int(v) for v in bad.nonzero()[0][:2])
                raise CaptureError(
                    f"{name} of sample {ids[sample]!r}, object query {query}, are not finite numbers",
                    remedy="check the weights and the input; float16 overflows in some detectors: try float32",
                )


def boxes_to_original(boxes: Tensor, geometry: Sequence[Geometry], frame: Frame) -> Tensor:
    """Normalised (centre x, centre y, width, height) to (top, left, bottom, right) in original pixels.

    ``boxes`` is (sample, query, 4). Coordinates may lie outside the image: nothing is clipped, so that
    gradients and perturbed boxes stay what they are.
    """
    x, y, width, height = boxes.float().unbind(-1)
    edges = torch.stack([y - height / 2, x - width / 2, y + height / 2, x + width / 2], -1)
    scale = [_extent(g, frame) for g in geometry]
    size = torch.tensor(scale, dtype=edges.dtype, device=edges.device).reshape(-1, 1, 2)
    return edges * torch.cat([size, size], -1)


def _extent(geometry: Geometry, frame: Frame) -> tuple[float, float]:
    """Height and width, in original pixels, of what normalised boxes are relative to."""
    if frame == "image":
        return float(geometry.original_height), float(geometry.original_width)
    return geometry.input_height / geometry.scale_y, geometry.input_width / geometry.scale_x
