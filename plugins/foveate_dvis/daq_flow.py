"""How information flows through DVIS-DAQ, as far as attention describes it.

Bottom to top: cells of three feature maps sample one another; queries read them, a level a layer; in every frame
the tracker's rows read the queries and one another, and a track's row begins as its row of the frame before;
refined instances begin as those rows, and attend over time and among themselves. Streams with a frame axis hold
their tokens frame by frame.

Not described: what a mask's pooled features do to positions (they only steer queries), the position memory that
stands in for a track outside its life (its share is lost), and a refiner's temporal convolution (an opaque step).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

from foveate.interfaces import AttentionStep, CallKey, MergeStep, OpaqueStep, Site, Step
from foveate_dvis.daq.outputs import NEW
from foveate_dvis.daq_clips import DaqClips
from foveate_dvis.daq_sites import (
    FRAME_CROSS,
    INSTANCE,
    INSTANCES,
    PIXEL_SELF,
    PIXELS,
    POOL,
    QUERIES,
    QUERY_CROSS,
    QUERY_SELF,
    ROW_CROSS,
    ROW_SELF,
    ROWS,
    TIME,
    TIMES,
    level_sizes,
    level_stream,
    runs,
)

if TYPE_CHECKING:
    from torch import Tensor

    from foveate.interfaces import Batch
    from foveate_dvis.daq.config import DaqConfig

Entry = tuple[int, int, int, float]
"""(sample, target token, source token, weight)."""


def daq_flow(config: DaqConfig, sites: tuple[Site, ...], batch: Batch, clips: DaqClips) -> list[Step]:
    """Every step in execution order; the gate is left out, for nothing of it enters the answer."""
    by_id = {site.id: site for site in sites}
    steps = [*_segmenter(by_id, batch, clips), *_tracker(by_id, clips)]
    return [*steps, *_refiner(by_id, clips, local=config.refiner.local_attention)] if config.refiner else steps


def _steps(site: Site, layer: int, clips: DaqClips, numbers: Iterable[int] | None = None) -> list[Step]:
    numbers = range(len(runs(site.id, clips))) if numbers is None else numbers
    residual = site.id != POOL
    return [AttentionStep(CallKey(site.id, layer, n), site.query, site.key, residual) for n in numbers]


# ------------------------------------------------------------------------------- segmenter


def _segmenter(by_id: dict[str, Site], batch: Batch, clips: DaqClips) -> list[Step]:
    steps = [step for layer in by_id[PIXEL_SELF].layers for step in _steps(by_id[PIXEL_SELF], layer, clips)]
    crosses = [site for site in by_id.values() if site.id.startswith(f"{QUERY_CROSS}.")]
    read = sorted({site.key for site in crosses})
    for level in range(len(level_sizes(batch))):
        if level_stream(level) in read:
            matrix = _one_level(level_sizes(batch), level, clips.frames).to(batch.inputs.device)
            steps.append(MergeStep(PIXELS, level_stream(level), matrix, "one level"))
    for layer in by_id[QUERY_SELF].layers:
        cross = next(site for site in crosses if layer in site.layers)
        steps += [*_steps(cross, layer, clips), *_steps(by_id[QUERY_SELF], layer, clips)]
    return steps


def _one_level(sizes: list[tuple[int, int]], level: int, frames: int) -> Tensor:
    """Rows of the identity that pick one level's cells in every frame, sparse (target, source)."""
    counts = [rows * columns for rows, columns in sizes]
    row = torch.arange(counts[level])
    frame = torch.arange(frames)[:, None]
    target = (frame * counts[level] + row).flatten()
    source = (frame * sum(counts) + sum(counts[:level]) + row).flatten()
    shape = (frames * counts[level], frames * sum(counts))
    index, ones = torch.stack([target, source]), torch.ones(len(target))
    return torch.sparse_coo_tensor(index, ones, shape, check_invariants=True)


# ------------------------------------------------------------------------------- tracker


def _tracker(by_id: dict[str, Site], clips: DaqClips) -> list[Step]:
    steps: list[Step] = []
    first = _first_frame(clips)
    if first:
        begun = _matrix(first, clips, clips.frames * len(clips.row_axis), clips.frames * clips.queries)
        steps.append(MergeStep(QUERIES, ROWS, begun, "the first frame's queries are rows"))
    number = {run: n for n, run in enumerate(runs(ROW_CROSS, clips))}
    for frame in range(clips.frames):
        if frame:
            size = clips.frames * len(clips.row_axis)
            carried = _matrix(_carried(clips, frame), clips, size, size)
            steps.append(MergeStep(ROWS, ROWS, carried, f"tracks carried into frame {frame}"))
        here = [number[sample, (frame,)] for sample in range(len(clips.clips)) if (sample, (frame,)) in number]
        for layer in by_id[ROW_CROSS].layers:
            steps += [*_steps(by_id[ROW_CROSS], layer, clips, here), *_steps(by_id[ROW_SELF], layer, clips, here)]
    return steps


def _first_frame(clips: DaqClips) -> list[Entry]:
    """In a clip's first frame each row is a query of the segmenter."""
    return [
        (sample, query, query, 1.0)
        for sample, clip in enumerate(clips.clips)
        if clip.first_frame == 0
        for query in range(clips.queries)
    ]


def _carried(clips: DaqClips, frame: int) -> list[Entry]:
    """Every row is itself, but a track's row of ``frame`` is its row of the frame before."""
    axis = len(clips.row_axis)
    found: list[Entry] = []
    for sample, clip in enumerate(clips.clips):
        carried: dict[int, int] = {}
        if frame < len(clip.rows):
            before = clip.rows[frame - 1]
            last = dict(zip(before.born, clips.rows_at(before), strict=True))
            carried = {clips.queries + track: last[track] for track in clip.rows[frame].ids if track != NEW}
        start = frame * axis
        found += [(sample, start + row, start - axis + source, 1.0) for row, source in carried.items()]
        others = set(range(clips.frames * axis)) - {start + row for row in carried}
        found += [(sample, row, row, 1.0) for row in sorted(others)]
    return found


# ------------------------------------------------------------------------------- refiner


def _refiner(by_id: dict[str, Site], clips: DaqClips, *, local: bool) -> list[Step]:
    turned = clips.instances * clips.read_frames
    forth = _matrix(_by_instance(clips), clips, turned, turned)
    back = forth.transpose(1, 2).coalesce()
    steps: list[Step] = [_instances(clips)]
    for layer in by_id[TIME].layers:
        steps.append(MergeStep(INSTANCES, TIMES, forth, "instance by instance"))
        steps += _steps(by_id[TIME], layer, clips)
        if local:
            steps.append(OpaqueStep(TIMES, f"the refiner's temporal convolution in layer {layer}"))
        steps.append(MergeStep(TIMES, INSTANCES, back, "frame by frame"))
        steps += [*_steps(by_id[INSTANCE], layer, clips), *_steps(by_id[FRAME_CROSS], layer, clips)]
    steps.append(MergeStep(INSTANCES, TIMES, forth, "instance by instance"))
    return [*steps, *_steps(by_id[POOL], 0, clips)]


def _by_instance(clips: DaqClips) -> list[Entry]:
    """(instance, frame) from (frame, instance)."""
    instances, frames = clips.instances, clips.read_frames
    return [
        (sample, i * frames + t, t * instances + i, 1.0)
        for sample in range(len(clips.clips))
        for i in range(instances)
        for t in range(frames)
    ]


def _instances(clips: DaqClips) -> MergeStep:
    """An instance's row of a frame: the track's row in the tracker, or a linked query of the segmenter."""
    axis, tracked, linked = len(clips.row_axis), list[Entry](), list[Entry]()
    for sample, clip in enumerate(clips.clips):
        if clip.refined is None:
            continue
        for i, (track, made) in enumerate(zip(clip.refined.ids, clip.refined.linked, strict=True)):
            if made:
                chain = clip.refined.chains[:, track].tolist() if clip.refined.chains is not None else []
                places = [(t, t * clips.queries + query) for t, query in enumerate(chain)]
            else:
                places = [(t, t * axis + row) for t, row in clips.life(sample, track)]
            rows = linked if made else tracked
            rows += [(sample, t * clips.instances + i, source, 1.0) for t, source in places]
    size = clips.read_frames * clips.instances
    others = (QUERIES, _matrix(linked, clips, size, clips.frames * clips.queries))
    own = _matrix(tracked, clips, size, clips.frames * axis)
    return MergeStep(ROWS, INSTANCES, own, "tracks over the clip", (others,))


def _matrix(entries: list[Entry], clips: DaqClips, targets: int, sources: int) -> Tensor:
    """Sparse (sample, target, source)."""
    shape = (len(clips.clips), targets, sources)
    index = torch.tensor([entry[:3] for entry in entries], dtype=torch.long).reshape(-1, 3).T
    values = torch.tensor([entry[3] for entry in entries])
    return torch.sparse_coo_tensor(index, values, shape, check_invariants=True).coalesce()
