"""The capture job on clips: labels in time, tracks, blocks of frames, and what goes wrong on the way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from clip_fakes import SITE, ClipSource
from daq_models import tiny
from foveate.capture.engine import capture_batch
from foveate.cli import main
from foveate.data.labels import same_tokens
from foveate.data.ledger import Ledger
from foveate.data.manifest import Manifest
from foveate.data.run import Run
from foveate.data.sampling import Sampling
from foveate.data.validate import validate
from foveate.errors import SampleError, StoreError, UsageError
from foveate.geometry import CellGrid
from foveate.interfaces import ModelCard, Target
from foveate.study import capture_job
from foveate.study.capture import estimate_capture, run_capture
from foveate.study.plan import build_plan
from foveate.study.tracks import drawn
from foveate_dvis.daq_opening import OpenedDaq
from foveate_dvis.daq_source import DaqSource
from stream_fakes import READ, SELF, MemorySource, swimming
from video_files import LOSSLESS, numbered, write_video

EVERYTHING = {"rows": "all", "reductions": ("entropy", "received", "head_mean", "topk")}


def save(folder: Path, **clips: np.ndarray) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, clip in clips.items():
        write_video(folder / f"{name}.mp4", clip, fps=10, **LOSSLESS)
    return folder


@pytest.fixture
def fish(tmp_path):
    """Three clips of 7, 10 and 3 frames; in the last no track ever appears."""
    return save(
        tmp_path / "fish", a=swimming(7), b=swimming(10, seed=1, births={2: 0, 0: 6}), c=swimming(3, births={9: 3})
    )


def whole(source, folder, plan):
    """What the engine says of each clip by itself."""
    manifest = Manifest.discover(folder, "clip")
    samples = [manifest.load(i) for i in range(len(manifest))]
    batches = [source.encode([sample]) for sample in samples]
    return samples, batches, [capture_batch(source, batch, plan) for batch in batches]


def assert_same_run(one, other):
    a, b = Run.open(one), Run.open(other)
    for name in a.site_ids:
        assert a.site(name).load().identical(b.site(name).load())
    assert a.samples.identical(b.samples)
    assert a.predictions.identical(b.predictions)
    assert a.tracks.load().identical(b.tracks.load())


# ------------------------------------------------------------------------------ a model of fixed frames


def test_a_clip_is_captured_with_its_frames_times_and_recording(tmp_path):
    folder = save(tmp_path / "in", swim=numbered(20))
    source, plan = ClipSource(frames=4), build_plan(ClipSource(), **EVERYTHING)
    report = run_capture(source, folder, tmp_path / "r.zarr", plan=plan)
    assert report.complete
    run = Run.open(report.path)
    samples, batches, captured = whole(source, folder, plan)
    stored = run.site(SITE).load()
    for name, array in captured[0].sites[SITE].arrays.items():
        np.testing.assert_allclose(stored[name].values[0].astype(np.float32), array[0], atol=6e-4)
    table = run.samples
    assert table["frames"].values.tolist() == [20]
    assert table["fps"].values.tolist() == pytest.approx([10.0])
    assert table["duration"].values.tolist() == pytest.approx([2.0])
    assert table["video"].values.tolist() == ["swim.mp4"]
    index = batches[0].per_sample["frame_index"][0].tolist()
    assert run.frame_index(0).tolist() == index
    np.testing.assert_allclose(run.times(0), samples[0].times[index])
    assert run.frame_cells(0).tolist() == list(source.frame_cells(batches[0])) == [0, 0, 1, 1]
    assert run.grid == source.cells(batches[0])
    assert (run.media, run.attrs["media"]) == ("clip", "clip")
    assert same_tokens(run.tokens(SITE, "key"), captured[0].sites[SITE].key)
    assert np.array_equal(run.load_sample(0).pixels, samples[0].pixels)
    part = run.load_frames(0, 5, 9)
    assert np.array_equal(part.pixels, samples[0].pixels[5:9])
    np.testing.assert_allclose(part.times, samples[0].times[5:9])
    assert validate(report.path, deep=True) == []
    assert set(run.predictions["track"].values[0]) == {""}
    with pytest.raises(StoreError, match="no tracks"):
        _ = run.tracks


def test_windows_of_one_recording_are_samples_that_share_it(tmp_path):
    folder = save(tmp_path / "in", swim=numbered(20))
    manifest = Manifest.discover(folder, "clip", Sampling(window=8, stride=2))
    source = ClipSource(frames=4)
    run = Run.open(run_capture(source, manifest, tmp_path / "r.zarr").path)
    assert run.samples["id"].values.tolist() == ["swim.mp4@0000-0014", "swim.mp4@0016-0018"]
    assert set(run.samples["video"].values) == {"swim.mp4"}
    assert run.samples["frames"].values.tolist() == [8, 2]
    np.testing.assert_allclose(run.samples["fps"], [5, 5])
    assert np.array_equal(run.load_sample(0).pixels, numbered(20)[:16:2])
    assert run.times(1)[0] == pytest.approx(1.6)
    again = run_capture(source, manifest, tmp_path / "r.zarr")
    assert again.resumed == 2
    other = Manifest.discover(folder, "clip", Sampling(window=8, hop=8, stride=2, frames=3))
    with pytest.raises(StoreError, match="manifest"):
        run_capture(source, other, tmp_path / "r.zarr")


def test_a_table_column_of_the_user_comes_back(tmp_path):
    save(tmp_path, swim=numbered(20))
    (tmp_path / "t.csv").write_text("path,start,stop,site,video\nswim.mp4,4,12,reef,cam\nswim.mp4,,1s,,\n")
    run = Run.open(run_capture(ClipSource(frames=4), tmp_path / "t.csv", tmp_path / "r.zarr").path)
    assert run.samples["site"].values.tolist() == ["reef", ""]
    assert run.samples["video"].values.tolist() == ["cam", "swim.mp4"]
    sample = run.load_sample(0)
    assert np.array_equal(sample.pixels, numbered(20)[4:12])
    assert sample.columns["site"] == "reef"
    assert "frames" not in sample.columns
    assert len(run.load_sample(1).pixels) == 10


def test_a_changed_file_is_noticed(tmp_path):
    folder = save(tmp_path / "in", swim=numbered(20))
    run = Run.open(run_capture(ClipSource(frames=4), folder, tmp_path / "r.zarr").path)
    save(folder, swim=numbered(21))
    with pytest.raises(SampleError, match=r"clip .*not the file that was captured"):
        run.load_frames(0, 0, 2)


def test_images_and_clips_are_not_mixed_up(tmp_path):
    folder = save(tmp_path / "in", swim=numbered(4))
    from PIL import Image

    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    with pytest.raises(UsageError, match="takes clips, but the manifest holds images"):
        run_capture(ClipSource(), Manifest.discover(tmp_path / "a.png"), tmp_path / "r.zarr")
    from foveate.testing.tiny import TinySource

    with pytest.raises(UsageError, match=r"no image in .*videos: choose a model of clips"):
        run_capture(TinySource(), folder, tmp_path / "r.zarr")
    run = Run.open(run_capture(TinySource(), tmp_path / "a.png", tmp_path / "i.zarr").path)
    assert run.media == "image"
    for ask in (run.frame_index, run.load_frames):
        with pytest.raises(UsageError):
            ask(0)


# --------------------------------------------------------------------------- a model of every frame


def test_clips_of_any_length_share_a_run(tmp_path, fish):
    source, plan = MemorySource(), build_plan(MemorySource(), **EVERYTHING)
    report = run_capture(source, fish, tmp_path / "r.zarr", plan=plan, block=0)
    assert report.failed == {}
    run = Run.open(report.path)
    samples, _, captured = whole(source, fish, plan)
    assert run.site(SELF)["attention"].dims[:3] == ("sample", "frame", "layer")
    for i, (sample, one) in enumerate(zip(samples, captured, strict=True)):
        frames = len(sample.pixels)
        for name, site in one.sites.items():
            stored = run.site(name)
            assert stored.sizes["frame"] == 10
            tokens = {axis: len(getattr(site, axis)) for axis in ("query", "token", "key")}
            for variable, array in site.arrays.items():
                kept = stored[variable].isel(
                    sample=i, **{d: slice(n) for d, n in tokens.items() if d in stored[variable].dims}
                )
                np.testing.assert_allclose(kept.values[:frames].astype(np.float32), array[0], atol=6e-4)
                behind = stored[variable].values[i, frames:]
                nothing = {"f": np.isnan(behind), "i": behind == -1, "b": ~behind.astype(bool)}[behind.dtype.kind]
                assert nothing.all()
        assert same_tokens(
            run.tokens(READ, "token", i).take(range(len(one.sites[READ].token))), one.sites[READ].token
        )
        assert run.frame_index(i).tolist() == list(range(frames))
    assert validate(report.path, deep=True) == []


@pytest.mark.parametrize("block", [4, 7, 16])
def test_blocks_of_frames_equal_whole_clips(tmp_path, fish, block):
    source = MemorySource()
    plan = build_plan(source, **EVERYTHING)
    run_capture(source, fish, tmp_path / "whole.zarr", plan=plan, block=0, target=Target("class"))
    source.largest = 0
    run_capture(source, fish, tmp_path / "blocks.zarr", plan=plan, block=block, target=Target("class"))
    assert source.largest == min(block, 10)
    assert_same_run(tmp_path / "whole.zarr", tmp_path / "blocks.zarr")
    run = Run.open(tmp_path / "blocks.zarr")
    assert run.attrs["frame_block"] == (block if block < 10 else None)
    assert validate(run.path, deep=True) == []
    assert len(Ledger(run.path).blocks()) == (sum(-(-n // block) for n in (7, 10, 3)) if block < 10 else 0)


def daq() -> DaqSource:
    return DaqSource(
        OpenedDaq(tiny("online", local=False), ModelCard("tiny-daq", "tiny", "tests")), shortest_edge=0
    )


def test_blocks_of_dvis_daq_equal_whole_clips(tmp_path):
    """A true tracker: tracks come and go, the gate does not run in the first frame, and slots are renormalised."""
    folder = save(tmp_path / "in", a=swimming(7, size=48))
    source = DaqSource(
        OpenedDaq(tiny("online", local=False), ModelCard("tiny-daq", "tiny", "tests")), shortest_edge=0
    )
    plan = build_plan(source, rows="all", reductions=("entropy", "received", "topk"), dtype="float32")
    for block in (0, 5):
        report = run_capture(source, folder, tmp_path / f"{block}.zarr", plan=plan, block=block)
        assert report.failed == {}
        assert validate(report.path, deep=True) == []
    # It reads two frames at a time, and so do blocks.
    assert Run.open(tmp_path / "5.zarr").attrs["frame_block"] == 4
    assert_same_run(tmp_path / "0.zarr", tmp_path / "5.zarr")
    run = Run.open(tmp_path / "5.zarr")
    assert (run.site("tracker.slot")["attention"].values[0, 0] == 0).all()
    assert np.isnan(run.site("tracker.slot")["entropy"].values[0, 0]).all()
    assert len({name for name in run.tokens("tracker.cross", "token", 0).label if name}) >= 2


def test_a_row_that_depends_on_the_answer_says_so_in_blocks(tmp_path):
    folder = save(tmp_path / "in", a=swimming(6, size=48))
    source = DaqSource(
        OpenedDaq(tiny("online", local=False), ModelCard("tiny-daq", "tiny", "tests")), shortest_edge=0
    )
    plan = build_plan(source, sites=["tracker.cross"])
    run = Run.open(run_capture(source, folder, tmp_path / "r.zarr", plan=plan, block=4).path)
    assert "in each block of 4 frames, by the answer so far" in run.site("tracker.cross").attrs["rows"]
    assert validate(run.path) == []


def test_tracks_lie_on_a_canvas_with_boxes(tmp_path, fish):
    source = MemorySource()
    run = Run.open(run_capture(source, fish, tmp_path / "r.zarr", block=4).path)
    samples, batches, captured = whole(source, fish, build_plan(source))
    tracks = run.tracks.load()
    assert tracks["mask"].dims == ("sample", "rank", "frame", "y", "x")
    for i, (batch, one) in enumerate(zip(batches, captured, strict=True)):
        (answers,) = source.predictions(one.outputs, batch)
        assert run.predictions["track"].values[i, : len(answers)].tolist() == [p.track for p in answers]
        assert run.track_canvas(i) == CellGrid.regular(16, 16, height=16, width=16)
        for rank, answer in enumerate(answers):
            stored = tracks.isel(sample=i, rank=rank, frame=slice(len(samples[i].pixels)))
            np.testing.assert_array_equal(stored["mask"], answer.mask)
            np.testing.assert_allclose(stored["area"], answer.mask.mean((1, 2)), atol=1e-6)
        assert np.isnan(tracks["mask"].values[i, len(answers) :]).all()
        assert np.isnan(tracks["mask"].values[i, :, len(samples[i].pixels) :]).all()
    assert run.predictions["track"].values[2].tolist() == [""] * 5


def test_masks_are_reduced_by_area_and_boxes_are_edges():
    random = np.random.default_rng(0)
    mask = random.random((3, 30, 45)) < 0.2
    mask[1] = False
    found = drawn(mask, (7, 10))
    fine = mask.repeat(7, 1).repeat(10, 2).reshape(3, 7, 30, 10, 45).mean((2, 4))
    np.testing.assert_allclose(found["mask"], fine, atol=1e-3)
    rows, columns = np.nonzero(mask[0])
    box = [float(found[f"box_{edge}"][0]) for edge in ("top", "left", "bottom", "right")]
    assert box == [rows.min(), columns.min(), rows.max() + 1, columns.max() + 1]
    assert np.isnan(found["box_top"][1])
    assert (found["mask"][1] == 0).all()
    np.testing.assert_allclose(found["area"], mask.mean((1, 2)), rtol=1e-6)


# -------------------------------------------------------------------------------- killed and resumed


def test_interrupted_within_a_clip_resumes_to_the_same_bits(tmp_path, fish):
    run_capture(MemorySource(), fish, tmp_path / "whole.zarr", block=2)

    class Stopping(MemorySource):
        left = 6

        def forward(self, batch, *, grad=False):
            self.left -= 1
            if self.left < 0:
                raise KeyboardInterrupt
            return super().forward(batch, grad=grad)

    stopping = Stopping()
    stopping.card = MemorySource().card
    with pytest.raises(KeyboardInterrupt):
        run_capture(stopping, fish, tmp_path / "cut.zarr", block=2)
    ledger = Ledger(tmp_path / "cut.zarr")
    # The probe took a block; a.mp4 has four, then one of b.mp4 was done.
    assert (sorted(ledger.entries()), len([b for n, b in ledger.blocks() if n == 1])) == ([0], 1)
    notes = validate(tmp_path / "cut.zarr", deep=True)
    assert {note.level for note in notes} == {"note"}
    before = ledger.blocks()[1, 0]
    report = run_capture(MemorySource(), fish, tmp_path / "cut.zarr", block=5)
    assert (report.resumed, report.captured) == (1, 3)
    assert ledger.blocks()[1, 0] == before
    assert_same_run(tmp_path / "whole.zarr", tmp_path / "cut.zarr")
    assert validate(tmp_path / "cut.zarr", deep=True) == []


SLOW = """
import sys, time, torch
sys.path.insert(0, sys.argv[3])
torch.set_num_threads(1)
from foveate.study.capture import run_capture
from stream_fakes import MemorySource

class Slow(MemorySource):
    def forward(self, batch, *, grad=False):
        time.sleep(0.03)
        return super().forward(batch, grad=grad)

source = Slow()
run_capture(source, sys.argv[1], sys.argv[2], block=2)
"""


@pytest.mark.slow
def test_kill_9_then_resume_equals_uninterrupted(tmp_path):
    folder = save(tmp_path / "in", a=swimming(20), b=swimming(16, seed=1))
    cut = tmp_path / "cut.zarr"
    for wanted in (4, 13):
        job = subprocess.Popen([sys.executable, "-c", SLOW, str(folder), str(cut), str(Path(__file__).parents[1])])
        deadline = time.monotonic() + 60
        while len(Ledger(cut).blocks()) < wanted:
            assert job.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.005)
        os.kill(job.pid, signal.SIGKILL)
        job.wait()
        assert {problem.level for problem in validate(cut, deep=True)} <= {"note"}
    run_capture(MemorySource(), folder, cut, block=2)
    run_capture(MemorySource(), folder, tmp_path / "whole.zarr", block=0)
    assert_same_run(tmp_path / "whole.zarr", cut)
    assert validate(cut, deep=True) == []


BOUNDED = """
import resource, sys, torch
sys.path.insert(0, sys.argv[3])
torch.set_num_threads(1)
from foveate.study.capture import run_capture
from stream_fakes import MemorySource
from pathlib import Path

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

source = MemorySource(size=128)
folder = Path(sys.argv[1])
run_capture(source, folder / "short.mp4", sys.argv[2] + ".short", block=8)
before = peak()
report = run_capture(source, folder / "long.mp4", sys.argv[2], block=8)
print(report.complete, source.largest, peak() - before)
"""


@pytest.mark.slow
def test_300_frames_in_bounded_memory(tmp_path):
    """Decoded, the clip is 15 MB, as the model's input 59 MB, and its masks are 15 MB."""
    folder = tmp_path / "in"
    folder.mkdir()
    for name, count in (("short", 17), ("long", 300)):
        write_video(folder / f"{name}.mp4", swimming(count, size=128))
    command = [sys.executable, "-c", BOUNDED, folder, tmp_path / "r.zarr", Path(__file__).parents[1]]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True)
    complete, largest, grown = done.stdout.split()
    assert (complete, largest) == ("True", "8")
    assert float(grown) < 20
    run = Run.open(tmp_path / "r.zarr")
    assert run.samples["frames"].values.tolist() == [300]
    assert np.isfinite(run.site(SELF)["entropy"].values).all()


# -------------------------------------------------------------------------------------- what fails


class Lost(MemorySource):
    """Cannot do the second clip beyond its first frames."""

    def forward(self, batch, *, grad=False):
        if batch.ids == ("b.mp4",) and batch.shared.get("state", {}).get("frames", 0) >= 4:
            raise RuntimeError("out of memory")
        return super().forward(batch, grad=grad)


def test_a_clip_that_fails_midway_leaves_nothing_and_the_others_stay(tmp_path, fish):
    report = run_capture(Lost(), fish, tmp_path / "r.zarr", block=2)
    assert report.failed == {"b.mp4": "RuntimeError: out of memory"}
    run = Run.open(report.path)
    assert run.ok.tolist() == [0, 2]
    assert np.isnan(run.site(SELF)["attention"].sel(sample="b.mp4")).all()
    assert validate(report.path, deep=True) == []
    reference = MemorySource()
    reference.card = Lost().card
    done = run_capture(reference, fish, tmp_path / "r.zarr", block=2, retry_failed=True)
    assert done.complete
    run_capture(reference, fish, tmp_path / "whole.zarr", block=0)
    assert_same_run(tmp_path / "whole.zarr", tmp_path / "r.zarr")


def test_bad_files_are_recorded_and_the_run_goes_on(tmp_path, fish):
    (fish / "0 letter.mp4").write_text("dear fish")
    data = (fish / "b.mp4").read_bytes()
    (fish / "cut.mp4").write_bytes(data[: len(data) // 2])
    write_video(fish / "one.mp4", swimming(1), fps=10, **LOSSLESS)
    report = run_capture(MemorySource(), fish, tmp_path / "r.zarr", block=4)
    assert sorted(report.failed) == ["0 letter.mp4", "cut.mp4"]
    run = Run.open(report.path)
    one = run.samples.sel(sample="one.mp4")
    assert one["frames"].item() == 1
    assert np.isnan(one["fps"].item())
    assert (run.samples["frame_index"].sel(sample="cut.mp4").values == -1).all()
    assert validate(report.path, deep=True) == []


def test_nothing_usable_is_an_error_that_lists_reasons(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.mp4").write_text("dear fish")
    with pytest.raises(SampleError, match=r"none of 1 samples(.|\n)*a\.mp4: .*cannot be opened"):
        run_capture(MemorySource(), tmp_path / "in", tmp_path / "r.zarr")
    assert not (tmp_path / "r.zarr").exists()


class Whole(MemorySource):
    """Has a site over the whole clip."""

    @property
    def sites(self):
        one, other = super().sites
        return (replace(one, group=("position",)), other)

    def label(self, call, batch, outputs):
        said = super().label(call, batch, outputs)
        return replace(said, at={"position": said.at["frame"]}) if call.site == SELF else said


def test_a_site_without_frames_cannot_be_captured_in_blocks(tmp_path, fish):
    with pytest.raises(UsageError, match="no axis of frames") as caught:
        run_capture(Whole(), fish, tmp_path / "r.zarr", block=4)
    assert "--block 0" in caught.value.remedy
    assert not (tmp_path / "r.zarr").exists()


def test_more_tracks_than_there_is_room_for_fail_their_clip(tmp_path, fish):
    source = MemorySource()
    source.bounds = lambda header: {"tracker.rows": 4}
    report = run_capture(source, fish, tmp_path / "r.zarr", block=3)
    assert list(report.failed) == ["a.mp4"]
    assert "5 do not fit a capacity of 4" in report.failed["a.mp4"]
    assert validate(report.path) == []


# ---------------------------------------------------------------------------------------------- cost


@pytest.mark.parametrize("block", [0, 4])
def test_estimate_writes_nothing_and_equals_what_is_allocated(tmp_path, fish, block):
    source = MemorySource()
    estimate = estimate_capture(source, fish, tmp_path / "r.zarr", block=block)
    assert not (tmp_path / "r.zarr").exists()
    run = Run.open(run_capture(source, fish, tmp_path / "r.zarr", block=block).path)
    groups = [run.site(name) for name in run.site_ids] + [run.tracks]
    stored = sum(array.nbytes for group in groups for array in group.data_vars.values())
    tables = sum(spec.sample_bytes for spec in estimate.arrays if "token_" in spec.name or "query_" in spec.name)
    assert estimate.bytes == stored + 3 * tables
    assert estimate.seconds > 0


# ----------------------------------------------------------------------------------- the command line


def foveate(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture
def model(monkeypatch):
    monkeypatch.setattr("foveate.cli.capture.open_from_options", lambda model, **options: MemorySource())


@pytest.mark.usefixtures("model")
def test_the_command_takes_a_video(tmp_path, fish):
    run = tmp_path / "r.zarr"
    dry = foveate("capture", "memory", fish / "a.mp4", "-o", run, "--dry-run", "--block", 4)
    assert dry.exit_code == 0, dry.output
    assert "frame 7, layer 2" in dry.stdout
    assert not run.exists()
    done = foveate("capture", "memory", fish / "a.mp4", "-o", run, "--block", 4)
    assert done.exit_code == 0, done.output
    assert "1 of 1 samples captured" in done.stdout
    assert json.loads(foveate("validate", run, "--deep", "--json").stdout)["valid"]
    windows = foveate("capture", "memory", fish, "-o", tmp_path / "w.zarr", "--window", 4, "--hop", 2, "--json")
    assert json.loads(windows.stdout)["samples"] == 3 + 4 + 1
    assert foveate("capture", "memory", fish, "-o", run, "--window", 0).exit_code == 2
    assert foveate("capture", "memory", tmp_path / "none.mp4", "-o", run).exit_code == 2


def test_default_batches(tmp_path):
    assert capture_job.BATCH_SIZE == {"image": 8, "clip": 1}


def test_metrics_of_a_run_count_videos_not_windows(tmp_path):
    from foveate.study.measure import measure_run
    from foveate.study.measure_summary import summarise

    rng = np.random.default_rng(0)
    folder = save(
        tmp_path / "in",
        **{
            name: rng.integers(0, 255, numbered(n).shape, np.uint8) for name, n in (("a", 20), ("b", 8), ("c", 12))
        },
    )
    manifest = Manifest.discover(folder, "clip", Sampling(window=4))
    run = Run.open(run_capture(ClipSource(frames=4), manifest, tmp_path / "r.zarr").path)
    videos = [str(name) for name in run.samples["video"].values]
    assert [videos.count(f"{name}.mp4") for name in "abc"] == [5, 2, 3]
    report = measure_run(run, ["max_lift"])
    (line, *_) = summarise(run, report.written)
    values = run.product(report.written[0].product)["max_lift"].isel(layer=-1)
    each = values.mean([dim for dim in values.dims if dim != "sample"]).values
    means = [np.mean([v for v, name in zip(each, videos, strict=True) if name == f"{n}.mp4"]) for n in "abc"]
    assert line.n == 3
    assert line.mean == pytest.approx(np.mean(means), rel=1e-6)
    assert abs(np.mean(means) - each.mean()) > 1e-6


def test_runs_of_clips_are_not_compared_as_images(tmp_path):
    from foveate.study.compare import compare_runs

    run = Run.open(
        run_capture(ClipSource(frames=4), save(tmp_path / "in", swim=numbered(4)), tmp_path / "r.zarr").path
    )
    with pytest.raises(UsageError, match="comparing is defined for runs of images"):
        compare_runs(run, run)
