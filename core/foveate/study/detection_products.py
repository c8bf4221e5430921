"""Findings of an analysis as a labelled product of the run: ``analyses/<name>``.

``value`` and ``baseline`` are ``(sample, finding)``, NaN where an image has none, one number for all images in
``whole_value`` and ``whole_baseline`` ``(finding,)``; what ``foveate analyse`` prints of a finding is beside them.
A finding is told by its coordinates (quantity, unit, site, layer, head; -1 where it has no layer or head), so
``product.where(product.layer == 5, drop=True)`` or ``set_index`` get at any of them without the printed text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import xarray as xr
    from numpy.typing import NDArray

    from foveate.study.detection import Analysis, Finding, Line
    from foveate.study.detection_subject import Subject

PREFIX = "analyses"
LAYERS = "layer_answers"
"""The product of every layer's answers."""
EDGES = ("top", "left", "bottom", "right")


def product_of(analysis: str) -> str:
    """Where the findings of an analysis lie in a run."""
    return f"{PREFIX}/{analysis}"


def store_layers(subject: Subject) -> str:
    """Keep what every decoder layer answers for every query, which pictures show; returns the product's name.

    ``box`` (sample, layer, object, edge) in original pixels, ``score`` and ``class_index`` (sample, layer, object)
    of the best class; NaN and -1 for images that were not looked at. ``object`` is the query.
    """
    import xarray as xr

    layers, queries = subject.layered[0][0].shape[:2]
    shape = (len(subject.run), layers, queries)
    box, score = np.full((*shape, 4), np.nan, np.float32), np.full(shape, np.nan, np.float32)
    chosen = np.full(shape, -1, np.int32)
    for position, (p, b) in zip(subject.positions, subject.layered, strict=True):
        box[position], score[position], chosen[position] = b, p.max(-1), p.argmax(-1)
    names = [str(label) for label in getattr(subject.source, "labels", ())]
    dims = ("sample", "layer", "object")
    table = xr.Dataset(
        {
            "box": ((*dims, "edge"), box, {"units": "pixel"}),
            "score": (dims, score),
            "class_index": (dims, chosen),
        },
        coords={"layer": np.arange(layers), "object": np.arange(queries), "edge": list(EDGES)},
    )
    subject.run.write_product(LAYERS, table, {"labels": names, "read_by": "the model's own heads"})
    return LAYERS


def as_dataset(findings: Sequence[Finding], lines: Sequence[Line], subject: Subject) -> xr.Dataset:
    """Findings with their lines (one each, in the same order) over all samples of the run."""
    import xarray as xr

    count, samples = len(findings), len(subject.run)
    value, baseline = (np.full((samples, count), np.nan) for _ in range(2))
    whole_value, whole_baseline = (np.full(count, np.nan) for _ in range(2))
    for number, finding in enumerate(findings):
        base = np.broadcast_to(np.asarray(finding.baseline, np.float64), finding.values.shape)
        if finding.whole:
            whole_value[number], whole_baseline[number] = finding.values[0], base[0]
        else:
            value[subject.positions, number], baseline[subject.positions, number] = finding.values, base
    by_sample = ("sample", "finding")
    data: dict[str, Any] = {
        "value": (by_sample, value, {"long_name": "the quantity of each image"}),
        "baseline": (by_sample, baseline, {"long_name": "what no preference would give for the same image"}),
        "whole_value": ("finding", whole_value, {"long_name": "the one number of all images together"}),
        "whole_baseline": ("finding", whole_baseline, {"long_name": "what no preference would give"}),
        **{name: ("finding", values) for name, values in _of_lines(lines).items()},
    }
    return xr.Dataset(data, coords={name: ("finding", values) for name, values in _labels(findings).items()})


def _of_lines(lines: Sequence[Line]) -> dict[str, NDArray[Any]]:
    """What is printed: mean over n images, its interval, the paired difference to the baseline, the verdict."""
    numbers = {
        name: np.array([getattr(line, name) for line in lines], np.float64)
        for name in ("mean", "low", "high", "p")
    }
    apart = np.array([line.difference for line in lines], np.float64).reshape(-1, 3)
    ends = {f"difference{end}": apart[:, i] for i, end in enumerate(("", "_low", "_high"))}
    verdict = np.array([line.verdict for line in lines], dtype=object)
    return {**numbers, **ends, "n": np.array([line.n for line in lines], np.int64), "verdict": verdict}


def _labels(findings: Sequence[Finding]) -> dict[str, NDArray[Any]]:
    text = ("quantity", "unit", "site", "baseline_is")
    labels: dict[str, NDArray[Any]] = {
        name: np.array([getattr(finding, name) for finding in findings], dtype=object) for name in text
    }
    for name in ("layer", "head"):
        found = [getattr(finding, name) for finding in findings]
        labels[name] = np.array([-1 if number is None else number for number in found], np.int64)
    return labels


def store(
    analysis: Analysis, findings: Sequence[Finding], lines: Sequence[Line], subject: Subject, *, seed: int
) -> str:
    """Write the product, in place of an earlier one, with all that fixes its numbers; returns its name."""
    truth = hashlib.sha256(subject.truth.read_bytes()).hexdigest() if subject.truth else ""
    attrs = {
        "analysis": analysis.name,
        "summary": analysis.summary,
        "unit_of_analysis": "image",
        "images": len(subject.positions),
        "seed": subject.seed,
        "interval_seed": seed,
        "interval": "95 % bootstrap over images",
        "corrected_for_number_of_lines": 0,
        "truth_sha256": truth,
    }
    name = product_of(analysis.name)
    subject.run.write_product(name, as_dataset(findings, lines, subject), attrs)
    return name
