"""A run of a few clips of the small segmenter, its attention sharpened."""

from __future__ import annotations

from pathlib import Path

import torch

import foveate
from foveate.interfaces import AttentionSource
from foveate.study.capture import run_capture
from foveate.study.plan import build_plan
from foveate.testing.swimming import write_dataset

MODEL = "foveate/swim-vis-untrained"
OPTIONS = {"threshold": 0.0, "max_objects": 3}
CLIPS = 3


def sharp() -> AttentionSource:
    """The model with queries and keys made larger: attention of untrained weights is even."""
    source = foveate.open(MODEL, threshold=0.0, max_objects=3)
    with torch.no_grad():
        for name, weight in source.module.named_parameters():
            if name.endswith(("attn.q.weight", "attn.k.weight")):
                weight.mul_(4.0)
    return source


def capture(folder: Path, *, rows: str = "all") -> Path:
    """A run of a few clips of six frames."""
    source = sharp()
    run, plan = folder / f"{rows}.zarr", build_plan(source, rows=rows)
    run_capture(source, write_dataset(folder, CLIPS, seed=5), run, plan=plan, reference=MODEL, options=OPTIONS)
    return run
