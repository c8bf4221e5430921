"""Sources whose right explanation is known in closed form, for the tests of attribution."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from foveate.interfaces import Batch, BoundTarget, Target, TargetRow
from foveate.testing.tiny import TinyConfig, TinySource, tiny_samples

TWO_CLASSES = TinyConfig(classes=2)


class FunctionSource(TinySource):
    """Any function of the inputs ``(sample, channel, y, x) -> (sample, class)`` behind the tiny source's cells."""

    def __init__(self, function: Callable[[Tensor], Tensor], config: TinyConfig = TWO_CLASSES) -> None:
        super().__init__(config)
        self.function = function
        self.calls: list[int] = []

    def forward(self, batch: Batch, *, grad: bool = False) -> Tensor:
        self.calls.append(len(batch))
        with torch.set_grad_enabled(grad):
            return self.function(batch.inputs)


def linear_source(seed: int = 0) -> tuple[FunctionSource, Tensor]:
    """A linear model of two classes and its weights ``(class, channel, y, x)``."""
    w = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(seed)) * 0.05
    return FunctionSource(lambda x: torch.einsum("bcyx,kcyx->bk", x, w.to(x))), w


def bound_batch(
    source: TinySource, count: int = 3, *, scale: str = "logit", seed: int = 0
) -> tuple[Batch, BoundTarget]:
    """A batch of noisy squares and the predicted class of each."""
    batch = source.encode(tiny_samples(count, seed=seed))
    return batch, source.bind(source.forward(batch), batch, Target(scale=scale))


def two_targets_a_sample(bound: BoundTarget, classes: int) -> BoundTarget:
    """Every sample explained for its class and for the next one: rows of one sample side by side."""
    rows: list[TargetRow] = []
    for row in bound.rows:
        other = replace(row, class_index=(row.class_index + 1) % classes)
        rows += [row, other]
    return replace(bound, rows=tuple(rows))


def only(bound: BoundTarget, batch: Batch, sample: int) -> tuple[Batch, BoundTarget]:
    """One sample of a batch with its target rows."""
    rows = [i for i, row in enumerate(bound.rows) if row.sample == sample]
    kept = replace(bound.take(rows), rows=tuple(replace(bound.rows[i], sample=0) for i in rows))
    return batch.replace(batch.inputs[sample : sample + 1], [sample]), kept


def snapshot(module: nn.Module) -> dict[str, object]:
    """All that an explanation could leave behind on a model."""
    return {
        "training": [m.training for m in module.modules()],
        "hooks": [
            (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in module.modules()
        ],
        "grad": [p.grad for p in module.parameters()],
        "requires": [p.requires_grad for p in module.parameters()],
        "weights": [p.detach().double().sum().item() for p in module.parameters()],
    }
