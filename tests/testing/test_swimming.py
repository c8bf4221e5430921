"""The swimming shapes are what their docstring says: cues, masks and what withholding leaves."""

from __future__ import annotations

import json
from fractions import Fraction

import numpy as np
import pytest

from foveate.data.manifest import Manifest
from foveate.temporal.cues import GREY
from foveate.testing import swimming
from foveate.testing.swimming import CELLS, CLASSES, FRAMES, LOOKS, MOTIONS, SIZE, TOLD_BY, answer, clip, clips

SEED = 4


def bayes(look: str | None, motion: str | None) -> list[Fraction]:
    """P(class | cues) by counting equally frequent classes' pairs, exactly."""
    joint = {}
    for label, cells in CELLS.items():
        for pair in cells:
            joint[label, pair] = Fraction(1, len(CELLS)) * Fraction(1, len(cells))
    agree = {key: p for key, p in joint.items() if look in (None, key[1][0]) and motion in (None, key[1][1])}
    total = sum(agree.values())
    return [sum((p for (name, _), p in agree.items() if name == label), Fraction(0)) / total for label in CLASSES]


@pytest.mark.parametrize("look", [None, *LOOKS])
@pytest.mark.parametrize("motion", [None, *MOTIONS])
def test_answers_are_bayes_rule(look, motion):
    known = [pair for cells in CELLS.values() for pair in cells]
    if look and motion and (look, motion) not in known:
        with pytest.raises(ValueError, match=look):
            answer(look, motion)
        return
    np.testing.assert_allclose(answer(look, motion), [float(p) for p in bayes(look, motion)], atol=1e-15)


@pytest.mark.parametrize("label", CLASSES)
def test_each_class_is_told_by_what_it_says(label):
    """With the telling cue alone the class is certain; without it, no more than one in four."""
    index, told_by = CLASSES.index(label), TOLD_BY[label]
    for look, motion in CELLS[label]:
        assert answer(look, motion)[index] == 1.0
        assert (answer(look, None)[index] == 1.0) == (told_by == "look")
        assert (answer(None, motion)[index] == 1.0) == (told_by == "motion")
        for cue, alone in (("look", answer(look, None)), ("motion", answer(None, motion))):
            if told_by != cue:
                assert alone[index] <= 0.25


def test_a_pair_of_cues_belongs_to_one_class():
    pairs = [pair for cells in CELLS.values() for pair in cells]
    assert len(set(pairs)) == len(pairs)


def test_clips_are_functions_of_seed_and_index():
    again = clips(3, seed=SEED)[2]
    one = clip(2, seed=SEED)
    assert np.array_equal(one.frames, again.frames)
    assert np.array_equal(one.masks, again.masks)
    assert not np.array_equal(one.frames, clip(2, seed=SEED + 1).frames)
    assert one.frames.shape == (FRAMES, SIZE, SIZE, 3)
    assert one.frames.dtype == np.uint8


def test_masks_do_not_overlap_and_lie_on_what_differs_from_the_water():
    for index in range(20):
        drawn = clip(index, seed=SEED)
        assert drawn.masks.shape == (len(drawn), FRAMES, SIZE, SIZE)
        assert drawn.masks.sum(0).max() <= 1
        grey = clip(index, seed=SEED, withhold=("look",))
        changed = (grey.frames != drawn.frames).any(-1)
        assert not (changed & ~drawn.masks.any(0)).any()
        assert changed[drawn.masks.any(0)].mean() > 0.99


@pytest.mark.parametrize("index", range(6))
def test_withholding_takes_one_cue_and_nothing_else(index):
    full = clip(index, seed=SEED)
    look = clip(index, seed=SEED, withhold=("look",))
    still = clip(index, seed=SEED, withhold=("motion",))
    both = clip(index, seed=SEED, withhold=("look", "motion"))
    inside = full.masks.any(0)
    assert (look.frames[inside] == GREY).all()
    assert np.array_equal(look.frames[~inside], full.frames[~inside])
    assert (still.frames == still.frames[:1]).all()
    shown = [t for t in range(FRAMES) if np.array_equal(full.frames[t], still.frames[0])]
    assert len(shown) == 1
    assert np.array_equal(still.masks, np.repeat(full.masks[:, shown], FRAMES, 1))
    assert np.array_equal(both.frames[0], look.frames[shown[0]])
    for other in (look, still, both):
        assert np.array_equal(other.classes, full.classes)
    np.testing.assert_array_equal(full.answers(), np.eye(len(CLASSES))[full.classes])
    for track, (a, b) in enumerate(zip(full.looks, full.motions, strict=True)):
        np.testing.assert_array_equal(look.answers()[track], answer(None, MOTIONS[b]))
        np.testing.assert_array_equal(still.answers()[track], answer(LOOKS[a], None))
    np.testing.assert_array_equal(both.answers(), np.full((len(full), len(CLASSES)), 1 / len(CLASSES)))


def centres(masks: np.ndarray) -> np.ndarray:
    """Mask centroids, (frame, [y, x])."""
    return np.array([np.argwhere(mask).mean(0) for mask in masks])


@pytest.fixture(scope="module")
def singles() -> list[swimming.Clip]:
    return clips(300, seed=SEED, shapes=1)


def test_shapes_go_where_their_motion_says(singles):
    steps = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}
    for drawn in singles[:80]:
        moved = np.diff(centres(drawn.masks[0])[[0, -1]], axis=0)[0]
        way = np.array(steps[MOTIONS[drawn.motions[0]]])
        assert moved @ way > 4
        assert abs(moved @ way[::-1]) < 3


def test_the_first_frame_does_not_tell_the_motion(singles):
    """Where a shape starts does not depend on the way it goes: means differ by less than 4 standard errors."""
    first = np.array([centres(drawn.masks[0][:1])[0] for drawn in singles])
    ways = np.array([drawn.motions[0] for drawn in singles])
    for a, b, axis in ((0, 1, 1), (2, 3, 0), (0, 1, 0), (2, 3, 1)):
        one, other = first[ways == a, axis], first[ways == b, axis]
        error = np.hypot(one.std() / one.size**0.5, other.std() / other.size**0.5)
        assert abs(one.mean() - other.mean()) < 4 * error


@pytest.mark.parametrize("look", LOOKS)
def test_textures_are_their_own_mirror_images(look):
    v, u = np.random.default_rng(0).uniform(-1, 1, (2, 4000)).astype(np.float32)
    light = swimming._light(look, v, u)
    assert np.array_equal(light, swimming._light(look, v, -u))
    assert 0.3 < light.mean() < 0.7


def test_classes_and_cells_occur_evenly(singles):
    counts = np.bincount([drawn.classes[0] for drawn in singles], minlength=len(CLASSES))
    assert counts.sum() == 300
    assert ((counts - 50) ** 2 / 50).sum() < 20.5  # chi-square, 5 degrees of freedom, p = 0.001


@pytest.mark.parametrize("shapes", [1, 2])
def test_the_number_of_shapes_can_be_fixed(shapes):
    assert {len(drawn) for drawn in clips(8, seed=SEED, shapes=shapes)} == {shapes}
    assert {len(drawn) for drawn in clips(20, seed=SEED)} == {1, 2}


def test_a_written_data_set_reads_back_as_clips(tmp_path):
    path = swimming.write_dataset(tmp_path / "data", 4, seed=SEED)
    manifest = Manifest.discover([path], media="clip")
    known = json.loads(path.with_name("tracks.json").read_text())
    assert tuple(known["classes"]) == CLASSES
    for index, drawn in enumerate(clips(4, seed=SEED)):
        sample = manifest.load(index)
        assert np.array_equal(sample.pixels, drawn.frames)
        assert np.array_equal(sample.mask, drawn.masks.any(0))
        tracks = known["clips"][f"clips/{index:05d}"]
        assert [one["label"] for one in tracks] == [CLASSES[k] for k in drawn.classes]
        assert [TOLD_BY[one["label"]] for one in tracks] == [one["told_by"] for one in tracks]
        assert sample.columns["label"] in {one["label"] for one in tracks}


def test_a_balanced_choice_holds_every_class_as_often(tmp_path):
    chosen = swimming.balanced(2, seed=SEED, start=5)
    assert chosen == sorted(set(chosen))
    assert chosen[0] >= 5
    kinds = [int(clip(index, seed=SEED, shapes=1).classes[0]) for index in chosen]
    assert np.bincount(kinds).tolist() == [2] * len(CLASSES)
    passed_over = set(range(5, chosen[-1])) - set(chosen)
    for index in passed_over:  # only clips of classes that were already full
        kind = int(clip(index, seed=SEED, shapes=1).classes[0])
        assert sum(k == kind for i, k in zip(chosen, kinds, strict=True) if i < index) == 2
    manifest = Manifest.discover([swimming.write_dataset(tmp_path, chosen, seed=SEED, shapes=1)], media="clip")
    assert len(manifest.ids) == 12
    assert np.array_equal(manifest.load(3).pixels, clip(chosen[3], seed=SEED, shapes=1).frames)
