"""What this plugin offers. Imports nothing heavy: the classes are named, not loaded."""

from __future__ import annotations

from foveate.plugins.hooks import hookimpl
from foveate.plugins.specs import SourceSpec

FOVEATE_API = (1, 0)
_REQUIRES, _REMEDY = ("transformers",), 'pip install "foveate[vit]"'


@hookimpl
def foveate_sources() -> list[SourceSpec]:
    """Vision transformers of the transformers library, and the geolocator PLONK."""
    return [
        SourceSpec(
            name="vit",
            target="foveate_vit.vision:VisionSource",
            summary="ViT, DeiT, DINOv2, DINOv3: encoders and classifiers of transformers",
            capabilities=frozenset({"spatial", "gradients"}),
            requires=_REQUIRES,
            remedy=_REMEDY,
        ),
        SourceSpec(
            name="clip",
            target="foveate_vit.contrastive:ContrastiveSource",
            summary="CLIP, StreetCLIP, SigLIP, SigLIP 2: zero-shot over prompts, or the vision tower alone",
            capabilities=frozenset({"spatial", "gradients", "text"}),
            requires=_REQUIRES,
            remedy=_REMEDY,
        ),
        SourceSpec(
            name="siglip2-naflex",
            target="foveate_vit.naflex:NaFlexSource",
            summary="SigLIP 2 NaFlex on one fixed grid of patches",
            capabilities=frozenset({"spatial", "gradients", "text"}),
            requires=_REQUIRES,
            remedy=_REMEDY,
        ),
        SourceSpec(
            name="clip-text",
            target="foveate_vit.text:TextSource",
            summary="the text tower of CLIP, SigLIP or SigLIP 2: attention between the words of a prompt",
            capabilities=frozenset({"text", "gradients"}),
            requires=_REQUIRES,
            remedy=_REMEDY,
        ),
        SourceSpec(
            name="plonk",
            target="foveate_vit.plonk.source:PlonkSource",
            summary="PLONK's image encoder, explained by where the geolocator says the photo was taken",
            capabilities=frozenset({"spatial", "gradients"}),
            requires=_REQUIRES,
            remedy=_REMEDY,
        ),
    ]
