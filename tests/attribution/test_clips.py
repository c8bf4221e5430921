"""Maps of clips: frame cells everywhere, Captum's numbers to the bit, and loops over frames as oracles."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from captum.attr import FeatureAblation as CaptumAblation
from captum.attr import GradientShap as CaptumGradientShap
from captum.attr import IntegratedGradients as CaptumIG
from captum.attr import KernelShap as CaptumKernelShap
from captum.attr import Occlusion as CaptumOcclusion
from captum.attr import Saliency as CaptumSaliency

from clip_fakes import PATCH, SIDE, ClipSource, FunctionClipSource, TrackSource, bound_clips, clip_cells, clips
from foveate.attribution.attention import CheferICCV21, GradAttention, LeGrad, ReadoutAttention, Rollout
from foveate.attribution.baselines import make_baseline
from foveate.attribution.chefer_cvpr21 import CheferCVPR21
from foveate.attribution.clips import frames_of, map_shape, pool_frames
from foveate.attribution.declare import foveate_attributions
from foveate.attribution.drise import DRise, random_mask, similarities
from foveate.attribution.gradcam import GradCam
from foveate.attribution.gradients import GradientShap, InputXGradient, IntegratedGradients, Saliency, SaliencyAbs
from foveate.attribution.legrad_layers import LeGradLayers
from foveate.attribution.objective import Objective
from foveate.attribution.objects import OwnBox, OwnMask
from foveate.attribution.odam import Odam
from foveate.attribution.perturbation import FeatureAblation, KernelShap, Occlusion
from foveate.attribution.pooling import feature_mask, pool_pixels
from foveate.attribution.seeding import sample_seed
from foveate.errors import PluginError, UsageError
from foveate.geometry import CellGrid
from foveate.interfaces import Prediction

FRAMES = (0, 0, 1, 1)


@pytest.fixture(scope="module")
def made():
    source = ClipSource()
    return source, *bound_clips(source)


def loop_pool(pixels, frames, grid, reduce):
    """Cell by cell, frame by frame, channel by channel, float64."""
    out = np.zeros((len(pixels), max(frames) + 1, *grid.shape))
    for n, f, i, j in np.ndindex(*out.shape):
        box = slice(int(grid.y[i]), int(grid.y[i + 1])), slice(int(grid.x[j]), int(grid.x[j + 1]))
        planes = [pixels[n, t][(slice(None), *box)] for t, cell in enumerate(frames) if cell == f]
        every = np.concatenate([plane.ravel() for plane in planes])
        out[n, f, i, j] = every.sum() if reduce == "sum" else every.mean()
    return out


@pytest.mark.parametrize("frames", [(0, 0, 1, 1, 1), (0, 1, 2, 3, 4), (0, 0, 0, 0, 0)])
@pytest.mark.parametrize("reduce", ["sum", "mean"])
def test_pooling_over_frame_cells_equals_a_loop(frames, reduce):
    values = torch.randn(2, 5, 3, 8, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    grid = CellGrid(np.array([0.0, 4.0, 8.0]), np.array([0.0, 2.0, 4.0, 12.0]))
    got = pool_pixels(values, grid, pooling="signed", reduce=reduce, frames=frames)
    np.testing.assert_allclose(got, loop_pool(values.numpy(), frames, grid, reduce), rtol=1e-12)


def test_frames_of_a_cell_share_the_numbers_of_a_feature_mask():
    grid = CellGrid.regular(2, 3, height=4, width=6)
    mask = feature_mask(torch.zeros(1, 3, 3, 4, 6), grid, (0, 1, 1))[0]
    for t, cell in enumerate((0, 1, 1)):
        for y, x in np.ndindex(4, 6):
            assert (mask[t, :, y, x] == cell * 6 + (y // 2) * 3 + x // 2).all()


def test_frame_cells_that_are_not_in_order_are_the_sources_fault(made):
    source, batch, _ = made
    assert frames_of(source, batch) == FRAMES
    assert map_shape(source, batch) == (2, SIDE // PATCH, SIDE // PATCH)
    for wrong in ((0, 0, 1), (1, 1, 2, 2), (0, 1, 0, 1), (0, 0, 2, 2)):
        other = ClipSource()
        other.frame_cells = lambda _, wrong=wrong: wrong
        with pytest.raises(PluginError, match="frame_cells"):
            frames_of(other, batch)


# ------------------------------------------------------------------------ Captum's numbers, to the bit


def captum_saliency(forward, batch, classes):
    return CaptumSaliency(forward).attribute(batch.inputs, target=classes, abs=False)


def captum_ig(forward, batch, classes):
    return CaptumIG(forward).attribute(
        batch.inputs,
        baselines=torch.zeros_like(batch.inputs),
        target=classes,
        n_steps=8,
        method="gausslegendre",
        internal_batch_size=256,
    )


def captum_ablation(forward, batch, classes):
    mask = feature_mask(batch.inputs, CellGrid.regular(4, 4, height=SIDE, width=SIDE), FRAMES)
    return CaptumAblation(forward).attribute(
        batch.inputs, baselines=0, target=classes, feature_mask=mask, perturbations_per_eval=8
    )


def captum_occlusion(forward, batch, classes):
    return CaptumOcclusion(forward).attribute(
        batch.inputs,
        sliding_window_shapes=(2, 3, 2 * PATCH, 2 * PATCH),
        strides=(2, 3, PATCH, PATCH),
        baselines=0,
        target=classes,
        perturbations_per_eval=8,
    )


@pytest.mark.parametrize(
    ("method", "plain"),
    [
        (Saliency(rows=256), captum_saliency),
        (IntegratedGradients(n_steps=8, rows=256), captum_ig),
        (FeatureAblation(rows=4), captum_ablation),
        (Occlusion(rows=4), captum_occlusion),
    ],
    ids=lambda one: getattr(one, "name", ""),
)
def test_pixels_are_captums_to_the_bit(made, method, plain):
    source, batch, bound = made
    classes = [row.class_index for row in bound.rows]
    got = method.pixels(Objective(source, batch, bound, rows=method.rows)).values[0]
    want = plain(source.module, batch, classes)
    assert got.shape == want.shape == batch.inputs.shape
    assert torch.equal(got, want.to(got))
    map_ = method.attribute(source, batch, bound)
    expected = loop_pool(want.detach().double().numpy(), FRAMES, clip_cells(source), method.reduce)
    np.testing.assert_allclose(map_.values, expected, rtol=1e-5, atol=1e-7)
    assert map_.info["frame_cells"] == FRAMES


@pytest.mark.parametrize("kind", ["gradshap", "kernelshap"])
def test_sampled_methods_are_captums_under_the_rows_own_seed(made, kind):
    source, batch, bound = made
    if kind == "gradshap":
        method = GradientShap(n_samples=4, rows=64)
    else:
        method = KernelShap(evaluations_per_patch=1, rows=4)
    got = method.pixels(Objective(source, batch, bound, rows=method.rows), seed=7).values[0, 1]
    number, one = sample_seed(7, batch.ids[1]), batch.inputs[1:2]
    torch.manual_seed(number)
    np.random.seed(number)
    target = bound.rows[1].class_index
    if kind == "gradshap":
        noise = float(0.05 * (one.max() - one.min()))
        want = CaptumGradientShap(source.module).attribute(
            one, baselines=torch.zeros_like(one), n_samples=4, stdevs=noise, target=target
        )
    else:
        mask = feature_mask(one, clip_cells(source), FRAMES)
        want = CaptumKernelShap(source.module).attribute(
            one, baselines=0, feature_mask=mask, n_samples=32, perturbations_per_eval=16, target=target
        )
    assert torch.equal(got, want[0].to(got))


def test_a_linear_clip_model_is_explained_exactly():
    w = torch.randn(2, 4, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0)) * 0.05
    source = FunctionClipSource(lambda x: torch.einsum("btcyx,ktcyx->bk", x, w.to(x)))
    batch, bound = bound_clips(source)
    got = InputXGradient().attribute(source, batch, bound).values
    weights = torch.stack([w[row.class_index] for row in bound.rows])
    want = loop_pool((batch.inputs * weights).double().numpy(), FRAMES, clip_cells(source), "sum")
    np.testing.assert_allclose(got, want, rtol=2e-4, atol=1e-5)
    # Leaving out a cell of a linear model loses exactly what the cell contributed.
    ablated = FeatureAblation().attribute(source, batch, bound).values
    np.testing.assert_allclose(ablated, want, rtol=1e-3, atol=2e-4)


def test_occlusion_by_patches_equals_captums_where_both_work(made):
    source, batch, bound = made
    objective = Objective(source, batch, bound)
    method = Occlusion()
    got = method._by_patches(objective).double()
    np.testing.assert_allclose(got, method._by_captum(objective, PATCH, PATCH).detach(), atol=2e-6)


def test_occlusion_of_unequal_frame_cells_is_the_mean_over_windows():
    source = ClipSource()
    source.frame_cells = lambda batch: (0, 1, 1, 1)
    batch, bound = bound_clips(source, clips(1))
    got = Occlusion(window=2).attribute(source, batch, bound).values[0]
    objective, total, count = Objective(source, batch, bound), np.zeros((2, 4, 4)), np.zeros((2, 4, 4))
    with torch.no_grad():
        whole = float(objective(batch.inputs))
        for f, r, c in np.ndindex(2, 3, 3):
            hidden = batch.inputs.clone()
            frames = [0] if f == 0 else [1, 2, 3]
            hidden[:, frames, :, r * PATCH : (r + 2) * PATCH, c * PATCH : (c + 2) * PATCH] = 0.0
            total[f, r : r + 2, c : c + 2] += whole - float(objective(hidden))
            count[f, r : r + 2, c : c + 2] += 1
    np.testing.assert_allclose(got, total / count, atol=2e-6)


# -------------------------------------------------------------------------------- attention over frames

ATTENTION = (ReadoutAttention(), Rollout(), GradAttention(), CheferICCV21(), LeGrad())


def weights_of(source, batch):
    """Softmax matrices of every layer, ``(layer, sample, head, query, key)``, from a plain re-computation."""
    module, found = source.module, []
    with torch.no_grad():
        patches = module.embed(batch.inputs.transpose(1, 2)).flatten(2).transpose(1, 2)
        x = torch.cat([module.cls.expand(len(batch), -1, -1), patches], 1)
        x = x + module.position[:, : x.shape[1]]
        for block in module.blocks:
            y = block.norm1(x)
            q, k, _ = block.attention.qkv(y).view(*y.shape[:2], 3, 3, -1).permute(2, 0, 3, 1, 4).unbind(0)
            found.append((q.double() @ k.double().transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1))
            x = block(x)
    return torch.stack(found)


def test_the_readout_row_lies_in_its_frames(made):
    source, batch, bound = made
    got = ReadoutAttention().attribute(source, batch, bound)
    want = weights_of(source, batch)[-1].mean(1)[:, 0, 1:].reshape(2, 2, 4, 4)
    np.testing.assert_allclose(got.values, want, atol=1e-6)
    assert got.info["frame_cells"] == FRAMES


def test_rollout_of_a_clip_is_the_product_of_its_layers(made):
    source, batch, bound = made
    product = torch.eye(33, dtype=torch.float64)
    for layer in weights_of(source, batch):
        product = (0.5 * torch.eye(33, dtype=torch.float64) + 0.5 * layer.mean(1)) @ product
    got = Rollout().attribute(source, batch, bound).values
    np.testing.assert_allclose(got, product[:, 0, 1:].reshape(2, 2, 4, 4), atol=1e-6)


@pytest.mark.parametrize(
    "method", [*ATTENTION, GradCam(), Odam(), LeGradLayers(), CheferCVPR21()], ids=lambda m: m.name
)
def test_a_batch_of_clips_equals_singles(made, method):
    source, batch, bound = made
    together = method.attribute(source, batch, bound).values
    assert together.shape == (2, 2, 4, 4)
    assert np.ptp(together) > 0
    for i, sample in enumerate(clips()):
        alone = method.attribute(source, *bound_clips(source, [sample])).values[0]
        np.testing.assert_allclose(together[i], alone, atol=2e-5 * abs(alone).max() + 1e-9)


def test_gradcam_weighs_channels_over_all_frames(made):
    source, batch, bound = made
    module = source.module
    tokens, kept = {}, {}

    def keep(block, inputs, output):
        output.retain_grad()
        kept["x"] = output

    handle = module.blocks[-1].norm1.register_forward_hook(keep)
    logits = module(batch.inputs)
    handle.remove()
    sum(logits[i, row.class_index] for i, row in enumerate(bound.rows)).backward()
    activations, gradients = kept["x"].detach().double(), kept["x"].grad.double()
    module.zero_grad()
    weights = gradients[:, 1:].mean(1, keepdim=True)
    tokens["cam"] = (weights * activations).sum(-1)[:, 1:].clamp_min(0).reshape(2, 2, 4, 4)
    got = GradCam().attribute(source, batch, bound).values
    np.testing.assert_allclose(got, tokens["cam"], atol=1e-5 * float(tokens["cam"].max()))


def test_rows_within_frames_are_laid_frame_by_frame():
    from foveate.attribution.readout_rows import readout_rows
    from foveate.interfaces import CallKey, CallLabels, Part, Place, TokenAxis

    random = torch.Generator().manual_seed(3)
    attention = torch.rand(2, 3, 4, 5, 6, generator=random, dtype=torch.float64)  # sample, frame, head, query, key
    key = TokenAxis.patches(2, 3, height=4, width=6)
    query = TokenAxis.of_kind("object", 5)

    class Record:
        def __init__(self, rows):
            self.rows, self.device = rows, "cpu"

        def weighted(self, weights):
            return torch.einsum("bq,bhqk->bhk", weights.double(), self.rows)[:, :, None]

    class Fake:
        def __init__(self, calls):
            self.calls = calls

        def labels(self, call):
            return self.calls[call][0]

        def record(self, call):
            return Record(self.calls[call][1])

    weights = torch.rand(2, 3, 5, generator=random)
    want = torch.einsum("sfq,sfhqk->shfk", weights.double(), attention).flatten(2)
    by_sample = CallLabels((("sample", 2), ("frame", 3)), query, key)
    by_frame = CallLabels((("frame", 3), ("sample", 2)), query, key)
    turned = attention.transpose(0, 1)
    parts = {
        CallKey("s", 0, 1): (
            CallLabels((("sample", 2), ("frame", 1)), query, key, at={"frame": Part((2,), 3)}),
            attention[:, 2],
        ),
        CallKey("s", 0, 0): (
            CallLabels((("frame", 2), ("sample", 2)), query, key, at={"frame": Part((0, 1), 3)}),
            turned[:2].flatten(0, 1),
        ),
    }
    one = CallKey("s", 0)
    for calls in (
        {one: (by_sample, attention.flatten(0, 1))},
        {one: (by_frame, turned.flatten(0, 1))},
        parts,
    ):
        got, tokens = readout_rows(Fake(calls), list(calls), weights, method="readout")
        np.testing.assert_allclose(got, want, rtol=1e-6)
        assert tokens.frame.tolist() == [0] * 6 + [1] * 6 + [2] * 6
    # Tracks that come and go: the call holds queries 4 and 1 of the site's five.
    placed = CallLabels((("sample", 2), ("frame", 3)), query.take([4, 1]), key, query_place=Place(query, (4, 1)))
    got, _ = readout_rows(
        Fake({one: (placed, attention[:, :, :, [4, 1]].flatten(0, 1))}), [one], weights, method="readout"
    )
    some = torch.einsum("sfq,sfhqk->shfk", weights[..., [4, 1]].double(), attention[..., [4, 1], :]).flatten(2)
    np.testing.assert_allclose(got, some, rtol=1e-6)
    windows = {one: (CallLabels((("sample", 2), ("window", 3)), query, key), attention.flatten(0, 1))}
    with pytest.raises(UsageError, match="attends within sample, window"):
        readout_rows(Fake(windows), [one], weights, method="readout")


# ------------------------------------------------------------------------------------------- tracks


@pytest.fixture(scope="module")
def tracked():
    source = TrackSource()
    samples = clips(2, seed=4)
    samples[0].pixels[2:6, 10:13, 2:5] = (20, 20, 240)  # a second track, of another colour
    return source, *bound_clips(source, samples), samples


def test_own_mask_is_the_tracks_mask_in_every_frame(tracked):
    source, batch, bound, _ = tracked
    got = OwnMask().attribute(source, batch, bound).values
    assert len(bound) == 3
    for row, target in zip(got, bound.rows, strict=True):
        mask = (batch.inputs[target.sample, :, target.class_index] > 0.5).double().numpy()
        want = loop_pool(mask[None, :, None], FRAMES, clip_cells(source), "mean")[0]
        np.testing.assert_allclose(row, want, atol=1e-7)
    with pytest.raises(UsageError, match="own_box"):
        OwnBox().attribute(source, batch, bound)


def test_drise_of_a_track_equals_a_loop_over_masks(tracked):
    source, batch, bound, _ = tracked
    method = DRise(masks=12, rows=5)
    got = method.attribute(source, batch, bound, seed=3)
    assert got.info["mask_cells"] == (2, 4, 4)
    own = source.predictions(source.forward(batch), batch)
    for sample in range(2):
        rows = [i for i, row in enumerate(bound.rows) if row.sample == sample]
        generator = torch.Generator().manual_seed(sample_seed(3, batch.ids[sample]))
        total, shown = np.zeros((len(rows), 2, SIDE, SIDE)), np.zeros((2, SIDE, SIDE))
        for _ in range(12):
            mask = random_mask((2, 4, 4), (2, SIDE, SIDE), 0.5, generator).double()
            seen = batch.inputs[sample].double() * mask[list(FRAMES)][:, None]
            answers = source.predictions(seen[None].float(), batch)[0]
            for n, i in enumerate(rows):
                target = next(one for one in own[sample] if one.object == bound.rows[i].object)
                best = 0.0
                for one in answers:
                    both = np.logical_and(one.mask, target.mask).sum()
                    either = np.logical_or(one.mask, target.mask).sum()
                    if one.class_index == target.class_index:
                        best = max(best, both / either * one.score)
                total[n] += best * mask.numpy()
            shown += mask.numpy()
        want = (total / np.maximum(shown, 1e-12)).reshape(len(rows), 2, 4, 4, 4, 4).mean((3, 5))
        np.testing.assert_allclose(got.values[rows], want, atol=1e-6)


def test_random_masks_of_clips_show_the_share_that_was_asked_for():
    generator = torch.Generator().manual_seed(0)
    masks = torch.stack([random_mask((3, 4, 4), (6, 20, 24), 0.3, generator) for _ in range(400)])
    assert masks.shape == (400, 6, 20, 24)
    assert float(masks.min()) >= 0.0
    assert float(masks.max()) <= 1.0
    np.testing.assert_allclose(masks.mean(0), 0.3, atol=0.09)
    assert float((masks[:, 0] - masks[:, -1]).abs().mean()) > 0.2  # frames are not one mask repeated


def test_tracks_in_other_places_are_unlike():
    mask = np.zeros((2, 4, 4), bool)
    mask[0, :2] = True
    other = np.zeros_like(mask)
    other[:, :2] = True
    target = Prediction("fish", 0.5, 1, mask=mask)
    found = similarities(
        [target], [[Prediction("fish", 0.8, 1, mask=other)], [Prediction("eel", 1.0, 2, mask=mask)]]
    )
    np.testing.assert_allclose(found[:, 0], [0.4, 0.0])


# --------------------------------------------------------------------------------- the whole catalogue

NEEDS = {"own_box": "objects with a box", "own_mask": "objects with a mask", "drise": "objects"}


@pytest.mark.parametrize("spec", tuple(foveate_attributions()), ids=lambda spec: spec.name)
def test_every_declared_method_explains_a_clip_or_says_why_not(spec):
    if spec.missing():
        pytest.skip(f"needs {spec.missing()}")
    source = ClipSource()
    batch, bound = bound_clips(source, clips(1))
    options = {"evaluations_per_patch": 1} if spec.name in ("kernelshap", "lime") else {}
    options |= {"n_samples": 2} if "shap" in spec.name and spec.name.startswith("grad") else {}
    options |= {"n_samples": 2, "n_steps": 2} if spec.name.startswith("smoothig") else {}
    method = spec.create(**options)
    if spec.name in NEEDS:
        with pytest.raises(UsageError, match=NEEDS[spec.name]):
            method.attribute(source, batch, bound)
        return
    got = method.attribute(source, batch, bound)
    assert got.values.shape == (1, 2, 4, 4)
    assert np.isfinite(got.values).all()
    assert got.info["frame_cells"] == FRAMES


def test_a_baseline_of_a_clip_is_made_frame_by_frame(made):
    source, batch, bound = made
    objective = Objective(source, batch, bound)
    frame = Objective(*frame_as_image(source, batch, bound, 2))
    for kind in ("mean", "zero", "black", "blur"):
        whole = make_baseline(kind, objective)
        assert torch.allclose(whole[:, 2], make_baseline(kind, frame), atol=1e-6), kind


def frame_as_image(source, batch, bound, frame):
    from foveate.interfaces import Batch
    from foveate.testing.tiny import TinySource

    image = TinySource(source.config)
    return image, Batch(batch.inputs[:, frame], batch.geometry, batch.ids), bound


def test_absolute_pooling_takes_every_frame_by_itself(made):
    source, batch, bound = made
    pixels = Saliency().pixels(Objective(source, batch, bound)).values[0].abs().double().numpy()
    got = SaliencyAbs().attribute(source, batch, bound).values
    np.testing.assert_allclose(got, loop_pool(pixels, FRAMES, clip_cells(source), "sum"), rtol=1e-5)


def test_pool_frames_leaves_images_alone():
    values = np.arange(12.0).reshape(1, 3, 4)
    assert pool_frames(values, (), reduce="mean") is not None
    np.testing.assert_array_equal(pool_frames(values, (), reduce="sum"), values)
