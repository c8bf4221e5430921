"""One forward of a source under the tap, with every record matched to its site."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from foveate.capture.claims import Claims
from foveate.capture.records import Record
from foveate.capture.tap import Tap, quiet
from foveate.errors import CaptureError
from foveate.interfaces import AttentionSource, Batch, CallKey, Outputs, Site


def tapped_forward(
    source: AttentionSource,
    batch: Batch,
    take: Callable[[CallKey, Record], None],
    *,
    needed: Sequence[Site],
    grad: bool = False,
    make_tap: Callable[..., Tap] = Tap,
) -> tuple[Outputs, Claims]:
    """Run ``source.forward`` once; ``take`` gets each claimed record as soon as its call is complete.

    ``make_tap`` makes a tap that sees more where one is wanted. Raises CaptureError where a layer of ``needed``
    was not seen. An exception in the model leaves it as it was.
    """
    claims = Claims(source)

    def sink(record: Record) -> None:
        call = claims.take(record.name, record.shape, record.ordinal)
        if call is not None:
            take(call, record)

    tap = make_tap(source.module, sink, heads=claims.heads, grad=grad, kernels=source.kernels)
    with eager_stance(source.module), tap:
        outputs = source.forward(batch, grad=grad)
    # A softmax of a declared module counts even where the tap could not follow it to its values.
    with quiet():
        for record in tap.unlinked:
            found = claims.find(record.name, record.ordinal)
            if found is not None:
                _check_sampled(record, *found)
                sink(record)
    claims.require(needed)
    return outputs, claims


def _check_sampled(record: Record, site: Site, layer: int) -> None:
    """Deformable weights without sampling points: a kernel that nobody named took them."""
    if site.form == "deformable" and record.form != "deformable":
        raise CaptureError(
            f"capture: {site.id} layer {layer} ({record.name}): the softmax was seen, but not where it sampled",
            remedy="name the compiled function in AttentionSource.kernels, 'package.module:function', "
            "or switch the model to its plain PyTorch sampling",
        )


@contextmanager
def eager_stance(module: nn.Module) -> Iterator[None]:
    """Run compiled modules eagerly: a compiled graph shows no calls. Nothing is recompiled afterwards."""
    compiled = any(
        type(child).__name__ == "OptimizedModule" or getattr(child, "_compiled_call_impl", None) is not None
        for child in module.modules()
    )
    if not compiled:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield
