"""What this plugin offers. Imports nothing heavy: the classes are named, not loaded."""

from __future__ import annotations

from foveate.plugins.hooks import hookimpl
from foveate.plugins.specs import SourceSpec

FOVEATE_API = (1, 0)
_REQUIRES, _REMEDY = ("transformers",), 'pip install "foveate[dvis]"'


@hookimpl
def foveate_sources() -> list[SourceSpec]:
    """Video models."""
    return [
        SourceSpec(
            name="detectron2",
            target="foveate_dvis.detectron2_source:Detectron2Source",
            summary="a model of a detectron2 installation of your own: Mask2Former, ViTDet and others",
            capabilities=frozenset({"spatial", "gradients", "objects"}),
            requires=("detectron2", "torchvision"),
            remedy="install detectron2 from its repository, facebookresearch/detectron2; or record the model "
            "where it runs: python -m foveate_dvis.exporter",
        ),
        SourceSpec(
            name="dvis-daq",
            target="foveate_dvis.daq_source:DaqSource",
            summary="DVIS-DAQ: video instance segmentation, online or offline, with tracks that come and go",
            capabilities=frozenset({"spatial", "temporal", "gradients", "objects"}),
            requires=_REQUIRES,
            remedy=_REMEDY,
        ),
        SourceSpec(
            name="recording",
            target="foveate_dvis.recording_source:RecordingSource",
            summary="what the exporter recorded of a model in another environment, DVIS-DAQ or any other",
            capabilities=frozenset({"spatial", "temporal", "objects"}),
        ),
        SourceSpec(
            name="swimmer",
            target="foveate_dvis.swimmer:SwimmerSource",
            summary="foveate's own small video instance segmenter: joint space-time attention, one query a track",
            capabilities=frozenset({"spatial", "temporal", "gradients", "objects"}),
        ),
        SourceSpec(
            name="video-vit",
            target="foveate_dvis.video_vit:VideoSource",
            summary="VideoMAE, ViViT, V-JEPA 2: clips through joint space-time attention",
            capabilities=frozenset({"spatial", "temporal", "gradients"}),
            requires=_REQUIRES,
            remedy=_REMEDY,
        ),
        SourceSpec(
            name="timesformer",
            target="foveate_dvis.video_vit_divided:DividedSource",
            summary="TimeSformer: clips through attention over time, then over space",
            capabilities=frozenset({"spatial", "temporal", "gradients"}),
            requires=_REQUIRES,
            remedy=_REMEDY,
        ),
        SourceSpec(
            name="videomt",
            target="foveate_dvis.videomt:VideomtSource",
            summary="VidEoMT: video instance segmentation, tracks by query",
            capabilities=frozenset({"spatial", "temporal", "gradients", "objects"}),
            requires=_REQUIRES,
            remedy=_REMEDY,
        ),
        SourceSpec(
            name="sam2-video",
            target="foveate_dvis.sam2_video:Sam2VideoSource",
            summary="SAM 2: a prompted object, followed by attention to a memory of earlier frames",
            capabilities=frozenset({"spatial", "temporal", "gradients", "objects"}),
            requires=_REQUIRES,
            remedy=_REMEDY,
        ),
    ]
