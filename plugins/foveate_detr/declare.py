"""What this plugin offers. Imports nothing heavy: the classes are named, not loaded."""

from __future__ import annotations

from foveate.plugins.hooks import hookimpl
from foveate.plugins.specs import SourceSpec

FOVEATE_API = (1, 0)
_REQUIRES, _REMEDY = ("transformers",), 'pip install "foveate[detr]"'
_CAPABILITIES = frozenset({"spatial", "gradients", "objects"})


@hookimpl
def foveate_sources() -> list[SourceSpec]:
    """Detectors of the transformers library."""
    return [
        SourceSpec(
            name="detr",
            target="foveate_detr.detector:DetectorSource",
            summary="DETR, Conditional DETR, DAB-DETR, Table Transformer: dense encoder-decoder detectors",
            capabilities=_CAPABILITIES,
            requires=_REQUIRES,
            remedy=_REMEDY,
        ),
        SourceSpec(
            name="deformable-detr",
            target="foveate_detr.pyramid:PyramidSource",
            summary="Deformable DETR, RT-DETR, RT-DETRv2, D-FINE, RF-DETR: deformable attention over a pyramid",
            capabilities=_CAPABILITIES,
            requires=_REQUIRES,
            remedy=_REMEDY,
        ),
        SourceSpec(
            name="maskformer",
            target="foveate_detr.segmenter:SegmenterSource",
            summary="MaskFormer: object queries that answer with masks",
            capabilities=_CAPABILITIES,
            requires=_REQUIRES,
            remedy=_REMEDY,
        ),
        SourceSpec(
            name="mask2former",
            target="foveate_detr.segmenter:MaskedSegmenterSource",
            summary="Mask2Former: masked attention to one level of a pyramid a layer",
            capabilities=_CAPABILITIES,
            requires=_REQUIRES,
            remedy=_REMEDY,
        ),
        SourceSpec(
            name="oneformer",
            target="foveate_detr.segmenter:OneFormerSource",
            summary="OneFormer: Mask2Former for the task that is asked for",
            capabilities=_CAPABILITIES,
            requires=_REQUIRES,
            remedy=_REMEDY,
        ),
        SourceSpec(
            name="eomt",
            target="foveate_detr.segmenter:EncoderSegmenterSource",
            summary="EoMT: a plain vision transformer that segments",
            capabilities=_CAPABILITIES,
            requires=_REQUIRES,
            remedy=_REMEDY,
        ),
        SourceSpec(
            name="yolos",
            target="foveate_detr.encoder_only:EncoderDetectorSource",
            summary="YOLOS: object queries are tokens of a plain vision transformer",
            capabilities=_CAPABILITIES,
            requires=_REQUIRES,
            remedy=_REMEDY,
        ),
        SourceSpec(
            name="grounding-dino",
            target="foveate_detr.grounded:GroundedSource",
            summary="Grounding DINO: open vocabulary, words and picture read together",
            capabilities=_CAPABILITIES | {"text"},
            requires=_REQUIRES,
            remedy=_REMEDY,
        ),
        SourceSpec(
            name="owlv2",
            target="foveate_detr.owl:OwlSource",
            summary="OWLv2: open vocabulary, every patch proposes one object",
            capabilities=_CAPABILITIES | {"text"},
            requires=_REQUIRES,
            remedy=_REMEDY,
        ),
    ]
