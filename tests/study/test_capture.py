"""The capture job: what is stored is what the model did, whatever happens on the way."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from foveate.capture.engine import capture_batch
from foveate.data import layout
from foveate.data.labels import same_tokens
from foveate.data.ledger import Ledger
from foveate.data.manifest import Manifest
from foveate.data.run import Run
from foveate.data.validate import validate
from foveate.errors import CaptureError, FoveateError, SampleError, StoreError, UsageError
from foveate.geometry import Geometry
from foveate.interfaces import TOKEN_KINDS, Batch, CallLabels, Readout, Target, TokenAxis
from foveate.study.capture import estimate_capture, run_capture
from foveate.study.plan import build_plan
from foveate.testing.tiny import SITE, STREAM, TinyConfig, TinyCropSource, TinySource, tiny_samples

EVERYTHING = {"rows": "all", "reductions": ("entropy", "received", "head_mean", "topk")}


def save_images(folder: Path, count: int = 9, **size) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i, sample in enumerate(tiny_samples(count, **{"height": 40, "width": 56, **size})):
        Image.fromarray(sample.pixels).save(folder / f"{i:02}.png")
    return folder


@pytest.fixture
def images(tmp_path):
    return save_images(tmp_path / "images")


@pytest.fixture
def small_batches(monkeypatch):
    monkeypatch.setattr(layout, "BATCH_SAMPLES", 2)


def site(path):
    return Run.open(path).site(SITE).load()


def assert_same_run(one, other):
    a, b = Run.open(one), Run.open(other)
    for name in a.site_ids:
        assert a.site(name).load().identical(b.site(name).load())
    assert a.samples.identical(b.samples)
    assert a.predictions.identical(b.predictions)


def test_stored_numbers_are_those_of_the_engine(tmp_path, images):
    source = TinyCropSource()
    plan = build_plan(source, **EVERYTHING)
    report = run_capture(source, images, tmp_path / "run.zarr", plan=plan, batch_size=4)
    assert report.complete
    assert report.certificate["passed"]
    stored = site(tmp_path / "run.zarr")
    manifest = Manifest.discover(images)
    batch = source.encode([manifest.load(i) for i in range(9)])
    expected = capture_batch(source, batch, plan)
    for name, array in expected.sites[SITE].arrays.items():
        tolerance = 6e-4 if stored[name].dtype == np.float16 else 1e-5
        np.testing.assert_allclose(stored[name].values.astype(np.float32), array, atol=tolerance)
    assert stored["attention"].dims == ("sample", "layer", "head", "query", "key")
    assert stored["entropy"].dims == ("sample", "layer", "head", "token")
    assert stored["head_mean"].dims == ("sample", "layer", "token", "key")
    assert (stored["attention"].dtype, stored["entropy"].dtype) == (np.float16, np.float32)
    run = Run.open(tmp_path / "run.zarr")
    for i, answers in enumerate(source.predictions(expected.outputs, batch)):
        assert run.predictions["label"].values[i, :3].tolist() == [p.label for p in answers]
        np.testing.assert_allclose(run.predictions["score"].values[i, :3], [p.score for p in answers], rtol=1e-5)
        assert run.geometry(i) == batch.geometry[i]
    assert run.grid == source.cells(batch)
    assert validate(run.path, deep=True) == []


def test_batch_size_does_not_change_results(tmp_path, images):
    source = TinyCropSource()
    plan = build_plan(source, **EVERYTHING, dtype="float32")
    for size in (1, 4, 16):
        run_capture(source, images, tmp_path / f"{size}.zarr", plan=plan, batch_size=size)
    one = site(tmp_path / "1.zarr")
    for size in (4, 16):
        other = site(tmp_path / f"{size}.zarr")
        for name in ("attention", "entropy", "received", "head_mean", "topk_value"):
            np.testing.assert_allclose(other[name], one[name], atol=2e-6, rtol=2e-5)


def test_heads_mean_and_chosen_rows_and_layers(tmp_path, images):
    source = TinyCropSource()
    full = site(run_capture(source, images, tmp_path / "f.zarr", plan=build_plan(source, **EVERYTHING)).path)
    plan = build_plan(source, heads="mean", rows="3,0", layers="-1", reductions=())
    part = site(run_capture(source, images, tmp_path / "p.zarr", plan=plan).path)
    assert part["attention"].shape == (9, 1, 1, 2, 17)
    assert (part["layer"].values.tolist(), part["head"].values.tolist()) == ([1], [-1])
    assert part["query_index"].values.tolist() == [3, 0]
    expected = full["attention"].sel(layer=[1]).isel(query=[3, 0]).astype("f8").mean("head", keepdims=True)
    np.testing.assert_allclose(part["attention"], expected.values, atol=6e-4)
    np.testing.assert_array_equal(part["query_y"], full["query_y"].isel(query=[3, 0]))


def test_plan_without_rows_keeps_reductions(tmp_path, images):
    source = TinyCropSource()
    path = run_capture(source, images, tmp_path / "r.zarr", plan=build_plan(source, rows="none")).path
    stored = site(path)
    assert set(stored.data_vars) == {"entropy", "received"}
    assert validate(path) == []


# ------------------------------------------------------------------------------ manifest and answers


def test_table_columns_label_and_mask(tmp_path, images):
    Image.fromarray(np.eye(40, 56, dtype=np.uint8)).save(tmp_path / "m.png")
    source = TinyCropSource()
    manifest = Manifest.discover(images)
    answers = source.predictions(
        source.forward(batch := source.encode([manifest.load(i) for i in range(3)])), batch
    )
    best = [row[0] for row in answers]
    lines = [
        f"images/00.png,NA,1.5,{best[0].label.upper()},m.png",
        f"images/01.png,FR,,{best[1].class_index},",
        f"images/02.png,,2.5,{answers[2][1].label},",
        "images/03.png,DE,0,,",
    ]
    (tmp_path / "t.csv").write_text("path,country,latitude,label,mask\n" + "\n".join(lines))
    run = Run.open(run_capture(source, tmp_path / "t.csv", tmp_path / "r.zarr").path)
    assert run.samples["country"].values.tolist() == ["NA", "FR", "", "DE"]
    np.testing.assert_array_equal(run.samples["latitude"], [1.5, np.nan, 2.5, 0])
    assert run.predictions["correct"].values.tolist() == [1, 1, 0, -1]
    np.testing.assert_allclose(run.predictions["confidence"][:3], [p.score for p in best], rtol=1e-5)
    assert run.load_sample(0).mask.sum() == 40
    assert run.load_sample(0).columns["country"] == "NA"
    assert run.load_sample(1).mask is None


def test_target_is_stored_where_it_is_asked_for(tmp_path, images):
    source = TinyCropSource()
    report = run_capture(source, images, tmp_path / "r.zarr", target=Target("class", "blue", scale="logit"))
    run = Run.open(report.path)
    manifest = Manifest.discover(images)
    batch = source.encode([manifest.load(i) for i in range(9)])
    np.testing.assert_allclose(run.predictions["target_score"], source.forward(batch)[:, 2], rtol=1e-4, atol=1e-5)
    assert set(run.predictions["target_label"].values) == {"blue"}


# ---------------------------------------------------------------------------------------- bad samples


def test_bad_samples_are_recorded_and_the_run_goes_on(tmp_path, images):
    (images / "empty.png").write_bytes(b"")
    (images / "letter.jpg").write_text("dear")
    (images / "notes.txt").write_text("x")
    Image.new("RGB", (1, 1)).save(images / "ü one pixel.png")
    report = run_capture(TinySource(), images, tmp_path / "r.zarr", batch_size=4)
    assert (report.samples, report.captured) == (12, 10)
    assert sorted(report.failed) == ["empty.png", "letter.jpg"]
    run = Run.open(report.path)
    table = run.samples
    assert table["status"].values.tolist() == [1] * 9 + [2, 2, 1]
    assert "empty" in str(table["failure"].sel(sample="empty.png").values)
    assert np.isnan(run.site(SITE)["attention"].sel(sample="letter.jpg")).all()
    assert run.ok.tolist() == [*range(9), 11]
    assert run.attrs["ignored_files"] == {".txt": 1}
    assert validate(report.path) == []
    with pytest.raises(SampleError, match="empty"):
        run.geometry(9)


class Picky(TinyCropSource):
    """Fails on a whole batch as soon as it holds a white image."""

    def forward(self, batch, *, grad=False):
        if (batch.inputs.mean((1, 2, 3)) > 0.99).any():
            raise RuntimeError("out of memory")
        return super().forward(batch, grad=grad)


def test_a_failing_batch_is_done_again_one_by_one(tmp_path, images):
    Image.new("RGB", (64, 48), "white").save(images / "03.png")
    report = run_capture(Picky(), images, tmp_path / "r.zarr", batch_size=8)
    assert report.failed == {"03.png": "RuntimeError: out of memory"}
    reference = run_capture(TinyCropSource(), images, tmp_path / "ref.zarr", batch_size=8)
    ok = Run.open(report.path).ok
    mine, theirs = site(report.path).isel(sample=ok), site(reference.path).isel(sample=ok)
    np.testing.assert_allclose(mine["attention"], theirs["attention"], atol=1e-3)


def test_first_batches_may_all_fail(tmp_path, images):
    for i in range(4):
        (images / f"{i:02}.png").write_bytes(b"")
    report = run_capture(TinyCropSource(), images, tmp_path / "r.zarr", batch_size=2)
    assert (report.captured, len(report.failed)) == (5, 4)


def test_nothing_usable_is_an_error_that_lists_reasons_and_writes_nothing(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(b"")
    with pytest.raises(SampleError, match=r"none of 1 samples(.|\n)*a\.png: .*empty"):
        run_capture(TinySource(), tmp_path / "in", tmp_path / "r.zarr")
    assert not (tmp_path / "r.zarr").exists()


class Mute(TinyCropSource):
    """Has no answer for one sample."""

    def predictions(self, outputs, batch):
        answers = super().predictions(outputs, batch)
        if "02.png" in batch.ids:
            raise ValueError("cannot decode the answer")
        return answers


def test_a_sample_whose_answer_fails_is_isolated(tmp_path, images):
    report = run_capture(Mute(), images, tmp_path / "r.zarr", batch_size=4)
    assert report.failed == {"02.png": "ValueError: cannot decode the answer"}


class Overflowing(TinyCropSource):
    """White images become NaN, as in float16."""

    def encode(self, samples):
        batch = super().encode(samples)
        white = batch.inputs.mean((1, 2, 3)) > 0.99
        batch.inputs[white] = float("nan")
        return batch


def test_a_sample_without_finite_attention_fails_alone(tmp_path, images):
    Image.new("RGB", (64, 48), "white").save(images / "03.png")
    report = run_capture(Overflowing(), images, tmp_path / "r.zarr", batch_size=4)
    assert list(report.failed) == ["03.png"]
    assert validate(report.path) == []


class Dying(TinyCropSource):
    """Its device is lost after the first two batches."""

    left = 2

    def forward(self, batch, *, grad=False):
        if self.left <= 0:
            raise RuntimeError("device lost")
        self.left -= 1
        return super().forward(batch, grad=grad)


@pytest.mark.usefixtures("small_batches")
def test_a_row_of_unexplained_failures_ends_the_run_and_it_resumes(tmp_path):
    images = save_images(tmp_path / "images", 16)
    with pytest.raises(RuntimeError, match="device lost"):
        run_capture(Dying(), images, tmp_path / "r.zarr", batch_size=2)
    run = Run.open(tmp_path / "r.zarr")
    assert run.ok.tolist() == [0, 1, 2, 3]
    config = build_plan(TinyCropSource())
    source = TinyCropSource()
    source.card = Dying().card
    report = run_capture(source, images, tmp_path / "r.zarr", plan=config, batch_size=2, retry_failed=True)
    assert report.complete
    assert validate(report.path, deep=True) == []


class Broken(TinyCropSource):
    """Declares a layer that never runs: that is the plugin's fault, not a sample's."""

    @property
    def sites(self):
        (only,) = super().sites
        return (replace(only, modules={**only.modules, "blocks.1.mlp": 2}),)


@pytest.mark.parametrize("count", [1, 9])
def test_an_error_of_the_plugin_ends_the_run(tmp_path, count):
    images = save_images(tmp_path / "images", count)
    with pytest.raises(CaptureError):
        run_capture(Broken(), images, tmp_path / "r.zarr")
    assert not (tmp_path / "r.zarr").exists()


# -------------------------------------------------------------------------------------------- resume


def test_the_same_call_again_finds_all_done(tmp_path, images):
    source = TinyCropSource()
    run_capture(source, images, tmp_path / "r.zarr")
    seen = []
    again = run_capture(source, images, tmp_path / "r.zarr", progress=seen.append)
    assert (again.captured, again.resumed, seen) == (9, 9, [9])


def test_another_configuration_is_refused_and_nothing_is_lost(tmp_path, images):
    source = TinyCropSource()
    run_capture(source, images, tmp_path / "r.zarr")
    before = site(tmp_path / "r.zarr")
    others = [
        {"plan": build_plan(source, layers="-1")},
        {"target": Target("class")},
        {"options": {"prompts": ["a"]}},
    ]
    for other in others:
        with pytest.raises(StoreError, match="another configuration") as caught:
            run_capture(source, images, tmp_path / "r.zarr", **other)
        assert next(iter(other)) in str(caught.value)
    with pytest.raises(StoreError, match="weights"):
        run_capture(TinyCropSource(seed=1), images, tmp_path / "r.zarr")
    (images / "00.png").rename(images / "zz.png")
    with pytest.raises(StoreError, match="manifest"):
        run_capture(source, images, tmp_path / "r.zarr")
    assert site(tmp_path / "r.zarr").identical(before)


def test_prompts_count_by_content_and_device_not_at_all(tmp_path, images):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\n")
    source = TinyCropSource()
    run_capture(source, images, tmp_path / "r.zarr", options={"prompts": str(prompts), "device": "cpu"})
    moved = prompts.rename(tmp_path / "other.txt")
    run_capture(source, images, tmp_path / "r.zarr", options={"prompts": str(moved), "device": "cuda"})
    moved.write_text("a dog\n")
    with pytest.raises(StoreError, match=r"options\.prompts"):
        run_capture(source, images, tmp_path / "r.zarr", options={"prompts": str(moved)})


@pytest.mark.usefixtures("small_batches")
def test_interrupt_leaves_a_valid_store_that_resumes_to_the_same_bits(tmp_path, images):
    source = TinyCropSource()
    run_capture(source, images, tmp_path / "whole.zarr", batch_size=2)

    def stop_at_five(count, done=[0]):  # noqa: B006  (counts over calls)
        done[0] += count
        if done[0] == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_capture(source, images, tmp_path / "cut.zarr", batch_size=2, progress=stop_at_five)
    assert Run.open(tmp_path / "cut.zarr").ok.tolist() == [0, 1, 2, 3]
    (note,) = validate(tmp_path / "cut.zarr", deep=True)
    assert note.level == "note"
    report = run_capture(source, images, tmp_path / "cut.zarr", batch_size=2)
    assert (report.resumed, report.captured) == (4, 9)
    assert_same_run(tmp_path / "whole.zarr", tmp_path / "cut.zarr")
    assert Run.open(tmp_path / "cut.zarr").attrs["complete"]


SLOW = """
import sys, time, torch
torch.set_num_threads(1)
from foveate.data import layout
from foveate.study.capture import run_capture
from foveate.testing.tiny import TinyCropSource
layout.BATCH_SAMPLES = 2
run_capture(TinyCropSource(), sys.argv[1], sys.argv[2], batch_size=2, progress=lambda count: time.sleep(0.05))
"""


@pytest.mark.usefixtures("small_batches")
def test_kill_9_then_resume_equals_uninterrupted(tmp_path):
    images = save_images(tmp_path / "images", 24)
    cut = tmp_path / "cut.zarr"
    for wanted in (2, 6):
        job = subprocess.Popen([sys.executable, "-c", SLOW, str(images), str(cut)])
        deadline = time.monotonic() + 60
        while len(Ledger(cut).entries()) < wanted:
            assert job.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.kill(job.pid, signal.SIGKILL)
        job.wait()
    kept = len(Ledger(cut).entries())
    assert 6 <= kept < 12
    report = run_capture(TinyCropSource(), images, cut, batch_size=2)
    assert report.resumed == 2 * kept
    run_capture(TinyCropSource(), images, tmp_path / "whole.zarr", batch_size=2)
    assert_same_run(tmp_path / "whole.zarr", cut)
    assert validate(cut, deep=True) == []


# ---------------------------------------------------------------------------------------------- cost


def test_estimate_writes_nothing_and_equals_what_is_allocated(tmp_path, images):
    source = TinyCropSource()
    plan = build_plan(source, **EVERYTHING)
    estimate = estimate_capture(source, images, tmp_path / "r.zarr", plan=plan)
    assert not (tmp_path / "r.zarr").exists()
    stored = site(run_capture(source, images, tmp_path / "r.zarr", plan=plan).path)
    assert estimate.bytes == sum(stored[name].nbytes for name in stored.data_vars)
    assert estimate.seconds == pytest.approx(9 * estimate.seconds_per_sample)
    assert estimate.fits


def test_plan_that_exceeds_the_disk_is_refused_before_anything_is_written(tmp_path, images, monkeypatch):
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("foveate.study.estimate.shutil.disk_usage", lambda place: usage(0, 0, 20_000))
    source = TinyCropSource()
    with pytest.raises(StoreError, match="nothing was written") as caught:
        run_capture(source, images, tmp_path / "r.zarr", plan=build_plan(source, rows="all", reductions=()))
    # 2 layers x 3 heads x 17 x 17 x 2 bytes = 3468 bytes a sample
    assert "31.2 kB" in caught.value.message
    assert "5 samples of this plan would fit" in caught.value.remedy
    assert "--layers -1" in caught.value.remedy
    assert "--rows readout" in caught.value.remedy
    assert not (tmp_path / "r.zarr").exists()


def test_unknown_rows_and_target_are_the_callers_error(tmp_path, images):
    source = TinyCropSource()
    with pytest.raises(UsageError):
        run_capture(source, images, tmp_path / "r.zarr", plan=build_plan(source, rows=[99]))
    with pytest.raises(FoveateError):
        run_capture(source, images, tmp_path / "r.zarr", target=Target("speed"))
    assert not (tmp_path / "r.zarr").exists()


def test_bfloat16_model_is_captured(tmp_path, images):
    source = TinyCropSource.open(dtype="bfloat16")
    assert next(source.module.parameters()).dtype is torch.bfloat16
    report = run_capture(source, images, tmp_path / "r.zarr")
    assert report.complete
    assert validate(report.path) == []


def test_config_of_the_model_is_recorded(tmp_path, images):
    source = TinySource(TinyConfig(layers=3))
    run = Run.open(run_capture(source, images, tmp_path / "r.zarr", reference="tiny", options={"layers": 3}).path)
    assert run.attrs["facts"]["layers"] == 3
    assert run.attrs["open_options"] == {"layers": 3}
    assert run.attrs["reference"] == "tiny"
    assert run.site(SITE).attrs["rows"] == "cls"


# -------------------------------------------------------------------------------------------- ragged


class RaggedModule(torch.nn.Module):
    """A tiny ViT that takes inputs of any width: no positions."""

    def __init__(self, config):
        super().__init__()
        self.inner = TinySource(config).module

    def forward(self, pixels):
        inner = self.inner
        patches = inner.embed(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([inner.cls.expand(len(pixels), -1, -1), patches], 1)
        for block in inner.blocks:
            x = block(x)
        return inner.head(inner.norm(x)[:, 0])


class RaggedSource(TinySource):
    """Keeps the image's width (in patches), so that samples have different numbers of tokens."""

    capacity = 25
    word = ""

    def __init__(self):
        super().__init__()
        self._module = RaggedModule(self.config)

    @property
    def sites(self):
        (only,) = super().sites
        return (replace(only, modules={f"inner.{path}": layer for path, layer in only.modules.items()}),)

    def bounds(self, header):
        assert header["samples"] == 4
        return {STREAM: self.capacity}

    def encode(self, samples):
        (sample,) = samples
        height, width = sample.pixels.shape[:2]
        inputs = torch.from_numpy(sample.pixels.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
        return Batch(inputs, (Geometry.identity(height, width),), (sample.id,))

    def label(self, call, batch, outputs):
        height, width = batch.inputs.shape[-2:]
        patches = TokenAxis.patches(height // 8, width // 8, height=height, width=width)
        axis = TokenAxis.concat(TokenAxis.of_kind("cls", 1, label=(self.word or batch.ids[0],)), patches)
        return CallLabels((("sample", 1),), axis, axis)

    def readout(self, batch, outputs, bound=None):
        tokens = 1 + batch.inputs.shape[-2] * batch.inputs.shape[-1] // 64
        weights = torch.zeros(1, tokens)
        weights[:, 0] = 1
        return {SITE: Readout(weights, "cls")}


def test_ragged_tokens_are_padded_to_their_capacity_and_labelled_by_sample(tmp_path):
    for i, width in enumerate((32, 48, 40, 32)):
        save_images(tmp_path / "images" / str(i), 1, height=32, width=width)
    source = RaggedSource()
    plan = build_plan(source, **EVERYTHING)
    report = run_capture(source, tmp_path / "images", tmp_path / "r.zarr", plan=plan, batch_size=1)
    assert report.failed == {}
    stored = site(report.path)
    assert stored["attention"].shape == (4, 2, 3, 25, 25)
    assert stored["key_y"].dims == ("sample", "key")
    manifest = Manifest.discover(tmp_path / "images")
    for i, count in enumerate((17, 25, 21, 17)):
        captured = capture_batch(source, source.encode([manifest.load(i)]), plan).sites[SITE]
        attention = stored["attention"].values[i]
        np.testing.assert_allclose(attention[..., :count, :count], captured.arrays["attention"][0], atol=6e-4)
        assert (attention[..., count:, :] == 0).all()
        assert (attention[..., count:] == 0).all()
        assert (stored["topk_index"].values[i, ..., count:, :] == -1).all()
        tokens = Run.open(report.path).tokens(SITE, "key", sample=i)
        assert same_tokens(tokens.take(range(count)), captured.key)
        assert (tokens.kind[count:] == TOKEN_KINDS.index("padding")).all()
    assert validate(report.path, deep=True) == []


def test_overflow_of_a_ragged_axis_fails_that_sample_and_says_what_it_needs(tmp_path):
    for i, width in enumerate((32, 48, 40, 32)):
        save_images(tmp_path / "images" / str(i), 1, height=32, width=width)
    source = RaggedSource()
    source.capacity = 21
    report = run_capture(source, tmp_path / "images", tmp_path / "r.zarr", batch_size=1)
    assert list(report.failed) == ["1/00.png"]
    assert "25 do not fit a capacity of 21" in report.failed["1/00.png"]
    assert "at least 25" in report.failed["1/00.png"]


def test_tokens_that_change_without_being_declared_ragged_fail_their_sample(tmp_path):
    for i, width in enumerate((32, 48, 32, 32)):
        save_images(tmp_path / "images" / str(i), 1, height=32, width=width)
    source = RaggedSource()
    source.bounds = lambda header: {}
    source.word = "cls"
    report = run_capture(source, tmp_path / "images", tmp_path / "r.zarr", batch_size=1)
    assert list(report.failed) == ["1/00.png"]
    assert "not those of the run" in report.failed["1/00.png"]
