"""A first look at one clip: the answer, where its row reads in each frame, rollout, and caveats.

As :mod:`foveate.study.look` does for a picture. A model that attends over the whole clip has one row, which is cut
into frame cells here; one that attends within frames has a row a frame. Nothing is stored.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from foveate.attribution.attention import bottom_tokens, on_cells
from foveate.attribution.readout_rows import readout_rows
from foveate.capture.rollout import rollout
from foveate.capture.trace import Trace, trace
from foveate.errors import CaptureError, SampleError, UsageError
from foveate.interfaces import AttentionSource, BoundTarget, CallKey, Prediction, Sample, Target, TokenAxis
from foveate.render.film import film
from foveate.render.panel import Panel, Rule
from foveate.study.caveats import Facts, caveats
from foveate.study.looked import Look, evenness, sinks_of
from foveate.study.quick_check import Check
from foveate.study.readout_row import Head, one_head

if TYPE_CHECKING:
    from numpy.typing import NDArray

SHOWN = 6
"""At most so many frame cells are drawn, evenly spread."""
_APART = "this model attends within frames, so each has a row that sums to 1: only rollout compares frames"
_UNTESTED = Check(skipped="foveate faithfulness deletes cells, tubes and frames of clips")


@dataclass(frozen=True, eq=False)
class _Film:
    """A map of the clip, ``values (frame, row, column)``, and what even attention would give a token.

    ``apart``: every frame has a row of its own, so how much falls to a frame is fixed and says nothing.
    """

    values: NDArray[np.float64]
    uniform: float
    outside: float
    words: str = ""
    apart: bool = False


def look_clip(
    source: AttentionSource,
    clip: Path | str | NDArray[np.uint8],
    *,
    target: str | int | None = None,
    object: int | None = None,
    layer: int = -1,
    head: Head = "mean",
    scale: str = "lift",
) -> Look:
    """Look at one clip through an opened model of clips.

    ``clip`` is a video, a folder of frames, an animated image, or uint8 pixels ``(frame, y, x, 3)``; the other
    arguments are those of :func:`foveate.study.look.look`. Raises UsageError, SampleError, CaptureError.
    """
    began = time.perf_counter()
    sample = _sample(clip)
    batch = source.encode([sample])
    traced = trace(source, batch)
    traced.certify().require()
    bound = source.bind(traced.outputs, batch, Target(label=target, object=object))
    followed = bound.take([0]) if len(bound) and bound.rows[0].object is not None else None
    answers = _about(source.predictions(traced.outputs, batch)[0], followed)
    row, call = _attention(traced, layer, head, followed)
    swept = _rollout(traced, followed)
    first = row or swept
    if first is None:
        raise UsageError(
            f"look: neither a row of {call.site} nor rollout lies on the frames of the clip",
            remedy="foveate attribute, with a gradient or perturbation method",
        )
    with torch.no_grad():
        score = float(source.score(traced.outputs, batch, bound)[0]) if len(bound) else float("nan")
    sinks, share = sinks_of(traced, call)
    facts = Facts(
        card=source.card,
        geometry=batch.geometry[0],
        predictions=answers,
        evenness=evenness(first.values),
        outside=first.outside,
        rollout_evenness=float("nan") if swept is None else evenness(swept.values),
        sinks=sinks,
        sink_share=share,
        check=_UNTESTED,
    )
    notes = (*caveats(facts), *((_APART,) if first.apart else ()))
    name = source.card.id
    title = f"{name}: {answers[0].label} ({answers[0].score:.2f})" if answers else name
    rule = Rule(name, first.words, round(1 / first.uniform))
    films = {kind: found for kind, found in (("attention", row), ("rollout", swept)) if found is not None}
    panels = {key: p for kind, found in films.items() for key, p in _panels(traced, sample, found, kind).items()}
    mass = {kind: found.values.sum((1, 2)) for kind, found in films.items() if not found.apart}
    picture = film(panels, rule, mass, title=title, caveats=notes, scale=scale)
    label = bound.rows[0].label if len(bound) else ""
    seconds = time.perf_counter() - began
    return Look(name, label, score, answers, notes, panels, rule, _UNTESTED, picture, seconds)


def _sample(clip: Path | str | NDArray[np.uint8]) -> Sample:
    if isinstance(clip, str | Path):
        from foveate.data.manifest import Manifest

        found = Manifest.discover(clip, media="clip")
        if len(found) > 1:
            raise UsageError(
                f"look: {clip} holds {len(found)} clips", remedy=f"give one, such as {found.rows[0].path}"
            )
        return found.load(0)
    if clip.dtype != np.uint8 or clip.ndim != 4 or clip.shape[3] != 3:
        raise SampleError(
            f"look: expected a video, a folder of frames or uint8 (frame, y, x, 3), got {clip.dtype} {clip.shape}",
            remedy="scale to 0-255 and convert with .astype('uint8')",
        )
    return Sample("array", clip)


def _about(predictions: Sequence[Prediction], followed: BoundTarget | None) -> tuple[Prediction, ...]:
    if followed is None:
        return tuple(predictions)
    return tuple(sorted(predictions, key=lambda answer: answer.object != followed.rows[0].object))


# ------------------------------------------------------------------------------- maps of the clip


def _attention(traced: Trace, layer: int, head: Head, bound: BoundTarget | None) -> tuple[_Film | None, CallKey]:
    """The readout row of one layer in every frame, None where it lies on none; and the layer's last call."""
    readouts = traced.readout(bound)
    if not readouts:
        raise CaptureError(
            f"{traced.source.card.id} names no row that its answer is read from",
            remedy="foveate capture --rows all keeps every row",
        )
    site, readout = next(iter(readouts.items()))
    layers = sorted({call.layer for call in traced.records if call.site == site})
    chosen = layers[layer] if layer < 0 and -layer <= len(layers) else layer
    calls = sorted(call for call in traced.records if call.site == site and call.layer == chosen)
    if not calls:
        raise UsageError(f"{site} has no layer {layer}", remedy=f"one of {', '.join(map(str, layers))}")
    with torch.no_grad():
        rows, tokens = readout_rows(traced, calls, readout.weights[:1].detach(), method="look")
    weights, heads = one_head(rows[0].double().cpu().numpy(), head, site)
    which = f" {bound.rows[0].object}" if bound is not None and bound.rows[0].object is not None else ""
    place = f"{site}, layer {chosen} of {layers[0]}–{layers[-1]}"
    words = f"attention of the readout row ({readout.rule}{which}), {place}, {heads}"
    apart = len(tokens) > traced.record(calls[-1]).shape.keys
    try:
        return _film(traced, weights, tokens, words, apart=apart), calls[-1]
    except UsageError:  # the row lies on no frame of the clip: it is over a memory, or over other tracks
        return None, calls[-1]


def _rollout(traced: Trace, bound: BoundTarget | None) -> _Film | None:
    """Rollout (Abnar and Zuidema 2020) over the tokens of all frames; None where the flow does not reach them."""
    try:
        tokens = bottom_tokens(traced)
        with torch.no_grad():
            values = rollout(traced, bound)[0].double().cpu().numpy()
        return _film(traced, values, tokens, "rollout of the readout row")
    except (CaptureError, UsageError):
        return None


def _film(
    traced: Trace, weights: NDArray[np.float64], tokens: TokenAxis, words: str = "", *, apart: bool = False
) -> _Film:
    """Token weights on the cells of every frame; even means: the same sum, spread over all tokens alike."""
    source, batch = traced.source, traced.batch
    frames, total = max(source.frame_cells(batch)) + 1, float(weights.sum())
    placed = np.zeros(len(tokens), bool)
    placed[tokens.where("patch")] = True
    values = on_cells(torch.from_numpy(weights)[None], tokens, source.cells(batch), frames=frames, method="look")[
        0
    ]
    outside = float(weights[~placed].sum() / total) if total > 0 else float("nan")
    return _Film(values, total / len(tokens) if total > 0 else 1 / len(tokens), outside, words, apart)


def _panels(traced: Trace, sample: Sample, found: _Film, name: str) -> dict[str, Panel]:
    """A panel for some frame cells, named by what it shows and when: ``attention, cell 3, frame 12``."""
    batch, source = traced.batch, traced.source
    cells = np.asarray(source.frame_cells(batch))
    index = batch.per_sample["frame_index"][0].tolist()
    count = len(found.values)
    panels = {}
    for cell in np.unique(((np.arange(min(SHOWN, count)) + 0.5) * count / min(SHOWN, count)).astype(int)):
        frame = index[int(np.flatnonzero(cells == cell)[0])]
        when = "" if sample.times is None else f" ({sample.times[frame]:.2f} s)"
        title = f"frame {frame}{when}"
        panels[f"{name}, cell {cell}, {title}"] = Panel(
            sample.pixels[frame], batch.geometry[0], found.values[cell], source.cells(batch), found.uniform, title
        )
    return panels
