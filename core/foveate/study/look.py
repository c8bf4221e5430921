"""A first look: one picture in; the answer, what the readout row attends to, rollout, and caveats out.

One traced forward pass gives everything; a second handful, where the model is fast enough, deletes cells in
the order of the map. Nothing is stored.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from foveate.capture.rollout import rollout
from foveate.capture.trace import Trace, trace
from foveate.errors import CaptureError, SampleError, UsageError
from foveate.interfaces import AttentionSource, BoundTarget, Prediction, Sample, Target
from foveate.render.glance import glance
from foveate.render.panel import Panel, Rule
from foveate.study.caveats import Facts, caveats
from foveate.study.looked import Look, evenness, sinks_of
from foveate.study.quick_check import Check, quick_check
from foveate.study.readout_row import Head, ReadoutRow, readout_row

if TYPE_CHECKING:
    from numpy.typing import NDArray


def look(
    model: str | AttentionSource,
    image: Path | str | NDArray[np.uint8],
    *,
    prompts: Sequence[str] | Path | str | None = None,
    target: str | int | None = None,
    object: int | None = None,
    layer: int = -1,
    head: Head = "mean",
    scale: str = "lift",
    check: bool = True,
    **options: Any,
) -> Look:
    """Look at one picture through a model, or at one clip through a model of clips.

    ``model`` is a reference (registry id, folder, hub id) or an opened source; ``image`` a file or uint8 pixels
    ``(y, x, 3)``, for models of clips a video, a folder of frames or ``(frame, y, x, 3)``. ``prompts`` are the
    classes of models that compare with text. ``target`` is the class to test (default: the answer), ``object`` the
    query of a detector (default: the surest object).
    ``layer`` is a true layer number, negative ones count from the last.
    ``check`` also deletes cells in the map's order where that is quick (:mod:`foveate.study.quick_check`). Further
    ``options`` go to ``foveate.open``. Raises UsageError, SampleError, ModelError, CaptureError.
    """
    source = _opened(model, prompts, options)
    if source.media == "clip":
        from foveate.study.look_clip import look_clip

        return look_clip(source, image, target=target, object=object, layer=layer, head=head, scale=scale)
    began = time.perf_counter()
    sample = _sample(image)
    batch = source.encode([sample])
    started = time.perf_counter()
    traced = trace(source, batch)
    forward = time.perf_counter() - started
    traced.certify().require()
    bound = source.bind(traced.outputs, batch, Target(label=target, object=object))
    followed = bound.take([0]) if len(bound) and bound.rows[0].object is not None else None
    predictions = _about(source.predictions(traced.outputs, batch)[0], followed)
    row = readout_row(traced, layer, head, followed)
    panels = {"attention": _attention(traced, sample, row)}
    if (swept := _rollout(traced, sample, followed)) is not None:
        panels["rollout"] = swept
    with torch.no_grad():
        score = float(source.score(traced.outputs, batch, bound)[0]) if len(bound) else float("nan")
    first = panels["attention"]
    tested = (
        quick_check(source, batch, bound, first.values, first.grid, forward=forward)
        if check
        else Check(skipped="switched off")
    )
    rule = Rule(source.card.id, row.words, round(1 / first.uniform))
    facts = _facts(traced, row, panels, predictions, tested)
    notes = caveats(facts)
    label = bound.rows[0].label if len(bound) else ""
    name = source.card.id
    title = f"{name}: {predictions[0].label} ({predictions[0].score:.2f})" if predictions else name
    picture = glance(list(panels.values()), rule, predictions, title=title, caveats=notes, scale=scale)
    seconds = time.perf_counter() - began
    return Look(name, label, score, predictions, notes, panels, rule, tested, picture, seconds)


def _facts(
    traced: Trace, row: ReadoutRow, panels: Mapping[str, Panel], predictions: tuple[Prediction, ...], tested: Check
) -> Facts:
    sinks, share = sinks_of(traced, row.call)
    return Facts(
        card=traced.source.card,
        geometry=traced.batch.geometry[0],
        predictions=predictions,
        evenness=evenness(row.weights),
        outside=panels["attention"].outside,
        rollout_evenness=evenness(panels["rollout"].values) if "rollout" in panels else float("nan"),
        sinks=sinks,
        sink_share=share,
        check=tested,
    )


def _opened(
    model: str | AttentionSource, prompts: Sequence[str] | Path | str | None, options: Mapping[str, Any]
) -> AttentionSource:
    if isinstance(model, AttentionSource):
        if prompts is not None or options:
            raise UsageError(
                "look: an opened source takes no prompts or options", remedy="give them to foveate.open"
            )
        return model
    from foveate.plugins.opening import open_source

    given: dict[str, Any] = {**options} if prompts is None else {**options, "prompts": prompts}
    return open_source(model, **given)


def _sample(image: Path | str | NDArray[np.uint8]) -> Sample:
    if isinstance(image, str | Path):
        from foveate.data.images import decode
        from foveate.data.videos import SUFFIXES

        if Path(image).suffix.lower() in SUFFIXES:
            raise SampleError(
                f"image {image}: a video, but this model takes images",
                remedy="choose a model of clips (foveate models shows them), or give an image",
            )
        decoded = decode(image)
        return Sample(Path(image).name, decoded.pixels, decoded.sha256, str(image))
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise SampleError(
            f"look: expected a file or uint8 pixels (y, x, 3), got {image.dtype} {image.shape}",
            remedy="scale to 0-255 and convert with .astype('uint8')",
        )
    return Sample("array", image)


def _attention(traced: Trace, sample: Sample, row: ReadoutRow) -> Panel:
    name = f"attention, layer {row.call.layer}"
    try:
        return Panel.attention(sample.pixels, traced.batch.geometry[0], row.weights, row.tokens, name)
    except ValueError as error:
        raise UsageError(
            f"look: {row.call.site} cannot be laid on a picture ({error})",
            remedy="foveate capture keeps its rows without a picture",
        ) from error


def _about(predictions: Sequence[Prediction], followed: BoundTarget | None) -> tuple[Prediction, ...]:
    """The answers, that about the followed object first."""
    if followed is None:
        return tuple(predictions)
    return tuple(sorted(predictions, key=lambda answer: answer.object != followed.rows[0].object))


def _rollout(traced: Trace, sample: Sample, followed: BoundTarget | None) -> Panel | None:
    """Rollout of the readout row (Abnar and Zuidema 2020) over the bottom stream; None where it has none."""
    site = next((site for site in traced.source.sites if site.key == traced.stream), None)
    if site is None:
        return None
    first = min(key for key in traced.records if key.site == site.id)
    tokens = traced.labels(first).key
    try:
        with torch.no_grad():
            row = rollout(traced, followed)[0].double().cpu().numpy()
        return Panel.attention(sample.pixels, traced.batch.geometry[0], row, tokens, "rollout")
    except (CaptureError, ValueError):
        return None
