"""Which heads matter: sensitivity to a gate on each head, and its agreement with switching heads off.

Michel, Levy and Neubig 2019 (NeurIPS, section 4.1, eq. 2): with a gate xi_h on the output of head h, I_h = E_x
|dL/dxi_h| = E_x |O_h^T dL/dO_h|, normalised by the l2 norm of each layer. As O = A V, the same number is
|sum_ij A_ij dL/dA_ij|, which needs attention and its gradient only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray


def gate_gradient(attention: ArrayLike, gradient: ArrayLike) -> NDArray[np.float64]:
    """dL/dxi_h = sum_ij A_ij dL/dA_ij of each head, ``(..., head)``, from two ``(..., head, query, key)``.

    Signed; :func:`importance` takes absolute values before any mean over samples.
    """
    a, g = (np.asarray(values, np.float64) for values in (attention, gradient))
    return np.asarray(np.einsum("...qk,...qk->...", a, g))


def importance(gates: ArrayLike) -> NDArray[np.float64]:
    """I_h of each layer and head, ``(layer, head)``, from gate gradients ``(sample, layer, head)``.

    Mean of absolute values over samples (NaN ones do not count), over the layer's l2 norm. A layer on which
    nothing depends is 0.
    """
    size = np.abs(np.asarray(gates, np.float64))
    known = np.isfinite(size)
    mean = np.where(known, size, 0.0).sum(0) / np.maximum(known.sum(0), 1)
    norm = np.sqrt((mean**2).sum(-1, keepdims=True))
    return np.asarray(np.where(norm > 0, mean / np.where(norm > 0, norm, 1.0), 0.0))
