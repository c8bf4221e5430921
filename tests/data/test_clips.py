"""Clips as samples: folders, animations, chosen frames, windows, masks, tables."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from foveate.data.clips import open_clip
from foveate.data.manifest import Manifest
from foveate.data.sampling import Sampling, Selection, at_rate, duration_of, evenly, rate_of
from foveate.errors import SampleError, UsageError
from video_files import LOSSLESS, numbered, write_video


@pytest.fixture
def clip():
    return numbered(20)


def save_folder(folder, clip, name="frame{}.png"):
    folder.mkdir(parents=True)
    for i, pixels in enumerate(clip):
        Image.fromarray(pixels).save(folder / name.format(i))
    return folder


def discover(inputs, **sampling):
    return Manifest.discover(inputs, "clip", Sampling(**sampling))


def only(inputs, **sampling):
    (row,) = discover(inputs, **sampling).rows
    return discover(inputs, **sampling).load(0), row


# ---------------------------------------------------------------------------------------- arithmetic


@given(st.integers(1, 500), st.integers(1, 500))
@settings(max_examples=100, deadline=None)
def test_evenly_takes_the_centres_of_equal_parts(count, wanted):
    places = evenly(count, wanted)
    number = min(count, wanted)
    assert places.tolist() == [int((k + 0.5) * count / number + 1e-9) for k in range(number)]
    assert len(set(places.tolist())) == number
    # As far from one end as from the other, within a frame.
    assert abs(places[0] - (count - 1 - places[-1])) <= 1


@given(st.lists(st.floats(0.01, 1), min_size=1, max_size=60), st.floats(0.5, 200))
@settings(max_examples=100, deadline=None)
def test_a_rate_takes_the_frame_on_show(steps, rate):
    times = np.concatenate([[0.0], np.cumsum(steps)])
    usual = float(np.median(np.diff(times)))
    expected, k = [], 0
    while k / rate < times[-1] + usual * (1 - 1e-6):
        on_show = max(i for i, t in enumerate(times) if t <= k / rate + 1e-6 * usual)
        if not expected or expected[-1] != on_show:
            expected.append(on_show)
        k += 1
    assert at_rate(times, rate).tolist() == expected


@given(st.integers(1, 90), st.integers(1, 40), st.integers(1, 40), st.integers(1, 4))
@settings(max_examples=150, deadline=None)
def test_windows_lose_no_frame_and_none_is_part_of_another(count, window, hop, stride):
    selection = Selection(sampling=Sampling(window=window, hop=hop, stride=stride))
    parts = [w.positions(count, None, "x").tolist() for w in selection.windows(count, None, "x")]
    frames = list(range(0, count, stride))
    for part in parts:
        assert part == frames[frames.index(part[0]) : frames.index(part[0]) + window]
    assert [part[0] for part in parts] == [k * hop * stride for k in range(len(parts))]
    assert all(not set(a) <= set(b) for a in parts for b in parts if a is not b)
    if hop <= window:
        assert sorted({p for part in parts for p in part}) == frames


def test_selection_travels_as_json():
    for selection in (
        Selection(),
        Selection("3", "1.5s", 10.0, Sampling(frames=4, stride=2, window=9, hop=3), (3, 12)),
        Selection(sampling=Sampling(fps=2.5)),
    ):
        assert Selection.from_json(selection.to_json()) == selection
    assert Selection().to_json() == "{}"


@pytest.mark.parametrize(
    "wrong",
    [{"frames": 0}, {"stride": -1}, {"fps": 0.0}, {"fps": 2.0, "stride": 2}, {"hop": 3}, {"window": 0}],
)
def test_wrong_options_are_usage_errors(wrong):
    with pytest.raises(UsageError):
        Sampling(**wrong)


def test_rate_and_duration():
    assert rate_of(np.array([0, 0.5, 1.0, 1.4])) == pytest.approx(2.0)
    assert duration_of(np.array([1.0, 1.5, 2.0])) == pytest.approx(1.5)
    assert np.isnan(rate_of(np.array([1.0])))
    assert np.isnan(duration_of(None))


# --------------------------------------------------------------------------------- folders, animations


def test_a_folder_is_a_clip_in_natural_order(tmp_path, clip):
    folder = save_folder(tmp_path / "swim", clip)
    (folder / ".hidden.png").write_bytes(b"")
    sample, row = only(folder)
    assert (row.id, row.video) == ("swim", "swim")
    assert np.array_equal(sample.pixels, clip)
    assert sample.times is None
    part = discover(folder, frames=3).load(0)
    assert np.array_equal(part.pixels, clip[[3, 10, 16]])
    assert part.sha256 != sample.sha256


def test_the_hash_of_a_folder_is_of_names_and_contents(tmp_path, clip):
    one = only(save_folder(tmp_path / "a" / "x", clip[:4]))[0].sha256
    same = only(save_folder(tmp_path / "b" / "y", clip[:4]))[0].sha256
    other = only(save_folder(tmp_path / "c" / "x", clip[1:5]))[0].sha256
    assert one == same != other


def test_frames_of_different_sizes_name_both(tmp_path, clip):
    folder = save_folder(tmp_path / "swim", clip[:4])
    Image.new("RGB", (10, 12)).save(folder / "frame2.png")
    with pytest.raises(SampleError, match=r"frame 2 \(frame2\.png\) is 10 x 12 pixels, but frame 0"):
        discover(folder).load(0)


@pytest.mark.parametrize("suffix", ["gif", "png", "webp", "apng"])
def test_animations_are_clips(tmp_path, clip, suffix):
    frames = [Image.fromarray(pixels) for pixels in clip[:6]]
    path = tmp_path / f"swim.{suffix}"
    lossless = {"lossless": True} if suffix == "webp" else {}
    kind = "PNG" if "png" in suffix else suffix.upper()
    shown = [100, 100, 50, 200, 100, 100]
    frames[0].save(path, kind, save_all=True, append_images=frames[1:], duration=shown, **lossless)
    (tmp_path / "readme.txt").write_text("x")
    sample, row = only(tmp_path)
    assert row.id == path.name
    np.testing.assert_allclose(sample.times, [0, 0.1, 0.2, 0.25, 0.45, 0.55], atol=2e-3)
    assert np.abs(sample.pixels.astype(int) - clip[:6]).max() <= (8 if suffix == "gif" else 0)
    assert "variable frame rate" in sample.columns["notes"]
    part = discover(tmp_path, stride=3).load(0)
    assert np.array_equal(part.pixels, sample.pixels[::3])


def test_a_still_image_is_a_clip_of_one_frame(tmp_path, clip):
    Image.fromarray(clip[0]).save(tmp_path / "a.png")
    sample, _ = only(tmp_path / "a.png")
    assert np.array_equal(sample.pixels, clip[:1])
    assert "one frame" in sample.columns["notes"]


# ------------------------------------------------------------------------------------------ manifest


def test_what_is_a_clip_in_a_folder(tmp_path, clip):
    save_folder(tmp_path / "in" / "a", clip[:2])
    write_video(tmp_path / "in" / "b.mp4", clip, **LOSSLESS)
    save_folder(tmp_path / "in" / "deep" / "er", clip[:3])
    (tmp_path / "in" / "notes.txt").write_text("x")
    manifest = discover(tmp_path / "in")
    assert manifest.ids == ("a", "b.mp4", "deep/er")
    assert [manifest.load(i).pixels.shape[0] for i in range(3)] == [2, 20, 3]
    assert (manifest.ignored, manifest.media, manifest.most_frames()) == ({".txt": 1}, "clip", 20)


def test_a_model_of_images_counts_videos_as_ignored_and_says_what_to_do(tmp_path, clip):
    write_video(tmp_path / "b.mp4", clip[:3], **LOSSLESS)
    with pytest.raises(UsageError, match=r"no image in .*1 of them videos: choose a model of clips"):
        Manifest.discover(tmp_path)
    Image.fromarray(clip[0]).save(tmp_path / "a.png")
    manifest = Manifest.discover(tmp_path)
    assert (manifest.ids, manifest.ignored, manifest.media) == (("a.png",), {".mp4": 1}, "image")
    with pytest.raises(SampleError, match="a video, but this model takes images"):
        Manifest.discover(tmp_path / "b.mp4").load(0)
    with pytest.raises(UsageError, match="choose frames of clips"):
        Manifest.discover(tmp_path, "image", Sampling(window=3))


def test_no_clip_says_what_to_give(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(UsageError, match=r"no clip in .*ignored: 1 x \.txt") as caught:
        discover(tmp_path)
    assert "folders of frames" in caught.value.remedy


def test_a_long_video_becomes_windows(tmp_path, clip):
    path = write_video(tmp_path / "long.mp4", clip, **LOSSLESS)
    manifest = discover(path, window=8)
    assert manifest.ids == ("long.mp4@0000-0007", "long.mp4@0008-0015", "long.mp4@0016-0019")
    assert {row.video for row in manifest.rows} == {"long.mp4"}
    for i, part in enumerate((slice(0, 8), slice(8, 16), slice(16, 20))):
        sample = manifest.load(i)
        assert np.array_equal(sample.pixels, clip[part])
        np.testing.assert_allclose(sample.times, np.arange(20)[part] / 25, atol=1e-9)
    assert len({manifest.load(i).sha256 for i in range(3)}) == 3
    digests = {discover(path, **o).digest for o in ({}, {"window": 8}, {"window": 8, "hop": 4}, {"frames": 8})}
    assert len(digests) == 4
    assert manifest.digest == discover(path, window=8).digest
    assert discover(path, window=8, frames=2).load(1).times.tolist() == pytest.approx([10 / 25, 14 / 25])


def test_a_table_chooses_parts_rates_and_recordings(tmp_path, clip):
    write_video(tmp_path / "a.mp4", clip, **LOSSLESS)
    save_folder(tmp_path / "f", clip[:10])
    (tmp_path / "t.csv").write_text(
        "path,start,stop,fps,video,label\n"
        "a.mp4,5,9,,camera 1,7\n"
        "a.mp4,0.2s,0.4s,,,x\n"
        "a.mp4,,,50,,x\n"
        "f,,0.5s,4,,x\n"
    )
    manifest = discover(tmp_path / "t.csv")
    assert manifest.ids == ("a.mp4", "a.mp4#2", "a.mp4#3", "f")
    assert [row.video for row in manifest.rows] == ["camera 1", "a.mp4", "a.mp4", "f"]
    samples = [manifest.load(i) for i in range(4)]
    expected = [clip[5:9], clip[5:10], clip, clip[:2]]
    assert all(np.array_equal(s.pixels, e) for s, e in zip(samples, expected, strict=True))
    np.testing.assert_allclose(samples[2].times, np.arange(20) / 50)
    assert samples[3].times.tolist() == [0, 0.25]
    assert samples[0].columns["label"] == "7"
    assert "fps" not in manifest.columns


@pytest.mark.parametrize("bad", ["start\n1.5", "start\n-2", "stop\nsoon", "fps\n0", "frames\n3", "frame_index\n3"])
def test_columns_that_make_no_sense_are_usage_errors(tmp_path, clip, bad):
    write_video(tmp_path / "a.mp4", clip[:2], **LOSSLESS)
    name, value = bad.split("\n")
    (tmp_path / "t.csv").write_text(f"path,{name}\na.mp4,{value}\n")
    with pytest.raises(UsageError, match=name):
        discover(tmp_path / "t.csv")


def test_bad_clips_fail_when_they_are_loaded_not_before(tmp_path, clip):
    write_video(tmp_path / "ok.mp4", clip, **LOSSLESS)
    (tmp_path / "bad.mp4").write_text("dear fish")
    manifest = discover(tmp_path, window=10)
    assert manifest.ids == ("bad.mp4", "ok.mp4@0000-0009", "ok.mp4@0010-0019")
    with pytest.raises(SampleError, match="cannot be opened"):
        manifest.load(0)


def test_a_part_without_frames_and_seconds_of_a_folder_are_clear(tmp_path, clip):
    save_folder(tmp_path / "f", clip[:3])
    with pytest.raises(SampleError, match=r"no frame from 7 to the end \(it has 3\)"):
        open_clip("f", tmp_path / "f", Selection("7"))
    with pytest.raises(SampleError, match="no times") as caught:
        open_clip("f", tmp_path / "f", Selection(sampling=Sampling(fps=2.0)))
    assert "columns path and fps" in caught.value.remedy


def test_a_clip_over_the_limit_says_how_to_read_it(tmp_path, clip, monkeypatch):
    path = write_video(tmp_path / "a.mp4", clip, **LOSSLESS)
    monkeypatch.setenv("FOVEATE_MAX_CLIP_GB", "0.0001")
    with pytest.raises(SampleError, match="20 frames of 64 x 48") as caught:
        discover(path).load(0)
    assert "--window" in caught.value.remedy
    assert np.array_equal(discover(path).open(0).read(12, 15).pixels, clip[12:15])


# --------------------------------------------------------------------------------------------- masks


def test_masks_come_as_folder_array_or_one_image(tmp_path, clip):
    write_video(tmp_path / "a.mp4", clip, **LOSSLESS)
    masks = np.random.default_rng(0).random((20, 48, 64)) < 0.3
    save_folder(tmp_path / "m", (masks * 255).astype(np.uint8), "{}.png")
    np.savez(tmp_path / "m.npz", masks=masks, other=np.zeros(3))
    np.save(tmp_path / "m.npy", masks.astype(np.uint8))
    Image.fromarray((masks[0] * 255).astype(np.uint8)).save(tmp_path / "m.png")
    lines = [f"a.mp4,{m}" for m in ("m", "m.npz", "m.npy", "m.png", "")]
    (tmp_path / "t.csv").write_text("path,mask\n" + "\n".join(lines))
    manifest = discover(tmp_path / "t.csv", stride=3, window=4, hop=2)
    for i, row in enumerate(manifest.rows):
        mask, positions = manifest.load(i).mask, manifest.open(i).positions
        name = "" if row.mask is None else row.mask.name
        if name == "m.png":
            assert np.array_equal(mask, np.repeat(masks[:1], positions.size, 0))
        elif name:
            assert np.array_equal(mask, masks[positions])
        else:
            assert mask is None


def test_masks_that_do_not_fit_are_clear(tmp_path, clip):
    path = write_video(tmp_path / "a.mp4", clip, **LOSSLESS)
    save_folder(tmp_path / "m", np.zeros((7, 48, 64), np.uint8))
    np.savez(tmp_path / "s.npz", np.zeros((20, 40, 64)))
    np.save(tmp_path / "o.npy", np.array([{"code": 1}], object), allow_pickle=True)
    (tmp_path / "x.npz").write_text("dear fish")
    for name, message in (
        ("m", "7 images, but the clip has 20 frames"),
        ("s.npz", r"expected an array of shape \(20, 48, 64\)"),
        ("o.npy", "not a plain numpy array"),
        ("x.npz", "not a plain numpy array"),
        ("none.npy", "no such file"),
    ):
        with pytest.raises(SampleError, match=message):
            open_clip("a", path, Selection(), mask=tmp_path / name)
