"""From noise to places and back: PLONK's flow on the sphere, with gradients.

The published pipeline wraps itself in ``no_grad``, so nothing can be traced back to the pixels; here the
same equations keep their graph. A level ``gamma(t)`` falls from 1 (data, t = 0) to 0 (noise, t = 1), and
``dx/dt = gamma'(t) v(x, gamma(t), image)``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from math import log, pi
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import normalize

if TYPE_CHECKING:
    from torch import Tensor, nn

UNIFORM_LOG_DENSITY = -log(4 * pi)
"""Log density of the uniform distribution on the unit sphere, nats per steradian."""


@dataclass(frozen=True)
class Schedule:
    """Sigmoid schedule of the noise level (Dufour et al. 2024, appendix; start, end, temperature)."""

    start: float = -7.0
    end: float = 3.0
    temperature: float = 1.0

    def __call__(self, t: Tensor) -> Tensor:
        """Level at time ``t``, from 1 at t = 0 to (just above) 0 at t = 1."""
        low, high = self._ends(t)
        return ((high - torch.sigmoid(self._at(t))) / (high - low)).clamp(1e-9, 1.0)

    def slope(self, t: Tensor) -> Tensor:
        """Derivative of the level with respect to ``t``."""
        low, high = self._ends(t)
        s = torch.sigmoid(self._at(t))
        return -s * (1 - s) * (self.end - self.start) / self.temperature / (high - low)

    def _at(self, t: Tensor) -> Tensor:
        return (self.start + t * (self.end - self.start)) / self.temperature

    def _ends(self, like: Tensor) -> tuple[Tensor, Tensor]:
        low, high = torch.tensor([self.start, self.end], dtype=like.dtype, device=like.device) / self.temperature
        return torch.sigmoid(low), torch.sigmoid(high)


def endpoints(
    network: nn.Module, embedding: Tensor, noise: Tensor, *, steps: int, schedule: Schedule = Schedule()
) -> Tensor:
    """Places that frozen ``noise (row, 3)`` flows to given ``embedding (row, channel)``: unit ``(row, 3)``.

    Euler steps in the level, projected on the sphere after each, as in the authors' sampler.
    """
    times = 1 - torch.arange(steps + 1, dtype=noise.dtype, device=noise.device) / steps
    levels = schedule(times)
    x = noise
    for now, following in pairwise(levels):
        velocity = network({"y": x, "emb": embedding, "gamma": now.expand(len(x))})
        x = normalize(x + (following - now) * velocity, dim=-1)
    return x


@torch.enable_grad()  # Captum checks its sums under no_grad, but the divergence needs a graph
def log_likelihood(
    network: nn.Module, embedding: Tensor, points: Tensor, *, steps: int, schedule: Schedule = Schedule()
) -> Tensor:
    """Log density of unit ``points (row, 3)`` given ``embedding (row, channel)``, ``(row,)``.

    Instantaneous change of variables (Chen et al. 2018, eq. 8) along the flow from data to noise, by
    fixed-step Runge-Kutta 4 with the exact divergence; nats per steradian. As in the authors' code the
    divergence is that of R^3, not of the sphere, and the noise is taken as uniform on the sphere. The
    package's own number is this divided by 3 ln 2.
    """
    keep = embedding.requires_grad
    rows = len(points)

    def slope(t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x if x.requires_grad else x.detach().requires_grad_(True)
        velocity = network({"y": x, "emb": embedding, "gamma": schedule(t).expand(rows)})
        dx = schedule.slope(t) * velocity
        return (dx, _divergence(dx, x, keep)) if keep else (dx.detach(), _divergence(dx, x, keep))

    x, gained = points.clone(), points.new_zeros(rows)
    for step in range(steps):
        x, gained = _runge_kutta(slope, step / steps, 1 / steps, x, gained)
    return UNIFORM_LOG_DENSITY + gained


def _divergence(dx: Tensor, x: Tensor, keep: bool) -> Tensor:
    """Trace of the Jacobian of ``dx (row, 3)`` in ``x (row, 3)``, row by row."""
    parts = [
        torch.autograd.grad(dx[:, i].sum(), x, create_graph=keep, retain_graph=True)[0][:, i]
        for i in range(x.shape[1])
    ]
    total: Tensor = torch.stack(parts).sum(0)
    return total


def _runge_kutta(
    slope: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], start: float, h: float, x: Tensor, gained: Tensor
) -> tuple[Tensor, Tensor]:
    """One classical fourth-order step of (x, integral of the divergence)."""
    t = torch.tensor(start, dtype=x.dtype, device=x.device)
    a, da = slope(t, x)
    b, db = slope(t + h / 2, x + h / 2 * a)
    c, dc = slope(t + h / 2, x + h / 2 * b)
    d, dd = slope(t + h, x + h * c)
    return x + h / 6 * (a + 2 * b + 2 * c + d), gained + h / 6 * (da + 2 * db + 2 * dc + dd)
