"""A fake tracker: frames read in blocks, tracks that come and go, and what each row attends to.

Four frames of 2 x 2 patches. Patches attend to each other in blocks of two frames (the last block may be shorter);
then, frame by frame and sample by sample, carried tracks and two anchors read the frame and one another. Which
anchors become tracks, and which tracks end, is a fixed schedule for each sample. Tracks read once more in a gate.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from foveate.geometry import CellGrid, Geometry
from foveate.interfaces import (
    AttentionSource,
    AttentionStep,
    Batch,
    BoundTarget,
    CallKey,
    CallLabels,
    MergeStep,
    ModelCard,
    Part,
    Place,
    Prediction,
    Readout,
    Sample,
    Site,
    TargetRow,
    TokenAxis,
)
from foveate.testing.tiny import TinyConfig
from foveate.testing.tiny_detector import Reader

FRAMES, SIDE, ANCHORS, BLOCK = "frames.self", 2, 2, 2
READ, OWN, GATE = "tracker.cross", "tracker.self", "tracker.gate"
PATCHES, ROWS, TRACKS = "patches", "rows", "tracks"

BIRTHS = ({0: [1], 1: [0], 3: [0]}, {0: [0, 1], 2: [1]})
"""Of each sample: frame -> anchors that become tracks, in order."""
DEATHS = ({2: [0]}, {1: [1]})
"""Of each sample: frame -> tracks that are not carried on."""


@dataclass
class Run:
    """What one sample's run did: per frame the track of each row (-1: an anchor), and the final rows."""

    rows: list[list[int]]
    born: list[dict[int, int]]
    states: list[torch.Tensor]
    tracks: int


class TrackedModel(nn.Module):
    """See the module."""

    def __init__(self, config, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Conv2d(3, config.width, config.patch, stride=config.patch)
        self.frames, self.gate = Reader(config), Reader(config)
        self.read = nn.ModuleList(Reader(config) for _ in range(2))
        self.own = nn.ModuleList(Reader(config) for _ in range(2))
        self.anchors = nn.Parameter(torch.randn(ANCHORS, config.width))
        self.head = nn.Linear(config.width, config.classes)
        with torch.no_grad():
            for name, value in self.named_parameters():
                if name.endswith(("q.weight", "k.weight")):
                    value *= 4
        self.eval()

    def forward(self, clips):
        return [self.one(clip, BIRTHS[i % 2], DEATHS[i % 2]) for i, clip in enumerate(clips)]

    def one(self, clip, births, deaths):
        x = self.embed(clip).flatten(2).transpose(1, 2)
        x = torch.cat([block + self.frames(block, block) for block in x.split(BLOCK)])
        run, live, states = Run([], [], [], 0), [], []
        for t, frame in enumerate(x):
            rows = torch.cat([*[s[None] for s in states], self.anchors])[None]
            if live:
                self.gate(rows[:, : len(live)], frame[None])
            for read, own in zip(self.read, self.own, strict=True):
                rows = rows + read(F.layer_norm(rows, rows.shape[-1:]), frame[None])
                rows = rows + own(F.layer_norm(rows, rows.shape[-1:]), F.layer_norm(rows, rows.shape[-1:]))
            run.rows.append([*live, *[-1] * ANCHORS])
            run.states.append(rows[0])
            born = {len(live) + a: run.tracks + n for n, a in enumerate(births.get(t, []))}
            run.born.append(born)
            run.tracks += len(born)
            keep = [(i, k) for i, k in enumerate(live) if k not in deaths.get(t, [])]
            live = [k for _, k in keep] + list(born.values())
            states = [rows[0, i] for i, _ in keep] + [rows[0, i] for i in born]
        return run


class TrackedSource(AttentionSource):
    """Rows on one axis for the clip: the anchors, then every track in order of birth."""

    media, targets = "clip", ("track",)

    def __init__(self, seed=0):
        self.config = TinyConfig(image=16, patch=8)
        self.card = ModelCard("tracked", "tracked", "tracked")
        self._module = TrackedModel(self.config, seed)

    @classmethod
    def open(cls, row, **options):
        return cls()

    @property
    def module(self):
        return self._module

    @property
    def sites(self):
        heads, both = self.config.heads, ("query", "key")
        return (
            Site(FRAMES, {"frames": 0}, heads, PATCHES, PATCHES, group=("frame",)),
            Site(
                GATE, {"gate": 0}, heads, TRACKS, PATCHES, "cross",
                group=("frame",), ragged=("query",), optional=True,
            ),
            Site(
                READ, {f"read.{i}": i for i in range(2)}, heads, ROWS, PATCHES, "cross",
                group=("frame",), ragged=("query",),
            ),
            Site(OWN, {f"own.{i}": i for i in range(2)}, heads, ROWS, ROWS, group=("frame",), ragged=both),
        )  # fmt: skip

    def encode(self, samples):
        pixels = torch.stack([torch.from_numpy(s.pixels).permute(0, 3, 1, 2).float() / 128 - 1 for s in samples])
        index = torch.arange(pixels.shape[1]).expand(len(samples), -1)
        geometry = tuple(Geometry.identity(16, 16) for _ in samples)
        return Batch(pixels, geometry, tuple(s.id for s in samples), {"frame_index": index})

    def forward(self, batch, *, grad=False):
        with torch.set_grad_enabled(grad):
            return self.module(batch.inputs)

    def predictions(self, outputs, batch):
        return [[Prediction("track", 1.0, track=str(k)) for k in range(run.tracks)] for run in outputs]

    # A track's rows: an anchor in the frame of its birth, its own row afterwards.

    def position(self, run, t, row):
        track = run.rows[t][row]
        return row - run.rows[t].index(-1) if track < 0 else ANCHORS + track

    def places(self, run, track):
        """(frame, position) of every row of a track."""
        found = []
        for t, rows in enumerate(run.rows):
            found += [(t, self.position(run, t, row)) for row, k in run.born[t].items() if k == track]
            found += [(t, ANCHORS + track)] if track in rows else []
        return found

    def bind(self, outputs, batch, target):
        rows = [TargetRow(i, "track", object=k) for i, run in enumerate(outputs) for k in range(run.tracks)]
        return BoundTarget(tuple(rows), "logit")

    def score(self, outputs, batch, bound):
        found = []
        for row in bound.rows:
            run = outputs[row.sample]
            states = []
            for t, position in self.places(run, row.object):
                own = [self.position(run, t, i) for i in range(len(run.rows[t]))].index(position)
                states.append(run.states[t][own])
            found.append(self.module.head(torch.stack(states).mean(0))[0])
        return torch.stack(found).float()

    def readout(self, batch, outputs, bound=None):
        chosen = [(i, 0) for i in range(len(batch))]
        if bound is not None:
            chosen = [(row.sample, row.object) for row in bound.rows]
        axis = len(self.row_axis(outputs))
        weights = torch.zeros(len(chosen), batch.inputs.shape[1], axis)
        for i, (sample, track) in enumerate(chosen):
            places = self.places(outputs[sample], track)
            for t, position in places:
                weights[i, t, position] = 1 / len(places)
        return {READ: Readout(weights, "track"), OWN: Readout(weights, "track")}

    # Labels.

    def row_axis(self, outputs):
        tracks = max(run.tracks for run in outputs)
        return TokenAxis.concat(TokenAxis.of_kind("object", ANCHORS), self.track_axis(tracks))

    @staticmethod
    def track_axis(tracks):
        return TokenAxis.of_kind("track", tracks, label=tuple(str(k) for k in range(tracks)))

    def label(self, call, batch, outputs):
        frames, samples = batch.inputs.shape[1], len(batch)
        patches = TokenAxis.patches(SIDE, SIDE, height=16, width=16)
        if call.site == FRAMES:
            blocks = -(-frames // BLOCK)
            sample, block = divmod(call.number, blocks)
            held = tuple(range(block * BLOCK, min(frames, (block + 1) * BLOCK)))
            at = {"sample": Part((sample,), samples), "frame": Part(held, frames)}
            return CallLabels((("sample", 1), ("frame", len(held))), patches, patches, at=at)
        ran = [
            (i, t)
            for i, run in enumerate(outputs)
            for t in range(frames)
            if call.site != GATE or max(run.rows[t]) >= 0
        ]
        sample, t = ran[call.number]
        at = {"sample": Part((sample,), samples), "frame": Part((t,), frames)}
        run, axis = outputs[sample], self.row_axis(outputs)
        index = tuple(self.position(run, t, row) for row in range(len(run.rows[t])))
        if call.site == GATE:
            axis = self.track_axis(max(run.tracks for run in outputs))
            index = tuple(k for k in run.rows[t] if k >= 0)
        rows = Place(axis, index)
        keys = (axis.take(index), rows) if call.site == OWN else (patches, None)
        return CallLabels((("sample", 1),), axis.take(index), keys[0], at=at, query_place=rows, key_place=keys[1])

    # Flow: frame by frame; a track's row of a frame is its row of the frame before.

    def flow(self, batch, outputs):
        frames, samples = batch.inputs.shape[1], len(batch)
        blocks = -(-frames // BLOCK) * samples
        steps = [AttentionStep(CallKey(FRAMES, 0, n), PATCHES, PATCHES) for n in range(blocks)]
        for t in range(frames):
            if t:
                steps.append(MergeStep(ROWS, ROWS, self.carried(outputs, t, frames), f"tracks into frame {t}"))
            for layer in range(2):
                for site, key in ((READ, PATCHES), (OWN, ROWS)):
                    numbers = [sample * frames + t for sample in range(samples)]
                    steps += [AttentionStep(CallKey(site, layer, n), ROWS, key) for n in numbers]
        return steps

    def carried(self, outputs, t, frames):
        axis = len(self.row_axis(outputs))
        matrix = torch.eye(frames * axis).repeat(len(outputs), 1, 1)
        for sample, run in enumerate(outputs):
            matrix[sample, t * axis : (t + 1) * axis] = 0
            for track in (k for k in run.rows[t] if k >= 0):
                before = dict(self.places(run, track))[t - 1]
                matrix[sample, t * axis + ANCHORS + track, (t - 1) * axis + before] = 1
        return matrix

    def stream(self, batch):
        return PATCHES

    def cells(self, batch):
        return CellGrid.regular(SIDE, SIDE, height=16, width=16)


def tracked_samples(count=2, frames=4, seed=0):
    """Random clips of ``frames`` x 16 x 16."""
    random = np.random.default_rng(seed)
    return [
        Sample(f"clip-{i}", random.integers(0, 256, (frames, 16, 16, 3), dtype=np.uint8)) for i in range(count)
    ]
