"""How well cheaper matrices stand in for attention: sparse, low-rank and linear approximations at equal budget.

A budget is the count of numbers that an approximation stores, per query: ``b`` weights a row for top-k (their
places not counted), and for the two-factor forms a rank with ``rank (queries + keys) <= b queries``. The error is
that of the output, ||(A - A~) V||_F / ||A V||_F: matrices may differ where no value does. Uniform attention
(the mean of the values) is the baseline that costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from foveate.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import ArrayLike, NDArray

METHODS = ("sparse", "low_rank", "linear", "uniform")


def rank_at(budget: float, queries: int, keys: int) -> int:
    """Largest rank whose two factors hold at most ``budget`` numbers a query; at least 1."""
    return max(1, int(budget * queries / (queries + keys)))


def sparse(attention: ArrayLike, count: int) -> NDArray[np.float64]:
    """The ``count`` largest weights of each row ``(..., query, key)``, renormalised to the row's own sum.

    Ties at the border are broken by position.
    """
    rows = np.asarray(attention, np.float64)
    order = np.argsort(-rows, axis=-1, kind="stable")[..., :count]
    kept = np.zeros_like(rows)
    np.put_along_axis(kept, order, np.take_along_axis(rows, order, -1), -1)
    total = kept.sum(-1, keepdims=True)
    return np.asarray(kept * rows.sum(-1, keepdims=True) / np.where(total > 0, total, 1.0))


def low_rank(attention: ArrayLike, rank: int) -> NDArray[np.float64]:
    """The best matrix of that rank in the Frobenius norm (Eckart and Young 1936): truncated SVD."""
    u, s, vt = np.linalg.svd(np.asarray(attention, np.float64), full_matrices=False)
    return np.asarray((u[..., :rank] * s[..., None, :rank]) @ vt[..., :rank, :])


def linear(
    q: ArrayLike, k: ArrayLike, features: int, *, scale: float | None = None, seed: int = 0
) -> NDArray[np.float64]:
    """Softmax attention of ``q (..., query, channel)`` and ``k (..., key, channel)`` by positive random features.

    phi(x) = exp(w x - |x|^2 / 2) with orthogonal Gaussian w, attention phi(Q) phi(K)^T normalised by row
    (FAVOR+; Choromanski et al. 2021, Rethinking Attention with Performers, ICLR). ``scale``
    defaults to channel^-1/2. Unmasked attention only.
    """
    queries, keys = (np.asarray(x, np.float64) for x in (q, k))
    width = queries.shape[-1]
    root = (width**-0.5 if scale is None else scale) ** 0.5
    w = _orthogonal(features, width, seed)
    left, right = _features(queries * root, w, axis=-1), _features(keys * root, w, axis=(-2, -1))
    rows = left @ np.swapaxes(right, -1, -2)
    total = rows.sum(-1, keepdims=True)
    return np.asarray(rows / np.where(total > 0, total, 1.0))


def output_error(attention: ArrayLike, approximation: ArrayLike, values: ArrayLike) -> NDArray[np.float64]:
    """||(A - A~) V||_F / ||A V||_F of each matrix ``(...,)``; ``values (..., key, channel)``."""
    a, b, v = (np.asarray(x, np.float64) for x in (attention, approximation, values))
    size = np.linalg.norm(a @ v, axis=(-2, -1))
    wrong = np.linalg.norm((a - b) @ v, axis=(-2, -1))
    return np.asarray(np.where(size > 0, wrong / np.where(size > 0, size, 1.0), np.nan))


def errors_at(
    attention: ArrayLike,
    values: ArrayLike,
    budget: int,
    *,
    q: ArrayLike | None = None,
    k: ArrayLike | None = None,
    scale: float | None = None,
    seed: int = 0,
) -> Mapping[str, NDArray[np.float64]]:
    """:func:`output_error` of every method of :data:`METHODS` at one budget; "linear" needs ``q`` and ``k``.

    ``attention (..., query, key)`` with rows that sum to 1. Raises UsageError for a budget below 1.
    """
    if budget < 1:
        raise UsageError(f"errors_at: a budget of {budget} numbers a query keeps nothing", remedy="at least 1")
    rows = np.asarray(attention, np.float64)
    rank = rank_at(budget, *rows.shape[-2:])
    made = {
        "sparse": sparse(rows, budget),
        "low_rank": low_rank(rows, rank),
        "uniform": np.full_like(rows, 1 / rows.shape[-1]),
    }
    if q is not None and k is not None:
        made["linear"] = linear(q, k, rank, scale=scale, seed=seed)
    return {name: output_error(rows, made[name], values) for name in METHODS if name in made}


def effective_rank(attention: ArrayLike) -> NDArray[np.float64]:
    """exp of the entropy of the normalised singular values, ``(...,)``, from 1 to min(queries, keys).

    Roy and Vetterli 2007 (EUSIPCO), definition 1. A zero matrix is NaN.
    """
    s = np.linalg.svd(np.asarray(attention, np.float64), compute_uv=False)
    total = s.sum(-1, keepdims=True)
    p = s / np.where(total > 0, total, 1.0)
    entropy = -(p * np.log(np.where(p > 0, p, 1.0))).sum(-1)
    return np.asarray(np.where(total[..., 0] > 0, np.exp(entropy), np.nan))


def _features(x: NDArray[np.float64], w: NDArray[np.float64], axis: int | tuple[int, ...]) -> NDArray[np.float64]:
    """Positive features ``(..., token, feature)``; a constant over ``axis`` is taken out: rows do not see it."""
    exponent = x @ w.T - (x**2).sum(-1, keepdims=True) / 2
    return np.asarray(np.exp(exponent - exponent.max(axis=axis, keepdims=True)))


def _orthogonal(features: int, width: int, seed: int) -> NDArray[np.float64]:
    """``(feature, channel)`` Gaussian rows, orthogonal within blocks of ``width``, each with its own length."""
    rng = np.random.default_rng(seed)
    blocks = [_rotation(rng, width) for _ in range(-(-features // width))]
    length = np.linalg.norm(rng.standard_normal((features, width)), axis=1, keepdims=True)
    return np.asarray(np.concatenate(blocks)[:features] * length)


def _rotation(rng: np.random.Generator, width: int) -> NDArray[np.float64]:
    """A matrix drawn evenly from all orthogonal ones: the signs of R must go, or its rows point one way."""
    q, r = np.linalg.qr(rng.standard_normal((width, width)))
    return np.asarray(q * np.sign(np.diag(r)))
