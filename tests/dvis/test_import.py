"""A recording becomes a run: valid, with the sites, names, labels and numbers of the model that runs here."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import recording_fakes as fakes
from daq_models import GOLDEN, golden_meta, golden_tensors, needs_golden
from foveate.capture.engine import capture_batch
from foveate.capture.intervening import intervene
from foveate.capture.interventions import Knockout
from foveate.capture.trace import trace
from foveate.cli import main
from foveate.data.run import Run
from foveate.data.validate import validate
from foveate.errors import ModelError, SampleError, UsageError
from foveate.interfaces import CapturePlan, Sample, SitePlan, Target
from foveate.plugins.opening import open_source
from foveate.study.importing import import_recording

CASES = ("offline", "online")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def recording(tmp_path_factory):
    """A recording of the fake tracker, and the model that made it."""
    folder = tmp_path_factory.mktemp("recording")
    model = fakes.sharpened(fakes.Model())
    with torch.no_grad(), fakes.exporter(folder).record(model, folder / "clip.npz"):
        model([{"image": list(fakes.clip())}])
    return folder / "clip.npz", model


@pytest.fixture(scope="module")
def run(recording, tmp_path_factory):
    """The run of that recording."""
    return run_of(recording[0], tmp_path_factory.mktemp("run") / "x.zarr", top=4)


def run_of(path: Path, out: Path, **options):
    report = import_recording(path, out, dtype="float32", **options)
    assert report.complete
    assert not report.failed
    assert [p for p in validate(out, deep=True) if p.level == "error"] == []
    return Run.open(out)


# ------------------------------------------------------------------------------- a recorded tracker


def test_rows_lie_where_their_tracks_are(recording, run):
    path, model = recording
    site = run.site("tracker.cross")
    arrays = np.load(path)
    told = model.tracker.told
    born = [seq for frame in told for _, seq in frame["births"]]
    assert list(run.tokens("tracker.cross", "query", sample=0).label)[fakes.QUERIES :][: len(born)] == [
        str(i) for i in range(len(born))
    ]
    for frame, expected in enumerate(told):
        recorded = arrays[
            f"attention/tracker.transformer_cross_attention_layers.1.multihead_attn::{frame}::weights"
        ][0]
        stored = site.attention.isel(sample=0, frame=frame).sel(layer=1).values
        carried = [fakes.QUERIES + born.index(seq) for seq in expected["carried"]]
        rows = [*carried, *range(fakes.QUERIES)]
        assert np.abs(stored[:, rows] - recorded).max() < 1e-6
        absent = sorted(set(range(stored.shape[1])) - set(rows))
        assert not stored[:, absent].any()


def test_masks_are_what_may_be_read(recording, run):
    path, _ = recording
    site = run.site("segmenter.cross.p2")
    arrays = np.load(path)
    name = "attention/sem_seg_head.predictor.transformer_cross_attention_layers.2.multihead_attn::{}::blocked"
    blocked = np.concatenate([arrays[name.format(i)] for i in range(2)])[:, 0]
    assert blocked.any()
    assert np.array_equal(site.allowed.values[0, :, 0], ~blocked)


def test_answers_have_tracks_and_names(recording, run):
    path, model = recording
    logits = torch.from_numpy(np.load(path)["final/logits"])
    best = logits.softmax(-1)[:, :-1].flatten().sort(descending=True, stable=True)
    labels = [model.metadata.thing_classes[int(i) % fakes.CLASSES] for i in best.indices[:4]]
    assert run.predictions.label.values[0].tolist() == labels
    assert np.allclose(run.predictions.score.values[0], best.values[:4].numpy(), atol=1e-6)


def test_pictures_are_written_and_found_again(recording, run):
    assert np.array_equal(run.load_sample(0).pixels, fakes.clip().permute(0, 2, 3, 1).numpy())
    again = run.open_source()
    assert again.card.revision == run.attrs["model"]["revision"]
    batch = again.encode([run.load_sample(0)])
    traced = trace(again, batch)
    assert traced.certificate.passed
    assert [step.name for step in traced.flow] == ["sites that were not recorded: pixel_decoder.self"]


def test_the_same_call_continues(recording, run):
    again = import_recording(recording[0], run.path, dtype="float32", top=4)
    assert again.resumed == 1


def test_what_needs_the_model_is_refused(recording):
    path, _ = recording
    source = open_source(path, source="recording")
    batch = source.encode([Sample("x", source.recordings[0].frames)])
    with pytest.raises(UsageError, match="no gradients"):
        source.forward(batch, grad=True)
    changed = batch.replace(batch.inputs * 0.5, [0])
    with pytest.raises(UsageError, match="changed"):
        source.forward(changed)
    knockout = Knockout("tracker.cross", key="object")
    with pytest.raises(UsageError, match="attention that was changed"), intervene(source, [knockout], on=batch):
        source.forward(batch)
    outputs = source.forward(batch)
    bound = source.bind(outputs, batch, Target())
    assert torch.isfinite(source.score(outputs, batch, bound)).all()


def test_other_pictures_are_refused(recording):
    path, _ = recording
    source = open_source(path, source="recording")
    frames = source.recordings[0].frames
    for pixels, word in (
        (frames[:-1], "frames"),
        (frames[:, :-1], "height x width"),
        (255 - frames, "grey levels"),
    ):
        with pytest.raises(SampleError, match=word):
            source.encode([Sample("x", pixels)])
    with pytest.raises(SampleError, match="one by one"):
        source.encode([Sample("x", frames), Sample("y", frames)])


def test_the_users_own_clip_before_the_resize(tmp_path):
    """Masks, geometry and maps are then of the original size."""
    from PIL import Image

    original = np.repeat(np.repeat(fakes.clip(3).permute(0, 2, 3, 1).numpy(), 2, 1), 2, 2)
    size = (fakes.COLUMNS, fakes.HEIGHT)
    small = np.stack(
        [np.asarray(Image.fromarray(one).resize(size, Image.Resampling.BILINEAR)) for one in original]
    )
    model = fakes.sharpened(fakes.Model())
    frames = list(torch.from_numpy(small).permute(0, 3, 1, 2))
    with torch.no_grad(), fakes.exporter(tmp_path).record(model, tmp_path / "clip.npz"):
        model([{"image": frames, "height": original.shape[1], "width": original.shape[2]}])
    folder = tmp_path / "mine"
    folder.mkdir()
    for i, one in enumerate(original):
        Image.fromarray(one).save(folder / f"{i}.png")
    run = run_of(tmp_path / "clip.npz", tmp_path / "x.zarr", frames=folder)
    assert (run.geometry(0).original_height, run.geometry(0).scale_y) == (2 * fakes.HEIGHT, 0.5)


def test_several_clips_are_one_run(tmp_path):
    """Each is played by itself; the axes have room for the most tracks."""
    model = fakes.sharpened(fakes.Model())
    export = fakes.exporter(tmp_path)
    paths = []
    for number, frames in enumerate((4, 7)):
        model.tracker.video_ins_hub, model.tracker.last_seq_ids = {}, None
        paths.append(tmp_path / f"clip{number}.npz")
        with torch.no_grad(), export.record(model, paths[-1]):
            model([{"image": list(fakes.clip(frames, seed=number))}])
    run = run_of(paths, tmp_path / "x.zarr", top=3)
    single = run_of(paths[1], tmp_path / "y.zarr", top=3)
    assert len(run) == 2
    site, alone = (r.site("tracker.cross").attention.values for r in (run, single))
    tracks = min(site.shape[-2], alone.shape[-2])
    assert np.array_equal(site[1][..., :tracks, :], alone[0][..., :tracks, :])
    assert np.isnan(site[0, 4:]).all()
    assert run.predictions.label.values[1].tolist() == single.predictions.label.values[0].tolist()
    again = run.open_source()
    assert np.array_equal(run.load_sample(0).pixels, again.recordings[0].frames)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda meta, arrays: meta.update(weights_sha256="x"), "weights_sha256"),
        (lambda meta, arrays: meta["daq"]["config"].update(max_num=3), "thresholds"),
    ],
)
def test_recordings_of_different_models_do_not_mix(recording, tmp_path, change, word):
    other = changed(recording[0], tmp_path / "other.npz", change)
    with pytest.raises(UsageError, match=word):
        open_source(recording[0], source="recording", more=[str(other)])
    with pytest.raises(UsageError, match="same name"):
        open_source(recording[0], source="recording", more=[str(recording[0])])


def test_on_the_command_line(recording, tmp_path):
    path, _ = recording
    runner = CliRunner()
    done = runner.invoke(
        main, ["import", str(path), "-o", str(tmp_path / "x.zarr"), "--json", "--sites", "tracker.self"]
    )
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["captured"] == 1
    assert runner.invoke(main, ["validate", str(tmp_path / "x.zarr")]).exit_code == 0
    missing = runner.invoke(main, ["import", str(tmp_path / "no.npz"), "-o", str(tmp_path / "y.zarr")])
    assert missing.exit_code == 3
    assert "no such file" in missing.stderr


# ------------------------------------------------------------------------------- files that are none


def changed(path: Path, out: Path, change) -> Path:
    """The recording with its facts changed."""
    arrays = dict(np.load(path))
    meta = json.loads(bytes(arrays["meta"]))
    change(meta, arrays)
    arrays["meta"] = np.frombuffer(json.dumps(meta).encode(), np.uint8)
    np.savez(out, **arrays)
    return out


def test_damaged_and_foreign_files(recording, tmp_path):
    path, _ = recording
    cases = {
        "cut off": path.read_bytes()[:5000],
        "text": b"hello",
        "empty": b"",
    }
    for name, content in cases.items():
        broken = tmp_path / f"{name}.npz"
        broken.write_bytes(content)
        with pytest.raises(ModelError, match="not a readable recording"):
            open_source(broken, source="recording")
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    with pytest.raises(ModelError, match="not a readable recording"):
        open_source(tmp_path / "other.npz", source="recording")


def test_pickles_are_refused(tmp_path):
    np.savez(tmp_path / "x.npz", meta=np.array([{"format": "foveate-recording"}], dtype=object))
    with pytest.raises(ModelError, match="not a readable recording"):
        open_source(tmp_path / "x.npz", source="recording")


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda meta, arrays: meta.update(version=99), "version 99"),
        (lambda meta, arrays: meta.update(format="x"), "expected format"),
        (lambda meta, arrays: meta.update(forwards=2), "2 forwards"),
        (lambda meta, arrays: meta["calls"][3].update(error=0.2), "from the module's own output"),
        (lambda meta, arrays: meta["calls"][3].update(error=float("nan")), "from the module's own output"),
        (lambda meta, arrays: arrays.pop("frames"), "no pictures"),
        (lambda meta, arrays: meta["calls"].append({**meta["calls"][0], "call": 77}), "incomplete"),
    ],
)
def test_recordings_that_cannot_be_trusted(recording, tmp_path, change, word):
    with pytest.raises(ModelError, match=word):
        open_source(changed(recording[0], tmp_path / "x.npz", change), source="recording")


# ------------------------------------------------------------------------------- any other model


def test_unknown_modules_are_sites_under_their_own_path(tmp_path):
    class Blocks(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = torch.nn.ModuleList(fakes.Attention() for _ in range(3))
            self.cross = torch.nn.MultiheadAttention(fakes.WIDTH, fakes.HEADS)

        def forward(self, x, queries):
            for block in self.backbone:
                x = x + block(x)
            return self.cross(queries, x.transpose(0, 1), x.transpose(0, 1))[0]

    model = fakes.sharpened(Blocks())
    picture = np.random.default_rng(0).integers(0, 256, (1, 16, 24, 3), np.uint8)
    with torch.no_grad(), fakes.exporter(tmp_path).record(model, tmp_path / "x.npz", frames=picture):
        model(torch.randn(1, 6, fakes.WIDTH), torch.randn(4, 1, fakes.WIDTH))
    run = run_of(
        changed(tmp_path / "x.npz", tmp_path / "y.npz", lambda m, a: m.update(media="image")), tmp_path / "r"
    )
    assert run.site_ids == ("backbone", "cross")
    for layer, block in enumerate(model.backbone):
        seen = block.seen.numpy().reshape(fakes.HEADS, 6, 6)
        assert np.abs(run.site("backbone").attention.values[0, layer] - seen).max() < 1e-6
    key = run.tokens("backbone", "key")
    assert key.height.tolist() == [8.0] * 6, "six tokens tile 16 x 24 pixels in squares of 8"
    assert np.isnan(run.tokens("cross", "query").y).all()


# ------------------------------------------------------------------------------- against the model that runs here


def golden_recording(case: str, out: Path) -> Path:
    """The recorded case of the original in the exporter's format."""
    told, config = golden_meta(case), json.loads((GOLDEN / case / "config.json").read_text())
    order = {track["seq_id"]: i for i, track in enumerate(told["tracks"])}
    arrays, calls = {}, []
    names = {"sampling_locations": "locations", "spatial_shapes": "shapes", "attn_mask": "blocked"}
    forms = {"slot_attn": "slot", "activation_proj": "pool"}
    for key, value in golden_tensors(f"{case}/attention").items():
        path, number, field = key.split("::")
        if field == "attn_mask":
            value = value.unflatten(0, (-1, config["nheads"]))
        arrays[f"attention/{path}::{number}::{names.get(field, field)}"] = value.numpy()
    for key in arrays:
        if key.endswith("::weights"):
            path, number, _ = key.removeprefix("attention/").split("::")
            form = forms.get(path.rpartition(".")[2], "deformable" if "encoder" in path else "dense")
            calls.append({"path": path, "call": int(number), "form": form, "class": "", "error": None})
    calls.sort(key=lambda call: call["call"])
    outputs = golden_tensors(f"{case}/outputs")
    arrays["frames"] = golden_tensors("clip")["clip"].permute(0, 2, 3, 1).numpy()
    arrays["final/logits"], arrays["final/masks"] = (
        outputs["pred_logits"][0].numpy(),
        outputs["pred_masks"][0].numpy(),
    )
    instances = [order[int(i)] for i in outputs["pred_ids"].flatten()]
    if case == "offline":
        arrays["online/logits"] = outputs["online_pred_logits"][0].numpy()
        arrays["online/masks"] = outputs["online_pred_masks"][0].numpy()
        arrays["refiner/embeds"] = outputs["refiner_out_pred_embds"][0].permute(2, 1, 0).numpy()
        arrays["refiner/padding"] = outputs["refiner_in_padding_mask"][0].numpy()
    count, queries = config["num_classes"] + 1, config["num_queries"]
    arrays["segmenter/logits::0"] = np.zeros((7, queries, count), np.float32)
    arrays["segmenter/embeds::0"] = np.zeros((7, queries, config["hidden_dim"]), np.float32)
    frames = []
    for t, frame in enumerate(told["frames"]):
        ids = [order[i] for i in frame["row_seq_ids"] if i is not None]
        rows = frame["track_rows"] + frame["new_rows"]
        born = [[row, order[i]] for row, i in frame["born"]]
        after = {track for track in range(len(order)) if alive(told["tracks"][track], t)}
        deaths = [track for track in ids if track not in after]
        frames.append({"ids": ids, "rows": rows, "births": born, "deaths": deaths, "valid": [True] * rows})
        arrays[f"tracker/logits::{t}"] = np.zeros((rows, count), np.float32)
        arrays[f"tracker/slot_scores::{t}"] = np.zeros(len(ids), np.float32)
    daq = {
        "tracks": [
            {**{k: t[k] for k in ("start", "appearance", "dead")}, "id": i} for i, t in enumerate(told["tracks"])
        ],
        "frames": frames,
        "instances": instances,
        "answered": True,
        "chains": {},
        "config": {k: v for k, v in config.items() if k != "backbone"},
    }
    meta = {
        "format": "foveate-recording", "version": 1, "calls": calls, "forwards": 1, "media": "clip", "daq": daq,
        "geometry": {"original": [64, 96], "image": [64, 96]}, "input": [64, 96], "labels": [], "silent": [],
        "model": "DVIS-DAQ", "versions": {}, "weights_sha256": "",
    }  # fmt: skip
    arrays["meta"] = np.frombuffer(json.dumps(meta).encode(), np.uint8)
    np.savez(out, **arrays)
    return out


def alive(track, t):
    return track["start"] <= t < track["start"] + len(track["appearance"])


@needs_golden
@pytest.mark.parametrize("case", CASES)
def test_imported_equals_native(case, tmp_path):
    """Sites, labels, allowed keys, readouts, answers: equal; attention within 2e-5."""
    recorded = open_source(golden_recording(case, tmp_path / "x.npz"), source="recording")
    native = open_source(
        "dvis-daq", weights=GOLDEN / "state_dict.safetensors", config=GOLDEN / case / "config.json", mode=case,
        upstream_exact=True, shortest_edge=0,
    )  # fmt: skip
    assert recorded.sites == native.sites
    plan = CapturePlan(tuple(SitePlan(site.id, rows="all") for site in native.sites), dtype="float32")
    batches = [source.encode([Sample("x", recorded.recordings[0].frames)]) for source in (recorded, native)]
    mine, theirs = (capture_batch(s, b, plan) for s, b in zip((recorded, native), batches, strict=True))
    assert list(mine.sites) == list(theirs.sites)
    for name, expected in theirs.sites.items():
        found = mine.sites[name]
        for axis in ("query", "token", "key"):
            same_tokens(getattr(found, axis), getattr(expected, axis))
        assert set(found.arrays) == set(expected.arrays)
        assert np.abs(found.arrays["attention"] - expected.arrays["attention"]).max() < 2e-5, name
        if "allowed" in expected.arrays:
            assert np.array_equal(found.arrays["allowed"], expected.arrays["allowed"]), name
    pairs = [
        s.predictions(c.outputs, b)[0] for s, c, b in zip((recorded, native), (mine, theirs), batches, strict=True)
    ]
    for a, b in zip(*pairs, strict=True):
        assert (a.track, a.label, a.object, a.extra) == (b.track, b.label, b.object, b.extra)
        assert abs(a.score - b.score) < 1e-5
        assert (a.mask != b.mask).sum() <= 3
    reads = [s.readout(b, c.outputs) for s, c, b in zip((recorded, native), (mine, theirs), batches, strict=True)]
    assert list(reads[0]) == list(reads[1])
    assert all(torch.equal(reads[0][name].weights, reads[1][name].weights) for name in reads[1])
    steps = [s.flow(b, c.outputs) for s, c, b in zip((recorded, native), (mine, theirs), batches, strict=True)]
    assert [type(step) for step in steps[0]] == [type(step) for step in steps[1]]


def same_tokens(found, expected):
    for name in ("kind", "level", "frame"):
        assert np.array_equal(getattr(found, name), getattr(expected, name))
    for name in ("y", "x", "height", "width"):
        assert np.array_equal(getattr(found, name), getattr(expected, name), equal_nan=True)
    assert found.label == expected.label
