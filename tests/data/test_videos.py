"""Any video file: frames, times, what was done to them, and clear errors for what cannot be used."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from foveate.data import videos
from foveate.data.videos import count_at_most, index_video
from foveate.errors import MissingDependencyError, SampleError
from video_files import LOSSLESS, av, numbered, write_video


def every_frame(video):
    return np.stack(list(video.read(range(video.frames))))


def test_frames_times_and_hash(tmp_path):
    clip = numbered(40)
    path = write_video(tmp_path / "a.mp4", clip, **LOSSLESS)
    video = index_video(path)
    assert (video.frames, video.height, video.width, video.notes) == (40, 48, 64, ())
    np.testing.assert_allclose(video.times, np.arange(40) / 25, atol=1e-12)
    assert np.array_equal(every_frame(video), clip)
    import hashlib

    assert video.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert count_at_most(path) == 40


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi"])
def test_any_range_is_what_reading_from_the_start_gives(tmp_path, suffix):
    clip = numbered(50)
    video = index_video(write_video(tmp_path / f"a{suffix}", clip, **LOSSLESS))
    random = np.random.default_rng(0)
    ranges = [(0, 1), (49, 50), (11, 13), (12, 24), *(sorted(random.integers(0, 51, 2)) for _ in range(8))]
    for a, b in ranges:
        got = list(video.read(range(a, b)))
        assert np.array_equal(np.array(got).reshape(-1, 48, 64, 3), clip[a:b]), (a, b)
    chosen = [2, 3, 17, 44]
    assert np.array_equal(np.stack(list(video.read(chosen))), clip[chosen])


def test_one_frame(tmp_path):
    clip = numbered(1)
    video = index_video(write_video(tmp_path / "a.mp4", clip, **LOSSLESS))
    assert (video.frames, video.times.tolist()) == (1, [0.0])
    assert np.array_equal(every_frame(video), clip)


def test_variable_frame_rate_keeps_true_times(tmp_path):
    shown = [0, 40, 80, 200, 210, 400]
    clip = numbered(6)
    path = write_video(tmp_path / "a.mp4", clip, pts=shown, time_base=Fraction(1, 1000), **LOSSLESS)
    video = index_video(path)
    np.testing.assert_allclose(video.times, np.array(shown) / 1000, atol=1e-9)
    assert video.notes == ("variable frame rate: 5.26 to 100 frames a second",)
    assert np.array_equal(every_frame(video), clip)


def test_millisecond_clock_is_no_variable_rate(tmp_path):
    """Matroska rounds times to milliseconds: 30 frames a second are 33 and 34 ms apart."""
    video = index_video(write_video(tmp_path / "a.mkv", numbered(9), fps=30, **LOSSLESS))
    assert video.notes == ()
    np.testing.assert_allclose(video.times, np.arange(9) / 30, atol=1.1e-3)


def test_times_begin_at_the_first_frame(tmp_path):
    clip = numbered(5)
    path = write_video(
        tmp_path / "a.mkv", clip, pts=[500, 540, 580, 620, 660], time_base=Fraction(1, 1000), **LOSSLESS
    )
    np.testing.assert_allclose(index_video(path).times, np.arange(5) * 0.04, atol=1e-9)


def test_missing_time_stamps_are_counted_and_said(tmp_path):
    """A raw H.264 stream has none."""
    clip = numbered(30)
    video = index_video(write_video(tmp_path / "a.h264", clip, **LOSSLESS))
    assert video.frames == 30
    assert video.pts is None
    assert "time stamps missing" in video.notes[0]
    assert np.array_equal(np.stack(list(video.read([0, 13, 29]))), clip[[0, 13, 29]])


@pytest.mark.parametrize("stamps", [[0, None, 2], [0, 1, 1, 2], [3, 2, 1]])
def test_bad_clocks_fall_back_to_the_rate(stamps):
    pts, times, notes = videos._times(stamps, 0.1, 20.0)
    assert pts is None
    np.testing.assert_allclose(times, np.arange(len(stamps)) / 20)
    assert "20 frames a second" in notes[0]


@pytest.mark.parametrize(("turn", "quarter"), [(90, 1), (180, 2), (-90, 3)])
def test_rotation_is_applied(tmp_path, turn, quarter):
    clip = numbered(3)
    video = index_video(write_video(tmp_path / "a.mp4", clip, turn=turn, **LOSSLESS))
    upright = np.rot90(clip, quarter, axes=(1, 2))
    assert (video.height, video.width) == upright.shape[1:3]
    assert np.array_equal(every_frame(video), upright)


@pytest.mark.parametrize("pix_fmt", ["gbrp10le", "gbrp12le", "gbrp16le"])
def test_depth_is_scaled_not_clipped(tmp_path, pix_fmt):
    bits = int(pix_fmt[4:6])
    ramp = np.linspace(0, 2**bits - 1, 64).round().astype(np.uint16)
    grey = np.broadcast_to(ramp << (16 - bits), (2, 32, 64))
    path = tmp_path / "a.mkv"
    write_video(path, grey, codec="ffv1", pix_fmt=pix_fmt, source="gray16le")
    got = every_frame(index_video(path))
    expected = ramp.astype(np.float64) * 255 / (2**bits - 1)
    # Rounded twice (into the file's depth and out of it); a clipped or shifted value would be off by far more.
    assert np.abs(got.astype(np.float64) - expected[None, None, :, None]).max() <= 1.5


def test_full_and_limited_range_give_the_same_picture(tmp_path):
    clip = np.repeat(np.linspace(0, 255, 64).round().astype(np.uint8)[None, None, :, None], 3, -1)
    clip = np.broadcast_to(clip, (2, 32, 64, 3))
    for pix_fmt in ("yuv444p", "yuvj444p"):
        path = tmp_path / f"{pix_fmt}.mkv"
        write_video(path, clip, pix_fmt=pix_fmt, options={"qp": "0"})
        got = every_frame(index_video(path))
        assert np.abs(got.astype(int) - clip).max() <= 3, pix_fmt


def test_transparency_lies_on_white(tmp_path):
    random = np.random.default_rng(0)
    rgba = random.integers(0, 256, (4, 32, 48, 4), dtype=np.uint8)
    video = index_video(write_video(tmp_path / "a.mov", rgba, codec="qtrle", pix_fmt="argb", source="rgba"))
    share = rgba[..., 3:].astype(np.float64) / 255
    expected = np.rint(rgba[..., :3] * share + 255 * (1 - share))
    assert np.array_equal(every_frame(video), expected)
    assert video.notes == ("transparency on white",)


def test_odd_sizes(tmp_path):
    clip = numbered(4, 47, 63)
    video = index_video(write_video(tmp_path / "a.mkv", clip, codec="ffv1", pix_fmt="bgr0"))
    assert np.array_equal(every_frame(video), clip)


def test_music_with_a_cover_is_no_video(tmp_path):
    path = tmp_path / "a.mka"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.rate = 8000
        for packet in [*stream.encode(frame), *stream.encode()]:
            container.mux(packet)
    with pytest.raises(SampleError, match="no video stream"):
        index_video(path)


# --------------------------------------------------------------------------------------- bad files


def test_a_truncated_file_is_used_as_far_as_it_goes(tmp_path):
    clip = numbered(48)
    whole = write_video(tmp_path / "a.mkv", clip, **LOSSLESS).read_bytes()
    (tmp_path / "cut.mkv").write_bytes(whole[: len(whole) * 2 // 3])
    video = index_video(tmp_path / "cut.mkv")
    assert 12 < video.frames < 48
    assert np.array_equal(every_frame(video), clip[: video.frames])
    assert "cut off: the file says 1.92 s" in video.notes[0]


def test_a_truncated_mp4_without_its_index_is_an_error_with_a_remedy(tmp_path):
    whole = write_video(tmp_path / "a.mp4", numbered(24), **LOSSLESS).read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(SampleError, match=r"cut\.mp4: cannot be opened .*Invalid data"):
        index_video(tmp_path / "cut.mp4")


def test_a_hole_in_the_middle_leaves_the_rest_with_its_times(tmp_path):
    clip = numbered(48)
    data = bytearray(write_video(tmp_path / "a.ts", clip, options={"g": "12"}).read_bytes())
    middle = len(data) // 2 // 188 * 188
    data[middle : middle + 188 * 12] = bytes(188 * 12)
    (tmp_path / "hole.ts").write_bytes(data)
    whole, hole = index_video(tmp_path / "a.ts"), index_video(tmp_path / "hole.ts")
    assert 12 < hole.frames < 48
    assert hole.notes
    same = np.isin(np.round(whole.times, 4), np.round(hole.times, 4))
    assert same.sum() == hole.frames
    assert np.array_equal(every_frame(hole)[:12], every_frame(whole)[:12])


@pytest.mark.parametrize(
    ("content", "message"), [(b"", "empty"), (b"dear fish, " * 90, "cannot be opened"), (None, "cannot be read")]
)
def test_what_is_no_video(tmp_path, content, message):
    path = tmp_path / "a.mp4"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SampleError, match=message):
        index_video(path)


def test_frames_of_different_sizes_name_the_frame(tmp_path):
    """Two MPEG transport streams one after the other are one file."""
    small = write_video(tmp_path / "s.ts", numbered(5, 48, 64), options={"bf": "0"}).read_bytes()
    large = write_video(tmp_path / "l.ts", numbered(5, 64, 96), options={"bf": "0"}).read_bytes()
    (tmp_path / "both.ts").write_bytes(small + large)
    with pytest.raises(SampleError, match=r"frame \d is 96 x 64 pixels, but frame 0 is 64 x 48"):
        index_video(tmp_path / "both.ts")


def test_pictures_over_the_limit_are_refused(tmp_path, monkeypatch):
    path = write_video(tmp_path / "a.mp4", numbered(3), **LOSSLESS)
    monkeypatch.setenv("FOVEATE_MAX_MEGAPIXELS", "0.001")
    with pytest.raises(SampleError, match=r"64 x 48 is 0 megapixels"):
        index_video(path)


def test_without_pyav_the_remedy_is_the_command(tmp_path, monkeypatch):
    path = write_video(tmp_path / "a.mp4", numbered(3), **LOSSLESS)
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(MissingDependencyError, match="PyAV") as caught:
        index_video(path)
    assert caught.value.remedy == 'pip install "foveate[video]"'


def test_a_file_that_changes_is_indexed_again(tmp_path):
    path = write_video(tmp_path / "a.mkv", numbered(3), **LOSSLESS)
    assert index_video(path).frames == 3
    write_video(path, numbered(8), **LOSSLESS)
    assert index_video(path).frames == 8


def test_a_range_is_read_without_holding_the_video(tmp_path):
    import tracemalloc

    path = write_video(tmp_path / "a.mp4", numbered(200, 240, 320), options={"g": "25"})
    video = index_video(path)
    tracemalloc.start()
    for _ in video.read(range(100, 180)):
        pass
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 12 * 240 * 320 * 3


def test_a_file_cut_off_after_its_first_frame_says_so(tmp_path):
    whole = write_video(tmp_path / "a.mkv", numbered(48), **LOSSLESS).read_bytes()
    for share in range(1, 40):
        (tmp_path / "cut.mkv").write_bytes(whole[: len(whole) * share // 40])
        try:
            video = index_video(tmp_path / "cut.mkv")
        except SampleError:
            continue
        assert "cut off: the file says 1.92 s" in video.notes[0]
        break
    assert video.frames == 1
    one = index_video(write_video(tmp_path / "one.mkv", numbered(1), **LOSSLESS))
    assert (one.frames, one.notes) == (1, ())
