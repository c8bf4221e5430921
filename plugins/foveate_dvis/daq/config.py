"""Every number that fixes a DVIS-DAQ model: sizes, thresholds, rules. Plain data, nothing heavy imported.

Defaults are the published configuration of the ResNet-50 model; :meth:`DaqConfig.preset` gives those of a
data set, :meth:`DaqConfig.from_json` reads the flat shape in which a run of the original is recorded.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from foveate.errors import ModelError, UsageError

Mode = Literal["online", "offline"]
MODES: tuple[Mode, ...] = ("online", "offline")

CONFIG_NAMES = ("daq_config.json", "config.json")
"""Names under which a folder of weights may hold the configuration, the first found wins."""


@dataclass(frozen=True)
class ResNetConfig:
    """A bottleneck ResNet: ``stem`` channels, ``width`` of the first stage (doubled each stage), ``depths``."""

    stem: int = 64
    width: int = 256
    depths: tuple[int, ...] = (3, 4, 6, 3)
    bottleneck: int = 64
    """Inner channels of the first stage (doubled each stage); a quarter of ``width`` as transformers builds it."""

    def __post_init__(self) -> None:
        if self.bottleneck * 4 != self.width:
            raise ModelError(
                f"ResNet with {self.bottleneck} inner and {self.width} outer channels in its first stage: "
                "expected outer = 4 x inner",
                remedy="only the usual bottleneck ratio is supported",
            )


@dataclass(frozen=True)
class SwinConfig:
    """A Swin transformer; defaults are Swin-L with windows of 12, as published."""

    width: int = 192
    depths: tuple[int, ...] = (2, 2, 18, 2)
    heads: tuple[int, ...] = (6, 12, 24, 48)
    window: int = 12


@dataclass(frozen=True)
class TrackerConfig:
    """The tracker's sizes and the rules by which tracks begin, go on and end."""

    layers: int = 6
    slots: int = 5
    """Background slots beside the tracks in the gate."""
    select_threshold: float = 0.1
    """A row needs a class score above this."""
    keep_threshold: float = 0.01
    """A track needs a score of the slot gate above this (only under ``ovis_rule``)."""
    patience: int = 8
    """Consecutive invalid frames after which a track dies (upstream: ``kick_out_frame_num``)."""
    ovis_rule: bool = True
    """Whether the slot gate takes part in keeping tracks (OVIS) or the class score alone (YouTube-VIS)."""
    position_cache: int = 10
    """The position memory compares with at most ``position_cache - 1`` stored positions."""
    first_threshold: float = 0.01
    """In the first frame: the segmenter's class score above which a row is a track."""
    noise_frames: int = 5
    """Tracks of fewer frames that ended before the clip did are dropped."""

    def __post_init__(self) -> None:
        for name, least in (("layers", 1), ("slots", 0), ("patience", 1), ("position_cache", 2)):
            if getattr(self, name) < least:
                raise ModelError(f"tracker: {name} = {getattr(self, name)}: expected at least {least}")


@dataclass(frozen=True)
class RefinerConfig:
    """The offline refiner: ``layers``, whether each has its temporal convolution, and how many tracks go in."""

    layers: int = 6
    local_attention: bool = False
    top_tracks: int = 40

    def __post_init__(self) -> None:
        if self.layers < 1 or self.top_tracks < 1:
            raise ModelError(
                f"refiner: {self.layers} layers, {self.top_tracks} tracks: expected at least 1 of each"
            )


@dataclass(frozen=True)
class DaqConfig:
    """A DVIS-DAQ model. Raises ModelError where sizes do not fit together.

    ``window`` frames go through the segmenter as one batch; ``divisor``: frames are padded at the bottom and at
    the right to a multiple of it; ``max_num``: answers kept per clip; ``labels``: class names, "" where unknown.
    """

    backbone: ResNetConfig | SwinConfig = field(default_factory=ResNetConfig)
    num_classes: int = 25
    num_queries: int = 100
    num_new_ins: int = 100
    hidden_dim: int = 256
    conv_dim: int = 256
    mask_dim: int = 256
    heads: int = 8
    encoder_layers: int = 6
    encoder_ffn_dim: int = 1024
    decoder_layers: int = 9
    ffn_dim: int = 2048
    reid_layers: int = 3
    window: int = 5
    divisor: int = 32
    shortest_edge: int = 480
    pixel_mean: tuple[float, ...] = (123.675, 116.28, 103.53)
    pixel_std: tuple[float, ...] = (58.395, 57.12, 57.375)
    max_num: int = 20
    tracker: TrackerConfig = field(default_factory=TrackerConfig)
    refiner: RefinerConfig | None = None
    labels: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.num_new_ins != self.num_queries:
            raise ModelError(
                f"{self.num_queries} segmenter queries but {self.num_new_ins} new-instance rows: expected equal",
                remedy="every new-instance row takes one segmenter query as its anchor; correct num_new_ins",
            )
        if self.hidden_dim % self.heads:
            raise ModelError(f"hidden size {self.hidden_dim} is not a multiple of {self.heads} heads")
        if self.mask_dim != self.conv_dim or self.mask_dim != self.hidden_dim:
            raise ModelError(
                f"hidden, conv and mask sizes are {self.hidden_dim}, {self.conv_dim}, {self.mask_dim}: expected "
                "one size (mask features are compared with and pooled into queries)"
            )
        if self.labels and len(self.labels) != self.num_classes:
            raise ModelError(f"{len(self.labels)} class names for {self.num_classes} classes")

    @property
    def mode(self) -> Mode:
        """``offline`` where there is a refiner."""
        return "online" if self.refiner is None else "offline"

    def online(self) -> DaqConfig:
        """This model without its refiner."""
        return replace(self, refiner=None)

    @classmethod
    def preset(
        cls, dataset: str, *, mode: Mode = "online", num_classes: int | None = None, **sizes: Any
    ) -> DaqConfig:
        """The published rules of ``ovis``, ``ytvis19`` or ``ytvis21``; ``num_classes`` for classes of your own.

        ``sizes`` are fields of :class:`DaqConfig`. Raises UsageError for another name.
        """
        rule = RULES.get(dataset)
        if rule is None:
            raise UsageError(f"data set {dataset!r} is not known", remedy=f"one of {', '.join(sorted(RULES))}")
        if mode not in MODES:
            raise UsageError(f"mode {mode!r} is not known", remedy="online or offline")
        threshold = rule["offline" if mode == "offline" else "online"]
        tracker = TrackerConfig(select_threshold=threshold, ovis_rule=bool(rule["ovis"]))
        settings = {"tracker": tracker, "refiner": RefinerConfig() if mode == "offline" else None, **sizes}
        return cls(num_classes=int(rule["classes"]) if num_classes is None else num_classes, **settings)

    @classmethod
    def from_json(cls, mapping: Mapping[str, Any]) -> DaqConfig:
        """From the flat mapping with upstream's names (as in a recorded case, or in a folder of weights).

        Absent keys keep the published value. Raises ModelError for a backbone or task that is not known.
        """
        return _read(cls, mapping)

    @classmethod
    def from_folder(cls, folder: Path | str) -> DaqConfig:
        """From ``daq_config.json`` or ``config.json`` in ``folder``. Raises ModelError where neither is there."""
        for name in CONFIG_NAMES:
            path = Path(folder) / name
            if path.is_file():
                return cls.from_json(_json(path))
        raise ModelError(
            f"{folder} has no configuration: expected {' or '.join(CONFIG_NAMES)}",
            remedy="put one beside the weights, or let the sizes be inferred from the weights and give the preset",
        )

    def to_json(self) -> dict[str, Any]:
        """The mapping that :meth:`from_json` reads back to an equal configuration."""
        return _write(self)


RULES: dict[str, dict[str, float]] = {
    "ovis": {"classes": 25, "online": 0.1, "offline": 0.05, "ovis": True},
    "ytvis19": {"classes": 40, "online": 0.01, "offline": 0.01, "ovis": False},
    "ytvis21": {"classes": 40, "online": 0.01, "offline": 0.01, "ovis": False},
}
"""Published class counts, selection thresholds and keep rules by data set."""

_FLAT = {
    "num_classes": "num_classes",
    "num_queries": "num_queries",
    "hidden_dim": "hidden_dim",
    "conv_dim": "conv_dim",
    "mask_dim": "mask_dim",
    "nheads": "heads",
    "encoder_layers": "encoder_layers",
    "encoder_ffn_dim": "encoder_ffn_dim",
    "decoder_layers": "decoder_layers",
    "dim_feedforward": "ffn_dim",
    "num_reid_head_layers": "reid_layers",
    "segmenter_window": "window",
    "size_divisibility": "divisor",
    "shortest_edge": "shortest_edge",
    "max_num": "max_num",
}
_TRACKER = {
    "layers": "layers",
    "num_slots": "slots",
    "inference_select_thr": "select_threshold",
    "keep_threshold": "keep_threshold",
    "kick_out_frame_num": "patience",
    "ovis_infer": "ovis_rule",
    "pos_embed_cache": "position_cache",
}
_TRACKER_FLAT = {"aux_inference_select_thr": "first_threshold", "noise_frame_num": "noise_frames"}
_REFINER = {"layers": "layers", "use_local_attn": "local_attention", "offline_topk_ins": "top_tracks"}
_DEPTHS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}


def _json(path: Path) -> Mapping[str, Any]:
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} is not a readable JSON file: {error}") from error
    if not isinstance(read, Mapping):
        raise ModelError(f"{path} holds {type(read).__name__}: expected one JSON object")
    return read


def _read(cls: type[DaqConfig], mapping: Mapping[str, Any]) -> DaqConfig:
    if mapping.get("task", "vis") != "vis":
        raise ModelError(f"task {mapping['task']!r} is not supported", remedy="video instance segmentation: vis")
    if not {"tracker", "num_queries"} & set(mapping):
        raise ModelError(
            f"not a configuration of DVIS-DAQ: it has neither tracker nor num_queries, but {sorted(mapping)[:8]}",
            remedy="write one with DaqConfig.to_json, or leave the file away and let sizes be inferred",
        )
    for name, only in (("encoder_points", 4), ("common_stride", 4)):
        if mapping.get(name, only) != only:
            raise ModelError(f"{name} = {mapping[name]} is not supported: expected {only}")
    if mapping.get("pre_norm", False):
        raise ModelError("pre_norm = true is not supported: DVIS-DAQ's published models are post-norm")
    given: dict[str, Any] = {mine: mapping[name] for name, mine in _FLAT.items() if name in mapping}
    given |= {name: tuple(mapping[name]) for name in ("pixel_mean", "pixel_std", "labels") if name in mapping}
    if "backbone" in mapping:
        given["backbone"] = _backbone(mapping["backbone"])
    tracker = mapping.get("tracker") or {}
    rules = {mine: tracker[name] for name, mine in _TRACKER.items() if name in tracker}
    rules |= {mine: mapping[name] for name, mine in _TRACKER_FLAT.items() if name in mapping}
    given["tracker"] = TrackerConfig(**rules)
    given["num_new_ins"] = tracker.get("num_new_ins", given.get("num_queries", cls.num_queries))
    refiner = mapping.get("refiner")
    if refiner is not None:
        given["refiner"] = RefinerConfig(
            **{mine: refiner[name] for name, mine in _REFINER.items() if name in refiner}
        )
    return cls(**given)


def _backbone(mapping: Mapping[str, Any]) -> ResNetConfig | SwinConfig:
    name = str(mapping.get("name", "")).lower()
    if "resnet" in name:
        depth = mapping.get("depth", 50)
        if "depths" not in mapping and depth not in _DEPTHS:
            raise ModelError(f"ResNet-{depth} is not supported: expected one of {sorted(_DEPTHS)}")
        if mapping.get("stride_in_1x1", False):
            raise ModelError("ResNet with its stride in the 1x1 convolution is not supported")
        depths = tuple(mapping["depths"]) if "depths" in mapping else _DEPTHS[depth]
        width = int(mapping.get("res2_out_channels", 256))
        inner = int(mapping.get("width_per_group", width // 4)) * int(mapping.get("num_groups", 1))
        return ResNetConfig(int(mapping.get("stem_out_channels", 64)), width, depths, inner)
    if "swin" in name:
        default = SwinConfig()
        return SwinConfig(
            width=int(mapping.get("embed_dim", default.width)),
            depths=tuple(mapping.get("depths", default.depths)),
            heads=tuple(mapping.get("num_heads", default.heads)),
            window=int(mapping.get("window_size", default.window)),
        )
    raise ModelError(
        f"backbone {mapping.get('name')!r} is not supported",
        remedy="ResNet or Swin; the ViT-adapter backbone of the published ViT-L models is not implemented here",
    )


def _write(config: DaqConfig) -> dict[str, Any]:
    written: dict[str, Any] = {name: getattr(config, mine) for name, mine in _FLAT.items()}
    written |= {name: list(getattr(config, name)) for name in ("pixel_mean", "pixel_std", "labels")}
    written |= {name: getattr(config.tracker, mine) for name, mine in _TRACKER_FLAT.items()}
    written["tracker"] = {name: getattr(config.tracker, mine) for name, mine in _TRACKER.items()}
    written["tracker"]["num_new_ins"] = config.num_new_ins
    refiner = config.refiner
    written["refiner"] = None if refiner is None else {n: getattr(refiner, mine) for n, mine in _REFINER.items()}
    back = config.backbone
    if isinstance(back, ResNetConfig):
        written["backbone"] = {
            "name": "resnet",
            "depths": list(back.depths),
            "stem_out_channels": back.stem,
            "res2_out_channels": back.width,
            "width_per_group": back.bottleneck,
        }
    else:
        names = {"width": "embed_dim", "depths": "depths", "heads": "num_heads", "window": "window_size"}
        written["backbone"] = {"name": "swin"} | {
            names[f.name]: list(v) if isinstance(v := getattr(back, f.name), tuple) else v for f in fields(back)
        }
    return written
