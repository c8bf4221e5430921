"""What a video transformer says of itself, opens, answers and refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from foveate.attribution.attention import CheferICCV21, GradAttention, LeGrad, ReadoutAttention, Rollout
from foveate.attribution.gradients import InputXGradient, Saliency
from foveate.errors import FoveateError, ModelError, SampleError, UsageError
from foveate.interfaces import Sample, Target
from foveate.plugins.opening import open_source
from video_models import CASES, JEPA, clips, open_tiny, sharpen

CLASSIFIERS = [case for case in CASES if not case.endswith("Model")]


@pytest.mark.parametrize("case", CASES)
def test_a_clips_cells_are_its_tokens(case: str) -> None:
    """Bright frames light their own frame cells: the token's frame, y and x are true."""
    source = open_tiny(case)
    batch = source.encode(clips(1))
    cells, (rows, columns) = source.frame_cells(batch), source.cells(batch).shape
    tubelet = len(cells) // (max(cells) + 1)
    assert cells == tuple(i // tubelet for i in range(4))
    assert (rows, columns) == (4, 4)
    facts = source.facts()
    assert (facts["frames"], facts["tubelet"], facts["grid"]) == (4, tubelet, [4, 4])


def embedded(source: Any, inputs: torch.Tensor) -> torch.Tensor:
    """What the patch embedding makes of an input, (sample, token, channel), before positions."""
    found = {}
    name, module = next((n, m) for n, m in source.module.named_modules() if n.endswith("patch_embeddings"))
    hook = module.register_forward_hook(lambda m, i, o: found.update({name: o}))
    try:
        source.forward(replace(source.encode(clips(len(inputs))), inputs=inputs))
    finally:
        hook.remove()
    out = found[name]
    return out[0] if isinstance(out, tuple) else out


@pytest.mark.parametrize("case", ["VideoMAEModel", "VivitModel", "VJEPA2Model"])
def test_a_tokens_frame_and_place_are_where_its_pixels_are(case: str) -> None:
    source = open_tiny(case)
    batch = source.encode(clips(1))
    tokens = source.label(next(iter(_calls(source))), batch, None).key
    tokens = tokens.take(tokens.where("patch").tolist())
    blank = torch.zeros_like(batch.inputs)
    before = embedded(source, blank)
    random = np.random.default_rng(0)
    for i in random.choice(len(tokens), 6, replace=False):
        frames = [f for f, cell in enumerate(source.frame_cells(batch)) if cell == tokens.frame[i]]
        lit = blank.clone()
        lit[:, random.choice(frames), :, int(tokens.y[i]), int(tokens.x[i])] = 1.0
        changed = (embedded(source, lit) - before).abs().sum(-1)[0]
        assert changed.argmax() == i
        assert (changed > 0).sum() == 1


def _calls(source: Any) -> list[Any]:
    from foveate.interfaces import CallKey

    return [CallKey(site.id, layer) for site in source.sites for layer in site.layers]


@pytest.mark.parametrize("case", CLASSIFIERS)
def test_classes_are_answered_with_their_names(case: str) -> None:
    source = open_tiny(case)
    batch = source.encode(clips())
    outputs = source.forward(batch)
    answers = source.predictions(outputs, batch)
    wanted = outputs.logits.softmax(-1)
    for i, listed in enumerate(answers):
        assert [p.class_index for p in listed] == wanted[i].argsort(descending=True).tolist()
        assert listed[0].label == f"LABEL_{listed[0].class_index}"
    bound = source.bind(outputs, batch, Target(label="LABEL_3", scale="logit"))
    torch.testing.assert_close(source.score(outputs, batch, bound), outputs.logits[:, 3])


@pytest.mark.parametrize("case", ["VideoMAEModel", "VJEPA2Model", "TimesformerModel", "VivitModel"])
def test_an_encoder_is_asked_what_sets_the_clip_apart(case: str) -> None:
    source = open_tiny(case)
    batch = source.encode(clips())
    outputs = source.forward(batch)
    bound = source.bind(outputs, batch, Target())
    own = source.embedding(outputs)
    blank = source.embedding(source.forward(batch.replace(torch.zeros_like(batch.inputs[:1]), [0])))
    torch.testing.assert_close(source.score(outputs, batch, bound), (own - blank).norm(dim=-1))
    assert source.predictions(outputs, batch) == [[], [], []]


METHODS = [Rollout(), CheferICCV21(), GradAttention(), LeGrad(), Saliency(), InputXGradient()]


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
@pytest.mark.parametrize(
    "case", ["VideoMAEForVideoClassification", "VJEPA2ForVideoClassification", "TimesformerForVideoClassification"]
)
def test_explanations_lie_on_frames_and_patches(case: str, method: Any) -> None:
    source = open_tiny(case)
    batch = source.encode(clips(2))
    bound = source.bind(source.forward(batch), batch, Target())
    found = method.attribute(source, batch, bound)
    frames = 4 if case.startswith("Times") else 2
    assert found.values.shape == (2, frames, 4, 4)
    assert np.isfinite(found.values).all()
    assert np.abs(found.values).max() > 0


def test_the_mean_over_tokens_reads_one_map() -> None:
    source = open_tiny("VideoMAEForVideoClassification")
    batch = source.encode(clips(2))
    bound = source.bind(source.forward(batch), batch, Target())
    found = ReadoutAttention().attribute(source, batch, bound)
    np.testing.assert_allclose(found.values.reshape(2, -1).sum(1), 1.0, atol=1e-5)


def test_vjepa_takes_any_number_of_frames() -> None:
    short, long = (open_tiny("VJEPA2ForVideoClassification", frames=n) for n in (2, 8))
    batch = long.encode(clips())
    assert batch.inputs.shape[1] == 8
    assert long.frame_cells(batch) == (0, 0, 1, 1, 2, 2, 3, 3)
    assert short.forward(short.encode(clips())).logits.shape == long.forward(batch).logits.shape
    assert batch.per_sample["frame_index"][0].tolist() == [0, 1, 2, 3, 3, 4, 5, 6]


@pytest.mark.parametrize("frames", [3, 0, -2])
def test_half_a_tubelet_is_refused(frames: int) -> None:
    with pytest.raises(UsageError, match="no multiple of its tubelets"):
        open_tiny("VJEPA2ForVideoClassification", frames=frames)


def test_what_cannot_be_is_said() -> None:
    with pytest.raises(UsageError, match="takes 4 frames, not 8"):
        open_tiny("VideoMAEModel", frames=8)
    family, config = CASES["TimesformerForVideoClassification"]
    with pytest.raises(ModelError, match="space_only"):
        open_source(family, weights="random", config=config | {"attention_type": "space_only"})
    source = open_tiny("VideoMAEModel")
    with pytest.raises(SampleError, match=r"'photo'.*expected a clip"):
        source.encode([Sample("photo", np.zeros((40, 40, 3), np.uint8))])
    with pytest.raises(SampleError, match=r"'empty'.*no frame|'empty'.*0 frames"):
        source.encode([Sample("empty", np.zeros((0, 40, 40, 3), np.uint8))])
    batch = source.encode(clips(1))
    with pytest.raises(UsageError, match="only classifiers"):
        source.bind(source.forward(batch), batch, Target("class"))
    with pytest.raises(UsageError, match="no object"):
        source.bind(source.forward(batch), batch, Target(object=1))
    with pytest.raises(FoveateError, match=r"frames|option"):
        open_source("videomae", weights="random", config=CASES["VideoMAEModel"][1], image_size=64)


def test_one_frame_is_a_clip_of_repeated_frames() -> None:
    source = open_tiny("VideoMAEForVideoClassification")
    clip = clips(1)[0]
    batch = source.encode([replace(clip, pixels=clip.pixels[:1])])
    assert batch.per_sample["frame_index"].tolist() == [[0, 0, 0, 0]]
    assert torch.equal(batch.inputs[0, 0], batch.inputs[0, 3])


def test_no_clips_are_an_empty_batch() -> None:
    source = open_tiny("TimesformerForVideoClassification")
    batch = source.encode([])
    assert batch.inputs.shape == (0, 4, 3, 32, 32)
    assert batch.per_sample["frame_index"].shape == (0, 4)


@pytest.mark.parametrize(
    ("case", "processor"),
    [
        (
            "VideoMAEForVideoClassification",
            {"image_processor_type": "VideoMAEImageProcessor", "size": {"shortest_edge": 36}, "crop_size": 32},
        ),
        ("VJEPA2ForVideoClassification", {"video_processor_type": "VJEPA2VideoProcessor", "crop_size": 32}),
        ("TimesformerForVideoClassification", None),
    ],
)
def test_a_saved_folder_opens_and_its_random_twin_sees_the_same_pixels(
    case: str, processor: dict[str, Any] | None, tmp_path: Path
) -> None:
    source = open_tiny(case)
    source.module.save_pretrained(tmp_path)
    if processor is not None:
        name = (
            "video_preprocessor_config.json" if "video_processor_type" in processor else "preprocessor_config.json"
        )
        (tmp_path / name).write_text(json.dumps(processor))
    again, twin = open_source(tmp_path), open_source(tmp_path, weights="random", seed=3)
    batch = again.encode(clips())
    assert torch.equal(batch.inputs, twin.encode(clips()).inputs)
    assert torch.equal(again.forward(batch).logits, source.forward(batch).logits)
    assert not torch.equal(again.forward(batch).logits, twin.forward(batch).logits)
    assert again.card.weights_sha256 != twin.card.weights_sha256
    assert any("no preprocessor_config.json" in note for note in again.card.notes) == (processor is None)


def test_a_processor_of_another_size_is_an_error(tmp_path: Path) -> None:
    open_tiny("VideoMAEModel").module.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": "VideoMAEImageProcessor"})
    )
    with pytest.raises(ModelError, match="224"):
        open_source(tmp_path)


def test_dtype_and_seed_are_obeyed() -> None:
    family, config = "vjepa2", JEPA | {"architectures": ["VJEPA2ForVideoClassification"], "num_labels": 5}
    half = open_source(family, weights="random", config=config, dtype="bfloat16", seed=1)
    sharpen(half.module)
    batch = half.encode(clips(1))
    assert batch.inputs.dtype == torch.bfloat16
    outputs = half.forward(batch)
    assert half.score(outputs, batch, half.bind(outputs, batch, Target())).dtype == torch.float32
    first, second = (
        open_source(family, weights="random", config=config, seed=seed).module.classifier.weight for seed in (1, 2)
    )
    assert not torch.equal(first, second)
