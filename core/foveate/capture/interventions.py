"""What may be done to attention: knock out edges, scale them, replace weights, ablate heads.

Every intervention names a site, layers and heads and, where it concerns edges, queries and keys by label
(:mod:`foveate.capture.edges`). All act before the softmax, so that rows are distributions again and knocked-out
weights are exactly 0; the model's own masks are kept. Deformable attention has no softmax over keys: there they
act on the bilinear shares of its points (:mod:`foveate.capture.sampled_scores`). Gradients flow through what is
left.

- :class:`Knockout` blocks edges (attention knockout, Geva et al. 2023, EMNLP, eq. 10).
- :class:`ScaleAttention` multiplies weights by a factor; rows are renormalised.
- :class:`Replace` redistributes the weight of the chosen edges within each row: uniformly, shuffled, or as in an
  array or another input's record (activation patching, Vig et al. 2020, NeurIPS; Zhang and Nanda 2024, ICLR).
- :class:`AblateHeads` sets what heads put out to zero or to a mean (Michel et al. 2019, NeurIPS, sec. 2).
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from foveate.capture.edges import Choice, check, needs_labels
from foveate.capture.records import Record
from foveate.capture.scores import Scores
from foveate.errors import CaptureError, UsageError
from foveate.interfaces import CallKey

Numbers = int | Sequence[int] | None
Weights = Tensor | NDArray[Any] | Record
"""Attention ``(batch, head, query, key)`` or broadcastable to it."""

ROW_SUM = 1e-3


class Here(NamedTuple):
    """One call that is being changed: which, in words for messages, and its number of heads."""

    call: CallKey
    where: str


@dataclass(frozen=True, eq=False)
class Intervention(ABC):
    """One change of attention.

    ``site`` is a site id of the source (``*`` and ``?`` as in file names), or for a plain module a pattern of
    module paths such as ``blocks.*.attn``, whose matches are numbered 0, 1, ... as layers. ``layers`` and
    ``heads`` are numbers, None for all. ``query``, ``key`` choose edges; ``mask`` (bool, broadcastable to
    (batch, head, query, key)) narrows them further.
    """

    site: str
    layers: Numbers = None
    heads: Numbers = None
    query: Choice = "all"
    key: Choice = "all"
    mask: Tensor | NDArray[np.bool_] | None = None

    def __post_init__(self) -> None:
        check(self.query, side="query")
        check(self.key, side="key")
        if self.mask is not None and torch.as_tensor(self.mask).dtype != torch.bool:
            raise UsageError(f"{self.name}: mask must be boolean, got {torch.as_tensor(self.mask).dtype}")

    @property
    def name(self) -> str:
        """The class name, for messages."""
        return type(self).__name__

    @property
    def needs_labels(self) -> bool:
        """Whether tokens' labels are needed."""
        return needs_labels(self.query) or needs_labels(self.key)

    @abstractmethod
    def change(self, scores: Scores, edges: Tensor, here: Here) -> None:
        """Change the scores of one call on ``edges``, bool, broadcastable to (batch, head, query, key)."""

    def values(self, here: Here, heads: int) -> Mapping[int, Tensor]:
        """What heads, out of ``heads``, put out instead of their own result: ``(channel)`` or a number."""
        return {}


@dataclass(frozen=True, eq=False)
class Knockout(Intervention):
    """Chosen queries cannot read from chosen keys.

    ``renormalise``: whether the rest of each row is scaled up to the row's total. None does what the attention
    itself does: a softmax renormalises, and a deformable point whose cell is blocked reads zero there, as it does
    outside the picture. Softmaxes know no other way; with True a deformable row keeps its in-image mass.
    Where rows are renormalised, one that would keep no key at all is a CaptureError: attention to nothing is not
    defined.
    """

    renormalise: bool | None = None

    def change(self, scores: Scores, edges: Tensor, here: Here) -> None:
        """Mask the edges."""
        if not _renormalises(self.renormalise, scores, here, self.name):
            scores.multiply(edges, 0.0)
            return
        dead = scores.emptied(edges)
        if bool(dead.any()):
            sample, head, query = (int(i) for i in dead.nonzero()[0])
            raise CaptureError(
                f"Knockout: {int(dead.sum())} rows of {here.where} would keep no key, the first at batch index "
                f"{sample}, head {head}, query {query}{' (for every one of them)' if dead.shape[0] == 1 else ''}",
                remedy="leave a key, for instance key='patch & !self', or use AblateHeads to silence a head",
            )
        scores.block(edges)


@dataclass(frozen=True, eq=False)
class ScaleAttention(Intervention):
    """Weights of chosen edges times ``factor``; ``renormalise`` as for :class:`Knockout`. Factor 0 is a
    knockout."""

    factor: float = 1.0
    renormalise: bool | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.factor < float("inf"):
            raise UsageError(f"ScaleAttention: factor must be finite and not negative, got {self.factor}")

    def change(self, scores: Scores, edges: Tensor, here: Here) -> None:
        """Add ln factor to the scores of the edges."""
        if self.factor == 0:
            Knockout.change(self, scores, edges, here)  # type: ignore[arg-type]  # the same rule
        elif not _renormalises(self.renormalise, scores, here, self.name):
            scores.multiply(edges, self.factor)
        elif self.factor != 1:
            bias = torch.zeros(edges.shape, dtype=torch.float64, device=edges.device)
            scores.add(bias.masked_fill(edges, float(np.log(self.factor))))


@dataclass(frozen=True, eq=False)
class Replace(Intervention):
    """Each row keeps the total weight of its chosen edges, which is distributed otherwise among them.

    ``by``: "uniform"; "shuffled" (every head and query permutes its own weights by a draw of its own, fixed by
    ``seed``, site and layer and the same for every sample); an array ``(batch | 1, head | 1, query, key)`` whose
    rows sum to 1; or the attention of another input: a record, or ``trace.records`` (by call). With all keys
    chosen, rows are replaced as a whole. Keys that the model masks stay masked. In deformable attention, whose
    rows sum to their in-image mass, an array's or another input's weights are taken as they are, mass included.
    """

    by: Literal["uniform", "shuffled"] | Weights | Mapping[CallKey, Weights] = "uniform"
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.by, str) and self.by not in ("uniform", "shuffled"):
            raise UsageError(
                f"Replace: no replacement {self.by!r}", remedy="use 'uniform', 'shuffled', an array or records"
            )
        if isinstance(self.by, Tensor | np.ndarray):
            _check_rows(torch.as_tensor(self.by))

    def change(self, scores: Scores, edges: Tensor, here: Here) -> None:
        """Put the redistributed rows."""
        own = scores.weights()
        free = (edges & scores.visible()).expand(own.shape)
        if isinstance(self.by, str) and self.by == "shuffled":
            new = shuffled(own, free, _generator(self.seed, here.call))
        elif isinstance(self.by, str) or scores.sums_to_one:
            new = redistributed(own, free, self._shape_of(own, here))
        else:
            new = torch.where(free, self._shape_of(own, here), own)
        scores.put(free.any(-1, keepdim=True), new)

    def _shape_of(self, own: Tensor, here: Here) -> Tensor:
        """What the chosen weights shall be proportional to."""
        if isinstance(self.by, str):
            return torch.ones_like(own)
        given = _of_call(self.by, here.call, self.name) if isinstance(self.by, Mapping) else self.by
        found = given.rows(slice(None)) if isinstance(given, Record) else torch.as_tensor(given)
        found = found.to(own)
        try:
            return found.expand(own.shape)
        except RuntimeError:
            raise UsageError(
                f"Replace: weights {tuple(found.shape)} do not fit {here.where}, which is {tuple(own.shape)}",
                remedy="give (batch, head, query, key); 1 where an axis is to be repeated",
            ) from None


@dataclass(frozen=True, eq=False)
class AblateHeads(Intervention):
    """What whole heads put out becomes ``to``.

    "zero"; "mean": for every query the mean over the queries of its own sample (window, frame), that is the mean
    attention row applied to the values; or means of reference data, ``{call: (head, channel)}`` by
    :func:`foveate.capture.head_means.head_means` (mean ablation).
    """

    to: Literal["zero", "mean"] | Mapping[CallKey, Tensor] = "zero"

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.to, str) and self.to not in ("zero", "mean"):
            raise UsageError(
                f"AblateHeads: no ablation {self.to!r}", remedy="use 'zero', 'mean' or head_means(...)"
            )
        if self.mask is not None or not _everything(self.query) or not _everything(self.key):
            raise UsageError(
                "AblateHeads: heads are ablated as a whole", remedy="use Knockout or Replace for edges"
            )

    def change(self, scores: Scores, edges: Tensor, here: Here) -> None:
        """Only "mean" of the own queries is a matter of attention."""
        if not isinstance(self.to, str) or self.to != "mean":
            return
        own = scores.weights()
        alive = scores.visible().any(-1, keepdim=True).expand(*own.shape[:-1], 1)
        mean = own.mean(-2, keepdim=True)  # rows that see no key are zero; the softmax makes the sum 1 again
        scores.put(alive & edges.any(-1, keepdim=True), mean.expand(own.shape))

    def values(self, here: Here, heads: int) -> Mapping[int, Tensor]:
        """Zero or the reference means, for each ablated head."""
        if isinstance(self.to, str) and self.to == "mean":
            return {}
        means = torch.zeros(heads, 1) if isinstance(self.to, str) else _of_call(self.to, here.call, self.name)
        chosen = numbers(self.heads)
        return {head: means[head] for head in (range(heads) if chosen is None else chosen)}


def _renormalises(wanted: bool | None, scores: Scores, here: Here, name: str) -> bool:
    """Whether rows keep their total. UsageError where a softmax would have to lose some."""
    if scores.sums_to_one and wanted is False:
        raise UsageError(
            f"{name}: {here.where} is normalised by its softmax, so renormalise=False is not possible",
            remedy="leave renormalise out; it is for deformable attention",
        )
    return scores.sums_to_one if wanted is None else wanted


def numbers(chosen: Numbers) -> tuple[int, ...] | None:
    """Layers or heads as a tuple; None for all."""
    if chosen is None:
        return None
    return (chosen,) if isinstance(chosen, int) else tuple(int(i) for i in chosen)


def redistributed(own: Tensor, free: Tensor, proportions: Tensor) -> Tensor:
    """Rows in which the weight of ``free`` edges is proportional to ``proportions``, its total unchanged.

    All are ``(batch, head, query, key)``. UsageError where proportions are 0 on all free edges of a row.
    """
    wanted = proportions * free
    size = wanted.sum(-1, keepdim=True)
    if bool(((size <= 0) & free.any(-1, keepdim=True)).any()):
        raise UsageError("Replace: the given weights are 0 on every chosen key of a row that has some")
    total = (own * free).sum(-1, keepdim=True)
    return torch.where(free, wanted * (total / torch.where(size > 0, size, torch.ones_like(size))), own)


def shuffled(own: Tensor, free: Tensor, generator: torch.Generator) -> Tensor:
    """Rows whose weights on ``free`` edges are permuted, every row by its own draw; samples share the draws."""
    noise = torch.rand(own.shape[1:], generator=generator).to(own.device).expand(own.shape)
    # Both orders list the free keys first, each in its own way: what lay on one moves to the other.
    source = (~free).to(torch.int8).argsort(dim=-1, stable=True)
    target = torch.where(free, noise, noise + 2.0).argsort(-1)
    moved = torch.zeros_like(own).scatter(-1, target, own.gather(-1, source))
    return torch.where(free, moved, own)


def _generator(seed: int, call: CallKey) -> torch.Generator:
    """Draws fixed by the seed, site and layer, on the CPU: alike on every machine and in every process."""
    digest = hashlib.sha256(f"{seed}/{call.site}/{call.layer}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def _of_call(given: Mapping[CallKey, Any], call: CallKey, name: str) -> Any:
    """The entry for a call; a number beyond those that were recorded starts again (the next forward)."""
    same = sum(key[:2] == call[:2] for key in given)
    wanted = call._replace(number=call.number % same) if same else call
    if wanted not in given:
        raise UsageError(
            f"{name}: nothing given for {call.site} layer {call.layer} call {call.number}",
            remedy=f"given are {sorted({tuple(key[:2]) for key in given})}; narrow layers= or give them all",
        )
    return given[wanted]


def _check_rows(weights: Tensor) -> None:
    if not weights.is_floating_point() or weights.dim() < 2:
        raise UsageError(f"Replace: expected float weights (..., query, key), got {tuple(weights.shape)}")
    sums = weights.sum(-1)
    if not bool((weights >= 0).all()) or not bool(((sums - 1).abs() <= ROW_SUM).all()):
        raise UsageError(
            f"Replace: rows must be non-negative and sum to 1; sums lie in [{sums.min():.4g}, {sums.max():.4g}]",
            remedy="normalise the rows",
        )


def _everything(choice: Choice) -> bool:
    return isinstance(choice, str) and choice == "all"
