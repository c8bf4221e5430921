"""The segmenter: transformers' Mask2Former (Cheng et al. 2022, arXiv:2112.01527) in DVIS-DAQ's sizes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from foveate.errors import MissingDependencyError, ModelError
from foveate_dvis.daq.config import DaqConfig, ResNetConfig, SwinConfig

STAGES = ["stage1", "stage2", "stage3", "stage4"]


def build_segmenter(config: DaqConfig) -> Any:
    """A ``Mask2FormerForUniversalSegmentation`` of random weights. Raises MissingDependencyError, ModelError."""
    try:
        from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation
    except ImportError as error:
        raise MissingDependencyError(
            "DVIS-DAQ's segmenter is the Mask2Former of the transformers library, which is not installed",
            remedy='pip install "foveate[dvis]"',
        ) from error
    with _quiet():  # it warns of a ResNet, which works
        settings = Mask2FormerConfig(
            backbone_config=_backbone(config.backbone),
            feature_size=config.conv_dim,
            mask_feature_size=config.mask_dim,
            hidden_dim=config.hidden_dim,
            encoder_feedforward_dim=config.encoder_ffn_dim,
            encoder_layers=config.encoder_layers,
            decoder_layers=config.decoder_layers + 1,  # theirs counts the prediction before the first layer
            num_attention_heads=config.heads,
            dim_feedforward=config.ffn_dim,
            num_queries=config.num_queries,
            num_labels=config.num_classes,
            dropout=0.0,
        )
        return Mask2FormerForUniversalSegmentation(settings)


def _backbone(backbone: ResNetConfig | SwinConfig) -> Any:
    from transformers import ResNetConfig as TheirResNet
    from transformers import SwinConfig as TheirSwin

    if isinstance(backbone, ResNetConfig):
        return TheirResNet(
            embedding_size=backbone.stem,
            hidden_sizes=[backbone.width << stage for stage in range(len(backbone.depths))],
            depths=list(backbone.depths),
            layer_type="bottleneck",
            out_features=STAGES,
        )
    if len(backbone.depths) != 4 or len(backbone.heads) != 4:
        raise ModelError(f"Swin of {len(backbone.depths)} stages: expected 4")
    return TheirSwin(
        embed_dim=backbone.width,
        depths=list(backbone.depths),
        num_heads=list(backbone.heads),
        window_size=backbone.window,
        image_size=384,
        drop_path_rate=0.0,
        out_features=STAGES,
    )


@contextmanager
def _quiet() -> Iterator[None]:
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
