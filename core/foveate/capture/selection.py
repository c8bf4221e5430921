"""Which rows of a site are kept: explicit positions, the rows the answer is read from, all, or none."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.capture.labels import join_leading
from foveate.capture.records import Record
from foveate.interfaces import CallLabels, Readout


@dataclass(frozen=True, eq=False)
class Selection:
    """Rows to keep: query positions ``index``, or one weighted row by ``weights`` ``(sample, query)``.

    ``rule`` says in words what was chosen.
    """

    rule: str
    index: tuple[int, ...] = ()
    weights: Tensor | None = None

    @classmethod
    def of_readout(cls, readout: Readout, *, fixed: bool = True) -> Selection:
        """A position where all samples are read from the same single query, else a weighted row.

        A readout that is not ``fixed`` (it depends on the answer) is a weighted row always: which query answers
        may agree within one batch by chance, and the rows of a run must have one label.
        """
        weights = readout.weights.detach()
        if not fixed:
            return cls(readout.rule, weights=weights)
        first = int(weights[0].argmax()) if len(weights) else 0
        one_hot = torch.zeros_like(weights)
        one_hot[:, first] = 1.0
        if torch.equal(weights, one_hot):
            return cls(readout.rule, (first,))
        return cls(readout.rule, weights=weights)

    @property
    def query_index(self) -> tuple[int, ...]:
        """Positions kept; -1 for a weighted row."""
        return self.index if self.weights is None else (-1,)

    def ready(self, record: Record) -> bool:
        """Whether it can be taken before the call's axes are labelled."""
        return self.weights is None or len(self.weights) == record.shape.batch

    def take(self, record: Record, labels: CallLabels | None = None) -> Tensor:
        """The rows, ``(batch, head, row, key)``."""
        if self.weights is None:
            return record.rows(self.index)
        weights = self.weights.to(record.device, torch.float32)
        return record.weighted(weights if labels is None else join_leading(weights, labels))
