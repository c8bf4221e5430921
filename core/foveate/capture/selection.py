"""Which rows of a site are kept: explicit positions, the rows the answer is read from, all, or none."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.capture.labels import call_weights
from foveate.capture.records import Record
from foveate.interfaces import CallLabels, Readout, Site


@dataclass(frozen=True, eq=False)
class Selection:
    """Rows to keep: query positions ``index``, or one weighted row by ``weights`` ``(sample, query)``.

    Both are over the site's common query axis; weights may have the axes of the site's ``group`` between.
    ``rule`` says in words what was chosen; ``ragged`` that a call's queries are known after the forward only.
    """

    rule: str
    index: tuple[int, ...] = ()
    weights: Tensor | None = None
    group: tuple[str, ...] = ()
    ragged: bool = False

    @classmethod
    def of_readout(cls, readout: Readout, site: Site | None = None, *, fixed: bool = True) -> Selection:
        """A position where all samples are read from the same single query, else a weighted row.

        A readout that is not ``fixed`` (it depends on the answer) is a weighted row always: which query answers
        may agree within one batch by chance, and the rows of a run must have one label.
        """
        weights = readout.weights.detach()
        group, ragged = (site.group, bool(site.ragged)) if site is not None else ((), False)
        if not fixed or weights.dim() > 2:
            return cls(readout.rule, weights=weights, group=group, ragged=ragged)
        first = int(weights[0].argmax()) if len(weights) else 0
        one_hot = torch.zeros_like(weights)
        one_hot[:, first] = 1.0
        if torch.equal(weights, one_hot):
            return cls(readout.rule, (first,), ragged=ragged)
        return cls(readout.rule, weights=weights, group=group, ragged=ragged)

    @property
    def query_index(self) -> tuple[int, ...]:
        """Positions kept; -1 for a weighted row."""
        return self.index if self.weights is None else (-1,)

    def ready(self, record: Record) -> bool:
        """Whether it can be taken before the call's axes are labelled."""
        if not self.query_index:
            return True
        if self.ragged or self.group:
            return False
        return self.weights is None or len(self.weights) == record.shape.batch

    def take(self, record: Record, labels: CallLabels | None = None) -> Tensor:
        """The rows, ``(batch, head, row, key)``; zero where a position has no query in this call."""
        if self.weights is None:
            return self._by_position(record, labels)
        weights = self.weights.to(record.device, torch.float32)
        return record.weighted(weights if labels is None else call_weights(weights, labels, self.group))

    def local(self, labels: CallLabels | None) -> tuple[list[int], list[int]]:
        """Of the kept positions that exist in a call: their order among the kept, and the call's own queries."""
        if labels is None or labels.query_place is None:
            return list(range(len(self.index))), list(self.index)
        own = {position: query for query, position in enumerate(labels.query_place.index)}
        kept = [i for i, position in enumerate(self.index) if position in own]
        return kept, [own[self.index[i]] for i in kept]

    def _by_position(self, record: Record, labels: CallLabels | None) -> Tensor:
        kept, queries = self.local(labels)
        rows = record.rows(queries)
        if len(kept) == len(self.index):
            return rows
        whole = rows.new_zeros(*rows.shape[:2], len(self.index), rows.shape[-1])
        whole[:, :, kept] = rows
        return whole
