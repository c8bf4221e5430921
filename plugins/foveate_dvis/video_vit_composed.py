"""Divided attention as one matrix over space and time.

A layer of TimeSformer (Bertasius et al. 2021, arXiv:2102.05095, section 3) lets patch p of frame t read the same
place in all frames, with weights T_p[t, t'], and then the class token and all patches of its frame, with weights
S_t[p, p']. What reaches it from patch p' of frame t' is the product of the two steps, and the class token c is the
mean of its copies:

    C[(t, p), (t', p')] = S_t[p, p'] T_p'[t, t']        C[(t, p), c] = S_t[p, c]
    C[c, (t', p')] = mean_t S_t[c, p'] T_p'[t, t']      C[c, c] = mean_t S_t[c, c]

Rows sum to 1. With ``residual`` a, both are first mixed with the identity, a I + (1 - a) A, as rollout does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from foveate.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor


def compose(time: Tensor, space: Tensor, *, residual: float = 0.0) -> Tensor:
    """The matrix C, ``(sample, token, token)``: the class token, then patches frame by frame.

    ``time`` is ``(sample, place, frame, frame)``; ``space`` is ``(sample, frame, 1 + place, 1 + place)`` with the
    class token first. Rows are queries. Raises UsageError where the two do not belong to one clip.
    """
    import torch

    samples, places, frames = time.shape[:3]
    if time.shape[3] != frames or space.shape != (samples, frames, 1 + places, 1 + places):
        raise UsageError(
            f"compose: time {tuple(time.shape)} and space {tuple(space.shape)} do not fit: expected "
            "(sample, place, frame, frame) and (sample, frame, 1 + place, 1 + place)"
        )
    if not 0.0 <= residual < 1.0:
        raise UsageError(f"compose: residual must be in [0, 1), not {residual}")
    if residual:
        time, space = (residual * torch.eye(a.shape[-1]).to(a) + (1 - residual) * a for a in (time, space))
    size = frames * places
    patches = torch.einsum("btpq,bqtu->btpuq", space[:, :, 1:, 1:], time).reshape(samples, size, size)
    from_cls = torch.einsum("btq,bqtu->buq", space[:, :, 0, 1:], time).reshape(samples, 1, size) / frames
    to_cls = space[:, :, 1:, 0].reshape(samples, size, 1)
    corner = space[:, :, 0, 0].mean(1).reshape(samples, 1, 1)
    return torch.cat([torch.cat([corner, from_cls], 2), torch.cat([to_cls, patches], 2)], 1)
