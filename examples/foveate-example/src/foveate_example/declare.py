"""What this package offers. Nothing heavy is imported: classes are named, and loaded when they are used."""

from __future__ import annotations

from foveate.plugins.hooks import hookimpl
from foveate.plugins.specs import MetricSpec, RendererSpec, SourceSpec

FOVEATE_API = (1, 0)  # the version this was written for: a foveate that is too old says so


@hookimpl
def foveate_sources() -> list[SourceSpec]:
    """The adapter for BlockViT."""
    return [
        SourceSpec(
            name="block-vit",
            target="foveate_example.source:BlockViTSource",
            summary="a small ViT in plain PyTorch: letterboxed pictures, one register, patch mean read out",
            requires=("torch", "safetensors"),
            capabilities=frozenset({"spatial", "gradients"}),
        )
    ]


@hookimpl
def foveate_metrics() -> list[MetricSpec]:
    """One number about where a head looks."""
    return [
        MetricSpec(
            "border_lift", "foveate_example.metric:BorderLift", "mass on the outermost patches, 1 = uniform"
        )
    ]


@hookimpl
def foveate_renderers() -> list[RendererSpec]:
    """One picture without a plotting library."""
    return [RendererSpec("text", "foveate_example.renderer:TextGrid", "one sample's readout row as characters")]
