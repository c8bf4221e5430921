"""CLIP beside the detector: a score only where both explain the same thing, else the reason."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from foveate.errors import UsageError
from foveate.interfaces import AttentionSource, Sample, Target
from foveate.plugins.opening import open_source
from foveate.study.clip_beside_detr import TEMPLATE, clip_beside_detr, prompts_for, surest
from foveate.testing.shapes import CLASSES, scenes
from vit_models import SHAPE, TEXT, sharpen, toy_tokenizer


@pytest.fixture(scope="module")
def detector() -> AttentionSource:
    return open_source("foveate/shapes-cdetr")


@pytest.fixture(scope="module")
def clip() -> AttentionSource:
    return tiny_clip(prompts_for(CLASSES))


def tiny_clip(prompts: Sequence[str]) -> AttentionSource:
    """Random weights, sharpened before the prompts are embedded; the text tower is long enough for them."""
    config = {"vision_config": SHAPE, "text_config": TEXT | {"max_position_embeddings": 48}}
    tokenizer = toy_tokenizer()
    source = open_source("clip", weights="random", config=config, prompts=list(prompts), tokenizer=tokenizer)
    sharpen(source.module)
    source._texts = source._embed_prompts(None, source.prompts, tokenizer)
    return source


@pytest.fixture(scope="module")
def pictures() -> list[Sample]:
    return [Sample(f"scene-{i}", drawn.image) for i, drawn in enumerate(scenes(5, seed=11))]


class Prompted:
    """A detector that takes CLIP's prompts: the same model on both sides, so that agreement must be perfect."""

    def __init__(self, source: AttentionSource) -> None:
        self.source = source

    def __getattr__(self, name: str) -> object:
        return getattr(self.source, name)

    def bind(self, outputs: object, batch: object, target: object) -> object:
        before, after = TEMPLATE.split("{}")
        return self.source.bind(
            outputs, batch, replace(target, label=target.label.removeprefix(before).removesuffix(after))
        )


def test_a_model_beside_itself_agrees_perfectly(detector, pictures) -> None:
    report = clip_beside_detr(Prompted(detector), detector, pictures, method="grad_attention")
    assert all(not pair.reason for pair in report.pairs)
    own = report.result.measures["spearman"].per_image.own
    np.testing.assert_allclose(own, 1.0, atol=1e-3)  # ranks of cells that are almost 0 may swap
    assert report.result.measures["spearman"].null.estimate < 0.9


def test_labels_objects_and_scores_are_those_of_the_models(detector, clip, pictures) -> None:
    report = clip_beside_detr(clip, detector, pictures)
    assert [pair.label for pair in report.pairs] == [surest(detector, sample) for sample in pictures]
    for sample, pair in zip(pictures, report.pairs, strict=True):
        batch = clip.encode([sample])
        with torch.no_grad():
            share = clip.forward(batch).logits[0].softmax(-1)[CLASSES.index(pair.label)]
        assert pair.clip_score == pytest.approx(float(share), rel=1e-4)
        assert pair.objects >= 1
    assert len(report.result.kept) == 5
    assert "5 of 5 pictures" in report.to_text()
    assert report.to_dict()["result"]["n"] == 5


def objects_in(detector: AttentionSource, sample: Sample) -> int:
    batch = detector.encode([sample])
    with torch.no_grad():
        return len(detector.bind(detector.forward(batch), batch, Target()))


def test_several_objects_of_a_label_count_alike(detector, clip) -> None:
    """Two objects of one hue: the map is the mean of both maps, each of mass 1."""
    twins = [s for s in scenes(200, seed=12) if len(s) == 2 and s.hues[0] == s.hues[1]]
    samples = [Sample(str(i), s.image) for i, s in enumerate(twins)]
    found = [i for i, sample in enumerate(samples) if objects_in(detector, sample) == 2]
    drawn = twins[found[0]]
    report = clip_beside_detr(clip, detector, [samples[i] for i in found[:2]], method="grad_attention")
    assert report.pairs[0].objects == 2
    values = report.maps[1].values[0]
    assert np.abs(values).sum() == pytest.approx(1.0, abs=1e-6)
    for top, left, bottom, right in drawn.boxes / 8:
        part = values[int(top) : int(bottom) + 1, int(left) : int(right) + 1]
        assert part.sum() == pytest.approx(0.5, abs=0.25)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"method": "readout"}, "does not depend on the target"), ({"label": "magenta shape"}, "found no 'magenta")],
)
def test_different_targets_give_a_reason_and_no_score(detector, clip, pictures, changes, reason) -> None:
    shown = pictures
    if "label" in changes:
        shown = [
            Sample(f"s{i}", s.image)
            for i, s in enumerate(scenes(8, seed=13))
            if CLASSES.index("magenta shape") not in s.hues
        ]
    report = clip_beside_detr(clip, detector, shown, **changes)
    assert report.result is None
    assert all(reason in pair.reason for pair in report.pairs)
    assert reason in report.to_text()
    with pytest.raises(UsageError, match="nothing was compared"):
        report.draw(shown, "never.png")


def test_no_object_and_no_prompt_are_reasons(detector, clip, pictures) -> None:
    blank = Sample("blank", np.full((96, 96, 3), 128, np.uint8))
    few = tiny_clip(["a cat", "a dog"])
    assert "no object" in clip_beside_detr(clip, detector, [blank]).pairs[0].reason
    report = clip_beside_detr(few, detector, pictures[:1])
    assert report.result is None
    assert report.pairs[0].reason
    with pytest.raises(UsageError, match="no picture"):
        clip_beside_detr(clip, detector, [])


def test_the_figure_shows_the_median(detector, clip, pictures, tmp_path) -> None:
    report = clip_beside_detr(clip, detector, pictures)
    out = report.draw(pictures, tmp_path / "beside.png")
    assert out.stat().st_size > 10_000
