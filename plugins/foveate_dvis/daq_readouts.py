"""Where DVIS-DAQ's answer is read from: the rows of one instance, frame by frame.

Offline a class is read from the pooling over frames, and a mask from the instance's row of every frame. Online
both are read from the track's rows in the tracker: its class is the mean of what its rows say, over its life; in
the frame of its birth its row is a new-instance row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from foveate.interfaces import BoundTarget, Readout
from foveate_dvis.daq_clips import DaqClips
from foveate_dvis.daq_sites import FRAME_CROSS, INSTANCE, POOL, ROW_CROSS, ROW_SELF, TIME

Chosen = Sequence[tuple[int, int]]
"""(sample, instance) of every row; instance -1 where a clip has none."""


def daq_readouts(
    clips: DaqClips, bound: BoundTarget | None, *, offline: bool, device: torch.device
) -> Mapping[str, Readout]:
    """Rows of every bound instance, or of the best one of each sample; the first site is where reading starts."""
    if bound is None:
        chosen = [(sample, _best(clips, sample)) for sample in range(len(clips.clips))]
    else:
        chosen = [(row.sample, int(row.object or 0)) for row in bound.rows]
    masks = bound is not None and any(row.kind == "mask" for row in bound.rows)
    tracker = _rows(clips, chosen).to(device)
    found = {ROW_CROSS: Readout(tracker, "track"), ROW_SELF: Readout(tracker, "track")}
    if not offline:
        return found
    frames = Readout(_every_frame(clips, chosen).to(device), "track")
    pool = Readout(_pooled(clips, chosen).to(device), "track")
    times = Readout(_every_time(clips, chosen).to(device), "track")
    refined = {POOL: pool, FRAME_CROSS: frames, INSTANCE: frames, TIME: times}
    order = (FRAME_CROSS, INSTANCE, POOL, TIME) if masks else (POOL, FRAME_CROSS, INSTANCE, TIME)
    return {site: refined[site] for site in order} | found


def _best(clips: DaqClips, sample: int) -> int:
    logits = clips.clips[sample].final_logits.detach().float()
    return int(logits.softmax(-1)[:, :-1].amax(-1).argmax()) if len(logits) else -1


def _rows(clips: DaqClips, chosen: Chosen) -> torch.Tensor:
    """The track's rows in the tracker, (row, frame, position): equal weights over the frames of its life."""
    weights = torch.zeros(len(chosen), clips.frames, len(clips.row_axis))
    for i, (sample, instance) in enumerate(chosen):
        clip = clips.clips[sample]
        if instance < 0 or (clip.refined is not None and clip.refined.linked[instance]):
            continue
        track = (clip.ids if clip.refined is None else clip.refined.ids)[instance]
        places = list(clips.life(sample, track))
        for frame, position in places:
            weights[i, frame, position] = 1 / len(places)
    return weights


def _every_frame(clips: DaqClips, chosen: Chosen) -> torch.Tensor:
    """The instance's row of every frame, (row, frame, instance)."""
    weights = torch.zeros(len(chosen), clips.read_frames, clips.instances)
    for i, (sample, instance) in enumerate(chosen):
        frames = clips.clips[sample].frames.stop
        if instance >= 0:
            weights[i, :frames, instance] = 1 / frames
    return weights


def _every_time(clips: DaqClips, chosen: Chosen) -> torch.Tensor:
    """The same, (row, instance, frame)."""
    return _every_frame(clips, chosen).transpose(1, 2)


def _pooled(clips: DaqClips, chosen: Chosen) -> torch.Tensor:
    """The pooling query of the instance, (row, instance, 1)."""
    weights = torch.zeros(len(chosen), clips.instances, 1)
    for i, (_, instance) in enumerate(chosen):
        if instance >= 0:
            weights[i, instance, 0] = 1.0
    return weights
