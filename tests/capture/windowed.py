"""A source with window and frame axes: attention in four windows, then once a frame over everything."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

from foveate.interfaces import (
    AttentionStep,
    CallKey,
    CallLabels,
    MergeStep,
    Readout,
    Site,
    TokenAxis,
)
from foveate.testing.tiny import TinyConfig, TinySource
from foveate.testing.tiny_detector import Reader

WINDOW, FRAME = "local.self", "clip.cross"
SIDE, WINDOWS = 4, 4


def window_order():
    """Token numbers window by window: 2 x 2 windows of 2 x 2 tokens on a 4 x 4 grid."""
    grid = torch.arange(SIDE * SIDE).view(2, 2, 2, 2)
    return grid.permute(0, 2, 1, 3).reshape(-1)


class WindowModel(nn.Module):
    """Window attention; then a pooling query reads everything, once for each of three 'frames'."""

    def __init__(self, config):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Conv2d(3, config.width, config.patch, stride=config.patch)
        self.local, self.clip = Reader(config), Reader(config)
        self.query = nn.Parameter(torch.randn(1, 1, config.width))
        self.head = nn.Linear(config.width, config.classes)
        with torch.no_grad():
            for name, value in self.named_parameters():
                if name.endswith(("q.weight", "k.weight")):
                    value *= 3
        self.eval()

    def forward(self, pixels):
        x = self.embed(pixels).flatten(2).transpose(1, 2)
        order = window_order()
        windows = F.layer_norm(x, x.shape[-1:])[:, order].unflatten(1, (WINDOWS, -1)).flatten(0, 1)
        read = self.local(windows, windows).reshape(len(x), -1, x.shape[-1])
        x = x + read[:, order.argsort()]
        query = self.query.expand(len(x), -1, -1)
        for frame in range(3):
            query = query + self.clip(query + frame, x)
        return self.head(query[:, 0])


class WindowSource(TinySource):
    """Two sites: one whose calls have a window axis, one that runs three times a forward."""

    def __init__(self, group=("frame",)):
        super().__init__(TinyConfig())
        self._module = WindowModel(self.config)
        self.group = group

    @property
    def sites(self):
        heads = self.config.heads
        return (
            Site(WINDOW, {"local": 0}, heads, "windows", "windows", group=("window",)),
            Site(FRAME, {"clip": 0}, heads, "pool", "tokens", "cross", group=self.group),
        )

    def stream(self, batch):
        return "tokens"

    def label(self, call, batch, outputs):
        patches = TokenAxis.patches(SIDE, SIDE, height=32, width=32)
        if call.site == WINDOW:
            window = patches.take(range(4))
            return CallLabels((("sample", len(batch)), ("window", WINDOWS)), window, window)
        return CallLabels((("sample", len(batch)),), TokenAxis.of_kind("pool", 1), patches)

    def readout(self, batch, outputs, bound=None):
        return {FRAME: Readout(torch.ones(len(batch if bound is None else bound), 1), "pooling head")}

    def fixed_readout(self, batch):
        return self.readout(batch, None)

    def flow(self, batch, outputs):
        order = window_order()
        cut = torch.eye(SIDE * SIDE)[order]
        return [
            MergeStep("tokens", "windows", cut, "cut into windows"),
            AttentionStep(CallKey(WINDOW, 0), "windows", "windows"),
            MergeStep("windows", "tokens", cut.T, "join windows"),
            *(AttentionStep(CallKey(FRAME, 0, n), "pool", "tokens") for n in range(3)),
        ]


class MislabelledSource(TinySource):
    """Says that its grid is 5 x 5."""

    def label(self, call, batch, outputs):
        labels = super().label(call, batch, outputs)
        return replace(labels, key=TokenAxis.patches(5, 5, height=32, width=32))
