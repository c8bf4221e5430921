"""A small run written by hand: one site, five images, everything known."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from foveate.data.arrays import BatchedArrays
from foveate.data.labels import as_index, token_coordinates
from foveate.data.layout import ArraySpec, commit_batch
from foveate.data.ledger import Ledger
from foveate.data.manifest import Manifest
from foveate.data.records import OK, SampleRecord, predictions_table, samples_table
from foveate.data.run import Run
from foveate.data.schema import root_attrs
from foveate.data.store import create, finalise
from foveate.geometry import Geometry
from foveate.interfaces import Prediction, TokenAxis

SITE = "vision.encoder.self"
SITE_ATTRS = {"kind": "self", "form": "dense", "normalised_over": "key"}


@dataclass
class Made:
    path: Path
    manifest: Manifest
    attention: np.ndarray
    arrays: BatchedArrays
    tokens: TokenAxis

    @property
    def run(self) -> Run:
        return Run.open(self.path)


def make_run(folder: Path, count: int = 5, batch: int | None = None, *, fill: bool = True) -> Made:
    random = np.random.default_rng(0)
    for i in range(count):
        Image.fromarray(random.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    manifest = Manifest.discover(folder)
    tokens = TokenAxis.concat(TokenAxis.of_kind("cls", 1), TokenAxis.patches(4, 4, height=32, width=32))
    raw = random.random((count, 2, 3, 17, 17))
    attention = (raw / raw.sum(-1, keepdims=True)).astype(np.float16)
    specs = [
        ArraySpec(
            f"sites/{SITE}/attention", ("sample", "layer", "head", "query", "key"), attention.shape, "float16"
        )
    ]
    batch = batch or commit_batch(specs, count)
    attrs = root_attrs(
        {"model": "m"},
        {
            "model": {"id": "m"},
            "plan": {},
            "sites": [SITE],
            "arrays": [spec.name for spec in specs],
            "commit_batch": batch,
            "cells": {"y": [0, 16, 32], "x": [0, 16, 32]},
        },
    )
    coordinates = token_coordinates("query", tokens) | token_coordinates("key", tokens)
    coordinates |= {"sample": as_index("sample", manifest.ids), "layer": as_index("layer", [0, 1])}
    path = folder / "run.zarr"
    tables = {
        "samples": samples_table(manifest, {}, folder),
        "predictions": predictions_table(manifest, {}, 2),
    }
    create(path, attrs, specs, batch, {f"sites/{SITE}": (SITE_ATTRS, coordinates, ())}, tables)
    arrays = BatchedArrays(path, specs, batch, Ledger(path))
    made = Made(path, manifest, attention, arrays, tokens)
    if fill:
        for number in range(len(arrays.batches)):
            write(made, number)
        finish(made)
    return made


def write(made: Made, number: int) -> None:
    part = made.arrays.batches[number]
    records = [record(made, i).to_json() for i in range(part.start, part.stop)]
    made.arrays.write(number, {f"sites/{SITE}/attention": made.attention[part]}, {"samples": records})


def record(made: Made, i: int) -> SampleRecord:
    answers = (Prediction("cat", 0.75 + i / 100, 3), Prediction("dog", 0.2, 4))
    sha = made.manifest.load(i).sha256
    return SampleRecord(
        OK, sha256=sha, geometry=Geometry(20, 30, 32, 32, 1.6, 1.6, 0.0, -8.0), predictions=answers
    )


def finish(made: Made) -> None:
    records = {i: record(made, i) for i in range(len(made.manifest))}
    finalise(
        made.path,
        {
            "samples": samples_table(made.manifest, records, made.path.parent),
            "predictions": predictions_table(made.manifest, records, 2),
        },
        {},
    )
