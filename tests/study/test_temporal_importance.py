"""Frame importance, frame deletion and decision time, against slow forwards through the model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr

from foveate.data.run import Run
from foveate.errors import SampleError, UsageError
from foveate.interfaces import Prediction, Target, TokenAxis
from foveate.render.style import Picture
from foveate.study import temporal_decision
from foveate.study.temporal_decision import decision, prefix_labels
from foveate.study.temporal_importance import _pooling, _verdict, _weights, deletion, frame_importance, importance
from foveate.study.temporal_subject import ClipSubject
from temporal_runs import CLIPS, capture, sharp


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return capture(tmp_path_factory.mktemp("swim"))


@pytest.fixture(scope="module")
def subject(path: Path) -> ClipSubject:
    made = ClipSubject(Run.open(path))
    made.__dict__["source"] = sharp()  # the run's name opens the model without the sharpening
    return made


def test_importance_is_the_mass_of_the_row_on_each_frame(subject: ClipSubject) -> None:
    outcome, site = importance(subject), subject.run.site("decoder.cross")
    thirds = outcome.products["temporal/importance"]["thirds"].values
    for i in range(CLIPS):
        best = str(subject.run.predictions["track"].values[i, 0])
        row = [str(name) for name in site["query_label"].values].index(best)
        weights = site["attention"].values[i, 2, :, row].astype(np.float64).mean(0)
        frame = subject.run.tokens("decoder.cross", "key", i).frame
        share = np.array([weights[frame == t].sum() for t in range(6)]) / weights.sum()
        np.testing.assert_allclose(frame_importance(subject).shares[i], share, rtol=1e-6)
        np.testing.assert_allclose(thirds[i], share.reshape(3, 2).sum(1), rtol=1e-5)
    assert [finding.baseline for finding in outcome.findings] == [1 / 3] * 3
    assert all("inconclusive" in finding.quantity for finding in outcome.findings)  # three videos
    assert isinstance(outcome.figures["importance"], Picture)


@pytest.mark.parametrize(
    ("shares", "verdict"),
    [((0.6, 0.2, 0.2), "early"), ((0.2, 0.2, 0.6), "late"), ((0.33, 0.34, 0.33), "even")],
)
def test_the_verdict_over_videos(shares: tuple[float, ...], verdict: str) -> None:
    rng = np.random.default_rng(0)
    thirds = np.array(shares) + rng.normal(0, 0.02, (10, 3))
    many: Any = SimpleNamespace(videos=[str(i) for i in range(10)], seed=0)
    assert _verdict(many, thirds / thirds.sum(1, keepdims=True)) == verdict
    few: Any = SimpleNamespace(videos=["a"] * 3 + ["b"] * 7, seed=0)
    assert _verdict(few, thirds) == "inconclusive"  # two videos, however many windows


def test_deletion_freezes_the_most_important_frames_first(subject: ClipSubject) -> None:
    """Frames are replaced in the pictures, one more at a time, and the model is asked again."""
    product = deletion(subject).products["temporal/deletion"]
    source = subject.source
    for i in range(2):
        sample = subject.sample(i)
        batch = source.encode([sample])
        with torch.no_grad():
            outputs = source.forward(batch)
            bound = source.bind(outputs, batch, Target())
            best = int(subject.run.predictions["object"].values[i, 0])
            row = next(k for k, one in enumerate(bound.rows) if one.object == best)
            order = np.argsort(-frame_importance(subject).shares[i])
            for gone in range(6):
                kept = sorted(set(range(6)) - set(order[:gone].tolist()))
                shown = [min(kept, key=lambda k, t=t: (abs(k - t), k)) for t in range(6)]  # type: ignore[misc]
                changed = source.encode([replace(sample, pixels=sample.pixels[shown])])
                now = batch.replace(changed.inputs, [0])
                held = source.hold(now, outputs)
                score = float(source.score(source.forward(held), held, bound)[row])
                assert float(product["score"].values[i, gone]) == pytest.approx(score, rel=1e-4)
    np.testing.assert_allclose(product["score"].values[:, 0], product["random"].values[:, 0], rtol=1e-5)


class Prefixes:
    """Answers by how many different frames it is shown; reads clips of any length, or of six only."""

    def __init__(self, labels: list[str | None], *, fixed: bool = False, masks: Any = None) -> None:
        self.labels, self.fixed, self.masks = labels, fixed, masks
        self.lengths: list[int] = []

    def encode(self, samples: Any) -> Any:
        pixels = samples[0].pixels
        if self.fixed and len(pixels) != 6:
            raise SampleError("six frames")
        return SimpleNamespace(inputs=torch.zeros(1, len(pixels), 1), pixels=pixels)

    def forward(self, batch: Any) -> Any:
        self.lengths.append(len(batch.pixels))
        return len({frame.tobytes() for frame in batch.pixels})

    def predictions(self, outputs: Any, batch: Any) -> Any:
        name = self.labels[outputs - 1]
        if name is None:
            return [[]]
        mask = None if self.masks is None else self.masks[outputs - 1][: len(batch.pixels)]
        return [[Prediction("other", 0.9), Prediction(name, 0.5, mask=mask)][0 if name == "other" else 1 :]]


def asked(path: Path, model: Prefixes) -> ClipSubject:
    made = ClipSubject(Run.open(path))
    made.__dict__["source"] = model
    return made


@pytest.mark.parametrize("fixed", [False, True])
def test_prefixes_are_cut_or_frozen(path: Path, fixed: bool) -> None:
    model = Prefixes(["a", None, "b", "a", "b", "b"], fixed=fixed)
    labels, way = prefix_labels(asked(path, model), 0)
    assert labels == ["a", None, "b", "a", "b", "b"]
    assert way == ("frozen" if fixed else "truncated")
    assert model.lengths == ([6] * 6 if fixed else [1, 2, 3, 4, 5, 6])


def test_a_track_of_a_prefix_must_cover_the_same_object(path: Path) -> None:
    whole = np.zeros((6, 4, 4), bool)
    whole[1:, :2] = True  # born in frame 1
    away = np.zeros_like(whole)
    away[:, 2:] = True
    model = Prefixes(["a", "a", "b", "a", "a", "a"], masks=[whole, whole, whole, away, whole, whole])
    labels, _ = prefix_labels(asked(path, model), 0)
    assert labels == [None, "a", "b", None, "a", "a"]  # not born yet; another object


def test_decision_time_beside_prefixes_of_other_videos(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = [["x", "y", "y", "y", "y", "y"], ["y"] * 6, ["x", "x", "y", "x", "x", "x"]]
    subject = ClipSubject(Run.open(path))
    monkeypatch.setattr(temporal_decision, "prefix_labels", lambda _, place: (table[place], "truncated"))
    finding = decision(subject).findings[0]
    np.testing.assert_allclose(finding.values, np.array([2, 1, 4]) / 6)
    # Of clip 0 (y): clip 1's prefixes decide at 1, clip 2's only at the end. Of clip 2 (x): never before the end.
    np.testing.assert_allclose(finding.baseline, np.array([(1 + 6) / 2, (2 + 6) / 2, 6]) / 6)
    monkeypatch.setattr(temporal_decision, "prefix_labels", lambda _, place: ([None] * 6, "truncated"))
    with pytest.raises(UsageError, match="no clip has an answer"):
        decision(subject)


def test_pooling_weights_of_the_surest_track() -> None:
    """A pooling row a track over frames, padded to six; the surest answer is object 1."""
    rng = np.random.default_rng(0)
    weights = rng.dirichlet(np.ones(4), (1, 3, 1, 2, 1))
    stored = np.zeros((1, 3, 1, 2, 1, 6))
    stored[..., :4] = weights
    dims = ("sample", "track", "layer", "head", "query", "key")
    site = xr.Dataset({"attention": (dims, stored)})
    frames = replace(TokenAxis.of_kind("object", 4), frame=np.array([2, 0, 1, 3], np.int32))
    key = TokenAxis.concat(frames, TokenAxis.of_kind("padding", 2))
    query = TokenAxis.of_kind("object", 1)
    predictions = xr.Dataset({"object": (("sample", "rank"), np.array([[1, 0]]))})
    run = SimpleNamespace(tokens=lambda _, axis, __: key if axis == "key" else query, predictions=predictions)
    fake: Any = SimpleNamespace(positions=[0], frames=5, run=run, sites=lambda: iter([("refiner.pool", site)]))
    found = _pooling(fake)
    assert found is not None
    assert found[0] == "refiner.pool"
    mean = weights[0, 1, 0, :, 0].mean(0)
    np.testing.assert_allclose(_weights(fake, *found, 0), [mean[1], mean[2], mean[0], mean[3], np.nan])
