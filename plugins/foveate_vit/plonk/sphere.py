"""The Earth as a unit sphere: degrees, unit vectors, great-circle distance."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

EARTH_KM = 6371.0088
"""Mean radius of the Earth, km (IUGG; Moritz 2000, Geodetic Reference System 1980)."""
SOFT_KM = 1.0
"""Far below the tens of kilometres that matter to a geolocator, far above float32's half metre."""


def to_unit(degrees: Tensor) -> Tensor:
    """``(..., [latitude, longitude])`` in degrees as unit vectors ``(..., 3)``."""
    latitude, longitude = torch.deg2rad(degrees).unbind(-1)
    ring = latitude.cos()
    return torch.stack([ring * longitude.cos(), ring * longitude.sin(), latitude.sin()], dim=-1)


def to_degrees(points: Tensor) -> Tensor:
    """Unit vectors ``(..., 3)`` as ``(..., [latitude, longitude])`` in degrees."""
    x, y, z = torch.nn.functional.normalize(points, dim=-1).unbind(-1)
    return torch.rad2deg(torch.stack([z.clamp(-1, 1).asin(), torch.atan2(y, x)], dim=-1))


def distance_km(a: Tensor, b: Tensor) -> Tensor:
    """Great-circle distance of unit vectors ``(..., 3)``, km.

    ``atan2(|a x b|, <a, b>)`` is accurate at every distance; arccos loses all digits below about 3 km in
    float32 and its gradient explodes there.
    """
    a, b = torch.broadcast_tensors(a, b)
    kilometres: Tensor = EARTH_KM * torch.atan2(torch.linalg.cross(a, b).norm(dim=-1), (a * b).sum(-1))
    return kilometres


def softened_km(a: Tensor, b: Tensor) -> Tensor:
    """:func:`distance_km` with its kink at zero rounded off within :data:`SOFT_KM` (pseudo-Huber).

    The predicted place is one of the draws, at distance zero from itself, where the gradient of the plain
    distance has the full length and the direction of rounding errors.
    """
    rounded: Tensor = (distance_km(a, b).square() + SOFT_KM**2).sqrt() - SOFT_KM
    return rounded


def medoid(points: Tensor) -> Tensor:
    """The point with the least total distance to the others, ``(..., point, 3)`` to ``(..., 3)``.

    Unlike the mean of two cities it is a place that was sampled.
    """
    cost = distance_km(points.unsqueeze(-2), points.unsqueeze(-3)).sum(-1)
    best = cost.argmin(-1)[..., None, None].expand(*points.shape[:-2], 1, 3)
    found: Tensor = points.gather(-2, best).squeeze(-2)
    return found


def resultant_length(points: Tensor) -> Tensor:
    """Length of the mean unit vector, 0 (anywhere) to 1 (one place) (Mardia & Jupp 2000, section 9.2)."""
    length: Tensor = points.mean(-2).norm(dim=-1)
    return length
