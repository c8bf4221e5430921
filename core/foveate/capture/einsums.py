"""Reading an einsum: which of its axes are queries, keys and channels.

``"bqhd,bkhd->bhqk"`` makes scores: the last two letters of the result are query and key, those before them are
batch and heads. ``"bhqk,bkhd->bqhd"`` weighs values. Both are laid out as ``(..., token, channel)`` here.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

_SPARE = "ZYXWVUTS"  # letters for the axes behind an ellipsis


def einsum_operands(equation: str, left: Tensor, right: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """q and k ``(*leading, token, channel)`` of an einsum that makes scores; None where it cannot be read."""
    terms = _terms(equation, (left.dim(), right.dim()))
    if terms is None or len(terms[2]) < 2:
        return None, None
    result = terms[2]
    leading, query, key = result[:-2], result[-2], result[-1]
    q = next((_laid(t, term, leading, query) for t, term in _pairs(left, right, terms) if query in term), None)
    k = next((_laid(t, term, leading, key) for t, term in _pairs(left, right, terms) if key in term), None)
    return q, k


def einsum_output(equation: str, place: int, dims: tuple[int, int]) -> Callable[[Tensor], Tensor] | None:
    """How to lay out an einsum of weights (operand ``place``) and values as ``(..., query, channel)``."""
    terms = _terms(equation, dims)
    if terms is None or len(terms[place]) < 2:
        return None
    weights, result = terms[place], terms[2]
    leading, query = weights[:-2], weights[-2]
    if query not in result:
        return None
    return lambda tensor: _laid(tensor, result, leading, query)


def _pairs(left: Tensor, right: Tensor, terms: tuple[str, str, str]) -> list[tuple[Tensor, str]]:
    return [(left, terms[0]), (right, terms[1])]


def _terms(equation: str, dims: tuple[int, int]) -> tuple[str, str, str] | None:
    """Letters of both operands and of the result; None for more operands or an implicit result."""
    inputs, arrow, result = equation.replace(" ", "").partition("->")
    parts = inputs.split(",")
    if not arrow or len(parts) != 2:
        return None
    hidden = [dim - len(part.replace("...", "")) for part, dim in zip(parts, dims, strict=True)]
    left, right = (part.replace("...", _SPARE[len(_SPARE) - n :]) for part, n in zip(parts, hidden, strict=True))
    widest = max([n for part, n in zip(parts, hidden, strict=True) if "..." in part], default=0)
    return left, right, result.replace("...", _SPARE[len(_SPARE) - widest :])


def _laid(tensor: Tensor, letters: str, leading: str, token: str) -> Tensor:
    """Axes in the order leading, token, all others as one."""
    front = [letter for letter in leading if letter in letters]
    rest = [letter for letter in letters if letter not in front and letter != token]
    moved = tensor.permute([letters.index(letter) for letter in (*front, token, *rest)])
    return moved.flatten(len(front) + 1) if rest else moved.unsqueeze(-1)
