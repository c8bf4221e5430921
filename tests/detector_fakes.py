"""A detector whose every answer is known in closed form: brightness inside fixed windows."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from foveate.geometry import Geometry
from foveate.interfaces import Batch, BoundTarget, Prediction, Sample, Target, TargetRow
from foveate.testing.tiny import TinyConfig, TinySource

WINDOWS = ((4, 4, 12, 12), (16, 16, 28, 28), (16, 4, 28, 12))
"""(top, left, bottom, right) of each query's box, pixels of the 32 x 32 input."""
CLASSES = (0, 0, 1)
MATCH_IOU = 0.5


class WindowDetector(TinySource):
    """Query ``q`` finds its class where its window is bright: probability = mean of channel 0 there, in [0, 1].

    Every query's box is its window moved by ``shift`` pixels where its window is dark, so that objects can leave
    their query's box. Targets ``class`` follow by query, ``class@match`` by the best overlap of one class.
    """

    targets = ("class", "class@match")

    def __init__(self, *, threshold: float = 0.5, masks: bool = False) -> None:
        super().__init__(TinyConfig(classes=2))
        self.threshold, self.masks = threshold, masks

    def encode(self, samples):
        inputs = torch.stack([torch.as_tensor(s.pixels / 255.0).float().permute(2, 0, 1) for s in samples])
        geometry = tuple(Geometry.identity(32, 32) for _ in samples)
        return Batch(inputs, geometry, tuple(s.id for s in samples))

    def forward(self, batch: Batch, *, grad: bool = False) -> Tensor:
        """Probabilities ``(sample, query)``."""
        with torch.set_grad_enabled(grad):
            means = [batch.inputs[:, 0, t:b, le:r].mean((-2, -1)) for t, le, b, r in WINDOWS]
            return torch.stack(means, 1)

    def predictions(self, outputs, batch):
        return [
            [
                Prediction(str(CLASSES[q]), float(p[q]), CLASSES[q], q, WINDOWS[q], self._mask(q))
                for q in p.argsort(descending=True).tolist()
            ]
            for p in outputs.detach()
        ]

    def _mask(self, query):
        if not self.masks:
            return None
        mask = np.zeros((32, 32), bool)
        t, le, b, r = WINDOWS[query]
        mask[t:b, le : (le + r) // 2] = True
        return mask

    def bind(self, outputs, batch, target: Target) -> BoundTarget:
        rows = []
        for i, p in enumerate(outputs.detach()):
            found = [q for q in p.argsort(descending=True).tolist() if p[q] > self.threshold]
            found = found if target.object is None else [target.object]
            rows += [TargetRow(i, self._kind(target), CLASSES[q], str(CLASSES[q]), q) for q in found]
        return BoundTarget(tuple(rows), target.scale)

    def _kind(self, target):
        return self.targets[0] if target.kind == "default" else target.kind

    def score(self, outputs, batch, bound):
        values = [self._one(outputs[row.sample], row) for row in bound.rows]
        p = torch.stack(values) if values else outputs.new_zeros(0)
        return torch.logit(p, eps=1e-6) if bound.scale == "logit" else p

    def _one(self, p, row):
        found = p[row.object]
        return found * (found > self.threshold) if row.kind.endswith("@match") else found


def spots(windows_by_image, *, value: int = 230, background: int = 20) -> list[Sample]:
    """Images 32 x 32 with some windows bright."""
    samples = []
    for i, windows in enumerate(windows_by_image):
        pixels = np.full((32, 32, 3), background, np.uint8)
        for j, q in enumerate(windows):
            t, le, b, r = WINDOWS[q]
            pixels[t:b, le:r] = value - 20 * j
        samples.append(Sample(f"image-{i}", pixels))
    return samples


def bound_spots(source, windows_by_image, **target):
    batch = source.encode(spots(windows_by_image))
    return batch, source.bind(source.forward(batch), batch, Target(**target))


def padded(batch: Batch, height: int, width: int) -> Batch:
    """The same batch, said to be images of ``height x width`` with padding after them."""
    placed = tuple(replace(g, original_height=height, original_width=width) for g in batch.geometry)
    return replace(batch, geometry=placed)
