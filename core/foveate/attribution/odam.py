"""ODAM: which places moved this one object, its class or one edge of its box.

Grad-CAM averages gradients over the map, which makes one weight a channel and points at every object of a
class. ODAM keeps the gradient of every place, so two objects of one class get maps of their own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from foveate.attribution.gradcam import TokenGradients

if TYPE_CHECKING:
    import torch

    from foveate.interfaces import TokenAxis


@dataclass(frozen=True)
class Odam(TokenGradients):
    """ReLU of the sum over channels of activation times gradient, place by place.

    The target may be any number that the detector gives an object: ``class``, an edge of its box, its mask.
    The authors smooth the gradients of convolutional maps first; tokens are left as they are.
    """

    name: ClassVar[str] = "odam"
    citation: ClassVar[str] = "Zhao & Chan, ICLR 2023, arXiv:2304.06354, sec. 3, without smoothing"

    def weigh(self, activations: torch.Tensor, gradients: torch.Tensor, tokens: TokenAxis) -> torch.Tensor:
        """Sum over channels of the product, ``(target, token)``."""
        return (activations * gradients).sum(-1)
