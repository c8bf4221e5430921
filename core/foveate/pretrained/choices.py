"""Choosing among labels: classes of a classifier or prompts of a zero-shot model.

Logits ``(sample, class)`` become predictions, a frozen choice a row, and one differentiable score a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING

from foveate.errors import CaptureError, UsageError
from foveate.interfaces import BoundTarget, Prediction, Target, TargetRow

if TYPE_CHECKING:
    from torch import Tensor

TOP = 5
"""How many labels ``predictions`` lists."""


def top_predictions(scores: Tensor, labels: Sequence[str]) -> list[list[Prediction]]:
    """The :data:`TOP` best of ``scores (sample, class)``, best first."""
    values, indices = scores.topk(min(TOP, scores.shape[-1]), dim=-1)
    return [
        [Prediction(labels[int(i)], float(v), int(i)) for v, i in zip(row_v, row_i, strict=True)]
        for row_v, row_i in zip(values, indices, strict=True)
    ]


def bind_choice(logits: Tensor, labels: Sequence[str], target: Target, kind: str) -> BoundTarget:
    """One row a sample: the argmax of ``logits (sample, class)``, or the label or index that is named."""
    if target.label is None:
        chosen = logits.detach().argmax(-1).tolist()
    else:
        chosen = [index_of(target.label, labels)] * len(logits)
    rows = tuple(TargetRow(i, kind, c, labels[c]) for i, c in enumerate(chosen))
    return BoundTarget(rows, target.scale)


def score_choice(logits: Tensor, bound: BoundTarget) -> Tensor:
    """Softmax probability or logit of each row's class, float32 ``(target,)``."""
    if bound.scale == "value":
        raise UsageError(
            "a choice among classes or prompts has no 'value'", remedy="scale='probability' or 'logit'"
        )
    scores = logits.float()
    table = scores.softmax(-1) if bound.scale == "probability" else scores
    return table[[row.sample for row in bound.rows], [row.class_index for row in bound.rows]]


def index_of(label: str | int, labels: Sequence[str]) -> int:
    """Class index of a name or index. Raises UsageError with the close matches."""
    """Class index of a name or index. Raises UsageError with the close matches."""
    if isinstance(label, int) and not isinstance(label, bool):
        if 0 <= label < len(labels):
            return label
        raise UsageError(f"no class {label}: there are {len(labels)}", remedy=f"0 to {len(labels) - 1}")
    wanted = str(label)
    exact = [i for i, name in enumerate(labels) if name == wanted]
    loose = exact or [i for i, name in enumerate(labels) if name.casefold() == wanted.casefold()]
    if len(loose) == 1:
        return loose[0]
    close = get_close_matches(wanted, labels, n=3) or list(labels[:3])
    problem = "is ambiguous" if loose else "is not one of the model's answers"
    raise UsageError(f"label {wanted!r} {problem}", remedy=f"perhaps {', '.join(map(repr, close))}, or an index")


def one_kind(bound: BoundTarget) -> str:
    """The kind of all rows ("" for none). Raises CaptureError where kinds are mixed."""
    kinds = {row.kind for row in bound.rows}
    if len(kinds) > 1:
        raise CaptureError(f"rows of one target mix kinds {sorted(kinds)}")
    return next(iter(kinds), "")
