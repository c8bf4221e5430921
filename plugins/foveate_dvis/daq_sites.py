"""Where DVIS-DAQ attends, named for what each attention does, and the labels of every call.

Group axes are ``frame`` where calls hold frames (five at a time in the segmenter, one in the tracker, all in the
refiner) and ``track`` where instances are the batch. See ``docs/video.md`` for what each site is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from foveate.errors import UsageError
from foveate.interfaces import CallKey, CallLabels, Part, Place, Site, TokenAxis
from foveate_dvis.daq_clips import DaqClips

if TYPE_CHECKING:
    from foveate.interfaces import Batch
    from foveate_dvis.daq.config import DaqConfig

PIXELS, QUERIES, ROWS = "segmenter.pixels", "segmenter.queries", "tracker.rows"
SLOTS, SLOT_INPUTS = "tracker.slots", "tracker.slot_inputs"
INSTANCES, TIMES, SCORES = "refiner.instances", "refiner.times", "refiner.scores"

PIXEL_SELF, QUERY_SELF, QUERY_CROSS = "pixel_decoder.self", "segmenter.self", "segmenter.cross"
ROW_CROSS, ROW_SELF = "tracker.cross", "tracker.self"
SLOT_CROSS, SLOT_ASSIGN = "tracker.slot", "tracker.slot_assign"
TIME, INSTANCE, FRAME_CROSS, POOL = "refiner.time", "refiner.instance", "refiner.cross", "refiner.pool"

STRIDES = (32, 16, 8)
"""Input pixels a cell of each level that the segmenter's queries read, in the order of its layers."""


def level_stream(level: int) -> str:
    """The stream of one level's cells."""
    return f"segmenter.p{level}"


def daq_sites(config: DaqConfig) -> tuple[Site, ...]:
    """Every site of a model of these sizes."""
    return (*_segmenter(config), *_tracker(config), *(_refiner(config) if config.refiner is not None else ()))


def _segmenter(config: DaqConfig) -> list[Site]:
    pixel = "segmenter.model.pixel_level_module.decoder.encoder.layers"
    decoder = "segmenter.model.transformer_module.decoder.layers"
    heads, layers = config.heads, range(config.decoder_layers)
    sites = [
        Site(
            PIXEL_SELF, {f"{pixel}.{i}.self_attn": i for i in range(config.encoder_layers)}, heads, PIXELS, PIXELS,
            form="deformable", group=("frame",), summary="cells of three feature maps sample one another",
        )
    ]  # fmt: skip
    for level, stride in enumerate(STRIDES):
        modules = {f"{decoder}.{i}.cross_attn": i for i in layers if i % len(STRIDES) == level}
        if modules:
            told = f"a query reads the cells of {stride} pixels inside the mask that it predicted before"
            sites.append(
                Site(
                    f"{QUERY_CROSS}.p{level}", modules, heads, QUERIES, level_stream(level), "cross",
                    masks=("predicted",), group=("frame",), summary=told,
                )
            )  # fmt: skip
    own = {f"{decoder}.{i}.self_attn": i for i in layers}
    told = "the segmenter's queries of one frame read one another"
    return [*sites, Site(QUERY_SELF, own, heads, QUERIES, QUERIES, group=("frame",), summary=told)]


def _tracker(config: DaqConfig) -> list[Site]:
    heads, layers = config.heads, range(config.tracker.layers)

    def modules(name: str) -> dict[str, int]:
        return {f"tracker.{name.format(i)}": i for i in layers}

    return [
        Site(
            ROW_CROSS, modules("transformer_cross_attention_layers.{}.multihead_attn"), heads, ROWS, QUERIES,
            "cross", group=("frame",), ragged=("query",),
            summary="carried tracks (temporal reference) and new-instance rows (detection) read the frame",
        ),
        Site(
            ROW_SELF, modules("transformer_self_attention_layers.{}.self_attn"), heads, ROWS, ROWS,
            group=("frame",), ragged=("query", "key"), summary="tracks and new-instance rows read one another",
        ),
        Site(
            SLOT_CROSS, modules("slot_cross_attention_layers.{}.multihead_attn"), heads, SLOTS, QUERIES, "cross",
            group=("frame",), ragged=("query",), optional=True,
            summary="tracks and background slots read the frame's queries, to decide which tracks are kept",
        ),
        Site(
            SLOT_ASSIGN, modules("slot_cross_attention_layers.{}.slot_attn"), 1, SLOTS, SLOT_INPUTS, "cross",
            "slot", group=("frame",), ragged=("query", "key"), optional=True,
            summary="what a slot takes of what tracks read: softmax over slots, renormalised over inputs",
        ),
    ]  # fmt: skip


def _refiner(config: DaqConfig) -> list[Site]:
    assert config.refiner is not None
    heads, layers = config.heads, range(config.refiner.layers)

    def modules(name: str) -> dict[str, int]:
        return {f"refiner.transformer_{name.format(i)}": i for i in layers}

    both: tuple[Literal["query", "key"], ...] = ("query", "key")
    return [
        Site(
            TIME, modules("time_self_attention_layers.{}.self_attn"), heads, TIMES, TIMES, "temporal",
            group=("track",), ragged=both, optional=True, summary="an instance's frames read one another",
        ),
        Site(
            INSTANCE, modules("obj_self_attention_layers.{}.self_attn"), heads, INSTANCES, INSTANCES,
            group=("frame",), ragged=both, optional=True, summary="the instances of one frame read one another",
        ),
        Site(
            FRAME_CROSS, modules("cross_attention_layers.{}.multihead_attn"), heads, INSTANCES, QUERIES, "cross",
            group=("frame",), ragged=("query",), optional=True,
            summary="instances read the segmenter's queries of the same frame",
        ),
        Site(
            POOL, {"refiner.activation_proj": 0}, 1, SCORES, TIMES, "temporal", "pool",
            group=("track",), ragged=("key",), optional=True,
            summary="importance of each frame in an instance's class score",
        ),
    ]  # fmt: skip


# ------------------------------------------------------------------------------- what a call holds


def runs(site: str, clips: DaqClips) -> list[tuple[int, tuple[int, ...]]]:
    """(sample, frames of the block) of every call of one layer, in the order in which they ran."""
    found: list[tuple[int, tuple[int, ...]]] = []
    for sample, clip in enumerate(clips.clips):
        frames = range(len(clip.rows))
        if site.startswith(("segmenter.", "pixel_decoder.")):
            found += [(sample, tuple(frames[i : i + clips.window])) for i in frames[:: clips.window]]
        elif site in (SLOT_CROSS, SLOT_ASSIGN):  # the clip's first frame has no tracks to keep
            found += [(sample, (i,)) for i in frames if clip.rows[i].frame > 0]
        elif site.startswith("tracker."):
            found += [(sample, (i,)) for i in frames]
        else:
            found.append((sample, tuple(range(clip.frames.stop))))
    return found


def label_call(call: CallKey, batch: Batch, clips: DaqClips) -> CallLabels:
    """The axes of one call. Raises UsageError for a call that did not run."""
    ran = runs(call.site, clips)
    if call.number >= len(ran):
        raise UsageError(
            f"{call.site} layer {call.layer} ran {len(ran)} times in this batch, not {call.number + 1}"
        )
    sample, frames = ran[call.number]
    if call.site.startswith("refiner."):
        return _in_refiner(call.site, sample, frames, clips)
    if call.site.startswith("tracker."):
        return _in_tracker(call.site, sample, frames[0], clips)
    at = {"sample": Part((sample,), len(clips.clips)), "frame": Part(frames, clips.frames)}
    query, key = (_segmenter_axis(stream, batch, clips) for stream in segmenter_streams(call.site))
    return CallLabels((("sample", 1), ("frame", len(frames))), query, key, at=at)


def segmenter_streams(site: str) -> tuple[str, str]:
    """Streams of a segmenter site's queries and keys."""
    if site == PIXEL_SELF:
        return PIXELS, PIXELS
    return QUERIES, QUERIES if site == QUERY_SELF else f"segmenter.{site.rpartition('.')[2]}"


def level_sizes(batch: Batch) -> list[tuple[int, int]]:
    """(rows, columns) of each level; inputs are multiples of the largest stride."""
    height, width = batch.inputs.shape[-2:]
    return [(int(height) // stride, int(width) // stride) for stride in STRIDES]


def _segmenter_axis(stream: str, batch: Batch, clips: DaqClips) -> TokenAxis:
    if stream == QUERIES:
        return clips.query_axis
    height, width = (float(side) for side in batch.inputs.shape[-2:])
    parts = [
        TokenAxis.patches(rows, columns, height=height, width=width, level=level)
        for level, (rows, columns) in enumerate(level_sizes(batch))
        if stream in (PIXELS, level_stream(level))
    ]
    return TokenAxis.concat(*parts)


def _in_tracker(site: str, sample: int, frame: int, clips: DaqClips) -> CallLabels:
    rows = clips.clips[sample].rows[frame]
    at = {"sample": Part((sample,), len(clips.clips)), "frame": Part((frame,), clips.frames)}
    gate = site in (SLOT_CROSS, SLOT_ASSIGN)
    axis, index = (clips.slot_axis, clips.slots_at(rows)) if gate else (clips.row_axis, clips.rows_at(rows))
    keys = None if site in (ROW_CROSS, SLOT_CROSS) else axis
    return _placed((("sample", 1),), at, (axis, index), (keys or clips.query_axis, index if keys else None))


def _in_refiner(site: str, sample: int, frames: Sequence[int], clips: DaqClips) -> CallLabels:
    refined = clips.clips[sample].refined
    count = 0 if refined is None else len(refined.ids)
    instances, times = tuple(range(count)), tuple(frames)
    at = {"sample": Part((sample,), len(clips.clips))}
    if site in (TIME, POOL):
        at["track"] = Part(instances, clips.instances)
        leading = (("sample", 1), ("track", count))
        pool = (TokenAxis.of_kind("pool", 1), None)
        return _placed(leading, at, pool if site == POOL else (clips.frame_axis, times), (clips.frame_axis, times))
    at["frame"] = Part(times, clips.read_frames)
    own = (clips.instance_axis, instances)
    keys = own if site == INSTANCE else (clips.query_axis, None)
    return _placed((("sample", 1), ("frame", len(times))), at, own, keys)


def _placed(
    leading: tuple[tuple[str, int], ...],
    at: dict[str, Part],
    query: tuple[TokenAxis, Sequence[int] | None],
    key: tuple[TokenAxis, Sequence[int] | None],
) -> CallLabels:
    """Labels of a call, from the common axes and the call's positions on them (None: all of the axis)."""
    places = [None if index is None else Place(axis, tuple(index)) for axis, index in (query, key)]
    own = [axis if index is None else axis.take(list(index)) for axis, index in (query, key)]
    return CallLabels(leading, own[0], own[1], at=at, query_place=places[0], key_place=places[1])
