"""What is taken out of a clip is gone, what is kept is there, and a sham is as large and touches neither."""

from __future__ import annotations

import numpy as np
import pytest

from foveate.errors import SampleError, UsageError
from foveate.temporal import cues
from foveate.temporal.coalitions import CHANGED, Removal, variants
from foveate.temporal.kept import frames_lost
from foveate.temporal.sham import change_of, sham_of
from foveate.testing.motion_tasks import motion_clips

FRAMES, SIDE = 6, 20


def swimming(seed: int, frames: int = FRAMES, side: int = SIDE) -> tuple[np.ndarray, np.ndarray]:
    """A coloured 5 x 5 block that moves two pixels a frame over a still noisy ground, and its masks."""
    rng = np.random.default_rng(seed)
    clip = np.repeat(rng.integers(20, 90, (1, side, side, 3), np.uint8), frames, axis=0)
    masks = np.zeros(clip.shape[:3], bool)
    for t in range(frames):
        masks[t, 7:12, 2 * t : 2 * t + 5] = True
    clip[masks] = rng.integers(100, 256, 3, np.uint8)
    return clip, masks


# ------------------------------------------------------------------------------------------- motion


def test_frozen_frames_are_one_frame_and_spread_evenly() -> None:
    clip, _ = swimming(0)
    still = cues.reorder(clip, cues.freeze(FRAMES, 4))
    assert (still == clip[4]).all()
    assert cues.freezing_frames(6, 1) == [3]
    assert cues.freezing_frames(4, 4) == [0, 1, 2, 3]
    assert cues.freezing_frames(3, 9) == [0, 1, 2]
    assert cues.freezing_frames(100, 4) == [12, 37, 62, 87]
    with pytest.raises(UsageError, match="frame 6 of a clip of 6"):
        cues.freeze(FRAMES, 6)


def test_shuffled_orders_are_permutations_and_seeded() -> None:
    orders = [cues.shuffled_order(9, seed) for seed in range(20)]
    assert all(sorted(order) == list(range(9)) for order in orders)
    assert len({tuple(order) for order in orders}) > 15
    assert (cues.shuffled_order(9, 3) == orders[3]).all()


# --------------------------------------------------------------------------------------- appearance


def test_neutral_is_grey_under_the_masks_and_nothing_elsewhere() -> None:
    clip, masks = swimming(1)
    before = clip.copy()
    out = cues.neutral(clip, masks, 99)
    assert (out[masks] == 99).all()
    assert (out[~masks] == clip[~masks]).all()
    assert (clip == before).all()
    with pytest.raises(UsageError, match="masks of shape"):
        cues.neutral(clip, masks[1:])


def test_neutral_clips_do_not_tell_the_colour() -> None:
    """Two clips that differ in colour only become the same clip."""
    clip, masks = swimming(2)
    other = clip.copy()
    other[masks] = (10, 200, 30)
    assert (cues.neutral(clip, masks) == cues.neutral(other, masks)).all()


def test_scrambled_pixels_are_a_permutation_of_each_block_without_colour() -> None:
    clip = np.random.default_rng(3).integers(0, 256, (4, 10, 13, 3), np.uint8)
    out = cues.scrambled(clip, seed=5, block=4)
    grey = cues.luminance(clip)
    assert (out == out[..., :1]).all()
    for t in range(4):
        for top in range(0, 10, 4):
            for left in range(0, 13, 4):
                block = (t, slice(top, top + 4), slice(left, left + 4))
                assert sorted(out[(*block, 0)].ravel()) == sorted(grey[block].ravel())
    assert (out != cues.scrambled(clip, seed=6, block=4)).any()
    assert (cues.scrambled(clip, seed=0, block=1)[..., 0] == grey).all()
    with pytest.raises(UsageError, match="blocks of 0"):
        cues.scrambled(clip, 0, 0)


def test_luminance_is_bt601() -> None:
    clip = np.random.default_rng(4).integers(0, 256, (2, 3, 4, 3), np.uint8)
    for index in np.ndindex(clip.shape[:3]):
        red, green, blue = (int(v) for v in clip[index])
        assert abs(int(cues.luminance(clip)[index]) - (0.299 * red + 0.587 * green + 0.114 * blue)) <= 0.5


def test_advected_noise_moves_as_the_picture_does_and_shows_nothing() -> None:
    """A textured picture that shifts by two pixels a frame: the noise shifts with it."""
    pytest.importorskip("skimage")
    from scipy.ndimage import gaussian_filter

    wide = gaussian_filter(np.random.default_rng(5).random((48, 80)), 1.5)
    wide = np.uint8(255 * (wide - wide.min()) / np.ptp(wide))
    clip = np.stack([np.repeat(wide[:, 2 * t : 2 * t + 48, None], 3, axis=2) for t in range(4)])
    out = cues.advected(clip, seed=1)
    inner = slice(8, 40)
    moved = (out[1:, inner, inner, 0] == out[:-1, inner, 10:42, 0]).mean()
    stayed = (out[1:, inner, inner, 0] == out[:-1, inner, inner, 0]).mean()
    assert moved > 0.9 > 0.1 > stayed
    for t in range(4):
        r = np.corrcoef(out[t, ..., 0].ravel(), clip[t, ..., 0].ravel())[0, 1]
        assert abs(r) < 0.1
    other = 255 - clip  # another look, the same motion: the same noise
    assert (cues.advected(other, seed=1)[:, inner, inner] == out[:, inner, inner]).mean() > 0.9


def test_moving_masks_find_what_moves() -> None:
    pytest.importorskip("skimage")
    clip, masks = swimming(6, frames=9, side=30)
    found = cues.moving_masks(clip)
    assert (found & masks).sum() / (found | masks).sum() > 0.9
    assert not cues.moving_masks(np.repeat(clip[:1], 5, axis=0)).any()
    few = clip[[0, 8]]  # two frames have no median of their own that stands still
    against = cues.moving_masks(few, cues.background_of(clip))
    assert (against & masks[[0, 8]]).sum() / (against | masks[[0, 8]]).sum() > 0.9


def test_the_background_is_the_median_of_frames_spread_over_the_clip() -> None:
    clip = np.random.default_rng(7).integers(0, 256, (9, 4, 5, 3), np.uint8)
    np.testing.assert_array_equal(cues.background_of(clip), np.median(clip, axis=0))
    long = np.random.default_rng(8).integers(0, 256, (200, 2, 2, 3), np.uint8)
    chosen = [round(i * 199 / (cues.MEDIAN_OF - 1)) for i in range(cues.MEDIAN_OF)]
    np.testing.assert_array_equal(cues.background_of(long), np.median(long[chosen], axis=0))


# --------------------------------------------------------------------------------------------- shams


@pytest.mark.parametrize("seed", range(6))
def test_a_sham_is_as_large_and_stays_away_and_still(seed: int) -> None:
    clip, masks = swimming(seed)
    for changed in (cues.neutral(clip, masks), cues.reorder(clip, cues.freeze(FRAMES, 2))):
        wanted = change_of(clip, changed)
        made, apart = sham_of(clip, changed, masks, seed)
        got = change_of(clip, made)
        assert apart
        assert got.l2 == pytest.approx(wanted.l2, rel=0.02)
        assert abs(got.pixels - wanted.pixels) <= FRAMES
        assert (made[:, masks.any(0)] == clip[:, masks.any(0)]).all()
        step = made.astype(int) - clip
        assert (step == step[:1]).all(), "the pattern moves"
        assert (step == step[..., :1]).all(), "the pattern has a colour"


def test_change_is_what_its_docstring_says() -> None:
    rng = np.random.default_rng(8)
    one, other = rng.integers(0, 256, (2, 3, 5, 4, 3), np.uint8)
    other[rng.random(other.shape[:3]) < 0.5] = 0
    one[(other == 0).all(-1)] = 0
    pixels, l1, l2 = 0, 0.0, 0.0
    for index in np.ndindex(one.shape[:3]):
        difference = [float(other[index][c]) - float(one[index][c]) for c in range(3)]
        pixels += any(difference)
        l1 += sum(abs(d) for d in difference)
        l2 += sum(d * d for d in difference)
    found = change_of(one, other)
    assert (found.pixels, found.l1) == (pixels, l1)
    assert found.l2 == pytest.approx(l2**0.5)


def test_nothing_changed_needs_no_sham() -> None:
    clip, masks = swimming(9)
    made, apart = sham_of(clip, clip, masks, 0)
    assert apart
    assert (made == clip).all()


def test_where_nothing_is_free_the_sham_says_so() -> None:
    clip, masks = swimming(10)
    made, apart = sham_of(clip, cues.neutral(clip, masks), np.ones_like(masks), 0)
    assert not apart
    assert change_of(clip, made).pixels > 0


def test_a_sham_without_room_is_smaller_and_not_wrong() -> None:
    """Everything changes by much, and only a corner is free: the sham does what it can."""
    clip = np.full((4, 8, 8, 3), 250, np.uint8)
    protect = np.ones((4, 8, 8), bool)
    protect[:, :2, :2] = False
    made, apart = sham_of(clip, np.zeros_like(clip), protect, 0)
    assert apart
    assert change_of(clip, made).pixels == 4 * 4
    assert (made[:, 2:, 2:] == clip[:, 2:, 2:]).all()


# ---------------------------------------------------------------------------------------- coalitions


def test_coalitions_keep_what_they_say() -> None:
    clip, masks = swimming(11)
    made = list(variants(clip, masks, Removal(draws=3, level=77)))
    real = {(v.coalition, v.draw): v for v in made if not v.sham}
    assert sorted(real) == [("appearance", 0), ("appearance", 1), ("appearance", 2), ("motion", 0)] + [
        ("none", d) for d in range(3)
    ]
    grey = clip.copy()
    grey[masks] = 77
    assert (real["motion", 0].clip == grey).all()
    for draw, at in enumerate((1, 3, 5)):
        assert (real["appearance", draw].clip == clip[at]).all()
        assert (real["none", draw].clip == grey[at]).all()
        assert (real["none", draw].masks == masks[at]).all()
        assert (real["none", draw].order == at).all()


def test_every_change_has_a_sham_of_its_size() -> None:
    clip, masks = swimming(12)
    made = list(variants(clip, masks, Removal(draws=2)))
    for coalition in CHANGED:
        real = [v for v in made if v.coalition == coalition and not v.sham]
        shams = [v for v in made if v.coalition == coalition and v.sham]
        assert len(shams) == 2
        assert np.mean([v.change.l2 for v in shams]) == pytest.approx(
            np.mean([v.change.l2 for v in real]), rel=0.05
        )
        assert all((v.order == np.arange(FRAMES)).all() for v in shams)


def test_draws_follow_from_seed_and_video_alone() -> None:
    clip, masks = swimming(13)
    removal = Removal("scrambled", "shuffle", draws=2, seed=4)

    def clips(video: int, of: Removal = removal) -> np.ndarray:
        return np.stack([v.clip for v in variants(clip, masks, of, video=video)])

    assert (clips(3) == clips(3)).all()
    assert (clips(3) != clips(4)).any()
    assert (clips(3) != clips(3, Removal("scrambled", "shuffle", draws=2, seed=5))).any()


def test_shuffling_keeps_every_frame() -> None:
    clip, masks = swimming(14)
    for v in variants(clip, masks, Removal(motion="shuffle", draws=3)):
        if v.coalition == "appearance" and not v.sham:
            assert sorted(v.order) == list(range(FRAMES))
            assert (v.clip == clip[v.order]).all()
            assert v.masks is not None
            assert (v.masks == masks[v.order]).all()


def test_masks_are_found_where_none_are_given() -> None:
    pytest.importorskip("skimage")
    clip, masks = swimming(15, frames=9, side=30)
    (grey,) = [v for v in variants(clip, None, Removal()) if v.coalition == "motion" and not v.sham]
    assert grey.masks is None
    changed = (grey.clip != clip).any(-1)
    assert (changed & masks).sum() > 0.8 * masks.sum()


def test_clips_that_cannot_be_tested_are_refused() -> None:
    clip, masks = swimming(16)
    with pytest.raises(SampleError, match="1 frame has no motion"):
        list(variants(clip[:1], masks[:1], Removal()))
    with pytest.raises(SampleError, match="no pixel is under a mask"):
        list(variants(clip, np.zeros_like(masks), Removal()))
    assert list(variants(clip, np.zeros_like(masks), Removal("scrambled")))


@pytest.mark.parametrize(
    "wrong",
    [{"appearance": "grey"}, {"motion": "stop"}, {"draws": 0}, {"level": 300}],
    ids=lambda w: next(iter(w)),
)
def test_impossible_removals_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        Removal(**wrong)  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------- kept


def test_lost_frames_against_a_loop() -> None:
    _, own = swimming(18)
    same = own.copy()
    late = own.copy()
    late[:2] = False  # found only from frame 2 on
    assert frames_lost(own, [same]) == 0.0
    assert frames_lost(own, []) == 1.0
    assert frames_lost(own, [late]) == pytest.approx(2 / FRAMES)
    assert frames_lost(own, [np.zeros_like(own)]) == 1.0
    assert np.isnan(frames_lost(np.zeros_like(own), [same]))


def test_a_switch_of_identity_loses_the_frames_of_the_shorter_part() -> None:
    _, own = swimming(19)
    first, second = own.copy(), own.copy()
    first[4:], second[:4] = False, False
    assert frames_lost(own, [second, first]) == pytest.approx(2 / FRAMES)


def test_frames_without_the_object_do_not_count() -> None:
    _, own = swimming(20)
    own[:3] = False
    track = own.copy()
    track[5] = False
    track[0, 0, 0] = True
    assert frames_lost(own, [track]) == pytest.approx(1 / 3)
    with pytest.raises(UsageError, match="shape"):
        frames_lost(own, [track[1:]])


# --------------------------------------------------------------------------------------------- tasks


@pytest.mark.parametrize("task", ["colour", "direction", "xor", "redundant"])
def test_one_frame_and_shuffled_frames_do_not_tell_the_direction(task: str) -> None:
    """By construction: places are on a ring, uniform in every frame, and each clip visits the same set of them."""
    clips = motion_clips(task, 4000, 0, alone=False)
    place = clips.masks.any(2)  # (clip, frame, x)
    right, left = place[clips.directions == 1], place[clips.directions == -1]
    for t in range(place.shape[1]):
        assert np.abs(right[:, t].mean(0) - left[:, t].mean(0)).max() < 0.06
    assert (place.sum(1) == 1).all(), "every column is visited once"


def test_tasks_are_what_they_say() -> None:
    for seed in range(3):
        xor = motion_clips("xor", 64, seed)
        assert (xor.labels == (xor.colours ^ (xor.directions > 0))).all()
        both = motion_clips("redundant", 64, seed, alone=False)
        assert (both.labels == both.colours).all()
        assert (both.labels == (both.directions > 0)).all()
        one = motion_clips("redundant", 64, seed, alone=True)
        assert ((one.colours < 0) != (one.directions == 0)).all()
        assert (motion_clips("colour", 64, seed).labels == motion_clips("colour", 64, seed).colours).all()
    for task in ("colour", "direction", "xor"):
        clips = motion_clips(task, 64, 1)
        assert clips.labels.mean() == 0.5
        assert clips.directions.mean() == 0.0


def test_squares_move_as_their_direction_says() -> None:
    clips = motion_clips("xor", 40, 2)
    for masks, direction in zip(clips.masks, clips.directions, strict=True):
        for t in range(3):
            assert (np.roll(masks[t], 3 * int(direction), axis=1) == masks[t + 1]).all()


def test_unknown_tasks_are_refused() -> None:
    with pytest.raises(UsageError, match="no task 'shape'"):
        motion_clips("shape", 1, 0)
