"""The adapter for a detectron2 installation of one's own, on small models that behave as detectron2's do.

detectron2 itself is not installed where these tests run; the last tests are about that.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import recording_fakes as fakes
from foveate.capture.certify import certify
from foveate.capture.engine import capture_batch
from foveate.data.validate import validate
from foveate.errors import MissingDependencyError, ModelError, SampleError, UsageError
from foveate.interfaces import CapturePlan, Sample, SitePlan, Target
from foveate.plugins.opening import open_source
from foveate.study.capture import run_capture
from foveate_dvis import detectron2_opening
from foveate_dvis.detectron2_answers import Answers, bind, box_of, original_mask, score
from foveate_dvis.detectron2_source import Detectron2Source

CLASSES, QUERIES = 3, 5


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Instances:
    """The few of detectron2's Instances that are used."""

    def __init__(self, boxes, scores, classes, masks):
        self.pred_boxes, self.scores, self.pred_classes = SimpleNamespace(tensor=boxes), scores, classes
        self.pred_masks = masks

    def __len__(self):
        return len(self.scores)

    def has(self, name):
        return getattr(self, name, None) is not None


class Block(nn.Module):
    """A plain ViT's block: in windows of 4 x 4 tokens, or over the whole picture; heads in the batch."""

    def __init__(self, windows):
        super().__init__()
        self.windows, self.attn = windows, fakes.Attention()

    def forward(self, x):
        batch, rows, columns, width = x.shape
        x = F.layer_norm(x, (width,))
        if self.windows:
            parts = x.view(batch, rows // 4, 4, columns // 4, 4, width).transpose(2, 3).reshape(-1, 16, width)
            back = self.attn(parts).view(batch, rows // 4, columns // 4, 4, 4, width).transpose(2, 3)
            return x + back.reshape(x.shape)
        return x + self.attn(x.flatten(1, 2)).view(x.shape)


class Net(nn.Module):
    """Normalises, pads to multiples of 32 with zeros, and answers a list of dictionaries."""

    def __init__(self, queries):
        super().__init__()
        self.size_divisibility, self.input_format = 32, "BGR"
        self.register_buffer("pixel_mean", torch.tensor([100.0, 110.0, 120.0])[:, None, None], False)
        self.register_buffer("pixel_std", torch.tensor([50.0, 55.0, 60.0])[:, None, None], False)
        self.backbone = nn.Module()
        self.backbone.stem = nn.Conv2d(3, fakes.WIDTH, 4, 4)
        self.backbone.blocks = nn.ModuleList(Block(windows) for windows in (True, False, True, False))
        head = Queries() if queries else None
        self.sem_seg_head, self.roi_heads = head, None if queries else nn.Module()
        if not queries:
            self.roi_heads.num_classes = CLASSES
            self.roi_heads.box = nn.Linear(fakes.WIDTH, CLASSES)

    def forward(self, batched_inputs):
        pictures = [(one["image"] - self.pixel_mean) / self.pixel_std for one in batched_inputs]
        height, width = (-(-max(p.shape[i] for p in pictures) // 32) * 32 for i in (1, 2))
        images = torch.stack([F.pad(p, (0, width - p.shape[2], 0, height - p.shape[1])) for p in pictures])
        x = self.backbone.stem(images).permute(0, 2, 3, 1)
        for block in self.backbone.blocks:
            x = block(x)
        if self.sem_seg_head is not None:
            self.sem_seg_head(x)
            return [{} for _ in batched_inputs]
        return [{"instances": self._instances(one)} for one in x]

    def _instances(self, x):
        """Two boxes: left and right half."""
        rows, columns = x.shape[0] * 4.0, x.shape[1] * 4.0
        boxes = torch.tensor([[0, 0, columns / 2, rows], [columns / 2, 0, columns, rows]])
        halves = torch.stack([x[:, : x.shape[1] // 2].mean((0, 1)), x[:, x.shape[1] // 2 :].mean((0, 1))])
        scores, classes = self.roi_heads.box(halves).softmax(-1).max(-1)
        return Instances(boxes, scores, classes, None)


class Queries(nn.Module):
    """Learned queries read the map."""

    def __init__(self):
        super().__init__()
        self.num_classes = CLASSES
        self.query = nn.Embedding(QUERIES, fakes.WIDTH)
        self.cross = nn.ModuleList([nn.MultiheadAttention(fakes.WIDTH, fakes.HEADS, batch_first=True)])
        self.classes = nn.Linear(fakes.WIDTH, CLASSES + 1)

    def forward(self, x):
        queries = self.query.weight.expand(len(x), -1, -1)
        queries = queries + self.cross[0](queries, x.flatten(1, 2), x.flatten(1, 2))[0]
        return {"pred_logits": self.classes(queries), "pred_masks": torch.einsum("bqc,bhwc->bqhw", queries, x)}


def source(queries=True, **options):
    return Detectron2Source.of(fakes.sharpened(Net(queries)), resize=(64, 128), **options)


def picture(seed, height=80, width=120):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def captured(opened, batch):
    plan = CapturePlan(tuple(SitePlan(site.id, rows="all") for site in opened.sites), dtype="float32")
    return capture_batch(opened, batch, plan)


def test_windows_and_the_whole_picture_are_sites_of_their_own():
    opened = source()
    assert [(site.id, site.layers, site.heads, site.group) for site in opened.sites] == [
        ("backbone.blocks.attn.windows", (0, 2), fakes.HEADS, ("window",)),
        ("backbone.blocks.attn", (1, 3), fakes.HEADS, ()),
        ("sem_seg_head.cross", (0,), fakes.HEADS, ()),
    ]


@pytest.mark.parametrize("queries", [True, False])
def test_attention_is_the_modules_own(queries):
    opened = source(queries)
    batch = opened.encode([Sample("a", picture(0)), Sample("b", picture(1))])
    found = captured(opened, batch)
    with torch.no_grad():
        opened.forward(batch)
    for site, count in (("backbone.blocks.attn.windows", 12 * 2), ("backbone.blocks.attn", 1)):
        values = found.sites[site].arrays["attention"]
        for at, layer in enumerate(found.sites[site].layers):
            seen = opened.module.backbone.blocks[layer].attn.seen.numpy()
            seen = seen.reshape(2, -1, fakes.HEADS, *seen.shape[1:])
            mine = values[:, :, at] if values.ndim == 6 else values[:, None, at]
            assert mine.shape == seen.shape
            assert seen.shape[1] in (count, 8)
            assert np.abs(mine - seen).max() < 1e-6
            assert seen.max() > 0.5
    assert found.certificate.passed
    assert not found.certificate.undeclared


def test_tokens_tile_the_padded_picture():
    opened = source()
    batch = opened.encode([Sample("a", picture(0))])
    key = captured(opened, batch).sites["backbone.blocks.attn"].key
    height, width = batch.inputs.shape[-2:]
    assert (key.height == 4).all()
    assert (key.width == 4).all()
    assert (key.y.max(), key.x.max()) == (height - 2, width - 2)
    assert opened.cells(batch).shape == (height // 4, width // 4)


def test_a_bright_square_lights_its_own_cell():
    """Geometry: a change in one cell of the original changes the input there alone."""
    opened = source()
    pixels = np.zeros((80, 120, 3), np.uint8)
    lit = pixels.copy()
    lit[40:50, 60:70] = 255
    plain, changed = (opened.encode([Sample("a", one)]) for one in (pixels, lit))
    rows, columns = (changed.inputs - plain.inputs).abs().sum((0, 1)).nonzero().T
    geometry = plain.geometry[0]
    low, high = geometry.to_input(40, 60), geometry.to_input(50, 70)
    assert low[0] - 1 <= rows.min()
    assert rows.max() <= high[0] + 1
    assert low[1] - 1 <= columns.min()
    assert columns.max() <= high[1] + 1


def test_padding_and_channels_are_what_the_model_makes_itself():
    """The same answer as from the unpadded picture in the model's channel order."""
    opened = source()
    batch = opened.encode([Sample("a", picture(0))])
    geometry = batch.geometry[0]
    shown = round(80 * geometry.scale_y), round(120 * geometry.scale_x)
    assert batch.inputs.shape[-2:] == (64, 96)
    assert shown == (64, 96)
    small = Detectron2Source.of(opened.module, size=(50, 70))
    batch = small.encode([Sample("a", picture(0))])
    assert batch.inputs.shape[-2:] == (64, 96)
    assert torch.equal(batch.inputs[0, :, 50:, 70:], small.module.pixel_mean.expand(3, 14, 26))
    kept = []
    hook = small.module.sem_seg_head.register_forward_hook(lambda m, a, out: kept.append(out["pred_logits"]))
    with torch.no_grad():
        small.module([{"image": batch.inputs[0, :, :50, :70]}])
    hook.remove()
    assert torch.allclose(kept[0], small.forward(batch).queries[0], atol=1e-6)
    rgb = Detectron2Source.of(opened.module, size=(50, 70), channels="RGB").encode([Sample("a", picture(0))])
    assert torch.equal(rgb.inputs[0, :, :50, :70].flip(0), batch.inputs[0, :, :50, :70])


@pytest.mark.parametrize("queries", [True, False])
def test_scores_and_gradients_are_of_their_own_picture(queries):
    opened = source(queries)
    batch = opened.encode([Sample("a", picture(0)), Sample("b", picture(1))])
    inputs = batch.inputs.clone().requires_grad_()
    live = batch.replace(inputs, [0, 1])
    outputs = opened.forward(live, grad=True)
    bound = opened.bind(outputs, live, Target())
    scores = opened.score(outputs, live, bound)
    best = [opened.predictions(outputs, live)[i][0] for i in range(2)]
    if not queries:
        assert scores.tolist() == pytest.approx([one.score for one in best])
    (slope,) = torch.autograd.grad(scores[0], inputs)
    assert slope[0].abs().max() > 0
    assert not slope[1].any()


def test_queries_are_read_out_by_their_number():
    opened = source()
    batch = opened.encode([Sample("a", picture(0))])
    outputs = opened.forward(batch)
    bound = opened.bind(outputs, batch, Target(label="class 1", object=3, scale="logit"))
    assert opened.score(outputs, batch, bound).tolist() == outputs.queries[0][0, 3, 1:2].tolist()
    weights = opened.readout(batch, outputs, bound)["sem_seg_head.cross"].weights
    assert weights.tolist() == [[0.0, 0.0, 0.0, 1.0, 0.0]]
    best = opened.predictions(outputs, batch)[0]
    assert sorted((one.score for one in best), reverse=True) == [one.score for one in best]
    assert len({(one.object, one.label) for one in best}) == QUERIES * CLASSES


def test_an_instance_is_found_again_by_its_box():
    def answer(boxes, scores, classes):
        return Answers(None, (Instances(torch.tensor(boxes), torch.tensor(scores), torch.tensor(classes), None),))

    intact = answer([[0.0, 0, 10, 10], [20, 0, 30, 10]], [0.9, 0.6], [1, 2])
    bound = bind(intact, 1, ["a", "b", "c"], Target(label="c"))
    assert (bound.rows[0].object, bound.rows[0].class_index) == (1, 2)
    moved = answer([[21.0, 0, 31, 10], [0, 0, 10, 10], [20, 0, 30, 10]], [0.4, 0.8, 0.7], [2, 1, 0])
    assert float(score(moved, bound)) == pytest.approx(0.4), "the nearest of its own class"
    lost = answer([[0.0, 0, 10, 10]], [0.9], [2])
    assert float(score(lost, bound)) == 0.0
    nothing = Answers(
        None, (Instances(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.long), None),)
    )
    assert float(score(nothing, bound)) == 0.0
    with pytest.raises(UsageError, match="no object 7"):
        bind(intact, 1, ["a", "b", "c"], Target(object=7))
    assert len(bind(intact, 1, ["a", "b", "c"], Target(label="a"))) == 0


def test_masks_come_back_to_original_pixels():
    opened = source()
    batch = opened.encode([Sample("a", picture(0, 160, 240))])
    geometry = batch.geometry[0]
    mask = torch.zeros(geometry.input_height, geometry.input_width, dtype=torch.bool)
    mask[16:32, 24:48] = True
    found = original_mask(mask, geometry)
    assert found.shape == (160, 240)
    top, left = geometry.to_original(16, 24)
    bottom, right = geometry.to_original(32, 48)
    assert box_of(found) == pytest.approx((top, left, bottom, right), abs=1.0)
    assert box_of(torch.zeros(4, 4, dtype=torch.bool)) is None


def test_a_run_of_it_is_valid(tmp_path):
    from PIL import Image

    for i in range(3):
        Image.fromarray(picture(i)).save(tmp_path / f"{i}.png")
    report = run_capture(source(), tmp_path, tmp_path / "x.zarr")
    assert report.complete
    assert not report.failed
    assert [p for p in validate(tmp_path / "x.zarr") if p.level == "error"] == []


def test_capture_leaves_the_model_alone():
    opened = source()
    before = dict(opened.module.sem_seg_head._forward_hooks)
    proof = certify(opened, opened.encode([Sample("a", picture(0))]))
    assert proof.identical
    assert not proof.failures
    assert opened.module.sem_seg_head._forward_hooks == before


def test_pictures_of_two_sizes_go_one_by_one():
    with pytest.raises(SampleError, match="sizes"):
        source().encode([Sample("a", picture(0)), Sample("b", picture(1, 80, 300))])


def test_trackers_are_shown_the_way():
    with pytest.raises(ModelError, match="keeps tracks") as caught:
        Detectron2Source.of(fakes.sharpened(fakes.Model()))
    assert "dvis-daq" in caught.value.remedy


def test_labels_are_counted():
    with pytest.raises(UsageError, match="2 labels for 3 classes"):
        source(labels=["a", "b"])
    assert source(labels=["a", "b", "c"]).labels == ["a", "b", "c"]


# ------------------------------------------------------------------------------- opening


def test_weights_keep_their_names_whatever_version_they_state(tmp_path):
    """Projects rename keys of checkpoints without a version; these names are today's."""

    class Renames(nn.Linear):
        _version = 2

        def _load_from_state_dict(self, state, prefix, meta, *rest):
            if meta.get("version", None) is None or meta["version"] < 2:
                state[prefix + "old"] = state.pop(prefix + "weight")
            super()._load_from_state_dict(state, prefix, meta, *rest)

    made, other = (nn.Sequential(Renames(2, 2)) for _ in range(2))
    torch.save({"model": dict(made.state_dict())}, tmp_path / "x.pth")
    detectron2_opening.load(other, tmp_path / "x.pth")
    assert torch.equal(made[0].weight, other[0].weight)
    torch.save({"model": {"0.weight": torch.zeros(3, 3)}}, tmp_path / "y.pth")
    with pytest.raises(ModelError, match=r"1 missing: 0.bias; 1 of another shape: 0.weight"):
        detectron2_opening.load(other, tmp_path / "y.pth")


def test_without_detectron2_it_says_what_is_missing(monkeypatch, tmp_path):
    monkeypatch.setattr(detectron2_opening, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match="detectron2, torchvision, fvcore") as caught:
        detectron2_opening.build(tmp_path / "x.yaml", [], {})
    assert "foveate_dvis.exporter" in caught.value.remedy
    assert caught.value.exit_code == 3


def test_a_broken_installation_says_why(monkeypatch, tmp_path):
    monkeypatch.setattr(detectron2_opening, "find_spec", lambda name: object())

    def broken(name):
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(detectron2_opening, "import_module", broken)
    with pytest.raises(MissingDependencyError, match="torchvision::nms"):
        detectron2_opening.require_detectron2()


def test_it_opens_by_name_where_it_can(tmp_path):
    """Here there is no detectron2: the error is the one that says so; weights are asked for before that."""
    pytest.importorskip("foveate_dvis.declare")
    if detectron2_opening.find_spec("detectron2") is not None:
        pytest.skip("detectron2 is installed")
    with pytest.raises((MissingDependencyError, ModelError), match=r"detectron2|weights"):
        open_source(str(tmp_path / "x.yaml"), source="detectron2", weights="random")
