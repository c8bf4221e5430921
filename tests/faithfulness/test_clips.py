"""Deletion and insertion over cells, tubes and frames of clips, against loops that hide one thing at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from clip_fakes import PATCH, SIDE, ClipSource, FunctionClipSource, bound_clips, clips
from foveate.attribution.baselines import make_baseline
from foveate.attribution.objective import Objective
from foveate.errors import UsageError
from foveate.faithfulness.curves import Protocol, perturbation_curves
from foveate.faithfulness.frames import FRAME_DELETION, frame_curves
from foveate.faithfulness.orders import cell_order
from foveate.faithfulness.replacement import frozen, replacer
from foveate.faithfulness.scoring import Scoring, score_maps
from foveate.faithfulness.units import Unit
from foveate.testing.tiny import TinySource, tiny_samples

FRAMES = (0, 0, 1, 1)
SHAPE = (2, 4, 4)
UNITS = (Unit(), Unit("tubes"), Unit("tubes", span=1), Unit("frames"), Unit("frames", value="mean"))


@pytest.fixture(scope="module")
def objective():
    source = ClipSource()
    return Objective(source, *bound_clips(source))


def unit_by_hand(unit, frame, row, column):
    """Number of the unit that holds a cell of a 2 x 4 x 4 map."""
    if unit.kind == "frames":
        return frame
    whole = unit.kind == "tubes" and unit.span is None
    return (0 if whole else frame * 16) + row * 4 + column


def hide(clip, gone, baseline):
    """One clip ``(frame, channel, y, x)`` without the cells (frame cell, row, column) in ``gone``, by loops."""
    out = clip.clone()
    for f, r, c in gone:
        for t, cell in enumerate(FRAMES):
            if cell == f:
                box = (slice(None), slice(r * PATCH, (r + 1) * PATCH), slice(c * PATCH, (c + 1) * PATCH))
                out[t][box] = baseline[t][box]
    return out


@pytest.mark.parametrize("unit", UNITS, ids=lambda u: f"{u.kind}-{u.span}-{u.value}")
def test_curves_over_units_equal_a_loop(objective, unit):
    random = np.random.default_rng(0)
    values = random.normal(size=(2, 32))
    units = unit.of(SHAPE)
    pooled = np.zeros((2, units.count))
    for target in range(2):
        for u in range(units.count):
            members = [
                values[target, f * 16 + r * 4 + c]
                for f, r, c in np.ndindex(*SHAPE)
                if unit_by_hand(unit, f, r, c) == u
            ]
            pooled[target, u] = np.mean(members) if unit.value == "mean" else np.sum(members)
    np.testing.assert_allclose(units.pool(values), pooled, rtol=1e-12)
    orders = np.argsort(-pooled, axis=-1)
    protocol = Protocol(baselines=("blur",), steps=4)
    grid = objective.source.cells(objective.batch)
    got = perturbation_curves(objective, orders[None], grid, protocol, units)
    counts = protocol.counts(units.count)
    np.testing.assert_allclose(got.fractions, counts / units.count)
    baseline = make_baseline("blur", objective)
    for target in range(2):
        for step, count in enumerate(counts):
            first = set(orders[target, :count].tolist())
            cells = list(np.ndindex(*SHAPE))
            gone = [cell for cell in cells if unit_by_hand(unit, *cell) in first]
            kept = [cell for cell in cells if unit_by_hand(unit, *cell) not in first]
            for mode, hidden in enumerate((gone, kept)):
                picture = hide(objective.inputs[target], hidden, baseline[target])
                with torch.no_grad():
                    logits = objective.source.module(picture[None])[0]
                wanted = logits[objective.bound.rows[target].class_index]
                assert got.values[0, target, mode, 0, 1, step] == pytest.approx(float(wanted), abs=2e-5)


def nearest_by_loop(clip, keep, nowhere):
    out = clip.clone()
    frames, _, height, width = clip.shape
    for t in range(frames):
        for y in range(height):
            for x in range(width):
                kept = [s for s in range(frames) if keep[s, y, x]]
                if not kept:
                    out[t, :, y, x] = nowhere[t, :, y, x]
                else:
                    best = min(kept, key=lambda s, t=t: (abs(s - t), s))
                    out[t, :, y, x] = clip[best, :, y, x]
    return out


def test_freeze_repeats_the_nearest_kept_frame_of_every_place():
    generator = torch.Generator().manual_seed(0)
    clips_, nowhere = (torch.rand(3, 6, 2, 3, 4, generator=generator) for _ in range(2))
    keep = torch.rand(3, 6, 3, 4, generator=generator) < 0.4
    keep[0, :, 0, 0] = False
    keep[1, :, 1, 1] = True
    got = frozen(clips_, keep, nowhere)
    for n in range(3):
        assert torch.equal(got[n], nearest_by_loop(clips_[n], keep[n], nowhere[n]))


def test_a_frozen_clip_keeps_its_length_and_shows_only_frames_of_its_own(objective):
    protocol = Protocol(baselines=("freeze",), scales=("logit",), steps=2)
    importance = np.array([[0.2, 0.9], [0.9, 0.2]])
    got = frame_curves(objective, {"mine": importance}, Scoring(protocol, random_orders=2))
    for target in range(2):
        kept = 0 if target == 0 else 1  # the other frame cell went first
        clip = objective.inputs[target]
        still = torch.stack([clip[1]] * 2) if kept == 0 else torch.stack([clip[2]] * 2)
        picture = torch.cat([clip[:2], still]) if kept == 0 else torch.cat([still, clip[2:]])
        with torch.no_grad():
            wanted = objective.source.module(picture[None])[0, objective.bound.rows[target].class_index]
        assert got.curves[target, 0, 0, 0, 0, 1] == pytest.approx(float(wanted), abs=1e-5)
    # Nothing kept: each frame's own mean colour.
    with torch.no_grad():
        empty = objective(make_baseline("mean", objective))
    np.testing.assert_allclose(got.curves[:, 0, 0, 0, 0, -1], empty, atol=1e-5)


def test_the_frame_that_matters_falls_first_under_its_own_importance():
    """A model that reads one frame: deleting by the truth drops at once, by the reverse at the end."""
    source = FunctionClipSource(lambda x: torch.stack([x[:, 3].mean((1, 2, 3)), x[:, 0, 0].amax((1, 2))], 1), 6, 1)
    samples = clips(3, frames=6)
    batch, _ = bound_clips(source, samples)
    from foveate.interfaces import Target

    bound = source.bind(source.forward(batch), batch, Target(label="red", scale="logit"))
    objective = Objective(source, batch, bound)
    truth = np.tile(np.eye(6)[3], (3, 1))
    scoring = Scoring(Protocol(baselines=("black",), scales=("logit",), steps=6), random_orders=4)
    got = frame_curves(objective, {"truth": truth, "reverse": -truth}, scoring)
    curves = got.curves[:, :, 0, 0, 0]
    assert (curves[:, 0, 1:] == curves[:, 0, 1:2]).all()  # all lost with the first frame
    assert (curves[:, 1, :-1] == curves[:, 1, :1]).all()  # nothing lost before the last
    assert got.methods == ("truth", "reverse", "random")


def test_frame_curves_refuse_images_and_wrong_shapes(objective):
    with pytest.raises(UsageError, match=r"expected \(2, 2\)"):
        frame_curves(objective, {"mine": np.ones((2, 4))})
    source = TinySource()
    batch = source.encode(tiny_samples(1))
    from foveate.interfaces import Target

    image = Objective(source, batch, source.bind(source.forward(batch), batch, Target()))
    with pytest.raises(UsageError, match="no frames"):
        frame_curves(image, {})
    with pytest.raises(UsageError, match="no other frames"):
        replacer("freeze", image)
    for kind in ("tubes", "frames"):
        with pytest.raises(UsageError, match="no frames"):
            score_maps(image, {}, source.cells(batch), Scoring(unit=Unit(kind), random_orders=2))
    assert FRAME_DELETION.unit.kind == "frames"


@pytest.mark.parametrize("span", [None, 1, 2, 3, 5, 9])
@pytest.mark.parametrize("frames", [1, 4, 5])
def test_tubes_are_cut_as_even_as_can_be(span, frames):
    numbers = Unit("tubes", span=span).of((frames, 2, 3)).numbers.reshape(frames, 6)
    assert (numbers - numbers[:, :1] == np.arange(6)).all()  # places stay apart
    blocks = numbers[:, 0] // 6
    sizes = np.bincount(blocks)
    assert (np.diff(blocks) >= 0).all()
    assert sizes.max() <= (span or frames)
    assert np.ptp(sizes) <= 1
    assert len(sizes) == -(-frames // (span or frames))


def test_unknown_cells_do_not_count_in_a_unit_and_an_unknown_unit_comes_last():
    units = Unit("frames", value="mean").of((3, 1, 2))
    values = np.array([[1.0, np.nan, 4.0, 6.0, np.nan, np.nan]])
    np.testing.assert_array_equal(units.pool(values), [[1.0, 5.0, np.nan]])
    assert cell_order(units.pool(values), ["a"], seed=0)[0].tolist() == [1, 0, 2]
    summed = Unit("frames").of((3, 1, 2))
    np.testing.assert_array_equal(summed.pool(values), [[1.0, 10.0, np.nan]])
    seen = np.array([[True, False, False, False, False, True]])
    np.testing.assert_array_equal(units.any(seen), [[True, False, True]])


@pytest.mark.parametrize(
    "wrong", [{"kind": "pixels"}, {"value": "max"}, {"kind": "frames", "span": 2}, {"kind": "tubes", "span": 0}]
)
def test_bad_units(wrong):
    with pytest.raises(UsageError, match="unit"):
        Unit(**wrong)


@pytest.mark.parametrize("unit", UNITS, ids=lambda u: f"{u.kind}-{u.span}-{u.value}")
def test_scores_do_not_depend_on_the_batch_or_on_blocks(unit):
    source = ClipSource()
    random = np.random.default_rng(1)
    samples, values = clips(3), random.normal(size=(3, 32))
    scoring = Scoring(Protocol(baselines=("mean", "freeze"), steps=3), random_orders=4, unit=unit)
    grid = source.cells(source.encode(samples))
    whole = score_maps(Objective(source, *bound_clips(source, samples), rows=3), {"a": values}, grid, scoring)
    for i, sample in enumerate(samples):
        objective = Objective(source, *bound_clips(source, [sample]))
        alone = score_maps(objective, {"a": values[i : i + 1]}, grid, scoring)
        np.testing.assert_allclose(whole.curves[i], alone.curves[0], atol=2e-5)


def test_both_ends_of_a_curve_are_the_clip_and_nothing_of_it(objective):
    for unit in UNITS:
        scoring = Scoring(Protocol(baselines=("mean", "blur"), scales=("logit",), steps=2), 2, unit=unit)
        got = score_maps(objective, {}, objective.source.cells(objective.batch), scoring).curves
        with torch.no_grad():
            intact = objective(objective.inputs)
            for b, kind in enumerate(("mean", "blur")):
                gone = objective(make_baseline(kind, objective))
                np.testing.assert_allclose(got[:, 0, 0, b, 0, 0], intact, atol=1e-5)
                np.testing.assert_allclose(got[:, 0, 0, b, 0, -1], gone, atol=1e-5)
                np.testing.assert_allclose(got[:, 0, 1, b, 0, 0], gone, atol=1e-5)
    assert SIDE // PATCH == 4
