"""The job of ``foveate motion``: trained networks get the verdict that is true of them; scores against a loop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from foveate.errors import SampleError, UsageError
from foveate.interfaces import (
    Batch,
    BoundTarget,
    CallKey,
    CallLabels,
    Prediction,
    Sample,
    Site,
    Target,
    TargetRow,
    TokenAxis,
)
from foveate.study.motion import MotionReport, run_motion, summarise
from foveate.study.motion_edges import CUTS, Edges, SiteEdges, cuts, frame_edges, run_cut
from foveate.study.motion_scoring import VideoScores, score_clip
from foveate.study.motion_subject import Settings
from foveate.temporal.coalitions import CHANGED, Removal, variants
from foveate.temporal.verdict import Rule
from foveate.testing.motion_tasks import LABELS, TASKS, motion_clips
from foveate.testing.space_time import SpaceTimeConfig, SpaceTimeSource, SpaceTimeTransformer
from foveate.testing.tiny import TinySource

QUICK = Settings(Removal(draws=2), batch_size=32, edges=False)


def sharp(seed: int = 0, **shape: int) -> SpaceTimeSource:
    """Random weights with peaked attention."""
    module = SpaceTimeTransformer(SpaceTimeConfig(**shape), seed)
    width = module.config.width
    with torch.no_grad():
        for block in module.blocks:
            block.attention.qkv.weight[: 2 * width] *= 4.0
            block.attention.proj.weight *= 3.0
        module.head.weight *= 8.0
    return SpaceTimeSource(module)


def score_video(source: SpaceTimeSource, sample: Sample, settings: Settings, number: int = 0) -> VideoScores:
    """Of a clip with one class."""
    (found,) = score_clip(source, sample, settings, number)
    return found


def clips(task: str, count: int, seed: int = 5) -> list[Sample]:
    return motion_clips(task, count, seed, alone=False).samples()


# ---------------------------------------------------------------------------------------- the proof


@pytest.mark.parametrize("task", TASKS)
def test_trained_networks_get_the_verdict_that_is_true_of_them(task: str) -> None:
    report = run_motion(SpaceTimeSource.trained(task), clips(task, 100), QUICK)
    assert report.verdict.answer == TASKS[task], report.verdict.why
    effects = report.verdict.intervals
    if task == "xor":
        assert report.scales[0].like_none == {"appearance": True, "motion": True}
        assert effects["interaction"].low > 0.3
    if task == "redundant":
        assert effects["interaction"].high < -0.3
        assert report.verdict.detail == "either is enough"


def test_untrained_networks_get_no_verdict() -> None:
    """Their answers do change with the clip, reliably and by next to nothing."""
    totals = []
    for seed in range(6):
        report = run_motion(SpaceTimeSource(SpaceTimeTransformer(seed=seed)), clips("xor", 40), QUICK)
        totals.append(report.verdict.intervals["total"])
        assert {one.verdict.answer for one in report.scales if one.scale != "answer"} == {"inconclusive"}
    assert any(total.low > 0.0 for total in totals), "without a floor some would have had one"


def test_the_rule_of_attention_mass_says_the_same_of_all() -> None:
    settings = replace(QUICK, edges=True, removal=Removal(draws=1))
    said = {task: run_motion(SpaceTimeSource.trained(task), clips(task, 8), settings) for task in TASKS}
    assert {report.mass_rule for report in said.values()} == {"motion"}
    assert all(abs(report.mass.estimate - 0.75) < 0.06 for report in said.values())
    assert all(report.uniform == pytest.approx(0.75) for report in said.values())


def test_cut_edges_cost_those_who_use_them() -> None:
    settings = replace(QUICK, edges=True, removal=Removal(draws=1))
    colour = run_motion(SpaceTimeSource.trained("colour"), clips("colour", 24), settings).scales[0].cuts
    direction = run_motion(SpaceTimeSource.trained("direction"), clips("direction", 24), settings).scales[0].cuts
    assert abs(colour["between"].estimate) < 0.02
    assert direction["between"].low > 0.2
    assert direction["between"].estimate > direction["within"].estimate + 0.2


# ------------------------------------------------------------------------------------ against a loop


def plain_score(source: SpaceTimeSource, pixels: np.ndarray, index: int, scale: str) -> float:
    """One clip through the bare network in float64."""
    module = SpaceTimeTransformer(source.config).double()
    module.load_state_dict(source.module.state_dict())
    x = torch.from_numpy(pixels).double().permute(0, 3, 1, 2)[None] / 127.5 - 1.0
    with torch.no_grad():
        logits = module(x)[0]
    if scale == "answer":
        return float(logits.argmax() == index)
    return float((logits.softmax(-1) if scale == "probability" else logits)[index])


@pytest.mark.parametrize("removal", [Removal(draws=3), Removal("scrambled", "shuffle", draws=2, seed=7)])
def test_scores_are_those_of_a_loop(removal: Removal) -> None:
    source = sharp(1)
    sample = clips("xor", 5)[4]
    found = score_video(source, sample, Settings(removal, batch_size=3, edges=False), number=4)
    answer = int(source.module(source.encode([sample]).inputs).argmax())
    for scale in ("probability", "logit", "answer"):
        expected: dict[str, list[float]] = {}
        for one in variants(sample.pixels, sample.mask, removal, video=4):
            name = f"sham {one.coalition}" if one.sham else one.coalition
            expected.setdefault(name, []).append(plain_score(source, one.clip, answer, scale))
        expected["both"] = [plain_score(source, sample.pixels, answer, scale)]
        expected["reversed"] = [plain_score(source, sample.pixels[::-1].copy(), answer, scale)]
        assert set(found.scores[scale]) == set(expected)
        for name, values in expected.items():
            assert found.scores[scale][name] == pytest.approx(np.mean(values), abs=2e-5), (scale, name)


def test_batches_do_not_change_scores() -> None:
    source, sample = sharp(2), clips("redundant", 3)[2]
    one, many = (score_video(source, sample, replace(QUICK, batch_size=size)) for size in (1, 50))
    for scale, scores in one.scores.items():
        for name, value in scores.items():
            assert many.scores[scale][name] == pytest.approx(value, abs=1e-5)


def test_the_target_is_held_from_the_intact_clip() -> None:
    """Backwards, the network answers the other direction; the first answer is still what is scored."""
    source = SpaceTimeSource.trained("direction")
    for sample in clips("direction", 4):
        scores = score_video(source, sample, QUICK).scores["probability"]
        assert scores["both"] > 0.9
        assert scores["reversed"] < 0.1


def test_the_truth_may_come_from_a_column() -> None:
    source, samples = SpaceTimeSource.trained("xor"), clips("xor", 8)
    wrong = [
        replace(s, columns={"said": LABELS["xor"][LABELS["xor"].index(str(s.columns["label"])) ^ 1]})
        for s in samples
    ]
    right = run_motion(source, samples, replace(QUICK, truth="label")).scales[0].coalitions["both"].estimate
    other = run_motion(source, wrong, replace(QUICK, truth="said")).scales[0].coalitions["both"].estimate
    assert right > 0.9
    assert other == pytest.approx(1.0 - right, abs=1e-5)
    with pytest.raises(UsageError, match="no 'label' in the manifest"):
        run_motion(source, wrong, replace(QUICK, truth="label"))


# --------------------------------------------------------------------------------------- the report


def test_the_unit_is_the_video() -> None:
    """Three windows of one recording count once, at their mean."""
    source = SpaceTimeSource.trained("colour")
    names = [f"v{i // 6}{i % 2}" for i in range(12)]
    samples = [
        replace(s, columns={**s.columns, "video": name})
        for s, name in zip(clips("colour", 12), names, strict=True)
    ]
    report = run_motion(source, samples, QUICK)
    assert report.verdict.n == 4
    assert len(report.clips) == 12
    found = [one.scores["logit"]["motion"] for one in report.clips]
    mean = np.mean([np.mean([f for f, n in zip(found, names, strict=True) if n == name]) for name in set(names)])
    logit = next(one for one in report.scales if one.scale == "logit")
    assert logit.coalitions["motion"].estimate == pytest.approx(mean)
    assert any("12 clips of 4 videos" in sentence for sentence in report.caveats)


def test_clips_that_cannot_be_used_are_named() -> None:
    good = clips("colour", 6)
    bad = [
        replace(good[0], id="one frame", pixels=good[0].pixels[:1], mask=good[0].mask[:1]),  # type: ignore[index]
        replace(good[0], id="picture", pixels=good[0].pixels[0], mask=None),
        replace(good[0], id="no object", mask=np.zeros_like(good[0].mask)),
    ]
    report = run_motion(SpaceTimeSource.trained("colour"), [*bad, *good], QUICK)
    assert set(report.failed) == {"one frame", "picture", "no object"}
    assert len(report.clips) == 6
    assert any("3 clips could not be used" in sentence for sentence in report.caveats)
    with pytest.raises(UsageError, match=r"no clip could be used: .*has no motion"):
        run_motion(SpaceTimeSource.trained("colour"), bad[:1], QUICK)


def test_models_of_images_are_refused() -> None:
    with pytest.raises(UsageError, match="reads images"):
        run_motion(TinySource(), [], QUICK)


def test_a_report_is_plain_complete_and_the_same_again() -> None:
    import json

    from foveate.cli._common import _plain

    source, samples = SpaceTimeSource.trained("redundant"), clips("redundant", 10)
    settings = replace(QUICK, edges=True)
    one, again = (run_motion(source, samples, settings).to_dict() for _ in range(2))
    assert json.dumps(_plain(one)) == json.dumps(_plain(again))
    assert one["n"] == 10
    assert one["card"]["id"] == one["model"] == "motion-redundant"
    assert len(one["videos"]) == 10
    assert one["masks"] == {"given": 10}
    assert one["cut_edges"]["within"] == one["cut_edges"]["matched"] < one["cut_edges"]["between"]
    for name in CHANGED:
        assert one["sizes"][f"sham {name}"]["grey_levels"] == pytest.approx(
            one["sizes"][name]["grey_levels"], rel=0.1
        )


def test_a_scale_that_disagrees_is_said() -> None:
    """Cues that multiply on one scale add on another: made-up scores, as they would be measured."""
    report = made_up({"none": 0.0, "appearance": 0.5, "motion": 0.5, "both": 1.0}, {"both": 2.0})
    assert [one.verdict.answer for one in report.scales] == ["both (additive)", "both (interaction)"]
    assert any("depends on the scale" in sentence for sentence in report.caveats)


def test_a_costly_sham_is_said_and_corrected_for() -> None:
    report = made_up({"none": 0.0, "appearance": 0.5, "motion": 0.5, "both": 1.0, "sham motion": 0.6})
    head = report.scales[0]
    assert head.raw.answer == "both (additive)"
    assert head.corrected["motion"].estimate == pytest.approx(0.9, abs=0.05)
    assert any("sham as large as the change without appearance" in sentence for sentence in report.caveats)
    assert any("without the sham correction" in sentence for sentence in report.caveats)


def made_up(first: dict[str, float], *further: dict[str, float]) -> MotionReport:
    """A report on clips whose scores are given, with a little noise."""
    scored = []
    for i in range(40):
        base = score_video(*_ANY)
        rng = np.random.default_rng(i)
        scales = {}
        for number, change in enumerate(({}, *further)):
            means = {**first, **change}
            full = {f"sham {name}": means["both"] for name in CHANGED} | {"reversed": means["both"]} | means
            scales[f"scale {number}"] = {name: mean + 0.02 * rng.normal() for name, mean in full.items()}
        scored.append(replace(base, id=f"{i}", video=f"{i}", scores=scales))
    return summarise("made up", scored, {}, QUICK, Rule())


_ANY: Any = (sharp(3), clips("xor", 1)[0], replace(QUICK, removal=Removal(draws=1)))


# -------------------------------------------------------------------------------------------- edges


def masked_forward(source: SpaceTimeSource, clip: Tensor, cut: np.ndarray) -> tuple[Tensor, list[Tensor]]:
    """The network written out in float64 without the edges in ``cut`` (query, key): logits, attention by layer."""
    module = SpaceTimeTransformer(source.config).double()
    module.load_state_dict(source.module.state_dict())
    c, p = module.config, module.config.patch
    tokens = []
    for t in range(c.frames):
        for row in range(c.side):
            for column in range(c.side):
                patch = clip[t, :, row * p : (row + 1) * p, column * p : (column + 1) * p].double().reshape(-1)
                place = module.place[0, 0, row * c.side + column]
                tokens.append(module.embed(patch) + place + module.time[0, t, 0])
    x, maps = torch.stack(tokens), []
    for block in module.blocks:
        y = block.norm1(x)
        q, k, v = (part.reshape(len(x), c.heads, -1) for part in block.attention.qkv(y).chunk(3, -1))
        scores = torch.einsum("ihd,jhd->hij", q, k) / (c.width // c.heads) ** 0.5
        weights = scores.masked_fill(torch.from_numpy(cut), float("-inf")).softmax(-1)
        maps.append(weights)
        x = x + block.attention.proj(torch.einsum("hij,jhd->ihd", weights, v).reshape(len(x), -1))
        x = x + block.mlp(block.norm2(x))
    return module.head(module.norm(x).mean(0)), maps


@torch.no_grad()
def test_cuts_remove_the_edges_that_they_say() -> None:
    source, sample = sharp(4), clips("xor", 1)[0]
    batch = source.encode([sample])
    frame = np.repeat(np.arange(4), 9)
    between = frame[:, None] != frame[None, :]
    edges = frame_edges(source, batch)
    (site,) = edges.sites
    assert (site.between == between).all()
    assert (site.within == (~between & ~np.eye(36, dtype=bool))).all()
    assert site.copies == 2 * 4
    found = {cut.name: cut for cut in cuts(edges, seed=1)}
    assert set(found) == set(CUTS)
    pool = {"between": between, "within": site.within, "matched": between, "anywhere": ~np.eye(36, dtype=bool)}
    for name, cut in found.items():
        (knockout,) = cut.interventions
        mask = np.asarray(knockout.mask)[0, 0]
        assert not (mask & ~pool[name]).any()
        assert cut.edges == mask.sum() * site.copies
        logits, _ = masked_forward(source, batch.inputs[0], mask)
        assert torch.allclose(run_cut(source, batch, cut)[0].double(), logits, atol=1e-4)
    assert found["matched"].edges == found["within"].edges == 36 * 8 * 8
    assert abs(found["anywhere"].edges - found["between"].edges) <= 36 * 8 // 2
    assert not torch.allclose(run_cut(source, batch, found["between"]), source.forward(batch), atol=1e-2)


@torch.no_grad()
def test_attention_mass_is_that_of_the_written_out_network() -> None:
    source, sample = sharp(5), clips("xor", 1)[0]
    batch = source.encode([sample])
    frame = np.repeat(np.arange(4), 9)
    between = frame[:, None] != frame[None, :]
    _, maps = masked_forward(source, batch.inputs[0], np.zeros_like(between))
    expected = np.mean([float((m * torch.from_numpy(between)).sum(-1).mean()) for m in maps])
    edges = frame_edges(source, batch)
    assert edges.mass == pytest.approx(expected, abs=1e-5)
    assert edges.uniform == pytest.approx(0.75)
    assert abs(edges.mass - 0.75) > 0.01, "attention must be peaked for this test to mean anything"


def test_where_frames_have_enough_edges_the_sham_is_exactly_as_large() -> None:
    """Divided attention: few edges through time, many within frames."""
    through = SiteEdges("time", ~np.eye(6, dtype=bool), np.zeros((6, 6), bool), copies=20)
    inside = SiteEdges("space", np.zeros((20, 20), bool), ~np.eye(20, dtype=bool), copies=6)
    found = {cut.name: cut for cut in cuts(Edges((through, inside), 0.5, 0.5), seed=0)}
    assert set(found) == {"between", "within"}
    assert [k.site for k in found["between"].interventions] == ["time"]
    assert [k.site for k in found["within"].interventions] == ["space"]
    assert found["between"].edges == 6 * 5 * 20
    assert found["within"].edges == pytest.approx(found["between"].edges, abs=6 * 20 / 2)
    assert cuts(Edges((inside,), 0.5, 0.5), seed=0) == []


class DividedNetwork(SpaceTimeTransformer):
    """The first block attends within each frame, the second along time at each place."""

    def forward(self, clips: Tensor) -> Tensor:
        count, c = len(clips), self.config
        cut = clips.reshape(count, c.frames, 3, c.side, c.patch, c.side, c.patch).permute(0, 1, 3, 5, 2, 4, 6)
        x = self.embed(cut.reshape(count, c.frames, c.side**2, -1)) + self.place + self.time
        x = self.blocks[0](x.flatten(0, 1)).reshape(x.shape).transpose(1, 2)
        x = self.blocks[1](x.flatten(0, 1)).reshape(x.shape).transpose(1, 2)
        logits: Tensor = self.head(self.norm(x).mean((1, 2)))
        return logits


class Divided(SpaceTimeSource):
    """A source of that network, as TimeSformer's is."""

    @property
    def sites(self) -> tuple[Site, ...]:
        heads = self.config.heads
        return (
            Site("space", {"blocks.0.attention": 0}, heads, "tokens", "tokens", group=("frame",)),
            Site("time", {"blocks.1.attention": 1}, heads, "tokens", "tokens", "temporal", group=("position",)),
        )

    def label(self, call: CallKey, batch: Batch, outputs: Tensor) -> CallLabels:
        c = self.config
        if call.site == "space":
            axis = TokenAxis.patches(c.side, c.side, height=c.image, width=c.image)
            return CallLabels((("sample", len(batch)), ("frame", c.frames)), axis, axis)
        axis = replace(TokenAxis.of_kind("frame", c.frames), frame=np.arange(c.frames, dtype=np.int32))
        return CallLabels((("sample", len(batch)), ("position", c.side**2)), axis, axis)


@torch.no_grad()
def test_divided_attention_is_cut_along_time_and_the_sham_within_frames_is_as_large() -> None:
    module = DividedNetwork(seed=8)
    module.load_state_dict(sharp(8).module.state_dict())
    source, sample = Divided(module), clips("xor", 1)[0]
    batch = source.encode([sample])
    edges = frame_edges(source, batch)
    found = {cut.name: cut for cut in cuts(edges, seed=2)}
    assert set(found) == {"between", "within"}
    assert found["between"].edges == 4 * 9 * (4 * 3)  # heads x places x ordered pairs of frames
    assert found["within"].edges == pytest.approx(found["between"].edges, abs=4 * 4 * 9)
    assert {k.site for k in found["within"].interventions} == {"space"}
    attention = module.blocks[1].attention
    attention.forward = lambda x: attention.proj(attention.qkv(x).chunk(3, -1)[2])  # each token reads itself only
    expected = module(batch.inputs)
    del attention.forward
    assert torch.allclose(run_cut(source, batch, found["between"]), expected, atol=1e-5)
    assert not torch.allclose(module(batch.inputs), expected, atol=1e-2)


# ------------------------------------------------------------------------------------------ trackers


class Decider(SpaceTimeSource):
    """Answers by the sign of a decision that a held run keeps."""

    def forward(self, batch: Batch, *, grad: bool = False) -> Any:
        logits = super().forward(batch, grad=grad)
        own = batch.inputs.amax((1, 2, 3, 4)) > 0.5
        return logits, torch.tensor(
            [batch.shared.get("held", {}).get(n, bool(o)) for n, o in zip(batch.ids, own, strict=True)]
        )

    def hold(self, batch: Batch, outputs: Any) -> Batch:
        held = dict(zip(batch.ids, outputs[1].tolist(), strict=True))
        return replace(batch, shared={**batch.shared, "held": held})

    def predictions(self, outputs: Any, batch: Batch) -> list[list[Prediction]]:
        return super().predictions(outputs[0], batch)

    def bind(self, outputs: Any, batch: Batch, target: Target) -> BoundTarget:
        return super().bind(outputs[0], batch, target)

    def score(self, outputs: Any, batch: Batch, bound: BoundTarget) -> Tensor:
        return super().score(outputs[0], batch, bound) * outputs[1][[row.sample for row in bound.rows]]


def test_decisions_of_the_intact_clip_are_kept() -> None:
    """Without its bright object the decision would fall and every score with it; held, it does not."""
    found = score_video(Decider(sharp(9).module), dimmed(clips("colour", 1)[0]), QUICK)
    assert found.scores["probability"]["both"] > 0
    assert found.scores["probability"]["motion"] > 0
    assert found.scores["probability"]["none"] > 0


def dimmed(sample: Sample) -> Sample:
    """Nothing but the object is bright."""
    assert sample.mask is not None
    pixels = np.minimum(sample.pixels, 100)
    pixels[sample.mask] = sample.pixels[sample.mask]
    return replace(sample, pixels=pixels)


class Follower(SpaceTimeSource):
    """A tracker of saturated things: its one object is whatever is not grey, row 7, with a mask a frame."""

    targets = ("class",)

    def forward(self, batch: Batch, *, grad: bool = False) -> Any:
        logits = super().forward(batch, grad=grad)
        spread = batch.inputs.amax(2) - batch.inputs.amin(2)
        return logits, (spread > 0.8).numpy()

    def predictions(self, outputs: Any, batch: Batch) -> list[list[Prediction]]:
        found = []
        for i, masks in enumerate(outputs[1]):
            score = float(outputs[0][i].softmax(-1)[0])
            found.append([Prediction("a", score, 0, object=7, mask=masks, track="7")] if masks.any() else [])
        return found

    def bind(self, outputs: Any, batch: Batch, target: Target) -> BoundTarget:
        rows = [TargetRow(i, "class", 0, "a", object=7) for i, masks in enumerate(outputs[1]) if masks.any()]
        held = torch.from_numpy(outputs[1])[[row.sample for row in rows]]
        return BoundTarget(tuple(rows), target.scale, {"masks": held})

    def score(self, outputs: Any, batch: Batch, bound: BoundTarget) -> Tensor:
        assert len(bound.context["masks"]) == len(bound), "what was held must travel with its row"
        return super().score(outputs[0], batch, bound)


def without_masks(samples: Sequence[Sample]) -> list[Sample]:
    return [replace(sample, mask=None) for sample in samples]


def test_a_tracker_is_scored_with_its_own_masks_and_identity_loss_stands_beside() -> None:
    tracker = Follower(sharp(6).module)
    samples = clips("xor", 8)
    report = run_motion(tracker, without_masks(samples), QUICK)
    assert report.to_dict()["masks"] == {"the model's own track": 8}
    lost = {name: interval.estimate for name, interval in report.lost.items()}
    assert lost["appearance"] == 0.0, "frozen, the object is still there in every frame"
    assert lost["reversed"] == 0.0
    assert lost["motion"] == lost["none"] == 1.0, "a grey object is no longer followed"
    assert all(lost[f"sham {name}"] == 0.0 for name in CHANGED)
    assert any("loses the object in 100%" in sentence for sentence in report.caveats)
    assert [one.scale for one in report.scales] == ["probability", "logit"], "no answer of the whole clip"
    given = run_motion(tracker, samples, QUICK)
    for name in ("none", "appearance", "motion", "both"):
        own = report.scales[0].coalitions[name].estimate
        assert own == pytest.approx(given.scales[0].coalitions[name].estimate, abs=1e-5)


class Two(Follower):
    """Two objects, left and right half, of two classes."""

    def predictions(self, outputs: Any, batch: Batch) -> list[list[Prediction]]:
        sides = [np.arange(12) < 6, np.arange(12) >= 6]
        return [
            [
                Prediction("ab"[k], 0.5, k, object=k, mask=masks & side, track=str(k))
                for k, side in enumerate(sides)
            ]
            for masks in outputs[1]
        ]

    def bind(self, outputs: Any, batch: Batch, target: Target) -> BoundTarget:
        rows = [TargetRow(i, "class", k, "ab"[k], object=k) for i in range(len(batch)) for k in (0, 1)]
        held = torch.arange(len(rows))
        return BoundTarget(tuple(rows), target.scale, {"masks": held})


def test_objects_of_two_classes_are_tested_apart_and_count_as_one_video() -> None:
    source, samples = Two(sharp(6).module), without_masks(clips("xor", 8))
    report = run_motion(source, samples, QUICK)
    assert report.verdict.n == 8
    assert [one.label for one in report.clips] == ["a", "b"] * 8
    assert set(report.by_label) == {"a", "b"}
    assert report.to_dict()["clips"] == 8
    a, b = (report.clips[i].scores["probability"] for i in (0, 1))
    assert a["both"] + b["both"] == pytest.approx(1.0, abs=1e-5)
    assert a["motion"] + b["motion"] != pytest.approx(1.0, abs=1e-3), "each object is greyed by itself"


def test_a_clip_without_a_track_is_named() -> None:
    empty = Sample("empty", np.full((4, 12, 12, 3), 90, np.uint8))
    report = run_motion(Follower(sharp(6).module), [empty, *without_masks(clips("xor", 5))], QUICK)
    assert list(report.failed) == ["empty"]
    assert "nothing to score" in report.failed["empty"]


def test_of_long_clips_the_frames_that_are_read_are_changed() -> None:
    """The model reads 4 of 11 frames, evenly: the result is that of a clip of those four."""
    source = Follower(sharp(7).module)
    clip = motion_clips("xor", 1, 0)
    pixels = np.repeat(clip.clips[0], [3, 3, 3, 2], axis=0)
    sample = Sample("long", pixels)
    found, short = (score_video(source, one, QUICK) for one in (sample, Sample("short", clip.clips[0])))
    assert found.masks == "the model's own track"
    assert found.sizes["motion"][0] == pytest.approx(clip.masks[0].mean())
    assert found.lost["appearance"] == 0.0
    assert found.scores == short.scores


def test_moving_pixels_are_found_on_all_frames() -> None:
    """In three of the four frames read the block is in one place: only the whole clip shows what is behind."""
    pytest.importorskip("skimage")
    rng = np.random.default_rng(1)
    pixels = np.repeat(rng.integers(0, 60, (1, 12, 12, 3), np.uint8), 13, axis=0)
    moving = np.zeros((13, 12, 12), bool)
    for t in range(13):
        x = 0 if t in (0, 4, 8) else 3 * (1 + t % 3)
        moving[t, 4:8, x : x + 3] = True
    pixels[moving] = 250
    read = [0, 4, 8, 12]
    found = score_video(sharp(1), Sample("thirteen", pixels), QUICK)
    assert found.masks == "pixels that move"
    assert found.sizes["motion"][0] == pytest.approx(moving[read].mean(), rel=0.01)


class Pairs(Follower):
    """Takes every second frame of an even number: the frames it reads are not all of a shorter clip's."""

    def encode(self, samples: Sequence[Sample]) -> Batch:
        chosen = np.arange(0, 8, 2)
        if any(len(sample.pixels) != 8 for sample in samples):
            raise SampleError("eight frames, please")
        batch = super().encode([replace(sample, pixels=sample.pixels[chosen]) for sample in samples])
        return replace(batch, per_sample={"frame_index": torch.from_numpy(chosen).expand(len(samples), 4)})


def test_where_a_shorter_clip_is_another_input_masks_serve_the_frames_between() -> None:
    clip = motion_clips("xor", 1, 0)
    sample = Sample("doubled", np.repeat(clip.clips[0], 2, axis=0))
    found = score_video(Pairs(sharp(7).module), sample, QUICK)
    assert found.sizes["motion"][0] == pytest.approx(clip.masks[0].mean(), rel=0.5)
    assert set(found.lost) >= {"appearance", "motion", "none"}
