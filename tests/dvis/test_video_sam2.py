"""SAM 2: memory attention of a prompted object, labelled by the frame that is remembered."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from foveate.attribution.attention import Rollout
from foveate.attribution.gradients import Saliency
from foveate.capture.engine import capture_batch
from foveate.capture.rollout import rollout
from foveate.capture.trace import trace
from foveate.errors import SampleError, UsageError
from foveate.interfaces import Batch, CapturePlan, Sample, SitePlan, Target
from foveate.testing.conformance import SourceConformance
from video_models import clips, open_sam2

FRAMES, PLACES, POINTER = 6, 16, 2  # 4 x 4 places; a pointer of 128 numbers is two tokens of 64
MEMORIES, POINTERS = 3, 4


class TestKit(SourceConformance):
    target = Target("presence")

    def open(self) -> Any:
        return open_sam2()


class TestKitOfMasks(SourceConformance):
    target = Target("mask")

    def open(self) -> Any:
        return open_sam2(frames=4)

    def samples(self) -> list[Sample]:
        return clips(2)


def encoded(count: int = 2, **options: Any) -> tuple[Any, Batch]:
    source = open_sam2(**{"frames": FRAMES, **options})
    return source, source.encode(clips(count))


def test_the_models_own_session_gives_the_same_to_the_bit() -> None:
    from transformers.models.sam2_video.modeling_sam2_video import Sam2VideoInferenceSession

    source, batch = encoded()
    plan = CapturePlan((SitePlan("memory.self", rows="all"), SitePlan("memory.cross", rows="all")))
    found = capture_batch(source, batch, plan).outputs
    for i, clip in enumerate(batch.inputs):
        session = Sam2VideoInferenceSession(clip, 64, 64, dtype=torch.float32)
        point = {
            "point_coords": batch.per_sample["points"][i][None, None],
            "point_labels": torch.ones(1, 1, 1).int(),
        }
        session.add_point_inputs(session.obj_id_to_idx(1), 0, point)
        session.obj_with_new_inputs = [1]
        source.module(session, frame_idx=0)
        for answer in source.module.propagate_in_video_iterator(session):
            assert torch.equal(answer.pred_masks[0, 0], found.masks[i, answer.frame_idx])
            assert torch.equal(answer.object_score_logits.reshape(()), found.presence[i, answer.frame_idx])


# ------------------------------------------------------------------- attention, from the modules' own inputs


def rotated(x: Tensor, side: int) -> Tensor:
    """Axial rotary positions in float64: half of the pairs turn with the column, half with the row."""
    count, width = x.shape
    out = x.clone()
    quarter = width // 4
    for token in range(count):
        row, column = divmod(token % (side * side), side)
        for pair in range(width // 2):
            place = column if pair < quarter else row
            angle = place / 10000.0 ** ((pair % quarter) * 2 / (width // 2))
            a, b = x[token, 2 * pair], x[token, 2 * pair + 1]
            out[token, 2 * pair] = a * np.cos(angle) - b * np.sin(angle)
            out[token, 2 * pair + 1] = b * np.cos(angle) + a * np.sin(angle)
    return out


def explicit(module: Any, inputs: dict[str, Any]) -> Tensor:
    """softmax(q k / sqrt(d)) of one call in float64, (query, key); pointers are not turned."""
    with torch.no_grad():  # scores reach a hundred, so only what follows the projections is told apart to 1e-5
        q, k = (getattr(module, f"{name[0]}_proj")(inputs[name][0, 0]).double() for name in ("query", "key"))
    plain = int(inputs.get("num_k_exclude_rope", 0))
    q = rotated(q, 4)
    k = torch.cat([rotated(k[: len(k) - plain], 4), k[len(k) - plain :]])
    return torch.softmax(q @ k.T / q.shape[-1] ** 0.5, -1)


def test_capture_equals_attention_recomputed_from_the_modules_inputs() -> None:
    source, batch = encoded(1)
    calls: dict[str, list[dict[str, Any]]] = {}
    hooks = []
    for path in (path for site in source.sites for path in site.modules):
        module = source.module.get_submodule(path)
        hooks.append(
            module.register_forward_pre_hook(
                lambda m, a, kw, path=path: calls.setdefault(path, []).append(kw), with_kwargs=True
            )
        )
    traced = trace(source, batch)
    for hook in hooks:
        hook.remove()
    traced.certify().require()
    assert len(traced.records) == 2 * 2 * (FRAMES - 1)
    for call, record in traced.records.items():
        site = next(site for site in source.sites if site.id == call.site)
        path = next(path for path, layer in site.modules.items() if layer == call.layer)
        wanted = explicit(source.module.get_submodule(path), calls[path][call.number])
        rows = record.rows(list(range(PLACES)))[0, 0].double()
        entropy = float(-(wanted * wanted.clamp_min(1e-30).log()).sum(-1).mean())
        assert entropy < 0.9 * np.log(record.shape.keys), "uniform attention proves nothing"
        torch.testing.assert_close(rows, wanted, atol=1e-5, rtol=0)


def test_keys_are_the_memories_of_the_frames_that_they_name() -> None:
    """What the model reads is compared, token by token, with what its encoder made of each frame."""
    source, batch = encoded(1)
    read: list[Tensor] = []
    made: list[Tensor] = []
    pointers: list[Tensor] = []
    cross = source.module.memory_attention.layers[0].cross_attn_image
    hooks = [
        cross.register_forward_pre_hook(lambda m, a, kw: read.append(kw["value"][0, 0]), with_kwargs=True),
        source.module.memory_encoder.register_forward_hook(lambda m, a, out: made.append(out[0])),
        source.module.object_pointer_proj.register_forward_hook(
            lambda m, a, out: pointers.append(out.reshape(-1, 64))
        ),
    ]
    traced = trace(source, batch)
    for hook in hooks:
        hook.remove()
    assert len(read) == FRAMES - 1
    assert len(made) == len(pointers) == FRAMES
    for number, values in enumerate(read):
        frame = number + 1
        labels = traced.labels(next(c for c in traced.records if c.site == "memory.cross" and c.number == number))
        key = labels.key
        assert len(key) == len(values)
        patches = key.where("patch")
        seen = sorted({0, *range(max(frame - MEMORIES + 1, 0), frame)})
        assert sorted(set(key.frame[patches].tolist())) == seen
        for i in patches:
            row, column = int(key.y[i] // 16), int(key.x[i] // 16)
            memory = made[key.frame[i]][0, :, row, column].to(torch.bfloat16).float()
            torch.testing.assert_close(values[i], memory, atol=1e-6, rtol=0)
        own = key.where("object")
        told = sorted({0, *range(max(frame - POINTERS + 1, 0), frame)})
        assert sorted(set(key.frame[own].tolist())) == told
        for place, i in enumerate(own):
            torch.testing.assert_close(values[i], pointers[key.frame[i]][place % POINTER], atol=1e-6, rtol=0)
        axis = labels.key_place
        assert axis is not None
        assert len(axis.axis) == FRAMES * (PLACES + POINTER)


def test_arrays_lie_on_one_axis_of_memory_and_the_prompted_frame_reads_none() -> None:
    source, batch = encoded()
    plan = CapturePlan((SitePlan("memory.self", rows="all"), SitePlan("memory.cross", rows="all")))
    sites = capture_batch(source, batch, plan).sites
    cross, own = sites["memory.cross"].arrays["attention"], sites["memory.self"].arrays["attention"]
    assert cross.shape == (2, FRAMES, 2, 1, PLACES, FRAMES * (PLACES + POINTER))
    assert own.shape == (2, FRAMES, 2, 1, PLACES, PLACES)
    np.testing.assert_allclose(cross[:, 1:].sum(-1), 1.0, atol=1e-5)
    assert (cross[:, 0] == 0).all()
    assert not sites["memory.cross"].arrays["allowed"][:, 0].any()
    key = sites["memory.cross"].key
    for frame in range(1, FRAMES):
        later = key.frame >= frame
        assert (cross[:, frame][..., later] == 0).all(), "no frame remembers the future"
    for i in range(2):
        alone = capture_batch(source, batch.replace(batch.inputs[[i]], [i]), plan).sites["memory.cross"]
        np.testing.assert_allclose(alone.arrays["attention"][0], cross[i], atol=1e-6)


def test_the_readout_is_the_objects_places() -> None:
    source, batch = encoded()
    outputs = source.forward(batch)
    weights = source.readout(batch, outputs)["memory.cross"].weights
    masks = (outputs.masks > 0).float()
    for i in range(2):
        share = np.zeros((FRAMES, 4, 4))
        for frame in range(1, FRAMES):
            for row in range(4):
                for column in range(4):
                    block = masks[i, frame, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
                    share[frame, row, column] = float(block.mean())
        np.testing.assert_allclose(weights[i].reshape(FRAMES, 4, 4), share / share.sum(), atol=1e-6)
    bound = source.bind(outputs, batch, Target("mask"))
    torch.testing.assert_close(source.readout(batch, outputs, bound)["memory.cross"].weights, weights)


def test_rollout_says_which_memories_the_object_reads() -> None:
    """Two layers a frame: places mix (self), then half of them is memory (cross); dense float64 products."""
    source, batch = encoded(1)
    traced = trace(source, batch)
    weights = source.readout(batch, traced.outputs)["memory.cross"].weights[0].double()
    found = rollout(traced)[0].double().reshape(FRAMES, -1)
    for frame in range(1, FRAMES):
        row, memory = weights[frame].clone(), torch.zeros(found.shape[1], dtype=torch.float64)
        for layer in (1, 0):
            a = {
                site: next(r for c, r in traced.records.items() if c == (site, layer, frame - 1))
                for site in ("memory.self", "memory.cross")
            }
            own, cross = (
                a[site].rows(list(range(PLACES)))[0, 0].double() for site in ("memory.self", "memory.cross")
            )
            labels = traced.labels(next(c for c in traced.records if c == ("memory.cross", layer, frame - 1)))
            assert labels.key_place is not None
            memory[list(labels.key_place.index)] += 0.5 * (row @ cross)
            row = 0.5 * row
            row = 0.5 * row + 0.5 * (row @ own)
        torch.testing.assert_close(found[frame], memory, atol=1e-6, rtol=0)


def test_maps_add_up_what_all_frames_read_in_one_memory() -> None:
    source, batch = encoded(1)
    bound = source.bind(source.forward(batch), batch, Target("mask"))
    found = Rollout().attribute(source, batch, bound).values[0]
    values = rollout(trace(source, batch), bound)[0].numpy().reshape(FRAMES, -1).sum(0)[: FRAMES * PLACES]
    np.testing.assert_allclose(found, values.reshape(FRAMES, 4, 4), atol=1e-6)
    assert found[-1].max() == 0, "nobody remembers the last frame"
    assert Saliency().attribute(source, batch, bound).values.shape == (1, FRAMES, 4, 4)


# ------------------------------------------------------------------- prompts and answers


def test_gradients_go_back_through_the_memory() -> None:
    source, batch = encoded(1)
    inputs = batch.inputs.detach().clone().requires_grad_()
    outputs = source.forward(replace(batch, inputs=inputs), grad=True)
    for frame in (0, 1, 3):
        (gradient,) = torch.autograd.grad(outputs.presence[0, frame], inputs, retain_graph=True)
        reached = gradient[0].abs().flatten(1).amax(1) > 0
        assert not reached[frame + 1 :].any()
        assert reached[frame]
        assert reached[0], "the prompted frame stays in memory"


def test_prompts_come_from_columns_options_or_the_middle() -> None:
    clip = clips(1)[0]
    height, width = clip.pixels.shape[1:3]
    middle, given = open_sam2(), open_sam2(points=[[10, 5], [20, 8]])
    scale = np.array([64 / width, 64 / height])
    np.testing.assert_allclose(middle.encode([clip]).per_sample["points"], [[[32.0, 32.0]]])
    np.testing.assert_allclose(given.encode([clip]).per_sample["points"][0], np.array([[10, 5], [20, 8]]) * scale)
    told = replace(clip, columns={"point_x": "7", "point_y": 9.5})
    batch = given.encode([told])
    np.testing.assert_allclose(batch.per_sample["points"][0], np.array([[7, 9.5]]) * scale, rtol=1e-6)
    assert not torch.equal(given.forward(batch).masks, given.forward(given.encode([clip])).masks)


def test_one_object_is_answered_with_its_masks() -> None:
    source, batch = encoded()
    outputs = source.forward(batch)
    for i, (answer,) in enumerate(source.predictions(outputs, batch)):
        assert (answer.track, answer.object, answer.label) == ("1", 0, "object")
        assert answer.mask is not None
        assert answer.mask.shape == (FRAMES, *clips(2)[i].pixels.shape[1:3])
        assert answer.score == pytest.approx(float(outputs.presence[i].sigmoid().mean()))
    bound = source.bind(outputs, batch, Target())
    wanted = [outputs.masks[i][outputs.masks[i] > 0].mean() for i in range(2)]
    torch.testing.assert_close(source.score(outputs, batch, bound), torch.stack(wanted))
    there = source.bind(outputs, batch, Target("presence"))
    torch.testing.assert_close(source.score(outputs, batch, there), outputs.presence.mean(1))


def test_an_object_that_is_never_there_has_no_mask_to_explain() -> None:
    source = open_sam2(frames=3)
    with torch.no_grad():
        source.module.get_parameter("mask_decoder.pred_obj_score_head.proj_out.bias").fill_(-30.0)
    batch = source.encode(clips(2))
    outputs = source.forward(batch)
    assert len(source.bind(outputs, batch, Target("mask"))) == 0
    assert len(source.bind(outputs, batch, Target("presence"))) == 2
    assert float(source.readout(batch, outputs)["memory.cross"].weights.abs().sum()) == 0
    assert all(not answer.mask.any() for (answer,) in source.predictions(outputs, batch))


def test_one_frame_has_no_memory() -> None:
    source = open_sam2()
    clip = clips(1)[0]
    batch = source.encode([replace(clip, pixels=clip.pixels[:1])])
    traced = trace(source, batch)
    assert not traced.records
    assert source.readout(batch, traced.outputs) == {}
    assert source.predictions(traced.outputs, batch)[0][0].mask is not None


def test_what_cannot_be_is_said() -> None:
    source, batch = encoded(1)
    outputs = source.forward(batch)
    clip = clips(1)[0]
    with pytest.raises(UsageError, match="no target kind"):
        source.bind(outputs, batch, Target("class"))
    with pytest.raises(UsageError, match="one object"):
        source.bind(outputs, batch, Target("mask", object=3))
    with pytest.raises(UsageError, match=r"expected \[\[x, y\], ...\]"):
        open_sam2(points=[1, 2])
    with pytest.raises(SampleError, match="outside"):
        source.encode([replace(clip, columns={"point_x": 900, "point_y": 3})])
    with pytest.raises(SampleError, match="not a number"):
        source.encode([replace(clip, columns={"point_x": "left", "point_y": 3})])
    mixed = [clip, replace(clip, id="two", columns={"point_x": 3, "point_y": 3})]
    with pytest.raises(SampleError, match="different length"):
        open_sam2(points=[[1, 1], [2, 2]]).encode(mixed)
